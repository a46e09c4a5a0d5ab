//! Which address of this node its peers are told.

use std::net::{IpAddr, ToSocketAddrs};

use crate::error::StartError;
use crate::metadata::{MetadataUri, StoreUri};
use crate::names::{self, Family, HostPort, OwnAddressError};

/// What decides it.
#[derive(Clone, Copy, Debug)]
pub struct Place<'a> {
    /// The node's name.
    pub name: &'a str,
    /// Where the cluster's metadata is.
    pub metadata: &'a MetadataUri,
    /// The address to publish, if the user says so (`MC_TCP_BIND_ADDRESS`).
    pub publish: Option<&'a str>,
    /// Whether the port is the one in the name (`MC_LEGACY_RPC_PORT_BINDING`): then the name is an address.
    pub fixed_port: bool,
    /// IPv6 instead of IPv4 (`MC_USE_IPV6`).
    pub ipv6: bool,
}

/// What peers are told.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Published {
    /// An address, or a name that each peer looks up itself.
    pub host: String,
    /// Only nodes of this host can reach it, which is meant when the metadata is on this host, too.
    pub warning: Option<OwnAddressError>,
}

impl Place<'_> {
    /// The host that is published: the one that was given, else the address of this host towards the store.
    ///
    /// # Errors
    /// The name is none, there is no address, or it is loopback, none, or another host's.
    pub fn host(&self) -> Result<Published, StartError> {
        let own = HostPort::parse(self.name)?;
        let by_name = *self.metadata == MetadataUri::PeerToPeer || self.fixed_port;
        let host = match self.publish {
            Some(host) => host.to_owned(),
            None if by_name => own.host,
            None => self.towards_the_store()?.to_string(),
        };
        let warning = self.check(&host)?;
        Ok(Published { host, warning })
    }

    fn towards_the_store(&self) -> Result<IpAddr, StartError> {
        let (family, loopback) = if self.ipv6 { (Family::V6, "::1") } else { (Family::V4, "127.0.0.1") };
        let to = store_address(self.metadata);
        // With the store on loopback the cluster is this machine; then loopback will do.
        let on_loopback = to.is_some_and(|ip| ip.is_loopback()) || is_memory(self.metadata);
        let loopback = || on_loopback.then(|| loopback.parse().ok()).flatten();
        names::published_address(to, family).or_else(loopback).ok_or(StartError::NoAddress)
    }

    fn check(&self, host: &str) -> Result<Option<OwnAddressError>, StartError> {
        let Some(ip) = (HostPort { host: host.to_owned(), port: 0 }).ip() else {
            // A name: whose it is depends on each peer's resolver.
            return Ok(None);
        };
        let Err(error) = names::check_own_address(host, ip) else { return Ok(None) };
        let one_machine = match self.metadata {
            MetadataUri::PeerToPeer => true,
            other @ MetadataUri::Store(_) => {
                is_memory(other) || store_address(other).is_some_and(|ip| ip.is_loopback())
            }
        };
        match error {
            OwnAddressError::Loopback { .. } if one_machine => Ok(Some(error)),
            error => Err(error.into()),
        }
    }
}

fn is_memory(metadata: &MetadataUri) -> bool {
    matches!(metadata, MetadataUri::Store(StoreUri::Memory(_)))
}

/// Where the store is, as far as that can be told without waiting for a resolver for long.
fn store_address(metadata: &MetadataUri) -> Option<IpAddr> {
    let MetadataUri::Store(uri) = metadata else { return None };
    let endpoint = match uri {
        StoreUri::Etcd(endpoints) => endpoints.first()?,
        StoreUri::Http(base) => base,
        StoreUri::Memory(_) => return None,
    };
    let rest = endpoint.split_once("://").map_or(endpoint.as_str(), |(_, rest)| rest);
    let HostPort { host, port } = HostPort::parse(rest.split('/').next()?).ok()?;
    match host.parse() {
        Ok(ip) => Some(ip),
        Err(_) if host == "localhost" => (host.as_str(), port).to_socket_addrs().ok()?.next().map(|a| a.ip()),
        Err(_) => None,
    }
}
