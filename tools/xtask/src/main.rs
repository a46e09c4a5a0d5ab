//! `cargo xtask`: sets a machine up, tests and checks moonrail, and boots the RDMA lab.

mod bench;
mod check;
mod demo;
mod docs;
mod error;
mod lab;
mod mutants;
mod peers;
mod process;
mod setup;
mod sim;
mod soak;
mod test;
mod workspace;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};

#[derive(Parser)]
#[command(name = "cargo xtask", about = "Sets up, tests, checks and shows moonrail")]
struct Cli {
    #[command(subcommand)]
    activity: Activity,
}

#[derive(Subcommand)]
enum Activity {
    /// Install the Debian packages that the build and the tests need, only those that are missing, and a stock Mooncake
    /// engine in a folder of its own
    Setup,
    /// Run the tests, all parts or only the named ones
    Test {
        /// Parts to run, in the order build, check, host, sim, interop, lab
        #[arg(value_enum)]
        parts: Vec<test::Part>,
    },
    /// Run what takes hours, at its full counts, and write what was seen into docs/soak.md; all parts or only the named ones
    Soak {
        /// Parts to run, in the order seeds, faults, late, mix, cycles
        #[arg(value_enum)]
        parts: Vec<soak::Part>,
    },
    /// Run an experiment of benches/ and save its JSON under benches/results: handoff, host, instructions, or peers, which
    /// first installs the engines that ours is measured beside; page writes the tables of docs/performance.md from them
    Bench {
        /// Which one
        #[arg(value_parser = ["control", "handoff", "host", "instructions", "peers", "verbs", "page"])]
        experiment: String,
        /// Its own arguments, as --quick
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        more: Vec<String>,
    },
    /// Format, lints, the direction of dependencies, where unsafe code may live, the top level of the repository, links and
    /// quoted messages of the documentation
    Check,
    /// Make docs/ a book, with mdBook (built first if it is missing: a minute or two), in target/book
    Docs,
    /// Run many seeds through every simulation
    Sim {
        /// Seeds for each seeded test
        #[arg(long)]
        seeds: u64,
        /// The first of them; by the clock if it is not given
        #[arg(long)]
        from: Option<u64>,
        /// Processes at a time; one per processor if it is not given
        #[arg(long)]
        jobs: Option<usize>,
    },
    /// Switch the engine's rules off, one at a time in a copy of the source: a test must notice each
    Mutants {
        /// Which ones; all when none is named
        names: Vec<String>,
        /// Only print what there is
        #[arg(long)]
        list: bool,
    },
    /// Show moonrail moving bytes between two processes of this machine, step by step
    Demo {
        /// Between two lab nodes instead, over RDMA with two NICs each
        #[arg(long)]
        lab: bool,
    },
    /// Run a command on virtual nodes with Soft-RoCE NICs; without a command, open a shell on node 0
    Lab(LabArgs),
}

#[derive(Args)]
struct LabArgs {
    /// Nodes to boot
    #[arg(short, long, default_value_t = 2)]
    nodes: u32,
    /// RDMA NICs of each node
    #[arg(short = 'm', long, default_value_t = 2)]
    nics: u32,
    /// Virtual processors of each node
    #[arg(long, default_value_t = 2)]
    cpus: u32,
    /// Memory of each node in MiB
    #[arg(long, default_value_t = 2048)]
    mem: u32,
    /// Seconds the command may take, counted from when all nodes are up; a shell has no limit
    #[arg(long, default_value_t = 300)]
    limit: u64,
    /// One network per NIC instead of one for all: the cross rails connect, then carry nothing
    #[arg(long)]
    split: bool,
    /// Keep the logs, and the folder the nodes share, in this folder
    #[arg(long)]
    out: Option<PathBuf>,
    /// Keep the logs of a successful run too
    #[arg(long)]
    keep: bool,
    /// The command, run on every node from the current folder
    #[arg(last = true)]
    command: Vec<String>,
}

impl LabArgs {
    fn topology(&self) -> lab::Topology {
        let Self { nodes, nics, cpus, mem, split, .. } = *self;
        lab::Topology { nodes, nics, cpus, mem_mib: mem, split }
    }
}

fn main() -> ExitCode {
    let done = match Cli::parse().activity {
        Activity::Setup => setup::run(),
        Activity::Test { parts } => test::run(&parts),
        Activity::Soak { parts } => soak::run(&parts),
        Activity::Bench { experiment, more } => bench::run(&experiment, &more),
        Activity::Check => check::run(),
        Activity::Docs => docs::book::run(),
        Activity::Sim { seeds, from, jobs } => sim::run(&sim::Plan { seeds, from, jobs, limit: None }).map(|_| ()),
        Activity::Mutants { list: true, .. } => {
            mutants::list();
            Ok(())
        }
        Activity::Mutants { names, .. } => mutants::run(&names),
        Activity::Demo { lab } => demo::run(lab),
        Activity::Lab(args) => run_lab(args),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("error: {e}");
            ExitCode::FAILURE
        }
    }
}

fn run_lab(args: LabArgs) -> error::Result<()> {
    setup::require()?;
    let topology = args.topology();
    if args.command.is_empty() {
        return lab::shell(topology, args.out.as_deref());
    }
    let mut plan = lab::Plan::new("lab", topology, args.command);
    plan.limit = std::time::Duration::from_secs(args.limit);
    plan.out = args.out;
    plan.keep = args.keep;
    plan.show = lab::Show::Live;
    lab::run(&plan).map(|_| ())
}
