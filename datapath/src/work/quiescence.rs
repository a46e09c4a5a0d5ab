//! What is proven of a Work's memory: that nothing of it is, or will be, touched on the Work's behalf, and by what.
//!
//! ```text
//!              open ──▶ every slice ended ──▶ terminal: NeverPosted, or Quiesced by the strongest proof that was needed
//!                │  cancel, deadline              ▲
//!                └──▶ closed, something is out, or held for a fence: Quarantined
//! ```
//! The facts are kept where things go wrong, never where they go well; the answer is put together when it is asked for.

use std::sync::atomic::Ordering;

use super::Work;

/// A slice came back from a queue pair in ERR, or from one that was destroyed.
const DRAINED: u8 = 1;
/// It was held for a fence. A hold ends by the fence's proof only.
const HELD: u8 = 2;
/// A thread that waits copied a part of a slice, and gave it back.
const TOUCHED: u8 = 4;

/// By what it is known that nothing touches the memory any more. Each includes the ones before.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
#[non_exhaustive]
pub enum Proof {
    /// Each request that was posted has completed as done, or a later one on the same queue pair has: its bytes are in place,
    /// acknowledged by the peer's NIC where it was a WRITE, and no packet of it has an effect any more.
    CompletionSeen,
    /// Some requests failed or were flushed, and were given back by a queue pair in ERR, each with a completion of its own, or
    /// it was destroyed: our NIC touches the local memory no more. None of them was a WRITE that could still be on its way.
    QpDrained,
    /// Some of those were WRITEs, of which the network may keep packets after our end is drained. The peer's end that would
    /// take them is retired: the peer said so, took fresh queue pairs in their place, or is another incarnation on its host.
    PeerFenced,
}

/// Whether memory may be used again, both the local and the peer's. Ordered: of several parts, the greatest holds for all.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
#[non_exhaustive]
pub enum Quiescence {
    /// It is over, and no device ever had a request of it: no byte was read or written.
    NeverPosted,
    /// It is over, and nothing of it can land or be read any more.
    Quiesced {
        /// What proves it.
        how: Proof,
    },
    /// Its end was asked for, by cancel or deadline, or all its bytes are accounted for; but something may be on its way, and
    /// may still land. **Not** terminal: the memory stays registered and must be left as it is until there is proof.
    Quarantined,
    /// It is under way.
    Underway,
}

impl Work {
    /// What is known of its memory now. Any thread; walks the slices when the Work is terminal.
    pub fn quiescence(&self) -> Quiescence {
        if self.is_terminal() {
            // What the facts' writers did before they settled is visible with the terminal count.
            return match self.facts.load(Ordering::Relaxed) {
                facts if facts & HELD != 0 => Quiescence::Quiesced { how: Proof::PeerFenced },
                facts if facts & DRAINED != 0 => Quiescence::Quiesced { how: Proof::QpDrained },
                facts if facts & TOUCHED != 0 || self.was_begun() => {
                    Quiescence::Quiesced { how: Proof::CompletionSeen }
                }
                _ => Quiescence::NeverPosted,
            };
        }
        let held = self.facts.load(Ordering::Relaxed) & HELD != 0;
        let accounted = || self.transfers.iter().all(|transfer| !transfer.is_waiting());
        if self.is_closed() || held && accounted() { Quiescence::Quarantined } else { Quiescence::Underway }
    }

    /// Whether a slice was handed to a device, or copied.
    fn was_begun(&self) -> bool {
        self.tries.iter().any(|tries| tries.posts.load(Ordering::Relaxed) > 0)
            || self.transfers.iter().any(|transfer| transfer.transferred() > 0)
    }

    /// A slice came back from a queue pair that drained, or was destroyed. Before it is accounted for.
    pub(crate) fn note_drained(&self) {
        self.facts.fetch_or(DRAINED, Ordering::Relaxed);
    }

    pub(super) fn note_held(&self) {
        self.facts.fetch_or(HELD, Ordering::Relaxed);
    }

    pub(super) fn note_touched(&self) {
        self.facts.fetch_or(TOUCHED, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::work;
    use super::*;
    use crate::error::{Cause, SliceError};

    #[test]
    fn what_nobody_claimed_was_never_posted() {
        let work = work(3);
        assert_eq!(work.quiescence(), Quiescence::Underway);
        work.abandon(SliceError::of(Cause::Cancelled));
        assert_eq!(work.quiescence(), Quiescence::NeverPosted);
    }

    #[test]
    fn what_is_claimed_when_it_is_cancelled_is_in_quarantine_until_it_ends() {
        let work = work(3);
        assert_eq!(work.claim(1), 0..1);
        let _ = work.count_post(0);
        work.abandon(SliceError::of(Cause::Cancelled));
        assert_eq!(work.quiescence(), Quiescence::Quarantined);
        work.slice_done(0);
        assert_eq!(work.settle(1), Some(false));
        assert_eq!(work.quiescence(), Quiescence::Quiesced { how: Proof::CompletionSeen });
    }

    #[test]
    fn all_bytes_in_place_and_a_hold_is_quarantine_too() {
        let work = work(1);
        let _ = (work.claim(1), work.count_post(0));
        work.note_drained();
        work.hold();
        assert_eq!(work.quiescence(), Quiescence::Underway, "another rail may carry it");
        work.slice_done(0);
        assert_eq!(work.settle(1), None);
        assert_eq!(work.quiescence(), Quiescence::Quarantined);
        assert_eq!(work.settle(1), Some(false));
        assert_eq!(work.quiescence(), Quiescence::Quiesced { how: Proof::PeerFenced });
    }

    #[test]
    fn of_several_the_greatest_holds_for_all() {
        let drained = Quiescence::Quiesced { how: Proof::QpDrained };
        let fenced = Quiescence::Quiesced { how: Proof::PeerFenced };
        assert!(Quiescence::NeverPosted < drained && drained < fenced && fenced < Quiescence::Quarantined);
        assert!(Quiescence::Quarantined < Quiescence::Underway);
    }
}
