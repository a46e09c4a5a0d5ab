//! The corpus of the fuzz targets (tools/fuzz/corpus), replayed: everything that was ever worth keeping, in milliseconds.

mod laws;

use std::path::Path;

/// Files of one folder, by name.
fn inputs(folder: &Path) -> Vec<(String, Vec<u8>)> {
    let entries = std::fs::read_dir(folder).unwrap_or_else(|e| panic!("{}: {e}", folder.display()));
    let mut inputs: Vec<_> = entries
        .map(|entry| entry.unwrap())
        .map(|entry| (entry.file_name().to_string_lossy().into_owned(), std::fs::read(entry.path()).unwrap()))
        .collect();
    inputs.sort();
    inputs
}

#[test]
fn what_the_fuzzers_found_breaks_no_law() {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tools/fuzz/corpus");
    for (name, law) in laws::LAWS {
        let inputs = inputs(&corpus.join(name));
        assert!(!inputs.is_empty(), "{name} has a corpus");
        for (file, bytes) in inputs {
            if let Err(cause) = std::panic::catch_unwind(|| law(&bytes)) {
                eprintln!("tools/fuzz/corpus/{name}/{file} breaks the law of {name}");
                std::panic::resume_unwind(cause);
            }
        }
    }
}

/// Nor does any of them cut short, doubled or with one bit turned: a poor man's fuzzer, for machines without one.
#[test]
fn nor_do_their_neighbours() {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tools/fuzz/corpus");
    for (name, law) in laws::LAWS {
        for (_, bytes) in inputs(&corpus.join(name)).into_iter().filter(|(_, bytes)| bytes.len() <= 512) {
            for at in 0..bytes.len() {
                law(&bytes[..at]);
                law(&[&bytes[..at], &bytes[at / 2..]].concat());
                let mut turned = bytes.clone();
                turned[at] ^= 1 << (at % 8);
                law(&turned);
            }
        }
    }
}
