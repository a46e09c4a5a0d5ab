//! Peers: who they are, what they published, where they answer.

use std::sync::Arc;

use moonrail_datapath::slice::Extent;
use moonrail_datapath::transfer::{Peer, RemoteBuffer, RemoteBuffers, Route};
use moonrail_datapath::units::{Gid, Lid, Nanos, PeerId, PeerNicId, Rkey};

use super::event::{Action, Answer, Call, CallId, StoreOp, Token};
use super::fabric::{Failed, PeerRoute};
use super::restart::Lives;
use super::{Brain, Kind, Pending};
use crate::config::LogLevel;
use crate::error::{ControlError, DialError, NotifyError, OpenError};
use crate::fabric::FabricPolicy;
use crate::handle::RemoteSegment;
use crate::metadata::keys::segment_name;
use crate::metadata::{DeviceEntry, Protocol, RpcMeta, SegmentDescriptor, StoreError, peer as p2p};
use crate::wire::{Frame, MessageType};

/// Peers of one engine at the most. Names of strangers count, so it is bounded.
pub const MAX_PEERS: usize = 16_384;
/// How often a descriptor of a past life is read before it is believed to be all there is.
const PAST_READS: u32 = 3;

/// A peer.
pub(super) struct PeerState {
    pub(super) shared: Arc<Peer>,
    /// Server part of its NIC paths.
    pub(super) server: String,
    /// By [`PeerNicId`]: the names of its NICs, in the order in which we heard of them.
    pub(super) nics: Vec<String>,
    pub(super) segment: Option<Arc<RemoteSegment>>,
    /// What is cached may be out of date.
    pub(super) stale: bool,
    watched: bool,
    fetching: Option<Token>,
    /// It changed while it was being read.
    fetch_again: bool,
    address: Option<RpcMeta>,
    locating: Option<Token>,
    /// What waits for the address.
    to_dial: Vec<(Token, Frame)>,
    pub(super) lives: Lives,
    /// Descriptors of a past life that were read in a row.
    past_reads: u32,
    /// Places in the brain's list of rails.
    pub(super) rails: Vec<usize>,
    /// What carries its transfers, by policy; the first is this node's own policy. There are few policies.
    pub(super) routes: Vec<PeerRoute>,
    /// Fabrics that do not work towards it, by [`Fabric`].
    pub(super) failed: [Option<Failed>; 3],
    /// When it was last opened, or work waited for it.
    pub(super) wanted: Option<Nanos>,
    /// Every rail failed: what waits was told so.
    pub(super) unreachable: bool,
    /// First cause of its troubles, until a rail works.
    pub(super) cause: Option<String>,
}

/// Why a dial failed, before or while dialling.
pub(super) enum NoReply {
    /// The peer has no address.
    Location(String),
    /// It could not be reached.
    Dial(DialError),
}

impl PeerState {
    /// Name of one of its NICs; of a dialled rail's far end, the fabric's.
    pub(super) fn nic_name(&self, nic: PeerNicId) -> &str {
        let dialled = nic.fabric().as_str();
        self.nics.get(usize::from(nic.0)).map_or(dialled, String::as_str)
    }

    /// Its handshake address, if that is known.
    pub(super) fn address(&self) -> Option<&RpcMeta> {
        self.address.as_ref()
    }
}

impl NoReply {
    pub(super) fn text(&self) -> String {
        match self {
            Self::Location(why) => why.clone(),
            Self::Dial(error) => error.to_string(),
        }
    }
}

impl Brain {
    pub(super) fn peer(&self, id: PeerId) -> &PeerState {
        &self.peers[id.0 as usize]
    }

    pub(super) fn peer_mut(&mut self, id: PeerId) -> &mut PeerState {
        &mut self.peers[id.0 as usize]
    }

    /// The peer of this segment name; made if it is new. `None`: there are too many.
    pub(super) fn peer_named(&mut self, name: &str) -> Option<PeerId> {
        if let Some(id) = self.by_name.get(name) {
            return Some(*id);
        }
        if self.peers.len() >= MAX_PEERS {
            return None;
        }
        let id = PeerId(self.peers.len() as u32);
        self.peers.push(PeerState {
            shared: Peer::new(id, name.to_owned()),
            server: name.to_owned(),
            nics: Vec::new(),
            segment: None,
            stale: false,
            watched: false,
            fetching: None,
            fetch_again: false,
            address: None,
            locating: None,
            to_dial: Vec::new(),
            lives: Lives::default(),
            past_reads: 0,
            rails: Vec::new(),
            routes: vec![PeerRoute::new(self.config.fabrics)],
            failed: Default::default(),
            wanted: None,
            unreachable: false,
            cause: None,
        });
        self.by_name.insert(name.to_owned(), id);
        self.by_server.entry(name.to_owned()).or_insert(id);
        Some(id)
    }

    /// The number of a peer's NIC, fixed by its name.
    pub(super) fn peer_nic(&mut self, peer: PeerId, device: &str) -> Option<PeerNicId> {
        let nics = &mut self.peer_mut(peer).nics;
        if let Some(at) = nics.iter().position(|n| n == device) {
            return Some(PeerNicId(at as u16));
        }
        // A stranger names as many NICs as it likes; no machine has more.
        if nics.len() >= 256 {
            return None;
        }
        nics.push(device.to_owned());
        Some(PeerNicId((nics.len() - 1) as u16))
    }

    pub(super) fn open(&mut self, id: CallId, name: &str, fresh: bool, policy: Option<FabricPolicy>, until: Nanos) {
        let name = segment_name(name);
        let policy = policy.unwrap_or(self.config.fabrics);
        let refused = match crate::names::HostPort::parse(name) {
            Err(error) => Some(OpenError::Name(error)),
            Ok(_) => None,
        };
        let peer = match refused {
            Some(error) => Err(error),
            None => self.peer_named(name).ok_or(OpenError::TooMany { limit: MAX_PEERS }),
        };
        let peer = match peer {
            Ok(peer) => peer,
            Err(error) => return self.answer(id, Answer::Opened(Err(error))),
        };
        self.peer_mut(peer).wanted = Some(self.now);
        self.use_again(peer);
        if name == self.config.name {
            let own = self.own_descriptor();
            self.take_descriptor(peer, own);
            return self.opened(id, peer, policy);
        }
        if self.peer(peer).segment.is_some() && !fresh && !self.peer(peer).stale {
            self.connect_peer(peer);
            return self.opened(id, peer, policy);
        }
        self.wait(id, until, Kind::Open(peer, policy));
        self.fetch(peer);
    }

    /// Answers who opened a segment whose descriptor is known.
    fn opened(&mut self, id: CallId, peer: PeerId, policy: FabricPolicy) {
        let name = self.peer(peer).shared.name().to_owned();
        let view = self.view(peer, policy);
        let answer = view.ok_or_else(|| OpenError::NotFound { name, at: self.config.metadata.clone() });
        if self.kind_of(id).is_some() {
            self.finish(id, Answer::Opened(answer));
        } else {
            self.answer(id, Answer::Opened(answer));
        }
    }

    /// Asks for a peer's descriptor, unless that is being done.
    pub(super) fn fetch(&mut self, peer: PeerId) {
        if self.peer(peer).fetching.is_some() {
            return;
        }
        let name = self.peer(peer).shared.name().to_owned();
        let token = self.token(Pending::Fetch(peer));
        self.peer_mut(peer).fetching = Some(token);
        if let Some(keys) = &self.config.store {
            let key = keys.segment(&name);
            if !std::mem::replace(&mut self.peer_mut(peer).watched, true) {
                self.out.push(Action::Watch { key: key.clone() });
            }
            self.ask_store(token, StoreOp::Get(key));
        } else {
            let own = self.own_descriptor();
            self.dial(peer, token, Frame::typed(MessageType::Metadata, p2p::request(Some(&own))));
        }
    }

    /// The store told (or not) what a peer published.
    pub(super) fn fetched(&mut self, peer: PeerId, result: Result<Option<Vec<u8>>, StoreError>) {
        let name = self.peer(peer).shared.name().to_owned();
        let found = match result {
            Ok(Some(text)) => SegmentDescriptor::decode(&text).map_err(|source| OpenError::Descriptor { name, source }),
            Ok(None) => Err(OpenError::NotFound { name, at: self.config.metadata.clone() }),
            Err(source) => Err(OpenError::Metadata { name, source }),
        };
        self.found(peer, found);
    }

    /// The peer itself told.
    pub(super) fn fetched_directly(&mut self, peer: PeerId, result: Result<Frame, NoReply>) {
        let name = self.peer(peer).shared.name().to_owned();
        let found = match result {
            Ok(frame) => p2p::read_reply(&frame.body).map_err(|source| OpenError::Descriptor { name, source }),
            Err(NoReply::Dial(source)) => Err(OpenError::Dial { name, source }),
            Err(NoReply::Location(_)) => Err(OpenError::NotFound { name, at: self.config.metadata.clone() }),
        };
        self.found(peer, found);
    }

    fn found(&mut self, peer: PeerId, found: Result<SegmentDescriptor, OpenError>) {
        let state = self.peer_mut(peer);
        let asked = state.fetching.take();
        let (known, renewed) = (state.lives.present, state.lives.renewed);
        if std::mem::take(&mut state.fetch_again) {
            return self.fetch(peer);
        }
        if let Ok(SegmentDescriptor { extra: node, .. }) = &found
            && let Some(incarnation) = node.incarnation
            && known.is_some_and(|known| known != incarnation)
        {
            // Asked for before we heard of the present life, it may be older than that.
            if asked.is_none_or(|token| token.0 <= renewed) {
                return self.fetch(peer);
            }
            if self.config.store.is_none() {
                // Not a store told it, but the process itself.
                self.note_life(peer, incarnation, node.boot_id.as_deref(), None, asked);
            }
        }
        let past = found.as_ref().is_ok_and(|descriptor| self.is_of_past_life(peer, descriptor));
        let reads = &mut self.peer_mut(peer).past_reads;
        *reads = if past { *reads + 1 } else { 0 };
        if past && *reads < PAST_READS {
            // It was on its way while the peer restarted; what is there now will be newer.
            return self.fetch(peer);
        }
        let result = found.and_then(|descriptor| {
            if past {
                let (name, at) = (self.peer(peer).shared.name().to_owned(), self.config.metadata.clone());
                return Err(OpenError::PastLife { name, at });
            }
            self.take_descriptor(peer, descriptor);
            Ok(())
        });
        if let Err(error) = &result
            && self.peer(peer).rails.is_empty()
        {
            // Work that waits for a peer nobody can find ends now, and not at its deadline.
            self.give_up(peer, &error.to_string());
        }
        for rail in self.peer(peer).rails.clone() {
            if std::mem::take(&mut self.rails[rail].looking) {
                self.serve(rail);
            }
        }
        for id in self.callers(|kind| matches!(kind, Kind::Open(p, _) if *p == peer)) {
            match (&result, self.kind_of(id)) {
                (Ok(()), Some(Kind::Open(_, policy))) => self.opened(id, peer, policy),
                (Err(error), _) => self.finish(id, Answer::Opened(Err(error.clone()))),
                (Ok(()), _) => {}
            }
        }
    }

    /// Whether a descriptor is of a life of the peer that is known to be over: its keys open nothing, or something else.
    fn is_of_past_life(&self, peer: PeerId, descriptor: &SegmentDescriptor) -> bool {
        descriptor.extra.incarnation.is_some_and(|incarnation| self.peer(peer).lives.is_past(incarnation))
    }

    fn is_of_another_life(&self, peer: PeerId, descriptor: &SegmentDescriptor) -> bool {
        let (known, said) = (self.peer(peer).lives.present, descriptor.extra.incarnation);
        known.is_some() && said.is_some() && known != said
    }

    /// A descriptor of a peer: keep it, number its NICs, connect to them.
    pub(super) fn take_descriptor(&mut self, peer: PeerId, descriptor: SegmentDescriptor) {
        let name = self.peer(peer).shared.name().to_owned();
        if let Some(old) = &self.peer(peer).segment
            && old.descriptor.same_content(&descriptor)
        {
            self.peer_mut(peer).stale = false;
            self.connect_peer(peer);
            return;
        }
        let server = descriptor.server_name().to_owned();
        if !server.is_empty() && server != self.peer(peer).server {
            self.by_server.insert(server.clone(), peer);
            self.peer_mut(peer).server = server;
        }
        let mut numbers = Vec::new();
        for device in &descriptor.devices {
            numbers.push(self.peer_nic(peer, &device.name));
        }
        if let Some(incarnation) = descriptor.extra.incarnation {
            // First: a new life has routes of its own.
            self.note_life(peer, incarnation, descriptor.extra.boot_id.as_deref(), None, None);
        }
        let before = self.peer(peer).segment.clone();
        let another = before.is_none_or(|before| offers_otherwise(&before.descriptor, &descriptor));
        let state = self.peer_mut(peer);
        let buffers = remote_buffers(&state.shared, &state.routes[0].route, &descriptor, &numbers, state.nics.len());
        let segment = Arc::new(RemoteSegment { name, descriptor: Arc::new(descriptor), buffers: Arc::new(buffers) });
        state.segment = Some(segment);
        state.stale = false;
        self.forget_views(peer);
        if another {
            self.begin_anew(peer);
        }
        self.connect_peer(peer);
    }

    /// Makes the rails that lead to a peer's published NICs, and begins to connect those that are down.
    pub(super) fn connect_peer(&mut self, peer: PeerId) {
        self.plan_rails(peer);
        for rail in self.peer(peer).rails.clone() {
            self.attempt(rail);
        }
    }

    /// What the peer's descriptor says of one of its NICs, for a hello that leaves it out.
    pub(super) fn known_gid(&self, peer: PeerId, device: &str) -> Option<(Gid, Lid)> {
        let segment = self.peer(peer).segment.as_ref()?;
        let entry = segment.descriptor.devices.iter().find(|d| d.name == device)?;
        Some((entry.gid.gid()?, entry.lid))
    }

    // ---- where it answers ----

    /// Sends a frame to the control port of a peer; `token` tells what comes of it.
    pub(super) fn dial(&mut self, peer: PeerId, token: Token, frame: Frame) {
        let state = self.peer(peer);
        if let Some(address) = state.address.clone() {
            return self.dial_at(token, address, frame);
        }
        let name = state.shared.name().to_owned();
        match &self.config.store {
            None => match p2p::address(&name) {
                Ok(address) => {
                    self.peer_mut(peer).address = Some(address.clone());
                    self.dial_at(token, address, frame);
                }
                Err(error) => self.replied(token, Err(NoReply::Location(error.to_string()))),
            },
            Some(_) => {
                self.peer_mut(peer).to_dial.push((token, frame));
                self.locate(peer);
            }
        }
    }

    /// Asks the store where a peer answers, unless that is being done.
    pub(super) fn locate(&mut self, peer: PeerId) {
        let Some(keys) = self.config.store.as_ref().filter(|_| self.peer(peer).locating.is_none()) else { return };
        let op = StoreOp::Get(keys.rpc_meta(self.peer(peer).shared.name()));
        let locating = self.token(Pending::Locate(peer));
        self.peer_mut(peer).locating = Some(locating);
        self.ask_store(locating, op);
    }

    pub(super) fn dial_at(&mut self, token: Token, address: RpcMeta, frame: Frame) {
        let deadline = self.now.plus(self.config.dial_timeout);
        let RpcMeta { ip_or_host_name: host, rpc_port: port } = address;
        self.out.push(Action::Dial { token, host, port, frame, deadline });
    }

    pub(super) fn located(&mut self, peer: PeerId, result: Result<Option<Vec<u8>>, StoreError>) {
        let name = self.peer(peer).shared.name().to_owned();
        let address = match result {
            Ok(Some(text)) => RpcMeta::decode(&text).map_err(|e| format!("its address in the metadata: {e}")),
            Ok(None) => Err(format!(
                "Failed to find location of {name}: {} has no address under this name; is the node running?",
                self.config.metadata
            )),
            Err(error) => Err(format!("Failed to find location of {name}: {error}")),
        };
        let state = self.peer_mut(peer);
        state.locating = None;
        state.address = address.clone().ok();
        for (token, frame) in std::mem::take(&mut state.to_dial) {
            match &address {
                Ok(address) => self.dial_at(token, address.clone(), frame),
                Err(why) => self.replied(token, Err(NoReply::Location(why.clone()))),
            }
        }
        // A dialled rail may have waited for it.
        for rail in self.peer(peer).rails.clone() {
            match &address {
                Ok(_) => self.attempt(rail),
                Err(why) if self.waits_for_address(rail) => self.attempt_failed(rail, why),
                Err(_) => {}
            }
        }
    }

    /// The address did not answer: ask for it again next time, the node may have moved.
    pub(super) fn forget_address(&mut self, peer: PeerId) {
        self.peer_mut(peer).address = None;
    }

    /// A key of the store changed.
    pub(super) fn changed(&mut self, key: &str, value: Option<Vec<u8>>) {
        use crate::metadata::Entry;
        let Some(entry) = self.config.store.as_ref().and_then(|keys| keys.entry(key)) else { return };
        match entry {
            Entry::RpcMeta(name) if name == self.config.name => self.own_changed(true, value.as_deref()),
            Entry::Segment(name) if name == self.config.name => self.own_changed(false, value.as_deref()),
            Entry::RpcMeta(name) => {
                if let Some(peer) = self.by_name.get(&name).copied() {
                    self.forget_address(peer);
                }
            }
            Entry::Segment(name) => {
                let Some(peer) = self.by_name.get(&name).copied() else { return };
                if self.peer(peer).segment.is_none() {
                    return;
                }
                match value.map(|text| SegmentDescriptor::decode(&text)) {
                    Some(Ok(descriptor)) if self.is_of_past_life(peer, &descriptor) => {
                        let error = OpenError::PastLife { name, at: self.config.metadata.clone() };
                        self.log(LogLevel::Warning, error.to_string());
                    }
                    Some(Ok(descriptor)) if self.is_of_another_life(peer, &descriptor) => {
                        // Newer, or late: what the store has now tells.
                        let state = self.peer_mut(peer);
                        (state.stale, state.fetch_again) = (true, state.fetching.is_some());
                        self.fetch(peer);
                    }
                    Some(Ok(descriptor)) => self.take_descriptor(peer, descriptor),
                    Some(Err(_)) | None => self.peer_mut(peer).stale = true,
                }
            }
        }
    }

    pub(super) fn changes_missed(&mut self) {
        for peer in &mut self.peers {
            peer.stale = true;
            peer.address = None;
        }
        self.look_for_own_keys();
    }

    // ---- messages to it ----

    pub(super) fn message(&mut self, id: CallId, call: &Call, until: Nanos) {
        let (segment, frame, pending) = match call {
            Call::Notify { segment, name, message } => {
                let body = crate::wire::Notify { name: name.clone(), message: message.clone() }.encode();
                (segment, Frame::typed(MessageType::Notify, body), Pending::Notify(id))
            }
            Call::Probe(segment) => {
                let body = crate::wire::notify::PROBE.to_vec();
                (segment, Frame::typed(MessageType::Probe, body), Pending::Probe(id))
            }
            _ => return,
        };
        let Some(peer) = self.peer_named(segment_name(segment)) else {
            let why = format!("{MAX_PEERS} peers are known already");
            let error = NotifyError::Location { name: segment.clone(), why };
            return self.answer(id, Answer::Notified(Err(error)));
        };
        self.wait(id, until, Kind::Message(peer));
        let token = self.token(pending);
        self.dial(peer, token, frame);
    }

    /// What came of a message; `notify`: its reply has to say that it was taken.
    pub(super) fn messaged(&mut self, id: CallId, result: Result<Frame, NoReply>, notify: bool) {
        let Some(Kind::Message(peer)) = self.kind_of(id) else { return };
        let name = self.peer(peer).shared.name().to_owned();
        let result = match result {
            Ok(frame) if notify => match crate::wire::NotifyReply::parse(&frame.body) {
                Ok(crate::wire::NotifyReply::Accepted) => Ok(()),
                Ok(crate::wire::NotifyReply::Refused) => Err(NotifyError::Rejected { name }),
                Err(error) => {
                    let source = DialError::Garbage { address: name.clone(), why: error.to_string() };
                    Err(NotifyError::Dial { name, source })
                }
            },
            Ok(_) => Ok(()),
            Err(NoReply::Dial(source)) => {
                self.forget_address(peer);
                Err(NotifyError::Dial { name, source })
            }
            Err(NoReply::Location(why)) => Err(NotifyError::Location { name, why }),
        };
        self.finish(id, Answer::Notified(result));
    }

    /// What is to be said to a caller whose time is over.
    pub(super) fn too_late(&self, what: &'static str, peer: Option<PeerId>) -> ControlError {
        let state = peer.map(|p| self.peer(p)).map_or_else(String::new, |peer| {
            let waits = if peer.locating.is_some() {
                "the metadata has not told the peer's address yet"
            } else if peer.fetching.is_some() {
                "the descriptor was asked for and has not come"
            } else {
                "the peer has not replied yet"
            };
            match &peer.cause {
                Some(cause) => format!("{waits}; first cause: {cause}"),
                None => waits.to_owned(),
            }
        });
        ControlError::Deadline { what, state }
    }
}

/// A descriptor's buffers as the data path wants them: sorted, without overlap, keys by [`PeerNicId`].
fn remote_buffers(
    peer: &Arc<Peer>,
    route: &Arc<Route>,
    descriptor: &SegmentDescriptor,
    numbers: &[Option<PeerNicId>],
    nics: usize,
) -> RemoteBuffers {
    let mut entries: Vec<_> = descriptor.buffers.iter().collect();
    entries.sort_by_key(|b| (b.addr, std::cmp::Reverse(b.length)));
    let mut end = 0u64;
    let mut buffers = Vec::with_capacity(entries.len());
    for entry in entries {
        // Overlapping registrations are the peer's right; their keys are good for any part of them.
        let addr = entry.addr.max(end);
        let entry_end = entry.addr.saturating_add(entry.length);
        if addr >= entry_end {
            continue;
        }
        end = entry_end;
        let mut rkeys = vec![None; if descriptor.protocol == Protocol::Rdma { nics } else { 0 }];
        for (at, (rkey, lkey)) in entry.rkeys.iter().zip(&entry.lkeys).enumerate() {
            // A NIC that failed to open there keeps its place, with keys 0.
            let registered = (rkey.0, lkey.0) != (0, 0);
            if let (Some(Some(number)), true) = (numbers.get(at), registered) {
                rkeys[usize::from(number.0)] = Some(Rkey(rkey.0));
            }
        }
        if rkeys.iter().all(Option::is_none) {
            rkeys.clear();
        }
        buffers.push(RemoteBuffer {
            extent: Extent { addr, len: entry_end - addr },
            rkeys: rkeys.into_boxed_slice(),
            // Over TCP a node serves whatever it registered; a moonrail node publishes only what is for peers.
            open: descriptor.protocol == Protocol::Tcp || !entry.rkeys.is_empty(),
            location: entry.name.clone(),
        });
    }
    RemoteBuffers::new(peer.clone(), route.clone(), buffers)
}

/// Whether a descriptor is of another process than the one before, or of one that serves elsewhere.
fn offers_otherwise(before: &SegmentDescriptor, now: &SegmentDescriptor) -> bool {
    let offer = |d: &SegmentDescriptor| {
        (d.extra.incarnation, d.extra.shm, d.extra.tcp.clone(), d.tcp_data_host.clone(), d.tcp_data_port)
    };
    offer(before) != offer(now)
}

/// The published NICs that can be connected to at all, by name.
pub(super) fn connectable(descriptor: &SegmentDescriptor) -> Vec<&str> {
    let has_address = |d: &&DeviceEntry| d.gid.gid().is_some_and(|gid| !gid.is_zero()) || d.lid.0 != 0;
    descriptor.devices.iter().filter(has_address).map(|d| d.name.as_str()).collect()
}
