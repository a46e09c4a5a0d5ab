//! `cargo xtask demo`: moonrail moving bytes, told step by step; between two processes of this machine, or in the lab
//! between two nodes over four rails of real verbs.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::error::{Error, Result};
use crate::process::Bounded;
use crate::{lab, setup, workspace};

/// How a step is told.
const STEPS: &str = include_str!("../../demo/steps.sh");
/// What two processes do.
const HOST: &str = include_str!("../../demo/host.sh");
/// What node 0 and node 1 do; both tell their part.
const LAB: &str = include_str!("../../demo/lab.sh");

const BUILD: Duration = Duration::from_secs(1200);
/// After set-up and build.
const HOST_LIMIT: Duration = Duration::from_secs(60);
const LAB_LIMIT: Duration = Duration::from_secs(180);

/// Builds moonrail and shows it; an error if one byte arrives wrong.
pub(crate) fn run(in_the_lab: bool) -> Result<()> {
    setup::require()?;
    let moonrail = build()?;
    let started = Instant::now();
    if in_the_lab {
        println!("demo: booting two virtual nodes with two Soft-RoCE NICs each, real verbs, in software");
        lab::run(&plan(&moonrail))?;
    } else {
        let story = format!("{STEPS}{HOST}");
        Bounded::new("bash", HOST_LIMIT).args(["-c", &story, "demo"]).env("MOONRAIL_BIN", &moonrail).run()?;
    }
    println!("\ndemo: every byte arrived as it was sent; {} s without the build", started.elapsed().as_secs());
    if !in_the_lab {
        println!("demo: over RDMA, on two virtual nodes with two Soft-RoCE NICs each: cargo xtask demo --lab");
    }
    Ok(())
}

fn build() -> Result<PathBuf> {
    println!("demo: building moonrail");
    let features = workspace::test_features()?;
    // Fuzz targets are programs too, of which it needs none, nor the C++ compiler that they want.
    let programs = ["build", "--workspace", "--bins", "--exclude", "moonrail-fuzz"];
    workspace::cargo(BUILD).args(programs).args(features).run()?;
    let moonrail = workspace::target().join("debug/moonrail");
    if moonrail.exists() {
        Ok(moonrail)
    } else {
        let cause = format!("cargo built no {}", moonrail.display());
        Err(Error::new(cause, "run `cargo build -p moonrail-tools` and see what it says"))
    }
}

fn plan(moonrail: &Path) -> lab::Plan {
    let command = ["bash", "-c", &format!("{STEPS}{LAB}"), "demo"].map(str::to_owned).to_vec();
    let mut plan = lab::Plan::new("demo", lab::Topology::of(2, 2), command);
    plan.env = vec![("MOONRAIL_BIN".to_owned(), moonrail.to_string_lossy().into_owned())];
    plan.limit = LAB_LIMIT;
    plan.show = lab::Show::Live;
    plan
}
