//! Sets of seats: what a turn looks for costs what is found, not how many seats there are.

use crate::limits::QP_SLOTS;

const BITS: usize = u64::BITS as usize;

/// Some of a core's queue pairs or rails, by seat.
pub(crate) struct SeatSet {
    words: [u64; QP_SLOTS / BITS],
    /// Which words are not 0.
    used: u64,
}

const _: () = assert!(QP_SLOTS <= BITS * BITS && QP_SLOTS.is_multiple_of(BITS), "one word tells of all words");

impl SeatSet {
    pub(crate) const EMPTY: Self = Self { words: [0; QP_SLOTS / BITS], used: 0 };

    pub(crate) fn insert(&mut self, seat: usize) {
        self.words[seat / BITS] |= 1 << (seat % BITS);
        self.used |= 1 << (seat / BITS);
    }

    pub(crate) fn remove(&mut self, seat: usize) {
        let word = &mut self.words[seat / BITS];
        *word &= !(1 << (seat % BITS));
        if *word == 0 {
            self.used &= !(1 << (seat / BITS));
        }
    }

    pub(crate) fn contains(&self, seat: usize) -> bool {
        self.words[seat / BITS] & 1 << (seat % BITS) != 0
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.used == 0
    }

    /// The first of them from `seat` on. Between two calls the set may change.
    pub(crate) fn next(&self, seat: usize) -> Option<usize> {
        let (word, bit) = (seat / BITS, seat % BITS);
        let here = self.words.get(word)? & (u64::MAX << bit);
        if here != 0 {
            return Some(word * BITS + here.trailing_zeros() as usize);
        }
        let later = self.used & (u64::MAX << word << 1);
        let word = (later != 0).then_some(later.trailing_zeros() as usize)?;
        Some(word * BITS + self.words[word].trailing_zeros() as usize)
    }

    /// All of them, in order.
    pub(crate) fn iter(&self) -> impl Iterator<Item = usize> {
        let mut from = 0;
        std::iter::from_fn(move || {
            let seat = self.next(from)?;
            from = seat + 1;
            Some(seat)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    proptest! {
        #[test]
        fn it_is_a_set(steps in proptest::collection::vec((0..QP_SLOTS, any::<bool>()), 0..200)) {
            let (mut set, mut model) = (SeatSet::EMPTY, BTreeSet::new());
            for (seat, insert) in steps {
                // Some come twice and some are there when they are taken out.
                let seat = if insert { seat } else { model.range(seat..).next().copied().unwrap_or(seat) };
                if insert {
                    set.insert(seat);
                    model.insert(seat);
                } else {
                    set.remove(seat);
                    model.remove(&seat);
                }
                prop_assert_eq!(set.contains(seat), insert);
                prop_assert_eq!(set.is_empty(), model.is_empty());
                prop_assert!(set.iter().eq(model.iter().copied()));
                prop_assert_eq!(set.next(seat), model.range(seat..).next().copied());
            }
            prop_assert_eq!(set.next(QP_SLOTS), None);
        }
    }

    #[test]
    fn the_last_seat_is_found() {
        let mut set = SeatSet::EMPTY;
        set.insert(QP_SLOTS - 1);
        assert_eq!(set.iter().collect::<Vec<_>>(), [QP_SLOTS - 1]);
        assert_eq!(set.next(QP_SLOTS), None);
    }
}
