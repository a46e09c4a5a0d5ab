//! Two engines of this host, over shared memory and over TCP, beside what the machine does without an engine.
//!
//! Each case runs its own way and its controls in turn, several times; the figure is the median of the ratios to the best control of
//! each repetition. Controls: for shared memory one thread that copies the same blocks, with the library's copy and with streaming
//! stores; for TCP a bare pair of sockets that sends a whole batch with one write, takes it with as few reads as it can, and answers
//! with 8 bytes. The time of one small transfer is held against a cache line's way to another processor and back.
//! *same*: the blocks of one batch again and again, so they stay in cache. *fresh*: the next ones of a large memory.

use std::error::Error;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

use moonrail::{Engine, Fabric, Level, Memory, Op, Region, Segment, Transfer};
use serde_json::{Value, json};

use crate::bare;
use crate::record::Found;

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
/// Socket buffers of the bare program: the best of what was tried on loopback.
const BUFFER: usize = 4 << 20;

/// What one case moves.
#[derive(Clone, Copy)]
pub(crate) struct Load {
    pub(crate) op: Op,
    pub(crate) block: u64,
    pub(crate) batch: u64,
    pub(crate) fresh: bool,
}

impl Load {
    fn bytes(self) -> u64 {
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
        if fabric == Fabric::Shm {
            cases.extend(small(&mut ours, repetitions, if quick { 200 } else { 20_000 })?);
        }
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

/// One small transfer, submitted and waited for, beside a cache line's round trip; in turn, nanoseconds without the clock's own.
fn small(ours: &mut dyn Way, repetitions: usize, count: u64) -> Result<Vec<Value>, Box<dyn Error>> {
    let mut cases = Vec::new();
    for op in [Op::Write, Op::Read] {
        let load = Load { op, block: 64, batch: 1, fresh: false };
        let (mut halves, mut p99s, mut lines, mut ratios) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        for repetition in 0..=repetitions {
            let clock = bare::clock();
            let mut times = Vec::with_capacity(count as usize);
            for number in 0..count {
                let from = Instant::now();
                ours.once(load, number)?;
                times.push(from.elapsed().as_nanos() as f64 - clock);
            }
            let line = bare::line_round_trip(count.div_ceil(256) as usize);
            if repetition > 0 || repetitions == 1 {
                let half = median(&mut times);
                p99s.push(times[times.len() * 99 / 100]);
                halves.push(half);
                lines.push(line);
                ratios.push(half / line);
            }
        }
        let (low, high) = (min(&ratios), max(&ratios));
        let (p50, p99, line) = (median(&mut halves), median(&mut p99s), median(&mut lines));
        let (ratio, op) = (median(&mut ratios), if op == Op::Read { "read" } else { "write" });
        println!(
            "shm  {op:<5} of 64 B, submitted and waited for: p50 {p50:.0} ns, p99 {p99:.0} ns; a cache line there and back {line:.0} ns; \
             ratio {ratio:.2} ({low:.2}-{high:.2})"
        );
        cases.push(json!({
            "fabric": "shm", "op": op, "block": 64, "batch": 1, "what": "latency", "p50_ns": p50, "p99_ns": p99,
            "line_round_trip_ns": line, "ratio": ratio, "ratio_min": low, "ratio_max": high, "repetitions": ratios.len(),
        }));
    }
    Ok(cases)
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
        let transfer = |i: u64| {
            let at = start + i * load.block;
            let (local, remote) = (self.region.addr() + at, self.remote + at);
            Transfer { op: load.op, local, remote, len: load.block }
        };
        self.transfers.clear();
        self.transfers.extend((0..load.batch).map(transfer));
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

/// A bare pair of sockets. Its far end does as the first byte of a batch says.
struct Bare {
    stream: TcpStream,
    buffer: Vec<u8>,
}

const BARE_WRITE: u8 = 1;
const BARE_READ: u8 = 2;

impl Bare {
    fn new() -> Result<Self, Box<dyn Error>> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let stream = TcpStream::connect(listener.local_addr()?)?;
        let (far, _) = listener.accept()?;
        for end in [&stream, &far] {
            end.set_nodelay(true)?;
            rustix::net::sockopt::set_socket_send_buffer_size(end, BUFFER)?;
            rustix::net::sockopt::set_socket_recv_buffer_size(end, BUFFER)?;
        }
        std::thread::Builder::new().name("bare-far".into()).spawn(move || serve(far))?;
        Ok(Self { stream, buffer: vec![7; (32 << 20) + 16] })
    }
}

/// Until the other end is gone.
fn serve(mut far: TcpStream) -> Option<()> {
    let mut buffer = vec![5; 32 << 20];
    loop {
        let mut head = [0; 9];
        far.read_exact(&mut head).ok()?;
        let len = usize::try_from(u64::from_le_bytes(head[1..].try_into().ok()?)).ok()?;
        if head[0] == BARE_WRITE {
            far.read_exact(buffer.get_mut(..len)?).ok()?;
            far.write_all(&[0; 8]).ok()?;
        } else {
            far.write_all(buffer.get(..len)?).ok()?;
        }
    }
}

impl Way for Bare {
    fn once(&mut self, load: Load, _: u64) -> Result<(), Box<dyn Error>> {
        let len = load.bytes() as usize;
        self.buffer[1..9].copy_from_slice(&load.bytes().to_le_bytes());
        if load.op == Op::Write {
            self.buffer[0] = BARE_WRITE;
            self.stream.write_all(&self.buffer[..9 + len])?;
            self.stream.read_exact(&mut self.buffer[..8])?;
        } else {
            self.buffer[0] = BARE_READ;
            self.stream.write_all(&self.buffer[..9])?;
            self.stream.read_exact(&mut self.buffer[..len])?;
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
        assert_eq!(found.cases.len(), 2 * 2 * BLOCKS.len() * 2 + 2);
        assert!(found.cases.iter().all(|case| case["ratio"].as_f64().unwrap() > 0.0));
    }
}
