//! `moonrail doctor PEER` where the peer, or the way to it, is what is wrong: its address, its keys, its ports, its process. A
//! second host is a network namespace, or a process that is given another boot id.

mod doctor_support;
#[path = "../../control/tests/support/mod.rs"]
mod etcd;
mod host_support;
#[path = "host_support/nets.rs"]
mod nets;
#[path = "host_support/put.rs"]
mod put;

use std::process::Command;

use doctor_support::Look;
use etcd::EtcdServer;
use host_support::START;
use host_support::process::{Process, moonrail};
use moonrail_control::metadata::{Catalogue, StoreOptions, StoreUri};
use moonrail_control::names::host_addresses;
use nets::Nets;

const LOOPBACK: [(&str, &str); 1] = [("MC_TCP_BIND_ADDRESS", "127.0.0.1")];

/// A node, started by a script: `$MOONRAIL serve …`.
fn serve(script: &str) -> (Process, String) {
    let mut command = Command::new("bash");
    command.args(["-c", script]).env("MOONRAIL", moonrail());
    let mut node = Process::start(script, command);
    let name = node.says("listening on ", START);
    (node, name)
}

/// A node whose kernel, as far as it can see, is another one.
fn serve_elsewhere(metadata: &str, name: &str, address: &str) -> Process {
    let boot_id = std::env::temp_dir().join(format!("mr-boot-id-{}-{name}", std::process::id()));
    std::fs::write(&boot_id, "6b1d1a1e-0000-4000-8000-00000000000f\n").expect("a temporary file");
    let node = format!("exec $MOONRAIL serve {metadata} --name {name} --size 1MiB --cores 1 --fabrics tcp");
    let script = format!("mount --bind {} /proc/sys/kernel/random/boot_id && {node}", boot_id.display());
    serve(&format!("export MC_TCP_BIND_ADDRESS={address}; exec unshare --mount bash -c '{script}'")).0
}

fn key(server: &EtcdServer, key: &str) -> Vec<u8> {
    let uri = StoreUri::Etcd(vec![server.endpoint()]);
    let store = Catalogue::open(&uri, &StoreOptions::default()).expect("a client");
    store.get(key).expect("etcd answers").unwrap_or_else(|| panic!("no {key}")).value
}

#[test]
fn an_address_that_leads_to_us_and_not_to_the_peer() {
    let server = EtcdServer::start();
    let metadata = format!("--metadata etcd://{}", server.endpoint());
    let line = |peer: &str| format!("{peer} {metadata} --name me --fabrics tcp");
    let node = serve_elsewhere(&metadata, "node-l", "127.0.0.1");
    Look::of(&line("node-l"), &LOOPBACK).fails(
        "a peer on another host publishes loopback",
        "peer's address",
        "reaches himself",
    );
    drop(node);
    let own = host_addresses().into_iter().find(std::net::IpAddr::is_ipv4).expect("a machine on a network");
    let node = serve_elsewhere(&metadata, "node-o", &own.to_string());
    Look::of(&line("node-o"), &LOOPBACK).fails(
        "a peer on another host publishes our address",
        "peer's address",
        "meets this one",
    );
    drop(node);
}

#[test]
fn keys_that_were_put_back_by_hand_and_a_node_under_a_second_name() {
    let server = EtcdServer::start();
    let metadata = format!("--metadata etcd://{}", server.endpoint());
    let (node, _) = serve(&format!(
        "export MC_TCP_BIND_ADDRESS=127.0.0.1; exec $MOONRAIL serve {metadata} --name node-a --size 1MiB --cores 1 --fabrics tcp"
    ));
    let line = |peer: &str| format!("{peer} {metadata} --name me --fabrics tcp");
    let healthy = Look::of(&line("node-a"), &LOOPBACK);
    for check in
        ["peer's address", "peer's lease", "peer's own name", "peer's segment", "peer's data port", "way", "rail"]
    {
        assert_eq!(healthy.check(check)["verdict"], "PASS", "{:#}", healthy.check(check));
    }
    let kept = ["ram", "rpc_meta"].map(|kind| {
        let of = |name: &str| format!("mooncake/{kind}/{name}");
        let value = key(&server, &of("node-a"));
        put::put(&server.endpoint(), &of("node-b"), &value);
        (of("node-a"), value)
    });
    let second = Look::of(&line("node-b"), &LOOPBACK);
    let name = second.check("peer's own name");
    assert!(
        name["verdict"] == "WARN" && name["next"].as_str().is_some_and(|n| n.contains("open it as node-a")),
        "{name:#}"
    );

    // A backup of the store is put back after the node's end.
    node.terminate(START).expect_ok();
    for (key, value) in &kept {
        put::put(&server.endpoint(), key, value);
    }
    let back = Look::of(&line("node-a"), &LOOPBACK);
    back.fails("a peer that is gone, its keys from a backup", "peer's handshake port", "no process");
    let lease = back.check("peer's lease");
    assert!(
        lease["verdict"] == "WARN" && lease["next"].as_str().is_some_and(|n| n.contains("etcdctl del")),
        "{lease:#}"
    );

    // What other programs may have put there.
    let written = |name: &str, host: &str, segment: &str| {
        let address = format!(r#"{{"ip_or_host_name":"{host}","rpc_port":15000}}"#);
        put::put(&server.endpoint(), &format!("mooncake/rpc_meta/{name}"), address.as_bytes());
        if !segment.is_empty() {
            put::put(&server.endpoint(), &format!("mooncake/ram/{name}"), segment.as_bytes());
        }
        Look::of(&line(name), &LOOPBACK)
    };
    let unknown = written("node-c", "no-such-host.invalid", "");
    unknown.fails("a host name of a peer that nobody knows", "peer's handshake port", "no-such-host.invalid");
    let other = written("node-d", "127.0.0.1", r#"{"name":"node-d","protocol":"nvlink"}"#);
    other.fails("a protocol that is not spoken here", "peer's segment", "nvlink");
    let nameless = r#"{"name":"node-e","protocol":"rdma","devices":[{"name":"","gid":"","lid":0}],"buffers":[]}"#;
    written("node-e", "127.0.0.1", nameless).fails("a descriptor that is none", "peer's name", "Corrupted segment");
    let only_address = written("node-f", "127.0.0.1", "");
    only_address.fails("an address whose node is gone", "peer's handshake port", "no process");
}

#[test]
fn a_peer_that_is_stopped() {
    let (node, name) = serve("exec $MOONRAIL serve --name 127.0.0.1 --size 1MiB --cores 1 --fabrics tcp");
    node.signal("STOP");
    let look = Look::of(&format!("{name} --name 127.0.0.1 --fabrics tcp"), &[]);
    node.signal("CONT");
    look.fails("a peer that is stopped", "peer's segment", &name);
}

#[test]
fn firewalls_and_wires_between_two_hosts() {
    let nets = Nets::new();
    let tag = &nets.tag;
    let (node, name) = serve(&format!(
        "exec ip netns exec {tag}b $MOONRAIL serve --name 10.99.0.2 --size 1MiB --cores 1 --fabrics tcp"
    ));
    let look = || Look::shell(&format!("exec ip netns exec {tag}a $DOCTOR {name} --name 10.99.0.1 --fabrics tcp"));
    let healthy = look();
    assert_eq!((healthy.first("FAIL"), healthy.first("WARN")), (&serde_json::Value::Null, &serde_json::Value::Null));
    let data = healthy.check("peer's data port")["evidence"].as_str().expect("text").to_owned();
    let port = |text: &str| text.split([' ', ':']).find_map(|word| word.parse::<u16>().ok()).expect("a port");
    let (data, handshake) = (port(&data), port(&name));

    // What comes from that port never arrives, as behind a firewall that drops it.
    for (case, port, check) in [
        ("the handshake port is dropped", handshake, "peer's handshake port"),
        ("the data port is dropped", data, "peer's data port"),
    ] {
        Nets::must(&format!("ip -n {tag}b rule add ipproto tcp sport {port} blackhole"));
        let blocked = look();
        Nets::must(&format!("ip -n {tag}b rule del ipproto tcp sport {port} blackhole"));
        blocked.fails(case, check, "does not answer");
    }
    Nets::must(&format!("ip -n {tag}a rule add ipproto tcp dport {handshake} prohibit"));
    let prohibited = look();
    Nets::must(&format!("ip -n {tag}a rule del ipproto tcp dport {handshake} prohibit"));
    prohibited.fails("our own firewall forbids it", "peer's handshake port", "denied");
    Nets::must(&format!("ip -n {tag}b link set {tag}y down"));
    let unplugged = look();
    Nets::must(&format!("ip -n {tag}b link set {tag}y up"));
    unplugged.fails("the wire is out", "peer's handshake port", "10.99.0.2");
    drop(node);
    // A name that the distribution has put on 127.0.1.1, as Debian does.
    let hosts = nets.folder.join("hosts");
    std::fs::write(&hosts, "127.0.0.1 localhost\n127.0.1.1 thishost\n").expect("a file");
    let script = format!(
        "exec unshare --mount bash -c 'mount --bind {} /etc/hosts && exec $DOCTOR --name thishost --fabrics tcp'",
        hosts.display()
    );
    Look::shell(&script).fails("our name is on 127.0.1.1", "address", "127.0.1.1");
    // etcd of one host listens on its loopback alone.
    let etcd = nets.folder.join("etcd");
    let mut command = Command::new("ip");
    command.args(["netns", "exec", &format!("{tag}b"), "etcd", "--log-level", "error", "--data-dir"]).arg(&etcd);
    let store = Process::start("etcd", command);
    host_support::wait_for("etcd", || {
        let up = format!("ip netns exec {tag}b bash -c '</dev/tcp/127.0.0.1/2379'");
        Command::new("bash").args(["-c", &up]).output().expect("bash").status.success().then_some(())
    });
    let script = format!("exec ip netns exec {tag}a $DOCTOR --metadata etcd://10.99.0.2:2379 --name 10.99.0.1");
    Look::shell(&script).fails("etcd on loopback only", "metadata server", "refused");
    drop(store);
}
