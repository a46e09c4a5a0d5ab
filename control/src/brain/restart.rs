//! Which process of a peer speaks. One that was restarted has another incarnation under its old name, and what the one before said may
//! still be on its way.

use std::collections::VecDeque;

use moonrail_datapath::units::{Gid, Nanos, PeerId, Qpn};

use super::event::Token;
use super::peer::NoReply;
use super::{Brain, Pending};
use crate::handle::Charge;
use crate::handshake;
use crate::wire::{Frame, Hello, Incarnation, MessageType};

/// Earlier lives of a peer that are remembered, so that a late message of one is known as such.
const PAST_LIVES: usize = 8;
/// Who answers at a peer's address is asked at most this often.
const WHO_EVERY: Nanos = Nanos::from_secs(1);

/// The processes that a peer was, as far as we heard of them.
#[derive(Debug, Default)]
pub(super) struct Lives {
    /// The one that we listen to.
    pub(super) present: Option<Incarnation>,
    /// What was asked under a token up to this one was asked before we knew of that life.
    pub(super) renewed: u64,
    /// Those before.
    past: VecDeque<Incarnation>,
    /// When we last asked who answers at the peer's address.
    asked_at: Option<Nanos>,
}

impl Lives {
    /// Whether it is known that this life is over.
    pub(super) fn is_past(&self, life: Incarnation) -> bool {
        self.past.contains(&life)
    }

    /// What it knows of the order of the peer's lives: whether what was asked under this token came after all that was heard.
    #[cfg(test)]
    pub(super) fn is_asked_since(&self, token: Token) -> bool {
        token.0 > self.renewed
    }

    #[cfg(test)]
    pub(super) fn past_lives(&self) -> impl Iterator<Item = Incarnation> + '_ {
        self.past.iter().copied()
    }

    /// Whether it asked just now who lives.
    #[cfg(test)]
    pub(super) fn has_asked(&self, now: Nanos) -> bool {
        self.asked_at.is_some_and(|at| now.since(at) < WHO_EVERY)
    }

    /// Another one speaks; what was asked under a token up to this one was asked before. Returns the one that spoke until now.
    fn begin(&mut self, incarnation: Incarnation, token: u64) -> Option<Incarnation> {
        self.renewed = token;
        let before = self.present.replace(incarnation)?;
        if self.past.len() == PAST_LIVES {
            self.past.pop_front();
        }
        self.past.push_back(before);
        Some(before)
    }
}

impl Brain {
    /// A moonrail peer said which life it is in. Returns whether that life may be listened to: not an earlier one.
    ///
    /// Nothing orders two lives but what we heard of them, and messages and descriptors may be late: even the first word of a
    /// process may come after its successor's. Only a reply is proof: what answers a question lives after it was asked
    /// (`asked`, its token), and two processes of one name do not live at a time. So a mere word ends our use of the life
    /// before, but does not prove that end; a reply to what was asked since we last heard of another life does, and ends the
    /// present life even for one that we had taken for an earlier one.
    pub(super) fn note_life(
        &mut self,
        peer: PeerId,
        incarnation: Incarnation,
        boot_id: Option<&str>,
        gid: Option<Gid>,
        asked: Option<Token>,
    ) -> bool {
        let lives = &mut self.peer_mut(peer).lives;
        let asked_since = asked.is_some_and(|token| lives.present.is_none() || token.0 > lives.renewed);
        if lives.present != Some(incarnation) {
            match asked {
                Some(_) if !asked_since => return false,
                Some(_) => lives.past.retain(|life| *life != incarnation),
                None if lives.is_past(incarnation) => return false,
                None => {}
            }
            let is_first = lives.present.is_none();
            self.begin_life(peer, incarnation);
            if asked.is_none() && !is_first {
                self.ask_who_lives(peer);
            }
        }
        if asked_since {
            self.outlived(peer, incarnation, boot_id, gid);
        }
        true
    }

    /// What the life before had is not used any more.
    fn begin_life(&mut self, peer: PeerId, incarnation: Incarnation) {
        let tokens = self.tokens;
        let state = self.peer_mut(peer);
        let Some(before) = state.lives.begin(incarnation, tokens) else { return };
        state.stale = true;
        for route in &mut state.routes {
            route.renew();
        }
        let rails = state.rails.clone();
        // The new process may listen elsewhere. Peer-to-peer, the name says where.
        self.forget_address(peer);
        for rail in rails {
            if self.rails[rail].theirs().is_some_and(|theirs| theirs.incarnation == Some(before)) {
                self.lose_to(rail, "the peer was restarted", Charge::Peer);
            }
        }
    }

    /// This life of the peer is proven to come after all others that we have heard of: on its own host they are over.
    fn outlived(&mut self, peer: PeerId, by: Incarnation, boot_id: Option<&str>, gid: Option<Gid>) {
        for rail in self.peer(peer).rails.clone() {
            for life in &mut self.rails[rail].old {
                let same_host = (boot_id.is_some() && life.boot_id.as_deref() == boot_id) || gid == Some(life.peer_gid);
                life.proof |= same_host && life.incarnation.is_some_and(|incarnation| incarnation != by);
            }
            self.bury(rail);
        }
    }

    /// Two lives of a peer speak to us, or one that counts as over does. Either one was long on its way; or it lives, and what we
    /// took for newer was older. Whoever answers at the peer's address tells.
    pub(super) fn ask_who_lives(&mut self, peer: PeerId) {
        let now = self.now;
        let rails = &self.peer(peer).rails;
        // Any will do: a hello is about one.
        let Some(rail) = rails.iter().copied().find(|rail| !self.rails[*rail].fabric.is_dialled()) else { return };
        let asked = &mut self.peer_mut(peer).lives.asked_at;
        if asked.is_some_and(|at| now.since(at) < WHO_EVERY) {
            return;
        }
        *asked = Some(now);
        let (nic, path) = (self.own_nic(self.rails[rail].nic), self.rails[rail].peer_path.clone());
        let mut hello = handshake::hello(&nic, &path, None, &self.own_extra(), false);
        // Nobody's number: the answer says who gives it.
        hello.extra.fence_qpns = vec![Qpn::default()];
        let token = self.token(Pending::Who(peer));
        self.dial(peer, token, Frame::typed(MessageType::Connection, hello.encode()));
    }

    pub(super) fn who_replied(&mut self, peer: PeerId, token: Token, result: Result<Frame, NoReply>) {
        let Ok(frame) = result else {
            self.peer_mut(peer).lives.asked_at = None;
            return self.forget_address(peer);
        };
        if let Ok(reply) = Hello::parse(&frame.body) {
            self.note_replier(peer, token, &reply);
        }
    }

    /// The life that this reply says it is of answered what was asked under this token.
    pub(super) fn note_replier(&mut self, peer: PeerId, token: Token, reply: &Hello) {
        let node = &reply.extra.node;
        if let Some(incarnation) = node.incarnation {
            self.note_life(peer, incarnation, node.boot_id.as_deref(), None, Some(token));
        }
    }
}
