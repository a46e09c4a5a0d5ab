//! What the brain hears and what it wants done. Whoever drives it (the driver, or a simulation) does exactly this.

use std::sync::Arc;

use moonrail_datapath::core::port::{Command, CoreEvent};
use moonrail_datapath::nic::AsyncEvent;
use moonrail_datapath::units::{CoreId, Nanos, NicId, RailId};

use crate::config::LogRecord;
use crate::connect::{Job, JobDone};
use crate::error::{ControlError, DialError, NotifyError, OpenError, PublishError};
use crate::fabric::FabricPolicy;
use crate::handle::{Incident, Notification, RailReport, RemoteSegment, Story, Way};
use crate::metadata::{BufferEntry, StoreError};
use crate::wire::Frame;

/// Connects what was asked for with what came of it. Never used twice; an unknown one is a late answer and ignored.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct Token(pub u64);

/// An inbound connection, as its driver numbers it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct ConnId(pub u64);

/// A caller who waits, as its driver numbers it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct CallId(pub u64);

/// What happened.
pub enum Event {
    /// Somebody asks for something, and waits until `until` at the latest.
    Call {
        /// Who.
        id: CallId,
        /// What.
        call: Call,
        /// Until when.
        until: Nanos,
    },
    /// A peer's whole request. It waits for [`Action::Reply`] or [`Action::Close`], and not for ever.
    Request {
        /// The connection.
        conn: ConnId,
        /// The message.
        frame: Frame,
    },
    /// What came of [`Action::Dial`].
    Dialed {
        /// Of the action.
        token: Token,
        /// The peer's reply.
        result: Result<Frame, DialError>,
    },
    /// What came of [`Action::Store`]: the value of a get, nothing for the others.
    Stored {
        /// Of the action.
        token: Token,
        /// The result.
        result: Result<Option<Vec<u8>>, StoreError>,
    },
    /// A key of our cluster has another value, or none any more.
    Changed {
        /// The key.
        key: String,
        /// Its value.
        value: Option<Vec<u8>>,
    },
    /// Changes may have been missed: what is cached is to be asked for again.
    ChangesMissed,
    /// The lease of our keys ended: they are gone.
    LeaseLost,
    /// What came of [`Action::Run`].
    Job(JobDone),
    /// A core tells something.
    Core {
        /// Which.
        core: CoreId,
        /// What.
        event: CoreEvent,
    },
    /// A device tells something.
    Nic {
        /// Which.
        nic: NicId,
        /// What.
        event: AsyncEvent,
    },
    /// Time has passed; to be sent when [`super::Brain::next_timeout`] is reached.
    Timer,
}

/// What somebody asks for.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Call {
    /// Publish this node for the first time.
    Begin,
    /// Find a segment and connect to it.
    Open {
        /// Its name.
        name: String,
        /// Do not answer from the cache.
        fresh: bool,
        /// What may carry its transfers; `None`: as this node is configured.
        policy: Option<FabricPolicy>,
    },
    /// Replace our buffers.
    Publish(Vec<BufferEntry>),
    /// Send two texts.
    Notify {
        /// To the node of this segment.
        segment: String,
        /// First text.
        name: String,
        /// Second text.
        message: String,
    },
    /// See whether the node of this segment answers.
    Probe(String),
    /// Take what arrived.
    Notifications,
    /// Report the rails.
    Rails,
    /// Report the incidents.
    Incidents,
    /// Say why there is no rail.
    Why(String),
    /// Say over what transfers to a segment go, and why.
    Ways(String),
    /// Say what is known to whoever puts a failure into words.
    Story {
        /// The peer's segment.
        segment: String,
        /// The rail on which it happened.
        rail: Option<RailId>,
    },
    /// End everything.
    Shutdown,
}

/// The answer to a [`Call`], variant for variant.
#[derive(Clone, Debug)]
pub enum Answer {
    /// To [`Call::Begin`].
    Begun(Result<(), BeginError>),
    /// To [`Call::Open`].
    Opened(Result<Arc<RemoteSegment>, OpenError>),
    /// To [`Call::Publish`].
    Published(Result<(), PublishError>),
    /// To [`Call::Notify`] and [`Call::Probe`].
    Notified(Result<(), NotifyError>),
    /// To [`Call::Notifications`].
    Notifications(Vec<Notification>),
    /// To [`Call::Rails`].
    Rails(Vec<RailReport>),
    /// To [`Call::Incidents`].
    Incidents(Vec<Incident>),
    /// To [`Call::Why`].
    Why(Option<String>),
    /// To [`Call::Ways`].
    Ways(Vec<Way>),
    /// To [`Call::Story`].
    Story(Story),
    /// To [`Call::Shutdown`]: everything is given back. [`Action::Exit`] follows.
    Stopped,
}

/// This node could not be published.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum BeginError {
    /// The store failed, or knows another live node of our name.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// In time.
    #[error(transparent)]
    Control(#[from] ControlError),
}

/// What is to be done.
pub enum Action {
    /// Connect, send the frame, read one frame, close. [`Event::Dialed`] must follow, by `deadline` at the latest.
    Dial {
        /// Comes back.
        token: Token,
        /// Name or address.
        host: String,
        /// Port.
        port: u16,
        /// The request.
        frame: Frame,
        /// When it has to be over.
        deadline: Nanos,
    },
    /// Answer an inbound connection, which then ends. Ignored if it is gone.
    Reply {
        /// Which.
        conn: ConnId,
        /// The reply.
        frame: Frame,
    },
    /// End an inbound connection without an answer.
    Close {
        /// Which.
        conn: ConnId,
    },
    /// Ask the store. [`Event::Stored`] must follow, by `deadline` at the latest.
    Store {
        /// Comes back.
        token: Token,
        /// What to ask.
        op: StoreOp,
        /// When it has to be over.
        deadline: Nanos,
    },
    /// Report changes of a key from now on, as [`Event::Changed`]. Where the store cannot, nothing happens.
    Watch {
        /// The key.
        key: String,
    },
    /// Run a job where blocking does no harm. [`Event::Job`] must follow.
    Run(Job),
    /// Put a command into a core's ring. Commands to one core keep their order.
    Core {
        /// Which.
        core: CoreId,
        /// What.
        command: Command,
    },
    /// Answer a caller.
    Answer {
        /// Who.
        id: CallId,
        /// What.
        answer: Answer,
    },
    /// Write a log line.
    Log(LogRecord),
    /// Nothing is left to do: the driver may end.
    Exit,
}

/// What to ask of the store.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum StoreOp {
    /// The value of a key.
    Get(String),
    /// Whether there is a key: an empty value if so. A segment may be megabytes long, which etcd then keeps to itself.
    Has(String),
    /// Put a value under a key.
    Put(String, Vec<u8>),
    /// Delete a key, if it is there.
    Delete(String),
}
