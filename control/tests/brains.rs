//! Brains of RDMA nodes in a network that loses, delays and repeats messages as a seed says. One seed is one history.

mod net;
mod rig;

use moonrail_control::brain::{Action, Answer, Call, CallId, ConnId, Event};
use moonrail_control::metadata::{RpcMeta, SegmentDescriptor};
use moonrail_control::wire::{Frame, Hello, Incarnation, MessageType};
use moonrail_control::{RailOptions, RailState};
use moonrail_datapath::core::CoreEvent;
use moonrail_datapath::nic::AsyncEvent;
use moonrail_datapath::units::{CoreId, Mtu, Nanos, NicId, PortNum, Qpn};

use net::{Caller, FINE, MS, Net, STORM, Weather};

/// How many histories: `SEEDS=n` multiplies.
fn seeds(usual: u64) -> u64 {
    usual * std::env::var("SEEDS").ok().and_then(|n| n.parse().ok()).unwrap_or(1)
}

fn two_by_two(seed: u64) -> (Net, usize, usize) {
    let mut net = Net::new(seed, seed.is_multiple_of(2));
    let a = net.add(1, 2, RailOptions::default());
    let b = net.add(2, 2, RailOptions::default());
    net.run(Nanos::from_millis(5));
    (net, a, b)
}

#[test]
fn an_open_connects_every_pair_once() {
    let (mut net, a, b) = two_by_two(1);
    let id = net.open(a, b);
    net.check_whole(a, b, 4, Nanos::from_secs(2));
    assert!(matches!(net.nodes[a].answers[&id], Answer::Opened(Ok(_))));
    assert!(net.rails(a).iter().chain(&net.rails(b)).all(|rail| rail.lives == 1));
    assert_eq!(net.world.ledger().queue_pairs, 16);
    // One exchange for the descriptor, two per rail.
    assert_eq!(net.requests, 9);
}

#[test]
fn both_ends_opening_at_once_get_one_connection_per_pair() {
    for seed in 0..seeds(100) {
        let (mut net, a, b) = two_by_two(seed);
        net.weather.delay = Nanos(1 + net.random.draw() % (5 * MS));
        net.open(a, b);
        net.run_up_to(3);
        net.open(b, a);
        net.check_whole(a, b, 4, Nanos::from_secs(2));
        for node in [a, b] {
            assert!(net.rails(node).iter().all(|rail| rail.lives == 1), "seed {seed}: {:#?}", net.rails(node));
        }
        net.run(Nanos::from_millis(50));
        assert_eq!(net.world.ledger().queue_pairs, 16, "seed {seed}");
    }
}

/// A port's MTU that changes between two messages of a handshake: what was said counts, at both ends. Once it did not, and
/// Soft-RoCE made wrong bytes of it.
#[test]
fn both_ends_use_one_path_mtu_whenever_it_changes() {
    for (before, after) in [(Mtu::B4096, Mtu::B1024), (Mtu::B1024, Mtu::B4096)] {
        for (at_peer, step) in (0..60).flat_map(|step| [(false, step), (true, step)]) {
            let (mut net, a, b) = two_by_two(step);
            net.weather.delay = Nanos(MS);
            let changing = if at_peer { b } else { a };
            let set = |net: &mut Net, mtu: Mtu| {
                for at in 0..2 {
                    net.world.set_mtu(net.nodes[changing].sim[usize::from(at)], mtu);
                    net.event(changing, Event::Nic { nic: NicId(at), event: AsyncEvent::GidChange(PortNum(1)) });
                }
            };
            set(&mut net, before);
            net.run(Nanos::from_millis(5));
            net.open(a, b);
            net.run(Nanos(step * MS / 5));
            set(&mut net, after);
            net.check_whole(a, b, 4, Nanos::from_secs(5));
            let theirs = net.rails(b);
            for ours in net.rails(a) {
                let other =
                    theirs.iter().find(|rail| (&rail.local_nic, &rail.peer_nic) == (&ours.peer_nic, &ours.local_nic));
                let other = other.expect("the same rails at both ends");
                assert_eq!(ours.path_mtu, other.path_mtu, "{before} to {after} at step {step} of peer: {at_peer}");
            }
        }
    }
}

/// A trial has no bytes and passes whatever the MTU: one that fails is no reason to try a smaller one towards a peer that does
/// not say its own. It was once, and did not fit the peer's any more when the path was there again.
#[test]
fn trials_that_fail_do_not_make_the_mtu_smaller_towards_a_stock_peer() {
    let mut net = Net::new(21, false);
    let a = net.add(1, 1, RailOptions::default());
    let b = net.add(2, 1, RailOptions::default());
    net.without = &["moonrail"];
    net.run(Nanos::from_millis(5));
    let (ours, theirs) = (net.nodes[a].sim[0], net.nodes[b].sim[0]);
    net.world.set_path(ours, theirs, false);
    net.open(a, b);
    // The first failure: after many all values were tried, and it is our own again.
    let failed = net.until(Nanos::from_secs(4), |net| net.log_has(a, "transport retry counter exceeded"));
    assert!(failed, "{:#?}", net.nodes[a].log);
    net.world.set_path(ours, theirs, true);
    net.check_whole(a, b, 1, Nanos::from_secs(10));
    for node in [a, b] {
        let rails = net.rails(node);
        assert!(rails.iter().all(|rail| rail.path_mtu == Some(Mtu::B4096)), "{rails:#?}\n{:#?}", net.nodes[node].log);
    }
}

#[test]
fn lost_late_and_repeated_messages_delay_but_never_break() {
    for seed in 0..seeds(60) {
        let (mut net, a, b) = two_by_two(seed);
        net.weather = STORM;
        net.open(a, b);
        if seed % 3 == 0 {
            net.open(b, a);
        }
        net.run(Nanos::from_secs(4));
        net.weather = FINE;
        // Whatever the storm left half done heals by itself, within the patience of both ends.
        net.run(Nanos::from_secs(3));
        net.open(a, b);
        net.check_whole(a, b, 4, Nanos::from_secs(30));
        net.run(Nanos::from_millis(100));
        assert_eq!(net.world.ledger().queue_pairs, 16, "seed {seed}: nothing leaks");
    }
}

#[test]
fn different_numbers_of_queue_pairs_find_the_smaller() {
    for seed in 0..seeds(20) {
        let mut net = Net::new(seed, false);
        let a = net.add(1, 1, RailOptions { qps_per_rail: 2, ..RailOptions::default() });
        let b = net.add(2, 1, RailOptions { qps_per_rail: 4, ..RailOptions::default() });
        net.open(a, b);
        net.open(b, a);
        net.check_whole(a, b, 1, Nanos::from_secs(3));
        let (qps_a, qps_b) = (net.rails(a)[0].qps, net.rails(b)[0].qps);
        assert_eq!(qps_a, qps_b, "seed {seed}");
    }
}

#[test]
fn a_killed_peer_is_found_again_when_it_is_back() {
    for seed in 0..seeds(20) {
        let (mut net, a, b) = two_by_two(seed);
        net.open(a, b);
        net.check_whole(a, b, 4, Nanos::from_secs(2));
        net.kill(b);
        net.run_up_to(3000);
        let again = net.add(2, 2, RailOptions::default());
        // The new process knows nobody; it opens, and its hellos replace what the old one had.
        net.open(again, a);
        net.check_whole(a, again, 4, Nanos::from_secs(10));
        assert_eq!(net.rails(a).len(), 4, "seed {seed}: the same rails, in another life");
        assert!(net.rails(a).iter().all(|rail| rail.lives == 2));
    }
}

#[test]
fn a_peer_that_is_gone_is_reported_unreachable_and_why() {
    let (mut net, a, b) = two_by_two(3);
    net.open(a, b);
    net.check_whole(a, b, 4, Nanos::from_secs(2));
    net.kill(b);
    // The core finds out with the next request; here it says that work waits and nothing answers.
    for nic in net.nodes[a].sim.clone() {
        net.world.set_link(nic, false);
        net.world.set_link(nic, true);
    }
    let peer = moonrail_datapath::units::PeerId(0);
    net.event(a, Event::Core { core: CoreId(0), event: CoreEvent::Wanted { peer } });
    net.run(Nanos::from_secs(5));
    net.event(a, Event::Core { core: CoreId(0), event: CoreEvent::Wanted { peer } });
    net.run(Nanos::from_secs(1));
    assert!(
        net.nodes[a].log.iter().any(|l| l.text.contains("is unreachable; first cause:")),
        "{:#?}",
        net.nodes[a].log
    );
    let opened = net.nodes[a].log.iter().filter(|l| l.text.contains("opened")).count();
    assert_eq!(
        opened, 2,
        "one line per port that went down, however often its rails are tried: {:#?}",
        net.nodes[a].log
    );
    let name = net.nodes[b].name.clone();
    let id = net.call(a, Call::Why(name));
    assert!(matches!(&net.nodes[a].answers[&id], Answer::Why(Some(_))));
    // When nobody wants the peer any more, nobody knocks.
    net.run(Nanos::from_secs(40));
    let before = net.nodes[a].log.len();
    net.run(Nanos::from_secs(20));
    assert_eq!(net.nodes[a].log.len(), before);
    // A new process is found at the next wish, although the last verdict was bad.
    let again = net.add(2, 2, RailOptions::default());
    net.event(a, Event::Core { core: CoreId(0), event: CoreEvent::Wanted { peer } });
    net.check_whole(a, again, 4, Nanos::from_secs(5));
}

#[test]
fn ports_that_flap_under_a_storm_heal() {
    for seed in 0..seeds(20) {
        let (mut net, a, b) = two_by_two(seed);
        net.open(a, b);
        net.open(b, a);
        net.weather = STORM;
        for _ in 0..12 {
            let node = [a, b][(net.random.draw() % 2) as usize];
            let nic = net.nodes[node].sim[(net.random.draw() % 2) as usize];
            net.world.set_link(nic, false);
            net.run_up_to(300);
            if net.random.draw() % 2 == 0 {
                net.world.shuffle_gids(nic);
            }
            net.world.set_link(nic, true);
            net.run_up_to(300);
        }
        net.weather = FINE;
        net.run(Nanos::from_secs(3));
        net.open(a, b);
        net.check_whole(a, b, 4, Nanos::from_secs(30));
        net.run(Nanos::from_millis(100));
        assert_eq!(net.world.ledger().queue_pairs, 16, "seed {seed}: nothing leaks");
        for node in [a, b] {
            let id = net.call(node, Call::Incidents);
            let Answer::Incidents(incidents) = &net.nodes[node].answers[&id] else { panic!() };
            assert!(incidents.iter().all(|i| i.closed.is_some()), "seed {seed}: {incidents:#?}");
        }
    }
}

#[test]
fn a_node_reaches_its_own_memory_through_each_nic() {
    let mut net = Net::new(5, false);
    let a = net.add(1, 2, RailOptions::default());
    net.open(a, a);
    assert!(net.until(Nanos::from_secs(2), |net| {
        let rails = net.rails(a);
        rails.len() == 2 && rails.iter().all(|rail| rail.state == RailState::Usable)
    }));
    assert_eq!(net.requests, 0, "no message is needed");
}

#[test]
fn a_shutdown_gives_everything_back_even_in_the_middle() {
    for seed in 0..seeds(30) {
        let (mut net, a, b) = two_by_two(seed);
        net.open(a, b);
        net.open(b, a);
        net.run_up_to(40);
        let id = net.call(a, Call::Shutdown);
        assert!(net.until(Nanos::from_secs(9), |net| net.nodes[a].exited), "seed {seed}");
        assert!(matches!(net.nodes[a].answers[&id], Answer::Stopped));
        net.call(b, Call::Shutdown);
        assert!(net.until(Nanos::from_secs(9), |net| net.nodes[b].exited), "seed {seed}");
        assert_eq!(net.world.ledger().queue_pairs, 0, "seed {seed}");
        assert!(net.store.is_empty(), "seed {seed}: {:?}", net.store.keys());
    }
}

/// Engines that know nothing of ours, and some of the past that know no ready acknowledgement, or leave the GID out.
const STRANGERS: [&[&str]; 3] = [&["moonrail"], &["moonrail", "ready_ack"], &["moonrail", "local_gid"]];

#[test]
fn engines_that_say_less_are_connected_too() {
    for (kind, without) in STRANGERS.into_iter().enumerate() {
        for seed in 0..seeds(10) {
            let (mut net, a, b) = two_by_two(seed);
            net.without = without;
            net.open(a, b);
            // With a store the descriptor tells a GID that a hello leaves out; without one, only to who opened its sender.
            if seed % 4 == 0 || kind == 2 && seed % 2 == 1 {
                net.run_up_to(3);
                net.open(b, a);
            }
            net.check_whole(a, b, 4, Nanos::from_secs(20));
            assert!(net.rails(a).iter().all(|rail| !rail.moonrail && rail.qps == 2), "{:#?}", net.rails(a));
            net.run(Nanos::from_millis(100));
            assert_eq!(net.world.ledger().queue_pairs, 16, "kind {kind} seed {seed}");
        }
    }
}

#[test]
fn losses_between_engines_that_say_less_heal_too() {
    for seed in 0..seeds(30) {
        let (mut net, a, b) = two_by_two(seed);
        net.without = STRANGERS[0];
        net.weather = Weather { repeated: 0.0, ..STORM };
        net.open(a, b);
        net.open(b, a);
        net.run(Nanos::from_secs(4));
        net.weather = FINE;
        net.run(Nanos::from_secs(3));
        net.open(a, b);
        net.open(b, a);
        net.check_whole(a, b, 4, Nanos::from_secs(40));
        net.run(Nanos::from_millis(100));
        assert_eq!(net.world.ledger().queue_pairs, 16, "seed {seed}: nothing leaks");
    }
}

#[test]
fn a_stock_peer_with_another_number_of_queue_pairs_is_followed() {
    for seed in 0..seeds(10) {
        let mut net = Net::new(seed, false);
        let a = net.add(1, 1, RailOptions { qps_per_rail: 2, ..RailOptions::default() });
        let b = net.add(2, 1, RailOptions { qps_per_rail: 3, ..RailOptions::default() });
        net.without = STRANGERS[0];
        net.open(a, b);
        net.check_whole(a, b, 1, Nanos::from_secs(5));
        assert_eq!(net.rails(a)[0].qps, net.rails(b)[0].qps, "seed {seed}");
    }
}

#[test]
fn a_name_that_a_dead_node_left_behind_is_taken_over_and_a_live_one_is_not() {
    let mut net = Net::new(1, true);
    let a = net.add(1, 1, RailOptions::default());
    net.run(Nanos::from_millis(5));
    // The entry of node 2 is of an earlier life, on another host where nobody answers.
    let stale = RpcMeta { ip_or_host_name: "10.0.0.99".into(), rpc_port: 1 };
    net.store.insert("mooncake/rpc_meta/10.0.0.2:15000".into(), stale.encode());
    let b = net.add(2, 1, RailOptions::default());
    net.run(Nanos::from_millis(20));
    assert!(matches!(net.nodes[b].answers[&CallId(1)], Answer::Begun(Ok(()))));
    net.open(a, b);
    net.check_whole(a, b, 1, Nanos::from_secs(2));
    // The entry of node 3 leads to node 1, which answers.
    let live = RpcMeta { ip_or_host_name: "10.0.0.1".into(), rpc_port: 15000 };
    net.store.insert("mooncake/rpc_meta/10.0.0.3:15000".into(), live.encode());
    let c = net.add(3, 1, RailOptions::default());
    net.run(Nanos::from_millis(20));
    let Answer::Begun(Err(error)) = &net.nodes[c].answers[&CallId(1)] else { panic!() };
    let text = error.to_string();
    assert!(text.contains("another node publishes itself as 10.0.0.3:15000 and answers at 10.0.0.1:15000"), "{text}");
    assert_eq!(net.store["mooncake/rpc_meta/10.0.0.3:15000"], live.encode(), "left alone");
}

#[test]
fn fresh_queue_pairs_are_no_proof_before_the_former_ones_are_in_err() {
    for seed in 0..seeds(10) {
        let (mut net, a, b) = two_by_two(seed);
        net.open(a, b);
        net.check_whole(a, b, 4, Nanos::from_secs(2));
        net.slow = Some(b);
        // A loses its rails and connects anew; B has not moved its ends of them to ERR yet.
        for at in 0..2 {
            let nic = NicId(at);
            net.event(a, Event::Nic { nic, event: AsyncEvent::PortError(PortNum(1)) });
            net.event(a, Event::Nic { nic, event: AsyncEvent::PortActive(PortNum(1)) });
        }
        net.until(Nanos::from_millis(700), |net| {
            let rails = net.rails(a);
            assert!(rails.iter().all(|r| r.lives == 1 && r.unfenced == 1), "seed {seed} at {:?}: {rails:#?}", net.now);
            false
        });
        assert!(!net.waiting.is_empty(), "B was asked");
        net.slow = None;
        for job in std::mem::take(&mut net.waiting) {
            net.act(b, Action::Run(job));
        }
        net.check_whole(a, b, 4, Nanos::from_secs(10));
        net.run(Nanos::from_millis(100));
        assert_eq!(net.world.ledger().queue_pairs, 16, "seed {seed}: nothing leaks");
    }
}

#[test]
fn a_core_without_room_makes_no_storm_of_handshakes() {
    let (mut net, a, b) = two_by_two(2);
    net.full = Some((a, true));
    net.open(a, b);
    net.run(Nanos::from_secs(4));
    // Two queue pairs a time, four rails, waits that double from 10 ms to 1 s.
    assert!((8..=2 * 4 * 14).contains(&net.adoptions), "{} in 4 s", net.adoptions);
    net.full = None;
    net.open(a, b);
    net.check_whole(a, b, 4, Nanos::from_secs(10));
}

/// Most dials of `node` in any `window` from `since` on, to one host if `host` is given.
fn most_dials(net: &Net, node: usize, host: Option<&str>, since: Nanos, window: Nanos) -> usize {
    let counts = |(at, by, to): &&(Nanos, usize, String)| *at >= since && *by == node && host.is_none_or(|h| h == to);
    let times: Vec<Nanos> = net.dials.iter().filter(counts).map(|(at, ..)| *at).collect();
    let ends = |from: usize| times[from..].partition_point(|at| at.since(times[from]) < window);
    (0..times.len()).map(ends).max().unwrap_or(0)
}

#[test]
fn peers_that_restart_are_not_stormed_by_those_who_miss_them() {
    const PEERS: usize = 6;
    let mut net = Net::new(11, false);
    let a = net.add(1, 4, RailOptions::default());
    let peers: Vec<usize> = (0..PEERS).map(|at| net.add(10 + at as u8, 4, RailOptions::default())).collect();
    let rails = 16;
    for peer in &peers {
        net.open(a, *peer);
    }
    for peer in &peers {
        net.check_whole(a, *peer, rails, Nanos::from_secs(5));
    }
    // (past) every peer's process dies, and our links blink, so that all rails notice in the same moment.
    let died = net.now;
    for peer in &peers {
        net.kill(*peer);
    }
    for nic in net.nodes[a].sim.clone() {
        net.world.set_link(nic, false);
        net.world.set_link(nic, true);
    }
    net.run(Nanos::from_secs(8));
    // One attempt at a time for each rail, waits of 10, 20, … 640 ms, then of 3/4 s at the least.
    let second = Nanos::from_secs(1);
    for at in 0..PEERS {
        let host = format!("10.0.0.{}", 10 + at);
        let (first, later) = (
            most_dials(&net, a, Some(&host), died, second),
            most_dials(&net, a, Some(&host), died.plus(Nanos::from_secs(3)), second),
        );
        assert!(first <= 8 * rails && later <= 2 * rails && later > 0, "{host}: {first}, then {later} in a second");
    }
    // Chance has taken them apart: what began in one moment does not go on in one.
    let moment = most_dials(&net, a, None, died.plus(Nanos::from_secs(3)), Nanos::from_millis(10));
    assert!(moment <= PEERS * rails / 4, "{moment} of {} rails dial within 10 ms", PEERS * rails);
    // They come back: the same bound, and each rail needs its descriptor's, its hello's and its acknowledgement's dial.
    let back = net.now;
    let again: Vec<usize> = (0..PEERS).map(|at| net.add(10 + at as u8, 4, RailOptions::default())).collect();
    for peer in &again {
        net.check_whole(a, *peer, rails, Nanos::from_secs(10));
    }
    let most = most_dials(&net, a, Some("10.0.0.10"), back, second);
    assert!(most <= 4 * rails, "{most} in a second to one that came back");
    println!(
        "{} rails: {moment} dials in 10 ms at the most, {most} in a second to a peer that came back",
        PEERS * rails
    );
}

#[test]
fn what_a_peer_that_asks_is_told_is_never_old() {
    let mut net = Net::new(12, false);
    let a = net.add(1, 1, RailOptions::default());
    net.run(Nanos::from_millis(20));
    let told = |net: &mut Net| {
        let frame = Frame::typed(MessageType::Metadata, b"{}".to_vec());
        let (mut actions, now) = (Vec::new(), net.now);
        net.nodes[a].brain.handle(Event::Request { conn: ConnId(7), frame }, now, &mut actions);
        let Some(Action::Reply { frame, .. }) = actions.pop() else { panic!("no reply") };
        SegmentDescriptor::decode(&frame.body).unwrap()
    };
    let before = told(&mut net);
    assert!(before.buffers.is_empty());
    let buffer =
        moonrail_control::metadata::BufferEntry { name: "cpu:0".into(), addr: 1, length: 1, ..Default::default() };
    net.call(a, Call::Publish(vec![buffer.clone()]));
    assert_eq!(told(&mut net).buffers, [buffer]);
    let nic = net.nodes[a].sim[0];
    net.world.set_mtu(nic, Mtu::B1024);
    net.world.set_link(nic, false);
    net.world.set_link(nic, true);
    net.run(Nanos::from_millis(50));
    assert_eq!(told(&mut net).extra.path_mtus.values().collect::<Vec<_>>(), [&Mtu::B1024]);
}

#[test]
fn a_trial_that_never_comes_back_is_not_waited_for_for_ever() {
    let (mut net, a, b) = two_by_two(4);
    net.full = Some((a, false));
    net.open(a, b);
    net.run(Nanos::from_secs(12));
    assert!(net.log_has(a, "trial has not come back"), "{:#?}", net.nodes[a].log);
}

#[test]
fn notifications_nobody_takes_are_bounded_by_bytes_too() {
    let mut net = Net::new(6, false);
    let a = net.add(1, 1, RailOptions::default());
    let body = moonrail_control::wire::Notify { name: "n".into(), message: "x".repeat(1 << 20) }.encode();
    for conn in 0..64 {
        let frame = Frame::typed(MessageType::Notify, body.clone());
        net.event(a, Event::Request { conn: ConnId(1000 + conn), frame });
    }
    let take = |net: &mut Net| {
        let id = net.call(a, Call::Notifications);
        let Answer::Notifications(taken) = &net.nodes[a].answers[&id] else { panic!() };
        taken.len()
    };
    assert_eq!(take(&mut net), 15, "of 16 MiB, each with its name");
    let frame = Frame::typed(MessageType::Notify, body);
    net.event(a, Event::Request { conn: ConnId(1), frame });
    assert_eq!(take(&mut net), 1, "there is room again");
}

#[test]
fn a_start_that_fails_leaves_no_key_behind() {
    for part in ["ram/", "rpc_meta"] {
        let mut net = Net::new(7, true);
        net.refused = Some(part);
        let a = net.add(1, 1, RailOptions::default());
        net.run(Nanos::from_millis(20));
        assert!(matches!(net.nodes[a].answers[&CallId(1)], Answer::Begun(Err(_))), "{part}");
        net.call(a, Call::Shutdown);
        assert!(net.until(Nanos::from_secs(2), |net| net.nodes[a].exited));
        assert!(net.store.is_empty(), "{part}: {:?}", net.store.keys());
    }
    // A put that is still on its way at the end does not come after the deletion.
    for seed in 0..seeds(20) {
        let mut net = Net::new(seed, true);
        net.weather.delay = Nanos(5 * MS);
        let a = net.add(1, 1, RailOptions::default());
        net.run_up_to(12);
        if seed % 2 == 0 {
            net.call(a, Call::Publish(Vec::new()));
        }
        net.call(a, Call::Shutdown);
        assert!(net.until(Nanos::from_secs(2), |net| net.nodes[a].exited));
        net.run(Nanos::from_millis(50));
        assert!(net.store.is_empty(), "seed {seed}: {:?}", net.store.keys());
    }
}

/// A segment that is published at once may be in the store before the address is. That is no start: nobody finds a node by it.
#[test]
fn a_segment_without_its_address_is_no_start() {
    for seed in 0..seeds(20) {
        let mut net = Net::new(seed, true);
        net.refused = Some("rpc_meta");
        net.weather.delay = Nanos(5 * MS);
        let a = net.add(1, 1, RailOptions::default());
        net.call(a, Call::Publish(Vec::new()));
        net.run(Nanos::from_millis(50));
        assert!(matches!(net.nodes[a].answers[&CallId(1)], Answer::Begun(Err(_))), "seed {seed}");
    }
}

#[test]
fn keys_that_the_store_lost_are_put_again() {
    let mut net = Net::new(8, true);
    let a = net.add(1, 1, RailOptions::default());
    net.run(Nanos::from_millis(20));
    let before: Vec<String> = net.store.keys().cloned().collect();
    assert_eq!(before.len(), 2, "an address and a segment: {before:?}");
    net.store.clear();
    // The store is back, but not quite: the first put is refused.
    net.refused = Some("ram/");
    for key in &before {
        net.event(a, Event::Changed { key: key.clone(), value: None });
    }
    net.run(Nanos::from_millis(500));
    assert_eq!(net.store.len(), 1, "{:?}", net.store.keys());
    net.refused = None;
    net.run(Nanos::from_secs(1));
    assert!(net.store.keys().eq(&before), "{:?}", net.store.keys());
    // Of this nobody is told. The node looks.
    for key in &before {
        net.store.remove(key);
        net.run(Nanos::from_secs(6));
        assert!(net.store.keys().eq(&before), "without {key}: {:?}", net.store.keys());
    }
}

/// What the store says of a successor may be older than what died: only whom we ask can prove that he came later. And the host that
/// died may be frozen, its network may hold packets: a process elsewhere can say nothing of them.
#[test]
fn a_successor_proves_by_an_answer_and_only_for_its_host() {
    for elsewhere in [true, false] {
        let mut net = Net::new(9, true);
        let (a, b) = (net.add(1, 1, RailOptions::default()), net.add(2, 1, RailOptions::default()));
        net.run(Nanos::from_millis(5));
        net.open(a, b);
        net.check_whole(a, b, 1, Nanos::from_secs(2));
        net.kill(b);
        let (key, text) = net.store.iter().find(|(key, _)| key.ends_with("ram/10.0.0.2:15000")).unwrap();
        let (key, mut next) = (key.clone(), SegmentDescriptor::decode(text).unwrap());
        next.extra.incarnation = Some(Incarnation(77));
        net.store.insert(key.clone(), next.encode());
        net.event(a, Event::Changed { key, value: Some(next.encode()) });
        net.run(Nanos::from_millis(100));
        let unfenced = |net: &mut Net| net.rails(a).iter().map(|rail| rail.unfenced).sum::<usize>();
        assert!(net.log_has(a, "the peer was restarted"), "{:#?}", net.nodes[a].log);
        assert_eq!(unfenced(&mut net), 1, "{:#?}", net.rails(a));
        // Nothing can be made here: an answer is all that there will be.
        net.event(a, Event::Nic { nic: NicId(0), event: AsyncEvent::PortError(PortNum(1)) });
        net.machine = elsewhere.then_some(99);
        net.add(2, 1, RailOptions::default());
        net.run(Nanos::from_secs(3));
        assert_eq!(unfenced(&mut net), usize::from(elsewhere), "{:#?}", net.rails(a));
    }
}

/// Nor do fresh queue pairs there, whoever asked for them.
#[test]
fn fresh_queue_pairs_of_another_host_prove_nothing() {
    for (elsewhere, we_ask) in [(true, true), (true, false), (false, true), (false, false)] {
        let mut net = Net::new(13, false);
        let (a, b) = (net.add(1, 1, RailOptions::default()), net.add(2, 1, RailOptions::default()));
        net.run(Nanos::from_millis(5));
        net.open(a, b);
        net.check_whole(a, b, 1, Nanos::from_secs(2));
        net.kill(b);
        net.machine = elsewhere.then_some(99);
        let next = net.add(2, 1, RailOptions::default());
        if we_ask {
            let nic = NicId(0);
            net.event(a, Event::Nic { nic, event: AsyncEvent::PortError(PortNum(1)) });
            net.event(a, Event::Nic { nic, event: AsyncEvent::PortActive(PortNum(1)) });
        } else {
            net.open(next, a);
        }
        let usable = |net: &mut Net| net.rails(a).iter().all(|rail| rail.lives == 2 && rail.state == RailState::Usable);
        assert!(net.until(Nanos::from_secs(5), usable), "{:#?}", net.rails(a));
        let unfenced: Vec<usize> = net.rails(a).iter().map(|rail| rail.unfenced).collect();
        assert_eq!(unfenced, [usize::from(elsewhere)], "we ask: {we_ask}");
    }
}

/// A hello of a process called `name` in the life `life`, the `serial`th, about queue pairs that nobody has any more.
fn hello_of(net: &Net, name: &str, to: usize, life: u64, serial: u64) -> Event {
    let mut hello = Hello {
        local_nic_path: format!("{name}@sim0"),
        peer_nic_path: format!("{}@sim0", net.nodes[to].name),
        local_gid: moonrail_control::wire::GidText::Valid(rig::gid(2, 0)),
        qp_num: [900, 901].into_iter().filter_map(Qpn::new).collect(),
        ready_ack: Some(false),
        ..Hello::default()
    };
    hello.extra.node.incarnation = Some(Incarnation(life));
    hello.extra.serial = Some(serial);
    Event::Request { conn: ConnId(9_999), frame: Frame::typed(MessageType::Connection, hello.encode()) }
}

/// A request that was given up may be the last that is heard. Whoever answered it, and waits to hear that its rail is ready, asks.
/// Once it waited 10 s for a peer that may have waited in the same way.
#[test]
fn a_rail_that_is_made_for_a_request_that_was_given_up_is_asked_about() {
    let mut net = Net::new(16, false);
    let (a, b) = (net.add(1, 1, RailOptions::default()), net.add(2, 1, RailOptions::default()));
    net.run(Nanos::from_millis(5));
    let opened = net.open(b, a);
    net.check_whole(a, b, 1, Nanos::from_secs(2));
    let Some(Answer::Opened(Ok(segment))) = net.nodes[b].answers.get(&opened) else { panic!("not opened") };
    let life = segment.descriptor.extra.incarnation.unwrap();
    let name = net.nodes[a].name.clone();
    let hello = hello_of(&net, &name, b, life.0, 1_000);
    net.event(b, hello);
    net.run(Nanos::from_millis(100));
    assert_eq!(net.rails(b)[0].state, RailState::Waiting);
    net.check_whole(a, b, 1, Nanos::from_secs(2));
}

/// A peer restarts twice while its first request is on its way: that comes last, and is of a life nobody here has heard of.
/// Once it was taken for the newer one, and the living process was refused for ever.
#[test]
fn a_late_word_of_a_life_before_is_found_out_by_asking() {
    let mut net = Net::new(14, false);
    let (a, b) = (net.add(1, 1, RailOptions::default()), net.add(2, 1, RailOptions::default()));
    net.run(Nanos::from_millis(5));
    // A only serves.
    net.open(b, a);
    net.check_whole(a, b, 1, Nanos::from_secs(2));
    let name = net.nodes[b].name.clone();
    let late = hello_of(&net, &name, a, 7, 1);
    net.event(a, late);
    net.run(Nanos::from_millis(1));
    assert!(net.log_has(a, "the peer was restarted"), "{:#?}", net.nodes[a].log);
    // B finds out, and connects anew.
    let nic = NicId(0);
    net.event(b, Event::Nic { nic, event: AsyncEvent::PortError(PortNum(1)) });
    net.event(b, Event::Nic { nic, event: AsyncEvent::PortActive(PortNum(1)) });
    net.check_whole(a, b, 1, Nanos::from_secs(3));
}

/// The descriptor that a store gives may be older than what we hear of the peer before it comes.
#[test]
fn a_descriptor_that_was_asked_for_before_a_restart_is_asked_for_again() {
    let mut net = Net::new(15, true);
    let (a, b) = (net.add(1, 1, RailOptions::default()), net.add(2, 1, RailOptions::default()));
    net.run(Nanos::from_millis(5));
    let key = net.store.keys().find(|key| key.ends_with("ram/10.0.0.2:15000")).unwrap().clone();
    let opened = net.open(a, b);
    // (past) B was restarted after the store was read, and has said hello.
    let mut next = SegmentDescriptor::decode(&net.store[&key]).unwrap();
    next.extra.incarnation = Some(Incarnation(77));
    net.store.insert(key.clone(), next.encode());
    let name = net.nodes[b].name.clone();
    let hello = hello_of(&net, &name, a, 77, 1);
    net.event(a, hello);
    net.run(Nanos::from_millis(5));
    let Some(Answer::Opened(Ok(segment))) = net.nodes[a].answers.get(&opened) else { panic!("not opened") };
    assert_eq!(segment.descriptor.extra.incarnation, Some(Incarnation(77)));
    // The same of a change that its watch tells late.
    next.extra.incarnation = Some(Incarnation(78));
    net.event(a, Event::Changed { key, value: Some(next.encode()) });
    net.run(Nanos::from_millis(5));
    let again = net.call(a, Call::Open { name, fresh: true, policy: None });
    net.run(Nanos::from_millis(5));
    let Some(Answer::Opened(Ok(segment))) = net.nodes[a].answers.get(&again) else { panic!("not opened") };
    assert_eq!(segment.descriptor.extra.incarnation, Some(Incarnation(77)));
}

#[test]
fn whoever_asks_for_the_fence_waits_for_our_end() {
    let mut net = Net::new(10, false);
    let (a, b) = (net.add(1, 1, RailOptions::default()), net.add(2, 1, RailOptions::default()));
    net.run(Nanos::from_millis(5));
    net.open(a, b);
    net.check_whole(a, b, 1, Nanos::from_secs(2));
    net.slow = Some(b);
    let mut hello = Hello {
        local_nic_path: format!("{}@sim0", net.nodes[a].name),
        peer_nic_path: format!("{}@sim0", net.nodes[b].name),
        ..Hello::default()
    };
    // A's are among them; of the others nothing is known.
    hello.extra.fence_qpns = (0..256).filter_map(Qpn::new).collect();
    let (conn, deadline) = (ConnId(7_777), Nanos::from_secs(60));
    let caller = Caller { node: a, token: moonrail_control::brain::Token(u64::MAX), reply_lost: false, deadline };
    net.conns.insert((b, conn), caller);
    net.event(b, Event::Request { conn, frame: Frame::typed(MessageType::Connection, hello.encode()) });
    net.run(Nanos::from_secs(2));
    assert!(!net.waiting.is_empty(), "B retires its end");
    assert!(net.conns.contains_key(&(b, conn)), "and says nothing before it is in ERR");
    net.slow = None;
    for job in std::mem::take(&mut net.waiting) {
        net.act(b, Action::Run(job));
    }
    net.run(Nanos::from_millis(100));
    assert!(!net.conns.contains_key(&(b, conn)), "it is answered");
}
