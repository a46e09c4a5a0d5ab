//! Copies on the caller's own thread, where a peer's memory can be reached without a NIC: what is smaller than a hand-off
//! to a core, and what a thread that waits may as well do itself.

use super::{Op, WcStatus};
use crate::units::RemoteAddr;

/// One contiguous piece.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Piece {
    /// Local virtual address; registered, and checked by the caller.
    pub local: u64,
    /// Where in the peer.
    pub remote: RemoteAddr,
    /// Bytes.
    pub len: u32,
}

impl Piece {
    /// A piece of nothing, to fill a buffer with.
    pub const EMPTY: Self = Self { local: 0, remote: RemoteAddr(0), len: 0 };
}

/// A copy that was not made as a whole.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Refused {
    /// Pieces that are whole, from the first on.
    pub done: usize,
    /// Why the next one is not, as a completion would say it.
    pub status: WcStatus,
}

/// The memory of one peer, in reach of every thread of this process.
pub trait Direct: Send + Sync {
    /// Copies `pieces` in order: WRITE to the peer, READ from it. On return the bytes are in place, and nothing touches
    /// either side's memory any more. Never waits for the peer.
    fn copy(&self, op: Op, pieces: &[Piece]) -> Result<(), Refused>;
    /// Whether the peer's process lives, as far as is known.
    fn is_alive(&self) -> bool;
}
