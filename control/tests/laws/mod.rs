//! What holds of any bytes that a peer, a stranger or a store sends: no panic, memory in proportion to what came, and
//! what was read is read again from what is written of it. One function for each decoder.
//!
//! The fuzz targets (tools/fuzz) look for bytes that break a law; `tests/corpus.rs` tries the bytes they found so far.

#![allow(dead_code, unreachable_pub, reason = "each fuzz target uses one law")]

use std::collections::BTreeSet;

use moonrail_control::metadata::{
    Entry, KeySpace, MetadataUri, PriorityMatrix, Protocol, RpcMeta, SegmentDescriptor, StoreUri,
};
use moonrail_control::names::HostPort;
use moonrail_control::wire::json::without_comments;
use moonrail_control::wire::{Frame, FrameDecoder, FrameError, Hello, NicPath, Notify, NotifyReply};

/// Panics if the bytes break it.
pub type Law = fn(&[u8]);

/// The law of a decoder, by the name of its fuzz target and of its folder in the corpus.
pub const LAWS: &[(&str, Law)] = &[
    ("descriptor", descriptor),
    ("frame", frame),
    ("hello", hello),
    ("matrix", matrix),
    ("notify", notify),
    ("rpc_meta", rpc_meta),
    ("store", store),
];

/// Limit of the decoder under test: small, so that the fuzzer finds both sides of it.
const FRAME_MAX: usize = 4096;
/// Room a decoder may set aside before anything has come.
const FRAME_RESERVE: usize = 1024;

/// A stream in any pieces gives what it gives in one. The first byte decides how it is cut.
pub fn frame(data: &[u8]) {
    let Some((&cuts, stream)) = data.split_first() else { return };
    let (whole, ended) = decode([stream]);
    let (pieces, ended_too) = decode(Pieces { rest: stream, state: u32::from(cuts) });
    assert_eq!((&whole, &ended), (&pieces, &ended_too), "cut by {cuts}");
    assert_eq!(ended.is_ok(), matches!(whole, Ok(Some(_))));
    let Ok(Some(frame)) = whole else { return };
    assert!(frame.body.len() <= FRAME_MAX, "the limit holds");
    for frame in [&frame, &pieces.ok().flatten().expect("the same")] {
        assert!(
            frame.body.capacity() <= FRAME_RESERVE.max(2 * stream.len()),
            "room for what came, not for what was announced"
        );
    }
    assert!(stream.starts_with(&frame.encode()), "what was read is what came");
}

type Decoded = (Result<Option<Frame>, FrameError>, Result<(), FrameError>);

fn decode<'a>(pieces: impl IntoIterator<Item = &'a [u8]>) -> Decoded {
    let mut decoder = FrameDecoder::new(FRAME_MAX);
    let mut frame = None;
    for piece in pieces {
        match decoder.push(piece) {
            Ok(Some(new)) => assert!(frame.replace(new).is_none(), "a connection has one frame"),
            Ok(None) => {}
            Err(error) => return (Err(error), decoder.finish().map_err(|_| error)),
        }
    }
    (Ok(frame), decoder.finish())
}

/// Cuts by a linear congruence: the same byte cuts in the same places.
struct Pieces<'a> {
    rest: &'a [u8],
    state: u32,
}

impl<'a> Iterator for Pieces<'a> {
    type Item = &'a [u8];

    fn next(&mut self) -> Option<&'a [u8]> {
        self.state = self.state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        let (piece, rest) = self.rest.split_at(self.rest.len().min((self.state >> 28) as usize));
        self.rest = rest;
        (!piece.is_empty() || !rest.is_empty()).then_some(piece)
    }
}

/// Text of ours about `input` bytes of theirs: numbers may grow (`1e9`), nothing else, and not without end.
fn check_size(written: usize, input: usize) {
    assert!(written <= 1024 + 8 * input, "{written} bytes were made of {input}");
}

/// A hello.
pub fn hello(data: &[u8]) {
    let Ok(hello) = Hello::parse(data) else { return };
    let written = hello.encode();
    check_size(written.len(), data.len());
    assert_eq!(Hello::parse(&written), Ok(hello.clone()));
    for path in [hello.local_path(), hello.peer_path()].into_iter().flatten() {
        assert_eq!(NicPath::parse(&path.to_string()), Ok(path));
    }
    assert!(hello.extra.sq_psn.is_empty() || hello.extra.sq_psn.len() == hello.qp_num.len());
    let _ = (hello.refusal(), hello.is_control_channel(), hello.is_ready_ack(), hello.speaks_ready_ack());
}

/// A notification, or the reply to one.
pub fn notify(data: &[u8]) {
    let notify = Notify::parse(data);
    let reply = NotifyReply::parse(data);
    assert_eq!(notify.is_ok(), reply.is_ok());
    if let (Ok(notify), Ok(reply)) = (notify, reply) {
        let written = notify.encode();
        check_size(written.len(), data.len());
        assert_eq!(Notify::parse(&written), Ok(notify));
        assert_eq!(NotifyReply::parse(&reply.encode()), Ok(reply));
    }
}

/// A segment descriptor.
pub fn descriptor(data: &[u8]) {
    let Ok(mut segment) = SegmentDescriptor::decode(data) else { return };
    if segment.protocol == Protocol::Rdma {
        // Means nothing there, and is not written.
        segment.tcp_data_host.clear();
    }
    segment.check().expect("what is let in is whole");
    for buffer in &segment.buffers {
        assert!(buffer.covers(buffer.addr, buffer.length) && !buffer.covers(buffer.addr, buffer.length + 1));
    }
    let written = segment.encode();
    check_size(written.len(), data.len());
    assert_eq!(SegmentDescriptor::decode(&written).as_ref(), Ok(&segment));
    let mut arranged = segment.clone();
    arranged.arrange().expect("what is whole can be arranged");
    assert_eq!(arranged.devices.len(), segment.devices.len());
    assert_eq!(SegmentDescriptor::decode(&arranged.encode()), Ok(arranged));
}

/// Where a node says its handshake port is.
pub fn rpc_meta(data: &[u8]) {
    let Ok(meta) = RpcMeta::decode(data) else { return };
    let written = meta.encode();
    check_size(written.len(), data.len());
    assert_eq!(RpcMeta::decode(&written), Ok(meta));
}

/// A priority matrix, which people write with comments.
pub fn matrix(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let bare = without_comments(text);
    assert_eq!(bare.len(), text.len(), "positions in messages stay right");
    assert_eq!(bare.lines().count(), text.lines().count());
    assert_eq!(without_comments(&bare), bare);
    let Ok(matrix) = PriorityMatrix::parse(text) else { return };
    let written = matrix.to_json();
    check_size(written.len(), data.len());
    assert_eq!(PriorityMatrix::parse(&written).as_ref(), Ok(&matrix));
    let numbered = matrix.numbering();
    assert_eq!(numbered.len(), matrix.names().len(), "each NIC has one number");
    assert_eq!(numbered.into_iter().collect::<BTreeSet<_>>(), matrix.names());
    for location in matrix.0.keys() {
        assert!(matrix.for_location(location).all().next().is_some() || matrix.names().is_empty());
    }
}

/// A key of a store and the value under it, in three lines of which the first is the cluster's id; and each of them as an
/// address, since names are addresses where there is no store.
pub fn store(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let mut lines = text.splitn(3, '\n');
    let (cluster, key, value) = (lines.next().unwrap_or(""), lines.next().unwrap_or(""), lines.next().unwrap_or(""));
    let keys = KeySpace::new(cluster);
    match keys.entry(key) {
        Some(Entry::RpcMeta(name)) => {
            assert_eq!(keys.rpc_meta(&name), key);
            rpc_meta(value.as_bytes());
        }
        Some(Entry::Segment(_)) => descriptor(value.as_bytes()),
        None => {}
    }
    for address in [cluster, key] {
        // Brackets elsewhere than around an address are let through, as by the stock engine, and found by no look-up.
        if let Some(address) = HostPort::parse(address).ok().filter(|a| !a.host.contains(['[', ']'])) {
            assert_eq!(HostPort::parse(&address.to_string()), Ok(address));
        }
        if let Ok(MetadataUri::Store(StoreUri::Etcd(endpoints))) = MetadataUri::parse(address) {
            let has_port = |e: &String| e.rsplit_once(':').is_some_and(|(_, port)| port.parse::<u16>().is_ok());
            assert!(!endpoints.is_empty() && endpoints.iter().all(has_port), "{endpoints:?}");
        }
    }
}
