//! Peers that are killed, and thousands that come once: nothing of them stays behind.

mod tcp_rig;

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, TcpStream};
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use moonrail_datapath::error::{Cause, SliceError};
use moonrail_datapath::nic::{Op, Target, TcpVersion};

use tcp_rig::{LIMIT, Node, Server, options, pattern};

const CHILD: &str = "MOONRAIL_TEST_TCP_CHILD";
/// Descriptors are counted for the whole process: one test at a time.
static ALONE: Mutex<()> = Mutex::new(());

const CHILD_BYTES: usize = 8 << 20;

/// Not a test by itself: the body of the other process.
#[test]
fn child() {
    if std::env::var_os(CHILD).is_none() {
        return;
    }
    let server = Server::new(options(), 1);
    let far = server.memory(CHILD_BYTES);
    println!("SERVING {} {}", server.nic.port(), far.memory.addr());
    std::thread::sleep(Duration::from_secs(120));
}

/// Another process that serves, killed with its value.
struct Process {
    child: Child,
    target: Target,
    addr: u64,
}

impl Process {
    fn start(version: TcpVersion) -> Self {
        Self::start_with(version, 1024)
    }

    /// With that many descriptors at the most.
    fn start_with(version: TcpVersion, descriptors: u32) -> Self {
        let mut child = Command::new("sh")
            .args(["-c", &format!("ulimit -n {descriptors} && exec \"$0\" --exact child --nocapture")])
            .arg(std::env::current_exe().unwrap())
            .env(CHILD, "1")
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let mut words = vec![];
        for line in lines {
            let line = line.unwrap();
            if let Some(at) = line.find("SERVING ") {
                words = line[at + 8..].split(' ').map(|w| w.parse::<u64>().unwrap()).collect();
                break;
            }
        }
        let target = Target::Tcp { host: "127.0.0.1".into(), port: words[0] as u16, version };
        Self { child, target, addr: words[1] }
    }

    /// SIGKILL: nothing of it runs any more.
    fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

#[test]
fn a_peer_killed_in_mid_transfer_costs_its_rail_and_nothing_else() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let mut node = Node::new(options());
    let (local, back) = (node.region(CHILD_BYTES), node.region(CHILD_BYTES));
    let sent = pattern(CHILD_BYTES, 11);
    local.memory().write(0, &sent).unwrap();
    let mut before = None;
    for round in 0..30u64 {
        let version = [TcpVersion::V1, TcpVersion::V2, TcpVersion::Batch][round as usize % 3];
        let op = if round % 2 == 0 { Op::Write } else { Op::Read };
        let mut peer = Process::start(version);
        node.connect(&peer.target, 3).unwrap();
        assert!(node.run_until(LIMIT, |n| n.peer.routes() == 1));
        let remote = node.remote(peer.addr, CHILD_BYTES as u64);
        let whole = [(0, 0, CHILD_BYTES as u64)];
        let mut works: Vec<_> = (0..8).map(|_| node.submit(op, &local, &remote, &whole)).collect();
        // In the middle of it, a little later each round.
        let until = Instant::now() + Duration::from_micros(200 * round);
        while Instant::now() < until || node.counters.bytes_done.get() == 0 {
            node.turn();
        }
        peer.kill();
        assert!(node.run_until(LIMIT, |n| n.needs_repair()), "round {round}: {:?}", node.first_errors);
        assert_eq!(node.needs_fence, 0, "the end of its stream proves that the peer's end has ended");
        // Another peer in its place takes what is left.
        let next = Process::start(version);
        let fresh = node.remote(next.addr, CHILD_BYTES as u64);
        works.retain(|work| !work.is_terminal());
        for work in &works {
            // Their addresses were the killed process's.
            work.abandon(SliceError::of(Cause::Cancelled));
        }
        for work in &works {
            assert!(node.finish(work), "round {round}");
        }
        node.connect(&next.target, 2).unwrap();
        let last = node.submit(Op::Write, &local, &fresh, &whole);
        assert!(node.finish(&last) && last.first_error().is_none(), "round {round}");
        let read = node.submit(Op::Read, &back, &fresh, &whole);
        assert!(node.finish(&read) && read.first_error().is_none(), "round {round}");
        let mut there = vec![0; CHILD_BYTES];
        back.memory().read(0, &mut there).unwrap();
        let mut ours = vec![0; CHILD_BYTES];
        local.memory().read(0, &mut ours).unwrap();
        assert!(there == ours, "round {round}: the other process has other bytes");
        node.retire();
        assert!(node.run_until(LIMIT, |n| n.core.outstanding() == 0 && n.peer.routes() == 0));
        drop(next);
        (0..200).for_each(|_| _ = node.turn());
        let now = descriptors();
        assert!(now <= *before.get_or_insert(now) + 2, "round {round}: {before:?} descriptors are {now} now");
    }
    assert_eq!((node.first_errors.len(), node.overdue), (30, 0), "one first error for each life");
}

#[test]
fn thousands_of_one_shot_connections_are_served_and_forgotten() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let server = Server::new(options(), 2);
    let far = server.memory(4096);
    let before = descriptors();
    for n in 0..2000u64 {
        let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, server.nic.port())).unwrap();
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        let mut bytes = [0; 24 + 8];
        bytes[0] = 8;
        bytes[8..16].copy_from_slice(&(far.memory.addr() + 8 * (n % 512)).to_le_bytes());
        bytes[16] = 0x81;
        bytes[24..].copy_from_slice(&n.to_le_bytes());
        stream.write_all(&bytes).unwrap();
        let mut status = [0; 8];
        stream.read_exact(&mut status).unwrap();
        assert_eq!(status[0], 0);
        assert_eq!(far.range(8 * (n % 512), 8), n.to_le_bytes());
    }
    let until = Instant::now() + LIMIT;
    while server.nic.serving() > 0 && Instant::now() < until {
        std::thread::yield_now();
    }
    assert_eq!((server.nic.serving(), server.nic.count(|c| c.accepted.get())), (0, 2000));
    assert!(descriptors() <= before + 4, "{before} descriptors became {}", descriptors());
}

#[test]
fn a_server_without_descriptors_drops_who_is_idle_and_serves_who_asks() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let process = Process::start_with(TcpVersion::V2, 40);
    let Target::Tcp { port, .. } = process.target else { panic!("a TCP target") };
    let mut ask = [0; 24];
    ask[0] = 1;
    ask[8..16].copy_from_slice(&process.addr.to_le_bytes());
    ask[16] = 0x80;
    let mut streams = vec![];
    for n in 0..200 {
        let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).unwrap();
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        stream.write_all(&ask).unwrap();
        stream.read_exact(&mut [0; 9]).unwrap_or_else(|e| panic!("connection {n}: {e}"));
        streams.push(stream);
    }
    // None is idle: each owes a body. Whoever comes then waits until one of them goes.
    let mut busy = ask;
    busy[0] = 2;
    busy[16] = 0x81;
    for stream in &mut streams {
        let _ = stream.write_all(&busy);
    }
    std::thread::sleep(Duration::from_millis(100));
    let mut late = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).unwrap();
    late.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
    late.write_all(&ask).unwrap();
    assert!(late.read_exact(&mut [0; 9]).is_err(), "there is no descriptor for it");
    drop(streams);
    late.set_read_timeout(Some(LIMIT)).unwrap();
    late.read_exact(&mut [0; 9]).unwrap();
}
