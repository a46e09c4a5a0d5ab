//! One error for all activities: a sentence with the cause, and one with what to do next.

use std::fmt;

/// What went wrong and what to do about it.
#[derive(Debug)]
pub(crate) struct Error {
    cause: String,
    next: String,
}

/// The result of an activity.
pub(crate) type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// Both sentences are shown to whoever ran the command; `next` may be empty when the cause says it all.
    pub(crate) fn new(cause: impl Into<String>, next: impl Into<String>) -> Self {
        Self { cause: cause.into(), next: next.into() }
    }

    /// Without what to do about it.
    pub(crate) fn cause(&self) -> &str {
        &self.cause
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.cause)?;
        if self.next.is_empty() { Ok(()) } else { write!(f, "\n  next: {}", self.next) }
    }
}

/// Names the file or folder in errors of the file system.
pub(crate) trait At<T> {
    /// Turns an I/O error into one that says what was being done to which path.
    fn at(self, doing: &str, path: &std::path::Path) -> Result<T>;
}

impl<T> At<T> for std::io::Result<T> {
    fn at(self, doing: &str, path: &std::path::Path) -> Result<T> {
        self.map_err(|e| {
            Error::new(
                format!("cannot {doing} {}: {e}", path.display()),
                "check that the path is writable and that the disk has room",
            )
        })
    }
}
