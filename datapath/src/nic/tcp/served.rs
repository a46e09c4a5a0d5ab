//! A connection of a peer: a [`Session`] and its socket.
//!
//! Large bodies are received right into their place, together with the header that follows. Where requests are small, many of
//! them are received into the queue's stage with one call and copied from there: below [`SMALL`] a copy costs less than a call.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use rustix::net::Shutdown;

use super::counters::TcpCounters;
use super::iov::{Io, Span};
use super::ranges::Ranges;
use super::session::{Piece, Session};
use super::wire::HEADER;

/// Bytes received with one call for requests that are looked at first.
pub(super) const STAGE: usize = 64 << 10;
/// Bodies from this size on are received right into their place.
const SMALL: u64 = 16 << 10;
/// Bytes moved for one connection in one poll, each way, before others have their turn.
const BUDGET: usize = 256 << 10;

/// What becomes of the connection.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Fate {
    Keep,
    Close,
}

/// What its socket is watched for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Interest {
    pub(super) input: bool,
    pub(super) output: bool,
}

pub(super) struct Served {
    fd: OwnedFd,
    session: Session,
    /// Taken from the socket and not yet by the session, which first has to send.
    carry: Vec<u8>,
    /// Size of the last request: what comes next is likely alike.
    typical: u64,
    /// The client sends no more.
    eof: bool,
    /// We send no more.
    shut: bool,
    pub(super) watched: Interest,
    /// When it was last of use, counted by the queue.
    pub(super) used_at: u64,
    /// When its session ended, in milliseconds.
    pub(super) ending_since: Option<u64>,
}

enum Input {
    /// All that was there, perhaps after some bytes.
    Dry(usize),
    /// There may be more.
    More(usize),
    /// The session has to send first.
    Blocked,
    Broken,
}

impl Served {
    pub(super) fn new(fd: OwnedFd) -> Self {
        Self {
            fd,
            session: Session::new(),
            carry: Vec::new(),
            typical: 0,
            eof: false,
            shut: false,
            watched: Interest { input: true, output: false },
            used_at: 0,
            ending_since: None,
        }
    }

    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// Between two requests.
    pub(super) fn is_idle(&self) -> bool {
        self.session.is_idle()
    }

    pub(super) fn is_ending(&self) -> bool {
        self.session.is_ending()
    }

    /// What to wait for.
    pub(super) fn interest(&self) -> Interest {
        Interest {
            input: !self.eof && self.carry.is_empty() && self.session.takes_input(),
            output: self.session.has_replies(),
        }
    }

    /// Moves what can be moved without waiting, within a budget; how many bytes.
    pub(super) fn serve(&mut self, io: &mut Io, ranges: &Arc<Ranges>, counters: &TcpCounters) -> (Fate, usize) {
        let before = self.session.tally();
        let (mut taken, mut given) = (0, 0);
        let fate = self.turn(io, ranges, counters, &mut taken, &mut given);
        let now = self.session.tally();
        counters.requests.add(now.requests - before.requests);
        counters.refused.add(now.refused - before.refused);
        counters.bytes_in.add(now.body_bytes - before.body_bytes);
        (fate, taken + given)
    }

    fn turn(
        &mut self,
        io: &mut Io,
        ranges: &Arc<Ranges>,
        counters: &TcpCounters,
        taken: &mut usize,
        given: &mut usize,
    ) -> Fate {
        loop {
            let input = self.take(io, ranges, counters);
            match input {
                Input::Broken => return Fate::Close,
                // Many small requests are answered with one call; data of READs goes at once.
                Input::More(n) => {
                    *taken += n;
                    if *taken < BUDGET && !self.session.owes_data() {
                        continue;
                    }
                }
                Input::Dry(n) => *taken += n,
                Input::Blocked => {}
            }
            match self.give(io, ranges, counters, BUDGET.saturating_sub(*given)) {
                Some(n) => *given += n,
                None => return Fate::Close,
            }
            // What is left is reported by the socket again: room to send, or bytes to take. Only what was taken from it and
            // put by is not, so that is not left.
            let more = matches!(input, Input::More(_)) && *taken < BUDGET && *given < BUDGET;
            if self.session.has_replies() || (self.carry.is_empty() && !more) {
                break;
            }
        }
        self.end_of_turn()
    }

    fn end_of_turn(&mut self) -> Fate {
        let silent = !self.session.has_replies();
        if self.session.is_idle() {
            // Memory only while it is needed.
            self.carry = Vec::new();
        }
        if self.session.is_over() || (self.eof && silent) {
            return Fate::Close;
        }
        if self.session.is_ending() && silent && !self.shut {
            self.shut = true;
            let _ = rustix::net::shutdown(&self.fd, Shutdown::Write);
        }
        Fate::Keep
    }

    fn take(&mut self, io: &mut Io, ranges: &Arc<Ranges>, counters: &TcpCounters) -> Input {
        let mut ground = ranges.clone();
        if !self.carry.is_empty() {
            let taken = self.session.feed(&self.carry, &mut ground);
            self.carry.drain(..taken);
            if !self.carry.is_empty() {
                return if self.session.is_over() { Input::Broken } else { Input::Blocked };
            }
        }
        if !self.session.takes_input() {
            return Input::Blocked;
        }
        if self.eof {
            return Input::Dry(0);
        }
        io.clear();
        let mut whole = true;
        for (addr, len) in self.session.body() {
            self.typical = len.max(self.typical / 2);
            let most = (BUDGET - io.bytes().min(BUDGET)) as u64;
            if most == 0 || !io.has_room(0) {
                whole = false;
                break;
            }
            let Some(span) = Span::registered(ranges, addr, len.min(most)) else { return Input::Broken };
            io.add_span(span);
            whole = len <= most;
        }
        let direct = io.bytes();
        let stage = if !whole {
            0
        } else if self.typical >= SMALL {
            HEADER
        } else {
            STAGE
        };
        let at = if stage > 0 && io.has_room(stage) { io.add_scratch(stage) } else { 0 };
        let asked = io.bytes();
        counters.receives.add(1);
        let got = match io.receive(self.fd.as_fd()) {
            Ok(0) => {
                self.eof = true;
                // In the middle of a request there is nothing to answer.
                return if self.session.has_replies() { Input::Dry(0) } else { Input::Broken };
            }
            Ok(got) => got,
            Err(e) => return if would_block(&e) { Input::Dry(0) } else { Input::Broken },
        };
        self.session.landed(got.min(direct) as u64);
        let staged = got.saturating_sub(direct);
        if staged > 0 {
            let before = self.session.tally();
            let bytes = io.scratch(at, staged);
            let taken = self.session.feed(bytes, &mut ground);
            let now = self.session.tally();
            let requests = now.requests - before.requests;
            if requests > 0 && direct == 0 {
                self.typical = (now.body_bytes - before.body_bytes) / requests;
            }
            if self.session.is_over() {
                return Input::Broken;
            }
            self.carry.extend_from_slice(&bytes[taken..]);
        }
        if got < asked && self.carry.is_empty() { Input::Dry(got) } else { Input::More(got) }
    }

    /// Sends replies; how many bytes, or `None` if the connection is broken.
    fn give(&mut self, io: &mut Io, ranges: &Arc<Ranges>, counters: &TcpCounters, budget: usize) -> Option<usize> {
        let mut given = 0;
        while self.session.has_replies() && given < budget {
            io.clear();
            for piece in self.session.replies() {
                let most = (budget - given).saturating_sub(io.bytes()) as u64;
                if most == 0 || !io.has_room(32) {
                    break;
                }
                match piece {
                    Piece::Bytes(bytes, len) => io.add_bytes(&bytes[..usize::from(len)]),
                    Piece::Memory { addr, len } => io.add_payload(Span::registered(ranges, addr, len.min(most))?),
                }
            }
            let asked = io.bytes();
            counters.sends.add(1);
            match io.send(self.fd.as_fd()) {
                Ok(sent) => {
                    self.session.sent(sent as u64);
                    given += sent;
                    if sent < asked {
                        break;
                    }
                }
                Err(e) if would_block(&e) => break,
                Err(_) => return None,
            }
        }
        Some(given)
    }
}

pub(super) fn would_block(error: &std::io::Error) -> bool {
    matches!(error.kind(), std::io::ErrorKind::WouldBlock | std::io::ErrorKind::Interrupted)
}
