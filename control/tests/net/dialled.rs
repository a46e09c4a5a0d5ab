//! A NIC that is dialled, for brains: it carries nothing, and says what the test wants to hear.

use std::io;
use std::os::fd::RawFd;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use crossbeam_queue::ArrayQueue;
use moonrail_datapath::nic::{
    Access, AdminHalf, AdminQp, AsyncEvent, Completion, CompletionQueue, ConnectedQp, CqHandle, DeviceInfo, DialError,
    Fabric, GidEntry, LinkLayer, Nic, Offer, PortInfo, PortState, PostQp, Posted, Qp, QpCaps, Registration, Target,
    WcStatus, WorkRequest, dial, qp,
};
use moonrail_datapath::region::Memory;
use moonrail_datapath::units::{Lid, Lkey, Mtu, PortNum, Qpn, Rkey};

/// What becomes of a dial.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Verdict {
    Connects,
    /// Now, and perhaps not later.
    Fails,
    /// For good.
    Forbidden,
}

/// See the module.
pub(crate) struct DialledNic {
    fabric: Fabric,
    offer: Option<Offer>,
    device: DeviceInfo,
    pub(crate) verdict: Mutex<Verdict>,
    /// What is posted fails.
    pub(crate) broken: Arc<AtomicBool>,
    pub(crate) dials: AtomicUsize,
    pub(crate) last: Mutex<Option<Target>>,
}

impl DialledNic {
    pub(crate) fn new(fabric: Fabric, offer: Option<Offer>) -> Arc<Self> {
        Arc::new(Self {
            fabric,
            offer,
            device: DeviceInfo { name: fabric.as_str().to_owned(), ..DeviceInfo::default() },
            verdict: Mutex::new(Verdict::Connects),
            broken: Arc::default(),
            dials: AtomicUsize::new(0),
            last: Mutex::new(None),
        })
    }

    pub(crate) fn say(&self, verdict: Verdict) {
        *self.verdict.lock().unwrap() = verdict;
    }
}

type Done = Arc<ArrayQueue<Completion>>;

impl Nic for DialledNic {
    fn name(&self) -> &str {
        self.fabric.as_str()
    }
    fn fabric(&self) -> Fabric {
        self.fabric
    }
    fn offer(&self) -> Option<Offer> {
        self.offer
    }
    fn dial(&self, cq: &CqHandle, _: QpCaps, to: &Target, _: Instant) -> Result<(ConnectedQp, AdminHalf), DialError> {
        self.dials.fetch_add(1, Ordering::Relaxed);
        *self.last.lock().unwrap() = Some(to.clone());
        match *self.verdict.lock().unwrap() {
            Verdict::Connects => {}
            Verdict::Fails => {
                let source = io::Error::from_raw_os_error(libc::ECONNREFUSED);
                return Err(DialError::Io { what: "connecting".into(), source });
            }
            Verdict::Forbidden => return Err(DialError::Forbidden { why: "ptrace scope".into() }),
        }
        let done = cq.0.clone().downcast::<ArrayQueue<Completion>>().unwrap();
        let qpn = dial::next_qpn();
        let failed = Arc::<AtomicBool>::default();
        let post = LoopQp { qpn, done, broken: self.broken.clone(), failed: failed.clone() };
        Ok(qp::connected(Box::new(post), Box::new(LoopAdmin { qpn, failed })))
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
            gid_table_len: 0,
            rate_mbps: None,
        })
    }
    fn gids(&self) -> io::Result<Vec<GidEntry>> {
        Ok(Vec::new())
    }
    fn create_cq(&self, depth: u32) -> io::Result<(Box<dyn CompletionQueue>, CqHandle)> {
        let done: Done = Arc::new(ArrayQueue::new(depth as usize));
        Ok((Box::new(LoopCq { done: done.clone(), depth }), CqHandle(done)))
    }
    fn create_qp(&self, _: &CqHandle, _: QpCaps) -> io::Result<Qp<qp::Reset>> {
        Err(io::ErrorKind::Unsupported.into())
    }
    fn register(&self, _: &Arc<Memory>, _: u64, _: u64, _: Access) -> io::Result<Registration> {
        Ok(Registration { lkey: Lkey(0), rkey: Rkey(0), guard: Box::new(()) })
    }
    fn async_fd(&self) -> Option<RawFd> {
        None
    }
    fn next_async_event(&self) -> io::Result<Option<AsyncEvent>> {
        Ok(None)
    }
}

struct LoopCq {
    done: Done,
    depth: u32,
}

impl CompletionQueue for LoopCq {
    fn depth(&self) -> u32 {
        self.depth
    }
    fn poll(&mut self, out: &mut [Completion]) -> io::Result<usize> {
        let mut count = 0;
        while let Some(completion) = (count < out.len()).then(|| self.done.pop()).flatten() {
            out[count] = completion;
            count += 1;
        }
        Ok(count)
    }
}

struct LoopQp {
    qpn: Qpn,
    done: Done,
    broken: Arc<AtomicBool>,
    failed: Arc<AtomicBool>,
}

impl PostQp for LoopQp {
    fn qpn(&self) -> Qpn {
        self.qpn
    }
    fn depth(&self) -> u32 {
        256
    }
    fn max_inline(&self) -> u32 {
        0
    }
    fn drains_clean(&self) -> bool {
        true
    }
    fn post(&mut self, chain: &[WorkRequest]) -> Posted {
        for request in chain {
            let status = if self.failed.load(Ordering::Relaxed) {
                WcStatus::WR_FLUSH_ERR
            } else if self.broken.load(Ordering::Relaxed) {
                self.failed.store(true, Ordering::Relaxed);
                WcStatus::RETRY_EXC_ERR
            } else {
                WcStatus::SUCCESS
            };
            if request.signaled || status != WcStatus::SUCCESS {
                let completion = Completion { wr_id: request.wr_id, status, vendor_err: 0, qpn: self.qpn };
                assert!(self.done.push(completion).is_ok(), "the core counts its room");
            }
        }
        Posted { accepted: chain.len(), error: None }
    }
}

struct LoopAdmin {
    qpn: Qpn,
    failed: Arc<AtomicBool>,
}

impl AdminQp for LoopAdmin {
    fn qpn(&self) -> Qpn {
        self.qpn
    }
    fn to_error(&mut self) -> io::Result<()> {
        self.failed.store(true, Ordering::Relaxed);
        Ok(())
    }
}
