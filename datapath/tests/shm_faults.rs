//! What peers and systems do to the shm NIC: they die, fork, lie, and live elsewhere. One test at a time: they count what
//! this process has open.
#![allow(unsafe_code)]

mod shm_rig;

use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use moonrail_datapath::nic::shm::ShmNic;
use moonrail_datapath::nic::{Completion, DialError, Nic, Op, Target, WcStatus};
use moonrail_datapath::region::Memory;
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::net::{
    AddressFamily, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags, SocketType,
};

use shm_rig::{Desk, PATIENCE, Peer, caps, fill, soon};

/// Not a test: the body of the peers.
#[test]
fn peer() {
    shm_rig::peer_main();
}

fn alone() -> MutexGuard<'static, ()> {
    static ONE: Mutex<()> = Mutex::new(());
    ONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Descriptors and mappings of shared memory that this process has.
fn held() -> (usize, usize) {
    let links = std::fs::read_dir("/proc/self/fd").unwrap().filter_map(|fd| std::fs::read_link(fd.ok()?.path()).ok());
    let ours = |link: &std::path::PathBuf| {
        let link = link.to_string_lossy();
        ["memfd:moonrail", "socket:", "pidfd", "eventfd"].iter().any(|kind| link.contains(kind))
    };
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    (links.filter(ours).count(), maps.lines().filter(|line| line.contains("memfd:moonrail")).count())
}

#[test]
fn a_peer_killed_in_mid_copy_is_an_error_soon_and_leaves_nothing() {
    let _alone = alone();
    let nic = ShmNic::open().unwrap();
    let near = Memory::allocate(16 << 20).unwrap();
    fill(&near, 1);
    let (mut cq, handle) = nic.create_cq(4096).unwrap();
    let mut before = (0, 0);
    for round in 0..30u64 {
        let mut peer = Peer::start();
        let how = if round % 2 == 0 { "allocate" } else { "borrow" };
        let far = peer.ask(&format!("{how} {} 1", 16 << 20));
        if round == 0 {
            before = held();
        }
        let mut desk = Desk::dial(&nic, peer.token).unwrap();
        let target = Target::Shm { token: peer.token };
        let (qp, admin) = nic.dial(&handle, caps(), &target, Instant::now() + PATIENCE).unwrap();
        let killer = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_micros(500 + 700 * (round % 7)));
            peer.kill();
            Instant::now()
        });
        let pieces: Vec<_> = (0..16).map(|i| (near.addr() + (i << 20), far + (i << 20), 1 << 20)).collect();
        let op = if round % 3 == 0 { Op::Read } else { Op::Write };
        let mut statuses = vec![];
        while statuses.iter().all(|&s| s == WcStatus::SUCCESS) {
            statuses = desk.run(op, &pieces);
        }
        let ended = Instant::now();
        let killed = killer.join().unwrap();
        let late = ended.saturating_duration_since(killed);
        assert!(late < Duration::from_millis(500), "{how} round {round}: {late:?} after the end");
        let first = statuses.iter().position(|&s| s != WcStatus::SUCCESS).unwrap();
        assert_eq!(statuses[first], WcStatus::RETRY_EXC_ERR, "{how} round {round}");
        assert!(statuses[first + 1..].iter().all(|&s| s == WcStatus::WR_FLUSH_ERR));
        // One queue pair goes with its completion queue, the other is destroyed while the queue lives.
        drop((qp, admin));
        cq.poll(&mut [Completion::EMPTY; 4]).unwrap();
        drop(desk);
        soon(&format!("round {round}: {:?} before, {:?} now", before, held()), || held() == before);
    }
}

#[test]
fn a_forked_child_that_holds_the_socket_does_not_hide_the_end() {
    let _alone = alone();
    let nic = ShmNic::open().unwrap();
    let mut peer = Peer::start();
    let far = peer.ask("allocate 4096 1");
    let mut desk = Desk::dial(&nic, peer.token).unwrap();
    let near = Memory::allocate(4096).unwrap();
    desk.succeed(Op::Write, &[(near.addr(), far, 4096)]);
    peer.ask("fork");
    peer.kill();
    let since = Instant::now();
    while desk.run(Op::Write, &[(near.addr(), far, 64)]) == [WcStatus::SUCCESS] {
        assert!(since.elapsed() < Duration::from_secs(2));
    }
}

#[test]
fn queue_pairs_that_were_never_used_leave_nothing() {
    let _alone = alone();
    let before = held();
    for round in 0..20 {
        let (ours, theirs) = (ShmNic::open().unwrap(), ShmNic::open().unwrap());
        let memory = Memory::allocate(4096).unwrap();
        let registration = theirs.register(&memory, 0, 4096, shm_rig::REMOTE).unwrap();
        let target = Target::Shm { token: if round % 2 == 0 { theirs.token() } else { ours.token() } };
        let (cq, handle) = ours.create_cq(16).unwrap();
        let pair = ours.dial(&handle, caps(), &target, Instant::now() + PATIENCE).unwrap();
        // Whatever goes first.
        match round % 4 {
            0 | 1 => {
                drop(cq);
                assert!(ours.dial(&handle, caps(), &target, Instant::now() + PATIENCE).is_err(), "nobody polls");
                drop(pair);
                drop((ours, theirs));
            }
            _ => {
                drop((theirs, ours));
                drop(pair);
                drop(cq);
            }
        }
        drop((registration, memory, handle));
        soon(&format!("round {round}: {before:?} before, {:?} now", held()), || held() == before);
    }
}

#[test]
fn nobody_is_elsewhere() {
    let _alone = alone();
    let nic = ShmNic::open().unwrap();
    let Err(error) = Desk::dial(&nic, 0x1234) else { panic!("nobody is there") };
    assert!(matches!(error, DialError::Elsewhere { .. }), "{error}");
}

fn has_unshare(arguments: &[&str]) -> bool {
    std::process::Command::new("unshare").args(arguments).arg("true").status().is_ok_and(|s| s.success())
}

#[test]
fn another_network_namespace_is_elsewhere() {
    let _alone = alone();
    if !has_unshare(&["-n"]) {
        return eprintln!("skipped: no right to make a network namespace");
    }
    let nic = ShmNic::open().unwrap();
    let peer = Peer::start_under(&["unshare", "-n"]);
    let Err(error) = Desk::dial(&nic, peer.token) else { panic!("it is in another namespace") };
    assert!(matches!(error, DialError::Elsewhere { .. }), "{error}");
}

#[test]
fn a_peer_of_another_user_is_forbidden_both_ways() {
    let _alone = alone();
    let other = ["setpriv", "--reuid", "65534", "--clear-groups"];
    let this = std::env::current_exe().unwrap();
    let mut try_it = std::process::Command::new(other[0]);
    if !try_it.args(&other[1..]).arg(this).arg("--list").output().is_ok_and(|o| o.status.success()) {
        return eprintln!("skipped: no right to run as another user");
    }
    let nic = ShmNic::open().unwrap();
    let mut peer = Peer::start_under(&other);
    let Err(error) = Desk::dial(&nic, peer.token) else { panic!("it is another user's") };
    assert!(matches!(&error, DialError::Forbidden { why } if why.contains("65534")), "{error}");
    // We are root, whom it trusts; but we do not trust it, and let it see nothing.
    assert_eq!(peer.ask(&format!("refused {}", nic.token())), 1);
}

/// We see a peer in a pid namespace below ours. It does not see us: so the roles are the other way round, the peer dials.
#[test]
fn a_peer_that_cannot_see_our_pid_maps_our_memory_and_is_told_why_the_rest_is_out_of_reach() {
    let _alone = alone();
    if !has_unshare(&["-p", "-f"]) {
        return eprintln!("skipped: no right to make a pid namespace");
    }
    let nic = ShmNic::open().unwrap();
    let shared = Memory::allocate(4096).unwrap();
    let _shared = nic.register(&shared, 0, 4096, shm_rig::REMOTE).unwrap();
    let mut peer = Peer::start_under(&["unshare", "-p", "-f", "--kill-child"]);
    assert_eq!(peer.ask(&format!("dial {} {}", nic.token(), shared.addr())), 0, "mapped memory is in reach");
    assert!(shm_rig::holds(&shared, 0, 4096, 77));
    let borrowed = shm_rig::borrowed(4096);
    let _borrowed = nic.register(&borrowed, 0, 4096, shm_rig::REMOTE).unwrap();
    // What the dialled queue pair does with it: an error of the operation, so that control dials again and hears why.
    assert_eq!(peer.ask(&format!("dial {} {}", nic.token(), borrowed.addr())), 1, "forbidden, with the reason");
}

/// Bytes of a message, and what comes with them.
type Sent = (Vec<u8>, Vec<OwnedFd>);

/// A server of a test under a token, that sends what it is told and keeps the connection.
struct Liar(OwnedFd);

impl Liar {
    fn at(token: u64) -> Self {
        let flags = SocketFlags::CLOEXEC;
        let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap();
        let name = SocketAddrUnix::new_abstract_name(format!("moonrail-shm-{token:016x}").as_bytes()).unwrap();
        rustix::net::bind(&socket, &name).unwrap();
        rustix::net::listen(&socket, 8).unwrap();
        Self(socket)
    }

    fn dial(self, token: u64, messages: Vec<Sent>) -> DialError {
        let server = std::thread::spawn(move || {
            let socket = rustix::net::accept(&self.0).unwrap();
            for (bytes, files) in &messages {
                let files: Vec<BorrowedFd<'_>> = files.iter().map(AsFd::as_fd).collect();
                let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
                let mut control = SendAncillaryBuffer::new(&mut space);
                if !files.is_empty() {
                    assert!(control.push(SendAncillaryMessage::ScmRights(&files)));
                }
                let _ = rustix::net::sendmsg(&socket, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL);
            }
            std::thread::sleep(Duration::from_millis(400));
        });
        let nic = ShmNic::open().unwrap();
        let (_cq, handle) = nic.create_cq(16).unwrap();
        let since = Instant::now();
        let until = since + Duration::from_millis(200);
        let Err(error) = nic.dial(&handle, caps(), &Target::Shm { token }, until) else { panic!("it lied") };
        assert!(since.elapsed() < Duration::from_secs(1), "a bound is a bound: {error}");
        server.join().unwrap();
        println!("{error}");
        error
    }
}

/// A message as src/nic/shm/wire.rs has it.
fn message(kind: u32, addr: u64, len: u64) -> Vec<u8> {
    let mut bytes: Vec<u8> = [kind, 1, 0, 1].iter().flat_map(|w| w.to_le_bytes()).collect();
    bytes.extend([addr, len, 0, 1].iter().flat_map(|w: &u64| w.to_le_bytes()));
    bytes
}

fn file(len: u64) -> OwnedFd {
    let file = memfd_create("liar", MemfdFlags::ALLOW_SEALING).unwrap();
    ftruncate(&file, len).unwrap();
    file
}

#[test]
fn a_server_that_lies_is_refused_in_time() {
    let _alone = alone();
    let before = held();
    let sealed = |len| {
        let file = file(len);
        rustix::fs::fcntl_add_seals(&file, rustix::fs::SealFlags::SHRINK | rustix::fs::SealFlags::GROW).unwrap();
        file
    };
    let null = || OwnedFd::from(std::fs::File::open("/dev/null").unwrap());
    let silent = Liar::at(1).dial(1, vec![]);
    assert!(matches!(silent, DialError::Io { .. }), "{silent}");
    let cases: Vec<(&str, Vec<Sent>)> = vec![
        ("garbage", vec![(vec![7; 48], vec![])]),
        ("short", vec![(vec![1, 0, 0], vec![])]),
        ("long", vec![(vec![1; 4096], vec![])]),
        ("no files", vec![(message(1, 0, 0), vec![])]),
        ("too many files", vec![(message(1, 0, 0), (0..8).map(|_| null()).collect())]),
        ("no memfd", vec![(message(1, 0, 0), vec![null(), null()])]),
        ("unsealed", vec![(message(1, 0, 0), vec![file(1 << 20), file(1 << 20)])]),
        ("small", vec![(message(1, 0, 0), vec![sealed(4096), sealed(4096)])]),
        ("another token", vec![(message(1, 0, 0), vec![sealed(1 << 20), sealed(1 << 20)])]),
        ("another beginning", vec![(message(5, 0, 0), vec![sealed(1 << 20), sealed(1 << 20)])]),
    ];
    for (token, (what, messages)) in cases.into_iter().enumerate() {
        println!("{what}:");
        Liar::at(100 + token as u64).dial(100 + token as u64, messages);
    }
    soon("nothing stays open", || held() == before);
}

#[test]
fn a_client_that_talks_is_let_go_and_others_are_served() {
    let _alone = alone();
    let nic = ShmNic::open().unwrap();
    let before = held();
    let name = SocketAddrUnix::new_abstract_name(format!("moonrail-shm-{:016x}", nic.token()).as_bytes()).unwrap();
    let clients: Vec<OwnedFd> = (0..200)
        .map(|_| {
            let flags = SocketFlags::CLOEXEC;
            let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap();
            rustix::net::connect(&socket, &name).unwrap();
            let _ = rustix::net::send(&socket, b"GET / HTTP/1.1", SendFlags::NOSIGNAL);
            socket
        })
        .collect();
    Desk::dial(&ShmNic::open().unwrap(), nic.token()).unwrap().succeed(Op::Write, &[(0, 0, 0)]);
    drop(clients);
    soon("nothing stays of them", || held() == before);
}
