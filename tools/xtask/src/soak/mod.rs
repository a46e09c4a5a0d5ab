//! `cargo xtask soak`: what CI runs a twentieth of, at its full count; hours, in parts that can be run one by one.
//!
//! ```text
//!   part ──▶ lab binaries with MOONRAIL_… set, or another cargo xtask command
//!        ──▶ the RESULT lines of node 0 ──▶ summary (pure) ──▶ the part's section of docs/soak.md
//! ```
//! The page is written after each part: whoever interrupts a run keeps what was done, and goes on with the parts that are left.

mod page;
mod summary;

use std::time::{Duration, Instant};

use clap::ValueEnum;
use serde_json::Value;

use crate::error::{Error, Result};
use crate::test::{Binaries, Clock, LabRun, minutes, one_in_the_lab};
use crate::workspace::{self, TestTarget};
use crate::{lab, setup, sim};

/// A part of the soak.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Part {
    /// 100,000 seeds of the simulation
    Seeds,
    /// Every fault of the lab for 60 s, three times
    Faults,
    /// 2,000 cancels with late packets
    Late,
    /// Faults at random for 10 minutes, and other mixes
    Mix,
    /// 10,000 rails connected, evicted and connected again
    Cycles,
}

/// Seeds of the simulation.
const SEEDS: u64 = 100_000;
/// Runs of all faults: enough for a middle one, and two that say how far it may be off.
const FAULT_RUNS: u32 = 3;
/// The binary that has the faults and the late packets.
const FAULTS: &str = "lab_2x2_faults";
/// The one with the cycles.
const LIVES: &str = "lab_2x2_lives";
const BUILD: Duration = Duration::from_secs(30 * 60);

impl Part {
    /// What it does, in the words of the page.
    fn title(self) -> &'static str {
        match self {
            Self::Seeds => "100,000 seeds",
            Self::Faults => "Faults under verified traffic, 60 s each",
            Self::Late => "2,000 cancels on a slow path",
            Self::Mix => "Ten-minute mixes",
            Self::Cycles => "10,000 rails connected, evicted and connected again",
        }
    }

    /// It is ended here: twice what it takes on two cores, or more.
    fn limit(self) -> Duration {
        let minutes = match self {
            Self::Seeds => 5 * 60,
            Self::Faults => 40,
            Self::Late => 90,
            Self::Mix => 30,
            Self::Cycles => 120,
        };
        Duration::from_secs(60 * minutes)
    }

    /// Its count, by the variable that the tests read.
    fn count(self) -> Option<(&'static str, &'static str)> {
        Some(match self {
            Self::Seeds => return None,
            Self::Faults => ("MOONRAIL_FAULT_SECONDS", "60"),
            Self::Late => ("MOONRAIL_CANCELS", "2000"),
            Self::Mix => ("MOONRAIL_MIX_SECONDS", "600"),
            Self::Cycles => ("MOONRAIL_CYCLES", "10000"),
        })
    }

    /// What is set for its tests, if the caller has not set the same: then the page says so.
    fn settings(self) -> Vec<(String, String)> {
        let usual = self.count().filter(|(name, _)| std::env::var_os(name).is_none());
        usual.into_iter().map(|(name, value)| (name.to_owned(), value.to_owned())).collect()
    }

    fn another_count(self) -> Option<String> {
        let (name, full) = self.count()?;
        let value = std::env::var(name).ok()?;
        (value != full).then(|| format!("With {name}={value} in place of {full}.\n\n"))
    }

    fn filter(self) -> &'static str {
        match self {
            Self::Seeds => "",
            Self::Faults => "faults::faults",
            Self::Late => "late::",
            Self::Mix => "mix",
            Self::Cycles => "cycles::",
        }
    }

    fn name(self) -> String {
        self.to_possible_value().map(|value| value.get_name().to_owned()).unwrap_or_default()
    }
}

/// Runs the parts, all when none is named.
pub(crate) fn run(named: &[Part]) -> Result<()> {
    setup::require()?;
    let parts = Part::value_variants().iter().copied().filter(|part| named.is_empty() || named.contains(part));
    let mut failed = Vec::new();
    for part in parts {
        println!("\n=== soak {}: {}, at most {}", part.name(), part.title(), minutes(part.limit()));
        let began = Instant::now();
        let (text, passed) = match run_part(part) {
            Ok(text) => (text, true),
            // Where the checkout lies concerns nobody who reads the page.
            Err(e) => (format!("```text\n{e}\n```\n").replace(&format!("{}/", workspace::root().display()), ""), false),
        };
        let text = part.another_count().unwrap_or_default() + &text;
        println!("{text}");
        page::write(part, &text, passed, began.elapsed())?;
        println!("--- {} {} in {}", part.name(), if passed { "passed" } else { "FAILED" }, minutes(began.elapsed()));
        if !passed {
            failed.push(part.name());
        }
    }
    if failed.is_empty() {
        Ok(())
    } else {
        Err(Error::new(
            format!("soak failed: {}", failed.join(", ")),
            "docs/soak.md has what was seen; `cargo xtask soak PART` runs one part again",
        ))
    }
}

fn run_part(part: Part) -> Result<String> {
    match part {
        Part::Seeds => seeds(part.limit()),
        Part::Faults => {
            let rows = in_the_lab(part, FAULT_RUNS, |target| target.name == FAULTS)?;
            Ok(summary::faults(&rows))
        }
        Part::Late => Ok(summary::plain(&in_the_lab(part, 1, |target| target.name == FAULTS)?)),
        Part::Mix => {
            let with_mix = |target: &TestTarget| target.name == FAULTS || target.name.ends_with("_mix");
            Ok(summary::plain(&in_the_lab(part, 1, with_mix)?))
        }
        Part::Cycles => Ok(summary::plain(&in_the_lab(part, 1, |target| target.name == LIVES)?)),
    }
}

/// Many seeds.
fn seeds(limit: Duration) -> Result<String> {
    let closing = sim::run(&sim::Plan { seeds: SEEDS, from: None, jobs: None, limit: Some(limit) })?;
    Ok(format!("```text\n{closing}\n```\n"))
}

/// Runs the binaries `runs` times, each run in a boot of its own, and returns what node 0 measured.
fn in_the_lab(part: Part, runs: u32, wanted: impl Fn(&TestTarget) -> bool) -> Result<Vec<Value>> {
    let targets = workspace::test_targets()?;
    let targets: Vec<&TestTarget> = targets.iter().filter(|t| t.lab_topology().is_some() && wanted(t)).collect();
    let built = Binaries::build(&targets, &Clock::new(BUILD))?;
    let clock = Clock::new(part.limit() * runs);
    let mut rows = Vec::new();
    for run in 1..=runs {
        for target in &targets {
            println!("run {run} of {runs}: {}", target.name);
            let of_several = target.name == FAULTS || target.name == LIVES;
            let mut filter = if of_several { vec![part.filter().to_owned()] } else { Vec::new() };
            filter.push("--include-ignored".to_owned());
            let plan = LabRun { limit: clock.left().min(part.limit()), filter, env: part.settings() };
            rows.extend(results(&one_in_the_lab(target, &built, &plan)?.logs));
        }
    }
    Ok(rows)
}

/// The lines that are meant for us.
fn results(logs: &lab::Logs) -> Vec<Value> {
    let lines = logs.iter().flat_map(|log| log.lines());
    // The test runner does not end its line before a test prints the first one of its own.
    lines.filter_map(|line| serde_json::from_str(line.split_once("RESULT ")?.1).ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_are_picked_out_of_a_nodes_output() {
        let log = "running 1 test\ntest a ... RESULT {\"a\":1}\nRESULT {\"a\":2}\nRESULT broken\nok\n".to_owned();
        let seen: Vec<u64> = results(&vec![log]).iter().filter_map(|row| row["a"].as_u64()).collect();
        assert_eq!(seen, [1, 2]);
    }
}
