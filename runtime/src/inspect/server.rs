//! The engine's end of the inspection socket: a request is a line, and so is the reply.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Weak};
use std::time::{Duration, SystemTime};

use moonrail_datapath::nic::shm::Credentials;

use super::desk::{Desk, Protocol};
use super::report::{refusal, report, without_times};
use super::{REPLY_MAX, Request, in_folder, make_folder};
use crate::engine::Shared;
use crate::log::Log;

/// A request is a word or two.
const REQUEST_MAX: usize = 256;
/// From being accepted to having the whole reply.
const SERVED_WITHIN: Duration = Duration::from_secs(2);
/// Engines of one process that can be told apart.
const ENGINES: u32 = 256;
/// A socket that nobody listens on and that is at least as old belongs to a process that has ended. A younger one may be about to be
/// listened on.
const STALE_AFTER: Duration = Duration::from_secs(10);

/// Serves until it is dropped; then the socket is gone.
pub(crate) struct Server {
    // The first to be dropped: nobody is served any more when the path goes.
    _desk: Desk,
    _path: Bound,
}

/// A path that a socket is bound to; removed when it is dropped.
struct Bound {
    path: PathBuf,
    /// Who made it: a forked child that drops its copy must not take its parent's socket away.
    process: u32,
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
        // From here on the path is removed, whatever happens.
        let bound = Bound { path, process };
        listener.set_nonblocking(true)?;
        Ok(Self { _desk: Desk::open("mr-inspect", Socket(listener), Arc::downgrade(shared))?, _path: bound })
    }
}

impl Drop for Bound {
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

/// Where questions come in over the socket.
struct Socket(UnixListener);

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Protocol for Socket {
    type Stream = UnixStream;
    const QUESTION_MAX: usize = REQUEST_MAX;
    const SERVED_WITHIN: Duration = SERVED_WITHIN;

    fn accept(&self) -> io::Result<(UnixStream, Option<Vec<u8>>)> {
        let (stream, _) = self.0.accept()?;
        stream.set_nonblocking(true)?;
        let stranger = !Credentials::behind(stream.as_fd())?.is_trusted();
        let answer = stranger.then(|| line(refusal("only the engine's own user and root may read it: use `sudo`")));
        Ok((stream, answer))
    }

    fn answer(&self, question: &[u8], shared: &Weak<Shared>) -> Option<Vec<u8>> {
        let end = question.iter().position(|byte| *byte == b'\n')?;
        Some(line(match (Request::parse(&question[..end]), shared.upgrade()) {
            (Ok(request), Some(shared)) => report(&shared, request),
            (Ok(_), None) => refusal("the engine is shutting down"),
            (Err(why), _) => refusal(&why),
        }))
    }

    fn too_long(&self) -> Vec<u8> {
        line(refusal("a request is one short line"))
    }
}

/// As a line of a size that readers take.
fn line(reply: serde_json::Value) -> Vec<u8> {
    let mut bytes = reply.to_string().into_bytes();
    if bytes.len() >= REPLY_MAX && reply["rails"].is_array() {
        bytes = without_times(reply).to_string().into_bytes();
    }
    if bytes.len() >= REPLY_MAX {
        bytes = refusal("the reply is too long; ask for less").to_string().into_bytes();
    }
    bytes.push(b'\n');
    bytes
}
