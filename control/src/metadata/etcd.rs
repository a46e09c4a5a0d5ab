//! etcd through its v3 API: plain keys, under a lease, over several endpoints.
//!
//! Endpoints are tried one after another, beginning with the one that served last; each gets its share of what is left
//! of the deadline, so a dead or frozen first endpoint costs a part of one call and nothing after it. (The client
//! library can balance over endpoints itself, but then an error cannot say which endpoint did what.) No proxy is used.
//!
//! The stock engine writes its keys without a lease, and a killed node's keys stay for ever. Ours vanish
//! [`lease_ttl`](super::store::StoreOptions::lease_ttl) after the node last renewed them; readers see no difference.

use std::collections::HashMap;
use std::error::Error as _;
use std::future::Future;
use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use etcd_client::{
    Certificate, Client, Compare, CompareOp, ConnectOptions, Error, GetOptions, Identity, KeyValue, PutOptions,
    TlsOptions, Txn, TxnOp, TxnOpResponse,
};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::time::{Instant, timeout};

use super::catalogue::Held;
use super::descriptor::MAX_BYTES;
use super::keys::is_address;
use super::store::{Change, Fault, Lease, StoreError, StoreOptions, TlsFiles};

/// Longest wait for a TCP connection to one endpoint.
const CONNECT_TIMEOUT: Duration = Duration::from_millis(1500);
/// Pings of an idle or watching connection. etcd closes connections that are pinged more often than every 5 s.
const PING_EVERY: Duration = Duration::from_secs(6);
/// Wait for a ping's answer.
const PING_TIMEOUT: Duration = Duration::from_secs(3);

/// Client of an etcd cluster; clones share connections and lease.
#[derive(Clone)]
pub struct EtcdStore {
    shared: Arc<Shared>,
}

struct Shared {
    endpoints: Vec<String>,
    tls: Tls,
    connect: ConnectOptions,
    deadline: Duration,
    ttl: Duration,
    live: Mutex<Live>,
    lease: tokio::sync::Mutex<LeaseState>,
}

/// How connections are secured.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Tls {
    None,
    /// With TLS, without a certificate of ours.
    Anonymous,
    /// With a certificate of ours.
    Identified,
}

/// Connections, and the endpoint that served last.
struct Live {
    clients: Vec<Option<Client>>,
    current: usize,
}

#[derive(Default)]
struct LeaseState {
    id: Option<i64>,
    /// A put found the lease gone; the next `keep_alive` has to say so, since other keys went with it.
    lost: bool,
}

impl std::fmt::Debug for EtcdStore {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("EtcdStore").field("endpoints", &self.shared.endpoints).finish_non_exhaustive()
    }
}

/// What an error of one endpoint means for the call.
enum Verdict {
    /// The next endpoint may do better.
    Next(StoreError),
    /// Every endpoint would say the same.
    Final(StoreError),
    /// The lease named in the put is gone.
    LeaseGone,
}

impl EtcdStore {
    /// Client of the cluster at `endpoints` (`host:port`, or with `http://` or `https://`); sends nothing yet.
    ///
    /// # Errors
    /// [`StoreError::Options`]: TLS files that cannot be read, TLS asked for with a plain endpoint or the other way round.
    pub fn new(endpoints: &[String], options: &StoreOptions) -> Result<Self, StoreError> {
        let share = options.deadline / (2 * endpoints.len().max(1) as u32);
        let mut connect = ConnectOptions::new()
            .with_connect_timeout(CONNECT_TIMEOUT.min(share))
            .with_keep_alive(PING_EVERY, PING_TIMEOUT)
            .with_keep_alive_while_idle(true)
            .with_require_leader(true)
            .with_auto_token_refresh(true);
        if let Some(credentials) = &options.credentials {
            connect = connect.with_user(&credentials.user, &credentials.password);
        }
        match &options.tls {
            Some(files) => {
                if let Some(plain) = endpoints.iter().find(|e| e.starts_with("http://")) {
                    let why =
                        format!("{plain} is plain text while TLS files are given: write https://, or give no files");
                    return Err(StoreError::Options { why });
                }
                connect = connect.with_tls(tls(files)?);
            }
            None => {
                if let Some(secure) = endpoints.iter().find(|e| e.starts_with("https://")) {
                    let why =
                        format!("{secure} needs the certificate of the authority that signed its own: give a CA file");
                    return Err(StoreError::Options { why });
                }
            }
        }
        let secured = |files: &TlsFiles| if files.identity.is_some() { Tls::Identified } else { Tls::Anonymous };
        let live = Live { clients: endpoints.iter().map(|_| None).collect(), current: 0 };
        Ok(Self {
            shared: Arc::new(Shared {
                endpoints: endpoints.to_vec(),
                tls: options.tls.as_ref().map_or(Tls::None, secured),
                connect,
                deadline: options.deadline,
                ttl: Duration::from_secs(options.lease_ttl.as_secs().max(1)),
                live: Mutex::new(live),
                lease: tokio::sync::Mutex::default(),
            }),
        })
    }

    /// Life of a lease without renewal; the server may grant more, never less.
    pub fn lease_ttl(&self) -> Duration {
        self.shared.ttl
    }

    pub(crate) async fn get(&self, key: &str) -> Result<Option<Vec<u8>>, StoreError> {
        let mut answer = self
            .call("get a key", |client| async move {
                client.kv_client().max_decoding_message_size(2 * MAX_BYTES).get(key, None).await
            })
            .await?;
        match answer.take_kvs().into_iter().next().map(|kv| kv.into_key_value().1) {
            Some(value) if value.len() > MAX_BYTES => {
                Err(StoreError::TooLarge { key: key.to_owned(), limit: MAX_BYTES })
            }
            value => Ok(value),
        }
    }

    pub(crate) async fn has(&self, key: &str) -> Result<bool, StoreError> {
        let answer = self
            .call("look for a key", |client| async move {
                client.kv_client().get(key, Some(GetOptions::new().with_count_only())).await
            })
            .await?;
        Ok(answer.count() > 0)
    }

    pub(crate) async fn list(&self, prefix: &str) -> Result<Vec<(String, Vec<u8>)>, StoreError> {
        let mut answer = self
            .call("list keys", |client| async move {
                let options = GetOptions::new().with_prefix();
                client.kv_client().max_decoding_message_size(8 * MAX_BYTES).get(prefix, Some(options)).await
            })
            .await?;
        // The layout has text for keys; what is not text is not ours.
        let text = |(key, value): (Vec<u8>, Vec<u8>)| Some((String::from_utf8(key).ok()?, value));
        Ok(answer.take_kvs().into_iter().map(KeyValue::into_key_value).filter_map(text).collect())
    }

    /// Every key that begins with `prefix`, with what is left of its lease.
    pub(crate) async fn held(&self, prefix: &str) -> Result<Vec<Held>, StoreError> {
        self.look(prefix, Some(GetOptions::new().with_prefix())).await
    }

    /// One key, with what is left of its lease.
    pub(crate) async fn held_key(&self, key: &str) -> Result<Option<Held>, StoreError> {
        Ok(self.look(key, None).await?.pop())
    }

    async fn look(&self, key: &str, options: Option<GetOptions>) -> Result<Vec<Held>, StoreError> {
        let mut answer = self
            .call("look at keys", |client| {
                let options = options.clone();
                async move { client.kv_client().max_decoding_message_size(8 * MAX_BYTES).get(key, options).await }
            })
            .await?;
        let mut found = Vec::new();
        // A node has one lease for all of its keys.
        let mut lives = HashMap::new();
        for kv in answer.take_kvs() {
            let lease = match kv.lease() {
                0 => None,
                id => Some(match lives.get(&id) {
                    Some(left) => *left,
                    None => *lives.entry(id).or_insert(self.lease_left(id).await?),
                }),
            };
            let revision = kv.mod_revision();
            let (key, value) = kv.into_key_value();
            // The layout has text for keys; what is not text is not ours.
            if let Ok(key) = String::from_utf8(key) {
                found.push(Held { key, value, lease, revision });
            }
        }
        Ok(found)
    }

    /// Until the end of a lease; zero when it is over (the server says -1).
    async fn lease_left(&self, id: i64) -> Result<Duration, StoreError> {
        let left = |mut client: Client| async move { client.lease_time_to_live(id, None).await };
        let left = self.call("ask for a lease", left).await?.ttl();
        Ok(Duration::from_secs(u64::try_from(left).unwrap_or(0)))
    }

    /// Deletes a key unless it was written since it was `seen`.
    pub(crate) async fn delete_unchanged(&self, seen: &Held) -> Result<bool, StoreError> {
        let key = seen.key.as_str();
        let answer = self
            .call("delete a key", |mut client| async move {
                let unchanged = Compare::mod_revision(key, CompareOp::Equal, seen.revision);
                client.txn(Txn::new().when([unchanged]).and_then([TxnOp::delete(key, None)])).await
            })
            .await?;
        Ok(answer.succeeded())
    }

    pub(crate) async fn put(&self, key: &str, value: &[u8]) -> Result<(), StoreError> {
        let end = self.end();
        // Two nodes may start under one name at the same moment: the store decides, in one step, which was first.
        let address = is_address(key);
        let once = |lease: i64| {
            self.try_call("put a key", end, move |mut client| async move {
                let options = PutOptions::new().with_lease(lease);
                if !address {
                    return client.put(key, value, Some(options)).await.map(|_| true);
                }
                let put = || TxnOp::put(key, value, Some(options.clone()));
                let own = Txn::new().when([Compare::value(key, CompareOp::Equal, value)]).and_then([put()]);
                let free = Compare::create_revision(key, CompareOp::Equal, 0);
                let answer = client.txn(Txn::new().when([free]).and_then([put()]).or_else([TxnOp::txn(own)])).await?;
                let within = |op: TxnOpResponse| matches!(op, TxnOpResponse::Txn(own) if own.succeeded());
                Ok(answer.succeeded() || answer.op_responses().into_iter().any(within))
            })
        };
        let was_put = |put: bool| {
            if put { Ok(()) } else { Err(StoreError::DuplicateRpcMeta { key: key.to_owned() }) }
        };
        // At most one renewal: a lease that is gone twice within one call is a server that does not keep leases.
        let lease = self.lease(end).await?;
        match once(lease).await {
            Ok(put) => return was_put(put),
            Err(Verdict::Next(e) | Verdict::Final(e)) => return Err(e),
            Err(Verdict::LeaseGone) => self.lease_gone(lease).await,
        }
        match once(self.lease(end).await?).await {
            Ok(put) => was_put(put),
            Err(Verdict::Next(e) | Verdict::Final(e)) => Err(e),
            Err(Verdict::LeaseGone) => Err(self.rejected("keep a lease", "a new lease is gone at once")),
        }
    }

    pub(crate) async fn delete(&self, key: &str) -> Result<bool, StoreError> {
        let answer = self.call("delete a key", |mut client| async move { client.delete(key, None).await }).await?;
        Ok(answer.deleted() > 0)
    }

    pub(crate) async fn keep_alive(&self) -> Result<Lease, StoreError> {
        let id = {
            let mut state = self.shared.lease.lock().await;
            if std::mem::take(&mut state.lost) {
                return Ok(Lease::Lost);
            }
            state.id
        };
        let Some(id) = id else { return Ok(Lease::NotNeeded) };
        let renew = |mut client: Client| async move {
            match client.lease_keep_alive(id).await {
                Ok(_) => Ok(true),
                // The library's only way to say that the server answered with a life of 0.
                Err(Error::LeaseKeepAliveError(why)) if why == "lease not found" => Ok(false),
                Err(e) => Err(e),
            }
        };
        match self.try_call("renew the lease", self.end(), renew).await {
            Ok(true) => Ok(Lease::Kept { ttl: self.shared.ttl }),
            Ok(false) | Err(Verdict::LeaseGone) => {
                self.lease_gone(id).await;
                self.shared.lease.lock().await.lost = false;
                Ok(Lease::Lost)
            }
            Err(Verdict::Next(e) | Verdict::Final(e)) => Err(e),
        }
    }

    pub(crate) async fn watch(&self, prefix: &str) -> Result<EtcdWatch, StoreError> {
        let stream = self
            .call("watch keys", |client| async move {
                let options = etcd_client::WatchOptions::new().with_prefix();
                client.watch_client().max_decoding_message_size(2 * MAX_BYTES).watch(prefix, Some(options)).await
            })
            .await?;
        let endpoint = self.shared.endpoints[self.live().current].clone();
        Ok(EtcdWatch { stream, endpoint })
    }

    pub(crate) async fn close(&self) -> Result<(), StoreError> {
        let Some(id) = self.shared.lease.lock().await.id.take() else { return Ok(()) };
        let revoke = |mut client: Client| async move { client.lease_revoke(id).await };
        match self.try_call("give up the lease", self.end(), revoke).await {
            Ok(_) | Err(Verdict::LeaseGone) => Ok(()),
            Err(Verdict::Next(e) | Verdict::Final(e)) => Err(e),
        }
    }

    /// The lease of our keys; made at the first put. One at a time, or keys would hang on a lease nobody renews.
    async fn lease(&self, end: Instant) -> Result<i64, StoreError> {
        let mut state = self.shared.lease.lock().await;
        if let Some(id) = state.id {
            return Ok(id);
        }
        let ttl = i64::try_from(self.shared.ttl.as_secs()).unwrap_or(i64::MAX);
        let grant = |mut client: Client| async move { client.lease_grant(ttl, None).await };
        match self.try_call("grant a lease", end, grant).await {
            Ok(granted) => Ok(*state.id.insert(granted.id())),
            Err(Verdict::Next(e) | Verdict::Final(e)) => Err(e),
            Err(Verdict::LeaseGone) => Err(self.rejected("grant a lease", "requested lease not found")),
        }
    }

    async fn lease_gone(&self, id: i64) {
        let mut state = self.shared.lease.lock().await;
        if state.id == Some(id) {
            (state.id, state.lost) = (None, true);
        }
    }

    async fn call<T, F: Future<Output = Result<T, Error>>>(
        &self,
        what: &'static str,
        request: impl Fn(Client) -> F,
    ) -> Result<T, StoreError> {
        match self.try_call(what, self.end(), request).await {
            Ok(answer) => Ok(answer),
            Err(Verdict::Next(e) | Verdict::Final(e)) => Err(e),
            Err(Verdict::LeaseGone) => Err(self.rejected(what, "requested lease not found")),
        }
    }

    /// When a call that begins now has to be over.
    fn end(&self) -> Instant {
        Instant::now() + self.shared.deadline
    }

    /// Asks each endpoint in turn until one serves or the deadline is over.
    async fn try_call<T, F: Future<Output = Result<T, Error>>>(
        &self,
        what: &'static str,
        end: Instant,
        request: impl Fn(Client) -> F,
    ) -> Result<T, Verdict> {
        let count = self.shared.endpoints.len();
        let first = self.live().current;
        let mut faults = Vec::new();
        for tried in 0..count {
            let at = (first + tried) % count;
            let endpoint = &self.shared.endpoints[at];
            let share = end.saturating_duration_since(Instant::now()) / (count - tried) as u32;
            let fresh = self.live().clients[at].is_none();
            let attempt = async {
                let client = self.client(at).await?;
                request(client).await
            };
            let error = match timeout(share, attempt).await {
                Ok(Ok(answer)) => {
                    self.live().current = at;
                    return Ok(answer);
                }
                Ok(Err(error)) => match judge(endpoint, what, &error) {
                    Verdict::Next(error) => error,
                    verdict => return Err(verdict),
                },
                Err(_) => StoreError::Silent { endpoint: endpoint.clone(), after: share },
            };
            let broke_off =
                matches!(&error, StoreError::Unreachable { faults } if matches!(faults[..], [(_, Fault::Other(_))]));
            let error = if fresh && broke_off { self.look_again(endpoint, error, end).await } else { error };
            // A connection that failed once is made anew: cheap, and it picks up a changed address.
            self.live().clients[at] = None;
            faults.push((endpoint.clone(), error));
        }
        Err(Verdict::Next(summary(faults)))
    }

    /// A first connection broke off: a server that is no etcd does that, one that wants a certificate, and one that just
    /// died. Asks in plain HTTP, which etcd answers on its client port, who is there; `error` stands if that tells nothing.
    async fn look_again(&self, endpoint: &str, error: StoreError, end: Instant) -> StoreError {
        let named = || endpoint.to_owned();
        if self.shared.tls != Tls::None {
            let why = "the server closed the connection once TLS stood, as one does that wants a certificate of ours";
            let tls = StoreError::Tls { endpoint: named(), why: why.to_owned() };
            return if self.shared.tls == Tls::Anonymous { tls } else { error };
        }
        let address = endpoint.strip_prefix("http://").unwrap_or(endpoint);
        let left = end.saturating_duration_since(Instant::now()).min(Duration::from_secs(1));
        match timeout(left, version(address)).await {
            Ok(Ok(answer)) if answer.contains("\"etcdserver\"") => error,
            Ok(Ok(answer)) if answer.contains("HTTPS server") => {
                StoreError::NotEtcd { endpoint: named(), why: "or wants TLS".to_owned() }
            }
            Ok(Ok(answer)) => {
                let begin: String = answer.lines().next().unwrap_or("").chars().take(80).collect();
                StoreError::NotEtcd { endpoint: named(), why: format!("asked for its version, it says {begin:?}") }
            }
            Ok(Err(e)) if e.kind() == io::ErrorKind::ConnectionRefused => {
                StoreError::Unreachable { faults: vec![(named(), Fault::Refused)] }
            }
            _ => error,
        }
    }

    /// The connection to an endpoint; made, and with a user also authenticated, at first use.
    async fn client(&self, at: usize) -> Result<Client, Error> {
        if let Some(client) = &self.live().clients[at] {
            return Ok(client.clone());
        }
        let client = Client::connect([self.shared.endpoints[at].as_str()], Some(self.shared.connect.clone())).await?;
        self.live().clients[at] = Some(client.clone());
        Ok(client)
    }

    fn live(&self) -> MutexGuard<'_, Live> {
        self.shared.live.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn rejected(&self, what: &'static str, why: &str) -> StoreError {
        StoreError::Rejected { endpoint: self.shared.endpoints.join(","), what, why: why.to_owned() }
    }
}

/// Changes under a prefix in etcd.
#[derive(Debug)]
pub struct EtcdWatch {
    stream: etcd_client::WatchStream,
    endpoint: String,
}

impl EtcdWatch {
    pub(crate) async fn next(&mut self) -> Result<Vec<Change>, StoreError> {
        loop {
            let ended =
                |why: String| StoreError::Rejected { endpoint: self.endpoint.clone(), what: "go on watching", why };
            let answer = match self.stream.message().await {
                Ok(Some(answer)) if answer.canceled() => return Err(ended(answer.cancel_reason().to_owned())),
                Ok(Some(answer)) => answer,
                Ok(None) => return Err(ended("the server ended the watch".to_owned())),
                Err(error) => {
                    return Err(match judge(&self.endpoint, "go on watching", &error) {
                        Verdict::Next(e) | Verdict::Final(e) => e,
                        Verdict::LeaseGone => ended(error.to_string()),
                    });
                }
            };
            let changes: Vec<Change> = answer.events().iter().filter_map(change).collect();
            if !changes.is_empty() {
                return Ok(changes);
            }
        }
    }
}

/// A key that was deleted has no revision of its creation.
fn change(event: &etcd_client::Event) -> Option<Change> {
    let kv = event.kv()?;
    let key = kv.key_str().ok()?.to_owned();
    Some(match kv.create_revision() {
        0 => Change::Deleted { key },
        _ => Change::Put { key, value: kv.value().to_vec() },
    })
}

fn tls(files: &TlsFiles) -> Result<TlsOptions, StoreError> {
    let read = |path: &Path| {
        let why = |e| StoreError::Options { why: format!("cannot read {}: {e}", path.display()) };
        std::fs::read(path).map_err(why)
    };
    let Some(ca) = &files.ca else {
        let why = "etcd over TLS needs the certificate of the authority that signed its own: give a CA file".to_owned();
        return Err(StoreError::Options { why });
    };
    let mut tls = TlsOptions::new().ca_certificate(Certificate::from_pem(read(ca)?));
    if let Some((certificate, key)) = &files.identity {
        tls = tls.identity(Identity::from_pem(read(certificate)?, read(key)?));
    }
    if let Some(name) = &files.server_name {
        tls = tls.domain_name(name);
    }
    Ok(tls)
}

/// gRPC status codes that decide anything here.
mod code {
    pub(super) const INVALID_ARGUMENT: i32 = 3;
    pub(super) const DEADLINE_EXCEEDED: i32 = 4;
    pub(super) const NOT_FOUND: i32 = 5;
    pub(super) const PERMISSION_DENIED: i32 = 7;
    pub(super) const FAILED_PRECONDITION: i32 = 9;
    pub(super) const UNIMPLEMENTED: i32 = 12;
    pub(super) const UNAVAILABLE: i32 = 14;
    pub(super) const UNAUTHENTICATED: i32 = 16;
}

/// What the error of one endpoint means.
fn judge(endpoint: &str, what: &'static str, error: &Error) -> Verdict {
    let endpoint = endpoint.to_owned();
    let why = text(error);
    let status = match error {
        Error::GRpcStatus(status) => status,
        Error::InvalidArgs(_) | Error::InvalidUri(_) => {
            return Verdict::Final(StoreError::Options { why: format!("endpoint {endpoint}: {why}") });
        }
        _ => return Verdict::Next(connection(endpoint, error, why)),
    };
    let message = status.message();
    let own_words = message.starts_with("etcdserver:") || message.starts_with("auth:");
    let auth = ["authent", "auth token", "user name", "permission denied", "invalid auth"];
    match status.code() as i32 {
        code::NOT_FOUND if message.contains("lease not found") => Verdict::LeaseGone,
        code::PERMISSION_DENIED | code::UNAUTHENTICATED => {
            Verdict::Final(StoreError::Auth { endpoint, why: message.to_owned() })
        }
        code::INVALID_ARGUMENT | code::FAILED_PRECONDITION
            if own_words && auth.iter().any(|word| message.contains(word)) =>
        {
            Verdict::Final(StoreError::Auth { endpoint, why: message.to_owned() })
        }
        code::UNAVAILABLE | code::DEADLINE_EXCEEDED if own_words => {
            Verdict::Next(StoreError::Rejected { endpoint, what, why: message.to_owned() })
        }
        _ if message.contains("request is too large") || message.contains("larger than max") => {
            Verdict::Final(StoreError::ServerLimit { endpoint, why: message.to_owned() })
        }
        _ if own_words => Verdict::Final(StoreError::Rejected { endpoint, what, why: message.to_owned() }),
        code::UNIMPLEMENTED => Verdict::Next(StoreError::NotEtcd { endpoint, why }),
        _ => Verdict::Next(connection(endpoint, error, why)),
    }
}

/// An error below gRPC: found in the chain of sources, the innermost that says something.
fn connection(endpoint: String, error: &Error, why: String) -> StoreError {
    let outer: Option<Cause<'_>> = match error {
        Error::GRpcStatus(status) => status.source(),
        Error::TransportError(e) => e.source(),
        Error::IoError(e) => Some(e),
        _ => None,
    };
    for cause in causes(outer) {
        let fault = match cause.downcast_ref::<io::Error>().map(io::Error::kind) {
            Some(io::ErrorKind::ConnectionRefused) => Fault::Refused,
            Some(io::ErrorKind::TimedOut) => Fault::ConnectTimeout,
            _ => continue,
        };
        return StoreError::Unreachable { faults: vec![(endpoint, fault)] };
    }
    let low = why.to_ascii_lowercase();
    let has = |words: &[&str]| words.iter().any(|word| low.contains(word));
    if has(&["certificate", "tls", "invalidcontenttype", "handshake"]) {
        StoreError::Tls { endpoint, why }
    } else if has(&["deadline has elapsed", "timed out"]) {
        StoreError::Unreachable { faults: vec![(endpoint, Fault::ConnectTimeout)] }
    } else if has(&["dns error", "lookup"]) {
        StoreError::Unreachable { faults: vec![(endpoint, Fault::Unresolved)] }
    } else if has(&["frame", "protocol error", "http2", "h2 ", "grpc-status", "compression flag", "content-type"]) {
        StoreError::NotEtcd { endpoint, why }
    } else {
        StoreError::Unreachable { faults: vec![(endpoint, Fault::Other(why))] }
    }
}

/// What an HTTP server at this address says when it is asked for its version.
async fn version(address: &str) -> io::Result<String> {
    let mut stream = TcpStream::connect(address).await?;
    stream.write_all(format!("GET /version HTTP/1.0\r\nHost: {address}\r\n\r\n").as_bytes()).await?;
    let mut answer = Vec::new();
    // A connection that breaks after the answer is as good as one that ends.
    let _ = stream.take(2048).read_to_end(&mut answer).await;
    Ok(String::from_utf8_lossy(&answer).into_owned())
}

type Cause<'a> = &'a (dyn std::error::Error + 'static);

/// An error, its source, that one's source, and so on.
fn causes(outer: Option<Cause<'_>>) -> impl Iterator<Item = Cause<'_>> {
    std::iter::successors(outer, |cause| (*cause).source())
}

/// The error with its causes, outermost first, each once.
fn text(error: &Error) -> String {
    let (mut text, outer) = match error {
        Error::GRpcStatus(status) => (status.message().to_owned(), status.source()),
        Error::TransportError(e) => (e.to_string(), e.source()),
        other => (other.to_string(), None),
    };
    for cause in causes(outer) {
        let cause = cause.to_string();
        if !text.contains(&cause) {
            text = format!("{text}: {cause}");
        }
    }
    text
}

/// One error for a call that no endpoint served: what a server said goes before what no server said.
fn summary(faults: Vec<(String, StoreError)>) -> StoreError {
    let telling = |e: &StoreError| !matches!(e, StoreError::Unreachable { .. } | StoreError::Silent { .. });
    if let Some((_, error)) = faults.iter().find(|(_, error)| telling(error)) {
        return error.clone();
    }
    if let [(_, error)] = faults.as_slice() {
        return error.clone();
    }
    let each = |(endpoint, error)| match error {
        StoreError::Unreachable { mut faults } if faults.len() == 1 => faults.remove(0),
        StoreError::Silent { .. } => (endpoint, Fault::Silent),
        other => (endpoint, Fault::Other(other.to_string())),
    };
    StoreError::Unreachable { faults: faults.into_iter().map(each).collect() }
}
