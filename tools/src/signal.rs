//! SIGINT and SIGTERM as a flag that is looked at, so that an engine is shut down and not cut off.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use signal_hook::consts::{SIGINT, SIGTERM};

/// How often a waiting thread looks at the flag: 20 wake-ups a second cost nothing and nobody notices the delay.
const LOOK_EVERY: Duration = Duration::from_millis(50);

/// How long after the first signal another one is taken for the same request: timeout(1) and shells send it to the
/// process and to its group, which is twice.
const SAME_REQUEST: Duration = Duration::from_secs(1);

/// Set by the first SIGINT or SIGTERM. One that comes more than a second later ends the process at once, with status 1.
#[derive(Clone, Debug)]
pub struct Stop {
    asked: Arc<AtomicBool>,
    /// The next signal is the hard one.
    hard: Arc<AtomicBool>,
}

impl Stop {
    /// Installs the handlers, and a thread that sleeps until the first signal to make the next one hard.
    pub fn install() -> io::Result<Self> {
        let stop = Self { asked: Arc::default(), hard: Arc::default() };
        for signal in [SIGINT, SIGTERM] {
            signal_hook::flag::register_conditional_shutdown(signal, 1, Arc::clone(&stop.hard))?;
            signal_hook::flag::register(signal, Arc::clone(&stop.asked))?;
        }
        let arming = stop.clone();
        std::thread::Builder::new().name("mr-signal".into()).spawn(move || {
            arming.wait(None);
            std::thread::sleep(SAME_REQUEST);
            arming.hard.store(true, Ordering::Relaxed);
        })?;
        Ok(stop)
    }

    /// Whether a signal came.
    pub fn is_asked(&self) -> bool {
        self.asked.load(Ordering::Relaxed)
    }

    /// Waits for a signal, at most until `until`; whether one came.
    pub fn wait(&self, until: Option<Instant>) -> bool {
        loop {
            if self.is_asked() {
                return true;
            }
            let left = until.map_or(LOOK_EVERY, |until| until.saturating_duration_since(Instant::now()));
            if left.is_zero() {
                return false;
            }
            std::thread::sleep(left.min(LOOK_EVERY));
        }
    }
}
