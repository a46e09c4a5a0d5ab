//! How Mooncake reads a variable, class by class, so that the same environment means the same thing here.

/// How a variable's text becomes a value.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Class {
    /// C's atoi: leading digits count, text without any is 0.
    Atoi,
    /// C++'s stoi: leading digits count, text without any is a warning.
    Stoi,
    /// The whole text is an integer, or it is a warning.
    Exact,
    /// `0`, `1`, `true` or `false`.
    Bool,
    /// On if the variable exists, whatever it holds, `0` and the empty text too.
    Presence,
    /// Taken as it is.
    Text,
}

impl Class {
    /// The word used in docs/configuration.md.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Atoi => "leading digits, else 0",
            Self::Stoi => "leading digits",
            Self::Exact => "integer",
            Self::Bool => "0, 1, true, false",
            Self::Presence => "set at all",
            Self::Text => "text",
        }
    }
}

/// Leading white space, sign and digits of `text`; `None` without a digit. Saturates where C's behaviour is undefined.
fn leading_integer(text: &str) -> Option<i64> {
    let text = text.trim_start_matches([' ', '\t', '\n', '\r', '\x0b', '\x0c']);
    let (negative, digits) = match text.as_bytes().first() {
        Some(b'-') => (true, &text[1..]),
        Some(b'+') => (false, &text[1..]),
        _ => (false, text),
    };
    let end = digits.bytes().position(|b| !b.is_ascii_digit()).unwrap_or(digits.len());
    if end == 0 {
        return None;
    }
    let value = digits.as_bytes()[..end]
        .iter()
        .fold(0i64, |value, digit| value.saturating_mul(10).saturating_add(i64::from(digit - b'0')));
    Some(if negative { -value } else { value })
}

/// The integer in `text` by the rules of `class`; the error is the warning to print. `None`: not a class of integers.
pub(crate) fn integer(class: Class, name: &str, text: &str) -> Option<Result<i64, String>> {
    match class {
        Class::Atoi => Some(Ok(leading_integer(text).unwrap_or(0))),
        Class::Stoi => {
            Some(leading_integer(text).ok_or_else(|| format!("Invalid {name} environment value: {text}. Error: stoi")))
        }
        Class::Exact => Some(text.trim().parse().map_err(|_| format!("Ignore value from environment variable {name}"))),
        Class::Bool | Class::Presence | Class::Text => None,
    }
}

/// `0|1|true|false`.
pub(crate) fn boolean(name: &str, text: &str) -> Result<bool, String> {
    match text {
        "0" | "false" => Ok(false),
        "1" | "true" => Ok(true),
        _ => Err(format!("Ignore value from environment variable {name}, it should be 0|1|true|false")),
    }
}

/// A comma list: spaces around names and empty names do not count.
pub(crate) fn list(text: &str) -> Vec<String> {
    text.split(',').map(str::trim).filter(|name| !name.is_empty()).map(str::to_owned).collect()
}

/// `l=p,p;l=p`: local NIC to peer NICs. Bad rules go into the second part.
pub(crate) fn peer_affinity(text: &str) -> (Vec<(String, Vec<String>)>, Vec<String>) {
    let (mut rules, mut bad) = (Vec::new(), Vec::new());
    for rule in text.split(';').map(str::trim).filter(|rule| !rule.is_empty()) {
        match rule.split_once('=').map(|(local, peers)| (local.trim(), list(peers))) {
            Some((local, peers)) if !local.is_empty() && !peers.is_empty() => rules.push((local.to_owned(), peers)),
            _ => bad.push(rule.to_owned()),
        }
    }
    (rules, bad)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn integers_are_read_as_c_reads_them() {
        for (text, atoi) in [
            ("12", 12),
            (" 12abc", 12),
            ("abc", 0),
            ("", 0),
            ("-3", -3),
            ("+7 ", 7),
            ("0x10", 0),
            ("- 3", 0),
            ("--3", 0),
        ] {
            assert_eq!(integer(Class::Atoi, "V", text), Some(Ok(atoi)), "{text:?}");
        }
        assert_eq!(integer(Class::Atoi, "V", "99999999999999999999"), Some(Ok(i64::MAX)));
        assert_eq!(integer(Class::Stoi, "V", "5x"), Some(Ok(5)));
        assert_eq!(
            integer(Class::Stoi, "MC_IB_TC", "x"),
            Some(Err("Invalid MC_IB_TC environment value: x. Error: stoi".into()))
        );
        assert!(integer(Class::Exact, "V", "5x").unwrap().is_err());
        assert_eq!(integer(Class::Presence, "V", "1"), None);
    }

    #[test]
    fn only_four_words_are_booleans() {
        assert_eq!((boolean("V", "1"), boolean("V", "false")), (Ok(true), Ok(false)));
        for other in ["", "yes", "TRUE", "2"] {
            assert!(boolean("V", other).unwrap_err().ends_with("it should be 0|1|true|false"));
        }
    }

    #[test]
    fn affinity_rules_that_are_none_are_told_apart() {
        let (rules, bad) = peer_affinity("a=b, c;x;=y;d=e;");
        assert_eq!(rules, [("a".into(), vec!["b".into(), "c".into()]), ("d".into(), vec!["e".into()])]);
        assert_eq!(bad, ["x", "=y"]);
    }

    proptest! {
        #[test]
        fn no_text_panics_a_parser(text in "\\PC{0,40}") {
            for class in [Class::Atoi, Class::Stoi, Class::Exact] {
                let _ = integer(class, "V", &text);
            }
            let _ = (boolean("V", &text), list(&text), peer_affinity(&text));
        }
    }
}
