//! Every fault of the list, one after the other, under traffic that never stops: no caller sees an error while another rail
//! works, no byte is wrong, the rails that are left go on at once, and what was lost is used again when it is back.
//!
//! One engine and one peer live through all of it, as they would.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use moonrail::{Engine, EngineBuilder, Fabric, Level, Segment};

use super::hands::{Moment, Network, Orders, obey};
use super::lab_support::altered::Altered;
use super::lab_support::process::{Process, etcd, etcd_again};
use super::lab_support::traffic::{PEER_BYTES, Traffic};
use super::lab_support::{Lab, setting, wait_for};
use super::table::{self, Measured, Row};
use super::watch::{Rail, Watch};

/// On this machine, shared and emulated, a measured time may be far from its aim; further is a fault of ours.
const GAP_BOUND: Duration = Duration::from_secs(8);
const BACK_BOUND: Duration = Duration::from_secs(20);
/// Of a batch: longer than any fault but the longest, which it must outlive too.
const DEADLINE: Duration = Duration::from_secs(25);
/// Traffic before a fault.
const BEFORE: Duration = Duration::from_millis(700);
/// An etcd lease, and a second.
const LEASE: Duration = Duration::from_secs(11);

/// What a fault takes away of the four rails.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Lost {
    Nothing,
    /// Both rails to node 1's second NIC.
    Nic,
    /// Only the one between node 0's first and node 1's second NIC.
    OneRail,
    Everything,
}

/// One thing that is done.
#[derive(Clone, Copy, Debug)]
enum Act {
    /// By node 1.
    Order(&'static str),
    /// To node 1's machine, from outside.
    Machine(&'static str),
    /// To etcd, which is here.
    Etcd(&'static str),
}

/// What is lost is so from the first thing on that was done, and back after the last.
struct Acted {
    first: Moment,
    last: Moment,
}

struct Fault {
    name: &'static str,
    lost: Lost,
    down: &'static [Act],
    up: &'static [Act],
    /// Seconds between the two: usually, and in the long run.
    away: (f64, f64),
    /// How often, usually; in the long run as often as there is time.
    times: u32,
    gap_aim: Option<Duration>,
    back_aim: Option<Duration>,
}

const SECONDS_3: Option<Duration> = Some(Duration::from_secs(3));
const MILLIS_500: Option<Duration> = Some(Duration::from_millis(500));
const MILLIS_1500: Option<Duration> = Some(Duration::from_millis(1500));

const SWALLOWS: Fault = Fault {
    name: "a rail that swallows everything",
    lost: Lost::OneRail,
    // An address that no NIC has: the network takes what is sent there, and nobody gets it.
    down: &[Act::Order("ip neigh replace 10.0.0.1 lladdr 52:54:00:ff:ff:ff dev eth1 nud permanent")],
    up: &[Act::Order("ip neigh del 10.0.0.1 dev eth1")],
    away: (3.0, 30.0),
    times: 1,
    gap_aim: MILLIS_1500,
    back_aim: SECONDS_3,
};

const FAULTS: [Fault; 12] = [
    Fault {
        name: "none",
        lost: Lost::Nothing,
        down: &[],
        up: &[],
        away: (3.0, 50.0),
        times: 1,
        gap_aim: None,
        back_aim: None,
    },
    Fault {
        name: "link down and up",
        lost: Lost::Nic,
        down: &[Act::Order("ip link set eth1 down")],
        up: &[Act::Order("ip link set eth1 up")],
        away: (2.0, 20.0),
        times: 1,
        gap_aim: MILLIS_500,
        back_aim: SECONDS_3,
    },
    Fault {
        name: "a NIC that loses everything it sends",
        lost: Lost::Nic,
        down: &[Act::Order("tc qdisc replace dev eth1 root netem loss 100%")],
        up: &[Act::Order("tc qdisc del dev eth1 root")],
        away: (2.5, 20.0),
        times: 1,
        gap_aim: MILLIS_1500,
        back_aim: SECONDS_3,
    },
    Fault {
        name: "5 % loss and 50 ms of delay",
        lost: Lost::Nic,
        down: &[Act::Order("tc qdisc replace dev eth1 root netem delay 50ms loss 5%")],
        up: &[Act::Order("tc qdisc del dev eth1 root")],
        away: (3.0, 40.0),
        times: 1,
        gap_aim: MILLIS_1500,
        back_aim: SECONDS_3,
    },
    Fault {
        name: "address deleted, added at another index",
        lost: Lost::Nic,
        // Linux has one more trouble for who does this: where a NIC has no address left, the kernel asks for its old neighbours'
        // MACs in the name of another NIC's address (arp_announce 2 included), and they learn the wrong MAC for that one, of
        // which nothing heals them while TCP goes that way. Without neighbours nobody is asked.
        down: &[Act::Order("ip addr del 10.0.1.2/16 dev eth1"), Act::Order("ip neigh flush dev eth1")],
        // The other address takes the place in the GID table that was free. A network of its own: were it the first of the
        // same, the second would go with it.
        up: &[Act::Order("ip addr add 10.0.1.99/32 dev eth1"), Act::Order("ip addr add 10.0.1.2/16 dev eth1")],
        away: (2.0, 20.0),
        times: 1,
        gap_aim: MILLIS_1500,
        back_aim: SECONDS_3,
    },
    SWALLOWS,
    Fault {
        name: "path MTU 1024 on one side",
        lost: Lost::Nic,
        // With the link down meanwhile, as most drivers do it. Under connected queue pairs Soft-RoCE calls READs success that it
        // has cut short (`a_read_cut_short_by_its_responders_device_is_called_success`).
        down: &[Act::Order("ip link set eth1 down"), Act::Order("ip link set eth1 mtu 1500 up")],
        up: &[Act::Order("ip link set eth1 down"), Act::Order("ip link set eth1 mtu 4200 up")],
        away: (3.0, 30.0),
        times: 1,
        gap_aim: MILLIS_1500,
        back_aim: SECONDS_3,
    },
    Fault {
        name: "a rail flapping every 3 s",
        lost: Lost::Nic,
        down: &[Act::Order("ip link set eth1 down")],
        up: &[Act::Order("ip link set eth1 up")],
        away: (1.5, 1.5),
        times: 2,
        gap_aim: MILLIS_500,
        back_aim: SECONDS_3,
    },
    Fault {
        name: "etcd stopped",
        lost: Lost::Nothing,
        down: &[Act::Etcd("STOP")],
        up: &[Act::Etcd("CONT")],
        away: (3.0, 20.0),
        times: 1,
        gap_aim: MILLIS_500,
        back_aim: Some(LEASE),
    },
    Fault {
        name: "etcd killed and started again",
        lost: Lost::Nothing,
        down: &[Act::Etcd("KILL")],
        up: &[Act::Etcd("START")],
        away: (1.0, 20.0),
        times: 1,
        gap_aim: MILLIS_500,
        back_aim: Some(LEASE),
    },
    Fault {
        name: "the peer's machine frozen",
        lost: Lost::Everything,
        down: &[Act::Machine("freeze")],
        up: &[Act::Machine("thaw")],
        away: (3.0, 10.0),
        times: 1,
        gap_aim: None,
        back_aim: SECONDS_3,
    },
    Fault {
        name: "the peer killed and started again",
        lost: Lost::Everything,
        down: &[Act::Order("kill")],
        up: &[Act::Order("serve")],
        away: (0.5, 5.0),
        times: 1,
        gap_aim: None,
        back_aim: SECONDS_3,
    },
];

#[test]
fn faults_under_verified_traffic() {
    let long = setting("MOONRAIL_FAULT_SECONDS", 0);
    let rounds = setting("MOONRAIL_FAULT_ROUNDS", 1);
    let only = std::env::var("MOONRAIL_FAULT").unwrap_or_default();
    on_stage("faults", Stage::with_etcd, |scene| {
        let rows: Vec<Row> = (0..rounds)
            .flat_map(|_| &FAULTS)
            .filter(|fault| only.split(',').any(|word| fault.name.contains(word)))
            .map(|fault| scene.run(fault, long))
            .collect();
        table::print(&rows);
        rows.iter().for_each(table::result);
        rows.iter().for_each(judge);
    });
}

/// Whatever comes next, drawn at random: the same draw in every run.
#[test]
#[ignore = "a part of `cargo xtask soak`"]
fn a_mix_of_faults() {
    let time = Duration::from_secs(setting("MOONRAIL_MIX_SECONDS", 30));
    on_stage("mix", Stage::with_etcd, |scene| {
        let (started, mut random, mut rows) = (Instant::now(), 0x2545_f491_4f6c_dd1d_u64, Vec::new());
        while started.elapsed() < time {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            rows.push(scene.run(&FAULTS[random as usize % FAULTS.len()], 0));
        }
        table::print(&rows);
        table::mix_result(&rows, started.elapsed());
        rows.iter().for_each(judge);
    });
}

/// A device that retries for ever says nothing of a path that swallows everything. The engine's own watch does.
#[test]
fn a_device_that_retries_for_ever_is_found_out() {
    on_stage("for-ever", Stage::retrying_for_ever, |scene| {
        let swallows = Fault { away: (7.0, 7.0), gap_aim: None, back_aim: None, ..SWALLOWS };
        let row = scene.run(&swallows, 0);
        table::result(&Row { fault: "a rail that swallows everything, retry count 7", ..row.clone() });
        judge(&row);
        let stalled = scene.log.from(0).iter().filter(|line| line.contains("stalled: no completion")).count();
        assert!(stalled > 0, "the stall watch said nothing");
    });
}

/// Node 0 plays, node 1 does what it is told.
fn on_stage(name: &str, stage: fn() -> Stage, play: impl FnOnce(&mut Scene<'_>)) {
    let lab = Lab::enter(name);
    let _network = Network;
    if lab.node == 0 {
        let mut scene = Scene::open(&lab, stage());
        play(&mut scene);
        scene.orders.give("end");
        assert!(scene.engine.shutdown(Duration::from_secs(15)), "the engine gave everything back");
    } else {
        obey(&lab);
    }
    lab.barrier();
}

/// Who is there.
struct Stage {
    etcd: Option<Process>,
    engine: EngineBuilder,
    peer: &'static str,
    serves: String,
}

impl Stage {
    fn with_etcd() -> Self {
        Self {
            etcd: Some(etcd("10.0.0.1")),
            engine: Engine::builder().metadata("etcd://10.0.0.1:2379").fabrics([Fabric::Rdma]),
            peer: "10.0.0.2",
            serves: format!("serve --metadata etcd://10.0.0.1:2379 --name 10.0.0.2 --cores 1 --size {PEER_BYTES}"),
        }
    }

    fn retrying_for_ever() -> Self {
        let altered = Altered { retry_cnt: Some(7), ..Altered::default() };
        Self {
            etcd: None,
            engine: Engine::builder().nics_from(vec![altered.open("rxe0"), altered.open("rxe1")]),
            peer: "10.0.0.2:17999",
            serves: format!("serve --name 10.0.0.2:17999 --cores 1 --size {PEER_BYTES}"),
        }
    }
}

/// What holds on any machine.
fn judge(row: &Row) {
    assert!(row.errors == 0 || row.may_fail(), "{}: a caller saw an error although a rail worked", row.fault);
    assert_eq!(row.wrong, 0, "{}: wrong bytes", row.fault);
    assert!(row.megabytes > 0.0, "{}: nothing moved", row.fault);
    assert!(row.gap.is_none_or(|gap| gap.took < GAP_BOUND), "{}: {:?}", row.fault, row.gap);
    assert!(row.back.is_none_or(|back| back.took < BACK_BOUND), "{}: {:?}", row.fault, row.back);
    assert!(row.lines_of_one <= 2, "{}: {} log lines for one incident", row.fault, row.lines_of_one);
}

struct Scene<'a> {
    orders: Orders<'a>,
    log: LogLines,
    etcd: Option<Process>,
    engine: Arc<Engine>,
    peer: Segment,
    serves: String,
}

impl<'a> Scene<'a> {
    fn open(lab: &'a Lab, stage: Stage) -> Self {
        let (orders, log) = (Orders::new(lab), LogLines::default());
        orders.give(&stage.serves);
        let engine = stage.engine.name("10.0.0.1").cores(1).log(log.sink()).build().unwrap_or_else(|e| panic!("{e}"));
        let peer = engine.open_segment(stage.peer).unwrap_or_else(|e| panic!("{e}"));
        Self { orders, log, etcd: stage.etcd, engine: Arc::new(engine), peer, serves: stage.serves }
    }

    /// One fault under traffic: as short as shows it, or for `long` seconds with all that is before and after.
    fn run(&mut self, fault: &Fault, long: u64) -> Row {
        let (away, whole) = match long {
            0 => (fault.away.0, Duration::ZERO),
            seconds => (fault.away.1, Duration::from_secs(seconds)),
        };
        let away = Duration::from_secs_f64(away);
        let watch = Watch::start(Arc::clone(&self.engine));
        let traffic = Traffic::start(&self.engine, &self.peer, 0, DEADLINE);
        let started = Instant::now();
        let (rails, left) = (rails_but(Lost::Nothing), rails_but(fault.lost));
        wait_for("all four rails to carry slices", || watch.all_after(&rails, started));
        std::thread::sleep(BEFORE);

        let lines = self.log.count();
        let mut gap = Duration::ZERO;
        let mut back = Duration::ZERO;
        for time in 1.. {
            let injected = self.act(fault.down).first;
            std::thread::sleep(away);
            gap = gap.max(watch.gap(&left, injected.began, Instant::now()));
            let returned = self.act(fault.up).last;
            let over = if long == 0 { time >= fault.times } else { fault.times == 1 || started.elapsed() >= whole };
            if !over {
                std::thread::sleep(away);
                continue;
            }
            // A process has returned when it says so; a link when somebody says so to it.
            let starts = fault.up.iter().any(|act| matches!(act, Act::Order("serve") | Act::Etcd("START")));
            let returned = if starts { returned.ended } else { returned.began };
            let again = if fault.name.starts_with("etcd") {
                wait_for("the store to answer", || self.peer.refresh().is_ok().then(Instant::now))
            } else {
                wait_for("every rail to carry slices again", || watch.all_after(&rails, returned))
            };
            back = back.max(again - returned);
            break;
        }
        // Until what is left of the old lives is told, too.
        std::thread::sleep(Duration::from_millis(500).max(whole.saturating_sub(started.elapsed())));
        let done = traffic.end();
        let (incidents, lines_of_one) = self.log.incidents(lines);
        let row = Row {
            fault: fault.name,
            seconds: started.elapsed().as_secs_f64(),
            megabytes: done.bytes as f64 / 1e6,
            errors: done.errors.len(),
            wrong: done.wrong,
            gap: (fault.lost != Lost::Everything).then_some(Measured { took: gap, aim: fault.gap_aim }),
            back: (!fault.up.is_empty()).then_some(Measured { took: back, aim: fault.back_aim }),
            slowest: done.slowest,
            incidents,
            lines: self.log.count() - lines,
            lines_of_one,
        };
        self.clean_up(fault);
        table::print(std::slice::from_ref(&row));
        self.log.print(lines);
        row
    }

    fn act(&mut self, acts: &[Act]) -> Acted {
        let now = Instant::now();
        let mut moments = Vec::new();
        for act in acts {
            moments.push(match act {
                Act::Order("serve") => self.orders.give(&self.serves),
                Act::Order(order) => self.orders.give(order),
                Act::Machine(what) => machine(what),
                Act::Etcd(what) => self.etcd(what),
            });
        }
        let nothing = Moment { began: now, ended: now };
        Acted { first: *moments.first().unwrap_or(&nothing), last: *moments.last().unwrap_or(&nothing) }
    }

    fn etcd(&mut self, what: &str) -> Moment {
        let began = Instant::now();
        match what {
            "KILL" => self.etcd.take().expect("etcd runs").kill(),
            "START" => self.etcd = Some(etcd_again("10.0.0.1")),
            signal => self.etcd.as_ref().expect("etcd runs").signal(signal),
        }
        Moment { began, ended: Instant::now() }
    }

    /// What a fault leaves that is no part of it.
    fn clean_up(&self, fault: &Fault) {
        if fault.name.starts_with("address") {
            self.orders.give("ip addr del 10.0.1.99/32 dev eth1");
        }
        let rails = rails_but(Lost::Nothing);
        wait_for("all rails to be usable", || {
            let usable: Vec<_> = self.engine.rails().into_iter().filter(|rail| rail.usable).collect();
            rails
                .iter()
                .all(|(ours, peers)| usable.iter().any(|r| (&r.nic, &r.peer_nic) == (ours, peers)))
                .then_some(())
        });
    }
}

impl Drop for Scene<'_> {
    /// What the engine knows, for whoever reads why a test failed.
    fn drop(&mut self) {
        if std::thread::panicking() {
            println!("the engine's log:");
            self.log.print(0);
            println!("its rails:\n{:#?}\nits incidents:\n{:#?}", self.engine.rails(), self.engine.incidents());
        }
    }
}

/// The rails that a fault leaves alone.
fn rails_but(lost: Lost) -> Vec<Rail> {
    let all = [("rxe0", "rxe0"), ("rxe0", "rxe1"), ("rxe1", "rxe0"), ("rxe1", "rxe1")];
    let is_left = |(ours, peers): &(&str, &str)| match lost {
        Lost::Nothing => true,
        Lost::Nic => *peers != "rxe1",
        Lost::OneRail => (*ours, *peers) != ("rxe0", "rxe1"),
        Lost::Everything => false,
    };
    all.into_iter().filter(is_left).map(|(ours, peers)| (ours.to_owned(), peers.to_owned())).collect()
}

/// Asks the host for something that node 1 cannot do to itself. Without a process: starting one takes too long.
fn machine(what: &str) -> Moment {
    let folder = Path::new("/lab/shared/.control");
    std::fs::create_dir_all(folder).unwrap_or_else(|e| panic!("{}: {e}", folder.display()));
    let request = folder.join(format!("{what}-1"));
    let began = Instant::now();
    std::fs::write(&request, "").unwrap_or_else(|e| panic!("{}: {e}", request.display()));
    wait_for(what, || (!request.exists()).then_some(()));
    Moment { began, ended: Instant::now() }
}

/// What the engine logged.
#[derive(Clone, Default)]
struct LogLines(Arc<Mutex<Vec<String>>>);

impl LogLines {
    fn sink(&self) -> impl Fn(Level, &str) + Send + Sync + 'static {
        let lines = Arc::clone(&self.0);
        move |level, text| lines.lock().unwrap_or_else(PoisonError::into_inner).push(format!("{level} {text}"))
    }

    fn from(&self, first: usize) -> Vec<String> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)[first..].to_vec()
    }

    fn count(&self) -> usize {
        self.from(0).len()
    }

    /// `INFO incident 7 closed: …`: how many numbers there are, and the most lines that one of them has.
    fn incidents(&self, first: usize) -> (usize, usize) {
        let mut lines_of: BTreeMap<u64, usize> = BTreeMap::new();
        for line in self.from(first) {
            let number = line.split_once("incident ").and_then(|(_, rest)| rest.split(' ').next()?.parse().ok());
            if let Some(number) = number {
                *lines_of.entry(number).or_default() += 1;
            }
        }
        (lines_of.len(), lines_of.values().max().copied().unwrap_or(0))
    }

    fn print(&self, first: usize) {
        for line in self.from(first) {
            println!("    {line}");
        }
    }
}
