//! What the engine itself costs: from building a Work on the caller's thread, over the core, to the completion word.
//!
//! The NIC completes everything at its next poll, so the time is tiling, allocation, the ring, one turn of the core
//! (claim, chain, post, reap, settle) and two cache lines on their way between two CPUs. Layer `core` dispatches by hand,
//! layer `engine` is `Engine::submit` and `Batch::wait` of two whole engines. Not measured: a real doorbell,
//! the network, waking a sleeping core (the busy mode never sleeps; the adaptive one spins between these batches).

use std::error::Error;
use std::hint::spin_loop;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;
use moonrail::{Engine, Level, Region, Segment, Transfer};
use moonrail_datapath::core::{PollMode, dispatch};
use moonrail_datapath::nic::Nic;
use moonrail_datapath::units::Gid;
use moonrail_datapath::work::TransferStatus;

use crate::null::NullNic;
use crate::record::{Case, Found};
use crate::rig::{Rig, work};

const SEED: u64 = 0x006d_6f6f_6e72_6169;
const BLOCK: u64 = 4096;
const MEMORY: usize = 64 << 20;
/// A batch that is not over after this is a fault of the engine, not a slow one.
const STUCK: Duration = Duration::from_secs(10);

/// xorshift64*: the same addresses in every run.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }
}

/// What is measured: a way from a list of places to their bytes being reported in place.
trait Way {
    /// Submits a block at each place, waits, and returns the nanoseconds.
    fn once(&self, starts: &[u64]) -> Result<u64, Box<dyn Error>>;
    /// Work requests, doorbells, completions so far.
    fn counted(&self) -> (u64, u64, u64);
}

pub(crate) fn run(quick: bool) -> Result<Found, Box<dyn Error>> {
    let cases = measure_all(quick)?;
    Ok(Found {
        unit: "nanoseconds from building a batch to seeing its end",
        cases: cases.iter().map(Case::json).collect(),
    })
}

fn measure_all(quick: bool) -> Result<Vec<Case>, Box<dyn Error>> {
    let size = if quick { 200 } else { 200_000 };
    println!("{}", Case::head());
    let mut cases = Vec::new();
    for layer in ["core", "engine"] {
        for mode in ["busy", "adaptive"] {
            for batch in [1usize, 128] {
                let rounds = if batch == 1 { size } else { size / 10 };
                let case = match layer {
                    "core" => measure(layer, mode, batch, rounds, &Rig::new(MEMORY, core_mode(mode))?)?,
                    _ => measure(layer, mode, batch, rounds, &Engines::new(mode)?)?,
                };
                println!("{}", case.line());
                cases.push(case);
            }
        }
    }
    Ok(cases)
}

fn core_mode(mode: &str) -> PollMode {
    if mode == "busy" { PollMode::Busy } else { PollMode::default() }
}

fn measure(
    layer: &'static str,
    mode: &'static str,
    batch: usize,
    rounds: u64,
    way: &impl Way,
) -> Result<Case, Box<dyn Error>> {
    let mut random = Random(SEED);
    let mut times = Histogram::<u64>::new_with_bounds(1, 10_000_000_000, 3)?;
    // Every other block, so that no two of a batch are neighbours.
    let blocks = MEMORY as u64 / BLOCK / 2;
    let mut starts = vec![0; batch];
    let mut draw = |starts: &mut [u64]| starts.iter_mut().for_each(|start| *start = random.next() % blocks * 2 * BLOCK);
    for _ in 0..rounds / 10 + 10 {
        draw(&mut starts);
        way.once(&starts)?;
    }
    let before = way.counted();
    let started = Instant::now();
    let mut hash = 0u64;
    for _ in 0..rounds {
        draw(&mut starts);
        hash = starts.iter().fold(hash, |hash, start| hash.rotate_left(7) ^ start);
        times.saturating_record(way.once(&starts)?);
    }
    let seconds = started.elapsed().as_secs_f64();
    let after = way.counted();
    Ok(Case {
        layer,
        mode,
        batch,
        block: BLOCK,
        rounds,
        seed: SEED,
        seconds,
        work_requests: after.0 - before.0,
        doorbells: after.1 - before.1,
        completions: after.2 - before.2,
        hash,
        times,
    })
}

/// The core alone: the batch is tiled and dispatched by hand, the waiter spins on the word.
impl Way for Rig {
    fn once(&self, starts: &[u64]) -> Result<u64, Box<dyn Error>> {
        let from = Instant::now();
        let work = work(&self.region, &self.remote, starts, BLOCK, self.now())?;
        let completion = work.completion();
        if dispatch(Arc::clone(&work), &self.inboxes).is_err() {
            return Err("the core's ring is full".into());
        }
        let mut looks = 0u32;
        while !completion.is_done() {
            spin_loop();
            looks += 1;
            if looks.is_multiple_of(1 << 16) && from.elapsed() > STUCK {
                return Err("a batch did not end".into());
            }
        }
        let nanos = u64::try_from(from.elapsed().as_nanos())?;
        if work.transfers().iter().any(|transfer| transfer.status() != TransferStatus::Done) {
            return Err("a transfer failed".into());
        }
        Ok(nanos)
    }

    fn counted(&self) -> (u64, u64, u64) {
        (self.counters.work_requests.get(), self.counters.doorbells.get(), self.counters.completions.get())
    }
}

/// Two whole engines: `Engine::submit`, `Batch::wait`, and the drop of the batch.
struct Engines {
    near: Engine,
    segment: Segment,
    region: Region,
    remote: u64,
    _far: Engine,
}

impl Engines {
    fn new(mode: &str) -> Result<Self, Box<dyn Error>> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let uri = format!("memory://handoff-{}", NEXT.fetch_add(1, Ordering::Relaxed));
        let engine = |name: &str, node, mode| {
            let gid = Gid([0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 10, 0, 0, node]);
            let nics: Vec<Arc<dyn Nic>> = vec![NullNic::new("null0", gid)];
            let builder = Engine::builder().environment(|_| None).name(name).metadata(&uri).nics_from(nics);
            builder.cores(1).poll_mode(mode).log_level(Level::Error).build()
        };
        let near_mode = if mode == "busy" { moonrail::PollMode::Busy } else { moonrail::PollMode::Adaptive };
        let near = engine("near", 1, near_mode)?;
        let far = engine("far", 2, moonrail::PollMode::Adaptive)?;
        let region = near.allocate(MEMORY, "*")?;
        let remote = far.allocate(MEMORY, "*")?.addr();
        let segment = near.open_segment("far")?;
        near.submit(&segment, &[Transfer::write_from(&region, 0, remote, BLOCK)])?.wait(STUCK)?;
        Ok(Self { near, segment, region, remote, _far: far })
    }
}

impl Way for Engines {
    fn once(&self, starts: &[u64]) -> Result<u64, Box<dyn Error>> {
        let transfer = |start: &u64| Transfer::write_from(&self.region, *start, self.remote + start, BLOCK);
        let transfers: Vec<Transfer> = starts.iter().map(transfer).collect();
        let from = Instant::now();
        let batch = self.near.submit(&self.segment, &transfers)?;
        batch.wait(STUCK)?;
        let nanos = u64::try_from(from.elapsed().as_nanos())?;
        Ok(nanos)
    }

    fn counted(&self) -> (u64, u64, u64) {
        let total = self.near.counters().total();
        (total.work_requests, total.doorbells, total.completions)
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_quick_run_measures_every_case() {
        let cases = super::measure_all(true).unwrap();
        assert_eq!(cases.len(), 8);
        for case in &cases {
            assert_eq!(case.times.len(), case.rounds);
            // A trial of a rail may come on top.
            assert!(case.work_requests >= case.rounds * case.batch as u64, "{} {}", case.layer, case.mode);
        }
        for case in &cases {
            let same = cases.iter().find(|other| other.batch == case.batch).unwrap();
            assert_eq!(case.hash, same.hash, "the same seed makes the same addresses");
        }
    }
}
