//! The bytes that `--verify` writes and looks for: each eight of them depend on their address in the peer and on the
//! iteration, so that data of another place, of another round, shifted data and data that never came all differ.

/// What was found where something else should stand.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Mismatch {
    /// Address of the first wrong byte, in the process whose memory was meant.
    pub addr: u64,
    /// The pattern's byte.
    pub expected: u8,
    /// The byte in memory.
    pub found: u8,
    /// Wrong bytes in the range checked.
    pub wrong: u64,
}

/// The eight bytes at `addr` (rounded down to eight) in round `iteration`: one round of SplitMix64.
fn word(addr: u64, iteration: u64) -> [u8; 8] {
    let mut z = (addr & !7) ^ iteration.wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(17);
    z = z.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    (z ^ (z >> 31)).to_le_bytes()
}

/// The byte at `addr` in round `iteration`.
pub fn byte(addr: u64, iteration: u64) -> u8 {
    word(addr, iteration)[(addr & 7) as usize]
}

/// Fills `out` with what should stand at `addr` and after.
pub fn fill(out: &mut [u8], addr: u64, iteration: u64) {
    let to_word = ((8 - (addr & 7)) & 7).min(out.len() as u64) as usize;
    let (head, rest) = out.split_at_mut(to_word);
    for (i, b) in head.iter_mut().enumerate() {
        *b = byte(addr + i as u64, iteration);
    }
    let start = addr + to_word as u64;
    for (i, chunk) in rest.chunks_mut(8).enumerate() {
        let bytes = word(start + 8 * i as u64, iteration);
        chunk.copy_from_slice(&bytes[..chunk.len()]);
    }
}

/// Fills `out` with bytes that differ from the pattern of `addr` and `iteration` at every place.
pub fn poison(out: &mut [u8], addr: u64, iteration: u64) {
    fill(out, addr, iteration);
    for b in out.iter_mut() {
        *b = !*b;
    }
}

/// Compares `found`, read at `addr`, with the pattern.
///
/// # Errors
/// The first wrong byte, and how many are wrong.
pub fn check(found: &[u8], addr: u64, iteration: u64) -> Result<(), Mismatch> {
    let mut expected = [0u8; 4096];
    let mut first = None;
    let mut wrong = 0;
    for (i, part) in found.chunks(expected.len()).enumerate() {
        let at = addr + (i * expected.len()) as u64;
        let expected = &mut expected[..part.len()];
        fill(expected, at, iteration);
        if part == expected {
            continue;
        }
        for (j, (e, f)) in expected.iter().zip(part).enumerate().filter(|(_, (e, f))| e != f) {
            first.get_or_insert((at + j as u64, *e, *f));
            wrong += 1;
        }
    }
    match first {
        None => Ok(()),
        Some((addr, expected, found)) => Err(Mismatch { addr, expected, found, wrong }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn one_wrong_byte_is_found_where_it_is(
            addr in 0u64..1 << 48, iteration: u64, len in 1usize..9000, at: prop::sample::Index, flip in 1u8..,
        ) {
            let mut bytes = vec![0; len];
            fill(&mut bytes, addr, iteration);
            prop_assert_eq!(check(&bytes, addr, iteration), Ok(()));
            let at = at.index(len);
            let expected = bytes[at];
            bytes[at] ^= flip;
            let found = bytes[at];
            let addr_of = addr + at as u64;
            prop_assert_eq!(check(&bytes, addr, iteration), Err(Mismatch { addr: addr_of, expected, found, wrong: 1 }));
        }

        #[test]
        fn a_piece_is_filled_as_the_whole_is(addr in 0u64..1 << 48, iteration: u64, cut in 0usize..64) {
            let (mut whole, mut pieces) = ([0; 64], [0; 64]);
            fill(&mut whole, addr, iteration);
            fill(&mut pieces[..cut], addr, iteration);
            fill(&mut pieces[cut..], addr + cut as u64, iteration);
            prop_assert_eq!(whole, pieces);
        }

        #[test]
        fn poison_differs_everywhere(addr in 0u64..1 << 48, iteration: u64) {
            let mut bytes = [0; 100];
            poison(&mut bytes, addr, iteration);
            prop_assert_eq!(check(&bytes, addr, iteration).unwrap_err().wrong, 100);
        }
    }

    #[test]
    fn neighbouring_places_and_rounds_differ() {
        let at = |addr, iteration| {
            let mut bytes = [0; 4096];
            fill(&mut bytes, addr, iteration);
            bytes
        };
        let here = at(0x7f00_0000_0000, 1);
        for (addr, iteration) in
            [(0x7f00_0000_0000, 2), (0x7f00_0000_1000, 1), (0x7f00_0000_0008, 1), (0x7f01_0000_0000, 1)]
        {
            let same = here.iter().zip(at(addr, iteration)).filter(|(a, b)| **a == *b).count();
            assert!(same < 64, "{same} of 4096 bytes alike: chance alone gives 16");
        }
    }
}
