//! Every RDMA device of the machine with all that can be learned of it, for `moonrail nics`.

use std::io;
use std::path::{Path, PathBuf};

use super::device::{Context, Device, DeviceList};
use super::library;
use super::report::{AccessProblem, DeviceSummary, ListError, PortSummary};
use super::sysfs::Sysfs;
use crate::units::PortNum;

impl AccessProblem {
    /// Why ibv_open_device(3) failed with `error`.
    pub(super) fn from_open(sysfs: &Sysfs, device: &str, error: &io::Error) -> Self {
        // libibverbs tries two ways to open the character device and keeps the errno of either: ask the file itself.
        match character_device(sysfs, device) {
            Err(problem) => problem,
            Ok(path) if error.kind() == io::ErrorKind::PermissionDenied => Self::PermissionDenied { path },
            Ok(_) => Self::Other { errno: error.raw_os_error().unwrap_or(libc::EIO) },
        }
    }

    /// Why libibverbs does not list a device that the kernel has. It leaves out without a word what has no character
    /// device, as in a container (seen with version 44), as well as what it has no provider for.
    pub(super) fn from_absence(sysfs: &Sysfs, device: &str) -> Self {
        character_device(sysfs, device).err().unwrap_or(Self::NoProvider)
    }
}

/// Opens the character device of `device` for a moment.
fn character_device(sysfs: &Sysfs, device: &str) -> Result<PathBuf, AccessProblem> {
    let Some(uverbs) = sysfs.uverbs(device) else { return Err(AccessProblem::NoUverbs) };
    let path = Path::new("/dev/infiniband").join(uverbs);
    match std::fs::OpenOptions::new().read(true).write(true).open(&path) {
        Ok(_) => Ok(path),
        Err(error) => Err(match error.kind() {
            io::ErrorKind::NotFound => AccessProblem::NoCharacterDevice { path },
            io::ErrorKind::PermissionDenied => AccessProblem::PermissionDenied { path },
            _ => AccessProblem::Other { errno: error.raw_os_error().unwrap_or(libc::EIO) },
        }),
    }
}

/// Whether every network namespace of this machine has every RDMA device, or each device is in one (`rdma system set netns
/// exclusive`); `None` where the kernel has no RDMA, or knows no such mode.
pub fn namespaces_share_devices() -> Option<bool> {
    Sysfs::system().shares_devices()
}

/// Lists every RDMA device, those that cannot be opened included, with the reason. Opens each for a moment.
///
/// # Errors
/// Only when there is nothing to list.
pub fn list() -> Result<Vec<DeviceSummary>, ListError> {
    let sysfs = Sysfs::system();
    library::require()?;
    let devices = DeviceList::get().map_err(|source| ListError::Refused { source })?;
    let mut found: Vec<_> = devices.iter().map(|device| through_verbs(&device, &sysfs)).collect();
    for name in sysfs.devices() {
        if !found.iter().any(|d| d.info.name == name) {
            found.push(through_sysfs(&name, &sysfs, AccessProblem::from_absence(&sysfs, &name)));
        }
    }
    if found.is_empty() {
        return Err(no_device(&sysfs));
    }
    found.sort_by(|a, b| a.info.name.cmp(&b.info.name));
    Ok(found)
}

fn no_device(sysfs: &Sysfs) -> ListError {
    ListError::NoDevice { kernel_support: sysfs.has_class(), uverbs_loaded: sysfs.has_module("ib_uverbs") }
}

fn through_verbs(device: &Device<'_>, sysfs: &Sysfs) -> DeviceSummary {
    let name = device.name();
    let context = match Context::open(device) {
        Ok(context) => context,
        Err(error) => return through_sysfs(&name, sysfs, AccessProblem::from_open(sysfs, &name, &error)),
    };
    opened(&context, sysfs).unwrap_or_else(|error| {
        through_sysfs(&name, sysfs, AccessProblem::Other { errno: error.raw_os_error().unwrap_or(libc::EIO) })
    })
}

fn opened(context: &Context, sysfs: &Sysfs) -> io::Result<DeviceSummary> {
    let info = context.device_info(sysfs)?;
    let port = |number| {
        let port = PortNum(number);
        Ok(PortSummary { info: context.query_port(port)?, gids: context.gids(port, sysfs)? })
    };
    let ports = (1..=info.ports).map(port).collect::<io::Result<_>>()?;
    Ok(DeviceSummary { info, ports, problem: None })
}

fn through_sysfs(name: &str, sysfs: &Sysfs, problem: AccessProblem) -> DeviceSummary {
    let port = |port| PortSummary { info: sysfs.port(name, port), gids: sysfs.gids(name, port).unwrap_or_default() };
    DeviceSummary {
        info: sysfs.device_info(name),
        ports: sysfs.ports(name).into_iter().map(port).collect(),
        problem: Some(problem),
    }
}

#[cfg(test)]
mod tests {
    use super::super::sysfs::tests::FakeSysfs;
    use super::*;

    #[test]
    fn a_device_that_cannot_be_opened_is_shown_with_what_sysfs_knows() {
        let tree = FakeSysfs::new();
        tree.port("mlx5_0", 1, ["4: ACTIVE", "5: LinkUp", "25 Gb/sec (1X EDR)", "0x0", "Ethernet"]).gid(
            "mlx5_0",
            0,
            "fe80:0000:0000:0000:0000:0000:0000:0001",
            Some(("RoCE v2", "ens1")),
        );
        let summary = through_sysfs("mlx5_0", &tree.sysfs(), AccessProblem::NoUverbs);
        assert_eq!(summary.info.max_qp, 0);
        assert_eq!((summary.ports.len(), summary.ports[0].gids.len()), (1, 1));
        assert_eq!(summary.ports[0].info.rate_mbps, Some(25_000));
        assert!(summary.problem.unwrap().to_string().contains("modprobe ib_uverbs"));
    }

    #[test]
    fn each_reason_names_its_next_step() {
        let tree = FakeSysfs::new();
        let denied = io::Error::from_raw_os_error(libc::EACCES);
        assert_eq!(AccessProblem::from_open(&tree.sysfs(), "rxe0", &denied), AccessProblem::NoUverbs);
        tree.file("class/infiniband_verbs/uverbs987/ibdev", "rxe0");
        let problem = AccessProblem::from_open(&tree.sysfs(), "rxe0", &denied);
        assert_eq!(problem, AccessProblem::NoCharacterDevice { path: "/dev/infiniband/uverbs987".into() });
        assert!(problem.to_string().contains("--device=/dev/infiniband"), "{problem}");
        // (past) libibverbs does not even list it then, and it was told as "no provider".
        assert_eq!(AccessProblem::from_absence(&tree.sysfs(), "rxe0"), problem);
    }

    #[test]
    fn a_machine_without_rdma_is_told_what_is_missing() {
        let tree = FakeSysfs::new();
        assert!(no_device(&tree.sysfs()).to_string().contains("no /sys/class/infiniband"));
        tree.file("class/infiniband/.keep", "");
        assert!(no_device(&tree.sysfs()).to_string().contains("modprobe ib_uverbs"));
        tree.file("module/ib_uverbs/refcnt", "0");
        assert!(no_device(&tree.sysfs()).to_string().contains("rdma link add"));
    }

    #[test]
    fn the_mode_of_network_namespaces_is_read() {
        let tree = FakeSysfs::new();
        assert_eq!(tree.sysfs().shares_devices(), None);
        for (text, shared) in [("Y", Some(true)), ("N", Some(false)), ("?", None)] {
            tree.file("module/ib_core/parameters/netns_mode", text);
            assert_eq!(tree.sysfs().shares_devices(), shared);
        }
    }

    #[test]
    fn listing_never_panics_whatever_the_machine() {
        match list() {
            Ok(devices) => assert!(!devices.is_empty()),
            Err(error) => assert!(!error.to_string().is_empty()),
        }
    }
}
