//! A Work: slices that share a peer and a local region, claimed by cores from one cursor.
//!
//! ```text
//!  submitter ── Arc<Work> ──▶ ring of each eligible core        claimed    one atomic add takes the next run of slices
//!                                                               returned   a bit per slice that came back; who clears it owns it
//!  cores: claim → post → complete ──▶ transfer outcomes         remaining  slices (and fence holds) that have not ended
//!                                └──▶ batch: works_left ──▶ whoever waits
//! ```
//!
//! `claimed` only rises; the swap to CLOSED is how cancel and deadline take every unclaimed slice at once.

mod assist;
#[cfg(test)]
mod explored;
mod quiescence;

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, Ordering, fence};
use std::sync::{Condvar, Mutex, PoisonError};
use std::task::Waker;
use std::time::Instant;

use smallvec::SmallVec;

use crate::error::SliceError;
use crate::nic::Op;
use crate::region::Region;
use crate::slice::{Slice, Slices};
use crate::spaced::Spaced;
use crate::transfer::RemoteBuffers;
use crate::units::{CoreId, Nanos};

pub use assist::Assisted;
pub use quiescence::{Proof, Quiescence};

const CLOSED: u64 = 1 << 63;

/// One transfer's outcome, written by cores, read by anybody.
#[derive(Debug)]
pub struct TransferOutcome {
    /// Bytes asked for.
    len: u64,
    /// Bytes that arrived.
    done: AtomicU64,
    /// Bytes of slices that ended without.
    failed: AtomicU64,
    /// First error, as [`SliceError::to_bits`]; 0 for none.
    error: AtomicU64,
}

/// How far a transfer is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum TransferStatus {
    /// Some slices have not ended.
    Waiting,
    /// All bytes are there.
    Done,
    /// All slices ended, some without their bytes.
    Failed(SliceError),
}

impl TransferOutcome {
    fn new(len: u64) -> Self {
        Self { len, done: AtomicU64::new(0), failed: AtomicU64::new(0), error: AtomicU64::new(0) }
    }

    /// Bytes asked for.
    pub fn requested(&self) -> u64 {
        self.len
    }

    /// Bytes that arrived so far.
    pub fn transferred(&self) -> u64 {
        self.done.load(Ordering::Acquire)
    }

    fn is_waiting(&self) -> bool {
        self.status() == TransferStatus::Waiting
    }

    /// The status now.
    pub fn status(&self) -> TransferStatus {
        let done = self.done.load(Ordering::Acquire);
        let failed = self.failed.load(Ordering::Acquire);
        if done + failed < self.len {
            return TransferStatus::Waiting;
        }
        match SliceError::from_bits(self.error.load(Ordering::Acquire)) {
            Some(error) => TransferStatus::Failed(error),
            None => TransferStatus::Done,
        }
    }
}

/// The waiting side of a batch: one word that cores bring to 0, and the sleepers that control wakes.
#[derive(Debug)]
pub struct Completion {
    works_left: Spaced<AtomicU32>,
    parked: AtomicBool,
    sleepers: Mutex<Vec<Waker>>,
    woken: Condvar,
}

impl Completion {
    /// For a batch of `works` Works; 0 is done from the start.
    pub fn new(works: u32) -> Arc<Self> {
        Arc::new(Self {
            works_left: Spaced::new(AtomicU32::new(works)),
            parked: AtomicBool::new(false),
            sleepers: Mutex::new(Vec::new()),
            woken: Condvar::new(),
        })
    }

    /// Whether every Work is terminal. After `true` the bytes and outcomes of all of them are visible.
    pub fn is_done(&self) -> bool {
        self.works_left.load(Ordering::Acquire) == 0
    }

    /// Takes back a Work that was never enqueued, or ends one. Returns whether somebody sleeps on the batch.
    pub(crate) fn work_ended(&self) -> bool {
        if self.works_left.fetch_sub(1, Ordering::AcqRel) != 1 {
            return false;
        }
        fence(Ordering::SeqCst);
        self.parked.load(Ordering::Relaxed)
    }

    /// Wakes every sleeper. Called by control, never by a core.
    pub fn wake(&self) {
        let tasks = std::mem::take(&mut *self.sleepers.lock().unwrap_or_else(PoisonError::into_inner));
        self.woken.notify_all();
        // Without the lock: a waker may run its task right here, and that registers again.
        for waker in tasks {
            waker.wake();
        }
    }

    /// Registers a task to be woken when the batch is done; the caller checks [`Completion::is_done`] afterwards.
    pub fn register(&self, waker: &Waker) {
        let mut sleepers = self.sleepers.lock().unwrap_or_else(PoisonError::into_inner);
        if !sleepers.iter().any(|w| w.will_wake(waker)) {
            sleepers.push(waker.clone());
        }
        drop(sleepers);
        self.announce_sleep();
    }

    /// Sleeps until the batch is done or `until`; returns whether it is done. Spinning first is the caller's business.
    pub fn sleep(&self, until: Instant) -> bool {
        let mut guard = self.sleepers.lock().unwrap_or_else(PoisonError::into_inner);
        self.announce_sleep();
        while !self.is_done() {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            guard = self.woken.wait_timeout(guard, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        true
    }

    fn announce_sleep(&self) {
        self.parked.store(true, Ordering::Relaxed);
        fence(Ordering::SeqCst);
    }
}

/// The lengths of transfers.
pub type Lens = SmallVec<[u64; 1]>;

/// What a Work is made of.
pub struct WorkParts {
    /// READ or WRITE.
    pub op: Op,
    /// The slices, at most 2^32 - 1.
    pub slices: Slices,
    /// Length of each transfer, by the number the slices carry. A transfer of 0 bytes is done from the start.
    pub transfers: Lens,
    /// The local memory.
    pub local: Arc<Region>,
    /// The peer and its memory.
    pub remote: Arc<RemoteBuffers>,
    /// When it was submitted, on the engine's clock.
    pub submitted: Nanos,
    /// When the home core ends what is not done, on the engine's clock.
    pub deadline: Nanos,
    /// How many cores the engine has.
    pub cores: u16,
    /// Retries of a slice after failures of its own (MC_RETRY_CNT).
    pub retries: u8,
    /// The batch it belongs to.
    pub completion: Arc<Completion>,
}

/// How often a slice was posted, and how often that failed by its own fault.
#[derive(Debug, Default)]
struct Tries {
    posts: AtomicU8,
    failures: AtomicU8,
}

/// Transfers that share a peer and a local region. Shared by every core that works on it. With one slice, and up to four cores, it is
/// one allocation.
pub struct Work {
    op: Op,
    retries: u8,
    slices: Slices,
    transfers: SmallVec<[TransferOutcome; 1]>,
    local: Arc<Region>,
    remote: Arc<RemoteBuffers>,
    completion: Arc<Completion>,
    submitted: Nanos,
    deadline: Nanos,
    bytes: u64,
    home: AtomicU32,
    /// Per core: its place in that core's table plus 1, 0 for none. Written by that core only.
    seats: SmallVec<[AtomicU32; 4]>,
    returned: SmallVec<[AtomicU64; 1]>,
    tries: SmallVec<[Tries; 4]>,
    first_error: AtomicU64,
    /// Bit per core that found none of its rails to have the keys of some slice.
    keyless: AtomicU64,
    /// What went wrong on the way and matters for its memory: see [`quiescence`].
    facts: AtomicU8,
    /// Bits set in `returned`; a hint that saves the walk.
    returned_count: Spaced<AtomicU32>,
    claimed: Spaced<AtomicU64>,
    remaining: Spaced<AtomicU32>,
}

impl Work {
    /// Allocates everything the Work will ever need: cores allocate nothing.
    pub fn new(parts: WorkParts) -> Arc<Self> {
        let count = parts.slices.len();
        let bytes = parts.slices.iter().map(|s| u64::from(s.len)).sum();
        Arc::new(Self {
            op: parts.op,
            retries: parts.retries,
            transfers: parts.transfers.into_iter().map(TransferOutcome::new).collect(),
            local: parts.local,
            remote: parts.remote,
            completion: parts.completion,
            submitted: parts.submitted,
            deadline: parts.deadline,
            bytes,
            home: AtomicU32::new(0),
            seats: (0..parts.cores).map(|_| AtomicU32::new(0)).collect(),
            returned: (0..count.div_ceil(64)).map(|_| AtomicU64::new(0)).collect(),
            tries: (0..count).map(|_| Tries::default()).collect(),
            first_error: AtomicU64::new(0),
            keyless: AtomicU64::new(0),
            facts: AtomicU8::new(0),
            returned_count: Spaced::new(AtomicU32::new(0)),
            claimed: Spaced::new(AtomicU64::new(0)),
            remaining: Spaced::new(AtomicU32::new(count as u32)),
            slices: parts.slices,
        })
    }

    /// READ or WRITE.
    pub fn op(&self) -> Op {
        self.op
    }
    /// The slices, as cut.
    pub fn slices(&self) -> &[Slice] {
        &self.slices
    }
    /// Outcome of each transfer.
    pub fn transfers(&self) -> &[TransferOutcome] {
        &self.transfers
    }
    /// The local memory.
    pub fn local(&self) -> &Region {
        &self.local
    }
    /// The peer's memory.
    pub fn remote(&self) -> &RemoteBuffers {
        &self.remote
    }
    /// The batch.
    pub fn completion(&self) -> &Completion {
        &self.completion
    }
    /// When it was submitted, on the engine's clock.
    pub fn submitted(&self) -> Nanos {
        self.submitted
    }
    /// When it has to be over.
    pub fn deadline(&self) -> Nanos {
        self.deadline
    }
    /// Bytes of all slices.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }
    /// The core that owns the deadline and ends the Work when no rail is left.
    pub fn home(&self) -> CoreId {
        CoreId(self.home.load(Ordering::Relaxed) as u16)
    }
    /// Set once, before the Work is enqueued anywhere.
    pub fn set_home(&self, core: CoreId) {
        self.home.store(u32::from(core.0), Ordering::Relaxed);
    }
    /// The error that was seen first in the whole Work.
    pub fn first_error(&self) -> Option<SliceError> {
        SliceError::from_bits(self.first_error.load(Ordering::Acquire))
    }
    /// Whether every slice has ended and nothing of it can still land.
    pub fn is_terminal(&self) -> bool {
        self.remaining.load(Ordering::Acquire) == 0
    }

    /// The seat `core` gave it, if it knows the Work.
    pub(crate) fn seat(&self, core: CoreId) -> Option<u32> {
        self.seats[usize::from(core.0)].load(Ordering::Relaxed).checked_sub(1)
    }
    pub(crate) fn set_seat(&self, core: CoreId, seat: Option<u32>) {
        self.seats[usize::from(core.0)].store(seat.map_or(0, |s| s + 1), Ordering::Relaxed);
    }

    /// Takes the next run of at most `most` slices that nobody has claimed. Empty: none left, or closed.
    pub(crate) fn claim(&self, most: u32) -> Range<u32> {
        let total = self.slices.len() as u64;
        // A look first: a cursor at its end must not be pushed on by every core's every turn.
        if most == 0 || self.claimed.load(Ordering::Relaxed) >= total {
            return 0..0;
        }
        let from = self.claimed.fetch_add(u64::from(most), Ordering::SeqCst);
        if from >= total { 0..0 } else { from as u32..(from + u64::from(most)).min(total) as u32 }
    }

    /// Whether [`Work::claim`] could still give something.
    pub(crate) fn has_unclaimed(&self) -> bool {
        self.claimed.load(Ordering::Relaxed) < self.slices.len() as u64
    }

    /// Slices that nobody has: never claimed, or given back.
    pub(crate) fn waiting(&self) -> u32 {
        let unclaimed = (self.slices.len() as u64).saturating_sub(self.claimed.load(Ordering::Relaxed)) as u32;
        // A hint: a taker may subtract before the giver has added, and for that moment it is huge.
        unclaimed.saturating_add(self.returned_count.load(Ordering::Relaxed))
    }

    /// Whether slices wait in the return map.
    pub(crate) fn has_returned(&self) -> bool {
        self.returned_count.load(Ordering::Relaxed) > 0
    }

    /// Closes the cursor. The range holds the slices that were never claimed: the caller, and only it, ends them.
    pub(crate) fn close(&self) -> Range<u32> {
        let total = self.slices.len() as u64;
        let was = self.claimed.swap(CLOSED, Ordering::SeqCst);
        // Pairs with the one in `give_back`: what its caller returned before it looked at the cursor is seen from here on.
        fence(Ordering::SeqCst);
        if was >= total { 0..0 } else { was as u32..total as u32 }
    }

    /// Whether the cursor was closed: what comes back ends instead of being posted again.
    pub(crate) fn is_closed(&self) -> bool {
        self.claimed.load(Ordering::SeqCst) & CLOSED != 0
    }

    /// Gives a claimed slice back to be claimed by whoever comes first.
    pub(crate) fn give_back(&self, slice: u32) {
        self.returned[slice as usize / 64].fetch_or(1 << (slice % 64), Ordering::Release);
        self.returned_count.fetch_add(1, Ordering::Release);
        // Pairs with the one in `close`: either its caller sees the bit, or ours sees CLOSED.
        fence(Ordering::SeqCst);
    }

    /// Takes one slice out of the return map; who clears the bit owns the slice.
    pub(crate) fn take_returned(&self) -> Option<u32> {
        if !self.has_returned() {
            return None;
        }
        for (index, word) in self.returned.iter().enumerate() {
            let mut bits = word.load(Ordering::Relaxed);
            while bits != 0 {
                let bit = bits.trailing_zeros();
                let was = word.fetch_and(!(1 << bit), Ordering::AcqRel);
                if was & (1 << bit) != 0 {
                    self.returned_count.fetch_sub(1, Ordering::Relaxed);
                    return Some(index as u32 * 64 + bit);
                }
                bits = was & !(1 << bit);
            }
        }
        None
    }

    /// Counts one more posting of a slice; returns how many it has now. Only for the core that owns it, as all that counts its tries:
    /// whoever is next sees the count, for a slice that changes hands has been in the return map.
    pub(crate) fn count_post(&self, slice: u32) -> u8 {
        let posts = &self.tries[slice as usize].posts;
        let count = posts.load(Ordering::Relaxed).saturating_add(1);
        posts.store(count, Ordering::Relaxed);
        count
    }

    /// Takes back one [`Work::count_post`]: the device had no room. Before the slice is given back.
    pub(crate) fn uncount_post(&self, slice: u32) {
        let posts = &self.tries[slice as usize].posts;
        posts.store(posts.load(Ordering::Relaxed).saturating_sub(1), Ordering::Relaxed);
    }

    /// `core` has no rail with the keys of some slice; returns whether every core with a rail has said so.
    pub(crate) fn cannot_carry(&self, core: CoreId) -> bool {
        let bit = 1 << core.0;
        let said = self.keyless.fetch_or(bit, Ordering::Relaxed) | bit;
        self.remote.peer.routes() & !said == 0
    }

    /// `core` carries slices of this Work, whatever it said before.
    pub(crate) fn can_carry(&self, core: CoreId) {
        self.keyless.fetch_and(!(1 << core.0), Ordering::Relaxed);
    }

    /// Slices that nobody has claimed yet.
    #[cfg(test)]
    pub(crate) fn unclaimed(&self) -> u32 {
        (self.slices.len() as u64).saturating_sub(self.claimed.load(Ordering::Relaxed)) as u32
    }

    /// Whether a slice lies in the return map.
    #[cfg(test)]
    pub(crate) fn is_returned(&self, slice: u32) -> bool {
        self.returned[slice as usize / 64].load(Ordering::Relaxed) & 1 << (slice % 64) != 0
    }

    /// Retries it has spent.
    #[cfg(test)]
    pub(crate) fn failures_of(&self, slice: u32) -> u8 {
        self.tries[slice as usize].failures.load(Ordering::Relaxed)
    }

    /// What has not been settled.
    #[cfg(test)]
    pub(crate) fn remaining_now(&self) -> u32 {
        self.remaining.load(Ordering::Relaxed)
    }

    /// Counts a failure that was the slice's own; returns whether it may be tried again.
    pub(crate) fn may_retry(&self, slice: u32) -> bool {
        let tries = &self.tries[slice as usize];
        let failures = tries.failures.load(Ordering::Relaxed).saturating_add(1);
        tries.failures.store(failures, Ordering::Relaxed);
        failures <= self.retries && tries.posts.load(Ordering::Relaxed) < crate::limits::POSTS_MAX
    }

    /// Marks a slice's bytes as there. [`Work::settle`] must follow for it.
    pub(crate) fn slice_done(&self, slice: u32) {
        let slice = &self.slices[slice as usize];
        let (transfer, len) = (&self.transfers[slice.transfer as usize], u64::from(slice.len));
        if len == transfer.len {
            // Nobody else has a part of it: it is not added to, which would take a locked instruction.
            transfer.done.store(len, Ordering::Release);
        } else {
            transfer.done.fetch_add(len, Ordering::Release);
        }
    }

    /// Marks a slice as ended without its bytes. [`Work::settle`] must follow for it.
    pub(crate) fn slice_failed(&self, slice: u32, error: SliceError) {
        self.note_error(error);
        let slice = &self.slices[slice as usize];
        let transfer = &self.transfers[slice.transfer as usize];
        let _ = transfer.error.compare_exchange(0, error.to_bits(), Ordering::AcqRel, Ordering::Relaxed);
        transfer.failed.fetch_add(u64::from(slice.len), Ordering::Release);
    }

    /// Remembers an error as the Work's first, if it is.
    pub(crate) fn note_error(&self, error: SliceError) {
        let _ = self.first_error.compare_exchange(0, error.to_bits(), Ordering::AcqRel, Ordering::Relaxed);
    }

    /// Adds a hold: the Work is not terminal before it is settled like a slice. Added before the slices it protects
    /// are given back.
    pub(crate) fn hold(&self) {
        self.note_held();
        self.remaining.fetch_add(1, Ordering::Relaxed);
    }

    /// Accounts `count` slices or holds as ended. Whoever brings it to zero gets `Some`, and must report the Work
    /// finished; the flag says whether somebody sleeps on the batch.
    pub(crate) fn settle(&self, count: u32) -> Option<bool> {
        if count == 0 || self.remaining.fetch_sub(count, Ordering::Release) != count {
            return None;
        }
        // Everything the other cores wrote before their Release is now visible, and is passed on by the next one.
        fence(Ordering::Acquire);
        Some(self.completion.work_ended())
    }

    /// Ends a Work that never reached a ring, so that its batch does not wait for it.
    pub fn abandon(&self, error: SliceError) {
        let unclaimed = self.close();
        let count = unclaimed.len() as u32;
        for slice in unclaimed {
            self.slice_failed(slice, error);
        }
        if self.settle(count) == Some(true) {
            self.completion.wake();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Cause;
    use crate::region::{Chunk, Memory};
    use crate::transfer::{Peer, Route};
    use crate::units::{PeerId, RemoteAddr};

    pub(super) fn work(slices: u32) -> Arc<Work> {
        let memory = Memory::allocate(4096).unwrap();
        let chunk = Chunk { addr: memory.addr(), len: memory.len(), keys: Box::new([]) };
        let local = Arc::new(Region::new(memory, vec![chunk], "*".into(), false));
        let slice = |i| Slice { local: 0, remote: RemoteAddr(0), len: 8, chunk: 0, buffer: 0, transfer: i % 2 };
        Work::new(WorkParts {
            op: Op::Read,
            slices: (0..slices).map(slice).collect(),
            transfers: [u64::from(slices.div_ceil(2)) * 8, u64::from(slices / 2) * 8].into_iter().collect(),
            local,
            remote: Arc::new(RemoteBuffers::new(Peer::new(PeerId(0), "p".into()), Route::any(), vec![])),
            submitted: Nanos::ZERO,
            deadline: Nanos::FAR,
            cores: 2,
            retries: 2,
            completion: Completion::new(1),
        })
    }

    #[test]
    fn every_slice_is_claimed_once_by_racing_cores() {
        let work = work(10_000);
        let counts: Vec<u32> = std::thread::scope(|scope| {
            let claimers: Vec<_> = (1..=4)
                .map(|step| {
                    let work = &work;
                    scope.spawn(move || {
                        let mut mine = 0;
                        loop {
                            let run = work.claim(step * 3);
                            if run.is_empty() {
                                break mine;
                            }
                            mine += run.len() as u32;
                        }
                    })
                })
                .collect();
            claimers.into_iter().map(|c| c.join().unwrap()).collect()
        });
        assert_eq!(counts.iter().sum::<u32>(), 10_000);
        assert!(work.close().is_empty(), "nothing is left to close");
    }

    #[test]
    fn closing_takes_exactly_what_was_not_claimed() {
        let work = work(100);
        assert_eq!(work.claim(30), 0..30);
        assert_eq!(work.close(), 30..100);
        assert!(work.is_closed() && work.claim(1).is_empty() && work.close().is_empty());
    }

    #[test]
    fn a_transfer_is_done_with_its_last_slice_whether_it_has_one_or_more() {
        let work = work(3);
        let status = |transfer: usize| (work.transfers()[transfer].transferred(), work.transfers()[transfer].status());
        work.slice_done(1);
        assert_eq!(status(1), (8, TransferStatus::Done), "its only one");
        work.slice_done(0);
        assert_eq!(status(0), (8, TransferStatus::Waiting), "one of two");
        work.slice_done(2);
        assert_eq!(status(0), (16, TransferStatus::Done));
    }

    #[test]
    fn a_returned_slice_goes_to_one_taker() {
        let work = work(200);
        let _ = work.claim(200);
        for slice in [0, 63, 64, 199] {
            work.give_back(slice);
        }
        let taken: Vec<u32> = std::iter::from_fn(|| work.take_returned()).collect();
        assert_eq!(taken, [0, 63, 64, 199]);
        assert!(!work.has_returned());
    }

    #[test]
    fn a_slice_is_retried_as_often_as_configured_and_no_more() {
        let work = work(1);
        assert!(work.may_retry(0) && work.may_retry(0) && !work.may_retry(0));
    }

    #[test]
    fn the_last_settle_ends_the_batch_and_outcomes_tell() {
        let work = work(3);
        let _ = work.claim(3);
        work.slice_done(0);
        work.slice_done(2);
        assert_eq!(work.settle(2), None);
        assert_eq!(work.transfers()[0].status(), TransferStatus::Done);
        assert_eq!(work.transfers()[1].status(), TransferStatus::Waiting);
        work.slice_failed(1, SliceError::of(Cause::Deadline));
        work.hold();
        assert_eq!(work.settle(1), None, "the hold keeps it");
        assert!(!work.completion().is_done());
        assert_eq!(work.settle(1), Some(false));
        assert!(work.completion().is_done() && work.is_terminal());
        assert_eq!(work.transfers()[1].status(), TransferStatus::Failed(SliceError::of(Cause::Deadline)));
        assert_eq!(work.first_error(), Some(SliceError::of(Cause::Deadline)));
    }

    /// A task that runs right in its waker, as some executors do it, asks for the next wake-up from there.
    struct Inline(Arc<Completion>, AtomicU32);

    impl std::task::Wake for Inline {
        fn wake(self: Arc<Self>) {
            if self.1.fetch_add(1, Ordering::Relaxed) == 0 {
                self.0.register(&Waker::from(self.clone()));
            }
        }
    }

    #[test]
    fn a_task_may_register_again_while_it_is_woken() {
        let completion = Completion::new(1);
        let task = Arc::new(Inline(completion.clone(), AtomicU32::new(0)));
        completion.register(&Waker::from(task.clone()));
        let (done, waited) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            completion.wake();
            completion.wake();
            done.send(()).unwrap();
        });
        assert!(waited.recv_timeout(std::time::Duration::from_secs(5)).is_ok(), "control waits for itself");
        assert_eq!(task.1.load(Ordering::Relaxed), 2);
    }

    #[test]
    fn a_sleeper_is_announced_before_it_sleeps() {
        let work = work(1);
        assert!(!work.completion().sleep(Instant::now()));
        let _ = work.claim(1);
        work.slice_done(0);
        assert_eq!(work.settle(1), Some(true), "whoever ends it must wake");
        assert!(work.completion().sleep(Instant::now()));
    }
}
