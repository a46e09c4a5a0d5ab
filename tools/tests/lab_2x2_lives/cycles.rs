//! Connect, evict, connect again, many times: node 0 keeps one rail per NIC, and uses more peers in turn than that. What the
//! kernel counts of queue pairs, completion queues and regions is the same in the end as after the first round, on both nodes,
//! and as before everything when the engines are gone.
//!
//! A peer keeps the queue pairs of its end for a minute in ERR, so that their numbers do not come back under a late packet. The
//! long run waits for that; the usual one counts them, and has not more than one former life of each rail.

use std::time::{Duration, Instant};

use moonrail::{Engine, EngineBuilder, Fabric, Region, Segment, Transfer};
use moonrail_tools::bench::pattern;
use serde_json::json;

use super::lab_support::rdma::{Resources, resources};
use super::lab_support::{LIMIT, Lab, result, setting};

/// Engines of node 1, each with two NICs: four rails to each.
const PEERS: usize = 16;
/// What is written to each, and read back.
const BYTES: u64 = 128 << 10;
/// Rails that node 0 keeps: one for each of its NICs.
const KEPT: usize = 2;
/// A rail that is used again within four times what it was idle counts as slow, not as idle, and is asked less often after:
/// cycles would take ever longer.
const AWAY: Duration = Duration::from_millis(4100);
/// Until a busy machine has connected all rails, and evicted all but two.
const SETTLED_WITHIN: Duration = Duration::from_secs(120);
/// The 500 for every change are a twentieth of the long run.
const USUAL: u64 = 500;
/// Longer than a former life is kept.
const FORGOTTEN: Duration = Duration::from_secs(75);
/// Of each rail, and as many rails as there are but for those that are kept.
const QPS_PER_RAIL: i64 = 2;
const FORMER: i64 = QPS_PER_RAIL * (4 * PEERS - KEPT) as i64;

#[test]
fn what_is_connected_and_evicted_leaves_nothing_behind() {
    let lab = Lab::enter("cycles");
    let cycles = setting("MOONRAIL_CYCLES", USUAL);
    let empty = resources();
    let at_most = empty.qp + FORMER;
    if lab.node == 0 {
        let mut hub = Hub::open(&lab);
        hub.round();
        hub.settle();
        let long = cycles > USUAL;
        let before = at_rest(&lab, long);
        let first = hub.lives();
        let began = Instant::now();
        while hub.lives() < first + cycles {
            std::thread::sleep(AWAY);
            hub.round();
            hub.settle();
        }
        let seconds = began.elapsed().as_secs_f64();
        let after = at_rest(&lab, long);
        let line = json!({
            "cycles": hub.lives() - first,
            "evictions": hub.engine.nics().iter().map(|nic| nic.evictions).sum::<u64>(),
            "rounds": hub.rounds,
            "bytes_verified": hub.verified,
            "slowest_round_ms": hub.slowest.as_millis(),
            "seconds": seconds.round(),
            "before_on_node_0": before[0].text(),
            "after_on_node_0": after[0].text(),
            "before_on_node_1": before[1].text(),
            "after_on_node_1": after[1].text(),
        });
        println!("cycles: {line:#}");
        result(&line);
        for (after, before) in after.iter().zip(&before) {
            let kept = |seen: &Resources| (seen.ready, seen.cq, seen.mr, seen.pd);
            assert_eq!(kept(after), kept(before), "queue pairs, completion queues or regions were left behind");
            assert!(after.qp - after.ready <= at_most, "{after:?}: more than one former life of a rail");
        }
        assert!(!long || after == before, "{after:?} after, {before:?} before");
        lab.tell("over", "");
        assert!(hub.engine.shutdown(Duration::from_secs(15)), "the engine gave everything back");
    } else {
        let peers: Vec<(Engine, Region)> = (0..PEERS).map(|_| peer()).collect();
        let names: Vec<&str> = peers.iter().map(|(engine, _)| engine.name()).collect();
        lab.tell("names", &names.join(" "));
        tell_resources(&lab);
        for (engine, _) in peers {
            assert!(engine.shutdown(Duration::from_secs(15)), "a peer gave everything back");
        }
    }
    lab.barrier();
    // What the kernel takes back a moment later is no leak.
    let until = Instant::now() + LIMIT;
    while resources() != empty && Instant::now() < until {
        std::thread::sleep(Duration::from_millis(200));
    }
    assert_eq!(resources(), empty, "what is left of the engines");
    lab.barrier();
}

fn builder(address: &str) -> EngineBuilder {
    Engine::builder().name(address).metadata("P2PHANDSHAKE").fabrics([Fabric::Rdma]).cores(1).pin_cores(false)
}

fn peer() -> (Engine, Region) {
    let engine = builder("10.0.0.2").log(|_, _| {}).build().unwrap_or_else(|e| panic!("{e}"));
    let region = engine.allocate(BYTES as usize, "*").unwrap_or_else(|e| panic!("{e}"));
    (engine, region)
}

/// Node 0: more peers than it may keep rails to.
struct Hub {
    engine: Engine,
    region: Region,
    peers: Vec<(Segment, u64)>,
    rounds: u64,
    verified: u64,
    slowest: Duration,
}

impl Hub {
    fn open(lab: &Lab) -> Self {
        let engine = builder("10.0.0.1").rails_per_nic(KEPT / 2).log(|_, _| {}).build();
        let engine = engine.unwrap_or_else(|e| panic!("{e}"));
        // For each peer: what it gets, and what comes back.
        let region = engine.allocate(PEERS * 2 * BYTES as usize, "*").unwrap_or_else(|e| panic!("{e}"));
        let names = lab.hear("names", 1);
        let open = |name: &str| {
            let peer = engine.open_segment(name).unwrap_or_else(|e| panic!("{e}"));
            let base = peer.buffers()[0].addr;
            (peer, base)
        };
        let peers = names.split_whitespace().map(open).collect();
        Self { engine, region, peers, rounds: 0, verified: 0, slowest: Duration::ZERO }
    }

    /// How often rails were connected.
    fn lives(&self) -> u64 {
        self.engine.rails().iter().map(|rail| u64::from(rail.lives)).sum()
    }

    /// Bytes to every peer at once and back, each looked at.
    fn round(&mut self) {
        self.rounds += 1;
        let began = Instant::now();
        let mut bytes = vec![0; BYTES as usize];
        for (at, (_, base)) in (0..).zip(&self.peers) {
            pattern::fill(&mut bytes, *base, self.rounds);
            self.region.write(2 * at * BYTES, &bytes).expect("in the region");
            pattern::poison(&mut bytes, *base, self.rounds);
            self.region.write((2 * at + 1) * BYTES, &bytes).expect("in the region");
        }
        self.carry(|region, at, base| Transfer::write_from(region, 2 * at * BYTES, base, BYTES));
        self.carry(|region, at, base| Transfer::read_into(region, (2 * at + 1) * BYTES, base, BYTES));
        for (at, (peer, base)) in (0..).zip(&self.peers) {
            self.region.read((2 * at + 1) * BYTES, &mut bytes).expect("in the region");
            pattern::check(&bytes, *base, self.rounds).unwrap_or_else(|e| panic!("from {}: {e:?}", peer.name()));
            self.verified += BYTES;
        }
        self.slowest = self.slowest.max(began.elapsed());
    }

    fn carry(&self, make: impl Fn(&Region, u64, u64) -> Transfer) {
        let submit = |(at, (peer, base)): (u64, &(Segment, u64))| {
            let batch = self.engine.batch().deadline(LIMIT).add(peer, make(&self.region, at, *base)).submit();
            batch.unwrap_or_else(|e| panic!("{}: {e}", peer.name()))
        };
        let batches: Vec<_> = (0..).zip(&self.peers).map(submit).collect();
        for (batch, (peer, _)) in batches.into_iter().zip(&self.peers) {
            batch.wait(2 * LIMIT).unwrap_or_else(|e| {
                panic!("round {}: {e}\n{}", self.rounds, self.engine.explain(peer.name()).join("\n"))
            });
        }
    }

    /// Until every rail that was there is evicted, but for those that are kept.
    fn settle(&self) {
        let until = Instant::now() + SETTLED_WITHIN;
        loop {
            let rails = self.engine.rails();
            let kept = rails.iter().filter(|rail| rail.usable).count();
            let evicted = rails.iter().filter(|rail| rail.state.starts_with("evicted")).count();
            if kept == KEPT && kept + evicted == rails.len() {
                return;
            }
            assert!(Instant::now() < until, "not settled within {SETTLED_WITHIN:?}: {rails:#?}");
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

/// What both kernels count, once they are at rest: what is retired is destroyed a little later, or (`forgotten`) a minute.
fn at_rest(lab: &Lab, forgotten: bool) -> [Resources; 2] {
    if forgotten {
        std::thread::sleep(FORGOTTEN);
    }
    let look = || {
        // Node 1 tells every second.
        std::thread::sleep(Duration::from_secs(3));
        [resources(), Resources::parse(&lab.hear("resources", 1))]
    };
    let until = Instant::now() + LIMIT;
    let mut seen = look();
    loop {
        let again = look();
        if again == seen || Instant::now() > until {
            return again;
        }
        seen = again;
    }
}

/// Node 1: tells what its kernel counts, until all is over.
fn tell_resources(lab: &Lab) {
    while !lab.has("over", 0) {
        lab.tell("resources", &resources().text());
        std::thread::sleep(Duration::from_secs(1));
    }
}
