//! Names and addresses of nodes: `host:port` texts, whether an address is ours, and which one to publish.

use std::fmt;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, UdpSocket};
use std::ops::RangeInclusive;

use moonrail_datapath::random::Random;

/// Port of a name that has none (`MC_HANDSHAKE_PORT`).
pub const DEFAULT_PORT: u16 = 12001;
/// Ports from which one is drawn for the handshake and for the TCP data protocol (`MC_MIN_RPC_PORT`, `MC_MAX_RPC_PORT`).
pub const RANDOM_PORTS: RangeInclusive<u16> = 15000..=17000;
/// Attempts at binding a drawn port.
const BIND_ATTEMPTS: u32 = 500;
/// Ports the kernel itself draws from; a range over these would collide with outgoing connections.
const EPHEMERAL: RangeInclusive<u16> = 32768..=60999;

/// A host and a port. The host has no brackets; an IPv6 one may end in `%scope`.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct HostPort {
    /// Address literal or name.
    pub host: String,
    /// TCP port.
    pub port: u16,
}

/// A text that names no host.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum NameError {
    /// Nothing there.
    #[error("{given:?} names no host: use HOST:PORT, IPV4:PORT or [IPV6]:PORT")]
    NoHost {
        /// What was given.
        given: String,
    },
    /// `@` parts server and device in NIC paths.
    #[error("{given:?} cannot be a node's name: '@' separates node and device in the handshake")]
    At {
        /// What was given.
        given: String,
    },
}

/// A name and what was odd about it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ParsedName {
    /// Host and port.
    pub address: HostPort,
    /// A warning in the stock engine's words, when the port was none and the default took its place.
    pub warning: Option<String>,
}

impl HostPort {
    /// Reads a name with [`DEFAULT_PORT`] where it has no (legal) port.
    ///
    /// # Errors
    /// See [`NameError`].
    pub fn parse(given: &str) -> Result<Self, NameError> {
        Self::parse_with(given, DEFAULT_PORT).map(|parsed| parsed.address)
    }

    /// Reads `[v6]:port`, a bare v6, `v6%scope:port`, or what splits at the last `:`.
    ///
    /// A port that is no number in 1 to 65535 gives a warning and `default_port`, as in the stock engine.
    ///
    /// # Errors
    /// See [`NameError`].
    pub fn parse_with(given: &str, default_port: u16) -> Result<ParsedName, NameError> {
        let text = given.trim();
        if text.contains('@') {
            return Err(NameError::At { given: given.to_owned() });
        }
        let (host, port) = split(text);
        // Space inside the brackets, or before the port: a name that we publish has to be read as the same again.
        let host = host.trim();
        if host.is_empty() {
            return Err(NameError::NoHost { given: given.to_owned() });
        }
        let parsed = port.map(|port| port.parse::<u16>().ok().filter(|port| *port != 0));
        let warning = matches!(parsed, Some(None))
            .then(|| format!("Illegal port number in {given}. Use default port {default_port} instead"));
        let port = parsed.flatten().unwrap_or(default_port);
        Ok(ParsedName { address: Self { host: host.to_owned(), port }, warning })
    }

    /// The host as an address, if it is a literal; a scope is left out.
    pub fn ip(&self) -> Option<IpAddr> {
        self.host.split('%').next().and_then(|host| host.parse().ok())
    }
}

impl fmt::Display for HostPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.host.contains(':') {
            write!(f, "[{}]:{}", self.host, self.port)
        } else {
            write!(f, "{}:{}", self.host, self.port)
        }
    }
}

fn split(text: &str) -> (&str, Option<&str>) {
    if let Some(rest) = text.strip_prefix('[') {
        return match rest.split_once(']') {
            Some((host, "")) => (host, None),
            Some((host, after)) => (host, Some(after.strip_prefix(':').unwrap_or(after))),
            None => (rest, None),
        };
    }
    if let Some((v6, scope)) = text.split_once('%').filter(|(v6, _)| v6.parse::<Ipv6Addr>().is_ok()) {
        return match scope.split_once(':') {
            Some((scope, port)) => (&text[..v6.len() + 1 + scope.len()], Some(port)),
            None => (text, None),
        };
    }
    if text.parse::<Ipv6Addr>().is_ok() {
        return (text, None);
    }
    match text.rsplit_once(':') {
        Some((host, port)) => (host, Some(port)),
        None => (text, None),
    }
}

/// What an address is worth as the one peers are told.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum OwnAddress {
    /// An address of this host that others may reach.
    Usable,
    /// 127/8 or ::1: peers on other hosts would reach themselves.
    Loopback,
    /// 0.0.0.0 or ::, no address at all.
    Unspecified,
    /// Of another host.
    Foreign,
}

/// The address given as our own cannot be published. On one host for tests, a loopback address works.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OwnAddressError {
    /// See [`OwnAddress::Loopback`].
    #[error(
        "{given} is a loopback address: only nodes on this host can reach it; give an address of this host on the \
         network that connects the nodes{}",
        alternatives(others)
    )]
    Loopback {
        /// What was given.
        given: String,
        /// Addresses of this host that would do.
        others: Vec<IpAddr>,
    },
    /// See [`OwnAddress::Unspecified`].
    #[error("{given} is no address that a peer can connect to; give one of this host's{}", alternatives(others))]
    Unspecified {
        /// What was given.
        given: String,
        /// Addresses of this host that would do.
        others: Vec<IpAddr>,
    },
    /// See [`OwnAddress::Foreign`].
    #[error(
        "{given} is not an address of this host: peers would connect to another one; give one of this host's{}",
        alternatives(others)
    )]
    Foreign {
        /// What was given.
        given: String,
        /// Addresses of this host that would do.
        others: Vec<IpAddr>,
    },
}

fn alternatives(others: &[IpAddr]) -> String {
    let list = others.iter().map(IpAddr::to_string).collect::<Vec<_>>().join(", ");
    if list.is_empty() { String::new() } else { format!(" (it has {list})") }
}

/// Judges an address by trying to bind it: an address is ours if and only if a socket can have it.
///
/// (With `net.ipv4.ip_nonlocal_bind` set, any address passes; so does any on a host that fails to bind for lack of
/// descriptors. It is a check against mistakes, not a proof.)
pub fn own_address(ip: IpAddr) -> OwnAddress {
    if ip.is_unspecified() {
        OwnAddress::Unspecified
    } else if ip.to_canonical().is_loopback() {
        OwnAddress::Loopback
    } else {
        match UdpSocket::bind(SocketAddr::new(ip, 0)) {
            Err(e) if e.kind() == io::ErrorKind::AddrNotAvailable => OwnAddress::Foreign,
            // A link-local IPv6 address cannot be bound without its scope, which says nothing of whose it is.
            _ => OwnAddress::Usable,
        }
    }
}

/// Whether `ip`, given by the user as `given`, can be told to peers.
///
/// # Errors
/// See [`OwnAddressError`]; a caller may treat a loopback address as a warning.
pub fn check_own_address(given: &str, ip: IpAddr) -> Result<(), OwnAddressError> {
    let given = given.to_owned();
    match own_address(ip) {
        OwnAddress::Usable => Ok(()),
        OwnAddress::Loopback => Err(OwnAddressError::Loopback { given, others: host_addresses() }),
        OwnAddress::Unspecified => Err(OwnAddressError::Unspecified { given, others: host_addresses() }),
        OwnAddress::Foreign => Err(OwnAddressError::Foreign { given, others: host_addresses() }),
    }
}

/// Addresses of this host that are not loopback, from the kernel's tables; IPv4 first. Empty where there is no /proc.
pub fn host_addresses() -> Vec<IpAddr> {
    let read = |path| std::fs::read_to_string(path).unwrap_or_default();
    let v4 = ipv4_locals(&read("/proc/net/fib_trie")).into_iter().map(IpAddr::V4);
    let v6 = ipv6_locals(&read("/proc/net/if_inet6")).into_iter().map(IpAddr::V6);
    v4.chain(v6).filter(|ip| !ip.is_loopback()).collect()
}

/// Leaves of the routing trie that are `host LOCAL`; an address is on the `|--` line before.
fn ipv4_locals(trie: &str) -> Vec<Ipv4Addr> {
    let mut found = Vec::new();
    let mut last = None;
    for line in trie.lines() {
        if let Some((_, address)) = line.split_once("|-- ") {
            last = address.trim().parse().ok();
        } else if line.contains("/32 host LOCAL") && last.is_some_and(|address| !found.contains(&address)) {
            found.extend(last);
        }
    }
    found
}

/// `address ifindex prefix scope flags name` per line; scope 00 is global.
fn ipv6_locals(table: &str) -> Vec<Ipv6Addr> {
    let global = |line: &str| {
        let mut fields = line.split_whitespace();
        let address = u128::from_str_radix(fields.next()?, 16).ok()?;
        (fields.nth(2)? == "00").then_some(Ipv6Addr::from(address))
    };
    table.lines().filter_map(global).collect()
}

/// Which family of addresses names, listeners and connections use.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Family {
    /// IPv4.
    #[default]
    V4,
    /// IPv6 (`MC_USE_IPV6`).
    V6,
}

/// The address to publish when the user gave none: the one this host would use towards `to` (its metadata server), or
/// towards the world; else its first. Nothing is sent: connecting a UDP socket only asks the routing table.
pub fn published_address(to: Option<IpAddr>, family: Family) -> Option<IpAddr> {
    let (any, world): (IpAddr, IpAddr) = match family {
        // Documentation addresses (RFC 5737, RFC 3849): routed like any, used by none.
        Family::V4 => (Ipv4Addr::UNSPECIFIED.into(), Ipv4Addr::new(192, 0, 2, 1).into()),
        Family::V6 => (Ipv6Addr::UNSPECIFIED.into(), Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1).into()),
    };
    let towards = |to: IpAddr| {
        let socket = UdpSocket::bind(SocketAddr::new(any, 0)).ok()?;
        socket.connect(SocketAddr::new(to, 9)).ok()?;
        socket.local_addr().ok().map(|a| a.ip()).filter(|ip| !ip.is_loopback() && !ip.is_unspecified())
    };
    let fits = |ip: &IpAddr| ip.is_ipv4() == any.is_ipv4();
    to.filter(fits).and_then(towards).or_else(|| towards(world)).or_else(|| host_addresses().into_iter().find(fits))
}

/// Why no port could be bound.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BindError {
    /// The one port that was asked for.
    #[error(
        "cannot listen on port {port}: {source}; another process has it (`ss -ltnp sport = :{port}`), choose another or stop that one"
    )]
    Port {
        /// The port.
        port: u16,
        /// The system's error.
        source: io::Error,
    },
    /// None of the range.
    #[error(
        "no free port in {first} to {last} after {BIND_ATTEMPTS} attempts, the last with: {source}; set MC_MIN_RPC_PORT and MC_MAX_RPC_PORT to a wider range"
    )]
    Range {
        /// First of the range.
        first: u16,
        /// Last of the range.
        last: u16,
        /// The last attempt's error.
        source: io::Error,
    },
}

/// Checks a range for random ports: both ends in 1024 to 65535, outside 32768 to 60999, in order.
///
/// # Errors
/// The stock engine's warning; it then takes [`RANDOM_PORTS`].
pub fn port_range(first: u32, last: u32) -> Result<RangeInclusive<u16>, String> {
    let legal = |port: u32| u16::try_from(port).ok().filter(|port| *port >= 1024 && !EPHEMERAL.contains(port));
    match (legal(first), legal(last)) {
        (Some(first), Some(last)) if first <= last => Ok(first..=last),
        _ => Err(format!(
            "Invalid port range [{first}, {last}], falling back to default [{}, {}]",
            RANDOM_PORTS.start(),
            RANDOM_PORTS.end()
        )),
    }
}

/// Listens on exactly `port` of every address of the family.
///
/// # Errors
/// [`BindError::Port`], with who may have it.
pub fn listen_on(port: u16, family: Family) -> Result<TcpListener, BindError> {
    TcpListener::bind(SocketAddr::new(every_address(family), port)).map_err(|source| BindError::Port { port, source })
}

/// Listens on a port of `ports`: the first free one in the order that `seed` decides.
///
/// # Errors
/// [`BindError::Range`].
pub fn listen_in(ports: RangeInclusive<u16>, family: Family, seed: u64) -> Result<TcpListener, BindError> {
    let (first, last) = (*ports.start(), *ports.end());
    let count = u64::from(last.saturating_sub(first)) + 1;
    let mut random = Random::new(seed);
    let mut error = io::Error::from(io::ErrorKind::AddrInUse);
    for _ in 0..BIND_ATTEMPTS {
        let port = first + random.below(count) as u16;
        match TcpListener::bind(SocketAddr::new(every_address(family), port)) {
            Ok(listener) => return Ok(listener),
            Err(e) => error = e,
        }
    }
    Err(BindError::Range { first, last, source: error })
}

fn every_address(family: Family) -> IpAddr {
    match family {
        Family::V4 => Ipv4Addr::UNSPECIFIED.into(),
        Family::V6 => Ipv6Addr::UNSPECIFIED.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_forms_of_a_name() {
        for (text, host, port) in [
            ("10.0.0.1:15001", "10.0.0.1", 15001),
            ("10.0.0.1", "10.0.0.1", DEFAULT_PORT),
            ("myname", "myname", DEFAULT_PORT),
            ("[::1]:9", "::1", 9),
            ("[::1]", "::1", DEFAULT_PORT),
            ("fe80::1", "fe80::1", DEFAULT_PORT),
            ("fe80::1%eth0:9", "fe80::1%eth0", 9),
            ("fe80::1%eth0", "fe80::1%eth0", DEFAULT_PORT),
            ("[fe80::1%eth0]:9", "fe80::1%eth0", 9),
            ("[ ::1 ]:9", "::1", 9),
            ("[\r name", "name", DEFAULT_PORT),
            ("name :9", "name", 9),
        ] {
            let address = HostPort { host: host.into(), port };
            assert_eq!(HostPort::parse(text), Ok(address.clone()), "{text}");
            assert_eq!(HostPort::parse(&address.to_string()), Ok(address), "{text}");
        }
        assert!(matches!(HostPort::parse(":1"), Err(NameError::NoHost { .. })));
        assert!(matches!(HostPort::parse("a@b"), Err(NameError::At { .. })));
    }

    #[test]
    fn a_port_that_is_none_is_a_warning_and_the_default() {
        for text in ["h:x", "h:70000", "h:0", "h:"] {
            let parsed = HostPort::parse_with(text, 7).unwrap();
            let warning = format!("Illegal port number in {text}. Use default port 7 instead");
            assert_eq!((parsed.address.port, parsed.warning), (7, Some(warning)));
        }
    }

    #[test]
    fn whose_address_it_is() {
        let ip = |text: &str| text.parse().unwrap();
        assert_eq!(own_address(ip("127.0.0.1")), OwnAddress::Loopback);
        assert_eq!(own_address(ip("::ffff:127.0.0.1")), OwnAddress::Loopback);
        assert_eq!(own_address(ip("0.0.0.0")), OwnAddress::Unspecified);
        assert_eq!(own_address(ip("192.0.2.77")), OwnAddress::Foreign);
        let error = check_own_address("192.0.2.77", ip("192.0.2.77")).unwrap_err();
        assert!(error.to_string().contains("not an address of this host"), "{error}");
        for own in host_addresses().into_iter().filter(IpAddr::is_ipv4) {
            assert_eq!(own_address(own), OwnAddress::Usable, "{own}");
        }
    }

    #[test]
    fn the_kernels_tables_are_read() {
        let trie = "Main:\n  +-- 0.0.0.0/0 3 0 5\n     |-- 10.0.0.0\n        /24 link UNICAST\n     |-- 10.0.0.5\n        \
                    /32 host LOCAL\n     |-- 10.0.0.255\n        /32 link BROADCAST\n     |-- 127.0.0.1\n        \
                    /32 host LOCAL\n     |-- 10.0.0.5\n        /32 host LOCAL\n";
        assert_eq!(ipv4_locals(trie), [Ipv4Addr::new(10, 0, 0, 5), Ipv4Addr::LOCALHOST]);
        let table =
            "fe80000000000000000000000000000a 02 40 20 80 eth0\n20010db8000000000000000000000001 02 40 00 80 eth0\n";
        assert_eq!(ipv6_locals(table), ["2001:db8::1".parse::<Ipv6Addr>().unwrap()]);
    }

    #[test]
    fn a_range_of_ports_is_checked_as_upstream_does() {
        assert_eq!(port_range(20000, 20010), Ok(20000..=20010));
        for (first, last) in [(80, 2000), (20010, 20000), (32768, 40000), (20000, 60999), (20000, 70000)] {
            let warning = format!("Invalid port range [{first}, {last}], falling back to default [15000, 17000]");
            assert_eq!(port_range(first, last), Err(warning));
        }
    }

    #[test]
    fn a_taken_port_says_who_may_have_it_and_a_random_one_is_found_beside_it() {
        let taken = TcpListener::bind(("0.0.0.0", 0)).unwrap();
        let port = taken.local_addr().unwrap().port();
        let error = listen_on(port, Family::V4).unwrap_err().to_string();
        assert!(error.contains(&port.to_string()) && error.contains("Address already in use"), "{error}");
        assert!(matches!(listen_in(port..=port, Family::V4, 1), Err(BindError::Range { .. })));
        let free = listen_in(RANDOM_PORTS, Family::V4, 1).unwrap();
        assert!(RANDOM_PORTS.contains(&free.local_addr().unwrap().port()));
    }

    #[test]
    fn the_published_address_is_one_of_this_host() {
        if let Some(ip) = published_address(None, Family::V4) {
            assert_eq!(own_address(ip), OwnAddress::Usable);
        }
    }

    proptest! {
        #[test]
        fn no_text_panics_and_what_parses_survives(text in "[a-z0-9:.%\\[\\]]{0,20}|\\PC{0,12}") {
            if let Ok(name) = HostPort::parse(&text) {
                prop_assert!(!name.host.is_empty() && name.port != 0);
            }
        }

        #[test]
        fn an_address_survives_its_text(ip: IpAddr, port in 1u16..) {
            let name = HostPort { host: ip.to_string(), port };
            prop_assert_eq!(HostPort::parse(&name.to_string()), Ok(name));
        }
    }
}
