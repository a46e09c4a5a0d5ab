//! From keys to segments.

use std::collections::BTreeMap;
use std::time::Duration;

use moonrail_control::metadata::keys::Entry;
use moonrail_control::metadata::{Held, KeySpace, RpcMeta, SegmentDescriptor};

use super::probe::Life;

/// A value, or why it cannot be read.
pub type Read<T> = Result<T, String>;

/// What the store has under one name.
#[derive(Clone, Debug)]
pub struct Record {
    /// The name.
    pub name: String,
    /// Its descriptor; `None`: there is none.
    pub segment: Option<Read<SegmentDescriptor>>,
    /// Where its handshake port is; `None`: nobody says.
    pub address: Option<Read<RpcMeta>>,
    /// How long its keys live unless renewed: the shortest; `None`: until somebody deletes them.
    pub lease: Option<Duration>,
    /// Whether the node answers.
    pub life: Life,
    /// The keys, as they were seen.
    pub keys: Vec<Held>,
}

impl Record {
    fn new(name: String) -> Self {
        Self { name, segment: None, address: None, lease: None, life: Life::unprobed(), keys: Vec::new() }
    }

    /// Bytes that the segment offers.
    pub fn bytes(&self) -> u64 {
        self.descriptor().map_or(0, |d| d.buffers.iter().map(|b| b.length).fold(0, u64::saturating_add))
    }

    /// The descriptor, if it is there and can be read.
    pub fn descriptor(&self) -> Option<&SegmentDescriptor> {
        self.segment.as_ref()?.as_ref().ok()
    }

    /// Who wrote it, as far as the descriptor tells.
    pub fn engine(&self) -> &'static str {
        match self.descriptor() {
            Some(d) if d.extra.is_empty() => "stock",
            Some(_) => "moonrail",
            None => "-",
        }
    }
}

/// Puts the keys of each name together, in the order of the names; what is no key of this cluster is left out.
pub fn group(space: &KeySpace, held: Vec<Held>) -> Vec<Record> {
    let mut records: BTreeMap<String, Record> = BTreeMap::new();
    for held in held {
        let Some(entry) = space.entry(&held.key) else { continue };
        let (Entry::RpcMeta(name) | Entry::Segment(name)) = &entry;
        let record = records.entry(name.clone()).or_insert_with(|| Record::new(name.clone()));
        match entry {
            Entry::RpcMeta(_) => {
                record.address = Some(RpcMeta::decode(&held.value).map_err(|e| e.to_string()));
            }
            Entry::Segment(_) => {
                record.segment = Some(SegmentDescriptor::decode(&held.value).map_err(|e| e.to_string()));
            }
        }
        record.lease = match (record.lease, held.lease) {
            (Some(a), Some(b)) => Some(a.min(b)),
            (a, b) => a.or(b),
        };
        record.keys.push(held);
    }
    records.into_values().collect()
}
