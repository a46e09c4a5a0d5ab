//! What a store holds, for an operator's tools: every key with its value, how long it will live, and a way to take one
//! away only if nobody has written it since.
//!
//! Nodes do not use this: they ask for single keys and watch ([`super::store`]).

use std::time::Duration;

use super::store::{StoreClient, StoreError, StoreOptions};
use super::uri::StoreUri;

/// One key as it was when it was looked at.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Held {
    /// The key.
    pub key: String,
    /// Its value.
    pub value: Vec<u8>,
    /// How long it lives unless it is renewed; `None`: until somebody deletes it.
    pub lease: Option<Duration>,
    /// When it was written, in the store's own counting; 0 where the store does not count.
    pub(crate) revision: i64,
}

/// A store as a program without a runtime sees it. Every call blocks its thread, at most for
/// [`StoreOptions::deadline`]. Not for use on a thread that runs a tokio runtime.
#[derive(Debug)]
pub struct Catalogue {
    client: StoreClient,
    runtime: tokio::runtime::Runtime,
}

impl Catalogue {
    /// Prepares a client; nothing is sent before the first call.
    ///
    /// # Errors
    /// [`StoreError::Options`]: a file that cannot be read, options that contradict each other, no descriptors left.
    pub fn open(uri: &StoreUri, options: &StoreOptions) -> Result<Self, StoreError> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(|e| StoreError::Options { why: format!("a runtime cannot be made: {e}") })?;
        Ok(Self { client: StoreClient::open(uri, options)?, runtime })
    }

    /// Every key that begins with `prefix`, in order.
    ///
    /// # Errors
    /// [`StoreError::Unsupported`] from an HTTP store, which lists nothing; else see [`StoreError`].
    pub fn list(&self, prefix: &str) -> Result<Vec<Held>, StoreError> {
        self.runtime.block_on(async {
            if let StoreClient::Etcd(store) = &self.client {
                return store.held(prefix).await;
            }
            let held = |(key, value)| Held { key, value, lease: None, revision: 0 };
            Ok(self.client.list(prefix).await?.into_iter().map(held).collect())
        })
    }

    /// One key; `None` if there is none.
    ///
    /// # Errors
    /// See [`StoreError`].
    pub fn get(&self, key: &str) -> Result<Option<Held>, StoreError> {
        self.runtime.block_on(async {
            if let StoreClient::Etcd(store) = &self.client {
                return store.held_key(key).await;
            }
            let held = |value| Held { key: key.to_owned(), value, lease: None, revision: 0 };
            Ok(self.client.get(key).await?.map(held))
        })
    }

    /// Takes a key away if it is still as it was seen; `false` if it is not, or is gone. etcd does both in one step; the
    /// other stores cannot, so there a value written in between is lost.
    ///
    /// # Errors
    /// See [`StoreError`].
    pub fn delete(&self, seen: &Held) -> Result<bool, StoreError> {
        self.runtime.block_on(async {
            if let StoreClient::Etcd(store) = &self.client {
                return store.delete_unchanged(seen).await;
            }
            if self.client.get(&seen.key).await?.as_ref() != Some(&seen.value) {
                return Ok(false);
            }
            self.client.delete(&seen.key).await
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metadata::memory::MemoryStore;

    #[test]
    fn only_what_was_seen_is_deleted() {
        let catalogue = Catalogue::open(&StoreUri::Memory("catalogue".into()), &StoreOptions::default()).unwrap();
        let store = MemoryStore::named("catalogue");
        store.put("a/1", b"old").unwrap();
        store.put("a/2", b"two").unwrap();
        store.put("b", b"other").unwrap();
        let seen = catalogue.list("a/").unwrap();
        assert_eq!(seen.iter().map(|held| held.key.as_str()).collect::<Vec<_>>(), ["a/1", "a/2"]);
        assert_eq!(catalogue.get("a/1").unwrap().as_ref(), Some(&seen[0]));
        store.put("a/1", b"new").unwrap();
        assert_eq!(catalogue.delete(&seen[0]), Ok(false));
        assert_eq!(catalogue.delete(&seen[1]), Ok(true));
        assert_eq!(catalogue.delete(&seen[1]), Ok(false));
        assert_eq!(store.get("a/1").unwrap().as_deref(), Some(&b"new"[..]));
        assert_eq!(catalogue.get("none").unwrap(), None);
    }
}
