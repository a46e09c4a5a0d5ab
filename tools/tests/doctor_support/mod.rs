//! What `moonrail doctor` says, and the one cause that a set-up was broken by.
#![allow(dead_code)] // each test uses a part

use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::host_support::RUN;
use crate::host_support::process::{Ended, Process, moonrail};

/// One look of the doctor.
pub(crate) struct Look {
    status: i32,
    pub(crate) checks: Vec<Value>,
    took: Duration,
}

impl Look {
    pub(crate) fn of(line: &str, env: &[(&str, &str)]) -> Self {
        let began = Instant::now();
        let mut command = Command::new(moonrail());
        command.args(["doctor", "--json"]).args(line.split_whitespace()).envs(env.iter().copied());
        Self::read(&Process::start(&format!("doctor {line}"), command).wait(RUN), began)
    }

    pub(crate) fn read(ended: &Ended, began: Instant) -> Self {
        let report: Value =
            serde_json::from_str(&ended.stdout).unwrap_or_else(|e| panic!("{e}:\n{}\n{}", ended.stdout, ended.stderr));
        let checks = report["checks"].as_array().expect("checks").clone();
        Self { status: ended.code, checks, took: began.elapsed() }
    }

    /// `doctor` with these words, started by a script of the shell: `$DOCTOR WORDS`.
    pub(crate) fn shell(script: &str) -> Self {
        let began = Instant::now();
        let mut command = Command::new("bash");
        command.args(["-c", script]).env("DOCTOR", format!("{} doctor --json", moonrail()));
        Self::read(&Process::start(script, command).wait(RUN), began)
    }

    /// The check of this name that is worst.
    pub(crate) fn check(&self, name: &str) -> &Value {
        let rank = |c: &&Value| ["SKIP", "PASS", "WARN", "FAIL"].iter().position(|word| c["verdict"] == *word);
        let of = self.checks.iter().filter(|c| c["check"] == name).max_by_key(rank);
        of.unwrap_or_else(|| panic!("no {name}: {:#?}", self.checks))
    }

    /// The first check that ended so.
    pub(crate) fn first(&self, verdict: &str) -> &Value {
        self.checks.iter().find(|c| c["verdict"] == verdict).unwrap_or(&Value::Null)
    }

    /// The first failure is this check, its evidence has these words, and it says what to do.
    pub(crate) fn fails(&self, case: &str, check: &str, words: &str) {
        self.is(case, "FAIL", 1, check, words);
    }

    pub(crate) fn warns(&self, case: &str, check: &str, words: &str) {
        assert_eq!(self.first("FAIL"), &Value::Null, "{case}");
        self.is(case, "WARN", 3, check, words);
    }

    fn is(&self, case: &str, verdict: &str, status: i32, check: &str, words: &str) {
        let first = self.first(verdict);
        assert_eq!(first["check"], check, "{case}: {:#?}", self.checks);
        let evidence = first["evidence"].as_str().unwrap_or_default();
        assert!(evidence.contains(words), "{case}: {first:#}");
        // Errors of the engine say what to do in their own text, after the cause.
        let next = first["next"].as_str().map_or(evidence.len() > 60, |next| !next.is_empty());
        assert!(next, "{case}: nothing to do: {first:#}");
        assert_eq!(self.status, status, "{case}");
        println!("{case}: {} in {:.1} s", first["check"], self.took.as_secs_f64());
    }
}
