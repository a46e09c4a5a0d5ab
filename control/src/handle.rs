//! What other crates hold of the control thread: a handle whose every call is bounded in time and never panics.

use std::sync::Arc;
use std::time::{Duration, Instant};

use moonrail_datapath::core::counters::RailCounters;
use moonrail_datapath::transfer::RemoteBuffers;
use moonrail_datapath::units::{CoreId, Mtu, Nanos, RailId};

use crate::config::ControlConfig;
use crate::error::{ControlError, NotifyError, OpenError, PublishError, StartError};
use crate::metadata::{BufferEntry, RpcMeta, SegmentDescriptor};

/// A peer's memory as its descriptor told. A newer descriptor is another value.
#[derive(Clone, Debug)]
pub struct RemoteSegment {
    /// Name it was opened by.
    pub name: String,
    /// What the peer published.
    pub descriptor: Arc<SegmentDescriptor>,
    /// The same as the data path wants it; keys by `PeerNicId`, which control fixed by NIC name.
    pub buffers: Arc<RemoteBuffers>,
}

/// A message a peer's application sent us.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Notification {
    /// The name it gave.
    pub name: String,
    /// The message.
    pub message: String,
}

/// How far a rail is.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum RailState {
    /// Not connected, none attempted until it is wanted or its back-off is over.
    Down,
    /// Queue pairs are being made, or the handshake is on its way.
    Connecting,
    /// Our queue pairs are ready; the peer has not said that its are.
    Waiting,
    /// With its core, no slice has come back yet.
    Trial,
    /// Usable.
    Usable,
}

/// One rail, for people and tests.
#[derive(Clone, Debug)]
pub struct RailReport {
    /// Its number.
    pub rail: RailId,
    /// The peer's segment name.
    pub peer: String,
    /// Our NIC.
    pub local_nic: String,
    /// The peer's NIC.
    pub peer_nic: String,
    /// The core that has it.
    pub core: CoreId,
    /// How often it was connected.
    pub lives: u32,
    /// How far it is.
    pub state: RailState,
    /// Queue pairs of the present life.
    pub qps: usize,
    /// Path MTU of the present life.
    pub path_mtu: Option<Mtu>,
    /// Whether the other end is a moonrail node.
    pub moonrail: bool,
    /// Lives whose end at the peer is not proven retired.
    pub unfenced: usize,
    /// What went wrong last, if it is not repaired.
    pub trouble: Option<String>,
    /// What its core counts, over all its lives.
    pub counters: Arc<RailCounters>,
}

/// What followed from one first error.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Incident {
    /// Counted from 1.
    pub number: u64,
    /// When it opened, on the engine's clock.
    pub opened: Nanos,
    /// When the rail had carried a slice again; `None` while it has not.
    pub closed: Option<Nanos>,
    /// The rail.
    pub rail: RailId,
    /// The peer's segment name.
    pub peer: String,
    /// Our NIC.
    pub local_nic: String,
    /// The peer's NIC.
    pub peer_nic: String,
    /// The cause in words, with what to do.
    pub cause: String,
    /// Completion status, where one was seen.
    pub status: Option<u32>,
    /// The device maker's code.
    pub vendor_err: u32,
    /// Age of the failed work request.
    pub age: Nanos,
    /// Requests that came back flushed.
    pub flushed: u32,
    /// Attempts to connect since.
    pub attempts: u32,
}

/// Handle of a running control thread. Cheap to clone; the thread ends at [`Control::shutdown`] or when the last handle
/// is dropped.
#[derive(Clone)]
pub struct Control {
    name: Arc<str>,
    rpc: RpcMeta,
}

/// Binds the control port, publishes this node and starts the thread `mr-control`.
///
/// # Errors
/// See [`StartError`]; nothing stays published or running then.
pub fn start(config: ControlConfig) -> Result<Control, StartError> {
    let _ = config;
    Err(StartError::Option { option: "everything", range: "written first".to_owned() })
}

impl Control {
    /// The name under which peers open this node: `host:port` in peer-to-peer mode.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Host and port that peers dial.
    pub fn rpc_addr(&self) -> &RpcMeta {
        &self.rpc
    }

    /// Looks `name` up, and begins to connect rails to it. Answers as soon as the descriptor is known.
    ///
    /// # Errors
    /// See [`OpenError`].
    pub fn open_segment(&self, name: &str, until: Instant) -> Result<Arc<RemoteSegment>, OpenError> {
        let _ = (name, until);
        Err(ControlError::Gone.into())
    }

    /// Like [`Control::open_segment`], but never answers from the cache.
    ///
    /// # Errors
    /// See [`OpenError`].
    pub fn refresh_segment(&self, name: &str, until: Instant) -> Result<Arc<RemoteSegment>, OpenError> {
        let _ = (name, until);
        Err(ControlError::Gone.into())
    }

    /// Replaces what this node offers. Keys are in the order of the NICs given at start.
    ///
    /// # Errors
    /// See [`PublishError`]. With a failing store the new list is still what peers are told that ask us directly.
    pub fn publish(&self, buffers: Vec<BufferEntry>, until: Instant) -> Result<(), PublishError> {
        let _ = (buffers, until);
        Err(ControlError::Gone.into())
    }

    /// Sends two texts to the application of the node that owns `segment`.
    ///
    /// # Errors
    /// See [`NotifyError`].
    pub fn notify(&self, segment: &str, name: &str, message: &str, until: Instant) -> Result<(), NotifyError> {
        let _ = (segment, name, message, until);
        Err(ControlError::Gone.into())
    }

    /// Takes what peers' applications sent since the last call, oldest first.
    pub fn take_notifications(&self) -> Vec<Notification> {
        Vec::new()
    }

    /// Asks whether the node that owns `segment` answers on its control port; returns how long it took.
    ///
    /// # Errors
    /// See [`NotifyError`].
    pub fn probe(&self, segment: &str, until: Instant) -> Result<Duration, NotifyError> {
        let _ = (segment, until);
        Err(ControlError::Gone.into())
    }

    /// Every rail. Empty when the control thread is gone.
    pub fn rails(&self) -> Vec<RailReport> {
        Vec::new()
    }

    /// The last 256 incidents, oldest first.
    pub fn incidents(&self) -> Vec<Incident> {
        Vec::new()
    }

    /// Why no rail to `segment` can be made, if that is so: the first cause.
    pub fn why(&self, segment: &str) -> Option<String> {
        let _ = segment;
        None
    }

    /// Withdraws this node, stops the cores, destroys every queue pair and ends the thread. Returns whether all of it was
    /// done by `until`; what is not done is given up then. May be called again.
    pub fn shutdown(&self, until: Instant) -> bool {
        let _ = until;
        true
    }
}
