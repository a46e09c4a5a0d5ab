//! Nodes of both kinds that die, come back under their name, or claim a name that another one has. Ours keeps its promises
//! whatever a stock node does; a stock node is never left worse than with its own kind, which stands beside it.

mod host_support;
mod interop_support;
#[path = "interop_support/stores.rs"]
mod stores;

use std::time::{Duration, Instant};

use host_support::process::Process;
use host_support::{START, wait_for};
use interop_support::{ANSWER, Folder, LOOPBACK, Node, Ours, Stock, Table, cell, extent};
use moonrail::{Fabric, Op, Transfer, WaitError};
use serde_json::json;
use stores::Store;

/// For a batch to end after its peer was killed. Recorded, not promised: the promise is asserted in virtual time.
const BOUND: Duration = Duration::from_secs(15);
const MIB: u64 = 1 << 20;

fn ours(name: &str, store: &Store) -> Ours {
    Ours::start(builder(name, store))
}

fn builder(name: &str, store: &Store) -> moonrail::EngineBuilder {
    Ours::builder(name, store.uri(), LOOPBACK).fabrics([Fabric::Tcp])
}

/// `moonrail serve` in a process of its own, which can be killed, and the address of its memory.
fn serve(name: &str, store: &Store) -> (Process, u64) {
    let line = format!("serve --metadata {} --name {name} --fabrics tcp --size 16MiB --cores 1 --json", store.uri());
    let mut command = std::process::Command::new(host_support::process::moonrail());
    command.args(line.split_whitespace()).envs(LOOPBACK.iter().copied());
    let mut process = Process::start("moonrail serve", command);
    let rest = process.says("{\"buffers\":[{\"addr\":", START);
    let digits: String = rest.chars().take_while(char::is_ascii_digit).collect();
    (process, digits.parse().expect("an address"))
}

/// A target of either kind, in a process that can be killed.
enum Target {
    Ours(Process),
    Stock(Stock),
}

impl Target {
    fn start(ours: bool, name: &str, store: &Store) -> (Self, u64) {
        if ours {
            let (process, addr) = serve(name, store);
            return (Self::Ours(process), addr);
        }
        let node = Stock::on_host(name, store.uri());
        let addr = node.register(16 * MIB);
        (Self::Stock(node), addr)
    }

    fn kill(self) {
        match self {
            Self::Ours(process) => process.kill(),
            Self::Stock(node) => node.kill(),
        }
    }
}

#[test]
fn a_stock_target_killed_under_ours_ends_the_batch_and_serves_again_when_back() {
    let (folder, store) = (Folder::new("interop-target-dies"), Store::etcd());
    let us = ours("initiator", &store);
    let mine = us.register(16 * MIB);
    let mut them = Stock::on_host("target", store.uri());
    for (round, op) in [Op::Write, Op::Read, Op::Write].into_iter().enumerate() {
        let theirs = them.register(16 * MIB);
        cell(&folder.0, round as u64, &us, &them, op, (mine, theirs)).unwrap_or_else(|e| panic!("{e}"));
        let segment = us.engine.open_segment("target").expect("it is there");
        let all = [Transfer { op, local: mine, remote: theirs, len: 16 * MIB }];
        let submit = || us.engine.submit(&segment, &all).unwrap_or_else(|e| panic!("{e}"));
        submit().wait(ANSWER).expect("it moves");
        // Enough of them that the kill comes in the middle.
        let batches: Vec<_> = (0..40).map(|_| submit()).collect();
        let killed = Instant::now();
        them.kill();
        let failed = batches.iter().filter(|batch| match batch.wait(BOUND) {
            Ok(()) => false,
            Err(WaitError::Failed(_)) => true,
            Err(e) => panic!("{e}"),
        });
        println!(
            "{op:?}: {} of 40 batches failed, the last ended {:.2?} after the kill",
            failed.count(),
            killed.elapsed()
        );
        them = Stock::on_host("target", store.uri());
    }
}

#[test]
fn a_stock_initiator_is_not_worse_off_with_ours_than_with_its_own_kind() {
    let mut table = Table::headed(&["tcp, etcd", "killed in mid-transfer", "the next transfer", "after it came back"]);
    let mut noticed = Vec::new();
    for is_ours in [false, true] {
        let store = Store::etcd();
        let them = Stock::on_host("initiator", store.uri());
        let local = them.register(16 * MIB);
        let (target, remote) = Target::start(is_ours, "target", &store);
        them.tell(&json!({"do": "mix", "segment": "target", "local": local, "remote": remote, "length": 16 * MIB,
            "block": MIB, "seconds": 60}));
        std::thread::sleep(Duration::from_millis(700));
        let killed = Instant::now();
        target.kill();
        let answer = them.answer(ANSWER).expect("a stock batch ends");
        let took = killed.elapsed();
        assert_ne!(answer["rc"], 0, "{answer}");
        assert!(answer["rounds"].as_u64() > Some(1), "it was moving: {answer}");
        let next = Instant::now();
        let moves = [(local, remote, MIB)];
        let at_once = them.transfer("target", Op::Write, &moves);
        let (at_once, took_at_once) = (at_once.is_ok(), next.elapsed());
        assert!(!at_once, "nobody is there");
        let (target, remote) = Target::start(is_ours, "target", &store);
        let back = Instant::now();
        let mut again = Err(String::new());
        while again.is_err() && back.elapsed() < BOUND {
            again = them.transfer("target", Op::Write, &[(local, remote, MIB)]);
        }
        noticed.push((took, again.is_ok()));
        let kind = if is_ours { "stock to ours" } else { "stock to stock" };
        let outcomes = [
            Ok(format!("failed {:.2} s after", took.as_secs_f64())),
            Ok(format!("failed in {:.2} s", took_at_once.as_secs_f64())),
            Ok(if again.is_ok() {
                format!("ok {:.2} s later", back.elapsed().as_secs_f64())
            } else {
                "fails".to_owned()
            }),
        ];
        table.row(&[kind], &outcomes);
        target.kill();
    }
    table.close();
    let [(among, among_again), (with_us, with_us_again)] = noticed[..] else { panic!("two rounds") };
    assert!(with_us < among + Duration::from_secs(5), "{with_us:?} and {among:?}");
    assert!(with_us_again || !among_again, "it works among its own kind only");
}

#[test]
fn ours_comes_back_on_its_old_port() {
    let store = Store::etcd();
    // Orderly, and after a kill while its keys are still there.
    let first = ours("worker", &store).engine.rpc_addr();
    let second = ours("worker", &store).engine.rpc_addr();
    assert_eq!(first, second);
    serve("worker", &store).0.kill();
    let us = ours("worker", &store);
    assert_eq!(us.engine.rpc_addr(), first);
    assert_ne!(ours("another", &store).engine.rpc_addr(), first);
    // A stock node that knew the first one's port reaches the third.
    let them = Stock::on_host("stock", store.uri());
    them.register(4096);
    assert_eq!(them.ask(&json!({"do": "probe", "segment": "worker"})).expect("an answer")["rc"], 0);
    drop(us);
    let us = ours("worker", &store);
    us.register(4096);
    them.notify("worker", "still", "there").expect("its cached address is right");
    assert_eq!(us.notifies(), [("still".to_owned(), "there".to_owned())]);
}

#[test]
fn a_name_that_a_live_node_has_is_an_error_that_names_it() {
    for store in [Store::etcd(), Store::http()] {
        let them = Stock::on_host("taken", store.uri());
        let theirs = them.register(extent());
        let e = Ours::try_start(builder("taken", &store)).err().expect("somebody has the name");
        assert!(e.contains("another node publishes itself as taken") && e.contains("answers at 127.0.0.1:"), "{e}");
        // The owner has lost nothing by it.
        let us = ours("free", &store);
        assert_eq!(us.first("taken"), theirs, "its keys are untouched");
        // Of ours, too.
        let e = Ours::try_start(builder("free", &store)).err().expect("we have the name");
        assert!(e.contains("another node publishes itself as free"), "{e}");
        // What a crash leaves behind is no owner. (A stock node leaves its keys for ever.)
        them.kill();
        let us = ours("taken", &store);
        println!("{}", us.log());
    }
}

/// A stock node takes a name without asking, and its end deletes keys that are not its own: both are its way. Ours says so,
/// and is found again.
#[test]
fn ours_is_found_again_after_a_stock_node_took_its_name_and_ended() {
    let folder = Folder::new("interop-usurped");
    let mut table = Table::headed(&["tcp", "found again by a stock node after"]);
    for (name, store) in [("etcd", Store::etcd()), ("http", Store::http())] {
        let us = ours("usurped", &store);
        let mine = us.register(extent());
        match Stock::try_start("usurped", store.uri(), "tcp", "", LOOPBACK) {
            Ok(usurper) => {
                wait_for("our log", || us.log().contains("another process publishes itself as usurped").then_some(()));
                usurper.end();
            }
            Err(log) => assert!(log.contains("Duplicate rpc_meta"), "{log}"),
        }
        let gone = Instant::now();
        let them = Stock::on_host("other", store.uri());
        let theirs = them.register(extent());
        wait_for("our segment", || (them.first("usurped") == mine).then_some(()));
        let took = gone.elapsed();
        let moved = cell(&folder.0, 7, &them, &us, Op::Write, (theirs, mine));
        table.row(&[name], &[moved.map(|()| format!("{:.1} s", took.as_secs_f64()))]);
    }
    table.close();
}
