//! Which process this is. A child of fork() has its parent's memory and none of its threads; the devices, sockets and
//! mappings it seems to have are its parent's.
//!
//! A page that the kernel empties in every child (MADV_WIPEONFORK, Linux 4.14; madvise(2)) holds this process's number.
//! To ask is one load and one comparison, with no system call, and it holds for a child that was made without the C library too,
//! where pthread_atfork(3) does not. On a kernel without it each question costs a getpid(2).

use std::ptr::{self, NonNull};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

/// What a forked child is told by whatever belongs to its parent.
pub const FORKED: &str = "this process is a forked child of the one that made the engine: threads, NICs, connections and registered \
                          memory stayed with the parent; make an engine here, or leave transfers to the parent";

/// The process in which something was made.
#[derive(Clone, Copy, Debug)]
pub struct Process {
    /// The page's first word; [`NO_PAGE`]: this kernel cannot empty it.
    word: &'static AtomicU64,
    /// Which stands there; without a page the process's own number.
    number: u64,
}

/// Stays 0, which no process has.
static NO_PAGE: AtomicU64 = AtomicU64::new(0);

impl Process {
    /// This process. Any thread.
    pub fn current() -> Self {
        /// Numbers given so far, here and by the processes we were forked from: it is copied, not emptied.
        static LAST: AtomicU64 = AtomicU64::new(0);
        let Some(word) = page() else { return Self { word: &NO_PAGE, number: u64::from(std::process::id()) } };
        let mut number = word.load(Ordering::Relaxed);
        if number == 0 {
            let fresh = LAST.fetch_add(1, Ordering::Relaxed) + 1;
            number = word.compare_exchange(0, fresh, Ordering::Relaxed, Ordering::Relaxed).err().unwrap_or(fresh);
        }
        Self { word, number }
    }

    /// Whether that is the process that asks, and not one it was forked from. Any thread, any time; one load.
    #[inline]
    pub fn is_current(self) -> bool {
        self.word.load(Ordering::Relaxed) == self.number || self.is_current_by_number()
    }

    #[cold]
    fn is_current_by_number(self) -> bool {
        ptr::eq(self.word, &raw const NO_PAGE) && u64::from(std::process::id()) == self.number
    }
}

/// The word that is 0 in a new child, mapped once and for good.
fn page() -> Option<&'static AtomicU64> {
    static PAGE: OnceLock<Option<&'static AtomicU64>> = OnceLock::new();
    *PAGE.get_or_init(|| {
        const LEN: usize = 4096;
        let (protection, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        // SAFETY: a mapping at an address of the kernel's choice touches no existing memory.
        let base = unsafe { libc::mmap(ptr::null_mut(), LEN, protection, flags, -1, 0) };
        let base = NonNull::new(base).filter(|base| base.as_ptr() != libc::MAP_FAILED)?;
        // SAFETY: the range was mapped just now; the advice changes no byte in this process.
        if unsafe { libc::madvise(base.as_ptr(), LEN, libc::MADV_WIPEONFORK) } != 0 {
            return None;
        }
        // SAFETY: page-aligned, zeroed, never unmapped, and reached through this reference alone. The kernel changes it in a
        // child only, before any code runs there.
        Some(unsafe { base.cast::<AtomicU64>().as_ref() })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_child_is_another_process_and_its_parent_stays_what_it_was() {
        let here = Process::current();
        assert!(here.is_current() && Process::current().number == here.number);
        // SAFETY: the child makes only calls that are safe after fork, and ends at once.
        match unsafe { libc::fork() } {
            0 => {
                let own = Process::current();
                let code = i32::from(here.is_current()) | i32::from(!own.is_current()) << 1;
                // SAFETY: ends this process without running anything of the parent's.
                unsafe { libc::_exit(code) }
            }
            child => {
                let mut status = 0;
                // SAFETY: our own child, and a place for its status.
                assert_eq!(unsafe { libc::waitpid(child, &raw mut status, 0) }, child);
                assert_eq!(status, 0, "bit 0 of the code: taken for the parent; bit 1: not for itself");
            }
        }
        assert!(here.is_current());
    }
}
