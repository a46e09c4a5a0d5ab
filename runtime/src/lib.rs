//! moonrail moves bytes between the registered memory of two processes: over every RDMA NIC of their machines, through
//! shared memory on one host, or over TCP.
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
//! ```
//! use std::time::Duration;
//! use moonrail::{Engine, Transfer};
//! # use moonrail_datapath::nic::sim::{SimOptions, SimWorld};
//! # use moonrail_datapath::units::Gid;
//! # let world = SimWorld::real_time(1, SimOptions::default());
//! # let nic = |node: u8| {
//! #     let gid = Gid([0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 10, 0, 0, node]);
//! #     vec![world.nic(&format!("node{node}"), "sim0", gid).0]
//! # };
//! # let configure = |builder: moonrail::EngineBuilder, node| {
//! #     builder.metadata("memory://doc").nics_from(nic(node)).cores(1).pin_cores(false).log(|_, _| {})
//! # };
//! // On one node (here both are in one process, over simulated NICs and a metadata store in memory):
//! let store = Engine::builder().name("store");
//! # let store = configure(store, 1);
//! let store = store.build()?;
//! let offered = store.allocate(1 << 20, "*")?;
//! offered.write(0, b"forty-two")?;
//!
//! // On the other. Both have the same .metadata("etcd://10.0.0.1:2379"); without a metadata server, open the HOST:PORT
//! // that `Engine::name` of the first node tells.
//! let worker = Engine::builder().name("worker");
//! # let worker = configure(worker, 2);
//! let worker = worker.build()?;
//! let memory = worker.allocate(1 << 20, "*")?;
//! let peer = worker.open_segment("store")?;
//! let remote = peer.buffers()[0].addr;
//! let batch = worker.submit(&peer, &[Transfer::read_into(&memory, 0, remote, 9)])?;
//! batch.wait(Duration::from_secs(30))?;
//!
//! let mut bytes = [0; 9];
//! memory.read(0, &mut bytes)?;
//! assert_eq!(&bytes, b"forty-two");
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! Most options of [`EngineBuilder`] have a variable of Mooncake's beside them; docs/configuration.md names those without.
//! Every error says what to do next. No call waits without a bound.
//!
//! The order in which data meets the modules: [`builder`] and [`config`] decide, [`topology`] places, [`engine`] is the
//! node, [`incident`] and [`inspect`] what can be read of it; [`region`] is memory; [`segment`] finds a peer's; [`batch`] moves bytes; [`notify`] tells the peer about it.
#![deny(missing_docs)]

pub mod builder;
pub mod config;
pub mod log;
mod open;
mod pin;
mod place;
pub mod plan;
mod start;
pub mod topology;

pub mod engine;
pub mod incident;
pub mod inspect;

pub mod memlock;
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
pub use engine::{CoreCounters, Counters, Engine, NicInfo, PortInfo, RailInfo};
pub use error::{
    BuildError, NicProblem, NotifyError, RefusedRegistration, RegisterError, SegmentError, SubmitError, TransferError,
    UnregisterError, WaitError,
};
pub use incident::IncidentInfo;
pub use log::Level;
pub use notify::Notification;
pub use plan::{CorePlan, Plan};
pub use region::Region;
pub use segment::{RemoteRange, Segment};

pub use moonrail_control::{Charge, Eviction, FabricPolicy, Way};
pub use moonrail_datapath::core::Spread;
pub use moonrail_datapath::error::Cause;
pub use moonrail_datapath::nic::{Fabric, Nic, Op};
pub use moonrail_datapath::region::{Memory, OutOfRange};
pub use moonrail_datapath::units::{Gid, GidIndex, Lid, Mtu, PortNum};
pub use moonrail_datapath::work::{Proof, Quiescence};

/// The snippets of the pages, compiled and, where they need no other node, run.
#[cfg(doctest)]
mod pages {
    #[doc = include_str!("../../README.md")]
    mod readme {}
    #[doc = include_str!("../../docs/testing.md")]
    mod testing {}
}
