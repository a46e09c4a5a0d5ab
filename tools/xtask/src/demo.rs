//! `cargo xtask demo`: moonrail moving bytes over four rails between two nodes, told step by step.

use std::path::Path;
use std::time::{Duration, Instant};

use crate::error::{Error, Result};
use crate::{lab, setup, workspace};

/// What node 0 and node 1 do; both tell their part.
const STORY: &str = include_str!("../../lab/demo.sh");

const BUILD: Duration = Duration::from_secs(1200);
/// After set-up and build.
const LIMIT: Duration = Duration::from_secs(180);

/// Builds moonrail and shows it in the lab; an error if one byte arrives wrong.
pub(crate) fn run() -> Result<()> {
    setup::require()?;
    println!("demo: building moonrail");
    let features = workspace::lab_features()?;
    workspace::cargo(BUILD).args(["build", "--workspace", "--bins"]).args(features).run()?;
    let moonrail = workspace::target().join("debug/moonrail");
    if !moonrail.exists() {
        let cause = format!("cargo built no {}", moonrail.display());
        return Err(Error::new(cause, "run `cargo build -p moonrail-tools` and see what it says"));
    }
    let started = Instant::now();
    println!("demo: booting two virtual nodes with two Soft-RoCE NICs each, real verbs, in software");
    lab::run(&plan(&moonrail))?;
    println!("demo: every byte arrived as it was sent; {} s from the first boot", started.elapsed().as_secs());
    Ok(())
}

fn plan(moonrail: &Path) -> lab::Plan {
    let command = ["bash", "-c", STORY, "demo"].map(str::to_owned).to_vec();
    let mut plan = lab::Plan::new("demo", lab::Topology::of(2, 2), command);
    plan.env = vec![("MOONRAIL_BIN".to_owned(), moonrail.to_string_lossy().into_owned())];
    plan.limit = LIMIT;
    plan.show = lab::Show::Live;
    plan
}
