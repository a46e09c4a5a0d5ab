//! How far two PCI devices are from each other, by their places in sysfs.
//!
//! A device's folder lies inside that of the bridge it hangs on:
//! `/sys/devices/pci0000:3a/0000:3a:00.0/0000:3b:00.0`. What two paths share is the way they have in common. The words are
//! those of `nvidia-smi topo`, which operators know.

use std::fmt;
use std::path::Path;

/// The nearest place where two devices meet, nearest first.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Distance {
    /// One PCI device (two functions or ports of it).
    Same,
    /// At most one PCI bridge between.
    Pix,
    /// Several PCI bridges, no host bridge.
    Pxb,
    /// One host bridge: the processor's root complex.
    Phb,
    /// Host bridges of one NUMA node.
    Node,
    /// Across NUMA nodes.
    Sys,
}

impl fmt::Display for Distance {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Same => "same",
            Self::Pix => "PIX",
            Self::Pxb => "PXB",
            Self::Phb => "PHB",
            Self::Node => "NODE",
            Self::Sys => "SYS",
        })
    }
}

/// Where a device hangs.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Place {
    /// Host bridge, bridges, the device itself; empty for what is not on PCI.
    pub path: Vec<String>,
    /// NUMA node.
    pub numa_node: Option<u16>,
}

impl Place {
    /// Reads where the RDMA device `name` hangs, below `sysfs`; a virtual device hangs nowhere.
    pub fn of_rdma_device(sysfs: &Path, name: &str, numa_node: Option<u16>) -> Self {
        let device = std::fs::canonicalize(sysfs.join("class/infiniband").join(name).join("device"));
        Self { path: device.map(|path| pci_parts(&path)).unwrap_or_default(), numa_node }
    }

    /// How far it is to `other`; `None` if one of them is not on PCI.
    pub fn distance(&self, other: &Self) -> Option<Distance> {
        if self.path.is_empty() || other.path.is_empty() {
            return None;
        }
        let shared = self.path.iter().zip(&other.path).take_while(|(a, b)| a == b).count();
        let device = |place: &Self| place.path.last().map(|last| last.split('.').next().unwrap_or(last).to_owned());
        Some(match shared {
            _ if device(self) == device(other) => Distance::Same,
            0 if self.numa_node.is_some() && self.numa_node == other.numa_node => Distance::Node,
            0 => Distance::Sys,
            1 => Distance::Phb,
            // The bridges below the one they share, on the longer of the two ways, the devices themselves left out.
            _ if self.path.len().max(other.path.len()) - shared <= 2 => Distance::Pix,
            _ => Distance::Pxb,
        })
    }
}

/// `pci0000:3a` and every `0000:3b:00.0` behind it.
fn pci_parts(path: &Path) -> Vec<String> {
    let parts: Vec<String> = path.iter().map(|part| part.to_string_lossy().into_owned()).collect();
    let Some(first) = parts.iter().position(|part| part.starts_with("pci") && part.contains(':')) else {
        return Vec::new();
    };
    let is_function = |part: &&String| part.matches(':').count() == 2 && part.contains('.');
    std::iter::once(parts[first].clone()).chain(parts[first + 1..].iter().take_while(is_function).cloned()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place(path: &str, node: u16) -> Place {
        Place { path: pci_parts(Path::new(path)), numa_node: Some(node) }
    }

    /// Made after the sysfs of a machine with two sockets, each with two root complexes and a switch below one of them.
    #[test]
    fn devices_meet_where_their_paths_part() {
        let root = "/sys/devices/pci0000:3a/0000:3a:00.0";
        let a = place(&format!("{root}/0000:3b:00.0/0000:3c:04.0/0000:3d:00.0"), 0);
        let port_two = place(&format!("{root}/0000:3b:00.0/0000:3c:04.0/0000:3d:00.1"), 0);
        let same_switch = place(&format!("{root}/0000:3b:00.0/0000:3c:08.0/0000:3e:00.0"), 0);
        let behind_another =
            place(&format!("{root}/0000:3b:00.0/0000:3c:0c.0/0000:40:00.0/0000:41:00.0/0000:42:00.0"), 0);
        let same_host_bridge = place("/sys/devices/pci0000:3a/0000:3a:02.0/0000:50:00.0", 0);
        let same_node = place("/sys/devices/pci0000:5d/0000:5d:00.0/0000:5e:00.0", 0);
        let other_node = place("/sys/devices/pci0000:ae/0000:ae:00.0/0000:af:00.0", 1);
        let soft = place("/sys/devices/virtual/net/eth0", 0);
        for (to, distance) in [
            (&port_two, Some(Distance::Same)),
            (&same_switch, Some(Distance::Pix)),
            (&behind_another, Some(Distance::Pxb)),
            (&same_host_bridge, Some(Distance::Phb)),
            (&same_node, Some(Distance::Node)),
            (&other_node, Some(Distance::Sys)),
            (&soft, None),
        ] {
            assert_eq!(a.distance(to), distance, "{to:?}");
            assert_eq!(to.distance(&a), distance, "{to:?}");
        }
        // A virtio NIC is one level deeper than its PCI function: the levels that are no function do not count.
        assert_eq!(place("/sys/devices/pci0000:00/0000:00:04.0/virtio1", 0).path, ["pci0000:00", "0000:00:04.0"]);
    }
}
