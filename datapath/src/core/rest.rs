//! Who turns a core: its own thread, or a caller that waits for it (leader and followers).
//!
//! ```text
//!               own thread                                callers
//!   turns      holds the core                            enqueue, and look on
//!     │ nothing to do, and a caller waits ──▶ naps       the caller that waits takes the core, turns it until its batch is
//!     │                                        │         over, and puts it back; the others follow: they enqueue and look on
//!     │ nothing to do for a while ───▶ sleeps ─┘         a caller that enqueues takes it for a turn or two, to post
//! ```
//! To hand a batch to another thread and to hear of its end costs two cache lines where a processor is free for that thread, and
//! two switches of threads where none is; the caller has nothing to do meanwhile. So a core that its own thread has nothing to do
//! with *rests*: whoever takes it out of its place owns it, and is its thread until it is put back. In
//! [`super::PollMode::Busy`] it never rests.
//!
//! Nothing is lost in between: whoever puts the core back looks at the rings afterwards, and whoever puts something into a ring
//! looks for the core afterwards. What a caller began and does not go on with is taken up by the core's own thread when it wakes:
//! it naps ([`NAP`]) while callers turn the core, and sleeps until something happens only when they no longer do.

#[cfg(test)]
mod explored;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering, fence};

use crossbeam_utils::CachePadded;
use crossbeam_utils::atomic::AtomicCell;

use super::run::{Pace, SPIN, Step};
use super::{Core, Inbox};
use crate::units::Nanos;

/// How long the core's own thread naps at first while callers turn the core. What a caller began and no caller goes on with is
/// left alone until it wakes, from this nap or from the next. Each costs some 5 us of a processor.
pub(super) const NAP: Nanos = Nanos::from_micros(100);
/// How long it naps when callers go on to turn the core. No longer than a core may go without a look at its deadlines.
pub(super) const LONG_NAP: Nanos = crate::limits::WATCH_PERIOD;
/// How long after it has served a peer a core is looked at every [`NAP`], whoever turns it: the peer waits.
pub(super) const SERVES: Nanos = Nanos::from_millis(100);

/// Where a core is while nobody turns it.
pub(super) struct Rest {
    /// A pointer: it is swapped in and out.
    core: CachePadded<AtomicCell<Option<Box<Core>>>>,
    /// Whether there is one: a look that takes the cache line from nobody.
    is_here: AtomicBool,
    /// The core's own thread is to take the core, whoever turned it meanwhile.
    called: AtomicBool,
    /// The core's own thread does not nap: it must hear that callers have begun to turn the core.
    pub(super) sleeps: AtomicBool,
    /// Callers that wait, and would take the core.
    wanted: CachePadded<AtomicU32>,
}

impl Rest {
    pub(super) fn new() -> Self {
        Self {
            core: CachePadded::new(AtomicCell::new(None)),
            is_here: AtomicBool::new(false),
            called: AtomicBool::new(false),
            sleeps: AtomicBool::new(false),
            wanted: CachePadded::new(AtomicU32::new(0)),
        }
    }

    pub(super) fn take(&self) -> Option<Box<Core>> {
        if !self.is_here.load(Ordering::Relaxed) {
            return None;
        }
        let core = self.core.take()?;
        // Nobody puts it back before we do.
        self.is_here.store(false, Ordering::Relaxed);
        Some(core)
    }

    /// The rings are to be looked at after this.
    pub(super) fn put(&self, core: Box<Core>) {
        self.core.store(Some(core));
        self.is_here.store(true, Ordering::Relaxed);
        // Pairs with the fence of those who enqueue: either they find the core, or we see what they have enqueued.
        fence(Ordering::SeqCst);
    }

    pub(super) fn is_wanted(&self) -> bool {
        self.wanted.load(Ordering::Relaxed) > 0
    }

    fn is_called(&self) -> bool {
        self.called.load(Ordering::Relaxed)
    }

    /// Whether the core's own thread was called. To be asked by that thread when it has the core, with which it goes on then.
    pub(super) fn answers(&self) -> bool {
        self.is_called() && self.called.swap(false, Ordering::Relaxed)
    }
}

/// How [`Inbox::lead`] has ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Led {
    /// Somebody else has the core, or it is over.
    Follow,
    /// What was waited for is over, or the time is up.
    Over,
    /// Nothing has happened for a while: the core's own thread has the core now, and sleep is in order.
    Quiet,
}

/// A caller that waits for a core. While there is one, the core's own thread leaves an idle core to it.
pub struct Wanting<'a>(&'a Rest);

impl Drop for Wanting<'_> {
    fn drop(&mut self) {
        self.0.wanted.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Inbox {
    /// Wakes the core's own thread, and makes it turn the core even if callers do: for those who will not turn it themselves. What
    /// it has to see must be published before.
    pub fn call(&self) {
        self.rest.called.store(true, Ordering::Relaxed);
        self.doorbell().ring();
    }

    /// Says that the calling thread would turn the core, for as long as the result lives.
    pub fn want(&self) -> Wanting<'_> {
        self.rest.wanted.fetch_add(1, Ordering::Relaxed);
        Wanting(&self.rest)
    }

    /// Turns the core on this thread, if nobody else does: until `is_over`, or the time is up, or nothing has happened for a
    /// while. Any thread that is not a core's. It is `now` on the engine's `clock`, which is looked at before each turn but the
    /// first.
    pub fn lead(
        &self,
        mut now: Nanos,
        until: Nanos,
        clock: &dyn Fn() -> Nanos,
        is_over: &mut dyn FnMut() -> bool,
    ) -> Led {
        let Some(mut core) = self.take_to_lead() else { return Led::Follow };
        let mut pace = Pace::new(now);
        loop {
            let Ok(work) = core.turn(now) else {
                self.give_up(core);
                return Led::Follow;
            };
            core.counters.led_turns.add(1);
            if core.is_stopped() {
                self.give_up(core);
                return Led::Follow;
            }
            if is_over() || now >= until {
                self.release(core);
                return Led::Over;
            }
            match pace.step(work, now, SPIN) {
                Step::Sleep => {
                    self.give_up(core);
                    return Led::Quiet;
                }
                step => step.wait(),
            }
            now = clock();
        }
    }

    /// Turns the core on this thread, if nobody else does and its own thread does not either: once, and once more if that did
    /// something, as a NIC that is a program sends what was posted when it is polled. To be called after something was enqueued
    /// without a ring of the doorbell, and by those who look whether it is done. Any thread that is not a core's.
    pub fn attend(&self, clock: &dyn Fn() -> Nanos) {
        // Pairs with those in `Doorbell::prepare` and `Rest::put`.
        fence(Ordering::SeqCst);
        if !self.doorbell().has_sleeper() {
            return;
        }
        // Who has it looks at the rings after putting it back.
        let Some(mut core) = self.take_to_lead() else { return };
        let now = clock();
        for _ in 0..2 {
            let Ok(work) = core.turn(now) else { return self.give_up(core) };
            core.counters.led_turns.add(1);
            if work == 0 || core.is_stopped() {
                break;
            }
        }
        self.release(core);
    }

    fn take_to_lead(&self) -> Option<Box<Core>> {
        let mut core = self.rest.take()?;
        if core.may_be_led() {
            core.led = true;
            return Some(core);
        }
        // Its own thread sees to it, and need not be woken for that by everybody who looks.
        self.rest.put(core);
        if self.needs_a_turn() {
            self.doorbell().ring();
        }
        None
    }

    /// Whether the core is to be turned at once, or by its own thread. To be asked after it was put to rest: who found it in other
    /// hands, or the doorbell without a sleeper, does nothing more.
    pub(super) fn needs_a_turn(&self) -> bool {
        !self.is_empty() || self.rest.is_called()
    }

    /// Puts the core back. Its own thread is woken where something has come meanwhile, and where it sleeps for as long as the core
    /// could be left alone as it was before.
    fn release(&self, mut core: Box<Core>) {
        core.led = false;
        self.rest.put(core);
        if self.needs_a_turn() || self.rest.sleeps.load(Ordering::Relaxed) {
            self.doorbell().ring();
        }
    }

    /// Leaves the core to its own thread.
    fn give_up(&self, mut core: Box<Core>) {
        core.led = false;
        self.rest.put(core);
        self.call();
    }
}

/// A turn has panicked.
#[derive(PartialEq, Eq)]
pub(super) struct Panicked;

impl Core {
    /// One turn, of which a panic is no end of the thread. Threads that turn it one after the other look at the clock before they
    /// take it, so that their `now` may go back; that of [`Core::poll_once`] does not.
    pub(super) fn turn(&mut self, now: Nanos) -> Result<usize, Panicked> {
        self.turned = self.turned.max(now);
        self.guarded(|core| core.poll_once(core.turned))
    }

    pub(super) fn guarded<T>(&mut self, step: impl FnOnce(&mut Self) -> T) -> Result<T, Panicked> {
        catch_unwind(AssertUnwindSafe(|| step(self))).map_err(|_| {
            self.panicked = true;
            Panicked
        })
    }

    pub(super) fn may_be_led(&self) -> bool {
        !self.stopped && !self.panicked && self.trust == super::lost::Trust::Whole
    }
}
