//! A progress line on stderr while something takes long, and only when a person is watching.
//!
//! Forty lines of our own: one line, redrawn at most ten times a second by whoever waits, needs no crate with a
//! terminal library behind it, and nothing here touches the threads that are being measured.

use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

const REDRAW_EVERY: Duration = Duration::from_millis(100);
const BAR: usize = 30;

/// One line that is redrawn in place. Silent when stderr is no terminal.
#[derive(Debug)]
pub struct Progress {
    shown: bool,
    label: String,
    drawn: Option<Instant>,
}

impl Progress {
    /// Nothing is drawn yet.
    pub fn new(label: impl Into<String>) -> Self {
        Self { shown: std::io::stderr().is_terminal(), label: label.into(), drawn: None }
    }

    /// Draws `done` (0 to 1) and a few words, unless it did so a moment ago.
    pub fn draw(&mut self, done: f64, words: &str) {
        if !self.shown || self.drawn.is_some_and(|at| at.elapsed() < REDRAW_EVERY) {
            return;
        }
        self.drawn = Some(Instant::now());
        let _ = write!(std::io::stderr(), "\r\x1b[K{}", line(&self.label, done, words));
        let _ = std::io::stderr().flush();
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if self.drawn.is_some() {
            let _ = write!(std::io::stderr(), "\r\x1b[K");
        }
    }
}

fn line(label: &str, done: f64, words: &str) -> String {
    let done = if done.is_finite() { done.clamp(0.0, 1.0) } else { 0.0 };
    let full = (done * BAR as f64) as usize;
    let text = format!("{label} [{}{}] {:3.0} %  {words}", "#".repeat(full), ".".repeat(BAR - full), done * 100.0);
    text.chars().take(crate::table::WIDTH - 1).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_line_never_wraps() {
        for done in [-1.0, 0.0, 0.5, 1.0, 7.0, f64::NAN] {
            assert!(line(&"x".repeat(60), done, "words").len() < crate::table::WIDTH);
        }
        assert!(line("write 4 KiB", 0.5, "10 MB/s").contains("[###############...............]  50 %  10 MB/s"));
    }
}
