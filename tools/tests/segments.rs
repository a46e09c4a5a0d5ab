//! `moonrail segments` against a real etcd: a node that runs, one that was killed, and what a stock node leaves for ever.

#[path = "../../control/tests/support/mod.rs"]
mod etcd;
mod host_support;

use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::process::Command;

use etcd::EtcdServer;
use host_support::process::Process;
use host_support::{RUN, START, wait_for};
use serde_json::Value;

/// Puts a key without a lease, as a stock node does, through etcd's JSON gateway.
fn put_for_ever(server: &EtcdServer, key: &str, value: &str) {
    let coded = |text: &str| {
        let shell = Command::new("sh").args(["-c", "printf %s \"$1\" | base64 -w0", "sh", text]).output();
        String::from_utf8(shell.expect("base64 runs").stdout).expect("base64 is text")
    };
    let body = format!("{{\"key\":\"{}\",\"value\":\"{}\"}}", coded(key), coded(value));
    let mut stream = TcpStream::connect(server.endpoint()).expect("etcd is there");
    write!(stream, "POST /v3/kv/put HTTP/1.0\r\nContent-Length: {}\r\n\r\n{body}", body.len()).expect("it reads");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("it answers");
    assert!(answer.starts_with("HTTP/1.0 200"), "{answer}");
}

fn segments(line: &str) -> Process {
    Process::moonrail(&format!("segments {line}"))
}

fn ls(metadata: &str) -> Vec<Value> {
    let ended = segments(&format!("ls {metadata} --json")).wait(RUN).expect_ok();
    let all: Value = serde_json::from_str(&ended.stdout).unwrap_or_else(|e| panic!("{e}: {}", ended.stdout));
    all["segments"].as_array().expect("segments").clone()
}

#[test]
fn what_runs_is_alive_what_was_killed_is_stale_and_prune_takes_exactly_that() {
    let server = EtcdServer::start();
    let metadata = format!("--metadata etcd://{}", server.endpoint());
    assert_eq!(ls(&metadata), Vec::<Value>::new());
    let serve = format!("serve {metadata} --name node-a --size 1MiB --cores 1 --fabrics tcp");
    let mut command = Command::new(host_support::process::moonrail());
    command.args(serve.split_whitespace()).env("MC_TCP_BIND_ADDRESS", "127.0.0.1");
    let mut node = Process::start("serve", command);
    node.says("listening on ", START);
    // What a stock node left that was killed: no lease, a port that nobody has.
    let free = etcd::ports::free_port();
    put_for_ever(
        &server,
        "mooncake/rpc_meta/old",
        &format!("{{\"ip_or_host_name\":\"127.0.0.1\",\"rpc_port\":{free}}}"),
    );
    put_for_ever(&server, "mooncake/ram/old", "{\"name\":\"old\",\"protocol\":\"tcp\",\"tcp_data_port\":1}");
    // Another cluster's is none of our business.
    put_for_ever(
        &server,
        "mooncake/c2/rpc_meta/other",
        &format!("{{\"ip_or_host_name\":\"127.0.0.1\",\"rpc_port\":{free}}}"),
    );

    let found = ls(&metadata);
    let one = |name: &str| found.iter().find(|s| s["name"] == name).unwrap_or_else(|| panic!("no {name}: {found:#?}"));
    let (alive, old) = (one("node-a"), one("old"));
    assert_eq!((&alive["state"], &alive["engine"]), (&"alive".into(), &"moonrail".into()), "{alive:#}");
    assert!(alive["lease_s"].as_u64().is_some_and(|s| s <= 10), "{alive:#}");
    assert_eq!(alive["segment"]["bytes"], 1 << 20);
    assert_eq!((&old["state"], &old["lease_s"]), (&"stale".into(), &Value::Null), "{old:#}");
    assert!(old["why"].as_str().is_some_and(|why| why.contains("refuses connections")), "{old:#}");

    let shown = segments(&format!("show node-a {metadata}")).wait(RUN).expect_ok().stdout;
    for words in ["alive", "127.0.0.1:", "mooncake/ram/node-a", "1 MiB", "unless renewed"] {
        assert!(shown.contains(words), "{words}:\n{shown}");
    }
    segments(&format!("show nobody {metadata}")).wait(RUN).expect_error(&["nobody", "letter for letter"]);

    let shows = segments(&format!("prune old node-a {metadata}")).wait(RUN).expect_ok().stdout;
    assert!(shows.contains("1 of 2 would be deleted") && shows.contains("old") && !shows.contains("node-a"), "{shows}");
    assert_eq!(ls(&metadata).len(), found.len(), "nothing is deleted without --yes");
    let deleted = segments(&format!("prune old node-a {metadata} --yes")).wait(RUN).expect_ok().stdout;
    assert!(
        deleted.contains("deleted mooncake/ram/old") && deleted.contains("deleted mooncake/rpc_meta/old"),
        "{deleted}"
    );
    assert!(!ls(&metadata).iter().any(|s| s["name"] == "old"));
    let other = segments(&format!("ls other --cluster-id c2 {metadata} --json")).wait(RUN).expect_ok().stdout;
    assert!(other.contains("mooncake/c2/rpc_meta/other"), "{other}");

    // A killed node of ours is stale at once, and gone with its lease.
    node.kill();
    let state = |found: &[Value]| found.iter().find(|s| s["name"] == "node-a").map(|s| s["state"].clone());
    assert_eq!(state(&ls(&metadata)), Some("stale".into()));
    wait_for("the end of its lease", || state(&ls(&metadata)).is_none().then_some(()));
}

#[test]
fn without_a_store_there_is_nothing_to_list() {
    let ended = segments("ls --metadata P2PHANDSHAKE").wait(RUN);
    assert_eq!(ended.code, 2);
    assert!(ended.stderr.contains("each node answers for itself"), "{}", ended.stderr);
    segments("ls --metadata etcd://127.0.0.1:1").wait(RUN).expect_error(&["127.0.0.1:1", "refused"]);
    let ended = segments("ls --metadata http://127.0.0.1:1/metadata").wait(RUN);
    assert!(ended.code == 2 && ended.stderr.contains("name them"), "{}", ended.stderr);
}
