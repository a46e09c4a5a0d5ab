//! Queue pairs that fall silent: requests outstanding, no completion, and a device that reports nothing.

mod rig;

use std::sync::Arc;

use moonrail_datapath::core::RailKey;
use moonrail_datapath::limits::{ACK_TIMEOUT, RETRY_CNT, STALL_AFTER, STALL_ROUND_TRIPS, STALL_STEP};
use moonrail_datapath::nic::sim::SimOptions;
use moonrail_datapath::nic::{Op, WcStatus};
use moonrail_datapath::region::Region;
use moonrail_datapath::slice::SliceRule;
use moonrail_datapath::units::Nanos;
use moonrail_datapath::work::{TransferStatus, Work};

use rig::{Rig, bytes, pattern};

const SECOND: Nanos = Nanos::from_secs(1);
/// Looks are a millisecond apart, a request may be posted just after one, and what is in flight gets a little time.
const SLACK: Nanos = Nanos::from_millis(50);
const LEN: usize = 4 << 20;

/// Two rails between two nodes, on one core; rail `lost` will fall silent.
struct Pair {
    rig: Rig,
    lost: RailKey,
    local: Arc<Region>,
    far: Arc<Region>,
}

impl Pair {
    fn new(seed: u64, options: SimOptions) -> Self {
        let mut rig = Rig::new(seed, 2, 1, options);
        let lost = rig.connect(0, 0, 0, 2);
        rig.connect(0, 1, 1, 2);
        let (local, far) = (Rig::region(&rig.near, LEN), Rig::region(&rig.far, LEN));
        assert!(rig.run_until(SECOND, |r| r.counters[0].completions.get() == 4), "all trials");
        Self { rig, lost, local, far }
    }

    /// 64 transfers of one slice each, so that each slice's outcome can be seen.
    fn submit(&mut self, op: Op, retries: u8) -> Arc<Work> {
        let (source, sink) = if op == Op::Write { (&self.local, &self.far) } else { (&self.far, &self.local) };
        source.memory().write(0, &pattern(LEN, 7)).unwrap();
        sink.memory().write(0, &vec![0; LEN]).unwrap();
        let remote = self.rig.remote(&self.far);
        let slice = LEN as u64 / 64;
        let parts: Vec<_> = (0..64).map(|i| (i * slice, i * slice, slice)).collect();
        self.rig.retries = retries;
        let work = self.rig.work(op, &self.local, &remote, &parts);
        self.rig.submit(&work);
        work
    }

    fn turns(&mut self, count: usize) {
        for _ in 0..count {
            self.rig.turn(Nanos::from_micros(1));
        }
    }
}

fn failed(work: &Work) -> Vec<WcStatus> {
    let failed = |transfer: &moonrail_datapath::work::TransferOutcome| match transfer.status() {
        TransferStatus::Failed(error) => Some(error.wc_status()),
        _ => None,
    };
    work.transfers().iter().filter_map(failed).collect()
}

#[test]
fn a_silent_queue_pair_is_a_first_error_and_the_other_rail_carries_what_it_had() {
    for op in [Op::Read, Op::Write] {
        let mut pair = Pair::new(21, SimOptions::default());
        // One retry: what is charged twice would end.
        let work = pair.submit(op, 1);
        pair.turns(50);
        assert!(!work.completion().is_done(), "the fault must hit in the middle");
        pair.rig.world.swallow(pair.rig.near[0].id, pair.rig.far[0].id);
        let swallowed = pair.rig.now;
        assert!(!pair.rig.run_until(Nanos(STALL_AFTER.0 - STALL_STEP.0), |_| work.completion().is_done()));
        assert!(pair.rig.first_errors.is_empty(), "the device says nothing, and the watch not yet");
        assert!(pair.rig.run_until(SECOND, |_| work.completion().is_done()));
        assert!(pair.rig.now.since(swallowed) < STALL_AFTER.plus(SLACK), "{:?}", pair.rig.now.since(swallowed));
        assert_eq!(failed(&work), [], "flushed slices cost no retry, the oldest has one");
        let sink = if op == Op::Write { &pair.far } else { &pair.local };
        assert!(bytes(sink) == pattern(LEN, 7), "every byte is in place");
        let [error] = pair.rig.first_errors[..] else { panic!("one incident: {:?}", pair.rig.first_errors) };
        assert_eq!((error.status, error.op, error.proven), (WcStatus::STALLED, op, true));
        assert!(error.age >= Nanos(STALL_AFTER.0 - STALL_STEP.0) && error.behind > 0, "{error:?}");
        let counters = &pair.rig.counters[0];
        assert_eq!((counters.stalls.get(), counters.first_errors.get()), (1, 1));
        assert!(counters.flushes.get() > u64::from(error.behind), "the two queue pairs drained");
        assert!(pair.rig.run_until(SECOND, |r| r.cores[0].works() == 0 && r.cores[0].outstanding() == 0));
    }
}

#[test]
fn of_a_silent_queue_pair_only_the_oldest_request_is_charged() {
    let mut pair = Pair::new(22, SimOptions::default());
    // No retry at all: what is charged ends with the status that tells why.
    let work = pair.submit(Op::Read, 0);
    pair.turns(50);
    pair.rig.world.swallow(pair.rig.near[0].id, pair.rig.far[0].id);
    assert!(pair.rig.run_until(STALL_AFTER.plus(SECOND), |_| work.completion().is_done()));
    assert_eq!(failed(&work), [WcStatus::STALLED]);
}

#[test]
fn a_trial_that_is_swallowed_ends_the_life_of_its_rail() {
    let mut rig = Rig::new(23, 1, 1, SimOptions::default());
    rig.world.swallow(rig.near[0].id, rig.far[0].id);
    let key = rig.connect(0, 0, 0, 1);
    assert!(rig.run_until(STALL_AFTER.plus(SECOND), |r| r.first_errors.len() == 1));
    assert_eq!((rig.first_errors[0].status, rig.first_errors[0].proven), (WcStatus::STALLED, false));
    assert!(!rig.is_proven(key));
}

/// A trial that was held up says nothing of the round trip: what falls silent right after it is not waited for the longer.
#[test]
fn a_rail_that_is_silent_after_a_trial_that_was_held_up_is_noticed_as_soon_as_any() {
    let mut rig = Rig::new(28, 1, 1, SimOptions::default());
    rig.world.swallow(rig.near[0].id, rig.far[0].id);
    let key = rig.connect(0, 0, 0, 1);
    let (local, far) = (Rig::region(&rig.near, LEN), Rig::region(&rig.far, LEN));
    let remote = rig.remote(&far);
    assert!(!rig.run_until(SECOND, |r| r.peer.routes() == 1));
    rig.world.set_path(rig.near[0].id, rig.far[0].id, true);
    assert!(rig.run_until(SECOND, |r| r.peer.routes() == 1) && rig.is_proven(key));
    rig.world.swallow(rig.near[0].id, rig.far[0].id);
    let late = rig.work(Op::Read, &local, &remote, &[(0, 0, 4096)]);
    rig.submit(&late);
    assert!(rig.run_until(STALL_AFTER.plus(SLACK), |r| !r.first_errors.is_empty()));
    assert_eq!(rig.first_errors[0].status, WcStatus::STALLED);
}

/// As late as a device may be by the book, its own word comes first.
#[test]
fn a_device_that_speaks_is_never_preempted() {
    let attempts = u64::from(RETRY_CNT) + 1;
    let options = SimOptions { retry_time: Nanos(4 * (4096 << ACK_TIMEOUT) * attempts), ..SimOptions::default() };
    let mut pair = Pair::new(24, options);
    let work = pair.submit(Op::Write, 9);
    pair.turns(50);
    pair.rig.world.set_path(pair.rig.near[0].id, pair.rig.far[0].id, false);
    assert!(pair.rig.run_until(STALL_AFTER.plus(SECOND), |_| work.completion().is_done()));
    assert_eq!(pair.rig.first_errors.len(), 1);
    assert_eq!(pair.rig.first_errors[0].status, WcStatus::RETRY_EXC_ERR);
}

#[test]
fn slow_and_idle_rails_are_not_silent_ones() {
    // A second there and back is 16 seconds of patience, more than the least.
    let options = SimOptions { delay: Nanos::from_millis(1000), jitter: Nanos::ZERO, ..SimOptions::default() };
    let mut rig = Rig::new(25, 1, 1, options);
    rig.connect(0, 0, 0, 1);
    let (local, far) = (Rig::region(&rig.near, LEN), Rig::region(&rig.far, LEN));
    let remote = rig.remote(&far);
    assert!(rig.run_until(Nanos::from_secs(3), |r| r.peer.routes() == 1));
    // Idle for longer than any silence may be, then busy.
    rig.run_until(Nanos(STALL_AFTER.0 * 10), |_| false);
    let work = rig.work(Op::Read, &local, &remote, &[(0, 0, LEN as u64)]);
    rig.submit(&work);
    assert!(rig.run_until(Nanos::from_secs(25), |_| work.completion().is_done()));
    assert_eq!(work.transfers()[0].status(), TransferStatus::Done);
    assert!(rig.first_errors.is_empty(), "{:?}", rig.first_errors);
    // The same path gone silent: 16 round trips, not the least.
    let round_trip = rig.rail_counters[0].round_trip_ns.get();
    let allowed = Nanos(round_trip * STALL_ROUND_TRIPS);
    assert!(allowed > Nanos(2 * STALL_AFTER.0), "{allowed:?}");
    rig.world.swallow(rig.near[0].id, rig.far[0].id);
    let late = rig.work(Op::Read, &local, &remote, &[(0, 0, 4096)]);
    rig.submit(&late);
    assert!(!rig.run_until(Nanos(allowed.0 - STALL_STEP.0), |r| !r.first_errors.is_empty()));
    assert!(rig.run_until(SECOND, |r| !r.first_errors.is_empty()));
}

#[test]
fn a_long_request_on_a_slow_path_is_not_silence() {
    const LONG: usize = 192 << 20;
    let options = SimOptions { bytes_per_second: 40_000_000, ..SimOptions::default() };
    let mut rig = Rig::new(27, 1, 1, options);
    rig.connect(0, 0, 0, 1);
    rig.rule = SliceRule { size: 1 << 30, ..SliceRule::default() };
    let (local, far) = (Rig::region(&rig.near, LONG), Rig::region(&rig.far, LONG));
    let remote = rig.remote(&far);
    assert!(rig.run_until(SECOND, |r| r.peer.routes() == 1));
    let work = rig.work(Op::Read, &local, &remote, &[(0, 0, LONG as u64)]);
    rig.submit(&work);
    assert_eq!(work.slices().len(), 1);
    assert!(!rig.run_until(STALL_AFTER.plus(Nanos::from_millis(500)), |_| work.completion().is_done()));
    assert!(rig.run_until(SECOND, |_| work.completion().is_done()));
    assert!(rig.first_errors.is_empty(), "{:?}", rig.first_errors);
}

/// A process that was stopped, or a machine that was frozen, has not listened. Its device may have been stopped with it.
#[test]
fn time_in_which_the_core_did_not_turn_is_not_silence() {
    let mut pair = Pair::new(26, SimOptions::default());
    pair.rig.deadline = Nanos::from_secs(3600);
    let work = pair.submit(Op::Read, 9);
    pair.turns(5);
    assert!(pair.rig.cores[0].outstanding() > 0);
    for _ in 0..20 {
        // The clock jumps, the network does not: nothing has come back when the core looks.
        pair.rig.now = pair.rig.now.plus(Nanos::from_secs(10));
        pair.rig.cores[0].poll_once(pair.rig.now);
    }
    pair.rig.answer_all();
    assert!(pair.rig.first_errors.is_empty(), "{:?}", pair.rig.first_errors);
    assert!(pair.rig.run_until(SECOND, |_| work.completion().is_done()));
    assert!(pair.rig.is_proven(pair.lost) && pair.rig.first_errors.is_empty());
}
