//! One cluster with stock Mooncake engines, on this host over TCP: every store, both directions, READ and WRITE. Each cell
//! stands beside the same one among stock nodes only, so that what fails there is not blamed on us, or on them.

mod host_support;
mod interop_support;
#[path = "interop_support/stores.rs"]
mod stores;

use host_support::ports::free_port;
use interop_support::{Folder, LOOPBACK, Node, Ours, Stock, Table, cell, extent};
use moonrail::{Fabric, Op};
use stores::Store;

fn ours(name: &str, store: &Store) -> Ours {
    Ours::start(Ours::builder(name, store.uri(), LOOPBACK).fabrics([Fabric::Tcp]))
}

fn loopback_name() -> String {
    format!("127.0.0.1:{}", free_port())
}

#[test]
fn every_store_both_directions_reads_and_writes() {
    let folder = Folder::new("interop-matrix");
    let mut table = Table::headed(&["tcp, metadata", "operation", "ours to stock", "stock to ours", "stock to stock"]);
    let mut seed = 0;
    for (name, store) in [("etcd", Store::etcd()), ("http", Store::http()), ("none (P2P)", Store::none())] {
        let us = ours(&loopback_name(), &store);
        let them = Stock::on_host(&loopback_name(), store.uri());
        let third = Stock::on_host(&loopback_name(), store.uri());
        let nodes: [&dyn Node; 3] = [&us, &them, &third];
        let memory = nodes.map(|node| node.register(extent()));
        for op in [Op::Write, Op::Read] {
            let outcomes: Vec<_> = [(0, 1), (1, 0), (1, 2)]
                .iter()
                .map(|&(from, to): &(usize, usize)| {
                    seed += 1;
                    let first = nodes[from].first(&nodes[to].name());
                    assert_eq!(first, memory[to], "the address it published is the one it was told");
                    cell(&folder.0, seed, nodes[from], nodes[to], op, (memory[from], memory[to]))
                        .map(|()| "ok".to_owned())
                })
                .collect();
            table.row(&[name, if op == Op::Read { "read" } else { "write" }], &outcomes);
        }
    }
    table.close();
}

/// Two of ours and a stock one, then the reverse: everyone to everyone, and a message each.
#[test]
fn three_nodes_of_both_kinds_reach_each_other() {
    let folder = Folder::new("interop-three");
    let store = Store::etcd();
    let mut table = Table::headed(&["tcp, etcd, three nodes", "from", "to", "write", "read", "notify"]);
    let mut seed = 100;
    for stock in 1..=2 {
        let nodes: Vec<Box<dyn Node>> = (0..3)
            .map(|i| -> Box<dyn Node> {
                if i < stock {
                    Box::new(Stock::on_host(&loopback_name(), store.uri()))
                } else {
                    Box::new(ours(&loopback_name(), &store))
                }
            })
            .collect();
        let memory: Vec<u64> = nodes.iter().map(|node| node.register(extent())).collect();
        for (i, from) in nodes.iter().enumerate() {
            for (k, to) in nodes.iter().enumerate().filter(|(k, _)| *k != i) {
                let mut outcomes: Vec<Result<String, String>> = [Op::Write, Op::Read]
                    .into_iter()
                    .map(|op| {
                        seed += 1;
                        cell(&folder.0, seed, &**from, &**to, op, (memory[i], memory[k])).map(|()| "ok".to_owned())
                    })
                    .collect();
                let message = (format!("from {i}"), "ünïcode \" and \\ and \n".to_owned());
                let sent = from.notify(&to.name(), &message.0, &message.1);
                outcomes.push(sent.and_then(|()| match to.notifies() {
                    seen if seen == [message] => Ok("ok".to_owned()),
                    seen => Err(format!("{seen:?}")),
                }));
                let kinds = [format!("{} {i}", from.kind()), format!("{} {k}", to.kind())];
                table.row(&[&format!("{stock} stock"), &kinds[0], &kinds[1]], &outcomes);
            }
        }
    }
    table.close();
}
