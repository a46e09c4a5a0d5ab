//! What is refused, what is cancelled, what waits: always an answer within a bound, and the memory safe until then.

mod pair;

use std::ptr::NonNull;
use std::sync::Arc;
use std::time::{Duration, Instant};

use moonrail::{
    BatchStatus, BuildError, Engine, Memory, Proof, Quiescence, RegisterError, SegmentError, SubmitError, Transfer,
    UnregisterError, WaitError,
};
use moonrail_datapath::nic::sim::{SimOptions, SimWorld};
use pair::{LONG, block_on, builder, cluster, nics, pair, pair_with};

#[test]
fn wrong_transfers_are_refused_before_anything_is_enqueued() {
    let p = pair(1, 1, SimOptions::default());
    let near = p.a.allocate(1 << 16, "*").unwrap();
    let far = p.b.allocate(1 << 16, "*").unwrap();
    let segment = p.a.open_segment("b").unwrap();
    let good = Transfer::read_into(&near, 0, far.addr(), 10);
    let refused = |transfer| p.a.submit(&segment, &[good, transfer]).unwrap_err();

    let beyond = Transfer::read_into(&near, 1 << 16, far.addr(), 1);
    assert_eq!(refused(beyond), SubmitError::NotRegistered { index: 1, addr: near.addr() + (1 << 16) });
    let over_the_end = Transfer::read_into(&near, (1 << 16) - 1, far.addr(), 2);
    assert_eq!(refused(over_the_end), SubmitError::NotRegistered { index: 1, addr: near.addr() + (1 << 16) });
    let outside = refused(Transfer::write_from(&near, 0, far.addr() + (1 << 16) - 1, 2));
    assert_eq!(outside, SubmitError::OutsidePeer { index: 1, segment: "b".into(), addr: far.addr() + (1 << 16) });
    assert!(outside.to_string().starts_with("Failed to get segment descriptor for segment b address 0x"), "{outside}");
    assert_eq!(refused(Transfer::read(near.addr(), u64::MAX, 2)), SubmitError::Length { index: 1, len: 2 });
    assert_eq!(refused(Transfer::read(u64::MAX, far.addr(), 2)), SubmitError::Length { index: 1, len: 2 });
    let foreign = p.b.open_segment("a").unwrap();
    assert!(matches!(p.a.submit(&foreign, &[good]), Err(SubmitError::ForeignSegment { .. })));
    assert_eq!(p.a.counters().total().bytes, 0, "nothing was moved for the good one among them");
}

#[test]
fn wrong_memory_is_refused() {
    let p = pair(1, 1, SimOptions::default());
    assert!(matches!(p.a.allocate(0, "*"), Err(RegisterError::ZeroLength)));
    let region = p.a.allocate(8192, "*").unwrap();
    let inside = NonNull::new((region.addr() + 4096) as *mut u8).unwrap();
    // SAFETY: 4096 bytes of the region, which stays mapped until the end of the test.
    #[allow(unsafe_code)]
    let inside = unsafe { Memory::borrow(inside, 4096) };
    assert!(matches!(p.a.register(&inside, "*", true), Err(RegisterError::Overlap { .. })));
    assert!(matches!(p.a.unregister_at(region.addr() + 1), Err(UnregisterError::NotRegistered { .. })));
    p.a.unregister(&region).unwrap();
    assert!(matches!(p.a.unregister(&region), Err(UnregisterError::NotRegistered { .. })));
    let again = p.a.register(&inside, "cpu:0", false).unwrap();
    assert!(!again.is_remote() && again.location() == "cpu:0");
    assert_eq!(p.a.regions().len(), 1);
}

#[test]
fn memory_leaves_although_a_finished_batch_lies_around() {
    let p = pair(1, 1, SimOptions::default());
    let near = p.a.allocate(1 << 16, "*").unwrap();
    let far = p.b.allocate(1 << 16, "*").unwrap();
    let segment = p.a.open_segment("b").unwrap();
    let transfer = Transfer::write_from(&near, 0, far.addr(), 1 << 16);
    let batch = p.a.submit(&segment, &[transfer]).unwrap();
    batch.wait(LONG).unwrap();
    let registrations = p.world.ledger().registrations;
    let started = Instant::now();
    p.a.unregister(&near).unwrap();
    assert!(started.elapsed() < Duration::from_secs(5));
    assert_eq!(p.world.ledger().registrations, registrations - 1, "really deregistered");
    assert_eq!((batch.poll(), batch.bytes()), (BatchStatus::Done, 1 << 16), "and still told of");
    assert!(matches!(p.a.submit(&segment, &[transfer]), Err(SubmitError::NotRegistered { .. })));
}

#[test]
fn a_peer_that_is_gone_ends_the_batch_with_a_cause() {
    let options = SimOptions { retry_time: moonrail_datapath::units::Nanos::from_millis(50), ..SimOptions::default() };
    let p = pair(1, 1, options);
    let near = p.a.allocate(1 << 16, "*").unwrap();
    let far = p.b.allocate(1 << 16, "*").unwrap();
    let segment = p.a.open_segment("b").unwrap();
    let read = Transfer::read_into(&near, 0, far.addr(), 1 << 16);
    p.a.submit(&segment, &[read]).unwrap().wait(LONG).unwrap();
    p.world.set_path(p.a_nics[0], p.b_nics[0], false);
    let batch = p.a.batch().add(&segment, read).deadline(Duration::from_secs(2)).submit().unwrap();
    let started = Instant::now();
    let error = batch.wait(LONG).unwrap_err();
    assert!(started.elapsed() < Duration::from_secs(15), "{:?}", started.elapsed());
    assert!(matches!(error, WaitError::Failed(_)), "a READ needs no proof from the peer: {error}");
    let first = batch.first_error().unwrap();
    assert_eq!((first.index, first.segment.as_str(), first.len), (0, "b", 1 << 16));
    assert!(!first.advice.is_empty());
    assert!(!p.a.incidents().is_empty());
    // The path is mended: the rail comes back by itself, though the peer may count as unreachable for a moment yet.
    p.world.set_path(p.a_nics[0], p.b_nics[0], true);
    let mended = Instant::now();
    while p.a.submit(&segment, &[read]).unwrap().wait(LONG).is_err() {
        assert!(mended.elapsed() < LONG, "the rail did not come back");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// A WRITE on a path that is cut in the middle: our end is drained soon, and the peer says when its own is retired.
#[test]
fn what_was_on_its_way_when_a_path_died_is_over_with_the_peers_word() {
    let options = SimOptions {
        retry_time: moonrail_datapath::units::Nanos::from_millis(50),
        bytes_per_second: 50_000_000,
        ..SimOptions::default()
    };
    let p = pair(1, 1, options);
    let near = p.a.allocate(16 << 20, "*").unwrap();
    let far = p.b.allocate(16 << 20, "*").unwrap();
    let segment = p.a.open_segment("b").unwrap();
    let small = Transfer::write_from(&near, 0, far.addr(), 1 << 16);
    let whole = p.a.submit(&segment, &[small]).unwrap();
    whole.wait(LONG).unwrap();
    assert_eq!(whole.quiescence(), Quiescence::Quiesced { how: Proof::CompletionSeen });
    let cut = p.a.submit(&segment, &[Transfer::write_from(&near, 0, far.addr(), 16 << 20)]).unwrap();
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(cut.quiescence(), Quiescence::Underway);
    p.world.set_path(p.a_nics[0], p.b_nics[0], false);
    cut.cancel();
    assert_eq!(cut.quiescence(), Quiescence::Quarantined);
    assert!(matches!(cut.wait(LONG), Err(WaitError::Failed(_))), "over, all the same");
    assert_eq!(cut.quiescence(), Quiescence::Quiesced { how: Proof::PeerFenced });
    p.a.unregister(&near).unwrap();
    assert_eq!(cut.quiescence(), Quiescence::Quiesced { how: Proof::PeerFenced }, "and still told of");
    assert_eq!(p.a.submit(&segment, &[]).unwrap().quiescence(), Quiescence::NeverPosted);
}

#[test]
fn a_wait_that_is_too_short_is_not_the_end() {
    let options = SimOptions { bytes_per_second: 20_000_000, ..SimOptions::default() };
    let p = pair(1, 1, options);
    let near = p.a.allocate(4 << 20, "*").unwrap();
    let far = p.b.allocate(4 << 20, "*").unwrap();
    let segment = p.a.open_segment("b").unwrap();
    let batch = p.a.submit(&segment, &[Transfer::read_into(&near, 0, far.addr(), 4 << 20)]).unwrap();
    let error = batch.wait(Duration::from_millis(5)).unwrap_err();
    let WaitError::DeadlineExceeded { what, .. } = &error else { panic!("{error}") };
    assert!(what.starts_with("1 of 1 transfers with b"), "{error}");
    assert_eq!(batch.poll(), BatchStatus::Waiting);
    batch.wait(LONG).unwrap();
}

#[test]
fn cancelling_and_dropping_never_block_and_the_memory_comes_free() {
    let options = SimOptions { bytes_per_second: 50_000_000, ..SimOptions::default() };
    let p = pair(1, 1, options);
    let near = p.a.allocate(64 << 20, "*").unwrap();
    let far = p.b.allocate(64 << 20, "*").unwrap();
    let segment = p.a.open_segment("b").unwrap();
    let all = Transfer::read_into(&near, 0, far.addr(), 64 << 20);
    let cancelled = p.a.submit(&segment, &[all]).unwrap();
    let dropped = p.a.submit(&segment, &[all]).unwrap();
    std::thread::sleep(Duration::from_millis(20));
    let started = Instant::now();
    cancelled.cancel();
    drop(dropped);
    assert!(started.elapsed() < Duration::from_millis(500), "{:?}", started.elapsed());
    assert!(matches!(cancelled.wait(LONG), Err(WaitError::Failed(_))));
    assert!(cancelled.bytes() < 64 << 20);
    p.a.unregister(&near).unwrap();
}

#[test]
fn a_full_engine_says_busy_and_takes_work_again_later() {
    let p = pair(1, 1, SimOptions::default());
    let near = p.a.allocate(1 << 16, "*").unwrap();
    let far = p.b.allocate(1 << 16, "*").unwrap();
    let segment = p.a.open_segment("b").unwrap();
    let read = Transfer::read_into(&near, 0, far.addr(), 64);
    p.a.submit(&segment, &[read]).unwrap().wait(LONG).unwrap();
    p.world.set_path(p.a_nics[0], p.b_nics[0], false);
    let mut batches = Vec::new();
    let refused = loop {
        match p.a.submit(&segment, &[read]) {
            Ok(batch) => batches.push(batch),
            Err(error) => break error,
        }
        assert!(batches.len() < 100_000, "never busy");
    };
    assert_eq!(refused, SubmitError::Busy);
    batches.iter().for_each(moonrail::Batch::cancel);
    p.world.set_path(p.a_nics[0], p.b_nics[0], true);
    for batch in &batches {
        let _ = batch.wait(LONG);
        assert_ne!(batch.poll(), BatchStatus::Waiting);
    }
    p.a.submit(&segment, &[read]).unwrap().wait(LONG).unwrap();
}

#[test]
fn an_engine_that_ends_ends_its_batches() {
    let options = SimOptions { bytes_per_second: 20_000_000, ..SimOptions::default() };
    let p = pair(1, 1, options);
    let near = p.a.allocate(16 << 20, "*").unwrap();
    let far = p.b.allocate(16 << 20, "*").unwrap();
    let segment = p.a.open_segment("b").unwrap();
    let batch = p.a.submit(&segment, &[Transfer::read_into(&near, 0, far.addr(), 16 << 20)]).unwrap();
    std::thread::sleep(Duration::from_millis(10));
    assert!(p.a.shutdown(LONG), "everything ended in time");
    assert!(matches!(batch.wait(LONG), Err(WaitError::Failed(_))));
    assert!(matches!(p.a.submit(&segment, &[]), Err(SubmitError::Stopped)));
    assert!(matches!(p.a.open_segment("b"), Err(SegmentError::Stopped)));
    assert!(matches!(p.a.allocate(4096, "*"), Err(RegisterError::Stopped)));
    assert!(matches!(block_on(batch), Err(WaitError::Failed(_))));
    assert!(p.a.shutdown(LONG), "again: nothing to do");
}

#[test]
fn an_engine_leaves_nothing_behind() {
    let world = SimWorld::real_time(9, SimOptions::default());
    let (log, uri) = (Arc::default(), cluster());
    {
        let engine = |name: &str, node| {
            let (open, _) = nics(&world, node, 2);
            builder(&log).name(name).metadata(&uri).nics_from(open).cores(2).build().unwrap()
        };
        let (a, b) = (engine("a", 1), engine("b", 2));
        let near = a.allocate(1 << 16, "*").unwrap();
        let far = b.allocate(1 << 16, "*").unwrap();
        let segment = a.open_segment("b").unwrap();
        a.submit(&segment, &[Transfer::write_from(&near, 0, far.addr(), 1 << 16)]).unwrap().wait(LONG).unwrap();
        assert_eq!(world.ledger().registrations, 4);
    }
    let ledger = world.ledger();
    assert_eq!((ledger.queue_pairs, ledger.registrations), (0, 0), "{:#?}", log.lock().unwrap());
}

#[test]
fn unknown_names_and_wrong_options_are_told() {
    let p = pair_with(1, 1, SimOptions::default(), |builder| builder);
    let error = p.a.open_segment("nobody").unwrap_err().to_string();
    assert!(error.contains("nobody"), "{error}");
    let refused = |change: fn(moonrail::EngineBuilder) -> moonrail::EngineBuilder| {
        let log = Arc::default();
        change(builder(&log).metadata(cluster())).build().unwrap_err()
    };
    for (error, word) in [
        (refused(|b| b.cores(0).nics_from(one_nic())), "cores = 0 is not possible: it takes 1 to 64"),
        (refused(|b| b.core_cpus([]).nics_from(one_nic())), "core_cpus"),
        (refused(|b| b.core_cpus([1 << 20]).nics_from(one_nic())), "CPUs this process may run on"),
        (refused(|b| b.qps_per_rail(9)), "qps_per_rail = 9 is not possible: it takes 1 to 8"),
        (refused(|b| b.metadata("redis://h")), "redis"),
        (refused(|b| b.nics(["no_such_nic"])), "RdmaTransport: No available RNIC"),
        (refused(|b| b.nic_priority_matrix("[]").nics_from(one_nic())), "priority matrix"),
    ] {
        assert!(error.to_string().contains(word), "{error}");
    }
    let error = refused(|b| b.nics(["no_such_nic"]));
    assert!(matches!(error, BuildError::NoNic { .. }));
    let _: &Engine = &p.b;
}

fn one_nic() -> Vec<Arc<dyn moonrail::Nic>> {
    nics(&SimWorld::real_time(1, SimOptions::default()), 1, 1).0
}

#[test]
fn spans_beyond_the_clock_are_only_long() {
    let p = pair(1, 1, SimOptions::default());
    let near = p.a.allocate(1 << 16, "*").unwrap();
    let far = p.b.allocate(1 << 16, "*").unwrap();
    let segment = p.a.open_segment("b").unwrap();
    let read = Transfer::read_into(&near, 0, far.addr(), 1 << 16);
    p.a.batch().add(&segment, read).deadline(Duration::MAX).submit().unwrap().wait(Duration::MAX).unwrap();
    let mut batch = p.a.batch().add(&segment, read).deadline(Duration::MAX).submit().unwrap();
    block_on(&mut batch).unwrap();
    assert!(segment.probe(Duration::MAX).is_ok());
    assert!(p.a.shutdown(Duration::MAX));
}

#[test]
fn an_engine_that_ends_lets_writes_on_their_way_arrive() {
    let options = SimOptions { bytes_per_second: 20_000_000, ..SimOptions::default() };
    for nics in [1, 2] {
        let p = pair(nics, 1, options);
        let near = p.a.allocate(16 << 20, "*").unwrap();
        let far = p.b.allocate(16 << 20, "*").unwrap();
        let segment = p.a.open_segment("b").unwrap();
        let write = Transfer::write_from(&near, 0, far.addr(), 16 << 20);
        let batch = p.a.submit(&segment, &[write]).unwrap();
        while batch.bytes() == 0 {
            std::thread::sleep(Duration::from_millis(1));
        }
        let started = Instant::now();
        assert!(p.a.shutdown(LONG), "{:#?}", p.log.lock().unwrap());
        assert!(started.elapsed() < Duration::from_secs(5), "{:?}", started.elapsed());
        assert_eq!(batch.poll(), BatchStatus::Failed, "cut short, and over");
    }
}

#[test]
fn awaiting_ends_with_the_engine_even_where_the_batch_does_not() {
    let p = pair(1, 1, SimOptions { bytes_per_second: 1_000, ..SimOptions::default() });
    let near = p.a.allocate(1 << 20, "*").unwrap();
    let far = p.b.allocate(1 << 20, "*").unwrap();
    let segment = p.a.open_segment("b").unwrap();
    while segment.ready_cores() == 0 {
        std::thread::sleep(Duration::from_millis(1));
    }
    let write = Transfer::write_from(&near, 0, far.addr(), 1 << 20);
    let batch = p.a.batch().add(&segment, write).deadline(Duration::from_secs(3600)).submit().unwrap();
    let (say, hear) = std::sync::mpsc::channel();
    std::thread::spawn(move || say.send(block_on(batch).is_err()));
    std::thread::sleep(Duration::from_millis(100));
    // Its requests are out, and there is no time to wait for them.
    p.a.shutdown(Duration::from_millis(10));
    assert_eq!(hear.recv_timeout(LONG / 2), Ok(true));
}

#[test]
fn the_words_of_a_failure_do_not_hold_up_an_executor() {
    let world = SimWorld::real_time(11, SimOptions::default());
    let uri = cluster();
    // A log that hangs hangs the control thread, which would know more words.
    let (hang, hung) = std::sync::mpsc::channel::<()>();
    let hung = std::sync::Mutex::new(hung);
    let sink = move |_: moonrail::Level, line: &str| {
        if line.contains("incident") {
            let _ = hung.lock().unwrap().recv_timeout(LONG);
        }
    };
    let log = Arc::default();
    let (a_open, a_nics) = nics(&world, 1, 1);
    let a = builder(&log).log(sink).name("a").metadata(&uri).nics_from(a_open).cores(1).build().unwrap();
    let b = builder(&log).name("b").metadata(&uri).nics_from(nics(&world, 2, 1).0).cores(1).build().unwrap();
    let near = a.allocate(1 << 16, "*").unwrap();
    let far = b.allocate(1 << 16, "*").unwrap();
    let segment = a.open_segment("b").unwrap();
    let read = Transfer::read_into(&near, 0, far.addr(), 1 << 16);
    a.submit(&segment, &[read]).unwrap().wait(LONG).unwrap();
    world.set_link(a_nics[0], false);
    std::thread::sleep(Duration::from_millis(200));
    let batch = a.batch().add(&segment, read).deadline(Duration::from_millis(50)).submit().unwrap();
    while batch.poll() == BatchStatus::Waiting {
        std::thread::sleep(Duration::from_millis(1));
    }
    let started = Instant::now();
    let error = block_on(batch).unwrap_err();
    assert!(started.elapsed() < Duration::from_millis(500), "{:?}: {error}", started.elapsed());
    drop(hang);
}
