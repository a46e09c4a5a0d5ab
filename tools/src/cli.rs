//! The command line.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};
use moonrail::Fabric;

use crate::units::{Sizes, parse_size, parse_sizes, parse_span};

/// Moves bytes between the memory of processes: inspects RDMA NICs, offers memory, and measures transfers.
#[derive(Parser, Debug)]
#[command(
    name = "moonrail",
    version,
    max_term_width = 80,
    after_help = "Examples:\n  moonrail nics\n  moonrail serve --size 1GiB\n  moonrail bench 10.0.0.1:15123 --block 64KiB\n  \
    moonrail doctor 10.0.0.1:15123\n\n\
    Exit status: 0 done, 1 the run failed (the reason is on stderr), 2 wrong usage."
)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The subcommands.
#[derive(Subcommand, Debug)]
pub enum Command {
    /// Show every RDMA NIC: port, MTU, GIDs, which GID is used and why, limits
    Nics(NicsArgs),
    /// Show NUMA nodes, CPUs and NICs, which core would poll which NIC, and the priority matrix
    Topology(TopologyArgs),
    /// Offer memory to other nodes until SIGINT or SIGTERM
    Serve(ServeArgs),
    /// Move blocks to or from another node's memory and measure it
    Bench(Box<BenchArgs>),
    /// Try the whole way to a peer, step by step, and every rail by itself
    Ping(PingArgs),
    /// Find what is wrong with this node, and with its way to a peer, and say what to type
    Doctor(DoctorArgs),
    /// Show what is registered in the metadata store, and take away what is stale
    Segments(SegmentsArgs),
    /// Tell what went wrong on the rails of the engines that run on this host, and what came of it
    Incidents(IncidentsArgs),
    /// Watch a running engine of this host: rails, throughput, what is in flight, how long it takes
    Top(TopArgs),
    /// Print completions for a shell
    Completions(CompletionsArgs),
    /// Print the manual page, or write those of all commands
    Man(ManArgs),
}

/// `moonrail top`
#[derive(Args, Debug)]
#[command(
    after_help = "Keys: q leaves; up, down, space scroll. Without a terminal it prints a page every so often. Queue is the time \
    from submission to being posted, wire from there to being known to be done; quantiles are at most an eighth too high from 1 us \
    to 34 ms, and less than twice as high elsewhere. Reading an engine costs its data cores nothing. MOONRAIL_INSPECT names the folder of the sockets, if it is not the usual \
    one.\n\n\
    Examples:\n  moonrail top\n  moonrail top 4711 --interval 500ms\n  moonrail top 10.0.0.1:15123 --once --json\n\n\
    Exit status: 0 left, 1 there is no such engine, or it has ended, 2 wrong usage."
)]
pub struct TopArgs {
    /// Its process, or its name [default: the only one]
    #[arg(value_name = "PID|NAME")]
    pub engine: Option<String>,
    /// Between two readings, 50ms to an hour
    #[arg(long, short, value_parser = parse_interval, default_value = "1s", value_name = "TIME")]
    pub interval: Duration,
    /// Print what happens in one interval, and end
    #[arg(long)]
    pub once: bool,
    /// Print JSON, one line for each reading; docs/operating.md has the members
    #[arg(long)]
    pub json: bool,
}

fn parse_interval(text: &str) -> Result<Duration, String> {
    let span = parse_span(text)?;
    if (Duration::from_millis(50)..=Duration::from_secs(3600)).contains(&span) {
        return Ok(span);
    }
    Err(format!("{text:?} is not between 50ms and 1h"))
}

/// A shell that completes words.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub enum Shell {
    /// GNU bash
    Bash,
    /// zsh
    Zsh,
    /// fish
    Fish,
}

/// `moonrail completions`
#[derive(Args, Debug)]
#[command(after_help = "Examples:\n  moonrail completions bash > /etc/bash_completion.d/moonrail\n  \
    moonrail completions zsh > /usr/local/share/zsh/site-functions/_moonrail\n  \
    moonrail completions fish > ~/.config/fish/completions/moonrail.fish")]
pub struct CompletionsArgs {
    /// The shell
    #[arg(value_enum)]
    pub shell: Shell,
}

/// `moonrail man`
#[derive(Args, Debug)]
#[command(after_help = "Examples:\n  moonrail man | man -l -\n  moonrail man /usr/local/share/man/man1")]
pub struct ManArgs {
    /// Folder for moonrail.1, moonrail-nics.1 and so on [default: moonrail.1 on stdout]
    #[arg(value_name = "FOLDER")]
    pub folder: Option<PathBuf>,
}

/// `moonrail nics`
#[derive(Args, Debug)]
#[command(after_help = "Examples:\n  moonrail nics\n  moonrail nics --json\n  moonrail nics --watch 5s\n\n\
    Exit status: 0 if at least one NIC can be used, 1 if none can, 2 wrong usage.")]
pub struct NicsArgs {
    /// Print JSON, one object per device and port
    #[arg(long)]
    pub json: bool,
    /// Show it again every so often until SIGINT or SIGTERM
    #[arg(long, value_parser = parse_span, value_name = "TIME", num_args = 0..=1, default_missing_value = "2s")]
    pub watch: Option<Duration>,
}

/// `moonrail topology`
#[derive(Args, Debug)]
#[command(after_help = "It plans the node that `moonrail serve` with the same options would be, and starts none.\n\n\
    Example: moonrail topology --matrix > nics.json; moonrail serve --nic-priority-matrix nics.json")]
pub struct TopologyArgs {
    /// Print JSON
    #[arg(long, conflicts_with = "matrix")]
    pub json: bool,
    /// Print the priority matrix alone
    #[arg(long)]
    pub matrix: bool,
    /// The node.
    #[command(flatten)]
    pub node: NodeArgs,
}

/// `moonrail incidents`
#[derive(Args, Debug)]
#[command(
    max_term_width = 80,
    after_help = "Each engine keeps its last 256 incidents; the engines of this user are read, and root's command reads \
        everybody's. MOONRAIL_INSPECT names the folder of their sockets, if it is not the usual one.\n\n\
        Examples:\n  moonrail incidents\n  moonrail incidents --open --brief --watch 1s\n  \
        moonrail incidents 10.0.0.1:15123 --json\n\n\
        Exit status: 0 every engine asked for was read, 1 one could not be, or none runs, 2 wrong usage."
)]
pub struct IncidentsArgs {
    /// Only engines of this name [default: all of this host]
    #[arg(value_name = "NAME")]
    pub name: Option<String>,
    /// Only engines of this process
    #[arg(long, value_name = "PID")]
    pub pid: Option<u32>,
    /// Only incidents that are not over
    #[arg(long)]
    pub open: bool,
    /// One line per incident
    #[arg(long, conflicts_with = "json")]
    pub brief: bool,
    /// Print JSON; docs/operating.md has the members
    #[arg(long)]
    pub json: bool,
    /// Show it again every so often until SIGINT or SIGTERM
    #[arg(long, value_parser = parse_span, value_name = "TIME", num_args = 0..=1, default_missing_value = "2s")]
    pub watch: Option<Duration>,
}

/// How a core waits.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub enum Poll {
    /// Poll, and sleep when there is nothing to do
    Adaptive,
    /// Poll without pause: one processor each, lowest latency
    Busy,
}

/// What carries the bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub enum FabricWord {
    /// Shared memory, between processes of one host
    Shm,
    /// RDMA NICs
    Rdma,
    /// Mooncake's TCP data protocol
    Tcp,
}

impl From<FabricWord> for Fabric {
    fn from(word: FabricWord) -> Self {
        match word {
            FabricWord::Shm => Self::Shm,
            FabricWord::Rdma => Self::Rdma,
            FabricWord::Tcp => Self::Tcp,
        }
    }
}

/// What makes this process a node; the same for `serve` and `bench`.
#[derive(Args, Debug, Clone)]
#[command(next_help_heading = "This node")]
pub struct NodeArgs {
    /// Where nodes find each other: P2PHANDSHAKE (no server), etcd://HOST:PORT[,HOST:PORT…] or http://HOST:PORT/metadata
    #[arg(long, default_value = "P2PHANDSHAKE", value_name = "URI")]
    pub metadata: String,
    /// Name or address of this node, as other nodes can reach it [default: chosen from the interfaces]
    #[arg(long, value_name = "HOST[:PORT]")]
    pub name: Option<String>,
    /// RDMA NICs to use, or `auto` for all that can be used
    #[arg(long, value_delimiter = ',', default_value = "auto", value_name = "NIC,…")]
    pub nics: Vec<String>,
    /// File with a NIC priority matrix: {"cpu:0": [["preferred", …], ["other", …]]}
    #[arg(long, value_name = "FILE", conflicts_with = "nics")]
    pub nic_priority_matrix: Option<PathBuf>,
    /// Fabrics this node has at all [default: shm, rdma, and tcp where there is no RDMA NIC]
    #[arg(long, value_enum, value_delimiter = ',', value_name = "FABRIC,…")]
    pub fabrics: Vec<FabricWord>,
    /// Move bytes over this fabric, or fail and say why
    #[arg(long, value_enum, value_name = "FABRIC", conflicts_with = "prefer")]
    pub require: Option<FabricWord>,
    /// Move bytes over this fabric where it works [default: shm on one host, else rdma, else tcp]
    #[arg(long, value_enum, value_name = "FABRIC")]
    pub prefer: Option<FabricWord>,
    /// Polling threads [default: processors - 1]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=64))]
    pub cores: Option<u16>,
    /// How a polling thread waits
    #[arg(long, value_enum, default_value = "adaptive")]
    pub poll: Poll,
    /// TCP port for handshakes [default: the one in --name, else a free one]
    #[arg(long, value_name = "PORT", value_parser = clap::value_parser!(u16).range(1..))]
    pub port: Option<u16>,
}

/// `moonrail serve`
#[derive(Args, Debug)]
#[command(after_help = "Examples:\n  moonrail serve\n  \
    moonrail serve --metadata etcd://10.0.0.1:2379 --name 10.0.0.2:12345 --size 1GiB\n  \
    moonrail serve --buffers 2 --verify --metrics 127.0.0.1:9477\n\n\
    Exit status: 0 stopped by a signal, 1 the run failed (the reason is on stderr), 2 wrong usage.")]
pub struct ServeArgs {
    /// Bytes of each buffer
    #[arg(long, default_value = "64MiB", value_parser = parse_size)]
    pub size: u64,
    /// Buffers to offer
    #[arg(long, default_value_t = 1, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub buffers: u16,
    /// Let `bench --verify` have its pattern checked and filled here, in the memory itself
    #[arg(long)]
    pub verify: bool,
    /// Print name and buffers as JSON instead of `listening on …`
    #[arg(long)]
    pub json: bool,
    /// Offer http://ADDR/metrics for Prometheus, to whoever reaches it; port 0 takes a free one
    #[arg(long, value_name = "ADDR:PORT")]
    pub metrics: Option<SocketAddr>,
    /// This node.
    #[command(flatten)]
    pub node: NodeArgs,
}

/// Direction of a measurement.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub enum Operation {
    /// The other node's memory to ours
    Read,
    /// Our memory to the other node's
    Write,
    /// First WRITE, then READ
    Both,
}

/// `moonrail bench`
#[derive(Args, Debug)]
#[command(after_help = "With --mode=initiator or --mode=target this command stands in for Mooncake's \
    transfer_engine_bench: its flags, defaults and syntax (moonrail bench --mode=target --help lists them).\n\n\
    Every combination of --op, --block, --batch and --threads is one measurement. --rail measures one pair of NICs and nothing \
    else, as ib_write_bw does.\n\n\
    Examples:\n  moonrail bench 10.0.0.1:15123\n  \
    moonrail bench 10.0.0.1:15123 --op both --block 4KiB..4MiB --duration 2s --plot\n  \
    moonrail bench 10.0.0.1:15123 --block 64B..64KiB --batch 1,16 --threads 1,4 --csv\n  \
    moonrail bench 10.0.0.1:15123 --rail mlx5_0=mlx5_1 --block 1MiB --svg rail.svg\n\n\
    Exit status: 0 done, 1 the run failed or a byte was wrong, 2 wrong usage (1 with --mode, as that program).")]
pub struct BenchArgs {
    /// Segment to open: the name a node was given, or HOST:PORT of one without a metadata server
    #[arg(value_name = "SEGMENT|HOST:PORT")]
    pub segment: String,
    /// What to measure
    #[arg(long, value_enum, default_value = "write")]
    pub op: Operation,
    /// Bytes of a block, one measurement each; FROM..TO doubles
    #[arg(long, value_delimiter = ',', default_value = "64KiB", value_parser = parse_sizes, value_name = "SIZE,…")]
    pub block: Vec<Sizes>,
    /// Blocks submitted together
    #[arg(long, value_delimiter = ',', default_value = "16", value_name = "N,…", value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub batch: Vec<u32>,
    /// Threads that submit
    #[arg(long, value_delimiter = ',', default_value = "1", value_name = "N,…", value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub threads: Vec<u32>,
    /// How long each measurement takes [default: 10s]
    #[arg(long, value_parser = parse_span, value_name = "TIME", conflicts_with = "iterations")]
    pub duration: Option<Duration>,
    /// Batches of each thread in each measurement, instead of a time
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub iterations: Option<u64>,
    /// Check every byte that was moved; one wrong byte fails the run
    #[arg(long)]
    pub verify: bool,
    /// With --verify: have the other node (`serve --verify`) fill and check its own memory, too
    #[arg(long, requires = "verify")]
    pub ask_target: bool,
    /// Bytes between the blocks of a batch; more than a block keeps them from being merged into one request
    #[arg(long, value_parser = parse_size, value_name = "SIZE")]
    pub stride: Option<u64>,
    /// First buffer of the other node to use
    #[arg(long, default_value_t = 0, value_name = "N")]
    pub buffer: usize,
    /// Longest time a batch may take, at least 5s
    #[arg(long, value_parser = parse_span, default_value = "30s", value_name = "TIME")]
    pub timeout: Duration,
    /// One rail alone: our NIC and the peer's, or `shm`, or `tcp`
    #[arg(long, value_name = "NIC=PEER_NIC", conflicts_with_all = ["nics", "nic_priority_matrix", "fabrics", "require", "prefer"])]
    pub rail: Option<String>,
    /// Print JSON instead of tables
    #[arg(long)]
    pub json: bool,
    /// Print comma-separated values instead of tables: a line per measurement
    #[arg(long, conflicts_with = "json")]
    pub csv: bool,
    /// Plot throughput and latency over the block size below the tables
    #[arg(long, conflicts_with_all = ["json", "csv"])]
    pub plot: bool,
    /// Write that plot as SVG, too
    #[arg(long, value_name = "FILE")]
    pub svg: Option<PathBuf>,
    /// Offer http://ADDR/metrics for Prometheus, to whoever reaches it; port 0 takes a free one
    #[arg(long, value_name = "ADDR:PORT")]
    pub metrics: Option<SocketAddr>,
    /// This node.
    #[command(flatten)]
    pub node: NodeArgs,
}

/// `moonrail ping`
#[derive(Args, Debug)]
#[command(
    after_help = "Steps: metadata, name, TCP, engine, segment, handshake; then for each pair of NICs the latency of one \
    transfer after the other, and a matrix of them. It reads the peer's memory; with --write it writes back what it has read, which \
    undoes what the peer itself changes there meanwhile.\n\n\
    Example: moonrail ping 10.0.0.1:15123 --count 1000 --size 64\n\n\
    Exit status: 0 a rail works, 1 none does (the step that failed says why), 2 wrong usage."
)]
pub struct PingArgs {
    /// The peer: its segment name, or HOST:PORT without a metadata server
    #[arg(value_name = "SEGMENT|HOST:PORT")]
    pub peer: String,
    /// Transfers over each rail
    #[arg(long, short = 'c', default_value_t = 100, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=1_000_000))]
    pub count: u64,
    /// Bytes of each
    #[arg(long, short, default_value = "64B", value_parser = parse_size)]
    pub size: u64,
    /// Measure WRITEs, too
    #[arg(long)]
    pub write: bool,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
    /// This node.
    #[command(flatten)]
    pub node: NodeArgs,
}

/// `moonrail doctor`
#[derive(Args, Debug)]
#[command(
    after_help = "Give it the options of the node that does not work: it looks at what those would do. It moves nothing \
    and leaves nothing behind; towards a peer it connects as a node of its own name.\n\n\
    Examples:\n  moonrail doctor\n  moonrail doctor --metadata etcd://10.0.0.1:2379 --name 10.0.0.2:12345\n  \
    moonrail doctor 10.0.0.1:15123 --require rdma\n\n\
    Exit status: 0 nothing is wrong, 3 warnings, 1 something cannot work, 2 wrong usage."
)]
pub struct DoctorArgs {
    /// A peer to try the way to: its segment name, or HOST:PORT without a metadata server
    #[arg(value_name = "SEGMENT|HOST:PORT")]
    pub peer: Option<String>,
    /// Bytes that the node will register
    #[arg(long, default_value = "64MiB", value_parser = parse_size)]
    pub size: u64,
    /// Print JSON: worst, and of each check its name, subject, verdict, evidence and next step
    #[arg(long)]
    pub json: bool,
    /// The node.
    #[command(flatten)]
    pub node: NodeArgs,
}

/// `moonrail segments`
#[derive(Args, Debug)]
#[command(after_help = "Examples:\n  moonrail segments ls --metadata etcd://10.0.0.1:2379\n  \
    moonrail segments prune --metadata etcd://10.0.0.1:2379 --yes\n\n\
    Exit status: 0 done, 1 the run failed (the reason is on stderr), 2 wrong usage.")]
pub struct SegmentsArgs {
    /// What to do with them.
    #[command(subcommand)]
    pub command: SegmentsCommand,
}

/// The subcommands of `moonrail segments`.
#[derive(Subcommand, Debug)]
pub enum SegmentsCommand {
    /// List them: node alive or stale, engine, fabrics, NICs, memory, lease
    Ls(LsArgs),
    /// Show everything about one
    Show(ShowArgs),
    /// Show the stale ones and, with --yes, delete exactly those
    Prune(PruneArgs),
}

/// Which store, which cluster.
#[derive(Args, Debug, Clone)]
pub struct StoreArgs {
    /// The store: etcd://HOST:PORT[,HOST:PORT…] or http://HOST:PORT/metadata
    #[arg(long, value_name = "URI")]
    pub metadata: String,
    /// The cluster, as its nodes name it
    #[arg(long, env = "MC_METADATA_CLUSTER_ID", hide_env_values = true, default_value = "", value_name = "ID")]
    pub cluster_id: String,
}

/// `moonrail segments ls`
#[derive(Args, Debug)]
#[command(after_help = "Example: moonrail segments ls --metadata etcd://10.0.0.1:2379")]
pub struct LsArgs {
    /// These only; needed with an HTTP metadata server, which lists nothing
    #[arg(value_name = "NAME")]
    pub names: Vec<String>,
    /// Do not ask the nodes whether they are alive
    #[arg(long)]
    pub no_probe: bool,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
    /// The store.
    #[command(flatten)]
    pub store: StoreArgs,
}

/// `moonrail segments show`
#[derive(Args, Debug)]
#[command(after_help = "Example: moonrail segments show 10.0.0.1:12345 --metadata etcd://10.0.0.1:2379")]
pub struct ShowArgs {
    /// Which
    #[arg(value_name = "NAME")]
    pub name: String,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
    /// The store.
    #[command(flatten)]
    pub store: StoreArgs,
}

/// `moonrail segments prune`
#[derive(Args, Debug)]
#[command(
    after_help = "Stale is a segment whose handshake port refuses connections. A key that was written or deleted \
    after it was shown is left alone.\n\nExample: moonrail segments prune --metadata etcd://10.0.0.1:2379"
)]
pub struct PruneArgs {
    /// These only
    #[arg(value_name = "NAME")]
    pub names: Vec<String>,
    /// Those that give no answer at all, too: dead hosts, but also hosts behind a firewall
    #[arg(long)]
    pub silent: bool,
    /// Delete what is shown
    #[arg(long)]
    pub yes: bool,
    /// The store.
    #[command(flatten)]
    pub store: StoreArgs,
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    /// Command lines that a help text shows.
    fn examples(help: &str) -> Vec<Vec<String>> {
        let lines = help.lines().skip_while(|line| !line.contains("Example")).take_while(|line| !line.is_empty());
        let commands = lines.flat_map(|line| line.split(['>', '|', ';']).map(str::to_owned).collect::<Vec<_>>());
        let words = |command: String| command.split_whitespace().map(str::to_owned).collect::<Vec<_>>();
        let bare = |words: Vec<String>| words.into_iter().skip_while(|word| word != "moonrail").collect::<Vec<_>>();
        commands.map(words).map(bare).filter(|words| !words.is_empty()).collect()
    }

    fn check_examples(command: &clap::Command, path: &[&str]) {
        let help = command.get_after_help().map(ToString::to_string).unwrap_or_default();
        let examples = examples(&help);
        let own =
            |words: &Vec<String>| words.iter().zip(path).all(|(word, of)| word == of) && words.len() >= path.len();
        assert!(examples.iter().any(own), "{path:?} has no example of its own:\n{help}");
        for words in examples {
            let parsed = Cli::try_parse_from(&words);
            assert!(parsed.is_ok(), "{words:?}: {}", parsed.unwrap_err());
        }
        for sub in command.get_subcommands() {
            check_examples(sub, &[path, &[sub.get_name()]].concat());
        }
    }

    #[test]
    fn every_command_has_an_example_and_every_example_is_understood() {
        check_examples(&Cli::command(), &["moonrail"]);
        let [one, two] = &examples("x\n\nExample: moonrail a > b; moonrail c\n\nmoonrail d")[..] else { panic!() };
        assert_eq!((one.join(" "), two.join(" ")), ("moonrail a".into(), "moonrail c".into()));
    }

    #[test]
    fn the_command_line_is_well_formed() {
        Cli::command().debug_assert();
    }
}
