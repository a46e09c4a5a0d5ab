//! A metadata store as the driver sees it: get, put, delete, keep alive, watch; each with a deadline, none that hangs.
//!
//! An enum rather than a trait object: three stores exist, and `async fn` in a trait would box every call.

use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use super::etcd::{EtcdStore, EtcdWatch};
use super::http::HttpStore;
use super::memory::{MemoryStore, MemoryWatch};
use super::uri::StoreUri;

/// Deadline of one call, all endpoints and retries included.
pub const DEADLINE: Duration = Duration::from_secs(5);
/// Life of our keys in etcd after the node last renewed them.
///
/// Long enough for a control thread that is briefly starved, short enough that peers of a crashed node soon know.
pub const LEASE_TTL: Duration = Duration::from_secs(10);

/// Name and password of an etcd user.
#[derive(Clone, PartialEq, Eq)]
pub struct Credentials {
    /// User name.
    pub user: String,
    /// Password; never printed.
    pub password: String,
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Credentials({:?}, …)", self.user)
    }
}

/// Files (PEM) for a store behind TLS.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct TlsFiles {
    /// Certificate of the authority that signed the server's; needed for etcd.
    pub ca: Option<PathBuf>,
    /// Our certificate and its key, where the server asks for one.
    pub identity: Option<(PathBuf, PathBuf)>,
    /// Name expected in the server's certificate, when it is not the host of the endpoint.
    pub server_name: Option<String>,
}

/// How to talk to the store.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct StoreOptions {
    /// Deadline of one call; [`DEADLINE`].
    pub deadline: Duration,
    /// Life of our keys without renewal (etcd), whole seconds, at least 1; [`LEASE_TTL`].
    pub lease_ttl: Duration,
    /// User and password (etcd).
    pub credentials: Option<Credentials>,
    /// TLS; `None` = plain text unless the endpoint says `https://`.
    pub tls: Option<TlsFiles>,
}

impl Default for StoreOptions {
    fn default() -> Self {
        Self { deadline: DEADLINE, lease_ttl: LEASE_TTL, credentials: None, tls: None }
    }
}

/// What kept one endpoint from serving us.
#[derive(Clone, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub enum Fault {
    /// Nothing listens there.
    Refused,
    /// No answer to the connection attempt.
    ConnectTimeout,
    /// The connection stands, and nothing is answered.
    Silent,
    /// The host name has no address.
    Unresolved,
    /// Something else, in the system's words.
    Other(String),
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Refused => f.write_str("connection refused"),
            Self::ConnectTimeout => f.write_str("no answer to the connection attempt"),
            Self::Silent => f.write_str("connected, but no reply"),
            Self::Unresolved => f.write_str("host name not found"),
            Self::Other(why) => f.write_str(why),
        }
    }
}

/// Why a call to the store failed.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StoreError {
    /// No endpoint could be reached.
    #[error(
        "metadata server unreachable: {}. Check that it runs, that it listens on an address other hosts reach (etcd: \
         --listen-client-urls http://0.0.0.0:2379), and that no firewall is between",
        faults.iter().map(|(endpoint, fault)| format!("{endpoint}: {fault}")).collect::<Vec<_>>().join("; ")
    )]
    Unreachable {
        /// Each endpoint and what happened there.
        faults: Vec<(String, Fault)>,
    },
    /// A server took the connection and did not reply in time.
    #[error(
        "metadata server {endpoint} did not reply within {} ms: it is overloaded, stopped, or without a quorum; \
         try `etcdctl --endpoints {endpoint} endpoint status`",
        after.as_millis()
    )]
    Silent {
        /// The server.
        endpoint: String,
        /// How long was waited.
        after: Duration,
    },
    /// A server answers there, and it is no etcd.
    #[error(
        "{endpoint} answers, but is not etcd ({why}): give the address of etcd's client port (2379, not the peer port \
         2380), say https:// if it wants TLS, or http://HOST:PORT/metadata for an HTTP metadata server"
    )]
    NotEtcd {
        /// The server.
        endpoint: String,
        /// What showed it.
        why: String,
    },
    /// The server knows us not, or not well enough.
    #[error(
        "metadata server {endpoint} refuses us ({why}): check user, password and the user's roles for keys under mooncake/"
    )]
    Auth {
        /// The server.
        endpoint: String,
        /// Its words.
        why: String,
    },
    /// The secure connection could not be made.
    #[error(
        "TLS with metadata server {endpoint} failed ({why}): check the CA file, our certificate and key, and the server's name"
    )]
    Tls {
        /// The server.
        endpoint: String,
        /// What the TLS library says.
        why: String,
    },
    /// The store answered the request with an error.
    #[error("metadata server {endpoint} could not {what}: {why}")]
    Rejected {
        /// The server.
        endpoint: String,
        /// What was asked.
        what: &'static str,
        /// Its words.
        why: String,
    },
    /// The value is above the server's own limit (1.5 MiB unless configured): some ten thousand regions.
    #[error(
        "metadata server {endpoint} does not take a value of that size ({why}): register fewer, larger regions, or raise --max-request-bytes of etcd"
    )]
    ServerLimit {
        /// The server.
        endpoint: String,
        /// Its words.
        why: String,
    },
    /// The HTTP store answered with another status than 200.
    #[error(
        "{method} {url} http={status} body: {body}; check that the URL is that of a Mooncake metadata server (…/metadata)"
    )]
    HttpStatus {
        /// GET, PUT or DELETE.
        method: &'static str,
        /// The whole URL.
        url: String,
        /// HTTP status.
        status: u16,
        /// Begin of the answer's body.
        body: String,
    },
    /// The store already has an address under our name. It may be the one we left behind when we crashed: if
    /// nobody answers there, delete the key and put again.
    #[error(
        "the metadata server already has an address under {key}: another node runs with this name, or an earlier life \
         of this one was not shut down; choose another name or delete the key"
    )]
    DuplicateRpcMeta {
        /// The key.
        key: String,
    },
    /// Another live node has our name.
    #[error(
        "another node publishes itself as {name} and answers at {owner}: give each node a name of its own, or end that one"
    )]
    NameTaken {
        /// The name.
        name: String,
        /// Host and port of its control port.
        owner: String,
    },
    /// A value is larger than a segment descriptor may be.
    #[error(
        "the value under {key} is larger than {limit} bytes: something else uses this key; delete it or choose another cluster id"
    )]
    TooLarge {
        /// The key.
        key: String,
        /// Bytes allowed.
        limit: usize,
    },
    /// This store cannot do that.
    #[error("{what} needs etcd: an HTTP metadata server only gets, puts and deletes")]
    Unsupported {
        /// What was asked.
        what: &'static str,
    },
    /// The program was built without the client of that store.
    #[error(
        "metadata server etcd://{endpoints}: this program was built without etcd: build it with moonrail's feature `etcd`, or use \
         http://HOST:PORT/metadata or P2PHANDSHAKE"
    )]
    NotBuilt {
        /// What was given.
        endpoints: String,
    },
    /// The options cannot work.
    #[error("metadata options: {why}")]
    Options {
        /// Which, and what to change.
        why: String,
    },
}

impl StoreError {
    /// Whether the same call may succeed later without anyone changing anything.
    pub fn is_passing(&self) -> bool {
        matches!(self, Self::Unreachable { .. } | Self::Silent { .. } | Self::Rejected { .. })
            || matches!(self, Self::HttpStatus { status: 500.., .. })
    }
}

/// What became of the life of our keys.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Lease {
    /// This store keeps keys for ever (or none is published yet).
    NotNeeded,
    /// Renewed for this long.
    Kept {
        /// Until the keys vanish, unless renewed again.
        ttl: Duration,
    },
    /// The lease ended: our keys are gone, or will be at once. Put every one of them again; the first put makes a new
    /// lease.
    Lost,
}

/// A change under a watched prefix.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Change {
    /// The key has a new value.
    Put {
        /// The key.
        key: String,
        /// Its value.
        value: Vec<u8>,
    },
    /// The key is gone: deleted, or its lease ended.
    Deleted {
        /// The key.
        key: String,
    },
}

/// A metadata store. Calls of one client may run at the same time; each ends within its deadline.
#[derive(Clone, Debug)]
pub enum StoreClient {
    /// etcd.
    Etcd(EtcdStore),
    /// Mooncake's HTTP server. Its calls block and run on the runtime's blocking pool.
    Http(HttpStore),
    /// A map in this process.
    Memory(MemoryStore),
}

impl StoreClient {
    /// Prepares a client; nothing is sent before the first call.
    ///
    /// # Errors
    /// [`StoreError::Options`]: a file that cannot be read, options that contradict each other. [`StoreError::NotBuilt`].
    pub fn open(uri: &StoreUri, options: &StoreOptions) -> Result<Self, StoreError> {
        Ok(match uri {
            StoreUri::Etcd(endpoints) => Self::Etcd(EtcdStore::new(endpoints, options)?),
            StoreUri::Http(base) => Self::Http(HttpStore::new(base, options)?),
            StoreUri::Memory(name) => Self::Memory(MemoryStore::named(name)),
        })
    }

    /// The value under `key`; `None` if there is none.
    ///
    /// # Errors
    /// See [`StoreError`].
    pub async fn get(&self, key: &str) -> Result<Option<Vec<u8>>, StoreError> {
        match self {
            Self::Etcd(store) => store.get(key).await,
            Self::Http(store) => {
                let key = key.to_owned();
                store.off_thread(move |store| store.get(&key)).await
            }
            Self::Memory(store) => store.get(key),
        }
    }

    /// Whether there is something under `key`. etcd does not send the value for it.
    ///
    /// # Errors
    /// See [`StoreError`].
    pub async fn has(&self, key: &str) -> Result<bool, StoreError> {
        match self {
            Self::Etcd(store) => store.has(key).await,
            Self::Http(_) | Self::Memory(_) => Ok(self.get(key).await?.is_some()),
        }
    }

    /// Puts `value` under `key`, over whatever is there; in etcd under our lease. An address (a key with `rpc_meta` in it) is not
    /// put over another node's, by the rule of Mooncake's HTTP server.
    ///
    /// # Errors
    /// See [`StoreError`].
    pub async fn put(&self, key: &str, value: &[u8]) -> Result<(), StoreError> {
        match self {
            Self::Etcd(store) => store.put(key, value).await,
            Self::Http(store) => {
                let (key, value) = (key.to_owned(), value.to_vec());
                store.off_thread(move |store| store.put(&key, &value)).await
            }
            Self::Memory(store) => store.put(key, value),
        }
    }

    /// Takes `key` away; `false` if it was not there.
    ///
    /// # Errors
    /// See [`StoreError`].
    pub async fn delete(&self, key: &str) -> Result<bool, StoreError> {
        match self {
            Self::Etcd(store) => store.delete(key).await,
            Self::Http(store) => {
                let key = key.to_owned();
                store.off_thread(move |store| store.delete(&key)).await
            }
            Self::Memory(store) => store.delete(key),
        }
    }

    /// Every key that begins with `prefix`, in order.
    ///
    /// # Errors
    /// [`StoreError::Unsupported`] from an HTTP store; else see [`StoreError`].
    pub async fn list(&self, prefix: &str) -> Result<Vec<(String, Vec<u8>)>, StoreError> {
        match self {
            Self::Etcd(store) => store.list(prefix).await,
            Self::Http(_) => Err(StoreError::Unsupported { what: "listing the segments" }),
            Self::Memory(store) => store.list(prefix),
        }
    }

    /// Renews the life of our keys; call it every [`StoreClient::keep_alive_every`].
    ///
    /// # Errors
    /// See [`StoreError`]. The lease then still stands until its time is over.
    pub async fn keep_alive(&self) -> Result<Lease, StoreError> {
        match self {
            Self::Etcd(store) => store.keep_alive().await,
            Self::Http(_) | Self::Memory(_) => Ok(Lease::NotNeeded),
        }
    }

    /// How often to renew: three times in the life of a lease. `None`: never.
    pub fn keep_alive_every(&self) -> Option<Duration> {
        match self {
            Self::Etcd(store) => Some(store.lease_ttl() / 3),
            Self::Http(_) | Self::Memory(_) => None,
        }
    }

    /// Reports changes under `prefix` from now on. When it ends with an error, watch again, and look again at whatever
    /// was cached before: changes in between are not reported.
    ///
    /// # Errors
    /// [`StoreError::Unsupported`] from an HTTP store; else see [`StoreError`].
    pub async fn watch(&self, prefix: &str) -> Result<Watch, StoreError> {
        match self {
            Self::Etcd(store) => store.watch(prefix).await.map(|watch| Watch::Etcd(Box::new(watch))),
            Self::Http(_) => Err(StoreError::Unsupported { what: "watching for changes" }),
            Self::Memory(store) => store.watch(prefix).map(Watch::Memory),
        }
    }

    /// Gives up the lease at an orderly end, so that what we did not delete vanishes now and not after its life.
    ///
    /// # Errors
    /// See [`StoreError`].
    pub async fn close(&self) -> Result<(), StoreError> {
        match self {
            Self::Etcd(store) => store.close().await,
            Self::Http(_) | Self::Memory(_) => Ok(()),
        }
    }
}

/// Changes under a prefix.
#[derive(Debug)]
pub enum Watch {
    /// From etcd.
    Etcd(Box<EtcdWatch>),
    /// From a map in this process.
    Memory(MemoryWatch),
}

impl Watch {
    /// The next changes, in the order in which they happened; waits as long as there are none. May be dropped while
    /// waiting without losing any.
    ///
    /// # Errors
    /// The watch ended.
    pub async fn next(&mut self) -> Result<Vec<Change>, StoreError> {
        match self {
            Self::Etcd(watch) => watch.next().await,
            Self::Memory(watch) => watch.next().await,
        }
    }
}
