//! SIGINT and SIGTERM as a flag that is looked at, so that an engine is shut down and not cut off.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use signal_hook::consts::{SIGINT, SIGTERM};

/// How often a waiting thread looks at the flag: 20 wake-ups a second cost nothing and nobody notices the delay.
const LOOK_EVERY: Duration = Duration::from_millis(50);

/// Set by the first SIGINT or SIGTERM. The second one ends the process at once, with status 1.
#[derive(Clone, Debug)]
pub struct Stop(Arc<AtomicBool>);

impl Stop {
    /// Installs the handlers. The order counts: the hard exit looks at the flag before the flag is set.
    pub fn install() -> io::Result<Self> {
        let flag = Arc::new(AtomicBool::new(false));
        for signal in [SIGINT, SIGTERM] {
            signal_hook::flag::register_conditional_shutdown(signal, 1, Arc::clone(&flag))?;
            signal_hook::flag::register(signal, Arc::clone(&flag))?;
        }
        Ok(Self(flag))
    }

    /// Whether a signal came.
    pub fn is_asked(&self) -> bool {
        self.0.load(Ordering::Relaxed)
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
