//! `moonrail incidents`, as an operator runs it: after a peer was killed, as another user, and where nothing runs.

mod host_support;

use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::Duration;

use host_support::process::{Process, moonrail};
use host_support::{START, wait_for};
use moonrail::inspect::VARIABLE;
use moonrail::{Engine, Fabric, Transfer};
use serde_json::Value;

/// Makes this program the client of another user, towards the socket it names.
const AS_STRANGER: &str = "MOONRAIL_TEST_STRANGER_TO";

struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("mr-incidents-{name}-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&path);
        Self(path)
    }

    fn engine(&self, fabric: Fabric) -> Engine {
        let folder = self.0.to_str().expect("ASCII").to_owned();
        Engine::builder()
            .environment(move |name| (name == VARIABLE).then(|| folder.clone()))
            .name("127.0.0.1")
            .fabrics([fabric])
            .cores(1)
            .pin_cores(false)
            .log(|_, _| {})
            .build()
            .unwrap()
    }

    fn incidents(&self, args: &[&str]) -> Output {
        Command::new(moonrail()).arg("incidents").args(args).env(VARIABLE, &self.0).output().expect("it starts")
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[test]
fn an_engine_whose_process_is_stopped_is_said_to_hang_and_not_to_belong_to_another_user() {
    let folder = Folder::new("stopped");
    let mut command = Command::new(moonrail());
    command.args(["serve", "--name", "127.0.0.1", "--size", "1MiB", "--cores", "1"]).env(VARIABLE, &folder.0);
    let mut node = Process::start("node", command);
    node.says("listening on ", START);
    node.signal("STOP");
    let top = Command::new(moonrail()).args(["top", "--once"]).env(VARIABLE, &folder.0).output().expect("it starts");
    for asked in [folder.incidents(&[]), top] {
        let said = text(&asked.stderr);
        assert!(!asked.status.success() && said.contains("kill -CONT PID") && !said.contains("as root"), "{said}");
    }
    node.signal("CONT");
    assert!(wait_for("an answer", || folder.incidents(&[]).status.success().then_some(true)));
}

fn peer_killed_over(fabric: Fabric) {
    let folder = Folder::new(fabric.as_str());
    let engine = folder.engine(fabric);
    let healthy = folder.incidents(&[]);
    assert!(healthy.status.success() && text(&healthy.stdout).contains("no incidents"), "{healthy:?}");
    // The peer keeps its socket elsewhere, so that only one engine is found here.
    let other = Folder::new(&format!("{}-peer", fabric.as_str()));
    let mut command = Command::new(moonrail());
    command
        .args(["serve", "--name", "127.0.0.1", "--fabrics", fabric.as_str(), "--size", "1MiB"])
        .env(VARIABLE, &other.0);
    let mut peer = Process::start("peer", command);
    let name = peer.says("listening on ", START);
    let local = engine.allocate(1 << 20, "*").unwrap();
    let far = engine.open_segment(&name).unwrap();
    let transfer = [Transfer::write_from(&local, 0, far.buffers()[0].addr, 1 << 20)];
    engine.submit(&far, &transfer).unwrap().wait(START).unwrap();
    peer.kill();

    let reply: Value = wait_for("an incident", || {
        // What is idle need not notice; over shared memory the dead process's memory can be written for a moment more.
        let _ = engine.submit(&far, &transfer).map(|batch| batch.wait(Duration::from_millis(100)));
        let told = folder.incidents(&["--json", "--open"]);
        let reply: Value = serde_json::from_slice(&told.stdout).expect("JSON");
        (!reply["engines"][0]["incidents"].as_array()?.is_empty()).then_some(reply)
    });
    let incident = &reply["engines"][0]["incidents"][0];
    assert_eq!(incident["open"], true);
    assert_eq!(incident["peer"], name);
    assert!(
        incident["opened_unix_s"].as_f64().unwrap() > 1.7e9 && incident["lasted_s"].as_f64().unwrap() > 0.0,
        "{incident:#}"
    );
    assert_eq!(incident["charged_to"], "pair", "{incident:#}");
    for member in ["nic", "peer_nic", "charged_to", "decision", "cause"] {
        assert!(incident[member].as_str().is_some_and(|word| !word.is_empty()), "{member}: {incident:#}");
    }
    assert_eq!(reply["engines"][0]["engine"]["pid"], std::process::id());
    let told = text(&folder.incidents(&["--pid", &std::process::id().to_string(), engine.name()]).stdout);
    assert!(told.contains(&format!("to {name}@")) && told.contains("open for"), "{told}");
    for line in told.lines() {
        assert!(line.chars().count() <= 80, "{line}");
    }
    println!("{told}");
    let brief = text(&folder.incidents(&["--brief"]).stdout);
    assert!(brief.contains("opened (UTC)"), "{brief}");
    println!("{brief}");
    // It is about to be repaired or given up; either way the engine ends without leaving its socket.
    drop(engine);
    let none = folder.incidents(&[]);
    assert_eq!(none.status.code(), Some(1));
    assert!(text(&none.stderr).contains("no running engine") && text(&none.stderr).contains("next:"), "{none:?}");
}

#[test]
fn a_killed_peer_shows_over_tcp() {
    peer_killed_over(Fabric::Tcp);
}

#[test]
fn a_killed_peer_shows_over_shared_memory() {
    peer_killed_over(Fabric::Shm);
}

#[test]
fn an_engine_that_was_killed_is_no_engine() {
    let folder = Folder::new("killed");
    let mut command = Command::new(moonrail());
    command.args(["serve", "--name", "127.0.0.1", "--fabrics", "tcp"]).env(VARIABLE, &folder.0);
    let mut server = Process::start("server", command);
    server.says("listening on ", START);
    let named = folder.incidents(&["--pid", &server.pid().to_string()]);
    assert!(named.status.success(), "{named:?}");
    assert_eq!(folder.incidents(&["--pid", "1"]).status.code(), Some(1));
    server.kill();
    let none = folder.incidents(&[]);
    assert_eq!(none.status.code(), Some(1));
    assert!(!text(&none.stderr).contains("warning"), "a dead socket is no reason to worry: {none:?}");
}

#[test]
fn another_user_is_refused_by_both_ends() {
    let folder = Folder::new("user");
    let engine = folder.engine(Fabric::Tcp);
    // As if somebody had opened the folder: who is at the other end decides, not the mode.
    let socket = std::fs::read_dir(&folder.0).unwrap().flatten().next().unwrap().path();
    std::fs::set_permissions(&folder.0, std::fs::Permissions::from_mode(0o755)).unwrap();
    std::fs::set_permissions(&socket, std::fs::Permissions::from_mode(0o777)).unwrap();
    let copies = [std::env::current_exe().unwrap(), PathBuf::from(moonrail())].map(|of| {
        let to = std::env::temp_dir().join(format!(
            "mr-stranger-{}-{}",
            std::process::id(),
            of.file_stem().unwrap().display()
        ));
        std::fs::copy(of, &to).unwrap();
        to
    });
    let as_nobody = |program: &Path, args: &[&str], variable: &str, value: &Path| {
        let mut command = Command::new("setpriv");
        command.args(["--reuid=65534", "--regid=65534", "--clear-groups"]).arg(program).args(args).env(variable, value);
        command.output().expect("setpriv")
    };
    let stranger = as_nobody(&copies[0], &["--exact", "stranger", "--nocapture"], AS_STRANGER, &socket);
    let said = text(&stranger.stdout);
    let reader = as_nobody(&copies[1], &["incidents"], VARIABLE, &folder.0);
    for copy in &copies {
        std::fs::remove_file(copy).unwrap();
    }
    assert!(said.contains("only the engine's own user and root"), "{stranger:?}");
    assert!(!said.contains("incarnation"), "{said}");
    assert_eq!(reader.status.code(), Some(1), "{reader:?}");
    assert!(folder.incidents(&[]).status.success(), "its own user still can");
    drop(engine);
}

/// The client of [`another_user_is_refused_by_both_ends`]; by itself it has nothing to do.
#[test]
fn stranger() {
    let Some(socket) = std::env::var_os(AS_STRANGER) else { return };
    let mut stream = UnixStream::connect(socket).unwrap();
    stream.set_read_timeout(Some(START)).unwrap();
    let _ = stream.write_all(b"moonrail/1 incidents\n");
    let mut reply = String::new();
    let _ = stream.read_to_string(&mut reply);
    println!("{reply}");
}
