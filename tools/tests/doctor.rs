//! `moonrail doctor` on a machine without RDMA: set-ups broken for real, each by its one cause, and healthy ones. What
//! needs an RDMA NIC is in the lab (`lab_2x2_errors`), what needs a second host in `doctor_peer`.

mod doctor_support;
#[path = "../../control/tests/support/mod.rs"]
mod etcd;
mod host_support;

use std::io::{Read as _, Write as _};
use std::net::TcpListener;
use std::process::Command;
use std::time::Instant;

use doctor_support::Look;
use etcd::EtcdServer;
use host_support::process::{Process, moonrail};
use host_support::{RUN, START};
use serde_json::Value;

#[test]
fn what_this_node_itself_gets_wrong() {
    let look = |line: &str| Look::of(line, &[]);
    look("--name 192.0.2.77").fails("another host's address", "address", "not an address of this host");
    look("--name 127.0.0.1").warns("loopback", "address", "loopback");
    look("--name localhost").fails("a name that is loopback", "address", "reaches himself");
    look("--name no-such-host.invalid").fails("a name without an address", "address", "no address");
    let taken = TcpListener::bind("0.0.0.0:0").unwrap();
    let port = taken.local_addr().unwrap().port();
    look(&format!("--name 127.0.0.1:{port}")).fails("a port that is taken", "handshake port", &port.to_string());
    look("--name 127.0.0.1 --nics rxe9").fails("a device that is not there", "RDMA devices", "no RDMA device");
    look("--name 127.0.0.1 --require rdma").fails("RDMA is a must", "RDMA devices", "no RDMA device");
    look("--size 1000TiB").fails("more memory than there is", "memory", "the machine has available");
    let odd = Look::of("", &[("MC_MTU", "1500")]);
    odd.warns("a variable that cannot be", "environment", "MC_MTU");
    let mut few = Command::new("sh");
    few.args(["-c", "ulimit -n 256; exec \"$0\" doctor --json", &moonrail()]);
    let began = Instant::now();
    let few = Look::read(&Process::start("doctor with 256 descriptors", few).wait(RUN), began);
    few.warns("few descriptors", "descriptors", "256");
}

#[test]
fn a_metadata_server_that_is_away_frozen_another_or_hidden() {
    let mut server = Some(EtcdServer::start());
    let at = server.as_ref().map(EtcdServer::endpoint).unwrap();
    let line = format!("--metadata etcd://{at} --name 127.0.0.1:{}", etcd::ports::free_port());
    let healthy = Look::of(&line, &[("MC_TCP_BIND_ADDRESS", "127.0.0.1"), ("http_proxy", ""), ("https_proxy", "")]);
    assert_eq!(healthy.first("FAIL"), &Value::Null, "{:#?}", healthy.checks);
    let bad: Vec<_> = healthy.checks.iter().filter(|c| c["verdict"] == "WARN" && c["check"] != "address").collect();
    assert!(bad.is_empty(), "{bad:#?}");
    let hidden = Look::of(&line, &[("MC_TCP_BIND_ADDRESS", "127.0.0.1"), ("http_proxy", "http://proxy:3128")]);
    let proxy = hidden.checks.iter().find(|c| c["check"] == "proxy").unwrap();
    assert!(proxy["verdict"] == "WARN" && proxy["next"].as_str().is_some_and(|n| n.contains("unset")), "{proxy:#}");

    let own = Look::of(&format!("--metadata etcd://{at} --name here"), &[]);
    own.warns("a store on loopback for a node that is not", "metadata address", "loopback");

    server.as_ref().unwrap().freeze();
    Look::of(&line, &[]).fails("a frozen server", "metadata server", "did not reply");
    server.as_ref().unwrap().thaw();
    server = None;
    Look::of(&line, &[]).fails("a stopped server", "metadata server", "refused");
    drop(server);

    let stranger = TcpListener::bind("127.0.0.1:0").unwrap();
    let line = format!("--metadata etcd://{}", stranger.local_addr().unwrap());
    std::thread::spawn(move || {
        for mut stream in stranger.incoming().flatten() {
            let _ = stream.write_all(b"SSH-2.0-OpenSSH_9.2p1\r\n");
        }
    });
    Look::of(&line, &[]).fails("somebody else's port", "metadata server", "is not etcd");
    Look::of("--metadata redis://127.0.0.1:6379", &[]).fails("another kind of store", "metadata", "redis");
}

#[test]
fn a_name_that_belongs_to_somebody() {
    let server = EtcdServer::start();
    let metadata = format!("--metadata etcd://{}", server.endpoint());
    let mut command = Command::new(moonrail());
    command.args(format!("serve {metadata} --name node-a --size 1MiB --cores 1 --fabrics tcp").split_whitespace());
    command.env("MC_TCP_BIND_ADDRESS", "127.0.0.1");
    let mut node = Process::start("serve", command);
    node.says("listening on ", START);
    let env = [("MC_TCP_BIND_ADDRESS", "127.0.0.1")];
    let registration = |look: &Look| look.checks.iter().find(|c| c["check"] == "registration").cloned().unwrap();
    let running = registration(&Look::of(&format!("{metadata} --name node-a"), &env));
    assert!(
        running["verdict"] == "WARN" && running["evidence"].as_str().unwrap().contains("answers there"),
        "{running:#}"
    );

    // To it as a peer: by its name it is found, by another name or in another cluster it is not.
    let tcp = format!("{metadata} --name me --fabrics tcp");
    let way = Look::of(&format!("node-a {tcp}"), &env);
    assert_eq!(way.first("FAIL"), &Value::Null, "{:#?}", way.checks);
    let rail = way.checks.iter().find(|c| c["check"] == "rail").unwrap();
    assert!(rail["verdict"] == "PASS" && rail["evidence"].as_str().unwrap().contains("up over tcp"), "{rail:#}");
    Look::of(&format!("node-b {tcp}"), &env).fails(
        "a name nobody has",
        "peer's name",
        "Failed to get description of node-b",
    );
    let elsewhere = [env[0], ("MC_METADATA_CLUSTER_ID", "c2")];
    Look::of(&format!("node-a {tcp}"), &elsewhere).fails("another cluster", "peer's name", "mooncake/c2/");

    node.kill();
    Look::of(&format!("node-a {tcp}"), &env).fails("a node that was killed", "peer's handshake port", "no process");
    let stale = registration(&Look::of(&format!("{metadata} --name node-a"), &env));
    assert!(stale["verdict"] == "PASS" && stale["evidence"].as_str().unwrap().contains("earlier life"), "{stale:#}");
}

#[test]
fn a_peer_without_a_store() {
    let mut node = Process::moonrail("serve --name 127.0.0.1 --size 1MiB --cores 1 --fabrics tcp");
    let name = node.says("listening on ", START);
    let ways = Look::of(&format!("{name} --name 127.0.0.1 --fabrics tcp"), &[]);
    assert_eq!(ways.first("FAIL"), &Value::Null, "{:#?}", ways.checks);
    let wrong = Look::of(&format!("{name} --name 127.0.0.1 --fabrics tcp --require shm"), &[]);
    assert_eq!(wrong.first("FAIL")["check"], "way", "{:#?}", wrong.checks);
    node.terminate(START).expect_ok();
    Look::of(&format!("{name} --name 127.0.0.1"), &[]).fails("a peer that is gone", "peer's handshake port", "refuses");
    Look::of("127.0.0.1:x --name 127.0.0.1", &[]).fails("an address that is none", "peer's name", "Illegal port");
    // Somebody answers there who is no node.
    let stranger = TcpListener::bind("127.0.0.1:0").unwrap();
    let at = stranger.local_addr().unwrap();
    std::thread::spawn(move || stranger.incoming().flatten().for_each(drop));
    Look::of(&format!("{at} --name 127.0.0.1"), &[]).fails(
        "a port that is no node's",
        "peer's segment",
        &at.to_string(),
    );
}

/// Answers every request with the status for its method, as web servers do that are something else.
fn web_server(put: &'static str, get: &'static str) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let at = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            let mut request = [0; 4096];
            let read = stream.read(&mut request).unwrap_or(0);
            let status = if request[..read].starts_with(b"PUT") { put } else { get };
            let _ = write!(stream, "HTTP/1.1 {status}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
        }
    });
    format!("http://{at}/metadata")
}

#[test]
fn a_web_server_that_is_no_metadata_server() {
    let (nothing, everything) = (web_server("404 Not Found", "404 Not Found"), web_server("200 OK", "404 Not Found"));
    let look =
        |uri: &str| Look::of(&format!("--metadata {uri} --name 127.0.0.1"), &[("MC_TCP_BIND_ADDRESS", "127.0.0.1")]);
    look(&nothing).fails("a web server that has nothing", "metadata server", "404");
    look(&everything).fails("a web server that takes everything", "metadata server", "does not know it a moment later");
}

#[test]
fn the_report_for_people_names_the_first_cause_last() {
    let ended = Process::moonrail("doctor --name 192.0.2.77").wait(RUN);
    assert_eq!(ended.code, 1);
    assert!(ended.stdout.lines().all(|line| line.chars().count() <= 80), "{}", ended.stdout);
    let last = ended.stdout.find("first cause: address: 192.0.2.77");
    assert!(last.is_some() && ended.stdout.contains("  FAIL  address: "), "{}", ended.stdout);
    assert!(!ended.stdout.contains('\x1b'), "no colour into a pipe");
}
