//! `cargo xtask sim`: many seeds through every simulation, on several processors.
//!
//! A simulation is a test target called `simulation` that takes its seeds from the environment: `SEEDS=n` from `FROM=s` on.
//! Seeds go out in chunks, each to a process of its own with a time limit, so one that hangs or breaks its process ends
//! neither the others nor the count.

use std::path::PathBuf;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use crate::error::{Error, Result};
use crate::process::{Bounded, Ending, last_lines};
use crate::test::Binaries;
use crate::workspace;

/// Seeds one process runs: enough that starting it, and the tests in it that have no seed, do not count.
const CHUNK: u64 = 100;
/// What a chunk may take. A seed takes milliseconds; this is for what hangs.
const CHUNK_LIMIT: Duration = Duration::from_secs(600);
/// Between two lines of progress.
const PROGRESS: Duration = Duration::from_secs(10);
const BUILD_LIMIT: Duration = Duration::from_secs(1800);

/// What to run.
#[derive(Debug)]
pub(crate) struct Plan {
    /// Seeds for each seeded test.
    pub(crate) seeds: u64,
    /// The first one; by the clock if it is not given.
    pub(crate) from: Option<u64>,
    /// Processes at a time; as many as there are processors if it is not given.
    pub(crate) jobs: Option<usize>,
    /// No chunk is begun after this; none if it is not given, as each chunk has a limit of its own.
    pub(crate) limit: Option<Duration>,
}

/// A test program with the crate it belongs to.
#[derive(Debug)]
struct Suite {
    package: String,
    program: String,
    folder: PathBuf,
}

/// Some seeds of one suite.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Chunk {
    suite: usize,
    from: u64,
    seeds: u64,
}

/// Runs them and prints progress, what failed with the command that replays it, and a closing line, which it returns.
///
/// # Errors
/// When any seed failed: with the closing line and the replays.
pub(crate) fn run(plan: &Plan) -> Result<String> {
    let suites = build()?;
    let now = || SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs() * 1_000_000);
    let from = plan.from.unwrap_or_else(now);
    let processors = || std::thread::available_parallelism().map_or(1, usize::from);
    let jobs = plan.jobs.unwrap_or_else(processors).max(1);
    let chunks = chunks(suites.len(), from, plan.seeds);
    println!("sim: {} seeds from {from} through {} suites, {jobs} at a time", plan.seeds, suites.len());
    let started = Instant::now();
    let (next, done) = (AtomicUsize::new(0), Mutex::new(Done { seeds: 0, told: started }));
    let failures = Mutex::new(Vec::new());
    let is_late = || plan.limit.is_some_and(|limit| started.elapsed() >= limit);
    std::thread::scope(|scope| {
        for _ in 0..jobs {
            scope.spawn(|| {
                while let Some(chunk) = chunks.get(next.fetch_add(1, Ordering::Relaxed)) {
                    if is_late() {
                        locked(&failures).push(format!("FAILED: broken off at its limit before {chunk:?}"));
                        break;
                    }
                    if let Err(failure) = run_chunk(&suites[chunk.suite], *chunk) {
                        println!("{failure}");
                        locked(&failures).push(failure);
                    }
                    locked(&done).add(chunk.seeds, plan.seeds * suites.len() as u64, started);
                }
            });
        }
    });
    let failures = failures.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner);
    let (took, failed) = (started.elapsed(), failures.len());
    let closing = format!(
        "sim: {} seeds from {from} through {} suites in {:.1} s: {:.1} seeds/s, {failed} chunks of {} failed",
        plan.seeds,
        suites.len(),
        took.as_secs_f64(),
        plan.seeds as f64 / took.as_secs_f64(),
        chunks.len()
    );
    println!("{closing}");
    if failed == 0 {
        Ok(closing)
    } else {
        Err(Error::new(format!("{closing}\n{}", failures.join("\n")), "replay them by the commands above"))
    }
}

fn locked<T>(what: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    what.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

struct Done {
    seeds: u64,
    told: Instant,
}

impl Done {
    fn add(&mut self, seeds: u64, of: u64, started: Instant) {
        self.seeds += seeds;
        if self.told.elapsed() >= PROGRESS {
            self.told = Instant::now();
            println!("  {} of {of} in {} s", self.seeds, started.elapsed().as_secs());
        }
    }
}

/// Compiles every simulation, in the profile that all tests share.
fn build() -> Result<Vec<Suite>> {
    let targets: Vec<_> =
        workspace::test_targets()?.into_iter().filter(|target| target.name == crate::test::SIMULATION).collect();
    let messages = workspace::cargo(BUILD_LIMIT)
        .args(["test", "--workspace", "--no-run", "--message-format=json-render-diagnostics"])
        .args(workspace::test_features()?)
        .args(["--test", crate::test::SIMULATION])
        .stdout()?;
    let built = Binaries::parse(&messages);
    let suite = |target: &workspace::TestTarget| {
        let program = built.tests.iter().find(|(source, _)| *source == target.source).map(|(_, path)| path.clone());
        let program =
            program.ok_or_else(|| Error::new(format!("cargo built no program for {}", target.source.display()), ""))?;
        let name = target.folder.file_name().unwrap_or_default().to_string_lossy();
        Ok(Suite { package: format!("moonrail-{name}"), program, folder: target.folder.clone() })
    };
    let suites: Vec<Suite> = targets.iter().map(suite).collect::<Result<_>>()?;
    if suites.is_empty() {
        return Err(Error::new("there are no simulations", "a test target called `simulation` is one"));
    }
    Ok(suites)
}

/// All seeds of all suites, the suites in turn, so that a run that is broken off has tried each.
fn chunks(suites: usize, from: u64, seeds: u64) -> Vec<Chunk> {
    let starts = (0..seeds).step_by(CHUNK as usize);
    let of = |at: u64| {
        (0..suites).map(move |suite| Chunk { suite, from: from.wrapping_add(at), seeds: CHUNK.min(seeds - at) })
    };
    starts.flat_map(of).collect()
}

fn run_chunk(suite: &Suite, chunk: Chunk) -> std::result::Result<(), String> {
    let Chunk { from, seeds, .. } = chunk;
    let ended = Bounded::new(&suite.program, CHUNK_LIMIT)
        .in_folder(&suite.folder)
        .env_remove("SEED")
        .env("SEEDS", seeds.to_string())
        .env("FROM", from.to_string())
        // One job is one processor. What has no seed of its own is not repeated with each chunk: the twins alone take longer
        // than a hundred seeds.
        .args(["--test-threads=1", "--skip", "twins::", "--skip", "chaos::"])
        .ending();
    let again = format!("FROM={from} SEEDS={seeds} cargo test -p {} --test {}", suite.package, crate::test::SIMULATION);
    match ended {
        Ok((Ending::Success, _)) => Ok(()),
        Ok((Ending::Failure, said)) => Err(format!("FAILED: {}", story(&said, &again))),
        Ok((Ending::Limit, _)) => {
            Err(format!("FAILED: a seed hangs, no end within {} s\n  run again with: {again}", CHUNK_LIMIT.as_secs()))
        }
        Err(error) => Err(format!("FAILED: {error}")),
    }
}

/// What failed and how to see it again: by the simulation's own words, or where it had none, the whole chunk.
fn story(said: &str, again: &str) -> String {
    let replays: Vec<&str> = said.lines().filter(|line| line.trim_start().starts_with("replay with: ")).collect();
    if replays.is_empty() {
        format!("{}\n  run again with: {again}", last_lines(said, 10))
    } else {
        let panics = said.lines().skip_while(|line| !line.contains("panicked at ")).take(4).collect::<Vec<_>>();
        format!("{}\n  {}", panics.join("\n  "), replays.join("\n  "))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_seed_goes_to_every_suite_once() {
        let chunks = chunks(2, 7, 250);
        assert_eq!(chunks.len(), 6);
        for suite in 0..2 {
            let of_it: Vec<Chunk> = chunks.iter().copied().filter(|chunk| chunk.suite == suite).collect();
            assert_eq!(of_it.iter().map(|chunk| chunk.seeds).collect::<Vec<_>>(), [100, 100, 50]);
            assert_eq!(of_it.iter().map(|chunk| chunk.from).collect::<Vec<_>>(), [7, 107, 207]);
        }
    }

    #[test]
    fn a_failure_names_the_seed_or_else_the_chunk() {
        let said = "thread 'x' panicked at a.rs:1:\nwrong\nreplay with: SEED=5 cargo test\nnote: more\n";
        let told = story(said, "again");
        assert!(told.contains("wrong") && told.contains("replay with: SEED=5 cargo test"), "{told}");
        assert!(!told.contains("run again"), "{told}");
        assert!(story("memory allocation failed\n", "FROM=1").ends_with("run again with: FROM=1"));
    }

    #[test]
    fn a_chunk_that_fails_is_told_with_its_seed() {
        let suite = |script: &str| {
            let folder = std::env::temp_dir().join(format!("moonrail-sim-{}-{}", std::process::id(), script.len()));
            std::fs::create_dir_all(&folder).expect("a folder");
            let program = folder.join("simulation");
            std::fs::write(&program, format!("#!/bin/sh\n{script}\n")).expect("a program");
            let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
            std::fs::set_permissions(&program, mode).expect("it may run");
            Suite { package: "p".into(), program: program.to_string_lossy().into_owned(), folder }
        };
        let chunk = Chunk { suite: 0, from: 40, seeds: 2 };
        let good = suite("[ $FROM = 40 ] && [ $SEEDS = 2 ]");
        assert_eq!(run_chunk(&good, chunk), Ok(()));
        let bad = suite("echo replay with: SEED=$FROM x; exit 101");
        assert!(run_chunk(&bad, chunk).expect_err("it fails").contains("replay with: SEED=40 x"));
        for suite in [good, bad] {
            let _ = std::fs::remove_dir_all(suite.folder);
        }
    }
}
