//! A real NIC with one of the engine's rules taken from it, to show what the rule is for: [`VerbsNic`] underneath, and
//! between it and the engine what was altered. The engine itself has no switch for any of this.

use std::io;
use std::os::fd::RawFd;
use std::sync::Arc;

use moonrail_datapath::nic::qp::{Init, Qp, Reset, Rtr, Rts};
use moonrail_datapath::nic::verbs::VerbsNic;
use moonrail_datapath::nic::{
    Access, AdminHalf, AdminQp, AsyncEvent, CompletionQueue, CqHandle, DeviceInfo, GidEntry, InitAttr, Nic, PortInfo,
    PostHalf, PostQp, Posted, QpCaps, RawQp, Registration, RtrAttr, RtsAttr, WorkRequest,
};
use moonrail_datapath::region::Memory;
use moonrail_datapath::units::{PortNum, Qpn};

/// What is not as the engine has it.
#[derive(Clone, Copy, Default)]
pub(crate) struct Altered {
    /// Transport retries, in place of the engine's 6. Soft-RoCE takes 7 as *for ever*.
    pub(crate) retry_cnt: Option<u8>,
    /// Says of every drained queue pair that nothing of it can land at the peer any more, so that nothing is fenced.
    pub(crate) unfenced: bool,
}

impl Altered {
    /// Opens a device.
    pub(crate) fn open(self, device: &str) -> Arc<dyn Nic> {
        let nic = VerbsNic::open(device, PortNum(1)).unwrap_or_else(|e| panic!("{e}"));
        Arc::new(AlteredNic { nic, altered: self })
    }
}

struct AlteredNic {
    nic: Arc<VerbsNic>,
    altered: Altered,
}

impl Nic for AlteredNic {
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
    fn create_qp(&self, cq: &CqHandle, caps: QpCaps) -> io::Result<Qp<Reset>> {
        let qp = self.nic.create_qp(cq, caps)?;
        Ok(Qp::new(Box::new(AlteredQp { qpn: qp.qpn(), state: Some(State::Reset(qp)), altered: self.altered })))
    }
    fn register(&self, memory: &Arc<Memory>, offset: u64, len: u64, access: Access) -> io::Result<Registration> {
        self.nic.register(memory, offset, len, access)
    }
    fn async_fd(&self) -> Option<RawFd> {
        self.nic.async_fd()
    }
    fn next_async_event(&self) -> io::Result<Option<AsyncEvent>> {
        self.nic.next_async_event()
    }
}

enum State {
    Reset(Qp<Reset>),
    Init(Qp<Init>),
    Rtr(Qp<Rtr>),
    Rts(Qp<Rts>),
}

struct AlteredQp {
    qpn: Qpn,
    /// `None` once a step has failed: that destroyed it.
    state: Option<State>,
    altered: Altered,
}

fn wrong_state() -> io::Error {
    io::Error::from(io::ErrorKind::InvalidInput)
}

impl RawQp for AlteredQp {
    fn qpn(&self) -> Qpn {
        self.qpn
    }
    fn to_init(&mut self, attr: &InitAttr) -> io::Result<()> {
        let Some(State::Reset(qp)) = self.state.take() else { return Err(wrong_state()) };
        self.state = Some(State::Init(qp.init(attr).map_err(|e| e.source)?));
        Ok(())
    }
    fn to_rtr(&mut self, attr: &RtrAttr) -> io::Result<()> {
        let Some(State::Init(qp)) = self.state.take() else { return Err(wrong_state()) };
        self.state = Some(State::Rtr(qp.rtr(attr).map_err(|e| e.source)?));
        Ok(())
    }
    fn to_rts(&mut self, attr: &RtsAttr) -> io::Result<()> {
        let Some(State::Rtr(qp)) = self.state.take() else { return Err(wrong_state()) };
        let attr = RtsAttr { retry_cnt: self.altered.retry_cnt.unwrap_or(attr.retry_cnt), ..*attr };
        self.state = Some(State::Rts(qp.rts(&attr).map_err(|e| e.source)?));
        Ok(())
    }
    fn split(self: Box<Self>) -> (Box<dyn PostQp>, Box<dyn AdminQp>) {
        let Some(State::Rts(qp)) = self.state else { panic!("split in RTS only") };
        let (connected, admin) = qp.split();
        let post = AlteredPost { post: connected.into_post_half(), altered: self.altered };
        (Box::new(post), Box::new(AlteredAdmin(admin)))
    }
}

struct AlteredPost {
    post: PostHalf,
    altered: Altered,
}

impl PostQp for AlteredPost {
    fn qpn(&self) -> Qpn {
        self.post.qpn()
    }
    fn depth(&self) -> u32 {
        self.post.depth()
    }
    fn max_inline(&self) -> u32 {
        self.post.max_inline()
    }
    fn post(&mut self, chain: &[WorkRequest]) -> Posted {
        self.post.post(chain)
    }
    fn drains_clean(&self) -> bool {
        self.altered.unfenced || self.post.drains_clean()
    }
}

struct AlteredAdmin(AdminHalf);

impl AdminQp for AlteredAdmin {
    fn qpn(&self) -> Qpn {
        self.0.qpn()
    }
    fn to_error(&mut self) -> io::Result<()> {
        self.0.to_error()
    }
}
