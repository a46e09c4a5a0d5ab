//! A NIC that moves nothing and completes every request at its core's next poll: what is left is the engine's own cost.

use std::collections::VecDeque;
use std::io;
use std::os::fd::RawFd;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use moonrail_datapath::nic::{
    Access, AdminQp, AsyncEvent, Completion, CompletionQueue, CqHandle, DeviceInfo, GidEntry, GidKind, InitAttr,
    LinkLayer, Nic, PortInfo, PortState, PostQp, Posted, Qp, QpCaps, RawQp, Registration, RtrAttr, RtsAttr, WcStatus,
    WorkRequest, qp,
};
use moonrail_datapath::region::Memory;
use moonrail_datapath::units::{Gid, GidIndex, Lid, Lkey, Mtu, PortNum, Qpn, Rkey};

/// The NIC.
pub(crate) struct NullNic {
    device: DeviceInfo,
    gid: Gid,
    next: AtomicU32,
}

impl NullNic {
    pub(crate) fn new(name: &str, gid: Gid) -> Arc<Self> {
        let device = DeviceInfo {
            name: name.to_owned(),
            firmware: "null".into(),
            ports: 1,
            max_mr_size: 1 << 40,
            max_mr: 1 << 20,
            max_qp: 1 << 20,
            max_qp_wr: 1 << 14,
            max_sge: 16,
            max_cqe: 1 << 16,
            max_qp_init_rd_atom: 16,
            max_qp_rd_atom: 16,
            ..DeviceInfo::default()
        };
        Arc::new(Self { device, gid, next: AtomicU32::new(1) })
    }
}

/// What waits for the next poll. Only one core touches it, so the lock is never contended.
#[derive(Clone)]
struct Queue(Arc<Mutex<VecDeque<Completion>>>);

impl Queue {
    fn lock(&self) -> MutexGuard<'_, VecDeque<Completion>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

struct NullCq {
    queue: Queue,
    depth: u32,
}

struct NullQp {
    queue: Queue,
    qpn: Qpn,
    caps: QpCaps,
}

struct NullAdmin(Qpn);

impl Nic for NullNic {
    fn name(&self) -> &str {
        &self.device.name
    }

    fn port_num(&self) -> PortNum {
        PortNum(1)
    }

    fn device(&self) -> &DeviceInfo {
        &self.device
    }

    fn query_port(&self) -> io::Result<PortInfo> {
        Ok(PortInfo {
            port: PortNum(1),
            state: PortState::Active,
            physical_state: 5,
            link_layer: LinkLayer::Ethernet,
            max_mtu: Some(Mtu::B4096),
            active_mtu: Some(Mtu::B4096),
            lid: Lid(0),
            gid_table_len: 1,
            rate_mbps: None,
        })
    }

    fn gids(&self) -> io::Result<Vec<GidEntry>> {
        Ok(vec![GidEntry { index: GidIndex(0), gid: self.gid, kind: GidKind::RoceV2, net_device: Some("null".into()) }])
    }

    fn create_cq(&self, depth: u32) -> io::Result<(Box<dyn CompletionQueue>, CqHandle)> {
        let queue = Queue(Arc::new(Mutex::new(VecDeque::with_capacity(depth as usize))));
        Ok((Box::new(NullCq { queue: queue.clone(), depth }), CqHandle(Arc::new(queue))))
    }

    fn create_qp(&self, cq: &CqHandle, caps: QpCaps) -> io::Result<Qp<qp::Reset>> {
        let foreign = || io::Error::from_raw_os_error(22);
        let queue = cq.0.downcast_ref::<Queue>().ok_or_else(foreign)?.clone();
        let qpn = Qpn::new(self.next.fetch_add(1, Ordering::Relaxed)).ok_or_else(foreign)?;
        Ok(Qp::new(Box::new(NullQp { queue, qpn, caps })))
    }

    fn register(&self, _: &Arc<Memory>, _: u64, _: u64, _: Access) -> io::Result<Registration> {
        let key = self.next.fetch_add(1, Ordering::Relaxed);
        Ok(Registration { lkey: Lkey(key), rkey: Rkey(key), guard: Box::new(()) })
    }

    fn async_fd(&self) -> Option<RawFd> {
        None
    }

    fn next_async_event(&self) -> io::Result<Option<AsyncEvent>> {
        Ok(None)
    }
}

impl CompletionQueue for NullCq {
    fn depth(&self) -> u32 {
        self.depth
    }

    fn poll(&mut self, out: &mut [Completion]) -> io::Result<usize> {
        let mut queue = self.queue.lock();
        let count = out.len().min(queue.len());
        for (place, completion) in out.iter_mut().zip(queue.drain(..count)) {
            *place = completion;
        }
        Ok(count)
    }
}

impl PostQp for NullQp {
    fn qpn(&self) -> Qpn {
        self.qpn
    }

    fn depth(&self) -> u32 {
        self.caps.max_send_wr
    }

    fn max_inline(&self) -> u32 {
        self.caps.max_inline
    }

    fn post(&mut self, chain: &[WorkRequest]) -> Posted {
        let done = |request: &WorkRequest| Completion {
            wr_id: request.wr_id,
            status: WcStatus::SUCCESS,
            vendor_err: 0,
            qpn: self.qpn,
        };
        self.queue.lock().extend(chain.iter().filter(|request| request.signaled).map(done));
        Posted { accepted: chain.len(), error: None }
    }
}

impl RawQp for NullQp {
    fn qpn(&self) -> Qpn {
        self.qpn
    }

    fn to_init(&mut self, _: &InitAttr) -> io::Result<()> {
        Ok(())
    }

    fn to_rtr(&mut self, _: &RtrAttr) -> io::Result<()> {
        Ok(())
    }

    fn to_rts(&mut self, _: &RtsAttr) -> io::Result<()> {
        Ok(())
    }

    fn split(self: Box<Self>) -> (Box<dyn PostQp>, Box<dyn AdminQp>) {
        let admin = NullAdmin(self.qpn);
        (self, Box::new(admin))
    }
}

impl AdminQp for NullAdmin {
    fn qpn(&self) -> Qpn {
        self.0
    }

    fn to_error(&mut self) -> io::Result<()> {
        Ok(())
    }
}
