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

mod receive;
mod send;

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use rustix::net::Shutdown;

use super::counters::TcpCounters;
use super::iov::Io;
use super::post::LaneShared;
use super::served::Interest;
use super::wire::{ENTRY, HEADER, LIST_STATUS, REFUSED};
use crate::nic::{Completion, TcpVersion, WcStatus, WorkRequest};
use crate::units::RemoteAddr;

/// Bytes moved for one lane in one poll, each way, before others have their turn.
const BUDGET: usize = 512 << 10;
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

    /// Moves what can be moved without waiting, within a budget; how many bytes. Looks for replies only where the socket was
    /// `reported`: right after sending there are none yet.
    pub(super) fn serve(
        &mut self,
        io: &mut Io,
        counters: &TcpCounters,
        now: u64,
        reported: bool,
        done: &mut VecDeque<Completion>,
    ) -> usize {
        let mut look = reported;
        let mut to_send = BUDGET;
        while self.life == Life::Up && self.tx < self.messages.len() && to_send > 0 {
            match self.send(io, counters, &mut to_send) {
                Stop::Done => {}
                Stop::Wait => break,
                Stop::Failed(Trouble::Ended(errno)) => {
                    // Why it ended may still lie in our receive buffer: a refusal.
                    let cause = Some((WcStatus::RETRY_EXC_ERR, errno));
                    self.life = Life::Closing { since: now, cause, deaf: false, bounded: true };
                    look = true;
                }
                Stop::Failed(trouble) => self.fail(trouble, now, done),
            }
        }
        let mut to_receive = BUDGET;
        while look && self.fd.is_some() && to_receive > 0 {
            match self.receive(io, counters, &mut to_receive, done) {
                Stop::Done => {}
                Stop::Wait => break,
                Stop::Failed(trouble) => self.fail(trouble, now, done),
            }
        }
        if let Life::Closing { cause, .. } = self.life
            && !self.has_written()
        {
            self.die(cause, done);
        }
        let moved = 2 * BUDGET - to_send - to_receive;
        if moved > 0 {
            self.moved_at = now;
        }
        moved
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

/// A reset tells that the peer's end is gone; anything else that it is out of reach.
fn of_error(error: &std::io::Error) -> Trouble {
    let errno = error.raw_os_error().unwrap_or(libc::EIO);
    match errno {
        libc::ECONNRESET | libc::EPIPE => Trouble::Ended(errno as u32),
        _ => Trouble::Lost(errno as u32),
    }
}
