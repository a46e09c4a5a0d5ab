//! The shm NIC between real processes.
#![allow(unsafe_code)]

mod shm_rig;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use moonrail_datapath::core::{
    Command, Core, CoreConfig, CoreCounters, CoreEvent, Doorbell, Inbox, Outbox, PollMode, RailKey, RailSpec, dispatch,
    run,
};
use moonrail_datapath::nic::shm::ShmNic;
use moonrail_datapath::nic::{Nic, Op, Target, WcStatus};
use moonrail_datapath::region::{Chunk, Memory, Region};
use moonrail_datapath::slice::{Extent, SliceRule, Slices, find_extent, tile};
use moonrail_datapath::transfer::{Peer as CorePeer, RemoteBuffer, RemoteBuffers, Route};
use moonrail_datapath::units::{CoreId, Nanos, NicId, PeerId, PeerNicId, RailId, RemoteAddr, Rkey};
use moonrail_datapath::work::{Completion, Work, WorkParts};

use shm_rig::{Desk, PATIENCE, Peer, REMOTE, borrowed, caps, fill, holds, soon};

/// Not a test: the body of the peers.
#[test]
fn peer() {
    shm_rig::peer_main();
}

/// WRITE to and READ from a region of the peer, in pieces, with a gap that must stay.
fn there_and_back(peer: &mut Peer, desk: &mut Desk, how: &str, len: usize, piece: usize) {
    let far = peer.ask(&format!("{how} {} 1", len + 64));
    let near = Memory::allocate(len).unwrap();
    fill(&near, 2);
    let pieces: Vec<_> = (0..len).step_by(piece).map(|at| (at as u64, piece.min(len - at) as u32)).collect();
    for chain in pieces.chunks(64) {
        let chain: Vec<_> = chain.iter().map(|&(at, n)| (near.addr() + at, far + at, n)).collect();
        desk.succeed(Op::Write, &chain);
    }
    assert_eq!(peer.ask(&format!("holds {far} 0 {len} 2")), 1, "{how} {len} in {piece}: written");
    assert_eq!(peer.ask(&format!("holds {far} {len} 64 1")), 1, "{how} {len} in {piece}: and nothing more");
    fill(&near, 3);
    for chain in pieces.chunks(64) {
        let chain: Vec<_> = chain.iter().map(|&(at, n)| (near.addr() + at, far + at, n)).collect();
        desk.succeed(Op::Read, &chain);
    }
    assert!(holds(&near, 0, len, 2), "{how} {len} in {piece}: read");
    peer.ask(&format!("unregister {far}"));
}

#[test]
fn bytes_arrive_in_memory_that_was_allocated_and_in_memory_that_was_borrowed() {
    let mut peer = Peer::start();
    let nic = ShmNic::open().unwrap();
    let mut desk = Desk::dial(&nic, peer.token).unwrap();
    desk.succeed(Op::Write, &[(0, 0, 0)]);
    for how in ["allocate", "borrow"] {
        for (len, piece) in
            [(64, 64), (4096, 100), (1 << 20, 4096), ((1 << 20) + 13, 65_536), (64 << 20, 64 << 20), (8 << 20, 65_536)]
        {
            there_and_back(&mut peer, &mut desk, how, len, piece);
        }
    }
}

#[test]
fn a_region_registered_after_the_dial_is_found() {
    let mut peer = Peer::start();
    let nic = ShmNic::open().unwrap();
    let mut desk = Desk::dial(&nic, peer.token).unwrap();
    for round in 0..50 {
        there_and_back(&mut peer, &mut desk, if round % 2 == 0 { "allocate" } else { "borrow" }, 4096, 512);
    }
}

#[test]
fn several_threads_copy_through_one_attachment() {
    let mut peer = Peer::start();
    let far = [peer.ask("allocate 4194304 1"), peer.ask("borrow 4194304 1")];
    let nic = ShmNic::open().unwrap();
    let attachment = nic.attach(peer.token, Instant::now() + PATIENCE).unwrap();
    for far in far {
        let copiers: Vec<_> = (0..4u64)
            .map(|part| {
                let attachment = attachment.clone();
                std::thread::spawn(move || {
                    let near = Memory::allocate(1 << 20).unwrap();
                    let place = RemoteAddr(far + (part << 20));
                    for round in 0..20 {
                        fill(&near, part + round);
                        attachment.copy(Op::Write, &near, 0, place, 1 << 20).unwrap();
                        fill(&near, 99);
                        attachment.copy(Op::Read, &near, 0, place, 1 << 20).unwrap();
                        assert!(holds(&near, 0, 1 << 20, part + round));
                    }
                    let outside = attachment.copy(Op::Read, &near, 1, place, 1 << 20).unwrap_err();
                    assert_eq!(outside.status, WcStatus::LOC_PROT_ERR);
                })
            })
            .collect();
        for copier in copiers {
            copier.join().unwrap();
        }
    }
    let nowhere = Memory::allocate(64).unwrap();
    let error = attachment.copy(Op::Read, &nowhere, 0, RemoteAddr(far[0] - 1), 64).unwrap_err();
    assert_eq!(error.status, WcStatus::REM_ACCESS_ERR);
    drop(attachment);
    assert!(nic.attachment(peer.token).is_none(), "nobody holds it");
}

#[test]
fn the_own_segment_is_copied_within() {
    let nic = ShmNic::open().unwrap();
    let mut desk = Desk::dial(&nic, nic.token()).unwrap();
    for far in [Memory::allocate(1 << 20).unwrap(), borrowed(1 << 20)] {
        let registration = nic.register(&far, 0, 1 << 20, REMOTE).unwrap();
        let near = Memory::allocate(1 << 20).unwrap();
        fill(&near, 5);
        desk.succeed(Op::Write, &[(near.addr(), far.addr(), 1 << 20)]);
        assert!(holds(&far, 0, 1 << 20, 5));
        drop(registration);
    }
    let near = Memory::allocate(64).unwrap();
    assert_eq!(desk.run(Op::Read, &[(near.addr(), near.addr(), 64)]), [WcStatus::REM_ACCESS_ERR]);
}

#[test]
fn two_engines_of_one_process_are_two_peers() {
    let (ours, theirs) = (ShmNic::open().unwrap(), ShmNic::open().unwrap());
    let mut desk = Desk::dial(&ours, theirs.token()).unwrap();
    let (near, far) = (Memory::allocate(8192).unwrap(), Memory::allocate(8192).unwrap());
    let _registration = theirs.register(&far, 4096, 4096, REMOTE).unwrap();
    fill(&near, 8);
    desk.succeed(Op::Write, &[(near.addr(), far.addr() + 4096, 4096)]);
    let mut bytes = [0; 4096];
    far.read(4096, &mut bytes).unwrap();
    assert_eq!(bytes.as_slice(), shm_rig::pattern(4096, 8));
    assert_eq!(desk.run(Op::Write, &[(near.addr(), far.addr(), 64)]), [WcStatus::REM_ACCESS_ERR], "not registered");
    drop(theirs);
    let mut last = Desk::dial(&ours, ours.token()).unwrap();
    last.succeed(Op::Write, &[(0, 0, 0)]);
}

#[test]
fn the_first_failure_ends_the_life_and_what_follows_is_flushed() {
    let mut peer = Peer::start();
    let far = peer.ask("allocate 8192 1");
    let nic = ShmNic::open().unwrap();
    let mut desk = Desk::dial(&nic, peer.token).unwrap();
    let near = Memory::allocate(4096).unwrap();
    let (good, bad) = ((near.addr(), far, 64), (near.addr(), far + 8190, 64));
    let since = Instant::now();
    let statuses = desk.run(Op::Write, &[good, bad, good]);
    assert_eq!(statuses, [WcStatus::SUCCESS, WcStatus::REM_ACCESS_ERR, WcStatus::WR_FLUSH_ERR]);
    assert!(since.elapsed() < Duration::from_secs(2));
    assert_eq!(desk.run(Op::Write, &[good]), [WcStatus::WR_FLUSH_ERR]);

    let mut desk = Desk::dial(&nic, peer.token).unwrap();
    desk.succeed(Op::Write, &[good]);
    desk.admin.to_error().unwrap();
    desk.admin.to_error().unwrap();
    assert_eq!(desk.run(Op::Write, &[good, good]), [WcStatus::WR_FLUSH_ERR; 2]);
    peer.ask(&format!("unregister {far}"));
    let mut desk = Desk::dial(&nic, peer.token).unwrap();
    assert_eq!(desk.run(Op::Read, &[good]), [WcStatus::REM_ACCESS_ERR], "revoked");
}

/// The peer takes its memory back and offers it again, thousands of times, while we write into it all the time: it
/// checks each time that nothing lands in between.
fn churn(how: &str) {
    let mut peer = Peer::start();
    let far = peer.ask(&format!("{how} 65536 1"));
    let nic = ShmNic::open().unwrap();
    let attachment = nic.attach(peer.token, Instant::now() + PATIENCE).unwrap();
    peer.send(&format!("churn {far} 1500"));
    let stop = Arc::new(AtomicBool::new(false));
    let landed = Arc::new(AtomicU64::new(0));
    let copiers: Vec<_> = (0..2)
        .map(|_| {
            let (attachment, stop, landed) = (attachment.clone(), stop.clone(), landed.clone());
            std::thread::spawn(move || {
                let near = Memory::allocate(65_536).unwrap();
                fill(&near, 1);
                while !stop.load(Ordering::Relaxed) {
                    match attachment.copy(Op::Write, &near, 0, RemoteAddr(far), 65_536) {
                        Ok(()) => drop(landed.fetch_add(1, Ordering::Relaxed)),
                        Err(e) => assert_eq!(e.status, WcStatus::REM_ACCESS_ERR),
                    }
                }
            })
        })
        .collect();
    let rounds = peer.receive();
    stop.store(true, Ordering::Relaxed);
    for copier in copiers {
        copier.join().unwrap();
    }
    let landed = landed.load(Ordering::Relaxed);
    println!("{how}: taken back {rounds} times, {landed} copies landed");
    assert!(rounds >= 50 && landed >= 100, "{how}: taken back {rounds} times, {landed} copies landed");
}

#[test]
fn no_byte_lands_after_memory_was_taken_back() {
    churn("allocate");
    churn("borrow");
}

#[test]
fn a_thousand_regions_come_and_go() {
    let (ours, theirs) = (ShmNic::open().unwrap(), ShmNic::open().unwrap());
    let far = Memory::allocate(1000 * 4096).unwrap();
    let regions: Vec<_> = (0..1000).map(|i| theirs.register(&far, i * 4096, 4096, REMOTE).unwrap()).collect();
    let mut desk = Desk::dial(&ours, theirs.token()).unwrap();
    let near = Memory::allocate(4096).unwrap();
    for i in (0..1000).rev() {
        desk.succeed(Op::Write, &[(near.addr(), far.addr() + i * 4096, 4096)]);
    }
    drop(regions);
    assert_eq!(desk.run(Op::Write, &[(near.addr(), far.addr(), 1)]), [WcStatus::REM_ACCESS_ERR]);
    soon("their mappings stay", || {
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        // Neighbouring mappings of one file are one line; one is the memory itself.
        maps.lines().filter(|l| l.contains(&format!("{:x}-", far.addr()))).count() == 1
    });
}

/// Through a core: a batch of slices of all sizes, on its own thread, which sleeps when it has nothing to do.
#[test]
fn a_core_moves_works_over_shared_memory() {
    let mut peer = Peer::start();
    let len = 8u64 << 20;
    let far = peer.ask(&format!("allocate {len} 1"));
    let nic = ShmNic::open().unwrap();
    let inboxes: Arc<[Arc<Inbox>]> = Arc::new([Inbox::new(CoreId(0)).unwrap()]);
    let doorbell = Arc::new(Doorbell::new().unwrap());
    let outbox = Outbox::new(doorbell);
    let (cq, handle) = nic.create_cq(4096).unwrap();
    let config = CoreConfig {
        id: CoreId(0),
        inbox: inboxes[0].clone(),
        outbox: outbox.clone(),
        cores: inboxes.clone(),
        nics: vec![(NicId(0), cq)],
        counters: Arc::<CoreCounters>::default(),
    };
    let start = Instant::now();
    let clock = move || Nanos::from_duration(start.elapsed());
    let core = std::thread::spawn(move || run(Box::new(Core::new(config)), PollMode::default(), &clock, &|_| {}));
    let core_peer = CorePeer::new(PeerId(0), "b".into());
    let target = Target::Shm { token: peer.token };
    let (qp, _admin) = nic.dial(&handle, caps(), &target, Instant::now() + PATIENCE).unwrap();
    let rail = RailSpec {
        key: RailKey { rail: RailId(0), life: 0 },
        peer: core_peer.clone(),
        nic: NicId(0),
        peer_nic: PeerNicId(0),
        counters: Arc::default(),
        claims: true,
    };
    inboxes[0].command(Command::Adopt { rail, qp }).ok().unwrap();
    soon("the trial", || core_peer.routes() == 1);

    let memory = Memory::allocate(len as usize).unwrap();
    let key = nic.register(&memory, 0, len, REMOTE).unwrap();
    let chunk = Chunk { addr: memory.addr(), len, keys: Box::new([Some(key.into())]) };
    let local = Arc::new(Region::new(memory.clone(), vec![chunk], "cpu:0".into(), true));
    let buffer = RemoteBuffer {
        extent: Extent { addr: far, len },
        rkeys: Box::new([Some(Rkey(0))]),
        open: true,
        location: "cpu:0".into(),
    };
    let remote = Arc::new(RemoteBuffers::new(core_peer, Route::any(), vec![buffer]));
    let near = [Extent { addr: memory.addr(), len }];
    let mut finished = 0;
    for (op, seed, blocks, size) in
        [(Op::Write, 7, 8, 1 << 20), (Op::Read, 7, 2048, 4096), (Op::Write, 9, 2048, 4096), (Op::Read, 9, 8, 1 << 20)]
    {
        fill(&memory, if op == Op::Write { seed } else { 1 });
        let mut slices = Slices::new();
        for at in 0..blocks as u64 {
            let (from, to) = (memory.addr() + at * size, RemoteAddr(far + at * size));
            let rule = SliceRule::default();
            tile(at as u32, from, to, size, rule, |a| find_extent(&near, a), |a| remote.find(a), &mut slices).unwrap();
        }
        let work = Work::new(WorkParts {
            op,
            slices,
            transfers: vec![size; blocks].into(),
            local: local.clone(),
            remote: remote.clone(),
            submitted: Nanos::ZERO,
            deadline: Nanos::from_secs(60),
            cores: 1,
            retries: 9,
            completion: Completion::new(1),
        });
        dispatch(work.clone(), &inboxes).ok().unwrap();
        soon("the work ends", || work.is_terminal());
        assert!(work.first_error().is_none(), "{:?}", work.first_error());
        match op {
            Op::Write => assert_eq!(peer.ask(&format!("holds {far} 0 {len} {seed}")), 1),
            Op::Read => assert!(holds(&memory, 0, len as usize, seed)),
        }
        // Long enough to sleep.
        std::thread::sleep(Duration::from_millis(5));
        while let Some(event) = outbox.next() {
            finished += usize::from(matches!(event, CoreEvent::Finished(_)));
        }
    }
    soon("all told", || {
        while let Some(event) = outbox.next() {
            finished += usize::from(matches!(event, CoreEvent::Finished(_)));
        }
        finished == 4
    });
    inboxes[0].command(Command::Stop).ok().unwrap();
    soon("the core stops", || core.is_finished());
}
