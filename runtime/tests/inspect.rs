//! Engines are read from outside through their socket: by whom, what it may cost, and what is left when they end.
#![cfg(target_os = "linux")]

mod pair;

use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime};

use moonrail::inspect::{self, AskError, Request, VARIABLE};
use moonrail::{Engine, Fabric};

/// A folder of this test's own, removed at its end.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("mr-inspect-{name}-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&path);
        Self(path)
    }

    fn read(&self) -> impl Fn(&str) -> Option<String> + Send + Sync + 'static {
        let path = self.0.to_str().expect("ASCII").to_owned();
        move |name| (name == VARIABLE).then(|| path.clone())
    }

    fn engine(&self, log: &Arc<Mutex<Vec<String>>>) -> Engine {
        let log = log.clone();
        Engine::builder()
            .environment(self.read())
            .name("127.0.0.1")
            .fabrics([Fabric::Tcp])
            .cores(1)
            .pin_cores(false)
            .log(move |level, line| log.lock().unwrap().push(format!("{level} {line}")))
            .build()
            .unwrap()
    }

    fn sockets(&self) -> Vec<PathBuf> {
        inspect::sockets(self.read())
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn say(socket: &Path, bytes: &[u8]) -> String {
    let mut stream = UnixStream::connect(socket).unwrap();
    stream.set_read_timeout(Some(pair::LONG)).unwrap();
    let mut reply = String::new();
    // What is refused may be answered before all of it was sent.
    let _ = stream.write_all(bytes);
    let _ = stream.read_to_string(&mut reply);
    reply
}

#[test]
fn an_engine_tells_who_it_is_and_leaves_nothing_behind() {
    let folder = Folder::new("who");
    let (one, two) = (folder.engine(&Arc::default()), folder.engine(&Arc::default()));
    let sockets = folder.sockets();
    assert_eq!(sockets.len(), 2, "each engine of a process has its own");
    let names: Vec<String> = sockets
        .iter()
        .map(|socket| {
            let reply = inspect::ask(socket, Request::All).unwrap();
            assert_eq!(reply["engine"]["pid"], std::process::id());
            assert_eq!(reply["engine"]["incarnation"].as_str().unwrap().len(), 16);
            assert!(reply["engine"]["uptime_s"].as_f64().unwrap() > 0.0);
            assert!(reply["incidents"].as_array().unwrap().is_empty());
            assert!(reply["rails"].is_array() && reply["cores"].as_array().unwrap().len() == 1);
            reply["engine"]["name"].as_str().unwrap().to_owned()
        })
        .collect();
    assert_eq!(names, [one.name(), two.name()]);
    let brief = inspect::ask(&sockets[0], Request::Engine).unwrap();
    assert!(brief["incidents"].is_null() && brief["rails"].is_null());
    drop(one);
    assert!(matches!(inspect::ask(&sockets[0], Request::Engine), Err(AskError::Gone)));
    drop(two);
    assert!(folder.sockets().is_empty());
}

#[test]
fn an_incident_is_told_with_all_that_is_known() {
    let folder = Folder::new("incident");
    let read = folder.read();
    let shared = Arc::new(read);
    let p = pair::pair_with(1, 1, moonrail_datapath::nic::sim::SimOptions::default(), move |builder| {
        let read = shared.clone();
        builder.environment(move |name| read(name))
    });
    let (local, far) = (p.a.allocate(1 << 20, "*").unwrap(), p.b.allocate(1 << 20, "*").unwrap());
    let segment = p.a.open_segment("b").unwrap();
    let transfer = [moonrail::Transfer::write_from(&local, 0, far.addr(), 1 << 20)];
    p.a.submit(&segment, &transfer).unwrap().wait(pair::LONG).unwrap();
    // The way between the two, not the peer's port: of that the peer would tell us before a completion does.
    p.world.set_path(p.a_nics[0], p.b_nics[0], false);
    let batch = p.a.submit(&segment, &transfer).unwrap();
    let until = Instant::now() + pair::LONG;
    while p.a.incidents().is_empty() && Instant::now() < until {
        std::thread::sleep(Duration::from_millis(5));
    }
    let [open] = &p.a.incidents()[..] else { panic!("{:#?}", p.a.incidents()) };
    assert!(!open.closed && open.status.is_some() && open.status_text.is_some(), "{open:#?}");
    assert!((&*open.nic, &*open.peer, &*open.peer_nic) == ("sim0", "b", "sim0"), "{open:#?}");
    assert!(open.when <= SystemTime::now() && open.at <= p.a.uptime(), "{open:#?}");
    p.world.set_path(p.a_nics[0], p.b_nics[0], true);
    batch.wait(pair::LONG).unwrap();
    while !p.a.incidents()[0].closed && Instant::now() < until {
        std::thread::sleep(Duration::from_millis(5));
    }
    let closed = p.a.incidents().remove(0);
    assert!(closed.closed && closed.to_string().contains("closed after"), "{closed}");
    assert_eq!(p.a.incidents()[0].lasted, closed.lasted, "what is over lasts no longer");
    let replies: Vec<_> = folder.sockets().iter().map(|s| inspect::ask(s, Request::Incidents).unwrap()).collect();
    let a = replies.iter().find(|reply| reply["engine"]["name"] == "a").unwrap();
    let told = &a["incidents"][0];
    assert_eq!(told["number"], 1);
    assert_eq!(told["open"], false);
    assert_eq!(told["status"], closed.status.unwrap());
    assert_eq!(told["charged_to"], closed.charge.as_str());
    assert_eq!(told["decision"], *closed.decision);
    assert_eq!(told["cause"], *closed.cause);
    assert!((told["lasted_s"].as_f64().unwrap() - closed.lasted.as_secs_f64()).abs() < 1e-6);
    let log = p.log.lock().unwrap();
    for line in ["incident 1 opened: sim0 to b@sim0", "incident 1 closed: sim0 to b@sim0"] {
        assert_eq!(log.iter().filter(|l| l.contains(line)).count(), 1, "{line}: {log:#?}");
    }
}

/// The reply that `moonrail top` lives on: what was moved adds up with the times, and what is in flight is seen while it is.
#[test]
fn a_live_reply_has_what_is_in_flight_and_how_long_it_took() {
    let folder = Folder::new("live");
    let read = Arc::new(folder.read());
    let options = moonrail_datapath::nic::sim::SimOptions { bytes_per_second: 50_000_000, ..Default::default() };
    let p = pair::pair_with(1, 1, options, move |builder| {
        let read = read.clone();
        builder.environment(move |name| read(name))
    });
    let (local, far) = (p.a.allocate(16 << 20, "*").unwrap(), p.b.allocate(16 << 20, "*").unwrap());
    let segment = p.a.open_segment("b").unwrap();
    let live = || {
        let replies = folder.sockets().into_iter().map(|s| inspect::ask(&s, Request::Live).unwrap());
        replies.into_iter().find(|reply| reply["engine"]["name"] == "a").unwrap()
    };
    let batch = p.a.submit(&segment, &[moonrail::Transfer::write_from(&local, 0, far.addr(), 16 << 20)]).unwrap();
    let until = Instant::now() + pair::LONG;
    // 16 MiB take 0.17 s over two queue pairs of this speed.
    while live()["rails"][0]["in_flight_bytes"].as_u64().is_none_or(|bytes| bytes == 0) {
        assert!(Instant::now() < until, "nothing was ever in flight: {:#}", live());
    }
    batch.wait(pair::LONG).unwrap();
    let reply = live();
    let rail = &reply["rails"][0];
    assert_eq!((&rail["bytes"], &rail["slices"]), (&(16 << 20).into(), &256.into()), "{rail:#}");
    assert_eq!((&rail["in_flight_bytes"], &rail["in_flight_slices"]), (&0.into(), &0.into()), "{rail:#}");
    let (queue, wire) = (inspect::spread(&rail["queue_ns"]), inspect::spread(&rail["wire_ns"]));
    assert_eq!((queue.count(), wire.count()), (256, 256));
    assert_eq!((&queue, &wire), (&p.a.rails()[0].queue_time, &p.a.rails()[0].wire_time), "as the engine tells itself");
    assert_eq!((&reply["nics"][0]["name"], &reply["incidents_seen"]), (&"sim0".into(), &0.into()), "{reply:#}");
    assert!(inspect::spread(&serde_json::json!({ "counts": [[1], "x", [-1, 2]] })).counts().is_empty());
}

#[test]
fn garbage_is_answered_in_words_and_hurts_nobody() {
    let folder = Folder::new("garbage");
    let engine = folder.engine(&Arc::default());
    let socket = &folder.sockets()[0];
    let cases: [(&[u8], &str); 5] = [
        (b"GET / HTTP/1.1\r\n\r\n", "a request is a line"),
        (b"moonrail/9 incidents\n", "only protocol 1"),
        (b"moonrail/1 stop\n", "this version answers"),
        (&[b'x'; 5000], "one short line"),
        (b"\xff\0\xff\n", "a request is a line"),
    ];
    for (bytes, words) in cases {
        let reply = say(socket, bytes);
        assert!(reply.contains("\"error\"") && reply.contains(words), "{bytes:?}: {reply}");
    }
    assert_eq!(inspect::ask(socket, Request::Engine).unwrap()["engine"]["name"], engine.name());
}

#[test]
fn a_hundred_clients_are_answered_although_a_hundred_others_are_silent() {
    let folder = Folder::new("many");
    let _engine = folder.engine(&Arc::default());
    let socket = folder.sockets().remove(0);
    let silent: Vec<UnixStream> = (0..100).map(|_| UnixStream::connect(&socket).unwrap()).collect();
    let ask = |socket: PathBuf| move || inspect::ask(&socket, Request::All).map(|_| ()).map_err(|e| e.to_string());
    let asking: Vec<_> = (0..100).map(|_| std::thread::spawn(ask(socket.clone()))).collect();
    for client in asking {
        client.join().unwrap().unwrap();
    }
    // Those that ask for nothing are let go.
    let until = Instant::now() + pair::LONG;
    for mut stream in silent {
        stream
            .set_read_timeout(Some(until.saturating_duration_since(Instant::now()).max(Duration::from_millis(1))))
            .unwrap();
        assert_eq!(stream.read(&mut [0]).unwrap(), 0);
    }
}

#[test]
fn what_killed_processes_left_behind_is_removed_and_what_lives_is_not() {
    let folder = Folder::new("stale");
    let first = folder.engine(&Arc::default());
    let [alive] = &folder.sockets()[..] else { panic!() };
    let (old, young, not_ours) = (folder.0.join("1-0.sock"), folder.0.join("2-0.sock"), folder.0.join("notes.txt"));
    // A listener that is closed without removing its socket: what a killed process leaves.
    drop(UnixListener::bind(&old).unwrap());
    drop(UnixListener::bind(&young).unwrap());
    std::fs::write(&not_ours, "x").unwrap();
    let touched = std::process::Command::new("touch").args(["-h", "-d", "1 minute ago"]).arg(&old).status().unwrap();
    assert!(touched.success());
    assert!(matches!(inspect::ask(&old, Request::Engine), Err(AskError::Gone)));
    let second = folder.engine(&Arc::default());
    assert!(!old.exists() && young.exists() && not_ours.exists());
    assert!(alive.exists() && inspect::ask(alive, Request::Engine).is_ok());
    drop((first, second));
}

#[test]
fn switched_off_or_impossible_it_is_no_reason_not_to_run() {
    let folder = Folder::new("off");
    let quiet = Engine::builder()
        .environment(folder.read())
        .inspect(false)
        .name("127.0.0.1")
        .fabrics([Fabric::Tcp])
        .cores(1)
        .pin_cores(false)
        .log(|_, _| {})
        .build()
        .unwrap();
    assert!(!folder.0.exists());
    drop(quiet);
    // Somebody else may write here: no place for a socket.
    std::fs::create_dir(&folder.0).unwrap();
    std::fs::set_permissions(&folder.0, std::fs::Permissions::from_mode(0o777)).unwrap();
    let log = Arc::<Mutex<Vec<String>>>::default();
    let engine = folder.engine(&log);
    let warnings: Vec<String> = log.lock().unwrap().iter().filter(|l| l.contains("no socket")).cloned().collect();
    assert!(warnings.len() == 1 && warnings[0].starts_with("WARNING"), "{warnings:#?}");
    assert!(warnings[0].contains("nobody else may write"), "{warnings:#?}");
    drop(engine);
}

#[test]
fn a_process_that_answers_nothing_is_given_up() {
    let folder = Folder::new("hung");
    std::fs::create_dir(&folder.0).unwrap();
    let socket = folder.0.join("1-0.sock");
    let _deaf = UnixListener::bind(&socket).unwrap();
    let began = Instant::now();
    let error = inspect::ask(&socket, Request::Engine).unwrap_err();
    assert!(matches!(error, AskError::Silent(_)), "{error}");
    assert!(began.elapsed() >= inspect::ANSWER_WITHIN && error.to_string().contains("hangs"), "{error}");
}
