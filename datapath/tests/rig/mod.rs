//! A bench for cores without control: two simulated nodes, rails connected by hand, events answered as control would.
#![allow(dead_code)] // each test binary uses a part

use std::sync::Arc;

use moonrail_datapath::core::counters::RailCounters;
use moonrail_datapath::core::{
    Command, Core, CoreConfig, CoreCounters, CoreEvent, Doorbell, Inbox, Outbox, RailKey, RailSpec, dispatch,
};
use moonrail_datapath::limits::SQ_DEPTH;
use moonrail_datapath::nic::sim::{SimNicId, SimOptions, SimWorld};
use moonrail_datapath::nic::{
    Access, AdminHalf, ConnectedQp, CqHandle, InitAttr, Nic, Op, PostHalf, Qp, QpCaps, RtrAttr, RtsAttr, qp,
};
use moonrail_datapath::region::{Chunk, Memory, Region};
use moonrail_datapath::slice::{Extent, SliceRule, Slices, find_extent, tile};
use moonrail_datapath::transfer::{Peer, RemoteBuffer, RemoteBuffers, Route};
use moonrail_datapath::units::{
    CoreId, Gid, GidIndex, Lid, Mtu, Nanos, NicId, PeerId, PeerNicId, PortNum, RailId, RemoteAddr, RqPsn, SqPsn,
};
use moonrail_datapath::work::{Completion, Work, WorkParts};

pub(crate) struct End {
    pub(crate) nic: Arc<dyn Nic>,
    pub(crate) id: SimNicId,
    pub(crate) gid: Gid,
}

/// One life of a rail as control keeps it: our halves, and the peer's end.
struct Life {
    key: RailKey,
    core: usize,
    nic: NicId,
    ours: Vec<AdminHalf>,
    theirs: Vec<(AdminHalf, PostHalf)>,
    drained: Vec<PostHalf>,
    failed: bool,
    proven: bool,
}

pub(crate) struct Rig {
    pub(crate) world: SimWorld,
    pub(crate) now: Nanos,
    pub(crate) cores: Vec<Core>,
    pub(crate) inboxes: Arc<[Arc<Inbox>]>,
    pub(crate) outboxes: Vec<Arc<Outbox>>,
    /// Control's: rung by the cores.
    pub(crate) doorbell: Arc<Doorbell>,
    pub(crate) near: Vec<End>,
    pub(crate) far: Vec<End>,
    near_cqs: Vec<Vec<CqHandle>>,
    far_cqs: Vec<CqHandle>,
    pub(crate) peer: Arc<Peer>,
    lives: Vec<Life>,
    pub(crate) first_errors: Vec<moonrail_datapath::error::FirstError>,
    pub(crate) finished: Vec<Arc<Work>>,
    pub(crate) stopped: usize,
    pub(crate) wanted: usize,
    /// Completion queues that the cores gave up.
    pub(crate) lost: usize,
    /// What the cores gave back for [`Command::Yield`], and how often they did not.
    pub(crate) yielded: Vec<ConnectedQp>,
    pub(crate) in_use: usize,
    /// Of the Works made from here on.
    pub(crate) retries: u8,
    /// From now on, of the Works made from here on.
    pub(crate) deadline: Nanos,
    pub(crate) rule: SliceRule,
    /// Whether drained lives are fenced by themselves, as control does when the peer answered.
    pub(crate) auto_fence: bool,
    /// How long after the drain.
    pub(crate) fence_delay: Nanos,
    fences: Vec<(Nanos, usize, RailKey)>,
    pub(crate) counters: Vec<Arc<CoreCounters>>,
    /// By rail: near NIC × far NICs + far NIC.
    pub(crate) rail_counters: Vec<Arc<RailCounters>>,
}

fn gid(node: u8, nic: u8) -> Gid {
    let mut bytes = [0; 16];
    (bytes[10], bytes[11], bytes[12], bytes[14], bytes[15]) = (0xff, 0xff, 10, nic, node);
    Gid(bytes)
}

fn bring_up(qp: Qp<qp::Reset>, to: &Qp<qp::Reset>, gid: Gid, rq: SqPsn, sq: SqPsn, mtu: Mtu) -> RtsQp {
    let rtr = RtrAttr {
        path_mtu: mtu,
        dest_qpn: to.qpn(),
        rq_psn: RqPsn::from_peer(rq),
        max_dest_rd_atomic: 16,
        min_rnr_timer: 12,
        dest_gid: gid,
        dest_lid: Lid(0),
        sgid_index: GidIndex(1),
        hop_limit: 16,
        traffic_class: 0,
        service_level: 0,
        port: PortNum(1),
    };
    RtsQp { qp, rtr, sq }
}

struct RtsQp {
    qp: Qp<qp::Reset>,
    rtr: RtrAttr,
    sq: SqPsn,
}

impl RtsQp {
    fn connect(self) -> (ConnectedQp, AdminHalf) {
        let init = self.qp.init(&InitAttr { port: PortNum(1), pkey_index: 0 }).unwrap();
        let rtr = init.rtr(&self.rtr).unwrap();
        let rts = RtsAttr { timeout: 14, retry_cnt: 6, rnr_retry: 7, sq_psn: self.sq, max_rd_atomic: 16 };
        rtr.rts(&rts).unwrap().split()
    }
}

impl Rig {
    /// `nics` NICs on each of two nodes, `cores` cores on the near one, each polling every NIC.
    pub(crate) fn new(seed: u64, nics: u8, cores: u16, options: SimOptions) -> Self {
        let world = SimWorld::new(seed, options);
        let ends = |node: u8, name: &str| -> Vec<End> {
            let end = |n| {
                let (nic, id) = world.nic(name, &format!("{name}{n}"), gid(node, n));
                End { nic, id, gid: gid(node, n) }
            };
            (0..nics).map(end).collect()
        };
        let (near, far) = (ends(1, "a"), ends(2, "b"));
        let inboxes: Arc<[Arc<Inbox>]> = (0..cores).map(|c| Inbox::new(CoreId(c)).unwrap()).collect();
        let doorbell = Arc::new(Doorbell::new().unwrap());
        let mut rig = Self {
            far_cqs: far.iter().map(|e| e.nic.create_cq(16).unwrap().1).collect(),
            world,
            now: Nanos::from_millis(1),
            cores: vec![],
            inboxes: inboxes.clone(),
            outboxes: vec![],
            doorbell: doorbell.clone(),
            near,
            far,
            near_cqs: vec![],
            peer: Peer::new(PeerId(0), "b".into()),
            lives: vec![],
            first_errors: Vec::with_capacity(1 << 12),
            finished: Vec::with_capacity(1 << 16),
            stopped: 0,
            wanted: 0,
            lost: 0,
            yielded: vec![],
            in_use: 0,
            retries: 9,
            deadline: Nanos::from_secs(30),
            rule: SliceRule::default(),
            auto_fence: true,
            fence_delay: Nanos::ZERO,
            fences: Vec::with_capacity(1 << 10),
            counters: vec![],
            rail_counters: (0..usize::from(nics) * usize::from(nics)).map(|_| Arc::default()).collect(),
        };
        for core in 0..cores {
            let (mut queues, mut handles) = (vec![], vec![]);
            for (index, end) in rig.near.iter().enumerate() {
                let (cq, handle) = end.nic.create_cq(4096).unwrap();
                queues.push((NicId(index as u16), cq));
                handles.push(handle);
            }
            let outbox = Outbox::new(doorbell.clone());
            let counters = Arc::<CoreCounters>::default();
            rig.cores.push(Core::new(CoreConfig {
                id: CoreId(core),
                inbox: inboxes[usize::from(core)].clone(),
                outbox: outbox.clone(),
                cores: inboxes.clone(),
                nics: queues,
                counters: counters.clone(),
            }));
            rig.outboxes.push(outbox);
            rig.near_cqs.push(handles);
            rig.counters.push(counters);
        }
        rig
    }

    /// Connects near NIC `a` with far NIC `b` by `qps` queue pairs and hands them to `core`.
    pub(crate) fn connect(&mut self, core: usize, a: usize, b: usize, qps: usize) -> RailKey {
        let rail = RailId((a * self.far.len() + b) as u32);
        let life = self.lives.iter().filter(|l| l.key.rail == rail).count() as u32;
        let key = RailKey { rail, life };
        let caps = QpCaps { max_send_wr: SQ_DEPTH, max_send_sge: 1, max_inline: 64 };
        let mut life = Life {
            key,
            core,
            nic: NicId(a as u16),
            ours: vec![],
            theirs: vec![],
            drained: vec![],
            failed: false,
            proven: false,
        };
        for n in 0..qps as u32 {
            let ours = self.near[a].nic.create_qp(&self.near_cqs[core][a], caps).unwrap();
            let theirs = self.far[b].nic.create_qp(&self.far_cqs[b], caps).unwrap();
            let (psn_a, psn_b) = (SqPsn::new(1000 + n).unwrap(), SqPsn::new(7000 + n).unwrap());
            let mtu = Mtu::B4096;
            let (far_gid, near_gid) = (self.far[b].gid, self.near[a].gid);
            let (our_qpn, their_qpn) = (ours.qpn(), theirs.qpn());
            let mut our_plan = bring_up(ours, &theirs, far_gid, psn_b, psn_a, mtu);
            our_plan.rtr.dest_qpn = their_qpn;
            let their_plan = RtsQp {
                qp: theirs,
                rtr: RtrAttr { dest_qpn: our_qpn, rq_psn: RqPsn::from_peer(psn_a), dest_gid: near_gid, ..our_plan.rtr },
                sq: psn_b,
            };
            let (their_qp, their_admin) = their_plan.connect();
            let (qp, admin) = our_plan.connect();
            life.ours.push(admin);
            life.theirs.push((their_admin, their_qp.into_post_half()));
            let rail = RailSpec {
                key,
                peer: self.peer.clone(),
                nic: NicId(a as u16),
                peer_nic: PeerNicId(b as u16),
                counters: self.rail_counters[rail.0 as usize].clone(),
                claims: true,
            };
            self.inboxes[core].command(Command::Adopt { rail, qp }).ok().unwrap();
        }
        self.lives.push(life);
        key
    }

    /// Registers `len` bytes on every NIC of one node.
    pub(crate) fn region(ends: &[End], len: usize) -> Arc<Region> {
        let memory = Memory::allocate(len).unwrap();
        let access = Access { remote: true, relaxed_ordering: false };
        let keys = ends.iter().map(|e| Some(e.nic.register(&memory, 0, len as u64, access).unwrap().into())).collect();
        let chunk = Chunk { addr: memory.addr(), len: memory.len(), keys };
        Arc::new(Region::new(memory, vec![chunk], "cpu:0".into(), true))
    }

    pub(crate) fn remote(&self, region: &Region) -> Arc<RemoteBuffers> {
        let buffer = |c: &Chunk| RemoteBuffer {
            extent: Extent { addr: c.addr, len: c.len },
            rkeys: c.keys.iter().map(|k| k.as_ref().map(|k| k.rkey)).collect(),
            open: true,
            location: region.location().into(),
        };
        Arc::new(RemoteBuffers::new(self.peer.clone(), Route::any(), region.chunks().iter().map(buffer).collect()))
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
            let rule = self.rule;
            let local_addr = near[0].addr + from;
            tile(index as u32, local_addr, base, len, rule, |a| find_extent(&near, a), |a| remote.find(a), &mut slices)
                .unwrap();
        }
        Work::new(WorkParts {
            op,
            slices,
            transfers: parts.iter().map(|p| p.2).collect(),
            local: local.clone(),
            remote: remote.clone(),
            submitted: self.now,
            deadline: self.now.plus(self.deadline),
            cores: self.cores.len() as u16,
            retries: self.retries,
            completion: Completion::new(1),
        })
    }

    pub(crate) fn submit(&self, work: &Arc<Work>) {
        dispatch(work.clone(), &self.inboxes).ok().expect("rings have room");
    }

    /// One turn of every core at the same instant, then what control does with their events.
    pub(crate) fn turn(&mut self, step: Nanos) -> usize {
        self.now = self.now.plus(step);
        self.world.advance(self.now);
        let done = self.cores.iter_mut().map(|c| c.poll_once(self.now)).sum();
        self.answer_all();
        done
    }

    /// What control does between turns.
    pub(crate) fn answer_all(&mut self) {
        for core in 0..self.outboxes.len() {
            while let Some(event) = self.outboxes[core].next() {
                self.answer(core, event);
            }
        }
        while let Some(due) = self.fences.iter().position(|f| f.0 <= self.now) {
            let (_, core, key) = self.fences.swap_remove(due);
            self.fence(core, key);
        }
    }

    /// What control does: move failed lives to ERR, collect what drained, destroy, fence.
    fn answer(&mut self, core: usize, event: CoreEvent) {
        match event {
            CoreEvent::FirstError { key, error } => {
                self.first_errors.push(error);
                if let Some(life) = self.lives.iter_mut().find(|l| l.key == key) {
                    life.failed = true;
                    life.ours.iter_mut().for_each(|qp| qp.to_error().unwrap());
                }
            }
            CoreEvent::Drained { key, qp, .. } => {
                let Some(life) = self.lives.iter_mut().find(|l| l.key == key) else { return };
                life.drained.push(qp);
                if life.drained.len() == life.ours.len() && self.auto_fence {
                    self.fences.push((self.now.plus(self.fence_delay), core, key));
                }
            }
            CoreEvent::Proven { key } => {
                if let Some(life) = self.lives.iter_mut().find(|l| l.key == key) {
                    life.proven = true;
                }
            }
            CoreEvent::Wanted { .. } => self.wanted += 1,
            CoreEvent::Yielded { qp, .. } => self.yielded.push(qp),
            CoreEvent::InUse { .. } => self.in_use += 1,
            CoreEvent::Finished(work) => {
                work.completion().wake();
                self.finished.push(work);
            }
            CoreEvent::CqLost { nic } => {
                self.lost += 1;
                for life in self.lives.iter_mut().filter(|l| (l.core, l.nic) == (core, nic)) {
                    life.failed = true;
                    life.ours.iter_mut().for_each(|qp| qp.to_error().unwrap());
                }
            }
            CoreEvent::Overdue { key, slot, qp: post } => {
                let Some(life) = self.lives.iter_mut().find(|l| l.key == key) else { return };
                let at = life.ours.iter().position(|admin| admin.qpn() == post.qpn()).expect("one of its own");
                assert!(qp::destroy(life.ours.remove(at), post).is_ok());
                self.inboxes[core].command(Command::Destroyed { slot }).ok().unwrap();
                if life.ours.is_empty() && self.auto_fence {
                    self.fences.push((self.now.plus(self.fence_delay), core, key));
                }
            }
            CoreEvent::Released(_) => {}
            CoreEvent::Stopped => self.stopped += 1,
        }
    }

    /// The peer's end of a life is retired: nothing can land any more.
    pub(crate) fn fence(&mut self, core: usize, key: RailKey) {
        if let Some(life) = self.lives.iter_mut().find(|l| l.key == key) {
            life.theirs.clear();
            for (admin, post) in life.ours.drain(..).zip(life.drained.drain(..)) {
                // Halves drain in any order.
                let _ = qp::destroy(admin, post);
            }
        }
        self.inboxes[core].command(Command::Fenced { key }).ok().unwrap();
    }

    pub(crate) fn retire(&mut self, core: usize, key: RailKey) {
        if let Some(life) = self.lives.iter_mut().find(|l| l.key == key) {
            life.ours.iter_mut().for_each(|qp| qp.to_error().unwrap());
        }
        self.inboxes[core].command(Command::Retire { key }).ok().unwrap();
    }

    /// Whether the rail's newest life has failed and was taken down.
    pub(crate) fn needs_repair(&self, rail: RailId) -> bool {
        self.lives.iter().rfind(|l| l.key.rail == rail).is_some_and(|l| l.failed && l.ours.is_empty())
    }

    pub(crate) fn is_proven(&self, key: RailKey) -> bool {
        self.lives.iter().any(|l| l.key == key && l.proven)
    }

    /// Turns until `done`, in steps of one microsecond, at most `limit` of virtual time.
    pub(crate) fn run_until(&mut self, limit: Nanos, mut done: impl FnMut(&Self) -> bool) -> bool {
        let end = self.now.plus(limit);
        while self.now < end {
            if done(self) {
                return true;
            }
            let idle = self.turn(Nanos::from_micros(1)) == 0;
            if idle {
                // Nothing to do: on to the next event, or the next millisecond's watch.
                let watch = self.now.plus(Nanos::from_millis(1));
                self.now = self.world.next_event().map_or(watch, |at| at.min(watch)).max(self.now);
            }
        }
        done(self)
    }
}

/// Bytes that depend on where they are and on the round.
pub(crate) fn pattern(len: usize, round: u64) -> Vec<u8> {
    (0..len as u64).map(|i| (i.wrapping_mul(0x9e37_79b9) >> 7 ^ round.wrapping_mul(31)) as u8).collect()
}

pub(crate) fn bytes(region: &Region) -> Vec<u8> {
    let mut bytes = vec![0; region.memory().len() as usize];
    region.memory().read(0, &mut bytes).unwrap();
    bytes
}
