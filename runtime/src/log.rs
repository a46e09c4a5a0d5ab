//! Where the engine's log lines go: stderr with time and level, or a function of the embedder's.

use std::fmt;
use std::io::Write;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

/// How much a log line matters. The names are those of MC_LOG_LEVEL.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Level {
    /// Every step.
    Trace,
    /// What an operator wants to see of a healthy node.
    Info,
    /// Something is not as configured or not as fast as it could be; the engine goes on.
    Warning,
    /// Something failed.
    Error,
}

impl Level {
    /// The name as MC_LOG_LEVEL has it: `TRACE`, `INFO`, `WARNING`, `ERROR`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Trace => "TRACE",
            Self::Info => "INFO",
            Self::Warning => "WARNING",
            Self::Error => "ERROR",
        }
    }

    /// The level of that name; `None` for any other text.
    pub fn from_name(name: &str) -> Option<Self> {
        [Self::Trace, Self::Info, Self::Warning, Self::Error].into_iter().find(|level| level.name() == name)
    }
}

impl fmt::Display for Level {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// What takes a log line. Called from the engine's own threads and from callers' threads, never from a data core; it may
/// block, but what it holds up then is the control thread.
pub type Sink = Arc<dyn Fn(Level, &str) + Send + Sync>;

/// A threshold and a sink; clones share them.
#[derive(Clone)]
pub(crate) struct Log {
    least: Level,
    sink: Sink,
}

impl Log {
    pub(crate) fn new(least: Level, sink: Sink) -> Self {
        Self { least, sink }
    }

    pub(crate) fn line(&self, level: Level, text: &str) {
        if level >= self.least {
            (self.sink)(level, text);
        }
    }

    pub(crate) fn info(&self, text: impl AsRef<str>) {
        self.line(Level::Info, text.as_ref());
    }

    pub(crate) fn warning(&self, text: impl AsRef<str>) {
        self.line(Level::Warning, text.as_ref());
    }
}

/// The default: one line on stderr.
pub(crate) fn stderr() -> Sink {
    Arc::new(|level, text| {
        // Nobody is left to tell when stderr is gone.
        let _ = writeln!(std::io::stderr().lock(), "{}", format_line(SystemTime::now(), level, text));
    })
}

/// Appends to `moonrail.<pid>.log` in `folder`.
pub(crate) fn file_in(folder: &Path) -> std::io::Result<Sink> {
    let path = folder.join(format!("moonrail.{}.log", std::process::id()));
    let file = Mutex::new(std::fs::OpenOptions::new().create(true).append(true).open(path)?);
    Ok(Arc::new(move |level, text| {
        let mut file = file.lock().unwrap_or_else(PoisonError::into_inner);
        let _ = writeln!(file, "{}", format_line(SystemTime::now(), level, text));
    }))
}

/// `2026-11-22T10:47:03.123456Z WARNING text`, UTC.
fn format_line(at: SystemTime, level: Level, text: &str) -> String {
    format!("{} {level:<7} {text}", utc(at))
}

/// A moment as log lines have it: `2026-11-22T10:47:03.123456Z`. Before 1970 it is 1970.
pub fn utc(at: SystemTime) -> String {
    let since = at.duration_since(UNIX_EPOCH).unwrap_or_default();
    let (year, month, day) = civil(since.as_secs() / 86_400);
    let second = since.as_secs() % 86_400;
    format!(
        "{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}.{:06}Z",
        second / 3600,
        second / 60 % 60,
        second % 60,
        since.subsec_micros()
    )
}

/// Year, month and day of a day counted from 1970-01-01 (the proleptic Gregorian calendar, by 400-year eras).
fn civil(days: u64) -> (u64, u64, u64) {
    let shifted = days + 719_468;
    let (era, day_of_era) = (shifted / 146_097, shifted % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 { shifted_month + 3 } else { shifted_month - 9 };
    (year_of_era + era * 400 + u64::from(month <= 2), month, day)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn a_line_has_time_level_and_text() {
        let at = UNIX_EPOCH + Duration::from_micros(1_795_344_423_123_456);
        assert_eq!(format_line(at, Level::Info, "hello"), "2026-11-22T10:47:03.123456Z INFO    hello");
        assert_eq!(civil(0), (1970, 1, 1));
        assert_eq!(civil(19_782), (2024, 2, 29));
        assert_eq!(civil(19_783), (2024, 3, 1));
    }

    #[test]
    fn lines_below_the_threshold_are_dropped() {
        let seen = Arc::new(Mutex::new(Vec::new()));
        let sink = seen.clone();
        let log = Log::new(Level::Warning, Arc::new(move |level, _| sink.lock().unwrap().push(level)));
        log.info("no");
        log.warning("yes");
        log.line(Level::Error, "yes");
        assert_eq!(*seen.lock().unwrap(), [Level::Warning, Level::Error]);
    }

    #[test]
    fn level_names_are_those_of_the_variable() {
        assert_eq!(Level::from_name("WARNING"), Some(Level::Warning));
        assert_eq!(Level::from_name("warning"), None);
    }
}
