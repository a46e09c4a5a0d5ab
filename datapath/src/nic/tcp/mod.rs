//! The TCP fabric: Mooncake's TCP data protocol, both ends of it, polled by the cores.
//!
//! ```text
//!    core's thread                        queue: one epoll instance per core                        a peer
//!  ┌───────────────┐ chain   ┌──────────────────────────────────────────────────────┐
//!  │ post (post)   │────────▶│ lane:   requests ─▶ messages ─▶ one gathered send    │──────────▶ its data port
//!  │ poll (queue)  │◀────────│         completions ◀─ statuses, data in its place   │◀──────────
//!  └───────────────┘         │ served: session (pure): bytes in ─▶ ranges, replies  │◀─────────▶ its lanes
//!                            │ listener, shared by all cores                        │
//!                            └───────────────▲──────────────────────────────────────┘
//!    control: dial, register, to_error       │ look-up at each piece: what peers may reach (ranges)
//! ```
//! One dialled queue pair is one *lane*: one connection. There is no thread but the cores: whoever polls the queue
//! moves the bytes, its own and those that peers ask for. A system call moves as many requests as it can: headers and
//! bodies of a chain go in one, statuses and data of many replies come in one.
//!
//! Modules in the order data meets them. Unsafe code lives in `iov`, nowhere else here.

mod socket;

mod ranges;

mod iov;

pub mod session;
pub mod wire;

mod lane;
mod post;
mod served;
mod slab;

pub mod counters;
mod queue;

use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::{Duration, Instant};

use crossbeam_queue::ArrayQueue;

use super::{
    Access, AsyncEvent, CompletionQueue, ConnectedQp, CqHandle, DeviceInfo, DialError, Fabric, GidEntry, LinkLayer,
    Nic, Offer, PortInfo, PortState, Qp, QpCaps, Registration, Target, dial, qp,
};
use crate::limits::QP_SLOTS;
use crate::nic::AdminHalf;
use crate::region::Memory;
use crate::units::{Lid, Lkey, PortNum, Rkey};

use lane::Patience;
use post::{LaneAdmin, LanePost, LaneShared};
use queue::{Mail, QueueShared, TcpQueue};
use ranges::{Reachable, Registry};

pub use counters::TcpCounters;

/// Where the data port may be.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Ports {
    /// This one; 0 lets the system choose.
    Fixed(u16),
    /// The first free one of these, from a random one on; those that the system gives to connections are left out.
    Range(u16, u16),
}

/// How the NIC is opened.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct TcpOptions {
    /// The data port. Default: 15000 to 17000, as stock nodes have it.
    pub ports: Ports,
    /// Bytes of each socket's buffers, where the system grants as much; `None` leaves them to the system. Default 4 MiB.
    pub buffer: Option<usize>,
    /// Longest wait for a status after all was sent (MC_TCP_STATUS_TIMEOUT_SEC). Default 30 s.
    pub status_timeout: Duration,
    /// Longest time without a byte of progress (MC_TCP_PROGRESS_TIMEOUT_SEC). Default 30 s.
    pub progress_timeout: Duration,
    /// A connection silent for this long is asked whether its other end lives: three times, a third of this apart, at
    /// least 1 s. Default 15 s.
    pub keepalive: Duration,
    /// Connections of peers served at once, 1 or more; then the one idle longest makes place. Default 4096.
    pub connections: usize,
    /// Use a plain congestion control between processes of one host, whatever the system's default is.
    pub local_congestion: bool,
}

impl Default for TcpOptions {
    fn default() -> Self {
        Self {
            ports: Ports::Range(15_000, 17_000),
            buffer: Some(4 << 20),
            status_timeout: Duration::from_secs(30),
            progress_timeout: Duration::from_secs(30),
            keepalive: Duration::from_secs(15),
            connections: 4096,
            local_congestion: true,
        }
    }
}

/// What the NIC and its queues have in common.
struct Shared {
    options: TcpOptions,
    patience: Patience,
    listener: OwnedFd,
    registry: Arc<Registry>,
    /// Connections served by all cores.
    serving: AtomicUsize,
    queues: Mutex<Vec<Weak<QueueShared>>>,
    events: ArrayQueue<AsyncEvent>,
    event_fd: OwnedFd,
}

impl Shared {
    fn queues(&self) -> Vec<Arc<QueueShared>> {
        let mut queues = self.queues.lock().unwrap_or_else(PoisonError::into_inner);
        queues.retain(|queue| queue.strong_count() > 0);
        queues.iter().filter_map(Weak::upgrade).collect()
    }

    /// The core that serves the fewest connections, of those that read their mail.
    fn least_loaded(&self) -> Option<Arc<QueueShared>> {
        let load = |queue: &Arc<QueueShared>| queue.serving.load(Ordering::Relaxed);
        self.queues().into_iter().filter(|queue| queue.reads_mail()).min_by_key(load)
    }

    /// Leaves an event for control. One that finds no room is only told by the next request's failure.
    fn tell(&self, event: AsyncEvent) {
        if self.events.push(event).is_ok() {
            let _ = rustix::io::write(&self.event_fd, &1u64.to_ne_bytes());
        }
    }
}

/// The NIC. Its name is `tcp`.
pub struct TcpNic {
    shared: Arc<Shared>,
    port: u16,
    device: DeviceInfo,
}

impl TcpNic {
    /// The name it has in options, tables and NIC paths.
    pub const NAME: &str = "tcp";

    /// Binds the data port. Peers are served as soon as a core polls a queue of this NIC.
    ///
    /// # Errors
    /// `AddrInUse`: no free port, the text says which were tried. Otherwise what the system said of a socket or an eventfd.
    pub fn open(options: TcpOptions) -> io::Result<Arc<Self>> {
        let (listener, port) = socket::listen(&options)?;
        let flags = rustix::event::EventfdFlags::NONBLOCK | rustix::event::EventfdFlags::CLOEXEC;
        let millis = |span: Duration| span.as_millis().min(u128::from(u64::MAX)) as u64;
        let shared = Shared {
            patience: Patience {
                progress_ms: millis(options.progress_timeout),
                status_ms: millis(options.status_timeout),
            },
            options,
            listener,
            registry: Arc::default(),
            serving: AtomicUsize::new(0),
            queues: Mutex::default(),
            events: ArrayQueue::new(QP_SLOTS),
            event_fd: rustix::event::eventfd(0, flags)?,
        };
        let device = DeviceInfo {
            name: Self::NAME.into(),
            firmware: String::new(),
            ports: 1,
            max_mr_size: 1 << 62,
            max_mr: u32::MAX,
            max_qp: QP_SLOTS as u32,
            max_qp_wr: 1 << 14,
            max_sge: 1,
            max_cqe: 1 << 16,
            max_qp_init_rd_atom: u8::MAX,
            max_qp_rd_atom: u8::MAX,
            ..DeviceInfo::default()
        };
        Ok(Arc::new(Self { shared: Arc::new(shared), port, device }))
    }

    /// The data port.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Connections of peers being served.
    pub fn serving(&self) -> usize {
        self.shared.serving.load(Ordering::Relaxed)
    }

    /// A sum over the counters of all queues, picked by `which`.
    pub fn count(&self, which: impl Fn(&TcpCounters) -> u64) -> u64 {
        self.shared.queues().iter().map(|queue| which(&queue.counters)).sum()
    }
}

fn unsupported<T>(what: &str) -> io::Result<T> {
    Err(io::Error::new(io::ErrorKind::Unsupported, format!("NIC {} has no {what}: it is dialled", TcpNic::NAME)))
}

impl Nic for TcpNic {
    fn name(&self) -> &str {
        Self::NAME
    }

    fn fabric(&self) -> Fabric {
        Fabric::Tcp
    }

    fn offer(&self) -> Option<Offer> {
        Some(Offer::Tcp { port: self.port })
    }

    fn dial(
        &self,
        cq: &CqHandle,
        caps: QpCaps,
        to: &Target,
        until: Instant,
    ) -> Result<(ConnectedQp, AdminHalf), DialError> {
        let Target::Tcp { host, port, version } = to else {
            return Err(DialError::Unsupported { nic: Self::NAME.into() });
        };
        let failed = |source| DialError::Io { what: format!("connect to data port {port} of {host}"), source };
        let invalid = || failed(io::Error::new(io::ErrorKind::InvalidInput, "a queue of another NIC"));
        let queue = cq.0.clone().downcast::<QueueShared>().map_err(|_| invalid())?;
        let fd = socket::connect(host, *port, &self.shared.options, until).map_err(failed)?;
        let depth = caps.max_send_wr.clamp(1, self.device.max_qp_wr);
        let shared = LaneShared::new(dial::next_qpn(), depth, queue.clone());
        let lane = Mail::Lane { fd, shared: shared.clone(), version: *version };
        queue.try_send(lane).map_err(|_| failed(io::Error::other("the core has more lanes than it takes in")))?;
        queue.ring();
        Ok(qp::connected(Box::new(LanePost(shared.clone())), Box::new(LaneAdmin(shared))))
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
            max_mtu: None,
            active_mtu: None,
            lid: Lid(0),
            gid_table_len: 0,
            rate_mbps: None,
        })
    }

    fn gids(&self) -> io::Result<Vec<GidEntry>> {
        Ok(Vec::new())
    }

    fn create_cq(&self, depth: u32) -> io::Result<(Box<dyn CompletionQueue>, CqHandle)> {
        let (queue, shared) = TcpQueue::new(self.shared.clone(), depth)?;
        let mut queues = self.shared.queues.lock().unwrap_or_else(PoisonError::into_inner);
        queues.push(Arc::downgrade(&shared));
        Ok((Box::new(queue), CqHandle(shared)))
    }

    fn create_qp(&self, _: &CqHandle, _: QpCaps) -> io::Result<Qp<qp::Reset>> {
        unsupported("queue pairs of its own")
    }

    fn register(&self, memory: &Arc<Memory>, offset: u64, len: u64, access: Access) -> io::Result<Registration> {
        let end = offset.checked_add(len).filter(|end| len > 0 && *end <= memory.len());
        if end.is_none() {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "a range outside of its memory, or of no bytes"));
        }
        // Addresses are the keys of this fabric.
        let (lkey, rkey) = (Lkey(0), Rkey(0));
        let reachable: Option<Reachable> = access.remote.then(|| self.shared.registry.add(memory, offset, len));
        Ok(Registration { lkey, rkey, guard: Box::new((reachable, memory.clone())) })
    }

    fn async_fd(&self) -> Option<RawFd> {
        Some(self.shared.event_fd.as_raw_fd())
    }

    fn next_async_event(&self) -> io::Result<Option<AsyncEvent>> {
        if let Some(event) = self.shared.events.pop() {
            return Ok(Some(event));
        }
        let _ = rustix::io::read(&self.shared.event_fd, &mut [0; 8]);
        // One may have come between the look and the read.
        Ok(self.shared.events.pop())
    }
}
