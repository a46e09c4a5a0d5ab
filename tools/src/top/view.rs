//! The screen of `moonrail top`, as lines: at 80 columns what matters, in wider ones the rest.

use std::fmt::Write as _;

use super::reading::{Change, Counts, Row};
use super::terminal::{Line, Style};
use crate::units;

/// Every terminal has as many.
const NARROW: usize = 80;
/// From here on there is room for everything.
const WIDE: usize = 132;
/// Of the first column.
const NAME: usize = 21;
const NAME_WIDE: usize = 52;

/// The lines for a terminal of this width; names and causes are cut to it.
pub fn lines(change: &Change, width: usize) -> Vec<Line> {
    let width = width.max(NARROW);
    let wide = width >= WIDE;
    let mut page = Page { lines: Vec::new(), width };
    head(&mut page, change);
    let (groups, columns) = titles("NIC", wide, true);
    page.line(Style::Head, &groups);
    page.line(Style::Head, &columns);
    for nic in &change.nics {
        let name =
            format!("{}{}", nic.nic, if nic.nic == nic.fabric { String::new() } else { format!(" ({})", nic.fabric) });
        page.line(Style::Plain, &row(&name, nic, change.seconds, wide));
    }
    if change.nics.len() > 1 {
        let total = Row { counts: change.total.clone(), lives: change.rails.len() as u64, ..Row::default() };
        page.line(Style::Plain, &row("all", &total, change.seconds, wide));
    }
    page.line(Style::Plain, "");
    if change.rails.is_empty() {
        page.line(Style::Plain, "no rails: this engine has moved nothing, and no peer has connected");
        return page.lines;
    }
    page.line(Style::Head, &titles("RAIL", wide, false).1);
    let mut peer = None;
    for rail in &change.rails {
        let style = if rail.usable || rail.state == "evicted" { Style::Plain } else { Style::Bad };
        // A peer's name needs room: in a wide row it has it, else a line of its own.
        if !wide && peer != Some(&rail.peer) {
            page.line(Style::Plain, &format!("to {}", rail.peer));
            peer = Some(&rail.peer);
        }
        page.line(style, &row(&rail_name(rail, wide), rail, change.seconds, wide));
        // Where the state has a column of one word only, the trouble stands below.
        if let Some((_, trouble)) = rail.state.split_once(": ").filter(|_| !wide) {
            page.line(style, &format!("    {trouble}"));
        }
    }
    page.lines
}

struct Page {
    lines: Vec<Line>,
    width: usize,
}

impl Page {
    fn line(&mut self, style: Style, text: &str) {
        let cut = cut_end(text, self.width);
        self.lines.push(Line { text: cut.trim_end().to_owned(), style });
    }
}

fn head(page: &mut Page, change: &Change) {
    let since = if change.since_start { "since its start".to_owned() } else { format!("last {:.1} s", change.seconds) };
    let now = &change.now;
    page.line(
        Style::Plain,
        &format!("moonrail top - {}, process {}, up {}; {since}", now.name, now.pid, units::waited(now.uptime)),
    );
    let total = &change.total;
    page.line(
        Style::Plain,
        &format!(
            "moved {}B/s, {} slices/s; in flight {} slices, {}; came back {}",
            units::short(total.bytes as f64 / change.seconds),
            units::short(total.slices as f64 / change.seconds),
            total.out_slices,
            units::size(total.out_bytes),
            total.returned,
        ),
    );
    let busy = change.busy.map_or("none turned".to_owned(), |busy| format!("{:.0} % of turns busy", busy * 100.0));
    let mut cores = format!("cores {}: {busy}, slept {}x", change.cores(), change.sleeps);
    let (copies, bytes) = change.copied;
    if copies > 0 {
        let rate = units::short(bytes as f64 / change.seconds);
        let _ = write!(cores, "; callers' own copies {rate}B/s");
    }
    page.line(Style::Plain, &cores);
    let (seen, open) = change.incidents();
    let style = if open.is_empty() { Style::Plain } else { Style::Bad };
    page.line(style, &format!("incidents {seen}, open {}", open.len()));
    for (number, seconds, rail, cause) in open.iter().take(3) {
        page.line(Style::Bad, &format!("  #{number} for {}, {rail}: {cause}", units::waited(*seconds)));
    }
    page.line(Style::Plain, "");
}

/// Two lines above a table: groups, and columns.
fn titles(first: &str, wide: bool, of_nics: bool) -> (String, String) {
    let (again, state) = (if of_nics { "rails" } else { "lives" }, if of_nics { "" } else { "state" });
    if wide {
        let blank = "";
        (
            format!(
                "{blank:<NAME_WIDE$} {blank:>6} {blank:>6} {:>11} {:>17} {:>17}",
                "in flight", "queue time", "wire time"
            ),
            format!(
                "{first:<NAME_WIDE$} {:>6} {:>6} {:>5} {:>5} {:>5} {:>5} {:>5} {:>5} {:>5} {:>5} {:>5} {:>5} {:>5} {:>5} {:>5} {:>5} {state}",
                "B/s",
                "slc/s",
                "slc",
                "bytes",
                "p50",
                "p99",
                "max",
                "p50",
                "p99",
                "max",
                "back",
                "fail",
                "cap",
                "rtt",
                "MTU",
                again
            ),
        )
    } else {
        let blank = "";
        (
            format!(
                "{blank:<NAME$} {blank:>5} {blank:>5} {:>10} {:>11} {:>11}",
                "in flight", "queue time", "wire time"
            ),
            format!(
                "{first:<NAME$} {:>5} {:>5} {:>4} {:>5} {:>5} {:>5} {:>5} {:>5} {:>5} {state}",
                "B/s", "slc/s", "slc", "bytes", "p50", "p99", "p50", "p99", "back"
            ),
        )
    }
}

fn row(name: &str, row: &Row, seconds: f64, wide: bool) -> String {
    let Counts { bytes, slices, out_slices, out_bytes, returned, first_errors, queue, wire, .. } = &row.counts;
    let time = |spread: &moonrail::Spread, at: f64| spread.quantile(at).map_or("-".to_owned(), units::short_span);
    let rate = |n: u64| if n == 0 { "-".to_owned() } else { units::short(n as f64 / seconds) };
    let back = units::short(*returned as f64);
    let slc = units::short(*out_slices as f64);
    let out = units::short_binary(*out_bytes);
    let word = row.state.split([':', ' ']).next().unwrap_or_default();
    if wide {
        let cap = units::short_binary(row.cap);
        let rtt = if row.round_trip == 0 { "-".to_owned() } else { units::short_span(row.round_trip) };
        let mtu = row.mtu.map_or("-".to_owned(), |mtu| mtu.to_string());
        let state = if row.peer.is_empty() { "" } else { row.state.as_str() };
        format!(
            "{:<NAME_WIDE$} {:>6} {:>6} {slc:>5} {out:>5} {:>5} {:>5} {:>5} {:>5} {:>5} {:>5} {back:>5} {:>5} {cap:>5} {rtt:>5} {mtu:>5} {:>5} {state}",
            cut_middle(name, NAME_WIDE),
            rate(*bytes),
            rate(*slices),
            time(queue, 0.5),
            time(queue, 0.99),
            time(queue, 1.0),
            time(wire, 0.5),
            time(wire, 0.99),
            time(wire, 1.0),
            units::short(*first_errors as f64),
            row.lives,
        )
    } else {
        let word = if row.peer.is_empty() { "" } else { word };
        format!(
            "{:<NAME$} {:>5} {:>5} {slc:>4} {out:>5} {:>5} {:>5} {:>5} {:>5} {back:>5} {}",
            cut_middle(name, NAME),
            rate(*bytes),
            rate(*slices),
            time(queue, 0.5),
            time(queue, 0.99),
            time(wire, 0.5),
            time(wire, 0.99),
            cut_end(word, 5),
        )
    }
}

/// Our NIC, the peer in a wide row, and its NIC where that has another name.
fn rail_name(rail: &Row, wide: bool) -> String {
    let Row { nic, peer, peer_nic, .. } = rail;
    match (wide, nic == peer_nic) {
        (true, true) => format!("{nic} to {peer}"),
        (true, false) => format!("{nic} to {peer}@{peer_nic}"),
        (false, true) => format!("  {nic}"),
        (false, false) => format!("  {nic}>{peer_nic}"),
    }
}

fn cut_end(text: &str, width: usize) -> String {
    text.chars().take(width).collect()
}

/// A long name keeps both its ends: hosts differ at theirs, NICs at theirs.
fn cut_middle(text: &str, width: usize) -> String {
    let all: Vec<char> = text.chars().collect();
    if all.len() <= width {
        return text.to_owned();
    }
    let front = (width - 1) / 3;
    let back = width - 1 - front;
    all[..front].iter().chain(&['~']).chain(&all[all.len() - back..]).collect()
}

#[cfg(test)]
mod tests {
    use super::super::reading::Reading;
    use super::*;
    use serde_json::{Value, json};

    fn reply(uptime: f64, scale: u64) -> Value {
        let rail = |peer: &str, state: &str| {
            json!({
                "nic": "mlx5_bond_0", "peer": peer, "peer_nic": "mlx5_bond_1", "fabric": "rdma", "state": state,
                "usable": state == "up", "core": 0, "path_mtu": 4096, "lives": 2, "bytes": 50_000_000_000u64 * scale,
                "slices": 800_000 * scale, "in_flight_slices": 32, "in_flight_bytes": 2 << 20, "returned": 7,
                "first_errors": 1, "flushes": 6, "cap_bytes": 4 << 20, "round_trip_ns": 9000,
                "queue_ns": { "sum": 1, "counts": [[1024, 900 * scale], [131_072, 9 * scale]] },
                "wire_ns": { "sum": 1, "counts": [[9216, 900 * scale], [1_048_576, 19 * scale]] },
            })
        };
        json!({
            "protocol": 1,
            "engine": { "name": "store\u{1b}[2J", "pid": 4711, "uptime_s": uptime },
            "nics": [
                { "name": "mlx5_bond_0", "fabric": "rdma", "cores": [0], "registered": 1 << 30 },
                { "name": "tcp", "fabric": "tcp", "cores": [0], "registered": 0 },
            ],
            "rails": [rail("10.20.30.40:15428", "up"), rail("10.20.30.41:15428", "waiting: the peer's NIC does not answer: its port, a cable, a firewall on UDP port 4791")],
            "cores": [{ "busy_turns": 90 * scale, "idle_turns": 10 * scale, "sleeps": scale }],
            "callers": { "copies": 3, "bytes": 4096 },
            "incidents": [{ "number": 3, "open": true, "lasted_s": 12.4, "nic": "mlx5_bond_0", "peer": "10.20.30.41:15428", "peer_nic": "mlx5_bond_1", "cause": "no answer ".repeat(20) }],
            "incidents_seen": 3,
        })
    }

    fn change() -> Change {
        Change::new(Some(&Reading::new(&reply(100.0, 1))), Reading::new(&reply(102.0, 2)))
    }

    fn text(width: usize) -> String {
        lines(&change(), width).into_iter().map(|line| line.text + "\n").collect()
    }

    #[test]
    fn every_line_fits_at_any_width_and_no_name_is_obeyed() {
        for width in [1, 80, 100, 131, 132, 200, 400] {
            let text = text(width);
            assert!(text.lines().all(|line| line.chars().count() <= width.max(80)), "{width}:\n{text}");
            assert!(!text.contains('\u{1b}'), "{text}");
        }
    }

    #[test]
    fn rates_are_of_the_time_between_and_quantiles_too() {
        let text = text(80);
        for part in [
            "process 4711, up 1 min 42 s; last 2.0 s",
            "moved 50.0GB/s, 800k slices/s; in flight 64 slices, 4 MiB; came back 14",
            "cores 1: 90 % of turns busy, slept 1x",
            "incidents 3, open 1",
            "  #3 for 12.4 s, mlx5_bond_0 to 10.20.30.41:15428@mlx5_bond_1: no answer",
            "to 10.20.30.40:15428\n  mlx5~_0>mlx5_bond_1 25.0G  400k   32  2.0M 1.0us 1.0us 9.2us 1.0ms     7 up",
            "    the peer's NIC does not answer: its port, a cable",
        ] {
            assert!(text.contains(part), "{part}:\n{text}");
        }
    }

    #[test]
    fn a_wide_screen_has_the_rest() {
        let text = text(200);
        let rail = text.lines().find(|line| line.contains("mlx5_bond_0 to 10.20.30.40:15428@mlx5_bond_1 ")).unwrap();
        assert!(rail.contains("4096") && rail.contains("9.0us") && rail.ends_with("2 up"), "{rail}");
        assert!(text.contains("2 waiting: the peer's NIC does not answer"), "{text}");
    }

    #[test]
    fn a_first_reading_and_a_restarted_engine_count_from_the_start() {
        let first = Change::new(None, Reading::new(&reply(10.0, 1)));
        assert!(first.since_start && (first.seconds - 10.0).abs() < 1e-9);
        assert_eq!(first.total.bytes, 100_000_000_000);
        let again = Change::new(Some(&Reading::new(&reply(100.0, 2))), Reading::new(&reply(10.0, 1)));
        assert!(again.since_start);
        assert_eq!(again.json()["rails"][0]["bytes_per_second"], 5e9);
    }

    #[test]
    fn a_reply_without_members_is_shown_as_far_as_it_goes() {
        let odd = Reading::new(&json!({ "engine": {}, "rails": [{}], "nics": "x", "cores": [{}] }));
        assert!(!lines(&Change::new(None, odd), 80).is_empty());
        let empty = lines(&Change::new(None, Reading::new(&json!({ "engine": {} }))), 80);
        assert!(empty.iter().any(|line| line.text.starts_with("no rails")));
    }
}
