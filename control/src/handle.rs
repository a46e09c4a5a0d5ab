//! What other crates hold of the control thread: a handle whose every call is bounded in time and never panics.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{RecvTimeoutError, Sender, sync_channel};
use std::time::{Duration, Instant};

use moonrail_datapath::core::counters::RailCounters;
use moonrail_datapath::core::port::Doorbell;
use moonrail_datapath::nic::Fabric;
use moonrail_datapath::region::process::Process;
use moonrail_datapath::transfer::RemoteBuffers;
use moonrail_datapath::units::{CoreId, Mtu, Nanos, RailId};

use crate::brain::{Answer, BeginError, Call};
use crate::config::Clock;
use crate::driver::Question;
use crate::error::{ControlError, NotifyError, OpenError, PublishError};
use crate::fabric::FabricPolicy;
use crate::metadata::{BufferEntry, RpcMeta, SegmentDescriptor};
use crate::wire::Incarnation;

/// A peer's memory as its descriptor told. A newer descriptor is another value.
#[derive(Clone, Debug)]
pub struct RemoteSegment {
    /// Name it was opened by.
    pub name: String,
    /// What the peer published.
    pub descriptor: Arc<SegmentDescriptor>,
    /// The same as the data path wants it; keys by `PeerNicId`, which control fixed by NIC name.
    pub buffers: Arc<RemoteBuffers>,
}

/// A message a peer's application sent us.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Notification {
    /// The name it gave.
    pub name: String,
    /// The message.
    pub message: String,
}

/// How far a rail is.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum RailState {
    /// Not connected, none attempted until it is wanted or its back-off is over.
    Down,
    /// Queue pairs are being made, or the handshake is on its way.
    Connecting,
    /// Our queue pairs are ready; the peer has not said that its are.
    Waiting,
    /// With its core, no slice has come back yet.
    Trial,
    /// Usable.
    Usable,
}

/// One rail, for people and tests.
#[derive(Clone, Debug)]
pub struct RailReport {
    /// Its number.
    pub rail: RailId,
    /// The peer's segment name.
    pub peer: String,
    /// Our NIC.
    pub local_nic: String,
    /// The peer's NIC.
    pub peer_nic: String,
    /// What carries its bytes.
    pub fabric: Fabric,
    /// The core that has it.
    pub core: CoreId,
    /// How often it was connected.
    pub lives: u32,
    /// How far it is.
    pub state: RailState,
    /// Queue pairs of the present life.
    pub qps: usize,
    /// Path MTU of the present life.
    pub path_mtu: Option<Mtu>,
    /// Whether the other end is a moonrail node.
    pub moonrail: bool,
    /// Lives whose end at the peer is not proven retired.
    pub unfenced: usize,
    /// What went wrong last, if it is not repaired.
    pub trouble: Option<String>,
    /// Whether it was idle and evicted: it is connected again when it is used.
    pub evicted: bool,
    /// How often that happened.
    pub evictions: u64,
    /// What its core counts, over all its lives.
    pub counters: Arc<RailCounters>,
}

/// Whom the evidence of an incident is charged to.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[non_exhaustive]
pub enum Charge {
    /// The request itself was wrong: no rail is to blame.
    Request,
    /// This pair of NICs, and nobody else yet.
    Pair,
    /// The peer, or one port of it: it restarted, or presented fresh queue pairs, or several NICs of ours do not reach it.
    Peer,
    /// Our own port or device: it says so, or it reaches none of several peers.
    Port,
}

impl Charge {
    /// As one word: `request`, `pair`, `peer`, `port`.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Request => "request",
            Self::Pair => "pair",
            Self::Peer => "peer",
            Self::Port => "port",
        }
    }
}

/// What followed from one first error, or from several that have one cause.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Incident {
    /// Counted from 1.
    pub number: u64,
    /// When it opened, on the engine's clock.
    pub opened: Nanos,
    /// When each of its rails had carried a slice again; `None` while one has not.
    pub closed: Option<Nanos>,
    /// The rail, of several the first.
    pub rail: RailId,
    /// The peer's segment name.
    pub peer: String,
    /// Our NIC.
    pub local_nic: String,
    /// The peer's NIC.
    pub peer_nic: String,
    /// The cause in words, with what to do.
    pub cause: String,
    /// Completion status, where one was seen.
    pub status: Option<u32>,
    /// The device maker's code.
    pub vendor_err: u32,
    /// Age of the failed work request.
    pub age: Nanos,
    /// Requests that came back flushed.
    pub flushed: u32,
    /// Attempts to connect since.
    pub attempts: u32,
    /// Whom it is charged to. What fails later may tell more.
    pub charge: Charge,
    /// What was decided when it opened.
    pub decision: String,
}

/// Over what transfers to a segment go that was opened with one policy.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Way {
    /// What was asked for.
    pub policy: FabricPolicy,
    /// The fabric; `None`: none can be used.
    pub fabric: Option<Fabric>,
    /// Why it, and why nothing better; or why none.
    pub why: String,
}

/// What control knows of a failure, for whoever puts it into words.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Story {
    /// Our NIC and the peer's, of the rail that was asked about.
    pub nics: Option<(String, String)>,
    /// The cause of that rail's last incident.
    pub incident: Option<String>,
    /// What is wrong between us and the peer, if something is.
    pub trouble: Option<String>,
}

/// Handle of a running control thread. Cheap to clone; the thread ends at [`Control::shutdown`] or when the last handle
/// is dropped.
#[derive(Clone)]
pub struct Control {
    shared: Arc<Shared>,
}

struct Shared {
    name: String,
    rpc: RpcMeta,
    incarnation: Incarnation,
    /// `None` only while being dropped.
    questions: Option<Sender<Question>>,
    doorbell: Arc<Doorbell>,
    clock: Clock,
    evictions: Arc<[AtomicU64]>,
    process: Process,
}

impl Drop for Shared {
    fn drop(&mut self) {
        if !self.process.is_current() {
            // The doorbell is the parent's, whose thread still has handles.
            std::mem::forget(self.questions.take());
            return;
        }
        // The thread sees that nobody can ask any more once it is awake.
        self.questions = None;
        self.doorbell.ring();
    }
}

/// What a call may take longer than its deadline, which the control thread itself keeps.
const GRACE: Duration = Duration::from_millis(500);
/// For questions that nothing has to be waited for.
const AT_ONCE: Duration = Duration::from_secs(2);

impl Control {
    /// The name under which peers open this node: `host:port` in peer-to-peer mode.
    pub fn name(&self) -> &str {
        &self.shared.name
    }

    /// Host and port that peers dial.
    pub fn rpc_addr(&self) -> &RpcMeta {
        &self.shared.rpc
    }

    /// This life of the node, as peers know it.
    pub fn incarnation(&self) -> Incarnation {
        self.shared.incarnation
    }

    /// Looks `name` up, and begins to connect rails to it. Answers as soon as the descriptor is known. `policy`: what may
    /// carry its transfers; `None`: as this node is configured.
    ///
    /// # Errors
    /// See [`OpenError`].
    pub fn open_segment(
        &self,
        name: &str,
        policy: Option<FabricPolicy>,
        until: Instant,
    ) -> Result<Arc<RemoteSegment>, OpenError> {
        self.open(name, false, policy, until)
    }

    /// Like [`Control::open_segment`], but never answers from the cache.
    ///
    /// # Errors
    /// See [`OpenError`].
    pub fn refresh_segment(
        &self,
        name: &str,
        policy: Option<FabricPolicy>,
        until: Instant,
    ) -> Result<Arc<RemoteSegment>, OpenError> {
        self.open(name, true, policy, until)
    }

    fn open(
        &self,
        name: &str,
        fresh: bool,
        policy: Option<FabricPolicy>,
        until: Instant,
    ) -> Result<Arc<RemoteSegment>, OpenError> {
        match self.ask("opening the segment", Call::Open { name: name.to_owned(), fresh, policy }, until)? {
            Answer::Opened(result) => result,
            _ => Err(ControlError::Gone.into()),
        }
    }

    /// Replaces what this node offers. Keys are in the order of the NICs given at start.
    ///
    /// # Errors
    /// See [`PublishError`]. With a failing store the new list is still what peers are told that ask us directly, and it
    /// goes on being put until the store takes it.
    pub fn publish(&self, buffers: Vec<BufferEntry>, until: Instant) -> Result<(), PublishError> {
        match self.ask("publishing the segment", Call::Publish(buffers), until)? {
            Answer::Published(result) => result,
            _ => Err(ControlError::Gone.into()),
        }
    }

    /// Sends two texts to the application of the node that owns `segment`.
    ///
    /// # Errors
    /// See [`NotifyError`].
    pub fn notify(&self, segment: &str, name: &str, message: &str, until: Instant) -> Result<(), NotifyError> {
        let (segment, name, message) = (segment.to_owned(), name.to_owned(), message.to_owned());
        match self.ask("the notification", Call::Notify { segment, name, message }, until)? {
            Answer::Notified(result) => result,
            _ => Err(ControlError::Gone.into()),
        }
    }

    /// Takes what peers' applications sent since the last call, oldest first.
    pub fn take_notifications(&self) -> Vec<Notification> {
        match self.ask("notifications", Call::Notifications, Instant::now() + AT_ONCE) {
            Ok(Answer::Notifications(taken)) => taken,
            _ => Vec::new(),
        }
    }

    /// Asks whether the node that owns `segment` answers on its control port; returns how long it took.
    ///
    /// # Errors
    /// See [`NotifyError`].
    pub fn probe(&self, segment: &str, until: Instant) -> Result<Duration, NotifyError> {
        let began = Instant::now();
        match self.ask("the probe", Call::Probe(segment.to_owned()), until)? {
            Answer::Notified(result) => result.map(|()| began.elapsed()),
            _ => Err(ControlError::Gone.into()),
        }
    }

    /// Every rail. Empty when the control thread is gone.
    pub fn rails(&self) -> Vec<RailReport> {
        match self.ask("rails", Call::Rails, Instant::now() + AT_ONCE) {
            Ok(Answer::Rails(rails)) => rails,
            _ => Vec::new(),
        }
    }

    /// Idle rails evicted so far from the NIC of this number, in the order given at start. One load; any thread.
    pub fn evictions(&self, nic: usize) -> u64 {
        self.shared.evictions.get(nic).map_or(0, |count| count.load(Ordering::Relaxed))
    }

    /// The last 256 incidents, oldest first.
    pub fn incidents(&self) -> Vec<Incident> {
        match self.ask("incidents", Call::Incidents, Instant::now() + AT_ONCE) {
            Ok(Answer::Incidents(incidents)) => incidents,
            _ => Vec::new(),
        }
    }

    /// Why no rail to `segment` can be made, if that is so: the first cause.
    pub fn why(&self, segment: &str) -> Option<String> {
        match self.ask("the cause", Call::Why(segment.to_owned()), Instant::now() + AT_ONCE) {
            Ok(Answer::Why(why)) => why,
            _ => None,
        }
    }

    /// Over what transfers to `segment` go, by policy, and why. Empty for a segment that was never opened.
    pub fn ways(&self, segment: &str) -> Vec<Way> {
        match self.ask("the ways", Call::Ways(segment.to_owned()), Instant::now() + AT_ONCE) {
            Ok(Answer::Ways(ways)) => ways,
            _ => Vec::new(),
        }
    }

    /// What is known of a failure towards `segment`, on `rail`. Waits `within` and no longer, and knows nothing then: words
    /// are worth a moment, but no stop.
    pub fn story(&self, segment: &str, rail: Option<RailId>, within: Duration) -> Story {
        let call = Call::Story { segment: segment.to_owned(), rail };
        match self.ask_within("the cause", call, within, Duration::ZERO) {
            Ok(Answer::Story(story)) => story,
            _ => Story::default(),
        }
    }

    /// Withdraws this node, stops the cores, destroys every queue pair and ends the thread. Returns whether the thread
    /// came to its end by `until`; what is not given back by then is given up. May be called again.
    pub fn shutdown(&self, until: Instant) -> bool {
        match self.ask("the shutdown", Call::Shutdown, until) {
            Ok(Answer::Stopped) | Err(ControlError::Gone) => true,
            Ok(_) | Err(_) => false,
        }
    }

    /// Has the control thread look at what cores have left for it, though nobody was to be woken for that: what it drops then is
    /// memory, and the registration of memory. Any thread.
    pub fn look(&self) {
        self.shared.doorbell.ring();
    }

    fn ask(&self, what: &'static str, call: Call, until: Instant) -> Result<Answer, ControlError> {
        self.ask_within(what, call, until.saturating_duration_since(Instant::now()), GRACE)
    }

    fn ask_within(
        &self,
        what: &'static str,
        call: Call,
        left: Duration,
        grace: Duration,
    ) -> Result<Answer, ControlError> {
        if !self.shared.process.is_current() {
            return Err(ControlError::Forked);
        }
        let until = (self.shared.clock)().plus(Nanos::from_duration(left));
        let (reply, answer) = sync_channel(1);
        let questions = self.shared.questions.as_ref().ok_or(ControlError::Gone)?;
        questions.send(Question { call, until, reply }).map_err(|_| ControlError::Gone)?;
        self.look();
        answer.recv_timeout(left.saturating_add(grace)).map_err(|error| match error {
            RecvTimeoutError::Disconnected => ControlError::Gone,
            RecvTimeoutError::Timeout => ControlError::Deadline {
                what,
                state: "the control thread itself does not answer; the machine is overloaded, or a log sink blocks"
                    .to_owned(),
            },
        })
    }

    pub(crate) fn assemble(
        name: String,
        rpc: RpcMeta,
        incarnation: Incarnation,
        questions: Sender<Question>,
        doorbell: Arc<Doorbell>,
        clock: Clock,
        evictions: Arc<[AtomicU64]>,
    ) -> Self {
        Self {
            shared: Arc::new(Shared {
                name,
                rpc,
                incarnation,
                questions: Some(questions),
                doorbell,
                clock,
                evictions,
                process: Process::current(),
            }),
        }
    }

    /// Publishes the node for the first time.
    pub(crate) fn begin(&self, until: Instant) -> Result<(), BeginError> {
        match self.ask("publishing this node", Call::Begin, until)? {
            Answer::Begun(result) => result,
            _ => Err(ControlError::Gone.into()),
        }
    }
}
