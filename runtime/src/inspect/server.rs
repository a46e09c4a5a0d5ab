//! The engine's end of the inspection socket: one thread of low priority that sleeps in poll(2), and touches no core.

use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant, SystemTime};

use moonrail_datapath::nic::shm::Credentials;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::report::{refusal, report};
use super::{REPLY_MAX, Request, in_folder, make_folder};
use crate::engine::Shared;
use crate::log::Log;

/// Clients served at a time; more wait in the kernel's queue.
const CLIENTS: usize = 16;
/// A request is a word or two.
const REQUEST_MAX: usize = 256;
/// From being accepted to having the whole reply.
const SERVED_WITHIN: Duration = Duration::from_secs(2);
/// One that has asked for nothing by then makes room for another, if all places are taken.
const ASKS_WITHIN: Duration = Duration::from_millis(100);
/// Engines of one process that can be told apart.
const ENGINES: u32 = 256;
/// A socket that nobody listens on and that is at least as old belongs to a process that has ended. A younger one may be about to be
/// listened on.
const STALE_AFTER: Duration = Duration::from_secs(10);
/// nice(2) of the thread: who reads can wait, who moves bytes cannot.
const NICE: i32 = 10;

/// Serves until it is dropped; then the socket is gone.
pub(crate) struct Server {
    path: PathBuf,
    /// Who made it: a forked child that drops its copy must not take its parent's socket away.
    process: u32,
    /// Its end wakes the thread.
    _stop: UnixStream,
}

impl Server {
    /// `None` where it is switched off, or not possible: that is a warning, and the engine does without.
    pub(crate) fn start(shared: &Arc<Shared>) -> Option<Self> {
        let folders = &shared.settings.inspect;
        let mut why = Vec::new();
        for folder in folders {
            match Self::start_in(folder, shared) {
                Ok(server) => return Some(server),
                Err(error) => why.push(format!("{}: {error}", folder.display())),
            }
        }
        if !folders.is_empty() {
            warn(&shared.log, &why.join("; "));
        }
        None
    }

    fn start_in(folder: &Path, shared: &Arc<Shared>) -> io::Result<Self> {
        make_folder(folder)?;
        remove_stale(folder);
        let process = std::process::id();
        let (listener, path) = bind(folder, process)?;
        listener.set_nonblocking(true)?;
        let (stop, stopped) = UnixStream::pair()?;
        let server = Self { path, process, _stop: stop };
        let shared = Arc::downgrade(shared);
        std::thread::Builder::new().name("mr-inspect".into()).spawn(move || {
            // Without it, it is only a little more eager.
            let _ = rustix::process::setpriority_process(None, NICE);
            serve(&listener, &stopped, &shared);
        })?;
        Ok(server)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if std::process::id() == self.process {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

fn warn(log: &Log, why: &str) {
    log.warning(format!(
        "this engine cannot be read by `moonrail incidents`, no socket: {why}; name a folder in {}, or switch it off there",
        super::VARIABLE
    ));
}

/// A socket under the first number that is free.
fn bind(folder: &Path, process: u32) -> io::Result<(UnixListener, PathBuf)> {
    for number in 0..ENGINES {
        let path = folder.join(format!("{process}-{number}.sock"));
        match UnixListener::bind(&path) {
            Ok(listener) => return Ok((listener, path)),
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => {}
            Err(error) => return Err(error),
        }
    }
    Err(io::Error::other(format!("{ENGINES} sockets of this process are there already")))
}

/// Removes what processes left behind that were killed.
fn remove_stale(folder: &Path) {
    for path in in_folder(folder) {
        let age = std::fs::symlink_metadata(&path).and_then(|found| found.modified()).ok();
        let old =
            age.and_then(|made| SystemTime::now().duration_since(made).ok()).is_some_and(|age| age >= STALE_AFTER);
        let refused = |error: io::Error| error.kind() == io::ErrorKind::ConnectionRefused;
        if old && UnixStream::connect(&path).is_err_and(refused) {
            let _ = std::fs::remove_file(&path);
        }
    }
}

struct Client {
    stream: UnixStream,
    since: Instant,
    request: Vec<u8>,
    /// Not empty once it has asked.
    reply: Vec<u8>,
    sent: usize,
}

impl Client {
    fn new(stream: UnixStream) -> io::Result<Self> {
        stream.set_nonblocking(true)?;
        let mut client = Self { stream, since: Instant::now(), request: Vec::new(), reply: Vec::new(), sent: 0 };
        if !Credentials::behind(client.stream.as_fd())?.is_trusted() {
            client.answer(&refusal("only the engine's own user and root may read it: use `sudo`"));
        }
        Ok(client)
    }

    fn answer(&mut self, reply: &serde_json::Value) {
        self.reply = reply.to_string().into_bytes();
        if self.reply.len() >= REPLY_MAX {
            self.reply = refusal("the reply is too long; ask for less").to_string().into_bytes();
        }
        self.reply.push(b'\n');
    }

    fn has_asked(&self) -> bool {
        !self.reply.is_empty()
    }

    fn wants(&self) -> PollFlags {
        if self.has_asked() { PollFlags::OUT } else { PollFlags::IN }
    }

    /// Goes on as far as it can without waiting; whether there is more to do for it.
    fn step(&mut self, shared: &Weak<Shared>) -> io::Result<bool> {
        if !self.has_asked() {
            let mut piece = [0; REQUEST_MAX];
            let count = self.stream.read(&mut piece)?;
            self.request.extend_from_slice(&piece[..count]);
            if let Some(end) = self.request.iter().position(|byte| *byte == b'\n') {
                let reply = match (Request::parse(&self.request[..end]), shared.upgrade()) {
                    (Ok(request), Some(shared)) => report(&shared, request),
                    (Ok(_), None) => refusal("the engine is shutting down"),
                    (Err(why), _) => refusal(&why),
                };
                self.answer(&reply);
            } else if self.request.len() >= REQUEST_MAX {
                self.answer(&refusal("a request is one short line"));
            } else {
                return Ok(count > 0);
            }
        }
        while self.sent < self.reply.len() {
            let count = self.stream.write(&self.reply[self.sent..])?;
            if count == 0 {
                return Ok(false);
            }
            self.sent += count;
        }
        Ok(false)
    }
}

fn serve(listener: &UnixListener, stopped: &UnixStream, shared: &Weak<Shared>) {
    let mut clients: Vec<Client> = Vec::new();
    loop {
        let now = Instant::now();
        clients.retain(|client| now < client.since + SERVED_WITHIN);
        if clients.len() >= CLIENTS
            && let Some(idle) = clients.iter().position(|c| !c.has_asked() && now >= c.since + ASKS_WITHIN)
        {
            clients.remove(idle);
        }
        let full = clients.len() >= CLIENTS;
        let patience = if full { ASKS_WITHIN } else { SERVED_WITHIN };
        let next = clients.iter().map(|client| client.since + patience).min();
        let wait = next.map(|next| next.saturating_duration_since(now).max(Duration::from_millis(1)));
        let wait = wait.and_then(|wait| Timespec::try_from(wait).ok());
        let mut fds = vec![PollFd::new(stopped, PollFlags::IN)];
        fds.extend(clients.iter().map(|client| PollFd::new(&client.stream, client.wants())));
        if !full {
            fds.push(PollFd::new(listener, PollFlags::IN));
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
            !ready[at] || goes_on(client.step(shared))
        });
        if !full && ready.last() == Some(&true) {
            match listener.accept() {
                Ok((stream, _)) => clients.extend(Client::new(stream).ok()),
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
