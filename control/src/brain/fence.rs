//! Proof that a former life's WRITEs can no longer land, by asking the peer: only a moonrail peer can say so.
//!
//! ```text
//!  we: hello, no queue pairs, `fence_qpns` = ours of the dead life ──▶ peer: finds what is connected to them
//!                                                                     retires it, waits until it is in ERR or destroyed
//!  we: proof, if the peer is still the same incarnation ◀── reply with the same numbers as `fenced_qpns`
//! ```
//!
//! The question tells the peer, too, that our end is gone. So it is also asked, once, about a life that ended with our port,
//! whether or not it waits for proof: of the port the peer hears nothing, and its requests would be silent for seven ACK timeouts.
//!
//! Fresh queue pairs for the same pair of NICs prove it too, and come first where they can be made. This way also works
//! while a port is down, where nothing can be made. A stock peer is never asked: it would take the question for a hello.

use moonrail_datapath::units::{Nanos, Qpn};

use super::event::{Action, Token};
use super::peer::NoReply;
use super::rail::{End, Inbound, OldLife};
use super::{Brain, Pending, Timer};
use crate::handshake;
use crate::repair::LONGEST_WAIT;
use crate::wire::{Frame, Hello, MessageType};

/// First wait before asking again; it doubles up to [`LONGEST_WAIT`].
const ASK_AGAIN: Nanos = Nanos::from_millis(20);
/// Questions of peers that wait on one rail.
const QUESTIONS_MAX: usize = 8;

/// What a rail knows of its own question.
#[derive(Default)]
pub(super) struct Asking {
    on_its_way: bool,
    tries: u32,
    not_before: Nanos,
}

#[cfg(test)]
impl Asking {
    /// Whether a question is on its way, or to be asked later.
    pub(super) fn is_waiting(&self, now: Nanos) -> bool {
        self.on_its_way || self.not_before > now
    }
}

impl Brain {
    /// Asks the peer about the lives of this rail that wait for proof, unless it is being asked or was asked just now.
    pub(super) fn ask_fence(&mut self, rail: usize) {
        let state = &self.rails[rail];
        let open = |life: &OldLife| life.needs_fence || life.untold;
        let waits = |life: &&mut OldLife| open(life) && !life.proof && life.is_drained() && life.incarnation.is_some();
        // The peer's control knows nothing of who dialled its fabrics.
        if state.fence.on_its_way || state.fence.not_before > self.now || state.fabric.is_dialled() {
            return;
        }
        let Some(life) = self.rails[rail].old.iter_mut().find(waits) else { return };
        // Telling is tried once: if it does not arrive, the peer finds out by itself.
        life.untold = false;
        let (life_number, qpns) = (life.key.life, life.qpns.clone());
        let state = &self.rails[rail];
        let nic = self.own_nic(state.nic);
        let mut hello = handshake::hello(&nic, &state.peer_path, None, &self.own_extra(), false);
        hello.extra.fence_qpns = qpns;
        let peer = state.peer;
        self.rails[rail].fence.on_its_way = true;
        let token = self.token(Pending::Fence { rail, life: life_number });
        self.dial(peer, token, Frame::typed(MessageType::Connection, hello.encode()));
    }

    /// The peer answered our question, or did not.
    pub(super) fn fence_replied(&mut self, rail: usize, number: u32, token: Token, result: Result<Frame, NoReply>) {
        self.rails[rail].fence.on_its_way = false;
        let reply = result.ok().and_then(|frame| Hello::parse(&frame.body).ok());
        if let Some(reply) = &reply {
            self.note_replier(self.rails[rail].peer, token, reply);
        }
        let life = self.rails[rail].old.iter_mut().find(|life| life.key.life == number);
        let answered = match (reply, life) {
            (Some(reply), Some(life)) => {
                // Another incarnation knows nothing of what its predecessor had; that it answers may prove it, as above.
                let same = reply.extra.node.incarnation.is_some() && reply.extra.node.incarnation == life.incarnation;
                let all = life.qpns.iter().all(|qpn| reply.extra.fenced_qpns.contains(qpn));
                life.proof |= same && all && reply.refusal().is_none();
                life.proof
            }
            (_, life) => life.is_none(),
        };
        if answered {
            self.rails[rail].fence = Asking::default();
        } else {
            let fence = &mut self.rails[rail].fence;
            let wait = Nanos(ASK_AGAIN.0 << fence.tries.min(10)).min(LONGEST_WAIT);
            fence.tries += 1;
            fence.not_before = self.now.plus(wait);
            self.at(self.now.plus(wait), Timer::Rail(rail));
        }
        self.bury(rail);
        self.ask_fence(rail);
    }

    /// A peer asks whether what is connected to its queue pairs is retired here.
    pub(super) fn fence_asked(&mut self, inbound: Inbound) {
        let known = inbound.hello.peer_path().ok().and_then(|path| self.nic_named(&path.device));
        let rail = known.and_then(|nic| self.by_path.get(&(nic, inbound.hello.local_nic_path.clone())).copied());
        let Some(rail) = rail else {
            // This life of ours never had anything with those NICs.
            return self.fence_reply(&inbound);
        };
        let asked = &inbound.hello.extra.fence_qpns;
        if self.is_paired(rail, asked) && inbound.hello.extra.if_idle && !self.stopping {
            return self.idle_asked(rail, inbound);
        }
        if self.is_paired(rail, asked) {
            match &self.rails[rail].end {
                End::Whole(_) => self.replace(rail, "the peer gave its end up: its port is down, or it saw an error"),
                End::Half { .. } => self.drop_end(rail),
                // A job has them: the peer asks again.
                _ => {
                    self.out.push(Action::Close { conn: inbound.conn });
                    return;
                }
            }
            // The rail is as good as new for both: whoever wants it connects again.
            self.retry_in(rail, Nanos::ZERO);
        }
        self.keep_question(rail, inbound);
        self.answer_fences(rail);
    }

    pub(super) fn keep_question(&mut self, rail: usize, inbound: Inbound) {
        self.rails[rail].questions.push(inbound);
        if self.rails[rail].questions.len() > QUESTIONS_MAX {
            let oldest = self.rails[rail].questions.remove(0);
            self.out.push(Action::Close { conn: oldest.conn });
        }
    }

    /// Whether the present end is connected to one of these queue pairs.
    pub(super) fn is_paired(&self, rail: usize, qpns: &[Qpn]) -> bool {
        self.rails[rail].theirs().is_some_and(|theirs| theirs.qpns.iter().any(|qpn| qpns.contains(qpn)))
    }

    /// Answers the questions whose queue pairs have no living other end: all that were connected to them are in ERR, where
    /// nothing is accepted, or destroyed.
    pub(super) fn answer_fences(&mut self, rail: usize) {
        let state = &mut self.rails[rail];
        if state.questions.is_empty() || state.dying > 0 {
            return;
        }
        for inbound in std::mem::take(&mut state.questions) {
            let asked = &inbound.hello.extra.fence_qpns;
            let failing = self.rails[rail]
                .old
                .iter()
                .any(|life| life.failing.is_some() && life.peer_qpns.iter().any(|qpn| asked.contains(qpn)));
            if failing || self.is_paired(rail, asked) {
                self.rails[rail].questions.push(inbound);
            } else {
                self.fence_reply(&inbound);
            }
        }
    }

    fn fence_reply(&mut self, inbound: &Inbound) {
        let mut hello = Hello::default();
        hello.extra.node = self.own_extra();
        hello.extra.fenced_qpns.clone_from(&inbound.hello.extra.fence_qpns);
        self.reply(inbound, &hello);
    }
}
