//! What a core counts. Each cell has one writer, the core; anybody may read at any time without disturbing it.

use std::sync::atomic::{AtomicU64, Ordering};

use super::times::Times;

/// A counter with a single writer: a load and a store instead of a locked add.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Counts `n` more. The writer's thread only.
    #[inline]
    pub fn add(&self, n: u64) {
        self.0.store(self.0.load(Ordering::Relaxed) + n, Ordering::Relaxed);
    }

    pub(crate) fn set(&self, n: u64) {
        self.0.store(n, Ordering::Relaxed);
    }

    /// The value now.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

macro_rules! counters {
    (
        $(#[$doc:meta])* $name:ident { $($(#[$field_doc:meta])* $field:ident),* $(,)? }
        $(times { $($(#[$times_doc:meta])* $times:ident),* $(,)? })?
    ) => {
        $(#[$doc])*
        #[derive(Debug, Default)]
        #[repr(align(128))]
        pub struct $name {
            $($(#[$field_doc])* pub $field: Counter,)*
            $($($(#[$times_doc])* pub $times: Times,)*)?
        }
        impl $name {
            /// Every counter with its name, for tables and metrics.
            pub fn list(&self) -> Vec<(&'static str, u64)> {
                vec![$((stringify!($field), self.$field.get())),*]
            }
        }
    };
}

counters! {
    /// Counters of one core.
    CoreCounters {
        /// Turns that did something.
        busy_turns,
        /// Turns that found nothing to do.
        idle_turns,
        /// Turns, among both, that callers made: see [`super::Inbox::lead`].
        led_turns,
        /// Times the core went to sleep.
        sleeps,
        /// Work requests the devices accepted, trials included.
        work_requests,
        /// Calls of the devices' post function: one doorbell each.
        doorbells,
        /// Completions reaped, good and bad.
        completions,
        /// Slices whose bytes are in place.
        slices_done,
        /// Slices that ended without their bytes.
        slices_failed,
        /// Slices given back for another rail or another try.
        slices_returned,
        /// Bytes in place.
        bytes_done,
        /// First errors of rails.
        first_errors,
        /// First errors that no device reported: queue pairs that fell silent.
        stalls,
        /// Queue pairs given up for a cancelled batch.
        given_up,
        /// Completions that were only echoes of a first error.
        flushes,
        /// Requests a device refused to take (`bad_wr`).
        refused,
        /// Works that became terminal here.
        works_finished,
    }
}

counters! {
    /// Counters of one rail, over all its lives.
    RailCounters {
        /// Work requests accepted by the device, trials included.
        work_requests,
        /// Doorbells rung.
        doorbells,
        /// Completions reaped.
        completions,
        /// Bytes in place.
        bytes,
        /// Slices in place.
        slices,
        /// First errors.
        first_errors,
        /// Echoes of first errors.
        flushes,
        /// When it last posted a slice, in nanoseconds on the engine's clock; 0: never.
        used_ns,
        /// In-flight cap in bytes, now.
        cap_bytes,
        /// Shortest round trip seen lately on a nearly empty rail, in nanoseconds.
        round_trip_ns,
        /// Bytes of the work requests accepted.
        posted_bytes,
        /// Work requests that have ended, however. Those accepted and not ended are in flight.
        ended,
        /// Bytes of the work requests that have ended.
        ended_bytes,
        /// Slices that came back without their bytes, for another rail or another try, or to end.
        returned,
    }
    times {
        /// From the submission of a slice to the turn that posted it: nothing, where that had begun already. A slice that was
        /// posted twice counts twice.
        queue,
        /// From being posted to being known to be in place. Requests that asked for no completion are known with the next
        /// one that did.
        wire,
    }
}
