//! Which rails there are: those that we plan from what a peer published, and those that it asked for. A rail is made once and kept.

use std::collections::VecDeque;
use std::sync::Arc;

use moonrail_datapath::nic::Fabric;
use moonrail_datapath::units::{CoreId, NicId, PeerId, PeerNicId, RailId};

use super::Brain;
use super::peer::connectable;
use super::rail::{End, Rail};
use crate::handle::RemoteSegment;
use crate::repair::{Backoff, MtuTrial};

/// Rails of one engine at the most.
const MAX_RAILS: usize = 16_384;
/// Up to this many NICs on each side, every pair is a rail.
const FULL_MESH: usize = 4;

impl Brain {
    /// The rails from one NIC to a peer's published ones: all pairs of a few, else those most alike and at least two for
    /// each NIC of ours.
    pub(super) fn plan_rdma(&mut self, peer: PeerId, nic: NicId, segment: &RemoteSegment) {
        let devices = connectable(&segment.descriptor);
        let own_segment = segment.name == self.config.name;
        for at in self.partners(usize::from(nic.0), &devices, own_segment) {
            self.new_rail(peer, nic, devices[at]);
        }
    }

    /// Whether a rail carries what we ask for. One that our `peer_affinity` leaves out is there because the peer asked for it, and
    /// is for the peer alone. Until the peer's NICs are known, no rule binds.
    pub(super) fn claims(&self, rail: usize) -> bool {
        let Rail { peer, nic, peer_nic, .. } = &self.rails[rail];
        let (nic, peer) = (usize::from(nic.0), self.peer(*peer));
        let Some(segment) = peer.segment.as_ref().filter(|_| self.nics[nic].fabric == Fabric::Rdma) else {
            return true;
        };
        let devices = connectable(&segment.descriptor);
        let planned = || self.partners(nic, &devices, segment.name == self.config.name);
        self.affinity(nic, &devices).is_none() || planned().iter().any(|at| devices[*at] == peer.nic_name(*peer_nic))
    }

    /// The peer's devices that `peer_affinity` binds one of our NICs to. `None`: no rule, or one for devices that the peer has not,
    /// which binds nothing.
    fn affinity(&self, nic: usize, devices: &[&str]) -> Option<Vec<usize>> {
        let name = &self.nics[nic].name;
        let (_, allowed) = self.config.rails.peer_affinity.iter().find(|(local, _)| local == name)?;
        let bound: Vec<usize> = (0..devices.len()).filter(|d| allowed.iter().any(|a| a == devices[*d])).collect();
        (!bound.is_empty()).then_some(bound)
    }

    fn partners(&self, nic: usize, devices: &[&str], own_segment: bool) -> Vec<usize> {
        let name = &self.nics[nic].name;
        let same = devices.iter().position(|d| d == name);
        if own_segment {
            // A NIC reaches itself; whether it reaches its neighbour in the same machine depends on the network.
            return same.into_iter().collect();
        }
        if let (true, Some(same)) = (self.config.rails.same_name_only, same) {
            return vec![same];
        }
        if let Some(bound) = self.affinity(nic, devices) {
            return bound;
        }
        let ours = self.nics.iter().filter(|nic| nic.fabric == Fabric::Rdma).count();
        if ours <= FULL_MESH && devices.len() <= FULL_MESH {
            return (0..devices.len()).collect();
        }
        let Some(first) = same.or((!devices.is_empty()).then(|| nic % devices.len())) else { return Vec::new() };
        let second = (first + 1) % devices.len();
        if first == second { vec![first] } else { vec![first, second] }
    }

    /// The rail from `nic` to the peer's `device`, made if it is new. `None`: no more rails, or NICs, are kept.
    pub(super) fn new_rail(&mut self, peer: PeerId, nic: NicId, device: &str) -> Option<usize> {
        let peer_path = format!("{}@{device}", self.peer(peer).server);
        if let Some(rail) = self.by_path.get(&(nic, peer_path.clone())).copied() {
            return Some(rail);
        }
        let peer_nic = self.peer_nic(peer, device)?;
        let count = self.config.rails.qps_per_rail;
        let rail = self.add_rail(peer, nic, peer_nic, peer_path.clone(), count)?;
        self.by_path.insert((nic, peer_path), rail);
        Some(rail)
    }

    /// A new rail with `count` queue pairs. `None`: no more are kept.
    pub(super) fn add_rail(
        &mut self,
        peer: PeerId,
        nic: NicId,
        peer_nic: PeerNicId,
        peer_path: String,
        count: usize,
    ) -> Option<usize> {
        if self.rails.len() >= MAX_RAILS {
            return None;
        }
        let at = self.rails.len();
        self.rails.push(Rail {
            id: RailId(at as u32),
            peer,
            nic,
            peer_nic,
            fabric: peer_nic.fabric(),
            core: CoreId(0),
            peer_path,
            count,
            counters: Arc::default(),
            lives: 0,
            end: End::Down,
            asked: None,
            reply: None,
            heard: None,
            requests: VecDeque::new(),
            looking: false,
            old: Vec::new(),
            backoff: Backoff::default(),
            mtu: MtuTrial::default(),
            swallowed: 0,
            retry_at: None,
            failing_since: None,
            failures: 0,
            trouble: None,
            incident: None,
            fence: super::fence::Asking::default(),
            questions: Vec::new(),
            dying: 0,
            evicted: None,
            left: None,
            evictions: 0,
            patience: super::evict::IDLE_FOR,
            kept: None,
            claims: true,
        });
        self.rails[at].core = self.choose_core(at);
        self.peer_mut(peer).rails.push(at);
        Some(at)
    }

    /// Of the cores that poll the NIC, the one with the fewest rails.
    pub(super) fn choose_core(&self, rail: usize) -> CoreId {
        let nic = self.rails[rail].nic;
        let load = |core: &CoreId| {
            let others = self.rails.iter().enumerate().filter(|(at, r)| *at != rail && r.core == *core);
            others.filter(|(_, r)| r.nic == nic || !matches!(r.end, End::Down)).count()
        };
        self.nics[usize::from(nic.0)].cores.iter().copied().min_by_key(load).unwrap_or(CoreId(0))
    }
}
