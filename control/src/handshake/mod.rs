//! The handshake's decisions: pure, from what is known and one message to what follows.
//!
//! Both ends of a rail run the same code. [`initiator`] judges the replies to our own hellos, [`responder`] the hellos of
//! others; the two meet when both ends open at once, which is why each is told how far the rail is ([`Progress`]).
//! What follows is carried out by the brain.

pub mod initiator;
pub mod responder;

use moonrail_datapath::nic::GidKind;
use moonrail_datapath::units::{Gid, Lid, Mtu, Qpn, RqPsn, SqPsn};

use crate::config::RailOptions;
use crate::connect::{Pairing, Plan};
use crate::wire::{GidText, Hello, HelloExtra, Incarnation, NodeExtra, rejection};

/// One of our NICs, as a hello presents it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct OwnNic {
    /// `server@device`.
    pub path: String,
    /// Its GID.
    pub gid: Gid,
    /// Type of that GID.
    pub kind: GidKind,
    /// Its LID.
    pub lid: Lid,
}

/// Our queue pairs of one life.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct OwnEnd {
    /// In pairing order.
    pub qpns: Vec<Qpn>,
    /// What each sends first, towards a peer that says the same of its own.
    pub psns: Vec<SqPsn>,
    /// Largest path MTU the NIC could use when they were made. Every hello that names them says this one, and both ends
    /// connect with the smaller of what was said, even if a port has another by then: queue pairs whose ends differ can
    /// bring wrong bytes and call that success (Soft-RoCE, docs/testing.md).
    pub mtu: Mtu,
}

/// The other end, as its hello presented it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PeerEnd {
    /// Its GID.
    pub gid: Gid,
    /// Its LID.
    pub lid: Lid,
    /// Its queue pairs, in pairing order.
    pub qpns: Vec<Qpn>,
    /// What each sends first; empty from a stock peer.
    pub psns: Vec<SqPsn>,
    /// The path MTU it can use; only moonrail peers say.
    pub mtu: Option<Mtu>,
    /// Its life; only moonrail peers say.
    pub incarnation: Option<Incarnation>,
    /// The kernel it runs under; only moonrail peers say.
    pub boot_id: Option<String>,
    /// Whether it sends and expects ready acknowledgements.
    pub acks: bool,
}

impl PeerEnd {
    /// Whether it is a moonrail node.
    pub fn is_moonrail(&self) -> bool {
        self.incarnation.is_some()
    }
}

/// How far a rail is, for whoever judges a message about it.
#[derive(Clone, Copy, Debug)]
pub enum Progress<'a> {
    /// No queue pairs, or none that anybody was told of.
    Nothing,
    /// Our hello is on its way, with these queue pairs.
    Asked(&'a OwnEnd),
    /// Our queue pairs are connected to these of the peer; whether the peer's are ready is not known yet.
    Half(&'a OwnEnd, &'a PeerEnd),
    /// Connected, and the peer said it is ready.
    Whole(&'a OwnEnd, &'a PeerEnd),
}

impl<'a> Progress<'a> {
    /// Our end, once somebody may have been told of it.
    pub fn ours(self) -> Option<&'a OwnEnd> {
        match self {
            Self::Nothing => None,
            Self::Asked(ours) | Self::Half(ours, _) | Self::Whole(ours, _) => Some(ours),
        }
    }
}

/// A hello of ours: request, reply or (`ready`) acknowledgement. Without an end it connects nothing: a question.
pub fn hello(nic: &OwnNic, peer_path: &str, end: Option<&OwnEnd>, node: &NodeExtra, ready: bool) -> Hello {
    Hello {
        local_nic_path: nic.path.clone(),
        peer_nic_path: peer_path.to_owned(),
        local_gid: GidText::Valid(nic.gid),
        local_lid: nic.lid,
        qp_num: end.map(|end| end.qpns.clone()).unwrap_or_default(),
        ready_ack: Some(ready),
        reply_msg: String::new(),
        payload: String::new(),
        extra: HelloExtra {
            node: node.clone(),
            path_mtu: end.map(|end| end.mtu),
            sq_psn: end.map(|end| end.psns.clone()).unwrap_or_default(),
            ..HelloExtra::default()
        },
    }
}

/// What a hello says of the sender's end. `known` is what the sender's descriptor says of that NIC, for a hello without
/// a GID.
///
/// # Errors
/// The text to refuse with.
pub fn peer_end(hello: &Hello, known: Option<(Gid, Lid)>) -> Result<PeerEnd, String> {
    let (gid, lid) = match &hello.local_gid {
        GidText::Valid(gid) => (*gid, hello.local_lid),
        GidText::Malformed(text) => return Err(rejection::invalid_gid(text)),
        GidText::Absent => known.ok_or_else(|| rejection::nic_not_in_descriptor(&hello.local_nic_path))?,
    };
    Ok(PeerEnd {
        gid,
        lid,
        qpns: hello.qp_num.clone(),
        psns: hello.extra.sq_psn.clone(),
        mtu: hello.extra.path_mtu,
        incarnation: hello.extra.node.incarnation,
        boot_id: hello.extra.node.boot_id.clone(),
        acks: hello.speaks_ready_ack(),
    })
}

/// What both ends arrive at, each by itself, from the two hellos. `mtu` replaces our own path MTU towards a stock peer,
/// which never says its own.
///
/// # Errors
/// The text to refuse with: the two lists of queue pairs differ in length.
pub fn plan(
    nic: &OwnNic,
    ours: &OwnEnd,
    theirs: &PeerEnd,
    mtu: Option<Mtu>,
    options: &RailOptions,
) -> Result<Plan, String> {
    if ours.qpns.len() != theirs.qpns.len() || ours.qpns.is_empty() {
        return Err(rejection::QP_COUNT.to_owned());
    }
    let agreed = !theirs.psns.is_empty() && theirs.psns.len() == ours.psns.len();
    let pairs = theirs.qpns.iter().enumerate().map(|(i, dest)| {
        let numbers = (theirs.psns.get(i).map(|psn| RqPsn::from_peer(*psn)), ours.psns.get(i));
        let (rq_psn, sq_psn) = match numbers {
            (Some(theirs), Some(ours)) if agreed => (theirs, *ours),
            _ => (RqPsn::STOCK, SqPsn::STOCK),
        };
        Pairing { dest: *dest, rq_psn, sq_psn }
    });
    let path_mtu = match theirs.mtu {
        Some(theirs) => theirs.min(ours.mtu),
        None => mtu.unwrap_or(ours.mtu).min(ours.mtu),
    };
    Ok(Plan {
        pairs: pairs.collect(),
        path_mtu,
        own_gid: nic.gid,
        own_kind: nic.kind,
        own_lid: nic.lid,
        peer_gid: theirs.gid,
        peer_lid: theirs.lid,
        options: options.clone(),
    })
}

#[cfg(test)]
mod tests;
