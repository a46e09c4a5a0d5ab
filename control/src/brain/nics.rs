//! Our NICs coming and going. A port that goes down takes its rails with it at once; one that comes back is looked at
//! anew (its GID may have moved) and its rails are connected without waiting for their back-off.

use moonrail_datapath::nic::{AsyncEvent, Fabric, Offer, PortState};
use moonrail_datapath::units::{CoreId, Mtu, Nanos, NicId};

use super::rail::End;
use super::{Brain, BrainNic, Pending, Timer};
use crate::config::LogLevel;
use crate::connect::{JobKind, NicFacts, Outcome};
use crate::gid::GidValue;
use crate::handle::Charge;
use crate::handshake::OwnNic;

/// How often a port that is down is looked at, in case its event was lost.
const LOOK_AGAIN: Nanos = Nanos::from_secs(1);

pub(super) struct NicState {
    pub(super) name: String,
    pub(super) fabric: Fabric,
    pub(super) offer: Option<Offer>,
    pub(super) facts: NicFacts,
    /// Cores that can use it.
    pub(super) cores: Vec<CoreId>,
    fixed_gid: bool,
    /// The GID it began with, and goes back to whenever that is there.
    began: GidValue,
    /// Its port is active and has our GID.
    up: bool,
    /// The device is lost for good.
    dead: bool,
    querying: bool,
    query_again: bool,
    /// When its rails are to be counted, if that is planned.
    pub(super) relief: Option<Nanos>,
    /// Rails evicted since the last line about them, and when that was.
    pub(super) unlogged: u64,
    pub(super) logged: Option<Nanos>,
}

impl NicState {
    pub(super) fn new(nic: &BrainNic) -> Self {
        Self {
            name: nic.name.clone(),
            fabric: nic.fabric,
            offer: nic.offer,
            facts: nic.facts.clone(),
            cores: nic.cores.clone(),
            fixed_gid: nic.fixed_gid,
            began: (nic.facts.gid, nic.facts.kind),
            up: nic.fabric.is_dialled() || is_usable(&nic.facts),
            dead: false,
            querying: false,
            query_again: false,
            relief: None,
            unlogged: 0,
            logged: None,
        }
    }

    pub(super) fn is_up(&self) -> bool {
        self.up && !self.is_lost()
    }

    /// Nothing brings it back in this process: the device failed, or each core lost its completion queue on it.
    pub(super) fn is_lost(&self) -> bool {
        self.dead || self.cores.is_empty()
    }
}

fn is_usable(facts: &NicFacts) -> bool {
    facts.state == PortState::Active && facts.index.is_some()
}

impl Brain {
    /// One of our RDMA NICs, by name: those that hellos are about.
    pub(super) fn nic_named(&self, device: &str) -> Option<NicId> {
        let of_peers = |nic: &NicState| nic.fabric == Fabric::Rdma && nic.name == device;
        self.nics.iter().position(of_peers).map(|at| NicId(at as u16))
    }

    /// One of our NICs, as hellos present it.
    pub(super) fn own_nic(&self, nic: NicId) -> OwnNic {
        let state = &self.nics[usize::from(nic.0)];
        OwnNic {
            path: format!("{}@{}", self.config.name, state.name),
            gid: state.facts.gid,
            kind: state.facts.kind,
            lid: state.facts.lid,
        }
    }

    /// Largest path MTU that one of our NICs can use now: its active one, or less where the user said so.
    pub(super) fn own_mtu(&self, nic: NicId) -> Mtu {
        self.nics[usize::from(nic.0)].facts.active_mtu.min(self.config.rails.mtu_max)
    }

    /// The line operators look for.
    pub(super) fn announce_nic(&mut self, nic: NicId) {
        let state = &self.nics[usize::from(nic.0)];
        let NicFacts { lid, gid, index, active_mtu, state: port, .. } = &state.facts;
        let place = index.map_or_else(|| "gone".to_owned(), |i| i.to_string());
        let text = format!(
            "RDMA device: {}, LID: {lid}, GID: (GID_Index {place}) {gid}, MTU: {active_mtu}, port {port:?}",
            state.name
        );
        let (level, up) = if state.up { (LogLevel::Info, true) } else { (LogLevel::Warning, false) };
        self.log(level, text);
        if !up {
            self.at(self.now.plus(LOOK_AGAIN), Timer::Nic(nic.0));
        }
    }

    pub(super) fn nic_event(&mut self, nic: NicId, event: AsyncEvent) {
        if usize::from(nic.0) >= self.nics.len() {
            return;
        }
        let name = self.nics[usize::from(nic.0)].name.clone();
        match event {
            AsyncEvent::PortError(port) => {
                let text = format!("device {name} port {port} lost its link; check the cable and `rdma link`");
                self.nic_down(nic, &text);
                self.at(self.now.plus(LOOK_AGAIN), Timer::Nic(nic.0));
            }
            AsyncEvent::PortActive(_) | AsyncEvent::GidChange(_) | AsyncEvent::LidChange(_) => self.look_at(nic),
            AsyncEvent::DeviceFatal => {
                self.nics[usize::from(nic.0)].dead = true;
                let text = format!("device {name} failed (fatal event); see `dmesg`, then restart this process");
                self.nic_down(nic, &text);
            }
            AsyncEvent::CqError => {
                let text = format!("a completion queue of device {name} overran: outcomes are lost");
                self.nic_down(nic, &text);
                self.look_at(nic);
            }
            AsyncEvent::QpFatal(qpn) => {
                let found = self.rails.iter().position(|rail| rail.nic == nic && rail.has_qpn(qpn));
                if let Some(rail) = found {
                    self.lose(rail, &format!("queue pair {qpn} of device {name} failed (fatal event)"));
                }
            }
            AsyncEvent::Other(number) => {
                self.log(
                    LogLevel::Info,
                    format!("Worker: Received context async event {number} for context {name}: nothing to do"),
                );
            }
        }
    }

    /// A core can no longer trust its completion queue on this NIC.
    pub(super) fn cq_lost(&mut self, core: CoreId, nic: NicId) {
        let Some(state) = self.nics.get_mut(usize::from(nic.0)) else { return };
        state.cores.retain(|c| *c != core);
        let text = format!(
            "core {core} lost its completion queue on device {}: outcomes are lost, the core uses it no more",
            state.name
        );
        self.log(LogLevel::Error, text.clone());
        for rail in 0..self.rails.len() {
            if self.rails[rail].nic == nic && self.rails[rail].core == core {
                self.lose_to(rail, &text, Charge::Port);
            }
        }
    }

    fn nic_down(&mut self, nic: NicId, text: &str) {
        if std::mem::replace(&mut self.nics[usize::from(nic.0)].up, false) {
            self.log(LogLevel::Warning, text.to_owned());
        }
        for rail in 0..self.rails.len() {
            if self.rails[rail].nic == nic {
                self.lose_to(rail, text, Charge::Port);
            }
        }
    }

    /// Looks at the port and its GID table again: its MTU may have changed, of which no device tells.
    pub(super) fn look_at(&mut self, nic: NicId) {
        let state = &mut self.nics[usize::from(nic.0)];
        // What is dialled has no port.
        if state.dead || self.stopping || state.fabric.is_dialled() {
            return;
        }
        if std::mem::replace(&mut state.querying, true) {
            state.query_again = true;
            return;
        }
        let job =
            JobKind::Query { began: state.began, used: (state.facts.gid, state.facts.kind), choose: !state.fixed_gid };
        self.run(nic, job, Pending::Query);
    }

    pub(super) fn nic_due(&mut self, nic: NicId) {
        if !self.nics[usize::from(nic.0)].up {
            self.look_at(nic);
        }
    }

    pub(super) fn queried(&mut self, nic: NicId, outcome: Outcome) {
        let state = &mut self.nics[usize::from(nic.0)];
        state.querying = false;
        if std::mem::take(&mut state.query_again) {
            return self.look_at(nic);
        }
        let Outcome::Queried(Ok(facts)) = outcome else {
            return self.at(self.now.plus(LOOK_AGAIN), Timer::Nic(nic.0));
        };
        let was_up = state.up;
        let moved = (facts.gid, facts.lid) != (state.facts.gid, state.facts.lid);
        let changed = facts != state.facts;
        state.facts = facts;
        state.up = is_usable(&state.facts);
        let (is_up, name) = (state.up, state.name.clone());
        self.own_text_changed();
        if changed || was_up != is_up {
            self.announce_nic(nic);
        } else if !is_up {
            self.at(self.now.plus(LOOK_AGAIN), Timer::Nic(nic.0));
        }
        if was_up && (!is_up || moved) {
            let text = format!("the address of device {name} changed");
            for rail in 0..self.rails.len() {
                if self.rails[rail].nic == nic {
                    self.lose_to(rail, &text, Charge::Port);
                }
            }
        }
        if moved {
            self.republish(&format!("the address of device {name} changed"));
        }
        if is_up && (!was_up || moved) {
            for rail in 0..self.rails.len() {
                if self.rails[rail].nic == nic {
                    self.rails[rail].forgive();
                    self.rails[rail].retry_at = None;
                    if matches!(self.rails[rail].end, End::Down) {
                        self.attempt(rail);
                    }
                }
            }
        }
    }
}
