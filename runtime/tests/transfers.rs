//! Bytes between two engines: every one in its place, whatever the sizes, regions, NICs and cores.

mod pair;

use std::time::Duration;

use moonrail::{BatchStatus, Engine, Transfer, TransferState};
use moonrail_datapath::nic::sim::SimOptions;
use pair::{LONG, block_on, builder, bytes, fill, nics, pair, pair_with, pattern};

#[test]
fn writes_land_and_reads_bring_back() {
    let p = pair(2, 2, SimOptions::default());
    let near = p.a.allocate(4 << 20, "*").unwrap();
    let far = p.b.allocate(4 << 20, "cpu:0").unwrap();
    let segment = p.a.open_segment("b").unwrap();
    assert_eq!(segment.buffers().len(), 1);
    assert_eq!((segment.buffers()[0].addr, segment.buffers()[0].len), (far.addr(), far.len()));
    fill(&near, 1);

    let sizes = [1, 63, 64, 4096, 65_536, 81_920, 81_921, 200_000, 1 << 20];
    let mut at = 0;
    let mut transfers = Vec::new();
    for len in sizes {
        transfers.push(Transfer::write_from(&near, at, far.addr() + at, len));
        at += len + 3;
    }
    let batch = p.a.submit(&segment, &transfers).unwrap();
    batch.wait(LONG).unwrap();
    assert_eq!(batch.poll(), BatchStatus::Done);
    assert_eq!(batch.bytes(), sizes.iter().sum::<u64>());
    let mut at = 0;
    for (index, len) in sizes.into_iter().enumerate() {
        assert_eq!((batch.transfer(index), batch.transfer_bytes(index)), (Some(TransferState::Done), len));
        let expected: Vec<u8> = (at..at + len).map(|at| pattern(at, 1)).collect();
        assert!(bytes(&far, at, len) == expected, "{len} bytes at {at}");
        assert_eq!(bytes(&far, at + len, 3), [0; 3], "the gap after {len} bytes at {at}");
        at += len + 3;
    }

    fill(&far, 2);
    let whole = p.a.submit(&segment, &[Transfer::read_into(&near, 0, far.addr(), near.len())]).unwrap();
    whole.wait(LONG).unwrap();
    assert!(bytes(&near, 0, near.len()) == bytes(&far, 0, far.len()));

    let total = p.a.counters().total();
    assert_eq!(total.bytes, batch.bytes() + whole.bytes());
    assert_eq!(total.failed, 0);
    assert!(total.doorbells > 0 && total.doorbells <= total.work_requests);
    let rails = p.a.rails();
    assert!(rails.iter().map(|rail| rail.bytes).sum::<u64>() >= total.bytes, "{rails:?}");
    assert!(p.a.nics().iter().all(|nic| nic.registered == near.len()));
}

#[test]
fn regions_larger_than_a_nic_takes_are_cut_and_transfers_cross_the_cuts() {
    let p = pair_with(1, 1, SimOptions::default(), |builder| builder.max_mr_size(128 << 10).slice_size(10_000));
    let near = p.a.allocate(1 << 20, "*").unwrap();
    let far = p.b.allocate(1 << 20, "*").unwrap();
    let segment = p.a.open_segment("b").unwrap();
    assert_eq!(segment.buffers().len(), 8, "one entry per chunk");
    fill(&near, 3);
    let skew = 5000;
    let len = near.len() - skew;
    let batch = p.a.submit(&segment, &[Transfer::write_from(&near, 0, far.addr() + skew, len)]).unwrap();
    batch.wait(LONG).unwrap();
    assert!(bytes(&far, skew, len) == bytes(&near, 0, len));
    assert!(p.log.lock().unwrap().iter().any(|line| line.contains("Auto-splitting buffer")));
}

#[test]
fn one_batch_may_have_several_peers_regions_and_directions() {
    let p = pair(1, 1, SimOptions::default());
    let (one, two) = (p.a.allocate(1 << 16, "*").unwrap(), p.a.allocate(1 << 16, "*").unwrap());
    let far = p.b.allocate(1 << 17, "*").unwrap();
    fill(&one, 4);
    fill(&far, 5);
    let back = bytes(&far, 1 << 16, 1 << 16);
    let (there, here) = (p.a.open_segment("b").unwrap(), p.a.open_segment("a").unwrap());
    let third = p.a.allocate(1 << 16, "*").unwrap();
    // The own segment was opened before the third region existed: it is looked at again by itself.
    let batch =
        p.a.batch()
            .add(&there, Transfer::write_from(&one, 0, far.addr(), 1 << 16))
            .add(&there, Transfer::read_into(&two, 0, far.addr() + (1 << 16), 1 << 16))
            .add(&there, Transfer::read(0, 0, 0))
            .add(&here, Transfer::write_from(&one, 0, third.addr(), 1 << 16))
            .deadline(LONG)
            .submit()
            .unwrap();
    batch.wait(LONG).unwrap();
    assert_eq!(batch.len(), 4);
    assert!(bytes(&far, 0, 1 << 16) == bytes(&one, 0, 1 << 16));
    assert!(bytes(&two, 0, 1 << 16) == back);
    assert!(bytes(&third, 0, 1 << 16) == bytes(&one, 0, 1 << 16));
    assert_eq!(batch.transfer(2), Some(TransferState::Done));
}

#[test]
fn a_batch_can_be_awaited_and_asked_afterwards() {
    let p = pair(1, 1, SimOptions::default());
    let near = p.a.allocate(1 << 16, "*").unwrap();
    let far = p.b.allocate(1 << 16, "*").unwrap();
    let segment = p.a.open_segment("b").unwrap();
    fill(&far, 6);
    for _ in 0..20 {
        let mut batch = p.a.submit(&segment, &[Transfer::read_into(&near, 0, far.addr(), near.len())]).unwrap();
        block_on(&mut batch).unwrap();
        assert_eq!(batch.poll(), BatchStatus::Done);
        assert_eq!(batch.bytes(), near.len());
    }
    assert!(bytes(&near, 0, near.len()) == bytes(&far, 0, far.len()));
    let empty = p.a.submit(&segment, &[]).unwrap();
    assert!(empty.is_empty() && empty.poll() == BatchStatus::Done);
    block_on(empty).unwrap();
}

#[test]
fn many_threads_submit_to_each_other_at_once() {
    let p = pair(2, 2, SimOptions::default());
    let regions = |engine: &Engine| (0..2).map(|_| engine.allocate(1 << 20, "*").unwrap()).collect::<Vec<_>>();
    let (of_a, of_b) = (regions(&p.a), regions(&p.b));
    let run = |engine: &Engine, peer: &str, mine: &[moonrail::Region], theirs: &[moonrail::Region]| {
        let segment = engine.open_segment(peer).unwrap();
        std::thread::scope(|scope| {
            for thread in 0..4u64 {
                let segment = &segment;
                scope.spawn(move || {
                    for round in 0..50u64 {
                        // Each thread has its own 128 KiB of region 0 on both sides.
                        let at = thread * (128 << 10);
                        let marks = vec![(thread * 50 + round) as u8; 100_000];
                        mine[0].write(at, &marks).unwrap();
                        let write = Transfer::write_from(&mine[0], at, theirs[1].addr() + at, 100_000);
                        engine.submit(segment, &[write]).unwrap().wait(LONG).unwrap();
                        let read = Transfer::read_into(&mine[0], at, theirs[1].addr() + at, 100_000);
                        mine[0].write(at, &vec![0xff; 100_000]).unwrap();
                        engine.submit(segment, &[read]).unwrap().wait(LONG).unwrap();
                        assert!(bytes(&mine[0], at, 100_000) == marks);
                    }
                });
            }
        });
    };
    std::thread::scope(|scope| {
        scope.spawn(|| run(&p.a, "b", &of_a, &of_b));
        scope.spawn(|| run(&p.b, "a", &of_b, &of_a));
    });
}

#[test]
fn without_a_metadata_server_the_peer_is_asked_itself() {
    let world = moonrail_datapath::nic::sim::SimWorld::real_time(3, SimOptions::default());
    let log = std::sync::Arc::default();
    let engine = |node| {
        let (open, _) = nics(&world, node, 1);
        builder(&log).name("127.0.0.1").metadata("P2PHANDSHAKE").nics_from(open).cores(1).build().unwrap()
    };
    let (a, b) = (engine(1), engine(2));
    assert!(b.name().starts_with("127.0.0.1:"), "{}", b.name());
    let near = a.allocate(1 << 16, "*").unwrap();
    let far = b.allocate(1 << 16, "*").unwrap();
    fill(&near, 8);
    let segment = a.open_segment(b.name()).unwrap();
    a.submit(&segment, &[Transfer::write_from(&near, 0, far.addr(), 1 << 16)]).unwrap().wait(LONG).unwrap();
    assert!(bytes(&far, 0, 1 << 16) == bytes(&near, 0, 1 << 16));
    assert!(segment.probe(Duration::from_secs(5)).is_ok());
}

#[test]
fn names_without_a_port_have_the_configured_one() {
    let world = moonrail_datapath::nic::sim::SimWorld::real_time(4, SimOptions::default());
    let log = std::sync::Arc::default();
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let variable = port.to_string();
    let engine = |node, fixed| {
        let (open, _) = nics(&world, node, 1);
        let variable = variable.clone();
        let builder = builder(&log).environment(move |name| (name == "MC_HANDSHAKE_PORT").then(|| variable.clone()));
        builder.name("127.0.0.1").rpc_port_from_name(fixed).nics_from(open).cores(1).build().unwrap()
    };
    let (a, b) = (engine(1, false), engine(2, true));
    assert_eq!(b.rpc_addr(), format!("127.0.0.1:{port}"));
    let far = b.allocate(4096, "*").unwrap();
    assert_eq!(a.open_segment("127.0.0.1").unwrap().buffers()[0].addr, far.addr());
}

#[test]
fn a_message_reaches_the_peer() {
    let p = pair(1, 1, SimOptions::default());
    let segment = p.a.open_segment("b").unwrap();
    p.a.notify(&segment, "done", "block 7").unwrap();
    p.a.notify(&segment, "done", "block 8").unwrap();
    let messages: Vec<_> = p.b.notifications().into_iter().map(|n| (n.name, n.message)).collect();
    assert_eq!(messages, [("done".into(), "block 7".into()), ("done".into(), "block 8".into())]);
    assert!(p.b.notifications().is_empty());
}
