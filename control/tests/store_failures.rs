//! The store fails in every way there is. What is connected never notices; what is new works again soon after the store
//! does. Virtual time. (`nodes_etcd.rs` has the same against a real etcd.)

mod cluster;

use std::sync::Arc;

use moonrail_control::RemoteSegment;
use moonrail_control::brain::{Answer, Call};
use moonrail_control::error::OpenError;
use moonrail_datapath::nic::Op;
use moonrail_datapath::units::Nanos;
use moonrail_datapath::work::TransferStatus;

use cluster::{Cluster, pattern};

const SECOND: Nanos = Nanos::from_secs(1);
/// A lease is 10 s unless configured; everything is to be as before a second later.
const BACK_WITHIN: Nanos = Nanos::from_secs(11);

/// One transfer over what is connected; how long it took.
fn transfer(cluster: &mut Cluster, to: &Arc<RemoteSegment>, round: u64) -> Nanos {
    let bytes = pattern(4096, round);
    cluster.fill(0, 0, &bytes);
    let began = cluster.now;
    let work = cluster.submit(0, to, Op::Write, 0, 4096);
    assert!(cluster.run_until(SECOND, |_| work.completion().is_done()), "{}", logs(cluster));
    assert_eq!(work.transfers()[0].status(), TransferStatus::Done);
    assert!(cluster.bytes(1, 0, 4096) == bytes);
    cluster.now.since(began)
}

/// Transfers for a while, one every 20 ms; the slowest.
fn traffic(cluster: &mut Cluster, to: &Arc<RemoteSegment>, rounds: u64) -> Nanos {
    let mut slowest = Nanos::ZERO;
    for round in 0..rounds {
        slowest = slowest.max(transfer(cluster, to, round));
        cluster.run_for(Nanos::from_millis(20));
    }
    slowest
}

fn logs(cluster: &Cluster) -> String {
    let line = |n: &cluster::Node| format!("{}:\n  {}\n", n.name, n.log.join("\n  "));
    cluster.nodes.iter().map(line).collect()
}

fn warm(seed: u64, nodes: usize) -> (Cluster, Arc<RemoteSegment>) {
    let mut cluster = Cluster::new(seed, nodes, 2, 1, false);
    let segment = cluster.open(0, 1).unwrap();
    transfer(&mut cluster, &segment, 0);
    assert!(cluster.run_until(SECOND, |c| c.usable_rails(0) == 4 && c.usable_rails(1) == 4));
    (cluster, segment)
}

/// Opens past the cache; the error.
fn open_fresh(cluster: &mut Cluster, from: usize, to: &str) -> (Result<Arc<RemoteSegment>, OpenError>, Nanos) {
    let began = cluster.now;
    let call = Call::Open { name: to.to_owned(), fresh: true, policy: None };
    let id = cluster.call(from, call, Nanos::from_secs(5));
    let mut answer = None;
    assert!(cluster.run_until(Nanos::from_secs(6), |c| {
        answer = answer.take().or_else(|| c.take_answer(from, id));
        answer.is_some()
    }));
    match answer {
        Some(Answer::Opened(result)) => (result, cluster.now.since(began)),
        other => panic!("{other:?}"),
    }
}

#[test]
fn an_outage_stops_no_transfer_and_new_peers_work_again_when_it_is_over() {
    for seed in 1..=10 {
        let (mut cluster, segment) = warm(seed, 3);
        let usual = traffic(&mut cluster, &segment, 100);
        cluster.store_down = true;
        let meanwhile = traffic(&mut cluster, &segment, 1000);
        assert!(meanwhile <= usual.plus(Nanos::from_millis(1)), "{meanwhile:?} where {usual:?} is usual");
        // Known peers are served from the cache; a look past it fails in time, with the name of what failed.
        assert!(cluster.open(0, 1).is_ok());
        for unknown in ["node2", "node1"] {
            let (result, took) = open_fresh(&mut cluster, 0, unknown);
            let error = result.unwrap_err().to_string();
            assert!(error.contains("the simulated store") && took < Nanos::from_secs(2), "{took:?}: {error}");
        }
        cluster.store_down = false;
        let over = cluster.now;
        let opened = cluster.run_until(BACK_WITHIN, |c| c.open(2, 0).is_ok());
        assert!(opened, "{}", logs(&cluster));
        let work = {
            let back = cluster.open(2, 0).unwrap();
            cluster.submit(2, &back, Op::Read, 0, 4096)
        };
        assert!(cluster.run_until(BACK_WITHIN, |_| work.completion().is_done()), "{}", logs(&cluster));
        assert!(cluster.now.since(over) < BACK_WITHIN);
        assert!(cluster.rails(0).iter().filter(|rail| rail.peer == "node1").all(|rail| rail.lives == 1));
    }
}

/// Wiped, or started anew with nothing in it: an HTTP store tells nobody, and no lease ends.
#[test]
fn what_the_store_lost_is_published_again() {
    for seed in 1..=10 {
        let (mut cluster, segment) = warm(seed, 3);
        cluster.run_for(Nanos::from_millis(seed * 777));
        let before: Vec<String> = cluster.store.keys().cloned().collect();
        cluster.store.clear();
        let wiped = cluster.now;
        let back = cluster.run_until(BACK_WITHIN, |c| before.iter().all(|key| c.store.contains_key(key)));
        assert!(back, "{:?}\n{}", cluster.store.keys(), logs(&cluster));
        println!("seed {seed}: all keys are back after {} ms", cluster.now.since(wiped).0 / 1_000_000);
        assert!(open_fresh(&mut cluster, 2, "node1").0.is_ok());
        traffic(&mut cluster, &segment, 10);
        assert!(cluster.rails(0).iter().all(|rail| rail.lives == 1), "nothing was connected anew");
        // Down at the same time: it is put when the store takes it.
        cluster.store.clear();
        cluster.store_down = true;
        cluster.run_for(Nanos::from_secs(20));
        cluster.store_down = false;
        assert!(cluster.run_until(BACK_WITHIN, |c| before.iter().all(|key| c.store.contains_key(key))));
    }
}

/// A backup of the store, or a slow hand, brings the descriptor of a dead process back. Its keys are of memory that is gone.
#[test]
fn the_descriptor_of_an_earlier_life_is_refused() {
    let (mut cluster, _) = warm(4, 2);
    let key = cluster.store.keys().find(|key| key.ends_with("ram/node1")).unwrap().clone();
    let stale = cluster.store[&key].clone();
    cluster.restart(1);
    cluster.run_for(Nanos::from_secs(2));
    let (segment, _) = open_fresh(&mut cluster, 0, "node1");
    let segment = segment.unwrap();
    transfer(&mut cluster, &segment, 1);
    cluster.store.insert(key.clone(), stale);
    let (result, _) = open_fresh(&mut cluster, 0, "node1");
    let error = result.unwrap_err();
    assert!(matches!(error, OpenError::PastLife { .. }), "{error}");
    assert!(error.to_string().contains("the simulated store") && error.to_string().contains("node1"), "{error}");
    // What is known of the present life goes on being used.
    let known = cluster.open(0, 1).unwrap();
    assert_eq!(known.descriptor.extra.incarnation, segment.descriptor.extra.incarnation);
    transfer(&mut cluster, &known, 2);
    assert!(cluster.rails(0).iter().all(|rail| rail.lives <= 2));
}
