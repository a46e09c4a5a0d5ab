//! A bench for the TCP fabric: nodes of one core over one NIC, turned by the test or by a thread, without control.
#![allow(dead_code)] // each test binary uses a part

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use moonrail_datapath::core::counters::RailCounters;
use moonrail_datapath::core::{
    Command, Core, CoreConfig, CoreCounters, CoreEvent, Doorbell, Inbox, Outbox, PollMode, RailKey, RailSpec, dispatch,
};
use moonrail_datapath::error::FirstError;
use moonrail_datapath::limits::SQ_DEPTH;
use moonrail_datapath::nic::tcp::{Ports, TcpNic, TcpOptions};
use moonrail_datapath::nic::{
    Access, AdminHalf, Completion, CompletionQueue, CqHandle, DialError, Nic, Op, PostHalf, QpCaps, Target, TcpVersion,
    WcStatus, WorkRequest, qp,
};
use moonrail_datapath::region::{Chunk, Memory, Region};
use moonrail_datapath::slice::{Extent, SliceRule, Slices, find_extent, tile};
use moonrail_datapath::transfer::{Peer, RemoteBuffer, RemoteBuffers, Route};
use moonrail_datapath::units::{CoreId, Lkey, Nanos, NicId, PeerId, PeerNicId, RailId, RemoteAddr, Rkey, WrId};
use moonrail_datapath::work::{Completion as Done, Work, WorkParts};

/// Longest wait of a test for anything.
pub(crate) const LIMIT: Duration = Duration::from_secs(20);

pub(crate) fn options() -> TcpOptions {
    TcpOptions { ports: Ports::Fixed(0), ..TcpOptions::default() }
}

pub(crate) fn nanos(span: Duration) -> Nanos {
    Nanos::from_duration(span)
}

/// A NIC whose queues are polled by threads until it is dropped: a node that only serves.
pub(crate) struct Server {
    pub(crate) nic: Arc<TcpNic>,
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Server {
    pub(crate) fn new(options: TcpOptions, cores: usize) -> Self {
        let nic = TcpNic::open(options).unwrap();
        let stop = Arc::new(AtomicBool::new(false));
        let core = |_| {
            let (mut cq, _) = nic.create_cq(4096).unwrap();
            let stop = stop.clone();
            std::thread::spawn(move || {
                let mut out = [Completion::EMPTY; 64];
                while !stop.load(Ordering::Relaxed) {
                    cq.poll(&mut out).unwrap();
                    if cq.served() == 0 {
                        std::thread::yield_now();
                    }
                }
            })
        };
        let threads = (0..cores).map(core).collect();
        Self { nic, stop, threads }
    }

    pub(crate) fn target(&self, version: TcpVersion) -> Target {
        Target::Tcp { host: "127.0.0.1".into(), port: self.nic.port(), version }
    }

    pub(crate) fn memory(&self, len: usize) -> Shared {
        Shared::new(self.nic.as_ref(), len)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        self.threads.drain(..).for_each(|thread| thread.join().unwrap());
    }
}

/// Memory registered for peers.
pub(crate) struct Shared {
    pub(crate) memory: Arc<Memory>,
    pub(crate) registration: Option<moonrail_datapath::nic::Registration>,
}

impl Shared {
    pub(crate) fn new(nic: &dyn Nic, len: usize) -> Self {
        let memory = Memory::allocate(len).unwrap();
        let access = Access { remote: true, relaxed_ordering: false };
        let registration = Some(nic.register(&memory, 0, len as u64, access).unwrap());
        Self { memory, registration }
    }

    pub(crate) fn bytes(&self) -> Vec<u8> {
        self.range(0, self.memory.len() as usize)
    }

    pub(crate) fn range(&self, offset: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory.read(offset, &mut bytes).unwrap();
        bytes
    }
}

/// Lanes posted to by hand: what a core would do, without a core.
pub(crate) struct Client {
    pub(crate) nic: Arc<TcpNic>,
    pub(crate) cq: Box<dyn CompletionQueue>,
    pub(crate) handle: CqHandle,
    pub(crate) done: Vec<Completion>,
    next: u32,
}

impl Client {
    pub(crate) fn new(options: TcpOptions) -> Self {
        let nic = TcpNic::open(options).unwrap();
        let (cq, handle) = nic.create_cq(4096).unwrap();
        Self { nic, cq, handle, done: Vec::with_capacity(1 << 16), next: 0 }
    }

    pub(crate) fn dial(&self, to: &Target) -> Result<(PostHalf, AdminHalf), DialError> {
        let caps = QpCaps { max_send_wr: SQ_DEPTH, max_send_sge: 1, max_inline: 64 };
        let (qp, admin) = self.nic.dial(&self.handle, caps, to, Instant::now() + LIMIT)?;
        Ok((qp.into_post_half(), admin))
    }

    pub(crate) fn request(&mut self, op: Op, local: &Memory, at: u64, remote: u64, len: u32) -> WorkRequest {
        let sequence = self.next;
        self.next += 1;
        WorkRequest {
            wr_id: WrId { slot: 0, generation: 0, sequence },
            op,
            local: local.addr() + at,
            lkey: Lkey(0),
            len,
            remote: RemoteAddr(remote),
            rkey: Rkey(0),
            signaled: true,
            inline: false,
        }
    }

    pub(crate) fn poll(&mut self) {
        let mut out = [Completion::EMPTY; 64];
        let got = self.cq.poll(&mut out).unwrap();
        self.cq.served();
        self.done.extend_from_slice(&out[..got]);
    }

    /// Polls until there are `count` completions, or for `most`; takes them.
    pub(crate) fn wait_for(&mut self, count: usize, most: Duration) -> Vec<(u32, WcStatus)> {
        let until = Instant::now() + most;
        while self.done.len() < count && Instant::now() < until {
            self.poll();
            std::thread::yield_now();
        }
        self.done.drain(..).map(|c| (c.wr_id.sequence, c.status)).collect()
    }

    pub(crate) fn wait(&mut self, count: usize) -> Vec<(u32, WcStatus)> {
        let done = self.wait_for(count, LIMIT);
        assert!(done.len() >= count, "{} of {count} completions within {LIMIT:?}", done.len());
        done
    }
}

/// Whether all of them succeeded, in order of their numbers.
pub(crate) fn all_good(done: &[(u32, WcStatus)]) -> bool {
    done.iter().all(|d| d.1 == WcStatus::SUCCESS) && done.is_sorted_by_key(|d| d.0)
}

/// Bytes that depend on where they are and on the round.
pub(crate) fn pattern(len: usize, round: u64) -> Vec<u8> {
    (0..len as u64).map(|i| (i.wrapping_mul(0x9e37_79b9) >> 7 ^ round.wrapping_mul(31)) as u8).collect()
}

struct Life {
    key: RailKey,
    ours: Vec<AdminHalf>,
    drained: Vec<PostHalf>,
    failed: bool,
}

/// A node with a real core that the test turns, and what control would do about its events.
pub(crate) struct Node {
    pub(crate) nic: Arc<TcpNic>,
    pub(crate) core: Box<Core>,
    pub(crate) inboxes: Arc<[Arc<Inbox>]>,
    outbox: Arc<Outbox>,
    handle: CqHandle,
    pub(crate) peer: Arc<Peer>,
    pub(crate) counters: Arc<CoreCounters>,
    rail_counters: Arc<RailCounters>,
    lives: Vec<Life>,
    started: Instant,
    pub(crate) first_errors: Vec<FirstError>,
    pub(crate) needs_fence: usize,
    pub(crate) overdue: usize,
    pub(crate) finished: usize,
}

impl Node {
    pub(crate) fn new(options: TcpOptions) -> Self {
        let nic = TcpNic::open(options).unwrap();
        let (cq, handle) = nic.create_cq(4096).unwrap();
        let inboxes: Arc<[Arc<Inbox>]> = Arc::new([Inbox::new(CoreId(0)).unwrap()]);
        let outbox = Outbox::new(Arc::new(Doorbell::new().unwrap()));
        let counters = Arc::<CoreCounters>::default();
        let core = Box::new(Core::new(CoreConfig {
            id: CoreId(0),
            inbox: inboxes[0].clone(),
            outbox: outbox.clone(),
            cores: inboxes.clone(),
            nics: vec![(NicId(0), cq)],
            counters: counters.clone(),
        }));
        Self {
            nic,
            core,
            inboxes,
            outbox,
            handle,
            peer: Peer::new(PeerId(0), "b".into()),
            counters,
            rail_counters: Arc::default(),
            lives: vec![],
            started: Instant::now(),
            first_errors: vec![],
            needs_fence: 0,
            overdue: 0,
            finished: 0,
        }
    }

    pub(crate) fn now(&self) -> Nanos {
        nanos(self.started.elapsed()).plus(Nanos::from_millis(1))
    }

    /// Dials `lanes` lanes of one rail.
    pub(crate) fn connect(&mut self, to: &Target, lanes: usize) -> Result<(), DialError> {
        let key = RailKey { rail: RailId(0), life: self.lives.len() as u32 };
        let mut life = Life { key, ours: vec![], drained: vec![], failed: false };
        for _ in 0..lanes {
            let caps = QpCaps { max_send_wr: SQ_DEPTH, max_send_sge: 1, max_inline: 64 };
            let (qp, admin) = self.nic.dial(&self.handle, caps, to, Instant::now() + LIMIT)?;
            life.ours.push(admin);
            let rail = RailSpec {
                key,
                peer: self.peer.clone(),
                nic: NicId(0),
                peer_nic: PeerNicId(0),
                counters: self.rail_counters.clone(),
                claims: true,
            };
            self.inboxes[0].command(Command::Adopt { rail, qp }).ok().unwrap();
        }
        self.lives.push(life);
        Ok(())
    }

    pub(crate) fn region(&self, len: usize) -> Arc<Region> {
        let memory = Memory::allocate(len).unwrap();
        let access = Access { remote: true, relaxed_ordering: false };
        let keys = Box::new([Some(self.nic.register(&memory, 0, len as u64, access).unwrap().into())]);
        let chunk = Chunk { addr: memory.addr(), len: memory.len(), keys };
        Arc::new(Region::new(memory, vec![chunk], "cpu:0".into(), true))
    }

    /// A peer's memory, by its address.
    pub(crate) fn remote(&self, addr: u64, len: u64) -> Arc<RemoteBuffers> {
        let buffer = RemoteBuffer {
            extent: Extent { addr, len },
            rkeys: Box::new([Some(Rkey(0))]),
            open: true,
            location: "cpu:0".into(),
        };
        Arc::new(RemoteBuffers::new(self.peer.clone(), Route::any(), vec![buffer]))
    }

    pub(crate) fn submit(
        &self,
        op: Op,
        local: &Arc<Region>,
        remote: &Arc<RemoteBuffers>,
        parts: &[(u64, u64, u64)],
    ) -> Arc<Work> {
        let work = self.work(op, local, remote, parts);
        dispatch(work.clone(), &self.inboxes).ok().expect("rings have room");
        work
    }

    /// A Work of one transfer per (local offset, remote offset, length).
    pub(crate) fn work(
        &self,
        op: Op,
        local: &Arc<Region>,
        remote: &Arc<RemoteBuffers>,
        parts: &[(u64, u64, u64)],
    ) -> Arc<Work> {
        let mut slices = Slices::new();
        let near: Vec<Extent> = local.chunks().iter().map(|c| Extent { addr: c.addr, len: c.len }).collect();
        for (index, &(from, to, len)) in parts.iter().enumerate() {
            let base = RemoteAddr(remote.buffers[0].extent.addr + to);
            let at = near[0].addr + from;
            let rule = SliceRule::default();
            tile(index as u32, at, base, len, rule, |a| find_extent(&near, a), |a| remote.find(a), &mut slices)
                .unwrap();
        }
        Work::new(WorkParts {
            op,
            slices,
            transfers: parts.iter().map(|p| p.2).collect(),
            local: local.clone(),
            remote: remote.clone(),
            submitted: self.now(),
            deadline: self.now().plus(Nanos::from_secs(30)),
            cores: 1,
            retries: 9,
            completion: Done::new(1),
        })
    }

    /// Gives the core to a thread of its own that sleeps when there is nothing to do.
    pub(crate) fn run(mut self) -> JoinHandle<Self> {
        let started = self.started;
        std::thread::spawn(move || {
            let clock = || nanos(started.elapsed()).plus(Nanos::from_millis(1));
            self.core = moonrail_datapath::core::run(self.core, PollMode::default(), &clock, &|_| {});
            self
        })
    }

    pub(crate) fn turn(&mut self) -> usize {
        let did = self.core.poll_once(self.now());
        while let Some(event) = self.outbox.next() {
            self.answer(event);
        }
        did
    }

    fn answer(&mut self, event: CoreEvent) {
        match event {
            CoreEvent::FirstError { key, error } => {
                self.first_errors.push(error);
                if let Some(life) = self.lives.iter_mut().find(|l| l.key == key) {
                    life.failed = true;
                    life.ours.iter_mut().for_each(|qp| qp.to_error().unwrap());
                }
            }
            CoreEvent::Drained { key, qp, needs_fence, .. } => {
                self.needs_fence += usize::from(needs_fence);
                let Some(life) = self.lives.iter_mut().find(|l| l.key == key) else { return };
                life.drained.push(qp);
                if life.drained.len() == life.ours.len() {
                    for post in life.drained.drain(..) {
                        let at = life.ours.iter().position(|admin| admin.qpn() == post.qpn()).unwrap();
                        qp::destroy(life.ours.swap_remove(at), post).ok().unwrap();
                    }
                }
            }
            CoreEvent::Overdue { slot, qp, .. } => {
                self.overdue += 1;
                drop(qp);
                self.inboxes[0].command(Command::Destroyed { slot }).ok().unwrap();
            }
            CoreEvent::Finished(work) => {
                work.completion().wake();
                self.finished += 1;
            }
            _ => {}
        }
    }

    /// Whether the newest life has failed and its lanes are gone.
    pub(crate) fn needs_repair(&self) -> bool {
        self.lives.last().is_none_or(|l| l.failed && l.ours.is_empty())
    }

    /// Retires the newest life, as control does when it no longer needs the rail.
    pub(crate) fn retire(&mut self) {
        let Some(life) = self.lives.last_mut() else { return };
        life.ours.iter_mut().for_each(|qp| qp.to_error().unwrap());
        self.inboxes[0].command(Command::Retire { key: life.key }).ok().unwrap();
    }

    pub(crate) fn run_until(&mut self, limit: Duration, mut done: impl FnMut(&mut Self) -> bool) -> bool {
        let until = Instant::now() + limit;
        while Instant::now() < until {
            if done(self) {
                return true;
            }
            if self.turn() == 0 {
                std::thread::yield_now();
            }
        }
        done(self)
    }

    /// Turns until the Work is terminal.
    pub(crate) fn finish(&mut self, work: &Arc<Work>) -> bool {
        self.run_until(LIMIT, |_| work.is_terminal())
    }
}
