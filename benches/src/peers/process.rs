//! Processes that an experiment starts, waits for with a bound, and ends.

use std::error::Error;
use std::fs::File;
use std::io::Write;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

/// Longest time for anything: to start, to measure one cell, to end.
const PATIENCE: Duration = Duration::from_secs(60);
const LOOK_EVERY: Duration = Duration::from_millis(5);

/// A process that writes all it says into one file. Dropped, it is killed, and the file removed.
pub(crate) struct Process {
    child: Child,
    what: String,
    log: PathBuf,
    /// Bytes of the file that were read.
    read: usize,
}

impl Process {
    pub(crate) fn start(command: &mut Command) -> Result<Self, Box<dyn Error>> {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let log = std::env::temp_dir().join(format!("moonrail-peers-{}-{number}", std::process::id()));
        let file = File::create(&log).map_err(|e| format!("{}: {e}", log.display()))?;
        let what = command.get_program().to_string_lossy().into_owned();
        command.stdin(Stdio::piped()).stdout(file.try_clone()?).stderr(file);
        let child = command.spawn().map_err(|e| format!("{what} cannot be started: {e}"))?;
        Ok(Self { child, what, log, read: 0 })
    }

    /// The first line from here on of which `wanted` makes something.
    pub(crate) fn line<T>(&mut self, wanted: impl Fn(&str) -> Option<T>) -> Result<T, Box<dyn Error>> {
        let until = Instant::now() + PATIENCE;
        loop {
            // Looked at first: what it said before its end is read below.
            let ended = self.child.try_wait()?;
            let said = std::fs::read(&self.log)?;
            while let Some(end) = said[self.read..].iter().position(|byte| *byte == b'\n') {
                let line = String::from_utf8_lossy(&said[self.read..self.read + end]).into_owned();
                self.read += end + 1;
                if let Some(found) = wanted(&line) {
                    return Ok(found);
                }
            }
            let problem = match ended {
                Some(status) => format!("ended ({status})"),
                None if Instant::now() >= until => format!("said nothing of what was expected within {PATIENCE:?}"),
                None => {
                    std::thread::sleep(LOOK_EVERY);
                    continue;
                }
            };
            return Err(format!("{} {problem}; it said:\n{}", self.what, String::from_utf8_lossy(&said)).into());
        }
    }

    /// Stops it, so that it takes nothing of the processors while others are measured; or lets it go on.
    pub(crate) fn pause(&self, paused: bool) -> Result<(), Box<dyn Error>> {
        let signal = if paused { Signal::STOP } else { Signal::CONT };
        let pid = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw).ok_or("no process")?;
        kill_process(pid, signal).map_err(|e| format!("{} cannot be stopped: {e}", self.what).into())
    }

    /// Writes a line to its input.
    pub(crate) fn tell(&mut self, line: &str) -> Result<(), Box<dyn Error>> {
        let stdin = self.child.stdin.as_mut().ok_or("no input")?;
        writeln!(stdin, "{line}").map_err(|e| format!("{} hears nothing: {e}", self.what).into())
    }

    /// All it says until its end; an error if that is none.
    pub(crate) fn output(mut self) -> Result<String, Box<dyn Error>> {
        let until = Instant::now() + PATIENCE;
        let status = loop {
            match self.child.try_wait()? {
                Some(status) => break status,
                None if Instant::now() >= until => {
                    return Err(format!("{} did not end within {PATIENCE:?}", self.what).into());
                }
                None => std::thread::sleep(LOOK_EVERY),
            }
        };
        let said = String::from_utf8_lossy(&std::fs::read(&self.log)?).into_owned();
        if status.success() { Ok(said) } else { Err(format!("{} ended ({status}): {said}", self.what).into()) }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = std::fs::remove_file(&self.log);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> Process {
        Process::start(Command::new("sh").args(["-c", script])).unwrap()
    }

    #[test]
    fn lines_come_one_after_the_other_and_an_end_is_told_with_what_was_said() {
        let mut process = shell("echo a; read word; echo got $word; echo why >&2; exit 3");
        assert_eq!(process.line(|line| (line == "a").then_some(1)).unwrap(), 1);
        process.tell("this").unwrap();
        assert_eq!(process.line(|line| line.strip_prefix("got ").map(str::to_owned)).unwrap(), "this");
        let error = process.line(|line| (line == "never").then_some(())).unwrap_err().to_string();
        assert!(error.contains("exit status: 3") && error.contains("why"), "{error}");
        let error = shell("echo no; exit 1").output().unwrap_err().to_string();
        assert!(error.contains("no"), "{error}");
        assert_eq!(shell("echo yes").output().unwrap(), "yes\n");
    }

    #[test]
    fn a_process_that_is_dropped_is_gone_and_its_file_too() {
        let mut process = shell("echo $$; sleep 100");
        let pid: u32 = process.line(|line| line.parse().ok()).unwrap();
        let log = process.log.clone();
        drop(process);
        assert!(!PathBuf::from(format!("/proc/{pid}")).exists() && !log.exists());
    }
}
