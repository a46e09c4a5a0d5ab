//! What the engine itself costs: from building a Work on the caller's thread, over the core, to the completion word.
//!
//! The NIC completes everything at its next poll, so the time is tiling, allocation, the ring, one turn of the core
//! (claim, chain, post, reap, settle) and two cache lines on their way between two CPUs. Not measured: a real doorbell,
//! the network, waking a sleeping core (the busy mode never sleeps; the adaptive one spins between these batches).

use std::error::Error;
use std::hint::spin_loop;
use std::sync::Arc;
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;
use moonrail_datapath::core::{PollMode, dispatch};
use moonrail_datapath::nic::Op;
use moonrail_datapath::slice::{Extent, SliceRule, tile};
use moonrail_datapath::units::{Nanos, RemoteAddr};
use moonrail_datapath::work::{Completion, TransferStatus, Work, WorkParts};

use crate::record::Case;
use crate::rig::Rig;

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

pub(crate) fn run(quick: bool) -> Result<Vec<Case>, Box<dyn Error>> {
    let size = if quick { 200 } else { 200_000 };
    let mut cases = Vec::new();
    println!(
        "{:<10} {:>5} {:>9} {:>9} {:>9} {:>9} {:>12} {:>12}",
        "mode", "batch", "p50 ns", "p99", "p99.9", "max", "batches/s", "slices/s"
    );
    for (name, mode) in [("busy", PollMode::Busy), ("adaptive", PollMode::default())] {
        for batch in [1usize, 128] {
            let rounds = if batch == 1 { size } else { size / 10 };
            let case = measure(name, mode, batch, rounds)?;
            println!("{}", case.line());
            cases.push(case);
        }
    }
    Ok(cases)
}

fn measure(name: &'static str, mode: PollMode, batch: usize, rounds: u64) -> Result<Case, Box<dyn Error>> {
    let rig = Rig::new(MEMORY, mode)?;
    let mut random = Random(SEED);
    let mut times = Histogram::<u64>::new_with_bounds(1, 10_000_000_000, 3)?;
    for _ in 0..rounds / 10 + 10 {
        once(&rig, &mut random, batch)?;
    }
    let before = (rig.counters.work_requests.get(), rig.counters.doorbells.get(), rig.counters.completions.get());
    let started = Instant::now();
    let mut hash = 0u64;
    for _ in 0..rounds {
        let (nanos, addresses) = once(&rig, &mut random, batch)?;
        times.saturating_record(nanos);
        hash = hash.rotate_left(5) ^ addresses;
    }
    let seconds = started.elapsed().as_secs_f64();
    Ok(Case {
        mode: name,
        batch,
        block: BLOCK,
        rounds,
        seed: SEED,
        seconds,
        work_requests: rig.counters.work_requests.get() - before.0,
        doorbells: rig.counters.doorbells.get() - before.1,
        completions: rig.counters.completions.get() - before.2,
        hash,
        times,
    })
}

/// One batch; its time, and a hash of its addresses.
fn once(rig: &Rig, random: &mut Random, batch: usize) -> Result<(u64, u64), Box<dyn Error>> {
    let blocks = rig.region.memory().len() / BLOCK;
    // Every other block, so that no two of a batch are neighbours.
    let starts: Vec<u64> = (0..batch).map(|_| random.next() % (blocks / 2) * 2 * BLOCK).collect();
    let hash = starts.iter().fold(0u64, |hash, start| hash.rotate_left(7) ^ start);
    let chunk = Extent { addr: rig.region.memory().addr(), len: rig.region.memory().len() };
    let near = |addr: u64| (addr.wrapping_sub(chunk.addr) < chunk.len).then_some((0, chunk));

    let from = Instant::now();
    let mut slices = Vec::with_capacity(batch);
    for (transfer, start) in starts.iter().enumerate() {
        let remote = RemoteAddr(rig.remote.buffers[0].extent.addr + start);
        let (local, rule) = (chunk.addr + start, SliceRule::default());
        tile(transfer as u32, local, remote, BLOCK, rule, near, |addr| rig.remote.find(addr), &mut slices)?;
    }
    let completion = Completion::new(1);
    let work = Work::new(WorkParts {
        op: Op::Write,
        slices,
        transfers: vec![BLOCK; batch],
        local: rig.region.clone(),
        remote: rig.remote.clone(),
        deadline: rig.now().plus(Nanos::from_secs(30)),
        cores: 1,
        retries: 9,
        completion: completion.clone(),
    });
    if dispatch(Arc::clone(&work), &rig.inboxes).is_err() {
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
    Ok((nanos, hash))
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_quick_run_measures_every_case() {
        let cases = super::run(true).unwrap();
        assert_eq!(cases.len(), 4);
        for case in &cases {
            assert_eq!(case.times.len(), case.rounds);
            assert_eq!(case.work_requests, case.rounds * case.batch as u64);
        }
        assert_eq!(cases[0].hash, cases[2].hash, "the same seed makes the same addresses");
    }
}
