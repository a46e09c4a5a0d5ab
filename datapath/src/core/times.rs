//! How long things took: counts in buckets of a fixed table, and nothing else. A bucket is an eighth of an octave from 1 us to
//! 34 ms, where transfers are, and an octave below and above: every rail has two tables, whether it is used or not.
//!
//! A core is the one writer; to count is a load and a store of a word in its own memory. Whoever reads loads the table
//! word by word, so what is read may be a few counts apart in time, and never disturbs the core.

use super::counters::Counter;
use crate::units::Nanos;

/// Buckets of an octave that is cut: their bounds are an eighth apart, so a quantile is at most 12.5 % too high.
const PER_OCTAVE: usize = 1 << SHIFT;
const SHIFT: u32 = 3;
/// From 2^10 ns, 1 us, on octaves are cut,
const FINE: u32 = 10;
/// up to 2^25 ns, 34 ms.
const COARSE: u32 = 25;
/// What takes longer than 2^36 ns, 69 s, is counted with that: no transfer may take as long without being told of.
const OCTAVES: u32 = 36;
/// Buckets below the first octave that is cut: up to 1 ns, 2, 4, ... 1,024.
const BELOW: usize = FINE as usize + 1;
const CUT: usize = (COARSE - FINE) as usize * PER_OCTAVE;
const BUCKETS: usize = BELOW + CUT + (OCTAVES - COARSE) as usize;

/// A histogram with a single writer. 1.1 KiB.
#[derive(Debug)]
pub struct Times {
    buckets: [Counter; BUCKETS],
    /// Nanoseconds of all together.
    sum: Counter,
}

impl Default for Times {
    fn default() -> Self {
        Self { buckets: std::array::from_fn(|_| Counter::default()), sum: Counter::default() }
    }
}

impl Times {
    /// Counts `n` of them that took `span` each. The writer's thread only.
    pub(crate) fn add(&self, span: Nanos, n: u64) {
        self.buckets[bucket(span.0)].add(n);
        self.sum.add(span.0.wrapping_mul(n));
    }

    /// What was counted so far. Any thread.
    pub fn read(&self) -> Spread {
        let counts = self.buckets.iter().enumerate().map(|(at, count)| (upper(at), count.get()));
        Spread { counts: counts.filter(|(_, count)| *count > 0).collect(), sum_ns: self.sum.get() }
    }
}

/// The bucket of a span. Its upper bound belongs to it, the lower one does not.
fn bucket(span: u64) -> usize {
    let at = span.saturating_sub(1);
    // Above how many whole octaves it lies: 2^octave < span <= 2 * 2^octave.
    let octave = (at | 1).ilog2();
    match octave {
        _ if at == 0 => 0,
        ..FINE => octave as usize + 1,
        FINE..COARSE => {
            let within = (at >> (octave - SHIFT)) as usize & (PER_OCTAVE - 1);
            BELOW + (octave - FINE) as usize * PER_OCTAVE + within
        }
        _ => (BELOW + CUT + (octave - COARSE) as usize).min(BUCKETS - 1),
    }
}

/// The longest span of a bucket, in nanoseconds.
fn upper(bucket: usize) -> u64 {
    if bucket < BELOW {
        return 1 << bucket;
    }
    let fine = bucket - BELOW;
    if fine < CUT {
        let (octave, within) = (FINE as usize + fine / PER_OCTAVE, (fine % PER_OCTAVE) as u64);
        return (PER_OCTAVE as u64 + within + 1) << (octave - SHIFT as usize);
    }
    2 << (COARSE as usize + fine - CUT)
}

/// A reading of [`Times`]: how many took how long.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Spread {
    /// Longest span of a bucket in nanoseconds, and how many are in it; ascending, none empty.
    counts: Vec<(u64, u64)>,
    sum_ns: u64,
}

impl Spread {
    /// From what [`Spread::counts`] and [`Spread::sum_ns`] gave, in any order.
    pub fn new(counts: impl IntoIterator<Item = (u64, u64)>, sum_ns: u64) -> Self {
        let mut counts: Vec<_> = counts.into_iter().filter(|(_, count)| *count > 0).collect();
        counts.sort_unstable();
        Self { counts, sum_ns }
    }

    /// Longest span of each bucket in nanoseconds and how many are in it, ascending, empty ones left out.
    pub fn counts(&self) -> &[(u64, u64)] {
        &self.counts
    }

    /// All spans together, in nanoseconds; it wraps after 584 years.
    pub fn sum_ns(&self) -> u64 {
        self.sum_ns
    }

    /// How many.
    pub fn count(&self) -> u64 {
        self.counts.iter().map(|(_, count)| count).sum()
    }

    /// How many took at most `ns` nanoseconds: exact where that is a power of two.
    pub fn count_up_to(&self, ns: u64) -> u64 {
        self.counts.iter().take_while(|(upper, _)| *upper <= ns).map(|(_, count)| count).sum()
    }

    /// The span that a share of `quantile` (0 to 1) did not exceed, in nanoseconds; `None` of none. At most 12.5 % too high from 1 us
    /// to 34 ms, and less than twice as high elsewhere.
    pub fn quantile(&self, quantile: f64) -> Option<u64> {
        let wanted = (self.count() as f64 * quantile.clamp(0.0, 1.0)).ceil().max(1.0) as u64;
        let mut seen = 0;
        let found = self.counts.iter().find(|(_, count)| {
            seen += count;
            seen >= wanted
        });
        found.or(self.counts.last()).map(|(upper, _)| *upper)
    }

    /// What came since `earlier`, a reading of the same table.
    #[must_use]
    pub fn since(&self, earlier: &Self) -> Self {
        let before = |upper| match earlier.counts.binary_search_by_key(&upper, |(upper, _)| *upper) {
            Ok(at) => earlier.counts[at].1,
            Err(_) => 0,
        };
        let rest = self.counts.iter().map(|(upper, count)| (*upper, count.saturating_sub(before(*upper))));
        Self::new(rest, self.sum_ns.wrapping_sub(earlier.sum_ns))
    }

    /// Adds another one: of all rails of a NIC, say.
    pub fn merge(&mut self, other: &Self) {
        for (upper, count) in &other.counts {
            match self.counts.binary_search_by_key(upper, |(upper, _)| *upper) {
                Ok(at) => self.counts[at].1 += count,
                Err(at) => self.counts.insert(at, (*upper, *count)),
            }
        }
        self.sum_ns = self.sum_ns.wrapping_add(other.sum_ns);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn bounds_ascend_and_each_belongs_to_its_bucket() {
        for at in 0..BUCKETS {
            assert_eq!(bucket(upper(at)), at, "upper bound of {at}");
            if at + 1 < BUCKETS {
                assert_eq!(bucket(upper(at) + 1), at + 1, "just above {at}");
            }
        }
        assert_eq!((upper(0), upper(BUCKETS - 1)), (1, 1 << OCTAVES));
        assert_eq!((bucket(0), bucket(u64::MAX)), (0, BUCKETS - 1));
    }

    proptest! {
        #[test]
        fn a_quantile_is_never_too_low_and_an_eighth_too_high_at_most_where_transfers_are(
            exponents in proptest::collection::vec(0.0f64..36.0, 1..200),
            quantile in 0.0f64..=1.0,
        ) {
            let times = Times::default();
            let mut spans: Vec<u64> = exponents.iter().map(|exponent| exponent.exp2() as u64).collect();
            for span in &spans {
                times.add(Nanos(*span), 1);
            }
            spans.sort_unstable();
            let rank = ((spans.len() as f64 * quantile).ceil() as usize).max(1);
            let exact = spans[rank - 1];
            let found = times.read().quantile(quantile).unwrap();
            let most = if (1 << FINE..=1 << COARSE).contains(&exact) { 1.125 } else { 2.0 };
            prop_assert!(found >= exact && found as f64 <= exact.max(1) as f64 * most + 1.0, "{found} for {exact}");
        }

        #[test]
        fn counts_below_a_power_of_two_are_exact(spans in proptest::collection::vec(0u64..1 << 20, 0..100), bit in 0u32..20) {
            let times = Times::default();
            for span in &spans {
                times.add(Nanos(*span), 1);
            }
            let exact = spans.iter().filter(|span| **span <= 1 << bit).count() as u64;
            prop_assert_eq!(times.read().count_up_to(1 << bit), exact);
        }
    }

    #[test]
    fn what_came_since_and_what_came_together() {
        let times = Times::default();
        assert_eq!(times.read().quantile(0.5), None);
        times.add(Nanos(100), 3);
        let before = times.read();
        times.add(Nanos(100), 1);
        times.add(Nanos(5000), 9);
        let since = times.read().since(&before);
        assert_eq!((since.count(), since.sum_ns()), (10, 45_100));
        assert_eq!((since.quantile(0.1), since.quantile(0.5)), (Some(128), Some(5120)));
        let mut both = before.clone();
        both.merge(&since);
        assert_eq!(both, times.read());
        assert_eq!(Spread::new(both.counts().iter().rev().copied(), both.sum_ns()), both);
    }
}
