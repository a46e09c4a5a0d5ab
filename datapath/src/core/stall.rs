//! The stall watch: a queue pair that owes completions and gives none, though its device reports no error.
//!
//! ```text
//!   each look of the watch at what has requests out:
//!                             another request is the oldest ──▶ silent = 0
//!                             the same one is               ──▶ silent += time since the last look
//!                                     longer than a cancelled batch may wait ──▶ given up
//!                                     longer than the device and path explain ──▶ stalled
//! ```
//! A device that hangs does that, and so does one that retries for ever (Soft-RoCE with a retry count of 7) into a network
//! that swallows everything. What follows is the life of any first error: control moves the queue pairs to ERR, they
//! drain, and other rails take what comes back. Completions cost nothing for it: the front of the list tells.

use super::Core;
use super::inflight::TRIAL;
use super::table::QpState;
use crate::error::FirstError;
use crate::limits::{
    CANCEL_GRACE, CANCEL_ROUND_TRIPS, STALL_AFTER, STALL_NANOS_PER_BYTE, STALL_ROUND_TRIPS, STALL_STEP,
};
use crate::nic::WcStatus;
use crate::units::Nanos;

impl Core {
    pub(super) fn watch_stalls(&mut self, now: Nanos) {
        let step = now.since(self.last_watch).min(STALL_STEP);
        self.last_watch = now;
        let mut from = 0;
        while let Some(slot) = self.flying.next(from) {
            from = slot + 1;
            let qp = &mut self.qps[slot];
            if !matches!(qp.state, QpState::Trial | QpState::Up) {
                continue;
            }
            // What was idle meanwhile has another one at the front.
            if qp.in_flight.first_sequence() != qp.front_seen {
                (qp.silent, qp.front_seen) = (Nanos::ZERO, qp.in_flight.first_sequence());
                continue;
            }
            qp.silent = qp.silent.plus(step);
            if qp.silent > CANCEL_GRACE
                && let Some(verdict) = self.judge_silence(slot)
            {
                self.end_silence(slot, verdict, now);
            }
        }
    }

    /// Whether a queue pair has been silent for too long, in the words of a status.
    fn judge_silence(&self, slot: usize) -> Option<WcStatus> {
        let qp = &self.qps[slot];
        let rail = &self.rails[qp.rail as usize];
        // What is dialled judges for itself: shared memory copies when it is polled, or waits at most some milliseconds for
        // a region; TCP outlives a network that is away for longer than this, and has limits of its own.
        if rail.peer_nic.fabric().is_dialled() {
            return None;
        }
        let carrying = Nanos(rail.credit.in_flight().saturating_mul(STALL_NANOS_PER_BYTE));
        let over = |least: Nanos, round_trips: u64, round_trip: Option<u64>| {
            qp.silent > least.max(Nanos(round_trip.unwrap_or(0).saturating_mul(round_trips))).plus(carrying)
        };
        if over(STALL_AFTER, STALL_ROUND_TRIPS, rail.credit.carried_round_trip()) {
            Some(WcStatus::STALLED)
        } else if over(CANCEL_GRACE, CANCEL_ROUND_TRIPS, rail.credit.round_trip()) && self.holds_closed_work(slot) {
            Some(WcStatus::GIVEN_UP)
        } else {
            None
        }
    }

    /// Whether a Work waits for this queue pair only to be over.
    fn holds_closed_work(&self, slot: usize) -> bool {
        let mut seats =
            self.qps[slot].in_flight.iter(&self.in_flight).map(|entry| entry.seat).filter(|seat| *seat != TRIAL);
        seats.any(|seat| self.works[seat as usize].work.as_ref().is_some_and(|work| work.is_closed()))
    }

    fn end_silence(&mut self, slot: usize, verdict: WcStatus, now: Nanos) {
        let Some(oldest) = self.qps[slot].in_flight.oldest(&self.in_flight) else { return };
        let behind = self.qps[slot].in_flight.len() - 1;
        let error = FirstError { status: verdict, behind, ..self.describe(slot, &oldest, now) };
        if verdict == WcStatus::STALLED {
            // The oldest request answers for it. Where we only lost patience none does.
            self.qps[slot].stalled = true;
            self.counters.stalls.add(1);
        } else {
            self.counters.given_up.add(1);
        }
        self.fail_rail(self.qps[slot].rail as usize, error, now);
    }
}
