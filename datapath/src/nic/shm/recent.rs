//! What this thread wrote lately, so that it knows what may still be in its cache.
//!
//! Ordinary stores are the faster ones for a target that is in the cache, and streaming stores for one that is not: which it is
//! follows from the size of the copy only where nothing is copied twice. So each thread remembers the targets of its last
//! copies, in a small table where a new one takes the place of an old one, beside how much it had copied by then.

use std::cell::Cell;

/// What a target is known by.
const GRAIN_BITS: u32 = 12;
/// Targets remembered; at most as much as the cache may hold, if they are of one grain.
const PLACES_BITS: u32 = 10;
/// A target that was written so many grains ago is taken to have left the cache.
const STAYS: u32 = (8 << 20) >> GRAIN_BITS;

struct Recent {
    /// Grains copied.
    clock: Cell<u32>,
    /// Upper half: the target; lower half: the clock when it was written.
    places: [Cell<u64>; 1 << PLACES_BITS],
}

thread_local! {
    static RECENT: Recent = const { Recent::new() };
}

/// Remembers that `len` bytes are written to `target` now; returns whether it was written a short while ago.
pub(super) fn note(target: *const u8, len: usize) -> bool {
    RECENT.with(|recent| recent.note(target as usize as u64, len))
}

impl Recent {
    const fn new() -> Self {
        Self { clock: Cell::new(0), places: [const { Cell::new(0) }; 1 << PLACES_BITS] }
    }

    fn note(&self, target: u64, len: usize) -> bool {
        let now = self.clock.get();
        self.clock.set(now.wrapping_add((len >> GRAIN_BITS).max(1) as u32));
        // Fibonacci hashing: neighbours come to lie apart.
        let mixed = ((target >> GRAIN_BITS) + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let place = &self.places[(mixed >> (64 - PLACES_BITS)) as usize];
        let tag = mixed & 0xffff_ffff;
        let was = place.replace(tag << 32 | u64::from(now));
        was >> 32 == tag && now.wrapping_sub(was as u32) <= STAYS
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_target_is_remembered_until_the_cache_has_been_filled_anew() {
        let recent = Recent::new();
        let round = |blocks: u64, len: usize| {
            let block = |i| recent.note(0x7000_0000 + i * len as u64, len);
            (0..blocks).filter(|i| block(*i)).count()
        };
        assert_eq!(round(32, 65_536), 0, "the first time");
        assert_eq!(round(32, 65_536), 32, "2 MiB again and again");
        assert_eq!(round(512, 65_536), 32, "32 MiB, of which 2 are known");
        assert_eq!(round(512, 65_536), 0, "too much to stay");
    }

    #[test]
    fn few_of_many_small_targets_are_forgotten() {
        let recent = Recent::new();
        let round = || (0..256u64).filter(|i| recent.note(0x7f00_0000_0000 + i * 8192, 4096)).count();
        round();
        assert!(round() > 192, "targets that fall on one place displace each other, and most do not");
    }
}
