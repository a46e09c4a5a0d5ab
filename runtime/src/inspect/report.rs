//! An engine as JSON: the replies of the inspection socket.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use moonrail_datapath::core::Spread;
use serde_json::{Value, json};

use super::{PROTOCOL, Request};
use crate::engine::{CoreCounters, NicInfo, RailInfo, Shared};
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
    match request {
        Request::Engine => {}
        Request::Incidents => reply["incidents"] = incidents(shared, false),
        Request::Rails => reply["rails"] = shared.rails().iter().map(rail).collect(),
        Request::All => {
            reply["incidents"] = incidents(shared, false);
            reply["rails"] = shared.rails().iter().map(rail).collect();
            counters(&mut reply, shared);
        }
        Request::Live => {
            reply["incidents"] = incidents(shared, true);
            reply["incidents_seen"] = shared.incidents().last().map_or(0, |last| last.number).into();
            reply["nics"] = shared.nics().iter().map(nic).collect();
            reply["rails"] = shared.rails().iter().map(live).collect();
            counters(&mut reply, shared);
        }
    }
    reply
}

/// Without the times: for an engine with so many rails that its reply would be too long with them.
pub(super) fn without_times(mut reply: Value) -> Value {
    for rail in reply["rails"].as_array_mut().into_iter().flatten().filter_map(Value::as_object_mut) {
        rail.remove("queue_ns");
        rail.remove("wire_ns");
    }
    reply
}

fn incidents(shared: &Shared, only_open: bool) -> Value {
    shared.incidents().iter().filter(|incident| !only_open || !incident.closed).map(incident).collect()
}

fn counters(reply: &mut Value, shared: &Shared) {
    let counters = shared.counters();
    let core = |c: &CoreCounters| {
        json!({
            "core": c.core, "work_requests": c.work_requests, "doorbells": c.doorbells,
            "completions": c.completions, "bytes": c.bytes, "slices": c.slices,
            "failed": c.failed, "retries": c.retries, "first_errors": c.first_errors,
            "flushes": c.flushes, "refused": c.refused, "busy_turns": c.busy_turns,
            "idle_turns": c.idle_turns, "led_turns": c.led_turns, "sleeps": c.sleeps,
        })
    };
    reply["cores"] = counters.cores.iter().map(core).collect();
    reply["callers"] = json!({ "copies": counters.copies, "bytes": counters.copied_bytes });
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

fn live(info: &RailInfo) -> Value {
    let mut reply = rail(info);
    for (name, value) in [
        ("slices", json!(info.slices)),
        ("in_flight_slices", json!(info.in_flight_slices)),
        ("in_flight_bytes", json!(info.in_flight_bytes)),
        ("cap_bytes", json!(info.cap_bytes)),
        ("round_trip_ns", json!(info.round_trip.map(|span| span.as_nanos() as u64))),
        ("returned", json!(info.returned)),
        ("first_errors", json!(info.first_errors)),
        ("flushes", json!(info.flushes)),
        ("evictions", json!(info.evictions)),
        ("queue_ns", times(&info.queue_time)),
        ("wire_ns", times(&info.wire_time)),
    ] {
        reply[name] = value;
    }
    reply
}

fn times(spread: &Spread) -> Value {
    json!({ "sum": spread.sum_ns(), "counts": spread.counts() })
}

fn nic(nic: &NicInfo) -> Value {
    json!({
        "name": nic.name, "fabric": nic.fabric.as_str(), "numa_node": nic.numa_node, "cores": nic.cores,
        "registered_bytes": nic.registered, "evictions": nic.evictions,
    })
}

fn unix(at: SystemTime) -> f64 {
    at.duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO).as_secs_f64()
}
