//! Completions: the requests they end, the credit they free.

use super::Core;
use super::inflight::{InFlight, TRIAL};
use super::port::CoreEvent;
use super::table::{QpState, RailState};
use crate::limits::{POLL_BATCH, POLLS_PER_TURN, TRIAL_ROUND_TRIP_MAX};
use crate::nic::{Completion, WcStatus};
use crate::units::Nanos;

impl Core {
    pub(super) fn reap(&mut self, now: Nanos) -> usize {
        let mut reaped = 0;
        for nic in 0..self.nics.len() {
            for _ in 0..POLLS_PER_TURN {
                let got = match self.nics[nic].cq.poll(&mut self.completions) {
                    Ok(got) => got,
                    Err(_) => {
                        self.cq_lost(nic);
                        0
                    }
                };
                for index in 0..got {
                    let completion = self.completions[index];
                    self.complete(completion, now);
                }
                self.counters.completions.add(got as u64);
                reaped += got;
                if got < POLL_BATCH {
                    break;
                }
            }
            reaped += self.nics[nic].cq.served();
        }
        reaped
    }

    /// Outcomes on this NIC may be lost: said once; control takes the NIC out, and its queue pairs are destroyed when
    /// they do not drain.
    pub(super) fn cq_lost(&mut self, nic: usize) {
        if !self.nics[nic].lost && self.tell(CoreEvent::CqLost { nic: self.nics[nic].id }) {
            self.nics[nic].lost = true;
            self.outbox.ring();
        }
    }

    fn complete(&mut self, completion: Completion, now: Nanos) {
        let slot = usize::from(completion.wr_id.slot);
        // A completion of a queue pair that is gone, or one that came twice, finds nothing: it is nobody's.
        let Some(qp) = self.qps.get(slot).filter(|qp| qp.generation == completion.wr_id.generation) else { return };
        let Some(before) = qp.ring.before(completion.wr_id.sequence) else { return };
        let rail = qp.rail as usize;
        self.rails[rail].counters.completions.add(1);
        let mut bytes = 0;
        for _ in 0..before {
            bytes += self.retire_done(slot, None, now);
        }
        if completion.status == WcStatus::SUCCESS {
            bytes += self.retire_done(slot, Some(now), now);
        } else {
            self.retire_failed(slot, completion, now);
        }
        if bytes > 0 {
            let rail = &mut self.rails[rail];
            rail.credit.note_arrived(bytes, now);
            rail.counters.bytes.add(bytes);
            rail.counters.cap_bytes.set(rail.credit.cap());
            rail.counters.round_trip_ns.set(rail.credit.round_trip().unwrap_or(0));
        }
    }

    /// Takes the oldest request out of the ring of `slot`: its place in all three counts of credit is free again.
    pub(super) fn pop_entry(&mut self, slot: usize) -> Option<InFlight> {
        let qp = &mut self.qps[slot];
        let entry = qp.ring.pop()?;
        let rail = &mut self.rails[qp.rail as usize];
        rail.credit.give_back(entry.len);
        self.nics[rail.nic as usize].outstanding -= 1;
        Some(entry)
    }

    /// The oldest request of `slot` is done. `seen` is set where its own completion said so: only then its age is a
    /// round trip. Returns its bytes.
    fn retire_done(&mut self, slot: usize, seen: Option<Nanos>, now: Nanos) -> u64 {
        let Some(entry) = self.pop_entry(slot) else { return 0 };
        self.qps[slot].proven = true;
        if entry.seat == TRIAL {
            self.trial_returned(slot);
        } else {
            let seat = &mut self.works[entry.seat as usize];
            seat.outstanding -= 1;
            seat.settled += 1;
            if let Some(work) = &seat.work {
                work.slice_done(entry.slice);
            }
            self.mark_dirty(entry.seat);
            self.counters.slices_done.add(1);
            self.counters.bytes_done.add(u64::from(entry.len));
            self.rails[self.qps[slot].rail as usize].counters.slices.add(1);
        }
        if let Some(span) = seen.map(|seen| seen.since(entry.posted))
            && (entry.seat != TRIAL || span <= TRIAL_ROUND_TRIP_MAX)
        {
            self.rails[self.qps[slot].rail as usize].credit.note_round_trip(span, entry.alone, now);
        }
        u64::from(entry.len)
    }

    /// The path carried something there and back: the queue pair, and with it the rail, is usable.
    fn trial_returned(&mut self, slot: usize) {
        if self.qps[slot].state != QpState::Trial {
            return;
        }
        self.qps[slot].state = QpState::Up;
        let rail = self.qps[slot].rail;
        if self.rails[rail as usize].state == RailState::Trial {
            self.rails[rail as usize].state = RailState::Up;
            let peer = &mut self.peers[self.rails[rail as usize].peer as usize];
            peer.usable += 1;
            if let (1, Some(shared)) = (peer.usable, &peer.peer) {
                shared.set_route(self.id, true);
            }
            let key = self.rails[rail as usize].key;
            self.tell(CoreEvent::Proven { key });
        }
    }
}
