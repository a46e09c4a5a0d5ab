//! The service thread of a NIC, `mr-shm`: lets peers in, tells them of regions, listens to the peers that were dialled,
//! and notices the end of either. It sleeps in poll(2) and never waits for one peer.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::attachment::{Attachment, gone};
use super::ledger::{SharedLanes, check_sealed};
use super::qp;
use super::table::{Cursor, Live, Next, Table, Watched};
use super::view::{Entry, Reach, View};
use super::wake::Wake;
use super::wire::{self, Kind, Line, Message, Process};
use crate::lanes::Retired;
use crate::region::backing::Mapping;

/// Peers attached at once.
pub const PEERS: usize = 1024;
/// Messages sent to or taken from one peer before the others have their turn.
const TURN: usize = 1024;
/// Bytes whose page tables are made between two looks at the sockets.
const POPULATE: usize = 32 << 20;
const PAGE: u64 = 4096;
/// Pause when no descriptor is left for a peer that comes.
const ACCEPT_AGAIN: Duration = Duration::from_millis(5);
/// The end of the thread waits so long for copies under way.
const STOP_WITHIN: Duration = Duration::from_secs(1);

/// What the NIC and its service thread share.
pub(super) struct Shared {
    pub(super) token: u64,
    pub(super) table: Table,
    pub(super) wake: Arc<Wake>,
    pub(super) stop: AtomicBool,
    /// Dialled attachments on their way to the thread.
    pub(super) links: Mutex<Vec<Link>>,
    pub(super) retired: Arc<qp::Retired>,
    /// The token in our own heap: what a peer reads to find out whether it may.
    pub(super) probe: Box<u64>,
}

/// A peer that attached to us.
struct Seat {
    socket: Line,
    watched: Arc<Watched>,
    cursor: Cursor,
    /// It has not read enough: wait until there is room.
    full: bool,
    /// Too many descriptors are on their way to peers of our user: tried again soon.
    choked: bool,
    /// It talked, or was too slow: it is told nothing more, and stays until it has hung up or ended. It may be copying.
    muted: bool,
}

/// Our end of an attachment: makes its views.
pub(super) struct Link {
    /// `None` for the attachment to ourselves, which reads our own table.
    pub(super) from: Source,
    process: Option<Arc<Process>>,
    attachment: Weak<Attachment>,
    regions: HashMap<u32, Entry>,
    told: u64,
    changed: bool,
    /// The connection of a peer that has ended, open until our last copy is over: closing it says so.
    ending: Option<Source>,
    retired: Vec<Retired<View>>,
    unpopulated: VecDeque<(Weak<Mapping>, usize)>,
}

/// Where a link hears of regions.
pub(super) enum Source {
    Peer(Line),
    Own(Cursor, Arc<Watched>),
    /// The peer has ended.
    Nobody,
}

impl Link {
    pub(super) fn new(from: Source, process: Option<Arc<Process>>, attachment: Weak<Attachment>) -> Self {
        let regions = HashMap::new();
        Self {
            from,
            process,
            attachment,
            regions,
            told: 0,
            changed: false,
            ending: None,
            retired: vec![],
            unpopulated: VecDeque::new(),
        }
    }

    /// Takes in one message of the peer. An error ends the connection.
    pub(super) fn hear(&mut self, message: &Message, files: &[OwnedFd]) -> io::Result<()> {
        self.heard_of(message.told);
        let reach = match (message.kind, files) {
            (Kind::Mapped, [file]) => self.map(message, file.as_fd()),
            (Kind::Foreign, []) => Reach::Foreign,
            (Kind::Revoked, []) => {
                self.changed |= self.regions.remove(&message.slot).is_some();
                return Ok(());
            }
            (Kind::Synced, []) => return Ok(()),
            _ => return Err(io::Error::new(io::ErrorKind::InvalidData, "a message out of place")),
        };
        self.learn(message.slot, message.generation, message.addr, message.len, reach);
        Ok(())
    }

    fn heard_of(&mut self, told: u64) {
        if told > 0 && told != self.told {
            (self.told, self.changed) = (told, true);
        }
    }

    fn learn(&mut self, slot: u32, generation: u32, addr: u64, len: u64, reach: Reach) {
        self.regions.insert(slot, Entry::new(slot, generation, addr, len, reach));
        self.changed = true;
    }

    fn map(&mut self, message: &Message, file: BorrowedFd<'_>) -> Reach {
        let shift = (message.offset % PAGE) as usize;
        let len = message.len as usize + shift;
        // A file that may shrink is as good as none.
        if check_sealed(file, message.offset + message.len).is_err() {
            return Reach::Refused(libc::EINVAL);
        }
        match Mapping::shared(file, message.offset - shift as u64, len, true) {
            Ok(map) => {
                // A child of ours has no business there, and would keep the peer's memory from going.
                map.advise(libc::MADV_DONTFORK);
                map.advise(libc::MADV_HUGEPAGE);
                let map = Arc::new(map);
                self.unpopulated.push_back((Arc::downgrade(&map), 0));
                Reach::Mapped { map, shift }
            }
            Err(e) => Reach::Refused(e.raw_os_error().unwrap_or(libc::ENOMEM)),
        }
    }

    /// Makes what was heard visible to copiers.
    pub(super) fn publish(&mut self, attachment: &Attachment) {
        if std::mem::take(&mut self.changed) {
            self.retired.push(attachment.publish(View::of(&self.regions, self.told)));
        }
        self.retired.retain_mut(|retired| !retired.is_over());
        if self.retired.is_empty() {
            self.ending = None;
        }
    }

    /// Makes page tables for a while; whether there is more to do.
    fn populate(&mut self) -> bool {
        if let Some((map, done)) = self.unpopulated.pop_front()
            && let Some(map) = map.upgrade()
        {
            map.populate(done, POPULATE);
            if done + POPULATE < map.len() {
                self.unpopulated.push_front((Arc::downgrade(&map), done + POPULATE));
            }
        }
        !self.unpopulated.is_empty()
    }

    /// Whether this thread must come back soon, though no descriptor says so.
    fn is_busy(&self) -> bool {
        !self.retired.is_empty()
    }

    fn end(&mut self, attachment: &Attachment) {
        attachment.set_dead();
        self.ending = Some(std::mem::replace(&mut self.from, Source::Nobody));
        // The mappings go at once: a dead peer's memory must not be kept by whoever forgets to look.
        self.regions.clear();
        self.unpopulated.clear();
        self.changed = true;
    }

    /// Reads what there is; false once the attachment is nobody's any more.
    fn turn(&mut self, shared: &Shared) -> bool {
        let Some(attachment) = self.attachment.upgrade() else {
            if let Source::Own(_, watched) = &self.from {
                shared.table.unwatch(watched);
            }
            return false;
        };
        for _ in 0..TURN {
            let heard = match &mut self.from {
                Source::Peer(socket) => match wire::receive(socket.as_fd()) {
                    Ok((message, files)) => self.hear(&message, &files),
                    Err(error) => Err(error),
                },
                Source::Own(cursor, _) => {
                    let next = shared.table.next(cursor);
                    let told = cursor.told_with(&next);
                    cursor.advance(&next);
                    self.heard_of(told);
                    match next {
                        Next::Change(slot, generation, Some(live)) => {
                            let addr = live.memory.addr() + live.offset;
                            self.learn(slot, generation, addr, live.len, Reach::Here);
                            Ok(())
                        }
                        Next::Change(slot, _, None) => {
                            self.changed |= self.regions.remove(&slot).is_some();
                            Ok(())
                        }
                        Next::Synced => Ok(()),
                        Next::Nothing => Err(io::ErrorKind::WouldBlock.into()),
                        Next::Lost => Err(io::ErrorKind::UnexpectedEof.into()),
                    }
                }
                Source::Nobody => break,
            };
            match heard {
                Ok(()) => {}
                Err(error) if gone(&error) => {
                    self.end(&attachment);
                    break;
                }
                Err(_) => break,
            }
        }
        if !matches!(self.from, Source::Nobody) && self.process.as_ref().is_some_and(|p| p.has_ended()) {
            self.end(&attachment);
        }
        self.publish(&attachment);
        true
    }
}

/// The thread's own.
pub(super) struct Service {
    shared: Arc<Shared>,
    listener: OwnedFd,
    seats: Vec<Seat>,
    links: Vec<Link>,
}

impl Service {
    pub(super) fn new(shared: Arc<Shared>, listener: OwnedFd) -> Self {
        Self { shared, listener, seats: vec![], links: vec![] }
    }

    /// Until the NIC is dropped.
    pub(super) fn run(mut self) {
        while !self.shared.stop.load(Ordering::Acquire) {
            self.links.append(&mut self.shared.links.lock().unwrap_or_else(PoisonError::into_inner));
            self.shared.retired.drop_all();
            let shared = self.shared.clone();
            self.links.retain_mut(|link| link.turn(&shared));
            self.seats.retain_mut(|seat| {
                if !seat.muted && tell(seat, &shared).is_err() {
                    seat.muted = true;
                    (seat.full, seat.choked) = (false, false);
                    let _ = rustix::net::shutdown(&seat.socket, rustix::net::Shutdown::Write);
                }
                let stays = !is_over(seat);
                if !stays {
                    seat.watched.dead.store(true, Ordering::Release);
                    shared.table.unwatch(&seat.watched);
                }
                stays
            });
            let populating = self.links.iter_mut().filter_map(|link| link.populate().then_some(())).count() > 0;
            self.sleep(populating);
        }
        let until = Instant::now() + STOP_WITHIN;
        for link in &mut self.links {
            let Some(attachment) = link.attachment.upgrade() else { continue };
            link.end(&attachment);
            link.publish(&attachment);
            while link.is_busy() && Instant::now() < until {
                std::thread::yield_now();
                link.publish(&attachment);
            }
        }
    }

    fn sleep(&mut self, populating: bool) {
        let busy = self.links.iter().any(Link::is_busy) || self.seats.iter().any(|seat| seat.choked);
        let nanos = if populating { 0 } else { 1_000_000 };
        let soon = populating || busy;
        let timeout = Timespec { tv_sec: i64::from(!soon), tv_nsec: if soon { nanos } else { 0 } };
        let input = |fd| PollFd::from_borrowed_fd(fd, PollFlags::IN);
        let mut fds = Vec::with_capacity(2 + 2 * (self.seats.len() + self.links.len()));
        fds.push(input(self.shared.wake.fd()));
        fds.push(input(self.listener.as_fd()));
        for seat in &self.seats {
            let flags = if seat.full { PollFlags::IN | PollFlags::OUT } else { PollFlags::IN };
            fds.push(PollFd::from_borrowed_fd(seat.socket.as_fd(), flags));
            fds.extend(seat.watched.process.iter().filter_map(|p| p.pidfd.as_ref()).map(|fd| input(fd.as_fd())));
        }
        for link in &self.links {
            let Source::Peer(socket) = &link.from else { continue };
            fds.push(input(socket.as_fd()));
            fds.extend(link.process.iter().filter_map(|p| p.pidfd.as_ref()).map(|fd| input(fd.as_fd())));
        }
        let _ = poll(&mut fds, Some(&timeout));
        let comes = !fds[1].revents().is_empty();
        drop(fds);
        self.shared.wake.clear();
        if comes {
            self.accept();
        }
    }

    fn accept(&mut self) {
        let flags = rustix::net::SocketFlags::CLOEXEC | rustix::net::SocketFlags::NONBLOCK;
        for _ in 0..16 {
            let socket = match rustix::net::accept_with(&self.listener, flags) {
                Ok(socket) => socket,
                Err(rustix::io::Errno::MFILE | rustix::io::Errno::NFILE | rustix::io::Errno::NOMEM) => {
                    // Whoever waits stays in the backlog, which would wake us at once.
                    std::thread::sleep(ACCEPT_AGAIN);
                    return;
                }
                Err(_) => return,
            };
            if self.seats.len() < PEERS {
                // Who cannot be served, or may not be, finds the connection closed.
                let _ = self.welcome(socket);
            }
        }
    }

    fn welcome(&mut self, socket: OwnedFd) -> io::Result<()> {
        let process = Process::behind(socket.as_fd())?;
        if !process.is_trusted() {
            return Ok(());
        }
        let (lanes, file) = SharedLanes::create()?;
        let dead = AtomicBool::new(false);
        let watched = Arc::new(Watched { lanes: Arc::new(lanes), dead, process: Some(process) });
        // Waited for from here on, before it can know of any region.
        let cursor = self.shared.table.watch(&watched);
        let probe: *const u64 = &raw const *self.shared.probe;
        let message = Message { addr: probe as u64, ..Message::of(Kind::Welcome) };
        let files = [self.shared.table.ledger_file.as_fd(), file.as_fd()];
        if let Err(error) = wire::send(socket.as_fd(), &message, &files) {
            self.shared.table.unwatch(&watched);
            return Err(error);
        }
        self.seats.push(Seat { socket: Line::new(socket), watched, cursor, full: false, choked: false, muted: false });
        Ok(())
    }
}

/// Tells a peer what it does not know yet, as far as it reads. An error ends the connection.
fn tell(seat: &mut Seat, shared: &Shared) -> io::Result<()> {
    // It has nothing to say: bytes are garbage, and the end is the end.
    match wire::receive(seat.socket.as_fd()) {
        Err(error) if !gone(&error) => {}
        Err(error) => return Err(error),
        Ok(_) => return Err(io::ErrorKind::InvalidData.into()),
    }
    (seat.full, seat.choked) = (false, false);
    for _ in 0..TURN {
        let next = shared.table.next(&mut seat.cursor);
        let told = seat.cursor.told_with(&next);
        let sent = match &next {
            Next::Change(slot, generation, live) => send_change(seat, *slot, *generation, live.as_ref(), told),
            Next::Synced => wire::send(seat.socket.as_fd(), &Message { told, ..Message::of(Kind::Synced) }, &[]),
            Next::Nothing => return Ok(()),
            Next::Lost => return Err(io::ErrorKind::TimedOut.into()),
        };
        match sent {
            Ok(()) => seat.cursor.advance(&next),
            Err(e) if e.raw_os_error() == Some(libc::ETOOMANYREFS) => {
                seat.choked = true;
                return Ok(());
            }
            Err(e) if !gone(&e) => {
                seat.full = true;
                return Ok(());
            }
            Err(e) => return Err(e),
        }
    }
    // More to tell: a socket with room comes back at once.
    seat.full = true;
    Ok(())
}

fn send_change(seat: &Seat, slot: u32, generation: u32, live: Option<&Live>, told: u64) -> io::Result<()> {
    let Some(live) = live else {
        return wire::send(seat.socket.as_fd(), &Message { slot, told, ..Message::of(Kind::Revoked) }, &[]);
    };
    let file = live.memory.shared_fd();
    let kind = if file.is_some() { Kind::Mapped } else { Kind::Foreign };
    let addr = live.memory.addr() + live.offset;
    let message = Message { kind, slot, generation, addr, len: live.len, offset: live.offset, told };
    wire::send(seat.socket.as_fd(), &message, file.as_slice())
}

/// Whether a peer copies no more: its end of the connection is closed, which it does after its last copy, or its process
/// has ended. What a muted peer says is thrown away.
fn is_over(seat: &Seat) -> bool {
    for _ in 0..16 {
        if !seat.muted {
            break;
        }
        match wire::receive(seat.socket.as_fd()) {
            Ok(_) => {}
            Err(e) if e.kind() == io::ErrorKind::InvalidData => {}
            Err(e) if gone(&e) => return true,
            Err(_) => break,
        }
    }
    seat.watched.process.as_ref().is_some_and(Process::has_ended)
}
