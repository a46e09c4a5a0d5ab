//! What a peer has registered, as a copier sees it: sorted, immutable, replaced as a whole.

use std::collections::HashMap;
use std::sync::Arc;

use crate::region::backing::Mapping;

/// How a region is reached.
#[derive(Clone)]
pub(super) enum Reach {
    /// Mapped here, `shift` bytes behind the mapping's start.
    Mapped { map: Arc<Mapping>, shift: usize },
    /// In this very process, at its own address.
    Here,
    /// By system calls into the peer.
    Foreign,
    /// It could not be mapped: the errno.
    Refused(i32),
}

/// A region of the peer.
#[derive(Clone)]
pub(super) struct Entry {
    pub(super) slot: u32,
    pub(super) generation: u32,
    /// The peer's address of it, and the end.
    pub(super) addr: u64,
    pub(super) end: u64,
    pub(super) reach: Reach,
    base: Base,
}

/// Where a region begins in this process; null where it is not.
#[derive(Clone, Copy)]
struct Base(*mut u8);

// SAFETY: an address, which no thread may follow but who sees to it that the mapping stays: `Entry::here` only counts from it.
unsafe impl Send for Base {}
// SAFETY: as above; it never changes.
unsafe impl Sync for Base {}

impl Entry {
    pub(super) fn new(slot: u32, generation: u32, addr: u64, len: u64, reach: Reach) -> Self {
        let base = Base(match &reach {
            Reach::Mapped { map, shift } => map.base().as_ptr().wrapping_add(*shift),
            Reach::Here => addr as *mut u8,
            Reach::Foreign | Reach::Refused(_) => std::ptr::null_mut(),
        });
        Self { slot, generation, addr, end: addr + len, reach, base }
    }

    #[inline]
    fn holds(&self, addr: u64, end: u64) -> bool {
        self.addr <= addr && end <= self.end
    }

    /// Where `addr` is in this process; `None` where it is not.
    #[inline]
    pub(super) fn here(&self, addr: u64) -> Option<*mut u8> {
        (!self.base.0.is_null()).then(|| self.base.0.wrapping_add((addr - self.addr) as usize))
    }
}

/// Every region, by address.
#[derive(Default)]
pub(super) struct View {
    entries: Box<[Entry]>,
    /// Largest end of each entry and those before it: where looking back may stop, as regions may overlap.
    ends: Box<[u64]>,
    pub(super) has_foreign: bool,
    /// Changes of the ledger that it knows of.
    pub(super) told: u64,
}

impl View {
    pub(super) fn of(regions: &HashMap<u32, Entry>, told: u64) -> Self {
        let mut entries: Vec<Entry> = regions.values().cloned().collect();
        entries.sort_unstable_by_key(|e| (e.addr, e.end));
        let mut most = 0;
        let ends = entries.iter().map(|e| {
            most = e.end.max(most);
            most
        });
        Self {
            ends: ends.collect(),
            has_foreign: entries.iter().any(|e| matches!(e.reach, Reach::Foreign)),
            entries: entries.into_boxed_slice(),
            told,
        }
    }

    /// The region that holds a range; `hint` is where the last one was found.
    #[inline]
    pub(super) fn find(&self, addr: u64, len: u32, hint: &mut usize) -> Option<&Entry> {
        let end = addr.checked_add(u64::from(len))?;
        match self.entries.get(*hint) {
            Some(entry) if entry.holds(addr, end) => Some(entry),
            _ => self.search(addr, end, hint),
        }
    }

    fn search(&self, addr: u64, end: u64, hint: &mut usize) -> Option<&Entry> {
        let mut at = self.entries.partition_point(|e| e.addr <= addr);
        while at > 0 && self.ends[at - 1] >= end {
            at -= 1;
            if self.entries[at].holds(addr, end) {
                *hint = at;
                return Some(&self.entries[at]);
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_found_in_regions_that_overlap_too() {
        let entry = |slot, addr, end| (slot, Entry::new(slot, 1, addr, end - addr, Reach::Foreign));
        let view =
            View::of(&[entry(0, 100, 1000), entry(1, 200, 300), entry(2, 400, 500), entry(3, 2000, 3000)].into(), 0);
        let find = |addr, len| view.find(addr, len, &mut 0).map(|e| e.slot);
        assert_eq!(find(100, 900), Some(0));
        assert_eq!(find(450, 200), Some(0), "behind a smaller one");
        assert_eq!(find(2000, 1000), Some(3));
        for (addr, len) in [(99, 2), (100, 901), (1000, 1), (1999, 2), (2999, 2), (u64::MAX, 2)] {
            assert_eq!(find(addr, len), None, "{len} at {addr}");
        }
        assert!(View::default().find(1, 1, &mut 7).is_none());
    }
}
