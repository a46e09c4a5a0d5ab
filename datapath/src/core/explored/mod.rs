//! A core, explored: the life of its queue pairs, and the health of its rails, in every order of what device and control do.
//!
//! ```text
//!  the code                      the model (device.rs, world.rs)
//!  Core::poll_once ◀─ commands ─ control: connects, retires, moves to ERR, destroys, fences, gives up
//!        │      └──── events ──▶
//!        └─ posts ─▶ device: ends requests in post order, fails, flushes, repeats completions, says nothing
//! ```
//! One turn of the core is one step; what comes between turns comes in every order. What must hold is listed in `laws.rs`.
//! Not in it: several cores (`work/explored.rs`), rails that are asked back (`tests/core.rs`), credit by bandwidth.

mod device;
mod laws;
mod world;

use std::sync::Arc;

use crate::explore::{Explored, explore};
use crate::nic::Op;
use crate::region::Region;
use device::Lies;
use world::{CoreWorld, KEPT, Plan, Rules, region};

/// More states than any exploration here has.
const MOST: usize = 1_000_000;

/// One rail of two queue pairs, with room for less than there is to post: the life of queue pairs.
fn one_rail() -> Plan {
    Plan {
        op: Op::Write,
        slices: 3,
        retries: 1,
        rails: vec![2],
        queue: 2,
        entries: 2,
        lives: 2,
        failures: 1,
        silences: 0,
        swallows: false,
        doubles: 0,
        retires: 0,
        cancels: 0,
        rules: KEPT,
    }
}

/// Two rails of one queue pair each: which of them is used.
fn two_rails() -> Plan {
    Plan { slices: 2, rails: vec![1, 1], queue: 2, entries: 8, lives: 2, failures: 2, ..one_rail() }
}

fn explored(name: &str, plan: &Plan, local: &Arc<Region>) -> Result<Explored, String> {
    explore(name, MOST, || CoreWorld::new(plan, local))
}

#[test]
fn queue_pairs_of_a_rail_live_and_end_in_every_order() {
    let local = region();
    let plans = [
        ("queue pairs: one fails", one_rail()),
        ("queue pairs: silence", Plan { failures: 0, silences: 1, slices: 2, ..one_rail() }),
        ("queue pairs: they swallow", Plan { failures: 0, silences: 2, swallows: true, slices: 1, ..one_rail() }),
        ("queue pairs: a completion comes late", Plan { slices: 1, rails: vec![1], doubles: 2, ..one_rail() }),
        ("queue pairs: control retires a life", Plan { slices: 1, failures: 0, retires: 1, ..one_rail() }),
        ("queue pairs: cancelled", Plan { slices: 1, cancels: 1, failures: 0, silences: 1, ..one_rail() }),
    ];
    for (name, plan) in plans {
        explored(name, &plan, &local).unwrap();
    }
}

#[test]
fn rails_fail_and_come_back_in_every_order() {
    let local = region();
    let plans = [
        ("rails: failures", two_rails()),
        ("rails: READs that fail", Plan { op: Op::Read, ..two_rails() }),
        ("rails: one comes back", Plan { slices: 1, lives: 3, failures: 1, ..two_rails() }),
        ("rails: silence", Plan { slices: 1, silences: 1, ..two_rails() }),
        ("rails: no retry", Plan { retries: 0, failures: 1, ..two_rails() }),
    ];
    for (name, plan) in plans {
        explored(name, &plan, &local).unwrap();
    }
}

#[test]
fn the_search_finds_each_rule_that_is_switched_off() {
    let local = region();
    let broken = |plan: Plan| explored("a core, a rule off", &plan, &local).unwrap_err();
    let with = |rules: Rules| Plan { slices: 2, rules, ..one_rail() };
    let lies = |lies: Lies| Rules { lies, ..KEPT };

    let told = broken(with(lies(Lies { drains_clean: true, ..Lies::default() })));
    assert!(told.contains("terminal, and something may still land"), "{told}");
    let told = broken(Plan { doubles: 1, ..with(lies(Lies { generations: true, ..Lies::default() })) });
    assert!(told.contains("Double"), "{told}");
    let told = broken(with(lies(Lies { entries: 1, ..Lies::default() })));
    assert!(told.contains("in 1 entries"), "{told}");
    let told = broken(with(Rules { drains_first: false, ..KEPT }));
    assert!(told.contains("terminal, and something may still land"), "{told}");
    let told = broken(Plan { silences: 2, failures: 0, ..with(Rules { destroys: false, ..KEPT }) });
    assert!(told.contains("Destroy"), "{told}");
    let told = broken(Plan { silences: 1, swallows: true, ..with(Rules { moves_to_error: false, ..KEPT }) });
    assert!(told.contains("no end can be reached any more"), "{told}");
    let told = broken(with(Rules { fences: false, ..KEPT }));
    assert!(told.contains("no end can be reached any more"), "{told}");
}
