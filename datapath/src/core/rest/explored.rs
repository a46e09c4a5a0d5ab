//! Resting, explored: every order of a core's own thread, two callers and the NIC.
//!
//! A model of [`super`] and [`crate::core::run`], one access to what is shared at a time; each of a caller's ways of going on (it
//! waits and turns the core, it gives up and sleeps, it goes away) is in every order. What is looked for: an end can be reached
//! from everywhere without the bound on the own thread's sleep, which would hide a wake-up that is lost. Not in it: the memory
//! order of one access and the next, for which the fences stand.

use crate::explore::{World, explore};

const CALLERS: usize = 2;

/// What it rests on; each can be turned round to see that the search finds out.
#[derive(Clone, Copy)]
struct Rules {
    /// The own thread says that it will sleep.
    announces: bool,
    /// It arms the completion queue before it looks for the last time.
    arms: bool,
    /// It looks once more after it has put the core to rest.
    looks_again: bool,
    /// When a nap ends by itself.
    naps_end: Ends,
    /// A caller may go away after it has submitted.
    goes_away: bool,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Ends {
    Always,
    /// Only where no caller wants the core any more.
    Unwanted,
    Never,
}

const KEPT: Rules = Rules { announces: true, arms: true, looks_again: true, naps_end: Ends::Always, goes_away: true };
/// Callers turn the core or wait for one who does: then no nap has to end while one wants the core.
const CALLED: Rules = Rules { naps_end: Ends::Unwanted, goes_away: false, ..KEPT };

/// Where the own thread is.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
enum Own {
    Turns,
    Announced,
    Armed,
    /// Nothing was there at the last look.
    PutsToSleep,
    Put,
    Sleeps,
    Wakes,
    Finished,
    /// Begins a nap, with the core or without.
    BeginsNap(bool),
    PutsToNap,
    PutForNap,
    Naps,
    WakesFromNap {
        rung: bool,
    },
    FinishedNap {
        rung: bool,
    },
}

/// Where a caller is.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
enum Caller {
    Begins,
    Enqueued,
    SawSleeper,
    Took,
    Turned,
    PutBack,
    /// Submitted: waits, or goes away.
    Submitted,
    Waits,
    Leads,
    PutsBack,
    LooksAgain,
    GivesUp,
    Calls,
    Rings,
    SleepsOnIt,
    Gone,
}

/// Where a request is.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
enum Request {
    Unborn,
    InRing,
    Posted,
    Completed,
    Done,
}

#[derive(Clone, PartialEq, Eq, Hash)]
struct State {
    own: Own,
    callers: [Caller; CALLERS],
    requests: [Request; CALLERS],
    at_rest: bool,
    /// The doorbell: somebody sleeps, and it was rung.
    sleeping: bool,
    rung: bool,
    /// The own thread was called.
    called: bool,
    /// It sleeps rather than naps.
    sleeps: bool,
    /// Turned by a caller since the own thread looked.
    led: bool,
    armed: bool,
    event: bool,
}

struct Resting {
    state: State,
    rules: Rules,
}

#[derive(Clone, Copy, Debug)]
enum Step {
    Own,
    /// The own thread has nothing to do and goes to sleep; or naps, as a caller waits.
    ToSleep,
    ToNap,
    NapEnds,
    Caller(usize),
    /// What a caller may do instead.
    Instead(usize),
    Completes(usize),
}

impl State {
    fn ring_is_empty(&self) -> bool {
        !self.requests.contains(&Request::InRing)
    }

    fn turn(&mut self) -> bool {
        let mut did = false;
        for request in &mut self.requests {
            let next = match *request {
                Request::InRing => Request::Posted,
                Request::Completed => Request::Done,
                other => other,
            };
            did |= next != *request;
            *request = next;
        }
        did
    }

    fn ring(&mut self) {
        if std::mem::take(&mut self.sleeping) {
            self.rung = true;
        }
    }

    fn is_wanted(&self) -> bool {
        self.callers.iter().any(|caller| matches!(caller, Caller::Waits | Caller::Leads))
    }

    fn needs_a_turn(&self) -> bool {
        !self.ring_is_empty() || self.called
    }

    fn answers(&mut self) -> bool {
        std::mem::take(&mut self.called)
    }

    fn finish(&mut self) {
        (self.sleeping, self.rung) = (false, false);
    }

    fn own(&mut self, rules: Rules) {
        self.own = match self.own {
            Own::Turns => {
                self.turn();
                Own::Turns
            }
            Own::Announced => {
                self.armed |= rules.arms;
                Own::Armed
            }
            Own::Armed => {
                if self.turn() {
                    self.finish();
                    Own::Turns
                } else {
                    Own::PutsToSleep
                }
            }
            Own::PutsToSleep => {
                self.armed |= !rules.arms;
                (self.sleeps, self.led, self.at_rest) = (true, false, true);
                Own::Put
            }
            Own::Put if rules.looks_again && self.needs_a_turn() => Own::Wakes,
            Own::Put | Own::Sleeps if self.rung || self.event => Own::Wakes,
            Own::Put | Own::Sleeps => Own::Sleeps,
            Own::Wakes => {
                self.sleeps = false;
                self.finish();
                Own::Finished
            }
            Own::Finished if !std::mem::take(&mut self.at_rest) => Own::BeginsNap(false),
            Own::Finished => {
                self.event = false;
                if self.answers() || !self.led { Own::Turns } else { Own::BeginsNap(true) }
            }
            Own::BeginsNap(with) => {
                (self.led, self.sleeping) = (false, true);
                if with || std::mem::take(&mut self.at_rest) { Own::PutsToNap } else { Own::Naps }
            }
            Own::PutsToNap => {
                self.at_rest = true;
                Own::PutForNap
            }
            Own::PutForNap if rules.looks_again && self.needs_a_turn() => Own::WakesFromNap { rung: true },
            Own::PutForNap => Own::Naps,
            Own::Naps => Own::WakesFromNap { rung: self.rung },
            Own::WakesFromNap { rung } => {
                self.finish();
                Own::FinishedNap { rung }
            }
            Own::FinishedNap { rung } => match std::mem::take(&mut self.at_rest) {
                true if self.answers() || rung || !self.led => Own::Turns,
                with => Own::BeginsNap(with),
            },
        };
    }

    fn caller(&mut self, at: usize) {
        let done = self.requests[at] == Request::Done;
        self.callers[at] = match self.callers[at] {
            Caller::Begins => {
                self.requests[at] = Request::InRing;
                Caller::Enqueued
            }
            Caller::Enqueued if self.sleeping => Caller::SawSleeper,
            Caller::SawSleeper if std::mem::take(&mut self.at_rest) => Caller::Took,
            Caller::Enqueued | Caller::SawSleeper => Caller::Submitted,
            Caller::Took => {
                self.turn();
                self.led = true;
                Caller::Turned
            }
            Caller::Turned => {
                self.at_rest = true;
                Caller::PutBack
            }
            Caller::PutBack => {
                if self.needs_a_turn() || self.sleeps {
                    self.ring();
                }
                Caller::Submitted
            }
            Caller::Waits | Caller::SleepsOnIt if done => Caller::Gone,
            Caller::Waits if std::mem::take(&mut self.at_rest) => Caller::Leads,
            Caller::Submitted | Caller::Waits => Caller::Waits,
            Caller::Leads => {
                self.turn();
                self.led = true;
                if self.requests[at] == Request::Done { Caller::PutsBack } else { Caller::Leads }
            }
            Caller::PutsBack => {
                self.at_rest = true;
                Caller::LooksAgain
            }
            Caller::LooksAgain => {
                if self.needs_a_turn() || self.sleeps {
                    self.ring();
                }
                Caller::Gone
            }
            Caller::GivesUp => {
                self.at_rest = true;
                Caller::Calls
            }
            Caller::Calls => {
                self.called = true;
                Caller::Rings
            }
            Caller::Rings => {
                self.ring();
                Caller::SleepsOnIt
            }
            other => other,
        };
    }
}

impl World for Resting {
    type Step = Step;
    type Key = State;

    fn steps(&self) -> Vec<Step> {
        let state = &self.state;
        let mut steps = Vec::new();
        match state.own {
            Own::Turns => {
                steps.extend([Step::Own, Step::ToSleep]);
                if state.is_wanted() {
                    steps.push(Step::ToNap);
                }
            }
            Own::Sleeps if !state.rung && !state.event => {}
            Own::Naps => {
                if state.rung {
                    steps.push(Step::Own);
                }
                if match self.rules.naps_end {
                    Ends::Always => true,
                    Ends::Unwanted => !state.is_wanted(),
                    Ends::Never => false,
                } {
                    steps.push(Step::NapEnds);
                }
            }
            _ => steps.push(Step::Own),
        }
        for (at, caller) in state.callers.iter().enumerate() {
            match caller {
                Caller::Gone => {}
                Caller::Submitted if !self.rules.goes_away => steps.push(Step::Caller(at)),
                Caller::Submitted | Caller::Waits | Caller::Leads => {
                    steps.extend([Step::Caller(at), Step::Instead(at)]);
                }
                _ => steps.push(Step::Caller(at)),
            }
            if state.requests[at] == Request::Posted {
                steps.push(Step::Completes(at));
            }
        }
        steps
    }

    fn take(&mut self, step: &Step) {
        let (state, rules) = (&mut self.state, self.rules);
        match *step {
            Step::Own => state.own(rules),
            Step::ToSleep => {
                state.sleeping = rules.announces;
                state.own = Own::Announced;
            }
            Step::ToNap => state.own = Own::BeginsNap(true),
            Step::NapEnds => state.own = Own::WakesFromNap { rung: false },
            Step::Caller(at) => state.caller(at),
            Step::Instead(at) => {
                state.callers[at] = match state.callers[at] {
                    Caller::Submitted => Caller::Gone,
                    Caller::Waits => Caller::SleepsOnIt,
                    _ => Caller::GivesUp,
                };
            }
            Step::Completes(at) => {
                state.requests[at] = Request::Completed;
                if std::mem::take(&mut state.armed) {
                    state.event = true;
                }
            }
        }
    }

    fn key(&self) -> State {
        self.state.clone()
    }

    fn check(&self) -> Result<(), String> {
        let state = &self.state;
        let own = matches!(
            state.own,
            Own::Turns | Own::Announced | Own::Armed | Own::PutsToSleep | Own::BeginsNap(true) | Own::PutsToNap
        );
        let with = |caller: &&Caller| {
            matches!(caller, Caller::Took | Caller::Turned | Caller::Leads | Caller::PutsBack | Caller::GivesUp)
        };
        match usize::from(own) + state.callers.iter().filter(with).count() + usize::from(state.at_rest) {
            1 => Ok(()),
            holders => Err(format!("the core has {holders} holders")),
        }
    }

    fn is_over(&self) -> bool {
        let done = |request: &Request| *request == Request::Done;
        self.state.callers == [Caller::Gone; CALLERS] && self.state.requests.iter().all(done)
    }

    fn fork(&self) -> Option<Self> {
        Some(Self { state: self.state.clone(), rules: self.rules })
    }
}

fn search(name: &str, rules: Rules) -> Result<(), String> {
    let state = State {
        own: Own::Turns,
        callers: [Caller::Begins; CALLERS],
        requests: [Request::Unborn; CALLERS],
        at_rest: false,
        sleeping: false,
        rung: false,
        called: false,
        sleeps: false,
        led: false,
        armed: false,
        event: false,
    };
    explore(name, 2_000_000, || Resting { state: state.clone(), rules }).map(drop)
}

#[test]
fn a_core_has_one_holder_and_nothing_is_left_alone_for_good() {
    search("resting", KEPT).unwrap();
}

#[test]
fn where_nobody_goes_away_no_nap_has_to_end_while_a_caller_wants_the_core() {
    search("resting, called", CALLED).unwrap();
}

#[test]
fn every_rule_is_needed() {
    let broken = [
        ("announce", Rules { announces: false, ..KEPT }),
        ("arm", Rules { arms: false, ..KEPT }),
        ("look again", Rules { looks_again: false, ..KEPT }),
        ("naps end", Rules { naps_end: Ends::Never, ..KEPT }),
    ];
    for (name, rules) in broken {
        assert!(search(name, rules).is_err(), "{name} is not needed");
    }
}
