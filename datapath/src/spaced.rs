//! Cache lines of their own without an alignment of their own.

use std::ops::Deref;

/// A value that shares no cache line, nor the neighbour that is fetched with it, with what follows it in the same structure. What
/// stands before it has to be read-only, or spaced as well.
///
/// `CachePadded` does that by alignment, and what is aligned to 128 bytes is slow to allocate: glibc serves it without its
/// thread's cache, some 650 instructions each time and as many when it is freed. So this is for what is allocated for each batch.
#[derive(Debug)]
#[repr(C)]
pub(crate) struct Spaced<T> {
    value: T,
    space: [u64; 15],
}

impl<T> Spaced<T> {
    pub(crate) const fn new(value: T) -> Self {
        Self { value, space: [0; 15] }
    }
}

impl<T> Deref for Spaced<T> {
    type Target = T;
    fn deref(&self) -> &T {
        &self.value
    }
}
