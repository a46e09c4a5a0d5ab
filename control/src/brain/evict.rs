//! Idle rails over the limit of a NIC. They are given up without anybody's error, and connected again when they are used.
//!
//! ```text
//!  over the limit ──▶ the idle rail that was used least recently
//!    core: is anything posted on it, does anything wait for its peer? ──(yes)──▶ it stays
//!      │ no: the core gives it back. The peer still uses its end as it likes
//!    peer: is your end idle too?  ──(in use)──▶ the core gets it again, and it is left alone for a while
//!      │ yes, and retired            a stock peer is not asked: it knows no such question, and does not ask either
//!    queue pairs to ERR, destroyed once nothing can arrive late ([`super::life`])
//! ```
//!
//! One exchange settles it, because whoever asks has nothing on its way any more. Both may ask at the same moment: then each
//! knows that the other's end is idle.

use std::sync::atomic::Ordering;

use moonrail_datapath::core::port::{Command, RailKey};
use moonrail_datapath::limits::YIELDS_MAX;
use moonrail_datapath::nic::{ConnectedQp, Fabric};
use moonrail_datapath::units::{Nanos, NicId, PeerId};

use super::peer::NoReply;
use super::rail::{By, End, Inbound, Leave, Rail};
use super::{Brain, Pending, Timer};
use crate::config::{Eviction, LogLevel};
use crate::handshake;
use crate::wire::{Frame, Hello, MessageType};

/// A rail that was used less than this long ago is in use.
pub(super) const IDLE_FOR: Nanos = Nanos::from_secs(1);
/// One that is back soon after its eviction was not idle, only slow: from then on it has to be unused for twice as long, up to
/// this. It bounds what one rail more than the limit can cost when all are used in turn, which is the worst for a rule of
/// recency: each is connected anew four times, and then once in this time at the most.
const IDLE_FOR_AT_MOST: Nanos = Nanos::from_secs(16);
/// Soon: within so many times as long as it had to be unused.
const SOON: u64 = 4;
/// One that turned out to be in use, here or at the peer, is not asked about again for this long.
const KEPT_FOR: Nanos = Nanos::from_secs(10);
/// Shortest time between two counts of a NIC's rails.
const COUNT_EVERY: Nanos = Nanos::from_millis(20);
/// How often rails that were evicted are looked at, while their peers are reached by others.
const LOOK_AGAIN: Nanos = Nanos::from_secs(1);
/// First wait before a silent peer is asked again; it doubles.
const ASK_AGAIN: Nanos = Nanos::from_millis(100);
/// How often a silent peer is asked. Then the rail is given up: its other end is dead, or learns of it when it posts.
const TRIES: u32 = 3;
/// Work that waits for a rail which is being given up waits this long for the peer's answer.
const ANSWER_WITHIN: Nanos = Nanos::from_millis(500);
/// One line about evictions on a NIC in this time.
const LOG_EVERY: Nanos = Nanos::from_secs(60);

impl Brain {
    /// Has the rails of a NIC counted soon.
    pub(super) fn look_for_relief(&mut self, nic: NicId) {
        self.relief_at(nic, self.now.plus(COUNT_EVERY));
    }

    fn relief_at(&mut self, nic: NicId, at: Nanos) {
        let relief = &mut self.nics[usize::from(nic.0)].relief;
        if relief.is_none_or(|planned| planned > at) {
            *relief = Some(at);
            self.at(at, Timer::Relief(nic.0));
        }
    }

    /// Counts the rails of a NIC, and begins to give up those over its limit that are idle.
    pub(super) fn relieve(&mut self, nic: NicId) {
        let state = &mut self.nics[usize::from(nic.0)];
        // Planned anew for an earlier time, and done then.
        if state.relief.take_if(|at| *at <= self.now).is_none() || self.stopping || state.fabric == Fabric::Shm {
            return;
        }
        let limit = self.config.rails.rails_per_nic;
        let of_nic = || self.rails.iter().enumerate().filter(|(_, rail)| rail.nic == nic);
        let present = of_nic().filter(|(_, rail)| !matches!(rail.end, End::Down)).count();
        let leaving = of_nic().filter(|(_, rail)| rail.leave() != Leave::No).count();
        if present <= limit {
            return self.bring_back(nic, limit - present);
        }
        let mut excess = (present - limit).saturating_sub(leaving);
        let mut stay: Vec<(Nanos, Nanos, usize)> =
            of_nic().filter_map(|(at, rail)| idle_from(rail, self.config.rails.eviction, at)).collect();
        stay.sort_unstable();
        let mut next = Nanos::FAR;
        for (_, idle, rail) in stay {
            if excess == 0 {
                break;
            }
            if !self.may_ask() {
                next = self.now;
                break;
            }
            if idle <= self.now {
                self.ask_core(rail);
                excess -= 1;
            } else {
                next = next.min(idle);
            }
        }
        // Those that are asked now may turn out to be in use, and those that connect come to be idle.
        self.relief_at(nic, next.min(self.now.plus(LOOK_AGAIN)).max(self.now.plus(COUNT_EVERY)));
    }

    /// A NIC has room again: rails that it had evicted from under their peer's others come back, if the peer is used.
    fn bring_back(&mut self, nic: NicId, room: usize) {
        let used = |rail: &usize| self.rails[*rail].counters.used_ns.get();
        let evicted = |(at, rail): (usize, &Rail)| match rail.evicted {
            Some((By::Us, since)) if rail.nic == nic => Some((at, since)),
            _ => None,
        };
        let others = |at: usize| self.peer(self.rails[at].peer).rails.iter().filter(|r| self.rails[**r].is_proven());
        let waiting: Vec<(usize, Nanos)> =
            self.rails.iter().enumerate().filter_map(evicted).filter(|(at, _)| others(*at).next().is_some()).collect();
        let back: Vec<usize> = waiting
            .iter()
            .filter(|(at, since)| others(*at).any(|other| used(other) > since.0))
            .map(|(at, _)| *at)
            .take(room)
            .collect();
        for rail in &back {
            self.rails[*rail].evicted = None;
            self.attempt(*rail);
        }
        if waiting.len() > back.len() {
            self.relief_at(nic, self.now.plus(LOOK_AGAIN));
        }
    }

    /// Rails to this peer are wanted again.
    pub(super) fn use_again(&mut self, peer: PeerId) {
        for rail in self.peer(peer).rails.clone() {
            self.rails[rail].evicted = None;
            if let Leave::Peer { since, .. } = self.rails[rail].leave()
                && self.now.since(since) > ANSWER_WITHIN
            {
                self.evict(rail, By::Us);
            }
        }
    }

    /// A rail is connected, perhaps again.
    pub(super) fn note_return(&mut self, rail: usize) {
        let state = &mut self.rails[rail];
        if let Some(left) = state.left.take() {
            let soon = self.now.since(left).0 < SOON * state.patience.0;
            state.patience = if soon { Nanos(2 * state.patience.0).min(IDLE_FOR_AT_MOST) } else { IDLE_FOR };
        }
        self.look_for_relief(self.rails[rail].nic);
    }

    /// Whether one more rail may be asked back: a core has room for so many answers.
    fn may_ask(&self) -> bool {
        self.rails.iter().filter(|rail| matches!(rail.leave(), Leave::Core { .. })).count() < YIELDS_MAX
    }

    fn ask_core(&mut self, rail: usize) {
        let (core, now) = (self.rails[rail].core, self.now);
        if let End::Whole(life) = &mut self.rails[rail].end {
            life.leave = Leave::Core { since: now };
            let key = life.key;
            self.command(core, Command::Yield { key });
        }
    }

    /// The core has work on this rail, or for its peer.
    pub(super) fn in_use(&mut self, key: RailKey) {
        let Some(rail) = self.living(key) else { return };
        if let End::Whole(life) = &mut self.rails[rail].end {
            life.leave = Leave::No;
        }
        self.keep(rail);
    }

    fn keep(&mut self, rail: usize) {
        self.rails[rail].kept = Some(self.now);
        self.refuse_idle(rail);
        self.look_for_relief(self.rails[rail].nic);
    }

    /// The core gave one queue pair back.
    pub(super) fn yielded(&mut self, key: RailKey, qp: ConnectedQp) {
        let Some(rail) = self.living(key) else {
            return self.drained(key, qp.into_post_half(), 0, false);
        };
        let End::Whole(life) = &mut self.rails[rail].end else { return };
        life.idle.push(qp);
        if life.idle.len() < life.admins.len() {
            return;
        }
        let (moonrail, since) = (life.theirs.is_moonrail(), life.leave.since().unwrap_or(self.now));
        let state = &self.rails[rail];
        if self.stopping {
            self.retire(rail);
        } else if state.questions.iter().any(|question| question.hello.extra.if_idle) {
            self.evict(rail, By::Peer);
        } else if moonrail && !state.fabric.is_dialled() && self.own_nic(state.nic).path != state.peer_path {
            self.ask_idle(rail, since, 1);
        } else {
            self.evict(rail, By::Us);
        }
    }

    fn ask_idle(&mut self, rail: usize, since: Nanos, tries: u32) {
        let nic = self.own_nic(self.rails[rail].nic);
        let node = self.own_extra();
        let state = &mut self.rails[rail];
        let End::Whole(life) = &mut state.end else { return };
        life.leave = Leave::Peer { since, tries, again: None };
        let mut hello = handshake::hello(&nic, &state.peer_path, None, &node, false);
        hello.extra.fence_qpns.clone_from(&life.ours.qpns);
        hello.extra.if_idle = true;
        let (peer, life) = (state.peer, life.key.life);
        let token = self.token(Pending::Idle { rail, life });
        hello.extra.serial = Some(token.0);
        self.dial(peer, token, Frame::typed(MessageType::Connection, hello.encode()));
    }

    pub(super) fn ask_idle_again(&mut self, rail: usize) {
        if let Leave::Peer { since, tries, again: Some(at) } = self.rails[rail].leave()
            && at <= self.now
        {
            self.ask_idle(rail, since, tries + 1);
        }
    }

    /// The peer said whether its end is idle, or nothing.
    pub(super) fn idle_replied(&mut self, rail: usize, number: u32, result: Result<Frame, NoReply>) {
        let again = self.now;
        let End::Whole(life) = &mut self.rails[rail].end else { return };
        let Leave::Peer { since, tries, again: None } = life.leave else { return };
        if life.key.life != number {
            return;
        }
        let Some(reply) = result.ok().and_then(|frame| Hello::parse(&frame.body).ok()) else {
            if tries < TRIES {
                let again = again.plus(Nanos(ASK_AGAIN.0 << (tries - 1)));
                life.leave = Leave::Peer { since, tries, again: Some(again) };
                self.at(again, Timer::Rail(rail));
            } else {
                self.evict(rail, By::Us);
            }
            return;
        };
        // Another incarnation has nothing of what its predecessor had.
        let same = reply.extra.node.incarnation == life.theirs.incarnation;
        let retired = life.ours.qpns.iter().all(|qpn| reply.extra.fenced_qpns.contains(qpn));
        if same && !retired {
            return self.resume(rail);
        }
        self.evict(rail, By::Us);
        if let (true, Some(life)) = (same, self.rails[rail].old.last_mut()) {
            life.proof = true;
        }
    }

    /// The peer uses its end: the core gets ours again.
    fn resume(&mut self, rail: usize) {
        let now = self.now;
        let End::Whole(life) = &mut self.rails[rail].end else { return };
        (life.leave, life.proven, life.since) = (Leave::No, None, now);
        let (key, idle) = (life.key, std::mem::take(&mut life.idle));
        self.give_to_core(rail, key, idle);
        self.at(now.plus(super::shake::TRIAL_WITHIN), Timer::Rail(rail));
        self.keep(rail);
    }

    /// Nothing of ours is on its way on this rail any more: gives it up until it is used again.
    fn evict(&mut self, rail: usize, by: By) {
        let since = self.rails[rail].leave().since().unwrap_or(self.now);
        self.retire(rail);
        let wanted = self.peer(self.rails[rail].peer).wanted.is_some_and(|at| at > since);
        let state = &mut self.rails[rail];
        // Wanted meanwhile, it is connected anew as soon as it is drained.
        state.evicted = (!wanted).then_some((by, self.now));
        state.left = Some(self.now);
        state.evictions += 1;
        let nic = state.nic;
        self.evictions[usize::from(nic.0)].fetch_add(1, Ordering::Relaxed);
        if by == By::Us {
            self.log_eviction(rail);
        }
        self.look_for_relief(nic);
    }

    fn log_eviction(&mut self, rail: usize) {
        let (state, limit) = (&self.rails[rail], self.config.rails.rails_per_nic);
        let path =
            format!("{}@{}", self.peer(state.peer).shared.name(), self.peer(state.peer).nic_name(state.peer_nic));
        let nic = &mut self.nics[usize::from(state.nic.0)];
        nic.unlogged += 1;
        if nic.logged.is_some_and(|at| self.now.since(at) < LOG_EVERY) {
            return;
        }
        nic.logged = Some(self.now);
        let (count, device) = (std::mem::take(&mut nic.unlogged), nic.name.clone());
        let text = format!(
            "PATH evicted: {device} to {path}, idle; {count} since the last such line. Device {device} keeps {limit} rails \
             (MC_MAX_EP_PER_CTX); an evicted one is connected again when it is used"
        );
        self.log(LogLevel::Info, text);
    }

    // ---- the peer wants to give its end up ----

    /// A peer has nothing on its way on this rail, and wants to know whether we have.
    pub(super) fn idle_asked(&mut self, rail: usize, inbound: Inbound) {
        if self.is_old_question(rail, &inbound.hello) {
            return self.reply_in_use(&inbound);
        }
        let state = &self.rails[rail];
        let (leave, proven) = (state.leave(), state.is_proven());
        let whole = matches!(state.end, End::Whole(_));
        let used = self.now.since(Nanos(state.counters.used_ns.get())) < IDLE_FOR;
        match leave {
            // A job has it, or its trial is out: the peer asks again.
            _ if !whole => return self.reply_in_use(&inbound),
            Leave::No if used || !proven || !self.may_ask() => return self.reply_in_use(&inbound),
            Leave::No => self.ask_core(rail),
            Leave::Core { .. } => {}
            // Asked at the same moment as we did: nothing of either is on its way.
            Leave::Peer { .. } => self.evict(rail, By::Peer),
        }
        self.keep_question(rail, inbound);
        self.answer_fences(rail);
    }

    /// Whether a later message about this rail came before this question. The peer may have the rail in use again.
    fn is_old_question(&mut self, rail: usize, hello: &Hello) -> bool {
        let (Some(incarnation), Some(serial)) = (hello.extra.node.incarnation, hello.extra.serial) else { return true };
        let heard = &mut self.rails[rail].heard;
        if heard.is_some_and(|(life, newest)| life == incarnation && serial <= newest) {
            return true;
        }
        *heard = Some((incarnation, serial));
        false
    }

    /// Our end is in use: tells the peers that ask whether it is idle.
    fn refuse_idle(&mut self, rail: usize) {
        for inbound in std::mem::take(&mut self.rails[rail].questions) {
            if inbound.hello.extra.if_idle && self.is_paired(rail, &inbound.hello.extra.fence_qpns) {
                self.reply_in_use(&inbound);
            } else {
                self.rails[rail].questions.push(inbound);
            }
        }
    }

    fn reply_in_use(&mut self, inbound: &Inbound) {
        let mut hello = Hello::refuse("in use".to_owned());
        hello.extra.node = self.own_extra();
        self.reply(inbound, &hello);
    }
}

/// When a rail is to go, among others; from when on it counts as idle; and its place. `None`: it cannot be asked back now.
fn idle_from(rail: &Rail, eviction: Eviction, at: usize) -> Option<(Nanos, Nanos, usize)> {
    let End::Whole(life) = &rail.end else { return None };
    if !rail.is_proven() || life.leave != Leave::No || !rail.questions.is_empty() {
        return None;
    }
    let used = life.since.max(Nanos(rail.counters.used_ns.get()));
    let idle = used.plus(rail.patience).max(rail.kept.map_or(Nanos::ZERO, |kept| kept.plus(KEPT_FOR)));
    let order = match eviction {
        Eviction::LeastRecentlyUsed => used,
        Eviction::Oldest => life.since,
    };
    Some((order, idle, at))
}
