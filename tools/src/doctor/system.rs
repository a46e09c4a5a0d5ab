//! What the system grants: locked memory, memory at all, descriptors, fork, other processes' memory, the kernel's log.

use std::path::Path;

use moonrail::memlock::{LockLimit, concerns, kernel_lines};

use super::finding::Finding;
use crate::units::size;

/// Words by which a kernel line is bad news.
const BAD: [&str; 7] = ["error", "fail", "fatal", "timeout", "timed out", "out of", "unhealthy"];
/// Older lines are history: what they say is seen at the device itself, or mended.
const RECENT: f64 = 3600.0;
/// Lines of the kernel's log that are shown.
const LINES: usize = 3;
/// Since when the kernel shares pinned pages with a child correctly (copy on fork instead of copy on write).
const COPY_ON_FORK: (u32, u32) = (5, 12);
/// Fewer are used up by a hundred peers over TCP.
const FILES: u64 = 1024;

/// Locked memory for `bytes` on each of `nics` NICs.
pub fn memlock(proc: &Path, bytes: u64, nics: usize) -> Finding {
    const CHECK: &str = "memlock";
    let limit = LockLimit::read(proc);
    if nics == 0 {
        return Finding::skip(CHECK, "no RDMA NIC pins memory here");
    }
    match (limit.limit, limit.exceeded(bytes, nics, 0)) {
        (None, _) => Finding::pass(CHECK, "no limit: CAP_IPC_LOCK is held, or RLIMIT_MEMLOCK is unlimited"),
        (Some(limit), None) => {
            Finding::pass(CHECK, format!("{} are allowed, {} on {nics} NICs fit", size(limit), size(bytes)))
        }
        (Some(_), Some((needed, limit))) => Finding::fail(
            CHECK,
            format!(
                "{} on each of {nics} NICs need {} of locked memory, RLIMIT_MEMLOCK allows {}",
                size(bytes),
                size(needed),
                size(limit)
            ),
            "ulimit -l unlimited; LimitMEMLOCK=infinity in a systemd unit; --ulimit memlock=-1 or CAP_IPC_LOCK in a container",
        ),
    }
}

/// Room for `bytes`, in the machine and in our control group.
pub fn memory(proc: &Path, sys: &Path, bytes: u64) -> Finding {
    const CHECK: &str = "memory";
    let text = std::fs::read_to_string(proc.join("meminfo")).unwrap_or_default();
    let field = |name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
        line.split_whitespace().next()?.parse::<u64>().ok()
    };
    let available = field("MemAvailable").map_or(u64::MAX, |kib| kib.saturating_mul(1024));
    let group = cgroup_left(proc, sys).unwrap_or(u64::MAX);
    if bytes > available.min(group) {
        let whose = if group < available { "this control group has left" } else { "the machine has available" };
        return Finding::fail(
            CHECK,
            format!("{} are more than the {} that {whose}", size(bytes), size(available.min(group))),
            "offer less (--size), or raise memory.max of the container or unit",
        );
    }
    let huge = match (field("HugePages_Total").unwrap_or(0), field("HugePages_Free").unwrap_or(0)) {
        (0, _) => "no huge pages are set aside (sysctl vm.nr_hugepages=N makes large registrations faster)".to_owned(),
        (total, free) => {
            format!("{free} of {total} huge pages of {} are free", size(field("Hugepagesize").unwrap_or(0) * 1024))
        }
    };
    let known = if available == u64::MAX { "unknown".to_owned() } else { size(available.min(group)) };
    Finding::pass(CHECK, format!("{known} available; {huge}"))
}

/// What is left below memory.max of the control group (version 2) of this process; `None`: no limit is known.
fn cgroup_left(proc: &Path, sys: &Path) -> Option<u64> {
    let text = std::fs::read_to_string(proc.join("self/cgroup")).ok()?;
    let group = text.lines().find_map(|line| line.strip_prefix("0::/"))?;
    let folder = sys.join("fs/cgroup").join(group);
    let number = |file: &str| std::fs::read_to_string(folder.join(file)).ok()?.trim().parse::<u64>().ok();
    Some(number("memory.max")?.saturating_sub(number("memory.current").unwrap_or(0)))
}

/// Descriptors: each connection over TCP has one, and each NIC some.
pub fn files(proc: &Path) -> Finding {
    const CHECK: &str = "descriptors";
    let limits = std::fs::read_to_string(proc.join("self/limits")).unwrap_or_default();
    let soft = limits.lines().find_map(|line| line.strip_prefix("Max open files")?.split_whitespace().next());
    match soft.and_then(|text| text.parse::<u64>().ok()) {
        Some(limit) if limit < FILES => Finding::warn(
            CHECK,
            format!("{limit} open files are allowed, some hundred peers need more"),
            "ulimit -n 65536, LimitNOFILE=65536",
        ),
        Some(limit) => Finding::pass(CHECK, format!("{limit} open files are allowed")),
        None => Finding::pass(CHECK, "no limit"),
    }
}

/// Whether a process that forks keeps its registered memory.
pub fn fork(proc: &Path) -> Finding {
    const CHECK: &str = "fork";
    let release = std::fs::read_to_string(proc.join("sys/kernel/osrelease")).unwrap_or_default();
    let release = release.trim();
    let mut numbers = release.split(['.', '-']).filter_map(|part| part.parse::<u32>().ok());
    match (numbers.next(), numbers.next()) {
        (Some(major), Some(minor)) if (major, minor) < COPY_ON_FORK => Finding::warn(
            CHECK,
            format!("kernel {release} copies pinned pages on write: a program that forks may lose what NICs write"),
            "set RDMAV_FORK_SAFE=1 in programs that fork, or use kernel 5.12 or later",
        ),
        _ => Finding::pass(CHECK, format!("kernel {release} copies pinned pages when a process forks")),
    }
}

/// Whether processes of this host may copy each other's memory (process_vm_readv); only memory that moonrail did not
/// allocate needs it.
pub fn ptrace(proc: &Path, needed: bool) -> Finding {
    const CHECK: &str = "ptrace";
    let scope = std::fs::read_to_string(proc.join("sys/kernel/yama/ptrace_scope")).ok();
    let status = std::fs::read_to_string(proc.join("self/status")).unwrap_or_default();
    let mask = status.lines().find_map(|line| u64::from_str_radix(line.strip_prefix("CapEff:")?.trim(), 16).ok());
    // CAP_SYS_PTRACE, capabilities(7).
    let capable = mask.is_some_and(|mask| mask >> 19 & 1 == 1);
    match scope.as_deref().map(str::trim) {
        None | Some("0") => Finding::pass(CHECK, "processes of one user may copy each other's memory"),
        Some(_) if capable => Finding::pass(CHECK, "CAP_SYS_PTRACE is held"),
        Some(scope) if needed => Finding::warn(
            CHECK,
            format!("kernel.yama.ptrace_scope is {scope}: shared memory reaches only what moonrail has allocated"),
            "let moonrail allocate the memory (Engine::allocate), or sysctl kernel.yama.ptrace_scope=0",
        ),
        Some(scope) => Finding::pass(
            CHECK,
            format!(
                "kernel.yama.ptrace_scope is {scope}: on one host, memory that moonrail did not allocate goes over TCP"
            ),
        ),
    }
}

/// What the drivers of RDMA devices complained about.
pub fn kernel_log(proc: &Path, devices: &[String]) -> Finding {
    const CHECK: &str = "kernel log";
    let uptime = std::fs::read_to_string(proc.join("uptime")).unwrap_or_default();
    let now: f64 = uptime.split_whitespace().next().and_then(|text| text.parse().ok()).unwrap_or(0.0);
    let bad = |line: &str| {
        let low = line.to_ascii_lowercase();
        // `[98.765432] text`: seconds since boot.
        let at = line.strip_prefix('[').and_then(|rest| rest.split(']').next()?.parse::<f64>().ok());
        if at.is_some_and(|at| at + RECENT < now) {
            return false;
        }
        let named = devices.iter().any(|device| concerns(line, device)) || concerns(line, "infiniband");
        named && BAD.iter().any(|word| low.contains(word))
    };
    match kernel_lines(bad) {
        Ok(lines) if lines.is_empty() => Finding::pass(CHECK, "nothing bad from an RDMA driver within the last hour"),
        Ok(lines) => Finding::warn(
            CHECK,
            format!("{} lines, the last: {}", lines.len(), lines[lines.len().saturating_sub(LINES)..].join(" | ")),
            "dmesg -T shows them with their surroundings",
        ),
        Err(e) => Finding::skip(CHECK, format!("/dev/kmsg: {e}; `dmesg -T` as root shows it")),
    }
}

#[cfg(test)]
mod tests {
    use super::super::finding::Verdict::{Fail, Pass, Skip, Warn};
    use super::super::roots::Roots;
    use super::*;

    #[test]
    fn locked_memory_counts_every_nic() {
        let roots = Roots::new(&[
            ("self/limits", "Max locked memory         65536                65536                bytes\n"),
            ("self/status", "CapEff:\t0000000000000000\n"),
        ]);
        let found = memlock(&roots.0, 64 << 20, 2);
        assert_eq!(found.verdict, Fail);
        assert!(found.evidence.contains("128 MiB") && found.evidence.contains("64 KiB"), "{}", found.evidence);
        assert!(found.next.unwrap().contains("ulimit -l"));
        assert_eq!(memlock(&roots.0, 64 << 20, 0).verdict, Skip);
        assert_eq!(memlock(&roots.0, 1 << 10, 2).verdict, Pass);
    }

    #[test]
    fn memory_is_the_smaller_of_the_machines_and_the_groups() {
        let roots = Roots::new(&[
            ("meminfo", "MemAvailable:    1048576 kB\nHugePages_Total:       0\n"),
            ("self/cgroup", "0::/pod\n"),
            ("fs/cgroup/pod/memory.max", "134217728\n"),
            ("fs/cgroup/pod/memory.current", "67108864\n"),
        ]);
        assert_eq!(memory(&roots.0, &roots.0, 64 << 20).verdict, Pass);
        let found = memory(&roots.0, &roots.0, 65 << 20);
        assert!(found.verdict == Fail && found.evidence.contains("control group"), "{found:?}");
        std::fs::write(roots.0.join("fs/cgroup/pod/memory.max"), "max\n").unwrap();
        assert_eq!(memory(&roots.0, &roots.0, 65 << 20).verdict, Pass);
        assert!(memory(&roots.0, &roots.0, 2 << 30).evidence.contains("the machine"));
    }

    #[test]
    fn old_kernels_few_files_and_a_closed_ptrace() {
        let roots = Roots::new(&[
            ("sys/kernel/osrelease", "5.4.0-90-generic\n"),
            ("sys/kernel/yama/ptrace_scope", "1\n"),
            ("self/limits", "Max open files            256                  4096                 files\n"),
        ]);
        assert_eq!(fork(&roots.0).verdict, Warn);
        assert_eq!(files(&roots.0).verdict, Warn);
        assert_eq!((ptrace(&roots.0, true).verdict, ptrace(&roots.0, false).verdict), (Warn, Pass));
        std::fs::write(roots.0.join("sys/kernel/osrelease"), "6.1.0-28-amd64\n").unwrap();
        assert_eq!(fork(&roots.0).verdict, Pass);
        assert_eq!(memory(Path::new("/none"), Path::new("/none"), 1 << 40).verdict, Pass, "unknown is no fault");
    }
}
