//! What the system allows to be locked, and what the kernel said about a refusal. Read from /proc and /dev/kmsg.

use std::io::{ErrorKind, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::{Duration, Instant};

/// Bit of CAP_IPC_LOCK in a capability mask (capabilities(7)).
const CAP_IPC_LOCK: u32 = 14;

/// How much this process may lock.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct LockLimit {
    /// Soft limit in bytes; `None`: unlimited, or CAP_IPC_LOCK is held, or unknown.
    pub limit: Option<u64>,
    /// Bytes already locked or pinned, as the kernel counts them.
    pub used: u64,
}

impl LockLimit {
    /// Reads `self/limits` and `self/status` under `proc`.
    pub fn read(proc: &Path) -> Self {
        let limits = std::fs::read_to_string(proc.join("self/limits")).unwrap_or_default();
        let status = std::fs::read_to_string(proc.join("self/status")).unwrap_or_default();
        let field = |name: &str| status.lines().find_map(|line| line.strip_prefix(name)).map(str::trim);
        let kilobytes =
            |name: &str| field(name).and_then(|text| text.split_whitespace().next()?.parse::<u64>().ok()).unwrap_or(0);
        let capable = field("CapEff:")
            .and_then(|mask| u64::from_str_radix(mask, 16).ok())
            .is_some_and(|mask| mask >> CAP_IPC_LOCK & 1 == 1);
        let soft = limits
            .lines()
            .find_map(|line| line.strip_prefix("Max locked memory"))
            .and_then(|rest| rest.split_whitespace().next()?.parse::<u64>().ok());
        Self {
            limit: if capable { None } else { soft },
            // mlock and pinned pages count against the limit apart; the larger one is what is left of it.
            used: kilobytes("VmLck:").max(kilobytes("VmPin:")).saturating_mul(1024),
        }
    }

    /// Bytes locked in all if `len` more are pinned by each of `nics` NICs, if that is more than allowed. `registered`:
    /// what the caller itself knows to be registered over all NICs.
    pub fn exceeded(self, len: u64, nics: usize, registered: u64) -> Option<(u64, u64)> {
        let limit = self.limit?;
        let needed = len.saturating_mul(nics as u64).saturating_add(self.used.max(registered));
        (needed > limit).then_some((needed, limit))
    }
}

/// The kernel's last line that names `nic`, or speaks of RDMA at all; `None` where the log may not be read.
pub(crate) fn kernel_line(nic: &str) -> Option<String> {
    kernel_lines(|line| concerns(line, nic)).ok()?.pop()
}

/// The lines of the kernel's log for which `wanted` says yes, oldest first; each with its time since boot.
///
/// # Errors
/// The log may not be read (/dev/kmsg; in a container it often is not there).
pub fn kernel_lines(wanted: impl Fn(&str) -> bool) -> std::io::Result<Vec<String>> {
    let mut log = std::fs::OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open("/dev/kmsg")?;
    // Each read gives one record; a bound, since the kernel may write as fast as we read.
    let until = Instant::now() + Duration::from_millis(200);
    let mut record = [0u8; 8192];
    let mut found = Vec::new();
    while Instant::now() < until {
        match log.read(&mut record) {
            Ok(0) => break,
            Ok(len) => found.extend(message(&record[..len]).filter(|text| wanted(text))),
            // EPIPE: the record was overwritten while we read; the next read goes on after it.
            Err(error) if error.raw_os_error() == Some(libc::EPIPE) || error.kind() == ErrorKind::Interrupted => {}
            Err(_) => break,
        }
    }
    Ok(found)
}

/// The text of a record `priority,sequence,microseconds,flags;text\n key=value…`, with its time.
fn message(record: &[u8]) -> Option<String> {
    let text = String::from_utf8_lossy(record);
    let (head, body) = text.split_once(';')?;
    let micros: u64 = head.split(',').nth(2)?.parse().ok()?;
    let line = body.lines().next().unwrap_or_default().trim();
    Some(format!("[{}.{:06}] {line}", micros / 1_000_000, micros % 1_000_000))
}

/// Whether a kernel line is about this NIC, or about RDMA at all.
pub fn concerns(line: &str, nic: &str) -> bool {
    line.contains(nic) || ["infiniband", "rdma", "rxe", "mlx5", "ib_core"].iter().any(|word| line.contains(word))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn proc_with(limits: &str, status: &str) -> LockLimit {
        use std::sync::atomic::{AtomicU32, Ordering};
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!("moonrail-proc-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let root = std::env::temp_dir().join(name);
        std::fs::create_dir_all(root.join("self")).unwrap();
        std::fs::write(root.join("self/limits"), limits).unwrap();
        std::fs::write(root.join("self/status"), status).unwrap();
        let read = LockLimit::read(&root);
        std::fs::remove_dir_all(&root).unwrap();
        read
    }

    const LIMITS: &str = "Limit                     Soft Limit           Hard Limit           Units     \n\
                          Max locked memory         8388608              unlimited            bytes     \n";

    #[test]
    fn the_limit_counts_every_nic_and_what_is_locked_already() {
        let read = proc_with(LIMITS, "VmLck:\t       4 kB\nVmPin:\t    1024 kB\nCapEff:\t0000000000000000\n");
        assert_eq!(read, LockLimit { limit: Some(8_388_608), used: 1 << 20 });
        assert_eq!(read.exceeded(3 << 20, 2, 0), None);
        assert_eq!(read.exceeded(4 << 20, 2, 0), Some((9 << 20, 8 << 20)));
        assert_eq!(read.exceeded(3 << 20, 2, 3 << 20), Some((9 << 20, 8 << 20)));
        assert_eq!(read.exceeded(u64::MAX, 2, 1).unwrap().0, u64::MAX);
    }

    #[test]
    fn the_capability_and_no_limit_lift_it() {
        assert_eq!(proc_with(LIMITS, "CapEff:\t0000000000004000\n").limit, None);
        assert_eq!(proc_with("Max locked memory         unlimited            unlimited   bytes\n", "").limit, None);
        assert_eq!(proc_with("", "").exceeded(u64::MAX, 8, 0), None, "unknown is not a refusal");
    }

    #[test]
    fn a_kernel_record_is_one_line_with_its_time() {
        let record =
            b"3,1234,98765432,-;infiniband erdma_0: ERROR: Out of mr size: 0, max 68719476736\n SUBSYSTEM=pci\n";
        let line = message(record).unwrap();
        assert_eq!(line, "[98.765432] infiniband erdma_0: ERROR: Out of mr size: 0, max 68719476736");
        assert!(concerns(&line, "erdma_0") && !concerns("[1.0] usb 1-1: new device", "erdma_0"));
        assert_eq!(message(b"garbage"), None);
        let _ = kernel_line("none"); // readable or not, it returns
    }
}
