//! A rail as the brain keeps it: how far its present end is, and the lives before that are not yet buried.

use std::collections::VecDeque;
use std::sync::Arc;

use moonrail_datapath::core::counters::RailCounters;
use moonrail_datapath::core::port::RailKey;
use moonrail_datapath::nic::qp::Reset;
use moonrail_datapath::nic::{AdminHalf, ConnectedQp, Fabric, PostHalf, Qp};
use moonrail_datapath::random::Random;
use moonrail_datapath::units::{CoreId, Gid, Mtu, Nanos, NicId, PeerId, PeerNicId, Qpn, RailId};

use super::event::{ConnId, Token};
use crate::handle::RailState;
use crate::handshake::{OwnEnd, PeerEnd, Progress};
use crate::repair::{Backoff, MtuTrial};
use crate::wire::{Frame, Hello, Incarnation};

/// What came of a hello of ours, with its number and the queue pairs that it named.
type Reply = (Token, OwnEnd, Result<Frame, String>);

/// One (local NIC, peer NIC) pair, for as long as the engine lives.
pub(super) struct Rail {
    pub(super) id: RailId,
    pub(super) peer: PeerId,
    pub(super) nic: NicId,
    pub(super) peer_nic: PeerNicId,
    /// What carries its bytes; if it is dialled, there is no handshake.
    pub(super) fabric: Fabric,
    /// The core of the present, or next, life.
    pub(super) core: CoreId,
    /// `server@device` of the peer's end.
    pub(super) peer_path: String,
    /// Queue pairs to make: our option, or what the peer turned out to have.
    pub(super) count: usize,
    /// Where its cores count.
    pub(super) counters: Arc<RailCounters>,
    /// Lives so far.
    pub(super) lives: u32,
    pub(super) end: End,
    /// Our hello that is on its way, if any.
    pub(super) asked: Option<Token>,
    /// A reply to it that came while a job had the queue pairs.
    pub(super) reply: Option<Box<Reply>>,
    /// Newest word of the peer about its end, by its life and count: older ones were long on their way.
    pub(super) heard: Option<(Incarnation, u64)>,
    /// Requests that wait for a job to end.
    pub(super) requests: VecDeque<Box<Inbound>>,
    /// The first of them waits for the peer's descriptor.
    pub(super) looking: bool,
    /// Lives that are over, oldest first.
    pub(super) old: Vec<OldLife>,
    pub(super) backoff: Backoff,
    pub(super) mtu: MtuTrial,
    /// Transport retries exceeded on lives that had worked, one soon after the other.
    pub(super) swallowed: u32,
    /// When to try again.
    pub(super) retry_at: Option<Nanos>,
    /// First of the failures since the last slice that came back.
    pub(super) failing_since: Option<Nanos>,
    /// How many there were. Apart from the back-off's count, which outlives a short success on purpose: a rail that flaps
    /// must wait longer and longer, and yet has all its attempts again each time.
    pub(super) failures: u32,
    /// What went wrong last, until a slice comes back.
    pub(super) trouble: Option<String>,
    /// The open incident.
    pub(super) incident: Option<u64>,
    /// Our question about former lives.
    pub(super) fence: super::fence::Asking,
    /// The peer's questions that wait until our end is retired.
    pub(super) questions: Vec<Inbound>,
    /// Jobs that destroy queue pairs which the peer may be connected to.
    pub(super) dying: u32,
    /// It was evicted, by whom and when: it is not connected before it is used again.
    pub(super) evicted: Option<(By, Nanos)>,
    /// When it was last evicted.
    pub(super) left: Option<Nanos>,
    /// Evictions so far.
    pub(super) evictions: u64,
    /// How long it has to be unused to count as idle.
    pub(super) patience: Nanos,
    /// When it was last found to be in use, here or at the peer.
    pub(super) kept: Option<Nanos>,
    /// Whether its core was given the present, or last, life to carry what we ask for ([`super::Brain::claims`]).
    pub(super) claims: bool,
}

/// Whose NIC has too many rails.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum By {
    Us,
    Peer,
}

/// A request that waits for its reply.
pub(super) struct Inbound {
    pub(super) conn: ConnId,
    pub(super) frame: Frame,
    pub(super) hello: Hello,
    /// The sender's descriptor was asked for, because the hello leaves its GID out.
    pub(super) looked_up: bool,
}

/// Why a connect job runs, and so what follows when it is done.
pub(super) enum Then {
    /// Answer a peer's request.
    Answer(Box<Inbound>),
    /// Acknowledge the peer's reply to ours.
    Acknowledge,
    /// Nothing: both ends are this one.
    Loop,
}

/// The present end of a rail.
pub(super) enum End {
    /// No queue pairs.
    Down,
    /// A job dials this peer.
    Dialling(PeerEnd),
    /// A job makes queue pairs; for our own hello, or for a peer's.
    Making(Option<(Box<Inbound>, PeerEnd)>),
    /// Queue pairs in RESET that our hello names.
    Asking { qps: Vec<Qp<Reset>>, ours: OwnEnd },
    /// A job connects them.
    Connecting { ours: OwnEnd, theirs: PeerEnd, mtu: Mtu, then: Then },
    /// Ours are ready; the peer has not said so.
    Half { ours: OwnEnd, theirs: PeerEnd, mtu: Mtu, halves: Vec<(ConnectedQp, AdminHalf)>, since: Nanos },
    /// With the core.
    Whole(Life),
}

/// A life that a core has.
pub(super) struct Life {
    pub(super) key: RailKey,
    pub(super) ours: OwnEnd,
    pub(super) theirs: PeerEnd,
    pub(super) mtu: Mtu,
    pub(super) admins: Vec<AdminHalf>,
    /// When the core got it.
    pub(super) since: Nanos,
    /// When its trial came back.
    pub(super) proven: Option<Nanos>,
    /// How far its eviction is.
    pub(super) leave: Leave,
    /// What the core gave back of it for that, whole: all of it or nothing.
    pub(super) idle: Vec<ConnectedQp>,
    /// What a core that stops gave back of it.
    pub(super) posts: Vec<PostHalf>,
    /// One of those had WRITEs outstanding when it failed.
    pub(super) needs_fence: bool,
}

/// How far the eviction of a life is ([`super::evict`]).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Leave {
    No,
    /// The core is asked to give it back.
    Core {
        since: Nanos,
    },
    /// It gave it back. The peer is asked whether its end is idle too; `again`: to be asked once more, then.
    Peer {
        since: Nanos,
        tries: u32,
        again: Option<Nanos>,
    },
}

impl Leave {
    /// When it was begun.
    pub(super) fn since(self) -> Option<Nanos> {
        match self {
            Self::No => None,
            Self::Core { since } | Self::Peer { since, .. } => Some(since),
        }
    }
}

/// A life that is over: its queue pairs on their way from the core to their end.
pub(super) struct OldLife {
    pub(super) key: RailKey,
    pub(super) core: CoreId,
    /// Queue pairs it had.
    pub(super) qps: usize,
    /// Their numbers.
    pub(super) qpns: Vec<Qpn>,
    /// The peer's at their other ends.
    pub(super) peer_qpns: Vec<Qpn>,
    /// Our halves; empty while a job moves them to ERR.
    pub(super) admins: Vec<AdminHalf>,
    /// The job that does.
    pub(super) failing: Option<Token>,
    /// The core's halves, as they came back.
    pub(super) posts: Vec<PostHalf>,
    /// Core slots whose queue pair did not drain in time, with its half.
    pub(super) overdue: Vec<(u16, PostHalf)>,
    /// Queue pairs destroyed for that reason.
    pub(super) gone: usize,
    /// WRITEs were outstanding: it matters whether the peer's end is retired.
    pub(super) needs_fence: bool,
    /// The peer's end is proven to be retired.
    pub(super) proof: bool,
    /// The peer is to be told that our end is gone: it hears nothing of our port, and would learn of it by its own silence.
    pub(super) untold: bool,
    pub(super) since: Nanos,
    pub(super) incarnation: Option<Incarnation>,
    pub(super) boot_id: Option<String>,
    pub(super) peer_gid: Gid,
}

impl OldLife {
    /// Whether nothing is outstanding on any of its queue pairs, and we have all that is left of them.
    pub(super) fn is_drained(&self) -> bool {
        self.failing.is_none() && self.overdue.is_empty() && self.posts.len() + self.gone >= self.qps
    }
}

impl Rail {
    /// Whether a job has the queue pairs of the present end.
    pub(super) fn is_busy(&self) -> bool {
        matches!(self.end, End::Dialling(_) | End::Making(_) | End::Connecting { .. })
    }

    /// Whether queue pairs that the peer may be connected to are still on their way to ERR, or to be destroyed. As long as
    /// one is, no others are made: those would tell the peer that nothing of its former life can land here any more.
    pub(super) fn is_ending(&self) -> bool {
        self.dying > 0 || self.old.iter().any(|life| life.failing.is_some())
    }

    /// How far it is, for the judges. Not to be asked while busy.
    pub(super) fn progress(&self) -> Progress<'_> {
        match &self.end {
            End::Down | End::Dialling(_) | End::Making(_) | End::Connecting { .. } => Progress::Nothing,
            End::Asking { ours, .. } => Progress::Asked(ours),
            End::Half { ours, theirs, .. } => Progress::Half(ours, theirs),
            End::Whole(life) => Progress::Whole(&life.ours, &life.theirs),
        }
    }

    /// Our end, from when others may know of it.
    pub(super) fn ours(&self) -> Option<&OwnEnd> {
        match &self.end {
            End::Asking { ours, .. } | End::Connecting { ours, .. } | End::Half { ours, .. } => Some(ours),
            End::Whole(life) => Some(&life.ours),
            End::Down | End::Dialling(_) | End::Making(_) => None,
        }
    }

    /// Counts a failure; returns how long to wait before the next attempt.
    pub(super) fn fail(&mut self, random: &mut Random) -> Nanos {
        self.failures += 1;
        self.backoff.fail(random)
    }

    /// The next attempt is a first one again, with short waits.
    pub(super) fn forgive(&mut self) {
        self.failures = 0;
        self.backoff.reset();
    }

    /// The peer's end, while connected to it.
    pub(super) fn theirs(&self) -> Option<&PeerEnd> {
        match &self.end {
            End::Connecting { theirs, .. } | End::Half { theirs, .. } => Some(theirs),
            End::Whole(life) => Some(&life.theirs),
            End::Down | End::Dialling(_) | End::Making(_) | End::Asking { .. } => None,
        }
    }

    pub(super) fn path_mtu(&self) -> Option<Mtu> {
        match &self.end {
            End::Connecting { mtu, .. } | End::Half { mtu, .. } => Some(*mtu),
            // A dialled rail has no packets.
            End::Whole(life) => (!self.fabric.is_dialled()).then_some(life.mtu),
            End::Down | End::Dialling(_) | End::Making(_) | End::Asking { .. } => None,
        }
    }

    pub(super) fn has_qpn(&self, qpn: Qpn) -> bool {
        self.ours().is_some_and(|ours| ours.qpns.contains(&qpn))
    }

    pub(super) fn is_proven(&self) -> bool {
        matches!(&self.end, End::Whole(life) if life.proven.is_some() && life.idle.is_empty())
    }

    /// Whether what we ask for can go over it.
    pub(super) fn carries(&self) -> bool {
        self.is_proven() && self.claims
    }

    /// How far the eviction of its present life is.
    pub(super) fn leave(&self) -> Leave {
        match &self.end {
            End::Whole(life) => life.leave,
            _ => Leave::No,
        }
    }

    /// Whether a former life waits for proof that its WRITEs can no longer land.
    pub(super) fn wants_fence(&self) -> bool {
        self.old.iter().any(|life| life.needs_fence && !life.proof)
    }

    pub(super) fn state(&self) -> RailState {
        match &self.end {
            End::Down => RailState::Down,
            End::Dialling(_) | End::Making(_) | End::Asking { .. } | End::Connecting { .. } => RailState::Connecting,
            End::Half { .. } => RailState::Waiting,
            End::Whole(life) if life.proven.is_some() => RailState::Usable,
            End::Whole(_) => RailState::Trial,
        }
    }
}
