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

/// A value and its type: what makes a GID the same wherever it stands.
pub type GidValue = (Gid, GidKind);

/// What a port goes on with when its table has changed: the GID it began with, wherever that stands now. While that one is
/// gone, the one `used` last if no other is of a better class, else the best by rule. With `choose` off only the first will do.
///
/// One that only stood in must not stay: when an address goes, what is left for a moment may be the link-local one, and no
/// peer of an IPv4 network reaches that.
pub fn settle(table: &[GidEntry], began: GidValue, used: GidValue, choose: bool) -> Option<&GidEntry> {
    let find = |(gid, kind): GidValue| find_by_value(table, gid, kind);
    if let Some(found) = find(began) {
        return Some(found);
    }
    let best = || self::choose(table, None).ok().and_then(|best| find((best.gid, best.kind)));
    let best = best().filter(|_| choose)?;
    Some(find(used).filter(|entry| classify(entry) <= classify(best)).unwrap_or(best))
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

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn v4(octets: [u8; 4]) -> Gid {
        Gid(std::net::Ipv4Addr::from(octets).to_ipv6_mapped().octets())
    }

    fn link_local(last: u8) -> Gid {
        Gid([0xfe, 0x80, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, last])
    }

    fn entry(index: u32, gid: Gid, kind: GidKind, net: Option<&str>) -> GidEntry {
        GidEntry { index: GidIndex(index), gid, kind, net_device: net.map(str::to_owned) }
    }

    fn chosen(table: &[GidEntry]) -> (u32, GidClass) {
        let choice = choose(table, None).unwrap();
        (choice.index.0, choice.class)
    }

    /// The table a Soft-RoCE device has, and the choice a stock engine makes on it.
    #[test]
    fn the_ipv4_address_beats_the_link_local_one_before_it() {
        let table = [
            entry(0, link_local(1), GidKind::RoceV2, Some("eth0")),
            entry(1, v4([10, 0, 0, 1]), GidKind::RoceV2, Some("eth0")),
        ];
        assert_eq!(chosen(&table), (1, GidClass::NetworkPrivate));
        let choice = choose(&table, None).unwrap();
        assert_eq!(choice.rejected, [(GidIndex(0), "network-degraded, less good than network-private-v4".to_owned())]);
    }

    /// An address is deleted and added again, at another index: what stood in for it meanwhile does not stay.
    #[test]
    fn the_first_choice_is_taken_again_when_it_is_back() {
        let v2 = GidKind::RoceV2;
        let (own, other) = (v4([10, 0, 1, 2]), v4([10, 0, 1, 99]));
        let local = entry(0, link_local(2), v2, Some("eth1"));
        let began = (own, v2);
        let settled = |table: &[GidEntry], used: Gid, choose| settle(table, began, (used, v2), choose).map(|e| e.gid);
        let gone = [local.clone()];
        assert_eq!(settled(&gone, own, true), Some(link_local(2)));
        assert_eq!(settled(&gone, own, false), None, "the user fixed it");
        let better = [local.clone(), entry(1, other, v2, Some("eth1"))];
        assert_eq!(settled(&better, link_local(2), true), Some(other), "no peer reaches the link-local one");
        let equal = [local.clone(), entry(1, v4([10, 0, 1, 98]), v2, Some("eth1")), entry(2, other, v2, Some("eth1"))];
        assert_eq!(settled(&equal, other, true), Some(other), "nothing is won by another of the same class");
        let back = [local, entry(1, other, v2, Some("eth1")), entry(2, own, v2, Some("eth1"))];
        assert_eq!(settled(&back, other, true), Some(own));
        assert_eq!(settled(&back, own, false), Some(own));
        assert_eq!(settled(&[], own, true), None);
    }

    #[test]
    fn classes_of_the_rule() {
        use GidClass::{Degraded, Fallback, NetworkDegraded, NetworkPrivate, NetworkRoutable, Private, Routable};
        let v2 = GidKind::RoceV2;
        for (gid, kind, net, class) in [
            (v4([8, 8, 8, 8]), v2, Some("eth0"), NetworkRoutable),
            (v4([192, 168, 0, 1]), v2, Some("eth0"), NetworkRoutable),
            (v4([8, 8, 8, 8]), v2, None, Routable),
            (v4([172, 31, 0, 1]), v2, Some("eth0"), NetworkPrivate),
            (v4([172, 32, 0, 1]), v2, Some("eth0"), NetworkRoutable),
            (v4([100, 64, 0, 1]), v2, None, Private),
            (v4([100, 128, 0, 1]), v2, None, Routable),
            (v4([8, 8, 8, 8]), v2, Some("docker0"), NetworkDegraded),
            (v4([8, 8, 8, 8]), v2, Some("tunl0"), NetworkDegraded),
            (v4([8, 8, 8, 8]), v2, Some("tunl01"), NetworkRoutable),
            (link_local(1), v2, None, Degraded),
            (link_local(1), GidKind::Ib, None, Routable),
            (v4([8, 8, 8, 8]), GidKind::RoceV1, Some("eth0"), Fallback),
            (v4([8, 8, 8, 8]), GidKind::Other(9), None, Fallback),
        ] {
            assert_eq!(classify(&entry(0, gid, kind, net)), Some(class), "{gid} {kind:?} {net:?}");
        }
        assert_eq!(classify(&entry(0, Gid::ZERO, v2, Some("eth0"))), None);
    }

    #[test]
    fn a_given_index_is_taken_or_the_error_says_which_would_do() {
        let v2 = GidKind::RoceV2;
        let table =
            [entry(0, Gid::ZERO, v2, None), entry(1, v4([9, 0, 0, 1]), v2, None), entry(2, link_local(1), v2, None)];
        let choice = choose(&table, Some(GidIndex(2))).unwrap();
        assert_eq!((choice.gid, choice.reason, choice.rejected.len()), (link_local(1), GidReason::Fixed, 1));
        let null = choose(&table, Some(GidIndex(0))).unwrap_err().to_string();
        let stock = "GID is NULL, please check your GID index by specifying MC_GID_INDEX";
        assert!(null.starts_with(stock) && null.contains("one of 1, 2"), "{null}");
        let outside = choose(&table, Some(GidIndex(7))).unwrap_err().to_string();
        assert!(outside.contains("outside the table of 3 entries") && outside.contains("1, 2"), "{outside}");
        assert!(choose(&table[..1], None).unwrap_err().to_string().starts_with(stock));
        assert_eq!(choose(&[], Some(GidIndex(0))), Err(GidError::NoGid { len: 0 }));
    }

    #[test]
    fn reselection_passes_over_what_was_tried() {
        let v2 = GidKind::RoceV2;
        let table = [entry(0, v4([9, 0, 0, 1]), v2, None), entry(1, v4([9, 0, 0, 2]), v2, None)];
        let second = choose_excluding(&table, None, &[v4([9, 0, 0, 1])]).unwrap();
        assert_eq!(second.gid, v4([9, 0, 0, 2]));
        assert!(second.rejected[0].1.contains("tried"));
        assert!(choose_excluding(&table, None, &[v4([9, 0, 0, 1]), v4([9, 0, 0, 2])]).is_err());
    }

    #[test]
    fn near_addresses_go_first_and_none_but_empty_ones_are_ruled_out() {
        let reach = |a, b| reachable(a, b);
        assert_eq!(reach(v4([10, 0, 0, 1]), v4([10, 0, 0, 9])), Reach::SameNetwork);
        assert_eq!(reach(v4([10, 0, 0, 1]), v4([10, 9, 0, 9])), Reach::SameFamily);
        assert_eq!(reach(link_local(1), link_local(2)), Reach::SameNetwork);
        assert_eq!(reach(v4([10, 0, 0, 1]), link_local(2)), Reach::Mixed);
        assert_eq!(reach(Gid::ZERO, link_local(2)), Reach::Never);
    }

    fn any_gid() -> impl Strategy<Value = Gid> {
        prop_oneof![
            2 => Just(Gid::ZERO),
            3 => any::<[u8; 4]>().prop_map(v4),
            2 => any::<u8>().prop_map(link_local),
            1 => any::<[u8; 16]>().prop_map(Gid),
        ]
    }

    fn any_table() -> impl Strategy<Value = Vec<GidEntry>> {
        let kind = prop::sample::select(vec![GidKind::Ib, GidKind::RoceV1, GidKind::RoceV2, GidKind::Other(3)]);
        let net = prop::option::of(prop::sample::select(vec!["", "eth0", "docker0", "tunl0", "cni0"]));
        prop::collection::vec((any_gid(), kind, net), 0..12).prop_map(|rows| {
            rows.into_iter().enumerate().map(|(at, (gid, kind, net))| entry(at as u32, gid, kind, net)).collect()
        })
    }

    proptest! {
        #[test]
        fn the_choice_is_the_best_of_the_table(table in any_table()) {
            let usable = table.iter().filter(|e| !e.gid.is_zero()).count();
            match choose(&table, None) {
                Err(error) => prop_assert_eq!((usable, error), (0, GidError::NoGid { len: table.len() })),
                Ok(choice) => {
                    prop_assert!(!choice.gid.is_zero());
                    prop_assert_eq!(choice.rejected.len() + 1, usable);
                    let better = |e: &&GidEntry| classify(e).is_some_and(|c| (c, e.index) < (choice.class, choice.index));
                    prop_assert!(table.iter().find(better).is_none());
                    let v2 = table.iter().any(|e| e.kind == GidKind::RoceV2 && !e.gid.is_zero());
                    prop_assert!(!(v2 && choice.kind == GidKind::RoceV1));
                    prop_assert_eq!(find_by_value(&table, choice.gid, choice.kind).map(|e| e.gid), Some(choice.gid));
                }
            }
        }

        #[test]
        fn moving_entries_changes_the_index_and_not_the_class(table in any_table(), turn: prop::sample::Index) {
            prop_assume!(!table.is_empty());
            let mut moved = table.clone();
            moved.rotate_left(turn.index(table.len()));
            for (at, entry) in moved.iter_mut().enumerate() { entry.index = GidIndex(at as u32); }
            let class = |table: &[GidEntry]| choose(table, None).map(|choice| choice.class);
            prop_assert_eq!(class(&moved), class(&table));
        }
    }
}
