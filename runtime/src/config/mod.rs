//! Options: what the builder sets, what the MC_* environment variables set, and what holds otherwise.
//!
//! [`variables`] is the table; docs/configuration.md is made from it. The environment is read through a function, so a
//! test needs no process environment.

pub mod parse;
mod resolve;
mod resolved;
pub mod variables;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use moonrail_control::{Eviction, FabricPolicy};
use moonrail_datapath::nic::Fabric;
use moonrail_datapath::slice::SliceRule;
use moonrail_datapath::units::Mtu;

use crate::error::BuildError;
use crate::log::Level;
use parse::{boolean, integer, list};
use variables::{Here, VARIABLES, Values, variable};

pub use resolved::Resolved;
pub use variables::{Variable, reference};

/// What the program set. Integer options are kept by name and checked against the table.
#[derive(Clone, Default)]
pub(crate) struct Given {
    pub(crate) integers: BTreeMap<&'static str, i64>,
    pub(crate) flags: BTreeMap<&'static str, bool>,
    pub(crate) texts: BTreeMap<&'static str, String>,
    pub(crate) nic_filter: Option<Vec<String>>,
    pub(crate) peer_affinity: Option<Vec<(String, Vec<String>)>>,
    pub(crate) rpc_ports: Option<(u16, u16)>,
    pub(crate) mtu: Option<Mtu>,
    pub(crate) eviction: Option<Eviction>,
    pub(crate) log_level: Option<Level>,
    pub(crate) log_dir: Option<PathBuf>,
    pub(crate) matrix_file: Option<PathBuf>,
    pub(crate) matrix_json: Option<String>,
    pub(crate) metrics: Option<Duration>,
    pub(crate) transfer_timeout: Option<Duration>,
    pub(crate) handshake_connect_timeout: Option<Duration>,
    pub(crate) fabrics: Option<Vec<Fabric>>,
    pub(crate) policy: FabricPolicy,
    pub(crate) tcp_status_timeout: Option<Duration>,
    pub(crate) tcp_progress_timeout: Option<Duration>,
}

/// Everything decided.
#[derive(Clone, PartialEq, Debug)]
pub(crate) struct Settings {
    pub(crate) ib_port: u8,
    pub(crate) gid_index: Option<u32>,
    pub(crate) pkey_index: u16,
    pub(crate) mtu: Mtu,
    pub(crate) qps_per_rail: usize,
    pub(crate) rails_per_nic: usize,
    pub(crate) eviction: Eviction,
    pub(crate) max_wr: u32,
    pub(crate) max_sge: u32,
    pub(crate) max_inline: u32,
    pub(crate) cq_depth: u32,
    pub(crate) traffic_class: u8,
    pub(crate) service_level: u8,
    pub(crate) relaxed_ordering: bool,
    pub(crate) slices: SliceRule,
    pub(crate) max_mr_size: u64,
    pub(crate) retries: u8,
    pub(crate) transfer_timeout: Duration,
    pub(crate) handshake_port: u16,
    pub(crate) handshake_backlog: u32,
    pub(crate) handshake_connect_timeout: Duration,
    pub(crate) handshake_max_length: usize,
    pub(crate) rpc_ports: (u16, u16),
    pub(crate) rpc_port_from_name: bool,
    pub(crate) publish_host: Option<String>,
    pub(crate) ipv6: bool,
    pub(crate) cluster_id: String,
    pub(crate) metadata_cache: bool,
    pub(crate) matrix: MatrixSource,
    pub(crate) nic_filter: Vec<String>,
    pub(crate) same_name_only: bool,
    pub(crate) peer_affinity: Vec<(String, Vec<String>)>,
    pub(crate) log_level: Level,
    pub(crate) log_dir: Option<PathBuf>,
    pub(crate) metrics: Option<Duration>,
    /// `None`: shared memory, RDMA, and TCP where there is no RDMA NIC.
    pub(crate) fabrics: Option<Vec<Fabric>>,
    pub(crate) policy: FabricPolicy,
    pub(crate) tcp_lanes: usize,
    pub(crate) tcp_v1: bool,
    pub(crate) tcp_status_timeout: Duration,
    pub(crate) tcp_progress_timeout: Duration,
    /// Where the socket for inspection may be; empty: nowhere.
    pub(crate) inspect: Vec<PathBuf>,
}

/// Where the NIC priority matrix comes from.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum MatrixSource {
    /// Made from the machine's topology.
    Discovery,
    /// JSON text that the program gave: an error if it is wrong.
    Json(String),
    /// A file that the program named: an error if it cannot be read.
    File(PathBuf),
    /// A file that the environment named: a warning and discovery if it cannot be used.
    EnvironmentFile(PathBuf),
}

/// The environment as a function, and the warnings that reading it gave.
pub(crate) struct Environment<'a> {
    read: &'a dyn Fn(&str) -> Option<String>,
    pub(crate) warnings: Vec<String>,
}

impl<'a> Environment<'a> {
    pub(crate) fn new(read: &'a dyn Fn(&str) -> Option<String>) -> Self {
        Self { read, warnings: Vec::new() }
    }

    /// The text of a variable.
    fn text(&self, name: &str) -> Option<String> {
        (self.read)(name)
    }

    /// An integer in its range; anything else is a warning.
    fn integer(&mut self, name: &str) -> Option<i64> {
        let text = self.text(name)?;
        let line = variable(name)?;
        let value = match integer(line.class, name, &text)? {
            Ok(value) => value,
            Err(warning) => {
                self.warnings.push(warning);
                return None;
            }
        };
        if line.values.holds(value) {
            return Some(value);
        }
        let range = match line.values {
            Values::Words(words) => format!(", it should be {}", words.join("|")),
            values => format!(": {value} is outside {}; {} holds", values.describe(), line.default),
        };
        self.warnings.push(format!("Ignore value from environment variable {name}{range}"));
        None
    }

    fn boolean(&mut self, name: &str) -> Option<bool> {
        match boolean(name, &self.text(name)?) {
            Ok(value) => Some(value),
            Err(warning) => {
                self.warnings.push(warning);
                None
            }
        }
    }

    fn present(&self, name: &str) -> bool {
        self.text(name).is_some()
    }

    fn list(&self, name: &str) -> Option<Vec<String>> {
        self.text(name).map(|text| list(&text))
    }

    /// One line naming what is set and means nothing here.
    pub(crate) fn ignored(&self) -> Option<String> {
        let set: Vec<String> = VARIABLES
            .iter()
            .filter_map(|variable| match variable.here {
                Here::Nothing(why) if self.present(variable.name) => Some(format!("{} ({why})", variable.name)),
                _ => None,
            })
            .collect();
        (!set.is_empty()).then(|| format!("environment variables without meaning here: {}", set.join(", ")))
    }
}

impl Values {
    /// Whether an integer is one of them.
    fn holds(self, value: i64) -> bool {
        match self {
            Self::Integers(low, high) => (low..=high).contains(&value),
            Self::Words(words) => words.iter().any(|word| word.parse() == Ok(value)),
            Self::Text(_) => true,
        }
    }
}

/// The variable that carries an option; the first of several.
fn variable_of(option: &str) -> Option<&'static Variable> {
    VARIABLES.iter().find(|variable| matches!(variable.here, Here::Option(name) if name == option))
}

/// An option's error.
fn refused(option: &'static str, value: impl std::fmt::Display, range: impl Into<String>) -> BuildError {
    BuildError::Option { option, value: value.to_string(), range: range.into() }
}
