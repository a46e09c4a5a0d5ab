//! Transfers submitted together.

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use moonrail_datapath::error::Cause;
use moonrail_datapath::nic::Op;

use crate::engine::Engine;
use crate::error::{SubmitError, TransferError, WaitError};
use crate::region::Region;
use crate::segment::Segment;

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
    #[expect(dead_code)]
    engine: &'a Engine,
}

impl BatchBuilder<'_> {
    /// Adds a transfer; its number in the batch is the count of those added before.
    #[must_use]
    pub fn add(self, _segment: &Segment, _transfer: Transfer) -> Self {
        todo!()
    }

    /// Ends what is not done after this time, instead of the engine's default (30 s + 1 ns per byte).
    #[must_use]
    pub fn deadline(self, _after: Duration) -> Self {
        todo!()
    }

    /// Submits everything, or nothing.
    pub fn submit(self) -> Result<Batch, SubmitError> {
        todo!()
    }
}

/// Transfers on their way. Any thread may poll it; dropping it never blocks, and what is in flight keeps its memory.
pub struct Batch {}

impl Batch {
    /// Number of transfers.
    pub fn len(&self) -> usize {
        todo!()
    }

    /// Whether it has no transfers: then it is done from the start.
    pub fn is_empty(&self) -> bool {
        todo!()
    }

    /// The status now. Costs one load while the batch is under way.
    pub fn poll(&self) -> BatchStatus {
        todo!()
    }

    /// Waits for the end, at most `for_at_most`: spins for some microseconds, then sleeps.
    pub fn wait(&self, _for_at_most: Duration) -> Result<(), WaitError> {
        todo!()
    }

    /// The state of one transfer; `None` beyond the last.
    pub fn transfer(&self, _index: usize) -> Option<TransferState> {
        todo!()
    }

    /// Bytes of one transfer that are in place; 0 beyond the last.
    pub fn transfer_bytes(&self, _index: usize) -> u64 {
        todo!()
    }

    /// Bytes of all transfers that are in place.
    pub fn bytes(&self) -> u64 {
        todo!()
    }

    /// The first transfer that failed, in words, with its first cause.
    pub fn first_error(&self) -> Option<TransferError> {
        todo!()
    }

    /// Time since submission, or from submission to the moment the end was first seen.
    pub fn elapsed(&self) -> Duration {
        todo!()
    }

    /// Ends what is not on its way yet; what is, is drained. The batch ends soon, as failed unless all was done.
    pub fn cancel(&self) {
        todo!()
    }
}

/// `(&mut batch).await` and `batch.await`: the end of the batch, or its deadline.
impl Future for Batch {
    type Output = Result<(), WaitError>;

    fn poll(self: Pin<&mut Self>, _context: &mut Context<'_>) -> Poll<Self::Output> {
        todo!()
    }
}
