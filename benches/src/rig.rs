//! One core with one rail over the [`NullNic`], and a thread that answers its events as control would.

use std::error::Error;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use moonrail_datapath::core::counters::RailCounters;
use moonrail_datapath::core::{
    self, Command, Core, CoreConfig, CoreCounters, CoreEvent, Doorbell, Inbox, Outbox, PollMode, RailKey, RailSpec,
};
use moonrail_datapath::limits::SQ_DEPTH;
use moonrail_datapath::nic::{
    Access, AdminHalf, CompletionQueue, ConnectedQp, CqHandle, InitAttr, Nic, Op, QpCaps, RtrAttr, RtsAttr,
};
use moonrail_datapath::region::{Chunk, ChunkKeys, Memory, Region};
use moonrail_datapath::slice::{Extent, SliceRule, Slices, tile};
use moonrail_datapath::transfer::{Peer, RemoteBuffer, RemoteBuffers, Route};
use moonrail_datapath::units::{
    CoreId, Gid, GidIndex, Lid, Mtu, Nanos, NicId, PeerId, PeerNicId, PortNum, RailId, RemoteAddr, Rkey, RqPsn, SqPsn,
};
use moonrail_datapath::work::{Completion, Work, WorkParts};

use crate::null::NullNic;

/// Of the NIC, which is its own neighbour.
pub(crate) const GID: Gid = Gid([0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 10, 0, 0, 1]);

/// The parts a submitter needs.
pub(crate) struct Rig {
    pub(crate) inboxes: Arc<[Arc<Inbox>]>,
    pub(crate) region: Arc<Region>,
    pub(crate) remote: Arc<RemoteBuffers>,
    pub(crate) counters: Arc<CoreCounters>,
    origin: Instant,
    core: Option<JoinHandle<()>>,
    control: Option<JoinHandle<()>>,
    _admin: AdminHalf,
}

impl Rig {
    /// `bytes` of memory on each side; waits until the rail is proven.
    pub(crate) fn new(bytes: usize, mode: PollMode) -> Result<Self, Box<dyn Error>> {
        let nic: Arc<dyn Nic> = NullNic::new("null0", GID);
        let (cq, handle) = nic.create_cq(4096)?;
        let (post, admin) = connected(nic.as_ref(), &handle)?;
        let region = region(nic.as_ref(), bytes)?;
        let peer = Peer::new(PeerId(0), "peer".into());
        let remote = remote(&peer, bytes);

        let Lone { core, inboxes, outbox, counters } = lone(cq)?;
        let origin = Instant::now();
        let clock = move || Nanos::from_duration(origin.elapsed());
        let body = move || drop(core::run(Box::new(core), mode, &clock, &|_| {}));
        let core = std::thread::Builder::new().name("mr-core-0".into()).spawn(body)?;
        let rail_counters = Arc::new(RailCounters::default());
        let key = RailKey { rail: RailId(0), life: 0 };
        let spec = RailSpec {
            key,
            peer: peer.clone(),
            nic: NicId(0),
            peer_nic: PeerNicId(0),
            counters: rail_counters,
            claims: true,
        };
        if inboxes[0].command(Command::Adopt { rail: spec, qp: post }).is_err() {
            return Err("the core's command ring is full".into());
        }
        let stopped = Arc::new(AtomicBool::new(false));
        let control = std::thread::Builder::new().name("mr-control".into()).spawn({
            let stopped = stopped.clone();
            move || serve(&outbox, &stopped)
        })?;
        let rig =
            Self { inboxes, region, remote, counters, origin, core: Some(core), control: Some(control), _admin: admin };
        let started = Instant::now();
        while peer.routes() == 0 {
            if started.elapsed() > Duration::from_secs(5) {
                return Err("the rail was not proven within 5 s".into());
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(rig)
    }

    pub(crate) fn now(&self) -> Nanos {
        Nanos::from_duration(self.origin.elapsed())
    }
}

/// A core by itself, and what it shares with others.
pub(crate) struct Lone {
    pub(crate) core: Core,
    pub(crate) inboxes: Arc<[Arc<Inbox>]>,
    pub(crate) outbox: Arc<Outbox>,
    pub(crate) counters: Arc<CoreCounters>,
}

/// The only core, with one NIC.
pub(crate) fn lone(cq: Box<dyn CompletionQueue>) -> Result<Lone, Box<dyn Error>> {
    let inboxes: Arc<[Arc<Inbox>]> = vec![Inbox::new(CoreId(0))?].into();
    let outbox = Outbox::new(Arc::new(Doorbell::new()?));
    let counters = Arc::new(CoreCounters::default());
    let core = Core::new(CoreConfig {
        id: CoreId(0),
        inbox: inboxes[0].clone(),
        outbox: outbox.clone(),
        cores: inboxes.clone(),
        nics: vec![(NicId(0), cq)],
        counters: counters.clone(),
    });
    Ok(Lone { core, inboxes, outbox, counters })
}

/// WRITEs of `block` bytes from each of `starts` in our memory to the same place in the peer's, submitted at `now`.
pub(crate) fn work(
    region: &Arc<Region>,
    remote: &Arc<RemoteBuffers>,
    starts: &[u64],
    block: u64,
    now: Nanos,
) -> Result<Arc<Work>, Box<dyn Error>> {
    let chunk = Extent { addr: region.memory().addr(), len: region.memory().len() };
    let near = |addr: u64| (addr.wrapping_sub(chunk.addr) < chunk.len).then_some((0, chunk));
    let mut slices = Slices::with_capacity(starts.len());
    for (transfer, start) in starts.iter().enumerate() {
        let far = RemoteAddr(remote.buffers[0].extent.addr + start);
        let (local, rule) = (chunk.addr + start, SliceRule::default());
        tile(transfer as u32, local, far, block, rule, near, |addr| remote.find(addr), &mut slices)?;
    }
    Ok(Work::new(WorkParts {
        op: Op::Write,
        slices,
        transfers: vec![block; starts.len()].into(),
        local: region.clone(),
        remote: remote.clone(),
        submitted: now,
        deadline: now.plus(Nanos::from_secs(30)),
        cores: 1,
        retries: 9,
        completion: Completion::new(1),
    }))
}

/// A queue pair of `nic` that is ready to send, to itself.
pub(crate) fn connected(nic: &dyn Nic, handle: &CqHandle) -> Result<(ConnectedQp, AdminHalf), Box<dyn Error>> {
    let qp = nic.create_qp(handle, QpCaps { max_send_wr: SQ_DEPTH, max_send_sge: 1, max_inline: 64 })?;
    let rtr = RtrAttr {
        path_mtu: Mtu::B4096,
        dest_qpn: qp.qpn(),
        rq_psn: RqPsn::STOCK,
        max_dest_rd_atomic: 16,
        min_rnr_timer: 12,
        dest_gid: GID,
        dest_lid: Lid(0),
        sgid_index: GidIndex(0),
        hop_limit: 16,
        traffic_class: 0,
        service_level: 0,
        port: PortNum(1),
    };
    let rts = RtsAttr { timeout: 14, retry_cnt: 6, rnr_retry: 7, sq_psn: SqPsn::STOCK, max_rd_atomic: 16 };
    Ok(qp.init(&InitAttr { port: PortNum(1), pkey_index: 0 })?.rtr(&rtr)?.rts(&rts)?.split())
}

/// Memory of ours, registered on `nic` alone.
pub(crate) fn region(nic: &dyn Nic, bytes: usize) -> Result<Arc<Region>, Box<dyn Error>> {
    let memory = Memory::allocate(bytes)?;
    let access = Access { remote: true, relaxed_ordering: false };
    let keys: ChunkKeys = nic.register(&memory, 0, memory.len(), access)?.into();
    let chunk = Chunk { addr: memory.addr(), len: memory.len(), keys: Box::new([Some(keys)]) };
    Ok(Arc::new(Region::new(memory, vec![chunk], "*".into(), true)))
}

/// As much of a peer's, which is not there: the NIC moves nothing.
pub(crate) fn remote(peer: &Arc<Peer>, bytes: usize) -> Arc<RemoteBuffers> {
    let buffer = RemoteBuffer {
        extent: Extent { addr: 1 << 40, len: bytes as u64 },
        rkeys: Box::new([Some(Rkey(1))]),
        open: false,
        location: "*".into(),
    };
    Arc::new(RemoteBuffers::new(peer.clone(), Route::any(), vec![buffer]))
}

/// Drops what is finished and wakes who sleeps on it, as control does.
fn serve(outbox: &Outbox, stopped: &AtomicBool) {
    while !stopped.load(Ordering::Relaxed) {
        let mut idle = true;
        while let Some(event) = outbox.next() {
            idle = false;
            match event {
                CoreEvent::Finished(work) => work.completion().wake(),
                CoreEvent::Stopped => stopped.store(true, Ordering::Relaxed),
                _ => {}
            }
        }
        if idle {
            std::thread::sleep(Duration::from_micros(200));
        }
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        let _ = self.inboxes[0].command(Command::Stop);
        for thread in [self.core.take(), self.control.take()].into_iter().flatten() {
            let _ = thread.join();
        }
    }
}
