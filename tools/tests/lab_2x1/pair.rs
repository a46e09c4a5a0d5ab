//! One queue pair, its completion queue and a registered region, connected to the same on the other node.

use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use mio::unix::SourceFd;
use moonrail_datapath::nic::verbs::VerbsNic;
use moonrail_datapath::nic::{
    Access, AdminHalf, Completion, CompletionQueue, CqHandle, GidEntry, InitAttr, ModifyError, Nic, Op, PostHalf, Qp,
    QpCaps, Registration, RtrAttr, RtsAttr, WorkRequest, qp,
};
use moonrail_datapath::region::Memory;
use moonrail_datapath::units::{Gid, Lid, Mtu, PortNum, Qpn, RemoteAddr, Rkey, RqPsn, SqPsn, WrId};

use crate::lab_support::{LIMIT, Lab};

pub(crate) const CAPS: QpCaps = QpCaps { max_send_wr: 128, max_send_sge: 1, max_inline: 64 };
pub(crate) const ACCESS: Access = Access { remote: true, relaxed_ordering: false };

pub(crate) fn open() -> Arc<VerbsNic> {
    VerbsNic::open("rxe0", PortNum(1)).unwrap_or_else(|e| panic!("{e}"))
}

/// What tests vary.
#[derive(Clone, Copy)]
pub(crate) struct Options {
    pub(crate) mtu: Mtu,
    pub(crate) psn: SqPsn,
    pub(crate) region: usize,
}

impl Default for Options {
    fn default() -> Self {
        Self { mtu: Mtu::B4096, psn: SqPsn::STOCK, region: 1 << 20 }
    }
}

/// Where the other end is.
#[derive(Clone, Copy)]
struct End {
    gid: Gid,
    qpn: Qpn,
    psn: u32,
    addr: u64,
    rkey: u32,
}

impl End {
    fn text(&self) -> String {
        format!("{} {} {} {} {}", self.gid, self.qpn, self.psn, self.addr, self.rkey)
    }

    fn parse(text: &str) -> Option<Self> {
        let mut words = text.split_whitespace();
        Some(Self {
            gid: words.next()?.parse().ok()?,
            qpn: Qpn::new(words.next()?.parse().ok()?)?,
            psn: words.next()?.parse().ok()?,
            addr: words.next()?.parse().ok()?,
            rkey: words.next()?.parse().ok()?,
        })
    }
}

pub(crate) struct Pair {
    pub(crate) nic: Arc<VerbsNic>,
    pub(crate) cq: Box<dyn CompletionQueue>,
    pub(crate) handle: CqHandle,
    pub(crate) post: PostHalf,
    pub(crate) admin: AdminHalf,
    pub(crate) memory: Arc<Memory>,
    pub(crate) registration: Registration,
    peer: End,
}

impl Pair {
    /// Connects to the other node, which calls this with the same `name`.
    pub(crate) fn connect(lab: &Lab, name: &str, options: Options) -> Self {
        Self::make(options, |own| End::parse(&lab.exchange(name, &own.text())).expect("an end"))
    }

    /// Reaches RTS towards a queue pair that does not exist: nothing is ever answered.
    pub(crate) fn to_nowhere() -> Self {
        Self::make(Options::default(), |own| End { qpn: Qpn::new(0x00fe_dcba).unwrap(), ..own })
    }

    fn make(options: Options, meet: impl FnOnce(End) -> End) -> Self {
        let nic = open();
        let (cq, handle) = nic.create_cq(512).unwrap();
        let memory = Memory::allocate(options.region).unwrap();
        let registration = nic.register(&memory, 0, memory.len(), ACCESS).unwrap();
        let fresh = nic.create_qp(&handle, CAPS).unwrap();
        let own = End {
            gid: ipv4_gid(&nic).gid,
            qpn: fresh.qpn(),
            psn: options.psn.get(),
            addr: memory.addr(),
            rkey: registration.rkey.0,
        };
        let peer = meet(own);
        let (connected, admin) = to_rts(fresh, &nic, peer, &options).unwrap_or_else(|e| panic!("{e}")).split();
        Self { nic, cq, handle, post: connected.into_post_half(), admin, memory, registration, peer }
    }

    /// A signalled request between `local` and `remote`, both offsets into the regions.
    pub(crate) fn request(&self, op: Op, sequence: u32, local: u64, remote: u64, len: u32) -> WorkRequest {
        WorkRequest {
            wr_id: WrId { slot: 3, generation: 4, sequence },
            op,
            local: self.memory.addr() + local,
            lkey: self.registration.lkey,
            len,
            remote: RemoteAddr(self.peer.addr + remote),
            rkey: Rkey(self.peer.rkey),
            signaled: true,
            inline: false,
        }
    }

    /// Whether the completion queue's descriptor becomes readable within `limit`.
    pub(crate) fn woken(&self, limit: Duration) -> bool {
        readable(&self.cq.event_fd().expect("a verbs queue has a descriptor"), limit)
    }

    /// Looks a little longer: no completion beyond those that were taken.
    pub(crate) fn nothing_more(&mut self) {
        std::thread::sleep(Duration::from_millis(100));
        let mut more = [Completion::EMPTY; 4];
        assert_eq!(self.cq.poll(&mut more).unwrap(), 0, "{more:?}");
    }
}

/// Tries to reach `gid`.
pub(crate) fn try_connect(nic: &Arc<VerbsNic>, gid: Gid) -> Result<(), ModifyError> {
    let (_cq, handle) = nic.create_cq(64).unwrap();
    let fresh = nic.create_qp(&handle, CAPS).unwrap();
    let peer = End { gid, qpn: Qpn::new(17).unwrap(), psn: 0, addr: 0, rkey: 0 };
    to_rts(fresh, nic, peer, &Options::default()).map(|_| ())
}

fn to_rts(fresh: Qp<qp::Reset>, nic: &VerbsNic, peer: End, options: &Options) -> Result<Qp<qp::Rts>, ModifyError> {
    let port = nic.port_num();
    fresh
        .init(&InitAttr { port, pkey_index: 0 })?
        .rtr(&RtrAttr {
            path_mtu: options.mtu,
            dest_qpn: peer.qpn,
            rq_psn: RqPsn::new(peer.psn).unwrap(),
            max_dest_rd_atomic: 16,
            min_rnr_timer: 12,
            dest_gid: peer.gid,
            dest_lid: Lid(0),
            sgid_index: ipv4_gid(nic).index,
            hop_limit: 16,
            traffic_class: 0,
            service_level: 0,
            port,
        })?
        .rts(&RtsAttr { timeout: 14, retry_cnt: 6, rnr_retry: 7, sq_psn: options.psn, max_rd_atomic: 16 })
}

fn ipv4_gid(nic: &VerbsNic) -> GidEntry {
    nic.gids().unwrap().into_iter().find(|g| g.gid.to_ipv4().is_some()).expect("a GID of the IPv4 address")
}

/// Polls until exactly `n` completions came.
pub(crate) fn take(cq: &mut dyn CompletionQueue, n: usize) -> Vec<Completion> {
    let until = Instant::now() + LIMIT;
    let mut seen = vec![Completion::EMPTY; n];
    let mut count = 0;
    while count < n {
        count += cq.poll(&mut seen[count..]).unwrap();
        assert!(Instant::now() < until, "{count} of {n} completions within {LIMIT:?}: {:?}", &seen[..count]);
        std::thread::yield_now();
    }
    seen
}

/// Whether a descriptor becomes readable within `limit`.
pub(crate) fn readable(fd: &impl AsRawFd, limit: Duration) -> bool {
    let mut poll = mio::Poll::new().unwrap();
    poll.registry().register(&mut SourceFd(&fd.as_raw_fd()), mio::Token(0), mio::Interest::READABLE).unwrap();
    let mut events = mio::Events::with_capacity(1);
    let until = Instant::now() + limit;
    loop {
        match poll.poll(&mut events, Some(until.saturating_duration_since(Instant::now()))) {
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
            done => {
                done.unwrap();
                return !events.is_empty();
            }
        }
    }
}
