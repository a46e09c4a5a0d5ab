//! The stall watch: a queue pair that owes completions and gives none, though its device reports no error.
//!
//! ```text
//!   each look of the watch:   the head of its ring moved, or nothing is out ──▶ silent = 0
//!                             the same request at the head                  ──▶ silent += time since the last look
//!                                                     longer than allowed ──▶ first error of the rail's life: stalled
//! ```
//! A device that hangs does that, and so does one that retries for ever (Soft-RoCE with a retry count of 7) into a network
//! that swallows everything. What follows is the life of any first error: control moves the queue pairs to ERR, they
//! drain, and other rails take what comes back. Completions cost nothing for it: the ring's head tells.

use super::Core;
use super::table::QpState;
use crate::error::FirstError;
use crate::limits::{STALL_AFTER, STALL_ROUND_TRIPS, STALL_STEP};
use crate::nic::WcStatus;
use crate::units::Nanos;

impl Core {
    pub(super) fn watch_stalls(&mut self, now: Nanos) {
        let step = now.since(self.last_watch).min(STALL_STEP);
        self.last_watch = now;
        for slot in 0..self.qps.len() {
            let qp = &mut self.qps[slot];
            if !matches!(qp.state, QpState::Trial | QpState::Up) {
                continue;
            }
            if qp.ring.is_empty() || qp.ring.head() != qp.head_seen {
                (qp.silent, qp.head_seen) = (Nanos::ZERO, qp.ring.head());
                continue;
            }
            qp.silent = qp.silent.plus(step);
            if qp.silent > STALL_AFTER && self.has_stalled(slot) {
                self.stall(slot, now);
            }
        }
    }

    /// Whether this is longer than the path can explain.
    fn has_stalled(&self, slot: usize) -> bool {
        let qp = &self.qps[slot];
        let rail = &self.rails[qp.rail as usize];
        // What is dialled judges for itself: shared memory copies when it is polled, or waits at most some milliseconds for
        // a region; TCP outlives a network that is away for longer than this, and has limits of its own.
        if rail.peer_nic.fabric().is_dialled() {
            return false;
        }
        let slow = rail.credit.round_trip().unwrap_or(0).saturating_mul(STALL_ROUND_TRIPS);
        qp.silent > STALL_AFTER.max(Nanos(slow))
    }

    fn stall(&mut self, slot: usize, now: Nanos) {
        let Some(oldest) = self.qps[slot].ring.oldest() else { return };
        let behind = self.qps[slot].ring.len() - 1;
        let error = FirstError { status: WcStatus::STALLED, behind, ..self.describe(slot, &oldest, now) };
        self.qps[slot].stalled = true;
        self.counters.stalls.add(1);
        self.fail_rail(self.qps[slot].rail as usize, error, now);
    }
}
