//! `/lab/command`: what a node runs, with the folder and the environment of whoever started the lab.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::Plan;
use super::folder::RunFolder;
use crate::error::{At, Result};
use crate::process::Bounded;

/// Variables of the host that a command in the lab sees too, by their beginning.
const PASSED_ON: &[&str] = &["MC_", "MOONRAIL_", "RUST_"];

/// Writes the command of a plan.
pub(super) fn write(folder: &RunFolder, plan: &Plan) -> Result<()> {
    let here = match &plan.from {
        Some(folder) => folder.clone(),
        None => current_folder()?,
    };
    let mut text = preamble(&here.to_string_lossy());
    for (key, value) in &plan.env {
        let _ = writeln!(text, "export {key}={}", quoted(value));
    }
    let words: Vec<String> = plan.command.iter().map(|word| quoted(word)).collect();
    let _ = writeln!(text, "exec {}", words.join(" "));
    folder.write("command", &text)
}

/// Writes the command of an interactive run: a shell on node 0, nothing elsewhere.
pub(super) fn write_shell(folder: &RunFolder) -> Result<()> {
    let mut text = preamble(&current_folder()?.to_string_lossy());
    text.push_str("[ \"$NODE\" = 0 ] || exec sleep infinity\n");
    text.push_str("echo \"node 0 of $NODES; exit, or Ctrl-D, ends the lab\"\n");
    text.push_str("exec bash -i\n");
    folder.write("command", &text)?;
    folder.write("terminal", &terminal())
}

/// The serial line does not know the size of the window at its other end.
fn terminal() -> String {
    let size = Bounded::new("sh", Duration::from_secs(5)).args(["-c", "stty size < /dev/tty"]).output();
    let size = size.unwrap_or_default();
    let mut words = size.split_whitespace().filter_map(|word| word.parse::<u16>().ok());
    let term = std::env::var("TERM").unwrap_or_else(|_| "vt100".to_owned());
    let mut text = format!("export TERM={}\n", quoted(&term));
    if let (Some(rows), Some(columns)) = (words.next(), words.next()) {
        let _ = writeln!(text, "stty rows {rows} columns {columns} < /dev/ttyS0");
    }
    text
}

fn current_folder() -> Result<PathBuf> {
    std::env::current_dir().at("find", Path::new("."))
}

fn preamble(here: &str) -> String {
    let mut text = String::new();
    for (key, value) in std::env::vars() {
        if PASSED_ON.iter().any(|prefix| key.starts_with(prefix)) && is_name(&key) {
            let _ = writeln!(text, "export {key}={}", quoted(&value));
        }
    }
    if let Ok(path) = std::env::var("PATH") {
        let _ = writeln!(text, "export PATH=\"$PATH\":{}", quoted(&path));
    }
    let _ = writeln!(text, "cd {} || exit 1", quoted(here));
    text
}

fn is_name(key: &str) -> bool {
    key.chars().all(|c| c.is_ascii_alphanumeric() || c == '_')
}

/// One word for the shell, whatever it holds.
fn quoted(word: &str) -> String {
    format!("'{}'", word.replace('\'', r"'\''"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quoting_survives_a_real_shell() {
        for word in ["plain", "two words", "it's", "$HOME `x` \"y\"", "", "a\nb"] {
            let script = format!("printf %s {}", quoted(word));
            let said = Bounded::new("sh", Duration::from_secs(10)).args(["-c", &script]).output().expect("sh runs");
            assert_eq!(said, word);
        }
    }

    #[test]
    fn odd_variable_names_are_not_exported() {
        assert!(is_name("MC_GID_INDEX"));
        assert!(!is_name("MC_%x"));
    }
}
