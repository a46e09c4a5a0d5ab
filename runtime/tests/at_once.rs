//! Small batches over shared memory: what they cost, and that memory which leaves is not copied any more.

#[path = "../../datapath/tests/counting/mod.rs"]
mod counting;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use counting::{ALLOCATIONS, ON};
use moonrail::{BatchStatus, Engine, Fabric, Level, Region, Segment, SubmitError, Transfer};

const LONG: Duration = Duration::from_secs(20);

fn allocations(work: impl FnOnce()) -> u64 {
    ALLOCATIONS.set(0);
    ON.set(true);
    work();
    ON.set(false);
    ALLOCATIONS.get()
}

struct Pair {
    near: Engine,
    far: Engine,
    segment: Segment,
    local: Region,
    remote: Region,
}

fn pair() -> Pair {
    let engine = || {
        let builder = Engine::builder().environment(|_| None).name("127.0.0.1").fabrics([Fabric::Shm]).cores(1);
        builder.pin_cores(false).log_level(Level::Error).build().unwrap()
    };
    let (near, far) = (engine(), engine());
    let (local, remote) = (near.allocate(1 << 20, "*").unwrap(), far.allocate(1 << 20, "*").unwrap());
    let segment = near.open_segment(far.name()).unwrap();
    near.submit(&segment, &[Transfer::write_from(&local, 0, remote.addr(), 1 << 20)]).unwrap().wait(LONG).unwrap();
    Pair { near, far, segment, local, remote }
}

#[test]
fn one_transfer_allocates_nothing_and_many_one_list() {
    let pair = pair();
    let one = [Transfer::write_from(&pair.local, 64, pair.remote.addr() + 64, 64)];
    let many: Vec<_> =
        (0..32).map(|i| Transfer::read_into(&pair.local, i * 8192, pair.remote.addr() + i * 8192, 4096)).collect();
    let rounds = |transfers: &[Transfer]| {
        allocations(|| {
            for _ in 0..100 {
                let batch = pair.near.submit(&pair.segment, transfers).unwrap();
                assert_eq!(batch.poll(), BatchStatus::Done, "when submit returns");
                batch.wait(LONG).unwrap();
            }
        })
    };
    rounds(&one);
    let before = pair.near.counters();
    assert_eq!((rounds(&one), rounds(&many)), (0, 100));
    let after = pair.near.counters();
    assert_eq!(after.copies - before.copies, 100 + 3200);
    assert_eq!(after.copied_bytes - before.copied_bytes, 100 * 64 + 3200 * 4096);
    assert_eq!(after.total().work_requests, before.total().work_requests, "no core had anything to do with it");
}

#[test]
fn a_batch_is_copied_at_once_up_to_its_limit_and_a_wrong_range_is_told_as_ever() {
    let pair = pair();
    let submit = |transfers: &[Transfer]| pair.near.submit(&pair.segment, transfers);
    let transfer = |at: u64, len: u64| Transfer::write_from(&pair.local, at, pair.remote.addr() + at, len);
    let copies = || pair.near.counters().copies;
    let before = copies();
    submit(&[transfer(0, 512 << 10)]).unwrap().wait(LONG).unwrap();
    assert_eq!(copies() - before, 1);
    let outside = Transfer { local: pair.local.addr() + (1 << 20) - 8, ..transfer(0, 64) };
    assert!(matches!(submit(&[transfer(0, 8), outside]), Err(SubmitError::NotRegistered { index: 1, .. })));
    let beyond = Transfer { remote: pair.remote.addr() + (1 << 20) - 8, ..transfer(0, 64) };
    assert!(matches!(submit(&[transfer(0, 8), beyond]), Err(SubmitError::OutsidePeer { index: 1, .. })));
    let empty = submit(&[transfer(0, 0)]).unwrap();
    empty.wait(LONG).unwrap();
    assert_eq!(empty.transfer_bytes(0), 0);
    assert!(pair.near.shutdown(LONG));
    assert!(matches!(submit(&[transfer(0, 8)]), Err(SubmitError::Stopped)));
    assert!(matches!(submit(&[transfer(0, 0)]), Err(SubmitError::Stopped)));
    drop(pair.far);
}

/// Two threads copy from a region all the time that comes and goes: when `unregister` has returned, they do not touch it any more.
#[test]
fn a_region_that_has_left_is_not_copied_to() {
    const ROUNDS: u32 = 300;
    let pair = pair();
    let bytes = vec![7u8; 4096];
    pair.remote.write(0, &bytes).unwrap();
    let memory = pair.local.memory();
    let here = AtomicU64::new(0);
    let (stop, landed) = (AtomicBool::new(false), AtomicU64::new(0));
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    let at = here.load(Ordering::Acquire);
                    let transfer = Transfer::read(at, pair.remote.addr(), 4096);
                    match pair.near.submit(&pair.segment, &[transfer]) {
                        Ok(batch) => landed.fetch_add(u64::from(batch.wait(LONG).is_ok()), Ordering::Relaxed),
                        Err(SubmitError::NotRegistered { .. }) => 0,
                        Err(other) => panic!("{other}"),
                    };
                }
            });
        }
        pair.near.unregister(&pair.local).unwrap();
        for round in 0..ROUNDS {
            let region = pair.near.register(memory, "*", false).unwrap();
            here.store(region.addr(), Ordering::Release);
            let before = landed.load(Ordering::Relaxed);
            while round % 10 == 0 && landed.load(Ordering::Relaxed) < before + 2 {
                std::thread::yield_now();
            }
            pair.near.unregister(&region).unwrap();
            memory.write(0, &[0; 4096]).unwrap();
            std::thread::yield_now();
            let mut seen = vec![1; 4096];
            memory.read(0, &mut seen).unwrap();
            assert!(seen.iter().all(|byte| *byte == 0), "round {round}: a READ landed after unregister had returned");
        }
        stop.store(true, Ordering::Relaxed);
    });
}
