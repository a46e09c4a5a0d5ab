//! The host's side of a run: boot, output, faults on request, time limits.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::folder::RunFolder;
use super::image::Image;
use super::node::{self, Console, Node};
use super::{Plan, Show, Topology};
use crate::error::{Error, Result};
use crate::process::Bounded;

/// From the start of QEMU to all NICs up on all nodes; 10 to 15 s on an idle machine with two cores, a minute on a busy one.
const BOOT_LIMIT: Duration = Duration::from_secs(120);
/// What the other nodes get to finish, or to notice in a barrier, after one node has failed.
const AFTER_FAILURE: Duration = Duration::from_secs(20);
/// How long the nodes beside the switch may take to listen.
const SOCKETS_LIMIT: Duration = Duration::from_secs(30);
const LOOK_EVERY: Duration = Duration::from_millis(50);

/// Runs a plan to its end.
pub(super) fn run(plan: &Plan, image: &Image, folder: &RunFolder) -> Result<()> {
    let boot = || Lab::boot(plan.topology, image, folder, Console::Log);
    let mut lab = boot().or_else(|error| {
        // Seen once in some hundred boots: an emulated processor that stands still before its kernel says a word.
        println!("lab: {error}\nlab: booting once more");
        remove_sockets(plan.topology, folder);
        folder.forget_boot()?;
        boot()
    })?;
    let booted = lab.started.elapsed();
    folder.go()?;
    let mut output = Output::new(plan.show, folder, plan.topology.nodes);
    let ended = lab.until_all_ended(plan.limit, &mut output);
    drop(lab);
    output.look();
    if plan.show == Show::Live {
        println!("lab: {} nodes were up after {:.1} s", plan.topology.nodes, booted.as_secs_f64());
    }
    let failed = ended?;
    if failed.is_empty() { Ok(()) } else { Err(failure(&failed, plan.show, folder)) }
}

/// Gives the terminal to node 0 until its shell ends.
pub(super) fn shell(topology: Topology, image: &Image, folder: &RunFolder) -> Result<()> {
    let _terminal = Terminal::save();
    println!("lab: booting {} nodes (Ctrl-A X gives up)", topology.nodes);
    let mut lab = Lab::boot(topology, image, folder, Console::Terminal)?;
    folder.go()?;
    while folder.status(0).is_none() && lab.nodes[0].ended().is_none() {
        lab.serve_faults();
        std::thread::sleep(LOOK_EVERY);
    }
    Ok(())
}

/// Why a node counts as failed.
#[derive(Debug, PartialEq, Eq)]
enum Failed {
    Status(i32),
    /// It was ended while its command still ran.
    Late(String),
    /// QEMU ended by itself.
    Lost(String),
}

struct Lab<'a> {
    folder: &'a RunFolder,
    nodes: Vec<Node>,
    /// Killed on request: not waited for, and no failure.
    killed: Vec<u32>,
    started: Instant,
}

impl<'a> Lab<'a> {
    fn boot(topology: Topology, image: &Image, folder: &'a RunFolder, first: Console) -> Result<Self> {
        remove_sockets(topology, folder);
        let mut lab = Self { folder, nodes: Vec::new(), killed: Vec::new(), started: Instant::now() };
        // The switch is last: it connects to the others.
        for index in (1..topology.nodes).chain([0]) {
            if index == 0 {
                lab.until_others_listen(topology)?;
            }
            let console = if index == 0 { first } else { Console::Log };
            lab.nodes.push(Node::start(index, topology, image, folder, console)?);
        }
        lab.nodes.sort_by_key(Node::index);
        lab.until_all_up()?;
        remove_sockets(topology, folder);
        Ok(lab)
    }

    fn until_others_listen(&mut self, topology: Topology) -> Result<()> {
        let all: Vec<PathBuf> = sockets(topology, self.folder);
        while !all.iter().all(|socket| socket.exists()) {
            self.none_lost()?;
            if self.started.elapsed() > SOCKETS_LIMIT {
                return Err(Error::new("the nodes did not open the sockets for the switch in time", ""));
            }
            std::thread::sleep(LOOK_EVERY);
        }
        Ok(())
    }

    fn until_all_up(&mut self) -> Result<()> {
        loop {
            let mut late = self.nodes.iter().map(Node::index).filter(|&node| !self.folder.is_up(node));
            let Some(late) = late.next() else { return Ok(()) };
            self.none_lost()?;
            let why = match self.folder.gave_up(late) {
                Some(why) => format!("node {late} could not boot: {why}"),
                None if self.started.elapsed() > BOOT_LIMIT => {
                    format!("node {late} was not up within {} s", BOOT_LIMIT.as_secs())
                }
                None => {
                    std::thread::sleep(LOOK_EVERY);
                    continue;
                }
            };
            return Err(Error::new(format!("{why}; its console ends:\n{}", self.folder.console_end(late)), ""));
        }
    }

    /// While booting, a QEMU that ends is an error.
    fn none_lost(&mut self) -> Result<()> {
        for node in &mut self.nodes {
            if let Some(status) = node.ended() {
                let (index, said) = (node.index(), self.folder.console_end(node.index()));
                return Err(Error::new(
                    format!("node {index} ended while booting ({status}); its console ends:\n{said}"),
                    "",
                ));
            }
        }
        Ok(())
    }

    /// Waits for every node's command; returns the nodes that failed.
    fn until_all_ended(&mut self, limit: Duration, output: &mut Output) -> Result<Vec<(u32, Failed)>> {
        let deadline = Instant::now() + limit;
        let mut grace: Option<(Instant, u32)> = None;
        loop {
            self.serve_faults();
            output.look();
            let (failed, running) = self.survey();
            if running.is_empty() {
                return Ok(failed);
            }
            let now = Instant::now();
            if let Some((node, _)) = failed.first() {
                grace.get_or_insert((now + AFTER_FAILURE, *node));
            }
            let reason = match grace {
                _ if now >= deadline => format!("still running at the limit of {} s", limit.as_secs()),
                Some((end, node)) if now >= end => {
                    format!("ended by us: still running {} s after node {node} had failed", AFTER_FAILURE.as_secs())
                }
                _ => {
                    std::thread::sleep(LOOK_EVERY);
                    continue;
                }
            };
            let late = running.into_iter().map(|node| (node, Failed::Late(reason.clone())));
            return Ok(failed.into_iter().chain(late).collect());
        }
    }

    /// Who has failed, and who still runs.
    fn survey(&mut self) -> (Vec<(u32, Failed)>, Vec<u32>) {
        let (mut failed, mut running) = (Vec::new(), Vec::new());
        for node in &mut self.nodes {
            let index = node.index();
            // Whether it has ended first: a status written just before is then seen.
            let lost = node.ended();
            match self.folder.status(index) {
                Some(0) => {}
                Some(status) => failed.push((index, Failed::Status(status))),
                None if self.killed.contains(&index) => {}
                None => match lost {
                    Some(status) => failed.push((index, Failed::Lost(format!("{status}")))),
                    None => running.push(index),
                },
            }
        }
        (failed, running)
    }

    /// Carries out what the nodes asked for in `/lab/shared/.control`.
    fn serve_faults(&mut self) {
        for entry in std::fs::read_dir(self.folder.control()).into_iter().flatten().flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            let Some(request) = Request::parse(&name) else { continue };
            let done = request.and_then(|request| self.fault(request));
            if let Err(e) = done {
                eprintln!("lab: refused {name}: {e}");
                let _ = std::fs::write(self.folder.control().join(format!("{name}.refused")), format!("{e}\n"));
            }
            // Its end is the answer.
            let _ = std::fs::remove_file(entry.path());
        }
    }

    fn fault(&mut self, request: Request) -> Result<()> {
        let node = self.nodes.iter_mut().find(|node| node.index() == request.node && request.node > 0);
        let Some(node) = node else {
            return Err(Error::new(
                format!("node {} cannot be faulted", request.node),
                "name a node of this lab, not node 0: its QEMU is the switch",
            ));
        };
        match request.fault {
            Fault::Freeze => node.freeze(),
            Fault::Thaw => node.thaw(),
            Fault::Kill => {
                // First the mark: a barrier must never wait for a node that is gone.
                self.killed.push(request.node);
                self.folder.write(&format!("shared/.control/dead-{}", request.node), "")?;
                node.kill();
                Ok(())
            }
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    Freeze,
    Thaw,
    Kill,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Request {
    fault: Fault,
    node: u32,
}

impl Request {
    /// `freeze-1`; nothing for the files that are our own answers.
    fn parse(name: &str) -> Option<Result<Self>> {
        if name.ends_with(".refused") || name.starts_with("dead-") {
            return None;
        }
        let parsed = name.split_once('-').and_then(|(fault, node)| {
            let fault = match fault {
                "freeze" => Fault::Freeze,
                "thaw" => Fault::Thaw,
                "kill" => Fault::Kill,
                _ => return None,
            };
            Some(Self { fault, node: node.parse().ok()? })
        });
        Some(parsed.ok_or_else(|| Error::new(format!("{name} is no request"), "use freeze-K, thaw-K or kill-K")))
    }
}

fn sockets(topology: Topology, folder: &RunFolder) -> Vec<PathBuf> {
    let of_node = |peer| (0..topology.nics).map(move |nic| node::socket(nic, peer));
    (1..topology.nodes).flat_map(of_node).map(|socket| folder.path().join(socket)).collect()
}

/// Once connected they are of no use, and files left by an earlier run would look like a node that listens.
fn remove_sockets(topology: Topology, folder: &RunFolder) {
    for socket in sockets(topology, folder) {
        let _ = std::fs::remove_file(socket);
    }
}

fn failure(failed: &[(u32, Failed)], show: Show, folder: &RunFolder) -> Error {
    let mut lines = Vec::new();
    let mut panics = Vec::new();
    for (node, why) in failed {
        let own = panics_in(&folder.log(*node));
        if let (Failed::Status(_), true) = (why, own.only_followed) {
            lines.push(format!("node {node}: gave up because another node had failed"));
            continue;
        }
        panics.extend(own.messages.iter().map(|message| format!("node {node}: {message}")));
        lines.push(match why {
            Failed::Status(status) => format!("node {node}: the command's exit status is {status}"),
            Failed::Late(reason) => format!("node {node}: {reason}"),
            Failed::Lost(status) => {
                format!("node {node}: its QEMU ended ({status}); its console ends:\n{}", folder.console_end(*node))
            }
        });
        if show != Show::Live {
            lines.push(format!("  its output ends:\n{}", folder.log_end(*node, 40)));
        }
    }
    // Last, where whoever looks at the end of a long output sees them.
    lines.extend(panics);
    Error::new(lines.join("\n"), "")
}

/// The panics of one node's tests.
#[derive(Debug, Default, PartialEq, Eq)]
struct Panics {
    /// Where, and the first line of what it said.
    messages: Vec<String>,
    /// There were some, and all because another node had failed first.
    only_followed: bool,
}

fn panics_in(log: &Path) -> Panics {
    let text = std::fs::read(log).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default();
    Panics::parse(&text)
}

impl Panics {
    fn parse(text: &str) -> Self {
        let mut panics = Self::default();
        let mut lines = text.lines();
        while let Some(place) = lines.find(|line| line.contains("' panicked at ") || line.contains(") panicked at ")) {
            let message = lines.next().unwrap_or_default();
            // The words of `Lab::hear_within` in the tests.
            if message.starts_with("gave up: node ") {
                panics.only_followed = true;
            } else {
                panics.messages.push(format!("{place} {message}"));
            }
        }
        panics.only_followed &= panics.messages.is_empty();
        panics
    }
}

/// The nodes' logs, shown as they grow.
struct Output {
    logs: Vec<Tail>,
}

struct Tail {
    prefix: String,
    path: PathBuf,
    shown: u64,
    /// The beginning of a line whose end has not come yet.
    partial: Vec<u8>,
}

impl Output {
    fn new(show: Show, folder: &RunFolder, nodes: u32) -> Self {
        let shown = if show == Show::Live { 0..nodes } else { 0..0 };
        let tail =
            |node| Tail { prefix: format!("[node{node}] "), path: folder.log(node), shown: 0, partial: Vec::new() };
        Self { logs: shown.map(tail).collect() }
    }

    fn look(&mut self) {
        for tail in &mut self.logs {
            for line in tail.new_lines() {
                println!("{}{line}", tail.prefix);
            }
        }
    }
}

impl Tail {
    fn new_lines(&mut self) -> Vec<String> {
        let mut bytes = std::mem::take(&mut self.partial);
        if let Ok(mut file) = File::open(&self.path) {
            let read = file.seek(SeekFrom::Start(self.shown)).and_then(|_| file.read_to_end(&mut bytes));
            self.shown += read.unwrap_or(0) as u64;
        }
        let end = bytes.iter().rposition(|&byte| byte == b'\n').map_or(0, |newline| newline + 1);
        self.partial = bytes.split_off(end);
        String::from_utf8_lossy(&bytes).lines().map(str::to_owned).collect()
    }
}

/// The settings of our terminal, put back in the end: QEMU is killed and cannot do it.
struct Terminal(Option<String>);

impl Terminal {
    fn save() -> Self {
        let asked = Bounded::new("sh", Duration::from_secs(5)).args(["-c", "stty -g < /dev/tty"]).output();
        Self(asked.ok().map(|text| text.trim().to_owned()))
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        if let Some(settings) = &self.0 {
            // Not through `timeout`: a background process group may not change a terminal's settings.
            let _ = std::process::Command::new("stty").arg(settings).status();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_parsed_and_answers_skipped() {
        let parse = |name| Request::parse(name).map(std::result::Result::ok);
        assert_eq!(parse("freeze-1"), Some(Some(Request { fault: Fault::Freeze, node: 1 })));
        assert_eq!(parse("kill-12"), Some(Some(Request { fault: Fault::Kill, node: 12 })));
        assert_eq!(parse("dead-1"), None);
        assert_eq!(parse("explode-1"), Some(None));
        assert_eq!(parse("thaw-x"), Some(None));
        assert_eq!(parse("thaw-x.refused"), None);
    }

    #[test]
    fn a_panic_is_told_from_one_that_followed_another_nodes() {
        let log = "test a ... \n\nthread 'a' (171) panicked at tests/a.rs:7:5:\nall rails: not within 60s\nstack backtrace:\n";
        let own = Panics::parse(log);
        assert_eq!(own.messages, ["thread 'a' (171) panicked at tests/a.rs:7:5: all rails: not within 60s"]);
        assert!(!own.only_followed);
        let followed = "thread 'a' panicked at tests/mod.rs:79:13:\ngave up: node 0 failed in this test\n";
        assert_eq!(Panics::parse(followed), Panics { messages: Vec::new(), only_followed: true });
        let both = Panics::parse(&format!("{followed}{log}"));
        assert_eq!((both.messages.len(), both.only_followed), (1, false));
        assert_eq!(Panics::parse("test a ... ok\n"), Panics::default());
    }

    #[test]
    fn a_tail_gives_whole_lines_once() {
        let path = std::env::temp_dir().join(format!("xtask-tail-{}", std::process::id()));
        let mut tail = Tail { prefix: String::new(), path: path.clone(), shown: 0, partial: Vec::new() };
        assert!(tail.new_lines().is_empty(), "no file yet");
        std::fs::write(&path, "one\ntw").expect("write");
        assert_eq!(tail.new_lines(), ["one"]);
        std::fs::write(&path, "one\ntwo\n").expect("write");
        assert_eq!(tail.new_lines(), ["two"]);
        assert!(tail.new_lines().is_empty());
        std::fs::remove_file(path).expect("clean");
    }
}
