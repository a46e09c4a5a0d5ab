//! What a node was told, after defaults and environment: for tools that look at a set-up before anything is started.

use moonrail_control::metadata::MetadataUri;
use moonrail_control::metadata::uri::UriError;
use moonrail_control::names::HostPort;
use moonrail_control::place::{Place, Published};
use moonrail_control::{FabricPolicy, StartError};
use moonrail_datapath::nic::Fabric;
use moonrail_datapath::units::{GidIndex, Mtu, PortNum};

use super::{Environment, Settings};
use crate::builder::EngineBuilder;
use crate::error::BuildError;
use crate::start::own_name;

/// The options of an [`EngineBuilder`] that say who and where a node is.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Resolved {
    /// Its name; without a port where it was given none.
    pub name: String,
    /// Where metadata is, or why that cannot be read.
    pub metadata: Result<MetadataUri, UriError>,
    /// The cluster in it (`MC_METADATA_CLUSTER_ID`); empty: none.
    pub cluster_id: String,
    /// The address to publish, if one was given (`MC_TCP_BIND_ADDRESS`).
    pub publish_host: Option<String>,
    /// The handshake port, if it is the one in the name.
    pub fixed_port: Option<u16>,
    /// Else it is drawn from these, both included.
    pub rpc_ports: (u16, u16),
    /// Port of names that have none (`MC_HANDSHAKE_PORT`).
    pub handshake_port: u16,
    /// IPv6 instead of IPv4.
    pub ipv6: bool,
    /// Port of the RDMA devices (`MC_IB_PORT`).
    pub ib_port: PortNum,
    /// Fixed place in the GID table (`MC_GID_INDEX`); `None`: the best is chosen.
    pub gid_index: Option<GidIndex>,
    /// Largest path MTU to use (`MC_MTU`).
    pub mtu: Mtu,
    /// Fabrics the node has at all; `None`: shared memory, RDMA, and TCP where there is no RDMA NIC.
    pub fabrics: Option<Vec<Fabric>>,
    /// Which of them is a must, or goes first.
    pub policy: FabricPolicy,
    /// What is odd about the environment, in words.
    pub warnings: Vec<String>,
}

impl Resolved {
    pub(crate) fn of(builder: &EngineBuilder) -> Result<Self, BuildError> {
        let read = builder.environment_read();
        let mut env = Environment::new(&read);
        let settings = Settings::resolve(&builder.given, &mut env)?;
        let metadata = MetadataUri::parse(builder.metadata.as_deref().unwrap_or("P2PHANDSHAKE"));
        let peer_to_peer = metadata == Ok(MetadataUri::PeerToPeer);
        let name = builder.name.clone().unwrap_or_else(|| own_name(peer_to_peer, settings.ipv6));
        let port_of = |name: &str| {
            HostPort::parse_with(name, settings.handshake_port).map_or(settings.handshake_port, |own| own.address.port)
        };
        let fixed_port = settings.rpc_port_from_name.then(|| port_of(&name));
        Ok(Self {
            fixed_port,
            name,
            metadata,
            cluster_id: settings.cluster_id,
            publish_host: settings.publish_host,
            rpc_ports: settings.rpc_ports,
            handshake_port: settings.handshake_port,
            ipv6: settings.ipv6,
            ib_port: PortNum(settings.ib_port),
            gid_index: settings.gid_index.map(GidIndex),
            mtu: settings.mtu,
            fabrics: settings.fabrics,
            policy: settings.policy,
            warnings: env.warnings,
        })
    }

    /// The host that peers would be told, by the same rule as when an engine starts.
    ///
    /// # Errors
    /// Why none can be told: see [`StartError`].
    pub fn published(&self) -> Result<Published, StartError> {
        let unreadable = MetadataUri::PeerToPeer;
        Place {
            name: &self.name,
            metadata: self.metadata.as_ref().unwrap_or(&unreadable),
            publish: self.publish_host.as_deref(),
            fixed_port: self.fixed_port.is_some(),
            ipv6: self.ipv6,
        }
        .host()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Engine;

    #[test]
    fn the_environment_counts_where_the_program_is_silent() {
        let env = |name: &str| match name {
            "MC_IB_PORT" => Some("2".to_owned()),
            "MC_MTU" => Some("1500".to_owned()),
            "MC_METADATA_CLUSTER_ID" => Some("c1".to_owned()),
            _ => None,
        };
        let builder =
            Engine::builder().name("10.0.0.1:7").rpc_port_from_name(true).metadata("etcd://h").environment(env);
        let resolved = builder.resolved().unwrap();
        assert_eq!((resolved.fixed_port, resolved.ib_port, resolved.gid_index), (Some(7), PortNum(2), None));
        assert_eq!((resolved.cluster_id.as_str(), resolved.rpc_ports), ("c1", (15_000, 17_000)));
        assert!(resolved.warnings.iter().any(|w| w.contains("MC_MTU")), "{:?}", resolved.warnings);
        let loopback = Engine::builder().name("127.0.0.1").environment(|_| None).resolved().unwrap();
        assert!(loopback.published().unwrap().warning.is_some());
        let foreign = Engine::builder().name("192.0.2.77").environment(|_| None).resolved().unwrap();
        assert!(foreign.published().unwrap_err().to_string().contains("not an address of this host"));
    }
}
