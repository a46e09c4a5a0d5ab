//! Instructions of a caller's thread for one request, under callgrind: exact, whatever else the machine does.
//!
//! This program runs itself under valgrind, and callgrind collects only inside [`measured`]: one batch submitted and waited for, over
//! and over. What the batch's thread executes counts, copying included; what cores do meanwhile does not.

use std::error::Error;
use std::process::Command;

use moonrail::Op;
use serde_json::json;

use crate::host::{Engines, Load, Way};
use crate::record::Found;

const ROUNDS: u64 = 2000;
/// Sizes, and how many in a batch.
const CASES: [(u64, u64); 4] = [(64, 1), (4096, 1), (64, 32), (4096, 32)];

/// Runs every case in a process of its own. A quick run counts WRITE alone, over few rounds.
pub(crate) fn run(quick: bool) -> Result<Found, Box<dyn Error>> {
    let (rounds, ops) = if quick { (50, &["write"][..]) } else { (ROUNDS, &["write", "read"][..]) };
    let own = std::env::current_exe()?;
    let mut cases = Vec::new();
    println!(
        "{:<5} {:>6} {:>5} {:>22} {:>22}",
        "op", "block", "batch", "instructions a batch", "instructions a request"
    );
    for op in ops {
        for (block, batch) in CASES {
            let mut valgrind = Command::new("valgrind");
            valgrind.args([
                "--tool=callgrind",
                "--callgrind-out-file=/dev/null",
                "--toggle-collect=*instructions::measured*",
            ]);
            valgrind.arg(&own).args(["measured", op, &block.to_string(), &batch.to_string(), &rounds.to_string()]);
            let output = valgrind.output().map_err(|e| format!("valgrind: {e}; apt-get install valgrind"))?;
            let said = String::from_utf8_lossy(&output.stderr).into_owned();
            let collected = said.lines().find_map(|line| line.split_once("Collected :")?.1.trim().parse::<u64>().ok());
            let collected = collected.ok_or_else(|| format!("callgrind collected nothing: {said}"))?;
            let of_batch = collected as f64 / rounds as f64;
            let of_request = of_batch / batch as f64;
            println!("{op:<5} {block:>6} {batch:>5} {of_batch:>22.1} {of_request:>22.1}");
            cases.push(json!({
                "fabric": "shm", "op": op, "block": block, "batch": batch, "rounds": rounds,
                "instructions_per_batch": of_batch, "instructions_per_request": of_request,
            }));
        }
    }
    Ok(Found { unit: "instructions of the caller's thread, copying included", cases })
}

/// The process that is counted. `words`: op, block, batch, rounds.
pub(crate) fn child(words: &[String]) -> Result<(), Box<dyn Error>> {
    let [op, block, batch, rounds] = words else { return Err("measured OP BLOCK BATCH ROUNDS".into()) };
    let op = if op == "read" { Op::Read } else { Op::Write };
    let load = Load { op, block: block.parse()?, batch: batch.parse()?, fresh: false };
    let mut engines = Engines::new(moonrail::Fabric::Shm)?;
    engines.once(load, 0)?;
    measured(&mut engines, load, rounds.parse()?)
}

#[inline(never)]
fn measured(engines: &mut Engines, load: Load, rounds: u64) -> Result<(), Box<dyn Error>> {
    engines.prepare(load, 0);
    for _ in 0..rounds {
        engines.submit_and_wait()?;
    }
    Ok(())
}
