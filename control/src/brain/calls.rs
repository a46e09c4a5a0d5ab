//! What callers ask and wait for. Each is answered once, by its deadline at the latest.

use moonrail_datapath::units::{Nanos, PeerId, RailId};

use super::event::{Action, Answer, Call, CallId};
use super::{BeginError, Brain, Caller, Kind, Timer};
use crate::config::LogLevel;
use crate::error::{ControlError, NotifyError, OpenError, PublishError};
use crate::handle::{RailReport, Story};
use crate::metadata::keys::segment_name;

impl Brain {
    pub(super) fn call(&mut self, id: CallId, call: Call, until: Nanos) {
        if self.stopping && !matches!(call, Call::Shutdown | Call::Rails | Call::Incidents | Call::Notifications) {
            return self.answer(id, gone(&call));
        }
        match call {
            Call::Begin => {
                self.wait(id, until, Kind::Begin);
                self.begin();
            }
            Call::Open { name, fresh, policy } => self.open(id, &name, fresh, policy, until),
            Call::Publish(buffers) => self.publish(id, buffers, until),
            Call::Notify { .. } | Call::Probe(_) => self.message(id, &call, until),
            Call::Notifications => {
                let taken = self.notifications.drain(..).collect();
                self.notification_bytes = 0;
                self.answer(id, Answer::Notifications(taken));
            }
            Call::Rails => {
                let reports = self.rail_reports();
                self.answer(id, Answer::Rails(reports));
            }
            Call::Incidents => {
                let incidents = self.incidents.iter().cloned().collect();
                self.answer(id, Answer::Incidents(incidents));
            }
            Call::Why(segment) => {
                let why = self.by_name.get(segment_name(&segment)).and_then(|peer| self.why(*peer));
                self.answer(id, Answer::Why(why));
            }
            Call::Ways(segment) => {
                let peer = self.by_name.get(segment_name(&segment)).copied();
                let ways = peer.map_or_else(Vec::new, |peer| self.ways(peer));
                self.answer(id, Answer::Ways(ways));
            }
            Call::Story { segment, rail } => {
                let story = self.story(&segment, rail);
                self.answer(id, Answer::Story(story));
            }
            Call::Shutdown => {
                self.wait(id, until, Kind::Shutdown);
                self.stop(until);
            }
        }
    }

    fn why(&self, peer: PeerId) -> Option<String> {
        let peer = self.peer(peer);
        let usable = peer.rails.iter().any(|rail| self.rails[*rail].carries());
        if usable { None } else { peer.cause.clone() }
    }

    fn story(&self, segment: &str, rail: Option<RailId>) -> Story {
        let peer = self.by_name.get(segment_name(segment)).copied();
        let mut rails = peer.iter().flat_map(|peer| &self.peer(*peer).rails);
        let trouble = || rails.find_map(|rail| self.rails[*rail].trouble.clone());
        let name = |rail: &super::Rail| {
            (self.nics[usize::from(rail.nic.0)].name.clone(), self.peer(rail.peer).nic_name(rail.peer_nic).to_owned())
        };
        // The one it is part of, or the last that was its own.
        let part_of = rail.and_then(|rail| self.rails.get(rail.0 as usize)?.incident);
        let mut newest = self.incidents.iter().rev();
        let told = newest.find(|i| part_of.map_or(Some(i.rail) == rail, |number| i.number == number));
        Story {
            nics: rail.and_then(|rail| self.rails.get(rail.0 as usize)).map(name),
            incident: told.map(|incident| incident.cause.clone()),
            trouble: peer.and_then(|peer| self.why(peer)).or_else(trouble),
        }
    }

    fn rail_reports(&self) -> Vec<RailReport> {
        let report = |rail: &super::Rail| RailReport {
            rail: rail.id,
            peer: self.peer(rail.peer).shared.name().to_owned(),
            local_nic: self.nics[usize::from(rail.nic.0)].name.clone(),
            peer_nic: self.peer(rail.peer).nic_name(rail.peer_nic).to_owned(),
            fabric: rail.fabric,
            core: rail.core,
            lives: rail.lives,
            state: rail.state(),
            qps: rail.ours().map_or(0, |ours| ours.qpns.len()),
            path_mtu: rail.path_mtu(),
            moonrail: rail.theirs().is_some_and(crate::handshake::PeerEnd::is_moonrail),
            unfenced: rail.old.iter().filter(|life| !life.proof).count(),
            trouble: rail.trouble.clone(),
            evicted: rail.evicted.is_some(),
            evictions: rail.evictions,
            counters: rail.counters.clone(),
        };
        self.rails.iter().map(report).collect()
    }

    pub(super) fn wait(&mut self, id: CallId, until: Nanos, kind: Kind) {
        self.callers.insert(id, Caller { until, kind });
        self.at(until, Timer::Call(id));
    }

    pub(super) fn kind_of(&self, id: CallId) -> Option<Kind> {
        self.callers.get(&id).map(|caller| caller.kind.clone())
    }

    /// Callers that wait for what `matches`, in the order in which they came.
    pub(super) fn callers(&self, matches: impl Fn(&Kind) -> bool) -> Vec<CallId> {
        self.callers.iter().filter(|(_, caller)| matches(&caller.kind)).map(|(id, _)| *id).collect()
    }

    /// Answers a caller who waits.
    pub(super) fn finish(&mut self, id: CallId, answer: Answer) {
        if let Some(caller) = self.callers.remove(&id) {
            self.timers.remove(&(caller.until, Timer::Call(id)));
            self.answer(id, answer);
        }
    }

    pub(super) fn answer(&mut self, id: CallId, answer: Answer) {
        self.out.push(Action::Answer { id, answer });
    }

    pub(super) fn call_due(&mut self, id: CallId) {
        let Some(kind) = self.kind_of(id) else { return };
        let answer = match kind {
            Kind::Begin => {
                let error = ControlError::Deadline {
                    what: "publishing this node",
                    state: format!("{} has not answered", self.config.metadata),
                };
                Answer::Begun(Err(BeginError::Control(error)))
            }
            Kind::Open(peer, _) => Answer::Opened(Err(self.too_late("opening the segment", Some(peer)).into())),
            Kind::Message(peer) => Answer::Notified(Err(self.too_late("the message", Some(peer)).into())),
            Kind::Publish(_) => {
                let error = ControlError::Deadline {
                    what: "publishing the segment",
                    state: format!("{} has not answered; it goes on being tried", self.config.metadata),
                };
                Answer::Published(Err(error.into()))
            }
            Kind::Shutdown => {
                // The cores or a device hold something. The caller's time is over: what is left is given up.
                let left = self.unstopped();
                self.log(
                    LogLevel::Warning,
                    format!("not everything could be given back in time, and is given up: {left}"),
                );
                self.out.push(Action::Exit);
                Answer::Stopped
            }
        };
        self.finish(id, answer);
    }
}

fn gone(call: &Call) -> Answer {
    let gone = ControlError::Gone;
    match call {
        Call::Begin => Answer::Begun(Err(BeginError::Control(gone))),
        Call::Open { .. } => Answer::Opened(Err(OpenError::Control(gone))),
        Call::Publish(_) => Answer::Published(Err(PublishError::Control(gone))),
        Call::Notify { .. } | Call::Probe(_) => Answer::Notified(Err(NotifyError::Control(gone))),
        Call::Notifications => Answer::Notifications(Vec::new()),
        Call::Rails => Answer::Rails(Vec::new()),
        Call::Incidents => Answer::Incidents(Vec::new()),
        Call::Why(_) => Answer::Why(None),
        Call::Ways(_) => Answer::Ways(Vec::new()),
        Call::Story { .. } => Answer::Story(Story::default()),
        Call::Shutdown => Answer::Stopped,
    }
}
