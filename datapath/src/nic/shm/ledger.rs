//! The ledger: how an owner takes its memory back from peers that copy without asking.
//!
//! ```text
//!   copier (any process)                              owner
//!   1. lane := odd                                    1. region's word := 0
//!   2. fence                                          2. fence
//!   3. word = the generation I know?  no: leave       3. each odd lane: wait until its number is another, or its
//!   4. copy                                              process is dead
//!   5. lane := even                                   4. nobody copies there any more: the memory may go
//! ```
//! Either the copier sees the word cleared, or the owner sees the lane odd ([`crate::lanes`]).
//!
//! The words are one file per NIC which peers can only read. The lanes are one small file per attached peer: a thread has the
//! same lane there as in its own process, where it says when a view that was replaced is read by nobody any more.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use rustix::fs::{SealFlags, fcntl_add_seals, fcntl_get_seals, fstat};

use crate::lanes::{LANES, LaneArray};
use crate::region::backing::{Mapping, SIZE_SEALS, sealed_memfd};

/// Regions one NIC may have registered at once.
pub const SLOTS: usize = 131_072;

const MAGIC: u64 = 0x6d72_2d73_686d_0001;
const HEAD: usize = 4096;
const LEDGER_BYTES: usize = HEAD + 4 * SLOTS;
/// Two cache lines each: processors fetch lines in pairs.
const LANE_STRIDE: usize = 128;
const LANES_BYTES: usize = LANES * LANE_STRIDE;

/// The words: the generation of the region in each slot, 0 for none.
pub(super) struct Ledger {
    map: Mapping,
}

impl Ledger {
    /// A NIC's own, and the file to hand out.
    pub(super) fn create(token: u64) -> io::Result<(Self, OwnedFd)> {
        let file = sealed_memfd("moonrail-ledger", LEDGER_BYTES)?;
        let ledger = Self { map: Mapping::shared(file.as_fd(), 0, LEDGER_BYTES, true)? };
        ledger.head(0).store(MAGIC, Ordering::Relaxed);
        ledger.head(1).store(token, Ordering::Release);
        // Our mapping stays writable, no other becomes so. A kernel before 5.1 does not know this seal.
        let _ = fcntl_add_seals(&file, SealFlags::FUTURE_WRITE);
        fcntl_add_seals(&file, SealFlags::SEAL)?;
        Ok((ledger, file))
    }

    /// A peer's. An error says what is wrong with it.
    pub(super) fn attach(file: BorrowedFd<'_>, token: u64) -> Result<Self, String> {
        let ledger = Self { map: map_sealed(file, LEDGER_BYTES, false)? };
        if ledger.head(0).load(Ordering::Relaxed) != MAGIC || ledger.head(1).load(Ordering::Acquire) != token {
            return Err("its ledger holds another token".into());
        }
        Ok(ledger)
    }

    /// Times a slot has changed. Who has been told of all of them knows every region there is.
    pub(super) fn changes(&self) -> &AtomicU64 {
        self.head(2)
    }

    fn head(&self, index: usize) -> &AtomicU64 {
        debug_assert!(index < HEAD / 8);
        // SAFETY: inside the mapping, aligned (it starts at a page), and only ever accessed as atomics.
        unsafe { &*self.map.base().as_ptr().add(8 * index).cast::<AtomicU64>() }
    }

    /// The word of a slot.
    ///
    /// # Panics
    /// For a slot beyond [`SLOTS`]: numbers from peers are checked where they arrive.
    pub(super) fn word(&self, slot: u32) -> &AtomicU32 {
        assert!((slot as usize) < SLOTS);
        // SAFETY: inside the mapping by the line above, aligned, and only ever accessed as an atomic.
        unsafe { &*self.map.base().as_ptr().add(HEAD + 4 * slot as usize).cast::<AtomicU32>() }
    }
}

/// Maps a peer's file after checking that it cannot shrink under us.
pub(super) fn map_sealed(file: BorrowedFd<'_>, len: usize, writable: bool) -> Result<Mapping, String> {
    check_sealed(file, len as u64)?;
    Mapping::shared(file, 0, len, writable).map_err(|e| format!("mmap: {e}"))
}

/// Whether a peer's file has its `len` bytes for ever.
pub(super) fn check_sealed(file: BorrowedFd<'_>, len: u64) -> Result<(), String> {
    let seals = fcntl_get_seals(file).map_err(|e| format!("what it sent is no memfd: {e}"))?;
    if !seals.contains(SIZE_SEALS) {
        return Err("its memfd is not sealed against shrinking and growing".into());
    }
    let stat = fstat(file).map_err(|e| format!("fstat: {e}"))?;
    if u64::try_from(stat.st_size).unwrap_or(0) < len {
        return Err(format!("its memfd has {} bytes where {len} are needed", stat.st_size));
    }
    Ok(())
}

/// Lanes that a peer and we have mapped.
pub(super) struct SharedLanes(Mapping);

impl SharedLanes {
    pub(super) fn create() -> io::Result<(Self, OwnedFd)> {
        let file = sealed_memfd("moonrail-lanes", LANES_BYTES)?;
        fcntl_add_seals(&file, SealFlags::SEAL)?;
        Ok((Self(Mapping::shared(file.as_fd(), 0, LANES_BYTES, true)?), file))
    }

    pub(super) fn attach(file: BorrowedFd<'_>) -> Result<Self, String> {
        map_sealed(file, LANES_BYTES, true).map(Self)
    }
}

impl LaneArray for SharedLanes {
    fn lane(&self, index: usize) -> &AtomicU64 {
        assert!(index < LANES);
        // SAFETY: inside the mapping by the line above, aligned, and only ever accessed as an atomic.
        unsafe { &*self.0.base().as_ptr().add(index * LANE_STRIDE).cast::<AtomicU64>() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn a_ledger_is_known_by_its_token_and_read_only_for_others() {
        let (ledger, file) = Ledger::create(7).unwrap();
        ledger.word(5).store(9, Ordering::Relaxed);
        let other = Ledger::attach(file.as_fd(), 7).unwrap();
        assert_eq!(other.word(5).load(Ordering::Relaxed), 9);
        assert!(Ledger::attach(file.as_fd(), 8).is_err());
        assert!(Mapping::shared(file.as_fd(), 0, LEDGER_BYTES, true).is_err(), "FUTURE_WRITE");
    }

    #[test]
    fn files_that_may_shrink_are_refused() {
        let open = rustix::fs::memfd_create("x", rustix::fs::MemfdFlags::ALLOW_SEALING).unwrap();
        rustix::fs::ftruncate(&open, 1 << 20).unwrap();
        assert!(Ledger::attach(open.as_fd(), 1).is_err_and(|why| why.contains("not sealed")));
        let short = sealed_memfd("x", 4096).unwrap();
        assert!(SharedLanes::attach(short.as_fd()).is_err_and(|why| why.contains("16384")));
        let null = std::fs::File::open("/dev/null").unwrap();
        assert!(check_sealed(null.as_fd(), 1).is_err());
    }

    /// Every interleaving of an owner that takes memory back and a copier that copies twice: no step of a copy comes
    /// after the owner has let the memory go. Without step 3 of either the search finds one.
    #[test]
    fn no_interleaving_copies_into_memory_that_is_gone() {
        #[derive(Clone, Copy, PartialEq, Eq, Hash)]
        struct State {
            lane: u8,
            word: bool,
            copier: u8,
            owner: u8,
            seen: u8,
            rounds: u8,
        }
        /// Steps of both; `checks` and `waits` are what the protocol rests on. Returns whether a late copy exists.
        fn search(checks: bool, waits: bool) -> bool {
            let start = State { lane: 0, word: true, copier: 0, owner: 0, seen: 0, rounds: 0 };
            let (mut todo, mut met) = (vec![start], HashSet::new());
            while let Some(s) = todo.pop() {
                if !met.insert(s) {
                    continue;
                }
                if s.copier == 2 && s.owner == 3 {
                    return true;
                }
                // The copier: 0 lane odd, 1 look at the word, 2 copying, 3 lane even.
                let next = match s.copier {
                    0 if s.rounds < 2 => Some(State { lane: s.lane + 1, copier: 1, ..s }),
                    1 => Some(State { copier: if s.word || !checks { 2 } else { 3 }, ..s }),
                    2 => Some(State { copier: 3, ..s }),
                    3 => Some(State { lane: s.lane + 1, copier: 0, rounds: s.rounds + 1, ..s }),
                    _ => None,
                };
                todo.extend(next);
                // The owner: 0 clear the word, 1 look at the lane, 2 wait, 3 the memory is gone.
                let next = match s.owner {
                    0 => Some(State { word: false, owner: 1, ..s }),
                    1 => Some(State { seen: s.lane, owner: 2, ..s }),
                    2 if !waits || s.seen & 1 == 0 || s.lane != s.seen => Some(State { owner: 3, ..s }),
                    _ => None,
                };
                todo.extend(next);
            }
            false
        }
        assert!(!search(true, true));
        assert!(search(false, true) && search(true, false), "the search finds what it looks for");
    }
}
