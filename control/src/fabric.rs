//! Which fabric carries what goes to a peer: pure, from what both ends have, what was asked for and what has failed.
//!
//! Shared memory before RDMA before TCP, unless somebody prefers another order or takes one only. No choice is silent: it
//! comes with its reason, which also says why nothing better was taken.

use moonrail_datapath::nic::Fabric;

/// What an embedder asks for. The default takes the best fabric that works.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct FabricPolicy {
    /// This one or none: without it transfers fail with the cause.
    pub require: Option<Fabric>,
    /// This one first, then the others, best first. Means nothing beside `require`.
    pub prefer: Option<Fabric>,
}

impl FabricPolicy {
    /// Over `fabric` or not at all.
    pub const fn require(fabric: Fabric) -> Self {
        Self { require: Some(fabric), prefer: None }
    }

    /// Over `fabric` where it works.
    pub const fn prefer(fabric: Fabric) -> Self {
        Self { require: None, prefer: Some(fabric) }
    }

    /// The fabrics it allows, in its order.
    fn order(self) -> impl Iterator<Item = Fabric> {
        let first = self.require.or(self.prefer);
        let rest = Fabric::ALL.into_iter().filter(move |f| self.require.is_none() && Some(*f) != first);
        first.into_iter().chain(rest)
    }
}

/// How one fabric stands between this node and a peer.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Standing {
    /// Both ends have it; the reason why it can be used, in words.
    Offered(String),
    /// One end lacks it; what and why.
    Missing(String),
    /// Both ends have it, but it does not work now; the cause.
    Failed(String),
}

impl Standing {
    fn trouble(&self) -> Option<&str> {
        match self {
            Self::Offered(_) => None,
            Self::Missing(why) | Self::Failed(why) => Some(why),
        }
    }
}

/// How each fabric stands, by [`Fabric`].
pub type Standings = [Standing; 3];

/// What was chosen, and why.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Choice {
    /// The fabric.
    pub fabric: Fabric,
    /// Why it, and why nothing that comes before it.
    pub why: String,
}

/// Chooses the first fabric in the policy's order that is offered.
///
/// # Errors
/// In words, why none of those that are allowed can be used.
pub fn choose(policy: FabricPolicy, standings: &Standings) -> Result<Choice, String> {
    let mut passed = Vec::new();
    for fabric in policy.order() {
        match &standings[fabric as usize] {
            Standing::Offered(why) => {
                passed.insert(0, why.clone());
                return Ok(Choice { fabric, why: passed.join("; ") });
            }
            other => passed.push(format!("no {fabric}: {}", other.trouble().unwrap_or_default())),
        }
    }
    let asked = policy.require.map_or_else(String::new, |fabric| format!("{fabric} is required; "));
    Err(format!("{asked}{}", passed.join("; ")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn offered() -> Standing {
        Standing::Offered("both have it".into())
    }

    #[test]
    fn the_best_that_is_offered_is_taken_and_says_why_nothing_better_was() {
        let standings = [
            Standing::Missing("other host".into()),
            Standing::Failed("port down".into()),
            Standing::Offered("a port".into()),
        ];
        let choice = choose(FabricPolicy::default(), &standings).unwrap();
        assert_eq!(choice.fabric, Fabric::Tcp);
        assert_eq!(choice.why, "a port; no shm: other host; no rdma: port down");
    }

    #[test]
    fn what_is_required_and_does_not_work_is_an_error_with_its_cause() {
        let standings = [offered(), Standing::Failed("port down".into()), offered()];
        let error = choose(FabricPolicy::require(Fabric::Rdma), &standings).unwrap_err();
        assert_eq!(error, "rdma is required; no rdma: port down");
    }

    #[test]
    fn what_is_preferred_comes_first_and_the_rest_follows() {
        let mut standings = [offered(), offered(), offered()];
        assert_eq!(choose(FabricPolicy::prefer(Fabric::Tcp), &standings).unwrap().fabric, Fabric::Tcp);
        standings[Fabric::Tcp as usize] = Standing::Missing("none".into());
        assert_eq!(choose(FabricPolicy::prefer(Fabric::Tcp), &standings).unwrap().fabric, Fabric::Shm);
    }

    fn any_standing() -> impl Strategy<Value = Standing> {
        prop_oneof![
            Just(Standing::Offered("o".into())),
            Just(Standing::Missing("m".into())),
            Just(Standing::Failed("f".into()))
        ]
    }

    fn any_fabric() -> impl Strategy<Value = Option<Fabric>> {
        prop::option::of(prop::sample::select(&Fabric::ALL))
    }

    proptest! {
        #[test]
        fn a_choice_is_offered_and_allowed_and_an_error_means_that_nothing_was(
            standings in [any_standing(), any_standing(), any_standing()],
            require in any_fabric(),
            prefer in any_fabric(),
        ) {
            let policy = FabricPolicy { require, prefer };
            let usable = |f: &Fabric| {
                matches!(standings[*f as usize], Standing::Offered(_)) && require.is_none_or(|only| only == *f)
            };
            match choose(policy, &standings) {
                Ok(choice) => prop_assert!(usable(&choice.fabric)),
                Err(_) => prop_assert!(!Fabric::ALL.iter().any(usable)),
            }
        }
    }
}
