//! `--verify` and `--ask-target` over two whole engines on simulated NICs: right bytes pass, one wrong byte does not.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use moonrail::{Engine, Gid, Nic, Op, Region, Segment};
use moonrail_datapath::nic::sim::{SimOptions, SimWorld};
use moonrail_tools::bench::judge::{Blocks, Task, Witness, carry_out};
use moonrail_tools::bench::load::{self, Outcome};
use moonrail_tools::bench::pattern::Mismatch;
use moonrail_tools::bench::plan::{Layout, Limit, Places, Plan, Verify};
use moonrail_tools::failure::Failure;
use moonrail_tools::signal::Stop;

const LIMIT: Duration = Duration::from_secs(20);
const BLOCK: u64 = 16 << 10;
const BLOCKS: u64 = 4;

fn engine(world: &SimWorld, name: &str, node: u8) -> Engine {
    let gid = Gid([0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 10, 0, 0, node]);
    let nic: Arc<dyn Nic> = world.nic(name, "sim0", gid).0;
    let uri = format!("memory://verify-{}-{:?}", std::process::id(), std::thread::current().id());
    let builder = Engine::builder().environment(|_| None).pin_cores(false).log(|_, _| {});
    builder.name(name).metadata(uri).nics_from(vec![nic]).cores(1).build().unwrap()
}

/// Two engines; the far one offers memory and answers questions about it, as `serve --verify` does.
struct Pair {
    near: Engine,
    far: Engine,
    offered: Region,
    segment: Segment,
}

impl Pair {
    fn new() -> Self {
        let world = SimWorld::real_time(5, SimOptions::default());
        let (near, far) = (engine(&world, "near", 1), engine(&world, "far", 2));
        let offered = far.allocate((BLOCK * BLOCKS) as usize, "*").unwrap();
        let segment = near.open_segment("far").unwrap();
        Self { near, far, offered, segment }
    }

    /// Runs one measurement while `meanwhile` is called again and again by somebody else.
    fn run(&self, op: Op, verify: Verify, batches: u64, meanwhile: impl Fn(u8) + Sync) -> Result<Outcome, Failure> {
        let layout = Layout::new(BLOCK, BLOCK, BLOCKS, 1).unwrap();
        let plan = Plan { op, layout, limit: Limit::Batches(batches), verify, timeout: LIMIT, first_iteration: 77 };
        let memory = || vec![self.near.allocate(layout.extent() as usize, "*").unwrap()];
        let places = Places { local: memory(), check: memory(), remote: vec![self.offered.addr()] };
        let over = AtomicBool::new(false);
        let regions = [self.offered.clone()];
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let mut witness = Witness::new(&self.far, &regions);
                while !over.load(Ordering::Relaxed) {
                    witness.serve();
                    std::thread::sleep(Duration::from_millis(1));
                }
            });
            scope.spawn(|| {
                for value in (0..=u8::MAX).cycle() {
                    if over.load(Ordering::Relaxed) {
                        break;
                    }
                    meanwhile(value);
                    std::thread::yield_now();
                }
            });
            let outcome = load::run(&self.near, &self.segment, &places, plan, (1, 1), &Stop::install().unwrap());
            over.store(true, Ordering::Relaxed);
            outcome
        })
    }
}

#[test]
fn right_bytes_pass_and_all_of_them_were_looked_at() {
    let pair = Pair::new();
    for op in [Op::Write, Op::Read] {
        for verify in [Verify::ReadBack, Verify::AskTarget] {
            let outcome = pair.run(op, verify, 3, |_| {}).unwrap();
            assert_eq!(
                (outcome.bytes, outcome.verified),
                (3 * BLOCK * BLOCKS, 3 * BLOCK * BLOCKS),
                "{op:?} {verify:?}"
            );
        }
    }
}

#[test]
fn one_wrong_byte_fails_the_run_and_is_named() {
    const SPOILED: u64 = 3 * BLOCK + 1234;
    for op in [Op::Write, Op::Read] {
        for (verify, how) in [(Verify::ReadBack, "read"), (Verify::AskTarget, "")] {
            let pair = Pair::new();
            let failure =
                pair.run(op, verify, 200, |value| pair.offered.write(SPOILED, &[value]).unwrap()).unwrap_err();
            let said = failure.to_string();
            let named = format!("WRONG BYTE at {:#x} of far: expected", pair.offered.addr() + SPOILED);
            assert!(said.contains(&named) && said.contains("1 wrong in this piece"), "{op:?} {verify:?}: {said}");
            assert!(said.contains(how), "{op:?} {verify:?}: {said}");
        }
    }
}

/// The owner's own look is the one that no NIC takes part in.
#[test]
fn the_owner_finds_the_one_wrong_byte_in_the_memory_itself() {
    let pair = Pair::new();
    let regions = [pair.offered.clone()];
    let blocks = Blocks { at: pair.offered.addr(), len: BLOCK, step: BLOCK, count: BLOCKS };
    assert_eq!(carry_out(&regions, Task::Fill, blocks, 9), Ok(None));
    assert_eq!(carry_out(&regions, Task::Check, blocks, 9), Ok(None));
    assert!(matches!(carry_out(&regions, Task::Check, blocks, 10), Ok(Some(_))), "another round is another pattern");
    let mut byte = [0];
    pair.offered.read(2 * BLOCK, &mut byte).unwrap();
    let expected = byte[0];
    pair.offered.write(2 * BLOCK, &[!expected]).unwrap();
    let addr = pair.offered.addr() + 2 * BLOCK;
    let wrong = Mismatch { addr, expected, found: !expected, wrong: 1 };
    assert_eq!(carry_out(&regions, Task::Check, blocks, 9), Ok(Some(wrong)));
}
