//! What must hold of two brains in every state, and what tells their states apart.
//!
//! - a former life is taken for fenced only when its other end takes no packet any more (checked as it happens, `world.rs`);
//! - a rail works only while it is connected to its peer, both ways, with the packet numbers of both;
//! - one hello at a time is on its way for a rail;
//! - each request that arrived is answered, closed, or waits with the brain: none is forgotten, none answered twice;
//! - nothing is connected to a process of the peer that is known to be over;
//! - a port that said that it is active is used again at once;
//! - an open incident belongs to a rail that does not work.
//!
//! The time is not told apart, nor random numbers; only what lies ahead and what is over. Numbers that only rise (lives,
//! messages, queue pairs, attempts) are told apart by their order or as far as they matter.

use std::collections::HashMap;
use std::hash::{DefaultHasher, Hash, Hasher};

use moonrail_datapath::units::Qpn;

use super::device::lock;
use super::world::{At, Node, Pair};
use crate::brain::rail::{End, Then};
use crate::handshake::PeerEnd;
use crate::wire::Hello;

/// Names queue pairs in the order in which they are met.
#[derive(Default)]
struct Key {
    words: Vec<u64>,
    names: HashMap<(usize, u32), u64>,
}

impl Key {
    fn put(&mut self, words: impl IntoIterator<Item = u64>) {
        self.words.extend(words);
    }

    fn flag(&mut self, flag: bool) {
        self.words.push(flag.into());
    }

    fn qp(&mut self, node: usize, number: u32) {
        let next = self.names.len() as u64;
        let name = *self.names.entry((node, number)).or_insert(next);
        self.words.push(name);
    }

    fn qps(&mut self, node: usize, numbers: &[Qpn]) {
        self.words.push(1000 + numbers.len() as u64);
        for number in numbers {
            self.qp(node, number.get());
        }
    }

    fn end(&mut self, node: usize, end: &PeerEnd) {
        self.qps(node, &end.qpns);
        self.words.push(end.incarnation.map_or(0, |life| life.0));
    }

    /// A hello of `from`, about queue pairs of `from` and its peer.
    fn hello(&mut self, from: usize, hello: &Hello) {
        let mut text = DefaultHasher::new();
        hello.reply_msg.hash(&mut text);
        let life = hello.extra.node.incarnation.map_or(0, |life| life.0);
        self.put([text.finish(), life, hello.ready_ack.map_or(2, u64::from)]);
        self.qps(from, &hello.qp_num);
        self.qps(from, &hello.extra.fence_qpns);
        self.qps(1 - from, &hello.extra.fenced_qpns);
    }
}

impl Pair {
    pub(super) fn fingerprint(&self) -> Vec<u64> {
        let mut key = Key::default();
        for node in 0..2 {
            self.put_brain(&mut key, node);
        }
        for exchange in &self.net {
            let (from, to) = (exchange.from, exchange.to);
            let heard = self.nodes[to].brain.rails.first().and_then(|rail| rail.heard);
            let serial = exchange.hello.extra.serial.filter(|_| !matches!(exchange.at, At::Reply(_) | At::Lost));
            let order = match (heard, serial) {
                (Some((life, newest)), Some(serial)) if exchange.hello.extra.node.incarnation == Some(life) => {
                    (1 + serial.cmp(&newest) as i8) as u64
                }
                (_, serial) => 5 + u64::from(serial.is_some()),
            };
            let (stage, reply) = match &exchange.at {
                At::Request => (0, None),
                At::Asked(_) => (1, None),
                At::Reply(frame) => (2, Hello::parse(&frame.body).ok()),
                At::Lost => (3, None),
            };
            key.put([from as u64, stage, u64::from(exchange.waits), order]);
            let since = |node: &Node| node.brain.peers.iter().any(|peer| peer.lives.is_asked_since(exchange.token));
            key.flag(exchange.waits && since(&self.nodes[from]));
            key.hello(from, &exchange.hello);
            if let Some(reply) = reply {
                key.hello(to, &reply);
            }
        }
        let fabric = lock(&self.fabric);
        for (id, qp) in &fabric.qps {
            key.put([id.0 as u64, u64::from(id.1 == self.nodes[id.0].process)]);
            key.qp(id.0, id.2);
            key.put([u64::from(qp.accepts), u64::from(qp.in_error), u64::from(fabric.is_paired(*id))]);
            if let Some((node, number)) = qp.dest {
                key.qp(node, number);
            }
        }
        for (node, state) in self.nodes.iter().enumerate() {
            key.put([u64::from(state.process), u64::from(state.port_up), state.jobs.len() as u64]);
            for qp in state.core.iter().filter(|qp| qp.half.is_some()) {
                key.qp(node, qp.qpn);
                key.put([u64::from(qp.over), u64::from(qp.proven), u64::from(qp.needs_fence)]);
            }
            key.put(state.jobs.iter().map(|job| {
                use crate::connect::JobKind;
                match job.kind {
                    JobKind::Connect { .. } => 1,
                    JobKind::Fail { .. } => 2,
                    _ => 3,
                }
            }));
        }
        let plan = &self.plan;
        let left = [plan.losses, plan.doubles, plan.lates, plan.restarts, plan.failures, plan.ports, plan.pauses];
        key.put(left.map(u64::from));
        key.words
    }

    fn put_brain(&self, key: &mut Key, node: usize) {
        let brain = &self.nodes[node].brain;
        let (now, far) = (self.now, 1 - node);
        key.put([brain.nics[0].is_up().into(), brain.rails.len() as u64]);
        for peer in &brain.peers {
            key.put([peer.lives.present.map_or(0, |life| life.0), u64::from(peer.unreachable), u64::from(peer.stale)]);
            key.put([u64::from(peer.segment.is_some()), u64::from(peer.address().is_some())]);
            key.flag(peer.lives.has_asked(now));
            key.put(peer.lives.past_lives().map(|life| life.0).chain([u64::MAX]));
        }
        for rail in &brain.rails {
            match &rail.end {
                End::Down => key.put([0]),
                End::Dialling(_) => key.put([1]),
                End::Making(for_peer) => {
                    key.put([2, u64::from(for_peer.is_some())]);
                    if let Some((inbound, theirs)) = for_peer {
                        key.hello(far, &inbound.hello);
                        key.end(far, theirs);
                    }
                }
                End::Asking { ours, .. } => {
                    key.put([3]);
                    key.qps(node, &ours.qpns);
                }
                End::Connecting { ours, theirs, then, .. } => {
                    key.put([4, matches!(then, Then::Answer(_)).into()]);
                    key.qps(node, &ours.qpns);
                    key.end(far, theirs);
                }
                End::Half { ours, theirs, .. } => {
                    key.put([5]);
                    key.qps(node, &ours.qpns);
                    key.end(far, theirs);
                }
                End::Whole(life) => {
                    key.put([6, u64::from(life.proven.is_some())]);
                    key.qps(node, &life.ours.qpns);
                    key.end(far, &life.theirs);
                }
            }
            key.flag(rail.asked.is_some());
            if let Some((_, asked, reply)) = rail.reply.as_deref() {
                key.qps(node, &asked.qpns);
                match reply.as_ref().ok().and_then(|frame| Hello::parse(&frame.body).ok()) {
                    Some(reply) => key.hello(far, &reply),
                    None => key.put([7]),
                }
            }
            key.put([rail.heard.map_or(0, |(life, _)| life.0), rail.requests.len() as u64]);
            for inbound in rail.requests.iter().map(Box::as_ref).chain(&rail.questions) {
                key.hello(far, &inbound.hello);
            }
            let flags = [rail.looking, rail.incident.is_some(), rail.retry_at.is_some_and(|at| at > now)];
            key.put(flags.map(u64::from));
            key.put([rail.dying.into(), rail.failures.min(3).into(), rail.old.len() as u64]);
            for old in &rail.old {
                key.qps(node, &old.qpns);
                key.qps(far, &old.peer_qpns);
                let flags = [old.failing.is_some(), old.needs_fence, old.proof, old.is_drained()];
                key.put(flags.map(u64::from));
                key.put([old.posts.len() as u64, old.incarnation.map_or(0, |life| life.0)]);
            }
            key.flag(rail.fence.is_waiting(now));
        }
    }

    pub(super) fn broken_law(&self) -> Result<(), String> {
        if let Some(why) = &self.broken {
            return Err(why.clone());
        }
        for node in 0..2 {
            self.check_messages(node)?;
            let state = &self.nodes[node];
            if state.port_up && !state.brain.nics[0].is_up() {
                return Err(format!("node {node} does not know that its port is up"));
            }
            for rail in &state.brain.rails {
                if rail.is_proven() && rail.incident.is_some() {
                    return Err(format!("node {node} has an incident of a rail that works"));
                }
                // What a job has is judged when the job ends.
                let life = rail.theirs().filter(|_| !rail.is_busy()).and_then(|theirs| theirs.incarnation);
                let over = life.is_some_and(|life| state.brain.peers.iter().any(|peer| peer.lives.is_past(life)));
                if over {
                    return Err(format!("node {node} is connected to a process that it knows to be over"));
                }
            }
            let open = state.brain.incidents.iter().filter(|incident| incident.closed.is_none()).count();
            let failing = state.brain.rails.iter().filter(|rail| rail.incident.is_some()).count();
            if open != failing {
                return Err(format!("node {node} has {open} open incidents, and {failing} rails have one"));
            }
        }
        Ok(())
    }

    fn check_messages(&self, node: usize) -> Result<(), String> {
        let is_hello = |hello: &Hello| hello.ready_ack == Some(false) && hello.extra.fence_qpns.is_empty();
        let asks = self.net.iter().filter(|x| x.from == node && x.waits && is_hello(&x.hello)).count();
        if asks > 1 {
            return Err(format!("{asks} hellos of node {node} are on their way"));
        }
        let held = |rail: &crate::brain::rail::Rail| {
            let in_hand = match &rail.end {
                End::Making(Some(_)) | End::Connecting { then: Then::Answer(_), .. } => 1,
                _ => 0,
            };
            in_hand + rail.requests.len() + rail.questions.len()
        };
        let held: usize = self.nodes[node].brain.rails.iter().map(held).sum();
        let arrived = self.net.iter().filter(|x| x.to == node && matches!(x.at, At::Asked(_))).count();
        if held != arrived {
            return Err(format!("{arrived} requests reached node {node} and it has {held}"));
        }
        Ok(())
    }
}
