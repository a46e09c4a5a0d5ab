//! Results as JSON, with what is needed to repeat the experiment.

use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{SystemTime, UNIX_EPOCH};

use hdrhistogram::Histogram;
use serde_json::{Value, json};

/// One measured case.
pub(crate) struct Case {
    pub(crate) layer: &'static str,
    pub(crate) mode: &'static str,
    pub(crate) batch: usize,
    pub(crate) block: u64,
    pub(crate) rounds: u64,
    pub(crate) seed: u64,
    pub(crate) seconds: f64,
    pub(crate) work_requests: u64,
    pub(crate) doorbells: u64,
    pub(crate) completions: u64,
    /// Of every address used: two runs with one hash did the same work.
    pub(crate) hash: u64,
    pub(crate) times: Histogram<u64>,
}

impl Case {
    fn rate(&self) -> f64 {
        self.rounds as f64 / self.seconds.max(1e-9)
    }

    /// The head of the table.
    pub(crate) fn head() -> String {
        format!(
            "{:<7} {:<9} {:>5} {:>9} {:>9} {:>9} {:>10} {:>10} {:>11}",
            "layer", "mode", "batch", "p50 ns", "p99", "p99.9", "max", "batches/s", "slices/s"
        )
    }

    /// A line of the table.
    pub(crate) fn line(&self) -> String {
        let at = |quantile| self.times.value_at_quantile(quantile);
        format!(
            "{:<7} {:<9} {:>5} {:>9} {:>9} {:>9} {:>10} {:>10.0} {:>11.0}",
            self.layer,
            self.mode,
            self.batch,
            at(0.5),
            at(0.99),
            at(0.999),
            self.times.max(),
            self.rate(),
            self.rate() * self.batch as f64
        )
    }

    pub(crate) fn json(&self) -> Value {
        let at = |quantile| self.times.value_at_quantile(quantile);
        json!({
            "layer": self.layer, "poll_mode": self.mode, "batch": self.batch, "block_bytes": self.block, "rounds": self.rounds,
            "seed": self.seed, "work_hash": format!("{:016x}", self.hash), "seconds": self.seconds,
            "batches_per_second": self.rate(), "slices_per_second": self.rate() * self.batch as f64,
            "work_requests": self.work_requests, "doorbells": self.doorbells, "completions": self.completions,
            "nanoseconds": {
                "min": self.times.min(), "mean": self.times.mean(), "p50": at(0.5), "p90": at(0.9), "p99": at(0.99),
                "p99.9": at(0.999), "max": self.times.max(),
            },
        })
    }
}

/// What an experiment found: its cases, and what their times are of.
pub(crate) struct Found {
    pub(crate) unit: &'static str,
    pub(crate) cases: Vec<Value>,
}

/// Writes `<date>-<commit>-<machine>-<experiment>.json`.
pub(crate) fn save(folder: &Path, experiment: &str, found: &Found) -> io::Result<PathBuf> {
    std::fs::create_dir_all(folder)?;
    let (date, commit, machine) = (date(), commit(), machine());
    let path = folder.join(format!("{date}-{commit}-{}-{experiment}.json", slug(&machine)));
    let cpus = std::thread::available_parallelism().map_or(0, std::num::NonZero::get);
    let record = json!({
        "experiment": experiment,
        "date": date,
        "commit": commit,
        "machine": machine,
        "cpus": cpus,
        "kernel": first_line("/proc/sys/kernel/osrelease"),
        "load_average": first_line("/proc/loadavg"),
        "rustc": said("rustc", &["--version"]),
        "profile": if cfg!(debug_assertions) { "debug" } else { "release" },
        "unit": found.unit,
        "cases": found.cases,
    });
    std::fs::write(&path, format!("{record:#}\n"))?;
    Ok(path)
}

fn said(program: &str, words: &[&str]) -> String {
    let output = Command::new(program).args(words).output();
    let text = output.ok().filter(|output| output.status.success()).map(|output| output.stdout);
    text.map_or_else(|| "unknown".to_owned(), |text| String::from_utf8_lossy(&text).trim().to_owned())
}

fn commit() -> String {
    said("git", &["-C", env!("CARGO_MANIFEST_DIR"), "rev-parse", "--short=10", "HEAD"])
}

fn machine() -> String {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = info.lines().find(|line| line.starts_with("model name")).and_then(|line| line.split_once(':'));
    model.map_or_else(|| "unknown".to_owned(), |(_, name)| name.trim().to_owned())
}

fn slug(text: &str) -> String {
    let mut slug = String::new();
    for letter in text.chars().flat_map(char::to_lowercase) {
        if letter.is_ascii_alphanumeric() {
            slug.push(letter);
        } else if !slug.is_empty() && !slug.ends_with('-') {
            slug.push('-');
        }
    }
    slug.trim_end_matches('-').to_owned()
}

fn first_line(path: &str) -> String {
    std::fs::read_to_string(path).unwrap_or_default().lines().next().unwrap_or_default().to_owned()
}

/// Today, UTC.
fn date() -> String {
    let days = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs() / 86_400) + 719_468;
    // Howard Hinnant's civil_from_days: years begin in March, eras have 400 years.
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted = (5 * day_of_year + 2) / 153;
    let month = if shifted < 10 { shifted + 3 } else { shifted - 9 };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    format!("{year:04}-{month:02}-{:02}", day_of_year - (153 * shifted + 2) / 5 + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_can_be_read_back() {
        let mut times = Histogram::new_with_bounds(1, 1_000_000, 3).unwrap();
        times.record(500).unwrap();
        let case = Case {
            layer: "core",
            mode: "busy",
            batch: 1,
            block: 4096,
            rounds: 1,
            seed: 7,
            seconds: 1.0,
            work_requests: 1,
            doorbells: 1,
            completions: 1,
            hash: 1,
            times,
        };
        let folder = std::env::temp_dir().join(format!("moonrail-bench-{}", std::process::id()));
        let path = save(&folder, "handoff", &Found { unit: "ns", cases: vec![case.json()] }).unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        std::fs::remove_dir_all(&folder).unwrap();
        let record: Value = serde_json::from_str(&text).unwrap();
        assert_eq!(record["cases"][0]["nanoseconds"]["p50"], 500);
        assert_eq!(record["commit"], record["commit"].as_str().unwrap());
        let name = path.file_name().unwrap().to_str().unwrap();
        assert!(name.starts_with(record["date"].as_str().unwrap()), "{name}");
        assert_eq!(path.extension().unwrap(), "json");
    }

    #[test]
    fn machine_names_fit_into_file_names() {
        assert_eq!(slug("Intel(R) Xeon(R) CPU @ 2.20GHz"), "intel-r-xeon-r-cpu-2-20ghz");
    }
}
