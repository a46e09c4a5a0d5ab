//! The two halves of a lane's queue pair: what the core posts through, and how control ends it.
//!
//! Neither touches the socket: both leave word for the queue, which does everything with it in its next poll.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use crossbeam_queue::ArrayQueue;

use super::queue::{Mail, QueueShared};
use crate::nic::{AdminQp, PostQp, Posted, WorkRequest};
use crate::units::Qpn;

/// What the halves and the lane in its queue have in common.
pub(super) struct LaneShared {
    pub(super) qpn: Qpn,
    /// Posted, not yet taken by the lane. Both ends are the core's.
    pub(super) requests: ArrayQueue<WorkRequest>,
    /// Where the lane is in its queue; written and read by the queue.
    pub(super) slot: AtomicU32,
    /// Word of it is on its way to the queue.
    pub(super) noted: AtomicBool,
    /// Control wants it in ERR.
    pub(super) to_error: AtomicBool,
    /// Nobody posts any more; the lane goes.
    pub(super) gone: AtomicBool,
    unproven: AtomicBool,
    queue: Arc<QueueShared>,
}

impl LaneShared {
    pub(super) fn new(qpn: Qpn, depth: u32, queue: Arc<QueueShared>) -> Arc<Self> {
        Arc::new(Self {
            qpn,
            requests: ArrayQueue::new(depth.max(1) as usize),
            slot: AtomicU32::new(u32::MAX),
            noted: AtomicBool::new(false),
            to_error: AtomicBool::new(false),
            gone: AtomicBool::new(false),
            unproven: AtomicBool::new(false),
            queue,
        })
    }

    /// From here on what comes back may still be applied at the peer.
    pub(super) fn proves_nothing(&self) {
        self.unproven.store(true, Ordering::Relaxed);
    }

    /// Whether what came back so far can not be applied any more.
    pub(super) fn proves(&self) -> bool {
        !self.unproven.load(Ordering::Relaxed)
    }

    /// Tells the queue to look at this lane.
    fn note(self: &Arc<Self>) {
        if !self.noted.swap(true, Ordering::AcqRel) {
            self.queue.send(Mail::Look(self.clone()));
        }
    }
}

/// The core's half.
pub(super) struct LanePost(pub(super) Arc<LaneShared>);

impl PostQp for LanePost {
    fn qpn(&self) -> Qpn {
        self.0.qpn
    }

    fn depth(&self) -> u32 {
        self.0.requests.capacity() as u32
    }

    fn max_inline(&self) -> u32 {
        0
    }

    fn post(&mut self, chain: &[WorkRequest]) -> Posted {
        let refused = chain.iter().position(|request| self.0.requests.push(*request).is_err());
        self.0.note();
        match refused {
            None => Posted { accepted: chain.len(), error: None },
            Some(accepted) => Posted { accepted, error: Some(libc::ENOMEM) },
        }
    }

    fn drains_clean(&self) -> bool {
        self.0.proves()
    }
}

impl Drop for LanePost {
    fn drop(&mut self) {
        self.0.gone.store(true, Ordering::Release);
        self.0.note();
        self.0.queue.ring();
    }
}

/// Control's half.
pub(super) struct LaneAdmin(pub(super) Arc<LaneShared>);

impl AdminQp for LaneAdmin {
    fn qpn(&self) -> Qpn {
        self.0.qpn
    }

    fn to_error(&mut self) -> io::Result<()> {
        self.0.to_error.store(true, Ordering::Release);
        self.0.note();
        self.0.queue.ring();
        Ok(())
    }
}
