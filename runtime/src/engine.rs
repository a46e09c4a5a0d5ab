//! One node: its NICs, its data cores, its control thread.

use std::fmt;
use std::net::{SocketAddr, TcpListener};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use moonrail_control::names::HostPort;
use moonrail_control::{Clock, Control, FabricPolicy, RailState, Way};
use moonrail_datapath::core::counters::Counter;
use moonrail_datapath::core::{CoreCounters as Counting, Inbox, Spread};
use moonrail_datapath::lanes::{Lanes, Snapshot};
use moonrail_datapath::nic::{Fabric, Nic};
use moonrail_datapath::region::Memory;
use moonrail_datapath::region::process::Process;
use moonrail_datapath::units::{Gid, GidIndex, Lid, Mtu, Nanos, PortNum};

use crate::batch::{Batch, BatchBuilder, Transfer, after};
use crate::builder::EngineBuilder;
use crate::config::Settings;
use crate::error::{BuildError, NotifyError, RegisterError, SegmentError, SubmitError, UnregisterError};
use crate::incident::IncidentInfo;
use crate::inspect::http;
use crate::inspect::server::Server;
use crate::live::{Live, Watch};
use crate::log::{Level, Log};
use crate::metrics::Metrics;
use crate::notify::Notification;
use crate::pin;
use crate::region::Region;
use crate::registry::{Extents, Registry};
use crate::segment::{OPEN_WITHIN, Segment};
use crate::submit::CopiedCounters;
use crate::topology::Machine;

/// For one notification: the peer is dialled, told, and answers.
const NOTIFY_WITHIN: Duration = Duration::from_secs(20);
/// For the end of a dropped engine: a core gives up what does not drain after 10 s.
const DROP_WITHIN: Duration = Duration::from_secs(15);
/// For threads that were told to end, beyond the caller's own limit.
const LAST_MOMENT: Duration = Duration::from_millis(200);

/// A NIC of this engine.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct NicInfo {
    /// Name of the verbs device; `shm`, `tcp`.
    pub name: String,
    /// What carries its bytes.
    pub fabric: Fabric,
    /// Its port, if it is an RDMA NIC.
    pub port: Option<PortInfo>,
    /// NUMA node; `None` where it has none.
    pub numa_node: Option<u16>,
    /// Data cores that poll it, counted from 0.
    pub cores: Vec<u16>,
    /// Bytes registered on it.
    pub registered: u64,
    /// Idle rails that were evicted from it, because it had more than `rails_per_nic`.
    pub evictions: u64,
}

/// The port of an RDMA NIC.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PortInfo {
    /// Its number.
    pub number: PortNum,
    /// LID, 0 on RoCE.
    pub lid: Lid,
    /// Place of the GID when it was chosen.
    pub gid_index: GidIndex,
    /// The GID.
    pub gid: Gid,
    /// Path MTU the port offers, cut to MC_MTU.
    pub mtu: Mtu,
}

/// A rail: one (local NIC, peer NIC) pair.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct RailInfo {
    /// Our NIC.
    pub nic: String,
    /// The peer's segment name.
    pub peer: String,
    /// The peer's NIC.
    pub peer_nic: String,
    /// What carries its bytes.
    pub fabric: Fabric,
    /// `down`, `connecting`, `waiting`, `trial` or `up`, and what is wrong if something is; `evicted` where it was idle and is
    /// connected again when it is used.
    pub state: String,
    /// Whether it carries slices now.
    pub usable: bool,
    /// The data core that has it.
    pub core: u16,
    /// Queue pairs now.
    pub qps: usize,
    /// Path MTU now.
    pub path_mtu: Option<Mtu>,
    /// How often it was connected.
    pub lives: u32,
    /// Whether the peer is a moonrail node.
    pub moonrail: bool,
    /// Bytes it has moved.
    pub bytes: u64,
    /// Slices it has moved.
    pub slices: u64,
    /// Work requests that its device has and has not ended.
    pub in_flight_slices: u64,
    /// Their bytes.
    pub in_flight_bytes: u64,
    /// Bytes that may be in flight, as far as its speed is known.
    pub cap_bytes: u64,
    /// Shortest round trip seen lately on a nearly empty rail.
    pub round_trip: Option<Duration>,
    /// Slices that came back from it without their bytes, for another rail or another try, or to end.
    pub returned: u64,
    /// First errors.
    pub first_errors: u64,
    /// Completions that were only echoes of a first error.
    pub flushes: u64,
    /// From the submission of a slice to its being posted here. Copies of callers' own threads are not among them.
    pub queue_time: Spread,
    /// From being posted to being known to be in place.
    pub wire_time: Spread,
    /// How often it was evicted.
    pub evictions: u64,
}

/// What one data core has counted since it started.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct CoreCounters {
    /// The core, counted from 0.
    pub core: u16,
    /// Work requests the devices accepted, trials of rails included.
    pub work_requests: u64,
    /// Chains posted: one doorbell each.
    pub doorbells: u64,
    /// Completions reaped, good and bad.
    pub completions: u64,
    /// Bytes of slices that are done.
    pub bytes: u64,
    /// Slices that are done.
    pub slices: u64,
    /// Slices that ended without their bytes.
    pub failed: u64,
    /// Slices that came back for another rail or another try.
    pub retries: u64,
    /// First errors of rails.
    pub first_errors: u64,
    /// Completions that were only echoes of a first error.
    pub flushes: u64,
    /// Work requests a device refused to take.
    pub refused: u64,
    /// Turns that did something.
    pub busy_turns: u64,
    /// Turns that found nothing to do.
    pub idle_turns: u64,
    /// Turns, among both, that were made by callers' own threads while they submitted, polled or waited.
    pub led_turns: u64,
    /// Times the core went to sleep.
    pub sleeps: u64,
}

/// Counters of every data core, and of what callers' own threads did.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Counters {
    /// By core.
    pub cores: Vec<CoreCounters>,
    /// Pieces that callers' threads copied through shared memory themselves, in `submit` or while they waited.
    pub copies: u64,
    /// Their bytes.
    pub copied_bytes: u64,
}

impl Counters {
    /// The sum over all cores; its `core` means nothing.
    pub fn total(&self) -> CoreCounters {
        self.cores.iter().fold(CoreCounters::default(), |sum, core| CoreCounters {
            core: 0,
            work_requests: sum.work_requests + core.work_requests,
            doorbells: sum.doorbells + core.doorbells,
            completions: sum.completions + core.completions,
            bytes: sum.bytes + core.bytes,
            slices: sum.slices + core.slices,
            failed: sum.failed + core.failed,
            retries: sum.retries + core.retries,
            first_errors: sum.first_errors + core.first_errors,
            flushes: sum.flushes + core.flushes,
            refused: sum.refused + core.refused,
            busy_turns: sum.busy_turns + core.busy_turns,
            idle_turns: sum.idle_turns + core.idle_turns,
            led_turns: sum.led_turns + core.led_turns,
            sleeps: sum.sleeps + core.sleeps,
        })
    }
}

/// A NIC as the engine keeps it.
pub(crate) struct OpenNic {
    pub(crate) nic: Arc<dyn Nic>,
    /// Of an RDMA NIC.
    pub(crate) port: Option<PortInfo>,
    pub(crate) cores: Vec<u16>,
    pub(crate) pins: bool,
    /// Bytes registered on it. Written when memory comes or goes.
    pub(crate) registered: AtomicU64,
}

/// What the handles (segments, batches) share with the engine. Outlives it as long as one of them does.
pub(crate) struct Shared {
    pub(crate) log: Log,
    pub(crate) control: Control,
    pub(crate) settings: Settings,
    /// No metadata server: names are addresses.
    pub(crate) peer_to_peer: bool,
    pub(crate) machine: Machine,
    pub(crate) nics: Vec<OpenNic>,
    /// The one of them that shares memory.
    pub(crate) shm: Option<Arc<dyn Nic>>,
    /// It was said that memory is no file which peers could map.
    pub(crate) fileless_told: AtomicBool,
    /// Threads that copy at once.
    pub(crate) lanes: Arc<Lanes>,
    /// What they may copy from and to.
    pub(crate) extents: Arc<Snapshot<Extents>>,
    pub(crate) copied: CopiedCounters,
    pub(crate) inboxes: Arc<[Arc<Inbox>]>,
    pub(crate) counters: Vec<Arc<Counting>>,
    pub(crate) clock: Clock,
    pub(crate) origin: Instant,
    /// Read by every submission to a core; written when memory comes or goes, and at the end.
    pub(crate) registry: RwLock<Registry>,
    /// Held while the table is published: the last change of it that the peers were told of.
    pub(crate) publishing: Mutex<u64>,
    pub(crate) live: Live,
    pub(crate) watch: Arc<Watch>,
    /// The process it was built in. In a child of that every call is refused before it takes a lock (who held it is not there)
    /// or touches what is the parent's, and nothing of it is ever dropped.
    pub(crate) process: Process,
}

impl Shared {
    /// Whether the caller's process is the one the engine was built in. One load.
    pub(crate) fn is_here(&self) -> bool {
        self.process.is_current()
    }

    /// Called by whatever is dropped in a forked child and may hold the last reference: closing a NIC, or a registration, would
    /// close the parent's.
    pub(crate) fn keep_for_good(self: &Arc<Self>) {
        std::mem::forget(self.clone());
    }

    pub(crate) fn registry(&self) -> RwLockReadGuard<'_, Registry> {
        self.registry.read().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn registry_mut(&self) -> RwLockWriteGuard<'_, Registry> {
        self.registry.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// A point in time on the engine's clock.
    pub(crate) fn at(&self, instant: Instant) -> Nanos {
        Nanos::from_duration(instant.saturating_duration_since(self.origin))
    }

    pub(crate) fn incidents(&self) -> Vec<IncidentInfo> {
        let now = self.origin.elapsed();
        self.control.incidents().into_iter().map(|incident| IncidentInfo::new(incident, now)).collect()
    }

    pub(crate) fn rails(&self) -> Vec<RailInfo> {
        let info = |rail: moonrail_control::RailReport| RailInfo {
            state: match &rail.trouble {
                Some(trouble) => format!("{}: {trouble}", state_name(rail.state)),
                None if rail.evicted => "evicted".to_owned(),
                None => state_name(rail.state).to_owned(),
            },
            usable: rail.state == RailState::Usable,
            nic: rail.local_nic,
            peer: rail.peer,
            peer_nic: rail.peer_nic,
            fabric: rail.fabric,
            core: rail.core.0,
            qps: rail.qps,
            path_mtu: rail.path_mtu,
            lives: rail.lives,
            moonrail: rail.moonrail,
            bytes: rail.counters.bytes.get(),
            slices: rail.counters.slices.get(),
            // What ended is read first: then none of it is missing among what was posted.
            in_flight_slices: in_flight(&rail.counters.ended, &rail.counters.work_requests),
            in_flight_bytes: in_flight(&rail.counters.ended_bytes, &rail.counters.posted_bytes),
            cap_bytes: rail.counters.cap_bytes.get(),
            round_trip: Some(rail.counters.round_trip_ns.get()).filter(|ns| *ns > 0).map(Duration::from_nanos),
            returned: rail.counters.returned.get(),
            first_errors: rail.counters.first_errors.get(),
            flushes: rail.counters.flushes.get(),
            queue_time: rail.counters.queue.read(),
            wire_time: rail.counters.wire.read(),
            evictions: rail.evictions,
        };
        self.control.rails().into_iter().map(info).collect()
    }

    pub(crate) fn nics(&self) -> Vec<NicInfo> {
        let info = |(at, nic): (usize, &OpenNic)| NicInfo {
            name: nic.nic.name().to_owned(),
            fabric: nic.nic.fabric(),
            port: nic.port.clone(),
            numa_node: nic.nic.device().numa_node,
            cores: nic.cores.clone(),
            registered: nic.registered.load(Ordering::Relaxed),
            evictions: self.control.evictions(at),
        };
        self.nics.iter().enumerate().map(info).collect()
    }

    pub(crate) fn counters(&self) -> Counters {
        let core = |(core, counting): (usize, &Arc<Counting>)| CoreCounters {
            core: core as u16,
            work_requests: counting.work_requests.get(),
            doorbells: counting.doorbells.get(),
            completions: counting.completions.get(),
            bytes: counting.bytes_done.get(),
            slices: counting.slices_done.get(),
            failed: counting.slices_failed.get(),
            retries: counting.slices_returned.get(),
            first_errors: counting.first_errors.get(),
            flushes: counting.flushes.get(),
            refused: counting.refused.get(),
            busy_turns: counting.busy_turns.get(),
            idle_turns: counting.idle_turns.get(),
            led_turns: counting.led_turns.get(),
            sleeps: counting.sleeps.get(),
        };
        let (copies, copied_bytes) = self.copied.total();
        Counters { cores: self.counters.iter().enumerate().map(core).collect(), copies, copied_bytes }
    }

    pub(crate) fn publishing(&self) -> MutexGuard<'_, u64> {
        self.publishing.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One node of the cluster. Share it with `Arc`; every method may be called from any thread.
///
/// Dropping it ends what is in flight, fences, deregisters and removes what it published, within 15 s; see
/// [`Engine::shutdown`].
///
/// It belongs to the process it was built in. In a child of fork() every call of it and of its segments and batches returns an
/// error that says so (or nothing, where there is no error to return), allocated regions are not mapped, and dropping does
/// nothing; the parent is not disturbed. A child may build an engine of its own.
pub struct Engine {
    pub(crate) shared: Arc<Shared>,
    threads: Mutex<Vec<JoinHandle<()>>>,
    ended: AtomicBool,
    metrics: Mutex<Option<Metrics>>,
    inspect: Mutex<Option<Server>>,
    page: Mutex<Option<http::Server>>,
}

impl Engine {
    pub(crate) fn new(
        shared: Shared,
        threads: Vec<JoinHandle<()>>,
        metrics: Option<Metrics>,
        page: Option<TcpListener>,
    ) -> Result<Self, BuildError> {
        let shared = Arc::new(shared);
        let engine = Self {
            inspect: Mutex::new(Server::start(&shared)),
            shared,
            threads: Mutex::new(threads),
            ended: AtomicBool::new(false),
            metrics: Mutex::new(metrics),
            page: Mutex::default(),
        };
        if let Some(listener) = page {
            let page = http::Server::start(listener, &engine.shared)
                .map_err(|source| BuildError::System { what: "the thread of the metrics page".into(), source })?;
            *engine.page.lock().unwrap_or_else(PoisonError::into_inner) = Some(page);
        }
        Ok(engine)
    }

    /// Starts with every option at its default, or what the MC_* environment variables say.
    pub fn builder() -> EngineBuilder {
        EngineBuilder::default()
    }

    /// Name of this node: what a peer opens. Without a metadata server it holds the port that was found.
    pub fn name(&self) -> &str {
        self.shared.control.name()
    }

    /// `HOST:PORT` of the handshake server, as peers are told to dial it.
    pub fn rpc_addr(&self) -> String {
        let meta = self.shared.control.rpc_addr();
        let host = &meta.ip_or_host_name;
        if host.contains(':') { format!("[{host}]:{}", meta.rpc_port) } else { format!("{host}:{}", meta.rpc_port) }
    }

    /// Where its page for Prometheus is, if it has one: see [`EngineBuilder::metrics_http`].
    pub fn metrics_addr(&self) -> Option<SocketAddr> {
        self.page.lock().unwrap_or_else(PoisonError::into_inner).as_ref().map(http::Server::addr)
    }

    /// The NICs in use.
    pub fn nics(&self) -> Vec<NicInfo> {
        self.shared.nics()
    }

    /// NUMA nodes of this machine, by number: `cpu:N` as location of memory.
    pub fn numa_nodes(&self) -> Vec<u16> {
        self.shared.machine.nodes.iter().map(|node| node.id).collect()
    }

    /// The rails that exist now.
    pub fn rails(&self) -> Vec<RailInfo> {
        self.shared.rails()
    }

    /// The last 256 incidents, oldest first.
    pub fn incidents(&self) -> Vec<IncidentInfo> {
        self.shared.incidents()
    }

    /// What the cores counted.
    pub fn counters(&self) -> Counters {
        self.shared.counters()
    }

    /// Time since the engine was built: the clock that [`IncidentInfo::at`] is on.
    pub fn uptime(&self) -> Duration {
        self.shared.origin.elapsed()
    }

    /// Over what transfers to a peer go, for each policy its segments were opened with, and why. Empty for a peer that was
    /// never opened.
    pub fn ways(&self, peer: &str) -> Vec<Way> {
        self.shared.control.ways(peer)
    }

    /// What is known of the way to a peer: over which fabric transfers go and why, a line per rail, and why there is none.
    pub fn explain(&self, peer: &str) -> Vec<String> {
        let way = |way: Way| {
            let fabric = way.fabric.map_or("nothing", Fabric::as_str);
            let asked = match way.policy {
                FabricPolicy { require: Some(only), .. } => format!(" (required: {only})"),
                FabricPolicy { prefer: Some(first), .. } => format!(" (preferred: {first})"),
                FabricPolicy { .. } => String::new(),
            };
            format!("over {fabric}{asked}: {}", way.why)
        };
        let mut lines: Vec<String> = self.ways(peer).into_iter().map(way).collect();
        let rails = self.rails().into_iter().filter(|rail| rail.peer == peer);
        lines.extend(rails.map(|rail| {
            let mtu = rail.path_mtu.map(|mtu| format!(", path MTU {mtu}")).unwrap_or_default();
            format!("{} to {}: {}, {} queue pairs{mtu}", rail.nic, rail.peer_nic, rail.state, rail.qps)
        }));
        lines.extend(self.shared.control.why(peer));
        lines
    }

    /// Maps `len` bytes of zeroed memory and registers them, open to peers. `location`: `cpu:N` puts them on that NUMA
    /// node; `*` lets the system choose and names the node afterwards. Blocks until they are registered and published.
    ///
    /// # Errors
    /// See [`RegisterError`]; nothing stays mapped then.
    pub fn allocate(&self, len: usize, location: &str) -> Result<Region, RegisterError> {
        if len == 0 {
            return Err(RegisterError::ZeroLength);
        }
        if !self.shared.is_here() {
            return Err(RegisterError::Forked);
        }
        let node = location.strip_prefix("cpu:").and_then(|node| node.parse().ok());
        let memory = Memory::allocate_on(len, node).map_err(|source| RegisterError::Allocate { len, source })?;
        let shared = &self.shared;
        if shared.shm.is_some() && memory.shared_fd().is_none() && !shared.fileless_told.swap(true, Ordering::Relaxed) {
            shared.log.warning(
                "memory allocated from here on is no file that peers of this host could map: memory holds a quarter of the \
                 file descriptors (RLIMIT_NOFILE) already, or this system has no memfd. They copy it through the kernel; \
                 allocate few large regions, or raise `ulimit -n`",
            );
        }
        self.register(&memory, location, true)
    }

    /// Registers memory of the embedder: `unsafe { Memory::borrow(base, len) }` states the promise that it stays
    /// mapped. Peers may READ and WRITE it if `remote`. `location` as in [`Engine::allocate`], but nothing is moved.
    /// Blocks until it is registered on every NIC and published.
    ///
    /// # Errors
    /// See [`RegisterError`]; nothing stays registered then.
    pub fn register(&self, memory: &Arc<Memory>, location: &str, remote: bool) -> Result<Region, RegisterError> {
        let mut regions = self.register_many(std::slice::from_ref(memory), location, remote)?;
        regions.pop().ok_or(RegisterError::ZeroLength)
    }

    /// As [`Engine::register`] for many ranges at once, all of them or none; returns their regions in the same order. What is registered
    /// is told to peers as a whole each time, so many ranges that are registered one by one cost as much as their number squared, and
    /// together about as much as their number. (Mooncake: `registerLocalMemoryBatch`.)
    ///
    /// # Errors
    /// See [`RegisterError`]; nothing stays registered then.
    pub fn register_many(
        &self,
        memories: &[Arc<Memory>],
        location: &str,
        remote: bool,
    ) -> Result<Vec<Region>, RegisterError> {
        self.shared.register(memories, location, remote)
    }

    /// Takes memory back: unpublishes it, waits until no transfer of ours uses it (at most 60 s), deregisters it. After
    /// that no NIC touches it, and borrowed memory may be unmapped.
    ///
    /// # Errors
    /// See [`UnregisterError`].
    pub fn unregister(&self, region: &Region) -> Result<(), UnregisterError> {
        self.unregister_at(region.addr())
    }

    /// As [`Engine::unregister`], by the address of the first byte.
    ///
    /// # Errors
    /// See [`UnregisterError`].
    pub fn unregister_at(&self, addr: u64) -> Result<(), UnregisterError> {
        self.shared.unregister(&[addr])
    }

    /// As [`Engine::unregister`] for many regions at once: they are unpublished together, all or none, and then waited for, at most 60 s in
    /// all. One that is named twice counts once. (Mooncake: `unregisterLocalMemoryBatch`.)
    ///
    /// # Errors
    /// See [`UnregisterError`]. [`UnregisterError::InUse`]: those before the one it names, by address, are free; that one and those
    /// behind it are no longer offered to peers, and stay registered until they are unregistered again.
    pub fn unregister_many(&self, regions: &[Region]) -> Result<(), UnregisterError> {
        let addrs: Vec<u64> = regions.iter().map(Region::addr).collect();
        self.shared.unregister(&addrs)
    }

    /// The registered regions, by address. None in a forked child.
    pub fn regions(&self) -> Vec<Region> {
        if self.shared.is_here() { self.shared.registry().regions() } else { Vec::new() }
    }

    /// Finds a peer's memory by the name the peer chose (or `HOST:PORT` without a metadata server), and begins to connect
    /// to it. Blocks for one metadata request, at most 20 s. The own name is a peer like others.
    ///
    /// # Errors
    /// See [`SegmentError`].
    pub fn open_segment(&self, name: &str) -> Result<Segment, SegmentError> {
        self.open(name, None)
    }

    /// As [`Engine::open_segment`], with a word on what may carry this segment's transfers in place of the engine's.
    ///
    /// # Errors
    /// See [`SegmentError`]. A fabric that is required and cannot be used is an error of the transfers, which names the
    /// cause.
    pub fn open_segment_with(&self, name: &str, policy: FabricPolicy) -> Result<Segment, SegmentError> {
        self.open(name, Some(policy))
    }

    fn open(&self, name: &str, policy: Option<FabricPolicy>) -> Result<Segment, SegmentError> {
        let (control, until) = (&self.shared.control, Instant::now() + OPEN_WITHIN);
        // An address without a port gets the configured one; what is no address is for control to refuse.
        let port = self.shared.settings.handshake_port;
        let address = HostPort::parse_with(name, port).ok().filter(|_| self.shared.peer_to_peer);
        let name = &address.map_or_else(|| name.to_owned(), |parsed| parsed.address.to_string());
        let found = if self.shared.settings.metadata_cache {
            control.open_segment(name, policy, until)
        } else {
            control.refresh_segment(name, policy, until)
        };
        let found = found.map_err(|source| SegmentError::open(name, source))?;
        Ok(Segment::new(self.shared.clone(), name.to_owned(), policy, found))
    }

    /// Submits transfers to one peer: all of them, or none. Their deadline is 30 s and 1 ns per byte, unless
    /// MC_TRANSFER_TIMEOUT says otherwise. Does not block, except as [`BatchBuilder::submit`] says.
    ///
    /// Transfers are unordered, within a batch and between batches; waiting is the only order. Ranges that overlap while
    /// in flight are the caller's error.
    ///
    /// # Errors
    /// See [`SubmitError`].
    pub fn submit(&self, segment: &Segment, transfers: &[Transfer]) -> Result<Batch, SubmitError> {
        match transfers {
            [only] => match self.shared.submit_one(segment, only) {
                Some(done) => Ok(done),
                None => self.shared.submit(&(segment, std::slice::from_ref(only)), None),
            },
            _ => self.shared.submit(&(segment, transfers), None),
        }
    }

    /// A batch to several peers, or with a deadline of its own.
    pub fn batch(&self) -> BatchBuilder<'_> {
        BatchBuilder { engine: self, transfers: Vec::new(), deadline: None }
    }

    /// Sends a message to a peer's application. Order towards transfers: wait for the batch first. Blocks until the peer
    /// has it, at most 20 s.
    ///
    /// # Errors
    /// See [`NotifyError`].
    pub fn notify(&self, segment: &Segment, name: &str, message: &str) -> Result<(), NotifyError> {
        let until = Instant::now() + NOTIFY_WITHIN;
        let sent = self.shared.control.notify(segment.name(), name, message, until);
        sent.map_err(|source| NotifyError::send(segment.name(), source))
    }

    /// The messages received since the last call, oldest first.
    pub fn notifications(&self) -> Vec<Notification> {
        self.shared.control.take_notifications().into_iter().map(Into::into).collect()
    }

    /// Ends the engine: takes no more work, ends what is under way, fences and unpublishes, ends the threads, deregisters;
    /// for at most `within` and a fifth of a second. Returns whether all of that was done; if not, a line of the log says
    /// what is left, and memory that a NIC may still touch stays registered. Called again it does nothing; nor does it in a forked
    /// child, where it returns `false`.
    pub fn shutdown(&self, within: Duration) -> bool {
        if !self.shared.is_here() {
            return false;
        }
        if self.ended.swap(true, Ordering::AcqRel) {
            return true;
        }
        let until = after(Instant::now(), within);
        let shared = &self.shared;
        shared.registry_mut().stop();
        drop(self.metrics.lock().unwrap_or_else(PoisonError::into_inner).take());
        drop(self.inspect.lock().unwrap_or_else(PoisonError::into_inner).take());
        drop(self.page.lock().unwrap_or_else(PoisonError::into_inner).take());
        let mut whole = shared.control.shutdown(until);
        let last = until.max(Instant::now()) + LAST_MOMENT;
        for thread in std::mem::take(&mut *self.threads.lock().unwrap_or_else(PoisonError::into_inner)) {
            if let Err(thread) = pin::join_until(thread, last) {
                let name = thread.thread().name().unwrap_or("a data core").to_owned();
                shared.log.line(Level::Error, &format!("{name} did not end in time and is left behind"));
                whole = false;
            }
        }
        shared.watch.stop();
        // Taken first: the registry is not locked while we wait, so that submitters are told and not held up.
        let entries = shared.registry_mut().take_all();
        for entry in entries {
            if !shared.quiet(&entry.registered, last) {
                let (addr, len) = (entry.region.addr(), entry.region.len());
                shared.log.line(
                    Level::Error,
                    &format!(
                        "{len} bytes at {addr:#x} are still in use by transfers and stay registered: keep them mapped"
                    ),
                );
                whole = false;
            }
        }
        whole
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        if !self.shared.is_here() {
            self.shared.keep_for_good();
            // Handles of threads that are the parent's. Without their locks, which one of those may hold.
            std::mem::forget(self.threads.get_mut().map(std::mem::take));
            std::mem::forget(self.metrics.get_mut().map(Option::take));
            return;
        }
        self.shutdown(DROP_WITHIN);
    }
}

impl fmt::Debug for Engine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Engine").field("name", &self.name()).finish_non_exhaustive()
    }
}

fn in_flight(ended: &Counter, posted: &Counter) -> u64 {
    let ended = ended.get();
    posted.get().saturating_sub(ended)
}

fn state_name(state: RailState) -> &'static str {
    match state {
        RailState::Down => "down",
        RailState::Connecting => "connecting",
        RailState::Waiting => "waiting",
        RailState::Trial => "trial",
        RailState::Usable => "up",
    }
}
