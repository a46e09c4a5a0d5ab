//! Everything that can be chosen before an engine starts.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use moonrail_datapath::nic::{Fabric, Nic};
use moonrail_datapath::units::Mtu;

use crate::config::{Given, Resolved};
use crate::engine::Engine;
use crate::error::BuildError;
use crate::log::{Level, Sink};
use crate::open::Wanted;
use crate::plan::Plan;
use moonrail_control::Eviction;

/// How a data core waits for work.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum PollMode {
    /// Leaves the work to a caller that waits for its batch, or polls it, and takes up what no caller goes on with. Without one:
    /// spins for 5 us, looks on between other threads for 0.3 ms, then sleeps until it is rung or a NIC has a completion.
    #[default]
    Adaptive,
    /// Spins for ever, and does all the work itself: one whole CPU per core. For processors to spare, and callers whose threads may
    /// be held up at any time.
    Busy,
}

/// PEM files for etcd or HTTP over TLS.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct TlsFiles {
    /// Certificate authority of the server. etcd over TLS needs it; an HTTP server without it must be signed by one of the
    /// public authorities.
    pub ca: Option<PathBuf>,
    /// Our certificate and its key, where the server asks for one.
    pub identity: Option<(PathBuf, PathBuf)>,
    /// Name to expect in the server's certificate, where it is not the host's.
    pub domain: Option<String>,
}

pub(crate) type ReadVariable = Arc<dyn Fn(&str) -> Option<String> + Send + Sync>;

/// Options of an engine. Most have an MC_* variable, which docs/configuration.md names; an option set here wins over the
/// environment. A wrong value is an error of [`EngineBuilder::build`] that names the range.
#[derive(Default)]
pub struct EngineBuilder {
    pub(crate) name: Option<String>,
    pub(crate) metadata: Option<String>,
    pub(crate) user: Option<(String, String)>,
    pub(crate) tls: Option<TlsFiles>,
    pub(crate) wanted: Wanted,
    pub(crate) cores: Option<usize>,
    pub(crate) cpus: Option<Vec<usize>>,
    pub(crate) unpinned: bool,
    pub(crate) poll_mode: PollMode,
    pub(crate) metrics_http: Option<std::net::SocketAddr>,
    pub(crate) sink: Option<Sink>,
    pub(crate) environment: Option<ReadVariable>,
    pub(crate) given: Given,
}

/// Options that are integers, checked against the table of [`crate::config`].
macro_rules! integers {
    ($($(#[$doc:meta])* $name:ident: $type:ty;)*) => {
        impl EngineBuilder {
            $(
                $(#[$doc])*
                #[must_use]
                pub fn $name(mut self, value: $type) -> Self {
                    self.given.integers.insert(stringify!($name), i64::try_from(value).unwrap_or(i64::MAX));
                    self
                }
            )*
        }
    };
}

integers! {
    /// Port of every device, 1 to 255 (MC_IB_PORT).
    ib_port: u8;
    /// Entry of the GID table, 0 to 255 (MC_GID_INDEX). Default: chosen by rule.
    gid_index: u32;
    /// Entry of the partition table, 0 to 65535 (MC_PKEY_INDEX).
    pkey_index: u32;
    /// Queue pairs per rail, 1 to 8 (MC_NUM_QP_PER_EP). A stock peer must have the same.
    qps_per_rail: usize;
    /// Rails an RDMA or TCP NIC keeps connected, 1 to 65535, lowered to what devices and cores have room for
    /// (MC_MAX_EP_PER_CTX). Of more, idle ones are evicted and connected again when they are used; those in use stay.
    rails_per_nic: usize;
    /// Send-queue entries per queue pair, 1 to 65535 (MC_MAX_WR).
    max_wr: u32;
    /// Gather entries per work request, 1 to 65535 (MC_MAX_SGE).
    max_sge: u32;
    /// Largest WRITE carried inside its work request, 0 to 65535 bytes (MC_MAX_INLINE).
    max_inline: u32;
    /// Completion-queue entries per core and NIC, 1 to 65535 (MC_MAX_CQE_PER_CTX).
    cq_depth: u32;
    /// DSCP and ECN byte of packets, 0 to 255 (MC_IB_TC).
    traffic_class: u8;
    /// Service level, 0 to 15 (MC_IB_SL).
    service_level: u8;
    /// Connections per peer over TCP, 1 to 16 (MC_TCP_LANES_PER_PEER).
    tcp_lanes: usize;
    /// Bytes per slice, 1 to 1 GiB (MC_SLICE_SIZE).
    slice_size: u32;
    /// A remainder up to slice size / ratio is not cut off; 1 to slice size − 1 (MC_FRAGMENT_RATIO).
    fragment_ratio: u32;
    /// Largest piece registered at once, in bytes (MC_MAX_MR_SIZE).
    max_mr_size: u64;
    /// Retries of a slice after failures of its own, 1 to 127 (MC_RETRY_CNT).
    retries: u8;
    /// Port of names that have none, 1 to 65535 (MC_HANDSHAKE_PORT).
    handshake_port: u16;
    /// Connections the kernel keeps while control is busy, 1 to 65535 (MC_HANDSHAKE_LISTEN_BACKLOG).
    handshake_backlog: u32;
    /// Largest handshake message, 1 to 128 MiB (MC_HANDSHAKE_MAX_LENGTH).
    handshake_max_length: usize;
}

macro_rules! flags {
    ($($(#[$doc:meta])* $name:ident;)*) => {
        impl EngineBuilder {
            $(
                $(#[$doc])*
                #[must_use]
                pub fn $name(mut self, on: bool) -> Self {
                    self.given.flags.insert(stringify!($name), on);
                    self
                }
            )*
        }
    };
}

flags! {
    /// Listen on the port of the node's name instead of one of a range (MC_LEGACY_RPC_PORT_BINDING).
    rpc_port_from_name;
    /// IPv6 only, for names, listening and dialling (MC_USE_IPV6).
    ipv6;
    /// Whether [`Engine::open_segment`] may answer from what is known already; on (MC_DISABLE_METACACHE: off).
    metadata_cache;
    /// Use only the peer's NIC of the same name, where it has one (MC_ENABLE_DEST_DEVICE_AFFINITY).
    same_name_only;
    /// Use version 1 of the TCP data protocol towards stock peers; off (MC_TCP_PROTO=1).
    tcp_v1;
    /// Offer a local socket on which `moonrail incidents` reads this engine; on (MOONRAIL_INSPECT=off). See
    /// [`crate::inspect`].
    inspect;
}

macro_rules! texts {
    ($($(#[$doc:meta])* $name:ident;)*) => {
        impl EngineBuilder {
            $(
                $(#[$doc])*
                #[must_use]
                pub fn $name(mut self, text: impl Into<String>) -> Self {
                    self.given.texts.insert(stringify!($name), text.into());
                    self
                }
            )*
        }
    };
}

texts! {
    /// Prefix of every metadata key (MC_METADATA_CLUSTER_ID).
    cluster_id;
    /// Host that peers are told to dial (MC_TCP_BIND_ADDRESS). Default: the name's host (without a metadata server), or
    /// the first address of an interface that is up.
    publish_host;
}

impl EngineBuilder {
    /// Name of this node, `HOST`, `HOST:PORT` or any word; peers open it. Default: the host name; without a metadata server
    /// the address of this host that others can reach, else 127.0.0.1.
    #[must_use]
    pub fn name(mut self, name: impl Into<String>) -> Self {
        self.name = Some(name.into());
        self
    }

    /// Metadata server: `etcd://H:P,H:P`, `http://H:P/metadata`, `P2PHANDSHAKE` (the default) or `memory://NAME` (for
    /// engines of one process).
    #[must_use]
    pub fn metadata(mut self, uri: impl Into<String>) -> Self {
        self.metadata = Some(uri.into());
        self
    }

    /// User and password of the metadata server.
    #[must_use]
    pub fn metadata_user(mut self, user: impl Into<String>, password: impl Into<String>) -> Self {
        self.user = Some((user.into(), password.into()));
        self
    }

    /// TLS towards the metadata server.
    #[must_use]
    pub fn metadata_tls(mut self, files: TlsFiles) -> Self {
        self.tls = Some(files);
        self
    }

    /// NICs to use, by name. A name that is not there is a warning, as long as another one is.
    #[must_use]
    pub fn nics(mut self, names: impl IntoIterator<Item = impl Into<String>>) -> Self {
        self.wanted.names = names.into_iter().map(Into::into).collect();
        self
    }

    /// NICs that are open already: simulated ones, or a wrapper of the embedder's. No other is used then.
    #[must_use]
    pub fn nics_from(mut self, nics: Vec<Arc<dyn Nic>>) -> Self {
        self.wanted.open = nics;
        self
    }

    /// The fabrics this node has at all, for its own transfers and for its peers' (MC_FORCE_TCP: TCP only). Default: shared
    /// memory, RDMA, and TCP where there is no RDMA NIC or a policy names it. Memory that is open to peers is open to whoever
    /// reaches the TCP port or, as this user, the host.
    #[must_use]
    pub fn fabrics(mut self, fabrics: impl IntoIterator<Item = Fabric>) -> Self {
        self.given.fabrics = Some(fabrics.into_iter().collect());
        self
    }

    /// Transfers go over this fabric or fail with the cause (MC_FORCE_HCA: RDMA). For one segment:
    /// [`Engine::open_segment_with`].
    #[must_use]
    pub fn require(mut self, fabric: Fabric) -> Self {
        self.given.policy.require = Some(fabric);
        self
    }

    /// Transfers go over this fabric where it works, else over the best that does: shared memory, RDMA, TCP.
    #[must_use]
    pub fn prefer(mut self, fabric: Fabric) -> Self {
        self.given.policy.prefer = Some(fabric);
        self
    }

    /// For a peer's status of a request over TCP, 1 s to an hour (MC_TCP_STATUS_TIMEOUT_SEC).
    #[must_use]
    pub fn tcp_status_timeout(mut self, within: Duration) -> Self {
        self.given.tcp_status_timeout = Some(within);
        self
    }

    /// Without a byte of progress for this long a TCP connection is ended, 1 s to an hour (MC_TCP_PROGRESS_TIMEOUT_SEC).
    #[must_use]
    pub fn tcp_progress_timeout(mut self, within: Duration) -> Self {
        self.given.tcp_progress_timeout = Some(within);
        self
    }

    /// NICs to keep of those that are found; empty keeps all (MC_TE_FILTERS).
    #[must_use]
    pub fn nic_filter(mut self, names: impl IntoIterator<Item = impl Into<String>>) -> Self {
        self.given.nic_filter = Some(names.into_iter().map(Into::into).collect());
        self
    }

    /// NIC priority matrix as JSON text; its NICs are used, unless [`EngineBuilder::nics`] names others.
    #[must_use]
    pub fn nic_priority_matrix(mut self, json: impl Into<String>) -> Self {
        self.given.matrix_json = Some(json.into());
        self
    }

    /// NIC priority matrix in a file (MC_CUSTOM_TOPO_JSON).
    #[must_use]
    pub fn nic_priority_matrix_file(mut self, path: impl Into<PathBuf>) -> Self {
        self.given.matrix_file = Some(path.into());
        self
    }

    /// Peer NICs to use with a local one, by name (MC_NIC_PEER_AFFINITY).
    #[must_use]
    pub fn peer_affinity(mut self, rules: Vec<(String, Vec<String>)>) -> Self {
        self.given.peer_affinity = Some(rules);
        self
    }

    /// Which idle rail is evicted first where a NIC has more than [`EngineBuilder::rails_per_nic`]; the one used least
    /// recently, unless something else is said (MC_ENDPOINT_STORE_TYPE).
    #[must_use]
    pub fn eviction(mut self, first: Eviction) -> Self {
        self.given.eviction = Some(first);
        self
    }

    /// Number of data cores, 1 to 64. Default: CPUs minus 1, at least 1.
    #[must_use]
    pub fn cores(mut self, count: usize) -> Self {
        self.cores = Some(count);
        self
    }

    /// One data core on each CPU given, 1 to 64 of them.
    #[must_use]
    pub fn core_cpus(mut self, cpus: impl IntoIterator<Item = usize>) -> Self {
        self.cpus = Some(cpus.into_iter().collect());
        self
    }

    /// Whether data cores are pinned to CPUs; on. Off suits several engines in one small process.
    #[must_use]
    pub fn pin_cores(mut self, on: bool) -> Self {
        self.unpinned = !on;
        self
    }

    /// How cores wait.
    #[must_use]
    pub fn poll_mode(mut self, mode: PollMode) -> Self {
        self.poll_mode = mode;
        self
    }

    /// Relaxed ordering of the PCI writes into registered memory, where the device knows it; on
    /// (MC_IB_PCI_RELAXED_ORDERING).
    #[must_use]
    pub fn relaxed_ordering(mut self, on: bool) -> Self {
        self.given.integers.insert("relaxed_ordering", i64::from(on));
        self
    }

    /// Upper bound of the path MTU, 512 to 4096 bytes (MC_MTU).
    #[must_use]
    pub fn mtu(mut self, mtu: Mtu) -> Self {
        self.given.mtu = Some(mtu);
        self
    }

    /// Default deadline of a batch, 5 s to a day; 1 ns per byte is added (MC_TRANSFER_TIMEOUT).
    #[must_use]
    pub fn transfer_timeout(mut self, after: Duration) -> Self {
        self.given.transfer_timeout = Some(after);
        self
    }

    /// For a connection to a peer's handshake port, 1 s to an hour (MC_HANDSHAKE_CONNECT_TIMEOUT).
    #[must_use]
    pub fn handshake_connect_timeout(mut self, within: Duration) -> Self {
        self.given.handshake_connect_timeout = Some(within);
        self
    }

    /// Range the handshake server picks its port from, outside 32768 to 60999 (MC_MIN_RPC_PORT, MC_MAX_RPC_PORT).
    #[must_use]
    pub fn rpc_ports(mut self, first: u16, last: u16) -> Self {
        self.given.rpc_ports = Some((first, last));
        self
    }

    /// Logs the throughput so often, 1 s to a day (MC_TE_METRIC). Default: never.
    #[must_use]
    pub fn metrics(mut self, every: Duration) -> Self {
        self.given.metrics = Some(every);
        self
    }

    /// Offers what the engine counts over HTTP at this address, as `/metrics` in the text format of Prometheus, to whoever reaches
    /// it. Port 0 takes a free one; see [`Engine::metrics_addr`]. Default: nowhere. An address that cannot be taken is an error of
    /// [`EngineBuilder::build`].
    #[must_use]
    pub fn metrics_http(mut self, addr: std::net::SocketAddr) -> Self {
        self.metrics_http = Some(addr);
        self
    }

    /// Log threshold (MC_LOG_LEVEL).
    #[must_use]
    pub fn log_level(mut self, level: Level) -> Self {
        self.given.log_level = Some(level);
        self
    }

    /// Folder for the log file (MC_LOG_DIR). Default: stderr.
    #[must_use]
    pub fn log_dir(mut self, folder: impl Into<PathBuf>) -> Self {
        self.given.log_dir = Some(folder.into());
        self
    }

    /// Takes the log lines, instead of stderr or a file.
    #[must_use]
    pub fn log(mut self, sink: impl Fn(Level, &str) + Send + Sync + 'static) -> Self {
        self.sink = Some(Arc::new(sink));
        self
    }

    /// Reads variables from this function instead of the process environment: `|_| None` for none at all.
    #[must_use]
    pub fn environment(mut self, read: impl Fn(&str) -> Option<String> + Send + Sync + 'static) -> Self {
        self.environment = Some(Arc::new(read));
        self
    }

    /// What environment variables are read with: the program's function, else the process's own environment.
    pub(crate) fn environment_read(&self) -> impl Fn(&str) -> Option<String> + use<> {
        let given = self.environment.clone();
        move |name: &str| match &given {
            Some(read) => read(name),
            None => std::env::var(name).ok(),
        }
    }

    /// Opens the NICs, starts the data cores and the control thread, publishes the (empty) segment. Blocks for as long as
    /// that takes: some seconds at the most, with a metadata server that does not answer.
    ///
    /// # Errors
    /// See [`BuildError`]. Nothing is left running or published then.
    pub fn build(self) -> Result<Engine, BuildError> {
        crate::start::start(self)
    }

    /// Who and where the node would be: the program's options, the environment's where the program is silent, defaults.
    ///
    /// # Errors
    /// An option out of its range.
    pub fn resolved(&self) -> Result<Resolved, BuildError> {
        Resolved::of(self)
    }

    /// What [`EngineBuilder::build`] would make on this machine, without making it: the NICs are opened, looked at and
    /// closed. Nothing is published, nobody is asked.
    ///
    /// # Errors
    /// Those of [`EngineBuilder::build`] that concern options and NICs.
    pub fn plan(self) -> Result<Plan, BuildError> {
        crate::plan::plan(self)
    }
}
