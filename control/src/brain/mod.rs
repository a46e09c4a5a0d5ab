//! The brain: from what happened and the time to what is to be done. No socket, clock, thread, device call or source of
//! randomness in here, so a seed can run a whole cluster of brains.
//!
//! ```text
//!  event ──▶ mod      which part of the brain it is for
//!            calls    what callers ask, what they wait for
//!            own      our own address and segment in the store
//!            peer     who is who, what they published, where they answer
//!            restart  which of a peer's processes speaks
//!            server   requests of peers
//!            fabric   what carries the bytes to a peer, and rails that are dialled
//!            plan     which rails there are
//!            shake    a rail from nothing to connected, as initiator and as responder
//!            life     a rail from connected to buried: first error, drain
//!            incident what people are told of it
//!            evict    idle rails over the limit of a NIC
//!            fence    proof from the peer that a former life's WRITEs can no longer land
//!            nics     our NICs coming and going
//!        ──▶ actions
//! ```
//!
//! Whoever drives it sends each [`Event`] with the time, does every [`Action`] in order, and sends [`Event::Timer`] when
//! [`Brain::next_timeout`] is reached. An action that says an event must follow gets one, or its caller waits for ever.

mod calls;
mod event;
mod evict;
#[cfg(test)]
mod explored;
mod fabric;
mod fence;
mod incident;
mod life;
mod nics;
mod own;
mod peer;
mod plan;
mod rail;
mod restart;
mod server;
mod shake;

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::SystemTime;

use moonrail_datapath::core::port::Command;
use moonrail_datapath::nic::{Fabric, Offer};
use moonrail_datapath::units::{CoreId, Nanos, NicId, PeerId, Qpn};

use crate::config::{LogLevel, LogRecord, RailOptions};
use crate::connect::{Job, JobKind, NicFacts, Outcome};
use crate::fabric::FabricPolicy;
use crate::handle::{Incident, Notification};
use crate::handshake::OwnEnd;
use crate::metadata::{BufferEntry, KeySpace, PriorityMatrix, RpcMeta};
use crate::wire::Incarnation;
use moonrail_datapath::random::Random;

pub use event::{Action, Answer, BeginError, Call, CallId, ConnId, Event, StoreOp, Token};
pub use peer::MAX_PEERS;

use nics::NicState;
use own::Own;
use peer::{NoReply, PeerState};
use rail::Rail;

/// Incidents kept for whoever asks.
pub const INCIDENTS: usize = 256;
/// Notifications kept until the application takes them; more are refused.
pub const NOTIFICATIONS: usize = 4096;
/// Bytes of them, likewise.
pub const NOTIFICATION_BYTES: usize = 16 << 20;

/// What a brain is told when it is made.
#[derive(Clone, Debug)]
pub struct BrainConfig {
    /// The name under which peers open this node.
    pub name: String,
    /// Keys of the store; `None`: peer-to-peer.
    pub store: Option<KeySpace>,
    /// The store in words, for errors.
    pub metadata: String,
    /// Where our control port is.
    pub rpc: RpcMeta,
    /// This life.
    pub incarnation: Incarnation,
    /// The kernel's boot id.
    pub boot_id: Option<String>,
    /// Decides jitter and packet numbers.
    pub seed: u64,
    /// Wall time at [`Nanos::ZERO`], for the descriptor's time stamp.
    pub epoch: SystemTime,
    /// Our NICs, in the order of [`NicId`].
    pub nics: Vec<BrainNic>,
    /// How many cores there are.
    pub cores: u16,
    /// As published.
    pub matrix: PriorityMatrix,
    /// How rails are made.
    pub rails: RailOptions,
    /// What may carry transfers by default.
    pub fabrics: FabricPolicy,
    /// For one exchange with a peer, connection included.
    pub dial_timeout: Nanos,
    /// For one operation of the store.
    pub store_timeout: Nanos,
}

/// One of our NICs, as the brain is told of it.
#[derive(Clone, Debug)]
pub struct BrainNic {
    /// Name of the device.
    pub name: String,
    /// What carries its bytes.
    pub fabric: Fabric,
    /// What is published for others to dial.
    pub offer: Option<Offer>,
    /// What it was like at the start.
    pub facts: NicFacts,
    /// The user chose the GID: no other is taken when it vanishes.
    pub fixed_gid: bool,
    /// The cores that poll it.
    pub cores: Vec<CoreId>,
}

/// What a token stands for.
enum Pending {
    Fetch(PeerId),
    /// A question who answers at a peer's address.
    Who(PeerId),
    Locate(PeerId),
    Hello {
        rail: usize,
        ours: OwnEnd,
    },
    Ack {
        rail: usize,
        qpns: Vec<Qpn>,
    },
    Notify(CallId),
    Probe(CallId),
    Own(own::Step),
    /// A job for the present end of a rail.
    End(usize),
    /// A job that moves the queue pairs of a former life to ERR.
    Fail {
        rail: usize,
    },
    /// A job that destroys an overdue queue pair.
    Overdue {
        rail: usize,
        life: u32,
        core: CoreId,
        slot: u16,
    },
    Query,
    /// A job that destroys queue pairs of a rail's present end.
    Dropped(usize),
    Destroy,
    /// A question whether a former life is fenced.
    Fence {
        rail: usize,
        life: u32,
    },
    /// A question whether the peer's end is idle.
    Idle {
        rail: usize,
        life: u32,
    },
}

/// What a caller waits for.
#[derive(Clone, PartialEq, Eq, Debug)]
enum Kind {
    Begin,
    Open(PeerId, FabricPolicy),
    Publish(u64),
    Message(PeerId),
    Shutdown,
}

struct Caller {
    until: Nanos,
    kind: Kind,
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Timer {
    Rail(usize),
    Call(CallId),
    Job(Token),
    Nic(u16),
    Relief(u16),
    Own,
    Stop,
}

/// A job that runs, for the log line when it takes too long.
struct Running {
    since: Nanos,
    nic: NicId,
    what: &'static str,
}

/// A job that takes longer than this is reported, once. It cannot be ended: a device holds it.
const JOB_LIMIT: Nanos = Nanos::from_secs(5);

/// See the module.
pub struct Brain {
    config: BrainConfig,
    now: Nanos,
    out: Vec<Action>,
    random: Random,
    tokens: u64,
    pending: HashMap<Token, Pending>,
    running: BTreeMap<Token, Running>,
    timers: BTreeSet<(Nanos, Timer)>,
    callers: BTreeMap<CallId, Caller>,
    own: Own,
    buffers: Vec<BufferEntry>,
    nics: Vec<NicState>,
    peers: Vec<PeerState>,
    by_name: BTreeMap<String, PeerId>,
    by_server: BTreeMap<String, PeerId>,
    rails: Vec<Rail>,
    by_path: HashMap<(NicId, String), usize>,
    incidents: VecDeque<Incident>,
    incident_count: u64,
    /// Those that are not over.
    open: BTreeMap<u64, incident::Open>,
    evictions: Arc<[AtomicU64]>,
    notifications: VecDeque<Notification>,
    notification_bytes: usize,
    stopping: bool,
    cores_left: u16,
}

impl Brain {
    /// A brain that knows nobody yet.
    pub fn new(config: BrainConfig) -> Self {
        let nics = config.nics.iter().map(NicState::new).collect();
        let evictions = config.nics.iter().map(|_| AtomicU64::new(0)).collect();
        Self {
            now: Nanos::ZERO,
            out: Vec::new(),
            random: Random::new(config.seed),
            tokens: 0,
            pending: HashMap::new(),
            running: BTreeMap::new(),
            timers: BTreeSet::new(),
            callers: BTreeMap::new(),
            own: Own::default(),
            buffers: Vec::new(),
            nics,
            peers: Vec::new(),
            by_name: BTreeMap::new(),
            by_server: BTreeMap::new(),
            rails: Vec::new(),
            by_path: HashMap::new(),
            incidents: VecDeque::new(),
            incident_count: 0,
            open: BTreeMap::new(),
            evictions,
            notifications: VecDeque::new(),
            notification_bytes: 0,
            stopping: false,
            cores_left: config.cores,
            config,
        }
    }

    /// Rails evicted so far, by NIC. Anybody may read it at any time.
    pub fn evictions(&self) -> Arc<[AtomicU64]> {
        self.evictions.clone()
    }

    /// Takes one event; what is to be done is added to `out`, in order.
    pub fn handle(&mut self, event: Event, now: Nanos, out: &mut Vec<Action>) {
        self.now = now;
        self.due();
        match event {
            Event::Call { id, call, until } => self.call(id, call, until),
            Event::Request { conn, frame } => self.request(conn, frame),
            Event::Dialed { token, result } => self.replied(token, result.map_err(NoReply::Dial)),
            Event::Stored { token, result } => match self.pending.remove(&token) {
                Some(Pending::Fetch(peer)) => self.fetched(peer, result),
                Some(Pending::Locate(peer)) => self.located(peer, result),
                Some(Pending::Own(step)) => self.own_stored(step, result),
                _ => {}
            },
            Event::Changed { key, value } => self.changed(&key, value),
            Event::ChangesMissed => self.changes_missed(),
            Event::LeaseLost => self.republish("the lease of our keys ended"),
            Event::Job(done) => {
                self.running.remove(&done.token);
                self.job_done(done.token, done.nic, done.outcome);
            }
            Event::Core { core, event } => self.core_event(core, event),
            Event::Nic { nic, event } => self.nic_event(nic, event),
            Event::Timer => {}
        }
        out.append(&mut self.out);
    }

    /// When to send [`Event::Timer`], if nothing else happens before.
    pub fn next_timeout(&self) -> Option<Nanos> {
        self.timers.first().map(|(at, _)| *at)
    }

    fn due(&mut self) {
        while let Some((at, timer)) = self.timers.first().copied() {
            if at > self.now {
                break;
            }
            self.timers.pop_first();
            match timer {
                Timer::Rail(rail) => self.rail_due(rail),
                Timer::Call(id) => self.call_due(id),
                Timer::Nic(nic) => self.nic_due(NicId(nic)),
                Timer::Relief(nic) => self.relieve(NicId(nic)),
                Timer::Own => self.own_due(),
                Timer::Stop => self.stop_now(),
                Timer::Job(token) => {
                    if let Some(job) = self.running.get(&token) {
                        let device =
                            self.nics.get(usize::from(job.nic.0)).map_or_else(String::new, |nic| nic.name.clone());
                        let what = job.what;
                        let waited = self.now.since(job.since).to_duration();
                        self.log(
                            LogLevel::Warning,
                            format!(
                                "{what} on device {device} has not returned for {waited:?}: the device or its driver hangs; see `dmesg`"
                            ),
                        );
                    }
                }
            }
        }
    }

    fn at(&mut self, when: Nanos, timer: Timer) {
        self.timers.insert((when, timer));
    }

    fn token(&mut self, pending: Pending) -> Token {
        self.tokens += 1;
        let token = Token(self.tokens);
        self.pending.insert(token, pending);
        token
    }

    fn run(&mut self, nic: NicId, kind: JobKind, pending: Pending) -> Token {
        let token = self.token(pending);
        let what = match &kind {
            JobKind::Make { .. } => "creating queue pairs",
            JobKind::Connect { .. } => "connecting queue pairs",
            JobKind::Dial { .. } => "dialling a peer",
            JobKind::Fail { .. } => "moving queue pairs to ERR",
            JobKind::Destroy(_) => "destroying queue pairs",
            JobKind::Query { .. } => "querying the port",
            JobKind::Discard(_) => "deregistering memory",
        };
        self.running.insert(token, Running { since: self.now, nic, what });
        self.at(self.now.plus(JOB_LIMIT), Timer::Job(token));
        self.out.push(Action::Run(Job { token, nic, kind }));
        token
    }

    fn ask_store(&mut self, token: Token, op: StoreOp) {
        let deadline = self.now.plus(self.config.store_timeout);
        self.out.push(Action::Store { token, op, deadline });
    }

    fn command(&mut self, core: CoreId, command: Command) {
        self.out.push(Action::Core { core, command });
    }

    fn log(&mut self, level: LogLevel, text: String) {
        self.out.push(Action::Log(LogRecord { level, text }));
    }

    /// A peer's reply came, or none did.
    fn replied(&mut self, token: Token, result: Result<crate::wire::Frame, NoReply>) {
        match self.pending.remove(&token) {
            Some(Pending::Fetch(peer)) => self.fetched_directly(peer, result),
            Some(Pending::Who(peer)) => self.who_replied(peer, token, result),
            Some(Pending::Hello { rail, ours }) => self.hello_replied(rail, token, ours, result),
            Some(Pending::Ack { rail, qpns }) => self.ack_replied(rail, &qpns, result),
            Some(Pending::Fence { rail, life }) => self.fence_replied(rail, life, token, result),
            Some(Pending::Idle { rail, life }) => self.idle_replied(rail, life, result),
            Some(Pending::Notify(id)) => self.messaged(id, result, true),
            Some(Pending::Probe(id)) => self.messaged(id, result, false),
            Some(Pending::Own(step)) => self.own_probed(step, &result),
            _ => {}
        }
    }

    fn job_done(&mut self, token: Token, nic: NicId, outcome: Outcome) {
        match self.pending.remove(&token) {
            Some(Pending::End(rail)) => self.end_job_done(rail, outcome),
            Some(Pending::Fail { rail }) => self.failed(rail, token, outcome),
            Some(Pending::Overdue { rail, life, core, slot }) => self.overdue_destroyed(rail, life, core, slot),
            Some(Pending::Query) => self.queried(nic, outcome),
            Some(Pending::Dropped(rail)) => {
                self.rails[rail].dying -= 1;
                self.answer_fences(rail);
                self.serve(rail);
                self.attempt(rail);
            }
            _ => {}
        }
        if self.stopping {
            self.maybe_stopped();
        }
    }
}
