//! `cargo xtask bench`: the experiments of benches/, with what they measure beside.

use std::time::Duration;

use crate::error::Result;
use crate::process::Bounded;
use crate::{peers, setup, workspace};

const BUILD: Duration = Duration::from_secs(1200);
/// The longest takes some twenty minutes.
const RUN: Duration = Duration::from_secs(3600);

/// Builds in the release profile and runs one experiment; `more` are its own arguments.
pub(crate) fn run(experiment: &str, more: &[String]) -> Result<()> {
    setup::require()?;
    let mut envs = Vec::new();
    if experiment == "peers" {
        for peer in [&peers::MOONCAKE, &peers::NIXL] {
            envs.push((peer.variable, peers::require(peer)?));
        }
    }
    let packages = ["build", "--release", "-p", "moonrail-benches", "-p", "moonrail-tools", "--bins"];
    workspace::cargo(BUILD).args(packages).run()?;
    let mut bench = Bounded::new(workspace::target().join("release/moonrail-benches"), RUN).arg(experiment).args(more);
    for (variable, folder) in envs {
        bench = bench.env(variable, folder);
    }
    bench.run()
}
