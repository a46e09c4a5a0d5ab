//! Golden cases: what really passed between a stock engine and ours, in `control/tests/golden`, replayed there by
//! `golden.rs` where no stock engine is installed. Here each is taken anew and must have the form of the committed one; with
//! `MOONRAIL_GOLDEN=FOLDER` it is written there instead.
//!
//! A case is text: `#` what it is, `>` what whoever connected sent, `<` what came back, `=` a key and its value in a store;
//! bytes that do not print are escaped as in a Rust byte string.

#[path = "../host_support/put.rs"]
mod put;

use std::path::Path;

use moonrail_control::metadata::{Catalogue, MetadataUri, StoreOptions};
use serde_json::Value;

/// Takes part of a case.
pub(crate) type Part = (char, Vec<u8>);

/// Compares a case with the committed one by form, or writes it.
pub(crate) fn keep(name: &str, about: &str, parts: &[Part]) {
    assert!(!parts.is_empty() && parts.iter().all(|(_, bytes)| !bytes.is_empty()), "{name}: nothing was recorded");
    if let Some(folder) = std::env::var_os("MOONRAIL_GOLDEN") {
        let path = Path::new(&folder).join(format!("{name}.txt"));
        // The only thing in it that names a machine; as long as it was.
        let parts = parts.iter().map(|(mark, bytes)| (*mark, without_boot_id(bytes))).collect::<Vec<_>>();
        let lines = parts.iter().map(|(mark, bytes)| format!("{mark} {}\n", bytes.escape_ascii()));
        let text =
            format!("# {about}\n# mooncake-transfer-engine-non-cuda 0.3.13.post1\n{}", lines.collect::<String>());
        std::fs::write(&path, text).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        println!("wrote {name}");
        return;
    }
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("../control/tests/golden/{name}.txt"));
    let text = std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let committed: Vec<Part> = text.lines().filter(|line| !line.starts_with('#')).map(part).collect();
    let forms = |parts: &[Part]| parts.iter().map(|(mark, bytes)| (*mark, form(bytes))).collect::<Vec<_>>();
    assert_eq!(forms(parts), forms(&committed), "{name}: the engine sends something else now: write the cases anew");
    println!("{name}: as recorded");
}

fn without_boot_id(bytes: &[u8]) -> Vec<u8> {
    let id = std::fs::read("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    let (id, mut bytes) = (id.trim_ascii().to_vec(), bytes.to_vec());
    if let Some(at) = bytes.windows(id.len().max(1)).position(|window| window == id) {
        bytes[at..at + id.len()].copy_from_slice(&b"00000000-0000-4000-8000-000000000000"[..id.len()]);
    }
    bytes
}

fn part(line: &str) -> Part {
    let (mark, rest) = line.split_at(1);
    (mark.chars().next().unwrap_or(' '), unescape(rest.strip_prefix(' ').unwrap_or(rest)))
}

/// The reverse of `escape_ascii`.
fn unescape(text: &str) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        bytes.push(match byte {
            b'\\' => match rest.next() {
                Some(b'n') => b'\n',
                Some(b'r') => b'\r',
                Some(b't') => b'\t',
                Some(b'x') => {
                    let digits = [rest.next().unwrap_or(b'0'), rest.next().unwrap_or(b'0')];
                    u8::from_str_radix(&String::from_utf8_lossy(&digits), 16).expect("two hex digits")
                }
                Some(other) => other,
                None => b'\\',
            },
            plain => plain,
        });
    }
    bytes
}

/// What stays the same from run to run: the length of what is no JSON, the frame's type, members and the types of their
/// values.
fn form(bytes: &[u8]) -> String {
    match bytes.iter().position(|b| *b == b'{') {
        Some(at) if serde_json::from_slice::<Value>(&bytes[at..]).is_ok() => {
            let json = serde_json::from_slice(&bytes[at..]).expect("looked at");
            let kind = if at == 9 { format!("type {} ", bytes[8]) } else { String::new() };
            let end = if bytes.ends_with(b"\n") { ", ended by a newline" } else { "" };
            format!("{kind}{}{end}", members(&json))
        }
        // A data header begins with a length, and has its opcode at 16.
        _ => format!("{} bytes, {:?}", bytes.len(), bytes.get(16)),
    }
}

fn members(value: &Value) -> String {
    match value {
        Value::Object(map) => {
            let each = map.iter().map(|(key, value)| format!("{key}:{}", members(value)));
            format!("{{{}}}", each.collect::<Vec<_>>().join(","))
        }
        Value::Array(items) => format!("[{}]", items.first().map(members).unwrap_or_default()),
        Value::String(text) if text.is_empty() => "empty".into(),
        Value::String(_) => "string".into(),
        Value::Number(_) => "number".into(),
        Value::Bool(is) => is.to_string(),
        Value::Null => "null".into(),
    }
}

/// A value in etcd, as it is there; empty if there is none.
pub(crate) fn get(url: &str, key: &str) -> Vec<u8> {
    let Ok(MetadataUri::Store(uri)) = MetadataUri::parse(url) else { panic!("{url} is no store") };
    let store = Catalogue::open(&uri, &StoreOptions::default()).unwrap_or_else(|e| panic!("{e}"));
    store.get(key).unwrap_or_else(|e| panic!("{key}: {e}")).map(|held| held.value).unwrap_or_default()
}

/// Changes a value in etcd, so that whoever reads it comes to us first.
pub(crate) fn change(url: &str, key: &str, change: impl FnOnce(&mut Value)) {
    let mut value: Value = serde_json::from_slice(&get(url, key)).expect("JSON");
    change(&mut value);
    put::put(url.trim_start_matches("etcd://"), key, format!("{value}\n").as_bytes());
}
