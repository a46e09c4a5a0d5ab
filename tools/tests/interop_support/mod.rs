//! The two kinds of node that the interop tests put into one cluster, behind one interface: [`Ours`] is this process's
//! engine, [`Stock`] a process with the engine as its authors publish it, driven through `tools/peers/stock.py`.
//!
//! What should be in memory is a file that the test writes; a node loads it or compares its own memory with it, so the
//! bytes are seen by the process whose memory they are in.
#![allow(dead_code)] // each test target uses a part

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use moonrail::{Engine, EngineBuilder, Op, Region, Transfer};
use serde_json::{Value, json};

/// For one command of a node, generous: the deadline of a stock batch is 30 s and more.
pub(crate) const ANSWER: Duration = Duration::from_secs(150);

/// The environment with the stock engine.
pub(crate) fn peers() -> PathBuf {
    let folder = std::env::var_os("MOONRAIL_PEERS").map(PathBuf::from);
    folder.unwrap_or_else(|| panic!("MOONRAIL_PEERS is not set: run `cargo xtask test interop` or `lab`"))
}

/// Its interpreter.
pub(crate) fn python() -> PathBuf {
    peers().join("bin/python")
}

/// `transfer_engine_bench` itself, without the interpreter around it.
pub(crate) fn transfer_engine_bench() -> PathBuf {
    peers().join("lib/python3.11/site-packages/mooncake/transfer_engine_bench")
}

/// Variables for a node, beside those of this process.
pub(crate) type Variables<'a> = &'a [(&'a str, &'a str)];

/// Both kinds publish the host part of their name: on the host everything stays on the loopback device.
pub(crate) const LOOPBACK: Variables<'static> = &[("MC_TCP_BIND_ADDRESS", "127.0.0.1")];

/// A NIC priority matrix that both kinds are given. No discovery finds one like it: it has a place that no node here has, and
/// names the NICs in an order of its own.
pub(crate) const MATRIX: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/interop_support/nics.json");

/// A batch: local address, remote address, length of each transfer.
pub(crate) type Moves<'a> = &'a [(u64, u64, u64)];

/// A node of either kind.
pub(crate) trait Node {
    /// `ours` or `stock`.
    fn kind(&self) -> &'static str;
    /// The name others open it by.
    fn name(&self) -> String;
    /// Registers zeroed memory; returns its address.
    fn register(&self, length: u64) -> u64;
    /// Fills memory from a file.
    fn load(&self, addr: u64, file: &Path);
    /// First offset at which memory differs from the file.
    fn compare(&self, addr: u64, file: &Path) -> Option<u64>;
    /// Address of the first buffer of another node.
    fn first(&self, segment: &str) -> u64;
    /// Moves a batch and waits for it.
    fn transfer(&self, segment: &str, op: Op, moves: Moves) -> Result<(), String>;
    /// Sends a message.
    fn notify(&self, segment: &str, name: &str, message: &str) -> Result<(), String>;
    /// Messages that came since.
    fn notifies(&self) -> Vec<(String, String)>;
    /// Whether it says that a WRITE is done before the bytes are there.
    fn is_early(&self) -> bool {
        false
    }
}

/// An engine of this process.
pub(crate) struct Ours {
    pub(crate) engine: Engine,
    regions: RefCell<Vec<Region>>,
    log: Arc<Mutex<Vec<String>>>,
}

impl Ours {
    /// A builder that reads only these variables, with one unpinned core.
    pub(crate) fn builder(name: &str, metadata: &str, variables: Variables) -> EngineBuilder {
        let variables: Vec<(String, String)> = variables.iter().map(|(k, v)| ((*k).into(), (*v).into())).collect();
        let read = move |key: &str| variables.iter().find(|(k, _)| k == key).map(|(_, v)| v.clone());
        Engine::builder().environment(read).name(name).metadata(metadata).cores(1).pin_cores(false)
    }

    pub(crate) fn start(builder: EngineBuilder) -> Self {
        Self::try_start(builder).unwrap_or_else(|e| panic!("{e}"))
    }

    pub(crate) fn try_start(builder: EngineBuilder) -> Result<Self, String> {
        let log = Arc::<Mutex<Vec<String>>>::default();
        let into = Arc::clone(&log);
        let sink = move |level, line: &str| into.lock().expect("no panic").push(format!("{level:?} {line}"));
        let engine = builder.log(sink).build().map_err(|e| e.to_string())?;
        Ok(Self { engine, regions: RefCell::default(), log })
    }

    /// What the engine has logged.
    pub(crate) fn log(&self) -> String {
        self.log.lock().expect("no panic").join("\n")
    }

    pub(crate) fn region(&self, addr: u64) -> (Region, u64) {
        let regions = self.regions.borrow();
        let found = regions.iter().find(|r| (r.addr()..r.addr() + r.len()).contains(&addr));
        let region = found.unwrap_or_else(|| panic!("{addr:#x} was not registered")).clone();
        let offset = addr - region.addr();
        (region, offset)
    }
}

impl Drop for Ours {
    fn drop(&mut self) {
        if thread::panicking() {
            eprintln!("our node {} logged:\n{}", self.engine.name(), self.log());
        }
    }
}

impl Node for Ours {
    fn kind(&self) -> &'static str {
        "ours"
    }

    fn name(&self) -> String {
        self.engine.name().to_owned()
    }

    fn register(&self, length: u64) -> u64 {
        let region = self.engine.allocate(length as usize, "*").unwrap_or_else(|e| panic!("{e}"));
        let addr = region.addr();
        self.regions.borrow_mut().push(region);
        addr
    }

    fn load(&self, addr: u64, file: &Path) {
        let (region, offset) = self.region(addr);
        region.write(offset, &std::fs::read(file).expect("the file")).expect("in range");
    }

    fn compare(&self, addr: u64, file: &Path) -> Option<u64> {
        let (region, offset) = self.region(addr);
        let wanted = std::fs::read(file).expect("the file");
        let mut seen = vec![0; wanted.len()];
        region.read(offset, &mut seen).expect("in range");
        seen.iter().zip(&wanted).position(|(a, b)| a != b).map(|at| at as u64)
    }

    fn first(&self, segment: &str) -> u64 {
        self.engine.open_segment(segment).unwrap_or_else(|e| panic!("{e}")).buffers()[0].addr
    }

    fn transfer(&self, segment: &str, op: Op, moves: Moves) -> Result<(), String> {
        let segment = self.engine.open_segment(segment).map_err(|e| e.to_string())?;
        let one = |&(local, remote, len): &(u64, u64, u64)| Transfer { op, local, remote, len };
        let transfers: Vec<Transfer> = moves.iter().map(one).collect();
        let batch = self.engine.submit(&segment, &transfers).map_err(|e| e.to_string())?;
        batch.wait(ANSWER).map_err(|e| e.to_string())
    }

    fn notify(&self, segment: &str, name: &str, message: &str) -> Result<(), String> {
        let segment = self.engine.open_segment(segment).map_err(|e| e.to_string())?;
        self.engine.notify(&segment, name, message).map_err(|e| e.to_string())
    }

    fn notifies(&self) -> Vec<(String, String)> {
        self.engine.notifications().into_iter().map(|n| (n.name, n.message)).collect()
    }
}

/// A stock engine in a process of its own.
pub(crate) struct Stock {
    /// Its process, if it runs on this machine.
    child: Option<Child>,
    input: RefCell<Option<Box<dyn Write>>>,
    answers: Receiver<String>,
    log: Arc<Mutex<String>>,
    /// Takes what it logs, until its end.
    logger: Option<thread::JoinHandle<()>>,
    name: String,
    /// Commands: each has a number, and its answer the same.
    asked_so_far: Cell<u64>,
    early: bool,
    /// Memory for a batch that a notification can ride on.
    scratch: RefCell<Option<u64>>,
}

impl Stock {
    /// Starts one; panics if its engine does not.
    pub(crate) fn start(name: &str, metadata: &str, protocol: &str, devices: &str, variables: Variables) -> Self {
        Self::try_start(name, metadata, protocol, devices, variables).unwrap_or_else(|log| panic!("{name}: {log}"))
    }

    /// Starts one over TCP on this host.
    pub(crate) fn on_host(name: &str, metadata: &str) -> Self {
        Self::start(name, metadata, "tcp", "", LOOPBACK)
    }

    /// As [`Stock::start`]; an error is the engine's log.
    pub(crate) fn try_start(
        name: &str,
        metadata: &str,
        protocol: &str,
        devices: &str,
        variables: Variables,
    ) -> Result<Self, String> {
        Self::starting(name, metadata, protocol, devices, variables).ended()
    }

    /// One that starts while the caller does something else.
    pub(crate) fn starting(
        name: &str,
        metadata: &str,
        protocol: &str,
        devices: &str,
        variables: Variables,
    ) -> Starting {
        Self::process().told(name, metadata, protocol, devices, variables)
    }

    /// One that waits for us on another machine, [`wait_on`] that one; it starts while the caller does something else.
    pub(crate) fn elsewhere(
        at: (&str, u16),
        name: &str,
        metadata: &str,
        protocol: &str,
        devices: &str,
        variables: Variables,
    ) -> Starting {
        let until = Instant::now() + ANSWER;
        let stream = loop {
            match TcpStream::connect(at) {
                Ok(stream) => break stream,
                Err(e) => assert!(Instant::now() < until, "{at:?}: {e}"),
            }
            thread::sleep(Duration::from_millis(50));
        };
        let answers = answers(stream.try_clone().expect("a second handle"));
        let input: Box<dyn Write> = Box::new(Line(stream));
        let node = Self {
            child: None,
            input: RefCell::new(Some(input)),
            answers,
            log: Arc::default(),
            logger: None,
            name: String::new(),
            asked_so_far: Cell::new(0),
            early: false,
            scratch: RefCell::default(),
        };
        node.told(name, metadata, protocol, devices, variables)
    }

    fn told(mut self, name: &str, metadata: &str, protocol: &str, devices: &str, variables: Variables) -> Starting {
        let variables: HashMap<&str, &str> = variables.iter().copied().collect();
        self.early = variables.get("MC_TCP_PROTO") == Some(&"1");
        name.clone_into(&mut self.name);
        self.tell(&json!({"do": "start", "name": name, "metadata": metadata, "protocol": protocol,
            "devices": devices, "variables": variables}));
        Starting { node: self, without_store: metadata == "P2PHANDSHAKE" }
    }

    fn process() -> Self {
        let mut command = agent();
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap_or_else(|e| panic!("{}: {e}", python().display()));
        let log = Arc::new(Mutex::new(String::new()));
        let answers = answers(child.stdout.take().expect("piped"));
        let stderr = BufReader::new(child.stderr.take().expect("piped"));
        let into = Arc::clone(&log);
        let logger = thread::spawn(move || {
            for line in stderr.lines().map_while(Result::ok) {
                let mut into = into.lock().expect("nobody panics with it");
                into.push_str(&line);
                into.push('\n');
            }
        });
        let input: Box<dyn Write> = Box::new(child.stdin.take().expect("piped"));
        Self {
            child: Some(child),
            input: RefCell::new(Some(input)),
            answers,
            log,
            logger: Some(logger),
            name: String::new(),
            asked_so_far: Cell::new(0),
            early: false,
            scratch: RefCell::default(),
        }
    }

    /// What its engine has logged.
    pub(crate) fn log(&self) -> String {
        self.log.lock().expect("nobody panics with it").clone()
    }

    /// One command and its answer; an error if the process ended or did not answer.
    pub(crate) fn ask(&self, request: &Value) -> Result<Value, String> {
        self.tell(request);
        self.answer(ANSWER).ok_or_else(|| format!("{}: no answer to {request}\n{}", self.name, self.log()))
    }

    /// Sends a command without waiting for its answer.
    pub(crate) fn tell(&self, request: &Value) {
        self.asked_so_far.set(self.asked_so_far.get() + 1);
        let mut request = request.clone();
        request["number"] = self.asked_so_far.get().into();
        if let Some(input) = &mut *self.input.borrow_mut() {
            let _ = writeln!(input, "{request}");
        }
    }

    /// The answer to the last command; `None` if the process ended or the time is over.
    pub(crate) fn answer(&self, within: Duration) -> Option<Value> {
        let until = Instant::now() + within;
        loop {
            let line = self.answers.recv_timeout(until.saturating_duration_since(Instant::now())).ok()?;
            let answer: Value = serde_json::from_str(&line).unwrap_or_else(|e| panic!("{e}: {line}"));
            // One that was given up comes late.
            if answer["number"] == self.asked_so_far.get() {
                return Some(answer);
            }
        }
    }

    fn asked(&self, request: &Value) -> Value {
        self.ask(request).unwrap_or_else(|e| panic!("{e}"))
    }

    /// SIGKILL, and gone.
    pub(crate) fn kill(mut self) {
        self.tell(&json!({"do": "die"}));
        self.gone();
    }

    /// Ends it as an orderly program does; returns its log.
    pub(crate) fn end(mut self) -> String {
        // Nothing more to read: the script returns, and its engine is destroyed.
        self.input.replace(None);
        self.gone();
        self.log()
    }

    fn gone(&mut self) {
        let until = Instant::now() + Duration::from_secs(20);
        let Some(child) = &mut self.child else { return };
        while child.try_wait().expect("our child").is_none() {
            assert!(Instant::now() < until, "{} does not end", self.name);
            thread::sleep(Duration::from_millis(5));
        }
        if let Some(logger) = self.logger.take() {
            let _ = logger.join();
        }
    }
}

/// A stock engine that was told to start: an emulated node takes many seconds for it, and two nodes can do it at once.
pub(crate) struct Starting {
    node: Stock,
    without_store: bool,
}

impl Starting {
    /// Waits for it; panics if its engine does not start.
    pub(crate) fn started(self) -> Stock {
        let name = self.node.name.clone();
        self.ended().unwrap_or_else(|log| panic!("{name}: {log}"))
    }

    /// The same; an error is the engine's log.
    fn ended(self) -> Result<Stock, String> {
        let Self { mut node, without_store } = self;
        let started = node.answer(ANSWER).ok_or_else(|| format!("{} does not start\n{}", node.name, node.log()))?;
        if started["rc"] != 0 {
            // All of its log: the answer may be here before the last line is.
            return Err(node.end());
        }
        // Without a store the engine draws its own port, and its name is where it listens.
        if without_store {
            let name = node.name.as_str();
            let host = name.rsplit_once(':').filter(|(host, _)| !host.contains(':') || host.ends_with(']'));
            let host = host.map_or(name, |(host, _)| host);
            let host = if host.contains(':') && !host.starts_with('[') { format!("[{host}]") } else { host.to_owned() };
            node.name = format!("{host}:{}", started["rpc_port"]);
        }
        Ok(node)
    }
}

/// Our end of the connection to a node on another machine. Its end is the node's, whoever else holds a handle.
struct Line(TcpStream);

impl Write for Line {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.write(bytes)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.0.flush()
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        let _ = self.0.shutdown(Shutdown::Write);
    }
}

/// `stock.py`, for whoever drives it.
fn agent() -> Command {
    let mut command = Command::new(python());
    command.arg("-u").arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("peers/stock.py"));
    command
}

/// Keeps a stock node for somebody on another machine to drive, at this address; when one has ended, another, until
/// `done`.
pub(crate) fn wait_on(at: (&str, u16), done: impl Fn() -> bool) {
    loop {
        let mut child = agent().arg(at.0).arg(at.1.to_string()).stdin(Stdio::null()).spawn().expect("python runs");
        while child.try_wait().expect("our child").is_none() {
            if done() {
                let _ = child.kill();
                let _ = child.wait();
                return;
            }
            thread::sleep(Duration::from_millis(20));
        }
    }
}

/// The answers of a node, line by line, as they come.
fn answers(from: impl Read + Send + 'static) -> Receiver<String> {
    let (said, answers) = channel();
    thread::spawn(move || {
        for line in BufReader::new(from).lines().map_while(Result::ok) {
            if let Some(answer) = line.strip_prefix("= ") {
                let _ = said.send(answer.to_owned());
            }
        }
    });
    answers
}

impl Drop for Stock {
    fn drop(&mut self) {
        if thread::panicking() {
            let log = self.log();
            let tail: Vec<&str> = log.lines().rev().take(25).collect();
            eprintln!("the stock node {} logged at the end:", self.name);
            tail.iter().rev().for_each(|line| eprintln!("  {line}"));
        }
        if let Some(child) = &mut self.child {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

impl Node for Stock {
    fn kind(&self) -> &'static str {
        "stock"
    }

    fn is_early(&self) -> bool {
        self.early
    }

    fn name(&self) -> String {
        self.name.clone()
    }

    fn register(&self, length: u64) -> u64 {
        let done = self.asked(&json!({"do": "register", "length": length}));
        assert_eq!(done["rc"], 0, "{}", self.log());
        let addr = done["addr"].as_u64().expect("an address");
        self.scratch.borrow_mut().get_or_insert(addr);
        addr
    }

    fn load(&self, addr: u64, file: &Path) {
        self.asked(&json!({"do": "load", "addr": addr, "file": file}));
    }

    fn compare(&self, addr: u64, file: &Path) -> Option<u64> {
        self.asked(&json!({"do": "compare", "addr": addr, "file": file}))["differs"].as_u64()
    }

    fn first(&self, segment: &str) -> u64 {
        self.asked(&json!({"do": "first", "segment": segment}))["addr"].as_u64().expect("an address")
    }

    fn transfer(&self, segment: &str, op: Op, moves: Moves) -> Result<(), String> {
        let op = if op == Op::Read { "read" } else { "write" };
        let done = self.ask(&json!({"do": "transfer", "segment": segment, "op": op, "moves": moves}))?;
        if done["rc"] == 0 { Ok(()) } else { Err(format!("status {}\n{}", done["rc"], self.log())) }
    }

    fn notify(&self, segment: &str, name: &str, message: &str) -> Result<(), String> {
        // Its Python interface has no notification of its own: one goes out after a batch.
        let local = self.scratch.borrow().expect("memory was registered");
        let remote = self.first(segment);
        let done = self.ask(&json!({"do": "transfer", "segment": segment, "op": "read",
            "moves": [[local, remote, 8]], "notify": [name, message]}))?;
        if done["rc"] == 0 { Ok(()) } else { Err(self.log()) }
    }

    fn notifies(&self) -> Vec<(String, String)> {
        let seen = self.asked(&json!({"do": "notifies"}));
        serde_json::from_value(seen["notifies"].clone()).expect("pairs")
    }
}

/// A file with pseudo-random bytes, another for each seed.
pub(crate) fn pattern(folder: &Path, seed: u64, length: u64) -> PathBuf {
    let path = folder.join(format!("{seed:x}-{length}"));
    let mut bytes = vec![0; length as usize];
    moonrail_tools::bench::pattern::fill(&mut bytes, seed << 32, seed);
    std::fs::write(&path, bytes).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    path
}

/// A folder of this test, gone with it.
pub(crate) struct Folder(pub(crate) PathBuf);

impl Folder {
    pub(crate) fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("moonrail-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        Self(path)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Lengths that meet every edge: inside a slice, at its border, with a remainder, many slices.
pub(crate) const LENGTHS: [u64; 7] = [1, 64, 4097, 65_536, 81_921, 200_000, 1_048_576];

/// How long bytes may be under way when a stock node that is early says they are there.
const EARLY: Duration = Duration::from_secs(10);

/// Memory that a cell needs of each node.
pub(crate) fn extent() -> u64 {
    LENGTHS.iter().sum::<u64>().next_multiple_of(4096)
}

/// One cell of the matrix: `from` moves one batch of every length to or from `to`. Afterwards the owner of the memory
/// that was written compares all of it, and the whole other memory is seen to be untouched.
pub(crate) fn cell(
    folder: &Path,
    seed: u64,
    from: &dyn Node,
    to: &dyn Node,
    op: Op,
    (local, remote): (u64, u64),
) -> Result<(), String> {
    let sent = pattern(folder, 2 * seed + 1, extent());
    let other = pattern(folder, 2 * seed + 2, extent());
    let (source, sink, owner_of_source, owner_of_sink) = match op {
        Op::Write => (local, remote, from, to),
        Op::Read => (remote, local, to, from),
    };
    owner_of_source.load(source, &sent);
    owner_of_sink.load(sink, &other);
    let mut at = 0;
    let moves: Vec<_> = LENGTHS
        .iter()
        .map(|&length| {
            let one = (local + at, remote + at, length);
            at += length;
            one
        })
        .collect();
    from.transfer(&to.name(), op, &moves)?;
    // What lies behind the last byte was not to be touched.
    let mut wanted = std::fs::read(&sent).expect("the file");
    wanted[at as usize..].copy_from_slice(&std::fs::read(&other).expect("the file")[at as usize..]);
    let expected = folder.join("expected");
    std::fs::write(&expected, wanted).expect("a file");
    // By version 1 of the TCP protocol a stock WRITE is done when its own kernel has the last byte.
    let until = Instant::now() + if op == Op::Write && from.is_early() { EARLY } else { Duration::ZERO };
    let mut wrong = owner_of_sink.compare(sink, &expected);
    while wrong.is_some() && Instant::now() < until {
        thread::sleep(Duration::from_millis(5));
        wrong = owner_of_sink.compare(sink, &expected);
    }
    if let Some(at) = wrong {
        return Err(format!(
            "byte {at} of {}'s memory is wrong after a {op:?} by {}",
            owner_of_sink.kind(),
            from.kind()
        ));
    }
    match owner_of_source.compare(source, &sent) {
        Some(at) => Err(format!("byte {at} of {}'s source was overwritten", owner_of_source.kind())),
        None => Ok(()),
    }
}

/// Rows and columns for a human.
#[derive(Default)]
pub(crate) struct Table {
    rows: Vec<Vec<String>>,
    failed: Vec<String>,
}

impl Table {
    pub(crate) fn headed(columns: &[&str]) -> Self {
        Self { rows: vec![columns.iter().map(|c| (*c).to_owned()).collect()], failed: Vec::new() }
    }

    /// A row: its first cells, then outcomes. One outcome that is an error fails the table in the end.
    pub(crate) fn row(&mut self, first: &[&str], outcomes: &[Result<String, String>]) {
        let name = first.join(" ");
        let mut row: Vec<String> = first.iter().map(|cell| (*cell).to_owned()).collect();
        for (number, outcome) in outcomes.iter().enumerate() {
            if let Err(why) = outcome {
                let column = self.rows[0].get(first.len() + number).cloned().unwrap_or_default();
                self.failed.push(format!("{name}, {column}: {why}"));
            }
            row.push(outcome.clone().unwrap_or_else(|_| "FAILED".to_owned()));
        }
        self.rows.push(row);
    }

    /// Prints it; panics if a cell failed.
    pub(crate) fn close(self) {
        let columns = self.rows.iter().map(Vec::len).max().unwrap_or(0);
        let width = |c: usize| self.rows.iter().filter_map(|row| row.get(c)).map(|s| s.chars().count()).max();
        let widths: Vec<usize> = (0..columns).map(|c| width(c).unwrap_or(0)).collect();
        println!();
        for row in &self.rows {
            let cells: Vec<String> = row.iter().zip(&widths).map(|(cell, w)| format!("{cell:<w$}")).collect();
            println!("| {} |", cells.join(" | "));
        }
        println!();
        assert!(self.failed.is_empty(), "{}", self.failed.join("\n"));
    }
}
