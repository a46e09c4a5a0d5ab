//! The way in: replies, in the order of their messages.

use std::collections::VecDeque;
use std::os::fd::AsFd;

use super::{Kind, Lane, Life, Message, Stop, Trouble, of_error};
use crate::nic::tcp::counters::TcpCounters;
use crate::nic::tcp::iov::{Io, Span};
use crate::nic::tcp::served::would_block;
use crate::nic::tcp::wire::{self, LIST_STATUS, REFUSED, STATUS};
use crate::nic::{Completion, TcpVersion};

impl Lane {
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

    /// Whether a request, or a part of one, is at the peer that has not answered it in full.
    fn expects_reply(&self) -> bool {
        self.rx < self.tx + usize::from(self.tx_at > 0)
    }

    /// Receives as much as one call gives: statuses to be looked at, data right into its place.
    pub(super) fn receive(
        &mut self,
        io: &mut Io,
        counters: &TcpCounters,
        left: &mut usize,
        done: &mut VecDeque<Completion>,
    ) -> Stop {
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
        let Some(fd) = &self.fd else { return Stop::Wait };
        counters.receives.add(1);
        let got = match io.receive(fd.as_fd()) {
            Ok(0) => return Stop::Failed(Trouble::Ended(libc::ECONNRESET as u32)),
            Ok(got) => got,
            Err(e) if would_block(&e) => return Stop::Wait,
            Err(e) => return Stop::Failed(of_error(&e)),
        };
        *left -= got.min(*left);
        if expected {
            if let Err(trouble) = self.take_replies(io, got as u64, done) {
                return Stop::Failed(trouble);
            }
        } else if !deaf {
            return Stop::Failed(Trouble::Nonsense);
        }
        // Where no more is to come yet, the next call would only say so: what comes all the same is reported.
        if got < asked || expected && !self.expects_reply() { Stop::Wait } else { Stop::Done }
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

    /// Moves `rx` to the next message that will be answered; ends requests of no bytes that have come to the front.
    pub(super) fn retire_nothings(&mut self, done: &mut VecDeque<Completion>) {
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
}
