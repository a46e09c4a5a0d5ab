//! The body of a core's thread: turns, and when there is nothing to do, sleep without losing a wake-up.

use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::Core;
use super::lost::Trust;
use crate::units::Nanos;

/// What a core does when a turn finds nothing.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum PollMode {
    /// Never sleeps: the shortest latency, a whole processor.
    Busy,
    /// Spins for `spin`, then gives its processor to whoever wants it for sixty times as long, then sleeps on its
    /// doorbell and on armed completion queues.
    Adaptive {
        /// How long a core without work keeps polling.
        spin: Nanos,
    },
}

/// How long an adaptive core looks on between other threads, in spans of its spin. Waking a sleeper takes 55 us: a round
/// trip with a sleep in it is longer than that, so that both ends would sleep in every one. The spin itself is short, as
/// the thread that this one waits for may want this very processor: with 50 us of it, 64 bytes over TCP and back took
/// 110 us on two processors, with 5 us 20 us, and 1 us is no better. A yield to nobody takes 0.2 us.
const YIELDS: u64 = 60;

impl Default for PollMode {
    fn default() -> Self {
        Self::Adaptive { spin: Nanos::from_micros(5) }
    }
}

/// Longest sleep while requests are out on a NIC that has no event descriptor.
const BLIND_SLEEP: Nanos = Nanos::from_micros(50);
/// Longest sleep at all: a bound for every wait, whatever was missed.
const LONGEST_SLEEP: Nanos = Nanos::from_millis(500);

/// Turns `core` until it has stopped. The thread that calls it is the core's thread; `clock` is the engine's.
pub fn run(core: &mut Core, mode: PollMode, clock: &dyn Fn() -> Nanos) {
    let mut busy_at = clock();
    while !core.is_stopped() {
        let now = clock();
        if core.poll_once(now) > 0 {
            busy_at = now;
            continue;
        }
        match mode {
            PollMode::Adaptive { spin } if now.since(busy_at) >= Nanos(spin.0 * (1 + YIELDS)) => sleep(core, clock),
            PollMode::Adaptive { spin } if now.since(busy_at) >= spin => std::thread::yield_now(),
            _ => std::hint::spin_loop(),
        }
    }
}

/// Announce, look again, arm, look again, sleep: whatever is published before the announcement is seen by the first
/// look, whatever after it rings the doorbell; a completion before arming is seen by the second look.
fn sleep(core: &mut Core, clock: &dyn Fn() -> Nanos) {
    let inbox = core.inbox.clone();
    inbox.doorbell().prepare();
    let armed = core.arm();
    let now = clock();
    if !inbox.is_empty() || core.poll_once(now) > 0 {
        inbox.doorbell().finish();
        return;
    }
    let mut until = core.next_turn().since(now).min(LONGEST_SLEEP);
    if !armed && core.outstanding() > 0 {
        until = until.min(BLIND_SLEEP);
    }
    // Submitters choose the least loaded core: an idle one must not sleep on the load it had.
    core.publish();
    core.counters.sleeps.add(1);
    core.wait_for_events(&inbox, until.to_duration());
    inbox.doorbell().finish();
}

impl Core {
    /// Arms every completion queue; false if one of them can not be waited for.
    fn arm(&mut self) -> bool {
        self.trust != Trust::Blind
            && self.nics.iter_mut().all(|nic| nic.cq.event_fd().is_some() && nic.cq.arm().is_ok())
    }

    fn wait_for_events(&mut self, inbox: &super::Inbox, at_most: Duration) {
        // More NICs than this on one core are woken by the doorbell and the bound only.
        const NICS: usize = 15;
        let doorbell = inbox.doorbell().fd();
        let watched = if self.trust == Trust::Blind { 0 } else { self.nics.len() };
        let mut queues = self.nics.iter().take(watched.min(NICS)).filter_map(|nic| nic.cq.event_fd());
        // Unused places repeat the doorbell.
        let mut fds: [PollFd<'_>; NICS + 1] = std::array::from_fn(|place| {
            let fd = if place == 0 { doorbell } else { queues.next().unwrap_or(doorbell) };
            PollFd::from_borrowed_fd(fd, PollFlags::IN)
        });
        let timeout = Timespec { tv_sec: at_most.as_secs() as i64, tv_nsec: i64::from(at_most.subsec_nanos()) };
        // Interrupted or failed: the loop turns once more, which is all a wake-up does.
        let _ = poll(&mut fds, Some(&timeout));
        for index in 0..watched {
            let nic = &mut self.nics[index];
            if nic.cq.event_fd().is_some() && nic.cq.clear_events().is_err() {
                self.cq_lost(index);
            }
        }
    }
}
