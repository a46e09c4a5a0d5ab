//! The command-line syntax of gflags, for the command that stands in for `transfer_engine_bench`.
//!
//! What a script written for that program may hold: `-flag`, `--flag`, `--flag=value`, `--flag value`, `--noflag` for
//! booleans, `-` for `_` in names, `--` to end the flags, `--flagfile=FILE`, `--fromenv=a,b`, `--tryfromenv=a,b`,
//! `--undefok=a,b`, `--help`, `--version`. Words that are no flags are passed over, as that program does.
//! All faults of a command line are reported together, in the words of gflags.

use std::collections::{BTreeMap, BTreeSet};
use std::io;

/// Type of a flag's value, named as gflags names it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// `bool`: needs no value and never takes the next word.
    Bool,
    /// `int32`
    Int32,
    /// `uint32`
    Uint32,
    /// `uint64`
    Uint64,
    /// `string`
    Text,
}

impl Kind {
    /// The name gflags uses in its messages.
    pub fn name(self) -> &'static str {
        match self {
            Self::Bool => "bool",
            Self::Int32 => "int32",
            Self::Uint32 => "uint32",
            Self::Uint64 => "uint64",
            Self::Text => "string",
        }
    }

    /// The value in one spelling (`true`, decimal digits, text as it is); `None` if it is not of this type.
    fn canonical(self, value: &str) -> Option<String> {
        match self {
            Self::Bool => match value.to_ascii_lowercase().as_str() {
                "1" | "t" | "true" | "y" | "yes" => Some("true".to_owned()),
                "0" | "f" | "false" | "n" | "no" => Some("false".to_owned()),
                _ => None,
            },
            Self::Int32 => integer(value).and_then(|n| i32::try_from(n).ok()).map(|n| n.to_string()),
            Self::Uint32 => integer(value).and_then(|n| u32::try_from(n).ok()).map(|n| n.to_string()),
            Self::Uint64 => integer(value).and_then(|n| u64::try_from(n).ok()).map(|n| n.to_string()),
            Self::Text => Some(value.to_owned()),
        }
    }
}

/// Decimal, or hexadecimal after `0x`, with an optional sign; the whole word or nothing.
fn integer(value: &str) -> Option<i128> {
    let trimmed = value.trim_start();
    let (sign, digits) = match trimmed.as_bytes().first()? {
        b'-' => (-1, &trimmed[1..]),
        b'+' => (1, &trimmed[1..]),
        _ => (1, trimmed),
    };
    let hexadecimal = digits.strip_prefix("0x").or_else(|| digits.strip_prefix("0X"));
    let (radix, digits) = hexadecimal.map_or((10, digits), |rest| (16, rest));
    // from_str_radix would take a second sign.
    if !digits.starts_with(|c: char| c.is_digit(radix)) {
        return None;
    }
    i128::from_str_radix(digits, radix).ok().map(|n| sign * n)
}

/// One flag that a program knows.
#[derive(Clone, Debug)]
pub struct Flag {
    /// With underscores.
    pub name: &'static str,
    /// Of its value.
    pub kind: Kind,
    /// Spelled as [`Values`] keeps it: `true`, decimal digits, text.
    pub default: String,
    /// One sentence.
    pub help: &'static str,
}

/// The value of every flag.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Values {
    values: BTreeMap<&'static str, String>,
    given: BTreeSet<&'static str>,
}

impl Values {
    /// The value as text. Asking for a flag that is not in the table is a mistake of this program: empty.
    pub fn text(&self, name: &str) -> &str {
        debug_assert!(self.values.contains_key(name), "no flag {name}");
        self.values.get(name).map_or("", String::as_str)
    }

    /// The value of a boolean flag.
    pub fn is_set(&self, name: &str) -> bool {
        self.text(name) == "true"
    }

    /// The value of a whole-number flag; a type too small for it gives `None`.
    pub fn number<T: std::str::FromStr>(&self, name: &str) -> Option<T> {
        self.text(name).parse().ok()
    }

    /// Whether the command line, a flag file or the environment set it.
    pub fn was_given(&self, name: &str) -> bool {
        self.given.contains(name)
    }
}

/// What a command line asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Asked {
    /// To run with these values.
    Run(Values),
    /// To show the flags.
    Help,
    /// To show the version.
    Version,
}

/// Where flag files and environment variables come from; a test brings its own.
pub trait Outside {
    /// Contents of a flag file.
    fn file(&self, name: &str) -> io::Result<String>;
    /// A variable of the environment.
    fn variable(&self, name: &str) -> Option<String>;
}

/// The real files and environment.
#[derive(Clone, Copy, Debug)]
pub struct Host;

impl Outside for Host {
    fn file(&self, name: &str) -> io::Result<String> {
        std::fs::read_to_string(name)
    }

    fn variable(&self, name: &str) -> Option<String> {
        std::env::var(name).ok()
    }
}

/// A flag file may name another one, at most this deep: a file that names itself must end.
const FLAG_FILE_DEPTH: usize = 16;
/// Names a line of a flag file may restrict the following flags to.
const PROGRAM_NAMES: [&str; 2] = ["transfer_engine_bench", "moonrail"];

/// Reads a command line (without the program's name).
///
/// # Errors
/// Every fault found, each a line as gflags prints it, in alphabetical order of the flags.
pub fn parse(flags: &[Flag], args: &[String], outside: &dyn Outside) -> Result<Asked, Vec<String>> {
    let mut reader = Reader {
        flags,
        outside,
        values: flags.iter().map(|f| (f.name, f.default.clone())).collect(),
        given: BTreeSet::new(),
        faults: BTreeMap::new(),
        forgiven: BTreeSet::new(),
        special: None,
    };
    reader.words(args, 0);
    let Reader { values, given, mut faults, forgiven, special, .. } = reader;
    faults.retain(|name, fault| {
        let bare = name.strip_prefix("no").unwrap_or(name);
        !(fault.unknown && (forgiven.contains(name) || forgiven.contains(bare)))
    });
    match special {
        // As gflags: asking for help wins over mistakes in the rest of the line.
        Some(asked) => Ok(asked),
        None if faults.is_empty() => Ok(Asked::Run(Values { values, given })),
        None => Err(faults.into_values().map(|fault| fault.text).collect()),
    }
}

struct Fault {
    text: String,
    unknown: bool,
}

struct Reader<'a> {
    flags: &'a [Flag],
    outside: &'a dyn Outside,
    values: BTreeMap<&'static str, String>,
    given: BTreeSet<&'static str>,
    faults: BTreeMap<String, Fault>,
    forgiven: BTreeSet<String>,
    special: Option<Asked>,
}

/// Flags that every gflags program has.
const BUILT_IN: [(&str, Kind); 10] = [
    ("flagfile", Kind::Text),
    ("fromenv", Kind::Text),
    ("tryfromenv", Kind::Text),
    ("undefok", Kind::Text),
    ("help", Kind::Bool),
    ("helpfull", Kind::Bool),
    ("helpshort", Kind::Bool),
    ("helpon", Kind::Text),
    ("helpmatch", Kind::Text),
    ("version", Kind::Bool),
];

impl Reader<'_> {
    fn words(&mut self, args: &[String], depth: usize) {
        let mut words = args.iter();
        while let Some(word) = words.next() {
            let Some(flag) = word.strip_prefix("--").or_else(|| word.strip_prefix('-')) else { continue };
            if flag.is_empty() {
                if word == "--" {
                    return;
                }
                continue;
            }
            let (key, mut value) = match flag.split_once('=') {
                Some((key, value)) => (key, Some(value.to_owned())),
                None => (flag, None),
            };
            let Some((name, kind, negated)) = self.find(key) else { continue };
            if negated {
                value = Some("0".to_owned());
            } else if kind == Kind::Bool {
                value = value.or(Some("1".to_owned()));
            }
            let Some(value) = value.or_else(|| words.next().cloned()) else {
                let mut text = format!("flag '{word}' is missing its argument");
                if let Some(known) = self.flags.iter().find(|f| f.name == name) {
                    text = format!("{text}; flag description: {}", known.help);
                }
                self.fault(name, &text, false);
                return;
            };
            self.set(name, kind, &value, depth);
        }
    }

    /// The flag behind a key as it stands on the command line, and whether it was spelled `no…`.
    fn find(&mut self, key: &str) -> Option<(&'static str, Kind, bool)> {
        let known = |key: &str| {
            let key = key.replace('-', "_");
            let own = self.flags.iter().map(|f| (f.name, f.kind));
            own.chain(BUILT_IN).find(|(name, _)| *name == key)
        };
        if let Some((name, kind)) = known(key) {
            return Some((name, kind, false));
        }
        match key.strip_prefix("no").and_then(known) {
            Some((name, Kind::Bool)) => return Some((name, Kind::Bool, true)),
            Some((_, kind)) => {
                let text = format!("boolean value ({key}) specified for {} command line flag", kind.name());
                self.fault(key, &text, false);
            }
            None => self.fault(key, &format!("unknown command line flag '{key}'"), true),
        }
        None
    }

    fn set(&mut self, name: &'static str, kind: Kind, value: &str, depth: usize) {
        let Some(canonical) = kind.canonical(value) else {
            let text = format!("illegal value '{value}' specified for {} flag '{name}'", kind.name());
            return self.fault(name, &text, false);
        };
        match name {
            "help" | "helpfull" | "helpshort" if canonical == "true" => self.special = Some(Asked::Help),
            "helpon" | "helpmatch" => self.special = Some(Asked::Help),
            "version" if canonical == "true" => self.special = Some(Asked::Version),
            "undefok" => self.forgiven.extend(canonical.split(',').map(|n| n.trim().replace('-', "_"))),
            "flagfile" => canonical.split(',').filter(|n| !n.is_empty()).for_each(|n| self.flag_file(n, depth)),
            "fromenv" => self.environment(&canonical, true, depth),
            "tryfromenv" => self.environment(&canonical, false, depth),
            _ if BUILT_IN.iter().any(|(built_in, _)| *built_in == name) => {}
            _ => {
                self.values.insert(name, canonical);
                self.given.insert(name);
            }
        }
    }

    /// One flag a line; `#` begins a comment line; a line without `-` names the programs that what follows is for.
    fn flag_file(&mut self, name: &str, depth: usize) {
        if depth >= FLAG_FILE_DEPTH {
            let text = format!("flag files name each other more than {FLAG_FILE_DEPTH} deep; the last is '{name}'");
            return self.fault("flagfile", &text, false);
        }
        let text = match self.outside.file(name) {
            Ok(text) => text,
            Err(e) => return self.fault("flagfile", &format!("cannot read flag file '{name}': {e}"), false),
        };
        let mut ours = true;
        for line in text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#')) {
            if line.starts_with('-') {
                if ours {
                    // As gflags: in a file a flag and its value are one word, joined by `=`.
                    self.words(std::slice::from_ref(&line.to_owned()), depth + 1);
                }
            } else {
                ours = line.split_whitespace().any(|name| name == "*" || PROGRAM_NAMES.contains(&name));
            }
        }
    }

    fn environment(&mut self, names: &str, must: bool, depth: usize) {
        for name in names.split(',').map(str::trim).filter(|n| !n.is_empty()) {
            let Some((name, kind, false)) = self.find(name) else { continue };
            match self.outside.variable(&format!("FLAGS_{name}")) {
                Some(value) => self.set(name, kind, &value, depth + 1),
                None if must => self.fault(name, &format!("FLAGS_{name} not found in environment"), false),
                None => {}
            }
        }
    }

    fn fault(&mut self, key: &str, text: &str, unknown: bool) {
        self.faults.insert(key.replace('-', "_"), Fault { text: format!("ERROR: {text}"), unknown });
    }
}

/// What `--help` prints: every flag with its meaning, type and default.
pub fn help(usage: &str, flags: &[Flag]) -> String {
    use std::fmt::Write as _;
    let mut text = format!("{usage}\n\n  Flags:\n");
    for flag in flags {
        let default = match flag.kind {
            Kind::Text => format!("\"{}\"", flag.default),
            _ => flag.default.clone(),
        };
        let _ = writeln!(text, "    -{} ({}) type: {} default: {default}", flag.name, flag.help, flag.kind.name());
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    struct Fake(Vec<(&'static str, &'static str)>);

    impl Outside for Fake {
        fn file(&self, name: &str) -> io::Result<String> {
            self.variable(name).ok_or_else(|| io::ErrorKind::NotFound.into())
        }
        fn variable(&self, name: &str) -> Option<String> {
            self.0.iter().find(|(n, _)| *n == name).map(|(_, text)| (*text).to_owned())
        }
    }

    fn table() -> Vec<Flag> {
        let flag = |name, kind, default: &str| Flag { name, kind, default: default.to_owned(), help: "what it does" };
        vec![
            flag("mode", Kind::Text, "initiator"),
            flag("auto_discovery", Kind::Bool, "false"),
            flag("threads", Kind::Int32, "12"),
            flag("report_precision", Kind::Uint32, "2"),
            flag("block_size", Kind::Uint64, "65536"),
        ]
    }

    fn read(line: &str) -> Result<Asked, Vec<String>> {
        read_with(line, &Fake(vec![]))
    }

    fn read_with(line: &str, outside: &Fake) -> Result<Asked, Vec<String>> {
        let args: Vec<String> = line.split_whitespace().map(str::to_owned).collect();
        parse(&table(), &args, outside)
    }

    fn values(line: &str) -> Values {
        match read(line) {
            Ok(Asked::Run(values)) => values,
            other => panic!("{line}: {other:?}"),
        }
    }

    #[test]
    fn every_spelling_of_a_flag() {
        for line in ["--threads=3", "-threads=3", "--threads 3", "-threads 3", "--threads=0x3", "x --threads 3 y"] {
            assert_eq!(values(line).number::<i32>("threads"), Some(3), "{line}");
        }
        for line in ["--auto_discovery", "-auto_discovery", "--auto_discovery=yes", "--auto-discovery=T"] {
            assert!(values(line).is_set("auto_discovery"), "{line}");
        }
        for line in ["--noauto_discovery", "--auto_discovery --noauto_discovery", "--auto_discovery=0", ""] {
            assert!(!values(line).is_set("auto_discovery"), "{line}");
        }
        // A boolean never takes the next word; the last of two wins; nothing after `--` is a flag.
        let all = values("--auto_discovery false --threads=1 --threads=2 -- --threads=3");
        assert!(all.is_set("auto_discovery"));
        assert_eq!(all.number::<i32>("threads"), Some(2));
        assert!(all.was_given("threads") && !all.was_given("mode"));
        assert_eq!(all.text("mode"), "initiator");
    }

    #[test]
    fn mistakes_are_told_in_the_words_of_gflags_all_at_once() {
        let said = |line| read(line).unwrap_err().join("\n");
        assert_eq!(said("--bogus=1"), "ERROR: unknown command line flag 'bogus'");
        assert_eq!(said("--nobogus"), "ERROR: unknown command line flag 'nobogus'");
        assert_eq!(said("--nothreads"), "ERROR: boolean value (nothreads) specified for int32 command line flag");
        assert_eq!(said("--threads=x"), "ERROR: illegal value 'x' specified for int32 flag 'threads'");
        assert_eq!(
            said("--threads=3000000000"),
            "ERROR: illegal value '3000000000' specified for int32 flag 'threads'"
        );
        assert_eq!(said("--block_size=-1"), "ERROR: illegal value '-1' specified for uint64 flag 'block_size'");
        assert_eq!(
            said("--threads"),
            "ERROR: flag '--threads' is missing its argument; flag description: what it does"
        );
        assert_eq!(said("--b --a").lines().count(), 2);
        assert!(read("--bogus=1 --undefok=bogus").is_ok());
    }

    #[test]
    fn help_and_version_win() {
        assert_eq!(read("--help --bogus"), Ok(Asked::Help));
        assert_eq!(read("-version"), Ok(Asked::Version));
        assert!(help("usage", &table()).contains("-threads (what it does) type: int32 default: 12"));
    }

    #[test]
    fn flags_from_files_and_the_environment() {
        let files = || {
            Fake(vec![
                ("a", "# comment\n--threads=4\n\nother_program\n--threads=5\ntransfer_engine_bench\n--mode=target\n"),
                ("loop", "--flagfile=loop"),
                ("FLAGS_block_size", "7"),
            ])
        };
        let Ok(Asked::Run(all)) = read_with("--flagfile=a --fromenv=block_size --tryfromenv=mode", &files()) else {
            panic!("must run");
        };
        assert_eq!((all.text("threads"), all.text("mode"), all.text("block_size")), ("4", "target", "7"));
        assert!(read_with("--flagfile=none", &files()).unwrap_err()[0].contains("cannot read flag file 'none'"));
        assert!(read_with("--flagfile=loop", &files()).unwrap_err()[0].contains("deep"));
        assert!(read_with("--fromenv=threads", &files()).unwrap_err()[0].contains("FLAGS_threads not found"));
    }

    proptest! {
        #[test]
        fn no_command_line_panics(args in proptest::collection::vec("-{0,3}[a-z_=0-9é-]{0,12}", 0..8)) {
            let _ = parse(&table(), &args, &Fake(vec![("a", "--flagfile=a")]));
        }

        #[test]
        fn a_number_survives_every_spelling(n: i32, hexadecimal: bool, joined: bool) {
            let digits = match hexadecimal {
                true if n < 0 => format!("-{:#x}", -i64::from(n)),
                true => format!("{n:#x}"),
                false => n.to_string(),
            };
            let line = if joined { format!("--threads={digits}") } else { format!("--threads {digits}") };
            prop_assert_eq!(values(&line).number::<i32>("threads"), Some(n));
        }
    }
}
