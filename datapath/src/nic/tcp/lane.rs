//! A lane: our end of one connection to a peer's data port, behind one queue pair.
//!
//! ```text
//!   requests   w0 w1 w2 w3 w4 w5 …        as posted; the front is the oldest without an outcome
//!   messages   [w0] [w1] [w2 w3] [w4 w5]  what goes as one: a request (versions 1 and 2), a list of them (lists)
//!                    ▲     ▲
//!                    │     └ sending: `tx`, `tx_at` bytes of it are gone
//!                    └ answered up to here: `rx`, `rx_at` bytes of its reply are here
//! ```
//! Servers work in order, so replies come in order and need no number. Version 1 acknowledges no WRITE: a READ of the
//! last byte written follows them (a *probe*), and its answer says that they are applied.
//!
//! # The end
//! The first thing that goes wrong ends the lane: its request gets the status, all later ones are flushed. Before a WRITE that was
//! begun is given back, the peer's end must have ended too, or its bytes could be applied afterwards: the lane says
//! that it will send no more, and waits for the end of the peer's stream. If that does not come, the lane says that it
//! proves nothing ([`LaneShared::proves`]), and the core holds the Works.

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use rustix::net::Shutdown;

use super::counters::TcpCounters;
use super::iov::{Io, Span};
use super::post::LaneShared;
use super::served::{Interest, would_block};
use super::wire::{self, Ask, ENTRY, HEADER, LIST_STATUS, REFUSED, STATUS};
use crate::nic::{Completion, Op, TcpVersion, WcStatus, WorkRequest};
use crate::units::RemoteAddr;

/// Bytes moved for one lane in one poll, each way, before others have their turn.
const BUDGET: usize = 1 << 20;
/// Bytes of one list at the most, if it has more than one entry: it is acknowledged as a whole, and credit must flow.
const LIST_BYTES: u64 = 256 << 10;
/// Entries of our lists at the most.
const LIST_ENTRIES: u32 = 256;
/// How long an ailing lane waits for the peer's end to end, if nobody else gives it a bound.
pub(super) const FAREWELL_MS: u64 = 1_000;

/// Time-outs of lanes, in milliseconds.
#[derive(Clone, Copy, Debug)]
pub(super) struct Patience {
    /// Without a byte of progress while bytes are to be moved.
    pub(super) progress_ms: u64,
    /// Without a reply after all was sent.
    pub(super) status_ms: u64,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Kind {
    Read,
    Write,
    /// READ of one byte that was written: its answer proves the WRITEs before it.
    Probe(RemoteAddr),
    /// Requests of no bytes: they are done when those before them are.
    Nothing,
}

/// What goes and is answered as one.
#[derive(Clone, Copy, Debug)]
struct Message {
    kind: Kind,
    /// Requests in it.
    count: u32,
    /// Their bytes.
    bytes: u64,
    /// Its number, if it is a list.
    number: Option<u32>,
    /// Entries served, of a list that was refused in part.
    served: Option<u32>,
}

impl Message {
    fn head_len(&self) -> u64 {
        match (self.kind, self.number) {
            (Kind::Nothing, _) => 0,
            (_, None) => HEADER as u64,
            (_, Some(_)) => (HEADER + ENTRY * self.count as usize) as u64,
        }
    }

    fn wire_len(&self) -> u64 {
        self.head_len() + if self.kind == Kind::Write { self.bytes } else { 0 }
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Life {
    Up,
    /// Sends no more, and waits for the end of the peer's stream. `cause` is for the oldest request without an outcome.
    Closing {
        since: u64,
        cause: Option<(WcStatus, u32)>,
        deaf: bool,
        bounded: bool,
    },
    /// The socket is closed. `cause` is for the first request posted from now on.
    Dead {
        cause: Option<(WcStatus, u32)>,
    },
}

/// Why nothing more can be done with a socket.
enum Stop {
    /// Not now.
    Wait,
    /// Done with what there is; there may be more.
    Done,
    Failed(Trouble),
}

/// What went wrong.
#[derive(Clone, Copy)]
enum Trouble {
    /// The peer's end of the connection has ended.
    Ended(u32),
    /// The connection is of no use any more; the peer's end may live.
    Lost(u32),
    /// The peer says what it should not.
    Nonsense,
    /// The peer refused the oldest request.
    Refused(u32),
}

pub(super) struct Lane {
    fd: Option<OwnedFd>,
    pub(super) shared: Arc<LaneShared>,
    version: TcpVersion,
    requests: VecDeque<WorkRequest>,
    messages: VecDeque<Message>,
    /// Requests that are in messages.
    cut: usize,
    tx: usize,
    tx_at: u64,
    /// Requests before those of `messages[tx]`.
    tx_request: usize,
    rx: usize,
    rx_at: u64,
    rx_request: usize,
    status: [u8; LIST_STATUS],
    next_number: u32,
    moved_at: u64,
    life: Life,
    pub(super) watched: Interest,
}

impl Lane {
    pub(super) fn new(fd: OwnedFd, shared: Arc<LaneShared>, version: TcpVersion) -> Self {
        let depth = shared.requests.capacity();
        Self {
            fd: Some(fd),
            shared,
            version,
            requests: VecDeque::with_capacity(depth),
            messages: VecDeque::with_capacity(2 * depth),
            cut: 0,
            tx: 0,
            tx_at: 0,
            tx_request: 0,
            rx: 0,
            rx_at: 0,
            rx_request: 0,
            status: [0; LIST_STATUS],
            next_number: 0,
            moved_at: 0,
            life: Life::Up,
            watched: Interest { input: true, output: false },
        }
    }

    pub(super) fn fd(&self) -> Option<BorrowedFd<'_>> {
        self.fd.as_ref().map(AsFd::as_fd)
    }

    pub(super) fn is_outstanding(&self) -> bool {
        !self.requests.is_empty()
    }

    pub(super) fn interest(&self) -> Interest {
        Interest { input: true, output: self.life == Life::Up && self.tx < self.messages.len() }
    }

    /// Takes what was posted since the last call.
    pub(super) fn take_posts(&mut self, now: u64, done: &mut VecDeque<Completion>) {
        if self.requests.is_empty() {
            self.moved_at = now;
        }
        while let Some(request) = self.shared.requests.pop() {
            self.requests.push_back(request);
        }
        match self.life {
            Life::Up => self.cut_messages(done),
            Life::Closing { .. } => {}
            Life::Dead { ref mut cause } => {
                let cause = if self.requests.is_empty() { None } else { cause.take() };
                self.flush(cause, done);
            }
        }
    }

    fn cut_messages(&mut self, done: &mut VecDeque<Completion>) {
        let mut last_write = None;
        while let Some(first) = self.requests.get(self.cut) {
            let kind = match (first.len, first.op) {
                (0, _) => Kind::Nothing,
                (_, Op::Read) => Kind::Read,
                (_, Op::Write) => Kind::Write,
            };
            let mut message = Message { kind, count: 1, bytes: u64::from(first.len), number: None, served: None };
            if self.version == TcpVersion::Batch && kind != Kind::Nothing {
                let more = self.requests.iter().skip(self.cut + 1);
                for next in more.take_while(|next| next.len > 0 && next.op == first.op) {
                    let bytes = message.bytes + u64::from(next.len);
                    if message.count >= LIST_ENTRIES || bytes > LIST_BYTES {
                        break;
                    }
                    (message.count, message.bytes) = (message.count + 1, bytes);
                }
                message.number = Some(self.next_number);
                self.next_number = self.next_number.wrapping_add(1);
            }
            last_write = match kind {
                Kind::Write => Some(RemoteAddr(first.remote.0.wrapping_add(u64::from(first.len) - 1))),
                Kind::Nothing => last_write,
                _ => None,
            };
            self.cut += message.count as usize;
            self.messages.push_back(message);
        }
        if let (TcpVersion::V1, Some(at)) = (self.version, last_write) {
            self.messages.push_back(Message { kind: Kind::Probe(at), count: 0, bytes: 1, number: None, served: None });
        }
        self.retire_nothings(done);
    }

    /// Bytes of status before the data of a reply.
    fn status_len(&self) -> u64 {
        match self.version {
            TcpVersion::V1 => 0,
            TcpVersion::V2 => STATUS as u64,
            TcpVersion::Batch => LIST_STATUS as u64,
        }
    }

    /// Bytes of a reply: status, data.
    fn reply_len(&self, message: &Message, first: usize) -> (u64, u64) {
        let data = match (message.kind, message.served) {
            (Kind::Nothing, _) => return (0, 0),
            (Kind::Write, _) => 0,
            (Kind::Read | Kind::Probe(_), None) => message.bytes,
            (Kind::Read | Kind::Probe(_), Some(served)) => {
                self.requests.range(first..first + served as usize).map(|r| u64::from(r.len)).sum()
            }
        };
        (self.status_len(), data)
    }

    /// Moves what can be moved without waiting, within a budget; whether anything moved.
    pub(super) fn serve(
        &mut self,
        io: &mut Io,
        counters: &TcpCounters,
        now: u64,
        done: &mut VecDeque<Completion>,
    ) -> bool {
        let mut moved = false;
        let mut left = BUDGET;
        while self.life == Life::Up && self.tx < self.messages.len() && left > 0 {
            match self.send(io, counters, &mut left) {
                Stop::Done => moved = true,
                Stop::Wait => break,
                Stop::Failed(Trouble::Ended(errno)) => {
                    // Why it ended may still lie in our receive buffer: a refusal.
                    let cause = Some((WcStatus::RETRY_EXC_ERR, errno));
                    self.life = Life::Closing { since: now, cause, deaf: false, bounded: true };
                }
                Stop::Failed(trouble) => self.fail(trouble, now, done),
            }
        }
        let mut left = BUDGET;
        while self.fd.is_some() && left > 0 {
            match self.receive(io, counters, &mut left, done) {
                Ok((stop, any)) => {
                    moved |= any;
                    if matches!(stop, Stop::Wait) {
                        break;
                    }
                }
                Err(trouble) => self.fail(trouble, now, done),
            }
        }
        if let Life::Closing { cause, .. } = self.life
            && !self.has_written()
        {
            self.die(cause, done);
        }
        if moved {
            self.moved_at = now;
        }
        moved
    }

    /// Sends as much as one call takes.
    fn send(&mut self, io: &mut Io, counters: &TcpCounters, left: &mut usize) -> Stop {
        io.clear();
        let (mut skip, mut first) = (self.tx_at, self.tx_request);
        for message in self.messages.range(self.tx..) {
            let head = message.head_len();
            if io.bytes() >= *left || !io.has_room(head as usize) {
                break;
            }
            let requests = self.requests.range(first..first + message.count as usize);
            first += message.count as usize;
            if skip < head {
                add_head(io, message, requests.clone(), self.version, skip as usize);
            }
            let mut skipped = head;
            for request in requests {
                if message.kind != Kind::Write || io.bytes() >= *left || !io.has_room(0) {
                    break;
                }
                let from = skip.saturating_sub(skipped).min(u64::from(request.len));
                skipped += u64::from(request.len);
                io.add_span(Span::of_request(request, from, (*left - io.bytes()) as u64));
            }
            skip = 0;
        }
        let asked = io.bytes();
        if asked == 0 {
            // Only requests of no bytes, or none.
            self.advance(0);
            return Stop::Wait;
        }
        let Some(fd) = &self.fd else { return Stop::Wait };
        counters.sends.add(1);
        match io.send(fd.as_fd()) {
            Ok(sent) => {
                *left -= sent.min(*left);
                self.advance(sent as u64);
                if sent < asked { Stop::Wait } else { Stop::Done }
            }
            Err(e) if would_block(&e) => Stop::Wait,
            Err(e) => Stop::Failed(of_error(&e)),
        }
    }

    /// `n` more bytes are sent.
    fn advance(&mut self, mut n: u64) {
        while let Some(message) = self.messages.get(self.tx) {
            let left = message.wire_len() - self.tx_at;
            if n < left {
                self.tx_at += n;
                return;
            }
            n -= left;
            self.tx_request += message.count as usize;
            self.tx += 1;
            self.tx_at = 0;
        }
    }

    /// Receives as much as one call gives: statuses to be looked at, data right into its place.
    fn receive(
        &mut self,
        io: &mut Io,
        counters: &TcpCounters,
        left: &mut usize,
        done: &mut VecDeque<Completion>,
    ) -> Result<(Stop, bool), Trouble> {
        io.clear();
        let deaf = matches!(self.life, Life::Closing { deaf: true, .. });
        // A reply can be on its way as soon as its request's header is.
        let begun = self.tx + usize::from(self.tx_at > 0);
        let (mut got_already, mut first) = (self.rx_at, self.rx_request);
        for message in self.messages.range(self.rx.min(begun)..begun) {
            if deaf || io.bytes() >= *left || !io.has_room(LIST_STATUS + 1) {
                break;
            }
            let (status, data) = self.reply_len(message, first);
            io.add_scratch(status.saturating_sub(got_already) as usize);
            let mut skip = got_already.saturating_sub(status);
            if matches!(message.kind, Kind::Probe(_)) && skip == 0 {
                io.add_scratch(1);
            } else if message.kind == Kind::Read {
                let mut rest = data;
                for request in self.requests.range(first..first + message.count as usize) {
                    let len = u64::from(request.len).min(rest);
                    rest -= len;
                    let from = skip.min(len);
                    skip -= from;
                    let most = (*left).saturating_sub(io.bytes()) as u64;
                    if most == 0 || !io.has_room(0) {
                        break;
                    }
                    io.add_span(Span::of_request(request, from, (len - from).min(most)));
                }
            }
            first += message.count as usize;
            got_already = 0;
        }
        let expected = io.bytes() > 0;
        if !expected {
            io.add_scratch(if deaf { 4096 } else { 1 });
        }
        let asked = io.bytes();
        let Some(fd) = &self.fd else { return Ok((Stop::Wait, false)) };
        counters.receives.add(1);
        let got = match io.receive(fd.as_fd()) {
            Ok(0) => return Err(Trouble::Ended(libc::ECONNRESET as u32)),
            Ok(got) => got,
            Err(e) if would_block(&e) => return Ok((Stop::Wait, false)),
            Err(e) => return Err(of_error(&e)),
        };
        *left -= got.min(*left);
        if expected {
            self.take_replies(io, got as u64, done)?;
        } else if !deaf {
            return Err(Trouble::Nonsense);
        }
        Ok((if got < asked { Stop::Wait } else { Stop::Done }, true))
    }

    /// Walks over what was received as [`Lane::receive`] laid it out.
    fn take_replies(&mut self, io: &Io, mut got: u64, done: &mut VecDeque<Completion>) -> Result<(), Trouble> {
        let mut scratch = 0;
        while got > 0 {
            let Some(message) = self.messages.get(self.rx) else { return Ok(()) };
            let (status, data) = self.reply_len(message, self.rx_request);
            let probe = matches!(message.kind, Kind::Probe(_));
            if self.rx_at < status {
                let (from, to) = (self.rx_at as usize, (self.rx_at + got).min(status) as usize);
                self.status[from..to].copy_from_slice(io.scratch(scratch, to - from));
                scratch += status as usize - from;
                got -= (to - from) as u64;
                self.rx_at = to as u64;
                if self.rx_at < status {
                    return Ok(());
                }
                self.judge(done)?;
                continue;
            }
            let now = got.min(status + data - self.rx_at);
            scratch += if probe { now as usize } else { 0 };
            got -= now;
            self.rx_at += now;
            self.retire_answered(done)?;
        }
        Ok(())
    }

    /// The status of `messages[rx]` is complete.
    fn judge(&mut self, done: &mut VecDeque<Completion>) -> Result<(), Trouble> {
        let code = wire::parse_status(&self.status).ok_or(Trouble::Nonsense)?;
        let rx = self.rx;
        let Some(message) = self.messages.get_mut(rx) else { return Err(Trouble::Nonsense) };
        if let Some(number) = message.number {
            let (served, theirs) = wire::parse_list_status(&self.status);
            let all = served == message.count;
            if theirs != number && code <= REFUSED || served > message.count || (code == 0) != all {
                return Err(Trouble::Nonsense);
            }
            if code != 0 {
                message.served = Some(served);
            }
        } else if code != 0 {
            message.served = Some(0);
        }
        self.retire_answered(done)
    }

    /// Ends `messages[rx]`, and those before it, if its reply is complete.
    fn retire_answered(&mut self, done: &mut VecDeque<Completion>) -> Result<(), Trouble> {
        let Some(message) = self.messages.get(self.rx).copied() else { return Ok(()) };
        let (status, data) = self.reply_len(&message, self.rx_request);
        if self.rx_at < status + data {
            return Ok(());
        }
        if let Some(served) = message.served {
            let before = self.rx_request + served as usize;
            (0..before).for_each(|_| self.retire_one(done));
            let code = wire::parse_status(&self.status).unwrap_or(REFUSED);
            return Err(Trouble::Refused(code));
        }
        let requests = self.rx_request + message.count as usize;
        let messages = self.rx + 1;
        (0..requests).for_each(|_| self.retire_one(done));
        self.messages.drain(..messages);
        self.tx = self.tx.saturating_sub(messages);
        self.tx_request = self.tx_request.saturating_sub(requests);
        self.cut = self.cut.saturating_sub(requests);
        (self.rx, self.rx_at, self.rx_request) = (0, 0, 0);
        self.retire_nothings(done);
        Ok(())
    }

    /// The oldest request is done.
    fn retire_one(&mut self, done: &mut VecDeque<Completion>) {
        if let Some(request) = self.requests.pop_front().filter(|r| r.signaled) {
            done.push_back(self.outcome(&request, WcStatus::SUCCESS, 0));
        }
    }

    fn outcome(&self, request: &WorkRequest, status: WcStatus, vendor_err: u32) -> Completion {
        Completion { wr_id: request.wr_id, status, vendor_err, qpn: self.shared.qpn }
    }

    /// Moves `rx` to the next message that will be answered; ends requests of no bytes that have come to the front.
    fn retire_nothings(&mut self, done: &mut VecDeque<Completion>) {
        while self.messages.front().is_some_and(|m| m.kind == Kind::Nothing) {
            self.retire_one(done);
            self.messages.pop_front();
            self.tx = self.tx.saturating_sub(1);
            self.tx_request = self.tx_request.saturating_sub(1);
            self.cut = self.cut.saturating_sub(1);
            self.rx = self.rx.saturating_sub(1);
            self.rx_request = self.rx_request.saturating_sub(1);
        }
        while let Some(message) = self.messages.get(self.rx) {
            if self.reply_len(message, self.rx_request) != (0, 0) {
                break;
            }
            self.rx_request += message.count as usize;
            self.rx += 1;
        }
    }

    /// Whether bytes of a WRITE without an outcome may be at the peer.
    fn has_written(&self) -> bool {
        let partly = self.messages.get(self.tx).is_some_and(|m| self.tx_at > m.head_len());
        self.messages.iter().take(self.tx + usize::from(partly)).any(|m| m.kind == Kind::Write)
    }

    /// Something went wrong: from here on the lane is only wound up.
    fn fail(&mut self, trouble: Trouble, now: u64, done: &mut VecDeque<Completion>) {
        let (earlier, had_cause) = match self.life {
            Life::Dead { .. } => return,
            Life::Closing { cause, .. } => (cause, true),
            Life::Up => (None, false),
        };
        let own = match trouble {
            Trouble::Ended(errno) | Trouble::Lost(errno) => (WcStatus::RETRY_EXC_ERR, errno),
            Trouble::Nonsense => (WcStatus::REM_OP_ERR, libc::EPROTO as u32),
            Trouble::Refused(REFUSED) => (WcStatus::REM_ACCESS_ERR, REFUSED),
            Trouble::Refused(code) => (WcStatus::REM_OP_ERR, code),
        };
        let mut cause = if had_cause { earlier } else { Some(own) };
        let deaf = match trouble {
            Trouble::Ended(_) => return self.die(cause, done),
            Trouble::Lost(_) => {
                if self.has_written() {
                    self.shared.proves_nothing();
                }
                return self.die(cause, done);
            }
            Trouble::Refused(_) => {
                // It is known which one: it has its outcome now, and was never applied.
                if let Some(request) = self.requests.pop_front() {
                    done.push_back(self.outcome(&request, own.0, own.1));
                    cause = None;
                    // Messages are only asked from here on whether they were begun.
                    self.cut = self.cut.saturating_sub(1);
                }
                true
            }
            Trouble::Nonsense => true,
        };
        self.wind_up(cause, deaf, !matches!(trouble, Trouble::Refused(_)), now, done);
    }

    /// Sends no more; what was posted comes back when nothing of it can be applied any more.
    fn wind_up(
        &mut self,
        cause: Option<(WcStatus, u32)>,
        deaf: bool,
        bounded: bool,
        now: u64,
        done: &mut VecDeque<Completion>,
    ) {
        if self.requests.is_empty() || !self.has_written() {
            return self.die(cause, done);
        }
        if self.life == Life::Up
            && let Some(fd) = &self.fd
        {
            let _ = rustix::net::shutdown(fd, Shutdown::Write);
        }
        let (since, bounded) = match self.life {
            Life::Closing { since, bounded: before, .. } => (since, bounded || before),
            _ => (now, bounded),
        };
        self.life = Life::Closing { since, cause, deaf, bounded };
    }

    /// Closes the socket; everything outstanding has its outcome.
    fn die(&mut self, cause: Option<(WcStatus, u32)>, done: &mut VecDeque<Completion>) {
        self.fd = None;
        let idle = self.requests.is_empty();
        self.life = Life::Dead { cause: cause.filter(|_| idle) };
        self.flush(cause.filter(|_| !idle), done);
    }

    fn flush(&mut self, mut cause: Option<(WcStatus, u32)>, done: &mut VecDeque<Completion>) {
        while let Some(request) = self.requests.pop_front() {
            let (status, vendor) = cause.take().unwrap_or((WcStatus::WR_FLUSH_ERR, 0));
            done.push_back(self.outcome(&request, status, vendor));
        }
        self.messages.clear();
        (self.cut, self.tx, self.tx_at, self.tx_request) = (0, 0, 0, 0);
        (self.rx, self.rx_at, self.rx_request) = (0, 0, 0);
    }

    /// Control wants it in ERR.
    pub(super) fn enter_error(&mut self, now: u64, done: &mut VecDeque<Completion>) {
        if self.life == Life::Up {
            self.wind_up(None, false, false, now, done);
        }
    }

    /// Looks at the clock: too long without progress, or without the end of the peer's stream.
    pub(super) fn watch(&mut self, now: u64, patience: Patience, done: &mut VecDeque<Completion>) {
        if self.requests.is_empty() {
            return;
        }
        match self.life {
            Life::Up => {
                let waits_for_status = self.tx >= self.messages.len() && self.rx_at == 0;
                let most = if waits_for_status { patience.status_ms } else { patience.progress_ms };
                if now.saturating_sub(self.moved_at) > most {
                    let cause = Some((WcStatus::RETRY_EXC_ERR, libc::ETIMEDOUT as u32));
                    self.wind_up(cause, false, true, now, done);
                }
            }
            Life::Closing { since, cause, bounded: true, .. } if now.saturating_sub(since) > FAREWELL_MS => {
                self.shared.proves_nothing();
                self.die(cause, done);
            }
            Life::Closing { .. } | Life::Dead { .. } => {}
        }
    }

    /// Whether it ended while nothing was outstanding, so that no completion tells it.
    pub(super) fn died_idle(&self) -> bool {
        matches!(self.life, Life::Dead { cause: Some(_) })
    }

    pub(super) fn is_wanted_in_error(&self) -> bool {
        self.shared.to_error.load(Ordering::Acquire)
    }
}

/// Appends what stands before the bodies of a message, without its first `skip` bytes.
fn add_head<'a>(
    io: &mut Io,
    message: &Message,
    requests: impl Iterator<Item = &'a WorkRequest>,
    version: TcpVersion,
    skip: usize,
) {
    let write = message.kind == Kind::Write;
    let mut requests = requests.peekable();
    let ask = match (message.kind, message.number) {
        (_, Some(number)) => Ask::List { write, count: message.count, number, bytes: message.bytes },
        (Kind::Probe(addr), None) => Ask::One { write: false, status: false, addr: addr.0, len: 1 },
        (_, None) => {
            let addr = requests.peek().map_or(0, |r| r.remote.0);
            Ask::One { write, status: version != TcpVersion::V1, addr, len: message.bytes }
        }
    };
    io.add_bytes(ask.encode().get(skip..).unwrap_or_default());
    if message.number.is_some() {
        for (index, request) in requests.enumerate() {
            let entry = wire::entry(request.remote, u64::from(request.len));
            let from = skip.saturating_sub(HEADER + index * ENTRY);
            io.add_bytes(entry.get(from..).unwrap_or_default());
        }
    }
}

/// A reset tells that the peer's end is gone; anything else that it is out of reach.
fn of_error(error: &std::io::Error) -> Trouble {
    let errno = error.raw_os_error().unwrap_or(libc::EIO);
    match errno {
        libc::ECONNRESET | libc::EPIPE => Trouble::Ended(errno as u32),
        _ => Trouble::Lost(errno as u32),
    }
}
