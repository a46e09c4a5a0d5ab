//! Everything an operator gets wrong, or the network does: found, named, and told with what to do next.
//!
//! Each test makes one condition on real nodes and reads what `moonrail` says. Most concern node 0 alone; node 1 waits.

mod lab_support;

use std::net::TcpListener;
use std::process::Command;
use std::time::Duration;

use lab_support::process::{Ended, Process, etcd, moonrail};
use lab_support::{Lab, run, wait_for};
use serde_json::Value;

const READY: Duration = Duration::from_secs(40);
/// Longer than any time limit inside moonrail that one of these conditions runs into.
const TOLD: Duration = Duration::from_secs(60);
const RUN: Duration = Duration::from_secs(120);
const END: Duration = Duration::from_secs(30);

/// Runs `body` on node 0 while node 1 waits.
fn on_node_0(name: &str, body: impl FnOnce()) {
    let lab = Lab::enter(name);
    if lab.node == 0 {
        body();
    }
    lab.barrier();
}

fn told(line: &str) -> Ended {
    Process::moonrail(line).wait(TOLD)
}

/// The net device of a NIC up or down, and the RDMA port with it.
fn set_link(nic: u32, up: bool) {
    run("ip", &["link", "set", &format!("eth{nic}"), if up { "up" } else { "down" }]);
    wait_for("the port's state", || {
        let state =
            std::fs::read_to_string(format!("/sys/class/infiniband/rxe{nic}/ports/1/state")).unwrap_or_default();
        (state.contains("ACTIVE") == up).then_some(())
    });
    if up {
        let gid = format!("/sys/class/infiniband/rxe{nic}/ports/1/gids/1");
        wait_for("its GID", || std::fs::read_to_string(&gid).is_ok_and(|text| text.contains("ffff:")).then_some(()));
    }
}

#[test]
fn a_device_that_is_not_there() {
    on_node_0("no-device", || {
        told("serve --name 10.0.0.1 --nics rxe9").expect_error(&["No matched device found: rxe9", "rxe0", "rxe1"]);
    });
}

#[test]
fn a_port_that_is_down() {
    on_node_0("port-down", || {
        set_link(1, false);
        let ended = told("serve --name 10.0.0.1 --nics rxe1");
        let nics = told("nics");
        let as_json = told("nics --json").expect_ok();
        set_link(1, true);
        ended.expect_error(&["Device rxe1 port not active", "ip link", "MC_IB_PORT"]);
        // The other NIC can still be used.
        assert!(nics.expect_ok().stdout.contains("in the way: port 1 not active, it is DOWN"));
        let json: Value = serde_json::from_str(&as_json.stdout).unwrap_or_else(|e| panic!("{e}: {}", as_json.stdout));
        let device = |name: &str| json["devices"].as_array().unwrap().iter().find(|d| d["name"] == name).unwrap();
        assert_eq!((&device("rxe0")["usable"], &device("rxe1")["usable"]), (&true.into(), &false.into()), "{json:#}");
        assert_eq!(device("rxe1")["ports"][0]["state"], "DOWN", "{json:#}");
        let port = &device("rxe0")["ports"][0];
        assert_eq!((&port["state"], &port["active_mtu"], &port["lid"]), (&"ACTIVE".into(), &4096.into(), &0.into()));
        let chosen: Vec<&Value> = port["gids"].as_array().unwrap().iter().filter(|gid| gid["chosen"] == true).collect();
        assert_eq!(chosen.len(), 1, "{json:#}");
        assert_eq!((&chosen[0]["address"], &chosen[0]["type"]), (&"10.0.0.1".into(), &"RoCE v2".into()));
        assert_eq!(chosen[0]["net_device"], "eth0");
        assert!(port["gids"].as_array().unwrap().iter().all(|gid| gid["why"].as_str().is_some_and(|w| !w.is_empty())));
    });
}

#[test]
fn a_gid_index_that_is_empty_or_outside_the_table() {
    on_node_0("gid-index", || {
        for index in ["77", "255"] {
            let mut command = Command::new(moonrail());
            command.args(["serve", "--name", "10.0.0.1", "--nics", "rxe0"]).env("MC_GID_INDEX", index);
            Process::start("serve with MC_GID_INDEX", command).wait(TOLD).expect_error(&[
                &format!("GID index {index}"),
                "set MC_GID_INDEX to one of",
                "rxe0",
            ]);
        }
    });
}

#[test]
fn a_metadata_server_that_is_not_there_or_not_etcd() {
    on_node_0("no-etcd", || {
        let ended = told("serve --name 10.0.0.1 --metadata etcd://10.0.0.1:2399");
        ended.expect_error(&["10.0.0.1:2399", "etcd"]);
        // Somebody else's port: it accepts, and says something that is no HTTP/2.
        let stranger = TcpListener::bind("10.0.0.1:2398").unwrap();
        std::thread::spawn(move || {
            use std::io::Write;
            for mut stream in stranger.incoming().flatten() {
                let _ = stream.write_all(b"SSH-2.0-OpenSSH_9.2p1\r\n");
            }
        });
        let ended = told("serve --name 10.0.0.1 --metadata etcd://10.0.0.1:2398");
        ended.expect_error(&["10.0.0.1:2398", "etcd"]);
        told("serve --name 10.0.0.1 --metadata redis://10.0.0.1:6379").expect_error(&["redis", "etcd://"]);
    });
}

#[test]
fn an_address_that_is_in_use() {
    on_node_0("in-use", || {
        let _taken = TcpListener::bind("0.0.0.0:12345").unwrap();
        told("serve --name 10.0.0.1:12345").expect_error(&["already in use", "12345", "port"]);
    });
}

#[test]
fn a_peer_that_refuses_and_a_segment_nobody_published() {
    on_node_0("no-peer", || {
        told("bench 10.0.0.2:9 --name 10.0.0.1 --iterations 1").expect_error(&["refused", "10.0.0.2:9"]);
        let _etcd = etcd("10.0.0.1");
        told("bench nobody --name 10.0.0.1 --metadata etcd://10.0.0.1:2379 --iterations 1")
            .expect_error(&["Failed to get description of nobody", "the name must be exactly"]);
    });
}

#[test]
fn a_name_that_others_cannot_reach_or_that_is_not_ours() {
    on_node_0("own-name", || {
        told("serve --name 10.0.0.77").expect_error(&["10.0.0.77 is not an address of this host", "10.0.0.1"]);
        let _etcd = etcd("10.0.0.1");
        let mut command = Command::new(moonrail());
        command.args(["serve", "--name", "a", "--metadata", "etcd://10.0.0.1:2379"]);
        command.env("MC_TCP_BIND_ADDRESS", "127.0.0.1");
        Process::start("serve on loopback", command)
            .wait(TOLD)
            .expect_error(&["127.0.0.1 is a loopback address", "10.0.0.1"]);
        // Without a metadata server it can be meant: everything on one machine. It is said, and works.
        let mut server = Process::moonrail("serve --name 127.0.0.1 --size 1MiB --cores 1");
        server.says("listening on 127.0.0.1:", READY);
        let ended = server.terminate(END).expect_ok();
        assert!(ended.stderr.contains("loopback"), "{}", ended.stderr);
    });
}

#[test]
fn memory_that_may_not_be_locked() {
    on_node_0("memlock", || {
        // Root has CAP_IPC_LOCK, and no limit counts for it: take it away.
        let mut command = Command::new("setpriv");
        command
            .args(["--bounding-set=-ipc_lock", "--inh-caps=-ipc_lock", "bash", "-c"])
            .arg(format!("ulimit -l 64; exec {} serve --name 10.0.0.1 --size 8MiB", moonrail()));
        let ended = Process::start("serve with 64 KiB of locked memory", command).wait(TOLD);
        ended.expect_error(&["RLIMIT_MEMLOCK", "ulimit -l", "65536"]);
    });
}

/// The handshake goes over eth0, the data path over rxe1. There nobody answers ARP, so no end can address the other:
/// RTR fails, first at the node that is asked, and the one that asked hears whose side it was.
#[test]
fn a_peer_whose_gid_cannot_be_reached() {
    let lab = Lab::enter("no-arp");
    let answer_arp = |mode: &str| {
        std::fs::write("/proc/sys/net/ipv4/conf/eth1/arp_ignore", mode).unwrap();
        run("ip", &["neigh", "flush", "dev", "eth1"]);
    };
    answer_arp("8");
    lab.barrier();
    if lab.node == 0 {
        let mut server = Process::moonrail("serve --name 10.0.0.1 --nics rxe1 --size 1MiB --cores 1");
        lab.tell("name", &server.says("listening on ", READY));
        lab.hear("done", 1);
        answer_arp("1");
        // The node whose side it was has the numbers of both ends.
        let log = server.terminate(END).expect_ok().stderr;
        println!("{log}");
        let both_ends = ["here: device rxe1, QP ", "MTU ", "GID ", "LID ", "peer: QP ", ", GID ", ", LID "];
        for word in ["Failed to modify QP to RTR"].iter().chain(&both_ends) {
            assert!(log.contains(word), "does not say {word}:\n{log}");
        }
    } else {
        let name = lab.hear("name", 0);
        let line =
            format!("bench {name} --name 10.0.0.2 --nics rxe1 --cores 1 --block 4KiB --iterations 1 --timeout 10s");
        let ended = Process::moonrail(&line).wait(TOLD);
        answer_arp("1");
        lab.tell("done", "");
        ended.expect_error(&["Handshake rejected by 10.0.0.1", "RTR", "the peer's side", "ib_send_bw"]);
    }
    lab.barrier();
}

/// 4096 against 1024 never works by itself on real verbs; between two moonrail nodes both ends agree on 1024.
#[test]
fn networks_of_different_mtu_work_by_agreement() {
    let lab = Lab::enter("mtu");
    let mtu = |bytes: &str| {
        for nic in 0..lab.nics {
            run("ip", &["link", "set", &format!("eth{nic}"), "mtu", bytes]);
        }
    };
    if lab.node == 0 {
        let mut server = Process::moonrail("serve --name 10.0.0.1 --size 4MiB --cores 1 --verify");
        lab.tell("name", &server.says("listening on ", READY));
        lab.hear("done", 1);
        server.terminate(END).expect_ok();
    } else {
        mtu("1500");
        let name = lab.hear("name", 0);
        let line = format!(
            "bench {name} --name 10.0.0.2 --cores 1 --op both --block 64KiB --batch 16 --iterations 2 --verify --ask-target"
        );
        let ended = Process::moonrail(&line).wait(RUN);
        let seen = doctor_line(&format!("{name} --name 10.0.0.2"));
        mtu("4200");
        ended.expect_ok();
        assert_first(&seen, "WARN", "peer's MTU", "path MTU 4096 there, 1024 here");
        lab.tell("done", "");
    }
    lab.barrier();
}

/// What the doctor says, as JSON, with a look at its first verdict of a kind.
fn doctor(name: &str, command: Command) -> Value {
    let ended = Process::start(name, command).wait(TOLD);
    let report: Value = serde_json::from_str(&ended.stdout).unwrap_or_else(|e| panic!("{e}: {}", ended.stderr));
    println!("{name}: {} with status {}", report["worst"], ended.code);
    report
}

fn doctor_line(line: &str) -> Value {
    let mut command = Command::new(moonrail());
    command.args(["doctor", "--json"]).args(line.split_whitespace());
    doctor(&format!("doctor {line}"), command)
}

fn doctor_in_shell(script: &str) -> Value {
    let mut command = Command::new("unshare");
    command.args(["--mount", "sh", "-c", &format!("{script} exec {} doctor --json --name 10.0.0.1", moonrail())]);
    doctor(script, command)
}

/// The first check with this verdict is this one, about this device, and it says what to do.
fn assert_first(report: &Value, verdict: &str, check: &str, words: &str) {
    let checks = report["checks"].as_array().expect("checks");
    let first = checks.iter().find(|c| c["verdict"] == verdict).unwrap_or(&Value::Null);
    assert_eq!(first["check"], check, "{report:#}");
    assert!(first["evidence"].as_str().is_some_and(|text| text.contains(words)), "{first:#}");
}

#[test]
fn the_doctor_names_what_is_wrong_with_a_nic() {
    on_node_0("doctor-nic", || {
        let healthy = doctor_line("--name 10.0.0.1");
        let checks = healthy["checks"].as_array().expect("checks");
        let bad: Vec<_> = checks.iter().filter(|c| c["verdict"] == "FAIL" || c["verdict"] == "WARN").collect();
        assert!(bad.is_empty(), "{bad:#?}");
        for check in ["port", "GID", "MTU", "registration limit", "error counters"] {
            assert_eq!(checks.iter().filter(|c| c["check"] == check && c["verdict"] == "PASS").count(), 2, "{check}");
        }
        assert!(checks.iter().any(|c| c["check"] == "ARP" && c["verdict"] == "PASS"), "{healthy:#}");
        assert_first(&doctor_line("--name 10.0.0.1 --nics rxe9"), "FAIL", "RDMA devices", "rxe9");
        let answer_for_all = |mode: &str| {
            for of in ["all", "eth0"] {
                std::fs::write(format!("/proc/sys/net/ipv4/conf/{of}/arp_ignore"), mode).unwrap();
            }
        };
        answer_for_all("0");
        let lax = doctor_line("--name 10.0.0.1");
        answer_for_all("1");
        assert_first(&lax, "WARN", "ARP", "eth0 has arp_ignore 0");
        set_link(1, false);
        let (named, left_out) = (doctor_line("--name 10.0.0.1 --nics rxe1"), doctor_line("--name 10.0.0.1"));
        set_link(1, true);
        assert_first(&named, "FAIL", "port", "not active");
        assert_first(&left_out, "WARN", "port", "not active");
        assert_first(&doctor_in_shell("export MC_GID_INDEX=77;"), "FAIL", "GID", "77");
        assert_first(&doctor_in_shell("export MC_GID_INDEX=0;"), "WARN", "GID", "MC_GID_INDEX");
        let no_lock = "exec setpriv --bounding-set=-ipc_lock --inh-caps=-ipc_lock sh -c 'ulimit -l 64; exec $0 $@'";
        let limited = doctor_in_shell(&format!("{no_lock} {} doctor --json --name 10.0.0.1 #", moonrail()));
        assert_first(&limited, "FAIL", "memlock", "64 KiB");
        let hidden = doctor_in_shell("mount -t tmpfs none /dev/infiniband;");
        assert_first(&hidden, "FAIL", "RDMA devices", "/dev/infiniband/uverbs");
        let library = "for f in /usr/lib/*/libibverbs.so.1; do mount --bind /dev/null $f; done; export MC_FORCE_HCA=1;";
        assert_first(&doctor_in_shell(library), "FAIL", "RDMA devices", "libibverbs");
    });
}

/// Four rails, each by itself; then a link of the peer is down; and then the packets of one of our NICs are lost, as behind a
/// firewall on UDP port 4791.
#[test]
fn ping_and_doctor_see_each_rail() {
    let lab = Lab::enter("ping");
    if lab.node == 0 {
        let mut server = Process::moonrail("serve --name 10.0.0.1 --size 1MiB --cores 1");
        lab.tell("name", &server.says("listening on ", READY));
        for (asked, up) in [("down", false), ("up", true)] {
            lab.hear(asked, 1);
            set_link(1, up);
            lab.tell(asked, "");
        }
        lab.hear("done", 1);
        server.terminate(END).expect_ok();
    } else {
        let name = lab.hear("name", 0);
        let ping = |more: &str| -> Value {
            let ended = Process::moonrail(&format!("ping {name} --name 10.0.0.2 --count 20 --json {more}")).wait(RUN);
            serde_json::from_str(&ended.stdout).unwrap_or_else(|e| panic!("{e}: {}", ended.stderr))
        };
        let works = |report: &Value| {
            let rails = report["rails"].as_array().cloned().unwrap_or_default();
            let rail = |r: &Value| (r["nic"].as_str().unwrap_or("").to_owned(), r["read"]["count"] == 20);
            rails.iter().map(rail).collect::<Vec<_>>()
        };
        let all = ping("");
        assert_eq!(works(&all).iter().filter(|(_, works)| *works).count(), 4, "{all:#}");
        assert!(all["rails"].as_array().is_some_and(|r| r.iter().all(|r| r["path_mtu"] == 4096)), "{all:#}");
        let healthy = doctor_line(&format!("{name} --name 10.0.0.2"));
        assert_ne!(healthy["worst"], "FAIL", "{healthy:#}");
        assert_eq!(healthy["checks"].to_string().matches("up over rdma").count(), 4, "{healthy:#}");
        for check in ["peer's GID", "peer's MTU", "peer's port"] {
            let of = |c: &&Value| c["check"] == check && c["verdict"] == "PASS";
            assert_eq!(healthy["checks"].as_array().map(|all| all.iter().filter(of).count()), Some(2), "{healthy:#}");
        }

        let peers_link = |word: &str| {
            lab.tell(word, "");
            lab.hear(word, 0);
        };
        peers_link("down");
        let (beside, alone) = (doctor_line(&format!("{name} --name 10.0.0.2")), {
            // Only towards that NIC: nothing else carries the bytes.
            let mut command = Command::new(moonrail());
            command.args(["doctor", "--json", &name, "--name", "10.0.0.2", "--nics", "rxe1"]);
            command.env("MC_ENABLE_HCA_PEER_AFFINITY", "1").env("MC_NIC_PEER_AFFINITY", "rxe1=rxe1");
            doctor("doctor with one rail, to a NIC that is down", command)
        });
        peers_link("up");
        assert_first(&beside, "WARN", "peer's port", "no queue pairs on it");
        assert_first(&alone, "FAIL", "peer's port", "no queue pairs on it");

        // As if the peer's second NIC had answered for its first.
        let neighbour = |what: &[&str]| {
            for dev in ["eth0", "eth1"] {
                run("ip", &[&["neigh", what[0], "10.0.0.1", "dev", dev], &what[1..]].concat());
            }
        };
        neighbour(&["replace", "lladdr", "52:54:00:00:01:01", "nud", "permanent"]);
        let mistaken = doctor_line(&format!("{name} --name 10.0.0.2"));
        neighbour(&["del"]);
        assert_first(
            &mistaken,
            "WARN",
            "peer's MAC",
            "10.0.0.1 (rxe0) and 10.0.1.1 (rxe1) are both at 52:54:00:00:01:01",
        );

        run("tc", &["qdisc", "add", "dev", "eth1", "root", "netem", "loss", "100%"]);
        let (half, one) = (ping(""), doctor_line(&format!("{name} --name 10.0.0.2 --nics rxe1")));
        run("tc", &["qdisc", "del", "dev", "eth1", "root"]);
        lab.tell("done", "");
        let lost = works(&half);
        assert_eq!(lost.len(), 4, "{half:#}");
        assert!(lost.iter().all(|(nic, works)| *works == (nic == "rxe0")), "{half:#}");
        let rail = one["checks"].as_array().and_then(|all| all.iter().find(|c| c["check"] == "rail").cloned());
        let rail = rail.unwrap_or_default();
        assert_eq!(rail["verdict"], "FAIL", "{one:#}");
        println!("{}", rail["evidence"]);
    }
    lab.barrier();
}
