//! Another node's memory, as it published it.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::{Duration, Instant};

use moonrail_control::{FabricPolicy, RemoteSegment};
use moonrail_datapath::lanes::{Inside, Snapshot};
use moonrail_datapath::nic::{Direct, Fabric, Target};
use moonrail_datapath::transfer::{RemoteBuffers, Route};
use moonrail_datapath::units::Gid;

use crate::engine::Shared;
use crate::error::SegmentError;

/// For one look-up: a store operation (5 s to connect, 5 s to answer), or a peer asked directly.
pub(crate) const OPEN_WITHIN: Duration = Duration::from_secs(20);
/// A range that is in none of the peer's buffers causes one new look, but not more often than this.
const LOOK_AGAIN: Duration = Duration::from_millis(100);

/// One buffer of a peer.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct RemoteRange {
    /// Absolute address in the peer: what [`crate::Transfer`] takes as `remote`.
    pub addr: u64,
    /// Bytes.
    pub len: u64,
    /// The peer's word for the place: `cpu:0`, `*`, …
    pub location: String,
}

/// A peer's published memory, opened by name. Clones are the same segment; any thread may use it.
#[derive(Clone)]
pub struct Segment {
    inner: Arc<Inner>,
}

struct Inner {
    shared: Arc<Shared>,
    name: String,
    policy: Option<FabricPolicy>,
    current: RwLock<Arc<RemoteSegment>>,
    looked: Mutex<Option<Instant>>,
    /// The peer's memory as this process reaches it by itself, and the route by which it was found.
    near: Snapshot<Option<Way>>,
}

/// The route by which a peer's memory was found, and the memory.
type Way = (Arc<Route>, Arc<dyn Direct>);

impl Drop for Inner {
    fn drop(&mut self) {
        if !self.shared.is_here() {
            // The way to the peer's memory is the parent's; to leave it properly would be seen by the peer.
            self.shared.keep_for_good();
            std::mem::forget(self.near.get_mut().take());
        }
    }
}

/// Whether the peer's memory is in reach of this thread.
pub(crate) enum Near<'a> {
    /// It is, and it may be used now.
    Reached(&'a Arc<dyn Direct>),
    /// What carries transfers to it now is another fabric.
    Elsewhere,
    /// To be found out by [`Segment::reach`].
    Unknown,
}

impl Segment {
    pub(crate) fn new(
        shared: Arc<Shared>,
        name: String,
        policy: Option<FabricPolicy>,
        found: Arc<RemoteSegment>,
    ) -> Self {
        let near = Snapshot::new(shared.lanes.clone(), None);
        let (current, looked) = (RwLock::new(found), Mutex::new(None));
        Self { inner: Arc::new(Inner { shared, name, policy, current, looked, near }) }
    }

    /// The name it was opened by.
    pub fn name(&self) -> &str {
        &self.inner.name
    }

    /// The peer's buffers in the order it published them, as of the last look; none in a forked child. Addresses are absolute; a region that
    /// was larger than the peer's NICs take stands here in pieces.
    pub fn buffers(&self) -> Vec<RemoteRange> {
        let range = |entry: &moonrail_control::metadata::BufferEntry| RemoteRange {
            addr: entry.addr,
            len: entry.length,
            location: entry.name.clone(),
        };
        self.current().map_or_else(Vec::new, |now| now.descriptor.buffers.iter().map(range).collect())
    }

    /// Names of the peer's NICs, as of the last look; none in a forked child.
    pub fn nics(&self) -> Vec<String> {
        let names = |now: Arc<RemoteSegment>| now.descriptor.devices.iter().map(|device| device.name.clone()).collect();
        self.current().map_or_else(Vec::new, names)
    }

    /// GIDs of the peer's RDMA NICs by name, as of the last look; a NIC that published none is left out.
    pub fn nic_gids(&self) -> Vec<(String, Gid)> {
        let Some(current) = self.current() else { return Vec::new() };
        let devices = current.descriptor.devices.iter();
        devices.filter_map(|device| Some((device.name.clone(), device.gid.gid()?))).collect()
    }

    /// Everything the peer published, as of the last look: its segment descriptor as JSON text, in the form in which a store
    /// has it (docs/wire.md); empty in a forked child. For people and tools: what is in it may differ from peer to peer.
    pub fn published(&self) -> String {
        let text = |now: Arc<RemoteSegment>| String::from_utf8_lossy(&now.descriptor.encode()).into_owned();
        self.current().map_or_else(String::new, text)
    }

    /// Fetches the peer's descriptor again, past every cache. Batches in flight keep what they were submitted with.
    /// Blocks for a metadata request, at most 20 s.
    ///
    /// # Errors
    /// See [`SegmentError`]; the segment stays as it was.
    pub fn refresh(&self) -> Result<(), SegmentError> {
        let Inner { shared, name, policy, current, .. } = &*self.inner;
        let found = shared
            .control
            .refresh_segment(name, *policy, Instant::now() + OPEN_WITHIN)
            .map_err(|source| SegmentError::open(name, source))?;
        *current.write().unwrap_or_else(PoisonError::into_inner) = found;
        Ok(())
    }

    /// What carries this segment's transfers now; `None`: nothing can. [`crate::Engine::explain`] tells why.
    pub fn fabric(&self) -> Option<Fabric> {
        let remote = self.remote()?;
        Fabric::ALL.into_iter().find(|fabric| remote.route.allows(*fabric))
    }

    /// Cores of this engine that have a usable rail to the peer now. 0 right after opening, or when the peer is away:
    /// transfers submitted then wait for a rail.
    pub fn ready_cores(&self) -> u32 {
        self.remote().map_or(0, |remote| remote.peer.routes().count_ones())
    }

    /// Asks whether the peer answers on its handshake port; returns how long that took.
    ///
    /// # Errors
    /// See [`crate::NotifyError`].
    pub fn probe(&self, within: Duration) -> Result<Duration, crate::NotifyError> {
        let name = &self.inner.name;
        let answer = self.inner.shared.control.probe(name, crate::batch::after(Instant::now(), within));
        answer.map_err(|source| crate::NotifyError::send(name, source))
    }

    pub(crate) fn belongs_to(&self, shared: &Shared) -> bool {
        std::ptr::eq(Arc::as_ptr(&self.inner.shared), shared)
    }

    /// The peer's memory, as far as it is known. No lock.
    #[inline]
    pub(crate) fn near<'a>(&'a self, inside: Inside<'a>) -> Near<'a> {
        match self.inner.near.load(inside) {
            Some((route, memory)) if route.allows(Fabric::Shm) && memory.is_alive() => Near::Reached(memory),
            _ => self.not_near(),
        }
    }

    /// The same where nothing is out of the ordinary; a copy tells whether the peer lives.
    #[inline]
    pub(crate) fn reached<'a>(&'a self, inside: Inside<'a>) -> Option<&'a Arc<dyn Direct>> {
        match self.inner.near.load(inside) {
            Some((route, memory)) if route.allows(Fabric::Shm) => Some(memory),
            _ => None,
        }
    }

    #[cold]
    fn not_near(&self) -> Near<'static> {
        if self.fabric() == Some(Fabric::Shm) { Near::Unknown } else { Near::Elsewhere }
    }

    /// Looks for the peer's memory where a NIC of ours may have it in reach. Not from inside the engine's lanes.
    pub(crate) fn reach(&self) {
        let found = || {
            let now = self.current()?;
            let token = now.descriptor.extra.shm?;
            let memory = self.inner.shared.shm.as_ref()?.direct(&Target::Shm { token: token.0 })?;
            Some((now.buffers.route.clone(), memory))
        };
        if let Some(found) = found() {
            self.inner.near.replace(Some(found));
        }
    }

    pub(crate) fn is(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.inner, &other.inner)
    }

    /// `None` in a forked child.
    pub(crate) fn remote(&self) -> Option<Arc<RemoteBuffers>> {
        self.current().map(|now| now.buffers.clone())
    }

    /// Looks again, unless that was done a moment ago. Whether it was.
    pub(crate) fn look_again(&self) -> bool {
        let mut looked = self.inner.looked.lock().unwrap_or_else(PoisonError::into_inner);
        if looked.is_some_and(|at| at.elapsed() < LOOK_AGAIN) {
            return false;
        }
        *looked = Some(Instant::now());
        drop(looked);
        self.refresh().is_ok()
    }

    /// `None` in a forked child, whose lock may be held by a thread that is the parent's.
    fn current(&self) -> Option<Arc<RemoteSegment>> {
        let now = || self.inner.current.read().unwrap_or_else(PoisonError::into_inner).clone();
        self.inner.shared.is_here().then(now)
    }
}

impl fmt::Debug for Segment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Segment").field("name", &self.name()).field("buffers", &self.buffers()).finish()
    }
}
