//! `cargo xtask check`: what must hold of the source, whatever the tests say.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::docs;
use crate::error::{At, Error, Result};
use crate::workspace::{self, cargo, list};

/// Each crate of the workspace and the ones it may use: tools, benches → runtime → control → datapath, never back.
const MAY_USE: &[(&str, &[&str])] = &[
    ("moonrail-datapath", &[]),
    ("moonrail-control", &["moonrail-datapath"]),
    ("moonrail", &["moonrail-control", "moonrail-datapath"]),
    ("moonrail-tools", &["moonrail", "moonrail-control", "moonrail-datapath"]),
    ("moonrail-benches", &["moonrail", "moonrail-control", "moonrail-datapath"]),
    ("moonrail-fuzz", &["moonrail-control", "moonrail-datapath"]),
    ("moonrail-xtask", &[]),
];

/// What the datapath must not reach, not even through others: it knows no socket but its own fabric's, and a core
/// that polls has no use for a reactor.
const NOT_IN_DATAPATH: &[&str] = &["tokio", "etcd-client", "tonic", "mio", "ureq", "serde_json", "clap"];

/// Where unsafe code may live: a file or folder by the beginning of its path, and the reason.
const UNSAFE_ISLANDS: &[(&str, &str)] = &[
    ("datapath/src/nic/verbs", "libibverbs is a C interface"),
    ("datapath/src/nic/shm", "copies between processes' memory"),
    ("datapath/src/lanes.rs", "frees what was read without a lock, once its readers have left"),
    ("benches/src/bare.rs", "a bare loop to measure ours against"),
    ("benches/src/pieces.rs", "an embedder's own memory is registered by an unsafe call of the embedder"),
    ("datapath/src/nic/tcp/iov.rs", "reads into and writes from registered memory"),
    ("datapath/src/region", "registered memory that peers write into at any time"),
    ("datapath/tests/shm", "borrows memory and forks as an embedder may"),
    ("datapath/tests/counting", "a global allocator that counts is unsafe to implement"),
    ("runtime/tests/refusals.rs", "an embedder's own memory is registered by an unsafe call of the embedder"),
    ("runtime/tests/host.rs", "the same"),
    ("runtime/tests/registering_many.rs", "the same"),
    ("runtime/tests/fork.rs", "forks, and drops in the child what the parent keeps"),
    ("tools/tests/lab_2x2_lives/fork.rs", "forks as an embedder may"),
];

/// What stands at the top of the repository beside text files and dot-folders.
const TOP_FOLDERS: &[&str] = &["runtime", "control", "datapath", "tools", "benches", "docs"];

const LIMIT: Duration = Duration::from_secs(600);

/// All checks, in at most ten minutes.
pub(crate) fn run() -> Result<()> {
    all(LIMIT)
}

/// All checks, in at most `limit`. Every check runs, so that one call tells everything.
pub(crate) fn all(limit: Duration) -> Result<()> {
    let deadline = Instant::now() + limit;
    let left = || deadline.saturating_duration_since(Instant::now()).max(Duration::from_secs(1));
    let root = workspace::root();
    let checks: [(&str, Result<()>); 8] = [
        ("format", cargo(left()).args(["fmt", "--all", "--check"]).run()),
        ("lints", lints(left())),
        ("features", features(left)),
        ("dependencies", dependencies()),
        ("unsafe islands", unsafe_islands(&root)),
        ("top level", top_level(&root)),
        ("documentation", docs::check(&root)),
        ("book", docs::book::build().map(drop)),
    ];
    let mut failed = Vec::new();
    for (name, ended) in checks {
        match ended {
            Ok(()) => println!("check: {name}: ok"),
            Err(e) => {
                println!("check: {name}: FAILED: {e}");
                failed.push(name);
            }
        }
    }
    if failed.is_empty() {
        Ok(())
    } else {
        Err(Error::new(format!("checks failed: {}", failed.join(", ")), "see above"))
    }
}

fn lints(limit: Duration) -> Result<()> {
    let clippy = cargo(limit).args(["clippy", "--workspace", "--all-targets"]).args(workspace::test_features()?);
    clippy.args(["--", "-D", "warnings"]).run()
}

/// Each feature of the crate that users embed alone, and none: no warning, and a word about what was left out.
fn features(left: impl Fn() -> Duration) -> Result<()> {
    let without = |activity: &str| cargo(left()).args([activity, "-p", "moonrail", "--no-default-features"]);
    for alone in ["etcd", "verbs"] {
        without("clippy").args(["--features", alone, "--", "-D", "warnings"]).run()?;
    }
    without("clippy").args(["--", "-D", "warnings"]).run()?;
    without("test").args(["--test", "left_out"]).run()
}

fn verdict(findings: &[String]) -> Result<()> {
    if findings.is_empty() { Ok(()) } else { Err(Error::new(findings.join("\n  "), "")) }
}

fn dependencies() -> Result<()> {
    let text = cargo(Duration::from_secs(120)).args(["metadata", "--format-version=1"]).output()?;
    let metadata: Value = serde_json::from_str(&text)
        .map_err(|e| Error::new(format!("cannot read what cargo metadata printed: {e}"), ""))?;
    let mut findings = wrong_edges(&metadata);
    findings.extend(intruders(&metadata, "moonrail-datapath", NOT_IN_DATAPATH));
    findings.extend(without_lints(&metadata));
    verdict(&findings)
}

fn members(metadata: &Value) -> impl Iterator<Item = &Value> {
    let ids: Vec<&Value> = list(&metadata["workspace_members"]).collect();
    list(&metadata["packages"]).filter(move |package| ids.contains(&&package["id"]))
}

/// Dependencies between our crates that [`MAY_USE`] does not allow, of any kind: a test may not look back either.
fn wrong_edges(metadata: &Value) -> Vec<String> {
    let mut findings = Vec::new();
    let ours: Vec<&str> = members(metadata).filter_map(|package| package["name"].as_str()).collect();
    for package in members(metadata) {
        let name = package["name"].as_str().unwrap_or_default();
        let Some((_, allowed)) = MAY_USE.iter().find(|(of, _)| *of == name) else {
            findings.push(format!("crate {name} is not in MAY_USE: say in tools/xtask/src/check.rs what it may use"));
            continue;
        };
        let used = list(&package["dependencies"]).filter_map(|dependency| dependency["name"].as_str());
        let wrong = used.filter(|used| ours.contains(used) && *used != name && !allowed.contains(used));
        findings.extend(wrong.map(|used| {
            format!("{name} must not depend on {used}: the order is tools, benches → runtime → control → datapath")
        }));
    }
    findings
}

/// Packages of `banned` that `from` reaches through anything but dev-dependencies, with the way there.
fn intruders(metadata: &Value, from: &str, banned: &[&str]) -> Vec<String> {
    let name_of = |id: &Value| {
        let package = list(&metadata["packages"]).find(|package| package["id"] == *id);
        package.and_then(|package| package["name"].as_str()).unwrap_or_default().to_owned()
    };
    let Some(start) = members(metadata).find(|package| package["name"] == from) else { return Vec::new() };
    let mut ways = vec![(&start["id"], from.to_owned())];
    let (mut seen, mut findings) = (vec![&start["id"]], Vec::new());
    while let Some((id, way)) = ways.pop() {
        let node = list(&metadata["resolve"]["nodes"]).find(|node| node["id"] == *id);
        for dependency in node.into_iter().flat_map(|node| list(&node["deps"])) {
            let built_in = list(&dependency["dep_kinds"]).any(|kind| kind["kind"] != "dev");
            let next = &dependency["pkg"];
            if !built_in || seen.contains(&next) {
                continue;
            }
            seen.push(next);
            let name = name_of(next);
            let way = format!("{way} → {name}");
            if banned.contains(&name.as_str()) {
                findings.push(format!("{from} must not reach {name}: {way}"));
            }
            ways.push((next, way));
        }
    }
    findings
}

/// Members whose manifest does not take the workspace's lints: there, unsafe code would be free.
fn without_lints(metadata: &Value) -> Vec<String> {
    members(metadata)
        .filter_map(|package| package["manifest_path"].as_str())
        .filter(|path| !std::fs::read_to_string(path).is_ok_and(|text| takes_lints(&text)))
        .map(|path| format!("{path} must have `[lints]` with `workspace = true`"))
        .collect()
}

fn takes_lints(manifest: &str) -> bool {
    let mut lines = manifest.lines().map(str::trim).skip_while(|line| *line != "[lints]").skip(1);
    lines.by_ref().take_while(|line| !line.starts_with('[')).any(|line| line.replace(' ', "") == "workspace=true")
}

fn unsafe_islands(root: &Path) -> Result<()> {
    let mut findings = Vec::new();
    for path in rust_files(root)? {
        let text = std::fs::read_to_string(&path).at("read", &path)?;
        let path = path.strip_prefix(root).unwrap_or(&path).to_string_lossy().into_owned();
        findings.extend(unsafe_outside(&path, &text));
    }
    verdict(&findings)
}

/// Lines that let unsafe code in where it has no business.
fn unsafe_outside(path: &str, text: &str) -> Vec<String> {
    if UNSAFE_ISLANDS.iter().any(|(island, _)| is_on(path, island)) {
        return Vec::new();
    }
    let lines = text.lines().enumerate().filter(|(_, line)| permits_unsafe(line));
    lines
        .map(|(index, _)| {
            format!(
                "{path}:{} lets unsafe code in: move it to an island, or name the file with its reason in \
                 UNSAFE_ISLANDS (tools/xtask/src/check.rs)",
                index + 1
            )
        })
        .collect()
}

fn is_on(path: &str, island: &str) -> bool {
    path == island || path.strip_prefix(island).is_some_and(|rest| rest.starts_with(['/', '.', '_']))
}

/// Whether a line is an attribute that allows or expects unsafe code.
fn permits_unsafe(line: &str) -> bool {
    let line = line.trim_start();
    let attribute = line.starts_with("#[") || line.starts_with("#![");
    attribute && line.contains("unsafe_code") && (line.contains("allow(") || line.contains("expect("))
}

pub(crate) fn rust_files(root: &Path) -> Result<Vec<PathBuf>> {
    let mut folders = vec![root.to_path_buf()];
    let mut files = Vec::new();
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder).at("list", &folder)?.flatten() {
            let (path, name) = (entry.path(), entry.file_name().to_string_lossy().into_owned());
            if path.is_dir() && name != "target" && !name.starts_with('.') {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                files.push(path);
            }
        }
    }
    files.sort();
    Ok(files)
}

fn top_level(root: &Path) -> Result<()> {
    let mut findings = Vec::new();
    for entry in std::fs::read_dir(root).at("list", root)?.flatten() {
        let (path, name) = (entry.path(), entry.file_name().to_string_lossy().into_owned());
        if !belongs_on_top(&name, path.is_dir(), || std::fs::read_to_string(&path).is_ok()) {
            findings
                .push(format!("{name} does not belong at the top: only {} and text files do", TOP_FOLDERS.join(", ")));
        }
    }
    verdict(&findings)
}

fn belongs_on_top(name: &str, is_folder: bool, is_text: impl Fn() -> bool) -> bool {
    if name.starts_with('.') {
        return true;
    }
    // Cargo's own folder is no part of the repository.
    if is_folder { name == "target" || TOP_FOLDERS.contains(&name) } else { is_text() }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `edges`: crate, what it uses, and of which kind (null is a normal dependency).
    fn world(edges: &[(&str, &str, Value)]) -> Value {
        let names = ["moonrail", "moonrail-control", "moonrail-datapath", "etcd-client", "helper", "tokio"];
        let of = |name: &str| edges.iter().filter(|(from, _, _)| *from == name).cloned().collect::<Vec<_>>();
        let packages: Vec<Value> = names
            .iter()
            .map(|name| {
                let uses: Vec<Value> = of(name).iter().map(|(_, to, _)| serde_json::json!({"name": to})).collect();
                serde_json::json!({"name": name, "id": name, "dependencies": uses})
            })
            .collect();
        let nodes: Vec<Value> = names
            .iter()
            .map(|name| {
                let uses: Vec<Value> = of(name)
                    .iter()
                    .map(|(_, to, kind)| serde_json::json!({"pkg": to, "dep_kinds": [{"kind": kind}]}))
                    .collect();
                serde_json::json!({"id": name, "deps": uses})
            })
            .collect();
        serde_json::json!({
            "packages": packages, "workspace_members": &names[..3], "resolve": {"nodes": nodes}})
    }

    #[test]
    fn edges_down_are_fine_and_edges_up_are_not() {
        let down =
            world(&[("moonrail", "moonrail-control", Value::Null), ("moonrail", "moonrail-datapath", Value::Null)]);
        assert!(wrong_edges(&down).is_empty());
        let up = world(&[("moonrail-datapath", "moonrail-control", Value::Null)]);
        let findings = wrong_edges(&up);
        assert_eq!(findings.len(), 1);
        assert!(findings[0].starts_with("moonrail-datapath must not depend on moonrail-control"), "{findings:?}");
        let in_tests = world(&[("moonrail-control", "moonrail", Value::from("dev"))]);
        assert_eq!(wrong_edges(&in_tests).len(), 1, "a dev-dependency looks back too");
    }

    #[test]
    fn a_crate_without_a_rule_is_noticed() {
        let mut metadata = world(&[]);
        metadata["workspace_members"] = serde_json::json!(["helper"]);
        assert_eq!(wrong_edges(&metadata).len(), 1);
    }

    #[test]
    fn the_datapath_reaches_no_reactor_even_through_others() {
        let through = world(&[("moonrail-datapath", "helper", Value::Null), ("helper", "tokio", Value::Null)]);
        let findings = intruders(&through, "moonrail-datapath", NOT_IN_DATAPATH);
        assert_eq!(findings, ["moonrail-datapath must not reach tokio: moonrail-datapath → helper → tokio"]);
        let in_tests = world(&[("moonrail-datapath", "tokio", Value::from("dev"))]);
        assert!(intruders(&in_tests, "moonrail-datapath", NOT_IN_DATAPATH).is_empty());
    }

    #[test]
    fn unsafe_stays_on_its_islands() {
        let text = "//! Says #[allow(unsafe_code)] in a comment.\n#![allow(unsafe_code)]\n";
        assert!(unsafe_outside("datapath/src/nic/verbs/qp.rs", text).is_empty());
        assert!(unsafe_outside("datapath/src/region.rs", text).is_empty());
        assert!(unsafe_outside("datapath/src/nic/verbs.rs", text).is_empty());
        let findings = unsafe_outside("datapath/src/nic/verbsy.rs", text);
        assert_eq!(findings.len(), 1);
        assert!(findings[0].starts_with("datapath/src/nic/verbsy.rs:2 "), "{findings:?}");
        assert!(unsafe_outside("control/src/lib.rs", "#![deny(unsafe_code)]\n").is_empty());
    }

    #[test]
    fn manifests_take_the_workspaces_lints() {
        assert!(takes_lints("[package]\nname = \"x\"\n\n[lints]\nworkspace = true\n\n[dependencies]\n"));
        assert!(!takes_lints("[package]\nversion.workspace = true\n"));
        assert!(!takes_lints("[lints]\n[dependencies]\nworkspace = true\n"));
    }

    #[test]
    fn the_top_level_holds_what_it_may() {
        assert!(belongs_on_top("docs", true, || false));
        assert!(belongs_on_top(".ci", true, || false));
        assert!(belongs_on_top("README.md", false, || true));
        assert!(!belongs_on_top("scripts", true, || true));
        assert!(!belongs_on_top("moonrail", false, || false), "a binary");
    }
}
