//! The handshake and the life of a rail, explored: two whole brains, and every order of what is between them.
//!
//! ```text
//!   brain ──hello──▶ net: arrives, is lost, comes twice, comes when its sender no longer waits ──▶ brain
//!     ▲ jobs: at once, or when they like; what is in RTR and to what it leads is kept (device.rs)     ▲
//!     └ core: tries out, fails, drains             processes die and start again, ports go and come  ─┘
//! ```
//! The code under test is [`Brain`], with its judges of messages; driver, devices, cores and network are the model. It is led to
//! each state anew, as a brain cannot be copied. What must hold is listed in `laws.rs`; and from each state both ends must be
//! able to come together, with nothing left over of what was before.
//!
//! Not in it: stock peers, several rails of a peer, evictions, stores that fail, a node that stops.

mod device;
mod driver;
#[path = "../../../../datapath/tests/explore/mod.rs"]
mod explore;
mod laws;
mod world;

use explore::{Explored, explore};
use world::{KEPT, Pair, Plan, Rules, Slow};

/// More states than any exploration here has.
const MOST: usize = 20_000;

/// Both want the rail, and nothing goes wrong.
const BOTH: Plan = Plan {
    wants: [true, true],
    losses: 0,
    doubles: 0,
    lates: 0,
    restarts: 0,
    failures: 0,
    ports: 0,
    pauses: 0,
    slow: Slow { connect: true, fail: true },
    rules: KEPT,
};

/// One wants it.
const ONE: Plan = Plan { wants: [true, false], ..BOTH };

/// Jobs are done as soon as they are asked for.
const AT_ONCE: Slow = Slow { connect: false, fail: false };

fn explored(name: &str, plan: &Plan) -> Result<Explored, String> {
    explore(name, MOST, || Pair::new(plan))
}

#[test]
fn two_ends_come_together_whatever_happens_to_their_messages() {
    let plans = [
        ("handshake: both ask", BOTH),
        ("handshake: both ask, one message is lost", Plan { losses: 1, ..BOTH }),
        ("handshake: both ask, one request comes twice", Plan { doubles: 1, ..BOTH }),
        ("handshake: both ask, one request comes late", Plan { lates: 1, ..BOTH }),
        ("handshake: one asks, one lost, one twice", Plan { losses: 1, doubles: 1, ..ONE }),
        ("handshake: both ask, something takes long", Plan { pauses: 1, ..BOTH }),
    ];
    for (name, plan) in plans {
        explored(name, &plan).unwrap();
    }
}

#[test]
fn two_ends_come_together_after_a_restart_in_the_middle() {
    let plans = [
        ("restart: both ask", Plan { restarts: 1, slow: AT_ONCE, ..BOTH }),
        ("restart: one asks", Plan { restarts: 1, ..ONE }),
        ("restart: one asks, one request comes twice", Plan { restarts: 1, doubles: 1, slow: AT_ONCE, ..ONE }),
        ("restart: one asks, one message is lost", Plan { restarts: 1, losses: 1, slow: AT_ONCE, ..ONE }),
    ];
    for (name, plan) in plans {
        explored(name, &plan).unwrap();
    }
}

#[test]
fn a_rail_that_fails_comes_back_and_nothing_is_taken_for_fenced_too_early() {
    let plans = [
        ("rail: it fails", Plan { failures: 1, ..ONE }),
        ("rail: it fails twice", Plan { failures: 2, ..ONE }),
        ("rail: it fails, and one message is lost", Plan { failures: 1, losses: 1, ..ONE }),
        ("rail: it fails, and something takes long", Plan { failures: 1, pauses: 1, slow: AT_ONCE, ..ONE }),
        ("rail: it fails, both want it", Plan { failures: 1, slow: AT_ONCE, ..BOTH }),
        ("rail: a port goes down and up", Plan { ports: 1, ..ONE }),
        ("rail: it fails, and a port goes down and up", Plan { ports: 1, failures: 1, slow: AT_ONCE, ..ONE }),
    ];
    for (name, plan) in plans {
        explored(name, &plan).unwrap();
    }
}

#[test]
fn the_search_finds_each_rule_that_is_switched_off() {
    let broken = |plan: Plan| explored("two brains, a rule off", &plan).unwrap_err();
    let with = |rules: Rules| Plan { rules, ..ONE };

    let told = broken(Plan { failures: 1, ..with(Rules { err_is_err: false, ..KEPT }) });
    assert!(told.contains("its other end still takes packets"), "{told}");
    let told = broken(Plan { losses: 1, ..with(Rules { exchanges_end: false, ..KEPT }) });
    assert!(told.contains("no end can be reached any more"), "{told}");
    let told = broken(Plan { ports: 1, ..with(Rules { ports_speak: false, ..KEPT }) });
    assert!(told.contains("does not know that its port is up"), "{told}");
}
