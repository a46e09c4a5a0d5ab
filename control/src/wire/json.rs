//! Reading JSON with the tolerance of the stock engine's parser, and refusing what would kill it.
//!
//! Members are first taken as raw text and then read by what is wanted: a number or null where a string belongs, null
//! where an integer belongs and an unknown member of any type are fine; an array where a string belongs is an error here
//! (the stock engine aborts on it). Nothing is built that is not asked for, so memory stays in proportion to the input.

use std::borrow::Cow;

use serde::{Deserialize, Deserializer};
use serde_json::value::RawValue;

/// Text that is not what it should be.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum JsonError {
    /// Not UTF-8, or not JSON, or not an object.
    #[error("not a JSON object: {why}")]
    Syntax {
        /// The parser's own words, with line and column.
        why: String,
    },
    /// A member has a type or range it must not have.
    #[error("member `{member}` must be {wanted}, not {found}")]
    Type {
        /// Name of the member.
        member: &'static str,
        /// What it must be.
        wanted: &'static str,
        /// How what is there begins.
        found: String,
    },
}

/// A member, kept even when it is null: its presence can mean something.
pub(crate) fn present<'de, D: Deserializer<'de>>(from: D) -> Result<Option<&'de RawValue>, D::Error> {
    <&RawValue>::deserialize(from).map(Some)
}

/// Parses `text` as `T`, which borrows from it.
pub(crate) fn parse<'a, T: Deserialize<'a>>(text: &'a [u8]) -> Result<T, JsonError> {
    let text = std::str::from_utf8(text).map_err(|e| JsonError::Syntax { why: e.to_string() })?;
    if !text.trim_start().starts_with('{') {
        return Err(JsonError::Syntax { why: format!("it begins with {:?}", shown(text.trim_start())) });
    }
    serde_json::from_str(text).map_err(|e| JsonError::Syntax { why: e.to_string() })
}

/// `text` with comments (`/* */` and `//`) outside strings replaced by blanks: the stock parser accepts them.
///
/// Byte for byte as long as `text`, so that positions in messages stay right.
pub fn without_comments(text: &str) -> Cow<'_, str> {
    if !text.contains("/*") && !text.contains("//") {
        return Cow::Borrowed(text);
    }
    let bytes = text.as_bytes();
    let mut out = Vec::with_capacity(bytes.len());
    let (mut at, mut in_string) = (0, false);
    while at < bytes.len() {
        let rest = &bytes[at..];
        let comment = match (in_string, rest) {
            (false, [b'/', b'/', ..]) => rest.iter().position(|b| *b == b'\n').unwrap_or(rest.len()),
            (false, [b'/', b'*', ..]) => {
                rest[2..].windows(2).position(|w| w == b"*/").map_or(rest.len(), |end| end + 4)
            }
            _ => 0,
        };
        if comment > 0 {
            out.extend(rest[..comment].iter().map(|b| if *b == b'\n' { b'\n' } else { b' ' }));
            at += comment;
            continue;
        }
        let step = if in_string && rest[0] == b'\\' { 2.min(rest.len()) } else { 1 };
        in_string ^= step == 1 && rest[0] == b'"';
        out.extend_from_slice(&rest[..step]);
        at += step;
    }
    String::from_utf8(out).map_or(Cow::Borrowed(text), Cow::Owned)
}

fn shown(text: &str) -> String {
    text.chars().take(24).collect()
}

pub(crate) fn wrong(member: &'static str, wanted: &'static str, raw: &RawValue) -> JsonError {
    JsonError::Type { member, wanted, found: shown(raw.get()) }
}

/// First byte of a value: it tells the type. Raw values carry no white space around them.
fn lead(raw: &RawValue) -> u8 {
    raw.get().as_bytes().first().copied().unwrap_or(b'n')
}

pub(crate) fn is_array(raw: &RawValue) -> bool {
    lead(raw) == b'['
}

pub(crate) fn is_object(raw: &RawValue) -> bool {
    lead(raw) == b'{'
}

pub(crate) fn is_string(raw: &RawValue) -> bool {
    lead(raw) == b'"'
}

/// A string; absent or null is empty, a number or a boolean its text.
pub(crate) fn string(member: &'static str, raw: Option<&RawValue>) -> Result<String, JsonError> {
    let Some(raw) = raw else { return Ok(String::new()) };
    match lead(raw) {
        b'"' => serde_json::from_str(raw.get()).map_err(|e| JsonError::Syntax { why: e.to_string() }),
        b'n' => Ok(String::new()),
        b'[' | b'{' => Err(wrong(member, "a string", raw)),
        _ => Ok(raw.get().to_owned()),
    }
}

/// A boolean; absent or null is `false`.
pub(crate) fn boolean(member: &'static str, raw: Option<&RawValue>) -> Result<bool, JsonError> {
    match raw.map_or("false", RawValue::get) {
        "true" => Ok(true),
        "false" | "null" => Ok(false),
        _ => Err(JsonError::Type { member, wanted: "true or false", found: "something else".to_owned() }),
    }
}

/// An unsigned integer up to 2^64 - 1, exact; absent or null is 0.
pub(crate) fn unsigned(member: &'static str, raw: Option<&RawValue>) -> Result<u64, JsonError> {
    let Some(raw) = raw else { return Ok(0) };
    let refused = || wrong(member, "an unsigned integer", raw);
    match lead(raw) {
        b'n' | b'f' => Ok(0),
        b't' => Ok(1),
        b'0'..=b'9' => match raw.get().parse::<u64>() {
            Ok(value) => Ok(value),
            // 2^64 is exact as f64, and everything below it truncates into range.
            Err(_) => match raw.get().parse::<f64>() {
                Ok(value) if value < 18_446_744_073_709_551_616.0 && raw.get().contains(['.', 'e', 'E']) => {
                    Ok(value as u64)
                }
                _ => Err(refused()),
            },
        },
        _ => Err(refused()),
    }
}

/// A signed 32-bit integer; absent or null is `default`.
pub(crate) fn int32(member: &'static str, raw: Option<&RawValue>, default: i32) -> Result<i32, JsonError> {
    let Some(raw) = raw else { return Ok(default) };
    match lead(raw) {
        b'n' => Ok(0),
        _ => raw.get().parse().map_err(|_| wrong(member, "a 32-bit integer", raw)),
    }
}

/// Compact JSON and a newline. The types written in this crate (no maps with keys other than strings) cannot fail.
pub(crate) fn line<T: serde::Serialize>(value: &T) -> Vec<u8> {
    let mut text = serde_json::to_vec(value).unwrap_or_default();
    text.push(b'\n');
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn raw(text: &str) -> Box<RawValue> {
        serde_json::from_str(text).unwrap()
    }

    #[test]
    fn comments_go_and_strings_stay() {
        let text = "{/* a \"b\" */ \"//x\": \"/*\\\"*/\" // end\n}";
        let clean = without_comments(text);
        assert_eq!(clean.len(), text.len());
        assert_eq!(clean.split_whitespace().collect::<Vec<_>>().join(""), r#"{"//x":"/*\"*/"}"#);
    }

    #[test]
    fn integers_are_exact_to_the_last_bit() {
        assert_eq!(unsigned("a", Some(&raw("18446744073709551615"))), Ok(u64::MAX));
        assert_eq!(unsigned("a", Some(&raw("5.0"))), Ok(5));
        assert_eq!(unsigned("a", Some(&raw("null"))), Ok(0));
        for bad in ["-1", "18446744073709551616", "\"7\"", "[]", "1e300", "{}"] {
            assert!(unsigned("a", Some(&raw(bad))).is_err(), "{bad}");
        }
        assert!(int32("a", Some(&raw("2147483648")), 0).is_err());
        assert_eq!(int32("a", Some(&raw("-7")), 0), Ok(-7));
    }

    #[test]
    fn numbers_and_null_pass_for_strings() {
        assert_eq!(string("a", Some(&raw("5"))).unwrap(), "5");
        assert_eq!(string("a", Some(&raw("null"))).unwrap(), "");
        assert!(string("a", Some(&raw("[]"))).is_err());
    }

    proptest! {
        #[test]
        fn removing_comments_never_panics(text in "[\"/*\\\\\n a]{0,40}") {
            prop_assert_eq!(without_comments(&text).len(), text.len());
        }
    }
}
