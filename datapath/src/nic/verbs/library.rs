//! libibverbs itself: whether it is there, and how its return values read.

use std::ffi::{CStr, c_int};
use std::io;
use std::os::fd::RawFd;
use std::sync::OnceLock;

use rdma_core_sys::{IBV_FORK_DISABLED, ibv_fork_init, ibv_is_fork_initialized};

use super::report::LibraryMissing;

/// Finds out once whether libibverbs is there. Without it the binding's functions return null and EOPNOTSUPP, which
/// would read as a fault of the device.
pub(super) fn require() -> Result<(), LibraryMissing> {
    static PROBED: OnceLock<Result<(), LibraryMissing>> = OnceLock::new();
    PROBED.get_or_init(|| load(c"libibverbs.so.1").inspect(|()| survive_forks())).clone()
}

/// Memory of the embedder that is registered must survive a fork of this process: copied on the parent's next write, it would
/// have pages that the NIC does not know. Since Linux 5.12 the kernel gives the child the copies, at fork, and nothing is to be
/// done. Before that libibverbs can keep such memory out of children, for good and for all registrations of the process, at the
/// price of a mapping more for each (vm.max_map_count); it must be told before the first one, and not where it is unneeded.
fn survive_forks() {
    // SAFETY: two calls without arguments; we have made no verbs object yet. If the embedder has, the second one says so
    // (EINVAL) and changes nothing.
    unsafe {
        if ibv_is_fork_initialized() == IBV_FORK_DISABLED {
            ibv_fork_init();
        }
    }
}

fn load(soname: &CStr) -> Result<(), LibraryMissing> {
    // SAFETY: the name is a C string. The library's constructors run, as they did when the binding loaded it; the
    // handle is kept for the process's life, so its code is never unmapped.
    let handle = unsafe { libc::dlopen(soname.as_ptr(), libc::RTLD_LAZY | libc::RTLD_LOCAL) };
    if !handle.is_null() {
        return Ok(());
    }
    // SAFETY: dlerror returns null or a C string that stays valid until this thread's next dl* call; copied at once.
    let detail = unsafe {
        let text = libc::dlerror();
        if text.is_null() { String::new() } else { CStr::from_ptr(text).to_string_lossy().into_owned() }
    };
    Err(LibraryMissing { detail })
}

/// Reads the result of a verbs call that returns 0, an errno value, or -1 with errno set. Providers use all of them,
/// and some return the errno value negated.
pub(super) fn check(returned: c_int) -> io::Result<()> {
    match returned {
        0 => Ok(()),
        -1 => Err(errno()),
        code => Err(io::Error::from_raw_os_error(code.saturating_abs())),
    }
}

/// errno after a call that failed; EIO where the provider forgot to set it, so that a failure never reads "Success".
pub(super) fn errno() -> io::Error {
    let error = io::Error::last_os_error();
    if error.raw_os_error() == Some(0) { io::Error::from_raw_os_error(libc::EIO) } else { error }
}

/// An argument the caller got wrong.
pub(super) fn invalid(what: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, what)
}

/// Makes a descriptor's reads return EAGAIN instead of waiting.
pub(super) fn set_nonblocking(fd: RawFd) -> io::Result<()> {
    // SAFETY: F_GETFL and F_SETFL touch only the flags of the open file.
    unsafe {
        let flags = libc::fcntl(fd, libc::F_GETFL);
        if flags < 0 || libc::fcntl(fd, libc::F_SETFL, flags | libc::O_NONBLOCK) < 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_library_that_is_not_there_is_an_error_that_names_the_package() {
        let error = load(c"libmoonrail-none.so.1").unwrap_err();
        assert!(error.detail.contains("libmoonrail-none.so.1"), "{error}");
        assert!(error.to_string().contains("install libibverbs1"), "{error}");
    }

    #[test]
    fn every_way_verbs_reports_a_failure_becomes_its_errno() {
        assert!(check(0).is_ok());
        assert_eq!(check(libc::ENOMEM).unwrap_err().raw_os_error(), Some(libc::ENOMEM));
        assert_eq!(check(-libc::EINVAL).unwrap_err().raw_os_error(), Some(libc::EINVAL));
    }
}
