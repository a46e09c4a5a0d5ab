//! `moonrail top`: a live view of one engine of this host, read over its local socket.
//!
//! [`reading`] makes figures of two replies, [`view`] lines of figures, [`terminal`] shows them. A thread of its own asks, so
//! that keys are answered while an engine is slow to.

pub mod reading;
pub mod terminal;
pub mod view;

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, TryRecvError};
use std::time::{Duration, Instant};

use moonrail::inspect::{self, AskError, Request};
use serde_json::Value;

use crate::cli::TopArgs;
use crate::failure::{Failure, Result};
use crate::incidents;
use crate::say;
use crate::signal::Stop;
use reading::{Change, Reading};
use terminal::{Key, Line, Style, Terminal};

/// How often the screen looks at keys, the terminal's size, and what was read.
const LOOK_EVERY: Duration = Duration::from_millis(100);
/// Columns of lines that go to a file or a pipe.
const PLAIN: usize = 80;

/// Runs the subcommand.
pub fn run(args: &TopArgs) -> Result<ExitCode> {
    let socket = find(args.engine.as_deref())?;
    let stop = Stop::install()
        .map_err(|e| Failure::new(format!("signal handlers cannot be set: {e}"), "run it with --once"))?;
    let readings = read_on(socket, args.interval)?;
    if args.once {
        return once(args, &readings, &stop);
    }
    let terminal = if args.json { None } else { Terminal::open().map_err(|error| no_terminal(&error))? };
    match terminal {
        Some(terminal) => live(terminal, &readings, &stop),
        None => plain(args, &readings, &stop),
    }
}

fn no_terminal(error: &std::io::Error) -> Failure {
    Failure::new(format!("the terminal cannot be set: {error}"), "run it with --once, or with `| cat`")
}

/// The socket of the engine that is meant: of this process, or of this name, or the only one.
fn find(wanted: Option<&str>) -> Result<PathBuf> {
    let read = |name: &str| std::env::var(name).ok();
    let mut found: Vec<(PathBuf, Value)> = Vec::new();
    let (mut silent, mut hangs) = (Vec::new(), false);
    for socket in inspect::sockets(read) {
        match inspect::ask(&socket, Request::Engine) {
            Ok(reply) => found.push((socket, reply["engine"].clone())),
            Err(AskError::Gone) => {}
            Err(error) => {
                hangs |= incidents::hangs(&error);
                silent.push(format!("{}: {error}", socket.display()));
            }
        }
    }
    let is_meant = |engine: &Value| {
        let is_pid = |wanted: &str| wanted.parse::<u64>().is_ok_and(|pid| engine["pid"] == pid);
        wanted.is_none_or(|wanted| engine["name"] == wanted || is_pid(wanted))
    };
    let (mut meant, others): (Vec<_>, Vec<_>) = found.into_iter().partition(|(_, engine)| is_meant(engine));
    let list = |engines: &[(PathBuf, Value)]| {
        let one =
            |(_, engine): &(PathBuf, Value)| format!("{} {}", engine["pid"], engine["name"].as_str().unwrap_or("?"));
        engines.iter().map(one).collect::<Vec<_>>().join(", ")
    };
    if meant.len() > 1 {
        return Err(Failure::usage(
            format!("{} engines are meant: {}", meant.len(), list(&meant)),
            "give the process or the name of one: `moonrail top PID`, `moonrail top NAME`",
        ));
    }
    if let Some((socket, _)) = meant.pop() {
        return Ok(socket);
    }
    let asked = wanted.map_or("no running engine".to_owned(), |wanted| format!("no running engine {wanted}"));
    let mut cause = format!("{asked} can be read on this host");
    if !others.is_empty() {
        cause = format!("{cause}; there are: {}", list(&others));
    }
    if !silent.is_empty() {
        cause = format!("{cause}; {}", silent.join("; "));
    }
    if hangs {
        return Err(Failure::new(cause, incidents::HANGS));
    }
    Err(Failure::new(
        cause,
        format!(
            "run it as the engine's user or as root, in the same mount namespace; {} names the folder of the sockets if it \
             is not the usual one",
            inspect::VARIABLE
        ),
    ))
}

type Read = std::result::Result<Reading, AskError>;

/// Asks the engine every so often, on a thread of its own, until nobody listens or the engine is gone.
fn read_on(socket: PathBuf, every: Duration) -> Result<Receiver<Read>> {
    // One is enough: who does not take a reading gets the next one later.
    let (give, take) = mpsc::sync_channel(1);
    let body = move || {
        loop {
            let next = Instant::now() + every;
            let read = ask(&socket);
            let gone = matches!(read, Err(AskError::Gone));
            if give.send(read).is_err() || gone {
                return;
            }
            std::thread::sleep(next.saturating_duration_since(Instant::now()));
        }
    };
    std::thread::Builder::new()
        .name("mr-top".into())
        .spawn(body)
        .map_err(|e| Failure::new(format!("no thread can be started: {e}"), "see `ulimit -u`"))?;
    Ok(take)
}

fn ask(socket: &Path) -> Read {
    inspect::ask(socket, Request::Live).map(|reply| Reading::new(&reply))
}

/// The engine cannot be read any more.
fn ended(last: Option<&Reading>, error: &AskError) -> Failure {
    let who = last.map_or("the engine".to_owned(), |last| format!("{} (process {})", last.name, last.pid));
    let next = match error {
        AskError::Gone => "its log says how it ended; `moonrail top` without a name finds those that run",
        _ => "`moonrail doctor` on this host, or the log of the engine",
    };
    Failure::new(format!("{who}: {error}"), next)
}

/// Two readings, an interval apart, and what happened between them.
fn once(args: &TopArgs, readings: &Receiver<Read>, stop: &Stop) -> Result<ExitCode> {
    let mut first = None;
    while !stop.is_asked() {
        match readings.recv_timeout(LOOK_EVERY) {
            Ok(Ok(reading)) => match first.take() {
                None => first = Some(reading),
                Some(before) => {
                    let change = Change::new(Some(&before), reading);
                    if args.json {
                        say::line(format!("{:#}", change.json()));
                    } else {
                        say::line(text(&change).trim_end());
                    }
                    return Ok(ExitCode::SUCCESS);
                }
            },
            Ok(Err(error)) => return Err(ended(first.as_ref(), &error)),
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return Err(ended(first.as_ref(), &AskError::Gone)),
        }
    }
    Err(Failure::new("a signal ended it early", "run it again"))
}

fn text(change: &Change) -> String {
    view::lines(change, PLAIN).into_iter().map(|line| line.text + "\n").collect()
}

/// A page or an object after the other, for a file or a pipe.
fn plain(args: &TopArgs, readings: &Receiver<Read>, stop: &Stop) -> Result<ExitCode> {
    let mut before: Option<Reading> = None;
    while !stop.is_asked() {
        match readings.recv_timeout(LOOK_EVERY) {
            Ok(Ok(reading)) => {
                let change = Change::new(before.as_ref(), reading);
                say::line(if args.json { change.json().to_string() } else { text(&change) });
                before = Some(change.now);
            }
            Ok(Err(error @ AskError::Gone)) => return Err(ended(before.as_ref(), &error)),
            Ok(Err(error)) => eprintln!("warning: {error}"),
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return Err(ended(before.as_ref(), &AskError::Gone)),
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// The screen, until it is left.
fn live(mut terminal: Terminal, readings: &Receiver<Read>, stop: &Stop) -> Result<ExitCode> {
    let mut change: Option<Change> = None;
    let mut trouble: Option<String> = None;
    let (mut offset, mut shown) = (0usize, (0, 0));
    let mut stale = true;
    while !stop.is_asked() {
        match readings.try_recv() {
            Ok(Ok(reading)) => {
                let before = change.take().map(|change| change.now);
                (change, trouble, stale) = (Some(Change::new(before.as_ref(), reading)), None, true);
            }
            Ok(Err(AskError::Gone)) | Err(TryRecvError::Disconnected) => {
                // Restored first: the message belongs on the screen that stays.
                drop(terminal);
                return Err(ended(change.as_ref().map(|change| &change.now), &AskError::Gone));
            }
            Ok(Err(error)) => (trouble, stale) = (Some(error.to_string()), true),
            Err(TryRecvError::Empty) => {}
        }
        let size = terminal.size();
        if stale || size != shown {
            let page = change.as_ref().map(|change| view::lines(change, size.0)).unwrap_or_default();
            offset = offset.min(page.len().saturating_sub(1));
            terminal.draw(&window(page, size, offset, trouble.as_deref()));
            (shown, stale) = (size, false);
        }
        match terminal.key(LOOK_EVERY) {
            Some(Key::Leave) => return Ok(ExitCode::SUCCESS),
            Some(Key::Scroll(by)) => (offset, stale) = (offset.saturating_add_signed(by), true),
            Some(Key::Home) => (offset, stale) = (0, true),
            Some(Key::Other) => stale = true,
            None => {}
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// The part of a page that fits, and a line that says how to leave, or what is wrong.
fn window(page: Vec<Line>, (columns, rows): (usize, usize), offset: usize, trouble: Option<&str>) -> Vec<Line> {
    let room = rows.saturating_sub(1);
    let all = page.len();
    let mut lines: Vec<Line> = page.into_iter().skip(offset).take(room).collect();
    let below = all.saturating_sub(offset + lines.len());
    let (style, mut text) = match trouble {
        Some(trouble) => (Style::Bad, format!("not read: {trouble}")),
        None => (Style::Plain, "q leaves".to_owned()),
    };
    if below > 0 || offset > 0 {
        let _ = write!(text, "; up, down: {offset} lines above, {below} below");
    }
    lines.resize(room, Line { text: String::new(), style: Style::Plain });
    lines.push(Line { text: text.chars().take(columns).collect(), style });
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_longer_than_the_screen_is_shown_in_part_and_says_so() {
        let page = |n| (0..n).map(|at| Line { text: at.to_string(), style: Style::Plain }).collect::<Vec<_>>();
        let shown = window(page(30), (80, 10), 5, None);
        assert_eq!((shown.len(), shown[0].text.as_str()), (10, "5"));
        assert_eq!(shown[9].text, "q leaves; up, down: 5 lines above, 16 below");
        let short = window(page(3), (80, 10), 0, Some("it does not answer"));
        assert_eq!((short.len(), short[9].text.as_str()), (10, "not read: it does not answer"));
        assert!(window(page(3), (80, 1), 0, None).len() == 1 && window(page(3), (0, 0), 0, None).len() == 1);
    }
}
