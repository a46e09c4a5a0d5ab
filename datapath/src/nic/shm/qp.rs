//! Queue pairs of copies: posting hands requests over, polling carries them out.
//!
//! ```text
//!   post(chain) ──▶ send queue (ring) ──▶ ready list ──▶ poll: one pass, up to 1 MiB, completions straight into `out`
//!   to_error ──▶ flag ─────────────────────┘                │ more left, or a region not announced yet
//!                                          └────────────────┘
//! ```
//! A core posts at the end of one turn and polls at the start of the next, so nothing waits; and a long chain is cut by
//! the poll's budget, so that other NICs of the core have their turn. Requests end in order; the first that fails ends
//! the queue pair's life, and what is behind it is flushed, asked for or not.

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering, fence};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crossbeam_queue::ArrayQueue;

use super::attachment::{Attachment, CopyError, PASS_BYTES, Pass};
use super::copy;
use super::foreign::{Piece, RANGES};
use super::view::{Entry, Reach};
use super::wake::Wake;
use crate::limits::{CHAIN_MAX, QP_SLOTS};
use crate::nic::{AdminQp, Completion, CompletionQueue, PostQp, Posted, WcStatus, WorkRequest, dial};
use crate::units::{Lkey, Qpn, RemoteAddr, Rkey, WrId};

/// A region may be published before it is announced here. The ledger counts changes, so a request knows whether to wait
/// for it; so long at the most, for a peer that does not tell.
const ANNOUNCED_WITHIN: Duration = Duration::from_millis(500);
/// A queue pair that is destroyed in mid-copy: the bound of a pass, generously.
const PASS_WITHIN: Duration = Duration::from_secs(5);
/// What a request costs of a poll's budget at least.
const COST_MIN: usize = 256;

/// What the completion queue and its queue pairs share.
pub(super) struct CqShared {
    depth: u32,
    /// Queue pairs with something to do.
    ready: ArrayQueue<u32>,
    /// Queue pairs the poller has not met.
    joining: ArrayQueue<Box<Executor>>,
    free: Mutex<Vec<u32>>,
    wake: Wake,
    /// Nobody polls any more.
    gone: AtomicBool,
    /// Where executors go to be dropped: not on a core.
    retired: Arc<Retired>,
}

/// Executors of destroyed queue pairs, for the service thread to drop.
pub(super) struct Retired {
    pub(super) executors: ArrayQueue<Box<Executor>>,
    pub(super) wake: Arc<Wake>,
    /// The thread has ended: nobody takes them.
    pub(super) over: AtomicBool,
}

impl Retired {
    pub(super) fn drop_all(&self) {
        while let Some(executor) = self.executors.pop() {
            drop(executor);
        }
    }
}

/// The polling half.
pub(super) struct Cq {
    shared: Arc<CqShared>,
    executors: Box<[Option<Box<Executor>>]>,
}

pub(super) fn create_cq(depth: u32, retired: Arc<Retired>) -> io::Result<(Cq, Arc<CqShared>)> {
    let shared = Arc::new(CqShared {
        depth: depth.max(1),
        ready: ArrayQueue::new(QP_SLOTS),
        joining: ArrayQueue::new(QP_SLOTS),
        free: Mutex::new((0..QP_SLOTS as u32).rev().collect()),
        wake: Wake::new()?,
        gone: AtomicBool::new(false),
        retired,
    });
    Ok((Cq { shared: shared.clone(), executors: (0..QP_SLOTS).map(|_| None).collect() }, shared))
}

/// What both halves and the executor of one queue pair share.
struct SendQueue {
    qpn: Qpn,
    index: u32,
    ring: ArrayQueue<WorkRequest>,
    /// To be flushed from here on.
    errored: AtomicBool,
    /// The posting half is gone: nothing is copied any more.
    closed: AtomicBool,
    /// Stands in the ready list.
    queued: AtomicBool,
    /// Odd while requests are carried out.
    running: AtomicU64,
    cq: Arc<CqShared>,
}

impl SendQueue {
    fn mark_ready(&self) {
        if !self.queued.swap(true, Ordering::AcqRel) {
            // One place for each queue pair: it has room.
            let _ = self.cq.ready.push(self.index);
        }
    }
}

/// Why there is no queue pair.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Refused {
    /// The completion queue has no place left.
    Full,
    /// It is gone, with the core that polled it.
    CoreGone,
}

/// What a core has of a queue pair, and what control has.
pub(super) type Halves = (Box<dyn PostQp>, Box<dyn AdminQp>);

/// A queue pair to `attachment` that completes on `cq`.
pub(super) fn connect(cq: &Arc<CqShared>, depth: u32, attachment: Arc<Attachment>) -> Result<Halves, Refused> {
    let index = cq.free.lock().unwrap_or_else(PoisonError::into_inner).pop().ok_or(Refused::Full)?;
    let queue = Arc::new(SendQueue {
        qpn: dial::next_qpn(),
        index,
        ring: ArrayQueue::new(depth.max(1) as usize),
        errored: AtomicBool::new(false),
        closed: AtomicBool::new(false),
        queued: AtomicBool::new(false),
        running: AtomicU64::new(0),
        cq: cq.clone(),
    });
    let executor = Box::new(Executor {
        queue: queue.clone(),
        attachment,
        batch: [NOTHING; CHAIN_MAX],
        head: 0,
        len: 0,
        done: 0,
        bulk: false,
        failed: false,
        waits_until: None,
        hint: 0,
    });
    cq.joining.push(executor).map_err(|_| Refused::Full)?;
    if cq.gone.load(Ordering::SeqCst) {
        while cq.joining.pop().is_some() {}
        return Err(Refused::CoreGone);
    }
    Ok((Box::new(Post(queue.clone())), Box::new(Admin(queue))))
}

struct Post(Arc<SendQueue>);
struct Admin(Arc<SendQueue>);

impl PostQp for Post {
    fn qpn(&self) -> Qpn {
        self.0.qpn
    }

    fn depth(&self) -> u32 {
        self.0.ring.capacity() as u32
    }

    fn max_inline(&self) -> u32 {
        0
    }

    fn post(&mut self, chain: &[WorkRequest]) -> Posted {
        let accepted = chain.iter().take_while(|request| self.0.ring.push(**request).is_ok()).count();
        self.0.mark_ready();
        Posted { accepted, error: (accepted < chain.len()).then_some(libc::ENOMEM) }
    }

    fn drains_clean(&self) -> bool {
        true
    }
}

impl Drop for Post {
    /// Nothing is copied for this queue pair once this has returned.
    fn drop(&mut self) {
        self.0.closed.store(true, Ordering::Release);
        fence(Ordering::SeqCst);
        let seen = self.0.running.load(Ordering::Acquire);
        let until = Instant::now() + PASS_WITHIN;
        while seen & 1 == 1 && self.0.running.load(Ordering::Acquire) == seen && Instant::now() < until {
            std::thread::yield_now();
        }
        self.0.mark_ready();
        self.0.cq.wake.ring();
    }
}

impl AdminQp for Admin {
    fn qpn(&self) -> Qpn {
        self.0.qpn
    }

    fn to_error(&mut self) -> io::Result<()> {
        self.0.errored.store(true, Ordering::Release);
        self.0.mark_ready();
        self.0.cq.wake.ring();
        Ok(())
    }
}

impl CompletionQueue for Cq {
    fn depth(&self) -> u32 {
        self.shared.depth
    }

    fn poll(&mut self, out: &mut [Completion]) -> io::Result<usize> {
        let (mut filled, mut budget) = (0, PASS_BYTES);
        // Those that stand there now: who is put back waits for the next call.
        for _ in 0..self.shared.ready.len() {
            if filled == out.len() || budget == 0 {
                break;
            }
            while let Some(executor) = self.shared.joining.pop() {
                let index = executor.queue.index as usize;
                self.executors[index] = Some(executor);
            }
            let Some(index) = self.shared.ready.pop() else { break };
            let seat = &mut self.executors[index as usize];
            let Some(executor) = seat else { continue };
            executor.queue.queued.swap(false, Ordering::AcqRel);
            match executor.run(&mut out[filled..], &mut budget) {
                Some(completed) => filled += completed,
                None => {
                    if let Some(executor) = seat.take()
                        && !self.shared.retired.over.load(Ordering::Acquire)
                        && self.shared.retired.executors.push(executor).is_ok()
                    {
                        self.shared.retired.wake.ring();
                    }
                }
            }
        }
        Ok(filled)
    }

    fn arm(&mut self) -> io::Result<()> {
        if !self.shared.ready.is_empty() {
            self.shared.wake.ring();
        }
        Ok(())
    }

    fn event_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.shared.wake.fd())
    }

    fn clear_events(&mut self) -> io::Result<()> {
        self.shared.wake.clear();
        Ok(())
    }
}

impl Drop for Cq {
    fn drop(&mut self) {
        // Executors that were never met hold what they stand in.
        self.shared.gone.store(true, Ordering::SeqCst);
        while self.shared.joining.pop().is_some() {}
    }
}

/// Carries out what stands in one send queue.
pub(super) struct Executor {
    queue: Arc<SendQueue>,
    attachment: Arc<Attachment>,
    /// Taken out of the ring and not ended: `head..len`.
    batch: [WorkRequest; CHAIN_MAX],
    head: usize,
    len: usize,
    /// Bytes of the first one that are in place.
    done: u32,
    /// The batch is so large that nobody looks at all of it at once.
    bulk: bool,
    failed: bool,
    /// The first one's region is not known; from then on it never was.
    waits_until: Option<Instant>,
    hint: usize,
}

/// Fills unused places.
const NOTHING: WorkRequest = WorkRequest {
    wr_id: WrId { slot: 0, generation: 0, sequence: 0 },
    op: crate::nic::Op::Read,
    local: 0,
    lkey: Lkey(0),
    len: 0,
    remote: RemoteAddr(0),
    rkey: Rkey(0),
    signaled: false,
    inline: false,
};

/// What became of the request in front.
enum Step {
    /// It, or a part of it, was done.
    Moved,
    /// Its region is not known yet.
    Later,
    Failed(CopyError),
}

/// Where completions go.
struct Out<'a> {
    places: &'a mut [Completion],
    filled: usize,
}

impl Out<'_> {
    fn is_full(&self) -> bool {
        self.filled == self.places.len()
    }

    fn push(&mut self, completion: Completion) {
        if let Some(place) = self.places.get_mut(self.filled) {
            *place = completion;
            self.filled += 1;
        }
    }
}

impl Executor {
    /// Carries out what `budget` and the places for completions allow; `None` once the queue pair is destroyed.
    fn run(&mut self, places: &mut [Completion], budget: &mut usize) -> Option<usize> {
        let queue = self.queue.clone();
        queue.running.fetch_add(1, Ordering::SeqCst);
        fence(Ordering::SeqCst);
        let closed = queue.closed.load(Ordering::Acquire);
        let mut out = Out { places, filled: 0 };
        if !closed {
            self.carry_out(&mut out, budget);
        }
        queue.running.fetch_add(1, Ordering::Release);
        if closed {
            return None;
        }
        if self.head < self.len || !queue.ring.is_empty() {
            queue.mark_ready();
        }
        Some(out.filled)
    }

    fn carry_out(&mut self, out: &mut Out<'_>, budget: &mut usize) {
        while !out.is_full() && *budget > 0 && self.refill() {
            if self.failed || self.queue.errored.load(Ordering::Acquire) {
                self.failed = true;
                self.end(CopyError::of(WcStatus::WR_FLUSH_ERR), out);
                continue;
            }
            let attachment = self.attachment.clone();
            // Every lane taken: the next poll tries again.
            let Some(pass) = attachment.enter() else { return };
            let mut later = false;
            while !out.is_full() && *budget > 0 && self.head < self.len {
                match self.step(&pass, out, budget) {
                    Step::Moved => {}
                    Step::Later => {
                        later = true;
                        break;
                    }
                    Step::Failed(error) => {
                        self.failed = true;
                        self.end(error, out);
                        break;
                    }
                }
            }
            if later {
                return;
            }
        }
    }

    /// Whether there is a request in front.
    fn refill(&mut self) -> bool {
        if self.head == self.len {
            (self.head, self.len, self.done) = (0, 0, 0);
            let mut bytes = 0;
            while self.len < self.batch.len() {
                let Some(request) = self.queue.ring.pop() else { break };
                bytes += request.len as usize;
                self.batch[self.len] = request;
                self.len += 1;
            }
            self.bulk = bytes >= copy::BULK;
        }
        self.head < self.len
    }

    fn step(&mut self, pass: &Pass<'_>, out: &mut Out<'_>, budget: &mut usize) -> Step {
        let request = self.batch[self.head];
        if request.len == 0 {
            if self.attachment.is_dead() {
                return Step::Failed(CopyError::of(WcStatus::RETRY_EXC_ERR));
            }
            self.succeed(out);
            return Step::Moved;
        }
        let entry = match pass.find(request.remote.0, request.len, &mut self.hint) {
            Ok(Some(entry)) => entry,
            Ok(None) => return self.not_known(pass.is_behind()),
            Err(error) => return Step::Failed(error),
        };
        self.waits_until = None;
        if matches!(entry.reach, Reach::Foreign) {
            return self.step_foreign(pass, out, budget);
        }
        self.prefetch_next(entry);
        let piece = ((request.len - self.done) as usize).min(*budget) as u32;
        let (local, remote) = (request.local + u64::from(self.done), request.remote.0 + u64::from(self.done));
        match pass.copy(request.op, local, entry, remote, piece, self.bulk) {
            Ok(moved) => self.moved(moved as usize, out, budget),
            Err(error) => return Step::Failed(error),
        }
        Step::Moved
    }

    /// One system call for the requests in front that go the same way, the first of which is at `done`.
    fn step_foreign(&mut self, pass: &Pass<'_>, out: &mut Out<'_>, budget: &mut usize) -> Step {
        let mut pieces = [Piece { local: 0, remote: 0, len: 0 }; RANGES];
        let (op, mut count, mut bytes) = (self.batch[self.head].op, 0, 0);
        let room = out.places.len() - out.filled;
        for at in self.head..self.len {
            let request = self.batch[at];
            let done = if at == self.head { self.done } else { 0 };
            if count == RANGES || count == room || bytes >= *budget || request.op != op || request.len == 0 {
                break;
            }
            let found = pass.find(request.remote.0, request.len, &mut self.hint);
            if !matches!(found, Ok(Some(Entry { reach: Reach::Foreign, .. }))) {
                break;
            }
            let len = ((request.len - done) as usize).min(*budget - bytes);
            let (local, remote) = (request.local + u64::from(done), request.remote.0 + u64::from(done));
            pieces[count] = Piece { local, remote, len };
            count += 1;
            bytes += len;
        }
        match pass.kernel_copies(op, &pieces[..count]) {
            Ok(moved) => self.moved(moved, out, budget),
            Err(error) => return Step::Failed(error),
        }
        Step::Moved
    }

    fn not_known(&mut self, is_behind: bool) -> Step {
        if !is_behind {
            return Step::Failed(CopyError::of(WcStatus::REM_ACCESS_ERR));
        }
        let now = Instant::now();
        if now < *self.waits_until.get_or_insert(now + ANNOUNCED_WITHIN) {
            return Step::Later;
        }
        Step::Failed(CopyError::of(WcStatus::REM_ACCESS_ERR))
    }

    /// `bytes` more of the requests in front are in place.
    fn moved(&mut self, mut bytes: usize, out: &mut Out<'_>, budget: &mut usize) {
        *budget = budget.saturating_sub(bytes.max(COST_MIN));
        while bytes > 0 && self.head < self.len {
            let left = (self.batch[self.head].len - self.done) as usize;
            if bytes < left {
                self.done += bytes as u32;
                return;
            }
            bytes -= left;
            self.succeed(out);
        }
    }

    fn prefetch_next(&self, entry: &Entry) {
        let Some(next) = self.batch[..self.len].get(self.head + 1) else { return };
        let inside = entry.addr <= next.remote.0 && next.remote.0 < entry.end;
        match next.op {
            crate::nic::Op::Write => copy::prefetch(next.local as *const u8),
            crate::nic::Op::Read if inside => {
                if let Some(at) = entry.here(next.remote.0) {
                    copy::prefetch(at);
                }
            }
            crate::nic::Op::Read => {}
        }
    }

    fn succeed(&mut self, out: &mut Out<'_>) {
        if self.batch[self.head].signaled {
            self.end(CopyError::of(WcStatus::SUCCESS), out);
        } else {
            (self.head, self.done) = (self.head + 1, 0);
        }
    }

    fn end(&mut self, how: CopyError, out: &mut Out<'_>) {
        let wr_id = self.batch[self.head].wr_id;
        let vendor_err = how.errno.unsigned_abs();
        out.push(Completion { wr_id, status: how.status, vendor_err, qpn: self.queue.qpn });
        (self.head, self.done) = (self.head + 1, 0);
    }
}

impl Drop for Executor {
    fn drop(&mut self) {
        self.queue.cq.free.lock().unwrap_or_else(PoisonError::into_inner).push(self.queue.index);
    }
}
