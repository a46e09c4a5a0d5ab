//! Brains without threads, sockets or clocks: whole nodes in virtual time over simulated NICs, connected by a network that
//! loses, delays and repeats messages as a seed says. One seed is one history.

mod rig;

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
use moonrail_datapath::nic::{AsyncEvent, PostHalf};
use moonrail_datapath::random::Random;
use moonrail_datapath::units::{CoreId, Nanos, NicId, PortNum};

const MS: u64 = 1_000_000;

/// How bad the network between control ports is.
#[derive(Clone, Copy)]
struct Weather {
    /// Share of exchanges whose request, or reply, is lost.
    lost: f64,
    /// Share of requests that arrive a second time, later.
    repeated: f64,
    /// Longest way.
    delay: Nanos,
}

const FINE: Weather = Weather { lost: 0.0, repeated: 0.0, delay: Nanos::from_micros(200) };
const STORM: Weather = Weather { lost: 0.25, repeated: 0.25, delay: Nanos::from_millis(40) };

struct Node {
    name: String,
    brain: Brain,
    core: Core,
    inbox: Arc<Inbox>,
    outbox: Arc<Outbox>,
    nics: Vec<ControlNic>,
    sim: Vec<SimNicId>,
    alive: bool,
    answers: HashMap<CallId, Answer>,
    calls: u64,
    exited: bool,
    log: Vec<LogRecord>,
}

struct Caller {
    node: usize,
    token: Token,
    reply_lost: bool,
    deadline: Nanos,
}

struct Net {
    world: SimWorld,
    now: Nanos,
    random: Random,
    weather: Weather,
    nodes: Vec<Node>,
    due: BTreeMap<(Nanos, u64), (usize, Event)>,
    count: u64,
    conns: HashMap<(usize, ConnId), Caller>,
    store: BTreeMap<String, Vec<u8>>,
    with_store: bool,
    requests: u64,
    /// Members taken out of every message, so that each side takes the other for an engine that does not know them.
    without: &'static [&'static str],
    /// The node whose device takes its time to move queue pairs to ERR and to destroy them, and what it has not done yet.
    slow: Option<usize>,
    waiting: Vec<Job>,
    /// The node whose core takes no queue pairs: `false` keeps them to itself, `true` gives them back at once.
    full: Option<(usize, bool)>,
    kept: Vec<PostHalf>,
    adoptions: usize,
    /// Puts of keys with this in them fail.
    refused: Option<&'static str>,
}

impl Net {
    fn new(seed: u64, with_store: bool) -> Self {
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
            without: &[],
            slow: None,
            waiting: Vec::new(),
            full: None,
            kept: Vec::new(),
            adoptions: 0,
            refused: None,
        }
    }

    fn chance(&mut self, share: f64) -> bool {
        ((self.random.draw() >> 11) as f64) < share * (1u64 << 53) as f64
    }

    fn way(&mut self) -> Nanos {
        Nanos(1 + self.random.draw() % self.weather.delay.0)
    }

    fn later(&mut self, at: Nanos, node: usize, event: Event) {
        self.count += 1;
        self.due.insert((at, self.count), (node, event));
    }

    /// A node on host `10.0.0.host`, with `count` NICs.
    fn add(&mut self, host: u8, count: u8, rails: RailOptions) -> usize {
        let name = format!("10.0.0.{host}:15000");
        let incarnation = Incarnation(self.random.draw());
        let inbox = Inbox::new(CoreId(0)).unwrap();
        let outbox = Outbox::new(Arc::new(Doorbell::new().unwrap()));
        let (mut nics, mut sim, mut queues, mut brain_nics) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        for at in 0..count {
            let (nic, id) =
                self.world.nic(&format!("host{host}-{}", self.nodes.len()), &format!("sim{at}"), rig::gid(host, at));
            let (cq, handle) = nic.create_cq(4096).unwrap();
            queues.push((NicId(u16::from(at)), cq));
            let gid = gid::choose(&nic.gids().unwrap(), None).unwrap();
            let port = nic.query_port().unwrap();
            let facts = NicFacts {
                state: port.state,
                link_layer: port.link_layer,
                lid: port.lid,
                active_mtu: port.active_mtu.unwrap(),
                gid: gid.gid,
                kind: gid.kind,
                index: Some(gid.index),
            };
            let (name, cores) = (nic.name().to_owned(), vec![CoreId(0)]);
            brain_nics.push(BrainNic { name, fabric: nic.fabric(), offer: None, facts, fixed_gid: false, cores });
            nics.push(ControlNic { nic, gid: Some(gid), cqs: vec![Some(handle)] });
            sim.push(id);
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
            rpc: RpcMeta { ip_or_host_name: format!("10.0.0.{host}"), rpc_port: 15000 },
            incarnation,
            boot_id: Some(format!("boot-{host}")),
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

    fn call(&mut self, node: usize, call: Call) -> CallId {
        self.nodes[node].calls += 1;
        let id = CallId(self.nodes[node].calls);
        let until = self.now.plus(Nanos::from_secs(10));
        self.event(node, Event::Call { id, call, until });
        id
    }

    fn event(&mut self, node: usize, event: Event) {
        if !self.nodes[node].alive {
            return;
        }
        let mut actions = Vec::new();
        self.nodes[node].brain.handle(event, self.now, &mut actions);
        for action in actions {
            self.act(node, action);
        }
    }

    fn node_at(&self, host: &str, port: u16) -> Option<usize> {
        let name = format!("{host}:{port}");
        self.nodes.iter().rposition(|n| n.alive && n.name == name)
    }

    fn act(&mut self, node: usize, action: Action) {
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

    fn plain(&self, mut frame: Frame) -> Frame {
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

    fn dial(&mut self, node: usize, token: Token, (host, port): (&str, u16), frame: Frame, deadline: Nanos) {
        let frame = self.plain(frame);
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

    fn silence(&mut self, node: usize, token: Token, deadline: Nanos) {
        let error = DialError::ReplyTimeout { address: "peer".into() };
        self.later(deadline, node, Event::Dialed { token, result: Err(error) });
    }

    /// The machine's process is killed: its queue pairs go with it, and nobody is told.
    fn kill(&mut self, node: usize) {
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

    fn step(&mut self) {
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

    fn run(&mut self, span: Nanos) {
        let end = self.now.plus(span);
        while self.now < end {
            self.step();
        }
    }

    fn run_up_to(&mut self, ms: u64) {
        let span = self.random.draw() % (ms * MS);
        self.run(Nanos(span));
    }

    fn log_has(&self, node: usize, text: &str) -> bool {
        self.nodes[node].log.iter().any(|record| record.text.contains(text))
    }

    /// Steps until `condition`, at most `span`.
    fn until(&mut self, span: Nanos, mut condition: impl FnMut(&mut Self) -> bool) -> bool {
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

    fn rails(&mut self, node: usize) -> Vec<RailReport> {
        let id = self.call(node, Call::Rails);
        match self.nodes[node].answers.get(&id) {
            Some(Answer::Rails(rails)) => rails.clone(),
            other => panic!("{other:?}"),
        }
    }

    fn open(&mut self, from: usize, to: usize) -> CallId {
        let name = self.nodes[to].name.clone();
        self.call(from, Call::Open { name, fresh: false, policy: None })
    }

    /// Whether each of the two has `count` usable rails to the other, and nothing is left of former lives.
    fn whole(&mut self, a: usize, b: usize, count: usize) -> bool {
        [(a, b), (b, a)].into_iter().all(|(from, to)| {
            let name = self.nodes[to].name.clone();
            let rails: Vec<_> = self.rails(from).into_iter().filter(|r| r.peer == name).collect();
            rails.len() == count && rails.iter().all(|r| r.state == RailState::Usable && r.unfenced == 0)
        })
    }

    fn check_whole(&mut self, a: usize, b: usize, count: usize, span: Nanos) {
        if !self.until(span, |net| net.whole(a, b, count)) {
            let (a, b) = (self.rails(a), self.rails(b));
            panic!("at {:?}: {a:#?}\n{b:#?}", self.now);
        }
    }
}

/// How many histories: `SEEDS=n` multiplies.
fn seeds(usual: u64) -> u64 {
    usual * std::env::var("SEEDS").ok().and_then(|n| n.parse().ok()).unwrap_or(1)
}

fn two_by_two(seed: u64) -> (Net, usize, usize) {
    let mut net = Net::new(seed, seed.is_multiple_of(2));
    let a = net.add(1, 2, RailOptions::default());
    let b = net.add(2, 2, RailOptions::default());
    net.run(Nanos::from_millis(5));
    (net, a, b)
}

#[test]
fn an_open_connects_every_pair_once() {
    let (mut net, a, b) = two_by_two(1);
    let id = net.open(a, b);
    net.check_whole(a, b, 4, Nanos::from_secs(2));
    assert!(matches!(net.nodes[a].answers[&id], Answer::Opened(Ok(_))));
    assert!(net.rails(a).iter().chain(&net.rails(b)).all(|rail| rail.lives == 1));
    assert_eq!(net.world.ledger().queue_pairs, 16);
    // One exchange for the descriptor, two per rail.
    assert_eq!(net.requests, 9);
}

#[test]
fn both_ends_opening_at_once_get_one_connection_per_pair() {
    for seed in 0..seeds(100) {
        let (mut net, a, b) = two_by_two(seed);
        net.weather.delay = Nanos(1 + net.random.draw() % (5 * MS));
        net.open(a, b);
        net.run_up_to(3);
        net.open(b, a);
        net.check_whole(a, b, 4, Nanos::from_secs(2));
        for node in [a, b] {
            assert!(net.rails(node).iter().all(|rail| rail.lives == 1), "seed {seed}: {:#?}", net.rails(node));
        }
        net.run(Nanos::from_millis(50));
        assert_eq!(net.world.ledger().queue_pairs, 16, "seed {seed}");
    }
}

#[test]
fn lost_late_and_repeated_messages_delay_but_never_break() {
    for seed in 0..seeds(60) {
        let (mut net, a, b) = two_by_two(seed);
        net.weather = STORM;
        net.open(a, b);
        if seed % 3 == 0 {
            net.open(b, a);
        }
        net.run(Nanos::from_secs(4));
        net.weather = FINE;
        // Whatever the storm left half done heals by itself, within the patience of both ends.
        net.run(Nanos::from_secs(3));
        net.open(a, b);
        net.check_whole(a, b, 4, Nanos::from_secs(30));
        net.run(Nanos::from_millis(100));
        assert_eq!(net.world.ledger().queue_pairs, 16, "seed {seed}: nothing leaks");
    }
}

#[test]
fn different_numbers_of_queue_pairs_find_the_smaller() {
    for seed in 0..seeds(20) {
        let mut net = Net::new(seed, false);
        let a = net.add(1, 1, RailOptions { qps_per_rail: 2, ..RailOptions::default() });
        let b = net.add(2, 1, RailOptions { qps_per_rail: 4, ..RailOptions::default() });
        net.open(a, b);
        net.open(b, a);
        net.check_whole(a, b, 1, Nanos::from_secs(3));
        let (qps_a, qps_b) = (net.rails(a)[0].qps, net.rails(b)[0].qps);
        assert_eq!(qps_a, qps_b, "seed {seed}");
    }
}

#[test]
fn a_killed_peer_is_found_again_when_it_is_back() {
    for seed in 0..seeds(20) {
        let (mut net, a, b) = two_by_two(seed);
        net.open(a, b);
        net.check_whole(a, b, 4, Nanos::from_secs(2));
        net.kill(b);
        net.run_up_to(3000);
        let again = net.add(2, 2, RailOptions::default());
        // The new process knows nobody; it opens, and its hellos replace what the old one had.
        net.open(again, a);
        net.check_whole(a, again, 4, Nanos::from_secs(10));
        assert_eq!(net.rails(a).len(), 4, "seed {seed}: the same rails, in another life");
        assert!(net.rails(a).iter().all(|rail| rail.lives == 2));
    }
}

#[test]
fn a_peer_that_is_gone_is_reported_unreachable_and_why() {
    let (mut net, a, b) = two_by_two(3);
    net.open(a, b);
    net.check_whole(a, b, 4, Nanos::from_secs(2));
    net.kill(b);
    // The core finds out with the next request; here it says that work waits and nothing answers.
    for nic in net.nodes[a].sim.clone() {
        net.world.set_link(nic, false);
        net.world.set_link(nic, true);
    }
    let peer = moonrail_datapath::units::PeerId(0);
    net.event(a, Event::Core { core: CoreId(0), event: CoreEvent::Wanted { peer } });
    net.run(Nanos::from_secs(5));
    net.event(a, Event::Core { core: CoreId(0), event: CoreEvent::Wanted { peer } });
    net.run(Nanos::from_secs(1));
    assert!(
        net.nodes[a].log.iter().any(|l| l.text.contains("is unreachable; first cause:")),
        "{:#?}",
        net.nodes[a].log
    );
    let opened = net.nodes[a].log.iter().filter(|l| l.text.contains("opened")).count();
    assert_eq!(opened, 4, "one line per rail, however often it is tried: {:#?}", net.nodes[a].log);
    let name = net.nodes[b].name.clone();
    let id = net.call(a, Call::Why(name));
    assert!(matches!(&net.nodes[a].answers[&id], Answer::Why(Some(_))));
    // When nobody wants the peer any more, nobody knocks.
    net.run(Nanos::from_secs(40));
    let before = net.nodes[a].log.len();
    net.run(Nanos::from_secs(20));
    assert_eq!(net.nodes[a].log.len(), before);
    // A new process is found at the next wish, although the last verdict was bad.
    let again = net.add(2, 2, RailOptions::default());
    net.event(a, Event::Core { core: CoreId(0), event: CoreEvent::Wanted { peer } });
    net.check_whole(a, again, 4, Nanos::from_secs(5));
}

#[test]
fn ports_that_flap_under_a_storm_heal() {
    for seed in 0..seeds(20) {
        let (mut net, a, b) = two_by_two(seed);
        net.open(a, b);
        net.open(b, a);
        net.weather = STORM;
        for _ in 0..12 {
            let node = [a, b][(net.random.draw() % 2) as usize];
            let nic = net.nodes[node].sim[(net.random.draw() % 2) as usize];
            net.world.set_link(nic, false);
            net.run_up_to(300);
            if net.random.draw() % 2 == 0 {
                net.world.shuffle_gids(nic);
            }
            net.world.set_link(nic, true);
            net.run_up_to(300);
        }
        net.weather = FINE;
        net.run(Nanos::from_secs(3));
        net.open(a, b);
        net.check_whole(a, b, 4, Nanos::from_secs(30));
        net.run(Nanos::from_millis(100));
        assert_eq!(net.world.ledger().queue_pairs, 16, "seed {seed}: nothing leaks");
        for node in [a, b] {
            let id = net.call(node, Call::Incidents);
            let Answer::Incidents(incidents) = &net.nodes[node].answers[&id] else { panic!() };
            assert!(incidents.iter().all(|i| i.closed.is_some()), "seed {seed}: {incidents:#?}");
        }
    }
}

#[test]
fn a_node_reaches_its_own_memory_through_each_nic() {
    let mut net = Net::new(5, false);
    let a = net.add(1, 2, RailOptions::default());
    net.open(a, a);
    assert!(net.until(Nanos::from_secs(2), |net| {
        let rails = net.rails(a);
        rails.len() == 2 && rails.iter().all(|rail| rail.state == RailState::Usable)
    }));
    assert_eq!(net.requests, 0, "no message is needed");
}

#[test]
fn a_shutdown_gives_everything_back_even_in_the_middle() {
    for seed in 0..seeds(30) {
        let (mut net, a, b) = two_by_two(seed);
        net.open(a, b);
        net.open(b, a);
        net.run_up_to(40);
        let id = net.call(a, Call::Shutdown);
        assert!(net.until(Nanos::from_secs(9), |net| net.nodes[a].exited), "seed {seed}");
        assert!(matches!(net.nodes[a].answers[&id], Answer::Stopped));
        net.call(b, Call::Shutdown);
        assert!(net.until(Nanos::from_secs(9), |net| net.nodes[b].exited), "seed {seed}");
        assert_eq!(net.world.ledger().queue_pairs, 0, "seed {seed}");
        assert!(net.store.is_empty(), "seed {seed}: {:?}", net.store.keys());
    }
}

/// Engines that know nothing of ours, and some of the past that know no ready acknowledgement, or leave the GID out.
const STRANGERS: [&[&str]; 3] = [&["moonrail"], &["moonrail", "ready_ack"], &["moonrail", "local_gid"]];

#[test]
fn engines_that_say_less_are_connected_too() {
    for (kind, without) in STRANGERS.into_iter().enumerate() {
        for seed in 0..seeds(10) {
            let (mut net, a, b) = two_by_two(seed);
            net.without = without;
            net.open(a, b);
            // With a store the descriptor tells a GID that a hello leaves out; without one, only to who opened its sender.
            if seed % 4 == 0 || kind == 2 && seed % 2 == 1 {
                net.run_up_to(3);
                net.open(b, a);
            }
            net.check_whole(a, b, 4, Nanos::from_secs(20));
            assert!(net.rails(a).iter().all(|rail| !rail.moonrail && rail.qps == 2), "{:#?}", net.rails(a));
            net.run(Nanos::from_millis(100));
            assert_eq!(net.world.ledger().queue_pairs, 16, "kind {kind} seed {seed}");
        }
    }
}

#[test]
fn losses_between_engines_that_say_less_heal_too() {
    for seed in 0..seeds(30) {
        let (mut net, a, b) = two_by_two(seed);
        net.without = STRANGERS[0];
        net.weather = Weather { repeated: 0.0, ..STORM };
        net.open(a, b);
        net.open(b, a);
        net.run(Nanos::from_secs(4));
        net.weather = FINE;
        net.run(Nanos::from_secs(3));
        net.open(a, b);
        net.open(b, a);
        net.check_whole(a, b, 4, Nanos::from_secs(40));
        net.run(Nanos::from_millis(100));
        assert_eq!(net.world.ledger().queue_pairs, 16, "seed {seed}: nothing leaks");
    }
}

#[test]
fn a_stock_peer_with_another_number_of_queue_pairs_is_followed() {
    for seed in 0..seeds(10) {
        let mut net = Net::new(seed, false);
        let a = net.add(1, 1, RailOptions { qps_per_rail: 2, ..RailOptions::default() });
        let b = net.add(2, 1, RailOptions { qps_per_rail: 3, ..RailOptions::default() });
        net.without = STRANGERS[0];
        net.open(a, b);
        net.check_whole(a, b, 1, Nanos::from_secs(5));
        assert_eq!(net.rails(a)[0].qps, net.rails(b)[0].qps, "seed {seed}");
    }
}

#[test]
fn a_name_that_a_dead_node_left_behind_is_taken_over_and_a_live_one_is_not() {
    let mut net = Net::new(1, true);
    let a = net.add(1, 1, RailOptions::default());
    net.run(Nanos::from_millis(5));
    // The entry of node 2 is of an earlier life, on another host where nobody answers.
    let stale = RpcMeta { ip_or_host_name: "10.0.0.99".into(), rpc_port: 1 };
    net.store.insert("mooncake/rpc_meta/10.0.0.2:15000".into(), stale.encode());
    let b = net.add(2, 1, RailOptions::default());
    net.run(Nanos::from_millis(20));
    assert!(matches!(net.nodes[b].answers[&CallId(1)], Answer::Begun(Ok(()))));
    net.open(a, b);
    net.check_whole(a, b, 1, Nanos::from_secs(2));
    // The entry of node 3 leads to node 1, which answers.
    let live = RpcMeta { ip_or_host_name: "10.0.0.1".into(), rpc_port: 15000 };
    net.store.insert("mooncake/rpc_meta/10.0.0.3:15000".into(), live.encode());
    let c = net.add(3, 1, RailOptions::default());
    net.run(Nanos::from_millis(20));
    let Answer::Begun(Err(error)) = &net.nodes[c].answers[&CallId(1)] else { panic!() };
    assert!(error.to_string().contains("another node runs with this name"), "{error}");
    assert_eq!(net.store["mooncake/rpc_meta/10.0.0.3:15000"], live.encode(), "left alone");
}

#[test]
fn fresh_queue_pairs_are_no_proof_before_the_former_ones_are_in_err() {
    for seed in 0..seeds(10) {
        let (mut net, a, b) = two_by_two(seed);
        net.open(a, b);
        net.check_whole(a, b, 4, Nanos::from_secs(2));
        net.slow = Some(b);
        // A loses its rails and connects anew; B has not moved its ends of them to ERR yet.
        for at in 0..2 {
            let nic = NicId(at);
            net.event(a, Event::Nic { nic, event: AsyncEvent::PortError(PortNum(1)) });
            net.event(a, Event::Nic { nic, event: AsyncEvent::PortActive(PortNum(1)) });
        }
        net.until(Nanos::from_millis(700), |net| {
            let rails = net.rails(a);
            assert!(rails.iter().all(|r| r.lives == 1 && r.unfenced == 1), "seed {seed} at {:?}: {rails:#?}", net.now);
            false
        });
        assert!(!net.waiting.is_empty(), "B was asked");
        net.slow = None;
        for job in std::mem::take(&mut net.waiting) {
            net.act(b, Action::Run(job));
        }
        net.check_whole(a, b, 4, Nanos::from_secs(10));
        net.run(Nanos::from_millis(100));
        assert_eq!(net.world.ledger().queue_pairs, 16, "seed {seed}: nothing leaks");
    }
}

#[test]
fn a_core_without_room_makes_no_storm_of_handshakes() {
    let (mut net, a, b) = two_by_two(2);
    net.full = Some((a, true));
    net.open(a, b);
    net.run(Nanos::from_secs(4));
    // Two queue pairs a time, four rails, waits that double from 10 ms to 1 s.
    assert!((8..=2 * 4 * 14).contains(&net.adoptions), "{} in 4 s", net.adoptions);
    net.full = None;
    net.open(a, b);
    net.check_whole(a, b, 4, Nanos::from_secs(10));
}

#[test]
fn a_trial_that_never_comes_back_is_not_waited_for_for_ever() {
    let (mut net, a, b) = two_by_two(4);
    net.full = Some((a, false));
    net.open(a, b);
    net.run(Nanos::from_secs(12));
    assert!(net.log_has(a, "trial has not come back"), "{:#?}", net.nodes[a].log);
}

#[test]
fn notifications_nobody_takes_are_bounded_by_bytes_too() {
    let mut net = Net::new(6, false);
    let a = net.add(1, 1, RailOptions::default());
    let body = moonrail_control::wire::Notify { name: "n".into(), message: "x".repeat(1 << 20) }.encode();
    for conn in 0..64 {
        let frame = Frame::typed(moonrail_control::wire::MessageType::Notify, body.clone());
        net.event(a, Event::Request { conn: ConnId(1000 + conn), frame });
    }
    let take = |net: &mut Net| {
        let id = net.call(a, Call::Notifications);
        let Answer::Notifications(taken) = &net.nodes[a].answers[&id] else { panic!() };
        taken.len()
    };
    assert_eq!(take(&mut net), 15, "of 16 MiB, each with its name");
    let frame = Frame::typed(moonrail_control::wire::MessageType::Notify, body);
    net.event(a, Event::Request { conn: ConnId(1), frame });
    assert_eq!(take(&mut net), 1, "there is room again");
}

#[test]
fn a_start_that_fails_leaves_no_key_behind() {
    for part in ["ram/", "rpc_meta"] {
        let mut net = Net::new(7, true);
        net.refused = Some(part);
        let a = net.add(1, 1, RailOptions::default());
        net.run(Nanos::from_millis(20));
        assert!(matches!(net.nodes[a].answers[&CallId(1)], Answer::Begun(Err(_))), "{part}");
        net.call(a, Call::Shutdown);
        assert!(net.until(Nanos::from_secs(2), |net| net.nodes[a].exited));
        assert!(net.store.is_empty(), "{part}: {:?}", net.store.keys());
    }
    // A put that is still on its way at the end does not come after the deletion.
    for seed in 0..seeds(20) {
        let mut net = Net::new(seed, true);
        net.weather.delay = Nanos(5 * MS);
        let a = net.add(1, 1, RailOptions::default());
        net.run_up_to(12);
        if seed % 2 == 0 {
            net.call(a, Call::Publish(Vec::new()));
        }
        net.call(a, Call::Shutdown);
        assert!(net.until(Nanos::from_secs(2), |net| net.nodes[a].exited));
        net.run(Nanos::from_millis(50));
        assert!(net.store.is_empty(), "seed {seed}: {:?}", net.store.keys());
    }
}
