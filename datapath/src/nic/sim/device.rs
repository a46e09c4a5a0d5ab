//! The trait's two halves over the simulated world.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::Arc;

use super::SimWorld;
use super::world::keys;
use crate::nic::{
    Access, AdminQp, AsyncEvent, Completion, CompletionQueue, CqHandle, DeviceInfo, GidEntry, InitAttr, LinkLayer, Nic,
    PortInfo, PortState, PostQp, Posted, Qp, QpCaps, RawQp, Registration, RtrAttr, RtsAttr, WorkRequest, qp,
};
use crate::region::Memory;
use crate::units::{Lid, PortNum, Qpn};

pub(super) struct SimNic {
    world: SimWorld,
    index: usize,
    device: DeviceInfo,
    /// Where the world shows this device's events.
    events: Option<Arc<OwnedFd>>,
}

impl SimNic {
    pub(super) fn new(world: SimWorld, index: usize, name: &str, events: Option<Arc<OwnedFd>>) -> Self {
        let device = DeviceInfo {
            name: name.to_owned(),
            firmware: "sim".into(),
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
        Self { world, index, device, events }
    }
}

struct Cq {
    world: SimWorld,
    index: usize,
}

struct Token {
    world: SimWorld,
    index: usize,
    qpn: Qpn,
    depth: u32,
    max_inline: u32,
}

impl Drop for Token {
    fn drop(&mut self) {
        self.world.lock().destroy(self.index);
    }
}

struct Raw(Arc<Token>);
struct Post(Arc<Token>);
struct Admin(Arc<Token>);

struct Mr {
    world: SimWorld,
    key: u32,
}

impl Drop for Mr {
    fn drop(&mut self) {
        self.world.lock().deregister(self.key);
    }
}

impl Nic for SimNic {
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
        let (up, mtu) = self.world.now().port(self.index)?;
        Ok(PortInfo {
            port: PortNum(1),
            state: if up { PortState::Active } else { PortState::Down },
            physical_state: if up { 5 } else { 3 },
            link_layer: LinkLayer::Ethernet,
            max_mtu: Some(mtu),
            active_mtu: Some(mtu),
            lid: Lid(0),
            gid_table_len: 16,
            rate_mbps: Some(100_000),
        })
    }

    fn gids(&self) -> io::Result<Vec<GidEntry>> {
        self.world.now().gids(self.index)
    }

    fn create_cq(&self, depth: u32) -> io::Result<(Box<dyn CompletionQueue>, CqHandle)> {
        let index = self.world.now().create_cq(self.index, depth)?;
        Ok((Box::new(Cq { world: self.world.clone(), index }), CqHandle(Arc::new(index))))
    }

    fn create_qp(&self, cq: &CqHandle, caps: QpCaps) -> io::Result<Qp<qp::Reset>> {
        let cq = *cq.0.downcast_ref::<usize>().ok_or_else(|| io::Error::from_raw_os_error(libc::EINVAL))?;
        let (index, qpn) = self.world.now().create_qp(self.index, cq, caps.max_send_wr)?;
        let (depth, max_inline) = (caps.max_send_wr, caps.max_inline);
        let token = Token { world: self.world.clone(), index, qpn, depth, max_inline };
        Ok(Qp::new(Box::new(Raw(Arc::new(token)))))
    }

    fn register(&self, memory: &Arc<Memory>, offset: u64, len: u64, access: Access) -> io::Result<Registration> {
        let key = self.world.now().register(self.index, memory, offset, len, access.remote)?;
        let (lkey, rkey) = keys(key);
        Ok(Registration { lkey, rkey, guard: Box::new(Mr { world: self.world.clone(), key }) })
    }

    fn async_fd(&self) -> Option<RawFd> {
        self.events.as_ref().map(AsRawFd::as_raw_fd)
    }

    fn next_async_event(&self) -> io::Result<Option<AsyncEvent>> {
        Ok(self.world.now().next_async(self.index))
    }
}

impl CompletionQueue for Cq {
    fn depth(&self) -> u32 {
        self.world.lock().cq_depth(self.index)
    }

    fn poll(&mut self, out: &mut [Completion]) -> io::Result<usize> {
        self.world.now().poll(self.index, out)
    }
}

impl RawQp for Raw {
    fn qpn(&self) -> Qpn {
        self.0.qpn
    }

    fn to_init(&mut self, _: &InitAttr) -> io::Result<()> {
        self.0.world.now().enter_init(self.0.index)
    }

    fn to_rtr(&mut self, attr: &RtrAttr) -> io::Result<()> {
        self.0.world.now().enter_rtr(self.0.index, attr)
    }

    fn to_rts(&mut self, attr: &RtsAttr) -> io::Result<()> {
        self.0.world.now().enter_rts(self.0.index, attr)
    }

    fn split(self: Box<Self>) -> (Box<dyn PostQp>, Box<dyn AdminQp>) {
        (Box::new(Post(self.0.clone())), Box::new(Admin(self.0)))
    }
}

impl PostQp for Post {
    fn qpn(&self) -> Qpn {
        self.0.qpn
    }

    fn depth(&self) -> u32 {
        self.0.depth
    }

    fn max_inline(&self) -> u32 {
        self.0.max_inline
    }

    fn post(&mut self, chain: &[WorkRequest]) -> Posted {
        self.0.world.now().post(self.0.index, chain)
    }

    fn reads_are_proven(&self) -> bool {
        !self.0.world.lock().cuts_reads()
    }

    fn is_in_error(&self) -> bool {
        self.0.world.lock().is_in_error(self.0.index)
    }
}

impl AdminQp for Admin {
    fn qpn(&self) -> Qpn {
        self.0.qpn
    }

    fn to_error(&mut self) -> io::Result<()> {
        self.0.world.now().enter_error(self.0.index);
        Ok(())
    }
}
