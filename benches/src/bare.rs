//! What the machine does without an engine: the limits that the experiments hold theirs against.

#![allow(unsafe_code)]

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use moonrail::Memory;

/// Copies `len` bytes between two memories with streaming stores; whether this processor has them.
pub(crate) fn stream_copy(to: &Memory, to_at: u64, from: &Memory, from_at: u64, len: u64) -> bool {
    assert!(to_at.checked_add(len).is_some_and(|end| end <= to.len()));
    assert!(from_at.checked_add(len).is_some_and(|end| end <= from.len()));
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx2") {
        // SAFETY: both ranges lie inside their memories, by the lines above, and the processor has AVX2.
        unsafe { stream_avx2((to.addr() + to_at) as *mut u8, (from.addr() + from_at) as *const u8, len as usize) };
        return true;
    }
    false
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
#[allow(clippy::cast_ptr_alignment)] // loads may lie anywhere, and the stores begin at a multiple of 64
unsafe fn stream_avx2(to: *mut u8, from: *const u8, len: usize) {
    use std::arch::x86_64::{__m256i, _mm_sfence, _mm256_loadu_si256, _mm256_stream_si256};
    let head = to.align_offset(64).min(len);
    let whole = (len - head) / 64;
    // SAFETY: the caller's promise; every access is below `len`, and the streaming ones begin at a multiple of 64.
    unsafe {
        std::ptr::copy_nonoverlapping(from, to, head);
        let (to, from) = (to.add(head), from.add(head));
        for line in 0..whole {
            let (to, from) = (to.add(line * 64).cast::<__m256i>(), from.add(line * 64).cast::<__m256i>());
            let (low, high) = (_mm256_loadu_si256(from), _mm256_loadu_si256(from.add(1)));
            _mm256_stream_si256(to, low);
            _mm256_stream_si256(to.add(1), high);
        }
        std::ptr::copy_nonoverlapping(from.add(whole * 64), to.add(whole * 64), len - head - whole * 64);
        _mm_sfence();
    }
}

/// Nanoseconds for one cache line to another thread and back: the median of `rounds` groups of 256.
pub(crate) fn line_round_trip(rounds: usize) -> f64 {
    const GROUP: u64 = 256;
    let line = AtomicU64::new(0);
    let total = rounds as u64 * GROUP;
    let mut times = Vec::with_capacity(rounds);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for turn in 0..total {
                await_value(&line, 2 * turn + 1);
                line.store(2 * turn + 2, Ordering::Release);
            }
        });
        for round in 0..rounds as u64 {
            let from = Instant::now();
            for turn in round * GROUP..(round + 1) * GROUP {
                line.store(2 * turn + 1, Ordering::Release);
                await_value(&line, 2 * turn + 2);
            }
            times.push(from.elapsed().as_nanos() as f64 / GROUP as f64);
        }
    });
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

fn await_value(line: &AtomicU64, value: u64) {
    let mut looks = 0u32;
    while line.load(Ordering::Acquire) != value {
        looks += 1;
        if looks > 1 << 14 {
            // The other thread has no processor.
            std::thread::yield_now();
        }
        std::hint::spin_loop();
    }
}

/// What two looks at the clock take by themselves, in nanoseconds.
pub(crate) fn clock() -> f64 {
    let mut times: Vec<f64> = (0..1001).map(|_| Instant::now().elapsed().as_nanos() as f64).collect();
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn streamed_bytes_arrive_whole_and_nothing_else() {
        let (to, from) = (Memory::allocate(8192).unwrap(), Memory::allocate(8192).unwrap());
        let bytes: Vec<u8> = (0..8192u32).map(|i| ((i * 31) >> 3) as u8).collect();
        from.write(0, &bytes).unwrap();
        if !stream_copy(&to, 3, &from, 5, 7001) {
            return;
        }
        let mut seen = vec![0; 8192];
        to.read(0, &mut seen).unwrap();
        assert_eq!(seen[3..7004], bytes[5..7006]);
        assert!(seen[..3].iter().chain(&seen[7004..]).all(|byte| *byte == 0));
    }
}
