//! A core that has panicked: what it carried ends, what others carry does not notice, and nothing is touched after its end.

mod rig;

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use moonrail_datapath::core::{Core, CoreConfig, CoreCounters, Doorbell, Inbox, Led, Outbox, PollMode, Remains, run};
use moonrail_datapath::error::Cause;
use moonrail_datapath::nic::sim::SimOptions;
use moonrail_datapath::nic::{Completion, CompletionQueue, Op};
use moonrail_datapath::region::Region;
use moonrail_datapath::units::{CoreId, Nanos, NicId};
use moonrail_datapath::work::{TransferStatus, Work};

use rig::{Rig, bytes, pattern};

const SECOND: Nanos = Nanos::from_secs(1);
const LEN: usize = 4 << 20;

struct Bench {
    rig: Rig,
    local: Arc<Region>,
    far: Arc<Region>,
}

impl Bench {
    /// One rail for each of `cores`, by a NIC of its own.
    fn new(seed: u64, cores: u16) -> Self {
        let mut rig = Rig::new(seed, 2, cores, SimOptions::default());
        for core in 0..usize::from(cores) {
            rig.connect(core, core, core, 2);
        }
        let (local, far) = (Rig::region(&rig.near, LEN), Rig::region(&rig.far, LEN));
        let trials = u64::from(cores) * 2;
        let proven = |r: &Rig| r.counters.iter().map(|c| c.completions.get()).sum::<u64>() == trials;
        assert!(rig.run_until(SECOND, proven), "all trials");
        Self { rig, local, far }
    }

    /// 16 transfers.
    fn submit(&mut self, op: Op) -> Arc<Work> {
        let (source, sink) = if op == Op::Write { (&self.local, &self.far) } else { (&self.far, &self.local) };
        source.memory().write(0, &pattern(LEN, 7)).unwrap();
        sink.memory().write(0, &vec![0; LEN]).unwrap();
        let remote = self.rig.remote(&self.far);
        let part = LEN as u64 / 16;
        let parts: Vec<_> = (0..16).map(|i| (i * part, i * part, part)).collect();
        let work = self.rig.work(op, &self.local, &remote, &parts);
        self.rig.submit(&work);
        work
    }

    fn sink(&self, op: Op) -> &Region {
        if op == Op::Write { &self.far } else { &self.local }
    }

    fn turns(&mut self, count: usize) {
        for _ in 0..count {
            self.rig.turn(Nanos::from_micros(1));
        }
    }

    fn lose(&mut self, core: usize) {
        let now = self.rig.now;
        self.rig.cores[core].lose(now);
    }
}

fn is_lost(work: &Work) -> bool {
    let lost = |status| matches!(status, TransferStatus::Failed(error) if error.cause == Cause::CoreLost);
    work.transfers().iter().any(|transfer| lost(transfer.status()))
        && work.transfers().iter().all(|transfer| lost(transfer.status()) || transfer.status() == TransferStatus::Done)
}

#[test]
fn what_a_lost_core_carried_ends_soon_and_is_not_touched_any_more() {
    for op in [Op::Read, Op::Write] {
        let mut bench = Bench::new(31, 1);
        let work = bench.submit(op);
        bench.turns(40);
        assert!(!work.completion().is_done(), "it must hit in the middle");
        bench.lose(0);
        let lost_at = bench.rig.now;
        assert!(bench.rig.run_until(SECOND, |_| work.completion().is_done()));
        assert!(bench.rig.now.since(lost_at) < Nanos::from_millis(20), "{:?}", bench.rig.now.since(lost_at));
        assert!(is_lost(&work), "{:?}", work.first_error());
        assert_eq!(bench.rig.lost, 2, "control hears of each NIC, once");
        // Its memory is free to be used again.
        let canary = vec![0xa5; LEN];
        bench.sink(op).memory().write(0, &canary).unwrap();
        assert!(!bench.rig.run_until(SECOND, |_| false));
        assert!(bytes(bench.sink(op)) == canary, "{op:?}: touched after its end");
        assert_eq!((bench.rig.cores[0].works(), bench.rig.cores[0].outstanding()), (0, 0));
    }
}

#[test]
fn what_still_comes_ends_too_and_is_not_waited_for() {
    let mut bench = Bench::new(32, 1);
    bench.lose(0);
    let work = bench.submit(Op::Write);
    assert!(bench.rig.run_until(Nanos::from_millis(20), |_| work.completion().is_done()));
    assert!(is_lost(&work) && bytes(&bench.far) == vec![0; LEN], "nothing of it was posted");
}

#[test]
fn another_core_goes_on_and_gets_what_comes() {
    let mut bench = Bench::new(33, 2);
    bench.lose(0);
    bench.turns(2000);
    for op in [Op::Write, Op::Read] {
        let work = bench.submit(op);
        assert!(bench.rig.run_until(SECOND, |_| work.completion().is_done()));
        assert_eq!(work.first_error(), None);
        assert!(bytes(bench.sink(op)) == pattern(LEN, 7));
    }
}

/// Where no core has a rail yet, the least loaded one is asked to wait for it: a lost one has nothing to do.
#[test]
fn without_a_rail_work_goes_to_a_core_that_can_wait_for_one() {
    let mut bench = Bench::new(35, 2);
    bench.lose(0);
    bench.turns(2000);
    let key = moonrail_datapath::core::RailKey { rail: moonrail_datapath::units::RailId(3), life: 0 };
    bench.rig.retire(1, key);
    assert!(bench.rig.run_until(SECOND, |r| r.peer.routes() == 0));
    let work = bench.submit(Op::Write);
    bench.turns(3000);
    assert!(!work.completion().is_done(), "{:?}", work.first_error());
    bench.rig.connect(1, 1, 1, 2);
    assert!(bench.rig.run_until(SECOND, |_| work.completion().is_done()));
    assert_eq!(work.first_error(), None);
}

#[test]
fn one_that_panics_again_looks_at_its_nics_no_more_and_control_destroys_what_it_had() {
    for op in [Op::Read, Op::Write] {
        let mut bench = Bench::new(34, 1);
        let work = bench.submit(op);
        bench.turns(40);
        bench.lose(0);
        bench.lose(0);
        assert!(!bench.rig.run_until(Nanos::from_millis(100), |_| work.completion().is_done()), "no outcome was seen");
        assert!(bench.rig.run_until(Nanos::from_secs(60), |_| work.completion().is_done()));
        assert!(is_lost(&work));
        assert_eq!((bench.rig.cores[0].works(), bench.rig.cores[0].outstanding()), (0, 0));
    }
}

/// Stops the core, so that no thread is waited for where a test has failed.
struct Stops<'a>(&'a Inbox);

impl Drop for Stops<'_> {
    fn drop(&mut self) {
        let _ = self.0.command(moonrail_datapath::core::Command::Stop);
    }
}

/// A NIC whose queue cannot be looked at, so many times.
struct Broken(Arc<AtomicU32>);

impl CompletionQueue for Broken {
    fn poll(&mut self, _: &mut [Completion]) -> std::io::Result<usize> {
        let left = self.0.load(Ordering::Relaxed);
        if left > 0 {
            self.0.store(left - 1, Ordering::Relaxed);
            panic!("as if by a bug");
        }
        Ok(0)
    }

    fn depth(&self) -> u32 {
        16
    }
}

#[test]
fn a_panic_is_told_once_and_the_thread_goes_on_to_give_back() {
    for (panics, told) in [(0, vec![]), (1, vec![Remains::GivesBack]), (9, vec![Remains::GivesBack])] {
        let inbox = Inbox::new(CoreId(0)).unwrap();
        let outbox = Outbox::new(Arc::new(Doorbell::new().unwrap()));
        let core = Box::new(Core::new(CoreConfig {
            id: CoreId(0),
            inbox: inbox.clone(),
            outbox,
            cores: vec![inbox.clone()].into(),
            nics: vec![(NicId(0), Box::new(Broken(Arc::new(AtomicU32::new(panics)))))],
            counters: Arc::new(CoreCounters::default()),
        }));
        let started = std::time::Instant::now();
        let clock = move || Nanos::from_duration(started.elapsed());
        let heard = std::sync::Mutex::new(Vec::new());
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                run(core, PollMode::default(), &clock, &|remains| heard.lock().unwrap().push(remains));
            });
            std::thread::sleep(std::time::Duration::from_millis(20));
            assert!(!thread.is_finished(), "after {panics} panics");
            inbox.command(moonrail_datapath::core::Command::Stop).ok().unwrap();
            thread.join().unwrap();
        });
        assert_eq!(heard.into_inner().unwrap(), told, "after {panics} panics");
    }
}

#[test]
fn a_panic_on_the_thread_of_a_caller_that_leads_is_the_cores_and_not_the_callers() {
    let inbox = Inbox::new(CoreId(0)).unwrap();
    let panics = Arc::new(AtomicU32::new(0));
    let core = Box::new(Core::new(CoreConfig {
        id: CoreId(0),
        inbox: inbox.clone(),
        outbox: Outbox::new(Arc::new(Doorbell::new().unwrap())),
        cores: vec![inbox.clone()].into(),
        nics: vec![(NicId(0), Box::new(Broken(panics.clone())))],
        counters: Arc::new(CoreCounters::default()),
    }));
    let started = std::time::Instant::now();
    let clock = move || Nanos::from_duration(started.elapsed());
    let heard = std::sync::Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        let thread =
            scope.spawn(|| run(core, PollMode::default(), &clock, &|remains| heard.lock().unwrap().push(remains)));
        let lead = |turns: u32| {
            let mut left = turns;
            let mut is_over = || {
                left = left.saturating_sub(1);
                left == 0
            };
            inbox.lead(clock(), Nanos::FAR, &clock, &mut is_over)
        };
        // When its own thread has gone to sleep.
        let led = (0..2000).any(|_| {
            std::thread::sleep(std::time::Duration::from_millis(1));
            lead(3) == Led::Over
        });
        let _stop = Stops(&inbox);
        assert!(led, "the core never rests");
        panics.store(1, Ordering::Relaxed);
        // By whichever of both threads: the core is left to its own from there on.
        let told = (0..2000).any(|_| {
            let _ = lead(1000);
            std::thread::sleep(std::time::Duration::from_millis(1));
            !heard.lock().unwrap().is_empty()
        });
        assert!(told, "nobody heard of the panic");
        assert_eq!(lead(3), Led::Follow, "a core that is lost is led no more");
        assert!(!thread.is_finished(), "it gives back what it has");
    });
    assert_eq!(heard.into_inner().unwrap(), [Remains::GivesBack]);
}
