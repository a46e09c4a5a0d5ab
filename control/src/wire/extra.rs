//! What moonrail nodes tell each other beyond the stock engine: one extra member, `"moonrail":{…}`.
//!
//! The stock parser looks members up by name and never at the rest, so an object it does not know is as harmless as a
//! number. One object keeps us to one name that upstream could some day also choose. Integers that need 64 bits travel
//! as text, since some JSON readers have only doubles.

use std::collections::BTreeMap;
use std::fmt;

use moonrail_datapath::units::{Mtu, Qpn, SqPsn};
use serde::de::{IgnoredAny, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::value::RawValue;

use super::json::{self, JsonError};

/// Name of the member.
pub const MEMBER: &str = "moonrail";
/// Most capabilities a peer may name; of more none are kept.
pub const MAX_CAPABILITIES: usize = 64;

/// One life of a node: drawn at random when an engine starts, never 0 on purpose, never used twice.
///
/// On the wire 16 lower-case hexadecimal digits in a string.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Incarnation(pub u64);

impl fmt::Display for Incarnation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

impl fmt::Debug for Incarnation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Incarnation({self})")
    }
}

impl Serialize for Incarnation {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(self)
    }
}

/// Names the memory that a node shares on its host; drawn at random. On the wire like [`Incarnation`].
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Token(pub u64);

impl Serialize for Token {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(&format_args!("{:016x}", self.0))
    }
}

/// Host and port of a TCP data socket.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct TcpPlace {
    /// Name or address.
    pub host: String,
    /// Port, never 0.
    pub port: u16,
}

/// What a node says of itself, in its hellos and in its segment descriptor.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize)]
pub struct NodeExtra {
    /// The kernel's boot id (/proc/sys/kernel/random/boot_id): equal on two nodes means one running kernel.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub boot_id: Option<String>,
    /// Names of what it can do beyond the stock protocol.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub capabilities: Vec<String>,
    /// Its life.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub incarnation: Option<Incarnation>,
    /// Active path MTU by device name, in bytes; in descriptors only.
    #[serde(skip_serializing_if = "BTreeMap::is_empty", serialize_with = "mtus")]
    pub path_mtus: BTreeMap<String, Mtu>,
    /// Its token for shared memory; in descriptors only. Good for processes under the same boot id.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub shm: Option<Token>,
    /// Where it serves the TCP data protocol; in descriptors of RDMA nodes only: others say it in stock members.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tcp: Option<TcpPlace>,
}

impl NodeExtra {
    /// Whether nothing is said, as by a stock peer.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// Whether the node names `capability`.
    pub fn can(&self, capability: &str) -> bool {
        self.capabilities.iter().any(|c| c == capability)
    }
}

/// What a hello adds for one pair of NICs. A stock peer sends none of it.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct HelloExtra {
    /// Who is speaking.
    pub node: NodeExtra,
    /// Largest path MTU the sender can use for this pair; both ends take the smaller one.
    pub path_mtu: Option<Mtu>,
    /// First packet sequence number of each send queue, in the order of `qp_num`; empty = 0 for all, as stock.
    /// Used only if both hellos have it.
    pub sq_psn: Vec<SqPsn>,
    /// Counts the hellos, replies and acknowledgements of the sender's life, so that one which was long on its way is known as
    /// such.
    pub serial: Option<u64>,
    /// Queue pairs of the *sender* that are in error: it asks for proof that nothing of theirs can land any more.
    pub fence_qpns: Vec<Qpn>,
    /// With `fence_qpns`: they are not in error, nothing of the sender's is on its way on them, and it will post no more if
    /// the receiver's end is idle and retired. An end in use is left alone, and not among `fenced_qpns`.
    pub if_idle: bool,
    /// Queue pairs of the *receiver* that those of `qp_num` are connected to; empty: to none yet. A receiver that has others by now
    /// cannot connect to these any more.
    pub peer_qpns: Vec<Qpn>,
    /// Answer to `fence_qpns`: those of the *receiver's* queue pairs whose other end is retired at the sender.
    pub fenced_qpns: Vec<Qpn>,
}

impl HelloExtra {
    /// Whether nothing is said, as by a stock peer.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

/// The JSON form of both, members in alphabetical order.
#[derive(Serialize)]
struct Written<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    boot_id: &'a Option<String>,
    #[serde(skip_serializing_if = "<[_]>::is_empty")]
    capabilities: &'a [String],
    #[serde(skip_serializing_if = "Vec::is_empty")]
    fence_qpns: Vec<u32>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    fenced_qpns: Vec<u32>,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    if_idle: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    incarnation: &'a Option<Incarnation>,
    #[serde(skip_serializing_if = "Option::is_none")]
    path_mtu: Option<u32>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    peer_qpns: Vec<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    serial: Option<u64>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    sq_psn: Vec<u32>,
}

impl Serialize for HelloExtra {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        Written {
            boot_id: &self.node.boot_id,
            capabilities: &self.node.capabilities,
            fence_qpns: self.fence_qpns.iter().map(|q| q.get()).collect(),
            fenced_qpns: self.fenced_qpns.iter().map(|q| q.get()).collect(),
            if_idle: self.if_idle,
            incarnation: &self.node.incarnation,
            path_mtu: self.path_mtu.map(Mtu::bytes),
            peer_qpns: self.peer_qpns.iter().map(|q| q.get()).collect(),
            serial: self.serial,
            sq_psn: self.sq_psn.iter().map(|p| p.get()).collect(),
        }
        .serialize(to)
    }
}

fn mtus<S: Serializer>(mtus: &BTreeMap<String, Mtu>, to: S) -> Result<S::Ok, S::Error> {
    to.collect_map(mtus.iter().map(|(device, mtu)| (device, mtu.bytes())))
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct Read<'a> {
    #[serde(borrow)]
    boot_id: Option<&'a RawValue>,
    capabilities: Option<&'a RawValue>,
    fence_qpns: Option<&'a RawValue>,
    fenced_qpns: Option<&'a RawValue>,
    if_idle: Option<&'a RawValue>,
    incarnation: Option<&'a RawValue>,
    path_mtu: Option<&'a RawValue>,
    path_mtus: Option<&'a RawValue>,
    peer_qpns: Option<&'a RawValue>,
    serial: Option<&'a RawValue>,
    shm: Option<&'a RawValue>,
    sq_psn: Option<&'a RawValue>,
    tcp: Option<&'a RawValue>,
}

#[derive(Deserialize)]
struct ReadPlace<'a> {
    #[serde(borrow, default)]
    host: Option<&'a RawValue>,
    #[serde(default)]
    port: Option<&'a RawValue>,
}

impl Read<'_> {
    fn node(&self) -> Result<NodeExtra, JsonError> {
        let hex = |member, raw: Option<&RawValue>| -> Result<Option<u64>, JsonError> {
            let Some(raw) = raw else { return Ok(None) };
            let number = u64::from_str_radix(&json::string(member, Some(raw))?, 16);
            number.map(Some).map_err(|_| json::wrong(member, "a string of hexadecimal digits", raw))
        };
        Ok(NodeExtra {
            boot_id: self.boot_id.map(|raw| json::string("moonrail.boot_id", Some(raw))).transpose()?,
            capabilities: list("moonrail.capabilities", self.capabilities, MAX_CAPABILITIES)?
                .whole()
                .unwrap_or_default(),
            incarnation: hex("moonrail.incarnation", self.incarnation)?.map(Incarnation),
            path_mtus: self.mtus()?,
            shm: hex("moonrail.shm", self.shm)?.map(Token),
            tcp: self.tcp()?,
        })
    }

    fn tcp(&self) -> Result<Option<TcpPlace>, JsonError> {
        let Some(raw) = self.tcp else { return Ok(None) };
        let read: ReadPlace<'_> = serde_json::from_str(raw.get())
            .map_err(|_| json::wrong("moonrail.tcp", "an object with host and port", raw))?;
        let host = json::string("moonrail.tcp.host", read.host)?;
        let port = u16::try_from(json::unsigned("moonrail.tcp.port", read.port)?).unwrap_or(0);
        // A place that cannot be dialled is none.
        Ok((port != 0 && !host.is_empty()).then_some(TcpPlace { host, port }))
    }

    /// Sizes this build does not know (a later version's) are left out rather than refused.
    fn mtus(&self) -> Result<BTreeMap<String, Mtu>, JsonError> {
        let Some(raw) = self.path_mtus else { return Ok(BTreeMap::new()) };
        let map: BTreeMap<String, u32> = serde_json::from_str(raw.get())
            .map_err(|_| json::wrong("moonrail.path_mtus", "an object of sizes in bytes", raw))?;
        Ok(map.into_iter().filter_map(|(device, bytes)| Some((device, Mtu::from_bytes(bytes)?))).collect())
    }
}

/// An array that was read.
pub(crate) enum List<T> {
    /// All of it.
    Whole(Vec<T>),
    /// It has more items than allowed; none were kept.
    TooLong,
}

impl<T> List<T> {
    /// The items, if it was not too long.
    pub(crate) fn whole(self) -> Option<Vec<T>> {
        match self {
            Self::Whole(items) => Some(items),
            Self::TooLong => None,
        }
    }
}

/// An array of at most `max` items of one type; absent or null is empty. Space grows with what is there.
pub(crate) fn list<'a, T: Deserialize<'a>>(
    member: &'static str,
    raw: Option<&'a RawValue>,
    max: usize,
) -> Result<List<T>, JsonError> {
    struct Bounded<T>(usize, std::marker::PhantomData<T>);
    impl<'de, T: Deserialize<'de>> Visitor<'de> for Bounded<T> {
        type Value = List<T>;
        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("an array")
        }
        fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<List<T>, A::Error> {
            let mut taken = Vec::new();
            while taken.len() < self.0 {
                match items.next_element()? {
                    Some(item) => taken.push(item),
                    None => return Ok(List::Whole(taken)),
                }
            }
            let mut too_long = false;
            while items.next_element::<IgnoredAny>()?.is_some() {
                too_long = true;
            }
            Ok(if too_long { List::TooLong } else { List::Whole(taken) })
        }
    }
    let Some(raw) = raw.filter(|raw| raw.get() != "null") else { return Ok(List::Whole(Vec::new())) };
    let mut from = serde_json::Deserializer::from_str(raw.get());
    from.deserialize_seq(Bounded(max, std::marker::PhantomData))
        .map_err(|_| json::wrong(member, "an array with items of one type", raw))
}

fn read(raw: Option<&RawValue>) -> Result<Read<'_>, JsonError> {
    match raw {
        // Another engine's member of the same name: not ours to judge.
        Some(raw) if json::is_object(raw) => {
            serde_json::from_str(raw.get()).map_err(|e| JsonError::Syntax { why: e.to_string() })
        }
        _ => Ok(Read::default()),
    }
}

/// Reads the member of a segment descriptor.
pub(crate) fn read_node(raw: Option<&RawValue>) -> Result<NodeExtra, JsonError> {
    read(raw)?.node()
}

/// Reads the member of a hello.
pub(crate) fn read_hello(raw: Option<&RawValue>) -> Result<HelloExtra, JsonError> {
    const MAX: usize = super::hello::MAX_QPS;
    fn numbers<T>(
        member: &'static str,
        raw: Option<&RawValue>,
        of: impl Fn(u32) -> Option<T>,
    ) -> Result<Vec<T>, JsonError> {
        let numbers = list::<u32>(member, raw, MAX)?.whole();
        let too_long =
            || JsonError::Type { member, wanted: "a list as short as `qp_num`", found: "a longer one".into() };
        numbers
            .ok_or_else(too_long)?
            .into_iter()
            .map(|n| {
                of(n).ok_or_else(|| JsonError::Type { member, wanted: "numbers of 24 bits", found: n.to_string() })
            })
            .collect()
    }
    let read = read(raw)?;
    let path_mtu = match read.path_mtu {
        None => None,
        Some(raw) => Mtu::from_bytes(json::unsigned("moonrail.path_mtu", Some(raw))?.try_into().unwrap_or(0)),
    };
    Ok(HelloExtra {
        node: read.node()?,
        path_mtu,
        serial: read.serial.map(|raw| json::unsigned("moonrail.serial", Some(raw))).transpose()?,
        sq_psn: numbers("moonrail.sq_psn", read.sq_psn, SqPsn::new)?,
        if_idle: json::boolean("moonrail.if_idle", read.if_idle)?,
        fence_qpns: numbers("moonrail.fence_qpns", read.fence_qpns, Qpn::new)?,
        fenced_qpns: numbers("moonrail.fenced_qpns", read.fenced_qpns, Qpn::new)?,
        peer_qpns: numbers("moonrail.peer_qpns", read.peer_qpns, Qpn::new)?,
    })
}
