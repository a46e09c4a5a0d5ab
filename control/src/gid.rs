//! Which entry of a port's GID table to use: pure, from the table to a choice with its reason.
//!
//! Lowest rank first, then lowest index; the ranks are those of the stock engine, so that a mixed cluster agrees on which
//! network carries its traffic.

use std::fmt;

use moonrail_datapath::nic::{GidEntry, GidKind};
use moonrail_datapath::units::{Gid, GidIndex};

/// What an entry is good for, best first.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum GidClass {
    /// Routable, with a network device.
    NetworkRoutable,
    /// Routable, no network device known.
    Routable,
    /// Private IPv4 (10/8, 172.16/12, 100.64/10), with a network device.
    NetworkPrivate,
    /// Link-local, or of a container or tunnel interface, with a network device.
    NetworkDegraded,
    /// Private IPv4, no network device known.
    Private,
    /// Link-local, no network device known.
    Degraded,
    /// RoCE v1 or an unknown type: only when there is nothing else.
    Fallback,
}

impl GidClass {
    /// The words the stock engine logs.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::NetworkRoutable => "network-routable",
            Self::Routable => "no-network-routable",
            Self::NetworkPrivate => "network-private-v4",
            Self::NetworkDegraded => "network-degraded",
            Self::Private => "no-network-private-v4",
            Self::Degraded => "no-network-degraded",
            Self::Fallback => "fallback-nonzero",
        }
    }
}

impl fmt::Display for GidClass {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// How the choice came about.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum GidReason {
    /// By rule: best class, then lowest index.
    Ranked,
    /// The user gave the index.
    Fixed,
}

/// The entry to use.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct GidChoice {
    /// Its index now; look it up again by value after every change of the table.
    pub index: GidIndex,
    /// Its value.
    pub gid: Gid,
    /// Its type.
    pub kind: GidKind,
    /// What it is good for.
    pub class: GidClass,
    /// How it was chosen.
    pub reason: GidReason,
    /// Every other entry that is not empty, and why it was not taken.
    pub rejected: Vec<(GidIndex, String)>,
}

/// Why no entry can be used.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum GidError {
    /// The given index is outside the table.
    #[error(
        "GID index {index} is outside the table of {len} entries: set MC_GID_INDEX to one of {usable}, or unset it"
    )]
    OutOfTable {
        /// The index given.
        index: GidIndex,
        /// Entries of the table.
        len: usize,
        /// Indices that could be used, for people.
        usable: String,
    },
    /// The given index is an empty slot.
    #[error(
        "GID is NULL, please check your GID index by specifying MC_GID_INDEX: index {index} is empty, \
         set it to one of {usable}, or unset it"
    )]
    NullAtIndex {
        /// The index given.
        index: GidIndex,
        /// Indices that could be used, for people.
        usable: String,
    },
    /// No entry is set.
    #[error(
        "GID is NULL, please check your GID index by specifying MC_GID_INDEX: all {len} entries are empty; \
         give the port's network interface an IP address and bring it up"
    )]
    NoGid {
        /// Entries of the table.
        len: usize,
    },
}

/// What an entry is good for; `None` for an empty slot.
pub fn classify(entry: &GidEntry) -> Option<GidClass> {
    if entry.gid.is_zero() {
        return None;
    }
    let network = entry.net_device.as_deref().is_some_and(|name| !name.is_empty());
    Some(match entry.kind {
        GidKind::RoceV2 if is_degraded(entry) => {
            if network {
                GidClass::NetworkDegraded
            } else {
                GidClass::Degraded
            }
        }
        GidKind::RoceV2 if is_private(entry.gid) => {
            if network {
                GidClass::NetworkPrivate
            } else {
                GidClass::Private
            }
        }
        GidKind::RoceV2 | GidKind::Ib => {
            if network {
                GidClass::NetworkRoutable
            } else {
                GidClass::Routable
            }
        }
        GidKind::RoceV1 | GidKind::Other(_) => GidClass::Fallback,
    })
}

fn is_degraded(entry: &GidEntry) -> bool {
    let container = |name: &str| {
        name == "tunl0" || ["flannel", "cni", "calico", "vxlan", "docker"].iter().any(|start| name.starts_with(start))
    };
    entry.gid.is_link_local() || entry.net_device.as_deref().is_some_and(container)
}

/// 10/8, 172.16/12 and 100.64/10. Not 192.168/16: the stock rule, kept so that both ends rank alike.
fn is_private(gid: Gid) -> bool {
    gid.to_ipv4().is_some_and(|ip| match ip.octets() {
        [10, ..] => true,
        [172, b, ..] => b & 0xf0 == 16,
        [100, b, ..] => b & 0xc0 == 64,
        _ => false,
    })
}

/// Chooses from `table`: the entry at `fixed` (`MC_GID_INDEX`) if that is given, else the best by rule.
///
/// # Errors
/// See [`GidError`]; each says what to set.
pub fn choose(table: &[GidEntry], fixed: Option<GidIndex>) -> Result<GidChoice, GidError> {
    choose_excluding(table, fixed, &[])
}

/// As [`choose`], passing over values that were tried and did not work (re-selection after RTR was refused).
/// A fixed index is never passed over.
///
/// # Errors
/// As [`choose`]; [`GidError::NoGid`] also when every entry was tried.
pub fn choose_excluding(table: &[GidEntry], fixed: Option<GidIndex>, tried: &[Gid]) -> Result<GidChoice, GidError> {
    let mut ranked: Vec<(GidClass, &GidEntry)> =
        table.iter().filter_map(|entry| Some((classify(entry)?, entry))).collect();
    ranked.sort_by_key(|(class, entry)| (*class, entry.index));
    let (class, chosen) = match fixed {
        Some(index) => at_index(table, &ranked, index)?,
        None => {
            *ranked.iter().find(|(_, entry)| !tried.contains(&entry.gid)).ok_or(GidError::NoGid { len: table.len() })?
        }
    };
    let rejected = ranked
        .iter()
        .filter(|(_, entry)| entry.index != chosen.index)
        .map(|(other, entry)| (entry.index, why_not(*other, entry, class, fixed, tried)));
    Ok(GidChoice {
        index: chosen.index,
        gid: chosen.gid,
        kind: chosen.kind,
        class,
        reason: if fixed.is_some() { GidReason::Fixed } else { GidReason::Ranked },
        rejected: rejected.collect(),
    })
}

fn at_index<'a>(
    table: &[GidEntry],
    ranked: &[(GidClass, &'a GidEntry)],
    index: GidIndex,
) -> Result<(GidClass, &'a GidEntry), GidError> {
    if let Some(found) = ranked.iter().find(|(_, entry)| entry.index == index) {
        return Ok(*found);
    }
    if ranked.is_empty() {
        return Err(GidError::NoGid { len: table.len() });
    }
    let usable = ranked.iter().map(|(_, entry)| entry.index.to_string()).collect::<Vec<_>>().join(", ");
    Err(if table.iter().any(|entry| entry.index == index) {
        GidError::NullAtIndex { index, usable }
    } else {
        GidError::OutOfTable { index, len: table.len(), usable }
    })
}

fn why_not(other: GidClass, entry: &GidEntry, chosen: GidClass, fixed: Option<GidIndex>, tried: &[Gid]) -> String {
    if fixed.is_some() {
        format!("{other}; the index was given")
    } else if tried.contains(&entry.gid) {
        format!("{other}; tried, and the connection was refused")
    } else if other == chosen {
        format!("{other} too; a lower index goes first")
    } else if entry.kind == GidKind::RoceV1 {
        format!("{other}: RoCE v1 cannot be routed, it is used only when there is nothing else")
    } else {
        format!("{other}, less good than {chosen}")
    }
}

/// The entry that now has this value and type: indices move when addresses come and go.
pub fn find_by_value(table: &[GidEntry], gid: Gid, kind: GidKind) -> Option<&GidEntry> {
    table.iter().find(|entry| entry.gid == gid && entry.kind == kind && !gid.is_zero())
}

/// How likely two GIDs reach each other, best first: an order of trying, never an exclusion (routers and overlays
/// connect what looks apart).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Reach {
    /// Same kind of address and the same leading bits (IPv4: 24, else 64).
    SameNetwork,
    /// Same kind of address.
    SameFamily,
    /// An IPv4 address and an IPv6 one, or a link-local one and one that is not.
    Mixed,
    /// One of the two is empty.
    Never,
}

/// Judges the pair; see [`Reach`].
pub fn reachable(local: Gid, peer: Gid) -> Reach {
    if local.is_zero() || peer.is_zero() {
        return Reach::Never;
    }
    let same = match (local.to_ipv4(), peer.to_ipv4()) {
        (Some(a), Some(b)) => a.octets()[..3] == b.octets()[..3],
        (None, None) if local.is_link_local() == peer.is_link_local() => local.0[..8] == peer.0[..8],
        _ => return Reach::Mixed,
    };
    if same { Reach::SameNetwork } else { Reach::SameFamily }
}
