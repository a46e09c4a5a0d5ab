//! `cargo xtask bench`: the experiments of benches/, with what they measure beside.

use std::path::Path;
use std::time::Duration;

use crate::error::{At, Result};
use crate::process::Bounded;
use crate::{lab, peers, setup, workspace};

const BUILD: Duration = Duration::from_secs(1200);
/// The longest takes some twenty minutes.
const RUN: Duration = Duration::from_secs(3600);

/// Builds in the release profile and runs one experiment; `more` are its own arguments.
pub(crate) fn run(experiment: &str, more: &[String]) -> Result<()> {
    setup::require()?;
    let beside: &[_] = match experiment {
        "peers" => &[&peers::MOONCAKE, &peers::NIXL],
        "verbs" => &[&peers::MOONCAKE],
        _ => &[],
    };
    let mut env = Vec::new();
    for peer in beside {
        env.push((peer.variable.to_owned(), peers::require(peer)?.to_string_lossy().into_owned()));
    }
    let packages = ["build", "--release", "-p", "moonrail-benches", "-p", "moonrail-tools", "--bins"];
    workspace::cargo(BUILD).args(packages).run()?;
    let program = workspace::target().join("release/moonrail-benches");
    if experiment == "verbs" {
        return in_the_lab(&program, experiment, more, env);
    }
    let bench = Bounded::new(program, RUN).arg(experiment).args(more);
    env.into_iter().fold(bench, |bench, (name, value)| bench.env(&name, value)).run()
}

/// On one node. What it saves there comes to benches/results.
fn in_the_lab(program: &Path, experiment: &str, more: &[String], env: Vec<(String, String)>) -> Result<()> {
    let mut command = vec![program.to_string_lossy().into_owned(), experiment.to_owned()];
    command.extend_from_slice(more);
    let saves = !more.iter().any(|word| word == "--quick");
    if saves {
        command.extend(["--out", "/lab/shared/results"].map(str::to_owned));
    }
    let out = workspace::target().join("bench-lab");
    let saved = out.join("shared/results");
    let _ = std::fs::remove_dir_all(&out);
    let mut plan = lab::Plan::new(experiment, lab::Topology::of(1, 1), command);
    (plan.env, plan.limit, plan.out, plan.show) = (env, RUN, Some(out), lab::Show::Live);
    lab::run(&plan)?;
    if !saves {
        return Ok(());
    }
    for entry in std::fs::read_dir(&saved).at("read", &saved)? {
        let from = entry.at("read", &saved)?.path();
        let to = workspace::root().join("benches/results").join(from.file_name().unwrap_or_default());
        std::fs::copy(&from, &to).at("copy", &from)?;
        println!("bench: {}", to.display());
    }
    Ok(())
}
