//! Mooncake's HTTP metadata server: GET, PUT and DELETE of `BASE?key=KEY`.
//!
//! These calls **block**, each at most [`HttpStore::TIMEOUT`]; they belong on a pool of their own, never on the control
//! thread. No proxy is ever used, whatever the environment says: metadata servers are inside the cluster. Keys stay
//! until they are deleted, and the server refuses a second `rpc_meta` under one name.

use std::fmt::Write as _;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use ureq::tls::{Certificate, ClientCert, PrivateKey, RootCerts, TlsConfig};

use super::descriptor::MAX_BYTES;
use super::store::{Fault, StoreError, StoreOptions};

/// How much of an error's body is kept.
const SHOWN: usize = 200;

/// Client of an HTTP metadata server; clones share its connections.
#[derive(Clone, Debug)]
pub struct HttpStore {
    agent: ureq::Agent,
    base: Arc<str>,
}

impl HttpStore {
    /// Longest wait for a connection, as upstream.
    pub const CONNECT_TIMEOUT: Duration = Duration::from_millis(1500);
    /// Longest wait for a whole request, as upstream.
    pub const TIMEOUT: Duration = Duration::from_secs(3);

    /// Client of the server whose URL is `base`; the deadline of the options holds if it is shorter than
    /// [`HttpStore::TIMEOUT`].
    ///
    /// # Errors
    /// [`StoreError::Options`]: `base` is no URL, or a TLS file cannot be read.
    pub fn new(base: &str, options: &StoreOptions) -> Result<Self, StoreError> {
        let base = base.trim();
        let host = base.parse::<ureq::http::Uri>().ok().and_then(|uri| uri.host().map(str::to_owned));
        if host.is_none_or(|host| host.is_empty()) {
            let why = format!("{base:?} is no URL; use http://HOST:PORT/metadata");
            return Err(StoreError::Options { why });
        }
        let timeout = Self::TIMEOUT.min(options.deadline);
        let mut config = ureq::Agent::config_builder()
            .proxy(None)
            .timeout_connect(Some(Self::CONNECT_TIMEOUT.min(timeout)))
            .timeout_global(Some(timeout))
            .max_redirects(0)
            .max_redirects_will_error(false)
            .http_status_as_error(false);
        if let Some(files) = &options.tls {
            let mut tls = TlsConfig::builder();
            if let Some(ca) = &files.ca {
                let certificate = Certificate::from_pem(&read(ca)?).map_err(|e| unusable(ca, &e))?;
                tls = tls.root_certs(RootCerts::Specific(Arc::new(vec![certificate])));
            }
            if let Some((certificate, key)) = &files.identity {
                let chain = Certificate::from_pem(&read(certificate)?).map_err(|e| unusable(certificate, &e))?;
                let key = PrivateKey::from_pem(&read(key)?).map_err(|e| unusable(key, &e))?;
                tls = tls.client_cert(Some(ClientCert::new_with_certs(&[chain], key)));
            }
            config = config.tls_config(tls.build());
        }
        Ok(Self { agent: config.build().new_agent(), base: base.into() })
    }

    /// The value under `key`; `None` if there is none. Blocks.
    ///
    /// # Errors
    /// See [`StoreError`].
    pub fn get(&self, key: &str) -> Result<Option<Vec<u8>>, StoreError> {
        let url = self.url(key);
        let mut answer = self.agent.get(&url).call().map_err(|e| self.fault(&e))?;
        let status = answer.status().as_u16();
        let body = answer.body_mut().with_config().limit(MAX_BYTES as u64 + 1).read_to_vec();
        let body = match body {
            Err(ureq::Error::BodyExceedsLimit(_)) => {
                return Err(StoreError::TooLarge { key: key.to_owned(), limit: MAX_BYTES });
            }
            other => other.map_err(|e| self.fault(&e))?,
        };
        match status {
            200 => Ok(Some(body)),
            404 => Ok(None),
            _ => Err(bad_status("GET", url, status, &body)),
        }
    }

    /// Puts `value` (JSON) under `key`. Blocks.
    ///
    /// # Errors
    /// [`StoreError::DuplicateRpcMeta`] when an `rpc_meta` key is taken; else see [`StoreError`].
    pub fn put(&self, key: &str, value: &[u8]) -> Result<(), StoreError> {
        let url = self.url(key);
        // Bodies here end without the newline that every other store has.
        let json = value.strip_suffix(b"\n").unwrap_or(value);
        let answer = self.agent.put(&url).header("Content-Type", "application/json").send(json);
        let (status, body) = self.short(answer)?;
        match status {
            200 => Ok(()),
            400 if is_duplicate(key, &body) => Err(StoreError::DuplicateRpcMeta { key: key.to_owned() }),
            _ => Err(bad_status("PUT", url, status, &body)),
        }
    }

    /// Takes `key` away; `false` if it was not there. Blocks.
    ///
    /// # Errors
    /// See [`StoreError`].
    pub fn delete(&self, key: &str) -> Result<bool, StoreError> {
        let url = self.url(key);
        let (status, body) = self.short(self.agent.delete(&url).call())?;
        match status {
            200 => Ok(true),
            404 => Ok(false),
            _ => Err(bad_status("DELETE", url, status, &body)),
        }
    }

    /// Runs one of the calls on the blocking pool of the runtime that is current.
    pub(crate) async fn off_thread<T: Send + 'static>(
        &self,
        call: impl FnOnce(&Self) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, StoreError> {
        let store = self.clone();
        match tokio::task::spawn_blocking(move || call(&store)).await {
            Ok(result) => result,
            Err(e) => Err(self.unreachable(Fault::Other(e.to_string()))),
        }
    }

    fn url(&self, key: &str) -> String {
        let join = if self.base.contains('?') { '&' } else { '?' };
        let mut url = format!("{}{join}key=", self.base);
        for byte in key.bytes() {
            if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
                url.push(char::from(byte));
            } else {
                let _ = write!(url, "%{byte:02X}");
            }
        }
        url
    }

    /// Status and the begin of the body.
    fn short(
        &self,
        answer: Result<ureq::http::Response<ureq::Body>, ureq::Error>,
    ) -> Result<(u16, Vec<u8>), StoreError> {
        let mut answer = answer.map_err(|e| self.fault(&e))?;
        // A body beyond the limit is an error page; the status already says what matters.
        let body = answer.body_mut().with_config().limit(64 << 10).read_to_vec().unwrap_or_default();
        Ok((answer.status().as_u16(), body))
    }

    fn unreachable(&self, fault: Fault) -> StoreError {
        StoreError::Unreachable { faults: vec![(self.base.to_string(), fault)] }
    }

    fn fault(&self, error: &ureq::Error) -> StoreError {
        use ureq::{Error, Timeout};
        let endpoint = self.base.to_string();
        match error {
            Error::Io(e) if e.kind() == io::ErrorKind::ConnectionRefused => self.unreachable(Fault::Refused),
            Error::Io(e) if e.kind() == io::ErrorKind::TimedOut => self.unreachable(Fault::ConnectTimeout),
            Error::Timeout(Timeout::Connect | Timeout::Resolve) => self.unreachable(Fault::ConnectTimeout),
            Error::Timeout(_) => StoreError::Silent { endpoint, after: Self::TIMEOUT },
            Error::HostNotFound => self.unreachable(Fault::Unresolved),
            Error::Tls(_) | Error::Pem(_) | Error::Rustls(_) => StoreError::Tls { endpoint, why: error.to_string() },
            Error::BadUri(_) => StoreError::Options { why: format!("{endpoint:?} is no URL: {error}") },
            Error::Io(e) if e.get_ref().is_some_and(|inner| inner.to_string().contains("certificate")) => {
                StoreError::Tls { endpoint, why: error.to_string() }
            }
            other => self.unreachable(Fault::Other(other.to_string())),
        }
    }
}

fn is_duplicate(key: &str, body: &[u8]) -> bool {
    super::keys::is_address(key) && body.starts_with(b"Duplicate rpc_meta")
}

fn bad_status(method: &'static str, url: String, status: u16, body: &[u8]) -> StoreError {
    let body = String::from_utf8_lossy(&body[..body.len().min(SHOWN)]).into_owned();
    StoreError::HttpStatus { method, url, status, body }
}

fn read(path: &Path) -> Result<Vec<u8>, StoreError> {
    std::fs::read(path).map_err(|e| unusable(path, &e))
}

fn unusable(path: &Path, why: &dyn std::error::Error) -> StoreError {
    StoreError::Options { why: format!("cannot use {}: {why}", path.display()) }
}
