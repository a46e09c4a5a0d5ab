//! Output for whoever runs the command. A reader that closes its end early (`| head`) is no reason to panic.

use std::fmt::Display;
use std::io::Write as _;

/// Prints a line to stdout, at once.
pub fn line(text: impl Display) {
    let mut out = std::io::stdout().lock();
    let _ = writeln!(out, "{text}").and_then(|()| out.flush());
}

/// Prints bytes to stdout as they are.
pub fn text(bytes: &[u8]) {
    let mut out = std::io::stdout().lock();
    let _ = out.write_all(bytes).and_then(|()| out.flush());
}
