//! `moonrail ping` between processes of one host: over shared memory, over TCP, and to nobody.

mod host_support;

use host_support::process::Process;
use host_support::{RUN, START};
use serde_json::Value;

fn ping(line: &str) -> (i32, Value) {
    let ended = Process::moonrail(&format!("ping {line} --json")).wait(RUN);
    let value =
        serde_json::from_str(&ended.stdout).unwrap_or_else(|e| panic!("{e}:\n{}\n{}", ended.stdout, ended.stderr));
    (ended.code, value)
}

fn steps(report: &Value) -> Vec<(&str, &str)> {
    let steps = report["steps"].as_array().expect("steps");
    steps.iter().map(|s| (s["check"].as_str().unwrap_or(""), s["verdict"].as_str().unwrap_or(""))).collect()
}

#[test]
fn every_step_passes_and_each_rail_has_its_latency() {
    let mut server = Process::moonrail("serve --name 127.0.0.1 --size 1MiB --cores 1 --fabrics shm,tcp --verify");
    let name = server.says("listening on ", START);
    for fabric in ["tcp", "shm"] {
        let (code, report) =
            ping(&format!("{name} --name 127.0.0.1 --fabrics {fabric} --count 50 --size 4KiB --write"));
        assert_eq!(code, 0, "{report:#}");
        let passed = steps(&report);
        assert_eq!(passed.len(), 6, "{passed:?}");
        assert!(passed.iter().all(|(_, verdict)| *verdict == "PASS"), "{passed:?}");
        let rails = report["rails"].as_array().expect("rails");
        assert_eq!(rails.len(), 1, "{report:#}");
        assert_eq!(rails[0]["fabric"], fabric);
        for op in ["read", "write"] {
            assert_eq!(rails[0][op]["count"], 50, "{report:#}");
            assert!(rails[0][op]["p50_ns"].as_u64() > Some(0), "{report:#}");
        }
    }
    let text = Process::moonrail(&format!("ping {name} --name 127.0.0.1 --fabrics tcp")).wait(RUN).expect_ok().stdout;
    assert!(text.lines().all(|line| line.chars().count() <= 80), "{text}");
    assert!(text.contains("READ, p50") && text.contains("handshake"), "{text}");
    println!("{text}");
    server.terminate(START).expect_ok();
    let (code, report) = ping(&format!("{name} --name 127.0.0.1"));
    assert_eq!(code, 1);
    assert_eq!(steps(&report).last(), Some(&("peer's handshake port", "FAIL")), "{report:#}");
}

#[test]
fn a_buffer_that_is_too_small_is_told_for_the_rail() {
    let mut server = Process::moonrail("serve --name 127.0.0.1 --size 4KiB --cores 1 --fabrics tcp");
    let name = server.says("listening on ", START);
    let (code, report) = ping(&format!("{name} --name 127.0.0.1 --fabrics tcp --size 1MiB --count 1"));
    assert_eq!(code, 1, "{report:#}");
    let problem = report["rails"][0]["read"]["problem"].as_str().unwrap_or_default();
    assert!(problem.contains("give a smaller --size"), "{report:#}");
    server.terminate(START).expect_ok();
}
