//! Sizes, spans and rates as people write and read them.

use std::time::Duration;

/// Bytes behind each suffix, longest first within one letter.
const SUFFIXES: [(&str, u64); 16] = [
    ("kib", 1 << 10),
    ("mib", 1 << 20),
    ("gib", 1 << 30),
    ("tib", 1 << 40),
    ("ki", 1 << 10),
    ("mi", 1 << 20),
    ("gi", 1 << 30),
    ("ti", 1 << 40),
    ("kb", 1_000),
    ("mb", 1_000_000),
    ("gb", 1_000_000_000),
    ("tb", 1_000_000_000_000),
    ("k", 1 << 10),
    ("m", 1 << 20),
    ("g", 1 << 30),
    ("b", 1),
];

/// Reads `4096`, `4KiB`, `4k` (= 4 KiB), `1.5GiB`, `1MB` (= 10^6); at least one byte.
///
/// # Errors
/// A sentence that says what is accepted.
pub fn parse_size(text: &str) -> Result<u64, String> {
    let refused =
        || format!("{text:?} is not a size: write bytes, or a number with KiB, MiB, GiB (k, m, g) or kB, MB, GB");
    let lower = text.trim().to_ascii_lowercase();
    let (digits, unit) = SUFFIXES
        .iter()
        .find_map(|(suffix, unit)| lower.strip_suffix(suffix).map(|digits| (digits.trim_end(), *unit)))
        .unwrap_or((&lower, 1));
    let bytes = match digits.parse::<u64>() {
        Ok(n) => n.checked_mul(unit),
        Err(_) => fraction(digits, unit),
    };
    match bytes {
        Some(0) => Err(format!("{text:?} is no bytes at all: give at least 1")),
        Some(bytes) => Ok(bytes),
        None => Err(refused()),
    }
}

/// One size, or each that doubles the one before.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Sizes(pub Vec<u64>);

/// Reads a size, or `FROM..TO`: FROM, twice FROM and so on, up to TO.
///
/// # Errors
/// A sentence that says what is accepted.
pub fn parse_sizes(text: &str) -> Result<Sizes, String> {
    let Some((from, to)) = text.split_once("..") else { return Ok(Sizes(vec![parse_size(text)?])) };
    let (from, to) = (parse_size(from)?, parse_size(to)?);
    if from > to {
        return Err(format!("{text:?} begins above its end: write the smaller size first"));
    }
    Ok(Sizes(std::iter::successors(Some(from), |size| size.checked_mul(2)).take_while(|size| *size <= to).collect()))
}

/// `1.5` of a unit, exact in whole bytes or refused.
fn fraction(digits: &str, unit: u64) -> Option<u64> {
    let (whole, part) = digits.split_once('.')?;
    if part.is_empty() || part.len() > 9 || !part.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    let whole: u128 = if whole.is_empty() { 0 } else { whole.parse::<u64>().ok()?.into() };
    let scale = 10u128.pow(part.len() as u32);
    let scaled = (whole * scale + part.parse::<u128>().ok()?) * u128::from(unit);
    if scaled.is_multiple_of(scale) { u64::try_from(scaled / scale).ok() } else { None }
}

/// Reads `10`, `10s`, `500ms`, `2m`, `1.5s`; more than nothing, at most a week.
///
/// # Errors
/// A sentence that says what is accepted.
pub fn parse_span(text: &str) -> Result<Duration, String> {
    const WEEK: f64 = 7.0 * 86_400.0;
    let trimmed = text.trim();
    let (digits, unit) = [("ms", 1e-3), ("s", 1.0), ("m", 60.0), ("h", 3600.0)]
        .into_iter()
        .find_map(|(suffix, unit)| trimmed.strip_suffix(suffix).map(|digits| (digits, unit)))
        .unwrap_or((trimmed, 1.0));
    match digits.trim_end().parse::<f64>() {
        Ok(n) if n.is_finite() && n * unit > 0.0 && n * unit <= WEEK => Ok(Duration::from_secs_f64(n * unit)),
        _ => Err(format!("{text:?} is not a time: write seconds, or a number with ms, s, m or h, up to a week")),
    }
}

/// `4 KiB`, `1.5 GiB`, `999 B`.
pub fn size(bytes: u64) -> String {
    let (mut value, mut unit) = (bytes as f64, "B");
    for next in ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"] {
        if value < 1024.0 {
            break;
        }
        (value, unit) = (value / 1024.0, next);
    }
    if (value - value.round()).abs() < 0.005 { format!("{value:.0} {unit}") } else { format!("{value:.2} {unit}") }
}

/// Bytes a second, in the decimal units of network cards.
pub fn rate(bytes: u64, over: Duration) -> String {
    let seconds = over.as_secs_f64();
    if seconds <= 0.0 {
        return "-".to_owned();
    }
    let per_second = bytes as f64 / seconds;
    match per_second {
        r if r >= 1e9 => format!("{:.2} GB/s", r / 1e9),
        r if r >= 1e6 => format!("{:.2} MB/s", r / 1e6),
        r => format!("{:.2} kB/s", r / 1e3),
    }
}

/// A latency: `740 ns`, `12.3 us`, `1.25 ms`, `2.10 s`.
pub fn span(nanos: u64) -> String {
    let n = nanos as f64;
    match nanos {
        0..=9_999 => format!("{nanos} ns"),
        10_000..=9_999_999 => format!("{:.1} us", n / 1e3),
        10_000_000..=9_999_999_999 => format!("{:.2} ms", n / 1e6),
        _ => format!("{:.2} s", n / 1e9),
    }
}

/// A span in at most five characters: `740ns`, `1.2us`, `123us`, `12ms`, `1.2s`, `999s`.
pub fn short_span(nanos: u64) -> String {
    scaled(nanos as f64, 1000.0, &["ns", "us", "ms", "s"], 2)
}

/// A number in at most five characters: `0`, `999`, `1.23k`, `12.3M`, `123G`.
pub fn short(value: f64) -> String {
    scaled(value, 1000.0, &["", "k", "M", "G", "T", "P", "E"], 3)
}

/// Bytes in at most five characters: `0`, `1023`, `64K`, `1.5M`, without the B.
pub fn short_binary(bytes: u64) -> String {
    scaled(bytes as f64, 1024.0, &["", "K", "M", "G", "T", "P", "E"], 2)
}

/// With `digits` significant digits, or more where they stand before the point; none behind it without a unit.
fn scaled(value: f64, base: f64, units: &[&str], digits: usize) -> String {
    let (mut value, mut at) = (value.max(0.0), 0);
    // What would be rounded up to the base is one of the next unit.
    while value.round() >= base && at + 1 < units.len() {
        (value, at) = (value / base, at + 1);
    }
    let before = if value >= 99.95 {
        3
    } else if value >= 9.995 {
        2
    } else {
        1
    };
    let behind = if at == 0 { 0 } else { digits.saturating_sub(before) };
    format!("{value:.behind$}{}", units[at])
}

/// A time that people waited: `0.4 s`, `12.3 s`, `4 min 10 s`, `2 h 5 min`, `3 d 4 h`.
pub fn waited(seconds: f64) -> String {
    if seconds < 60.0 {
        return format!("{:.1} s", seconds.max(0.0));
    }
    let whole = seconds as u64;
    match whole {
        0..=3_599 => format!("{} min {} s", whole / 60, whole % 60),
        3_600..=86_399 => format!("{} h {} min", whole / 3_600, whole / 60 % 60),
        _ => format!("{} d {} h", whole / 86_400, whole / 3_600 % 24),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn sizes_as_people_write_them() {
        for (text, bytes) in [
            ("4096", 4096),
            ("4KiB", 4096),
            ("4k", 4096),
            ("4 KB", 4000),
            ("64MiB", 64 << 20),
            ("1.5GiB", 3 << 29),
            ("2g", 2 << 30),
            ("1b", 1),
        ] {
            assert_eq!(parse_size(text), Ok(bytes), "{text}");
        }
        for bad in ["", "0", "-1", "x", "4x", "1.0001b", "99999999999g", "1e3", "1.", "KiB"] {
            assert!(parse_size(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn spans_as_people_write_them() {
        assert_eq!(parse_span("10"), Ok(Duration::from_secs(10)));
        assert_eq!(parse_span("500ms"), Ok(Duration::from_millis(500)));
        assert_eq!(parse_span("1.5m"), Ok(Duration::from_secs(90)));
        for bad in ["", "0", "-1s", "inf", "nan", "10x", "1e300"] {
            assert!(parse_span(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn figures_as_people_read_them() {
        assert_eq!((size(4096), size(1000), size(3 << 29)), ("4 KiB".into(), "1000 B".into(), "1.50 GiB".into()));
        assert_eq!(rate(2_500_000_000, Duration::from_secs(1)), "2.50 GB/s");
        assert_eq!(
            (span(740), span(12_340), span(2_100_000_000)),
            ("740 ns".into(), "12.3 us".into(), "2100.00 ms".into())
        );
    }

    #[test]
    fn figures_that_must_be_short() {
        let spans = [0, 740, 999, 1_000, 1_240, 12_340, 999_600, 1_000_000_000, 999_000_000_000].map(short_span);
        assert_eq!(spans, ["0ns", "740ns", "999ns", "1.0us", "1.2us", "12us", "1.0ms", "1.0s", "999s"]);
        let numbers = [0.0, 7.4, 999.4, 999.6, 1_234.0, 12_340.0, 999_499.0, 5.32e9, 53.2e9, 532e9].map(short);
        assert_eq!(numbers, ["0", "7", "999", "1.00k", "1.23k", "12.3k", "999k", "5.32G", "53.2G", "532G"]);
        assert_eq!([0, 1023, 64 << 10, 3 << 19, 1 << 40].map(short_binary), ["0", "1023", "64K", "1.5M", "1.0T"]);
        let widest = |text: fn(u64) -> String| {
            (0..64).flat_map(|bit| [1u64 << bit, 1023 << bit >> 10]).map(text).map(|t| t.len()).max()
        };
        assert_eq!(
            (widest(|n| short_span(n.min(999_499_999_999))), widest(|n| short(n as f64)), widest(short_binary)),
            (Some(5), Some(5), Some(5))
        );
    }

    #[test]
    fn ranges_of_sizes_double() {
        assert_eq!(parse_sizes("4KiB..16KiB"), Ok(Sizes(vec![4096, 8192, 16384])));
        assert_eq!(parse_sizes("3..7"), Ok(Sizes(vec![3, 6])));
        assert_eq!(parse_sizes("64"), Ok(Sizes(vec![64])));
        for bad in ["8..4", "..4", "4..", "x..y", "0..4"] {
            assert!(parse_sizes(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn times_as_people_wait() {
        let texts = [-1.0, 0.44, 59.94, 250.0, 7_500.0, 273_600.0].map(waited);
        assert_eq!(texts, ["0.0 s", "0.4 s", "59.9 s", "4 min 10 s", "2 h 5 min", "3 d 4 h"]);
    }

    proptest! {
        #[test]
        fn no_text_panics(text in "\\PC{0,24}") {
            let _ = (parse_size(&text), parse_span(&text));
        }

        #[test]
        fn what_is_printed_exactly_can_be_read_again(kib in 1u64..1024) {
            prop_assert_eq!(parse_size(&size(kib << 10)), Ok(kib << 10));
        }
    }
}
