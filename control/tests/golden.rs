//! Golden cases: bytes that really passed between a stock engine and this one, or lay in a store, replayed through our
//! decoders and encoders. `cargo xtask test interop` and `lab` take them anew from the real engine and compare the form;
//! docs/interop.md tells where each is from.

use std::collections::BTreeMap;
use std::path::Path;

use moonrail_control::metadata::{Protocol, RpcMeta, SegmentDescriptor};
use moonrail_control::wire::notify::{NULL_REPLY, PROBE, PROBE_REPLY};
use moonrail_control::wire::{Frame, FrameDecoder, Framing, Hello, MessageType, Notify, NotifyReply};
use moonrail_datapath::nic::tcp::wire::{Ask, HEADER, STATUS, parse_status, status};
use serde_json::Value;

/// `>` from whoever connected, `<` the reply, `=` a key and its value.
type Part = (char, Vec<u8>);

fn cases() -> BTreeMap<String, Vec<Part>> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
    let files = std::fs::read_dir(folder).expect("the cases").map(|entry| entry.expect("a file").path());
    files
        .map(|path| {
            let text = std::fs::read_to_string(&path).expect("a case");
            let lines = text.lines().filter(|line| !line.starts_with('#'));
            let name = path.file_stem().expect("a name").to_string_lossy().into_owned();
            (name, lines.map(|line| (line.chars().next().expect("a mark"), unescape(&line[2..]))).collect())
        })
        .collect()
}

fn case(name: &str) -> Vec<Part> {
    cases().remove(name).unwrap_or_else(|| panic!("no {name}"))
}

/// The reverse of `escape_ascii`.
fn unescape(text: &str) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        bytes.push(match byte {
            b'\\' => match rest.next().expect("something escaped") {
                b'n' => b'\n',
                b'r' => b'\r',
                b't' => b'\t',
                b'x' => {
                    let digits = [rest.next().expect("a digit"), rest.next().expect("a digit")];
                    u8::from_str_radix(std::str::from_utf8(&digits).expect("digits"), 16).expect("hex")
                }
                other => other,
            },
            plain => plain,
        });
    }
    bytes
}

fn frame(bytes: &[u8]) -> Frame {
    let frame = FrameDecoder::default().push(bytes).expect("a frame").expect("a whole one");
    assert_eq!(frame.framing, Framing::Typed);
    assert_eq!(frame.encode(), bytes, "the frame is written as it was read");
    frame
}

fn json(bytes: &[u8]) -> Value {
    serde_json::from_slice(bytes).unwrap_or_else(|e| panic!("{e}: {}", bytes.escape_ascii()))
}

/// What only moonrail nodes say.
fn without_ours(mut value: Value) -> Value {
    if let Value::Object(map) = &mut value {
        map.remove("moonrail");
        for buffer in map.get_mut("buffers").and_then(Value::as_array_mut).into_iter().flatten() {
            buffer.as_object_mut().expect("a buffer").remove("location");
        }
    }
    value
}

/// Members and the types of their values, in the order in which they stand.
fn form(value: &Value) -> Value {
    match value {
        Value::Object(map) => Value::Object(map.iter().map(|(key, value)| (key.clone(), form(value))).collect()),
        Value::Array(items) => Value::Array(items.first().map(form).into_iter().collect()),
        Value::String(_) => "string".into(),
        Value::Number(_) => "number".into(),
        Value::Bool(_) => "bool".into(),
        Value::Null => Value::Null,
    }
}

fn descriptor(text: &[u8]) -> SegmentDescriptor {
    let read = SegmentDescriptor::decode(text).unwrap_or_else(|e| panic!("{e}: {}", text.escape_ascii()));
    assert_eq!(json(&read.encode()), json(text), "the descriptor is written as it was read");
    assert!(text.ends_with(b"\n"));
    read
}

#[test]
fn every_frame_is_read_and_written_as_it_passed() {
    let mut seen = BTreeMap::<u8, usize>::new();
    for (name, parts) in cases() {
        if name.starts_with("data-") || name.starts_with("stored-") {
            continue;
        }
        println!("{name}");
        for (mark, bytes) in parts {
            let frame = frame(&bytes);
            *seen.entry(bytes[8]).or_default() += 1;
            let written = match frame.kind {
                MessageType::Connection => {
                    let hello = Hello::parse(&frame.body).unwrap_or_else(|e| panic!("{name}: {e}"));
                    if hello.is_control_channel() {
                        continue;
                    }
                    hello.encode()
                }
                MessageType::Metadata => {
                    let read = descriptor(&frame.body);
                    assert_eq!(read.protocol, Protocol::Tcp);
                    read.encode()
                }
                MessageType::Notify if mark == '>' => Notify::parse(&frame.body).expect("a notification").encode(),
                MessageType::Notify => {
                    assert_eq!(NotifyReply::parse(&frame.body), Ok(NotifyReply::Accepted));
                    NotifyReply::Accepted.encode()
                }
                MessageType::Probe => if mark == '>' { PROBE } else { PROBE_REPLY }.to_vec(),
            };
            assert_eq!(written.escape_ascii().to_string(), frame.body.escape_ascii().to_string(), "{name} {mark}");
            assert_ne!(written, NULL_REPLY);
        }
    }
    assert_eq!(seen.keys().copied().collect::<Vec<_>>(), [0, 1, 2, 3], "a case of each type");
}

#[test]
fn what_we_send_is_what_a_stock_engine_sends() {
    let sides = [("connect", 4), ("metadata", 2), ("notify", 2), ("probe", 2)];
    for (what, count) in sides {
        let (theirs, ours) = (case(&format!("{what}-stock-to-ours")), case(&format!("{what}-ours-to-stock")));
        assert_eq!((theirs.len(), ours.len()), (count, count));
        // In the one, a stock engine asks and we reply; in the other it is the reverse.
        for (number, ((_, a), (_, b))) in theirs.iter().zip(&ours).enumerate() {
            let of = |bytes: &[u8]| form(&without_ours(json(&frame(bytes).body)));
            assert_eq!(of(a), of(b), "{what}, message {number}");
        }
    }
    for protocol in ["tcp", "rdma"] {
        let (theirs, ours) = (case(&format!("stored-{protocol}-stock")), case(&format!("stored-{protocol}-ours")));
        for ((_, a), (_, b)) in theirs.iter().zip(&ours) {
            assert_eq!(form(&without_ours(value(a).1)), form(&without_ours(value(b).1)), "{protocol}");
        }
    }
}

fn value(part: &[u8]) -> (String, Value) {
    let at = part.iter().position(|b| *b == b' ').expect("a key and a value");
    (String::from_utf8_lossy(&part[..at]).into_owned(), json(&part[at + 1..]))
}

#[test]
fn what_is_stored_is_read_and_written_as_it_was_there() {
    for (name, parts) in cases().into_iter().filter(|(name, _)| name.starts_with("stored-")) {
        assert_eq!(parts.len(), 2, "{name}");
        for (_, part) in parts {
            let (key, _) = value(&part);
            let text = &part[key.len() + 1..];
            if key.starts_with("mooncake/rpc_meta/") {
                assert_eq!(RpcMeta::decode(text).expect("an address").encode(), text, "{name}");
                continue;
            }
            let read = descriptor(text);
            assert_eq!(key, format!("mooncake/ram/{}", read.name));
            assert_eq!(read.extra.incarnation.is_some(), name.ends_with("ours"), "{name}");
            assert_eq!(read.buffers.len(), 1, "{name}");
            if read.protocol == Protocol::Rdma {
                let counts = (read.devices.len(), read.buffers[0].rkeys.len(), read.buffers[0].lkeys.len());
                assert_eq!(counts, (2, 2, 2), "{name}");
            }
        }
    }
}

/// One connection: a WRITE of sixteen bytes, then a READ of them.
#[test]
fn data_is_read_and_written_as_it_passed() {
    const BYTES: &[u8; 16] = b"sixteen of these";
    for (version, who) in [(1, "stock-to-ours"), (1, "ours-to-stock"), (2, "stock-to-ours"), (2, "ours-to-stock")] {
        let name = format!("data-v{version}-{who}");
        let parts = case(&name);
        let all = |mark| -> Vec<u8> { parts.iter().filter(|(m, _)| *m == mark).flat_map(|(_, b)| b.clone()).collect() };
        let (request, mut reply) = (all('>'), &all('<')[..]);
        let mut asked = &request[..];
        let (mut writes, mut reads) = (0, 0);
        while !asked.is_empty() {
            let (header, rest) = asked.split_first_chunk::<HEADER>().expect("a header");
            let ask = Ask::parse(header).expect("a known form");
            assert_eq!(ask.encode(), *header, "{name}");
            let Ask::One { write, status: with_status, len, .. } = ask else { panic!("{name}: a list") };
            assert_eq!(with_status, version == 2, "{name}");
            if with_status {
                let (first, behind) = reply.split_at(STATUS);
                assert_eq!((parse_status(first), first), (Some(0), &status(0)[..]), "{name}");
                reply = behind;
            }
            asked = rest;
            let payload = if write { &mut asked } else { &mut reply };
            let (bytes, behind) = payload.split_at(len as usize);
            assert!(BYTES.ends_with(bytes), "{name}: {}", bytes.escape_ascii());
            *payload = behind;
            if write { writes += 1 } else { reads += 1 }
        }
        assert!(reply.is_empty(), "{name}");
        // Of version 1 we know that a WRITE is done by a READ of its last byte.
        let expected = if (version, who) == (1, "ours-to-stock") { (1, 2) } else { (1, 1) };
        assert_eq!((writes, reads), expected, "{name}");
    }
}
