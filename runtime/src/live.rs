//! Batches that exist: so that memory can leave although a finished batch still lies around, and so that an `.await` has
//! a bound.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError, Weak};
use std::time::{Duration, Instant};

use moonrail_datapath::work::Completion;

use crate::batch::Inner;

/// Submitting threads spread over this many lists.
const SHARDS: usize = 16;
/// A list is cleaned when it has grown to twice what was left last time, at least this.
const CLEAN_AT: usize = 64;
/// How long control may take to tell what it knows of the failure of one of many batches.
const PATIENCE: Duration = Duration::from_millis(20);

#[derive(Default)]
struct Shard {
    batches: Vec<Weak<Inner>>,
    clean_at: usize,
}

/// The batches of an engine.
#[derive(Default)]
pub(crate) struct Live {
    shards: [Mutex<Shard>; SHARDS],
}

/// Threads in the order of their first submission, so that few share a list.
pub(crate) fn shard_of_this_thread() -> usize {
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    thread_local!(static MINE: usize = NEXT.fetch_add(1, Ordering::Relaxed) % SHARDS);
    MINE.with(|mine| *mine)
}

impl Live {
    pub(crate) fn add(&self, batch: &Arc<Inner>) {
        let mut shard = self.shards[shard_of_this_thread()].lock().unwrap_or_else(PoisonError::into_inner);
        if shard.batches.len() >= shard.clean_at.max(CLEAN_AT) {
            shard.batches.retain(|batch| batch.strong_count() > 0);
            shard.clean_at = shard.batches.len() * 2;
        }
        shard.batches.push(Arc::downgrade(batch));
    }

    /// Makes every batch that is over let go of its memory. What control knows of failures is asked until `until`.
    pub(crate) fn retire_finished(&self, until: Instant) {
        for shard in &self.shards {
            let batches: Vec<_> = {
                let shard = shard.lock().unwrap_or_else(PoisonError::into_inner);
                shard.batches.iter().filter_map(Weak::upgrade).collect()
            };
            for batch in batches {
                batch.retire(until.saturating_duration_since(Instant::now()).min(PATIENCE));
            }
        }
    }
}

/// Wakes tasks at a point in time: one thread, started when it is first needed.
#[derive(Default)]
pub(crate) struct Watch {
    state: Mutex<WatchState>,
    changed: Condvar,
}

#[derive(Default)]
struct WatchState {
    at: BinaryHeap<Reverse<Timed>>,
    running: bool,
    stopped: bool,
}

struct Timed {
    at: Instant,
    completion: Weak<Completion>,
}

impl PartialEq for Timed {
    fn eq(&self, other: &Self) -> bool {
        self.at == other.at
    }
}
impl Eq for Timed {}
impl PartialOrd for Timed {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for Timed {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.at.cmp(&other.at)
    }
}

impl Watch {
    /// Wakes whoever waits for `completion`, at `at` or a little later, once, or at the stop. `false`: that is over.
    pub(crate) fn wake_at(self: &Arc<Self>, at: Instant, completion: &Arc<Completion>) -> bool {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if state.stopped {
            return false;
        }
        if state.at.len() >= CLEAN_AT && state.at.len() == state.at.capacity() {
            state.at.retain(|timed| timed.0.completion.strong_count() > 0);
        }
        state.at.push(Reverse(Timed { at, completion: Arc::downgrade(completion) }));
        if !state.running {
            let watch = self.clone();
            // Without a thread left in the system an `.await` is bounded by the batch's own deadline only.
            state.running = std::thread::Builder::new().name("mr-watch".into()).spawn(move || watch.run()).is_ok();
        }
        self.changed.notify_one();
        true
    }

    /// Whether nobody is woken any more.
    pub(crate) fn is_stopped(&self) -> bool {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).stopped
    }

    /// Ends the thread; everybody who waits is woken.
    pub(crate) fn stop(&self) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.stopped = true;
        for timed in state.at.drain() {
            if let Some(completion) = timed.0.completion.upgrade() {
                completion.wake();
            }
        }
        self.changed.notify_all();
    }

    fn run(&self) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        while !state.stopped {
            let now = Instant::now();
            let mut due = Vec::new();
            while state.at.peek().is_some_and(|timed| timed.0.at <= now) {
                due.extend(state.at.pop().and_then(|timed| timed.0.completion.upgrade()));
            }
            if !due.is_empty() {
                drop(state);
                for completion in due {
                    completion.wake();
                }
                state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
                continue;
            }
            let pause = state.at.peek().map_or(Duration::from_secs(3600), |timed| timed.0.at - now);
            state = self.changed.wait_timeout(state, pause).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicU32;
    use std::task::{Wake, Waker};

    struct Count(AtomicU32);
    impl Wake for Count {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    #[test]
    fn a_waiting_task_is_woken_at_its_bound_and_at_the_stop() {
        let watch = Arc::new(Watch::default());
        let (first, second) = (Completion::new(1), Completion::new(1));
        let count = Arc::new(Count(AtomicU32::new(0)));
        let waker = Waker::from(count.clone());
        first.register(&waker);
        second.register(&waker);
        let now = Instant::now();
        watch.wake_at(now + Duration::from_secs(1000), &second);
        watch.wake_at(now + Duration::from_millis(20), &first);
        while count.0.load(Ordering::Relaxed) == 0 {
            assert!(now.elapsed() < Duration::from_secs(10), "not woken");
            std::thread::sleep(Duration::from_millis(1));
        }
        assert!(now.elapsed() >= Duration::from_millis(20));
        watch.stop();
        assert_eq!(count.0.load(Ordering::Relaxed), 2);
    }
}
