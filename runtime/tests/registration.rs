//! A NIC that refuses memory: the other NIC's part is undone, and the error says all that an operator needs.

mod pair;

use std::io;
use std::os::fd::RawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use moonrail::{Memory, Nic, PortNum, RegisterError};
use moonrail_datapath::nic::sim::{SimOptions, SimWorld};
use moonrail_datapath::nic::{
    Access, AsyncEvent, CompletionQueue, CqHandle, DeviceInfo, GidEntry, PortInfo, Qp, QpCaps, Registration, qp,
};
use pair::{builder, cluster, nics};

/// A NIC that takes no memory while `full`: every other call goes through.
struct Full {
    nic: Arc<dyn Nic>,
    full: AtomicBool,
}

impl Nic for Full {
    fn name(&self) -> &str {
        self.nic.name()
    }
    fn port_num(&self) -> PortNum {
        self.nic.port_num()
    }
    fn device(&self) -> &DeviceInfo {
        self.nic.device()
    }
    fn query_port(&self) -> io::Result<PortInfo> {
        self.nic.query_port()
    }
    fn gids(&self) -> io::Result<Vec<GidEntry>> {
        self.nic.gids()
    }
    fn create_cq(&self, depth: u32) -> io::Result<(Box<dyn CompletionQueue>, CqHandle)> {
        self.nic.create_cq(depth)
    }
    fn create_qp(&self, cq: &CqHandle, caps: QpCaps) -> io::Result<Qp<qp::Reset>> {
        self.nic.create_qp(cq, caps)
    }
    fn register(&self, memory: &Arc<Memory>, offset: u64, len: u64, access: Access) -> io::Result<Registration> {
        // The last chunk only, so that there is something to undo on this NIC too.
        if self.full.load(Ordering::Relaxed) && offset > 0 {
            return Err(io::Error::from_raw_os_error(5));
        }
        self.nic.register(memory, offset, len, access)
    }
    fn async_fd(&self) -> Option<RawFd> {
        self.nic.async_fd()
    }
    fn next_async_event(&self) -> io::Result<Option<AsyncEvent>> {
        self.nic.next_async_event()
    }
}

#[test]
fn what_one_nic_refuses_is_undone_on_all_and_told_in_full() {
    let world = SimWorld::real_time(2, SimOptions::default());
    let (mut open, _) = nics(&world, 1, 2);
    let full = Arc::new(Full { nic: open.remove(1), full: AtomicBool::new(true) });
    open.push(full.clone());
    let log = Arc::default();
    let engine = builder(&log).name("n").metadata(cluster()).nics_from(open).cores(1).max_mr_size(64 << 10);
    let engine = engine.build().unwrap();
    let small = engine.allocate(64 << 10, "*").unwrap();
    let before = world.ledger().registrations;
    let error = engine.allocate(128 << 10, "*").unwrap_err();
    let RegisterError::Refused(refusal) = &error else { panic!("{error}") };
    assert_eq!(
        (refusal.nic.as_str(), refusal.errno, refusal.len, refusal.registered),
        ("sim1", Some(5), 64 << 10, 64 << 10)
    );
    let text = error.to_string();
    for part in [
        format!("Failed to register memory {:#x}: Input/output error [5]", refusal.addr),
        "NIC sim1, which has 65536 bytes registered already".into(),
        "max_mr_size".into(),
        "max locked memory".into(),
        "dmesg -T".into(),
        "MC_MAX_MR_SIZE".into(),
    ] {
        assert!(text.contains(&part), "{part:?} is not in {text:?}");
    }
    assert_eq!(world.ledger().registrations, before, "both NICs hold what they held");
    assert_eq!(engine.regions().len(), 1);
    assert!(engine.nics().iter().all(|nic| nic.registered == small.len()));
    // Later the NIC has room again.
    full.full.store(false, Ordering::Relaxed);
    engine.allocate(128 << 10, "*").unwrap();
    assert_eq!(world.ledger().registrations, before + 4);
}
