//! Every socket has a deadline and a limit: what a client that is silent, slow or huge costs, and what a server that is.

mod rig;

use std::io::{ErrorKind, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::time::{Duration, Instant};

use moonrail_control::metadata::BufferEntry;
use moonrail_control::wire::frame::DEFAULT_MAX;
use moonrail_control::{DialError, OpenError};
use moonrail_datapath::nic::sim::{SimOptions, SimWorld};
use moonrail_datapath::units::{Lkey, Rkey};

use rig::{Node, Options, growth, node, soon, wait};

/// The deadlines of the node under test.
const DEADLINE: Duration = Duration::from_millis(400);
/// The node's clock starts when it takes the connection, ours a moment later.
const EARLY: Duration = Duration::from_millis(100);
/// A machine that is busy with other tests.
const SLACK: Duration = Duration::from_secs(4);

fn impatient() -> Node {
    let mut options = Options::new("P2PHANDSHAKE");
    options.handshake.client_timeout = DEADLINE;
    // One deadline for both: a connection that stands at once leaves the more to the reply.
    (options.handshake.connect_timeout, options.handshake.reply_timeout) = (DEADLINE / 2, DEADLINE / 2);
    node(&SimWorld::real_time(1, SimOptions::default()), 1, options).unwrap()
}

/// How long the node leaves a client alone that goes on sending `drop`, and what it says to it.
fn served(node: &Node, first: &[u8], drop: &[u8]) -> (Duration, Vec<u8>) {
    let mut stream = TcpStream::connect(node.control.name()).unwrap();
    stream.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
    let began = Instant::now();
    stream.write_all(first).unwrap();
    let (mut said, mut buffer) = (Vec::new(), [0; 1024]);
    while began.elapsed() < DEADLINE + SLACK {
        match stream.read(&mut buffer) {
            // The end, or a reset under what was not read.
            Ok(0) => return (began.elapsed(), said),
            Ok(n) => said.extend_from_slice(&buffer[..n]),
            Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                let _ = stream.write_all(drop);
            }
            Err(_) => return (began.elapsed(), said),
        }
    }
    panic!("still open after {:?}", began.elapsed());
}

#[test]
fn a_silent_client_and_one_that_drips_are_closed_at_the_deadline() {
    let node = impatient();
    let mut announced = 1000u64.to_le_bytes().to_vec();
    announced.push(3);
    // Whole for a while, then nothing; nothing at all; one byte now and then, which does not buy time.
    for (first, drop) in [(&announced[..], &b""[..]), (b"", b""), (&announced, b" "), (b"", b"\x05")] {
        let (after, said) = served(&node, first, drop);
        assert!(after + EARLY >= DEADLINE && said.is_empty(), "{after:?} {said:?}");
    }
    node.stop();
}

#[test]
fn a_frame_above_the_limit_is_closed_before_it_comes() {
    let node = impatient();
    let announce = |length: u64| {
        let mut frame = length.to_le_bytes().to_vec();
        frame.push(3);
        frame
    };
    for length in [DEFAULT_MAX as u64 + 1, u64::MAX, 0] {
        let (after, said) = served(&node, &announce(length), b"");
        assert!(after < DEADLINE && said.is_empty(), "{length}: {after:?}");
    }
    // At the limit it is waited for.
    assert!(served(&node, &announce(DEFAULT_MAX as u64), b"").0 + EARLY >= DEADLINE);
    node.stop();
}

/// A server of one client: takes its request, says `first`, and then `drop` for as long as it may.
fn server(first: &'static [u8], drop: &'static [u8]) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut request = [0; 9];
        stream.read_exact(&mut request).unwrap();
        let _ = stream.write_all(first);
        while !drop.is_empty() && stream.write_all(drop).is_ok() {
            std::thread::sleep(Duration::from_millis(50));
        }
        if first.is_empty() {
            std::thread::sleep(DEADLINE + SLACK);
        }
    });
    address
}

#[test]
fn a_server_that_does_not_reply_or_replies_nonsense_is_told_in_time() {
    let node = impatient();
    let dial = |first, drop| {
        let began = Instant::now();
        let error = node.control.open_segment(&server(first, drop), None, soon()).unwrap_err();
        let OpenError::Dial { source, .. } = error else { panic!("{error}") };
        (source, began.elapsed())
    };
    // Silent; half a frame, then a byte now and then.
    for (first, drop) in [(&b""[..], &b""[..]), (b"\x00\x01\0\0\0\0\0\0\x01{", b" ")] {
        let (error, after) = dial(first, drop);
        assert!(matches!(error, DialError::ReplyTimeout { .. }), "{error}");
        assert!(after >= DEADLINE && after < DEADLINE + SLACK, "{after:?}");
    }
    // Another protocol, a length above the limit, another type, a reply that ends early: told at once.
    for first in [
        &b"SSH-2.0-OpenSSH_9.2p1\r\n"[..],
        b"\xff\xff\xff\xff\0\0\0\0\x01",
        b"\x03\0\0\0\0\0\0\0\x03{}",
        b"\x00\x01\0\0\0\0\0\0\x01{",
    ] {
        let (error, after) = dial(first, b"");
        assert!(matches!(error, DialError::Garbage { .. } | DialError::Io { .. }), "{error}");
        assert!(after < DEADLINE, "{first:?} {after:?}");
    }
    node.stop();
}

#[test]
fn clients_that_do_not_take_their_reply_do_not_keep_their_places() {
    let mut options = Options::new("P2PHANDSHAKE");
    options.handshake.max_clients = 8;
    let node = node(&SimWorld::real_time(1, SimOptions::default()), 1, options).unwrap();
    // A descriptor larger than what both kernels' buffers take.
    let buffer = |at: u64| BufferEntry {
        name: "cpu:0".into(),
        addr: (1 << 40) + (at << 20),
        length: 1 << 20,
        lkeys: vec![Lkey(u32::MAX); 2],
        rkeys: vec![Rkey(u32::MAX); 2],
    };
    node.control.publish((0..80_000).map(buffer).collect(), soon()).unwrap();
    let ask = |kind: u8| {
        let mut stream = TcpStream::connect(node.control.name()).unwrap();
        stream.set_read_timeout(Some(SLACK)).unwrap();
        stream.write_all(&[3, 0, 0, 0, 0, 0, 0, 0, kind, b'{', b'}']).unwrap();
        stream
    };
    // Each has the beginning of its reply, and takes no more.
    let begun = |mut stream: TcpStream| {
        stream.read_exact(&mut [0; 16]).unwrap();
        stream
    };
    let greedy: Vec<TcpStream> = (0..8).map(|_| begun(ask(1))).collect();
    let began = Instant::now();
    let mut reply = Vec::new();
    ask(3).read_to_end(&mut reply).unwrap();
    assert!(reply.ends_with(b"{\"status\":\"success\"}\n"), "{reply:?}");
    assert!(began.elapsed() < SLACK, "{:?}", began.elapsed());
    drop(greedy);
    node.stop();
}

#[test]
fn large_frames_half_sent_hold_a_bounded_amount_of_memory() {
    const CLIENTS: usize = 200;
    let mut options = Options::new("P2PHANDSHAKE");
    options.handshake.client_timeout = Duration::from_secs(60);
    let node = node(&SimWorld::real_time(1, SimOptions::default()), 1, options).unwrap();
    let mut part = (DEFAULT_MAX as u64).to_le_bytes().to_vec();
    part.push(3);
    part.resize(DEFAULT_MAX, b' ');
    let (closed, grown) = growth(|| {
        let clients: Vec<_> = (0..CLIENTS)
            .map(|_| {
                let mut stream = TcpStream::connect(node.control.name()).unwrap();
                let _ = stream.write_all(&part);
                stream
            })
            .collect();
        assert!(node.control.probe(node.control.name(), soon()).is_ok(), "others are served meanwhile");
        let is_closed = |mut stream: &TcpStream| {
            stream.set_nonblocking(true).unwrap();
            !matches!(stream.read(&mut [0; 1]), Err(e) if e.kind() == ErrorKind::WouldBlock)
        };
        let closed = || clients.iter().filter(|stream| is_closed(stream)).count();
        assert!(wait(|| closed() >= CLIENTS / 4), "{} closed", closed());
        closed()
    });
    println!("{closed} of {CLIENTS} closed, memory +{} KiB", grown >> 10);
    // 128 MiB are kept for all. What else grows is the allocator's, and the neighbours'.
    assert!(closed < CLIENTS);
    assert!(grown < CLIENTS * DEFAULT_MAX * 4 / 5, "{grown}");
    node.stop();
}
