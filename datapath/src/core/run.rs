//! The body of a core's thread: turns, and when there is nothing to do, sleep without losing a wake-up.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::lost::{Panics, Remains, Trust};
use super::rest::{LONG_NAP, NAP, Panicked, SERVES};
use super::{Core, CoreCounters, Doorbell, Inbox};
use crate::units::Nanos;

/// What a core does when a turn finds nothing.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum PollMode {
    /// Never sleeps, and is never left to a caller that waits: a whole processor.
    Busy,
    /// Leaves the core to a caller that waits ([`super::rest`]). Without one: spins for `spin`, then gives its processor to
    /// whoever wants it for sixty times as long, then sleeps on its doorbell and on armed completion queues.
    Adaptive {
        /// How long a core without work keeps polling.
        spin: Nanos,
    },
}

/// How long whoever turns a core keeps his processor without anything to do.
pub(super) const SPIN: Nanos = Nanos::from_micros(5);
/// How long an adaptive core looks on between other threads, in spans of its spin. Waking a sleeper takes 55 us: a round
/// trip with a sleep in it is longer than that, so that both ends would sleep in every one. The spin itself is short, as
/// the thread that this one waits for may want this very processor: with 50 us of it, 64 bytes over TCP and back took
/// 110 us on two processors, with 5 us 20 us, and 1 us is no better. A yield to nobody takes 0.2 us.
const YIELDS: u64 = 60;

impl Default for PollMode {
    fn default() -> Self {
        Self::Adaptive { spin: SPIN }
    }
}

/// Longest sleep while requests are out on a NIC that has no event descriptor.
const BLIND_SLEEP: Nanos = Nanos::from_micros(50);
/// Longest sleep at all: a bound for every wait, whatever was missed.
const LONGEST_SLEEP: Nanos = Nanos::from_millis(500);

/// How whoever turns a core waits for the next thing to do.
pub(super) struct Pace {
    busy_at: Nanos,
}

/// What to do after a turn.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Step {
    Turn,
    Spin,
    Yield,
    Sleep,
}

impl Pace {
    pub(super) fn new(now: Nanos) -> Self {
        Self { busy_at: now }
    }

    /// After a turn at `now` that did so much `work`.
    pub(super) fn step(&mut self, work: usize, now: Nanos, spin: Nanos) -> Step {
        if work > 0 {
            self.busy_at = now;
            return Step::Turn;
        }
        let idle = now.since(self.busy_at);
        if idle >= Nanos(spin.0 * (1 + YIELDS)) {
            Step::Sleep
        } else if idle >= spin {
            Step::Yield
        } else {
            Step::Spin
        }
    }
}

impl Step {
    /// Does it, as far as one who keeps the core can.
    pub(super) fn wait(self) {
        match self {
            Self::Turn => {}
            Self::Spin => std::hint::spin_loop(),
            Self::Yield | Self::Sleep => std::thread::yield_now(),
        }
    }
}

/// Turns `core` until it has stopped, and gives it back. The thread that calls it is the core's own; callers that wait take the
/// core out of its inbox meanwhile. `clock` is the engine's. A panic is told to `told`, and does not leave those who wait without
/// an answer.
pub fn run(mut core: Box<Core>, mode: PollMode, clock: &dyn Fn() -> Nanos, told: &dyn Fn(Remains)) -> Box<Core> {
    let own = OwnThread { inbox: core.inbox.clone(), counters: core.counters.clone(), queues: core.event_fds(), clock };
    let mut panics = Panics::default();
    let mut pace = Pace::new(clock());
    while !core.is_stopped() {
        let now = clock();
        let turned = if core.panicked { Err(Panicked) } else { core.turn(now) };
        let Ok(work) = turned else {
            if !panics.lose(&mut core, clock, told) {
                break;
            }
            continue;
        };
        let PollMode::Adaptive { spin } = mode else {
            if work == 0 {
                std::hint::spin_loop();
            }
            continue;
        };
        core = match pace.step(work, now, spin) {
            Step::Turn => core,
            Step::Sleep => own.sleep(core),
            _ if own.inbox.rest.is_wanted() && core.may_be_led() => own.nap(Some(core)),
            step => {
                step.wait();
                core
            }
        };
    }
    core
}

/// The core's own thread, while it does not turn the core.
struct OwnThread<'a> {
    inbox: Arc<Inbox>,
    counters: Arc<CoreCounters>,
    /// Of each NIC that can be waited for: its own copy, as the core may be elsewhere.
    queues: Vec<OwnedFd>,
    clock: &'a dyn Fn() -> Nanos,
}

impl OwnThread<'_> {
    /// Leaves the core to callers that wait, for as long as they turn it. `None`: a caller has it already.
    fn nap(&self, mut core: Option<Box<Core>>) -> Box<Core> {
        let (rest, doorbell) = (&self.inbox.rest, self.inbox.doorbell());
        let mut span = NAP;
        loop {
            let led = self.counters.led_turns.get();
            doorbell.prepare();
            // Who put the core back before this has not rung for what came since.
            let mut rung = false;
            if let Some(core) = core.take().or_else(|| rest.take()) {
                rest.put(core);
                rung = self.inbox.needs_a_turn();
            }
            rung = rung || wait_for(doorbell, &[], span.to_duration());
            doorbell.finish();
            span = Nanos(2 * span.0).min(LONG_NAP);
            let Some(mut rested) = rest.take() else { continue };
            if rest.answers() || rung || self.counters.led_turns.get() == led || !rested.may_be_led() {
                return rested;
            }
            let serves = rested.served.is_some_and(|at| rested.turned.since(at) < SERVES);
            // What callers have begun, and none waits for, goes on, and no peer waits for callers to come back.
            if serves || rested.works() > 0 && !rest.is_wanted() {
                match rested.turn((self.clock)()) {
                    Ok(work) if work == 0 || !serves => span = NAP,
                    _ => return rested,
                }
            }
            core = Some(rested);
        }
    }

    /// Announce, look again, arm, look again, put the core to rest, look again, sleep: whatever is published before the
    /// announcement is seen by the first look; whatever after it rings the doorbell, or is taken care of by who published it; a
    /// completion before arming is seen by the second look.
    fn sleep(&self, mut core: Box<Core>) -> Box<Core> {
        let (rest, doorbell) = (&self.inbox.rest, self.inbox.doorbell());
        doorbell.prepare();
        let armed = core.guarded(Core::arm).map(|armed| armed && core.nics.len() == self.queues.len());
        let now = (self.clock)();
        let turned = if self.inbox.is_empty() { core.turn(now) } else { Ok(1) };
        let (Ok(armed), Ok(0)) = (armed, turned) else {
            doorbell.finish();
            return core;
        };
        let mut until = core.next_turn().since(now).min(LONGEST_SLEEP);
        if !armed && core.outstanding() > 0 {
            until = until.min(BLIND_SLEEP);
        }
        // Submitters choose the least loaded core: an idle one must not sleep on the load it had.
        core.publish();
        core.counters.sleeps.add(1);
        let queues = if core.trust == Trust::Blind { &[] } else { self.queues.as_slice() };
        let led = self.counters.led_turns.get();
        rest.sleeps.store(true, Ordering::Relaxed);
        rest.put(core);
        if !self.inbox.needs_a_turn() {
            wait_for(doorbell, queues, until.to_duration());
        }
        rest.sleeps.store(false, Ordering::Relaxed);
        doorbell.finish();
        let Some(mut core) = rest.take() else { return self.nap(None) };
        // A panic in there is met by `run`, which looks for it first.
        let _ = core.guarded(Core::clear_events);
        if rest.answers() || self.counters.led_turns.get() == led { core } else { self.nap(Some(core)) }
    }
}

/// Sleeps until `doorbell` is rung, one of `queues` has something or `at_most` has passed; whether something has happened.
fn wait_for(doorbell: &Doorbell, queues: &[OwnedFd], at_most: Duration) -> bool {
    // More NICs than this on one core are woken by the doorbell and the bound only.
    const NICS: usize = 15;
    let mut queues = queues.iter().take(NICS);
    // Unused places repeat the doorbell.
    let mut fds: [PollFd<'_>; NICS + 1] = std::array::from_fn(|place| {
        let queue = if place == 0 { None } else { queues.next() };
        PollFd::from_borrowed_fd(queue.map_or(doorbell.fd(), AsFd::as_fd), PollFlags::IN)
    });
    let timeout = Timespec { tv_sec: at_most.as_secs() as i64, tv_nsec: i64::from(at_most.subsec_nanos()) };
    // Interrupted or failed: the loop turns once more, which is all a wake-up does.
    poll(&mut fds, Some(&timeout)) != Ok(0)
}

impl Core {
    /// Copies of the descriptors of its completion queues. Without descriptors left in the process a queue is not waited for, and
    /// looked at as often as one that has none.
    fn event_fds(&self) -> Vec<OwnedFd> {
        self.nics.iter().filter_map(|nic| nic.cq.event_fd()?.try_clone_to_owned().ok()).collect()
    }

    /// Arms every completion queue; false if one of them can not be waited for.
    fn arm(&mut self) -> bool {
        self.trust != Trust::Blind
            && self.nics.iter_mut().all(|nic| nic.cq.event_fd().is_some() && nic.cq.arm().is_ok())
    }

    fn clear_events(&mut self) {
        let watched = if self.trust == Trust::Blind { 0 } else { self.nics.len() };
        for index in 0..watched {
            let nic = &mut self.nics[index];
            if nic.cq.event_fd().is_some() && nic.cq.clear_events().is_err() {
                self.cq_lost(index);
            }
        }
    }
}
