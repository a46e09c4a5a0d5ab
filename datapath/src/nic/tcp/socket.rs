//! Sockets: the data port, connections to peers, and the options of both.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, ToSocketAddrs};
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{AddressFamily, SocketFlags, SocketType, sockopt};

use super::{Ports, TcpOptions};
use crate::random::Random;

/// Connections that may wait to be accepted.
const BACKLOG: i32 = 4096;

/// Addresses of one name that are tried.
const ADDRESSES: usize = 8;

/// Ports that the system gives to connections: a server there would lose its port to one of them.
fn ephemeral() -> Option<(u16, u16)> {
    let text = std::fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range").ok()?;
    let mut numbers = text.split_whitespace().map(str::parse);
    Some((numbers.next()?.ok()?, numbers.next()?.ok()?))
}

/// Ports to try, in order.
fn candidates(ports: Ports) -> Vec<u16> {
    let (first, last) = match ports {
        Ports::Fixed(port) => return vec![port],
        Ports::Range(first, last) => (first, last),
    };
    let taken = ephemeral();
    let free = |port: &u16| !taken.is_some_and(|(low, high)| (low..=high).contains(port));
    let all: Vec<u16> = (first..=last).collect();
    let outside: Vec<u16> = all.iter().copied().filter(free).collect();
    // A range that lies in the ephemeral one altogether was meant so.
    let mut ports = if outside.is_empty() { all } else { outside };
    let seed =
        u64::from(std::process::id()) ^ std::time::SystemTime::UNIX_EPOCH.elapsed().map_or(0, |d| d.as_nanos() as u64);
    let start = Random::new(seed).below(ports.len() as u64) as usize;
    ports.rotate_left(start);
    ports
}

/// The data port: dual-stack, or IPv4 only where there is no IPv6. The socket does not block.
///
/// # Errors
/// `AddrInUse` with what was tried; otherwise what the system said of the step that failed.
pub(super) fn listen(options: &TcpOptions) -> io::Result<(OwnedFd, u16)> {
    let ports = candidates(options.ports);
    let mut last = io::Error::new(io::ErrorKind::InvalidInput, "the range of data ports is empty");
    for port in ports {
        match listen_at(port, options) {
            Ok(found) => return Ok(found),
            Err(e) if e.kind() == io::ErrorKind::AddrInUse => last = e,
            Err(e) => return Err(io::Error::new(e.kind(), format!("data port {port}: {e}"))),
        }
    }
    let tried = match options.ports {
        Ports::Fixed(port) => format!("data port {port} is in use: choose another one, or end what listens there"),
        Ports::Range(first, last) => format!("no data port from {first} to {last} is free: give a wider range"),
    };
    Err(io::Error::new(last.kind(), format!("{tried} ({last})")))
}

fn listen_at(port: u16, options: &TcpOptions) -> io::Result<(OwnedFd, u16)> {
    let six = listen_on(SocketAddr::from((Ipv6Addr::UNSPECIFIED, port)), options);
    match six {
        Err(e) if e.kind() != io::ErrorKind::AddrInUse => {
            listen_on(SocketAddr::from((Ipv4Addr::UNSPECIFIED, port)), options)
        }
        other => other,
    }
}

fn listen_on(at: SocketAddr, options: &TcpOptions) -> io::Result<(OwnedFd, u16)> {
    let fd = open(at)?;
    if at.is_ipv6() {
        sockopt::set_ipv6_v6only(&fd, false)?;
    }
    sockopt::set_socket_reuseaddr(&fd, true)?;
    // Accepted connections inherit these.
    prepare(&fd, options)?;
    rustix::net::bind(&fd, &at)?;
    rustix::net::listen(&fd, BACKLOG)?;
    let port = match SocketAddr::try_from(rustix::net::getsockname(&fd)?) {
        Ok(bound) => bound.port(),
        Err(e) => return Err(e.into()),
    };
    Ok((fd, port))
}

fn open(to: SocketAddr) -> io::Result<OwnedFd> {
    let family = if to.is_ipv6() { AddressFamily::INET6 } else { AddressFamily::INET };
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    Ok(rustix::net::socket_with(family, SocketType::STREAM, flags, None)?)
}

/// What listener and lanes have in common.
fn prepare(fd: &OwnedFd, options: &TcpOptions) -> io::Result<()> {
    sockopt::set_tcp_nodelay(fd, true)?;
    sockopt::set_socket_keepalive(fd, true)?;
    sockopt::set_tcp_keepidle(fd, options.keepalive)?;
    sockopt::set_tcp_keepintvl(fd, (options.keepalive / 3).max(Duration::from_secs(1)))?;
    sockopt::set_tcp_keepcnt(fd, 3)?;
    if let Some(bytes) = options.buffer {
        set_buffers(fd, bytes);
    }
    Ok(())
}

/// A fixed size only where the system grants it: one cut down to the system's limit would be smaller than what it grows a
/// socket to by itself.
fn set_buffers(fd: &OwnedFd, bytes: usize) {
    let granted = |name| {
        let text = std::fs::read_to_string(format!("/proc/sys/net/core/{name}")).unwrap_or_default();
        text.trim().parse::<usize>().is_ok_and(|most| most >= bytes)
    };
    if sockopt::set_socket_recv_buffer_size_force(fd, bytes).is_err() && granted("rmem_max") {
        let _ = sockopt::set_socket_recv_buffer_size(fd, bytes);
    }
    if sockopt::set_socket_send_buffer_size_force(fd, bytes).is_err() && granted("wmem_max") {
        let _ = sockopt::set_socket_send_buffer_size(fd, bytes);
    }
}

/// Within one host nothing is lost and nothing has to be paced: a congestion control that models a path (BBR) only
/// costs there. Refused where the module is missing, which changes nothing.
fn suit_path(fd: &OwnedFd) {
    let ends = (
        rustix::net::getsockname(fd).ok().and_then(|a| SocketAddr::try_from(a).ok()),
        rustix::net::getpeername(fd).ok().flatten().and_then(|a| SocketAddr::try_from(a).ok()),
    );
    if let (Some(ours), Some(theirs)) = ends
        && ours.ip().to_canonical() == theirs.ip().to_canonical()
        && sockopt::set_tcp_congestion(fd, "cubic").is_err()
    {
        let _ = sockopt::set_tcp_congestion(fd, "reno");
    }
}

/// What an accepted connection did not inherit.
pub(super) fn prepare_accepted(fd: &OwnedFd, options: &TcpOptions) {
    let _ = sockopt::set_tcp_nodelay(fd, true);
    if options.local_congestion {
        suit_path(fd);
    }
}

/// Addresses of a host. A name is looked up on a thread of its own, since the system's resolver has no deadline.
fn resolve(host: &str, port: u16, until: Instant) -> io::Result<Vec<SocketAddr>> {
    let bare = host.strip_prefix('[').and_then(|h| h.strip_suffix(']')).unwrap_or(host);
    if let Ok(ip) = bare.parse::<IpAddr>() {
        return Ok(vec![SocketAddr::new(ip, port)]);
    }
    let (answer, answered) = std::sync::mpsc::channel();
    let name = bare.to_owned();
    std::thread::Builder::new().name("tcp-resolve".into()).spawn(move || {
        let found = (name.as_str(), port).to_socket_addrs().map(|found| found.take(ADDRESSES).collect());
        // Nobody may be waiting any more.
        let _ = answer.send(found);
    })?;
    match answered.recv_timeout(until.saturating_duration_since(Instant::now())) {
        Ok(found) => found,
        Err(_) => Err(io::Error::new(io::ErrorKind::TimedOut, "the look-up of the name did not end in time")),
    }
}

/// Connects to the first address of `host` that answers.
pub(super) fn connect(host: &str, port: u16, options: &TcpOptions, until: Instant) -> io::Result<OwnedFd> {
    let addresses = resolve(host, port, until)?;
    let mut last = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
    let count = addresses.len() as u32;
    for (index, address) in addresses.into_iter().enumerate() {
        // The last one may use all that is left; each before it an equal share.
        let left = until.saturating_duration_since(Instant::now());
        let share = left / (count - index as u32);
        match connect_to(address, options, Instant::now() + share) {
            Ok(fd) => return Ok(fd),
            Err(e) => last = io::Error::new(e.kind(), format!("{address}: {e}")),
        }
    }
    Err(last)
}

fn connect_to(to: SocketAddr, options: &TcpOptions, until: Instant) -> io::Result<OwnedFd> {
    let fd = open(to)?;
    prepare(&fd, options)?;
    sockopt::set_tcp_user_timeout(&fd, options.progress_timeout.as_millis().clamp(1, 1 << 31) as u32)?;
    match rustix::net::connect(&fd, &to) {
        Ok(()) => {}
        Err(rustix::io::Errno::INPROGRESS | rustix::io::Errno::INTR) => wait_connected(&fd, until)?,
        Err(e) => return Err(e.into()),
    }
    if options.local_congestion {
        suit_path(&fd);
    }
    Ok(fd)
}

fn wait_connected(fd: &OwnedFd, until: Instant) -> io::Result<()> {
    loop {
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::Error::new(io::ErrorKind::TimedOut, "no answer to the connection request"));
        }
        let timeout = Timespec { tv_sec: left.as_secs() as i64, tv_nsec: i64::from(left.subsec_nanos()) };
        let mut fds = [PollFd::from_borrowed_fd(fd.as_fd(), PollFlags::OUT)];
        match poll(&mut fds, Some(&timeout)) {
            Ok(0) | Err(rustix::io::Errno::INTR) => {}
            Ok(_) => return Ok(sockopt::socket_error(fd)??),
            Err(e) => return Err(e.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_are_all_tried_once_outside_the_ephemeral_range() {
        let mut ports = candidates(Ports::Range(15_000, 15_010));
        ports.sort_unstable();
        assert_eq!(ports, (15_000..=15_010).collect::<Vec<_>>());
        assert_eq!(candidates(Ports::Fixed(0)), [0]);
        if let Some((low, high)) = ephemeral().filter(|(low, high)| *low > 1000 && high > low) {
            assert!(candidates(Ports::Range(low - 2, low + 1)).iter().all(|p| *p < low), "{low} {high}");
            assert_eq!(candidates(Ports::Range(low, low + 1)).len(), 2);
        }
    }

    #[test]
    fn a_port_in_use_is_said_and_another_one_taken() {
        let options = TcpOptions { ports: Ports::Fixed(0), ..TcpOptions::default() };
        let (_first, port) = listen(&options).unwrap();
        let again = listen(&TcpOptions { ports: Ports::Fixed(port), ..options.clone() }).unwrap_err();
        assert_eq!(again.kind(), io::ErrorKind::AddrInUse);
        assert!(again.to_string().contains(&port.to_string()), "{again}");
        let reversed = listen(&TcpOptions { ports: Ports::Range(2, 1), ..options }).unwrap_err();
        assert_eq!(reversed.kind(), io::ErrorKind::InvalidInput);
    }
}
