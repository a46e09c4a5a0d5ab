//! Who of them is still there: a TCP connection to each node's handshake port, opened and closed.

use std::fmt;
use std::io;
use std::net::{TcpStream, ToSocketAddrs};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use moonrail_control::metadata::RpcMeta;

use super::record::Record;

/// For the name, and then for the connection, of one node.
const PATIENCE: Duration = Duration::from_secs(2);
/// Nodes probed at the same time.
const AT_ONCE: usize = 32;

/// Whether a node is there.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Life {
    /// Somebody accepts connections at its handshake port.
    Answers,
    /// Nobody can be there.
    Gone {
        /// How that shows.
        why: String,
    },
    /// No answer, which proves nothing: a firewall, a frozen machine, a network that is away.
    Silent {
        /// What was tried.
        why: String,
    },
    /// Not asked, or nobody knows where.
    Unknown {
        /// Why.
        why: String,
    },
}

impl Life {
    /// Before anybody asked.
    pub fn unprobed() -> Self {
        Self::Unknown { why: "not asked".to_owned() }
    }

    /// One word for a table.
    pub fn word(&self) -> &'static str {
        match self {
            Self::Answers => "alive",
            Self::Gone { .. } => "stale",
            Self::Silent { .. } => "silent",
            Self::Unknown { .. } => "unknown",
        }
    }
}

impl fmt::Display for Life {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Answers => f.write_str("alive: its handshake port accepts connections"),
            Self::Gone { why } | Self::Silent { why } | Self::Unknown { why } => write!(f, "{}: {why}", self.word()),
        }
    }
}

/// Asks every node, many at a time; each at most twice `PATIENCE`.
pub fn all(records: &mut [Record]) {
    let next = AtomicUsize::new(0);
    let found: Vec<Mutex<Option<Life>>> = records.iter().map(|_| Mutex::new(None)).collect();
    std::thread::scope(|scope| {
        for _ in 0..AT_ONCE.min(records.len()) {
            scope.spawn(|| {
                while let Some((record, slot)) = {
                    let at = next.fetch_add(1, Ordering::Relaxed);
                    records.get(at).zip(found.get(at))
                } {
                    let life = one(record);
                    *slot.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = Some(life);
                }
            });
        }
    });
    for (record, slot) in records.iter_mut().zip(found) {
        if let Some(life) = slot.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner) {
            record.life = life;
        }
    }
}

fn one(record: &Record) -> Life {
    match &record.address {
        Some(Ok(meta)) => node(meta),
        Some(Err(why)) => Life::Unknown { why: format!("its address cannot be read: {why}") },
        None => Life::Unknown { why: "no handshake address is registered under this name".to_owned() },
    }
}

/// Asks one node.
pub fn node(meta: &RpcMeta) -> Life {
    let RpcMeta { ip_or_host_name: host, rpc_port: port } = meta;
    // A resolver may take as long as it likes, so it is asked on a thread that is left behind when it does.
    let (tell, hear) = mpsc::channel();
    let asked = (host.clone(), *port);
    std::thread::spawn(move || {
        let _ = tell.send((asked.0.as_str(), asked.1).to_socket_addrs().map(Iterator::collect::<Vec<_>>));
    });
    let addresses = match hear.recv_timeout(PATIENCE) {
        Ok(Ok(addresses)) if !addresses.is_empty() => addresses,
        Ok(Ok(_)) => return Life::Gone { why: format!("host {host} has no address") },
        Ok(Err(e)) => return unresolved(host, &e),
        Err(_) => return Life::Silent { why: format!("looking up {host} took more than {PATIENCE:?}") },
    };
    let until = Instant::now() + PATIENCE;
    let mut life = Life::Silent { why: format!("no answer from {host}:{port} within {PATIENCE:?}") };
    for address in addresses {
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            break;
        }
        match TcpStream::connect_timeout(&address, left) {
            Ok(_) => return Life::Answers,
            Err(e) if e.kind() == io::ErrorKind::ConnectionRefused => {
                life = Life::Gone { why: format!("{address} refuses connections: no process has that port") };
            }
            Err(e) if e.kind() == io::ErrorKind::TimedOut => {}
            // No route, network down: the node may well be there.
            Err(e) => life = Life::Silent { why: format!("{address}: {e}") },
        }
    }
    life
}

/// A name that does not exist now may exist again when the resolver does, so it is no proof.
fn unresolved(host: &str, error: &io::Error) -> Life {
    Life::Silent { why: format!("host {host}: {error}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(host: &str, port: u16) -> Life {
        node(&RpcMeta { ip_or_host_name: host.to_owned(), rpc_port: port })
    }

    #[test]
    fn an_open_port_a_closed_one_and_no_host() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        assert_eq!(at("127.0.0.1", port), Life::Answers);
        drop(listener);
        assert!(matches!(at("127.0.0.1", port), Life::Gone { why } if why.contains("refuses")));
        assert!(matches!(at("no-such-host.invalid", 1), Life::Silent { .. }));
    }
}
