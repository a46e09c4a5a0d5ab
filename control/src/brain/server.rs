//! Requests of peers, and of whoever else connects to our control port. Each is answered or its connection closed; what
//! does not parse is closed without a word, as stock engines do.

use super::event::{Action, ConnId};
use super::rail::Inbound;
use super::{Brain, NOTIFICATION_BYTES, NOTIFICATIONS};
use crate::handle::Notification;
use crate::wire::notify::{NULL_REPLY, PROBE_REPLY};
use crate::wire::{Frame, Hello, MessageType, NicPath, NicPathError, Notify, NotifyReply, rejection};

impl Brain {
    pub(super) fn request(&mut self, conn: ConnId, mut frame: Frame) {
        // Peers that ask for proof are answered to the last: nobody else can give it.
        if self.stopping && frame.kind != MessageType::Connection {
            self.out.push(Action::Close { conn });
            return;
        }
        match frame.kind {
            MessageType::Connection => match Hello::parse(&frame.body) {
                Ok(hello) if self.stopping && !is_fence_question(&hello) => self.out.push(Action::Close { conn }),
                Ok(mut hello) => {
                    // It may wait for a job or a look-up: what of it is never read again is not kept meanwhile.
                    frame.body = Vec::new();
                    (hello.payload, hello.reply_msg) = (String::new(), String::new());
                    self.hello(Inbound { conn, frame, hello, looked_up: false });
                }
                Err(_) => self.out.push(Action::Close { conn }),
            },
            MessageType::Metadata => {
                // With a store, peers look there; the stock engine says `null` too.
                let body = match self.config.store {
                    None => self.own_text(),
                    Some(_) => NULL_REPLY.to_vec(),
                };
                self.out.push(Action::Reply { conn, frame: frame.reply(body) });
            }
            MessageType::Notify => match Notify::parse(&frame.body) {
                Ok(Notify { name, message }) => {
                    let bytes = self.notification_bytes + name.len() + message.len();
                    let reply = if self.notifications.len() < NOTIFICATIONS && bytes <= NOTIFICATION_BYTES {
                        self.notification_bytes = bytes;
                        self.notifications.push_back(Notification { name, message });
                        NotifyReply::Accepted
                    } else {
                        NotifyReply::Refused
                    };
                    self.out.push(Action::Reply { conn, frame: frame.reply(reply.encode()) });
                }
                Err(_) => self.out.push(Action::Close { conn }),
            },
            MessageType::Probe => self.out.push(Action::Reply { conn, frame: frame.reply(PROBE_REPLY.to_vec()) }),
        }
    }

    /// A hello: find the rail it is about.
    fn hello(&mut self, inbound: Inbound) {
        if is_fence_question(&inbound.hello) {
            return self.fence_asked(inbound);
        }
        match self.rail_of(&inbound.hello) {
            Ok(rail) => {
                self.rails[rail].requests.push_back(Box::new(inbound));
                // One per attempt of the peer; more of them are an attack or a loop.
                if self.rails[rail].requests.len() > 8
                    && let Some(oldest) = self.rails[rail].requests.pop_front()
                {
                    let text = self.unavailable(rail);
                    self.refuse(&oldest, text);
                }
                self.serve(rail);
            }
            Err(text) => self.refuse(&inbound, text),
        }
    }

    /// The rail a hello is about, made if it is new; or the text to refuse with.
    fn rail_of(&mut self, hello: &Hello) -> Result<usize, String> {
        let own = hello.peer_path().map_err(|_| rejection::invalid_peer_path(&shorten(&hello.peer_nic_path)))?;
        let nic = self.nic_named(&own.device).ok_or_else(|| rejection::no_such_nic(&shorten(&own.device)))?;
        let peer_path = &hello.local_nic_path;
        let unavailable = || rejection::endpoint_unavailable(&own.device, &shorten(peer_path));
        if peer_path.is_empty() {
            return Err(unavailable());
        }
        let NicPath { server, device } = match hello.local_path() {
            Ok(path) if peer_path.len() <= 512 => path,
            Err(NicPathError::NoAt { .. }) => return Err(rejection::unparsable_path(&shorten(peer_path))),
            _ => return Err(unavailable()),
        };
        let known = self.by_path.get(&(nic, peer_path.clone())).copied();
        if known.is_none() {
            // Nothing is made for a stranger that will be refused anyway.
            if hello.is_ready_ack() {
                return Err(rejection::ACK_UNCONNECTED.to_owned());
            }
            let expected = self.own_nic(nic).path;
            if hello.peer_nic_path != expected {
                return Err(rejection::path_inconsistency(
                    &expected,
                    &shorten(peer_path),
                    &shorten(&hello.peer_nic_path),
                    &shorten(peer_path),
                ));
            }
        }
        let rail = if let Some(rail) = known {
            rail
        } else {
            let peer = match self.by_server.get(&server) {
                Some(peer) => *peer,
                None => self.peer_named(&server).ok_or_else(unavailable)?,
            };
            self.new_rail(peer, nic, &device).ok_or_else(unavailable)?
        };
        if let Some(incarnation) = hello.extra.node.incarnation {
            let peer = self.rails[rail].peer;
            let (boot_id, gid) = (hello.extra.node.boot_id.as_deref(), hello.local_gid.gid());
            if !self.note_life(peer, incarnation, boot_id, gid, None) {
                self.ask_who_lives(peer);
                return Err(rejection::ACK_STALE.to_owned());
            }
        }
        Ok(rail)
    }

    pub(super) fn refuse(&mut self, inbound: &Inbound, text: String) {
        self.reply(inbound, &Hello::refuse(text));
    }

    pub(super) fn reply(&mut self, inbound: &Inbound, hello: &Hello) {
        let frame = inbound.frame.reply(hello.encode());
        self.out.push(Action::Reply { conn: inbound.conn, frame });
    }

    /// Our end of this rail cannot be made now.
    pub(super) fn unavailable(&self, rail: usize) -> String {
        let rail = &self.rails[rail];
        rejection::endpoint_unavailable(&self.nics[usize::from(rail.nic.0)].name, &rail.peer_path)
    }
}

fn is_fence_question(hello: &Hello) -> bool {
    !hello.extra.fence_qpns.is_empty() && hello.qp_num.is_empty()
}

/// What is quoted back to a stranger is cut: it may be a megabyte.
fn shorten(text: &str) -> String {
    text.chars().take(256).collect()
}
