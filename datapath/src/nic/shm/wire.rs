//! What goes over the socket of an attachment: messages of one size, some with descriptors, from the owner only.
//!
//! ```text
//!  bytes  0..4  kind    4..8  version   8..12 slot    12..16 generation
//!        16..24 addr   24..32 len      32..40 offset in the file   40..48 changes told   little-endian
//! ```

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::time::Instant;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags, SocketType, recvmsg, sendmsg,
};

/// Raised when the messages or the ledger change.
pub(super) const VERSION: u32 = 1;
const SIZE: usize = 48;

/// What a message says.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Kind {
    /// The first: files of the ledger and of this peer's lanes; `addr` holds the token, in the owner's own memory.
    Welcome,
    /// A region in the file that comes with it.
    Mapped,
    /// A region that the owner borrowed: reached by system calls.
    Foreign,
    /// The region is no more.
    Revoked,
    /// Everything registered before the connection has been told.
    Synced,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Message {
    pub(super) kind: Kind,
    pub(super) slot: u32,
    pub(super) generation: u32,
    pub(super) addr: u64,
    pub(super) len: u64,
    pub(super) offset: u64,
    /// Changes of the ledger that have been told with this one; 0 before [`Kind::Synced`].
    pub(super) told: u64,
}

impl Message {
    pub(super) const fn of(kind: Kind) -> Self {
        Self { kind, slot: 0, generation: 0, addr: 0, len: 0, offset: 0, told: 0 }
    }

    fn encode(&self) -> [u8; SIZE] {
        let mut bytes = [0; SIZE];
        for (at, word) in [self.kind as u32 + 1, VERSION, self.slot, self.generation].into_iter().enumerate() {
            bytes[4 * at..4 * at + 4].copy_from_slice(&word.to_le_bytes());
        }
        for (at, word) in [self.addr, self.len, self.offset, self.told].into_iter().enumerate() {
            bytes[16 + 8 * at..24 + 8 * at].copy_from_slice(&word.to_le_bytes());
        }
        bytes
    }

    fn decode(bytes: &[u8; SIZE]) -> Option<Self> {
        let word = |at: usize| {
            let mut word = [0; 8];
            word.copy_from_slice(&bytes[at..at + 8]);
            u64::from_le_bytes(word)
        };
        let half = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        let kinds = [Kind::Welcome, Kind::Mapped, Kind::Foreign, Kind::Revoked, Kind::Synced];
        let kind = *kinds.get((half(0) as usize).checked_sub(1)?)?;
        if half(4) != VERSION {
            return None;
        }
        let message = Self {
            kind,
            slot: half(8),
            generation: half(12),
            addr: word(16),
            len: word(24),
            offset: word(32),
            told: word(40),
        };
        let in_reach = (message.slot as usize) < super::ledger::SLOTS
            && message.addr.checked_add(message.len).is_some()
            && message.offset.checked_add(message.len).is_some_and(|end| isize::try_from(end).is_ok());
        in_reach.then_some(message)
    }
}

/// The name at which the NIC with this token is found.
pub(super) fn address(token: u64) -> io::Result<SocketAddrUnix> {
    Ok(SocketAddrUnix::new_abstract_name(format!("moonrail-shm-{token:016x}").as_bytes())?)
}

/// A socket whose messages keep their limits and whose end is seen.
pub(super) fn socket() -> io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    Ok(rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?)
}

/// Sends without waiting; `WouldBlock` when the peer has not read enough.
pub(super) fn send(socket: BorrowedFd<'_>, message: &Message, files: &[BorrowedFd<'_>]) -> io::Result<()> {
    let bytes = message.encode();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !files.is_empty() && !control.push(SendAncillaryMessage::ScmRights(files)) {
        return Err(io::Error::from_raw_os_error(libc::EINVAL));
    }
    let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
    match sendmsg(socket, &[IoSlice::new(&bytes)], &mut control, flags)? {
        SIZE => Ok(()),
        _ => Err(io::Error::from_raw_os_error(libc::EMSGSIZE)),
    }
}

/// What is there, without waiting. `UnexpectedEof`: the peer is gone. `InvalidData`: not one of these messages.
pub(super) fn receive(socket: BorrowedFd<'_>) -> io::Result<(Message, Vec<OwnedFd>)> {
    let mut bytes = [0; SIZE];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
    let got = recvmsg(socket, &mut [IoSliceMut::new(&mut bytes)], &mut control, flags)?;
    let mut files = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(more) = message {
            files.extend(more);
        }
    }
    if got.bytes == 0 {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    if got.bytes != SIZE || got.flags.intersects(ReturnFlags::TRUNC | ReturnFlags::CTRUNC) {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "a message of another size"));
    }
    let message = Message::decode(&bytes)
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "a message this version does not know"))?;
    Ok((message, files))
}

/// As [`receive`], waiting until `until` at the latest (`TimedOut`).
pub(super) fn receive_until(socket: BorrowedFd<'_>, until: Instant) -> io::Result<(Message, Vec<OwnedFd>)> {
    loop {
        match receive(socket) {
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
            Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
            other => return other,
        }
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        let timeout = Timespec { tv_sec: left.as_secs() as i64, tv_nsec: i64::from(left.subsec_nanos()) };
        let _ = poll(&mut [PollFd::from_borrowed_fd(socket, PollFlags::IN)], Some(&timeout));
    }
}

/// Our end of a connection. Dropping it hangs up, even where a forked child holds a copy of the descriptor.
pub(super) struct Line(OwnedFd);

impl Line {
    pub(super) fn new(socket: OwnedFd) -> Self {
        Self(socket)
    }
}

impl AsFd for Line {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        let _ = rustix::net::shutdown(&self.0, rustix::net::Shutdown::Both);
    }
}

/// Who made or listens on the other end of a unix socket, as the kernel vouches for it (unix(7), SO_PEERCRED).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Credentials {
    /// The process; 0 where it is not visible from our pid namespace.
    pub pid: i32,
    /// Its effective user.
    pub uid: u32,
}

impl Credentials {
    /// Asks the kernel; any thread.
    ///
    /// # Errors
    /// What getsockopt(2) says of a descriptor that is no unix socket.
    pub fn behind(socket: BorrowedFd<'_>) -> io::Result<Self> {
        let mut who = libc::ucred { pid: 0, uid: 0, gid: 0 };
        option(socket, libc::SO_PEERCRED, &mut who)?;
        Ok(Self { pid: who.pid, uid: who.uid })
    }

    /// Whether it is our own user, or root.
    pub fn is_trusted(self) -> bool {
        self.uid == rustix::process::geteuid().as_raw() || self.uid == 0
    }
}

/// The process at the other end of a unix socket.
#[derive(Debug)]
pub(super) struct Process {
    /// 0 where it is not visible from our pid namespace.
    pub(super) pid: i32,
    pub(super) uid: u32,
    /// Readable once the process has ended.
    pub(super) pidfd: Option<OwnedFd>,
}

impl Process {
    pub(super) fn behind(socket: BorrowedFd<'_>) -> io::Result<Self> {
        let who = Credentials::behind(socket)?;
        // Linux 6.5 gives the descriptor itself; before, a pid may in theory have gone to another process meanwhile.
        const SO_PEERPIDFD: libc::c_int = 77;
        let mut fd: libc::c_int = -1;
        let pidfd = match option(socket, SO_PEERPIDFD, &mut fd) {
            // SAFETY: the kernel has just made this descriptor for us.
            Ok(()) if fd >= 0 => Some(unsafe { OwnedFd::from_raw_fd(fd) }),
            _ => rustix::process::Pid::from_raw(who.pid)
                .and_then(|pid| rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty()).ok()),
        };
        Ok(Self { pid: who.pid, uid: who.uid, pidfd })
    }

    /// Whether it has ended, as far as it can be seen.
    pub(super) fn has_ended(&self) -> bool {
        self.pidfd.as_ref().is_some_and(|fd| is_readable(fd.as_fd()))
    }

    /// Whether we let it at our memory, and it us: the same user, or root.
    pub(super) fn is_trusted(&self) -> bool {
        Credentials { pid: self.pid, uid: self.uid }.is_trusted()
    }
}

fn option<T: Copy>(socket: BorrowedFd<'_>, name: libc::c_int, into: &mut T) -> io::Result<()> {
    let mut len = size_of::<T>() as libc::socklen_t;
    // SAFETY: `into` has room for `len` bytes, and both values used here (ucred, int) are valid for any bits.
    let result = unsafe {
        libc::getsockopt(socket.as_raw_fd(), libc::SOL_SOCKET, name, std::ptr::from_mut(into).cast(), &raw mut len)
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Whether a read would not wait, now.
pub(super) fn is_readable(fd: BorrowedFd<'_>) -> bool {
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    let mut fds = [PollFd::from_borrowed_fd(fd, PollFlags::IN)];
    poll(&mut fds, Some(&now)).is_ok_and(|ready| ready > 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_survive_the_way_and_garbage_does_not() {
        let message = Message { slot: 3, generation: 4, addr: 5, len: 6, offset: 4096, ..Message::of(Kind::Mapped) };
        assert_eq!(Message::decode(&message.encode()), Some(message));
        for (at, value) in [(0, 0), (0, 9), (4, 9), (10, 255), (31, 255), (39, 255)] {
            let mut bytes = message.encode();
            bytes[at] = value;
            assert_eq!(Message::decode(&bytes), None, "byte {at} = {value}");
        }
    }
}
