//! One clock for all nodes: the host's, which dates every file of the folder that all see.

use std::time::{Duration, Instant, SystemTime};

use super::Lab;

/// Looks at the host's clock; the best of them counts.
const LOOKS: u32 = 3;

/// Where the host's clock stands beside ours.
#[derive(Clone, Copy, Debug)]
pub(crate) struct HostClock {
    host: SystemTime,
    own: Instant,
    /// How far the two may be apart, beside the few milliseconds in which the host's clock ticks.
    pub(crate) within: Duration,
}

impl HostClock {
    /// Compares the clocks. `name`: each once per test, as everything in the folder.
    pub(crate) fn compare(lab: &Lab, name: &str) -> Self {
        let look = |number| {
            let name = format!("{name}-{number}");
            let before = Instant::now();
            lab.tell(&name, "");
            let within = before.elapsed();
            Self { host: lab.left_at(&name, lab.node), own: before + within / 2, within: within / 2 }
        };
        (0..LOOKS).map(look).min_by_key(|look| look.within).expect("at least one look")
    }

    /// What our clock showed when the host's showed `host`.
    pub(crate) fn ours(&self, host: SystemTime) -> Instant {
        match host.duration_since(self.host) {
            Ok(later) => self.own + later,
            Err(e) => self.own.checked_sub(e.duration()).expect("later than the machine's start"),
        }
    }
}
