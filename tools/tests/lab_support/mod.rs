//! What tests that run inside the lab share: who they are, barriers, and messages through the folder all nodes see.
//!
//! Every node runs the same test binary with one thread, so the tests come in the same order everywhere. A test that
//! fails on one node says so in the folder, and the others give up at once instead of waiting for their limit.
//! (`cargo xtask lab`; its environment and folder are described in docs/testing.md.)
#![allow(dead_code)] // no test target uses all of it

pub(crate) mod altered;
pub(crate) mod clock;
pub(crate) mod process;
pub(crate) mod rdma;
pub(crate) mod traffic;

use std::cell::Cell;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant, SystemTime};

/// The longest any wait takes: generous, since nodes are emulated and share few processors.
pub(crate) const LIMIT: Duration = Duration::from_secs(60);

/// One test on one node.
pub(crate) struct Lab {
    /// This node, from 0.
    pub(crate) node: u32,
    /// How many there are.
    pub(crate) nodes: u32,
    /// RDMA NICs of each node: rxe0, rxe1, …
    pub(crate) nics: u32,
    dir: PathBuf,
    barriers: Cell<u32>,
}

impl Lab {
    /// Enters the test `name`, together with all other nodes.
    pub(crate) fn enter(name: &str) -> Self {
        let number = |key: &str| -> u32 {
            let value = std::env::var(key).unwrap_or_default();
            value.parse().unwrap_or_else(|_| panic!("{key}={value:?}: run this test by `cargo xtask test lab`"))
        };
        let dir = Path::new("/lab/shared").join(name);
        fs::create_dir_all(&dir).unwrap_or_else(|e| panic!("{}: {e}", dir.display()));
        let lab =
            Self { node: number("NODE"), nodes: number("NODES"), nics: number("NICS"), dir, barriers: Cell::new(0) };
        lab.barrier();
        lab
    }

    /// Waits until every node has come to this barrier, the n-th of the test.
    pub(crate) fn barrier(&self) {
        let name = format!("barrier-{}", self.barriers.replace(self.barriers.get() + 1));
        self.tell(&name, "");
        for node in 0..self.nodes {
            self.hear(&name, node);
        }
    }

    /// Leaves `text` under `name` for the other nodes. What was there under it is replaced.
    pub(crate) fn tell(&self, name: &str, text: &str) {
        let (hidden, shown) = (self.dir.join(format!(".{name}.{}", self.node)), self.path(name, self.node));
        fs::write(&hidden, text).and_then(|()| fs::rename(&hidden, &shown)).unwrap_or_else(|e| panic!("{name}: {e}"));
    }

    /// Waits for what `node` left under `name`.
    pub(crate) fn hear(&self, name: &str, node: u32) -> String {
        self.hear_within(name, node, LIMIT)
    }

    /// The same, with another limit.
    pub(crate) fn hear_within(&self, name: &str, node: u32, limit: Duration) -> String {
        let path = self.path(name, node);
        let until = Instant::now() + limit;
        loop {
            if let Ok(text) = fs::read_to_string(&path) {
                return text;
            }
            assert!(!self.path("failed", node).exists(), "gave up: node {node} failed in this test");
            assert!(Instant::now() < until, "node {node} left no {name} within {limit:?}");
            thread::sleep(Duration::from_millis(20));
        }
    }

    /// Whether `node` has left something under `name`. Panics if it failed.
    pub(crate) fn has(&self, name: &str, node: u32) -> bool {
        assert!(!self.path("failed", node).exists(), "gave up: node {node} failed in this test");
        self.path(name, node).exists()
    }

    /// Between two nodes: leaves `text`, and waits for the other's.
    pub(crate) fn exchange(&self, name: &str, text: &str) -> String {
        self.tell(name, text);
        self.hear(name, 1 - self.node)
    }

    /// When `node` left what it left under `name`, by the host's clock.
    pub(crate) fn left_at(&self, name: &str, node: u32) -> SystemTime {
        let path = self.path(name, node);
        let written = fs::metadata(&path).and_then(|data| data.modified());
        written.unwrap_or_else(|e| panic!("{}: {e}", path.display()))
    }

    fn path(&self, name: &str, node: u32) -> PathBuf {
        self.dir.join(format!("{name}.{node}"))
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        if thread::panicking() {
            let _ = fs::write(self.path("failed", self.node), "");
        }
    }
}

/// Asks `done` until it gives something. Panics after [`LIMIT`].
pub(crate) fn wait_for<T>(what: &str, mut done: impl FnMut() -> Option<T>) -> T {
    let until = Instant::now() + LIMIT;
    loop {
        if let Some(answer) = done() {
            return answer;
        }
        assert!(Instant::now() < until, "{what}: not within {LIMIT:?}");
        thread::sleep(Duration::from_millis(1));
    }
}

/// A number that whoever starts the tests may set (in the environment, `MOONRAIL_…`).
pub(crate) fn setting(name: &str, usual: u64) -> u64 {
    match std::env::var(name) {
        Ok(text) => text.parse().unwrap_or_else(|e| panic!("{name}={text:?}: {e}")),
        Err(_) => usual,
    }
}

/// Prints a line that `cargo xtask soak` picks out of a node's output.
pub(crate) fn result(value: &serde_json::Value) {
    println!("RESULT {value}");
}

/// Runs a program of the node and returns what it wrote. Panics if it fails.
pub(crate) fn run(program: &str, args: &[&str]) -> String {
    let output = Command::new(program).args(args).output().unwrap_or_else(|e| panic!("{program}: {e}"));
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let complaint = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {args:?}: {}\n{text}{complaint}", output.status);
    text
}
