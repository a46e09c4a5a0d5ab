//! What stands in the place of the etcd client where the feature `etcd` is off: the same names, and no value of them, so that
//! nothing else has to ask whether it is there.
#![expect(clippy::unused_async, reason = "as the client they stand for")]

use std::time::Duration;

use super::catalogue::Held;
use super::store::{Change, Lease, StoreError, StoreOptions};

/// There is none.
#[derive(Clone, Debug)]
pub enum EtcdStore {}

impl EtcdStore {
    /// Says that there is none.
    ///
    /// # Errors
    /// [`StoreError::NotBuilt`], always.
    pub fn new(endpoints: &[String], _: &StoreOptions) -> Result<Self, StoreError> {
        Err(StoreError::NotBuilt { endpoints: endpoints.join(",") })
    }

    /// Never called.
    pub fn lease_ttl(&self) -> Duration {
        match *self {}
    }

    pub(crate) async fn get(&self, _: &str) -> Result<Option<Vec<u8>>, StoreError> {
        match *self {}
    }

    pub(crate) async fn has(&self, _: &str) -> Result<bool, StoreError> {
        match *self {}
    }

    pub(crate) async fn list(&self, _: &str) -> Result<Vec<(String, Vec<u8>)>, StoreError> {
        match *self {}
    }

    pub(crate) async fn held(&self, _: &str) -> Result<Vec<Held>, StoreError> {
        match *self {}
    }

    pub(crate) async fn held_key(&self, _: &str) -> Result<Option<Held>, StoreError> {
        match *self {}
    }

    pub(crate) async fn delete_unchanged(&self, _: &Held) -> Result<bool, StoreError> {
        match *self {}
    }

    pub(crate) async fn put(&self, _: &str, _: &[u8]) -> Result<(), StoreError> {
        match *self {}
    }

    pub(crate) async fn delete(&self, _: &str) -> Result<bool, StoreError> {
        match *self {}
    }

    pub(crate) async fn keep_alive(&self) -> Result<Lease, StoreError> {
        match *self {}
    }

    pub(crate) async fn watch(&self, _: &str) -> Result<EtcdWatch, StoreError> {
        match *self {}
    }

    pub(crate) async fn close(&self) -> Result<(), StoreError> {
        match *self {}
    }
}

/// There is none.
#[derive(Debug)]
pub enum EtcdWatch {}

impl EtcdWatch {
    pub(crate) async fn next(&mut self) -> Result<Vec<Change>, StoreError> {
        match *self {}
    }
}

#[cfg(test)]
mod tests {
    use crate::metadata::{MetadataUri, StoreClient, StoreError, StoreOptions};

    #[test]
    fn who_asks_for_etcd_is_told_what_to_do() {
        let Ok(MetadataUri::Store(uri)) = MetadataUri::parse("etcd://10.0.0.1:2379") else { panic!("an etcd") };
        let e = StoreClient::open(&uri, &StoreOptions::default()).expect_err("there is no client");
        assert!(matches!(e, StoreError::NotBuilt { .. }) && !e.is_passing());
        assert!(e.to_string().contains("feature `etcd`") && e.to_string().contains("P2PHANDSHAKE"), "{e}");
    }
}
