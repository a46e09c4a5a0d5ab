//! The rings between a core and everybody else, and the doorbell that wakes a sleeper at their other end.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering, fence};

use crossbeam_queue::ArrayQueue;
use crossbeam_utils::CachePadded;

use super::counters::RailCounters;
use super::rest::Rest;
use crate::error::{Cause, FirstError};
use crate::limits::{COMMAND_RING, EVENT_RING, WORK_RING};
use crate::nic::{ConnectedQp, PostHalf};
use crate::transfer::Peer;
use crate::units::{CoreId, NicId, PeerId, PeerNicId, RailId};
use crate::work::Work;

/// One life of a rail: repaired, it keeps its number and gets another life.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct RailKey {
    /// The rail.
    pub rail: RailId,
    /// Which set of queue pairs, counted from 0.
    pub life: u32,
}

/// What a core has to know of a rail.
#[derive(Clone, Debug)]
pub struct RailSpec {
    /// Its name.
    pub key: RailKey,
    /// Where it leads. Control keeps the peer alive, so that a core never frees it.
    pub peer: Arc<Peer>,
    /// Our end.
    pub nic: NicId,
    /// The other end, as an index into the peer's rkeys.
    pub peer_nic: PeerNicId,
    /// Where the core counts for this rail, over all its lives. Control keeps it.
    pub counters: Arc<RailCounters>,
    /// Whether it carries slices of ours. One that is not for us, but for the peer, is tried out and carries nothing more.
    pub claims: bool,
}

/// Control to core.
pub enum Command {
    /// A connected queue pair of a rail. The first one of a life makes the rail known, on trial: it carries one slice
    /// at a time until one has come back.
    Adopt {
        /// The rail.
        rail: RailSpec,
        /// The queue pair.
        qp: ConnectedQp,
    },
    /// Post no more on this life. Its queue pairs come back as [`CoreEvent::Drained`], each when nothing is outstanding
    /// on it (control moves them to ERR if they are not to finish by themselves).
    Retire {
        /// Which life.
        key: RailKey,
    },
    /// Give this life's queue pairs back, if nothing is posted on them and nothing waits for their peer: they come as
    /// [`CoreEvent::Yielded`], or the answer is [`CoreEvent::InUse`]. No answer for a life that is over. At most
    /// [`crate::limits::YIELDS_MAX`] at once.
    Yield {
        /// Which life.
        key: RailKey,
    },
    /// The queue pair of a [`CoreEvent::Overdue`] is destroyed: what was outstanding has ended, as if flushed.
    Destroyed {
        /// Its slot, as the event told.
        slot: u16,
    },
    /// Whether this life carries slices of ours has changed ([`RailSpec::claims`]). What is in flight goes on.
    Claim {
        /// Which life.
        key: RailKey,
        /// Whether it does.
        claims: bool,
    },
    /// Nothing sent on this life can land at the peer any more: releases the Works that were held for it.
    Fenced {
        /// Which life.
        key: RailKey,
    },
    /// No rail to this peer can be made: ends what waits for one.
    Unreachable {
        /// The peer.
        peer: PeerId,
        /// The cause to tell.
        cause: Cause,
    },
    /// End everything that can be ended, give back every queue pair, and stop when nothing is left or nothing moves.
    Stop,
}

/// Core to control.
pub enum CoreEvent {
    /// First error of a rail's life. The core posts no more on it; control moves its queue pairs to ERR and repairs it.
    FirstError {
        /// Which life.
        key: RailKey,
        /// What was seen.
        error: FirstError,
    },
    /// Nothing is outstanding on a retired queue pair; here is its posting half.
    Drained {
        /// Which life.
        key: RailKey,
        /// For [`crate::nic::qp::destroy`].
        qp: PostHalf,
        /// Requests that ended as flushed.
        flushed: u32,
        /// Whether WRITEs were outstanding when the life ended: the peer's end must be fenced before the Works that
        /// used it are terminal.
        needs_fence: bool,
    },
    /// A queue pair that was asked for by [`Command::Yield`]: nothing of ours is on its way on it, and it never failed. It
    /// still serves the peer, and may be adopted again.
    Yielded {
        /// Which life.
        key: RailKey,
        /// The queue pair.
        qp: ConnectedQp,
    },
    /// The life that was asked for by [`Command::Yield`] is in use, and stays so.
    InUse {
        /// Which life.
        key: RailKey,
    },
    /// A queue pair in ERR gave no completion for [`crate::limits::DRAIN_LIMIT`]: destroy it, then send
    /// [`Command::Destroyed`].
    Overdue {
        /// Which life.
        key: RailKey,
        /// The core's slot.
        slot: u16,
        /// For [`crate::nic::qp::destroy`].
        qp: PostHalf,
    },
    /// The trial slice came back: the rail is usable.
    Proven {
        /// Which life.
        key: RailKey,
    },
    /// Work waits for this peer and no core has a rail to it.
    Wanted {
        /// The peer.
        peer: PeerId,
    },
    /// A Work is terminal. Control wakes its batch and drops it. Not told where a caller turned the core and nobody sleeps: it is
    /// dropped there.
    Finished(Arc<Work>),
    /// This core has no more to do with a Work that others finish or finished. Control drops it: the last reference
    /// frees memory, which no core's own thread does.
    Released(Arc<Work>),
    /// A completion queue reported an error: outcomes may be lost on this NIC.
    CqLost {
        /// The NIC.
        nic: NicId,
    },
    /// The core has stopped; it touches nothing any more.
    Stopped,
}

/// Wakes one sleeping thread through an eventfd, and costs one load where it is awake.
///
/// The sleeper: `prepare`, look at every ring once more, sleep on the descriptor, `finish`. The waker: publish, `ring`.
pub struct Doorbell {
    sleeping: AtomicBool,
    fd: OwnedFd,
}

impl Doorbell {
    /// A new eventfd, non-blocking.
    pub fn new() -> io::Result<Self> {
        let flags = rustix::event::EventfdFlags::NONBLOCK | rustix::event::EventfdFlags::CLOEXEC;
        Ok(Self { sleeping: AtomicBool::new(false), fd: rustix::event::eventfd(0, flags)? })
    }

    /// Wakes the sleeper, if there is one. What it has to see must be published before.
    pub fn ring(&self) {
        // Pairs with the fence in `prepare`: either the sleeper sees what was published, or we see it sleeping.
        fence(Ordering::SeqCst);
        if self.sleeping.load(Ordering::Relaxed) && self.sleeping.swap(false, Ordering::AcqRel) {
            // A full counter (EAGAIN) means it is readable already; nothing else can go wrong on an eventfd we own.
            let _ = rustix::io::write(&self.fd, &1u64.to_ne_bytes());
        }
    }

    /// Whether somebody sleeps, or is about to. What he has to see must be published before, and a fence be between.
    pub(super) fn has_sleeper(&self) -> bool {
        self.sleeping.load(Ordering::Relaxed)
    }

    /// Announces sleep. Look at the rings after this and before sleeping.
    pub fn prepare(&self) {
        self.sleeping.store(true, Ordering::Relaxed);
        fence(Ordering::SeqCst);
    }

    /// Awake again, whatever woke the thread.
    pub fn finish(&self) {
        self.sleeping.store(false, Ordering::Relaxed);
        let mut count = [0u8; 8];
        let _ = rustix::io::read(&self.fd, &mut count);
    }

    /// Readable after [`Doorbell::ring`] met a sleeper.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// What others put into a core. Shared by submitters, control and other cores.
pub struct Inbox {
    core: CoreId,
    works: ArrayQueue<Arc<Work>>,
    commands: ArrayQueue<Command>,
    /// Bytes in flight and waiting, as the core last published them; submitters choose the least.
    load: CachePadded<AtomicU64>,
    doorbell: Doorbell,
    pub(super) rest: Rest,
}

impl Inbox {
    /// Empty rings for `core`.
    pub fn new(core: CoreId) -> io::Result<Arc<Self>> {
        Ok(Arc::new(Self {
            core,
            works: ArrayQueue::new(WORK_RING),
            commands: ArrayQueue::new(COMMAND_RING),
            load: CachePadded::new(AtomicU64::new(0)),
            doorbell: Doorbell::new()?,
            rest: Rest::new(),
        }))
    }

    /// Whose inbox.
    pub fn core(&self) -> CoreId {
        self.core
    }

    /// Enqueues a Work, from any thread, for the core's own thread to carry. A full ring gives it back.
    pub fn submit(&self, work: Arc<Work>) -> Result<(), Arc<Work>> {
        self.works.push(work)?;
        self.call();
        Ok(())
    }

    /// Enqueues a command; control only. A full ring gives it back.
    pub fn command(&self, command: Command) -> Result<(), Command> {
        self.commands.push(command)?;
        self.doorbell.ring();
        Ok(())
    }

    /// Bytes in flight and waiting on that core, as of its last turn.
    pub fn load(&self) -> u64 {
        self.load.load(Ordering::Relaxed)
    }

    /// Wakes the core.
    pub fn doorbell(&self) -> &Doorbell {
        &self.doorbell
    }

    pub(crate) fn publish_load(&self, bytes: u64) {
        self.load.store(bytes, Ordering::Relaxed);
    }

    pub(crate) fn next_work(&self) -> Option<Arc<Work>> {
        self.works.pop()
    }

    pub(crate) fn next_command(&self) -> Option<Command> {
        self.commands.pop()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.works.is_empty() && self.commands.is_empty()
    }
}

/// What a core tells control.
pub struct Outbox {
    events: ArrayQueue<CoreEvent>,
    control: Arc<Doorbell>,
}

impl Outbox {
    /// An empty ring; `control` is the doorbell of the thread that reads it.
    pub fn new(control: Arc<Doorbell>) -> Arc<Self> {
        Arc::new(Self { events: ArrayQueue::new(EVENT_RING), control })
    }

    /// The next event; control only.
    pub fn next(&self) -> Option<CoreEvent> {
        self.events.pop()
    }

    /// Events that wait.
    pub fn len(&self) -> usize {
        self.events.len()
    }

    /// Whether nothing waits.
    pub fn is_empty(&self) -> bool {
        self.events.is_empty()
    }

    pub(crate) fn push(&self, event: CoreEvent) -> Result<(), CoreEvent> {
        self.events.push(event)
    }

    /// Wakes control. Costs a system call when control sleeps, so it is rung for events that somebody waits for, and
    /// where many others take up the room.
    pub(crate) fn ring(&self) {
        self.control.ring();
    }
}

/// Puts a Work into the rings of cores that can move it: the least loaded core with a rail becomes its home and gets
/// it first; a Work of more than two slices also goes to others, at most one core for each two slices. Wakes them all.
///
/// # Errors
/// Gives the Work back, enqueued nowhere, when the home core's ring is full: the caller is *busy*.
pub fn dispatch(work: Arc<Work>, cores: &[Arc<Inbox>]) -> Result<(), Arc<Work>> {
    enqueue(work, cores).map(|home| home.call())
}

/// As [`dispatch`], but does not wake the home, which it returns: it is to be attended to ([`Inbox::attend`]) or woken.
///
/// # Errors
/// As [`dispatch`].
pub fn enqueue(work: Arc<Work>, cores: &[Arc<Inbox>]) -> Result<&Arc<Inbox>, Arc<Work>> {
    let routes = work.remote().peer.routes();
    let eligible = |inbox: &&Arc<Inbox>| routes == 0 || routes >> inbox.core().0 & 1 == 1;
    let Some(home) = cores.iter().filter(eligible).min_by_key(|inbox| inbox.load()) else {
        return Err(work);
    };
    work.set_home(home.core());
    let helpers = if routes == 0 { 0 } else { (work.slices().len() / 2).saturating_sub(1) };
    home.works.push(work.clone())?;
    for other in cores.iter().filter(eligible).filter(|inbox| inbox.core() != home.core()).take(helpers) {
        // A full ring of a helper costs speed only: the home core claims what the helper does not.
        let _ = other.submit(work.clone());
    }
    Ok(home)
}
