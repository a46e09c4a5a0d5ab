//! From what the program gave and what the environment says to one decision per option.

use std::path::PathBuf;
use std::time::Duration;

use moonrail_control::{Eviction, FabricPolicy, RAILS_PER_NIC_MAX};
use moonrail_datapath::limits::FRAGMENT_LIMIT;
use moonrail_datapath::nic::Fabric;
use moonrail_datapath::slice::SliceRule;
use moonrail_datapath::units::Mtu;

use super::parse::peer_affinity;
use super::variables::variable;
use super::{Environment, Given, MatrixSource, Settings, refused, variable_of};
use crate::error::BuildError;
use crate::log::Level;

const MATRIX_FILE: &str = "MC_CUSTOM_TOPO_JSON";
/// Ports the kernel hands out by itself; a listener there could lose its port to a client.
const EPHEMERAL: std::ops::RangeInclusive<i64> = 32_768..=60_999;

impl Settings {
    /// Decides every option: the program, then the environment, then the default. Warnings stay in `env`.
    pub(crate) fn resolve(given: &Given, env: &mut Environment<'_>) -> Result<Self, BuildError> {
        let mut pick = Pick { given, env };
        let slices = pick.slice_rule()?;
        let transfer_timeout = pick.seconds("transfer_timeout", given.transfer_timeout)?;
        let handshake_connect_timeout = pick.seconds("handshake_connect_timeout", given.handshake_connect_timeout)?;
        Ok(Self {
            ib_port: pick.integer("ib_port")? as u8,
            gid_index: pick.optional_integer("gid_index", &["MC_GID_INDEX", "NCCL_IB_GID_INDEX"])?.map(|v| v as u32),
            pkey_index: pick.integer("pkey_index")? as u16,
            mtu: pick.mtu()?,
            qps_per_rail: pick.integer("qps_per_rail")? as usize,
            rails_per_nic: pick
                .optional_integer("rails_per_nic", &["MC_MAX_EP_PER_CTX"])?
                .map_or(RAILS_PER_NIC_MAX, |rails| rails as usize),
            eviction: pick.eviction(),
            max_wr: pick.integer("max_wr")? as u32,
            max_sge: pick.integer("max_sge")? as u32,
            max_inline: pick.integer("max_inline")? as u32,
            cq_depth: pick.integer("cq_depth")? as u32,
            traffic_class: pick.integer("traffic_class")? as u8,
            service_level: pick.integer("service_level")? as u8,
            relaxed_ordering: pick.integer("relaxed_ordering")? != 0,
            slices,
            max_mr_size: pick.integer("max_mr_size")? as u64,
            retries: pick.integer("retries")? as u8,
            transfer_timeout,
            handshake_port: pick.integer("handshake_port")? as u16,
            handshake_backlog: pick.integer("handshake_backlog")? as u32,
            handshake_connect_timeout,
            handshake_max_length: pick.integer("handshake_max_length")? as usize,
            rpc_ports: pick.rpc_ports()?,
            rpc_port_from_name: pick.flag("rpc_port_from_name", "MC_LEGACY_RPC_PORT_BINDING"),
            publish_host: pick.text("publish_host", "MC_TCP_BIND_ADDRESS"),
            ipv6: pick.flag("ipv6", "MC_USE_IPV6"),
            cluster_id: pick.text("cluster_id", "MC_METADATA_CLUSTER_ID").unwrap_or_default(),
            metadata_cache: given
                .flags
                .get("metadata_cache")
                .copied()
                .unwrap_or_else(|| !pick.env.present("MC_DISABLE_METACACHE")),
            matrix: pick.matrix(),
            nic_filter: given.nic_filter.clone().or_else(|| pick.env.list("MC_TE_FILTERS")).unwrap_or_default(),
            same_name_only: pick.flag("same_name_only", "MC_ENABLE_DEST_DEVICE_AFFINITY"),
            peer_affinity: pick.peer_affinity(),
            log_level: pick.log_level(),
            log_dir: pick.log_dir(),
            metrics: pick.metrics()?,
            fabrics: given.fabrics.clone().or_else(|| pick.env.present("MC_FORCE_TCP").then(|| vec![Fabric::Tcp])),
            policy: pick.policy(),
            tcp_lanes: pick
                .optional_integer("tcp_lanes", &["MC_TCP_LANES_PER_PEER", "MC_TCP_MAX_CONNECTIONS_PER_PEER"])?
                .map_or(4, |lanes| lanes as usize),
            tcp_v1: given
                .flags
                .get("tcp_v1")
                .copied()
                .unwrap_or_else(|| pick.env.text("MC_TCP_PROTO").as_deref() == Some("1")),
            tcp_status_timeout: pick.seconds("tcp_status_timeout", given.tcp_status_timeout)?,
            tcp_progress_timeout: pick.seconds("tcp_progress_timeout", given.tcp_progress_timeout)?,
            inspect: if given.flags.get("inspect") == Some(&false) {
                Vec::new()
            } else {
                crate::inspect::folders(|name| pick.env.text(name))
            },
        })
    }
}

struct Pick<'a, 'e> {
    given: &'a Given,
    env: &'a mut Environment<'e>,
}

impl Pick<'_, '_> {
    fn checked(&self, option: &'static str) -> Result<Option<i64>, BuildError> {
        let Some(&value) = self.given.integers.get(option) else { return Ok(None) };
        match variable_of(option) {
            Some(line) if !line.values.holds(value) => Err(refused(option, value, line.values.describe())),
            _ => Ok(Some(value)),
        }
    }

    /// An option without a default.
    fn optional_integer(&mut self, option: &'static str, names: &[&str]) -> Result<Option<i64>, BuildError> {
        if let Some(value) = self.checked(option)? {
            return Ok(Some(value));
        }
        // The second name counts only where the first is unset, not where it is wrong.
        let name = names.iter().find(|name| self.env.present(name));
        Ok(name.and_then(|name| self.env.integer(name)))
    }

    /// An option with a default; the table has it.
    fn integer(&mut self, option: &'static str) -> Result<i64, BuildError> {
        let line = variable_of(option);
        let names: Vec<&str> = line.iter().map(|line| line.name).collect();
        let default = line.and_then(|line| line.default.parse().ok()).unwrap_or(0);
        Ok(self.optional_integer(option, &names)?.unwrap_or(default))
    }

    /// An option of whole seconds in the environment and of any span in the program.
    fn seconds(&mut self, option: &'static str, given: Option<Duration>) -> Result<Duration, BuildError> {
        let Some(span) = given else { return Ok(Duration::from_secs(self.integer(option)? as u64)) };
        match variable_of(option).map(|line| line.values) {
            Some(super::variables::Values::Integers(low, high))
                if span < Duration::from_secs(low as u64) || span > Duration::from_secs(high as u64) =>
            {
                Err(refused(option, format!("{span:?}"), format!("{low} to {high} seconds")))
            }
            _ => Ok(span),
        }
    }

    fn flag(&self, option: &str, name: &str) -> bool {
        self.given.flags.get(option).copied().unwrap_or_else(|| self.env.present(name))
    }

    fn text(&self, option: &str, name: &str) -> Option<String> {
        self.given.texts.get(option).cloned().or_else(|| self.env.text(name)).filter(|text| !text.is_empty())
    }

    fn policy(&self) -> FabricPolicy {
        let FabricPolicy { require, prefer } = self.given.policy;
        let forced = self.env.present("MC_FORCE_HCA") && self.given.policy == FabricPolicy::default();
        FabricPolicy { require: require.or(forced.then_some(Fabric::Rdma)), prefer }
    }

    fn mtu(&mut self) -> Result<Mtu, BuildError> {
        match self.given.mtu {
            Some(Mtu::B256) => Err(refused("mtu", 256, "512, 1024, 2048 or 4096")),
            Some(mtu) => Ok(mtu),
            None => Ok(self.env.integer("MC_MTU").and_then(|b| Mtu::from_bytes(b as u32)).unwrap_or(Mtu::B4096)),
        }
    }

    fn slice_rule(&mut self) -> Result<SliceRule, BuildError> {
        let size = self.integer("slice_size")? as u32;
        let below = |ratio: i64| ratio > 0 && ratio < i64::from(size);
        let fragment = if let Some(ratio) = self.checked("fragment_ratio")? {
            if !below(ratio) {
                return Err(refused("fragment_ratio", ratio, format!("1 to {} (slice size - 1)", size.max(2) - 1)));
            }
            size / ratio as u32
        } else if let Some(text) = self.env.text("MC_FRAGMENT_RATIO") {
            match super::parse::integer(super::parse::Class::Atoi, "MC_FRAGMENT_RATIO", &text) {
                Some(Ok(ratio)) if below(ratio) => size / ratio as u32,
                _ => {
                    self.env.warnings.push(format!(
                        "Ignore value from environment variable MC_FRAGMENT_RATIO, it should be 1 to {}; slice size / 4 holds",
                        size.max(2) - 1
                    ));
                    size / 4
                }
            }
        } else {
            // It does not follow the slice size: so it is upstream, and both ends should cut alike.
            FRAGMENT_LIMIT
        };
        Ok(SliceRule { size, fragment })
    }

    fn rpc_ports(&mut self) -> Result<(u16, u16), BuildError> {
        let fits = |low: i64, high: i64| {
            low <= high && [low, high].iter().all(|port| (1024..=65_535).contains(port) && !EPHEMERAL.contains(port))
        };
        if let Some((low, high)) = self.given.rpc_ports {
            return if fits(low.into(), high.into()) {
                Ok((low, high))
            } else {
                Err(refused("rpc_ports", format!("{low} to {high}"), "1024 to 32767 or 61000 to 65535, first ≤ last"))
            };
        }
        let bound = |names: [&str; 2], default: i64| {
            let text = names.iter().find_map(|name| self.env.text(name))?;
            Some(
                super::parse::integer(super::parse::Class::Atoi, names[0], &text)
                    .and_then(Result::ok)
                    .unwrap_or(default),
            )
        };
        let (low, high) =
            (bound(["MC_MIN_RPC_PORT", "MC_MIN_PRC_PORT"], 0), bound(["MC_MAX_RPC_PORT", "MC_MAX_PRC_PORT"], 0));
        let (low, high) = (low.unwrap_or(15_000), high.unwrap_or(17_000));
        if fits(low, high) {
            return Ok((low as u16, high as u16));
        }
        self.env.warnings.push(format!("Invalid port range [{low}, {high}], falling back to default [15000, 17000]"));
        Ok((15_000, 17_000))
    }

    fn matrix(&self) -> MatrixSource {
        if let Some(json) = &self.given.matrix_json {
            return MatrixSource::Json(json.clone());
        }
        if let Some(path) = &self.given.matrix_file {
            return MatrixSource::File(path.clone());
        }
        match self.env.text(MATRIX_FILE).filter(|path| !path.is_empty()) {
            Some(path) => MatrixSource::EnvironmentFile(PathBuf::from(path)),
            None => MatrixSource::Discovery,
        }
    }

    fn peer_affinity(&mut self) -> Vec<(String, Vec<String>)> {
        if let Some(rules) = &self.given.peer_affinity {
            return rules.clone();
        }
        if self.env.boolean("MC_ENABLE_HCA_PEER_AFFINITY") != Some(true) {
            return Vec::new();
        }
        let (rules, bad) = peer_affinity(&self.env.text("MC_NIC_PEER_AFFINITY").unwrap_or_default());
        for rule in bad {
            self.env.warnings.push(format!(
                "Invalid MC_NIC_PEER_AFFINITY rule '{rule}': it should be LOCAL_NIC=PEER_NIC,PEER_NIC;LOCAL_NIC=PEER_NIC"
            ));
        }
        rules
    }

    fn eviction(&mut self) -> Eviction {
        if let Some(eviction) = self.given.eviction {
            return eviction;
        }
        match self.env.text("MC_ENDPOINT_STORE_TYPE").as_deref() {
            None | Some("SIEVE") => Eviction::LeastRecentlyUsed,
            Some("FIFO") => Eviction::Oldest,
            Some(_) => {
                let name = "MC_ENDPOINT_STORE_TYPE";
                self.env
                    .warnings
                    .push(format!("Ignore value from environment variable {name}, it should be FIFO|SIEVE"));
                Eviction::default()
            }
        }
    }

    fn log_level(&self) -> Level {
        let named = || self.env.text("MC_LOG_LEVEL").and_then(|name| Level::from_name(&name));
        self.given.log_level.or_else(named).unwrap_or(Level::Info)
    }

    fn log_dir(&mut self) -> Option<PathBuf> {
        if let Some(folder) = &self.given.log_dir {
            return Some(folder.clone());
        }
        let folder = PathBuf::from(self.env.text("MC_LOG_DIR").filter(|path| !path.is_empty())?);
        if folder.is_dir() {
            return Some(folder);
        }
        self.env
            .warnings
            .push(format!("Path [{}] is not a valid directory path. Still logging to stderr.", folder.display()));
        None
    }

    fn metrics(&mut self) -> Result<Option<Duration>, BuildError> {
        if let Some(every) = self.given.metrics {
            let whole_day = Duration::from_secs(86_400);
            if every < Duration::from_secs(1) || every > whole_day {
                return Err(refused("metrics", format!("{every:?}"), "1 to 86400 seconds"));
            }
            return Ok(Some(every));
        }
        let on = self
            .env
            .text("MC_TE_METRIC")
            .is_some_and(|text| matches!(text.to_ascii_lowercase().as_str(), "1" | "true" | "yes" | "on"));
        let every = self
            .env
            .integer("MC_TE_METRIC_INTERVAL_SECONDS")
            .or_else(|| variable("MC_TE_METRIC_INTERVAL_SECONDS").and_then(|line| line.default.parse().ok()));
        Ok(every.filter(|_| on).map(|seconds| Duration::from_secs(seconds as u64)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn resolve(given: &Given, pairs: &[(&str, &str)]) -> (Result<Settings, BuildError>, Vec<String>) {
        let read = |name: &str| pairs.iter().find(|(n, _)| *n == name).map(|(_, value)| (*value).to_owned());
        let mut env = Environment::new(&read);
        let settings = Settings::resolve(given, &mut env);
        (settings, env.warnings)
    }

    fn from_env(pairs: &[(&str, &str)]) -> (Settings, Vec<String>) {
        let (settings, warnings) = resolve(&Given::default(), pairs);
        (settings.unwrap(), warnings)
    }

    #[test]
    fn the_defaults_are_those_of_the_stock_engine() {
        let (settings, warnings) = from_env(&[]);
        assert!(warnings.is_empty());
        assert_eq!((settings.ib_port, settings.gid_index, settings.qps_per_rail), (1, None, 2));
        assert_eq!(settings.slices, SliceRule::default());
        assert_eq!((settings.max_wr, settings.max_inline, settings.cq_depth, settings.retries), (256, 64, 4096, 9));
        assert_eq!(settings.max_mr_size, 1 << 40);
        assert_eq!(settings.transfer_timeout, Duration::from_secs(30));
        assert_eq!(settings.rpc_ports, (15_000, 17_000));
        assert!(settings.relaxed_ordering && settings.metadata_cache && settings.metrics.is_none());
    }

    #[test]
    fn the_environment_sets_and_a_wrong_value_warns_in_the_known_words() {
        let (settings, warnings) = from_env(&[
            ("MC_IB_PORT", "2x"),
            ("MC_GID_INDEX", "garbage"),
            ("MC_MTU", "1500"),
            ("MC_NUM_QP_PER_EP", "0"),
            ("MC_IB_TC", "abc"),
            ("MC_HANDSHAKE_MAX_LENGTH", "2097152b"),
            ("MC_SLICE_SIZE", "4096"),
            ("MC_USE_IPV6", ""),
            ("MC_TE_FILTERS", "a, b"),
            ("MC_LOG_LEVEL", "chatty"),
        ]);
        assert_eq!(settings.ib_port, 2);
        assert_eq!(settings.gid_index, Some(0), "garbage is 0 where 0 is legal, as in C");
        assert_eq!((settings.mtu, settings.qps_per_rail, settings.traffic_class), (Mtu::B4096, 2, 0));
        assert_eq!(settings.handshake_max_length, 1 << 20);
        assert_eq!(settings.slices, SliceRule { size: 4096, fragment: 16_384 }, "F does not follow S");
        assert!(settings.ipv6);
        assert_eq!(settings.nic_filter, ["a", "b"]);
        assert_eq!(settings.log_level, Level::Info);
        for expected in [
            "Ignore value from environment variable MC_MTU, it should be 512|1024|2048|4096",
            "Ignore value from environment variable MC_NUM_QP_PER_EP: 0 is outside 1 to 8; 2 holds",
            "Invalid MC_IB_TC environment value: abc. Error: stoi",
            "Ignore value from environment variable MC_HANDSHAKE_MAX_LENGTH",
        ] {
            assert!(warnings.iter().any(|w| w == expected), "{expected} not in {warnings:?}");
        }
    }

    #[test]
    fn the_program_wins_and_its_wrong_value_is_an_error_with_the_range() {
        let mut given = Given::default();
        given.integers.insert("ib_port", 3);
        assert_eq!(resolve(&given, &[("MC_IB_PORT", "2")]).0.unwrap().ib_port, 3);
        given.integers.insert("qps_per_rail", 9);
        let error = resolve(&given, &[]).0.unwrap_err().to_string();
        assert_eq!(error, "qps_per_rail = 9 is not possible: it takes 1 to 8");
        let given = Given { transfer_timeout: Some(Duration::from_secs(1)), ..Given::default() };
        assert!(resolve(&given, &[]).0.unwrap_err().to_string().contains("5 to 86400 seconds"));
    }

    #[test]
    fn rails_are_kept_without_a_limit_of_ours_unless_one_is_set() {
        let limit = |pairs: &[(&str, &str)]| {
            let (settings, warnings) = from_env(pairs);
            (settings.rails_per_nic, settings.eviction, warnings.len())
        };
        assert_eq!(limit(&[]), (65_536, Eviction::LeastRecentlyUsed, 0));
        assert_eq!(
            limit(&[("MC_MAX_EP_PER_CTX", "64"), ("MC_ENDPOINT_STORE_TYPE", "FIFO")]),
            (64, Eviction::Oldest, 0)
        );
        let wrong = [("MC_MAX_EP_PER_CTX", "none"), ("MC_ENDPOINT_STORE_TYPE", "fifo")];
        assert_eq!(
            limit(&wrong),
            (65_536, Eviction::LeastRecentlyUsed, 2),
            "0 is no limit, and case counts, as upstream"
        );
        let given = Given { integers: [("rails_per_nic", 0)].into(), ..Given::default() };
        let error = resolve(&given, &[]).0.unwrap_err().to_string();
        assert_eq!(error, "rails_per_nic = 0 is not possible: it takes 1 to 65535");
    }

    #[test]
    fn fragments_follow_the_ratio_only() {
        assert_eq!(from_env(&[("MC_FRAGMENT_RATIO", "8")]).0.slices.fragment, 8192);
        let (settings, warnings) = from_env(&[("MC_FRAGMENT_RATIO", "65536")]);
        assert_eq!((settings.slices.fragment, warnings.len()), (16_384, 1));
    }

    #[test]
    fn port_ranges_are_taken_whole_or_not() {
        assert_eq!(
            from_env(&[("MC_MIN_PRC_PORT", "20000"), ("MC_MAX_RPC_PORT", "20010")]).0.rpc_ports,
            (20_000, 20_010)
        );
        let (settings, warnings) = from_env(&[("MC_MIN_RPC_PORT", "40000"), ("MC_MAX_RPC_PORT", "41000")]);
        assert_eq!(settings.rpc_ports, (15_000, 17_000));
        assert_eq!(warnings, ["Invalid port range [40000, 41000], falling back to default [15000, 17000]"]);
    }

    #[test]
    fn variables_without_meaning_are_named_once() {
        let read = |name: &str| (name == "MC_WORKERS_PER_CTX" || name == "MC_TCP_SLICE_SIZE").then(String::new);
        let line = Environment::new(&read).ignored().unwrap();
        assert!(line.contains("MC_WORKERS_PER_CTX (") && line.contains("MC_TCP_SLICE_SIZE ("), "{line}");
        assert!(Environment::new(&|_| None).ignored().is_none());
    }

    #[test]
    fn gid_index_of_nccl_counts_only_where_ours_is_unset() {
        assert_eq!(from_env(&[("NCCL_IB_GID_INDEX", "3")]).0.gid_index, Some(3));
        let (settings, warnings) = from_env(&[("MC_GID_INDEX", "300"), ("NCCL_IB_GID_INDEX", "3")]);
        assert_eq!((settings.gid_index, warnings.len()), (None, 1));
    }
}
