//! docs/soak.md: one section per part, each replaced when its part is run again.

use std::fmt::Write as _;
use std::time::Duration;

use clap::ValueEnum;

use super::Part;
use crate::error::{At, Result};
use crate::process::Bounded;
use crate::test::minutes;
use crate::workspace;

const PAGE: &str = "docs/soak.md";
const HEAD: &str = "# Soak\n\nWhat `cargo xtask soak [PART…]` saw last, part by part. Written by it: do not edit. Figures are an emulator's on a \
                    machine that others may have used at the same time; limits are asserted in virtual time, by the simulation.\n";

/// Puts the result of a part into the page.
pub(super) fn write(part: Part, text: &str, passed: bool, took: Duration) -> Result<()> {
    let path = workspace::root().join(PAGE);
    let before = std::fs::read_to_string(&path).unwrap_or_default();
    let verdict = if passed { "passed" } else { "**FAILED**" };
    let section =
        format!("{verdict} in {} at commit {}, {}, {}\n\n{text}", minutes(took), commit(), machine(), today());
    std::fs::write(&path, with_section(&before, part, &section)).at("write", &path)
}

/// The page with another text in one section, the others as they were.
fn with_section(page: &str, part: Part, text: &str) -> String {
    let mut new = HEAD.to_owned();
    for &other in Part::value_variants() {
        let kept = section(page, other);
        let text = if other == part { text } else { kept.unwrap_or("Not run yet.") };
        let _ = write!(new, "\n{}\n\n{}\n", heading(other), text.trim());
    }
    new
}

fn heading(part: Part) -> String {
    format!("## `{}`: {}", part.name(), part.title())
}

fn section(page: &str, part: Part) -> Option<&str> {
    let (_, rest) = page.split_once(&heading(part))?;
    Some(rest.split("\n## ").next().unwrap_or(rest).trim())
}

fn said(program: &str, args: &[&str]) -> Option<String> {
    let said = Bounded::new(program, Duration::from_secs(10)).in_folder(&workspace::root()).args(args).output().ok()?;
    Some(said.trim().to_owned())
}

fn commit() -> String {
    let hash = said("git", &["rev-parse", "--short=10", "HEAD"]).unwrap_or_else(|| "unknown".to_owned());
    // What the page itself says of this run does not count.
    let changed = said("git", &["status", "--porcelain", "--", ".", ":!docs/soak.md"]).unwrap_or_default();
    if changed.is_empty() { hash } else { format!("{hash} with changes") }
}

fn today() -> String {
    said("date", &["--utc", "+%Y-%m-%d"]).unwrap_or_default()
}

/// `2 × Intel(R) Xeon(R) Processor`: the model, and how many threads of it.
fn machine() -> String {
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let models: Vec<&str> =
        text.lines().filter(|line| line.starts_with("model name")).filter_map(|l| l.split(": ").nth(1)).collect();
    format!("{} × {}", models.len().max(1), models.first().unwrap_or(&"unknown processor"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_part_replaces_its_own_section_only() {
        let first = with_section("", Part::Late, "one");
        let second = with_section(&first, Part::Mix, "two");
        let third = with_section(&second, Part::Late, "three");
        assert_eq!(section(&third, Part::Late), Some("three"));
        assert_eq!(section(&third, Part::Mix), Some("two"));
        assert_eq!(section(&third, Part::Seeds), Some("Not run yet."));
        assert_eq!(third.matches("# Soak\n").count(), 1);
        assert_eq!(with_section(&third, Part::Late, "three"), third);
    }
}
