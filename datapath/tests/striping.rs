//! Rails of different speed carry what they can, without being told how fast they are; and what is small does not wait for all of what is
//! large. In virtual time: a port sends what was posted in the order of posting.

mod rig;

use std::sync::Arc;

use moonrail_datapath::limits::CAP_FLOOR;
use moonrail_datapath::nic::Op;
use moonrail_datapath::nic::sim::SimOptions;
use moonrail_datapath::region::Region;
use moonrail_datapath::units::Nanos;
use moonrail_datapath::work::Work;

use rig::{Rig, bytes, pattern};

const SECOND: Nanos = Nanos::from_secs(1);
const BULK: u64 = 16 << 20;
const SMALL: u64 = 4096;
/// A 100 Gb/s port, and one of a third of that.
const SPEEDS: [u64; 2] = [4_000_000_000, 12_000_000_000];

struct Bench {
    rig: Rig,
    local: Arc<Region>,
    far: Arc<Region>,
    bulk: Vec<Arc<Work>>,
    /// Bytes of bulk that are over.
    moved: u64,
}

impl Bench {
    /// One rail for each of `speeds`.
    fn new(speeds: &[u64]) -> Self {
        let mut rig = Rig::new(41, speeds.len() as u8, 1, SimOptions::default());
        for (nic, speed) in speeds.iter().enumerate() {
            rig.world.set_speed(rig.near[nic].id, *speed);
            rig.connect(0, nic, nic, 2);
        }
        let trials = speeds.len() as u64 * 2;
        assert!(rig.run_until(SECOND, |r| r.counters[0].completions.get() == trials), "all trials");
        let len = (BULK + SMALL) as usize;
        let (local, far) = (Rig::region(&rig.near, len), Rig::region(&rig.far, len));
        local.memory().write(0, &pattern(len, 3)).unwrap();
        Self { rig, local, far, bulk: vec![], moved: 0 }
    }

    fn submit(&self, from: u64, len: u64) -> Arc<Work> {
        let remote = self.rig.remote(&self.far);
        let work = self.rig.work(Op::Write, &self.local, &remote, &[(from, from, len)]);
        self.rig.submit(&work);
        work
    }

    /// Keeps four large Works under way.
    fn turn(&mut self) {
        let over = self.bulk.iter().filter(|work| work.is_terminal()).count() as u64;
        self.moved += over * BULK;
        self.bulk.retain(|work| !work.is_terminal());
        while self.bulk.len() < 4 {
            self.bulk.push(self.submit(0, BULK));
        }
        self.rig.turn(Nanos::from_micros(1));
    }

    /// Bytes per second of bulk within `span`, each turn followed by `also`.
    fn rate(&mut self, span: Nanos, mut also: impl FnMut(&mut Self)) -> f64 {
        let (began, before) = (self.rig.now, self.moved);
        while self.rig.now.since(began) < span {
            self.turn();
            also(self);
        }
        (self.moved - before) as f64 / self.rig.now.since(began).to_duration().as_secs_f64()
    }

    /// Lets the rails find their credit.
    fn warm(&mut self) {
        self.rate(Nanos::from_millis(50), |_| {});
    }
}

/// How long small Works take, one after the other: the hundredth part that takes longest begins here.
#[derive(Default)]
struct Small {
    under_way: Option<(Nanos, Arc<Work>)>,
    spans: Vec<Nanos>,
}

impl Small {
    fn look(&mut self, bench: &Bench) {
        if let Some((since, work)) = self.under_way.take_if(|(_, work)| work.is_terminal()) {
            assert_eq!(work.first_error(), None);
            self.spans.push(bench.rig.now.since(since));
        }
        self.under_way.get_or_insert_with(|| (bench.rig.now, bench.submit(BULK, SMALL)));
    }

    fn p99(mut self) -> Nanos {
        self.spans.sort();
        self.spans[self.spans.len() * 99 / 100]
    }
}

#[test]
fn two_rails_of_speeds_one_to_three_carry_as_much_as_both_can() {
    let mut bench = Bench::new(&SPEEDS);
    bench.warm();
    let share = |bench: &Bench| {
        let bytes = |rail: usize| bench.rig.rail_counters[rail].bytes.get();
        (bytes(0), bytes(3))
    };
    let before = share(&bench);
    let rate = bench.rate(Nanos::from_millis(200), |_| {});
    let after = share(&bench);
    let sum = SPEEDS.iter().sum::<u64>() as f64;
    let shares = (after.0 - before.0) as f64 / (after.1 - before.1) as f64;
    println!("{:.3} of the sum of both; the slow one carried {shares:.3} of the fast one", rate / sum);
    assert!(rate >= 0.95 * sum, "{rate:.3e} of {sum:.3e} bytes per second");
    assert!((0.30..0.37).contains(&shares), "{shares}");
    assert!(bench.rig.run_until(SECOND, |_| bench.bulk.iter().all(|work| work.is_terminal())));
    let all = pattern((BULK + SMALL) as usize, 3);
    assert!(bytes(&bench.far)[..BULK as usize] == all[..BULK as usize]);
}

#[test]
fn a_small_transfer_waits_for_what_is_posted_and_costs_the_bulk_nothing() {
    let mut alone = Bench::new(&SPEEDS);
    let mut small = Small::default();
    for _ in 0..50_000 {
        small.look(&alone);
        alone.rig.turn(Nanos::from_micros(1));
    }
    let unloaded = small.p99();
    let mut bench = Bench::new(&SPEEDS);
    bench.warm();
    let bulk_alone = bench.rate(Nanos::from_millis(100), |_| {});
    let mut small = Small::default();
    let bulk_beside = bench.rate(Nanos::from_millis(100), |bench| small.look(bench));
    let loaded = small.p99();
    println!(
        "p99 of 4 KiB: {unloaded:?} alone, {loaded:?} beside bulk, which keeps {:.3} of its rate",
        bulk_beside / bulk_alone
    );
    assert!(bulk_beside >= 0.95 * bulk_alone, "{bulk_beside:.3e} of {bulk_alone:.3e}");
    // Behind what is posted on the rail that will be through first: its credit, and the part that is for small ones.
    let posted = Nanos(CAP_FLOOR * 5 / 4 * 1_000_000_000 / SPEEDS[1]);
    assert!(loaded <= posted.plus(unloaded), "{loaded:?}, where {posted:?} are before it at the most");
}
