//! What one measurement does: which blocks go where, how often, and whether they are checked.

use std::time::Duration;

use moonrail::{Op, Region, RemoteRange, Transfer};

use super::judge::Blocks;
use crate::failure::{Failure, Result};
use crate::units;

/// When a measurement ends.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Limit {
    /// After this time.
    Time(Duration),
    /// After this many batches of each thread.
    Batches(u64),
}

/// How bytes are checked.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Verify {
    /// Not at all.
    No,
    /// By this node alone: it writes a pattern, and reads back over the engine what it has written.
    ReadBack,
    /// By the other node too, in its own memory (`serve --verify`).
    AskTarget,
}

/// Where blocks lie: the layout of `transfer_engine_bench`. Block `i` of thread `t` of `threads` begins at
/// `stride × (i × threads + t)`, in our memory and in the peer's; `stride` is the block size there.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Layout {
    /// Bytes of a block.
    pub block: u64,
    /// Bytes from one place to the next, at least a block.
    pub stride: u64,
    /// Blocks of a batch.
    pub batch: u64,
    /// Threads.
    pub threads: u64,
}

impl Layout {
    /// Checks that the whole extent can be counted in 64 bits.
    ///
    /// # Errors
    /// A usage error otherwise.
    pub fn new(block: u64, stride: u64, batch: u64, threads: u64) -> Result<Self> {
        if stride < block {
            return Err(Failure::usage(
                format!("a stride of {stride} bytes is less than a block of {block}"),
                "give --stride at least the largest --block",
            ));
        }
        let all = stride.checked_mul(batch).and_then(|n| n.checked_mul(threads));
        if all.is_none_or(|n| n > i64::MAX as u64) {
            return Err(Failure::usage(
                format!("{threads} threads × {batch} blocks of {stride} bytes are more than an address space holds"),
                "use fewer or smaller blocks",
            ));
        }
        Ok(Self { block, stride, batch, threads })
    }

    /// Bytes that memory on either side must have.
    pub fn extent(self) -> u64 {
        self.stride * self.batch * self.threads
    }

    /// Bytes of a batch.
    pub fn batch_bytes(self) -> u64 {
        self.block * self.batch
    }

    /// Where block `i` of thread `t` begins, on both sides.
    pub fn offset(self, thread: u64, i: u64) -> u64 {
        self.stride * (i * self.threads + thread)
    }

    /// The blocks of a thread at `base`.
    pub fn blocks(self, thread: u64, base: u64) -> Blocks {
        Blocks {
            at: base + self.offset(thread, 0),
            len: self.block,
            step: self.stride * self.threads,
            count: self.batch,
        }
    }

    /// The transfers of one batch of `thread` between local memory at `local` and the peer's at `remote`.
    pub fn transfers(self, op: Op, thread: u64, local: u64, remote: u64) -> Vec<Transfer> {
        let at = |i| self.offset(thread, i);
        (0..self.batch)
            .map(|i| Transfer { op, local: local + at(i), remote: remote + at(i), len: self.block })
            .collect()
    }
}

/// One measurement.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Plan {
    /// Direction.
    pub op: Op,
    /// Where blocks lie.
    pub layout: Layout,
    /// When it ends.
    pub limit: Limit,
    /// How bytes are checked.
    pub verify: Verify,
    /// Bound of one batch, and of one answer of the peer.
    pub timeout: Duration,
    /// Number of the first iteration for the pattern. Never used before, or old data could pass for new.
    pub first_iteration: u64,
}

/// Memory on both sides: thread `t` uses place `t mod n`.
#[derive(Clone)]
pub struct Places {
    /// Ours; what is transferred.
    pub local: Vec<Region>,
    /// Ours; what is read back to be checked. Empty without verification.
    pub check: Vec<Region>,
    /// The peer's buffers.
    pub remote: Vec<u64>,
}

/// The peer's buffers `first` to `first + count - 1`, if they are there and large enough.
///
/// # Errors
/// What is missing, and what to change.
pub fn remote_bases(
    segment: &str,
    offered: &[RemoteRange],
    first: usize,
    count: usize,
    layout: Layout,
) -> Result<Vec<u64>> {
    let last = first + count - 1;
    if last >= offered.len() {
        let reason = if count > 1 { ", one for each NUMA node of this machine" } else { "" };
        return Err(Failure::new(
            format!("segment {segment} offers {} buffers, the run needs {}{reason}", offered.len(), last + 1),
            "start the target first and let it offer as many (`moonrail serve --buffers N`), then run again",
        ));
    }
    let wanted = &offered[first..=last];
    if let Some((i, small)) = wanted.iter().enumerate().find(|(_, range)| range.len < layout.extent()) {
        return Err(Failure::new(
            format!(
                "buffer {} of segment {segment} has {}, the run needs {} ({} threads × {} blocks of {})",
                first + i,
                units::size(small.len),
                units::size(layout.extent()),
                layout.threads,
                layout.batch,
                units::size(layout.stride)
            ),
            "use a smaller block, batch or number of threads, or let the target offer more (--size, --buffer_size)",
        ));
    }
    Ok(wanted.iter().map(|range| range.addr).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn blocks_of_all_threads_tile_the_extent(block in 1u64..64, gap in 0u64..64, batch in 1u64..16, threads in 1u64..8) {
            let layout = Layout::new(block, block + gap, batch, threads).unwrap();
            let mut starts: Vec<u64> =
                (0..threads).flat_map(|t| layout.transfers(Op::Write, t, 1000, 5000)).map(|t| t.local - 1000).collect();
            starts.sort_unstable();
            let expected: Vec<u64> = (0..batch * threads).map(|i| i * (block + gap)).collect();
            prop_assert_eq!(&starts, &expected);
            prop_assert!(starts[starts.len() - 1] + block <= layout.extent());
            for t in 0..threads {
                let of_series: Vec<u64> = layout.blocks(t, 5000).iter().map(|(at, _)| at).collect();
                let of_batch: Vec<u64> = layout.transfers(Op::Read, t, 0, 5000).iter().map(|t| t.remote).collect();
                prop_assert_eq!(of_series, of_batch);
            }
        }
    }

    #[test]
    fn offsets_are_those_of_the_program_it_stands_in_for() {
        // block × (i × T + t)
        let layout = Layout::new(65536, 65536, 128, 12).unwrap();
        assert_eq!(layout.offset(5, 3), 65536 * (3 * 12 + 5));
        assert_eq!(layout.extent(), 65536 * 128 * 12);
    }

    #[test]
    fn what_cannot_be_is_a_usage_error() {
        assert!(Layout::new(10, 9, 1, 1).is_err());
        assert!(Layout::new(1 << 40, 1 << 40, 1 << 20, 1 << 10).is_err());
    }

    #[test]
    fn too_few_or_too_small_buffers_are_told() {
        let range = |addr, len| RemoteRange { addr, len, location: "*".into() };
        let layout = Layout::new(4096, 4096, 16, 1).unwrap();
        let offered = [range(0x1000, 1 << 20), range(0x20_0000, 4096)];
        assert_eq!(remote_bases("s", &offered, 0, 1, layout), Ok(vec![0x1000]));
        let few = remote_bases("s", &offered, 0, 3, layout).unwrap_err().to_string();
        assert!(few.contains("offers 2 buffers, the run needs 3"), "{few}");
        let small = remote_bases("s", &offered, 1, 1, layout).unwrap_err().to_string();
        assert!(small.contains("buffer 1 of segment s has 4 KiB, the run needs 64 KiB"), "{small}");
        assert!(remote_bases("s", &[], 0, 1, layout).is_err());
    }
}
