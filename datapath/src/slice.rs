//! Cutting a transfer into slices: pure arithmetic.
//!
//! Tiles are cut once, at the union of every limit: the slice size, the chunks of the local region and the buffers of
//! the peer. So any rail can take any slice.

use smallvec::SmallVec;

use crate::units::RemoteAddr;

/// The slices of a Work. Most have one.
pub type Slices = SmallVec<[Slice; 1]>;

/// One piece of a transfer; becomes one work request.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Slice {
    /// Local virtual address.
    pub local: u64,
    /// Where in the peer.
    pub remote: RemoteAddr,
    /// Bytes, at least 1.
    pub len: u32,
    /// Place of the local chunk in its region.
    pub chunk: u32,
    /// Place of the remote buffer in the peer's list.
    pub buffer: u32,
    /// Place of the transfer in its Work.
    pub transfer: u32,
}

const _: () = assert!(size_of::<Slice>() == 32, "two slices per cache line");

/// How long slices are.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SliceRule {
    /// Bytes of a slice, at least 1 (MC_SLICE_SIZE).
    pub size: u32,
    /// A remainder of up to `size + fragment` bytes stays one slice (MC_FRAGMENT_RATIO).
    pub fragment: u32,
}

impl Default for SliceRule {
    fn default() -> Self {
        Self { size: crate::limits::SLICE_SIZE, fragment: crate::limits::FRAGMENT_LIMIT }
    }
}

/// A range of addresses that no slice may cross the end of.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Extent {
    /// First address.
    pub addr: u64,
    /// Bytes.
    pub len: u64,
}

impl Extent {
    fn end(self) -> u64 {
        self.addr.saturating_add(self.len)
    }

    fn holds(self, addr: u64) -> bool {
        self.addr <= addr && addr < self.end()
    }
}

/// Which of `sorted`, by address and without overlap, holds `addr`.
#[inline]
pub fn holder<T>(sorted: &[T], extent: impl Fn(&T) -> Extent, addr: u64) -> Option<usize> {
    // `partition_point` less its last step: where one item is left, it is that one or none.
    let (mut index, mut left) = (0, sorted.len());
    while left > 1 {
        let half = left / 2;
        if extent(sorted.get(index + half)?).addr <= addr {
            index += half;
        }
        left -= half;
    }
    let Extent { addr: first, len } = extent(sorted.get(index)?);
    (addr.checked_sub(first)? < len).then_some(index)
}

/// The transfer reaches outside the extents of one side.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum TileError {
    /// No chunk of the local region holds this address.
    #[error("local address {addr:#x} is not registered")]
    Local {
        /// The first address outside.
        addr: u64,
    },
    /// No buffer of the peer holds this address.
    #[error("remote address {addr:#x} is in none of the peer's buffers")]
    Remote {
        /// The first address outside.
        addr: u64,
    },
}

/// Cuts `len` bytes at `local` and `remote` into `out`. Zero bytes are no slices.
///
/// `chunks` and `buffers` need no order, but each address lies in at most one extent of its side.
/// On error `out` is as it was.
#[expect(clippy::too_many_arguments, reason = "four numbers of four types, two look-ups, a rule and the result")]
pub fn tile(
    transfer: u32,
    local: u64,
    remote: RemoteAddr,
    len: u64,
    rule: SliceRule,
    chunks: impl Fn(u64) -> Option<(u32, Extent)>,
    buffers: impl Fn(u64) -> Option<(u32, Extent)>,
    out: &mut Slices,
) -> Result<(), TileError> {
    let start = out.len();
    let (mut local, mut remote, mut left) = (local, remote.0, len);
    let whole = u64::from(rule.size.max(1)) + u64::from(rule.fragment);
    while left > 0 {
        let found = (|| {
            let (chunk, near) = chunks(local).filter(|c| c.1.holds(local)).ok_or(TileError::Local { addr: local })?;
            let (buffer, far) =
                buffers(remote).filter(|b| b.1.holds(remote)).ok_or(TileError::Remote { addr: remote })?;
            Ok((chunk, near, buffer, far))
        })();
        let (chunk, near, buffer, far) = match found {
            Ok(found) => found,
            Err(error) => {
                out.truncate(start);
                return Err(error);
            }
        };
        let cut = if left <= whole { left } else { u64::from(rule.size.max(1)) };
        let piece = cut.min(near.end() - local).min(far.end() - remote).min(1 << 31);
        out.push(Slice { local, remote: RemoteAddr(remote), len: piece as u32, chunk, buffer, transfer });
        left -= piece;
        if left > 0 {
            // Neither can wrap: each side's extent ends at or after this address.
            local += piece;
            remote += piece;
        }
    }
    Ok(())
}

/// A look-up over extents sorted by address, for [`tile`].
pub fn find_extent(extents: &[Extent], addr: u64) -> Option<(u32, Extent)> {
    let after = extents.partition_point(|e| e.addr <= addr);
    let index = after.checked_sub(1)?;
    let extent = extents[index];
    extent.holds(addr).then_some((index as u32, extent))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn cut(len: u64, rule: SliceRule, chunks: &[Extent], buffers: &[Extent]) -> Result<Slices, TileError> {
        let mut out = Slices::new();
        let (local, remote) = (chunks[0].addr, RemoteAddr(buffers[0].addr));
        tile(7, local, remote, len, rule, |a| find_extent(chunks, a), |a| find_extent(buffers, a), &mut out)?;
        Ok(out)
    }

    fn row(base: u64, lens: &[u64]) -> Vec<Extent> {
        let mut addr = base;
        lens.iter()
            .map(|&len| {
                let extent = Extent { addr, len };
                addr += len;
                extent
            })
            .collect()
    }

    #[test]
    fn the_sizes_the_reference_engine_cuts() {
        let big = row(0x1000, &[1 << 30]);
        let sizes =
            |len| -> Vec<u32> { cut(len, SliceRule::default(), &big, &big).unwrap().iter().map(|s| s.len).collect() };
        assert_eq!(sizes(81_920), [81_920]);
        assert_eq!(sizes(81_921), [65_536, 16_385]);
        assert_eq!(sizes(200_000), [65_536, 65_536, 68_928]);
        assert!(sizes(0).is_empty());
    }

    #[test]
    fn what_lies_outside_is_named_and_nothing_is_kept() {
        let near = row(0x1000, &[100]);
        let far = row(0x9000, &[50]);
        let mut out = Slices::new();
        let find = |extents: Vec<Extent>| move |a| find_extent(&extents, a);
        let rule = SliceRule { size: 10, fragment: 0 };
        let error = tile(0, 0x1000, RemoteAddr(0x9000), 60, rule, find(near), find(far), &mut out).unwrap_err();
        assert_eq!(error, TileError::Remote { addr: 0x9000 + 50 });
        assert!(out.is_empty());
    }

    proptest! {
        #[test]
        fn slices_tile_every_transfer_exactly(
            chunks in prop::collection::vec(1u64..5_000, 1..8),
            buffers in prop::collection::vec(1u64..5_000, 1..8),
            size in 1u32..3_000,
            fragment in 0u32..1_000,
            share in 0.0f64..=1.0,
        ) {
            let (near, far) = (row(0x10_0000, &chunks), row(0x90_0000, &buffers));
            let most = chunks.iter().sum::<u64>().min(buffers.iter().sum());
            let len = (most as f64 * share) as u64;
            let rule = SliceRule { size, fragment };
            let slices = cut(len, rule, &near, &far).unwrap();
            let mut offset = 0;
            for slice in &slices {
                prop_assert_eq!(slice.local, 0x10_0000 + offset);
                prop_assert_eq!(slice.remote.0, 0x90_0000 + offset);
                prop_assert!(slice.len >= 1 && slice.len <= size + fragment);
                let (chunk, buffer) = (near[slice.chunk as usize], far[slice.buffer as usize]);
                prop_assert!(chunk.holds(slice.local) && slice.local + u64::from(slice.len) <= chunk.end());
                prop_assert!(buffer.holds(slice.remote.0) && slice.remote.0 + u64::from(slice.len) <= buffer.end());
                offset += u64::from(slice.len);
            }
            prop_assert_eq!(offset, len);
        }
    }
}
