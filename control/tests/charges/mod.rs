//! Whom several failing rails are charged to: one incident for one cause, and what still works is evidence too.

use std::sync::Arc;

use moonrail_control::brain::{Answer, Call};
use moonrail_control::{Charge, Incident, RemoteSegment};
use moonrail_datapath::nic::Op;
use moonrail_datapath::units::Nanos;

use super::cluster::Cluster;
use super::logs;

const SECOND: Nanos = Nanos::from_secs(1);
/// A device gives up after half a second, and control tries again within one.
const FAILS_WITHIN: Nanos = Nanos::from_secs(3);

/// Node 0 and what it reads from, all the time.
struct Scene {
    cluster: Cluster,
    segments: Vec<Arc<RemoteSegment>>,
    rails: usize,
}

impl Scene {
    fn new(seed: u64, peers: usize, nics: u8) -> Self {
        let mut cluster = Cluster::new(seed, peers + 1, nics, 1, false);
        let segments = (1..=peers).map(|peer| cluster.open(0, peer).unwrap()).collect();
        let rails = peers * usize::from(nics) * usize::from(nics);
        let mut scene = Self { cluster, segments, rails };
        scene.carry(SECOND);
        assert_eq!(scene.cluster.usable_rails(0), rails, "{}", logs(&scene.cluster));
        assert!(scene.incidents().is_empty());
        scene
    }

    fn carry(&mut self, span: Nanos) {
        let until = self.cluster.now.plus(span);
        while self.cluster.now < until {
            for segment in self.segments.clone() {
                drop(self.cluster.submit(0, &segment, Op::Read, 0, 1 << 20));
            }
            self.cluster.run_for(Nanos::from_millis(50));
        }
    }

    fn set_path(&mut self, nic: usize, peer: usize, peer_nic: usize, up: bool) {
        let (a, b) = (self.cluster.nodes[0].nic_ids[nic], self.cluster.nodes[peer].nic_ids[peer_nic]);
        self.cluster.world.set_path(a, b, up);
    }

    fn incidents(&mut self) -> Vec<Incident> {
        let id = self.cluster.call(0, Call::Incidents, SECOND);
        match self.cluster.take_answer(0, id) {
            Some(Answer::Incidents(incidents)) => incidents,
            other => panic!("{other:?}"),
        }
    }

    fn charges(&mut self) -> Vec<Charge> {
        self.incidents().iter().map(|incident| incident.charge).collect()
    }

    /// Everything works again, each incident is over and had its two lines.
    fn all_is_told(&mut self, incidents: usize) {
        let until = self.cluster.now.plus(Nanos::from_secs(5));
        while self.cluster.usable_rails(0) < self.rails && self.cluster.now < until {
            self.carry(Nanos::from_millis(100));
        }
        let told = self.incidents();
        assert!(
            told.iter().all(|i| i.closed.is_some()) && told.len() == incidents,
            "{told:#?}\n{}",
            logs(&self.cluster)
        );
        let lines = self.cluster.nodes[0].log.iter().filter(|line| line.contains("incident ")).count();
        assert_eq!(lines, 2 * incidents, "{}", logs(&self.cluster));
    }
}

#[test]
fn one_pair_that_fails_is_charged_to_the_pair() {
    let mut scene = Scene::new(1, 1, 2);
    scene.set_path(0, 1, 0, false);
    scene.carry(FAILS_WITHIN);
    assert_eq!(scene.charges(), [Charge::Pair], "{}", logs(&scene.cluster));
    scene.set_path(0, 1, 0, true);
    scene.all_is_told(1);
}

#[test]
fn two_nics_that_do_not_reach_a_nic_of_a_peer_are_one_incident_of_the_peer() {
    let mut scene = Scene::new(2, 1, 2);
    for nic in [0, 1] {
        scene.set_path(nic, 1, 0, false);
    }
    scene.carry(FAILS_WITHIN);
    assert_eq!(scene.charges(), [Charge::Peer], "{}", logs(&scene.cluster));
    // One of the two works again: it is not over.
    scene.set_path(0, 1, 0, true);
    scene.carry(FAILS_WITHIN);
    assert!(scene.incidents()[0].closed.is_none(), "{}", logs(&scene.cluster));
    scene.set_path(1, 1, 0, true);
    scene.all_is_told(1);
    assert!(scene.cluster.nodes[0].log.iter().any(|line| line.contains("charged to the peer")));
}

#[test]
fn two_pairs_of_a_peer_that_others_reach_are_two_incidents() {
    let mut scene = Scene::new(3, 1, 2);
    for nic in [0, 1] {
        scene.set_path(nic, 1, nic, false);
    }
    scene.carry(FAILS_WITHIN);
    assert_eq!(scene.charges(), [Charge::Pair, Charge::Pair], "each NIC of both works: {}", logs(&scene.cluster));
    for nic in [0, 1] {
        scene.set_path(nic, 1, nic, true);
    }
    scene.all_is_told(2);
}

#[test]
fn two_peers_that_one_port_does_not_reach_are_one_incident_of_the_port() {
    let mut scene = Scene::new(4, 2, 1);
    for peer in [1, 2] {
        scene.set_path(0, peer, 0, false);
    }
    scene.carry(FAILS_WITHIN);
    assert_eq!(scene.charges(), [Charge::Port], "{}", logs(&scene.cluster));
    for peer in [1, 2] {
        scene.set_path(0, peer, 0, true);
    }
    scene.all_is_told(1);
    assert!(scene.cluster.nodes[0].log.iter().any(|line| line.contains("charged to the port")));
}

#[test]
fn a_port_that_reaches_a_third_peer_is_not_at_fault() {
    let mut scene = Scene::new(5, 3, 1);
    for peer in [1, 2] {
        scene.set_path(0, peer, 0, false);
    }
    scene.carry(FAILS_WITHIN);
    assert_eq!(scene.charges(), [Charge::Pair, Charge::Pair], "{}", logs(&scene.cluster));
    for peer in [1, 2] {
        scene.set_path(0, peer, 0, true);
    }
    scene.all_is_told(2);
}

#[test]
fn a_port_that_says_so_is_one_incident_however_many_rails_it_has() {
    let mut scene = Scene::new(6, 2, 2);
    let nic = scene.cluster.nodes[0].nic_ids[0];
    scene.cluster.world.set_link(nic, false);
    scene.carry(FAILS_WITHIN);
    assert_eq!(scene.charges(), [Charge::Port], "{}", logs(&scene.cluster));
    scene.cluster.world.set_link(nic, true);
    scene.all_is_told(1);
}

#[test]
fn a_peer_that_dies_is_one_incident_in_the_end() {
    for seed in 7..12 {
        let mut scene = Scene::new(seed, 1, 2);
        scene.cluster.kill(1);
        scene.carry(FAILS_WITHIN);
        let open: Vec<Charge> = scene.incidents().iter().filter(|i| i.closed.is_none()).map(|i| i.charge).collect();
        assert_eq!(open, [Charge::Peer], "seed {seed}: {}", logs(&scene.cluster));
    }
}
