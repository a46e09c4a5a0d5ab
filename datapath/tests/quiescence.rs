//! Whether memory may be used again after a cancel, a deadline or a failure: each answer, and what it rests on.

mod rig;

use std::sync::Arc;

use moonrail_datapath::core::RailKey;
use moonrail_datapath::error::{Cause, SliceError};
use moonrail_datapath::nic::Op;
use moonrail_datapath::nic::sim::SimOptions;
use moonrail_datapath::region::Region;
use moonrail_datapath::units::Nanos;
use moonrail_datapath::work::{Proof, Quiescence, TransferStatus, Work};

use rig::{Rig, bytes, pattern};

const SECOND: Nanos = Nanos::from_secs(1);
const SEEN: Quiescence = Quiescence::Quiesced { how: Proof::CompletionSeen };
const DRAINED: Quiescence = Quiescence::Quiesced { how: Proof::QpDrained };
const FENCED: Quiescence = Quiescence::Quiesced { how: Proof::PeerFenced };
const LEN: usize = 4 << 20;

struct Bench {
    rig: Rig,
    local: Arc<Region>,
    far: Arc<Region>,
}

/// `rails` rails of one queue pair, on one core, whose packets may all come late.
fn bench(seed: u64, rails: usize) -> (Bench, Vec<RailKey>) {
    let options = SimOptions { retry_time: Nanos::from_millis(20), late_writes: 1.0, ..SimOptions::default() };
    let mut rig = Rig::new(seed, 2, 1, options);
    let keys = (0..rails).map(|n| rig.connect(0, n, n, 1)).collect();
    let (local, far) = (Rig::region(&rig.near, LEN), Rig::region(&rig.far, LEN));
    assert!(rig.run_until(SECOND, |r| r.counters[0].completions.get() == rails as u64), "all trials");
    (Bench { rig, local, far }, keys)
}

impl Bench {
    fn submit(&mut self, op: Op) -> Arc<Work> {
        let remote = self.rig.remote(&self.far);
        let work = self.rig.work(op, &self.local, &remote, &[(0, 0, LEN as u64)]);
        self.rig.submit(&work);
        work
    }

    fn turns(&mut self, count: usize) {
        for _ in 0..count {
            self.rig.turn(Nanos::from_micros(1));
        }
    }
}

/// What the caller's `cancel` does.
fn cancel(work: &Work) {
    work.abandon(SliceError::of(Cause::Cancelled));
}

#[test]
fn without_a_rail_nothing_was_posted() {
    let (mut bench, _) = bench(31, 0);
    let cancelled = bench.submit(Op::Write);
    bench.turns(5);
    assert_eq!(cancelled.quiescence(), Quiescence::Underway);
    cancel(&cancelled);
    assert_eq!(cancelled.quiescence(), Quiescence::NeverPosted, "at once");
    let late = bench.submit(Op::Write);
    assert!(bench.rig.run_until(Nanos::from_secs(31), |_| late.is_terminal()), "its deadline ends it");
    assert_eq!(late.quiescence(), Quiescence::NeverPosted);
}

#[test]
fn what_went_well_was_seen_to_complete_also_after_a_cancel() {
    for op in [Op::Read, Op::Write] {
        let (mut bench, _) = bench(32, 1);
        let whole = bench.submit(op);
        assert!(bench.rig.run_until(SECOND, |_| whole.is_terminal()));
        assert_eq!(whole.quiescence(), SEEN);
        let cut = bench.submit(op);
        bench.turns(50);
        cancel(&cut);
        assert_eq!(cut.quiescence(), Quiescence::Quarantined, "slices are out");
        assert!(bench.rig.run_until(SECOND, |_| cut.is_terminal()));
        assert_eq!(cut.quiescence(), SEEN);
        let TransferStatus::Failed(error) = cut.transfers()[0].status() else { panic!("not all of it was carried") };
        assert_eq!(error.cause, Cause::Cancelled);
        assert!(bench.rig.first_errors.is_empty(), "no queue pair was harmed");
    }
}

#[test]
fn a_read_whose_queue_pair_failed_is_proven_by_its_drain() {
    let (mut bench, _) = bench(33, 2);
    bench.rig.auto_fence = false;
    let carried = bench.submit(Op::Read);
    bench.turns(30);
    bench.rig.world.set_link(bench.rig.near[0].id, false);
    assert!(bench.rig.run_until(SECOND, |_| carried.is_terminal()));
    assert_eq!((carried.transfers()[0].status(), carried.quiescence()), (TransferStatus::Done, DRAINED));
}

/// The whole way: the path swallows a WRITE, its deadline passes, its queue pair is given up and drained, and still one of its
/// packets may come. Until the peer's end is proven retired the batch is not over and its memory stays registered.
#[test]
fn a_write_that_may_still_land_is_in_quarantine_until_the_fence() {
    let (mut bench, keys) = bench(34, 1);
    bench.rig.auto_fence = false;
    bench.rig.deadline = SECOND;
    bench.local.memory().write(0, &pattern(LEN, 3)).unwrap();
    let work = bench.submit(Op::Write);
    bench.turns(30);
    bench.rig.world.swallow(bench.rig.near[0].id, bench.rig.far[0].id);
    assert!(bench.rig.run_until(SECOND.plus(SECOND), |_| work.first_error().is_some()));
    assert_eq!(work.first_error(), Some(SliceError::of(Cause::Deadline)), "the first cause");
    assert_eq!(work.quiescence(), Quiescence::Quarantined);
    // From here on only the core keeps the Work, and only the Work the memory.
    let registered = bench.rig.world.ledger().registrations;
    let work = {
        bench.local = bench.far.clone();
        let weak = Arc::downgrade(&work);
        drop(work);
        weak
    };
    assert!(bench.rig.run_until(SECOND, |r| !r.first_errors.is_empty()), "nobody waits for the stall watch");
    assert!(bench.rig.run_until(SECOND, |r| r.cores[0].outstanding() == 0), "drained");
    bench.rig.run_until(Nanos::from_secs(60), |_| false);
    let held = work.upgrade().expect("the core keeps it");
    assert!(matches!(held.transfers()[0].status(), TransferStatus::Failed(_)), "all of it is accounted for");
    assert!(!held.completion().is_done(), "time proves nothing");
    assert_eq!(held.quiescence(), Quiescence::Quarantined);
    assert_eq!(bench.rig.world.ledger().registrations, registered, "its memory is still registered");
    bench.rig.fence(0, keys[0]);
    assert!(bench.rig.run_until(SECOND, |_| held.completion().is_done()), "and with the proof it is over");
    assert_eq!(held.quiescence(), FENCED);
    drop(held);
    bench.rig.finished.clear();
    assert!(work.upgrade().is_none());
    assert_eq!(bench.rig.world.ledger().registrations, registered - 2, "on both NICs");
}

#[test]
fn all_bytes_in_place_by_another_rail_is_quarantine_until_the_fence_too() {
    let (mut bench, keys) = bench(35, 2);
    bench.rig.auto_fence = false;
    bench.local.memory().write(0, &pattern(LEN, 4)).unwrap();
    let work = bench.submit(Op::Write);
    bench.turns(30);
    bench.rig.world.set_link(bench.rig.near[0].id, false);
    assert!(bench.rig.run_until(SECOND, |_| work.transfers()[0].status() == TransferStatus::Done));
    assert!(bytes(&bench.far) == pattern(LEN, 4));
    assert_eq!(work.quiescence(), Quiescence::Quarantined);
    bench.rig.fence(0, keys[0]);
    assert!(bench.rig.run_until(SECOND, |_| work.is_terminal()));
    assert_eq!(work.quiescence(), FENCED);
}
