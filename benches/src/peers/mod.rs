//! moonrail beside other engines on this machine: the same blocks, each engine with its own tools, in turn.
//!
//! Every side is two processes of its own, a target with memory and an initiator that moves blocks and measures. Over TCP:
//! `moonrail serve` and `bench`; Mooncake's `transfer_engine_bench` at both ends; two NIXL agents over UCX (tools/peers/nixl.py).
//! Over shared memory the same without Mooncake, whose published build has none. One cell is measured by each side in turn,
//! several times; the figure is the median of the ratios of a repetition.
//!
//! Who is not measured stands still: our target and Mooncake's sleep by themselves, NIXL's is stopped.
//!
//! What is not equal is against us: our blocks lie one block apart, so that they cannot be merged into one request;
//! `transfer_engine_bench` with one thread has them side by side. NIXL's batches are prepared once and posted again.

mod perftest;
pub(crate) mod process;
mod sides;
pub(crate) mod verbs;

use std::error::Error;
use std::path::PathBuf;

use serde_json::{Value, json};

use crate::host::median;
use crate::record::Found;
use sides::{Mooncake, Nixl, Ours, Side};

/// Sizes, and how many in a batch.
const BLOCKS: [(u64, u64); 7] =
    [(64, 1), (4 << 10, 1), (4 << 10, 32), (64 << 10, 1), (64 << 10, 32), (1 << 20, 1), (1 << 20, 32)];
/// Threads that submit. More than one only beside Mooncake.
const THREADS: [u64; 3] = [1, 4, 12];
/// Where the sides of an experiment meet.
#[derive(Clone, Copy)]
pub(crate) struct Place {
    pub(crate) fabric: &'static str,
    /// Address that both ends have.
    pub(crate) host: &'static str,
    /// Each side's memory: room for the largest cell, blocks one block apart.
    pub(crate) memory: u64,
}

/// Repetitions, and how long each of them measures.
#[derive(Clone, Copy)]
struct Effort {
    repetitions: usize,
    seconds: f64,
}

/// What is moved, over and over.
#[derive(Clone, Copy)]
pub(crate) struct Cell {
    pub(crate) op: &'static str,
    pub(crate) block: u64,
    pub(crate) batch: u64,
    pub(crate) threads: u64,
}

/// Where the engines are.
pub(crate) struct Programs {
    /// The `moonrail` command, of the same build as this program.
    moonrail: PathBuf,
    /// The Python environment that holds Mooncake's published build.
    mooncake: PathBuf,
}

impl Programs {
    /// From the variables that `cargo xtask bench` sets.
    fn found() -> Result<Self, Box<dyn Error>> {
        let moonrail = std::env::current_exe()?.with_file_name("moonrail");
        if !moonrail.exists() {
            return Err(format!("{} is not there: cargo build --release -p moonrail-tools", moonrail.display()).into());
        }
        Ok(Self { moonrail, mooncake: installed_in("MOONRAIL_PEERS")? })
    }
}

fn installed_in(variable: &str) -> Result<PathBuf, Box<dyn Error>> {
    let unset = || format!("{variable} is not set: run `cargo xtask bench`, which installs the other engines");
    Ok(std::env::var_os(variable).map(PathBuf::from).ok_or_else(unset)?)
}

pub(crate) fn run(quick: bool) -> Result<Found, Box<dyn Error>> {
    let programs = Programs::found()?;
    let nixl = installed_in("MOONRAIL_PEERS_NIXL")?;
    let effort = if quick { Effort { repetitions: 1, seconds: 0.3 } } else { Effort { repetitions: 7, seconds: 0.4 } };
    head();
    let mut cases = Vec::new();
    for fabric in ["shm", "tcp"] {
        let place = Place { fabric, host: "127.0.0.1", memory: 1 << 30 };
        let ours = Ours::start(&programs, place)?;
        let mut nixl = Nixl::start(&nixl, place)?;
        let mut mooncake = if fabric == "tcp" { Some(Mooncake::start(&programs, place)?) } else { None };
        for op in ["write", "read"] {
            for threads in THREADS {
                for (block, batch) in BLOCKS {
                    let cell = Cell { op, block, batch, threads };
                    let mut others: Vec<&mut dyn Side> = Vec::new();
                    if threads == 1 {
                        others.push(&mut nixl);
                    }
                    if let Some(mooncake) = &mut mooncake {
                        others.push(mooncake);
                    }
                    cases.extend(measure(fabric, cell, &ours, &mut others, effort)?);
                }
            }
        }
    }
    Ok(Found { unit: "GB/s (10^9), medians; ratio: ours to the other's, of repetitions in turn", cases })
}

fn head() {
    println!(
        "{:<4} {:<5} {:>8} {:>5} {:>7} {:<9} {:>10} {:>10} {:>8} {:>17}",
        "over", "op", "block", "batch", "threads", "beside", "its GB/s", "our GB/s", "ratio", "(min-max)"
    );
}

/// One cell by each side in turn.
fn measure(
    fabric: &str,
    cell: Cell,
    ours: &Ours,
    others: &mut [&mut dyn Side],
    effort: Effort,
) -> Result<Vec<Value>, Box<dyn Error>> {
    if others.is_empty() {
        return Ok(Vec::new());
    }
    let mut own = Vec::new();
    let mut rates = vec![Vec::new(); others.len()];
    for _ in 0..effort.repetitions {
        own.push(ours.batches_per_second(cell, effort.seconds)?);
        for (other, rates) in others.iter_mut().zip(&mut rates) {
            let rate = other.batches_per_second(cell, effort.seconds);
            rates.push(
                rate.map_err(|e| format!("{}, {} of {} x {}: {e}", other.name(), cell.op, cell.block, cell.batch))?,
            );
        }
    }
    let gigabytes = |rate: f64| rate * (cell.block * cell.batch) as f64 / 1e9;
    let mut cases = Vec::new();
    for (other, rates) in others.iter().zip(&rates) {
        let mut ratios: Vec<f64> = own.iter().zip(rates).map(|(own, other)| own / other).collect();
        let (ratio, mine, its) = (median(&mut ratios), median(&mut own.clone()), median(&mut rates.clone()));
        let (low, high) = (ratios[0], ratios[ratios.len() - 1]);
        println!(
            "{fabric:<4} {:<5} {:>8} {:>5} {:>7} {:<9} {:>10.4} {:>10.4} {ratio:>8.2} {:>17}",
            cell.op,
            cell.block,
            cell.batch,
            cell.threads,
            other.name(),
            gigabytes(its),
            gigabytes(mine),
            format!("({low:.2}-{high:.2})"),
        );
        cases.push(json!({
            "fabric": fabric, "op": cell.op, "block": cell.block, "batch": cell.batch, "threads": cell.threads,
            "beside": other.name(), "version": other.version(), "gb_per_second": gigabytes(mine),
            "its_gb_per_second": gigabytes(its), "batches_per_second": mine, "its_batches_per_second": its,
            "ratio": ratio, "ratio_min": low, "ratio_max": high, "repetitions": ratios.len(),
        }));
    }
    Ok(cases)
}
