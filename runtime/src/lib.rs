//! moonrail moves bytes between the registered memory of two machines over every RDMA NIC they have.
//!
//! ```text
//!   your threads                         data cores, one pinned thread each        peer
//!  ┌───────────────────────────┐        ┌──────────────────────────────────┐     ┌──────────────┐
//!  │ Engine ── allocate ─▶ Region      │ claim slices → post → completions │════▶│ its Regions, │
//!  │   │  └── open_segment ─▶ Segment  └───────▲──────────────────┬────────┘     │ seen here as │
//!  │   └── submit(&segment, transfers) ─────────┘                  │              │  a Segment   │
//!  │        └─▶ Batch: poll · wait · .await  ◀─── one word ────────┘              └──────────────┘
//!  └───────────────────────────┘         one control thread: metadata, handshake, repair
//! ```
//!
//! An [`Engine`] is one node. Memory that takes part is a [`Region`]; another node's regions together are its
//! [`Segment`], opened by name; a [`Transfer`] is one READ or WRITE between the two; transfers submitted together are a
//! [`Batch`], which ends exactly once, or tells within a bounded time why it has not.
//!
//! The order in which data meets the modules: [`builder`] and [`config`] make an [`engine`]; [`region`] registers memory;
//! [`segment`] finds a peer's; [`batch`] moves bytes; [`notify`] tells the peer about it.
#![deny(missing_docs)]

pub mod builder;
pub mod config;
pub mod log;
mod open;
mod pin;
mod start;
pub mod topology;

pub mod engine;

mod memlock;
pub mod region;
mod registry;

pub mod segment;

pub mod batch;
mod live;
mod submit;
mod words;

pub mod notify;

pub mod error;
mod metrics;

pub use batch::{Batch, BatchBuilder, BatchStatus, Transfer, TransferState};
pub use builder::{EngineBuilder, PollMode, TlsFiles};
pub use engine::{CoreCounters, Counters, Engine, IncidentInfo, NicInfo, RailInfo};
pub use error::{
    BuildError, NicProblem, NotifyError, RefusedRegistration, RegisterError, SegmentError, SubmitError, TransferError,
    UnregisterError, WaitError,
};
pub use log::Level;
pub use notify::Notification;
pub use region::Region;
pub use segment::{RemoteRange, Segment};

pub use moonrail_datapath::error::Cause;
pub use moonrail_datapath::nic::{Nic, Op};
pub use moonrail_datapath::region::{Memory, OutOfRange};
pub use moonrail_datapath::units::{Gid, GidIndex, Lid, Mtu, PortNum};
