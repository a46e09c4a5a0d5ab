//! The TCP fabric against hand-made stock ends: plain sockets that do byte for byte what a stock engine does.

mod tcp_rig;

use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, Ipv6Addr, Shutdown, TcpListener, TcpStream};
use std::thread::JoinHandle;
use std::time::Duration;

use moonrail_datapath::nic::tcp::{Ports, TcpOptions};
use moonrail_datapath::nic::{Op, Target, TcpVersion, WcStatus};
use moonrail_datapath::region::Memory;

use tcp_rig::{Client, LIMIT, Server, all_good, options, pattern};

const OK: [u8; 8] = [0, 0, 0, 0, 0x56, 0x54, 0x43, 0x4d];
const REJECTED: [u8; 8] = [1, 0, 0, 0, 0x56, 0x54, 0x43, 0x4d];

/// A header as a stock client sends it: its compiler's padding is not zeroed.
fn header(size: u64, addr: u64, opcode: u8) -> [u8; 24] {
    let mut bytes = [0xa5; 24];
    bytes[..8].copy_from_slice(&size.to_le_bytes());
    bytes[8..16].copy_from_slice(&addr.to_le_bytes());
    bytes[16] = opcode;
    bytes
}

fn connect(server: &Server) -> TcpStream {
    let stream = TcpStream::connect((Ipv4Addr::LOCALHOST, server.nic.port())).unwrap();
    stream.set_read_timeout(Some(LIMIT)).unwrap();
    stream.set_write_timeout(Some(LIMIT)).unwrap();
    stream
}

fn take(stream: &mut TcpStream, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    stream.read_exact(&mut bytes).unwrap();
    bytes
}

/// What still comes until the stream ends, by FIN or reset.
fn rest(stream: &mut TcpStream) -> Vec<u8> {
    let mut bytes = vec![];
    match stream.read_to_end(&mut bytes) {
        Ok(_) => bytes,
        Err(e) if e.kind() == ErrorKind::ConnectionReset => bytes,
        Err(e) => panic!("{e}"),
    }
}

/// Nothing comes for a while.
fn is_silent(stream: &mut TcpStream) -> bool {
    stream.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
    let silent = matches!(stream.read(&mut [0]), Err(e) if e.kind() == ErrorKind::WouldBlock);
    stream.set_read_timeout(Some(LIMIT)).unwrap();
    silent
}

#[test]
fn a_stock_client_is_served_in_both_versions_on_one_connection() {
    let server = Server::new(options(), 1);
    let far = server.memory(1 << 20);
    let base = far.memory.addr();
    let mut stream = connect(&server);
    let data = pattern(200_000, 1);
    // v2 WRITE of 100 bytes, twice: its status comes after each.
    for n in 0..2u64 {
        stream.write_all(&header(100, base + n * 100, 0x81)).unwrap();
        assert!(is_silent(&mut stream), "nothing is acknowledged before it is there");
        stream.write_all(&data[n as usize * 100..][..100]).unwrap();
        assert_eq!(take(&mut stream, 8), OK);
        assert_eq!(far.range(n * 100, 100), &data[n as usize * 100..][..100], "acknowledged means applied");
    }
    // v1 WRITE has no answer; the v1 READ after it proves it, and has nothing but the data.
    stream.write_all(&header(200_000, base, 0x01)).unwrap();
    stream.write_all(&data).unwrap();
    stream.write_all(&header(1, base + 199_999, 0x00)).unwrap();
    assert_eq!(take(&mut stream, 1), data[199_999..]);
    assert!(is_silent(&mut stream));
    // v2 READ of 200,000 bytes: status, data.
    stream.write_all(&header(200_000, base, 0x80)).unwrap();
    assert_eq!(take(&mut stream, 8), OK);
    assert!(take(&mut stream, 200_000) == data);
    // Any other value is a READ, of the version its highest bit says.
    for (opcode, status) in [(0x02, false), (0x7f, false), (0x82, true), (0xff, true)] {
        stream.write_all(&header(3, base + 5, opcode)).unwrap();
        if status {
            assert_eq!(take(&mut stream, 8), OK, "{opcode:#x}");
        }
        assert_eq!(take(&mut stream, 3), data[5..8], "{opcode:#x}");
        assert!(is_silent(&mut stream), "{opcode:#x}");
    }
}

#[test]
fn pipelined_requests_of_a_stock_client_are_served_in_order() {
    let server = Server::new(options(), 1);
    let far = server.memory(1 << 20);
    let base = far.memory.addr();
    let mut stream = connect(&server);
    let mut sent = vec![];
    let mut expected = vec![];
    for n in 0..2000u64 {
        let body = pattern(1 + (n % 700) as usize, n);
        let (size, addr) = (body.len() as u64, base + n % 1000);
        sent.extend(header(size, addr, if n % 2 == 0 { 0x81 } else { 0x01 }));
        sent.extend(&body);
        if n % 2 == 0 {
            expected.extend(OK);
        }
        // A READ of what was just written: the next WRITE over the same place must not overtake it.
        sent.extend(header(size, addr, 0x80));
        expected.extend(OK);
        expected.extend(&body);
    }
    let mut half = stream.try_clone().unwrap();
    let writer = std::thread::spawn(move || {
        // In pieces that end anywhere.
        for (n, piece) in sent.chunks(977).enumerate() {
            half.write_all(piece).unwrap();
            if n % 100 == 0 {
                std::thread::sleep(Duration::from_millis(1));
            }
        }
        half.shutdown(Shutdown::Write).unwrap();
    });
    assert!(rest(&mut stream) == expected, "every reply, in order, and then the end");
    writer.join().unwrap();
}

#[test]
fn a_request_out_of_bounds_is_refused_as_a_stock_server_does() {
    let server = Server::new(options(), 1);
    let far = server.memory(4096);
    let (base, before) = (far.memory.addr(), far.bytes());
    let cases =
        [(base + 4095, 2), (base - 1, 2), (base + 4096, 1), (base, 0), (base, 4097), (base, u64::MAX), (u64::MAX, 2)];
    for (addr, size) in cases {
        for opcode in [0x00, 0x01, 0x80, 0x81] {
            let mut stream = connect(&server);
            stream.write_all(&header(size, addr, opcode)).unwrap();
            if opcode & 1 == 1 {
                // A client that sends its body without waiting must still see the status.
                let _ = stream.write_all(&vec![0xee; size.min(1 << 20) as usize]);
            }
            let expected: &[u8] = if opcode & 0x80 != 0 { &REJECTED } else { &[] };
            assert_eq!(rest(&mut stream), expected, "{addr:#x} {size} {opcode:#x}");
        }
    }
    assert_eq!(far.bytes(), before, "nothing was written");
    // What came before the refusal is applied and answered.
    let mut stream = connect(&server);
    let mut bytes = header(4, base, 0x81).to_vec();
    bytes.extend(b"abcd");
    bytes.extend(header(4, base + 4095, 0x81));
    bytes.extend(b"efgh");
    bytes.extend(header(4, base + 8, 0x81));
    bytes.extend(b"ijkl");
    stream.write_all(&bytes).unwrap();
    assert_eq!(rest(&mut stream), [OK, REJECTED].concat());
    assert_eq!(far.range(0, 12), b"abcd\0\0\0\0\0\0\0\0");
}

#[test]
fn a_cut_write_is_a_partial_update_and_nothing_else() {
    let server = Server::new(options(), 1);
    let far = server.memory(4096);
    let mut stream = connect(&server);
    stream.write_all(&header(1000, far.memory.addr(), 0x81)).unwrap();
    stream.write_all(&[7; 300]).unwrap();
    drop(stream);
    let mut next = connect(&server);
    next.write_all(&header(1, far.memory.addr() + 4000, 0x80)).unwrap();
    assert_eq!(take(&mut next, 9), [&OK[..], &[0]].concat());
    while far.range(299, 1) == [0] {
        std::thread::yield_now();
    }
    assert_eq!(far.range(0, 1000), [vec![7; 300], vec![0; 700]].concat());
}

#[test]
fn the_data_port_is_reached_by_both_families_of_addresses() {
    let server = Server::new(options(), 1);
    let far = server.memory(64);
    for at in [
        TcpStream::connect((Ipv4Addr::LOCALHOST, server.nic.port())),
        TcpStream::connect((Ipv6Addr::LOCALHOST, server.nic.port())),
    ] {
        // A system without IPv6 has no address for the second.
        let mut stream = match at {
            Ok(stream) => stream,
            Err(e) if e.kind() == ErrorKind::AddrNotAvailable => continue,
            Err(e) => panic!("{e}"),
        };
        stream.write_all(&header(4, far.memory.addr(), 0x80)).unwrap();
        assert_eq!(take(&mut stream, 12)[..8], OK);
    }
    let client = Client::new(TcpOptions { ports: Ports::Range(15_000, 17_000), ..options() });
    assert!((15_000..=17_000).contains(&client.nic.port()));
    for host in ["127.0.0.1", "localhost", "[::1]", "::1"] {
        let to = Target::Tcp { host: host.into(), port: server.nic.port(), version: TcpVersion::V2 };
        if let Err(e) = client.dial(&to) {
            assert!(host.contains("::1"), "{host}: {e}");
        }
    }
}

/// A server that expects exactly `asks` on its only connection and answers each with its reply.
fn stock_server(script: Vec<(Vec<u8>, Vec<u8>)>) -> (u16, JoinHandle<Vec<u8>>) {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let port = listener.local_addr().unwrap().port();
    let thread = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        for (ask, reply) in script {
            let got = take(&mut stream, ask.len());
            assert_eq!(got, ask);
            // In two pieces: a status may come in any.
            let (first, second) = reply.split_at(reply.len() / 3);
            stream.write_all(first).unwrap();
            std::thread::sleep(Duration::from_millis(2));
            stream.write_all(second).unwrap();
        }
        stream.shutdown(Shutdown::Write).unwrap();
        rest(&mut stream)
    });
    (port, thread)
}

fn target(port: u16, version: TcpVersion) -> Target {
    Target::Tcp { host: "127.0.0.1".into(), port, version }
}

/// Our headers: with zeros for padding.
fn asked(size: u64, addr: u64, opcode: u8) -> Vec<u8> {
    let mut bytes = header(size, addr, opcode).to_vec();
    bytes[17..].fill(0);
    bytes
}

#[test]
fn a_stock_server_sees_the_bytes_of_a_stock_client() {
    let near = Memory::allocate(4096).unwrap();
    near.write(0, &pattern(100, 2)).unwrap();
    let body = pattern(100, 2);
    let (w, r) = (0x7f6a_b600_0000u64, 0x7f6f_7120_0000u64);
    for version in [TcpVersion::V1, TcpVersion::V2] {
        let v2 = version == TcpVersion::V2;
        let bit = if v2 { 0x80 } else { 0 };
        let status = if v2 { OK.to_vec() } else { vec![] };
        let mut script = vec![
            ([asked(100, w, 1 | bit), body.clone()].concat(), status.clone()),
            ([asked(100, w + 100, 1 | bit), body.clone()].concat(), status.clone()),
        ];
        if !v2 {
            // The proof of the WRITEs: a READ of the last byte written.
            script.push((asked(1, w + 199, 0), vec![0xcc]));
        }
        script.push((asked(200, r, bit), [status, pattern(200, 9)].concat()));
        let (port, thread) = stock_server(script);
        let mut client = Client::new(options());
        let (mut post, _admin) = client.dial(&target(port, version)).unwrap();
        let writes = [client.request(Op::Write, &near, 0, w, 100), client.request(Op::Write, &near, 0, w + 100, 100)];
        post.post(&writes);
        assert!(all_good(&client.wait(2)), "{version:?}");
        post.post(&[client.request(Op::Read, &near, 1000, r, 200)]);
        assert!(all_good(&client.wait(1)), "{version:?}");
        let mut back = [0; 200];
        near.read(1000, &mut back).unwrap();
        assert!(back[..] == pattern(200, 9)[..], "{version:?}");
        drop(post);
        client.poll();
        assert_eq!(thread.join().unwrap(), [], "{version:?}: nothing more was sent");
    }
}

#[test]
fn a_v1_write_is_not_done_before_it_is_proven() {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let mut client = Client::new(options());
    let near = Memory::allocate(4096).unwrap();
    let (mut post, _admin) = client.dial(&target(listener.local_addr().unwrap().port(), TcpVersion::V1)).unwrap();
    let (mut stream, _) = listener.accept().unwrap();
    post.post(&[client.request(Op::Write, &near, 0, 0x1000, 10)]);
    assert_eq!(client.wait_for(1, Duration::from_millis(100)), [], "the bytes are only in a buffer of the kernel");
    assert_eq!(take(&mut stream, 24 + 10 + 24)[34..], asked(1, 0x1009, 0));
    assert_eq!(client.wait_for(1, Duration::from_millis(50)), []);
    stream.write_all(&[0]).unwrap();
    assert!(all_good(&client.wait(1)));
}

#[test]
fn what_a_server_should_not_say_ends_the_lane() {
    let near = Memory::allocate(4096).unwrap();
    let cases: [(&[u8], Op, WcStatus); 6] = [
        (&[0; 8], Op::Read, WcStatus::REM_OP_ERR),
        (&[0; 8], Op::Write, WcStatus::REM_OP_ERR),
        (b"HTTP/1.1 400", Op::Read, WcStatus::REM_OP_ERR),
        (&REJECTED, Op::Write, WcStatus::REM_ACCESS_ERR),
        (&[9, 0, 0, 0, 0x56, 0x54, 0x43, 0x4d], Op::Read, WcStatus::REM_OP_ERR),
        (&OK[..5], Op::Write, WcStatus::RETRY_EXC_ERR),
    ];
    for (reply, op, status) in cases {
        let sent = if op == Op::Write { 24 + 16 } else { 24 };
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let port = listener.local_addr().unwrap().port();
        let reply = reply.to_vec();
        let thread = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            take(&mut stream, sent);
            stream.write_all(&reply).unwrap();
        });
        let mut client = Client::new(options());
        let (mut post, _admin) = client.dial(&target(port, TcpVersion::V2)).unwrap();
        post.post(&[
            client.request(op, &near, 0, 0x1000, 16),
            client.request(op, &near, 16, 0x1010, 16),
            client.request(op, &near, 32, 0x1020, 16),
        ]);
        let done: Vec<_> = client.wait(3).iter().map(|d| d.1).collect();
        assert_eq!(done, [status, WcStatus::WR_FLUSH_ERR, WcStatus::WR_FLUSH_ERR], "{op:?}");
        assert!(post.drains_clean(), "the server's end has ended");
        thread.join().unwrap();
    }
    // Bytes nobody asked for, on an idle lane: told as an event, and to the next request.
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let mut client = Client::new(options());
    let (mut post, _admin) = client.dial(&target(listener.local_addr().unwrap().port(), TcpVersion::V2)).unwrap();
    let (mut stream, _) = listener.accept().unwrap();
    stream.write_all(&OK).unwrap();
    client.wait_for(1, Duration::from_millis(50));
    use moonrail_datapath::nic::{AsyncEvent, Nic};
    assert_eq!(client.nic.next_async_event().unwrap(), Some(AsyncEvent::QpFatal(post.qpn())));
    post.post(&[client.request(Op::Read, &near, 0, 0x1000, 16)]);
    assert_eq!(client.wait(1)[0].1, WcStatus::REM_OP_ERR);
}
