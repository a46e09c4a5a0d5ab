//! `moonrail topology`: NUMA nodes, CPUs and NICs, which cores would poll which NIC, how far NICs are from each other,
//! and the priority matrix that would be published. It plans an engine with the same options as `serve`, and starts none.

pub mod pci;

use std::fmt::Write as _;
use std::path::Path;
use std::process::ExitCode;

use moonrail::{Fabric, Level, Plan};
use serde_json::{Value, json};

use crate::cli::TopologyArgs;
use crate::failure::{Failure, Result};
use crate::say;
use crate::table::{Align, Table};
use pci::{Distance, Place};

const WORDS: &str = "same: one device, PIX: at most one PCI bridge, PXB: several, PHB: one host bridge, NODE: one NUMA node, \
                     SYS: across nodes, -: not on PCI";

/// Runs the subcommand.
pub fn run(args: &TopologyArgs) -> Result<ExitCode> {
    // What is left out, and why, is part of the answer.
    let builder = crate::node::builder(&args.node)?.log(|level, line| {
        if level != Level::Info {
            eprintln!("warning: {line}");
        }
    });
    let plan = builder.plan().map_err(|e| Failure::told(&e))?;
    let places = places(&plan);
    if args.matrix {
        say::line(&plan.priority_matrix);
    } else if args.json {
        say::line(format!("{:#}", to_json(&plan, &places)));
    } else {
        say::line(text(&plan, &places).trim_end());
    }
    Ok(ExitCode::SUCCESS)
}

/// RDMA NICs and where they hang.
fn places(plan: &Plan) -> Vec<(String, Place)> {
    let rdma = plan.nics.iter().filter(|nic| nic.fabric == Fabric::Rdma);
    rdma.map(|nic| (nic.name.clone(), Place::of_rdma_device(Path::new("/sys"), &nic.name, nic.numa_node))).collect()
}

fn text(plan: &Plan, places: &[(String, Place)]) -> String {
    let number = |n: Option<String>| n.unwrap_or_else(|| "-".to_owned());
    let mut text = String::new();
    for node in &plan.machine.nodes {
        let _ = writeln!(text, "NUMA node {}: CPUs {}", node.id, ranges(&node.cpus));
    }
    let mut nics = Table::new(&[
        ("NIC", Align::Left),
        ("fabric", Align::Left),
        ("NUMA node", Align::Right),
        ("PCI address", Align::Left),
        ("polled by core", Align::Left),
    ]);
    for nic in &plan.nics {
        let place = places.iter().find(|(name, _)| *name == nic.name).and_then(|(_, place)| place.path.last().cloned());
        nics.row([
            nic.name.clone(),
            nic.fabric.to_string(),
            number(nic.numa_node.map(|n| n.to_string())),
            number(place),
            nic.cores.iter().map(u16::to_string).collect::<Vec<_>>().join(", "),
        ]);
    }
    let mut cores = Table::new(&[
        ("core", Align::Right),
        ("CPU", Align::Right),
        ("NUMA node", Align::Right),
        ("polls", Align::Left),
    ]);
    for (i, core) in plan.cores.iter().enumerate() {
        cores.row([
            i.to_string(),
            number(core.cpu.map(|cpu| cpu.to_string())),
            number(core.numa_node.map(|n| n.to_string())),
            core.nics.join(", "),
        ]);
    }
    let _ = write!(text, "\n{}\n{}", nics.render(0), cores.render(0));
    if places.len() > 1 {
        let mut columns = vec![("distance", Align::Left)];
        columns.extend(places.iter().map(|(name, _)| (name.as_str(), Align::Left)));
        let mut table = Table::new(&columns);
        for (i, (name, place)) in places.iter().enumerate() {
            let to = |(j, (_, other)): (usize, &(String, Place))| match place.distance(other) {
                _ if i == j => ".".to_owned(),
                Some(distance) => distance.to_string(),
                None => "-".to_owned(),
            };
            table.row(std::iter::once(name.clone()).chain(places.iter().enumerate().map(to)));
        }
        let _ = write!(text, "\n{}", table.render(0));
        for line in crate::table::wrap(WORDS, crate::table::WIDTH - 2) {
            let _ = writeln!(text, "  {line}");
        }
    }
    let _ = writeln!(
        text,
        "\npriority matrix (--matrix prints it alone, for --nic-priority-matrix)\n  {}",
        plan.priority_matrix
    );
    text
}

/// `0-3,8`.
fn ranges(cpus: &[usize]) -> String {
    let mut parts: Vec<(usize, usize)> = Vec::new();
    for &cpu in cpus {
        match parts.last_mut() {
            Some((_, last)) if *last + 1 == cpu => *last = cpu,
            _ => parts.push((cpu, cpu)),
        }
    }
    let part =
        |(first, last): &(usize, usize)| if first == last { first.to_string() } else { format!("{first}-{last}") };
    if parts.is_empty() { "none".to_owned() } else { parts.iter().map(part).collect::<Vec<_>>().join(",") }
}

fn to_json(plan: &Plan, places: &[(String, Place)]) -> Value {
    let path =
        |name: &str| places.iter().find(|(n, _)| n == name).map(|(_, place)| place.path.clone()).unwrap_or_default();
    let mut distances = Vec::new();
    for (i, (a, from)) in places.iter().enumerate() {
        for (b, to) in &places[i + 1..] {
            distances
                .push(json!({ "from": a, "to": b, "distance": from.distance(to).as_ref().map(Distance::to_string) }));
        }
    }
    json!({
        "numa_nodes": plan.machine.nodes.iter().map(|n| json!({ "node": n.id, "cpus": n.cpus })).collect::<Vec<_>>(),
        "nics": plan.nics.iter().map(|nic| json!({
            "name": nic.name, "fabric": nic.fabric.to_string(), "numa_node": nic.numa_node, "cores": nic.cores,
            "pci_path": path(&nic.name),
        })).collect::<Vec<_>>(),
        "cores": plan.cores.iter().map(|core| json!({
            "cpu": core.cpu, "numa_node": core.numa_node, "nics": core.nics,
        })).collect::<Vec<_>>(),
        "distances": distances,
        "priority_matrix": serde_json::from_str::<Value>(&plan.priority_matrix).unwrap_or(Value::Null),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use moonrail::topology::{Machine, NumaNode};
    use moonrail::{CorePlan, NicInfo};

    #[test]
    fn it_reads_well_in_80_columns() {
        let nic = |name: &str, node, core| NicInfo {
            name: name.to_owned(),
            fabric: Fabric::Rdma,
            port: None,
            numa_node: Some(node),
            cores: vec![core],
            registered: 0,
            evictions: 0,
        };
        let core =
            |cpu, node, nic: &str| CorePlan { cpu: Some(cpu), numa_node: Some(node), nics: vec![nic.to_owned()] };
        let plan = Plan {
            nics: vec![nic("mlx5_0", 0, 0), nic("mlx5_1", 1, 1)],
            cores: vec![core(3, 0, "mlx5_0"), core(7, 1, "mlx5_1")],
            priority_matrix: r#"{"cpu:0":[["mlx5_0"],["mlx5_1"]]}"#.to_owned(),
            machine: Machine {
                nodes: vec![NumaNode { id: 0, cpus: vec![0, 1, 2, 3, 9] }, NumaNode { id: 1, cpus: vec![] }],
            },
        };
        let place =
            |path: &str, node| Place { path: path.split('/').map(str::to_owned).collect(), numa_node: Some(node) };
        let places = [
            ("mlx5_0".to_owned(), place("pci0000:3a/0000:3b:00.0", 0)),
            ("mlx5_1".to_owned(), place("pci0000:ae/0000:af:00.0", 1)),
        ];
        let text = text(&plan, &places);
        assert!(text.lines().all(|line| line.chars().count() <= 80), "{text}");
        for words in ["NUMA node 0: CPUs 0-3,9", "NUMA node 1: CPUs none", "mlx5_1    SYS", "0000:3b:00.0"] {
            assert!(text.contains(words), "{words}:\n{text}");
        }
        let json = to_json(&plan, &places);
        assert_eq!(json["distances"][0]["distance"], "SYS");
        assert_eq!(json["priority_matrix"]["cpu:0"][0][0], "mlx5_0");
    }
}
