//! Commands and Works out of the rings.

use std::sync::Arc;

use super::Core;
use super::credit::Credit;
use super::inflight::{InFlight, InFlightList, TRIAL};
use super::lost::Trust;
use super::port::{Command, CoreEvent, RailKey, RailSpec};
use super::table::{Line, NONE, PeerSeat, QpSeat, QpState, RailSeat, RailState, WorkSeat};
use crate::error::{Cause, SliceError};
use crate::limits::{ACTIVE_WORKS, QP_SLOTS, QPS_PER_RAIL_MAX, QUANTUM, SMALL_WORK};
use crate::nic::{ConnectedQp, Op, PostHalf, WorkRequest};
use crate::transfer::Peer;
use crate::units::{Lkey, Nanos, PeerId, Qpn, RemoteAddr, Rkey, WrId};
use crate::work::Work;

impl Core {
    pub(super) fn intake(&mut self, now: Nanos) -> usize {
        let mut taken = 0;
        while let Some(command) = self.inbox.next_command() {
            self.obey(command, now);
            taken += 1;
        }
        while !self.free_works.is_empty() || self.works.len() < ACTIVE_WORKS {
            let Some(work) = self.inbox.next_work() else { break };
            self.take_in(work, now);
            taken += 1;
        }
        taken
    }

    fn obey(&mut self, command: Command, now: Nanos) {
        match command {
            Command::Adopt { rail, qp } => self.adopt(&rail, qp, now),
            Command::Retire { key } => {
                if let Some(rail) = self.find_rail(key) {
                    self.close_rail(rail, now);
                }
            }
            Command::Yield { key } => self.yield_rail(key, now),
            Command::Destroyed { slot } => self.destroyed(usize::from(slot)),
            Command::Claim { key, claims } => self.let_claim(key, claims),
            Command::Fenced { key } => self.fenced(key),
            Command::Unreachable { peer, cause } => self.unreachable(peer, cause),
            Command::Stop => {
                self.stopping = Some(self.stopping.unwrap_or(now));
                self.next_watch = now;
            }
        }
    }

    pub(super) fn find_rail(&self, key: RailKey) -> Option<usize> {
        self.lives.get(&key).map(|rail| *rail as usize)
    }

    /// The seat of a peer. The table grows when a peer is seen for the first time, and only then.
    fn peer_seat(&mut self, peer: &Arc<Peer>) -> usize {
        let index = peer.id().0 as usize;
        while self.peers.len() <= index {
            self.peers.push(PeerSeat::new());
        }
        if self.peers[index].peer.is_none() {
            self.peers[index].peer = Some(peer.clone());
        }
        index
    }

    fn adopt(&mut self, spec: &RailSpec, qp: ConnectedQp, now: Nanos) {
        let PostHalf { post } = qp.into_post_half();
        let nic = self.nics.iter().position(|n| n.id == spec.nic);
        let rail = nic.and_then(|nic| self.rail_seat(spec, nic));
        let gives_back = self.stopping.is_some() || self.trust != Trust::Whole;
        let slot = if gives_back { None } else { self.free_qps.pop().or_else(|| self.new_slot()) };
        let (Some(rail), Some(slot)) = (rail, slot) else {
            // Not our NIC, too many, or a life that is over: back to control at once, never used.
            self.free_qps.extend(slot);
            let qp = PostHalf { post };
            self.tell(CoreEvent::Drained { key: spec.key, qp, flushed: 0, needs_fence: false });
            return self.outbox.ring();
        };
        let seat = &mut self.qps[usize::from(slot)];
        seat.generation = seat.generation.wrapping_add(1);
        seat.state = QpState::Trial;
        seat.qpn = post.qpn();
        seat.rail = rail as u32;
        seat.depth = post.depth();
        seat.max_inline = post.max_inline();
        seat.reads_are_proven = post.reads_are_proven();
        seat.in_flight = InFlightList::EMPTY;
        seat.post = Some(post);
        (seat.unsignaled, seat.unsignaled_bytes, seat.flushed) = (0, 0, 0);
        (seat.needs_fence, seat.proven) = (false, false);
        // No request has that number for long: the first look at this tenant hears no silence yet.
        (seat.silent, seat.front_seen, seat.stalled) = (Nanos::ZERO, u32::MAX, false);
        let entry = &mut self.rails[rail];
        entry.qps[usize::from(entry.qp_count)] = slot;
        entry.qp_count += 1;
        self.post_trial(usize::from(slot), now);
    }

    /// Gives a rail back that nobody here needs. One that is over was told of already, and how.
    fn yield_rail(&mut self, key: RailKey, now: Nanos) {
        let Some(rail) = self.find_rail(key).filter(|rail| self.rails[*rail].state != RailState::Down) else { return };
        let idle = |slot: usize| self.qps[slot].state == QpState::Up && self.qps[slot].in_flight.is_empty();
        if !self.rails[rail].qps().all(idle) || self.peers[self.rails[rail].peer as usize].has_work() {
            self.tell(CoreEvent::InUse { key });
        } else {
            self.close_rail(rail, now);
            for slot in self.rails[rail].qps() {
                let Some(post) = self.qps[slot].post.take() else { continue };
                self.free_slot(slot);
                self.tell(CoreEvent::Yielded { key, qp: ConnectedQp::idle(post) });
            }
            self.free_rail_if_empty(rail);
        }
        self.outbox.ring();
    }

    fn new_slot(&mut self) -> Option<u16> {
        if self.qps.len() >= QP_SLOTS {
            return None;
        }
        self.qps.push(QpSeat {
            generation: 0,
            state: QpState::Free,
            qpn: Qpn::default(),
            rail: 0,
            post: None,
            in_flight: InFlightList::EMPTY,
            depth: 0,
            max_inline: 0,
            reads_are_proven: true,
            unsignaled: 0,
            unsignaled_bytes: 0,
            flushed: 0,
            needs_fence: false,
            proven: false,
            silent: Nanos::ZERO,
            front_seen: 0,
            stalled: false,
        });
        u16::try_from(self.qps.len() - 1).ok()
    }

    /// The seat of a rail's life: the one its earlier queue pairs opened, or a new one. `None` for a life that failed
    /// before its last queue pair came, or with no place left.
    fn rail_seat(&mut self, spec: &RailSpec, nic: usize) -> Option<usize> {
        if let Some(rail) = self.find_rail(spec.key) {
            let open = self.rails[rail].state != RailState::Down;
            return (open && usize::from(self.rails[rail].qp_count) < QPS_PER_RAIL_MAX).then_some(rail);
        }
        let peer = self.peer_seat(&spec.peer);
        let seat = RailSeat {
            key: spec.key,
            state: RailState::Trial,
            peer: peer as u32,
            nic: nic as u32,
            peer_nic: spec.peer_nic,
            qps: [0; QPS_PER_RAIL_MAX],
            qp_count: 0,
            credit: Credit::new(),
            counters: spec.counters.clone(),
            claims: spec.claims,
            holds: NONE,
        };
        let rail = match self.free_rails.pop() {
            Some(rail) => {
                self.rails[rail as usize] = seat;
                rail as usize
            }
            None if self.rails.len() < QP_SLOTS => {
                self.rails.push(seat);
                self.rails.len() - 1
            }
            None => return None,
        };
        self.lives.insert(spec.key, rail as u32);
        if spec.claims {
            self.peers[peer].rails.push(rail as u32);
        }
        Some(rail)
    }

    /// Control learned whether a rail is for us.
    fn let_claim(&mut self, key: RailKey, claims: bool) {
        let Some(rail) = self.find_rail(key) else { return };
        let state = self.rails[rail].state;
        if self.rails[rail].claims == claims || matches!(state, RailState::Free | RailState::Down) {
            return;
        }
        if claims {
            self.rails[rail].claims = true;
            let peer = self.rails[rail].peer as usize;
            self.peers[peer].rails.push(rail as u32);
            self.carries(rail, state == RailState::Up);
        } else {
            self.leave_peer(rail);
            self.rails[rail].claims = false;
        }
    }

    /// A WRITE of no bytes goes to the peer's NIC and back, and touches no memory and needs no key (IBA C9-88): what
    /// returns from it proves that the path carries packets both ways. Reaching RTS proves nothing of the kind.
    fn post_trial(&mut self, slot: usize, now: Nanos) {
        let qp = &self.qps[slot];
        let nic = self.rails[qp.rail as usize].nic as usize;
        if self.nics[nic].outstanding >= self.nics[nic].depth {
            // No room for its completion: `watch` posts it later.
            return self.untried.insert(slot);
        }
        let wr_id = WrId { slot: slot as u16, generation: qp.generation, sequence: qp.in_flight.next_sequence() };
        let request = WorkRequest {
            wr_id,
            op: Op::Write,
            local: 0,
            lkey: Lkey(0),
            len: 0,
            remote: RemoteAddr(0),
            rkey: Rkey(0),
            signaled: true,
            inline: false,
        };
        let entry = InFlight { seat: TRIAL, slice: 0, len: 0, alone: true, posted: now };
        self.chain.clear();
        self.entries.clear();
        self.chain.push(request);
        self.entries.push(entry);
        self.ring_chain(slot, now);
    }

    /// Queue pairs on trial whose trial could not be posted yet.
    pub(super) fn post_late_trials(&mut self, now: Nanos) {
        let mut from = 0;
        while let Some(slot) = self.untried.next(from) {
            from = slot + 1;
            self.untried.remove(slot);
            if self.qps[slot].state == QpState::Trial && self.qps[slot].in_flight.is_empty() {
                self.post_trial(slot, now);
            }
        }
    }

    fn take_in(&mut self, work: Arc<Work>, now: Nanos) {
        if let Some(seat) = work.seat(self.id) {
            // Pushed again because slices came back. The seat keeps its own reference, so this drop frees nothing.
            drop(work);
            self.enqueue(seat);
            return;
        }
        let peer = self.peer_seat(&work.remote().peer);
        let seat = match self.free_works.pop() {
            Some(seat) => seat,
            None => {
                self.works.push(WorkSeat::empty());
                self.works.len() as u32 - 1
            }
        };
        work.set_seat(self.id, Some(seat));
        let entry = &mut self.works[seat as usize];
        entry.home = work.home() == self.id;
        entry.work = Some(work);
        self.enqueue(seat);
        self.want(peer, now);
        self.mark_dirty(seat);
    }

    /// Puts a Work into its peer's line if it has slices to give and stands in none.
    pub(super) fn enqueue(&mut self, seat: u32) {
        let entry = &mut self.works[seat as usize];
        let Some(work) = &entry.work else { return };
        if entry.line != Line::None || !(work.has_unclaimed() || work.has_returned()) {
            return;
        }
        let index = work.remote().peer.id().0;
        let small = work.bytes() < SMALL_WORK;
        entry.line = if small { Line::Small } else { Line::Bulk };
        entry.quantum = QUANTUM;
        let peer = &mut self.peers[index as usize];
        let line = if small { &mut peer.small } else { &mut peer.bulk };
        line.push_back(seat, &mut self.works);
        if !peer.busy {
            peer.busy = true;
            self.busy_peers.push(index);
        }
    }

    /// Asks control for a rail, if no core has one and it was not asked lately.
    pub(super) fn want(&mut self, peer: usize, now: Nanos) {
        let seat = &mut self.peers[peer];
        let Some(shared) = &seat.peer else { return };
        let asked = seat.wanted_at.is_some_and(|at| now.since(at) < crate::limits::WANT_PERIOD);
        if shared.routes() != 0 || asked || !seat.has_work() {
            return;
        }
        let event = CoreEvent::Wanted { peer: shared.id() };
        seat.wanted_at = Some(now);
        // Asked again later if there is no room; but first errors and queue pairs must have theirs.
        if self.makes_event_room() && self.tell(event) {
            self.outbox.ring();
        }
    }

    /// Control could not make a rail: what waits for this peer ends. Works with a rail on another core go there.
    fn unreachable(&mut self, peer: PeerId, cause: Cause) {
        if self.peers.get(peer.0 as usize).is_none_or(|p| p.usable > 0) {
            return;
        }
        for seat in 0..self.works.len() as u32 {
            let entry = &self.works[seat as usize];
            let Some(work) = &entry.work else { continue };
            if work.remote().peer.id() != peer || !entry.home || work.remote().peer.routes() != 0 {
                continue;
            }
            let status = SliceError { cause, ..work.first_error().unwrap_or(SliceError::of(cause)) };
            self.end_work(seat, status);
        }
    }

    /// Control destroyed a queue pair that would not drain: what was outstanding has ended, as if flushed.
    fn destroyed(&mut self, slot: usize) {
        if self.qps.get(slot).is_none_or(|qp| qp.state != QpState::Overdue) {
            return;
        }
        let rail = self.qps[slot].rail as usize;
        let (in_flight, requests) = (self.rails[rail].credit.in_flight(), self.qps[slot].in_flight.len());
        while let Some(entry) = self.pop_entry(slot) {
            self.hold_for_fence(slot, &entry);
            if entry.seat != TRIAL {
                self.rails[rail].counters.returned.add(1);
                let seat = &mut self.works[entry.seat as usize];
                seat.outstanding -= 1;
                if let Some(work) = &seat.work {
                    work.note_drained();
                }
                self.give_back(entry.seat, entry.slice);
            }
        }
        self.count_ended(rail, requests, in_flight);
        self.free_slot(slot);
        self.free_rail_if_empty(rail);
    }

    pub(super) fn free_slot(&mut self, slot: usize) {
        debug_assert!(self.qps[slot].in_flight.is_empty(), "what is posted has an outcome to come");
        let rail = self.qps[slot].rail as usize;
        let entry = &mut self.rails[rail];
        let count = usize::from(entry.qp_count);
        if let Some(at) = entry.qps[..count].iter().position(|&s| usize::from(s) == slot) {
            entry.qps[at] = entry.qps[count - 1];
            entry.qp_count -= 1;
        }
        self.qps[slot].state = QpState::Free;
        self.free_qps.push(slot as u16);
    }

    /// A life without queue pairs and holds is over.
    pub(super) fn free_rail_if_empty(&mut self, rail: usize) {
        let entry = &mut self.rails[rail];
        if entry.state == RailState::Down && entry.qp_count == 0 && entry.holds == NONE {
            entry.state = RailState::Free;
            self.lives.remove(&entry.key);
            self.down.remove(rail);
            self.free_rails.push(rail as u32);
        }
    }
}
