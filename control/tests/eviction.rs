//! Rails over the limit of a NIC: given up while idle, connected again when used, and nobody notices. Virtual time.
//!
//! `SEEDS=n` multiplies the seeds, `CYCLES=n` sets how often a rail is connected and evicted.

mod cluster;
mod net;
mod rig;

use std::collections::BTreeMap;
use std::ops::{Deref, DerefMut};
use std::sync::Arc;

use moonrail_control::{Eviction, RailOptions, RailState, RemoteSegment};
use moonrail_datapath::nic::Op;
use moonrail_datapath::random::Random;
use moonrail_datapath::units::Nanos;
use moonrail_datapath::work::{TransferStatus, Work};

use cluster::{Cluster, pattern};
use net::Net;

const SECOND: Nanos = Nanos::from_secs(1);
/// Until a rail counts as idle, is asked about and given up.
const GONE_WITHIN: Nanos = Nanos::from_millis(2500);

fn number(name: &str, usual: u64) -> u64 {
    std::env::var(name).ok().and_then(|n| n.parse().ok()).unwrap_or(usual)
}

/// Nodes, and the segments they have opened: each once, as applications do.
struct Mesh {
    cluster: Cluster,
    opened: BTreeMap<(usize, usize), Arc<RemoteSegment>>,
}

impl Deref for Mesh {
    type Target = Cluster;
    fn deref(&self) -> &Cluster {
        &self.cluster
    }
}

impl DerefMut for Mesh {
    fn deref_mut(&mut self) -> &mut Cluster {
        &mut self.cluster
    }
}

/// Nodes with one NIC each, whose limits are `limits`.
fn nodes(seed: u64, limits: &[usize], eviction: Eviction) -> Mesh {
    let mut cluster = Cluster::new(seed, limits.len(), 1, 1, seed.is_multiple_of(2));
    for (node, limit) in limits.iter().enumerate() {
        cluster.rails = RailOptions { rails_per_nic: *limit, eviction, ..RailOptions::default() };
        cluster.restart(node);
    }
    Mesh { cluster, opened: BTreeMap::new() }
}

fn submit(mesh: &mut Mesh, from: usize, to: usize, op: Op, at: u64, len: u64) -> Arc<Work> {
    let cluster = &mut mesh.cluster;
    let open = || cluster.open(from, to).unwrap_or_else(|error| panic!("{error}\n{}", logs(cluster)));
    let segment = mesh.opened.entry((from, to)).or_insert_with(open).clone();
    mesh.cluster.submit(from, &segment, op, at, len)
}

/// One transfer, done and right.
fn exchange(cluster: &mut Mesh, from: usize, to: usize, round: u64) {
    let (len, op) = (8192, if round.is_multiple_of(2) { Op::Write } else { Op::Read });
    let (source, sink) = if op == Op::Write { (from, to) } else { (to, from) };
    cluster.fill(source, 0, &pattern(len, round));
    let work = submit(cluster, from, to, op, 0, len);
    check_done(cluster, &work);
    assert!(cluster.bytes(sink, 0, len) == pattern(len, round), "every byte is in place");
}

fn check_done(cluster: &mut Cluster, work: &Arc<Work>) {
    let done = cluster.run_until(Nanos::from_secs(5), |_| work.completion().is_done());
    assert!(done && work.transfers()[0].status() == TransferStatus::Done, "{}", logs(cluster));
}

fn logs(cluster: &Cluster) -> String {
    let line = |n: &cluster::Node| format!("{}:\n  {}\n", n.name, n.log.join("\n  "));
    cluster.nodes.iter().map(line).collect()
}

/// Nobody saw anything go wrong.
fn check_quiet(cluster: &Cluster) {
    let bad = |line: &&String| line.contains("incident") || line.contains("Error") || line.contains("unreachable");
    let lines: Vec<_> = cluster.nodes.iter().flat_map(|node| &node.log).filter(bad).collect();
    assert!(lines.is_empty(), "{lines:#?}\n{}", logs(cluster));
}

fn connected(cluster: &mut Cluster, node: usize) -> usize {
    cluster.rails(node).iter().filter(|rail| rail.state != RailState::Down).count()
}

fn evictions(cluster: &mut Cluster, node: usize) -> u64 {
    cluster.rails(node).iter().map(|rail| rail.evictions).sum()
}

fn lives(cluster: &mut Cluster, node: usize) -> u32 {
    cluster.rails(node).iter().map(|rail| rail.lives).sum()
}

/// (past) every pair that ever exchanged a byte kept its queue pairs for good.
#[test]
fn a_node_of_many_peers_keeps_as_many_rails_as_its_limit() {
    const LIMIT: usize = 4;
    for seed in 1..=2 * number("SEEDS", 1) {
        let mut cluster = nodes(seed, &[LIMIT, 99, 99, 99, 99, 99, 99, 99, 99, 99, 99, 99, 99], Eviction::default());
        // Two a second: besides the limit only those are connected that were used within GONE_WITHIN.
        for round in 0..36 {
            exchange(&mut cluster, 0, 1 + round as usize % 12, round);
            cluster.run_for(Nanos::from_millis(500));
            let count = connected(&mut cluster, 0);
            assert!(count <= LIMIT + 5, "round {round}: {count} rails\n{}", logs(&cluster));
        }
        cluster.run_for(GONE_WITHIN);
        assert_eq!(connected(&mut cluster, 0), LIMIT, "{}", logs(&cluster));
        let usable: usize = (1..13).map(|peer| connected(&mut cluster, peer)).sum();
        assert_eq!(usable, LIMIT, "the peers' ends are gone too\n{}", logs(&cluster));
        // Those that are left are the last ones used, and their use costs no connection.
        let before = lives(&mut cluster, 0);
        for peer in 9..13 {
            exchange(&mut cluster, 0, peer, 7);
        }
        assert_eq!(lives(&mut cluster, 0), before);
        check_quiet(&cluster);
        let told = cluster.nodes[0].log.iter().filter(|line| line.contains("PATH evicted")).count();
        assert_eq!(told, 1, "once a minute is enough\n{}", logs(&cluster));
    }
}

#[test]
fn the_oldest_rail_goes_first_where_that_is_asked_for() {
    for (eviction, survivors) in [(Eviction::LeastRecentlyUsed, [1, 3]), (Eviction::Oldest, [2, 3])] {
        let mut cluster = nodes(4, &[2, 9, 9, 9], eviction);
        for peer in [1, 2] {
            exchange(&mut cluster, 0, peer, 1);
            cluster.run_for(Nanos::from_millis(100));
        }
        exchange(&mut cluster, 0, 1, 2);
        cluster.run_for(SECOND);
        exchange(&mut cluster, 0, 3, 1);
        cluster.run_for(GONE_WITHIN);
        let mut left: Vec<_> = cluster.rails(0);
        left.retain(|rail| rail.state == RailState::Usable);
        let names: Vec<_> =
            left.iter().map(|rail| rail.peer.split(':').next().unwrap_or_default().to_owned()).collect();
        assert_eq!(names, survivors.map(|node| format!("node{node}")), "{eviction:?}");
    }
}

/// One peer more than the limit, used in turn: the worst for a rule of recency, which then always gives up what is used next.
#[test]
fn one_rail_more_than_the_limit_used_in_turn_does_not_thrash() {
    for (pause, rounds) in
        [(Nanos::from_millis(100), 300), (Nanos::from_millis(700), 60), (Nanos::from_millis(1500), 30)]
    {
        let mut cluster = nodes(6, &[2, 9, 9, 9], Eviction::default());
        let began = cluster.now;
        for round in 0..rounds {
            exchange(&mut cluster, 0, 1 + round % 3, round as u64);
            cluster.run_for(pause);
        }
        let (seconds, made) = (cluster.now.since(began).0 / SECOND.0, u64::from(lives(&mut cluster, 0)));
        println!("pause {} ms: {made} connections in {seconds} s of {rounds} uses", pause.0 / 1_000_000);
        let most = if pause.0 * 3 < SECOND.0 { 3 } else { 3 * (1 + 4 + seconds / 16) };
        assert!(made <= most, "{made} connections in {seconds} s");
        let late = lives(&mut cluster, 0);
        for round in 0..30 {
            exchange(&mut cluster, 0, 1 + round % 3, round as u64);
            cluster.run_for(pause);
        }
        assert_eq!(lives(&mut cluster, 0), late, "what is used in turn stays, once that is known");
        check_quiet(&cluster);
    }
}

/// Whoever offers memory posts nothing, and all its rails look idle: its peers know better.
#[test]
fn a_rail_that_only_the_peer_uses_is_left_to_it() {
    for seed in 1..=4 * number("SEEDS", 1) {
        let mut cluster = nodes(seed, &[1, 9, 9, 9], Eviction::default());
        for round in 0..100 {
            for peer in 1..4 {
                exchange(&mut cluster, peer, 0, round);
            }
            cluster.run_for(Nanos::from_millis(40));
        }
        assert_eq!(evictions(&mut cluster, 0), 0, "{}", logs(&cluster));
        assert_eq!(lives(&mut cluster, 0), 3);
        check_quiet(&cluster);
        // Two stop; the third goes on.
        for round in 0..400 {
            exchange(&mut cluster, 1, 0, round);
            cluster.run_for(Nanos::from_millis(40));
        }
        assert_eq!(connected(&mut cluster, 0), 1, "{}", logs(&cluster));
        assert_eq!(cluster.rails(1)[0].lives, 1, "the one in use was never touched");
        check_quiet(&cluster);
    }
}

/// Every node may keep one rail, and all have two that are idle at the same moment.
#[test]
fn both_ends_evict_at_the_same_moment() {
    for seed in 1..=20 * number("SEEDS", 1) {
        let mut cluster = nodes(seed, &[1, 1, 1], Eviction::default());
        for round in 0..3 {
            let works: Vec<_> = [(0, 1), (1, 2), (2, 0)]
                .into_iter()
                .map(|(from, to)| submit(&mut cluster, from, to, Op::Write, 4096 * from as u64, 4096))
                .collect();
            for work in &works {
                check_done(&mut cluster, work);
            }
            // Whoever was asked too early is asked again ten seconds later.
            cluster.run_for(Nanos::from_secs(15));
            for node in 0..3 {
                let rails = cluster.rails(node);
                let count = rails.iter().filter(|rail| rail.state != RailState::Down).count();
                assert!(count <= 1, "seed {seed}, round {round}: {rails:#?}\n{}", logs(&cluster));
            }
        }
        assert!((0..3).any(|node| evictions(&mut cluster, node) > 0));
        check_quiet(&cluster);
    }
}

/// Work of every size at any moment, in both directions, with limits that are always exceeded. Nothing is lost, and nobody
/// hears of an error.
#[test]
fn nothing_in_flight_is_ever_lost_to_an_eviction() {
    let mut gone = 0;
    for seed in 1..=30 * number("SEEDS", 1) {
        let mut cluster = nodes(seed, &[1, 1, 2, 1], Eviction::default());
        let mut random = Random::new(seed);
        let mut works = Vec::new();
        for _ in 0..120 {
            let (from, to) = (random.below(4) as usize, random.below(4) as usize);
            if from == to {
                continue;
            }
            let op = if random.below(2) == 0 { Op::Write } else { Op::Read };
            let longest = if random.below(4) == 0 { 2 << 20 } else { 8192 };
            let len = 1 + random.below(longest);
            works.push(submit(&mut cluster, from, to, op, random.below(1 << 20), len));
            // Mostly about as long as a rail takes to become idle, so that evictions and uses meet.
            let pause = match random.below(3) {
                0 => random.below(20_000),
                1 => 990_000 + random.below(60_000),
                _ => random.below(1_200_000),
            };
            cluster.run_for(Nanos::from_micros(pause));
        }
        for work in &works {
            check_done(&mut cluster, work);
        }
        check_quiet(&cluster);
        gone += (0..4).map(|node| evictions(&mut cluster, node)).sum::<u64>();
    }
    println!("{gone} evictions");
    assert!(gone > 500, "{gone}: the test must meet evictions");
}

/// A rail that is connected, evicted and connected again for ever leaves nothing behind.
#[test]
fn thousands_of_cycles_leave_the_world_as_it_was() {
    let cycles = number("CYCLES", 500);
    let mut cluster = nodes(8, &[1, 9, 9, 9, 9, 9], Eviction::default());
    (1..6).for_each(|peer| exchange(&mut cluster, 0, peer, 1));
    // Old queue pairs without proof are kept for a minute, so that their numbers do not come back under a late packet.
    cluster.run_for(Nanos::from_secs(70));
    let before = cluster.world.ledger();
    let mut most = 0;
    for cycle in 0..cycles {
        // The one that is away each time.
        exchange(&mut cluster, 0, 1 + cycle as usize % 5, cycle);
        cluster.run_for(Nanos::from_millis(1100));
        let gone = cluster.run_until(GONE_WITHIN, |cluster| connected(cluster, 0) == 1);
        assert!(gone, "cycle {cycle}: {:#?}", cluster.rails(0));
        most = most.max(cluster.world.ledger().queue_pairs);
    }
    let (made, evicted) = (lives(&mut cluster, 0), evictions(&mut cluster, 0));
    println!("{cycles} cycles: {made} connections, {evicted} evictions, at most {most} queue pairs at once");
    assert!(u64::from(made) >= cycles && evicted >= cycles, "{made} {evicted}");
    check_quiet(&cluster);
    cluster.run_for(Nanos::from_secs(70));
    assert_eq!(cluster.world.ledger(), before);
}

/// A stock peer knows no question. Its end may still send, so ours keeps its number until that is over.
#[test]
fn towards_a_stock_peer_the_numbers_of_evicted_queue_pairs_do_not_come_back_soon() {
    let mut net = Net::new(5, true);
    let a = net.add(1, 1, RailOptions { rails_per_nic: 1, ..RailOptions::default() });
    let b = net.add(2, 1, RailOptions::default());
    let c = net.add(3, 1, RailOptions::default());
    net.without = &["moonrail"];
    net.run(Nanos::from_millis(5));
    net.open(a, b);
    net.check_whole(a, b, 1, Nanos::from_secs(2));
    net.open(a, c);
    net.check_whole(a, c, 1, Nanos::from_secs(2));
    let evicted = |net: &mut Net| net.rails(a).iter().filter(|rail| rail.evicted).count() == 1;
    assert!(net.until(Nanos::from_secs(3), evicted), "{:#?}", net.rails(a));
    net.run(SECOND);
    let rails = net.rails(a);
    assert_eq!(
        (rails[0].evicted, rails[0].unfenced),
        (true, 1),
        "the one used least recently, without the peer's word"
    );
    assert_eq!(net.world.ledger().queue_pairs, 8, "in ERR, and still there");
    // Connected anew, the peer's consent is its word.
    net.open(a, b);
    net.check_whole(a, b, 1, Nanos::from_secs(3));
    assert!(!net.log_has(a, "incident"), "{:#?}", net.nodes[a].log);
}
