//! What a queue pair of the shm NIC moves, one core, in this process between two engines. A measurement, not a test:
//! `cargo test --release -p moonrail-datapath --test shm_speed -- --ignored --nocapture`.

mod shm_rig;

use std::time::Duration;

use moonrail_datapath::nic::shm::ShmNic;
use moonrail_datapath::nic::{Completion, Nic, Op};
use moonrail_datapath::region::Memory;

use shm_rig::{Desk, REMOTE, borrowed};

/// Of this thread: what else the machine does counts only by the memory it moves.
fn cpu_time() -> Duration {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    Duration::new(now.tv_sec as u64, now.tv_nsec as u32)
}

#[test]
#[ignore = "a measurement"]
fn gigabytes_per_second() {
    const REGION: usize = 512 << 20;
    let (ours, theirs) = (ShmNic::open().unwrap(), ShmNic::open().unwrap());
    let near = Memory::allocate(REGION).unwrap();
    for (kind, far) in [("mapped", Memory::allocate(REGION).unwrap()), ("foreign", borrowed(REGION))] {
        let _registration = theirs.register(&far, 0, REGION as u64, REMOTE).unwrap();
        let mut desk = Desk::dial(&ours, theirs.token()).unwrap();
        // Page tables are made in the background.
        std::thread::sleep(Duration::from_millis(500));
        for (what, span) in [("one chain again and again", 0usize), ("fresh data", REGION)] {
            for block in [64usize, 4096, 65_536, 1 << 20] {
                let chain_bytes = block * 64.min((4 << 20) / block);
                let per_chain = chain_bytes / block;
                let mut some = [Completion::EMPTY; 64];
                let (mut at, mut moved, mut bytes, mut spent) = (0usize, 0usize, 0, Duration::ZERO);
                // Two rounds over everything, the first of them to warm up.
                let total = if span == 0 { 1 << 30 } else { 2 * span };
                let total = if block == 64 { total / 16 } else { total };
                while moved < total {
                    let pieces: Vec<_> = (0..per_chain)
                        .map(|i| {
                            let offset = ((at + i * block) % REGION) as u64;
                            (near.addr() + offset, far.addr() + offset, block as u32)
                        })
                        .collect();
                    let chain = desk.chain(Op::Write, &pieces);
                    let start = cpu_time();
                    desk.post.post(&chain);
                    let mut got = 0;
                    while got < per_chain {
                        got += desk.cq.poll(&mut some[got..]).unwrap();
                    }
                    if moved >= total / 2 {
                        spent += cpu_time().saturating_sub(start);
                        bytes += chain_bytes;
                    }
                    moved += chain_bytes;
                    at = if span == 0 { 0 } else { (at + chain_bytes) % REGION };
                }
                let seconds = spent.as_secs_f64();
                let per_block = seconds * 1e9 / (bytes / block) as f64;
                println!("{kind:8} {what:26} {block:8} B {:6.1} GB/s {per_block:9.0} ns", bytes as f64 / seconds / 1e9);
            }
        }
    }
}
