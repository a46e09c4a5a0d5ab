//! What a run prints: latency and rate of each measurement, what each rail carried, what the cores counted.

use std::fmt::Write as _;

use hdrhistogram::Histogram;
use moonrail::{Engine, Fabric, Mtu, Op};
use serde_json::{Value, json};

use super::load::{Outcome, name};
use super::plan::{Layout, Plan};
use crate::table::{Align, Table};
use crate::units;

/// One finished measurement.
#[derive(Clone, Debug)]
pub struct Run {
    /// What it did.
    pub plan: Plan,
    /// What it found.
    pub outcome: Outcome,
}

/// What one rail carried.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct RailShare {
    /// Our NIC.
    pub nic: String,
    /// The peer's NIC.
    pub peer_nic: String,
    /// Its state now.
    pub state: String,
    /// Path MTU that both ends agreed on, in bytes.
    pub path_mtu: Option<u32>,
    /// How often it was connected.
    pub lives: u32,
    /// Bytes it moved since the engine started.
    pub bytes: u64,
}

/// The rails to a peer, by name.
pub fn rails(engine: &Engine, peer: &str) -> Vec<RailShare> {
    let mut rails: Vec<RailShare> = engine
        .rails()
        .into_iter()
        .filter(|rail| rail.peer == peer)
        .map(|rail| RailShare {
            nic: rail.nic,
            peer_nic: rail.peer_nic,
            state: rail.state,
            path_mtu: rail.path_mtu.map(Mtu::bytes),
            lives: rail.lives,
            bytes: rail.bytes,
        })
        .collect();
    rails.sort_by(|a, b| (&a.nic, &a.peer_nic).cmp(&(&b.nic, &b.peer_nic)));
    rails
}

const QUANTILES: [(&str, f64); 4] = [("p50", 0.5), ("p90", 0.9), ("p99", 0.99), ("p99.9", 0.999)];

fn percentiles(latency: &Histogram<u64>) -> impl Iterator<Item = String> + '_ {
    QUANTILES.iter().map(|(_, q)| latency.value_at_quantile(*q)).chain([latency.max()]).map(units::span)
}

/// Two tables: what was moved, and how long a batch took.
pub fn runs_text(runs: &[Run]) -> String {
    use Align::{Left, Right};
    let mut moved = Table::new(&[
        ("op", Left),
        ("block", Right),
        ("batch", Right),
        ("threads", Right),
        ("batches", Right),
        ("bytes", Right),
        ("rate", Right),
        ("verified", Right),
    ]);
    let mut latency = latency_table();
    for Run { plan: Plan { op, layout: Layout { block, batch, threads, .. }, .. }, outcome } in runs {
        let verified = if outcome.verified == 0 { "no".to_owned() } else { units::size(outcome.verified) };
        moved.row([
            name(*op).to_owned(),
            units::size(*block),
            batch.to_string(),
            threads.to_string(),
            outcome.batches.to_string(),
            units::size(outcome.bytes),
            units::rate(outcome.bytes, outcome.elapsed),
            verified,
        ]);
        latency_row(&mut latency, *op, *block, (*batch, *threads), &outcome.latency);
    }
    format!("{}\nlatency of a batch\n{}", moved.render(0), latency.render(0))
}

fn latency_table() -> Table {
    let mut columns = vec![("op", Align::Left), ("block", Align::Right), ("batch", Align::Right)];
    columns.extend(QUANTILES.iter().map(|(name, _)| (*name, Align::Right)));
    columns.push(("max", Align::Right));
    Table::new(&columns)
}

/// `batch` is its blocks, and the threads that submit such batches beside each other.
fn latency_row(table: &mut Table, op: Op, block: u64, (batch, threads): (u64, u64), latency: &Histogram<u64>) {
    let batch = if threads == 1 { batch.to_string() } else { format!("{batch}x{threads}") };
    table.row([name(op).to_owned(), units::size(block), batch].into_iter().chain(percentiles(latency)));
}

/// The latency table alone.
pub fn latency_text(run: &Run) -> String {
    let mut table = latency_table();
    let Layout { block, batch, threads, .. } = run.plan.layout;
    latency_row(&mut table, run.plan.op, block, (batch, threads), &run.outcome.latency);
    format!("latency of a batch\n{}", table.render(0))
}

/// Over what it went and why, what each rail carried, and what the cores counted.
pub fn rails_text(engine: &Engine, peer: &str, rails: &[RailShare]) -> String {
    let mut table = Table::new(&[
        ("rail", Align::Left),
        ("peer NIC", Align::Left),
        ("bytes", Align::Right),
        ("share", Align::Right),
        ("MTU", Align::Right),
        ("connected", Align::Right),
        ("state", Align::Left),
    ]);
    let all: u64 = rails.iter().map(|rail| rail.bytes).sum();
    for rail in rails {
        table.row([
            rail.nic.clone(),
            rail.peer_nic.clone(),
            units::size(rail.bytes),
            percent(rail.bytes, all),
            rail.path_mtu.map_or_else(|| "-".to_owned(), |bytes| bytes.to_string()),
            format!("{}x", rail.lives),
            rail.state.clone(),
        ]);
    }
    let mut text = String::new();
    for way in engine.ways(peer) {
        let _ = writeln!(text, "over {}: {}", way.fabric.map_or("nothing", Fabric::as_str), way.why);
    }
    text.push_str(&table.render(0));
    let counters = engine.counters();
    let total = counters.total();
    let _ = writeln!(
        text,
        "cores {}: {} work requests, {} doorbells, {} completions, {} slices again",
        counters.cores.len(),
        total.work_requests,
        total.doorbells,
        total.completions,
        total.retries,
    );
    if counters.copies > 0 {
        let bytes = units::size(counters.copied_bytes);
        let _ = writeln!(text, "callers' own threads: {} copies, {bytes}", counters.copies);
    }
    let incidents = engine.incidents();
    if !incidents.is_empty() {
        let open = incidents.iter().filter(|incident| !incident.closed).count();
        let _ = writeln!(text, "incidents {}, {open} of them open: the log on stderr tells each", incidents.len());
    }
    text
}

fn percent(part: u64, all: u64) -> String {
    if all == 0 { "-".to_owned() } else { format!("{:.1} %", part as f64 * 100.0 / all as f64) }
}

/// One measurement as JSON.
pub fn run_json(run: &Run) -> Value {
    let Run { plan, outcome } = run;
    let seconds = outcome.elapsed.as_secs_f64();
    json!({
        "op": name(plan.op),
        "block": plan.layout.block,
        "stride": plan.layout.stride,
        "batch": plan.layout.batch,
        "threads": plan.layout.threads,
        "batches": outcome.batches,
        "bytes": outcome.bytes,
        "verified_bytes": outcome.verified,
        "first_iteration": plan.first_iteration,
        "seconds": seconds,
        "bytes_per_second": if seconds > 0.0 { outcome.bytes as f64 / seconds } else { 0.0 },
        "stopped": outcome.stopped,
        "latency_ns": {
            "p50": outcome.latency.value_at_quantile(0.5),
            "p90": outcome.latency.value_at_quantile(0.9),
            "p99": outcome.latency.value_at_quantile(0.99),
            "p99_9": outcome.latency.value_at_quantile(0.999),
            "max": outcome.latency.max(),
            "mean": outcome.latency.mean(),
        },
    })
}

/// All measurements as comma-separated values, a head before them.
pub fn runs_csv(runs: &[Run]) -> String {
    let mut text = String::from(
        "op,block_bytes,stride_bytes,batch,threads,batches,bytes,verified_bytes,seconds,bytes_per_second,\
         p50_ns,p90_ns,p99_ns,p99_9_ns,max_ns,mean_ns\n",
    );
    for Run { plan: Plan { op, layout, .. }, outcome } in runs {
        let Layout { block, stride, batch, threads } = layout;
        let seconds = outcome.elapsed.as_secs_f64();
        let at = |quantile| outcome.latency.value_at_quantile(quantile);
        let _ = writeln!(
            text,
            "{},{block},{stride},{batch},{threads},{},{},{},{seconds:.6},{:.0},{},{},{},{},{},{:.0}",
            name(*op),
            outcome.batches,
            outcome.bytes,
            outcome.verified,
            outcome.bytes as f64 / seconds.max(1e-9),
            at(0.5),
            at(0.9),
            at(0.99),
            at(0.999),
            outcome.latency.max(),
            outcome.latency.mean(),
        );
    }
    text
}

/// Rails, cores and incidents as JSON.
pub fn engine_json(engine: &Engine, peer: &str, rails: &[RailShare]) -> Value {
    let all: u64 = rails.iter().map(|rail| rail.bytes).sum();
    let rails: Vec<Value> = rails
        .iter()
        .map(|rail| {
            json!({
                "nic": rail.nic, "peer_nic": rail.peer_nic, "state": rail.state, "bytes": rail.bytes,
                "share": if all == 0 { 0.0 } else { rail.bytes as f64 / all as f64 },
                "path_mtu": rail.path_mtu, "lives": rail.lives,
            })
        })
        .collect();
    let cores: Vec<Value> = engine
        .counters()
        .cores
        .iter()
        .map(|c| {
            json!({
                "core": c.core, "work_requests": c.work_requests, "doorbells": c.doorbells,
                "completions": c.completions, "bytes": c.bytes, "slices": c.slices, "retries": c.retries,
                "first_errors": c.first_errors, "flushes": c.flushes,
            })
        })
        .collect();
    let incidents: Vec<Value> = engine
        .incidents()
        .iter()
        .map(|i| json!({ "at_seconds": i.at.as_secs_f64(), "peer": i.peer, "text": i.to_string(), "closed": i.closed }))
        .collect();
    let way = |way: moonrail::Way| json!({ "fabric": way.fabric.map(Fabric::as_str), "why": way.why });
    let ways: Vec<Value> = engine.ways(peer).into_iter().map(way).collect();
    let counters = engine.counters();
    let copies = json!({ "copies": counters.copies, "bytes": counters.copied_bytes });
    json!({ "callers": copies, "ways": ways, "rails": rails, "cores": cores, "incidents": incidents })
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::bench::load::histogram;
    use crate::bench::plan::{Limit, Verify};
    use std::time::Duration;

    fn run(block: u64) -> Run {
        run_of(Op::Write, block, 128, 12)
    }

    /// A thousand batches of 1 ms to 1 s.
    pub(crate) fn run_of(op: Op, block: u64, batch: u64, threads: u64) -> Run {
        let mut latency = histogram();
        (1..=1000u64).for_each(|n| latency.saturating_record(n * 1_000_000));
        let layout = Layout::new(block, block, batch, threads).unwrap();
        let plan = Plan {
            op,
            layout,
            limit: Limit::Batches(1),
            verify: Verify::No,
            timeout: Duration::from_secs(1),
            first_iteration: 0,
        };
        let outcome = Outcome {
            batches: 1000,
            bytes: 1000 * layout.batch_bytes(),
            verified: 1000 * layout.batch_bytes(),
            elapsed: Duration::from_secs(10),
            latency,
            stopped: false,
        };
        Run { plan, outcome }
    }

    #[test]
    fn tables_fit_80_columns() {
        let text = runs_text(&[run(4096), run(8 << 20)]);
        assert!(text.lines().all(|line| line.chars().count() <= 80), "{text}");
        assert!(text.contains("p99.9") && text.contains("1000.34 ms") || text.contains("1000.00 ms"), "{text}");
    }

    #[test]
    fn json_holds_the_same_figures() {
        let json = run_json(&run(4096));
        assert_eq!(json["batches"], 1000);
        assert_eq!(json["verified_bytes"], json["bytes"]);
        assert!(json["latency_ns"]["p50"].as_u64().unwrap().abs_diff(500_000_000) < 1_000_000);
    }

    #[test]
    fn csv_has_as_many_values_as_names() {
        let text = runs_csv(&[run(4096), run_of(Op::Read, 1 << 20, 1, 1)]);
        let counts: Vec<usize> = text.lines().map(|line| line.split(',').count()).collect();
        assert_eq!(counts, [16, 16, 16], "{text}");
        assert!(text.lines().nth(2).unwrap().starts_with("read,1048576,1048576,1,1,1000,1048576000,"), "{text}");
    }
}
