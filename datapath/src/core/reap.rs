//! Completions: the requests they end, the credit they free.

use super::Core;
use super::counters::RailCounters;
use super::inflight::{InFlight, TRIAL};
use super::lost::Trust;
use super::port::CoreEvent;
use super::table::{QpState, RailSeat, RailState};
use crate::limits::{POLL_BATCH, POLLS_PER_TURN, TRIAL_ROUND_TRIP_MAX};
use crate::nic::{Completion, Op, WcStatus};
use crate::units::Nanos;

/// Slices that one completion told of. Those that were posted together are counted together.
#[derive(Default)]
struct Arrived {
    bytes: u64,
    slices: u64,
    /// Those with this time of posting, so far.
    posted: Nanos,
    together: u64,
}

impl Arrived {
    fn count_together(&mut self, counters: &RailCounters, now: Nanos) {
        if self.together > 0 {
            counters.wire.add(now.since(self.posted), self.together);
            self.together = 0;
        }
    }

    fn count(&mut self, counters: &RailCounters, now: Nanos) {
        self.count_together(counters, now);
        if self.slices > 0 {
            counters.slices.add(self.slices);
        }
    }
}

impl Core {
    pub(super) fn reap(&mut self, now: Nanos) -> usize {
        let mut reaped = 0;
        if self.trust == Trust::Blind {
            return 0;
        }
        // What a panic left: a queue gives each only once.
        self.read(now);
        for nic in 0..self.nics.len() {
            for _ in 0..POLLS_PER_TURN {
                let got = match self.nics[nic].cq.poll(&mut self.completions) {
                    Ok(got) => got,
                    Err(_) => {
                        self.cq_lost(nic);
                        0
                    }
                };
                self.unread = 0..got;
                self.read(now);
                self.counters.completions.add(got as u64);
                reaped += got;
                if got < POLL_BATCH {
                    break;
                }
            }
            let served = self.nics[nic].cq.served();
            if served > 0 {
                self.served = Some(now);
            }
            reaped += served;
        }
        reaped
    }

    fn read(&mut self, now: Nanos) {
        while let Some(index) = self.unread.next() {
            let completion = self.completions[index];
            self.complete(completion, now);
        }
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
        let Some(before) = qp.in_flight.before(completion.wr_id.sequence) else { return };
        let rail = qp.rail as usize;
        self.rails[rail].counters.completions.add(1);
        let in_flight = self.rails[rail].credit.in_flight();
        let mut arrived = Arrived::default();
        let ended = before + u32::from(completion.status == WcStatus::SUCCESS);
        // The completion that told of one of these may be what a panic lost: that a later one came says that they are over, not how.
        let lost = self.trust != Trust::Whole;
        let doubted = !self.qps[slot].reads_are_proven && self.has_reads(slot, ended) && self.is_in_error(slot);
        if !lost && !doubted {
            self.retire_done(slot, ended, ended > before, now, &mut arrived);
        } else {
            for nth in 0..ended {
                if lost || self.has_reads(slot, 1) {
                    let unproven = Completion { status: WcStatus::UNPROVEN, vendor_err: 0, ..completion };
                    self.retire_failed(slot, unproven, now);
                } else {
                    self.retire_done(slot, 1, nth == before, now, &mut arrived);
                }
            }
        }
        if completion.status != WcStatus::SUCCESS {
            self.retire_failed(slot, completion, now);
        }
        self.count_ended(rail, before + 1, in_flight);
        arrived.count(&self.rails[rail].counters, now);
        let bytes = arrived.bytes;
        if bytes > 0 {
            let rail = &mut self.rails[rail];
            rail.credit.note_arrived(bytes, now);
            rail.counters.bytes.add(bytes);
            rail.counters.cap_bytes.set(rail.credit.cap());
            rail.counters.round_trip_ns.set(rail.credit.round_trip().unwrap_or(0));
        }
    }

    /// Whether one of the oldest `count` requests of `slot` is a READ.
    fn has_reads(&self, slot: usize, count: u32) -> bool {
        let is_read = |entry: &InFlight| {
            let seat = (entry.seat != TRIAL).then(|| &self.works[entry.seat as usize]);
            seat.and_then(|seat| seat.work.as_ref()).is_some_and(|work| work.op() == Op::Read)
        };
        self.qps[slot].in_flight.iter(&self.in_flight).take(count as usize).any(is_read)
    }

    fn is_in_error(&self, slot: usize) -> bool {
        self.qps[slot].post.as_ref().is_some_and(|post| post.is_in_error())
    }

    /// Takes the oldest request of `slot` out of its list, and frees its place in all counts of credit.
    pub(super) fn pop_entry(&mut self, slot: usize) -> Option<InFlight> {
        let entry = self.qps[slot].in_flight.pop(&mut self.in_flight)?;
        self.give_credit_back(slot, 1, u64::from(entry.len));
        Some(entry)
    }

    /// So many requests were taken out of the list of `slot`: their places in all three counts of credit are free again.
    fn give_credit_back(&mut self, slot: usize, requests: u32, bytes: u64) {
        let qp = &self.qps[slot];
        let rail = &mut self.rails[qp.rail as usize];
        rail.credit.give_back(bytes);
        self.nics[rail.nic as usize].outstanding -= requests;
        if qp.in_flight.is_empty() {
            self.flying.remove(slot);
        }
    }

    /// Counts requests that have ended on a rail that had `in_flight` bytes before.
    pub(super) fn count_ended(&self, rail: usize, requests: u32, in_flight: u64) {
        let RailSeat { counters, credit, .. } = &self.rails[rail];
        counters.ended.add(u64::from(requests));
        counters.ended_bytes.add(in_flight - credit.in_flight());
    }

    /// The oldest `count` requests of `slot` are done. `told`: the last of them said so itself; only then its age is a round trip.
    fn retire_done(&mut self, slot: usize, count: u32, told: bool, now: Nanos, arrived: &mut Arrived) {
        let rail = self.qps[slot].rail as usize;
        let (mut seat, mut of_seat) = (TRIAL, 0);
        let (mut requests, mut bytes, mut last) = (0, 0, None);
        while requests < count
            && let Some(entry) = self.qps[slot].in_flight.pop(&mut self.in_flight)
        {
            requests += 1;
            bytes += u64::from(entry.len);
            last = Some(entry);
            if entry.seat == TRIAL {
                continue;
            }
            if entry.seat != seat {
                self.note_done(seat, of_seat);
                (seat, of_seat) = (entry.seat, 0);
            }
            of_seat += 1;
            if let Some(work) = &self.works[entry.seat as usize].work {
                work.slice_done(entry.slice);
            }
            if entry.posted != arrived.posted {
                arrived.count_together(&self.rails[rail].counters, now);
                arrived.posted = entry.posted;
            }
            arrived.together += 1;
            arrived.slices += 1;
            arrived.bytes += u64::from(entry.len);
        }
        self.note_done(seat, of_seat);
        self.give_credit_back(slot, requests, bytes);
        let Some(last) = last else { return };
        self.counters.bytes_done.add(bytes);
        self.qps[slot].proven = true;
        if last.seat == TRIAL {
            self.trial_returned(slot);
        }
        let span = now.since(last.posted);
        if told && (last.seat != TRIAL || span <= TRIAL_ROUND_TRIP_MAX) {
            self.rails[rail].credit.note_round_trip(span, last.alone, now);
        }
    }

    /// So many slices of one Work are done.
    fn note_done(&mut self, seat: u32, slices: u32) {
        if slices > 0 {
            let entry = &mut self.works[seat as usize];
            entry.outstanding -= slices;
            entry.settled += slices;
            self.mark_dirty(seat);
            self.counters.slices_done.add(u64::from(slices));
        }
    }

    /// A rail that claims, if it does, counts as usable now that it is `up`.
    pub(super) fn carries(&mut self, rail: usize, up: bool) {
        let seat = &self.rails[rail];
        if up && seat.claims {
            let peer = &mut self.peers[seat.peer as usize];
            peer.usable += 1;
            if let (1, Some(shared)) = (peer.usable, &peer.peer) {
                shared.set_route(self.id, true);
            }
        }
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
            self.carries(rail as usize, true);
            let key = self.rails[rail as usize].key;
            self.tell(CoreEvent::Proven { key });
            self.outbox.ring();
        }
    }
}
