//! `cargo xtask setup`: the Debian packages that the build and the tests need, and a stock engine to test against.

use std::fmt::Write as _;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::time::Duration;

use crate::error::{At, Error, Result};
use crate::peers;
use crate::process::Bounded;

/// A Debian package and the reason for it.
struct Package {
    name: &'static str,
    why: &'static str,
}

const fn package(name: &'static str, why: &'static str) -> Package {
    Package { name, why }
}

/// Everything beyond a stock Debian 12 with Rust. The kernel of the lab is not here: it is unpacked into the lab's
/// cache and never installed.
const PACKAGES: &[Package] = &[
    package("gcc", "links every Rust program and compiles the C parts of TLS"),
    package("g++", "compiles libFuzzer, for the fuzz targets"),
    package("libc6-dev", "the C library's headers, for the same"),
    package("cmake", "builds the C shim of the verbs bindings"),
    package("make", "the generator cmake uses there"),
    package("libclang-dev", "bindgen reads the verbs headers with it"),
    package("protobuf-compiler", "etcd-client compiles etcd's protocol files"),
    package("libprotobuf-dev", "the standard protocol files that etcd's import"),
    package("etcd-server", "the metadata tests, the lab and the demo run against a real etcd"),
    package("ibverbs-providers", "the Soft-RoCE user-space driver (and libibverbs) in the lab"),
    package("ibverbs-utils", "ibv_devinfo: what the lab's devices look like from outside moonrail"),
    package("perftest", "ib_write_bw: proves a lab rail without moonrail"),
    package(
        "iproute2",
        "ip, rdma and tc set up the lab's NICs and their faults; network namespaces in tests on the host",
    ),
    package("strace", "counts the doorbells of Soft-RoCE from outside the engine"),
    package("valgrind", "counts the instructions of a request, which have a budget"),
    package("qemu-system-x86", "runs the lab's nodes, in software where there is no KVM"),
    package("busybox-static", "the first programs of a lab node"),
    package("kmod", "finds the kernel modules Soft-RoCE depends on"),
    package("python3", "runs a stock Mooncake engine, the other end of the interop tests"),
    package("python3-venv", "keeps it in an environment of its own"),
    package("libnuma1", "that engine is linked with it"),
    package("libcurl4", "the same"),
];

const ASK_DPKG: Duration = Duration::from_secs(30);
const UPDATE: Duration = Duration::from_secs(300);
const INSTALL: Duration = Duration::from_secs(1200);
const POLICY: &str = "/usr/sbin/policy-rc.d";

/// Installs what is missing; one line when nothing is.
pub(crate) fn run() -> Result<()> {
    if install_missing()? == 0 {
        println!("setup: all {} packages are installed", PACKAGES.len());
    }
    println!("setup: a stock Mooncake engine is in {}", peers::require(&peers::MOONCAKE)?.display());
    Ok(())
}

/// The same for activities that need the packages: silent when nothing is missing.
pub(crate) fn require() -> Result<()> {
    install_missing().map(|_| ())
}

fn install_missing() -> Result<usize> {
    let missing = missing()?;
    if missing.is_empty() {
        return Ok(0);
    }
    println!("setup: {} of {} packages are missing:", missing.len(), PACKAGES.len());
    for package in &missing {
        println!("  {:<18} {}", package.name, package.why);
    }
    let names: Vec<&str> = missing.iter().map(|p| p.name).collect();
    if !is_root() {
        return Err(Error::new("only root may install packages", by_hand("sudo ", &names)));
    }
    install(&names)?;
    println!("setup: installed {}", names.join(" "));
    Ok(names.len())
}

fn missing() -> Result<Vec<&'static Package>> {
    // dpkg-query's exit status says that some are unknown, which is no error here.
    let ask = Bounded::new("sh", ASK_DPKG)
        .args(["-c", "command -v dpkg-query > /dev/null || exit 127; dpkg-query -W -f '${Package} ${db:Status-Status}\\n' \"$@\" 2> /dev/null; true", "sh"])
        .args(PACKAGES.iter().map(|p| p.name));
    let known = ask.output().map_err(|_| {
        let names: Vec<&str> = PACKAGES.iter().map(|p| p.name).collect();
        Error::new("this machine has no dpkg: setup knows packages by their names in Debian 12", by_hand("", &names))
    })?;
    Ok(not_installed(&known))
}

fn not_installed(dpkg_says: &str) -> Vec<&'static Package> {
    let installed = |name: &str| dpkg_says.lines().any(|line| line.split_once(' ') == Some((name, "installed")));
    PACKAGES.iter().filter(|p| !installed(p.name)).collect()
}

/// The one command to run. With an update: on a fresh machine apt knows no package at all.
fn by_hand(prefix: &str, names: &[&str]) -> String {
    let mut text = format!(
        "run this, then try again:\n    {prefix}apt-get update && {prefix}apt-get install --no-install-recommends"
    );
    for name in names {
        let _ = write!(text, " {name}");
    }
    text
}

fn is_root() -> bool {
    std::fs::metadata("/proc/self").is_ok_and(|own| own.uid() == 0)
}

fn install(names: &[&str]) -> Result<()> {
    let _quiet = NoServices::at(Path::new(POLICY))?;
    // The lists may be absent (a fresh container) or name files the mirror no longer has: update, then try again.
    if !simulate(names) || apt_install(names).is_err() {
        println!("setup: apt-get update");
        apt("update", UPDATE).output().map_err(|e| no_mirror(&e))?;
        apt_install(names)
            .map_err(|e| Error::new(e.to_string(), format!("see what apt says; or {}", by_hand("", names))))?;
    }
    if names.contains(&"etcd-server") {
        // Tests start their own etcd on a port of their own; the machine need not run one from its next boot on.
        let _ = Bounded::new("update-rc.d", ASK_DPKG).args(["etcd", "disable"]).output();
    }
    Ok(())
}

fn no_mirror(e: &Error) -> Error {
    Error::new(format!("apt-get update failed: {e}"), "check this machine's network and /etc/apt/sources.list")
}

fn apt(verb: &str, limit: Duration) -> Bounded {
    Bounded::new("apt-get", limit)
        .env("DEBIAN_FRONTEND", "noninteractive")
        .args(["-q", "-y", "-o", "DPkg::Lock::Timeout=120", "-o", "Acquire::Retries=2"])
        .arg(verb)
}

/// Whether apt's lists know all packages.
fn simulate(names: &[&str]) -> bool {
    apt("install", ASK_DPKG).args(["--simulate", "--no-install-recommends"]).args(names).output().is_ok()
}

fn apt_install(names: &[&str]) -> Result<()> {
    println!("setup: apt-get install --no-install-recommends {}", names.join(" "));
    apt("install", INSTALL).arg("--no-install-recommends").args(names).output().map(|_| ())
}

/// While this lives, packages do not start their services when installed (etcd-server would take port 2379).
///
/// Debian asks `policy-rc.d` before it starts a service. Where the machine has such a file, it stays as it is. Ours
/// says no only while the process that wrote it lives, so one left behind by a crash changes nothing.
struct NoServices<'a>(Option<&'a Path>);

impl<'a> NoServices<'a> {
    fn at(path: &'a Path) -> Result<Self> {
        let ours = std::fs::read_to_string(path).is_ok_and(|text| text.contains(POLICY_MARK));
        if ours {
            std::fs::remove_file(path).at("remove", path)?;
        }
        let created = std::fs::OpenOptions::new().write(true).create_new(true).mode(0o755).open(path);
        match created {
            Ok(mut file) => {
                std::io::Write::write_all(&mut file, policy(std::process::id()).as_bytes()).at("write", path)?;
                Ok(Self(Some(path)))
            }
            Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => Ok(Self(None)),
            Err(e) => Err(e).at("create", path),
        }
    }
}

impl Drop for NoServices<'_> {
    fn drop(&mut self) {
        if let Some(path) = self.0 {
            let _ = std::fs::remove_file(path);
        }
    }
}

const POLICY_MARK: &str = "written by moonrail's cargo xtask setup";

fn policy(pid: u32) -> String {
    // 101: the action is forbidden; 0: it is allowed (invoke-rc.d(8)).
    format!(
        "#!/bin/sh\n# {POLICY_MARK}; harmless when left behind\ngrep -qs xtask /proc/{pid}/comm && exit 101\nexit 0\n"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_dpkg_calls_installed_counts() {
        let state = |name| match name {
            "cmake" => "not-installed",
            "kmod" => "config-files",
            _ => "installed",
        };
        let says: Vec<String> = PACKAGES.iter().map(|p| format!("{} {}", p.name, state(p.name))).collect();
        let says = says.join("\n");
        let names: Vec<_> = not_installed(&says).iter().map(|p| p.name).collect();
        assert_eq!(names, ["cmake", "kmod"]);
    }

    #[test]
    fn the_command_to_run_by_hand_names_each_package_once() {
        let text = by_hand("sudo ", &["cmake", "kmod"]);
        let command = "sudo apt-get update && sudo apt-get install --no-install-recommends cmake kmod";
        assert_eq!(text.lines().last().map(str::trim), Some(command), "{text}");
    }

    #[test]
    fn a_policy_of_the_machine_is_left_alone() {
        let folder = std::env::temp_dir().join(format!("xtask-policy-{}", std::process::id()));
        std::fs::create_dir_all(&folder).expect("a temporary folder");
        let path = folder.join("policy-rc.d");
        std::fs::write(&path, "#!/bin/sh\nexit 101\n").expect("a file");
        drop(NoServices::at(&path).expect("left alone"));
        assert_eq!(std::fs::read_to_string(&path).expect("still there"), "#!/bin/sh\nexit 101\n");

        // One that a crash left behind is ours to replace, and ours goes away in the end.
        std::fs::write(&path, policy(1)).expect("a file");
        let ours = NoServices::at(&path).expect("replaced");
        assert!(std::fs::read_to_string(&path).expect("ours").contains(&std::process::id().to_string()));
        drop(ours);
        assert!(!path.exists());
        std::fs::remove_dir_all(folder).expect("clean");
    }
}
