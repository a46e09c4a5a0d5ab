//! What users set: names of every form, cluster prefixes, IPv6, host names, and the variables that change what a node
//! publishes, listens to or speaks. Each cell both ways, READ and WRITE, beside stock nodes set the same way.

mod host_support;
mod interop_support;
#[path = "interop_support/stores.rs"]
mod stores;

use host_support::ports::free_port;
use interop_support::{Folder, LOOPBACK, MATRIX, Node, Ours, Stock, Table, Variables, cell, extent};
use moonrail::{Fabric, Op};
use serde_json::json;
use stores::Store;

struct Case {
    what: &'static str,
    store: &'static str,
    /// Host or whole name of node `i`.
    name: fn(u16) -> String,
    /// For every node.
    all: Variables<'static>,
    /// For ours only, and for stock ones only.
    ours: Variables<'static>,
    stock: Variables<'static>,
}

fn v4(port: u16) -> String {
    format!("127.0.0.1:{port}")
}

const PLAIN: Case = Case { what: "", store: "etcd", name: v4, all: LOOPBACK, ours: &[], stock: &[] };
const V6: Variables<'static> = &[("MC_USE_IPV6", ""), ("MC_TCP_BIND_ADDRESS", "::1")];

const CASES: &[Case] = &[
    Case { what: "a word as name", name: |i| format!("node-{i}"), ..PLAIN },
    Case { what: "a word as name, http", name: |i| format!("node-{i}"), store: "http", ..PLAIN },
    Case { what: "a name with a slash", name: |i| format!("rack/node-{i}"), ..PLAIN },
    Case { what: "a name with a slash, http", name: |i| format!("rack/node-{i}"), store: "http", ..PLAIN },
    Case { what: "a name that is not ASCII", name: |i| format!("knoten-ü-{i}"), ..PLAIN },
    Case { what: "a name that is not ASCII, http", name: |i| format!("knoten-ü-{i}"), store: "http", ..PLAIN },
    Case { what: "a host name", name: |i| format!("localhost:{i}"), ..PLAIN },
    Case { what: "a host name, P2P", name: |i| format!("localhost:{i}"), store: "", all: &[], ..PLAIN },
    Case { what: "a host name is published", all: &[("MC_TCP_BIND_ADDRESS", "localhost")], ..PLAIN },
    Case { what: "an address without a port, P2P", name: |_| "127.0.0.1".into(), store: "", all: &[], ..PLAIN },
    Case { what: "IPv6", name: |i| format!("[::1]:{i}"), all: V6, ..PLAIN },
    Case { what: "IPv6, http", name: |i| format!("[::1]:{i}"), all: V6, store: "http", ..PLAIN },
    Case { what: "IPv6, P2P", name: |i| format!("[::1]:{i}"), all: &[("MC_USE_IPV6", "")], store: "", ..PLAIN },
    Case {
        what: "MC_METADATA_CLUSTER_ID",
        all: &[("MC_TCP_BIND_ADDRESS", "127.0.0.1"), ("MC_METADATA_CLUSTER_ID", "c1")],
        ..PLAIN
    },
    Case {
        what: "MC_METADATA_CLUSTER_ID a/b/, http",
        store: "http",
        all: &[("MC_TCP_BIND_ADDRESS", "127.0.0.1"), ("MC_METADATA_CLUSTER_ID", "a/b/")],
        ..PLAIN
    },
    Case { what: "MC_LEGACY_RPC_PORT_BINDING", all: &[("MC_LEGACY_RPC_PORT_BINDING", "")], ..PLAIN },
    Case {
        what: "MC_MIN_RPC_PORT, MC_MAX_RPC_PORT",
        all: &[("MC_TCP_BIND_ADDRESS", "127.0.0.1"), ("MC_MIN_RPC_PORT", "20000"), ("MC_MAX_RPC_PORT", "20400")],
        ..PLAIN
    },
    Case { what: "MC_TCP_PROTO=1 at ours", ours: &[("MC_TCP_PROTO", "1")], ..PLAIN },
    Case { what: "MC_TCP_PROTO=1 at stock", stock: &[("MC_TCP_PROTO", "1")], ..PLAIN },
    Case { what: "MC_TCP_ENABLE_CONNECTION_POOL=0", stock: &[("MC_TCP_ENABLE_CONNECTION_POOL", "0")], ..PLAIN },
    Case { what: "MC_TCP_LANES_PER_PEER=1", ours: &[("MC_TCP_LANES_PER_PEER", "1")], ..PLAIN },
    Case { what: "MC_FORCE_TCP", all: &[("MC_TCP_BIND_ADDRESS", "127.0.0.1"), ("MC_FORCE_TCP", "")], ..PLAIN },
    Case {
        what: "MC_FORCE_TCP, MC_CUSTOM_TOPO_JSON",
        all: &[("MC_TCP_BIND_ADDRESS", "127.0.0.1"), ("MC_FORCE_TCP", ""), ("MC_CUSTOM_TOPO_JSON", MATRIX)],
        ..PLAIN
    },
    Case {
        what: "MC_CUSTOM_TOPO_JSON that is not there",
        all: &[("MC_TCP_BIND_ADDRESS", "127.0.0.1"), ("MC_CUSTOM_TOPO_JSON", "/nowhere/nics.json")],
        ..PLAIN
    },
    Case {
        what: "MC_DISABLE_METACACHE",
        all: &[("MC_TCP_BIND_ADDRESS", "127.0.0.1"), ("MC_DISABLE_METACACHE", "")],
        ..PLAIN
    },
    Case { what: "MC_SLICE_SIZE=4096", ours: &[("MC_SLICE_SIZE", "4096")], ..PLAIN },
];

fn joined<'a>(one: Variables<'a>, two: Variables<'a>) -> Vec<(&'a str, &'a str)> {
    one.iter().chain(two).copied().collect()
}

#[test]
fn what_users_set_means_the_same_to_both_kinds() {
    let folder = Folder::new("interop-names");
    let columns = ["tcp", "ours to stock", "stock to ours", "stock to stock"];
    let mut table = Table::headed(&columns);
    let stores = [("etcd", Store::etcd()), ("http", Store::http()), ("", Store::none())];
    for (number, case) in CASES.iter().enumerate() {
        let store = stores.iter().find(|(name, _)| *name == case.store).map(|(_, store)| store.uri()).expect("a store");
        let builder = Ours::builder(&(case.name)(free_port()), store, &joined(case.all, case.ours));
        let us = Ours::start(builder.fabrics([Fabric::Tcp]));
        let stock = |name: String| Stock::start(&name, store, "tcp", "", &joined(case.all, case.stock));
        let (them, third) = (stock((case.name)(free_port())), stock((case.name)(free_port())));
        let nodes: [&dyn Node; 3] = [&us, &them, &third];
        let memory = nodes.map(|node| node.register(extent()));
        let outcomes: Vec<_> = [(0, 1), (1, 0), (1, 2)]
            .iter()
            .map(|&(from, to): &(usize, usize)| {
                [Op::Write, Op::Read].into_iter().try_for_each(|op| {
                    let seed = 2 * number as u64 + u64::from(op == Op::Read);
                    cell(&folder.0, seed, nodes[from], nodes[to], op, (memory[from], memory[to]))
                })
            })
            .map(|done| done.map(|()| "ok".to_owned()))
            .collect();
        table.row(&[case.what], &outcomes);
    }
    table.close();
}

/// A cluster is told from another by its prefix alone, for both kinds.
#[test]
fn nodes_of_another_cluster_are_not_found() {
    let store = Store::etcd();
    let (name, other) = (v4(free_port()), v4(free_port()));
    let them = Stock::on_host(&name, store.uri());
    them.register(4096);
    let variables = [("MC_TCP_BIND_ADDRESS", "127.0.0.1"), ("MC_METADATA_CLUSTER_ID", "elsewhere")];
    let us = Ours::start(Ours::builder(&other, store.uri(), &variables).fabrics([Fabric::Tcp]));
    us.register(4096);
    let e = us.engine.open_segment(&name).map(|_| ()).unwrap_err().to_string();
    assert!(e.contains(&name), "{e}");
    assert_eq!(them.first(&other), 0, "the stock node's answer for a name that is not there");
}

/// A priority matrix of NICs that this host does not have: neither kind starts on it. That the file counts, and what is in it,
/// shows in the places that a stock engine makes of it, and in the NICs that each misses.
#[test]
fn a_matrix_of_nics_that_are_not_there_is_refused_by_both_kinds() {
    let by_file: Variables<'static> = &[("MC_CUSTOM_TOPO_JSON", MATRIX)];
    let them = Stock::on_host(&v4(free_port()), "P2PHANDSHAKE");
    let seen = them.ask(&json!({"do": "topology", "variables": {"MC_CUSTOM_TOPO_JSON": MATRIX}}));
    let seen = seen.unwrap_or_else(|e| panic!("{e}"));
    assert_eq!(seen["topology"], json!({"cpu:0": [[], []], "cuda:0": [[], []]}));

    let name = v4(free_port());
    let theirs = Stock::try_start(&name, "P2PHANDSHAKE", "tcp", "", by_file).err();
    let ours = Ours::try_start(Ours::builder(&name, "P2PHANDSHAKE", by_file)).err();
    for (kind, said) in [("stock", theirs), ("ours", ours)] {
        let said = said.unwrap_or_else(|| panic!("{kind} starts on NICs that are not there"));
        for word in ["No available RNIC", "rxe0", "rxe1"] {
            assert!(said.contains(word), "{kind} does not say {word}: {said}");
        }
    }
}

/// What it asks a web server, Mooncake's own answers.
#[test]
fn the_doctor_knows_the_stock_http_server() {
    let store = Store::http();
    let mut command = std::process::Command::new(host_support::process::moonrail());
    command.args(["doctor", "--json", "--metadata", store.uri(), "--name", "127.0.0.1"]).envs(LOOPBACK.iter().copied());
    let ended = host_support::process::Process::start("doctor", command).wait(host_support::RUN);
    let report: serde_json::Value = serde_json::from_str(&ended.stdout).expect("JSON");
    let of =
        |check: &str| report["checks"].as_array().and_then(|all| all.iter().find(|c| c["check"] == check).cloned());
    let server = of("metadata server").expect("the check");
    assert_eq!(server["verdict"], "PASS", "{server:#}");
    assert!(server["evidence"].as_str().is_some_and(|text| text.starts_with("keeps a key")), "{server:#}");
}
