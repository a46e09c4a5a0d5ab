//! A served connection against a straight reading of the same bytes: the corpus of the fuzz target, and random streams.

use proptest::prelude::*;

#[path = "../../tools/fuzz/src/tcp_server.rs"]
mod tcp_server;

use tcp_server::{BASE, FIRST, SECOND, drive};

fn corpus() -> Vec<Vec<u8>> {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../tools/fuzz/corpus/tcp_server");
    let files = std::fs::read_dir(folder).unwrap().map(|f| std::fs::read(f.unwrap().path()).unwrap());
    files.collect()
}

#[test]
fn the_corpus_keeps_every_law() {
    let inputs = corpus();
    assert!(inputs.len() >= 10, "the corpus is not there");
    for mut input in inputs {
        for seed in 0..50u32 {
            input[..4].copy_from_slice(&seed.to_le_bytes());
            drive(&input);
        }
    }
}

/// A request: mostly a good one.
fn request() -> impl Strategy<Value = Vec<u8>> {
    let opcode = prop_oneof![
        4 => prop::sample::select(vec![0x00u8, 0x01, 0x80, 0x81]),
        4 => prop::sample::select(vec![0xc0u8, 0xc1]),
        1 => any::<u8>(),
    ];
    let end = FIRST + SECOND;
    let good = (0..end, 1u64..3000).prop_map(move |(at, len)| (BASE + at.min(end - len), len));
    let range = prop_oneof![
        50 => good,
        1 => (any::<u64>(), any::<u64>()),
        1 => (BASE..BASE + end, 0..2 * end),
    ];
    (opcode, prop::collection::vec(range, 1..40), any::<u32>(), prop::bool::weighted(0.02)).prop_map(
        |(opcode, ranges, number, wrong)| {
            let mut bytes = vec![0; 24];
            bytes[16] = opcode;
            let list = opcode & 0xfe == 0xc0;
            let ranges = if list { ranges } else { vec![ranges[0]] };
            let sum = ranges.iter().fold(0u64, |sum, r| sum.wrapping_add(r.1));
            if list {
                bytes[..4].copy_from_slice(&(ranges.len() as u32 + u32::from(wrong)).to_le_bytes());
                bytes[4..8].copy_from_slice(&number.to_le_bytes());
                bytes[8..16].copy_from_slice(&sum.wrapping_add(u64::from(number % 50 == 0)).to_le_bytes());
                bytes[17] = 1;
                for (addr, len) in &ranges {
                    bytes.extend(addr.to_le_bytes());
                    bytes.extend(len.to_le_bytes());
                }
            } else {
                bytes[..8].copy_from_slice(&ranges[0].1.to_le_bytes());
                bytes[8..16].copy_from_slice(&ranges[0].0.to_le_bytes());
            }
            if opcode & 0x7f == 1 || opcode == 0xc1 {
                let body = sum.min(100_000) as usize;
                bytes.extend((0..body).map(|n| (n as u32 ^ number) as u8));
            }
            bytes
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]

    #[test]
    fn any_cut_of_any_requests_is_read_as_the_whole(
        seed in any::<u32>(),
        requests in prop::collection::vec(request(), 0..30),
        short in 0usize..50,
    ) {
        let mut input = [&seed.to_le_bytes()[..], &requests.concat()].concat();
        input.truncate((input.len() - short.min(input.len() - 4)).max(4));
        drive(&input);
    }

    #[test]
    fn mutations_of_the_corpus_keep_every_law(
        which in any::<prop::sample::Index>(),
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8),
    ) {
        let inputs = corpus();
        let mut input = inputs[which.index(inputs.len())].clone();
        for (at, value) in changes {
            let at = at.index(input.len());
            input[at] = value;
        }
        drive(&input);
    }
}
