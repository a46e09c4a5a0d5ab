//! Cores in a seeded world with faults, and checkers that stand apart from them.
//!
//! `SEED=n` replays one; `SEEDS=n` runs n from a fresh start, or from `FROM=s` on. A failing seed is in the panic's message.

mod rig;

use std::sync::Arc;

use moonrail_datapath::error::{Cause, SliceError};
use moonrail_datapath::limits::{STALL_AFTER, STALL_STEP};
use moonrail_datapath::nic::Op;
use moonrail_datapath::nic::sim::SimOptions;
use moonrail_datapath::random::Random;
use moonrail_datapath::region::Region;
use moonrail_datapath::units::{Nanos, RailId};
use moonrail_datapath::work::{Quiescence, TransferStatus, Work};

use rig::{Rig, pattern};

/// One submitted Work and what its bytes must be when it is done.
struct Expected {
    work: Arc<Work>,
    op: Op,
    at: u64,
    len: u64,
    round: u64,
    checked: bool,
}

/// Each Work has its own range on both sides, so that its bytes can be checked whatever else is under way.
const RANGE: u64 = 256 << 10;
const RANGES: u64 = 24;

struct Trial {
    rig: Rig,
    choices: Random,
    local: Arc<Region>,
    far: Arc<Region>,
    open: Vec<Expected>,
    seed: u64,
    done: usize,
    failed: usize,
}

impl Trial {
    fn new(seed: u64) -> Self {
        let mut choices = Random::new(seed);
        let nics = 1 + choices.below(3) as u8;
        let cores = 1 + choices.below(3) as u16;
        let options = SimOptions {
            jitter: Nanos::from_micros(choices.below(20)),
            bytes_per_second: 200_000_000 << choices.below(5),
            retry_time: Nanos::from_micros(200 + choices.below(3_000)),
            late_writes: choices.below(3) as f64 / 2.0,
            ..SimOptions::default()
        };
        let mut rig = Rig::new(seed, nics, cores, options);
        rig.fence_delay = Nanos::from_micros(choices.below(5_000));
        let len = (RANGE * RANGES) as usize;
        let (local, far) = (Rig::region(&rig.near, len), Rig::region(&rig.far, len));
        for a in 0..usize::from(nics) {
            for b in 0..usize::from(nics) {
                let core = choices.below(u64::from(cores)) as usize;
                rig.connect(core, a, b, 1 + choices.below(2) as usize);
            }
        }
        Self { rig, choices, local, far, open: vec![], seed, done: 0, failed: 0 }
    }

    fn submit(&mut self, range: u64, round: u64) {
        let op = if self.choices.below(2) == 0 { Op::Read } else { Op::Write };
        let at = range * RANGE;
        let len = 1 + self.choices.below(RANGE);
        let (source, sink) = if op == Op::Write { (&self.local, &self.far) } else { (&self.far, &self.local) };
        source.memory().write(at, &pattern(len as usize, round)).unwrap();
        sink.memory().write(at, &vec![0xee; len as usize]).unwrap();
        let remote = self.rig.remote(&self.far);
        // One transfer, or many small ones.
        let piece = if self.choices.below(2) == 0 { len } else { 1 + self.choices.below(20_000) };
        let parts: Vec<_> =
            (0..len.div_ceil(piece)).map(|i| (at + i * piece, at + i * piece, piece.min(len - i * piece))).collect();
        let work = self.rig.work(op, &self.local, &remote, &parts);
        self.rig.submit(&work);
        self.open.push(Expected { work, op, at, len, round, checked: false });
    }

    fn fault(&mut self) {
        let nic = self.choices.below(self.rig.near.len() as u64) as usize;
        let peer = self.choices.below(self.rig.far.len() as u64) as usize;
        let up = self.choices.below(2) == 0;
        let (near, far) = (self.rig.near[nic].id, self.rig.far[peer].id);
        match self.choices.below(5) {
            0 => self.rig.world.set_link(near, up),
            1 => self.rig.world.set_link(far, up),
            2 => self.rig.world.swallow(near, far),
            _ => self.rig.world.set_path(near, far, up),
        }
    }

    /// Repairs what failed, on a core of its own choice.
    fn repair(&mut self) {
        let nics = self.rig.far.len();
        for rail in 0..(nics * self.rig.near.len()) {
            if self.rig.needs_repair(RailId(rail as u32)) {
                let core = self.choices.below(self.rig.cores.len() as u64) as usize;
                self.rig.connect(core, rail / nics, rail % nics, 1 + self.choices.below(2) as usize);
            }
        }
    }

    /// The laws, on every Work that is terminal: each slice ended once, and Done means that the bytes are there.
    fn check(&mut self) {
        for expected in self.open.iter_mut().filter(|e| e.work.is_terminal() && !e.checked) {
            expected.checked = true;
            assert!(expected.work.completion().is_done(), "seed {}", self.seed);
            let proven = expected.work.quiescence();
            assert!(proven < Quiescence::Quarantined, "seed {}: terminal, but {proven:?}", self.seed);
            let mut sound = true;
            for transfer in expected.work.transfers() {
                match transfer.status() {
                    TransferStatus::Done => assert_eq!(transfer.transferred(), transfer.requested()),
                    TransferStatus::Failed(_) => sound = false,
                    TransferStatus::Waiting => panic!("seed {}: terminal, but a transfer waits", self.seed),
                }
            }
            let sink = if expected.op == Op::Write { &self.far } else { &self.local };
            let mut bytes = vec![0; expected.len as usize];
            sink.memory().read(expected.at, &mut bytes).unwrap();
            if sound {
                assert!(
                    bytes == pattern(expected.len as usize, expected.round),
                    "seed {}: done, but not there",
                    self.seed
                );
                self.done += 1;
            } else {
                self.failed += 1;
            }
            if proven == Quiescence::NeverPosted {
                assert!(bytes.iter().all(|b| *b == 0xee), "seed {}: never posted, but bytes came", self.seed);
            }
            // Promise 2: from here on nothing of this Work may land. The canary is looked at when the range is used
            // again, and at the end.
            sink.memory().write(expected.at, &vec![0xc5; expected.len as usize]).unwrap();
        }
    }

    fn check_canary(&self, expected: &Expected) {
        let sink = if expected.op == Op::Write { &self.far } else { &self.local };
        let mut bytes = vec![0; expected.len as usize];
        sink.memory().read(expected.at, &mut bytes).unwrap();
        assert!(bytes.iter().all(|b| *b == 0xc5), "seed {}: a late byte after the Work was terminal", self.seed);
    }

    fn run(mut self) -> (usize, usize) {
        let mut round = 0;
        for step in 0..6_000u64 {
            if self.choices.below(300) == 0 {
                self.fault();
            }
            if step % 500 == 499 {
                self.repair();
            }
            if self.choices.below(400) == 0 && !self.open.is_empty() {
                let any = self.choices.below(self.open.len() as u64) as usize;
                self.open[any].work.abandon(SliceError::of(Cause::Cancelled));
            }
            if self.choices.below(40) == 0 {
                let range = self.choices.below(RANGES);
                let taken = self.open.iter().position(|e| e.at == range * RANGE);
                match taken {
                    Some(place) if self.open[place].checked => {
                        let old = self.open.swap_remove(place);
                        self.check_canary(&old);
                        round += 1;
                        self.submit(range, round);
                    }
                    Some(_) => {}
                    None => {
                        round += 1;
                        self.submit(range, round);
                    }
                }
            }
            let step = Nanos(200 + self.choices.below(4_000));
            self.rig.turn(step);
            self.check();
        }
        self.fall_silent();
        self.settle_down();
        (self.done, self.failed)
    }

    /// Nothing is mended: each rail that is silent is left after its time, and what comes back may go to another silent
    /// one; so after that time once for each rail nothing is outstanding.
    fn fall_silent(&mut self) {
        let rails = self.rig.near.len() * self.rig.far.len();
        for _ in 0..rails {
            self.rig.run_until(STALL_AFTER.plus(STALL_STEP).plus(STALL_STEP), |r| {
                r.cores.iter().all(|core| core.outstanding() == 0)
            });
        }
        self.check();
        for core in &self.rig.cores {
            assert_eq!(core.outstanding(), 0, "seed {}: a queue pair is silent for ever", self.seed);
        }
    }

    /// Everything is mended: every Work ends, and nothing is left behind.
    fn settle_down(&mut self) {
        for near in 0..self.rig.near.len() {
            self.rig.world.set_link(self.rig.near[near].id, true);
            for far in 0..self.rig.far.len() {
                self.rig.world.set_link(self.rig.far[far].id, true);
                self.rig.world.set_path(self.rig.near[near].id, self.rig.far[far].id, true);
            }
        }
        for _ in 0..40 {
            self.repair();
            self.rig.run_until(Nanos::from_millis(20), |_| false);
            self.check();
            if self.open.iter().all(|e| e.checked) {
                break;
            }
        }
        // The last one may have ended just now: a core whose part in it is over lets go of it at its next look.
        self.rig.run_until(Nanos::from_millis(5), |_| false);
        let waiting = self.open.iter().filter(|e| !e.checked).count();
        assert_eq!(waiting, 0, "seed {}: Works that never ended", self.seed);
        for expected in &self.open {
            self.check_canary(expected);
        }
        for core in &self.rig.cores {
            assert_eq!((core.outstanding(), core.works()), (0, 0), "seed {}: credit or seats lost", self.seed);
        }
        self.check_counters();
    }

    /// With nothing outstanding, what a rail says of itself adds up: all it posted has ended, each slice it posted was
    /// either placed or came back, and the times are of exactly those.
    fn check_counters(&self) {
        for (number, rail) in self.rig.rail_counters.iter().enumerate() {
            let what = format!("seed {}, rail {number}", self.seed);
            assert_eq!(rail.ended.get(), rail.work_requests.get(), "{what}: requests");
            assert_eq!(rail.ended_bytes.get(), rail.posted_bytes.get(), "{what}: bytes");
            assert_eq!(rail.wire.read().count(), rail.slices.get(), "{what}: slices in place");
            assert_eq!(rail.queue.read().count(), rail.slices.get() + rail.returned.get(), "{what}: slices posted");
        }
    }
}

fn seeds() -> Vec<u64> {
    let number = |name| std::env::var(name).ok().and_then(|v| v.parse::<u64>().ok());
    if let Some(seed) = number("SEED") {
        return vec![seed];
    }
    let fresh = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |t| t.as_nanos() as u64);
    match number("SEEDS") {
        Some(count) => (0..count).map(|i| number("FROM").unwrap_or(fresh).wrapping_add(i)).collect(),
        None => (1..=60).chain((0..20).map(|i| fresh.wrapping_add(i))).collect(),
    }
}

#[test]
fn every_slice_ends_once_and_done_means_there_in_any_world() {
    let (mut done, mut failed) = (0, 0);
    for seed in seeds() {
        let outcome = std::panic::catch_unwind(|| Trial::new(seed).run());
        match outcome {
            Ok((d, f)) => (done, failed) = (done + d, failed + f),
            Err(cause) => {
                eprintln!("replay with: SEED={seed} cargo test -p moonrail-datapath --test simulation");
                std::panic::resume_unwind(cause);
            }
        }
    }
    println!("{done} Works done and checked, {failed} failed with a cause");
    assert!(done > 0);
}
