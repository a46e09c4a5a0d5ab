//! What is true of the cluster, from the faults alone: which pairs of NICs have been sound for so long that a rail between
//! them has to be in use.

use std::collections::{BTreeMap, BTreeSet};

use moonrail_datapath::units::Nanos;

use super::plan::{Path, Port};

/// A lost rail is in use again this long after everything it needs is back.
pub(crate) const BACK_WITHIN: Nanos = Nanos::from_secs(3);

#[derive(Default)]
struct Pair {
    path_broken: bool,
    /// Since when nothing is wrong with it.
    sound_since: Option<Nanos>,
    /// It has been sound for long enough, while control could do its work.
    ready: bool,
    /// How often it was touched by a fault.
    touched: u32,
}

/// See the module.
pub(crate) struct Ground {
    pairs: BTreeMap<(Port, Port), Pair>,
    link_down: BTreeMap<Port, bool>,
    away: Vec<bool>,
    lost: BTreeSet<Port>,
    /// Since when handshakes, jobs and the store are sound; `None`: they are not.
    clear_since: Option<Nanos>,
}

/// A pair that was ready, and how often it had been touched by then.
pub(crate) type Ready = ((Port, Port), u32);

impl Ground {
    pub(crate) fn new(nodes: usize, nics: usize, now: Nanos) -> Self {
        let ports: Vec<Port> = (0..nodes).flat_map(|node| (0..nics).map(move |nic| (node, nic))).collect();
        let pairs = ports.iter().flat_map(|a| ports.iter().filter(|b| a.0 < b.0).map(|b| (*a, *b)));
        Self {
            pairs: pairs.map(|pair| (pair, Pair { sound_since: Some(now), ..Pair::default() })).collect(),
            link_down: BTreeMap::new(),
            away: vec![false; nodes],
            lost: BTreeSet::new(),
            clear_since: Some(now),
        }
    }

    pub(crate) fn link(&mut self, port: Port, up: bool, now: Nanos) {
        self.settle(now);
        self.link_down.insert(port, !up);
        self.touch(port, now);
    }

    pub(crate) fn path(&mut self, (a, b): (Port, Port), path: Path, now: Nanos) {
        self.settle(now);
        let key = if a.0 < b.0 { (a, b) } else { (b, a) };
        if let Some(pair) = self.pairs.get_mut(&key) {
            pair.path_broken = path != Path::Whole;
        }
        self.judge(|pair| *pair == key, now);
    }

    /// A node is killed or frozen, or is back.
    pub(crate) fn node(&mut self, node: usize, away: bool, now: Nanos) {
        self.settle(now);
        self.away[node] = away;
        self.judge(|(a, b)| a.0 == node || b.0 == node, now);
    }

    /// A NIC is lost for good, as far as its node is concerned.
    pub(crate) fn lose(&mut self, port: Port, now: Nanos) {
        self.lost.insert(port);
        self.touch(port, now);
    }

    /// A node has other NICs than before.
    pub(crate) fn replace(&mut self, node: usize) {
        self.lost.retain(|port| port.0 != node);
    }

    /// Whether a NIC of `node` was lost for good.
    pub(crate) fn has_lost(&self, node: usize) -> bool {
        self.lost.iter().any(|port| port.0 == node)
    }

    /// How many rails `node` can have in the end.
    pub(crate) fn rails(&self, node: usize) -> usize {
        let whole = |(a, b): &&(Port, Port)| !self.lost.contains(a) && !self.lost.contains(b);
        self.pairs.keys().filter(|(a, b)| a.0 == node || b.0 == node).filter(whole).count()
    }

    /// Something was done to a NIC that takes its rails for a moment.
    pub(crate) fn touch(&mut self, port: Port, now: Nanos) {
        self.settle(now);
        self.judge(|(a, b)| *a == port || *b == port, now);
    }

    /// Whether control can do its work.
    pub(crate) fn clear(&mut self, clear: bool, now: Nanos) {
        self.settle(now);
        self.clear_since = clear.then(|| self.clear_since.unwrap_or(now));
    }

    fn judge(&mut self, which: impl Fn(&(Port, Port)) -> bool, now: Nanos) {
        for (key, pair) in self.pairs.iter_mut().filter(|(key, _)| which(key)) {
            let down = |port| {
                self.link_down.get(port).copied().unwrap_or(false) || self.away[port.0] || self.lost.contains(port)
            };
            let broken = pair.path_broken || down(&key.0) || down(&key.1);
            pair.sound_since = (!broken).then_some(now);
            pair.ready = false;
            pair.touched += 1;
        }
    }

    fn settle(&mut self, now: Nanos) {
        let Some(clear) = self.clear_since else { return };
        for pair in self.pairs.values_mut() {
            let sound = pair.sound_since.is_some_and(|since| now.since(since.max(clear)) >= BACK_WITHIN);
            pair.ready |= sound;
        }
    }

    /// The pairs between two nodes over which a rail must be in use now.
    pub(crate) fn ready(&mut self, a: usize, b: usize, now: Nanos) -> Vec<Ready> {
        self.settle(now);
        let of_both = |(x, y): &(Port, Port)| (x.0, y.0) == (a.min(b), a.max(b));
        let ready = self.pairs.iter().filter(|(key, pair)| of_both(key) && pair.ready);
        ready.map(|(key, pair)| (*key, pair.touched)).collect()
    }

    /// Those of them that no fault has touched since.
    pub(crate) fn still_ready(&self, of: &[Ready]) -> Option<(Port, Port)> {
        of.iter().find(|(key, touched)| self.pairs[key].touched == *touched).map(|(key, _)| *key)
    }
}
