//! The handshake server under attack: 2,000 good clients over 2 s, once alone and once among 200 that send a byte a
//! second and 100 that send garbage. The bad ones may cost a bounded amount of memory, and no good one's answer.
//!
//! ```text
//!   good ──▶ one thread, one poll: a quarter each of hellos (every one of another peer's NIC), descriptors,
//!            notifications, probes; each is due at a fixed time and its latency counts from there
//!   bad  ──▶ another thread, so that a good client never waits for a bad one on our side
//! ```

mod rig;

use std::collections::HashMap;
use std::io::{ErrorKind, Read, Write};
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use mio::net::TcpStream;
use mio::{Events, Interest, Poll, Token};
use moonrail_control::metadata::{BufferEntry, SegmentDescriptor};
use moonrail_control::wire::notify::PROBE;
use moonrail_control::wire::{Frame, FrameDecoder, GidText, Hello, MessageType, Notify, NotifyReply};
use moonrail_datapath::nic::sim::{SimOptions, SimWorld};
use moonrail_datapath::units::{Lkey, Qpn, Rkey};

use rig::{Node, Options, growth, node, soon};

const GOOD: usize = 2000;
const SLOW: usize = 200;
const GARBAGE: usize = 100;
/// The clients of each kind arrive evenly over this time.
const OVER: Duration = Duration::from_secs(2);
/// The aim for the good clients' 99th percentile. Reported, not asserted: other tests share the machine.
const AIM: Duration = Duration::from_millis(50);
/// What is asserted instead: a server that waits for a bad client waits for seconds.
const FAR_FROM_AIM: Duration = Duration::from_secs(1);
/// What the bad clients may add to this process's resident memory: a whole frame each, as if all came at once.
const MEMORY: usize = GARBAGE * (2 << 20);

/// What a good client sends, and what it must hear.
fn request(round: usize, at: usize, server: &str) -> Frame {
    match at % 4 {
        0 => {
            let hello = Hello {
                local_nic_path: format!("10.{round}.{}.{}:15000@rxe0", at / 250, at % 250),
                peer_nic_path: format!("{server}@sim{}", at / 4 % 2),
                local_gid: GidText::Valid(rig::gid(9, 0)),
                qp_num: [17, 18].into_iter().filter_map(Qpn::new).collect(),
                ready_ack: Some(false),
                ..Hello::default()
            };
            Frame::typed(MessageType::Connection, hello.encode())
        }
        1 => Frame::typed(MessageType::Metadata, b"{}\n".to_vec()),
        2 => {
            let notify = Notify { name: format!("{round}"), message: format!("{at}") };
            Frame::typed(MessageType::Notify, notify.encode())
        }
        _ => Frame::typed(MessageType::Probe, PROBE.to_vec()),
    }
}

fn check(at: usize, reply: &Frame) {
    match at % 4 {
        0 => {
            let hello = Hello::parse(&reply.body).unwrap();
            assert_eq!((hello.refusal(), hello.qp_num.len()), (None, 2), "{hello:?}");
        }
        1 => assert_eq!(SegmentDescriptor::decode(&reply.body).unwrap().buffers.len(), BUFFERS),
        2 => assert_eq!(NotifyReply::parse(&reply.body), Ok(NotifyReply::Accepted)),
        _ => assert_eq!(reply.body, b"{\"status\":\"success\"}\n"),
    }
}

struct Exchange {
    stream: TcpStream,
    due: Instant,
    request: Vec<u8>,
    sent: usize,
    decoder: FrameDecoder,
}

impl Exchange {
    /// Goes on as far as the socket lets it; the reply when it is whole.
    fn advance(&mut self) -> std::io::Result<Option<Frame>> {
        while self.sent < self.request.len() {
            match self.stream.write(&self.request[self.sent..]) {
                Ok(n) => self.sent += n,
                Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::NotConnected) => return Ok(None),
                Err(e) => return Err(e),
            }
        }
        let mut buffer = [0; 4096];
        loop {
            match self.stream.read(&mut buffer) {
                Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
                Ok(n) => {
                    if let Some(frame) = self.decoder.push(&buffer[..n]).unwrap() {
                        return Ok(Some(frame));
                    }
                }
                Err(e) if e.kind() == ErrorKind::WouldBlock => return Ok(None),
                Err(e) => return Err(e),
            }
        }
    }
}

/// Sends every good request at its time; the latencies, sorted. None may fail.
fn good(round: usize, server: &str) -> Vec<Duration> {
    let address: SocketAddr = server.parse().unwrap();
    let mut poll = Poll::new().unwrap();
    let mut events = Events::with_capacity(256);
    let (mut open, mut took, mut replies) = (HashMap::new(), Vec::with_capacity(GOOD), Vec::with_capacity(GOOD));
    let (began, mut next) = (Instant::now(), 0);
    while took.len() < GOOD {
        assert!(began.elapsed() < Duration::from_secs(60), "{} of {GOOD} answered", took.len());
        while next < GOOD && began.elapsed() >= OVER * next as u32 / GOOD as u32 {
            let mut stream = TcpStream::connect(address).unwrap();
            poll.registry().register(&mut stream, Token(next), Interest::READABLE | Interest::WRITABLE).unwrap();
            let due = began + OVER * next as u32 / GOOD as u32;
            let request = request(round, next, server).encode();
            open.insert(next, Exchange { stream, due, request, sent: 0, decoder: FrameDecoder::default() });
            next += 1;
        }
        poll.poll(&mut events, Some(Duration::from_micros(500))).unwrap();
        for event in &events {
            let at = event.token().0;
            let Some(exchange) = open.get_mut(&at) else { continue };
            if let Some(reply) = exchange.advance().unwrap_or_else(|e| panic!("good client {at}: {e}")) {
                took.push(exchange.due.elapsed());
                replies.push((at, reply));
                open.remove(&at);
            }
        }
    }
    // Afterwards: reading a descriptor takes longer than being served, and the next client is due.
    for (at, reply) in &replies {
        check(*at, reply);
    }
    took.sort_unstable();
    took
}

/// What one of them sends: no protocol, headers that lie, frames as large as is allowed whose body is none.
fn garbage(at: usize) -> Vec<u8> {
    let framed = |kind: u8, body: Vec<u8>| {
        let mut frame = (body.len() as u64 + 1).to_le_bytes().to_vec();
        frame.push(kind);
        frame.extend(body);
        frame
    };
    let large = (1 << 20) - 1;
    match at % 8 {
        0 => b"GET / HTTP/1.1\r\nHost: x\r\n\r\n".to_vec(),
        1 => vec![0xff; 300],
        2 => vec![0; 64],
        3 => framed(0, vec![b'['; large]),
        4 => framed(0, [b"{\"qp_num\":".as_slice(), &vec![b'['; large - 10]].concat()),
        5 => framed(2, [b"{\"name\":\"".as_slice(), &vec![b'\\'; large - 9]].concat()),
        6 => framed(0, b"{\"local_nic_path\":7,\"peer_nic_path\":\"@\",\"qp_num\":[-1]}".to_vec()),
        _ => framed(200, (0..large).map(|i| (i * 31 % 251) as u8).collect()),
    }
}

/// The bad clients, until `stop`: none of them reads a thing, or goes away by itself. Returns how many the server closed.
fn bad(server: &str, stop: &std::sync::atomic::AtomicBool) -> usize {
    struct Client {
        stream: TcpStream,
        sends: Vec<u8>,
        sent: usize,
        every: Option<Duration>,
        next: Instant,
        closed: bool,
    }
    let address: SocketAddr = server.parse().unwrap();
    let began = Instant::now();
    let mut clients: Vec<Client> = Vec::new();
    while !stop.load(std::sync::atomic::Ordering::Relaxed) {
        while clients.len() < SLOW + GARBAGE && began.elapsed() >= OVER * clients.len() as u32 / (SLOW + GARBAGE) as u32
        {
            let at = clients.len();
            // Every third sends garbage, the others a good request, too slowly.
            let (sends, every) = if at % 3 == 2 {
                (garbage(at / 3), None)
            } else {
                (request(99, at, server).encode(), Some(Duration::from_secs(1)))
            };
            let stream = TcpStream::connect(address).unwrap();
            clients.push(Client { stream, sends, sent: 0, every, next: Instant::now(), closed: false });
        }
        for client in &mut clients {
            if client.closed || client.sent == client.sends.len() || client.next > Instant::now() {
                continue;
            }
            let end = if client.every.is_some() { client.sent + 1 } else { client.sends.len() };
            match client.stream.write(&client.sends[client.sent..end]) {
                Ok(n) => {
                    client.sent += n;
                    client.next += client.every.unwrap_or_default();
                }
                Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::NotConnected) => {}
                Err(_) => client.closed = true,
            }
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    assert_eq!(clients.len(), SLOW + GARBAGE, "all of them came");
    // The end, or a reset under bytes that were not read.
    let is_closed = |c: &mut Client| {
        c.closed || !matches!(c.stream.read(&mut [0; 64]), Err(e) if e.kind() == ErrorKind::WouldBlock)
    };
    clients.iter_mut().map(is_closed).filter(|closed| *closed).count()
}

fn at(took: &[Duration], share: f64) -> Duration {
    took[((took.len() - 1) as f64 * share).ceil() as usize]
}

fn tell(name: &str, took: &[Duration], grown: usize) {
    let (p50, p99, max) = (at(took, 0.5), at(took, 0.99), at(took, 1.0));
    println!("{name}: p50 {p50:?}, p99 {p99:?}, max {max:?}; memory +{} KiB", grown >> 10);
}

/// Buffers of the published segment: a reply of some 30 KiB, as of a real store.
const BUFFERS: usize = 256;

fn server() -> Node {
    let world = SimWorld::real_time(1, SimOptions::default());
    world.nic("strangers", "nic", rig::gid(9, 0));
    let node = node(&world, 1, Options::new("P2PHANDSHAKE")).unwrap();
    let buffer = |at: u64| BufferEntry {
        name: "cpu:0".into(),
        addr: 0x1000_0000 + (at << 30),
        length: 1 << 30,
        lkeys: vec![Lkey(1), Lkey(2)],
        rkeys: vec![Rkey(11), Rkey(12)],
    };
    node.control.publish((0..BUFFERS as u64).map(buffer).collect(), soon()).unwrap();
    node
}

#[test]
fn good_clients_never_notice_the_bad_ones() {
    let node = server();
    let name = node.control.name().to_owned();
    let (alone, grown_alone) = growth(|| good(0, &name));
    let stop = std::sync::atomic::AtomicBool::new(false);
    let ((among, closed), grown) = growth(|| {
        std::thread::scope(|scope| {
            let bad = scope.spawn(|| bad(&name, &stop));
            let among = good(1, &name);
            // Garbage is closed at once; the slow stay until their time is over, which is not yet.
            std::thread::sleep(Duration::from_millis(500));
            stop.store(true, std::sync::atomic::Ordering::Relaxed);
            (among, bad.join().unwrap())
        })
    });
    tell("alone      ", &alone, grown_alone);
    tell("among bad  ", &among, grown);
    let (p99_alone, p99) = (at(&alone, 0.99), at(&among, 0.99));
    println!("aim of {AIM:?} for the p99: {}; {closed} bad ones closed", if p99 < AIM { "met" } else { "MISSED" });
    assert_eq!(closed, GARBAGE, "the server closes on garbage, and bears with the slow until their deadline");
    assert!(p99 <= FAR_FROM_AIM.max(p99_alone * 10), "{p99:?}, alone {p99_alone:?}");
    assert!(grown <= grown_alone + MEMORY, "+{grown} bytes, alone +{grown_alone}");
    // Each good client was heard once, each notification kept; and the server goes on.
    assert_eq!(node.control.take_notifications().len(), 2 * GOOD / 4);
    assert_eq!(node.control.rails().len(), 2 * GOOD / 4);
    assert!(good(2, &name).len() == GOOD);
    node.stop();
}
