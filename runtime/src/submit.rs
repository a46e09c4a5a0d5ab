//! From transfers to Works: look up, tile, group, enqueue. All of a batch, or nothing.

mod at_once;

use std::sync::Arc;
use std::time::{Duration, Instant};

use moonrail_datapath::core::{dispatch, enqueue};
use moonrail_datapath::error::{Cause, SliceError};
use moonrail_datapath::nic::{Direct, Op};
use moonrail_datapath::region::Region as Registered;
use moonrail_datapath::slice::{Slices, TileError, tile};
use moonrail_datapath::transfer::RemoteBuffers;
use moonrail_datapath::units::{Nanos, RemoteAddr};
use moonrail_datapath::work::{Completion, Lens, Work, WorkParts};
use smallvec::SmallVec;

use crate::batch::{Batch, Flight, Place, Places, Transfer, Works, after};
use crate::engine::Shared;
use crate::error::SubmitError;
use crate::registry::{Registry, chunk_at};
use crate::segment::Segment;

pub(crate) use at_once::CopiedCounters;

/// How long a batch of several Works waits for room after its first one was taken, in all.
const ROOM_WITHIN: Duration = Duration::from_millis(10);

/// Transfers that share a direction, a peer's descriptor and a local region.
struct Group {
    op: Op,
    remote: Arc<RemoteBuffers>,
    registered: Arc<Registered>,
    slices: Slices,
    lens: Lens,
}

type Groups = SmallVec<[Group; 1]>;

/// The transfers of a batch, wherever they are kept.
pub(crate) trait Transfers {
    fn count(&self) -> usize;
    fn get(&self, index: usize) -> (&Segment, Transfer);
    /// The one that all of them go to, if there is one.
    fn segment(&self) -> Option<&Segment>;
}

impl Transfers for (&Segment, &[Transfer]) {
    fn count(&self) -> usize {
        self.1.len()
    }
    fn get(&self, index: usize) -> (&Segment, Transfer) {
        (self.0, self.1[index])
    }
    fn segment(&self) -> Option<&Segment> {
        (!self.1.is_empty()).then_some(self.0)
    }
}

impl Transfers for [(Segment, Transfer)] {
    fn count(&self) -> usize {
        self.len()
    }
    fn get(&self, index: usize) -> (&Segment, Transfer) {
        (&self[index].0, self[index].1)
    }
    fn segment(&self) -> Option<&Segment> {
        let (first, others) = self.split_first()?;
        others.iter().all(|other| other.0.is(&first.0)).then_some(&first.0)
    }
}

impl Shared {
    /// Submits one transfer by the straight way, if that is open to it: it is done then.
    #[inline]
    pub(crate) fn submit_one(&self, segment: &Segment, transfer: &Transfer) -> Option<Batch> {
        if !self.is_here() {
            return None;
        }
        self.copy_one_at_once(segment, transfer).map(Batch::copied_one)
    }

    /// Submits `transfers`. `deadline`: for the whole batch; `None` for the engine's default.
    #[inline(never)]
    pub(crate) fn submit<T: Transfers + ?Sized>(
        self: &Arc<Self>,
        transfers: &T,
        deadline: Option<Duration>,
    ) -> Result<Batch, SubmitError> {
        if !self.is_here() {
            return Err(SubmitError::Forked);
        }
        match self.copy_at_once(transfers) {
            Ok(lens) => Ok(Batch::copied(lens)),
            Err(direct) => self.submit_to_cores(transfers, deadline, direct.as_ref()),
        }
    }

    #[inline(never)]
    fn submit_to_cores<T: Transfers + ?Sized>(
        self: &Arc<Self>,
        transfers: &T,
        deadline: Option<Duration>,
        direct: Option<&Arc<dyn Direct>>,
    ) -> Result<Batch, SubmitError> {
        match self.try_submit(transfers, deadline, direct) {
            // The peer may have registered it after we looked.
            Err(SubmitError::OutsidePeer { index, segment, addr }) => {
                let (far, _) = transfers.get(index);
                if far.look_again() {
                    self.try_submit(transfers, deadline, direct)
                } else {
                    Err(SubmitError::OutsidePeer { index, segment, addr })
                }
            }
            result => result,
        }
    }

    fn try_submit<T: Transfers + ?Sized>(
        self: &Arc<Self>,
        transfers: &T,
        deadline: Option<Duration>,
        direct: Option<&Arc<dyn Direct>>,
    ) -> Result<Batch, SubmitError> {
        // Held until everything is enqueued: memory cannot leave, and the engine cannot stop, in between.
        let registry = self.registry();
        let submitted = Instant::now();
        if registry.stopped {
            return Err(SubmitError::Stopped);
        }
        let mut groups = Groups::new();
        // What the peer offers, looked up once per run of transfers to one segment.
        let mut current: Option<(&Segment, Arc<RemoteBuffers>)> = None;
        let mut places = Places::with_capacity(transfers.count());
        let mut bytes = 0u64;
        for index in 0..transfers.count() {
            let (segment, transfer) = transfers.get(index);
            let buffers = match &current {
                Some((last, buffers)) if last.is(segment) => buffers,
                _ if !segment.belongs_to(self) => {
                    return Err(SubmitError::ForeignSegment { index, segment: segment.name().to_owned() });
                }
                _ => &current.insert((segment, segment.remote().ok_or(SubmitError::Forked)?)).1,
            };
            places.push(if transfer.len == 0 {
                Place { transfer, work: None }
            } else {
                let (group, slot) = self.add(&mut groups, &registry, index, buffers, transfer)?;
                Place { transfer, work: Some((group, slot)) }
            });
            bytes = bytes.saturating_add(transfer.len);
        }
        let span = deadline.unwrap_or_else(|| self.settings.transfer_timeout + Duration::from_nanos(bytes));
        let now = self.at(submitted);
        let until = now.plus(Nanos::from_duration(span));
        let completion = Completion::new(groups.len() as u32);
        let works = groups.into_iter().map(|group| self.work(group, now, until, &completion)).collect::<Works>();
        let mut room_until = None;
        // What goes to one core the caller may turn that core for. What goes to several they carry side by side, and what this thread
        // can copy it copies beside them.
        let by_caller = works.len() == 1 && direct.is_none();
        for (number, work) in works.iter().enumerate() {
            if by_caller {
                enqueue(work.clone(), &self.inboxes).map_err(|_| SubmitError::Busy)?;
            } else {
                self.enqueue(work, (number > 0).then_some(&mut room_until), direct.map(AsRef::as_ref))?;
            }
        }
        let direct = direct.cloned();
        drop(registry);
        let lead = works.first().filter(|_| by_caller).map(|work| usize::from(work.home().0));
        if let Some(home) = lead {
            // Posted from here, if the core rests. The clock is looked at again after many were cut: that takes longer than the look.
            self.inboxes[home].attend(&|| if transfers.count() > 1 { (self.clock)() } else { now });
        }
        Ok(Batch::new(
            Flight { shared: self.clone(), completion, places, submitted, limit: after(submitted, span), direct, lead },
            works,
        ))
    }

    /// Cuts one transfer into the group it belongs to; returns its place there.
    fn add(
        &self,
        groups: &mut Groups,
        registry: &Registry,
        index: usize,
        buffers: &Arc<RemoteBuffers>,
        transfer: Transfer,
    ) -> Result<(u32, u32), SubmitError> {
        let Transfer { op, local, remote, len } = transfer;
        if local.checked_add(len).is_none() || remote.checked_add(len).is_none() {
            return Err(SubmitError::Length { index, len });
        }
        let entry = registry.find(local).ok_or(SubmitError::NotRegistered { index, addr: local })?;
        // The newest group first: transfers of one kind come in runs.
        let found = groups.iter().rposition(|group| {
            group.op == op && Arc::ptr_eq(&group.registered, &entry.registered) && Arc::ptr_eq(&group.remote, buffers)
        });
        let place = found.unwrap_or_else(|| {
            let registered = entry.registered.clone();
            groups.push(Group { op, remote: buffers.clone(), registered, slices: Slices::new(), lens: Lens::new() });
            groups.len() - 1
        });
        let group = &mut groups[place];
        let slot = group.lens.len() as u32;
        if group.slices.len() as u64 + len / u64::from(self.settings.slices.size) >= u64::from(u32::MAX) {
            return Err(SubmitError::Length { index, len });
        }
        let (near, far) = (&group.registered, &group.remote);
        let cut = tile(
            slot,
            local,
            RemoteAddr(remote),
            len,
            self.settings.slices,
            |addr| chunk_at(near, addr),
            |addr| far.find(addr),
            &mut group.slices,
        );
        cut.map_err(|error| match error {
            TileError::Local { addr } => SubmitError::NotRegistered { index, addr },
            TileError::Remote { addr } => {
                SubmitError::OutsidePeer { index, segment: buffers.peer.name().to_owned(), addr }
            }
        })?;
        group.lens.push(len);
        Ok((place as u32, slot))
    }

    fn work(&self, group: Group, submitted: Nanos, deadline: Nanos, completion: &Arc<Completion>) -> Arc<Work> {
        Work::new(WorkParts {
            op: group.op,
            slices: group.slices,
            transfers: group.lens,
            local: group.registered,
            remote: group.remote,
            submitted,
            deadline,
            cores: self.inboxes.len() as u16,
            retries: self.settings.retries,
            completion: completion.clone(),
        })
    }

    /// Puts a Work into the cores' rings. The first one of a batch is refused where a ring is full; for a later one room
    /// is waited for, until `room_until` of the whole batch (the registry is locked meanwhile), and if none comes it ends as
    /// cancelled: what was taken before cannot be taken back.
    fn enqueue(
        &self,
        work: &Arc<Work>,
        room_until: Option<&mut Option<Instant>>,
        direct: Option<&dyn Direct>,
    ) -> Result<(), SubmitError> {
        if dispatch(work.clone(), &self.inboxes).is_ok() {
            return Ok(());
        }
        let mut of_its_own = None;
        let room_until = match (direct, room_until) {
            (Some(far), _) if self.carry(work, far) => return Ok(()),
            // What was begun cannot be refused any more.
            (Some(_), None) => &mut of_its_own,
            (_, Some(room_until)) => room_until,
            (None, None) => return Err(SubmitError::Busy),
        };
        let until = *room_until.get_or_insert_with(|| Instant::now() + ROOM_WITHIN);
        while Instant::now() < until {
            std::thread::yield_now();
            if dispatch(work.clone(), &self.inboxes).is_ok() {
                return Ok(());
            }
        }
        work.abandon(SliceError::of(Cause::Cancelled));
        Ok(())
    }

    /// Carries a Work that no core has, on this thread: callers who copy faster than the cores look fill their rings with
    /// Works that are over. Whether it is done; if not, something is in the way that a core has to find out.
    fn carry(&self, work: &Work, far: &dyn Direct) -> bool {
        loop {
            let done = work.assist(far);
            self.count_copied(done.slices, done.bytes);
            if done.gave_back {
                return false;
            }
            if done.slices == 0 {
                return work.is_terminal();
            }
        }
    }

    /// Hands a Work whose slices came back to its home once more. A full ring is no loss: the home looks once a
    /// millisecond.
    pub(crate) fn enqueue_again(&self, work: &Arc<Work>) {
        if let Some(home) = self.inboxes.get(usize::from(work.home().0)) {
            let _ = home.submit(work.clone());
        }
    }
}
