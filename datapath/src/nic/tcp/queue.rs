//! A core's queue: one epoll instance with everything this NIC does on that core.
//!
//! ```text
//!   poll:  mail ──▶ lanes that were posted to, lanes and connections that are new, lanes that go
//!          epoll_wait(0) ──▶ lanes and served connections that can move; the listener; the eventfd
//!          clock ──▶ time-outs, only while something can time out
//! ```
//! Level-triggered: what a poll leaves undone is reported again, behind the others. Mail comes first, so that a lane
//! that control destroyed touches no memory any more. Sockets are touched nowhere but here.

mod serve;

use std::collections::VecDeque;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use crossbeam_queue::ArrayQueue;
use rustix::event::epoll::{self, CreateFlags, Event, EventData, EventFlags};

use super::Shared;
use super::counters::TcpCounters;
use super::iov::Io;
use super::lane::Lane;
use super::post::LaneShared;
use super::ranges::View;
use super::served::{Interest, STAGE, Served};
use super::slab::Slab;
use crate::limits::QP_SLOTS;
use crate::nic::{AsyncEvent, Completion, CompletionQueue, TcpVersion};

/// Connections whose events are taken with one call. What is reported is served, or those behind would never be: the
/// system puts what was reported and is still ready to the end of its list, in order.
const EVENTS: usize = 8;
/// Calls in one poll at the most.
const ROUNDS: usize = 8;
/// Bytes after which a poll takes no more events, so that the core's other NICs have their turn.
const POLL_BYTES: usize = 1 << 20;
/// With nothing under way the sockets are looked at once in this many polls.
const IDLE_POLLS: u64 = 64;
/// How often time-outs are looked at, in milliseconds.
const WATCH_MS: u64 = 20;
/// A connection whose session ended is closed after this, whether its client has gone or not.
const LINGER_MS: u64 = 2_000;
/// Letters a queue holds: a lane's arrival and one word of it, each; and fresh connections.
const MAIL: usize = 3 * QP_SLOTS;

/// What others leave for a queue.
pub(super) enum Mail {
    /// A lane was dialled.
    Lane { fd: OwnedFd, shared: Arc<LaneShared>, version: TcpVersion },
    /// A connection was accepted for this core.
    Serve(OwnedFd),
    /// A lane was posted to, is wanted in ERR, or is gone.
    Look(Arc<LaneShared>),
}

/// What others know of a queue.
pub(super) struct QueueShared {
    mail: ArrayQueue<Mail>,
    /// A letter did not fit: all lanes are looked at.
    overflow: AtomicBool,
    /// The queue is gone; nobody reads letters.
    closed: AtomicBool,
    wake: OwnedFd,
    /// Connections served here.
    pub(super) serving: AtomicUsize,
    pub(super) counters: TcpCounters,
}

impl QueueShared {
    /// Leaves a letter. The queue finds it in its next poll; [`QueueShared::ring`] wakes a sleeping core for it.
    pub(super) fn send(&self, mail: Mail) {
        if self.try_send(mail).is_err() {
            self.overflow.store(true, Ordering::Release);
        }
    }

    /// As [`QueueShared::send`], and gives the letter back if there is no room.
    pub(super) fn try_send(&self, mail: Mail) -> Result<(), Mail> {
        self.mail.push(mail)?;
        if self.closed.load(Ordering::SeqCst) {
            self.forget();
        }
        Ok(())
    }

    /// Drops all letters: lanes know their queue, and a letter that is kept would keep both for ever.
    fn forget(&self) {
        while self.mail.pop().is_some() {}
    }

    /// Whether its core seems to turn: nobody hands a connection to one that hangs.
    pub(super) fn reads_mail(&self) -> bool {
        self.mail.is_empty()
    }

    pub(super) fn ring(&self) {
        // Full means that it is readable already.
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
    }
}

/// Whose event it is: two bits of kind, then the number in the slab with its generation.
const LISTENER: u64 = 0;
const WAKE: u64 = 1;
const LANE: u64 = 2 << 62;
const SERVED: u64 = 1 << 62;

pub(super) struct TcpQueue {
    nic: Arc<Shared>,
    own: Arc<QueueShared>,
    epoll: OwnedFd,
    depth: u32,
    lanes: Slab<Lane>,
    served: Slab<Served>,
    /// Lanes with requests outstanding, at the last look.
    waiting: usize,
    /// Served connections whose session ended.
    ending: usize,
    done: VecDeque<Completion>,
    view: View,
    io: Io,
    polls: u64,
    /// Times a connection was served: which was idle longest.
    uses: u64,
    /// The next poll looks at the sockets whatever it thinks.
    look: bool,
    /// Served something since the last question.
    did: usize,
    /// Bytes moved in this poll.
    moved: usize,
    now: u64,
    watch_at: u64,
    /// The listener is not watched until then.
    paused_until: Option<u64>,
}

impl TcpQueue {
    pub(super) fn new(nic: Arc<Shared>, depth: u32) -> io::Result<(Self, Arc<QueueShared>)> {
        let flags = rustix::event::EventfdFlags::NONBLOCK | rustix::event::EventfdFlags::CLOEXEC;
        let own = Arc::new(QueueShared {
            mail: ArrayQueue::new(MAIL),
            overflow: AtomicBool::new(false),
            closed: AtomicBool::new(false),
            wake: rustix::event::eventfd(0, flags)?,
            serving: AtomicUsize::new(0),
            counters: TcpCounters::default(),
        });
        let epoll = epoll::create(CreateFlags::CLOEXEC)?;
        epoll::add(&epoll, &own.wake, EventData::new_u64(WAKE), EventFlags::IN)?;
        let queue = Self {
            view: nic.registry.reader(),
            nic,
            own: own.clone(),
            epoll,
            depth,
            lanes: Slab::new(),
            served: Slab::new(),
            waiting: 0,
            ending: 0,
            done: VecDeque::with_capacity(depth as usize),
            io: Io::new(STAGE + 4096),
            polls: 0,
            uses: 0,
            look: true,
            did: 0,
            moved: 0,
            now: clock_ms(),
            watch_at: 0,
            paused_until: None,
        };
        queue.watch_listener()?;
        Ok((queue, own))
    }

    fn watch_listener(&self) -> io::Result<()> {
        let flags = EventFlags::IN | EventFlags::EXCLUSIVE;
        Ok(epoll::add(&self.epoll, &self.nic.listener, EventData::new_u64(LISTENER), flags)?)
    }

    fn take_done(&mut self, out: &mut [Completion]) -> usize {
        let n = out.len().min(self.done.len());
        for (place, completion) in out.iter_mut().zip(self.done.drain(..n)) {
            *place = completion;
        }
        n
    }

    /// Everything there is to do now, within bounds.
    fn turn(&mut self) -> io::Result<()> {
        self.polls += 1;
        let timed = self.waiting > 0 || self.ending > 0 || self.paused_until.is_some();
        let busy =
            timed || !self.own.mail.is_empty() || !self.served.is_empty() || self.own.overflow.load(Ordering::Relaxed);
        if !busy && !self.look && !self.polls.is_multiple_of(IDLE_POLLS) {
            return Ok(());
        }
        self.look = false;
        if busy {
            self.now = clock_ms();
        }
        self.moved = 0;
        self.read_mail();
        for _ in 0..ROUNDS {
            if self.take_events()? < EVENTS || self.moved >= POLL_BYTES {
                break;
            }
        }
        if timed && self.now >= self.watch_at {
            self.watch_at = self.now + WATCH_MS;
            self.watch();
        }
        Ok(())
    }

    fn read_mail(&mut self) {
        // What comes while this runs waits for the next poll.
        for _ in 0..self.own.mail.len() {
            match self.own.mail.pop() {
                Some(Mail::Lane { fd, shared, version }) => self.take_lane(fd, &shared, version),
                Some(Mail::Serve(fd)) => self.adopt(fd),
                Some(Mail::Look(shared)) => self.look_at(&shared),
                None => break,
            }
        }
        if self.own.overflow.swap(false, Ordering::AcqRel) {
            for slot in 0..self.lanes.slots() {
                if let Some(lane) = self.lanes.at(slot) {
                    let shared = lane.shared.clone();
                    self.look_at(&shared);
                }
            }
        }
    }

    fn take_lane(&mut self, fd: OwnedFd, shared: &Arc<LaneShared>, version: TcpVersion) {
        let key = self.lanes.insert(Lane::new(fd, shared.clone(), version));
        shared.slot.store(key.slot(), Ordering::Relaxed);
        if let Some(fd) = self.lanes.get(key).and_then(Lane::fd) {
            // Without being watched it ends by its time-out.
            let _ = epoll::add(&self.epoll, fd, EventData::new_u64(LANE | key.bits()), EventFlags::IN);
        }
        self.look_at(shared);
    }

    fn look_at(&mut self, shared: &Arc<LaneShared>) {
        let slot = shared.slot.load(Ordering::Relaxed);
        let Some(lane) = self.lanes.at(slot) else { return };
        // An exchange, so that whoever found its word on the way already has what it said seen below.
        shared.noted.swap(false, Ordering::AcqRel);
        if shared.gone.load(Ordering::Acquire) {
            self.waiting -= usize::from(lane.is_outstanding());
            self.lanes.remove(slot);
            return;
        }
        let outstanding = lane.is_outstanding();
        lane.take_posts(self.now, &mut self.done);
        if lane.is_wanted_in_error() {
            lane.enter_error(self.now, &mut self.done);
        }
        self.move_lane(slot, outstanding, false);
    }

    /// Lets a lane move; `before`: whether it was counted as waiting; `reported`: whether its socket was.
    fn move_lane(&mut self, slot: u32, before: bool, reported: bool) {
        let Some(lane) = self.lanes.at(slot) else { return };
        let open = lane.fd().is_some();
        let moved = lane.serve(&mut self.io, &self.own.counters, self.now, reported, &mut self.done);
        self.did += usize::from(moved > 0);
        self.moved += moved;
        let after = lane.is_outstanding();
        self.waiting = self.waiting + usize::from(after) - usize::from(before);
        let qpn = lane.shared.qpn;
        let (wanted, watched) = (lane.interest(), lane.watched);
        if lane.fd().is_none() && open && lane.died_idle() {
            self.nic.tell(AsyncEvent::QpFatal(qpn));
        }
        if wanted == watched {
            return;
        }
        let data = EventData::new_u64(LANE | self.lanes.key(slot));
        let Some(lane) = self.lanes.at(slot) else { return };
        if let Some(fd) = lane.fd()
            && change(&self.epoll, fd, data, wanted, &self.own.counters)
        {
            lane.watched = wanted;
        }
    }

    /// Serves what is ready, a few at once; how many.
    fn take_events(&mut self) -> io::Result<usize> {
        let mut room = [MaybeUninit::<Event>::uninit(); EVENTS];
        self.own.counters.waits.add(1);
        let zero = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
        let events = match epoll::wait(&self.epoll, room.as_mut_slice(), Some(&zero)) {
            Ok((events, _)) => events,
            Err(rustix::io::Errno::INTR) => return Ok(0),
            Err(e) => return Err(e.into()),
        };
        let count = events.len();
        for event in events {
            match event.data.u64() {
                LISTENER => self.accept(),
                WAKE => self.clear_wake(),
                token if token & LANE != 0 => {
                    if let Some(slot) = self.lanes.slot_of(token & !LANE) {
                        let before = self.lanes.at(slot).is_some_and(|lane| lane.is_outstanding());
                        self.move_lane(slot, before, true);
                    }
                }
                token => {
                    if let Some(slot) = self.served.slot_of(token & !SERVED) {
                        self.serve(slot);
                    }
                }
            }
        }
        Ok(count)
    }

    fn clear_wake(&mut self) {
        let _ = rustix::io::read(&self.own.wake, &mut [0; 8]);
        // The letter that it was rung for may have come after this poll read the mail.
        self.look = true;
        self.did += 1;
    }

    fn watch(&mut self) {
        for slot in 0..self.lanes.slots() {
            let Some(lane) = self.lanes.at(slot).filter(|lane| lane.is_outstanding()) else { continue };
            lane.watch(self.now, self.nic.patience, &mut self.done);
            self.waiting -= usize::from(!lane.is_outstanding());
        }
        if self.ending > 0 {
            for slot in 0..self.served.slots() {
                let since = self.served.at(slot).and_then(|s| s.ending_since);
                if since.is_some_and(|since| self.now > since + LINGER_MS) {
                    self.close(slot);
                }
            }
        }
        if self.paused_until.is_some_and(|until| self.now >= until) && self.watch_listener().is_ok() {
            self.paused_until = None;
        }
    }
}

fn change(epoll: &OwnedFd, fd: BorrowedFd<'_>, data: EventData, to: Interest, counters: &TcpCounters) -> bool {
    let mut flags = EventFlags::empty();
    flags.set(EventFlags::IN, to.input);
    flags.set(EventFlags::OUT, to.output);
    counters.changes.add(1);
    epoll::modify(epoll, fd, data, flags).is_ok()
}

/// Milliseconds on a clock that only grows; a few of them coarse, and cheap to read.
fn clock_ms() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::MonotonicCoarse);
    now.tv_sec as u64 * 1000 + now.tv_nsec as u64 / 1_000_000
}

impl CompletionQueue for TcpQueue {
    fn depth(&self) -> u32 {
        self.depth
    }

    fn poll(&mut self, out: &mut [Completion]) -> io::Result<usize> {
        let early = self.take_done(out);
        if early == out.len() {
            return Ok(early);
        }
        self.view.enter();
        let turned = self.turn();
        self.view.leave();
        turned?;
        Ok(early + self.take_done(&mut out[early..]))
    }

    fn served(&mut self) -> usize {
        std::mem::take(&mut self.did)
    }

    fn arm(&mut self) -> io::Result<()> {
        self.look = true;
        Ok(())
    }

    fn event_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.epoll.as_fd())
    }

    fn clear_events(&mut self) -> io::Result<()> {
        self.look = true;
        Ok(())
    }
}

impl Drop for TcpQueue {
    fn drop(&mut self) {
        let left = self.own.serving.load(Ordering::Relaxed);
        self.nic.serving.fetch_sub(left, Ordering::Relaxed);
        self.own.closed.store(true, Ordering::SeqCst);
        self.own.forget();
    }
}
