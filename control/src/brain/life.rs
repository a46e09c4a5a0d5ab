//! A rail from connected to buried.
//!
//! ```text
//!  Whole ──(first error, port down, peer restarted)──▶ retired: core told, queue pairs moved to ERR
//!        ──▶ drained: the core gave every half back     ──▶ a new life is begun, with back-off
//!        ──▶ fenced: the peer's end is proven retired   ──▶ core told, queue pairs destroyed
//! ```
//!
//! What proves it: the same process, or another on its host, accepted or presented fresh queue pairs for the same pair of NICs; or it says so
//! ([`super::fence`]); or another incarnation on the same host answers what it was asked ([`Brain::note_life`]). Time, refused
//! connections and a lost lease prove nothing.

use std::collections::BTreeSet;

use moonrail_datapath::core::port::{Command, CoreEvent, RailKey};
use moonrail_datapath::error::{Cause, FaultClass, FirstError, classify};
use moonrail_datapath::nic::{ConnectedQp, Fabric, Op, PostHalf, WcStatus};
use moonrail_datapath::units::{CoreId, Mtu, Nanos, NicId, PeerId};

use super::event::{Action, Answer, Token};
use super::incident::{Seen, advice, decided};
use super::rail::{End, Leave, Life, OldLife};
use super::{Brain, Kind, Pending, Timer};
use crate::config::LogLevel;
use crate::connect::{JobKind, Outcome, Unused};
use crate::handle::Charge;
use crate::handshake::PeerEnd;

/// Attempts at every rail after which a peer counts as unreachable…
const ROUNDS: u32 = 3;
/// …but not before this time has passed since the first.
const PATIENCE: Nanos = Nanos::from_secs(2);
/// A life that carried data this long was a good one: what follows is not its fault, and begins with short waits.
const SETTLED: Nanos = Nanos::from_secs(10);
/// Lives that need no fence are kept this long before their queue pairs are destroyed without proof, so that their
/// numbers do not come back under a late packet.
const UNPROVEN_FOR: Nanos = Nanos::from_secs(60);
/// How long what is on its way may take to arrive when everything ends. Cut off, a WRITE could land late, and the memory it
/// comes from and goes to could not be let go without the peer's word.
const STOP_GRACE: Nanos = Nanos::from_secs(1);
/// Such lives kept per rail.
const UNPROVEN_MAX: usize = 8;

impl Brain {
    pub(super) fn core_event(&mut self, core: CoreId, event: CoreEvent) {
        match event {
            CoreEvent::FirstError { key, error } => self.first_error(key, &error),
            CoreEvent::Drained { key, qp, flushed, needs_fence } => self.drained(key, qp, flushed, needs_fence),
            CoreEvent::Yielded { key, qp } => self.yielded(key, qp),
            CoreEvent::InUse { key } => self.in_use(key),
            CoreEvent::Overdue { key, slot, qp } => self.overdue(key, slot, qp),
            CoreEvent::Proven { key } => self.proven(key),
            CoreEvent::Wanted { peer } => self.wanted(peer),
            // The driver takes these two off before they get here; a simulation may not.
            CoreEvent::Finished(work) => {
                work.completion().wake();
                self.run(NicId(0), JobKind::Discard(Box::new(work)), Pending::Destroy);
            }
            CoreEvent::Released(work) => {
                self.run(NicId(0), JobKind::Discard(Box::new(work)), Pending::Destroy);
            }
            CoreEvent::CqLost { nic } => self.cq_lost(core, nic),
            CoreEvent::Stopped => {
                self.cores_left = self.cores_left.saturating_sub(1);
                if self.stopping {
                    self.maybe_stopped();
                }
            }
        }
    }

    fn first_error(&mut self, key: RailKey, error: &FirstError) {
        let Some(rail) = self.living(key) else { return };
        let class = classify(error.status);
        let End::Whole(life) = &self.rails[rail].end else { return };
        let (mtu, moonrail) = (life.mtu, life.theirs.is_moonrail());
        // A stock peer does not say its MTU. The wrong one shows as a refusal, or it swallows what is larger than a packet
        // (a trial has no bytes, so it passes, and one that fails says nothing of the MTU): then the rail works, and fails, and
        // works again.
        let state = &mut self.rails[rail];
        let swallowed = class == FaultClass::Path && error.len > Mtu::B256.bytes();
        state.swallowed += u32::from(swallowed);
        let unsure = class == FaultClass::MtuOrRequest || swallowed && state.swallowed > 1;
        let (mut note, mut decision) = (String::new(), decided(class).to_owned());
        if unsure
            && !moonrail
            && state.fabric == Fabric::Rdma
            && let Some(next) = state.mtu.suspect(mtu, state.counters.bytes.get(), state.counters.slices.get())
        {
            note = format!("; path MTU {mtu} may not be the peer's, trying {next} (set MC_MTU alike on both ends)");
            decision = format!("connected anew with path MTU {next} in place of {mtu}");
        }
        let op = match error.op {
            Op::Read => "READ",
            Op::Write => "WRITE",
        };
        let text = format!(
            "Worker: Process failed for slice: {} (status {}, vendor {:#x}) on QP {}, {op} of {} bytes, local {:#x}, remote {:#x}, \
             {:?} after it was posted, {} behind it flushed{note}; {}",
            error.status.text(),
            error.status.0,
            error.vendor_err,
            error.qpn,
            error.len,
            error.local,
            error.remote.0,
            error.age.to_duration(),
            error.behind,
            advice(error.status, class, state.fabric),
        );
        let charge = match class {
            FaultClass::Request => Charge::Request,
            FaultClass::Local => Charge::Port,
            FaultClass::Flush | FaultClass::MtuOrRequest | FaultClass::Path | FaultClass::Unknown => Charge::Pair,
        };
        let seen =
            Seen { status: Some(error.status.0), vendor_err: error.vendor_err, age: error.age, charge, decision };
        self.open_incident(rail, &text, &seen);
        self.retire(rail);
        let peer = self.rails[rail].peer;
        if error.status == WcStatus::REM_ACCESS_ERR {
            // The peer may have registered anew: its keys are asked for again.
            self.peer_mut(peer).stale = true;
            self.fetch(peer);
        }
        // What drains is connected again; a wrong request is no reason to wait.
        let wait = self.rails[rail].fail(&mut self.random);
        let wait = if class == FaultClass::Request { Nanos::ZERO } else { wait };
        if class != FaultClass::Request {
            self.look_at(self.rails[rail].nic);
        }
        self.retry_in(rail, wait);
        self.check_reach(peer);
    }

    /// The rail whose present life this is.
    pub(super) fn living(&self, key: RailKey) -> Option<usize> {
        let rail = key.rail.0 as usize;
        matches!(&self.rails.get(rail)?.end, End::Whole(life) if life.key == key).then_some(rail)
    }

    fn proven(&mut self, key: RailKey) {
        let Some(rail) = self.living(key) else { return };
        let now = self.now;
        let state = &mut self.rails[rail];
        if let End::Whole(life) = &mut state.end {
            life.proven = Some(now);
        }
        (state.failing_since, state.failures, state.trouble) = (None, 0, None);
        let (peer, fabric) = (state.peer, state.fabric);
        let state = self.peer_mut(peer);
        (state.unreachable, state.cause) = (false, None);
        self.mend_fabric(peer, fabric);
        self.close_incident(rail);
    }

    // ---- the end of a life ----

    /// Ends whatever the rail has, for a reason that is not of its own making; it is tried again after its back-off.
    pub(super) fn lose(&mut self, rail: usize, why: &str) {
        self.lose_to(rail, why, Charge::Pair);
    }

    /// As [`Brain::lose`], where more than the pair is known to be at fault.
    pub(super) fn lose_to(&mut self, rail: usize, why: &str, charge: Charge) {
        match &self.rails[rail].end {
            End::Whole(_) => {
                self.open_incident(rail, why, &Seen::without_completion(charge));
                self.retire(rail);
                if let (Charge::Port, Some(life)) = (charge, self.rails[rail].old.last_mut()) {
                    life.untold = true;
                }
                let wait = self.rails[rail].fail(&mut self.random);
                self.retry_in(rail, wait);
                self.check_reach(self.rails[rail].peer);
            }
            End::Half { .. } | End::Asking { .. } => {
                self.drop_end(rail);
                self.attempt_failed(rail, why);
            }
            End::Down | End::Dialling(_) | End::Making(_) | End::Connecting { .. } => {}
        }
    }

    /// The peer's end is gone, as it says itself: ends the present life without blaming anybody.
    pub(super) fn replace(&mut self, rail: usize, text: &str) {
        if let End::Whole(life) = &self.rails[rail].end {
            let used = life.proven.is_some() && life.leave == Leave::No;
            if used {
                self.open_incident(rail, text, &Seen::without_completion(Charge::Peer));
            }
        }
        self.retire(rail);
        self.drop_end(rail);
        self.look_at(self.rails[rail].nic);
    }

    /// Takes the present life from the core. It becomes an old one.
    pub(super) fn retire(&mut self, rail: usize) {
        let Life { key, ours, theirs, admins, proven, idle, mut posts, needs_fence, .. } =
            match std::mem::replace(&mut self.rails[rail].end, End::Down) {
                End::Whole(life) => life,
                end => {
                    self.rails[rail].end = end;
                    return;
                }
            };
        posts.extend(idle.into_iter().map(ConnectedQp::into_post_half));
        let (core, nic) = (self.rails[rail].core, self.rails[rail].nic);
        if proven.is_some_and(|since| self.now.since(since) >= SETTLED) {
            self.rails[rail].backoff.reset();
            self.rails[rail].swallowed = 0;
            if self.rails[rail].counters.bytes.get() > 0 {
                self.rails[rail].mtu.works();
            }
        }
        self.command(core, Command::Retire { key });
        let failing = self.run(nic, JobKind::Fail { admins }, Pending::Fail { rail });
        let own_path = self.own_nic(nic).path;
        let state = &mut self.rails[rail];
        state.old.push(OldLife {
            key,
            core,
            qps: ours.qpns.len(),
            qpns: ours.qpns,
            peer_qpns: theirs.qpns,
            admins: Vec::new(),
            failing: Some(failing),
            posts,
            overdue: Vec::new(),
            gone: 0,
            needs_fence,
            // A loop has no other end than ours.
            proof: state.fabric == Fabric::Rdma && state.peer_path == own_path,
            untold: false,
            since: self.now,
            incarnation: theirs.incarnation,
            boot_id: theirs.boot_id,
            peer_gid: theirs.gid,
        });
    }

    /// The queue pairs of an old life are in ERR.
    pub(super) fn failed(&mut self, rail: usize, token: Token, outcome: Outcome) {
        let Some(life) = self.rails[rail].old.iter_mut().find(|life| life.failing == Some(token)) else { return };
        life.failing = None;
        match outcome {
            Outcome::Failed(admins) => life.admins = admins,
            // The job died with our halves: nothing of this life will ever be destroyed, nor can its numbers come back.
            _ => life.gone = life.qps - life.posts.len().min(life.qps),
        }
        let overdue: Vec<(u16, PostHalf)> = life.overdue.drain(..).collect();
        let key = life.key;
        for (slot, qp) in overdue {
            self.overdue(key, slot, qp);
        }
        self.bury(rail);
        self.answer_fences(rail);
        self.ask_fence(rail);
        self.serve(rail);
        self.attempt(rail);
    }

    fn old_life(&mut self, key: RailKey) -> Option<&mut OldLife> {
        self.rails.get_mut(key.rail.0 as usize)?.old.iter_mut().find(|life| life.key == key)
    }

    pub(super) fn drained(&mut self, key: RailKey, qp: PostHalf, flushed: u32, needs_fence: bool) {
        if let Some(rail) = self.living(key) {
            // The core gives it back unasked.
            if self.stopping {
                return self.returned(rail, qp, needs_fence);
            }
            let text = "the core gave the queue pairs back unused, it has no place for more: give the engine more cores, \
                        or fewer peers";
            self.lose(rail, text);
        }
        let Some(life) = self.old_life(key) else {
            self.run(NicId(0), JobKind::Discard(Box::new(qp)), Pending::Destroy);
            return;
        };
        life.posts.push(qp);
        life.needs_fence |= needs_fence;
        let rail = key.rail.0 as usize;
        self.note_flushed(rail, flushed);
        self.bury(rail);
        self.ask_fence(rail);
        self.attempt(rail);
        if self.stopping {
            self.maybe_stopped();
        }
    }

    /// A core that stops lets what is on its way arrive. When it has given back all of a life, nothing of it is.
    fn returned(&mut self, rail: usize, qp: PostHalf, needs_fence: bool) {
        let End::Whole(life) = &mut self.rails[rail].end else { return };
        life.posts.push(qp);
        life.needs_fence |= needs_fence;
        if life.posts.len() >= life.admins.len() {
            self.retire(rail);
        }
    }

    /// A queue pair in ERR does not drain: destroying it is then the outcome of what it holds.
    fn overdue(&mut self, key: RailKey, slot: u16, qp: PostHalf) {
        let rail = key.rail.0 as usize;
        let Some(life) = self.old_life(key) else {
            self.run(NicId(0), JobKind::Discard(Box::new(qp)), Pending::Destroy);
            return;
        };
        life.needs_fence = true;
        if life.failing.is_some() {
            life.overdue.push((slot, qp));
            return;
        }
        let core = life.core;
        let number = qp.qpn();
        let unused = if let Some(at) = life.admins.iter().position(|admin| admin.qpn() == number) {
            Unused { drained: vec![(life.admins.remove(at), qp)], ..Unused::default() }
        } else {
            self.run(NicId(0), JobKind::Discard(Box::new(qp)), Pending::Destroy);
            return;
        };
        let nic = self.rails[rail].nic;
        let device = self.nics[usize::from(nic.0)].name.clone();
        self.log(
            LogLevel::Warning,
            format!("queue pair {number} of device {device} did not give back its requests in time: destroying it"),
        );
        self.run(nic, JobKind::Destroy(unused), Pending::Overdue { rail, life: key.life, core, slot });
    }

    pub(super) fn overdue_destroyed(&mut self, rail: usize, life: u32, core: CoreId, slot: u16) {
        self.command(core, Command::Destroyed { slot });
        if let Some(life) = self.rails[rail].old.iter_mut().find(|l| l.key.life == life) {
            life.gone += 1;
        }
        self.bury(rail);
        self.attempt(rail);
    }

    /// The peer accepted, or presented, fresh queue pairs for this pair of NICs: what the same process had before is retired,
    /// and what another one had under the same host ended with it. Of another host a process can say nothing.
    pub(super) fn prove(&mut self, rail: usize, theirs: &PeerEnd) {
        for life in &mut self.rails[rail].old {
            let same_process = life.incarnation.is_some() && life.incarnation == theirs.incarnation;
            let same_boot = life.boot_id.is_some() && life.boot_id == theirs.boot_id;
            life.proof |= same_process || same_boot || life.peer_gid == theirs.gid;
        }
        self.bury(rail);
    }

    /// Nothing is sent any more, and nothing waits: no former life of this rail has anything left to protect.
    fn prove_all(&mut self, rail: usize) {
        for life in &mut self.rails[rail].old {
            life.proof = true;
        }
        self.bury(rail);
    }

    /// Ends every old life that is drained and fenced.
    pub(super) fn bury(&mut self, rail: usize) {
        let now = self.now;
        let state = &mut self.rails[rail];
        let spare = state.old.len().saturating_sub(UNPROVEN_MAX);
        let mut done = Vec::new();
        let mut kept = Vec::new();
        for (at, life) in std::mem::take(&mut state.old).into_iter().enumerate() {
            // A dialled one leaves no number behind under which something could arrive late.
            let unneeded =
                !life.needs_fence && (state.fabric.is_dialled() || now.since(life.since) >= UNPROVEN_FOR || at < spare);
            if life.is_drained() && (life.proof || unneeded) {
                done.push(life);
            } else {
                kept.push(life);
            }
        }
        state.old = kept;
        let nic = state.nic;
        for life in done {
            if life.proof {
                self.command(life.core, Command::Fenced { key: life.key });
            }
            let mut admins = life.admins;
            let mut unused = Unused::default();
            for post in life.posts {
                if let Some(at) = admins.iter().position(|admin| admin.qpn() == post.qpn()) {
                    unused.drained.push((admins.swap_remove(at), post));
                }
            }
            if !unused.is_empty() {
                self.run(nic, JobKind::Destroy(unused), Pending::Destroy);
            }
        }
        if let Some(oldest) = self.rails[rail].old.first() {
            let at = oldest.since.plus(UNPROVEN_FOR);
            if at > now {
                self.at(at, Timer::Rail(rail));
            }
        }
    }

    pub(super) fn expire_old(&mut self, rail: usize) {
        if !self.rails[rail].old.is_empty() {
            self.bury(rail);
        }
    }

    // ---- peers that cannot be reached ----

    /// Work waits for this peer.
    fn wanted(&mut self, peer: PeerId) {
        if peer.0 as usize >= self.peers.len() || self.stopping {
            return;
        }
        self.peer_mut(peer).wanted = Some(self.now);
        if self.peer(peer).rails.iter().any(|rail| self.rails[*rail].carries()) {
            return;
        }
        if self.peer(peer).segment.is_none() && self.peer(peer).rails.is_empty() {
            return self.fetch(peer);
        }
        if self.peer(peer).unreachable && self.peer(peer).stale {
            // Gone for good, or back as another process: its descriptor tells.
            self.fetch(peer);
        }
        self.try_again_if_idle(peer);
        self.use_again(peer);
        self.connect_peer(peer);
        self.check_reach(peer);
        if self.peer(peer).unreachable {
            let cause = self.peer(peer).cause.clone().unwrap_or_default();
            self.give_up(peer, &cause);
        }
    }

    /// A verdict that nobody has checked for a while is worth nothing: the peer gets a new chance.
    fn try_again_if_idle(&mut self, peer: PeerId) {
        let rails = self.peer(peer).rails.clone();
        let idle = |rail: &usize| {
            let state = &self.rails[*rail];
            let waits = state.retry_at.is_some_and(|at| at > self.now);
            matches!(state.end, End::Down) && state.asked.is_none() && !waits
        };
        // With NICs that are lost it is no better now.
        let hopeless = !rails.is_empty() && rails.iter().all(|rail| self.is_lost(*rail));
        if !self.peer(peer).unreachable || hopeless || !rails.iter().all(idle) {
            return;
        }
        let state = self.peer_mut(peer);
        (state.unreachable, state.cause) = (false, None);
        for rail in rails {
            self.rails[rail].forgive();
            self.rails[rail].failing_since = None;
        }
    }

    /// Whether every rail to a peer has failed often and long enough; then what waits for it is told.
    pub(super) fn check_reach(&mut self, peer: PeerId) {
        if self.peer(peer).wanted.is_none() || self.peer(peer).unreachable {
            return;
        }
        // A fabric that was ruled out is not tried, so that its rail would never fail often enough.
        let counts = |rail: &usize| self.claims(*rail) && self.uses(*rail);
        let rails: Vec<usize> = self.peer(peer).rails.iter().copied().filter(counts).collect();
        if rails.is_empty() {
            if let Some(segment) = &self.peer(peer).segment {
                let (name, ways) = (segment.name.clone(), self.ways(peer));
                let why: Vec<String> = ways.into_iter().map(|way| way.why).collect();
                let text = format!(
                    "no pair of NICs connects this node with {name}: {}; check the NICs both nodes publish",
                    why.join("; ")
                );
                self.give_up(peer, &text);
            }
            return;
        }
        let cause = self.peer(peer).cause.clone().unwrap_or_else(|| self.losses(&rails));
        let mut rerouted = false;
        for fabric in Fabric::ALL {
            let mut of_it = rails.iter().filter(|rail| self.rails[**rail].fabric == fabric).peekable();
            // A port that is down is no reason to give up, but one to go another way meanwhile.
            if of_it.peek().is_some() && of_it.all(|rail| self.is_failing(*rail) || self.is_out(*rail)) {
                rerouted |= self.fail_fabric(peer, fabric, &cause, false);
            }
        }
        if !rerouted && rails.iter().all(|rail| self.is_failing(*rail)) {
            self.give_up(peer, &cause);
        }
    }

    /// Whether a rail has failed often, and for long, or can never work again.
    fn is_failing(&self, rail: usize) -> bool {
        self.is_lost(rail) || self.has_been_down(rail) && self.rails[rail].failures >= ROUNDS
    }

    /// Whether our NIC of a rail is lost for good: nobody will try it, so no failures will be counted.
    fn is_lost(&self, rail: usize) -> bool {
        self.nics[usize::from(self.rails[rail].nic.0)].is_lost()
    }

    /// Why rails do not work that were never tried.
    fn losses(&self, rails: &[usize]) -> String {
        let lost = rails.iter().filter(|rail| self.is_lost(**rail));
        let names: BTreeSet<&str> = lost.map(|r| self.nics[usize::from(self.rails[*r].nic.0)].name.as_str()).collect();
        if names.is_empty() {
            return String::new();
        }
        let names: Vec<&str> = names.into_iter().collect();
        format!("device {} failed before; see `dmesg`, then restart this process", names.join(", "))
    }

    /// Whether our NIC of a rail is down, and has been for long.
    fn is_out(&self, rail: usize) -> bool {
        self.has_been_down(rail) && !self.nics[usize::from(self.rails[rail].nic.0)].is_up()
    }

    fn has_been_down(&self, rail: usize) -> bool {
        let state = &self.rails[rail];
        !state.is_proven() && state.failing_since.is_some_and(|since| self.now.since(since) >= PATIENCE)
    }

    /// Ends what waits for a rail to this peer.
    pub(super) fn give_up(&mut self, peer: PeerId, cause: &str) {
        let state = self.peer_mut(peer);
        state.cause.get_or_insert_with(|| cause.to_owned());
        if !std::mem::replace(&mut state.unreachable, true) {
            let name = self.peer(peer).shared.name().to_owned();
            self.log(LogLevel::Error, format!("peer {name} is unreachable; first cause: {cause}"));
        }
        for core in 0..self.config.cores {
            self.command(CoreId(core), Command::Unreachable { peer, cause: Cause::Unreachable });
        }
    }

    // ---- the end of everything ----

    pub(super) fn stop(&mut self, until: Nanos) {
        if self.stopping {
            return self.maybe_stopped();
        }
        self.stopping = true;
        let grace = STOP_GRACE.min(Nanos(until.since(self.now).0 / 4));
        self.at(self.now.plus(grace), Timer::Stop);
        self.refuse_waiting();
        self.withdraw_keys();
        for core in 0..self.config.cores {
            self.command(CoreId(core), Command::Stop);
        }
        for rail in 0..self.rails.len() {
            for inbound in std::mem::take(&mut self.rails[rail].requests) {
                self.out.push(Action::Close { conn: inbound.conn });
            }
            self.drop_end(rail);
            if matches!(self.rails[rail].leave(), Leave::Peer { .. }) {
                // The core has nothing of it that it could give back.
                self.retire(rail);
            }
        }
        self.maybe_stopped();
    }

    /// The time of grace is over: what has not arrived by now is cut off.
    pub(super) fn stop_now(&mut self) {
        for rail in 0..self.rails.len() {
            self.retire(rail);
        }
        self.maybe_stopped();
    }

    /// What keeps this node from stopping, for people.
    pub(super) fn unstopped(&self) -> String {
        let whole = |rail: &&super::rail::Rail| matches!(rail.end, End::Whole(_));
        let undrained = |rail: &&super::rail::Rail| rail.is_busy() || !rail.old.iter().all(OldLife::is_drained);
        format!(
            "{} data cores, {} rails in use, {} rails not drained, {} device jobs, {} metadata operations",
            self.cores_left,
            self.rails.iter().filter(whole).count(),
            self.rails.iter().filter(undrained).count(),
            self.running.len(),
            self.own.withdrawals()
        )
    }

    /// When the cores have stopped, every queue pair is back and our keys are gone, nothing is left to do.
    pub(super) fn maybe_stopped(&mut self) {
        if !self.stopping || self.cores_left > 0 || !self.own.is_withdrawn() {
            return;
        }
        let over = |rail: &super::rail::Rail| !rail.is_busy() && !matches!(rail.end, End::Whole(_));
        let drained = self.rails.iter().all(|rail| rail.old.iter().all(OldLife::is_drained) && over(rail));
        if !drained {
            return;
        }
        // What the fence would protect has ended with the cores.
        for rail in 0..self.rails.len() {
            self.drop_end(rail);
            self.prove_all(rail);
        }
        if !self.running.is_empty() {
            return;
        }
        for id in self.callers(|kind| *kind == Kind::Shutdown) {
            self.finish(id, Answer::Stopped);
        }
        self.out.push(Action::Exit);
    }
}
