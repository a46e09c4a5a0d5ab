//! Brains without threads, sockets or clocks: whole nodes in virtual time over simulated NICs, connected by a network that
//! loses, delays and repeats messages as a seed says. One seed is one history.

#![allow(dead_code)] // each test uses a part

pub(crate) mod dialled;

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::Arc;
use std::time::SystemTime;

use moonrail_control::brain::{
    Action, Answer, Brain, BrainConfig, BrainNic, Call, CallId, ConnId, Event, StoreOp, Token,
};
use moonrail_control::connect::{Job, JobKind, NicFacts};
use moonrail_control::fabric::FabricPolicy;
use moonrail_control::gid;
use moonrail_control::metadata::{KeySpace, PriorityMatrix, RpcMeta, StoreError};
use moonrail_control::wire::{Frame, Incarnation};
use moonrail_control::{ControlNic, DialError, LogRecord, RailOptions, RailReport, RailState};
use moonrail_datapath::core::{Command, Core, CoreConfig, CoreCounters, CoreEvent, Doorbell, Inbox, Outbox};
use moonrail_datapath::nic::sim::{SimNicId, SimOptions, SimWorld};
use moonrail_datapath::nic::{Nic, PostHalf};
use moonrail_datapath::random::Random;
use moonrail_datapath::units::{CoreId, Nanos, NicId};

use dialled::DialledNic;

pub(crate) const MS: u64 = 1_000_000;

/// How bad the network between control ports is.
#[derive(Clone, Copy)]
pub(crate) struct Weather {
    /// Share of exchanges whose request, or reply, is lost.
    pub(crate) lost: f64,
    /// Share of requests that arrive a second time, later.
    pub(crate) repeated: f64,
    /// Longest way.
    pub(crate) delay: Nanos,
}

pub(crate) const FINE: Weather = Weather { lost: 0.0, repeated: 0.0, delay: Nanos::from_micros(200) };
pub(crate) const STORM: Weather = Weather { lost: 0.25, repeated: 0.25, delay: Nanos::from_millis(40) };

pub(crate) struct Node {
    pub(crate) name: String,
    pub(crate) brain: Brain,
    pub(crate) core: Core,
    pub(crate) inbox: Arc<Inbox>,
    pub(crate) outbox: Arc<Outbox>,
    pub(crate) nics: Vec<ControlNic>,
    pub(crate) sim: Vec<SimNicId>,
    pub(crate) alive: bool,
    pub(crate) answers: HashMap<CallId, Answer>,
    pub(crate) calls: u64,
    pub(crate) exited: bool,
    pub(crate) log: Vec<LogRecord>,
}

pub(crate) struct Caller {
    pub(crate) node: usize,
    pub(crate) token: Token,
    pub(crate) reply_lost: bool,
    pub(crate) deadline: Nanos,
}

pub(crate) struct Net {
    pub(crate) world: SimWorld,
    pub(crate) now: Nanos,
    pub(crate) random: Random,
    pub(crate) weather: Weather,
    pub(crate) nodes: Vec<Node>,
    pub(crate) due: BTreeMap<(Nanos, u64), (usize, Event)>,
    pub(crate) count: u64,
    pub(crate) conns: HashMap<(usize, ConnId), Caller>,
    pub(crate) store: BTreeMap<String, Vec<u8>>,
    pub(crate) with_store: bool,
    pub(crate) requests: u64,
    /// When each attempt to reach a control port began, by whom and to which host.
    pub(crate) dials: Vec<(Nanos, usize, String)>,
    /// Members taken out of every message, so that each side takes the other for an engine that does not know them.
    pub(crate) without: &'static [&'static str],
    /// The node whose device takes its time to move queue pairs to ERR and to destroy them, and what it has not done yet.
    pub(crate) slow: Option<usize>,
    pub(crate) waiting: Vec<Job>,
    /// The node whose core takes no queue pairs: `false` keeps them to itself, `true` gives them back at once.
    pub(crate) full: Option<(usize, bool)>,
    pub(crate) kept: Vec<PostHalf>,
    pub(crate) adoptions: usize,
    /// Nodes that are added run on this host, whatever their name says.
    pub(crate) machine: Option<u8>,
    /// Puts of keys with this in them fail.
    pub(crate) refused: Option<&'static str>,
}

impl Net {
    pub(crate) fn new(seed: u64, with_store: bool) -> Self {
        Self {
            world: SimWorld::new(seed, SimOptions::default()),
            now: Nanos::ZERO,
            random: Random::new(seed),
            weather: FINE,
            nodes: Vec::new(),
            due: BTreeMap::new(),
            count: 0,
            conns: HashMap::new(),
            store: BTreeMap::new(),
            with_store,
            requests: 0,
            dials: Vec::new(),
            without: &[],
            slow: None,
            waiting: Vec::new(),
            full: None,
            kept: Vec::new(),
            adoptions: 0,
            machine: None,
            refused: None,
        }
    }

    pub(crate) fn chance(&mut self, share: f64) -> bool {
        ((self.random.draw() >> 11) as f64) < share * (1u64 << 53) as f64
    }

    pub(crate) fn way(&mut self) -> Nanos {
        Nanos(1 + self.random.draw() % self.weather.delay.0)
    }

    pub(crate) fn later(&mut self, at: Nanos, node: usize, event: Event) {
        self.count += 1;
        self.due.insert((at, self.count), (node, event));
    }

    /// A node on host `10.0.0.host`, with `count` NICs.
    pub(crate) fn add(&mut self, host: u8, count: u8, rails: RailOptions) -> usize {
        self.add_at(host, 15_000, count, rails, Vec::new())
    }

    /// A node with a port of its choice, that also has NICs that are dialled.
    pub(crate) fn add_at(
        &mut self,
        host: u8,
        port: u16,
        count: u8,
        rails: RailOptions,
        more: Vec<Arc<DialledNic>>,
    ) -> usize {
        let name = format!("10.0.0.{host}:{port}");
        let machine = self.machine.unwrap_or(host);
        let incarnation = Incarnation(self.random.draw());
        let inbox = Inbox::new(CoreId(0)).unwrap();
        let outbox = Outbox::new(Arc::new(Doorbell::new().unwrap()));
        let (mut nics, mut sim, mut queues, mut brain_nics) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        for at in 0..count {
            let (nic, id) = self.world.nic(
                &format!("host{host}-{}", self.nodes.len()),
                &format!("sim{at}"),
                crate::rig::gid(machine, at),
            );
            let (cq, handle) = nic.create_cq(4096).unwrap();
            queues.push((NicId(u16::from(at)), cq));
            let gid = gid::choose(&nic.gids().unwrap(), None).unwrap();
            let info = nic.query_port().unwrap();
            let facts = NicFacts {
                state: info.state,
                link_layer: info.link_layer,
                lid: info.lid,
                active_mtu: info.active_mtu.unwrap(),
                gid: gid.gid,
                kind: gid.kind,
                index: Some(gid.index),
            };
            let (name, cores) = (nic.name().to_owned(), vec![CoreId(0)]);
            brain_nics.push(BrainNic { name, fabric: nic.fabric(), offer: None, facts, fixed_gid: false, cores });
            nics.push(ControlNic { nic, gid: Some(gid), cqs: vec![Some(handle)] });
            sim.push(id);
        }
        for nic in more {
            let (cq, handle) = nic.create_cq(4096).unwrap();
            queues.push((NicId(nics.len() as u16), cq));
            let (name, cores) = (nic.name().to_owned(), vec![CoreId(0)]);
            let (fabric, offer, facts) = (nic.fabric(), nic.offer(), NicFacts::of_dialled());
            brain_nics.push(BrainNic { name, fabric, offer, facts, fixed_gid: false, cores });
            nics.push(ControlNic { nic, gid: None, cqs: vec![Some(handle)] });
        }
        let core = Core::new(CoreConfig {
            id: CoreId(0),
            inbox: inbox.clone(),
            outbox: outbox.clone(),
            cores: [inbox.clone()].into(),
            nics: queues,
            counters: Arc::new(CoreCounters::default()),
        });
        let brain = Brain::new(BrainConfig {
            name: name.clone(),
            store: self.with_store.then(KeySpace::default),
            metadata: "a map".into(),
            rpc: RpcMeta { ip_or_host_name: format!("10.0.0.{host}"), rpc_port: port },
            incarnation,
            boot_id: Some(format!("boot-{machine}")),
            seed: self.random.draw(),
            epoch: SystemTime::UNIX_EPOCH,
            nics: brain_nics,
            cores: 1,
            matrix: PriorityMatrix::default(),
            rails,
            fabrics: FabricPolicy::default(),
            dial_timeout: Nanos::from_millis(500),
            store_timeout: Nanos::from_secs(1),
        });
        self.nodes.push(Node {
            name,
            brain,
            core,
            inbox,
            outbox,
            nics,
            sim,
            alive: true,
            answers: HashMap::new(),
            calls: 0,
            exited: false,
            log: Vec::new(),
        });
        let node = self.nodes.len() - 1;
        self.call(node, Call::Begin);
        node
    }

    pub(crate) fn call(&mut self, node: usize, call: Call) -> CallId {
        self.nodes[node].calls += 1;
        let id = CallId(self.nodes[node].calls);
        let until = self.now.plus(Nanos::from_secs(10));
        self.event(node, Event::Call { id, call, until });
        id
    }

    pub(crate) fn event(&mut self, node: usize, event: Event) {
        if !self.nodes[node].alive {
            return;
        }
        let mut actions = Vec::new();
        self.nodes[node].brain.handle(event, self.now, &mut actions);
        for action in actions {
            self.act(node, action);
        }
    }

    pub(crate) fn node_at(&self, host: &str, port: u16) -> Option<usize> {
        let name = format!("{host}:{port}");
        self.nodes.iter().rposition(|n| n.alive && n.name == name)
    }

    pub(crate) fn act(&mut self, node: usize, action: Action) {
        match action {
            Action::Dial { token, host, port, frame, deadline } => {
                self.dial(node, token, (&host, port), frame, deadline);
            }
            Action::Reply { conn, frame } => {
                let Some(caller) = self.conns.remove(&(node, conn)) else { return };
                let frame = self.plain(frame);
                if !caller.reply_lost {
                    let at = self.now.plus(self.way());
                    if at < caller.deadline {
                        self.later(at, caller.node, Event::Dialed { token: caller.token, result: Ok(frame) });
                        return;
                    }
                }
                self.silence(caller.node, caller.token, caller.deadline);
            }
            Action::Close { conn } => {
                if let Some(caller) = self.conns.remove(&(node, conn)) {
                    self.silence(caller.node, caller.token, caller.deadline);
                }
            }
            Action::Store { token, op, .. } => {
                let result = match op {
                    StoreOp::Get(key) => Ok(self.store.get(&key).cloned()),
                    StoreOp::Has(key) => Ok(self.store.contains_key(&key).then(Vec::new)),
                    // As Mooncake's HTTP server: an address is not overwritten.
                    StoreOp::Put(key, _) if key.contains("rpc_meta") && self.store.contains_key(&key) => {
                        Err(StoreError::DuplicateRpcMeta { key })
                    }
                    StoreOp::Put(key, _) if self.refused.is_some_and(|part| key.contains(part)) => {
                        Err(StoreError::TooLarge { key, limit: 0 })
                    }
                    StoreOp::Put(key, value) => Ok(self.store.insert(key, value).and(None)),
                    StoreOp::Delete(key) => Ok(self.store.remove(&key).and(None)),
                };
                let at = self.now.plus(self.way());
                self.later(at, node, Event::Stored { token, result });
            }
            Action::Watch { .. } => {}
            Action::Run(job)
                if self.slow == Some(node) && matches!(job.kind, JobKind::Fail { .. } | JobKind::Destroy(_)) =>
            {
                self.waiting.push(job);
            }
            Action::Core { command: Command::Adopt { rail, qp }, .. } if self.full.is_some_and(|(n, _)| n == node) => {
                self.adoptions += 1;
                let qp = qp.into_post_half();
                if self.full == Some((node, true)) {
                    let event = CoreEvent::Drained { key: rail.key, qp, flushed: 0, needs_fence: false };
                    self.later(self.now.plus(Nanos(MS)), node, Event::Core { core: CoreId(0), event });
                } else {
                    self.kept.push(qp);
                }
            }
            Action::Run(job) => {
                let done = job.run(&self.nodes[node].nics);
                let at = self.now.plus(Nanos(self.random.draw() % (3 * MS)));
                self.later(at, node, Event::Job(done));
            }
            Action::Core { command, .. } => assert!(self.nodes[node].inbox.command(command).is_ok()),
            Action::Answer { id, answer } => {
                assert!(self.nodes[node].answers.insert(id, answer).is_none(), "{id:?} is answered twice");
            }
            Action::Log(record) => {
                if std::env::var_os("RIG_LOG").is_some() {
                    eprintln!("{:>9.3} ms node {node}: {}", self.now.0 as f64 / 1e6, record.text);
                }
                self.nodes[node].log.push(record);
            }
            Action::Exit => self.nodes[node].exited = true,
        }
    }

    pub(crate) fn plain(&self, mut frame: Frame) -> Frame {
        if !self.without.is_empty() {
            let mut body: serde_json::Value = serde_json::from_slice(&frame.body).unwrap();
            for member in self.without {
                // An engine without ready ACKs sends none; ours would be one for it, were it not for the member.
                body.as_object_mut().unwrap().remove(*member);
            }
            frame.body = serde_json::to_vec(&body).unwrap();
        }
        frame
    }

    pub(crate) fn dial(&mut self, node: usize, token: Token, (host, port): (&str, u16), frame: Frame, deadline: Nanos) {
        let frame = self.plain(frame);
        self.dials.push((self.now, node, host.to_owned()));
        let Some(to) = self.node_at(host, port) else {
            let address = format!("{host}:{port}");
            return self.later(
                self.now.plus(Nanos::from_micros(100)),
                node,
                Event::Dialed { token, result: Err(DialError::Refused { address }) },
            );
        };
        self.requests += 1;
        let (lost, repeated) = (self.weather.lost, self.weather.repeated);
        if self.chance(lost / 2.0) {
            return self.silence(node, token, deadline);
        }
        if self.chance(repeated) {
            // A second copy that was somewhere on the way; nobody waits for its reply.
            let at = self.now.plus(Nanos(self.random.draw() % (2000 * MS)));
            self.requests += 1;
            self.later(at, to, Event::Request { conn: ConnId(self.requests), frame: frame.clone() });
        }
        let reply_lost = self.chance(lost / 2.0);
        let conn = ConnId(self.requests << 32);
        self.conns.insert((to, conn), Caller { node, token, reply_lost, deadline });
        let at = self.now.plus(self.way());
        self.later(at, to, Event::Request { conn, frame });
    }

    pub(crate) fn silence(&mut self, node: usize, token: Token, deadline: Nanos) {
        let error = DialError::ReplyTimeout { address: "peer".into() };
        self.later(deadline, node, Event::Dialed { token, result: Err(error) });
    }

    /// The machine's process is killed: its queue pairs go with it, and nobody is told.
    pub(crate) fn kill(&mut self, node: usize) {
        self.nodes[node].alive = false;
        let host = self.nodes[node].name["10.0.0.".len()..].split(':').next().unwrap().to_owned();
        self.world.kill_node(&format!("host{host}-{node}"));
        let lost: Vec<_> = self.conns.keys().filter(|(to, _)| *to == node).copied().collect();
        for key in lost {
            if let Some(caller) = self.conns.remove(&key) {
                self.silence(caller.node, caller.token, caller.deadline);
            }
        }
    }

    pub(crate) fn step(&mut self) {
        self.now = self.now.plus(Nanos::from_micros(250));
        self.world.advance(self.now);
        while let Some((&(at, n), _)) = self.due.first_key_value() {
            if at > self.now {
                break;
            }
            if let Some((node, event)) = self.due.remove(&(at, n)) {
                self.event(node, event);
            }
        }
        for node in 0..self.nodes.len() {
            if !self.nodes[node].alive {
                continue;
            }
            let now = self.now;
            while self.nodes[node].core.poll_once(now) > 0 {}
            let mut events = VecDeque::new();
            while let Some(event) = self.nodes[node].outbox.next() {
                events.push_back(Event::Core { core: CoreId(0), event });
            }
            for at in 0..self.nodes[node].nics.len() {
                while let Ok(Some(event)) = self.nodes[node].nics[at].nic.next_async_event() {
                    events.push_back(Event::Nic { nic: NicId(at as u16), event });
                }
            }
            if self.nodes[node].brain.next_timeout().is_some_and(|at| at <= now) {
                events.push_back(Event::Timer);
            }
            for event in events {
                self.event(node, event);
            }
        }
    }

    pub(crate) fn run(&mut self, span: Nanos) {
        let end = self.now.plus(span);
        while self.now < end {
            self.step();
        }
    }

    pub(crate) fn run_up_to(&mut self, ms: u64) {
        let span = self.random.draw() % (ms * MS);
        self.run(Nanos(span));
    }

    pub(crate) fn log_has(&self, node: usize, text: &str) -> bool {
        self.nodes[node].log.iter().any(|record| record.text.contains(text))
    }

    /// Steps until `condition`, at most `span`.
    pub(crate) fn until(&mut self, span: Nanos, mut condition: impl FnMut(&mut Self) -> bool) -> bool {
        let end = self.now.plus(span);
        while self.now < end {
            for _ in 0..20 {
                self.step();
            }
            if condition(self) {
                return true;
            }
        }
        false
    }

    pub(crate) fn rails(&mut self, node: usize) -> Vec<RailReport> {
        let id = self.call(node, Call::Rails);
        match self.nodes[node].answers.get(&id) {
            Some(Answer::Rails(rails)) => rails.clone(),
            other => panic!("{other:?}"),
        }
    }

    pub(crate) fn open(&mut self, from: usize, to: usize) -> CallId {
        let name = self.nodes[to].name.clone();
        self.call(from, Call::Open { name, fresh: false, policy: None })
    }

    /// Whether each of the two has `count` usable rails to the other, and nothing is left of former lives.
    pub(crate) fn whole(&mut self, a: usize, b: usize, count: usize) -> bool {
        [(a, b), (b, a)].into_iter().all(|(from, to)| {
            let name = self.nodes[to].name.clone();
            let rails: Vec<_> = self.rails(from).into_iter().filter(|r| r.peer == name).collect();
            rails.len() == count && rails.iter().all(|r| r.state == RailState::Usable && r.unfenced == 0)
        })
    }

    pub(crate) fn check_whole(&mut self, a: usize, b: usize, count: usize, span: Nanos) {
        if !self.until(span, |net| net.whole(a, b, count)) {
            let (a, b) = (self.rails(a), self.rails(b));
            panic!("at {:?}: {a:#?}\n{b:#?}", self.now);
        }
    }
}
