//! What this NIC has registered, the log from which every peer is told, and taking memory back.

use std::collections::VecDeque;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering, fence};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::ledger::{Ledger, SLOTS};
use super::wire::Process;
use crate::lanes::{LaneArray, Readers};
use crate::region::Memory;

/// Changes kept for peers that read slowly. One that is further behind is let go; it dials again.
const LOG: usize = 2 * SLOTS;
/// How long memory that is taken back waits for a peer that stopped in mid-copy: after that, what the engine allocated
/// stays mapped for ever rather than be written late.
const LET_GO_WITHIN: Duration = Duration::from_secs(10);
/// The same for memory of the embedder, which cannot be kept from going.
const LET_GO_FOREIGN_WITHIN: Duration = Duration::from_secs(60);

/// Somebody who may be copying: an attached peer, or this process.
pub(super) struct Watched {
    pub(super) lanes: Arc<dyn LaneArray>,
    /// Its process has ended: an odd lane of it means nothing.
    pub(super) dead: AtomicBool,
    pub(super) process: Option<Process>,
}

impl Watched {
    fn is_dead(&self) -> bool {
        self.dead.load(Ordering::Acquire) || self.process.as_ref().is_some_and(Process::has_ended)
    }
}

/// A region that peers may reach.
#[derive(Clone)]
pub(super) struct Live {
    pub(super) memory: Arc<Memory>,
    pub(super) offset: u64,
    pub(super) len: u64,
}

#[derive(Default)]
struct Slot {
    generation: u32,
    live: Option<Live>,
}

#[derive(Default)]
struct Inner {
    slots: Vec<Slot>,
    free: Vec<u32>,
    /// Slots in the order in which they changed; a reader looks up what they hold by then.
    log: VecDeque<u32>,
    /// Number of the log's first entry.
    first: u64,
    watched: Vec<Arc<Watched>>,
}

/// How far somebody has been told: first every slot, then the log.
pub(super) struct Cursor {
    slot: u32,
    log: u64,
    synced: bool,
}

/// What to tell next.
pub(super) enum Next {
    /// A slot, its generation, and what it holds; `None`: it was revoked.
    Change(u32, u32, Option<Live>),
    /// All that was registered when the cursor was made has been told; said once.
    Synced,
    Nothing,
    /// The log no longer goes back that far.
    Lost,
}

pub(super) struct Table {
    pub(super) ledger: Arc<Ledger>,
    pub(super) ledger_file: OwnedFd,
    inner: Mutex<Inner>,
    /// Regions given up in mid-copy, see [`LET_GO_WITHIN`].
    kept: AtomicU64,
}

impl Table {
    pub(super) fn new(token: u64) -> io::Result<Self> {
        let (ledger, ledger_file) = Ledger::create(token)?;
        Ok(Self { ledger: Arc::new(ledger), ledger_file, inner: Mutex::default(), kept: AtomicU64::new(0) })
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn note(&self, inner: &mut Inner, slot: u32) {
        if inner.watched.is_empty() {
            // Nobody reads it.
            inner.first += inner.log.len() as u64 + 1;
            inner.log.clear();
        } else {
            if inner.log.len() >= LOG {
                inner.log.pop_front();
                inner.first += 1;
            }
            inner.log.push_back(slot);
        }
        self.ledger.changes().store(inner.first + inner.log.len() as u64, Ordering::Release);
    }

    /// Takes a slot; returns it with its generation.
    pub(super) fn add(&self, live: Live) -> io::Result<(u32, u32)> {
        let mut inner = self.lock();
        let slot = match inner.free.pop() {
            Some(slot) => slot,
            None if inner.slots.len() < SLOTS => {
                inner.slots.push(Slot::default());
                inner.slots.len() as u32 - 1
            }
            None => {
                let text = format!("all {SLOTS} places for shared regions are taken; register fewer and larger ones");
                return Err(io::Error::new(io::ErrorKind::QuotaExceeded, text));
            }
        };
        let entry = &mut inner.slots[slot as usize];
        entry.generation = entry.generation.wrapping_add(1).max(1);
        entry.live = Some(live);
        let generation = entry.generation;
        self.ledger.word(slot).store(generation, Ordering::Release);
        self.note(&mut inner, slot);
        Ok((slot, generation))
    }

    /// Forbids copies to and from a region and waits for those under way. The memory may go when this returns; what may
    /// not is kept for ever. `changed` is called once the peers can be told.
    pub(super) fn remove(&self, slot: u32, changed: impl FnOnce()) {
        self.ledger.word(slot).store(0, Ordering::Release);
        fence(Ordering::SeqCst);
        let (live, watched) = {
            let mut inner = self.lock();
            let live = inner.slots.get_mut(slot as usize).and_then(|s| s.live.take());
            self.note(&mut inner, slot);
            (live, inner.watched.clone())
        };
        changed();
        let Some(live) = live else { return };
        let mut waiting: Vec<_> = watched.into_iter().map(|w| (Readers::now(w.lanes.as_ref()), w)).collect();
        let bound = if live.memory.is_owned() { LET_GO_WITHIN } else { LET_GO_FOREIGN_WITHIN };
        let (since, mut rounds) = (Instant::now(), 0u32);
        loop {
            waiting.retain_mut(|(readers, w)| !readers.have_left(w.lanes.as_ref()) && !w.is_dead());
            if waiting.is_empty() {
                self.lock().free.push(slot);
                return;
            }
            if since.elapsed() > bound {
                // A late copy finds the memory still mapped, and the slot is not used again.
                self.kept.fetch_add(1, Ordering::Relaxed);
                std::mem::forget(live);
                return;
            }
            rounds += 1;
            if rounds < 64 {
                std::thread::yield_now();
            } else {
                std::thread::sleep(Duration::from_micros(50));
            }
        }
    }

    /// Regions whose memory was kept for ever because a peer stopped in mid-copy.
    pub(super) fn kept(&self) -> u64 {
        self.kept.load(Ordering::Relaxed)
    }

    /// From here on `watched` is waited for. The cursor starts at the beginning.
    pub(super) fn watch(&self, watched: &Arc<Watched>) -> Cursor {
        let mut inner = self.lock();
        inner.watched.push(watched.clone());
        Cursor { slot: 0, log: inner.first + inner.log.len() as u64, synced: false }
    }

    /// It copies no more.
    pub(super) fn unwatch(&self, watched: &Arc<Watched>) {
        self.lock().watched.retain(|w| !Arc::ptr_eq(w, watched));
    }

    /// What to tell next to whoever is at `cursor`; the cursor goes on by [`Cursor::advance`], when it was told.
    pub(super) fn next(&self, cursor: &mut Cursor) -> Next {
        let inner = self.lock();
        while !cursor.synced {
            match inner.slots.get(cursor.slot as usize) {
                Some(Slot { generation, live: Some(live) }) => {
                    return Next::Change(cursor.slot, *generation, Some(live.clone()));
                }
                Some(_) => cursor.slot += 1,
                None => return Next::Synced,
            }
        }
        let Some(at) = cursor.log.checked_sub(inner.first) else { return Next::Lost };
        match inner.log.get(at as usize) {
            Some(&slot) => {
                let entry = &inner.slots[slot as usize];
                Next::Change(slot, entry.generation, entry.live.clone())
            }
            None => Next::Nothing,
        }
    }
}

impl Cursor {
    /// Changes that have been told once `next` is; 0 while the slots are gone through.
    pub(super) fn told_with(&self, next: &Next) -> u64 {
        match next {
            Next::Change(..) if self.synced => self.log + 1,
            Next::Synced => self.log,
            _ => 0,
        }
    }

    /// What [`Table::next`] gave has been told.
    pub(super) fn advance(&mut self, told: &Next) {
        match told {
            Next::Change(..) if self.synced => self.log += 1,
            Next::Change(..) => self.slot += 1,
            Next::Synced => self.synced = true,
            Next::Nothing | Next::Lost => {}
        }
    }
}
