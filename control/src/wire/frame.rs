//! The frame around every message: length, type, JSON.
//!
//! ```text
//! 0        8    9
//! | L: u64 | ty | JSON, L - 1 bytes |        little-endian; L counts the type byte
//! | L: u64 |      JSON, L bytes     |        old format: the first byte of the JSON is above 3, so it is no type
//! ```

/// Longest frame accepted unless configured otherwise, in bytes (`MC_HANDSHAKE_MAX_LENGTH`, default and minimum).
pub const DEFAULT_MAX: usize = 1 << 20;
/// Largest limit that may be configured, in bytes.
pub const CEILING: usize = 128 << 20;

/// Bytes of the length field.
const HEADER: usize = 8;
/// Space set aside when a frame begins; the rest grows as bytes arrive, whatever length the peer claims.
const FIRST_RESERVE: usize = 1024;

/// What a message is about: the type byte.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum MessageType {
    /// 0: queue pair set-up and its ready acknowledgement, a [`Hello`](super::Hello) both ways.
    Connection,
    /// 1: exchange of segment descriptors (peer-to-peer metadata).
    Metadata,
    /// 2: an application's notification.
    Notify,
    /// 3: is anybody there.
    Probe,
}

impl MessageType {
    /// The byte on the wire, 0 to 3.
    pub const fn to_byte(self) -> u8 {
        match self {
            Self::Connection => 0,
            Self::Metadata => 1,
            Self::Notify => 2,
            Self::Probe => 3,
        }
    }

    /// From the byte on the wire; `None` above 3.
    pub const fn from_byte(byte: u8) -> Option<Self> {
        match byte {
            0 => Some(Self::Connection),
            1 => Some(Self::Metadata),
            2 => Some(Self::Notify),
            3 => Some(Self::Probe),
            _ => None,
        }
    }
}

/// Whether the frame has a type byte. A reply is framed like its request.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Framing {
    /// With a type byte.
    Typed,
    /// As peers wrote it before types existed; always a [`MessageType::Connection`].
    Old,
}

/// One whole message.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Frame {
    /// How it was, or will be, framed.
    pub framing: Framing,
    /// Its type; [`MessageType::Connection`] in the old framing.
    pub kind: MessageType,
    /// The JSON text, not yet looked at.
    pub body: Vec<u8>,
}

/// Why the bytes of a peer are not a frame. The connection is closed without a reply, as a stock engine does.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FrameError {
    /// The length field is 0.
    #[error("the frame has length 0: the other end does not speak the handshake protocol on this port")]
    ZeroLength,
    /// The length field exceeds the limit of this process.
    #[error(
        "the frame announces {length} bytes, the limit here is {max}: raise MC_HANDSHAKE_MAX_LENGTH (at most 128 MiB) \
         if the peer publishes that many buffers; otherwise the other end does not speak the handshake protocol"
    )]
    TooLong {
        /// Bytes announced.
        length: u64,
        /// Bytes allowed.
        max: usize,
    },
    /// The type byte is 128 or more.
    #[error("type byte {byte:#04x} is no message: the other end does not speak the handshake protocol on this port")]
    UnknownType {
        /// The byte.
        byte: u8,
    },
    /// The stream ended inside a frame.
    #[error("the connection ended after {have} bytes of a frame: the peer stopped or closed it; try again")]
    Truncated {
        /// Bytes that had arrived, the length field included.
        have: usize,
    },
}

#[derive(Clone, Copy, Debug)]
enum Stage {
    Length,
    Type { length: usize },
    Body { framing: Framing, kind: MessageType, length: usize },
    Done,
}

/// Takes the bytes of one connection as they come and gives back its one frame.
///
/// Memory is bounded by twice the smaller of what has arrived and the limit; the announced length is never trusted.
#[derive(Debug)]
pub struct FrameDecoder {
    max: usize,
    stage: Stage,
    bytes: Vec<u8>,
    seen: usize,
}

impl Default for FrameDecoder {
    fn default() -> Self {
        Self::new(DEFAULT_MAX)
    }
}

impl FrameDecoder {
    /// Decoder for one frame whose length field is at most `max` bytes; `max` is brought into 1 to [`CEILING`].
    pub fn new(max: usize) -> Self {
        Self { max: max.clamp(1, CEILING), stage: Stage::Length, bytes: Vec::new(), seen: 0 }
    }

    /// Takes the next bytes of the stream; gives the frame when it is whole, and once.
    ///
    /// One connection has one frame in each direction: bytes behind it are dropped, as a stock engine never reads them.
    ///
    /// # Errors
    /// What is in `input` cannot be, or go on, a frame. The decoder then stays as it was; close the connection.
    pub fn push(&mut self, mut input: &[u8]) -> Result<Option<Frame>, FrameError> {
        loop {
            match self.stage {
                Stage::Length => {
                    self.take(&mut input, HEADER);
                    let Ok(length) = <[u8; HEADER]>::try_from(self.bytes.as_slice()) else { return Ok(None) };
                    let length = u64::from_le_bytes(length);
                    if length == 0 {
                        return Err(FrameError::ZeroLength);
                    }
                    match usize::try_from(length) {
                        Ok(length) if length <= self.max => self.stage = Stage::Type { length },
                        _ => return Err(FrameError::TooLong { length, max: self.max }),
                    }
                    self.bytes = Vec::with_capacity(length.min(FIRST_RESERVE as u64) as usize);
                }
                Stage::Type { length } => {
                    let Some((&byte, rest)) = input.split_first() else { return Ok(None) };
                    self.stage = match MessageType::from_byte(byte) {
                        Some(kind) => {
                            (input, self.seen) = (rest, self.seen + 1);
                            Stage::Body { framing: Framing::Typed, kind, length: length - 1 }
                        }
                        // Signed in the stock engine: 4 to 127 is above every type, 128 and up is negative.
                        None if byte < 0x80 => {
                            Stage::Body { framing: Framing::Old, kind: MessageType::Connection, length }
                        }
                        None => return Err(FrameError::UnknownType { byte }),
                    };
                }
                Stage::Body { framing, kind, length } => {
                    self.take(&mut input, length);
                    if self.bytes.len() < length {
                        return Ok(None);
                    }
                    self.stage = Stage::Done;
                    return Ok(Some(Frame { framing, kind, body: std::mem::take(&mut self.bytes) }));
                }
                Stage::Done => return Ok(None),
            }
        }
    }

    /// Bytes of memory that wait for the rest of the frame.
    pub fn held(&self) -> usize {
        self.bytes.capacity()
    }

    /// To be called when the stream ends.
    ///
    /// # Errors
    /// [`FrameError::Truncated`] unless the frame was given out.
    pub fn finish(&self) -> Result<(), FrameError> {
        match self.stage {
            Stage::Done => Ok(()),
            _ => Err(FrameError::Truncated { have: self.seen }),
        }
    }

    /// Moves bytes from `input` until `self.bytes` has `want`.
    fn take(&mut self, input: &mut &[u8], want: usize) {
        let n = input.len().min(want.saturating_sub(self.bytes.len()));
        let (now, later) = input.split_at(n);
        self.bytes.extend_from_slice(now);
        self.seen += n;
        *input = later;
    }
}

impl Frame {
    /// A typed frame around a body that some `encode` of this crate made.
    pub fn typed(kind: MessageType, body: Vec<u8>) -> Self {
        Self { framing: Framing::Typed, kind, body }
    }

    /// The reply to this frame: same framing, same type.
    #[must_use]
    pub fn reply(&self, body: Vec<u8>) -> Self {
        Self { framing: self.framing, kind: self.kind, body }
    }

    /// The bytes for the socket, in one piece.
    pub fn encode(&self) -> Vec<u8> {
        let kind: &[u8] = match self.framing {
            Framing::Typed => &[self.kind.to_byte()],
            Framing::Old => &[],
        };
        let length = (kind.len() + self.body.len()) as u64;
        [length.to_le_bytes().as_slice(), kind, self.body.as_slice()].concat()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const KINDS: [MessageType; 4] =
        [MessageType::Connection, MessageType::Metadata, MessageType::Notify, MessageType::Probe];

    fn decode(bytes: &[u8]) -> Result<Option<Frame>, FrameError> {
        FrameDecoder::default().push(bytes)
    }

    #[test]
    fn captured_probe_and_notify_frames() {
        let probe = [4, 0, 0, 0, 0, 0, 0, 0, 3, b'{', b'}', b'\n'];
        let frame = decode(&probe).unwrap().unwrap();
        assert_eq!(frame, Frame::typed(MessageType::Probe, b"{}\n".to_vec()));
        assert_eq!(frame.encode(), probe);
        let mut notify = vec![0x24, 0, 0, 0, 0, 0, 0, 0, 2];
        notify.extend_from_slice(b"{\"name\":\"nm\",\"notify_msg\":\"hello\"}\n");
        assert_eq!(decode(&notify).unwrap().unwrap().encode(), notify);
    }

    #[test]
    fn the_old_format_has_no_type_byte_and_is_answered_without_one() {
        let mut old = vec![3, 0, 0, 0, 0, 0, 0, 0];
        old.extend_from_slice(b"{}\n");
        let frame = decode(&old).unwrap().unwrap();
        assert_eq!(frame, Frame { framing: Framing::Old, kind: MessageType::Connection, body: b"{}\n".to_vec() });
        assert_eq!(frame.reply(b"[]".to_vec()).encode(), [2, 0, 0, 0, 0, 0, 0, 0, b'[', b']']);
    }

    #[test]
    fn what_a_stock_engine_closes_on() {
        assert_eq!(decode(&[0; 8]), Err(FrameError::ZeroLength));
        assert_eq!(decode(&[0xff; 8]), Err(FrameError::TooLong { length: u64::MAX, max: DEFAULT_MAX }));
        assert_eq!(decode(&[9, 0, 0, 0, 0, 0, 0, 0, 0x80]), Err(FrameError::UnknownType { byte: 0x80 }));
        assert!(FrameDecoder::new(4).push(&[5, 0, 0, 0, 0, 0, 0, 0]).is_err());
    }

    #[test]
    fn a_stream_that_ends_early_says_so() {
        let mut decoder = FrameDecoder::default();
        assert_eq!(decoder.finish(), Err(FrameError::Truncated { have: 0 }));
        assert_eq!(decoder.push(&[4, 0, 0, 0, 0, 0, 0, 0, 3, b'{']), Ok(None));
        assert_eq!(decoder.finish(), Err(FrameError::Truncated { have: 10 }));
        assert!(decoder.push(b"}\nand more").unwrap().is_some());
        assert_eq!((decoder.finish(), decoder.push(b"x")), (Ok(()), Ok(None)));
    }

    #[test]
    fn a_claimed_length_reserves_next_to_nothing() {
        let mut decoder = FrameDecoder::new(CEILING);
        decoder.push(&[0, 0, 0, 8, 0, 0, 0, 0, 0]).unwrap();
        assert!(decoder.held() <= FIRST_RESERVE);
    }

    proptest! {
        #[test]
        fn any_cut_of_the_stream_gives_the_same_frame(
            kind in prop::sample::select(&KINDS[..]), body in prop::collection::vec(any::<u8>(), 0..300), step in 1usize..40,
        ) {
            let frame = Frame::typed(kind, body);
            let mut decoder = FrameDecoder::default();
            let mut got = None;
            for piece in frame.encode().chunks(step) {
                prop_assert!(got.is_none());
                got = decoder.push(piece).unwrap();
            }
            prop_assert_eq!(got, Some(frame));
        }

        #[test]
        fn no_mutation_panics_it_or_takes_more_memory_than_came(
            kind in prop::sample::select(&KINDS[..]), old: bool, body in prop::collection::vec(any::<u8>(), 0..300),
            changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..6),
            end: prop::sample::Index, step in 1usize..40,
        ) {
            let framing = if old { Framing::Old } else { Framing::Typed };
            let mut bytes = Frame { framing, kind, body }.encode();
            for (at, byte) in &changes {
                let at = at.index(bytes.len());
                bytes[at] = *byte;
            }
            bytes.truncate(end.index(bytes.len()) + 1);
            let mut decoder = FrameDecoder::new(1 << 16);
            let mut got = None;
            for piece in bytes.chunks(step) {
                match decoder.push(piece) {
                    Ok(Some(frame)) => prop_assert!(got.replace(frame).is_none(), "a connection has one frame"),
                    Ok(None) => {}
                    Err(_) => break,
                }
                prop_assert!(decoder.held() <= FIRST_RESERVE.max(2 * bytes.len()));
            }
            if let Some(frame) = got {
                prop_assert!(frame.encode().len() <= bytes.len());
            }
        }

        #[test]
        fn no_bytes_panic_it(bytes in prop::collection::vec(any::<u8>(), 0..64), first in 0u8..80) {
            let mut bytes = bytes;
            if bytes.len() >= 8 { bytes[..8].copy_from_slice(&[first, 0, 0, 0, 0, 0, 0, 0]); }
            let mut decoder = FrameDecoder::new(64);
            for piece in bytes.chunks(3) {
                if decoder.push(piece).is_err() { break }
            }
        }
    }
}
