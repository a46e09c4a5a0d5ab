//! Cores over simulated NICs: bytes, counts, faults.

mod rig;

use std::sync::Arc;
use std::time::Instant;

use moonrail_datapath::core::{Command, CoreEvent, Doorbell, RailSpec, Spread};
use moonrail_datapath::error::{Cause, SliceError};
use moonrail_datapath::limits::{ACTIVE_WORKS, CAP_CEILING};
use moonrail_datapath::nic::sim::SimOptions;
use moonrail_datapath::nic::{Op, WcStatus};
use moonrail_datapath::region::{Chunk, Region};
use moonrail_datapath::slice::Extent;
use moonrail_datapath::transfer::{RemoteBuffer, RemoteBuffers, Route};
use moonrail_datapath::units::{Nanos, NicId, PeerId, PeerNicId};
use moonrail_datapath::work::TransferStatus;

use rig::{Rig, bytes, pattern};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

const SECOND: Nanos = Nanos::from_secs(1);

/// Whether a sleeper on it would wake.
fn is_rung(doorbell: &Doorbell) -> bool {
    let mut fds = [PollFd::from_borrowed_fd(doorbell.fd(), PollFlags::IN)];
    poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })).unwrap() == 1
}

#[test]
fn bytes_arrive_both_ways_over_four_rails_and_every_rail_carries_some() {
    for cores in [1, 2] {
        let mut rig = Rig::new(1, 2, cores, SimOptions::default());
        for (index, (a, b)) in [(0, 0), (0, 1), (1, 0), (1, 1)].into_iter().enumerate() {
            rig.connect(index % usize::from(cores), a, b, 2);
        }
        let len = 8 << 20;
        let (local, far) = (Rig::region(&rig.near, len), Rig::region(&rig.far, len));
        let remote = rig.remote(&far);
        assert!(rig.run_until(SECOND, |r| r.peer.routes() == (1 << cores) - 1), "trials come back");
        local.memory().write(0, &pattern(len, 1)).unwrap();
        let write = rig.work(Op::Write, &local, &remote, &[(0, 0, len as u64)]);
        rig.submit(&write);
        assert!(rig.run_until(SECOND, |_| write.completion().is_done()));
        assert!(bytes(&far) == pattern(len, 1), "every byte is in place");
        far.memory().write(0, &pattern(len, 2)).unwrap();
        let read = rig.work(Op::Read, &local, &remote, &[(0, 0, len as u64)]);
        rig.submit(&read);
        assert!(rig.run_until(SECOND, |_| read.completion().is_done()));
        assert!(bytes(&local) == pattern(len, 2));
        assert_eq!(read.transfers()[0].status(), TransferStatus::Done);
        assert_eq!(read.transfers()[0].transferred(), len as u64);
    }
}

/// Control is not woken for a Work that nobody sleeps for. Asleep for long, it would leave no room for the one that somebody does.
#[test]
fn control_is_woken_before_works_that_nobody_waits_for_have_filled_its_ring() {
    let mut rig = Rig::new(4, 1, 1, SimOptions::default());
    rig.connect(0, 0, 0, 2);
    let (local, far) = (Rig::region(&rig.near, 4096), Rig::region(&rig.far, 4096));
    let remote = rig.remote(&far);
    assert!(rig.run_until(SECOND, |r| r.peer.routes() == 1));
    let doorbell = rig.doorbell.clone();
    doorbell.prepare();
    let mut finished = 0;
    while !is_rung(&doorbell) {
        assert!(finished < ACTIVE_WORKS, "the ring is full, and control sleeps");
        let work = rig.work(Op::Write, &local, &remote, &[(0, 0, 64)]);
        rig.submit(&work);
        while !work.completion().is_done() {
            rig.now = rig.now.plus(Nanos::from_micros(1));
            rig.world.advance(rig.now);
            rig.cores[0].poll_once(rig.now);
        }
        finished += 1;
    }
    assert!(finished >= ACTIVE_WORKS / 2, "and not for each: after {finished}");
    doorbell.finish();
    rig.answer_all();
}

/// A reader sees what is in flight while it is, and afterwards how long it took: no longer than the whole, and on a path of
/// a known round trip no shorter than that.
#[test]
fn a_rail_tells_what_is_in_flight_and_how_long_it_took() {
    let options = SimOptions { bytes_per_second: 1_000_000_000, ..SimOptions::default() };
    let mut rig = Rig::new(3, 1, 1, options);
    rig.connect(0, 0, 0, 2);
    let (local, far) = (Rig::region(&rig.near, 8 << 20), Rig::region(&rig.far, 8 << 20));
    let remote = rig.remote(&far);
    assert!(rig.run_until(SECOND, |r| r.peer.routes() == 1));
    let counters = rig.rail_counters[0].clone();
    let in_flight = || counters.posted_bytes.get() - counters.ended_bytes.get();
    let work = rig.work(Op::Write, &local, &remote, &[(0, 0, 8 << 20)]);
    let submitted = rig.now;
    rig.submit(&work);
    assert!(rig.run_until(SECOND, |_| in_flight() > 0));
    assert!(counters.work_requests.get() > counters.ended.get() && in_flight() <= CAP_CEILING);
    assert!(rig.run_until(SECOND, |_| work.completion().is_done()));
    assert_eq!(in_flight(), 0);
    let (whole, queue, wire) = (rig.now.since(submitted), counters.queue.read(), counters.wire.read());
    assert_eq!((queue.count(), wire.count()), (128, 128), "8 MiB in slices of 64 KiB");
    // 8 MiB take 4.2 ms over these two queue pairs: most slices waited for those before them, none longer than the whole.
    let longest = |spread: &Spread| spread.quantile(1.0).unwrap();
    assert!(whole.0 > 4_000_000 && longest(&queue) > 2_000_000, "{whole:?} {queue:?}");
    assert!(longest(&queue) <= whole.0 * 9 / 8 && longest(&wire) <= whole.0 * 9 / 8, "{whole:?} {queue:?} {wire:?}");
    assert!(wire.quantile(0.0).unwrap() >= counters.round_trip_ns.get(), "{wire:?}");
    assert!(wire.sum_ns() / wire.count() >= 65_536, "a slice alone takes 66 us on the wire");
}

/// The counts that the design promises: chains behind one doorbell, and one completion for many requests.
#[test]
fn a_batch_of_128_small_transfers_rings_and_completes_rarely() {
    let mut rig = Rig::new(2, 1, 1, SimOptions::default());
    rig.connect(0, 0, 0, 2);
    let (local, far) = (Rig::region(&rig.near, 2 << 20), Rig::region(&rig.far, 2 << 20));
    let remote = rig.remote(&far);
    assert!(rig.run_until(SECOND, |r| r.peer.routes() == 1));
    assert!(rig.run_until(SECOND, |r| r.counters[0].completions.get() == 2), "both trials");
    let before: Vec<u64> = ["doorbells", "completions", "work_requests"].map(|n| count(&rig, n)).to_vec();
    // Every second block: nothing is contiguous.
    let parts: Vec<_> = (0..128u64).map(|i| (i * 8192, (127 - i) * 8192, 4096)).collect();
    for op in [Op::Write, Op::Read] {
        let work = rig.work(op, &local, &remote, &parts);
        rig.submit(&work);
        assert!(rig.run_until(SECOND, |_| work.completion().is_done()));
    }
    let [bells, completions, requests] =
        [0, 1, 2].map(|i| count(&rig, ["doorbells", "completions", "work_requests"][i]) - before[i]);
    assert_eq!(requests, 256);
    assert!(bells <= requests / 8, "{bells} doorbells for {requests} requests");
    assert!(completions <= requests / 16, "{completions} completions for {requests} requests");
}

/// A rail with credit for a whole short batch leaves the others their share of it.
#[test]
fn a_short_batch_is_spread_over_all_rails() {
    let mut rig = Rig::new(12, 2, 1, SimOptions::default());
    for (a, b) in [(0, 0), (0, 1), (1, 0), (1, 1)] {
        rig.connect(0, a, b, 2);
    }
    let (local, far) = (Rig::region(&rig.near, 1 << 20), Rig::region(&rig.far, 1 << 20));
    let remote = rig.remote(&far);
    assert!(rig.run_until(SECOND, |r| r.counters[0].completions.get() == 8), "all trials");
    for _ in 0..10 {
        let work = rig.work(Op::Write, &local, &remote, &[(0, 0, 1 << 20)]);
        rig.submit(&work);
        assert!(rig.run_until(SECOND, |_| work.completion().is_done()));
    }
    let slices: Vec<u64> = rig.rail_counters.iter().map(|c| c.slices.get()).collect();
    assert_eq!(slices, [40, 40, 40, 40], "16 slices a batch, 4 rails");
}

fn count(rig: &Rig, name: &str) -> u64 {
    rig.counters.iter().flat_map(|c| c.list()).filter(|(n, _)| *n == name).map(|(_, v)| v).sum()
}

#[test]
fn a_rail_that_carries_nothing_is_never_used() {
    let mut rig = Rig::new(3, 2, 1, SimOptions::default());
    rig.world.set_path(rig.near[0].id, rig.far[1].id, false);
    let good = rig.connect(0, 0, 0, 1);
    let dead = rig.connect(0, 0, 1, 1);
    let (local, far) = (Rig::region(&rig.near, 1 << 20), Rig::region(&rig.far, 1 << 20));
    let remote = rig.remote(&far);
    assert!(rig.run_until(SECOND, |r| r.is_proven(good)));
    let started = rig.now;
    let work = rig.work(Op::Write, &local, &remote, &[(0, 0, 1 << 20)]);
    rig.submit(&work);
    assert!(rig.run_until(SECOND, |_| work.completion().is_done()));
    assert!(rig.now.since(started) < Nanos::from_millis(10), "nobody waited for the dead rail's retries");
    assert!(!rig.is_proven(dead));
    assert!(rig.run_until(SECOND, |r| r.first_errors.len() == 1), "its trial fails, once");
    assert_eq!(rig.first_errors[0].status, WcStatus::RETRY_EXC_ERR);
    assert!(!rig.first_errors[0].proven);
}

#[test]
fn what_a_dead_port_flushes_is_carried_by_the_other_rail_and_costs_no_error() {
    for op in [Op::Read, Op::Write] {
        let options = SimOptions { retry_time: Nanos::from_millis(20), ..SimOptions::default() };
        let mut rig = Rig::new(4, 2, 1, options);
        rig.connect(0, 0, 0, 2);
        rig.connect(0, 1, 1, 2);
        let len = 8 << 20;
        let (local, far) = (Rig::region(&rig.near, len), Rig::region(&rig.far, len));
        let remote = rig.remote(&far);
        assert!(rig.run_until(SECOND, |r| r.counters[0].completions.get() == 4));
        let (source, sink) = if op == Op::Write { (&local, &far) } else { (&far, &local) };
        source.memory().write(0, &pattern(len, 9)).unwrap();
        let work = rig.work(op, &local, &remote, &[(0, 0, len as u64)]);
        rig.submit(&work);
        for _ in 0..100 {
            rig.turn(Nanos::from_micros(1));
        }
        assert!(!work.completion().is_done(), "the fault must hit in the middle");
        rig.world.set_link(rig.near[0].id, false);
        assert!(rig.run_until(SECOND, |_| work.completion().is_done()));
        assert_eq!(work.transfers()[0].status(), TransferStatus::Done);
        assert!(bytes(sink) == pattern(len, 9));
        assert_eq!(rig.first_errors.len(), 1, "one incident, however many flushes");
        assert!(rig.counters[0].flushes.get() > 0, "the echoes are counted");
        assert_eq!(rig.cores[0].outstanding(), 0);
    }
}

/// A drained WRITE may land at the peer later. So its Work is not terminal before the peer's end is fenced.
#[test]
fn a_work_whose_write_was_outstanding_at_a_failure_waits_for_the_fence() {
    let options = SimOptions { retry_time: Nanos::from_millis(20), ..SimOptions::default() };
    let mut rig = Rig::new(5, 2, 1, options);
    rig.auto_fence = false;
    let lost = rig.connect(0, 0, 0, 1);
    rig.connect(0, 1, 1, 1);
    let len = 4 << 20;
    let (local, far) = (Rig::region(&rig.near, len), Rig::region(&rig.far, len));
    let remote = rig.remote(&far);
    assert!(rig.run_until(SECOND, |r| r.counters[0].completions.get() == 2));
    let work = rig.work(Op::Write, &local, &remote, &[(0, 0, len as u64)]);
    rig.submit(&work);
    for _ in 0..50 {
        rig.turn(Nanos::from_micros(1));
    }
    rig.world.set_link(rig.near[0].id, false);
    assert!(rig.run_until(SECOND, |_| work.transfers()[0].status() == TransferStatus::Done));
    assert!(!rig.run_until(SECOND, |_| work.completion().is_done()), "all bytes are there, but late ones may come");
    rig.fence(0, lost);
    assert!(rig.run_until(Nanos::from_millis(5), |_| work.completion().is_done()));
}

#[test]
fn a_wrong_key_fails_its_transfer_and_not_its_neighbours() {
    let mut rig = Rig::new(6, 1, 1, SimOptions::default());
    rig.connect(0, 0, 0, 1);
    let (local, far) = (Rig::region(&rig.near, 1 << 20), Rig::region(&rig.far, 1 << 20));
    let remote = rig.remote(&far);
    assert!(rig.run_until(SECOND, |r| r.peer.routes() == 1));
    drop(far); // deregistered at the peer: its keys are void
    let work = rig.work(Op::Read, &local, &remote, &[(0, 0, 4096)]);
    rig.submit(&work);
    assert!(rig.run_until(SECOND, |_| work.completion().is_done()));
    let TransferStatus::Failed(error) = work.transfers()[0].status() else { panic!("must fail") };
    assert_eq!((error.cause, error.wc_status()), (Cause::BadRequest, WcStatus::REM_ACCESS_ERR));
}

#[test]
fn a_work_without_a_rail_asks_for_one_and_ends_with_the_cause_or_the_deadline() {
    let mut rig = Rig::new(7, 1, 2, SimOptions::default());
    let (local, far) = (Rig::region(&rig.near, 1 << 20), Rig::region(&rig.far, 1 << 20));
    let remote = rig.remote(&far);
    let work = rig.work(Op::Read, &local, &remote, &[(0, 0, 1 << 20)]);
    rig.submit(&work);
    assert!(rig.run_until(Nanos::from_millis(10), |r| r.wanted >= 1));
    assert!(rig.wanted < 5, "it asks now and then, not each turn");
    let cause = Cause::Unreachable;
    for inbox in rig.inboxes.iter() {
        inbox.command(Command::Unreachable { peer: PeerId(0), cause }).ok().unwrap();
    }
    assert!(rig.run_until(Nanos::from_millis(10), |_| work.completion().is_done()));
    assert_eq!(work.first_error(), Some(SliceError::of(Cause::Unreachable)));
    let late = rig.work(Op::Read, &local, &remote, &[(0, 0, 1 << 20)]);
    rig.submit(&late);
    assert!(!rig.run_until(Nanos::from_secs(29), |_| late.completion().is_done()));
    assert!(rig.run_until(Nanos::from_secs(2), |_| late.completion().is_done()));
    assert_eq!(late.first_error(), Some(SliceError::of(Cause::Deadline)));
    assert!(rig.run_until(SECOND, |r| r.cores.iter().all(|c| c.works() == 0)), "no seat is kept");
}

#[test]
fn a_rail_that_comes_late_serves_a_work_parked_on_another_core() {
    let mut rig = Rig::new(8, 1, 2, SimOptions::default());
    let (local, far) = (Rig::region(&rig.near, 1 << 20), Rig::region(&rig.far, 1 << 20));
    let remote = rig.remote(&far);
    let work = rig.work(Op::Read, &local, &remote, &[(0, 0, 1 << 20)]);
    rig.submit(&work);
    rig.run_until(Nanos::from_millis(5), |_| false);
    let elsewhere = 1 - usize::from(work.home().0);
    rig.connect(elsewhere, 0, 0, 1);
    assert!(rig.run_until(SECOND, |_| work.completion().is_done()));
    assert_eq!(work.transfers()[0].status(), TransferStatus::Done);
}

#[test]
fn stop_gives_everything_back() {
    let mut rig = Rig::new(9, 2, 1, SimOptions::default());
    rig.connect(0, 0, 0, 2);
    let key = rig.connect(0, 1, 1, 2);
    let (local, far) = (Rig::region(&rig.near, 8 << 20), Rig::region(&rig.far, 8 << 20));
    let remote = rig.remote(&far);
    assert!(rig.run_until(SECOND, |r| r.is_proven(key)));
    let work = rig.work(Op::Write, &local, &remote, &[(0, 0, 8 << 20)]);
    rig.submit(&work);
    rig.turn(Nanos::from_micros(1));
    rig.inboxes[0].command(Command::Stop).ok().unwrap();
    assert!(rig.run_until(SECOND, |r| r.cores[0].is_stopped()));
    assert!(work.completion().is_done() && rig.stopped == 1);
    assert_eq!(work.first_error(), Some(SliceError::of(Cause::Shutdown)));
}

/// A peer may publish a buffer without keys beside one with them, and both may lie in one run of slices.
#[test]
fn a_slice_that_no_rail_has_a_key_for_fails_and_its_neighbours_do_not() {
    const LEN: u64 = 4096;
    let mut rig = Rig::new(10, 1, 1, SimOptions::default());
    rig.connect(0, 0, 0, 1);
    let (local, far) = (Rig::region(&rig.near, 1 << 20), Rig::region(&rig.far, 1 << 20));
    let whole = &rig.remote(&far).buffers[0].clone();
    let piece = |index: u64, rkeys: Box<[_]>| RemoteBuffer {
        extent: Extent { addr: whole.extent.addr + index * LEN, len: LEN },
        rkeys,
        open: false,
        location: whole.location.clone(),
    };
    let buffers = (0..8).map(|i| piece(i, if i == 2 { Box::new([None]) } else { whole.rkeys.clone() })).collect();
    let remote = Arc::new(RemoteBuffers::new(rig.peer.clone(), Route::any(), buffers));
    assert!(rig.run_until(SECOND, |r| r.peer.routes() == 1));
    let work = rig.work(Op::Write, &local, &remote, &(0..8).map(|i| (i * LEN, i * LEN, LEN)).collect::<Vec<_>>());
    rig.submit(&work);
    assert!(rig.run_until(Nanos::from_secs(2), |_| work.completion().is_done()), "long before its deadline");
    for (index, transfer) in work.transfers().iter().enumerate() {
        match transfer.status() {
            TransferStatus::Failed(error) => assert_eq!((index, error.cause), (2, Cause::BadRequest)),
            status => assert_eq!(status, TransferStatus::Done, "transfer {index}"),
        }
    }
    assert!(rig.run_until(SECOND, |r| r.cores[0].works() == 0 && r.cores[0].outstanding() == 0));
}

/// (past) The rail without keys took the same slice each turn, and ended it after sixteen, while the other was only full.
#[test]
fn what_one_rail_has_no_key_for_waits_until_the_other_has_credit() {
    for cores in [1, 2] {
        let mut rig = Rig::new(11, 2, cores, SimOptions::default());
        rig.connect(0, 0, 0, 1);
        rig.connect(usize::from(cores) - 1, 1, 1, 1);
        let len = 8 << 20;
        let (whole, far) = (Rig::region(&rig.near, len), Rig::region(&rig.far, len));
        let access = moonrail_datapath::nic::Access { remote: true, relaxed_ordering: false };
        let key = rig.near[0].nic.register(whole.memory(), 0, len as u64, access).unwrap();
        let chunk = Chunk { addr: whole.memory().addr(), len: len as u64, keys: Box::new([Some(key.into()), None]) };
        let local = Arc::new(Region::new(whole.memory().clone(), vec![chunk], "cpu:0".into(), true));
        let remote = rig.remote(&far);
        assert!(rig.run_until(SECOND, |r| r.counters.iter().map(|c| c.completions.get()).sum::<u64>() == 2));
        local.memory().write(0, &pattern(len, 3)).unwrap();
        let work = rig.work(Op::Write, &local, &remote, &[(0, 0, len as u64)]);
        rig.submit(&work);
        assert!(rig.run_until(SECOND, |_| work.completion().is_done()));
        assert_eq!(work.transfers()[0].status(), TransferStatus::Done, "{cores} cores");
        assert!(bytes(&far) == pattern(len, 3));
    }
}

/// Control drains the ring, prepares its doorbell and looks once more. Whatever comes after that has to ring.
#[test]
fn the_end_of_a_batch_that_somebody_sleeps_on_is_rung_for_after_it_is_told() {
    let mut rig = Rig::new(12, 2, 2, SimOptions::default());
    rig.connect(0, 0, 0, 1);
    rig.connect(1, 1, 1, 1);
    let len = 4 << 20;
    let (local, far) = (Rig::region(&rig.near, len), Rig::region(&rig.far, len));
    let remote = rig.remote(&far);
    assert!(rig.run_until(SECOND, |r| r.peer.routes() == 3));
    let work = rig.work(Op::Read, &local, &remote, &[(0, 0, len as u64)]);
    rig.submit(&work);
    rig.turn(Nanos::from_micros(1));
    assert!(rig.cores[0].outstanding() > 0, "core 0 has a share, and the Work stands in its line for more");
    // Core 1 does all the rest. What core 0 posted has arrived meanwhile, and is the last to be seen.
    for _ in 0..5_000 {
        rig.now = rig.now.plus(Nanos::from_micros(1));
        rig.world.advance(rig.now);
        rig.cores[1].poll_once(rig.now);
    }
    rig.answer_all();
    assert_eq!((rig.cores[1].outstanding(), work.completion().is_done()), (0, false));
    assert!(!work.completion().sleep(Instant::now()), "somebody slept");
    let mut told = 0;
    for _ in 0..10 {
        rig.doorbell.finish();
        rig.doorbell.prepare();
        assert!(rig.outboxes[0].is_empty());
        rig.cores[0].poll_once(rig.now);
        let rung = is_rung(&rig.doorbell);
        while let Some(event) = rig.outboxes[0].next() {
            if matches!(event, CoreEvent::Finished(_)) {
                told += 1;
                assert!(rung, "control sleeps on with the news in its ring");
            }
        }
    }
    assert_eq!((told, work.completion().is_done()), (1, true));
}

/// A rail is given back whole and unharmed, or not at all: nothing that is posted, or waits, loses its way.
#[test]
fn a_rail_is_given_back_only_while_nobody_needs_it() {
    let mut rig = Rig::new(21, 1, 1, SimOptions::default());
    let key = rig.connect(0, 0, 0, 2);
    let (local, far) = (Rig::region(&rig.near, 4 << 20), Rig::region(&rig.far, 4 << 20));
    let remote = rig.remote(&far);
    assert!(rig.run_until(SECOND, |r| r.counters[0].completions.get() == 2), "both trials");
    local.memory().write(0, &pattern(4 << 20, 3)).unwrap();
    let write = rig.work(Op::Write, &local, &remote, &[(0, 0, 4 << 20)]);
    rig.submit(&write);
    let mut asked = 0;
    while !write.completion().is_done() {
        rig.turn(Nanos::from_micros(1));
        if !write.completion().is_done() && rig.cores[0].outstanding() > 0 {
            rig.inboxes[0].command(Command::Yield { key }).ok().unwrap();
            rig.turn(Nanos::from_micros(1));
            asked += 1;
        }
    }
    assert!(asked > 10 && rig.yielded.len() <= 2, "{asked} questions");
    assert!(rig.in_use + 1 >= asked, "{} of {asked} were refused", rig.in_use);
    assert_eq!(write.transfers()[0].status(), TransferStatus::Done);
    assert!(bytes(&far) == pattern(4 << 20, 3));
    if rig.yielded.is_empty() {
        rig.inboxes[0].command(Command::Yield { key }).ok().unwrap();
        rig.turn(Nanos::from_micros(1));
    }
    assert_eq!((rig.yielded.len(), rig.peer.routes(), rig.counters[0].first_errors.get()), (2, 0, 0));
    // A second question about it finds nobody.
    rig.inboxes[0].command(Command::Yield { key }).ok().unwrap();
    rig.turn(Nanos::from_micros(1));
    // Adopted again, it carries bytes as before.
    let spec = RailSpec {
        key,
        peer: rig.peer.clone(),
        nic: NicId(0),
        peer_nic: PeerNicId(0),
        counters: rig.rail_counters[0].clone(),
        claims: true,
    };
    for qp in std::mem::take(&mut rig.yielded) {
        rig.inboxes[0].command(Command::Adopt { rail: spec.clone(), qp }).ok().unwrap();
    }
    far.memory().write(0, &pattern(4 << 20, 4)).unwrap();
    let read = rig.work(Op::Read, &local, &remote, &[(0, 0, 4 << 20)]);
    rig.submit(&read);
    assert!(rig.run_until(SECOND, |_| read.completion().is_done()));
    assert!(bytes(&local) == pattern(4 << 20, 4));
    assert!(rig.first_errors.is_empty());
}

/// A device that calls READs a success and cuts them short: the one at fault is read again over another rail and charged, what
/// the same completion implied is read again at no cost, and no byte is wrong. WRITEs are not looked at.
#[test]
fn a_read_that_its_device_does_not_stand_by_is_made_again() {
    let options = SimOptions { cuts_reads: true, ..SimOptions::default() };
    let mut rig = Rig::new(11, 2, 1, options);
    rig.connect(0, 0, 0, 1);
    rig.connect(0, 1, 1, 1);
    let len = 4 << 20;
    let (local, far) = (Rig::region(&rig.near, len), Rig::region(&rig.far, len));
    let remote = rig.remote(&far);
    assert!(rig.run_until(SECOND, |r| r.first_errors.is_empty() && r.peer.routes() == 1));
    far.memory().write(0, &pattern(len, 3)).unwrap();
    rig.world.cut_short(rig.near[0].id, rig.far[0].id);
    let read = rig.work(Op::Read, &local, &remote, &[(0, 0, len as u64)]);
    rig.submit(&read);
    assert!(rig.run_until(SECOND, |_| read.completion().is_done()));
    assert_eq!(read.transfers()[0].status(), TransferStatus::Done);
    assert!(bytes(&local) == pattern(len, 3), "every byte is in place");
    let statuses: Vec<WcStatus> = rig.first_errors.iter().map(|error| error.status).collect();
    assert_eq!(statuses, [WcStatus::UNPROVEN], "{:?}", rig.first_errors);
    assert_eq!(rig.first_errors[0].op, Op::Read);
}
