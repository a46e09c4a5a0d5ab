//! An engine in the text format of Prometheus, version 0.0.4.
//!
//! Each figure is described once, then follow its values, one for each rail, NIC or core. Times are by NIC: by rail they
//! would be a page of megabytes in a large cluster.

use std::fmt::{Display, Write as _};

use moonrail_datapath::core::Spread;

use crate::engine::{CoreCounters, NicInfo, RailInfo, Shared};

/// What the page is.
pub(super) const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// Upper bounds of the buckets of times, as powers of two in nanoseconds: 1 us to 17 s, a factor of four apart. At powers of two
/// the counts are exact.
const BOUNDS: std::ops::RangeInclusive<u32> = 10..=34;
const BOUNDS_APART: usize = 2;

/// The whole page. Reads what cores count, and asks control for the rails.
pub(super) fn page(shared: &Shared) -> String {
    let (rails, nics, counters, incidents) = (shared.rails(), shared.nics(), shared.counters(), shared.incidents());
    let mut page = Page(String::new());
    let name = shared.control.name();
    let incarnation = shared.control.incarnation().to_string();
    let who = [("name", name), ("version", env!("CARGO_PKG_VERSION")), ("incarnation", incarnation.as_str())];
    page.one("moonrail_info", "gauge", "The engine; always 1.", &who, 1);
    page.one("moonrail_uptime_seconds", "gauge", "Since it was built.", &[], shared.origin.elapsed().as_secs_f64());
    rails_of(&mut page, &rails);
    nics_of(&mut page, &nics, &rails);
    cores_of(&mut page, &counters.cores);
    let copied = "Pieces that callers' threads copied through shared memory themselves.";
    page.one("moonrail_caller_copies_total", "counter", copied, &[], counters.copies);
    page.one("moonrail_caller_copied_bytes_total", "counter", "Their bytes.", &[], counters.copied_bytes);
    let seen = incidents.last().map_or(0, |last| last.number);
    page.one("moonrail_incidents_total", "counter", "First errors of rails that became incidents.", &[], seen);
    let open = incidents.iter().filter(|incident| !incident.closed).count();
    page.one("moonrail_incidents_open", "gauge", "Incidents that are not over.", &[], open);
    page.0
}

fn rails_of(page: &mut Page, rails: &[RailInfo]) {
    let labels = |rail: &RailInfo| {
        Labels::new(&[
            ("nic", &rail.nic),
            ("peer", &rail.peer),
            ("peer_nic", &rail.peer_nic),
            ("fabric", rail.fabric.as_str()),
        ])
    };
    let mut each = |name: &str, kind: &str, help: &str, value: &dyn Fn(&RailInfo) -> Option<f64>| {
        page.describe(name, kind, help);
        for rail in rails {
            if let Some(value) = value(rail) {
                page.value(name, &labels(rail), value);
            }
        }
    };
    each("moonrail_rail_bytes_total", "counter", "Bytes in place.", &|rail| Some(rail.bytes as f64));
    each("moonrail_rail_slices_total", "counter", "Slices in place.", &|rail| Some(rail.slices as f64));
    each(
        "moonrail_rail_returned_slices_total",
        "counter",
        "Slices that came back without their bytes, for another rail or another try.",
        &|rail| Some(rail.returned as f64),
    );
    each("moonrail_rail_first_errors_total", "counter", "First errors.", &|rail| Some(rail.first_errors as f64));
    each("moonrail_rail_flushes_total", "counter", "Echoes of first errors.", &|rail| Some(rail.flushes as f64));
    each("moonrail_rail_connects_total", "counter", "Times it was connected.", &|rail| Some(f64::from(rail.lives)));
    each("moonrail_rail_evictions_total", "counter", "Times it was evicted, being idle.", &|rail| {
        Some(rail.evictions as f64)
    });
    each("moonrail_rail_usable", "gauge", "1 if it carries slices, 0 if not.", &|rail| {
        Some(u8::from(rail.usable).into())
    });
    each("moonrail_rail_in_flight_slices", "gauge", "Work requests on their way.", &|rail| {
        Some(rail.in_flight_slices as f64)
    });
    each("moonrail_rail_in_flight_bytes", "gauge", "Their bytes.", &|rail| Some(rail.in_flight_bytes as f64));
    each("moonrail_rail_in_flight_limit_bytes", "gauge", "Bytes that may be on their way.", &|rail| {
        Some(rail.cap_bytes as f64)
    });
    each(
        "moonrail_rail_round_trip_seconds",
        "gauge",
        "Shortest round trip seen lately on the nearly empty rail.",
        &|rail| rail.round_trip.map(|span| span.as_secs_f64()),
    );
}

fn nics_of(page: &mut Page, nics: &[NicInfo], rails: &[RailInfo]) {
    let labels = |nic: &NicInfo| Labels::new(&[("nic", &nic.name), ("fabric", nic.fabric.as_str())]);
    page.describe("moonrail_nic_registered_bytes", "gauge", "Memory registered on it.");
    for nic in nics {
        page.value("moonrail_nic_registered_bytes", &labels(nic), nic.registered);
    }
    page.describe("moonrail_nic_evictions_total", "counter", "Idle rails evicted from it.");
    for nic in nics {
        page.value("moonrail_nic_evictions_total", &labels(nic), nic.evictions);
    }
    let mut times = |name: &str, help: &str, spread: &dyn Fn(&RailInfo) -> &Spread| {
        page.describe(name, "histogram", help);
        for nic in nics {
            let mut all = Spread::default();
            for rail in rails.iter().filter(|rail| rail.nic == nic.name) {
                all.merge(spread(rail));
            }
            page.histogram(name, &labels(nic), &all);
        }
    };
    times("moonrail_nic_queue_seconds", "From the submission of a slice to its being posted.", &|rail| {
        &rail.queue_time
    });
    times("moonrail_nic_wire_seconds", "From being posted to being known to be in place.", &|rail| &rail.wire_time);
}

fn cores_of(page: &mut Page, cores: &[CoreCounters]) {
    let mut each = |name: &str, help: &str, value: &dyn Fn(&CoreCounters) -> u64| {
        page.describe(name, "counter", help);
        for core in cores {
            page.value(name, &Labels::new(&[("core", &core.core.to_string())]), value(core));
        }
    };
    each("moonrail_core_bytes_total", "Bytes of slices that are done.", &|core| core.bytes);
    each("moonrail_core_slices_total", "Slices that are done.", &|core| core.slices);
    each("moonrail_core_failed_slices_total", "Slices that ended without their bytes.", &|core| core.failed);
    each("moonrail_core_returned_slices_total", "Slices that came back for another try.", &|core| core.retries);
    each("moonrail_core_work_requests_total", "Work requests the devices accepted.", &|core| core.work_requests);
    each("moonrail_core_refused_requests_total", "Work requests a device refused to take.", &|core| core.refused);
    each("moonrail_core_doorbells_total", "Chains posted.", &|core| core.doorbells);
    each("moonrail_core_completions_total", "Completions reaped.", &|core| core.completions);
    each("moonrail_core_busy_turns_total", "Turns that did something.", &|core| core.busy_turns);
    each("moonrail_core_idle_turns_total", "Turns that found nothing to do.", &|core| core.idle_turns);
    each("moonrail_core_led_turns_total", "Turns, among both, that callers' own threads made.", &|core| core.led_turns);
    each("moonrail_core_sleeps_total", "Times it went to sleep.", &|core| core.sleeps);
}

/// `name="value",…`, escaped.
struct Labels(String);

impl Labels {
    fn new(pairs: &[(&str, &str)]) -> Self {
        let mut text = String::new();
        for (name, value) in pairs {
            let comma = if text.is_empty() { "" } else { "," };
            let _ = write!(text, "{comma}{name}=\"");
            for c in value.chars() {
                match c {
                    '\\' => text.push_str("\\\\"),
                    '"' => text.push_str("\\\""),
                    '\n' => text.push_str("\\n"),
                    c => text.push(c),
                }
            }
            text.push('"');
        }
        Self(text)
    }

    fn with(&self, name: &str, value: &str) -> Self {
        let comma = if self.0.is_empty() { "" } else { "," };
        Self(format!("{}{comma}{name}=\"{value}\"", self.0))
    }
}

struct Page(String);

impl Page {
    fn describe(&mut self, name: &str, kind: &str, help: &str) {
        let _ = writeln!(self.0, "# HELP {name} {help}\n# TYPE {name} {kind}");
    }

    fn value(&mut self, name: &str, labels: &Labels, value: impl Display) {
        let Labels(labels) = labels;
        let _ = if labels.is_empty() {
            writeln!(self.0, "{name} {value}")
        } else {
            writeln!(self.0, "{name}{{{labels}}} {value}")
        };
    }

    fn one(&mut self, name: &str, kind: &str, help: &str, labels: &[(&str, &str)], value: impl Display) {
        self.describe(name, kind, help);
        self.value(name, &Labels::new(labels), value);
    }

    fn histogram(&mut self, name: &str, labels: &Labels, spread: &Spread) {
        let bucket = format!("{name}_bucket");
        for bound in BOUNDS.step_by(BOUNDS_APART) {
            let seconds = seconds(1 << bound);
            self.value(&bucket, &labels.with("le", &seconds), spread.count_up_to(1 << bound));
        }
        self.value(&bucket, &labels.with("le", "+Inf"), spread.count());
        self.value(&format!("{name}_sum"), labels, seconds(spread.sum_ns()));
        self.value(&format!("{name}_count"), labels, spread.count());
    }
}

/// Exact: as a float it would not be after 2^53 ns.
fn seconds(ns: u64) -> String {
    format!("{}.{:09}", ns / 1_000_000_000, ns % 1_000_000_000)
}

#[cfg(test)]
mod tests {
    use super::*;
    use moonrail_datapath::core::Times;

    #[test]
    fn labels_are_escaped() {
        assert_eq!(Labels::new(&[("a", "x\\y\"z\n"), ("b", "")]).0, r#"a="x\\y\"z\n",b="""#);
    }

    #[test]
    fn a_histogram_is_cumulative_and_ends_with_all() {
        let spread = Spread::new([(1024, 2), (2048, 3), (1 << 36, 1)], 5_000_000_001);
        let mut page = Page(String::new());
        page.histogram("t", &Labels::new(&[("nic", "a")]), &spread);
        let lines: Vec<&str> = page.0.lines().collect();
        assert_eq!(lines[0], "t_bucket{nic=\"a\",le=\"0.000001024\"} 2");
        assert_eq!(lines[1], "t_bucket{nic=\"a\",le=\"0.000004096\"} 5");
        assert_eq!(lines[12], "t_bucket{nic=\"a\",le=\"17.179869184\"} 5");
        assert_eq!(
            lines[13..],
            ["t_bucket{nic=\"a\",le=\"+Inf\"} 6", "t_sum{nic=\"a\"} 5.000000001", "t_count{nic=\"a\"} 6"]
        );
        assert_eq!(Times::default().read().count_up_to(1 << 34), 0);
    }
}
