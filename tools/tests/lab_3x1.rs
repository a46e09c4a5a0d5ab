//! Three nodes with one NIC each, all to all: every node moves bytes to and from both others, at the same time.

mod lab_support;

use std::time::Duration;

use lab_support::process::Process;
use lab_support::{LIMIT, Lab};
use moonrail::{Engine, Transfer};
use moonrail_tools::bench::pattern;

const READY: Duration = Duration::from_secs(40);
const RUN: Duration = Duration::from_secs(120);

fn address(node: u32) -> String {
    format!("10.0.0.{}", node + 1)
}

fn others(lab: &Lab) -> impl Iterator<Item = u32> + use<> {
    let own = lab.node;
    (0..lab.nodes).filter(move |node| *node != own)
}

/// One batch to two peers: a slot of each node's memory belongs to each writer, and its owner looks at it itself.
#[test]
fn one_engine_writes_to_two_peers_in_one_batch() {
    const SLOT: u64 = 512 << 10;
    let lab = Lab::enter("one-batch");
    let engine = Engine::builder()
        .name(address(lab.node))
        .metadata("P2PHANDSHAKE")
        .cores(1)
        .build()
        .unwrap_or_else(|e| panic!("{e}"));
    let slots = u64::from(lab.nodes);
    // First the slots others write to, then as many we write from and read into.
    let region = engine.allocate((2 * slots * SLOT) as usize, "*").unwrap_or_else(|e| panic!("{e}"));
    lab.tell("name", engine.name());
    let peers: Vec<_> = others(&lab)
        .map(|node| {
            let segment = engine.open_segment(&lab.hear("name", node)).unwrap_or_else(|e| panic!("{e}"));
            let base = segment.buffers()[0].addr;
            (node, segment, base)
        })
        .collect();
    let mut bytes = vec![0; SLOT as usize];
    let mut batch = engine.batch();
    for (node, segment, base) in &peers {
        let (theirs, ours) = (u64::from(lab.node) * SLOT, (slots + u64::from(*node)) * SLOT);
        pattern::fill(&mut bytes, base + theirs, 1);
        region.write(ours, &bytes).unwrap();
        batch = batch.add(segment, Transfer::write_from(&region, ours, base + theirs, SLOT));
    }
    lab.barrier();
    batch.submit().unwrap_or_else(|e| panic!("{e}")).wait(LIMIT).unwrap_or_else(|e| panic!("{e}"));
    lab.barrier();
    for (node, _, _) in &peers {
        let offset = u64::from(*node) * SLOT;
        region.read(offset, &mut bytes).unwrap();
        pattern::check(&bytes, region.addr() + offset, 1).unwrap_or_else(|e| panic!("from node {node}: {e:?}"));
    }
    // The other direction: what a peer got from the third node, too.
    let mut batch = engine.batch();
    for (node, segment, base) in &peers {
        let third = others(&lab).find(|other| other != node).expect("three nodes");
        let (theirs, ours) = (u64::from(third) * SLOT, (slots + u64::from(*node)) * SLOT);
        pattern::poison(&mut bytes, base + theirs, 1);
        region.write(ours, &bytes).unwrap();
        batch = batch.add(segment, Transfer::read_into(&region, ours, base + theirs, SLOT));
    }
    batch.submit().unwrap_or_else(|e| panic!("{e}")).wait(LIMIT).unwrap_or_else(|e| panic!("{e}"));
    for (node, _, base) in &peers {
        let third = others(&lab).find(|other| other != node).expect("three nodes");
        region.read((slots + u64::from(*node)) * SLOT, &mut bytes).unwrap();
        let at = base + u64::from(third) * SLOT;
        pattern::check(&bytes, at, 1).unwrap_or_else(|e| panic!("read from node {node}: {e:?}"));
    }
    lab.barrier();
    engine.shutdown(Duration::from_secs(10));
    lab.barrier();
}

/// Every node serves, and every node benches both others at once; a buffer for each initiator keeps them apart.
#[test]
fn processes_bench_all_to_all_and_every_byte_is_right() {
    let lab = Lab::enter("all-to-all");
    let own = address(lab.node);
    let mut server =
        Process::moonrail(&format!("serve --name {own} --buffers {} --size 4MiB --cores 1 --verify", lab.nodes));
    lab.tell("name", &server.says("listening on ", READY));
    let names: Vec<String> = others(&lab).map(|node| lab.hear("name", node)).collect();
    lab.barrier();
    let runs: Vec<Process> = names
        .iter()
        .map(|name| {
            Process::moonrail(&format!(
                "bench {name} --name {own} --cores 1 --buffer {} --op both --block 4KiB,256KiB --batch 8 --iterations 2 \
                 --verify --ask-target --json",
                lab.node
            ))
        })
        .collect();
    for run in runs {
        let ended = run.wait(RUN).expect_ok();
        let result: serde_json::Value = serde_json::from_str(&ended.stdout).expect("JSON");
        for run in result["runs"].as_array().expect("runs") {
            assert_eq!(run["bytes"], run["verified_bytes"], "{run:#}");
            assert!(run["bytes"].as_u64() > Some(0), "{run:#}");
        }
    }
    lab.barrier();
    server.terminate(Duration::from_secs(30)).expect_ok();
    lab.barrier();
}
