//! `moonrail bench`: moves blocks between this node and another, measures, and checks every byte if asked.
//!
//! In the order data meets them: [`plan`] says which blocks go where; [`load`] submits and waits; [`pattern`] makes and
//! checks the bytes, [`judge`] where the memory is; [`report`] prints, [`plot`] draws. [`mooncake`] is the second command line.

pub mod judge;
pub mod load;
pub mod mooncake;
pub mod pattern;
pub mod plan;
pub mod plot;
pub mod report;

use std::process::ExitCode;
use std::time::{Duration, SystemTime};

use moonrail::{Engine, Op, Segment};
use serde_json::{Value, json};

use crate::cli::{BenchArgs, Operation};
use crate::failure::{Failure, Result};
use crate::node;
use crate::say;
use crate::signal::Stop;
use plan::{Layout, Limit, Places, Plan, Verify};
use report::Run;

const DEFAULT_DURATION: Duration = Duration::from_secs(10);

/// Runs the subcommand with our own command line.
pub fn run(args: &BenchArgs) -> Result<ExitCode> {
    let plans = plans(args)?;
    let stop = Stop::install()
        .map_err(|e| Failure::new(format!("signal handlers cannot be set: {e}"), "see what limits this process"))?;
    let mut builder = node::builder(&args.node)?.transfer_timeout(args.timeout);
    if let Some(rail) = &args.rail {
        builder = node::over_rail(builder, rail)?;
    }
    let engine = node::start(node::with_metrics(builder, args.metrics))?;
    node::tell_metrics(&engine);
    node::end(&engine, measure(&engine, args, &plans, &stop))
}

/// The measurements that the command line asks for, in order.
fn plans(args: &BenchArgs) -> Result<Vec<Plan>> {
    if args.timeout < node::SHORTEST_TIMEOUT {
        return Err(Failure::usage("--timeout is less than 5s", "connecting alone may take longer: give 5s or more"));
    }
    let ops: &[Op] = match args.op {
        Operation::Read => &[Op::Read],
        Operation::Write => &[Op::Write],
        Operation::Both => &[Op::Write, Op::Read],
    };
    let verify = match (args.verify, args.ask_target) {
        (false, _) => Verify::No,
        (true, false) => Verify::ReadBack,
        (true, true) => Verify::AskTarget,
    };
    let limit = args.iterations.map_or_else(|| Limit::Time(args.duration.unwrap_or(DEFAULT_DURATION)), Limit::Batches);
    let mut first_iteration = fresh_iteration();
    let mut plans = Vec::new();
    let blocks: Vec<u64> = args.block.iter().flat_map(|sizes| sizes.0.iter().copied()).collect();
    for &op in ops {
        for (&threads, &batch) in args.threads.iter().flat_map(|t| args.batch.iter().map(move |b| (t, b))) {
            for &block in &blocks {
                let layout = Layout::new(block, args.stride.unwrap_or(block), batch.into(), threads.into())?;
                plans.push(Plan { op, layout, limit, verify, timeout: args.timeout, first_iteration });
                first_iteration = first_iteration.wrapping_add(1 << 32);
            }
        }
    }
    Ok(plans)
}

/// A number for the pattern that no earlier run against the same memory has used: what they left must not pass.
fn fresh_iteration() -> u64 {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    (now.as_nanos() as u64) ^ (u64::from(std::process::id()) << 48)
}

fn measure(engine: &Engine, args: &BenchArgs, plans: &[Plan], stop: &Stop) -> Result<ExitCode> {
    let segment = engine.open_segment(&args.segment).map_err(|e| Failure::told(&e))?;
    let largest = plans.iter().map(|plan| plan.layout).max_by_key(|layout| layout.extent());
    let Some(largest) = largest else { return Err(Failure::usage("there is no block size", "give --block SIZE")) };
    let remote = plan::remote_bases(&args.segment, &segment.buffers(), args.buffer, 1, largest)?;
    let local = vec![node::allocate(engine, largest.extent(), "*")?];
    let check = if args.verify { vec![node::allocate(engine, largest.extent(), "*")?] } else { Vec::new() };
    let places = Places { local, check, remote };
    let mut runs = Vec::new();
    for (number, &plan) in plans.iter().enumerate() {
        let outcome = load::run(engine, &segment, &places, plan, (number + 1, plans.len()), stop)?;
        let stopped = outcome.stopped;
        runs.push(Run { plan, outcome });
        if stopped {
            break;
        }
    }
    show(engine, &segment, args, &runs)?;
    if runs.iter().any(|run| run.outcome.stopped) {
        return Err(Failure::new("a signal ended the run early", "the figures above are of what was done until then"));
    }
    Ok(ExitCode::SUCCESS)
}

fn show(engine: &Engine, segment: &Segment, args: &BenchArgs, runs: &[Run]) -> Result<()> {
    let rails = report::rails(engine, segment.name());
    if args.json {
        let mut all = json!({
            "segment": segment.name(),
            "runs": runs.iter().map(report::run_json).collect::<Vec<Value>>(),
        });
        merge(&mut all, report::engine_json(engine, segment.name(), &rails));
        say::line(format!("{all:#}"));
    } else if args.csv {
        say::line(report::runs_csv(runs).trim_end());
    } else {
        say::line(format_args!("{}\n{}", report::runs_text(runs), report::rails_text(engine, segment.name(), &rails)));
        if args.plot {
            say::line(plot::text(runs).trim_end());
        }
    }
    let Some(path) = &args.svg else { return Ok(()) };
    let over = args.rail.as_ref().map(|rail| format!(" over {rail}")).unwrap_or_default();
    let title = format!("moonrail bench {}{over}", segment.name());
    std::fs::write(path, plot::svg(runs, &title)).map_err(|e| {
        Failure::new(format!("{}: {e}", path.display()), "make room, or name a file that can be written to")
    })
}

fn merge(into: &mut Value, from: Value) {
    if let (Value::Object(into), Value::Object(from)) = (into, from) {
        into.extend(from);
    }
}
