//! Registered memory. An island of unsafe code: it owns or borrows raw memory that devices and peers write at any time.
//!
//! The bytes are never lent as `&[u8]` or `&mut [u8]`: a peer may write them in mid-borrow. They are copied in and out,
//! and a copy that races with a peer's WRITE sees any mixture of old and new bytes, as any reader of RDMA memory does.
#![allow(unsafe_code)]

use std::io;
use std::ptr::{self, NonNull};
use std::sync::Arc;

use crate::nic::Registration;
use crate::units::{Lkey, NicId, Rkey};

/// A range of this process's memory that stays mapped as long as this value lives.
#[derive(Debug)]
pub struct Memory {
    base: NonNull<u8>,
    len: usize,
    owned: bool,
}

// SAFETY: the memory is plain bytes without a thread affinity; every access here goes through raw copies that make no
// claim of exclusive or unchanging access, so two threads (or a device) may race on the bytes but not on the mapping.
unsafe impl Send for Memory {}
// SAFETY: as above; `base`, `len` and `owned` never change after construction.
unsafe impl Sync for Memory {}

/// A range that does not lie inside the memory it names.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{len} bytes at offset {offset} do not lie inside the region of {size} bytes")]
pub struct OutOfRange {
    /// First byte, counted from the region's start.
    pub offset: u64,
    /// Bytes asked for.
    pub len: u64,
    /// Bytes the region has.
    pub size: u64,
}

impl Memory {
    /// Maps `len` bytes of zeroed, page-aligned memory.
    ///
    /// # Errors
    /// `InvalidInput` for 0 bytes; otherwise what mmap(2) says (ENOMEM: address space or overcommit limit).
    pub fn allocate(len: usize) -> io::Result<Arc<Self>> {
        if len == 0 {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "a region needs at least one byte"));
        }
        // SAFETY: an anonymous private mapping at an address of the kernel's choice touches no existing memory.
        let base = unsafe {
            libc::mmap(
                ptr::null_mut(),
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the range was just mapped. Advice only; a kernel without huge pages refuses it harmlessly.
        unsafe { libc::madvise(base, len, libc::MADV_HUGEPAGE) };
        let base = NonNull::new(base.cast()).ok_or_else(|| io::Error::other("mmap returned address 0"))?;
        Ok(Arc::new(Self { base, len, owned: true }))
    }

    /// Wraps memory of the embedder.
    ///
    /// # Safety
    /// The `len` bytes at `base` stay mapped, readable and writable until the returned value and every clone of it are
    /// dropped; deregistering the region and waiting for it (promise 2) is how an embedder knows. While it lives,
    /// devices and peers write the bytes at any time: the embedder must not hold Rust references to them.
    pub unsafe fn borrow(base: NonNull<u8>, len: usize) -> Arc<Self> {
        Arc::new(Self { base, len, owned: false })
    }

    /// Address of the first byte; what peers use as the remote address.
    pub fn addr(&self) -> u64 {
        self.base.as_ptr() as u64
    }

    /// Bytes.
    pub fn len(&self) -> u64 {
        self.len as u64
    }

    /// Whether there is nothing in it. Never true for allocated memory.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Raw pointer to the first byte, for embedders that uphold the rules above themselves.
    pub fn as_ptr(&self) -> *mut u8 {
        self.base.as_ptr()
    }

    /// NUMA node of the first page; `None` where it has no page yet or the kernel does not tell (move_pages(2)).
    pub fn numa_node(&self) -> Option<u16> {
        let page = self.base.as_ptr() as usize & !4095;
        let pages = [page as *mut libc::c_void];
        let mut status = [-1i32];
        // SAFETY: with a null list of target nodes the call moves nothing; it reads one address from `pages` and writes
        // one status, and both arrays have room for that one.
        let result = unsafe {
            libc::syscall(
                libc::SYS_move_pages,
                0,
                1usize,
                pages.as_ptr(),
                ptr::null::<libc::c_int>(),
                status.as_mut_ptr(),
                0,
            )
        };
        if result == 0 { u16::try_from(status[0]).ok() } else { None }
    }

    fn check(&self, offset: u64, len: u64) -> Result<*mut u8, OutOfRange> {
        match offset.checked_add(len) {
            // SAFETY: offset ≤ self.len, and the mapping is at most isize::MAX bytes long.
            Some(end) if end <= self.len() => Ok(unsafe { self.base.as_ptr().add(offset as usize) }),
            _ => Err(OutOfRange { offset, len, size: self.len() }),
        }
    }

    /// Copies bytes out.
    pub fn read(&self, offset: u64, into: &mut [u8]) -> Result<(), OutOfRange> {
        let from = self.check(offset, into.len() as u64)?;
        // SAFETY: `check` proved the range mapped; `into` is exclusive and, being a Rust borrow, is not this memory.
        unsafe { ptr::copy_nonoverlapping(from, into.as_mut_ptr(), into.len()) };
        Ok(())
    }

    /// Copies bytes in.
    pub fn write(&self, offset: u64, from: &[u8]) -> Result<(), OutOfRange> {
        let into = self.check(offset, from.len() as u64)?;
        // SAFETY: as in `read`, the other way round.
        unsafe { ptr::copy_nonoverlapping(from.as_ptr(), into, from.len()) };
        Ok(())
    }

    /// Copies `len` bytes from another region (or the same: overlap is allowed). What a NIC in software does as DMA.
    pub fn copy_from(&self, offset: u64, other: &Self, other_offset: u64, len: u64) -> Result<(), OutOfRange> {
        let into = self.check(offset, len)?;
        let from = other.check(other_offset, len)?;
        // SAFETY: both ranges are mapped; `copy` allows them to overlap.
        unsafe { ptr::copy(from, into, len as usize) };
        Ok(())
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        if self.owned {
            // SAFETY: mapped by `allocate` with this length, and nobody holds the value any more.
            unsafe { libc::munmap(self.base.as_ptr().cast(), self.len) };
        }
    }
}

/// Keys of one chunk on one NIC.
pub struct ChunkKeys {
    /// For our own work requests.
    pub lkey: Lkey,
    /// For the peer's.
    pub rkey: Rkey,
    _guard: Box<dyn std::any::Any + Send + Sync>,
}

impl From<Registration> for ChunkKeys {
    fn from(registration: Registration) -> Self {
        Self { lkey: registration.lkey, rkey: registration.rkey, _guard: registration.guard }
    }
}

/// A piece of a region that every NIC registered as one range.
pub struct Chunk {
    /// Absolute address of the first byte.
    pub addr: u64,
    /// Bytes.
    pub len: u64,
    /// By [`NicId`]; `None` on a NIC that could not register it.
    pub keys: Box<[Option<ChunkKeys>]>,
}

impl Chunk {
    /// Key for work requests on `nic`.
    pub fn lkey(&self, nic: NicId) -> Option<Lkey> {
        self.keys.get(usize::from(nic.0))?.as_ref().map(|k| k.lkey)
    }
}

/// Memory registered on every NIC of the engine, cut into chunks that none of them refuses.
///
/// Work in flight holds an `Arc` of it, so it is deregistered only when no NIC can touch it any more on our behalf.
pub struct Region {
    // Declared before `memory`: registrations go first.
    chunks: Box<[Chunk]>,
    memory: Arc<Memory>,
    location: String,
    remote: bool,
}

impl Region {
    /// Puts together what was registered. `chunks` tile the memory in order, without gaps.
    pub fn new(memory: Arc<Memory>, chunks: Vec<Chunk>, location: String, remote: bool) -> Self {
        debug_assert_eq!(chunks.iter().map(|c| c.len).sum::<u64>(), memory.len());
        Self { chunks: chunks.into_boxed_slice(), memory, location, remote }
    }

    /// The bytes.
    pub fn memory(&self) -> &Arc<Memory> {
        &self.memory
    }

    /// The chunks, in address order.
    pub fn chunks(&self) -> &[Chunk] {
        &self.chunks
    }

    /// Where it lies: `cpu:0`, `*`, …
    pub fn location(&self) -> &str {
        &self.location
    }

    /// Whether peers may reach it.
    pub fn is_remote(&self) -> bool {
        self.remote
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn copies_stay_inside_the_region() {
        let memory = Memory::allocate(4096).unwrap();
        memory.write(4090, b"abcdef").unwrap();
        let mut back = [0; 6];
        memory.read(4090, &mut back).unwrap();
        assert_eq!(&back, b"abcdef");
        assert!(memory.write(4091, b"abcdef").is_err());
        assert!(memory.read(u64::MAX, &mut back).is_err());
        memory.copy_from(0, &memory, 4090, 6).unwrap();
        memory.read(0, &mut back).unwrap();
        assert_eq!(&back, b"abcdef");
        assert!(memory.copy_from(4095, &memory, 0, 2).is_err());
    }

    #[test]
    fn memory_has_a_node_once_it_has_a_page() {
        let memory = Memory::allocate(1 << 21).unwrap();
        let before = memory.numa_node();
        memory.write(0, &[1]).unwrap();
        // A kernel without move_pages (or a sandbox that refuses it) never tells; another never tells before.
        assert!(before.is_none());
        if let Some(node) = memory.numa_node() {
            assert!(node < 1024);
        }
    }

    #[test]
    fn a_region_of_nothing_is_refused() {
        assert_eq!(Memory::allocate(0).unwrap_err().kind(), io::ErrorKind::InvalidInput);
    }
}
