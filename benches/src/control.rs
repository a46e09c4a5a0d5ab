//! The control plane, with a real etcd: nodes that start and publish themselves, their segments looked up one after the other and
//! all at once, and rails connected to all of them at once.
//!
//! Every peer is an engine of its own with its own control thread, port, lease and NIC, in this process; the NICs are simulated, for
//! what is measured is what happens before the first byte.

use std::error::Error;
use std::net::{TcpListener, TcpStream};
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;
use moonrail::{Engine, EngineBuilder, Gid, Level, Nic, Region, Segment, Transfer};
use moonrail_datapath::nic::sim::{SimOptions, SimWorld};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use serde_json::{Value, json};

use crate::host::median;
use crate::peers::process::Process;
use crate::record::Found;

/// For anything that is waited for.
const PATIENCE: Duration = Duration::from_secs(60);
/// Threads that look up at once.
const LOOKERS: usize = 64;
/// How long engines are watched that nobody uses: three times as long as between two renewals of their leases.
const IDLE: Duration = Duration::from_secs(10);
/// Bytes of memory of each node.
const MEMORY: usize = 4096;

/// etcd, and the folder of its data.
struct Etcd {
    process: Option<Process>,
    folder: PathBuf,
    uri: String,
}

impl Etcd {
    fn start() -> Result<Self, Box<dyn Error>> {
        let [client, peer] = two_ports()?.map(|port| format!("127.0.0.1:{port}"));
        let folder = std::env::temp_dir().join(format!("moonrail-bench-etcd-{}", std::process::id()));
        let (urls, between) = (format!("http://{client}"), format!("http://{peer}"));
        let mut command = Command::new("etcd");
        command.arg("--data-dir").arg(&folder).args(["--log-level", "error"]);
        command.args(["--listen-client-urls", &urls, "--advertise-client-urls", &urls]);
        command.args(["--listen-peer-urls", &between, "--initial-advertise-peer-urls", &between]);
        command.args(["--initial-cluster", &format!("default={between}")]);
        let etcd = Self { process: Some(Process::start(&mut command)?), folder, uri: format!("etcd://{client}") };
        let until = Instant::now() + PATIENCE;
        while TcpStream::connect(&client).is_err() {
            if Instant::now() >= until {
                return Err(format!("etcd does not listen on {client} within {PATIENCE:?}").into());
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(etcd)
    }
}

/// Two that nobody listens on. Both are held until both are known: they differ.
fn two_ports() -> std::io::Result<[u16; 2]> {
    let held = [TcpListener::bind("127.0.0.1:0")?, TcpListener::bind("127.0.0.1:0")?];
    Ok([held[0].local_addr()?.port(), held[1].local_addr()?.port()])
}

impl Drop for Etcd {
    fn drop(&mut self) {
        self.process = None;
        let _ = std::fs::remove_dir_all(&self.folder);
    }
}

/// A node of the cluster.
struct Node {
    engine: Engine,
    memory: Region,
}

struct Cluster {
    world: SimWorld,
    etcd: Etcd,
    nodes: u16,
}

impl Cluster {
    fn builder(&mut self) -> EngineBuilder {
        self.nodes += 1;
        let [high, low] = self.nodes.to_be_bytes();
        let gid = Gid([0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 10, 0, high, low]);
        let (nic, _): (Arc<dyn Nic>, _) = self.world.nic(&format!("node{}", self.nodes), "sim0", gid);
        Engine::builder()
            .environment(|_| None)
            .log_level(Level::Error)
            .pin_cores(false)
            .cores(1)
            .name(format!("127.0.0.1:{}", self.nodes))
            .metadata(&self.etcd.uri)
            .nics_from(vec![nic])
    }

    fn node(&mut self) -> Result<Node, Box<dyn Error>> {
        let engine = self.builder().build()?;
        let memory = engine.allocate(MEMORY, "*")?;
        Ok(Node { engine, memory })
    }
}

pub(crate) fn run(quick: bool) -> Result<Found, Box<dyn Error>> {
    allow_files()?;
    let sizes: &[(u64, usize)] = if quick { &[(20, 1)] } else { &[(10, 7), (100, 7), (1000, 7)] };
    let mut cases = Vec::new();
    for &(count, repetitions) in sizes {
        cases.extend(measure(count, repetitions)?);
    }
    Ok(Found { unit: "a second; microseconds of one", cases })
}

/// With so many peers.
fn measure(count: u64, repetitions: usize) -> Result<Vec<Value>, Box<dyn Error>> {
    let mut cluster = Cluster { world: SimWorld::real_time(7, SimOptions::default()), etcd: Etcd::start()?, nodes: 0 };
    let mut starts = times();
    let began = Instant::now();
    let mut peers = Vec::new();
    for _ in 0..count {
        let before = Instant::now();
        peers.push(cluster.node()?);
        starts.record(micros(before))?;
    }
    let mut cases =
        vec![case("starts, one after the other", count, &mut [began.elapsed().as_secs_f64()], Some(&starts))];
    let idle = processor_time()?;
    std::thread::sleep(IDLE);
    cases.push(idle_case(count, processor_time()?.saturating_sub(idle)));
    let names: Vec<&str> = peers.iter().map(|peer| peer.engine.name()).collect();

    let (mut alone, mut together, mut connected, mut again) = (vec![], vec![], vec![], vec![]);
    let mut each = times();
    for _ in 0..repetitions {
        let one = cluster.node()?;
        let began = Instant::now();
        for name in &names {
            let before = Instant::now();
            one.engine.open_segment(name)?;
            each.record(micros(before))?;
        }
        alone.push(began.elapsed().as_secs_f64());

        let other = cluster.node()?;
        let began = Instant::now();
        let segments = open_all(&other.engine, &names)?;
        together.push(began.elapsed().as_secs_f64());
        connected.push(write_to_all(&other, &segments)?);
        again.push(write_to_all(&other, &segments)?);
        for node in [one, other] {
            if !node.engine.shutdown(PATIENCE) {
                return Err("an engine does not stop".into());
            }
        }
    }
    cases.push(case("look-ups, one after the other", count, &mut alone, Some(&each)));
    cases.push(case("look-ups, at once", count, &mut together, None));
    cases.push(case("rails connected at once, until 64 bytes arrived on each", count, &mut connected, None));
    cases.push(case("the same 64 bytes on connected rails", count, &mut again, None));
    for peer in &peers {
        peer.engine.shutdown(PATIENCE);
    }
    Ok(cases)
}

/// Processor time of this process so far, of all its threads.
fn processor_time() -> Result<Duration, Box<dyn Error>> {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    Ok(Duration::new(u64::try_from(time.tv_sec)?, u32::try_from(time.tv_nsec)?))
}

/// What engines that nobody uses take of a processor.
fn idle_case(count: u64, spent: Duration) -> Value {
    let share = spent.as_secs_f64() / IDLE.as_secs_f64() / count as f64;
    println!("{:<56} {count:>5} {:>9.4} % of a processor each", "engines that do nothing", share * 100.0);
    json!({ "what": "engines that do nothing", "count": count, "processor_share": share })
}

/// All of them by [`LOOKERS`] threads.
fn open_all(engine: &Engine, names: &[&str]) -> Result<Vec<Segment>, Box<dyn Error>> {
    let share = names.len().div_ceil(LOOKERS);
    let opened = std::thread::scope(|scope| {
        let lookers: Vec<_> = names
            .chunks(share)
            .map(|names| {
                scope.spawn(|| names.iter().map(|name| engine.open_segment(name)).collect::<Result<Vec<_>, _>>())
            })
            .collect();
        lookers
            .into_iter()
            .map(|looker| looker.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
            .collect::<Result<Vec<_>, _>>()
    })?;
    Ok(opened.into_iter().flatten().collect())
}

/// 64 bytes to each; the seconds until all have arrived.
fn write_to_all(from: &Node, segments: &[Segment]) -> Result<f64, Box<dyn Error>> {
    let began = Instant::now();
    let mut batches = Vec::new();
    for segment in segments {
        let far = segment.buffers().first().ok_or("a peer without memory")?.addr;
        batches.push(from.engine.submit(segment, &[Transfer::write_from(&from.memory, 0, far, 64)])?);
    }
    for batch in batches {
        batch.wait(PATIENCE)?;
    }
    Ok(began.elapsed().as_secs_f64())
}

/// As many open files as may be: every engine has a port, a doorbell for each thread, and its own connections.
fn allow_files() -> Result<(), Box<dyn Error>> {
    let most = getrlimit(Resource::Nofile).maximum;
    setrlimit(Resource::Nofile, Rlimit { current: most, maximum: most }).map_err(|e| format!("open files: {e}").into())
}

fn times() -> Histogram<u64> {
    Histogram::new(3).expect("three digits are within its range")
}

fn micros(since: Instant) -> u64 {
    u64::try_from(since.elapsed().as_micros()).unwrap_or(u64::MAX).max(1)
}

fn case(what: &str, count: u64, seconds: &mut [f64], each: Option<&Histogram<u64>>) -> Value {
    let middle = median(seconds);
    let rate = |seconds: f64| count as f64 / seconds;
    let (low, high) = (rate(seconds[seconds.len() - 1]), rate(seconds[0]));
    print!("{what:<56} {count:>5} {:>9.0} /s ({low:.0}-{high:.0})", rate(middle));
    let quantiles = each.map(|times| (times.value_at_quantile(0.5), times.value_at_quantile(0.99)));
    match quantiles {
        Some((p50, p99)) => println!(", p50 {p50} us, p99 {p99} us"),
        None => println!(),
    }
    json!({
        "what": what, "count": count, "repetitions": seconds.len(), "per_second": rate(middle), "per_second_min": low,
        "per_second_max": high, "p50_us": quantiles.map(|q| q.0), "p99_us": quantiles.map(|q| q.1),
    })
}
