//! Two engines in one process over a simulated network in real time: real threads, real control logic, no hardware.
#![allow(dead_code)] // each test binary uses a part

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use moonrail::{Engine, EngineBuilder, Gid, Nic, Region};
use moonrail_datapath::nic::sim::{SimNicId, SimOptions, SimWorld};

/// No wait of a test is longer.
pub(crate) const LONG: Duration = Duration::from_secs(20);

pub(crate) struct Pair {
    pub(crate) world: SimWorld,
    pub(crate) a: Engine,
    pub(crate) b: Engine,
    pub(crate) a_nics: Vec<SimNicId>,
    pub(crate) b_nics: Vec<SimNicId>,
    pub(crate) log: Arc<Mutex<Vec<String>>>,
}

pub(crate) fn cluster() -> String {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    format!("memory://test-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed))
}

pub(crate) fn nics(world: &SimWorld, node: u8, count: u8) -> (Vec<Arc<dyn Nic>>, Vec<SimNicId>) {
    let nic = |n| {
        let gid = Gid([0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 10, 0, n, node]);
        world.nic(&format!("node{node}"), &format!("sim{n}"), gid)
    };
    (0..count).map(nic).unzip()
}

/// A builder that takes nothing from the environment and keeps its log to itself.
pub(crate) fn builder(log: &Arc<Mutex<Vec<String>>>) -> EngineBuilder {
    let log = log.clone();
    Engine::builder()
        .environment(|_| None)
        .pin_cores(false)
        .log(move |level, line| log.lock().unwrap().push(format!("{level} {line}")))
}

pub(crate) fn pair(nics_each: u8, cores: usize, options: SimOptions) -> Pair {
    pair_with(nics_each, cores, options, |builder| builder)
}

pub(crate) fn pair_with(
    nics_each: u8,
    cores: usize,
    options: SimOptions,
    change: impl Fn(EngineBuilder) -> EngineBuilder,
) -> Pair {
    let world = SimWorld::real_time(7, options);
    let (log, uri) = (Arc::default(), cluster());
    let (a_open, a_nics) = nics(&world, 1, nics_each);
    let (b_open, b_nics) = nics(&world, 2, nics_each);
    let engine = |name, open| change(builder(&log).name(name).metadata(&uri).nics_from(open).cores(cores)).build();
    let a = engine("a", a_open).unwrap();
    let b = engine("b", b_open).unwrap();
    Pair { world, a, b, a_nics, b_nics, log }
}

impl Drop for Pair {
    fn drop(&mut self) {
        if std::thread::panicking() {
            for line in self.log.lock().unwrap_or_else(std::sync::PoisonError::into_inner).iter() {
                eprintln!("{line}");
            }
        }
    }
}

/// Bytes that depend on their place and on `seed`: nothing arrives right by accident.
pub(crate) fn fill(region: &Region, seed: u64) {
    let bytes: Vec<u8> = (0..region.len()).map(|at| pattern(at, seed)).collect();
    region.write(0, &bytes).unwrap();
}

pub(crate) fn pattern(at: u64, seed: u64) -> u8 {
    let mixed = (at ^ seed.rotate_left(17)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    (mixed >> 56) as u8
}

pub(crate) fn bytes(region: &Region, offset: u64, len: u64) -> Vec<u8> {
    let mut bytes = vec![0; len as usize];
    region.read(offset, &mut bytes).unwrap();
    bytes
}

/// Polls a future on this thread, parking in between.
pub(crate) fn block_on<F: Future + Unpin>(mut future: F) -> F::Output {
    use std::pin::Pin;
    use std::task::{Context, Poll, Wake, Waker};
    struct Unpark(std::thread::Thread);
    impl Wake for Unpark {
        fn wake(self: Arc<Self>) {
            self.0.unpark();
        }
    }
    let waker = Waker::from(Arc::new(Unpark(std::thread::current())));
    loop {
        if let Poll::Ready(output) = Pin::new(&mut future).poll(&mut Context::from_waker(&waker)) {
            return output;
        }
        std::thread::park_timeout(LONG);
    }
}
