//! Everything that can be chosen before an engine starts.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use moonrail_datapath::nic::Nic;
use moonrail_datapath::units::Mtu;

use crate::engine::Engine;
use crate::error::BuildError;
use crate::log::{Level, Sink};

/// How a data core waits for work.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum PollMode {
    /// Spins for some time, then sleeps until it is rung or a NIC has a completion.
    #[default]
    Adaptive,
    /// Spins for ever: lowest latency, one whole CPU per core.
    Busy,
}

/// PEM files for etcd or HTTP over TLS.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct TlsFiles {
    /// Certificate authority of the server; `None`: the system's.
    pub ca: Option<PathBuf>,
    /// Our certificate and its key, where the server asks for one.
    pub identity: Option<(PathBuf, PathBuf)>,
}

/// Options of an engine. Each has the MC_* variable that docs/configuration.md names; an option set here wins over the
/// environment. A wrong value is an error of [`EngineBuilder::build`] that names the range.
#[derive(Default)]
pub struct EngineBuilder {}

macro_rules! options {
    ($($(#[$doc:meta])* $name:ident($arg:ident: $type:ty);)*) => {
        impl EngineBuilder {
            $(
                $(#[$doc])*
                #[must_use]
                pub fn $name(self, $arg: $type) -> Self {
                    let _ = $arg;
                    todo!()
                }
            )*
        }
    };
}

options! {
    /// Name of this node, `HOST`, `HOST:PORT` or any word; peers open it. Default: the host name.
    name(name: impl Into<String>);
    /// Metadata server: `etcd://H:P,H:P`, `http://H:P/metadata`, `P2PHANDSHAKE` (the default) or `memory://NAME`.
    metadata(uri: impl Into<String>);
    /// NICs to use, by name.
    nics(names: impl IntoIterator<Item = impl Into<String>>);
    /// NICs to keep of those that are found; empty keeps all (MC_TE_FILTERS).
    nic_filter(names: impl IntoIterator<Item = impl Into<String>>);
    /// NIC priority matrix as JSON text.
    nic_priority_matrix(json: impl Into<String>);
    /// NIC priority matrix in a file (MC_CUSTOM_TOPO_JSON).
    nic_priority_matrix_file(path: impl Into<PathBuf>);
    /// NICs that are open already: simulated ones, or a wrapper of the embedder's.
    nics_from(nics: Vec<Arc<dyn Nic>>);
    /// Number of data cores, 1 to 64. Default: CPUs minus 1, at least 1.
    cores(count: usize);
    /// Data cores, each on the CPU given.
    core_cpus(cpus: impl IntoIterator<Item = usize>);
    /// How cores wait.
    poll_mode(mode: PollMode);
    /// Queue pairs per rail, 1 to 8; both ends must agree (MC_NUM_QP_PER_EP).
    qps_per_rail(count: usize);
    /// Bytes per slice (MC_SLICE_SIZE).
    slice_size(bytes: u32);
    /// The remainder kept whole is slice size / ratio (MC_FRAGMENT_RATIO).
    fragment_ratio(ratio: u32);
    /// Upper bound of the path MTU (MC_MTU): 512 to 4096.
    mtu(mtu: Mtu);
    /// Entry of the GID table, 0 to 255 (MC_GID_INDEX). Default: chosen by rule.
    gid_index(index: u32);
    /// Port of every device, 1 to 255 (MC_IB_PORT).
    ib_port(port: u8);
    /// Batch deadline, at least 5 s; 1 ns per byte is added (MC_TRANSFER_TIMEOUT).
    transfer_timeout(after: Duration);
    /// Log threshold (MC_LOG_LEVEL).
    log_level(level: Level);
    /// Where log lines go.
    log(sink: Sink);
}

impl EngineBuilder {
    /// User and password of the metadata server.
    #[must_use]
    pub fn metadata_user(self, _user: impl Into<String>, _password: impl Into<String>) -> Self {
        todo!()
    }

    /// TLS towards the metadata server.
    #[must_use]
    pub fn metadata_tls(self, _files: TlsFiles) -> Self {
        todo!()
    }

    /// Reads variables from this function instead of the process environment.
    #[must_use]
    pub fn environment(self, _read: impl Fn(&str) -> Option<String> + Send + Sync + 'static) -> Self {
        todo!()
    }

    /// Opens the NICs, starts the control thread and the data cores, publishes the (empty) segment.
    pub fn build(self) -> Result<Engine, BuildError> {
        todo!()
    }
}
