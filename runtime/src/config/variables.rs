//! The table of environment variables: the one place that says what each takes and what it does here.

use super::parse::Class;

/// What values a variable takes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Values {
    /// Integers, both ends included.
    Integers(i64, i64),
    /// One of these words.
    Words(&'static [&'static str]),
    /// What the words say.
    Text(&'static str),
}

/// What a variable does in this engine.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Here {
    /// It is this option of [`crate::EngineBuilder`].
    Option(&'static str),
    /// Nothing; why not, or what stands in for it.
    Nothing(&'static str),
}

/// An environment variable of Mooncake.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Variable {
    /// Its name.
    pub name: &'static str,
    /// How its text is read.
    pub class: Class,
    /// What holds without it.
    pub default: &'static str,
    /// What it takes.
    pub values: Values,
    /// What it means.
    pub meaning: &'static str,
    /// What it does here.
    pub here: Here,
}

use Class::{Atoi, Bool, Exact, Presence, Stoi, Text};
use Values::{Integers, Words};

const fn option(
    name: &'static str,
    class: Class,
    default: &'static str,
    values: Values,
    option: &'static str,
    meaning: &'static str,
) -> Variable {
    Variable { name, class, default, values, meaning, here: Here::Option(option) }
}

const fn nothing(name: &'static str, why: &'static str) -> Variable {
    Variable {
        name,
        class: Text,
        default: "-",
        values: Values::Text("anything"),
        meaning: "(without meaning here)",
        here: Here::Nothing(why),
    }
}

const ANY: Values = Values::Text("anything, even empty");
const ONE_CQ: &str = "a data core has one completion queue per NIC";
const NO_TENT: &str = "there is one engine here";
const NO_GPU: &str = "memory is host memory here";
const NO_EFA: &str = "EFA NICs are not supported";
const NO_REDIS: &str = "redis is not supported; use etcd, http or P2PHANDSHAKE";
const NO_ADMISSION: &str = "slices wait with their batch, and a full ring makes submit answer busy";
const NO_TWO_SIDED: &str = "transfers are one-sided; notifications go over the handshake port";
const NO_TRACK: &str = "incidents tell which work request failed, how old it was and what followed";

/// Every variable of Mooncake's engine, and what it does here.
pub const VARIABLES: &[Variable] = &[
    option("MC_IB_PORT", Atoi, "1", Integers(1, 255), "ib_port", "Port of every RDMA device"),
    option("MC_GID_INDEX", Atoi, "by rule", Integers(0, 255), "gid_index", "Entry of the port's GID table"),
    option("NCCL_IB_GID_INDEX", Atoi, "by rule", Integers(0, 255), "gid_index", "As MC_GID_INDEX, where that is unset"),
    option("MC_PKEY_INDEX", Stoi, "0", Integers(0, 65_535), "pkey_index", "Entry of the port's partition table"),
    option(
        "MC_MTU",
        Atoi,
        "4096",
        Words(&["512", "1024", "2048", "4096"]),
        "mtu",
        "Upper bound of the path MTU, bytes",
    ),
    option(
        "MC_NUM_QP_PER_EP",
        Atoi,
        "2",
        Integers(1, 8),
        "qps_per_rail",
        "Queue pairs per rail; stock peers must have the same",
    ),
    option(
        "MC_MAX_EP_PER_CTX",
        Atoi,
        "as many as devices and cores have room for",
        Integers(1, 65_535),
        "rails_per_nic",
        "Rails an RDMA or TCP NIC keeps; of more, idle ones are evicted until they are used again",
    ),
    option(
        "MC_ENDPOINT_STORE_TYPE",
        Text,
        "SIEVE",
        Words(&["FIFO", "SIEVE"]),
        "eviction",
        "Which goes first: the rail used least recently (SIEVE), or the one connected first (FIFO)",
    ),
    option(
        "MC_MAX_WR",
        Atoi,
        "256",
        Integers(1, 65_535),
        "max_wr",
        "Send-queue entries per queue pair, lowered to the device's limit",
    ),
    option(
        "MC_MAX_SGE",
        Atoi,
        "4",
        Integers(1, 65_535),
        "max_sge",
        "Gather entries per work request, lowered to the device's limit",
    ),
    option(
        "MC_MAX_INLINE",
        Atoi,
        "64",
        Integers(0, 65_535),
        "max_inline",
        "Largest WRITE carried inside its work request, bytes",
    ),
    option(
        "MC_MAX_CQE_PER_CTX",
        Atoi,
        "4096",
        Integers(1, 65_535),
        "cq_depth",
        "Completion-queue entries per core and NIC, lowered to the device's limit",
    ),
    option("MC_IB_TC", Stoi, "0", Integers(0, 255), "traffic_class", "Traffic class (DSCP and ECN) of packets"),
    option("MC_IB_SL", Stoi, "0", Integers(0, 15), "service_level", "Service level of packets"),
    option(
        "MC_IB_PCI_RELAXED_ORDERING",
        Atoi,
        "1",
        Integers(0, 2),
        "relaxed_ordering",
        "PCI relaxed ordering of registered memory: 0 off, else on where known",
    ),
    option("MC_SLICE_SIZE", Atoi, "65536", Integers(1, 1 << 30), "slice_size", "Bytes per slice"),
    option(
        "MC_FRAGMENT_RATIO",
        Atoi,
        "remainder of 16384",
        Integers(1, (1 << 30) - 1),
        "fragment_ratio",
        "A remainder up to slice size / ratio is not cut off; must be below the slice size",
    ),
    option(
        "MC_MAX_MR_SIZE",
        Atoi,
        "1099511627776",
        Integers(1, i64::MAX),
        "max_mr_size",
        "Largest piece registered at once, bytes",
    ),
    option("MC_RETRY_CNT", Atoi, "9", Integers(1, 127), "retries", "Retries of a slice after failures of its own"),
    option(
        "MC_TRANSFER_TIMEOUT",
        Stoi,
        "30",
        Integers(5, 86_400),
        "transfer_timeout",
        "Seconds until a batch is ended, plus 1 ns per byte",
    ),
    option("MC_HANDSHAKE_PORT", Atoi, "12001", Integers(1, 65_535), "handshake_port", "Port of names that have none"),
    option(
        "MC_HANDSHAKE_LISTEN_BACKLOG",
        Stoi,
        "4096",
        Integers(1, 65_535),
        "handshake_backlog",
        "Connections the kernel keeps while the control thread is busy",
    ),
    option(
        "MC_HANDSHAKE_CONNECT_TIMEOUT",
        Atoi,
        "5",
        Integers(1, 3_599),
        "handshake_connect_timeout",
        "Seconds for a connection to a peer's handshake port",
    ),
    option(
        "MC_HANDSHAKE_MAX_LENGTH",
        Exact,
        "1048576",
        Integers(1 << 20, 128 << 20),
        "handshake_max_length",
        "Largest handshake message, bytes",
    ),
    option(
        "MC_MIN_RPC_PORT",
        Atoi,
        "15000",
        Integers(1024, 65_535),
        "rpc_ports",
        "First port of the range the handshake server picks from, outside 32768-60999",
    ),
    option("MC_MAX_RPC_PORT", Atoi, "17000", Integers(1024, 65_535), "rpc_ports", "Last port of that range"),
    option(
        "MC_MIN_PRC_PORT",
        Atoi,
        "15000",
        Integers(1024, 65_535),
        "rpc_ports",
        "Old spelling of MC_MIN_RPC_PORT, where that is unset",
    ),
    option(
        "MC_MAX_PRC_PORT",
        Atoi,
        "17000",
        Integers(1024, 65_535),
        "rpc_ports",
        "Old spelling of MC_MAX_RPC_PORT, where that is unset",
    ),
    option(
        "MC_LEGACY_RPC_PORT_BINDING",
        Presence,
        "off",
        ANY,
        "rpc_port_from_name",
        "Listen on the port of the node's name instead of one of a range",
    ),
    option(
        "MC_TCP_BIND_ADDRESS",
        Text,
        "by rule",
        Values::Text("host or address"),
        "publish_host",
        "Host that peers are told to dial",
    ),
    option("MC_USE_IPV6", Presence, "off", ANY, "ipv6", "IPv6 only, for names, listening and dialling"),
    option("MC_METADATA_CLUSTER_ID", Text, "none", Values::Text("text"), "cluster_id", "Prefix of every metadata key"),
    option("MC_DISABLE_METACACHE", Presence, "off", ANY, "metadata_cache", "Fetch a peer's descriptor at every open"),
    option(
        "MC_CUSTOM_TOPO_JSON",
        Text,
        "discovery",
        Values::Text("file name"),
        "nic_priority_matrix_file",
        "NIC priority matrix",
    ),
    option("MC_FORCE_TCP", Presence, "off", ANY, "fabrics", "TCP only"),
    option("MC_FORCE_HCA", Presence, "off", ANY, "require", "RDMA or nothing"),
    option("MC_TCP_LANES_PER_PEER", Atoi, "4", Integers(1, 16), "tcp_lanes", "Connections per peer over TCP"),
    option(
        "MC_TCP_MAX_CONNECTIONS_PER_PEER",
        Atoi,
        "4",
        Integers(1, 16),
        "tcp_lanes",
        "Old name of MC_TCP_LANES_PER_PEER, where that is unset",
    ),
    option(
        "MC_TCP_PROTO",
        Text,
        "2",
        Values::Text("1"),
        "tcp_v1",
        "1: version 1 of the TCP protocol towards stock peers",
    ),
    option(
        "MC_TCP_STATUS_TIMEOUT_SEC",
        Atoi,
        "30",
        Integers(1, 3600),
        "tcp_status_timeout",
        "Seconds for the peer's status of a request",
    ),
    option(
        "MC_TCP_PROGRESS_TIMEOUT_SEC",
        Atoi,
        "30",
        Integers(1, 3600),
        "tcp_progress_timeout",
        "Seconds without a byte of progress until a connection is ended",
    ),
    option("MC_TE_FILTERS", Text, "all", Values::Text("comma list"), "nic_filter", "NICs to keep of those found"),
    option(
        "MC_ENABLE_DEST_DEVICE_AFFINITY",
        Presence,
        "off",
        ANY,
        "same_name_only",
        "Use only the peer's NIC of the same name, where it has one",
    ),
    option(
        "MC_ENABLE_HCA_PEER_AFFINITY",
        Bool,
        "0",
        Words(&["0", "1", "true", "false"]),
        "peer_affinity",
        "Switches MC_NIC_PEER_AFFINITY on",
    ),
    option(
        "MC_NIC_PEER_AFFINITY",
        Text,
        "none",
        Values::Text("l=p,p;l=p"),
        "peer_affinity",
        "Peer NICs to use with a local one",
    ),
    option(
        "MC_LOG_LEVEL",
        Text,
        "INFO",
        Words(&["TRACE", "INFO", "WARNING", "ERROR"]),
        "log_level",
        "Log threshold; an unknown word is INFO",
    ),
    option("MC_LOG_DIR", Text, "stderr", Values::Text("writable folder"), "log_dir", "Folder for the log file"),
    option(
        "MC_TE_METRIC",
        Text,
        "off",
        Words(&["1", "true", "yes", "on"]),
        "metrics",
        "Log the throughput from time to time",
    ),
    option("MC_TE_METRIC_INTERVAL_SECONDS", Stoi, "5", Integers(1, 86_400), "metrics", "Seconds between those lines"),
    nothing("MC_NUM_CQ_PER_CTX", ONE_CQ),
    nothing("MC_NUM_COMP_CHANNELS_PER_CTX", ONE_CQ),
    nothing("MC_WORKERS_PER_CTX", "data cores serve every NIC: EngineBuilder::cores or core_cpus"),
    nothing("MC_PATH_ROUNDROBIN", "slices are pulled by whichever NIC has room"),
    nothing("MC_MIN_REG_SIZE", "of another transport"),
    nothing("MC_ENABLE_PARALLEL_REG_MR", "memory is always registered on all NICs at once"),
    nothing("MC_AUTO_GID_MAX_RETRIES", "the GID is looked up again by value before each connection"),
    nothing("MC_TE_METADATA_REFRESH_INTERVAL_SECONDS", "etcd is watched; Segment::refresh fetches at once"),
    nothing(
        "MC_RDMA_RAIL_PAUSE_SECONDS",
        "a rail is tried again after at most 1 s and used when a trial slice came back",
    ),
    nothing("MC_CONN_PAUSE_TTL_MS", "a rail is tried again after at most 1 s and used when a trial slice came back"),
    nothing("MC_SLICE_TIMEOUT", "a batch has a deadline: MC_TRANSFER_TIMEOUT"),
    nothing("MC_RDMA_BIND_ADDRESS", "NIC paths carry the node's name; MC_TCP_BIND_ADDRESS sets the host to dial"),
    nothing("MC_LOG_RDMA_SLICE_AFFINITY", NO_TRACK),
    nothing("MC_TRACK_RDMA_POSTED_SLICES", NO_TRACK),
    nothing("MC_MLX5_QP_UDP_SPORTS", "needs mlx5dv, which is not used"),
    nothing("MC_MLX5_QP_LAG_PORT_BALANCE", "needs mlx5dv, which is not used"),
    nothing("MC_REDIS_USERNAME", NO_REDIS),
    nothing("MC_REDIS_PASSWORD", NO_REDIS),
    nothing("MC_REDIS_DB_INDEX", NO_REDIS),
    nothing("MC_TCP_ENABLE_CONNECTION_POOL", "connections are kept, always"),
    nothing("MC_TCP_SLICE_SIZE", "as much as the socket takes is read and written at once"),
    nothing("MC_TCP_MAX_QUEUED_TRANSFERS_PER_PEER", NO_ADMISSION),
    nothing("MC_TCP_MAX_PENDING_ADMISSIONS_PER_PEER", NO_ADMISSION),
    nothing("MC_TCP_ADMISSION_TIMEOUT_MS", NO_ADMISSION),
    nothing("MC_FORCE_MNNVL", NO_GPU),
    nothing("MC_INTRANODE_NVLINK", NO_GPU),
    nothing("MC_MAX_CONCURRENT_REG_MR", NO_EFA),
    nothing("MC_EFA_NIC_SELECTION", NO_EFA),
    nothing("MC_EFA_CQ_THREADS", NO_EFA),
    nothing("MC_USE_TENT", NO_TENT),
    nothing("MC_USE_TEV1", NO_TENT),
    nothing("MC_TE_FILTERS_EXCLUDE", NO_TENT),
    nothing("WITH_NVIDIA_PEERMEM", NO_GPU),
    nothing("MC_USE_RDMA_TWOSIDED", NO_TWO_SIDED),
    nothing("MC_RDMA_NOTIFY_ENABLED", NO_TWO_SIDED),
    nothing("MC_RDMA_NOTIFY_RECV_COUNT", NO_TWO_SIDED),
    nothing("MC_RDMA_NOTIFY_BUFFER_SIZE", NO_TWO_SIDED),
    nothing("MC_RDMA_NOTIFY_MAX_PENDING_SENDS", NO_TWO_SIDED),
    nothing("MC_RDMA_NOTIFY_OOB_FALLBACK", NO_TWO_SIDED),
    nothing("MC_RDMA_NOTIFY_CONNECT_TIMEOUT_MS", NO_TWO_SIDED),
];

/// The line of the table for `name`.
pub fn variable(name: &str) -> Option<&'static Variable> {
    VARIABLES.iter().find(|variable| variable.name == name)
}

impl Values {
    /// For people: `1 to 255`.
    pub fn describe(self) -> String {
        match self {
            Integers(low, i64::MAX) => format!("{low} or more"),
            Integers(low, high) => format!("{low} to {high}"),
            Words(words) => words.join(", "),
            Values::Text(text) => text.to_owned(),
        }
    }
}

/// docs/configuration.md, made from the table.
pub fn reference() -> String {
    use std::fmt::Write;
    let mut page = String::from(HEAD);
    for variable in VARIABLES {
        if let Here::Option(option) = variable.here {
            let Variable { name, class, default, meaning, .. } = variable;
            let _ = writeln!(
                page,
                "| `{name}` | `{option}` | {default} | {} | {} | {meaning} |",
                variable.values.describe(),
                class.name()
            );
        }
    }
    page.push_str(MIDDLE);
    for variable in VARIABLES {
        if let Here::Nothing(why) = variable.here {
            let _ = writeln!(page, "| `{}` | {why} |", variable.name);
        }
    }
    page
}

const HEAD: &str = "\
# Configuration

<!-- Made from runtime/src/config/variables.rs by `cargo run -p moonrail --example configuration > docs/configuration.md`. -->

Everything is an option of `EngineBuilder`; most options are also an environment variable of Mooncake's, read once, when
the engine is built. An option that is set in the program wins. A wrong value in the program is an error that names the
range; a wrong value in the environment is a warning, and the default holds, as in Mooncake.

`name`, `metadata`, `metadata_user`, `metadata_tls`, `nics`, `nic_priority_matrix`, `nics_from`, `cores`, `core_cpus`,
`pin_cores`, `poll_mode`, `prefer`, `metrics_http`, `log` and `environment` have no variable. `cores` takes 1 to 64 (default: CPUs minus 1, at least
1); `poll_mode` is adaptive unless busy polling is asked for. `inspect` has one of ours, `MOONRAIL_INSPECT`
([operating.md](operating.md), section 6).

| Variable | Builder option | Default | Takes | Read as | Meaning |
|---|---|---|---|---|---|
";

const MIDDLE: &str = "
## Recognised, without meaning here

If one of these is set, one line of the log names it.

| Variable | Why |
|---|---|
";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_variable_stands_once_and_its_default_is_in_its_range() {
        for (i, one) in VARIABLES.iter().enumerate() {
            assert!(VARIABLES[..i].iter().all(|other| other.name != one.name), "{}", one.name);
            if let (Integers(low, high), Ok(default)) = (one.values, one.default.parse::<i64>()) {
                assert!((low..=high).contains(&default), "{}", one.name);
            }
        }
    }

    /// If this fails: `cargo run -p moonrail --example configuration > docs/configuration.md`.
    #[test]
    fn the_page_in_docs_is_the_table() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/configuration.md");
        let page = std::fs::read_to_string(path).unwrap_or_default();
        assert!(
            page == reference(),
            "docs/configuration.md is stale: cargo run -p moonrail --example configuration > docs/configuration.md"
        );
    }
}
