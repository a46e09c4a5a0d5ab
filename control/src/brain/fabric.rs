//! What carries the bytes to a peer, and the rails that are dialled.
//!
//! ```text
//!  descriptor, failures ──▶ standings ──▶ choice per policy ──▶ Route (read by cores), rails of the chosen fabrics
//!                              ▲                                        │ every rail of it fails, and there is another
//!                              └────────────────────────────────────────┘ or one of a better fabric works again
//! ```
//!
//! A dialled rail needs nothing of the peer's control thread: a job dials what the peer offers, and the core gets queue
//! pairs that are ready. The peer does the same towards us if it wants to move bytes.

use std::sync::Arc;

use moonrail_datapath::core::port::Command;
use moonrail_datapath::nic::{AdminHalf, ConnectedQp, Fabric, QpCaps, Target, TcpVersion};
use moonrail_datapath::transfer::{RemoteBuffers, Route};
use moonrail_datapath::units::{Lid, NicId, PeerId, PeerNicId};

use super::peer::connectable;
use super::rail::End;
use super::{Brain, Pending};
use crate::config::LogLevel;
use crate::connect::{DialFailure, JobKind, Outcome};
use crate::fabric::{Choice, FabricPolicy, Standing, Standings, choose};
use crate::handle::{RemoteSegment, Way};
use crate::handshake::{OwnEnd, PeerEnd};
use crate::metadata::{Protocol, SegmentDescriptor};

/// Capability of a node that takes a batch over TCP as one message.
pub(super) const TCP_BATCH: &str = "tcp-batch";

/// What goes to a peer under one policy.
pub(super) struct PeerRoute {
    pub(super) policy: FabricPolicy,
    /// Read by the cores for every slice.
    pub(super) route: Arc<Route>,
    /// `None` until the peer's descriptor is known.
    pub(super) choice: Option<Result<Choice, String>>,
    /// The peer's memory as this policy's segments see it, of the present descriptor. Not of the first policy, whose is
    /// the peer's own.
    view: Option<Arc<RemoteSegment>>,
}

impl PeerRoute {
    pub(super) fn new(policy: FabricPolicy) -> Self {
        Self { policy, route: Route::any(), choice: None, view: None }
    }

    /// The peer is another process: nothing goes to the memory of its predecessor any more, whoever still knows of it.
    pub(super) fn renew(&mut self) {
        let after = Route::new(self.route.fabrics());
        std::mem::replace(&mut self.route, after).end();
        self.view = None;
    }

    fn fabric(&self) -> Option<Fabric> {
        self.choice.as_ref()?.as_ref().ok().map(|choice| choice.fabric)
    }
}

/// A fabric that did not work.
#[derive(Clone)]
pub(super) struct Failed {
    why: String,
    /// It will not, as long as the peer offers the same.
    is_final: bool,
}

impl Brain {
    /// The peer's memory for segments of this policy. The descriptor must be known.
    pub(super) fn view(&mut self, peer: PeerId, policy: FabricPolicy) -> Option<Arc<RemoteSegment>> {
        let segment = self.peer(peer).segment.clone()?;
        let routes = &self.peer(peer).routes;
        let at = routes.iter().position(|route| route.policy == policy).unwrap_or(routes.len());
        // What a former life published is over under any policy.
        if at == 0 || segment.buffers.route.is_over() {
            return Some(segment);
        }
        if at == routes.len() {
            self.peer_mut(peer).routes.push(PeerRoute::new(policy));
            self.connect_peer(peer);
        }
        let route = &mut self.peer_mut(peer).routes[at];
        let view = route.view.get_or_insert_with(|| {
            let buffers = RemoteBuffers {
                peer: segment.buffers.peer.clone(),
                route: route.route.clone(),
                buffers: segment.buffers.buffers.clone(),
            };
            Arc::new(RemoteSegment { buffers: Arc::new(buffers), ..(*segment).clone() })
        });
        Some(view.clone())
    }

    /// The peer's memory has changed: views of it are made anew.
    pub(super) fn forget_views(&mut self, peer: PeerId) {
        for route in &mut self.peer_mut(peer).routes {
            route.view = None;
        }
    }

    /// The peer is another process than before, or serves elsewhere: what was known of failures belongs to the past.
    pub(super) fn begin_anew(&mut self, peer: PeerId) {
        let state = self.peer_mut(peer);
        state.failed = Default::default();
        (state.unreachable, state.cause) = (false, None);
        for rail in state.rails.clone() {
            let rail = &mut self.rails[rail];
            rail.forgive();
            (rail.failing_since, rail.retry_at) = (None, None);
        }
    }

    /// Chooses anew what carries each route to a peer, makes the rails for it, and takes away those nobody uses.
    pub(super) fn plan_rails(&mut self, peer: PeerId) {
        let Some(segment) = self.peer(peer).segment.clone() else { return };
        let standings = self.standings(peer, &segment.descriptor);
        for at in 0..self.peer(peer).routes.len() {
            let choice = choose(self.peer(peer).routes[at].policy, &standings);
            self.take_choice(peer, at, choice, &standings);
        }
        let used = self.used_fabrics(peer);
        for nic in 0..self.nics.len() {
            let fabric = self.nics[nic].fabric;
            if used & fabric.bit() != 0 {
                match fabric {
                    Fabric::Rdma => self.plan_rdma(peer, NicId(nic as u16), &segment),
                    Fabric::Shm | Fabric::Tcp => drop(self.new_dialled(peer, NicId(nic as u16), fabric)),
                }
            }
        }
        for rail in self.peer(peer).rails.clone() {
            let state = &self.rails[rail];
            if state.fabric.is_dialled() && used & state.fabric.bit() == 0 {
                self.retire(rail);
            }
            // Which rails are for us depends on what the peer has, and it may have asked for them before we knew.
            let claims = self.claims(rail);
            if std::mem::replace(&mut self.rails[rail].claims, claims) != claims
                && let End::Whole(life) = &self.rails[rail].end
            {
                let (core, key) = (self.rails[rail].core, life.key);
                self.command(core, Command::Claim { key, claims });
            }
        }
    }

    /// The fabrics whose rails a peer should have: those chosen, and better ones that may work again.
    fn used_fabrics(&self, peer: PeerId) -> u8 {
        let state = self.peer(peer);
        let chosen = state.routes.iter().filter_map(PeerRoute::fabric).fold(0, |set, fabric| set | fabric.bit());
        let failed = |f: &Fabric| state.failed[*f as usize].as_ref().is_some_and(|failed| !failed.is_final);
        let retried = Fabric::ALL.into_iter().filter(failed).fold(0, |set, fabric| set | fabric.bit());
        chosen | retried
    }

    fn take_choice(&mut self, peer: PeerId, at: usize, choice: Result<Choice, String>, standings: &Standings) {
        let name = self.peer(peer).shared.name().to_owned();
        let state = &mut self.peer_mut(peer).routes[at];
        let before = state.choice.replace(choice.clone());
        let line = match (&before, &choice) {
            (Some(before), now) if before == now => None,
            (Some(Ok(before)), Ok(now)) if before.fabric == now.fabric => None,
            (None, Ok(now)) => Some((LogLevel::Info, format!("{name} is reached over {}: {}", now.fabric, now.why))),
            (Some(Ok(before)), Ok(now)) => Some((
                LogLevel::Warning,
                format!("{name} is reached over {} now, no longer over {}: {}", now.fabric, before.fabric, now.why),
            )),
            (Some(Err(_)), Ok(now)) => {
                Some((LogLevel::Info, format!("{name} is reached over {} again: {}", now.fabric, now.why)))
            }
            (Some(Err(_)), Err(_)) => None,
            (_, Err(why)) => Some((LogLevel::Warning, format!("{name} cannot be reached as asked: {why}"))),
        };
        match &choice {
            Ok(now) => state.route.set(now.fabric.bit()),
            // What failed may work again, and Works wait for it; what an end lacks will not come.
            Err(_) => {
                let failed = |f: &Fabric| matches!(standings[*f as usize], Standing::Failed(_));
                let allowed = |f: &Fabric| state.policy.require.is_none_or(|only| only == *f);
                let bits = Fabric::ALL.into_iter().filter(failed).filter(allowed);
                state.route.set(bits.fold(0, |set, fabric| set | fabric.bit()));
            }
        }
        if let Err(why) = choice {
            self.peer_mut(peer).cause.get_or_insert(why);
        }
        if let Some((level, text)) = line {
            self.log(level, text);
        }
    }

    /// How each fabric stands between us and a peer.
    fn standings(&self, peer: PeerId, descriptor: &SegmentDescriptor) -> Standings {
        let stands = |fabric: Fabric| {
            if !self.nics.iter().any(|nic| nic.fabric == fabric && !nic.cores.is_empty()) {
                return Standing::Missing(format!("this node has no {fabric} NIC in use"));
            }
            let offered = match fabric {
                Fabric::Shm => self.shm_offer(descriptor).map(|_| "it runs on this host".to_owned()),
                Fabric::Rdma => match connectable(descriptor).len() {
                    0 => Err(format!(
                        "the peer publishes no RDMA NIC (its protocol is {})",
                        descriptor.protocol.as_str()
                    )),
                    count => Ok(format!("it has {count} RDMA NIC(s)")),
                },
                Fabric::Tcp => tcp_port(descriptor)
                    .map(|port| format!("it serves TCP on port {port}"))
                    .ok_or_else(|| "the peer serves no TCP".to_owned()),
            };
            match (offered, &self.peer(peer).failed[fabric as usize]) {
                (Err(why), _) => Standing::Missing(why),
                (Ok(_), Some(failed)) => Standing::Failed(failed.why.clone()),
                (Ok(why), None) => Standing::Offered(why),
            }
        };
        Fabric::ALL.map(stands)
    }

    /// The peer's token, if its memory can be shared with us as far as its descriptor tells.
    fn shm_offer(&self, descriptor: &SegmentDescriptor) -> Result<u64, String> {
        let extra = &descriptor.extra;
        let Some(token) = extra.shm else { return Err("the peer shares no memory".to_owned()) };
        if extra.boot_id.is_none() || extra.boot_id != self.config.boot_id {
            return Err("the peer runs on another host".to_owned());
        }
        Ok(token.0)
    }

    /// Over what transfers to a peer go, for people.
    pub(super) fn ways(&self, peer: PeerId) -> Vec<Way> {
        let way = |route: &PeerRoute| {
            let (fabric, why) = match route.choice.as_ref()? {
                Ok(choice) => (Some(choice.fabric), choice.why.clone()),
                Err(why) => (None, why.clone()),
            };
            Some(Way { policy: route.policy, fabric, why })
        };
        self.peer(peer).routes.iter().filter_map(way).collect()
    }

    /// A fabric does not work towards a peer. Returns whether every route found another way; where one would not, the
    /// failure is kept only if it is final: whatever waits goes on trying.
    pub(super) fn fail_fabric(&mut self, peer: PeerId, fabric: Fabric, why: &str, is_final: bool) -> bool {
        let state = self.peer_mut(peer);
        let before = state.failed[fabric as usize].replace(Failed { why: why.to_owned(), is_final });
        let Some(segment) = state.segment.clone() else { return false };
        let standings = self.standings(peer, &segment.descriptor);
        let state = self.peer_mut(peer);
        let uses = |route: &&PeerRoute| route.fabric() == Some(fabric);
        let found = state.routes.iter().filter(uses).any(|route| choose(route.policy, &standings).is_ok());
        if !found && !is_final {
            state.failed[fabric as usize] = before;
            return false;
        }
        self.connect_peer(peer);
        self.peer(peer).routes.iter().all(|route| !matches!(route.choice, Some(Err(_))))
    }

    /// A fabric works again towards a peer, or for the first time.
    pub(super) fn mend_fabric(&mut self, peer: PeerId, fabric: Fabric) {
        if self.peer_mut(peer).failed[fabric as usize].take().is_some() {
            self.plan_rails(peer);
        }
    }

    // ---- rails that are dialled ----

    fn new_dialled(&mut self, peer: PeerId, nic: NicId, fabric: Fabric) -> Option<usize> {
        let (peer_nic, count) = match fabric {
            Fabric::Shm => (PeerNicId::SHM, 1),
            Fabric::Tcp => (PeerNicId::TCP, self.config.rails.tcp_lanes),
            Fabric::Rdma => return None,
        };
        let is_it = |rail: &&usize| self.rails[**rail].nic == nic;
        if let Some(rail) = self.peer(peer).rails.iter().find(is_it) {
            return Some(*rail);
        }
        let peer_path = format!("{}@{fabric}", self.peer(peer).shared.name());
        self.add_rail(peer, nic, peer_nic, peer_path, count)
    }

    /// Begins to dial the peer of a rail that is down.
    pub(super) fn dial_rail(&mut self, rail: usize) {
        let (peer, nic, fabric) = (self.rails[rail].peer, self.rails[rail].nic, self.rails[rail].fabric);
        let Some(segment) = self.peer(peer).segment.clone() else { return };
        let target = match fabric {
            Fabric::Shm => self.shm_offer(&segment.descriptor).map(|token| Some(Target::Shm { token })),
            Fabric::Tcp => self.tcp_target(peer, &segment.descriptor),
            Fabric::Rdma => return,
        };
        let target = match target {
            Ok(Some(target)) => target,
            // The store is being asked where it is.
            Ok(None) => return,
            Err(why) => return self.attempt_failed(rail, &why),
        };
        let core = self.core_for(rail);
        let options = &self.config.rails;
        let caps = QpCaps { max_send_wr: options.max_send_wr, max_send_sge: 1, max_inline: 0 };
        let within = self.config.dial_timeout.to_duration();
        let theirs = PeerEnd {
            gid: moonrail_datapath::units::Gid([0; 16]),
            lid: Lid(0),
            qpns: Vec::new(),
            psns: Vec::new(),
            mtu: None,
            incarnation: segment.descriptor.extra.incarnation,
            boot_id: segment.descriptor.extra.boot_id.clone(),
            acks: false,
        };
        let state = &mut self.rails[rail];
        state.core = core;
        state.evicted = None;
        state.end = End::Dialling(theirs);
        let count = state.count;
        self.run(nic, JobKind::Dial { core, count, caps, target, within }, Pending::End(rail));
    }

    /// Where the peer serves TCP. `None`: that is being asked.
    fn tcp_target(&mut self, peer: PeerId, descriptor: &SegmentDescriptor) -> Result<Option<Target>, String> {
        let port = tcp_port(descriptor).ok_or("the peer serves no TCP")?;
        let named = match &descriptor.extra.tcp {
            Some(place) => place.host.clone(),
            None => descriptor.tcp_data_host.clone(),
        };
        let host = match (named.is_empty(), self.peer(peer).address()) {
            (false, _) => named,
            (true, Some(address)) => address.ip_or_host_name.clone(),
            // A stock node of an older version: its handshake address has the host.
            (true, None) if self.config.store.is_none() => {
                crate::metadata::peer::address(self.peer(peer).shared.name())
                    .map_err(|e| e.to_string())?
                    .ip_or_host_name
            }
            (true, None) => {
                self.locate(peer);
                return Ok(None);
            }
        };
        let version = match descriptor.tcp_proto_version {
            _ if descriptor.extra.can(TCP_BATCH) => TcpVersion::Batch,
            2.. if !self.config.rails.tcp_v1 => TcpVersion::V2,
            _ => TcpVersion::V1,
        };
        Ok(Some(Target::Tcp { host, port, version }))
    }

    /// The dial of a rail ended.
    pub(super) fn dialled(&mut self, rail: usize, theirs: PeerEnd, outcome: Outcome) {
        let failure = match outcome {
            Outcome::Dialled(Ok(halves)) if self.uses(rail) && !self.stopping => {
                return self.adopt_dialled(rail, theirs, halves);
            }
            // Nobody wants it any more.
            Outcome::Dialled(Ok(halves)) => {
                let unused = crate::connect::Unused { connected: halves, ..Default::default() };
                let nic = self.rails[rail].nic;
                self.run(nic, JobKind::Destroy(unused), Pending::Destroy);
                return;
            }
            Outcome::Dialled(Err(failure)) => failure,
            _ => DialFailure { why: "the job that dialled was lost".to_owned(), is_final: false },
        };
        // Its core may have ended already, and that is nobody's trouble.
        if self.stopping {
            return;
        }
        let (peer, fabric) = (self.rails[rail].peer, self.rails[rail].fabric);
        if failure.is_final {
            self.trouble(rail, &failure.why);
            if !self.fail_fabric(peer, fabric, &failure.why, true) {
                self.give_up(peer, &failure.why);
            }
        } else {
            self.attempt_failed(rail, &failure.why);
        }
        // The peer may have been restarted, and offer something else now.
        self.peer_mut(peer).stale = true;
        self.fetch(peer);
    }

    fn adopt_dialled(&mut self, rail: usize, theirs: PeerEnd, halves: Vec<(ConnectedQp, AdminHalf)>) {
        let mtu = self.config.rails.mtu_max;
        let ours = OwnEnd { qpns: halves.iter().map(|(qp, _)| qp.qpn()).collect(), psns: Vec::new(), mtu };
        self.adopt(rail, ours, theirs, mtu, halves);
    }

    /// Whether a rail would be dialled, but for the peer's address.
    pub(super) fn waits_for_address(&self, rail: usize) -> bool {
        let state = &self.rails[rail];
        state.fabric == Fabric::Tcp && matches!(state.end, End::Down) && state.retry_at.is_none() && self.uses(rail)
    }

    /// Whether the peer of a dialled rail should have it.
    pub(super) fn uses(&self, rail: usize) -> bool {
        let state = &self.rails[rail];
        self.used_fabrics(state.peer) & state.fabric.bit() != 0
    }
}

/// Where a node serves the TCP data protocol. An RDMA node of the stock engine writes garbage into `tcp_data_port`.
fn tcp_port(descriptor: &SegmentDescriptor) -> Option<u16> {
    match (&descriptor.extra.tcp, &descriptor.protocol) {
        (Some(place), _) => Some(place.port),
        (None, Protocol::Tcp) => u16::try_from(descriptor.tcp_data_port).ok().filter(|port| *port != 0),
        _ => None,
    }
}
