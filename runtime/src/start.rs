//! Building an engine, step by step; each step that fails undoes those before.

use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::sync::{Arc, Mutex, RwLock};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use moonrail_control::metadata::MetadataUri;
use moonrail_control::metadata::store::{Credentials, TlsFiles as StoreTls};
use moonrail_control::names::{Family, HostPort, published_address};
use moonrail_control::{
    Clock, ControlConfig, ControlNic, CoreLink, HandshakeOptions, LogLevel, PortChoice, RailOptions, StoreOptions,
};
use moonrail_datapath::core::{self, Command, Core, CoreConfig, CoreCounters, Doorbell, Inbox, Outbox, Remains};
use moonrail_datapath::lanes::Snapshot;
use moonrail_datapath::nic::{CompletionQueue, CqHandle, Fabric};
use moonrail_datapath::region::process::Process;
use moonrail_datapath::units::{CoreId, Nanos, NicId};

use crate::builder::{EngineBuilder, PollMode};
use crate::config::{Environment, Settings};
use crate::engine::{Engine, OpenNic, Shared};
use crate::error::BuildError;
use crate::live::{Live, Watch};
use crate::log::{self, Level, Log};
use crate::open::{self, Opened};
use crate::place::{CorePlace, place_cores};
use crate::registry::{Extents, Registry};
use crate::submit::CopiedCounters;
use crate::topology::Machine;
use crate::{inspect, metrics, pin};

pub(crate) fn start(builder: EngineBuilder) -> Result<Engine, BuildError> {
    let read = builder.environment_read();
    let mut env = Environment::new(&read);
    let settings = Settings::resolve(&builder.given, &mut env)?;
    let log = make_log(&builder, &settings, &mut env);
    for warning in &env.warnings {
        log.warning(warning);
    }
    if let Some(line) = env.ignored() {
        log.info(line);
    }

    let machine = Machine::read(Path::new("/sys"));
    let EngineBuilder { name, metadata, user, tls, wanted, cores, cpus, unpinned, poll_mode, metrics_http, .. } =
        builder;
    let page = metrics_http
        .map(|addr| inspect::http::Server::bind(addr).map_err(|source| BuildError::MetricsAddress { addr, source }));
    let page = page.transpose()?;
    let uri = MetadataUri::parse(metadata.as_deref().unwrap_or("P2PHANDSHAKE"))
        .map_err(|error| BuildError::Metadata { source: Box::new(error) })?;
    let peer_to_peer = uri == MetadataUri::PeerToPeer;
    let opened = open::open(wanted, &settings, &machine, &log)?;
    let places = place_cores(cores, cpus, unpinned, &machine, &opened, &log)?;

    let origin = Instant::now();
    let clock: Clock = Arc::new(move || Nanos::from_duration(origin.elapsed()));
    let doorbell = Arc::new(Doorbell::new().map_err(|source| system("the control thread's eventfd", source))?);
    let parts = make_cores(&opened, &places, &settings, &doorbell)?;
    let counters: Vec<Arc<CoreCounters>> = parts.configs.iter().map(|config| config.counters.clone()).collect();
    let threads = spawn_cores(parts.configs, &places, poll_mode, &clock, &log, &parts.inboxes)?;

    let config = ControlConfig {
        name: name.unwrap_or_else(|| own_name(peer_to_peer, settings.ipv6)),
        metadata: uri,
        store: StoreOptions {
            credentials: user.map(|(user, password)| Credentials { user, password }),
            tls: tls.map(|files| StoreTls { ca: files.ca, identity: files.identity, server_name: files.domain }),
            ..StoreOptions::default()
        },
        cluster_id: settings.cluster_id.clone(),
        nics: parts.control_nics,
        cores: parts.links,
        doorbell,
        matrix: opened.matrix,
        handshake: HandshakeOptions::default(),
        rails: rail_options(&settings),
        fabrics: settings.policy,
        clock: clock.clone(),
        log: control_log(&log),
    };
    let config = ControlConfig { handshake: handshake_options(&settings, &config.name), ..config };
    let control = match moonrail_control::start(config) {
        Ok(control) => control,
        Err(source) => {
            stop_cores(&parts.inboxes, threads);
            return Err(BuildError::Control { source: Box::new(source) });
        }
    };

    let nics: Vec<OpenNic> = opened
        .nics
        .into_iter()
        .enumerate()
        .map(|(index, usable)| OpenNic {
            cores: places.iter().enumerate().filter(|(_, p)| p.nics.contains(&index)).map(|(c, _)| c as u16).collect(),
            nic: usable.nic,
            port: usable.port.map(|port| port.info),
            pins: usable.pins,
            registered: AtomicU64::new(0),
        })
        .collect();
    let shm = nics.iter().find(|nic: &&OpenNic| nic.nic.fabric() == Fabric::Shm).map(|nic| nic.nic.clone());
    let metrics = settings.metrics.map(|every| metrics::start(every, counters.clone(), log.clone()));
    // Those of the NIC whose memory is copied: to enter them once is enough.
    let lanes = shm.as_ref().and_then(|nic| nic.lanes()).unwrap_or_default();
    let extents = Arc::new(Snapshot::new(lanes.clone(), Extents::default()));
    let shared = Shared {
        fileless_told: AtomicBool::new(false),
        log,
        control,
        settings,
        peer_to_peer,
        machine,
        nics,
        shm,
        copied: CopiedCounters::default(),
        lanes,
        extents: extents.clone(),
        inboxes: parts.inboxes,
        counters,
        clock,
        origin,
        registry: RwLock::new(Registry::new(extents)),
        publishing: Mutex::default(),
        live: Live::default(),
        process: Process::current(),
        watch: Arc::new(Watch::default()),
    };
    Engine::new(shared, threads, metrics, page)
}

fn system(what: impl Into<String>, source: std::io::Error) -> BuildError {
    BuildError::System { what: what.into(), source }
}

pub(crate) fn make_log(builder: &EngineBuilder, settings: &Settings, env: &mut Environment<'_>) -> Log {
    let sink = match (&builder.sink, &settings.log_dir) {
        (Some(sink), _) => sink.clone(),
        (None, Some(folder)) => log::file_in(folder).unwrap_or_else(|_| {
            let path = folder.display();
            env.warnings.push(format!("Path [{path}] is not a valid directory path. Still logging to stderr."));
            log::stderr()
        }),
        (None, None) => log::stderr(),
    };
    Log::new(settings.log_level, sink)
}

fn control_log(log: &Log) -> moonrail_control::LogSink {
    let log = log.clone();
    Arc::new(move |record| {
        let level = match record.level {
            LogLevel::Info => Level::Info,
            LogLevel::Warning => Level::Warning,
            LogLevel::Error => Level::Error,
        };
        log.line(level, &record.text);
    })
}

/// The name of a node that was given none. Without a metadata server it has to be an address that others can dial: the
/// host's name may resolve to loopback, or not at all.
pub(crate) fn own_name(peer_to_peer: bool, ipv6: bool) -> String {
    if !peer_to_peer {
        return host_name();
    }
    let (family, loopback) = if ipv6 { (Family::V6, "::1") } else { (Family::V4, "127.0.0.1") };
    published_address(None, family).map_or_else(|| loopback.to_owned(), |address| address.to_string())
}

fn host_name() -> String {
    std::fs::read_to_string("/proc/sys/kernel/hostname")
        .map(|name| name.trim().to_owned())
        .ok()
        .filter(|name| !name.is_empty())
        .unwrap_or_else(|| "localhost".to_owned())
}

struct Parts {
    inboxes: Arc<[Arc<Inbox>]>,
    links: Vec<CoreLink>,
    configs: Vec<CoreConfig>,
    control_nics: Vec<ControlNic>,
}

fn make_cores(
    opened: &Opened,
    places: &[CorePlace],
    settings: &Settings,
    doorbell: &Arc<Doorbell>,
) -> Result<Parts, BuildError> {
    let inboxes: Arc<[Arc<Inbox>]> = (0..places.len())
        .map(|core| Inbox::new(CoreId(core as u16)))
        .collect::<Result<Vec<_>, _>>()
        .map_err(|source| system("a data core's eventfd", source))?
        .into();
    let links: Vec<CoreLink> =
        inboxes.iter().map(|inbox| CoreLink { inbox: inbox.clone(), outbox: Outbox::new(doorbell.clone()) }).collect();
    let mut queues: Vec<Vec<(NicId, Box<dyn CompletionQueue>)>> = places.iter().map(|_| Vec::new()).collect();
    let mut control_nics = Vec::new();
    for (index, usable) in opened.nics.iter().enumerate() {
        let device = usable.nic.device();
        let depth = if device.max_cqe > 0 { settings.cq_depth.min(device.max_cqe) } else { settings.cq_depth };
        let mut cqs: Vec<Option<CqHandle>> = vec![None; places.len()];
        for (core, _) in places.iter().enumerate().filter(|(_, place)| place.nics.contains(&index)) {
            let (queue, handle) = usable.nic.create_cq(depth).map_err(|source| {
                system(format!("a completion queue of {depth} entries on NIC {}", usable.nic.name()), source)
            })?;
            queues[core].push((NicId(index as u16), queue));
            cqs[core] = Some(handle);
        }
        let gid = usable.port.as_ref().map(|port| port.gid.clone());
        control_nics.push(ControlNic { nic: usable.nic.clone(), gid, cqs });
    }
    let configs = queues
        .into_iter()
        .enumerate()
        .map(|(core, nics)| CoreConfig {
            id: CoreId(core as u16),
            inbox: inboxes[core].clone(),
            outbox: links[core].outbox.clone(),
            cores: inboxes.clone(),
            nics,
            counters: Arc::new(CoreCounters::default()),
        })
        .collect();
    Ok(Parts { inboxes, links, configs, control_nics })
}

fn spawn_cores(
    configs: Vec<CoreConfig>,
    places: &[CorePlace],
    mode: PollMode,
    clock: &Clock,
    log: &Log,
    inboxes: &[Arc<Inbox>],
) -> Result<Vec<JoinHandle<()>>, BuildError> {
    let mode = match mode {
        PollMode::Busy => core::PollMode::Busy,
        PollMode::Adaptive => core::PollMode::default(),
    };
    let mut threads = Vec::new();
    for (config, place) in configs.into_iter().zip(places) {
        let name = format!("mr-core-{}", config.id);
        let (clock, log_pin, log) = (clock.clone(), log.clone(), log.clone());
        let told = name.clone();
        let unpinned = move |cpu| {
            log_pin.warning(format!(
                "{told} could not be pinned to CPU {cpu} and may be moved: check cpusets and taskset"
            ));
        };
        let body_name = name.clone();
        let body = move || {
            // Allocated on its own thread, so that its memory lies on its own node.
            let core = Box::new(Core::new(config));
            let told = |remains| {
                let follows = match remains {
                    Remains::GivesBack => "what it carried ends as \"core lost\", and it uses its NICs no more",
                    Remains::Nothing => "its transfers do not end",
                };
                let text = format!("{body_name} has panicked: {follows}; restart this process and report the panic");
                log.line(Level::Error, &text);
            };
            core::run(core, mode, &*clock, &told);
        };
        match pin::spawn(name, place.cpu, unpinned, body) {
            Ok(thread) => threads.push(thread),
            Err(source) => {
                stop_cores(inboxes, threads);
                return Err(system("a data core's thread", source));
            }
        }
    }
    Ok(threads)
}

/// Ends cores that never saw a queue pair.
fn stop_cores(inboxes: &[Arc<Inbox>], threads: Vec<JoinHandle<()>>) {
    for inbox in inboxes {
        // Cannot be full: nothing was ever put in.
        let _ = inbox.command(Command::Stop);
    }
    let until = Instant::now() + Duration::from_secs(5);
    for thread in threads {
        let _ = pin::join_until(thread, until);
    }
}

fn rail_options(settings: &Settings) -> RailOptions {
    RailOptions {
        qps_per_rail: settings.qps_per_rail,
        rails_per_nic: settings.rails_per_nic,
        eviction: settings.eviction,
        tcp_lanes: settings.tcp_lanes,
        tcp_v1: settings.tcp_v1,
        mtu_max: settings.mtu,
        pkey_index: settings.pkey_index,
        traffic_class: settings.traffic_class,
        service_level: settings.service_level,
        max_send_wr: settings.max_wr,
        max_send_sge: settings.max_sge,
        max_inline: settings.max_inline,
        same_name_only: settings.same_name_only,
        peer_affinity: settings.peer_affinity.clone(),
        ..RailOptions::default()
    }
}

fn handshake_options(settings: &Settings, name: &str) -> HandshakeOptions {
    let port = if settings.rpc_port_from_name {
        PortChoice::Fixed(
            HostPort::parse_with(name, settings.handshake_port).map_or(settings.handshake_port, |own| own.address.port),
        )
    } else {
        PortChoice::Range(settings.rpc_ports.0, settings.rpc_ports.1)
    };
    HandshakeOptions {
        publish: settings.publish_host.clone(),
        port,
        ipv6: settings.ipv6,
        backlog: settings.handshake_backlog,
        connect_timeout: settings.handshake_connect_timeout,
        max_length: settings.handshake_max_length,
        ..HandshakeOptions::default()
    }
}
