//! The mapped path allocates nothing, and makes no system call.

mod counting;
mod shm_rig;

use std::process::Command;

use moonrail_datapath::nic::shm::ShmNic;
use moonrail_datapath::nic::{Completion, Nic, Op, WcStatus};
use moonrail_datapath::region::Memory;

use counting::{ALLOCATIONS, FREES, ON};
use shm_rig::{Desk, REMOTE};

/// Two engines of this process; chains of 64 blocks of 4 KiB. Returns the slices moved.
fn move_slices(rounds: u64) -> u64 {
    let (ours, theirs) = (ShmNic::open().unwrap(), ShmNic::open().unwrap());
    let (near, far) = (Memory::allocate(1 << 20).unwrap(), Memory::allocate(1 << 20).unwrap());
    let _registration = theirs.register(&far, 0, 1 << 20, REMOTE).unwrap();
    let mut desk = Desk::dial(&ours, theirs.token()).unwrap();
    let pieces: Vec<_> = (0..64).map(|i| (near.addr() + i * 4096, far.addr() + i * 8192, 4096)).collect();
    desk.succeed(Op::Write, &pieces);
    let chain = desk.chain(Op::Write, &pieces);
    let mut some = [Completion::EMPTY; 64];
    ON.set(true);
    for _ in 0..rounds {
        assert_eq!(desk.post.post(&chain).accepted, 64);
        let mut got = 0;
        while got < 64 {
            got += desk.cq.poll(&mut some[got..]).unwrap();
        }
        assert!(some.iter().all(|c| c.status == WcStatus::SUCCESS));
    }
    ON.set(false);
    64 * rounds
}

#[test]
fn a_slice_on_the_mapped_path_allocates_nothing() {
    assert_eq!(move_slices(2000), 128_000);
    assert_eq!((ALLOCATIONS.get(), FREES.get()), (0, 0));
    ON.set(true);
    drop(std::hint::black_box(vec![1u8; 100]));
    ON.set(false);
    assert_eq!((ALLOCATIONS.get(), FREES.get()), (1, 1), "the counter bites");
}

/// The body of the process that is traced.
#[test]
fn traced() {
    if let Some(rounds) = std::env::var("MOONRAIL_SHM_ROUNDS").ok().and_then(|r| r.parse().ok()) {
        move_slices(rounds);
    }
}

/// System calls of a whole process that moves so many chains, by strace.
fn system_calls(rounds: u64) -> Option<u64> {
    let mut strace = Command::new("strace");
    strace.args(["-f", "-c", "-U", "calls,name"]).arg(std::env::current_exe().unwrap());
    let output = strace.args(["--exact", "traced"]).env("MOONRAIL_SHM_ROUNDS", rounds.to_string()).output().ok()?;
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    let total = text.lines().find(|line| line.ends_with("total"))?;
    total.split_whitespace().next()?.parse().ok()
}

#[test]
fn a_slice_on_the_mapped_path_makes_no_system_call() {
    let (Some(few), Some(many)) = (system_calls(10), system_calls(5000)) else {
        return eprintln!("skipped: no strace here");
    };
    println!("{few} system calls for 640 slices, {many} for 320,000");
    assert!(many < few + 1000, "{few} system calls for 640 slices, {many} for 320,000");
}
