//! What the two brains want done, done: their device jobs, their messages, their cores' commands.

use std::time::SystemTime;

use moonrail_datapath::core::port::{Command, RailKey};
use moonrail_datapath::nic::{Fabric, GidKind, InitAttr, LinkLayer, PortState, RtrAttr, RtsAttr};
use moonrail_datapath::units::{CoreId, GidIndex, Lid, Mtu, Nanos, PortNum};

use super::device::{self, gid, lock};
use super::world::{Adopted, At, Exchange, Node, Pair};
use crate::brain::{Action, Brain, BrainConfig, BrainNic, Call, CallId, ConnId, Event, StoreOp};
use crate::config::RailOptions;
use crate::connect::{Job, JobDone, JobKind, NicFacts, Outcome};
use crate::fabric::FabricPolicy;
use crate::metadata::{KeySpace, PriorityMatrix, RpcMeta};
use crate::wire::{Hello, Incarnation, MessageType};

fn host(node: usize) -> String {
    format!("10.0.0.{}", node + 1)
}

impl Pair {
    fn facts(node: usize, up: bool) -> NicFacts {
        NicFacts {
            state: if up { PortState::Active } else { PortState::Down },
            link_layer: LinkLayer::Ethernet,
            lid: Lid(0),
            active_mtu: Mtu::B4096,
            gid: gid(node),
            kind: GidKind::RoceV2,
            index: Some(GidIndex(1)),
        }
    }

    pub(super) fn boot(node: usize, process: u32) -> Node {
        let nic = BrainNic {
            name: "n".into(),
            fabric: Fabric::Rdma,
            offer: None,
            facts: Self::facts(node, true),
            fixed_gid: false,
            cores: vec![CoreId(0)],
        };
        let brain = Brain::new(BrainConfig {
            name: host(node),
            store: Some(KeySpace::default()),
            metadata: "a map".into(),
            rpc: RpcMeta { ip_or_host_name: host(node), rpc_port: 1 },
            incarnation: Incarnation(u64::from(process) * 10 + node as u64 + 1),
            boot_id: Some(format!("boot-{node}")),
            seed: u64::from(process) * 2 + node as u64,
            epoch: SystemTime::UNIX_EPOCH,
            nics: vec![nic],
            cores: 1,
            matrix: PriorityMatrix::default(),
            rails: RailOptions { qps_per_rail: 1, ..RailOptions::default() },
            fabrics: FabricPolicy::default(),
            dial_timeout: Nanos::from_secs(2),
            store_timeout: Nanos::from_secs(1),
        });
        Node { process, brain, jobs: vec![], core: vec![], port_up: true, calls: 0 }
    }

    fn call(&mut self, node: usize, call: Call) {
        self.nodes[node].calls += 1;
        let (id, until) = (CallId(self.nodes[node].calls), self.now.plus(Nanos::from_secs(5)));
        self.tell(node, Event::Call { id, call, until });
    }

    pub(super) fn begin(&mut self, node: usize) {
        self.call(node, Call::Begin);
        self.call(node, Call::Publish(vec![]));
    }

    pub(super) fn open(&mut self, node: usize) {
        if self.plan.wants[node] {
            self.call(node, Call::Open { name: host(1 - node), fresh: false, policy: None });
        }
    }

    /// Tells a brain, does what it wants, and goes on with what that leads to at once.
    pub(super) fn tell(&mut self, node: usize, event: Event) {
        self.at_once.push_back((node, self.nodes[node].process, event));
        while let Some((node, process, event)) = self.at_once.pop_front() {
            if self.nodes[node].process != process {
                continue;
            }
            let mut actions = vec![];
            self.nodes[node].brain.handle(event, self.now, &mut actions);
            for action in actions {
                self.act(node, action);
            }
        }
    }

    fn soon(&mut self, node: usize, event: Event) {
        self.at_once.push_back((node, self.nodes[node].process, event));
    }

    fn act(&mut self, node: usize, action: Action) {
        match action {
            Action::Dial { token, host: to, frame, deadline, .. } => {
                let to = usize::from(to != host(0));
                assert!(frame.kind == MessageType::Connection, "with a store nodes ask each other nothing else");
                let hello = Hello::parse(&frame.body).expect("our own hello");
                let at = At::Request;
                let process = self.nodes[node].process;
                self.net.push(Exchange { from: node, process, to, token, frame, hello, at, deadline, waits: true });
            }
            Action::Reply { conn, frame } => self.answered(node, conn, At::Reply(frame)),
            Action::Close { conn } => self.answered(node, conn, At::Lost),
            Action::Store { token, op, .. } => {
                let result = match op {
                    StoreOp::Get(key) => Ok(self.store.get(&key).cloned()),
                    StoreOp::Has(key) => Ok(self.store.contains_key(&key).then(Vec::new)),
                    StoreOp::Put(key, value) => Ok(self.store.insert(key, value).and(None)),
                    StoreOp::Delete(key) => Ok(self.store.remove(&key).and(None)),
                };
                self.soon(node, Event::Stored { token, result });
            }
            Action::Run(job) => {
                let slow = match &job.kind {
                    JobKind::Connect { .. } => self.plan.slow.connect,
                    JobKind::Fail { .. } => self.plan.slow.fail,
                    _ => false,
                };
                if slow {
                    self.nodes[node].jobs.push(job);
                } else {
                    let done = self.run(node, job);
                    self.soon(node, Event::Job(done));
                }
            }
            Action::Core { command, .. } => self.command(node, command),
            Action::Log(record) => {
                if std::env::var_os("EXPLORE_LOG").is_some() {
                    eprintln!("{:>9.3} s node {node}: {}", self.now.0 as f64 / 1e9, record.text);
                }
            }
            Action::Watch { .. } | Action::Answer { .. } | Action::Exit => {}
        }
    }

    fn answered(&mut self, node: usize, conn: ConnId, reply: At) {
        let of = |x: &Exchange| x.to == node && matches!(x.at, At::Asked(asked) if asked == conn);
        let Some(at) = self.net.iter().position(of) else {
            self.broken.get_or_insert_with(|| format!("node {node} answers a connection twice"));
            return;
        };
        if self.net[at].waits {
            self.net[at].at = reply;
        } else {
            self.net.remove(at);
        }
    }

    pub(super) fn run(&mut self, node: usize, job: Job) -> JobDone {
        let outcome = match job.kind {
            JobKind::Make { count, .. } => {
                let process = self.nodes[node].process;
                Outcome::Made(Ok((0..count).map(|_| device::make(&self.fabric, node, process)).collect()))
            }
            JobKind::Connect { qps, plan } => {
                let pairs = qps.into_iter().zip(&plan.pairs);
                let connected = pairs.map(|(qp, pair)| {
                    let rtr = RtrAttr {
                        path_mtu: plan.path_mtu,
                        dest_qpn: pair.dest,
                        rq_psn: pair.rq_psn,
                        max_dest_rd_atomic: 1,
                        min_rnr_timer: 12,
                        dest_gid: plan.peer_gid,
                        dest_lid: plan.peer_lid,
                        sgid_index: GidIndex(1),
                        hop_limit: 1,
                        traffic_class: 0,
                        service_level: 0,
                        port: PortNum(1),
                    };
                    let rts =
                        RtsAttr { timeout: 14, retry_cnt: 6, rnr_retry: 7, sq_psn: pair.sq_psn, max_rd_atomic: 1 };
                    let init = qp.init(&InitAttr { port: PortNum(1), pkey_index: 0 }).unwrap();
                    init.rtr(&rtr).unwrap().rts(&rts).unwrap().split()
                });
                Outcome::Connected(Ok(connected.collect()))
            }
            JobKind::Fail { mut admins } => {
                if self.plan.rules.err_is_err {
                    for admin in &mut admins {
                        admin.to_error().unwrap();
                    }
                }
                Outcome::Failed(admins)
            }
            JobKind::Query { .. } => Outcome::Queried(Ok(Self::facts(node, self.nodes[node].port_up))),
            JobKind::Destroy(unused) => {
                drop(unused);
                Outcome::Destroyed
            }
            JobKind::Discard(_) | JobKind::Dial { .. } => Outcome::Destroyed,
        };
        JobDone { token: job.token, nic: job.nic, outcome }
    }

    fn command(&mut self, node: usize, command: Command) {
        match command {
            Command::Adopt { rail, qp } => {
                let half = qp.into_post_half();
                let id = (node, self.nodes[node].process, half.qpn().get());
                let dest = lock(&self.fabric).qps.get(&id).and_then(|qp| qp.dest).map_or(0, |dest| dest.1);
                let far = (self.nodes[1 - node].process, dest);
                self.nodes[node].core.push(Adopted {
                    key: rail.key,
                    qpn: half.qpn().get(),
                    half: Some(half),
                    over: false,
                    proven: false,
                    needs_fence: false,
                    far,
                });
            }
            Command::Retire { key } => {
                self.nodes[node].core.iter_mut().filter(|qp| qp.key == key).for_each(|qp| qp.over = true);
            }
            Command::Fenced { key } => self.fenced(node, key),
            _ => {}
        }
    }

    /// Nothing of that life can land at the peer any more: so its other end must take nothing.
    fn fenced(&mut self, node: usize, key: RailKey) {
        let fabric = lock(&self.fabric);
        for qp in self.nodes[node].core.iter().filter(|qp| qp.key == key) {
            let far = fabric.qps.get(&(1 - node, qp.far.0, qp.far.1));
            if far.is_some_and(|far| far.accepts && far.dest == Some((node, qp.qpn))) {
                let why = format!("node {node} takes {key:?} for fenced, and its other end still takes packets");
                self.broken.get_or_insert(why);
            }
        }
        drop(fabric);
        self.nodes[node].core.retain(|qp| qp.key != key);
    }
}
