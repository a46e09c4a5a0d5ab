//! The TCP fabric with its own ends on both sides: every version, both directions, all sizes, through lanes and cores.

mod tcp_rig;

use std::time::{Duration, Instant};

use moonrail_datapath::core::{Command, dispatch};
use moonrail_datapath::nic::{Op, Target, TcpVersion, WcStatus};
use moonrail_datapath::region::Memory;

use tcp_rig::{Client, LIMIT, Node, Server, all_good, options, pattern};

const VERSIONS: [TcpVersion; 3] = [TcpVersion::V1, TcpVersion::V2, TcpVersion::Batch];

#[test]
fn bytes_arrive_in_both_directions_whatever_the_size() {
    let server = Server::new(options(), 1);
    let mut client = Client::new(options());
    for version in VERSIONS {
        for len in [1usize, 64, 4095, 65_536, 1 << 20, 64 << 20] {
            let far = server.memory(len + 64);
            let near = Memory::allocate(2 * len).unwrap();
            let sent = pattern(len, len as u64);
            near.write(0, &sent).unwrap();
            let (mut post, _admin) = client.dial(&server.target(version)).unwrap();
            let base = far.memory.addr() + 32;
            let write = client.request(Op::Write, &near, 0, base, len as u32);
            let read = client.request(Op::Read, &near, len as u64, base, len as u32);
            assert_eq!(post.post(&[write]).accepted, 1);
            assert!(all_good(&client.wait(1)), "{version:?} {len}");
            assert_eq!(post.post(&[read]).accepted, 1);
            assert!(all_good(&client.wait(1)), "{version:?} {len}");
            let mut back = vec![0; len];
            near.read(len as u64, &mut back).unwrap();
            let there = far.bytes();
            assert!(there[32..32 + len] == sent[..] && back == sent, "{version:?} {len}");
            assert!(there[..32].iter().chain(&there[32 + len..]).all(|b| *b == 0), "{version:?} {len}");
        }
    }
}

#[test]
fn a_chain_is_pipelined_and_its_completions_come_in_order() {
    let server = Server::new(options(), 1);
    let mut client = Client::new(options());
    let far = server.memory(1 << 22);
    for version in VERSIONS {
        let near = Memory::allocate(1 << 22).unwrap();
        let sent = pattern(1 << 21, 7);
        near.write(0, &sent).unwrap();
        let (mut post, _admin) = client.dial(&server.target(version)).unwrap();
        let mut chain = vec![];
        // Every size between a byte and 30 KiB, WRITEs and the READs that fetch them back, in runs of three.
        let mut at = 0;
        for n in 0..100u64 {
            let len = (1 + n * n * 3) as u32;
            if n % 3 == 0 {
                chain.push(client.request(Op::Write, &near, 0, far.memory.addr(), 0));
            }
            chain.push(client.request(Op::Write, &near, at, far.memory.addr() + at, len));
            at += u64::from(len);
        }
        let mut back = 0;
        for n in 0..100u64 {
            let len = (1 + n * n * 3) as u32;
            chain.push(client.request(Op::Read, &near, (1 << 21) + back, far.memory.addr() + back, len));
            back += u64::from(len);
        }
        for part in chain.chunks(64) {
            assert_eq!(post.post(part).accepted, part.len());
        }
        let done = client.wait(chain.len());
        assert_eq!((done.len(), all_good(&done)), (chain.len(), true), "{version:?}");
        let mut bytes = vec![0; at as usize];
        near.read(1 << 21, &mut bytes).unwrap();
        assert!(bytes == sent[..at as usize], "{version:?}");
        assert!(far.range(0, at as usize) == sent[..at as usize], "{version:?}");
    }
}

#[test]
fn only_signalled_requests_complete() {
    let server = Server::new(options(), 1);
    let mut client = Client::new(options());
    let far = server.memory(1 << 16);
    let near = Memory::allocate(1 << 16).unwrap();
    for version in VERSIONS {
        let (mut post, _admin) = client.dial(&server.target(version)).unwrap();
        let mut chain: Vec<_> =
            (0..32u64).map(|n| client.request(Op::Write, &near, n * 64, far.memory.addr() + n * 64, 64)).collect();
        for request in &mut chain {
            request.signaled = false;
        }
        chain[15].signaled = true;
        chain[31].signaled = true;
        post.post(&chain);
        let done = client.wait(2);
        let expected = [chain[15].wr_id.sequence, chain[31].wr_id.sequence];
        assert_eq!(done.iter().map(|d| d.0).collect::<Vec<_>>(), expected, "{version:?}");
        assert!(all_good(&done));
    }
}

#[test]
fn a_refusal_fails_its_own_request_and_flushes_the_later_ones() {
    let server = Server::new(options(), 1);
    let mut client = Client::new(options());
    let far = server.memory(1 << 16);
    let end = far.memory.addr() + (1 << 16);
    let near = Memory::allocate(1 << 20).unwrap();
    near.write(0, &pattern(1 << 20, 1)).unwrap();
    for version in [TcpVersion::V2, TcpVersion::Batch] {
        for op in [Op::Write, Op::Read] {
            for (addr, len) in [(end, 1u32), (end - 1, 2), (u64::MAX - 3, 64), (far.memory.addr() - 1, 2), (8, 1 << 20)]
            {
                let (mut post, _admin) = client.dial(&server.target(version)).unwrap();
                let chain = [
                    client.request(op, &near, 0, far.memory.addr(), 64),
                    client.request(op, &near, 0, far.memory.addr() + 64, 64),
                    client.request(op, &near, 0, addr, len),
                    client.request(op, &near, 0, far.memory.addr() + 128, 64),
                    client.request(op, &near, 0, far.memory.addr() + 192, 64),
                ];
                post.post(&chain);
                let done: Vec<_> = client.wait(5).iter().map(|d| d.1).collect();
                let (good, flushed) = (WcStatus::SUCCESS, WcStatus::WR_FLUSH_ERR);
                let expected = [good, good, WcStatus::REM_ACCESS_ERR, flushed, flushed];
                assert_eq!(done, expected, "{version:?} {op:?} {addr:#x}+{len}");
                assert!(post.post(&chain[..1]).error.is_none());
                assert_eq!(client.wait(1)[0].1, flushed, "and so is what comes later");
            }
        }
    }
    // Version 1 has no word for it: the connection ends.
    let (mut post, _admin) = client.dial(&server.target(TcpVersion::V1)).unwrap();
    let chain = [
        client.request(Op::Write, &near, 0, far.memory.addr(), 64),
        client.request(Op::Read, &near, 0, end - 1, 2),
        client.request(Op::Write, &near, 0, far.memory.addr(), 64),
    ];
    post.post(&chain);
    let done: Vec<_> = client.wait(3).iter().map(|d| d.1).collect();
    assert_eq!(done[0], WcStatus::RETRY_EXC_ERR);
    assert_eq!(done[1..], [WcStatus::WR_FLUSH_ERR; 2]);
}

#[test]
fn a_transfer_may_cross_chunks_of_one_region() {
    use moonrail_datapath::nic::{Access, Nic};
    let server = Server::new(options(), 1);
    let mut client = Client::new(options());
    let far = Memory::allocate(4 << 12).unwrap();
    let access = Access { remote: true, relaxed_ordering: false };
    let chunks: Vec<_> = (0..4).map(|n| server.nic.register(&far, n << 12, 1 << 12, access).unwrap()).collect();
    let near = Memory::allocate(4 << 12).unwrap();
    let sent = pattern(4 << 12, 5);
    near.write(0, &sent).unwrap();
    for version in VERSIONS {
        let (mut post, _admin) = client.dial(&server.target(version)).unwrap();
        post.post(&[client.request(Op::Write, &near, 0, far.addr(), 4 << 12)]);
        assert!(all_good(&client.wait(1)), "{version:?}");
    }
    let mut there = vec![0; 4 << 12];
    far.read(0, &mut there).unwrap();
    assert!(there == sent);
    // Local memory is nobody's to reach.
    let local = server.nic.register(&near, 0, 1 << 12, Access { remote: false, relaxed_ordering: false }).unwrap();
    let (mut post, _admin) = client.dial(&server.target(TcpVersion::V2)).unwrap();
    post.post(&[client.request(Op::Read, &near, 0, near.addr(), 8)]);
    assert_eq!(client.wait(1)[0].1, WcStatus::REM_ACCESS_ERR);
    drop((chunks, local));
}

#[test]
fn works_go_through_a_core_over_several_lanes() {
    const LEN: usize = 32 << 20;
    let server = Server::new(options(), 1);
    let mut node = Node::new(options());
    let far = server.memory(LEN);
    let (out, back) = (node.region(LEN), node.region(LEN));
    let sent = pattern(LEN, 3);
    out.memory().write(0, &sent).unwrap();
    let remote = node.remote(far.memory.addr(), LEN as u64);
    for (version, lanes) in [(TcpVersion::V2, 4), (TcpVersion::Batch, 3), (TcpVersion::V1, 2), (TcpVersion::Batch, 1)] {
        node.connect(&server.target(version), lanes).unwrap();
        assert!(node.run_until(LIMIT, |n| n.peer.routes() == 1), "the trial needs no peer");
        far.memory.write(0, &vec![0; LEN]).unwrap();
        let small: Vec<_> = (0..512u64).map(|i| (i * 4096, i * 4096, 4096)).collect();
        let first = node.submit(Op::Write, &out, &remote, &small);
        let rest = (512 * 4096u64, LEN as u64 - 512 * 4096);
        let second = node.submit(Op::Write, &out, &remote, &[(rest.0, rest.0, rest.1)]);
        assert!(node.finish(&first) && node.finish(&second), "{version:?}");
        let read = node.submit(Op::Read, &back, &remote, &[(0, 0, LEN as u64)]);
        assert!(node.finish(&read), "{version:?}");
        for work in [&first, &second, &read] {
            assert_eq!(work.first_error(), None, "{version:?}");
        }
        assert!(far.bytes() == sent, "{version:?}");
        let mut there = vec![0; LEN];
        back.memory().read(0, &mut there).unwrap();
        assert!(there == sent, "{version:?}");
        back.memory().write(0, &vec![0; LEN]).unwrap();
        node.retire();
        assert!(node.run_until(LIMIT, |n| n.peer.routes() == 0 && n.core.outstanding() == 0));
    }
    assert_eq!((node.first_errors.len(), node.needs_fence, node.overdue), (0, 0, 0));
    assert!(node.run_until(LIMIT, |_| server.nic.serving() == 0), "connections of retired lanes are gone");
}

#[test]
fn cores_asleep_wake_for_their_peers_and_for_what_they_wait_for() {
    const LEN: usize = 4 << 20;
    let server = Node::new(options());
    let far = server.region(LEN);
    let mut node = Node::new(options());
    let to = Target::Tcp { host: "127.0.0.1".into(), port: server.nic.port(), version: TcpVersion::Batch };
    node.connect(&to, 2).unwrap();
    assert!(node.run_until(LIMIT, |n| n.peer.routes() == 1));
    let local = node.region(LEN);
    local.memory().write(0, &pattern(LEN, 8)).unwrap();
    let remote = node.remote(far.memory().addr(), LEN as u64);
    let works: Vec<_> = (0..40)
        .map(|n| {
            let len = if n % 2 == 0 { 64 } else { LEN as u64 };
            node.work(if n % 4 < 2 { Op::Write } else { Op::Read }, &local, &remote, &[(0, 0, len)])
        })
        .collect();
    let counters = [node.counters.clone(), server.counters.clone()];
    let inboxes = [node.inboxes.clone(), server.inboxes.clone()];
    let threads = [node.run(), server.run()];
    let mut slowest = Duration::ZERO;
    for work in works {
        // Long enough that both are asleep.
        std::thread::sleep(Duration::from_millis(5));
        let started = Instant::now();
        dispatch(work.clone(), &inboxes[0]).ok().unwrap();
        while !work.is_terminal() && started.elapsed() < LIMIT {
            std::thread::sleep(Duration::from_micros(50));
        }
        assert!(work.is_terminal() && work.first_error().is_none());
        slowest = slowest.max(started.elapsed());
    }
    // A wake-up that is lost would cost the longest sleep, 500 ms.
    assert!(slowest < Duration::from_millis(400), "{slowest:?}");
    for (counters, inbox) in counters.iter().zip(&inboxes) {
        assert!(counters.sleeps.get() >= 20, "{} sleeps", counters.sleeps.get());
        inbox[0].command(Command::Stop).ok().unwrap();
    }
    for thread in threads {
        thread.join().unwrap();
    }
    let mut there = vec![0; LEN];
    far.memory().read(0, &mut there).unwrap();
    assert!(there == pattern(LEN, 8));
}
