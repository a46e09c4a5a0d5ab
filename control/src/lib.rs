//! moonrail's control thread.

pub mod config;
pub mod error;
pub mod gid;
pub mod handle;
pub mod metadata;
pub mod names;
pub mod wire;

pub use config::{
    Clock, ControlConfig, ControlNic, CoreLink, HandshakeOptions, LogLevel, LogRecord, LogSink, PortChoice, RailOptions,
};
pub use error::{ControlError, DialError, NotifyError, OpenError, PublishError, StartError};
pub use handle::{Control, Incident, Notification, RailReport, RailState, RemoteSegment, start};
pub use metadata::{MetadataUri, StoreOptions};
