//! A store that is a map in this process: for tests, simulation and one-process demonstrations (`memory://NAME`).

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use tokio::sync::mpsc;

use super::store::{Change, Fault, StoreError};

#[derive(Debug, Default)]
struct Contents {
    values: BTreeMap<String, Vec<u8>>,
    watchers: Vec<(String, mpsc::UnboundedSender<Change>)>,
    down: bool,
}

/// A handle to a shared map.
#[derive(Clone, Debug)]
pub struct MemoryStore {
    name: String,
    contents: Arc<Mutex<Contents>>,
}

impl MemoryStore {
    /// The map of this name, one per process and name; made at first use, and there until the process ends.
    pub fn named(name: &str) -> Self {
        static ALL: OnceLock<Mutex<HashMap<String, Arc<Mutex<Contents>>>>> = OnceLock::new();
        let all = ALL.get_or_init(Mutex::default);
        let contents = Arc::clone(locked(all).entry(name.to_owned()).or_default());
        Self { name: name.to_owned(), contents }
    }

    /// Makes every call fail as unreachable, and every watch end, until set back: a fault for tests.
    pub fn set_down(&self, down: bool) {
        let mut contents = locked(&self.contents);
        contents.down = down;
        if down {
            contents.watchers.clear();
        }
    }

    fn open(&self) -> Result<MutexGuard<'_, Contents>, StoreError> {
        let contents = locked(&self.contents);
        if contents.down { Err(unreachable(&self.name)) } else { Ok(contents) }
    }

    pub(crate) fn get(&self, key: &str) -> Result<Option<Vec<u8>>, StoreError> {
        Ok(self.open()?.values.get(key).cloned())
    }

    pub(crate) fn put(&self, key: &str, value: &[u8]) -> Result<(), StoreError> {
        let mut contents = self.open()?;
        contents.values.insert(key.to_owned(), value.to_vec());
        contents.tell(key, || Change::Put { key: key.to_owned(), value: value.to_vec() });
        Ok(())
    }

    pub(crate) fn delete(&self, key: &str) -> Result<bool, StoreError> {
        let mut contents = self.open()?;
        let was = contents.values.remove(key).is_some();
        if was {
            contents.tell(key, || Change::Deleted { key: key.to_owned() });
        }
        Ok(was)
    }

    pub(crate) fn list(&self, prefix: &str) -> Result<Vec<(String, Vec<u8>)>, StoreError> {
        let contents = self.open()?;
        let from = contents.values.range(prefix.to_owned()..);
        Ok(from
            .take_while(|(key, _)| key.starts_with(prefix))
            .map(|(key, value)| (key.clone(), value.clone()))
            .collect())
    }

    pub(crate) fn watch(&self, prefix: &str) -> Result<MemoryWatch, StoreError> {
        let (sender, changes) = mpsc::unbounded_channel();
        self.open()?.watchers.push((prefix.to_owned(), sender));
        Ok(MemoryWatch { name: self.name.clone(), changes })
    }
}

impl Contents {
    fn tell(&mut self, key: &str, change: impl Fn() -> Change) {
        self.watchers.retain(|(prefix, watcher)| !key.starts_with(prefix) || watcher.send(change()).is_ok());
    }
}

/// Changes in a [`MemoryStore`].
#[derive(Debug)]
pub struct MemoryWatch {
    name: String,
    changes: mpsc::UnboundedReceiver<Change>,
}

impl MemoryWatch {
    pub(crate) async fn next(&mut self) -> Result<Vec<Change>, StoreError> {
        self.changes.recv().await.map(|change| vec![change]).ok_or_else(|| unreachable(&self.name))
    }
}

fn unreachable(name: &str) -> StoreError {
    StoreError::Unreachable { faults: vec![(format!("memory://{name}"), Fault::Refused)] }
}

/// A map whose writer panicked is still a map.
fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn engines_of_one_process_share_a_map_by_its_name() {
        let (a, b) = (MemoryStore::named("shared"), MemoryStore::named("shared"));
        a.put("k/1", b"v").unwrap();
        a.put("l", b"w").unwrap();
        assert_eq!(b.get("k/1").unwrap().as_deref(), Some(&b"v"[..]));
        assert_eq!(b.list("k/").unwrap(), [("k/1".to_owned(), b"v".to_vec())]);
        assert_eq!(MemoryStore::named("other").get("k/1"), Ok(None));
        assert_eq!((b.delete("k/1"), a.delete("k/1")), (Ok(true), Ok(false)));
    }

    #[tokio::test]
    async fn watches_see_what_is_under_their_prefix_and_end_when_the_store_does() {
        let store = MemoryStore::named("watched");
        let mut watch = store.watch("a/").unwrap();
        store.put("b/1", b"").unwrap();
        store.put("a/1", b"x").unwrap();
        store.delete("a/1").unwrap();
        assert_eq!(watch.next().await.unwrap(), [Change::Put { key: "a/1".into(), value: b"x".to_vec() }]);
        assert_eq!(watch.next().await.unwrap(), [Change::Deleted { key: "a/1".into() }]);
        store.set_down(true);
        assert!(watch.next().await.unwrap_err().is_passing());
        assert!(store.get("a/1").is_err());
    }
}
