//! Incidents: what people are told of rails that failed, once when one opens and once when it closes.
//!
//! ```text
//!   one pair of NICs fails                                              ──▶ charged to the pair
//!   two NICs of ours fail towards one peer, which no rail reaches       ──▶ to the peer        ┐ one incident, and what fails
//!   two peers fail through one NIC of ours, which carries nothing else  ──▶ to our port        ┘ there later is part of it
//!   a port says so, a peer is another process                           ──▶ to it, at once
//! ```
//! "No rail" is of the peer's NIC where they fail towards the same one, else of the peer: what still works is evidence too. An
//! incident is over when each of its rails carries data again. What is dialled has no ports, and is joined only where a peer or
//! NIC is known to be at fault.

use std::collections::BTreeSet;

use moonrail_datapath::error::FaultClass;
use moonrail_datapath::nic::{Fabric, WcStatus};
use moonrail_datapath::units::Nanos;

use super::rail::Rail;
use super::{Brain, INCIDENTS};
use crate::config::LogLevel;
use crate::handle::{Charge, Incident};

/// What is known of an incident beside its cause.
pub(super) struct Seen {
    pub(super) status: Option<u32>,
    pub(super) vendor_err: u32,
    pub(super) age: Nanos,
    pub(super) charge: Charge,
    pub(super) decision: String,
}

/// An incident that is not over.
pub(super) struct Open {
    charge: Charge,
    /// Its rails that do not work, or did not when they joined it.
    rails: Vec<usize>,
}

impl Seen {
    /// No completion told of it.
    pub(super) fn without_completion(charge: Charge) -> Self {
        let decision = match charge {
            Charge::Port => "its rails are connected anew once the port can be used",
            Charge::Peer => "connected anew with the peer's present end",
            Charge::Pair | Charge::Request => "the rail is out of use; connected anew with back-off",
        };
        Self { status: None, vendor_err: 0, age: Nanos::ZERO, charge, decision: decision.to_owned() }
    }
}

impl Brain {
    /// Something went wrong on a rail: one incident until a slice comes back, however often it is tried.
    pub(super) fn trouble(&mut self, rail: usize, text: &str) {
        self.open_incident(rail, text, &Seen::without_completion(Charge::Pair));
    }

    fn incident_mut(&mut self, number: u64) -> Option<&mut Incident> {
        self.incidents.iter_mut().find(|i| i.number == number)
    }

    pub(super) fn open_incident(&mut self, rail: usize, text: &str, seen: &Seen) {
        let (now, state) = (self.now, &mut self.rails[rail]);
        state.failing_since.get_or_insert(now);
        state.trouble = Some(text.to_owned());
        let (peer, incident) = (state.peer, state.incident);
        self.peer_mut(peer).cause.get_or_insert_with(|| text.to_owned());
        if let Some(number) = incident {
            if let Some(incident) = self.incident_mut(number) {
                incident.attempts += 1;
            }
            return;
        }
        if let Some((number, charge)) = self.joined(rail, seen.charge) {
            return self.join(rail, number, charge);
        }
        self.incident_count += 1;
        let number = self.incident_count;
        self.rails[rail].incident = Some(number);
        self.open.insert(number, Open { charge: seen.charge, rails: vec![rail] });
        let state = &self.rails[rail];
        let incident = Incident {
            number,
            opened: now,
            closed: None,
            rail: state.id,
            peer: self.peer(peer).shared.name().to_owned(),
            local_nic: self.nics[usize::from(state.nic.0)].name.clone(),
            peer_nic: self.peer(peer).nic_name(state.peer_nic).to_owned(),
            cause: text.to_owned(),
            status: seen.status,
            vendor_err: seen.vendor_err,
            age: seen.age,
            flushed: 0,
            attempts: 0,
            charge: seen.charge,
            decision: seen.decision.clone(),
        };
        let line = format!(
            "incident {number} opened: {} to {}@{}: {text}",
            incident.local_nic, incident.peer, incident.peer_nic
        );
        if self.incidents.len() == INCIDENTS {
            self.incidents.pop_front();
        }
        self.incidents.push_back(incident);
        self.log(LogLevel::Warning, line);
    }

    /// The open incident that this rail's failure is part of, and whom all of it is charged to.
    fn joined(&self, rail: usize, charge: Charge) -> Option<(u64, Charge)> {
        self.open.iter().find_map(|(number, open)| Some((*number, self.charged(open, rail, charge)?)))
    }

    /// Whom an open incident is charged to together with another failure; `None` if they have nothing to do with each other.
    fn charged(&self, open: &Open, rail: usize, charge: Charge) -> Option<Charge> {
        let state = &self.rails[rail];
        let all = |like: &dyn Fn(&Rail) -> bool| open.rails.iter().all(|other| like(&self.rails[*other]));
        let (of_peer, of_port) = (all(&|other| other.peer == state.peer), all(&|other| other.nic == state.nic));
        match (open.charge, charge) {
            (Charge::Peer, Charge::Pair | Charge::Peer) | (Charge::Pair, Charge::Peer) if of_peer => Some(Charge::Peer),
            (Charge::Port, Charge::Pair | Charge::Port) | (Charge::Pair, Charge::Port) if of_port => Some(Charge::Port),
            (Charge::Pair, Charge::Pair) if !state.fabric.is_dialled() => {
                let works = |like: &dyn Fn(&Rail) -> bool| {
                    let others = self.rails.iter().enumerate().filter(|(at, _)| *at != rail);
                    others.map(|(_, other)| other).any(|other| other.is_proven() && like(other))
                };
                let one_nic = all(&|other| other.peer_nic == state.peer_nic);
                let reached = |other: &Rail| other.peer == state.peer && (!one_nic || other.peer_nic == state.peer_nic);
                if of_peer && all(&|other| other.nic != state.nic) && !works(&reached) {
                    Some(Charge::Peer)
                } else if of_port && all(&|other| other.peer != state.peer) && !works(&|other| other.nic == state.nic) {
                    Some(Charge::Port)
                } else {
                    None
                }
            }
            _ => None,
        }
    }

    /// A rail's failure is part of an open incident. So are those that were told on their own, where it explains them: they end.
    fn join(&mut self, rail: usize, number: u64, charge: Charge) {
        let (peer, nic) = (self.rails[rail].peer, self.rails[rail].nic);
        let mut rails = vec![rail];
        let explains = |other: &Rail| if charge == Charge::Peer { other.peer == peer } else { other.nic == nic };
        let explained: Vec<u64> = self
            .open
            .iter()
            .filter(|(other, open)| {
                let all = open.rails.iter().all(|rail| explains(&self.rails[*rail]));
                **other != number && all && open.charge == Charge::Pair
            })
            .map(|(other, _)| *other)
            .collect();
        for other in explained {
            let theirs = self.open.remove(&other).map_or_else(Vec::new, |open| open.rails);
            rails.extend(theirs.into_iter().filter(|rail| self.rails[*rail].incident == Some(other)));
            self.end_incident(other, &format!("is part of incident {number}"));
        }
        for &rail in &rails {
            self.rails[rail].incident.replace(number);
        }
        if let Some(open) = self.open.get_mut(&number) {
            open.charge = charge;
            rails.retain(|rail| !open.rails.contains(rail));
            open.rails.extend(rails);
        }
        if let Some(incident) = self.incident_mut(number)
            && incident.charge != charge
        {
            incident.charge = charge;
            incident.decision = Seen::without_completion(charge).decision;
        }
    }

    /// A rail carries slices again. Its incident is over when each of its rails does.
    pub(super) fn close_incident(&mut self, rail: usize) {
        let Some(number) = self.rails[rail].incident.take() else { return };
        let Some(open) = self.open.get(&number) else { return };
        if open.rails.iter().any(|other| self.rails[*other].incident == Some(number)) {
            return;
        }
        let rails: BTreeSet<usize> = open.rails.iter().copied().collect();
        let text = if rails.len() > 1 {
            format!("and {} other rail(s) carry data again; charged to the {}", rails.len() - 1, open.charge.as_str())
        } else {
            "carries data again".to_owned()
        };
        self.open.remove(&number);
        self.end_incident(number, &text);
    }

    fn end_incident(&mut self, number: u64, how: &str) {
        let now = self.now;
        let Some(incident) = self.incident_mut(number) else { return };
        incident.closed = Some(now);
        let text = format!(
            "incident {number} closed: {} to {}@{} {how}, {:?} after it opened, {} attempt(s), {} flushed",
            incident.local_nic,
            incident.peer,
            incident.peer_nic,
            now.since(incident.opened).to_duration(),
            incident.attempts,
            incident.flushed
        );
        self.log(LogLevel::Info, text);
    }

    /// Requests of a rail's former life came back flushed.
    pub(super) fn note_flushed(&mut self, rail: usize, flushed: u32) {
        if let Some(number) = self.rails[rail].incident
            && let Some(incident) = self.incident_mut(number)
        {
            incident.flushed = incident.flushed.saturating_add(flushed);
        }
    }
}

/// What is done about the first error of a class.
pub(super) fn decided(class: FaultClass) -> &'static str {
    match class {
        FaultClass::Request => "the transfer fails; the rail is connected anew at once",
        FaultClass::Local => "its slices go to other rails; connected anew with back-off",
        FaultClass::Flush | FaultClass::MtuOrRequest | FaultClass::Path | FaultClass::Unknown => {
            "its slices go to other rails; connected anew with back-off, and used again after a trial"
        }
    }
}

/// What to do about a failed request, by its status.
pub(super) fn advice(status: WcStatus, class: FaultClass, fabric: Fabric) -> &'static str {
    match (status, class) {
        (_, FaultClass::Path) if fabric == Fabric::Shm => "the peer's process ended; it is looked for again",
        (_, FaultClass::Path) if fabric == Fabric::Tcp => {
            "the connection broke: the peer stopped, or the network between; see the peer's log"
        }
        (WcStatus::REM_ACCESS_ERR, _) => {
            "the peer does not allow that range: it was unregistered or registered anew there; refresh the segment"
        }
        (WcStatus::RETRY_EXC_ERR, _) => {
            "the peer's NIC does not answer: the peer stopped, a link or switch between is down, or GID, MTU or traffic class do not fit"
        }
        (WcStatus::STALLED, _) => {
            "something between swallows packets (routes, switches, GIDs of two networks: see `moonrail ping`), or a NIC hangs (`dmesg`, here and there)"
        }
        (WcStatus::UNPROVEN, _) => {
            "the peer's net device took packets no more (its MTU was made smaller, or its queue is full: `ip -s link` there); the READ is made again"
        }
        (_, FaultClass::Request) => {
            "the request itself is wrong: check addresses and lengths against the registered regions"
        }
        (_, FaultClass::MtuOrRequest) => "check that both ends use the same MTU (MC_MTU)",
        (_, FaultClass::Path) => "check the path to the peer and the peer's log",
        (_, FaultClass::Local) => "check our own port and device (`rdma link`, `dmesg`)",
        _ => "other rails are used meanwhile",
    }
}
