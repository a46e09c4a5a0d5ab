//! The in-flight ring of one queue pair: its requests in the order they were posted.
//!
//! A completion at request k, good or bad, says that everything before k is done (ibv_poll_cq(3), IBA 10.8.6). So the
//! ring is emptied from its head, and the sequence number in `wr_id` is all that is needed to find k.

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

/// Requests posted and not yet known to have ended. Allocated by control with the queue pair, and freed by it.
pub struct InFlightRing {
    entries: Box<[InFlight]>,
    head: u32,
    tail: u32,
}

impl InFlightRing {
    /// A ring for a send queue of `depth` requests, at least 1.
    pub fn new(depth: u32) -> Self {
        let empty = InFlight { seat: TRIAL, slice: 0, len: 0, alone: false, posted: Nanos::ZERO };
        Self { entries: vec![empty; depth.max(1).next_power_of_two() as usize].into_boxed_slice(), head: 0, tail: 0 }
    }

    /// A ring of nothing, to leave in place of one that was given away; allocates nothing.
    pub(crate) fn none() -> Self {
        Self { entries: Box::new([]), head: 0, tail: 0 }
    }

    pub(crate) fn len(&self) -> u32 {
        self.tail.wrapping_sub(self.head)
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.head == self.tail
    }

    /// Sequence number of the oldest request, or of the next one: it moves with every request that ends.
    pub(crate) fn head(&self) -> u32 {
        self.head
    }

    /// The oldest request, left where it is.
    pub(crate) fn oldest(&self) -> Option<InFlight> {
        (!self.is_empty()).then(|| self.entries[self.head as usize & (self.entries.len() - 1)])
    }

    /// All of them, in post order.
    pub(crate) fn iter(&self) -> impl Iterator<Item = &InFlight> {
        (0..self.len()).map(|n| &self.entries[self.head.wrapping_add(n) as usize & (self.entries.len() - 1)])
    }

    /// Sequence number the next posted request gets.
    pub(crate) fn next_sequence(&self) -> u32 {
        self.tail
    }

    pub(crate) fn push(&mut self, entry: InFlight) {
        debug_assert!((self.len() as usize) < self.entries.len(), "credit is counted against the ring");
        let at = self.tail as usize & (self.entries.len() - 1);
        self.entries[at] = entry;
        self.tail = self.tail.wrapping_add(1);
    }

    /// Takes the oldest request out, if there is one.
    pub(crate) fn pop(&mut self) -> Option<InFlight> {
        let entry = self.oldest()?;
        self.head = self.head.wrapping_add(1);
        Some(entry)
    }

    /// How many requests stand before `sequence`; `None` if it is not in the ring (late, doubled or not ours).
    pub(crate) fn before(&self, sequence: u32) -> Option<u32> {
        let distance = sequence.wrapping_sub(self.head);
        (distance < self.len()).then_some(distance)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(slice: u32) -> InFlight {
        InFlight { seat: 0, slice, len: 1, alone: false, posted: Nanos::ZERO }
    }

    #[test]
    fn the_ring_keeps_post_order_across_the_wrap_of_sequences() {
        let mut ring = InFlightRing::new(4);
        (ring.head, ring.tail) = (u32::MAX - 1, u32::MAX - 1);
        for slice in 0..4 {
            ring.push(entry(slice));
        }
        assert_eq!(ring.before(u32::MAX - 1), Some(0));
        assert_eq!(ring.before(1), Some(3), "sequence 1 lies behind the wrap");
        assert_eq!(ring.before(2), None, "not posted yet");
        assert_eq!((0..4).map(|_| ring.pop().unwrap().slice).collect::<Vec<_>>(), [0, 1, 2, 3]);
        assert_eq!(ring.before(u32::MAX), None, "a completion that came twice finds nothing");
    }
}
