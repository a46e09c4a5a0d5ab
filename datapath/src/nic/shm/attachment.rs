//! A peer's memory in reach of this process: what every thread that copies shares.
//!
//! ```text
//!   attachment ── view: the peer's regions, replaced as a whole by the service thread
//!        │        ledger: the peer's words          lanes: ours in the peer's sight, and ours in our own
//!        ▼
//!   pass = one lane held: the view stays, no region goes ── find ── check the word ── copy ── leave
//! ```
//! A pass is short: whoever replaces the view or takes memory back waits for it.

use std::cell::Cell;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::copy;
use super::foreign::{Foreign, Piece};
use super::ledger::{Ledger, SharedLanes};
use super::view::{Entry, Reach, View};
use super::wake::Wake;
use super::wire::Process;
use crate::lanes::{self, Inside, LaneArray, Lanes, Retired, Snapshot, raise};
use crate::nic::{Op, WcStatus};
use crate::region::Memory;
use crate::units::RemoteAddr;

/// Bytes copied in one pass at the most.
pub(super) const PASS_BYTES: usize = 1 << 20;
/// A thread that finds every lane taken tries so long.
const LANE_WITHIN: Duration = Duration::from_secs(1);

/// Why a copy was not made.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct CopyError {
    /// As a completion would say it: RETRY_EXC_ERR the peer is gone, REM_ACCESS_ERR it has no such region (now),
    /// REM_OP_ERR the system does not let us at it.
    pub status: WcStatus,
    /// errno, 0 where there is none.
    pub errno: i32,
}

impl CopyError {
    pub(super) const fn of(status: WcStatus) -> Self {
        Self { status, errno: 0 }
    }
}

/// A peer's memory, in reach. Any thread may copy through it.
pub struct Attachment {
    pub(super) token: u64,
    ledger: Arc<Ledger>,
    /// In the peer's sight; none where the peer is this very NIC, which then looks at `own`.
    shared: Option<SharedLanes>,
    /// The NIC's: a thread has the same lane here and there, so it enters here once, whatever peer it copies to.
    own: Arc<Lanes>,
    view: Snapshot<View>,
    dead: AtomicBool,
    /// The right to memory that the peer borrowed, or why there is none.
    pub(super) foreign: Result<Foreign, String>,
    pub(super) process: Option<Arc<Process>>,
    wake: Arc<Wake>,
}

impl Attachment {
    pub(super) fn new(
        token: u64,
        ledger: Arc<Ledger>,
        shared: Option<SharedLanes>,
        own: Arc<Lanes>,
        process: Option<Arc<Process>>,
        foreign: Result<Foreign, String>,
        wake: Arc<Wake>,
    ) -> Self {
        Self {
            token,
            ledger,
            shared,
            view: Snapshot::new(own.clone(), View::default()),
            own,
            dead: AtomicBool::new(false),
            foreign,
            process,
            wake,
        }
    }

    /// Whether the peer has ended. Nothing is copied then.
    pub fn is_dead(&self) -> bool {
        self.dead.load(Ordering::Acquire)
    }

    pub(super) fn set_dead(&self) {
        self.dead.store(true, Ordering::Release);
    }

    /// Copies `len` bytes between `local` from `offset` and the peer's memory, on the calling thread. They are in place
    /// when it returns. Not for a core's turn: a thread that finds every lane taken yields.
    ///
    /// # Errors
    /// See [`CopyError`]; some of the bytes may have been copied then. LOC_PROT_ERR: not inside `local`. A region that the
    /// peer registered a moment ago may not be known yet; a queue pair waits for it, this call does not.
    pub fn copy(&self, op: Op, local: &Memory, offset: u64, remote: RemoteAddr, len: u32) -> Result<(), CopyError> {
        if offset.checked_add(u64::from(len)).is_none_or(|end| end > local.len()) {
            return Err(CopyError::of(WcStatus::LOC_PROT_ERR));
        }
        let (mut done, mut hint) = (0, 0);
        loop {
            let piece = (len - done).min(PASS_BYTES as u32);
            let pass = self.enter_soon().ok_or(CopyError::of(WcStatus::RNR_RETRY_EXC_ERR))?;
            let at = remote.0.wrapping_add(u64::from(done));
            let entry = pass.find(at, piece, &mut hint)?.ok_or(CopyError::of(WcStatus::REM_ACCESS_ERR))?;
            let from = local.addr() + offset + u64::from(done);
            done += pass.copy(op, from, entry, at, piece, len as usize >= copy::BULK)?;
            if done == len {
                return Ok(());
            }
        }
    }

    /// Begins a pass; `None` if too many threads copy.
    #[inline]
    pub(super) fn enter(&self) -> Option<Entered<'_>> {
        let own = self.own.enter()?;
        Some(Entered { pass: self.pass(own.inside().lane()), _own: own })
    }

    /// Begins a pass for who is inside the NIC's lanes already; `None` if those are another's.
    #[inline]
    pub(super) fn enter_inside<'a>(&'a self, inside: Inside<'a>) -> Option<Pass<'a>> {
        inside.is_of(&self.own).then(|| self.pass(inside.lane()))
    }

    /// `lane` is odd in our own lanes, and stays so longer than the pass lasts.
    #[inline]
    fn pass(&self, lane: usize) -> Pass<'_> {
        // Nobody else writes the shared lane: our own one of the same number is ours. It is odd where this is a pass in a pass to the same
        // peer, which then leaves it to the outer one. (A peer that wrote it would deceive itself alone.)
        let raised = self.shared.as_ref().and_then(|shared| {
            let lane = shared.lane(lane);
            let seen = lane.load(Ordering::Relaxed);
            (seen & 1 == 0).then(|| {
                raise(lane, seen.wrapping_add(1));
                lane
            })
        });
        // SAFETY: as in `Snapshot::load`, and the reference goes nowhere without the pass of our own lanes beside it or around it. One
        // view for the whole pass: what is not found in it is judged by how far it is behind.
        let view = unsafe { &*self.view.as_ptr() };
        Pass { at: self, raised, view, streamed: Cell::new(false) }
    }

    /// The same; a thread that finds every lane taken yields, for a second at most.
    #[inline]
    pub(super) fn enter_soon(&self) -> Option<Entered<'_>> {
        self.enter().or_else(|| self.enter_within(LANE_WITHIN))
    }

    #[cold]
    fn enter_within(&self, span: Duration) -> Option<Entered<'_>> {
        let until = Instant::now() + span;
        loop {
            std::thread::yield_now();
            match self.enter() {
                None if Instant::now() < until => {}
                found => return found,
            }
        }
    }

    /// Replaces the view. Only the service thread does.
    pub(super) fn publish(&self, view: View) -> Retired<View> {
        self.view.swap(view)
    }
}

impl Drop for Attachment {
    fn drop(&mut self) {
        // The service thread closes the connection.
        self.wake.ring();
    }
}

/// A lane held, inside the NIC's.
pub(super) struct Pass<'a> {
    at: &'a Attachment,
    /// In the peer's sight, if it is this pass that leaves it.
    raised: Option<&'a AtomicU64>,
    pub(super) view: &'a View,
    /// It used streaming stores.
    streamed: Cell<bool>,
}

/// The same with the NIC's own lane, which makes the one in the peer's sight ours and is left after it.
pub(super) struct Entered<'a> {
    pass: Pass<'a>,
    _own: lanes::Pass<'a>,
}

impl<'a> std::ops::Deref for Entered<'a> {
    type Target = Pass<'a>;
    #[inline]
    fn deref(&self) -> &Pass<'a> {
        &self.pass
    }
}

impl<'a> Pass<'a> {
    /// The region of a range, if it is known and still there. `Ok(None)`: unknown, perhaps only yet.
    #[inline]
    pub(super) fn find(&self, addr: u64, len: u32, hint: &mut usize) -> Result<Option<&'a Entry>, CopyError> {
        if self.at.is_dead() {
            return Err(CopyError::of(WcStatus::RETRY_EXC_ERR));
        }
        let Some(entry) = self.view.find(addr, len, hint) else { return Ok(None) };
        // Another generation: revoked, and its successor in the slot is not announced yet, or never.
        let live = self.at.ledger.word(entry.slot).load(Ordering::Acquire) == entry.generation;
        Ok(live.then_some(entry))
    }

    /// Whether the peer has changes that this view does not know: what is not found may still come.
    pub(super) fn is_behind(&self) -> bool {
        self.view.told != self.at.ledger.changes().load(Ordering::Acquire)
    }

    /// Moves up to `len` bytes, at least one; returns how many. They are in place when the pass is over. `bulk`: they are a part of so much
    /// that nobody looks at all of it at once.
    #[inline]
    pub(super) fn copy(
        &self,
        op: Op,
        local: u64,
        entry: &Entry,
        remote: u64,
        len: u32,
        bulk: bool,
    ) -> Result<u32, CopyError> {
        if self.copy_mapped(op, local, entry, remote, len, bulk) {
            return Ok(len);
        }
        self.copy_otherwise(op, local, entry, remote, len)
    }

    #[cold]
    fn copy_otherwise(&self, op: Op, local: u64, entry: &Entry, remote: u64, len: u32) -> Result<u32, CopyError> {
        match &entry.reach {
            Reach::Refused(errno) => Err(CopyError { status: WcStatus::REM_OP_ERR, errno: *errno }),
            _ => self.kernel_copies(op, &[Piece { local, remote, len: len as usize }]).map(|moved| moved as u32),
        }
    }

    /// Moves `len` bytes, if the region is mapped here.
    #[inline]
    pub(super) fn copy_mapped(&self, op: Op, local: u64, entry: &Entry, remote: u64, len: u32, bulk: bool) -> bool {
        let Some(remote) = entry.here(remote) else { return false };
        let (local, len) = (local as *mut u8, len as usize);
        let (to, from) = match op {
            Op::Read => (local, remote.cast_const()),
            Op::Write => (remote, local.cast_const()),
        };
        // SAFETY: the local range is registered memory that the request keeps (checked where requests are made); the
        // remote one lies in a region that `find` found alive after our lane was taken, so it stays until we leave.
        unsafe {
            if copy::may_stream(len) {
                if copy_large(op, to, from, len, bulk) {
                    self.streamed.set(true);
                }
            } else {
                copy::copy(to, from, len, false);
            }
        }
        true
    }

    /// Moves pieces by one system call; returns how many bytes, at least one.
    pub(super) fn kernel_copies(&self, op: Op, pieces: &[Piece]) -> Result<usize, CopyError> {
        let Ok(foreign) = &self.at.foreign else {
            return Err(CopyError { status: WcStatus::REM_OP_ERR, errno: libc::EPERM });
        };
        // A pid that ended may be another's already.
        if self.at.process.as_ref().is_none_or(|p| p.has_ended()) {
            return Err(CopyError::of(WcStatus::RETRY_EXC_ERR));
        }
        match foreign.transfer(op, pieces) {
            Ok(0) => Err(CopyError { status: WcStatus::REM_ACCESS_ERR, errno: libc::EFAULT }),
            Ok(moved) => Ok(moved),
            Err(errno) => Err(CopyError { status: Foreign::status(errno), errno }),
        }
    }
}

/// Returns whether it used streaming stores.
///
/// # Safety
/// As [`copy::copy`].
#[inline(never)]
unsafe fn copy_large(op: Op, to: *mut u8, from: *const u8, len: usize, bulk: bool) -> bool {
    let stream = copy::streams(op, to, len, bulk);
    // SAFETY: as the caller promised; `streams` was asked.
    unsafe { copy::copy(to, from, len, stream) };
    stream
}

impl Drop for Pass<'_> {
    #[inline]
    fn drop(&mut self) {
        if self.streamed.get() {
            // Before anybody is told that the bytes are there.
            copy::fence();
        }
        if let Some(lane) = self.raised {
            lane.store(lane.load(Ordering::Relaxed).wrapping_add(1) & !1, Ordering::Release);
        }
    }
}

impl std::fmt::Debug for Attachment {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Attachment").field("token", &self.token).field("dead", &self.is_dead()).finish_non_exhaustive()
    }
}

/// What is left of an error of the socket.
pub(super) fn gone(error: &io::Error) -> bool {
    !matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted)
}
