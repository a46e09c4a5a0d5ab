//! Who answers ARP for whom. A NIC takes only what is for its own address. Linux by default answers on each interface for all of the
//! host's addresses (ip-sysctl, `arp_ignore` and `arp_announce`), so that of two NICs in one network the wrong one may be found:
//! TCP does not mind, and a rail connects and carries nothing.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr};
use std::path::Path;

use super::finding::Finding;

const STRICT: &str =
    "sysctl -w net.ipv4.conf.all.arp_ignore=1 net.ipv4.conf.all.arp_announce=2, and in /etc/sysctl.d to stay";

/// Two of our NICs in one network, and how each answers for the other. Nothing where no network has two of `nics`, which are RDMA
/// devices and the network interfaces of their GIDs.
pub fn strict(nics: &[(String, String)], proc: &Path) -> Option<Finding> {
    const CHECK: &str = "ARP";
    let networks = networks(&std::fs::read_to_string(proc.join("net/route")).unwrap_or_default());
    let mut of_network: BTreeMap<&str, Vec<&(String, String)>> = BTreeMap::new();
    for (interface, network) in &networks {
        let here = nics.iter().filter(|(_, of)| of == interface);
        of_network.entry(network.as_str()).or_default().extend(here);
    }
    let (network, shared) = of_network.into_iter().find(|(_, nics)| nics.len() > 1)?;
    let listed: Vec<String> = shared.iter().map(|(device, interface)| format!("{device} ({interface})")).collect();
    let listed = listed.join(", ");
    let lax = shared.iter().find_map(|(_, interface)| {
        let (ignore, announce) =
            (effective(proc, interface, "arp_ignore")?, effective(proc, interface, "arp_announce")?);
        (ignore == 0 || announce < 2).then(|| format!("{interface} has arp_ignore {ignore}, arp_announce {announce}"))
    });
    Some(match lax {
        Some(lax) => Finding::warn(
            CHECK,
            format!(
                "{listed} are in one network, {network}, and {lax}: one answers for the address of the other, and what then arrives at \
                 the wrong NIC is dropped"
            ),
            STRICT,
        ),
        None => Finding::pass(CHECK, format!("{listed} are in one network, {network}, and each answers for itself")),
    })
}

/// NICs of a peer, by name and address, that this host reaches at one MAC address: at most one of them takes what is sent there.
/// `proc` has our neighbours; behind a router there are none.
pub fn confused(peer: &[(String, IpAddr)], proc: &Path) -> Vec<Finding> {
    const CHECK: &str = "peer's MAC";
    let macs = neighbours(&std::fs::read_to_string(proc.join("net/arp")).unwrap_or_default());
    let mut at: BTreeMap<&str, Vec<&(String, IpAddr)>> = BTreeMap::new();
    for nic in peer {
        for (_, mac) in macs.iter().filter(|(address, _)| IpAddr::from(*address) == nic.1) {
            let nics = at.entry(mac).or_default();
            if !nics.contains(&nic) {
                nics.push(nic);
            }
        }
    }
    let several = at.into_iter().filter(|(_, nics)| nics.len() > 1);
    several
        .map(|(mac, nics)| {
            let listed: Vec<String> = nics.iter().map(|(device, address)| format!("{address} ({device})")).collect();
            let flush: Vec<String> = nics.iter().map(|(_, address)| format!("ip neigh flush to {address}")).collect();
            Finding::fail(
                CHECK,
                format!(
                    "{} are both at {mac} for this host: one NIC of the peer answers ARP for the other, and drops what is for it",
                    listed.join(" and ")
                ),
                format!("there: {STRICT}; then here: {}", flush.join("; ")),
            )
        })
        .collect()
}

/// What holds of one interface: the larger of its own setting and that of `all` (ip-sysctl).
fn effective(proc: &Path, interface: &str, name: &str) -> Option<u32> {
    let read = |of: &str| {
        let text = std::fs::read_to_string(proc.join("sys/net/ipv4/conf").join(of).join(name)).ok()?;
        text.trim().parse::<u32>().ok()
    };
    Some(read(interface)?.max(read("all")?))
}

/// Interface and network of each that is directly reached, by however many routes, from /proc/net/route (proc_net(5): words in host
/// order of the bytes).
fn networks(text: &str) -> BTreeSet<(String, String)> {
    let of_line = |line: &str| {
        let words: Vec<&str> = line.split_whitespace().collect();
        let word = |at: usize| u32::from_str_radix(words.get(at)?, 16).ok();
        let (network, gateway, mask) = (word(1)?, word(2)?, word(7)?);
        (gateway == 0 && mask != 0).then(|| {
            let network = Ipv4Addr::from(u32::from_be(network));
            (words[0].to_owned(), format!("{network}/{}", mask.count_ones()))
        })
    };
    text.lines().skip(1).filter_map(of_line).collect()
}

/// Address and MAC of each neighbour that is known, from /proc/net/arp.
fn neighbours(text: &str) -> Vec<(Ipv4Addr, String)> {
    let of_line = |line: &str| {
        let words: Vec<&str> = line.split_whitespace().collect();
        let (address, mac) = (words.first()?.parse().ok()?, *words.get(3)?);
        (mac != "00:00:00:00:00:00").then(|| (address, mac.to_owned()))
    };
    text.lines().skip(1).filter_map(of_line).collect()
}

#[cfg(test)]
mod tests {
    use super::super::finding::Verdict;
    use super::super::roots::Roots;
    use super::*;

    // As Linux 6.1 on x86 writes them, of a lab node.
    const ROUTE: &str = "Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT\n\
         eth0\t00000000\t010200C0\t0003\t0\t0\t0\t00000000\t0\t0\t0\n\
         eth0\t0000000A\t00000000\t0001\t0\t0\t0\t0000FFFF\t0\t0\t0\n\
         eth1\t0000000A\t00000000\t0001\t0\t0\t0\t0000FFFF\t0\t0\t0\n\
         eth2\t0000A8C0\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\t0\t0\n\
         eth2\t0000A8C0\t00000000\t0001\t0\t0\t100\t00FFFFFF\t0\t0\t0\n";

    fn nics(names: &[(&str, &str)]) -> Vec<(String, String)> {
        names.iter().map(|(device, interface)| ((*device).to_owned(), (*interface).to_owned())).collect()
    }

    #[test]
    fn two_nics_in_one_network_must_answer_each_for_itself() {
        let conf = |all: &str, eth1: &str| {
            let files: Vec<(String, &str)> = [("all", all), ("eth0", "0"), ("eth1", eth1), ("eth2", "0")]
                .iter()
                .flat_map(|(of, value)| {
                    ["arp_ignore", "arp_announce"].map(|name| (format!("sys/net/ipv4/conf/{of}/{name}"), *value))
                })
                .collect();
            let mut files: Vec<(&str, &str)> = files.iter().map(|(name, value)| (name.as_str(), *value)).collect();
            files.push(("net/route", ROUTE));
            Roots::new(&files)
        };
        let both = nics(&[("rxe0", "eth0"), ("rxe1", "eth1")]);
        let lax = strict(&both, &conf("0", "0").0).unwrap();
        assert_eq!(lax.verdict, Verdict::Warn);
        for words in ["rxe0 (eth0), rxe1 (eth1)", "10.0.0.0/16", "arp_ignore 0"] {
            assert!(lax.evidence.contains(words), "{words}: {}", lax.evidence);
        }
        assert_eq!(strict(&both, &conf("2", "0").0).unwrap().verdict, Verdict::Pass, "all counts for each");
        assert_eq!(strict(&both, &conf("0", "2").0).unwrap().verdict, Verdict::Warn, "one of them alone does not");
        assert_eq!(strict(&nics(&[("rxe0", "eth0"), ("rxe2", "eth2")]), &conf("0", "0").0), None, "two networks");
        assert_eq!(strict(&nics(&[("rxe2", "eth2")]), &conf("0", "0").0), None, "two routes of one NIC");
        assert_eq!(strict(&both, Path::new("/none")), None);
    }

    #[test]
    fn a_peers_nics_at_one_mac_are_told() {
        let arp = |mac: &str| {
            let text = format!(
                "IP address       HW type     Flags       HW address            Mask     Device\n\
                 10.0.0.2         0x1         0x2         {mac}     *        eth0\n\
                 10.0.1.2         0x1         0x2         52:54:00:00:01:02     *        eth1\n\
                 10.0.2.2         0x1         0x0         00:00:00:00:00:00     *        eth1\n"
            );
            Roots::new(&[("net/arp", &text)])
        };
        let address = |last: &str| -> IpAddr { format!("10.0.{last}.2").parse().unwrap() };
        let peer: Vec<_> = ["0", "1", "2"].iter().map(|nic| (format!("rxe{nic}"), address(nic))).collect();
        assert_eq!(confused(&peer, &arp("52:54:00:00:00:02").0), []);
        let found = confused(&peer, &arp("52:54:00:00:01:02").0);
        assert_eq!(found.len(), 1, "{found:?}");
        assert_eq!(found[0].verdict, Verdict::Fail);
        assert!(found[0].evidence.starts_with("10.0.0.2 (rxe0) and 10.0.1.2 (rxe1) are both at 52:54:00:00:01:02"));
        assert!(found[0].next.as_ref().unwrap().contains("ip neigh flush to 10.0.0.2"));
    }
}
