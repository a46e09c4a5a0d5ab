//! The devices libibverbs lists, an open device, and its protection domain.

use std::ffi::CStr;
use std::io;
use std::marker::PhantomData;
use std::mem::MaybeUninit;
use std::os::fd::RawFd;
use std::ptr::NonNull;
use std::sync::Arc;

use rdma_core_sys as sys;

use super::library::{check, errno};
use super::sysfs::Sysfs;
use crate::nic::{DeviceInfo, GidEntry, GidKind, LinkLayer, PortInfo, PortState};
use crate::units::{Gid, GidIndex, Lid, Mtu, PortNum};

/// What ibv_get_device_list(3) returned.
pub(super) struct DeviceList {
    first: NonNull<*mut sys::ibv_device>,
    len: usize,
}

impl DeviceList {
    /// The devices now. A machine without any, or without kernel support (ENOSYS), gives an empty list.
    pub(super) fn get() -> io::Result<Self> {
        let mut len = 0;
        // SAFETY: writes the count; returns null or an array of that many pointers, ours to free.
        let list = unsafe { sys::ibv_get_device_list(&raw mut len) };
        match NonNull::new(list) {
            Some(first) => Ok(Self { first, len: usize::try_from(len).unwrap_or(0) }),
            None => match errno() {
                error if error.raw_os_error() == Some(libc::ENOSYS) => Ok(Self { first: NonNull::dangling(), len: 0 }),
                error => Err(error),
            },
        }
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = Device<'_>> {
        // SAFETY: `i` is below the length of the array, which lives as long as `self`.
        (0..self.len).map(|i| Device { raw: unsafe { *self.first.as_ptr().add(i) }, list: PhantomData })
    }
}

impl Drop for DeviceList {
    fn drop(&mut self) {
        if self.first != NonNull::dangling() {
            // SAFETY: from ibv_get_device_list and freed once. Open devices hold their own reference.
            unsafe { sys::ibv_free_device_list(self.first.as_ptr()) };
        }
    }
}

/// A device in the list, not open.
pub(super) struct Device<'list> {
    raw: *mut sys::ibv_device,
    list: PhantomData<&'list DeviceList>,
}

impl Device<'_> {
    pub(super) fn name(&self) -> String {
        // SAFETY: `raw` comes from a list that lives; the name is a C string inside the device, or null.
        unsafe { text(sys::ibv_get_device_name(self.raw)) }
    }
}

/// Copies a C string; null reads as nothing.
///
/// # Safety
/// `from` is null or a C string.
unsafe fn text(from: *const std::ffi::c_char) -> String {
    if from.is_null() {
        return String::new();
    }
    // SAFETY: the caller's promise.
    unsafe { CStr::from_ptr(from) }.to_string_lossy().into_owned()
}

/// What Soft-RoCE calls its maker (`RXE_VENDOR_ID`, drivers/infiniband/sw/rxe/rxe_param.h).
const SOFT_ROCE: u32 = 0xff_ffff;

/// An open device. Closed when the last object made from it is gone.
pub(super) struct Context {
    raw: NonNull<sys::ibv_context>,
    name: String,
    is_soft_roce: bool,
}

// SAFETY: libibverbs allows every call on a context from every thread (module head).
unsafe impl Send for Context {}
// SAFETY: as above.
unsafe impl Sync for Context {}

impl Context {
    pub(super) fn open(device: &Device<'_>) -> io::Result<Self> {
        // SAFETY: the device comes from a list that lives; the context takes its own reference to it.
        let raw = unsafe { sys::ibv_open_device(device.raw) };
        let raw = NonNull::new(raw).ok_or_else(errno)?;
        let mut context = Self { raw, name: device.name(), is_soft_roce: false };
        context.is_soft_roce = context.device_attr().is_ok_and(|attr| attr.vendor_id == SOFT_ROCE);
        Ok(context)
    }

    /// Whether it may call a READ a success that it cut short, and leave the queue pair in ERR without a word: when it has a part
    /// of the READ, it takes an RNR NAK for a wrong sequence (`check_ack` in rxe_comp.c of Linux 6.1; docs/testing.md).
    pub(super) fn cuts_reads(&self) -> bool {
        self.is_soft_roce
    }

    fn device_attr(&self) -> io::Result<sys::ibv_device_attr> {
        let mut attr = MaybeUninit::<sys::ibv_device_attr>::zeroed();
        // SAFETY: writes one ibv_device_attr; all its fields are integers, for which the zeroes are valid too.
        unsafe {
            check(sys::ibv_query_device(self.as_ptr(), attr.as_mut_ptr()))?;
            Ok(attr.assume_init())
        }
    }

    pub(super) fn as_ptr(&self) -> *mut sys::ibv_context {
        self.raw.as_ptr()
    }

    /// The descriptor asynchronous events are read from.
    pub(super) fn async_fd(&self) -> RawFd {
        // SAFETY: open; the field does not change.
        unsafe { (*self.as_ptr()).async_fd }
    }

    /// Interrupt vectors completion events can be spread over, at least 1.
    pub(super) fn vectors(&self) -> u32 {
        // SAFETY: open; the field does not change.
        unsafe { (*self.as_ptr()).num_comp_vectors }.max(1).unsigned_abs()
    }

    /// Limits from verbs, place and firmware from sysfs.
    pub(super) fn device_info(&self, sysfs: &Sysfs) -> io::Result<DeviceInfo> {
        let attr = self.device_attr()?;
        let count = |n: i32| u32::try_from(n).unwrap_or(0);
        let small = |n: i32| u8::try_from(n.clamp(0, 255)).unwrap_or(u8::MAX);
        // SAFETY: a C string of at most 64 bytes; the array was zeroed and the kernel's text is shorter.
        let firmware = unsafe { text(attr.fw_ver.as_ptr()) };
        Ok(DeviceInfo {
            firmware,
            ports: attr.phys_port_cnt,
            max_mr_size: attr.max_mr_size,
            max_mr: count(attr.max_mr),
            max_qp: count(attr.max_qp),
            max_qp_wr: count(attr.max_qp_wr),
            max_sge: count(attr.max_sge),
            max_cqe: count(attr.max_cqe),
            max_qp_init_rd_atom: small(attr.max_qp_init_rd_atom),
            max_qp_rd_atom: small(attr.max_qp_rd_atom),
            ..sysfs.device_info(&self.name)
        })
    }

    fn port_attr(&self, port: PortNum) -> io::Result<sys::ibv_port_attr> {
        let mut attr = MaybeUninit::<sys::ibv_port_attr>::zeroed();
        // SAFETY: the binding passes the structure's size, and a libibverbs that knows fewer fields zeroes the rest.
        // All fields are integers.
        unsafe {
            check(sys::ibv_query_port(self.as_ptr(), port.0, attr.as_mut_ptr()))?;
            Ok(attr.assume_init())
        }
    }

    pub(super) fn query_port(&self, port: PortNum) -> io::Result<PortInfo> {
        let attr = self.port_attr(port)?;
        Ok(PortInfo {
            port,
            state: port_state(attr.state),
            physical_state: attr.phys_state,
            link_layer: link_layer(attr.link_layer),
            max_mtu: Mtu::from_verbs(attr.max_mtu),
            active_mtu: Mtu::from_verbs(attr.active_mtu),
            lid: Lid(attr.lid),
            gid_table_len: u32::try_from(attr.gid_tbl_len).unwrap_or(0),
            rate_mbps: rate_mbps(attr.active_width, u32::from(attr.active_speed), attr.active_speed_ex),
        })
    }

    /// The port's GIDs, empty slots left out; by sysfs where libibverbs is older than version 32.
    pub(super) fn gids(&self, port: PortNum, sysfs: &Sysfs) -> io::Result<Vec<GidEntry>> {
        match self.gid_table() {
            Ok(entries) => {
                Ok(entries.iter().filter(|e| e.port_num == u32::from(port.0)).filter_map(gid_entry).collect())
            }
            Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => sysfs.gids(&self.name, port),
            Err(error) => Err(error),
        }
    }

    /// The GIDs of all ports in one call: ibv_query_gid_table(3) has no way to ask for one port.
    fn gid_table(&self) -> io::Result<Vec<sys::ibv_gid_entry>> {
        let mut attr = MaybeUninit::<sys::ibv_device_attr>::zeroed();
        // SAFETY: as in `device_info`.
        let ports = unsafe {
            check(sys::ibv_query_device(self.as_ptr(), attr.as_mut_ptr()))?;
            attr.assume_init().phys_port_cnt
        };
        let mut room = 0;
        for port in 1..=ports {
            room += usize::try_from(self.port_attr(PortNum(port))?.gid_tbl_len).unwrap_or(0);
        }
        let mut entries = Vec::<sys::ibv_gid_entry>::with_capacity(room.max(1));
        // SAFETY: the pointer has room for `capacity` entries, and as many as the return value says are written.
        unsafe {
            let found = sys::ibv_query_gid_table(self.as_ptr(), entries.as_mut_ptr(), entries.capacity(), 0);
            match usize::try_from(found) {
                Ok(n) => entries.set_len(n.min(entries.capacity())),
                Err(_) => check(i32::try_from(found).unwrap_or(-1))?,
            }
        }
        Ok(entries)
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: opened by us, closed once; every child owned an Arc of this value, so none is left.
        unsafe { sys::ibv_close_device(self.raw.as_ptr()) };
    }
}

fn gid_entry(from: &sys::ibv_gid_entry) -> Option<GidEntry> {
    // SAFETY: both members of the union are 16 plain bytes.
    let gid = Gid(unsafe { from.gid.raw });
    let kind = match from.gid_type {
        0 => GidKind::Ib,
        1 => GidKind::RoceV1,
        2 => GidKind::RoceV2,
        other => GidKind::Other(other),
    };
    let entry = GidEntry { index: GidIndex(from.gid_index), gid, kind, net_device: interface_name(from.ndev_ifindex) };
    (!gid.is_zero()).then_some(entry)
}

/// Name of a network interface; `None` for 0 and for one of another network namespace.
fn interface_name(index: u32) -> Option<String> {
    let mut name = [0; libc::IF_NAMESIZE];
    // SAFETY: writes at most IF_NAMESIZE bytes, end mark included, or returns null.
    unsafe {
        let found = libc::if_indextoname(index, name.as_mut_ptr());
        (index != 0 && !found.is_null()).then(|| text(found))
    }
}

/// ibv_port_state, ibv_query_port(3).
pub(super) fn port_state(value: u32) -> PortState {
    match value {
        1 => PortState::Down,
        2 => PortState::Init,
        3 => PortState::Armed,
        4 => PortState::Active,
        5 => PortState::ActiveDefer,
        other => PortState::Other(other),
    }
}

fn link_layer(value: u8) -> LinkLayer {
    match value {
        // 0 is "unspecified": InfiniBand, from before there was another (ibv_query_port(3)).
        0 | sys::IBV_LINK_LAYER_INFINIBAND => LinkLayer::InfiniBand,
        sys::IBV_LINK_LAYER_ETHERNET => LinkLayer::Ethernet,
        other => LinkLayer::Other(other),
    }
}

/// Lanes × megabits per second and lane, as the kernel counts them for sysfs `rate` (ib_port_attr_to_speed_info).
fn rate_mbps(width: u8, speed: u32, speed_ex: u32) -> Option<u64> {
    let lanes = match width {
        1 => 1,
        2 => 4,
        4 => 8,
        8 => 12,
        16 => 2,
        _ => return None,
    };
    // Speeds from XDR on do not fit the old field; there the new one is set.
    let per_lane = match if speed_ex == 0 { speed } else { speed_ex } {
        1 => 2_500,
        2 => 5_000,
        4 | 8 => 10_000,
        16 => 14_000,
        32 => 25_000,
        64 => 50_000,
        128 => 100_000,
        256 => 200_000,
        _ => return None,
    };
    Some(lanes * per_lane)
}

/// A protection domain: keys of one are worthless on queue pairs of another. One per open NIC.
pub(super) struct Pd {
    raw: NonNull<sys::ibv_pd>,
    context: Arc<Context>,
}

// SAFETY: see the module head; the pointer is only ever passed to libibverbs.
unsafe impl Send for Pd {}
// SAFETY: as above.
unsafe impl Sync for Pd {}

impl Pd {
    pub(super) fn alloc(context: &Arc<Context>) -> io::Result<Self> {
        // SAFETY: the context is open.
        let raw = unsafe { sys::ibv_alloc_pd(context.as_ptr()) };
        let raw = NonNull::new(raw).ok_or_else(errno)?;
        Ok(Self { raw, context: Arc::clone(context) })
    }

    pub(super) fn as_ptr(&self) -> *mut sys::ibv_pd {
        self.raw.as_ptr()
    }

    pub(super) fn context(&self) -> &Arc<Context> {
        &self.context
    }
}

impl Drop for Pd {
    fn drop(&mut self) {
        // SAFETY: allocated by us, freed once; every registration and queue pair owned an Arc of this value.
        unsafe { sys::ibv_dealloc_pd(self.raw.as_ptr()) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_are_those_the_kernel_writes() {
        assert_eq!(rate_mbps(2, 32, 0), Some(100_000)); // 4X EDR
        assert_eq!(rate_mbps(2, 128, 128), Some(400_000)); // 4X NDR
        assert_eq!(rate_mbps(2, 0, 256), Some(800_000)); // 4X XDR
        assert_eq!(rate_mbps(1, 1, 0), Some(2_500)); // Soft-RoCE over an interface of unknown speed
        assert_eq!(rate_mbps(3, 32, 0), None);
        assert_eq!(rate_mbps(2, 77, 0), None);
    }

    #[test]
    fn values_no_list_knows_are_kept() {
        assert_eq!(port_state(99), PortState::Other(99));
        assert_eq!(link_layer(9), LinkLayer::Other(9));
        assert_eq!(link_layer(0), LinkLayer::InfiniBand);
    }

    #[test]
    fn an_empty_slot_of_the_table_is_no_gid() {
        let mut entry = sys::ibv_gid_entry {
            gid: sys::ibv_gid { raw: [0; 16] },
            gid_index: 3,
            port_num: 1,
            gid_type: 7,
            ndev_ifindex: 0,
        };
        assert_eq!(gid_entry(&entry), None);
        entry.gid.raw = [9; 16];
        let found = gid_entry(&entry).unwrap();
        assert_eq!((found.index, found.kind, found.net_device), (GidIndex(3), GidKind::Other(7), None));
    }
}
