//! From measured lines to the tables of the page. Pure.

use std::fmt::Write as _;

use serde_json::Value;

/// Smallest, middle and largest of the numbers that there are.
fn spread(mut values: Vec<u64>) -> String {
    values.sort_unstable();
    match (values.first(), values.last()) {
        (Some(least), Some(most)) => format!("{least} / {} / {most}", values[values.len() / 2]),
        _ => "-".to_owned(),
    }
}

/// One row per fault over all runs, in the order in which they came.
pub(super) fn faults(rows: &[Value]) -> String {
    let mut names: Vec<&str> = Vec::new();
    for name in rows.iter().filter_map(|row| row["fault"].as_str()) {
        if !names.contains(&name) {
            names.push(name);
        }
    }
    let mut text = "Milliseconds: least / median / most over the runs; aims beside them. Gap: longest silence of the rails that \
                    the fault left alone, from the injection on. Back: from the return until every rail carried slices.\n\n\
                    | Fault | Runs | Traffic, MB | Errors | Wrong bytes | Gap | Aim | Back | Aim | Slowest batch | Incidents | Log lines \
                    | Most lines of one incident |\n|---|---|---|---|---|---|---|---|---|---|---|---|---|\n"
        .to_owned();
    for name in names {
        let of_it: Vec<&Value> = rows.iter().filter(|row| row["fault"] == name).collect();
        let numbers = |key: &str| -> Vec<u64> { of_it.iter().filter_map(|row| row[key].as_u64()).collect() };
        let sum = |key: &str| numbers(key).iter().sum::<u64>();
        let one = |key: &str| of_it.iter().find_map(|row| row[key].as_u64()).map_or("-".to_owned(), |n| n.to_string());
        let megabytes: f64 = of_it.iter().filter_map(|row| row["megabytes"].as_f64()).sum();
        let _ = writeln!(
            text,
            "| {name} | {} | {megabytes:.0} | {} | {} | {} | {} | {} | {} | {} | {} | {} | {} |",
            of_it.len(),
            sum("errors"),
            sum("wrong_bytes"),
            spread(numbers("gap_ms")),
            one("gap_aim_ms"),
            spread(numbers("back_ms")),
            one("back_aim_ms"),
            spread(numbers("slowest_ms")),
            spread(numbers("incidents")),
            spread(numbers("lines")),
            numbers("lines_of_one_incident").into_iter().max().unwrap_or(0),
        );
    }
    text
}

/// Every line as a small table of its own, in the words of the test.
pub(super) fn plain(rows: &[Value]) -> String {
    let mut text = String::new();
    for row in rows.iter().filter_map(Value::as_object) {
        text.push_str("| | |\n|---|---|\n");
        for (key, value) in row {
            let value = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
            let _ = writeln!(text, "| {} | {value} |", key.replace('_', " "));
        }
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fault_has_one_row_over_all_runs() {
        let row = |gap: u64| serde_json::json!({"fault": "link", "megabytes": 1.5, "errors": 1, "gap_ms": gap, "gap_aim_ms": 500, "back_ms": null});
        let text = faults(&[row(30), row(10), row(20)]);
        assert!(text.ends_with("| link | 3 | 4 | 3 | 0 | 10 / 20 / 30 | 500 | - | - | - | - | - | 0 |\n"), "{text}");
    }

    #[test]
    fn other_lines_are_told_as_they_are() {
        let text = plain(&[serde_json::json!({"canaries_hit": 0, "late": "fence on"})]);
        assert_eq!(text, "| | |\n|---|---|\n| canaries hit | 0 |\n| late | fence on |\n\n");
    }
}
