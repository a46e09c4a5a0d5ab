//! The first error of a rail's life, its echoes, and what comes back because of them.

use super::Core;
use super::inflight::{InFlight, TRIAL};
use super::port::{CoreEvent, RailKey};
use super::table::{Hold, NONE, QpState, RailState};
use crate::error::{Cause, FaultClass, FirstError, SliceError, classify};
use crate::nic::{Completion, Op, WcStatus};
use crate::units::{Nanos, RemoteAddr};

impl Core {
    /// The oldest request of `slot` ended with an error. The first such completion latches the rail's life; whatever
    /// follows is an echo, whatever its status.
    pub(super) fn retire_failed(&mut self, slot: usize, completion: Completion, now: Nanos) {
        let Some(entry) = self.pop_entry(slot) else { return };
        let rail = self.qps[slot].rail as usize;
        let first = matches!(self.rails[rail].state, RailState::Trial | RailState::Up);
        let mut error = self.describe(slot, &entry, now);
        error.status = completion.status;
        error.vendor_err = completion.vendor_err;
        // Whose failure it was: of the first one, or of the oldest that a stalled queue pair did not bring back. The rest
        // is echo.
        let mut own = first.then_some((completion.status, completion.vendor_err));
        if first {
            self.fail_rail(rail, error, now);
        } else if std::mem::take(&mut self.qps[slot].stalled) {
            own = Some((WcStatus::STALLED, 0));
        }
        if !first && classify(completion.status) == FaultClass::Flush {
            self.qps[slot].flushed += 1;
            self.counters.flushes.add(1);
            self.rails[rail].counters.flushes.add(1);
        }
        // The hold comes before the slice is given back: whoever finishes it elsewhere must not end the Work.
        if !self.qps[slot].post.as_ref().is_some_and(|post| post.drains_clean()) {
            self.hold_for_fence(slot, &entry);
        }
        self.return_entry(&entry, own, rail);
    }

    pub(super) fn describe(&self, slot: usize, entry: &InFlight, now: Nanos) -> FirstError {
        let qp = &self.qps[slot];
        let peer = &self.peers[self.rails[qp.rail as usize].peer as usize];
        let work = (entry.seat != TRIAL).then(|| self.works[entry.seat as usize].work.as_ref()).flatten();
        let slice = work.map(|w| w.slices()[entry.slice as usize]);
        FirstError {
            peer: peer.peer.as_ref().map(|p| p.id()).unwrap_or_default(),
            qpn: qp.qpn,
            status: WcStatus::SUCCESS,
            vendor_err: 0,
            op: work.map_or(Op::Write, |w| w.op()),
            local: slice.map_or(0, |s| s.local),
            remote: slice.map_or(RemoteAddr(0), |s| s.remote),
            len: entry.len,
            age: now.since(entry.posted),
            behind: qp.in_flight.len(),
            proven: qp.proven,
        }
    }

    /// Closes a rail's life: nothing more is posted on it, control hears of it once.
    pub(super) fn fail_rail(&mut self, rail: usize, error: FirstError, now: Nanos) {
        self.close_rail(rail, now);
        self.counters.first_errors.add(1);
        self.rails[rail].counters.first_errors.add(1);
        let key = self.rails[rail].key;
        self.tell(CoreEvent::FirstError { key, error });
        self.outbox.ring();
    }

    /// Stops posting on a rail; its queue pairs drain from here.
    pub(super) fn close_rail(&mut self, rail: usize, now: Nanos) {
        if matches!(self.rails[rail].state, RailState::Free | RailState::Down) {
            return;
        }
        self.leave_peer(rail);
        self.rails[rail].state = RailState::Down;
        self.down.insert(rail);
        for slot in self.rails[rail].qps() {
            if matches!(self.qps[slot].state, QpState::Trial | QpState::Up) {
                self.qps[slot].state = QpState::Draining { since: now };
            }
        }
    }

    /// A rail that claims is in its peer's list, and counts as usable while it is up. From here on neither.
    pub(super) fn leave_peer(&mut self, rail: usize) {
        let seat = &self.rails[rail];
        if !seat.claims {
            return;
        }
        let was_up = seat.state == RailState::Up;
        let peer = &mut self.peers[seat.peer as usize];
        peer.rails.retain(|&r| r as usize != rail);
        if was_up {
            peer.usable -= 1;
            if let (0, Some(shared)) = (peer.usable, &peer.peer) {
                shared.set_route(self.id, false);
            }
        }
    }

    /// A WRITE that was outstanding when its queue pair failed may land at the peer after we have drained it. Its Work
    /// stays open until control says that the peer's end is fenced.
    pub(super) fn hold_for_fence(&mut self, slot: usize, entry: &InFlight) {
        if entry.seat == TRIAL {
            return;
        }
        let seat = &self.works[entry.seat as usize];
        if !seat.work.as_ref().is_some_and(|w| w.op() == Op::Write) {
            return;
        }
        self.qps[slot].needs_fence = true;
        let rail = self.qps[slot].rail as usize;
        let mut at = self.rails[rail].holds;
        while at != NONE {
            if self.holds[at as usize].work == entry.seat {
                return;
            }
            at = self.holds[at as usize].next;
        }
        let hold = Hold { work: entry.seat, next: self.rails[rail].holds };
        let index = match self.free_holds.pop() {
            Some(index) => {
                self.holds[index as usize] = hold;
                index
            }
            None => {
                self.holds.push(hold);
                self.holds.len() as u32 - 1
            }
        };
        self.rails[rail].holds = index;
        let seat = &mut self.works[entry.seat as usize];
        seat.holds += 1;
        if let Some(work) = &seat.work {
            work.hold();
        }
    }

    /// Control proved that nothing of this life can land any more.
    pub(super) fn fenced(&mut self, key: RailKey) {
        let Some(rail) = self.find_rail(key) else { return };
        let mut at = std::mem::replace(&mut self.rails[rail].holds, NONE);
        while at != NONE {
            let Hold { work, next } = self.holds[at as usize];
            let seat = &mut self.works[work as usize];
            seat.holds -= 1;
            seat.settled += 1;
            self.mark_dirty(work);
            self.free_holds.push(at);
            at = next;
        }
        self.free_rail_if_empty(rail);
    }

    /// Decides what becomes of a slice whose request failed or was flushed. `own`: status and maker's code, where the
    /// failure was its own; one that was only flushed costs no retry.
    fn return_entry(&mut self, entry: &InFlight, own: Option<(WcStatus, u32)>, rail: usize) {
        if entry.seat == TRIAL {
            return;
        }
        self.rails[rail].counters.returned.add(1);
        self.works[entry.seat as usize].outstanding -= 1;
        let Some(work) = &self.works[entry.seat as usize].work else { return };
        work.note_drained();
        let Some((status, vendor_err)) = own.filter(|(status, _)| classify(*status) != FaultClass::Flush) else {
            return self.give_back(entry.seat, entry.slice);
        };
        let error = SliceError {
            cause: Cause::Completion,
            status: status.0 as u8,
            vendor: vendor_err as u16,
            rail: Some(self.rails[rail].key.rail),
        };
        if classify(status) == FaultClass::Request {
            self.end_slice(entry.seat, entry.slice, SliceError { cause: Cause::BadRequest, ..error });
        } else if work.may_retry(entry.slice) {
            self.give_back(entry.seat, entry.slice);
        } else {
            self.end_slice(entry.seat, entry.slice, error);
        }
    }

    /// Gives a slice back to whoever has a rail, or ends it where its Work was closed meanwhile.
    pub(super) fn give_back(&mut self, seat: u32, slice: u32) {
        let Some(work) = &self.works[seat as usize].work else { return };
        work.give_back(slice);
        self.counters.slices_returned.add(1);
        if work.is_closed() {
            let error = work.first_error().unwrap_or(SliceError::of(Cause::Cancelled));
            self.end_returned(seat, error);
            return;
        }
        let seat_ref = &mut self.works[seat as usize];
        seat_ref.returned = true;
        seat_ref.lent = 0;
        self.mark_dirty(seat);
    }

    /// Ends one slice that this core owns.
    pub(super) fn end_slice(&mut self, seat: u32, slice: u32, error: SliceError) {
        let seat_ref = &mut self.works[seat as usize];
        if let Some(work) = &seat_ref.work {
            work.slice_failed(slice, error);
        }
        seat_ref.settled += 1;
        self.counters.slices_failed.add(1);
        self.mark_dirty(seat);
    }

    /// Ends every slice that lies in the Work's return map.
    pub(super) fn end_returned(&mut self, seat: u32, error: SliceError) {
        while let Some(slice) = self.works[seat as usize].work.as_ref().and_then(|w| w.take_returned()) {
            self.end_slice(seat, slice, error);
        }
    }

    /// Closes a Work: what nobody posted ends now; what is in flight ends when it comes back.
    pub(super) fn end_work(&mut self, seat: u32, error: SliceError) {
        let Some(work) = self.works[seat as usize].work.clone() else { return };
        work.note_error(error);
        for slice in work.close() {
            self.end_slice(seat, slice, error);
        }
        self.end_returned(seat, error);
        self.mark_dirty(seat);
    }
}
