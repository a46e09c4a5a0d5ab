//! What the control thread is told when it starts.

use std::sync::Arc;
use std::time::Duration;

use moonrail_datapath::core::port::{Doorbell, Inbox, Outbox};
use moonrail_datapath::nic::{CqHandle, Nic};
use moonrail_datapath::units::{Mtu, Nanos};

use crate::fabric::FabricPolicy;
use crate::gid::GidChoice;
use crate::metadata::{MetadataUri, PriorityMatrix, StoreOptions};

/// Tells the time of the engine: the same clock that deadlines of Works are in.
pub type Clock = Arc<dyn Fn() -> Nanos + Send + Sync>;

/// Takes the log lines of the control thread. Called on that thread, so what blocks in it holds up connections.
pub type LogSink = Arc<dyn Fn(LogRecord) + Send + Sync>;

/// How much a line matters.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum LogLevel {
    /// Normal events that an operator greps for.
    Info,
    /// Something failed and is being repaired.
    Warning,
    /// Something failed and stays so until somebody acts.
    Error,
}

/// One line for the log.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct LogRecord {
    /// How much it matters.
    pub level: LogLevel,
    /// The line, without a newline.
    pub text: String,
}

/// Everything [`crate::start`] needs.
#[derive(Clone)]
pub struct ControlConfig {
    /// Name of this node as given (`local_server_name`). Peer-to-peer, only its host part is used, and
    /// [`crate::Control::name`] tells the real name.
    pub name: String,
    /// Where the metadata is.
    pub metadata: MetadataUri,
    /// How to talk to the store: credentials, TLS, deadline, life of our keys.
    pub store: StoreOptions,
    /// Separates clusters that share a store (`MC_METADATA_CLUSTER_ID`); empty = none.
    pub cluster_id: String,
    /// The NICs, in the order of [`moonrail_datapath::units::NicId`].
    pub nics: Vec<ControlNic>,
    /// The cores, in the order of [`moonrail_datapath::units::CoreId`].
    pub cores: Vec<CoreLink>,
    /// The doorbell the cores' outboxes were made with; the control thread sleeps on it.
    pub doorbell: Arc<Doorbell>,
    /// Which NICs serve which memory, as published. Empty: every NIC for `cpu:0`.
    pub matrix: PriorityMatrix,
    /// The control port.
    pub handshake: HandshakeOptions,
    /// The rails.
    pub rails: RailOptions,
    /// What may carry transfers, unless a segment is opened with a policy of its own.
    pub fabrics: FabricPolicy,
    /// The engine's clock.
    pub clock: Clock,
    /// Where log lines go.
    pub log: LogSink,
}

/// One NIC, opened by the runtime.
#[derive(Clone)]
pub struct ControlNic {
    /// The device.
    pub nic: Arc<dyn Nic>,
    /// Its GID. The value is what counts; the index is looked up again before every connection. `None`: it is dialled.
    pub gid: Option<GidChoice>,
    /// By core: the completion queue on which that core polls this NIC; `None` where it does not.
    pub cqs: Vec<Option<CqHandle>>,
}

/// The rings of one core.
#[derive(Clone)]
pub struct CoreLink {
    /// Down.
    pub inbox: Arc<Inbox>,
    /// Up.
    pub outbox: Arc<Outbox>,
}

/// Which port the handshake server takes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum PortChoice {
    /// A free one, drawn from the range, both ends included.
    Range(u16, u16),
    /// This one.
    Fixed(u16),
}

/// The control port and the connections through it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct HandshakeOptions {
    /// Host that is published for peers to dial (`MC_TCP_BIND_ADDRESS`). `None`: the host part of the name
    /// (peer-to-peer or fixed port), else the first address of an interface that is up and not loopback.
    pub publish: Option<String>,
    /// Port (15000 to 17000, as upstream).
    pub port: PortChoice,
    /// Bind, publish and dial IPv6 (`MC_USE_IPV6`).
    pub ipv6: bool,
    /// Connections the kernel holds for us while we are busy (`MC_HANDSHAKE_LISTEN_BACKLOG`).
    pub backlog: u32,
    /// For one TCP connection (`MC_HANDSHAKE_CONNECT_TIMEOUT`).
    pub connect_timeout: Duration,
    /// For a peer's whole reply.
    pub reply_timeout: Duration,
    /// For a client of ours to send its whole request and take the reply.
    pub client_timeout: Duration,
    /// Clients served at once; more wait in the backlog.
    pub max_clients: usize,
    /// Longest message accepted (`MC_HANDSHAKE_MAX_LENGTH`).
    pub max_length: usize,
}

impl Default for HandshakeOptions {
    fn default() -> Self {
        Self {
            publish: None,
            port: PortChoice::Range(15_000, 17_000),
            ipv6: false,
            backlog: 4096,
            connect_timeout: Duration::from_secs(5),
            reply_timeout: Duration::from_secs(10),
            client_timeout: Duration::from_secs(10),
            max_clients: 4096,
            max_length: crate::wire::frame::DEFAULT_MAX,
        }
    }
}

/// How rails are made.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct RailOptions {
    /// Queue pairs per rail (`MC_NUM_QP_PER_EP`), 1 to [`moonrail_datapath::limits::QPS_PER_RAIL_MAX`].
    pub qps_per_rail: usize,
    /// Connections per TCP rail (`MC_TCP_LANES_PER_PEER`), in the same range.
    pub tcp_lanes: usize,
    /// Use version 1 of the TCP data protocol towards stock peers (`MC_TCP_PROTO`).
    pub tcp_v1: bool,
    /// Largest path MTU used (`MC_MTU`).
    pub mtu_max: Mtu,
    /// Index in the partition table (`MC_PKEY_INDEX`).
    pub pkey_index: u16,
    /// DSCP and ECN byte (`MC_IB_TC`).
    pub traffic_class: u8,
    /// Service level (`MC_IB_SL`).
    pub service_level: u8,
    /// Routers a packet may pass.
    pub hop_limit: u8,
    /// ACK timeout code.
    pub timeout: u8,
    /// Transport retries.
    pub retry_cnt: u8,
    /// READs outstanding at once on a queue pair, lowered to what the device can.
    pub rd_atomic: u8,
    /// Send-queue entries (`MC_MAX_WR`), lowered to what the device can.
    pub max_send_wr: u32,
    /// Gather entries per request (`MC_MAX_SGE`).
    pub max_send_sge: u32,
    /// Inline bytes (`MC_MAX_INLINE`).
    pub max_inline: u32,
    /// Use only the peer NIC of the same name where there is one (`MC_ENABLE_DEST_DEVICE_AFFINITY`).
    pub same_name_only: bool,
    /// Peer NICs to use with a local one (`MC_NIC_PEER_AFFINITY`), by name; empty = no restriction.
    pub peer_affinity: Vec<(String, Vec<String>)>,
    /// Rails one RDMA or TCP NIC keeps connected (`MC_MAX_EP_PER_CTX`), 1 to [`RAILS_PER_NIC_MAX`], lowered to what the
    /// devices and cores have room for. Rails in use are never evicted, so there may be more while there is more use.
    pub rails_per_nic: usize,
    /// Which of those over the limit go first (`MC_ENDPOINT_STORE_TYPE`).
    pub eviction: Eviction,
}

/// Upper end of [`RailOptions::rails_per_nic`], and its default: as upstream's.
pub const RAILS_PER_NIC_MAX: usize = 65_536;

/// Which idle rail is evicted first.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub enum Eviction {
    /// The one that was used least recently (upstream's SIEVE comes near to that).
    #[default]
    LeastRecentlyUsed,
    /// The one that was connected first (upstream's FIFO).
    Oldest,
}

impl Default for RailOptions {
    fn default() -> Self {
        Self {
            qps_per_rail: 2,
            tcp_lanes: 4,
            tcp_v1: false,
            mtu_max: Mtu::B4096,
            pkey_index: 0,
            traffic_class: 0,
            service_level: 0,
            hop_limit: 16,
            timeout: moonrail_datapath::limits::ACK_TIMEOUT,
            retry_cnt: moonrail_datapath::limits::RETRY_CNT,
            rd_atomic: 16,
            max_send_wr: moonrail_datapath::limits::SQ_DEPTH,
            max_send_sge: 4,
            max_inline: 64,
            same_name_only: false,
            peer_affinity: Vec::new(),
            rails_per_nic: RAILS_PER_NIC_MAX,
            eviction: Eviction::default(),
        }
    }
}
