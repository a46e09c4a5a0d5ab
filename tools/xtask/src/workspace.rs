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

/// A folder of this user for what is made once and serves every checkout. It may not exist yet.
pub(crate) fn cache(name: &str) -> Result<PathBuf> {
    let set = |key: &str| std::env::var_os(key).filter(|value| !value.is_empty()).map(PathBuf::from);
    set("XDG_CACHE_HOME")
        .or_else(|| set("HOME").map(|home| home.join(".cache")))
        .map(|base| base.join(name))
        .ok_or_else(|| {
            Error::new(format!("no place for {name}: neither XDG_CACHE_HOME nor HOME is set"), "set one of them")
        })
}

/// Cargo, in the root of the workspace, as if it had been called by hand.
pub(crate) fn cargo(limit: Duration) -> Bounded {
    let program = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    by_hand(Bounded::new(program, limit)).in_folder(&root())
}

/// The same command without what `cargo run` set for us.
pub(crate) fn by_hand(mut command: Bounded) -> Bounded {
    // `cargo run` tells us about our own package. Build scripts that watch those variables would run again on every
    // change between a cargo called by hand and one called by us.
    for (key, _) in std::env::vars_os() {
        if set_by_cargo_run(&key.to_string_lossy()) {
            command = command.env_remove(&key);
        }
    }
    command
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

/// The feature that brings in tests which run on lab nodes only.
const LAB_FEATURE: &str = "lab";
/// The feature that brings in tests on this host against a stock Mooncake engine.
const INTEROP_FEATURE: &str = "interop";

/// `--features` that select every test there is. All calls of cargo use them, so nothing is compiled twice.
pub(crate) fn test_features() -> Result<Vec<String>> {
    Ok(features_in(&metadata()?))
}

fn features_in(metadata: &Value) -> Vec<String> {
    let of = |package: &Value| {
        let name = package["name"].as_str().unwrap_or_default().to_owned();
        let known =
            [LAB_FEATURE, INTEROP_FEATURE].into_iter().filter(|feature| package["features"].get(feature).is_some());
        known.map(|feature| format!("{name}/{feature}")).collect::<Vec<_>>()
    };
    let names: Vec<String> = list(&metadata["packages"]).flat_map(of).collect();
    if names.is_empty() { Vec::new() } else { vec!["--features".to_owned(), names.join(",")] }
}

/// An integration test of a crate.
#[derive(Debug)]
pub(crate) struct TestTarget {
    pub(crate) name: String,
    pub(crate) source: PathBuf,
    /// The folder of its crate, where cargo would run it.
    pub(crate) folder: PathBuf,
    pub(crate) needs_lab: bool,
    /// It starts stock engines on this host.
    pub(crate) needs_peers: bool,
}

impl TestTarget {
    /// Nodes and NICs per node, for a lab test called `lab_<nodes>x<nics>` or `lab_<nodes>x<nics>_<anything>`.
    pub(crate) fn lab_topology(&self) -> Option<(u32, u32)> {
        let topology = self.name.strip_prefix("lab_").filter(|_| self.needs_lab)?;
        let (nodes, nics) = topology.split('_').next()?.split_once('x')?;
        Some((nodes.parse().ok()?, nics.parse().ok()?))
    }
}

/// Every integration test of the workspace, by name.
pub(crate) fn test_targets() -> Result<Vec<TestTarget>> {
    let targets = test_targets_in(&metadata()?);
    // A misnamed lab test would never run anywhere.
    match targets.iter().find(|target| target.needs_lab && target.lab_topology().is_none()) {
        Some(target) => Err(Error::new(
            format!("{} needs the lab, but its name does not say how many nodes and NICs", target.source.display()),
            "name it lab_<nodes>x<nics> or lab_<nodes>x<nics>_<anything>",
        )),
        None => Ok(targets),
    }
}

fn test_targets_in(metadata: &Value) -> Vec<TestTarget> {
    let mut targets: Vec<TestTarget> = list(&metadata["packages"])
        .flat_map(|package| {
            let manifest = Path::new(package["manifest_path"].as_str().unwrap_or_default());
            let folder = manifest.parent().unwrap_or(manifest).to_path_buf();
            let tests = list(&package["targets"]).filter(|target| target["kind"][0] == "test");
            let needs = |target: &Value, what| list(&target["required-features"]).any(|feature| feature == what);
            tests.map(move |target| TestTarget {
                name: target["name"].as_str().unwrap_or_default().to_owned(),
                source: target["src_path"].as_str().unwrap_or_default().into(),
                folder: folder.clone(),
                needs_lab: needs(target, LAB_FEATURE),
                needs_peers: needs(target, INTEROP_FEATURE),
            })
        })
        .collect();
    targets.sort_by(|a, b| (&a.name, &a.source).cmp(&(&b.name, &b.source)));
    targets
}

/// The programs with unit tests. `--bins` would run those too that say `test = false`, and a fuzz target runs until it is ended.
pub(crate) fn tested_programs() -> Result<Vec<String>> {
    Ok(tested_programs_in(&metadata()?))
}

fn tested_programs_in(metadata: &Value) -> Vec<String> {
    let targets = list(&metadata["packages"]).flat_map(|package| list(&package["targets"]));
    let tested = targets.filter(|target| target["kind"][0] == "bin" && target["test"] == true);
    tested.filter_map(|target| Some(target["name"].as_str()?.to_owned())).collect()
}

/// The elements of a JSON array; none when it is something else.
pub(crate) fn list(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_array().into_iter().flatten()
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

    fn example() -> Value {
        serde_json::json!({"packages": [
            {"name": "a", "manifest_path": "/r/a/Cargo.toml", "features": {"lab": [], "interop": []}, "targets": [
                {"kind": ["test"], "name": "lab_3x1_all", "src_path": "/r/a/tests/lab_3x1_all.rs", "required-features": ["lab"]},
                {"kind": ["lib"], "name": "a", "src_path": "/r/a/src/lib.rs"},
                {"kind": ["bin"], "name": "endless", "src_path": "/r/a/fuzz.rs", "test": false},
                {"kind": ["bin"], "name": "tool", "src_path": "/r/a/src/main.rs", "test": true},
                {"kind": ["test"], "name": "api", "src_path": "/r/a/tests/api.rs"}]},
            {"name": "b", "manifest_path": "/r/b/Cargo.toml", "features": {}, "targets": []}]})
    }

    #[test]
    fn the_name_of_a_lab_test_is_its_topology() {
        let targets = test_targets_in(&example());
        let seen: Vec<_> = targets.iter().map(|t| (t.name.as_str(), t.lab_topology())).collect();
        assert_eq!(seen, [("api", None), ("lab_3x1_all", Some((3, 1)))]);
        assert_eq!(targets[0].folder, Path::new("/r/a"));
    }

    #[test]
    fn a_program_that_says_it_has_no_tests_is_not_run_as_one() {
        assert_eq!(tested_programs_in(&example()), ["tool"]);
    }

    #[test]
    fn features_are_those_that_exist() {
        assert_eq!(features_in(&example()), ["--features", "a/lab,a/interop"]);
        assert!(features_in(&serde_json::json!({"packages": []})).is_empty());
    }
}
