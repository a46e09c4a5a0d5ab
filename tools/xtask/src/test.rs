//! `cargo xtask test`: every test, in parts with a time budget each.
//!
//! All parts build with one set of features and one profile, so that a cold machine compiles everything once.

use std::fmt::Write as _;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use clap::ValueEnum;
use serde_json::Value;

use crate::error::{Error, Result};
use crate::process::Bounded;
use crate::workspace::{self, TestTarget};
use crate::{check, lab, peers, setup};

/// A part of the tests.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub(crate) enum Part {
    /// Compile everything
    Build,
    /// What `cargo xtask check` does
    Check,
    /// Unit, property, etcd and documentation tests
    Host,
    /// The engine in a seeded world
    Sim,
    /// One cluster with stock Mooncake engines, on this host over TCP
    Interop,
    /// Real verbs, on Soft-RoCE between virtual nodes
    Lab,
}

impl Part {
    fn budget(self) -> Duration {
        Duration::from_secs(
            60 * match self {
                Self::Build => 10,
                Self::Check | Self::Host => 4,
                Self::Sim => 3,
                Self::Interop => 5,
                Self::Lab => 8,
            },
        )
    }

    /// A part is ended at this many times its budget: a slow machine is told apart from a hang.
    const ENDED_AT_BUDGETS: u32 = 2;
}

/// All parts together are ended here.
const TOTAL: Duration = Duration::from_secs(55 * 60);
/// One lab binary, from all nodes up to its last test: the faults take half of it on a quiet machine.
const LAB_BINARY: Duration = Duration::from_secs(480);
/// The test target that holds the simulation, in whichever crate.
pub(crate) const SIMULATION: &str = "simulation";

/// Runs the parts, all when none is named, and prints a table in the end.
pub(crate) fn run(named: &[Part]) -> Result<()> {
    let started = Instant::now();
    setup::require()?;
    let targets = workspace::test_targets()?;
    let mut rows = Vec::new();
    for part in selected(named, &targets)? {
        let left = TOTAL.saturating_sub(started.elapsed());
        let clock = Clock::new(left.min(part.budget() * Part::ENDED_AT_BUDGETS));
        println!("\n=== {} (budget {})", name(part), minutes(part.budget()));
        let ended = run_part(part, &targets, &clock);
        if let Err(e) = &ended {
            println!("error: {e}");
        }
        let row = Row { part, took: clock.started.elapsed(), passed: ended.is_ok() };
        println!("--- {}", row.line());
        let stop = part == Part::Build && !row.passed;
        rows.push(row);
        if stop {
            println!("what does not compile cannot be tested: the other parts are left out");
            break;
        }
    }
    print!("{}", summary(&rows, started.elapsed()));
    if rows.iter().all(|row| row.passed) {
        Ok(())
    } else {
        Err(Error::new("not all parts passed", "see the table and the output of the part"))
    }
}

/// The parts to run, in their order. A part whose tests do not exist is left out unless it was named.
fn selected(named: &[Part], targets: &[TestTarget]) -> Result<Vec<Part>> {
    let exists = |part| match part {
        Part::Sim => targets.iter().any(is_simulation),
        Part::Interop => targets.iter().any(|t| t.needs_peers),
        Part::Lab => targets.iter().any(|t| t.lab_topology().is_some()),
        _ => true,
    };
    if let Some(part) = named.iter().find(|&&part| !exists(part)) {
        return Err(Error::new(format!("there are no {} tests", name(*part)), "see docs/testing.md for their names"));
    }
    let wanted = |part: &Part| if named.is_empty() { exists(*part) } else { named.contains(part) };
    Ok(Part::value_variants().iter().copied().filter(wanted).collect())
}

fn is_simulation(target: &TestTarget) -> bool {
    target.name == SIMULATION
}

fn run_part(part: Part, targets: &[TestTarget], clock: &Clock) -> Result<()> {
    match part {
        Part::Build => build(clock),
        Part::Check => check::all(clock.left()),
        Part::Host => host(targets, clock),
        Part::Sim => cargo_test(clock)?.args(["--test", SIMULATION]).run(),
        Part::Interop => interop(targets, clock),
        Part::Lab => in_the_lab(targets, clock, |target| !is_interop(target)),
    }
}

fn build(clock: &Clock) -> Result<()> {
    cargo_test(clock)?.arg("--no-run").run()?;
    workspace::cargo(clock.left()).args(["build", "--workspace"]).args(workspace::test_features()?).run()
}

/// Everything but what has a part of its own.
fn host(targets: &[TestTarget], clock: &Clock) -> Result<()> {
    let mut tests = cargo_test(clock)?.args(["--lib", "--no-fail-fast"]);
    for program in workspace::tested_programs()? {
        tests = tests.args(["--bin", &program]);
    }
    for target in targets.iter().filter(|t| !t.needs_lab && !t.needs_peers && !is_simulation(t)) {
        tests = tests.args(["--test", &target.name]);
    }
    let tests = tests.run();
    // Documentation tests cannot be combined with other targets in one call.
    let documentation = cargo_test(clock)?.arg("--doc").run();
    tests.and(documentation)
}

/// Shown as it goes: what a stock engine did is worth reading, and the tables are made for it.
fn interop(targets: &[TestTarget], clock: &Clock) -> Result<()> {
    let mut tests =
        cargo_test(clock)?.env(peers::MOONCAKE.variable, peers::require(&peers::MOONCAKE)?).arg("--no-fail-fast");
    for target in targets.iter().filter(|t| t.needs_peers) {
        tests = tests.args(["--test", &target.name]);
    }
    let on_the_host = tests.args(["--", "--test-threads=1", "--nocapture"]).run();
    on_the_host.and(in_the_lab(targets, clock, is_interop))
}

/// Whether a lab test has a stock engine at the other end: it belongs to that part.
fn is_interop(target: &TestTarget) -> bool {
    target.name.contains("_interop")
}

fn cargo_test(clock: &Clock) -> Result<Bounded> {
    Ok(workspace::cargo(clock.left()).args(["test", "--workspace"]).args(workspace::test_features()?))
}

/// Each lab binary in a boot of its own: a fault one leaves behind cannot reach the next.
fn in_the_lab(targets: &[TestTarget], clock: &Clock, wanted: fn(&TestTarget) -> bool) -> Result<()> {
    let targets: Vec<&TestTarget> = targets.iter().filter(|t| t.lab_topology().is_some() && wanted(t)).collect();
    let built = Binaries::build(&targets, clock)?;
    let mut failed = Vec::new();
    for target in targets {
        let began = Instant::now();
        match one_in_the_lab(target, &built, &LabRun { limit: clock.left().min(LAB_BINARY), ..LabRun::default() }) {
            Ok(ran) => println!("{}{}: ok in {} s", ran.closing, target.name, began.elapsed().as_secs()),
            Err(e) => {
                println!("{}: FAILED in {} s\n{e}", target.name, began.elapsed().as_secs());
                // The end of what it says is the panic: once more at the very end, which may be all that somebody sees.
                let why = e.cause().lines().next_back().unwrap_or_default().trim();
                failed.push(format!("{} ({why})", target.name));
            }
        }
    }
    if failed.is_empty() { Ok(()) } else { Err(Error::new(format!("failed in the lab: {}", failed.join(", ")), "")) }
}

/// How a lab binary is run.
#[derive(Debug, Default)]
pub(crate) struct LabRun {
    /// From when all nodes are up.
    pub(crate) limit: Duration,
    /// Words of the tests to run; all when there is none.
    pub(crate) filter: Vec<String>,
    /// Set on the nodes.
    pub(crate) env: Vec<(String, String)>,
}

/// What a lab binary left.
pub(crate) struct LabRan {
    /// The test runner's own last line of each node.
    closing: String,
    /// Each node's output.
    pub(crate) logs: lab::Logs,
}

/// Boots the topology that the binary's name asks for, and runs it there.
pub(crate) fn one_in_the_lab(target: &TestTarget, built: &Binaries, run: &LabRun) -> Result<LabRan> {
    let not_of_the_lab = || Error::new(format!("{} is no test of the lab", target.name), "");
    let (nodes, nics) = target.lab_topology().ok_or_else(not_of_the_lab)?;
    let program = built.tests.iter().find(|(path, _)| *path == target.source).map(|(_, program)| program.clone());
    let program = program.ok_or_else(|| Error::new(format!("cargo built no program for {}", target.name), ""))?;
    // Tests of one binary run by name, one after the other, so the nodes stay in step.
    let mut command = vec![program, "--test-threads=1".to_owned(), "--nocapture".to_owned()];
    command.extend(run.filter.iter().cloned());
    let mut plan = lab::Plan::new(&target.name, lab::Topology::of(nodes, nics), command);
    plan.from = Some(target.folder.clone());
    plan.limit = run.limit;
    plan.env.extend(built.moonrail.iter().map(|path| ("MOONRAIL_BIN".to_owned(), path.clone())));
    plan.env
        .push((peers::MOONCAKE.variable.to_owned(), peers::require(&peers::MOONCAKE)?.to_string_lossy().into_owned()));
    plan.env.extend(run.env.iter().cloned());
    println!("{}: booting {nodes} nodes with {nics} NICs each", target.name);
    let logs = lab::run(&plan)?;
    Ok(LabRan { closing: closing_lines(&logs)?, logs })
}

/// The test runner's own last line on every node. A node that ran no test at all has not passed.
fn closing_lines(logs: &[String]) -> Result<String> {
    let mut text = String::new();
    for (node, log) in logs.iter().enumerate() {
        let closing = log.lines().rev().find(|line| line.contains("test result:"));
        match closing {
            Some(line) if !line.contains(" 0 passed") => {
                let _ = writeln!(text, "  node{node}: {line}");
            }
            Some(line) => return Err(Error::new(format!("node {node} ran no test: {line}"), "")),
            None => return Err(Error::new(format!("node {node} did not finish its tests"), "")),
        }
    }
    Ok(text)
}

/// What cargo built: test programs by source file, and the moonrail binary if there is one.
#[derive(Debug, Default)]
pub(crate) struct Binaries {
    pub(crate) tests: Vec<(PathBuf, String)>,
    moonrail: Option<String>,
}

impl Binaries {
    /// Compiles them, and the binary with them.
    pub(crate) fn build(targets: &[&TestTarget], clock: &Clock) -> Result<Self> {
        let mut cargo = cargo_test(clock)?.args(["--no-run", "--message-format=json-render-diagnostics"]);
        for target in targets {
            cargo = cargo.args(["--test", &target.name]);
        }
        Ok(Self::parse(&cargo.stdout()?))
    }

    pub(crate) fn parse(messages: &str) -> Self {
        let mut built = Self::default();
        for message in messages.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok()) {
            let Some(program) = message["executable"].as_str() else { continue };
            let (target, source) = (&message["target"], message["target"]["src_path"].as_str().unwrap_or_default());
            match target["kind"][0].as_str() {
                Some("test") => built.tests.push((PathBuf::from(source), program.to_owned())),
                Some("bin") if target["name"] == "moonrail" => built.moonrail = Some(program.to_owned()),
                _ => {}
            }
        }
        built
    }
}

/// The time a part has.
#[derive(Debug)]
pub(crate) struct Clock {
    started: Instant,
    deadline: Instant,
}

impl Clock {
    /// From now on.
    pub(crate) fn new(limit: Duration) -> Self {
        let started = Instant::now();
        Self { started, deadline: started + limit }
    }

    /// Never zero: that would mean "no limit" to `timeout`.
    pub(crate) fn left(&self) -> Duration {
        self.deadline.saturating_duration_since(Instant::now()).max(Duration::from_secs(1))
    }
}

#[derive(Debug)]
struct Row {
    part: Part,
    took: Duration,
    passed: bool,
}

impl Row {
    fn line(&self) -> String {
        let late = if self.took > self.part.budget() { ", over its budget" } else { "" };
        let passed = if self.passed { "passed" } else { "FAILED" };
        format!("{:<7} {passed} in {} of {}{late}", name(self.part), minutes(self.took), minutes(self.part.budget()))
    }
}

fn name(part: Part) -> String {
    part.to_possible_value().map(|value| value.get_name().to_owned()).unwrap_or_default()
}

pub(crate) fn minutes(time: Duration) -> String {
    format!("{}:{:02}", time.as_secs() / 60, time.as_secs() % 60)
}

fn summary(rows: &[Row], took: Duration) -> String {
    let mut text = "\n=== summary\n".to_owned();
    for row in rows {
        let _ = writeln!(text, "{}", row.line());
    }
    let _ = writeln!(text, "total   {} of {}", minutes(took), minutes(TOTAL));
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn target(name: &str, needs_lab: bool) -> TestTarget {
        let needs_peers = name.starts_with("interop");
        TestTarget {
            name: name.into(),
            source: format!("/x/{name}.rs").into(),
            folder: "/x".into(),
            needs_lab,
            needs_peers,
        }
    }

    #[test]
    fn parts_run_in_their_order_and_only_if_they_exist() {
        let all = [target("lab_2x2", true), target("interop", false), target(SIMULATION, false)];
        assert_eq!(selected(&[], &all).expect("all"), Part::value_variants());
        assert_eq!(selected(&[Part::Lab, Part::Build], &all).expect("two"), [Part::Build, Part::Lab]);
        assert_eq!(selected(&[], &[]).expect("the rest"), [Part::Build, Part::Check, Part::Host]);
        assert!(selected(&[Part::Lab], &[]).is_err(), "asked for, but not there");
    }

    #[test]
    fn budgets_fit_into_the_total() {
        let sum: Duration = Part::value_variants().iter().map(|part| part.budget()).sum();
        assert!(sum < TOTAL);
    }

    #[test]
    fn a_node_without_tests_has_not_passed() {
        let ok = "noise\ntest result: ok. 2 passed; 0 failed; 0 ignored\n\n".to_owned();
        assert!(closing_lines(&[ok.clone(), ok.clone()]).expect("both").contains("node1: test result: ok. 2 passed"));
        assert!(closing_lines(&[ok.clone(), "test result: ok. 0 passed; 0 failed\n".into()]).is_err());
        assert!(closing_lines(&[ok, "panicked\n".into()]).is_err());
    }

    #[test]
    fn programs_come_from_cargos_messages() {
        let messages = r#"{"reason":"compiler-artifact","target":{"kind":["lib"],"name":"x","src_path":"/l"},"executable":null}
{"reason":"compiler-artifact","target":{"kind":["test"],"name":"lab_2x2","src_path":"/t"},"executable":"/target/t"}
{"reason":"compiler-artifact","target":{"kind":["bin"],"name":"moonrail","src_path":"/b"},"executable":"/target/b"}
not json"#;
        let built = Binaries::parse(messages);
        assert_eq!(built.tests, [(PathBuf::from("/t"), "/target/t".to_owned())]);
        assert_eq!(built.moonrail.as_deref(), Some("/target/b"));
    }

    #[test]
    fn late_parts_are_marked() {
        let row = Row { part: Part::Sim, took: Duration::from_secs(200), passed: true };
        assert_eq!(row.line(), "sim     passed in 3:20 of 3:00, over its budget");
    }
}
