//! What a cancel does to what is on its way: it may finish, for a time; then its queue pair is given up.

mod rig;

use moonrail_datapath::error::{Cause, SliceError};
use moonrail_datapath::limits::{CANCEL_GRACE, CANCEL_ROUND_TRIPS, STALL_STEP};
use moonrail_datapath::nic::sim::SimOptions;
use moonrail_datapath::nic::{Op, WcStatus};
use moonrail_datapath::units::Nanos;
use moonrail_datapath::work::{Proof, Quiescence, TransferStatus, Work};

use rig::{Rig, bytes, pattern};

const SECOND: Nanos = Nanos::from_secs(1);
const HALF: u64 = 2 << 20;

fn cancel(work: &Work) {
    work.abandon(SliceError::of(Cause::Cancelled));
}

#[test]
fn on_a_dead_path_the_queue_pair_is_given_up_and_bystanders_move_at_no_cost() {
    for cancelled in [true, false] {
        let mut rig = Rig::new(41, 2, 1, SimOptions::default());
        rig.connect(0, 0, 0, 1);
        rig.connect(0, 1, 1, 1);
        let (local, far) = (Rig::region(&rig.near, 2 * HALF as usize), Rig::region(&rig.far, 2 * HALF as usize));
        let remote = rig.remote(&far);
        assert!(rig.run_until(SECOND, |r| r.counters[0].completions.get() == 2));
        far.memory().write(0, &pattern(2 * HALF as usize, 5)).unwrap();
        // No retry: a bystander that is charged for the cut fails.
        rig.retries = 0;
        let mine = rig.work(Op::Read, &local, &remote, &[(0, 0, HALF)]);
        let bystander = rig.work(Op::Read, &local, &remote, &[(HALF, HALF, HALF)]);
        rig.world.swallow(rig.near[0].id, rig.far[0].id);
        rig.submit(&mine);
        rig.submit(&bystander);
        assert!(
            !rig.run_until(Nanos::from_millis(20), |_| mine.is_terminal() || bystander.is_terminal()),
            "both are hit"
        );
        let since = rig.now;
        if cancelled {
            cancel(&mine);
        }
        let over = rig.run_until(CANCEL_GRACE.plus(STALL_STEP), |_| mine.is_terminal() && bystander.is_terminal());
        assert_eq!(over, cancelled, "without a cancel there is more patience");
        if !cancelled {
            assert!(rig.first_errors.is_empty());
            continue;
        }
        assert!(rig.now.since(since) > Nanos(CANCEL_GRACE.0 / 2), "what is on its way had its time");
        assert_eq!(bystander.transfers()[0].status(), TransferStatus::Done);
        assert!(bytes(&local)[HALF as usize..] == pattern(2 * HALF as usize, 5)[HALF as usize..]);
        let TransferStatus::Failed(error) = mine.transfers()[0].status() else { panic!("it was cancelled") };
        assert_eq!(error.cause, Cause::Cancelled);
        assert_eq!(mine.quiescence(), Quiescence::Quiesced { how: Proof::QpDrained });
        let statuses: Vec<_> = rig.first_errors.iter().map(|error| error.status).collect();
        assert_eq!((statuses, rig.counters[0].given_up.get()), (vec![WcStatus::GIVEN_UP], 1));
    }
}

#[test]
fn on_a_slow_path_what_is_on_its_way_arrives_and_nobody_is_flushed() {
    // 400 ms there and back, more than the least grace.
    let options = SimOptions { delay: Nanos::from_millis(400), jitter: Nanos::ZERO, ..SimOptions::default() };
    let mut rig = Rig::new(42, 1, 1, options);
    rig.connect(0, 0, 0, 1);
    let (local, far) = (Rig::region(&rig.near, HALF as usize), Rig::region(&rig.far, HALF as usize));
    let remote = rig.remote(&far);
    assert!(rig.run_until(SECOND, |r| r.peer.routes() == 1));
    let work = rig.work(Op::Read, &local, &remote, &[(0, 0, HALF)]);
    rig.submit(&work);
    rig.run_until(Nanos::from_millis(10), |_| false);
    assert!(rig.cores[0].outstanding() > 0);
    cancel(&work);
    assert!(rig.run_until(SECOND, |_| work.is_terminal()));
    assert_eq!(work.quiescence(), Quiescence::Quiesced { how: Proof::CompletionSeen });
    assert!(rig.first_errors.is_empty(), "{:?}", rig.first_errors);
    // The same path, dead: given up after some of its own round trips.
    let round_trip = rig.rail_counters[0].round_trip_ns.get();
    rig.world.swallow(rig.near[0].id, rig.far[0].id);
    let late = rig.work(Op::Read, &local, &remote, &[(0, 0, 4096)]);
    rig.submit(&late);
    rig.turn(Nanos::from_micros(1));
    cancel(&late);
    assert!(!rig.run_until(Nanos(round_trip * CANCEL_ROUND_TRIPS - STALL_STEP.0), |_| late.is_terminal()));
    assert!(rig.run_until(SECOND, |_| late.is_terminal()));
    assert_eq!(rig.first_errors[0].status, WcStatus::GIVEN_UP);
}
