//! Where things lie in the store.
//!
//! ```text
//! mooncake/[CLUSTER/]rpc_meta/NAME     address of the node's handshake port
//! mooncake/[CLUSTER/]ram/NAME          segment descriptor of a name without '/'
//! mooncake/[CLUSTER/]NAME              segment descriptor of a name with '/' anywhere in it
//! ```

use std::fmt;

/// Environment variable with the cluster's id.
pub const CLUSTER_ID_VARIABLE: &str = "MC_METADATA_CLUSTER_ID";

const ROOT: &str = "mooncake/";
const RPC_META: &str = "rpc_meta/";
const RAM: &str = "ram/";

/// The keys of one cluster. Two clusters with different ids share a store without seeing each other.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct KeySpace {
    prefix: String,
}

impl Default for KeySpace {
    fn default() -> Self {
        Self::new("")
    }
}

/// What lies under a key.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub enum Entry {
    /// The handshake address of the node of this name.
    RpcMeta(String),
    /// The segment of this name.
    Segment(String),
}

/// Whether a key is of a handshake address, by the rule of Mooncake's HTTP server: an address is not put over another's.
pub(crate) fn is_address(key: &str) -> bool {
    key.contains("rpc_meta")
}

impl fmt::Display for Entry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::RpcMeta(name) => write!(f, "address of {name}"),
            Self::Segment(name) => write!(f, "segment {name}"),
        }
    }
}

impl KeySpace {
    /// Keys of the cluster named `cluster_id`, the value of [`CLUSTER_ID_VARIABLE`]; empty = none.
    pub fn new(cluster_id: &str) -> Self {
        let slash = if cluster_id.is_empty() || cluster_id.ends_with('/') { "" } else { "/" };
        Self { prefix: format!("{ROOT}{cluster_id}{slash}") }
    }

    /// What every key begins with; for watches and listings.
    pub fn prefix(&self) -> &str {
        &self.prefix
    }

    /// Key of a node's handshake address.
    pub fn rpc_meta(&self, server_name: &str) -> String {
        format!("{}{RPC_META}{server_name}", self.prefix)
    }

    /// Key of a segment.
    pub fn segment(&self, segment_name: &str) -> String {
        let ram = if segment_name.contains('/') { "" } else { RAM };
        format!("{}{ram}{segment_name}", self.prefix)
    }

    /// What lies under `key`; `None` outside this cluster. Keys of a cluster with an id look, from one without, like
    /// segments with a `/` in their names: the layout leaves that open.
    pub fn entry(&self, key: &str) -> Option<Entry> {
        let rest = key.strip_prefix(&self.prefix)?;
        if let Some(name) = rest.strip_prefix(RPC_META) {
            return (!name.is_empty()).then(|| Entry::RpcMeta(name.to_owned()));
        }
        let name = rest.strip_prefix(RAM).filter(|name| !name.contains('/')).unwrap_or(rest);
        (!name.is_empty()).then(|| Entry::Segment(name.to_owned()))
    }
}

/// The name under which a segment is opened: leading `/` do not count.
pub fn segment_name(given: &str) -> &str {
    given.trim_start_matches('/')
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn keys_seen_in_a_store() {
        let plain = KeySpace::default();
        assert_eq!(plain.segment("127.0.0.1:12345"), "mooncake/ram/127.0.0.1:12345");
        assert_eq!(plain.rpc_meta("127.0.0.1:12345"), "mooncake/rpc_meta/127.0.0.1:12345");
        assert_eq!(plain.segment("a/b"), "mooncake/a/b");
        assert_eq!(plain.rpc_meta("a/b"), "mooncake/rpc_meta/a/b");
        for id in ["c1", "c1/"] {
            assert_eq!(KeySpace::new(id).segment("n"), "mooncake/c1/ram/n");
        }
        assert_eq!(KeySpace::new("c1").entry("mooncake/ram/n"), None);
    }

    proptest! {
        #[test]
        fn a_key_leads_back_to_its_name(cluster in "[a-z]{0,3}", name in "[a-z:.]{1,6}(/[a-z]{1,3})?") {
            prop_assume!(!name.starts_with("ram/"));
            let keys = KeySpace::new(&cluster);
            prop_assert_eq!(keys.entry(&keys.rpc_meta(&name)), Some(Entry::RpcMeta(name.clone())));
            prop_assert_eq!(keys.entry(&keys.segment(&name)), Some(Entry::Segment(name)));
        }
    }
}
