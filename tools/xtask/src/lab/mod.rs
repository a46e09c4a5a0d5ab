//! The RDMA lab: virtual nodes with Soft-RoCE NICs on a machine that has no RDMA at all.
//!
//! ```text
//!   image ──▶ kernel + initial ram disk, made once            script ──▶ /lab/command, what the nodes run
//!                       │                                                    │
//!   node 0 (QEMU, also the switch) ── unix sockets ── node 1 … node N-1      │ one folder, seen by all: /lab
//!                       └──────────────── watch: output, faults, limits ─────┘
//! ```
//! The files that run inside a node are in `tools/lab/`; `docs/testing.md` is the user's view.

mod cpio;
mod folder;
mod image;
mod node;
mod script;
mod watch;

use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::error::{Error, Result};

/// How many nodes, and what each has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Topology {
    pub(crate) nodes: u32,
    pub(crate) nics: u32,
    pub(crate) cpus: u32,
    pub(crate) mem_mib: u32,
    /// One network per NIC instead of one for all.
    pub(crate) split: bool,
}

impl Topology {
    /// `nodes` × `nics` with the usual processors and memory.
    pub(crate) fn of(nodes: u32, nics: u32) -> Self {
        Self { nodes, nics, cpus: 2, mem_mib: 2048, split: false }
    }

    fn check(&self) -> Result<()> {
        let ranges = [
            ("--nodes", self.nodes, 1, 16),
            ("--nics", self.nics, 1, 8),
            ("--cpus", self.cpus, 1, 64),
            ("--mem", self.mem_mib, 512, 1 << 20),
        ];
        for (name, value, low, high) in ranges {
            if !(low..=high).contains(&value) {
                return Err(Error::new(format!("{name} {value} is out of range"), format!("choose {low} to {high}")));
            }
        }
        Ok(())
    }
}

/// What is shown of the nodes' output.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Show {
    /// Every line as it comes, with the node's name before it.
    Live,
    /// Nothing while it runs; the end of every log when a node fails.
    OnFailure,
}

/// One run of the lab.
#[derive(Debug)]
pub(crate) struct Plan {
    /// Part of the name of the folder with the logs.
    pub(crate) label: String,
    pub(crate) topology: Topology,
    /// Program and arguments, run on every node.
    pub(crate) command: Vec<String>,
    /// The folder to run it in; the current one if none is named.
    pub(crate) from: Option<PathBuf>,
    /// Set in the nodes, beside NODE, NODES, NICS and MOONRAIL_LAB.
    pub(crate) env: Vec<(String, String)>,
    /// How long the command may take once all nodes are up.
    pub(crate) limit: Duration,
    /// Where logs go, and stay; otherwise a folder of this run under the target folder, deleted on success.
    pub(crate) out: Option<PathBuf>,
    pub(crate) keep: bool,
    pub(crate) show: Show,
}

impl Plan {
    /// A plan with the usual limit that shows output on failure only.
    pub(crate) fn new(label: &str, topology: Topology, command: Vec<String>) -> Self {
        Self {
            label: label.to_owned(),
            topology,
            command,
            from: None,
            env: Vec::new(),
            limit: Duration::from_secs(300),
            out: None,
            keep: false,
            show: Show::OnFailure,
        }
    }
}

/// What a successful run leaves: each node's output, node 0 first.
pub(crate) type Logs = Vec<String>;

/// Boots the nodes, runs the command on all of them, and ends them. An error unless it returned 0 on every node.
pub(crate) fn run(plan: &Plan) -> Result<Logs> {
    plan.topology.check()?;
    let image = image::prepare()?;
    let folder = folder::RunFolder::create(&plan.label, plan.out.as_deref(), plan.topology.nodes)?;
    script::write(&folder, plan)?;
    let ended = watch::run(plan, &image, &folder).and_then(|()| folder.logs());
    folder.finish(ended, plan.keep)
}

/// Boots the nodes and gives the terminal to a shell on node 0; the others stand by.
pub(crate) fn shell(topology: Topology, out: Option<&Path>) -> Result<()> {
    topology.check()?;
    let image = image::prepare()?;
    let folder = folder::RunFolder::create("shell", out, topology.nodes)?;
    script::write_shell(&folder)?;
    let ended = watch::shell(topology, &image, &folder);
    folder.finish(ended, false)
}
