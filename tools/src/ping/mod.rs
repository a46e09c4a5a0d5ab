//! `moonrail ping`: the whole way to a peer, step by step, each timed; then every rail by itself, (our NIC, the peer's NIC),
//! with the latency of a READ over it.

pub mod rail;

use std::fmt::Write as _;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use moonrail::{Engine, RailInfo, Segment};
use moonrail_control::metadata::RpcMeta;
use serde_json::{Value, json};

use crate::cli::PingArgs;
use crate::doctor::finding::{Finding, Verdict};
use crate::doctor::{own, peer, visitor};
use crate::failure::{Failure, Result};
use crate::node;
use crate::say;
use crate::table::{Align, Table};
use crate::units;
use rail::Measured;

/// One step before the rails.
struct Step {
    finding: Finding,
    took: Duration,
}

/// Everything that was found.
#[derive(Default)]
struct Report {
    steps: Vec<Step>,
    rails: Vec<(RailInfo, Measured)>,
    ways: Vec<String>,
}

/// Runs the subcommand.
pub fn run(args: &PingArgs) -> Result<ExitCode> {
    let mut report = Report::default();
    let whole = steps(args, &mut report)?;
    if args.json {
        say::line(format!("{:#}", report.json()));
    } else {
        say::line(report.text().trim_end());
    }
    let reached = report.rails.iter().any(|(_, measured)| measured.read.is_ok());
    Ok(if whole && reached { ExitCode::SUCCESS } else { ExitCode::from(1) })
}

/// Takes each step after the other; `false`: one failed, and the rest was not tried.
fn steps(args: &PingArgs, report: &mut Report) -> Result<bool> {
    let resolved = node::builder(&args.node)?.resolved().map_err(|e| Failure::told(&e))?;
    let Some(place) = report.step(|| peer::whereabouts(&args.peer, &resolved)) else { return Ok(false) };
    if report.step(|| look_up(&place.meta)).is_none() || report.step(|| peer::dial(&place.meta)).is_none() {
        return Ok(false);
    }
    let builder = visitor(&args.node)?;
    let built = report.step(|| match builder.log(|_, _| {}).build() {
        Ok(engine) => Ok((engine, Finding::pass("engine", "started"))),
        Err(e) => Err(Finding::told("engine", &e)),
    });
    let Some(engine) = built else { return Ok(false) };
    let opened = report.step(|| open(&engine, &args.peer));
    let Some(segment) = opened else {
        engine.shutdown(node::SHUTDOWN_WITHIN);
        return Ok(false);
    };
    let answered = report.step(|| match segment.probe(peer::RAILS) {
        Ok(took) => Ok(((), Finding::pass("handshake", format!("answers in {}", units::span(nanos(took)))))),
        Err(e) => Err(Finding::told("handshake", &e)),
    });
    let rails = peer::settled(&engine, segment.name(), Instant::now() + peer::RAILS);
    report.ways = engine.explain(segment.name());
    engine.shutdown(node::SHUTDOWN_WITHIN);
    for info in rails {
        let measured = rail::measure(args, &info)?;
        report.rails.push((info, measured));
    }
    Ok(answered.is_some())
}

fn look_up(meta: &RpcMeta) -> peer::Step<()> {
    let host = &meta.ip_or_host_name;
    match own::lookup(host) {
        Ok(found) => {
            let listed = found.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
            Ok(((), Finding::pass("name", format!("{host} is {listed}"))))
        }
        Err(why) => Err(Finding::fail(
            "name",
            format!("{host}: {why}"),
            "mend DNS or /etc/hosts, or name the node by its address",
        )),
    }
}

fn open(engine: &Engine, name: &str) -> peer::Step<Segment> {
    match engine.open_segment(name) {
        Ok(segment) => {
            let buffers = segment.buffers();
            let bytes: u64 = buffers.iter().map(|buffer| buffer.len).fold(0, u64::saturating_add);
            let text = format!("{} buffers, {}, {} NICs", buffers.len(), units::size(bytes), segment.nics().len());
            Ok((segment, Finding::pass("segment", text)))
        }
        Err(e) => Err(Finding::told("segment", &e)),
    }
}

fn nanos(span: Duration) -> u64 {
    u64::try_from(span.as_nanos()).unwrap_or(u64::MAX)
}

impl Report {
    fn step<T>(&mut self, take: impl FnOnce() -> peer::Step<T>) -> Option<T> {
        let began = Instant::now();
        let (value, finding) = match take() {
            Ok((value, finding)) => (Some(value), finding),
            Err(finding) => (None, finding),
        };
        self.steps.push(Step { finding, took: began.elapsed() });
        value
    }

    fn text(&self) -> String {
        let mut steps = Table::new(&[("step", Align::Left), ("took", Align::Right), ("", Align::Left)]);
        for Step { finding, took } in &self.steps {
            let mut said = finding.evidence.clone();
            if finding.verdict == Verdict::Fail {
                said = format!("FAILED: {said}");
                if let Some(next) = &finding.next {
                    let _ = write!(said, " -> {next}");
                }
            }
            steps.row([finding.check.to_owned(), units::span(nanos(*took)), said]);
        }
        let mut text = steps.render(0);
        if self.rails.is_empty() {
            for line in &self.ways {
                let _ = writeln!(text, "{line}");
            }
            return text;
        }
        let mut table = Table::new(&[
            ("our NIC", Align::Left),
            ("peer's", Align::Left),
            ("over", Align::Left),
            ("MTU", Align::Right),
            ("op", Align::Left),
            ("p50", Align::Right),
            ("p99", Align::Right),
            ("p99.9", Align::Right),
            ("max", Align::Right),
        ]);
        for (info, measured) in &self.rails {
            for (op, latency) in [("READ", Some(&measured.read)), ("WRITE", measured.write.as_ref())] {
                let Some(latency) = latency else { continue };
                let mtu = measured.path_mtu.map_or("-".to_owned(), |mtu| mtu.to_string());
                let mut row =
                    vec![info.nic.clone(), info.peer_nic.clone(), info.fabric.to_string(), mtu, op.to_owned()];
                row.extend(match latency {
                    Ok(found) => rail::QUANTILES.map(|q| units::span(found.value_at_quantile(q))),
                    Err(_) => ["-"; 4].map(str::to_owned),
                });
                table.row(row);
            }
        }
        let _ = write!(text, "\n{}", table.render(0));
        for (info, measured) in &self.rails {
            let failed =
                [Some(&measured.read), measured.write.as_ref()].into_iter().flatten().find_map(|r| r.as_ref().err());
            if let Some(why) = failed {
                let said = format!("{} to {}: {why}", info.nic, info.peer_nic);
                for line in crate::table::wrap(&said, crate::table::WIDTH) {
                    let _ = writeln!(text, "{line}");
                }
            }
        }
        let _ = write!(text, "\n{}", self.matrix());
        text
    }

    /// Our NICs down, the peer's across: the median of a READ.
    fn matrix(&self) -> String {
        let mut ours: Vec<&str> = self.rails.iter().map(|(info, _)| info.nic.as_str()).collect();
        let mut theirs: Vec<&str> = self.rails.iter().map(|(info, _)| info.peer_nic.as_str()).collect();
        for names in [&mut ours, &mut theirs] {
            names.sort_unstable();
            names.dedup();
        }
        let mut columns = vec![("READ, p50", Align::Left)];
        columns.extend(theirs.iter().map(|name| (*name, Align::Right)));
        let mut table = Table::new(&columns);
        for nic in ours {
            let cell = |peer_nic: &&str| {
                let found = self.rails.iter().find(|(info, _)| info.nic == nic && info.peer_nic == **peer_nic);
                match found.map(|(_, measured)| &measured.read) {
                    Some(Ok(latency)) => units::span(latency.value_at_quantile(0.5)),
                    Some(Err(_)) => "no".to_owned(),
                    None => String::new(),
                }
            };
            table.row(std::iter::once(nic.to_owned()).chain(theirs.iter().map(cell)));
        }
        table.render(0)
    }

    fn json(&self) -> Value {
        let steps = self.steps.iter().map(|step| {
            let mut value = step.finding.json();
            value["took_ns"] = json!(nanos(step.took));
            value
        });
        let rails = self.rails.iter().map(|(info, measured)| {
            json!({
                "nic": info.nic, "peer_nic": info.peer_nic, "fabric": info.fabric.to_string(), "state": info.state,
                "path_mtu": measured.path_mtu, "moonrail": info.moonrail,
                "read": rail::to_json(&measured.read), "write": measured.write.as_ref().map(rail::to_json),
            })
        });
        json!({ "steps": steps.collect::<Vec<_>>(), "rails": rails.collect::<Vec<_>>(), "ways": self.ways })
    }
}
