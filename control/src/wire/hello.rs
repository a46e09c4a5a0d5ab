//! The hello: one end of a rail presents its queue pairs (message type 0), and later says that they are ready.
//!
//! Request and reply have the same members. A reply with a non-empty `reply_msg` is a refusal; its other members then
//! mean nothing, whatever they hold ([`Hello::refusal`] first).

use std::fmt;

use moonrail_datapath::units::{Gid, Lid, Qpn};
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use super::extra::{self, HelloExtra};
use super::json::{self, JsonError, present};

/// Most queue pairs one hello may name (`MC_NUM_QP_PER_EP` goes to 255).
pub const MAX_QPS: usize = 4096;
/// `peer_nic_path` of a request for the two-sided notify channel, which this engine refuses.
pub const CONTROL_CHANNEL: &str = "__ctrl__";

/// `server@device`: one NIC of one node.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct NicPath {
    /// Segment name (or `rdma_server_name`) of the node; has no `@`.
    pub server: String,
    /// Name of the verbs device there.
    pub device: String,
}

/// Text that is no NIC path.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum NicPathError {
    /// No `@`.
    #[error("{path:?} is not SERVER@DEVICE")]
    NoAt {
        /// What was given, shortened.
        path: String,
    },
    /// Nothing behind the `@`.
    #[error("{path:?} names no device behind '@'")]
    NoDevice {
        /// What was given, shortened.
        path: String,
    },
}

impl NicPath {
    /// From its two parts. The server part must have no `@`, or no reader will find the same two parts again.
    pub fn new(server: impl Into<String>, device: impl Into<String>) -> Self {
        Self { server: server.into(), device: device.into() }
    }

    /// Splits at the first `@`.
    ///
    /// # Errors
    /// No `@`, or an empty device. An empty server is let through, as the stock engine does.
    pub fn parse(path: &str) -> Result<Self, NicPathError> {
        let shortened = || path.chars().take(128).collect();
        match path.split_once('@') {
            None => Err(NicPathError::NoAt { path: shortened() }),
            Some((_, "")) => Err(NicPathError::NoDevice { path: shortened() }),
            Some((server, device)) => Ok(Self::new(server, device)),
        }
    }
}

impl fmt::Display for NicPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}@{}", self.server, self.device)
    }
}

/// A GID as a peer wrote it.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub enum GidText {
    /// Empty or missing: take it from the sender's segment descriptor.
    #[default]
    Absent,
    /// Sixteen bytes. May still be all zero.
    Valid(Gid),
    /// Something else, kept for the refusal that quotes it.
    Malformed(String),
}

impl GidText {
    /// Judges `text`.
    pub fn read(text: String) -> Self {
        match text.parse() {
            _ if text.is_empty() => Self::Absent,
            Ok(gid) => Self::Valid(gid),
            Err(_) => Self::Malformed(text),
        }
    }

    /// The GID, if it is one.
    pub fn gid(&self) -> Option<Gid> {
        match self {
            Self::Valid(gid) => Some(*gid),
            Self::Absent | Self::Malformed(_) => None,
        }
    }
}

impl From<Gid> for GidText {
    fn from(gid: Gid) -> Self {
        Self::Valid(gid)
    }
}

impl fmt::Display for GidText {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Absent => Ok(()),
            Self::Valid(gid) => gid.fmt(f),
            Self::Malformed(text) => text.fmt(f),
        }
    }
}

impl Serialize for GidText {
    fn serialize<S: serde::Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(self)
    }
}

/// One hello, request or reply. The default is the empty reply: nothing named, nothing refused.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Hello {
    /// Sender's `server@device`, as written (a reply quotes it even when it is no path).
    pub local_nic_path: String,
    /// Receiver's `server@device`, as written.
    pub peer_nic_path: String,
    /// Sender's GID.
    pub local_gid: GidText,
    /// Sender's LID, 0 on RoCE.
    pub local_lid: Lid,
    /// Sender's queue pairs in pairing order: number i talks to the receiver's number i.
    pub qp_num: Vec<Qpn>,
    /// `None`: the sender knows no ready acknowledgement. `Some(true)`: this *is* the acknowledgement.
    pub ready_ack: Option<bool>,
    /// In replies: empty, or the text of a refusal ([`super::rejection`]).
    pub reply_msg: String,
    /// Unused by every known engine; empty.
    pub payload: String,
    /// What only moonrail peers say.
    pub extra: HelloExtra,
}

/// Bytes that are no hello. The stock engine dies of some of these; here the connection is closed and counted.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HelloError {
    /// Not JSON, or a member of a type it must not have.
    #[error("the peer's hello cannot be read: {0}")]
    Json(#[from] JsonError),
    /// A queue pair number that no device has.
    #[error("the peer's hello cannot be read: queue pair number {number} does not fit in 24 bits")]
    QpNumber {
        /// The number, when it is one of 64 bits.
        number: u64,
    },
    /// More queue pairs than [`MAX_QPS`].
    #[error("the peer's hello names more than {MAX_QPS} queue pairs: lower MC_NUM_QP_PER_EP there")]
    TooManyQps,
    /// `sq_psn` has not one number per queue pair.
    #[error(
        "the peer's hello has {psns} packet sequence numbers for {qps} queue pairs: update the older of the two nodes"
    )]
    PsnCount {
        /// Sequence numbers named.
        psns: usize,
        /// Queue pairs named.
        qps: usize,
    },
}

#[derive(Deserialize)]
struct Read<'a> {
    #[serde(borrow, default)]
    local_nic_path: Option<&'a RawValue>,
    #[serde(default)]
    peer_nic_path: Option<&'a RawValue>,
    #[serde(default)]
    local_gid: Option<&'a RawValue>,
    #[serde(default)]
    local_lid: Option<&'a RawValue>,
    #[serde(default)]
    qp_num: Option<&'a RawValue>,
    #[serde(default, deserialize_with = "present")]
    ready_ack: Option<&'a RawValue>,
    #[serde(default)]
    reply_msg: Option<&'a RawValue>,
    #[serde(default)]
    payload: Option<&'a RawValue>,
    #[serde(default)]
    moonrail: Option<&'a RawValue>,
}

/// Members in alphabetical order, as the stock engine writes them.
#[derive(Serialize)]
struct Written<'a> {
    local_gid: &'a GidText,
    local_lid: u16,
    local_nic_path: &'a str,
    #[serde(skip_serializing_if = "HelloExtra::is_empty")]
    moonrail: &'a HelloExtra,
    payload: &'a str,
    peer_nic_path: &'a str,
    qp_num: Vec<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    ready_ack: Option<bool>,
    reply_msg: &'a str,
}

impl Hello {
    /// Reads the body of a type-0 message.
    ///
    /// Missing members are empty or 0; numbers and null pass for strings, anything for `local_gid` and `local_lid`,
    /// and a `qp_num` that is no array is an empty one, all as the stock engine has it.
    ///
    /// # Errors
    /// What would end a stock engine's process, and lists without end.
    pub fn parse(body: &[u8]) -> Result<Self, HelloError> {
        let read: Read<'_> = json::parse(body)?;
        let local_gid = match read.local_gid {
            Some(raw) if json::is_string(raw) => GidText::read(json::string("local_gid", Some(raw))?),
            _ => GidText::Absent,
        };
        // A LID that is no unsigned 32-bit integer counts as 0; of one that is, 16 bits are used.
        let lid = json::unsigned("local_lid", read.local_lid).ok().and_then(|lid| u32::try_from(lid).ok());
        let hello = Self {
            local_nic_path: json::string("local_nic_path", read.local_nic_path)?,
            peer_nic_path: json::string("peer_nic_path", read.peer_nic_path)?,
            local_gid,
            local_lid: Lid(lid.unwrap_or(0) as u16),
            qp_num: qp_numbers(read.qp_num)?,
            ready_ack: read.ready_ack.map(flag).transpose()?,
            reply_msg: json::string("reply_msg", read.reply_msg)?,
            payload: json::string("payload", read.payload)?,
            extra: extra::read_hello(read.moonrail)?,
        };
        match (hello.extra.sq_psn.len(), hello.qp_num.len()) {
            (psns, qps) if psns != 0 && psns != qps => Err(HelloError::PsnCount { psns, qps }),
            _ => Ok(hello),
        }
    }

    /// The body as the stock engine writes it: compact, alphabetical, ended by a newline.
    pub fn encode(&self) -> Vec<u8> {
        json::line(&Written {
            local_gid: &self.local_gid,
            local_lid: self.local_lid.0,
            local_nic_path: &self.local_nic_path,
            moonrail: &self.extra,
            payload: &self.payload,
            peer_nic_path: &self.peer_nic_path,
            qp_num: self.qp_num.iter().map(|q| q.get()).collect(),
            ready_ack: self.ready_ack,
            reply_msg: &self.reply_msg,
        })
    }

    /// The empty reply that refuses with `text`, one of [`super::rejection`].
    pub fn refuse(text: impl Into<String>) -> Self {
        Self { reply_msg: text.into(), ..Self::default() }
    }

    /// The text of a refusal. Look here before at any other member of a reply.
    pub fn refusal(&self) -> Option<&str> {
        (!self.reply_msg.is_empty()).then_some(self.reply_msg.as_str())
    }

    /// Whether this is a request for the two-sided notify channel; answer
    /// [`rejection::invalid_peer_path`](super::rejection::invalid_peer_path), after which the peer uses type 2.
    pub fn is_control_channel(&self) -> bool {
        self.peer_nic_path == CONTROL_CHANNEL
    }

    /// Whether this is a ready acknowledgement.
    pub fn is_ready_ack(&self) -> bool {
        self.ready_ack == Some(true)
    }

    /// Whether the sender expects, and sends, ready acknowledgements.
    pub fn speaks_ready_ack(&self) -> bool {
        self.ready_ack.is_some()
    }

    /// Sender's path, taken apart.
    ///
    /// # Errors
    /// It is no path; see [`NicPath::parse`].
    pub fn local_path(&self) -> Result<NicPath, NicPathError> {
        NicPath::parse(&self.local_nic_path)
    }

    /// Receiver's path, taken apart.
    ///
    /// # Errors
    /// It is no path; see [`NicPath::parse`].
    pub fn peer_path(&self) -> Result<NicPath, NicPathError> {
        NicPath::parse(&self.peer_nic_path)
    }
}

fn flag(raw: &RawValue) -> Result<bool, JsonError> {
    match raw.get() {
        "true" => Ok(true),
        "false" | "null" => Ok(false),
        text => text.parse::<f64>().map(|n| n != 0.0).map_err(|_| json::wrong("ready_ack", "true or false", raw)),
    }
}

fn qp_numbers(raw: Option<&RawValue>) -> Result<Vec<Qpn>, HelloError> {
    let Some(raw) = raw.filter(|raw| json::is_array(raw)) else { return Ok(Vec::new()) };
    let numbers = extra::list::<&RawValue>("qp_num", Some(raw), MAX_QPS)?.whole().ok_or(HelloError::TooManyQps)?;
    numbers
        .into_iter()
        .map(|raw| {
            let number: u64 =
                raw.get().parse().map_err(|_| json::wrong("qp_num", "an array of unsigned integers", raw))?;
            u32::try_from(number).ok().and_then(Qpn::new).ok_or(HelloError::QpNumber { number })
        })
        .collect()
}

#[cfg(test)]
mod tests;
