//! For tests: a root like /proc or /sys, with the files that a check reads.

use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};

/// Files in a folder of their own, until dropped.
pub(super) struct Roots(pub(super) PathBuf);

impl Roots {
    /// With these files, by their paths from the root.
    pub(super) fn new(files: &[(&str, &str)]) -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let next = NEXT.fetch_add(1, Ordering::Relaxed);
        let roots = Self(std::env::temp_dir().join(format!("moonrail-doctor-{}-{next}", std::process::id())));
        for (name, text) in files {
            roots.set(name, text);
        }
        roots
    }

    /// Writes one of them, anew if it is there.
    pub(super) fn set(&self, name: &str, text: &str) {
        let path = self.0.join(name);
        std::fs::create_dir_all(path.parent().expect("a path below the root")).expect("a folder");
        std::fs::write(path, text).expect("a file");
    }
}

impl Drop for Roots {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}
