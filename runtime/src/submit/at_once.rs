//! Small batches to a peer whose memory this thread reaches: copied here and now. Handing them to a core would cost more.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use crossbeam_utils::CachePadded;
use moonrail_datapath::nic::direct::{Direct, Piece};
use moonrail_datapath::nic::{Fabric, Op};
use moonrail_datapath::units::RemoteAddr;

use super::Transfers;
use crate::batch::{Copied, Lens};
use crate::engine::Shared;
use crate::live::shard_of_this_thread;
use crate::registry::Registry;

/// Bytes of a batch that is copied at once.
const AT_MOST: u64 = 8 << 10;
/// Its transfers, which have room on the stack.
const PIECES: usize = 32;

/// What callers' threads copied, each counting in a cache line that few others write.
#[derive(Default)]
pub(crate) struct CopiedCounters {
    shards: [CachePadded<Shard>; 16],
}

#[derive(Default)]
struct Shard {
    pieces: AtomicU64,
    bytes: AtomicU64,
}

impl CopiedCounters {
    pub(crate) fn count(&self, pieces: u64, bytes: u64) {
        if pieces == 0 {
            return;
        }
        let shard = &self.shards[shard_of_this_thread() % self.shards.len()];
        shard.pieces.fetch_add(pieces, Ordering::Relaxed);
        shard.bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Pieces and bytes, of all threads.
    pub(crate) fn total(&self) -> (u64, u64) {
        let sum = |sum: (u64, u64), shard: &CachePadded<Shard>| {
            (sum.0 + shard.pieces.load(Ordering::Relaxed), sum.1 + shard.bytes.load(Ordering::Relaxed))
        };
        self.shards.iter().fold((0, 0), sum)
    }
}

impl Shared {
    /// The memory of the one peer that all transfers go to, if this thread reaches it and it may be used.
    pub(super) fn direct_to<T: Transfers + ?Sized>(&self, transfers: &T) -> Option<Arc<dyn Direct>> {
        // A node without shared memory does not even look.
        self.shm.as_ref()?;
        let (first, _) = (transfers.count() > 0).then(|| transfers.get(0))?;
        let alone = (1..transfers.count()).all(|index| transfers.get(index).0.is(first));
        if alone { first.direct() } else { None }
    }

    /// Copies a small batch. `None`: it is not small, or something is in the way; the cores find out what.
    pub(super) fn copy_at_once<T: Transfers + ?Sized>(
        &self,
        far: &dyn Direct,
        registry: &Registry,
        transfers: &T,
        submitted: Instant,
    ) -> Option<Copied> {
        let count = transfers.count();
        if count > PIECES {
            return None;
        }
        let (mut pieces, mut used, mut bytes) = ([Piece::EMPTY; PIECES], 0, 0u64);
        let op = transfers.get(0).1.op;
        for index in 0..count {
            let (segment, transfer) = transfers.get(index);
            bytes = bytes.checked_add(transfer.len).filter(|bytes| *bytes <= AT_MOST)?;
            if transfer.op != op || !segment.belongs_to(self) {
                return None;
            }
            if transfer.len == 0 {
                continue;
            }
            let entry = registry.find(transfer.local)?;
            if transfer.local - entry.region.addr() + transfer.len > entry.region.len() {
                return None;
            }
            pieces[used] =
                Piece { local: transfer.local, remote: RemoteAddr(transfer.remote), len: transfer.len as u32 };
            used += 1;
        }
        self.copy(far, op, &pieces[..used], bytes)?;
        let lens = match count {
            1 => Lens::One(transfers.get(0).1.len),
            _ => Lens::Many((0..count).map(|index| transfers.get(index).1.len).collect()),
        };
        Some(Copied { lens, took: submitted.elapsed() })
    }

    fn copy(&self, far: &dyn Direct, op: Op, pieces: &[Piece], bytes: u64) -> Option<()> {
        far.copy(op, pieces).ok()?;
        self.copied.count(pieces.len() as u64, bytes);
        Some(())
    }
}

impl crate::segment::Segment {
    /// The peer's memory in reach of this thread, if that may be used now.
    fn direct(&self) -> Option<Arc<dyn Direct>> {
        self.fabric().filter(|fabric| *fabric == Fabric::Shm).and_then(|_| self.reach())
    }
}
