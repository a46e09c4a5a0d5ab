//! What must hold of a core in every state, and what tells its states apart.
//!
//! - each slice has one owner (unclaimed, in the return map, in one list) until it ends, and then none; what is *done* has landed;
//! - the Work counts exactly what has not ended, and is over only when nothing of it is on a queue pair or on its way;
//! - each list holds exactly what was posted and not yet told of; credit and completion-queue room are its sum;
//! - the sets of seats that a turn looks through hold what it looks for, and every life has its seat;
//! - a first error is told once per life and costs at most one retry; echoes cost none; no slice fails with retries left;
//! - each queue pair goes back once; nothing is posted before its trial is back, nor after its life is over;
//! - no queue pair drains for longer than the limit, and none gives a slice back before the Work is held for it;
//! - the peer's route is open exactly while a rail works.

use super::device::{Device, lock};
use super::world::CoreWorld;
use crate::core::inflight::TRIAL;
use crate::core::table::{NONE, QpSeat, QpState, RailState};
use crate::error::Cause;
use crate::limits::{DRAIN_LIMIT, STALL_STEP};
use crate::nic::Op;
use crate::units::Nanos;
use crate::work::TransferStatus;

impl CoreWorld {
    pub(super) fn fingerprint(&self) -> Vec<u32> {
        let mut key = vec![];
        let core = &self.core;
        for qp in &core.qps {
            let state = match qp.state {
                QpState::Free => 0,
                QpState::Trial => 1,
                QpState::Up => 2,
                QpState::Draining { .. } => 3,
                QpState::Overdue => 4,
            };
            let number = if state == 0 { NONE } else { qp.qpn.get() };
            let flags = u32::from(qp.needs_fence) | u32::from(qp.stalled) << 1 | u32::from(qp.proven) << 2;
            key.extend([state, number, qp.rail, flags, qp.unsignaled, qp.in_flight.len()]);
            key.extend(
                qp.in_flight.iter(&core.in_flight).map(|entry| if entry.seat == TRIAL { NONE } else { entry.slice }),
            );
        }
        key.extend(core.free_qps.iter().map(|slot| u32::from(*slot)));
        for rail in &core.rails {
            key.extend([rail.state as u32, rail.key.rail.0, rail.key.life, rail.holds, u32::from(rail.qp_count)]);
        }
        key.extend(core.free_rails.iter());
        for work in &core.works {
            let flags = u32::from(work.work.is_some()) | u32::from(work.returned) << 1 | u32::from(work.dirty) << 2;
            let flags = flags | u32::from(work.finished) << 3 | u32::from(work.home) << 4;
            key.extend([flags, work.line as u32, work.outstanding, work.settled, work.holds]);
        }
        if let Some(peer) = core.peers.first() {
            key.push(peer.first % (peer.rails.len() as u32).max(1));
            key.extend(peer.rails.iter());
        }
        let work = &self.work;
        let closed = u32::from(work.is_closed());
        let claimed = work.slices().len() as u32 - if closed == 1 { 0 } else { work.unclaimed() };
        key.extend([closed, claimed, work.remaining_now(), work.first_error().is_some().into()]);
        for slice in 0..self.plan.slices {
            let status = match work.transfers()[slice as usize].status() {
                TransferStatus::Waiting => 0,
                TransferStatus::Done => 1,
                TransferStatus::Failed(_) => 2,
            };
            key.extend([status, u32::from(work.is_returned(slice)), u32::from(work.failures_of(slice))]);
        }
        let device = lock(&self.device);
        for qp in &device.qps {
            let flags = u32::from(qp.in_error) | u32::from(qp.destroyed) << 1 | u32::from(qp.returned) << 2;
            key.extend([
                flags | u32::from(qp.proven) << 3 | u32::from(qp.swallows) << 4,
                qp.queue.len() as u32,
                qp.posted - qp.known,
            ]);
            key.extend(qp.queue.iter().map(|r| r.slice.map_or(NONE, |slice| slice << 1 | u32::from(r.signaled))));
            if self.plan.doubles > 0 {
                key.push(qp.last.map_or(NONE, |last| last.wr_id.sequence << 8 | last.status.0));
            }
        }
        for completion in &device.cq {
            key.extend([completion.qpn.get(), completion.wr_id.sequence, completion.status.0]);
        }
        key.extend(device.landed.iter().map(|landed| u32::from(*landed)));
        for (life, facts) in self.lives.iter().zip(&device.lives) {
            let flags = u32::from(life.ending) | u32::from(life.in_error) << 1 | u32::from(life.fenced) << 2;
            key.extend([flags | u32::from(facts.may_land) << 3, life.rail as u32, life.overdue.len() as u32]);
        }
        let plan = &self.plan;
        key.extend([plan.failures, plan.silences, plan.doubles, plan.retires, plan.cancels].map(u32::from));
        key.extend([u32::from(self.blamed), u32::from(self.finished), u32::from(self.gave_up)]);
        key.extend(&self.unread);
        key
    }

    pub(super) fn broken_law(&self) -> Result<(), String> {
        if let Some(why) = &self.broken {
            return Err(why.clone());
        }
        let device = lock(&self.device);
        if let Some(why) = &device.broken {
            return Err(why.clone());
        }
        device.check_room()?;
        self.check_slices(&device)?;
        self.check_lists(&device)?;
        self.check_rails()?;
        self.check_sets()?;
        let (work, core) = (&self.work, &self.core);
        let waiting = (0..self.plan.slices).filter(|slice| self.waiting(*slice)).count() as u32;
        let owed: u32 = core.works.iter().map(|seat| seat.settled + seat.holds).sum();
        if work.remaining_now() != waiting + owed {
            return Err(format!("{waiting} slices and {owed} of the core, but the Work says {}", work.remaining_now()));
        }
        let on_its_way = device.qps.iter().any(|qp| qp.queue.iter().any(|request| request.slice.is_some()));
        let may_land = self.plan.op == Op::Write && device.lives.iter().any(|life| life.may_land);
        if work.is_terminal() && (on_its_way || may_land) {
            return Err("terminal, and something may still land".to_owned());
        }
        if self.finished > 1 || self.finished == 1 && !work.is_terminal() {
            return Err(format!("reported finished {} times", self.finished));
        }
        Ok(())
    }

    fn check_slices(&self, device: &Device) -> Result<(), String> {
        for slice in 0..self.plan.slices {
            let lists = self.core.qps.iter().filter(|qp| qp.state != QpState::Free);
            let entries = lists.flat_map(|qp| qp.in_flight.iter(&self.core.in_flight));
            let flying = entries.filter(|entry| entry.seat != TRIAL && entry.slice == slice).count();
            let unclaimed = !self.work.is_closed() && slice >= self.plan.slices - self.work.unclaimed();
            let owners = flying + usize::from(unclaimed) + usize::from(self.work.is_returned(slice));
            let status = self.work.transfers()[slice as usize].status();
            if owners != usize::from(status == TransferStatus::Waiting) {
                return Err(format!("slice {slice} has {owners} owners and is {status:?}"));
            }
            match status {
                TransferStatus::Done if !device.landed[slice as usize] => {
                    return Err(format!("slice {slice} is done and has not landed"));
                }
                TransferStatus::Failed(error)
                    if error.cause == Cause::Completion && self.work.failures_of(slice) <= self.plan.retries =>
                {
                    return Err(format!("slice {slice} ended with retries left"));
                }
                _ => {}
            }
        }
        let charged: u32 = (0..self.plan.slices).map(|slice| u32::from(self.work.failures_of(slice))).sum();
        if charged > u32::from(self.blamed) {
            return Err(format!("{charged} retries were spent on {} first errors", self.blamed));
        }
        Ok(())
    }

    fn check_lists(&self, device: &Device) -> Result<(), String> {
        let mut outstanding = 0;
        for seat in self.core.qps.iter().filter(|seat| seat.state != QpState::Free) {
            let qp = &device.qps[seat.qpn.get() as usize];
            outstanding += seat.in_flight.len();
            // One look of the watch later than the limit at the latest.
            if let QpState::Draining { since } = seat.state
                && self.now.since(since) > DRAIN_LIMIT.plus(STALL_STEP)
            {
                return Err(format!("queue pair {} drains for ever", seat.qpn));
            }
            if seat.in_flight.len() != qp.posted - qp.known {
                let (listed, real) = (seat.in_flight.len(), qp.posted - qp.known);
                return Err(format!("{listed} requests in the list of queue pair {}, {real} posted", seat.qpn));
            }
        }
        if outstanding != self.core.outstanding() {
            return Err(format!("{outstanding} requests are out, and the core counts {}", self.core.outstanding()));
        }
        Ok(())
    }

    fn check_sets(&self) -> Result<(), String> {
        let core = &self.core;
        for (slot, qp) in core.qps.iter().enumerate() {
            if core.flying.contains(slot) == qp.in_flight.is_empty() {
                return Err(format!(
                    "{} requests of queue pair {slot} in flight, and it is not so listed",
                    qp.in_flight.len()
                ));
            }
            if qp.state == QpState::Trial && qp.in_flight.is_empty() && !core.untried.contains(slot) {
                return Err(format!("queue pair {slot} waits for its trial, and nobody knows"));
            }
        }
        for (seat, rail) in core.rails.iter().enumerate() {
            if core.down.contains(seat) != (rail.state == RailState::Down) {
                return Err(format!("rail {seat} is {:?}, and it is not so listed", rail.state));
            }
            let found = core.lives.get(&rail.key).copied() == Some(seat as u32);
            if found != (rail.state != RailState::Free) {
                return Err(format!("rail {seat} is {:?}, and its life leads elsewhere", rail.state));
            }
        }
        let alive = core.rails.iter().filter(|rail| rail.state != RailState::Free).count();
        if core.lives.len() != alive {
            return Err(format!("{} lives have a seat, and {alive} rails are not free", core.lives.len()));
        }
        let (places, free) = core.in_flight.places();
        let listed: u32 = core.qps.iter().map(|qp| qp.in_flight.len()).sum();
        if places != free + listed as usize {
            return Err(format!("{places} places, {free} free, and {listed} requests in flight"));
        }
        let waits = |qp: &QpSeat| {
            matches!(qp.state, QpState::Draining { .. }) || qp.state == QpState::Trial && qp.in_flight.is_empty()
        };
        if core.next_turn() == Nanos::FAR && core.qps.iter().any(waits) {
            return Err("nobody looks at a queue pair that drains or waits for its trial".to_owned());
        }
        Ok(())
    }

    fn check_rails(&self) -> Result<(), String> {
        for life in &self.lives {
            if life.failed > 1 {
                return Err(format!("{} first errors of life {} of rail {}", life.failed, life.number, life.rail));
            }
        }
        let core = &self.core;
        for (at, rail) in core.rails.iter().enumerate().filter(|(_, rail)| rail.state != RailState::Free) {
            let lists = rail.qps().flat_map(|slot| core.qps[slot].in_flight.iter(&core.in_flight));
            let bytes: u64 = lists.map(|entry| u64::from(entry.len)).sum();
            if rail.credit.in_flight() != bytes {
                return Err(format!("{bytes} bytes on rail {at}, and {} spent", rail.credit.in_flight()));
            }
        }
        let up = core.rails.iter().filter(|rail| rail.state == RailState::Up).count() as u32;
        let usable = core.peers.first().map_or(0, |peer| peer.usable);
        if usable != up || (self.peer.routes() & 1 == 1) != (up > 0) {
            return Err(format!("{up} rails work, {usable} are counted, routes {:#b}", self.peer.routes()));
        }
        Ok(())
    }
}
