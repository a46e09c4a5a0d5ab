//! Memory as an embedder has it: his own, in many pieces. An island of unsafe code, as it is for him.
#![allow(unsafe_code)]

use std::ptr::NonNull;
use std::sync::Arc;

use moonrail::Memory;

/// So many pieces of `len` bytes, side by side. They are there until the program ends.
pub(crate) fn pieces(count: u64, len: usize) -> Vec<Arc<Memory>> {
    let whole = NonNull::from(Box::leak(vec![0u8; count as usize * len].into_boxed_slice())).cast::<u8>();
    // SAFETY: both lie within the allocation, or at its end; it is leaked, so it stays, and nobody has a reference to it.
    let piece = |n: u64| unsafe { Memory::borrow(whole.add(n as usize * len), len) };
    (0..count).map(piece).collect()
}
