//! What an engine says of itself, and what happened between two such readings.

use moonrail::Spread;
use moonrail::inspect::spread;
use serde_json::{Value, json};

/// What is counted of a rail, or of several together.
#[derive(Clone, Debug, Default)]
pub struct Counts {
    /// Bytes in place.
    pub bytes: u64,
    /// Slices in place.
    pub slices: u64,
    /// Slices on their way now.
    pub out_slices: u64,
    /// Their bytes.
    pub out_bytes: u64,
    /// Slices that came back without their bytes.
    pub returned: u64,
    /// First errors.
    pub first_errors: u64,
    /// Echoes of first errors.
    pub flushes: u64,
    /// From submission to the send queue.
    pub queue: Spread,
    /// From the send queue to its end.
    pub wire: Spread,
}

impl Counts {
    fn of(rail: &Value) -> Self {
        let number = |name: &str| rail[name].as_u64().unwrap_or(0);
        Self {
            bytes: number("bytes"),
            slices: number("slices"),
            out_slices: number("in_flight_slices"),
            out_bytes: number("in_flight_bytes"),
            returned: number("returned"),
            first_errors: number("first_errors"),
            flushes: number("flushes"),
            queue: spread(&rail["queue_ns"]),
            wire: spread(&rail["wire_ns"]),
        }
    }

    fn merge(&mut self, other: &Self) {
        self.bytes += other.bytes;
        self.slices += other.slices;
        self.out_slices += other.out_slices;
        self.out_bytes += other.out_bytes;
        self.returned += other.returned;
        self.first_errors += other.first_errors;
        self.flushes += other.flushes;
        self.queue.merge(&other.queue);
        self.wire.merge(&other.wire);
    }

    /// Bytes, slices and times since `earlier`; what is out now, and failures since the start.
    fn since(&self, earlier: &Self) -> Self {
        Self {
            bytes: self.bytes.saturating_sub(earlier.bytes),
            slices: self.slices.saturating_sub(earlier.slices),
            queue: self.queue.since(&earlier.queue),
            wire: self.wire.since(&earlier.wire),
            ..self.clone()
        }
    }
}

/// A rail, or a NIC with all its rails.
#[derive(Clone, Debug, Default)]
pub struct Row {
    /// Our NIC.
    pub nic: String,
    /// The peer's segment; empty for a NIC.
    pub peer: String,
    /// The peer's NIC.
    pub peer_nic: String,
    /// What carries the bytes.
    pub fabric: String,
    /// Its state in one word, and the trouble behind it.
    pub state: String,
    /// Whether it can be used.
    pub usable: bool,
    /// The cores that have it.
    pub cores: Vec<u64>,
    /// Path MTU in bytes, where there is one.
    pub mtu: Option<u64>,
    /// How often it was connected; for a NIC: its rails.
    pub lives: u64,
    /// In-flight cap in bytes.
    pub cap: u64,
    /// Shortest round trip seen lately, in nanoseconds.
    pub round_trip: u64,
    /// What it counts.
    pub counts: Counts,
}

impl Row {
    fn rail(rail: &Value) -> Self {
        let number = |name: &str| rail[name].as_u64().unwrap_or(0);
        Self {
            nic: word(&rail["nic"]),
            peer: word(&rail["peer"]),
            peer_nic: word(&rail["peer_nic"]),
            fabric: word(&rail["fabric"]),
            state: word(&rail["state"]),
            usable: rail["usable"] == true,
            cores: rail["core"].as_u64().into_iter().collect(),
            mtu: rail["path_mtu"].as_u64(),
            lives: number("lives"),
            cap: number("cap_bytes"),
            round_trip: number("round_trip_ns"),
            counts: Counts::of(rail),
        }
    }

    fn is(&self, other: &Self) -> bool {
        (&self.nic, &self.peer, &self.peer_nic) == (&other.nic, &other.peer, &other.peer_nic)
    }
}

/// One reply of an engine.
#[derive(Clone, Debug, Default)]
pub struct Reading {
    /// Its segment name.
    pub name: String,
    /// Its process.
    pub pid: u64,
    /// Seconds since it was built.
    pub uptime: f64,
    /// Its NICs, without their rails.
    nics: Vec<Row>,
    rails: Vec<Row>,
    /// Of all cores: turns that did something, and all of them; sleeps.
    turns: (u64, u64),
    sleeps: u64,
    cores: usize,
    copied: u64,
    copies: u64,
    /// Incidents since it was built.
    incidents: u64,
    /// Those that are not over: number, seconds, rail, cause.
    open: Vec<(u64, f64, String, String)>,
}

impl Reading {
    /// From a reply to [`moonrail::inspect::Request::Live`]; members that are not there count as 0.
    pub fn new(reply: &Value) -> Self {
        let engine = &reply["engine"];
        let list = |name: &str| reply[name].as_array().cloned().unwrap_or_default();
        let nic = |nic: &Value| Row {
            nic: word(&nic["name"]),
            fabric: word(&nic["fabric"]),
            usable: true,
            cores: nic["cores"].as_array().into_iter().flatten().filter_map(Value::as_u64).collect(),
            ..Row::default()
        };
        let mut rails: Vec<Row> = list("rails").iter().map(Row::rail).collect();
        rails.sort_by(|a, b| (&a.peer, &a.nic, &a.peer_nic).cmp(&(&b.peer, &b.nic, &b.peer_nic)));
        let cores = list("cores");
        let sum = |name: &str| cores.iter().map(|core| core[name].as_u64().unwrap_or(0)).sum::<u64>();
        let open = |incident: &Value| {
            let rail =
                format!("{} to {}@{}", word(&incident["nic"]), word(&incident["peer"]), word(&incident["peer_nic"]));
            let lasted = incident["lasted_s"].as_f64().unwrap_or(0.0);
            (incident["number"].as_u64().unwrap_or(0), lasted, rail, word(&incident["cause"]))
        };
        Self {
            name: word(&engine["name"]),
            pid: engine["pid"].as_u64().unwrap_or(0),
            uptime: engine["uptime_s"].as_f64().unwrap_or(0.0),
            nics: list("nics").iter().map(nic).collect(),
            rails,
            turns: (sum("busy_turns"), sum("busy_turns") + sum("idle_turns")),
            sleeps: sum("sleeps"),
            cores: cores.len(),
            copied: reply["callers"]["bytes"].as_u64().unwrap_or(0),
            copies: reply["callers"]["copies"].as_u64().unwrap_or(0),
            incidents: reply["incidents_seen"].as_u64().unwrap_or(0),
            open: list("incidents").iter().filter(|incident| incident["open"] == true).map(open).collect(),
        }
    }
}

/// What happened between two readings.
#[derive(Clone, Debug)]
pub struct Change {
    /// The later reading.
    pub now: Reading,
    /// Seconds between them, by the engine's own clock.
    pub seconds: f64,
    /// Whether it is all since the engine's start.
    pub since_start: bool,
    /// Each rail.
    pub rails: Vec<Row>,
    /// Each NIC with its rails together.
    pub nics: Vec<Row>,
    /// All together.
    pub total: Counts,
    /// Share of turns that did something, if the cores turned.
    pub busy: Option<f64>,
    /// Times a core went to sleep.
    pub sleeps: u64,
    /// Copies of callers' own threads, and their bytes.
    pub copied: (u64, u64),
}

impl Change {
    /// `before`: `None`, or a reading of another engine, for all since the start.
    pub fn new(before: Option<&Reading>, now: Reading) -> Self {
        let before = before.filter(|before| before.uptime < now.uptime && before.pid == now.pid);
        let nothing = Reading::default();
        let since_start = before.is_none();
        let before = before.unwrap_or(&nothing);
        let seconds = (now.uptime - before.uptime).max(1e-3);
        let of_rail = |rail: &Row| {
            let earlier = before.rails.iter().find(|earlier| earlier.is(rail));
            let counts = earlier.map_or_else(|| rail.counts.clone(), |earlier| rail.counts.since(&earlier.counts));
            Row { counts, ..rail.clone() }
        };
        let rails: Vec<Row> = now.rails.iter().map(of_rail).collect();
        let of_nic = |nic: &Row| {
            let mut nic = nic.clone();
            for rail in rails.iter().filter(|rail| rail.nic == nic.nic) {
                nic.counts.merge(&rail.counts);
                nic.lives += 1;
                nic.cap += rail.cap;
            }
            let up = rails.iter().filter(|rail| rail.nic == nic.nic && rail.usable).count();
            nic.state = format!("{up} up");
            nic
        };
        let nics = now.nics.iter().map(of_nic).collect();
        let mut total = Counts::default();
        for rail in &rails {
            total.merge(&rail.counts);
        }
        let turns = (now.turns.0.saturating_sub(before.turns.0), now.turns.1.saturating_sub(before.turns.1));
        Self {
            seconds,
            since_start,
            rails,
            nics,
            total,
            busy: (turns.1 > 0).then(|| turns.0 as f64 / turns.1 as f64),
            sleeps: now.sleeps.saturating_sub(before.sleeps),
            copied: (now.copies.saturating_sub(before.copies), now.copied.saturating_sub(before.copied)),
            now,
        }
    }

    /// Cores of the engine.
    pub fn cores(&self) -> usize {
        self.now.cores
    }

    /// Incidents since the start, and those that are not over: number, seconds, rail, cause.
    pub fn incidents(&self) -> (u64, &[(u64, f64, String, String)]) {
        (self.now.incidents, &self.now.open)
    }

    /// For programs.
    pub fn json(&self) -> Value {
        let times = |times: &Spread| json!({ "count": times.count(), "p50": times.quantile(0.5), "p99": times.quantile(0.99), "max": times.quantile(1.0) });
        let counts = |counts: &Counts| {
            json!({
                "bytes_per_second": counts.bytes as f64 / self.seconds,
                "slices_per_second": counts.slices as f64 / self.seconds,
                "in_flight_slices": counts.out_slices, "in_flight_bytes": counts.out_bytes,
                "queue_ns": times(&counts.queue), "wire_ns": times(&counts.wire),
                "returned": counts.returned, "first_errors": counts.first_errors, "flushes": counts.flushes,
            })
        };
        let rail = |rail: &Row| {
            let mut all = counts(&rail.counts);
            for (name, value) in [
                ("nic", json!(rail.nic)),
                ("peer", json!(rail.peer)),
                ("peer_nic", json!(rail.peer_nic)),
                ("fabric", json!(rail.fabric)),
                ("state", json!(rail.state)),
                ("usable", json!(rail.usable)),
                ("core", json!(rail.cores.first())),
                ("path_mtu", json!(rail.mtu)),
                ("lives", json!(rail.lives)),
                ("cap_bytes", json!(rail.cap)),
                ("round_trip_ns", json!(rail.round_trip)),
            ] {
                all[name] = value;
            }
            all
        };
        let nic = |nic: &Row| {
            let mut all = counts(&nic.counts);
            all["name"] = json!(nic.nic);
            all["fabric"] = json!(nic.fabric);
            all["cores"] = json!(nic.cores);
            all["rails"] = json!(nic.lives);
            all
        };
        json!({
            "engine": { "name": self.now.name, "pid": self.now.pid, "uptime_s": self.now.uptime },
            "seconds": self.seconds,
            "since_start": self.since_start,
            "total": counts(&self.total),
            "nics": self.nics.iter().map(nic).collect::<Vec<_>>(),
            "rails": self.rails.iter().map(rail).collect::<Vec<_>>(),
            "cores": { "count": self.now.cores, "busy_share": self.busy, "sleeps": self.sleeps },
            "callers": { "copies": self.copied.0, "bytes_per_second": self.copied.1 as f64 / self.seconds },
            "incidents": { "seen": self.now.incidents, "open": self.now.open.len() },
        })
    }
}

fn word(value: &Value) -> String {
    value.as_str().unwrap_or("?").chars().map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect()
}
