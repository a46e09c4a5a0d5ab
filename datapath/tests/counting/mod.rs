//! A global allocator that counts what the calling thread allocates and frees while it is told to, the bytes that all threads
//! ask for, and those that they have.
#![allow(unsafe_code)]
#![allow(dead_code)] // each test uses a part

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};

struct Counting;

/// Bytes that any thread asked for, always counted: whatever is built anew or copied whole shows in it.
pub(crate) static BYTES: AtomicU64 = AtomicU64::new(0);
/// Bytes asked for and not given back, of all threads.
pub(crate) static LIVE: AtomicI64 = AtomicI64::new(0);

thread_local! {
    /// Whether this thread is counted.
    pub(crate) static ON: Cell<bool> = const { Cell::new(false) };
    pub(crate) static ALLOCATIONS: Cell<u64> = const { Cell::new(0) };
    pub(crate) static FREES: Cell<u64> = const { Cell::new(0) };
}

fn note(counter: &'static std::thread::LocalKey<Cell<u64>>) {
    if ON.get() {
        counter.set(counter.get() + 1);
    }
}

// SAFETY: every call is passed on to the system's allocator as it came.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        note(&ALLOCATIONS);
        BYTES.fetch_add(layout.size() as u64, Ordering::Relaxed);
        LIVE.fetch_add(layout.size() as i64, Ordering::Relaxed);
        // SAFETY: the caller's promise, passed on.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        note(&FREES);
        LIVE.fetch_sub(layout.size() as i64, Ordering::Relaxed);
        // SAFETY: the caller's promise, passed on.
        unsafe { System.dealloc(at, layout) }
    }
    unsafe fn realloc(&self, at: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        note(&ALLOCATIONS);
        BYTES.fetch_add(size as u64, Ordering::Relaxed);
        LIVE.fetch_add(size as i64 - layout.size() as i64, Ordering::Relaxed);
        // SAFETY: the caller's promise, passed on.
        unsafe { System.realloc(at, layout, size) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;
