//! The whole engine on real verbs: two nodes with two NICs each, so four rails.
//!
//! Node 0 offers memory, node 1 moves bytes, mostly as real processes; every byte is checked, and every rail must have
//! carried its share, by our counters and by the devices' own.

mod commands_support;
mod lab_support;

#[path = "lab_2x2/engines.rs"]
mod engines;
#[path = "lab_2x2/page.rs"]
mod page;

use std::time::{Duration, Instant};

use lab_support::Lab;
use lab_support::process::{Process, etcd, moonrail};
use lab_support::rdma::netdev_bytes;
use serde_json::Value;

/// Start-up of a process on an emulated node that is busy with something else.
const READY: Duration = Duration::from_secs(40);
/// A run of some megabytes between emulated nodes takes seconds; more than this is a hang.
const RUN: Duration = Duration::from_secs(120);
const END: Duration = Duration::from_secs(30);
/// What each of four rails must have carried of all bytes.
const SHARE: f64 = 0.10;

/// Every size, in both directions; with what verification reads back, about 100 MB.
const SIZES: [u64; 4] = [4 << 10, 64 << 10, 1 << 20, 8 << 20];
const BLOCKS: &str = "--op both --block 4KiB,64KiB,1MiB,8MiB --batch 3 --iterations 1";

fn result(stdout: &str) -> Value {
    serde_json::from_str(stdout).unwrap_or_else(|e| panic!("not JSON: {e}\n{stdout}"))
}

/// Every size in both directions ran, and every byte was compared.
fn assert_all_verified(result: &Value) {
    let runs = result["runs"].as_array().expect("runs");
    for op in ["write", "read"] {
        for size in SIZES {
            let run = runs.iter().find(|r| r["op"] == op && r["block"] == size);
            let run = run.unwrap_or_else(|| panic!("no {op} of {size}: {result:#}"));
            assert!(run["bytes"].as_u64() > Some(0), "{run:#}");
            assert_eq!(run["bytes"], run["verified_bytes"], "{run:#}");
        }
    }
}

fn shares(result: &Value) -> String {
    let rails = result["rails"].as_array().cloned().unwrap_or_default();
    let share = |r: &Value| format!("{}-{} {:.3}", r["nic"], r["peer_nic"], r["share"].as_f64().unwrap_or(0.0));
    rails.iter().map(share).collect::<Vec<_>>().join(", ")
}

fn assert_four_rails(result: &Value) {
    let rails = result["rails"].as_array().expect("rails");
    let pairs: Vec<_> = rails.iter().map(|r| (r["nic"].as_str(), r["peer_nic"].as_str())).collect();
    assert_eq!(rails.len(), 4, "one connection per pair of NICs: {pairs:?}");
    for rail in rails {
        assert!(rail["share"].as_f64() >= Some(SHARE), "{rail}\nof {:#}", result["rails"]);
    }
}

/// What every NIC of this node has moved since `before`: no less than two rails' share of all.
fn assert_every_nic_moved(lab: &Lab, before: &[u64]) {
    let moved: Vec<u64> = (0..lab.nics).zip(before).map(|(nic, then)| netdev_bytes(nic) - then).collect();
    let all: u64 = moved.iter().sum();
    println!("bytes of the net devices: {moved:?}");
    for bytes in &moved {
        assert!(*bytes as f64 >= 2.0 * SHARE * all as f64, "{moved:?}");
    }
}

fn counters(lab: &Lab) -> Vec<u64> {
    (0..lab.nics).map(netdev_bytes).collect()
}

/// Node 0 serves with `serve`, node 1 runs `bench` for small and large blocks; both must end with 0.
fn serve_and_bench(lab: &Lab, serve: &str, bench: &str) {
    let before = counters(lab);
    if lab.node == 0 {
        let mut server = Process::moonrail(serve);
        let name = server.says("listening on ", READY);
        lab.tell("name", &name);
        lab.hear("done", 1);
        assert_every_nic_moved(lab, &before);
        server.terminate(END).expect_ok();
    } else {
        let name = lab.hear("name", 0);
        let began = Instant::now();
        let ended = Process::moonrail(&format!("bench {name} {bench} {BLOCKS} --verify --json")).wait(RUN).expect_ok();
        let result = result(&ended.stdout);
        println!("took {:.1?}, rails {}", began.elapsed(), shares(&result));
        assert_all_verified(&result);
        assert_four_rails(&result);
        assert_every_nic_moved(lab, &before);
        lab.tell("done", "");
    }
    lab.barrier();
}

#[test]
fn bench_verifies_every_size_over_etcd_and_the_owner_agrees() {
    let lab = Lab::enter("over-etcd");
    let _etcd = (lab.node == 0).then(|| etcd("10.0.0.1"));
    let metadata = "--metadata etcd://10.0.0.1:2379";
    serve_and_bench(
        &lab,
        &format!("serve {metadata} --name 10.0.0.1 --size 32MiB --cores 1 --verify"),
        &format!("{metadata} --name 10.0.0.2 --cores 1 --ask-target"),
    );
}

#[test]
fn bench_verifies_every_size_peer_to_peer_and_the_owner_agrees() {
    let lab = Lab::enter("peer-to-peer");
    serve_and_bench(
        &lab,
        "serve --name 10.0.0.1 --size 32MiB --cores 1 --verify",
        "--name 10.0.0.2 --cores 1 --ask-target",
    );
}

#[test]
fn its_flags_are_those_of_transfer_engine_bench() {
    let lab = Lab::enter("other-program");
    let both = "--metadata_server=P2PHANDSHAKE --device_name=rxe0,rxe1 -protocol rdma";
    if lab.node == 0 {
        let line = format!("bench --mode=target {both} --local_server_name=10.0.0.1 --buffer_size=16777216");
        let mut target = Process::moonrail(&line);
        let name = target.says("listening on ", READY);
        lab.tell("name", &name);
        lab.hear("done", 1);
        target.terminate(END).expect_ok();
    } else {
        let name = lab.hear("name", 0);
        for operation in ["read", "write"] {
            let line = format!(
                "bench --mode=initiator {both} --local_server_name=10.0.0.2 --segment_id={name} --operation {operation} \
                 --block_size=65536 --batch_size 8 --threads=2 --duration=2 --buffer_size=4096 --report_unit=MB \
                 --report_precision=1 --noauto_discovery"
            );
            let ended = Process::moonrail(&line).wait(RUN).expect_ok();
            let completed = ended.stdout.lines().find(|l| l.starts_with("Test completed: duration "));
            let completed = completed.unwrap_or_else(|| panic!("no result line:\n{}", ended.stdout));
            assert_result_line(completed);
            assert!(ended.stdout.contains("p99.9"), "{}", ended.stdout);
            let raised = "Invalid flag: buffer size is smaller than require_size, adjust to 1048576";
            assert!(ended.stderr.contains(raised), "{}", ended.stderr);
        }
        lab.tell("done", "");
    }
    lab.barrier();
}

/// `Test completed: duration 2.01, batch count 40, throughput 20.9 MB/s`
fn assert_result_line(line: &str) {
    let words: Vec<&str> = line.split([' ', ',']).filter(|w| !w.is_empty()).collect();
    let ["Test", "completed:", "duration", duration, "batch", "count", batches, "throughput", rate, "MB/s"] = words[..]
    else {
        panic!("{line}");
    };
    assert!(
        duration.parse::<f64>().is_ok_and(|s| s >= 2.0) && duration.split('.').nth(1).is_some_and(|d| d.len() == 2)
    );
    assert!(batches.parse::<u64>().is_ok_and(|n| n > 0), "{line}");
    assert!(
        rate.parse::<f64>().is_ok_and(|r| r > 0.0) && rate.split('.').nth(1).is_some_and(|d| d.len() == 1),
        "{line}"
    );
}

/// On Soft-RoCE the provider rings its doorbell with write(2): 32 bytes that begin with command 28, POST_SEND. What
/// strace sees of that must be what our cores counted.
#[test]
fn strace_sees_one_write_per_doorbell() {
    const POST_SEND: &str = r#", "\x1c\x00\x00\x00"..., 32"#;
    let lab = Lab::enter("strace");
    if lab.node == 0 {
        let mut server = Process::moonrail("serve --name 10.0.0.1 --size 4MiB --cores 1");
        lab.tell("name", &server.says("listening on ", READY));
        lab.hear("done", 1);
        server.terminate(END).expect_ok();
    } else {
        let name = lab.hear("name", 0);
        let trace = "/tmp/moonrail-strace";
        let mut command = std::process::Command::new("strace");
        command.args(["-f", "-qq", "-xx", "-s", "4", "-e", "trace=write", "-o", trace]);
        command.arg(moonrail()).args(
            format!(
                "bench {name} --name 10.0.0.2 --cores 1 --block 4KiB --stride 8KiB --batch 128 --iterations 2 --json"
            )
            .split_whitespace(),
        );
        let ended = Process::start("strace moonrail bench", command).wait(RUN).expect_ok();
        let result = result(&ended.stdout);
        let cores = result["cores"].as_array().expect("cores");
        let counted: u64 = cores.iter().filter_map(|core| core["doorbells"].as_u64()).sum();
        let text = std::fs::read_to_string(trace).expect("strace's file");
        let seen = text.lines().filter(|l| l.contains(POST_SEND)).count() as u64;
        println!("doorbells counted {counted}, write(2) seen {seen}");
        assert!(counted > 0);
        assert_eq!(seen, counted, "{:#}", result["cores"]);
        lab.tell("done", "");
    }
    lab.barrier();
}
