//! Registered memory. An island of unsafe code: it owns or borrows raw memory that devices and peers write at any time.
//!
//! The bytes are never lent as `&[u8]` or `&mut [u8]`: a peer may write them in mid-borrow. They are copied in and out,
//! and a copy that races with a peer's WRITE sees any mixture of old and new bytes, as any reader of RDMA memory does.
#![allow(unsafe_code)]

pub(crate) mod backing;
mod file;
pub mod process;

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::ptr::{self, NonNull};
use std::sync::Arc;

use backing::Mapping;
use process::Process;

use crate::nic::Registration;
use crate::units::{Lkey, NicId, Rkey};

/// A range of this process's memory that stays mapped as long as this value lives.
#[derive(Debug)]
pub struct Memory {
    base: NonNull<u8>,
    len: usize,
    /// What the engine allocated; unmapped with this value.
    owned: Option<Mapping>,
    shared: Option<file::File>,
    /// Where it was made: allocated memory is not mapped in a child of that.
    process: Process,
}

// SAFETY: the memory is plain bytes without a thread affinity; every access here goes through raw copies that make no
// claim of exclusive or unchanging access, so two threads (or a device) may race on the bytes but not on the mapping.
unsafe impl Send for Memory {}
// SAFETY: as above; the fields never change after construction.
unsafe impl Sync for Memory {}

/// A range that does not lie inside the memory it names; in a forked child none does.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{}", self.in_words())]
pub struct OutOfRange {
    /// First byte, counted from the region's start.
    pub offset: u64,
    /// Bytes asked for.
    pub len: u64,
    /// Bytes the region has in this process: 0 in a forked child.
    pub size: u64,
}

impl OutOfRange {
    fn in_words(&self) -> String {
        let Self { offset, len, size } = self;
        match size {
            0 => format!("the region is not here: {}", process::FORKED),
            _ => format!("{len} bytes at offset {offset} do not lie inside the region of {size} bytes"),
        }
    }
}

impl Memory {
    /// `len` bytes of zeroed, page-aligned memory with all of its pages, in a form that a peer of this host can map. A child of
    /// this process does not have it: there [`Memory::read`] and [`Memory::write`] fail, and a raw pointer leads nowhere.
    ///
    /// Each holds a file descriptor. Where memory holds a quarter of those the process may have (RLIMIT_NOFILE), more of it has none,
    /// and peers of this host copy it through the kernel: few large regions are better than many small ones.
    ///
    /// # Errors
    /// `InvalidInput` for 0 bytes; `OutOfMemory` where the machine or the control group has no room; otherwise what the
    /// system says.
    pub fn allocate(len: usize) -> io::Result<Arc<Self>> {
        Self::allocate_on(len, None)
    }

    /// As [`Memory::allocate`], with its pages on a NUMA node where the system grants it.
    pub fn allocate_on(len: usize, node: Option<u16>) -> io::Result<Arc<Self>> {
        if len == 0 {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "a region needs at least one byte"));
        }
        let (mapping, shared) = backing::allocate(len, node)?;
        // Peers write it at any time: a child of ours has no business there.
        mapping.advise(libc::MADV_DONTFORK);
        Ok(Arc::new(Self { base: mapping.base(), len, owned: Some(mapping), shared, process: Process::current() }))
    }

    /// The file behind memory that the engine allocated, for a peer to map. `None` for borrowed memory, where the
    /// system has no memfd, and where memory has its share of the descriptors.
    pub fn shared_fd(&self) -> Option<BorrowedFd<'_>> {
        self.shared.as_ref().map(AsFd::as_fd)
    }

    /// Whether the engine allocated it. Borrowed memory ends when its owner wants it to.
    pub fn is_owned(&self) -> bool {
        self.owned.is_some()
    }

    /// Wraps memory of the embedder.
    ///
    /// # Safety
    /// The `len` bytes at `base` stay mapped, readable and writable until the returned value and every clone of it are
    /// dropped; deregistering the region and waiting for it (promise 2) is how an embedder knows. While it lives,
    /// devices and peers write the bytes at any time: the embedder must not hold Rust references to them.
    pub unsafe fn borrow(base: NonNull<u8>, len: usize) -> Arc<Self> {
        Arc::new(Self { base, len, owned: None, shared: None, process: Process::current() })
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
        if !self.process.is_current() {
            return Err(OutOfRange { offset, len, size: 0 });
        }
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
        memory.write(0, &[1]).unwrap();
        // A kernel without move_pages (or a sandbox that refuses it) never tells.
        if let Some(node) = memory.numa_node() {
            assert!(node < 1024);
        }
    }

    #[test]
    fn allocated_memory_is_a_file_whose_size_is_final() {
        let memory = Memory::allocate_on(10_000, Some(0)).unwrap();
        let Some(file) = memory.shared_fd() else { return }; // a sandbox without memfd
        assert!(rustix::fs::fcntl_get_seals(file).unwrap().contains(backing::SIZE_SEALS));
        assert!(rustix::fs::ftruncate(file, 4096).is_err());
        let other = Mapping::shared(file, 0, 10_000, true).unwrap();
        memory.write(9_999, &[7]).unwrap();
        // SAFETY: the last byte of the mapping.
        assert_eq!(unsafe { other.base().as_ptr().add(9_999).read() }, 7);
    }

    /// Size of the pages under an address, in KiB, as the kernel tells.
    fn page_size_at(addr: u64) -> u64 {
        let maps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let at = maps.find(&format!("{addr:x}-")).expect("it is mapped");
        let line = maps[at..].lines().find_map(|line| line.strip_prefix("KernelPageSize:")).unwrap();
        line.trim().strip_suffix(" kB").unwrap().parse().unwrap()
    }

    #[test]
    fn huge_pages_are_taken_where_they_are_set_aside_and_not_missed_elsewhere() {
        let free = std::fs::read_to_string("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages");
        let free: u64 = free.ok().and_then(|text| text.trim().parse().ok()).unwrap_or(0);
        let memory = Memory::allocate(2 * backing::HUGE).unwrap();
        memory.write(memory.len() - 1, &[9]).unwrap();
        let size = page_size_at(memory.addr());
        if free >= 2 {
            assert_eq!(size, 2048);
            let other = Mapping::shared(memory.shared_fd().unwrap(), 0, 2 * backing::HUGE, true).unwrap();
            // SAFETY: the last byte of the mapping.
            assert_eq!(unsafe { other.base().as_ptr().add(2 * backing::HUGE - 1).read() }, 9);
        } else {
            assert!(size < 2048);
        }
        // Half of one is never a huge one.
        assert!(page_size_at(Memory::allocate(backing::HUGE + 4096).unwrap().addr()) < 2048);
    }

    #[test]
    fn more_memory_than_there_is_is_an_error_not_a_killed_process() {
        let error = Memory::allocate(1 << 46).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::OutOfMemory, "{error}");
        assert!(error.to_string().contains("ask for less"), "{error}");
    }

    #[test]
    fn a_region_of_nothing_is_refused() {
        assert_eq!(Memory::allocate(0).unwrap_err().kind(), io::ErrorKind::InvalidInput);
    }
}
