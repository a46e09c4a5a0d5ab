//! The metadata store: is it there, is it what it should be, can others use it, and what does it have under our name.

use std::io::{Read as _, Write as _};
use std::net::{IpAddr, TcpStream};
use std::time::{Duration, Instant, SystemTime};

use moonrail::config::Resolved;
use moonrail_control::metadata::http::HttpStore;
use moonrail_control::metadata::{Catalogue, KeySpace, MetadataUri, RpcMeta, StoreError, StoreOptions, StoreUri};
use moonrail_control::names::{HostPort, host_addresses};

use super::finding::Finding;
use super::own;
use crate::segments::probe::{self, Life};

/// For each endpoint.
const PATIENCE: Duration = Duration::from_secs(2);
/// Clocks of one cluster should not be further apart.
const SKEW: Duration = Duration::from_secs(2);

/// Every check of the store; a clear word when there is none.
pub fn all(resolved: &Resolved, env: &dyn Fn(&str) -> Option<String>) -> Vec<Finding> {
    const CHECK: &str = "metadata";
    let uri = match &resolved.metadata {
        Err(e) => return vec![Finding::told(CHECK, e)],
        Ok(MetadataUri::PeerToPeer) => {
            return vec![Finding::pass(CHECK, "P2PHANDSHAKE: no server, each node is asked itself")];
        }
        Ok(MetadataUri::Store(uri)) => uri,
    };
    let places = places(uri);
    let mut found: Vec<Finding> = std::thread::scope(|scope| {
        let asked: Vec<_> = places.iter().map(|place| scope.spawn(|| endpoint(place))).collect();
        asked.into_iter().filter_map(|thread| thread.join().ok()).collect()
    });
    let works = found.iter().any(|finding| finding.verdict < super::finding::Verdict::Fail);
    if works {
        // One of several may be away.
        for finding in &mut found {
            if finding.verdict == super::finding::Verdict::Fail {
                finding.verdict = super::finding::Verdict::Warn;
            }
        }
    }
    found.extend(places.iter().filter_map(|place| loopback(place, resolved)));
    found.push(proxy(&places, env));
    if works {
        found.push(clock(&places));
        found.push(registration(uri, resolved));
    }
    found
}

/// One server of the store.
#[derive(Clone, PartialEq, Eq, Debug)]
struct Place {
    uri: StoreUri,
    /// As the user wrote it.
    given: String,
    at: Option<HostPort>,
    tls: bool,
}

fn places(uri: &StoreUri) -> Vec<Place> {
    let place = |uri: StoreUri, given: &str| {
        let (scheme, rest) = given.split_once("://").unwrap_or(("http", given));
        let default = if scheme == "https" { 443 } else { 80 };
        let at =
            HostPort::parse_with(rest.split('/').next().unwrap_or(rest), default).ok().map(|parsed| parsed.address);
        Place { uri, given: given.to_owned(), at, tls: scheme == "https" }
    };
    match uri {
        StoreUri::Etcd(endpoints) => endpoints.iter().map(|e| place(StoreUri::Etcd(vec![e.clone()]), e)).collect(),
        StoreUri::Http(base) => vec![place(uri.clone(), base)],
        StoreUri::Memory(_) => Vec::new(),
    }
}

/// Asks for a key that nobody has: the whole way, up to an answer with a quorum behind it.
fn endpoint(place: &Place) -> Finding {
    const CHECK: &str = "metadata server";
    let options = StoreOptions { deadline: PATIENCE, ..StoreOptions::default() };
    let began = Instant::now();
    let asked = match &place.uri {
        StoreUri::Http(base) => return kept(base, &options, began).about(&place.given),
        uri => Catalogue::open(uri, &options).and_then(|store| store.get("mooncake/moonrail-doctor")),
    };
    let finding = match asked {
        Ok(_) => Finding::pass(CHECK, format!("answers in {:.1} ms", began.elapsed().as_secs_f64() * 1e3)),
        Err(e) => Finding::told(CHECK, &e),
    };
    finding.about(&place.given)
}

/// Any web server says 404 of a key that nobody has. One that keeps keys gives back what was put, and loses what is deleted.
fn kept(base: &str, options: &StoreOptions, began: Instant) -> Finding {
    const CHECK: &str = "metadata server";
    const NEXT: &str =
        "the URL of a Mooncake HTTP metadata server ends in /metadata: python -m mooncake.http_metadata_server";
    let key = format!("mooncake/moonrail-doctor-{}", std::process::id());
    let value = br#"{"moonrail":"doctor"}"#;
    let round = HttpStore::new(base, options).and_then(|store| {
        store.put(&key, value)?;
        let read = store.get(&key);
        let deleted = store.delete(&key)?;
        Ok((read?, deleted))
    });
    match round {
        Ok((Some(read), true))
            if serde_json::from_slice::<serde_json::Value>(&read).is_ok_and(|v| v["moonrail"] == "doctor") =>
        {
            Finding::pass(
                CHECK,
                format!("keeps a key, {:.1} ms for three requests", began.elapsed().as_secs_f64() * 1e3),
            )
        }
        Ok((read, _)) => {
            let got = if read.is_some() { "gives something else back" } else { "does not know it a moment later" };
            Finding::fail(CHECK, format!("takes a key, and {got}: it is some other web server"), NEXT)
        }
        Err(e @ StoreError::HttpStatus { .. }) => Finding::fail(CHECK, e.to_string(), NEXT),
        Err(e) => Finding::told(CHECK, &e),
    }
}

/// A store on loopback is for one host.
fn loopback(place: &Place, resolved: &Resolved) -> Option<Finding> {
    const CHECK: &str = "metadata address";
    let at = place.at.as_ref()?;
    let addresses = at.ip().map_or_else(|| own::lookup(&at.host).unwrap_or_default(), |ip| vec![ip]);
    if addresses.is_empty() || !addresses.iter().all(IpAddr::is_loopback) {
        return None;
    }
    let named = resolved.publish_host.as_deref().unwrap_or(&resolved.name);
    let published = resolved.published().ok().map_or_else(|| named.to_owned(), |published| published.host);
    if (HostPort { host: published, port: 0 }).ip().is_some_and(|ip| ip.is_loopback()) {
        return Some(Finding::pass(CHECK, "loopback, as our own address: a cluster of this host alone"));
    }
    let others = host_addresses().iter().map(IpAddr::to_string).collect::<Vec<_>>().join(", ");
    let finding = Finding::warn(
        CHECK,
        format!("{at} is loopback: nodes on other hosts cannot give it, and would not meet us there"),
        format!("etcd --listen-client-urls http://0.0.0.0:2379, and name an address of this host here ({others})"),
    );
    Some(finding.about(&place.given))
}

/// Our clients use no proxy, a stock node's do.
fn proxy(places: &[Place], env: &dyn Fn(&str) -> Option<String>) -> Finding {
    const CHECK: &str = "proxy";
    let set = ["http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"]
        .into_iter()
        .find_map(|name| env(name).filter(|value| !value.is_empty()).map(|value| (name, value)));
    let Some((name, value)) = set else { return Finding::pass(CHECK, "none is set") };
    let exempt = env("no_proxy").or_else(|| env("NO_PROXY")).unwrap_or_default();
    let hosts: Vec<&str> = places.iter().filter_map(|place| Some(place.at.as_ref()?.host.as_str())).collect();
    let hidden: Vec<&str> = hosts.into_iter().filter(|host| !is_exempt(host, &exempt)).collect();
    if hidden.is_empty() {
        return Finding::pass(CHECK, format!("{name} is set, and no_proxy has the metadata server"));
    }
    Finding::warn(
        CHECK,
        format!(
            "{name}={value}: a stock node started like this asks the proxy for {}; moonrail uses none",
            hidden.join(", ")
        ),
        format!("unset {name}, or export no_proxy={}", hidden.join(",")),
    )
}

/// `*`, the host itself, or a suffix at a dot.
fn is_exempt(host: &str, exempt: &str) -> bool {
    exempt
        .split(',')
        .map(|item| item.trim().trim_start_matches('.'))
        .filter(|item| !item.is_empty())
        .any(|item| item == "*" || item == host || host.strip_suffix(item).is_some_and(|rest| rest.ends_with('.')))
}

/// How far our clock is from the server's, by the `Date` of its answer. Nothing of moonrail's compares clocks of two
/// hosts, but whoever reads logs of several does.
fn clock(places: &[Place]) -> Finding {
    const CHECK: &str = "clock";
    let Some(theirs) = places.iter().filter(|place| !place.tls).find_map(date) else {
        return Finding::skip(CHECK, "the metadata server does not say what time it is");
    };
    let now = SystemTime::now();
    let apart = now.duration_since(theirs).unwrap_or_else(|e| e.duration());
    // The header has whole seconds.
    if apart > SKEW + Duration::from_secs(1) {
        return Finding::warn(
            CHECK,
            format!("{} s from the metadata server's: logs of the two do not fit together", apart.as_secs()),
            "timedatectl set-ntp true, or chronyc tracking on both hosts",
        );
    }
    Finding::pass(CHECK, "within 2 s of the metadata server's")
}

fn date(place: &Place) -> Option<SystemTime> {
    let at = place.at.as_ref()?;
    let ip = at.ip().or_else(|| own::lookup(&at.host).ok()?.first().copied())?;
    let mut stream = TcpStream::connect_timeout(&(ip, at.port).into(), PATIENCE).ok()?;
    stream.set_read_timeout(Some(PATIENCE)).ok()?;
    write!(stream, "GET /version HTTP/1.0\r\nHost: {at}\r\n\r\n").ok()?;
    let mut answer = Vec::new();
    // What came before an error or the time limit is looked at all the same.
    let _ = stream.take(4096).read_to_end(&mut answer);
    let text = String::from_utf8_lossy(&answer).into_owned();
    let line = text.lines().find(|line| line.to_ascii_lowercase().starts_with("date:"))?;
    httpdate::parse_http_date(line["date:".len()..].trim()).ok()
}

/// What the store has under our own name.
fn registration(uri: &StoreUri, resolved: &Resolved) -> Finding {
    const CHECK: &str = "registration";
    let options = StoreOptions { deadline: PATIENCE, ..StoreOptions::default() };
    let key = KeySpace::new(&resolved.cluster_id).rpc_meta(&resolved.name);
    let held = match Catalogue::open(uri, &options).and_then(|store| store.get(&key)) {
        Ok(Some(held)) => held,
        Ok(None) => return Finding::pass(CHECK, format!("nothing is registered as {}", resolved.name)),
        Err(e) => return Finding::told(CHECK, &e),
    };
    let meta = match RpcMeta::decode(&held.value) {
        Ok(meta) => meta,
        Err(e) => {
            return Finding::fail(
                CHECK,
                format!("{key} cannot be read: {e}"),
                "delete it: moonrail segments prune, or etcdctl del",
            );
        }
    };
    let place = HostPort { host: meta.ip_or_host_name.clone(), port: meta.rpc_port };
    let name = &resolved.name;
    let ours = place.ip().is_some_and(|ip| host_addresses().contains(&ip) || ip.is_loopback());
    match probe::node(&meta) {
        Life::Answers if ours => Finding::warn(
            CHECK,
            format!("{name} is registered for {place}, on this host, and a process answers there"),
            "it is running already; a second node needs another name",
        ),
        Life::Answers => Finding::fail(
            CHECK,
            format!("{name} is registered for {place}, on another host, and a node answers there"),
            "choose another name, or stop that node",
        ),
        Life::Gone { why } if ours => {
            Finding::pass(CHECK, format!("left by an earlier life at {place} ({why}); it is replaced at the start"))
        }
        Life::Gone { why } => Finding::warn(
            CHECK,
            format!(
                "{name} is registered for {place}, where nobody is any more ({why}): peers that have not looked again go there"
            ),
            format!("moonrail segments prune {name} --metadata URI --yes"),
        ),
        life @ (Life::Silent { .. } | Life::Unknown { .. }) => Finding::warn(
            CHECK,
            format!("{name} is registered for {place}; {life}"),
            "if that node is gone: moonrail segments prune --silent; if not, choose another name",
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::super::finding::Verdict;
    use super::*;
    use moonrail::Engine;

    fn resolved(metadata: &str) -> Resolved {
        Engine::builder().name("127.0.0.1").metadata(metadata).environment(|_| None).resolved().unwrap()
    }

    fn of<'a>(found: &'a [Finding], check: &str) -> &'a Finding {
        found.iter().find(|finding| finding.check == check).unwrap_or_else(|| panic!("no {check}: {found:#?}"))
    }

    #[test]
    fn a_server_that_is_not_there_or_is_another() {
        let env = |name: &str| (name == "http_proxy").then(|| "http://proxy:3128".to_owned());
        let found = all(&resolved("etcd://127.0.0.1:1"), &env);
        assert_eq!(of(&found, "metadata server").verdict, Verdict::Fail);
        assert!(of(&found, "metadata server").evidence.contains("refused"), "{found:#?}");
        assert_eq!(of(&found, "proxy").verdict, Verdict::Warn);
        assert_eq!(all(&resolved("redis://h"), &env)[0].verdict, Verdict::Fail);
        assert_eq!(all(&resolved("P2PHANDSHAKE"), &env).len(), 1);
    }

    #[test]
    fn no_proxy_is_read_as_curl_reads_it() {
        for (host, exempt, is) in [
            ("10.0.0.1", "localhost, 10.0.0.1", true),
            ("a.cluster.local", ".cluster.local", true),
            ("acluster.local", "cluster.local", false),
            ("10.0.0.1", "*", true),
            ("10.0.0.1", "", false),
        ] {
            assert_eq!(is_exempt(host, exempt), is, "{host} {exempt}");
        }
    }
}
