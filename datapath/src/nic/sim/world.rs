//! The simulated network's state and what happens in it as time passes.

mod faults;

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap, VecDeque};
use std::io;
use std::sync::Arc;

use super::events::AsyncEvents;
use super::{SimLedger, SimOptions};
use crate::nic::{AsyncEvent, Completion, GidEntry, GidKind, Op, Posted, RtrAttr, RtsAttr, WcStatus, WorkRequest};
use crate::random::Random;
use crate::region::Memory;
use crate::units::{Gid, GidIndex, Lkey, Mtu, Nanos, Qpn, Rkey};

struct NicState {
    node: String,
    gids: Vec<GidEntry>,
    link_up: bool,
    alive: bool,
    frozen: bool,
    /// Nobody answers its questions for a neighbour's address.
    unanswered: bool,
    mtu: Mtu,
    events: AsyncEvents,
    cut: Vec<usize>,
    /// Of those cut, the ones towards which this NIC retries for ever.
    swallowing: Vec<usize>,
    /// NICs whose answers to READs are cut short.
    cutting: Vec<usize>,
    /// NICs towards which packets are lost or late.
    rough: Vec<(usize, Rough)>,
    /// An address that was taken away, until it comes back.
    taken: Option<GidEntry>,
    /// Bytes per second of its port, which all of its queue pairs share, first come, first served.
    port_speed: Option<u64>,
    port_busy_until: Nanos,
}

#[derive(Clone, Copy)]
struct Rough {
    loss: f64,
    delay: Nanos,
}

pub(super) struct CqState {
    nic: usize,
    entries: VecDeque<Completion>,
    depth: usize,
    overrun: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum State {
    Reset,
    Init,
    Rtr,
    Rts,
    Err,
    Destroyed,
}

struct QpState {
    qpn: Qpn,
    nic: usize,
    cq: usize,
    state: State,
    rtr: Option<RtrAttr>,
    rts: Option<RtsAttr>,
    depth: usize,
    queue: VecDeque<(u64, WorkRequest)>,
    next: u64,
    busy_until: Nanos,
    /// When the last request sent reaches the peer: a fabric keeps the order of one queue pair.
    arrives: Nanos,
    /// The head is being retried: everything behind it waits.
    stuck: bool,
    /// How often the head was lost.
    losses: u32,
    /// The queue pair that took its first request.
    met: Option<usize>,
}

struct Registered {
    nic: usize,
    memory: Arc<Memory>,
    offset: u64,
    len: u64,
    remote: bool,
}

#[derive(PartialEq, Eq, PartialOrd, Ord)]
enum Kind {
    /// The request reaches the peer.
    Arrive,
    /// Retried in vain.
    GiveUp,
    /// A packet that the network kept back reaches the peer after its request was flushed.
    Late,
}

struct Flight {
    at: Nanos,
    order: u64,
    kind: Kind,
    qp: usize,
    number: u64,
    request: WorkRequest,
}

impl PartialEq for Flight {
    fn eq(&self, other: &Self) -> bool {
        (self.at, self.order) == (other.at, other.order)
    }
}
impl Eq for Flight {}
impl PartialOrd for Flight {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for Flight {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (self.at, self.order).cmp(&(other.at, other.order))
    }
}

/// Everything.
pub(super) struct World {
    options: SimOptions,
    random: Random,
    now: Nanos,
    order: u64,
    nics: Vec<NicState>,
    cqs: Vec<CqState>,
    qps: Vec<QpState>,
    memory: HashMap<u32, Registered>,
    next_key: u32,
    flights: BinaryHeap<Reverse<Flight>>,
    /// What waits for a frozen machine.
    held: Vec<Flight>,
    /// The newest queue pair of each number that was ever given.
    by_number: HashMap<Qpn, usize>,
    /// Numbers whose queue pair is destroyed.
    free: Vec<Qpn>,
    overruns: usize,
    strays: usize,
}

/// A device that retries for ever is looked at this often.
const TRIES_AGAIN: Nanos = Nanos::from_millis(20);

/// How often a device sends again before it gives up.
const RETRIES: u32 = 7;

/// Numbers of queue pairs start here, as devices keep the first ones for themselves.
const FIRST_QPN: u32 = 17;

impl World {
    pub(super) fn new(seed: u64, options: SimOptions) -> Self {
        Self {
            options,
            random: Random::new(seed),
            now: Nanos::ZERO,
            order: 0,
            nics: vec![],
            cqs: vec![],
            qps: vec![],
            memory: HashMap::new(),
            next_key: 0x100,
            flights: BinaryHeap::with_capacity(1 << 14),
            held: vec![],
            by_number: HashMap::new(),
            free: vec![],
            overruns: 0,
            strays: 0,
        }
    }

    pub(super) fn add_nic(&mut self, node: &str, name: &str, gid: Gid, events: AsyncEvents) -> usize {
        let index = self.nics.len() as u8;
        let mut link_local = [0; 16];
        (link_local[0], link_local[1], link_local[15]) = (0xfe, 0x80, index + 1);
        let entry = |at, gid| GidEntry {
            index: GidIndex(at),
            gid,
            kind: GidKind::RoceV2,
            net_device: Some(format!("sim-{name}")),
        };
        self.nics.push(NicState {
            node: node.to_owned(),
            gids: vec![entry(0, Gid(link_local)), entry(1, gid)],
            link_up: true,
            alive: true,
            frozen: false,
            unanswered: false,
            mtu: self.options.mtu,
            events,
            cut: vec![],
            swallowing: vec![],
            cutting: vec![],
            rough: vec![],
            taken: None,
            port_speed: None,
            port_busy_until: Nanos::ZERO,
        });
        self.nics.len() - 1
    }

    pub(super) fn gids(&self, nic: usize) -> io::Result<Vec<GidEntry>> {
        self.alive(nic)?;
        Ok(self.nics[nic].gids.clone())
    }

    pub(super) fn port(&self, nic: usize) -> io::Result<(bool, Mtu)> {
        self.alive(nic)?;
        Ok((self.nics[nic].link_up, self.nics[nic].mtu))
    }

    pub(super) fn next_async(&mut self, nic: usize) -> Option<AsyncEvent> {
        self.nics[nic].events.next()
    }

    fn alive(&self, nic: usize) -> io::Result<()> {
        if self.nics[nic].alive { Ok(()) } else { Err(io::Error::from_raw_os_error(libc::ENODEV)) }
    }

    pub(super) fn create_cq(&mut self, nic: usize, depth: u32) -> io::Result<usize> {
        self.alive(nic)?;
        let depth = depth.max(1) as usize;
        self.cqs.push(CqState { nic, entries: VecDeque::with_capacity(depth), depth, overrun: false });
        Ok(self.cqs.len() - 1)
    }

    pub(super) fn cq_depth(&self, cq: usize) -> u32 {
        self.cqs[cq].depth as u32
    }

    pub(super) fn poll(&mut self, cq: usize, out: &mut [Completion]) -> io::Result<usize> {
        let cq = &mut self.cqs[cq];
        if std::mem::take(&mut cq.overrun) {
            return Err(io::Error::other("completion queue overrun"));
        }
        let count = cq.entries.len().min(out.len());
        for (place, completion) in out.iter_mut().zip(cq.entries.drain(..count)) {
            *place = completion;
        }
        Ok(count)
    }

    pub(super) fn create_qp(&mut self, nic: usize, cq: usize, depth: u32) -> io::Result<(usize, Qpn)> {
        self.alive(nic)?;
        // A number comes back as soon as it is free: nothing shows better whether it was free too early.
        let qpn = match self.free.pop() {
            Some(qpn) => qpn,
            None => Qpn::new(FIRST_QPN + self.by_number.len() as u32)
                .ok_or_else(|| io::Error::from_raw_os_error(libc::ENOMEM))?,
        };
        let depth = depth.max(1) as usize;
        self.qps.push(QpState {
            qpn,
            nic,
            cq,
            state: State::Reset,
            rtr: None,
            rts: None,
            depth,
            queue: VecDeque::with_capacity(depth),
            next: 0,
            busy_until: Nanos::ZERO,
            arrives: Nanos::ZERO,
            stuck: false,
            losses: 0,
            met: None,
        });
        self.by_number.insert(qpn, self.qps.len() - 1);
        Ok((self.qps.len() - 1, qpn))
    }

    pub(super) fn enter_init(&mut self, qp: usize) -> io::Result<()> {
        self.step(qp, State::Reset, State::Init)
    }

    pub(super) fn enter_rtr(&mut self, qp: usize, attr: &RtrAttr) -> io::Result<()> {
        let nic = self.qps[qp].nic;
        if attr.path_mtu > self.nics[nic].mtu {
            return Err(io::Error::from_raw_os_error(libc::EINVAL));
        }
        if !self.nics[nic].gids.iter().any(|g| g.index == attr.sgid_index) {
            return Err(io::Error::from_raw_os_error(libc::EINVAL));
        }
        let resolves = !self.nics[nic].unanswered
            && self.nics.iter().any(|n| n.alive && n.gids.iter().any(|g| g.gid == attr.dest_gid));
        if !resolves {
            // What a neighbour that does not answer looks like.
            return Err(io::Error::from_raw_os_error(libc::ETIMEDOUT));
        }
        self.step(qp, State::Init, State::Rtr)?;
        self.qps[qp].rtr = Some(*attr);
        Ok(())
    }

    pub(super) fn enter_rts(&mut self, qp: usize, attr: &RtsAttr) -> io::Result<()> {
        self.step(qp, State::Rtr, State::Rts)?;
        self.qps[qp].rts = Some(*attr);
        Ok(())
    }

    fn step(&mut self, qp: usize, from: State, to: State) -> io::Result<()> {
        self.alive(self.qps[qp].nic)?;
        if self.qps[qp].state != from {
            return Err(io::Error::from_raw_os_error(libc::EINVAL));
        }
        self.qps[qp].state = to;
        Ok(())
    }

    pub(super) fn enter_error(&mut self, qp: usize) {
        if self.qps[qp].state != State::Destroyed {
            self.qps[qp].state = State::Err;
            self.flush(qp);
        }
    }

    pub(super) fn destroy(&mut self, qp: usize) {
        self.qps[qp].state = State::Destroyed;
        if self.options.reuse_numbers {
            self.free.push(self.qps[qp].qpn);
        }
        self.qps[qp].queue.clear();
    }

    pub(super) fn register(
        &mut self,
        nic: usize,
        memory: &Arc<Memory>,
        offset: u64,
        len: u64,
        remote: bool,
    ) -> io::Result<u32> {
        self.alive(nic)?;
        if len == 0 || offset.checked_add(len).is_none_or(|end| end > memory.len()) {
            return Err(io::Error::from_raw_os_error(libc::EINVAL));
        }
        self.next_key += 1 + self.random.below(7) as u32;
        self.memory.insert(self.next_key, Registered { nic, memory: memory.clone(), offset, len, remote });
        Ok(self.next_key)
    }

    pub(super) fn deregister(&mut self, key: u32) {
        self.memory.remove(&key);
    }

    pub(super) fn post(&mut self, qp: usize, chain: &[WorkRequest]) -> Posted {
        let mut accepted = 0;
        for request in chain {
            let state = &self.qps[qp];
            let error = match state.state {
                State::Rts | State::Err => (state.queue.len() >= state.depth).then_some(libc::ENOMEM),
                _ => Some(libc::EINVAL),
            };
            if error.is_some() {
                return Posted { accepted, error };
            }
            self.send(qp, *request);
            accepted += 1;
        }
        Posted { accepted, error: None }
    }

    fn send(&mut self, qp: usize, request: WorkRequest) {
        let number = self.qps[qp].next;
        self.qps[qp].next += 1;
        self.qps[qp].queue.push_back((number, request));
        if self.qps[qp].state == State::Err {
            self.flush(qp);
            return;
        }
        let wire = |speed: u64| Nanos(u64::from(request.len) * 1_000_000_000 / speed.max(1));
        let port = &mut self.nics[self.qps[qp].nic];
        let free = match port.port_speed {
            Some(speed) => {
                port.port_busy_until = port.port_busy_until.max(self.now).plus(wire(speed));
                port.port_busy_until
            }
            None => self.qps[qp].busy_until.max(self.now).plus(wire(self.options.bytes_per_second)),
        };
        self.qps[qp].busy_until = free;
        let jitter = Nanos(self.random.below(self.options.jitter.0 + 1));
        let delay = self.options.delay.plus(jitter).plus(self.roughness(qp).map_or(Nanos::ZERO, |rough| rough.delay));
        let at = free.plus(delay).max(self.qps[qp].arrives);
        self.qps[qp].arrives = at;
        self.fly(at, Kind::Arrive, qp, number, request);
    }

    /// What is wrong with the path of `qp`, if it carries at all.
    fn roughness(&self, qp: usize) -> Option<Rough> {
        let near = &self.nics[self.qps[qp].nic];
        if near.rough.is_empty() {
            return None;
        }
        let far = self.qps[self.far_end(qp)?].nic;
        near.rough.iter().find(|(nic, _)| *nic == far).map(|(_, rough)| *rough)
    }

    fn fly(&mut self, at: Nanos, kind: Kind, qp: usize, number: u64, request: WorkRequest) {
        self.order += 1;
        self.flights.push(Reverse(Flight { at, order: self.order, kind, qp, number, request }));
    }

    pub(super) fn next_event(&self) -> Option<Nanos> {
        self.flights.peek().map(|f| f.0.at)
    }

    pub(super) fn advance(&mut self, now: Nanos) {
        while self.flights.peek().is_some_and(|f| f.0.at <= now) {
            let Some(Reverse(flight)) = self.flights.pop() else { break };
            self.now = self.now.max(flight.at);
            if self.is_held(&flight) {
                self.held.push(flight);
                continue;
            }
            match flight.kind {
                Kind::Arrive => self.arrive(&flight),
                Kind::GiveUp => self.give_up(&flight),
                Kind::Late => self.arrive_late(&flight),
            }
        }
        self.now = self.now.max(now);
    }

    /// Whether a frozen machine keeps it: the sender's own, or, of a packet on its way by itself, the receiver's.
    fn is_held(&self, flight: &Flight) -> bool {
        let kept_by = match flight.kind {
            Kind::Late => self.far_end(flight.qp),
            Kind::Arrive | Kind::GiveUp => Some(flight.qp),
        };
        kept_by.is_some_and(|qp| self.nics[self.qps[qp].nic].frozen)
    }

    fn arrive(&mut self, flight: &Flight) {
        let qp = &self.qps[flight.qp];
        let Some(&(head, _)) = qp.queue.front() else { return };
        if flight.number < head {
            return;
        }
        if qp.state != State::Rts || qp.stuck {
            return;
        }
        if flight.number > head {
            // One before it was lost: it is sent again after that one.
            return;
        }
        match self.peer_of(flight.qp) {
            Some(peer) if !self.is_too_large(flight.qp, peer, &flight.request) => {
                if self.roughness(flight.qp).is_some_and(|rough| self.random.chance(rough.loss)) {
                    return self.lose(flight);
                }
                self.execute(flight.qp, peer);
            }
            _ => {
                self.qps[flight.qp].stuck = true;
                let at = self.now.plus(self.options.retry_time);
                self.fly(at, Kind::GiveUp, flight.qp, flight.number, flight.request);
            }
        }
    }

    /// A packet of the head is lost: the device sends again when no acknowledgement came.
    fn lose(&mut self, flight: &Flight) {
        let ours = &mut self.qps[flight.qp];
        ours.losses += 1;
        if ours.losses > RETRIES {
            return self.fail(flight.qp, WcStatus::RETRY_EXC_ERR);
        }
        ours.stuck = true;
        let at = self.now.plus(self.options.retry_time.max(TRIES_AGAIN));
        self.fly(
            Nanos(self.now.0 + (at.0 - self.now.0) / u64::from(RETRIES)),
            Kind::GiveUp,
            flight.qp,
            flight.number,
            flight.request,
        );
    }

    /// Whether a port between two queue pairs lets no packet of that size pass any more.
    fn is_too_large(&self, qp: usize, peer: usize, request: &WorkRequest) -> bool {
        let passes = self.nics[self.qps[qp].nic].mtu.min(self.nics[self.qps[peer].nic].mtu);
        let packet = self.qps[qp].rtr.map_or(0, |rtr| rtr.path_mtu.bytes()).min(request.len);
        packet > passes.bytes()
    }

    /// A WRITE that was flushed lands all the same, if the peer's end still takes it. Nobody is told.
    fn arrive_late(&mut self, flight: &Flight) {
        if let Some(peer) = self.peer_of(flight.qp) {
            if self.qps[flight.qp].met.is_some_and(|met| met != peer) {
                self.strays += 1;
            }
            let _ = self.move_bytes(flight.qp, peer, &flight.request);
        }
    }

    fn give_up(&mut self, flight: &Flight) {
        let qp = &self.qps[flight.qp];
        let waiting = qp.queue.front().is_some_and(|&(head, _)| head == flight.number);
        if qp.state != State::Rts || !qp.stuck || !waiting {
            return;
        }
        if self.peer_of(flight.qp).is_some_and(|peer| !self.is_too_large(flight.qp, peer, &flight.request)) {
            // The path came back in time: the retry got through, and what waited behind it follows.
            self.qps[flight.qp].stuck = false;
            for index in 0..self.qps[flight.qp].queue.len() {
                let (number, request) = self.qps[flight.qp].queue[index];
                self.fly(self.now, Kind::Arrive, flight.qp, number, request);
            }
            return;
        }
        if self.retries_for_ever(flight.qp) {
            let at = self.now.plus(self.options.retry_time.max(TRIES_AGAIN));
            return self.fly(at, Kind::GiveUp, flight.qp, flight.number, flight.request);
        }
        let local_down = !self.nics[self.qps[flight.qp].nic].link_up;
        let status = if local_down { WcStatus::LOC_QP_OP_ERR } else { WcStatus::RETRY_EXC_ERR };
        self.fail(flight.qp, status);
    }

    /// Whether the path of `qp` swallows what is sent without the device ever saying so.
    fn retries_for_ever(&self, qp: usize) -> bool {
        let swallowing = &self.nics[self.qps[qp].nic].swallowing;
        self.far_end(qp).is_some_and(|theirs| swallowing.contains(&self.qps[theirs].nic))
    }

    /// The queue pair that `qp` names as its other end, whatever that one thinks of it.
    fn far_end(&self, qp: usize) -> Option<usize> {
        self.by_number.get(&self.qps[qp].rtr?.dest_qpn).copied()
    }

    /// The queue pair at the other end, if packets reach it and it takes them.
    fn peer_of(&self, qp: usize) -> Option<usize> {
        let ours = &self.qps[qp];
        let (rtr, rts) = (ours.rtr?, ours.rts?);
        let peer = self.far_end(qp)?;
        let theirs = &self.qps[peer];
        let (near, far) = (&self.nics[ours.nic], &self.nics[theirs.nic]);
        let theirs_rtr = theirs.rtr?;
        let source = near.gids.iter().find(|g| g.index == rtr.sgid_index)?;
        let reaches =
            near.link_up && far.link_up && near.alive && far.alive && !far.frozen && !near.cut.contains(&theirs.nic);
        let addressed = far.gids.iter().any(|g| g.gid == rtr.dest_gid) && theirs_rtr.dest_gid == source.gid;
        let paired = theirs_rtr.dest_qpn == ours.qpn && theirs_rtr.rq_psn.get() == rts.sq_psn.get();
        let takes = matches!(theirs.state, State::Rtr | State::Rts);
        (reaches && addressed && paired && takes).then_some(peer)
    }

    /// Does the request at the head of `qp`, and completes it.
    fn execute(&mut self, qp: usize, peer: usize) {
        let Some((_, mut request)) = self.qps[qp].queue.front().copied() else { return };
        let cut = self.options.cuts_reads
            && request.op == Op::Read
            && request.len > 1
            && self.nics[self.qps[qp].nic].cutting.contains(&self.qps[peer].nic);
        if cut {
            request.len /= 2;
        }
        match self.move_bytes(qp, peer, &request) {
            Ok(()) => {
                self.qps[qp].queue.pop_front();
                self.qps[qp].losses = 0;
                self.qps[qp].met.get_or_insert(peer);
                if request.signaled {
                    self.complete(qp, &request, WcStatus::SUCCESS);
                }
                if cut {
                    self.qps[qp].state = State::Err;
                    self.flush(qp);
                }
            }
            Err(status) => self.fail(qp, status),
        }
    }

    fn move_bytes(&self, qp: usize, peer: usize, request: &WorkRequest) -> Result<(), WcStatus> {
        if request.len == 0 {
            return Ok(());
        }
        let mtu = |qp: usize| self.qps[qp].rtr.map(|a| a.path_mtu);
        if mtu(qp) != mtu(peer) && request.len > mtu(qp).min(mtu(peer)).map_or(0, Mtu::bytes) {
            return Err(if request.op == Op::Write { WcStatus::REM_INV_REQ_ERR } else { WcStatus::RETRY_EXC_ERR });
        }
        let len = u64::from(request.len);
        let near = self.range(request.lkey.0, self.qps[qp].nic, request.local, len, false);
        let (near, near_offset) = near.ok_or(WcStatus::LOC_PROT_ERR)?;
        let far = self.range(request.rkey.0, self.qps[peer].nic, request.remote.0, len, true);
        let (far, far_offset) = far.ok_or(WcStatus::REM_ACCESS_ERR)?;
        let moved = match request.op {
            Op::Read => near.copy_from(near_offset, far, far_offset, len),
            Op::Write => far.copy_from(far_offset, near, near_offset, len),
        };
        moved.map_err(|_| WcStatus::LOC_PROT_ERR)
    }

    fn range(&self, key: u32, nic: usize, addr: u64, len: u64, remote: bool) -> Option<(&Memory, u64)> {
        let mr = self.memory.get(&key).filter(|mr| mr.nic == nic && (mr.remote || !remote))?;
        let offset = addr.checked_sub(mr.memory.addr())?;
        let inside = offset >= mr.offset && offset.checked_add(len)? <= mr.offset + mr.len;
        inside.then_some((&mr.memory, offset))
    }

    /// The head fails with `status`, everything behind it is flushed.
    fn fail(&mut self, qp: usize, status: WcStatus) {
        if let Some((number, request)) = self.qps[qp].queue.pop_front() {
            self.keep_back(qp, number, request);
            self.complete(qp, &request, status);
        }
        self.qps[qp].state = State::Err;
        self.flush(qp);
    }

    fn flush(&mut self, qp: usize) {
        while let Some((number, request)) = self.qps[qp].queue.pop_front() {
            self.keep_back(qp, number, request);
            self.complete(qp, &request, WcStatus::WR_FLUSH_ERR);
        }
    }

    /// The network may still hold packets of a WRITE that its sender has given up.
    fn keep_back(&mut self, qp: usize, number: u64, request: WorkRequest) {
        if request.op == Op::Write && self.random.chance(self.options.late_writes) {
            let at = self.now.plus(Nanos(self.random.below(self.options.late_by.0 + 1)));
            self.fly(at, Kind::Late, qp, number, request);
        }
    }

    fn complete(&mut self, qp: usize, request: &WorkRequest, status: WcStatus) {
        let qpn = self.qps[qp].qpn;
        let vendor_err = if status == WcStatus::SUCCESS { 0 } else { 0x51 };
        let cq = &mut self.cqs[self.qps[qp].cq];
        if cq.entries.len() >= cq.depth {
            cq.overrun = true;
            self.overruns += 1;
            return;
        }
        // Those of different queue pairs come in any order.
        let mut place = cq.entries.len();
        while place > 0 && cq.entries[place - 1].qpn != qpn && self.random.below(2) == 0 {
            place -= 1;
        }
        cq.entries.insert(place, Completion { wr_id: request.wr_id, status, vendor_err, qpn });
    }

    pub(super) fn cuts_reads(&self) -> bool {
        self.options.cuts_reads
    }

    pub(super) fn is_in_error(&self, qp: usize) -> bool {
        self.qps[qp].state == State::Err
    }

    pub(super) fn ledger(&self) -> SimLedger {
        SimLedger {
            queue_pairs: self.qps.iter().filter(|q| q.state != State::Destroyed).count(),
            registrations: self.memory.len(),
            overruns: self.overruns,
            strays: self.strays,
        }
    }
}

/// Both keys of a registration are one number here.
pub(super) fn keys(key: u32) -> (Lkey, Rkey) {
    (Lkey(key), Rkey(key))
}
