//! One of two processes is killed in mid-transfer, again and again. The other ends every batch with the cause, in bounded
//! time, gives back what it held for it, and serves the next process of the same name at once.
//!
//! `KILLS=n` sets how often; the usual number keeps the whole of it within a minute.

mod host_support;

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use host_support::ports::free_port;
use host_support::process::Process;
use host_support::{START, wait_for};
use moonrail::{Engine, Fabric, Transfer, WaitError};

/// For a batch to end after its peer was killed. Recorded, not promised: the promise is asserted in virtual time.
const BOUND: Duration = Duration::from_secs(10);

fn kills(usual: u32) -> u32 {
    std::env::var("KILLS").ok().and_then(|n| n.parse().ok()).unwrap_or(usual)
}

/// A pseudo-random span below `most`, another each time.
fn moment(number: u32, most: Duration) -> Duration {
    let mixed = u64::from(number).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 33;
    most.mul_f64(mixed as f64 / (1u64 << 31) as f64)
}

/// One test at a time: they count what the process holds.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What this process holds: descriptors, mappings of shared memory, and resident bytes.
#[derive(Debug)]
struct Held {
    descriptors: usize,
    shared_mappings: usize,
    resident: u64,
}

impl Held {
    fn now() -> Self {
        let descriptors = std::fs::read_dir("/proc/self/fd").expect("procfs").count();
        let maps = std::fs::read_to_string("/proc/self/maps").expect("procfs");
        let status = std::fs::read_to_string("/proc/self/status").expect("procfs");
        let resident = status
            .lines()
            .find_map(|line| line.strip_prefix("VmRSS:"))
            .and_then(|rest| rest.trim().split(' ').next().and_then(|kib| kib.parse::<u64>().ok()));
        Self {
            descriptors,
            shared_mappings: maps.lines().filter(|line| line.contains("memfd:")).count(),
            resident: resident.expect("VmRSS") * 1024,
        }
    }
}

fn engine(fabrics: &[Fabric]) -> Engine {
    let builder = Engine::builder().environment(|_| None).name("127.0.0.1").fabrics(fabrics.iter().copied());
    let builder = builder.cores(1).pin_cores(false);
    builder.log(|_, _| {}).build().expect("an engine")
}

fn median(spans: &mut [Duration]) -> Duration {
    spans.sort_unstable();
    spans[spans.len() / 2]
}

/// The target is killed under WRITEs and READs of ours.
fn targets_die(fabrics: &[Fabric], usual: u32) {
    let _alone = alone();
    let engine = engine(fabrics);
    let local = engine.allocate(8 << 20, "*").expect("memory");
    let port = free_port();
    let words: Vec<String> = fabrics.iter().map(ToString::to_string).collect();
    let fabrics = words.join(",");
    let line = format!("serve --name 127.0.0.1:{port} --fabrics {fabrics} --size 8MiB --cores 1");
    let mut before = None;
    let (mut ended, mut served, mut failed) = (Vec::new(), Vec::new(), 0);
    let count = kills(usual);
    for number in 0..count {
        let mut target = Process::moonrail(&line);
        let name = target.says("listening on ", START);
        let started = Instant::now();
        let segment = engine.open_segment(&name).expect("its descriptor");
        segment.refresh().expect("it is another process than the last");
        let far = segment.buffers()[0].addr;
        let transfers: Vec<Transfer> = (0..64u64)
            .map(|i| {
                let at = i << 16;
                if number % 2 == 0 {
                    Transfer::write_from(&local, at, far + at, 1 << 16)
                } else {
                    Transfer::read_into(&local, at, far + at, 1 << 16)
                }
            })
            .collect();
        // A fresh process of the same name is served at once.
        engine.submit(&segment, &transfers).expect("submitted").wait(START).expect("the first batch");
        served.push(started.elapsed());
        let dies = Instant::now() + moment(number, Duration::from_millis(4));
        let mut target = Some(target);
        let error = loop {
            if Instant::now() >= dies
                && let Some(target) = target.take()
            {
                target.kill();
            }
            let submitted = Instant::now();
            let batch = engine.submit(&segment, &transfers).expect("submitted");
            match batch.wait(BOUND) {
                // Copied before anybody could know, or before the kill.
                Ok(()) => assert!(dies.elapsed() < BOUND, "a dead peer is written to without an error"),
                Err(WaitError::Failed(error)) => {
                    ended.push(submitted.elapsed());
                    break error;
                }
                Err(other) => panic!("not ended within {BOUND:?}: {other}"),
            }
        };
        failed += 1;
        assert!(!error.to_string().is_empty());
        if number == 2 {
            before = Some(Held::now());
        }
    }
    let before = before.expect("more than two kills");
    let after = wait_for("what was held for the dead to be given back", || {
        let after = Held::now();
        let fits = after.descriptors <= before.descriptors && after.shared_mappings <= before.shared_mappings;
        fits.then_some(after)
    });
    assert!(after.resident < before.resident + (16 << 20), "{before:?} {after:?}");
    assert_eq!(failed, count);
    let worst = *ended.iter().max().expect("some");
    println!(
        "{fabrics}: {count} targets killed; a batch ended after {:?} (median; worst {worst:?}), the next process was served \
         {:?} after it said so",
        median(&mut ended),
        median(&mut served)
    );
}

#[test]
fn targets_killed_over_shared_memory() {
    targets_die(&[Fabric::Shm], 10);
}

#[test]
fn targets_killed_over_tcp() {
    targets_die(&[Fabric::Tcp], 6);
}

/// As most are: what cannot go over the first any more is tried over the second, and ends when that fails too.
#[test]
fn targets_killed_that_are_reached_over_both() {
    targets_die(&[Fabric::Shm, Fabric::Tcp], 4);
}

/// Initiators are killed while they move bytes to and from our memory.
fn initiators_die(fabric: Fabric) {
    let _alone = alone();
    let engine = engine(&[fabric]);
    let _memory = engine.allocate(8 << 20, "*").expect("memory");
    let line = |rest: &str| format!("bench {} --fabrics {fabric} --cores 1 {rest}", engine.name());
    let mut before = None;
    let count = kills(20);
    for number in 0..count {
        let op = if number % 2 == 0 { "write" } else { "read" };
        let initiator = Process::moonrail(&line(&format!("--op {op} --block 64KiB --batch 64 --duration 60s")));
        // It starts in some 50 ms; so half of them die in mid-transfer, and some while they connect.
        std::thread::sleep(Duration::from_millis(40) + moment(number, Duration::from_millis(120)));
        initiator.kill();
        if number == 2 {
            std::thread::sleep(Duration::from_millis(200));
            before = Some(Held::now());
        }
    }
    let before = before.expect("more than two kills");
    let after = wait_for("what was held for the dead to be given back", || {
        let after = Held::now();
        let fits = after.descriptors <= before.descriptors && after.shared_mappings <= before.shared_mappings;
        fits.then_some(after)
    });
    assert!(after.resident < before.resident + (16 << 20), "{before:?} {after:?}");
    // And whoever comes now is served.
    Process::moonrail(&line("--op both --block 64KiB --iterations 4 --verify")).wait(START).expect_ok();
    println!("{fabric}: {count} initiators killed");
}

#[test]
fn initiators_killed_over_shared_memory() {
    initiators_die(Fabric::Shm);
}

#[test]
fn initiators_killed_over_tcp() {
    initiators_die(Fabric::Tcp);
}
