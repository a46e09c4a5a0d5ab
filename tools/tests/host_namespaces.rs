//! Processes in namespaces of their own, with equal addresses: never mistaken for the same host's memory, and told why.
//! Memory of the embedder, which only the kernel can copy. A core with nothing to do.
//!
//! Namespaces need root (or unprivileged user namespaces); without either the test fails and says so.

mod host_support;
#[path = "host_support/nets.rs"]
mod nets;

use std::process::Command;
use std::time::{Duration, Instant};

use host_support::process::{Process, moonrail};
use host_support::{RUN, START};
use nets::Nets;

fn shell(script: &str) -> Process {
    let mut command = Command::new("bash");
    command.args(["-c", script]).env("MOONRAIL", moonrail()).env("MC_LOG_LEVEL", "WARNING");
    Process::start(script, command)
}

#[test]
fn processes_of_two_network_namespaces_use_tcp_and_say_why() {
    let nets = Nets::new();
    let tag = &nets.tag;
    let serve = "exec $MOONRAIL serve --fabrics shm,tcp --verify";
    let mut server = shell(&format!("exec ip netns exec {tag}a bash -c '{serve} --name 10.99.0.1'"));
    let name = server.says("listening on ", START);
    let bench =
        format!("bench {name} --fabrics shm,tcp --name 10.99.0.2 --op both --block 64KiB --iterations 4 --verify");
    let ended = shell(&format!("exec ip netns exec {tag}b $MOONRAIL {bench}")).wait(RUN).expect_ok();
    assert!(ended.stdout.contains("over tcp"), "{}", ended.stdout);
    assert!(ended.stdout.contains("another network namespace"), "{}", ended.stdout);
    // Within one of them it is shared memory, whatever its address is.
    let ended = shell(&format!(
        "exec ip netns exec {tag}a $MOONRAIL bench {name} --fabrics shm,tcp --name 10.99.0.1 --iterations 4 --verify"
    ))
    .wait(RUN)
    .expect_ok();
    assert!(ended.stdout.contains("over shm"), "{}", ended.stdout);
    server.terminate(START).expect_ok();
}

#[test]
fn equal_addresses_in_two_namespaces_are_two_nodes() {
    let nets = Nets::new();
    let tag = &nets.tag;
    // The same address and the same port on both sides, each on its own loopback: who is asked is who answers.
    let serve = "serve --fabrics shm,tcp --name 127.0.0.1:15555 --size 1MiB --verify";
    let mut first = shell(&format!("exec ip netns exec {tag}a $MOONRAIL {serve}"));
    let mut second = shell(&format!("exec ip netns exec {tag}b $MOONRAIL {serve}"));
    let (one, other) = (first.says("listening on ", START), second.says("listening on ", START));
    assert_eq!(one, other);
    for net in ["a", "b"] {
        let bench =
            format!("bench {one} --fabrics shm,tcp --op both --block 4KiB --iterations 8 --verify --ask-target");
        let ended = shell(&format!("exec ip netns exec {tag}{net} $MOONRAIL {bench}")).wait(RUN).expect_ok();
        assert!(ended.stdout.contains("over shm"), "{}", ended.stdout);
    }
    first.terminate(START).expect_ok();
    second.terminate(START).expect_ok();
}

#[test]
fn pid_and_mount_namespaces_do_not_hide_memory_that_the_engine_allocated() {
    let mut server = shell("exec $MOONRAIL serve --fabrics shm,tcp --verify");
    let name = server.says("listening on ", START);
    let bench = format!("bench {name} --fabrics shm,tcp --op both --block 64KiB --iterations 4 --verify --ask-target");
    let ended =
        shell(&format!("exec unshare --pid --mount --fork --mount-proc $MOONRAIL {bench}")).wait(RUN).expect_ok();
    assert!(ended.stdout.contains("over shm"), "{}", ended.stdout);
    server.terminate(START).expect_ok();
}

#[test]
fn another_user_of_this_host_gets_tcp_and_is_told_why() {
    let mut server = shell("exec $MOONRAIL serve --fabrics shm,tcp --verify");
    let name = server.says("listening on ", START);
    // Out of a folder that this user may read.
    let binary = std::env::temp_dir().join(format!("moonrail-as-nobody-{}", std::process::id()));
    std::fs::copy(moonrail(), &binary).expect("a copy of the binary");
    let bench = format!("bench {name} --fabrics shm,tcp --iterations 4 --verify");
    let line = format!("exec setpriv --reuid=65534 --regid=65534 --clear-groups {} {bench}", binary.display());
    let ended = shell(&line).wait(RUN);
    let _ = std::fs::remove_file(&binary);
    let ended = ended.expect_ok();
    assert!(ended.stdout.contains("over tcp"), "{}", ended.stdout);
    assert!(ended.stdout.contains("no shm: ") && ended.stdout.contains("user"), "{}", ended.stdout);
    server.terminate(START).expect_ok();
}

#[test]
fn an_idle_node_takes_less_than_a_hundredth_of_a_processor() {
    let mut server = shell("exec $MOONRAIL serve --fabrics shm,tcp");
    let name = server.says("listening on ", START);
    // Connected over both, and then left alone.
    for fabric in ["shm", "tcp"] {
        let bench = format!("exec $MOONRAIL bench {name} --fabrics shm,tcp --require {fabric} --iterations 50");
        shell(&bench).wait(RUN).expect_ok();
    }
    let pid = server.pid();
    // Time on a processor of every thread, in nanoseconds.
    let used = || -> u64 {
        let threads = std::fs::read_dir(format!("/proc/{pid}/task")).expect("it runs").flatten();
        let of_one = |thread: std::fs::DirEntry| {
            let text = std::fs::read_to_string(thread.path().join("schedstat")).unwrap_or_default();
            text.split(' ').next().and_then(|nanos| nanos.parse::<u64>().ok()).unwrap_or(0)
        };
        threads.map(of_one).sum()
    };
    // The least busy of a few spans: what else runs on the machine only adds, and for the first seconds the node looks for
    // the peers that have just ended.
    let share = (0..4).map(|_| {
        let (before, began) = (used(), Instant::now());
        std::thread::sleep(Duration::from_millis(1500));
        (used() - before) as f64 / began.elapsed().as_nanos() as f64
    });
    let shares: Vec<f64> = share.collect();
    println!("idle: {shares:.4?} of a processor");
    assert!(shares.iter().any(|share| *share < 0.01), "{shares:?}");
    server.terminate(START).expect_ok();
}
