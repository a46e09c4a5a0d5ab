//! Where the engine's memory comes from: a sealed memfd, so that a peer of the same host can map it too.
//!
//! A memfd is filled before anybody uses it: a machine or a control group without room says so here, as an error,
//! and not later as a SIGBUS. Its seals (no shrinking, no growing, no other seals) let a peer trust its size.
//!
//! Where memory holds its share of the process's file descriptors ([`super::file`]) it is anonymous: peers copy it through the kernel.
//!
//! Fork: the pages stay the parent's. A shared mapping is not copied on write, so a parent that writes keeps the pages its NICs
//! know; and a child does not have the mapping at all (MADV_DONTFORK), so it cannot write where peers read, and nothing is there
//! that a write of the parent to anonymous memory would have to be copied away from. Memory that is
//! mapped once is advised as a whole, and costs no second mapping.

use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::{self, NonNull};

use super::file::{File, Place};
use super::process::Process;

use rustix::fs::{FallocateFlags, MemfdFlags, SealFlags, fallocate, fcntl_add_seals, ftruncate, memfd_create};

/// Seals that exclude a SIGBUS in whoever maps the file.
pub(crate) const SIZE_SEALS: SealFlags = SealFlags::SHRINK.union(SealFlags::GROW);

/// A mapping; unmapped when dropped.
#[derive(Debug)]
pub(crate) struct Mapping {
    base: NonNull<u8>,
    len: usize,
    process: Process,
}

// SAFETY: plain bytes without a thread affinity; who reads and writes them is for the holder to order.
unsafe impl Send for Mapping {}
// SAFETY: as above; the two fields never change.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps `len` bytes of a file from `offset`, a multiple of the page size, shared with whoever maps it too.
    pub(crate) fn shared(fd: BorrowedFd<'_>, offset: u64, len: usize, writable: bool) -> io::Result<Self> {
        Self::map(Some((fd, offset)), len, writable)
    }

    fn map(file: Option<(BorrowedFd<'_>, u64)>, len: usize, writable: bool) -> io::Result<Self> {
        use std::os::fd::AsRawFd;
        let protection = if writable { libc::PROT_READ | libc::PROT_WRITE } else { libc::PROT_READ };
        let (fd, offset, flags) = match file {
            Some((fd, offset)) => {
                let offset = libc::off_t::try_from(offset).map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))?;
                (fd.as_raw_fd(), offset, libc::MAP_SHARED)
            }
            None => (-1, 0, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS),
        };
        // SAFETY: a mapping at an address of the kernel's choice touches no existing memory.
        let base = unsafe { libc::mmap(ptr::null_mut(), len, protection, flags, fd, offset) };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let base = NonNull::new(base.cast()).ok_or_else(|| io::Error::other("mmap returned address 0"))?;
        Ok(Self { base, len, process: Process::current() })
    }

    pub(crate) fn base(&self) -> NonNull<u8> {
        self.base
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// Gives the kernel advice about all of it. A kernel that does not know the advice refuses it harmlessly.
    pub(crate) fn advise(&self, advice: libc::c_int) {
        // SAFETY: the range is mapped. Callers pass advice that changes no bytes.
        unsafe { libc::madvise(self.base.as_ptr().cast(), self.len, advice) };
    }

    /// Makes the page tables of a part, so that the first copy does not take a fault per page.
    pub(crate) fn populate(&self, offset: usize, len: usize) {
        let len = len.min(self.len.saturating_sub(offset));
        if len > 0 {
            // SAFETY: inside the mapping, `offset` is page-aligned by the caller; pages that do not exist come as zeros, no byte changes.
            unsafe { libc::madvise(self.base.as_ptr().add(offset).cast(), len, libc::MADV_POPULATE_WRITE) };
        }
    }

    /// Wants its pages on this NUMA node; a wish (MPOL_PREFERRED) that the system may refuse.
    fn prefer_node(&self, node: u16) {
        let mut mask = [0u64; 16];
        let Some(word) = mask.get_mut(usize::from(node) / 64) else { return };
        *word = 1 << (node % 64);
        // SAFETY: the range is mapped, and the mask has the 1024 bits that are announced (the kernel reads one less).
        unsafe {
            libc::syscall(
                libc::SYS_mbind,
                self.base.as_ptr(),
                self.len,
                libc::MPOL_PREFERRED,
                mask.as_ptr(),
                1025usize,
                0usize,
            )
        };
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // In a child the place may be another's by now: a mapping that was not inherited leaves it free.
        if !self.process.is_current() {
            return;
        }
        // SAFETY: mapped by `map` with this length, in this process, and nobody holds the value any more.
        unsafe { libc::munmap(self.base.as_ptr().cast(), self.len) };
    }
}

/// A memfd of `len` zeroed bytes that all have pages and whose size is final.
pub(crate) fn sealed_memfd(name: &str, len: usize) -> io::Result<OwnedFd> {
    let (file, _) = memfd(name, len, None).map_err(Unavailable::into_inner)?;
    fcntl_add_seals(&file, SIZE_SEALS)?;
    Ok(file)
}

/// Memory that others can map; the anonymous kind where this system has no memfd, or memory its share of the descriptors.
pub(super) fn allocate(len: usize, node: Option<u16>) -> io::Result<(Mapping, Option<File>)> {
    let Some(place) = Place::take() else { return anonymous(len, node) };
    match huge_memfd(len, node).map_or_else(|| memfd("moonrail", len, node), Ok) {
        Ok((file, mapping)) => {
            fcntl_add_seals(&file, SIZE_SEALS | SealFlags::SEAL)?;
            Ok((mapping, Some(File::new(file, place))))
        }
        Err(Unavailable::NoMemory(error)) => Err(error),
        Err(Unavailable::NoMemfd(_)) => anonymous(len, node),
    }
}

fn anonymous(len: usize, node: Option<u16>) -> io::Result<(Mapping, Option<File>)> {
    check_room(len)?;
    let mapping = Mapping::map(None, len, true)?;
    mapping.advise(libc::MADV_HUGEPAGE);
    if let Some(node) = node {
        mapping.prefer_node(node);
    }
    mapping.populate(0, len);
    Ok((mapping, None))
}

enum Unavailable {
    /// This system gives no memfd: old, or a sandbox.
    NoMemfd(io::Error),
    /// There is no room.
    NoMemory(io::Error),
}

impl Unavailable {
    fn into_inner(self) -> io::Error {
        match self {
            Self::NoMemfd(error) | Self::NoMemory(error) => error,
        }
    }
}

/// Size of the huge pages that are used.
pub(super) const HUGE: usize = 2 << 20;

/// As [`memfd`], of huge pages, where the administrator set enough of them aside (vm.nr_hugepages): one entry of the TLB
/// then covers 2 MiB, for us and for peers. Whole huge pages only: a mapping of half of one could not be undone.
fn huge_memfd(len: usize, node: Option<u16>) -> Option<(OwnedFd, Mapping)> {
    let free = fs::read_to_string("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages").ok()?;
    let free: usize = free.trim().parse().ok()?;
    if !len.is_multiple_of(HUGE) || free < len / HUGE {
        return None;
    }
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING | MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB;
    let file = memfd_create("moonrail-huge", flags).ok()?;
    ftruncate(&file, len as u64).ok()?;
    let mapping = Mapping::shared(file.as_fd(), 0, len, true).ok()?;
    if let Some(node) = node {
        mapping.prefer_node(node);
    }
    // Somebody else may have taken them meanwhile: then it is usual pages.
    fallocate(&file, FallocateFlags::empty(), 0, len as u64).ok()?;
    Some((file, mapping))
}

fn memfd(name: &str, len: usize, node: Option<u16>) -> Result<(OwnedFd, Mapping), Unavailable> {
    check_room(len).map_err(Unavailable::NoMemory)?;
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let file = memfd_create(name, flags).map_err(|e| Unavailable::NoMemfd(e.into()))?;
    ftruncate(&file, len as u64).map_err(|e| Unavailable::NoMemory(no_room(len, &e.into())))?;
    let mapping = Mapping::shared(file.as_fd(), 0, len, true).map_err(Unavailable::NoMemory)?;
    mapping.advise(libc::MADV_HUGEPAGE);
    if let Some(node) = node {
        mapping.prefer_node(node);
    }
    loop {
        match fallocate(&file, FallocateFlags::empty(), 0, len as u64) {
            Ok(()) => return Ok((file, mapping)),
            // A signal: what was filled is given back by the kernel, so it starts again.
            Err(rustix::io::Errno::INTR) => {}
            Err(e) => return Err(Unavailable::NoMemory(no_room(len, &e.into()))),
        }
    }
}

/// Filling memory beyond what is there ends with the out-of-memory killer, not with an error: so it is asked before.
fn check_room(len: usize) -> io::Result<()> {
    let Some(room) = room().filter(|room| *room < len as u64) else { return Ok(()) };
    let text = format!(
        "{len} bytes of memory are not there: {room} are available to this process (/proc/meminfo and memory.max of \
         its control group); ask for less, or raise the limit"
    );
    Err(io::Error::new(io::ErrorKind::OutOfMemory, text))
}

fn no_room(len: usize, source: &io::Error) -> io::Error {
    let text = format!(
        "{len} bytes of shared memory cannot be filled: {source}; ask for less, or raise the limit of shared memory or \
         of the control group (memory.max)"
    );
    io::Error::new(source.kind(), text)
}

/// Bytes this process may still take, as far as the system tells: of the machine and of each control group above us.
fn room() -> Option<u64> {
    let info = fs::read_to_string("/proc/meminfo").ok()?;
    let line = info.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    let machine = kib.saturating_mul(1024);
    let groups = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let Some(group) = groups.lines().find_map(|line| line.strip_prefix("0::/")) else { return Some(machine) };
    let root = std::path::Path::new("/sys/fs/cgroup");
    let number = |file| -> Option<u64> { fs::read_to_string(file).ok()?.trim().parse().ok() };
    let limits = root
        .join(group)
        .ancestors()
        .take_while(|at| at.starts_with(root))
        .map(|at| {
            let (Some(most), Some(now)) = (number(at.join("memory.max")), number(at.join("memory.current"))) else {
                return u64::MAX;
            };
            // Clean page cache counts as used and is given up first.
            let cache = fs::read_to_string(at.join("memory.stat")).unwrap_or_default();
            let cached =
                cache.lines().find_map(|l| l.strip_prefix("inactive_file ")?.trim().parse().ok()).unwrap_or(0u64);
            most.saturating_sub(now.saturating_sub(cached))
        })
        .min();
    Some(machine.min(limits.unwrap_or(u64::MAX)))
}
