//! What a stock engine and ours really say to each other over TCP, taken by a proxy between the two: the golden cases in
//! `control/tests/golden` still are what passes. `MOONRAIL_GOLDEN=FOLDER`
//! writes them.

#[path = "interop_support/golden.rs"]
mod golden;
mod host_support;
mod interop_support;
#[path = "interop_support/recorder.rs"]
mod recorder;
#[path = "interop_support/stores.rs"]
mod stores;

use std::thread;
use std::time::Duration;

use golden::{Part, change, get, keep};
use host_support::ports::free_port;
use host_support::wait_for;
use interop_support::{LOOPBACK, Node, Ours, Stock};
use moonrail::{Fabric, Op};
use recorder::{Recorder, Taken};
use serde_json::json;
use stores::Store;

const BYTES: &[u8; 16] = b"sixteen of these";

fn ours(name: &str, store: &Store, v1: bool) -> Ours {
    let mut variables = LOOPBACK.to_vec();
    variables.extend(v1.then_some(("MC_TCP_PROTO", "1")));
    Ours::start(Ours::builder(name, store.uri(), &variables).fabrics([Fabric::Tcp]))
}

fn stock(name: &str, store: &Store, v1: bool) -> Stock {
    let mut variables = LOOPBACK.to_vec();
    variables.extend(v1.then_some(("MC_TCP_PROTO", "1")));
    Stock::start(name, store.uri(), "tcp", "", &variables)
}

/// The connections on which something passed, when what was asked for is over.
fn passed(recorder: &Recorder) -> Vec<Taken> {
    wait_for("what passes", || recorder.taken().iter().any(|taken| !taken.reply.is_empty()).then_some(()));
    thread::sleep(Duration::from_millis(100));
    recorder.taken().into_iter().filter(|taken| !taken.request.is_empty()).collect()
}

fn both(taken: &Taken) -> Vec<Part> {
    vec![('>', taken.request.clone()), ('<', taken.reply.clone())]
}

fn port(address: &str) -> u16 {
    address.rsplit_once(':').and_then(|(_, port)| port.parse().ok()).expect("a port")
}

/// Without a store: one exchange of descriptors, through the proxy, whose port is the name that is opened.
#[test]
fn descriptors_from_peer_to_peer() {
    let store = Store::none();
    let (us, them) = (ours("127.0.0.1", &store, false), stock("127.0.0.1", &store, false));
    us.register(4096);
    them.register(4096);
    let recorder = Recorder::of(("127.0.0.1", port(&us.name())));
    them.first(&format!("127.0.0.1:{}", recorder.port));
    keep(
        "metadata-stock-to-ours",
        "type 1, a stock engine asks ours, P2PHANDSHAKE, TCP only",
        &both(&passed(&recorder)[0]),
    );
    let recorder = Recorder::of(("127.0.0.1", port(&them.name())));
    us.first(&format!("127.0.0.1:{}", recorder.port));
    keep(
        "metadata-ours-to-stock",
        "type 1, ours asks a stock engine, P2PHANDSHAKE, TCP only",
        &both(&passed(&recorder)[0]),
    );
}

/// With etcd: the address is changed to the proxy's after the node has published it.
#[test]
fn notifications_probes_and_what_is_stored() {
    let store = Store::etcd();
    let (us, them) = (ours("node-a", &store, false), stock("node-b", &store, false));
    us.register(4096);
    them.register(4096);
    for (kind, name) in [("ours", "node-a"), ("stock", "node-b")] {
        let keys = [format!("mooncake/rpc_meta/{name}"), format!("mooncake/ram/{name}")];
        let parts: Vec<Part> =
            keys.iter().map(|key| ('=', [key.as_bytes(), b" ", &get(store.uri(), key)].concat())).collect();
        keep(&format!("stored-tcp-{kind}"), &format!("in etcd, put by {kind}, TCP only, one buffer"), &parts);
    }
    let through = |name: &str| {
        let mut recorder = None;
        change(store.uri(), &format!("mooncake/rpc_meta/{name}"), |value| {
            let made = Recorder::of(("127.0.0.1", value["rpc_port"].as_u64().expect("a port") as u16));
            value["rpc_port"] = json!(made.port);
            recorder = Some(made);
        });
        recorder.expect("made")
    };
    let recorder = through("node-a");
    them.notify("node-a", "nm", "hello").expect("it is taken");
    assert_eq!(us.notifies(), [("nm".to_owned(), "hello".to_owned())]);
    keep("notify-stock-to-ours", "type 2, a stock engine tells ours", &both(&passed(&recorder)[0]));
    assert_eq!(them.ask(&json!({"do": "probe", "segment": "node-a"})).expect("an answer")["rc"], 0);
    keep("probe-stock-to-ours", "type 3, a stock engine asks ours", &both(passed(&recorder).last().expect("one")));
    let recorder = through("node-b");
    us.notify("node-b", "nm", "hello").expect("it is taken");
    assert_eq!(them.notifies(), [("nm".to_owned(), "hello".to_owned())]);
    keep("notify-ours-to-stock", "type 2, ours tells a stock engine", &both(&passed(&recorder)[0]));
    us.engine.open_segment("node-b").expect("there").probe(Duration::from_secs(5)).expect("there");
    keep("probe-ours-to-stock", "type 3, ours asks a stock engine", &both(passed(&recorder).last().expect("one")));
}

/// A WRITE of sixteen bytes and a READ of them, in both versions, both ways: one connection, the proxy's port in the
/// target's descriptor.
#[test]
fn data_both_ways_in_both_versions() {
    for v1 in [false, true] {
        let store = Store::etcd();
        let (us, them) = (ours("node-a", &store, v1), stock("node-b", &store, v1));
        let memory = [us.register(4096), them.register(4096)];
        let version = if v1 { "v1" } else { "v2" };
        let nodes: [(&dyn Node, &str); 2] = [(&us, "ours"), (&them, "stock")];
        for (from, to) in [(1, 0), (0, 1)] {
            let mut recorder = None;
            let target = nodes[to].0.name();
            change(store.uri(), &format!("mooncake/ram/{target}"), |value| {
                let made = Recorder::of(("127.0.0.1", value["tcp_data_port"].as_u64().expect("a port") as u16));
                value["tcp_data_port"] = json!(made.port);
                recorder = Some(made);
            });
            let recorder = recorder.expect("made");
            let file = std::env::temp_dir().join(format!("moonrail-golden-{}-{}", std::process::id(), free_port()));
            std::fs::write(&file, BYTES).expect("a file");
            nodes[from].0.load(memory[from], &file);
            for op in [Op::Write, Op::Read] {
                nodes[from]
                    .0
                    .transfer(&target, op, &[(memory[from], memory[to], 16)])
                    .unwrap_or_else(|e| panic!("{e}"));
                wait_for("the bytes", || nodes[to].0.compare(memory[to], &file).is_none().then_some(()));
            }
            let _ = std::fs::remove_file(file);
            let name = format!("data-{version}-{}-to-{}", nodes[from].1, nodes[to].1);
            let about = format!(
                "TCP data, version {}, {} WRITEs 16 bytes to {} and READs them",
                &version[1..],
                nodes[from].1,
                nodes[to].1
            );
            let parts: Vec<Part> =
                passed(&recorder).iter().flat_map(both).filter(|(_, bytes)| !bytes.is_empty()).collect();
            keep(&name, &about, &parts);
        }
    }
}
