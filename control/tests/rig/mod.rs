//! Whole nodes without an engine: simulated NICs, real cores on threads, a real control thread with real sockets.
#![allow(dead_code)] // each test binary uses a part

use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use moonrail_control::fabric::FabricPolicy;
use moonrail_control::gid;
use moonrail_control::metadata::PriorityMatrix;
use moonrail_control::{
    Control, ControlConfig, ControlNic, CoreLink, HandshakeOptions, LogRecord, MetadataUri, PortChoice, RailOptions,
    RailState, StartError, StoreOptions, start,
};
use moonrail_datapath::core::{Core, CoreConfig, CoreCounters, Doorbell, Inbox, Outbox, PollMode, run};
use moonrail_datapath::nic::Nic;
use moonrail_datapath::nic::sim::{SimNicId, SimWorld};
use moonrail_datapath::units::{CoreId, Gid, Nanos, NicId};

pub(crate) struct Node {
    pub(crate) control: Control,
    pub(crate) log: Arc<Mutex<Vec<LogRecord>>>,
    pub(crate) nics: Vec<SimNicId>,
    cores: Vec<JoinHandle<()>>,
}

pub(crate) fn gid(node: u8, nic: u8) -> Gid {
    let mut bytes = [0; 16];
    (bytes[10], bytes[11], bytes[12], bytes[14], bytes[15]) = (0xff, 0xff, 10, nic, node);
    Gid(bytes)
}

pub(crate) struct Options {
    pub(crate) name: String,
    pub(crate) metadata: String,
    pub(crate) nics: u8,
    pub(crate) cores: u16,
    pub(crate) handshake: HandshakeOptions,
    pub(crate) rails: RailOptions,
    pub(crate) store: StoreOptions,
}

impl Options {
    pub(crate) fn new(metadata: &str) -> Self {
        Self {
            name: "127.0.0.1".into(),
            metadata: metadata.into(),
            nics: 2,
            cores: 1,
            handshake: HandshakeOptions { publish: Some("127.0.0.1".into()), ..HandshakeOptions::default() },
            rails: RailOptions::default(),
            store: StoreOptions::default(),
        }
    }

    pub(crate) fn port(mut self, port: u16) -> Self {
        self.handshake.port = PortChoice::Fixed(port);
        self
    }

    pub(crate) fn named(mut self, name: &str) -> Self {
        self.name = name.into();
        self
    }
}

/// Starts node number `number` of `world`.
pub(crate) fn node(world: &SimWorld, number: u8, options: Options) -> Result<Node, StartError> {
    let began = Instant::now();
    let clock: moonrail_control::Clock = Arc::new(move || Nanos::from_duration(began.elapsed()));
    let doorbell = Arc::new(Doorbell::new().unwrap());
    let made: Vec<(Arc<dyn Nic>, SimNicId)> = (0..options.nics)
        .map(|nic| world.nic(&format!("node{number}"), &format!("sim{nic}"), gid(number, nic)))
        .collect();
    let inboxes: Arc<[Arc<Inbox>]> = (0..options.cores).map(|core| Inbox::new(CoreId(core)).unwrap()).collect();
    let outboxes: Vec<_> = inboxes.iter().map(|_| Outbox::new(doorbell.clone())).collect();
    let mut queues: Vec<Vec<_>> = inboxes.iter().map(|_| Vec::new()).collect();
    let mut nics = Vec::new();
    for (at, (nic, _)) in made.iter().enumerate() {
        let mut cqs = Vec::new();
        for queue in &mut queues {
            let (cq, handle) = nic.create_cq(4096).unwrap();
            queue.push((NicId(at as u16), cq));
            cqs.push(Some(handle));
        }
        let gid = gid::choose(&nic.gids().unwrap(), None).unwrap();
        nics.push(ControlNic { nic: nic.clone(), gid: Some(gid), cqs });
    }
    let mut cores = Vec::new();
    for ((inbox, outbox), nics) in inboxes.iter().zip(&outboxes).zip(queues) {
        let config = CoreConfig {
            id: inbox.core(),
            inbox: inbox.clone(),
            outbox: outbox.clone(),
            cores: inboxes.clone(),
            nics,
            counters: Arc::new(CoreCounters::default()),
        };
        let clock = clock.clone();
        cores.push(std::thread::spawn(move || {
            run(Box::new(Core::new(config)), PollMode::default(), &|| clock(), &|_| {});
        }));
    }
    let log = Arc::new(Mutex::new(Vec::new()));
    let sink = log.clone();
    let config = ControlConfig {
        name: options.name,
        metadata: MetadataUri::parse(&options.metadata).unwrap(),
        store: options.store,
        cluster_id: String::new(),
        nics,
        cores: inboxes
            .iter()
            .zip(&outboxes)
            .map(|(inbox, outbox)| CoreLink { inbox: inbox.clone(), outbox: outbox.clone() })
            .collect(),
        doorbell,
        matrix: PriorityMatrix::default(),
        handshake: options.handshake,
        rails: options.rails,
        fabrics: FabricPolicy::default(),
        clock,
        log: Arc::new(move |record| {
            if std::env::var_os("RIG_LOG").is_some() {
                eprintln!("node{number} {:?} {}", record.level, record.text);
            }
            sink.lock().unwrap().push(record);
        }),
    };
    match start(config) {
        Ok(control) => Ok(Node { control, log, nics: made.into_iter().map(|(_, id)| id).collect(), cores }),
        Err(error) => {
            for inbox in inboxes.iter() {
                let _ = inbox.command(moonrail_datapath::core::Command::Stop);
            }
            Err(error)
        }
    }
}

impl Node {
    /// Waits until the rails to `peer` are all usable, `count` of them.
    pub(crate) fn wait_usable(&self, peer: &str, count: usize) {
        let rails = || {
            let mut rails = self.control.rails();
            rails.retain(|rail| rail.peer == peer);
            rails
        };
        let all = || {
            let rails = rails();
            rails.len() == count && rails.iter().all(|rail| rail.state == RailState::Usable)
        };
        assert!(wait(all), "{:#?}\n{:#?}", rails(), self.log.lock().unwrap());
    }

    pub(crate) fn stop(self) {
        assert!(self.control.shutdown(soon()));
        for core in self.cores {
            core.join().unwrap();
        }
    }

    /// Drops the handle and waits for the cores.
    pub(crate) fn drop_handle(self) {
        drop(self.control);
        for core in self.cores {
            core.join().unwrap();
        }
    }

    pub(crate) fn logged(&self, text: &str) -> usize {
        self.log.lock().unwrap().iter().filter(|record| record.text.contains(text)).count()
    }
}

pub(crate) fn soon() -> Instant {
    Instant::now() + Duration::from_secs(15)
}

/// Whether `condition` becomes true within 15 s.
pub(crate) fn wait(mut condition: impl FnMut() -> bool) -> bool {
    let until = soon();
    while !condition() {
        if Instant::now() > until {
            return false;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    true
}

/// A line of /proc/self/status, in bytes.
fn memory(line: &str) -> usize {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let value = status.lines().find_map(|l| l.strip_prefix(line)).unwrap();
    value.trim_matches([':', ' ', '\t', 'k', 'B']).parse::<usize>().unwrap() << 10
}

/// Runs `what`; by how much resident memory rose above its beginning, at the most.
pub(crate) fn growth<T>(what: impl FnOnce() -> T) -> (T, usize) {
    // Resets the high-water mark (proc(5)).
    std::fs::write("/proc/self/clear_refs", "5").unwrap();
    let before = memory("VmRSS");
    let result = what();
    (result, memory("VmHWM").saturating_sub(before))
}
