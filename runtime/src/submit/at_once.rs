//! Batches to a peer whose memory this thread reaches: copied here and now, without a lock and without a hand-off. Handing them
//! to a core would take longer than the copy.

use std::sync::Arc;

use crossbeam_utils::CachePadded;
use moonrail_datapath::core::counters::Counter;
use moonrail_datapath::lanes::{Inside, LANES};
use moonrail_datapath::nic::direct::{Direct, Piece};
use moonrail_datapath::units::RemoteAddr;

use super::Transfers;
use crate::batch::Transfer;
use crate::engine::Shared;
use crate::segment::{Near, Segment};

/// Bytes of a batch that is copied at once. One thread copies twice as much in the time that a second one needs to come to help (8 us); with 256 KiB
/// a batch of 32 × 16 KiB in cache moved at half the speed.
const AT_MOST: u64 = 512 << 10;
/// Its transfers.
const COUNT: usize = 1024;
/// Pieces copied by one call, which have room on the stack.
const PIECES: usize = 32;

/// What callers' threads copied. Each counts in a cache line that nobody else writes while it is inside the engine's lanes.
pub(crate) struct CopiedCounters {
    lanes: [CachePadded<Counted>; LANES],
}

#[derive(Default)]
struct Counted {
    pieces: Counter,
    bytes: Counter,
}

impl Default for CopiedCounters {
    fn default() -> Self {
        Self { lanes: std::array::from_fn(|_| CachePadded::default()) }
    }
}

impl CopiedCounters {
    #[inline]
    pub(crate) fn count(&self, inside: Inside<'_>, pieces: u64, bytes: u64) {
        let counted = &self.lanes[inside.lane()];
        counted.pieces.add(pieces);
        counted.bytes.add(bytes);
    }

    /// Pieces and bytes, of all threads.
    pub(crate) fn total(&self) -> (u64, u64) {
        let sum = |sum: (u64, u64), counted: &CachePadded<Counted>| {
            (sum.0 + counted.pieces.get(), sum.1 + counted.bytes.get())
        };
        self.lanes.iter().fold((0, 0), sum)
    }
}

/// The lengths of the transfers of a batch that was copied; of one that was not, the peer's memory, if it is in reach.
type CopiedOrNot = Result<Box<[u64]>, Option<Arc<dyn Direct>>>;

impl Shared {
    /// Copies one transfer, if it is small and in reach, and returns its length: the smallest and most frequent batch, straight through. If
    /// anything is out of the ordinary, [`Shared::copy_at_once`] looks closer.
    #[inline]
    pub(super) fn copy_one_at_once(&self, segment: &Segment, transfer: &Transfer) -> Option<u64> {
        if !segment.belongs_to(self) {
            return None;
        }
        self.lanes.within(|inside| self.copy_one(inside, segment, transfer))
    }

    #[inline]
    fn copy_one(&self, inside: Inside<'_>, segment: &Segment, transfer: &Transfer) -> Option<u64> {
        let far = segment.reached(inside)?;
        let len = transfer.len;
        if len == 0 || len > AT_MOST || !self.extents.load(inside).hold(transfer.local, len) {
            return None;
        }
        if !far.copy_one(inside, transfer.op, transfer.local, RemoteAddr(transfer.remote), len as u32) {
            return None;
        }
        self.copied.count(inside, 1, len);
        Some(len)
    }

    /// Copies the batch, if it is small and goes to one peer whose memory is in reach; returns its transfers' lengths. If not: that memory,
    /// so that a thread that waits can help the cores. Something in the way is for the cores to find out.
    pub(super) fn copy_at_once<T: Transfers + ?Sized>(&self, transfers: &T) -> CopiedOrNot {
        // A node without shared memory does not even look.
        if self.shm.is_none() {
            return Err(None);
        }
        let segment = transfers.segment().filter(|segment| segment.belongs_to(self)).ok_or(None)?;
        self.copy_near(segment, transfers).unwrap_or_else(|| {
            // The first time, or the peer was lost.
            segment.reach();
            self.copy_near(segment, transfers).unwrap_or(Err(None))
        })
    }

    /// `None`: nobody knows yet whether the peer's memory is in reach.
    #[inline]
    fn copy_near<T: Transfers + ?Sized>(&self, segment: &Segment, transfers: &T) -> Option<CopiedOrNot> {
        let Some(pass) = self.lanes.enter() else { return Some(Err(None)) };
        let inside = pass.inside();
        match segment.near(inside) {
            Near::Reached(far) => Some(self.copy(far.as_ref(), inside, transfers).ok_or_else(|| Some(far.clone()))),
            Near::Elsewhere => Some(Err(None)),
            Near::Unknown => None,
        }
    }

    #[inline]
    fn copy<T: Transfers + ?Sized>(&self, far: &dyn Direct, inside: Inside<'_>, transfers: &T) -> Option<Box<[u64]>> {
        let (count, op) = (transfers.count(), transfers.get(0).1.op);
        let extents = self.extents.load(inside);
        if count > COUNT {
            return None;
        }
        let mut bytes = 0u64;
        for index in 0..count {
            let transfer = transfers.get(index).1;
            bytes = bytes.checked_add(transfer.len).filter(|bytes| *bytes <= AT_MOST)?;
            if transfer.op != op || !(transfer.len == 0 || extents.hold(transfer.local, transfer.len)) {
                return None;
            }
        }
        if bytes == 0 {
            return None;
        }
        let mut at = 0;
        while at < count {
            let (mut pieces, mut used) = ([Piece::EMPTY; PIECES], 0);
            while at < count && used < PIECES {
                let Transfer { local, remote, len, .. } = transfers.get(at).1;
                pieces[used] = Piece { local, remote: RemoteAddr(remote), len: len as u32 };
                used += usize::from(len > 0);
                at += 1;
            }
            far.copy_inside(inside, op, &pieces[..used]).ok()?;
        }
        self.copied.count(inside, count as u64, bytes);
        Some((0..count).map(|index| transfers.get(index).1.len).collect())
    }

    /// Counts what a thread copied that waits.
    pub(crate) fn count_copied(&self, pieces: u32, bytes: u64) {
        if pieces == 0 {
            return;
        }
        // With too many threads inside it is not counted: it is a figure for people.
        if let Some(pass) = self.lanes.enter() {
            self.copied.count(pass.inside(), u64::from(pieces), bytes);
        }
    }
}
