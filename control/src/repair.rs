//! How soon to try again, and with which MTU: pure.

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

    /// The present one (`used`) may be what failed; returns the next to try. Nothing when one is known to work, or all
    /// were tried: then it is not the MTU.
    pub fn suspect(&mut self, used: Mtu) -> Option<Mtu> {
        if self.known || self.exhausted {
            return None;
        }
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
        assert_eq!(trial.suspect(Mtu::B1024), Some(Mtu::B512));
        assert_eq!(trial.suspect(Mtu::B512), Some(Mtu::B256));
        assert_eq!(trial.suspect(Mtu::B256), None);
        assert_eq!((trial.suspect(Mtu::B1024), trial.current()), (None, None), "back to our own, for good");
        let mut trial = MtuTrial::default();
        assert_eq!(trial.suspect(Mtu::B4096), Some(Mtu::B2048));
        trial.works();
        assert_eq!((trial.suspect(Mtu::B2048), trial.current()), (None, Some(Mtu::B2048)));
    }
}
