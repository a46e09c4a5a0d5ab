//! The lab itself: what every other lab test relies on. Also the shortest example of one.

use std::fs;
use std::net::{Ipv4Addr, UdpSocket};
use std::path::Path;
use std::process::Command;
use std::thread::sleep;
use std::time::{Duration, Instant};

fn node() -> u32 {
    std::env::var("NODE").expect("runs on a lab node").parse().expect("a number")
}

/// Waits for the other node; every name once per binary.
fn barrier(name: &str) {
    let status = Command::new("lab-barrier").arg(name).status().expect("lab-barrier is on the PATH");
    assert!(status.success(), "barrier {name}: {status}");
}

fn fault(what: &str, node: u32) -> bool {
    Command::new("lab-fault").args([what, &node.to_string()]).status().expect("lab-fault is on the PATH").success()
}

#[test]
fn a_node_knows_who_it_is() {
    assert_eq!(std::env::var("NODES").as_deref(), Ok("2"));
    assert_eq!(std::env::var("NICS").as_deref(), Ok("1"));
    assert_eq!(std::env::var("MOONRAIL_LAB").as_deref(), Ok("1"));
    let gid = fs::read_to_string("/sys/class/infiniband/rxe0/ports/1/gids/1").expect("an IPv4 GID");
    assert_eq!(gid.trim(), format!("0000:0000:0000:0000:0000:ffff:0a00:000{}", node() + 1));
}

#[test]
fn names_lead_to_addresses_and_datagrams_arrive() {
    let socket = UdpSocket::bind((Ipv4Addr::new(10, 0, 0, node() as u8 + 1), 7000)).expect("our address");
    socket.set_read_timeout(Some(Duration::from_secs(20))).expect("a timeout");
    barrier("datagrams-bound");
    socket.send_to(b"hello", (format!("node{}", 1 - node()), 7000)).expect("the other's name");
    let mut bytes = [0; 8];
    let (length, from) = socket.recv_from(&mut bytes).expect("the other's datagram");
    assert_eq!((&bytes[..length], from.ip()), (&b"hello"[..], Ipv4Addr::new(10, 0, 0, 2 - node() as u8).into()));
    barrier("datagrams-arrived");
}

/// 8 MB that nobody takes. Node 0 is the switch as well: if that waited for the frozen node, it would stand still from here.
fn more_than_the_switch_keeps() {
    let socket = UdpSocket::bind((Ipv4Addr::new(10, 0, 0, 1), 0)).expect("our address");
    socket.set_nonblocking(true).expect("an option of a socket");
    for _ in 0..2_000 {
        // Refused when our own NIC's queue is full: then as much as there is room for is on its way.
        let _ = socket.send_to(&[0; 4_000], ("10.0.0.2", 7_001));
    }
}

#[test]
fn node_1_freezes_and_thaws_on_request() {
    let beat = Path::new("/lab/shared/beat");
    barrier("beat");
    if node() == 1 {
        for count in 0..100 {
            fs::write(beat, count.to_string()).expect("the shared folder");
            sleep(Duration::from_millis(100));
            if Path::new("/lab/shared/thawed").exists() {
                break;
            }
        }
    } else {
        let until_it_beats = Instant::now() + Duration::from_secs(10);
        while !beat.exists() && Instant::now() < until_it_beats {
            sleep(Duration::from_millis(50));
        }
        assert!(fault("freeze", 1));
        let frozen_at = fs::read_to_string(beat).expect("it has beaten");
        sleep(Duration::from_secs(1));
        assert_eq!(fs::read_to_string(beat).expect("still there"), frozen_at, "a frozen node does nothing");
        more_than_the_switch_keeps();
        assert_eq!(fs::read_to_string(beat).expect("still there"), frozen_at, "it is frozen, and we are not");
        assert!(fault("thaw", 1));
        fs::write("/lab/shared/thawed", "").expect("the shared folder");
        assert!(!fault("freeze", 0), "node 0 is the switch");
    }
    barrier("beaten");
}
