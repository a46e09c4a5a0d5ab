//! moonrail over RDMA beside perftest and Mooncake, on one node whose NIC is its own neighbour: `cargo xtask bench verbs` runs it
//! in the lab.
//!
//! perftest is what verbs can do: one thread that posts and polls, and keeps as many requests outstanding as it may. One
//! outstanding (`-t 1`) is the bare post-and-poll loop. Ours submits a batch, waits for all of it, and submits the next, so that with
//! one thread its queue runs empty each time; with two the other's batch is there meanwhile.

use std::error::Error;

use super::perftest::Perftest;
use super::sides::{Mooncake, Ours};
use super::{Cell, Effort, Place, Programs, head, measure};
use crate::record::Found;

/// The lab's first NIC.
pub(super) const NIC: &str = "rxe0";
/// Sizes, blocks in a batch, threads.
const CELLS: [(u64, u64, u64); 9] = [
    (64, 1, 1),
    (4 << 10, 1, 1),
    (64 << 10, 1, 1),
    (1 << 20, 1, 1),
    (4 << 10, 32, 1),
    (4 << 10, 32, 2),
    (64 << 10, 32, 1),
    (64 << 10, 32, 2),
    (1 << 20, 8, 1),
];

pub(crate) fn run(quick: bool) -> Result<Found, Box<dyn Error>> {
    if std::env::var_os("MOONRAIL_LAB").is_none() {
        return Err("it needs a NIC of the lab: run `cargo xtask bench verbs`".into());
    }
    let programs = Programs::found()?;
    let effort = if quick { Effort { repetitions: 1, seconds: 0.5 } } else { Effort { repetitions: 7, seconds: 0.5 } };
    let place = Place { fabric: "rdma", host: "10.0.0.1", memory: 64 << 20 };
    let ours = Ours::start(&programs, place)?;
    let mut mooncake = Mooncake::start(&programs, place)?;
    let mut perftest = Perftest::found()?;
    head();
    let mut cases = Vec::new();
    for op in ["write", "read"] {
        for (block, batch, threads) in CELLS {
            let cell = Cell { op, block, batch, threads };
            cases.extend(measure(place.fabric, cell, &ours, &mut [&mut perftest, &mut mooncake], effort)?);
        }
    }
    Ok(Found { unit: "GB/s (10^9), medians; ratio: ours to the other's, of repetitions in turn", cases })
}
