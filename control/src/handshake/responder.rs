//! The end that is asked: what a hello of a peer means.

use super::{PeerEnd, Progress, peer_end};
use crate::wire::{Hello, rejection};
use moonrail_datapath::limits::QPS_PER_RAIL_MAX;
use moonrail_datapath::units::{Gid, Lid};

/// What follows from a request.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Step {
    /// Answer with a refusal and nothing else.
    Refuse(String),
    /// It was the acknowledgement of what is connected: answer with an empty reply. The rail is whole.
    Ready,
    /// The same request again: the same answer again, nothing changes. `whole`: the peer does not acknowledge, so this
    /// is also its word that it is ready.
    Repeat {
        /// The rail is whole.
        whole: bool,
    },
    /// Connect the queue pairs that our own hello named, and answer with them: both ends asked at once.
    Join(PeerEnd),
    /// Make queue pairs, connect them, answer with them.
    Fresh(PeerEnd),
    /// As [`Step::Fresh`], after the present life is retired: the peer has new queue pairs, so its old ones are gone.
    Replace(PeerEnd),
}

/// Judges a request about the rail (`own_path`, `peer_path`). Both paths of the request have been found to name a NIC.
pub fn judge(
    request: &Hello,
    own_path: &str,
    peer_path: &str,
    known: Option<(Gid, Lid)>,
    progress: Progress<'_>,
) -> Step {
    let connected = match progress {
        Progress::Half(_, theirs) | Progress::Whole(_, theirs) => Some(theirs),
        Progress::Nothing | Progress::Asked(_) => None,
    };
    let same_life = |theirs: &PeerEnd| {
        request.qp_num == theirs.qpns
            // Queue pair numbers recur after a restart; the incarnation does not.
            && (request.extra.node.incarnation.is_none() || request.extra.node.incarnation == theirs.incarnation)
    };
    if request.is_ready_ack() {
        return match connected {
            None => Step::Refuse(rejection::ACK_UNCONNECTED.to_owned()),
            Some(theirs) if same_life(theirs) => Step::Ready,
            Some(_) => Step::Refuse(rejection::ACK_STALE.to_owned()),
        };
    }
    if request.peer_nic_path != own_path || request.local_nic_path != peer_path {
        return Step::Refuse(rejection::path_inconsistency(
            own_path,
            peer_path,
            &request.peer_nic_path,
            &request.local_nic_path,
        ));
    }
    if connected.is_some_and(same_life) {
        return Step::Repeat { whole: !request.speaks_ready_ack() };
    }
    // Said before it heard of our newer end: joined, each end would be connected to another than the other's, and both would have to
    // begin again.
    let bound = &request.extra.peer_qpns;
    if !bound.is_empty() && progress.ours().is_none_or(|ours| ours.qpns != *bound) {
        return Step::Refuse(rejection::END_GONE.to_owned());
    }
    let theirs = match peer_end(request, known) {
        Ok(end) if (1..=QPS_PER_RAIL_MAX).contains(&end.qpns.len()) => end,
        Ok(_) => return Step::Refuse(rejection::QP_COUNT.to_owned()),
        Err(text) => return Step::Refuse(text),
    };
    match progress {
        Progress::Asked(ours) if ours.qpns.len() == theirs.qpns.len() => Step::Join(theirs),
        // Both asked, with different numbers of queue pairs. Between moonrail nodes the smaller number wins; a stock peer
        // never gives in, so we do. The reply to our own hello is then a refusal or out of date.
        Progress::Asked(ours) if theirs.is_moonrail() && theirs.qpns.len() > ours.qpns.len() => {
            Step::Refuse(rejection::QP_COUNT.to_owned())
        }
        Progress::Nothing | Progress::Asked(_) => Step::Fresh(theirs),
        Progress::Half(..) | Progress::Whole(..) => Step::Replace(theirs),
    }
}
