//! Cancel, explored: every order in which two cores, a canceller and the fence can use one Work.
//!
//! The code is [`Work`]: its cursor, return map and counts, one of its operations at a time. The model is who calls them, in the
//! order in which `core/{post, fault, watch, settle}` and [`Work::abandon`] do. Not in it: the memory order within an
//! operation, for which the fences beside `close` and `give_back` stand.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use super::tests::work;
use super::{Completion, Work, WorkParts};
use crate::error::{Cause, SliceError};
use crate::explore::{World, explore};

const ERROR: SliceError = SliceError::of(Cause::Cancelled);

/// What the protocol rests on; each can be switched off to see that the search finds out.
#[derive(Clone, Copy)]
struct Rules {
    /// A hold is added before the slice it protects is given back.
    hold_first: bool,
    /// Who gives a slice back looks whether the Work is closed, and ends what lies there.
    looks: bool,
    /// The home core ends what lies in a closed Work's return map.
    watches: bool,
    /// Who closes the cursor ends only what nobody had claimed.
    only_unclaimed: bool,
    /// Rails stay after a flush. If not, only the rules above end what came back.
    rails: bool,
}

const KEPT: Rules = Rules { hold_first: true, looks: true, watches: true, only_unclaimed: true, rails: true };

/// Where a core is within one activity.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
enum At {
    Between,
    /// Took a slice out of the return map, and has not looked whether it may post it.
    Took(u32),
    /// Added the hold for a flushed slice.
    Held(u32),
    /// Gave it back, and has not looked whether the Work is closed. `unheld`: the hold is still to come.
    GaveBack {
        unheld: bool,
    },
    /// Ends what lies in the return map.
    Sweeping,
}

#[derive(Clone, PartialEq, Eq, Hash)]
struct CoreSide {
    at: At,
    in_flight: Vec<u32>,
    flushes_left: u8,
    /// Ended and not settled yet.
    owed: u32,
    /// Not fenced yet.
    holds: u32,
    has_rail: bool,
}

#[derive(Clone, PartialEq, Eq, Hash, Debug)]
enum Canceller {
    Waits,
    /// Closed the cursor; these are its to end.
    Closed(Vec<u32>),
    Done,
}

#[derive(Clone, Debug)]
enum Step {
    Claim(usize),
    TakeBack(usize),
    Look(usize),
    Complete(usize, u32),
    Hold(usize, u32),
    GiveBack(usize, u32),
    Sweep(usize),
    Watch(usize),
    Fenced(usize),
    Settle(usize),
    Close,
    EndUnclaimed,
}

/// As `like`, and not begun: memory is mapped once and not in every state.
fn anew(like: &Work) -> Arc<Work> {
    Work::new(WorkParts {
        op: like.op,
        slices: like.slices.clone(),
        transfers: like.transfers.iter().map(|transfer| transfer.len).collect(),
        local: like.local.clone(),
        remote: like.remote.clone(),
        submitted: like.submitted,
        deadline: like.deadline,
        cores: 2,
        retries: like.retries,
        completion: Completion::new(1),
    })
}

struct Cancel {
    rules: Rules,
    work: Arc<Work>,
    cores: Vec<CoreSide>,
    canceller: Canceller,
    ended: Vec<u8>,
    finished: u8,
}

impl Cancel {
    fn new(like: &Work, flushes: u8, rules: Rules) -> Self {
        let side = |flushes_left| CoreSide {
            at: At::Between,
            in_flight: Vec::new(),
            flushes_left,
            owed: 0,
            holds: 0,
            has_rail: true,
        };
        Self {
            rules,
            work: anew(like),
            cores: vec![side(flushes), side(flushes)],
            canceller: Canceller::Waits,
            ended: vec![0; like.slices.len()],
            finished: 0,
        }
    }

    fn fail(&mut self, slice: u32) {
        self.work.slice_failed(slice, ERROR);
        self.ended[slice as usize] += 1;
    }

    fn settle(&mut self, count: u32) {
        self.finished += u8::from(self.work.settle(count).is_some());
    }

    fn returned(&self) -> Vec<u32> {
        let bits = self.work.returned[0].load(Relaxed);
        (0..64).filter(|slice| bits & 1 << slice != 0).collect()
    }
}

impl World for Cancel {
    type Step = Step;
    type Key = (u64, u32, u32, Vec<u32>, Vec<CoreSide>, Canceller, Vec<u8>, u8);

    fn steps(&self) -> Vec<Step> {
        let mut steps = Vec::new();
        for (number, core) in self.cores.iter().enumerate() {
            match core.at {
                At::Between => {
                    if core.has_rail && self.work.has_unclaimed() {
                        steps.push(Step::Claim(number));
                    }
                    if core.has_rail && self.work.has_returned() {
                        steps.push(Step::TakeBack(number));
                    }
                    for &slice in &core.in_flight {
                        steps.push(Step::Complete(number, slice));
                        if core.flushes_left > 0 {
                            let hold = Step::Hold(number, slice);
                            steps.push(if self.rules.hold_first { hold } else { Step::GiveBack(number, slice) });
                        }
                    }
                    if self.rules.watches && number == 0 && self.work.is_closed() && self.work.has_returned() {
                        steps.push(Step::Watch(number));
                    }
                    if core.holds > 0 {
                        steps.push(Step::Fenced(number));
                    }
                    if core.owed > 0 {
                        steps.push(Step::Settle(number));
                    }
                }
                At::Took(_) | At::GaveBack { unheld: false } => steps.push(Step::Look(number)),
                At::Held(slice) => steps.push(Step::GiveBack(number, slice)),
                At::GaveBack { unheld: true } => steps.push(Step::Hold(number, 0)),
                At::Sweeping => steps.push(Step::Sweep(number)),
            }
        }
        match self.canceller {
            Canceller::Waits => steps.push(Step::Close),
            Canceller::Closed(_) => steps.push(Step::EndUnclaimed),
            Canceller::Done => {}
        }
        steps
    }

    fn take(&mut self, step: &Step) {
        let work = self.work.clone();
        match *step {
            Step::Claim(core) => self.cores[core].in_flight.extend(work.claim(1)),
            Step::TakeBack(core) => {
                self.cores[core].at = work.take_returned().map_or(At::Between, At::Took);
            }
            Step::Look(core) => match self.cores[core].at {
                At::Took(slice) if work.is_closed() => {
                    self.fail(slice);
                    self.cores[core].owed += 1;
                    self.cores[core].at = At::Between;
                }
                At::Took(slice) => {
                    self.cores[core].in_flight.push(slice);
                    self.cores[core].at = At::Between;
                }
                _ if self.rules.looks && work.is_closed() => self.cores[core].at = At::Sweeping,
                _ => self.cores[core].at = At::Between,
            },
            Step::Complete(core, slice) => {
                self.cores[core].in_flight.retain(|held| *held != slice);
                work.slice_done(slice);
                self.ended[slice as usize] += 1;
                self.cores[core].owed += 1;
            }
            Step::Hold(core, slice) => {
                work.hold();
                let side = &mut self.cores[core];
                side.holds += 1;
                side.at = if self.rules.hold_first { At::Held(slice) } else { At::GaveBack { unheld: false } };
            }
            Step::GiveBack(core, slice) => {
                let side = &mut self.cores[core];
                side.in_flight.retain(|held| *held != slice);
                side.flushes_left -= 1;
                side.has_rail &= self.rules.rails;
                side.at = At::GaveBack { unheld: !self.rules.hold_first };
                work.give_back(slice);
            }
            Step::Sweep(core) => match work.take_returned() {
                Some(slice) => {
                    self.fail(slice);
                    self.cores[core].owed += 1;
                }
                None => self.cores[core].at = At::Between,
            },
            Step::Watch(core) => self.cores[core].at = At::Sweeping,
            Step::Fenced(core) => {
                let side = &mut self.cores[core];
                side.owed += std::mem::take(&mut side.holds);
            }
            Step::Settle(core) => {
                let owed = std::mem::take(&mut self.cores[core].owed);
                self.settle(owed);
            }
            Step::Close => {
                let unclaimed = work.close();
                let all = 0..self.ended.len() as u32;
                self.canceller = Canceller::Closed(if self.rules.only_unclaimed { unclaimed } else { all }.collect());
            }
            Step::EndUnclaimed => {
                let Canceller::Closed(slices) = std::mem::replace(&mut self.canceller, Canceller::Done) else { return };
                let count = slices.len() as u32;
                for slice in slices {
                    self.fail(slice);
                }
                self.settle(count);
            }
        }
    }

    fn key(&self) -> Self::Key {
        (
            self.work.claimed.load(Relaxed),
            self.work.remaining.load(Relaxed),
            self.work.returned_count.load(Relaxed),
            self.returned(),
            self.cores.clone(),
            self.canceller.clone(),
            self.ended.clone(),
            self.finished,
        )
    }

    fn check(&self) -> Result<(), String> {
        if let Some(slice) = self.ended.iter().position(|times| *times > 1) {
            return Err(format!("slice {slice} ended twice"));
        }
        let returned = self.returned();
        for slice in 0..self.ended.len() as u32 {
            let flying: usize =
                self.cores.iter().map(|c| c.in_flight.iter().filter(|held| **held == slice).count()).sum();
            let taken = self.cores.iter().filter(|c| c.at == At::Took(slice)).count();
            let owners = flying + taken + usize::from(returned.contains(&slice));
            if owners > 1 || owners == 1 && self.ended[slice as usize] > 0 {
                return Err(format!(
                    "slice {slice} has {owners} owners, and ended {} times",
                    self.ended[slice as usize]
                ));
            }
        }
        let unended = self.ended.iter().map(|times| u32::from(*times == 0)).sum::<u32>();
        let promised: u32 = self.cores.iter().map(|c| c.owed + c.holds).sum();
        let to_come = self.cores.iter().any(|c| c.at == At::GaveBack { unheld: true });
        if self.work.is_terminal() && (unended > 0 || promised > 0 || to_come) {
            return Err("terminal, and something is out".to_owned());
        }
        if self.work.remaining.load(Relaxed) != unended + promised {
            return Err(format!("{unended} slices and {promised} of the cores, but {:?}", self.work.remaining));
        }
        if self.work.is_terminal() != (self.finished == 1)
            || self.work.is_terminal() != self.work.completion().is_done()
        {
            return Err(format!("reported finished {} times", self.finished));
        }
        Ok(())
    }

    fn is_over(&self) -> bool {
        self.work.is_terminal()
    }
}

#[test]
fn every_order_of_cancel_claims_returns_and_fence_ends_each_slice_once() {
    for (slices, flushes) in [(1, 2), (2, 1), (3, 1)] {
        let name = format!("cancel: {slices} slices, {flushes} flushes of each of two cores");
        let like = work(slices);
        let explored = explore(&name, 1_000_000, || Cancel::new(&like, flushes, KEPT)).unwrap();
        assert!(explored.states > 500, "{explored:?}");
    }
}

#[test]
fn without_rails_what_comes_back_to_a_closed_work_still_ends() {
    let rules = Rules { rails: false, ..KEPT };
    let like = work(2);
    explore("cancel: no rail after a flush", 1_000_000, || Cancel::new(&like, 1, rules)).unwrap();
}

#[test]
fn the_search_finds_each_rule_that_is_switched_off() {
    let like = work(2);
    let broken = |rules| explore("cancel, a rule off", 1_000_000, || Cancel::new(&like, 1, rules)).unwrap_err();
    let told = broken(Rules { hold_first: false, ..KEPT });
    assert!(told.contains("terminal, and something is out") && told.contains("GiveBack"), "{told}");
    let told = broken(Rules { only_unclaimed: false, ..KEPT });
    assert!(told.contains("slice 0 "), "{told}");
    let told = broken(Rules { looks: false, watches: false, rails: false, ..KEPT });
    assert!(told.contains("no end can be reached any more"), "{told}");
    println!("{told}");
}
