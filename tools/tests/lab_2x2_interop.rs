//! One cluster with stock Mooncake engines over RDMA: two nodes with two Soft-RoCE NICs each.
//!
//! Node 1 drives everything: an engine of ours in this process, a stock one beside it, and one on node 0 by a connection.
//! What a stock node is said to fail at is shown beside its run among its own kind. Starting a stock engine takes an
//! emulated node many seconds, so one story is told with few of them.

#[path = "interop_support/golden.rs"]
mod golden;
mod interop_support;
mod lab_support;
#[path = "interop_support/recorder.rs"]
mod recorder;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::thread;
use std::time::{Duration, Instant};

use golden::{Part, change, get, keep};
use interop_support::{
    ANSWER, Folder, MATRIX, Node, Ours, Starting, Stock, Table, Variables, cell, extent, python, transfer_engine_bench,
    wait_on,
};
use lab_support::process::{Process, etcd, moonrail};
use lab_support::rdma::netdev_bytes;
use lab_support::{Lab, run, setting, wait_for};
use moonrail::Op;
use recorder::{Recorder, Taken};
use serde_json::{Value, json};

/// Where node 0 keeps its stock node for node 1.
const AGENT: (&str, u16) = ("10.0.0.1", 7000);
/// One thread a NIC, since two would starve an emulated node, and time for what starves all the same.
const STOCK: Variables<'static> = &[("MC_WORKERS_PER_CTX", "1"), ("MC_TRANSFER_TIMEOUT", "30")];
const NICS: &str = "rxe0,rxe1";
const ETCD: &str = "etcd://10.0.0.1:2379";
const HTTP: &str = "http://10.0.0.1:8080/metadata";
/// Two emulated nodes start an etcd, a Python server and an engine while the host does something else.
const SLOW: Duration = Duration::from_secs(240);

fn left(test: &str, name: &str, node: u32) -> PathBuf {
    Path::new("/lab/shared").join(test).join(format!("{name}.{node}"))
}

fn patiently(what: &str, mut done: impl FnMut() -> bool) {
    let until = Instant::now() + SLOW;
    while !done() {
        assert!(Instant::now() < until, "{what}: not within {SLOW:?}");
        thread::sleep(Duration::from_millis(50));
    }
}

/// Both stores, for the life of the test program.
fn stores() {
    static RUNNING: OnceLock<(Process, Process)> = OnceLock::new();
    RUNNING.get_or_init(|| {
        let mut command = Command::new(python());
        command.args(["-m", "mooncake.http_metadata_server", "--host", "10.0.0.1", "--port", "8080"]);
        let http = Process::start("mooncake.http_metadata_server", command);
        let etcd = etcd("10.0.0.1");
        patiently("the HTTP store", || std::net::TcpStream::connect("10.0.0.1:8080").is_ok());
        (etcd, http)
    });
}

/// Node 0 keeps stock nodes; node 1 runs the test.
fn on_node_1(name: &str, body: impl FnOnce(&Folder)) {
    let lab = Lab::enter(name);
    if lab.node == 0 {
        stores();
        lab.tell("stores", "");
        wait_on(AGENT, || {
            assert!(!left(name, "failed", 1).exists(), "node 1 failed");
            left(name, "done", 1).exists()
        });
    } else {
        patiently("the stores on node 0", || left(name, "stores", 0).exists());
        let folder = Folder(format!("/lab/shared/{name}/files").into());
        std::fs::create_dir_all(&folder.0).expect("a folder that node 0 sees");
        body(&folder);
        lab.tell("done", "");
    }
    lab.barrier();
}

fn ours(name: &str, metadata: &str) -> Ours {
    ours_with(name, metadata, &[])
}

fn ours_with(name: &str, metadata: &str, variables: Variables) -> Ours {
    let builder = Ours::builder(name, metadata, variables).fabrics([moonrail::Fabric::Rdma]);
    Ours::start(builder.transfer_timeout(Duration::from_secs(60)))
}

fn stock_on_0(name: &str, metadata: &str, more: Variables) -> Starting {
    Stock::elsewhere(AGENT, name, metadata, "rdma", NICS, &[STOCK, more].concat())
}

fn stock_on_1(name: &str, metadata: &str, more: Variables) -> Starting {
    Stock::starting(name, metadata, "rdma", NICS, &[STOCK, more].concat())
}

/// Runs a cell; tells its time and what share of the bytes each NIC of this node has moved.
fn timed(run: impl FnOnce() -> Result<(), String>) -> Result<String, String> {
    let counters = || [netdev_bytes(0), netdev_bytes(1)];
    let (before, began) = (counters(), Instant::now());
    run()?;
    let moved: Vec<u64> = counters().iter().zip(before).map(|(now, then)| now - then).collect();
    let all = moved.iter().sum::<u64>().max(1) as f64;
    let share = |nic: usize| format!("{:.0}", moved[nic] as f64 * 100.0 / all);
    Ok(format!("ok {:.1} s, {}:{} %", began.elapsed().as_secs_f64(), share(0), share(1)))
}

fn word(op: Op) -> &'static str {
    if op == Op::Read { "read" } else { "write" }
}

/// Rails of ours to a peer that have carried bytes of ours, and that were connected by either end.
fn rails(us: &Ours, peer: &str) -> (usize, usize) {
    let rails = us.engine.rails();
    let of = |what: fn(&moonrail::RailInfo) -> bool| rails.iter().filter(|r| r.peer == peer && what(r)).count();
    (of(|r| r.bytes > 0), of(|r| r.lives > 0))
}

/// The net device of a NIC of this node up or down, and the RDMA port with it.
fn set_link(nic: u32, up: bool) {
    run("ip", &["link", "set", &format!("eth{nic}"), if up { "up" } else { "down" }]);
    wait_for("the port's state", || {
        let state = std::fs::read_to_string(format!("/sys/class/infiniband/rxe{nic}/ports/1/state"));
        (state.unwrap_or_default().contains("ACTIVE") == up).then_some(())
    });
}

/// READ and WRITE, both directions and among stock nodes alone, over one store; every rail of ours counts.
fn matrix(
    table: &mut Table,
    folder: &Folder,
    seed: &mut u64,
    store: &str,
    nodes: (&Ours, &Stock, &Stock),
    memory: [u64; 3],
) {
    let (us, them, beside) = nodes;
    for op in [Op::Write, Op::Read] {
        let mut one = |from: (&dyn Node, u64), to: (&dyn Node, u64)| {
            *seed += 1;
            timed(|| cell(&folder.0, *seed, from.0, to.0, op, (from.1, to.1)))
        };
        let outbound = one((us, memory[0]), (them, memory[1]));
        let (used, _) = rails(us, &them.name());
        let inbound = one((them, memory[1]), (us, memory[0]));
        let (_, connected) = rails(us, &them.name());
        let among = one((beside, memory[2]), (them, memory[1]));
        table.row(&[store, word(op)], &[outbound, Ok(used.to_string()), inbound, Ok(connected.to_string()), among]);
    }
    // Slices are pulled: on a starved emulator a rail may find nothing left. Which is why both numbers are shown.
    let (used, connected) = rails(us, &them.name());
    assert!(used >= 2 && connected == 4, "{}", us.engine.explain(&them.name()).join("\n"));
}

const COLUMNS: [&str; 7] =
    ["rdma", "operation", "ours to stock", "rails used", "stock to ours", "rails connected", "stock to stock"];

#[test]
fn a_with_other_stores() {
    on_node_1("interop-stores", |folder| {
        let (mut table, mut seed) = (Table::headed(&COLUMNS), 0);
        for (store, metadata) in [("http", HTTP), ("none (P2P)", "P2PHANDSHAKE")] {
            let began = Instant::now();
            let them = stock_on_0("10.0.0.1:12345", metadata, &[]);
            let beside = stock_on_1("10.0.0.2:12347", metadata, &[]);
            let us = ours("10.0.0.2:12346", metadata);
            let (them, beside) = (them.started(), beside.started());
            println!("{store}: three nodes after {:.1?}", began.elapsed());
            let memory = [us.register(extent()), them.register(extent()), beside.register(extent())];
            matrix(&mut table, folder, &mut seed, store, (&us, &them, &beside), memory);
            us.engine.shutdown(Duration::from_secs(10));
            beside.kill();
            them.kill();
        }
        table.close();
    });
}

/// The file says which NIC is near to what: whoever reads it publishes that, and its NICs in the order that follows from it.
fn same_matrix(names: [String; 3]) {
    let file: Value = serde_json::from_str(&std::fs::read_to_string(MATRIX).expect("the file")).expect("JSON");
    let published = names.map(|name| -> Value {
        serde_json::from_slice(&get(ETCD, &format!("mooncake/ram/{name}"))).unwrap_or_else(|e| panic!("{name}: {e}"))
    });
    let devices = |of: &Value| -> Vec<Value> {
        of["devices"].as_array().expect("devices").iter().map(|device| device["name"].clone()).collect()
    };
    for one in &published {
        println!("{}: {} {:?}", one["name"], one["priority_matrix"], devices(one));
        assert_eq!(one["priority_matrix"], file, "{}", one["name"]);
        assert_eq!(devices(one), devices(&published[1]), "{} numbers its NICs as a stock node", one["name"]);
    }
}

/// With etcd, one story: a priority matrix from a file; every cell; a link of our node down and up again; the stock node killed
/// and back; our node ended and back; both ends that connect at once.
#[test]
fn b_with_etcd_a_link_and_either_end_go_away_and_come_back() {
    const BY_FILE: Variables<'static> = &[("MC_CUSTOM_TOPO_JSON", MATRIX)];
    on_node_1("interop-etcd", |folder| {
        let (mut table, mut seed) = (Table::headed(&COLUMNS), 50);
        let began = Instant::now();
        let them = stock_on_0("10.0.0.1:12345", ETCD, BY_FILE);
        let beside = stock_on_1("10.0.0.2:12347", ETCD, BY_FILE);
        let us = ours_with("10.0.0.2:12346", ETCD, BY_FILE);
        let (them, beside) = (them.started(), beside.started());
        println!("etcd: three nodes after {:.1?}", began.elapsed());
        let (mine, theirs, others) = (us.register(extent()), them.register(extent()), beside.register(extent()));
        same_matrix([us.name(), them.name(), beside.name()]);
        matrix(&mut table, folder, &mut seed, "etcd", (&us, &them, &beside), [mine, theirs, others]);
        let mut one = |from: (&dyn Node, u64), to: (&dyn Node, u64), op: Op| {
            seed += 1;
            timed(|| cell(&folder.0, seed, from.0, to.0, op, (from.1, to.1)))
        };

        let columns = ["rdma, etcd", "operation", "ours to stock", "stock to ours", "stock to stock"];
        let mut faults = Table::headed(&columns);
        // No stock initiator towards a NIC that is down: with its retry count of 7 Soft-RoCE sends for ever, and an emulated
        // node does nothing else any more. Here it is the initiator's own.
        set_link(1, false);
        for op in [Op::Write, Op::Read] {
            let ours = one((&us, mine), (&them, theirs), op);
            let among = one((&beside, others), (&them, theirs), op);
            faults.row(&["eth1 of the initiator down", word(op)], &[ours, Ok("(no)".to_owned()), among]);
        }
        set_link(1, true);
        beside.kill();
        let (began, peer) = (Instant::now(), them.name());
        patiently("a rail of the link that came back", || {
            us.engine.rails().iter().any(|r| r.peer == peer && r.nic == "rxe1" && r.usable)
        });
        println!("a rail of rxe1 is usable {:.1?} after its link came back", began.elapsed());
        let again = [one((&us, mine), (&them, theirs), Op::Write), one((&them, theirs), (&us, mine), Op::Write)];
        faults.row(&["eth1 up again", "write"], &again);

        them.kill();
        let them = stock_on_0("10.0.0.1:12345", ETCD, &[]).started();
        let theirs = them.register(extent());
        let back = [one((&us, mine), (&them, theirs), Op::Write), one((&them, theirs), (&us, mine), Op::Write)];
        faults.row(&["stock killed, back", "write"], &back);

        // A stock node knows our port for life.
        let before = us.engine.rpc_addr();
        us.engine.shutdown(Duration::from_secs(10));
        println!("{}", us.log());
        drop(us);
        let us = ours("10.0.0.2:12346", ETCD);
        assert_eq!(us.engine.rpc_addr(), before, "our old port was free");
        let mine = us.register(extent());
        let back = [one((&us, mine), (&them, theirs), Op::Write), one((&them, theirs), (&us, mine), Op::Write)];
        faults.row(&["ours ended, back", "write"], &back);
        us.engine.shutdown(Duration::from_secs(10));

        for round in 0..4 {
            faults.row(&[&format!("both at once, {round}"), "write"], &at_once(round, &them, theirs));
        }
        them.kill();
        table.close();
        faults.close();
    });
}

/// Both ends start a batch to the other at the same moment, with an engine of ours that is new and so connects.
fn at_once(round: u64, them: &Stock, theirs: u64) -> [Result<String, String>; 2] {
    let us = ours(&format!("10.0.0.2:{}", 12350 + round), ETCD);
    let mine = us.register(1 << 20);
    let half = 1 << 19;
    let moves = |local: u64, remote: u64| -> Vec<_> {
        (0..4).map(|i| (local + (i << 16), remote + (i << 16), 1u64 << 16)).collect()
    };
    us.engine.open_segment(&them.name()).unwrap_or_else(|e| panic!("{e}"));
    them.tell(
        &json!({"do": "transfer", "segment": us.name(), "op": "write", "moves": moves(theirs + half, mine + half)}),
    );
    // The exact moment is up to the emulator: a few of them are tried.
    thread::sleep(Duration::from_millis(15 * round));
    let began = Instant::now();
    let outbound = us.transfer(&them.name(), Op::Write, &moves(mine, theirs));
    let took = began.elapsed();
    let answer = them.answer(ANSWER).unwrap_or_default();
    let inbound = if answer["rc"] == 0 {
        Ok(format!("ok {:.1} s", answer["seconds"].as_f64().unwrap_or(0.0)))
    } else {
        Err(answer.to_string())
    };
    us.engine.shutdown(Duration::from_secs(10));
    [outbound.map(|()| format!("ok {:.1} s", took.as_secs_f64())), inbound]
}

/// The same script as on the host, with our program at one end and the stock one at the other.
#[test]
fn c_bench_stands_in_for_transfer_engine_bench() {
    let lab = Lab::enter("interop-bench");
    let flags = format!("--metadata_server={ETCD} --protocol=rdma --device_name={NICS} --buffer_size=4194304");
    let ours = format!("{} bench", moonrail());
    let stock = transfer_engine_bench().to_string_lossy().into_owned();
    for (round, (target, initiator)) in [(&stock, &ours), (&ours, &stock)].into_iter().enumerate() {
        let (ready, done) = (format!("ready{round}"), format!("done{round}"));
        if lab.node == 0 {
            stores();
            let name = format!("10.0.0.1:{}", 12400 + round);
            let target = start(target, &format!("{flags} --mode=target --local_server_name={name}"));
            patiently("the target's key", || etcd_has(&name));
            lab.tell(&ready, &name);
            patiently("the initiator", || {
                assert!(!left("interop-bench", "failed", 1).exists(), "node 1 failed");
                left("interop-bench", &done, 1).exists()
            });
            let _ = target.terminate(Duration::from_secs(60)).expect_ok();
        } else {
            patiently("the target", || left("interop-bench", &ready, 0).exists());
            let name = lab.hear(&ready, 0);
            for operation in ["read", "write"] {
                let line = format!(
                    "{flags} --mode=initiator --local_server_name=10.0.0.2:{} --segment_id={name} --operation={operation} \
                     --threads=1 --batch_size=4 --block_size=65536 --duration=2 --report_unit=MB",
                    12500 + round
                );
                let ended = start(initiator, &line).wait(SLOW).expect_ok();
                let both = format!("{}{}", ended.stdout, ended.stderr);
                let line = both.lines().find(|l| l.contains("Test completed: duration")).expect("a result line");
                println!("{initiator} {operation}: {}", &line[line.find("Test").unwrap_or(0)..]);
            }
            lab.tell(&done, "");
        }
    }
    lab.barrier();
}

fn start(program: &str, flags: &str) -> Process {
    let mut words = program.split_whitespace();
    let mut command = Command::new(words.next().expect("a program"));
    command.args(words).args(flags.split_whitespace()).env("MC_WORKERS_PER_CTX", "1");
    Process::start(program, command)
}

/// What passes when queue pairs are connected, and what is in the store, is as in the golden cases.
#[test]
fn d_what_passes_is_as_recorded() {
    on_node_1("interop-golden", |_| {
        let them = stock_on_0("10.0.0.1:12345", ETCD, &[]);
        let us = ours("10.0.0.2:12601", ETCD);
        let them = them.started();
        let theirs = them.register(1 << 16);
        let mine = us.register(1 << 16);
        for (kind, name) in [("ours", us.name()), ("stock", them.name())] {
            let keys = [format!("mooncake/rpc_meta/{name}"), format!("mooncake/ram/{name}")];
            let part = |key: &String| -> Part { ('=', [key.as_bytes(), b" ", &get(ETCD, key)].concat()) };
            let about = format!("in etcd, put by {kind}, two RDMA NICs, one buffer");
            keep(&format!("stored-rdma-{kind}"), &about, &keys.each_ref().map(part));
        }
        let recorder = through(&us.name());
        them.transfer(&us.name(), Op::Write, &[(theirs, mine, 64)]).unwrap_or_else(|e| panic!("{e}"));
        connects(&recorder, "stock-to-ours", "type 0 and its ready acknowledgement, a stock engine asks ours");
        us.engine.shutdown(Duration::from_secs(10));

        let us = ours("10.0.0.2:12602", ETCD);
        let mine = us.register(1 << 16);
        let recorder = through(&them.name());
        us.transfer(&them.name(), Op::Write, &[(mine, theirs, 64)]).unwrap_or_else(|e| panic!("{e}"));
        connects(&recorder, "ours-to-stock", "type 0 and its ready acknowledgement, ours asks a stock engine");
        them.kill();

        // One that would rather send notifications over queue pairs: ours says no, and it takes the other way.
        let them = stock_on_0("10.0.0.1:12346", ETCD, &[("MC_USE_RDMA_TWOSIDED", "1")]).started();
        them.register(1 << 16);
        let recorder = through(&us.name());
        them.notify(&us.name(), "nm", "hello").unwrap_or_else(|e| panic!("{e}"));
        patiently("the notification", || us.notifies() == [("nm".to_owned(), "hello".to_owned())]);
        let taken = recorder.taken();
        let asked = taken.iter().find(|taken| says(taken, "__ctrl__")).expect("it asks for a channel");
        keep(
            "control-channel-stock-to-ours",
            "type 0, a stock engine with MC_USE_RDMA_TWOSIDED=1 asks ours",
            &both(asked),
        );
    });
}

fn says(taken: &Taken, words: &str) -> bool {
    String::from_utf8_lossy(&taken.request).contains(words)
}

fn both(taken: &Taken) -> Vec<Part> {
    vec![('>', taken.request.clone()), ('<', taken.reply.clone())]
}

/// Keeps the first hello, and the first acknowledgement.
fn connects(recorder: &Recorder, who: &str, about: &str) {
    let taken = recorder.taken();
    let one = |words| taken.iter().find(|taken| says(taken, words)).unwrap_or_else(|| panic!("no {words}: {taken:?}"));
    let parts = [r#""ready_ack":false"#, r#""ready_ack":true"#].map(|words| both(one(words))).concat();
    keep(&format!("connect-{who}"), about, &parts);
}

/// Whoever dials this node now comes through a proxy of ours.
fn through(name: &str) -> Recorder {
    let mut recorder = None;
    change(ETCD, &format!("mooncake/rpc_meta/{name}"), |value| {
        let host = value["ip_or_host_name"].as_str().expect("a host").to_owned();
        let made = Recorder::of((host.as_str(), value["rpc_port"].as_u64().expect("a port") as u16));
        *value = json!({"ip_or_host_name": "10.0.0.2", "rpc_port": made.port});
        recorder = Some(made);
    });
    recorder.expect("made")
}

/// Whether the segment of this name lists a buffer.
fn etcd_has(name: &str) -> bool {
    let text = String::from_utf8(get(ETCD, &format!("mooncake/ram/{name}"))).unwrap_or_default();
    text.contains(r#""addr":"#)
}

/// By hand, with MOONRAIL_STOCK_LINK=1, for docs/interop.md: a stock initiator whose target's link goes down, first among its own
/// kind, then towards ours. It may not return, and its node may answer nothing any more; so nothing comes after it.
#[test]
fn e_a_link_of_the_target_goes_down_under_a_stock_initiator() {
    const WITHIN: Duration = Duration::from_secs(45);
    if setting("MOONRAIL_STOCK_LINK", 0) == 0 {
        return;
    }
    on_node_1("interop-link", |_| {
        let moves = |local: u64, remote: u64| -> Vec<_> {
            (0..4).map(|i| (local + (i << 16), remote + (i << 16), 1u64 << 16)).collect()
        };
        for own_kind in [true, false] {
            let them = stock_on_0("10.0.0.1:12345", ETCD, &[]);
            let target: Box<dyn Node> = if own_kind {
                Box::new(stock_on_1("10.0.0.2:12347", ETCD, &[]).started())
            } else {
                Box::new(ours("10.0.0.2:12346", ETCD))
            };
            let them = them.started();
            let (local, remote) = (them.register(1 << 20), target.register(1 << 20));
            let say = |what: &str, within: Duration| {
                let began = Instant::now();
                them.tell(
                    &json!({"do": "transfer", "segment": target.name(), "op": "write", "moves": moves(local, remote)}),
                );
                let answer = them.answer(within);
                println!("LINK stock to {}, {what}: {answer:?} after {:.1?}", target.kind(), began.elapsed());
                answer
            };
            for _ in 0..3 {
                say("all well", ANSWER);
            }
            set_link(1, false);
            let mut last = None;
            for round in 0..3 {
                last = say(&format!("eth1 of the target down, batch {round}"), WITHIN);
                if last.is_none() {
                    break;
                }
            }
            set_link(1, true);
            if last.is_none() {
                let (began, late) = (Instant::now(), them.answer(WITHIN));
                println!("LINK and with the link up again: {late:?} after {:.1?}", began.elapsed());
            }
            say("the link up again", WITHIN);
            them.kill();
        }
    });
}
