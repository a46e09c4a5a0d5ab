//! Callers that wait turn the core themselves, whoever else does, and however they go on.

#[path = "../../datapath/tests/counting/mod.rs"]
mod counting;

use std::future::Future;
use std::pin::pin;
use std::sync::Arc;
use std::task::{Context, Poll, Wake, Waker};
use std::thread::Thread;
use std::time::{Duration, Instant};

use counting::{ALLOCATIONS, FREES, ON};
use moonrail::{Batch, BatchStatus, Engine, Fabric, PollMode, Region, Segment, Transfer};

const LONG: Duration = Duration::from_secs(20);
const BLOCK: u64 = 4096;

fn engine(mode: PollMode) -> Engine {
    Engine::builder()
        .environment(|_| None)
        .name("127.0.0.1")
        .cores(1)
        .pin_cores(false)
        .poll_mode(mode)
        .fabrics([Fabric::Tcp])
        .log(|_, _| {})
        .build()
        .unwrap()
}

struct Pair {
    near: Engine,
    _far: Engine,
    segment: Segment,
    local: Region,
    remote: Region,
}

fn pair(mode: PollMode, bytes: u64) -> Pair {
    let (near, far) = (engine(mode), engine(PollMode::Adaptive));
    let local = near.allocate(bytes as usize, "*").unwrap();
    let remote = far.allocate(bytes as usize, "*").unwrap();
    let segment = near.open_segment(far.name()).unwrap();
    Pair { near, _far: far, segment, local, remote }
}

impl Pair {
    fn write(&self, at: u64) -> Batch {
        let transfer = Transfer::write_from(&self.local, at, self.remote.addr() + at, BLOCK);
        self.near.submit(&self.segment, &[transfer]).unwrap()
    }

    fn led_turns(&self) -> u64 {
        self.near.counters().total().led_turns
    }
}

#[test]
fn one_caller_turns_an_idle_core_and_none_turns_a_busy_polling_one() {
    let adaptive = pair(PollMode::Adaptive, 1 << 20);
    for _ in 0..500 {
        adaptive.write(0).wait(LONG).unwrap();
    }
    // At least the one that reaps its completion, for most: a turn or two may be the core's own.
    assert!(adaptive.led_turns() > 250, "{} turns for 500 batches", adaptive.led_turns());

    let busy = pair(PollMode::Busy, 1 << 20);
    for _ in 0..100 {
        busy.write(0).wait(LONG).unwrap();
    }
    assert_eq!(busy.led_turns(), 0, "its own thread never lets go of it");
}

#[test]
fn one_transfer_costs_three_allocations_and_its_own_thread_frees_them() {
    const ROUNDS: u64 = 1000;
    let pair = pair(PollMode::Adaptive, 1 << 20);
    let rounds = || {
        for _ in 0..ROUNDS {
            pair.write(0).wait(LONG).unwrap();
        }
    };
    rounds();
    // Where the machine is busy with something else the core's own thread reaps more of them, and they go the long way.
    let its_own = (0..20).any(|_| {
        ALLOCATIONS.set(0);
        FREES.set(0);
        ON.set(true);
        rounds();
        ON.set(false);
        let (allocated, freed) = (ALLOCATIONS.get(), FREES.get());
        // The batch, its Work and its word. Lists that are kept grow now and then.
        assert!((3 * ROUNDS..=3 * ROUNDS + ROUNDS / 20).contains(&allocated), "{allocated} for {ROUNDS} batches");
        freed > allocated * 3 / 4
    });
    assert!(its_own, "{} of {} are freed here", FREES.get(), ALLOCATIONS.get());
}

/// Wakes a thread, as a small executor does.
struct Unpark(Thread);

impl Wake for Unpark {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }
}

fn block_on(batch: Batch) {
    let waker = Waker::from(Arc::new(Unpark(std::thread::current())));
    let mut batch = pin!(batch);
    let until = Instant::now() + LONG;
    loop {
        match batch.as_mut().poll(&mut Context::from_waker(&waker)) {
            Poll::Ready(result) => return result.unwrap(),
            Poll::Pending => std::thread::park_timeout(until.saturating_duration_since(Instant::now())),
        }
        assert!(Instant::now() < until, "nobody woke the task");
    }
}

#[test]
fn every_batch_ends_whoever_turns_the_core_and_however_its_caller_goes_on() {
    const THREADS: u64 = 4;
    const ROUNDS: u64 = 240;
    let pair = pair(PollMode::Adaptive, THREADS * ROUNDS * BLOCK);
    let bytes: Vec<u8> = (0..pair.local.len()).map(|at| (at.wrapping_mul(0x9e37_79b9) >> 11) as u8).collect();
    pair.local.write(0, &bytes).unwrap();
    std::thread::scope(|scope| {
        for thread in 0..THREADS {
            let pair = &pair;
            scope.spawn(move || {
                let mut left = Vec::new();
                for round in 0..ROUNDS {
                    let batch = pair.write((thread * ROUNDS + round) * BLOCK);
                    match (round + thread) % 6 {
                        0 => batch.wait(LONG).unwrap(),
                        1 => {
                            let until = Instant::now() + LONG;
                            while batch.poll() == BatchStatus::Waiting {
                                assert!(Instant::now() < until, "nobody turns the core for one who polls");
                                std::thread::yield_now();
                            }
                        }
                        2 => block_on(batch),
                        // Goes on when others have turned the core, or nobody has.
                        3 => left.push(batch),
                        4 => {
                            let _ = batch.wait(Duration::from_micros(3));
                            left.push(batch);
                        }
                        _ => {
                            left.push(batch);
                            std::thread::sleep(Duration::from_micros(500));
                        }
                    }
                }
                for batch in left.iter().rev() {
                    batch.wait(LONG).unwrap();
                    assert_eq!((batch.poll(), batch.bytes()), (BatchStatus::Done, BLOCK));
                }
            });
        }
    });
    let mut seen = vec![0; bytes.len()];
    pair.remote.read(0, &mut seen).unwrap();
    assert!(seen == bytes, "a byte that was said to be there is not");
    let total = pair.near.counters().total();
    assert_eq!((total.bytes, total.failed), (pair.local.len(), 0));
}
