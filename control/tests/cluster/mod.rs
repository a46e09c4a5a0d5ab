//! Whole nodes in one seeded world: brains, cores and simulated NICs, a store, and a network for the handshake.
//!
//! Nothing here knows how an engine works inside: it does what the actions say, with delays, losses and doubles that the
//! seed chooses, and moves the clock.
#![allow(dead_code)] // each test uses a part

mod store;
mod uses;

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap};
use std::sync::Arc;
use std::time::SystemTime;

use moonrail_control::brain::{
    Action, Answer, Brain, BrainConfig, BrainNic, Call, CallId, ConnId, Event, StoreOp, Token,
};
use moonrail_control::connect::{JobKind, NicFacts};
use moonrail_control::fabric::FabricPolicy;
use moonrail_control::gid;
use moonrail_control::metadata::{BufferEntry, KeySpace, PriorityMatrix, RpcMeta};
use moonrail_control::wire::{Frame, Incarnation};
use moonrail_control::{ControlNic, DialError, RailOptions, RailReport, RailState, RemoteSegment};
use moonrail_datapath::core::port::Command;
use moonrail_datapath::core::{Core, CoreConfig, CoreCounters, Doorbell, Inbox, Outbox, dispatch};
use moonrail_datapath::nic::sim::{SimNicId, SimOptions, SimWorld};
use moonrail_datapath::nic::{Access, CqHandle, Op};
use moonrail_datapath::random::Random;
use moonrail_datapath::region::{Chunk, Memory, Region};
use moonrail_datapath::slice::{Extent, SliceRule, Slices, find_extent, tile};
use moonrail_datapath::units::{CoreId, Gid, Nanos, NicId, RemoteAddr};
use moonrail_datapath::work::{Completion, Lens, Work, WorkParts};

/// What may go wrong between the nodes, in percent.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub(crate) struct Weather {
    /// Requests of the handshake that never arrive.
    pub(crate) lost_requests: u64,
    /// Replies that never arrive.
    pub(crate) lost_replies: u64,
    /// Requests that arrive twice.
    pub(crate) doubled: u64,
    /// Requests that arrive only when their sender no longer waits, up to four seconds late.
    pub(crate) late: u64,
    /// Requests and replies with a byte that is no text any more.
    pub(crate) corrupted: u64,
    /// Operations of the store that fail.
    pub(crate) store_errors: u64,
    /// Changes of the store that its watchers do not hear of.
    pub(crate) missed_changes: u64,
    /// Device jobs that block for a second, as RTR does where a neighbour is slow to answer.
    pub(crate) slow_jobs: u64,
    /// Longest that a request or a reply of the handshake is under way, beyond half a millisecond.
    pub(crate) words_take: Nanos,
    /// Turns that a core misses.
    pub(crate) missed_turns: u64,
}

/// Something that reaches a node later.
enum Delivery {
    Event(Event),
    /// A request on the handshake port, from (node, token).
    Dial {
        from: usize,
        life: u32,
        token: Token,
        host: String,
        port: u16,
        frame: Frame,
    },
    Store {
        op: StoreOp,
        token: Token,
    },
    Job(Box<moonrail_control::connect::Job>),
}

struct Later {
    at: Nanos,
    order: u64,
    node: usize,
    life: u32,
    what: Delivery,
}

impl PartialEq for Later {
    fn eq(&self, other: &Self) -> bool {
        (self.at, self.order) == (other.at, other.order)
    }
}
impl Eq for Later {}
impl PartialOrd for Later {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for Later {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (self.at, self.order).cmp(&(other.at, other.order))
    }
}

/// One life of one node.
pub(crate) struct Node {
    pub(crate) name: String,
    pub(crate) life: u32,
    brain: Brain,
    cores: Vec<Core>,
    pub(crate) inboxes: Arc<[Arc<Inbox>]>,
    outboxes: Vec<Arc<Outbox>>,
    nics: Vec<ControlNic>,
    pub(crate) nic_ids: Vec<SimNicId>,
    pub(crate) region: Arc<Region>,
    answers: BTreeMap<CallId, Answer>,
    /// Its start, of which nobody has asked yet what came.
    beginning: Option<CallId>,
    watched: BTreeSet<String>,
    calls: u64,
    pub(crate) alive: bool,
    /// Stopped as a whole machine; what reaches it meanwhile waits in `held`.
    pub(crate) frozen: bool,
    held: Vec<Later>,
    pub(crate) exited: bool,
    pub(crate) log: Vec<String>,
    pub(crate) counters: Vec<Arc<CoreCounters>>,
}

pub(crate) struct Cluster {
    pub(crate) world: SimWorld,
    pub(crate) now: Nanos,
    pub(crate) nodes: Vec<Node>,
    pub(crate) choices: Random,
    pub(crate) weather: Weather,
    pub(crate) store: BTreeMap<String, Vec<u8>>,
    pub(crate) store_down: bool,
    later: BinaryHeap<Reverse<Later>>,
    /// Inbound connection → who asked.
    conns: BTreeMap<ConnId, (usize, u32, Token)>,
    order: u64,
    size: (u8, u16),
    memory: usize,
    p2p: bool,
    pub(crate) rails: RailOptions,
    idle_turns: u64,
    /// `SIM_LOG=1`: every line of a log and every message is printed with its virtual time.
    trace: bool,
}

const PORT: u16 = 15_000;
const SECOND: Nanos = Nanos::from_secs(1);
/// A step is no longer than this while cores have something to do…
const BUSY_STEP: Nanos = Nanos::from_millis(1);
/// …and no longer than this otherwise.
const IDLE_STEP: Nanos = Nanos::from_millis(10);

fn gid(node: usize, nic: u8) -> Gid {
    let mut bytes = [0; 16];
    (bytes[10], bytes[11], bytes[12], bytes[14], bytes[15]) = (0xff, 0xff, 10, nic, node as u8 + 1);
    Gid(bytes)
}

impl Cluster {
    /// `nodes` nodes of `nics` NICs and `cores` cores each, started and published.
    pub(crate) fn new(seed: u64, nodes: usize, nics: u8, cores: u16, p2p: bool) -> Self {
        Self::with(SimOptions::default(), seed, nodes, nics, cores, p2p)
    }

    /// The same where the network is another.
    pub(crate) fn with(options: SimOptions, seed: u64, nodes: usize, nics: u8, cores: u16, p2p: bool) -> Self {
        Self::sized(4 << 20, options, seed, nodes, nics, cores, p2p)
    }

    /// The same where each node has `memory` bytes.
    pub(crate) fn sized(
        memory: usize,
        options: SimOptions,
        seed: u64,
        nodes: usize,
        nics: u8,
        cores: u16,
        p2p: bool,
    ) -> Self {
        let mut cluster = Self {
            world: SimWorld::new(seed, options),
            now: Nanos::from_millis(1),
            nodes: vec![],
            choices: Random::new(seed),
            weather: Weather::default(),
            store: BTreeMap::new(),
            store_down: false,
            later: BinaryHeap::new(),
            conns: BTreeMap::new(),
            order: 0,
            size: (nics, cores),
            memory,
            p2p,
            rails: RailOptions::default(),
            idle_turns: 0,
            trace: std::env::var_os("SIM_LOG").is_some(),
        };
        for index in 0..nodes {
            let node = cluster.boot(index, 0);
            cluster.nodes.push(node);
            cluster.begin(index);
        }
        cluster
    }

    fn boot(&mut self, index: usize, life: u32) -> Node {
        let host = format!("node{index}");
        let name = if self.p2p { format!("{host}:{PORT}") } else { host.clone() };
        let (nics, cores) = self.size;
        let mut control_nics = vec![];
        let mut nic_ids = vec![];
        let mut queues: Vec<Vec<_>> = (0..cores).map(|_| vec![]).collect();
        for n in 0..nics {
            let machine = format!("{host}.{life}");
            let (nic, id) = self.world.nic(&machine, &format!("sim{n}"), gid(index, n));
            let mut cqs: Vec<Option<CqHandle>> = vec![];
            for queue in &mut queues {
                let (cq, handle) = nic.create_cq(4096).unwrap();
                queue.push((NicId(n.into()), cq));
                cqs.push(Some(handle));
            }
            let choice = gid::choose(&nic.gids().unwrap(), None).unwrap();
            control_nics.push(ControlNic { nic, gid: Some(choice), cqs });
            nic_ids.push(id);
        }
        let doorbell = Arc::new(Doorbell::new().unwrap());
        let inboxes: Arc<[Arc<Inbox>]> = (0..cores).map(|c| Inbox::new(CoreId(c)).unwrap()).collect();
        let outboxes: Vec<_> = (0..cores).map(|_| Outbox::new(doorbell.clone())).collect();
        let counters: Vec<Arc<CoreCounters>> = (0..cores).map(|_| Arc::default()).collect();
        let cores = queues.into_iter().enumerate().map(|(c, nics)| {
            Core::new(CoreConfig {
                id: CoreId(c as u16),
                inbox: inboxes[c].clone(),
                outbox: outboxes[c].clone(),
                cores: inboxes.clone(),
                nics,
                counters: counters[c].clone(),
            })
        });
        let cores: Vec<Core> = cores.collect();
        let memory = Memory::allocate(self.memory).unwrap();
        let access = Access { remote: true, relaxed_ordering: false };
        let register = |n: &ControlNic| Some(n.nic.register(&memory, 0, memory.len(), access).unwrap().into());
        let chunk = Chunk { addr: memory.addr(), len: memory.len(), keys: control_nics.iter().map(register).collect() };
        let region = Arc::new(Region::new(memory, vec![chunk], "cpu:0".into(), true));
        let facts = |n: &ControlNic| {
            let port = n.nic.query_port().unwrap();
            let gid = n.gid.as_ref().unwrap();
            NicFacts {
                state: port.state,
                link_layer: port.link_layer,
                lid: port.lid,
                active_mtu: port.active_mtu.unwrap(),
                gid: gid.gid,
                kind: gid.kind,
                index: Some(gid.index),
            }
        };
        let brain_nics = control_nics.iter().map(|n| BrainNic {
            name: n.nic.name().to_owned(),
            fabric: n.nic.fabric(),
            offer: n.nic.offer(),
            facts: facts(n),
            fixed_gid: false,
            cores: (0..cores.len() as u16).map(CoreId).collect(),
        });
        let names: Vec<String> = control_nics.iter().map(|n| n.nic.name().to_owned()).collect();
        let brain = Brain::new(BrainConfig {
            name: name.clone(),
            store: (!self.p2p).then(KeySpace::default),
            metadata: "the simulated store".into(),
            rpc: RpcMeta { ip_or_host_name: host, rpc_port: PORT },
            incarnation: Incarnation(self.choices.below(u64::MAX)),
            boot_id: Some(format!("boot-{index}")),
            seed: self.choices.below(u64::MAX),
            epoch: SystemTime::UNIX_EPOCH,
            nics: brain_nics.collect(),
            cores: cores.len() as u16,
            matrix: PriorityMatrix::parse(&format!("{{\"cpu:0\": [[\"{}\"], []]}}", names.join("\",\""))).unwrap(),
            rails: self.rails.clone(),
            fabrics: FabricPolicy::default(),
            dial_timeout: Nanos::from_secs(2),
            store_timeout: Nanos::from_secs(1),
        });
        Node {
            name,
            life,
            brain,
            cores,
            inboxes,
            outboxes,
            nics: control_nics,
            nic_ids,
            region,
            answers: BTreeMap::new(),
            beginning: None,
            watched: BTreeSet::new(),
            calls: 0,
            alive: true,
            frozen: false,
            held: vec![],
            exited: false,
            log: vec![],
            counters,
        }
    }

    fn begin(&mut self, node: usize) {
        let both = self.publish(node);
        assert!(self.run_until(Nanos::from_secs(10), |c| both.iter().all(|id| c.nodes[node].answers.contains_key(id))));
    }

    fn publish(&mut self, node: usize) -> [CallId; 2] {
        let begun = self.call(node, Call::Begin, Nanos::from_secs(5));
        let keys = self.nodes[node].region.chunks()[0].keys.iter().flatten();
        let (lkeys, rkeys) = keys.map(|k| (k.lkey, k.rkey)).unzip();
        let region = &self.nodes[node].region;
        let entry = BufferEntry {
            name: region.location().into(),
            addr: region.memory().addr(),
            length: region.memory().len(),
            lkeys,
            rkeys,
        };
        [begun, self.call(node, Call::Publish(vec![entry]), Nanos::from_secs(5))]
    }

    /// Kills a node without a word.
    pub(crate) fn kill(&mut self, node: usize) {
        let machine = self.machine(node);
        self.nodes[node].alive = false;
        self.nodes[node].frozen = false;
        self.world.kill_node(&machine);
        self.world.freeze_node(&machine, false);
        // Its queue pairs go with it, also those that a job had.
        self.later.retain(|Reverse(later)| later.node != node || !matches!(later.what, Delivery::Job(_)));
    }

    /// Kills a node without a word, unless it is dead, and starts it again under its name.
    pub(crate) fn restart(&mut self, node: usize) {
        self.kill(node);
        self.boot_again(node);
        self.begin(node);
    }

    /// Starts a dead node under its name, and waits for nothing.
    pub(crate) fn start_again(&mut self, node: usize) {
        self.boot_again(node);
        self.nodes[node].beginning = Some(self.publish(node)[0]);
    }

    /// Whether a node could not start: its program would end with the error.
    pub(crate) fn has_failed_to_start(&mut self, node: usize) -> bool {
        let node = &mut self.nodes[node];
        let answer = node.beginning.and_then(|id| node.answers.remove(&id));
        node.beginning.take_if(|_| answer.is_some());
        matches!(answer, Some(Answer::Begun(Err(_))))
    }

    fn boot_again(&mut self, node: usize) {
        let life = self.nodes[node].life + 1;
        let fresh = self.boot(node, life);
        self.nodes[node] = fresh;
    }

    pub(crate) fn call(&mut self, node: usize, call: Call, within: Nanos) -> CallId {
        let id = CallId(self.nodes[node].calls);
        self.nodes[node].calls += 1;
        let until = self.now.plus(within);
        self.tell(node, Event::Call { id, call, until });
        id
    }

    pub(crate) fn take_answer(&mut self, node: usize, id: CallId) -> Option<Answer> {
        self.nodes[node].answers.remove(&id)
    }

    /// Stops a node as its whole machine is stopped: it does nothing, and what reaches it waits.
    pub(crate) fn freeze(&mut self, node: usize) {
        self.nodes[node].frozen = true;
        self.world.freeze_node(&self.machine(node), true);
    }

    /// Lets it go on.
    pub(crate) fn thaw(&mut self, node: usize) {
        self.nodes[node].frozen = false;
        self.world.freeze_node(&self.machine(node), false);
        for mut later in std::mem::take(&mut self.nodes[node].held) {
            later.at = self.now;
            self.later.push(Reverse(later));
        }
    }

    fn machine(&self, node: usize) -> String {
        format!("node{node}.{}", self.nodes[node].life)
    }

    fn happens(&mut self, percent: u64) -> bool {
        percent > 0 && self.choices.below(100) < percent
    }

    fn corrupt(&mut self, frame: &mut Frame) {
        if self.happens(self.weather.corrupted) && !frame.body.is_empty() {
            let at = self.choices.below(frame.body.len() as u64) as usize;
            frame.body[at] = 0xff;
        }
    }

    fn after(&mut self, delay: Nanos, node: usize, what: Delivery) {
        self.order += 1;
        let life = self.nodes.get(node).map_or(0, |n| n.life);
        self.later.push(Reverse(Later { at: self.now.plus(delay), order: self.order, node, life, what }));
    }

    fn delay(&mut self) -> Nanos {
        Nanos::from_micros(20 + self.choices.below(500))
    }

    /// Of a request or a reply of the handshake.
    fn word_delay(&mut self) -> Nanos {
        let usual = self.delay();
        match self.weather.words_take {
            Nanos::ZERO => usual,
            longest => usual.plus(Nanos(self.choices.below(longest.0))),
        }
    }

    fn tell(&mut self, node: usize, event: Event) {
        let mut out = vec![];
        self.nodes[node].brain.handle(event, self.now, &mut out);
        for action in out {
            self.act(node, action);
        }
    }

    /// For people who replay one seed.
    fn trace(&self, node: usize, action: &Action) {
        let what = match action {
            Action::Dial { token, host, frame, .. } => {
                format!("dials {host}, {token:?}: {}", String::from_utf8_lossy(&frame.body))
            }
            Action::Reply { conn, frame } => format!("replies to {conn:?}: {}", String::from_utf8_lossy(&frame.body)),
            Action::Close { conn } => format!("closes {conn:?}"),
            Action::Core { command: Command::Adopt { rail, qp }, .. } => {
                format!("adopts {:?}, {:?}", rail.key, qp.qpn())
            }
            Action::Core { command: Command::Retire { key }, .. } => format!("retires {key:?}"),
            Action::Log(record) => record.text.clone(),
            _ => return,
        };
        eprintln!("{:>12.3} ms  node {node}: {what}", self.now.0 as f64 / 1e6);
    }

    fn act(&mut self, node: usize, action: Action) {
        if self.trace {
            self.trace(node, &action);
        }
        match action {
            Action::Dial { token, host, port, frame, deadline } => {
                let life = self.nodes[node].life;
                // Whatever becomes of it, whoever asked waits no longer than this.
                let left = deadline.since(self.now);
                let silence = DialError::ReplyTimeout { address: format!("{host}:{port}") };
                self.after(left, node, Delivery::Event(Event::Dialed { token, result: Err(silence) }));
                if self.choices.below(100) < self.weather.lost_requests {
                    return;
                }
                if self.happens(self.weather.late) {
                    let delay = left.plus(Nanos(self.choices.below(Nanos::from_secs(2).0)));
                    let token = Token(u64::MAX);
                    return self.after(delay, node, Delivery::Dial { from: node, life, token, host, port, frame });
                }
                let mut frame = frame;
                self.corrupt(&mut frame);
                let twice = self.choices.below(100) < self.weather.doubled;
                for copy in 0..=u64::from(twice) {
                    // Only the first copy's reply is waited for.
                    let token = if copy == 0 { token } else { Token(u64::MAX) };
                    let (host, frame) = (host.clone(), frame.clone());
                    let delay = self.word_delay();
                    self.after(delay, node, Delivery::Dial { from: node, life, token, host, port, frame });
                }
            }
            Action::Reply { conn, mut frame } => {
                let Some((from, life, token)) = self.conns.remove(&conn) else { return };
                if self.nodes[from].life != life {
                    return;
                }
                self.corrupt(&mut frame);
                if self.choices.below(100) >= self.weather.lost_replies {
                    let delay = self.word_delay();
                    self.after(delay, from, Delivery::Event(Event::Dialed { token, result: Ok(frame) }));
                }
            }
            Action::Close { conn } => {
                let Some((from, life, token)) = self.conns.remove(&conn) else { return };
                if self.nodes[from].life == life {
                    let address = self.nodes[node].name.clone();
                    let closed = DialError::Garbage { address, why: "closed without a reply".into() };
                    let delay = self.delay();
                    self.after(delay, from, Delivery::Event(Event::Dialed { token, result: Err(closed) }));
                }
            }
            Action::Store { token, op, .. } => {
                let delay = self.delay();
                self.after(delay, node, Delivery::Store { op, token });
            }
            Action::Watch { key } => {
                self.nodes[node].watched.insert(key);
            }
            Action::Run(job) => {
                let nic = self.nodes[node].nic_ids.get(usize::from(job.nic.0));
                let unanswered = nic.is_some_and(|nic| !self.world.neighbours_answer(*nic));
                let blocks = unanswered && matches!(job.kind, JobKind::Connect { .. });
                let slow = blocks || self.happens(self.weather.slow_jobs);
                let delay = if slow { Nanos::from_secs(1) } else { self.delay() };
                self.after(delay, node, Delivery::Job(Box::new(job)));
            }
            Action::Core { core, command } => {
                let refused = self.nodes[node].inboxes[usize::from(core.0)].command(command).is_err();
                assert!(!refused, "a command ring is never full");
            }
            Action::Answer { id, answer } => {
                self.nodes[node].answers.insert(id, answer);
            }
            Action::Log(record) => self.nodes[node].log.push(format!("{:?} {}", record.level, record.text)),
            Action::Exit => self.nodes[node].exited = true,
        }
    }

    /// Tells a node, or its kernel while it is frozen.
    fn reach(&mut self, node: usize, event: Event) {
        if self.nodes[node].frozen {
            self.after(Nanos::ZERO, node, Delivery::Event(event));
        } else {
            self.tell(node, event);
        }
    }

    fn deliver(&mut self, later: Later) {
        let outbound = matches!(later.what, Delivery::Dial { .. });
        if self.nodes[later.node].frozen && !outbound {
            return self.nodes[later.node].held.push(later);
        }
        let Later { node, life, what, .. } = later;
        let gone = self.nodes[node].life != life || !self.nodes[node].alive;
        match what {
            Delivery::Dial { from, life, token, host, port, frame } => {
                let target =
                    self.nodes.iter().position(|n| n.alive && format!("node{}", host_index(n)) == host && port == PORT);
                match target {
                    Some(target) => {
                        let mut token = token;
                        if self.nodes[target].frozen {
                            // Its kernel accepts; nobody reads before it goes on.
                            token = Token(u64::MAX);
                        }
                        self.order += 1;
                        let conn = ConnId(self.order);
                        self.conns.insert(conn, (from, life, token));
                        self.reach(target, Event::Request { conn, frame });
                    }
                    None if !gone => {
                        let address = format!("{host}:{port}");
                        self.reach(from, Event::Dialed { token, result: Err(DialError::Refused { address }) });
                    }
                    None => {}
                }
            }
            _ if gone => {}
            Delivery::Event(event) => self.tell(node, event),
            Delivery::Job(job) => {
                let done = job.run(&self.nodes[node].nics);
                self.tell(node, Event::Job(done));
            }
            Delivery::Store { op, token } => self.store_op(node, op, token),
        }
    }

    /// Moves the clock to whatever happens next, at most a millisecond on, and lets everybody act.
    pub(crate) fn step(&mut self) {
        let busy = self.nodes.iter().any(|n| n.alive && n.cores.iter().any(|c| c.outstanding() > 0 || c.works() > 0));
        let mut next = self.now.plus(if busy { BUSY_STEP } else { IDLE_STEP });
        if let Some(Reverse(later)) = self.later.peek() {
            next = next.min(later.at);
        }
        next = self.world.next_event().map_or(next, |at| next.min(at));
        for node in self.nodes.iter().filter(|n| n.alive && !n.frozen) {
            next = node.brain.next_timeout().map_or(next, |at| next.min(at));
        }
        self.now = next.max(self.now.plus(Nanos(1)));
        self.world.advance(self.now);
        while self.later.peek().is_some_and(|l| l.0.at <= self.now) {
            if let Some(Reverse(later)) = self.later.pop() {
                self.deliver(later);
            }
        }
        let first = self.choices.below(self.nodes.len() as u64) as usize;
        for node in 0..self.nodes.len() {
            let node = (first + node) % self.nodes.len();
            if !self.nodes[node].alive || self.nodes[node].frozen {
                continue;
            }
            if self.nodes[node].brain.next_timeout().is_some_and(|at| at <= self.now) {
                self.tell(node, Event::Timer);
            }
            for nic in 0..self.nodes[node].nics.len() {
                while let Ok(Some(event)) = self.nodes[node].nics[nic].nic.next_async_event() {
                    self.tell(node, Event::Nic { nic: NicId(nic as u16), event });
                }
            }
            self.turn(node);
        }
    }

    /// Turns a node's cores until they have nothing to do, and passes on what they tell.
    fn turn(&mut self, node: usize) {
        for _ in 0..16 {
            let now = self.now;
            let mut done = 0;
            let cores = self.nodes[node].cores.len();
            let first = self.choices.below(cores as u64) as usize;
            for core in 0..cores {
                if !self.happens(self.weather.missed_turns) {
                    done += self.nodes[node].cores[(first + core) % cores].poll_once(now);
                }
            }
            for core in 0..self.nodes[node].outboxes.len() {
                while let Some(event) = self.nodes[node].outboxes[core].next() {
                    let core = CoreId(core as u16);
                    self.tell(node, Event::Core { core, event });
                }
            }
            if done == 0 {
                break;
            }
        }
    }

    /// One of a node's cores has panicked.
    pub(crate) fn lose_core(&mut self, node: usize, core: usize) {
        let now = self.now;
        self.nodes[node].cores[core].lose(now);
    }

    pub(crate) fn run_until(&mut self, limit: Nanos, mut done: impl FnMut(&mut Self) -> bool) -> bool {
        let end = self.now.plus(limit);
        while self.now < end {
            if done(self) {
                return true;
            }
            self.step();
        }
        done(self)
    }

    pub(crate) fn run_for(&mut self, span: Nanos) {
        self.run_until(span, |_| false);
    }
}

fn host_index(node: &Node) -> String {
    let host = node.name.split(':').next().unwrap_or_default();
    host.trim_start_matches("node").to_owned()
}

/// Bytes that depend on where they are and on the round.
pub(crate) fn pattern(len: u64, round: u64) -> Vec<u8> {
    (0..len).map(|i| ((i.wrapping_mul(0x9e37_79b9) >> 7) ^ round.wrapping_mul(31)) as u8).collect()
}
