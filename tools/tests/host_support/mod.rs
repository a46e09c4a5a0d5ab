//! What the tests with processes of one host share.
#![allow(dead_code)] // each test uses a part

#[path = "../lab_support/process.rs"]
pub(crate) mod process;

#[allow(clippy::duplicate_mod, reason = "what some tests take from control's support as well")]
#[path = "../../../control/tests/support/ports.rs"]
pub(crate) mod ports;

use std::time::{Duration, Instant};

/// For a process to start, or to end.
pub(crate) const START: Duration = Duration::from_secs(20);
/// For a process to do its work.
pub(crate) const RUN: Duration = Duration::from_secs(60);

/// Waits until `look` finds something, at most [`START`].
pub(crate) fn wait_for<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let until = Instant::now() + START;
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(Instant::now() < until, "{what}: not within {START:?}");
        std::thread::sleep(Duration::from_millis(5));
    }
}
