//! The files behind memory that peers of this host can map. Each takes a descriptor of the process for as long as the memory lives, and
//! sockets, devices and the embedder's own files need theirs: so memory has a share of them.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::process::{Resource, getrlimit};

/// Memory may hold one in this many of the descriptors that the process may have (RLIMIT_NOFILE, getrlimit(2)).
const SHARE: u64 = 4;

/// Places that are taken.
static TAKEN: AtomicU64 = AtomicU64::new(0);

/// The right to one more file.
#[derive(Debug)]
pub(super) struct Place(());

impl Place {
    /// `None`: memory has its share.
    pub(super) fn take() -> Option<Self> {
        let most = getrlimit(Resource::Nofile).current.map_or(u64::MAX, |limit| limit / SHARE);
        // From here on it is given back when it is dropped.
        let taken = TAKEN.fetch_add(1, Ordering::Relaxed);
        let place = Self(());
        (taken < most).then_some(place)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        TAKEN.fetch_sub(1, Ordering::Relaxed);
    }
}

/// A file with its place.
#[derive(Debug)]
pub(super) struct File {
    fd: OwnedFd,
    _place: Place,
}

impl File {
    pub(super) fn new(fd: OwnedFd, place: Place) -> Self {
        Self { fd, _place: place }
    }
}

impl AsFd for File {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}
