//! A forked child on real verbs: every call on its parent's engine is an error, the parent's queue pairs stay the parent's, and
//! its traffic goes on. (`runtime/tests/fork.rs` tries every call there is, over shared memory and TCP.)
#![allow(unsafe_code)] // forks as an embedder may

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{Read as _, Write as _};
use std::os::fd::FromRawFd as _;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use moonrail::error::{RegisterError, SegmentError, SubmitError};
use moonrail::{Engine, Fabric, Region, Segment, Transfer};
use moonrail_tools::bench::pattern;

use super::lab_support::rdma::queue_pairs;
use super::lab_support::{LIMIT, Lab};

const BYTES: u64 = 256 << 10;
/// Children, each while bytes move.
const CHILDREN: usize = 3;

fn engine(node: u32) -> Engine {
    let builder = Engine::builder().name(format!("10.0.0.{}", node + 1)).metadata("P2PHANDSHAKE").cores(1);
    builder.fabrics([Fabric::Rdma]).log(|_, _| {}).build().unwrap_or_else(|e| panic!("{e}"))
}

#[test]
fn a_child_never_has_its_parents_queue_pairs() {
    let lab = Lab::enter("fork");
    if lab.node == 1 {
        let engine = engine(1);
        // For the parent, and for the children's own engines.
        let _region = engine.allocate(2 * BYTES as usize, "*").unwrap_or_else(|e| panic!("{e}"));
        lab.tell("name", engine.name());
        lab.barrier();
        assert!(engine.shutdown(Duration::from_secs(15)));
        lab.barrier();
        return;
    }
    let engine = Arc::new(engine(0));
    let peer = engine.open_segment(&lab.hear("name", 1)).unwrap_or_else(|e| panic!("{e}"));
    let traffic = Traffic::start(&engine, &peer);
    traffic.goes_on();
    super::lab_support::wait_for("four rails", || {
        (engine.rails().iter().filter(|rail| rail.usable).count() == 4).then_some(())
    });
    let numbers =
        || -> BTreeSet<(String, u64)> { queue_pairs().into_iter().map(|qp| (qp.device, qp.number)).collect() };
    let own = numbers();
    assert!(own.len() >= 4, "{own:?}");
    let region = engine.allocate(4096, "*").unwrap_or_else(|e| panic!("{e}"));
    for child in 0..CHILDREN {
        let said = in_child(|| {
            refused(&engine, &peer, &region);
            // The kernel says whose they are; none is this process's.
            assert!(numbers().is_empty(), "{:?}", numbers());
            let theirs = engine_of_the_child(peer.name(), &numbers);
            assert!(theirs.is_disjoint(&own), "{theirs:?} {own:?}");
            format!("fine, with {} queue pairs of its own", theirs.len())
        });
        let said = said.unwrap_or_else(|e| panic!("child {child}: {e}"));
        assert!(said.starts_with("fine"), "child {child}: {said}");
        println!("child {child}: {said}");
        traffic.goes_on();
        assert_eq!(numbers(), own, "the parent has the queue pairs it had");
    }
    let rounds = traffic.end();
    println!("{rounds} verified rounds beside {CHILDREN} children");
    assert!(engine.incidents().is_empty(), "{:?}", engine.incidents());
    lab.barrier();
    assert!(engine.shutdown(Duration::from_secs(15)), "the engine gave everything back");
    lab.barrier();
}

/// What would touch a NIC is refused.
fn refused(engine: &Engine, peer: &Segment, region: &Region) {
    let transfer = Transfer::write_from(region, 0, 4096, 8);
    assert!(matches!(engine.submit(peer, &[transfer]), Err(SubmitError::Forked)));
    assert!(matches!(engine.batch().add(peer, transfer).submit(), Err(SubmitError::Forked)));
    assert!(matches!(engine.allocate(4096, "*"), Err(RegisterError::Forked)));
    assert!(matches!(engine.open_segment(peer.name()), Err(SegmentError::Forked)));
    assert!(matches!(peer.refresh(), Err(SegmentError::Forked)));
    assert!(engine.rails().is_empty() && !engine.shutdown(LIMIT));
}

/// An engine that the child builds for itself, its queue pairs while it has them.
fn engine_of_the_child<T>(peer: &str, numbers: &impl Fn() -> BTreeSet<T>) -> BTreeSet<T> {
    let own = engine(0);
    let region = own.allocate(2 * BYTES as usize, "*").unwrap_or_else(|e| panic!("{e}"));
    let far = own.open_segment(peer).unwrap_or_else(|e| panic!("{e}"));
    let at = far.buffers()[0].addr + BYTES;
    round(&own, &far, &region, at, u64::from(std::process::id())).unwrap_or_else(|e| panic!("{e}"));
    let theirs = numbers();
    assert!(!theirs.is_empty(), "it moved bytes on queue pairs of its own");
    drop(far);
    assert!(own.shutdown(Duration::from_secs(15)), "the child's engine gave everything back");
    theirs
}

/// A pattern there and back, compared.
fn round(engine: &Engine, peer: &Segment, region: &Region, at: u64, number: u64) -> Result<(), String> {
    let mut bytes = vec![0; BYTES as usize];
    pattern::fill(&mut bytes, at, number);
    region.write(0, &bytes).map_err(|e| e.to_string())?;
    pattern::poison(&mut bytes, at, number);
    region.write(BYTES, &bytes).map_err(|e| e.to_string())?;
    for transfer in [Transfer::write_from(region, 0, at, BYTES), Transfer::read_into(region, BYTES, at, BYTES)] {
        let batch = engine.submit(peer, &[transfer]).map_err(|e| e.to_string())?;
        batch.wait(LIMIT).map_err(|e| e.to_string())?;
    }
    region.read(BYTES, &mut bytes).map_err(|e| e.to_string())?;
    pattern::check(&bytes, at, number).map_err(|wrong| format!("wrong bytes in round {number}: {wrong:?}"))
}

/// Rounds that never stop while children come and go.
struct Traffic {
    stop: Arc<AtomicBool>,
    rounds: Arc<AtomicU64>,
    thread: std::thread::JoinHandle<Result<(), String>>,
}

impl Traffic {
    fn start(engine: &Arc<Engine>, peer: &Segment) -> Self {
        let (stop, rounds) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let region = engine.allocate(2 * BYTES as usize, "*").unwrap_or_else(|e| panic!("{e}"));
        let thread = std::thread::spawn({
            let (engine, peer, stop, rounds) =
                (Arc::clone(engine), peer.clone(), Arc::clone(&stop), Arc::clone(&rounds));
            move || {
                let at = peer.buffers()[0].addr;
                while !stop.load(Ordering::Relaxed) {
                    round(&engine, &peer, &region, at, rounds.load(Ordering::Relaxed))?;
                    rounds.fetch_add(1, Ordering::Relaxed);
                }
                engine.unregister(&region).map_err(|e| e.to_string())
            }
        });
        Self { stop, rounds, thread }
    }

    /// Two more rounds: one began after the call.
    fn goes_on(&self) {
        let wanted = self.rounds.load(Ordering::Relaxed) + 2;
        super::lab_support::wait_for("the parent's traffic", || {
            assert!(!self.thread.is_finished(), "the parent's traffic ended");
            (self.rounds.load(Ordering::Relaxed) >= wanted).then_some(())
        });
    }

    fn end(self) -> u64 {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().expect("it does not panic").unwrap_or_else(|e| panic!("the parent's traffic: {e}"));
        self.rounds.load(Ordering::Relaxed)
    }
}

/// Runs `body` in a forked child and returns what it says; an error if it panics or does not end.
fn in_child(body: impl FnOnce() -> String) -> Result<String, String> {
    let mut ends = [0; 2];
    // SAFETY: room for two descriptors.
    assert_eq!(unsafe { libc::pipe(ends.as_mut_ptr()) }, 0);
    // SAFETY: the child runs `body` and ends without unwinding into the parent's frames. glibc makes malloc usable there.
    match unsafe { libc::fork() } {
        0 => {
            let said = catch_unwind(AssertUnwindSafe(body)).unwrap_or_else(|_| "panicked: see above".to_owned());
            // SAFETY: the pipe's end is ours, and written to once.
            let _ = unsafe { File::from_raw_fd(ends[1]) }.write_all(said.as_bytes());
            // SAFETY: ends this process without running anything of the parent's.
            unsafe { libc::_exit(0) }
        }
        child => {
            // SAFETY: two descriptors of our own, each given to one owner; this one closes the end of the child.
            let (mut from, to) = unsafe { (File::from_raw_fd(ends[0]), File::from_raw_fd(ends[1])) };
            drop(to);
            let until = Instant::now() + LIMIT;
            let mut status = 0;
            // SAFETY: our own child, and a place for its status.
            while unsafe { libc::waitpid(child, &raw mut status, libc::WNOHANG) } == 0 {
                if Instant::now() > until {
                    // SAFETY: our own child, not waited for yet.
                    unsafe { libc::kill(child, libc::SIGKILL) };
                    return Err("the child hangs".to_owned());
                }
                std::thread::sleep(Duration::from_millis(5));
            }
            let mut said = String::new();
            from.read_to_string(&mut said).map_err(|e| e.to_string())?;
            if status == 0 { Ok(said) } else { Err(format!("status {status:#x}: {said}")) }
        }
    }
}
