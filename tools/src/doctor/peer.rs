//! The way to a peer, in the order in which it can break: its name, its handshake port, its segment, every rail.

use std::io;
use std::net::{IpAddr, SocketAddr, TcpStream, UdpSocket};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use moonrail::config::Resolved;
use moonrail::{Engine, EngineBuilder, Fabric, Gid, Level, PortInfo, RailInfo, Segment};
use moonrail_control::metadata::{
    Catalogue, KeySpace, MetadataUri, RpcMeta, SegmentDescriptor, StoreOptions, StoreUri,
};
use moonrail_control::names::HostPort;

use super::finding::{Finding, Verdict};
use super::neighbours;
use super::own;
use super::published::{self, Here, Place};

/// For one connection attempt.
const CONNECT: Duration = Duration::from_secs(2);
/// For a metadata request.
const LOOK: Duration = Duration::from_secs(2);
/// For every rail to come up or to say what is wrong: four attempts to send over a rail that carries nothing, and a neighbour
/// that has to be resolved.
pub const RAILS: Duration = Duration::from_secs(8);
/// For the visitor to end: nothing that it moved matters, and what still tries to connect is not waited for.
const END: Duration = Duration::from_secs(1);
/// UDP port of RoCE v2 (IBA annex 17).
const ROCE: u16 = 4791;

/// Every check of the way to `peer`, over the engine that `builder` makes.
pub fn all(peer: &str, resolved: &Resolved, builder: EngineBuilder) -> Vec<Finding> {
    let mut found = Vec::new();
    let Some(place) = step(&mut found, whereabouts(peer, resolved)) else { return found };
    let here = Here::read();
    let stored = published::of_store(&place, &here);
    // A node that is not where its address leads would only be missed below.
    let misleads = stored.iter().any(|finding| finding.verdict == Verdict::Fail);
    found.extend(stored);
    if misleads || step(&mut found, dial(&place.meta)).is_none() {
        return found;
    }
    let log = Arc::new(Mutex::new(Vec::new()));
    let sink = log.clone();
    let builder = builder.log(move |level, line| {
        if level != Level::Info {
            sink.lock().unwrap_or_else(PoisonError::into_inner).push(line.to_owned());
        }
    });
    let engine = match builder.build() {
        Ok(engine) => engine,
        Err(e) => {
            found.push(Finding::told("engine", &e));
            return found;
        }
    };
    found.extend(with(&engine, peer, &place, &here, &log));
    engine.shutdown(END);
    found
}

/// A step of the way: what it gave, and what to say of it.
pub type Step<T> = Result<(T, Finding), Finding>;

fn step<T>(found: &mut Vec<Finding>, step: Step<T>) -> Option<T> {
    match step {
        Ok((value, finding)) => {
            found.push(finding);
            Some(value)
        }
        Err(finding) => {
            found.push(finding);
            None
        }
    }
}

/// Where the peer's handshake port is.
///
/// # Errors
/// The finding.
pub fn whereabouts(peer: &str, resolved: &Resolved) -> Step<Place> {
    const CHECK: &str = "peer's name";
    let Ok(MetadataUri::Store(uri)) = &resolved.metadata else {
        let place = HostPort::parse_with(peer, resolved.handshake_port).map_err(|e| Finding::told(CHECK, &e))?;
        if let Some(warning) = place.warning {
            return Err(Finding::fail(CHECK, warning, "write HOST:PORT, as `moonrail serve` printed it"));
        }
        let HostPort { host, port } = place.address;
        let text = format!("{host}:{port}, as it was given");
        let meta = RpcMeta { ip_or_host_name: host, rpc_port: port };
        return Ok((Place { name: peer.to_owned(), meta, stored: None }, Finding::pass(CHECK, text)));
    };
    let options = StoreOptions { deadline: LOOK, ..StoreOptions::default() };
    let keys = KeySpace::new(&resolved.cluster_id);
    let told = |e| Finding::told(CHECK, &e);
    let store = Catalogue::open(uri, &options).map_err(told)?;
    let segment = store.get(&keys.segment(peer)).map_err(told)?;
    let address = store.get(&keys.rpc_meta(peer)).map_err(told)?;
    let Some(address) = address else {
        return Err(Finding::fail(
            CHECK,
            match segment {
                Some(_) => format!("the store has a segment {peer}, and no address of its node"),
                None => format!("Failed to get description of {peer}: the store has nothing under {}", keys.prefix()),
            },
            "the name must be the node's own, letter for letter (moonrail segments ls --metadata URI), the node must run, and both \
             must have the same MC_METADATA_CLUSTER_ID",
        ));
    };
    let descriptor = match segment.as_ref().map(|held| SegmentDescriptor::decode(&held.value)) {
        Some(Err(e)) => return Err(Finding::told(CHECK, &e)),
        Some(Ok(descriptor)) => Some(descriptor),
        None => None,
    };
    let meta = RpcMeta::decode(&address.value)
        .map_err(|e| Finding::fail(CHECK, format!("its address cannot be read: {e}"), "start that node again"))?;
    let lease =
        address.lease.map_or("no lease: it may be long gone".to_owned(), |left| format!("lease {} s", left.as_secs()));
    let text = format!("the store has {}:{} for {peer} ({lease})", meta.ip_or_host_name, meta.rpc_port);
    let leased = |lease: Option<Duration>| matches!(uri, StoreUri::Http(_)) || lease.is_some();
    let stored = descriptor.map(|descriptor| published::Stored {
        descriptor,
        without_lease: [Some(&address), segment.as_ref()]
            .into_iter()
            .flatten()
            .filter(|held| !leased(held.lease))
            .map(|held| held.key.clone())
            .collect(),
    });
    Ok((Place { name: peer.to_owned(), meta, stored }, Finding::pass(CHECK, text)))
}

/// A TCP connection to the handshake port: refused, reset and silence are three different faults.
///
/// # Errors
/// The finding.
pub fn dial(meta: &RpcMeta) -> Step<()> {
    connect("peer's handshake port", meta)
}

/// The same for any port of a peer.
///
/// # Errors
/// The finding.
pub fn connect(check: &'static str, meta: &RpcMeta) -> Step<()> {
    let RpcMeta { ip_or_host_name: host, rpc_port: port } = meta;
    let addresses = match (HostPort { host: host.clone(), port: *port }).ip() {
        Some(ip) => vec![ip],
        None => own::lookup(host).map_err(|why| {
            Finding::fail(
                check,
                format!("host {host}: {why}"),
                "add it to DNS or /etc/hosts here, or name the node by its address",
            )
        })?,
    };
    let mut last = Finding::fail(check, format!("{host} has no address"), "mend DNS or /etc/hosts");
    for ip in addresses {
        let at = SocketAddr::new(ip, *port);
        let began = Instant::now();
        last = match TcpStream::connect_timeout(&at, CONNECT) {
            Ok(_) => {
                let text = format!("{at} accepts connections, {:.1} ms", began.elapsed().as_secs_f64() * 1e3);
                return Ok(((), Finding::pass(check, text)));
            }
            Err(e) => refused(check, at, &e),
        };
    }
    Err(last)
}

fn refused(check: &'static str, at: SocketAddr, error: &io::Error) -> Finding {
    match error.kind() {
        io::ErrorKind::ConnectionRefused => Finding::fail(
            check,
            format!("{at} refuses connections: the host is there, and no process has that port"),
            "is the node running, and is this its port (ss -ltnp there)? A firewall that rejects looks the same",
        ),
        io::ErrorKind::ConnectionReset => Finding::fail(
            check,
            format!("{at} resets connections: a firewall or proxy between"),
            "let the port through on the way",
        ),
        io::ErrorKind::TimedOut => Finding::fail(
            check,
            format!(
                "{at} does not answer within {CONNECT:?}: a firewall that drops, a host that is down, or a wrong address"
            ),
            format!("ping {}; nft list ruleset on both hosts", at.ip()),
        ),
        _ => Finding::fail(check, format!("{at}: {error}"), format!("ip route get {}", at.ip())),
    }
}

fn with(engine: &Engine, peer: &str, place: &Place, here: &Here, log: &Mutex<Vec<String>>) -> Vec<Finding> {
    let mut found = Vec::new();
    let began = Instant::now();
    let segment = match engine.open_segment(peer) {
        Ok(segment) => segment,
        Err(e) => return vec![Finding::told("peer's segment", &e)],
    };
    let descriptor = match SegmentDescriptor::decode(segment.published().as_bytes()) {
        Ok(descriptor) => descriptor,
        Err(e) => return vec![Finding::told("peer's segment", &e)],
    };
    if place.stored.is_none() {
        found.extend(published::of_itself(place, &descriptor, here));
    }
    found.push(published::memory(&descriptor));
    let nics: Vec<(String, PortInfo)> =
        engine.nics().into_iter().filter_map(|nic| Some((nic.name, nic.port?))).collect();
    found.extend(published::nics(&descriptor, &nics, here));
    let name = segment.name().to_owned();
    let until = began + RAILS;
    let rails = settled(engine, &name, until);
    let ways = engine.ways(&name);
    let reached =
        ways.iter().any(|way| way.fabric.is_some()) && (rails.is_empty() || rails.iter().any(|rail| rail.usable));
    found.extend(published::data_port(&descriptor, &place.meta).map(|finding| softened(finding, reached)));
    found.extend(routes(engine, &segment));
    let addresses: Vec<(String, IpAddr)> =
        segment.nic_gids().into_iter().map(|(nic, gid)| (nic, canonical(gid))).collect();
    found.extend(neighbours::confused(&addresses, Path::new("/proc")).into_iter().map(|f| softened(f, reached)));
    let log = log.lock().unwrap_or_else(PoisonError::into_inner);
    let rails: Vec<(RailInfo, String)> = rails
        .into_iter()
        .map(|rail| {
            let known = evidence(&rail, &log);
            (rail, known)
        })
        .collect();
    found.extend(ports(&rails).into_iter().map(|finding| softened(finding, reached)));
    for way in ways {
        found.push(match way.fabric {
            Some(fabric) => Finding::pass("way", format!("over {fabric}: {}", way.why)),
            None => Finding::fail("way", way.why, "see the rails below"),
        });
    }
    let working = rails.iter().filter(|(rail, _)| rail.usable).count();
    found.extend(rails.iter().map(|(rail, evidence)| judge(rail, evidence, working)));
    if rails.is_empty() {
        found.push(Finding::skip("rail", "there is none: what carries the bytes needs no connection, or nothing can"));
    }
    found
}

/// With another way that works nothing is lost but speed.
fn softened(finding: Finding, works: bool) -> Finding {
    let most = if works { Verdict::Warn } else { Verdict::Fail };
    Finding { verdict: finding.verdict.min(most), ..finding }
}

/// What is known of a rail that does not work. The engine has told what it saw first; what it says of the rail now may be what
/// followed from it.
fn evidence(rail: &RailInfo, log: &[String]) -> String {
    let first = log.iter().find(|line| line.contains(&rail.peer_nic) && line.contains(&rail.nic));
    first.map_or_else(|| rail.state.clone(), |line| format!("{}; {line}", rail.state))
}

/// The port of each NIC of the peer, as its own answers tell: a node whose port is down makes no queue pairs on it.
fn ports(rails: &[(RailInfo, String)]) -> Vec<Finding> {
    const CHECK: &str = "peer's port";
    let mut nics: Vec<&str> =
        rails.iter().filter(|(rail, _)| rail.fabric == Fabric::Rdma).map(|(rail, _)| rail.peer_nic.as_str()).collect();
    nics.sort_unstable();
    nics.dedup();
    let of = |nic: &str| {
        let all: Vec<_> =
            rails.iter().filter(|(rail, _)| rail.fabric == Fabric::Rdma && rail.peer_nic == nic).collect();
        if let Some((rail, _)) = all.iter().find(|(rail, _)| rail.usable) {
            return Some(Finding::pass(CHECK, format!("carries bytes from {}", rail.nic)).about(nic));
        }
        let refused = all.iter().find(|(_, evidence)| evidence.to_lowercase().contains("endpoint unavailable for"));
        refused.map(|(_, evidence)| {
            Finding::fail(
                CHECK,
                format!("the peer makes no queue pairs on it: its port is down, or the device has no more to give; {evidence}"),
                "there: moonrail nics (port state, max_qp), ip link set NETDEV up, cable and switch port",
            )
            .about(nic)
        })
    };
    nics.into_iter().filter_map(of).collect()
}

/// The rails to a peer, once all of them carry bytes or the time is over: one that has failed goes on trying, so it is given
/// all of it.
pub fn settled(engine: &Engine, peer: &str, until: Instant) -> Vec<RailInfo> {
    loop {
        let rails: Vec<RailInfo> = engine.rails().into_iter().filter(|rail| rail.peer == peer).collect();
        let all = !rails.is_empty() && rails.iter().all(|rail| rail.usable);
        if all || Instant::now() >= until {
            return rails;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// What there is to say of a rail, when so many rails of its peer work.
fn judge(rail: &RailInfo, evidence: &str, working: usize) -> Finding {
    const CHECK: &str = "rail";
    let subject = format!("{} to {}", rail.nic, rail.peer_nic);
    let mtu = rail.path_mtu.map(|mtu| format!(", path MTU {mtu}")).unwrap_or_default();
    if rail.usable {
        return Finding::pass(CHECK, format!("up over {}, {} queue pairs{mtu}", rail.fabric, rail.qps)).about(subject);
    }
    let low = evidence.to_lowercase();
    let next = if low.contains("retry") || low.contains("stalled") {
        format!(
            "the handshake worked and packets of the NICs do not arrive: a firewall on UDP port {ROCE} (nft list ruleset), a wrong \
             GID on one side (moonrail nics), two networks without a route between them, or an MTU that does not fit"
        )
    } else if low.contains("rtr") {
        "the two NICs cannot address each other: moonrail nics on both sides, ping between the two GIDs".to_owned()
    } else {
        "moonrail nics on both sides".to_owned()
    };
    softened(Finding::fail(CHECK, evidence, next).about(subject), working > 0)
}

/// A route from each of our RoCE v2 GIDs to each of the peer's: by the routing table alone, nothing is sent.
fn routes(engine: &Engine, peer: &Segment) -> Vec<Finding> {
    const CHECK: &str = "route";
    let gids: Vec<(String, IpAddr)> = engine
        .nics()
        .into_iter()
        .filter(|nic| nic.fabric == Fabric::Rdma)
        .filter_map(|nic| Some((nic.name, canonical(nic.port?.gid))))
        .collect();
    let mut found = Vec::new();
    for (nic, theirs) in peer.nic_gids() {
        let theirs = canonical(theirs);
        for (ours, from) in gids.iter().filter(|(_, from)| from.is_ipv4() == theirs.is_ipv4()) {
            let subject = format!("{ours} to {nic}");
            let routed = UdpSocket::bind((*from, 0)).and_then(|socket| socket.connect((theirs, ROCE)));
            found.push(match routed {
                Ok(()) => Finding::pass(CHECK, format!("{from} to {theirs}")).about(subject),
                Err(e) => Finding::warn(
                    CHECK,
                    format!("{from} to {theirs}: {e}"),
                    format!("ip route get {theirs} from {from}"),
                )
                .about(subject),
            });
        }
    }
    found
}

/// The address that a RoCE v2 GID is.
pub fn canonical(gid: Gid) -> IpAddr {
    IpAddr::from(gid.to_ipv6()).to_canonical()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_way_to_fail_has_its_own_words() {
        let at: SocketAddr = "10.0.0.1:9".parse().unwrap();
        for (kind, word) in [
            (io::ErrorKind::ConnectionRefused, "no process"),
            (io::ErrorKind::ConnectionReset, "proxy"),
            (io::ErrorKind::TimedOut, "drops"),
            (io::ErrorKind::HostUnreachable, "10.0.0.1:9"),
        ] {
            let found = refused("x", at, &kind.into());
            assert!(found.verdict == Verdict::Fail && found.evidence.contains(word), "{found:?}");
        }
    }

    #[test]
    fn a_rail_that_carries_nothing_beside_one_that_works_is_a_warning() {
        let rail = RailInfo {
            nic: "rxe0".into(),
            peer: "p".into(),
            peer_nic: "rxe1".into(),
            fabric: Fabric::Rdma,
            state: "waiting: transport retry counter exceeded".into(),
            usable: false,
            core: 0,
            qps: 0,
            path_mtu: None,
            lives: 2,
            moonrail: true,
            bytes: 0,
            slices: 0,
            in_flight_slices: 0,
            in_flight_bytes: 0,
            cap_bytes: 0,
            round_trip: None,
            returned: 0,
            first_errors: 2,
            flushes: 0,
            queue_time: moonrail::Spread::default(),
            wire_time: moonrail::Spread::default(),
            evictions: 0,
        };
        let known = evidence(&rail, &[]);
        let found = judge(&rail, &known, 1);
        assert!(found.verdict == Verdict::Warn && found.next.unwrap().contains("4791"));
        assert_eq!(judge(&rail, &known, 0).verdict, Verdict::Fail);
        let up = RailInfo { usable: true, ..rail.clone() };
        assert_eq!(judge(&up, "", 1).verdict, Verdict::Pass);
        // Its port: nothing is said where only packets are lost; refused it is down; carrying bytes it is not.
        assert_eq!(ports(&[(rail.clone(), known)]), []);
        let refused = "Handshake rejected by p: Local RDMA endpoint unavailable for rxe1 <- q@rxe0".to_owned();
        let down = ports(&[(rail.clone(), refused.clone())]);
        assert!(down[0].verdict == Verdict::Fail && down[0].subject.as_deref() == Some("rxe1"), "{down:?}");
        assert_eq!(ports(&[(rail, refused), (up, String::new())])[0].verdict, Verdict::Pass);
    }
}
