//! RDMA devices: there, usable, on the right GID, with an MTU that fits, and without errors that rise.

use std::path::Path;
use std::time::Duration;

use moonrail::Mtu;
use moonrail::config::Resolved;
use moonrail_datapath::nic::verbs::{DeviceSummary, ListError, PortSummary, list};
use moonrail_datapath::nic::{LinkLayer, PortState};

use super::finding::Finding;
use crate::nics::{self, Wanted};
use crate::port_counters::{self, Counters};
use crate::units::size;

/// Between the two looks at the counters.
const WATCH: Duration = Duration::from_secs(1);
/// What the kernel keeps free for headers when it derives the path MTU (iboe_get_mtu: GRH, UDP, BTH, XRC, atomic, ICRC).
const ROCE_OVERHEAD: u32 = 40 + 8 + 12 + 4 + 28 + 4;

/// What is asked of the devices.
pub struct Asked<'a> {
    /// The node's options.
    pub resolved: &'a Resolved,
    /// Named devices; none: all that can be used.
    pub names: &'a [String],
    /// Whether the node is to work over RDMA or not at all.
    pub required: bool,
    /// Bytes it will register.
    pub bytes: u64,
}

/// What is there.
#[derive(Default)]
pub struct Found {
    /// The findings.
    pub findings: Vec<Finding>,
    /// Names of the devices that can be used.
    pub usable: Vec<String>,
    /// Those with the network interface of their GID, where it has one.
    pub interfaces: Vec<(String, String)>,
}

/// Every check of the devices. Takes a second, to see whether counters rise.
pub fn all(asked: &Asked<'_>, sysfs: &Path) -> Found {
    const CHECK: &str = "RDMA devices";
    let none = |finding| Found { findings: vec![finding], ..Found::default() };
    let devices = match list() {
        Ok(devices) => devices,
        Err(e) => return none(nothing(&e, asked)),
    };
    let present: Vec<&str> = devices.iter().map(|device| device.info.name.as_str()).collect();
    let mut findings = Vec::new();
    for name in asked.names.iter().filter(|name| !present.contains(&name.as_str())) {
        findings.push(
            Finding::fail(
                CHECK,
                format!("No matched device found: {name}; this machine has {}", present.join(", ")),
                "name one of those (--nics, --nic-priority-matrix)",
            )
            .about(name),
        );
    }
    let used: Vec<&DeviceSummary> =
        devices.iter().filter(|d| asked.names.is_empty() || asked.names.contains(&d.info.name)).collect();
    let wanted = Wanted { port: asked.resolved.ib_port.0, gid_index: asked.resolved.gid_index };
    let before: Vec<_> = used.iter().map(|device| counters(sysfs, &device.info.name, wanted.port)).collect();
    std::thread::sleep(WATCH);
    let (mut usable, mut interfaces) = (Vec::new(), Vec::new());
    let mut blocked = Vec::new();
    for (device, before) in used.iter().zip(before) {
        let name = device.info.name.as_str();
        let port = device.ports.iter().find(|port| port.info.port.0 == wanted.port);
        let mut of_device = one(device, port, wanted, asked, sysfs);
        of_device.push(rising(&before, &counters(sysfs, name, wanted.port)));
        if nics::blockers(device, wanted).is_empty() {
            usable.push(name.to_owned());
            let interface = port.and_then(|port| net_device(port, wanted));
            interfaces.extend(interface.map(|interface| (name.to_owned(), interface)));
        } else {
            blocked.push(name);
        }
        findings.extend(of_device.into_iter().map(|finding| finding.about(name)));
    }
    // A device that is broken among others that work, and that nobody named, is left out by the engine.
    if !usable.is_empty() && asked.names.is_empty() {
        for finding in findings.iter_mut().filter(|f| f.subject.as_deref().is_some_and(|s| blocked.contains(&s))) {
            finding.verdict = finding.verdict.min(super::finding::Verdict::Warn);
        }
    }
    Found { findings, usable, interfaces }
}

fn nothing(error: &ListError, asked: &Asked<'_>) -> Finding {
    const CHECK: &str = "RDMA devices";
    let next = nics::nothing(error).to_string();
    let next = next.split_once(" next: ").map_or(String::new(), |(_, next)| next.to_owned());
    if asked.required || !asked.names.is_empty() {
        return Finding::fail(CHECK, error.to_string(), next);
    }
    Finding::skip(CHECK, format!("{error}; shared memory and TCP carry the bytes"))
}

fn one(
    device: &DeviceSummary,
    port: Option<&PortSummary>,
    wanted: Wanted,
    asked: &Asked<'_>,
    sysfs: &Path,
) -> Vec<Finding> {
    let blockers = nics::blockers(device, wanted);
    let Some(port) = port.filter(|_| device.problem.is_none()) else {
        return blockers.into_iter().map(|why| split("RDMA devices", &why)).collect();
    };
    let mut found = Vec::new();
    let info = &port.info;
    if info.state == PortState::Active {
        found.push(Finding::pass("port", format!("{} is active", info.port)));
    } else {
        found.extend(blockers.iter().filter(|why| why.contains("not active")).map(|why| split("port", why)));
        if info.physical_state != 5 {
            found.push(Finding::fail(
                "physical link",
                format!("physical state {} (5 is link up)", info.physical_state),
                "cable, transceiver, switch port; ip link set NETDEV up on RoCE",
            ));
        }
    }
    let choice = nics::choice(port, wanted);
    match &choice {
        Ok(choice) => {
            let entry = port.gids.iter().find(|entry| entry.index == choice.index);
            let kind = entry.map(|entry| nics::kind(entry.kind)).unwrap_or_default();
            let shown = entry.map(nics::address).unwrap_or_default();
            let ranked = nics::choice(port, Wanted { gid_index: None, ..wanted });
            let better = ranked.as_ref().ok().filter(|best| best.class < choice.class);
            found.push(match better {
                Some(best) => Finding::warn(
                    "GID",
                    format!(
                        "index {} is {shown} ({kind}, {}), by MC_GID_INDEX; index {} is {}",
                        choice.index, choice.class, best.index, best.class
                    ),
                    "unset MC_GID_INDEX: the best entry is chosen, and found again by value when the table moves",
                ),
                None => Finding::pass("GID", format!("index {} is {shown} ({kind}, {})", choice.index, choice.class)),
            });
        }
        Err(e) => found.push(Finding::told("GID", e)),
    }
    found.push(mtu(port, net_device(port, wanted).as_deref(), asked.resolved.mtu, sysfs));
    if info.link_layer == LinkLayer::InfiniBand {
        found.push(if info.lid.0 == 0 {
            Finding::fail(
                "LID",
                "0: no subnet manager has given this port an address",
                "start opensm, or the subnet manager of the switch",
            )
        } else {
            Finding::pass("LID", info.lid.to_string())
        });
    }
    let max = device.info.max_mr_size;
    found.push(if max > 0 && asked.bytes > max {
        Finding::pass(
            "registration limit",
            format!(
                "max_mr_size is {}: {} are registered in pieces (a stock node fails)",
                size(max),
                size(asked.bytes)
            ),
        )
    } else {
        Finding::pass(
            "registration limit",
            if max == u64::MAX { "none".to_owned() } else { format!("max_mr_size is {}", size(max)) },
        )
    });
    found
}

/// The network interface of the GID that would be used.
fn net_device(port: &PortSummary, wanted: Wanted) -> Option<String> {
    let choice = nics::choice(port, wanted).ok()?;
    port.gids.iter().find(|entry| entry.index == choice.index)?.net_device.clone()
}

/// Cause before the first colon-and-blank behind which something to do stands; the whole text has both.
fn split(check: &'static str, why: &str) -> Finding {
    match why.rsplit_once(": ") {
        Some((cause, next)) => Finding::fail(check, cause, next),
        None => Finding::fail(check, why, "moonrail nics shows the device"),
    }
}

fn mtu(port: &PortSummary, net_device: Option<&str>, most: Mtu, sysfs: &Path) -> Finding {
    const CHECK: &str = "MTU";
    let Some(active) = port.info.active_mtu else {
        return Finding::skip(CHECK, "unknown while the device cannot be opened");
    };
    let net = net_device.and_then(|net| {
        let text = std::fs::read_to_string(sysfs.join("class/net").join(net).join("mtu")).ok()?;
        Some((net, text.trim().parse::<u32>().ok()?))
    });
    let cut = if most < active { format!(", MC_MTU cuts it to {most}") } else { String::new() };
    match net {
        Some((net, bytes)) if port.info.link_layer == LinkLayer::Ethernet && active.bytes() + ROCE_OVERHEAD > bytes => {
            Finding::fail(
                CHECK,
                format!(
                    "path MTU {active} does not fit into {net}, whose MTU is {bytes}: large packets are lost, small ones pass"
                ),
                format!("ip link set {net} mtu {}, or MC_MTU={}", active.bytes() + 104, fitting(bytes)),
            )
        }
        Some((net, bytes)) => Finding::pass(
            CHECK,
            format!("path MTU {active} in {net} of {bytes}{cut}; the smaller one of both ends is used"),
        ),
        None => Finding::pass(CHECK, format!("path MTU {active}{cut}; the smaller one of both ends is used")),
    }
}

/// The largest path MTU that fits into a net device's.
fn fitting(net: u32) -> Mtu {
    Mtu::ALL.into_iter().rev().find(|mtu| mtu.bytes() + ROCE_OVERHEAD <= net).unwrap_or(Mtu::B256)
}

/// The counters of a port that count something bad.
fn counters(sysfs: &Path, device: &str, port: u8) -> Counters {
    let mut all = port_counters::read(sysfs, device, port);
    all.retain(|name, _| port_counters::is_bad(name));
    all
}

fn rising(before: &Counters, after: &Counters) -> Finding {
    const CHECK: &str = "error counters";
    if after.is_empty() {
        return Finding::skip(CHECK, "the driver has none");
    }
    let rose = after.iter().filter_map(|(name, value)| {
        let more = value.saturating_sub(*before.get(name).unwrap_or(value));
        (more > 0).then(|| format!("{name} by {more}"))
    });
    let rose: Vec<String> = rose.collect();
    if rose.is_empty() {
        let ever = after.values().filter(|value| **value > 0).count();
        return Finding::pass(CHECK, format!("none rose within {WATCH:?} ({ever} of {} are not zero)", after.len()));
    }
    Finding::warn(
        CHECK,
        format!("within {WATCH:?} rose {}", rose.join(", ")),
        "a bad cable or transceiver (symbol, recovery, downed), loss or missing PFC on the way (retry, sequence, timeout), or a \
         receiver that is too slow (discard, drop)",
    )
}

#[cfg(test)]
mod tests {
    use super::super::finding::Verdict;
    use super::super::roots::Roots;
    use super::*;
    use moonrail_datapath::nic::PortInfo;
    use moonrail_datapath::units::{Lid, PortNum};

    fn port(active: Mtu) -> PortSummary {
        let info = PortInfo {
            port: PortNum(1),
            state: PortState::Active,
            physical_state: 5,
            link_layer: LinkLayer::Ethernet,
            max_mtu: Some(Mtu::B4096),
            active_mtu: Some(active),
            lid: Lid(0),
            gid_table_len: 0,
            rate_mbps: None,
        };
        PortSummary { info, gids: Vec::new() }
    }

    #[test]
    fn a_path_mtu_that_does_not_fit_is_found() {
        let roots = Roots::new(&[("class/net/eth0/mtu", "1500\n")]);
        let root = &roots.0;
        let found = mtu(&port(Mtu::B4096), Some("eth0"), Mtu::B4096, root);
        assert!(found.verdict == Verdict::Fail && found.next.unwrap().contains("MC_MTU=1024"), "{}", found.evidence);
        assert_eq!(mtu(&port(Mtu::B1024), Some("eth0"), Mtu::B4096, root).verdict, Verdict::Pass);
        roots.set("class/net/eth0/mtu", "4200\n");
        assert_eq!(mtu(&port(Mtu::B4096), Some("eth0"), Mtu::B4096, root).verdict, Verdict::Pass);
        assert!(mtu(&port(Mtu::B4096), None, Mtu::B1024, root).evidence.contains("cuts it to 1024"));
    }

    #[test]
    fn only_what_rises_is_an_alarm() {
        let with = |value| Counters::from([("symbol_error".to_owned(), value), ("link_downed".to_owned(), 3)]);
        assert_eq!(rising(&with(7), &with(7)).verdict, Verdict::Pass);
        let found = rising(&with(7), &with(9));
        assert!(found.verdict == Verdict::Warn && found.evidence.contains("symbol_error by 2"), "{found:?}");
        assert_eq!(rising(&Counters::new(), &Counters::new()).verdict, Verdict::Skip);
    }
}
