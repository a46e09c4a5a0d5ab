//! How real verbs behave, between two nodes with one Soft-RoCE NIC each: the facts the engine relies on, asked of
//! `nic::verbs` alone, without a core or control. Node 0 starts the transfers, node 1 owns the memory they reach.

mod lab_support;

#[path = "lab_2x1/pair.rs"]
mod pair;

use std::time::{Duration, Instant};

use lab_support::rdma::resources;
use lab_support::{Lab, run, wait_for};
use moonrail_datapath::nic::qp::Step;
use moonrail_datapath::nic::verbs::{self, AccessProblem, OpenError, VerbsNic};
use moonrail_datapath::nic::{self, Access, AsyncEvent, GidKind, LinkLayer, Nic, Op, PortState, QpCaps, WcStatus};
use moonrail_datapath::region::Memory;
use moonrail_datapath::units::{Gid, Lkey, Mtu, PortNum, Rkey, SqPsn};
use pair::{ACCESS, CAPS, Options, Pair, open, readable, take};

const PORT: PortNum = PortNum(1);

#[test]
fn a_device_is_listed_and_opened_by_name() {
    let lab = Lab::enter("listed");
    let devices = verbs::list().expect("the lab's nodes have RDMA");
    let names: Vec<_> = devices.iter().map(|d| d.info.name.as_str()).collect();
    assert_eq!(names, ["rxe0"]);
    let device = &devices[0];
    assert_eq!((device.problem.as_ref(), device.info.ports), (None, 1));
    assert_eq!((device.info.numa_node, device.info.pci_address.as_deref()), (None, None), "Soft-RoCE is nowhere");
    assert!(device.info.max_qp > 0 && device.info.max_mr_size >= 1 << 30, "{:?}", device.info);

    let port = &device.ports[0];
    assert_eq!((port.info.state, port.info.link_layer), (PortState::Active, LinkLayer::Ethernet));
    assert_eq!(port.info.active_mtu, Some(Mtu::B4096), "the lab's interfaces have an MTU of 4200");
    let v4 = port.gids.iter().find(|g| g.gid.to_ipv4().is_some()).expect("a GID of the IPv4 address");
    assert_eq!(v4.gid.to_ipv4(), Some([10, 0, 0, lab.node as u8 + 1].into()));
    assert_eq!((v4.kind, v4.net_device.as_deref()), (GidKind::RoceV2, Some("eth0")));

    let nic = open();
    assert_eq!((nic.name(), nic.port_num()), ("rxe0", PORT));
    assert_eq!(nic.device(), &device.info);
    assert_eq!(nic.gids().unwrap(), port.gids);
    assert!(
        matches!(VerbsNic::open("rxe7", PORT), Err(OpenError::NoSuchDevice { present, .. }) if present == ["rxe0"])
    );
    assert!(matches!(VerbsNic::open("rxe0", PortNum(2)), Err(OpenError::PortOutOfRange { ports: 1, .. })));
    assert!(matches!(VerbsNic::open("rxe0", PortNum(0)), Err(OpenError::PortOutOfRange { .. })));
    lab.barrier();
}

#[test]
fn a_device_that_is_hidden_is_told_with_the_reason() {
    let lab = Lab::enter("hidden");
    let path = std::path::Path::new("/dev/infiniband/uverbs0");
    let away = path.with_extension("away");
    std::fs::rename(path, &away).unwrap();
    let (listed, opened) = (verbs::list(), VerbsNic::open("rxe0", PORT));
    std::fs::rename(&away, path).unwrap();
    let expected = AccessProblem::NoCharacterDevice { path: path.to_owned() };
    let device = listed.expect("listed all the same").remove(0);
    assert_eq!((device.info.name.as_str(), device.problem.as_ref()), ("rxe0", Some(&expected)));
    assert!(device.ports[0].gids.iter().any(|g| g.gid.to_ipv4().is_some()), "by sysfs: {device:?}");
    assert!(matches!(opened, Err(OpenError::Refused { problem, .. }) if problem == expected));
    lab.barrier();
}

#[test]
fn what_does_not_fit_is_refused_with_an_error() {
    let lab = Lab::enter("refused");
    let (nic, other) = (open(), open());
    let (_cq, handle) = nic.create_cq(64).unwrap();
    assert!(nic.create_cq(0).is_err());
    assert!(nic.create_cq(u32::MAX).is_err());
    assert!(nic.create_cq(nic.device().max_cqe + 1).is_err());
    assert!(nic.create_qp(&handle, QpCaps { max_send_wr: nic.device().max_qp_wr + 1, ..CAPS }).is_err());
    assert!(nic.create_qp(&handle, QpCaps { max_send_wr: 0, ..CAPS }).is_err());
    assert!(other.create_qp(&handle, CAPS).is_err(), "a queue of another context");
    let memory = Memory::allocate(4096).unwrap();
    for (offset, len) in [(0, 0), (0, 4097), (4096, 1), (u64::MAX, 2)] {
        assert!(nic.register(&memory, offset, len, ACCESS).is_err(), "{offset} {len}");
    }
    // Soft-RoCE does not know relaxed ordering: asking for it is harmless.
    nic.register(&memory, 0, 4096, Access { remote: true, relaxed_ordering: true }).unwrap();
    nic.register(&memory, 100, 1, Access { remote: false, relaxed_ordering: true }).unwrap();
    lab.barrier();
}

#[test]
fn bytes_arrive_as_sent_with_different_first_packet_numbers() {
    let lab = Lab::enter("bytes");
    // Each side starts at a number of its own, one of them about to wrap.
    let psn = SqPsn::new([0x00ff_fff0, 0x0012_3456][lab.node as usize]).unwrap();
    let mut pair = Pair::connect(&lab, "rail", Options { psn, region: 4 << 20, ..Options::default() });
    const SENT: u64 = 0;
    const BACK: u64 = 2 << 20;
    for (round, len) in [1u32, 2, 63, 64, 65, 4095, 4096, 4097, 65536, 1 << 20].into_iter().enumerate() {
        let pattern: Vec<u8> = (0..len).map(|i| (i * 31 + len * 7 + 1) as u8).collect();
        if lab.node == 0 {
            pair.memory.write(SENT, &pattern).unwrap();
            let write = pair.request(Op::Write, 0, SENT, SENT, len);
            // A small WRITE also inline, which needs no key: the payload is copied in the post.
            let write =
                if len <= 64 { nic::WorkRequest { inline: true, lkey: Lkey::default(), ..write } } else { write };
            let read = pair.request(Op::Read, 1, BACK, SENT, len);
            let posted = pair.post.post(&[write, read]);
            assert_eq!((posted.accepted, posted.error), (2, None));
            let seen = take(pair.cq.as_mut(), 2);
            assert!(seen.iter().all(|c| c.status == WcStatus::SUCCESS && c.qpn == pair.post.qpn()), "{seen:?}");
            assert_eq!(seen.iter().map(|c| c.wr_id.sequence).collect::<Vec<_>>(), [0, 1]);
            let mut back = vec![0; len as usize];
            pair.memory.read(BACK, &mut back).unwrap();
            assert!(back == pattern, "{len} bytes read back");
        }
        lab.exchange(&format!("sent-{round}"), "");
        if lab.node == 1 {
            let mut landed = vec![0; len as usize + 1];
            pair.memory.read(SENT, &mut landed).unwrap();
            assert!(landed[..len as usize] == pattern, "{len} bytes at the peer");
        }
        lab.exchange(&format!("seen-{round}"), "");
    }
}

#[test]
fn one_bad_request_among_64_silent_ones() {
    let lab = Lab::enter("forty");
    let mut pair = Pair::connect(&lab, "rail", Options::default());
    if lab.node == 0 {
        let mut chain: Vec<_> = (0..64)
            .map(|i| nic::WorkRequest { signaled: false, ..pair.request(Op::Write, i, u64::from(i), u64::from(i), 1) })
            .collect();
        chain[40].rkey = Rkey(chain[40].rkey.0 ^ 0x5a5a);
        pair.memory.write(0, &[7; 64]).unwrap();
        assert_eq!(pair.post.post(&chain).accepted, 64);
        // expect: the error of 40, then a flush of each request behind it, asked for or not; 0 to 39 are silent.
        let seen = take(pair.cq.as_mut(), 24);
        assert_eq!(seen.iter().map(|c| c.wr_id.sequence).collect::<Vec<_>>(), (40..64).collect::<Vec<_>>());
        assert_eq!(seen[0].status, WcStatus::REM_ACCESS_ERR);
        assert!(seen[1..].iter().all(|c| c.status == WcStatus::WR_FLUSH_ERR), "{seen:?}");
        pair.nothing_more();
    }
    lab.barrier();
    if lab.node == 1 {
        let mut landed = [0; 64];
        pair.memory.read(0, &mut landed).unwrap();
        assert_eq!((&landed[..40], &landed[40..]), (&[7; 40][..], &[0; 24][..]));
        // The event, if the provider raises one, names our queue pair.
        while let Some(event) = pair.nic.next_async_event().unwrap() {
            println!("responder's event after a wrong rkey: {event:?}");
        }
    }
    lab.barrier();
}

#[test]
fn a_full_send_queue_says_how_many_it_took() {
    let lab = Lab::enter("full");
    if lab.node == 0 {
        let mut pair = Pair::to_nowhere();
        let chain: Vec<_> = (0..300).map(|i| pair.request(Op::Write, i, 0, 0, 64)).collect();
        let posted = pair.post.post(&chain);
        assert_eq!(posted.error, Some(libc::ENOMEM));
        assert!((pair.post.depth() as usize..300).contains(&posted.accepted), "{posted:?}");
        // The last one taken was not the last of the chain: nothing more is taken, and it says so.
        assert_eq!(pair.post.post(&chain[..3]).accepted, 0);
        assert_eq!(pair.post.post(&[]), nic::Posted { accepted: 0, error: None });
        // expect: after the retries (about half a second), one completion for each request taken, in order.
        let seen = take(pair.cq.as_mut(), posted.accepted);
        assert_eq!(seen[0].status, WcStatus::RETRY_EXC_ERR);
        assert!(seen[1..].iter().all(|c| c.status == WcStatus::WR_FLUSH_ERR));
        assert!(seen.iter().enumerate().all(|(i, c)| c.wr_id.sequence as usize == i));
        pair.nothing_more();
    }
    lab.barrier();
}

#[test]
fn to_error_completes_everything_outstanding() {
    let lab = Lab::enter("to-error");
    if lab.node == 0 {
        let mut pair = Pair::to_nowhere();
        let chain: Vec<_> =
            (0..20).map(|i| nic::WorkRequest { signaled: false, ..pair.request(Op::Read, i, 0, 0, 64) }).collect();
        assert_eq!(pair.post.post(&chain).accepted, 20);
        pair.admin.to_error().unwrap();
        let seen = take(pair.cq.as_mut(), 20);
        assert!(seen.iter().all(|c| c.status == WcStatus::WR_FLUSH_ERR), "{seen:?}");
        assert!(seen.iter().enumerate().all(|(i, c)| c.wr_id.sequence as usize == i));
        // It may be said again, and what is posted late completes too.
        pair.admin.to_error().unwrap();
        assert_eq!(pair.post.post(&chain[..3]).accepted, 3);
        assert_eq!(take(pair.cq.as_mut(), 3)[2].status, WcStatus::WR_FLUSH_ERR);
        pair.nothing_more();
    }
    lab.barrier();
}

/// What becomes of one request of `len` bytes when node 0 uses 4096 as path MTU, and node 1 uses 1024.
enum Outcome {
    Works,
    Fails(WcStatus),
    /// No completion at all, though the peer answers: seen for 50 s, with 6 retries. (Presumably each partial answer
    /// starts the retries anew; not looked up in the driver.)
    Silence,
}

#[test]
fn path_mtus_that_differ_carry_small_packets_only() {
    use Outcome::{Fails, Silence, Works};
    let lab = Lab::enter("mtu");
    let mtu = [Mtu::B4096, Mtu::B1024][lab.node as usize];
    let cases = [
        // The trial of a rail, which therefore says nothing of the path MTU. No key of either side is looked at.
        (0, Op::Write, 0, Works),
        (1, Op::Read, 0, Works),
        (0, Op::Write, 1024, Works),
        (1, Op::Write, 1024, Works),
        (0, Op::Read, 1024, Works),
        (0, Op::Write, 1025, Fails(WcStatus::REM_INV_REQ_ERR)),
        (1, Op::Write, 1025, Fails(WcStatus::REM_INV_REQ_ERR)),
        (0, Op::Write, 16384, Fails(WcStatus::REM_INV_REQ_ERR)),
        // The responder cuts its answer by its own, smaller MTU ...
        (0, Op::Read, 16384, Fails(WcStatus::RETRY_EXC_ERR)),
        (0, Op::Read, 2049, Silence),
        // ... and the other way round a Soft-RoCE requester takes larger answers than it counted on.
        (1, Op::Read, 1025, Works),
        (1, Op::Read, 16384, Works),
    ];
    for (starter, op, len, expected) in cases {
        let name = format!("{op:?}-{starter}-{len}");
        let mut pair = Pair::connect(&lab, &name, Options { mtu, ..Options::default() });
        let pattern: Vec<u8> = (0..len).map(|i| (i % 251) as u8 + 1).collect();
        let source = if op == Op::Write { starter } else { 1 - starter };
        if lab.node == source {
            pair.memory.write(0, &pattern).unwrap();
        }
        lab.exchange(&format!("{name}-ready"), "");
        if lab.node == starter {
            let request = pair.request(op, 0, 0, 0, len);
            let trial = nic::WorkRequest { lkey: Lkey(0), rkey: Rkey(0), ..request };
            assert_eq!(pair.post.post(&[if len == 0 { trial } else { request }]).accepted, 1);
            match expected {
                Works => assert_eq!(take(pair.cq.as_mut(), 1)[0].status, WcStatus::SUCCESS, "{name}"),
                Fails(status) => assert_eq!(take(pair.cq.as_mut(), 1)[0].status, status, "{name}"),
                Silence => {
                    std::thread::sleep(Duration::from_secs(3)); // six times what the retries take towards nobody
                    pair.nothing_more();
                    pair.admin.to_error().unwrap();
                    assert_eq!(take(pair.cq.as_mut(), 1)[0].status, WcStatus::WR_FLUSH_ERR, "{name}");
                }
            }
        }
        lab.exchange(&format!("{name}-done"), "");
        if matches!(expected, Works) {
            let mut landed = vec![0; len as usize];
            pair.memory.read(0, &mut landed).unwrap();
            assert!(landed == pattern, "{name}: bytes on node {}", lab.node);
        }
    }
}

/// Why both ends must connect with one path MTU: Soft-RoCE as requester counts one packet number for each 4096 bytes of a
/// READ, and the responder sends one for each 1024. It takes those that fit into its count, asks again for what is left, and
/// reckons from where by its own packets (`req_retry` of rxe_req.c: whole multiples of 4096). From the third time on the
/// bytes are not those of their place: 7 + 4 + 3 + 2 + 1 + 1 + 1 KiB of 64. It calls that success. It asks again at once only
/// if something is behind the READ; the last of a queue runs out of retries instead (the test above). So does this one now
/// and then (seen once in CI), hence several rounds.
#[test]
fn path_mtus_that_differ_bring_wrong_bytes_and_call_it_success() {
    const LEN: u64 = 64 << 10;
    const ROUNDS: u32 = 8;
    let lab = Lab::enter("mtu-wrong");
    let mtu = [Mtu::B4096, Mtu::B1024][lab.node as usize];
    let mut believed = 0;
    for round in 0..ROUNDS {
        let mut pair = Pair::connect(&lab, &format!("rail-{round}"), Options { mtu, ..Options::default() });
        // Each KiB is filled with its number.
        let numbered: Vec<u8> = (0..2 * LEN).map(|at| (at / 1024) as u8 + 1).collect();
        if lab.node == 1 {
            pair.memory.write(0, &numbered).unwrap();
        }
        lab.barrier();
        if lab.node == 0 {
            let reads = [0, 1].map(|i| pair.request(Op::Read, i, u64::from(i) * LEN, u64::from(i) * LEN, LEN as u32));
            assert_eq!(pair.post.post(&reads).accepted, 2);
            let first = take(pair.cq.as_mut(), 1)[0];
            let mut landed = vec![0; LEN as usize];
            pair.memory.read(0, &mut landed).unwrap();
            let numbers: Vec<u8> = landed.chunks(1024).map(|kib| kib[0]).collect();
            let wrong = numbers.iter().zip(1..).filter(|(seen, wanted)| *seen != wanted).count();
            println!("a READ of 64 KiB: {:?}, {wrong} KiB wrong: {numbers:?}", first.status);
            match first.status {
                WcStatus::SUCCESS => {
                    assert_eq!(wrong, 19, "this kernel's rxe does otherwise: see docs/testing.md");
                    believed += 1;
                }
                told => assert_eq!(told, WcStatus::RETRY_EXC_ERR),
            }
            pair.admin.to_error().unwrap();
        }
        lab.barrier();
    }
    if lab.node == 0 {
        assert!(believed > 0, "this kernel's rxe does otherwise in {ROUNDS} rounds: see docs/testing.md");
    }
}

/// A READ that the responder cannot answer whole, and that is then called success: while READs are under way the responder's
/// net device takes no packets of 4096 bytes any more. Soft-RoCE then answers with RNR NAK. A requester that has part of a READ
/// takes that for a wrong sequence, and ends the READ in `COMPST_ERROR` without giving it a status other than success
/// (rxe_comp.c, `check_ack`; the kernel warns of it once). Its queue pair is in error from then on, without a word: that is how the
/// engine knows, which asks after each completion of a READ on this device.
#[test]
fn a_read_cut_short_by_its_responders_device_is_called_success() {
    const LEN: u64 = 64 << 10;
    const SLOTS: u64 = 16;
    const WORD: u64 = 8;
    let lab = Lab::enter("cut-short");
    let words =
        |from: u64| -> Vec<u8> { (0..LEN / WORD).flat_map(|word| (from + word * WORD + 1).to_le_bytes()).collect() };
    let (mut reads, mut short, mut believed) = (0, 0, 0);
    for round in 0..lab_support::setting("MOONRAIL_CUT_ROUNDS", 2) as u32 {
        let mut pair = Pair::connect(&lab, &format!("rail-{round}"), Options::default());
        if lab.node == 1 {
            (0..SLOTS).for_each(|slot| pair.memory.write(slot * LEN, &words(slot * LEN)).unwrap());
        }
        lab.exchange(&format!("ready-{round}"), "");
        if lab.node == 1 {
            std::thread::sleep(Duration::from_millis(500 + 37 * u64::from(round)));
            run("ip", &["link", "set", "eth0", "mtu", "1500"]);
            lab.hear(&format!("over-{round}"), 0);
            run("ip", &["link", "set", "eth0", "mtu", "4200"]);
        } else {
            assert!(!pair.post.reads_are_proven(), "the device is known for this, by its maker's number");
            let until = Instant::now() + Duration::from_secs(3);
            let mut free: Vec<u64> = (0..SLOTS).collect();
            let mut seen = [nic::Completion::EMPTY; SLOTS as usize];
            while Instant::now() < until {
                for slot in free.drain(..) {
                    pair.memory.write(slot * LEN, &vec![0; LEN as usize]).unwrap();
                    let read = pair.request(Op::Read, slot as u32, slot * LEN, slot * LEN, LEN as u32);
                    assert_eq!(pair.post.post(&[read]).accepted, 1);
                }
                let count = pair.cq.poll(&mut seen).unwrap();
                let in_error = pair.post.is_in_error();
                for done in seen[..count].iter().filter(|done| done.status == WcStatus::SUCCESS) {
                    let slot = u64::from(done.wr_id.sequence);
                    let mut landed = vec![0; LEN as usize];
                    pair.memory.read(slot * LEN, &mut landed).unwrap();
                    reads += 1;
                    let same =
                        landed.iter().zip(words(slot * LEN)).take_while(|(seen, wanted)| **seen == *wanted).count();
                    if same < LEN as usize {
                        short += 1;
                        believed += u32::from(!in_error);
                        println!("round {round}: READ {reads} is called success and ends after {same} bytes");
                    }
                    free.push(slot);
                }
                std::thread::yield_now();
            }
            lab.tell(&format!("over-{round}"), "");
            pair.admin.to_error().unwrap();
        }
        lab.exchange(&format!("next-{round}"), "");
    }
    if lab.node == 0 {
        println!(
            "{reads} READs with success, {short} of them cut short, {believed} of those on a queue pair not yet in error"
        );
        assert_eq!(believed, 0, "the engine would have taken {believed} of {short} for done");
        println!(
            "{}",
            run("dmesg", &[]).lines().filter(|line| line.contains("rxe")).take(12).collect::<Vec<_>>().join("\n")
        );
    }
    lab.barrier();
}

#[test]
fn an_armed_queue_wakes_its_descriptor() {
    let lab = Lab::enter("armed");
    let mut pair = Pair::connect(&lab, "rail", Options::default());
    if lab.node == 0 {
        // More events than are acknowledged at a time; what is left over must not hold up the end.
        for round in 0..100 {
            pair.cq.arm().unwrap();
            assert!(!pair.woken(Duration::ZERO), "nothing has happened");
            let write = pair.request(Op::Write, round, 0, 0, 8);
            assert_eq!(pair.post.post(&[write]).accepted, 1);
            assert!(pair.woken(Duration::from_secs(20)), "a completion wakes");
            pair.cq.clear_events().unwrap();
            assert!(!pair.woken(Duration::ZERO), "taken");
            assert_eq!(take(pair.cq.as_mut(), 1)[0].wr_id.sequence, round);
        }
        // Not armed: a completion is silent.
        let write = pair.request(Op::Write, 0, 0, 0, 8);
        pair.post.post(&[write]);
        take(pair.cq.as_mut(), 1);
        assert!(!pair.woken(Duration::from_millis(50)));
        pair.cq.clear_events().unwrap();
    }
    lab.barrier();
}

#[test]
fn whatever_is_dropped_last_nothing_stays_behind() {
    let lab = Lab::enter("dropped");
    let before = resources();
    // Queue pairs, completion queues, regions, protection domains beyond those that were there.
    let more = || {
        let now = resources();
        (now.qp - before.qp, now.cq - before.cq, now.mr - before.mr, now.pd - before.pd)
    };
    for order in 0..4 {
        let pair = Pair::to_nowhere();
        let Pair { nic, cq, handle, post, admin, memory, registration, .. } = pair;
        assert_eq!(more(), (1, 1, 1, 1));
        drop(handle);
        match order {
            0 => {
                drop((nic, cq, memory, registration, post));
                assert_eq!(more(), (1, 1, 0, 1), "the other half holds");
                drop(admin);
            }
            1 => {
                drop((admin, post, cq, nic, memory));
                assert_eq!(more(), (0, 0, 1, 1), "a guard holds its domain");
                drop(registration);
            }
            2 => drop((registration, memory, admin, cq, post, nic)),
            _ => {
                nic::qp::destroy(admin, post).unwrap_or_else(|_| panic!("halves of one queue pair"));
                drop((registration, memory, cq, nic));
            }
        }
        assert_eq!(more(), (0, 0, 0, 0), "order {order}");
    }
    // A queue pair that was never split, in any state.
    let nic = open();
    let (_cq, handle) = nic.create_cq(64).unwrap();
    drop(nic.create_qp(&handle, CAPS).unwrap());
    drop(nic.create_qp(&handle, CAPS).unwrap().init(&nic::InitAttr { port: PORT, pkey_index: 0 }).unwrap());
    assert_eq!(more().0, 0);
    lab.barrier();
}

#[test]
fn an_address_nobody_has_is_an_error_of_the_step_to_rtr() {
    let lab = Lab::enter("nobody");
    let mut gid = [0; 16];
    gid[10..].copy_from_slice(&[0xff, 0xff, 10, 0, 0, 99]);
    let began = Instant::now();
    let Err(error) = pair::try_connect(&open(), Gid(gid)) else { panic!("10.0.0.99 answered") };
    assert_eq!(error.step, Step::Rtr);
    println!("RTR towards a dead GID: {error} after {:?}", began.elapsed());
    lab.barrier();
}

#[test]
fn the_memlock_limit_is_told_as_enomem() {
    let lab = Lab::enter("memlock");
    let this = std::env::current_exe().unwrap();
    let script = "ulimit -l 64; exec \"$0\" --exact --ignored --nocapture registers_too_much_for_its_limit";
    let capless = ["--bounding-set=-ipc_lock", "--inh-caps=-ipc_lock", "bash", "-c", script];
    let said = run("setpriv", &[&capless[..], &[this.to_str().unwrap()]].concat());
    assert!(said.contains("1 passed"), "{said}");
    lab.barrier();
}

#[test]
#[ignore = "started by the_memlock_limit_is_told_as_enomem, with a limit of 64 KiB and without CAP_IPC_LOCK"]
fn registers_too_much_for_its_limit() {
    let nic = open();
    let memory = Memory::allocate(8 << 20).unwrap();
    let Err(error) = nic.register(&memory, 0, 8 << 20, ACCESS) else {
        panic!("8 MiB registered under a limit of 64 KiB")
    };
    assert_eq!(error.raw_os_error(), Some(libc::ENOMEM));
}

/// Last by its name: it takes the network away for a while.
#[test]
fn z_a_link_that_goes_and_comes_back_says_so() {
    let lab = Lab::enter("link");
    let mut pair = Pair::connect(&lab, "rail", Options::default());
    while pair.nic.next_async_event().unwrap().is_some() {}
    if lab.node == 1 {
        let fd = pair.nic.async_fd().expect("verbs has a descriptor for events");
        let event = |expected: AsyncEvent| {
            wait_for(&format!("{expected:?}"), || {
                readable(&fd, Duration::from_millis(100));
                pair.nic.next_async_event().unwrap().filter(|event| *event == expected)
            })
        };
        run("ip", &["link", "set", "eth0", "down"]);
        event(AsyncEvent::PortError(PORT));
        assert_ne!(pair.nic.query_port().unwrap().state, PortState::Active);
        let chain: Vec<_> = (0..3).map(|i| pair.request(Op::Write, i, 0, 0, 8)).collect();
        assert_eq!(pair.post.post(&chain).accepted, 3);
        let seen = take(pair.cq.as_mut(), 3);
        assert_eq!(seen[0].status, WcStatus::LOC_QP_OP_ERR);
        assert!(seen[1..].iter().all(|c| c.status == WcStatus::WR_FLUSH_ERR), "{seen:?}");

        run("ip", &["link", "set", "eth0", "up"]);
        event(AsyncEvent::PortActive(PORT));
        wait_for("the port to be active", || (pair.nic.query_port().ok()?.state == PortState::Active).then_some(()));
        wait_for("the GID to come back", || pair.nic.gids().ok()?.into_iter().find(|g| g.gid.to_ipv4().is_some()));
    }
    lab.barrier();
    // A fresh queue pair works again.
    let mut pair = Pair::connect(&lab, "repaired", Options::default());
    if lab.node == 1 {
        let write = pair.request(Op::Write, 0, 0, 0, 8);
        pair.post.post(&[write]);
        assert_eq!(take(pair.cq.as_mut(), 1)[0].status, WcStatus::SUCCESS);
    }
    lab.barrier();
}
