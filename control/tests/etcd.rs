//! The etcd client against a real etcd, healthy and not.

mod support;

use std::io::{Read as _, Write as _};
use std::net::TcpListener;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use moonrail_control::metadata::store::{Credentials, Fault, TlsFiles};
use moonrail_control::metadata::{Change, Lease, MetadataUri, StoreClient, StoreError, StoreOptions};
use support::ports::free_port;
use support::{EtcdServer, eventually};

fn open(endpoints: &str, options: &StoreOptions) -> StoreClient {
    match MetadataUri::parse(&format!("etcd://{endpoints}")) {
        Ok(MetadataUri::Store(uri)) => StoreClient::open(&uri, options).expect("options that fit"),
        other => panic!("{endpoints}: {other:?}"),
    }
}

fn store(server: &EtcdServer) -> StoreClient {
    open(&server.endpoint(), &StoreOptions::default())
}

fn short() -> StoreOptions {
    StoreOptions { deadline: Duration::from_secs(2), ..StoreOptions::default() }
}

#[tokio::test]
async fn keys_come_back_as_they_were_put_and_go() {
    let server = EtcdServer::start();
    let store = store(&server);
    assert_eq!(store.get("mooncake/ram/n").await, Ok(None));
    store.put("mooncake/ram/n", b"{\"name\":\"n\"}\n").await.unwrap();
    store.put("mooncake/ram/n", b"second\n").await.unwrap();
    store.put("mooncake/rpc_meta/n", b"address\n").await.unwrap();
    assert_eq!(store.get("mooncake/ram/n").await.unwrap().as_deref(), Some(&b"second\n"[..]));
    let listed = store.list("mooncake/").await.unwrap();
    assert_eq!(
        listed.iter().map(|(key, _)| key.as_str()).collect::<Vec<_>>(),
        ["mooncake/ram/n", "mooncake/rpc_meta/n"]
    );
    assert_eq!(store.delete("mooncake/ram/n").await, Ok(true));
    assert_eq!(store.delete("mooncake/ram/n").await, Ok(false));
}

#[tokio::test]
async fn a_descriptor_of_several_megabytes_is_refused_in_words_or_comes_back_whole() {
    let server = EtcdServer::start_with(&["--max-request-bytes", "20000000"], false);
    let store = store(&server);
    // Above the gRPC library's own limit of 4 MiB for an answer.
    let value = vec![b'x'; 6 << 20];
    store.put("mooncake/ram/big", &value).await.unwrap();
    assert_eq!(store.get("mooncake/ram/big").await.unwrap(), Some(value));

    let stock = EtcdServer::start();
    let error = open(&stock.endpoint(), &short()).put("k", &vec![b'x'; 3 << 20]).await.unwrap_err();
    assert!(error.to_string().contains("--max-request-bytes"), "{error}");
}

#[tokio::test]
async fn a_dead_first_endpoint_costs_one_refusal() {
    let server = EtcdServer::start();
    let store = open(&format!("127.0.0.1:{},{}", free_port(), server.endpoint()), &StoreOptions::default());
    let begin = Instant::now();
    store.put("k", b"v").await.unwrap();
    assert_eq!(store.get("k").await.unwrap().as_deref(), Some(&b"v"[..]));
    assert!(begin.elapsed() < Duration::from_secs(2), "{:?}", begin.elapsed());
}

#[tokio::test]
async fn a_frozen_first_endpoint_costs_its_share_of_one_call() {
    let (frozen, server) = (EtcdServer::start(), EtcdServer::start());
    frozen.freeze();
    let store = open(&format!("{},{}", frozen.endpoint(), server.endpoint()), &short());
    store.put("k", b"v").await.unwrap();
    let begin = Instant::now();
    store.put("k", b"w").await.unwrap();
    assert!(begin.elapsed() < Duration::from_millis(500), "the endpoint that serves is remembered");
    frozen.thaw();
}

#[tokio::test]
async fn nobody_there_names_every_endpoint_and_its_fault() {
    let (a, b) = (format!("127.0.0.1:{}", free_port()), format!("127.0.0.1:{}", free_port()));
    let error = open(&format!("{a},{b}"), &StoreOptions::default()).get("k").await.unwrap_err();
    assert_eq!(error, StoreError::Unreachable { faults: vec![(a, Fault::Refused), (b, Fault::Refused)] });
    assert!(error.to_string().contains("connection refused") && error.to_string().contains("0.0.0.0"), "{error}");
    let error = open("no-such-host.invalid:2379", &short()).get("k").await.unwrap_err();
    assert!(matches!(&error, StoreError::Unreachable { faults } if faults[0].1 == Fault::Unresolved), "{error:?}");
}

#[tokio::test]
async fn a_stopped_server_is_silent_and_the_call_ends_with_its_deadline() {
    let server = EtcdServer::start();
    let store = open(&server.endpoint(), &short());
    store.put("k", b"v").await.unwrap();
    server.freeze();
    let begin = Instant::now();
    let error = store.get("k").await.unwrap_err();
    assert!(matches!(error, StoreError::Silent { .. }), "{error:?}");
    assert!(begin.elapsed() < Duration::from_secs(4), "{:?}", begin.elapsed());
    server.thaw();
    eventually(Duration::from_secs(10), "it serves again", || async { store.get("k").await.is_ok() }).await;
}

#[tokio::test]
async fn keys_end_with_their_lease_and_the_owner_is_told() {
    let server = EtcdServer::start();
    // Long enough for a renewal every second on a machine that is busy with other tests, and renewed for longer.
    let options = StoreOptions { lease_ttl: Duration::from_secs(3), ..StoreOptions::default() };
    let (owner, reader) = (open(&server.endpoint(), &options), store(&server));
    assert_eq!(owner.keep_alive().await, Ok(Lease::NotNeeded));
    owner.put("k", b"v").await.unwrap();
    let kept_until = Instant::now() + Duration::from_secs(5);
    while Instant::now() < kept_until {
        assert_eq!(owner.keep_alive().await, Ok(Lease::Kept { ttl: Duration::from_secs(3) }));
        assert!(reader.get("k").await.unwrap().is_some(), "a renewed lease keeps its key");
        tokio::time::sleep(owner.keep_alive_every().unwrap()).await;
    }
    eventually(Duration::from_secs(20), "the key ends", || async { reader.get("k").await.unwrap().is_none() }).await;
    assert_eq!(owner.keep_alive().await, Ok(Lease::Lost));
    owner.put("k", b"again").await.unwrap();
    assert!(matches!(owner.keep_alive().await, Ok(Lease::Kept { .. })));
}

#[tokio::test]
async fn a_put_after_the_lease_ended_makes_a_new_one_and_says_that_the_others_are_gone() {
    let server = EtcdServer::start();
    let options = StoreOptions { lease_ttl: Duration::from_secs(1), ..StoreOptions::default() };
    let owner = open(&server.endpoint(), &options);
    owner.put("a", b"1").await.unwrap();
    eventually(Duration::from_secs(20), "the key ends", || async { owner.get("a").await.unwrap().is_none() }).await;
    owner.put("b", b"2").await.unwrap();
    assert_eq!(owner.keep_alive().await, Ok(Lease::Lost), "the owner has to put `a` again");
    assert!(matches!(owner.keep_alive().await, Ok(Lease::Kept { .. })));
}

#[tokio::test]
async fn an_orderly_end_takes_the_keys_away_at_once() {
    let server = EtcdServer::start();
    let owner = store(&server);
    owner.put("k", b"v").await.unwrap();
    owner.close().await.unwrap();
    assert_eq!(store(&server).get("k").await, Ok(None));
}

#[tokio::test]
async fn a_watch_reports_puts_deletes_and_the_end_of_a_lease() {
    let server = EtcdServer::start();
    let (owner, mut watch) = (store(&server), store(&server).watch("mooncake/").await.unwrap());
    owner.put("elsewhere", b"").await.unwrap();
    owner.put("mooncake/a", b"1").await.unwrap();
    owner.put("mooncake/b", b"2").await.unwrap();
    owner.delete("mooncake/a").await.unwrap();
    owner.close().await.unwrap();
    let mut seen = Vec::new();
    while seen.len() < 4 {
        let next = tokio::time::timeout(Duration::from_secs(10), watch.next()).await.expect("a change");
        seen.extend(next.unwrap());
    }
    let put = |key: &str, value: &[u8]| Change::Put { key: key.into(), value: value.to_vec() };
    let gone = |key: &str| Change::Deleted { key: key.into() };
    assert_eq!(seen, [put("mooncake/a", b"1"), put("mooncake/b", b"2"), gone("mooncake/a"), gone("mooncake/b")]);
    drop(server);
    let end =
        tokio::time::timeout(Duration::from_secs(20), watch.next()).await.expect("the watch ends with its server");
    assert!(end.is_err());
}

#[tokio::test]
async fn users_get_in_with_their_password_only() {
    let server = EtcdServer::start();
    let mut admin = etcd_client::Client::connect([server.endpoint()], None).await.unwrap();
    admin.user_add("root", "secret", None).await.unwrap();
    admin.user_grant_role("root", "root").await.unwrap();
    admin.auth_enable().await.unwrap();
    let with = |password: &str| {
        let credentials = Some(Credentials { user: "root".into(), password: password.into() });
        open(&server.endpoint(), &StoreOptions { credentials, ..StoreOptions::default() })
    };
    let known = with("secret");
    known.put("k", b"v").await.unwrap();
    assert!(matches!(known.keep_alive().await, Ok(Lease::Kept { .. })));
    for stranger in [with("guess"), store(&server)] {
        let error = stranger.get("k").await.unwrap_err();
        assert!(matches!(error, StoreError::Auth { .. }), "{error:?}");
        assert!(error.to_string().contains("check user, password"), "{error}");
    }
}

#[tokio::test]
async fn a_web_server_is_told_from_etcd() {
    let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
    let endpoint = listener.local_addr().unwrap().to_string();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let Ok(mut stream) = stream else { return };
            let _ = stream.read(&mut [0; 1024]);
            let _ = stream.write_all(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n");
        }
    });
    let error = open(&endpoint, &short()).get("k").await.unwrap_err();
    assert!(matches!(error, StoreError::NotEtcd { .. }), "{error:?}");
    assert!(error.to_string().contains("2379"), "{error}");
}

/// Runs the first test again in a process whose environment names a proxy that does not exist.
#[test]
fn a_proxy_in_the_environment_is_not_used() {
    let mut again = std::process::Command::new(std::env::current_exe().unwrap());
    again.args(["--exact", "keys_come_back_as_they_were_put_and_go"]);
    for variable in ["http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "all_proxy"] {
        again.env(variable, format!("http://127.0.0.1:{}", free_port()));
    }
    let output = again.env_remove("no_proxy").env_remove("NO_PROXY").output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && text.contains("1 passed"), "{text}");
}

#[tokio::test]
async fn tls_works_with_the_right_authority_and_is_told_apart_without() {
    let dir = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/support/tls"));
    let text = |name: &str| dir.join(name).to_string_lossy().into_owned();
    let (cert, key, ca) = (text("server.crt"), text("server.key"), text("authority.crt"));
    let flags = ["--cert-file", &cert, "--key-file", &key, "--trusted-ca-file", &ca, "--client-cert-auth"];
    let server = EtcdServer::start_with(&flags, true);
    let with = |ca: &str, identity: bool| {
        let identity = identity.then(|| (dir.join("client.crt"), dir.join("client.key")));
        let tls = TlsFiles { ca: Some(dir.join(ca)), identity, ..TlsFiles::default() };
        open(&server.endpoint(), &StoreOptions { tls: Some(tls), ..short() })
    };
    let known = with("authority.crt", true);
    eventually(Duration::from_secs(20), "etcd serves over TLS", || async { known.put("k", b"v").await.is_ok() }).await;
    for stranger in [with("stranger.crt", true), with("authority.crt", false)] {
        let error = stranger.get("k").await.unwrap_err();
        assert!(matches!(error, StoreError::Tls { .. }), "{error:?}");
    }
    let error = open(&server.endpoint(), &short()).get("k").await.unwrap_err();
    assert!(matches!(error, StoreError::NotEtcd { .. }), "{error:?}");
    assert!(error.to_string().contains("https://"), "{error}");
}
