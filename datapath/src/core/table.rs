//! The core's tables: NICs, queue pairs, rails, peers and Works in seats that never move and are used again.
//!
//! Everything has its place from the start: a turn allocates nothing. A seat is an index; a number from outside (a
//! `wr_id`) also carries the seat's generation, so that an echo of an earlier tenant finds nobody.

use std::sync::Arc;

use super::counters::RailCounters;
use super::credit::Credit;
use super::inflight::InFlightList;
use super::port::RailKey;
use crate::limits::QPS_PER_RAIL_MAX;
use crate::nic::{CompletionQueue, PostQp};
use crate::transfer::Peer;
use crate::units::{Nanos, NicId, PeerNicId, Qpn};
use crate::work::Work;

/// No seat: end of a list, or nothing there.
pub(crate) const NONE: u32 = u32::MAX;

/// A NIC of this core.
pub(crate) struct NicSeat {
    pub(crate) id: NicId,
    pub(crate) cq: Box<dyn CompletionQueue>,
    /// Requests that may still need a completion, unsignalled ones counted: never more than the queue has entries.
    pub(crate) outstanding: u32,
    pub(crate) depth: u32,
    pub(crate) lost: bool,
}

/// Where a queue pair is in its life on this core.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum QpState {
    Free,
    /// Its trial is out.
    Trial,
    /// Carries slices.
    Up,
    /// Posts no more; goes back to control when nothing is outstanding.
    Draining {
        since: Nanos,
    },
    /// Given back undrained; control destroys it.
    Overdue,
}

/// A queue pair of this core.
pub(crate) struct QpSeat {
    pub(crate) generation: u16,
    pub(crate) state: QpState,
    pub(crate) qpn: Qpn,
    pub(crate) rail: u32,
    pub(crate) post: Option<Box<dyn PostQp>>,
    pub(crate) in_flight: InFlightList,
    pub(crate) depth: u32,
    pub(crate) max_inline: u32,
    /// See [`PostQp::reads_are_proven`].
    pub(crate) reads_are_proven: bool,
    /// Requests and bytes posted since the last one that asked for a completion.
    pub(crate) unsignaled: u32,
    pub(crate) unsignaled_bytes: u64,
    pub(crate) flushed: u32,
    pub(crate) needs_fence: bool,
    pub(crate) proven: bool,
    /// How long the watch has seen the same request at the front of the list, and which.
    pub(crate) silent: Nanos,
    pub(crate) front_seen: u32,
    /// It stalled, and the request that has to answer for it has not come back yet.
    pub(crate) stalled: bool,
}

/// Where a rail's life is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum RailState {
    Free,
    /// No trial has come back.
    Trial,
    Up,
    /// Failed or retired; its queue pairs drain.
    Down,
}

/// One life of a rail.
pub(crate) struct RailSeat {
    pub(crate) key: RailKey,
    pub(crate) state: RailState,
    pub(crate) peer: u32,
    pub(crate) nic: u32,
    pub(crate) peer_nic: PeerNicId,
    pub(crate) qps: [u16; QPS_PER_RAIL_MAX],
    pub(crate) qp_count: u8,
    pub(crate) credit: Credit,
    pub(crate) counters: Arc<RailCounters>,
    /// Whether it carries slices ([`super::port::RailSpec::claims`]).
    pub(crate) claims: bool,
    /// First of the Works held until this life is fenced.
    pub(crate) holds: u32,
}

impl RailSeat {
    pub(crate) fn qps(&self) -> impl Iterator<Item = usize> + use<> {
        let (qps, count) = (self.qps, usize::from(self.qp_count));
        qps.into_iter().take(count).map(usize::from)
    }
}

/// A hold of a Work on the fence of a rail's life.
pub(crate) struct Hold {
    pub(crate) work: u32,
    pub(crate) next: u32,
}

/// A line of Works waiting for a peer, linked through [`WorkSeat::next`].
#[derive(Clone, Copy)]
pub(crate) struct Queue {
    pub(crate) head: u32,
    pub(crate) tail: u32,
}

impl Queue {
    pub(crate) const EMPTY: Self = Self { head: NONE, tail: NONE };

    pub(crate) fn push_back(&mut self, seat: u32, works: &mut [WorkSeat]) {
        works[seat as usize].next = NONE;
        if self.head == NONE {
            self.head = seat;
        } else {
            works[self.tail as usize].next = seat;
        }
        self.tail = seat;
    }

    pub(crate) fn pop_front(&mut self, works: &[WorkSeat]) -> Option<u32> {
        let seat = (self.head != NONE).then_some(self.head)?;
        self.head = works[seat as usize].next;
        if self.head == NONE {
            self.tail = NONE;
        }
        Some(seat)
    }
}

/// Which line a Work stands in.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Line {
    None,
    Small,
    Bulk,
}

/// A peer as this core sees it.
pub(crate) struct PeerSeat {
    pub(crate) peer: Option<Arc<Peer>>,
    pub(crate) small: Queue,
    pub(crate) bulk: Queue,
    /// Rails that carry slices, or will.
    pub(crate) rails: Vec<u32>,
    /// Those of them that are [`RailState::Up`].
    pub(crate) usable: u32,
    /// Which rail comes first this turn.
    pub(crate) first: u32,
    pub(crate) busy: bool,
    pub(crate) wanted_at: Option<Nanos>,
}

impl PeerSeat {
    pub(crate) fn new() -> Self {
        Self {
            peer: None,
            small: Queue::EMPTY,
            bulk: Queue::EMPTY,
            rails: Vec::with_capacity(16),
            usable: 0,
            first: 0,
            busy: false,
            wanted_at: None,
        }
    }

    pub(crate) fn has_work(&self) -> bool {
        self.small.head != NONE || self.bulk.head != NONE
    }
}

/// A Work on this core.
pub(crate) struct WorkSeat {
    pub(crate) work: Option<Arc<Work>>,
    pub(crate) line: Line,
    pub(crate) next: u32,
    /// Slices posted by this core and not ended.
    pub(crate) outstanding: u32,
    /// Slices and holds that ended this turn and are not yet accounted.
    pub(crate) settled: u32,
    /// Holds on fences.
    pub(crate) holds: u32,
    /// Bytes of the quantum left.
    pub(crate) quantum: u64,
    /// Cores it was pushed to since this core last gave something back.
    pub(crate) lent: u64,
    pub(crate) dirty: bool,
    pub(crate) returned: bool,
    pub(crate) home: bool,
    /// This core has said of it that none of its rails has the keys of some slice.
    pub(crate) keyless: bool,
    /// Until then it leaves such a slice to other cores.
    pub(crate) keyless_until: Nanos,
    /// This core brought it to its end and has yet to say so.
    pub(crate) finished: bool,
    /// Somebody slept on its batch when it was finished.
    pub(crate) awaited: bool,
}

impl WorkSeat {
    pub(crate) fn empty() -> Self {
        Self {
            work: None,
            line: Line::None,
            next: NONE,
            outstanding: 0,
            settled: 0,
            holds: 0,
            quantum: 0,
            lent: 0,
            dirty: false,
            returned: false,
            home: false,
            keyless: false,
            keyless_until: Nanos::ZERO,
            finished: false,
            awaited: false,
        }
    }
}
