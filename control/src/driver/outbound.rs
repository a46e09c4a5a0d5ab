//! Our own connections to peers' control ports: connect, one frame there, one frame back, close. No proxy, no pool; each
//! address of a name is tried in turn, and the whole has one deadline.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::io::{self, ErrorKind, Read, Write};
use std::net::{IpAddr, SocketAddr, ToSocketAddrs};

use mio::net::TcpStream;
use mio::{Interest, Registry, Token as Ready};
use moonrail_datapath::units::Nanos;

use super::inbound::READ_PER_TURN;
use crate::brain::{Event, Token};
use crate::error::DialError;
use crate::wire::{Frame, FrameDecoder};

struct Dial {
    token: Token,
    host: String,
    port: u16,
    /// Addresses not tried yet.
    left: VecDeque<SocketAddr>,
    address: Option<SocketAddr>,
    stream: Option<TcpStream>,
    connected: bool,
    frame: Frame,
    bytes: Vec<u8>,
    sent: usize,
    decoder: FrameDecoder,
    /// Of the present step.
    deadline: Nanos,
    /// Of all.
    end: Nanos,
}

pub(super) struct Outbound {
    dials: BTreeMap<u64, Dial>,
    deadlines: BTreeSet<(Nanos, u64)>,
    next: u64,
    connect_timeout: Nanos,
    max_length: usize,
    ipv6: bool,
    /// Connections that may have more to read.
    pub(super) unread: BTreeSet<u64>,
}

/// A name to look up; the result goes to [`Outbound::resolved`].
pub(super) struct Lookup {
    pub(super) id: u64,
    pub(super) host: String,
    pub(super) port: u16,
}

impl Outbound {
    pub(super) fn new(first: u64, connect_timeout: Nanos, max_length: usize, ipv6: bool) -> Self {
        Self {
            dials: BTreeMap::new(),
            deadlines: BTreeSet::new(),
            next: first,
            connect_timeout,
            max_length,
            ipv6,
            unread: BTreeSet::new(),
        }
    }

    pub(super) fn has(&self, id: u64) -> bool {
        self.dials.contains_key(&id)
    }

    /// Begins. A name that is no address has to be looked up first.
    pub(super) fn dial(
        &mut self,
        registry: &Registry,
        token: Token,
        (host, port): (String, u16),
        frame: Frame,
        now: Nanos,
        end: Nanos,
    ) -> Result<Option<Lookup>, Event> {
        let id = self.next;
        self.next += 2;
        let literal = host.parse::<IpAddr>().ok().map(|ip| SocketAddr::new(ip, port));
        let bytes = frame.encode();
        let dial = Dial {
            token,
            host: host.clone(),
            port,
            left: literal.into_iter().collect(),
            address: None,
            stream: None,
            connected: false,
            frame,
            bytes,
            sent: 0,
            decoder: FrameDecoder::new(self.max_length),
            deadline: end,
            end,
        };
        self.deadlines.insert((end, id));
        self.dials.insert(id, dial);
        if literal.is_none() {
            return Ok(Some(Lookup { id, host, port }));
        }
        self.connect(registry, id, now, None).map_or(Ok(None), Err)
    }

    /// The name's addresses are known, or there are none.
    pub(super) fn resolved(
        &mut self,
        registry: &Registry,
        id: u64,
        result: io::Result<Vec<SocketAddr>>,
        now: Nanos,
    ) -> Option<Event> {
        let ipv6 = self.ipv6;
        let dial = self.dials.get_mut(&id)?;
        let why = match result {
            Ok(addresses) => {
                // As stock engines: one family or the other, never both.
                dial.left = addresses.into_iter().filter(|a| a.is_ipv6() == ipv6).take(8).collect();
                if dial.left.is_empty() {
                    format!("no {} address", if ipv6 { "IPv6" } else { "IPv4" })
                } else {
                    return self.connect(registry, id, now, None);
                }
            }
            Err(error) => error.to_string(),
        };
        let error = DialError::Resolve { host: dial.host.clone(), port: dial.port, why };
        Some(self.finish(registry, id, Err(error)))
    }

    /// Tries the next address; with none left, `last` is the outcome.
    fn connect(&mut self, registry: &Registry, id: u64, now: Nanos, last: Option<DialError>) -> Option<Event> {
        let mut last = last;
        loop {
            let dial = self.dials.get_mut(&id)?;
            if let Some(mut stream) = dial.stream.take() {
                let _ = registry.deregister(&mut stream);
            }
            let Some(address) = dial.left.pop_front() else {
                let error = last.unwrap_or_else(|| DialError::Resolve {
                    host: dial.host.clone(),
                    port: dial.port,
                    why: "no address".to_owned(),
                });
                return Some(self.finish(registry, id, Err(error)));
            };
            let opened = TcpStream::connect(address).and_then(|mut stream| {
                registry.register(&mut stream, Ready(id as usize), Interest::READABLE | Interest::WRITABLE)?;
                Ok(stream)
            });
            match opened {
                Ok(stream) => {
                    (dial.stream, dial.address, dial.connected, dial.sent) = (Some(stream), Some(address), false, 0);
                    let deadline = now.plus(self.connect_timeout).min(dial.end);
                    self.set_deadline(id, deadline);
                    return None;
                }
                Err(error) => last = Some(in_words(address, &error)),
            }
        }
    }

    fn set_deadline(&mut self, id: u64, deadline: Nanos) {
        if let Some(dial) = self.dials.get_mut(&id) {
            self.deadlines.remove(&(dial.deadline, id));
            dial.deadline = deadline;
            self.deadlines.insert((deadline, id));
        }
    }

    /// The socket may have become connected, writable or readable.
    pub(super) fn ready(&mut self, registry: &Registry, id: u64, now: Nanos) -> Option<Event> {
        self.unread.remove(&id);
        let dial = self.dials.get_mut(&id)?;
        let (stream, address) = (dial.stream.as_mut()?, dial.address?);
        if !dial.connected {
            let failed = match stream.take_error() {
                Ok(None) => None,
                Ok(Some(error)) | Err(error) => Some(error),
            };
            match (failed, stream.peer_addr()) {
                (None, Err(e)) if e.kind() == ErrorKind::NotConnected => return None,
                (Some(error), _) | (None, Err(error)) => {
                    return self.connect(registry, id, now, Some(in_words(address, &error)));
                }
                (None, Ok(_)) => {}
            }
            dial.connected = true;
            let _ = stream.set_nodelay(true);
            let end = dial.end;
            self.set_deadline(id, end);
        }
        match self.exchange(id) {
            Ok(None) => None,
            Ok(Some(frame)) => Some(self.finish(registry, id, Ok(frame))),
            Err(error) => Some(self.finish(registry, id, Err(error))),
        }
    }

    fn exchange(&mut self, id: u64) -> Result<Option<Frame>, DialError> {
        let Some(dial) = self.dials.get_mut(&id) else { return Ok(None) };
        let (Some(stream), Some(address)) = (dial.stream.as_mut(), dial.address) else { return Ok(None) };
        while dial.sent < dial.bytes.len() {
            match stream.write(&dial.bytes[dial.sent..]) {
                Ok(n) => dial.sent += n,
                Err(e) if e.kind() == ErrorKind::WouldBlock => break,
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(in_words(address, &error)),
            }
        }
        let garbage = |why: String| DialError::Garbage { address: address.to_string(), why };
        let mut buffer = [0u8; 16 << 10];
        let mut taken = 0;
        loop {
            if taken >= READ_PER_TURN {
                self.unread.insert(id);
                return Ok(None);
            }
            match stream.read(&mut buffer) {
                Ok(0) => {
                    let why = dial.decoder.finish().err().map_or_else(String::new, |e| e.to_string());
                    return Err(garbage(why));
                }
                Ok(n) => {
                    taken += n;
                    match dial.decoder.push(&buffer[..n]) {
                        Ok(Some(frame)) if frame.kind == dial.frame.kind => return Ok(Some(frame)),
                        Ok(Some(frame)) => {
                            return Err(garbage(format!(
                                "unexpected handshake message type {:?} where {:?} was asked",
                                frame.kind, dial.frame.kind
                            )));
                        }
                        Ok(None) => {}
                        Err(error) => return Err(garbage(error.to_string())),
                    }
                }
                Err(e) if e.kind() == ErrorKind::WouldBlock => return Ok(None),
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(in_words(address, &error)),
            }
        }
    }

    fn finish(&mut self, registry: &Registry, id: u64, result: Result<Frame, DialError>) -> Event {
        let token = match self.dials.remove(&id) {
            Some(mut dial) => {
                self.deadlines.remove(&(dial.deadline, id));
                if let Some(stream) = &mut dial.stream {
                    let _ = registry.deregister(stream);
                }
                dial.token
            }
            None => Token(0),
        };
        self.unread.remove(&id);
        Event::Dialed { token, result }
    }

    /// Ends what took too long: an address that does not answer, or the whole.
    pub(super) fn expire(&mut self, registry: &Registry, now: Nanos, out: &mut Vec<Event>) {
        while let Some((at, id)) = self.deadlines.first().copied() {
            if at > now {
                break;
            }
            let Some(dial) = self.dials.get(&id) else {
                self.deadlines.pop_first();
                continue;
            };
            let (whole, connected, port) = (now >= dial.end, dial.connected, dial.port);
            let address = dial.address.map_or_else(|| format!("{}:{port}", dial.host), |a| a.to_string());
            let error = match (connected, dial.address) {
                (true, _) => DialError::ReplyTimeout { address },
                (false, Some(_)) => DialError::ConnectTimeout { address, port },
                (false, None) => DialError::Resolve {
                    host: dial.host.clone(),
                    port,
                    why: "no answer from the resolver in time".to_owned(),
                },
            };
            if whole || connected {
                out.push(self.finish(registry, id, Err(error)));
            } else {
                out.extend(self.connect(registry, id, now, Some(error)));
            }
        }
    }

    pub(super) fn next_deadline(&self) -> Option<Nanos> {
        self.deadlines.first().map(|(at, _)| *at)
    }
}

/// Looks a name up; may block for seconds.
pub(super) fn look_up(host: &str, port: u16) -> io::Result<Vec<SocketAddr>> {
    // A literal with a scope (`fe80::1%eth0`) is the resolver's too.
    Ok((host, port).to_socket_addrs()?.collect())
}

fn in_words(address: SocketAddr, error: &io::Error) -> DialError {
    match error.kind() {
        ErrorKind::ConnectionRefused => DialError::Refused { address: address.to_string() },
        ErrorKind::TimedOut => DialError::ConnectTimeout { address: address.to_string(), port: address.port() },
        _ => DialError::Io { address: address.to_string(), why: error.to_string() },
    }
}
