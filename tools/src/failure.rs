//! How the command ends: what went wrong, what to do next, and the exit status: 0 done, 1 the run failed, 2 wrong usage.
//! `bench --mode=…` keeps those of `transfer_engine_bench`: 1 for a wrong flag too.

use std::fmt;
use std::process::ExitCode;

/// A failed command: a cause and the next step, for an operator.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Failure {
    cause: String,
    next: Option<String>,
    status: u8,
}

/// What commands return.
pub type Result<T> = std::result::Result<T, Failure>;

impl Failure {
    /// The run failed: `cause`, and what to do `next`.
    pub fn new(cause: impl fmt::Display, next: impl fmt::Display) -> Self {
        Self { cause: cause.to_string(), next: Some(next.to_string()), status: 1 }
    }

    /// The run failed with an error whose own text says what to do.
    pub fn told(error: &dyn std::error::Error) -> Self {
        let mut cause = error.to_string();
        let mut below = error.source();
        while let Some(source) = below {
            let text = source.to_string();
            // Most of our errors quote their source already.
            if !cause.contains(&text) {
                cause = format!("{cause}: {text}");
            }
            below = source.source();
        }
        Self { cause, next: None, status: 1 }
    }

    /// The command line asks for something impossible.
    pub fn usage(cause: impl fmt::Display, next: impl fmt::Display) -> Self {
        Self { status: 2, ..Self::new(cause, next) }
    }

    /// Prints to stderr and gives the exit status.
    pub fn report(&self) -> ExitCode {
        eprintln!("{self}");
        ExitCode::from(self.status)
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "error: {}", self.cause)?;
        match &self.next {
            Some(next) => write!(f, "\n next: {next}"),
            None => Ok(()),
        }
    }
}

impl std::error::Error for Failure {}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug)]
    struct Outer(std::io::Error);
    impl fmt::Display for Outer {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("outer")
        }
    }
    impl std::error::Error for Outer {
        fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
            Some(&self.0)
        }
    }

    #[test]
    fn an_error_is_told_with_its_sources() {
        let failure = Failure::told(&Outer(std::io::Error::other("inner")));
        assert_eq!(failure.to_string(), "error: outer: inner");
        assert_eq!(Failure::new("a", "b").to_string(), "error: a\n next: b");
    }
}
