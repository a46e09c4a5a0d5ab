//! What a peer says of itself, looked at from here: its address, its keys in the store, its memory, and of each NIC its GID, LID
//! and MTU. A moonrail node says more than a stock one. What is not said is skipped, never guessed.

use std::net::IpAddr;

use moonrail::{Mtu, PortInfo};
use moonrail_control::metadata::{DeviceEntry, Protocol, RpcMeta, SegmentDescriptor};
use moonrail_control::names::{self, HostPort, OwnAddress};

use super::finding::Finding;
use super::{own, peer};
use crate::units::size;

/// Where a peer is, and what the store has of it.
#[derive(Clone, Debug)]
pub struct Place {
    /// The name it was asked for by.
    pub name: String,
    /// Its handshake port.
    pub meta: RpcMeta,
    /// `None`: there is no store, or no descriptor in it.
    pub stored: Option<Stored>,
}

/// A peer's keys.
#[derive(Clone, Debug)]
pub struct Stored {
    /// Its segment.
    pub descriptor: SegmentDescriptor,
    /// Those of its keys that stay until somebody deletes them, in a store that has leases.
    pub without_lease: Vec<String>,
}

/// This host.
#[derive(Clone, Debug)]
pub struct Here {
    /// The kernel's boot id; `None` where there is none to read.
    pub boot_id: Option<String>,
}

impl Here {
    /// Asks the kernel, as the engine does.
    pub fn read() -> Self {
        let text = std::fs::read_to_string("/proc/sys/kernel/random/boot_id");
        Self { boot_id: text.ok().map(|text| text.trim().to_owned()).filter(|text| !text.is_empty()) }
    }

    /// Whether the node that published this runs under our kernel; `None`: it does not say, as stock nodes do not.
    fn has(&self, published: &SegmentDescriptor) -> Option<bool> {
        Some(*published.extra.boot_id.as_ref()? == *self.boot_id.as_ref()?)
    }
}

/// Whether it was written by a moonrail node.
fn is_moonrail(descriptor: &SegmentDescriptor) -> bool {
    !descriptor.extra.is_empty()
}

/// What the store has of the peer, before anybody is asked.
pub fn of_store(place: &Place, here: &Here) -> Vec<Finding> {
    let Some(Stored { descriptor, without_lease }) = &place.stored else { return Vec::new() };
    let mut found = vec![
        address(&place.meta.ip_or_host_name, here.has(descriptor)),
        lease(is_moonrail(descriptor), without_lease),
        name(place, descriptor),
    ];
    if let Protocol::Other(protocol) = &descriptor.protocol {
        found.push(Finding::fail(
            "peer's segment",
            format!("its protocol is {protocol:?}: moonrail speaks rdma and tcp, with stock nodes too"),
            "start that node with --protocol rdma or tcp",
        ));
    }
    found
}

/// What a peer without a store says: its own name is its address, and what other nodes go by.
pub fn of_itself(place: &Place, descriptor: &SegmentDescriptor, here: &Here) -> Vec<Finding> {
    let parsed = HostPort::parse(&descriptor.name).map_or_else(|_| descriptor.name.clone(), |at| at.host);
    vec![address(&parsed, here.has(descriptor)), name(place, descriptor)]
}

/// The address that everybody is told to go to.
fn address(host: &str, same_host: Option<bool>) -> Finding {
    const CHECK: &str = "peer's address";
    const NEXT: &str = "start that node with an address that others reach: --name HOST, or MC_TCP_BIND_ADDRESS";
    let found = match (HostPort { host: host.to_owned(), port: 0 }).ip() {
        Some(ip) => vec![ip],
        // That a name has no address here is said where it is dialled.
        None => own::lookup(host).unwrap_or_default(),
    };
    if found.is_empty() {
        return Finding::skip(CHECK, format!("{host} has no address on this host"));
    }
    let all = |what| found.iter().all(|ip: &IpAddr| names::own_address(*ip) == what);
    match (all(OwnAddress::Loopback), all(OwnAddress::Usable), same_host) {
        (true, _, Some(true)) => Finding::pass(CHECK, format!("{host} is loopback, and the node runs on this host")),
        (true, _, Some(false)) => Finding::fail(
            CHECK,
            format!(
                "it publishes {host}, a loopback address, and runs on another host: who goes there reaches himself"
            ),
            NEXT,
        ),
        (true, _, None) => Finding::warn(
            CHECK,
            format!(
                "it publishes {host}, a loopback address: only nodes of its own host reach it (it does not say which that is)"
            ),
            NEXT,
        ),
        (_, true, Some(false)) => Finding::fail(
            CHECK,
            format!("it publishes {host}, an address of this host, and runs on another: who goes there meets this one"),
            format!("{NEXT}; if both hosts have it, one of them must give it up (ip address)"),
        ),
        (_, true, _) => Finding::pass(CHECK, format!("{host}, an address of this host")),
        _ => Finding::pass(CHECK, format!("{host}, an address of another host")),
    }
}

/// Keys that outlive their node.
fn lease(moonrail: bool, without: &[String]) -> Finding {
    const CHECK: &str = "peer's lease";
    match (moonrail, without) {
        (_, []) => Finding::pass(CHECK, "its keys go away by themselves, or its store has no leases"),
        (false, _) => Finding::skip(CHECK, "a stock node's keys have none: they stay when it is gone"),
        (true, keys) => Finding::warn(
            CHECK,
            format!(
                "{} has no lease, though a moonrail node wrote it: put back by hand or from a backup, it may be of a life that is over",
                keys.join(", ")
            ),
            format!("etcdctl del {}: if the node runs, it publishes itself again", keys.join(" ")),
        ),
    }
}

/// It is called inside as outside: NIC paths, notifications and refreshes go by the name inside.
fn name(place: &Place, descriptor: &SegmentDescriptor) -> Finding {
    const CHECK: &str = "peer's own name";
    let inside = &descriptor.name;
    if inside.is_empty() || *inside == place.name {
        return Finding::pass(CHECK, place.name.clone());
    }
    if place.stored.is_none() {
        // Without a store a name is an address, and a host has several.
        return Finding::pass(CHECK, format!("asked for as {}, it calls itself {inside}", place.name));
    }
    Finding::warn(
        CHECK,
        format!("asked for as {}, it calls itself {inside}: queue pairs and notifications go by that name", place.name),
        format!("open it as {inside}, or start it under the name that others use"),
    )
}

/// What it offers.
pub fn memory(descriptor: &SegmentDescriptor) -> Finding {
    const CHECK: &str = "peer's segment";
    let buffers = &descriptor.buffers;
    let bytes: u64 = buffers.iter().map(|buffer| buffer.length).fold(0, u64::saturating_add);
    let text = format!("{} buffers, {}, {} NICs", buffers.len(), size(bytes), descriptor.devices.len());
    let closed =
        buffers.iter().filter(|buffer| descriptor.protocol == Protocol::Rdma && buffer.rkeys.is_empty()).count();
    if buffers.is_empty() {
        return Finding::warn(CHECK, format!("{text}: it offers nothing to read or write"), "register memory there");
    }
    // Without an RDMA NIC there are no keys to miss.
    if closed == buffers.len() && !descriptor.devices.is_empty() {
        return Finding::warn(
            CHECK,
            format!("{text}, none of them for peers (no rkey)"),
            "register it with remote access",
        );
    }
    Finding::pass(CHECK, text)
}

/// Each of its RDMA NICs, beside ours.
pub fn nics(descriptor: &SegmentDescriptor, ours: &[(String, PortInfo)], here: &Here) -> Vec<Finding> {
    let same_host = here.has(descriptor);
    let mut found = Vec::new();
    if ours.is_empty() {
        return found;
    }
    for device in &descriptor.devices {
        let about = |finding: Finding| finding.about(device.name.as_str());
        found.push(about(gid(device, ours, same_host)));
        found.extend(lid(device, ours).map(about));
        found.push(about(mtu(descriptor, device, ours)));
        let named = descriptor.priority_matrix.names();
        if !named.is_empty() && !named.contains(device.name.as_str()) {
            found.push(about(Finding::warn(
                "peer's port",
                "it is left out of its node's priority matrix: stock nodes do that with a NIC whose port went down",
                "there: rdma link, ip link, cable and switch port",
            )));
        }
    }
    found
}

fn gid(device: &DeviceEntry, ours: &[(String, PortInfo)], same_host: Option<bool>) -> Finding {
    const CHECK: &str = "peer's GID";
    let Some(gid) = device.gid.gid().filter(|gid| !gid.is_zero()) else {
        if device.lid.0 != 0 {
            return Finding::pass(CHECK, format!("none; LID {} is its address", device.lid));
        }
        return Finding::warn(
            CHECK,
            "NULL: that node could not use the NIC, or its port has no address",
            "there: moonrail nics, and an address for the net device (ip address)",
        );
    };
    let ip = peer::canonical(gid);
    if let Some((nic, _)) = ours.iter().find(|(_, port)| port.gid == gid && same_host == Some(false)) {
        return Finding::fail(
            CHECK,
            format!("{ip} is also that of our {nic}, and the node runs on another host: one address twice"),
            "give one of the two another address (ip address)",
        );
    }
    if ip.is_loopback() {
        return Finding::fail(CHECK, format!("{ip} is loopback"), "there: another GID index (moonrail nics)");
    }
    let infiniband = ours.iter().any(|(_, port)| port.lid.0 != 0);
    if !infiniband && ours.iter().all(|(_, port)| peer::canonical(port.gid).is_ipv4() != ip.is_ipv4()) {
        let (theirs, mine) = if ip.is_ipv4() { ("IPv4", "IPv6") } else { ("IPv6", "IPv4") };
        return Finding::fail(
            CHECK,
            format!("{ip} is {theirs}, every GID of ours is {mine}: no packet has both"),
            "unset MC_GID_INDEX on both sides, or choose entries of one kind (moonrail nics)",
        );
    }
    if !infiniband && matches!(ip, IpAddr::V6(ip) if ip.is_unicast_link_local()) {
        return Finding::warn(
            CHECK,
            format!("{ip} is link-local: it is reached within one network only"),
            "there: unset MC_GID_INDEX, or give the net device a routable address",
        );
    }
    Finding::pass(CHECK, ip.to_string())
}

/// `None` between Ethernet ports, which have no LID.
fn lid(device: &DeviceEntry, ours: &[(String, PortInfo)]) -> Option<Finding> {
    const CHECK: &str = "peer's LID";
    let infiniband = ours.iter().any(|(_, port)| port.lid.0 != 0);
    match (infiniband, device.lid.0) {
        (false, 0) => None,
        (false, lid) => Some(Finding::fail(
            CHECK,
            format!("{lid}: its port is InfiniBand, ours are Ethernet: they cannot reach each other"),
            "NICs of one link layer on both sides (--nics)",
        )),
        (true, 0) => Some(Finding::fail(
            CHECK,
            "0: no subnet manager has given its port an address, or it is Ethernet and ours is InfiniBand",
            "there: moonrail nics; opensm, or the subnet manager of the switch",
        )),
        (true, lid) => Some(Finding::pass(CHECK, lid.to_string())),
    }
}

fn mtu(descriptor: &SegmentDescriptor, device: &DeviceEntry, ours: &[(String, PortInfo)]) -> Finding {
    const CHECK: &str = "peer's MTU";
    let here: std::collections::BTreeSet<Mtu> = ours.iter().map(|(_, port)| port.mtu).collect();
    let listed = here.iter().map(Mtu::to_string).collect::<Vec<_>>().join(", ");
    let Some(theirs) = descriptor.extra.path_mtus.get(&device.name) else {
        return Finding::skip(
            CHECK,
            format!("a stock node does not say; MC_MTU must be the same on both sides (here {listed})"),
        );
    };
    match here.iter().find(|mtu| *mtu != theirs) {
        None => Finding::pass(CHECK, format!("path MTU {theirs}, as here")),
        Some(other) => Finding::warn(
            CHECK,
            format!("path MTU {theirs} there, {listed} here: rails use {}", theirs.min(other)),
            format!(
                "ip link set NETDEV mtu {} on the side that has less, and on the switch; or leave it: it works",
                theirs.max(other).bytes() + 104
            ),
        ),
    }
}

/// The port of the TCP data protocol, if it serves that.
pub fn data_port(descriptor: &SegmentDescriptor, meta: &RpcMeta) -> Option<Finding> {
    const CHECK: &str = "peer's data port";
    let (host, port) = match (&descriptor.extra.tcp, descriptor.protocol == Protocol::Tcp) {
        (Some(place), _) => (place.host.clone(), place.port),
        (None, true) => (descriptor.tcp_data_host.clone(), u16::try_from(descriptor.tcp_data_port).unwrap_or(0)),
        (None, false) => return None,
    };
    let host = if host.is_empty() { meta.ip_or_host_name.clone() } else { host };
    if port == 0 {
        return None;
    }
    let at = RpcMeta { ip_or_host_name: host, rpc_port: port };
    Some(peer::connect(CHECK, &at).map_or_else(|finding| finding, |((), finding)| finding))
}

#[cfg(test)]
mod tests {
    use super::super::finding::Verdict::{Fail, Pass, Skip, Warn};
    use super::*;
    use moonrail::{Gid, GidIndex, Lid, PortNum};

    /// What a stock engine really put into etcd for two Soft-RoCE NICs, rxe0 and rxe1.
    fn stock() -> SegmentDescriptor {
        let text = concat!(
            r#"{"buffers":[{"addr":140570018185216,"length":65536,"lkey":[544,545],"name":"cpu:0","rkey":[544,545]}],"#,
            r#""devices":[{"gid":"00:00:00:00:00:00:00:00:00:00:ff:ff:0a:00:00:01","lid":0,"name":"rxe0"},"#,
            r#"{"gid":"00:00:00:00:00:00:00:00:00:00:ff:ff:0a:00:01:01","lid":0,"name":"rxe1"}],"name":"10.0.0.1:12345","#,
            r#""priority_matrix":{"cpu:0":[[],["rxe0","rxe1"]]},"protocol":"rdma","tcp_data_port":0,"tcp_proto_version":1}"#
        );
        SegmentDescriptor::decode(text.as_bytes()).unwrap()
    }

    fn ours(gid: &str, lid: u16, mtu: Mtu) -> Vec<(String, PortInfo)> {
        let gid: Gid = gid.parse().unwrap();
        let port = PortInfo { number: PortNum(1), lid: Lid(lid), gid_index: GidIndex(1), gid, mtu };
        vec![("rxe0".to_owned(), port)]
    }

    const V4: &str = "00:00:00:00:00:00:00:00:00:00:ff:ff:0a:00:00:02";

    fn here() -> Here {
        Here { boot_id: Some("this".into()) }
    }

    fn worst<'a>(found: &'a [Finding], check: &str) -> &'a Finding {
        let of = found.iter().filter(|finding| finding.check == check);
        of.max_by_key(|finding| finding.verdict).unwrap_or_else(|| panic!("no {check}: {found:#?}"))
    }

    #[test]
    fn an_address_is_judged_by_where_its_node_runs() {
        let said = |host: &str, same| address(host, same).verdict;
        assert_eq!([Some(true), Some(false), None].map(|same| said("127.0.0.1", same)), [Pass, Fail, Warn]);
        assert_eq!([Some(true), Some(false), None].map(|same| said("192.0.2.77", same)), [Pass; 3]);
        if let Some(own) = names::host_addresses().first() {
            let own = own.to_string();
            assert_eq!([Some(true), Some(false), None].map(|same| said(&own, same)), [Pass, Fail, Pass]);
        }
        assert_eq!(said("no-such-host.invalid", None), Skip);
    }

    #[test]
    fn keys_without_a_lease_and_another_name_inside() {
        let key = ["mooncake/ram/a".to_owned()];
        assert_eq!(
            [(true, &key[..]), (false, &key), (true, &[])].map(|(m, k)| lease(m, k).verdict),
            [Warn, Skip, Pass]
        );
        let place = |name: &str, stored: bool| Place {
            name: name.into(),
            meta: RpcMeta { ip_or_host_name: "10.0.0.1".into(), rpc_port: 1 },
            stored: stored.then(|| Stored { descriptor: stock(), without_lease: Vec::new() }),
        };
        assert_eq!(name(&place("10.0.0.1:12345", true), &stock()).verdict, Pass);
        assert_eq!(name(&place("node0:12345", false), &stock()).verdict, Pass);
        let other = name(&place("a", true), &stock());
        assert!(other.verdict == Warn && other.next.unwrap().contains("10.0.0.1:12345"), "{}", other.evidence);
    }

    #[test]
    fn a_stock_peers_nics_beside_ours() {
        let healthy = nics(&stock(), &ours(V4, 0, Mtu::B4096), &here());
        assert_eq!((worst(&healthy, "peer's GID").verdict, worst(&healthy, "peer's MTU").verdict), (Pass, Skip));
        assert!(healthy.iter().all(|finding| finding.check != "peer's LID"), "{healthy:#?}");
        assert_eq!(nics(&stock(), &[], &here()), [], "nothing to compare with");

        let mut odd = stock();
        odd.devices[0].gid = Gid([0; 16]).into();
        odd.devices[1].lid = Lid(7);
        odd.priority_matrix.0.get_mut("cpu:0").unwrap().available.pop();
        let found = nics(&odd, &ours(V4, 0, Mtu::B4096), &here());
        assert!(worst(&found, "peer's GID").evidence.contains("NULL"), "{found:#?}");
        assert_eq!((worst(&found, "peer's LID").verdict, worst(&found, "peer's port").verdict), (Fail, Warn));
        let infiniband = nics(&odd, &ours(V4, 3, Mtu::B4096), &here());
        assert!(worst(&infiniband, "peer's LID").evidence.contains("subnet manager"), "{infiniband:#?}");

        let v6 = "fe:80:00:00:00:00:00:00:50:54:00:ff:fe:00:00:02";
        assert!(worst(&nics(&stock(), &ours(v6, 0, Mtu::B4096), &here()), "peer's GID").evidence.contains("IPv6"));
        let mut local = stock();
        local.devices[0].gid = v6.parse::<Gid>().unwrap().into();
        let found = nics(&local, &ours(&v6.replace(":02", ":03"), 0, Mtu::B4096), &here());
        assert!(found.iter().any(|f| f.verdict == Warn && f.evidence.contains("link-local")), "{found:#?}");
    }

    #[test]
    fn a_moonrail_peer_says_its_mtu_and_its_host() {
        let mut peer = stock();
        peer.extra.boot_id = Some("another".into());
        peer.extra.path_mtus = ["rxe0", "rxe1"].map(|name| (name.to_owned(), Mtu::B1024)).into();
        let found = nics(&peer, &ours(V4, 0, Mtu::B4096), &here());
        let mtu = worst(&found, "peer's MTU");
        assert!(mtu.verdict == Warn && mtu.evidence.contains("rails use 1024"), "{mtu:?}");
        assert_eq!(worst(&nics(&peer, &ours(V4, 0, Mtu::B1024), &here()), "peer's MTU").verdict, Pass);
        let twice = ours(&V4.replace(":02", ":01"), 0, Mtu::B1024);
        assert!(worst(&nics(&peer, &twice, &here()), "peer's GID").evidence.contains("one address twice"));
        peer.extra.boot_id = here().boot_id;
        assert_eq!(worst(&nics(&peer, &twice, &here()), "peer's GID").verdict, Pass, "it is our own host");
    }

    #[test]
    fn memory_that_is_not_offered() {
        let mut peer = stock();
        assert_eq!(memory(&peer).verdict, Pass);
        peer.buffers[0].rkeys.clear();
        assert_eq!(memory(&peer).verdict, Warn);
        peer.buffers.clear();
        assert!(memory(&peer).evidence.contains("offers nothing"));
        assert_eq!(data_port(&peer, &RpcMeta { ip_or_host_name: "127.0.0.1".into(), rpc_port: 1 }), None);
    }
}
