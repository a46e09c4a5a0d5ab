//! What is in flight: the requests of each queue pair in the order they were posted, all of them in one table of their core.
//!
//! A completion at request k, good or bad, says that everything before k is done (ibv_poll_cq(3), IBA 10.8.6). So a
//! queue pair's list is emptied from its front, and the sequence number in `wr_id` is all that is needed to find k.
//!
//! The completion queues bound how many requests there can be at once, however many queue pairs there are: so the places are the
//! core's, and a queue pair that is idle has none.

use super::table::NONE;
use crate::units::Nanos;

/// Seat of a request that belongs to no Work: the trial of a fresh queue pair.
pub(crate) const TRIAL: u32 = u32::MAX;

/// One posted request.
#[derive(Clone, Copy, Debug)]
pub(crate) struct InFlight {
    /// Seat of the Work on this core, or [`TRIAL`].
    pub(crate) seat: u32,
    /// Slice of that Work.
    pub(crate) slice: u32,
    /// Bytes.
    pub(crate) len: u32,
    /// Whether the rail was nearly empty when it was posted: only then its round trip is the path's.
    pub(crate) alone: bool,
    /// When it was posted.
    pub(crate) posted: Nanos,
}

/// A request in its place.
struct Place {
    entry: InFlight,
    /// The one posted after it, or the next free place.
    next: u32,
}

/// Requests posted and not yet known to have ended, of all queue pairs of a core.
pub(crate) struct InFlightTable {
    places: Vec<Place>,
    /// The place that was left last: what it takes from the cache is there still.
    free: u32,
}

impl InFlightTable {
    /// Room for `most` requests at once. They are not touched before they are used.
    pub(crate) fn new(most: usize) -> Self {
        Self { places: Vec::with_capacity(most), free: NONE }
    }

    fn put(&mut self, entry: InFlight) -> u32 {
        let place = Place { entry, next: NONE };
        let at = self.free;
        if at == NONE {
            debug_assert!(
                self.places.len() < self.places.capacity(),
                "completion queues are counted against the table"
            );
            self.places.push(place);
            return self.places.len() as u32 - 1;
        }
        let old = &mut self.places[at as usize];
        self.free = old.next;
        *old = place;
        at
    }

    /// Empties a place; returns what was in it and what came after.
    fn take(&mut self, at: u32) -> (InFlight, u32) {
        let place = &mut self.places[at as usize];
        let next = std::mem::replace(&mut place.next, self.free);
        self.free = at;
        (place.entry, next)
    }
}

/// Those of one queue pair, in post order.
pub(crate) struct InFlightList {
    front: u32,
    back: u32,
    len: u32,
    /// Sequence number of the oldest request, or of the next one.
    first: u32,
}

impl InFlightList {
    /// Nothing, and sequence numbers from 0.
    pub(crate) const EMPTY: Self = Self { front: NONE, back: NONE, len: 0, first: 0 };

    pub(crate) fn len(&self) -> u32 {
        self.len
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Sequence number of the oldest request, or of the next one: it moves with every request that ends.
    pub(crate) fn first_sequence(&self) -> u32 {
        self.first
    }

    /// Sequence number the next posted request gets.
    pub(crate) fn next_sequence(&self) -> u32 {
        self.first.wrapping_add(self.len)
    }

    /// The oldest request, left where it is.
    pub(crate) fn oldest(&self, table: &InFlightTable) -> Option<InFlight> {
        self.iter(table).next().copied()
    }

    /// All of them, in post order.
    pub(crate) fn iter<'a>(&self, table: &'a InFlightTable) -> impl Iterator<Item = &'a InFlight> {
        let mut at = self.front;
        std::iter::from_fn(move || {
            // No place has the number of nobody.
            let place = table.places.get(at as usize)?;
            at = place.next;
            Some(&place.entry)
        })
    }

    /// Appends what was posted.
    pub(crate) fn extend(&mut self, table: &mut InFlightTable, entries: &[InFlight]) {
        for entry in entries {
            let at = table.put(*entry);
            match table.places.get_mut(self.back as usize) {
                Some(back) => back.next = at,
                None => self.front = at,
            }
            self.back = at;
            self.len += 1;
        }
    }

    /// Takes the oldest request out, if there is one.
    pub(crate) fn pop(&mut self, table: &mut InFlightTable) -> Option<InFlight> {
        if self.len == 0 {
            return None;
        }
        let (entry, next) = table.take(self.front);
        self.front = next;
        if next == NONE {
            self.back = NONE;
        }
        self.len -= 1;
        self.first = self.first.wrapping_add(1);
        Some(entry)
    }

    /// How many requests stand before `sequence`; `None` if it is not in flight (late, doubled or not ours).
    pub(crate) fn before(&self, sequence: u32) -> Option<u32> {
        let distance = sequence.wrapping_sub(self.first);
        (distance < self.len).then_some(distance)
    }
}

#[cfg(test)]
impl InFlightTable {
    /// Places that are in use or have been, and those of them that are free.
    pub(crate) fn places(&self) -> (usize, usize) {
        let free =
            std::iter::successors(self.places.get(self.free as usize), |place| self.places.get(place.next as usize));
        (self.places.len(), free.count())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::VecDeque;

    fn entry(slice: u32) -> InFlight {
        InFlight { seat: 0, slice, len: 1, alone: false, posted: Nanos::ZERO }
    }

    #[test]
    fn a_list_keeps_post_order_across_the_wrap_of_sequences() {
        let mut table = InFlightTable::new(4);
        let mut list = InFlightList { first: u32::MAX - 1, ..InFlightList::EMPTY };
        for slice in 0..4 {
            list.extend(&mut table, &[entry(slice)]);
        }
        assert_eq!(list.before(u32::MAX - 1), Some(0));
        assert_eq!(list.before(1), Some(3), "sequence 1 lies behind the wrap");
        assert_eq!(list.before(2), None, "not posted yet");
        assert_eq!((0..4).map(|_| list.pop(&mut table).unwrap().slice).collect::<Vec<_>>(), [0, 1, 2, 3]);
        assert_eq!(list.before(u32::MAX), None, "a completion that came twice finds nothing");
        assert!(list.pop(&mut table).is_none());
    }

    proptest! {
        #[test]
        fn lists_in_one_table_are_queues_of_their_own(steps in proptest::collection::vec((0usize..3, any::<bool>()), 0..300)) {
            const MOST: usize = 8;
            let mut table = InFlightTable::new(MOST);
            let mut lists = [InFlightList::EMPTY; 3];
            let mut model: [VecDeque<u32>; 3] = Default::default();
            for (number, (which, push)) in steps.into_iter().enumerate() {
                let in_flight: usize = model.iter().map(VecDeque::len).sum();
                if push && in_flight < MOST {
                    lists[which].extend(&mut table, &[entry(number as u32)]);
                    model[which].push_back(number as u32);
                } else {
                    let popped = lists[which].pop(&mut table).map(|entry| entry.slice);
                    prop_assert_eq!(popped, model[which].pop_front());
                }
                for (list, model) in lists.iter().zip(&model) {
                    prop_assert!(list.iter(&table).map(|entry| entry.slice).eq(model.iter().copied()));
                    prop_assert_eq!(list.oldest(&table).map(|entry| entry.slice), model.front().copied());
                    prop_assert_eq!(list.len() as usize, model.len());
                }
                prop_assert!(table.places.len() <= MOST, "places are used again");
            }
        }
    }
}
