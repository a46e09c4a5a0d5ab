//! Where things are, and how cargo is called.

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::Value;

use crate::error::{Error, Result};
use crate::process::Bounded;

/// The top of the repository.
pub(crate) fn root() -> PathBuf {
    // Set by `cargo run`; the compiled-in value serves when the binary is called by itself.
    let crate_folder = std::env::var("CARGO_MANIFEST_DIR").unwrap_or_else(|_| env!("CARGO_MANIFEST_DIR").to_owned());
    let crate_folder = Path::new(&crate_folder);
    crate_folder.ancestors().nth(2).unwrap_or(crate_folder).to_path_buf()
}

/// Cargo's target folder: the one this binary was built into, wherever cargo was told to put it.
pub(crate) fn target() -> PathBuf {
    let built = std::env::current_exe().ok().and_then(|exe| exe.ancestors().nth(2).map(Path::to_path_buf));
    built.filter(|folder| folder.join("CACHEDIR.TAG").exists()).unwrap_or_else(|| root().join("target"))
}

/// Cargo, in the root of the workspace, as if it had been called by hand.
pub(crate) fn cargo(limit: Duration) -> Bounded {
    let program = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut cargo = Bounded::new(program, limit).in_folder(&root());
    // `cargo run` tells us about our own package. Build scripts that watch those variables would run again on every
    // change between a cargo called by hand and one called by us.
    for (key, _) in std::env::vars_os() {
        if set_by_cargo_run(&key.to_string_lossy()) {
            cargo = cargo.env_remove(&key);
        }
    }
    cargo
}

fn set_by_cargo_run(key: &str) -> bool {
    ["CARGO_PKG_", "CARGO_MANIFEST_", "CARGO_BIN_"].iter().any(|prefix| key.starts_with(prefix))
        || ["CARGO", "CARGO_CRATE_NAME", "CARGO_PRIMARY_PACKAGE", "OUT_DIR", "LD_LIBRARY_PATH"].contains(&key)
}

/// What `cargo metadata` says about the members of the workspace, without their dependencies.
pub(crate) fn metadata() -> Result<Value> {
    let text = cargo(Duration::from_secs(60)).args(["metadata", "--format-version=1", "--no-deps"]).output()?;
    serde_json::from_str(&text).map_err(|e| {
        Error::new(format!("cannot read what cargo metadata printed: {e}"), "run `cargo metadata` to see what it says")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn root_holds_the_workspace_manifest() {
        assert!(root().join("Cargo.toml").exists());
        assert!(root().join("tools/xtask").exists());
    }

    #[test]
    fn the_users_own_cargo_settings_survive() {
        assert!(!set_by_cargo_run("CARGO_HOME"));
        assert!(!set_by_cargo_run("CARGO_TARGET_DIR"));
        assert!(set_by_cargo_run("CARGO_PKG_NAME"));
    }
}
