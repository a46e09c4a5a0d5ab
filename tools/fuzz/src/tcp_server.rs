//! Drives a served TCP connection with any bytes, and holds it against a reader of the same stream that knows nothing of pieces.
//!
//! An input is four bytes of seed, which decide where the stream is cut, when replies go out and whether bodies are received
//! right in their place; then the stream.

use moonrail_datapath::nic::tcp::session::{DRAIN_MAX, Ground, PIECES_MAX, Piece, Session};
use moonrail_datapath::random::Random;

/// Address of the first range; the second one touches it and is not the same.
pub(crate) const BASE: u64 = 0x10_0000;
pub(crate) const FIRST: u64 = 48 << 10;
pub(crate) const SECOND: u64 = 16 << 10;
const GUARD: usize = 4096;
const PIECES_OF_ONE_LIST: usize = 1025;

/// Two ranges between guard bytes.
struct Memory {
    bytes: Vec<u8>,
}

impl Memory {
    fn new() -> Self {
        let len = (FIRST + SECOND) as usize;
        let mut bytes: Vec<u8> = (0..len + 2 * GUARD).map(|n| (n * 7 % 251) as u8).collect();
        bytes[..GUARD].fill(0xaa);
        bytes[GUARD + len..].fill(0xaa);
        Self { bytes }
    }

    fn at(&mut self, addr: u64, len: u64) -> &mut [u8] {
        let from = (addr - BASE) as usize + GUARD;
        &mut self.bytes[from..from + len as usize]
    }

    fn guards_are_whole(&self) -> bool {
        let (front, back) = (&self.bytes[..GUARD], &self.bytes[self.bytes.len() - GUARD..]);
        front.iter().chain(back).all(|b| *b == 0xaa)
    }
}

fn inside(addr: u64, len: u64) -> bool {
    let ranges = [(BASE, FIRST), (BASE + FIRST, SECOND)];
    len > 0 && ranges.iter().any(|(start, size)| addr >= *start && len <= *size && addr - start <= size - len)
}

impl Ground for Memory {
    fn holds(&self, addr: u64, len: u64) -> bool {
        inside(addr, len)
    }

    fn put(&mut self, addr: u64, bytes: &[u8]) -> bool {
        assert!(inside(addr, bytes.len() as u64), "{addr:#x} + {} is written", bytes.len());
        self.at(addr, bytes.len() as u64).copy_from_slice(bytes);
        true
    }
}

fn number(bytes: &[u8], at: usize, len: usize) -> u64 {
    bytes[at..at + len].iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte))
}

fn status(code: u32) -> Vec<u8> {
    [&code.to_le_bytes()[..], b"VTCM"].concat()
}

/// What the stream says, read from front to back: replies and memory.
fn straight(stream: &[u8], memory: &mut Memory) -> Vec<u8> {
    let (mut rest, mut out) = (stream, vec![]);
    while rest.len() >= 24 {
        let (header, behind) = rest.split_at(24);
        rest = behind;
        let opcode = header[16];
        if opcode & 0xfe == 0xc0 {
            let (count, label) = (number(header, 0, 4) as usize, &header[4..8]);
            if header[17] != 1 || !(1..=1024).contains(&count) {
                out.extend([status(2), vec![0; 8]].concat());
                return out;
            }
            if rest.len() < 16 * count {
                return out;
            }
            let (entries, behind) = rest.split_at(16 * count);
            rest = behind;
            let entries: Vec<_> = entries.chunks(16).map(|e| (number(e, 0, 8), number(e, 8, 8))).collect();
            let sum = entries.iter().map(|e| u128::from(e.1)).sum::<u128>();
            let believed = sum == u128::from(number(header, 8, 8));
            let good = if believed { entries.iter().take_while(|e| inside(e.0, e.1)).count() } else { 0 };
            let reply =
                [status(u32::from(good < count)), (good as u32).to_le_bytes().to_vec(), label.to_vec()].concat();
            if opcode == 0xc1 {
                for &(addr, len) in &entries[..good] {
                    if !apply(memory, addr, len, &mut rest) {
                        return out;
                    }
                }
                out.extend(reply);
            } else {
                out.extend(reply);
                for &(addr, len) in &entries[..good] {
                    out.extend_from_slice(memory.at(addr, len));
                }
            }
            if good < count {
                return out;
            }
            continue;
        }
        let (len, addr) = (number(header, 0, 8), number(header, 8, 8));
        let answered = opcode & 0x80 != 0;
        let good = inside(addr, len);
        if good && opcode & 0x7f == 1 && !apply(memory, addr, len, &mut rest) {
            return out;
        }
        if answered {
            out.extend(status(u32::from(!good)));
        }
        if !good {
            return out;
        }
        if opcode & 0x7f != 1 {
            out.extend_from_slice(memory.at(addr, len));
        }
    }
    out
}

/// Moves a body into its place; false if the stream ends in it.
fn apply(memory: &mut Memory, addr: u64, len: u64, rest: &mut &[u8]) -> bool {
    let now = rest.len().min(len as usize);
    memory.at(addr, now as u64).copy_from_slice(&rest[..now]);
    *rest = &rest[now..];
    now == len as usize
}

/// Sends up to `most` bytes of replies.
fn send(session: &mut Session, memory: &mut Memory, most: usize, out: &mut Vec<u8>) {
    let before = out.len();
    for piece in session.replies() {
        let left = most - (out.len() - before);
        match piece {
            Piece::Bytes(bytes, len) => out.extend(&bytes[..usize::from(len).min(left)]),
            Piece::Memory { addr, len } => {
                assert!(inside(addr, len), "{addr:#x} + {len} is read");
                out.extend_from_slice(memory.at(addr, len.min(left as u64)));
            }
        }
        if out.len() - before == most {
            break;
        }
    }
    session.sent((out.len() - before) as u64);
}

/// Feeds the stream as the seed says and checks every law.
pub(crate) fn drive(input: &[u8]) {
    let Some((seed, stream)) = input.split_at_checked(4) else { return };
    let mut random = Random::new(number(seed, 0, 4));
    let mut expected = Memory::new();
    let replies = straight(stream, &mut expected);

    let (mut session, mut memory) = (Session::new(), Memory::new());
    let (mut rest, mut out) = (stream, vec![]);
    loop {
        let most = if random.chance(0.2) { 1 } else { 1 + random.below(20_000) as usize };
        if random.chance(0.5) || !session.takes_input() {
            send(&mut session, &mut memory, most, &mut out);
        }
        let mut chunk = &rest[..rest.len().min(1 + random.below(9_000) as usize)];
        let had = rest.len();
        if random.chance(0.5) {
            // As the socket does it: the body's bytes to their place, what follows them is fed.
            let places: Vec<_> = session.body().collect();
            let mut direct = 0;
            for (addr, len) in places {
                let now = chunk.len().min(len as usize);
                assert!(memory.put(addr, &chunk[..now]) || now == 0);
                (chunk, direct) = (&chunk[now..], direct + now);
                if chunk.is_empty() {
                    break;
                }
            }
            session.landed(direct as u64);
            rest = &rest[direct..];
        }
        let taken = session.feed(chunk, &mut memory);
        rest = &rest[taken..];
        let pieces = session.replies().count();
        assert!(pieces <= PIECES_MAX + PIECES_OF_ONE_LIST, "{pieces} pieces are owed");
        let tally = session.tally();
        let accounted = tally.header_bytes + tally.body_bytes + tally.drained_bytes;
        assert_eq!(accounted, (stream.len() - rest.len()) as u64, "every byte is a header's, a body's or thrown away");
        assert!(tally.refused <= 1 && tally.drained_bytes <= DRAIN_MAX);
        if rest.is_empty() || (rest.len() == had && !session.has_replies()) {
            break;
        }
    }
    while session.has_replies() {
        send(&mut session, &mut memory, usize::MAX, &mut out);
    }
    assert!(rest.is_empty() || session.is_over(), "it stopped in the middle");
    assert!(out == replies, "{} bytes of replies, expected {}", out.len(), replies.len());
    assert!(memory.bytes == expected.bytes, "memory differs");
    assert!(memory.guards_are_whole());
}
