//! The end that asks: what a reply to our hello means.

use super::{OwnEnd, PeerEnd, Progress, peer_end};
use crate::wire::{Hello, rejection};
use moonrail_datapath::units::{Gid, Lid};

/// What follows from a reply.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Step {
    /// Connect our queue pairs to these; then acknowledge, if the peer does that.
    Connect(PeerEnd),
    /// Connected already, by the peer's own hello: acknowledge, if the peer does that.
    Acknowledge {
        /// It does.
        acks: bool,
    },
    /// The peer refused, in its own words. Our queue pairs are of no use any more.
    Refused(String),
    /// The reply is not about this rail, or about other queue pairs than we are connected to: start again.
    Again(String),
    /// Late or duplicate: nothing follows.
    Ignore,
}

/// Judges the reply to a hello that named `asked`. The refusal is looked at before anything else: a refusing stock peer
/// fills the other members with queue pairs it has just destroyed.
pub fn judge(
    reply: &Hello,
    asked: &OwnEnd,
    own_path: &str,
    peer_path: &str,
    known: Option<(Gid, Lid)>,
    progress: Progress<'_>,
) -> Step {
    if progress.ours().is_none_or(|ours| ours.qpns != asked.qpns) {
        return Step::Ignore;
    }
    if let Some(text) = reply.refusal() {
        // Connected meanwhile by the peer's own hello, with the same queue pairs: that one counts.
        return match progress {
            Progress::Half(..) if text == rejection::END_GONE => Step::Again(text.to_owned()),
            Progress::Half(..) | Progress::Whole(..) => Step::Ignore,
            _ => Step::Refused(text.to_owned()),
        };
    }
    if let Progress::Half(_, theirs) | Progress::Whole(_, theirs) = progress {
        // Queue pair numbers recur after a restart; the incarnation does not.
        let life = reply.extra.node.incarnation;
        return if reply.qp_num == theirs.qpns && (life.is_none() || life == theirs.incarnation) {
            Step::Acknowledge { acks: reply.speaks_ready_ack() }
        } else {
            Step::Again("Peer QP list mismatch on connected endpoint, re-establishing connection".to_owned())
        };
    }
    if reply.local_nic_path != peer_path || reply.peer_nic_path != own_path {
        return Step::Again(format!(
            "Invalid argument: received packet mismatch, expect {peer_path} + {own_path}, while got {} + {}: what answers at \
             that address is not this peer (its entry in the metadata may be stale)",
            shorten(&reply.local_nic_path),
            shorten(&reply.peer_nic_path)
        ));
    }
    match peer_end(reply, known) {
        Ok(end) => Step::Connect(end),
        Err(text) => Step::Again(text),
    }
}

fn shorten(text: &str) -> String {
    text.chars().take(128).collect()
}
