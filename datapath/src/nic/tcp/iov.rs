//! Gathered sends and scattered receives. The island: nothing else in this folder is unsafe.
//!
//! A [`Span`] is a range of registered memory that may be touched now: made from a work request, whose addresses were
//! checked at the edge and whose region its Work keeps, or by a look-up in what is registered. An [`Io`] collects spans
//! and pieces of its own scratch memory and moves them with one system call.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr;

use super::ranges::Ranges;
use crate::nic::WorkRequest;

/// Pieces of one call at the most (UIO_MAXIOV).
pub(super) const PIECES: usize = 1024;

/// Payloads up to this many bytes are copied before they are sent.
const COPIED: usize = 512;

/// A piece of memory that a system call may read or write.
#[derive(Clone, Copy)]
pub(super) struct Span {
    addr: u64,
    len: usize,
}

impl Span {
    /// The local memory of a request from `from` on, at most `most` bytes.
    pub(super) fn of_request(request: &WorkRequest, from: u64, most: u64) -> Self {
        let len = u64::from(request.len).saturating_sub(from).min(most);
        Self { addr: request.local + from, len: len as usize }
    }

    /// Memory that a peer named, if it lies in what is registered for peers now.
    pub(super) fn registered(ranges: &Ranges, addr: u64, len: u64) -> Option<Self> {
        ranges.holds(addr, len).then_some(Self { addr, len: len as usize })
    }

    /// Copies what is there; as much as fits.
    fn get(self, into: &mut [u8]) {
        let len = into.len().min(self.len);
        // SAFETY: as in `put`: mapped and readable during this call, and no part of what `into` borrows.
        unsafe { ptr::copy_nonoverlapping(self.addr as *const u8, into.as_mut_ptr(), len) };
    }

    /// Copies `bytes` there; as many as fit.
    pub(super) fn put(self, bytes: &[u8]) {
        let len = bytes.len().min(self.len);
        // SAFETY: a span is mapped and writable as long as its maker promised, which covers this call; `bytes` is a
        // Rust borrow and so no registered memory.
        unsafe { ptr::copy_nonoverlapping(bytes.as_ptr(), self.addr as *mut u8, len) };
    }
}

/// Pieces for one system call, and scratch memory for headers, statuses and what is to be looked at before it finds
/// its place.
pub(super) struct Io {
    pieces: Vec<libc::iovec>,
    bytes: usize,
    scratch: Box<[u8]>,
    used: usize,
}

// SAFETY: the raw pointers in `pieces` are followed only inside `send` and `receive`, which empty the list; they never
// tie the value to a thread.
unsafe impl Send for Io {}

impl Io {
    pub(super) fn new(scratch: usize) -> Self {
        Self { pieces: Vec::with_capacity(PIECES), bytes: 0, scratch: vec![0; scratch].into_boxed_slice(), used: 0 }
    }

    /// Empties the list.
    pub(super) fn clear(&mut self) {
        self.pieces.clear();
        (self.bytes, self.used) = (0, 0);
    }

    /// Bytes in the list.
    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Whether another piece and `len` bytes of scratch fit.
    pub(super) fn has_room(&self, len: usize) -> bool {
        self.pieces.len() < PIECES && self.used + len <= self.scratch.len()
    }

    fn add(&mut self, addr: u64, len: usize) {
        self.bytes += len;
        match self.pieces.last_mut() {
            Some(last) if last.iov_base as u64 + last.iov_len as u64 == addr => last.iov_len += len,
            _ => self.pieces.push(libc::iovec { iov_base: addr as *mut libc::c_void, iov_len: len }),
        }
    }

    /// Appends registered memory.
    pub(super) fn add_span(&mut self, span: Span) {
        if span.len > 0 && self.pieces.len() < PIECES {
            self.add(span.addr, span.len);
        }
    }

    /// Appends registered memory that is to be sent. What is short is copied into the scratch, behind the header that mostly stands before it: that is
    /// one piece then, and takes less than two. Memory that its owner unmapped too early ends the process here, and not the connection.
    pub(super) fn add_payload(&mut self, span: Span) {
        if span.len == 0 || span.len > COPIED || !self.has_room(span.len) {
            return self.add_span(span);
        }
        let at = self.add_scratch(span.len);
        if let Some(place) = self.scratch.get_mut(at..at + span.len) {
            span.get(place);
        }
    }

    /// Appends `bytes`, copied; only where [`Io::has_room`].
    pub(super) fn add_bytes(&mut self, bytes: &[u8]) {
        let at = self.add_scratch(bytes.len());
        if let Some(place) = self.scratch.get_mut(at..at + bytes.len()) {
            place.copy_from_slice(bytes);
        }
    }

    /// Appends `len` bytes of scratch memory; only where [`Io::has_room`]. Returns where they are.
    pub(super) fn add_scratch(&mut self, len: usize) -> usize {
        let at = self.used;
        let len = len.min(self.scratch.len() - at);
        if len > 0 && self.pieces.len() < PIECES {
            self.used += len;
            self.add(self.scratch.as_ptr() as u64 + at as u64, len);
        }
        at
    }

    /// Scratch memory.
    pub(super) fn scratch(&self, at: usize, len: usize) -> &[u8] {
        self.scratch.get(at..at + len).unwrap_or_default()
    }

    fn message(&mut self) -> libc::msghdr {
        // SAFETY: msghdr is plain data for which zeros are a value: no name, no control message.
        let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
        message.msg_iov = self.pieces.as_mut_ptr();
        message.msg_iovlen = self.pieces.len() as _;
        message
    }

    /// Sends the list without waiting, and empties it, its scratch too. How many bytes went.
    pub(super) fn send(&mut self, to: BorrowedFd<'_>) -> io::Result<usize> {
        const FLAGS: i32 = libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT;
        let sent = if let [piece] = self.pieces[..] {
            // A call without a list of pieces is the shorter one.
            // SAFETY: the piece is scratch memory of ours or a span; spans were made in this poll of the queue, so what they name is
            // still registered, or kept by the Work of its request.
            unsafe { libc::send(to.as_raw_fd(), piece.iov_base, piece.iov_len, FLAGS) }
        } else {
            let message = self.message();
            // SAFETY: `message` names `pieces`, and each of them is as above.
            unsafe { libc::sendmsg(to.as_raw_fd(), &raw const message, FLAGS) }
        };
        self.clear();
        usize::try_from(sent).map_err(|_| io::Error::last_os_error())
    }

    /// Receives into the list without waiting, and empties it; the scratch stays to be read. 0 is the end of the stream.
    pub(super) fn receive(&mut self, from: BorrowedFd<'_>) -> io::Result<usize> {
        let got = if let [piece] = self.pieces[..] {
            // SAFETY: as in `send`; the piece may be written: scratch is borrowed mutably, a span is memory that peers or
            // devices write at any time, never a Rust borrow.
            unsafe { libc::recv(from.as_raw_fd(), piece.iov_base, piece.iov_len, libc::MSG_DONTWAIT) }
        } else {
            let mut message = self.message();
            // SAFETY: `message` names `pieces`, and each of them is as above.
            unsafe { libc::recvmsg(from.as_raw_fd(), &raw mut message, libc::MSG_DONTWAIT) }
        };
        self.clear();
        usize::try_from(got).map_err(|_| io::Error::last_os_error())
    }
}
