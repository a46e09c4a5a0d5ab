//! A forked child and its parent's engine: every call says so, nothing of the parent's is touched, and the parent goes on.
#![allow(unsafe_code)] // forks as an embedder may, and drops in the child what the parent keeps

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::os::fd::FromRawFd as _;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use moonrail::error::{RegisterError, SegmentError, SubmitError, UnregisterError};
use moonrail::{
    Batch, BatchStatus, Engine, Fabric, Memory, NotifyError, Quiescence, Region, Segment, Transfer, WaitError,
};

const LONG: Duration = Duration::from_secs(20);

fn engine(fabric: Fabric) -> Engine {
    let builder = Engine::builder().environment(|_| None).name("127.0.0.1").cores(1).pin_cores(false);
    builder.fabrics([fabric]).log(|_, _| {}).build().unwrap()
}

/// Runs `body` in a forked child and returns what it says; an error if it does not end.
fn in_child(body: impl FnOnce() -> String) -> Result<String, String> {
    let mut ends = [0; 2];
    // SAFETY: room for two descriptors.
    assert_eq!(unsafe { libc::pipe(ends.as_mut_ptr()) }, 0);
    // SAFETY: the child runs `body` and ends without unwinding into the parent's frames. glibc makes malloc usable there.
    match unsafe { libc::fork() } {
        0 => {
            let said = catch_unwind(AssertUnwindSafe(body)).unwrap_or_else(|cause| {
                let text = cause.downcast_ref::<String>().cloned();
                format!(
                    "panicked: {}",
                    text.or_else(|| cause.downcast_ref::<&str>().map(|t| (*t).into())).unwrap_or_default()
                )
            });
            // SAFETY: the pipe's end is ours, and written to once.
            let _ = unsafe { File::from_raw_fd(ends[1]) }.write_all(said.as_bytes());
            // SAFETY: ends this process without running anything of the parent's.
            unsafe { libc::_exit(0) }
        }
        child => {
            // SAFETY: two descriptors of our own, each given to one owner; this one closes the end of the child.
            let (mut from, to) = unsafe { (File::from_raw_fd(ends[0]), File::from_raw_fd(ends[1])) };
            drop(to);
            let until = Instant::now() + LONG;
            let mut status = 0;
            // SAFETY: our own child, and a place for its status.
            while unsafe { libc::waitpid(child, &raw mut status, libc::WNOHANG) } == 0 {
                if Instant::now() > until {
                    // SAFETY: our own child, not waited for yet.
                    unsafe { libc::kill(child, libc::SIGKILL) };
                    return Err("the child hangs".to_owned());
                }
                std::thread::sleep(Duration::from_millis(2));
            }
            let mut said = String::new();
            from.read_to_string(&mut said).unwrap();
            if status == 0 { Ok(said) } else { Err(format!("status {status:#x}: {said}")) }
        }
    }
}

/// What a program has of an engine.
struct Held {
    engine: Arc<Engine>,
    far: Segment,
    region: Region,
    heap: Arc<Memory>,
    flying: Batch,
    done: Batch,
}

impl Held {
    /// Every call there is; each ends at once, with an error where it has one.
    fn call_everything(&self) {
        let Self { engine, far, region, heap, flying, done } = self;
        let transfer = Transfer::write_from(region, 0, 4096, 8);
        assert!(matches!(engine.allocate(4096, "*"), Err(RegisterError::Forked)));
        assert!(matches!(engine.register(heap, "*", true), Err(RegisterError::Forked)));
        assert!(matches!(engine.unregister(region), Err(UnregisterError::Forked)));
        assert!(matches!(engine.unregister_at(region.addr()), Err(UnregisterError::Forked)));
        assert!(matches!(engine.open_segment("127.0.0.1:1"), Err(SegmentError::Forked)));
        assert!(matches!(engine.submit(far, &[transfer]), Err(SubmitError::Forked)));
        assert!(matches!(engine.batch().add(far, transfer).submit(), Err(SubmitError::Forked)));
        assert!(matches!(engine.notify(far, "a", "b"), Err(NotifyError::Forked)));
        assert!(engine.notifications().is_empty() && engine.rails().is_empty() && engine.incidents().is_empty());
        assert!(engine.regions().is_empty() && engine.ways(far.name()).is_empty());
        assert!(engine.explain(far.name()).is_empty());
        assert!(!engine.shutdown(LONG));
        let _ = (engine.name(), engine.rpc_addr(), engine.nics(), engine.counters(), engine.uptime());
        assert!(matches!(far.refresh(), Err(SegmentError::Forked)));
        assert!(matches!(far.probe(LONG), Err(NotifyError::Forked)));
        assert!(far.buffers().is_empty() && far.fabric().is_none() && far.ready_cores() == 0);
        let error = region.write(0, b"x").unwrap_err();
        assert!(error.to_string().contains("forked child"), "{error}");
        assert!(region.read(0, &mut [0; 4]).is_err());
        assert!(matches!(flying.wait(LONG), Err(WaitError::Forked)));
        assert_eq!((flying.poll(), flying.quiescence()), (BatchStatus::Failed, Quiescence::Quarantined));
        assert!(flying.transfer(0).is_some() && flying.first_error().is_none() && flying.bytes() == 0);
        flying.cancel();
        assert_eq!(done.poll(), BatchStatus::Done, "seen before");
    }
}

/// What the parent does meanwhile, and how it goes.
#[derive(Default)]
struct Meanwhile {
    stop: AtomicBool,
    done: AtomicU64,
    failed: AtomicU64,
}

fn a_child_gets_errors_and_the_parent_goes_on(fabric: Fabric) {
    let (a, b) = (Arc::new(engine(fabric)), engine(fabric));
    let (near, remote) = (a.allocate(8 << 20, "*").unwrap(), b.allocate(8 << 20, "*").unwrap());
    let far = a.open_segment(b.name()).unwrap();
    let loop_region = a.allocate(1 << 20, "*").unwrap();
    let meanwhile = Arc::new(Meanwhile::default());
    let traffic = std::thread::spawn({
        let (a, far, meanwhile, at) = (a.clone(), far.clone(), meanwhile.clone(), remote.addr());
        move || {
            while !meanwhile.stop.load(Ordering::Relaxed) {
                let round = meanwhile.done.load(Ordering::Relaxed);
                loop_region.write(0, &round.to_ne_bytes()).unwrap();
                let there = Transfer::write_from(&loop_region, 0, at, 1 << 19);
                let back = Transfer::read_into(&loop_region, 1 << 19, at, 1 << 19);
                let moved = a.submit(&far, &[there]).is_ok_and(|batch| batch.wait(LONG).is_ok())
                    && a.submit(&far, &[back]).is_ok_and(|batch| batch.wait(LONG).is_ok());
                let mut seen = [0; 8];
                loop_region.read(1 << 19, &mut seen).unwrap();
                if moved && u64::from_ne_bytes(seen) == round {
                    meanwhile.done.fetch_add(1, Ordering::Relaxed);
                } else {
                    meanwhile.failed.fetch_add(1, Ordering::Relaxed);
                }
            }
        }
    });
    let done = a.submit(&far, &[Transfer::write_from(&near, 0, remote.addr() + (4 << 20), 4096)]).unwrap();
    done.wait(LONG).unwrap();
    assert_eq!(done.poll(), BatchStatus::Done);
    // Something is in flight at each fork, and lives on in the parent.
    for round in 0..6 {
        let flying = a.submit(&far, &[Transfer::write_from(&near, 0, remote.addr() + (4 << 20), 4 << 20)]).unwrap();
        // Memory of the program's own, never touched here.
        let heap = Box::leak(vec![0u8; 4096].into_boxed_slice());
        // SAFETY: leaked, so it stays mapped; nobody else has it.
        let heap = unsafe { Memory::borrow(std::ptr::NonNull::from(heap).cast(), 4096) };
        let far_again = a.open_segment(b.name()).unwrap();
        // SAFETY: a copy of each handle for the child alone, which drops them and ends with _exit: the parent never touches them.
        let copy = unsafe { std::ptr::read(&raw const flying) };
        // SAFETY: as above.
        let copy_done = unsafe { std::ptr::read(&raw const done) };
        let held = std::mem::ManuallyDrop::new(Held {
            engine: a.clone(),
            far: far_again,
            region: near.clone(),
            heap,
            flying: copy,
            done: copy_done,
        });
        let said = in_child(|| {
            held.call_everything();
            // SAFETY: as above: this process's only use of it from here on.
            let Held { engine, mut flying, done, .. } = unsafe { std::ptr::read(&raw const *held) };
            let polled = Pin::new(&mut flying).poll(&mut Context::from_waker(Waker::noop()));
            assert!(matches!(polled, Poll::Ready(Err(WaitError::Forked))));
            drop((flying, done));
            // SAFETY: the engine itself, whatever other handles there are: as if this were the last.
            drop(unsafe { std::ptr::read(Arc::as_ptr(&engine)) });
            drop(engine);
            if round % 3 == 2 {
                let own = engine_of_the_child(fabric, &b_name(&far));
                return format!("fine, {own}");
            }
            "fine".to_owned()
        });
        // The parent's copies of the copies go without running anything.
        let said = said.unwrap_or_else(|error| panic!("{fabric} {round}: {error}"));
        assert!(said.starts_with("fine"), "{fabric} {round}: {said}");
        flying.wait(LONG).unwrap();
    }
    let before = meanwhile.done.load(Ordering::Relaxed);
    let until = Instant::now() + LONG;
    while meanwhile.done.load(Ordering::Relaxed) < before + 10 {
        assert!(Instant::now() < until, "the parent's transfers stand still");
        std::thread::sleep(Duration::from_millis(5));
    }
    meanwhile.stop.store(true, Ordering::Relaxed);
    traffic.join().unwrap();
    let (moved, failed) = (meanwhile.done.load(Ordering::Relaxed), meanwhile.failed.load(Ordering::Relaxed));
    println!("{fabric}: {moved} round trips beside six children, {failed} failed");
    assert_eq!(failed, 0);
    assert!(a.incidents().is_empty(), "{:?}", a.incidents());
    drop((far, done));
    // The child's references to the engine were never counted here; those that were made for it are.
    for _ in 0..6 {
        // SAFETY: six clones went into values that are never dropped in this process.
        unsafe { Arc::decrement_strong_count(Arc::as_ptr(&a)) };
    }
    assert_eq!(Arc::strong_count(&a), 1);
    a.unregister(&near).unwrap();
    assert!(Arc::into_inner(a).unwrap().shutdown(LONG) && b.shutdown(LONG));
}

fn b_name(far: &Segment) -> String {
    far.name().to_owned()
}

/// A child may have an engine of its own, which reaches the parent's like any other.
fn engine_of_the_child(fabric: Fabric, peer: &str) -> String {
    let own = engine(fabric);
    let region = own.allocate(1 << 20, "*").unwrap();
    let far = own.open_segment(peer).unwrap();
    let at = far.buffers()[0].addr + (1 << 20);
    own.submit(&far, &[Transfer::write_from(&region, 0, at, 1 << 19)]).unwrap().wait(LONG).unwrap();
    drop(far);
    assert!(own.shutdown(LONG));
    "and its own engine moved bytes".to_owned()
}

#[test]
fn over_shared_memory() {
    a_child_gets_errors_and_the_parent_goes_on(Fabric::Shm);
}

#[test]
fn over_tcp() {
    a_child_gets_errors_and_the_parent_goes_on(Fabric::Tcp);
}
