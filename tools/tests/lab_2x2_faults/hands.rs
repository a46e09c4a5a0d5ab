//! Node 1 does to itself what node 0 orders: the faults, and the peer's process. What each order was begun at is read
//! from the host's clock.

use std::cell::Cell;
use std::io::Write;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::time::{Duration, Instant};

use crate::lab_support::Lab;
use crate::lab_support::clock::HostClock;
use crate::lab_support::process::Process;

/// Start-up of a process on an emulated node that is busy with something else.
const READY: Duration = Duration::from_secs(40);
/// Between two orders; a long fault lies between.
const NEXT_ORDER: Duration = Duration::from_secs(900);

/// Node 0's side.
pub(crate) struct Orders<'a> {
    lab: &'a Lab,
    count: Cell<u32>,
}

/// When an order was carried out, by our own clock.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Moment {
    pub(crate) began: Instant,
    pub(crate) ended: Instant,
}

impl<'a> Orders<'a> {
    pub(crate) fn new(lab: &'a Lab) -> Self {
        Self { lab, count: Cell::new(0) }
    }

    /// Has an order carried out: `ip …` or `tc …` (one line of their batch language), `serve OPTIONS`, `kill`, `end`.
    pub(crate) fn give(&self, order: &str) -> Moment {
        let number = self.count.replace(self.count.get() + 1);
        let clock = HostClock::compare(self.lab, &format!("clock-{number}"));
        self.lab.tell(&format!("order-{number}"), order);
        let (began, ended) = (format!("began-{number}"), format!("ended-{number}"));
        self.lab.hear(&ended, 1);
        Moment { began: clock.ours(self.lab.left_at(&began, 1)), ended: clock.ours(self.lab.left_at(&ended, 1)) }
    }
}

/// Prints what this node's network is, if its test fails.
pub(crate) struct Network;

impl Drop for Network {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let commands = "ip -br link; ip -br addr; ip route; ip neigh; grep -v :0000:0000:0000:0000$ /sys/class/infiniband/rxe*/ports/1/gids/*";
            let shown = Command::new("sh").args(["-c", commands]).output();
            let text = shown.map_or_else(|e| e.to_string(), |o| String::from_utf8_lossy(&o.stdout).into_owned());
            println!("this node's network:\n{text}");
        }
    }
}

/// Node 1's side: until `end`.
pub(crate) fn obey(lab: &Lab) {
    let (mut ip, mut tc) = (Tool::start("ip"), Tool::start("tc"));
    let mut server: Option<Process> = None;
    for number in 0.. {
        let order = lab.hear_within(&format!("order-{number}"), 0, NEXT_ORDER);
        lab.tell(&format!("began-{number}"), "");
        let (what, rest) = order.split_once(' ').unwrap_or((&order, ""));
        match what {
            "ip" => ip.run(rest),
            "tc" => tc.run(rest),
            "serve" => server.insert(Process::moonrail(&order)).says("listening on ", READY).clear(),
            "kill" => server.take().expect("a server").kill(),
            "end" => {}
            _ => panic!("unknown order {order:?}"),
        }
        lab.tell(&format!("ended-{number}"), "");
        if what == "end" {
            break;
        }
    }
    if let Some(server) = server {
        // For whoever reads the log: the other end's view of the same faults.
        println!("the peer's log:\n{}", server.terminate(Duration::from_secs(30)).stderr);
    }
}

/// `ip` or `tc`, started already: on an emulated node that alone takes a third of a second, which no fault may wait for.
struct Tool {
    child: Child,
    lines: ChildStdin,
}

impl Tool {
    fn start(program: &str) -> Self {
        let mut command = Command::new(program);
        let child = command.args(["-force", "-batch", "-"]).stdin(Stdio::piped()).spawn();
        let mut child = child.unwrap_or_else(|e| panic!("{program}: {e}"));
        let lines = child.stdin.take().expect("piped");
        Self { child, lines }
    }

    fn run(&mut self, line: &str) {
        writeln!(self.lines, "{line}").and_then(|()| self.lines.flush()).unwrap_or_else(|e| panic!("{line}: {e}"));
    }
}

impl Drop for Tool {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
