//! Metadata without a store: a segment's name *is* its node's handshake address, `host:port` or `[v6]:port`.
//!
//! Resolving a name is one exchange of message type 1: our descriptor for the peer's. Nothing is published; a change
//! reaches a peer when it asks again. Pure: the driver makes the connection.

use super::descriptor::{DescriptorError, SegmentDescriptor};
use super::rpc_meta::RpcMeta;
use crate::names::{HostPort, NameError};

/// Where to ask for the segment of this name; names without a port have the default one.
///
/// # Errors
/// The name cannot be an address.
pub fn address(segment_name: &str) -> Result<RpcMeta, NameError> {
    let HostPort { host, port } = HostPort::parse(segment_name)?;
    Ok(RpcMeta { ip_or_host_name: host, rpc_port: port })
}

/// The name of a node that listens on `port`: the host its user gave, whatever port was given with it.
///
/// # Errors
/// The given name cannot be an address.
pub fn own_name(given: &str, port: u16) -> Result<String, NameError> {
    let HostPort { host, .. } = HostPort::parse(given)?;
    Ok(HostPort { host, port }.to_string())
}

/// Body of the request: our own descriptor, or an empty object when we have none to show. Peers ignore it.
pub fn request(own: Option<&SegmentDescriptor>) -> Vec<u8> {
    own.map_or_else(|| b"{}\n".to_vec(), SegmentDescriptor::encode)
}

/// Body of the reply: our own descriptor, or `null` when there is none (or a store holds it).
pub fn reply(own: Option<&SegmentDescriptor>) -> Vec<u8> {
    own.map_or_else(|| crate::wire::notify::NULL_REPLY.to_vec(), SegmentDescriptor::encode)
}

/// Reads the reply for the segment that was asked for under `asked`.
///
/// The descriptor's own name may be another one: it is the one for NIC paths and notifications, and both lead to the
/// same node.
///
/// # Errors
/// See [`DescriptorError`]; [`DescriptorError::Null`] when the peer has none.
pub fn read_reply(body: &[u8]) -> Result<SegmentDescriptor, DescriptorError> {
    SegmentDescriptor::decode(body)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_an_address() {
        let meta = |host: &str, port| RpcMeta { ip_or_host_name: host.into(), rpc_port: port };
        assert_eq!(address("10.0.0.1:15001").unwrap(), meta("10.0.0.1", 15001));
        assert_eq!(address("[fe80::1%eth0]:9").unwrap(), meta("fe80::1%eth0", 9));
        assert_eq!(own_name("10.0.0.1:1", 15002).unwrap(), "10.0.0.1:15002");
        assert_eq!(own_name("::1", 15002).unwrap(), "[::1]:15002");
    }

    #[test]
    fn a_node_without_a_segment_says_null() {
        assert_eq!(read_reply(&reply(None)), Err(DescriptorError::Null));
        assert_eq!(request(None), b"{}\n");
    }
}
