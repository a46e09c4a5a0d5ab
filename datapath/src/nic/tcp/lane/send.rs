//! The way out of a lane: requests into messages, messages into one gathered send.

use std::collections::VecDeque;
use std::os::fd::AsFd;

use super::{Kind, Lane, Message, Stop, of_error};
use crate::nic::tcp::counters::TcpCounters;
use crate::nic::tcp::iov::{Io, Span};
use crate::nic::tcp::served::would_block;
use crate::nic::tcp::wire::{self, Ask, ENTRY, HEADER};
use crate::nic::{Completion, Op, TcpVersion, WorkRequest};
use crate::units::RemoteAddr;

/// Bytes of one list at the most, if it has more than one entry: it is acknowledged as a whole, and credit must flow.
const LIST_BYTES: u64 = 256 << 10;
/// Entries of our lists at the most.
const LIST_ENTRIES: u32 = 256;
impl Lane {
    /// Cuts what was posted into messages.
    pub(super) fn cut_messages(&mut self, done: &mut VecDeque<Completion>) {
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

    /// Sends as much as one call takes.
    pub(super) fn send(&mut self, io: &mut Io, counters: &TcpCounters, left: &mut usize) -> Stop {
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
                io.add_payload(Span::of_request(request, from, (*left - io.bytes()) as u64));
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
