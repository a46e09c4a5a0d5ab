//! Two brains and what is between them: a network that may lose, double and keep back a few messages, device jobs that end
//! when they like, cores that try rails out, fail on them and give queue pairs back, processes that die and come again.

use std::collections::{BTreeMap, VecDeque};

use moonrail_datapath::core::port::{CoreEvent, RailKey};
use moonrail_datapath::error::FirstError;
use moonrail_datapath::nic::{AsyncEvent, Op, PostHalf, WcStatus};
use moonrail_datapath::units::{CoreId, Nanos, NicId, PeerId, PortNum, Qpn, RemoteAddr};

use super::device::{self, Shared, lock};
use super::explore::World;
use crate::brain::rail::Rail;
use crate::brain::{Brain, ConnId, Event, Token};
use crate::connect::Job;
use crate::error::DialError;
use crate::wire::{Frame, Hello};

/// Time that one [`Step::Tick`] may take, in ticks of the brains' own timers, before it counts as leading nowhere.
const HOPS: u32 = 200;

/// What may happen, and how often.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Plan {
    /// Which of the two wants to move bytes.
    pub(super) wants: [bool; 2],
    /// Messages that are lost.
    pub(super) losses: u8,
    /// Requests that arrive twice.
    pub(super) doubles: u8,
    /// Requests that arrive after their sender has given up.
    pub(super) lates: u8,
    /// Processes that die and start again.
    pub(super) restarts: u8,
    /// First errors of rails that work, with WRITEs outstanding.
    pub(super) failures: u8,
    /// Ports that go down and up.
    pub(super) ports: u8,
    /// Times that everything takes as long as the brains' next timer, whatever is to be done.
    pub(super) pauses: u8,
    /// Jobs that take their time; others end at once.
    pub(super) slow: Slow,
    pub(super) rules: Rules,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Slow {
    pub(super) connect: bool,
    pub(super) fail: bool,
}

/// What driver, device and cores keep to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Rules {
    /// A job says that queue pairs are in ERR only when they are.
    pub(super) err_is_err: bool,
    /// Each exchange has an end.
    pub(super) exchanges_end: bool,
    /// A port that comes back says so.
    pub(super) ports_speak: bool,
}

pub(super) const KEPT: Rules = Rules { err_is_err: true, exchanges_end: true, ports_speak: true };

/// Where a message is.
pub(super) enum At {
    Request,
    Asked(ConnId),
    Reply(Frame),
    /// Nothing will come.
    Lost,
}

/// One request and its reply.
pub(super) struct Exchange {
    pub(super) from: usize,
    /// The sender's process.
    pub(super) process: u32,
    pub(super) to: usize,
    pub(super) token: Token,
    pub(super) frame: Frame,
    pub(super) hello: Hello,
    pub(super) at: At,
    pub(super) deadline: Nanos,
    /// Its sender still waits.
    pub(super) waits: bool,
}

/// A queue pair with a core.
pub(super) struct Adopted {
    pub(super) key: RailKey,
    pub(super) qpn: u32,
    pub(super) half: Option<PostHalf>,
    pub(super) over: bool,
    pub(super) proven: bool,
    pub(super) needs_fence: bool,
    /// Process of the peer, and the number there, that it leads to.
    pub(super) far: (u32, u32),
}

pub(super) struct Node {
    pub(super) process: u32,
    pub(super) brain: Brain,
    pub(super) jobs: Vec<Job>,
    pub(super) core: Vec<Adopted>,
    pub(super) port_up: bool,
    pub(super) calls: u64,
}

#[derive(Clone, Debug)]
pub(super) enum Step {
    /// The request arrives.
    Deliver(usize),
    /// The reply arrives.
    Reply(usize),
    /// Either is lost.
    Lose(usize),
    /// The request will arrive twice.
    Double(usize),
    /// Its sender gives up; the request may still arrive.
    Late(usize),
    /// Its sender hears that nothing came.
    Expire(usize),
    /// A node's oldest job ends.
    Job(usize),
    /// A core's trial of this queue pair comes back, or fails.
    Trial(usize, usize),
    /// A queue pair fails with a WRITE outstanding.
    Fail(usize, usize),
    /// A core gives a queue pair back.
    Drain(usize, usize),
    /// A process dies, and another starts in its place.
    Restart(usize),
    /// A node's port goes down, or up.
    Port(usize),
    /// Time passes until something happens by itself.
    Tick,
}

pub(super) struct Pair {
    pub(super) plan: Plan,
    pub(super) now: Nanos,
    pub(super) nodes: Vec<Node>,
    pub(super) net: Vec<Exchange>,
    pub(super) fabric: Shared,
    pub(super) store: BTreeMap<String, Vec<u8>>,
    pub(super) at_once: VecDeque<(usize, u32, Event)>,
    pub(super) conns: u64,
    pub(super) broken: Option<String>,
}

impl Pair {
    pub(super) fn new(plan: &Plan) -> Self {
        let mut pair = Self {
            plan: *plan,
            now: Nanos::from_secs(1),
            nodes: vec![],
            net: vec![],
            fabric: Shared::default(),
            store: BTreeMap::new(),
            at_once: VecDeque::new(),
            conns: 0,
            broken: None,
        };
        pair.nodes = vec![Self::boot(0, 0), Self::boot(1, 0)];
        for node in 0..2 {
            pair.begin(node);
        }
        for node in 0..2 {
            pair.open(node);
        }
        pair
    }

    pub(super) fn id(&self, node: usize, qp: &Adopted) -> device::Id {
        (node, self.nodes[node].process, qp.qpn)
    }

    fn first_error(&mut self, node: usize, at: usize, proven: bool) {
        let qp = &mut self.nodes[node].core[at];
        qp.over = true;
        qp.needs_fence = proven;
        let error = FirstError {
            peer: PeerId(0),
            qpn: Qpn::new(qp.qpn).unwrap_or_default(),
            status: WcStatus::RETRY_EXC_ERR,
            vendor_err: 0,
            op: Op::Write,
            local: 0,
            remote: RemoteAddr(0),
            len: 0,
            age: Nanos::ZERO,
            behind: 0,
            proven,
        };
        let event = CoreEvent::FirstError { key: qp.key, error };
        self.tell(node, Event::Core { core: CoreId(0), event });
    }

    /// Time passes, timer by timer, until what can be seen is another; not beyond what somebody is promised an answer for.
    fn tick(&mut self) {
        let before = self.fingerprint();
        for _ in 0..HOPS {
            let Some(next) = self.nodes.iter().filter_map(|node| node.brain.next_timeout()).min() else { return };
            if self.net.iter().any(|x| x.waits && x.deadline <= next) {
                return;
            }
            self.now = self.now.max(next);
            for node in 0..2 {
                // What waits for a rail goes on waiting.
                if self.plan.wants[node] && !self.nodes[node].brain.rails.iter().any(Rail::is_proven) {
                    let event = CoreEvent::Wanted { peer: PeerId(0) };
                    self.tell(node, Event::Core { core: CoreId(0), event });
                }
                if self.nodes[node].brain.next_timeout().is_some_and(|at| at <= self.now) {
                    self.tell(node, Event::Timer);
                }
            }
            if self.fingerprint() != before {
                return;
            }
        }
    }

    fn restart(&mut self, node: usize) {
        let process = self.nodes[node].process;
        lock(&self.fabric).kill(node, process);
        for exchange in &mut self.net {
            exchange.waits &= exchange.from != node;
            if exchange.to == node && matches!(exchange.at, At::Asked(_)) {
                exchange.at = At::Lost;
            }
        }
        self.net.retain(|x| x.waits || matches!(x.at, At::Request | At::Asked(_)));
        self.nodes[node] = Self::boot(node, process + 1);
        self.begin(node);
        self.open(node);
    }
}

impl World for Pair {
    type Step = Step;
    type Key = Vec<u64>;

    fn steps(&self) -> Vec<Step> {
        let mut steps = vec![];
        let plan = &self.plan;
        for (at, exchange) in self.net.iter().enumerate() {
            match &exchange.at {
                At::Request => {
                    steps.push(Step::Deliver(at));
                    if plan.doubles > 0 {
                        steps.push(Step::Double(at));
                    }
                    if plan.losses > 0 || !exchange.waits {
                        steps.push(Step::Lose(at));
                    }
                }
                At::Reply(_) => {
                    steps.push(Step::Reply(at));
                    if plan.losses > 0 {
                        steps.push(Step::Lose(at));
                    }
                }
                At::Lost if plan.rules.exchanges_end => steps.push(Step::Expire(at)),
                At::Asked(_) | At::Lost => {}
            }
            if plan.lates > 0 && exchange.waits && matches!(exchange.at, At::Request | At::Asked(_)) {
                steps.push(Step::Late(at));
            }
        }
        let fabric = lock(&self.fabric);
        for (node, state) in self.nodes.iter().enumerate() {
            if !state.jobs.is_empty() {
                steps.push(Step::Job(node));
            }
            for (at, qp) in state.core.iter().enumerate().filter(|(_, qp)| qp.half.is_some()) {
                let id = self.id(node, qp);
                if qp.over {
                    if !qp.needs_fence || fabric.qps.get(&id).is_none_or(|qp| qp.in_error) || !plan.rules.err_is_err {
                        steps.push(Step::Drain(node, at));
                    }
                } else if !qp.proven {
                    steps.push(Step::Trial(node, at));
                } else if plan.failures > 0 || plan.wants[node] && !fabric.is_paired(id) {
                    steps.push(Step::Fail(node, at));
                }
            }
            if plan.restarts > 0 {
                steps.push(Step::Restart(node));
            }
            if plan.ports > 0 || !state.port_up {
                steps.push(Step::Port(node));
            }
        }
        drop(fabric);
        let prompt = self.is_prompt();
        if !prompt {
            // The brain keeps it until something happens, and that is time.
            let kept = (0..self.net.len()).filter(|at| self.net[*at].waits && plan.lates == 0);
            steps.extend(kept.map(Step::Late));
        }
        if !prompt || plan.pauses > 0 {
            steps.push(Step::Tick);
        }
        steps
    }

    fn take(&mut self, step: &Step) {
        match *step {
            Step::Deliver(at) => {
                self.conns += 1;
                let (conn, to, frame) = (ConnId(self.conns), self.net[at].to, self.net[at].frame.clone());
                self.net[at].at = At::Asked(conn);
                self.tell(to, Event::Request { conn, frame });
            }
            Step::Reply(at) => {
                let Exchange { from, token, at, .. } = self.net.remove(at);
                if let At::Reply(frame) = at {
                    self.tell(from, Event::Dialed { token, result: Ok(frame) });
                }
            }
            Step::Lose(at) => {
                if self.net[at].waits {
                    self.plan.losses -= 1;
                    self.net[at].at = At::Lost;
                } else {
                    self.net.remove(at);
                }
            }
            Step::Double(at) => {
                self.plan.doubles -= 1;
                let Exchange { from, process, to, token, frame, hello, deadline, .. } = &self.net[at];
                let (frame, hello) = (frame.clone(), hello.clone());
                let (from, process, to, token, deadline) = (*from, *process, *to, *token, *deadline);
                let at = At::Request;
                self.net.push(Exchange { from, process, to, token, frame, hello, at, deadline, waits: false });
            }
            Step::Late(at) => {
                self.plan.lates = self.plan.lates.saturating_sub(1);
                self.net[at].waits = false;
                self.silence(at);
            }
            Step::Expire(at) => {
                self.silence(at);
                let at = self.net.iter().position(|x| matches!(x.at, At::Lost) && !x.waits);
                if let Some(at) = at {
                    self.net.remove(at);
                }
            }
            Step::Job(node) => {
                let job = self.nodes[node].jobs.remove(0);
                let done = self.run(node, job);
                self.tell(node, Event::Job(done));
            }
            Step::Trial(node, at) => {
                let id = self.id(node, &self.nodes[node].core[at]);
                if lock(&self.fabric).is_paired(id) {
                    self.nodes[node].core[at].proven = true;
                    let event = CoreEvent::Proven { key: self.nodes[node].core[at].key };
                    self.tell(node, Event::Core { core: CoreId(0), event });
                } else {
                    self.first_error(node, at, false);
                }
            }
            Step::Fail(node, at) => {
                let id = self.id(node, &self.nodes[node].core[at]);
                let paired = lock(&self.fabric).is_paired(id);
                self.plan.failures -= u8::from(paired);
                self.first_error(node, at, true);
            }
            Step::Drain(node, at) => {
                let qp = &mut self.nodes[node].core[at];
                let (key, needs_fence) = (qp.key, qp.needs_fence);
                if let Some(qp) = qp.half.take() {
                    let event = CoreEvent::Drained { key, qp, flushed: 0, needs_fence };
                    self.tell(node, Event::Core { core: CoreId(0), event });
                }
            }
            Step::Restart(node) => {
                self.plan.restarts -= 1;
                self.restart(node);
            }
            Step::Port(node) => {
                let up = !self.nodes[node].port_up;
                self.nodes[node].port_up = up;
                self.plan.ports -= u8::from(!up);
                let event = if up { AsyncEvent::PortActive(PortNum(1)) } else { AsyncEvent::PortError(PortNum(1)) };
                if self.plan.rules.ports_speak || !up {
                    self.tell(node, Event::Nic { nic: NicId(0), event });
                }
            }
            Step::Tick => {
                self.plan.pauses -= u8::from(self.is_prompt());
                self.tick();
            }
        }
    }

    fn key(&self) -> Vec<u64> {
        self.fingerprint()
    }

    fn check(&self) -> Result<(), String> {
        self.broken_law()
    }

    fn is_over(&self) -> bool {
        let fabric = lock(&self.fabric);
        let whole = |node: usize| {
            let state = &self.nodes[node];
            let rails = &state.brain.rails;
            let alive = fabric.qps.keys().filter(|id| id.0 == node).count();
            let works = |qp: &Adopted| qp.proven && !qp.over && fabric.is_paired(self.id(node, qp));
            rails.len() == 1
                && rails[0].is_proven()
                && rails[0].old.is_empty()
                && state.core.iter().any(works)
                && alive == 1
                && state.jobs.is_empty()
        };
        self.net.is_empty() && whole(0) && whole(1)
    }
}

impl Pair {
    /// Whether something is to be done that takes no time, unless there is a pause. Late copies may come at any time.
    fn is_prompt(&self) -> bool {
        let fabric = lock(&self.fabric);
        let core = |node: usize, qp: &Adopted| {
            let unpaired = || self.plan.wants[node] && !fabric.is_paired(self.id(node, qp));
            qp.half.is_some() && (qp.over || !qp.proven || unpaired())
        };
        let busy = |(node, state): (usize, &Node)| !state.jobs.is_empty() || state.core.iter().any(|qp| core(node, qp));
        self.net.iter().any(|x| x.waits && !matches!(x.at, At::Asked(_))) || self.nodes.iter().enumerate().any(busy)
    }

    /// The sender of an exchange hears that nothing came.
    fn silence(&mut self, at: usize) {
        self.net[at].waits = false;
        let Exchange { from, token, .. } = self.net[at];
        let result = Err(DialError::ReplyTimeout { address: "peer".into() });
        self.tell(from, Event::Dialed { token, result });
    }
}
