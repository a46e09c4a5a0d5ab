//! What goes wrong with TCP peers: frozen, restarted, slow; and memory that goes while they write into it.

mod tcp_rig;

use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use moonrail_datapath::nic::tcp::TcpOptions;
use moonrail_datapath::nic::{Op, Target, TcpVersion, WcStatus};
use moonrail_datapath::region::Memory;

use tcp_rig::{Client, LIMIT, Node, Server, all_good, options, pattern};

#[test]
fn a_server_that_restarts_is_used_again() {
    let mut node = Node::new(options());
    let local = node.region(1 << 20);
    local.memory().write(0, &pattern(1 << 20, 4)).unwrap();
    // The same memory, served by one NIC after another, as far as addresses are concerned.
    let memory = Memory::allocate(1 << 20).unwrap();
    let remote = node.remote(memory.addr(), 1 << 20);
    let access = moonrail_datapath::nic::Access { remote: true, relaxed_ordering: false };
    let mut finished = 0;
    for round in 0..10 {
        use moonrail_datapath::nic::Nic;
        let server = Server::new(options(), 1);
        let _registered = server.nic.register(&memory, 0, 1 << 20, access).unwrap();
        node.connect(&server.target(TcpVersion::V2), 2).unwrap();
        assert!(node.run_until(LIMIT, |n| n.peer.routes() == 1));
        let works: Vec<_> = (0..16).map(|_| node.submit(Op::Write, &local, &remote, &[(0, 0, 1 << 20)])).collect();
        node.run_until(Duration::from_millis(round), |_| false);
        drop(server);
        // What was not done waits for the next life and is done there.
        assert!(node.run_until(LIMIT, |n| n.needs_repair() || works.iter().all(|w| w.is_terminal())));
        finished += works.iter().filter(|w| w.is_terminal()).count();
        if !node.needs_repair() {
            node.retire();
            assert!(node.run_until(LIMIT, |n| n.peer.routes() == 0 && n.core.outstanding() == 0));
        }
        let server = Server::new(options(), 1);
        let _registered = server.nic.register(&memory, 0, 1 << 20, access).unwrap();
        node.connect(&server.target(TcpVersion::Batch), 2).unwrap();
        for work in &works {
            assert!(node.finish(work) && work.first_error().is_none_or(|e| e.wc_status() == WcStatus::RETRY_EXC_ERR));
        }
        node.retire();
        assert!(node.run_until(LIMIT, |n| n.peer.routes() == 0 && n.core.outstanding() == 0));
    }
    assert!(finished < 160, "in no round anything was left to do: the test tests nothing");
    let mut there = vec![0; 1 << 20];
    memory.read(0, &mut there).unwrap();
    assert!(there == pattern(1 << 20, 4));
}

#[test]
fn a_peer_that_never_answers_ends_its_lane_and_proves_nothing() {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let port = listener.local_addr().unwrap().port();
    let near = Memory::allocate(64 << 20).unwrap();
    let short = TcpOptions {
        status_timeout: Duration::from_millis(200),
        progress_timeout: Duration::from_millis(300),
        ..options()
    };
    // (op, bytes, may be applied later): a status that never comes; a body that is never taken; data that never comes.
    for version in [TcpVersion::V1, TcpVersion::V2, TcpVersion::Batch] {
        for (op, len, late) in [(Op::Write, 100, true), (Op::Write, 64 << 20, true), (Op::Read, 100, false)] {
            let mut client = Client::new(short.clone());
            let to = Target::Tcp { host: "127.0.0.1".into(), port, version };
            let (mut post, _admin) = client.dial(&to).unwrap();
            // Accepted and never read: as a frozen process does.
            let (_frozen, _) = listener.accept().unwrap();
            let started = Instant::now();
            post.post(&[client.request(op, &near, 0, 0x1000, len), client.request(op, &near, 0, 0x2000, 8)]);
            let done: Vec<_> = client.wait(2).iter().map(|d| d.1).collect();
            assert_eq!(done, [WcStatus::RETRY_EXC_ERR, WcStatus::WR_FLUSH_ERR], "{version:?} {op:?} {len}");
            let took = started.elapsed();
            assert!(took > Duration::from_millis(150) && took < Duration::from_secs(4), "{took:?}");
            assert_eq!(post.drains_clean(), !late, "{version:?} {op:?} {len}: its buffer may be applied when it thaws");
        }
    }
}

#[test]
fn a_lane_moved_to_error_drains_when_the_server_has_ended_and_not_before() {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let port = listener.local_addr().unwrap().port();
    let near = Memory::allocate(1 << 20).unwrap();
    let mut client = Client::new(options());
    let to = Target::Tcp { host: "127.0.0.1".into(), port, version: TcpVersion::V2 };
    // A WRITE is out: its bytes may still be applied.
    let (mut post, mut admin) = client.dial(&to).unwrap();
    let (mut stream, _) = listener.accept().unwrap();
    post.post(&[client.request(Op::Write, &near, 0, 0x1000, 100), client.request(Op::Read, &near, 0, 0x1000, 100)]);
    client.wait_for(1, Duration::from_millis(20));
    admin.to_error().unwrap();
    assert_eq!(client.wait_for(1, Duration::from_millis(200)), [], "nothing is given back while the server may write");
    let mut bytes = vec![];
    stream.read_to_end(&mut bytes).unwrap();
    assert_eq!(bytes.len(), 24 + 100 + 24, "what was posted was sent, then the end");
    // The server acknowledges what it applied, and ends.
    stream.write_all(&[0, 0, 0, 0, 0x56, 0x54, 0x43, 0x4d]).unwrap();
    drop(stream);
    let done: Vec<_> = client.wait(2).iter().map(|d| d.1).collect();
    assert_eq!(done, [WcStatus::SUCCESS, WcStatus::WR_FLUSH_ERR]);
    assert!(post.drains_clean());
    // Only READs are out: nothing can land anywhere once our socket is closed.
    let (mut post, mut admin) = client.dial(&to).unwrap();
    let (_stream, _) = listener.accept().unwrap();
    post.post(&[client.request(Op::Read, &near, 0, 0x1000, 100)]);
    client.wait_for(1, Duration::from_millis(20));
    admin.to_error().unwrap();
    assert_eq!(client.wait(1)[0].1, WcStatus::WR_FLUSH_ERR);
    assert!(post.drains_clean());
}

#[test]
fn slow_and_silent_clients_cost_a_slot_and_nobodys_time() {
    let server = Server::new(options(), 1);
    let far = server.memory(1 << 20);
    let mut slow: Vec<TcpStream> =
        (0..100).map(|_| TcpStream::connect((Ipv4Addr::LOCALHOST, server.nic.port())).unwrap()).collect();
    // One byte of a header now and then; a body that never goes on; answers that are never taken.
    let mut header = [0; 24];
    header[..8].copy_from_slice(&(1u64 << 20).to_le_bytes());
    header[8..16].copy_from_slice(&far.memory.addr().to_le_bytes());
    for (n, stream) in slow.iter_mut().enumerate() {
        match n % 4 {
            0 => {}
            1 => stream.write_all(&header[..n % 24]).unwrap(),
            2 => {
                header[16] = 0x81;
                stream.write_all(&header).unwrap();
                stream.write_all(&[0; 100]).unwrap();
            }
            _ => {
                header[16] = 0x80;
                (0..50).for_each(|_| stream.write_all(&header).unwrap());
            }
        }
    }
    let mut client = Client::new(options());
    let near = Memory::allocate(4096).unwrap();
    let (mut post, _admin) = client.dial(&server.target(TcpVersion::V2)).unwrap();
    let mut worst = Duration::ZERO;
    for n in 0..500 {
        for stream in slow.iter_mut().filter(|_| n % 50 == 0).step_by(4) {
            stream.write_all(&[0]).unwrap();
        }
        let started = Instant::now();
        post.post(&[client.request(Op::Read, &near, 0, far.memory.addr(), 4096)]);
        assert!(all_good(&client.wait(1)));
        worst = worst.max(started.elapsed());
    }
    assert!(worst < Duration::from_secs(1), "{worst:?}");
    assert_eq!(server.nic.serving(), 101);
    drop(slow);
    let until = Instant::now() + LIMIT;
    while server.nic.serving() > 1 && Instant::now() < until {
        std::thread::yield_now();
    }
    assert_eq!(server.nic.serving(), 1);
}

#[test]
fn beyond_the_limit_the_connection_idle_longest_makes_place() {
    let server = Server::new(TcpOptions { connections: 8, ..options() }, 1);
    let far = server.memory(4096);
    let ask = |stream: &mut TcpStream| {
        let mut header = [0; 24];
        header[0] = 1;
        header[8..16].copy_from_slice(&far.memory.addr().to_le_bytes());
        header[16] = 0x80;
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        stream.write_all(&header).is_ok() && stream.read_exact(&mut [0; 9]).is_ok()
    };
    let mut streams = vec![];
    for _ in 0..20 {
        let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, server.nic.port())).unwrap();
        assert!(ask(&mut stream), "a new client is served");
        streams.push(stream);
    }
    let alive: Vec<bool> = streams.iter_mut().map(ask).collect();
    assert_eq!(alive, (0..20).map(|n| n >= 12).collect::<Vec<_>>());
    assert_eq!((server.nic.serving(), server.nic.count(|c| c.evicted.get())), (8, 12));
}

#[test]
fn nothing_lands_after_a_registration_is_dropped() {
    let server = Server::new(options(), 2);
    let stop = Arc::new(AtomicBool::new(false));
    let far = Memory::allocate(8 << 20).unwrap();
    let access = moonrail_datapath::nic::Access { remote: true, relaxed_ordering: false };
    for round in 0..40u64 {
        use moonrail_datapath::nic::Nic;
        let registration = server.nic.register(&far, 0, 8 << 20, access).unwrap();
        stop.store(false, Ordering::Relaxed);
        // Three clients write ones all over it, one of them in small pieces, as fast as they can.
        let writers: Vec<_> = (0..3u32)
            .map(|n| {
                let (to, addr, stop) = (server.target(TcpVersion::Batch), far.addr(), stop.clone());
                std::thread::spawn(move || {
                    let mut client = Client::new(options());
                    let near = Memory::allocate(8 << 20).unwrap();
                    near.write(0, &vec![0xff; 8 << 20]).unwrap();
                    let (mut post, _admin) = client.dial(&to).unwrap();
                    let (len, count) = if n == 0 { (4096, 64) } else { (1 << 20, 8) };
                    let mut failed = false;
                    while !stop.load(Ordering::Relaxed) && !failed {
                        let chain: Vec<_> = (0..count)
                            .map(|i| client.request(Op::Write, &near, 0, addr + u64::from(i * len), len))
                            .collect();
                        post.post(&chain);
                        failed = !all_good(&client.wait(chain.len()));
                    }
                    failed
                })
            })
            .collect();
        let until = Instant::now() + LIMIT;
        let mut first = [0];
        while first == [0] && Instant::now() < until {
            far.read(0, &mut first).unwrap();
        }
        std::thread::sleep(Duration::from_micros(50 * round));
        let started = Instant::now();
        drop(registration.guard);
        let took = started.elapsed();
        assert!(took < Duration::from_secs(2), "{took:?}");
        // From here on the memory is ours alone.
        far.write(0, &vec![0; 8 << 20]).unwrap();
        let failed: Vec<bool> = writers.into_iter().map(|w| w.join().unwrap()).collect();
        assert_eq!(failed, [true; 3], "the clients were told");
        let mut bytes = vec![0; 8 << 20];
        far.read(0, &mut bytes).unwrap();
        assert!(bytes.iter().all(|b| *b == 0), "round {round}: a byte landed after the guard was gone");
    }
}

#[test]
fn sockets_that_take_a_few_bytes_at_a_time_change_nothing() {
    let tiny = TcpOptions { buffer: Some(2048), ..options() };
    let server = Server::new(tiny.clone(), 1);
    let far = server.memory(1 << 20);
    let near = Memory::allocate(2 << 20).unwrap();
    let sent = pattern(1 << 20, 21);
    for version in [TcpVersion::V1, TcpVersion::V2, TcpVersion::Batch] {
        let mut client = Client::new(tiny.clone());
        near.write(0, &sent).unwrap();
        far.memory.write(0, &vec![0; 1 << 20]).unwrap();
        let (mut post, _admin) = client.dial(&server.target(version)).unwrap();
        let mut chain = vec![];
        let (mut at, mut n) = (0u64, 0u64);
        while at < 1 << 20 {
            let len = (1 + n * 2657 % 30_011).min((1 << 20) - at);
            chain.push(client.request(Op::Write, &near, at, far.memory.addr() + at, len as u32));
            (at, n) = (at + len, n + 1);
        }
        let reads: Vec<_> = chain
            .iter()
            .map(|w| client.request(Op::Read, &near, (1 << 20) + w.local - near.addr(), w.remote.0, w.len))
            .collect();
        for part in chain.chunks(32).chain(reads.chunks(32)) {
            assert_eq!(post.post(part).accepted, part.len());
        }
        assert!(all_good(&client.wait(2 * chain.len())), "{version:?}");
        let mut back = vec![0; 1 << 20];
        near.read(1 << 20, &mut back).unwrap();
        assert!(far.bytes() == sent && back == sent, "{version:?}");
    }
}

#[test]
fn a_refused_client_that_stays_is_closed_after_a_while() {
    let server = Server::new(options(), 1);
    let refused = [[8, 0, 0, 0, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0, 0, 0], [0x81, 0, 0, 0, 0, 0, 0, 0]].concat();
    let connect = || {
        let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, server.nic.port())).unwrap();
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        stream.write_all(&refused).unwrap();
        let mut status = vec![];
        stream.read_to_end(&mut status).unwrap();
        assert_eq!(status, [1, 0, 0, 0, 0x56, 0x54, 0x43, 0x4d], "the status, and the end of the server's stream");
        stream
    };
    // One sends no more and stays, another one never stops sending.
    let (_silent, mut endless) = (connect(), connect());
    let started = Instant::now();
    let piece = vec![0; 1 << 20];
    let sent = (0..200).take_while(|_| endless.write_all(&piece).is_ok()).count();
    assert!((64..100).contains(&sent), "{sent} MiB were thrown away");
    while server.nic.serving() > 0 && started.elapsed() < LIMIT {
        std::thread::yield_now();
    }
    let took = started.elapsed();
    assert!(took > Duration::from_millis(1500) && took < Duration::from_secs(6), "{took:?}");
}
