//! Copies on the caller's own thread, where a peer's memory can be reached without a NIC: what is smaller than a hand-off
//! to a core, and what a thread that waits may as well do itself.

use super::{Op, WcStatus};
use crate::lanes::Inside;
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
    /// The same for a caller who is inside the NIC's lanes ([`super::Nic::lanes`]) already.
    fn copy_inside(&self, inside: Inside<'_>, op: Op, pieces: &[Piece]) -> Result<(), Refused> {
        let _ = inside;
        self.copy(op, pieces)
    }
    /// The same for the smallest and most frequent case, straight through: one piece of memory that is mapped. Whether it is
    /// in place; if not, [`Direct::copy`] does it, or tells why not.
    fn copy_one(&self, inside: Inside<'_>, op: Op, local: u64, remote: RemoteAddr, len: u32) -> bool {
        self.copy_inside(inside, op, &[Piece { local, remote, len }]).is_ok()
    }
    /// Whether the peer's process lives, as far as is known.
    fn is_alive(&self) -> bool;
}
