//! The shm NIC between real processes.
#![allow(unsafe_code)]

mod shm_rig;

use std::sync::Arc;
use std::time::{Duration, Instant};

use moonrail_datapath::nic::shm::ShmNic;
use moonrail_datapath::nic::{DialError, Nic, Op, WcStatus};
use moonrail_datapath::region::Memory;
use moonrail_datapath::units::RemoteAddr;

use shm_rig::{Desk, PATIENCE, Peer, REMOTE, borrowed, fill, holds, soon};

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
