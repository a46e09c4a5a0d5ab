//! Moving bytes between two mappings: ordinary stores for what is in the cache, streaming stores for what is not.
//!
//! A streaming store writes whole lines to memory without reading them first, and leaves the cache to others. It is not
//! ordered with later stores: [`fence`] comes before anybody is told.

use super::recent;
use crate::nic::Op;

/// A READ up to this long, by itself, is going to be looked at by the thread that asked for it: it should find it in the cache.
const LOOKED_AT: usize = 64 << 10;
/// From this many bytes of one run of requests on nobody looks at all of it at once.
pub(super) const BULK: usize = 256 << 10;
/// Shorter pieces are not worth the alignment and the fence.
const STREAM_PIECE: usize = 2048;

/// Whether streaming stores come into question at all.
#[inline]
pub(super) fn may_stream(len: usize) -> bool {
    len >= STREAM_PIECE
}

/// Whether a copy to `to` is made with streaming stores. Asked once for each copy: it is remembered.
#[inline]
pub(super) fn streams(op: Op, to: *const u8, len: usize, bulk: bool) -> bool {
    // Streaming was measured to be ahead for what is not in the cache from 4 KiB on, and behind for what is (docs/performance.md).
    may_stream(len) && has_avx2() && !recent::note(to, len) && (op == Op::Write || bulk || len > LOOKED_AT)
}

#[inline]
fn has_avx2() -> bool {
    #[cfg(target_arch = "x86_64")]
    return is_x86_feature_detected!("avx2");
    #[cfg(not(target_arch = "x86_64"))]
    return false;
}

/// Copies `len` bytes; ranges that overlap end as any mixture.
///
/// # Safety
/// Both ranges are mapped, and stay so. `stream` only where [`streams`] said so.
#[inline]
pub(super) unsafe fn copy(to: *mut u8, from: *const u8, len: usize, stream: bool) {
    #[cfg(target_arch = "x86_64")]
    if stream {
        // SAFETY: as the caller promised; `streams` has asked whether the processor has AVX2.
        return unsafe { stream_avx2(to, from, len) };
    }
    let _ = stream;
    // SAFETY: as the caller promised; `copy` allows overlap.
    unsafe { std::ptr::copy(from, to, len) };
}

/// Orders streaming stores before whatever is stored next.
pub(super) fn fence() {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: every x86_64 processor has SSE.
    unsafe {
        std::arch::x86_64::_mm_sfence();
    }
}

/// Brings the beginning of a block into the cache while another is copied.
pub(super) fn prefetch(at: *const u8) {
    #[cfg(target_arch = "x86_64")]
    for line in 0..4 {
        // SAFETY: a prefetch never faults, whatever the address.
        unsafe {
            std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(at.wrapping_add(64 * line).cast());
        }
    }
    let _ = at;
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
unsafe fn stream_avx2(mut to: *mut u8, mut from: *const u8, mut len: usize) {
    use std::arch::x86_64::{__m256i, _MM_HINT_T0, _mm_prefetch, _mm256_loadu_si256, _mm256_stream_si256};
    /// How far ahead of the copy lines are asked for.
    const AHEAD: usize = 1024;
    let head = to.align_offset(64).min(len);
    // SAFETY: `head` ≤ `len`, both ranges mapped by the caller's promise; the pointers move together and `len` says what is
    // left, so every load and store below stays inside. `to` is a multiple of 64 in the loop, as the stores require.
    unsafe {
        std::ptr::copy(from, to, head);
        (to, from, len) = (to.add(head), from.add(head), len - head);
        while len >= 128 {
            _mm_prefetch::<_MM_HINT_T0>(from.wrapping_add(AHEAD).cast());
            _mm_prefetch::<_MM_HINT_T0>(from.wrapping_add(AHEAD + 64).cast());
            let source = from.cast::<__m256i>();
            let target = to.cast::<__m256i>();
            let block = [
                _mm256_loadu_si256(source),
                _mm256_loadu_si256(source.add(1)),
                _mm256_loadu_si256(source.add(2)),
                _mm256_loadu_si256(source.add(3)),
            ];
            _mm256_stream_si256(target, block[0]);
            _mm256_stream_si256(target.add(1), block[1]);
            _mm256_stream_si256(target.add(2), block[2]);
            _mm256_stream_si256(target.add(3), block[3]);
            (to, from, len) = (to.add(128), from.add(128), len - 128);
        }
        std::ptr::copy(from, to, len);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_length_and_alignment_arrives_whole_and_nothing_else() {
        let source: Vec<u8> = (0..20_000u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
        for stream in [false, true] {
            for (shift, len) in [(0, 0), (1, 1), (3, 2047), (0, 2048), (1, 2049), (63, 4096), (64, 8192), (17, 16_000)]
            {
                if stream && !has_avx2() {
                    continue;
                }
                let mut target = vec![0xa5u8; 20_000];
                // SAFETY: both ranges lie inside their vectors.
                unsafe { copy(target.as_mut_ptr().add(shift), source.as_ptr().add(7), len, stream) };
                fence();
                assert_eq!(&target[shift..shift + len], &source[7..7 + len]);
                assert!(target[..shift].iter().chain(&target[shift + len..]).all(|&b| b == 0xa5));
            }
        }
    }
}
