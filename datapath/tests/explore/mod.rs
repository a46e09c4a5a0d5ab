//! Exhaustive search: every state that a small world can get into, breadth first, so that what is found is found by the
//! shortest way.
//!
//! A world may be the real code in a harness: one that cannot be cloned is made anew and led to the state again, step by
//! step. [`World::key`] says which states count as one; what it leaves out is not told apart.
#![allow(dead_code)] // each test uses a part

use std::collections::HashMap;
use std::fmt::{Debug, Write as _};
use std::hash::Hash;

/// Something that can go on in several ways.
pub(crate) trait World: Sized {
    /// One thing that may happen.
    type Step: Clone + Debug;
    /// What tells states apart.
    type Key: Hash + Eq;

    /// Everything that may happen next.
    fn steps(&self) -> Vec<Self::Step>;
    /// Lets it happen.
    fn take(&mut self, step: &Self::Step);
    fn key(&self) -> Self::Key;
    /// What must hold in every state.
    fn check(&self) -> Result<(), String>;
    /// Whether this is an end: from every state one must be within reach.
    fn is_over(&self) -> bool;
    /// A copy, where that is possible.
    fn fork(&self) -> Option<Self> {
        None
    }
}

/// How much there was to see.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Explored {
    pub(crate) states: usize,
    pub(crate) transitions: usize,
    pub(crate) ends: usize,
    /// Steps to the farthest state.
    pub(crate) depth: usize,
}

struct Seen<S> {
    /// The state it was first reached from, and how; `None` for the first.
    from: Option<(usize, S)>,
    depth: usize,
    over: bool,
    /// States that lead here.
    before: Vec<usize>,
}

/// Visits every state that can be reached from `start`, and prints how many there are.
///
/// # Errors
/// What is broken and the shortest way there, step by step: [`World::check`] failed, or no end can be reached any more, or there are
/// more than `most` states.
pub(crate) fn explore<W: World>(name: &str, most: usize, start: impl Fn() -> W) -> Result<Explored, String> {
    let mut seen: Vec<Seen<W::Step>> = Vec::new();
    let mut known: HashMap<W::Key, usize> = HashMap::new();
    let mut copies: Vec<Option<W>> = Vec::new();
    let first = start();
    known.insert(first.key(), 0);
    seen.push(Seen { from: None, depth: 0, over: first.is_over(), before: Vec::new() });
    first.check().map_err(|why| told(name, &why, &seen, 0))?;
    copies.push(first.fork());
    let (mut transitions, mut at) = (0, 0);
    while at < seen.len() {
        let copy = copies[at].take();
        let here = copy.unwrap_or_else(|| replayed(&start, &seen, at));
        let steps = here.steps();
        let mut here = Some(here);
        for (number, step) in steps.iter().enumerate() {
            let last = number + 1 == steps.len();
            let copy = here.as_ref().and_then(World::fork);
            // The last way on may use the state itself up.
            let mut next = match copy {
                Some(copy) => copy,
                None if last => here.take().expect("used up by the last step only"),
                None => replayed(&start, &seen, at),
            };
            next.take(step);
            transitions += 1;
            let key = next.key();
            if let Some(&id) = known.get(&key) {
                seen[id].before.push(at);
                // A check may look at more than the key tells apart.
                next.check().map_err(|why| format!("{}\n  {step:?}", told(name, &why, &seen, at)))?;
                continue;
            }
            let id = seen.len();
            let depth = seen[at].depth + 1;
            known.insert(key, id);
            seen.push(Seen { from: Some((at, step.clone())), depth, over: next.is_over(), before: vec![at] });
            next.check().map_err(|why| told(name, &why, &seen, id))?;
            copies.push(next.fork());
            if seen.len() > most {
                return Err(told(name, &format!("more than {most} states"), &seen, id));
            }
        }
        at += 1;
    }
    if let Some(stuck) = without_end(&seen) {
        return Err(told(name, "no end can be reached any more", &seen, stuck));
    }
    let explored = Explored {
        states: seen.len(),
        transitions,
        ends: seen.iter().filter(|state| state.over).count(),
        depth: seen.last().map_or(0, |state| state.depth),
    };
    println!(
        "{name}: {} states, {} transitions, {} ends, {} steps deep",
        explored.states, explored.transitions, explored.ends, explored.depth
    );
    Ok(explored)
}

fn way<S: Clone>(seen: &[Seen<S>], to: usize) -> Vec<S> {
    let mut steps: Vec<S> = std::iter::successors(seen[to].from.clone(), |(from, _)| seen[*from].from.clone())
        .map(|(_, step)| step)
        .collect();
    steps.reverse();
    steps
}

fn replayed<W: World>(start: &impl Fn() -> W, seen: &[Seen<W::Step>], to: usize) -> W {
    let mut world = start();
    for step in way(seen, to) {
        world.take(&step);
    }
    world
}

/// The first state from which no end can be reached.
fn without_end<S>(seen: &[Seen<S>]) -> Option<usize> {
    let mut ends: Vec<bool> = seen.iter().map(|state| state.over).collect();
    let mut todo: Vec<usize> = (0..seen.len()).filter(|at| ends[*at]).collect();
    while let Some(at) = todo.pop() {
        for &before in &seen[at].before {
            if !std::mem::replace(&mut ends[before], true) {
                todo.push(before);
            }
        }
    }
    ends.iter().position(|reaches| !reaches)
}

fn told<S: Clone + Debug>(name: &str, why: &str, seen: &[Seen<S>], at: usize) -> String {
    let mut text = format!("{name}: {why}, after");
    for step in way(seen, at) {
        let _ = write!(text, "\n  {step:?}");
    }
    text
}
