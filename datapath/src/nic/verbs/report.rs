//! What there is to tell of a device, and what can be wrong with one, in words that name the next step. The same where verbs are left
//! out of the build.

use std::io;
use std::path::PathBuf;

use crate::nic::{DeviceInfo, GidEntry, PortInfo};
use crate::units::PortNum;

const NOT_BUILT: &str = "this build has no RDMA: build it with the feature `verbs`, which is on by default";

/// One RDMA device.
#[derive(Clone, Debug)]
pub struct DeviceSummary {
    /// Name, place and limits; the limits are 0 when there is a `problem`.
    pub info: DeviceInfo,
    /// Its ports, in order.
    pub ports: Vec<PortSummary>,
    /// Why programs cannot use it, here and now; what else stands here then comes from sysfs.
    pub problem: Option<AccessProblem>,
}

/// One port.
#[derive(Clone, Debug)]
pub struct PortSummary {
    /// State, rate, MTUs; the MTUs are unknown when the device could not be opened.
    pub info: PortInfo,
    /// The GID table without its empty slots.
    pub gids: Vec<GidEntry>,
}

/// libibverbs could not be loaded.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "libibverbs.so.1 cannot be loaded ({detail}): install libibverbs1 and ibverbs-providers (Debian, Ubuntu) or \
     libibverbs (Fedora, RHEL)"
)]
pub struct LibraryMissing {
    /// What the dynamic loader said.
    pub detail: String,
}

/// Why a device that exists cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum AccessProblem {
    /// The kernel has the device, but offers it to no program.
    #[error("the kernel does not offer it to programs: load the module (modprobe ib_uverbs)")]
    NoUverbs,
    /// libibverbs has no driver for the device.
    #[error("libibverbs has no provider for it: install ibverbs-providers (Debian, Ubuntu) or rdma-core's providers")]
    NoProvider,
    /// The character device is missing.
    #[error("{} does not exist: in a container pass it in (--device=/dev/infiniband), else check udev", path.display())]
    NoCharacterDevice {
        /// Where it should be.
        path: PathBuf,
    },
    /// The character device may not be opened.
    #[error("{} may not be opened: give this user read and write permission on it", path.display())]
    PermissionDenied {
        /// The character device.
        path: PathBuf,
    },
    /// Something else; often the memlock limit (ENOMEM) or a device being reset (EIO).
    #[error("{}", io::Error::from_raw_os_error(*errno))]
    Other {
        /// errno of ibv_open_device, or of the first query after it.
        errno: i32,
    },
}

/// Why there is nothing to list.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ListError {
    /// This build has no verbs.
    #[error("{NOT_BUILT}")]
    NotBuilt,
    /// libibverbs is not installed.
    #[error(transparent)]
    LibraryMissing(#[from] LibraryMissing),
    /// Neither the kernel nor libibverbs shows any device.
    #[error("this machine has no RDMA device: {}", next_step(*kernel_support, *uverbs_loaded))]
    NoDevice {
        /// Whether the kernel has RDMA support loaded (/sys/class/infiniband).
        kernel_support: bool,
        /// Whether it offers devices to programs (module ib_uverbs).
        uverbs_loaded: bool,
    },
    /// ibv_get_device_list(3) failed.
    #[error("libibverbs could not list the RDMA devices: {source}")]
    Refused {
        /// What it said.
        source: io::Error,
    },
}

fn next_step(kernel_support: bool, uverbs_loaded: bool) -> &'static str {
    match (kernel_support, uverbs_loaded) {
        (false, _) => {
            "the kernel has no RDMA support loaded (no /sys/class/infiniband): load the NIC's driver (mlx5_ib, …), or \
             rdma_rxe for Soft-RoCE"
        }
        (true, false) => "the kernel supports RDMA, but ib_uverbs is not loaded (modprobe ib_uverbs)",
        (true, true) => {
            "the kernel supports RDMA, but no driver shows a device: load the NIC's driver (mlx5_ib, …), or add a \
             Soft-RoCE device (rdma link add rxe0 type rxe netdev eth0)"
        }
    }
}

/// Why a device could not be opened.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OpenError {
    /// This build has no verbs.
    #[error("{NOT_BUILT}")]
    NotBuilt,
    /// libibverbs is not installed.
    #[error(transparent)]
    LibraryMissing(#[from] LibraryMissing),
    /// No device of that name.
    #[error("No matched device found: {name}; {}", present_text(present))]
    NoSuchDevice {
        /// What was asked for.
        name: String,
        /// What the machine has.
        present: Vec<String>,
    },
    /// ibv_get_device_list(3) failed.
    #[error("libibverbs could not list the RDMA devices: {source}")]
    List {
        /// What it said.
        source: io::Error,
    },
    /// ibv_open_device(3) failed, or libibverbs leaves out a device that the kernel has.
    #[error("device {name} cannot be opened: {problem}")]
    Refused {
        /// The device.
        name: String,
        /// Why, and what to do.
        problem: AccessProblem,
    },
    /// The device has no such port.
    #[error("device {name} has ports 1 to {ports}, not {port}: set MC_IB_PORT to one of them")]
    PortOutOfRange {
        /// The device.
        name: String,
        /// The port asked for.
        port: PortNum,
        /// How many there are.
        ports: u8,
    },
    /// The device opened, and then a call that every device answers failed.
    #[error("device {name} opened, but {call} failed: {source}")]
    Query {
        /// The device.
        name: String,
        /// The verbs call.
        call: &'static str,
        /// What it said.
        source: io::Error,
    },
}

fn present_text(present: &[String]) -> String {
    if present.is_empty() {
        "this machine shows no RDMA device (see `moonrail nics`)".to_owned()
    } else {
        format!("this machine has {}", present.join(", "))
    }
}
