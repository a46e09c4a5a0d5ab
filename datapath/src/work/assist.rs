//! A thread that waits for a Work may carry some of it itself, where it reaches the peer's memory: beside the cores, by
//! the same claims.

use crate::error::{Cause, SliceError};
use crate::nic::Fabric;
use crate::nic::direct::{Direct, Piece};

use super::Work;

/// Slices carried between two looks at the clock: 256 KiB of the usual ones.
const RUN: usize = 4;

/// What one call of [`Work::assist`] did.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Assisted {
    /// Slices that are done.
    pub slices: u32,
    /// Their bytes.
    pub bytes: u64,
    /// Slices were given back: the Work is to be enqueued again.
    pub gave_back: bool,
}

impl Work {
    /// Claims a run of slices and copies them. Any thread but a core's. Nothing is done where no slice is left, or where the
    /// peer may not be reached this way.
    pub fn assist(&self, direct: &dyn Direct) -> Assisted {
        let mut done = Assisted::default();
        if !self.remote().route.allows(Fabric::Shm) {
            return done;
        }
        let run = self.claim(RUN as u32);
        if run.is_empty() {
            return done;
        }
        let mut pieces = [Piece::EMPTY; RUN];
        for (piece, slice) in pieces.iter_mut().zip(&self.slices()[run.start as usize..run.end as usize]) {
            *piece = Piece { local: slice.local, remote: slice.remote, len: slice.len };
        }
        let whole = match direct.copy(self.op(), &pieces[..run.len()]) {
            Ok(()) => run.len() as u32,
            Err(refused) => (refused.done as u32).min(run.len() as u32),
        };
        let mut ended = whole;
        for slice in run.clone() {
            if slice - run.start < whole {
                self.slice_done(slice);
                done.slices += 1;
                done.bytes += u64::from(self.slices()[slice as usize].len);
            } else {
                // A core finds out what is wrong, and whom to tell. A part of it may have been copied.
                self.note_touched();
                self.give_back(slice);
                done.gave_back = true;
            }
        }
        if self.is_closed() {
            // Cancelled meanwhile: what was given back ends, as a core would do it.
            let error = self.first_error().unwrap_or(SliceError::of(Cause::Cancelled));
            while let Some(slice) = self.take_returned() {
                self.slice_failed(slice, error);
                ended += 1;
            }
        }
        if self.settle(ended) == Some(true) {
            self.completion().wake();
        }
        done
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::super::tests::work;
    use super::*;
    use crate::nic::direct::Refused;
    use crate::nic::{Op, WcStatus};
    use crate::work::TransferStatus;

    /// Takes so many pieces, then no more.
    struct Far(Mutex<usize>);

    impl Direct for Far {
        fn copy(&self, _: Op, pieces: &[Piece]) -> Result<(), Refused> {
            let mut left = self.0.lock().unwrap();
            let done = pieces.len().min(*left);
            *left -= done;
            if done == pieces.len() { Ok(()) } else { Err(Refused { done, status: WcStatus::REM_ACCESS_ERR }) }
        }
        fn is_alive(&self) -> bool {
            true
        }
    }

    #[test]
    fn a_waiter_carries_what_nobody_has_claimed_and_ends_the_work() {
        let work = work(10);
        assert_eq!(work.claim(3), 0..3, "a core has these");
        let far = Far(Mutex::new(100));
        let mut slices = 0;
        loop {
            let done = work.assist(&far);
            slices += done.slices;
            if done == Assisted::default() {
                break;
            }
        }
        assert_eq!(slices, 7);
        assert!(!work.completion().is_done(), "the core's are not back");
        (0..3).for_each(|slice| work.slice_done(slice));
        assert!(work.settle(3).is_some());
        assert!(work.completion().is_done());
        assert!(work.transfers().iter().all(|transfer| transfer.status() == TransferStatus::Done));
    }

    #[test]
    fn what_cannot_be_copied_goes_back_and_ends_with_a_cancel() {
        let work = work(6);
        let done = work.assist(&Far(Mutex::new(2)));
        assert_eq!((done.slices, done.gave_back), (2, true));
        assert!(work.has_returned());
        let unclaimed = work.close();
        assert_eq!(unclaimed, 4..6);
        unclaimed.clone().for_each(|slice| work.slice_failed(slice, SliceError::of(Cause::Cancelled)));
        work.settle(unclaimed.len() as u32);
        // What a core, or another waiter, does that gives something back after the close.
        while let Some(slice) = work.take_returned() {
            work.slice_failed(slice, SliceError::of(Cause::Cancelled));
            work.settle(1);
        }
        assert!(work.completion().is_done());
    }

    #[test]
    fn what_may_not_go_this_way_is_left_alone() {
        let work = work(4);
        work.remote().route.set(Fabric::Rdma.bit());
        assert_eq!(work.assist(&Far(Mutex::new(9))), Assisted::default());
        assert_eq!(work.claim(4), 0..4);
    }
}
