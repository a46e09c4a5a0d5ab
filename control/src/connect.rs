//! Jobs: everything that calls a device and may block. The brain makes them, the pool runs them, and what they give back
//! is an event. Queue pairs travel inside, by value, so nobody else can touch one while a job has it.
//!
//! A queue pair goes RESET → INIT → RTR → RTS here and nowhere else; the types of [`moonrail_datapath::nic::qp`] see to
//! the order. Dropping a queue pair destroys it, which may block too: the brain never drops one, it makes a job of it.

use std::any::Any;
use std::io;
use std::time::{Duration, Instant};

use moonrail_datapath::nic::qp::{self, Reset, Step};
use moonrail_datapath::nic::{
    AdminHalf, ConnectedQp, DialError, GidKind, InitAttr, LinkLayer, Nic, PortState, PostHalf, Qp, QpCaps, RtrAttr,
    RtsAttr, Target,
};
use moonrail_datapath::units::{CoreId, Gid, GidIndex, Lid, Mtu, NicId, Qpn, RqPsn, SqPsn};

use crate::brain::Token;
use crate::config::{ControlNic, RailOptions};
use crate::gid::{self, GidValue};

/// RNR NAK timer code of stock engines (0.64 ms). No receive is ever posted, so it never runs.
const MIN_RNR_TIMER: u8 = 12;
/// RNR retries of stock engines, *for ever*; never used, as above.
const RNR_RETRY: u8 = 7;

/// A call to a device.
pub struct Job {
    /// Comes back in [`JobDone`].
    pub token: Token,
    /// The device.
    pub nic: NicId,
    /// What to do.
    pub kind: JobKind,
}

/// What to do.
pub enum JobKind {
    /// Create queue pairs in RESET.
    Make {
        /// The core whose completion queue they use.
        core: CoreId,
        /// How many.
        count: usize,
        /// Their depths.
        caps: QpCaps,
    },
    /// Dial a peer: queue pairs that need no handshake.
    Dial {
        /// The core whose completion queue they use.
        core: CoreId,
        /// How many.
        count: usize,
        /// Their depths.
        caps: QpCaps,
        /// Whom.
        target: Target,
        /// For all of them.
        within: Duration,
    },
    /// Bring queue pairs from RESET to RTS and part them.
    Connect {
        /// The queue pairs.
        qps: Vec<Qp<Reset>>,
        /// With whom and how.
        plan: Box<Plan>,
    },
    /// Move queue pairs to ERR.
    Fail {
        /// Our halves; they come back.
        admins: Vec<AdminHalf>,
    },
    /// Destroy queue pairs that nobody uses.
    Destroy(Unused),
    /// Look at the port and its GID table.
    Query {
        /// The GID the port began with.
        began: GidValue,
        /// The one in use.
        used: GidValue,
        /// Choose another while the first is gone. Not where the user fixed it.
        choose: bool,
    },
    /// Drop something whose drop may block.
    Discard(Box<dyn Any + Send>),
}

/// Queue pairs to be destroyed, in whatever state.
#[derive(Default)]
pub struct Unused {
    /// Never connected.
    pub fresh: Vec<Qp<Reset>>,
    /// Connected, never given to a core.
    pub connected: Vec<(ConnectedQp, AdminHalf)>,
    /// Drained by a core.
    pub drained: Vec<(AdminHalf, PostHalf)>,
}

impl Unused {
    /// Whether there is nothing to do.
    pub fn is_empty(&self) -> bool {
        self.fresh.is_empty() && self.connected.is_empty() && self.drained.is_empty()
    }
}

/// One queue pair's other end.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Pairing {
    /// The peer's queue pair.
    pub dest: Qpn,
    /// What the peer sends first.
    pub rq_psn: RqPsn,
    /// What we send first.
    pub sq_psn: SqPsn,
}

/// How to connect the queue pairs of one rail.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Plan {
    /// One per queue pair, in order.
    pub pairs: Vec<Pairing>,
    /// Path MTU.
    pub path_mtu: Mtu,
    /// Our GID, by value.
    pub own_gid: Gid,
    /// Its type.
    pub own_kind: GidKind,
    /// Our LID, for the report.
    pub own_lid: Lid,
    /// The peer's GID.
    pub peer_gid: Gid,
    /// The peer's LID.
    pub peer_lid: Lid,
    /// Everything else.
    pub options: RailOptions,
}

/// A job's end.
pub struct JobDone {
    /// Of the job.
    pub token: Token,
    /// The device.
    pub nic: NicId,
    /// What came of it.
    pub outcome: Outcome,
}

/// What came of a job.
pub enum Outcome {
    /// Of [`JobKind::Make`]. On failure none is left.
    Made(Result<Vec<Qp<Reset>>, DeviceError>),
    /// Of [`JobKind::Dial`]. On failure none is left.
    Dialled(Result<Vec<(ConnectedQp, AdminHalf)>, DialFailure>),
    /// Of [`JobKind::Connect`], in order. On failure all of them are destroyed.
    Connected(Result<Vec<(ConnectedQp, AdminHalf)>, Box<ConnectError>>),
    /// Of [`JobKind::Fail`]: every queue pair is in ERR, or its device is beyond saying so.
    Failed(Vec<AdminHalf>),
    /// Of [`JobKind::Destroy`] and [`JobKind::Discard`].
    Destroyed,
    /// Of [`JobKind::Query`].
    Queried(Result<NicFacts, DeviceError>),
    /// The job panicked or could not run; what it held is lost, and the device with it.
    Lost,
}

/// A peer could not be dialled.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct DialFailure {
    /// Why, in words.
    pub why: String,
    /// Another try would end the same way, as long as the peer offers the same.
    pub is_final: bool,
}

/// A device refused.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{what} on device {device} failed: {why}{}", if *out_of_resources { "; the device is out of queue pairs or memory: lower MC_NUM_QP_PER_EP, MC_MAX_WR or the number of peers, and see `ulimit -l`" } else { "" })]
pub struct DeviceError {
    /// What was asked.
    pub what: &'static str,
    /// Of which device.
    pub device: String,
    /// What it said.
    pub why: String,
    /// It said ENOMEM.
    pub out_of_resources: bool,
}

impl DeviceError {
    fn new(what: &'static str, nic: &dyn Nic, error: &io::Error) -> Self {
        let out_of_resources = error.raw_os_error() == Some(libc::ENOMEM);
        Self { what, device: nic.name().to_owned(), why: words(error), out_of_resources }
    }
}

/// A queue pair could not be brought to the next state: everything both ends said, for whoever has to find out why.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error(
    "{}; here: device {device}, QP {qpn}, MTU {path_mtu}, GID {own_gid} (index {}), LID {own_lid}; peer: QP {peer_qpn}, GID {peer_gid}, \
     LID {peer_lid}. The error is on this side: check that the two GIDs are of one network (`moonrail nics`, MC_GID_INDEX), \
     that both ends use the same MTU (MC_MTU), and that the hosts reach each other (ping, ib_send_bw)",
    self.refusal(),
    own_index.map_or_else(|| "gone".to_owned(), |i| i.to_string())
)]
pub struct ConnectError {
    /// Which step.
    pub step: Step,
    /// Our device.
    pub device: String,
    /// Our queue pair.
    pub qpn: Qpn,
    /// The peer's.
    pub peer_qpn: Qpn,
    /// Path MTU tried.
    pub path_mtu: Mtu,
    /// Our GID.
    pub own_gid: Gid,
    /// Where it stands now; `None`: no longer in the table.
    pub own_index: Option<GidIndex>,
    /// Our LID.
    pub own_lid: Lid,
    /// The peer's GID.
    pub peer_gid: Gid,
    /// The peer's LID.
    pub peer_lid: Lid,
    /// What verbs said.
    pub why: String,
}

impl ConnectError {
    /// What the peer is told, in the words of the stock engine.
    pub fn refusal(&self) -> String {
        use crate::wire::rejection;
        let step = match self.step {
            Step::Init => rejection::Step::Init,
            Step::Rtr => rejection::Step::Rtr,
            Step::Rts => rejection::Step::Rts,
        };
        rejection::modify_failed(step, &self.why)
    }
}

/// What a NIC is like now.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct NicFacts {
    /// State of the port.
    pub state: PortState,
    /// InfiniBand or Ethernet.
    pub link_layer: LinkLayer,
    /// Its LID.
    pub lid: Lid,
    /// Its path MTU.
    pub active_mtu: Mtu,
    /// The GID to use.
    pub gid: Gid,
    /// Its type.
    pub kind: GidKind,
    /// Its place now; `None`: the table does not have it any more.
    pub index: Option<GidIndex>,
}

impl NicFacts {
    /// Of a NIC that is dialled: there is no port, and nothing to look at.
    pub fn of_dialled() -> Self {
        Self {
            state: PortState::Active,
            link_layer: LinkLayer::Ethernet,
            lid: Lid(0),
            active_mtu: Mtu::B4096,
            gid: Gid([0; 16]),
            kind: GidKind::Other(0),
            index: None,
        }
    }
}

impl Job {
    /// Does it. May block for seconds; what blocks is the device.
    pub fn run(self, nics: &[ControlNic]) -> JobDone {
        let Self { token, nic, kind } = self;
        let outcome = match (nics.get(usize::from(nic.0)), kind) {
            (Some(nic), JobKind::Make { core, count, caps }) => Outcome::Made(make(nic, core, count, caps)),
            (Some(nic), JobKind::Dial { core, count, caps, target, within }) => {
                Outcome::Dialled(dial(nic, core, count, caps, &target, Instant::now() + within))
            }
            (Some(nic), JobKind::Connect { qps, plan }) => Outcome::Connected(connect(nic.nic.as_ref(), qps, &plan)),
            (_, JobKind::Fail { mut admins }) => {
                for admin in &mut admins {
                    // A device that refuses has lost the queue pair already; the drain's time limit covers the rest.
                    let _ = admin.to_error();
                }
                Outcome::Failed(admins)
            }
            (_, JobKind::Destroy(unused)) => {
                destroy(unused);
                Outcome::Destroyed
            }
            (Some(nic), JobKind::Query { began, used, choose }) => {
                Outcome::Queried(query(nic.nic.as_ref(), began, used, choose))
            }
            (_, JobKind::Discard(thing)) => {
                drop(thing);
                Outcome::Destroyed
            }
            (None, _) => Outcome::Lost,
        };
        JobDone { token, nic, outcome }
    }
}

fn make(nic: &ControlNic, core: CoreId, count: usize, caps: QpCaps) -> Result<Vec<Qp<Reset>>, DeviceError> {
    let device = nic.nic.device();
    let caps = QpCaps {
        max_send_wr: if device.max_qp_wr == 0 { caps.max_send_wr } else { caps.max_send_wr.min(device.max_qp_wr) },
        max_send_sge: if device.max_sge == 0 { caps.max_send_sge } else { caps.max_send_sge.min(device.max_sge) },
        max_inline: caps.max_inline,
    };
    let Some(Some(cq)) = nic.cqs.get(usize::from(core.0)) else {
        let missing = io::Error::other("that core does not poll this device");
        return Err(DeviceError::new("creating a queue pair", nic.nic.as_ref(), &missing));
    };
    (0..count)
        .map(|_| nic.nic.create_qp(cq, caps))
        .collect::<io::Result<_>>()
        .map_err(|e| DeviceError::new("creating a queue pair", nic.nic.as_ref(), &e))
}

fn dial(
    nic: &ControlNic,
    core: CoreId,
    count: usize,
    caps: QpCaps,
    target: &Target,
    until: Instant,
) -> Result<Vec<(ConnectedQp, AdminHalf)>, DialFailure> {
    let Some(Some(cq)) = nic.cqs.get(usize::from(core.0)) else {
        return Err(DialFailure { why: "that core does not poll this fabric".to_owned(), is_final: true });
    };
    let failed = |error: DialError| DialFailure { is_final: error.is_final(), why: error.to_string() };
    (0..count).map(|_| nic.nic.dial(cq, caps, target, until)).collect::<Result<_, _>>().map_err(failed)
}

fn connect(
    nic: &dyn Nic,
    qps: Vec<Qp<Reset>>,
    plan: &Plan,
) -> Result<Vec<(ConnectedQp, AdminHalf)>, Box<ConnectError>> {
    let port = nic.port_num();
    let device = nic.device();
    let atomics = |limit: u8| if limit == 0 { plan.options.rd_atomic } else { plan.options.rd_atomic.min(limit) };
    // The index moves whenever addresses come and go, so it is looked up by value each time.
    let table = nic.gids();
    let own_index =
        table.as_ref().ok().and_then(|t| gid::find_by_value(t, plan.own_gid, plan.own_kind)).map(|entry| entry.index);
    let mut connected = Vec::with_capacity(qps.len());
    for (qp, pair) in qps.into_iter().zip(&plan.pairs) {
        let qpn = qp.qpn();
        let refused = |step, why| {
            Box::new(ConnectError {
                step,
                device: nic.name().to_owned(),
                qpn,
                peer_qpn: pair.dest,
                path_mtu: plan.path_mtu,
                own_gid: plan.own_gid,
                own_index,
                own_lid: plan.own_lid,
                peer_gid: plan.peer_gid,
                peer_lid: plan.peer_lid,
                why,
            })
        };
        let init = InitAttr { port, pkey_index: plan.options.pkey_index };
        let qp = qp.init(&init).map_err(|e| refused(e.step, words(&e.source)))?;
        let Some(sgid_index) = own_index else {
            return Err(refused(
                Step::Rtr,
                match &table {
                    Ok(_) => "our GID is no longer in the device's table".to_owned(),
                    Err(e) => words(e),
                },
            ));
        };
        let rtr = RtrAttr {
            path_mtu: plan.path_mtu,
            dest_qpn: pair.dest,
            rq_psn: pair.rq_psn,
            max_dest_rd_atomic: atomics(device.max_qp_rd_atom),
            min_rnr_timer: MIN_RNR_TIMER,
            dest_gid: plan.peer_gid,
            dest_lid: plan.peer_lid,
            sgid_index,
            hop_limit: plan.options.hop_limit,
            traffic_class: plan.options.traffic_class,
            service_level: plan.options.service_level,
            port,
        };
        let qp = qp.rtr(&rtr).map_err(|e| refused(e.step, words(&e.source)))?;
        let rts = RtsAttr {
            timeout: plan.options.timeout,
            retry_cnt: plan.options.retry_cnt,
            rnr_retry: RNR_RETRY,
            sq_psn: pair.sq_psn,
            max_rd_atomic: atomics(device.max_qp_init_rd_atom),
        };
        connected.push(qp.rts(&rts).map_err(|e| refused(e.step, words(&e.source)))?.split());
    }
    Ok(connected)
}

fn destroy(unused: Unused) {
    drop(unused.fresh);
    for (post, admin) in unused.connected {
        drop(post);
        drop(admin);
    }
    for (admin, post) in unused.drained {
        if let Err((admin, post)) = qp::destroy(admin, post) {
            // Halves of two queue pairs: each goes with its own other half, wherever that is.
            drop((admin, post));
        }
    }
}

/// Asks a NIC what it is like now.
pub(crate) fn query(nic: &dyn Nic, began: GidValue, used: GidValue, choose: bool) -> Result<NicFacts, DeviceError> {
    let refused = |e| DeviceError::new("querying the port", nic, &e);
    let port = nic.query_port().map_err(refused)?;
    let table = nic.gids().map_err(refused)?;
    let entry = gid::settle(&table, began, used, choose);
    let (gid, kind) = entry.map_or(used, |entry| (entry.gid, entry.kind));
    Ok(NicFacts {
        state: port.state,
        link_layer: port.link_layer,
        lid: port.lid,
        active_mtu: port.active_mtu.or(port.max_mtu).unwrap_or(Mtu::B1024),
        gid,
        kind,
        index: entry.map(|entry| entry.index),
    })
}

/// The system's text for an error, as strerror(3) has it, without Rust's "(os error n)".
fn words(error: &io::Error) -> String {
    let text = error.to_string();
    match text.rfind(" (os error ") {
        Some(end) => text[..end].to_owned(),
        None => text,
    }
}
