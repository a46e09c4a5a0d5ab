//! What can go wrong in the simulated network: each fault is a mark that the rest of the world heeds.

use std::cmp::Reverse;

use super::{Rough, World};
use crate::nic::AsyncEvent;
use crate::units::{GidIndex, Mtu, Nanos, PortNum};

impl World {
    pub(in crate::nic::sim) fn set_link(&mut self, nic: usize, up: bool) {
        if self.nics[nic].link_up == up {
            return;
        }
        self.nics[nic].link_up = up;
        let port = PortNum(1);
        self.nics[nic].events.push(if up { AsyncEvent::PortActive(port) } else { AsyncEvent::PortError(port) });
    }

    pub(in crate::nic::sim) fn set_path(&mut self, a: usize, b: usize, up: bool) {
        for (from, to) in [(a, b), (b, a)] {
            self.nics[from].cut.retain(|&n| n != to);
            self.nics[from].swallowing.retain(|&n| n != to);
            self.nics[from].cutting.retain(|&n| n != to);
            self.nics[from].rough.retain(|(n, _)| *n != to);
            if !up {
                self.nics[from].cut.push(to);
            }
        }
    }

    pub(in crate::nic::sim) fn set_neighbours(&mut self, nic: usize, answer: bool) {
        self.nics[nic].unanswered = !answer;
    }

    pub(in crate::nic::sim) fn neighbours_answer(&self, nic: usize) -> bool {
        !self.nics[nic].unanswered
    }

    pub(in crate::nic::sim) fn swallow(&mut self, a: usize, b: usize) {
        self.set_path(a, b, false);
        self.nics[a].swallowing.push(b);
        self.nics[b].swallowing.push(a);
    }

    pub(in crate::nic::sim) fn cut_short(&mut self, a: usize, b: usize) {
        self.set_path(a, b, true);
        self.nics[a].cutting.push(b);
        self.nics[b].cutting.push(a);
    }

    pub(in crate::nic::sim) fn roughen(&mut self, a: usize, b: usize, loss: f64, delay: Nanos) {
        self.set_path(a, b, true);
        self.nics[a].rough.push((b, Rough { loss, delay }));
        self.nics[b].rough.push((a, Rough { loss, delay }));
    }

    pub(in crate::nic::sim) fn set_speed(&mut self, nic: usize, bytes_per_second: u64) {
        self.nics[nic].port_speed = Some(bytes_per_second);
    }

    pub(in crate::nic::sim) fn fail_device(&mut self, nic: usize) {
        self.nics[nic].alive = false;
        self.nics[nic].events.push(AsyncEvent::DeviceFatal);
    }

    pub(in crate::nic::sim) fn overrun_cqs(&mut self, nic: usize) {
        for cq in self.cqs.iter_mut().filter(|cq| cq.nic == nic) {
            cq.entries.clear();
            cq.overrun = true;
        }
    }

    pub(in crate::nic::sim) fn take_gid(&mut self, nic: usize) {
        let nic = &mut self.nics[nic];
        if let Some(at) = nic.gids.iter().position(|entry| !entry.gid.is_link_local()) {
            nic.taken = Some(nic.gids.remove(at));
            nic.events.push(AsyncEvent::GidChange(PortNum(1)));
        }
    }

    pub(in crate::nic::sim) fn return_gid(&mut self, nic: usize) {
        let nic = &mut self.nics[nic];
        if let Some(mut entry) = nic.taken.take() {
            entry.index = GidIndex(nic.gids.iter().map(|g| g.index.0 + 1).max().unwrap_or(0).max(entry.index.0 + 1));
            nic.gids.push(entry);
            nic.events.push(AsyncEvent::GidChange(PortNum(1)));
        }
    }

    pub(in crate::nic::sim) fn kill_node(&mut self, node: &str) {
        for nic in self.nics.iter_mut().filter(|n| n.node == node) {
            nic.alive = false;
        }
    }

    pub(in crate::nic::sim) fn freeze_node(&mut self, node: &str, frozen: bool) {
        for nic in self.nics.iter_mut().filter(|n| n.node == node) {
            nic.frozen = frozen;
        }
        for mut flight in std::mem::take(&mut self.held) {
            flight.at = self.now;
            self.flights.push(Reverse(flight));
        }
    }

    pub(in crate::nic::sim) fn set_mtu(&mut self, nic: usize, mtu: Mtu) {
        self.nics[nic].mtu = mtu;
    }

    pub(in crate::nic::sim) fn shuffle_gids(&mut self, nic: usize) {
        let shift = 1 + self.random.below(3) as u32;
        for entry in &mut self.nics[nic].gids {
            entry.index = GidIndex(entry.index.0 + shift);
        }
        self.nics[nic].events.push(AsyncEvent::GidChange(PortNum(1)));
    }
}
