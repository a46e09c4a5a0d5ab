//! Our own keys: where our control port is, and our segment. Put at the start, after each change, and whenever they
//! vanish; taken away at the end, if they are still ours. A store that fails stops nothing that is established.

use std::time::Duration;

use moonrail_datapath::nic::{Fabric, Offer};
use moonrail_datapath::units::{Nanos, NicId};

use super::event::{Action, Answer, BeginError, CallId, StoreOp};
use super::fabric::TCP_BATCH;
use super::peer::NoReply;
use super::{Brain, Kind, Pending, Timer};
use crate::config::LogLevel;
use crate::connect::NicFacts;
use crate::error::{ControlError, PublishError};
use crate::metadata::rpc_meta::timestamp;
use crate::metadata::{
    BufferEntry, DeviceEntry, NicPreference, PriorityMatrix, Protocol, RpcMeta, SegmentDescriptor, StoreError,
    peer as p2p,
};
use crate::wire::{Frame, MessageType, NodeExtra, TcpPlace, Token};

/// How long after a failure our keys are put again.
const AGAIN: Nanos = Nanos::from_secs(1);
/// How often we look whether our keys are in the store. A store that was wiped tells nobody: an HTTP store never, and etcd
/// only who watches, or renews a lease.
const LOOK_EVERY: Nanos = Nanos::from_secs(5);

/// What is on its way to or from the store.
#[derive(Clone, Debug)]
pub(super) enum Step {
    /// Our address.
    PutAddress,
    /// The address that an HTTP store has under our name already.
    ReadOther,
    /// Whether somebody answers there.
    AskOther(StoreError),
    /// It is taken away: nobody does.
    DeleteOther,
    /// Our segment, as of this version.
    PutSegment(u64),
    /// Our address again, which vanished.
    PutAddressAgain,
    /// Whose address stands there instead.
    ReadAgain,
    /// Whether our address is there.
    Look,
    /// Whether our segment is.
    LookForSegment,
    /// At the end: whether our keys are still ours.
    CheckAddress,
    CheckSegment,
    /// At the end: they are taken away.
    Delete,
}

impl Step {
    fn writes(&self) -> bool {
        matches!(self, Self::PutAddress | Self::PutAddressAgain | Self::PutSegment(_))
    }
}

/// How far our own keys are.
#[derive(Debug, Default)]
pub(super) struct Own {
    begun: bool,
    /// The address is in the store.
    placed: bool,
    /// Counts what our segment should be.
    version: u64,
    /// What the store has.
    stored: u64,
    putting: bool,
    /// The last text that we put.
    text: Vec<u8>,
    /// What peers that ask us are told: made once for all of them, empty when something in it changed.
    told: Vec<u8>,
    retry_at: Option<Nanos>,
    /// When to look for our keys, and how many answers are out.
    look_at: Option<Nanos>,
    looking: u8,
    /// A failure was logged and not yet mended.
    troubled: bool,
    /// Operations of the end that are on their way.
    withdrawing: u32,
    /// Puts that are on their way.
    writing: u32,
    intruder_logged: bool,
}

impl Own {
    pub(super) fn is_withdrawn(&self) -> bool {
        self.withdrawing == 0
    }

    pub(super) fn withdrawals(&self) -> u32 {
        self.withdrawing
    }
}

impl Brain {
    /// What this node offers now, as a peer that asks for it is told. A request of twelve bytes must not cost us the
    /// writing of a descriptor of megabytes.
    pub(super) fn own_text(&mut self) -> Vec<u8> {
        if self.own.told.is_empty() {
            self.own.told = p2p::reply(Some(&self.own_descriptor()));
        }
        self.own.told.clone()
    }

    /// Our buffers or NICs are not what they were.
    pub(super) fn own_text_changed(&mut self) {
        self.own.told = Vec::new();
    }

    /// What this node offers now.
    pub(super) fn own_descriptor(&self) -> SegmentDescriptor {
        let rdma = || self.nics.iter().filter(|nic| nic.fabric == Fabric::Rdma);
        let mut matrix = self.config.matrix.clone();
        if matrix.0.is_empty() {
            let preferred = rdma().map(|nic| nic.name.clone()).collect();
            matrix = PriorityMatrix(
                [("cpu:0".to_owned(), NicPreference { preferred, available: Vec::new() })].into_iter().collect(),
            );
        }
        let time = self.config.epoch + Duration::from_nanos(self.now.0);
        let mut descriptor = SegmentDescriptor {
            name: self.config.name.clone(),
            protocol: Protocol::Rdma,
            devices: rdma().map(|nic| device_entry(&nic.name, &nic.facts)).collect(),
            buffers: self.buffers.clone(),
            priority_matrix: matrix,
            timestamp: timestamp(time),
            tcp_proto_version: 1,
            extra: self.own_extra(),
            ..SegmentDescriptor::default()
        };
        self.offer_dialled(&mut descriptor);
        descriptor.extra.path_mtus =
            rdma().map(|nic| (nic.name.clone(), nic.facts.active_mtu.min(self.config.rails.mtu_max))).collect();
        // A descriptor that cannot be arranged was refused by `publish`, so this one can.
        let _ = descriptor.arrange();
        descriptor
    }

    /// What can be dialled here. A node without RDMA says in stock members where it serves TCP.
    fn offer_dialled(&self, descriptor: &mut SegmentDescriptor) {
        let host = &self.config.rpc.ip_or_host_name;
        if descriptor.devices.is_empty() {
            descriptor.protocol = Protocol::Tcp;
            descriptor.priority_matrix = PriorityMatrix::default();
            descriptor.tcp_data_host.clone_from(host);
            descriptor.tcp_proto_version = 2;
        }
        for offer in self.nics.iter().filter_map(|nic| nic.offer) {
            match offer {
                Offer::Shm { token } => descriptor.extra.shm = Some(Token(token)),
                Offer::Tcp { port } => {
                    descriptor.extra.capabilities.push(TCP_BATCH.to_owned());
                    if descriptor.protocol == Protocol::Tcp {
                        descriptor.tcp_data_port = i32::from(port);
                    } else {
                        descriptor.extra.tcp = Some(TcpPlace { host: host.clone(), port });
                    }
                }
            }
        }
    }

    /// What every hello of ours says of this node.
    pub(super) fn own_extra(&self) -> NodeExtra {
        NodeExtra {
            boot_id: self.config.boot_id.clone(),
            incarnation: Some(self.config.incarnation),
            ..NodeExtra::default()
        }
    }

    pub(super) fn begin(&mut self) {
        // Whoever opened the NICs announced them; here only those that cannot be used yet, and later every change.
        for nic in 0..self.nics.len() {
            if !self.nics[nic].is_up() {
                self.announce_nic(NicId(nic as u16));
            }
        }
        self.own.version += 1;
        if self.config.store.is_none() {
            (self.own.begun, self.own.stored) = (true, self.own.version);
            return self.begun(&Ok(()));
        }
        self.put_address(Step::PutAddress);
    }

    fn begun(&mut self, result: &Result<(), StoreError>) {
        self.own.begun = result.is_ok();
        if let (Some(address), Some(segment), true) = (self.address_key(), self.segment_key(), self.own.begun) {
            self.out.push(Action::Watch { key: address });
            self.out.push(Action::Watch { key: segment });
            self.look_later();
        }
        for id in self.callers(|kind| *kind == Kind::Begin) {
            self.finish(id, Answer::Begun(result.clone().map_err(BeginError::Store)));
        }
    }

    fn own_op(&mut self, step: Step, op: StoreOp) {
        self.own.writing += u32::from(step.writes());
        let token = self.token(Pending::Own(step));
        self.ask_store(token, op);
    }

    fn put_address(&mut self, step: Step) {
        let Some(key) = self.address_key().filter(|_| !self.stopping) else { return };
        let value = self.config.rpc.encode();
        self.own_op(step, StoreOp::Put(key, value));
    }

    fn address_key(&self) -> Option<String> {
        self.config.store.as_ref().map(|keys| keys.rpc_meta(&self.config.name))
    }

    fn segment_key(&self) -> Option<String> {
        self.config.store.as_ref().map(|keys| keys.segment(&self.config.name))
    }

    fn put_segment(&mut self) {
        let Some(key) = self.segment_key() else {
            self.own.stored = self.own.version;
            return self.published(&Ok(()));
        };
        if self.own.putting || self.stopping {
            return;
        }
        self.own.putting = true;
        self.own.text = self.own_descriptor().encode();
        let op = StoreOp::Put(key, self.own.text.clone());
        self.own_op(Step::PutSegment(self.own.version), op);
    }

    pub(super) fn publish(&mut self, id: CallId, buffers: Vec<BufferEntry>, until: Nanos) {
        let rdma = self.nics.iter().filter(|nic| nic.fabric == Fabric::Rdma);
        let candidate = SegmentDescriptor {
            devices: rdma.map(|nic| device_entry(&nic.name, &nic.facts)).collect(),
            buffers,
            ..SegmentDescriptor::default()
        };
        if let Err(error) = candidate.check() {
            return self.answer(id, Answer::Published(Err(error.into())));
        }
        self.buffers = candidate.buffers;
        self.own_text_changed();
        self.own.version += 1;
        self.wait(id, until, Kind::Publish(self.own.version));
        self.put_segment();
    }

    /// Something in our descriptor besides the buffers changed (a GID), or the keys are gone.
    pub(super) fn republish(&mut self, why: &str) {
        if self.config.store.is_none() || !self.own.begun || self.stopping {
            return;
        }
        self.log(LogLevel::Info, format!("publishing this node again: {why}"));
        self.own.placed = false;
        self.own.version += 1;
        // The segment follows: whoever has our name now is not to be overwritten.
        self.put_address(Step::PutAddressAgain);
    }

    fn look_later(&mut self) {
        let at = self.now.plus(LOOK_EVERY);
        self.own.look_at = Some(at);
        self.at(at, Timer::Own);
    }

    /// Looks whether our keys are there.
    pub(super) fn look_for_own_keys(&mut self) {
        if self.own.looking > 0 || !self.own.begun || self.stopping {
            return;
        }
        if let (Some(address), Some(segment)) = (self.address_key(), self.segment_key()) {
            self.own.looking = 2;
            self.own_op(Step::Look, StoreOp::Get(address));
            // Whoever publishes under our name puts an address too, so that is read; of the segment it is enough to know.
            self.own_op(Step::LookForSegment, StoreOp::Has(segment));
        }
    }

    /// Answers whoever waits for a version that the store has, or cannot have now.
    fn published(&mut self, result: &Result<(), StoreError>) {
        let stored = self.own.stored;
        let failed = result.as_ref().err().cloned();
        for id in self.callers(|kind| matches!(kind, Kind::Publish(v) if *v <= stored || failed.is_some())) {
            let answer = failed.clone().map_or(Ok(()), |error| Err(PublishError::Metadata(error)));
            self.finish(id, Answer::Published(answer));
        }
    }

    pub(super) fn own_stored(&mut self, step: Step, result: Result<Option<Vec<u8>>, StoreError>) {
        if step.writes() {
            self.own.writing -= 1;
            if self.stopping && self.own.writing == 0 {
                self.check_keys();
            }
        }
        match (step, result) {
            (Step::PutAddress, Ok(_)) => {
                self.own.placed = true;
                self.put_segment();
            }
            // What a crash left behind on an HTTP store looks like another node of our name. Whoever answers decides.
            (Step::PutAddress, Err(error @ StoreError::DuplicateRpcMeta { .. })) => {
                if let (Some(key), None) = (self.address_key(), self.own.retry_at) {
                    self.own.retry_at = Some(self.now);
                    self.own_op(Step::ReadOther, StoreOp::Get(key));
                } else {
                    self.begun(&Err(error));
                }
            }
            (Step::ReadOther, Ok(value)) => {
                let other = value.as_deref().and_then(|text| RpcMeta::decode(text).ok());
                let key = self.address_key().unwrap_or_default();
                match other {
                    Some(other) if other != self.config.rpc => {
                        let owner = format!("{}:{}", other.ip_or_host_name, other.rpc_port);
                        let taken = StoreError::NameTaken { name: self.config.name.clone(), owner };
                        let token = self.token(Pending::Own(Step::AskOther(taken)));
                        let probe = crate::wire::notify::PROBE.to_vec();
                        self.dial_at(token, other, Frame::typed(MessageType::Probe, probe));
                    }
                    // Our own address, which nobody else can listen on while we do, or no address at all.
                    _ => self.own_op(Step::DeleteOther, StoreOp::Delete(key)),
                }
            }
            (Step::DeleteOther, Ok(_)) => self.put_address(Step::PutAddress),
            (Step::PutAddress | Step::ReadOther | Step::DeleteOther, Err(error)) => self.begun(&Err(error)),
            (Step::PutSegment(version), Ok(_)) => {
                self.own.putting = false;
                self.own.stored = version;
                self.mended();
                // A segment that was published meanwhile may be there before the address is.
                if !self.own.begun && self.own.placed {
                    self.own.retry_at = None;
                    self.begun(&Ok(()));
                }
                self.published(&Ok(()));
                if self.own.version > version {
                    self.put_segment();
                }
            }
            (Step::PutSegment(_), Err(error)) => {
                self.own.putting = false;
                if self.own.begun {
                    self.troubled(&error);
                } else if self.own.placed {
                    self.begun(&Err(error.clone()));
                }
                self.published(&Err(error));
            }
            (Step::PutAddressAgain, Ok(_)) => self.placed_again(),
            (Step::PutAddressAgain, Err(StoreError::DuplicateRpcMeta { key })) => {
                self.own_op(Step::ReadAgain, StoreOp::Get(key));
            }
            (Step::ReadAgain, Ok(Some(text))) if is_address(&text, &self.config.rpc) => self.placed_again(),
            (Step::ReadAgain, Ok(Some(text))) => {
                self.own_changed(true, Some(&text));
                self.own.retry_at = Some(self.now.plus(LOOK_EVERY));
                self.at(self.now.plus(LOOK_EVERY), Timer::Own);
            }
            (Step::ReadAgain, Ok(None)) => self.put_address(Step::PutAddressAgain),
            (Step::PutAddressAgain | Step::ReadAgain, Err(error)) => self.troubled(&error),
            (Step::Look, result) => {
                self.own.looking -= 1;
                // A store that does not answer tells nothing.
                if let Ok(value) = result {
                    self.own_changed(true, value.as_deref());
                }
            }
            (Step::LookForSegment, result) => {
                self.own.looking -= 1;
                if let (Ok(None), false) = (result, self.own.putting) {
                    self.own_changed(false, None);
                }
            }
            (Step::CheckAddress, result) => {
                let ours = result.is_ok_and(|value| value.is_some_and(|v| is_address(&v, &self.config.rpc)));
                let key = self.address_key().filter(|_| ours);
                self.withdraw(key);
            }
            (Step::CheckSegment, result) => {
                let ours = result.is_ok_and(|value| value.is_some_and(|v| self.is_own_segment(&v)));
                let key = self.segment_key().filter(|_| ours);
                self.withdraw(key);
            }
            (Step::Delete, _) => self.withdrawn(),
            (Step::AskOther(_), _) => {}
        }
    }

    fn is_own_segment(&self, text: &[u8]) -> bool {
        SegmentDescriptor::decode(text).is_ok_and(|d| d.extra.incarnation == Some(self.config.incarnation))
    }

    /// Whether the node that holds our name on an HTTP store answered.
    pub(super) fn own_probed(&mut self, step: Step, result: &Result<Frame, NoReply>) {
        let Step::AskOther(error) = step else { return };
        match result {
            Ok(_) => self.begun(&Err(error)),
            Err(silence) => {
                let text = silence.text();
                self.log(
                    LogLevel::Warning,
                    format!("the metadata has an address of an earlier life of this node, where nobody answers ({text}): replacing it"),
                );
                let key = self.address_key().unwrap_or_default();
                self.own_op(Step::DeleteOther, StoreOp::Delete(key));
            }
        }
    }

    fn placed_again(&mut self) {
        self.own.placed = true;
        self.put_segment();
    }

    fn troubled(&mut self, error: &StoreError) {
        if !self.own.troubled {
            self.own.troubled = true;
            self.log(
                LogLevel::Warning,
                format!("this node could not be published, transfers go on and it will be tried again: {error}"),
            );
        }
        self.own.retry_at = Some(self.now.plus(AGAIN));
        self.at(self.now.plus(AGAIN), Timer::Own);
    }

    fn mended(&mut self) {
        if self.own.placed && std::mem::take(&mut self.own.troubled) {
            self.log(LogLevel::Info, "this node is published again".to_owned());
        }
    }

    pub(super) fn own_due(&mut self) {
        if self.stopping || !self.own.begun {
            return;
        }
        if self.own.look_at.take_if(|at| *at <= self.now).is_some() {
            self.look_for_own_keys();
            self.look_later();
        }
        if self.own.retry_at.take_if(|at| *at <= self.now).is_none() {
            return;
        }
        if self.own.placed {
            self.put_segment();
        } else {
            self.put_address(Step::PutAddressAgain);
        }
    }

    /// One of our own keys changed, by somebody else's hand or by our own.
    pub(super) fn own_changed(&mut self, address: bool, value: Option<&[u8]>) {
        match value {
            // They are being put already.
            None if !self.own.placed => {}
            None => self.republish("our keys are gone from the store"),
            Some(text) => {
                let ours = if address { is_address(text, &self.config.rpc) } else { self.is_own_segment(text) };
                if !ours && !std::mem::replace(&mut self.own.intruder_logged, true) {
                    let name = self.config.name.clone();
                    self.log(
                        LogLevel::Error,
                        format!(
                            "another process publishes itself as {name}: peers find that one now; give each node a name of its own"
                        ),
                    );
                }
            }
        }
    }

    /// At the end: takes our keys away, if they are ours.
    pub(super) fn withdraw_keys(&mut self) {
        // Also what was put before a start that failed.
        if self.config.store.is_some() && self.own.version > 0 {
            self.own.withdrawing = 2;
            if self.own.writing == 0 {
                self.check_keys();
            }
        }
    }

    /// When no put of ours is on its way that would come after.
    fn check_keys(&mut self) {
        if let (Some(address), Some(segment)) = (self.address_key(), self.segment_key()) {
            self.own_op(Step::CheckAddress, StoreOp::Get(address));
            self.own_op(Step::CheckSegment, StoreOp::Get(segment));
        }
    }

    fn withdraw(&mut self, key: Option<String>) {
        match key {
            Some(key) => self.own_op(Step::Delete, StoreOp::Delete(key)),
            None => self.withdrawn(),
        }
    }

    fn withdrawn(&mut self) {
        self.own.withdrawing = self.own.withdrawing.saturating_sub(1);
        self.maybe_stopped();
    }

    pub(super) fn refuse_waiting(&mut self) {
        for id in self.callers(|kind| matches!(kind, Kind::Publish(_))) {
            self.finish(id, Answer::Published(Err(ControlError::Gone.into())));
        }
        for id in self.callers(|kind| matches!(kind, Kind::Open(..))) {
            self.finish(id, Answer::Opened(Err(ControlError::Gone.into())));
        }
        for id in self.callers(|kind| matches!(kind, Kind::Message(_))) {
            self.finish(id, Answer::Notified(Err(ControlError::Gone.into())));
        }
    }
}

fn device_entry(name: &str, facts: &NicFacts) -> DeviceEntry {
    DeviceEntry { name: name.to_owned(), gid: facts.gid.into(), lid: facts.lid }
}

fn is_address(text: &[u8], own: &RpcMeta) -> bool {
    RpcMeta::decode(text).is_ok_and(|meta| meta == *own)
}
