//! What carries the bytes to a peer, told by whole brains over simulated NICs in virtual time: the choice, its reason, the
//! way back when the better one works again.

mod net;
mod rig;

use std::sync::Arc;
use std::sync::atomic::Ordering;

use moonrail_control::brain::{Answer, Call, Event};
use moonrail_control::{FabricPolicy, RailOptions, RailState, Way};
use moonrail_datapath::core::CoreEvent;
use moonrail_datapath::nic::{AsyncEvent, Fabric, Offer, Target, TcpVersion};
use moonrail_datapath::units::{CoreId, Nanos, NicId, PeerId};

use net::Net;
use net::dialled::{DialledNic, Verdict};

/// A node's dialled NICs.
struct Dialled {
    shm: Arc<DialledNic>,
    tcp: Arc<DialledNic>,
}

impl Dialled {
    fn new(token: u64) -> Self {
        Self {
            shm: DialledNic::new(Fabric::Shm, Some(Offer::Shm { token })),
            tcp: DialledNic::new(Fabric::Tcp, Some(Offer::Tcp { port: 16_000 })),
        }
    }

    fn all(&self) -> Vec<Arc<DialledNic>> {
        vec![self.shm.clone(), self.tcp.clone()]
    }
}

/// Two nodes on hosts `a` and `b` with `rdma` NICs each, and both dialled fabrics.
fn pair(a: u8, b: u8, rdma: u8, with_store: bool) -> (Net, Dialled) {
    let mut net = Net::new(7, with_store);
    let (ours, theirs) = (Dialled::new(1), Dialled::new(2));
    net.add_at(a, 15_000, rdma, RailOptions::default(), ours.all());
    net.add_at(b, 15_001, rdma, RailOptions::default(), theirs.all());
    net.run(Nanos::from_millis(5));
    (net, ours)
}

fn open(net: &mut Net, policy: Option<FabricPolicy>) {
    let name = net.nodes[1].name.clone();
    let id = net.call(0, Call::Open { name, fresh: false, policy });
    assert!(net.until(Nanos::from_secs(2), |net| net.nodes[0].answers.contains_key(&id)), "an answer");
    assert!(matches!(net.nodes[0].answers[&id], Answer::Opened(Ok(_))), "{:?}", net.nodes[0].answers[&id]);
}

fn ways(net: &mut Net) -> Vec<Way> {
    let name = net.nodes[1].name.clone();
    let id = net.call(0, Call::Ways(name));
    match net.nodes[0].answers.get(&id) {
        Some(Answer::Ways(ways)) => ways.clone(),
        other => panic!("{other:?}"),
    }
}

/// Usable rails of node 0, by fabric.
fn usable(net: &mut Net, fabric: Fabric) -> usize {
    net.rails(0).iter().filter(|rail| rail.fabric == fabric && rail.state == RailState::Usable).count()
}

fn settles_on(net: &mut Net, fabric: Fabric, rails: usize, within: Nanos) {
    let settled =
        net.until(within, |net| ways(net).iter().all(|way| way.fabric == Some(fabric)) && usable(net, fabric) == rails);
    let (now, ways, all) = (net.now, ways(net), net.rails(0));
    assert!(settled, "not {rails} rails of {fabric} at {now:?}: {ways:#?} {all:#?}");
}

fn lines(net: &Net, with: &str) -> usize {
    net.nodes[0].log.iter().filter(|record| record.text.contains(with)).count()
}

#[test]
fn one_host_means_shared_memory_and_no_rdma_rail_is_made() {
    let (mut net, ours) = pair(1, 1, 2, true);
    open(&mut net, None);
    settles_on(&mut net, Fabric::Shm, 1, Nanos::from_secs(1));
    assert_eq!(*ours.shm.last.lock().unwrap(), Some(Target::Shm { token: 2 }));
    assert_eq!(net.rails(0).len(), 1, "{:#?}", net.rails(0));
    assert_eq!(lines(&net, "is reached over shm: it runs on this host"), 1);
}

#[test]
fn another_host_with_the_same_everything_else_is_not_shared_memory() {
    let (mut net, ours) = pair(1, 2, 0, true);
    open(&mut net, None);
    settles_on(&mut net, Fabric::Tcp, 1, Nanos::from_secs(1));
    assert_eq!(ours.shm.dials.load(Ordering::Relaxed), 0, "not even tried");
    let target = Target::Tcp { host: "10.0.0.2".into(), port: 16_000, version: TcpVersion::Batch };
    assert_eq!(*ours.tcp.last.lock().unwrap(), Some(target));
    assert!(ways(&mut net)[0].why.contains("no shm: the peer runs on another host"), "{:?}", ways(&mut net));
    let lanes = net.rails(0)[0].qps;
    assert_eq!(lanes, RailOptions::default().tcp_lanes);
}

#[test]
fn what_the_system_forbids_is_told_once_and_the_next_fabric_taken() {
    for rdma in [0, 2] {
        let (mut net, ours) = pair(1, 1, rdma, true);
        ours.shm.say(Verdict::Forbidden);
        open(&mut net, None);
        let (next, rails) = if rdma > 0 { (Fabric::Rdma, 4) } else { (Fabric::Tcp, 1) };
        settles_on(&mut net, next, rails, Nanos::from_secs(2));
        assert_eq!(lines(&net, "now, no longer over shm"), 1);
        assert!(ways(&mut net)[0].why.contains("ptrace scope"), "{:?}", ways(&mut net));
        net.run(Nanos::from_secs(10));
        assert_eq!(ours.shm.dials.load(Ordering::Relaxed), 1, "what is forbidden stays so");
    }
}

#[test]
fn rdma_that_fails_hands_over_to_tcp_and_takes_over_again_when_it_is_back() {
    let (mut net, _ours) = pair(1, 2, 1, true);
    open(&mut net, None);
    settles_on(&mut net, Fabric::Rdma, 1, Nanos::from_secs(1));
    let own = net.nodes[0].sim[0];
    net.world.set_link(own, false);
    // As a core asks whose Works wait.
    let moved = net.until(Nanos::from_secs(4), |net| {
        let event = CoreEvent::Wanted { peer: PeerId(0) };
        net.event(0, Event::Core { core: CoreId(0), event });
        usable(net, Fabric::Tcp) == 1
    });
    assert!(moved, "{:#?} {:#?}", ways(&mut net), net.rails(0));
    assert_eq!(lines(&net, "is reached over tcp now, no longer over rdma"), 1);
    net.world.set_link(own, true);
    settles_on(&mut net, Fabric::Rdma, 1, Nanos::from_secs(5));
    assert!(net.until(Nanos::from_secs(1), |net| usable(net, Fabric::Tcp) == 0), "nobody uses it any more");
}

/// A better way that failed, and may work again, is tried beside the one that is used.
#[test]
fn shared_memory_that_fails_for_now_is_taken_back_when_it_works() {
    let (mut net, ours) = pair(1, 1, 0, true);
    ours.shm.say(Verdict::Fails);
    open(&mut net, None);
    let moved = net.until(Nanos::from_secs(4), |net| {
        wanted(net);
        usable(net, Fabric::Tcp) == 1
    });
    assert!(moved, "{:#?} {:#?}", ways(&mut net), net.rails(0));
    net.run(Nanos::from_secs(2));
    ours.shm.say(Verdict::Connects);
    settles_on(&mut net, Fabric::Shm, 1, Nanos::from_secs(5));
    assert!(net.until(Nanos::from_secs(1), |net| usable(net, Fabric::Tcp) == 0), "nobody uses it any more");
}

/// As a core asks again and again while Works wait for the peer.
fn wanted(net: &mut Net) {
    let event = CoreEvent::Wanted { peer: PeerId(0) };
    net.event(0, Event::Core { core: CoreId(0), event });
}

/// Once such a NIC was waited for until the deadline of whoever needed it: nobody tries its rails, so none of them ever had
/// failed often enough.
#[test]
fn a_nic_lost_for_good_is_not_waited_for() {
    for opened_before in [true, false] {
        for with_tcp in [true, false] {
            let mut net = Net::new(7, true);
            let dialled = [Dialled::new(1), Dialled::new(2)];
            for (at, nics) in (1..).zip(&dialled) {
                let tcp = if with_tcp { vec![nics.tcp.clone()] } else { vec![] };
                net.add_at(at, 15_000, 1, RailOptions::default(), tcp);
            }
            net.run(Nanos::from_millis(5));
            if opened_before {
                open(&mut net, None);
                settles_on(&mut net, Fabric::Rdma, 1, Nanos::from_secs(1));
            }
            let rdma = net.nodes[0].sim[0];
            net.world.set_link(rdma, false);
            net.event(0, Event::Nic { nic: NicId(0), event: AsyncEvent::DeviceFatal });
            if !opened_before {
                open(&mut net, None);
            }
            let found = net.until(Nanos::from_millis(200), |net| {
                wanted(net);
                if with_tcp {
                    usable(net, Fabric::Tcp) == 1
                } else {
                    lines(net, "is unreachable; first cause: device") == 1
                }
            });
            let rails = net.rails(0);
            assert!(found, "opened before {opened_before}, TCP {with_tcp}: {:?} {:#?}", net.nodes[0].log, rails);
            for _ in 0..50 {
                net.run(Nanos::from_millis(100));
                wanted(&mut net);
            }
            assert_eq!(lines(&net, "is unreachable"), usize::from(!with_tcp), "{:?}", net.nodes[0].log);
        }
    }
}

#[test]
fn what_is_required_and_missing_makes_the_peer_unreachable_with_the_cause() {
    let (mut net, ours) = pair(1, 2, 0, true);
    open(&mut net, Some(FabricPolicy::require(Fabric::Rdma)));
    let name = net.nodes[1].name.clone();
    let strict = ways(&mut net).into_iter().find(|way| way.policy.require == Some(Fabric::Rdma)).unwrap();
    assert_eq!(strict.fabric, None);
    assert_eq!(strict.why, "rdma is required; no rdma: this node has no rdma NIC in use");
    assert_eq!(lines(&net, &format!("{name} cannot be reached as asked: rdma is required")), 1);
    let _ = ours;
}

/// Once the rail of a fabric that will not be tried again counted as one that had not failed often enough, and what waited for
/// its peer waited for its deadline: with a peer on the same host that was killed, in each case.
#[test]
fn a_fabric_that_is_ruled_out_is_no_hope_while_the_next_one_fails() {
    let (mut net, ours) = pair(1, 1, 0, true);
    ours.shm.say(Verdict::Forbidden);
    ours.tcp.say(Verdict::Fails);
    open(&mut net, None);
    let given_up = net.until(Nanos::from_secs(4), |net| {
        wanted(net);
        lines(net, "is unreachable; first cause: ") == 1
    });
    assert!(given_up, "{:#?}", net.nodes[0].log);
    // And it is tried again: what failed for now may work.
    ours.tcp.say(Verdict::Connects);
    settles_on(&mut net, Fabric::Tcp, 1, Nanos::from_secs(3));
}

#[test]
fn segments_with_policies_of_their_own_get_rails_of_their_own() {
    let (mut net, _ours) = pair(1, 1, 1, true);
    open(&mut net, None);
    open(&mut net, Some(FabricPolicy::require(Fabric::Tcp)));
    open(&mut net, Some(FabricPolicy::prefer(Fabric::Rdma)));
    let all = net.until(Nanos::from_secs(2), |net| Fabric::ALL.into_iter().all(|fabric| usable(net, fabric) == 1));
    assert!(all, "{:#?}", net.rails(0));
    let chosen: Vec<_> = ways(&mut net).into_iter().map(|way| way.fabric).collect();
    assert_eq!(chosen, [Some(Fabric::Shm), Some(Fabric::Tcp), Some(Fabric::Rdma)]);
}

#[test]
fn a_dial_that_fails_now_is_tried_again_without_a_storm() {
    let (mut net, ours) = pair(1, 2, 0, true);
    ours.tcp.say(Verdict::Fails);
    open(&mut net, None);
    net.run(Nanos::from_secs(2));
    let dials = ours.tcp.dials.load(Ordering::Relaxed);
    assert!((3..=20).contains(&dials), "{dials} dials in two seconds");
    ours.tcp.say(Verdict::Connects);
    settles_on(&mut net, Fabric::Tcp, 1, Nanos::from_secs(3));
}

#[test]
fn a_connection_that_breaks_is_dialled_again_and_counts_as_one_incident() {
    let (mut net, ours) = pair(1, 2, 0, true);
    open(&mut net, None);
    settles_on(&mut net, Fabric::Tcp, 1, Nanos::from_secs(1));
    ours.tcp.broken.store(true, Ordering::Relaxed);
    // The next life's trial fails; so do those after it.
    let id = net.call(0, Call::Incidents);
    assert!(matches!(&net.nodes[0].answers[&id], Answer::Incidents(none) if none.is_empty()));
    net.kill(1);
    let theirs = Dialled::new(3);
    net.store.clear();
    net.add_at(2, 15_001, 0, RailOptions::default(), theirs.all());
    let name = net.nodes[2].name.clone();
    net.run(Nanos::from_millis(50));
    let _ = net.call(0, Call::Open { name: name.clone(), fresh: true, policy: None });
    assert!(net.until(Nanos::from_secs(2), |net| lines(net, "the peer was restarted") == 1), "{:#?}", net.nodes[0].log);
    net.run(Nanos::from_secs(1));
    ours.tcp.broken.store(false, Ordering::Relaxed);
    let _ = net.call(0, Call::Open { name, fresh: false, policy: None });
    assert!(net.until(Nanos::from_secs(3), |net| usable(net, Fabric::Tcp) == 1), "{:#?}", net.rails(0));
    assert_eq!(lines(&net, "incident 1 opened"), 1);
    assert_eq!(lines(&net, "incident 1 closed"), 1);
    assert_eq!(lines(&net, "incident 2 opened"), 0, "one incident until it works again");
}
