//! What the TCP fabric moves over loopback, beside a bare program that does the same with two vectored calls.
//!
//! `cargo run --release -p moonrail-datapath --example tcp_speed [SECONDS] [BUFFER_BYTES]`. One thread posts chains of 32
//! requests on one lane, two chains in flight, and polls; another one polls the serving node. No core, no credit: what the fabric
//! can do by itself. The bare program sends 32 bodies with one writev, receives them with readv in their places, and
//! answers 8 bytes.

use std::io::{IoSlice, IoSliceMut, Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use moonrail_datapath::nic::tcp::{Ports, TcpNic, TcpOptions};
use moonrail_datapath::nic::{
    Access, Completion, CompletionQueue, Nic, Op, PostHalf, QpCaps, Target, TcpVersion, WcStatus, WorkRequest,
};
use moonrail_datapath::region::Memory;
use moonrail_datapath::units::{Lkey, RemoteAddr, Rkey, WrId};

const CHAIN: u64 = 32;

struct Bench {
    nic: Arc<TcpNic>,
    cq: Box<dyn CompletionQueue>,
    post: PostHalf,
    near: Arc<Memory>,
    far: u64,
}

impl Bench {
    fn chain(&self, op: Op, len: u32) -> Vec<WorkRequest> {
        let request = |n: u64| WorkRequest {
            wr_id: WrId { slot: 0, generation: 0, sequence: n as u32 },
            op,
            local: self.near.addr() + n * u64::from(len),
            lkey: Lkey(0),
            len,
            remote: RemoteAddr(self.far + n * u64::from(len)),
            rkey: Rkey(0),
            signaled: n == CHAIN - 1,
            inline: false,
        };
        (0..CHAIN).map(request).collect()
    }

    fn reap(&mut self) -> usize {
        let mut out = [Completion::EMPTY; 64];
        let got = self.cq.poll(&mut out).expect("the queue is polled");
        assert!(out[..got].iter().all(|c| c.status == WcStatus::SUCCESS), "{:?}", &out[..got]);
        got
    }

    /// Bytes per second, and calls of each kind per chain on our side.
    fn throughput(&mut self, op: Op, len: u32, span: Duration) -> (f64, [f64; 3]) {
        let chain = self.chain(op, len);
        let calls = |nic: &TcpNic| {
            [nic.count(|c| c.sends.get()), nic.count(|c| c.receives.get()), nic.count(|c| c.waits.get())]
        };
        let (mut flying, mut done) = (0, 0u64);
        let mut started = Instant::now();
        let mut before = calls(&self.nic);
        let mut warm = true;
        loop {
            while flying < 2 {
                assert_eq!(self.post.post(&chain).accepted, chain.len());
                flying += 1;
            }
            let got = self.reap();
            flying -= got;
            done += got as u64;
            if started.elapsed() > span / if warm { 4 } else { 1 } {
                if !warm {
                    break;
                }
                (warm, started, done, before) = (false, Instant::now(), 0, calls(&self.nic));
            }
        }
        let rate = (done * CHAIN * u64::from(len)) as f64 / started.elapsed().as_secs_f64();
        let after = calls(&self.nic);
        let per_chain = std::array::from_fn(|n| (after[n] - before[n]) as f64 / done as f64);
        while flying > 0 {
            flying -= self.reap();
        }
        (rate, per_chain)
    }

    /// Median and 99th percentile of one request there and back.
    fn round_trip(&mut self, op: Op, len: u32) -> (Duration, Duration) {
        let mut request = self.chain(op, len);
        request.truncate(1);
        request[0].signaled = true;
        let mut times: Vec<Duration> = (0..20_000)
            .map(|_| {
                let started = Instant::now();
                self.post.post(&request);
                while self.reap() == 0 {}
                started.elapsed()
            })
            .collect();
        times.sort_unstable();
        (times[times.len() / 2], times[times.len() * 99 / 100])
    }
}

fn bare(len: usize, buffer: Option<usize>, span: Duration) -> f64 {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a port");
    let mut sender = TcpStream::connect(listener.local_addr().expect("its address")).expect("a connection");
    let (mut receiver, _) = listener.accept().expect("its other end");
    for stream in [&sender, &receiver] {
        stream.set_nodelay(true).expect("nodelay");
        let _ = rustix::net::sockopt::set_tcp_congestion(stream, "cubic");
        if let Some(bytes) = buffer {
            let _ = rustix::net::sockopt::set_socket_send_buffer_size(stream, bytes);
            let _ = rustix::net::sockopt::set_socket_recv_buffer_size(stream, bytes);
        }
    }
    let total = len * CHAIN as usize;
    let thread = std::thread::spawn(move || {
        let mut place = vec![0u8; total];
        loop {
            let mut got = 0;
            while got < total {
                let mut parts: Vec<IoSliceMut> = place[got..].chunks_mut(len).map(IoSliceMut::new).collect();
                match receiver.read_vectored(&mut parts) {
                    Ok(0) | Err(_) => return,
                    Ok(n) => got += n,
                }
            }
            if receiver.write_all(&[0; 8]).is_err() {
                return;
            }
        }
    });
    let source = vec![7u8; total];
    let send = |sender: &mut TcpStream| {
        let mut sent = 0;
        while sent < total {
            let parts: Vec<IoSlice> = source[sent..].chunks(len).map(IoSlice::new).collect();
            sent += sender.write_vectored(&parts).expect("sent");
        }
    };
    send(&mut sender);
    let (started, mut done) = (Instant::now(), 0u64);
    while started.elapsed() < span {
        send(&mut sender);
        sender.read_exact(&mut [0; 8]).expect("an answer");
        done += 1;
    }
    let rate = (done * total as u64) as f64 / started.elapsed().as_secs_f64();
    drop(sender);
    let _ = thread.join();
    rate
}

fn main() {
    let mut arguments = std::env::args().skip(1);
    let seconds = arguments.next().and_then(|a| a.parse().ok()).unwrap_or(1.0);
    let span = Duration::from_secs_f64(seconds);
    let buffer = arguments.next().map_or(TcpOptions::default().buffer, |a| a.parse().ok());
    let options = TcpOptions { ports: Ports::Fixed(0), buffer, ..TcpOptions::default() };
    let server = TcpNic::open(options.clone()).expect("a data port");
    let far = Memory::allocate(64 << 20).expect("memory");
    let access = Access { remote: true, relaxed_ordering: false };
    let _registered = server.register(&far, 0, far.len(), access).expect("registered");
    let stop = Arc::new(AtomicBool::new(false));
    let (mut queue, _) = server.create_cq(64).expect("a queue");
    let thread = std::thread::spawn({
        let stop = stop.clone();
        move || {
            while !stop.load(Ordering::Relaxed) {
                queue.poll(&mut [Completion::EMPTY; 64]).expect("polled");
            }
        }
    });
    println!("{:>8} {:>6} {:>9}  {:>6}   calls per chain: send, receive, wait", "version", "op", "size", "GB/s");
    for version in [TcpVersion::V1, TcpVersion::V2, TcpVersion::Batch] {
        let nic = TcpNic::open(options.clone()).expect("a data port");
        let (cq, handle) = nic.create_cq(4096).expect("a queue");
        let caps = QpCaps { max_send_wr: 256, max_send_sge: 1, max_inline: 0 };
        let to = Target::Tcp { host: "127.0.0.1".into(), port: server.port(), version };
        let (qp, _admin) = nic.dial(&handle, caps, &to, Instant::now() + Duration::from_secs(5)).expect("dialled");
        let near = Memory::allocate(64 << 20).expect("memory");
        near.write(0, &vec![1; 64 << 20]).expect("in range");
        let mut bench = Bench { nic, cq, post: qp.into_post_half(), near, far: far.addr() };
        for op in [Op::Write, Op::Read] {
            for len in [4 << 10, 64 << 10, 1 << 20] {
                let (rate, [sends, receives, waits]) = bench.throughput(op, len, span);
                let rate = rate / 1e9;
                println!(
                    "{:>8} {:>6} {len:>9}  {rate:>6.2}   {sends:.1}, {receives:.1}, {waits:.1}",
                    format!("{version:?}"),
                    format!("{op:?}")
                );
            }
            let (median, tail) = bench.round_trip(op, 64);
            println!(
                "{:>8} {:>6} {:>9}  {median:?} median, {tail:?} p99",
                format!("{version:?}"),
                format!("{op:?}"),
                64
            );
        }
    }
    stop.store(true, Ordering::Relaxed);
    thread.join().expect("the server's thread");
    for len in [4 << 10, 64 << 10, 1 << 20] {
        println!("{:>8} {:>6} {len:>9}  {:>6.2}", "bare", "Write", bare(len, buffer, span) / 1e9);
    }
}
