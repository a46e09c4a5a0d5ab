//! Two network namespaces with a wire between them, as two hosts: needs root (or unprivileged user namespaces) and iproute2.

use std::path::PathBuf;
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

/// Namespaces TAGa (10.99.0.1) and TAGb (10.99.0.2), joined by a pair of veth devices, TAGx and TAGy.
pub(crate) struct Nets {
    /// A folder that goes with them.
    pub(crate) folder: PathBuf,
    /// What their names begin with.
    pub(crate) tag: String,
}

impl Nets {
    pub(crate) fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let tag = format!("mr{}{}", std::process::id() % 100_000, NEXT.fetch_add(1, Ordering::Relaxed));
        let folder = std::env::temp_dir().join(&tag);
        std::fs::create_dir_all(&folder).expect("a temporary folder");
        let nets = Self { folder, tag };
        let tag = &nets.tag;
        Self::must(&format!(
            "ip netns add {tag}a && ip netns add {tag}b && \
             ip link add {tag}x netns {tag}a type veth peer name {tag}y netns {tag}b && \
             for n in a b; do ip -n {tag}$n link set lo up; done && \
             ip -n {tag}a addr add 10.99.0.1/24 dev {tag}x && ip -n {tag}a link set {tag}x up && \
             ip -n {tag}b addr add 10.99.0.2/24 dev {tag}y && ip -n {tag}b link set {tag}y up"
        ));
        nets
    }

    /// Runs a script of the shell that must succeed.
    pub(crate) fn must(script: &str) {
        let output = Command::new("bash").args(["-c", script]).output().expect("bash");
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "namespaces cannot be made (root and iproute2 are needed): {said}");
    }
}

impl Drop for Nets {
    fn drop(&mut self) {
        for n in ["a", "b"] {
            let _ = Command::new("ip").args(["netns", "del", &format!("{}{n}", self.tag)]).status();
        }
        let _ = std::fs::remove_dir_all(&self.folder);
    }
}
