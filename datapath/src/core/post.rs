//! Claim slices with credit, chain them, ring once.

use std::ops::Range;

use super::Core;
use super::inflight::InFlight;
use super::table::{Line, NONE, QpState, RailState};
use crate::error::{Cause, SliceError};
use crate::limits::{CHAIN_MAX, POSTS_MAX, QUANTUM, SIGNAL_EVERY, WATCH_PERIOD};
use crate::nic::{Op, WcStatus, WorkRequest};
use crate::units::{Nanos, WrId};

/// Which Works a chain may be made of.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Which {
    Small,
    All,
}

/// What one chain may still take.
struct Room {
    requests: usize,
    bytes: u64,
    /// The Work in front has a slice that this rail can not carry: it steps back, and the chain ends.
    blocked: bool,
}

impl Room {
    fn is_left(&self) -> bool {
        self.requests > 0 && self.bytes > 0 && !self.blocked
    }
}

/// Why a slice is not in the chain.
enum LeftOut {
    /// One end never registered its memory on its NIC of this rail.
    NoKey,
    /// It was posted too often.
    WentRound,
}

/// The send queue is full: no credit lost, the rest waits (ibv_post_send(3)).
const ENOMEM: i32 = 12;

impl Core {
    pub(super) fn post(&mut self, now: Nanos) -> usize {
        let mut posted = 0;
        let mut index = 0;
        while index < self.busy_peers.len() {
            let peer = self.busy_peers[index] as usize;
            if self.peers[peer].usable > 0 {
                posted += self.post_peer(peer, now);
            }
            if self.peers[peer].has_work() {
                index += 1;
            } else {
                self.peers[peer].busy = false;
                self.busy_peers.swap_remove(index);
            }
        }
        posted
    }

    /// Fills every usable rail to one peer, starting with another one each turn.
    fn post_peer(&mut self, peer: usize, now: Nanos) -> usize {
        let rails = self.peers[peer].rails.len();
        let first = self.peers[peer].first as usize;
        self.peers[peer].first = self.peers[peer].first.wrapping_add(1);
        let mut posted = self.post_small(peer, now);
        let share = self.fair_share(peer);
        for turn in 0..rails {
            // A rail that fails while posting leaves the list, which is shorter then.
            let Some(&rail) = self.peers[peer].rails.get((first + turn) % rails) else { break };
            posted += self.post_rail(rail as usize, peer, share, Which::All, now);
            if !self.peers[peer].has_work() {
                break;
            }
        }
        posted
    }

    /// Where every rail is busy, what is small goes to the one that will be through first, and does not wait until credit has come back
    /// in a large piece.
    fn post_small(&mut self, peer: usize, now: Nanos) -> usize {
        let small = self.peers[peer].small.head;
        let Some(work) = (small != NONE).then(|| self.works[small as usize].work.as_ref()).flatten() else { return 0 };
        let route = &work.remote().route;
        let mut soonest: Option<(u64, usize)> = None;
        for &rail in &self.peers[peer].rails {
            let seat = &self.rails[rail as usize];
            if seat.state != RailState::Up || !route.allows(seat.peer_nic.fabric()) {
                continue;
            }
            if seat.credit.is_nearly_empty() {
                return 0;
            }
            let drains = seat.credit.drains_in();
            if soonest.is_none_or(|(least, _)| drains < least) {
                soonest = Some((drains, rail as usize));
            }
        }
        soonest.map_or(0, |(_, rail)| self.post_rail(rail, peer, usize::MAX, Which::Small, now))
    }

    /// Requests a rail may take this turn. A rail with credit for all of a short Work would take it alone, and the others
    /// had nothing to do; what is long enough for all is limited by their credit anyway.
    fn fair_share(&self, peer: usize) -> usize {
        let seat = &self.peers[peer];
        let alone = seat.small.head == seat.small.tail && seat.bulk.head == seat.bulk.tail;
        let front = self.front(peer).filter(|_| alone && (seat.small.head == NONE || seat.bulk.head == NONE));
        let work = front.and_then(|front| self.works[front as usize].work.as_ref());
        let Some(work) = work else { return usize::MAX };
        // Other cores with a rail have about as many as this one.
        let rails = seat.usable.max(1) * work.remote().peer.routes().count_ones().max(1);
        (work.waiting().div_ceil(rails) as usize).max(1)
    }

    fn post_rail(&mut self, rail: usize, peer: usize, share: usize, which: Which, now: Nanos) -> usize {
        let mut posted = 0;
        let mut used = 0u32;
        // Each queue pair gets at most one chain a turn, the emptiest first.
        for _ in 0..self.rails[rail].qp_count {
            let slots = self.rails[rail].qps().enumerate();
            let emptiest = slots
                .filter(|&(at, slot)| used & (1 << at) == 0 && self.qps[slot].state == QpState::Up)
                .min_by_key(|&(_, slot)| self.qps[slot].in_flight.len());
            let Some((at, slot)) = emptiest else { break };
            used |= 1 << at;
            posted += self.post_chain(slot, rail, peer, share.saturating_sub(posted), which, now);
            if self.rails[rail].state != RailState::Up || posted >= share {
                break;
            }
        }
        posted
    }

    fn post_chain(&mut self, slot: usize, rail: usize, peer: usize, most: usize, which: Which, now: Nanos) -> usize {
        let nic = &self.nics[self.rails[rail].nic as usize];
        let queue = self.qps[slot].depth.saturating_sub(self.qps[slot].in_flight.len());
        let completions = nic.depth.saturating_sub(nic.outstanding);
        let requests = (queue.min(completions) as usize).min(CHAIN_MAX).min(most);
        let credit = &self.rails[rail].credit;
        let bytes = if which == Which::Small { credit.free_for_small() } else { credit.free() };
        let mut room = Room { requests, bytes, blocked: false };
        self.chain.clear();
        self.entries.clear();
        while room.is_left() {
            let Some(seat) = self.front(peer).filter(|&seat| which == Which::All || self.is_small(seat)) else { break };
            let before = room.bytes;
            let more = self.claim_from(seat, slot, rail, &mut room, now);
            let spent = if room.blocked { u64::MAX } else { before - room.bytes };
            self.rotate(peer, seat, spent, more);
        }
        if self.chain.is_empty() {
            return 0;
        }
        self.ask_for_completions(slot, rail);
        self.ring_chain(slot, now)
    }

    /// The Work whose turn it is: small ones first.
    fn front(&self, peer: usize) -> Option<u32> {
        let peer = &self.peers[peer];
        [peer.small.head, peer.bulk.head].into_iter().find(|&seat| seat != NONE)
    }

    fn is_small(&self, seat: u32) -> bool {
        self.works[seat as usize].line == Line::Small
    }

    /// After a Work gave slices: it leaves the line if it has no more, and goes to its end when its quantum is spent.
    fn rotate(&mut self, peer: usize, seat: u32, bytes: u64, more: bool) {
        let entry = &mut self.works[seat as usize];
        entry.quantum = entry.quantum.saturating_sub(bytes);
        if more && entry.quantum > 0 {
            return;
        }
        entry.quantum = QUANTUM;
        let small = entry.line == Line::Small;
        let line = if small { &mut self.peers[peer].small } else { &mut self.peers[peer].bulk };
        let _ = line.pop_front(&self.works);
        if more {
            line.push_back(seat, &mut self.works);
        } else {
            self.works[seat as usize].line = Line::None;
            // It may have nothing in flight here either: then its seat is free.
            self.mark_dirty(seat);
        }
    }

    /// Moves slices of one Work into the chain: what came back first, then fresh ones, a run with one atomic add.
    /// Returns whether it may have more.
    fn claim_from(&mut self, seat: u32, slot: usize, rail: usize, room: &mut Room, now: Nanos) -> bool {
        while room.is_left() {
            let Some(work) = &self.works[seat as usize].work else { return false };
            let allowed = work.remote().route.allows(self.rails[rail].peer_nic.fabric());
            if !allowed || now < self.works[seat as usize].keyless_until {
                room.blocked = true;
                return work.has_unclaimed() || work.has_returned();
            }
            if let Some(slice) = work.take_returned() {
                if work.is_closed() {
                    let error = work.first_error().unwrap_or(SliceError::of(Cause::Cancelled));
                    self.end_slice(seat, slice, error);
                    continue;
                }
                self.chain_run(seat, slice..slice + 1, slot, rail, room, now);
                continue;
            }
            let count = work.slices().len() as u64;
            let typical = (work.bytes() / count.max(1)).max(1);
            let budget = room.bytes.min(self.works[seat as usize].quantum).div_ceil(typical);
            let run = work.claim((room.requests as u64).min(budget) as u32);
            if run.is_empty() {
                return false;
            }
            self.chain_run(seat, run, slot, rail, room, now);
            let Some(work) = &self.works[seat as usize].work else { return false };
            return work.has_unclaimed() || work.has_returned();
        }
        true
    }

    /// Moves slices that are this core's into the chain.
    fn chain_run(&mut self, seat: u32, mut run: Range<u32>, slot: usize, rail: usize, room: &mut Room, now: Nanos) {
        loop {
            let before = self.chain.len();
            let left_out = self.chain_slices(seat, &mut run, slot, rail, room, now);
            if self.chain.len() > before {
                self.take_back_keyless(seat);
            }
            match left_out {
                None => return,
                Some((index, LeftOut::WentRound)) => self.went_round(seat, index, rail),
                Some((index, LeftOut::NoKey)) => {
                    room.blocked = true;
                    self.without_key(seat, index, rail, now);
                }
            }
        }
    }

    /// As far as nothing is in the way: the first slice of `run` that can not be chained is taken out of it too, and returned.
    fn chain_slices(
        &mut self,
        seat: u32,
        run: &mut Range<u32>,
        slot: usize,
        rail: usize,
        room: &mut Room,
        now: Nanos,
    ) -> Option<(u32, LeftOut)> {
        let work = self.works[seat as usize].work.as_ref()?;
        let (qp, rail) = (&self.qps[slot], &self.rails[rail]);
        let nic = self.nics[rail.nic as usize].id;
        let (op, alone) = (work.op(), rail.credit.is_nearly_empty());
        for index in run {
            let slice = &work.slices()[index as usize];
            let lkey = work.local().chunks().get(slice.chunk as usize).and_then(|chunk| chunk.lkey(nic));
            let rkey = work.remote().rkey(slice.buffer, rail.peer_nic);
            let (Some(lkey), Some(rkey)) = (lkey, rkey) else { return Some((index, LeftOut::NoKey)) };
            if work.count_post(index) > POSTS_MAX {
                return Some((index, LeftOut::WentRound));
            }
            let ahead = self.chain.len() as u32;
            let wr_id = WrId {
                slot: slot as u16,
                generation: qp.generation,
                sequence: qp.in_flight.next_sequence().wrapping_add(ahead),
            };
            self.chain.push(WorkRequest {
                wr_id,
                op,
                local: slice.local,
                lkey,
                len: slice.len,
                remote: slice.remote,
                rkey,
                signaled: false,
                inline: op == Op::Write && slice.len <= qp.max_inline,
            });
            let alone = ahead == 0 && alone;
            self.entries.push(InFlight { seat, slice: index, len: slice.len, alone, posted: now });
            room.requests -= 1;
            room.bytes = room.bytes.saturating_sub(u64::from(slice.len));
        }
        None
    }

    /// A slice was posted too often: it ends, and is not posted again.
    fn went_round(&mut self, seat: u32, index: u32, rail: usize) {
        let Some(work) = &self.works[seat as usize].work else { return };
        let error = SliceError { rail: Some(self.rails[rail].key.rail), ..SliceError::of(Cause::BadRequest) };
        self.end_slice(seat, index, work.first_error().unwrap_or(error));
    }

    /// What this core said of its keys holds no longer: it carries slices of the Work, or lets go of it.
    pub(super) fn take_back_keyless(&mut self, seat: u32) {
        let entry = &mut self.works[seat as usize];
        if !std::mem::take(&mut entry.keyless) {
            return;
        }
        entry.keyless_until = Nanos::ZERO;
        if let Some(work) = &entry.work {
            work.can_carry(self.id);
        }
    }

    /// One end never registered the memory of a slice on its NIC of this rail. A rail that has the keys may only be full
    /// at the moment: if there is one here, or a core with a rail has not said that it has none, the slice waits for it
    /// at no cost. Otherwise each try counts as a posting, and the count ends the search.
    fn without_key(&mut self, seat: u32, index: u32, rail: usize, now: Nanos) {
        let entry = &self.works[seat as usize];
        let (Some(work), lent) = (&entry.work, entry.lent) else { return };
        let slice = &work.slices()[index as usize];
        let carries = |other: &&u32| {
            let other = &self.rails[**other as usize];
            let lkey = work.local().chunks().get(slice.chunk as usize);
            other.state == RailState::Up
                && lkey.and_then(|c| c.lkey(self.nics[other.nic as usize].id)).is_some()
                && work.remote().rkey(slice.buffer, other.peer_nic).is_some()
        };
        if self.peers[self.rails[rail].peer as usize].rails.iter().any(|other| carries(&other)) {
            self.give_back(seat, index);
            // Nobody else has to hear of it each turn.
            self.works[seat as usize].lent = lent;
        } else if !work.cannot_carry(self.id) {
            let entry = &mut self.works[seat as usize];
            entry.keyless = true;
            entry.keyless_until = now.plus(WATCH_PERIOD);
            self.give_back(seat, index);
        } else {
            let goes_on = work.count_post(index) <= POSTS_MAX;
            self.works[seat as usize].keyless = true;
            if goes_on {
                self.give_back(seat, index);
            } else {
                self.went_round(seat, index, rail);
            }
        }
    }

    /// One request in [`SIGNAL_EVERY`], or each quarter of the cap in bytes, and always the last: a rail that waits for
    /// credit must have a completion coming.
    fn ask_for_completions(&mut self, slot: usize, rail: usize) {
        let quarter = self.rails[rail].credit.cap() / 4;
        let qp = &mut self.qps[slot];
        let last = self.chain.len() - 1;
        for (index, request) in self.chain.iter_mut().enumerate() {
            qp.unsignaled += 1;
            qp.unsignaled_bytes += u64::from(request.len);
            if index == last || qp.unsignaled >= SIGNAL_EVERY || qp.unsignaled_bytes >= quarter {
                request.signaled = true;
                (qp.unsignaled, qp.unsignaled_bytes) = (0, 0);
            }
        }
    }

    /// Posts the chain with one doorbell and accounts exactly what the device took (`bad_wr`).
    pub(super) fn ring_chain(&mut self, slot: usize, now: Nanos) -> usize {
        let Some(post) = &mut self.qps[slot].post else { return 0 };
        let outcome = post.post(&self.chain);
        let accepted = outcome.accepted.min(self.chain.len());
        let rail = self.qps[slot].rail as usize;
        let nic = self.rails[rail].nic as usize;
        let qp = &mut self.qps[slot];
        qp.in_flight.extend(&mut self.in_flight, &self.entries[..accepted]);
        let mut bytes = 0;
        for of_work in self.entries[..accepted].chunk_by(|one, other| one.seat == other.seat) {
            bytes += of_work.iter().map(|entry| u64::from(entry.len)).sum::<u64>();
            let seat = of_work[0].seat;
            if seat != super::inflight::TRIAL {
                let seat = &mut self.works[seat as usize];
                seat.outstanding += of_work.len() as u32;
                if let Some(work) = &seat.work {
                    // How long they waited.
                    self.rails[rail].counters.queue.add(now.since(work.submitted()), of_work.len() as u64);
                }
            }
        }
        self.rails[rail].credit.spend(bytes);
        if accepted > 0 {
            self.flying.insert(slot);
        }
        self.nics[nic].outstanding += accepted as u32;
        self.counters.doorbells.add(1);
        self.counters.work_requests.add(accepted as u64);
        self.rails[rail].counters.doorbells.add(1);
        self.rails[rail].counters.work_requests.add(accepted as u64);
        self.rails[rail].counters.posted_bytes.add(bytes);
        if self.entries[0].seat != super::inflight::TRIAL {
            self.rails[rail].counters.used_ns.set(now.0);
        }
        if accepted < self.chain.len() || outcome.error.is_some() {
            self.refused(slot, accepted, outcome.error.unwrap_or(0), now);
        }
        accepted
    }

    /// The device took only the first `accepted` requests. The rest was never posted and goes back, where the queue was
    /// full at no cost. If what it took ends without asking for a completion, or it refused for anything but a full
    /// queue, the queue pair can not be trusted to tell how its requests end: that is its first error. So it is if all
    /// were taken and the doorbell failed.
    fn refused(&mut self, slot: usize, accepted: usize, errno: i32, now: Nanos) {
        let rail = self.qps[slot].rail as usize;
        let silent_tail = accepted > 0 && !self.chain[accepted - 1].signaled;
        self.counters.refused.add((self.chain.len() - accepted) as u64);
        for index in accepted..self.entries.len() {
            let entry = self.entries[index];
            if entry.seat != super::inflight::TRIAL {
                if let (ENOMEM, Some(work)) = (errno, &self.works[entry.seat as usize].work) {
                    work.uncount_post(entry.slice);
                }
                self.give_back(entry.seat, entry.slice);
            }
        }
        if errno == ENOMEM && accepted < self.chain.len() && !silent_tail && !self.qps[slot].in_flight.is_empty() {
            return;
        }
        let peer = self.peers[self.rails[rail].peer as usize].peer.as_ref().map(|p| p.id());
        let request = self.chain[accepted.min(self.chain.len() - 1)];
        self.fail_rail(
            rail,
            crate::error::FirstError {
                peer: peer.unwrap_or_default(),
                qpn: self.qps[slot].qpn,
                status: WcStatus::LOC_QP_OP_ERR,
                vendor_err: errno.unsigned_abs(),
                op: request.op,
                local: request.local,
                remote: request.remote,
                len: request.len,
                age: Nanos::ZERO,
                behind: self.qps[slot].in_flight.len(),
                proven: self.qps[slot].proven,
            },
            now,
        );
    }
}
