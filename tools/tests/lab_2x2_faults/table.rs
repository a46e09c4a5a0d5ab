//! What was measured: one row for each fault, for people and for `cargo xtask soak`.

use std::time::Duration;

use serde_json::json;

/// One fault.
#[derive(Clone, Debug)]
pub(crate) struct Row {
    pub(crate) fault: &'static str,
    /// How long verified traffic ran.
    pub(crate) seconds: f64,
    pub(crate) megabytes: f64,
    pub(crate) errors: usize,
    pub(crate) wrong: u64,
    /// Longest silence of the rails that the fault left alone, from the injection on.
    pub(crate) gap: Option<Measured>,
    /// From the return of what was lost until every rail carried slices again.
    pub(crate) back: Option<Measured>,
    /// Slowest batch.
    pub(crate) slowest: Duration,
    pub(crate) incidents: usize,
    /// Log lines of this node from the injection on, and the most of them that belong to one incident.
    pub(crate) lines: usize,
    pub(crate) lines_of_one: usize,
}

impl Row {
    /// Whether no rail could work: then a caller hears of it.
    pub(crate) fn may_fail(&self) -> bool {
        self.fault.starts_with("the peer killed")
    }
}

/// A time beside what it should be.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Measured {
    pub(crate) took: Duration,
    pub(crate) aim: Option<Duration>,
}

impl Measured {
    fn text(self) -> String {
        let took = self.took.as_millis();
        self.aim.map_or_else(|| format!("{took} ms"), |aim| format!("{took} ms ({})", aim.as_millis()))
    }
}

fn text(measured: Option<Measured>) -> String {
    measured.map_or_else(|| "-".to_owned(), Measured::text)
}

/// Prints them all: aims in brackets.
pub(crate) fn print(rows: &[Row]) {
    println!(
        "{:<36} {:>6} {:>6} {:>6} {:>6}  {:<16} {:<16} {:>9} {:>9} {:>6} {:>8}",
        "fault", "s", "MB", "errors", "wrong", "gap (aim)", "back (aim)", "slowest", "incidents", "lines", "of one"
    );
    for row in rows {
        println!(
            "{:<36} {:>6.1} {:>6.1} {:>6} {:>6}  {:<16} {:<16} {:>6} ms {:>9} {:>6} {:>8}",
            row.fault,
            row.seconds,
            row.megabytes,
            row.errors,
            row.wrong,
            text(row.gap),
            text(row.back),
            row.slowest.as_millis(),
            row.incidents,
            row.lines,
            row.lines_of_one
        );
    }
}

/// A line that a program reads.
pub(crate) fn result(row: &Row) {
    let millis = |measured: Option<Measured>| measured.map(|m| m.took.as_millis() as u64);
    let aim = |measured: Option<Measured>| measured.and_then(|m| Some(m.aim?.as_millis() as u64));
    crate::lab_support::result(&json!({
        "fault": row.fault,
        "seconds": (row.seconds * 10.0).round() / 10.0,
        "megabytes": (row.megabytes * 10.0).round() / 10.0,
        "errors": row.errors,
        "wrong_bytes": row.wrong,
        "gap_ms": millis(row.gap),
        "gap_aim_ms": aim(row.gap),
        "back_ms": millis(row.back),
        "back_aim_ms": aim(row.back),
        "slowest_ms": row.slowest.as_millis() as u64,
        "incidents": row.incidents,
        "lines": row.lines,
        "lines_of_one_incident": row.lines_of_one,
    }));
}

/// One line for all of a mix.
pub(crate) fn mix_result(rows: &[Row], took: Duration) {
    let longest =
        |of: fn(&Row) -> Option<Measured>| rows.iter().filter_map(of).map(|m| m.took.as_millis() as u64).max();
    crate::lab_support::result(&json!({
        "mix": "faults of the list at random under verified traffic",
        "seconds": took.as_secs(),
        "faults": rows.len(),
        "megabytes": rows.iter().map(|row| row.megabytes).sum::<f64>().round(),
        "errors_while_a_rail_worked": rows.iter().filter(|row| !row.may_fail()).map(|row| row.errors).sum::<usize>(),
        "errors_while_the_peer_was_dead": rows.iter().filter(|row| row.may_fail()).map(|row| row.errors).sum::<usize>(),
        "wrong_bytes": rows.iter().map(|row| row.wrong).sum::<u64>(),
        "longest_gap_ms": longest(|row| row.gap),
        "longest_back_ms": longest(|row| row.back),
        "incidents": rows.iter().map(|row| row.incidents).sum::<usize>(),
        "most_lines_of_one_incident": rows.iter().map(|row| row.lines_of_one).max(),
    }));
}
