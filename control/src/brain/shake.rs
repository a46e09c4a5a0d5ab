//! A rail from nothing to connected. The judgement of each message is in [`crate::handshake`]; here is what it leads to.
//!
//! ```text
//!            attempt()                                     a peer's hello
//!  Down ──▶ Making ──▶ Asking ──(reply)──▶ Connecting ◀──(both asked)── Asking
//!              └───────────────────────────────▲ (asked by the peer)
//!                                          Connecting ──▶ Half ──(ready on both ends)──▶ Whole, adopted by its core
//! ```

use moonrail_datapath::core::port::{Command, RailKey, RailSpec};
use moonrail_datapath::nic::{ConnectedQp, QpCaps};
use moonrail_datapath::units::{CoreId, Mtu, Nanos, Qpn, SqPsn};

use super::peer::NoReply;
use super::rail::{End, Inbound, Leave, Life, Then};
use super::{Brain, Pending, Timer};
use crate::connect::{JobKind, Outcome, Unused};
use crate::handshake::{self, OwnEnd, PeerEnd, Progress, initiator, responder};
use crate::wire::{Frame, Hello, MessageType, rejection};

/// How long a peer may take to say that it is ready. Then, if we want the rail, we ask ourselves.
const READY_WITHIN: Nanos = Nanos::from_secs(10);
/// How long until it is asked whether it is, if we want the rail, and then again. Between moonrail nodes only: our reply may not
/// have arrived, or be about queue pairs that the peer has given up, and it may wait for us in the same way.
const READY_ASKED: Nanos = Nanos::from_secs(1);
/// How long its half-made rail is kept if we do not want it ourselves. A peer that is not ready does not use it either.
const READY_AT_ALL: Nanos = Nanos::from_secs(30);
/// How long a core may take for a rail's trial: longer than a device retries a request. No answer at all, not even an error,
/// is a completion queue that tells nothing any more.
pub(super) const TRIAL_WITHIN: Nanos = Nanos::from_secs(10);
/// How long after work last waited for a peer its rails go on being tried.
const WANTED_FOR: Nanos = Nanos::from_secs(30);

impl Brain {
    // ---- asking ----

    /// Whether somebody here wants this rail, so that we ask for it ourselves.
    pub(super) fn is_wanted(&self, rail: usize) -> bool {
        let state = &self.rails[rail];
        let peer = self.peer(state.peer);
        let recently = peer.wanted.is_some_and(|at| self.now.since(at) < WANTED_FOR);
        // While other rails to the peer work, the missing one is worth having: the peer lives. That goes for one that only
        // the peer used, too: it may not know that our end is gone until it posts, and waits for its retries.
        let used = peer.wanted.is_some() || state.lives > 0;
        let alive = used && peer.rails.iter().any(|r| self.rails[*r].is_proven());
        recently || alive || state.wants_fence()
    }

    /// Begins to connect a rail that is down, if it is wanted, its NIC is up, its former life is drained and its back-off
    /// over.
    pub(super) fn attempt(&mut self, rail: usize) {
        let state = &self.rails[rail];
        let ready = matches!(state.end, End::Down)
            && state.asked.is_none()
            && self.nics[usize::from(state.nic.0)].is_up()
            && state.dying == 0
            && state.old.iter().all(super::rail::OldLife::is_drained)
            && state.retry_at.is_none_or(|at| at <= self.now)
            && (state.evicted.is_none() || state.wants_fence());
        if !ready || self.stopping || !self.is_wanted(rail) {
            return;
        }
        if !state.fabric.is_dialled() {
            self.rails[rail].retry_at = None;
            self.make(rail, None);
        } else if self.uses(rail) {
            self.rails[rail].retry_at = None;
            self.dial_rail(rail);
        }
    }

    /// A rail stays with its core, which alone writes its counters, as long as that core has the NIC.
    pub(super) fn core_for(&self, rail: usize) -> CoreId {
        let state = &self.rails[rail];
        let stays = self.nics[usize::from(state.nic.0)].cores.contains(&state.core);
        if stays { state.core } else { self.choose_core(rail) }
    }

    fn make(&mut self, rail: usize, for_peer: Option<(Box<Inbound>, PeerEnd)>) {
        if let Some((_, theirs)) = &for_peer {
            self.rails[rail].count = theirs.qpns.len();
        }
        let core = self.core_for(rail);
        let options = &self.config.rails;
        let caps = QpCaps {
            max_send_wr: options.max_send_wr,
            max_send_sge: options.max_send_sge,
            max_inline: options.max_inline,
        };
        let state = &mut self.rails[rail];
        state.core = core;
        state.evicted = None;
        state.end = End::Making(for_peer);
        let (nic, count) = (state.nic, state.count);
        self.run(nic, JobKind::Make { core, count, caps }, Pending::End(rail));
    }

    /// A job for the present end is done.
    pub(super) fn end_job_done(&mut self, rail: usize, outcome: Outcome) {
        match (std::mem::replace(&mut self.rails[rail].end, End::Down), outcome) {
            (End::Dialling(theirs), outcome) => return self.dialled(rail, theirs, outcome),
            (End::Making(for_peer), Outcome::Made(Ok(qps))) => {
                let qpns: Vec<Qpn> = qps.iter().map(moonrail_datapath::nic::Qp::qpn).collect();
                let psns =
                    qpns.iter().map(|_| SqPsn::new(self.random.draw() as u32 & 0x00ff_ffff).unwrap_or(SqPsn::STOCK));
                let ours = OwnEnd { psns: psns.collect(), qpns, mtu: self.own_mtu(self.rails[rail].nic) };
                self.rails[rail].end = End::Asking { qps, ours: ours.clone() };
                let own_path = self.own_nic(self.rails[rail].nic).path;
                match for_peer {
                    Some((inbound, theirs)) => self.connect(rail, theirs, Then::Answer(inbound)),
                    None if own_path == self.rails[rail].peer_path => {
                        let nic = self.own_nic(self.rails[rail].nic);
                        let mirror = handshake::hello(&nic, &nic.path, Some(&ours), &self.own_extra(), false);
                        match handshake::peer_end(&mirror, None) {
                            Ok(theirs) => self.connect(rail, theirs, Then::Loop),
                            Err(text) => self.abandon(rail, &text),
                        }
                    }
                    None => {}
                }
            }
            (End::Making(for_peer), outcome) => {
                let text = match outcome {
                    Outcome::Made(Err(error)) => error.to_string(),
                    _ => "the device's job was lost".to_owned(),
                };
                if let Some((inbound, _)) = for_peer {
                    let refusal = self.unavailable(rail);
                    self.refuse(&inbound, refusal);
                }
                self.attempt_failed(rail, &text);
            }
            (End::Connecting { ours, theirs, mtu, then }, Outcome::Connected(Ok(halves))) => {
                let acks = theirs.acks;
                let peer = self.peer(self.rails[rail].peer);
                let is_over = theirs.incarnation.is_some_and(|life| peer.lives.is_past(life));
                self.rails[rail].end = End::Half { ours: ours.clone(), theirs, mtu, halves, since: self.now };
                match then {
                    // Its process ended while the device was at work.
                    then if is_over => {
                        if let Then::Answer(inbound) = then {
                            self.refuse(&inbound, rejection::ACK_STALE.to_owned());
                        }
                        self.abandon(rail, "the peer was restarted while it was being connected");
                    }
                    Then::Answer(inbound) => {
                        let hello = self.our_hello(rail, &ours, false);
                        self.reply(&inbound, &hello);
                        if !acks {
                            self.promote(rail);
                        }
                    }
                    Then::Acknowledge if acks => self.acknowledge(rail, &ours),
                    Then::Acknowledge | Then::Loop => self.promote(rail),
                }
                self.at(self.now.plus(READY_ASKED), Timer::Rail(rail));
            }
            (End::Connecting { then, .. }, outcome) => {
                let (text, refusal) = match outcome {
                    Outcome::Connected(Err(error)) => (error.to_string(), error.refusal()),
                    _ => ("the device's job was lost".to_owned(), self.unavailable(rail)),
                };
                if let Then::Answer(inbound) = then {
                    self.refuse(&inbound, refusal);
                }
                self.look_at(self.rails[rail].nic);
                self.attempt_failed(rail, &text);
            }
            (end, _) => self.rails[rail].end = end,
        }
        self.serve(rail);
        // Nobody asked us meanwhile: ask ourselves.
        if let (End::Asking { ours, .. }, None) = (&self.rails[rail].end, self.rails[rail].asked) {
            let ours = ours.clone();
            self.ask(rail, ours);
        }
        if self.stopping {
            self.drop_end(rail);
        }
    }

    /// What we say of our end, whoever began. Each has a count of its own: of two that name different queue pairs, those of
    /// the higher one are there.
    fn our_hello(&mut self, rail: usize, ours: &OwnEnd, ready: bool) -> Hello {
        self.tokens += 1;
        let state = &self.rails[rail];
        let mut hello =
            handshake::hello(&self.own_nic(state.nic), &state.peer_path, Some(ours), &self.own_extra(), ready);
        hello.extra.serial = Some(self.tokens);
        hello.extra.peer_qpns = state.theirs().map(|theirs| theirs.qpns.clone()).unwrap_or_default();
        hello
    }

    fn ask(&mut self, rail: usize, ours: OwnEnd) {
        if !self.is_wanted(rail) {
            return self.drop_end(rail);
        }
        let body = self.our_hello(rail, &ours, false).encode();
        let token = self.token(Pending::Hello { rail, ours });
        self.rails[rail].asked = Some(token);
        self.dial(self.rails[rail].peer, token, Frame::typed(MessageType::Connection, body));
    }

    fn acknowledge(&mut self, rail: usize, ours: &OwnEnd) {
        let body = self.our_hello(rail, ours, true).encode();
        let token = self.token(Pending::Ack { rail, qpns: ours.qpns.clone() });
        self.dial(self.rails[rail].peer, token, Frame::typed(MessageType::Connection, body));
    }

    /// Connects the queue pairs that are there.
    fn connect(&mut self, rail: usize, theirs: PeerEnd, then: Then) {
        let End::Asking { qps, ours } = std::mem::replace(&mut self.rails[rail].end, End::Down) else { return };
        let state = &self.rails[rail];
        let plan = handshake::plan(&self.own_nic(state.nic), &ours, &theirs, state.mtu.current(), &self.config.rails);
        match plan {
            Ok(plan) => {
                let mtu = plan.path_mtu;
                self.rails[rail].end = End::Connecting { ours, theirs, mtu, then };
                let nic = self.rails[rail].nic;
                self.run(nic, JobKind::Connect { qps, plan: Box::new(plan) }, Pending::End(rail));
            }
            Err(text) => {
                let nic = self.rails[rail].nic;
                self.run(nic, JobKind::Destroy(Unused { fresh: qps, ..Unused::default() }), Pending::Destroy);
                if let Then::Answer(inbound) = then {
                    self.refuse(&inbound, text.clone());
                }
                self.attempt_failed(rail, &text);
            }
        }
    }

    /// The peer replied to our hello, or not.
    pub(super) fn hello_replied(
        &mut self,
        rail: usize,
        token: super::Token,
        ours: OwnEnd,
        result: Result<Frame, NoReply>,
    ) {
        if self.rails[rail].asked == Some(token) {
            self.rails[rail].asked = None;
        }
        if let Err(NoReply::Dial(_)) = &result {
            self.forget_address(self.rails[rail].peer);
        }
        let result = result.map_err(|silence| silence.text());
        if self.rails[rail].is_busy() {
            self.rails[rail].reply = Some(Box::new((token, ours, result)));
            return;
        }
        self.judge_reply(rail, token, &ours, result);
        self.attempt(rail);
    }

    fn judge_reply(&mut self, rail: usize, token: super::Token, asked: &OwnEnd, result: Result<Frame, String>) {
        let reply = result.and_then(|frame| {
            Hello::parse(&frame.body).map_err(|error| format!("the peer's reply cannot be read: {error}"))
        });
        let still_ours = self.rails[rail].ours().is_some_and(|ours| ours.qpns == asked.qpns);
        let reply = match reply {
            Ok(reply) => reply,
            Err(text) => {
                // Connected meanwhile by the peer's own hello: that one counts.
                if still_ours && matches!(self.rails[rail].progress(), Progress::Asked(_)) {
                    self.abandon(rail, &text);
                }
                return;
            }
        };
        let peer = self.rails[rail].peer;
        let own_path = self.own_nic(self.rails[rail].nic).path;
        let device = self.peer(peer).nic_name(self.rails[rail].peer_nic).to_owned();
        let known = self.known_gid(peer, &device);
        let state = &self.rails[rail];
        let step = initiator::judge(&reply, asked, &own_path, &state.peer_path, known, state.progress());
        match step {
            initiator::Step::Connect(theirs) => {
                if let Some(incarnation) = theirs.incarnation
                    && !self.note_life(peer, incarnation, theirs.boot_id.as_deref(), Some(theirs.gid), Some(token))
                {
                    return self.abandon(rail, "the peer was restarted after it replied");
                }
                self.hear(rail, &reply);
                self.prove(rail, &theirs);
                self.connect(rail, theirs, Then::Acknowledge);
            }
            initiator::Step::Acknowledge { acks } => {
                if let Some(theirs) = self.rails[rail].theirs().cloned() {
                    self.prove(rail, &theirs);
                }
                if acks {
                    self.acknowledge(rail, asked);
                } else {
                    self.promote(rail);
                }
            }
            initiator::Step::Refused(text) => {
                if text == rejection::QP_COUNT && !reply.qp_num.is_empty() {
                    // The refusal shows how many the peer has: have as many next time.
                    let most = moonrail_datapath::limits::QPS_PER_RAIL_MAX;
                    self.rails[rail].count = reply.qp_num.len().min(most);
                }
                let server = self.peer(peer).server.clone();
                self.abandon(
                    rail,
                    &format!(
                        "Handshake rejected by {server}: {text} (the error is on the peer's side; see its log too)"
                    ),
                );
            }
            initiator::Step::Again(text) => match self.rails[rail].progress() {
                Progress::Asked(_) => self.abandon(rail, &text),
                _ => self.lose(rail, &text),
            },
            initiator::Step::Ignore => {}
        }
    }

    pub(super) fn ack_replied(&mut self, rail: usize, qpns: &[Qpn], result: Result<Frame, NoReply>) {
        if self.rails[rail].ours().is_none_or(|ours| ours.qpns != qpns) {
            return;
        }
        let server = self.peer(self.rails[rail].peer).server.clone();
        let result = match result {
            Ok(frame) => match Hello::parse(&frame.body) {
                Ok(reply) => match reply.refusal() {
                    None => Ok(()),
                    Some(text) => Err((true, format!("Handshake rejected by {server}: {text}"))),
                },
                Err(error) => Err((false, format!("the peer's answer to the ready ACK cannot be read: {error}"))),
            },
            Err(silence) => Err((false, format!("the ready ACK was not delivered: {}", silence.text()))),
        };
        match (result, self.rails[rail].progress()) {
            (Ok(()), Progress::Half(..)) => self.promote(rail),
            (Err((_, text)), Progress::Half(..)) => {
                self.drop_end(rail);
                self.attempt_failed(rail, &text);
            }
            // The peer's own acknowledgement made the rail whole; then only its word that it is not ends that.
            (Err((true, text)), Progress::Whole(..)) => self.lose(rail, &text),
            _ => {}
        }
    }

    // ---- being asked ----

    /// Judges the requests that wait, until a job has to run first.
    pub(super) fn serve(&mut self, rail: usize) {
        loop {
            if self.rails[rail].is_busy() {
                return;
            }
            if let Some(reply) = self.rails[rail].reply.take() {
                let (token, ours, result) = *reply;
                self.judge_reply(rail, token, &ours, result);
                continue;
            }
            if self.rails[rail].looking || self.rails[rail].is_ending() {
                return;
            }
            let Some(mut inbound) = self.rails[rail].requests.pop_front() else { return };
            if self.has_to_look_up(rail, &inbound) {
                inbound.looked_up = true;
                self.rails[rail].requests.push_front(inbound);
                self.rails[rail].looking = true;
                self.fetch(self.rails[rail].peer);
                return;
            }
            self.judge_request(rail, inbound);
        }
    }

    /// Whether the peer's descriptor has to tell what its hello leaves out. It is asked for in a store only: no stranger
    /// makes us connect to an address of its choice.
    fn has_to_look_up(&self, rail: usize, inbound: &Inbound) -> bool {
        let state = &self.rails[rail];
        let device = self.peer(state.peer).nic_name(state.peer_nic);
        self.config.store.is_some()
            && !inbound.looked_up
            && !inbound.hello.is_ready_ack()
            && inbound.hello.local_gid == crate::wire::GidText::Absent
            && self.known_gid(state.peer, device).is_none()
    }

    fn judge_request(&mut self, rail: usize, inbound: Box<Inbound>) {
        if !self.nics[usize::from(self.rails[rail].nic.0)].is_up() || self.stopping {
            let text = self.unavailable(rail);
            return self.refuse(&inbound, text);
        }
        let late = !self.hear(rail, &inbound.hello);
        let peer = self.rails[rail].peer;
        let own_path = self.own_nic(self.rails[rail].nic).path;
        let device = self.peer(peer).nic_name(self.rails[rail].peer_nic).to_owned();
        let known = self.known_gid(peer, &device);
        let state = &self.rails[rail];
        match responder::judge(&inbound.hello, &own_path, &state.peer_path, known, state.progress()) {
            responder::Step::Refuse(text) => self.refuse(&inbound, text),
            responder::Step::Ready => {
                self.reply(&inbound, &Hello::default());
                self.promote(rail);
            }
            responder::Step::Repeat { whole } => {
                if let Some(ours) = self.rails[rail].ours().cloned() {
                    let hello = self.our_hello(rail, &ours, false);
                    self.reply(&inbound, &hello);
                }
                if whole {
                    self.promote(rail);
                }
            }
            // It was given up: whoever sent it has named other queue pairs since.
            _ if late => self.refuse(&inbound, rejection::ACK_STALE.to_owned()),
            responder::Step::Join(theirs) => self.connect(rail, theirs, Then::Answer(inbound)),
            responder::Step::Fresh(theirs) => {
                self.drop_end(rail);
                self.make_for(rail, inbound, theirs);
            }
            responder::Step::Replace(theirs) => {
                let text =
                    "the peer connects anew (restarted, or saw an error that we did not): Retiring stale endpoint";
                self.replace(rail, text);
                self.make_for(rail, inbound, theirs);
            }
        }
    }

    /// Makes queue pairs for a peer's request, once what it replaces has ended: our reply is the peer's proof of that.
    fn make_for(&mut self, rail: usize, inbound: Box<Inbound>, theirs: PeerEnd) {
        if self.rails[rail].is_ending() {
            self.rails[rail].requests.push_front(inbound);
        } else {
            self.make(rail, Some((inbound, theirs)));
        }
    }

    /// Notes what the peer says of its end of this rail, be it a hello, a reply or an acknowledgement. Returns whether that is
    /// news: if the peer said something later before, other queue pairs that this names are gone. (Only moonrail peers say.)
    fn hear(&mut self, rail: usize, hello: &Hello) -> bool {
        let (Some(incarnation), Some(serial)) = (hello.extra.node.incarnation, hello.extra.serial) else {
            return true;
        };
        let heard = &mut self.rails[rail].heard;
        let news = heard.is_none_or(|(life, newest)| life != incarnation || serial >= newest);
        if news {
            *heard = Some((incarnation, serial));
        }
        news
    }

    // ---- connected ----

    /// Both ends are ready: hands the queue pairs to the core. Nothing happens if that was done.
    fn promote(&mut self, rail: usize) {
        if self.stopping {
            return self.drop_end(rail);
        }
        match std::mem::replace(&mut self.rails[rail].end, End::Down) {
            End::Half { ours, theirs, mtu, halves, .. } => self.adopt(rail, ours, theirs, mtu, halves),
            end => self.rails[rail].end = end,
        }
    }

    pub(super) fn adopt(
        &mut self,
        rail: usize,
        ours: OwnEnd,
        theirs: PeerEnd,
        mtu: Mtu,
        halves: Vec<(ConnectedQp, moonrail_datapath::nic::AdminHalf)>,
    ) {
        let key = RailKey { rail: self.rails[rail].id, life: self.rails[rail].lives };
        let (qps, admins): (Vec<_>, Vec<_>) = halves.into_iter().unzip();
        self.give_to_core(rail, key, qps);
        let end = theirs.clone();
        let state = &mut self.rails[rail];
        state.lives += 1;
        state.retry_at = None;
        let life = Life {
            key,
            ours,
            theirs,
            mtu,
            admins,
            since: self.now,
            proven: None,
            leave: Leave::No,
            idle: Vec::new(),
            posts: Vec::new(),
            needs_fence: false,
        };
        state.end = End::Whole(life);
        self.at(self.now.plus(TRIAL_WITHIN), Timer::Rail(rail));
        if !self.rails[rail].fabric.is_dialled() {
            self.prove(rail, &end);
        }
        self.note_return(rail);
    }

    /// Hands a life to the rail's core, which tries it out.
    pub(super) fn give_to_core(&mut self, rail: usize, key: RailKey, qps: Vec<ConnectedQp>) {
        let state = &self.rails[rail];
        let spec = RailSpec {
            key,
            peer: self.peer(state.peer).shared.clone(),
            nic: state.nic,
            peer_nic: state.peer_nic,
            counters: state.counters.clone(),
            claims: self.claims(rail),
        };
        let core = state.core;
        self.rails[rail].claims = spec.claims;
        for qp in qps {
            self.command(core, Command::Adopt { rail: spec.clone(), qp });
        }
    }

    // ---- failing ----

    /// Gives up the present attempt and counts it.
    fn abandon(&mut self, rail: usize, text: &str) {
        self.drop_end(rail);
        self.attempt_failed(rail, text);
    }

    /// Destroys queue pairs that no core has. A whole rail is left alone.
    pub(super) fn drop_end(&mut self, rail: usize) {
        let nic = self.rails[rail].nic;
        let unused = match std::mem::replace(&mut self.rails[rail].end, End::Down) {
            // In RESET: whatever the peer connected to them, they accept nothing.
            End::Asking { qps, .. } => {
                self.run(nic, JobKind::Destroy(Unused { fresh: qps, ..Unused::default() }), Pending::Destroy);
                return;
            }
            End::Half { halves, .. } => Unused { connected: halves, ..Unused::default() },
            // A job has them, or the core: the one to end will find the rail as it is then.
            end => {
                self.rails[rail].end = end;
                return;
            }
        };
        self.rails[rail].dying += 1;
        self.run(nic, JobKind::Destroy(unused), Pending::Dropped(rail));
    }

    pub(super) fn attempt_failed(&mut self, rail: usize, text: &str) {
        self.trouble(rail, text);
        let wait = self.rails[rail].fail(&mut self.random);
        self.retry_in(rail, wait);
        self.check_reach(self.rails[rail].peer);
    }

    pub(super) fn retry_in(&mut self, rail: usize, wait: Nanos) {
        let at = self.now.plus(wait);
        self.rails[rail].retry_at = Some(at);
        self.at(at, Timer::Rail(rail));
    }

    pub(super) fn rail_due(&mut self, rail: usize) {
        if let End::Half { since, ours, theirs, .. } = &self.rails[rail].end {
            let (waited, since) = (self.now.since(*since), *since);
            let (ours, moonrail) = (ours.clone(), theirs.is_moonrail());
            if waited >= READY_WITHIN && self.is_wanted(rail) {
                let path = self.rails[rail].peer_path.clone();
                self.abandon(rail, &format!("Timed out waiting for RDMA ready ACK for endpoint: {path}"));
            } else if waited >= READY_AT_ALL {
                self.drop_end(rail);
            } else {
                if moonrail && waited >= READY_ASKED && self.rails[rail].asked.is_none() && self.is_wanted(rail) {
                    self.ask(rail, ours);
                }
                let next = if waited < READY_WITHIN { since.plus(READY_WITHIN) } else { since.plus(READY_AT_ALL) };
                let again = self.now.plus(READY_ASKED);
                self.at(if moonrail { next.min(again) } else { next }, Timer::Rail(rail));
            }
        }
        if let End::Whole(life) = &self.rails[rail].end
            && life.proven.is_none()
            && self.now.since(life.since) >= TRIAL_WITHIN
        {
            self.lose(rail, "the rail's trial has not come back, not even as an error; see `dmesg` for the device");
        }
        self.ask_idle_again(rail);
        self.expire_old(rail);
        self.ask_fence(rail);
        self.attempt(rail);
    }
}
