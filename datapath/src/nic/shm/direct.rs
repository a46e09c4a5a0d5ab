//! The same copies on a caller's own thread: no queue, no core.

use super::attachment::{Attachment, CopyError, PASS_BYTES};
use super::copy;
use crate::nic::direct::{Direct, Piece, Refused};
use crate::nic::{Op, WcStatus};

impl Direct for Attachment {
    fn copy(&self, op: Op, pieces: &[Piece]) -> Result<(), Refused> {
        // The smallest and most frequent case, straight through.
        if let [piece] = pieces
            && piece.len as usize <= PASS_BYTES
            && let Some(pass) = self.enter()
            && let Ok(Some(entry)) = pass.find(piece.remote.0, piece.len, &mut 0)
            && pass.copy_mapped(op, piece.local, entry, piece.remote.0, piece.len, false)
        {
            return Ok(());
        }
        let bytes: usize = pieces.iter().map(|piece| piece.len as usize).sum();
        let mut done = 0;
        let result = self.copy_pieces(op, pieces, bytes >= copy::BULK, &mut done);
        result.map_err(|error| Refused { done, status: error.status })
    }

    fn is_alive(&self) -> bool {
        !self.is_dead()
    }
}

impl Attachment {
    /// Counts in `done` the pieces that are whole. One pass for each [`PASS_BYTES`]: who takes memory back waits for a pass.
    fn copy_pieces(&self, op: Op, pieces: &[Piece], bulk: bool, done: &mut usize) -> Result<(), CopyError> {
        let (mut at, mut hint) = (0u32, 0);
        while *done < pieces.len() {
            let pass = self.enter_soon().ok_or(CopyError::of(WcStatus::RNR_RETRY_EXC_ERR))?;
            let mut budget = PASS_BYTES;
            while let (Some(piece), true) = (pieces.get(*done), budget > 0) {
                let entry =
                    pass.find(piece.remote.0, piece.len, &mut hint)?.ok_or(CopyError::of(WcStatus::REM_ACCESS_ERR))?;
                if let Some(next) = pieces.get(*done + 1)
                    && op == Op::Write
                {
                    copy::prefetch(next.local as *const u8);
                }
                let len = (piece.len - at).min(budget as u32);
                let (local, remote) = (piece.local + u64::from(at), piece.remote.0 + u64::from(at));
                let moved = pass.copy(op, local, entry, remote, len, bulk)?;
                budget -= (moved as usize).min(budget);
                at += moved;
                if at == piece.len {
                    (*done, at) = (*done + 1, 0);
                }
            }
        }
        Ok(())
    }
}
