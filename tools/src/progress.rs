//! A progress line on stderr while something takes long, and only when a person is watching.
//!
//! Forty lines of our own: one line, redrawn at most ten times a second by whoever waits, needs no crate with a
//! terminal library behind it, and nothing here touches the threads that are being measured.

use std::io::{IsTerminal, Stderr, Write};
use std::time::{Duration, Instant};

const REDRAW_EVERY: Duration = Duration::from_millis(100);
const BAR: usize = 30;

/// One line that is redrawn in place. Silent when stderr is no terminal.
#[derive(Debug)]
pub struct Progress<W: Write = Stderr> {
    /// `None`: nobody is watching.
    to: Option<W>,
    label: String,
    drawn: Option<Instant>,
}

impl Progress {
    /// Nothing is drawn yet.
    pub fn new(label: impl Into<String>) -> Self {
        let stderr = std::io::stderr();
        Self { to: stderr.is_terminal().then_some(stderr), label: label.into(), drawn: None }
    }
}

impl<W: Write> Progress<W> {
    /// Draws `done` (0 to 1) and a few words, unless it did so a moment ago.
    pub fn draw(&mut self, done: f64, words: &str) {
        let Some(to) = &mut self.to else { return };
        if self.drawn.is_some_and(|at| at.elapsed() < REDRAW_EVERY) {
            return;
        }
        self.drawn = Some(Instant::now());
        let _ = write!(to, "\r\x1b[K{}", line(&self.label, done, words));
        let _ = to.flush();
    }
}

impl<W: Write> Drop for Progress<W> {
    fn drop(&mut self) {
        if let (Some(to), Some(_)) = (&mut self.to, self.drawn) {
            let _ = write!(to, "\r\x1b[K");
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
    fn it_draws_now_and_then_in_place_and_leaves_nothing_behind() {
        let mut seen = Vec::new();
        let mut progress = Progress { to: Some(&mut seen), label: "read 1 MiB".into(), drawn: None };
        for step in 0..1000 {
            progress.draw(f64::from(step) / 1000.0, "5 MB/s");
        }
        drop(progress);
        let text = String::from_utf8(seen).unwrap();
        assert!(text.starts_with("\r\x1b[Kread 1 MiB [..............................]   0 %  5 MB/s"), "{text:?}");
        assert!(text.ends_with("\r\x1b[K") && !text.contains('\n'), "{text:?}");
        assert!(text.matches('\r').count() < 20, "ten times a second at the most: {text:?}");
    }

    #[test]
    fn nobody_is_written_to_who_does_not_watch() {
        let mut progress = Progress::<Vec<u8>> { to: None, label: "x".into(), drawn: None };
        progress.draw(0.5, "");
        assert!(progress.drawn.is_none());
    }

    #[test]
    fn the_line_never_wraps() {
        for done in [-1.0, 0.0, 0.5, 1.0, 7.0, f64::NAN] {
            assert!(line(&"x".repeat(60), done, "words").len() < crate::table::WIDTH);
        }
        assert!(line("write 4 KiB", 0.5, "10 MB/s").contains("[###############...............]  50 %  10 MB/s"));
    }
}
