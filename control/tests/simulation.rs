//! Whole nodes from a seed: real control logic, real cores, simulated NICs and network, virtual time.
//!
//! `SEED=n` replays one seed, `SEEDS=n` runs n fresh ones, or those from `FROM=s` on: each in a plan of its own
//! (`any_cluster_in_any_trouble_keeps_its_promises`), and one of [`STORY_EVERY`] in the stories.

mod chaos;
mod charges;
mod cluster;
mod twins;

use moonrail_control::RailOptions;
use moonrail_control::brain::Call;
use moonrail_datapath::error::{Cause, SliceError};
use moonrail_datapath::limits::STALL_AFTER;
use moonrail_datapath::nic::Op;
use moonrail_datapath::nic::sim::SimOptions;
use moonrail_datapath::units::Nanos;
use moonrail_datapath::work::{Proof, Quiescence, TransferStatus};

use cluster::{Cluster, Weather, pattern};

const SECOND: Nanos = Nanos::from_secs(1);
/// A story is one course of events, which a seed changes little; the six together take as long as this many plans would.
const STORY_EVERY: u64 = 50;

fn seeds(fixed: u64, fresh: u64) -> Vec<u64> {
    let number = |name| std::env::var(name).ok().and_then(|v| v.parse::<u64>().ok());
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |t| t.as_nanos() as u64);
    match (number("SEED"), number("SEEDS")) {
        (Some(seed), _) => vec![seed],
        (None, Some(count)) => (0..count).map(|i| number("FROM").unwrap_or(now).wrapping_add(i)).collect(),
        (None, None) => {
            println!("{fixed} fixed seeds, and {fresh} fresh ones from {now} on");
            (1..=fixed).chain((0..fresh).map(|i| now.wrapping_add(i))).collect()
        }
    }
}

/// Runs `test` on each seed; a failing one is named, so that it can be replayed.
fn each_seed(name: &str, fixed: u64, fresh: u64, test: impl Fn(u64) + std::panic::RefUnwindSafe) {
    let many = std::env::var_os("SEEDS").is_some() && std::env::var_os("SEED").is_none();
    for seed in seeds(fixed, fresh).into_iter().filter(|seed| !many || seed.is_multiple_of(STORY_EVERY)) {
        if let Err(cause) = std::panic::catch_unwind(|| test(seed)) {
            eprintln!("replay with: SEED={seed} cargo test -p moonrail-control --test simulation {name}");
            std::panic::resume_unwind(cause);
        }
    }
}

/// Moves a pattern each way between two nodes and checks every byte.
fn exchange(cluster: &mut Cluster, from: usize, to: usize, round: u64) {
    let segment = cluster.open(from, to).unwrap_or_else(|e| panic!("open: {e}"));
    let len = 1 << 20;
    for op in [Op::Write, Op::Read] {
        let (source, sink) = if op == Op::Write { (from, to) } else { (to, from) };
        let bytes = pattern(len, round * 2 + u64::from(op == Op::Read));
        cluster.fill(source, 0, &bytes);
        let work = cluster.submit(from, &segment, op, 0, len);
        let done = cluster.run_until(Nanos::from_secs(20), |_| work.completion().is_done());
        let status = work.transfers()[0].status();
        assert!(done && status == TransferStatus::Done, "{op:?} {from}->{to}: {status:?}\n{}", logs(cluster));
        assert!(cluster.bytes(sink, 0, len) == bytes, "every byte is in place");
    }
}

fn logs(cluster: &Cluster) -> String {
    let line = |n: &cluster::Node| format!("{}:\n  {}\n", n.name, n.log.join("\n  "));
    cluster.nodes.iter().map(line).collect()
}

#[test]
fn two_nodes_find_each_other_and_move_bytes_over_all_four_rails() {
    for p2p in [false, true] {
        let mut cluster = Cluster::new(1, 2, 2, 1, p2p);
        exchange(&mut cluster, 0, 1, 1);
        cluster.run_for(SECOND);
        for node in [0, 1] {
            assert_eq!(cluster.usable_rails(node), 4, "{:?}\n{}", cluster.rails(node), logs(&cluster));
        }
        exchange(&mut cluster, 1, 0, 2);
    }
}

/// The peer asks for all four rails, and has them. What we ask for goes over those that our affinity names.
#[test]
fn peer_affinity_binds_rails_that_the_peer_asked_for_too() {
    each_seed("peer_affinity_binds", 20, 5, |seed| {
        let bound = RailOptions {
            // What the peer has not binds nothing.
            peer_affinity: vec![("sim0".into(), vec!["sim0".into()]), ("sim1".into(), vec!["sim9".into()])],
            ..RailOptions::default()
        };
        let mut cluster = Cluster::new(seed, 2, 2, 1, seed % 2 == 0);
        cluster.rails = bound;
        cluster.restart(0);
        // Node 1 asks first, and node 0 does not know its NICs yet; and again, when it does.
        exchange(&mut cluster, 1, 0, 1);
        exchange(&mut cluster, 0, 1, 2);
        cluster.run_for(SECOND);
        assert_eq!(cluster.usable_rails(1), 4, "{}", logs(&cluster));
        let slices = |cluster: &mut Cluster| -> Vec<(String, String, u64)> {
            let rails = cluster.rails(0);
            rails.into_iter().map(|rail| (rail.local_nic, rail.peer_nic, rail.counters.slices.get())).collect()
        };
        let before = slices(&mut cluster);
        exchange(&mut cluster, 0, 1, 3);
        let after = slices(&mut cluster);
        for ((nic, peer_nic, before), (.., after)) in before.into_iter().zip(after) {
            let ours = (nic.as_str(), peer_nic.as_str()) != ("sim0", "sim1");
            assert_eq!(after > before, ours, "{nic} to {peer_nic}: {before} slices, then {after}\n{}", logs(&cluster));
        }
    });
}

/// A node's own memory is reached through each NIC by itself, and NICs of one name may be all that is used: no affinity for peers
/// takes these rails away.
#[test]
fn peer_affinity_leaves_the_rails_that_are_planned_without_it() {
    let crossed = vec![("sim0".into(), vec!["sim1".into()]), ("sim1".into(), vec!["sim0".into()])];
    for same_name_only in [false, true] {
        let mut cluster = Cluster::new(1, 2, 2, 1, false);
        cluster.rails = RailOptions { peer_affinity: crossed.clone(), same_name_only, ..RailOptions::default() };
        cluster.restart(0);
        exchange(&mut cluster, 0, 0, 1);
        exchange(&mut cluster, 0, 1, 2);
    }
}

#[test]
fn both_ends_open_at_the_same_moment_and_share_one_connection_per_rail() {
    each_seed("both_ends", 50, 10, |seed| {
        let mut cluster = Cluster::new(seed, 2, 2, 1, seed % 2 == 0);
        let names: Vec<String> = cluster.nodes.iter().map(|n| n.name.clone()).collect();
        let first = cluster.call(0, Call::Open { name: names[1].clone(), fresh: false, policy: None }, SECOND);
        let second = cluster.call(1, Call::Open { name: names[0].clone(), fresh: false, policy: None }, SECOND);
        let to_1 = cluster.await_open(0, first).unwrap();
        let to_0 = cluster.await_open(1, second).unwrap();
        let (a, b) = (pattern(1 << 20, seed), pattern(1 << 20, !seed));
        cluster.fill(0, 0, &a);
        cluster.fill(1, 2 << 20, &b);
        let forth = cluster.submit(0, &to_1, Op::Write, 0, 1 << 20);
        let back = cluster.submit(1, &to_0, Op::Write, 2 << 20, 1 << 20);
        let started = cluster.now;
        let both =
            cluster.run_until(Nanos::from_secs(10), |_| forth.completion().is_done() && back.completion().is_done());
        assert!(both, "no stall\n{}", logs(&cluster));
        assert!(cluster.now.since(started) < SECOND, "took {:?}\n{}", cluster.now.since(started), logs(&cluster));
        assert!(cluster.bytes(1, 0, 1 << 20) == a && cluster.bytes(0, 2 << 20, 1 << 20) == b);
        cluster.run_for(SECOND);
        for node in [0, 1] {
            let rails = cluster.rails(node);
            assert_eq!(rails.len(), 4);
            for rail in rails {
                assert_eq!((rail.qps, rail.unfenced), (2, 0), "{rail:?}\n{}", logs(&cluster));
            }
        }
        // Two nodes × four rails × two queue pairs: none besides.
        assert_eq!(cluster.world.ledger().queue_pairs, 16, "{}", logs(&cluster));
    });
}

#[test]
fn a_lossy_handshake_connects_all_the_same() {
    each_seed("a_lossy_handshake", 40, 10, |seed| {
        let mut cluster = Cluster::new(seed, 3, 2, 1, false);
        cluster.weather = Weather { lost_requests: 5, lost_replies: 5, doubled: 20, ..Weather::default() };
        exchange(&mut cluster, 0, 1, seed);
        exchange(&mut cluster, 2, 0, seed);
        exchange(&mut cluster, 1, 2, seed);
        cluster.weather = Weather::default();
        // With good weather again every rail of an opened pair comes up, and nothing is left over.
        cluster.run_for(Nanos::from_secs(10));
        for node in 0..3 {
            let rails = cluster.rails(node);
            assert!(rails.iter().all(|r| r.unfenced == 0), "{rails:?}");
            assert_eq!(cluster.usable_rails(node), 8, "{rails:?}\n{}", logs(&cluster));
        }
        assert_eq!(cluster.world.ledger().queue_pairs, 3 * 8 * 2, "no queue pair is lost or forgotten");
    });
}

#[test]
fn a_link_that_goes_down_and_up_is_used_again() {
    each_seed("a_link", 30, 10, |seed| {
        let mut cluster = Cluster::new(seed, 2, 2, 1, false);
        exchange(&mut cluster, 0, 1, seed);
        let nic = cluster.nodes[(seed % 2) as usize].nic_ids[0];
        cluster.world.set_link(nic, false);
        exchange(&mut cluster, 0, 1, seed + 1);
        cluster.world.set_link(nic, true);
        let back = cluster.run_until(Nanos::from_secs(3), |c| c.usable_rails(0) == 4 && c.usable_rails(1) == 4);
        assert!(back, "{:?}\n{}", cluster.rails(0), logs(&cluster));
        exchange(&mut cluster, 1, 0, seed + 2);
    });
}

/// A network that swallows, and devices that retry for ever, as between split networks with a retry count of 7. The trial of
/// a rail that never worked falls silent as well as one that did.
#[test]
fn a_rail_that_falls_silent_is_left_and_used_again() {
    each_seed("a_rail_that_falls_silent", 15, 5, |seed| {
        let mut cluster = Cluster::new(seed, 2, 2, 1, false);
        exchange(&mut cluster, 0, 1, seed);
        assert!(cluster.run_until(SECOND, |c| c.usable_rails(0) == 4), "{}", logs(&cluster));
        let segment = cluster.open(0, 1).unwrap();
        let op = if seed % 2 == 0 { Op::Read } else { Op::Write };
        let len = 4 << 20;
        let bytes = pattern(len, seed);
        let (source, sink) = if op == Op::Write { (0, 1) } else { (1, 0) };
        cluster.fill(source, 0, &bytes);
        // Each rail pulls its share, also the one that brings nothing back.
        let (ours, theirs) = (cluster.nodes[0].nic_ids[0], cluster.nodes[1].nic_ids[0]);
        let opened = |c: &Cluster| c.nodes[0].log.iter().filter(|line| line.contains(" opened: ")).count();
        // Who is asked before it has published where it listens is an incident of its own (seed 1000003050).
        let before = opened(&cluster);
        cluster.world.swallow(ours, theirs);
        let work = cluster.submit(0, &segment, op, 0, len);
        let swallowed = cluster.now;
        let done = cluster.run_until(Nanos::from_secs(20), |_| work.completion().is_done());
        assert!(done && work.transfers()[0].status() == TransferStatus::Done, "{}", logs(&cluster));
        let took = cluster.now.since(swallowed);
        assert!(took < STALL_AFTER.plus(SECOND), "{took:?}\n{}", logs(&cluster));
        assert!(cluster.bytes(sink, 0, len) == bytes, "every byte is in place");
        let stalled = |line: &&String| line.contains(" opened: ") && line.contains("stalled: no completion");
        assert_eq!(cluster.nodes[0].log.iter().filter(stalled).count(), 1, "{}", logs(&cluster));
        // Its trials are swallowed too, again and again: all of it is one incident, and nobody else waits.
        cluster.run_for(Nanos::from_secs(20));
        let waits = cluster.now;
        exchange(&mut cluster, 0, 1, seed + 1);
        assert!(cluster.now.since(waits) < SECOND, "{:?}\n{}", cluster.now.since(waits), logs(&cluster));
        assert_eq!(opened(&cluster), before + 1, "{}", logs(&cluster));
        assert_eq!((cluster.usable_rails(0), cluster.usable_rails(1)), (3, 3), "{}", logs(&cluster));
        cluster.world.set_path(ours, theirs, true);
        let back = cluster.run_until(Nanos::from_secs(3), |c| c.usable_rails(0) == 4 && c.usable_rails(1) == 4);
        assert!(back, "{:?}\n{}", cluster.rails(0), logs(&cluster));
        exchange(&mut cluster, 1, 0, seed + 2);
        assert!(cluster.rails(0).iter().all(|r| r.unfenced == 0), "{:?}", cluster.rails(0));
    });
}

/// Once a machine that was slow to answer got its peers called unreachable after a single attempt: an earlier failure that
/// had been mended was still counted.
#[test]
fn a_rail_that_fails_anew_has_all_its_attempts_anew() {
    // As slow as an emulated node whose host is busy: one attempt takes longer than the patience with a peer.
    let options = SimOptions { retry_time: Nanos::from_millis(2200), ..SimOptions::default() };
    let mut cluster = Cluster::with(options, 3, 2, 1, 1, true);
    exchange(&mut cluster, 0, 1, 1);
    let segment = cluster.open(0, 1).unwrap();
    let opened = |c: &Cluster| c.nodes[0].log.iter().filter(|line| line.contains(" opened: ")).count();
    // How long the path stays away after the first error: first not at all, then for one attempt.
    for (incident, away) in [(1, Nanos::ZERO), (2, Nanos::from_millis(2300))] {
        let (ours, theirs) = (cluster.nodes[0].nic_ids[0], cluster.nodes[1].nic_ids[0]);
        cluster.world.set_path(ours, theirs, false);
        let read = cluster.submit(0, &segment, Op::Read, 0, 4096);
        assert!(cluster.run_until(Nanos::from_secs(5), |c| opened(c) == incident), "{}", logs(&cluster));
        cluster.run_for(away);
        cluster.world.set_path(ours, theirs, true);
        assert!(cluster.run_until(Nanos::from_secs(10), |_| read.completion().is_done()), "{}", logs(&cluster));
        assert_eq!(read.transfers()[0].status(), TransferStatus::Done, "{}", logs(&cluster));
        cluster.run_for(SECOND);
    }
    assert!(cluster.now < Nanos::from_secs(20), "the second failure comes before the first life counts as a good one");
}

#[test]
fn a_node_that_restarts_under_its_name_is_found_again() {
    each_seed("a_node", 30, 10, |seed| {
        let mut cluster = Cluster::new(seed, 2, 2, 1, seed % 2 == 0);
        exchange(&mut cluster, 0, 1, seed);
        cluster.restart(1);
        // The survivor learns of it by the store's watch, by the restarted node's hello, or by its own first error.
        cluster.run_for(Nanos::from_secs(2));
        exchange(&mut cluster, 1, 0, seed + 1);
        exchange(&mut cluster, 0, 1, seed + 2);
    });
}

/// Refused connections and time prove nothing: a frozen machine keeps packets. Another incarnation on the same host does.
#[test]
fn a_write_to_a_node_that_died_is_in_quarantine_until_its_successor_is_seen() {
    each_seed("a_write_to_a_node", 15, 5, |seed| {
        let mut cluster = Cluster::new(seed, 2, 2, 1, seed % 2 == 0);
        exchange(&mut cluster, 0, 1, seed);
        assert!(cluster.run_until(SECOND, |c| c.usable_rails(0) == 4), "{}", logs(&cluster));
        let segment = cluster.open(0, 1).unwrap();
        cluster.kill(1);
        let write = cluster.submit(0, &segment, Op::Write, 0, 2 << 20);
        let read = cluster.submit(0, &segment, Op::Read, 2 << 20, 2 << 20);
        cluster.run_for(Nanos::from_millis(1));
        // One is cancelled by its caller, the other is ended by its deadline or for want of a rail.
        if seed % 3 == 0 {
            write.abandon(SliceError::of(Cause::Cancelled));
        }
        assert!(cluster.run_until(Nanos::from_secs(40), |_| read.is_terminal()), "{}", logs(&cluster));
        assert_eq!(read.quiescence(), Quiescence::Quiesced { how: Proof::QpDrained }, "it needs nobody's word");
        cluster.run_for(Nanos::from_secs(60));
        assert_eq!(write.quiescence(), Quiescence::Quarantined, "{}", logs(&cluster));
        assert!(!write.completion().is_done());
        cluster.restart(1);
        // Whoever wants something of the peer finds its successor, or is found by it.
        exchange(&mut cluster, 1, 0, seed + 1);
        exchange(&mut cluster, 0, 1, seed + 2);
        let over = cluster.run_until(Nanos::from_secs(10), |_| write.completion().is_done());
        assert!(over, "{:?}\n{}", cluster.rails(0), logs(&cluster));
        assert_eq!(write.quiescence(), Quiescence::Quiesced { how: Proof::PeerFenced });
    });
}

#[test]
fn nodes_that_shut_down_leave_nothing_behind() {
    let mut cluster = Cluster::new(7, 2, 2, 2, false);
    exchange(&mut cluster, 0, 1, 1);
    for node in [0, 1] {
        cluster.call(node, Call::Shutdown, Nanos::from_secs(10));
        assert!(cluster.run_until(Nanos::from_secs(20), |c| c.nodes[node].exited), "{}", logs(&cluster));
    }
    assert!(cluster.store.is_empty(), "keys: {:?}", cluster.store.keys());
    assert_eq!(cluster.world.ledger().queue_pairs, 0, "{}", logs(&cluster));
}

/// `KEEP=1,5,9` beside `SEED=n` carries out only those acts of its plan.
#[test]
fn any_cluster_in_any_trouble_keeps_its_promises() {
    let (mut done, mut failed, mut cancelled) = (0, 0, 0);
    for seed in seeds(4000, 1500) {
        let mut plan = chaos::Plan::of(seed);
        if let Ok(keep) = std::env::var("KEEP") {
            let numbers: Vec<usize> = keep.split(',').filter_map(|number| number.parse().ok()).collect();
            plan = plan.only(&numbers);
        }
        match chaos::attempt(&plan) {
            Ok(story) => {
                (done, failed, cancelled) = (done + story.done, failed + story.failed, cancelled + story.cancelled);
            }
            Err(broken) => panic!("{}", chaos::report(&plan, &broken)),
        }
    }
    println!("{done} batches done and checked, {failed} failed with a cause, {cancelled} cancelled");
}
