//! Completion queues (ibv_create_cq(3)), each with a completion channel of its own.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, RawFd};
use std::ptr::{self, NonNull};
use std::sync::Arc;

use rdma_core_sys as sys;

use super::device::Context;
use super::library::{self, check, errno, invalid};
use crate::nic::{Completion, CompletionQueue, WcStatus};
use crate::units::{Qpn, WrId};

/// Completions taken per ibv_poll_cq: 32 × 48 bytes of stack. Larger saves a lock per call, smaller saves touching
/// lines that stay empty; the core's signal period (32) makes more than this rare.
const BATCH: u8 = 32;

/// Completion events acknowledged at a time: ibv_ack_cq_events(3) takes a mutex and asks to be called seldom.
const ACK_BATCH: u32 = 64;

/// The verbs objects. Queue pairs hold it too: a completion queue outlives all that completes on it.
pub(super) struct Cq {
    raw: NonNull<sys::ibv_cq>,
    channel: Channel,
}

// SAFETY: see the module head. Polling and arming are done by the one `PolledCq`; the rest only passes the pointer on.
unsafe impl Send for Cq {}
// SAFETY: as above.
unsafe impl Sync for Cq {}

impl Cq {
    pub(super) fn as_ptr(&self) -> *mut sys::ibv_cq {
        self.raw.as_ptr()
    }

    /// Whether it was made on this device context.
    pub(super) fn belongs_to(&self, context: &Arc<Context>) -> bool {
        Arc::ptr_eq(&self.channel.context, context)
    }
}

impl Drop for Cq {
    fn drop(&mut self) {
        // SAFETY: created by us, destroyed once. Queue pairs owned an Arc of this value, so none is left on it, and
        // `PolledCq` acknowledged its events before it let go. The channel is dropped after this.
        unsafe { sys::ibv_destroy_cq(self.raw.as_ptr()) };
    }
}

/// The descriptor by which an armed queue wakes a sleeper.
struct Channel {
    raw: NonNull<sys::ibv_comp_channel>,
    context: Arc<Context>,
}

impl Channel {
    fn create(context: &Arc<Context>) -> io::Result<Self> {
        // SAFETY: the context is open.
        let raw = unsafe { sys::ibv_create_comp_channel(context.as_ptr()) };
        let channel = Self { raw: NonNull::new(raw).ok_or_else(errno)?, context: Arc::clone(context) };
        library::set_nonblocking(channel.fd())?;
        Ok(channel)
    }

    fn fd(&self) -> RawFd {
        // SAFETY: the channel lives; the field does not change.
        unsafe { (*self.raw.as_ptr()).fd }
    }
}

impl Drop for Channel {
    fn drop(&mut self) {
        // SAFETY: created by us, destroyed once, after its only queue.
        unsafe { sys::ibv_destroy_comp_channel(self.raw.as_ptr()) };
    }
}

/// A queue of at least `depth` entries; the `nth` of this device, which spreads them over the interrupt vectors.
pub(super) fn create(context: &Arc<Context>, depth: u32, nth: u32) -> io::Result<(PolledCq, Arc<Cq>)> {
    let entries =
        i32::try_from(depth).ok().filter(|n| *n > 0).ok_or_else(|| invalid("a queue needs 1 to 2^31 - 1 entries"))?;
    let channel = Channel::create(context)?;
    let vector = (nth % context.vectors()).cast_signed();
    // SAFETY: context and channel live, and the queue will own both; no context pointer is used.
    let raw = unsafe { sys::ibv_create_cq(context.as_ptr(), entries, ptr::null_mut(), channel.raw.as_ptr(), vector) };
    let cq = Arc::new(Cq { raw: NonNull::new(raw).ok_or_else(errno)?, channel });
    // SAFETY: the queue lives; the field changes only when it is resized, which we never do.
    let depth = unsafe { (*cq.as_ptr()).cqe }.max(entries).unsigned_abs();
    Ok((PolledCq { cq: Arc::clone(&cq), depth, unacknowledged: 0 }, cq))
}

/// The polling half: there is one per queue, and one core owns it.
pub(super) struct PolledCq {
    cq: Arc<Cq>,
    depth: u32,
    /// Events taken from the channel and not yet acknowledged. Destroying the queue would wait for them.
    unacknowledged: u32,
}

impl PolledCq {
    fn acknowledge(&mut self) {
        if self.unacknowledged > 0 {
            // SAFETY: exactly this many events of this queue were taken since the last acknowledgement.
            unsafe { sys::ibv_ack_cq_events(self.cq.as_ptr(), self.unacknowledged) };
            self.unacknowledged = 0;
        }
    }

    /// One ibv_poll_cq of at most [`BATCH`].
    fn poll_batch(&mut self, out: &mut [Completion]) -> io::Result<usize> {
        let mut found = [const { MaybeUninit::<sys::ibv_wc>::uninit() }; BATCH as usize];
        let room = out.len().min(usize::from(BATCH));
        let wanted = i32::try_from(room).unwrap_or(i32::from(BATCH));
        // SAFETY: the array has `room` entries at least, and as many as the return value says are written.
        let taken = unsafe { sys::ibv_poll_cq(self.cq.as_ptr(), wanted, found.as_mut_ptr().cast()) };
        let Ok(taken) = usize::try_from(taken) else {
            // Providers return -1 or codes of their own here, and not all of them set errno.
            return Err(io::Error::other("ibv_poll_cq failed: completions may be lost"));
        };
        for (slot, wc) in out.iter_mut().zip(&found[..taken.min(room)]) {
            // SAFETY: one of the first `taken` entries, which ibv_poll_cq wrote. After an error only the four fields
            // used here are (ibv_poll_cq(3)), so the rest is never read, nor moved.
            *slot = unsafe { completion(wc.as_ptr()) };
        }
        Ok(taken.min(room))
    }
}

/// # Safety
/// `wr_id`, `status`, `vendor_err` and `qp_num` of `wc` are written.
unsafe fn completion(wc: *const sys::ibv_wc) -> Completion {
    // SAFETY: the caller's promise.
    let (wr_id, status, vendor_err, qp_num) = unsafe { ((*wc).wr_id, (*wc).status, (*wc).vendor_err, (*wc).qp_num) };
    Completion {
        wr_id: WrId::from_bits(wr_id),
        status: WcStatus(status),
        vendor_err,
        qpn: Qpn::new(qp_num & 0x00ff_ffff).unwrap_or_default(), // 24 bits on the wire; some providers put flags above
    }
}

impl CompletionQueue for PolledCq {
    fn depth(&self) -> u32 {
        self.depth
    }

    fn poll(&mut self, out: &mut [Completion]) -> io::Result<usize> {
        let mut total = 0;
        while total < out.len() {
            match self.poll_batch(&mut out[total..]) {
                Ok(n) => {
                    total += n;
                    if n < usize::from(BATCH) {
                        break; // the queue was empty, or `out` is full
                    }
                }
                // What was taken before must not be lost; the next call fails again.
                Err(_) if total > 0 => break,
                Err(error) => return Err(error),
            }
        }
        Ok(total)
    }

    fn arm(&mut self) -> io::Result<()> {
        // SAFETY: the queue lives. 0: any completion, not only solicited ones.
        check(unsafe { sys::ibv_req_notify_cq(self.cq.as_ptr(), 0) })
    }

    fn event_fd(&self) -> Option<BorrowedFd<'_>> {
        // SAFETY: the channel owns the descriptor and lives as long as `self`, which the result borrows.
        Some(unsafe { BorrowedFd::borrow_raw(self.cq.channel.fd()) })
    }

    fn clear_events(&mut self) -> io::Result<()> {
        loop {
            let (mut of, mut context) = (ptr::null_mut(), ptr::null_mut());
            // SAFETY: the channel lives and its descriptor does not block; both results are written on success only.
            let rc = unsafe { sys::ibv_get_cq_event(self.cq.channel.raw.as_ptr(), &raw mut of, &raw mut context) };
            if rc != 0 {
                let error = errno();
                match error.kind() {
                    io::ErrorKind::WouldBlock => return Ok(()),
                    io::ErrorKind::Interrupted => continue,
                    _ => return Err(error),
                }
            }
            debug_assert_eq!(of, self.cq.as_ptr(), "a channel of one queue told of another");
            self.unacknowledged += 1;
            if self.unacknowledged >= ACK_BATCH {
                self.acknowledge();
            }
        }
    }
}

impl Drop for PolledCq {
    fn drop(&mut self) {
        self.acknowledge();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_completion_keeps_what_an_error_leaves_valid_and_any_status() {
        let mut wc = MaybeUninit::<sys::ibv_wc>::uninit();
        let p = wc.as_mut_ptr();
        let id = WrId { slot: 7, generation: 9, sequence: 11 };
        // SAFETY: writes the four fields in place, and then the function reads only those.
        let got = unsafe {
            (*p).wr_id = id.to_bits();
            (*p).status = 4711;
            (*p).vendor_err = 0x81;
            (*p).qp_num = 0xff00_0012;
            completion(p)
        };
        let expected = Completion { wr_id: id, status: WcStatus(4711), vendor_err: 0x81, qpn: Qpn::new(0x12).unwrap() };
        assert_eq!(got, expected);
    }
}
