use std::collections::BTreeMap;

use moonrail_datapath::units::{Gid, Mtu};
use proptest::prelude::*;

use super::super::matrix::NicPreference;
use super::*;
use crate::wire::extra::{Incarnation, TcpPlace, Token};

/// Seen in a store, written by a stock engine over Soft-RoCE.
const RDMA: &str = concat!(
    r#"{"buffers":[{"addr":140570018185216,"length":33554432,"lkey":[544],"name":"cpu:0","rkey":[544]}],"#,
    r#""devices":[{"gid":"00:00:00:00:00:00:00:00:00:00:ff:ff:0a:00:00:01","lid":0,"name":"rxe0"}],"#,
    r#""name":"10.0.0.1:16161","priority_matrix":{"cpu:0":[["rxe0"],[]],"cpu:1":[["rxe0"],[]]},"#,
    r#""protocol":"rdma","tcp_data_port":0,"tcp_proto_version":1,"timestamp":"2026-11-22 07:48:13.289107"}"#,
    "\n"
);

/// Seen on the handshake socket, written by a stock engine over TCP.
const TCP: &str = concat!(
    r#"{"buffers":[{"addr":139972543774720,"length":104857600,"name":"127.0.0.1:16764"}],"name":"127.0.0.1:16764","#,
    r#""protocol":"tcp","rdma_server_name":"","tcp_data_host":"127.0.0.1","tcp_data_port":16106,"#,
    r#""tcp_proto_version":2,"timestamp":"2026-11-22 07:42:45.130031"}"#,
    "\n"
);

fn decode(text: &str) -> Result<SegmentDescriptor, DescriptorError> {
    SegmentDescriptor::decode(text.as_bytes())
}

#[test]
fn captured_descriptors_are_read_and_written_byte_for_byte() {
    for text in [RDMA, TCP] {
        assert_eq!(String::from_utf8(decode(text).unwrap().encode()).unwrap(), text);
    }
    assert_eq!(TCP.len() + 1, 0x105, "the length field that was seen in front of it");
    let segment = decode(RDMA).unwrap();
    assert_eq!(segment.buffers[0].rkeys, [Rkey(544)]);
    assert!(segment.buffers[0].covers(140_570_018_185_216, 33_554_432));
    assert!(!segment.buffers[0].covers(140_570_018_185_216, 33_554_433));
    assert!(!segment.buffers[0].covers(u64::MAX, 2));
    assert_eq!((segment.server_name(), segment.device_index("rxe0")), ("10.0.0.1:16161", Some(0)));
}

#[test]
fn missing_members_have_the_stock_defaults() {
    let minimal = decode(r#"{"name":"n","protocol":"rdma","devices":[],"buffers":[]}"#).unwrap();
    assert_eq!((minimal.tcp_data_port, minimal.tcp_proto_version), (0, 1));
    assert_eq!(decode(r#"{"protocol":"tcp","name":"n"}"#).unwrap().buffers, []);
    let named = decode(r#"{"name":"n","protocol":"rdma","rdma_server_name":"r:1"}"#).unwrap();
    assert_eq!(named.server_name(), "r:1");
    assert!(String::from_utf8(named.encode()).unwrap().contains(r#""rdma_server_name":"r:1""#));
}

#[test]
fn garbage_in_the_tcp_port_of_an_rdma_descriptor_is_survived() {
    for port in ["-1", "2147483647", "null"] {
        assert!(decode(&RDMA.replace("\"tcp_data_port\":0", &format!("\"tcp_data_port\":{port}"))).is_ok());
    }
}

#[test]
fn addresses_are_exact_to_the_last_bit() {
    let high = decode(&TCP.replace("139972543774720", "18446744073709551614").replace("104857600", "1")).unwrap();
    assert_eq!(high.buffers[0].addr, u64::MAX - 1);
    assert_eq!(decode(&String::from_utf8(high.encode()).unwrap()), Ok(high));
}

#[test]
fn a_matrix_that_is_none_leaves_the_rest_usable() {
    let odd = RDMA.replace(r#"{"cpu:0":[["rxe0"],[]],"cpu:1":[["rxe0"],[]]}"#, r#"{"cpu:0":["rxe0"]}"#);
    let segment = decode(&odd).unwrap();
    assert_eq!((segment.priority_matrix.0.len(), segment.devices.len()), (0, 1));
}

#[test]
fn other_protocols_are_named_and_left_alone() {
    for (word, expected) in [("\"nvmeof\"", "nvmeof"), ("[\"cxl\",\"tcp\"]", "cxl,tcp")] {
        let segment = decode(&format!(r#"{{"name":"n","protocol":{word},"buffers":[{{"file_path":"f"}}]}}"#)).unwrap();
        assert_eq!(segment.protocol, Protocol::Other(expected.into()));
        assert!(segment.buffers.is_empty());
    }
}

#[test]
fn what_the_stock_reader_refuses_is_refused_with_a_reason() {
    let refused = |text: &str| match decode(text) {
        Err(error) => error.to_string(),
        Ok(segment) => panic!("{text} gave {segment:?}"),
    };
    for (from, to, word) in [
        (r#""lkey":[544]"#, r#""lkey":[]"#, "0 lkeys and 1 rkeys for 1 devices"),
        (r#""rkey":[544]"#, r#""rkey":[1,2]"#, "2 rkeys"),
        (r#""gid":"00"#, r#""gid":"","was":"00"#, "device 0"),
        (r#""name":"rxe0""#, r#""name":"""#, "device 0"),
        (r#""addr":140570018185216"#, r#""addr":0"#, "buffer 0"),
        (r#""length":33554432"#, r#""length":0"#, "buffer 0"),
        (r#""length":33554432"#, r#""length":18446744073709551615"#, "beyond the address space"),
        (r#""name":"cpu:0""#, r#""name":"""#, "buffer 0"),
        (r#""addr":140570018185216"#, r#""addr":"1""#, "buffers.addr"),
        (r#""protocol":"rdma""#, r#""protocol":{}"#, "protocol"),
        (r#""tcp_data_port":0"#, r#""tcp_data_port":"0""#, "tcp_data_port"),
    ] {
        let text = RDMA.replace(from, to);
        assert_ne!(text, RDMA, "{from}");
        let message = refused(&text);
        assert!(message.contains(word), "{to}: {message}");
    }
    assert_eq!(decode(" null\n"), Err(DescriptorError::Null));
    for text in ["", "[]", "7", "{"] {
        refused(text);
    }
    let many = format!(r#"{{"protocol":"rdma","devices":[{}{{}}]}}"#, "{},".repeat(MAX_DEVICES));
    assert_eq!(decode(&many), Err(DescriptorError::TooLarge { what: "devices", limit: MAX_DEVICES }));
    // A buffer that nobody may touch from outside has no keys at all.
    assert!(decode(&RDMA.replace(r#""rkey":[544]"#, r#""rkey":[]"#)).is_ok());
}

fn nics(names: &[&str]) -> Vec<String> {
    names.iter().map(|n| (*n).to_owned()).collect()
}

fn two_nics() -> SegmentDescriptor {
    let device = |name: &str, last: u8| DeviceEntry {
        name: name.into(),
        gid: Gid([0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 10, 0, 0, last]).into(),
        lid: Lid(0),
    };
    let preference = |a, b| NicPreference { preferred: nics(&[a]), available: nics(&[b]) };
    SegmentDescriptor {
        name: "n".into(),
        devices: vec![device("a", 1), device("b", 2)],
        buffers: vec![BufferEntry {
            name: "cpu:0".into(),
            addr: 4096,
            length: 8192,
            lkeys: vec![Lkey(1), Lkey(2)],
            rkeys: vec![Rkey(11), Rkey(12)],
        }],
        priority_matrix: PriorityMatrix(BTreeMap::from([
            ("cpu:0".to_owned(), preference("a", "b")),
            ("cpu:1".to_owned(), preference("b", "a")),
        ])),
        tcp_proto_version: 1,
        ..SegmentDescriptor::default()
    }
}

/// A stock reader walks `cpu:1` before `cpu:0`, meets `b` first, and takes it for `devices[0]`.
#[test]
fn arrays_are_published_in_the_order_a_stock_reader_numbers_nics() {
    let mut segment = two_nics();
    segment.priority_matrix.0.get_mut("cpu:1").unwrap().available.push("gone".into());
    segment.arrange().unwrap();
    assert_eq!(segment.devices.iter().map(|d| d.name.as_str()).collect::<Vec<_>>(), ["b", "a"]);
    assert_eq!(segment.buffers[0].lkeys, [Lkey(2), Lkey(1)]);
    assert_eq!(segment.buffers[0].rkeys, [Rkey(12), Rkey(11)]);
    assert_eq!(segment.priority_matrix, two_nics().priority_matrix, "a name that is no device is not published");
    let before = segment.clone();
    segment.arrange().unwrap();
    assert_eq!(segment, before);
}

#[test]
fn what_only_moonrail_says_survives_and_time_is_no_content() {
    let mut segment = two_nics();
    segment.extra = NodeExtra {
        boot_id: Some("b".into()),
        incarnation: Some(Incarnation(7)),
        path_mtus: BTreeMap::from([("a".to_owned(), Mtu::B1024)]),
        shm: Some(Token(0xabc)),
        tcp: Some(TcpPlace { host: "10.0.0.1".into(), port: 15_001 }),
        ..NodeExtra::default()
    };
    let text = String::from_utf8(segment.encode()).unwrap();
    let member = concat!(
        r#","moonrail":{"boot_id":"b","incarnation":"0000000000000007","path_mtus":{"a":1024},"shm":"0000000000000abc","#,
        r#""tcp":{"host":"10.0.0.1","port":15001}},"name":"n""#
    );
    assert!(text.contains(member), "{text}");
    assert_eq!(decode(&text).unwrap(), segment);
    assert!(decode(&text.replace("1024", "9000")).unwrap().extra.path_mtus.is_empty(), "a later version's size");
    assert_eq!(decode(&text.replace("15001", "0")).unwrap().extra.tcp, None, "nobody can dial that");
    assert!(decode(&text.replace("0000000000000abc", "xyz")).is_err());
    let later = SegmentDescriptor { timestamp: "2027-01-01 00:00:00.000000".into(), ..segment.clone() };
    assert!(later.same_content(&segment) && later != segment);
}

prop_compose! {
    fn any_segment()(
        rdma: bool, name: String, devices in prop::collection::vec(("[a-z]{1,4}", any::<[u8; 16]>(), any::<u16>()), 0..4),
        ranges in prop::collection::vec(("\\PC{1,5}", 1u64.., any::<u64>(), any::<bool>()), 0..4),
        port: i32, version: i32, server: String, timestamp: String, incarnation: Option<u64>,
    ) -> SegmentDescriptor {
        let devices: Vec<DeviceEntry> = devices.into_iter().filter(|_| rdma)
            .map(|(name, gid, lid)| DeviceEntry { name, gid: Gid(gid).into(), lid: Lid(lid) }).collect();
        let preferred = devices.iter().map(|d| d.name.clone()).collect();
        let buffers = ranges.into_iter().filter(|(_, addr, ..)| *addr < u64::MAX).map(|(name, addr, length, shared)| {
            let count = if rdma { devices.len() as u32 } else { 0 };
            BufferEntry {
                name, addr, length: 1 + length % (u64::MAX - addr), lkeys: (0..count).map(Lkey).collect(),
                rkeys: (0..count).filter(|_| shared).map(Rkey).collect(),
            }
        });
        SegmentDescriptor {
            buffers: buffers.collect(),
            name, protocol: if rdma { Protocol::Rdma } else { Protocol::Tcp },
            priority_matrix: PriorityMatrix(rdma.then(|| ("cpu:0".to_owned(), NicPreference { preferred, available: vec![] })).into_iter().collect()),
            rdma_server_name: server, tcp_data_port: port, tcp_proto_version: version, timestamp, devices,
            extra: NodeExtra { incarnation: incarnation.map(Incarnation), ..NodeExtra::default() },
            ..SegmentDescriptor::default()
        }
    }
}

proptest! {
    #[test]
    fn any_segment_survives_its_text(segment in any_segment()) {
        prop_assert_eq!(SegmentDescriptor::decode(&segment.encode()), Ok(segment));
    }

    #[test]
    fn arranging_keeps_every_device_with_its_keys(segment in any_segment()) {
        let mut arranged = segment.clone();
        prop_assert!(arranged.arrange().is_ok());
        prop_assert!(arranged.check().is_ok());
        let pairs = |s: &SegmentDescriptor| {
            let keys = |at: usize| s.buffers.iter().map(|b| (b.lkeys.get(at).copied(), b.rkeys.get(at).copied())).collect::<Vec<_>>();
            let mut pairs: Vec<_> = s.devices.iter().enumerate().map(|(at, d)| (d.name.clone(), d.gid.to_string(), keys(at))).collect();
            pairs.sort();
            pairs
        };
        prop_assert_eq!(pairs(&arranged), pairs(&segment));
    }

    #[test]
    fn no_mutation_panics(
        tcp: bool, cuts in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8), end: prop::sample::Index,
    ) {
        let mut text = if tcp { TCP } else { RDMA }.as_bytes().to_vec();
        for (at, byte) in cuts { let at = at.index(text.len()); text[at] = byte; }
        let _ = SegmentDescriptor::decode(&text);
        let _ = SegmentDescriptor::decode(&text[..end.index(text.len())]);
    }
}
