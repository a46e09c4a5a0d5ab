//! The measurement itself: threads that submit batches, wait for them, and check what arrived.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;
use moonrail::{Batch, Engine, Op, Region, Segment, SubmitError, Transfer, WaitError};

use super::judge::{Judge, Task};
use super::pattern::{self, Mismatch};
use super::plan::{Limit, Places, Plan, Verify};
use crate::failure::{Failure, Result};
use crate::progress::Progress;
use crate::signal::Stop;
use crate::units;

/// Longer batches are counted at this: a batch is bounded by far less.
const LONGEST_NS: u64 = 3_600_000_000_000;
/// After the engine's own deadline, which ends every batch, a wait may take this much longer.
const GRACE: Duration = Duration::from_secs(5);
/// The engine is full: how long to wait before submitting again.
const BUSY_PAUSE: Duration = Duration::from_micros(50);
/// Bytes of the buffer that patterns are made in.
const STEP: usize = 256 << 10;

/// What a measurement found.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// Batches that ended with every byte in place.
    pub batches: u64,
    /// Bytes of those batches.
    pub bytes: u64,
    /// Bytes that were compared, and equal.
    pub verified: u64,
    /// From the first submission to the last end.
    pub elapsed: Duration,
    /// Nanoseconds from submission to end of each batch, patterns and checks not included.
    pub latency: Histogram<u64>,
    /// A signal ended it early.
    pub stopped: bool,
}

/// An empty histogram, three digits exact up to an hour.
pub fn histogram() -> Histogram<u64> {
    Histogram::new_with_bounds(1, LONGEST_NS, 3).expect("the bounds are constants that hdrhistogram accepts")
}

struct Shared<'a> {
    plan: Plan,
    engine: &'a Engine,
    segment: &'a Segment,
    places: &'a Places,
    judge: Judge<'a>,
    halt: AtomicBool,
    batches: AtomicU64,
    failure: Mutex<Option<Failure>>,
}

/// Runs one measurement, which is `part` of so many: for the progress line.
///
/// # Errors
/// The first thing that went wrong in any thread; the others end at their next batch.
pub fn run(
    engine: &Engine,
    segment: &Segment,
    places: &Places,
    plan: Plan,
    part: (usize, usize),
    stop: &Stop,
) -> Result<Outcome> {
    let shared = Shared {
        plan,
        engine,
        segment,
        places,
        judge: Judge::new(engine, segment, plan.timeout),
        halt: AtomicBool::new(false),
        batches: AtomicU64::new(0),
        failure: Mutex::new(None),
    };
    let started = Instant::now();
    let mut latency = histogram();
    let (mut verified, mut ended) = (0, started);
    std::thread::scope(|scope| {
        let shared = &shared;
        let workers: Vec<_> = (0..plan.layout.threads).map(|t| scope.spawn(move || work(shared, t))).collect();
        watch(shared, part, started, stop, || workers.iter().all(std::thread::ScopedJoinHandle::is_finished));
        for worker in workers {
            match worker.join() {
                Ok(Ok((histogram, checked, end))) => {
                    verified += checked;
                    ended = ended.max(end);
                    // Same bounds: adding cannot fail.
                    let _ = latency.add(histogram);
                }
                Ok(Err(failure)) => shared.fail(failure),
                Err(_) => shared.fail(Failure::new("a thread of the measurement panicked", "report this as a bug")),
            }
        }
    });
    if let Some(failure) = shared.failure.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner) {
        return Err(failure);
    }
    let batches = shared.batches.into_inner();
    let bytes = batches * plan.layout.batch_bytes();
    Ok(Outcome { batches, bytes, verified, elapsed: ended - started, latency, stopped: stop.is_asked() })
}

/// Draws the progress line and ends the run: by time, by signal, or because the threads are done.
fn watch(shared: &Shared<'_>, part: (usize, usize), started: Instant, stop: &Stop, finished: impl Fn() -> bool) {
    let Plan { op, layout, limit, .. } = shared.plan;
    let which = if part.1 == 1 { String::new() } else { format!("{} of {}: ", part.0, part.1) };
    let mut progress = Progress::new(format!("{which}{} {}", name(op), units::size(layout.block)));
    while !finished() {
        let elapsed = started.elapsed();
        let batches = shared.batches.load(Ordering::Relaxed);
        let done = match limit {
            Limit::Time(span) => elapsed.as_secs_f64() / span.as_secs_f64(),
            Limit::Batches(n) => batches as f64 / (n * layout.threads) as f64,
        };
        if stop.is_asked() || matches!(limit, Limit::Time(span) if elapsed >= span) {
            shared.halt.store(true, Ordering::Relaxed);
        }
        progress.draw(done, &units::rate(batches * layout.batch_bytes(), elapsed));
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// READ or WRITE in one word.
pub fn name(op: Op) -> &'static str {
    match op {
        Op::Read => "read",
        Op::Write => "write",
    }
}

impl Shared<'_> {
    fn fail(&self, failure: Failure) {
        self.halt.store(true, Ordering::Relaxed);
        self.failure.lock().unwrap_or_else(std::sync::PoisonError::into_inner).get_or_insert(failure);
    }

    /// Submits, waits, and tells how long that took.
    fn carry(&self, transfers: &[Transfer]) -> Result<Duration> {
        let started = Instant::now();
        let batch = self.submit(transfers, started)?;
        let timeout = self.plan.timeout + GRACE;
        batch.wait(timeout).map_err(|e| match e {
            WaitError::DeadlineExceeded { .. } => {
                let lines = self.engine.explain(self.segment.name()).join("\n       ");
                Failure::new(e, format!("see why no rail carries it:\n       {lines}"))
            }
            other => Failure::told(&other),
        })?;
        Ok(started.elapsed())
    }

    fn submit(&self, transfers: &[Transfer], started: Instant) -> Result<Batch> {
        loop {
            match self.engine.submit(self.segment, transfers) {
                Ok(batch) => return Ok(batch),
                Err(SubmitError::Busy) if started.elapsed() < self.plan.timeout => std::thread::sleep(BUSY_PAUSE),
                Err(e) => return Err(Failure::told(&e)),
            }
        }
    }
}

/// Latencies, bytes verified, and when the last batch of a thread ended: whoever draws progress looks later.
type Done = (Histogram<u64>, u64, Instant);

fn work(shared: &Shared<'_>, thread: u64) -> Result<Done> {
    let worker = Worker::new(shared, thread);
    let done = worker.run();
    if done.is_err() {
        shared.halt.store(true, Ordering::Relaxed);
    }
    done
}

struct Worker<'a> {
    shared: &'a Shared<'a>,
    thread: u64,
    local: &'a Region,
    check: Option<&'a Region>,
    remote: u64,
}

impl<'a> Worker<'a> {
    fn new(shared: &'a Shared<'a>, thread: u64) -> Self {
        let places = shared.places;
        let place = |n: usize| thread as usize % n;
        Self {
            shared,
            thread,
            local: &places.local[place(places.local.len())],
            check: if places.check.is_empty() { None } else { Some(&places.check[place(places.check.len())]) },
            remote: places.remote[place(places.remote.len())],
        }
    }

    fn run(&self) -> Result<Done> {
        let Plan { op, layout, limit, verify, first_iteration, .. } = self.shared.plan;
        let transfers = layout.transfers(op, self.thread, self.local.addr(), self.remote);
        let mut latency = histogram();
        let mut verified = 0;
        for n in 0u64.. {
            // At least one: a time that is shorter than a batch measures that one.
            if n > 0 && self.shared.halt.load(Ordering::Relaxed) || matches!(limit, Limit::Batches(most) if n >= most) {
                break;
            }
            let took = if verify == Verify::No {
                self.shared.carry(&transfers)?
            } else {
                let took = self.checked(&transfers, first_iteration.wrapping_add(n))?;
                verified += layout.batch_bytes();
                took
            };
            latency.saturating_record(took.as_nanos().min(u128::from(LONGEST_NS)) as u64);
            self.shared.batches.fetch_add(1, Ordering::Relaxed);
        }
        Ok((latency, verified, Instant::now()))
    }

    /// One batch with every byte looked at.
    fn checked(&self, transfers: &[Transfer], iteration: u64) -> Result<Duration> {
        match self.shared.plan.op {
            Op::Write => self.checked_write(transfers, iteration),
            Op::Read => self.checked_read(transfers, iteration),
        }
    }

    /// Pattern here, WRITE, then the peer's memory is looked at: by READ into poisoned memory, and by the peer itself.
    fn checked_write(&self, transfers: &[Transfer], iteration: u64) -> Result<Duration> {
        let check = self.check_region()?;
        self.fill(self.local, iteration)?;
        let took = self.shared.carry(transfers)?;
        self.ask(Task::Check, iteration)?;
        self.poison(check, iteration)?;
        self.shared.carry(&self.shared.plan.layout.transfers(Op::Read, self.thread, check.addr(), self.remote))?;
        self.compare(check, iteration, "read back")?;
        Ok(took)
    }

    /// Pattern into the peer's memory, by the peer itself or by WRITE, then READ into poisoned memory.
    fn checked_read(&self, transfers: &[Transfer], iteration: u64) -> Result<Duration> {
        if self.shared.plan.verify == Verify::AskTarget {
            self.ask(Task::Fill, iteration)?;
        } else {
            let source = self.check_region()?;
            self.fill(source, iteration)?;
            let layout = self.shared.plan.layout;
            self.shared.carry(&layout.transfers(Op::Write, self.thread, source.addr(), self.remote))?;
        }
        self.poison(self.local, iteration)?;
        let took = self.shared.carry(transfers)?;
        self.compare(self.local, iteration, "read")?;
        Ok(took)
    }

    fn check_region(&self) -> Result<&'a Region> {
        self.check.ok_or_else(|| Failure::new("there is no memory to check with", "report this as a bug"))
    }

    fn ask(&self, task: Task, iteration: u64) -> Result<()> {
        if self.shared.plan.verify != Verify::AskTarget {
            return Ok(());
        }
        let blocks = self.shared.plan.layout.blocks(self.thread, self.remote);
        match self.shared.judge.ask(task, blocks, iteration)? {
            None => Ok(()),
            Some(wrong) => Err(self.wrong_byte(wrong, iteration, "found by its owner in the memory itself")),
        }
    }

    /// Calls `each` with every piece of this thread's blocks: offset in the region, and address in the peer.
    fn pieces(&self, mut each: impl FnMut(u64, u64, &mut [u8]) -> Result<()>) -> Result<()> {
        let layout = self.shared.plan.layout;
        let mut bytes = vec![0u8; STEP.min(layout.block as usize)];
        for i in 0..layout.batch {
            let mut offset = layout.offset(self.thread, i);
            let end = offset + layout.block;
            while offset < end {
                let part = (end - offset).min(bytes.len() as u64);
                each(offset, self.remote + offset, &mut bytes[..part as usize])?;
                offset += part;
            }
        }
        Ok(())
    }

    fn fill(&self, region: &Region, iteration: u64) -> Result<()> {
        self.pieces(|offset, addr, bytes| {
            pattern::fill(bytes, addr, iteration);
            region.write(offset, bytes).map_err(|e| Failure::told(&e))
        })
    }

    fn poison(&self, region: &Region, iteration: u64) -> Result<()> {
        self.pieces(|offset, addr, bytes| {
            pattern::poison(bytes, addr, iteration);
            region.write(offset, bytes).map_err(|e| Failure::told(&e))
        })
    }

    fn compare(&self, region: &Region, iteration: u64, how: &str) -> Result<()> {
        self.pieces(|offset, addr, bytes| {
            region.read(offset, bytes).map_err(|e| Failure::told(&e))?;
            pattern::check(bytes, addr, iteration).map_err(|wrong| self.wrong_byte(wrong, iteration, how))
        })
    }

    fn wrong_byte(&self, wrong: Mismatch, iteration: u64, how: &str) -> Failure {
        let Plan { op, layout, first_iteration, .. } = self.shared.plan;
        let Mismatch { addr, expected, found, wrong } = wrong;
        let cause = format!(
            "WRONG BYTE at {addr:#x} of {}: expected {expected:#04x}, found {found:#04x} ({how}; {wrong} wrong in this \
             piece; {} of {} blocks, thread {}, iteration {}, pattern {iteration:#x})",
            self.shared.segment.name(),
            name(op),
            units::size(layout.block),
            self.thread,
            iteration.wrapping_sub(first_iteration),
        );
        Failure::new(
            cause,
            "see that nobody else uses these buffers (`--buffer N` takes others); otherwise data is being corrupted: \
             run again with --ask-target, which tells a wrong WRITE from a wrong READ, and with one NIC at a time",
        )
    }
}
