//! The handshake server: connections of peers and of whoever else connects. Each has one deadline for everything and a
//! limit on its bytes; none can hold up another.
//!
//! Two things are scarce, and who misuses one makes room for the others:
//!
//! ```text
//! places  `most` clients           the oldest that keeps us waiting goes: for its request, else for its reading the reply
//! memory  `held_max` bytes in all  the one that holds most goes: with a frame half sent, or a reply it does not read
//! ```
//!
//! Only a request that the brain has is never given up for another: it answers each, within its own deadlines.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, ErrorKind, Read, Write};
use std::net::Shutdown;

use mio::net::{TcpListener, TcpStream};
use mio::{Interest, Registry, Token};
use moonrail_datapath::units::Nanos;

use crate::brain::{ConnId, Event};
use crate::wire::{Frame, FrameDecoder, MessageType};

/// Bytes read from one connection in one turn: more than a usual request has, and so little that clients with large ones
/// take turns with everybody else.
pub(super) const READ_PER_TURN: usize = 32 << 10;
/// Bytes of half-sent requests and unread replies kept for all clients together.
const HELD_MAX: usize = 128 << 20;
/// That is this many times the longest frame if those are allowed to be so long.
const HELD_FRAMES: usize = 4;
/// Connections accepted in one turn.
const ACCEPTS_PER_TURN: usize = 256;
/// Wait before the listener is looked at again when there is no room.
const PAUSE: Nanos = Nanos::from_millis(10);
/// How long a client may take to close after the reply.
const LINGER: Nanos = Nanos::from_secs(2);

enum Stage {
    /// Its request is coming.
    Reading(FrameDecoder),
    /// The brain has it.
    Asked,
    /// The reply goes out.
    Writing(Vec<u8>, usize),
    /// Everything is sent; the client closes.
    Closing,
}

struct Client {
    stream: TcpStream,
    stage: Stage,
    deadline: Nanos,
    /// Bytes counted in [`Inbound::held`].
    held: usize,
}

impl Client {
    fn holds(&self) -> usize {
        match &self.stage {
            Stage::Reading(decoder) => decoder.held(),
            Stage::Writing(bytes, _) => bytes.capacity(),
            Stage::Asked | Stage::Closing => 0,
        }
    }
}

pub(super) struct Inbound {
    listener: TcpListener,
    listening: Token,
    clients: BTreeMap<u64, Client>,
    deadlines: BTreeSet<(Nanos, u64)>,
    /// Bytes that clients hold, all together, and may.
    held: usize,
    held_max: usize,
    next: u64,
    timeout: Nanos,
    most: usize,
    max_length: usize,
    /// The listener may have more; mio tells only once.
    pub(super) accept_more: bool,
    /// When to look at the listener again, although it told nothing new.
    accept_at: Option<Nanos>,
    /// Connections that may have more to read.
    pub(super) unread: BTreeSet<u64>,
}

impl Inbound {
    /// `listening` is the token of the listener; connections get numbers above `first`.
    pub(super) fn new(
        listener: TcpListener,
        listening: Token,
        first: u64,
        timeout: Nanos,
        most: usize,
        max_length: usize,
    ) -> Self {
        Self {
            listener,
            listening,
            clients: BTreeMap::new(),
            deadlines: BTreeSet::new(),
            held: 0,
            held_max: HELD_MAX.max(max_length.saturating_mul(HELD_FRAMES)),
            next: first,
            timeout,
            most: most.max(1),
            max_length,
            accept_more: false,
            accept_at: None,
            unread: BTreeSet::new(),
        }
    }

    pub(super) fn register(&mut self, registry: &Registry) -> io::Result<()> {
        registry.register(&mut self.listener, self.listening, Interest::READABLE)
    }

    pub(super) fn accept(&mut self, registry: &Registry, now: Nanos) {
        self.accept_more = true;
        for _ in 0..ACCEPTS_PER_TURN {
            let mut stream = match self.listener.accept() {
                Ok((stream, _)) => stream,
                Err(e) if e.kind() == ErrorKind::WouldBlock => {
                    self.accept_more = false;
                    return;
                }
                Err(e) if out_of_descriptors(&e) => {
                    if !self.make_room(registry) {
                        return self.pause(now);
                    }
                    continue;
                }
                // That client is gone already.
                Err(_) => continue,
            };
            if self.clients.len() >= self.most && !self.make_room(registry) {
                // Every client is being answered: this one is turned away and tries again.
                drop(stream);
                return self.pause(now);
            }
            let id = self.next;
            // Numbers rise by two: odd ones are connections of our own.
            self.next += 2;
            let _ = stream.set_nodelay(true);
            if registry.register(&mut stream, Token(id as usize), Interest::READABLE | Interest::WRITABLE).is_err() {
                continue;
            }
            let deadline = now.plus(self.timeout);
            self.deadlines.insert((deadline, id));
            let stage = Stage::Reading(FrameDecoder::new(self.max_length));
            self.clients.insert(id, Client { stream, stage, deadline, held: 0 });
        }
    }

    /// No room, and nobody to make any: looks again a little later.
    fn pause(&mut self, now: Nanos) {
        self.accept_more = false;
        self.accept_at = Some(now.plus(PAUSE));
    }

    /// Ends the oldest connection that has not sent a whole request, or else the oldest that does not take its reply.
    fn make_room(&mut self, registry: &Registry) -> bool {
        let oldest = |waits: fn(&Stage) -> bool| self.clients.iter().find(|(_, c)| waits(&c.stage)).map(|(id, _)| *id);
        let idle = oldest(|stage| matches!(stage, Stage::Reading(_) | Stage::Closing));
        let Some(id) = idle.or_else(|| oldest(|stage| matches!(stage, Stage::Writing(..)))) else { return false };
        self.close(registry, id);
        true
    }

    /// Counts what a client holds now; those that hold most go while all together hold too much.
    fn weigh(&mut self, registry: &Registry, id: u64) {
        let Some(client) = self.clients.get_mut(&id) else { return };
        let holds = client.holds();
        self.held = self.held - client.held + holds;
        client.held = holds;
        while self.held > self.held_max {
            let Some((largest, _)) = self.clients.iter().max_by_key(|(_, client)| client.held) else { return };
            self.close(registry, *largest);
        }
    }

    /// Reads from a connection, as far as this turn goes. Gives its request when it is whole.
    pub(super) fn read(&mut self, registry: &Registry, id: u64) -> Option<Event> {
        self.unread.remove(&id);
        let client = self.clients.get_mut(&id)?;
        let mut buffer = [0u8; 16 << 10];
        let mut taken = 0;
        let mut request: Option<Frame> = None;
        let ended = loop {
            if taken >= READ_PER_TURN {
                self.unread.insert(id);
                break false;
            }
            match client.stream.read(&mut buffer) {
                Ok(0) => break true,
                Ok(n) => {
                    taken += n;
                    if let Stage::Reading(decoder) = &mut client.stage {
                        match decoder.push(&buffer[..n]) {
                            Ok(Some(frame)) => {
                                client.stage = Stage::Asked;
                                request = Some(frame);
                            }
                            Ok(None) => {}
                            // Not our protocol: closed without a word, as stock engines do.
                            Err(_) => break true,
                        }
                    }
                }
                Err(e) if e.kind() == ErrorKind::WouldBlock => break false,
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(_) => break true,
            }
        };
        if ended && request.as_ref().is_some_and(|frame| frame.kind == MessageType::Connection) {
            // It waited in our backlog until its sender gave up: the queue pairs it names are gone, and what would be made
            // for it would replace a good connection.
            self.close(registry, id);
            return None;
        }
        // A client that sent its request and closed its sending half still waits for the reply.
        let waits = matches!(client.stage, Stage::Asked | Stage::Writing(..));
        if ended && !waits {
            self.close(registry, id);
        }
        self.weigh(registry, id);
        request.map(|frame| Event::Request { conn: ConnId(id), frame })
    }

    /// Sends the reply, as far as it goes now.
    pub(super) fn reply(&mut self, registry: &Registry, conn: ConnId, frame: &Frame, now: Nanos) {
        if let Some(client) = self.clients.get_mut(&conn.0) {
            client.stage = Stage::Writing(frame.encode(), 0);
            self.write(registry, conn.0, now);
            self.weigh(registry, conn.0);
        }
    }

    pub(super) fn write(&mut self, registry: &Registry, id: u64, now: Nanos) {
        let Some(client) = self.clients.get_mut(&id) else { return };
        let Stage::Writing(bytes, sent) = &mut client.stage else { return };
        while *sent < bytes.len() {
            match client.stream.write(&bytes[*sent..]) {
                Ok(0) => return self.close(registry, id),
                Ok(n) => *sent += n,
                Err(e) if e.kind() == ErrorKind::WouldBlock => return,
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(_) => return self.close(registry, id),
            }
        }
        // The client closes first: our close before its would reset the connection under unread bytes.
        client.stage = Stage::Closing;
        if client.stream.shutdown(Shutdown::Write).is_err() {
            return self.close(registry, id);
        }
        let deadline = client.deadline.min(now.plus(LINGER));
        self.deadlines.remove(&(client.deadline, id));
        client.deadline = deadline;
        self.deadlines.insert((deadline, id));
        self.unread.insert(id);
        self.weigh(registry, id);
    }

    pub(super) fn close(&mut self, registry: &Registry, id: u64) {
        if let Some(mut client) = self.clients.remove(&id) {
            self.held -= client.held;
            self.deadlines.remove(&(client.deadline, id));
            self.unread.remove(&id);
            let _ = registry.deregister(&mut client.stream);
        }
    }

    pub(super) fn expire(&mut self, registry: &Registry, now: Nanos) {
        self.accept_more |= self.accept_at.take_if(|at| *at <= now).is_some();
        while let Some((at, id)) = self.deadlines.first().copied() {
            if at > now {
                break;
            }
            self.close(registry, id);
        }
    }

    pub(super) fn next_deadline(&self) -> Option<Nanos> {
        self.deadlines.first().map(|(at, _)| *at).into_iter().chain(self.accept_at).min()
    }
}

fn out_of_descriptors(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EMFILE | libc::ENFILE | libc::ENOBUFS | libc::ENOMEM))
}
