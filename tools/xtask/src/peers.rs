//! Other engines, as their authors publish them, each in a private Python environment: never on the machine's own paths.
//! Made once and kept in a cache; what runs one gets its folder in [`Peer::variable`].

use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::error::{At, Error, Result};
use crate::process::Bounded;
use crate::workspace;

/// What is installed from PyPI, each file pinned by its hash, into an environment of its own.
pub(crate) struct Peer {
    name: &'static str,
    /// Set for what runs it: the environment's folder.
    pub(crate) variable: &'static str,
    requirements: &'static str,
    /// What Python must be able to import.
    modules: &'static str,
    /// A program of its, inside site-packages, whose libraries must be there.
    program: Option<&'static str>,
}

/// The engine whose protocols we speak; tests need it.
pub(crate) const MOONCAKE: Peer = Peer {
    name: "Mooncake",
    variable: "MOONRAIL_PEERS",
    requirements: "tools/peers/requirements.txt",
    modules: "mooncake.engine, mooncake.http_metadata_server",
    program: Some("mooncake/transfer_engine_bench"),
};

/// Another engine; only `cargo xtask bench peers` needs it.
pub(crate) const NIXL: Peer = Peer {
    name: "NIXL",
    variable: "MOONRAIL_PEERS_NIXL",
    requirements: "tools/peers/requirements-nixl.txt",
    modules: "nixl_cu12",
    program: None,
};

/// Debian's own: the wheels are made for its CPython, whatever else the PATH has.
const PYTHON: &str = "/usr/bin/python3";

const MAKE: Duration = Duration::from_secs(120);
const DOWNLOAD: Duration = Duration::from_secs(300);
const TRY: Duration = Duration::from_secs(60);

/// The environment's folder; made first if it is not there.
pub(crate) fn require(peer: &Peer) -> Result<PathBuf> {
    let requirements = workspace::root().join(peer.requirements);
    let text = std::fs::read_to_string(&requirements).at("read", &requirements)?;
    let cache = cache_folder()?;
    // Another list of files is another environment: one that is being used by another checkout stays as it is.
    let folder = cache.join(format!("{}-{:016x}", peer.name.to_lowercase(), fnv1a(text.as_bytes())));
    if !folder.exists() {
        std::fs::create_dir_all(&cache).at("create", &cache)?;
        println!("setup: installing a stock {} engine into {}", peer.name, folder.display());
        make(peer, &requirements, &cache, &folder)?;
    }
    Ok(folder)
}

/// Made aside and renamed, so that what has the name is whole, and two at once do not meet.
fn make(peer: &Peer, requirements: &Path, cache: &Path, folder: &Path) -> Result<()> {
    let aside = cache.join(format!("making-{}", std::process::id()));
    let made = install(peer, requirements, &aside).and_then(|()| match std::fs::rename(&aside, folder) {
        Err(_) if folder.exists() => Ok(()), // another was faster, with the same files
        renamed => renamed.at("rename", &aside),
    });
    let _ = std::fs::remove_dir_all(&aside);
    made
}

fn install(peer: &Peer, requirements: &Path, folder: &Path) -> Result<()> {
    Bounded::new(PYTHON, MAKE).args(["-m", "venv", "--clear"]).arg(folder).output().map_err(|e| {
        Error::new(
            format!("no Python environment for a stock {} engine: {e}", peer.name),
            "run `cargo xtask setup` on Debian 12",
        )
    })?;
    let python = folder.join("bin/python");
    let flags = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", "--require-hashes"];
    let pip = Bounded::new(&python, DOWNLOAD).args(flags).args(["--only-binary=:all:", "-r"]).arg(requirements);
    pip.output().map_err(|e| {
        Error::new(
            format!("a stock {} engine cannot be installed: {e}", peer.name),
            format!(
                "it comes from PyPI, or whatever pip is told to use: check the network, and that what {} names still exists there",
                peer.requirements
            ),
        )
    })?;
    let mut proves = vec![Bounded::new(&python, TRY).args(["-c", &format!("import {}", peer.modules)])];
    if let Some(program) = peer.program {
        proves.push(Bounded::new("ldd", TRY).arg(folder.join("lib/python3.11/site-packages").join(program)));
    }
    for prove in proves {
        let said = prove.output().map_err(|e| cannot_run(peer, &e.to_string()))?;
        if let Some(line) = said.lines().find(|line| line.contains("not found")) {
            return Err(cannot_run(peer, line.trim()));
        }
    }
    Ok(())
}

fn cannot_run(peer: &Peer, why: &str) -> Error {
    Error::new(
        format!("a stock {} engine was installed but cannot run here: {why}", peer.name),
        "it needs Debian 12 on x86-64 with libibverbs1, libnuma1 and libcurl4: run `cargo xtask setup`",
    )
}

fn cache_folder() -> Result<PathBuf> {
    let set = std::env::var_os("MOONRAIL_PEERS_CACHE").filter(|value| !value.is_empty()).map(PathBuf::from);
    set.map_or_else(|| workspace::cache("moonrail-peers"), Ok)
}

/// Same for the same text, on every machine and with every compiler.
fn fnv1a(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_file_is_pinned_by_its_hash() {
        for (peer, package) in [(MOONCAKE, "mooncake-transfer-engine-non-cuda=="), (NIXL, "nixl-cu12==")] {
            let text = std::fs::read_to_string(workspace::root().join(peer.requirements)).expect("the list");
            let files: Vec<&str> = text.lines().filter(|line| !line.starts_with('#')).collect();
            assert!(files.iter().any(|line| line.starts_with(package)));
            for line in files {
                assert!(line.contains("==") && line.contains(" --hash=sha256:"), "{line}");
            }
        }
    }

    #[test]
    fn another_list_is_another_folder() {
        assert_eq!(fnv1a(b""), 0xcbf2_9ce4_8422_2325);
        assert_ne!(fnv1a(b"a==1"), fnv1a(b"a==2"));
    }

    #[test]
    fn what_cannot_be_installed_says_where_it_comes_from() {
        let folder = std::env::temp_dir().join(format!("xtask-peers-{}", std::process::id()));
        std::fs::create_dir_all(&folder).expect("a temporary folder");
        let list = folder.join("requirements.txt");
        let nothing = "mooncake-transfer-engine-non-cuda==0.3.13.post1 --hash=sha256:00\n";
        std::fs::write(&list, nothing).expect("a file");
        let e = make(&MOONCAKE, &list, &folder, &folder.join("made")).unwrap_err().to_string();
        assert!(e.contains("cannot be installed") && e.contains("PyPI"), "{e}");
        assert!(!folder.join("made").exists());
        std::fs::remove_dir_all(folder).expect("nothing is left behind");
    }
}
