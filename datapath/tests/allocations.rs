//! A turn of a core's own thread allocates nothing and frees nothing, whatever happens in it.

mod counting;
mod rig;
mod tcp_rig;

use std::sync::Arc;

use moonrail_datapath::limits::{STALL_AFTER, WATCH_PERIOD};
use moonrail_datapath::nic::sim::SimOptions;
use moonrail_datapath::nic::{Op, WcStatus};
use moonrail_datapath::units::Nanos;
use moonrail_datapath::work::Work;

use counting::{ALLOCATIONS, FREES, ON};
use rig::Rig;

/// One turn of the only core, counted; the world moves and control answers outside the count.
fn counted_turn(rig: &mut Rig, step: Nanos) -> usize {
    rig.now = rig.now.plus(step);
    rig.world.advance(rig.now);
    ON.set(true);
    let done = rig.cores[0].poll_once(rig.now);
    ON.set(false);
    rig.answer_all();
    done
}

#[test]
fn a_million_turns_under_load_allocate_and_free_nothing() {
    const TURNS: u64 = 1_000_000;
    // Slow enough that a turn moves about a slice: 2 rails × 2 queue pairs, 4 KiB each 2 us.
    let options = SimOptions {
        bytes_per_second: 2_000_000_000,
        retry_time: Nanos::from_micros(200),
        late_writes: 0.0,
        ..SimOptions::default()
    };
    let mut rig = Rig::new(11, 2, 1, options);
    let (local, far) = (Rig::region(&rig.near, 4 << 20), Rig::region(&rig.far, 4 << 20));
    let remote = rig.remote(&far);
    let blocks: Vec<_> = (0..256u64).map(|i| (i * 8192, (255 - i) * 8192, 4096)).collect();
    rig.connect(0, 0, 0, 2);
    let mut shaky = rig.connect(0, 1, 1, 2);
    assert!(rig.run_until(Nanos::from_secs(1), |r| r.peer.routes() == 1));
    let slices_before = rig.counters[0].slices_done.get();
    let (mut open, mut rounds): (Vec<Arc<Work>>, u64) = (vec![], 0);
    for turn in 0..TURNS {
        open.retain(|w| !w.is_terminal());
        while open.len() < 4 {
            let op = if rounds % 3 == 0 { Op::Write } else { Op::Read };
            let work = rig.work(op, &local, &remote, &blocks[..64 << (rounds % 3)]);
            rig.submit(&work);
            open.push(work);
            rounds += 1;
        }
        // Each 20,000 turns a rail dies under load, its slices go back, the other carries them, and it is repaired: by
        // turns its port is down, which fails a request at once, and its path swallows what is sent until the retries end.
        let port = turn / 20_000 % 2 == 0;
        let works = |rig: &Rig, up| {
            if port {
                rig.world.set_link(rig.near[1].id, up);
            } else {
                rig.world.set_path(rig.near[1].id, rig.far[1].id, up);
            }
        };
        match turn % 20_000 {
            5_000 => works(&rig, false),
            8_000 => {
                works(&rig, true);
                shaky = rig.connect(0, 1, 1, 2);
            }
            _ => {}
        }
        counted_turn(&mut rig, Nanos::from_micros(1));
        rig.finished.clear();
    }
    assert!(rig.is_proven(shaky), "the rail came back every time");
    let slices = rig.counters[0].slices_done.get() - slices_before;
    assert!(slices >= TURNS, "under load: {slices} slices in {TURNS} turns");
    let counters = &rig.counters[0];
    // The slice of a first error spends a retry; those that are flushed behind it only go back.
    for status in [WcStatus::LOC_QP_OP_ERR, WcStatus::RETRY_EXC_ERR] {
        let lost = rig.first_errors.iter().filter(|error| error.status == status).count() as u64;
        assert!(lost >= TURNS / 40_000, "{lost} rails were lost by {}", status.text());
    }
    assert!(counters.slices_returned.get() > 1000, "{} slices were returned", counters.slices_returned.get());
    assert!(counters.works_finished.get() > 1000);
    assert_eq!((ALLOCATIONS.get(), FREES.get()), (0, 0), "allocations and frees inside turns");
}

/// The core of a node that sends over TCP, and the queue of one that serves: system calls, and nothing else, once it runs.
#[test]
fn tcp_lanes_and_served_connections_allocate_nothing_once_they_run() {
    use moonrail_datapath::nic::{Completion, Nic, Target, TcpVersion};
    const LEN: u64 = 4 << 20;
    let blocks: Vec<_> = (0..256u64).map(|i| (i * 8192, (255 - i) * 8192, 4096)).collect();
    for version in [TcpVersion::V1, TcpVersion::V2, TcpVersion::Batch] {
        let mut node = tcp_rig::Node::new(tcp_rig::options());
        let server = moonrail_datapath::nic::tcp::TcpNic::open(tcp_rig::options()).unwrap();
        let (mut queue, _) = server.create_cq(64).unwrap();
        let far = tcp_rig::Shared::new(server.as_ref(), LEN as usize);
        let to = Target::Tcp { host: "127.0.0.1".into(), port: server.port(), version };
        node.connect(&to, 2).unwrap();
        let local = node.region(LEN as usize);
        let remote = node.remote(far.memory.addr(), LEN);
        let (before, mut rounds) = ((ALLOCATIONS.get(), FREES.get()), 0);
        while rounds < 200 {
            let op = if rounds % 2 == 0 { Op::Write } else { Op::Read };
            let whole = [(0, 0, LEN)];
            let work = node.submit(op, &local, &remote, if rounds % 4 < 2 { &blocks[..] } else { &whole[..] });
            while !work.is_terminal() {
                // The first rounds grow what later ones use again.
                ON.set(rounds >= 20);
                queue.poll(&mut [Completion::EMPTY; 64]).unwrap();
                node.core.poll_once(node.now());
                ON.set(false);
                node.turn();
            }
            assert_eq!(work.first_error(), None, "{version:?}");
            rounds += 1;
        }
        assert_eq!((ALLOCATIONS.get(), FREES.get()), before, "{version:?}: allocations and frees inside turns");
    }
}

/// The watch looks at every queue pair with something in flight; when one has fallen silent its slices go back, and the other rail carries them.
#[test]
fn a_stall_allocates_and_frees_nothing() {
    let mut rig = Rig::new(12, 2, 1, SimOptions::default());
    let (local, far) = (Rig::region(&rig.near, 4 << 20), Rig::region(&rig.far, 4 << 20));
    let remote = rig.remote(&far);
    rig.connect(0, 0, 0, 2);
    rig.connect(0, 1, 1, 2);
    assert!(rig.run_until(Nanos::from_secs(1), |r| r.counters[0].completions.get() == 4));
    let work = rig.work(Op::Write, &local, &remote, &[(0, 0, 4 << 20)]);
    rig.submit(&work);
    for _ in 0..20 {
        counted_turn(&mut rig, Nanos::from_micros(1));
    }
    rig.world.swallow(rig.near[1].id, rig.far[1].id);
    let until = rig.now.plus(STALL_AFTER).plus(Nanos::from_secs(1));
    while rig.now < until {
        counted_turn(&mut rig, WATCH_PERIOD);
    }
    assert!(work.completion().is_done());
    assert_eq!(rig.first_errors.iter().map(|error| error.status).collect::<Vec<_>>(), [WcStatus::STALLED]);
    assert!(rig.counters[0].slices_returned.get() > 0);
    assert_eq!((ALLOCATIONS.get(), FREES.get()), (0, 0), "allocations and frees inside turns");
}

/// The counter counts: without this, the test above could not fail.
#[test]
fn the_counter_bites() {
    ON.set(true);
    drop(std::hint::black_box(vec![1u8; 100]));
    ON.set(false);
    assert_eq!((ALLOCATIONS.get(), FREES.get()), (1, 1));
}
