//! A core that has panicked carries nothing any more. What it was told and has seen is still there, but nobody knows which step was
//! cut short: so it gives its NICs up as if their outcomes were lost, and goes on only to give back what it has.
//!
//! Control takes the NICs away from it, moves its queue pairs to ERR, and destroys those that do not drain. Its Works, and those that
//! still come, end as *core lost*; what has slices under way ends when these are back, as everywhere.

use super::Core;
use crate::error::{Cause, SliceError};
use crate::units::Nanos;

/// Panics of one core before it is given up altogether: the second may come of looking at its NICs, and it looks no more.
const PANICS: u32 = 3;

/// What is left of a core that has panicked.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Remains {
    /// It gives back what it has, and ends what it had to carry as [`Cause::CoreLost`].
    GivesBack,
    /// It does not even that: its Works do not end.
    Nothing,
}

/// Panics of a core so far.
#[derive(Default)]
pub(super) struct Panics(u32);

impl Panics {
    /// A turn of `core` has panicked, on whatever thread. Whether it is to be turned on.
    pub(super) fn lose(&mut self, core: &mut Core, clock: &dyn Fn() -> Nanos, told: &dyn Fn(Remains)) -> bool {
        loop {
            self.0 += 1;
            core.panicked = false;
            match self.0 {
                1 => told(Remains::GivesBack),
                PANICS => {
                    told(Remains::Nothing);
                    return false;
                }
                _ => {}
            }
            if core.guarded(|core| core.lose(clock())).is_ok() {
                return true;
            }
        }
    }
}

/// How much of a core is left.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Trust {
    /// All of it.
    Whole,
    /// It has panicked.
    Lost,
    /// It has panicked again, and polls its NICs no more: control destroys what does not drain.
    Blind,
}

impl Core {
    /// The core's last turn has panicked, or one is to be treated so. To be turned on: see [`super::run`].
    pub fn lose(&mut self, now: Nanos) {
        self.trust = if self.trust == Trust::Whole { Trust::Lost } else { Trust::Blind };
        for rail in 0..self.rails.len() {
            self.close_rail(rail, now);
        }
        for nic in 0..self.nics.len() {
            self.cq_lost(nic);
        }
        self.publish();
        self.next_watch = now;
    }

    /// Ends what it is the home of, if it is lost.
    pub(super) fn end_lost(&mut self) {
        if self.trust == Trust::Whole {
            return;
        }
        for seat in 0..self.works.len() as u32 {
            let entry = &self.works[seat as usize];
            if entry.home && entry.work.as_ref().is_some_and(|work| !work.is_closed()) {
                self.end_work(seat, SliceError::of(Cause::CoreLost));
            }
        }
    }
}
