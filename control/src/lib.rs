//! moonrail's control thread.

pub mod brain;
pub mod config;
pub mod connect;
pub mod error;
pub mod gid;
pub mod handle;
pub mod handshake;
pub mod metadata;
pub mod names;
pub mod repair;
pub mod wire;

pub use config::{
    Clock, ControlConfig, ControlNic, CoreLink, HandshakeOptions, LogLevel, LogRecord, LogSink, PortChoice, RailOptions,
};
pub use error::{ControlError, DialError, NotifyError, OpenError, PublishError, StartError};
pub use handle::{Control, Incident, Notification, RailReport, RailState, RemoteSegment, start};
pub use metadata::{MetadataUri, StoreOptions};
