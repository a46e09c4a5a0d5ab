//! What this NIC did, counted by its cores, read by whoever wants to know.

use std::sync::atomic::{AtomicU64, Ordering};

/// A counter with one writer at a time; others read.
#[derive(Default, Debug)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Adds. Several cores may count here, so it is an atomic addition.
    pub(super) fn add(&self, n: u64) {
        self.0.fetch_add(n, Ordering::Relaxed);
    }

    /// Now.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Counters of one core's queue.
#[derive(Default, Debug)]
pub struct TcpCounters {
    /// Calls of epoll_wait.
    pub waits: Counter,
    /// Calls of send or sendmsg, of lanes and of served connections.
    pub sends: Counter,
    /// Calls of recv or recvmsg, of lanes and of served connections.
    pub receives: Counter,
    /// Calls of epoll_ctl that changed what a connection waits for.
    pub changes: Counter,
    /// Connections accepted.
    pub accepted: Counter,
    /// Served connections closed because there were too many.
    pub evicted: Counter,
    /// Peers' requests refused.
    pub refused: Counter,
    /// Peers' requests begun.
    pub requests: Counter,
    /// Bytes received into registered memory for peers.
    pub bytes_in: Counter,
}
