//! Which NICs serve which memory location: `{"cpu:0":[["mlx5_0"],["mlx5_1"]]}`, location → [preferred, available].
//!
//! The same JSON stands in a segment descriptor (`priority_matrix`), in the `nic_priority_matrix` option and in the file
//! that `MC_CUSTOM_TOPO_JSON` names. People write the latter two, so an error says which entry is wrong and how.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use serde::de::{Deserialize, Deserializer, Error, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde::ser::{Serialize, Serializer};

use super::hash_order;
use crate::wire::json;

/// Most locations a matrix may have.
pub const MAX_LOCATIONS: usize = 4096;
/// Most NIC names one list of it may have.
pub const MAX_NICS: usize = 1024;

/// NICs of one location, by name.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct NicPreference {
    /// Near this memory: used first.
    pub preferred: Vec<String>,
    /// Usable: used when no preferred one is.
    pub available: Vec<String>,
}

impl NicPreference {
    /// Preferred, then available.
    pub fn all(&self) -> impl Iterator<Item = &str> {
        self.preferred.iter().chain(&self.available).map(String::as_str)
    }
}

/// Location → NICs.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct PriorityMatrix(pub BTreeMap<String, NicPreference>);

/// A matrix that someone wrote and that is none.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error(
    "the NIC priority matrix is not usable: {why}. It takes, for each location, two lists of device names, \
     for example {{\"cpu:0\": [[\"mlx5_0\"], [\"mlx5_1\"]]}} (preferred, then others)"
)]
pub struct MatrixError {
    /// Which entry, and what is wrong with it.
    pub why: String,
}

impl PriorityMatrix {
    /// Reads JSON text; comments are allowed.
    ///
    /// # Errors
    /// Not JSON, not an object, or an entry that is not two lists of names.
    pub fn parse(text: &str) -> Result<Self, MatrixError> {
        serde_json::from_str(&json::without_comments(text)).map_err(|e| MatrixError { why: e.to_string() })
    }

    /// Compact JSON text.
    pub fn to_json(&self) -> String {
        serde_json::to_string(self).unwrap_or_default()
    }

    /// The NICs for memory at `location`: its own, else those of `*`, else every NIC as preferred.
    pub fn for_location(&self, location: &str) -> NicPreference {
        [location, "*"]
            .iter()
            .find_map(|l| self.0.get(*l).filter(|nics| nics.all().next().is_some()))
            .cloned()
            .unwrap_or_else(|| NicPreference {
                preferred: self.names().into_iter().map(str::to_owned).collect(),
                available: Vec::new(),
            })
    }

    /// Every NIC named, once, in alphabetical order.
    pub fn names(&self) -> BTreeSet<&str> {
        self.0.values().flat_map(NicPreference::all).collect()
    }

    /// Every NIC named, once, in the order in which a stock process numbers them: by first appearance while it walks
    /// its hash map of the locations.
    pub fn numbering(&self) -> Vec<&str> {
        let mut names = Vec::new();
        for location in hash_order::iteration(self.0.keys().map(String::as_str)) {
            for name in self.0.get(location).into_iter().flat_map(NicPreference::all) {
                if !names.contains(&name) {
                    names.push(name);
                }
            }
        }
        names
    }
}

impl Serialize for PriorityMatrix {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.collect_map(self.0.iter().map(|(location, nics)| (location, (&nics.preferred, &nics.available))))
    }
}

/// One list of names, bounded.
struct Names(Vec<String>);

impl<'de> Deserialize<'de> for Names {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct Bounded;
        impl<'de> Visitor<'de> for Bounded {
            type Value = Names;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a list of device names")
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Names, A::Error> {
                let mut names = Vec::new();
                while let Some(name) = items.next_element::<String>()? {
                    if names.len() == MAX_NICS {
                        return Err(A::Error::custom(format_args!("more than {MAX_NICS} device names in one list")));
                    }
                    names.push(name);
                }
                Ok(Names(names))
            }
        }
        from.deserialize_seq(Bounded)
    }
}

/// The two lists of a location.
struct Pair(NicPreference);

impl<'de> Deserialize<'de> for Pair {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct Two;
        impl<'de> Visitor<'de> for Two {
            type Value = Pair;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("exactly two lists of device names")
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Pair, A::Error> {
                let mut list = |at| match items.next_element::<Names>() {
                    Ok(Some(names)) => Ok(names.0),
                    Ok(None) => Err(A::Error::invalid_length(at, &Two)),
                    Err(e) => Err(e),
                };
                let (preferred, available) = (list(0)?, list(1)?);
                match items.next_element::<IgnoredAny>()? {
                    Some(_) => Err(A::Error::custom("more than two lists")),
                    None => Ok(Pair(NicPreference { preferred, available })),
                }
            }
        }
        from.deserialize_seq(Two)
    }
}

impl<'de> Deserialize<'de> for PriorityMatrix {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct Locations;
        impl<'de> Visitor<'de> for Locations {
            type Value = PriorityMatrix;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object whose members are memory locations")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut members: A) -> Result<PriorityMatrix, A::Error> {
                let mut matrix = BTreeMap::new();
                while let Some(location) = members.next_key::<String>()? {
                    if matrix.len() == MAX_LOCATIONS {
                        return Err(A::Error::custom(format_args!("more than {MAX_LOCATIONS} locations")));
                    }
                    let Pair(nics) = members
                        .next_value()
                        .map_err(|e| A::Error::custom(format_args!("location {location:?}: {e}")))?;
                    matrix.insert(location, nics);
                }
                Ok(PriorityMatrix(matrix))
            }
        }
        from.deserialize_map(Locations)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn matrix(text: &str) -> PriorityMatrix {
        PriorityMatrix::parse(text).unwrap()
    }

    #[test]
    fn reads_and_writes_the_documented_form() {
        let text = r#"{"cpu:0":[["mlx5_0"],["mlx5_1"]],"cuda:0":[["mlx5_1"],["mlx5_0"]]}"#;
        assert_eq!(matrix(text).to_json(), text);
        assert_eq!(matrix("{ /* none */ }"), PriorityMatrix::default());
    }

    #[test]
    fn an_error_names_the_entry_and_shows_a_right_one() {
        for (text, word) in [
            (r#"{"cpu:1": [["a"]]}"#, "cpu:1"),
            (r#"{"cpu:1": [["a"], ["b"], []]}"#, "more than two"),
            (r#"{"cpu:1": "a"}"#, "exactly two lists"),
            (r#"{"cpu:1": [["a"], [7]]}"#, "integer `7`"),
            ("[]", "an object"),
            ("{", "EOF"),
        ] {
            let message = PriorityMatrix::parse(text).unwrap_err().to_string();
            assert!(message.contains(word) && message.contains("for example {\"cpu:0\""), "{message}");
        }
    }

    proptest! {
        #[test]
        fn any_matrix_survives_and_no_mutation_panics(
            entries in prop::collection::btree_map("[a-z]{1,4}:[0-9]", (names(), names()), 0..5), end: prop::sample::Index,
            changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..6),
        ) {
            let pair = |(preferred, available)| NicPreference { preferred, available };
            let matrix = PriorityMatrix(entries.into_iter().map(|(place, both)| (place, pair(both))).collect());
            let mut text = matrix.to_json().into_bytes();
            prop_assert_eq!(PriorityMatrix::parse(&matrix.to_json()).unwrap(), matrix);
            for (at, byte) in &changes {
                let at = at.index(text.len());
                text[at] = *byte;
            }
            text.truncate(end.index(text.len() + 1));
            let _ = PriorityMatrix::parse(&String::from_utf8_lossy(&text));
        }
    }

    fn names() -> impl Strategy<Value = Vec<String>> {
        prop::collection::vec("[a-z]{1,6}_[0-9]", 0..4)
    }

    #[test]
    fn an_unknown_location_falls_back_to_the_star_then_to_all() {
        let with_star = matrix(r#"{"*":[["s"],[]],"cpu:0":[["a"],["b"]],"cpu:1":[[],[]]}"#);
        assert_eq!(with_star.for_location("cpu:0").all().collect::<Vec<_>>(), ["a", "b"]);
        assert_eq!(with_star.for_location("cpu:1").preferred, ["s"]);
        assert_eq!(matrix(r#"{"cpu:0":[["b"],["a"]]}"#).for_location("cuda:3").preferred, ["a", "b"]);
    }

    #[test]
    fn stock_processes_number_the_second_node_first() {
        let two = matrix(r#"{"cpu:0":[["a"],["b"]],"cpu:1":[["b"],["a"]]}"#);
        assert_eq!(two.numbering(), ["b", "a"]);
    }
}
