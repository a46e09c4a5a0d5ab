//! What each operation can answer, one enum per operation. Every text says what an operator does next.

use std::time::Duration;
use std::{fmt, io};

use moonrail_datapath::error::Cause;
use moonrail_datapath::nic::{Fabric, Op, PortState};
use moonrail_datapath::region::process::FORKED;
use moonrail_datapath::units::PortNum;

/// An error below ours, kept for `source()`.
pub type Source = Box<dyn std::error::Error + Send + Sync>;

/// The types of the errors below ours: what a `source()` of this module can be downcast to.
///
/// ```
/// use moonrail::Engine;
/// use moonrail::error::below::{StartError, StoreError};
/// use std::error::Error;
///
/// let engine = Engine::builder().name("a").metadata("etcd://127.0.0.1:1");
/// # let world = moonrail_datapath::nic::sim::SimWorld::real_time(1, moonrail_datapath::nic::sim::SimOptions::default());
/// # let nic = world.nic("a", "sim0", moonrail::Gid([0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 10, 0, 0, 1])).0;
/// # let engine = engine.environment(|_| None).log(|_, _| {}).pin_cores(false).nics_from(vec![nic]);
/// let error = engine.build().err().unwrap();
/// let below = error.source().and_then(|source| source.downcast_ref::<StartError>());
/// assert!(matches!(below, Some(StartError::Metadata(StoreError::Unreachable { .. }))));
/// ```
pub mod below {
    pub use moonrail_control::gid::GidError;
    pub use moonrail_control::metadata::store::Fault;
    pub use moonrail_control::metadata::{DescriptorError, StoreError, UriError};
    pub use moonrail_control::names::{BindError, NameError, OwnAddressError};
    pub use moonrail_control::{ControlError, DialError, NotifyError, OpenError, PublishError, StartError};
    pub use moonrail_datapath::nic::verbs::OpenError as DeviceError;
}

/// The engine could not be built. Nothing is left running and nothing is published.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BuildError {
    /// A builder option is outside its range.
    #[error("{option} = {value} is not possible: it takes {range}")]
    Option {
        /// The builder method.
        option: &'static str,
        /// What was given.
        value: String,
        /// What it takes.
        range: String,
    },
    /// The NIC priority matrix is not one.
    #[error(
        "the NIC priority matrix cannot be used: {reason}; its form is \
         {{\"cpu:0\":[[\"preferred NIC\"],[\"other NIC\"]]}}"
    )]
    PriorityMatrix {
        /// What is wrong with it.
        reason: String,
    },
    /// No NIC could be opened.
    #[error("RdmaTransport: No available RNIC{}", Listed(problems))]
    NoNic {
        /// What is wrong with each; empty if there are none at all.
        problems: Vec<NicProblem>,
    },
    /// A fabric that is required, or the only one, could not be set up.
    #[error("{fabric} cannot be used: {source}; choose other fabrics, or mend that")]
    Fabric {
        /// Which.
        fabric: Fabric,
        /// What the system said.
        source: io::Error,
    },
    /// The connection string of the metadata server is none.
    #[error("{source}")]
    Metadata {
        /// What is wrong with it, and what it takes.
        source: Source,
    },
    /// Metadata server, name, address or listening socket.
    #[error("{source}")]
    Control {
        /// What failed, and what to do.
        source: Source,
    },
    /// The address for the metrics page cannot be taken.
    #[error(
        "the metrics page cannot listen on {addr}: {source}; name an address of this host and a port that is free (0: any)"
    )]
    MetricsAddress {
        /// The address.
        addr: std::net::SocketAddr,
        /// What the system said.
        source: io::Error,
    },
    /// The operating system refused a thread or an eventfd.
    #[error("{what} could not be created: {source}; see `ulimit -u` and `ulimit -n`")]
    System {
        /// What was asked for.
        what: String,
        /// Why not.
        source: io::Error,
    },
}

struct Listed<'a>(&'a [NicProblem]);

impl fmt::Display for Listed<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_empty() {
            return f.write_str(
                ": No RDMA devices found, check your device installation (`moonrail nics` and `rdma link` list them)",
            );
        }
        for (i, problem) in self.0.iter().enumerate() {
            write!(f, "{} {problem}", if i == 0 { ":" } else { ";" })?;
        }
        Ok(())
    }
}

/// Why a NIC is not used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum NicProblem {
    /// No device has this name.
    #[error("No matched device found: {name}; present: {}", if present.is_empty() { "none".into() } else { present.join(", ") })]
    NotFound {
        /// The name asked for.
        name: String,
        /// The names there are.
        present: Vec<String>,
    },
    /// The port cannot carry traffic.
    #[error(
        "Device {name} port not active: port {port} is {state:?}; check cable, driver and `ip link`, or choose another \
         port with MC_IB_PORT"
    )]
    PortNotActive {
        /// The device.
        name: String,
        /// The port.
        port: PortNum,
        /// Its state.
        state: PortState,
    },
    /// No entry of the GID table can be used, or not the one that was asked for.
    #[error("device {name} port {port}: {source}")]
    Gid {
        /// The device.
        name: String,
        /// The port.
        port: PortNum,
        /// What is wrong, and what to set.
        source: moonrail_control::gid::GidError,
    },
    /// The device could not be opened or asked.
    #[error("Failed to open device {name} on port {port}: {source}")]
    Open {
        /// The device.
        name: String,
        /// The port.
        port: PortNum,
        /// What failed, and what to do.
        source: Source,
    },
}

impl NicProblem {
    /// The device.
    pub fn device(&self) -> &str {
        match self {
            Self::NotFound { name, .. }
            | Self::PortNotActive { name, .. }
            | Self::Gid { name, .. }
            | Self::Open { name, .. } => name,
        }
    }
}

/// Memory could not be registered. Nothing of it stays registered or published.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RegisterError {
    /// Zero bytes.
    #[error("Transfer Engine does not support zero length memory region")]
    ZeroLength,
    /// Part of it is registered already.
    #[error(
        "Transfer Engine does not support overlapped memory region: {len} bytes at {addr:#x} overlap the {other_len} \
         bytes registered at {other:#x}; unregister those first"
    )]
    Overlap {
        /// Start of the new range.
        addr: u64,
        /// Bytes of the new range.
        len: u64,
        /// Start of the one that is in the way.
        other: u64,
        /// Bytes of that one.
        other_len: u64,
    },
    /// The process may not lock that much memory.
    #[error(
        "registering {len} bytes on {nics} NICs needs {needed} bytes of locked memory ({registered} are registered \
         already), but RLIMIT_MEMLOCK allows {limit}: raise it (`ulimit -l unlimited`, LimitMEMLOCK=infinity in the \
         unit, memlock in /etc/security/limits.conf) or grant CAP_IPC_LOCK"
    )]
    MemoryLock {
        /// Bytes asked for.
        len: u64,
        /// NICs that each pin them.
        nics: usize,
        /// Bytes that would be locked in all.
        needed: u64,
        /// Bytes locked by earlier registrations, over all NICs.
        registered: u64,
        /// The limit.
        limit: u64,
    },
    /// A NIC refused.
    #[error("{0}")]
    Refused(Box<RefusedRegistration>),
    /// The memory could not be mapped.
    #[error(
        "{len} bytes could not be allocated: {source}; see `ulimit -v`, overcommit and the container's memory limit"
    )]
    Allocate {
        /// Bytes asked for.
        len: usize,
        /// What mmap(2) said.
        source: io::Error,
    },
    /// It was registered, but the peers could not be told, so it was taken back.
    #[error("the segment could not be published, so the memory was deregistered again: {source}")]
    Publish {
        /// What failed, and what to do.
        source: Source,
    },
    /// The engine is shut down.
    #[error("the engine is shut down")]
    Stopped,
    /// The engine belongs to a process this one was forked from.
    #[error("{FORKED}")]
    Forked,
}

/// Everything known about a registration that a NIC refused.
#[derive(Clone, Debug)]
pub struct RefusedRegistration {
    /// The NIC.
    pub nic: String,
    /// Start of the chunk.
    pub addr: u64,
    /// Bytes of the chunk.
    pub len: u64,
    /// What ibv_reg_mr said.
    pub errno: Option<i32>,
    /// The same in words.
    pub text: String,
    /// Soft limit of locked memory in bytes; `None` for unlimited or CAP_IPC_LOCK.
    pub memlock: Option<u64>,
    /// Largest region the NIC takes, in bytes.
    pub max_mr_size: u64,
    /// Bytes registered on this NIC by this engine before.
    pub registered: u64,
    /// The kernel's own last line about the device, where it may be read.
    pub kernel_line: Option<String>,
}

impl fmt::Display for RefusedRegistration {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Failed to register memory {:#x}: {}", self.addr, self.text)?;
        if let Some(errno) = self.errno {
            write!(f, " [{errno}]")?;
        }
        write!(f, "; {} bytes on NIC {}, which has {} bytes registered already", self.len, self.nic, self.registered)?;
        write!(f, " and takes at most {} per region (max_mr_size)", self.max_mr_size)?;
        match self.memlock {
            Some(limit) => write!(f, "; max locked memory is {limit} bytes (`ulimit -l`)")?,
            None => f.write_str("; max locked memory is unlimited")?,
        }
        if let Some(line) = &self.kernel_line {
            write!(f, "; the kernel says: {line}")?;
        } else {
            f.write_str("; `dmesg -T` may say more")?;
        }
        f.write_str(match self.errno {
            Some(libc::ENOMEM) => "; raise RLIMIT_MEMLOCK, or register less: the device may be out of regions or pages",
            Some(libc::EFAULT) => "; the range must be mapped and writable for the whole of its life",
            Some(libc::EINVAL) => "; try a smaller MC_MAX_MR_SIZE, or MC_IB_PCI_RELAXED_ORDERING=0",
            _ => "; register less in total, or set MC_MAX_MR_SIZE below the device's real limit",
        })
    }
}

/// Memory could not be unregistered.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum UnregisterError {
    /// The engine belongs to a process this one was forked from.
    #[error("{FORKED}")]
    Forked,
    /// No region starts there.
    #[error("no memory is registered at {addr:#x}")]
    NotRegistered {
        /// The address.
        addr: u64,
    },
    /// Transfers still use it. It is no longer published and takes no new transfers; call again to go on waiting.
    #[error(
        "the memory at {addr:#x} is still in use by transfers after {waited:?}: it must stay mapped; wait for its \
         batches (or for their peers to be fenced) and unregister again"
    )]
    InUse {
        /// Start of the region.
        addr: u64,
        /// How long was waited.
        waited: Duration,
    },
    /// The peers could not be told, so the memory stays registered.
    #[error("the segment could not be published, so the memory stays registered: {source}")]
    Publish {
        /// What failed, and what to do.
        source: Source,
    },
}

/// A segment could not be opened or refreshed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SegmentError {
    /// Control could not find it, reach it or understand it.
    #[error("{source}")]
    Open {
        /// The name.
        name: String,
        /// What failed, and what to do.
        source: Source,
    },
    /// The engine is shut down.
    #[error("the engine is shut down")]
    Stopped,
    /// The engine belongs to a process this one was forked from.
    #[error("{FORKED}")]
    Forked,
}

impl SegmentError {
    pub(crate) fn open(name: &str, source: moonrail_control::OpenError) -> Self {
        match source {
            moonrail_control::OpenError::Control(moonrail_control::ControlError::Gone) => Self::Stopped,
            moonrail_control::OpenError::Control(moonrail_control::ControlError::Forked) => Self::Forked,
            source => Self::Open { name: name.to_owned(), source: Box::new(source) },
        }
    }
}

/// A notification could not be sent.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum NotifyError {
    /// The peer could not be reached or did not answer.
    #[error("{source}")]
    Send {
        /// The peer.
        name: String,
        /// What failed, and what to do.
        source: Source,
    },
    /// The engine is shut down.
    #[error("the engine is shut down")]
    Stopped,
    /// The engine belongs to a process this one was forked from.
    #[error("{FORKED}")]
    Forked,
}

impl NotifyError {
    pub(crate) fn send(name: &str, source: moonrail_control::NotifyError) -> Self {
        match source {
            moonrail_control::NotifyError::Control(moonrail_control::ControlError::Gone) => Self::Stopped,
            moonrail_control::NotifyError::Control(moonrail_control::ControlError::Forked) => Self::Forked,
            source => Self::Send { name: name.to_owned(), source: Box::new(source) },
        }
    }
}

/// A batch was refused. Nothing of it was enqueued.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SubmitError {
    /// Local memory is not registered here.
    #[error(
        "Memory region not registered by any active device(s): {addr:#x} (transfer {index}); allocate or register it \
         with this engine first"
    )]
    NotRegistered {
        /// Which transfer of the batch.
        index: usize,
        /// First address outside.
        addr: u64,
    },
    /// Remote range outside what the peer published.
    #[error(
        "Failed to get segment descriptor for segment {segment} address {addr:#x} (transfer {index}): no buffer of the \
         peer holds it; if the peer registered it just now, call Segment::refresh"
    )]
    OutsidePeer {
        /// Which transfer of the batch.
        index: usize,
        /// The peer.
        segment: String,
        /// First address outside.
        addr: u64,
    },
    /// The segment was opened by another engine.
    #[error("segment {segment} (transfer {index}) was opened by another engine: open it with this one")]
    ForeignSegment {
        /// Which transfer of the batch.
        index: usize,
        /// The segment.
        segment: String,
    },
    /// A range that wraps around the address space, or a batch of more slices than 2^32 - 1.
    #[error("transfer {index}: {len} bytes are too many")]
    Length {
        /// Which transfer of the batch.
        index: usize,
        /// Bytes asked for.
        len: u64,
    },
    /// A core's ring is full. Wait for a batch to end, then submit again.
    #[error("busy: the engine has as much work as it takes; wait for a batch, then submit again")]
    Busy,
    /// The engine is shut down.
    #[error("the engine is shut down")]
    Stopped,
    /// The engine belongs to a process this one was forked from.
    #[error("{FORKED}")]
    Forked,
}

/// A wait ended without every byte in place.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum WaitError {
    /// The batch belongs to a process this one was forked from, where it goes on.
    #[error("{FORKED}")]
    Forked,
    /// The batch is terminal; at least one transfer has failed. Memory may be used again.
    #[error("{0}")]
    Failed(Box<TransferError>),
    /// The time is over and the batch is **not** terminal: its memory must stay as it is. Wait again, or drop the batch.
    #[error(
        "deadline exceeded: {what} since {since:?}{}; the batch is not over, its memory stays in use",
        cause.as_deref().map(|c| format!("; first cause: {c}")).unwrap_or_default()
    )]
    DeadlineExceeded {
        /// What is waited for.
        what: String,
        /// Since when: time since submission.
        since: Duration,
        /// What went wrong first, if anything is known to have.
        cause: Option<String>,
    },
}

/// The first error of a batch, in words.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TransferError {
    /// Which transfer of the batch.
    pub index: usize,
    /// READ or WRITE.
    pub op: Op,
    /// The peer's segment name.
    pub segment: String,
    /// Local address of the transfer.
    pub local: u64,
    /// Remote address of the transfer.
    pub remote: u64,
    /// Bytes of the transfer.
    pub len: u64,
    /// Why.
    pub cause: Cause,
    /// Completion status or errno in words; empty where the cause says it all.
    pub status: String,
    /// The device maker's code, 0 if none.
    pub vendor: u16,
    /// Local and peer NIC of the last attempt, if one was made.
    pub rail: Option<(String, String)>,
    /// What was seen on the way, from the incident that explains it.
    pub detail: Option<String>,
    /// What to do.
    pub advice: &'static str,
}

impl fmt::Display for TransferError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let op = match self.op {
            Op::Read => "READ",
            Op::Write => "WRITE",
        };
        let Self { index, segment, local, remote, len, .. } = self;
        write!(f, "transfer {index}: {op} of {len} bytes, local {local:#x}, {segment} {remote:#x}")?;
        if let Some((nic, peer)) = &self.rail {
            write!(f, ", by {nic} to {peer}")?;
        }
        f.write_str(match self.cause {
            Cause::Completion => ": failed",
            Cause::BadRequest => ": the request was refused",
            Cause::Deadline => ": the deadline passed",
            Cause::Cancelled => ": cancelled",
            Cause::Unreachable => ": no path to the peer",
            Cause::Shutdown => ": the engine was shut down",
            Cause::CoreLost => ": the data core that carried it was lost",
            Cause::Post => ": the NIC did not take the request",
            Cause::Restarted => ": the peer was restarted, the memory that was asked for is no more",
        })?;
        if !self.status.is_empty() {
            write!(f, ": {}", self.status)?;
        }
        if self.vendor != 0 {
            write!(f, " (vendor {:#x})", self.vendor)?;
        }
        if let Some(detail) = &self.detail {
            write!(f, "; {detail}")?;
        }
        write!(f, "; {}", self.advice)
    }
}

impl std::error::Error for TransferError {}
