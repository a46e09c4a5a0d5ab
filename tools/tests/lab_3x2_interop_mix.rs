//! One cluster of three, for as long as one likes: a stock Mooncake engine and two of ours move bytes to and from each other at
//! the same time, over two NICs each, and all of them are compared.
//!
//! ```text
//!   node 0: etcd, a stock engine ◀──▶ node 1: ours ◀──▶ node 2: ours, NICs under other names ◀──▶ node 0
//! ```
//! MOONRAIL_MIX_SECONDS says how long (`cargo xtask soak mix`: 600).

mod interop_support;
mod lab_support;

use std::sync::Arc;
use std::time::{Duration, Instant};

use interop_support::{ANSWER, Node, Ours, Stock, Variables};
use lab_support::process::etcd;
use lab_support::traffic::{Done, PEER_BYTES, Traffic};
use lab_support::{Lab, result, run, setting};
use moonrail::{Fabric, Segment};
use serde_json::{Value, json};

const ETCD: &str = "etcd://10.0.0.1:2379";
/// One thread a NIC, since two would starve an emulated node, and time for what starves all the same.
const STOCK: Variables<'static> = &[("MC_WORKERS_PER_CTX", "1"), ("MC_TRANSFER_TIMEOUT", "60")];
/// Each node offers a room to every node, its own unused.
const OFFERED: u64 = 3 * PEER_BYTES;
/// The stock engine turns from one of ours to the other so often.
const TURN: Duration = Duration::from_secs(5);
/// Of a batch of ours: a stock peer proves that nothing lands late only by connecting anew, which takes a starved node long.
const DEADLINE: Duration = Duration::from_secs(60);
const BLOCK: u64 = 64 << 10;
/// Three emulated nodes start an etcd, a Python interpreter and three engines.
const SLOW: Duration = Duration::from_secs(240);

fn name(node: u32) -> String {
    format!("10.0.0.{}:{}", node + 1, 12345 + node)
}

#[test]
fn one_stock_node_and_two_of_ours_move_bytes_all_to_all() {
    let lab = Lab::enter("interop-mix");
    let time = Duration::from_secs(setting("MOONRAIL_MIX_SECONDS", 30));
    if lab.node == 0 { stock(&lab, time) } else { ours(&lab, time) }
}

/// Node 0: drives its stock engine, and sums up.
fn stock(lab: &Lab, time: Duration) {
    let _etcd = etcd("10.0.0.1");
    lab.tell("store", "");
    let stock = Stock::start(&name(0), ETCD, "rdma", "rxe0,rxe1", STOCK);
    let (offered, local) = (stock.register(OFFERED), stock.register(PEER_BYTES));
    lab.tell("ready", &offered.to_string());
    let bases = [1, 2].map(|node| {
        let base = lab.hear_within("ready", node, SLOW);
        (node, base.parse::<u64>().unwrap_or_else(|e| panic!("{base:?}: {e}")))
    });
    lab.barrier();
    let (began, mut rounds, mut failed, mut turns) = (Instant::now(), [0; 3], 0, bases.iter().cycle());
    while began.elapsed() < time {
        let (node, base) = turns.next().expect("for ever");
        let turn = TURN.min(time.saturating_sub(began.elapsed())).max(Duration::from_secs(1));
        let asked = json!({"do": "mix", "segment": name(*node), "local": local, "remote": base, "length": PEER_BYTES,
            "block": BLOCK, "seconds": turn.as_secs_f64()});
        let done = stock.ask(&asked).unwrap_or_else(|e| panic!("{e}"));
        assert_ne!(done["wrong"], true, "stock to {}: {done}\n{}", name(*node), stock.log());
        // Its batches have a limit that a starved machine may pass; it stops at the first, and its next turn begins anew.
        failed += u64::from(done["rc"] != 0);
        rounds[*node as usize] += done["rounds"].as_u64().unwrap_or(0) - u64::from(done["rc"] != 0);
    }
    let seconds = began.elapsed().as_secs_f64();
    let said = [1, 2].map(|node| -> Value {
        let text = lab.hear_within("done", node, ANSWER);
        serde_json::from_str(&text).unwrap_or_else(|e| panic!("{text:?}: {e}"))
    });
    let megabytes = |rounds: u64| (rounds * PEER_BYTES) as f64 / 1e6;
    let line = json!({
        "mix": "a stock node and two of ours, three nodes with two NICs each",
        "seconds": seconds.round(),
        "stock_to_ours_1_MB": megabytes(rounds[1]),
        "stock_to_ours_2_MB": megabytes(rounds[2]),
        "stock_batches_failed": failed,
        "ours_1_to_stock": said[0]["to_stock"],
        "ours_1_to_ours_2": said[0]["to_ours"],
        "ours_1_incidents": said[0]["incidents"],
        "ours_2_to_stock": said[1]["to_stock"],
        "ours_2_to_ours_1": said[1]["to_ours"],
        "ours_2_incidents": said[1]["incidents"],
    });
    println!("mix: {line:#}");
    result(&line);
    assert!(rounds[1] > 0 && rounds[2] > 0, "the stock node moved bytes to both: {rounds:?}");
    lab.barrier();
    let _ = stock.end();
    lab.barrier();
}

/// Nodes 1 and 2: bytes to and from both others, without a pause.
fn ours(lab: &Lab, time: Duration) {
    if lab.node == 2 {
        // Names are a node's own affair.
        for (nic, other) in [("rxe0", "roce_a"), ("rxe1", "roce_b")] {
            run("rdma", &["dev", "set", nic, "name", other]);
        }
    }
    lab.hear_within("store", 0, SLOW);
    let builder = Ours::builder(&name(lab.node), ETCD, &[]).fabrics([Fabric::Rdma]).log(|_, _| {});
    let engine = Arc::new(builder.build().unwrap_or_else(|e| panic!("{e}")));
    let offered = engine.allocate(OFFERED as usize, "*").unwrap_or_else(|e| panic!("{e}"));
    lab.tell("ready", &offered.addr().to_string());
    let peers = [0, 3 - lab.node].map(|node| {
        lab.hear_within("ready", node, SLOW);
        engine.open_segment(&name(node)).unwrap_or_else(|e| panic!("{}: {e}", name(node)))
    });
    lab.barrier();
    let room = u64::from(lab.node) * PEER_BYTES;
    let traffic = peers.each_ref().map(|peer| Traffic::start(&engine, peer, room, DEADLINE));
    std::thread::sleep(time);
    let done = traffic.map(Traffic::end);
    let line = |peer: &Segment, done: &Done| {
        let rails = engine.rails();
        let of_peer: Vec<String> = rails
            .iter()
            .filter(|rail| rail.peer == peer.name() && rail.bytes > 0)
            .map(|rail| format!("{}-{}", rail.nic, rail.peer_nic))
            .collect();
        format!(
            "{:.1} MB in {} batches, {} errors, {} wrong bytes, slowest {} ms, over {}",
            done.bytes as f64 / 1e6,
            done.batches,
            done.errors.len(),
            done.wrong,
            done.slowest.as_millis(),
            of_peer.join(" ")
        )
    };
    let [to_stock, to_ours] = [0, 1].map(|at| line(&peers[at], &done[at]));
    let incidents = engine.incidents().len();
    lab.tell("done", &json!({"to_stock": to_stock, "to_ours": to_ours, "incidents": incidents}).to_string());
    for (peer, done) in peers.iter().zip(&done) {
        assert_eq!((done.wrong, done.errors.as_slice()), (0, &[][..]), "to {}: {:?}", peer.name(), engine.incidents());
        assert!(done.batches > 0, "nothing moved to {}", peer.name());
    }
    lab.barrier();
    drop(peers);
    assert!(engine.shutdown(Duration::from_secs(15)), "the engine gave everything back");
    lab.barrier();
}
