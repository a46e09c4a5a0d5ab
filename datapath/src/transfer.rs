//! A transfer and the peer memory it reaches: checked at the edge, trusted after.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};

use crate::nic::Fabric;
use crate::slice::{Extent, holder};
use crate::units::{CoreId, PeerId, PeerNicId, Rkey};

/// A peer as submitters and cores share it. Control makes it and keeps it for the engine's life.
#[derive(Debug)]
pub struct Peer {
    id: PeerId,
    name: String,
    /// Bit per core that has a usable rail to this peer. Written by the cores, read by submitters.
    routes: AtomicU64,
}

impl Peer {
    /// A peer that no core has a rail to yet.
    pub fn new(id: PeerId, name: String) -> Arc<Self> {
        Arc::new(Self { id, name, routes: AtomicU64::new(0) })
    }

    /// Its number.
    pub fn id(&self) -> PeerId {
        self.id
    }

    /// Its segment name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Cores that have a usable rail, bit 0 for core 0.
    pub fn routes(&self) -> u64 {
        self.routes.load(Ordering::Relaxed)
    }

    /// Called by `core` alone when it gains its first usable rail to this peer or loses its last.
    pub fn set_route(&self, core: CoreId, usable: bool) {
        let bit = 1u64 << core.0;
        if usable {
            self.routes.fetch_or(bit, Ordering::Relaxed);
        } else {
            self.routes.fetch_and(!bit, Ordering::Relaxed);
        }
    }
}

/// In a [`Route`], the bit that no fabric has.
const OVER: u8 = 1 << 7;

/// Which fabrics may carry what goes to one segment: written by control as it chooses, read for every slice.
#[derive(Debug)]
pub struct Route(AtomicU8);

impl Route {
    /// Over any of `fabrics` (a set of [`Fabric::bit`]s).
    pub fn new(fabrics: u8) -> Arc<Self> {
        Arc::new(Self(AtomicU8::new(fabrics)))
    }

    /// Over whatever there is.
    pub fn any() -> Arc<Self> {
        Self::new(!OVER)
    }

    /// Control only: from now on over these.
    pub fn set(&self, fabrics: u8) {
        self.0.store(fabrics, Ordering::Relaxed);
    }

    /// Control only, and for good: the process whose memory this led to is no more. Another one answers in its place, to
    /// which its addresses and keys mean nothing, or something else. Called before a core gets queue pairs to that one, whose
    /// ring makes the core see it first.
    pub fn end(&self) {
        self.0.store(OVER, Ordering::Relaxed);
    }

    /// Whether [`Route::end`] was called.
    #[inline]
    pub fn is_over(&self) -> bool {
        self.0.load(Ordering::Relaxed) == OVER
    }

    /// The fabrics allowed now. 0: none can be used, and what waits for one ends.
    #[inline]
    pub fn fabrics(&self) -> u8 {
        self.0.load(Ordering::Relaxed) & !OVER
    }

    /// Whether `fabric` may carry a slice now.
    #[inline]
    pub fn allows(&self, fabric: Fabric) -> bool {
        self.fabrics() & fabric.bit() != 0
    }
}

/// One buffer a peer published.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RemoteBuffer {
    /// Address and length in the peer.
    pub extent: Extent,
    /// By [`PeerNicId`]; `None` where the peer's NIC did not register it. Empty: not reachable by RDMA.
    pub rkeys: Box<[Option<Rkey>]>,
    /// Whether the peer serves it to whoever dials.
    pub open: bool,
    /// The peer's name for the place: `cpu:0`, …
    pub location: String,
}

/// The buffers of a peer as one descriptor told them, in address order. A newer descriptor is another value.
#[derive(Debug)]
pub struct RemoteBuffers {
    /// Whose.
    pub peer: Arc<Peer>,
    /// Over what it may be reached.
    pub route: Arc<Route>,
    /// Sorted by address, without overlap.
    pub buffers: Box<[RemoteBuffer]>,
}

impl RemoteBuffers {
    /// Sorts and keeps the buffers of `peer`, to be reached over `route`.
    pub fn new(peer: Arc<Peer>, route: Arc<Route>, mut buffers: Vec<RemoteBuffer>) -> Self {
        buffers.sort_by_key(|b| b.extent.addr);
        Self { peer, route, buffers: buffers.into_boxed_slice() }
    }

    /// Place and extent of the buffer that holds `addr`, for [`crate::slice::tile`].
    pub fn find(&self, addr: u64) -> Option<(u32, Extent)> {
        let index = holder(&self.buffers, |b| b.extent, addr)?;
        Some((index as u32, self.buffers[index].extent))
    }

    /// The key of buffer `index` on a NIC of the peer; `None` where that NIC cannot carry it.
    pub fn rkey(&self, index: u32, nic: PeerNicId) -> Option<Rkey> {
        let buffer = self.buffers.get(index as usize)?;
        if nic.fabric().is_dialled() {
            // Found by its address.
            return buffer.open.then_some(Rkey(0));
        }
        *buffer.rkeys.get(usize::from(nic.0))?
    }
}
