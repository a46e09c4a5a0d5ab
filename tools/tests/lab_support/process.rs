//! Processes of a lab test: `moonrail` as an operator starts it, etcd, and what they printed. Every wait is bounded,
//! and whatever a test leaves running ends with it.

use std::io::{BufRead, BufReader, Read};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

/// A running program whose output is collected.
pub(crate) struct Process {
    name: String,
    child: Child,
    stdout: Arc<Mutex<String>>,
    stderr: Arc<Mutex<String>>,
    readers: Vec<JoinHandle<()>>,
}

/// What a program left.
#[derive(Debug)]
pub(crate) struct Ended {
    pub(crate) code: i32,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Ended {
    /// Panics, with everything it printed, unless the exit status is 0.
    pub(crate) fn expect_ok(self) -> Self {
        assert_eq!(self.code, 0, "stdout:\n{}\nstderr:\n{}", self.stdout, self.stderr);
        self
    }

    /// Panics unless it failed with status 1 and said every one of `words` on stderr, whatever the case.
    pub(crate) fn expect_error(self, words: &[&str]) -> Self {
        assert_eq!(self.code, 1, "stdout:\n{}\nstderr:\n{}", self.stdout, self.stderr);
        let said = self.stderr.to_lowercase();
        for word in words {
            assert!(said.contains(&word.to_lowercase()), "does not say {word:?}:\n{}", self.stderr);
        }
        assert!(!said.contains("panicked"), "{}", self.stderr);
        self
    }
}

/// The `moonrail` binary under test: in the lab the one it names, else cargo's.
pub(crate) fn moonrail() -> String {
    std::env::var("MOONRAIL_BIN").unwrap_or_else(|_| env!("CARGO_BIN_EXE_moonrail").to_owned())
}

impl Process {
    /// Starts `moonrail` with these words.
    pub(crate) fn moonrail(line: &str) -> Self {
        let mut command = Command::new(moonrail());
        command.args(line.split_whitespace());
        Self::start(&format!("moonrail {line}"), command)
    }

    /// Starts any program.
    pub(crate) fn start(name: &str, mut command: Command) -> Self {
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap_or_else(|e| panic!("{name}: {e}"));
        let (stdout, stderr) = (Arc::default(), Arc::default());
        let readers = vec![
            collect(child.stdout.take().expect("piped"), Arc::clone(&stdout)),
            collect(child.stderr.take().expect("piped"), Arc::clone(&stderr)),
        ];
        Self { name: name.to_owned(), child, stdout, stderr, readers }
    }

    /// Waits for a line of stdout that starts with `words`; returns the rest of it.
    pub(crate) fn says(&mut self, words: &str, within: Duration) -> String {
        let until = Instant::now() + within;
        loop {
            let text = self.stdout.lock().expect("a reader does not panic").clone();
            // Only whole lines: the last one may still be growing.
            let whole = text.rfind('\n').map_or("", |end| &text[..end]);
            if let Some(rest) = whole.lines().find_map(|line| line.strip_prefix(words)) {
                return rest.trim().to_owned();
            }
            let ended = self.child.try_wait().expect("it is our child");
            assert!(
                ended.is_none() && Instant::now() < until,
                "{} did not say {words:?}\n{}",
                self.name,
                self.so_far()
            );
            thread::sleep(Duration::from_millis(20));
        }
    }

    /// Its process.
    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// SIGKILL, and gone: reaped when this returns.
    pub(crate) fn kill(mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// SIGTERM, then waits for the end.
    pub(crate) fn terminate(self, within: Duration) -> Ended {
        self.signal("TERM");
        self.wait(within)
    }

    /// Sends a signal, by its name.
    pub(crate) fn signal(&self, name: &str) {
        let pid = self.child.id().to_string();
        let sent = Command::new("kill").args([&format!("-{name}"), &pid]).status().expect("kill runs");
        assert!(sent.success(), "{} was gone before SIG{name}\n{}", self.name, self.so_far());
    }

    /// Waits for the end.
    pub(crate) fn wait(mut self, within: Duration) -> Ended {
        let until = Instant::now() + within;
        let status = loop {
            if let Some(status) = self.child.try_wait().expect("it is our child") {
                break status;
            }
            assert!(Instant::now() < until, "{} did not end within {within:?}\n{}", self.name, self.so_far());
            thread::sleep(Duration::from_millis(20));
        };
        for reader in self.readers.drain(..) {
            let _ = reader.join();
        }
        let ended = Ended { code: code(status), stdout: take(&self.stdout), stderr: take(&self.stderr) };
        println!("{}: status {}", self.name, ended.code);
        ended
    }

    fn so_far(&self) -> String {
        format!("stdout so far:\n{}\nstderr so far:\n{}", take(&self.stdout), take(&self.stderr))
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if thread::panicking() {
            println!("{} until its test failed:\n{}", self.name, self.so_far());
        }
    }
}

fn collect(from: impl Read + Send + 'static, into: Arc<Mutex<String>>) -> JoinHandle<()> {
    thread::spawn(move || {
        let mut from = BufReader::new(from);
        let mut line = Vec::new();
        while matches!(from.read_until(b'\n', &mut line), Ok(n) if n > 0) {
            into.lock().expect("nobody panics with it").push_str(&String::from_utf8_lossy(&line));
            line.clear();
        }
    })
}

fn take(text: &Mutex<String>) -> String {
    text.lock().expect("a reader does not panic").clone()
}

fn code(status: ExitStatus) -> i32 {
    use std::os::unix::process::ExitStatusExt;
    status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0))
}

/// A real etcd on `address:2379`, with its data in a folder of its own. Ready when this returns.
pub(crate) fn etcd(address: &str) -> Process {
    let _ = std::fs::remove_dir_all(etcd_folder());
    etcd_again(address)
}

fn etcd_folder() -> String {
    format!("/tmp/lab-etcd-{}", std::process::id())
}

/// The same with the data that its predecessor left.
pub(crate) fn etcd_again(address: &str) -> Process {
    let folder = etcd_folder();
    let (client, peer) = (format!("http://{address}:2379"), format!("http://{address}:2380"));
    let mut command = Command::new("etcd");
    command
        .args(["--data-dir", &folder, "--log-level", "error", "--unsafe-no-fsync"])
        .args(["--listen-client-urls", &client, "--advertise-client-urls", &client])
        .args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer])
        .args(["--initial-cluster", &format!("default={peer}")]);
    let process = Process::start("etcd", command);
    super::wait_for("etcd", || health(address).then_some(()));
    process
}

fn health(address: &str) -> bool {
    use std::io::Write;
    let Ok(at) = format!("{address}:2379").parse() else { return false };
    let Ok(mut stream) = std::net::TcpStream::connect_timeout(&at, Duration::from_secs(1)) else { return false };
    let mut answer = String::new();
    let _ = stream.set_read_timeout(Some(Duration::from_secs(2)));
    let _ = stream.write_all(b"GET /health HTTP/1.0\r\n\r\n");
    let _ = stream.read_to_string(&mut answer);
    answer.contains("\"health\":\"true\"")
}
