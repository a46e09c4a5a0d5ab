//! `moonrail nics`: every RDMA device, what it offers, which GID would be used and why, and what is in the way.

use std::fmt::Write as _;
use std::io::IsTerminal as _;
use std::path::Path;
use std::process::ExitCode;
use std::time::Instant;

use moonrail_control::gid::{self, GidChoice, GidError, GidReason};
use moonrail_datapath::nic::verbs::{DeviceSummary, ListError, PortSummary, list, namespaces_share_devices};
use moonrail_datapath::nic::{GidEntry, GidKind, LinkLayer, PortState};
use moonrail_datapath::units::{Gid, GidIndex, Mtu};
use serde_json::{Value, json};

use crate::cli::NicsArgs;
use crate::failure::{Failure, Result};
use crate::port_counters;
use crate::say;
use crate::signal::Stop;
use crate::table::{Align, Table, wrap};
use crate::units;

/// A table may hold hundreds of addresses; the reasons repeat. `--json` has them all.
const REASONS_SHOWN: usize = 8;
/// Where the kernel shows its devices.
const SYSFS: &str = "/sys";

/// What the environment asks of a NIC, as the engine reads it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Wanted {
    pub(crate) port: u8,
    pub(crate) gid_index: Option<GidIndex>,
}

impl Wanted {
    fn from_environment() -> Result<Self> {
        let resolved = moonrail::Engine::builder().resolved().map_err(|e| Failure::told(&e))?;
        for warning in &resolved.warnings {
            eprintln!("warning: {warning}");
        }
        Ok(Self { port: resolved.ib_port.0, gid_index: resolved.gid_index })
    }
}

/// Runs the subcommand.
pub fn run(args: &NicsArgs) -> Result<ExitCode> {
    let wanted = Wanted::from_environment()?;
    let Some(every) = args.watch else { return show(args.json, wanted) };
    let stop = Stop::install()
        .map_err(|e| Failure::new(format!("signal handlers cannot be set: {e}"), "run it without --watch"))?;
    let clears = !args.json && std::io::stdout().is_terminal();
    loop {
        if clears {
            say::line("\x1b[H\x1b[2J");
        }
        if let Err(e) = show(args.json, wanted) {
            say::line(e);
        }
        if stop.wait(Some(Instant::now() + every)) {
            return Ok(ExitCode::SUCCESS);
        }
    }
}

fn show(as_json: bool, wanted: Wanted) -> Result<ExitCode> {
    let devices = match list() {
        Ok(devices) => devices,
        Err(e) => {
            if as_json {
                let mode = namespaces_share_devices().map(namespaces);
                say::line(json!({ "devices": [], "network_namespaces": mode, "problem": e.to_string() }));
            }
            return Err(nothing(&e));
        }
    };
    let usable = devices.iter().any(|d| blockers(d, wanted).is_empty());
    if as_json {
        let devices: Vec<Value> = devices.iter().map(|d| device_json(d, wanted, Path::new(SYSFS))).collect();
        let mode = namespaces_share_devices().map(namespaces);
        say::line(format!("{:#}", json!({ "devices": devices, "network_namespaces": mode })));
    } else {
        let mut all = devices.iter().map(|d| device_text(d, wanted, Path::new(SYSFS))).collect::<Vec<_>>().join("\n");
        if let Some(shared) = namespaces_share_devices() {
            let means = if shared {
                "each has every device"
            } else {
                "a device is in one of them: `rdma dev set DEVICE netns NAME` moves it"
            };
            let _ = write!(all, "\nnetwork namespaces: {} ({means})", namespaces(shared));
        }
        say::line(all.trim_end());
    }
    if usable {
        return Ok(ExitCode::SUCCESS);
    }
    Err(Failure::new(
        format!("none of the {} RDMA devices can be used", devices.len()),
        "see what stands under `in the way` for each device",
    ))
}

/// The word of `rdma system`.
fn namespaces(shared: bool) -> &'static str {
    if shared { "shared" } else { "exclusive" }
}

/// There is no device to show: what is missing, and how to get one.
pub(crate) fn nothing(error: &ListError) -> Failure {
    let next = match error {
        ListError::LibraryMissing(_) => "apt-get install libibverbs1 ibverbs-providers, then run `moonrail nics` again",
        ListError::NoDevice { kernel_support: false, .. } => {
            "a real NIC: install its driver and run `rdma link`; without one, on any Ethernet: modprobe rdma_rxe && \
             rdma link add rxe0 type rxe netdev eth0; in a container pass in /dev/infiniband"
        }
        _ => "`rdma link` shows what the kernel has; in a container pass in /dev/infiniband",
    };
    if namespaces_share_devices() == Some(false) {
        return Failure::new(
            error,
            format!(
                "devices are in one network namespace each here (`rdma system`): `rdma dev set DEVICE netns NAME` from the one \
                 that has it; else: {next}"
            ),
        );
    }
    Failure::new(error, next)
}

/// Everything that keeps a device from being used, in the words of the engine's own errors; empty: it can be used.
pub(crate) fn blockers(device: &DeviceSummary, wanted: Wanted) -> Vec<String> {
    let mut found: Vec<String> = device.problem.iter().map(ToString::to_string).collect();
    let Some(port) = device.ports.iter().find(|p| p.info.port.0 == wanted.port) else {
        found.push(format!("there is no port {}: set MC_IB_PORT to 1 to {}", wanted.port, device.info.ports));
        return found;
    };
    if port.info.state != PortState::Active {
        found.push(format!(
            "port {} not active, it is {}: check cable and switch, or `ip link set NETDEV up` on RoCE; another port is \
             chosen with MC_IB_PORT",
            wanted.port,
            state(port.info.state)
        ));
    }
    if let Err(e) = choice(port, wanted) {
        found.push(e.to_string());
    }
    found
}

pub(crate) fn choice(port: &PortSummary, wanted: Wanted) -> std::result::Result<GidChoice, GidError> {
    // The table of the summary leaves empty slots out; they tell an empty slot from one outside the table.
    let mut table = port.gids.clone();
    for index in (0..port.info.gid_table_len).map(GidIndex) {
        if !table.iter().any(|entry| entry.index == index) {
            table.push(GidEntry { index, gid: Gid::ZERO, kind: GidKind::Other(0), net_device: None });
        }
    }
    gid::choose(&table, wanted.gid_index)
}

fn state(state: PortState) -> String {
    match state {
        PortState::Down => "DOWN".into(),
        PortState::Init => "INIT".into(),
        PortState::Armed => "ARMED".into(),
        PortState::Active => "ACTIVE".into(),
        PortState::ActiveDefer => "ACTIVE_DEFER".into(),
        PortState::Other(n) => format!("state {n}"),
    }
}

/// The physical state, where it is not that the link is up (IBA 14.2.5.6, PortPhysicalState).
fn physical(state: u8) -> String {
    let word = match state {
        5 => return String::new(),
        1 => "sleep",
        2 => "polling",
        3 => "disabled",
        4 => "training",
        6 => "error recovery",
        7 => "test",
        other => return format!(" (physical state {other})"),
    };
    format!(" (link: {word})")
}

fn link_layer(layer: LinkLayer) -> String {
    match layer {
        LinkLayer::InfiniBand => "InfiniBand".into(),
        LinkLayer::Ethernet => "Ethernet (RoCE)".into(),
        LinkLayer::Other(n) => format!("link layer {n}"),
    }
}

pub(crate) fn kind(kind: GidKind) -> String {
    match kind {
        GidKind::Ib => "IB".into(),
        GidKind::RoceV1 => "RoCE v1".into(),
        GidKind::RoceV2 => "RoCE v2".into(),
        GidKind::Other(n) => format!("type {n}"),
    }
}

pub(crate) fn address(entry: &GidEntry) -> String {
    entry.gid.to_ipv4().map_or_else(|| entry.gid.to_ipv6().to_string(), |ip| ip.to_string())
}

fn device_text(device: &DeviceSummary, wanted: Wanted, sysfs: &Path) -> String {
    let info = &device.info;
    let mut text = info.name.clone();
    let numa = info.numa_node.map_or("no NUMA node".to_owned(), |n| format!("NUMA node {n}"));
    let place = info.pci_address.as_deref().map_or("virtual device".to_owned(), |pci| format!("PCI {pci}"));
    let firmware = if info.firmware.is_empty() { String::new() } else { format!(", firmware {}", info.firmware) };
    let _ = writeln!(text, "  {place}, {numa}{firmware}");
    for port in &device.ports {
        port_text(&mut text, port, device.problem.is_none(), wanted);
        counters_text(&mut text, &port_counters::read(sysfs, &info.name, port.info.port.0));
    }
    if device.problem.is_none() {
        let limits = format!(
            "limits: {} per region, {} regions, {} queue pairs of {} requests, {} scatter/gather entries, {} entries \
             per completion queue, {} READs out and {} in per queue pair",
            if info.max_mr_size == u64::MAX { "any size".to_owned() } else { units::size(info.max_mr_size) },
            info.max_mr,
            info.max_qp,
            info.max_qp_wr,
            info.max_sge,
            info.max_cqe,
            info.max_qp_init_rd_atom,
            info.max_qp_rd_atom
        );
        paragraph(&mut text, 2, &limits);
    }
    for blocker in blockers(device, wanted) {
        paragraph(&mut text, 2, &format!("in the way: {blocker}"));
    }
    text
}

fn port_text(text: &mut String, port: &PortSummary, readable: bool, wanted: Wanted) {
    let info = &port.info;
    let rate = info.rate_mbps.map_or(String::new(), |mbps| format!(", {} Gb/s", mbps as f64 / 1000.0));
    let mtu = |mtu: Option<Mtu>| mtu.map_or("?".to_owned(), |mtu| mtu.to_string());
    let ours = if info.port.0 == wanted.port { "" } else { "  (not used: MC_IB_PORT chooses another)" };
    let _ = writeln!(
        text,
        "  port {}  {}{}, {}{rate}, LID {}, MTU {} of {}{ours}",
        info.port,
        state(info.state),
        physical(info.physical_state),
        link_layer(info.link_layer),
        info.lid,
        mtu(info.active_mtu),
        mtu(info.max_mtu)
    );
    let chosen = choice(port, wanted);
    if port.gids.is_empty() {
        let why = if readable { "every entry of the GID table is empty" } else { "the GID table cannot be read" };
        let _ = writeln!(text, "    {why}");
        return;
    }
    let mut table = Table::new(&[
        ("GID", Align::Right),
        ("type", Align::Left),
        ("net device", Align::Left),
        ("address", Align::Left),
        ("", Align::Left),
    ]);
    for entry in &port.gids {
        let used = chosen.as_ref().is_ok_and(|choice| choice.index == entry.index);
        table.row([
            entry.index.to_string(),
            kind(entry.kind),
            entry.net_device.clone().unwrap_or_else(|| "-".to_owned()),
            address(entry),
            if used { "<- used".to_owned() } else { String::new() },
        ]);
    }
    text.push_str(&table.render(4));
    if let Ok(choice) = &chosen {
        paragraph(text, 4, &format!("GID {} is used: {}", choice.index, chosen_because(choice)));
        for (index, why) in choice.rejected.iter().take(REASONS_SHOWN) {
            paragraph(text, 4, &format!("GID {index} is not: {why}"));
        }
    }
}

/// What the port moved, and which of its counters of errors are not zero.
fn counters_text(text: &mut String, counters: &port_counters::Counters) {
    if counters.is_empty() {
        return;
    }
    let bad = || counters.iter().filter(|(name, _)| port_counters::is_bad(name));
    let set: Vec<String> = bad().filter(|(_, n)| **n > 0).map(|(name, n)| format!("{name} {n}")).collect();
    let errors = if set.is_empty() {
        format!("counters of errors: all 0 ({} read)", bad().count())
    } else {
        format!("counters of errors: {}", set.join(", "))
    };
    let moved = match port_counters::moved(counters) {
        Some((sent, received)) => format!("sent {}, received {}; ", units::size(sent), units::size(received)),
        None => String::new(),
    };
    paragraph(text, 4, &format!("{moved}{errors}"));
}

fn chosen_because(choice: &GidChoice) -> String {
    match choice.reason {
        GidReason::Ranked => format!("best class of this port, {}", choice.class),
        GidReason::Fixed => format!("MC_GID_INDEX says so ({})", choice.class),
    }
}

fn why_not(choice: &GidChoice, index: GidIndex) -> String {
    choice.rejected.iter().find(|(other, _)| *other == index).map(|(_, why)| why.clone()).unwrap_or_default()
}

fn paragraph(text: &mut String, indent: usize, words: &str) {
    for (i, line) in wrap(words, crate::table::WIDTH - indent - 2).iter().enumerate() {
        let _ = writeln!(text, "{}{line}", " ".repeat(if i == 0 { indent } else { indent + 2 }));
    }
}

fn device_json(device: &DeviceSummary, wanted: Wanted, sysfs: &Path) -> Value {
    let info = &device.info;
    json!({
        "name": info.name,
        "pci_address": info.pci_address,
        "numa_node": info.numa_node,
        "firmware": info.firmware,
        "limits": {
            "max_mr_size": info.max_mr_size, "max_mr": info.max_mr, "max_qp": info.max_qp,
            "max_qp_wr": info.max_qp_wr, "max_sge": info.max_sge, "max_cqe": info.max_cqe,
            "max_qp_init_rd_atom": info.max_qp_init_rd_atom, "max_qp_rd_atom": info.max_qp_rd_atom,
        },
        "ports": device.ports.iter().map(|p| port_json(p, wanted, &info.name, sysfs)).collect::<Vec<_>>(),
        "usable": blockers(device, wanted).is_empty(),
        "in_the_way": blockers(device, wanted),
    })
}

fn port_json(port: &PortSummary, wanted: Wanted, device: &str, sysfs: &Path) -> Value {
    let info = &port.info;
    let chosen = choice(port, wanted);
    let gids: Vec<Value> = port
        .gids
        .iter()
        .map(|entry| {
            let (is_chosen, why) = match &chosen {
                Ok(choice) if choice.index == entry.index => (true, chosen_because(choice)),
                Ok(choice) => (false, why_not(choice, entry.index)),
                Err(_) => (false, String::new()),
            };
            json!({
                "index": entry.index.0, "gid": entry.gid.to_string(), "address": address(entry),
                "type": kind(entry.kind), "net_device": entry.net_device, "chosen": is_chosen, "why": why,
            })
        })
        .collect();
    json!({
        "port": info.port.0,
        "state": state(info.state),
        "physical_state": info.physical_state,
        "link_layer": link_layer(info.link_layer),
        "lid": info.lid.0,
        "active_mtu": info.active_mtu.map(Mtu::bytes),
        "max_mtu": info.max_mtu.map(Mtu::bytes),
        "rate_mbps": info.rate_mbps,
        "gid_table_len": info.gid_table_len,
        "gids": gids,
        "counters": port_counters::read(sysfs, device, info.port.0),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use moonrail_datapath::nic::{DeviceInfo, PortInfo};
    use moonrail_datapath::units::{Lid, PortNum};

    const WANTED: Wanted = Wanted { port: 1, gid_index: None };

    fn gid(text: &str) -> Gid {
        Gid(text.parse::<std::net::Ipv6Addr>().unwrap().octets())
    }

    fn device(state: PortState, gids: Vec<GidEntry>) -> DeviceSummary {
        let info = PortInfo {
            port: PortNum(1),
            state,
            physical_state: 5,
            link_layer: LinkLayer::Ethernet,
            max_mtu: Some(Mtu::B4096),
            active_mtu: Some(Mtu::B1024),
            lid: Lid(0),
            gid_table_len: 4,
            rate_mbps: Some(2500),
        };
        DeviceSummary {
            info: DeviceInfo { name: "rxe0".into(), ports: 1, max_mr_size: 1 << 40, ..DeviceInfo::default() },
            ports: vec![PortSummary { info, gids }],
            problem: None,
        }
    }

    fn two_gids() -> Vec<GidEntry> {
        let entry = |index, text, kind| GidEntry {
            index: GidIndex(index),
            gid: gid(text),
            kind,
            net_device: Some("eth0".into()),
        };
        vec![
            entry(0, "fe80::5054:ff:fe00:1", GidKind::RoceV2),
            entry(1, "::ffff:10.0.0.1", GidKind::RoceV2),
            entry(2, "::ffff:10.0.0.1", GidKind::RoceV1),
        ]
    }

    #[test]
    fn the_table_shows_the_choice_with_its_reason_in_80_columns() {
        let text = device_text(&device(PortState::Active, two_gids()), WANTED, Path::new("/nowhere"));
        assert!(text.lines().all(|line| line.chars().count() <= 80), "{text}");
        let chosen = text.lines().find(|line| line.ends_with("<- used")).unwrap();
        assert!(chosen.contains("10.0.0.1") && chosen.contains("RoCE v2"), "{text}");
        assert!(text.contains("ACTIVE") && text.contains("MTU 1024 of 4096") && text.contains("network-private-v4"));
        assert!(!text.contains("in the way"), "{text}");
        let json = device_json(&device(PortState::Active, two_gids()), WANTED, Path::new("/nowhere"));
        assert_eq!(json["usable"], true);
        assert_eq!(json["ports"][0]["gids"][1]["chosen"], true);
        assert_eq!(json["ports"][0]["gids"][0]["chosen"], false);
    }

    #[test]
    fn what_is_in_the_way_is_named_with_the_next_step() {
        let said = |device: &DeviceSummary, wanted| blockers(device, wanted).join("\n");
        assert_eq!(
            (physical(5), physical(3), physical(0)),
            (String::new(), " (link: disabled)".into(), " (physical state 0)".into())
        );
        let down = said(&device(PortState::Down, two_gids()), WANTED);
        assert!(down.contains("not active, it is DOWN") && down.contains("ip link set"), "{down}");
        let empty = said(&device(PortState::Active, vec![]), WANTED);
        assert!(empty.contains("GID is NULL") && empty.contains("IP address"), "{empty}");
        let at = |n| Wanted { port: 1, gid_index: Some(GidIndex(n)) };
        assert!(said(&device(PortState::Active, two_gids()), at(3)).contains("index 3 is empty"));
        assert!(said(&device(PortState::Active, two_gids()), at(9)).contains("outside the table of 4 entries"));
        let other_port = Wanted { port: 2, gid_index: None };
        assert!(said(&device(PortState::Active, two_gids()), other_port).contains("MC_IB_PORT"));
    }

    #[test]
    fn counters_stand_below_their_port_and_errors_are_named() {
        let counters = |pairs: &[(&str, u64)]| pairs.iter().map(|(name, n)| ((*name).to_owned(), *n)).collect();
        let said = |pairs: &[(&str, u64)]| {
            let mut text = String::new();
            counters_text(&mut text, &counters(pairs));
            text
        };
        assert_eq!(said(&[]), "");
        assert_eq!(
            said(&[("port_xmit_data", 256), ("port_rcv_data", 512), ("symbol_error", 0)]),
            "    sent 1 KiB, received 2 KiB; counters of errors: all 0 (1 read)\n"
        );
        let bad =
            said(&[("sent_pkts", 9), ("completer_retry_err", 2), ("duplicate_request", 1), ("out_of_sequence", 3)]);
        assert_eq!(bad, "    counters of errors: completer_retry_err 2, out_of_sequence 3\n");
    }
}
