//! What a server does with one connection: bytes in, ranges to fill and replies out. Pure: no socket, no clock, and
//! memory only through [`Ground`], so that a fuzzer can drive it.
//!
//! ```text
//!            header                     entries all there
//!   Header ────────▶ Entries (lists) ─────────────────────▶ Body (WRITE) ──▶ Header, its status queued
//!     │ READ: status and range queued                         │
//!     └── refused ──────────────▶ Drain ◀─────────────────────┘ refused: what came before it is applied
//! ```
//! Requests are served strictly in order: a WRITE is not begun before the data of the READs ahead of it was sent. A refused
//! request gets its status, and everything after it is thrown away until the client is gone.
//!
//! A connection keeps at most a header, the entries of one list, and [`PIECES_MAX`] pieces of replies beyond one list's:
//! under 64 KiB whatever the client does.

use std::collections::VecDeque;

use super::wire::{self, Ask, ENTRY, HEADER, LIST_MAX, LIST_STATUS, REFUSED, STATUS};

/// Pieces of replies a session may owe before it takes another request.
pub const PIECES_MAX: usize = 512;

/// Bytes thrown away after a refusal, so that the client sees its status and not a reset.
pub const DRAIN_MAX: u64 = 64 << 20;

/// Status of a list whose form is unknown here.
const UNKNOWN_FORM: u32 = 2;

/// The memory behind a session.
pub trait Ground {
    /// Whether a peer may reach all of it now. Never for no bytes, or for a range that wraps.
    fn holds(&self, addr: u64, len: u64) -> bool;
    /// Copies bytes there; false if a peer may not reach all of it any more.
    fn put(&mut self, addr: u64, bytes: &[u8]) -> bool;
}

/// What goes out next.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Piece {
    /// These bytes, from the array's start.
    Bytes([u8; LIST_STATUS], u8),
    /// Registered memory.
    Memory {
        /// Its address.
        addr: u64,
        /// Bytes.
        len: u64,
    },
}

impl Piece {
    fn status(code: u32) -> Self {
        let mut bytes = [0; LIST_STATUS];
        bytes[..STATUS].copy_from_slice(&wire::status(code));
        Self::Bytes(bytes, STATUS as u8)
    }

    fn len(&self) -> u64 {
        match self {
            Self::Bytes(_, len) => u64::from(*len),
            Self::Memory { len, .. } => *len,
        }
    }

    /// What is left of it behind its first `n` bytes.
    fn behind(self, n: u64) -> Self {
        match self {
            Self::Bytes(bytes, len) => {
                let n = (n as usize).min(usize::from(len));
                let mut rest = [0; LIST_STATUS];
                rest[..LIST_STATUS - n].copy_from_slice(&bytes[n..]);
                Self::Bytes(rest, len - n as u8)
            }
            Self::Memory { addr, len } => Self::Memory { addr: addr + n, len: len - n },
        }
    }
}

/// How a WRITE is acknowledged.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Ack {
    Nothing,
    Status,
    List { code: u32, served: u32, number: u32 },
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Phase {
    /// Between requests, or in the middle of a header.
    Header,
    /// Entries of a list; `left` are to come.
    Entries { write: bool, number: u32, bytes: u64, left: u32 },
    /// Bytes go to `targets[at]`, of which `done` have come.
    Body { at: usize, done: u64, ack: Ack },
    /// After a refusal: this much may still be thrown away.
    Drain { left: u64 },
    /// Nothing more is taken.
    Over,
}

/// What a session did. Only ever grows.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Tally {
    /// Bytes of headers and entries taken.
    pub header_bytes: u64,
    /// Bytes that went to their place.
    pub body_bytes: u64,
    /// Bytes thrown away.
    pub drained_bytes: u64,
    /// Requests begun, a list's entries counted one by one.
    pub requests: u64,
    /// Requests refused: at most one.
    pub refused: u64,
}

/// One connection of a peer.
#[derive(Debug)]
pub struct Session {
    part: [u8; HEADER],
    got: usize,
    phase: Phase,
    targets: Vec<(u64, u64)>,
    replies: VecDeque<Piece>,
    /// Bytes of the first reply that are gone already.
    gone: u64,
    /// Pieces of registered memory among the replies.
    owed: usize,
    tally: Tally,
}

impl Default for Session {
    fn default() -> Self {
        Self::new()
    }
}

impl Session {
    /// A connection that was just accepted.
    pub fn new() -> Self {
        Self {
            part: [0; HEADER],
            got: 0,
            phase: Phase::Header,
            targets: Vec::new(),
            replies: VecDeque::new(),
            gone: 0,
            owed: 0,
            tally: Tally::default(),
        }
    }

    /// What it did so far.
    pub fn tally(&self) -> Tally {
        self.tally
    }

    /// Whether nothing is under way: the client may go, and nobody misses anything.
    pub fn is_idle(&self) -> bool {
        self.phase == Phase::Header && self.got == 0 && self.replies.is_empty()
    }

    /// Whether it serves nothing more: to be closed when its replies are out and the client is gone.
    pub fn is_ending(&self) -> bool {
        matches!(self.phase, Phase::Drain { .. } | Phase::Over)
    }

    /// Whether it takes not even bytes to throw away.
    pub fn is_over(&self) -> bool {
        self.phase == Phase::Over
    }

    /// Whether replies wait to be sent.
    pub fn has_replies(&self) -> bool {
        !self.replies.is_empty()
    }

    /// Whether data of READs waits to be sent.
    pub fn owes_data(&self) -> bool {
        self.owed > 0
    }

    /// Whether it can take bytes now. If not, some replies have to go first.
    pub fn takes_input(&self) -> bool {
        match self.phase {
            Phase::Header => self.replies.len() < PIECES_MAX,
            Phase::Body { .. } => self.owed == 0,
            Phase::Entries { .. } | Phase::Drain { .. } => true,
            Phase::Over => false,
        }
    }

    /// Where the next bytes of the stream belong, up to the end of the request: to be received right there and told
    /// by [`Session::landed`]. Empty if the next bytes are no body, or not to be taken yet.
    pub fn body(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        let (at, done) = match self.phase {
            Phase::Body { at, done, .. } if self.owed == 0 => (at, done),
            _ => (self.targets.len(), 0),
        };
        let rest = self.targets.get(at..).unwrap_or_default().iter().enumerate();
        rest.map(move |(n, &(addr, len))| if n == 0 { (addr + done, len - done) } else { (addr, len) })
    }

    /// The next `n` bytes of the stream were received into [`Session::body`], and no more than that.
    pub fn landed(&mut self, mut n: u64) {
        while let Phase::Body { at, done, ack } = self.phase {
            let left = self.targets.get(at).map_or(0, |t| t.1 - done);
            let now = n.min(left);
            self.tally.body_bytes += now;
            n -= now;
            if now < left {
                self.phase = Phase::Body { at, done: done + now, ack };
                return;
            }
            self.next_target(at + 1, ack);
            if n == 0 {
                return;
            }
        }
    }

    /// Takes bytes of the stream; returns how many. Fewer than all if [`Session::takes_input`] says so afterwards.
    pub fn feed(&mut self, bytes: &[u8], ground: &mut impl Ground) -> usize {
        let mut taken = 0;
        while taken < bytes.len() && self.takes_input() {
            let rest = &bytes[taken..];
            taken += match self.phase {
                Phase::Header => self.take_header(rest, ground),
                Phase::Entries { .. } => self.take_entries(rest, ground),
                Phase::Body { at, done, .. } => {
                    let Some(&(addr, len)) = self.targets.get(at) else { break };
                    let piece = &rest[..rest.len().min((len - done) as usize)];
                    if !ground.put(addr + done, piece) {
                        self.abort();
                        break;
                    }
                    self.landed(piece.len() as u64);
                    piece.len()
                }
                Phase::Drain { left } => {
                    let now = (rest.len() as u64).min(left);
                    self.tally.drained_bytes += now;
                    self.phase = if now == left { Phase::Over } else { Phase::Drain { left: left - now } };
                    now as usize
                }
                Phase::Over => break,
            };
        }
        taken
    }

    /// Nothing more is taken or sent: memory under way is not registered any more, or the connection broke.
    pub fn abort(&mut self) {
        self.phase = Phase::Over;
        self.replies.clear();
        (self.gone, self.owed) = (0, 0);
    }

    /// What is to be sent next, in order.
    pub fn replies(&self) -> impl Iterator<Item = Piece> + '_ {
        let gone = self.gone;
        self.replies.iter().enumerate().map(move |(n, piece)| if n == 0 { piece.behind(gone) } else { *piece })
    }

    /// The next `n` bytes of [`Session::replies`] were sent.
    pub fn sent(&mut self, mut n: u64) {
        while let Some(front) = self.replies.front() {
            let left = front.len() - self.gone;
            if n < left {
                self.gone += n;
                return;
            }
            n -= left;
            self.owed -= usize::from(matches!(front, Piece::Memory { .. }));
            self.replies.pop_front();
            self.gone = 0;
        }
    }

    /// Moves up to `want` bytes into `part`; `None` until all are there.
    fn collect(&mut self, bytes: &[u8], want: usize) -> (usize, bool) {
        let now = bytes.len().min(want - self.got);
        self.part[self.got..self.got + now].copy_from_slice(&bytes[..now]);
        self.got += now;
        self.tally.header_bytes += now as u64;
        let complete = self.got == want;
        if complete {
            self.got = 0;
        }
        (now, complete)
    }

    fn take_header(&mut self, bytes: &[u8], ground: &impl Ground) -> usize {
        let (taken, complete) = self.collect(bytes, HEADER);
        if !complete {
            return taken;
        }
        self.targets.clear();
        match Ask::parse(&self.part) {
            Some(Ask::One { write, status, addr, len }) => self.begin(write, status, addr, len, ground),
            Some(Ask::List { write, count, number, bytes }) => {
                self.phase = Phase::Entries { write, number, bytes, left: count.min(LIST_MAX) };
            }
            None => self.refuse(Some(list_piece(UNKNOWN_FORM, 0, 0))),
        }
        taken
    }

    fn begin(&mut self, write: bool, status: bool, addr: u64, len: u64, ground: &impl Ground) {
        self.tally.requests += 1;
        if !ground.holds(addr, len) {
            self.refuse(status.then(|| Piece::status(REFUSED)));
        } else if write {
            self.targets.push((addr, len));
            self.next_target(0, if status { Ack::Status } else { Ack::Nothing });
        } else {
            if status {
                self.replies.push_back(Piece::status(0));
            }
            self.owe(addr, len);
        }
    }

    fn owe(&mut self, addr: u64, len: u64) {
        self.replies.push_back(Piece::Memory { addr, len });
        self.owed += 1;
    }

    fn refuse(&mut self, status: Option<Piece>) {
        self.tally.refused += 1;
        self.replies.extend(status);
        self.phase = Phase::Drain { left: DRAIN_MAX };
    }

    fn take_entries(&mut self, bytes: &[u8], ground: &impl Ground) -> usize {
        let Phase::Entries { write, number, bytes: sum, left } = self.phase else { return 0 };
        let (taken, complete) = self.collect(bytes, ENTRY);
        if complete {
            let mut entry = [0; ENTRY];
            entry.copy_from_slice(&self.part[..ENTRY]);
            self.targets.push(wire::parse_entry(&entry));
            self.phase = Phase::Entries { write, number, bytes: sum, left: left - 1 };
            if left == 1 {
                self.begin_list(write, number, sum, ground);
            }
        }
        taken
    }

    /// All entries are there. Those before the first that is out of bounds are served.
    fn begin_list(&mut self, write: bool, number: u32, bytes: u64, ground: &impl Ground) {
        let count = self.targets.len();
        let sum = self.targets.iter().try_fold(0u64, |sum, target| sum.checked_add(target.1));
        let good = self.targets.iter().take_while(|&&(addr, len)| ground.holds(addr, len)).count();
        // A client that can not count is not to be believed at all.
        let good = if sum == Some(bytes) { good } else { 0 };
        self.tally.requests += (good + usize::from(good < count)) as u64;
        self.targets.truncate(good);
        let code = if good < count { REFUSED } else { 0 };
        let (served, ack) = (good as u32, Ack::List { code, served: good as u32, number });
        if write {
            return self.next_target(0, ack);
        }
        let status = list_piece(code, served, number);
        if code == 0 {
            self.replies.push_back(status);
        } else {
            self.refuse(Some(status));
        }
        for at in 0..good {
            let (addr, len) = self.targets[at];
            self.owe(addr, len);
        }
        if code == 0 {
            self.phase = Phase::Header;
        }
    }

    /// The body goes on with `targets[at]`, or was the last byte of it: then it is acknowledged.
    fn next_target(&mut self, at: usize, ack: Ack) {
        if at < self.targets.len() {
            self.phase = Phase::Body { at, done: 0, ack };
            return;
        }
        self.targets.clear();
        self.phase = Phase::Header;
        match ack {
            Ack::Nothing => {}
            Ack::Status => self.replies.push_back(Piece::status(0)),
            Ack::List { code: 0, served, number } => self.replies.push_back(list_piece(0, served, number)),
            Ack::List { code, served, number } => self.refuse(Some(list_piece(code, served, number))),
        }
    }
}

fn list_piece(code: u32, served: u32, number: u32) -> Piece {
    Piece::Bytes(wire::list_status(code, served, number), LIST_STATUS as u8)
}
