//! What peers may reach, as every core sees it without a lock, and how a range stops being reachable.
//!
//! ```text
//!   register ──▶ list (locked, control) ──▶ snapshot, version + 1
//!                                              │ taken by a core at the start of a poll, if the version moved
//!   drop ──▶ snapshot without it, version + 1  ▼
//!     └ waits until every core was once outside of a poll, or has taken the new snapshot
//! ```
//! A core touches peers' ranges only inside a poll, and only after a look-up in the snapshot it took at its start. So when the
//! wait is over nobody reads or writes the range any more, and a connection in the middle of it finds out at its
//! next piece. A core asleep is outside of a poll and need not be woken.

use std::sync::atomic::{AtomicU64, Ordering, fence};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use crossbeam_utils::CachePadded;

use super::iov::Span;
use super::session::Ground;
use crate::region::Memory;

/// A poll that takes longer than this is stuck: the memory is then kept for ever rather than given back in use.
const STUCK: Duration = Duration::from_secs(10);

/// One stretch of registered memory.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Stretch {
    start: u64,
    end: u64,
    /// The highest `end` of this and all before: how far back a look-up has to go.
    reach: u64,
}

/// What was reachable at one moment, by address.
#[derive(Default, Debug)]
pub(super) struct Ranges(Box<[Stretch]>);

impl Ranges {
    /// From (memory, start, end): touching ranges of one memory are one stretch, those of different ones are not.
    fn new(mut parts: Vec<(usize, u64, u64)>) -> Self {
        parts.sort_unstable();
        let mut stretches: Vec<(usize, Stretch)> = Vec::with_capacity(parts.len());
        for (memory, start, end) in parts {
            match stretches.last_mut() {
                Some((of, last)) if *of == memory && last.end >= start => last.end = last.end.max(end),
                _ => stretches.push((memory, Stretch { start, end, reach: 0 })),
            }
        }
        let mut sorted: Vec<Stretch> = stretches.into_iter().map(|(_, stretch)| stretch).collect();
        sorted.sort_unstable_by_key(|s| (s.start, s.end));
        let mut reach = 0;
        for stretch in &mut sorted {
            reach = reach.max(stretch.end);
            stretch.reach = reach;
        }
        Self(sorted.into_boxed_slice())
    }

    /// Whether all of it lies in one stretch. Never for no bytes, or for a range that wraps.
    pub(super) fn holds(&self, addr: u64, len: u64) -> bool {
        let Some(end) = addr.checked_add(len).filter(|_| len > 0) else { return false };
        let behind = self.0.partition_point(|s| s.start <= addr);
        self.0[..behind].iter().rev().take_while(|s| s.reach >= end).any(|s| s.end >= end)
    }
}

impl Ground for Ranges {
    fn holds(&self, addr: u64, len: u64) -> bool {
        Self::holds(self, addr, len)
    }

    fn put(&mut self, addr: u64, bytes: &[u8]) -> bool {
        let span = Span::registered(self, addr, bytes.len() as u64);
        span.inspect(|span| span.put(bytes)).is_some()
    }
}

impl Ground for Arc<Ranges> {
    fn holds(&self, addr: u64, len: u64) -> bool {
        Ranges::holds(self, addr, len)
    }

    fn put(&mut self, addr: u64, bytes: &[u8]) -> bool {
        let span = Span::registered(self, addr, bytes.len() as u64);
        span.inspect(|span| span.put(bytes)).is_some()
    }
}

/// What a core says of its polls.
#[derive(Default)]
pub(super) struct Reader {
    /// 0 outside of a poll; inside, 1 + the version it works with. Written by its core, read by who deregisters.
    at: CachePadded<AtomicU64>,
}

#[derive(Default)]
struct List {
    next: u64,
    /// (number, memory, start, end).
    entries: Vec<(u64, Arc<Memory>, u64, u64)>,
    snapshot: Arc<Ranges>,
    readers: Vec<Weak<Reader>>,
}

/// What is registered on one NIC.
#[derive(Default)]
pub(super) struct Registry {
    list: Mutex<List>,
    version: CachePadded<AtomicU64>,
}

impl Registry {
    fn lock(&self) -> MutexGuard<'_, List> {
        self.list.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes a range reachable until the guard is dropped.
    pub(super) fn add(self: &Arc<Self>, memory: &Arc<Memory>, offset: u64, len: u64) -> Reachable {
        let mut list = self.lock();
        let number = list.next;
        list.next += 1;
        let start = memory.addr() + offset;
        list.entries.push((number, memory.clone(), start, start + len));
        self.publish(&mut list);
        Reachable { registry: self.clone(), number }
    }

    fn publish(&self, list: &mut List) -> u64 {
        let parts = list.entries.iter().map(|(_, memory, start, end)| (Arc::as_ptr(memory) as usize, *start, *end));
        list.snapshot = Arc::new(Ranges::new(parts.collect()));
        self.version.fetch_add(1, Ordering::SeqCst) + 1
    }

    /// A new core.
    pub(super) fn reader(self: &Arc<Self>) -> View {
        let reader = Arc::new(Reader::default());
        let mut list = self.lock();
        list.readers.retain(|r| r.strong_count() > 0);
        list.readers.push(Arc::downgrade(&reader));
        View { registry: self.clone(), reader, version: u64::MAX, ranges: Arc::default() }
    }

    /// Whether `reader` can not use what was reachable before `version` any more.
    fn has_passed(reader: &Weak<Reader>, version: u64) -> bool {
        let Some(reader) = reader.upgrade() else { return true };
        let at = reader.at.load(Ordering::Acquire);
        at == 0 || at > version
    }

    /// Takes a range out, and waits until no core can touch it; false if one is stuck in a poll.
    fn remove(&self, number: u64) -> (Option<Arc<Memory>>, bool) {
        let (memory, version, readers) = {
            let mut list = self.lock();
            let Some(at) = list.entries.iter().position(|e| e.0 == number) else { return (None, true) };
            let (_, memory, ..) = list.entries.swap_remove(at);
            let version = self.publish(&mut list);
            (memory, version, list.readers.clone())
        };
        // Pairs with the fence in `View::enter`: either it sees the new version, or we see that it is inside.
        fence(Ordering::SeqCst);
        let until = Instant::now() + STUCK;
        for reader in &readers {
            while !Self::has_passed(reader, version) {
                if Instant::now() > until {
                    return (Some(memory), false);
                }
                std::thread::sleep(Duration::from_micros(20));
            }
        }
        (Some(memory), true)
    }
}

/// A reachable range. Dropping it returns when no core touches the range for a peer any more.
pub(super) struct Reachable {
    registry: Arc<Registry>,
    number: u64,
}

impl Drop for Reachable {
    fn drop(&mut self) {
        let (memory, passed) = self.registry.remove(self.number);
        if !passed {
            // A core hangs in a poll, perhaps in the middle of this memory: it must stay mapped.
            std::mem::forget(memory);
        }
    }
}

/// A core's view of what is reachable.
pub(super) struct View {
    registry: Arc<Registry>,
    reader: Arc<Reader>,
    version: u64,
    pub(super) ranges: Arc<Ranges>,
}

impl View {
    /// A poll starts: from here on ranges may be touched. Costs a fence, and a lock only if something was registered or
    /// deregistered since the last one.
    pub(super) fn enter(&mut self) {
        // A value that passes for no version but the present one.
        self.reader.at.store(self.version.wrapping_add(1).max(1), Ordering::Relaxed);
        fence(Ordering::SeqCst);
        let version = self.registry.version.load(Ordering::Acquire);
        if version != self.version {
            let list = self.registry.lock();
            self.ranges = list.snapshot.clone();
            // Read under the lock, so that it is the snapshot's.
            self.version = self.registry.version.load(Ordering::Acquire);
            drop(list);
            self.reader.at.store(self.version + 1, Ordering::Release);
        }
    }

    /// The poll ends: no range is touched until the next.
    pub(super) fn leave(&mut self) {
        self.reader.at.store(0, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_of_one_memory_are_one_range_and_neighbours_are_not() {
        let ranges = Ranges::new(vec![(1, 300, 400), (1, 100, 200), (1, 200, 300), (2, 400, 500), (3, 600, 700)]);
        assert!(ranges.holds(100, 300) && ranges.holds(399, 1) && ranges.holds(400, 100));
        assert!(!ranges.holds(399, 2), "two memories side by side are two");
        assert!(!ranges.holds(99, 1) && !ranges.holds(500, 1) && !ranges.holds(550, 10) && !ranges.holds(699, 2));
        assert!(!ranges.holds(100, 0) && !ranges.holds(u64::MAX, 1) && !ranges.holds(650, u64::MAX));
        assert!(!Ranges::default().holds(1, 1));
    }

    #[test]
    fn a_range_inside_another_does_not_hide_it() {
        let ranges = Ranges::new(vec![(1, 0x1000, 0x9000), (2, 0x2000, 0x3000), (3, 0x2800, 0x2900)]);
        assert!(ranges.holds(0x2880, 0x4000) && ranges.holds(0x8fff, 1) && !ranges.holds(0x8fff, 2));
    }

    #[test]
    fn removing_waits_for_a_poll_that_may_use_the_range_and_for_no_other() {
        let registry = Arc::new(Registry::default());
        let memory = Memory::allocate(4096).unwrap();
        let reachable = registry.add(&memory, 0, 4096);
        let mut view = registry.reader();
        view.enter();
        assert!(view.ranges.holds(memory.addr(), 4096));
        let gone = Arc::new(AtomicU64::new(0));
        let thread = std::thread::spawn({
            let gone = gone.clone();
            move || {
                drop(reachable);
                gone.store(1, Ordering::SeqCst);
            }
        });
        std::thread::sleep(Duration::from_millis(50));
        assert_eq!(gone.load(Ordering::SeqCst), 0, "the core is in the middle of a poll");
        view.leave();
        thread.join().unwrap();
        view.enter();
        assert!(!view.ranges.holds(memory.addr(), 1));
        // Inside a poll that started later: it can not use what went before it.
        let again = registry.add(&memory, 0, 4096);
        view.leave();
        drop(again);
    }
}
