//! `moonrail serve`: offers memory until it is told to stop.

use std::process::ExitCode;
use std::time::{Duration, Instant};

use moonrail::{Engine, Region};
use serde_json::json;

use crate::bench::judge::Witness;
use crate::cli::ServeArgs;
use crate::failure::{Failure, Result};
use crate::node;
use crate::say;
use crate::signal::Stop;

/// How often notifications are looked at: a question that waits this long is not noticed by anybody.
const LOOK_EVERY: Duration = Duration::from_millis(5);

/// Runs the subcommand.
pub fn run(args: &ServeArgs) -> Result<ExitCode> {
    let stop = signals()?;
    let engine = node::start(node::with_metrics(node::builder(&args.node)?, args.metrics))?;
    node::tell_metrics(&engine);
    let regions: Result<Vec<Region>> = (0..args.buffers).map(|_| node::allocate(&engine, args.size, "*")).collect();
    let done = regions.map(|regions| {
        announce(&engine, &regions, args.json);
        until_asked(&engine, &regions, &stop, args.verify);
    });
    node::end(&engine, done.map(|()| ExitCode::SUCCESS))
}

/// Signal handlers, installed before anything is published: a stop during start-up is a clean one, too.
pub fn signals() -> Result<Stop> {
    Stop::install()
        .map_err(|e| Failure::new(format!("signal handlers cannot be set: {e}"), "see what limits this process"))
}

/// Says that the memory can be used, under which name, on stdout: a script waits for this line.
pub fn announce(engine: &Engine, regions: &[Region], as_json: bool) {
    let name = engine.name();
    if as_json {
        let buffers: Vec<_> =
            regions.iter().map(|r| json!({ "addr": r.addr(), "len": r.len(), "location": r.location() })).collect();
        say::line(json!({ "listening": name, "buffers": buffers }));
    } else {
        say::line(format_args!("listening on {name}"));
    }
}

/// Serves until SIGINT or SIGTERM. Peers move the bytes without us; only questions of verification need an answer.
pub fn until_asked(engine: &Engine, regions: &[Region], stop: &Stop, verify: bool) {
    if !verify {
        stop.wait(None);
        return;
    }
    let mut witness = Witness::new(engine, regions);
    while !stop.wait(Some(Instant::now() + LOOK_EVERY)) {
        while witness.serve() > 0 && !stop.is_asked() {}
    }
    if witness.answered() > 0 {
        eprintln!("{} verification requests answered", witness.answered());
    }
}
