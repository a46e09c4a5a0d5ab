//! Two nodes with the engine inside the test process itself, which therefore owns the memory and looks at it directly.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use moonrail::{CoreCounters, Engine, Region, Segment, Transfer};
use moonrail_tools::bench::pattern;

use super::lab_support::process::Process;
use super::lab_support::rdma::{devices_by_packet, packets_by_rail, queue_pairs, rails};
use super::lab_support::{LIMIT, Lab};
use super::{READY, RUN, SHARE};

fn engine(lab: &Lab, nics: &[&str]) -> Engine {
    Engine::builder()
        .name(format!("10.0.0.{}", lab.node + 1))
        .metadata("P2PHANDSHAKE")
        .nics(nics.iter().copied())
        .cores(1)
        .build()
        .unwrap_or_else(|e| panic!("{e}"))
}

/// Both nodes' engines know each other: ours, its memory, and the other's memory.
struct Pair {
    engine: Engine,
    region: Region,
    peer: Segment,
    base: u64,
}

impl Pair {
    fn meet(lab: &Lab, nics: &[&str], bytes: usize, round: &str) -> Self {
        let engine = engine(lab, nics);
        let region = engine.allocate(bytes, "*").unwrap_or_else(|e| panic!("{e}"));
        let name = lab.exchange(&format!("name{round}"), engine.name());
        let peer = engine.open_segment(&name).unwrap_or_else(|e| panic!("{e}"));
        let base = peer.buffers()[0].addr;
        Self { engine, region, peer, base }
    }

    fn carry(&self, transfers: &[Transfer]) {
        let batch = self.engine.submit(&self.peer, transfers).unwrap_or_else(|e| panic!("{e}"));
        if let Err(e) = batch.wait(LIMIT) {
            panic!("{e}\n{}", self.engine.explain(self.peer.name()).join("\n"));
        }
    }

    fn fill(&self, offset: u64, len: usize, as_at: u64, iteration: u64) {
        let mut bytes = vec![0; len];
        pattern::fill(&mut bytes, as_at, iteration);
        self.region.write(offset, &bytes).unwrap();
    }

    fn check(&self, offset: u64, len: usize, as_at: u64, iteration: u64) {
        let mut bytes = vec![0; len];
        self.region.read(offset, &mut bytes).unwrap();
        if let Err(wrong) = pattern::check(&bytes, as_at, iteration) {
            panic!("{wrong:?} at offset {offset}");
        }
    }

    fn counters(&self) -> CoreCounters {
        self.engine.counters().total()
    }
}

/// Transfers between offset `ours` here and the same offset there, `count` blocks, one every `step` bytes.
fn blocks(
    make: fn(&Region, u64, u64, u64) -> Transfer,
    pair: &Pair,
    at: u64,
    len: u64,
    step: u64,
    n: u64,
) -> Vec<Transfer> {
    (0..n).map(|i| make(&pair.region, at + i * step, pair.base + at + i * step, len)).collect()
}

/// By the kernel's own packet numbers, each queue pair counted by itself: the only count that knows rails, not NICs.
#[test]
fn each_rail_carries_its_share_by_the_devices_own_count() {
    const BYTES: usize = 16 << 20;
    let lab = Lab::enter("rails");
    let pair = Pair::meet(&lab, &["rxe0", "rxe1"], BYTES, "");
    if lab.node == 1 {
        // The first bytes make the rails; only then are there numbers to compare with.
        pair.carry(&blocks(Transfer::write_from, &pair, 0, 64 << 10, 64 << 10, 16));
        super::lab_support::wait_for("four rails", || {
            (pair.engine.rails().iter().filter(|r| r.usable).count() == 4).then_some(())
        });
    }
    lab.barrier();
    let before = queue_pairs();
    let peers = lab.exchange("devices", &devices_by_packet(&before));
    if lab.node == 1 {
        for iteration in 0..2 {
            pair.fill(0, BYTES, pair.base, iteration);
            pair.carry(&blocks(Transfer::write_from, &pair, 0, BYTES as u64, 0, 1));
        }
        let packets = packets_by_rail(&before, &rails(&before, &peers), &queue_pairs());
        println!("packets by rail: {packets:?}");
        lab.tell("written", "");
        assert_eq!(packets.len(), 4, "{packets:?}");
        let all: u64 = packets.values().sum();
        assert!(packets.values().all(|n| *n as f64 >= SHARE * all as f64), "{packets:?}");
    } else {
        lab.hear("written", 1);
        // Our own memory, without any NIC.
        pair.check(0, BYTES, pair.region.addr(), 1);
    }
    lab.barrier();
    pair.engine.shutdown(Duration::from_secs(10));
    lab.barrier();
}

/// Each pair of NICs once in our list, and in the kernel's as many queue pairs for it as our list says, no more.
fn one_connection_per_rail(lab: &Lab, pair: &Pair, round: u64) {
    let listed = pair.engine.rails();
    let names: BTreeSet<_> = listed.iter().map(|r| (r.nic.clone(), r.peer_nic.clone())).collect();
    assert_eq!((names.len(), listed.len()), (4, 4), "round {round}: a rail twice, or missing: {listed:?}");
    let numbers = queue_pairs();
    let peers = lab.exchange(&format!("devices{round}"), &devices_by_packet(&numbers));
    let found = rails(&numbers, &peers);
    for rail in &listed {
        let count = found.iter().filter(|(nic, peer)| (nic, peer) == (&rail.nic, &rail.peer_nic)).count();
        assert_eq!(count, rail.qps, "round {round}: {rail:?} {found:?}");
    }
    assert_eq!(found.len(), listed.iter().map(|rail| rail.qps).sum::<usize>(), "round {round}: {found:?}");
}

/// Fifty times anew: two engines that have never met submit to each other at the same moment. Both ends open the same
/// connections at once; that must settle into one per rail, and nobody may stall.
#[test]
fn both_ends_submit_at_the_same_moment_fifty_times() {
    const LEN: u64 = 16 << 10;
    const BLOCKS: u64 = 16;
    const HALF: u64 = LEN * BLOCKS;
    let lab = Lab::enter("same-moment");
    let started = Instant::now();
    let mut slowest = Duration::ZERO;
    for round in 0..50u64 {
        let pair = Pair::meet(&lab, &["rxe0", "rxe1"], 2 * HALF as usize, &round.to_string());
        // We write from the second half of ours into the first half of theirs.
        pair.fill(HALF, HALF as usize, pair.base, round);
        let transfers: Vec<_> =
            (0..BLOCKS).map(|i| Transfer::write_from(&pair.region, HALF + i * LEN, pair.base + i * LEN, LEN)).collect();
        lab.barrier();
        let began = Instant::now();
        pair.carry(&transfers);
        slowest = slowest.max(began.elapsed());
        lab.barrier();
        pair.check(0, HALF as usize, pair.region.addr(), round);
        one_connection_per_rail(&lab, &pair, round);
        lab.barrier();
        pair.engine.shutdown(Duration::from_secs(10));
    }
    println!("50 rounds in {:.1?}, slowest batch {slowest:.1?}", started.elapsed());
    assert!(slowest < Duration::from_secs(15), "a stall: {slowest:?}");
    lab.barrier();
}

/// 128 blocks whose addresses do not merge, on one rail: few doorbells, few completions.
#[test]
fn a_batch_of_small_blocks_rings_and_completes_rarely() {
    const BLOCKS: u64 = 128;
    let lab = Lab::enter("doorbells");
    let pair = Pair::meet(&lab, &["rxe0"], 2 << 20, "");
    if lab.node == 1 {
        let transfers = blocks(Transfer::write_from, &pair, 0, 4 << 10, 8 << 10, BLOCKS);
        // The first batch makes the rail.
        pair.carry(&transfers);
        let before = pair.counters();
        pair.carry(&transfers);
        let after = pair.counters();
        let requests = after.work_requests - before.work_requests;
        let (doorbells, completions) = (after.doorbells - before.doorbells, after.completions - before.completions);
        println!("{requests} work requests, {doorbells} doorbells, {completions} completions");
        assert_eq!(requests, BLOCKS, "one for each block");
        assert!(doorbells <= requests / 8, "{doorbells}");
        assert!(completions <= requests / 16, "{completions}");
    }
    lab.barrier();
    pair.engine.shutdown(Duration::from_secs(10));
    lab.barrier();
}

/// The check must not be one that never fails: here the owner of the memory spoils a byte while it is being checked.
#[test]
fn one_wrong_byte_fails_the_run_and_is_named() {
    const SPOILED: u64 = 70_001;
    let lab = Lab::enter("wrong-byte");
    if lab.node == 0 {
        let engine = engine(&lab, &["rxe0", "rxe1"]);
        let region = engine.allocate(1 << 20, "*").unwrap_or_else(|e| panic!("{e}"));
        lab.tell("name", engine.name());
        lab.tell("address", &format!("{:#x}", region.addr() + SPOILED));
        let stop = Arc::new(AtomicBool::new(false));
        let spoiler = std::thread::spawn({
            let (region, stop) = (region.clone(), Arc::clone(&stop));
            move || {
                let mut value = 0u8;
                while !stop.load(Ordering::Relaxed) {
                    region.write(SPOILED, &[value]).unwrap();
                    value = value.wrapping_add(1);
                    std::thread::sleep(Duration::from_micros(200));
                }
            }
        });
        lab.hear("done", 1);
        stop.store(true, Ordering::Relaxed);
        spoiler.join().unwrap();
        engine.shutdown(Duration::from_secs(10));
    } else {
        let (name, address) = (lab.hear("name", 0), lab.hear("address", 0));
        let line = format!(
            "bench {name} --name 10.0.0.2 --cores 1 --op write --block 64KiB --batch 2 --iterations 20 --verify"
        );
        let words = format!("WRONG BYTE at {address} of {name}: expected");
        Process::moonrail(&line).wait(RUN.max(READY)).expect_error(&[&words, "1 wrong in this piece", "next:"]);
        lab.tell("done", "");
    }
    lab.barrier();
}
