//! Trees as they stand on real machines: a RoCE NIC on PCI, an InfiniBand NIC with two ports, Soft-RoCE.

use std::os::unix::fs::symlink;
use std::sync::atomic::{AtomicU32, Ordering};

use super::*;

/// A sysfs tree in a folder of its own, removed at the end.
pub(crate) struct FakeSysfs {
    root: PathBuf,
}

impl FakeSysfs {
    pub(crate) fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let root = std::env::temp_dir().join(format!("moonrail-sysfs-{}-{number}", std::process::id()));
        fs::create_dir_all(&root).unwrap();
        Self { root }
    }

    pub(crate) fn sysfs(&self) -> Sysfs {
        Sysfs { root: self.root.clone() }
    }

    pub(crate) fn file(&self, path: &str, content: &str) -> &Self {
        let path = self.root.join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, format!("{content}\n")).unwrap();
        self
    }

    /// The attributes a port has whatever its kind.
    pub(crate) fn port(&self, device: &str, port: u8, attributes: [&str; 5]) -> &Self {
        for (name, value) in ["state", "phys_state", "rate", "lid", "link_layer"].into_iter().zip(attributes) {
            self.file(&format!("class/infiniband/{device}/ports/{port}/{name}"), value);
        }
        self
    }

    /// `attrs`: type and net device; `None` leaves them out, as for an empty slot.
    pub(crate) fn gid(&self, device: &str, index: u32, gid: &str, attrs: Option<(&str, &str)>) -> &Self {
        let port = format!("class/infiniband/{device}/ports/1");
        self.file(&format!("{port}/gids/{index}"), gid);
        if let Some((kind, net_device)) = attrs {
            self.file(&format!("{port}/gid_attrs/types/{index}"), kind);
            self.file(&format!("{port}/gid_attrs/ndevs/{index}"), net_device);
        }
        self
    }
}

impl Drop for FakeSysfs {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.root);
    }
}

const LINK_LOCAL: &str = "fe80:0000:0000:0000:5054:00ff:fe00:0001";
const MAPPED: &str = "0000:0000:0000:0000:0000:ffff:0a00:0001";
const EMPTY: &str = "0000:0000:0000:0000:0000:0000:0000:0000";
const PORT: PortNum = PortNum(1);

#[test]
fn a_roce_nic_on_pci() {
    let tree = FakeSysfs::new();
    tree.file("devices/pci0000:3a/0000:3b:00.0/numa_node", "1")
        .file("class/infiniband/mlx5_0/fw_ver", "28.39.1002")
        .port("mlx5_0", 1, ["4: ACTIVE", "5: LinkUp", "100 Gb/sec (4X EDR)", "0x0", "Ethernet"])
        .gid("mlx5_0", 0, LINK_LOCAL, Some(("IB/RoCE v1", "ens1")))
        .gid("mlx5_0", 2, EMPTY, None)
        .gid("mlx5_0", 10, MAPPED, Some(("RoCE v2", "ens1")))
        .gid("mlx5_0", 3, MAPPED, Some(("RoCE v3", "ens1")))
        .file("class/infiniband_verbs/uverbs7/ibdev", "mlx5_0");
    symlink("../../../devices/pci0000:3a/0000:3b:00.0", tree.root.join("class/infiniband/mlx5_0/device")).unwrap();
    let sysfs = tree.sysfs();

    assert_eq!(sysfs.devices(), ["mlx5_0"]);
    assert_eq!(sysfs.uverbs("mlx5_0").as_deref(), Some("uverbs7"));
    assert_eq!(sysfs.uverbs("mlx5_1"), None);
    let info = sysfs.device_info("mlx5_0");
    assert_eq!((info.firmware.as_str(), info.numa_node, info.ports), ("28.39.1002", Some(1), 1));
    assert_eq!(info.pci_address.as_deref(), Some("0000:3b:00.0"));

    let port = sysfs.port("mlx5_0", PORT);
    assert_eq!((port.state, port.physical_state), (PortState::Active, 5));
    assert_eq!((port.link_layer, port.rate_mbps, port.gid_table_len), (LinkLayer::Ethernet, Some(100_000), 4));

    let gids = sysfs.gids("mlx5_0", PORT).unwrap();
    let seen: Vec<_> = gids.iter().map(|g| (g.index.0, g.kind, g.net_device.as_deref())).collect();
    let (v1, v2, new) = (GidKind::RoceV1, GidKind::RoceV2, GidKind::Other(u32::MAX));
    assert_eq!(seen, [(0, v1, Some("ens1")), (3, new, Some("ens1")), (10, v2, Some("ens1"))], "in order, none empty");
    assert!(gids[0].gid.is_link_local());
    assert_eq!(gids[2].gid.to_ipv4(), Some([10, 0, 0, 1].into()));
}

#[test]
fn an_infiniband_nic_with_a_port_down() {
    let tree = FakeSysfs::new();
    tree.port("ib0", 1, ["4: ACTIVE", "5: LinkUp", "56 Gb/sec (4X FDR)", "0x1f", "InfiniBand"])
        .port("ib0", 2, ["1: DOWN", "2: Polling", "10 Gb/sec (4X SDR)", "0xffff", "InfiniBand"])
        .gid("ib0", 0, LINK_LOCAL, Some(("IB/RoCE v1", "")));
    let sysfs = tree.sysfs();
    assert_eq!(sysfs.ports("ib0"), [PortNum(1), PortNum(2)]);
    assert_eq!(sysfs.port("ib0", PORT).lid, Lid(0x1f));
    let down = sysfs.port("ib0", PortNum(2));
    assert_eq!((down.state, down.physical_state, down.lid), (PortState::Down, 2, Lid(0xffff)));
    let gids = sysfs.gids("ib0", PORT).unwrap();
    assert_eq!((gids[0].kind, gids[0].net_device.as_deref()), (GidKind::Ib, None));
}

#[test]
fn soft_roce_has_no_place() {
    let tree = FakeSysfs::new();
    tree.port("rxe0", 1, ["4: ACTIVE", "5: LinkUp", "2.5 Gb/sec (1X SDR)", "0x0", "Ethernet"]);
    let info = tree.sysfs().device_info("rxe0");
    assert_eq!((info.numa_node, info.pci_address, info.firmware.as_str()), (None, None, ""));
    assert_eq!(tree.sysfs().port("rxe0", PORT).rate_mbps, Some(2_500));
}

#[test]
fn nonsense_and_nothing_are_answers_too() {
    let tree = FakeSysfs::new();
    assert!(!tree.sysfs().has_class());
    assert!(tree.sysfs().devices().is_empty());
    assert!(tree.sysfs().gids("none", PORT).is_err());
    tree.port("x", 1, ["", "banana", "fast", "0xfffff", "Token Ring"])
        .gid("x", 0, "not a gid", None)
        .file("class/infiniband/x/ports/1/gids/seven", LINK_LOCAL)
        .file("class/infiniband/x/ports/300/state", "4: ACTIVE")
        .file("class/infiniband/x/device/numa_node", "-1");
    let port = tree.sysfs().port("x", PORT);
    assert_eq!((port.state, port.link_layer), (PortState::Other(0), LinkLayer::Other(0)));
    assert_eq!((port.rate_mbps, port.lid), (None, Lid(0)));
    assert_eq!(tree.sysfs().gids("x", PORT).unwrap(), []);
    assert_eq!(tree.sysfs().ports("x"), [PORT]);
    assert_eq!(tree.sysfs().device_info("x").numa_node, None);
}

#[test]
fn rates_read_as_the_kernel_writes_them() {
    for (text, expected) in [
        ("400 Gb/sec (4X NDR)", Some(400_000)),
        ("2.5 Gb/sec (1X SDR)", Some(2_500)),
        ("12 Tb/sec", None),
        ("18446744073709551615 Gb/sec", None),
        (". Gb/sec", None),
    ] {
        assert_eq!(rate_mbps(text), expected, "{text}");
    }
}
