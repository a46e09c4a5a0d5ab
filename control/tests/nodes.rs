//! Control threads with real sockets, cores on threads and simulated NICs: what peers, strangers and faults do to them.

mod rig;

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use moonrail_control::metadata::{BufferEntry, SegmentDescriptor};
use moonrail_control::{DialError, NotifyError, OpenError, StartError};
use moonrail_datapath::nic::sim::{SimOptions, SimWorld};
use moonrail_datapath::units::{Lkey, Rkey};

use rig::{Node, Options, node, soon, wait};

fn world() -> SimWorld {
    SimWorld::real_time(1, SimOptions::default())
}

fn pair(metadata: &str) -> (SimWorld, Node, Node) {
    let world = world();
    let a = node(&world, 1, Options::new(metadata).named(if metadata == "P2PHANDSHAKE" { "127.0.0.1" } else { "a" }))
        .unwrap();
    let b = node(&world, 2, Options::new(metadata).named(if metadata == "P2PHANDSHAKE" { "127.0.0.1" } else { "b" }))
        .unwrap();
    (world, a, b)
}

fn buffer(addr: u64) -> BufferEntry {
    BufferEntry {
        name: "cpu:0".into(),
        addr,
        length: 4096,
        lkeys: vec![Lkey(1), Lkey(2)],
        rkeys: vec![Rkey(11), Rkey(12)],
    }
}

fn ask(address: &str, frame: &[u8]) -> Vec<u8> {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    stream.write_all(frame).unwrap();
    let mut reply = Vec::new();
    let _ = stream.read_to_end(&mut reply);
    reply
}

fn typed(kind: u8, body: &str) -> Vec<u8> {
    let mut frame = (body.len() as u64 + 1).to_le_bytes().to_vec();
    frame.push(kind);
    frame.extend_from_slice(body.as_bytes());
    frame
}

#[test]
fn two_nodes_without_a_store_connect_every_pair_of_nics() {
    let (_world, a, b) = pair("P2PHANDSHAKE");
    b.control.publish(vec![buffer(0x10000)], soon()).unwrap();
    let segment = a.control.open_segment(b.control.name(), None, soon()).unwrap();
    assert_eq!(segment.descriptor.buffers.len(), 1);
    let (index, _) = segment.buffers.find(0x10010).unwrap();
    assert_eq!(segment.buffers.buffers[index as usize].rkeys.len(), 2);
    a.wait_usable(b.control.name(), 4);
    b.wait_usable(a.control.name(), 4);
    assert!(a.control.rails().iter().all(|rail| rail.moonrail && rail.lives == 1 && rail.qps == 2));
    assert!(a.control.incidents().is_empty(), "{:#?}", a.control.incidents());
    a.stop();
    b.stop();
}

#[test]
fn both_ends_open_each_other_at_the_same_moment() {
    for round in 0..10 {
        let (_world, a, b) = pair("P2PHANDSHAKE");
        let (an, bn) = (a.control.name().to_owned(), b.control.name().to_owned());
        std::thread::scope(|scope| {
            scope.spawn(|| a.control.open_segment(&bn, None, soon()).unwrap());
            scope.spawn(|| b.control.open_segment(&an, None, soon()).unwrap());
        });
        a.wait_usable(&bn, 4);
        b.wait_usable(&an, 4);
        for node in [&a, &b] {
            assert!(
                node.control.rails().iter().all(|rail| rail.lives == 1),
                "round {round}: {:#?}",
                node.control.rails()
            );
        }
        a.stop();
        b.stop();
    }
}

#[test]
fn nodes_find_each_other_in_a_store_and_leave_it_clean() {
    let (world, a, b) = pair("memory://clean");
    a.control.publish(vec![buffer(0x20000)], soon()).unwrap();
    let segment = b.control.open_segment("a", None, soon()).unwrap();
    assert_eq!(segment.descriptor.buffers[0].addr, 0x20000);
    b.wait_usable("a", 4);
    // A change reaches the other node without being asked for.
    a.control.publish(vec![buffer(0x20000), buffer(0x30000)], soon()).unwrap();
    assert!(wait(|| b.control.open_segment("a", None, soon()).is_ok_and(|s| s.descriptor.buffers.len() == 2)));
    // In this mode peers look in the store, not here.
    let port = a.control.rpc_addr().rpc_port;
    assert_eq!(ask(&format!("127.0.0.1:{port}"), &typed(1, "{}"))[9..], *b"null\n");
    a.stop();
    b.stop();
    let after = node(&world, 3, Options::new("memory://clean").named("c")).unwrap();
    let error = after.control.open_segment("a", None, soon()).unwrap_err();
    assert!(matches!(error, OpenError::NotFound { .. }), "{error}");
    after.stop();
}

#[test]
fn messages_reach_the_other_application() {
    let (_world, a, b) = pair("P2PHANDSHAKE");
    a.control.notify(b.control.name(), "topic", "hello", soon()).unwrap();
    let got = b.control.take_notifications();
    assert_eq!((got[0].name.as_str(), got[0].message.as_str()), ("topic", "hello"));
    assert!(b.control.take_notifications().is_empty());
    assert!(a.control.probe(b.control.name(), soon()).unwrap() < Duration::from_secs(5));
    let gone = b.control.name().to_owned();
    b.stop();
    let error = a.control.probe(&gone, soon()).unwrap_err();
    assert!(matches!(error, NotifyError::Dial { source: DialError::Refused { .. }, .. }), "{error}");
    let error = a.control.open_segment(&gone, None, soon()).unwrap_err();
    assert!(error.to_string().contains("Connection refused"), "{error}");
    a.stop();
}

#[test]
fn slow_silent_and_malformed_clients_disturb_nobody() {
    let world = world();
    let mut options = Options::new("P2PHANDSHAKE");
    options.handshake.max_clients = 64;
    let a = node(&world, 1, options).unwrap();
    let b = node(&world, 2, Options::new("P2PHANDSHAKE")).unwrap();
    let address = a.control.name().to_owned();
    // More silent clients than are served at once, half of them with a part of a frame.
    let silent: Vec<TcpStream> = (0..200)
        .map(|i| {
            let mut stream = TcpStream::connect(&address).unwrap();
            if i % 2 == 0 {
                stream.write_all(&[100, 0, 0, 0, 0, 0, 0, 0, 0, b'{']).unwrap();
            }
            stream
        })
        .collect();
    for garbage in
        [&b"GET / HTTP/1.1\r\n\r\n"[..], &[0; 9], &[255; 64], &typed(0, "not json"), &typed(0, "[]"), &typed(200, "{}")]
    {
        assert!(ask(&address, garbage).is_empty());
    }
    let began = Instant::now();
    assert!(b.control.probe(&address, soon()).is_ok());
    b.control.open_segment(&address, None, soon()).unwrap();
    b.wait_usable(&address, 4);
    assert!(began.elapsed() < Duration::from_secs(5), "{:?}", began.elapsed());
    drop(silent);
    a.stop();
    b.stop();
}

#[test]
fn hellos_of_strangers_are_refused_in_the_stock_engines_words() {
    let world = world();
    let a = node(&world, 1, Options::new("P2PHANDSHAKE")).unwrap();
    let name = a.control.name().to_owned();
    let own = format!("{name}@sim0");
    let refusal = |body: String| {
        let reply = ask(&name, &typed(0, &body));
        let hello = moonrail_control::wire::Hello::parse(&reply[9..]).unwrap();
        hello.reply_msg
    };
    let hello = |peer: &str, local: &str, more: &str| {
        format!("{{\"peer_nic_path\":\"{peer}\",\"local_nic_path\":\"{local}\"{more}}}")
    };
    world.nic("stranger", "nic", rig::gid(9, 0));
    let gid = ",\"local_gid\":\"0:0:0:0:0:0:0:0:0:0:FF:FF:A:0:0:9\"";
    assert_eq!(refusal(hello("__ctrl__", "x@y", "")), "Invalid peer_nic_path in handshake: __ctrl__");
    assert_eq!(refusal(hello("x@nope", "x@y", "")), "Local RDMA context not found for handshake NIC: nope");
    assert_eq!(refusal(hello(&own, "", "")), "Local RDMA endpoint unavailable for sim0 <- ");
    assert_eq!(refusal(hello(&own, "xy", "")), "Parse peer nic path failed: xy");
    assert_eq!(
        refusal(hello("other@sim0", "x@y", "")),
        format!("Invalid argument: peer nic path inconsistency, expect {own} + x@y, while got other@sim0 + x@y")
    );
    assert_eq!(
        refusal(hello(&own, "x@y", ",\"qp_num\":[1,2],\"ready_ack\":true")),
        "Received RDMA ready ACK for unconnected endpoint"
    );
    assert_eq!(refusal(hello(&own, "x@y", ",\"qp_num\":[1,2]")), "Peer nic not found in that server: x@y");
    assert_eq!(refusal(hello(&own, "x@y", ",\"local_gid\":\"zz\",\"qp_num\":[1,2]")), "Invalid peer GID: zz");
    let counts = "QP count mismatch in peer and local endpoints, check MC_MAX_EP_PER_CTX";
    assert_eq!(refusal(hello(&own, "x@y", gid)), counts);
    // Three queue pairs are adopted, and the same request gets the same answer, but for its count.
    let body = hello(&own, "x@y", &format!("{gid},\"qp_num\":[100,101,102],\"ready_ack\":false"));
    let first = ask(&name, &typed(0, &body));
    let reply = moonrail_control::wire::Hello::parse(&first[9..]).unwrap();
    assert_eq!((reply.reply_msg.as_str(), reply.qp_num.len(), reply.ready_ack), ("", 3, Some(false)));
    let mut again = moonrail_control::wire::Hello::parse(&ask(&name, &typed(0, &body))[9..]).unwrap();
    assert!(again.extra.serial > reply.extra.serial);
    again.extra.serial = reply.extra.serial;
    assert_eq!(again, reply);
    // The old framing is answered in the old framing.
    let mut old = (body.len() as u64).to_le_bytes().to_vec();
    old.extend_from_slice(body.as_bytes());
    assert_eq!(ask(&name, &old)[8], b'{');
    assert_eq!(ask(&name, &typed(3, "{}"))[9..], *b"{\"status\":\"success\"}\n");
    let own = SegmentDescriptor::decode(&ask(&name, &typed(1, "{}"))[9..]).unwrap();
    assert_eq!(own.devices.len(), 2);
    a.stop();
}

#[test]
fn a_link_that_comes_back_is_used_again() {
    let (world, a, b) = pair("P2PHANDSHAKE");
    let name = b.control.name().to_owned();
    a.control.open_segment(&name, None, soon()).unwrap();
    a.wait_usable(&name, 4);
    world.set_link(a.nics[1], false);
    // One of the port, however many rails it has.
    assert!(wait(|| a.control.incidents().len() == 1), "{:#?}", a.control.incidents());
    world.set_link(a.nics[1], true);
    assert!(wait(|| a.logged("RDMA device: sim1, LID: 0, GID: (GID_Index 1) 00:00") >= 1));
    a.wait_usable(&name, 4);
    assert!(wait(|| a.control.incidents().iter().all(|i| i.closed.is_some())), "{:#?}", a.control.incidents());
    assert!(wait(|| a.control.rails().iter().all(|rail| rail.unfenced == 0)), "{:#?}", a.control.rails());
    assert_eq!(a.logged("incident 1 opened"), 1);
    assert_eq!(a.logged("incident 1 closed"), 1);
    assert_eq!(a.control.incidents().len(), 1, "{:#?}", a.control.incidents());
    a.stop();
    b.stop();
    assert_eq!(world.ledger().queue_pairs, 0);
}

#[test]
fn a_peer_that_restarts_on_its_port_is_connected_again() {
    let world = world();
    let a = node(&world, 1, Options::new("P2PHANDSHAKE")).unwrap();
    let b = node(&world, 2, Options::new("P2PHANDSHAKE").port(17101)).unwrap();
    a.control.open_segment("127.0.0.1:17101", None, soon()).unwrap();
    a.wait_usable("127.0.0.1:17101", 4);
    b.stop();
    let b = node(&world, 2, Options::new("P2PHANDSHAKE").port(17101)).unwrap();
    let _ = a.control.refresh_segment("127.0.0.1:17101", None, soon()).unwrap();
    a.wait_usable("127.0.0.1:17101", 4);
    a.stop();
    b.stop();
}

#[test]
fn what_cannot_start_says_why() {
    let world = world();
    let a = node(&world, 1, Options::new("P2PHANDSHAKE").port(17102)).unwrap();
    let error = node(&world, 2, Options::new("P2PHANDSHAKE").port(17102)).err().unwrap();
    assert!(matches!(error, StartError::Bind(_)) && error.to_string().contains("17102"), "{error}");
    let mut foreign = Options::new("P2PHANDSHAKE");
    foreign.handshake.publish = Some("192.0.2.7".into());
    let error = node(&world, 2, foreign).err().unwrap();
    assert!(error.to_string().contains("not an address of this host"), "{error}");
    let error = node(&world, 2, Options::new("P2PHANDSHAKE").named("a@b")).err().unwrap();
    assert!(matches!(error, StartError::Name(_)), "{error}");
    let error = node(&world, 2, Options::new("etcd://127.0.0.1:1").named("n")).err().unwrap();
    assert!(matches!(error, StartError::Metadata(_)) && error.to_string().contains("unreachable"), "{error}");
    let control = a.control.clone();
    a.stop();
    // Nothing panics or waits when the thread is gone.
    assert!(control.rails().is_empty() && control.shutdown(soon()));
    assert!(control.open_segment("127.0.0.1:17102", None, soon()).is_err());
}

#[test]
fn dropping_the_last_handle_ends_the_cores_too() {
    let (world, a, b) = pair("P2PHANDSHAKE");
    a.control.open_segment(b.control.name(), None, soon()).unwrap();
    a.wait_usable(b.control.name(), 4);
    a.drop_handle();
    b.drop_handle();
    assert!(wait(|| world.ledger().queue_pairs == 0));
}
