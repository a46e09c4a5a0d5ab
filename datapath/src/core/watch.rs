//! What is looked at once a millisecond: deadlines, Works parked without a rail, queue pairs that stall ([`super::stall`])
//! or drain too long, the stop.

use super::Core;
use super::lost::Trust;
use super::port::CoreEvent;
use super::table::{Line, QpState, Queue, RailState};
use crate::error::{Cause, SliceError};
use crate::limits::{DRAIN_LIMIT, WATCH_PERIOD};
use crate::nic::PostHalf;
use crate::units::Nanos;

impl Core {
    pub(super) fn watch(&mut self, now: Nanos) -> usize {
        let drained = self.give_back_drained(now);
        if now < self.next_watch {
            return drained;
        }
        self.next_watch = now.plus(WATCH_PERIOD);
        self.end_lost();
        self.watch_works(now);
        self.watch_lines(now);
        self.watch_stalls(now);
        self.post_late_trials(now);
        self.publish();
        self.watch_stop(now);
        drained
    }

    /// When the core has to turn again even if nothing happens; [`Nanos::FAR`] if only a ring or a NIC can wake it.
    pub(super) fn next_turn(&self) -> Nanos {
        let idle = self.works() == 0 && self.outstanding() == 0 && self.stopping.is_none();
        if idle && self.down.is_empty() && self.untried.is_empty() { Nanos::FAR } else { self.next_watch }
    }

    fn watch_works(&mut self, now: Nanos) {
        for seat in 0..self.works.len() as u32 {
            let entry = &self.works[seat as usize];
            let Some(work) = &entry.work else { continue };
            if entry.home && work.deadline() <= now && !work.is_closed() {
                self.end_work(seat, SliceError::of(Cause::Deadline));
            } else if entry.home && work.remote().route.fabrics() == 0 && !work.is_closed() {
                // Control found nothing that may carry it, or nothing that it could be carried to.
                let over = work.remote().route.is_over();
                self.end_work(seat, SliceError::of(if over { Cause::Restarted } else { Cause::Unreachable }));
            } else if entry.outstanding == 0 || work.is_terminal() {
                // Others may have ended it, or its caller closed it.
                self.mark_dirty(seat);
            }
            if self.works[seat as usize].work.as_ref().is_some_and(|w| w.is_closed() && w.has_returned()) {
                self.end_returned(seat, SliceError::of(Cause::Cancelled));
            }
        }
    }

    /// Works in line for a peer that this core has no rail to: lent to cores that have one, or control is asked.
    fn watch_lines(&mut self, now: Nanos) {
        for index in (0..self.busy_peers.len()).rev() {
            let peer = self.busy_peers[index] as usize;
            if self.peers[peer].usable > 0 {
                continue;
            }
            self.walk_line(peer, Line::Small);
            self.walk_line(peer, Line::Bulk);
            self.want(peer, now);
            if !self.peers[peer].has_work() {
                self.peers[peer].busy = false;
                self.busy_peers.swap_remove(index);
            }
        }
    }

    /// Walks a line that is not served: what has no slices left leaves it, the rest is offered to other cores.
    fn walk_line(&mut self, peer: usize, which: Line) {
        let line = if which == Line::Small { &mut self.peers[peer].small } else { &mut self.peers[peer].bulk };
        let mut walk = std::mem::replace(line, Queue::EMPTY);
        let mut kept = Queue::EMPTY;
        while let Some(seat) = walk.pop_front(&self.works) {
            let has_slices =
                self.works[seat as usize].work.as_ref().is_some_and(|w| w.has_unclaimed() || w.has_returned());
            if has_slices {
                self.lend(seat);
                kept.push_back(seat, &mut self.works);
            } else {
                self.works[seat as usize].line = Line::None;
                self.mark_dirty(seat);
            }
        }
        let line = if which == Line::Small { &mut self.peers[peer].small } else { &mut self.peers[peer].bulk };
        *line = kept;
    }

    /// Queue pairs with nothing outstanding go back to control; one that does not drain goes back to be destroyed.
    fn give_back_drained(&mut self, now: Nanos) -> usize {
        let (mut given, mut from) = (0, 0);
        while let Some(rail) = self.down.next(from) {
            from = rail + 1;
            for slot in self.rails[rail].qps() {
                given += usize::from(self.give_back_qp(slot, rail, now));
            }
            self.free_rail_if_empty(rail);
        }
        given
    }

    fn give_back_qp(&mut self, slot: usize, rail: usize, now: Nanos) -> bool {
        let QpState::Draining { since } = self.qps[slot].state else { return false };
        let key = self.rails[rail].key;
        if self.qps[slot].in_flight.is_empty() {
            let Some(post) = self.qps[slot].post.take() else { return false };
            let (flushed, needs_fence) = (self.qps[slot].flushed, self.qps[slot].needs_fence);
            self.free_slot(slot);
            self.tell(CoreEvent::Drained { key, qp: PostHalf { post }, flushed, needs_fence });
        } else if now.since(since) > DRAIN_LIMIT {
            let Some(post) = self.qps[slot].post.take() else { return false };
            // Its list stays: it says what was outstanding when the queue pair is gone.
            self.qps[slot].state = QpState::Overdue;
            self.tell(CoreEvent::Overdue { key, slot: slot as u16, qp: PostHalf { post } });
        } else {
            return false;
        }
        self.outbox.ring();
        true
    }

    pub(super) fn publish(&mut self) {
        let flight: u64 = self.flying.iter().map(|slot| self.in_flight_of_rail(slot)).sum();
        let waiting = self.works() as u64 * u64::from(crate::limits::SLICE_SIZE);
        // One that is lost is nobody's choice while there is another.
        let lost = self.trust != Trust::Whole;
        self.inbox.publish_load(if lost { u64::MAX } else { flight + waiting });
    }

    /// Bytes in flight on the rail of `slot`, if it works, and `slot` is the first of its queue pairs that has any.
    fn in_flight_of_rail(&self, slot: usize) -> u64 {
        let rail = &self.rails[self.qps[slot].rail as usize];
        let first = rail.qps().find(|slot| self.flying.contains(*slot));
        if rail.state == RailState::Up && first == Some(slot) { rail.credit.in_flight() } else { 0 }
    }

    /// After Stop: Works end, rails close; the core has stopped when nothing is left, or when what is left does not move.
    fn watch_stop(&mut self, now: Nanos) {
        let Some(since) = self.stopping else { return };
        if self.stopped {
            return;
        }
        for seat in 0..self.works.len() as u32 {
            if self.works[seat as usize].work.is_some() {
                self.end_work(seat, SliceError::of(Cause::Shutdown));
            }
        }
        for rail in 0..self.rails.len() {
            self.close_rail(rail, now);
        }
        let empty = self.works() == 0 && self.free_rails.len() == self.rails.len() && self.inbox.is_empty();
        if empty || now.since(since) > DRAIN_LIMIT.plus(DRAIN_LIMIT) {
            self.stopped = true;
            self.tell(CoreEvent::Stopped);
            self.outbox.ring();
        }
    }
}
