//! Engines of one host, over shared memory and TCP: memory of the engine's and of the embedder's, small and large, from
//! many threads, and what happens where the kernel forbids it.
#![allow(unsafe_code)] // an embedder registers memory of its own

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::ptr::NonNull;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use moonrail::{Engine, EngineBuilder, Fabric, FabricPolicy, Memory, Region, Segment, Transfer};

const LONG: Duration = Duration::from_secs(20);
/// Makes this program the peer process of `foreign_memory_…`.
const AS_PEER: &str = "MOONRAIL_TEST_PEER";
/// Makes it the process that reads, in the test after that.
const READS_FROM: &str = "MOONRAIL_TEST_PEER_OF";

fn builder(log: &Arc<Mutex<Vec<String>>>) -> EngineBuilder {
    let log = log.clone();
    Engine::builder()
        .environment(|_| None)
        .name("127.0.0.1")
        .cores(1)
        .pin_cores(false)
        .fabrics([Fabric::Shm, Fabric::Tcp])
        .log(move |level, line| log.lock().unwrap().push(format!("{level} {line}")))
}

fn engine() -> Engine {
    builder(&Arc::default()).build().unwrap()
}

/// Memory of this program's own.
fn borrowed(bytes: usize) -> Arc<Memory> {
    let heap = Box::leak(vec![0u8; bytes].into_boxed_slice());
    // SAFETY: leaked, so it stays mapped; nobody holds a reference to it from here on.
    unsafe { Memory::borrow(NonNull::from(heap).cast(), bytes) }
}

/// Bytes that tell where they belong.
fn pattern(len: usize, seed: u64) -> Vec<u8> {
    (0..len as u64).map(|i| (i.wrapping_mul(31).wrapping_add(seed).wrapping_mul(0x9e37_79b9) >> 13) as u8).collect()
}

/// WRITE and READ of `len` bytes between two places, checked on both sides.
fn there_and_back(near: &Engine, far: &Segment, local: &Region, remote: &Region, at: u64, len: u64, seed: u64) {
    let bytes = pattern(len as usize, seed);
    local.write(at, &bytes).unwrap();
    near.submit(far, &[Transfer::write_from(local, at, remote.addr() + at, len)]).unwrap().wait(LONG).unwrap();
    let mut seen = vec![0; len as usize];
    remote.read(at, &mut seen).unwrap();
    assert!(seen == bytes, "WRITE of {len} bytes at {at}");
    let other = pattern(len as usize, seed + 1);
    remote.write(at, &other).unwrap();
    near.submit(far, &[Transfer::read_into(local, at, remote.addr() + at, len)]).unwrap().wait(LONG).unwrap();
    local.read(at, &mut seen).unwrap();
    assert!(seen == other, "READ of {len} bytes at {at}");
}

const SIZES: [u64; 8] = [1, 64, 4000, 8192, 8193, 65_536, 1 << 20, 5_000_001];

#[test]
fn every_size_arrives_over_every_fabric_in_memory_of_every_kind() {
    let (a, b) = (engine(), engine());
    let local = [a.allocate(8 << 20, "*").unwrap(), a.register(&borrowed(8 << 20), "*", false).unwrap()];
    let remote = [b.allocate(8 << 20, "*").unwrap(), b.register(&borrowed(8 << 20), "*", true).unwrap()];
    for fabric in [Fabric::Shm, Fabric::Tcp] {
        let far = a.open_segment_with(b.name(), FabricPolicy::require(fabric)).unwrap();
        assert_eq!(far.fabric(), Some(fabric));
        for (kind, local) in local.iter().enumerate() {
            for (other, remote) in remote.iter().enumerate() {
                for (number, len) in SIZES.into_iter().enumerate() {
                    let seed = (fabric as usize * 1000 + kind * 100 + other * 10 + number) as u64;
                    there_and_back(&a, &far, local, remote, 3, len, seed);
                }
            }
        }
    }
    let counters = a.counters();
    assert!(counters.copies > 0, "small batches over shared memory are copied by the caller");
    assert!(counters.total().bytes > 0, "and large ones not by it alone");
}

#[test]
fn many_threads_submit_at_once() {
    let (a, b) = (engine(), engine());
    let (local, remote) = (a.allocate(16 << 20, "*").unwrap(), b.allocate(16 << 20, "*").unwrap());
    for fabric in [Fabric::Shm, Fabric::Tcp] {
        let far = a.open_segment_with(b.name(), FabricPolicy::require(fabric)).unwrap();
        std::thread::scope(|scope| {
            for thread in 0..8u64 {
                let (a, far, local, remote) = (&a, &far, &local, &remote);
                scope.spawn(move || {
                    for round in 0..20 {
                        let len = SIZES[(thread + round) as usize % 7];
                        there_and_back(a, far, local, remote, thread << 21, len, thread * 100 + round);
                    }
                });
            }
        });
    }
}

#[test]
fn the_own_segment_is_copied() {
    let a = engine();
    let (local, remote) = (a.allocate(4 << 20, "*").unwrap(), a.allocate(4 << 20, "*").unwrap());
    let own = a.open_segment(a.name()).unwrap();
    for len in [64, 100_000, 1 << 20] {
        there_and_back(&a, &own, &local, &remote, 0, len, len);
    }
    assert_eq!(own.fabric(), Some(Fabric::Shm));
}

#[test]
fn memory_that_was_taken_back_is_refused_and_the_rest_goes_on() {
    let (a, b) = (engine(), engine());
    let local = a.allocate(1 << 20, "*").unwrap();
    let (gone, stays) = (b.allocate(1 << 20, "*").unwrap(), b.allocate(1 << 20, "*").unwrap());
    for fabric in [Fabric::Shm, Fabric::Tcp] {
        let gone = if fabric == Fabric::Shm { gone.clone() } else { b.allocate(1 << 20, "*").unwrap() };
        let far = a.open_segment_with(b.name(), FabricPolicy::require(fabric)).unwrap();
        far.refresh().unwrap();
        there_and_back(&a, &far, &local, &gone, 0, 4096, 1);
        b.unregister(&gone).unwrap();
        for len in [64, 1 << 20] {
            let batch = a.submit(&far, &[Transfer::write_from(&local, 0, gone.addr(), len)]).unwrap();
            let error = batch.wait(LONG).unwrap_err().to_string();
            assert!(error.contains("not registered") || error.contains("access"), "{fabric} {len}: {error}");
        }
        there_and_back(&a, &far, &local, &stays, 0, 200_000, 2);
    }
}

/// Not a test: the peer of the next one, when asked to be.
#[test]
fn peer_process() {
    if std::env::var_os(AS_PEER).is_none() {
        return;
    }
    let engine = engine();
    let _region = engine.register(&borrowed(1 << 20), "*", true).unwrap();
    println!("\nname {}", engine.name());
    // Until the parent closes our input.
    let _ = std::io::stdin().lock().lines().next();
}

struct Peer(Child, String);

impl Peer {
    /// This program as another process.
    fn start() -> Self {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["peer_process", "--exact", "--nocapture"]).env(AS_PEER, "1");
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines().map_while(Result::ok);
        let name = lines.find_map(|line| line.strip_prefix("name ").map(str::to_owned)).expect("it says its name");
        // What else it says is read, so that it never waits for us.
        std::thread::spawn(move || lines.for_each(drop));
        Self(child, name)
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        drop(self.0.stdin.take());
        let _ = self.0.wait();
    }
}

#[test]
fn foreign_memory_of_another_process_goes_by_the_kernel() {
    let peer = Peer::start();
    let a = engine();
    let local = a.allocate(1 << 20, "*").unwrap();
    let far = a.open_segment(&peer.1).unwrap();
    let remote = far.buffers()[0].addr;
    local.write(0, &pattern(300_000, 5)).unwrap();
    a.submit(&far, &[Transfer::write_from(&local, 0, remote, 300_000)]).unwrap().wait(LONG).unwrap();
    a.submit(&far, &[Transfer::read_into(&local, 500_000, remote, 300_000)]).unwrap().wait(LONG).unwrap();
    let mut back = vec![0; 300_000];
    local.read(500_000, &mut back).unwrap();
    assert!(back == pattern(300_000, 5));
    assert_eq!(far.fabric(), Some(Fabric::Shm), "{:?}", a.explain(&peer.1));
}

/// Not a test: reads from the node that `MOONRAIL_TEST_PEER_OF` names, and tells how.
#[test]
fn reading_process() {
    let Ok(name) = std::env::var(READS_FROM) else { return };
    let log = Arc::default();
    let engine = builder(&log).build().unwrap();
    let local = engine.allocate(1 << 20, "*").unwrap();
    let far = engine.open_segment(&name).unwrap();
    let remote = far.buffers()[0].addr;
    for len in [64u64, 300_000] {
        engine.submit(&far, &[Transfer::read_into(&local, 0, remote, len)]).unwrap().wait(LONG).unwrap();
    }
    let mut seen = vec![0; 300_000];
    local.read(0, &mut seen).unwrap();
    println!("\nbytes are {}", if seen == pattern(300_000, 5) { "right" } else { "wrong" });
    println!("way {}", engine.explain(&name)[0]);
    let moved = log.lock().unwrap().iter().filter(|line| line.contains("no longer over shm")).count();
    println!("told {moved}");
}

#[test]
fn where_the_kernel_forbids_foreign_memory_tcp_carries_it_and_says_why() {
    let a = engine();
    let region = a.register(&borrowed(1 << 20), "*", true).unwrap();
    region.write(0, &pattern(300_000, 5)).unwrap();
    // In a pid namespace of its own a process has no number for us by which it could ask the kernel.
    let output = Command::new("unshare")
        .args(["--pid", "--fork", "--kill-child"])
        .arg(std::env::current_exe().unwrap())
        .args(["reading_process", "--exact", "--nocapture"])
        .env(READS_FROM, a.name())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{said}\n{}", String::from_utf8_lossy(&output.stderr));
    assert!(said.contains("bytes are right"), "{said}");
    assert!(said.contains("way over tcp") && said.contains("no shm: the system does not allow it"), "{said}");
    assert!(said.contains("told 1"), "{said}");
}
