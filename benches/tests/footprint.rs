//! What an idle peer and an idle rail take of memory: exact, by what is asked of the allocator. Two engines of this process, so both ends
//! are counted, over a NIC whose own part is two small boxes for each queue pair.

#[path = "../../datapath/tests/counting/mod.rs"]
mod counting;
#[path = "../src/null.rs"]
mod null;

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use moonrail::{Engine, Gid, Level, Nic, Segment};

use counting::LIVE;
use null::NullNic;

/// The most that each may take.
const MOST: i64 = 4096;
const NICS: u8 = 12;
const PEERS: u8 = 64;
const LONG: Duration = Duration::from_secs(20);

/// Once it has not changed for a while: threads are done with what they do.
fn live() -> i64 {
    let (mut before, mut since) = (LIVE.load(Ordering::Relaxed), Instant::now());
    let until = Instant::now() + LONG;
    while since.elapsed() < Duration::from_millis(300) && Instant::now() < until {
        std::thread::sleep(Duration::from_millis(10));
        let now = LIVE.load(Ordering::Relaxed);
        if now != before {
            (before, since) = (now, Instant::now());
        }
    }
    before
}

fn engine(node: u8, nics: u8) -> Engine {
    let nic = |n| -> Arc<dyn Nic> {
        let gid = Gid([0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 10, 0, n, node]);
        NullNic::new(&format!("null{n}"), gid)
    };
    let builder = Engine::builder().environment(|_| None).name(format!("n{node}")).metadata("memory://footprint");
    builder.nics_from((0..nics).map(nic).collect()).cores(1).pin_cores(false).log_level(Level::Error).build().unwrap()
}

/// Opens all of `peers`, which connects it to each of them, and returns what that takes for each: in both engines.
fn opened(near: &Engine, peers: &[Engine], rails: usize) -> i64 {
    let before = live();
    let segments: Vec<Segment> = peers.iter().map(|peer| near.open_segment(peer.name()).unwrap()).collect();
    let until = Instant::now() + LONG;
    let up = || near.rails().iter().filter(|rail| rail.state == "up").count();
    while up() < rails * peers.len() && Instant::now() < until {
        std::thread::sleep(Duration::from_millis(10));
    }
    assert_eq!((up(), near.rails().len()), (rails * peers.len(), rails * peers.len()));
    let each = (live() - before) / segments.len() as i64;
    println!("{rails} rails to each of {} peers: {each} bytes each", segments.len());
    each
}

// One test: what others do at the same time would be counted.
#[test]
fn an_idle_peer_and_an_idle_rail_take_a_page_at_the_most() {
    let peers: Vec<Engine> = (0..PEERS).map(|n| engine(10 + n, 1)).collect();
    let (warm, one, many) = (engine(3, 1), engine(1, 1), engine(2, NICS));
    // What an engine takes once, with its first peer.
    opened(&warm, &peers, 1);
    let (with_one, with_many) = (opened(&one, &peers, 1), opened(&many, &peers, usize::from(NICS)));
    let of_a_rail = (with_many - with_one) / i64::from(NICS - 1) / 2;
    let of_a_peer = with_one / 2 - of_a_rail;
    println!("{of_a_peer} bytes of an idle peer, {of_a_rail} of an idle rail with two queue pairs, at each end");
    assert!(of_a_rail <= MOST && of_a_peer <= MOST, "{of_a_rail} bytes of a rail's end, {of_a_peer} of a peer");
}
