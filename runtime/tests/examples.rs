//! The examples do what they say.

use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// Runs an example that cargo built beside this test, for at most a minute.
fn run(name: &str, words: &[&str]) -> String {
    let own = std::env::current_exe().unwrap();
    let built: PathBuf = own.parent().and_then(|deps| deps.parent()).unwrap().join("examples").join(name);
    let mut child = Command::new(&built)
        .args(words)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap_or_else(|e| panic!("{}: {e}; cargo test builds it", built.display()));
    let until = Instant::now() + Duration::from_secs(60);
    while child.try_wait().unwrap().is_none() {
        if Instant::now() > until {
            child.kill().unwrap();
            panic!("{name} did not end");
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    let output = child.wait_with_output().unwrap();
    let said = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{name}: {}\n{said}{}", output.status, String::from_utf8_lossy(&output.stderr));
    said
}

#[test]
fn hello_says_hello() {
    assert!(run("hello", &[]).starts_with("hello from the store (over "));
}

#[test]
fn many_batches_are_awaited() {
    assert_eq!(run("async", &[]), "64 blocks of 64 KiB are here\n");
}

#[test]
fn a_cache_loses_a_node_and_no_byte() {
    let said = run("kv_cache", &["3"]);
    let found = |what: &str| {
        let line = said.lines().find(|line| line.starts_with(what)).unwrap_or_else(|| panic!("{what}: {said}"));
        let words: Vec<&str> = line.split_whitespace().collect();
        let at = words.iter().position(|word| *word == "pages").unwrap();
        words[at - 3].parse::<u64>().unwrap()
    };
    assert!(found("both alive") > 10, "{said}");
    assert!(found("one dead") > 10, "{said}");
    assert!(said.ends_with("no wrong byte\n"), "{said}");
}
