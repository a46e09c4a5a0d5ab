//! Another node's memory, as it published it.

use crate::error::SegmentError;

/// One buffer of a peer.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct RemoteRange {
    /// Absolute address in the peer: what [`crate::Transfer`] takes as `remote`.
    pub addr: u64,
    /// Bytes.
    pub len: u64,
    /// The peer's word for the place: `cpu:0`, `*`, …
    pub location: String,
}

/// A peer's published memory, opened by name. Clones are the same segment; any thread may use it.
#[derive(Clone)]
pub struct Segment {}

impl Segment {
    /// The name it was opened by.
    pub fn name(&self) -> &str {
        todo!()
    }

    /// The peer's buffers in the order it published them, as of the last look.
    pub fn buffers(&self) -> Vec<RemoteRange> {
        todo!()
    }

    /// Fetches the peer's descriptor again, past every cache. Batches in flight keep what they were submitted with.
    /// Blocks for a metadata request, bounded by its time-out.
    pub fn refresh(&self) -> Result<(), SegmentError> {
        todo!()
    }

    /// Cores of this engine that have a usable rail to the peer now. 0 before the first transfer: rails are made when
    /// they are first needed.
    pub fn ready_cores(&self) -> u32 {
        todo!()
    }
}
