//! Two processes of this host, as an operator starts them: every fabric that needs no NIC, and every byte checked.

mod host_support;

use std::time::{Duration, Instant};

use host_support::process::{Ended, Process};
use host_support::{RUN, START, wait_for};
use serde_json::Value;

/// `moonrail serve` without a flag that it does not need; returns the name it can be opened by.
fn serve(flags: &str) -> (Process, String) {
    let mut process = Process::moonrail(&format!("serve {flags}"));
    let name = process.says("listening on ", START);
    (process, name)
}

fn bench(name: &str, flags: &str) -> Ended {
    Process::moonrail(&format!("bench {name} {flags}")).wait(RUN)
}

/// A verified run as JSON.
fn verified(name: &str, flags: &str) -> Value {
    let ended = bench(name, &format!("{flags} --verify --ask-target --json")).expect_ok();
    let json: Value = serde_json::from_str(&ended.stdout).unwrap_or_else(|e| panic!("{e}:\n{}", ended.stdout));
    for run in json["runs"].as_array().expect("runs") {
        assert_eq!(run["verified_bytes"], run["bytes"], "{run}");
    }
    json
}

#[test]
fn with_no_flag_at_all_two_processes_find_each_other_and_use_shared_memory() {
    let (server, name) = serve("");
    let ended = bench(&name, "--iterations 20").expect_ok();
    assert!(ended.stdout.contains("over shm: it runs on this host"), "{}", ended.stdout);
    server.terminate(START).expect_ok();
}

#[test]
fn every_byte_is_right_on_every_fabric_at_every_size() {
    let (server, name) = serve("--fabrics shm,tcp --size 128MiB --verify");
    for fabric in ["shm", "tcp"] {
        let flags = format!("--fabrics shm,tcp --require {fabric} --op both");
        let json = verified(&name, &format!("{flags} --block 64,4000,64KiB,1MiB --batch 16 --iterations 4"));
        assert_eq!(json["ways"][0]["fabric"], fabric, "{json}");
        verified(&name, &format!("{flags} --block 64MiB --batch 1 --iterations 1"));
        // Blocks that lie apart, and many threads.
        verified(&name, &format!("{flags} --block 4KiB --stride 8KiB --batch 32 --threads 8 --iterations 10"));
    }
    let ended = server.terminate(START).expect_ok();
    assert!(!ended.stderr.contains("WARNING"), "{}", ended.stderr);
}

#[test]
fn stock_command_lines_move_bytes_over_tcp() {
    let line = "bench --mode=target --metadata_server=P2PHANDSHAKE --local_server_name=127.0.0.1 --protocol=tcp \
                --buffer_size=33554432";
    let mut target = Process::moonrail(line);
    let name = target.says("listening on ", START);
    for operation in ["read", "write"] {
        let line = format!(
            "bench --mode=initiator --metadata_server=P2PHANDSHAKE --local_server_name=127.0.0.1 --segment_id={name} \
             --protocol=tcp --operation={operation} --threads=2 --batch_size=8 --block_size=65536 --duration=1 \
             --buffer_size=33554432 --verify"
        );
        let ended = Process::moonrail(&line).wait(RUN).expect_ok();
        assert!(ended.stdout.contains("Test completed: duration"), "{}", ended.stdout);
        assert!(ended.stdout.contains("over tcp"), "{}", ended.stdout);
    }
    target.terminate(START).expect_ok();
}

#[test]
fn etcd_in_place_of_no_server_is_one_flag() {
    let port = std::net::TcpListener::bind("127.0.0.1:0").expect("a port").local_addr().expect("bound").port();
    let peer = std::net::TcpListener::bind("127.0.0.1:0").expect("a port").local_addr().expect("bound").port();
    let folder = std::env::temp_dir().join(format!("moonrail-host-etcd-{}", std::process::id()));
    let (client, between) = (format!("http://127.0.0.1:{port}"), format!("http://127.0.0.1:{peer}"));
    let mut command = std::process::Command::new("etcd");
    command
        .arg("--data-dir")
        .arg(&folder)
        .args(["--log-level", "error", "--unsafe-no-fsync"])
        .args(["--listen-client-urls", &client, "--advertise-client-urls", &client])
        .args(["--listen-peer-urls", &between, "--initial-advertise-peer-urls", &between])
        .args(["--initial-cluster", &format!("default={between}")]);
    let etcd = Process::start("etcd", command);
    wait_for("etcd", || std::net::TcpStream::connect(("127.0.0.1", port)).ok());
    let store = format!("--metadata etcd://127.0.0.1:{port}");
    let (server, _) = serve(&format!("{store} --name store-node --verify"));
    let json = verified("store-node", &format!("{store} --name worker-node --block 64KiB --iterations 4"));
    assert_eq!(json["ways"][0]["fabric"], "shm");
    server.terminate(START).expect_ok();
    etcd.kill();
    let _ = std::fs::remove_dir_all(folder);
}

#[test]
fn what_is_required_and_not_there_fails_soon_and_says_why() {
    let (server, name) = serve("--fabrics tcp");
    let started = Instant::now();
    bench(&name, "--fabrics shm,tcp --require shm --iterations 1")
        .expect_error(&["shm is required", "the peer shares no memory"]);
    bench(&name, "--fabrics shm,tcp --require rdma --iterations 1").expect_error(&["no rdma"]);
    assert!(started.elapsed() < Duration::from_secs(10), "{:?}", started.elapsed());
    server.terminate(START).expect_ok();
}

#[test]
fn what_is_preferred_and_not_there_is_replaced_and_that_is_told() {
    let (server, name) = serve("--fabrics tcp --verify");
    let ended = bench(&name, "--fabrics shm,tcp --prefer shm --iterations 4 --verify").expect_ok();
    assert!(ended.stdout.contains("over tcp"), "{}", ended.stdout);
    assert!(ended.stdout.contains("no shm: the peer shares no memory"), "{}", ended.stdout);
    server.terminate(START).expect_ok();
}
