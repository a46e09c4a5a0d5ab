//! This node as its peers will see it: name, address, port.

use std::net::{IpAddr, ToSocketAddrs};
use std::sync::mpsc;
use std::time::Duration;

use moonrail::config::Resolved;
use moonrail_control::names::{self, Family, HostPort};

use super::finding::Finding;

/// For the resolver.
const LOOKUP: Duration = Duration::from_secs(2);

/// The address that peers are told.
pub fn address(resolved: &Resolved) -> Finding {
    const CHECK: &str = "address";
    if resolved.metadata.is_err() {
        return Finding::skip(CHECK, "it depends on the metadata server, whose name cannot be read");
    }
    match resolved.published() {
        Ok(published) => match published.warning {
            Some(warning) => Finding::warn(CHECK, warning.to_string(), "fine if every node runs on this host"),
            None => match (HostPort { host: published.host.clone(), port: 0 }).ip() {
                Some(ip) => Finding::pass(CHECK, format!("peers are told {ip}, an address of this host")),
                None => host_name(&published.host),
            },
        },
        Err(e) => Finding::told(CHECK, &e),
    }
}

/// A name is published: each peer looks it up itself. That it leads to us is seen here only as far as this host knows.
fn host_name(host: &str) -> Finding {
    const CHECK: &str = "address";
    let addresses = match lookup(host) {
        Ok(addresses) => addresses,
        Err(why) => {
            return Finding::fail(
                CHECK,
                format!("peers are told the name {host}, which has no address on this host: {why}"),
                "give an address (--name), or add the name to DNS or to /etc/hosts of every node",
            );
        }
    };
    let own = |ip: &IpAddr| names::own_address(*ip);
    let listed = addresses.iter().map(IpAddr::to_string).collect::<Vec<_>>().join(", ");
    if addresses.iter().all(|ip| own(ip) == names::OwnAddress::Loopback) {
        let others = names::host_addresses().iter().map(IpAddr::to_string).collect::<Vec<_>>().join(", ");
        return Finding::fail(
            CHECK,
            format!(
                "peers are told the name {host}, which is {listed} on this host: who resolves it so reaches himself"
            ),
            format!("give an address of this host (--name; it has {others}), or mend the line of {host} in /etc/hosts"),
        );
    }
    if addresses.iter().all(|ip| own(ip) == names::OwnAddress::Foreign) {
        return Finding::fail(
            CHECK,
            format!("peers are told the name {host}, which is {listed}: no address of this host"),
            "mend DNS or /etc/hosts, or give an address of this host (--name)",
        );
    }
    Finding::pass(CHECK, format!("peers are told the name {host}, here {listed}; each looks it up itself"))
}

/// The addresses of a name, asked for on a thread that is left behind when the resolver does not answer.
pub fn lookup(host: &str) -> Result<Vec<IpAddr>, String> {
    let (tell, hear) = mpsc::channel();
    let asked = host.to_owned();
    std::thread::spawn(move || {
        let found = (asked.as_str(), 0).to_socket_addrs().map(|all| all.map(|a| a.ip()).collect::<Vec<_>>());
        let _ = tell.send(found);
    });
    match hear.recv_timeout(LOOKUP) {
        Ok(Ok(addresses)) if addresses.is_empty() => Err("no address".to_owned()),
        Ok(Ok(addresses)) => Ok(addresses),
        Ok(Err(e)) => Err(e.to_string()),
        Err(_) => Err(format!("no answer from the resolver within {LOOKUP:?}")),
    }
}

/// The handshake port can be had.
pub fn port(resolved: &Resolved) -> Finding {
    const CHECK: &str = "handshake port";
    let family = if resolved.ipv6 { Family::V6 } else { Family::V4 };
    let (first, last) = resolved.rpc_ports;
    let bound = match resolved.fixed_port {
        Some(port) => names::listen_on(port, family),
        None => names::listen_in(first..=last, family, u64::from(std::process::id())),
    };
    match (bound, resolved.fixed_port) {
        (Ok(_), Some(port)) => Finding::pass(CHECK, format!("{port} is free")),
        (Ok(_), None) => Finding::pass(
            CHECK,
            format!("one of {first} to {last} is drawn; let them through firewalls, or fix one with --port"),
        ),
        (Err(e), _) => Finding::told(CHECK, &e),
    }
}

/// What the environment says that cannot be.
pub fn environment(resolved: &Resolved) -> Finding {
    const CHECK: &str = "environment";
    if resolved.warnings.is_empty() {
        return Finding::pass(CHECK, "every MC_* variable that is set can be read");
    }
    Finding::warn(CHECK, resolved.warnings.join("; "), "docs/configuration.md has the values of each variable")
}

#[cfg(test)]
mod tests {
    use super::super::finding::Verdict;
    use super::*;
    use moonrail::Engine;

    fn resolved(name: &str, fixed: bool) -> Resolved {
        Engine::builder().name(name).rpc_port_from_name(fixed).environment(|_| None).resolved().unwrap()
    }

    #[test]
    fn an_address_that_leads_elsewhere_is_found() {
        assert_eq!(address(&resolved("192.0.2.77", false)).verdict, Verdict::Fail);
        let loopback = address(&resolved("127.0.0.1", false));
        assert!(loopback.verdict == Verdict::Warn && loopback.evidence.contains("loopback"), "{loopback:?}");
        let by_name = address(&resolved("localhost", false));
        assert!(by_name.verdict == Verdict::Fail && by_name.evidence.contains("reaches himself"), "{by_name:?}");
        let nowhere = address(&resolved("no-such-host.invalid", false));
        assert!(nowhere.verdict == Verdict::Fail && nowhere.next.is_some(), "{nowhere:?}");
    }

    #[test]
    fn a_port_that_somebody_has_is_found() {
        let taken = std::net::TcpListener::bind("0.0.0.0:0").unwrap();
        let number = taken.local_addr().unwrap().port();
        let found = port(&resolved(&format!("127.0.0.1:{number}"), true));
        assert!(found.verdict == Verdict::Fail && found.evidence.contains(&number.to_string()), "{found:?}");
        drop(taken);
        assert_eq!(port(&resolved(&format!("127.0.0.1:{number}"), true)).verdict, Verdict::Pass);
    }
}
