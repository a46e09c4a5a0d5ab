//! What each command prints, as a page of documentation: made by the commands themselves, and held against the page that is
//! there. The same for a host without RDMA and for the lab: a list of command lines in, a page out.
#![allow(dead_code)] // each test uses a part

use std::fmt::Write as _;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

/// Set to anything, it makes a test write its page in place of comparing it.
pub(crate) const UPDATE: &str = "UPDATE_DOCS";
/// The same for the lab's nodes, which see this variable and no folder of the host's: where the page goes.
pub(crate) const UPDATE_INTO: &str = "MOONRAIL_UPDATE_DOCS";
/// For one command.
const WITHIN: Duration = Duration::from_secs(60);

/// A command line and what it printed.
pub(crate) struct Shown {
    line: String,
    text: String,
    status: i32,
}

impl Shown {
    /// Runs `moonrail` with these words, at most a minute. What it prints on stderr follows what it prints on stdout.
    pub(crate) fn run(line: &str, settings: &[(&str, &str)]) -> Self {
        let mut command = Command::new("timeout");
        command.args(["-k", "2", &WITHIN.as_secs().to_string(), &super::moonrail()]).args(line.split_whitespace());
        for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("MC_") || name.starts_with("MOONRAIL_")) {
            command.env_remove(name);
        }
        command.envs(settings.iter().copied());
        let output = command.output().expect("timeout runs");
        let words = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let (out, error) = (words(&output.stdout), words(&output.stderr));
        // Log lines are no part of what a command says.
        let said = error.lines().filter(|line| !is_log(line)).map(|line| format!("{line}\n"));
        let text = said.fold(out, |text, line| text + &line);
        Self { line: line.to_owned(), text, status: output.status.code().unwrap_or(-1) }
    }

    /// Whether it succeeded, and a line of it ends with this word.
    pub(crate) fn has(&self, word: &str) -> bool {
        self.status == 0 && self.text.lines().any(|line| line.split_whitespace().last() == Some(word))
    }

    /// Something that was shown otherwise: the first lines of a program that goes on.
    pub(crate) fn told(line: &str, text: &str) -> Self {
        Self { line: line.to_owned(), text: text.to_owned(), status: 0 }
    }
}

/// `2026-11-25T20:57:01.123Z INFO …`
fn is_log(line: &str) -> bool {
    line.len() > 20 && line.as_bytes()[..4].iter().all(u8::is_ascii_digit) && line.as_bytes()[4] == b'-'
}

/// Each command under a heading of its own; `names` are put in place of what differs from run to run (host, ports).
pub(crate) fn page(head: &str, shown: &[Shown], names: &[(&str, &str)]) -> String {
    let mut page = format!("{}\n", head.trim_end());
    for Shown { line, text, status } in shown {
        let words: Vec<&str> = line.split_whitespace().collect();
        let title = words[..if words[0] == "segments" { 2 } else { 1 }].join(" ");
        let _ = writeln!(page, "\n## moonrail {title}\n\n```text\n$ moonrail {line}\n{}", text.trim_end());
        if *status != 0 {
            let _ = writeln!(page, "$ echo $?\n{status}");
        }
        page.push_str("```\n");
    }
    names.iter().fold(page, |page, (from, to)| page.replace(from, to))
}

/// Writes the page if that is asked for, else panics with the first difference in anything but figures.
pub(crate) fn compare(path: &Path, page: &str) {
    if std::env::var_os(UPDATE).is_some() {
        std::fs::write(path, page).expect("the page can be written");
        return;
    }
    if let (Some(folder), Some(name)) = (std::env::var_os(UPDATE_INTO), path.file_name()) {
        std::fs::write(Path::new(&folder).join(name), page).expect("the page can be written");
        return;
    }
    let there = std::fs::read_to_string(path).unwrap_or_default();
    let (old, new) = (normal(&there), normal(page));
    let differ =
        old.iter().zip(&new).position(|(a, b)| a != b).or((old.len() != new.len()).then(|| old.len().min(new.len())));
    if let Some(at) = differ {
        let near =
            |lines: &[String]| lines[at.saturating_sub(3).min(lines.len())..(at + 4).min(lines.len())].join("\n  ");
        panic!(
            "{} is not what the commands print now; {UPDATE}=1 writes it anew.\nthere:\n  {}\nnow:\n  {}\nall of it:\n{page}",
            path.display(),
            near(&old),
            near(&new)
        );
    }
}

/// The lines without what differs between two runs and two machines: figures with their units, the width of columns, how many
/// lines of one kind follow each other; and of `doctor`, whose findings are of the machine, all but which checks it makes.
pub(crate) fn normal(text: &str) -> Vec<String> {
    let mut lines: Vec<String> = Vec::new();
    let mut of_doctor = false;
    let mut counters_at = None;
    for line in text.lines() {
        // A long list of counters goes on in lines that are indented further.
        let indent = line.len() - line.trim_start().len();
        if counters_at.is_some_and(|at| indent > at) {
            continue;
        }
        counters_at = is_counters(line).then_some(indent);
        if let Some(title) = line.strip_prefix("## ") {
            of_doctor = title.starts_with("moonrail doctor");
        }
        let verdict = |line: &str| ["  PASS", "  WARN", "  FAIL", "  SKIP"].iter().any(|word| line.starts_with(word));
        if !of_doctor || line.starts_with("## ") {
            lines.push(normal_line(line));
        } else if verdict(line) {
            lines.extend(line[6..].split(':').next().map(|check| check.trim().to_owned()));
        }
    }
    lines.dedup();
    lines
}

fn is_counters(line: &str) -> bool {
    line.trim_start().starts_with("counters of errors:")
}

fn normal_line(line: &str) -> String {
    const UNITS: [&str; 27] = [
        "B", "KiB", "MiB", "GiB", "TiB", "kB/s", "MB/s", "GB/s", "kB/s", "B/s", "ns", "us", "ms", "s", "min", "h", "d",
        "%", "x", "K", "M", "G", "k", "GB", "MB", "kB", "T",
    ];
    let mut words: Vec<String> = Vec::new();
    // Which counters of a device are not zero is of the machine's past.
    if is_counters(line) {
        return "counters of errors".to_owned();
    }
    // Plots are figures altogether.
    if line.contains(" |") || line.contains(" +") {
        return "plot".to_owned();
    }
    for word in line.split_whitespace() {
        if is_hexadecimal(word) {
            words.push("#".to_owned());
            continue;
        }
        let mut plain = String::new();
        let mut chars = word.chars().peekable();
        while let Some(c) = chars.next() {
            if c.is_ascii_digit() {
                while chars.next_if(|c| c.is_ascii_digit() || *c == '.').is_some() {}
                plain.push('#');
                // Its unit, where it stands right behind it.
                let rest: String = chars.clone().collect();
                let unit = UNITS
                    .iter()
                    .filter(|unit| rest.trim_end_matches([',', ';', ')', '/']) == **unit)
                    .max_by_key(|u| u.len());
                if let Some(unit) = unit {
                    chars.by_ref().take(unit.len()).for_each(|_| {});
                }
            } else {
                plain.push(c);
            }
        }
        let bare = plain.trim_end_matches([',', ';', ')']);
        let is_unit = UNITS.contains(&bare);
        if is_unit && words.last().is_some_and(|last| last.ends_with('#')) {
            // `12 KiB` is `#`, as is `12KiB`.
            let tail = &plain[bare.len()..];
            if let Some(last) = words.last_mut() {
                last.push_str(tail);
            }
        } else if plain == "-" {
            words.push("#".to_owned());
        } else {
            words.push(plain);
        }
    }
    words.join(" ")
}

/// An address, or an incarnation.
fn is_hexadecimal(word: &str) -> bool {
    let bare = word.trim_end_matches([',', ';', ')']);
    let digits = bare.strip_prefix("0x").unwrap_or(bare);
    digits.len() >= 8 && digits.bytes().all(|b| b.is_ascii_hexdigit())
}

/// Only the figures may differ: without this, the comparison could not fail.
#[test]
fn figures_may_differ_and_words_may_not() {
    assert_eq!(normal_line("  moved 5.32 GB/s,  12 slices"), normal_line("moved 999 kB/s, 1 slices"));
    assert_eq!(normal_line("a 12.3us - up"), normal_line("a   1ns 4ms up"));
    assert_eq!(normal("a 1\na 2\nb"), normal("a 7\nb"));
    assert_eq!(normal_line("life 00c0ffee00c0ffee at 0x7f17833a9000"), "life # at #");
    assert_ne!(normal_line("moved 5 GB/s"), normal_line("sent 5 GB/s"));
    assert_ne!(normal("a\nb"), normal("a"));
    let counters = |list: &str| normal(&format!("port\n  counters of errors: {list}\n  more"));
    assert_eq!(counters("all 0"), counters("x_err 1,\n    y_err 2"));
    assert_ne!(counters("all 0"), counters("all 0\n  y"));
    let doctor = |finding: &str| normal(&format!("## moonrail doctor\n\nsystem\n  {finding}\n        more"));
    assert_eq!(doctor("PASS  memory: 1 GiB"), doctor("WARN  memory: little"));
    assert_ne!(doctor("PASS  memory: 1 GiB"), doctor("PASS  clock: right"));
}
