//! What went wrong on a rail, and what came of it.

use std::fmt;
use std::time::{Duration, SystemTime};

use moonrail_control::{Charge, Incident};
use moonrail_datapath::nic::WcStatus;

/// What followed from one first error on one rail. As text (`Display`) it is one line.
#[derive(Clone, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub struct IncidentInfo {
    /// Counted from 1 in each life of an engine; the log lines that open and close it have the same number.
    pub number: u64,
    /// When it opened, since the engine started: on the clock of [`crate::Engine::uptime`].
    pub at: Duration,
    /// When it opened, by the wall clock of now: a clock that was set since does not move it away from the present.
    pub when: SystemTime,
    /// From when it opened to when the rail carried a slice again; to now, while it has not.
    pub lasted: Duration,
    /// Whether it is over: the rail carried a slice again.
    pub closed: bool,
    /// Our NIC.
    pub nic: String,
    /// The peer's segment name.
    pub peer: String,
    /// The peer's NIC.
    pub peer_nic: String,
    /// Completion status as ibv_wc_status numbers it (253 to 255 are ours: unproven, given up, stalled); `None` where no
    /// completion told of it.
    pub status: Option<u32>,
    /// The status in words.
    pub status_text: Option<&'static str>,
    /// The device maker's code beside the status.
    pub vendor: u32,
    /// Age of the work request that failed, from posting to completion; 0 where there was none.
    pub age: Duration,
    /// Requests behind it that came back flushed.
    pub flushed: u32,
    /// Attempts to connect the rail that failed since it opened.
    pub attempts: u32,
    /// Whom the evidence is charged to.
    pub charge: Charge,
    /// What was decided when it opened.
    pub decision: String,
    /// The cause in words, and what an operator does next.
    pub cause: String,
}

impl IncidentInfo {
    /// `now` is the engine's uptime.
    pub(crate) fn new(incident: Incident, now: Duration) -> Self {
        let at = incident.opened.to_duration();
        let until = incident.closed.map_or(now, moonrail_datapath::units::Nanos::to_duration);
        Self {
            number: incident.number,
            at,
            when: SystemTime::now() - now.saturating_sub(at),
            lasted: until.saturating_sub(at),
            closed: incident.closed.is_some(),
            nic: incident.local_nic,
            peer: incident.peer,
            peer_nic: incident.peer_nic,
            status: incident.status,
            status_text: incident.status.map(|status| WcStatus(status).text()),
            vendor: incident.vendor_err,
            age: incident.age.to_duration(),
            flushed: incident.flushed,
            attempts: incident.attempts,
            charge: incident.charge,
            decision: incident.decision,
            cause: incident.cause,
        }
    }
}

impl fmt::Display for IncidentInfo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { number, nic, peer, peer_nic, cause, age, flushed, attempts, lasted, .. } = self;
        let state = if self.closed { "closed after" } else { "open for" };
        write!(
            f,
            "incident {number}, {state} {lasted:.1?}: {nic} to {peer}@{peer_nic}: {cause}; age {age:?}, {flushed} flushed, \
             {attempts} failed attempts to connect since; charged to the {}; {}",
            self.charge.as_str(),
            self.decision
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use moonrail_datapath::units::{Nanos, RailId};

    #[test]
    fn an_incident_is_one_line_with_everything_in_it() {
        let incident = Incident {
            number: 3,
            opened: Nanos::from_secs(10),
            closed: Some(Nanos::from_secs(12)),
            rail: RailId(0),
            peer: "store".into(),
            local_nic: "mlx5_0".into(),
            peer_nic: "mlx5_1".into(),
            cause: "no answer".into(),
            status: Some(12),
            vendor_err: 0x81,
            age: Nanos::from_millis(1500),
            flushed: 7,
            attempts: 2,
            charge: Charge::Pair,
            decision: "connected anew".into(),
        };
        let info = IncidentInfo::new(incident.clone(), Duration::from_secs(60));
        assert_eq!(
            info.to_string(),
            "incident 3, closed after 2.0s: mlx5_0 to store@mlx5_1: no answer; age 1.5s, 7 flushed, 2 failed attempts to \
             connect since; charged to the pair; connected anew"
        );
        assert_eq!(info.status_text, Some("transport retry counter exceeded"));
        let ago = info.when.elapsed().unwrap();
        assert!(ago >= Duration::from_secs(50) && ago < Duration::from_secs(55), "{ago:?}");
        let open = IncidentInfo::new(Incident { closed: None, ..incident }, Duration::from_secs(60));
        assert!(!open.closed && open.lasted == Duration::from_secs(50) && open.to_string().contains("open for 50.0s"));
    }
}
