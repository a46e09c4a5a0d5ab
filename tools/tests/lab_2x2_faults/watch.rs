//! Looks on: when each rail carried slices, by the counters that the engine shows to anybody.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use moonrail::Engine;

/// What a moment is known to.
const EVERY: Duration = Duration::from_millis(10);

/// A rail by its NICs, ours and the peer's.
pub(crate) type Rail = (String, String);

/// For each rail the moments at which more slices had arrived than before.
pub(crate) type Carried = BTreeMap<Rail, Vec<Instant>>;

pub(crate) struct Watch {
    carried: Arc<Mutex<Carried>>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Watch {
    pub(crate) fn start(engine: Arc<Engine>) -> Self {
        let carried = Arc::new(Mutex::new(Carried::new()));
        let stop = Arc::new(AtomicBool::new(false));
        let thread = std::thread::spawn({
            let (carried, stop) = (Arc::clone(&carried), Arc::clone(&stop));
            move || {
                let mut last: BTreeMap<Rail, u64> = BTreeMap::new();
                while !stop.load(Ordering::Relaxed) {
                    for rail in engine.rails() {
                        let name = (rail.nic, rail.peer_nic);
                        let before = last.insert(name.clone(), rail.bytes).unwrap_or(0);
                        if rail.bytes != before {
                            let now = Instant::now();
                            lock(&carried).entry(name).or_default().push(now);
                        }
                    }
                    std::thread::sleep(EVERY);
                }
            }
        });
        Self { carried, stop, thread: Some(thread) }
    }

    /// The first moment after `since` at which every rail of `rails` had carried something; `None` so far.
    pub(crate) fn all_after(&self, rails: &[Rail], since: Instant) -> Option<Instant> {
        let carried = lock(&self.carried);
        let first = |rail: &Rail| carried.get(rail)?.iter().find(|at| **at > since).copied();
        rails.iter().map(first).collect::<Option<Vec<_>>>()?.into_iter().max().or(Some(since))
    }

    /// The longest time in `from..to` in which none of `rails` carried anything.
    pub(crate) fn gap(&self, rails: &[Rail], from: Instant, to: Instant) -> Duration {
        let carried = lock(&self.carried);
        let moments = rails.iter().filter_map(|rail| carried.get(rail)).flatten().copied();
        longest(moments.collect(), from, to)
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn lock(carried: &Mutex<Carried>) -> std::sync::MutexGuard<'_, Carried> {
    carried.lock().unwrap_or_else(PoisonError::into_inner)
}

fn longest(mut moments: Vec<Instant>, from: Instant, to: Instant) -> Duration {
    moments.retain(|at| *at > from && *at < to);
    moments.sort_unstable();
    moments.push(to);
    let mut last = from;
    let mut longest = Duration::ZERO;
    for at in moments {
        longest = longest.max(at - last);
        last = at;
    }
    longest
}
