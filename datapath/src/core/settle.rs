//! Slices that ended this turn, accounted once per Work; finished Works go up, and seats become free.

use std::sync::Arc;

use super::Core;
use super::port::CoreEvent;
use super::table::{Line, NONE};
use crate::limits::{ACTIVE_WORKS, EVENT_RING, EVENTS_OF_RAILS};
use crate::work::Work;

impl Core {
    pub(super) fn settle(&mut self) -> usize {
        // Exactly what is marked now: what is marked again meanwhile (a ring was full) waits for the next turn.
        let marked = self.dirty.len();
        let mut settled = 0;
        for index in 0..marked {
            let seat = self.dirty[index];
            self.works[seat as usize].dirty = false;
            settled += self.settle_work(seat);
        }
        self.dirty.drain(..marked);
        settled
    }

    /// Has a Work looked at by the next [`Core::settle`].
    pub(super) fn mark_dirty(&mut self, seat: u32) {
        let entry = &mut self.works[seat as usize];
        if !entry.dirty {
            entry.dirty = true;
            self.dirty.push(seat);
        }
    }

    fn settle_work(&mut self, seat: u32) -> usize {
        let entry = &mut self.works[seat as usize];
        let Some(work) = &entry.work else { return 0 };
        let count = std::mem::take(&mut entry.settled);
        if let Some(somebody_sleeps) = work.settle(count) {
            (entry.finished, entry.awaited) = (true, somebody_sleeps);
            self.counters.works_finished.add(1);
        }
        if std::mem::take(&mut self.works[seat as usize].returned) {
            self.offer(seat);
        }
        self.release_if_over(seat);
        count as usize
    }

    /// Slices came back: whoever has a rail may have them.
    fn offer(&mut self, seat: u32) {
        let Some(work) = self.works[seat as usize].work.clone() else { return };
        let peer = work.remote().peer.id().0 as usize;
        self.enqueue(seat);
        if work.remote().peer.routes() == 0 && work.home() != self.id {
            // Nobody has: the home core parks it.
            if self.cores[usize::from(work.home().0)].submit(work).is_err() {
                self.works[seat as usize].returned = true;
                self.mark_dirty(seat);
            }
        } else if self.peers.get(peer).is_none_or(|p| p.usable == 0) || work.slices().len() > 2 {
            self.lend(seat);
        }
    }

    /// Pushes a Work to every other core that has a rail to its peer and did not get it yet.
    pub(super) fn lend(&mut self, seat: u32) {
        let Some(work) = self.works[seat as usize].work.clone() else { return };
        let routes = work.remote().peer.routes() & !self.works[seat as usize].lent & !(1 << self.id.0);
        for core in 0..self.cores.len().min(64) {
            if routes >> core & 1 == 1 && self.cores[core].submit(work.clone()).is_ok() {
                self.works[seat as usize].lent |= 1 << core;
            }
        }
    }

    /// Frees the seat of a Work this core has nothing more to do with. Its reference leaves by the event ring: the last
    /// one frees memory, which no core's own thread does.
    pub(super) fn release_if_over(&mut self, seat: u32) {
        let entry = &self.works[seat as usize];
        let Some(work) = &entry.work else { return };
        let busy = entry.outstanding > 0 || entry.settled > 0 || entry.holds > 0 || entry.returned;
        let needed = entry.line != Line::None || (entry.home && !work.is_terminal());
        if busy || (needed && !entry.finished) {
            return;
        }
        if !self.makes_event_room() {
            self.mark_dirty(seat);
            return;
        }
        if entry.line != Line::None {
            // The line may not move for long. Those who wait are told now; the seat follows when the line is walked.
            let work = work.clone();
            self.works[seat as usize].finished = false;
            self.tell_finished(work, seat);
            return;
        }
        self.take_back_keyless(seat);
        let entry = &mut self.works[seat as usize];
        let finished = std::mem::take(&mut entry.finished);
        entry.home = false;
        entry.lent = 0;
        entry.next = NONE;
        if let Some(work) = entry.work.take() {
            work.set_seat(self.id, None);
            self.free_works.push(seat);
            if finished {
                self.tell_finished(work, seat);
            } else if !self.led {
                self.tell(CoreEvent::Released(work));
            }
        }
    }

    /// Tells, and only then rings: control may have looked at its ring just before, and go to sleep. A caller that turns the
    /// core may free memory, unlike the core's own thread: it drops what nobody sleeps for, and no thread has to do it later.
    fn tell_finished(&mut self, work: Arc<Work>, seat: u32) {
        let awaited = std::mem::take(&mut self.works[seat as usize].awaited);
        if self.led && !awaited {
            return;
        }
        self.tell(CoreEvent::Finished(work));
        if awaited {
            self.outbox.ring();
        }
    }

    /// Whether the event ring has room for what may wait: finished Works and questions. Nobody is woken for a Work that nobody waits
    /// for; so where as many events as half of that room wait control is, or the Work that somebody does
    /// wait for finds none.
    pub(super) fn makes_event_room(&self) -> bool {
        let told = self.outbox.len();
        if told >= ACTIVE_WORKS / 2 {
            self.outbox.ring();
        }
        EVENT_RING - told > EVENTS_OF_RAILS
    }

    /// Tells control. The ring has room for everything that may not be refused.
    pub(super) fn tell(&self, event: CoreEvent) -> bool {
        let told = self.outbox.push(event).is_ok();
        debug_assert!(told, "the event ring is as large as everything a core may have to say");
        told
    }
}
