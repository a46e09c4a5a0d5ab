//! Children with a time limit that never outlive us.
//!
//! Every command runs as `setpriv --pdeathsig TERM timeout LIMIT COMMAND`: the kernel tells `timeout` when we die
//! (Ctrl-C included), and `timeout`, which leads a process group of its own, ends the whole group then or at the
//! limit. Both tools are in Debian's essential packages, and no unsafe code is needed.

use std::ffi::OsStr;
use std::path::Path;
use std::process::{Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use crate::error::{Error, Result};

/// How long a group that was asked to end may take before it is killed.
const GRACE_SECONDS: u64 = 5;

/// How a command ended that may fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ending {
    /// With exit status 0.
    Success,
    /// With another one, or by a signal.
    Failure,
    /// At its time limit.
    Limit,
}

/// A command with a time limit and a name for messages.
#[derive(Debug)]
pub(crate) struct Bounded {
    command: Command,
    name: String,
    limit: Duration,
}

impl Bounded {
    /// `program`, found on the PATH, which may run for `limit`. It reads nothing and writes to our own outputs.
    pub(crate) fn new(program: impl AsRef<OsStr>, limit: Duration) -> Self {
        let program = program.as_ref();
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "TERM", "timeout"]);
        command.arg(format!("--kill-after={GRACE_SECONDS}")).arg(format!("{:.3}", limit.as_secs_f64()));
        command.arg(program).stdin(Stdio::null());
        let name = Path::new(program).file_name().unwrap_or(program).to_string_lossy().into_owned();
        Self { command, name, limit }
    }

    /// Adds one argument.
    pub(crate) fn arg(mut self, arg: impl AsRef<OsStr>) -> Self {
        self.command.arg(arg);
        self
    }

    /// Adds arguments.
    pub(crate) fn args<S: AsRef<OsStr>>(mut self, args: impl IntoIterator<Item = S>) -> Self {
        self.command.args(args);
        self
    }

    /// Sets one environment variable.
    pub(crate) fn env(mut self, key: &str, value: impl AsRef<OsStr>) -> Self {
        self.command.env(key, value);
        self
    }

    /// Removes one environment variable.
    pub(crate) fn env_remove(mut self, key: impl AsRef<OsStr>) -> Self {
        self.command.env_remove(key);
        self
    }

    /// Runs in `folder`.
    pub(crate) fn in_folder(mut self, folder: &Path) -> Self {
        self.command.current_dir(folder);
        self
    }

    /// Runs with our own outputs; anything but exit status 0 is an error.
    pub(crate) fn run(mut self) -> Result<()> {
        let started = Instant::now();
        let status = self.command.status().map_err(|e| no_start(&e))?;
        self.judge(status, started, "")
    }

    /// Runs and returns what it wrote to its standard output; anything but exit status 0 is an error with the end
    /// of what it wrote to its standard error.
    pub(crate) fn output(mut self) -> Result<String> {
        let started = Instant::now();
        let output = self.command.output().map_err(|e| no_start(&e))?;
        self.judge(output.status, started, &last_lines(&String::from_utf8_lossy(&output.stderr), 5))?;
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// Runs, lets its standard error through, and returns its standard output whatever its exit status was.
    pub(crate) fn stdout(mut self) -> Result<String> {
        let started = Instant::now();
        self.command.stderr(Stdio::inherit());
        let output = self.command.output().map_err(|e| no_start(&e))?;
        self.judge(output.status, started, "")?;
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// Runs and returns how it ended, with all it wrote: first its standard output, then its standard error.
    pub(crate) fn ending(mut self) -> Result<(Ending, String)> {
        let started = Instant::now();
        let output = self.command.output().map_err(|e| no_start(&e))?;
        let said = [output.stdout, output.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).join("\n");
        let ending = match output.status.code() {
            Some(0) => Ending::Success,
            _ if started.elapsed() >= self.limit => Ending::Limit,
            _ => Ending::Failure,
        };
        Ok((ending, said))
    }

    fn judge(&self, status: ExitStatus, started: Instant, said: &str) -> Result<()> {
        let said = if said.is_empty() { String::new() } else { format!(":\n{said}") };
        let (name, took) = (&self.name, started.elapsed());
        match status.code() {
            Some(0) => Ok(()),
            Some(127) if took < self.limit => {
                Err(Error::new(format!("{name} is not installed or not on the PATH{said}"), "run `cargo xtask setup`"))
            }
            _ if took >= self.limit => Err(Error::new(
                format!("{name} was ended at its limit of {} s{said}", self.limit.as_secs()),
                "see its output above; run it again if the machine was busy",
            )),
            Some(code) => Err(Error::new(format!("{name} failed with exit status {code}{said}"), "")),
            None => Err(Error::new(format!("{name} was ended by a signal ({status}){said}"), "")),
        }
    }
}

fn no_start(e: &std::io::Error) -> Error {
    Error::new(
        format!("cannot start a command through setpriv: {e}"),
        "setpriv (package util-linux) and timeout (package coreutils) must be on the PATH",
    )
}

/// The last `count` lines of `text`.
pub(crate) fn last_lines(text: &str, count: usize) -> String {
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(count)..].join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn output_of_a_command_comes_back() {
        let said = Bounded::new("sh", Duration::from_secs(10)).args(["-c", "echo yes"]).output().expect("sh runs");
        assert_eq!(said, "yes\n");
    }

    #[test]
    fn failure_names_the_command_and_what_it_said() {
        let e = Bounded::new("sh", Duration::from_secs(10)).args(["-c", "echo no >&2; exit 3"]).output().unwrap_err();
        assert_eq!(e.to_string(), "sh failed with exit status 3:\nno");
    }

    #[test]
    fn an_ending_comes_with_all_that_was_said() {
        let end = |script: &str| Bounded::new("sh", Duration::from_millis(500)).args(["-c", script]).ending();
        assert_eq!(end("echo a; echo b >&2").expect("runs"), (Ending::Success, "a\n\nb\n".to_owned()));
        assert_eq!(end("exit 4").expect("runs").0, Ending::Failure);
        assert_eq!(end("exec sleep 30").expect("runs").0, Ending::Limit);
    }

    #[test]
    fn a_missing_command_points_at_setup() {
        let e = Bounded::new("no-such-command", Duration::from_secs(10)).output().unwrap_err();
        assert!(e.to_string().contains("cargo xtask setup"), "{e}");
    }

    #[test]
    fn the_limit_ends_grandchildren_too() {
        let started = Instant::now();
        // The grandchild holds the pipe: output() would wait for it if only the shell were ended.
        let e = Bounded::new("sh", Duration::from_millis(200)).args(["-c", "sleep 30 & wait"]).output().unwrap_err();
        assert!(e.to_string().contains("limit"), "{e}");
        assert!(started.elapsed() < Duration::from_secs(4), "{:?}", started.elapsed());
    }

    #[test]
    fn last_lines_are_the_last() {
        assert_eq!(last_lines("a\nb\nc\n", 2), "b\nc");
        assert_eq!(last_lines("a", 2), "a");
    }
}
