//! The NIC as a trait: what control asks of a device, and what a core asks of its completion queue and queue pairs.
//!
//! Each NIC has two halves that never meet in one call. Control's half ([`Nic`], [`AdminQp`]) may block and is called
//! from control's pool. A core's half ([`CompletionQueue`], [`PostQp`]) never blocks; exactly one core owns it.
//! Dispatch is dynamic and happens once per chain and once per NIC and turn, never per slice.

pub mod dial;
pub mod direct;
pub mod qp;
pub mod shm;
pub mod sim;
pub mod tcp;
#[cfg(feature = "verbs")]
pub mod verbs;
#[cfg(not(feature = "verbs"))]
#[path = "no_verbs.rs"]
pub mod verbs;

use std::any::Any;
use std::io;
use std::os::fd::{BorrowedFd, RawFd};
use std::sync::Arc;
use std::time::Instant;

use crate::lanes::Lanes;
use crate::region::Memory;
use crate::units::{Gid, GidIndex, Lid, Lkey, Mtu, PortNum, Qpn, RemoteAddr, Rkey, WrId};

pub use dial::{DialError, Fabric, Offer, Target, TcpVersion};
pub use direct::Direct;
pub use qp::{AdminHalf, ConnectedQp, InitAttr, ModifyError, PostHalf, Qp, RtrAttr, RtsAttr};

/// Link layer of a port (ibv_port_attr.link_layer).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum LinkLayer {
    /// InfiniBand: addressed by LID.
    InfiniBand,
    /// Ethernet: RoCE, addressed by GID.
    Ethernet,
    /// A value this code does not know.
    Other(u8),
}

/// Logical state of a port (ibv_port_state).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum PortState {
    /// No link.
    Down,
    /// Link up, subnet manager has not configured it.
    Init,
    /// Configured, not yet active.
    Armed,
    /// Carries traffic.
    Active,
    /// Active, link errors being counted.
    ActiveDefer,
    /// A value this code does not know (0 is NOP).
    Other(u32),
}

/// What a port says of itself (ibv_query_port(3)).
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PortInfo {
    /// The port asked.
    pub port: PortNum,
    /// Logical state; only [`PortState::Active`] is usable.
    pub state: PortState,
    /// Physical state as verbs numbers it (5 = LinkUp, 3 = Disabled, 2 = Polling).
    pub physical_state: u8,
    /// InfiniBand or Ethernet.
    pub link_layer: LinkLayer,
    /// Largest path MTU the port could use.
    pub max_mtu: Option<Mtu>,
    /// Path MTU in use; `None` for a value outside the five.
    pub active_mtu: Option<Mtu>,
    /// LID, 0 on RoCE.
    pub lid: Lid,
    /// Entries of the GID table, empty ones included.
    pub gid_table_len: u32,
    /// Nominal data rate in megabits per second, from width and speed; `None` when unknown.
    pub rate_mbps: Option<u64>,
}

/// Type of a GID (sysfs `gid_attrs/types`, ibv_gid_entry.gid_type).
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum GidKind {
    /// InfiniBand.
    Ib,
    /// RoCE v1: not routable, Ethernet type 0x8915.
    RoceV1,
    /// RoCE v2: UDP port 4791.
    RoceV2,
    /// A value this code does not know.
    Other(u32),
}

/// One entry of a port's GID table.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct GidEntry {
    /// Its index now; it moves.
    pub index: GidIndex,
    /// Its value; zero for an empty slot.
    pub gid: Gid,
    /// Its type.
    pub kind: GidKind,
    /// The net device behind it, where the kernel tells.
    pub net_device: Option<String>,
}

/// What a device says of itself (ibv_query_device(3) and sysfs).
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct DeviceInfo {
    /// Name of the verbs device, `mlx5_0`.
    pub name: String,
    /// Firmware version, as the driver writes it.
    pub firmware: String,
    /// NUMA node of the PCI device; `None` where there is none (Soft-RoCE says -1).
    pub numa_node: Option<u16>,
    /// PCI address, `0000:3b:00.0`; `None` for a virtual device.
    pub pci_address: Option<String>,
    /// Physical ports.
    pub ports: u8,
    /// Largest registrable region in bytes.
    pub max_mr_size: u64,
    /// Registrations at the most.
    pub max_mr: u32,
    /// Queue pairs at the most.
    pub max_qp: u32,
    /// Work requests per queue at the most.
    pub max_qp_wr: u32,
    /// Scatter/gather entries per work request at the most.
    pub max_sge: u32,
    /// Entries per completion queue at the most.
    pub max_cqe: u32,
    /// READs a queue pair may have outstanding as initiator.
    pub max_qp_init_rd_atom: u8,
    /// READs a queue pair serves at once as responder.
    pub max_qp_rd_atom: u8,
}

/// Something the device tells of itself, not of a work request (ibv_get_async_event(3)); copied and acknowledged at once.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum AsyncEvent {
    /// The port lost its link.
    PortError(PortNum),
    /// The port became active.
    PortActive(PortNum),
    /// The port's GID table changed.
    GidChange(PortNum),
    /// The port's LID changed.
    LidChange(PortNum),
    /// The device is lost.
    DeviceFatal,
    /// A completion queue overran: outcomes are lost.
    CqError,
    /// A queue pair failed outside any work request.
    QpFatal(Qpn),
    /// Another event, by its number in verbs.
    Other(u32),
}

/// What a peer may do with a registered range, and how the device may order its writes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Access {
    /// READs and WRITEs from peers.
    pub remote: bool,
    /// PCI relaxed ordering, where device and library know it.
    pub relaxed_ordering: bool,
}

/// One registered range on one NIC. Dropping it deregisters: that can block, so never on a core.
pub struct Registration {
    /// For our own work requests.
    pub lkey: Lkey,
    /// For the peer's.
    pub rkey: Rkey,
    /// Keeps the memory and the device; its drop deregisters.
    pub guard: Box<dyn Any + Send + Sync>,
}

/// Depths asked of a new queue pair.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct QpCaps {
    /// Work requests outstanding on the send queue, 1 to the device's max_qp_wr.
    pub max_send_wr: u32,
    /// Scatter/gather entries per work request.
    pub max_send_sge: u32,
    /// Bytes that may be carried inside a WRITE's work request.
    pub max_inline: u32,
}

/// A completion queue as control knows it: only good for creating queue pairs on it.
#[derive(Clone)]
pub struct CqHandle(pub Arc<dyn Any + Send + Sync>);

/// A device port as control sees it. Every call may block; none is made from a core.
pub trait Nic: Send + Sync {
    /// Name of the device, as it stands in the priority matrix and in NIC paths.
    fn name(&self) -> &str;
    /// What carries its bytes. [`Fabric::Rdma`]: queue pairs are made on both ends by the handshake; otherwise they
    /// are dialled.
    fn fabric(&self) -> Fabric {
        Fabric::Rdma
    }
    /// What a peer has to know to dial this NIC; published with our segment. `None` where nobody can.
    fn offer(&self) -> Option<Offer> {
        None
    }
    /// Connects to a peer that serves this fabric, without the peer's control thread: a queue pair that is ready to
    /// send. Blocks until `until` at the latest.
    fn dial(
        &self,
        _cq: &CqHandle,
        _caps: QpCaps,
        _to: &Target,
        _until: Instant,
    ) -> Result<(ConnectedQp, AdminHalf), DialError> {
        Err(DialError::Unsupported { nic: self.name().to_owned() })
    }
    /// Lanes in which threads are that copy by [`Nic::direct`]; a caller who is inside already spares the NIC to enter.
    fn lanes(&self) -> Option<Arc<Lanes>> {
        None
    }
    /// The memory of a peer that was dialled, if the caller's own threads reach it. Does not block for long.
    fn direct(&self, _to: &Target) -> Option<Arc<dyn Direct>> {
        None
    }
    /// The port all queue pairs of this NIC use.
    fn port_num(&self) -> PortNum;
    /// Limits and place of the device, read when it was opened.
    fn device(&self) -> &DeviceInfo;
    /// State of the port now.
    fn query_port(&self) -> io::Result<PortInfo>;
    /// The GID table now, empty slots left out.
    fn gids(&self) -> io::Result<Vec<GidEntry>>;
    /// A completion queue of at least `depth` entries: the polling half for a core, the handle for control.
    fn create_cq(&self, depth: u32) -> io::Result<(Box<dyn CompletionQueue>, CqHandle)>;
    /// A queue pair in RESET whose sends complete on `cq`. ENOMEM: no queue pairs or memory left on the device.
    fn create_qp(&self, cq: &CqHandle, caps: QpCaps) -> io::Result<Qp<qp::Reset>>;
    /// Registers `len` bytes from `offset` of `memory`.
    fn register(&self, memory: &Arc<Memory>, offset: u64, len: u64, access: Access) -> io::Result<Registration>;
    /// Readable when [`Nic::next_async_event`] has something; `None` where the NIC has no descriptor.
    fn async_fd(&self) -> Option<RawFd>;
    /// The next event, without waiting.
    fn next_async_event(&self) -> io::Result<Option<AsyncEvent>>;
}

/// Direction of a transfer, as the initiator sees it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Op {
    /// Peer's memory to ours.
    Read,
    /// Our memory to the peer's.
    Write,
}

/// One RDMA READ or WRITE of one contiguous piece.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct WorkRequest {
    /// Comes back in the completion.
    pub wr_id: WrId,
    /// READ or WRITE.
    pub op: Op,
    /// Local virtual address.
    pub local: u64,
    /// Key of the registration that holds `local`.
    pub lkey: Lkey,
    /// Bytes, 0 to 2^31. 0 is the trial of a rail: it has no scatter/gather entry and needs no key.
    pub len: u32,
    /// Where in the peer.
    pub remote: RemoteAddr,
    /// The peer's key for `remote` on the peer NIC this queue pair leads to.
    pub rkey: Rkey,
    /// Ask for a completion. Without it success is silent; an error completes always.
    pub signaled: bool,
    /// Copy the payload into the work request (WRITE of at most the queue pair's max_inline).
    pub inline: bool,
}

/// What became of a chain: the device took the first `accepted` requests, and refused the rest for `error`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Posted {
    /// Requests that are now outstanding, counted from the chain's start (ibv_post_send's `bad_wr`).
    pub accepted: usize,
    /// errno of the refusal; `None` when all were accepted. ENOMEM: the send queue is full.
    pub error: Option<i32>,
}

/// Status of a completion (ibv_wc_status), open to values this code does not know.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct WcStatus(pub u32);

#[allow(missing_docs)] // the names are those of ibv_wc_status, described in ibv_poll_cq(3)
impl WcStatus {
    pub const SUCCESS: Self = Self(0);
    pub const LOC_LEN_ERR: Self = Self(1);
    pub const LOC_QP_OP_ERR: Self = Self(2);
    pub const LOC_EEC_OP_ERR: Self = Self(3);
    pub const LOC_PROT_ERR: Self = Self(4);
    pub const WR_FLUSH_ERR: Self = Self(5);
    pub const MW_BIND_ERR: Self = Self(6);
    pub const BAD_RESP_ERR: Self = Self(7);
    pub const LOC_ACCESS_ERR: Self = Self(8);
    pub const REM_INV_REQ_ERR: Self = Self(9);
    pub const REM_ACCESS_ERR: Self = Self(10);
    pub const REM_OP_ERR: Self = Self(11);
    pub const RETRY_EXC_ERR: Self = Self(12);
    pub const RNR_RETRY_EXC_ERR: Self = Self(13);
    pub const LOC_RDD_VIOL_ERR: Self = Self(14);
    pub const REM_INV_RD_REQ_ERR: Self = Self(15);
    pub const REM_ABORT_ERR: Self = Self(16);
    pub const INV_EECN_ERR: Self = Self(17);
    pub const INV_EEC_STATE_ERR: Self = Self(18);
    pub const FATAL_ERR: Self = Self(19);
    pub const RESP_TIMEOUT_ERR: Self = Self(20);
    pub const GENERAL_ERR: Self = Self(21);
    /// No device says this: the core does, of a READ whose success the device does not stand by ([`PostQp::reads_are_proven`]).
    pub const UNPROVEN: Self = Self(253);
    /// Nor this: the core says it of a queue pair that is silent while a cancelled batch waits for it
    /// (`core/stall.rs`).
    pub const GIVEN_UP: Self = Self(254);
    /// Nor this: the core says it of a queue pair that is silent for much too long.
    pub const STALLED: Self = Self(255);
}

impl WcStatus {
    /// The wording operators know from other verbs programs (ibv_wc_status_str(3)).
    pub fn text(self) -> &'static str {
        match self.0 {
            0 => "success",
            1 => "local length error",
            2 => "local QP operation error",
            3 => "local EE context operation error",
            4 => "local protection error",
            5 => "Work Request Flushed Error",
            6 => "memory management operation error",
            7 => "bad response error",
            8 => "local access error",
            9 => "remote invalid request error",
            10 => "remote access error",
            11 => "remote operation error",
            12 => "transport retry counter exceeded",
            13 => "RNR retry counter exceeded",
            14 => "local RDD violation error",
            15 => "remote invalid RD request",
            16 => "aborted error",
            17 => "invalid EE context number",
            18 => "invalid EE context state",
            19 => "fatal error",
            20 => "response timeout error",
            21 => "general error",
            253 => "unproven: a READ was called a success, and its queue pair is in error",
            254 => {
                "given up: a batch that was cancelled, or is over its deadline, waits for completions that do not come"
            }
            255 => "stalled: no completion for much longer than it takes, and the device reports nothing",
            _ => "a status this version does not know",
        }
    }
}

/// One completion. After an error only `wr_id`, `status`, `qpn` and `vendor_err` mean anything (ibv_poll_cq(3)),
/// so nothing else is kept.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Completion {
    /// Of the work request.
    pub wr_id: WrId,
    /// Its outcome.
    pub status: WcStatus,
    /// The device maker's own code, for the log.
    pub vendor_err: u32,
    /// The queue pair.
    pub qpn: Qpn,
}

impl Completion {
    /// A completion of nothing, to fill a buffer with.
    pub const EMPTY: Self = Self {
        wr_id: WrId { slot: 0, generation: 0, sequence: 0 },
        status: WcStatus::SUCCESS,
        vendor_err: 0,
        qpn: match Qpn::new(0) {
            Some(qpn) => qpn,
            None => unreachable!(),
        },
    };
}

/// The polling half of a completion queue. One core owns it; no call blocks.
pub trait CompletionQueue: Send {
    /// Entries. The core never has more requests outstanding on it, unsignalled ones counted.
    fn depth(&self) -> u32;
    /// Moves up to `out.len()` completions into `out`; returns how many. An error means that outcomes may be lost.
    fn poll(&mut self, out: &mut [Completion]) -> io::Result<usize>;
    /// Asks for an event on [`CompletionQueue::event_fd`] at the next completion. Poll once more before sleeping.
    fn arm(&mut self) -> io::Result<()> {
        Ok(())
    }
    /// Readable after an armed queue got a completion; `None`, which goes with the other two as they are here, for a NIC that is only
    /// ever polled.
    fn event_fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }
    /// Things done for peers since the last call, which no completion shows: a core that serves is not idle.
    fn served(&mut self) -> usize {
        0
    }
    /// Takes and acknowledges what made the descriptor readable, without waiting.
    fn clear_events(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The posting half of a queue pair. One core owns it; no call blocks.
pub trait PostQp: Send {
    /// Its number.
    fn qpn(&self) -> Qpn;
    /// Work requests the send queue holds.
    fn depth(&self) -> u32;
    /// Largest inline payload in bytes.
    fn max_inline(&self) -> u32;
    /// Posts `chain` in order with one doorbell.
    fn post(&mut self, chain: &[WorkRequest]) -> Posted;
    /// Whether the completions so far prove that nothing of the requests they end can land at the peer any more, however
    /// they ended. Asked when one failed. Never so on RDMA: a packet may be late (docs/architecture.md, the life of an
    /// error).
    fn drains_clean(&self) -> bool {
        false
    }
    /// Whether the success of a READ says that its bytes are there. Not so where the device is known to call READs a success
    /// that it cut short; it moves the queue pair to ERR in the same moment, so there [`PostQp::is_in_error`] is asked after each
    /// completion that ends a READ. Asked once, when the queue pair comes to its core.
    fn reads_are_proven(&self) -> bool {
        true
    }
    /// Whether the device has moved the queue pair to ERR. May cost a system call.
    fn is_in_error(&self) -> bool {
        false
    }
}

/// Control's half of a connected queue pair. Calls may block.
pub trait AdminQp: Send {
    /// Its number.
    fn qpn(&self) -> Qpn;
    /// Moves the queue pair to ERR: every outstanding request then completes, as flushed. May be called again.
    fn to_error(&mut self) -> io::Result<()>;
}

/// A queue pair before it is split, as an implementation provides it. Dropping it destroys the queue pair.
pub trait RawQp: Send {
    /// Its number.
    fn qpn(&self) -> Qpn;
    /// RESET to INIT.
    fn to_init(&mut self, attr: &InitAttr) -> io::Result<()>;
    /// INIT to RTR. May block for seconds while a neighbour is resolved.
    fn to_rtr(&mut self, attr: &RtrAttr) -> io::Result<()>;
    /// RTR to RTS.
    fn to_rts(&mut self, attr: &RtsAttr) -> io::Result<()>;
    /// The two halves. The queue pair is destroyed when both are dropped; see [`qp::destroy`].
    fn split(self: Box<Self>) -> (Box<dyn PostQp>, Box<dyn AdminQp>);
}
