//! A real etcd dies, hangs, and forgets everything, under engines that move bytes over TCP meanwhile. Transfers never notice;
//! who comes new is served again within a lease and a second.

#[path = "../../control/tests/support/mod.rs"]
mod support;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use moonrail::{Engine, Fabric, Transfer};
use support::EtcdServer;

const LONG: Duration = Duration::from_secs(30);
/// A lease and a second; and what a busy machine may take for the rest.
const BACK_WITHIN: Duration = Duration::from_secs(11 + 5);

fn engine(server: &EtcdServer, name: &str) -> Engine {
    let builder = Engine::builder().environment(|_| None).name(name).metadata(format!("etcd://{}", server.endpoint()));
    builder.cores(1).pin_cores(false).fabrics([Fabric::Tcp]).log(|_, _| {}).build().unwrap()
}

/// What the traffic met since it was last asked.
#[derive(Default)]
struct Seen {
    stop: AtomicBool,
    done: AtomicU64,
    failed: AtomicU64,
    slowest_us: AtomicU64,
}

impl Seen {
    fn take(&self) -> (u64, u64, Duration) {
        let slowest = Duration::from_micros(self.slowest_us.swap(0, Ordering::Relaxed));
        (self.done.swap(0, Ordering::Relaxed), self.failed.swap(0, Ordering::Relaxed), slowest)
    }

    fn print(&self, what: &str) {
        let (done, failed, slowest) = self.take();
        println!("{what}: {done} transfers, {failed} failed, slowest {slowest:?}");
        assert!(failed == 0 && done > 0, "{what}: {failed} of {done}");
        // What a transfer costs on this machine is for a benchmark to say; a store's time-out is 2 s and more.
        assert!(slowest < Duration::from_secs(2), "{what}: {slowest:?}");
    }
}

/// A newcomer finds both, and moves bytes. How long after `since` it could.
fn newcomer(server: &EtcdServer, name: &str, since: Instant) -> Duration {
    let new = engine(server, name);
    let region = new.allocate(1 << 20, "*").unwrap();
    for peer in ["a", "b"] {
        loop {
            let moved = new.open_segment(peer).is_ok_and(|far| {
                let Some(buffer) = far.buffers().first().cloned() else { return false };
                let transfer = Transfer::read_into(&region, 0, buffer.addr, 4096);
                new.submit(&far, &[transfer]).is_ok_and(|batch| batch.wait(LONG).is_ok())
            });
            if moved {
                break;
            }
            assert!(since.elapsed() < LONG, "{peer} is not found again");
            std::thread::sleep(Duration::from_millis(50));
        }
    }
    since.elapsed()
}

#[test]
fn transfers_go_on_while_etcd_dies_hangs_and_forgets() {
    let mut server = EtcdServer::start();
    let (a, b) = (engine(&server, "a"), engine(&server, "b"));
    let (near, _offered, remote) =
        (a.allocate(1 << 20, "*").unwrap(), a.allocate(1 << 20, "*").unwrap(), b.allocate(1 << 20, "*").unwrap());
    let far = a.open_segment("b").unwrap();
    let seen = Arc::new(Seen::default());
    let a = Arc::new(a);
    let traffic = std::thread::spawn({
        let (a, seen, far, at) = (a.clone(), seen.clone(), far.clone(), remote.addr());
        move || {
            while !seen.stop.load(Ordering::Relaxed) {
                let began = Instant::now();
                let moved = a
                    .submit(&far, &[Transfer::write_from(&near, 0, at, 64 << 10)])
                    .is_ok_and(|batch| batch.wait(LONG).is_ok());
                let took = u64::try_from(began.elapsed().as_micros()).unwrap();
                seen.slowest_us.fetch_max(took, Ordering::Relaxed);
                let count = if moved { &seen.done } else { &seen.failed };
                count.fetch_add(1, Ordering::Relaxed);
                std::thread::sleep(Duration::from_millis(1));
            }
        }
    });
    std::thread::sleep(Duration::from_secs(1));
    seen.print("etcd is well");

    server.kill();
    std::thread::sleep(Duration::from_secs(2));
    let began = Instant::now();
    let error = a.open_segment("nobody").unwrap_err().to_string();
    println!("an open during the outage: {error} (after {:?})", began.elapsed());
    assert!(error.contains(&server.endpoint()) && began.elapsed() < Duration::from_secs(20), "{error}");
    assert!(a.open_segment("b").is_ok(), "a known peer is served from the cache");
    seen.print("etcd is dead");
    server.start_again(false);
    let back = newcomer(&server, "c", Instant::now());
    println!("started again: a newcomer moves bytes after {back:?}");
    assert!(back < BACK_WITHIN);

    server.freeze();
    std::thread::sleep(Duration::from_secs(12));
    let began = Instant::now();
    let error = a.open_segment("nobody").unwrap_err().to_string();
    assert!(error.contains(&server.endpoint()) && began.elapsed() < Duration::from_secs(20), "{error}");
    seen.print("etcd is stopped for longer than a lease");
    server.thaw();
    let back = newcomer(&server, "d", Instant::now());
    println!("continued: a newcomer moves bytes after {back:?}");
    assert!(back < BACK_WITHIN);

    server.restart(true);
    let back = newcomer(&server, "e", Instant::now());
    println!("wiped: a newcomer moves bytes after {back:?}");
    assert!(back < BACK_WITHIN);
    seen.print("etcd is wiped");

    seen.stop.store(true, Ordering::Relaxed);
    traffic.join().unwrap();
    assert!(a.incidents().is_empty(), "{:?}", a.incidents());
    assert!(a.rails().iter().all(|rail| rail.lives <= 1), "{:?}", a.rails());
    assert!(a.shutdown(LONG) && b.shutdown(LONG));
}
