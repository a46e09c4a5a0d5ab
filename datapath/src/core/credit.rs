//! How much a rail may have in flight: near what bandwidth × delay needs, not what the queue could hold.
//!
//! A small transfer then waits behind a round trip's worth of bytes at most. The delay is a windowed minimum of round
//! trips that started on a nearly empty rail; taken from a full one it would count the rail's own queue and feed on it.

use crate::limits::{CAP_CEILING, CAP_FLOOR};
use crate::units::Nanos;

/// Rates and round trips older than two of these are forgotten.
const WINDOW: Nanos = Nanos::from_millis(100);
/// Bytes completed in this span make one sample of the rate.
const RATE_SPAN: Nanos = Nanos::from_millis(2);

/// The in-flight cap of one rail.
#[derive(Debug)]
pub(crate) struct Credit {
    cap: u64,
    in_flight: u64,
    round_trip: Windowed,
    rate: Windowed,
    span_start: Nanos,
    span_bytes: u64,
    /// Bytes have arrived, not only a trial.
    carried: bool,
}

/// Best value of this window and of the one before.
#[derive(Debug)]
struct Windowed {
    start: Nanos,
    current: Option<u64>,
    previous: Option<u64>,
    better: fn(u64, u64) -> u64,
}

impl Windowed {
    fn new(better: fn(u64, u64) -> u64) -> Self {
        Self { start: Nanos::ZERO, current: None, previous: None, better }
    }

    fn sample(&mut self, value: u64, now: Nanos) {
        if now.since(self.start) > WINDOW {
            (self.previous, self.current, self.start) = (self.current, None, now);
        }
        self.current = Some(self.current.map_or(value, |best| (self.better)(best, value)));
    }

    fn get(&self) -> Option<u64> {
        match (self.current, self.previous) {
            (Some(a), Some(b)) => Some((self.better)(a, b)),
            (a, b) => a.or(b),
        }
    }
}

impl Credit {
    pub(crate) fn new() -> Self {
        Self {
            cap: CAP_FLOOR,
            in_flight: 0,
            round_trip: Windowed::new(u64::min),
            rate: Windowed::new(u64::max),
            span_start: Nanos::ZERO,
            span_bytes: 0,
            carried: false,
        }
    }

    /// Bytes that may be posted now. A quarter of the cap at least, or nothing, unless the rail is nearly empty:
    /// credit spent as it trickles in would ring a doorbell for each slice.
    pub(crate) fn free(&self) -> u64 {
        let free = self.cap.saturating_sub(self.in_flight);
        if free >= self.cap / 4 || self.is_nearly_empty() { free } else { 0 }
    }

    /// Bytes that small transfers may have posted now: a quarter of the cap beyond it, as it comes. They are few, and somebody waits
    /// for each.
    pub(crate) fn free_for_small(&self) -> u64 {
        (self.cap + self.cap / 4).saturating_sub(self.in_flight)
    }

    /// How long what is in flight takes, in nanoseconds, as far as the rail's speed is known.
    pub(crate) fn drains_in(&self) -> u64 {
        let nanos = |rate: u64| u128::from(self.in_flight) * 1_000_000_000 / u128::from(rate.max(1));
        self.rate.get().map_or(self.in_flight, |rate| u64::try_from(nanos(rate)).unwrap_or(u64::MAX))
    }

    pub(crate) fn cap(&self) -> u64 {
        self.cap
    }

    pub(crate) fn in_flight(&self) -> u64 {
        self.in_flight
    }

    pub(crate) fn round_trip(&self) -> Option<u64> {
        self.round_trip.get()
    }

    /// The round trip, where there is reason to wait for it: a trial may have been held up, so until bytes have arrived nobody
    /// knows whether the path is that slow.
    pub(crate) fn carried_round_trip(&self) -> Option<u64> {
        self.round_trip().filter(|_| self.carried)
    }

    /// Whether what is posted now meets no queue of our own.
    pub(crate) fn is_nearly_empty(&self) -> bool {
        self.in_flight <= self.cap / 16
    }

    /// Bytes were posted.
    pub(crate) fn spend(&mut self, bytes: u64) {
        self.in_flight += bytes;
    }

    /// Requests of so many bytes ended, however: they are no longer in flight.
    pub(crate) fn give_back(&mut self, bytes: u64) {
        debug_assert!(self.in_flight >= bytes, "credit returns once");
        self.in_flight = self.in_flight.saturating_sub(bytes);
    }

    /// A request came back after `span`. That is a round trip where it was posted on a nearly empty rail (`alone`); on a
    /// full one it counts our own queue too, and only a shorter one than is known says something.
    pub(crate) fn note_round_trip(&mut self, span: Nanos, alone: bool, now: Nanos) {
        if alone || self.round_trip.get().is_some_and(|known| span.0 < known) {
            self.round_trip.sample(span.0.max(1), now);
        }
    }

    /// Bytes that were just seen to have arrived.
    pub(crate) fn note_arrived(&mut self, bytes: u64, now: Nanos) {
        self.carried = true;
        self.span_bytes += bytes;
        let span = now.since(self.span_start);
        if span >= RATE_SPAN {
            // A span that began with a pause says nothing of the path's speed.
            if span <= Nanos(RATE_SPAN.0 * 4) {
                self.rate.sample(self.span_bytes.saturating_mul(1_000_000) / (span.0 / 1_000).max(1), now);
            }
            (self.span_start, self.span_bytes) = (now, 0);
            self.recompute();
        }
    }

    fn recompute(&mut self) {
        // rate is in bytes per second here: bytes × 10^6 / us
        if let (Some(rate), Some(round_trip)) = (self.rate.get(), self.round_trip.get()) {
            let needed = u128::from(rate) * u128::from(round_trip) * 2 / 1_000_000_000;
            self.cap = u64::try_from(needed).unwrap_or(CAP_CEILING).clamp(CAP_FLOOR, CAP_CEILING);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cap_follows_bandwidth_and_delay_between_its_limits() {
        let mut credit = Credit::new();
        assert_eq!(credit.cap(), CAP_FLOOR);
        // 10 GB/s with 100 us of delay needs 2 × 1 MB.
        for ms in 1..50u64 {
            credit.note_round_trip(Nanos::from_micros(100), true, Nanos::from_millis(ms));
            credit.note_arrived(10_000_000, Nanos::from_millis(ms));
        }
        assert!((1_800_000..2_400_000).contains(&credit.cap()), "{}", credit.cap());
        // A slow path falls back to the floor once the fast samples have left the window.
        for ms in 50..500u64 {
            credit.note_round_trip(Nanos::from_micros(100), true, Nanos::from_millis(ms));
            credit.note_arrived(40_000, Nanos::from_millis(ms));
        }
        assert_eq!(credit.cap(), CAP_FLOOR);
    }

    /// On a full rail no request is alone, so a value from a bad moment would stay.
    #[test]
    fn a_full_rail_unlearns_a_round_trip_that_was_too_long() {
        let mut credit = Credit::new();
        credit.note_round_trip(Nanos::from_millis(900), true, Nanos::from_secs(3));
        credit.note_round_trip(Nanos::from_millis(950), false, Nanos::from_secs(3));
        assert_eq!(credit.round_trip(), Some(Nanos::from_millis(900).0));
        credit.note_round_trip(Nanos::from_millis(2), false, Nanos::from_secs(3));
        assert_eq!(credit.round_trip(), Some(Nanos::from_millis(2).0));
    }

    #[test]
    fn credit_is_not_dribbled_out() {
        let mut credit = Credit::new();
        credit.spend(CAP_FLOOR);
        assert_eq!(credit.free(), 0);
        credit.give_back(4096);
        assert_eq!(credit.free(), 0, "less than a quarter waits for more");
        credit.give_back(CAP_FLOOR / 4 - 4096);
        assert_eq!(credit.free(), CAP_FLOOR / 4);
    }
}
