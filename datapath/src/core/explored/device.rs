//! The other side of a core's queue pairs, one step at a time: a device that ends requests in post order, and fails, flushes,
//! repeats or forgets completions when it is told to.
//!
//! It checks what a device cannot see but suffers from: requests beyond a queue, before a trial is back, after a life is over.

use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::nic::{AdminQp, Completion, CompletionQueue, PostQp, Posted, WcStatus, WorkRequest};
use crate::units::{Qpn, WrId};
use crate::work::Work;

/// What the device does not keep to, to see that the search finds out.
#[derive(Clone, Copy, Default)]
pub(super) struct Lies {
    /// Late completions bear the generation of whoever has the slot now, as if there were none.
    pub(super) generations: bool,
    /// A drained queue pair is said to leave nothing on its way.
    pub(super) drains_clean: bool,
    /// Its completion queue has fewer entries than it says.
    pub(super) entries: usize,
}

/// One posted request. `slice`: none for a trial.
#[derive(Clone, Copy)]
pub(super) struct Request {
    pub(super) wr_id: WrId,
    pub(super) signaled: bool,
    pub(super) slice: Option<u32>,
}

pub(super) struct DeviceQp {
    pub(super) life: usize,
    pub(super) queue: VecDeque<Request>,
    pub(super) in_error: bool,
    pub(super) destroyed: bool,
    /// Its requests end only by being flushed.
    pub(super) swallows: bool,
    /// The core gave its half back.
    pub(super) returned: bool,
    /// The completion of its trial was polled.
    pub(super) proven: bool,
    pub(super) posted: u32,
    /// Requests of which a polled completion tells that they ended.
    pub(super) known: u32,
    /// Its newest completion.
    pub(super) last: Option<Completion>,
    /// Slices whose failure the core has not asked about ([`PostQp::drains_clean`]), oldest first.
    failed: VecDeque<Option<u32>>,
}

/// A life of a rail, as device and control know it.
#[derive(Clone, Copy, Default)]
pub(super) struct LifeFacts {
    /// The core said, or was told, that it is over: nothing is posted on it any more.
    pub(super) over: bool,
    /// A WRITE of it ended otherwise than done, and the peer's end is not fenced.
    pub(super) may_land: bool,
}

pub(super) struct Device {
    pub(super) qps: Vec<DeviceQp>,
    pub(super) lives: Vec<LifeFacts>,
    pub(super) cq: VecDeque<Completion>,
    /// Completions in it that came twice: a real queue would not have to hold them.
    pub(super) doubles: usize,
    pub(super) landed: Vec<bool>,
    /// What the core did that it must not.
    pub(super) broken: Option<String>,
    pub(super) lies: Lies,
    /// Whose slices these are.
    pub(super) work: Option<Arc<Work>>,
    /// Requests a queue pair holds.
    sends: u32,
    /// Entries of the completion queue.
    entries: u32,
}

/// The device behind a lock that nobody ever waits for: the halves of queue pairs have to be `Send`.
pub(super) type Shared = Arc<Mutex<Device>>;

pub(super) fn lock(device: &Shared) -> MutexGuard<'_, Device> {
    device.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Bytes of a slice; slice n lies n times as far.
pub(super) const SLICE: u32 = 8;

impl Device {
    /// Queue pairs of `sends` requests and a completion queue of `entries`.
    pub(super) fn new(sends: u32, entries: u32, slices: usize, lies: Lies) -> Shared {
        Arc::new(Mutex::new(Self {
            qps: vec![],
            lives: vec![],
            cq: VecDeque::new(),
            doubles: 0,
            landed: vec![false; slices],
            broken: None,
            lies,
            work: None,
            sends,
            entries,
        }))
    }

    pub(super) fn make(&mut self, life: usize) -> usize {
        self.qps.push(DeviceQp {
            life,
            queue: VecDeque::new(),
            in_error: false,
            destroyed: false,
            swallows: false,
            returned: false,
            proven: false,
            posted: 0,
            known: 0,
            last: None,
            failed: VecDeque::new(),
        });
        self.qps.len() - 1
    }

    /// The oldest request of a queue pair ends.
    pub(super) fn end(&mut self, qp: usize, status: WcStatus) {
        let Some(request) = self.qps[qp].queue.pop_front() else { return };
        let done = status == WcStatus::SUCCESS;
        if let Some(slice) = request.slice {
            self.landed[slice as usize] |= done;
            self.lives[self.qps[qp].life].may_land |= !done;
        }
        if done && !request.signaled {
            return;
        }
        self.qps[qp].in_error |= !done;
        if !done {
            self.qps[qp].failed.push_back(request.slice);
        }
        let completion = Completion { wr_id: request.wr_id, status, vendor_err: 0, qpn: qpn(qp) };
        self.qps[qp].last = Some(completion);
        self.cq.push_back(completion);
    }

    /// The newest completion of a queue pair comes once more.
    pub(super) fn double(&mut self, qp: usize) {
        if let Some(last) = self.qps[qp].last {
            self.cq.push_back(last);
            self.doubles += 1;
        }
    }

    /// Destroys a queue pair: what is on it has ended, and its WRITEs may be on their way.
    pub(super) fn destroy(&mut self, qp: usize) {
        let state = &mut self.qps[qp];
        state.destroyed = true;
        let writes = state.queue.drain(..).filter(|request| request.slice.is_some()).count();
        self.lives[state.life].may_land |= writes > 0;
    }

    /// The newest generation of a slot.
    fn generation(&self, slot: u16) -> u16 {
        let posted = self.qps.iter().flat_map(|qp| qp.queue.iter().map(|r| r.wr_id).chain(qp.last.map(|c| c.wr_id)));
        posted.filter(|id| id.slot == slot).map(|id| id.generation).max().unwrap_or_default()
    }

    fn post(&mut self, qp: usize, chain: &[WorkRequest]) -> Posted {
        let mut why = None;
        for request in chain {
            let slice = (request.len > 0).then_some((request.remote.0 / u64::from(SLICE)) as u32);
            let state = &mut self.qps[qp];
            // A trial may be posted by the very turn that reads of the end.
            if state.returned || self.lives[state.life].over && slice.is_some() {
                why = Some(format!("{slice:?} was posted on queue pair {qp} after its life was over"));
            } else if slice.is_some() && !state.proven {
                why = Some(format!("{slice:?} was posted on queue pair {qp} before its trial came back"));
            } else if state.posted - state.known >= self.sends {
                why = Some(format!("{slice:?} was posted on queue pair {qp}, which is full"));
            }
            state.posted += 1;
            state.queue.push_back(Request { wr_id: request.wr_id, signaled: request.signaled, slice });
        }
        self.broken = self.broken.take().or(why);
        Posted { accepted: chain.len(), error: None }
    }

    /// The core asks whether the oldest failure of a queue pair may leave something on its way. Whoever takes a slice out of the
    /// return map may end the Work, so a slice must not lie there yet.
    fn asked(&mut self, qp: usize) -> bool {
        let slice = self.qps[qp].failed.pop_front().flatten();
        if let (Some(slice), Some(work)) = (slice, &self.work)
            && work.is_returned(slice)
        {
            self.broken.get_or_insert_with(|| format!("slice {slice} was given back before the Work was held for it"));
        }
        self.lies.drains_clean
    }

    fn poll(&mut self, out: &mut [Completion]) -> usize {
        let count = out.len().min(self.cq.len());
        for place in out.iter_mut().take(count) {
            let Some(mut completion) = self.cq.pop_front() else { break };
            let qp = &mut self.qps[completion.qpn.get() as usize];
            qp.known = qp.known.max(completion.wr_id.sequence + 1);
            qp.proven |= completion.status == WcStatus::SUCCESS;
            if self.lies.generations {
                completion.wr_id.generation = self.generation(completion.wr_id.slot);
            }
            *place = completion;
        }
        self.doubles = self.doubles.min(self.cq.len());
        count
    }

    /// A completion queue has room for every request that may complete.
    pub(super) fn check_room(&self) -> Result<(), String> {
        let entries = if self.lies.entries > 0 { self.lies.entries } else { self.entries as usize };
        let may_come: usize = self.qps.iter().map(|qp| qp.queue.len()).sum();
        if self.cq.len() - self.doubles + may_come > entries {
            return Err(format!("{} completions and {may_come} to come in {entries} entries", self.cq.len()));
        }
        Ok(())
    }
}

pub(super) fn qpn(qp: usize) -> Qpn {
    Qpn::new(qp as u32).unwrap_or_default()
}

/// The posting half of queue pair `.1`.
pub(super) struct Poster(pub(super) Shared, pub(super) usize);

impl PostQp for Poster {
    fn qpn(&self) -> Qpn {
        qpn(self.1)
    }
    fn depth(&self) -> u32 {
        lock(&self.0).sends
    }
    fn max_inline(&self) -> u32 {
        0
    }
    fn post(&mut self, chain: &[WorkRequest]) -> Posted {
        lock(&self.0).post(self.1, chain)
    }
    fn drains_clean(&self) -> bool {
        lock(&self.0).asked(self.1)
    }
}

/// Control's half, which the world keeps nothing of: it moves queue pairs to ERR itself.
pub(super) struct Admin(pub(super) usize);

impl AdminQp for Admin {
    fn qpn(&self) -> Qpn {
        qpn(self.0)
    }
    fn to_error(&mut self) -> io::Result<()> {
        Ok(())
    }
}

pub(super) struct Poller(pub(super) Shared);

impl CompletionQueue for Poller {
    fn depth(&self) -> u32 {
        lock(&self.0).entries
    }
    fn poll(&mut self, out: &mut [Completion]) -> io::Result<usize> {
        Ok(lock(&self.0).poll(out))
    }
}
