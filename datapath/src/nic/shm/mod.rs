//! Shared memory: the NIC for peers of the same host.
//!
//! ```text
//!      this process                                                      the peer
//!   ┌───────────────────────────┐   abstract unix socket named       ┌──────────────────────────────┐
//!   │ dial ─────────────────────┼── after the peer's token ─────────▶│ mr-shm: who is it? (SO_PEER…)│
//!   │ mr-shm ◀── files, regions ┼────────────────────────────────────┤ ledger, lanes, each region   │
//!   │    │ view                 │                                    │                              │
//!   │    ▼                      │   its memfds, mapped here          │                              │
//!   │ core: post ─▶ poll ═══════╪═══════ copy, no system call ══════▶│ memory the engine allocated  │
//!   │               poll ───────┼─────── process_vm_readv/writev ───▶│ memory it borrowed           │
//!   └───────────────────────────┘                                    └──────────────────────────────┘
//! ```
//! Reaching the socket proves one kernel and one network namespace; the kernel says who is at the other end; the token in
//! the ledger proves which engine. Memory is taken back by the protocol in `ledger`. A file has (`wire`) the messages,
//! (`table`) what we registered, (`view`) what a peer registered, (`attachment`) copying, (`qp`) the queue pairs,
//! (`service`) the thread.
//!
//! Unsafe code: mappings that two processes write, system calls that libraries do not wrap, and the copies.
#![allow(unsafe_code)]
// Pages and lanes are aligned by construction; each place says so.
#![allow(clippy::cast_ptr_alignment)]

mod attachment;
mod copy;
mod direct;
mod foreign;
mod ledger;
mod qp;
mod recent;
mod service;
mod table;
mod view;
mod wake;
mod wire;

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossbeam_queue::ArrayQueue;

use super::{
    Access, AsyncEvent, CompletionQueue, ConnectedQp, CqHandle, DeviceInfo, DialError, Direct, Fabric, GidEntry,
    LinkLayer, Nic, Offer, PortInfo, PortState, Qp, QpCaps, Registration, Target,
};
use crate::lanes::Lanes;
use crate::limits::QP_SLOTS;
use crate::nic::qp::{AdminHalf, Reset, connected};
use crate::region::Memory;
use crate::units::{Lid, Lkey, PortNum, Rkey};

pub use attachment::{Attachment, CopyError};
pub use ledger::SLOTS;
pub use service::PEERS;
pub use wire::Credentials;

use foreign::Foreign;
use ledger::{Ledger, SharedLanes};
use service::{Link, Service, Shared, Source};
use table::{Live, Table, Watched};
use wake::Wake;
use wire::{Kind, Line, Process};

/// Its name in the priority matrix and in NIC paths.
pub const NAME: &str = "shm";
/// Connections waiting to be let in.
const BACKLOG: i32 = 256;
/// Pause between two tries at a socket whose backlog is full.
const TRY_EVERY: Duration = Duration::from_millis(5);

/// The shared-memory NIC of an engine.
pub struct ShmNic {
    engine: Arc<Engine>,
    device: DeviceInfo,
    /// Threads that copy, to and from any peer.
    lanes: Arc<Lanes>,
    attachments: Mutex<HashMap<u64, Weak<Attachment>>>,
}

/// What lives until the NIC and its last registration are dropped.
struct Engine {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Drop for Engine {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Release);
        self.shared.wake.ring();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
        self.shared.retired.over.store(true, Ordering::Release);
        self.shared.retired.drop_all();
    }
}

/// A registration: its drop takes the memory back from every peer.
struct Registered {
    engine: Arc<Engine>,
    slot: u32,
}

impl Drop for Registered {
    fn drop(&mut self) {
        self.engine.shared.table.remove(self.slot, || self.engine.shared.wake.ring());
    }
}

impl ShmNic {
    /// Opens the NIC: a ledger, a socket under a fresh token, a thread.
    ///
    /// # Errors
    /// What the system says: no memfd, no socket, no thread.
    pub fn open() -> io::Result<Arc<Self>> {
        let mut token = [0u8; 8];
        rustix::rand::getrandom(&mut token, rustix::rand::GetRandomFlags::empty())?;
        let token = u64::from_ne_bytes(token);
        let listener = wire::socket()?;
        rustix::net::bind(&listener, &wire::address(token)?)?;
        rustix::net::listen(&listener, BACKLOG)?;
        let wake = Arc::new(Wake::new()?);
        let retired = Arc::new(qp::Retired {
            executors: ArrayQueue::new(QP_SLOTS),
            wake: wake.clone(),
            over: AtomicBool::new(false),
        });
        let shared = Arc::new(Shared {
            token,
            table: Table::new(token)?,
            wake,
            stop: AtomicBool::new(false),
            links: Mutex::default(),
            retired,
            probe: Box::new(token),
        });
        let service = Service::new(shared.clone(), listener);
        let thread = std::thread::Builder::new().name("mr-shm".into()).spawn(move || service.run())?;
        let device = DeviceInfo {
            name: NAME.into(),
            ports: 1,
            max_mr_size: isize::MAX as u64,
            max_mr: SLOTS as u32,
            max_qp: QP_SLOTS as u32,
            max_qp_wr: 1 << 14,
            max_sge: 1,
            max_cqe: 1 << 20,
            max_qp_init_rd_atom: 16,
            max_qp_rd_atom: 16,
            ..DeviceInfo::default()
        };
        let engine = Arc::new(Engine { shared, thread: Some(thread) });
        Ok(Arc::new(Self { engine, device, lanes: Arc::default(), attachments: Mutex::default() }))
    }

    /// Under which it is dialled.
    pub fn token(&self) -> u64 {
        self.engine.shared.token
    }

    /// Regions whose memory was never given back, because a peer stopped in mid-copy and did not go on.
    pub fn regions_kept(&self) -> u64 {
        self.engine.shared.table.kept()
    }

    /// The attachment to a peer that was dialled and is alive.
    pub fn attachment(&self, token: u64) -> Option<Arc<Attachment>> {
        let attachments = self.attachments.lock().unwrap_or_else(PoisonError::into_inner);
        attachments.get(&token).and_then(Weak::upgrade).filter(|a| !a.is_dead())
    }

    /// The attachment to a peer, made where there is none. Blocks until `until` at the latest.
    ///
    /// # Errors
    /// See [`DialError`].
    pub fn attach(&self, token: u64, until: Instant) -> Result<Arc<Attachment>, DialError> {
        if let Some(attachment) = self.attachment(token) {
            return Ok(attachment);
        }
        let attachment = if token == self.token() { self.attach_to_self() } else { self.attach_to(token, until)? };
        let mut attachments = self.attachments.lock().unwrap_or_else(PoisonError::into_inner);
        attachments.retain(|_, a| a.strong_count() > 0);
        attachments.insert(token, Arc::downgrade(&attachment));
        Ok(attachment)
    }

    fn attach_to_self(&self) -> Arc<Attachment> {
        let shared = &self.engine.shared;
        let none = Err("memory of our own needs no system call".into());
        let ledger = shared.table.ledger.clone();
        let (lanes, wake) = (self.lanes.clone(), shared.wake.clone());
        let attachment = Arc::new(Attachment::new(shared.token, ledger, None, lanes.clone(), None, none, wake));
        let watched = Arc::new(Watched { lanes, dead: AtomicBool::new(false), process: None });
        let cursor = shared.table.watch(&watched);
        self.hand_over(Link::new(Source::Own(cursor, watched), None, Arc::downgrade(&attachment)));
        attachment
    }

    fn attach_to(&self, token: u64, until: Instant) -> Result<Arc<Attachment>, DialError> {
        let shared = &self.engine.shared;
        let step = |what: &str| {
            let what = what.to_owned();
            move |source| DialError::Io { what, source }
        };
        let line = connect(token, until)?;
        let process = Process::behind(line.as_fd()).map_err(step("asking who serves the peer's memory"))?;
        if !process.is_trusted() {
            let why = format!(
                "the peer runs as user {}, we as user {}: run both as one",
                process.uid,
                rustix::process::geteuid().as_raw()
            );
            return Err(DialError::Forbidden { why });
        }
        let (welcome, files) = wire::receive_until(line.as_fd(), until)
            .map_err(step("waiting for the peer's ledger (it admits its own user only, and 1024 peers)"))?;
        let [ledger, lanes] = files.as_slice() else { return Err(not_it("no ledger came with its welcome")) };
        if welcome.kind != Kind::Welcome {
            return Err(not_it("it did not begin with a welcome"));
        }
        let ledger = Ledger::attach(ledger.as_fd(), token).map_err(|why| not_it(&why))?;
        let lanes = SharedLanes::attach(lanes.as_fd()).map_err(|why| not_it(&why))?;
        let foreign = Foreign::probe(&process, welcome.addr, token);
        let process = Some(Arc::new(process));
        let (own, wake) = (self.lanes.clone(), shared.wake.clone());
        let attachment =
            Arc::new(Attachment::new(token, Arc::new(ledger), Some(lanes), own, process.clone(), foreign, wake));
        let mut regions = Vec::new();
        loop {
            let (message, files) =
                wire::receive_until(line.as_fd(), until).map_err(step("waiting for the peer's regions"))?;
            let is_last = message.kind == Kind::Synced;
            regions.push((message, files));
            if is_last {
                break;
            }
            if regions.len() > 2 * SLOTS {
                return Err(not_it("it announces regions without end"));
            }
        }
        let mut link = Link::new(Source::Peer(line), process, Arc::downgrade(&attachment));
        for (message, files) in regions {
            link.hear(&message, &files).map_err(step("listening to the peer's regions"))?;
        }
        link.publish(&attachment);
        self.hand_over(link);
        Ok(attachment)
    }

    fn hand_over(&self, link: Link) {
        let shared = &self.engine.shared;
        shared.links.lock().unwrap_or_else(PoisonError::into_inner).push(link);
        shared.wake.ring();
    }
}

fn not_it(why: &str) -> DialError {
    DialError::Elsewhere { why: format!("what answers under the peer's token is not it: {why}") }
}

/// Reaches the socket of a token.
fn connect(token: u64, until: Instant) -> Result<Line, DialError> {
    let failed = |source| DialError::Io { what: "connecting to the peer's shared-memory socket".into(), source };
    let socket = wire::socket().map_err(failed)?;
    let address = wire::address(token).map_err(failed)?;
    loop {
        match rustix::net::connect(&socket, &address) {
            Ok(()) => return Ok(Line::new(socket)),
            Err(rustix::io::Errno::CONNREFUSED | rustix::io::Errno::NOENT) => {
                let why = "nobody serves its token here: it runs on another host or in another network namespace, or \
                           has ended";
                return Err(DialError::Elsewhere { why: why.into() });
            }
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) if Instant::now() < until => {
                std::thread::sleep(TRY_EVERY);
            }
            Err(errno) => return Err(failed(errno.into())),
        }
    }
}

impl Nic for ShmNic {
    fn name(&self) -> &str {
        NAME
    }

    fn fabric(&self) -> Fabric {
        Fabric::Shm
    }

    fn offer(&self) -> Option<Offer> {
        Some(Offer::Shm { token: self.token() })
    }

    fn lanes(&self) -> Option<Arc<Lanes>> {
        Some(self.lanes.clone())
    }

    fn direct(&self, to: &Target) -> Option<Arc<dyn Direct>> {
        let Target::Shm { token } = to else { return None };
        self.attachment(*token).map(|attachment| attachment as Arc<dyn Direct>)
    }

    fn dial(
        &self,
        cq: &CqHandle,
        caps: QpCaps,
        to: &Target,
        until: Instant,
    ) -> Result<(ConnectedQp, AdminHalf), DialError> {
        let unsupported = || DialError::Unsupported { nic: NAME.into() };
        let Target::Shm { token } = to else { return Err(unsupported()) };
        let cq = cq.0.clone().downcast::<qp::CqShared>().map_err(|_| unsupported())?;
        let attachment = self.attach(*token, until)?;
        if let (Some(pass), Err(why)) = (attachment.enter(), &attachment.foreign)
            && pass.view.has_foreign
        {
            return Err(DialError::Forbidden {
                why: format!(
                    "it registered memory that is no file (its own, or allocated beyond its share of file descriptors), and {why}"
                ),
            });
        }
        let refused = |refused| match refused {
            qp::Refused::Full => DialError::Io {
                what: format!("one completion queue serves {QP_SLOTS} queue pairs"),
                source: io::Error::from_raw_os_error(libc::ENOMEM),
            },
            qp::Refused::CoreGone => DialError::Io {
                what: "the core of this queue pair has ended".to_owned(),
                source: io::Error::from_raw_os_error(libc::ESHUTDOWN),
            },
        };
        let (post, admin) = qp::connect(&cq, caps.max_send_wr, attachment).map_err(refused)?;
        Ok(connected(post, admin))
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
            link_layer: LinkLayer::Other(0),
            max_mtu: None,
            active_mtu: None,
            lid: Lid(0),
            gid_table_len: 0,
            rate_mbps: None,
        })
    }

    fn gids(&self) -> io::Result<Vec<GidEntry>> {
        Ok(vec![])
    }

    fn create_cq(&self, depth: u32) -> io::Result<(Box<dyn CompletionQueue>, CqHandle)> {
        let (cq, shared) = qp::create_cq(depth, self.engine.shared.retired.clone())?;
        Ok((Box::new(cq), CqHandle(shared)))
    }

    fn create_qp(&self, _: &CqHandle, _: QpCaps) -> io::Result<Qp<Reset>> {
        Err(io::Error::new(io::ErrorKind::Unsupported, "queue pairs over shared memory are dialled"))
    }

    fn register(&self, memory: &Arc<Memory>, offset: u64, len: u64, access: Access) -> io::Result<Registration> {
        if len == 0 || offset.checked_add(len).is_none_or(|end| end > memory.len()) {
            return Err(io::Error::from_raw_os_error(libc::EINVAL));
        }
        if !access.remote {
            // Nobody else is told of it, and our own copies need no key.
            return Ok(Registration { lkey: Lkey(0), rkey: Rkey(0), guard: Box::new(memory.clone()) });
        }
        let shared = &self.engine.shared;
        let (slot, _) = shared.table.add(Live { memory: memory.clone(), offset, len })?;
        shared.wake.ring();
        let guard = Box::new(Registered { engine: self.engine.clone(), slot });
        Ok(Registration { lkey: Lkey(slot), rkey: Rkey(slot), guard })
    }

    fn async_fd(&self) -> Option<RawFd> {
        None
    }

    fn next_async_event(&self) -> io::Result<Option<AsyncEvent>> {
        Ok(None)
    }
}
