//! A core in a small world: its device and its control as models, one step of either at a time, and the core's turns.
//!
//! What must hold in every state is in `laws.rs`. From every state an end must be within reach: the Work over, every queue
//! pair back, every seat free.

use std::cell::RefCell;
use std::sync::Arc;

use super::device::{self, Admin, Device, Lies, Poller, Poster, SLICE, Shared, lock};
use crate::core::{Command, Core, CoreConfig, CoreEvent, Doorbell, Inbox, Outbox, RailKey, RailSpec};
use crate::error::{Cause, SliceError};
use crate::explore::World;
use crate::limits::{STALL_STEP, WATCH_PERIOD};
use crate::nic::{Op, PostHalf, Registration, WcStatus, qp};
use crate::region::{Chunk, Memory, Region};
use crate::slice::{Extent, Slice};
use crate::transfer::{Peer, RemoteBuffer, RemoteBuffers, Route};
use crate::units::{CoreId, Lkey, Nanos, NicId, PeerId, PeerNicId, RailId, RemoteAddr, Rkey};
use crate::work::{Completion, TransferStatus, Work, WorkParts};

/// Looks of the watch that are long enough for a stall (4 s), and then for a drain limit (5 s) that began before.
const SILENT_LOOKS: u32 = 52;

/// What may happen, and how often.
#[derive(Clone)]
pub(super) struct Plan {
    pub(super) op: Op,
    pub(super) slices: u32,
    pub(super) retries: u8,
    /// Queue pairs of each rail.
    pub(super) rails: Vec<usize>,
    pub(super) queue: u32,
    pub(super) entries: u32,
    /// Lives that are connected, over all rails.
    pub(super) lives: usize,
    pub(super) failures: u8,
    pub(super) silences: u8,
    /// What a silent queue pair holds is flushed when that is asked for, and never done.
    pub(super) swallows: bool,
    pub(super) doubles: u8,
    pub(super) retires: u8,
    pub(super) cancels: u8,
    pub(super) rules: Rules,
}

/// What control keeps to, and what the device does not; each can be turned round to see that the search finds it.
#[derive(Clone, Copy)]
pub(super) struct Rules {
    pub(super) lies: Lies,
    /// A life is fenced only after each of its queue pairs is back.
    pub(super) drains_first: bool,
    /// A queue pair is said to be destroyed only after it is.
    pub(super) destroys: bool,
    /// Queue pairs of a life that is over are moved to ERR.
    pub(super) moves_to_error: bool,
    /// Lives are fenced.
    pub(super) fences: bool,
}

pub(super) const KEPT: Rules = Rules {
    lies: Lies { generations: false, drains_clean: false, entries: 0 },
    drains_first: true,
    destroys: true,
    moves_to_error: true,
    fences: true,
};

#[derive(Clone, Debug)]
pub(super) enum Step {
    /// The core turns.
    Turn,
    /// The oldest request of a queue pair is done.
    Done(usize),
    /// It failed.
    Fail(usize),
    /// It is flushed.
    Flush(usize),
    /// The newest completion of a queue pair is seen again.
    Double(usize),
    /// Five seconds pass in which the core turns and the device says nothing.
    Silence,
    /// Control ends a life for a reason of its own.
    Retire(usize),
    /// Control's job moved a life's queue pairs to ERR.
    ToError(usize),
    /// Control destroyed a queue pair that did not drain.
    Destroy(usize),
    /// Proof that nothing of a life can land any more.
    Fence(usize),
    /// Another life of a rail is connected.
    Connect(usize),
    /// Control can make no rail.
    GiveUp,
    /// The caller cancels.
    Cancel,
}

/// One life as control keeps it.
pub(super) struct Life {
    pub(super) rail: usize,
    pub(super) number: u32,
    qps: Vec<usize>,
    pub(super) failed: u8,
    /// Control has begun to end it.
    pub(super) ending: bool,
    pub(super) in_error: bool,
    pub(super) fenced: bool,
    pub(super) overdue: Vec<(u16, usize, PostHalf)>,
}

pub(super) struct CoreWorld {
    pub(super) plan: Plan,
    pub(super) core: Core,
    inbox: Arc<Inbox>,
    outbox: Arc<Outbox>,
    pub(super) device: Shared,
    pub(super) peer: Arc<Peer>,
    pub(super) work: Arc<Work>,
    pub(super) now: Nanos,
    pub(super) lives: Vec<Life>,
    /// First errors that blame a request.
    pub(super) blamed: u8,
    pub(super) finished: u8,
    pub(super) gave_up: bool,
    /// Commands that the core has not read.
    pub(super) unread: Vec<u32>,
    pub(super) broken: Option<String>,
}

thread_local! {
    /// Rings are large: the next world takes those of the last.
    static RINGS: RefCell<Vec<(Arc<Inbox>, Arc<Outbox>)>> = const { RefCell::new(vec![]) };
}

fn rings() -> (Arc<Inbox>, Arc<Outbox>) {
    RINGS
        .with_borrow_mut(Vec::pop)
        .unwrap_or_else(|| (Inbox::new(CoreId(0)).unwrap(), Outbox::new(Arc::new(Doorbell::new().unwrap()))))
}

impl Drop for CoreWorld {
    fn drop(&mut self) {
        while self.inbox.next_command().is_some() || self.inbox.next_work().is_some() || self.outbox.next().is_some() {}
        RINGS.with_borrow_mut(|rings| rings.push((self.inbox.clone(), self.outbox.clone())));
    }
}

/// Memory for every world of an exploration.
pub(super) fn region() -> Arc<Region> {
    let memory = Memory::allocate(4096).unwrap();
    let keys = Registration { lkey: Lkey(1), rkey: Rkey(1), guard: Box::new(()) };
    let chunk = Chunk { addr: memory.addr(), len: memory.len(), keys: [Some(keys.into())].into() };
    Arc::new(Region::new(memory, vec![chunk], "*".into(), false))
}

impl CoreWorld {
    pub(super) fn new(plan: &Plan, local: &Arc<Region>) -> Self {
        let device = Device::new(plan.queue, plan.entries, plan.slices as usize, plan.rules.lies);
        let (inbox, outbox) = rings();
        let core = Core::new(CoreConfig {
            id: CoreId(0),
            inbox: inbox.clone(),
            outbox: outbox.clone(),
            cores: [inbox.clone()].into(),
            nics: vec![(NicId(0), Box::new(Poller(device.clone())))],
            counters: Arc::default(),
        });
        let peer = Peer::new(PeerId(0), "p".into());
        let buffer = RemoteBuffer {
            extent: Extent { addr: 0, len: 4096 },
            rkeys: plan.rails.iter().map(|_| Some(Rkey(2))).collect(),
            open: true,
            location: "*".into(),
        };
        let slice = |i: u32| {
            let far = u64::from(i * SLICE);
            Slice { local: 0, remote: RemoteAddr(far), len: SLICE, chunk: 0, buffer: 0, transfer: i }
        };
        let work = Work::new(WorkParts {
            op: plan.op,
            slices: (0..plan.slices).map(slice).collect(),
            transfers: (0..plan.slices).map(|_| u64::from(SLICE)).collect(),
            local: local.clone(),
            remote: Arc::new(RemoteBuffers::new(peer.clone(), Route::any(), vec![buffer])),
            submitted: Nanos::ZERO,
            deadline: Nanos::FAR,
            cores: 1,
            retries: plan.retries,
            completion: Completion::new(1),
        });
        work.set_home(CoreId(0));
        lock(&device).work = Some(work.clone());
        assert!(inbox.submit(work.clone()).is_ok());
        let now = Nanos::from_millis(1);
        let mut world = Self {
            plan: plan.clone(),
            core,
            inbox,
            outbox,
            device,
            peer,
            work,
            now,
            lives: vec![],
            blamed: 0,
            finished: 0,
            gave_up: false,
            unread: vec![],
            broken: None,
        };
        for rail in 0..plan.rails.len() {
            world.connect(rail);
        }
        world
    }

    fn connect(&mut self, rail: usize) {
        let (life, number) = (self.lives.len(), self.lives.iter().filter(|life| life.rail == rail).count() as u32);
        lock(&self.device).lives.push(device::LifeFacts::default());
        let qps: Vec<usize> = (0..self.plan.rails[rail]).map(|_| lock(&self.device).make(life)).collect();
        for number_of_qp in qps.clone() {
            let spec = RailSpec {
                key: RailKey { rail: RailId(rail as u32), life: number },
                peer: self.peer.clone(),
                nic: NicId(0),
                peer_nic: PeerNicId(rail as u16),
                counters: Arc::default(),
                claims: true,
            };
            let poster = Box::new(Poster(self.device.clone(), number_of_qp));
            let (qp, _) = qp::connected(poster, Box::new(Admin(number_of_qp)));
            self.command(Command::Adopt { rail: spec, qp }, 1);
        }
        self.lives.push(Life {
            rail,
            number,
            qps,
            failed: 0,
            ending: false,
            in_error: false,
            fenced: false,
            overdue: vec![],
        });
    }

    fn command(&mut self, command: Command, tag: u32) {
        assert!(self.inbox.command(command).is_ok());
        self.unread.push(tag);
    }

    fn turn(&mut self, step: Nanos) {
        self.now = self.now.plus(step);
        self.core.poll_once(self.now);
        self.unread.clear();
        while let Some(event) = self.outbox.next() {
            self.hear(event);
        }
    }

    fn break_rule(&mut self, why: String) {
        self.broken.get_or_insert(why);
    }

    fn life(&mut self, key: RailKey) -> usize {
        let of_key = |life: &Life| (life.rail as u32, life.number) == (key.rail.0, key.life);
        self.lives.iter().position(of_key).expect("a core knows what it was told of")
    }

    fn hear(&mut self, event: CoreEvent) {
        match event {
            CoreEvent::FirstError { key, error } => {
                let life = self.life(key);
                let flushed = error.status == WcStatus::WR_FLUSH_ERR;
                self.blamed += u8::from(!flushed && error.status != WcStatus::GIVEN_UP);
                self.lives[life].failed += 1;
                // Control may have moved it to ERR, and the core has not read yet that it is over.
                if flushed && !self.lives[life].in_error {
                    self.break_rule(format!("a flush was told as the first error of {key:?}"));
                }
                self.lives[life].ending = true;
                lock(&self.device).lives[life].over = true;
            }
            CoreEvent::Drained { key, qp, .. } => {
                let number = qp.qpn().get() as usize;
                self.came_back(key, number);
                if self.plan.op == Op::Write && !lock(&self.device).qps[number].queue.is_empty() {
                    self.break_rule(format!("queue pair {number} is drained, and the device has requests of it"));
                }
            }
            CoreEvent::Overdue { key, slot, qp } => {
                let number = qp.qpn().get() as usize;
                self.came_back(key, number);
                let life = self.life(key);
                self.lives[life].overdue.push((slot, number, qp));
            }
            CoreEvent::Finished(_) => self.finished += 1,
            CoreEvent::Yielded { .. } | CoreEvent::InUse { .. } => self.break_rule("nobody asked for it".into()),
            CoreEvent::Proven { .. }
            | CoreEvent::Wanted { .. }
            | CoreEvent::Released(_)
            | CoreEvent::CqLost { .. }
            | CoreEvent::Stopped => {}
        }
    }

    fn came_back(&mut self, key: RailKey, number: usize) {
        let life = self.life(key);
        let again = std::mem::replace(&mut lock(&self.device).qps[number].returned, true);
        if again || !self.lives[life].qps.contains(&number) || !self.lives[life].ending {
            self.break_rule(format!("queue pair {number} came back as one of {key:?}"));
        }
    }

    /// Whether control has everything of a life.
    fn is_back(&self, life: usize) -> bool {
        let device = lock(&self.device);
        self.lives[life].overdue.is_empty() && self.lives[life].qps.iter().all(|qp| device.qps[*qp].returned)
    }

    pub(super) fn waiting(&self, slice: u32) -> bool {
        self.work.transfers()[slice as usize].status() == TransferStatus::Waiting
    }
}

impl World for CoreWorld {
    type Step = Step;
    type Key = Vec<u32>;

    fn steps(&self) -> Vec<Step> {
        let mut steps = vec![Step::Turn];
        let device = lock(&self.device);
        for (number, qp) in device.qps.iter().enumerate() {
            match (qp.queue.is_empty(), qp.in_error) {
                (false, false) if !qp.swallows => {
                    steps.push(Step::Done(number));
                    if self.plan.failures > 0 {
                        steps.push(Step::Fail(number));
                    }
                }
                (false, true) => steps.push(Step::Flush(number)),
                (true, _) | (false, false) => {}
            }
            if self.plan.doubles > 0 && qp.last.is_some() {
                steps.push(Step::Double(number));
            }
        }
        let quiet = device.cq.is_empty() && self.unread.is_empty();
        if self.plan.silences > 0 && quiet && device.qps.iter().any(|qp| !qp.queue.is_empty()) {
            steps.push(Step::Silence);
        }
        drop(device);
        let over = self.work.is_terminal();
        for (number, life) in self.lives.iter().enumerate() {
            if !life.ending {
                if self.plan.retires > 0 || over {
                    steps.push(Step::Retire(number));
                }
                continue;
            }
            if !life.in_error && self.plan.rules.moves_to_error {
                steps.push(Step::ToError(number));
            }
            if !life.overdue.is_empty() && life.in_error {
                steps.push(Step::Destroy(number));
            }
            let drained = self.is_back(number) || !self.plan.rules.drains_first;
            if !life.fenced && drained && self.plan.rules.fences {
                steps.push(Step::Fence(number));
            }
        }
        let down = |rail: usize| {
            let mut of_rail = self.lives.iter().enumerate().filter(|(_, life)| life.rail == rail);
            of_rail.all(|(at, life)| life.ending && self.is_back(at))
        };
        let down: Vec<usize> = (0..self.plan.rails.len()).filter(|rail| down(*rail)).collect();
        if !over && self.lives.len() < self.plan.lives {
            steps.extend(down.iter().copied().map(Step::Connect));
        } else if !over && !self.gave_up && down.len() == self.plan.rails.len() {
            steps.push(Step::GiveUp);
        }
        if self.plan.cancels > 0 {
            steps.push(Step::Cancel);
        }
        steps
    }

    fn take(&mut self, step: &Step) {
        match *step {
            Step::Turn => self.turn(WATCH_PERIOD),
            Step::Silence => {
                self.plan.silences -= 1;
                for _ in 0..SILENT_LOOKS {
                    self.turn(STALL_STEP);
                }
                if self.plan.swallows {
                    lock(&self.device).qps.iter_mut().for_each(|qp| qp.swallows |= !qp.queue.is_empty());
                }
            }
            Step::Done(qp) => lock(&self.device).end(qp, WcStatus::SUCCESS),
            Step::Fail(qp) => {
                self.plan.failures -= 1;
                lock(&self.device).end(qp, WcStatus::RETRY_EXC_ERR);
            }
            Step::Flush(qp) => lock(&self.device).end(qp, WcStatus::WR_FLUSH_ERR),
            Step::Double(qp) => {
                self.plan.doubles -= 1;
                lock(&self.device).double(qp);
            }
            Step::Retire(life) => {
                self.plan.retires = self.plan.retires.saturating_sub(1);
                self.lives[life].ending = true;
                lock(&self.device).lives[life].over = true;
                let key = RailKey { rail: RailId(self.lives[life].rail as u32), life: self.lives[life].number };
                self.command(Command::Retire { key }, 2);
            }
            Step::ToError(life) => {
                self.lives[life].in_error = true;
                for &qp in &self.lives[life].qps {
                    lock(&self.device).qps[qp].in_error = true;
                }
            }
            Step::Destroy(life) => {
                let (slot, number, half) = self.lives[life].overdue.remove(0);
                if self.plan.rules.destroys {
                    lock(&self.device).destroy(number);
                }
                drop(half);
                self.command(Command::Destroyed { slot }, 3);
            }
            Step::Fence(life) => {
                self.lives[life].fenced = true;
                lock(&self.device).lives[life].may_land = false;
                let key = RailKey { rail: RailId(self.lives[life].rail as u32), life: self.lives[life].number };
                self.command(Command::Fenced { key }, 4 + life as u32);
            }
            Step::Connect(rail) => self.connect(rail),
            Step::GiveUp => {
                self.gave_up = true;
                self.command(Command::Unreachable { peer: PeerId(0), cause: Cause::Unreachable }, 9);
            }
            Step::Cancel => {
                self.plan.cancels -= 1;
                self.work.abandon(SliceError::of(Cause::Cancelled));
            }
        }
    }

    fn key(&self) -> Vec<u32> {
        self.fingerprint()
    }

    fn check(&self) -> Result<(), String> {
        self.broken_law()
    }

    fn is_over(&self) -> bool {
        let core = &self.core;
        let free = core.rails.len() == core.free_rails.len() && core.free_qps.len() == core.qps.len();
        // Who cancels ends what no core has taken, and tells nobody.
        let told = self.finished == 1 || self.work.is_closed();
        self.work.is_terminal() && told && core.works() == 0 && core.outstanding() == 0 && free
    }
}
