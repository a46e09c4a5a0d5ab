//! From a configuration to a running control thread: the port, the name, the NICs, the store.

use std::collections::hash_map::RandomState;
use std::hash::{BuildHasher, Hasher};
use std::net::TcpListener;
use std::sync::mpsc::channel;
use std::time::{Duration, Instant, SystemTime};

use moonrail_datapath::limits::{QP_SLOTS, QPS_PER_RAIL_MAX};
use moonrail_datapath::nic::{Fabric, PortState};
use moonrail_datapath::units::{CoreId, Nanos};

use crate::brain::{BeginError, Brain, BrainConfig, BrainNic};
use crate::config::{ControlConfig, ControlNic, LogLevel, LogRecord, PortChoice, RAILS_PER_NIC_MAX, RailOptions};
use crate::connect::{NicFacts, query};
use crate::driver::{Driver, Parts};
use crate::error::StartError;
use crate::gid::GidReason;
use crate::handle::Control;
use crate::metadata::{KeySpace, MetadataUri, RpcMeta, StoreClient, StoreUri, peer as p2p};
use crate::names::{self, Family, HostPort};
use crate::place::Place;
use crate::wire::Incarnation;

/// Binds the control port, publishes this node and starts the thread `mr-control`.
///
/// # Errors
/// See [`StartError`]; nothing stays published or running then.
pub fn start(config: ControlConfig) -> Result<Control, StartError> {
    check_options(&config)?;
    let nics = look_at_nics(&config)?;
    let seed = entropy();
    let listener = listen(&config)?;
    let port = listener.local_addr().map_err(|source| StartError::Listen { port: 0, source })?.port();
    let (name, rpc) = address(&config, port)?;
    let store = match &config.metadata {
        MetadataUri::PeerToPeer => None,
        MetadataUri::Store(uri) => Some(StoreClient::open(uri, &config.store)?),
    };
    let span = Nanos::from_duration;
    let rails = RailOptions { rails_per_nic: rails_per_nic(&config), ..config.rails.clone() };
    let incarnation = Incarnation(entropy());
    let brain = Brain::new(BrainConfig {
        name: name.clone(),
        store: store.as_ref().map(|_| KeySpace::new(&config.cluster_id)),
        metadata: in_words(&config.metadata),
        rpc: rpc.clone(),
        incarnation,
        boot_id: std::fs::read_to_string("/proc/sys/kernel/random/boot_id").ok().map(|id| id.trim().to_owned()),
        seed,
        epoch: SystemTime::now() - (config.clock)().to_duration(),
        nics,
        cores: config.cores.len() as u16,
        matrix: config.matrix.clone(),
        rails,
        fabrics: config.fabrics,
        dial_timeout: span(config.handshake.connect_timeout).plus(span(config.handshake.reply_timeout)),
        store_timeout: span(config.store.deadline).plus(Nanos::from_secs(1)),
    });
    let mode = match (&config.metadata, config.handshake.port) {
        (MetadataUri::PeerToPeer, _) => "P2P handshake",
        (_, PortChoice::Fixed(_)) => "legacy/P2P",
        (_, PortChoice::Range(..)) => "new RPC mapping",
    };
    let place = HostPort { host: rpc.ip_or_host_name.clone(), port };
    let text = format!("Transfer Engine RPC using {mode}, listening on {place}");
    (config.log)(LogRecord { level: LogLevel::Info, text });

    let (questions, asked) = channel();
    let (doorbell, clock) = (config.doorbell.clone(), config.clock.clone());
    let control = Control::assemble(name, rpc, incarnation, questions, doorbell, clock, brain.evictions());
    // Two puts, and on an HTTP store with a stale address of ours the whole detour.
    let patience = config.store.deadline * 4 + config.handshake.connect_timeout + config.handshake.reply_timeout;
    spawn(config, Parts { brain, listener, store, questions: asked })?;
    match control.begin(Instant::now() + patience) {
        Ok(()) => Ok(control),
        Err(error) => {
            control.shutdown(Instant::now() + Duration::from_secs(1));
            Err(match error {
                BeginError::Store(error) => error.into(),
                BeginError::Control(error) => error.into(),
            })
        }
    }
}

fn spawn(config: ControlConfig, parts: Parts) -> Result<(), StartError> {
    let resources = |source| StartError::Resources { source };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_io()
        .enable_time()
        .max_blocking_threads(2)
        .thread_name("mr-store")
        .build()
        .map_err(resources)?;
    let log = config.log.clone();
    let driver = Driver::new(config, parts).map_err(resources)?;
    let body = move || {
        if let Err(error) = runtime.block_on(driver.run()) {
            let text =
                format!("the control thread failed: {error}; this engine cannot connect any more, make a new one");
            log(LogRecord { level: LogLevel::Error, text });
        }
        // What still waits for a store or a resolver is not waited for.
        runtime.shutdown_background();
    };
    std::thread::Builder::new().name("mr-control".to_owned()).spawn(body).map_err(resources)?;
    Ok(())
}

fn check_options(config: &ControlConfig) -> Result<(), StartError> {
    let refuse = |option, range: &str| Err(StartError::Option { option, range: range.to_owned() });
    let rails = &config.rails;
    if !(1..=QPS_PER_RAIL_MAX).contains(&rails.qps_per_rail) {
        return refuse("queue pairs per rail (MC_NUM_QP_PER_EP)", &format!("1 to {QPS_PER_RAIL_MAX}"));
    }
    if !(1..=QPS_PER_RAIL_MAX).contains(&rails.tcp_lanes) {
        return refuse("connections per TCP rail (MC_TCP_LANES_PER_PEER)", &format!("1 to {QPS_PER_RAIL_MAX}"));
    }
    if !(1..=RAILS_PER_NIC_MAX).contains(&rails.rails_per_nic) {
        return refuse("rails per NIC (MC_MAX_EP_PER_CTX)", &format!("1 to {RAILS_PER_NIC_MAX}"));
    }
    if rails.timeout > 31 || rails.retry_cnt > 7 || rails.service_level > 15 {
        return refuse("ACK timeout, transport retries, service level", "at most 31, 7 and 15");
    }
    if rails.max_send_wr == 0 || rails.max_send_sge == 0 {
        return refuse("send queue entries and gather entries (MC_MAX_WR, MC_MAX_SGE)", "at least 1");
    }
    if config.cores.is_empty() || config.cores.len() > 64 {
        return refuse("cores", "1 to 64");
    }
    Ok(())
}

/// The limit that was asked for, lowered to what the devices have queue pairs for, and to three quarters of what the cores
/// have places for: the rest is for rails in use beyond the limit.
fn rails_per_nic(config: &ControlConfig) -> usize {
    let polls = |nic: &ControlNic, core: usize| nic.cqs.get(core).is_some_and(Option::is_some);
    let room = |nic: &ControlNic| {
        let qps = match nic.nic.fabric() {
            Fabric::Rdma => config.rails.qps_per_rail,
            Fabric::Tcp => config.rails.tcp_lanes,
            // One rail to each process of this host: never evicted.
            Fabric::Shm => return None,
        };
        let sharing = |core: usize| config.nics.iter().filter(|nic| polls(nic, core)).count();
        let places = (0..config.cores.len()).filter(|core| polls(nic, *core)).map(|core| QP_SLOTS / sharing(core));
        // A device that does not say how many it has has enough.
        let device = Some(nic.nic.device().max_qp as usize).filter(|most| *most > 0).unwrap_or(usize::MAX);
        let places = Some(places.sum::<usize>() / 4 * 3).filter(|places| *places > 0)?;
        Some((places.min(device) / qps).max(1))
    };
    config.nics.iter().filter_map(room).fold(config.rails.rails_per_nic, usize::min)
}

fn look_at_nics(config: &ControlConfig) -> Result<Vec<BrainNic>, StartError> {
    let mut nics = Vec::with_capacity(config.nics.len());
    let mut inactive = None;
    for nic in &config.nics {
        let device = nic.nic.name().to_owned();
        let polls = nic.cqs.iter().enumerate().filter(|(_, cq)| cq.is_some()).map(|(core, _)| CoreId(core as u16));
        let cores = polls.collect();
        let (fabric, offer) = (nic.nic.fabric(), nic.nic.offer());
        let Some(gid) = &nic.gid else {
            let facts = NicFacts::of_dialled();
            nics.push(BrainNic { name: device, fabric, offer, facts, fixed_gid: false, cores });
            continue;
        };
        let fixed_gid = gid.reason == GidReason::Fixed;
        let facts = query(nic.nic.as_ref(), (gid.gid, gid.kind), (gid.gid, gid.kind), !fixed_gid)
            .map_err(|error| StartError::Nic { device: device.clone(), source: std::io::Error::other(error) })?;
        if facts.gid.is_zero() && facts.lid.0 == 0 {
            return Err(StartError::ZeroGid { device });
        }
        if facts.state != PortState::Active {
            inactive.get_or_insert((device.clone(), nic.nic.port_num(), facts.state));
        }
        nics.push(BrainNic { name: device, fabric, offer, facts, fixed_gid, cores });
    }
    // A NIC that is down may come up; none that is up is an error to be told at once.
    match inactive {
        Some((device, port, state)) if nics.iter().all(|nic| nic.facts.state != PortState::Active) => {
            Err(StartError::PortNotActive { device, port, state })
        }
        _ => Ok(nics),
    }
}

fn listen(config: &ControlConfig) -> Result<TcpListener, StartError> {
    let family = if config.handshake.ipv6 { Family::V6 } else { Family::V4 };
    // A stock peer looks our port up once and keeps it for life: a node that comes back under its name comes back on the
    // same port, if that is free. Without a store the port is part of the name, and one that another node had means that one.
    let seed = match &config.metadata {
        MetadataUri::PeerToPeer => entropy(),
        MetadataUri::Store(_) => of_name(config.name.trim()),
    };
    let listener = match config.handshake.port {
        PortChoice::Fixed(port) => names::listen_on(port, family)?,
        PortChoice::Range(first, last) => names::listen_in(first..=last, family, seed)?,
    };
    // The standard library asks for 128 waiting connections; a second listen(2) on the same socket only changes that.
    let backlog = i32::try_from(config.handshake.backlog).unwrap_or(i32::MAX).max(1);
    rustix::net::listen(&listener, backlog)
        .map_err(|e| StartError::Listen { port: listener.local_addr().map_or(0, |a| a.port()), source: e.into() })?;
    Ok(listener)
}

/// The name peers open, and the address they dial.
fn address(config: &ControlConfig, port: u16) -> Result<(String, RpcMeta), StartError> {
    let given = config.name.trim();
    let place = Place {
        name: given,
        metadata: &config.metadata,
        publish: config.handshake.publish.as_deref(),
        fixed_port: matches!(config.handshake.port, PortChoice::Fixed(_)),
        ipv6: config.handshake.ipv6,
    };
    let published = place.host()?;
    if let Some(warning) = published.warning {
        (config.log)(LogRecord { level: LogLevel::Warning, text: warning.to_string() });
    }
    let name = match config.metadata {
        MetadataUri::PeerToPeer => p2p::own_name(given, port)?,
        MetadataUri::Store(_) => given.to_owned(),
    };
    Ok((name, RpcMeta { ip_or_host_name: published.host, rpc_port: port }))
}

fn in_words(metadata: &MetadataUri) -> String {
    match metadata {
        MetadataUri::PeerToPeer => "the peer itself (P2PHANDSHAKE)".to_owned(),
        MetadataUri::Store(StoreUri::Etcd(endpoints)) => format!("etcd at {}", endpoints.join(",")),
        MetadataUri::Store(StoreUri::Http(base)) => base.clone(),
        MetadataUri::Store(StoreUri::Memory(name)) => format!("memory://{name}"),
    }
}

/// The same 64 bits for the same name, in every process (FNV-1a).
fn of_name(name: &str) -> u64 {
    name.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
}

/// 64 bits that no other process draws: the standard library's hash keys come from the system's generator.
fn entropy() -> u64 {
    let mut hasher = RandomState::new().build_hasher();
    hasher.write_u32(std::process::id());
    hasher.finish()
}
