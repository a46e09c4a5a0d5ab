//! Registered memory (ibv_reg_mr(3)).

use std::io;
use std::ptr::NonNull;
use std::sync::Arc;

use rdma_core_sys as sys;
use sys::ibv_access_flags as access_flags;

use super::device::Pd;
use super::library::{errno, invalid};
use crate::nic::{Access, Registration};
use crate::region::Memory;
use crate::units::{Lkey, Rkey};

/// 0x1: enough for our own READs to land.
const LOCAL: u32 = access_flags::IBV_ACCESS_LOCAL_WRITE.0;
/// 0x7, as stock peers register.
const REMOTE: u32 = LOCAL | access_flags::IBV_ACCESS_REMOTE_WRITE.0 | access_flags::IBV_ACCESS_REMOTE_READ.0;
/// Bit 20, of the range a device may ignore.
const RELAXED: u32 = access_flags::IBV_ACCESS_RELAXED_ORDERING.0;
const _: () = assert!(LOCAL == 0x1 && REMOTE == 0x7 && RELAXED == 1 << 20);

/// One registration: deregisters, then lets go of the memory and the device.
struct Mr {
    raw: NonNull<sys::ibv_mr>,
    memory: Arc<Memory>,
    pd: Arc<Pd>,
}

// SAFETY: see the module head; the pointer is only ever passed to libibverbs.
unsafe impl Send for Mr {}
// SAFETY: as above; nothing is read through a shared reference.
unsafe impl Sync for Mr {}

/// Registers `len` bytes from `offset`. ENOMEM: the memlock limit (`ulimit -l`), or the device is full.
pub(super) fn register(
    pd: &Arc<Pd>,
    memory: &Arc<Memory>,
    offset: u64,
    len: u64,
    access: Access,
) -> io::Result<Registration> {
    if len == 0 || offset.checked_add(len).is_none_or(|end| end > memory.len()) {
        return Err(invalid("the range to register does not lie inside the region"));
    }
    let base = if access.remote { REMOTE } else { LOCAL };
    let raw = if access.relaxed_ordering {
        match reg_mr(pd, memory, offset, len, base | RELAXED) {
            // A libibverbs before version 28 has no ibv_reg_mr_iova2, and so no optional flags.
            Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => reg_mr(pd, memory, offset, len, base),
            other => other,
        }
    } else {
        reg_mr(pd, memory, offset, len, base)
    }?;
    // SAFETY: just registered; the two fields never change.
    let (lkey, rkey) = unsafe { ((*raw.as_ptr()).lkey, (*raw.as_ptr()).rkey) };
    let guard = Box::new(Mr { raw, memory: Arc::clone(memory), pd: Arc::clone(pd) });
    Ok(Registration { lkey: Lkey(lkey), rkey: Rkey(rkey), guard })
}

fn reg_mr(pd: &Pd, memory: &Memory, offset: u64, len: u64, access: u32) -> io::Result<NonNull<sys::ibv_mr>> {
    let (offset, len) = (offset as usize, len as usize); // inside a mapping, so they fit
    // SAFETY: `register` checked the range; it stays mapped, because the `Mr` made from this holds the memory. `iova`
    // is the address itself, so peers address the bytes as we do. Without the newer symbol the binding falls back to
    // ibv_reg_mr.
    let raw = unsafe {
        let addr = memory.as_ptr().add(offset);
        sys::ibv_reg_mr_iova2(pd.as_ptr(), addr.cast(), len, addr as u64, access)
    };
    NonNull::new(raw).ok_or_else(errno)
}

impl Drop for Mr {
    fn drop(&mut self) {
        // SAFETY: registered by us, deregistered once; the domain still lives.
        let refused = unsafe { sys::ibv_dereg_mr(self.raw.as_ptr()) } != 0;
        if refused {
            // The device may still reach the bytes: leak them, rather than let the address range be given to another.
            std::mem::forget((Arc::clone(&self.memory), Arc::clone(&self.pd)));
        }
    }
}
