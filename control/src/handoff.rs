//! The rings between the control thread and the cores: commands down, in order and never lost; events up, and what only
//! has to be woken or dropped is done here, without troubling the brain.

use std::collections::VecDeque;
use std::sync::Arc;

use moonrail_datapath::core::port::{Command, CoreEvent};
use moonrail_datapath::units::CoreId;
use moonrail_datapath::work::Work;

use crate::config::CoreLink;

/// Events taken from one core in one turn, so that a flood from one does not hold up the others or the sockets.
const EVENTS_PER_TURN: usize = 1024;

pub(crate) struct Handoff {
    links: Vec<CoreLink>,
    /// Commands that found their ring full.
    waiting: Vec<VecDeque<Command>>,
    /// Works whose last reference is here: dropping them may deregister memory, which blocks.
    garbage: Vec<Arc<Work>>,
}

impl Handoff {
    pub(crate) fn new(links: Vec<CoreLink>) -> Self {
        let waiting = links.iter().map(|_| VecDeque::new()).collect();
        Self { links, waiting, garbage: Vec::new() }
    }

    /// Sends a command. It waits here while the core's ring is full.
    pub(crate) fn command(&mut self, core: CoreId, command: Command) {
        let at = usize::from(core.0);
        if let Some(waiting) = self.waiting.get_mut(at) {
            waiting.push_back(command);
            self.flush(at);
        }
    }

    fn flush(&mut self, at: usize) {
        while let Some(command) = self.waiting[at].pop_front() {
            if let Err(command) = self.links[at].inbox.command(command) {
                self.waiting[at].push_front(command);
                return;
            }
        }
    }

    /// Takes what the cores tell. Returns whether any of them told anything.
    pub(crate) fn drain(&mut self, mut tell: impl FnMut(CoreId, CoreEvent)) -> bool {
        let mut told = false;
        for at in 0..self.links.len() {
            self.flush(at);
            for _ in 0..EVENTS_PER_TURN {
                let Some(event) = self.links[at].outbox.next() else { break };
                told = true;
                match event {
                    CoreEvent::Finished(work) => {
                        work.completion().wake();
                        self.discard(work);
                    }
                    CoreEvent::Released(work) => self.discard(work),
                    event => tell(CoreId(at as u16), event),
                }
            }
        }
        told
    }

    fn discard(&mut self, work: Arc<Work>) {
        // Cores clone what they hold and a batch never clones for others, so 1 cannot become 2 behind our back.
        if Arc::strong_count(&work) == 1 {
            self.garbage.push(work);
        }
    }

    /// Works to be dropped elsewhere.
    pub(crate) fn take_garbage(&mut self) -> Option<Vec<Arc<Work>>> {
        if self.garbage.is_empty() { None } else { Some(std::mem::take(&mut self.garbage)) }
    }

    /// Whether something waits in a ring. To be asked after the doorbell is prepared.
    pub(crate) fn has_events(&self) -> bool {
        self.links.iter().any(|link| !link.outbox.is_empty())
    }

    /// Whether a core's ring is full: look again soon.
    pub(crate) fn is_backed_up(&self) -> bool {
        self.waiting.iter().any(|w| !w.is_empty())
    }
}
