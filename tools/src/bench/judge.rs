//! Verification where the memory is: a node that runs `serve --verify` fills and checks its own memory on request.
//!
//! ```text
//!   bench                                       serve --verify
//!     │  notification moonrail.verify   {id, do: "check", at, len, step, count, iteration, reply_to}
//!     ├───────────────────────────────────────▶│ looks at its own bytes, without any NIC
//!     │◀───────────────────────────────────────┤
//!     │  notification moonrail.verified {id, bytes} or {id, mismatch} or {id, error}
//! ```
//! A request of any batch has the same small size: its blocks are an arithmetic series. What arrives is a stranger's:
//! every range is checked against the regions on offer before a byte is touched, and work per request has a limit.

use std::collections::HashMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use moonrail::{Engine, Notification, Region, Segment};
use serde::{Deserialize, Serialize};

use super::pattern::{self, Mismatch};
use crate::failure::{Failure, Result};

const ASK: &str = "moonrail.verify";
const ANSWER: &str = "moonrail.verified";
/// Bytes that one request may make us look at: as much as a buffer has, however often the blocks overlap.
const WORK_PER_REQUEST: u64 = 1 << 36;
/// Names of nodes that asked, kept open.
const ASKERS_KEPT: usize = 64;
/// Bytes compared or filled at a time.
const STEP: usize = 64 << 10;
/// How often a waiting thread looks for an answer.
const LOOK_EVERY: Duration = Duration::from_millis(2);

/// What is to be done with the blocks.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Task {
    /// Compare them with the pattern.
    Check,
    /// Write the pattern into them.
    Fill,
}

/// `count` blocks of `len` bytes, the first at `at`, each `step` bytes after the one before.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Blocks {
    /// Address of the first block in the node that is asked.
    pub at: u64,
    /// Bytes of a block.
    pub len: u64,
    /// From one block to the next.
    pub step: u64,
    /// Blocks.
    pub count: u64,
}

impl Blocks {
    /// Address and length of each.
    pub fn iter(self) -> impl Iterator<Item = (u64, u64)> {
        (0..self.count).map(move |i| (self.at + i * self.step, self.len))
    }

    /// Bytes of all blocks.
    pub fn bytes(self) -> u64 {
        self.len * self.count
    }

    /// First address and the one after the last; `None` if the numbers make no sense.
    fn span(self) -> Option<(u64, u64)> {
        let last = self.count.checked_sub(1)?.checked_mul(self.step)?.checked_add(self.at)?;
        let work = self.len.checked_mul(self.count)?;
        if self.len == 0 || work > WORK_PER_REQUEST {
            return None;
        }
        Some((self.at, last.checked_add(self.len)?))
    }
}

#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
struct Question {
    id: u64,
    #[serde(rename = "do")]
    task: Task,
    #[serde(flatten)]
    blocks: Blocks,
    iteration: u64,
    reply_to: String,
}

#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
struct Answer {
    id: u64,
    #[serde(flatten)]
    verdict: Verdict,
}

#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Verdict {
    Bytes(u64),
    Mismatch { addr: u64, expected: u8, found: u8, wrong: u64 },
    Error(String),
}

/// Fills or checks blocks of memory that this process owns.
///
/// # Errors
/// What is wrong with the request, in words.
pub fn carry_out(
    regions: &[Region],
    task: Task,
    blocks: Blocks,
    iteration: u64,
) -> std::result::Result<Option<Mismatch>, String> {
    let (start, end) = blocks.span().ok_or("the blocks asked for make no sense")?;
    let region = regions
        .iter()
        .find(|r| r.addr() <= start && end <= r.addr() + r.len())
        .ok_or_else(|| format!("{start:#x} to {end:#x} does not lie in one buffer offered here"))?;
    let mut first: Option<Mismatch> = None;
    let mut bytes = vec![0; STEP.min(usize::try_from(blocks.len).unwrap_or(STEP))];
    for (addr, len) in blocks.iter() {
        let mut done = 0;
        while done < len {
            let at = addr + done;
            let part = (len - done).min(bytes.len() as u64);
            let bytes = &mut bytes[..part as usize];
            let offset = at - region.addr();
            match task {
                Task::Fill => {
                    pattern::fill(bytes, at, iteration);
                    region.write(offset, bytes).map_err(|e| e.to_string())?;
                }
                Task::Check => {
                    region.read(offset, bytes).map_err(|e| e.to_string())?;
                    if let Err(wrong) = pattern::check(bytes, at, iteration) {
                        let sum = first.map_or(0, |m| m.wrong) + wrong.wrong;
                        first = Some(Mismatch { wrong: sum, ..first.unwrap_or(wrong) });
                    }
                }
            }
            done += part;
        }
    }
    Ok(first)
}

/// The side that owns the memory.
pub struct Witness<'a> {
    engine: &'a Engine,
    regions: &'a [Region],
    askers: HashMap<String, Segment>,
    answered: u64,
}

impl<'a> Witness<'a> {
    /// Speaks for `regions`.
    pub fn new(engine: &'a Engine, regions: &'a [Region]) -> Self {
        Self { engine, regions, askers: HashMap::new(), answered: 0 }
    }

    /// Answers what has arrived; returns how many questions.
    pub fn serve(&mut self) -> usize {
        let mut seen = 0;
        for notification in self.engine.notifications() {
            if notification.name != ASK {
                continue;
            }
            seen += 1;
            match serde_json::from_str::<Question>(&notification.message) {
                Ok(question) => self.answer(&question),
                Err(e) => eprintln!("warning: a verification request that cannot be read: {e}"),
            }
        }
        seen
    }

    /// Questions answered so far.
    pub fn answered(&self) -> u64 {
        self.answered
    }

    fn answer(&mut self, question: &Question) {
        let verdict = match carry_out(self.regions, question.task, question.blocks, question.iteration) {
            Ok(None) => Verdict::Bytes(question.blocks.bytes()),
            Ok(Some(Mismatch { addr, expected, found, wrong })) => Verdict::Mismatch { addr, expected, found, wrong },
            Err(reason) => Verdict::Error(reason),
        };
        self.answered += 1;
        if let Err(reason) = self.send(&question.reply_to, &Answer { id: question.id, verdict }) {
            eprintln!("warning: the answer to {} was not sent: {reason}", question.reply_to);
        }
    }

    fn send(&mut self, to: &str, answer: &Answer) -> std::result::Result<(), String> {
        if !self.askers.contains_key(to) {
            if self.askers.len() >= ASKERS_KEPT {
                self.askers.clear();
            }
            let segment = self.engine.open_segment(to).map_err(|e| e.to_string())?;
            self.askers.insert(to.to_owned(), segment);
        }
        let text = serde_json::to_string(answer).map_err(|e| e.to_string())?;
        self.engine.notify(&self.askers[to], ANSWER, &text).map_err(|e| e.to_string())
    }
}

/// The side that asks. Shared by all threads: whoever waits collects everybody's answers.
pub struct Judge<'a> {
    engine: &'a Engine,
    segment: &'a Segment,
    next: AtomicU64,
    answers: Mutex<HashMap<u64, Verdict>>,
    timeout: Duration,
}

impl<'a> Judge<'a> {
    /// Asks the node behind `segment`; an answer may take `timeout`.
    pub fn new(engine: &'a Engine, segment: &'a Segment, timeout: Duration) -> Self {
        Self { engine, segment, next: AtomicU64::new(1), answers: Mutex::default(), timeout }
    }

    /// Has the peer fill or check blocks of its memory.
    ///
    /// # Errors
    /// No answer in time, or the peer cannot do it.
    pub fn ask(&self, task: Task, blocks: Blocks, iteration: u64) -> Result<Option<Mismatch>> {
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let question = Question { id, task, blocks, iteration, reply_to: self.engine.name().to_owned() };
        let text = serde_json::to_string(&question)
            .map_err(|e| Failure::new(format!("a verification request cannot be written: {e}"), "report this"))?;
        self.engine.notify(self.segment, ASK, &text).map_err(|e| Failure::told(&e))?;
        let until = Instant::now() + self.timeout;
        loop {
            match self.take(id) {
                Some(Verdict::Bytes(_)) => return Ok(None),
                Some(Verdict::Mismatch { addr, expected, found, wrong }) => {
                    return Ok(Some(Mismatch { addr, expected, found, wrong }));
                }
                Some(Verdict::Error(reason)) => {
                    let cause = format!("{} could not verify: {reason}", self.segment.name());
                    return Err(Failure::new(cause, "start both ends anew, from the same version"));
                }
                None if Instant::now() >= until => {
                    let cause = format!(
                        "{} did not answer a verification request within {:?}",
                        self.segment.name(),
                        self.timeout
                    );
                    let next = format!(
                        "start it with `moonrail serve --verify`, see that it can reach this node as {}, or leave out \
                         --ask-target",
                        self.engine.name()
                    );
                    return Err(Failure::new(cause, next));
                }
                None => std::thread::sleep(LOOK_EVERY),
            }
        }
    }

    fn take(&self, id: u64) -> Option<Verdict> {
        let mut answers = self.answers.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        answers.extend(self.engine.notifications().iter().filter_map(read_answer));
        answers.remove(&id)
    }
}

fn read_answer(notification: &Notification) -> Option<(u64, Verdict)> {
    if notification.name != ANSWER {
        return None;
    }
    serde_json::from_str::<Answer>(&notification.message).ok().map(|answer| (answer.id, answer.verdict))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn messages_survive_their_text() {
        let blocks = Blocks { at: 0x7f00_0000_0000, len: 4096, step: 8192, count: 128 };
        let question = Question { id: 7, task: Task::Check, blocks, iteration: u64::MAX, reply_to: "a:1".into() };
        let text = serde_json::to_string(&question).unwrap();
        assert!(text.contains(r#""do":"check""#) && text.len() < 300, "{text}");
        assert_eq!(serde_json::from_str::<Question>(&text).unwrap(), question);
        for verdict in [
            Verdict::Bytes(5),
            Verdict::Mismatch { addr: 1, expected: 2, found: 3, wrong: 4 },
            Verdict::Error("no".into()),
        ] {
            let answer = Answer { id: 9, verdict };
            let text = serde_json::to_string(&answer).unwrap();
            assert_eq!(serde_json::from_str::<Answer>(&text).unwrap(), answer, "{text}");
        }
    }

    proptest! {
        #[test]
        fn no_request_of_a_stranger_panics(at: u64, len: u64, step: u64, count: u64) {
            let blocks = Blocks { at, len, step, count };
            if let Some((start, end)) = blocks.span() {
                prop_assert!(start < end && blocks.bytes() <= WORK_PER_REQUEST);
            }
            prop_assert!(carry_out(&[], Task::Check, blocks, 0).is_err());
        }
    }
}
