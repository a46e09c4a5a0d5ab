//! One node: its NICs, its data cores, its control thread.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use moonrail_datapath::region::Memory;
use moonrail_datapath::units::{Gid, GidIndex, Lid, Mtu, PortNum};

use crate::batch::{Batch, BatchBuilder, Transfer};
use crate::builder::EngineBuilder;
use crate::error::{NotifyError, RegisterError, SegmentError, SubmitError, UnregisterError};
use crate::notify::Notification;
use crate::region::Region;
use crate::segment::Segment;

/// A NIC of this engine.
#[derive(Clone, Debug)]
pub struct NicInfo {
    /// Name of the verbs device.
    pub name: String,
    /// Port in use.
    pub port: PortNum,
    /// LID, 0 on RoCE.
    pub lid: Lid,
    /// Place of the GID when it was chosen.
    pub gid_index: GidIndex,
    /// The GID.
    pub gid: Gid,
    /// Path MTU the port offers, cut to MC_MTU.
    pub mtu: Mtu,
    /// NUMA node; `None` where it has none.
    pub numa_node: Option<u16>,
    /// Data cores that poll it, counted from 0.
    pub cores: Vec<u16>,
    /// Bytes registered on it.
    pub registered: u64,
}

/// A rail: one (local NIC, peer NIC) pair.
#[derive(Clone, Debug)]
pub struct RailInfo {
    /// Our NIC.
    pub nic: String,
    /// The peer's segment name.
    pub peer: String,
    /// The peer's NIC.
    pub peer_nic: String,
    /// `connecting`, `trial`, `up`, `quarantined`, … and why.
    pub state: String,
    /// Whether it carries slices now.
    pub usable: bool,
    /// Bytes it has moved.
    pub bytes: u64,
}

/// What followed from one first error on one queue pair.
#[derive(Clone, Debug)]
pub struct IncidentInfo {
    /// When, since the engine started.
    pub at: Duration,
    /// The peer's segment name.
    pub peer: String,
    /// Status, rail, age, what was decided: one line.
    pub text: String,
    /// Whether it is over.
    pub closed: bool,
}

/// What one data core has counted since it started.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct CoreCounters {
    /// The core, counted from 0.
    pub core: u16,
    /// Work requests posted.
    pub work_requests: u64,
    /// Chains posted: one doorbell each.
    pub doorbells: u64,
    /// Completions reaped.
    pub completions: u64,
    /// Bytes of slices that are done.
    pub bytes: u64,
    /// Slices that are done.
    pub slices: u64,
    /// Slices posted again after they came back.
    pub retries: u64,
}

/// Counters of every data core.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Counters {
    /// By core.
    pub cores: Vec<CoreCounters>,
}

/// One node of the cluster. Share it with `Arc`; every method may be called from any thread.
///
/// Dropping it ends what is in flight, fences, deregisters and removes what it published, within a bounded time.
pub struct Engine {}

impl Engine {
    /// Starts with every option at its default, or what the MC_* environment variables say.
    pub fn builder() -> EngineBuilder {
        EngineBuilder::default()
    }

    /// Name of this node: what a peer opens. Without a metadata server it holds the port that was found.
    pub fn name(&self) -> &str {
        todo!()
    }

    /// Where the handshake server listens, as published.
    pub fn rpc_addr(&self) -> SocketAddr {
        todo!()
    }

    /// The NICs in use.
    pub fn nics(&self) -> Vec<NicInfo> {
        todo!()
    }

    /// The rails that exist now.
    pub fn rails(&self) -> Vec<RailInfo> {
        todo!()
    }

    /// Recent incidents, oldest first.
    pub fn incidents(&self) -> Vec<IncidentInfo> {
        todo!()
    }

    /// What the cores counted.
    pub fn counters(&self) -> Counters {
        todo!()
    }

    /// Why rails towards a peer are used, or not: lines for people.
    pub fn explain(&self, _peer: &str) -> Vec<String> {
        todo!()
    }

    /// Maps `len` bytes of zeroed memory and registers them, open to peers. `location` is `cpu:N`, or `*` to detect.
    pub fn allocate(&self, _len: usize, _location: &str) -> Result<Region, RegisterError> {
        todo!()
    }

    /// Registers memory of the embedder: `unsafe { Memory::borrow(base, len) }` states the promise that it stays
    /// mapped. Peers may READ and WRITE it if `remote`. Blocks until it is registered on every NIC and published.
    pub fn register(&self, _memory: Arc<Memory>, _location: &str, _remote: bool) -> Result<Region, RegisterError> {
        todo!()
    }

    /// Takes memory back: unpublishes it, waits until no transfer uses it (at most 60 s), deregisters it.
    pub fn unregister(&self, _region: Region) -> Result<(), UnregisterError> {
        todo!()
    }

    /// As [`Engine::unregister`], by the address of the first byte.
    pub fn unregister_at(&self, _addr: u64) -> Result<(), UnregisterError> {
        todo!()
    }

    /// The registered regions, by address.
    pub fn regions(&self) -> Vec<Region> {
        todo!()
    }

    /// Finds a peer's memory by the name the peer chose (or `HOST:PORT` without a metadata server). Blocks for one
    /// metadata request, bounded by its time-out.
    pub fn open_segment(&self, _name: &str) -> Result<Segment, SegmentError> {
        todo!()
    }

    /// Submits transfers to one peer: all of them, or none.
    pub fn submit(&self, _segment: &Segment, _transfers: &[Transfer]) -> Result<Batch, SubmitError> {
        todo!()
    }

    /// A batch to several peers, or with a deadline of its own.
    pub fn batch(&self) -> BatchBuilder<'_> {
        todo!()
    }

    /// Sends a message to a peer. Order towards transfers: wait for the batch first.
    pub fn notify(&self, _segment: &Segment, _name: &str, _message: &str) -> Result<(), NotifyError> {
        todo!()
    }

    /// The messages received since the last call, oldest first.
    pub fn notifications(&self) -> Vec<Notification> {
        todo!()
    }

    /// Ends the engine: takes no more work, drains and fences for at most `within`, ends what is left, unpublishes,
    /// deregisters. Called again it does nothing.
    pub fn shutdown(&self, _within: Duration) {
        todo!()
    }
}
