//! How soon to try again, and with which MTU: pure. Who repairs a rail is `brain/shake.rs` (`attempt`); who hears that it is lost, `brain/life.rs`.

use moonrail_datapath::random::Random;
use moonrail_datapath::units::{Mtu, Nanos};

/// First wait after a failure.
pub const FIRST_WAIT: Nanos = Nanos::from_millis(10);
/// Longest wait between two attempts at one rail.
pub const LONGEST_WAIT: Nanos = Nanos::from_secs(1);

/// Waits that double from [`FIRST_WAIT`] to [`LONGEST_WAIT`], each a quarter more or less by chance, so that the rails to
/// one restarted peer do not all knock at once.
#[derive(Clone, Debug, Default)]
pub struct Backoff {
    failures: u32,
}

impl Backoff {
    /// Counts a failure; returns how long to wait before the next attempt.
    pub fn fail(&mut self, random: &mut Random) -> Nanos {
        let wait = FIRST_WAIT.0.checked_shl(self.failures.min(20)).unwrap_or(u64::MAX).min(LONGEST_WAIT.0);
        self.failures = self.failures.saturating_add(1);
        // Three to five quarters, within the cap.
        let quarter = wait / 4;
        Nanos((wait - quarter + random.draw() % (2 * quarter + 1)).min(LONGEST_WAIT.0))
    }

    /// Failures since the last success.
    pub fn failures(&self) -> u32 {
        self.failures
    }

    /// A success, or a port that came back: the next failure waits shortly again.
    pub fn reset(&mut self) {
        self.failures = 0;
    }
}

/// Which path MTU to use towards a peer that does not say its own: ours, until it turns out not to work; then each smaller
/// one once; what worked is kept.
#[derive(Clone, Debug, Default)]
pub struct MtuTrial {
    current: Option<Mtu>,
    /// Every value was tried without success.
    exhausted: bool,
    known: bool,
    /// Bytes and slices that the rail had carried when the present one was taken.
    from: (u64, u64),
}

impl MtuTrial {
    /// The MTU to use instead of our own, if any.
    pub fn current(&self) -> Option<Mtu> {
        self.current
    }

    /// The present one carried a slice.
    pub fn works(&mut self) {
        self.known = true;
    }

    /// What the rail has carried so far, in bytes and slices. Were the peer's MTU smaller than `used`, it would be half of it or
    /// less, and no longer slice would have come back: if they were longer on average, one was.
    fn carried(&mut self, used: Mtu, bytes: u64, slices: u64) {
        let (bytes, slices) = (bytes.saturating_sub(self.from.0), slices.saturating_sub(self.from.1));
        self.known |= bytes > slices.saturating_mul(u64::from(used.bytes() / 2));
    }

    /// The present one (`used`) may be what failed, after so many bytes and slices; returns the next to try. Nothing when one
    /// is known to work, or all were tried: then it is not the MTU.
    pub fn suspect(&mut self, used: Mtu, bytes: u64, slices: u64) -> Option<Mtu> {
        self.carried(used, bytes, slices);
        if self.known || self.exhausted {
            return None;
        }
        self.from = (bytes, slices);
        self.current = used.step_down();
        self.exhausted = self.current.is_none();
        self.current
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_grow_to_the_cap_and_start_again_after_a_reset() {
        let mut random = Random::new(1);
        let mut backoff = Backoff::default();
        let waits: Vec<u64> = (0..12).map(|_| backoff.fail(&mut random).0).collect();
        assert!(waits[0] >= FIRST_WAIT.0 * 3 / 4 && waits[0] <= FIRST_WAIT.0 * 5 / 4, "{waits:?}");
        assert!(waits[10] >= LONGEST_WAIT.0 * 3 / 4 && waits.iter().all(|w| *w <= LONGEST_WAIT.0), "{waits:?}");
        backoff.reset();
        assert!(backoff.fail(&mut random).0 <= FIRST_WAIT.0 * 5 / 4);
    }

    #[test]
    fn each_smaller_mtu_is_tried_once_and_the_working_one_kept() {
        let mut trial = MtuTrial::default();
        assert_eq!(trial.suspect(Mtu::B1024, 0, 0), Some(Mtu::B512));
        assert_eq!(trial.suspect(Mtu::B512, 0, 0), Some(Mtu::B256));
        assert_eq!(trial.suspect(Mtu::B256, 0, 0), None);
        assert_eq!((trial.suspect(Mtu::B1024, 0, 0), trial.current()), (None, None), "back to our own, for good");
        let mut trial = MtuTrial::default();
        assert_eq!(trial.suspect(Mtu::B4096, 0, 0), Some(Mtu::B2048));
        trial.works();
        assert_eq!((trial.suspect(Mtu::B2048, 0, 0), trial.current()), (None, Some(Mtu::B2048)));
    }

    #[test]
    fn an_mtu_that_carried_more_than_the_smaller_ones_could_is_not_suspected() {
        let mut trial = MtuTrial::default();
        // Of two slices one was longer than 2048 bytes: the peer's MTU is not 2048, nor less.
        assert_eq!(trial.suspect(Mtu::B4096, 4097, 2), None);
        let mut trial = MtuTrial::default();
        assert_eq!(trial.suspect(Mtu::B4096, 4096, 2), Some(Mtu::B2048), "both may have been of 2048 bytes");
        // What was carried before says nothing about the next.
        assert_eq!(trial.suspect(Mtu::B2048, 4096 + 10, 3), Some(Mtu::B1024));
        assert_eq!(trial.suspect(Mtu::B1024, 4096 + 10 + 600, 4), None);
        assert_eq!(trial.current(), Some(Mtu::B1024));
    }
}
