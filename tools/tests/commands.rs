//! docs/commands.md is what the commands print on a host without RDMA. `UPDATE_DOCS=1` writes it.

mod commands_support;
#[path = "../../control/tests/support/mod.rs"]
mod etcd;
mod host_support;

use std::path::Path;
use std::process::Command;

use commands_support::{Shown, compare, page};
use etcd::EtcdServer;
use host_support::process::{Process, moonrail};
use host_support::{START, wait_for};

const HEAD: &str = "# What the commands print

On a host without an RDMA NIC, where a node offers memory under the name `store-a` and its metadata is in etcd. Made by the commands
themselves; `cargo test -p moonrail-tools --test commands` compares it, and writes it anew with `UPDATE_DOCS=1`. Figures are of a small
virtual machine that did other things meanwhile: see [performance.md](performance.md) for measured ones. Log lines, which go to stderr, are left out.
";

#[test]
fn the_page_is_what_the_commands_print() {
    let server = EtcdServer::start();
    let metadata = format!("etcd://{}", server.endpoint());
    let inspect = std::env::temp_dir().join(format!("mr-commands-{}", std::process::id()));
    let settings = [("MC_TCP_BIND_ADDRESS", "127.0.0.1"), ("MOONRAIL_INSPECT", inspect.to_str().expect("ASCII"))];
    let node = format!("--metadata {metadata}");
    let serve = format!("serve {node} --name store-a --size 4MiB --cores 1");
    let mut command = Command::new(moonrail());
    command.args(serve.split_whitespace()).envs(settings);
    let mut store = Process::start("serve", command);
    let listening = format!("listening on {}\n", store.says("listening on ", START));
    let run = |line: &str| Shown::run(line, &settings);
    let visitor = format!("{node} --name 127.0.0.1 --cores 1");
    // Somebody to watch.
    let mut command = Command::new(moonrail());
    command.args(format!("bench store-a {visitor} --rail tcp --duration 60s").split_whitespace()).envs(settings);
    let busy = Process::start("bench", command);
    let pid = busy.pid().to_string();
    let watched = wait_for("bytes that move", || {
        let top = Shown::run(&format!("top {pid} --once --interval 500ms"), &settings);
        top.has("up").then_some(top)
    });
    busy.terminate(START);
    let shown = [
        run("nics"),
        run("topology --cores 1"),
        Shown::run("doctor", &settings[1..]),
        Shown::told(&serve, &listening),
        run(&format!("ping store-a {visitor} --count 200 --write")),
        run(&format!("bench store-a {visitor} --op both --block 4KiB..1MiB --batch 4 --iterations 50 --plot")),
        run(&format!("bench store-a {visitor} --block 64KiB,1MiB --batch 1 --iterations 50 --rail tcp --csv")),
        run(&format!("segments ls {node}")),
        run(&format!("segments show store-a {node}")),
        run(&format!("segments prune {node}")),
        run("incidents"),
        watched,
        run("bench 127.0.0.1:1 --cores 1 --iterations 1"),
    ];
    let whole = page(
        HEAD,
        &shown,
        &[(&metadata, "etcd://10.0.0.1:2379"), (&server.endpoint(), "10.0.0.1:2379"), (&pid, "4711")],
    );
    store.terminate(START).expect_ok();
    let _ = std::fs::remove_dir_all(&inspect);
    compare(Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/commands.md")), &whole);
}
