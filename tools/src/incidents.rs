//! `moonrail incidents`: what went wrong on the rails of the engines that run on this host, and what came of it.

use std::fmt::Write as _;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant, UNIX_EPOCH};

use moonrail::inspect::{self, AskError, Request, VARIABLE};
use serde_json::{Value, json};

use crate::cli::IncidentsArgs;
use crate::failure::{Failure, Result};
use crate::say;
use crate::signal::Stop;
use crate::table::{Align, Table, wrap};
use crate::units;

/// Runs the subcommand.
pub fn run(args: &IncidentsArgs) -> Result<ExitCode> {
    let Some(every) = args.watch else { return show(args) };
    let stop = Stop::install()
        .map_err(|e| Failure::new(format!("signal handlers cannot be set: {e}"), "run it without --watch"))?;
    loop {
        if !args.json {
            say::line("\x1b[H\x1b[2J");
        }
        // Engines come and go while it watches.
        if let Err(e) = show(args) {
            say::line(e);
        }
        if stop.wait(Some(Instant::now() + every)) {
            return Ok(ExitCode::SUCCESS);
        }
    }
}

/// The engines that answered, and those that should have.
#[derive(Default)]
struct Found {
    engines: Vec<Value>,
    silent: Vec<(PathBuf, AskError)>,
}

fn find(args: &IncidentsArgs) -> Found {
    let mut found = Found::default();
    for socket in inspect::sockets(|name| std::env::var(name).ok()) {
        // The name's number is from the engine's own pid namespace: it decides only when nobody answers.
        let named = inspect::owner(&socket).map(|(pid, _)| pid);
        match inspect::ask(&socket, Request::Incidents) {
            Ok(engine) if is_meant(args, &engine) => found.engines.push(narrowed(engine, args.open)),
            Ok(_) | Err(AskError::Gone) => {}
            Err(error) if args.pid.is_none_or(|pid| named == Some(pid)) => found.silent.push((socket, error)),
            Err(_) => {}
        }
    }
    found
}

fn is_meant(args: &IncidentsArgs, reply: &Value) -> bool {
    let engine = &reply["engine"];
    args.name.as_deref().is_none_or(|name| engine["name"] == name) && args.pid.is_none_or(|pid| engine["pid"] == pid)
}

/// Without what is over, if only open incidents are wanted.
fn narrowed(mut reply: Value, only_open: bool) -> Value {
    if let Some(incidents) = reply["incidents"].as_array_mut() {
        incidents.retain(|incident| !only_open || incident["open"] == true);
    }
    reply
}

fn show(args: &IncidentsArgs) -> Result<ExitCode> {
    let found = find(args);
    for (socket, error) in &found.silent {
        eprintln!("warning: {}: {}", plain(&socket.to_string_lossy()), plain(&error.to_string()));
    }
    if args.json {
        say::line(format!("{:#}", json!({ "engines": found.engines })));
    } else if !found.engines.is_empty() {
        let texts: Vec<String> = found.engines.iter().map(|engine| text(engine, args.brief)).collect();
        say::line(texts.join("\n").trim_end());
    }
    if !found.engines.is_empty() && found.silent.is_empty() {
        return Ok(ExitCode::SUCCESS);
    }
    if found.engines.is_empty() { Err(nothing(args, &found)) } else { Ok(ExitCode::FAILURE) }
}

/// What to do about an engine that [`hangs`].
pub(crate) const HANGS: &str = "see whether its process is stopped (`ps -o stat= PID` says T; `kill -CONT PID` lets it go on) or \
                                hangs, then ask again";

/// Whether the engine is there, and does not answer.
pub(crate) fn hangs(error: &AskError) -> bool {
    matches!(error, AskError::Silent(source) if source.kind() == std::io::ErrorKind::TimedOut)
}

fn nothing(args: &IncidentsArgs, found: &Found) -> Failure {
    let folders = inspect::folders(|name| std::env::var(name).ok());
    let folders = folders.iter().map(|folder| folder.display().to_string()).collect::<Vec<_>>().join(", ");
    let cause = match (&args.name, args.pid) {
        (None, None) => "no running engine can be read on this host".to_owned(),
        (Some(name), None) => format!("no running engine called {name} can be read on this host"),
        (_, Some(pid)) => format!("no engine that was asked for can be read in process {pid}"),
    };
    if found.silent.iter().any(|(_, error)| hangs(error)) {
        return Failure::new(cause, HANGS);
    }
    if folders.is_empty() {
        return Failure::new(cause, format!("unset {VARIABLE}, which switches it off here"));
    }
    let next = format!(
        "run it as the engine's user or as root, in the same mount namespace; an engine offers its socket in {folders} unless \
         it was built with `inspect(false)` or {VARIABLE} says otherwise"
    );
    Failure::new(cause, next)
}

/// One engine and its incidents, for people.
fn text(reply: &Value, brief: bool) -> String {
    let engine = &reply["engine"];
    let none = Vec::new();
    let incidents = reply["incidents"].as_array().unwrap_or(&none);
    let open = incidents.iter().filter(|incident| incident["open"] == true).count();
    let mut text = format!(
        "{}: process {}, up {}, incarnation {}\n",
        word(&engine["name"]),
        engine["pid"],
        waited(&engine["uptime_s"]),
        word(&engine["incarnation"])
    );
    let _ = match incidents.len() {
        0 => writeln!(text, "no incidents"),
        1 => writeln!(text, "1 incident, {}", if open == 1 { "open" } else { "over" }),
        many => writeln!(text, "{many} incidents, {open} of them open"),
    };
    if incidents.is_empty() {
        return text;
    }
    text.push('\n');
    if brief {
        text.push_str(&table(engine, incidents));
    } else {
        for incident in incidents {
            text.push_str(&block(engine, incident));
        }
    }
    text
}

fn table(engine: &Value, incidents: &[Value]) -> String {
    let mut table = Table::new(&[
        ("#", Align::Right),
        ("opened (UTC)", Align::Left),
        ("ago", Align::Right),
        ("lasted", Align::Right),
        ("state", Align::Left),
        ("rail", Align::Left),
    ]);
    for incident in incidents {
        table.row([
            incident["number"].to_string(),
            opened(incident),
            ago(engine, incident),
            waited(&incident["lasted_s"]),
            state(incident).to_owned(),
            rail(incident),
        ]);
    }
    table.render(0)
}

fn block(engine: &Value, incident: &Value) -> String {
    let mut text = format!(
        "#{} {}  {} UTC, {} ago\n",
        incident["number"],
        if incident["open"] == true {
            format!("open for {}", waited(&incident["lasted_s"]))
        } else {
            format!("closed after {}", waited(&incident["lasted_s"]))
        },
        opened(incident),
        ago(engine, incident)
    );
    let mut line = |name: &str, told: &str| {
        for (at, part) in wrap(told, 64).iter().enumerate() {
            let _ = writeln!(text, "  {:<12}{part}", if at == 0 { name } else { "" });
        }
    };
    line("rail", &rail(incident));
    if let Some(words) = incident["status_text"].as_str() {
        let vendor = incident["vendor"].as_u64().unwrap_or(0);
        line("status", &format!("{} ({}, vendor {vendor:#x})", plain(words), incident["status"]));
        let age = incident["request_age_s"].as_f64().unwrap_or(0.0);
        let age = units::span(Duration::try_from_secs_f64(age).unwrap_or_default().as_nanos() as u64);
        line("request", &format!("{age} old; {} came back flushed", incident["flushed"]));
    }
    let attempts = incident["failed_attempts"].as_u64().unwrap_or(0);
    let word_of = if attempts == 1 { "attempt" } else { "attempts" };
    line("charged to", &format!("the {}; {attempts} failed {word_of} to connect since", word(&incident["charged_to"])));
    line("decided", &word(&incident["decision"]));
    line("cause", &word(&incident["cause"]));
    text.push('\n');
    text
}

fn state(incident: &Value) -> &'static str {
    if incident["open"] == true { "open" } else { "closed" }
}

fn rail(incident: &Value) -> String {
    format!("{} to {}@{}", word(&incident["nic"]), word(&incident["peer"]), word(&incident["peer_nic"]))
}

/// To the second, without the T: it is read by people.
fn opened(incident: &Value) -> String {
    let since = Duration::try_from_secs_f64(incident["opened_unix_s"].as_f64().unwrap_or(0.0)).unwrap_or_default();
    let text = UNIX_EPOCH.checked_add(since).map_or_else(String::new, moonrail::log::utc);
    text.chars().take(19).collect::<String>().replace('T', " ")
}

/// By the engine's own clock, which nobody sets.
fn ago(engine: &Value, incident: &Value) -> String {
    let at = |value: &Value| value.as_f64().unwrap_or(0.0);
    units::waited(at(&engine["uptime_s"]) - at(&incident["opened_uptime_s"]))
}

fn waited(seconds: &Value) -> String {
    units::waited(seconds.as_f64().unwrap_or(0.0))
}

fn word(value: &Value) -> String {
    plain(value.as_str().unwrap_or("?"))
}

/// Without what a terminal would obey: names come from other nodes, and root reads the engines of every user.
fn plain(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reply() -> Value {
        let incident = |number: u64, open: bool| {
            json!({
                "number": number, "open": open, "opened_unix_s": 1_795_344_423.5, "opened_uptime_s": 100.0, "lasted_s": 12.4,
                "nic": "mlx5_0", "peer": "10.20.30.40:15428", "peer_nic": "mlx5_bond_1", "status": 12,
                "status_text": "transport retry counter exceeded", "vendor": 0x81, "request_age_s": 1.5, "flushed": 7,
                "failed_attempts": 2, "charged_to": "pair", "decision": "connected anew with back-off",
                "cause": "the peer's NIC does not answer ".repeat(8),
            })
        };
        json!({
            "protocol": 1,
            "engine": { "name": "store\u{1b}[2J", "pid": 4711, "uptime_s": 4000.0, "incarnation": "00c0ffee00c0ffee" },
            "incidents": [incident(1, false), incident(2, true)],
        })
    }

    #[test]
    fn every_line_fits_and_no_name_reaches_the_terminal_as_a_command() {
        for brief in [false, true] {
            let text = text(&reply(), brief);
            assert!(text.lines().all(|line| line.chars().count() <= 80), "{text}");
            assert!(!text.contains('\u{1b}'), "{text}");
        }
    }

    #[test]
    fn a_block_tells_all_of_an_incident() {
        let text = text(&reply(), false);
        for part in [
            "process 4711, up 1 h 6 min, incarnation 00c0ffee00c0ffee",
            "2 incidents, 1 of them open",
            "#1 closed after 12.4 s  2026-11-22 10:47:03 UTC, 1 h 5 min ago",
            "#2 open for 12.4 s",
            "rail        mlx5_0 to 10.20.30.40:15428@mlx5_bond_1",
            "status      transport retry counter exceeded (12, vendor 0x81)",
            "request     1500.00 ms old; 7 came back flushed",
            "charged to  the pair; 2 failed attempts to connect since",
            "decided     connected anew with back-off",
        ] {
            assert!(text.contains(part), "{part}:\n{text}");
        }
    }

    #[test]
    fn what_is_over_can_be_left_out() {
        let open = narrowed(reply(), true);
        assert_eq!(open["incidents"].as_array().map(Vec::len), Some(1));
        assert!(text(&open, true).contains("1 incident, open"));
    }

    #[test]
    fn a_reply_with_members_of_another_kind_is_shown_as_far_as_it_goes() {
        let odd = json!({ "engine": { "name": 3 }, "incidents": [{ "number": "x", "lasted_s": -1e300, "opened_unix_s": 1e300 }] });
        assert!(text(&odd, false).contains("1 incident") && text(&odd, true).contains("closed"));
    }
}
