//! The page for Prometheus: read by a real HTTP client, held against the text format's grammar and the engine's own figures.
#![allow(clippy::float_cmp)] // they are whole numbers

mod pair;

use std::collections::{BTreeMap, BTreeSet};
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

use moonrail::{Engine, Transfer};
use moonrail_datapath::nic::sim::SimOptions;

const ANY: &str = "127.0.0.1:0";

fn paged() -> pair::Pair {
    pair::pair_with(2, 1, SimOptions::default(), |builder| builder.metrics_http(ANY.parse().unwrap()))
}

fn address(engine: &Engine) -> SocketAddr {
    engine.metrics_addr().expect("it was asked for")
}

fn get(addr: SocketAddr) -> String {
    let agent: ureq::Agent = ureq::Agent::config_builder().timeout_global(Some(pair::LONG)).proxy(None).build().into();
    let mut response = agent.get(format!("http://{addr}/metrics")).call().unwrap();
    assert_eq!(response.status(), 200);
    assert_eq!(response.headers()["content-type"], "text/plain; version=0.0.4; charset=utf-8");
    response.body_mut().read_to_string().unwrap()
}

fn say(addr: SocketAddr, bytes: &[u8]) -> String {
    let mut stream = TcpStream::connect(addr).unwrap();
    stream.set_read_timeout(Some(pair::LONG)).unwrap();
    let _ = stream.write_all(bytes);
    let mut reply = String::new();
    stream.read_to_string(&mut reply).unwrap();
    reply
}

/// A page taken apart, or what is wrong with it: the format is at
/// <https://prometheus.io/docs/instrumenting/exposition_formats/>, names and units at <https://prometheus.io/docs/practices/naming/>.
fn parse(page: &str) -> Result<BTreeMap<String, f64>, String> {
    let mut series = BTreeMap::new();
    let mut kinds: BTreeMap<String, String> = BTreeMap::new();
    let (mut described, mut current) = (BTreeSet::new(), String::new());
    if !page.ends_with('\n') {
        return Err("the last line does not end".into());
    }
    for line in page.lines() {
        let wrong = |what: &str| Err(format!("{what}: {line}"));
        if let Some(rest) = line.strip_prefix("# HELP ") {
            let Some((name, help)) = rest.split_once(' ') else { return wrong("no help") };
            if !is_name(name) || help.is_empty() || help.replace("\\\\", "").replace("\\n", "").contains('\\') {
                return wrong("HELP");
            }
            if !described.insert(name.to_owned()) {
                return wrong("described twice, or its lines do not stand together");
            }
            name.clone_into(&mut current);
        } else if let Some(rest) = line.strip_prefix("# TYPE ") {
            let Some((name, kind)) = rest.split_once(' ') else { return wrong("no type") };
            if name != current
                || !matches!(kind, "counter" | "gauge" | "histogram")
                || (kind == "counter") != name.ends_with("_total")
            {
                return wrong("TYPE");
            }
            kinds.insert(name.to_owned(), kind.to_owned());
        } else {
            let Some((name, value)) = line.rsplit_once(' ') else { return wrong("no value") };
            let bare = name.split('{').next().unwrap_or_default();
            let of_histogram = ["_bucket", "_sum", "_count"].iter().find_map(|end| bare.strip_suffix(end));
            let family =
                of_histogram.filter(|family| kinds.get(*family).is_some_and(|k| k == "histogram")).unwrap_or(bare);
            if family != current || !kinds.contains_key(family) {
                return wrong("a value under another name, or without a type");
            }
            if !is_name(bare) || !labels_are_well_formed(&name[bare.len()..]) {
                return wrong("name or labels");
            }
            let Ok(value) = value.parse::<f64>() else { return wrong("no number") };
            if series.insert(name.to_owned(), value).is_some() {
                return wrong("twice");
            }
        }
    }
    for family in kinds.iter().filter(|(_, kind)| *kind == "histogram").map(|(name, _)| name) {
        histogram_is_whole(family, &series)?;
    }
    Ok(series)
}

fn is_name(name: &str) -> bool {
    let first = name.bytes().next().is_some_and(|b| b.is_ascii_alphabetic() || b == b'_' || b == b':');
    first && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_' || b == b':')
}

/// `` or `{name="value",…}` with the three escapes there are.
fn labels_are_well_formed(text: &str) -> bool {
    if text.is_empty() {
        return true;
    }
    let Some(mut rest) = text.strip_prefix('{').and_then(|rest| rest.strip_suffix('}')) else { return false };
    let mut names = BTreeSet::new();
    loop {
        let Some((name, quoted)) = rest.split_once("=\"") else { return false };
        if !is_name(name) || name.contains(':') || !names.insert(name) {
            return false;
        }
        let mut escaped = false;
        let end = quoted.char_indices().find_map(|(at, c)| match (escaped, c) {
            (false, '"') => Some(Ok(at)),
            (true, '\\' | '"' | 'n') | (false, _) => {
                escaped = !escaped && c == '\\';
                None
            }
            (true, _) => Some(Err(())),
        });
        let Some(Ok(end)) = end else { return false };
        match &quoted[end + 1..] {
            "" => return true,
            more => match more.strip_prefix(',') {
                Some(more) => rest = more,
                None => return false,
            },
        }
    }
}

/// Buckets rise up to `+Inf`, which is the count.
fn histogram_is_whole(family: &str, series: &BTreeMap<String, f64>) -> Result<(), String> {
    let mut buckets: BTreeMap<String, Vec<(f64, f64)>> = BTreeMap::new();
    for (name, count) in series {
        let Some(labels) = name.strip_prefix(&format!("{family}_bucket{{")) else { continue };
        let (labels, bound) = labels.trim_end_matches('}').rsplit_once("le=\"").ok_or(format!("no le: {name}"))?;
        let bound = bound.trim_end_matches('"').replace("+Inf", "inf").parse().map_err(|_| format!("le: {name}"))?;
        buckets.entry(labels.trim_end_matches(',').to_owned()).or_default().push((bound, *count));
    }
    for (labels, mut bounds) in buckets {
        bounds.sort_by(|a, b| a.0.total_cmp(&b.0));
        let all =
            series.get(&format!("{family}_count{{{labels}}}")).ok_or(format!("{family}{{{labels}}}: no count"))?;
        series.get(&format!("{family}_sum{{{labels}}}")).ok_or(format!("{family}{{{labels}}}: no sum"))?;
        let rises = bounds.windows(2).all(|pair| pair[0].1 <= pair[1].1 && pair[0].0 < pair[1].0);
        if !rises || bounds.last().is_none_or(|(bound, count)| bound.is_finite() || count != all) {
            return Err(format!("{family}{{{labels}}}: {bounds:?}, count {all}"));
        }
    }
    Ok(())
}

#[test]
fn the_page_is_what_prometheus_reads_and_says_what_the_engine_says() {
    let p = paged();
    let (local, far) = (p.a.allocate(1 << 20, "*").unwrap(), p.b.allocate(1 << 20, "*").unwrap());
    let segment = p.a.open_segment("b").unwrap();
    for _ in 0..8 {
        let transfer = [Transfer::write_from(&local, 0, far.addr(), 1 << 20)];
        p.a.submit(&segment, &transfer).unwrap().wait(pair::LONG).unwrap();
    }
    // A core may use a rail before control has heard that it is up.
    let until = Instant::now() + pair::LONG;
    while p.a.rails().len() < 4 || p.a.rails().iter().any(|rail| !rail.usable) {
        assert!(Instant::now() < until, "{:#?}", p.a.rails());
        std::thread::sleep(Duration::from_millis(5));
    }
    let page = get(address(&p.a));
    let series = parse(&page).unwrap_or_else(|wrong| panic!("{wrong}\n{page}"));
    let sum = |start: &str| series.iter().filter(|(name, _)| name.starts_with(start)).map(|(_, v)| v).sum::<f64>();
    assert_eq!(sum("moonrail_rail_bytes_total{"), f64::from(8 << 20));
    assert_eq!(sum("moonrail_rail_slices_total{"), 128.0);
    assert_eq!(sum("moonrail_core_slices_total{"), 128.0);
    assert_eq!((sum("moonrail_nic_wire_seconds_count{"), sum("moonrail_nic_queue_seconds_count{")), (128.0, 128.0));
    assert!(sum("moonrail_nic_wire_seconds_sum{") > 0.0);
    assert_eq!((sum("moonrail_rail_in_flight_slices{"), sum("moonrail_rail_in_flight_bytes{")), (0.0, 0.0));
    let registered: u64 = p.a.nics().iter().map(|nic| nic.registered).sum();
    assert_eq!(sum("moonrail_nic_registered_bytes{"), registered as f64);
    for rail in p.a.rails() {
        let labels = format!("nic=\"{}\",peer=\"b\",peer_nic=\"{}\",fabric=\"rdma\"", rail.nic, rail.peer_nic);
        assert_eq!(series[&format!("moonrail_rail_bytes_total{{{labels}}}")], rail.bytes as f64);
        assert_eq!(series[&format!("moonrail_rail_usable{{{labels}}}")], 1.0);
    }
    assert_eq!(series["moonrail_incidents_total"], 0.0);
    assert!(page.contains("moonrail_info{name=\"a\",version=\""), "{page}");
    assert_ne!(address(&p.a), address(&p.b), "each engine has its own page");
}

/// Without this, the check above could not fail.
#[test]
fn the_grammar_bites() {
    let head = "# HELP a_total x\n# TYPE a_total counter\n";
    for bad in [
        "a_total 1\n".to_owned(),
        format!("{head}a_total 1"),
        format!("{head}a_total one\n"),
        format!("{head}a_total 1\na_total 2\n"),
        format!("{head}b_total 1\n"),
        format!("{head}a_total{{x=\"1\" 1\n"),
        format!("{head}a_total{{x=\"\\q\"}} 1\n"),
        format!("{head}a_total{{x=\"1\",x=\"2\"}} 1\n"),
        format!("{head}a_total{{1x=\"1\"}} 1\n"),
        format!("{head}{head}"),
        "# HELP a x\n# TYPE a counter\na 1\n".to_owned(),
        "# HELP h x\n# TYPE h histogram\nh_bucket{le=\"1\"} 2\nh_bucket{le=\"+Inf\"} 1\nh_sum 1\nh_count 1\n"
            .to_owned(),
        "# HELP h x\n# TYPE h histogram\nh_bucket{n=\"\",le=\"+Inf\"} 1\nh_sum{n=\"\"} 1\nh_count{n=\"\"} 2\n"
            .to_owned(),
    ] {
        assert!(parse(&bad).is_err(), "{bad}");
    }
    assert!(parse(&format!("{head}a_total{{x=\"q\\\"\\\\\\n}},=\"}} 1\n")).is_ok());
}

#[test]
fn everything_else_is_refused_in_words_and_hurts_nobody() {
    let p = paged();
    let addr = address(&p.a);
    let long = [b"GET /metrics HTTP/1.1\r\nX: ".to_vec(), vec![b'x'; 64 << 10]].concat();
    let cases: [(&[u8], &str, &str); 6] = [
        (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", "HTTP/1.1 404 ", "/metrics"),
        (b"POST /metrics HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\nabc", "HTTP/1.1 405 ", "Allow: GET, HEAD"),
        (b"moonrail/1 all\r\n\r\n", "HTTP/1.1 400 ", "GET /metrics HTTP/1.1"),
        (b"GET /metrics HTTP/3\r\n\r\n", "HTTP/1.1 505 ", "HTTP/1.1"),
        (&long, "HTTP/1.1 431 ", "8192"),
        (b"\x16\x03\x01\0\0\n\n", "HTTP/1.1 400 ", "GET /metrics"),
    ];
    for (request, status, words) in cases {
        let reply = say(addr, request);
        assert!(reply.starts_with(status) && reply.contains(words), "{}: {reply}", String::from_utf8_lossy(request));
        assert!(reply.contains("\r\nConnection: close\r\n"), "{reply}");
    }
    let head = say(addr, b"HEAD /metrics HTTP/1.1\r\nHost: x\r\n\r\n");
    assert!(head.starts_with("HTTP/1.1 200 ") && head.ends_with("\r\n\r\n"), "{head}");
    // In single bytes, as a slow client sends.
    let mut slow = TcpStream::connect(addr).unwrap();
    for byte in b"GET /metrics HTTP/1.1\r\n\r\n" {
        slow.write_all(&[*byte]).unwrap();
    }
    let mut page = String::new();
    slow.read_to_string(&mut page).unwrap();
    assert!(parse(page.split_once("\r\n\r\n").unwrap().1).is_ok(), "{page}");
}

#[test]
fn silent_clients_are_let_go_and_others_are_served() {
    let p = paged();
    let addr = address(&p.a);
    let silent: Vec<TcpStream> = (0..40).map(|_| TcpStream::connect(addr).unwrap()).collect();
    let asking: Vec<_> = (0..40).map(|_| std::thread::spawn(move || parse(&get(addr)).map(|_| ()))).collect();
    for client in asking {
        client.join().unwrap().unwrap();
    }
    let until = Instant::now() + pair::LONG;
    for mut stream in silent {
        let left = until.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
        stream.set_read_timeout(Some(left)).unwrap();
        assert!(matches!(stream.read(&mut [0]), Ok(0)), "nobody waits for who asks nothing");
    }
}

#[test]
fn an_address_that_is_taken_is_an_error_and_a_page_ends_with_its_engine() {
    let taken = TcpListener::bind(ANY).unwrap();
    let addr = taken.local_addr().unwrap();
    let builder = || pair::builder(&Arc::default()).name("127.0.0.1").fabrics([moonrail::Fabric::Tcp]).cores(1);
    let error = builder().metrics_http(addr).build().unwrap_err().to_string();
    assert!(error.contains(&addr.to_string()) && error.contains("a port that is free"), "{error}");
    drop(taken);
    let engine = builder().metrics_http(ANY.parse().unwrap()).build().unwrap();
    let addr = address(&engine);
    assert!(parse(&get(addr)).is_ok(), "an engine without a rail has a page too");
    assert!(engine.shutdown(pair::LONG));
    assert!(engine.metrics_addr().is_none());
    let until = Instant::now() + pair::LONG;
    while TcpStream::connect(addr).is_ok() {
        assert!(Instant::now() < until, "somebody still listens");
        std::thread::sleep(Duration::from_millis(5));
    }
    assert!(builder().build().unwrap().metrics_addr().is_none(), "nowhere, unless it is asked for");
}
