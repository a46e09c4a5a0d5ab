//! Who answers from inside an engine: one thread of low priority that sleeps in poll(2), and a few clients, each with one
//! question, one answer, and a bound on bytes and time.

use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::Weak;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::engine::Shared;

/// Clients served at a time; more wait in the kernel's queue.
const CLIENTS: usize = 16;
/// One that has asked for nothing by then makes room for another, if all places are taken.
const ASKS_WITHIN: Duration = Duration::from_millis(100);
/// nice(2) of the thread: who reads can wait, who moves bytes cannot.
const NICE: i32 = 10;

/// A way to ask and be answered. Its methods run on the desk's thread only, and none of them waits.
pub(super) trait Protocol: AsFd + Send + 'static {
    /// A connection.
    type Stream: Read + Write + AsFd;
    /// Bytes of a question; more are [`Protocol::too_long`].
    const QUESTION_MAX: usize;
    /// From being accepted to having the whole answer.
    const SERVED_WITHIN: Duration;

    /// The next client, and an answer for one that need not ask.
    fn accept(&self) -> io::Result<(Self::Stream, Option<Vec<u8>>)>;
    /// The answer to what was read so far; `None` while the question is not whole. Never empty.
    fn answer(&self, question: &[u8], shared: &Weak<Shared>) -> Option<Vec<u8>>;
    /// The answer to a question without end.
    fn too_long(&self) -> Vec<u8>;
    /// After the last byte of the answer. Whether to wait for the client to go, and to throw away what it still sends: a
    /// socket that is closed with unread bytes takes the answer with it.
    fn answered(&self, _stream: &Self::Stream) -> bool {
        false
    }
}

/// Serves until it is dropped.
pub(super) struct Desk {
    /// Its end wakes the thread.
    _stop: UnixStream,
}

impl Desk {
    pub(super) fn open(thread: &str, protocol: impl Protocol, shared: Weak<Shared>) -> io::Result<Self> {
        let (stop, stopped) = UnixStream::pair()?;
        std::thread::Builder::new().name(thread.into()).spawn(move || {
            // Without it, it is only a little more eager.
            let _ = rustix::process::setpriority_process(None, NICE);
            serve(&protocol, &stopped, &shared);
        })?;
        Ok(Self { _stop: stop })
    }
}

struct Client<S> {
    stream: S,
    since: Instant,
    question: Vec<u8>,
    /// Not empty once it has asked.
    answer: Vec<u8>,
    sent: usize,
    leaving: bool,
}

impl<S: Read + Write + AsFd> Client<S> {
    fn has_asked(&self) -> bool {
        !self.answer.is_empty()
    }

    fn wants(&self) -> PollFlags {
        if self.has_asked() && !self.leaving { PollFlags::OUT } else { PollFlags::IN }
    }

    /// Goes on as far as it can without waiting; whether there is more to do for it.
    fn step<C: Protocol<Stream = S>>(&mut self, protocol: &C, shared: &Weak<Shared>) -> io::Result<bool> {
        let mut piece = [0; 4096];
        if self.leaving {
            return Ok(self.stream.read(&mut piece)? > 0);
        }
        if !self.has_asked() {
            let room = C::QUESTION_MAX.min(piece.len());
            let count = self.stream.read(&mut piece[..room])?;
            self.question.extend_from_slice(&piece[..count]);
            if let Some(answer) = protocol.answer(&self.question, shared) {
                self.answer = answer;
            } else if self.question.len() >= C::QUESTION_MAX {
                self.answer = protocol.too_long();
            } else {
                return Ok(count > 0);
            }
        }
        while self.sent < self.answer.len() {
            let count = self.stream.write(&self.answer[self.sent..])?;
            if count == 0 {
                return Ok(false);
            }
            self.sent += count;
        }
        self.leaving = protocol.answered(&self.stream);
        Ok(self.leaving)
    }
}

fn serve<C: Protocol>(protocol: &C, stopped: &UnixStream, shared: &Weak<Shared>) {
    let mut clients: Vec<Client<C::Stream>> = Vec::new();
    loop {
        let now = Instant::now();
        clients.retain(|client| now < client.since + C::SERVED_WITHIN);
        if clients.len() >= CLIENTS
            && let Some(idle) = clients.iter().position(|c| !c.has_asked() && now >= c.since + ASKS_WITHIN)
        {
            clients.remove(idle);
        }
        let full = clients.len() >= CLIENTS;
        let patience = if full { ASKS_WITHIN } else { C::SERVED_WITHIN };
        let next = clients.iter().map(|client| client.since + patience).min();
        let wait = next.map(|next| next.saturating_duration_since(now).max(Duration::from_millis(1)));
        let wait = wait.and_then(|wait| Timespec::try_from(wait).ok());
        let mut fds = vec![PollFd::new(stopped, PollFlags::IN)];
        fds.extend(clients.iter().map(|client| PollFd::new(&client.stream, client.wants())));
        if !full {
            fds.push(PollFd::new(protocol, PollFlags::IN));
        }
        match poll(&mut fds, wait.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            // Nothing that could be mended from here.
            Err(_) => return,
        }
        let ready: Vec<bool> = fds.iter().map(|fd| !fd.revents().is_empty()).collect();
        drop(fds);
        if ready[0] {
            return;
        }
        let mut at = 0;
        clients.retain_mut(|client| {
            at += 1;
            !ready[at] || goes_on(client.step(protocol, shared))
        });
        if !full && ready.last() == Some(&true) {
            match protocol.accept() {
                Ok((stream, answer)) => clients.push(Client {
                    stream,
                    since: Instant::now(),
                    question: Vec::new(),
                    answer: answer.unwrap_or_default(),
                    sent: 0,
                    leaving: false,
                }),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                // Out of descriptors, most likely: they are the embedder's, so not at once again.
                Err(_) => std::thread::sleep(ASKS_WITHIN),
            }
        }
    }
}

fn goes_on(stepped: io::Result<bool>) -> bool {
    match stepped {
        Ok(more) => more,
        Err(error) => matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted),
    }
}
