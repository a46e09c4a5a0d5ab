//! What a check found: a verdict, the evidence for it, and the next step.

use serde_json::{Value, json};

/// How a check ended, worst last.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Verdict {
    /// There was nothing to check, or something before it failed.
    Skip,
    /// As it should be.
    Pass,
    /// It works, and something will hurt.
    Warn,
    /// It cannot work so.
    Fail,
}

impl Verdict {
    /// The word that is printed.
    pub const fn word(self) -> &'static str {
        match self {
            Self::Skip => "SKIP",
            Self::Pass => "PASS",
            Self::Warn => "WARN",
            Self::Fail => "FAIL",
        }
    }

    /// Its colour on a terminal (ECMA-48).
    pub const fn colour(self) -> &'static str {
        match self {
            Self::Skip => "\x1b[2m",
            Self::Pass => "\x1b[32m",
            Self::Warn => "\x1b[33m",
            Self::Fail => "\x1b[31m",
        }
    }
}

/// One line of the report.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Finding {
    /// Name of the check; stable, for programs.
    pub check: &'static str,
    /// The thing that was checked, where there are several: a device, an endpoint.
    pub subject: Option<String>,
    /// How it ended.
    pub verdict: Verdict,
    /// What was seen.
    pub evidence: String,
    /// What to do.
    pub next: Option<String>,
}

impl Finding {
    /// As it should be.
    pub fn pass(check: &'static str, evidence: impl Into<String>) -> Self {
        Self { check, subject: None, verdict: Verdict::Pass, evidence: evidence.into(), next: None }
    }

    /// Nothing to check, and why.
    pub fn skip(check: &'static str, why: impl Into<String>) -> Self {
        Self { verdict: Verdict::Skip, ..Self::pass(check, why) }
    }

    /// It works, but.
    pub fn warn(check: &'static str, evidence: impl Into<String>, next: impl Into<String>) -> Self {
        Self { verdict: Verdict::Warn, next: Some(next.into()), ..Self::pass(check, evidence) }
    }

    /// It cannot work.
    pub fn fail(check: &'static str, evidence: impl Into<String>, next: impl Into<String>) -> Self {
        Self { verdict: Verdict::Fail, next: Some(next.into()), ..Self::pass(check, evidence) }
    }

    /// An error of ours, whose own text has the cause and then the next step.
    pub fn told(check: &'static str, error: &dyn std::error::Error) -> Self {
        Self { verdict: Verdict::Fail, ..Self::pass(check, error.to_string()) }
    }

    /// About this thing.
    #[must_use]
    pub fn about(mut self, subject: impl Into<String>) -> Self {
        self.subject = Some(subject.into());
        self
    }

    /// For programs.
    pub fn json(&self) -> Value {
        json!({
            "check": self.check, "subject": self.subject, "verdict": self.verdict.word(),
            "evidence": self.evidence, "next": self.next,
        })
    }
}
