//! Transfers submitted together, and their end.

use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use moonrail_datapath::core::{Inbox, Led};
use moonrail_datapath::error::{Cause, SliceError};
use moonrail_datapath::limits::{DRAIN_LIMIT, STALL_AFTER};
use moonrail_datapath::nic::{Direct, Op};
use moonrail_datapath::work::{Completion, Proof, Quiescence, TransferStatus, Work};
use smallvec::SmallVec;

use crate::engine::{Engine, Shared};
use crate::error::{SubmitError, TransferError, WaitError};
use crate::region::Region;
use crate::segment::Segment;

/// How long a waiter looks before it sleeps: longer than it takes to wake a sleeping core (55 us) and to do a small batch.
/// With less, both sleep in turns: the waiter is woken after the core has fallen asleep, and each batch pays both wake-ups
/// (benches/results: 81 us instead of 14 for 128 x 4 KiB).
const SPIN: Duration = Duration::from_micros(300);
/// For so long it keeps its processor; after that it looks between other threads, one of which may be the core that it
/// waits for (see the core's `PollMode::Adaptive`).
const HARD: Duration = Duration::from_micros(5);
/// How long after the batch's own deadline an `.await` goes on: the cores look once a millisecond, and drain.
const GRACE: Duration = Duration::from_secs(1);
/// How long after its deadline our own end of a batch may take: its queue pairs fall silent, or fail, and are drained or
/// destroyed. What is not over by then waits for the peer's word, which may never come.
const OWN_END: Duration = Duration::from_nanos(STALL_AFTER.0 + DRAIN_LIMIT.0).saturating_add(GRACE);
/// How long control may take to tell what it knows of a failure: to a thread that waits, and to one that must not.
const PATIENCE: Duration = Duration::from_millis(500);
const AT_ONCE: Duration = Duration::from_millis(10);

/// One READ or WRITE of a contiguous range.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Transfer {
    /// READ: the peer's memory to ours. WRITE: ours to the peer's.
    pub op: Op,
    /// Absolute local address; the range lies in one registered region.
    pub local: u64,
    /// Absolute address in the peer; the range lies in its published buffers.
    pub remote: u64,
    /// Bytes; 0 is done at once.
    pub len: u64,
}

impl Transfer {
    /// Peer's memory at `remote` to local memory at `local`.
    pub const fn read(local: u64, remote: u64, len: u64) -> Self {
        Self { op: Op::Read, local, remote, len }
    }

    /// Local memory at `local` to the peer's at `remote`.
    pub const fn write(local: u64, remote: u64, len: u64) -> Self {
        Self { op: Op::Write, local, remote, len }
    }

    /// READ into `region` from its byte `offset` on.
    pub fn read_into(region: &Region, offset: u64, remote: u64, len: u64) -> Self {
        Self::read(region.addr().wrapping_add(offset), remote, len)
    }

    /// WRITE from `region` from its byte `offset` on.
    pub fn write_from(region: &Region, offset: u64, remote: u64, len: u64) -> Self {
        Self::write(region.addr().wrapping_add(offset), remote, len)
    }
}

/// How far a batch is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum BatchStatus {
    /// Some transfers have not ended; its memory is in use.
    Waiting,
    /// Every byte is in place.
    Done,
    /// Every transfer has ended, at least one without all its bytes. No NIC touches the memory any more for it.
    Failed,
}

/// How far one transfer is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum TransferState {
    /// Not all slices have ended.
    Waiting,
    /// Every byte is in place.
    Done,
    /// It ended without all its bytes.
    Failed(Cause),
}

/// Transfers to one or more peers, to be submitted together.
pub struct BatchBuilder<'a> {
    pub(crate) engine: &'a Engine,
    pub(crate) transfers: Vec<(Segment, Transfer)>,
    pub(crate) deadline: Option<Duration>,
}

impl BatchBuilder<'_> {
    /// Adds a transfer; its number in the batch is the count of those added before.
    #[must_use]
    pub fn add(mut self, segment: &Segment, transfer: Transfer) -> Self {
        self.transfers.push((segment.clone(), transfer));
        self
    }

    /// Ends what is not done after this time, instead of the engine's default (30 s + 1 ns per byte).
    #[must_use]
    pub fn deadline(mut self, after: Duration) -> Self {
        self.deadline = Some(after);
        self
    }

    /// Submits everything, or nothing. Over shared memory up to 512 KiB to one peer, all READs or all WRITEs, are copied by the calling
    /// thread before this returns (some 10 us; to hand them to a core would take longer). Does not block, unless a range lies outside what the peer had published: then the
    /// peer's descriptor is fetched once more.
    ///
    /// # Errors
    /// See [`SubmitError`]. A batch of several peers or regions whose first part was taken before the engine ran full
    /// is submitted; the parts there was no room for end as cancelled.
    pub fn submit(self) -> Result<Batch, SubmitError> {
        if let [(segment, only)] = self.transfers.as_slice()
            && let Some(done) = self.engine.shared.submit_one(segment, only)
        {
            return Ok(done);
        }
        self.engine.shared.submit(self.transfers.as_slice(), self.deadline)
    }
}

/// A transfer of a batch, and its number of Work and place in it; `None` for an empty one.
pub(crate) struct Place {
    pub(crate) transfer: Transfer,
    pub(crate) work: Option<(u32, u32)>,
}

/// Those of a batch, in its order. Most have one.
pub(crate) type Places = SmallVec<[Place; 1]>;
/// The Works of a batch.
pub(crate) type Works = SmallVec<[Arc<Work>; 1]>;

/// What a batch is while it is under way and after.
pub(crate) struct Flight {
    pub(crate) shared: Arc<Shared>,
    pub(crate) completion: Arc<Completion>,
    pub(crate) places: Places,
    pub(crate) submitted: Instant,
    /// When the cores end it.
    pub(crate) limit: Instant,
    /// The peer's memory, if all of it goes to one peer and this process's threads reach that.
    pub(crate) direct: Option<Arc<dyn Direct>>,
    /// The core that all of it goes to, if this process's threads may turn that meanwhile.
    pub(crate) lead: Option<usize>,
}

enum Carried {
    /// As submitted; they hold the registered memory.
    Held(Works),
    /// Over, with state and bytes of each transfer, the first error, and what proves the end. Memory is let go.
    Over(Vec<(TransferState, u64)>, Option<Box<TransferError>>, Quiescence),
}

const UNKNOWN: u8 = 0;
const DONE: u8 = 1;
const FAILED: u8 = 2;

pub(crate) struct Inner {
    flight: Flight,
    verdict: AtomicU8,
    /// Nanoseconds from submission until the end was seen; 0: not yet.
    ended: AtomicU64,
    works: Mutex<Carried>,
}

/// Transfers on their way. Any thread may poll it and wait for it. Dropping it never blocks: what is not on its way yet
/// is cancelled, what is in flight keeps its memory until it has ended.
pub struct Batch {
    kind: Kind,
}

enum Kind {
    /// Handed to the cores.
    Flying(Flying),
    /// Copied by the submitting thread, and so done from the start, with bytes in it: the length of its only transfer.
    CopiedOne(u64),
    /// The same of several: the length of each.
    Copied(Box<[u64]>),
}

struct Flying {
    inner: Arc<Inner>,
    /// Whether the bound of `.await` is set.
    timed: bool,
}

impl Drop for Flying {
    fn drop(&mut self) {
        if !self.inner.is_here() {
            // It may hold the last reference to a registration, and that is the parent's.
            std::mem::forget(self.inner.clone());
        } else if !self.inner.flight.completion.is_done() {
            self.inner.cancel();
        }
    }
}

impl Batch {
    pub(crate) fn new(flight: Flight, works: Works) -> Self {
        let works = Mutex::new(Carried::Held(works));
        let inner = Arc::new(Inner { flight, verdict: AtomicU8::new(UNKNOWN), ended: AtomicU64::new(0), works });
        inner.flight.shared.live.add(&inner);
        Self { kind: Kind::Flying(Flying { inner, timed: false }) }
    }

    #[inline]
    pub(crate) fn copied_one(len: u64) -> Self {
        Self { kind: Kind::CopiedOne(len) }
    }

    pub(crate) fn copied(lens: Box<[u64]>) -> Self {
        Self { kind: Kind::Copied(lens) }
    }

    /// What is on its way, or was; `None` for what was done when `submit` returned.
    #[inline]
    fn flying(&self) -> Option<&Inner> {
        if let Kind::Flying(flying) = &self.kind { Some(&flying.inner) } else { None }
    }

    /// Lengths of its transfers, if they were copied.
    fn copied_lens(&self) -> &[u64] {
        match &self.kind {
            Kind::Flying(_) => &[],
            Kind::CopiedOne(len) => std::slice::from_ref(len),
            Kind::Copied(lens) => lens,
        }
    }

    /// Number of transfers.
    pub fn len(&self) -> usize {
        self.flying().map_or_else(|| self.copied_lens().len(), |inner| inner.flight.places.len())
    }

    /// Whether it has no transfers: then it is done from the start.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The status now. While the batch is under way this thread turns the core that carries it once, unless another thread does. [`BatchStatus::Failed`] in a forked child, as nothing will be
    /// known of it there, unless it was seen to be done before.
    #[inline]
    pub fn poll(&self) -> BatchStatus {
        let Some(inner) = self.flying() else { return BatchStatus::Done };
        match inner.status() {
            BatchStatus::Waiting => inner.attend(),
            over => over,
        }
    }

    /// Waits for the end, at most `for_at_most`. Meanwhile this thread turns the core that carries the batch, if the core's own
    /// thread has nothing to do and no other caller turns it; where the peer's memory is in its reach, it carries slices
    /// itself, beside the cores. When nothing has happened for 0.3 ms it sleeps. May be called again.
    ///
    /// Nor does it wait longer than ten seconds after the batch's deadline: what is not over then is in quarantine
    /// ([`Quiescence::Quarantined`]), for as long as the peer's end is not proven retired. A call after that has all its time.
    ///
    /// # Errors
    /// [`WaitError::Failed`] when the batch is over and not all bytes are in place; [`WaitError::DeadlineExceeded`] when
    /// it is not over; [`WaitError::Forked`] in a forked child.
    #[inline]
    pub fn wait(&self, for_at_most: Duration) -> Result<(), WaitError> {
        self.flying().map_or(Ok(()), |inner| inner.wait(for_at_most))
    }

    /// Whether the memory of all its transfers, local and the peer's, may be used again, and what proves it. Any time, any
    /// thread; does not block, and costs a walk over the slices of what is over.
    ///
    /// The memory is free with [`Quiescence::NeverPosted`] and [`Quiescence::Quiesced`], and only then: that is when the batch is
    /// over ([`Batch::poll`]), however it ended. After a cancel or the deadline a batch that is not over is
    /// [`Quiescence::Quarantined`]: it keeps its regions, [`crate::Engine::unregister`] waits for it, and it is over as soon as
    /// there is proof. With an engine that was shut down that may be never.
    pub fn quiescence(&self) -> Quiescence {
        let copied = Quiescence::Quiesced { how: Proof::CompletionSeen };
        self.flying().map_or(copied, Inner::quiescence)
    }

    /// The state of one transfer; `None` beyond the last.
    pub fn transfer(&self, index: usize) -> Option<TransferState> {
        self.state(index).map(|(state, _)| state)
    }

    /// Bytes of one transfer that are in place; 0 beyond the last.
    pub fn transfer_bytes(&self, index: usize) -> u64 {
        self.state(index).map_or(0, |(_, bytes)| bytes)
    }

    fn state(&self, index: usize) -> Option<(TransferState, u64)> {
        match self.flying() {
            Some(inner) => inner.transfer(index),
            None => self.copied_lens().get(index).map(|len| (TransferState::Done, *len)),
        }
    }

    /// Bytes of all transfers that are in place.
    pub fn bytes(&self) -> u64 {
        (0..self.len()).map(|index| self.transfer_bytes(index)).sum()
    }

    /// The first transfer that failed, in words, with its first cause. May be there before the batch is over.
    pub fn first_error(&self) -> Option<TransferError> {
        self.flying()?.first_error(PATIENCE)
    }

    /// Time since submission, or from submission to the moment the end was first seen; zero for a batch that was done when `submit`
    /// returned: to look at the clock would take as long as a small copy.
    pub fn elapsed(&self) -> Duration {
        self.flying().map_or(Duration::ZERO, |inner| match inner.ended.load(Ordering::Relaxed) {
            0 => inner.flight.submitted.elapsed(),
            nanos => Duration::from_nanos(nanos),
        })
    }

    /// Ends what is not on its way yet; what is, may arrive as long as its rail moves. Where nothing comes back for 300 ms (four
    /// round trips of a slower path), its queue pairs are given up and drained. The batch is over soon after, as failed unless
    /// all was done; a WRITE that was cut off waits for the peer's word first. Does not block. Whether the memory may be used again is asked of [`Batch::quiescence`].
    pub fn cancel(&self) {
        if let Some(inner) = self.flying() {
            inner.cancel();
        }
    }
}

impl fmt::Debug for Batch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Batch")
            .field("transfers", &self.len())
            .field("status", &self.flying().map_or(BatchStatus::Done, Inner::status))
            .finish_non_exhaustive()
    }
}

/// `batch.await`, or `(&mut batch).await` to ask it for details afterwards. Ends with the batch; if that is not over a
/// second after its deadline, or when the engine has ended, with [`WaitError::DeadlineExceeded`]. Needs no particular
/// runtime.
impl Future for Batch {
    type Output = Result<(), WaitError>;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.get_mut();
        let Kind::Flying(Flying { inner, timed }) = &mut this.kind else { return Poll::Ready(Ok(())) };
        if !inner.is_here() {
            return Poll::Ready(Err(WaitError::Forked));
        }
        let flight = &inner.flight;
        if !flight.completion.is_done() {
            flight.completion.register(context.waker());
            let bound = flight.limit + GRACE;
            if !flight.completion.is_done() {
                // With the engine ended nothing will change any more, and nobody would wake us.
                let watch = &flight.shared.watch;
                let watched = if *timed { !watch.is_stopped() } else { watch.wake_at(bound, &flight.completion) };
                *timed = true;
                if Instant::now() >= bound || !watched {
                    return Poll::Ready(Err(inner.not_over(AT_ONCE)));
                }
                // Who awaits it does not turn its core.
                if let Some(core) = inner.lead() {
                    core.call();
                }
                return Poll::Pending;
            }
        }
        Poll::Ready(inner.outcome(AT_ONCE))
    }
}

impl Inner {
    /// Whether this is the process it was submitted in. If not, who holds its lock may not be here, and it never ends.
    fn is_here(&self) -> bool {
        self.flight.shared.is_here()
    }

    fn wait(&self, for_at_most: Duration) -> Result<(), WaitError> {
        if !self.is_here() {
            return Err(WaitError::Forked);
        }
        let started = Instant::now();
        let until = wait_until(started, for_at_most, self.flight.limit);
        let completion = &self.flight.completion;
        let core = self.lead();
        let mut wanting = core.map(Inbox::want);
        let shared = &self.flight.shared;
        let mut quiet = false;
        // The clock is a system call on some machines, and a tenth of a short transfer on others.
        let mut first = Some(started);
        while !completion.is_done() {
            let now = first.take().unwrap_or_else(Instant::now);
            let waited = if quiet { SPIN } else { now.duration_since(started) };
            if now >= until {
                drop(wanting);
                return Err(self.not_over(PATIENCE));
            }
            if self.assist() {
                continue;
            }
            if let Some(core) = core.filter(|_| !quiet) {
                let (now, until) = (shared.at(now), shared.at(until));
                let led = core.lead(now, until, &*shared.clock, &mut || completion.is_done());
                quiet = led == Led::Quiet;
                if led != Led::Follow {
                    continue;
                }
            }
            if waited >= HARD && waited < SPIN {
                // A core may want this very processor.
                std::thread::yield_now();
            } else if waited < SPIN {
                for _ in 0..32 {
                    std::hint::spin_loop();
                }
            } else {
                // Who sleeps turns no core. Its own thread hears of that after a nap: to wake it at once, beside whoever turns the core
                // now, costs more than it saves (64 KiB x 8 from four threads over TCP: a tenth).
                wanting = None;
                if !completion.sleep(until) {
                    return Err(self.not_over(PATIENCE));
                }
            }
        }
        drop(wanting);
        self.outcome(PATIENCE)
    }

    /// The core that this thread may turn while it waits.
    fn lead(&self) -> Option<&Inbox> {
        self.flight.lead.map(|core| &*self.flight.shared.inboxes[core])
    }

    /// The status after a turn of the core, if nobody else turns it.
    fn attend(&self) -> BatchStatus {
        if let Some(core) = self.lead() {
            core.attend(&*self.flight.shared.clock);
        }
        self.status()
    }

    /// Carries a run of slices on this thread, where that can be done. Whether it did.
    fn assist(&self) -> bool {
        let Some(direct) = &self.flight.direct else { return false };
        // Taken out one by one: the lock is not held while bytes are copied.
        let mut number = 0;
        loop {
            let work = match &*self.works() {
                Carried::Held(works) => works.get(number).cloned(),
                Carried::Over(..) => None,
            };
            let Some(work) = work else { return false };
            let done = work.assist(direct.as_ref());
            self.flight.shared.count_copied(done.slices, done.bytes);
            if done.gave_back {
                self.flight.shared.enqueue_again(&work);
                return false;
            }
            if done.slices > 0 {
                return true;
            }
            number += 1;
        }
    }

    fn quiescence(&self) -> Quiescence {
        if !self.is_here() {
            return Quiescence::Quarantined;
        }
        match &*self.works() {
            Carried::Over(.., quiescence) => *quiescence,
            Carried::Held(works) => quiescence_of(works),
        }
    }

    fn works(&self) -> MutexGuard<'_, Carried> {
        self.works.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn status(&self) -> BatchStatus {
        if !self.is_here() {
            let done = self.verdict.load(Ordering::Relaxed) == DONE;
            return if done { BatchStatus::Done } else { BatchStatus::Failed };
        }
        if !self.flight.completion.is_done() {
            return BatchStatus::Waiting;
        }
        if self.verdict.load(Ordering::Relaxed) == UNKNOWN {
            let failed = match &*self.works() {
                Carried::Held(works) => works.iter().any(|work| has_failed(work)),
                Carried::Over(_, error, _) => error.is_some(),
            };
            let nanos = u64::try_from(self.flight.submitted.elapsed().as_nanos()).unwrap_or(u64::MAX);
            let _ = self.ended.compare_exchange(0, nanos.max(1), Ordering::Relaxed, Ordering::Relaxed);
            self.verdict.store(if failed { FAILED } else { DONE }, Ordering::Relaxed);
        }
        if self.verdict.load(Ordering::Relaxed) == FAILED { BatchStatus::Failed } else { BatchStatus::Done }
    }

    /// Called when the batch is over.
    fn outcome(&self, patience: Duration) -> Result<(), WaitError> {
        if self.status() == BatchStatus::Done {
            return Ok(());
        }
        match self.first_error(patience) {
            Some(error) => Err(WaitError::Failed(Box::new(error))),
            None => Ok(()),
        }
    }

    fn transfer(&self, index: usize) -> Option<(TransferState, u64)> {
        let place = self.flight.places.get(index)?;
        if !self.is_here() {
            return Some((TransferState::Failed(Cause::Shutdown), 0));
        }
        match &*self.works() {
            Carried::Held(works) => Some(state_of(works, place)),
            Carried::Over(states, ..) => states.get(index).copied(),
        }
    }

    fn first_error(&self, patience: Duration) -> Option<TransferError> {
        if !self.is_here() {
            return None;
        }
        let held: Works = match &*self.works() {
            Carried::Over(_, error, _) => return error.as_deref().cloned(),
            Carried::Held(works) => works.clone(),
        };
        self.describe(&held, patience)
    }

    /// Lets go of the memory of a batch that is over, keeping what is told of it.
    pub(crate) fn retire(&self, patience: Duration) {
        if !self.flight.completion.is_done() {
            return;
        }
        let held = match &*self.works() {
            Carried::Over(..) => return,
            Carried::Held(works) => works.clone(),
        };
        let error = self.describe(&held, patience).map(Box::new);
        let states = self.flight.places.iter().map(|place| state_of(&held, place)).collect();
        *self.works() = Carried::Over(states, error, quiescence_of(&held));
    }

    fn cancel(&self) {
        if !self.is_here() {
            return;
        }
        let held = match &*self.works() {
            Carried::Over(..) => return,
            Carried::Held(works) => works.clone(),
        };
        // Without the lock: who is woken by this may ask us at once.
        for work in &held {
            work.abandon(SliceError::of(Cause::Cancelled));
        }
    }

    /// The first transfer that failed. What the Work met on the way is told only with a failure: a slice that came back
    /// and arrived by another rail is no error of the batch.
    fn describe(&self, works: &[Arc<Work>], patience: Duration) -> Option<TransferError> {
        self.flight.places.iter().enumerate().find_map(|(index, place)| {
            let (number, slot) = place.work?;
            let work = works.get(number as usize)?;
            match work.transfers().get(slot as usize)?.status() {
                TransferStatus::Failed(error) => {
                    Some(self.flight.shared.put_into_words(index, place.transfer, work, error, patience))
                }
                _ => None,
            }
        })
    }

    fn not_over(&self, patience: Duration) -> WaitError {
        let works = match &*self.works() {
            Carried::Held(works) => works.clone(),
            Carried::Over(..) => Works::new(),
        };
        let waiting: Vec<usize> = (0..self.flight.places.len())
            .filter(|&index| matches!(self.transfer(index), Some((TransferState::Waiting, _))))
            .collect();
        let slow = waiting.first().and_then(|&index| self.flight.places[index].work);
        let peer = slow.and_then(|(number, _)| works.get(number as usize)).map(|work| work.remote().peer.name());
        let what = match (waiting.len(), peer) {
            (0, _) => "all transfers have ended, but it is not proven that nothing of them can still land".to_owned(),
            (count, Some(peer)) => {
                format!("{count} of {} transfers with {peer} have not ended", self.flight.places.len())
            }
            (count, None) => format!("{count} of {} transfers have not ended", self.flight.places.len()),
        };
        let seen = self.first_error(patience).map(|error| error.to_string());
        let cause = seen.or_else(|| self.flight.shared.trouble_with(peer?, patience));
        WaitError::DeadlineExceeded { what, since: self.flight.submitted.elapsed(), cause }
    }
}

/// A point in time from a span of the caller's, which may be as long as it likes.
pub(crate) fn after(start: Instant, span: Duration) -> Instant {
    const CENTURY: Duration = Duration::from_secs(100 * 365 * 24 * 3600);
    start + span.min(CENTURY)
}

/// When a wait that begins at `started` ends at the latest, where the cores end the batch at `limit`.
fn wait_until(started: Instant, for_at_most: Duration, limit: Instant) -> Instant {
    let (own, quarantine) = (after(started, for_at_most), after(limit, OWN_END));
    if started < quarantine { own.min(quarantine) } else { own }
}

/// One that is over only as far as all its parts are.
fn quiescence_of(works: &[Arc<Work>]) -> Quiescence {
    works.iter().map(|work| work.quiescence()).max().unwrap_or(Quiescence::NeverPosted)
}

fn has_failed(work: &Work) -> bool {
    work.transfers().iter().any(|transfer| matches!(transfer.status(), TransferStatus::Failed(_)))
}

fn state_of(works: &[Arc<Work>], place: &Place) -> (TransferState, u64) {
    let Some(outcome) = place.work.and_then(|(work, slot)| works.get(work as usize)?.transfers().get(slot as usize))
    else {
        return (TransferState::Done, 0);
    };
    let state = match outcome.status() {
        TransferStatus::Waiting => TransferState::Waiting,
        TransferStatus::Done => TransferState::Done,
        TransferStatus::Failed(error) => TransferState::Failed(error.cause),
    };
    (state, outcome.transferred())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wait_ends_when_the_quarantine_has_begun_and_may_be_begun_again() {
        let now = Instant::now();
        let (second, hour) = (Duration::from_secs(1), Duration::from_secs(3600));
        assert_eq!(wait_until(now, second, now + hour), now + second);
        assert_eq!(wait_until(now, hour, now + second), now + second + OWN_END);
        let again = now + second + OWN_END;
        assert_eq!(wait_until(again, hour, now + second), again + hour);
        assert!(wait_until(now, Duration::MAX, after(now, Duration::MAX)) > now + hour);
    }
}
