//! docs/commands-lab.md is what the commands print where there are RDMA NICs: two nodes with two Soft-RoCE NICs each.
//! `MOONRAIL_UPDATE_DOCS=/lab/shared`, with `--out`, writes it anew.

use std::path::Path;
use std::process::Command;

use super::commands_support::{Shown, compare, page};
use super::lab_support::process::{Process, etcd, moonrail};
use super::lab_support::{Lab, wait_for};
use super::{END, READY};

const HEAD: &str = "# What the commands print with RDMA NICs

On a node of the lab with two Soft-RoCE NICs, `rxe0` and `rxe1`; another one offers memory under the name `store-a`, and metadata is in etcd.
Made by the commands themselves in an emulator, whose speed says nothing; the test `lab_2x2` compares it (testing.md has how to write it anew).
On a host without such a NIC: [commands.md](commands.md).
";

const METADATA: &str = "--metadata etcd://10.0.0.1:2379";

#[test]
fn a_page_of_what_the_commands_print() {
    let lab = Lab::enter("page");
    let serve = format!("serve {METADATA} --name store-a --size 4MiB --cores 1");
    if lab.node == 0 {
        let _etcd = etcd("10.0.0.1");
        let mut store = Process::moonrail(&serve);
        lab.tell("listening", &store.says("listening on ", READY));
        lab.hear("done", 1);
        store.terminate(END).expect_ok();
    } else {
        let listening = format!("listening on {}\n", lab.hear("listening", 0));
        let run = |line: &str| Shown::run(line, &[]);
        let visitor = format!("{METADATA} --name 10.0.0.2 --cores 1");
        let one_rail = format!("bench store-a {visitor} --rail rxe0=rxe0");
        let mut command = Command::new(moonrail());
        command.args(format!("{one_rail} --duration 60s").split_whitespace());
        let busy = Process::start("bench", command);
        let pid = busy.pid().to_string();
        let watched = wait_for("bytes that move", || {
            let top = run(&format!("top {pid} --once --interval 500ms"));
            top.has("up").then_some(top)
        });
        busy.terminate(END);
        let shown = [
            run("nics"),
            run("topology --cores 1"),
            Shown::told(&serve, &listening),
            run(&format!("doctor store-a {METADATA} --name 10.0.0.2")),
            run(&format!("ping store-a {visitor} --count 20")),
            run(&format!("bench store-a {visitor} --op both --block 64KiB,1MiB --batch 4 --iterations 2")),
            run(&format!("{one_rail} --block 64KiB --batch 4 --iterations 8")),
            run(&format!("segments show store-a {METADATA}")),
            watched,
        ];
        let whole = page(HEAD, &shown, &[(&pid, "4711")]);
        lab.tell("done", "");
        compare(Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/commands-lab.md")), &whole);
    }
    lab.barrier();
}
