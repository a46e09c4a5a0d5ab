//! perftest's `ib_write_bw` and `ib_read_bw`: what a thread that does nothing but post and poll gets out of verbs.

use std::error::Error;
use std::net::TcpListener;
use std::process::Command;
use std::time::{Duration, Instant};

use super::Cell;
use super::process::Process;
use super::sides::Side;
use super::verbs::NIC;

/// Of the server: to listen.
const START: Duration = Duration::from_secs(10);

/// How often it is asked for an average.
const TRIES: usize = 6;

/// A server and a client for each cell.
pub(super) struct Perftest {
    version: String,
}

impl Perftest {
    pub(super) fn found() -> Result<Self, Box<dyn Error>> {
        // It ends with 1 when it has told its version.
        let mut asked = Process::start(Command::new("ib_write_bw").arg("--version"))?;
        let version = asked.line(|line| line.strip_prefix("Version: ").map(str::to_owned))?;
        Ok(Self { version })
    }
}

impl Side for Perftest {
    fn name(&self) -> &'static str {
        "perftest"
    }

    fn version(&self) -> &str {
        &self.version
    }

    /// It measures how fast the processor's clock runs before anything else, and where that does not come out well it tells an
    /// average of nothing: then it is asked again.
    fn batches_per_second(&mut self, cell: Cell, seconds: f64) -> Result<f64, Box<dyn Error>> {
        let mut said = String::new();
        for _ in 0..TRIES {
            said = once(cell, seconds)?;
            if let Some(average) = average(&said, cell.block).filter(|average| *average > 0.0) {
                return Ok(average * f64::from(1 << 20) / (cell.block * cell.batch) as f64);
            }
        }
        Err(format!("it tells no average, {TRIES} times: {said}").into())
    }
}

/// As many requests outstanding as all threads have together, and so many in all as take about so long where one byte takes
/// 15 ns. (By its own clock, `-D`, it ends with an average of nothing more often.)
fn once(cell: Cell, seconds: f64) -> Result<String, Box<dyn Error>> {
    let port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
    let depth = cell.batch * cell.threads;
    let count = (seconds * 64e6 / cell.block as f64).min(10_000.0) as u64;
    let end = || {
        let mut command = Command::new(format!("ib_{}_bw", cell.op));
        // GID 1 is the address by which the other sides reach the NIC, as well.
        command.args(["-d", NIC, "-x", "1", "-F", "-n", &count.max(2 * depth).max(5).to_string()]);
        command.args(["-p", &port.to_string(), "-s", &cell.block.to_string(), "-t", &depth.to_string()]);
        // Every completion asked for when there is one outstanding: the bare post-and-poll loop.
        command.args(["-Q", if depth == 1 { "1" } else { "16" }]);
        command
    };
    let server = Process::start(&mut end())?;
    listening(port)?;
    let said = Process::start(end().arg("127.0.0.1"))?.output()?;
    drop(server);
    Ok(said)
}

/// Average MiB/s of the only line of the table: bytes, iterations, peak, average, messages.
fn average(said: &str, block: u64) -> Option<f64> {
    said.lines().find_map(|line| {
        let columns: Vec<&str> = line.split_whitespace().collect();
        (columns.len() == 5 && columns[0].parse() == Ok(block)).then(|| columns[3].parse().ok()).flatten()
    })
}

/// Waits until somebody listens on a port. Connecting would be taken for the client.
fn listening(port: u16) -> Result<(), Box<dyn Error>> {
    let until = Instant::now() + START;
    let wanted = format!(":{port:04X} ");
    loop {
        for table in ["/proc/net/tcp", "/proc/net/tcp6"] {
            let sockets = std::fs::read_to_string(table).unwrap_or_default();
            // Local address, remote address, state: 0A is LISTEN (include/net/tcp_states.h).
            let listens = |line: &str| line.contains(&wanted) && line.split_whitespace().nth(3) == Some("0A");
            if sockets.lines().any(listens) {
                return Ok(());
            }
        }
        if Instant::now() >= until {
            return Err(format!("nobody listens on port {port} within {START:?}").into());
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}
