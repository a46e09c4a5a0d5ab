//! Incidents: what people are told of a rail that failed, once when it opens and once when it closes.

use moonrail_datapath::error::FaultClass;
use moonrail_datapath::nic::{Fabric, WcStatus};
use moonrail_datapath::units::Nanos;

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

    pub(super) fn open_incident(&mut self, rail: usize, text: &str, seen: &Seen) {
        let (now, state) = (self.now, &mut self.rails[rail]);
        state.failing_since.get_or_insert(now);
        state.trouble = Some(text.to_owned());
        let (peer, incident) = (state.peer, state.incident);
        self.peer_mut(peer).cause.get_or_insert_with(|| text.to_owned());
        if let Some(number) = incident {
            if let Some(incident) = self.incidents.iter_mut().find(|i| i.number == number) {
                incident.attempts += 1;
            }
            return;
        }
        self.incident_count += 1;
        let number = self.incident_count;
        self.rails[rail].incident = Some(number);
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

    /// A rail carries slices again.
    pub(super) fn close_incident(&mut self, rail: usize) {
        let now = self.now;
        let Some(number) = self.rails[rail].incident.take() else { return };
        let Some(incident) = self.incidents.iter_mut().find(|i| i.number == number) else { return };
        incident.closed = Some(now);
        let text = format!(
            "incident {number} closed: {} to {}@{} carries data again, {:?} after it opened, {} attempt(s), {} flushed",
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
            && let Some(incident) = self.incidents.iter_mut().find(|i| i.number == number)
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
        (_, FaultClass::Request) => {
            "the request itself is wrong: check addresses and lengths against the registered regions"
        }
        (_, FaultClass::MtuOrRequest) => "check that both ends use the same MTU (MC_MTU)",
        (_, FaultClass::Path) => "check the path to the peer and the peer's log",
        (_, FaultClass::Local) => "check our own port and device (`rdma link`, `dmesg`)",
        _ => "other rails are used meanwhile",
    }
}
