//! The order in which GNU's C++ library walks `unordered_map<string, …>`.
//!
//! A stock process numbers a peer's NICs while it walks such a map, and takes that number as an index into the peer's
//! `devices` and `rkey`. To be placed right, we publish those arrays in the order it will come to. Nothing of this is
//! guaranteed by C++; if a library differs, transfers still work (`devices` and `rkey` agree with each other) and only
//! the choice of a near NIC is off.

/// Seed and multiplier of libstdc++'s `_Hash_bytes` on machines of 64 bits (Austin Appleby's MurmurHash).
const SEED: u64 = 0xc70f_6907;
const MUL: u64 = 0xc6a4_a793_5bd1_e995;

/// Bucket counts a growing map goes through, one entry per bucket at the most (measured with GCC 12).
const BUCKETS: [u64; 16] =
    [13, 29, 59, 127, 257, 541, 1109, 2357, 5087, 10273, 20753, 42043, 85229, 172_933, 351_061, 712_697];

fn hash(key: &[u8]) -> u64 {
    let little_endian = |bytes: &[u8]| bytes.iter().rev().fold(0, |all, byte| all << 8 | u64::from(*byte));
    let shift_mix = |word: u64| word ^ word >> 47;
    let mut hash = SEED ^ (key.len() as u64).wrapping_mul(MUL);
    let mut words = key.chunks_exact(8);
    for word in &mut words {
        let word = shift_mix(little_endian(word).wrapping_mul(MUL)).wrapping_mul(MUL);
        hash = (hash ^ word).wrapping_mul(MUL);
    }
    if !words.remainder().is_empty() {
        hash = (hash ^ little_endian(words.remainder())).wrapping_mul(MUL);
    }
    shift_mix(shift_mix(hash).wrapping_mul(MUL))
}

/// `keys`, distinct and in the order of their insertion, in the order of iteration.
pub(crate) fn iteration<'a>(keys: impl IntoIterator<Item = &'a str>) -> Vec<&'a str> {
    let mut order: Vec<(u64, &str)> = Vec::new();
    let mut grown = 0;
    for key in keys {
        if order.len() as u64 == BUCKETS[grown] && grown + 1 < BUCKETS.len() {
            grown += 1;
            // Growing takes the entries in their order and puts each into the larger table.
            for entry in std::mem::take(&mut order) {
                place(&mut order, BUCKETS[grown], entry);
            }
        }
        place(&mut order, BUCKETS[grown], (hash(key.as_bytes()), key));
    }
    order.into_iter().map(|(_, key)| key).collect()
}

/// One list holds all entries, those of a bucket side by side: an entry goes to the front of its bucket, and the first
/// entry of a bucket to the front of everything.
fn place<'a>(order: &mut Vec<(u64, &'a str)>, buckets: u64, entry: (u64, &'a str)) {
    let at = order.iter().position(|(hash, _)| hash % buckets == entry.0 % buckets).unwrap_or(0);
    order.insert(at, entry);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbered(kind: &str, count: usize) -> impl Iterator<Item = String> {
        (0..count).map(move |i| format!("{kind}:{i}"))
    }

    /// Printed by a C++ program over the same keys, inserted in sorted order (GCC 12).
    #[test]
    fn orders_measured_with_the_library() {
        let cases = [
            (2, 0, "", "cpu:1 cpu:0"),
            (4, 0, "", "cpu:3 cpu:2 cpu:1 cpu:0"),
            (8, 0, "", "cpu:5 cpu:4 cpu:3 cpu:7 cpu:6 cpu:2 cpu:1 cpu:0"),
            (2, 8, "", "cuda:7 cuda:6 cuda:4 cuda:3 cuda:2 cuda:5 cuda:1 cuda:0 cpu:1 cpu:0"),
            (1, 0, "*", "cpu:0 *"),
            (
                8,
                16,
                "a-long-location-name",
                "cuda:9 cuda:6 cuda:4 cuda:15 cuda:7 cuda:14 cuda:12 cuda:2 cpu:0 cpu:1 cuda:8 cpu:2 cpu:6 cuda:13 \
                 cpu:3 cuda:3 cpu:4 cuda:5 cpu:7 cpu:5 cuda:0 cuda:11 cuda:1 a-long-location-name cuda:10",
            ),
        ];
        for (cpus, gpus, more, expected) in cases {
            let more = (!more.is_empty()).then(|| more.to_owned());
            let mut keys: Vec<String> = numbered("cpu", cpus).chain(numbered("cuda", gpus)).chain(more).collect();
            keys.sort();
            let got = iteration(keys.iter().map(String::as_str));
            assert_eq!(got, expected.split_whitespace().collect::<Vec<_>>());
        }
    }

    #[test]
    fn hashes_measured_with_the_library() {
        assert_eq!(hash(b"cpu:0"), 3_862_002_140_393_004_990);
        assert_eq!(hash(b"a-long-location-name"), 1_390_170_470_682_698_345);
    }
}
