//! Memory of a peer that is no file to map, borrowed by it or beyond its share of file descriptors: so the kernel copies
//! (process_vm_readv(2)).

use super::wire::Process;
use crate::nic::{Op, WcStatus};

/// Ranges moved by one system call.
pub(super) const RANGES: usize = 64;

/// The right to another process's memory, tried out.
pub(super) struct Foreign {
    pid: i32,
}

/// A piece to move; the lists of both sides have the same lengths.
#[derive(Clone, Copy)]
pub(super) struct Piece {
    pub(super) local: u64,
    pub(super) remote: u64,
    pub(super) len: usize,
}

impl Foreign {
    /// Reads `token`, which stands at `at` in the peer's own memory. An error says why its memory is out of reach.
    pub(super) fn probe(process: &Process, at: u64, token: u64) -> Result<Self, String> {
        if process.pid <= 0 || process.pidfd.is_none() {
            return Err("the peer runs in another pid namespace (another container): share the namespace".into());
        }
        let foreign = Self { pid: process.pid };
        let mut read = 0u64;
        let piece = Piece { local: &raw mut read as u64, remote: at, len: 8 };
        match foreign.transfer(Op::Read, &[piece]) {
            Ok(8) if read == token && !process.has_ended() => Ok(foreign),
            Ok(_) => Err(format!("process {} is not the peer that answered: another pid namespace", process.pid)),
            Err(libc::EPERM) => Err(format!(
                "reading the memory of process {} is not permitted: see /proc/sys/kernel/yama/ptrace_scope (0 allows it), \
                 or give CAP_SYS_PTRACE",
                process.pid
            )),
            Err(errno) => {
                let error = std::io::Error::from_raw_os_error(errno);
                Err(format!("reading the memory of process {}: {error}", process.pid))
            }
        }
    }

    /// Moves the pieces, at most [`RANGES`], and says how many bytes were moved before something was not there.
    pub(super) fn transfer(&self, op: Op, pieces: &[Piece]) -> Result<usize, i32> {
        let none = libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 };
        let (mut local, mut remote) = ([none; RANGES], [none; RANGES]);
        let count = pieces.len().min(RANGES);
        for (at, piece) in pieces.iter().take(count).enumerate() {
            local[at] = libc::iovec { iov_base: piece.local as *mut libc::c_void, iov_len: piece.len };
            remote[at] = libc::iovec { iov_base: piece.remote as *mut libc::c_void, iov_len: piece.len };
        }
        let call = match op {
            Op::Read => libc::process_vm_readv,
            Op::Write => libc::process_vm_writev,
        };
        // SAFETY: the local ranges are inside registered memory that the request keeps, as its maker checked; the kernel
        // checks the remote ones.
        let moved = unsafe { call(self.pid, local.as_ptr(), count as u64, remote.as_ptr(), count as u64, 0) };
        usize::try_from(moved).map_err(|_| std::io::Error::last_os_error().raw_os_error().unwrap_or(0))
    }

    /// The status of a request that the kernel did not carry out.
    pub(super) fn status(errno: i32) -> WcStatus {
        match errno {
            libc::EFAULT => WcStatus::REM_ACCESS_ERR,
            libc::ESRCH => WcStatus::RETRY_EXC_ERR,
            _ => WcStatus::REM_OP_ERR,
        }
    }
}
