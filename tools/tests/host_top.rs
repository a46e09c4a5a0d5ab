//! `moonrail top` as an operator runs it: in a terminal (a pty), into a pipe, against an engine that moves bytes, ends, or was
//! never there.

mod host_support;

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use host_support::process::moonrail;
use host_support::wait_for;
use moonrail::inspect::VARIABLE;
use moonrail::{Engine, Fabric, Transfer};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{LocalModes, Winsize, tcgetattr, tcsetwinsize};
use serde_json::Value;

const ENTERED: &str = "\x1b[?1049h";
const LEFT: &str = "\x1b[?25h\x1b[?1049l";
const BLOCK: u64 = 1 << 20;

/// An engine with a folder of its own that moves bytes to another one over TCP until it is ended.
struct Busy {
    folder: PathBuf,
    name: String,
    engine: Option<Arc<Engine>>,
    mover: Option<JoinHandle<()>>,
    stop: Arc<AtomicBool>,
}

impl Busy {
    fn new(name: &str) -> Self {
        let folder = std::env::temp_dir().join(format!("mr-top-{name}-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&folder);
        let stop = Arc::new(AtomicBool::new(false));
        let (near, far) = (Arc::new(engine(folder.to_str().expect("ASCII"))), engine("off"));
        let mover = std::thread::spawn({
            let (stop, near) = (stop.clone(), near.clone());
            move || {
                let (local, remote) =
                    (near.allocate(BLOCK as usize, "*").unwrap(), far.allocate(BLOCK as usize, "*").unwrap());
                let segment = near.open_segment(far.name()).unwrap();
                while !stop.load(Ordering::Relaxed) {
                    let transfer = [Transfer::write_from(&local, 0, remote.addr(), BLOCK)];
                    near.submit(&segment, &transfer).unwrap().wait(Duration::from_secs(20)).unwrap();
                    std::thread::sleep(Duration::from_millis(1));
                }
            }
        });
        let name = near.name().to_owned();
        let busy = Self { folder, name, engine: Some(near), mover: Some(mover), stop };
        let moves = || busy.engine.as_ref().is_some_and(|engine| engine.counters().total().bytes > 0);
        wait_for("the first bytes", || moves().then_some(()));
        busy
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new("timeout");
        command.args(["--foreground", "-k", "2", "60", &moonrail(), "top"]).args(args);
        command.env(VARIABLE, &self.folder).env("NO_COLOR", "1");
        command
    }

    fn output(&self, args: &[&str]) -> Output {
        self.command(args).stdin(Stdio::null()).output().expect("timeout runs")
    }

    /// The engine goes away.
    fn end(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(mover) = self.mover.take() {
            mover.join().unwrap();
        }
        self.engine = None;
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        self.end();
        let _ = std::fs::remove_dir_all(&self.folder);
    }
}

fn engine(folder: &str) -> Engine {
    let folder = folder.to_owned();
    Engine::builder()
        .environment(move |name| (name == VARIABLE).then(|| folder.clone()))
        .name("127.0.0.1")
        .fabrics([Fabric::Tcp])
        .cores(1)
        .pin_cores(false)
        .log(|_, _| {})
        .build()
        .unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// A terminal with `moonrail top` in it.
struct Screen {
    child: Child,
    hand: File,
    /// Kept open, so that what the program did to it can be looked at.
    terminal: OwnedFd,
    shown: Arc<Mutex<String>>,
}

impl Screen {
    fn new(busy: &Busy, args: &[&str], columns: u16, rows: u16) -> Self {
        let hand = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
        grantpt(&hand).unwrap();
        unlockpt(&hand).unwrap();
        let path = ptsname(&hand, Vec::new()).unwrap();
        let terminal: OwnedFd = File::options().read(true).write(true).open(path.to_str().unwrap()).unwrap().into();
        resize(&terminal, columns, rows);
        let stdio = || Stdio::from(terminal.try_clone().unwrap());
        let child = busy.command(args).stdin(stdio()).stdout(stdio()).stderr(stdio()).spawn().unwrap();
        let (hand, shown) = (File::from(hand), Arc::<Mutex<String>>::default());
        let (mut from, into) = (hand.try_clone().unwrap(), shown.clone());
        std::thread::spawn(move || {
            let mut bytes = [0; 4096];
            while let Ok(count @ 1..) = from.read(&mut bytes) {
                into.lock().unwrap().push_str(&text(&bytes[..count]));
            }
        });
        Self { child, hand, terminal, shown }
    }

    /// What was written since it was last forgotten.
    fn shown(&self) -> String {
        self.shown.lock().unwrap().clone()
    }

    fn forget(&self) {
        self.shown.lock().unwrap().clear();
    }

    fn shows(&self, words: &[&str]) {
        let all = || {
            let shown = self.shown();
            words.iter().all(|word| shown.contains(word)).then_some(())
        };
        let seen = std::panic::catch_unwind(|| wait_for("the words", all));
        assert!(seen.is_ok(), "it does not show {words:?}:\n{}", self.shown());
    }

    fn press(&mut self, keys: &[u8]) {
        self.hand.write_all(keys).unwrap();
    }

    fn ended(&mut self) -> ExitStatus {
        wait_for("its end", || self.child.try_wait().unwrap())
    }

    fn is_restored(&self) {
        let modes = tcgetattr(&self.terminal).unwrap().local_modes;
        assert!(modes.contains(LocalModes::ICANON | LocalModes::ECHO | LocalModes::ISIG), "{modes:?}");
        // What it wrote last may still be on its way here.
        self.shows(&[ENTERED, LEFT]);
        let shown = self.shown();
        assert!(shown.rfind(LEFT) > shown.rfind(ENTERED), "{shown:?}");
    }
}

fn resize(terminal: impl AsFd, columns: u16, rows: u16) {
    tcsetwinsize(terminal, Winsize { ws_col: columns, ws_row: rows, ws_xpixel: 0, ws_ypixel: 0 }).unwrap();
}

#[test]
fn a_screen_follows_the_engine_and_the_terminal_and_leaves_nothing_behind() {
    let busy = Busy::new("screen");
    let mut screen = Screen::new(&busy, &["--interval", "100ms"], 80, 24);
    screen.shows(&[ENTERED, &busy.name, "queue time", "; last ", "q leaves"]);
    assert!(!tcgetattr(&screen.terminal).unwrap().local_modes.contains(LocalModes::ECHO), "keys are not shown");
    assert!(!screen.shown().contains("rtt"), "that is for wide terminals");
    screen.forget();
    resize(&screen.terminal, 200, 50);
    screen.shows(&["rtt", "MTU"]);
    resize(&screen.terminal, 80, 6);
    screen.shows(&["below"]);
    screen.press(b"j");
    screen.shows(&["1 lines above"]);
    screen.press(b"q");
    assert!(screen.ended().success());
    // Entered before it was forgotten.
    screen.shown.lock().unwrap().insert_str(0, ENTERED);
    screen.is_restored();
}

#[test]
fn control_c_and_a_signal_leave_the_terminal_as_it_was() {
    let busy = Busy::new("leave");
    for how in ["key", "end of input", "signal"] {
        let mut screen = Screen::new(&busy, &[], 80, 24);
        screen.shows(&[ENTERED, "in flight"]);
        match how {
            "key" => screen.press(&[3]),
            "end of input" => screen.press(&[4]),
            _ => {
                let sent = Command::new("kill").arg(screen.child.id().to_string()).status().unwrap();
                assert!(sent.success());
            }
        }
        let status = screen.ended();
        assert!(status.success(), "{how}: {status}");
        screen.is_restored();
    }
}

#[test]
fn an_engine_that_ends_is_told_of_on_the_screen_that_stays() {
    let mut busy = Busy::new("gone");
    let mut screen = Screen::new(&busy, &["--interval", "100ms"], 80, 24);
    screen.shows(&[ENTERED, "; last "]);
    busy.end();
    assert_eq!(screen.ended().code(), Some(1));
    screen.shows(&[LEFT, &format!("error: {} (process {}): its process has ended", busy.name, std::process::id())]);
    screen.is_restored();
}

#[test]
fn into_a_pipe_it_prints_pages_and_json_has_the_same_figures() {
    let busy = Busy::new("pipe");
    let page = busy.output(&["--once", "--interval", "200ms"]);
    let said = text(&page.stdout);
    assert!(page.status.success() && !said.contains('\x1b'), "{page:?}");
    assert!(said.lines().all(|line| line.chars().count() <= 80), "{said}");
    for part in [&busy.name, "; last ", "to 127.0.0.1:", "incidents 0, open 0"] {
        assert!(said.contains(part), "{part}: {said}");
    }
    let pid = std::process::id().to_string();
    let json = busy.output(&[&pid, "--once", "--json", "--interval", "200ms"]);
    let json: Value = serde_json::from_slice(&json.stdout).unwrap_or_else(|e| panic!("{e}: {json:?}"));
    let rail = &json["rails"][0];
    assert!(
        rail["usable"] == true && rail["fabric"] == "tcp" && rail["bytes_per_second"].as_f64().unwrap() > 0.0,
        "{json:#}"
    );
    let wire = &rail["wire_ns"];
    assert!(
        wire["p50"].as_u64().unwrap() <= wire["p99"].as_u64().unwrap() && wire["count"].as_u64().unwrap() > 0,
        "{json:#}"
    );
    assert_eq!(json["nics"][0]["bytes_per_second"], rail["bytes_per_second"], "one rail is all of its NIC");
    assert_eq!(json["total"]["bytes_per_second"], rail["bytes_per_second"]);
    // A line for each reading, until it is told to end.
    let mut child =
        busy.command(&["--json", "--interval", "100ms"]).stdout(Stdio::piped()).stdin(Stdio::null()).spawn().unwrap();
    let mut lines = std::io::BufRead::lines(std::io::BufReader::new(child.stdout.take().unwrap()));
    let since_start = |line: &str| serde_json::from_str::<Value>(line).unwrap()["since_start"] == true;
    let (first, second) = (lines.next().unwrap().unwrap(), lines.next().unwrap().unwrap());
    assert!(since_start(&first) && !since_start(&second), "{first}\n{second}");
    assert!(Command::new("kill").arg(child.id().to_string()).status().unwrap().success());
    wait_for("its end", || child.try_wait().unwrap());
}

#[test]
fn what_is_not_there_is_told_with_what_is() {
    let busy = Busy::new("which");
    let nobody = busy.output(&["4711.example", "--once"]);
    let said = text(&nobody.stderr);
    assert_eq!(nobody.status.code(), Some(1), "{said}");
    assert!(
        said.contains("no running engine 4711.example") && said.contains(&busy.name) && said.contains(" next: "),
        "{said}"
    );
    let second = engine(busy.folder.to_str().unwrap());
    let both = busy.output(&["--once"]);
    let said = text(&both.stderr);
    assert_eq!(both.status.code(), Some(2), "{said}");
    assert!(
        said.contains("2 engines are meant") && said.contains(&busy.name) && said.contains(second.name()),
        "{said}"
    );
    let named = busy.output(&[&busy.name, "--once", "--interval", "50ms"]);
    assert!(named.status.success(), "{named:?}");
    for wrong in ["1ms", "2h", "x"] {
        assert_eq!(busy.output(&["--interval", wrong]).status.code(), Some(2));
    }
}
