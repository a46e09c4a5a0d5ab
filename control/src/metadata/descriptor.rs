//! What a node publishes of itself: its segment (NICs, buffers, keys) and the address of its handshake port.
//!
//! [`SegmentDescriptor::encode`] writes exactly the members and types of the stock engine, since a wrong type ends a
//! stock reader's process. [`SegmentDescriptor::decode`] takes what the stock reader takes, and returns an error where
//! that one would refuse, or abort. Readers pair NICs by *name*; no order of a peer's arrays is trusted.

use moonrail_datapath::units::{Lid, Lkey, Rkey};
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use super::matrix::PriorityMatrix;
use crate::wire::extra::{self, NodeExtra};
use crate::wire::hello::GidText;
use crate::wire::json::{self, JsonError};

/// Largest descriptor read or written, in bytes: the stock engine's limit for an etcd message.
pub const MAX_BYTES: usize = 32 << 20;
/// Most devices a descriptor may have.
pub const MAX_DEVICES: usize = 1024;
/// Most buffers a descriptor may have.
pub const MAX_BUFFERS: usize = 1 << 20;

/// How a segment's memory is reached.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub enum Protocol {
    /// One-sided verbs.
    #[default]
    Rdma,
    /// The TCP data protocol.
    Tcp,
    /// Another transport of the stock engine, or several (joined by `,`); nothing of it is read.
    Other(String),
}

impl Protocol {
    /// The word on the wire.
    pub fn as_str(&self) -> &str {
        match self {
            Self::Rdma => "rdma",
            Self::Tcp => "tcp",
            Self::Other(name) => name,
        }
    }
}

/// One NIC of a segment.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct DeviceEntry {
    /// Name of the verbs device; not empty.
    pub name: String,
    /// Its GID; a stock node may publish one of zeros for a NIC that failed to open.
    pub gid: GidText,
    /// LID of its port, 0 on RoCE.
    pub lid: Lid,
}

/// One registered range.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct BufferEntry {
    /// Memory location (`cpu:0`, `cuda:1`, `*`, `segments:…`); of a stock tcp node its name. Not empty.
    pub name: String,
    /// First address in the owner's process; not 0.
    pub addr: u64,
    /// Bytes; not 0.
    pub length: u64,
    /// Local keys, one per device. Nobody uses a peer's, but a stock reader refuses descriptors without them.
    pub lkeys: Vec<Lkey>,
    /// Remote keys, one per device; empty when peers may not touch the range.
    pub rkeys: Vec<Rkey>,
}

impl BufferEntry {
    /// Whether `addr..addr + length` lies inside.
    pub fn covers(&self, addr: u64, length: u64) -> bool {
        addr.checked_sub(self.addr).and_then(|skip| skip.checked_add(length)).is_some_and(|end| end <= self.length)
    }
}

/// A published segment.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct SegmentDescriptor {
    /// Name of the node, equal to the name in the key. Refreshes, NIC paths and notifications use it.
    pub name: String,
    /// How to reach it.
    pub protocol: Protocol,
    /// Its NICs (rdma).
    pub devices: Vec<DeviceEntry>,
    /// Its registered ranges.
    pub buffers: Vec<BufferEntry>,
    /// Which of its NICs serve which location (rdma).
    pub priority_matrix: PriorityMatrix,
    /// When not empty, replaces `name` in NIC paths.
    pub rdma_server_name: String,
    /// Port of the TCP data protocol, 0 = none. Meaningless in an rdma descriptor: one version writes garbage there.
    pub tcp_data_port: i32,
    /// Host of the TCP data protocol; empty = look up the node's handshake address.
    pub tcp_data_host: String,
    /// Version of the TCP data protocol, 2 and up = version 2.
    pub tcp_proto_version: i32,
    /// When it was written, `YYYY-MM-DD HH:MM:SS.ffffff`; for people, never compared.
    pub timestamp: String,
    /// What only moonrail nodes say.
    pub extra: NodeExtra,
}

/// Why a descriptor cannot be used.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DescriptorError {
    /// Not JSON, or a member of the wrong type.
    #[error("segment descriptor cannot be read: {0}")]
    Json(#[from] JsonError),
    /// The peer answered `null`: it has no segment, or keeps it in a metadata store.
    #[error(
        "the peer has no descriptor to give: it runs with a metadata store (give its connection string here too), \
         or has no segment yet"
    )]
    Null,
    /// Above a limit of this engine.
    #[error("segment descriptor has too much: {what}, the limit is {limit}; register fewer, larger regions there")]
    TooLarge {
        /// Of what.
        what: &'static str,
        /// How many are allowed.
        limit: usize,
    },
    /// Empty or contradictory where the stock reader refuses too.
    #[error("Corrupted segment descriptor, name {name} protocol {protocol}: {why}; the node must publish it again")]
    Corrupt {
        /// Name inside the descriptor.
        name: String,
        /// Its protocol.
        protocol: String,
        /// What is wrong.
        why: String,
    },
}

#[derive(Deserialize)]
struct ReadSegment<'a> {
    #[serde(borrow, default)]
    name: Option<&'a RawValue>,
    #[serde(default)]
    protocol: Option<&'a RawValue>,
    #[serde(default)]
    devices: Option<&'a RawValue>,
    #[serde(default)]
    buffers: Option<&'a RawValue>,
    #[serde(default)]
    priority_matrix: Option<&'a RawValue>,
    #[serde(default)]
    rdma_server_name: Option<&'a RawValue>,
    #[serde(default)]
    tcp_data_port: Option<&'a RawValue>,
    #[serde(default)]
    tcp_data_host: Option<&'a RawValue>,
    #[serde(default)]
    tcp_proto_version: Option<&'a RawValue>,
    #[serde(default)]
    timestamp: Option<&'a RawValue>,
    #[serde(default)]
    moonrail: Option<&'a RawValue>,
}

#[derive(Deserialize)]
struct ReadDevice<'a> {
    #[serde(borrow, default)]
    name: Option<&'a RawValue>,
    #[serde(default)]
    gid: Option<&'a RawValue>,
    #[serde(default)]
    lid: Option<&'a RawValue>,
}

#[derive(Deserialize)]
struct ReadBuffer<'a> {
    #[serde(borrow, default)]
    name: Option<&'a RawValue>,
    #[serde(default)]
    addr: Option<&'a RawValue>,
    #[serde(default)]
    length: Option<&'a RawValue>,
    #[serde(default)]
    lkey: Option<&'a RawValue>,
    #[serde(default)]
    location: Option<&'a RawValue>,
    #[serde(default)]
    rkey: Option<&'a RawValue>,
}

/// Members in alphabetical order; those of the other protocol are left out.
#[derive(Serialize)]
struct WrittenSegment<'a> {
    buffers: Vec<WrittenBuffer<'a>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    devices: Option<Vec<WrittenDevice<'a>>>,
    #[serde(skip_serializing_if = "NodeExtra::is_empty")]
    moonrail: &'a NodeExtra,
    name: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    priority_matrix: Option<&'a PriorityMatrix>,
    protocol: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    rdma_server_name: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    tcp_data_host: Option<&'a str>,
    tcp_data_port: i32,
    tcp_proto_version: i32,
    timestamp: &'a str,
}

#[derive(Serialize)]
struct WrittenDevice<'a> {
    gid: &'a GidText,
    lid: u16,
    name: &'a str,
}

#[derive(Serialize)]
struct WrittenBuffer<'a> {
    addr: u64,
    length: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    lkey: Option<Vec<u32>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    location: Option<&'a str>,
    name: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    rkey: Option<Vec<u32>>,
}

impl SegmentDescriptor {
    /// Reads a descriptor, by the rules of the stock reader.
    ///
    /// Of a protocol that is neither rdma nor tcp only the names are read. A `priority_matrix` that is none counts as
    /// empty. Members that are missing have the stock reader's defaults.
    ///
    /// # Errors
    /// See [`DescriptorError`]; nothing panics, and memory stays in proportion to `text`.
    pub fn decode(text: &[u8]) -> Result<Self, DescriptorError> {
        if text.len() > MAX_BYTES {
            return Err(DescriptorError::TooLarge { what: "bytes", limit: MAX_BYTES });
        }
        if text.trim_ascii() == b"null" {
            return Err(DescriptorError::Null);
        }
        let read: ReadSegment<'_> = json::parse(text)?;
        let protocol = protocol(read.protocol)?;
        let mut segment = Self {
            name: json::string("name", read.name)?,
            rdma_server_name: json::string("rdma_server_name", read.rdma_server_name)?,
            tcp_data_port: json::int32("tcp_data_port", read.tcp_data_port, 0)?,
            tcp_data_host: json::string("tcp_data_host", read.tcp_data_host)?,
            tcp_proto_version: json::int32("tcp_proto_version", read.tcp_proto_version, 1)?,
            timestamp: json::string("timestamp", read.timestamp)?,
            extra: extra::read_node(read.moonrail)?,
            protocol,
            ..Self::default()
        };
        if let Protocol::Other(_) = segment.protocol {
            return Ok(segment);
        }
        segment.buffers = segment.buffers(read.buffers)?;
        if segment.protocol == Protocol::Rdma {
            segment.devices = devices(read.devices)?;
            if let Some(raw) = read.priority_matrix {
                segment.priority_matrix = PriorityMatrix::parse(raw.get()).unwrap_or_default();
            }
        }
        segment.check()?;
        Ok(segment)
    }

    fn buffers(&self, raw: Option<&RawValue>) -> Result<Vec<BufferEntry>, DescriptorError> {
        let rdma = self.protocol == Protocol::Rdma;
        let keys = |member, raw: Option<&RawValue>| -> Result<Vec<u32>, DescriptorError> {
            let items: Vec<&RawValue> = items(member, "keys of a buffer", raw.filter(|_| rdma), MAX_DEVICES)?;
            Ok(items
                .into_iter()
                .map(|k| json::unsigned(member, Some(k)).map(|k| k as u32))
                .collect::<Result<_, _>>()?)
        };
        let buffers: Vec<ReadBuffer<'_>> = items("buffers", "buffers", raw, MAX_BUFFERS)?;
        buffers
            .into_iter()
            .map(|buffer| {
                let name = json::string("buffers.name", buffer.name)?;
                // A stock tcp node has its own name there, and nowhere the location.
                let location = buffer.location.filter(|_| !rdma && !name.is_empty());
                let location = location.map(|raw| json::string("buffers.location", Some(raw))).transpose()?;
                Ok(BufferEntry {
                    name: location.filter(|location| !location.is_empty()).unwrap_or(name),
                    addr: json::unsigned("buffers.addr", buffer.addr)?,
                    length: json::unsigned("buffers.length", buffer.length)?,
                    lkeys: keys("buffers.lkey", buffer.lkey)?.into_iter().map(Lkey).collect(),
                    rkeys: keys("buffers.rkey", buffer.rkey)?.into_iter().map(Rkey).collect(),
                })
            })
            .collect()
    }

    /// Whether the stock reader would take it.
    ///
    /// # Errors
    /// [`DescriptorError::Corrupt`] with what is wrong.
    pub fn check(&self) -> Result<(), DescriptorError> {
        let corrupt = |why: String| {
            Err(DescriptorError::Corrupt { name: self.name.clone(), protocol: self.protocol.as_str().to_owned(), why })
        };
        for (at, device) in self.devices.iter().enumerate() {
            if device.name.is_empty() || device.gid == GidText::Absent {
                return corrupt(format!("device {at} has no name or no GID"));
            }
        }
        for (at, buffer) in self.buffers.iter().enumerate() {
            if buffer.name.is_empty() || buffer.addr == 0 || buffer.length == 0 {
                return corrupt(format!("buffer {at} has no name, address or length"));
            }
            if buffer.addr.checked_add(buffer.length).is_none() {
                return corrupt(format!("buffer {at} reaches beyond the address space"));
            }
            let (lkeys, rkeys, devices) = (buffer.lkeys.len(), buffer.rkeys.len(), self.devices.len());
            if rkeys != 0 && (rkeys != devices || lkeys != devices) {
                return corrupt(format!("buffer {at} has {lkeys} lkeys and {rkeys} rkeys for {devices} devices"));
            }
        }
        Ok(())
    }

    /// The text for etcd and the handshake socket: compact, alphabetical, ended by a newline.
    pub fn encode(&self) -> Vec<u8> {
        let rdma = self.protocol == Protocol::Rdma;
        let buffers = self.buffers.iter().map(|b| {
            // In tcp descriptors `name` is the node's, as stock has it; what moonrail knows of the place stands beside it.
            let moved = !rdma && b.name != self.name && !self.name.is_empty();
            WrittenBuffer {
                addr: b.addr,
                length: b.length,
                lkey: rdma.then(|| b.lkeys.iter().map(|k| k.0).collect()),
                location: moved.then_some(&b.name),
                name: if moved { &self.name } else { &b.name },
                rkey: rdma.then(|| b.rkeys.iter().map(|k| k.0).collect()),
            }
        });
        let devices = self.devices.iter().map(|d| WrittenDevice { gid: &d.gid, lid: d.lid.0, name: &d.name });
        json::line(&WrittenSegment {
            buffers: buffers.collect(),
            devices: rdma.then(|| devices.collect()),
            moonrail: &self.extra,
            name: &self.name,
            priority_matrix: rdma.then_some(&self.priority_matrix),
            protocol: self.protocol.as_str(),
            rdma_server_name: (!rdma || !self.rdma_server_name.is_empty()).then_some(self.rdma_server_name.as_str()),
            tcp_data_host: (!rdma).then_some(self.tcp_data_host.as_str()),
            tcp_data_port: self.tcp_data_port,
            tcp_proto_version: self.tcp_proto_version,
            timestamp: &self.timestamp,
        })
    }

    /// Puts `devices` and each buffer's keys into the order in which a stock reader numbers the NICs of
    /// `priority_matrix`, and takes names out of the matrix that are no devices. To be called before publishing more
    /// than one NIC, or a stock peer's choice of a near NIC lands on another one. Devices outside the matrix go last.
    ///
    /// # Errors
    /// [`DescriptorError::Corrupt`] as from [`SegmentDescriptor::check`]; then nothing is changed.
    pub fn arrange(&mut self) -> Result<(), DescriptorError> {
        self.check()?;
        let devices = std::mem::take(&mut self.devices);
        let known = |name: &String| devices.iter().any(|d| d.name == *name);
        for nics in self.priority_matrix.0.values_mut() {
            nics.preferred.retain(known);
            nics.available.retain(known);
        }
        let numbering = self.priority_matrix.numbering();
        let place = |at: &usize| numbering.iter().position(|name| *name == devices[*at].name).unwrap_or(usize::MAX);
        let mut order: Vec<usize> = (0..devices.len()).collect();
        order.sort_by_key(place);
        for buffer in &mut self.buffers {
            buffer.lkeys = order.iter().filter_map(|at| buffer.lkeys.get(*at).copied()).collect();
            buffer.rkeys = order.iter().filter_map(|at| buffer.rkeys.get(*at).copied()).collect();
        }
        self.devices = order.iter().map(|at| devices[*at].clone()).collect();
        Ok(())
    }

    /// Place of the device of this name in `devices`, and so in every buffer's keys.
    pub fn device_index(&self, name: &str) -> Option<usize> {
        self.devices.iter().position(|d| d.name == name)
    }

    /// Server part of this node's NIC paths.
    pub fn server_name(&self) -> &str {
        if self.rdma_server_name.is_empty() { &self.name } else { &self.rdma_server_name }
    }

    /// Whether the two describe the same thing: all but the time of writing.
    pub fn same_content(&self, other: &Self) -> bool {
        let timeless = |s: &Self| Self { timestamp: String::new(), ..s.clone() };
        timeless(self) == timeless(other)
    }
}

fn devices(raw: Option<&RawValue>) -> Result<Vec<DeviceEntry>, DescriptorError> {
    let devices: Vec<ReadDevice<'_>> = items("devices", "devices", raw, MAX_DEVICES)?;
    devices
        .into_iter()
        .map(|device| {
            Ok(DeviceEntry {
                name: json::string("devices.name", device.name)?,
                gid: GidText::read(json::string("devices.gid", device.gid)?),
                lid: Lid(json::unsigned("devices.lid", device.lid)? as u16),
            })
        })
        .collect()
}

fn protocol(raw: Option<&RawValue>) -> Result<Protocol, DescriptorError> {
    let word = match raw {
        // Builds with several transports write a list; a build without them cannot read it, nor do we.
        Some(raw) if json::is_array(raw) => items::<String>("protocol", "protocols", Some(raw), 16)?.join(","),
        _ => json::string("protocol", raw)?,
    };
    Ok(match word.as_str() {
        "rdma" => Protocol::Rdma,
        "tcp" => Protocol::Tcp,
        _ => Protocol::Other(word),
    })
}

/// An array, or nothing; too long and of wrong types are two errors.
fn items<'a, T: Deserialize<'a>>(
    member: &'static str,
    what: &'static str,
    raw: Option<&'a RawValue>,
    limit: usize,
) -> Result<Vec<T>, DescriptorError> {
    match extra::list(member, raw, limit)? {
        extra::List::Whole(items) => Ok(items),
        extra::List::TooLong => Err(DescriptorError::TooLarge { what, limit }),
    }
}

#[cfg(test)]
mod tests;
