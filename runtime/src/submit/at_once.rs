//! Batches to a peer whose memory this thread reaches: copied here and now, without a lock and without a hand-off. Handing them
//! to a core would take longer than the copy.

use std::sync::Arc;

use crossbeam_utils::CachePadded;
use moonrail_datapath::core::counters::Counter;
use moonrail_datapath::lanes::{LANES, Pass};
use moonrail_datapath::nic::direct::{Direct, Piece};
use moonrail_datapath::units::RemoteAddr;

use super::Transfers;
use crate::batch::{Copied, Lens, Transfer};
use crate::engine::Shared;
use crate::segment::{Near, Segment};

/// Bytes of a batch that is copied at once: as long as a hand-off to a core that sleeps takes, or less.
const AT_MOST: u64 = 256 << 10;
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
    pub(crate) fn count(&self, pass: &Pass<'_>, pieces: u64, bytes: u64) {
        let counted = &self.lanes[pass.lane()];
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

impl Shared {
    /// Copies the batch, if it is small and goes to one peer whose memory is in reach. If not: that memory, so that a thread that
    /// waits can help the cores. Something in the way is for the cores to find out.
    #[inline]
    pub(super) fn copy_at_once<T: Transfers + ?Sized>(&self, transfers: &T) -> Result<Copied, Option<Arc<dyn Direct>>> {
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
    fn copy_near<T: Transfers + ?Sized>(
        &self,
        segment: &Segment,
        transfers: &T,
    ) -> Option<Result<Copied, Option<Arc<dyn Direct>>>> {
        let Some(pass) = self.lanes.enter() else { return Some(Err(None)) };
        match segment.near(&pass) {
            Near::Reached(memory) => Some(self.copy(memory, &pass, transfers).ok_or_else(|| Some(memory.clone()))),
            Near::Elsewhere => Some(Err(None)),
            Near::Unknown => None,
        }
    }

    #[inline]
    fn copy<T: Transfers + ?Sized>(&self, far: &Arc<dyn Direct>, pass: &Pass<'_>, transfers: &T) -> Option<Copied> {
        if transfers.count() == 1 {
            return self.copy_one(far.as_ref(), pass, transfers.get(0).1);
        }
        self.copy_many(far.as_ref(), pass, transfers)
    }

    #[inline]
    fn copy_one(&self, far: &dyn Direct, pass: &Pass<'_>, transfer: Transfer) -> Option<Copied> {
        let Transfer { op, local, remote, len } = transfer;
        if len == 0 || len > AT_MOST || !self.extents.load(pass).hold(local, len) {
            return None;
        }
        far.copy(op, &[Piece { local, remote: RemoteAddr(remote), len: len as u32 }]).ok()?;
        self.copied.count(pass, 1, len);
        Some(Copied { lens: Lens::One(len) })
    }

    fn copy_many<T: Transfers + ?Sized>(&self, far: &dyn Direct, pass: &Pass<'_>, transfers: &T) -> Option<Copied> {
        let (count, op) = (transfers.count(), transfers.get(0).1.op);
        let extents = self.extents.load(pass);
        let mut bytes = 0u64;
        if count > COUNT {
            return None;
        }
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
            far.copy(op, &pieces[..used]).ok()?;
        }
        self.copied.count(pass, count as u64, bytes);
        Some(Copied { lens: Lens::Many((0..count).map(|index| transfers.get(index).1.len).collect()) })
    }

    /// Counts what a thread copied that waits.
    pub(crate) fn count_copied(&self, pieces: u32, bytes: u64) {
        if pieces == 0 {
            return;
        }
        // With too many threads inside it is not counted: it is a figure for people.
        if let Some(pass) = self.lanes.enter() {
            self.copied.count(&pass, u64::from(pieces), bytes);
        }
    }
}
