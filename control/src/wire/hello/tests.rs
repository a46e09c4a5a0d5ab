use moonrail_datapath::units::{Mtu, SqPsn};
use proptest::prelude::*;

use super::super::extra::{Incarnation, NodeExtra};
use super::super::frame::{Frame, FrameDecoder, Framing, MessageType};
use super::super::rejection;
use super::*;

/// A request as it left a stock engine, frame and all.
const CAPTURED: &str = "db00000000000000 00
    7b226c6f63616c5f676964223a2230303a30303a30303a30303a30303a30303a30303a30303a30303a30303a66663a66663a30613a30303a30303a3031222c
    226c6f63616c5f6c6964223a302c226c6f63616c5f6e69635f70617468223a2231302e302e302e313a31323334364072786530222c227061796c6f6164223a22
    222c22706565725f6e69635f70617468223a2231302e302e302e313a31323334354072786530222c2271705f6e756d223a5b31372c31385d2c227265616479
    5f61636b223a66616c73652c227265706c795f6d7367223a22227d0a";

/// The empty reply to a ready acknowledgement.
const CAPTURED_EMPTY: &str = "6f00000000000000 00
    7b226c6f63616c5f676964223a22222c226c6f63616c5f6c6964223a302c226c6f63616c5f6e69635f70617468223a22222c227061796c6f6164223a22222c22
    706565725f6e69635f70617468223a22222c2271705f6e756d223a5b5d2c227265706c795f6d7367223a22227d0a";

fn bytes(hex: &str) -> Vec<u8> {
    let digits: Vec<u8> = hex.bytes().filter(u8::is_ascii_hexdigit).collect();
    digits.chunks(2).map(|two| u8::from_str_radix(std::str::from_utf8(two).unwrap(), 16).unwrap()).collect()
}

fn frame(hex: &str) -> Frame {
    FrameDecoder::default().push(&bytes(hex)).unwrap().unwrap()
}

fn qpns(numbers: &[u32]) -> Vec<Qpn> {
    numbers.iter().map(|n| Qpn::new(*n).unwrap()).collect()
}

fn stock_request() -> Hello {
    Hello {
        local_nic_path: "10.0.0.1:12346@rxe0".into(),
        peer_nic_path: "10.0.0.1:12345@rxe0".into(),
        local_gid: GidText::read("00:00:00:00:00:00:00:00:00:00:ff:ff:0a:00:00:01".into()),
        qp_num: qpns(&[17, 18]),
        ready_ack: Some(false),
        ..Hello::default()
    }
}

#[test]
fn the_captured_request_is_read_and_written_byte_for_byte() {
    let frame = frame(CAPTURED);
    assert_eq!((frame.kind, frame.framing), (MessageType::Connection, Framing::Typed));
    let hello = Hello::parse(&frame.body).unwrap();
    assert_eq!(hello, stock_request());
    assert!(hello.speaks_ready_ack() && !hello.is_ready_ack() && hello.refusal().is_none());
    assert_eq!(hello.peer_path().unwrap(), NicPath::new("10.0.0.1:12345", "rxe0"));
    assert_eq!(Frame::typed(MessageType::Connection, hello.encode()).encode(), bytes(CAPTURED));
}

#[test]
fn the_captured_empty_reply_is_the_default() {
    assert_eq!(Hello::parse(&frame(CAPTURED_EMPTY).body).unwrap(), Hello::default());
    assert_eq!(Frame::typed(MessageType::Connection, Hello::default().encode()).encode(), bytes(CAPTURED_EMPTY));
}

#[test]
fn the_captured_acknowledgement() {
    let ack = Hello { ready_ack: Some(true), ..stock_request() };
    let encoded = Frame::typed(MessageType::Connection, ack.encode()).encode();
    assert_eq!((encoded.len(), encoded[0]), (226, 0xda));
    assert!(Hello::parse(&ack.encode()).unwrap().is_ready_ack());
}

#[test]
fn a_captured_refusal_has_numbers_that_mean_nothing() {
    let body = br#"{"local_gid":"00:00:00:00:00:00:00:00:00:00:ff:ff:0a:00:00:01","local_lid":0,"local_nic_path":"10.0.0.1:16161@rxe0","payload":"","peer_nic_path":"h1@rxe0","qp_num":[17,18],"ready_ack":false,"reply_msg":"QP count mismatch in peer and local endpoints, check MC_MAX_EP_PER_CTX"}"#;
    let hello = Hello::parse(body).unwrap();
    assert_eq!(hello.refusal(), Some(rejection::QP_COUNT));
    assert_eq!(hello.encode(), [&body[..], b"\n"].concat());
}

#[test]
fn a_control_channel_is_known_by_its_path() {
    let body = br#"{"ctrl_channel":true,"local_gid":"","local_lid":0,"local_nic_path":"10.0.0.1:12346@rxe0","notify_qp_num":21,"notify_rq_depth":64,"payload":"","peer_nic_path":"__ctrl__","qp_num":[],"reply_msg":""}"#;
    let hello = Hello::parse(body).unwrap();
    assert!(hello.is_control_channel());
    let refusal = Hello::refuse(rejection::invalid_peer_path(&hello.peer_nic_path));
    assert_eq!(refusal.refusal(), Some("Invalid peer_nic_path in handshake: __ctrl__"));
}

#[test]
fn what_a_stock_engine_tolerates_is_tolerated() {
    let parse = |text: &str| Hello::parse(text.as_bytes()).unwrap();
    assert_eq!(parse("{}"), Hello::default());
    assert_eq!(
        parse(r#"{"local_nic_path":5,"peer_nic_path":null,"local_gid":7,"qp_num":{"a":1}}"#).local_nic_path,
        "5"
    );
    assert_eq!(parse(r#"{"local_lid":"x"}"#).local_lid, Lid(0));
    assert_eq!(parse(r#"{"local_lid":-1}"#).local_lid, Lid(0));
    assert_eq!(parse(r#"{"local_lid":65537}"#).local_lid, Lid(1));
    assert_eq!(parse(r#"{"unknown":[{"x":1}], "ready_ack" : null}"#).ready_ack, Some(false));
    assert_eq!(parse(r#"{"local_gid":"fe80::1"}"#).local_gid, GidText::Malformed("fe80::1".into()));
    assert_eq!(parse(r#"{"moonrail":[1,2]}"#).extra, HelloExtra::default());
}

#[test]
fn what_ends_a_stock_engine_is_an_error_here() {
    for text in [
        "[]",
        "null",
        "",
        "7",
        "{",
        r#"{"qp_num":["17"]}"#,
        r#"{"qp_num":[-1]}"#,
        r#"{"qp_num":[4294967296]}"#,
        r#"{"qp_num":[16777216]}"#,
        r#"{"qp_num":[1.5]}"#,
        r#"{"payload":[]}"#,
        r#"{"local_nic_path":{}}"#,
        r#"{"reply_msg":["x"]}"#,
        r#"{"ready_ack":"yes"}"#,
        r#"{"qp_num":[1,2],"moonrail":{"sq_psn":[1]}}"#,
        r#"{"moonrail":{"sq_psn":[16777216]}}"#,
        r#"{"moonrail":{"incarnation":"not hex"}}"#,
    ] {
        assert!(Hello::parse(text.as_bytes()).is_err(), "{text}");
    }
    let endless = format!("{{\"qp_num\":[{}1]}}", "1,".repeat(MAX_QPS));
    assert_eq!(Hello::parse(endless.as_bytes()), Err(HelloError::TooManyQps));
    let deep = "[".repeat(100_000);
    assert!(Hello::parse(format!("{{\"x\":{deep}").as_bytes()).is_err());
}

#[test]
fn a_path_parts_at_its_first_at() {
    assert_eq!(NicPath::parse("a@b@c"), Ok(NicPath::new("a", "b@c")));
    assert_eq!(NicPath::parse("@b").map(|p| p.to_string()), Ok("@b".into()));
    assert!(matches!(NicPath::parse("ab"), Err(NicPathError::NoAt { .. })));
    assert!(matches!(NicPath::parse("ab@"), Err(NicPathError::NoDevice { .. })));
}

#[test]
fn what_only_moonrail_says_is_one_member_between_the_others() {
    let mut hello = stock_request();
    hello.extra = HelloExtra {
        node: NodeExtra {
            boot_id: Some("b".into()),
            capabilities: vec!["gather".into()],
            incarnation: Some(Incarnation(0xff)),
            ..NodeExtra::default()
        },
        path_mtu: Some(Mtu::B1024),
        serial: Some(7),
        sq_psn: vec![SqPsn::new(1).unwrap(), SqPsn::new(2).unwrap()],
        fence_qpns: qpns(&[3]),
        if_idle: true,
        fenced_qpns: qpns(&[4]),
        peer_qpns: qpns(&[5, 6]),
    };
    let text = String::from_utf8(hello.encode()).unwrap();
    let member = concat!(
        r#","moonrail":{"boot_id":"b","capabilities":["gather"],"fence_qpns":[3],"fenced_qpns":[4],"#,
        r#""if_idle":true,"incarnation":"00000000000000ff","path_mtu":1024,"peer_qpns":[5,6],"serial":7,"sq_psn":[1,2]},"payload":"#
    );
    assert!(text.contains(member), "{text}");
    assert_eq!(Hello::parse(text.as_bytes()), Ok(hello));
}

fn any_qpns() -> impl Strategy<Value = Vec<Qpn>> {
    prop::collection::vec((0u32..1 << 24).prop_map(|n| Qpn::new(n).unwrap()), 0..5)
}

prop_compose! {
    fn any_node()(
        boot_id: Option<String>, capabilities in prop::collection::vec(any::<String>(), 0..3), incarnation: Option<u64>,
    ) -> NodeExtra {
        NodeExtra { boot_id, capabilities, incarnation: incarnation.map(Incarnation), ..NodeExtra::default() }
    }
}

prop_compose! {
    fn any_hello()(
        (paths, texts) in any::<([String; 2], [String; 2])>(), gid: Option<[u8; 16]>, lid: u16, ready_ack: Option<bool>,
        qp_num in any_qpns(), psns: bool, node in any_node(), mtu in prop::option::of(prop::sample::select(&Mtu::ALL[..])),
        fence_qpns in any_qpns(), fenced_qpns in any_qpns(), serial: Option<u32>, if_idle: bool, peer_qpns in any_qpns(),
    ) -> Hello {
        let [local_nic_path, peer_nic_path] = paths;
        let [reply_msg, payload] = texts;
        let sq_psn = qp_num.iter().filter(|_| psns).map(|q| SqPsn::new(q.get() ^ 1).unwrap()).collect();
        Hello {
            local_nic_path, peer_nic_path, reply_msg, payload, ready_ack, qp_num,
            local_gid: gid.map_or(GidText::Absent, |g| Gid(g).into()),
            local_lid: Lid(lid),
            extra: HelloExtra {
                node, path_mtu: mtu, sq_psn, serial: serial.map(u64::from), fence_qpns, if_idle, fenced_qpns,
                peer_qpns,
            },
        }
    }
}

proptest! {
    #[test]
    fn any_hello_survives_its_bytes(hello in any_hello()) {
        prop_assert_eq!(Hello::parse(&hello.encode()), Ok(hello));
    }

    #[test]
    fn no_mutation_panics(
        hello in any_hello(), cuts in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6), end: prop::sample::Index,
    ) {
        let mut body = hello.encode();
        for (at, byte) in cuts { let at = at.index(body.len()); body[at] = byte; }
        let _ = Hello::parse(&body);
        let _ = Hello::parse(&body[..end.index(body.len())]);
    }

    #[test]
    fn members_of_any_type_panic_nothing(
        member in prop::sample::select(vec!["local_nic_path", "local_gid", "local_lid", "qp_num", "ready_ack", "reply_msg", "payload", "moonrail"]),
        value in prop::sample::select(vec!["null", "true", "-1", "1e999", "18446744073709551616", "\"x\"", "[]", "[[]]", "[null]", "{}", "{\"sq_psn\":{}}", "{\"path_mtu\":-1}", "{\"capabilities\":[1]}", "{\"if_idle\":3}"]),
    ) {
        let _ = Hello::parse(format!("{{\"{member}\":{value}}}").as_bytes());
    }
}
