//! What the kernel tells of RDMA devices through sysfs: names, place, ports and GIDs, also of devices that libibverbs
//! cannot open (Documentation/ABI/stable/sysfs-class-infiniband in the kernel's sources).
//!
//! Everything is read below a root that is a parameter, so that the tests can build trees of their own.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use super::device::port_state;
use crate::nic::{DeviceInfo, GidEntry, GidKind, LinkLayer, PortInfo, PortState};
use crate::units::{Gid, GidIndex, Lid, PortNum};

/// A sysfs tree.
#[derive(Clone, Debug)]
pub(super) struct Sysfs {
    root: PathBuf,
}

impl Sysfs {
    /// The machine's own, `/sys`.
    pub(super) fn system() -> Self {
        Self { root: PathBuf::from("/sys") }
    }

    fn class(&self) -> PathBuf {
        self.root.join("class/infiniband")
    }

    fn device(&self, name: &str) -> PathBuf {
        self.class().join(name)
    }

    /// Whether the kernel has RDMA support loaded at all.
    pub(super) fn has_class(&self) -> bool {
        self.class().is_dir()
    }

    /// Whether a kernel module is loaded, or built in with something to show.
    pub(super) fn has_module(&self, name: &str) -> bool {
        self.root.join("module").join(name).is_dir()
    }

    /// Whether every network namespace has every device (`rdma system`); `None` where the kernel has no RDMA, or is older than
    /// that mode (5.2).
    pub(super) fn shares_devices(&self) -> Option<bool> {
        let text = read(&self.root.join("module/ib_core/parameters/netns_mode"))?;
        // A parameter of the kind bool reads as Y or N.
        match text.as_str() {
            "Y" | "1" => Some(true),
            "N" | "0" => Some(false),
            _ => None,
        }
    }

    /// The devices, by name.
    pub(super) fn devices(&self) -> Vec<String> {
        let mut names = entries(&self.class());
        names.sort();
        names
    }

    /// Name of the character device through which programs reach `device`: `uverbs0` (in /dev/infiniband).
    pub(super) fn uverbs(&self, device: &str) -> Option<String> {
        let class = self.root.join("class/infiniband_verbs");
        entries(&class).into_iter().find(|uverbs| read(&class.join(uverbs).join("ibdev")).as_deref() == Some(device))
    }

    /// Name, place, firmware and number of ports; limits are not in sysfs and stay 0.
    pub(super) fn device_info(&self, name: &str) -> DeviceInfo {
        let dir = self.device(name);
        DeviceInfo {
            name: name.to_owned(),
            firmware: read(&dir.join("fw_ver")).unwrap_or_default(),
            // -1 where the machine has no such notion, or the device is virtual.
            numa_node: read(&dir.join("device/numa_node")).and_then(|text| text.parse().ok()),
            pci_address: pci_address(&dir),
            ports: u8::try_from(self.ports(name).len()).unwrap_or(u8::MAX),
            ..DeviceInfo::default()
        }
    }

    /// The ports of a device, in order.
    pub(super) fn ports(&self, name: &str) -> Vec<PortNum> {
        let mut ports: Vec<_> =
            entries(&self.device(name).join("ports")).iter().filter_map(|p| p.parse().ok().map(PortNum)).collect();
        ports.sort();
        ports
    }

    /// What sysfs knows of a port; MTUs are not among it.
    pub(super) fn port(&self, name: &str, port: PortNum) -> PortInfo {
        let dir = self.port_dir(name, port);
        // "4: ACTIVE"
        let number = |file: &str| read(&dir.join(file)).and_then(|t| t.split(':').next()?.trim().parse::<u32>().ok());
        let lid = read(&dir.join("lid")).and_then(|t| u16::from_str_radix(t.trim_start_matches("0x"), 16).ok());
        PortInfo {
            port,
            state: number("state").map_or(PortState::Other(0), port_state),
            physical_state: number("phys_state").and_then(|n| u8::try_from(n).ok()).unwrap_or(0),
            link_layer: self.link_layer(name, port),
            max_mtu: None,
            active_mtu: None,
            lid: Lid(lid.unwrap_or(0)),
            gid_table_len: u32::try_from(entries(&dir.join("gids")).len()).unwrap_or(u32::MAX),
            rate_mbps: read(&dir.join("rate")).as_deref().and_then(rate_mbps),
        }
    }

    fn port_dir(&self, name: &str, port: PortNum) -> PathBuf {
        self.device(name).join("ports").join(port.to_string())
    }

    fn link_layer(&self, name: &str, port: PortNum) -> LinkLayer {
        match read(&self.port_dir(name, port).join("link_layer")).as_deref() {
            Some("InfiniBand") => LinkLayer::InfiniBand,
            Some("Ethernet") => LinkLayer::Ethernet,
            _ => LinkLayer::Other(0),
        }
    }

    /// The GIDs of a port, empty slots left out, in order of their index.
    ///
    /// # Errors
    /// The port's `gids` folder cannot be read: no such device or port.
    pub(super) fn gids(&self, name: &str, port: PortNum) -> io::Result<Vec<GidEntry>> {
        let dir = self.port_dir(name, port);
        let mut indices: Vec<u32> = fs::read_dir(dir.join("gids"))?
            .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
            .collect();
        indices.sort_unstable();
        let infiniband = self.link_layer(name, port) == LinkLayer::InfiniBand;
        let entry = |index: u32| {
            let file = index.to_string();
            let gid = read(&dir.join("gids").join(&file))?.parse::<std::net::Ipv6Addr>().ok()?;
            // Reading the attributes of an empty slot fails with EINVAL; one that vanishes meanwhile does as well.
            let kind = match read(&dir.join("gid_attrs/types").join(&file)).as_deref() {
                Some("RoCE v2") => GidKind::RoceV2,
                Some("IB/RoCE v1") if !infiniband => GidKind::RoceV1,
                Some("IB/RoCE v1" | "IB") => GidKind::Ib,
                Some("RoCE v1") => GidKind::RoceV1,
                None if infiniband => GidKind::Ib,
                _ => GidKind::Other(u32::MAX),
            };
            let net_device = read(&dir.join("gid_attrs/ndevs").join(&file)).filter(|name| !name.is_empty());
            let gid = Gid(gid.octets());
            (!gid.is_zero()).then_some(GidEntry { index: GidIndex(index), gid, kind, net_device })
        };
        Ok(indices.into_iter().filter_map(entry).collect())
    }
}

/// The content of a one-line file; `None` if it cannot be read.
fn read(path: &Path) -> Option<String> {
    fs::read_to_string(path).ok().map(|text| text.trim().to_owned())
}

/// Names in a folder; none if it cannot be read. Hidden ones are left out.
fn entries(dir: &Path) -> Vec<String> {
    let Ok(read) = fs::read_dir(dir) else { return Vec::new() };
    read.filter_map(|entry| entry.ok()?.file_name().into_string().ok()).filter(|name| !name.starts_with('.')).collect()
}

/// `device` is a link to the PCI device's folder, whose name is its address; a virtual device has no such link.
fn pci_address(dir: &Path) -> Option<String> {
    let target = fs::canonicalize(dir.join("device")).ok()?;
    let name = target.file_name()?.to_str()?;
    // domain:bus:device.function, as 0000:3b:00.0
    let (bus, function) = name.rsplit_once('.')?;
    let looks_right = bus.split(':').count() == 3
        && bus.split(':').all(|part| part.len() >= 2 && part.bytes().all(|b| b.is_ascii_hexdigit()))
        && function.bytes().all(|b| b.is_ascii_hexdigit());
    looks_right.then(|| name.to_owned())
}

/// "100 Gb/sec (4X EDR)", "2.5 Gb/sec (1X SDR)"
fn rate_mbps(text: &str) -> Option<u64> {
    let number = text.split_once(" Gb/sec")?.0;
    let (whole, tenths) = number.split_once('.').unwrap_or((number, "0"));
    let tenths: u64 = tenths.get(..1)?.parse().ok()?;
    whole.parse::<u64>().ok()?.checked_mul(1_000)?.checked_add(tenths * 100)
}

#[cfg(test)]
pub(super) mod tests;
