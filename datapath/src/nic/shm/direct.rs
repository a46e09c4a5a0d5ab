//! The same copies on a caller's own thread: no queue, no core.

use super::attachment::{Attachment, CopyError, PASS_BYTES, Pass};
use super::copy;
use crate::lanes::Inside;
use crate::nic::direct::{Direct, Piece, Refused};
use crate::nic::{Op, WcStatus};
use crate::units::RemoteAddr;

impl Direct for Attachment {
    fn copy_one(&self, inside: Inside<'_>, op: Op, local: u64, remote: RemoteAddr, len: u32) -> bool {
        if len as usize > PASS_BYTES {
            return false;
        }
        let Some(pass) = self.enter_inside(inside) else { return false };
        match pass.find(remote.0, len, &mut 0) {
            Ok(Some(entry)) => pass.copy_mapped(op, local, entry, remote.0, len, false),
            _ => false,
        }
    }

    fn copy_inside(&self, inside: Inside<'_>, op: Op, pieces: &[Piece]) -> Result<(), Refused> {
        let bytes = bytes_of(pieces);
        let Some(pass) = (bytes <= PASS_BYTES).then(|| self.enter_inside(inside)).flatten() else {
            return Direct::copy(self, op, pieces);
        };
        let mut run = Run { pieces, bulk: bytes >= copy::BULK, ..Run::default() };
        run.copy(&pass, op).map_err(|error| run.refused(error))
    }

    fn copy(&self, op: Op, pieces: &[Piece]) -> Result<(), Refused> {
        let mut run = Run { pieces, bulk: bytes_of(pieces) >= copy::BULK, ..Run::default() };
        while run.done < pieces.len() {
            // One pass for each [`PASS_BYTES`]: who takes memory back waits for a pass.
            let copied = match self.enter_soon() {
                Some(pass) => run.copy(&pass, op),
                None => Err(CopyError::of(WcStatus::RNR_RETRY_EXC_ERR)),
            };
            copied.map_err(|error| run.refused(error))?;
        }
        Ok(())
    }

    fn is_alive(&self) -> bool {
        !self.is_dead()
    }
}

fn bytes_of(pieces: &[Piece]) -> usize {
    pieces.iter().map(|piece| piece.len as usize).sum()
}

/// Pieces on their way.
#[derive(Default)]
struct Run<'a> {
    pieces: &'a [Piece],
    /// They are so much that nobody looks at all of it at once.
    bulk: bool,
    /// Pieces that are whole, and bytes of the next one.
    done: usize,
    at: u32,
    /// Where the last one's region was found.
    hint: usize,
}

impl Run<'_> {
    /// Copies what is left, up to [`PASS_BYTES`].
    #[inline]
    fn copy(&mut self, pass: &Pass<'_>, op: Op) -> Result<(), CopyError> {
        let mut budget = PASS_BYTES;
        if self.at == 0 {
            self.copy_small(pass, op, &mut budget);
        }
        while let (Some(piece), true) = (self.pieces.get(self.done), budget > 0) {
            let entry =
                pass.find(piece.remote.0, piece.len, &mut self.hint)?.ok_or(CopyError::of(WcStatus::REM_ACCESS_ERR))?;
            if let Some(next) = self.pieces.get(self.done + 1)
                && op == Op::Write
            {
                copy::prefetch(next.local as *const u8);
            }
            let len = (piece.len - self.at).min(budget as u32);
            let (local, remote) = (piece.local + u64::from(self.at), piece.remote.0 + u64::from(self.at));
            let moved = pass.copy(op, local, entry, remote, len, self.bulk)?;
            budget -= (moved as usize).min(budget);
            self.at += moved;
            if self.at == piece.len {
                (self.done, self.at) = (self.done + 1, 0);
            }
        }
        Ok(())
    }

    /// Copies whole pieces as long as they are small and mapped: what there may be very many of, straight through. The others, and whatever
    /// is in the way, are left.
    #[inline]
    fn copy_small(&mut self, pass: &Pass<'_>, op: Op, budget: &mut usize) {
        let (mut hint, mut done) = (self.hint, self.done);
        while let Some(piece) = self.pieces.get(done)
            && !copy::may_stream(piece.len as usize)
            && piece.len as usize <= *budget
            && let Ok(Some(entry)) = pass.find(piece.remote.0, piece.len, &mut hint)
        {
            if let Some(next) = self.pieces.get(done + 1)
                && op == Op::Write
            {
                copy::prefetch(next.local as *const u8);
            }
            if !pass.copy_mapped(op, piece.local, entry, piece.remote.0, piece.len, false) {
                break;
            }
            *budget -= piece.len as usize;
            done += 1;
        }
        (self.hint, self.done) = (hint, done);
    }

    fn refused(&self, error: CopyError) -> Refused {
        Refused { done: self.done, status: error.status }
    }
}
