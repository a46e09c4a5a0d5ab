//! Two engines of this host, over shared memory and over TCP, beside what the machine does without an engine.
//!
//! Each case runs its own way and its controls in turn, several times; the figure is the median of the ratios to the best control of
//! each repetition. Controls: for shared memory one thread that copies the same blocks, with the library's copy and with streaming
//! stores; for TCP a bare pair of sockets that sends a whole batch with one write, takes it with as few reads as it can, and answers
//! with 8 bytes. The time of one small transfer is held against a cache line's way to another processor and back.
//! *same*: the blocks of one batch again and again, so they stay in cache. *fresh*: the next ones of a large memory.

use std::error::Error;
use std::sync::{Arc, Barrier};
use std::time::{Duration, Instant};

use moonrail::{Engine, Fabric, Level, Memory, Op, Region, Segment, Transfer};
use serde_json::{Value, json};

use crate::bare;
use crate::record::Found;
use crate::sockets::{Bare, Polled};

/// Sizes, and how many in a batch.
const BLOCKS: [(u64, u64); 10] = [
    (64, 1),
    (4 << 10, 1),
    (4 << 10, 32),
    (16 << 10, 1),
    (16 << 10, 32),
    (64 << 10, 1),
    (64 << 10, 32),
    (1 << 20, 1),
    (1 << 20, 32),
    (16 << 20, 1),
];
const MEMORY: u64 = 256 << 20;
const STUCK: Duration = Duration::from_secs(20);
/// Threads that submit, and the blocks that they have in flight together, each a share: so the memory is as much, and as little of it in
/// cache, for one as for many.
const SUBMITTERS: [u64; 4] = [1, 2, 4, 12];
const BETWEEN_THEM: Load = Load { op: Op::Write, block: 64 << 10, batch: 384, fresh: false };

/// What one case moves.
#[derive(Clone, Copy)]
pub(crate) struct Load {
    pub(crate) op: Op,
    pub(crate) block: u64,
    pub(crate) batch: u64,
    pub(crate) fresh: bool,
}

impl Load {
    pub(crate) fn bytes(self) -> u64 {
        self.block * self.batch
    }

    /// Where batch `number` begins. Half of the memory is walked, so that READ and WRITE can lie apart.
    fn start(self, number: u64) -> u64 {
        if self.fresh { number * self.bytes() % (MEMORY - self.bytes() + 1) / self.block * self.block } else { 0 }
    }
}

/// A way to move a batch; it is there when this returns.
pub(crate) trait Way {
    fn once(&mut self, load: Load, number: u64) -> Result<(), Box<dyn Error>>;
}

pub(crate) fn run(quick: bool) -> Result<Found, Box<dyn Error>> {
    let (repetitions, span) = if quick { (1, Duration::from_millis(5)) } else { (9, Duration::from_millis(120)) };
    println!(
        "{:<4} {:<5} {:>8} {:>5} {:<5} {:>10} {:>10} {:>12} {:>7} {:>15}",
        "over", "op", "block", "batch", "data", "p50 ns", "GB/s", "control GB/s", "ratio", "(min-max)"
    );
    let mut cases = Vec::new();
    for fabric in [Fabric::Shm, Fabric::Tcp] {
        let mut ours = Engines::new(fabric)?;
        let mut controls: Vec<Box<dyn Way>> = match fabric {
            Fabric::Tcp => vec![Box::new(Bare::new()?)],
            _ => vec![Box::new(Copy::new(false)?), Box::new(Copy::new(true)?)],
        };
        for op in [Op::Write, Op::Read] {
            for (block, batch) in BLOCKS {
                for fresh in [false, true] {
                    let load = Load { op, block, batch, fresh };
                    cases.push(case(fabric, load, &mut ours, &mut controls, repetitions, span)?);
                }
            }
        }
        let mut polled = Polled::new()?;
        let mut control = |count: u64| match fabric {
            Fabric::Tcp => Ok(median(&mut polled.round_trips(count)?)),
            _ => Ok(bare::line_round_trip(count.div_ceil(256) as usize)),
        };
        cases.extend(small(fabric, &mut ours, repetitions, if quick { 200 } else { 20_000 }, &mut control)?);
        // Several threads on two processors take turns of some 10 ms each.
        cases.extend(submitters(fabric, &ours, repetitions, 4 * span)?);
    }
    Ok(Found { unit: "GB/s (10^9), medians of repetitions in turn with the control; p50 in nanoseconds", cases })
}

fn case(
    fabric: Fabric,
    load: Load,
    ours: &mut dyn Way,
    controls: &mut [Box<dyn Way>],
    repetitions: usize,
    span: Duration,
) -> Result<Value, Box<dyn Error>> {
    let (mut rates, mut limits, mut ratios, mut times) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for repetition in 0..=repetitions {
        let (rate, time) = measure(load, ours, span)?;
        let mut bare = 0f64;
        for control in controls.iter_mut() {
            bare = bare.max(measure(load, control.as_mut(), span)?.0);
        }
        // The first warms up.
        if repetition > 0 || repetitions == 1 {
            rates.push(rate);
            limits.push(bare);
            ratios.push(rate / bare);
            times.push(time);
        }
    }
    let (low, high) = (min(&ratios), max(&ratios));
    let (rate, bare, ratio, p50) = (median(&mut rates), median(&mut limits), median(&mut ratios), median(&mut times));
    let op = if load.op == Op::Read { "read" } else { "write" };
    let data = if load.fresh { "fresh" } else { "same" };
    println!(
        "{fabric:<4} {op:<5} {:>8} {:>5} {data:<5} {p50:>10.0} {rate:>10.3} {bare:>12.3} {ratio:>7.2} {:>15}",
        load.block,
        load.batch,
        format!("({low:.2}-{high:.2})")
    );
    Ok(json!({
        "fabric": fabric.as_str(), "op": op, "block": load.block, "batch": load.batch, "data": data,
        "p50_ns": p50, "gb_per_second": rate, "control_gb_per_second": bare, "ratio": ratio,
        "ratio_min": low, "ratio_max": high, "repetitions": ratios.len(),
    }))
}

/// One small transfer, submitted and waited for, beside the least that there and back can take; in turn, nanoseconds without the clock's
/// own. Over shared memory that is a cache line to the other processor, over TCP a pair of sockets that never sleep.
fn small(
    fabric: Fabric,
    ours: &mut dyn Way,
    repetitions: usize,
    count: u64,
    control: &mut dyn FnMut(u64) -> Result<f64, Box<dyn Error>>,
) -> Result<Vec<Value>, Box<dyn Error>> {
    let mut cases = Vec::new();
    for op in [Op::Write, Op::Read] {
        let load = Load { op, block: 64, batch: 1, fresh: false };
        let (mut halves, mut p99s, mut least, mut ratios) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        for repetition in 0..=repetitions {
            let clock = bare::clock();
            let mut times = Vec::with_capacity(count as usize);
            for number in 0..count {
                let from = Instant::now();
                ours.once(load, number)?;
                times.push(from.elapsed().as_nanos() as f64 - clock);
            }
            let bare = control(count)?;
            if repetition > 0 || repetitions == 1 {
                let half = median(&mut times);
                p99s.push(times[times.len() * 99 / 100]);
                halves.push(half);
                least.push(bare);
                ratios.push(half / bare);
            }
        }
        let (low, high) = (min(&ratios), max(&ratios));
        let (p50, p99, bare) = (median(&mut halves), median(&mut p99s), median(&mut least));
        let (ratio, op) = (median(&mut ratios), if op == Op::Read { "read" } else { "write" });
        println!(
            "{fabric:<4} {op:<5} of 64 B, submitted and waited for: p50 {p50:.0} ns, p99 {p99:.0} ns; bare there and back {bare:.0} ns; \
             ratio {ratio:.2} ({low:.2}-{high:.2})"
        );
        cases.push(json!({
            "fabric": fabric.as_str(), "op": op, "block": 64, "batch": 1, "what": "latency", "p50_ns": p50, "p99_ns": p99,
            "bare_round_trip_ns": bare, "ratio": ratio, "ratio_min": low, "ratio_max": high, "repetitions": ratios.len(),
        }));
    }
    Ok(cases)
}

/// The same blocks by one thread and by several.
fn submitters(
    fabric: Fabric,
    ours: &Engines,
    repetitions: usize,
    span: Duration,
) -> Result<Vec<Value>, Box<dyn Error>> {
    let mut cases = Vec::new();
    for op in [Op::Write, Op::Read] {
        let load = Load { op, ..BETWEEN_THEM };
        let (mut rates, mut ratios) = (SUBMITTERS.map(|_| Vec::new()), SUBMITTERS.map(|_| Vec::new()));
        for repetition in 0..=repetitions {
            let mut one = None;
            for (at, threads) in SUBMITTERS.into_iter().enumerate() {
                let rate = together(ours, load, threads, span)?;
                let one = *one.get_or_insert(rate);
                if repetition > 0 || repetitions == 1 {
                    rates[at].push(rate);
                    ratios[at].push(rate / one);
                }
            }
        }
        for ((threads, mut rates), mut ratios) in SUBMITTERS.into_iter().zip(rates).zip(ratios) {
            let (low, high) = (min(&ratios), max(&ratios));
            let (rate, ratio) = (median(&mut rates), median(&mut ratios));
            let (op, batch) = (if op == Op::Read { "read" } else { "write" }, load.batch / threads);
            println!(
                "{fabric:<4} {op:<5} {threads:>3} threads, {batch:>3} blocks of {} each: {rate:.2} GB/s, {ratio:.2} of one ({low:.2}-{high:.2})",
                load.block
            );
            cases.push(json!({
                "fabric": fabric.as_str(), "op": op, "block": load.block, "batch": batch, "what": "submitters", "threads": threads,
                "gb_per_second": rate, "ratio": ratio, "ratio_min": low, "ratio_max": high, "repetitions": repetitions,
            }));
        }
    }
    Ok(cases)
}

/// GB/s of so many threads with a share of the blocks each, from the first one's begin to the last one's end.
fn together(ours: &Engines, load: Load, threads: u64, span: Duration) -> Result<f64, Box<dyn Error>> {
    let share = load.batch / threads;
    let together = Barrier::new(threads as usize);
    let submit = |thread: u64| -> Result<(Instant, u64, Instant), String> {
        let transfers: Vec<Transfer> = (thread * share..(thread + 1) * share)
            .map(|i| ours.transfer(load.op, i * load.block, load.block))
            .collect();
        together.wait();
        let (began, mut rounds) = (Instant::now(), 0);
        while began.elapsed() < span || rounds < 3 {
            let batch = ours.near.submit(&ours.segment, &transfers).map_err(|error| error.to_string())?;
            batch.wait(STUCK).map_err(|error| error.to_string())?;
            rounds += 1;
        }
        Ok((began, rounds * share * load.block, Instant::now()))
    };
    let submit = &submit;
    let spans: Result<Vec<_>, String> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..threads).map(|thread| scope.spawn(move || submit(thread))).collect();
        threads.into_iter().map(|t| t.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))).collect()
    });
    let spans = spans?;
    let first = spans.iter().map(|(began, ..)| *began).min().ok_or("no threads")?;
    let last = spans.iter().map(|(.., ended)| *ended).max().ok_or("no threads")?;
    let bytes: u64 = spans.iter().map(|(_, bytes, _)| bytes).sum();
    Ok(bytes as f64 / last.duration_since(first).as_nanos() as f64)
}

/// Rate in GB/s and median time of a batch in ns.
fn measure(load: Load, way: &mut dyn Way, span: Duration) -> Result<(f64, f64), Box<dyn Error>> {
    let mut times = Vec::new();
    let began = Instant::now();
    let mut number = 0;
    while began.elapsed() < span || number < 3 {
        let from = Instant::now();
        way.once(load, number)?;
        times.push(from.elapsed().as_nanos() as f64);
        number += 1;
    }
    let rate = (number * load.bytes()) as f64 / times.iter().sum::<f64>();
    Ok((rate, median(&mut times)))
}

/// Sorts them, too.
pub(crate) fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn min(values: &[f64]) -> f64 {
    values.iter().copied().fold(f64::INFINITY, f64::min)
}

fn max(values: &[f64]) -> f64 {
    values.iter().copied().fold(0.0, f64::max)
}

/// Bytes that are not zero: a source of untouched pages flatters some copies.
fn fill(memory: &Memory) -> Result<(), Box<dyn Error>> {
    let page: Vec<u8> = (0..4096u32).map(|i| (i * 7 + 1) as u8).collect();
    for at in (0..memory.len()).step_by(page.len()) {
        memory.write(at, &page)?;
    }
    Ok(())
}

pub(crate) struct Engines {
    near: Engine,
    segment: Segment,
    region: Region,
    remote: u64,
    /// Of a batch; kept, as the list is the caller's.
    transfers: Vec<Transfer>,
    _far: Engine,
}

impl Engines {
    pub(crate) fn new(fabric: Fabric) -> Result<Self, Box<dyn Error>> {
        let engine = || {
            let builder = Engine::builder().environment(|_| None).name("127.0.0.1").fabrics([fabric]).cores(1);
            builder.pin_cores(false).log_level(Level::Error).build()
        };
        let (near, far) = (engine()?, engine()?);
        let region = near.allocate(MEMORY as usize, "*")?;
        let remote = far.allocate(MEMORY as usize, "*")?;
        fill(region.memory())?;
        fill(remote.memory())?;
        let segment = near.open_segment(far.name())?;
        near.submit(&segment, &[Transfer::write_from(&region, 0, remote.addr(), 1 << 20)])?.wait(STUCK)?;
        if segment.fabric() != Some(fabric) {
            return Err(format!("not over {fabric}: {:?}", near.explain(far.name())).into());
        }
        Ok(Self { near, segment, region, remote: remote.addr(), transfers: Vec::new(), _far: far })
    }

    /// Lists the transfers of batch `number`.
    pub(crate) fn prepare(&mut self, load: Load, number: u64) {
        let start = load.start(number);
        self.transfers.clear();
        for i in 0..load.batch {
            let transfer = self.transfer(load.op, start + i * load.block, load.block);
            self.transfers.push(transfer);
        }
    }

    fn transfer(&self, op: Op, at: u64, len: u64) -> Transfer {
        Transfer { op, local: self.region.addr() + at, remote: self.remote + at, len }
    }

    /// Moves what was listed.
    pub(crate) fn submit_and_wait(&self) -> Result<(), Box<dyn Error>> {
        self.near.submit(&self.segment, &self.transfers)?.wait(STUCK)?;
        Ok(())
    }
}

impl Way for Engines {
    fn once(&mut self, load: Load, number: u64) -> Result<(), Box<dyn Error>> {
        self.prepare(load, number);
        self.submit_and_wait()
    }
}

/// One thread that copies: with the library's copy, or with streaming stores.
struct Copy {
    streaming: bool,
    near: Arc<Memory>,
    far: Arc<Memory>,
}

impl Copy {
    fn new(streaming: bool) -> Result<Self, Box<dyn Error>> {
        let (near, far) = (Memory::allocate(MEMORY as usize)?, Memory::allocate(MEMORY as usize)?);
        fill(&near)?;
        fill(&far)?;
        Ok(Self { streaming, near, far })
    }
}

impl Way for Copy {
    fn once(&mut self, load: Load, number: u64) -> Result<(), Box<dyn Error>> {
        let (from, to) = if load.op == Op::Write { (&self.near, &self.far) } else { (&self.far, &self.near) };
        for i in 0..load.batch {
            let at = load.start(number) + i * load.block;
            if !(self.streaming && bare::stream_copy(to, at, from, at, load.block)) {
                to.copy_from(at, from, at, load.block)?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_quick_run_measures_every_case() {
        let found = run(true).unwrap();
        assert_eq!(found.cases.len(), 2 * 2 * (BLOCKS.len() * 2 + 1 + SUBMITTERS.len()));
        assert!(found.cases.iter().all(|case| case["ratio"].as_f64().unwrap() > 0.0));
    }
}
