//! What is registered is told as a whole each time: many ranges at once must cost about as much as their number, all of them or none.
#![allow(unsafe_code)]

#[path = "../../datapath/tests/counting/mod.rs"]
mod counting;
mod pair;

use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use counting::BYTES;
use moonrail::{Engine, Memory, RegisterError, Transfer, UnregisterError};
use moonrail_datapath::nic::sim::{SimOptions, SimWorld};
use pair::{LONG, builder, cluster, nics};

const EACH: usize = 64;

/// Ranges that lie one beside the other, the last one first.
fn memories(count: usize) -> Vec<Arc<Memory>> {
    let heap = Box::leak(vec![0u8; count * EACH].into_boxed_slice()).as_mut_ptr();
    let one = |index: usize| {
        // SAFETY: inside what was leaked, so it stays mapped; nobody holds a reference to it.
        unsafe { Memory::borrow(NonNull::new(heap.add(index * EACH)).unwrap(), EACH) }
    };
    (0..count).rev().map(one).collect()
}

fn engine(world: &SimWorld, name: &str, node: u8, uri: &str) -> Engine {
    let (open, _) = nics(world, node, 1);
    builder(&Arc::default()).name(name).metadata(uri).nics_from(open).cores(1).build().unwrap()
}

/// Bytes asked for per range.
fn cost(count: usize, register: impl FnOnce(&[Arc<Memory>])) -> u64 {
    let memories = memories(count);
    let before = BYTES.load(Ordering::Relaxed);
    register(&memories);
    (BYTES.load(Ordering::Relaxed) - before) / count as u64
}

// One test: the counter is the process's.
#[test]
fn many_ranges_at_once_cost_as_much_each_as_few() {
    let world = SimWorld::real_time(8, SimOptions::default());
    let uri = cluster();
    let (a, b) = (engine(&world, "a", 1, &uri), engine(&world, "b", 2, &uri));

    let mut costs = Vec::new();
    for count in [1_000, 10_000, 100_000] {
        let mut regions = Vec::new();
        costs.push(cost(count, |memories| regions = b.register_many(memories, "cpu:0", true).unwrap()));
        assert_eq!((regions.len(), b.regions().len()), (count, count));
        b.unregister_many(&regions).unwrap();
        assert!(b.regions().is_empty());
    }
    let singly = cost(1_000, |memories| {
        let regions: Vec<_> = memories.iter().map(|memory| b.register(memory, "cpu:0", true).unwrap()).collect();
        b.unregister_many(&regions).unwrap();
    });
    println!(
        "bytes asked for per range: {costs:?} for 1,000, 10,000 and 100,000 at once; {singly} for 1,000 one by one"
    );
    assert!(costs[2] < 2 * costs[0], "{costs:?}");
    assert!(singly > 10 * costs[0], "the counter sees what is copied whole: {singly}, {costs:?}");

    // All or none, and in the caller's order. The peer finds each of them.
    let all = memories(100);
    let first = b.register(&all[50], "cpu:0", true).unwrap();
    assert!(matches!(b.register_many(&all, "cpu:0", true), Err(RegisterError::Overlap { .. })));
    assert_eq!(b.regions().len(), 1);
    b.unregister(&first).unwrap();
    let regions = b.register_many(&all, "cpu:0", true).unwrap();
    assert!(regions.iter().zip(&all).all(|(region, memory)| region.addr() == memory.addr()));
    let near = a.allocate(4096, "*").unwrap();
    near.write(0, &[7; EACH]).unwrap();
    let segment = a.open_segment("b").unwrap();
    assert_eq!(segment.buffers().len(), 100);
    let to_each = |region: &moonrail::Region| Transfer::write_from(&near, 0, region.addr(), EACH as u64);
    let transfers: Vec<_> = regions.iter().map(to_each).collect();
    a.submit(&segment, &transfers).unwrap().wait(LONG).unwrap();
    for region in &regions {
        let mut bytes = [0; EACH];
        region.read(0, &mut bytes).unwrap();
        assert_eq!(bytes, [7; EACH]);
    }
    b.unregister_many(&regions[..60]).unwrap();
    assert!(matches!(b.unregister_many(&regions[59..]), Err(UnregisterError::NotRegistered { .. })));
    assert_eq!(b.regions().len(), 40, "none of them");
    assert!(b.register_many(&[], "*", true).unwrap().is_empty());
}
