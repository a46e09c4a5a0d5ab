//! moonrail's control thread: who is where, rails between NICs, and their repair. It decides and never blocks.
//!
//! How a rail comes about (one pair of NICs; both ends run this code, and a stock engine's end looks the same):
//!
//! ```text
//!        A (wants to move bytes)                                        B
//!  open ──▶ get the descriptor of B (store, or message 1) ─────────────▶
//!  make queue pairs (RESET)
//!        ── type 0: paths, GID, LID, qp_num, ready_ack:false ──────────▶ make queue pairs, connect them (RTS)
//!        ◀── the same, B's numbers, reply_msg:"" ───────────────────────
//!  connect queue pairs (RTS)
//!        ── second connection, the same with ready_ack:true ───────────▶ adopt: the core posts its trial
//!        ◀── empty reply ───────────────────────────────────────────────
//!  adopt: the core posts its trial; when it is back the rail is usable
//!
//!  both ask at once   each answers the other's request with the queue pairs of its own; both acknowledge
//!  B restarted        B's queue pairs are new: A retires its life of the rail and answers with fresh ones
//!  first error        core ▶ FirstError; queue pairs to ERR, drained, then a new handshake with back-off. The peer's
//!                     consent to fresh queue pairs proves that its old ones are retired: the old life is fenced
//! ```
//!
//! The modules, in the order in which data meets them: [`config`] and `start` bring the thread up; `driver` has the
//! sockets, `pool` what blocks, `handoff` the rings to the cores. [`wire`] and [`metadata`] parse what comes in
//! ([`names`], [`place`], [`gid`], [`fabric`]: the small choices). [`brain`] decides, with the judgements of [`handshake`] and the patience of
//! [`repair`]; [`connect`] does to devices what it decided. [`handle`] is what other crates hold, [`error`] what they get.
#![deny(missing_docs)]

pub mod brain;
pub mod config;
pub mod connect;
mod driver;
pub mod error;
pub mod fabric;
pub mod gid;
pub mod handle;
mod handoff;
pub mod handshake;
pub mod metadata;
pub mod names;
pub mod place;
mod pool;
pub mod repair;
mod start;
pub mod wire;

pub use config::{
    Clock, ControlConfig, ControlNic, CoreLink, Eviction, HandshakeOptions, LogLevel, LogRecord, LogSink, PortChoice,
    RAILS_PER_NIC_MAX, RailOptions,
};
pub use error::{ControlError, DialError, NotifyError, OpenError, PublishError, StartError};
pub use fabric::FabricPolicy;
pub use handle::{Charge, Control, Incident, Notification, RailReport, RailState, RemoteSegment, Story, Way};
pub use metadata::{MetadataUri, StoreOptions};
pub use start::start;
