//! docs/performance.md's tables, from the newest saved result of each experiment. What stands between
//! `<!-- NAME -->` and `<!-- /NAME -->` is written anew; the rest of the page is people's.

use std::error::Error;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use serde_json::Value;

/// How the cases of an experiment become a table.
type Table = fn(&[Value]) -> String;

const TABLES: [(&str, Table); 6] = [
    ("host", host),
    ("instructions", instructions),
    ("peers", peers),
    ("verbs", peers),
    ("scale", scale),
    ("control", control),
];

/// Writes the tables; returns the results that were taken.
pub(crate) fn write(page: &Path, results: &Path) -> Result<Vec<PathBuf>, Box<dyn Error>> {
    let mut text = std::fs::read_to_string(page).map_err(|e| format!("{}: {e}", page.display()))?;
    let mut taken = Vec::new();
    for (name, table) in TABLES {
        let Some(path) = newest(results, name)? else { continue };
        let record: Value = serde_json::from_str(&std::fs::read_to_string(&path)?)?;
        let cases = record["cases"].as_array().ok_or("no cases")?;
        let made = format!("{}\n\n{}", circumstances(&record), table(cases));
        text = replaced(&text, name, &made).ok_or_else(|| format!("{} has no place for {name}", page.display()))?;
        taken.push(path);
    }
    std::fs::write(page, text)?;
    Ok(taken)
}

/// File names begin with the date.
fn newest(results: &Path, experiment: &str) -> Result<Option<PathBuf>, Box<dyn Error>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(results)? {
        let path = entry?.path();
        if path.file_stem().and_then(|stem| stem.to_str()).is_some_and(|stem| stem.ends_with(&format!("-{experiment}")))
        {
            let written = std::fs::metadata(&path)?.modified()?;
            let date = path.file_name().map(|name| name.to_string_lossy().chars().take(10).collect::<String>());
            found.push((date, written, path));
        }
    }
    found.sort();
    Ok(found.pop().map(|(_, _, path)| path))
}

fn replaced(text: &str, name: &str, made: &str) -> Option<String> {
    let (begin, end) = (format!("<!-- {name} -->"), format!("<!-- /{name} -->"));
    let (before, rest) = text.split_once(&begin)?;
    let (_, after) = rest.split_once(&end)?;
    Some(format!("{before}{begin}\n{made}\n{end}{after}"))
}

/// On what and from what it was measured.
fn circumstances(record: &Value) -> String {
    let text = |key: &str| record[key].as_str().unwrap_or("unknown");
    format!(
        "Commit {}, {}, {} ({} processors), Linux {}, {}, load at its end {}.",
        text("commit"),
        text("date"),
        text("machine"),
        record["cpus"],
        text("kernel"),
        text("rustc").split(" (").next().unwrap_or_default(),
        text("load_average").split(' ').next().unwrap_or_default(),
    )
}

fn host(cases: &[Value]) -> String {
    let mut text = String::from(
        "| over | op | block × batch | data | p50 of a batch | GB/s | control | ratio (min–max) |\n|---|---|---|---|---|---|---|---|\n",
    );
    let of = |what: &'static str| cases.iter().filter(move |case| word(case, "what") == what);
    for case in cases.iter().filter(|case| case["what"].is_null()) {
        let _ = writeln!(
            text,
            "| {} | {} | {} | {} | {} | {} | {} | {} |",
            word(case, "fabric"),
            word(case, "op"),
            blocks(case),
            word(case, "data"),
            time(number(case, "p50_ns")),
            rate(number(case, "gb_per_second")),
            rate(number(case, "control_gb_per_second")),
            ratio(case),
        );
    }
    for case in of("latency") {
        let _ = write!(
            text,
            "\nOne {} of 64 bytes over {}, submitted and waited for, without the clock's own time: p50 {:.0} ns, p99 {:.0} ns; {} \
             {:.0} ns in the same run, a ratio of {}.\n",
            word(case, "op").to_uppercase(),
            word(case, "fabric"),
            number(case, "p50_ns"),
            number(case, "p99_ns"),
            if word(case, "fabric") == "tcp" {
                "64 bytes there and back between two bare sockets that never sleep"
            } else {
                "a cache line to the other processor and back"
            },
            number(case, "bare_round_trip_ns"),
            ratio(case),
        );
    }
    text.push_str(
        "\n| over | op | threads × batch of 64 KiB | GB/s | of one thread (min–max) |\n|---|---|---|---|---|\n",
    );
    for case in of("submitters") {
        let _ = writeln!(
            text,
            "| {} | {} | {} × {} | {} | {} |",
            word(case, "fabric"),
            word(case, "op"),
            case["threads"],
            case["batch"],
            rate(number(case, "gb_per_second")),
            ratio(case),
        );
    }
    text.trim_end().to_owned()
}

fn instructions(cases: &[Value]) -> String {
    let mut text = String::from("| op | block × batch | a batch | a request |\n|---|---|---|---|\n");
    for case in cases {
        let (batch, request) = (number(case, "instructions_per_batch"), number(case, "instructions_per_request"));
        let _ = writeln!(text, "| {} | {} | {batch:.0} | {request:.0} |", word(case, "op"), blocks(case));
    }
    text.trim_end().to_owned()
}

fn peers(cases: &[Value]) -> String {
    let mut text = String::from(
        "| over | op | block × batch | threads | beside | its GB/s | ours | ratio (min–max) |\n|---|---|---|---|---|---|---|---|\n",
    );
    for case in cases {
        let _ = writeln!(
            text,
            "| {} | {} | {} | {} | {} {} | {} | {} | {} |",
            word(case, "fabric"),
            word(case, "op"),
            blocks(case),
            case["threads"],
            word(case, "beside"),
            word(case, "version"),
            rate(number(case, "its_gb_per_second")),
            rate(number(case, "gb_per_second")),
            ratio(case),
        );
    }
    text.trim_end().to_owned()
}

fn control(cases: &[Value]) -> String {
    let mut text =
        String::from("| what | how many | a second (min–max) | one takes, p50 | p99 |\n|---|---|---|---|---|\n");
    let (idle, rates): (Vec<&Value>, Vec<&Value>) = cases.iter().partition(|case| !case["processor_share"].is_null());
    for case in rates {
        let of = |key| number(case, key);
        let one = |key| case[key].as_f64().map_or_else(|| "-".to_owned(), |us| time(us * 1000.0));
        let _ = writeln!(
            text,
            "| {} | {} | {:.0} ({:.0}–{:.0}) | {} | {} |",
            word(case, "what"),
            case["count"],
            of("per_second"),
            of("per_second_min"),
            of("per_second_max"),
            one("p50_us"),
            one("p99_us"),
        );
    }
    for case in idle {
        let share = number(case, "processor_share") * 100.0;
        let _ =
            write!(text, "\nOf {} engines that do nothing, each takes {share:.3} % of a processor.\n", case["count"]);
    }
    text.trim_end().to_owned()
}

/// A line for each thing, a column for each count.
fn scale(cases: &[Value]) -> String {
    let mut counts: Vec<u64> = cases.iter().filter_map(|case| case["count"].as_u64()).collect();
    counts.sort_unstable();
    counts.dedup();
    let mut whats: Vec<&str> = Vec::new();
    for case in cases {
        if !whats.contains(&word(case, "what")) {
            whats.push(word(case, "what"));
        }
    }
    let mut text = String::from("| |");
    for count in &counts {
        let _ = write!(text, " {count} |");
    }
    let _ = write!(text, "\n|---|{}", "---|".repeat(counts.len()));
    for what in whats {
        let _ = write!(text, "\n| {what} |");
        for count in &counts {
            let case = cases.iter().find(|case| word(case, "what") == what && case["count"].as_u64() == Some(*count));
            let cell = case.map_or_else(|| "-".to_owned(), |case| time(number(case, "ns")));
            let _ = write!(text, " {cell} |");
        }
    }
    text
}

fn word<'a>(case: &'a Value, key: &str) -> &'a str {
    case[key].as_str().unwrap_or("?")
}

fn number(case: &Value, key: &str) -> f64 {
    case[key].as_f64().unwrap_or(f64::NAN)
}

fn ratio(case: &Value) -> String {
    let of = |key| number(case, key);
    format!("{:.2} ({:.2}–{:.2})", of("ratio"), of("ratio_min"), of("ratio_max"))
}

fn blocks(case: &Value) -> String {
    let block = case["block"].as_u64().unwrap_or(0);
    let size = match block {
        0..1024 => format!("{block} B"),
        1024..1_048_576 => format!("{} KiB", block >> 10),
        _ => format!("{} MiB", block >> 20),
    };
    format!("{size} × {}", case["batch"])
}

/// Three digits that count.
fn rate(value: f64) -> String {
    let whole = value.abs().max(1e-9).log10().floor() as i32 + 1;
    format!("{value:.*}", usize::try_from(3 - whole).unwrap_or(0))
}

fn time(nanoseconds: f64) -> String {
    match nanoseconds {
        ..10_000.0 => format!("{nanoseconds:.0} ns"),
        ..10_000_000.0 => format!("{:.0} us", nanoseconds / 1e3),
        _ => format!("{:.0} ms", nanoseconds / 1e6),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_stands_between_the_marks_is_written_anew_and_nothing_else() {
        let folder = std::env::temp_dir().join(format!("moonrail-page-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let case = |ratio: f64| {
            json!({ "commit": "abc", "cpus": 2, "cases": [{
                "fabric": "tcp", "op": "read", "block": 65536, "batch": 32, "threads": 4, "beside": "Mooncake", "version": "0.3",
                "its_gb_per_second": 0.40, "gb_per_second": 4.256, "ratio": ratio, "ratio_min": 9.0, "ratio_max": 12.0,
            }]})
        };
        std::fs::write(folder.join("2026-01-02-x-peers.json"), case(10.5).to_string()).unwrap();
        std::fs::write(folder.join("2026-01-01-y-peers.json"), case(1.0).to_string()).unwrap();
        let page = folder.join("page.md");
        std::fs::write(&page, "before\n<!-- peers -->\nold\n<!-- /peers -->\nafter\n").unwrap();
        let taken = write(&page, &folder).unwrap();
        let text = std::fs::read_to_string(&page).unwrap();
        std::fs::remove_dir_all(&folder).unwrap();
        assert_eq!(taken.len(), 1);
        assert!(
            text.starts_with("before\n<!-- peers -->\nCommit abc,") && text.ends_with("\n<!-- /peers -->\nafter\n"),
            "{text}"
        );
        let row = "| tcp | read | 64 KiB × 32 | 4 | Mooncake 0.3 | 0.400 | 4.26 | 10.50 (9.00–12.00) |";
        assert!(text.lines().any(|line| line == row) && !text.contains("old"), "{text}");
    }

    #[test]
    fn growth_is_a_line_for_each_thing_and_a_column_for_each_count() {
        let case = |what: &str, count: u64, ns: f64| json!({ "what": what, "count": count, "ns": ns });
        let text = scale(&[case("a turn", 16, 31.6), case("a turn", 1, 30.2), case("a region", 16, 20_000_000.0)]);
        assert_eq!(text, "| | 1 | 16 |\n|---|---|---|\n| a turn | 30 ns | 32 ns |\n| a region | - | 20 ms |");
    }
}
