//! An engine as JSON: the replies of the inspection socket.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};

use super::{PROTOCOL, Request};
use crate::engine::{RailInfo, Shared};
use crate::incident::IncidentInfo;

/// The reply to a request.
pub(super) fn report(shared: &Shared, request: Request) -> Value {
    let uptime = shared.origin.elapsed();
    let mut reply = json!({
        "protocol": PROTOCOL,
        "engine": {
            "name": shared.control.name(),
            "pid": std::process::id(),
            "incarnation": shared.control.incarnation().to_string(),
            "version": env!("CARGO_PKG_VERSION"),
            "uptime_s": uptime.as_secs_f64(),
            "started_unix_s": unix(SystemTime::now() - uptime),
        },
    });
    if matches!(request, Request::Incidents | Request::All) {
        reply["incidents"] = shared.incidents().iter().map(incident).collect();
    }
    if matches!(request, Request::Rails | Request::All) {
        reply["rails"] = shared.rails().iter().map(rail).collect();
    }
    if request == Request::All {
        let core = |(number, c): (usize, &std::sync::Arc<moonrail_datapath::core::CoreCounters>)| {
            json!({
                "core": number, "work_requests": c.work_requests.get(), "doorbells": c.doorbells.get(),
                "completions": c.completions.get(), "bytes": c.bytes_done.get(), "slices": c.slices_done.get(),
                "failed": c.slices_failed.get(), "retries": c.slices_returned.get(), "first_errors": c.first_errors.get(),
                "flushes": c.flushes.get(), "refused": c.refused.get(), "busy_turns": c.busy_turns.get(),
                "idle_turns": c.idle_turns.get(), "sleeps": c.sleeps.get(),
            })
        };
        reply["cores"] = shared.counters.iter().enumerate().map(core).collect();
        let (copies, bytes) = shared.copied.total();
        reply["callers"] = json!({ "copies": copies, "bytes": bytes });
    }
    reply
}

/// A request that gets no report.
pub(super) fn refusal(why: &str) -> Value {
    json!({ "protocol": PROTOCOL, "error": why })
}

fn incident(incident: &IncidentInfo) -> Value {
    let IncidentInfo { number, nic, peer, peer_nic, status, status_text, vendor, flushed, attempts, .. } = incident;
    json!({
        "number": number,
        "open": !incident.closed,
        "opened_unix_s": unix(incident.when),
        "opened_uptime_s": incident.at.as_secs_f64(),
        "lasted_s": incident.lasted.as_secs_f64(),
        "nic": nic,
        "peer": peer,
        "peer_nic": peer_nic,
        "status": status,
        "status_text": status_text,
        "vendor": vendor,
        "request_age_s": incident.age.as_secs_f64(),
        "flushed": flushed,
        "failed_attempts": attempts,
        "charged_to": incident.charge.as_str(),
        "decision": incident.decision,
        "cause": incident.cause,
    })
}

fn rail(rail: &RailInfo) -> Value {
    json!({
        "nic": rail.nic, "peer": rail.peer, "peer_nic": rail.peer_nic, "fabric": rail.fabric.as_str(), "state": rail.state,
        "usable": rail.usable, "core": rail.core, "qps": rail.qps, "path_mtu": rail.path_mtu.map(crate::Mtu::bytes),
        "lives": rail.lives, "moonrail": rail.moonrail, "bytes": rail.bytes,
    })
}

fn unix(at: SystemTime) -> f64 {
    at.duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO).as_secs_f64()
}
