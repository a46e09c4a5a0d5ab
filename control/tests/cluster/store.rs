//! The cluster's store: what it holds, who watches it, and how it fails.

use super::*;

impl Cluster {
    /// The store loses all keys, and tells whom it tells.
    pub(crate) fn wipe_store(&mut self) {
        for key in std::mem::take(&mut self.store).into_keys() {
            self.changed(&key, None);
        }
        // Leases are gone with it, as the next keep-alive of each node tells.
        for node in 0..self.nodes.len() {
            self.after(SECOND, node, Delivery::Event(Event::LeaseLost));
        }
    }

    /// The lease of a node's keys ends: they are gone, and the node hears of it.
    pub(crate) fn lose_lease(&mut self, node: usize) {
        let host = format!("node{node}");
        let keys: Vec<String> = self.store.keys().filter(|key| key.ends_with(&host)).cloned().collect();
        for key in keys {
            self.store.remove(&key);
            self.changed(&key, None);
        }
        self.after(Nanos::from_millis(1), node, Delivery::Event(Event::LeaseLost));
    }

    /// Changes may have been missed by everybody.
    pub(crate) fn tell_missed_changes(&mut self) {
        for node in 0..self.nodes.len() {
            self.after(Nanos::from_millis(1), node, Delivery::Event(Event::ChangesMissed));
        }
    }

    pub(super) fn changed(&mut self, key: &str, value: Option<&Vec<u8>>) {
        for watcher in 0..self.nodes.len() {
            if self.nodes[watcher].watched.contains(key) && !self.happens(self.weather.missed_changes) {
                let delay = self.delay();
                let event = Event::Changed { key: key.to_owned(), value: value.cloned() };
                self.after(delay, watcher, Delivery::Event(event));
            }
        }
    }

    pub(super) fn store_op(&mut self, node: usize, op: StoreOp, token: Token) {
        if self.store_down || (self.choices.below(100) < self.weather.store_errors) {
            let result = Err(moonrail_control::metadata::StoreError::Silent {
                endpoint: "the simulated store".into(),
                after: std::time::Duration::from_secs(1),
            });
            return self.tell(node, Event::Stored { token, result });
        }
        let mut changed = None;
        let value = match op {
            StoreOp::Get(key) => self.store.get(&key).cloned(),
            StoreOp::Has(key) => self.store.contains_key(&key).then(Vec::new),
            StoreOp::Put(key, value) => {
                changed = Some((key.clone(), Some(value.clone())));
                self.store.insert(key, value);
                None
            }
            StoreOp::Delete(key) => {
                self.store.remove(&key);
                changed = Some((key, None));
                None
            }
        };
        self.tell(node, Event::Stored { token, result: Ok(value) });
        if let Some((key, value)) = changed {
            self.changed(&key, value.as_ref());
        }
    }
}
