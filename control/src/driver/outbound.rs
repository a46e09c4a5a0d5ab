//! Our own connections to peers' control ports: connect, one frame there, one frame back, close. No proxy, no pool; each
//! address of a name is tried in turn, and the whole has one deadline. When thousands of rails have to be connected in one
//! moment (our own link came back), a bounded number of connections is open at once and the others wait their turn.

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

/// Connections open at once: a share of the descriptors a process usually has, and less than the backlog of the one peer
/// all may go to.
const MOST_AT_ONCE: usize = 512;

struct Dial {
    token: Token,
    host: String,
    port: u16,
    /// Addresses not tried yet.
    left: VecDeque<SocketAddr>,
    address: Option<SocketAddr>,
    stream: Option<TcpStream>,
    connected: bool,
    /// It counts among the connections that are open.
    begun: bool,
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
    /// Those that wait for their turn, in order; one whose time is over meanwhile is no dial any more.
    waiting: VecDeque<u64>,
    /// Dials that have begun.
    begun: usize,
    most: usize,
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
            waiting: VecDeque::new(),
            begun: 0,
            most: MOST_AT_ONCE,
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
            begun: false,
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
        self.begin(registry, id, now).map_or(Ok(None), Err)
    }

    /// Where to is known: connects, or waits until another is done.
    fn begin(&mut self, registry: &Registry, id: u64, now: Nanos) -> Option<Event> {
        if self.begun >= self.most {
            self.waiting.push_back(id);
            return None;
        }
        self.dials.get_mut(&id)?.begun = true;
        self.begun += 1;
        self.connect(registry, id, now, None)
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
                    return self.begin(registry, id, now);
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
                self.begun -= usize::from(dial.begun);
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

    /// Ends what took too long: an address that does not answer, or the whole. Then begins what waited for that.
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
                (false, None) if !dial.left.is_empty() => {
                    let why = format!(
                        "{} connections to other peers were not over in time: see which peers do not answer, and try again",
                        self.most
                    );
                    DialError::Io { address, why }
                }
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
        while self.begun < self.most {
            let Some(id) = self.waiting.pop_front() else { break };
            out.extend(self.begin(registry, id, now));
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::MessageType;

    #[test]
    fn of_many_dials_a_few_are_open_and_the_others_wait_their_turn() {
        let poll = mio::Poll::new().unwrap();
        // Nobody accepts: the kernel connects them, and no reply comes.
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let mut outbound = Outbound::new(1, Nanos::from_secs(1), 1024, false);
        outbound.most = 3;
        let (now, end) = (Nanos::from_secs(1), Nanos::from_secs(10));
        let frame = || Frame::typed(MessageType::Probe, b"{}".to_vec());
        let dial = |outbound: &mut Outbound, token, end| {
            assert!(matches!(
                outbound.dial(poll.registry(), Token(token), ("127.0.0.1".into(), port), frame(), now, end),
                Ok(None)
            ));
        };
        for token in 0..8 {
            dial(&mut outbound, token, end);
        }
        // One that is out of time before its turn.
        dial(&mut outbound, 8, Nanos::from_secs(2));
        let open = |outbound: &Outbound| outbound.dials.values().filter(|dial| dial.stream.is_some()).count();
        assert_eq!((open(&outbound), outbound.waiting.len()), (3, 6));
        // Two are over: two others begin, in order.
        for id in [1, 3] {
            outbound.finish(poll.registry(), id, Err(DialError::Refused { address: String::new() }));
        }
        let mut events = Vec::new();
        outbound.expire(poll.registry(), now, &mut events);
        assert_eq!((open(&outbound), outbound.waiting.len(), events.len()), (3, 4, 0));
        assert!(outbound.dials[&7].begun && outbound.dials[&9].begun && !outbound.dials[&11].begun);
        outbound.dials.values_mut().for_each(|dial| dial.connected = dial.begun);
        // The impatient one is told what it waited for; at the end everybody is, and nothing is left.
        outbound.expire(poll.registry(), Nanos::from_secs(2), &mut events);
        let Some(Event::Dialed { token, result: Err(error) }) =
            events.iter().find(|event| matches!(event, Event::Dialed { result: Err(DialError::Io { .. }), .. }))
        else {
            panic!("nothing")
        };
        assert_eq!(*token, Token(8));
        assert!(error.to_string().contains("3 connections to other peers"), "{error}");
        for _ in 0..4 {
            outbound.dials.values_mut().for_each(|dial| dial.connected = dial.begun);
            outbound.expire(poll.registry(), end, &mut events);
        }
        assert_eq!((events.len(), outbound.dials.len(), outbound.begun, open(&outbound)), (7, 0, 0, 0));
    }
}
