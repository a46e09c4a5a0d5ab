//! A real etcd for the length of a test, and ways to make it misbehave.
//!
//! The server is this test's own: its own free loopback ports, its own folder under the system's temporary one, killed
//! by its process id when the value is dropped.

#![allow(dead_code, unreachable_pub, reason = "each test binary includes this module and uses its own part")]

pub(crate) mod ports;

use std::fs::File;
use std::io::{ErrorKind, Read as _, Write as _};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread::sleep;
use std::time::{Duration, Instant};

use ports::free_port;

/// Longest wait for etcd to answer after its start, on a machine that is busy with other tests.
const STARTS_WITHIN: Duration = Duration::from_secs(30);

/// A running etcd.
pub struct EtcdServer {
    child: Child,
    dir: PathBuf,
    port: u16,
    peer: u16,
    tls: bool,
}

impl EtcdServer {
    /// Starts etcd without TLS and waits until it serves.
    pub fn start() -> Self {
        Self::start_with(&[], false)
    }

    /// Starts etcd with more arguments; `tls` says whether its client port then wants TLS.
    pub fn start_with(more: &[&str], tls: bool) -> Self {
        // A port that was free a moment ago may be taken by a neighbour now: then etcd ends, and we draw again.
        for _ in 0..5 {
            if let Some(server) = Self::try_start(more, tls) {
                return server;
            }
        }
        panic!("etcd did not stay up on five pairs of ports in turn");
    }

    fn try_start(more: &[&str], tls: bool) -> Option<Self> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let unique = COUNT.fetch_add(1, Ordering::Relaxed);
        let dir = std::env::temp_dir().join(format!("moonrail-etcd-{}-{unique}", std::process::id()));
        std::fs::create_dir_all(&dir).expect("a folder for etcd");
        let (port, peer) = (free_port(), free_port());
        let child = Self::spawn(&dir, port, peer, more, tls);
        let mut server = Self { child, dir, port, peer, tls };
        server.wait_until_serving().then_some(server)
    }

    /// Kills it, and starts it again on the same ports: with what it had, or with nothing.
    pub fn restart(&mut self, wiped: bool) {
        self.kill();
        self.start_again(wiped);
    }

    /// Ends it without a word.
    pub fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// After [`EtcdServer::kill`].
    pub fn start_again(&mut self, wiped: bool) {
        if wiped {
            std::fs::remove_dir_all(self.dir.join("data")).expect("etcd's data");
        }
        self.child = Self::spawn(&self.dir, self.port, self.peer, &[], self.tls);
        assert!(self.wait_until_serving(), "etcd does not start again; its log:\n{}", self.log());
    }

    fn spawn(dir: &Path, port: u16, peer: u16, more: &[&str], tls: bool) -> Child {
        let client = format!("{}://127.0.0.1:{port}", if tls { "https" } else { "http" });
        let peer = format!("http://127.0.0.1:{peer}");
        let log = File::create(dir.join("log")).expect("a log file for etcd");
        let child = Command::new("etcd")
            .args(["--name", "t", "--data-dir"])
            .arg(dir.join("data"))
            .args(["--listen-client-urls", &client, "--advertise-client-urls", &client])
            .args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer])
            .args(["--initial-cluster", &format!("t={peer}"), "--unsafe-no-fsync", "--log-level", "error"])
            // A short election makes short leases possible: none lives shorter than an election takes.
            .args(["--heartbeat-interval", "20", "--election-timeout", "200"])
            .args(more)
            .env_remove("ETCD_UNSUPPORTED_ARCH")
            .stdout(log.try_clone().expect("the log file twice"))
            .stderr(log)
            .stdin(Stdio::null())
            .spawn();
        match child {
            Ok(child) => child,
            Err(e) if e.kind() == ErrorKind::NotFound => {
                panic!("no `etcd` on this machine; run `cargo xtask setup`, which installs etcd-server")
            }
            Err(e) => panic!("cannot start etcd: {e}"),
        }
    }

    fn wait_until_serving(&mut self) -> bool {
        let end = Instant::now() + STARTS_WITHIN;
        while Instant::now() < end {
            if self.child.try_wait().expect("etcd's state").is_some() {
                return false;
            }
            // Listening begins when the member is ready; over plain HTTP its health says so for sure.
            let ready = if self.tls { TcpStream::connect(("127.0.0.1", self.port)).is_ok() } else { self.healthy() };
            if ready {
                return true;
            }
            sleep(Duration::from_millis(50));
        }
        panic!("etcd does not serve within {STARTS_WITHIN:?}; its log:\n{}", self.log());
    }

    fn healthy(&self) -> bool {
        let Ok(mut stream) = TcpStream::connect(("127.0.0.1", self.port)) else { return false };
        let _ = stream.set_read_timeout(Some(Duration::from_secs(2)));
        let _ = stream.write_all(b"GET /health HTTP/1.0\r\n\r\n");
        let mut answer = String::new();
        let _ = stream.read_to_string(&mut answer);
        answer.contains("\"true\"")
    }

    /// `127.0.0.1:PORT`.
    pub fn endpoint(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    /// Folder that is removed with the server.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Stops its process in its tracks: connections stay, nothing is answered.
    pub fn freeze(&self) {
        self.signal("STOP");
        // The signal stops each thread when it next runs: until the last has, etcd still answers.
        let end = Instant::now() + Duration::from_secs(10);
        while !self.all_threads_stopped() {
            assert!(Instant::now() < end, "etcd does not stop");
            sleep(Duration::from_millis(5));
        }
    }

    fn all_threads_stopped(&self) -> bool {
        let tasks = std::fs::read_dir(format!("/proc/{}/task", self.child.id())).expect("etcd's threads");
        tasks.flatten().all(|task| {
            let stat = std::fs::read_to_string(task.path().join("stat")).unwrap_or_default();
            stat.rsplit_once(") ").is_none_or(|(_, state)| state.starts_with('T'))
        })
    }

    /// Lets it go on.
    pub fn thaw(&self) {
        self.signal("CONT");
    }

    fn signal(&self, name: &str) {
        let pid = self.child.id().to_string();
        let status = Command::new("kill").args(["-s", name, &pid]).status().expect("kill runs");
        assert!(status.success(), "kill -s {name} {pid}");
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.dir.join("log")).unwrap_or_default()
    }
}

impl Drop for EtcdServer {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}

/// Asks `probe` every 50 ms until it says yes.
pub async fn eventually<F: Future<Output = bool>>(within: Duration, what: &str, mut probe: impl FnMut() -> F) {
    let end = Instant::now() + within;
    while !probe().await {
        assert!(Instant::now() < end, "not within {within:?}: {what}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}
