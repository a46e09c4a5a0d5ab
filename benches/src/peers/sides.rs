//! The engines that are compared, each as a target and an initiator.

use std::error::Error;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};

use super::process::Process;
use super::{Cell, Place, Programs};

/// One engine.
pub(crate) trait Side {
    fn name(&self) -> &'static str;
    /// Of what runs.
    fn version(&self) -> &str;
    /// Moves batches one after the other on each thread for about so long.
    fn batches_per_second(&mut self, cell: Cell, seconds: f64) -> Result<f64, Box<dyn Error>>;
}

/// Blocks lie this far apart, so that they stay blocks.
fn stride(block: u64) -> u64 {
    2 * block
}

/// `moonrail serve`, and `moonrail bench` for each cell.
pub(crate) struct Ours {
    moonrail: PathBuf,
    place: Place,
    segment: String,
    _target: Process,
}

impl Ours {
    pub(crate) fn start(programs: &Programs, place: Place) -> Result<Self, Box<dyn Error>> {
        let mut serve = Command::new(&programs.moonrail);
        serve.args(["serve", "--json", "--name", place.host, "--size", &place.memory.to_string()]);
        serve.args(["--fabrics", place.fabric]);
        let mut target = Process::start(&mut serve)?;
        let segment = target.line(|line| {
            let said: Value = serde_json::from_str(line).ok()?;
            said["listening"].as_str().map(str::to_owned)
        })?;
        Ok(Self { moonrail: programs.moonrail.clone(), place, segment, _target: target })
    }

    pub(crate) fn batches_per_second(&self, cell: Cell, seconds: f64) -> Result<f64, Box<dyn Error>> {
        let mut bench = Command::new(&self.moonrail);
        let Place { fabric, host, .. } = self.place;
        bench.args(["bench", &self.segment, "--name", host, "--fabrics", fabric, "--json", "--op", cell.op]);
        bench.args(["--duration", &format!("{}ms", (seconds * 1000.0) as u64)]);
        for (flag, value) in [
            ("--block", cell.block),
            ("--stride", stride(cell.block)),
            ("--batch", cell.batch),
            ("--threads", cell.threads),
        ] {
            bench.args([flag, &value.to_string()]);
        }
        let said = Process::start(&mut bench)?.output()?;
        let json = said.lines().position(|line| line == "{").ok_or_else(|| format!("no JSON: {said}"))?;
        let text: String = said.lines().skip(json).collect();
        let run = &serde_json::from_str::<Value>(&text)?["runs"][0];
        rate_of(run)
    }
}

/// `transfer_engine_bench` at both ends.
pub(crate) struct Mooncake {
    program: PathBuf,
    place: Place,
    version: String,
    segment: String,
    _target: Process,
}

impl Mooncake {
    pub(crate) fn start(programs: &Programs, place: Place) -> Result<Self, Box<dyn Error>> {
        let packages = programs.mooncake.join("lib/python3.11/site-packages");
        let program = packages.join("mooncake/transfer_engine_bench");
        let mut target = Process::start(command(&program, place)?.arg("--mode=target"))?;
        let segment = target.line(|line| {
            let (_, rest) = line.split_once("listening on ")?;
            rest.split_whitespace().next().map(str::to_owned)
        })?;
        // It registers its memory after it listens, and does not say when.
        std::thread::sleep(std::time::Duration::from_secs(2));
        let version = installed(&packages, "mooncake_transfer_engine_non_cuda")?;
        Ok(Self { program, place, version, segment, _target: target })
    }
}

/// What both ends of Mooncake's have.
fn command(program: &PathBuf, place: Place) -> Result<Command, Box<dyn Error>> {
    let Place { fabric, host, memory } = place;
    let port = TcpListener::bind((host, 0))?.local_addr()?.port();
    let mut command = Command::new(program);
    command.env("MC_TCP_BIND_ADDRESS", host);
    command.args(["--metadata_server=P2PHANDSHAKE", &format!("--protocol={fabric}")]);
    command.args([format!("--buffer_size={memory}"), format!("--local_server_name={host}:{port}")]);
    if fabric == "rdma" {
        command.arg(format!("--device_name={}", super::verbs::NIC));
    }
    Ok(command)
}

impl Side for Mooncake {
    fn name(&self) -> &'static str {
        "Mooncake"
    }

    fn version(&self) -> &str {
        &self.version
    }

    /// At least a second: its flag counts in seconds.
    fn batches_per_second(&mut self, cell: Cell, seconds: f64) -> Result<f64, Box<dyn Error>> {
        let mut command = command(&self.program, self.place)?;
        command.args(["--mode=initiator", &format!("--segment_id={}", self.segment)]);
        command.args([
            format!("--operation={}", cell.op),
            format!("--block_size={}", cell.block),
            format!("--batch_size={}", cell.batch),
            format!("--threads={}", cell.threads),
            format!("--duration={}", seconds.ceil()),
        ]);
        command.args(["--report_unit=KB", "--report_precision=6"]);
        let said = Process::start(&mut command)?.output()?;
        let rate = said.lines().find_map(|line| {
            let (_, rest) = line.split_once("throughput ")?;
            rest.strip_suffix(" KB/s")?.parse::<f64>().ok()
        });
        match rate {
            Some(rate) if rate > 0.0 => Ok(rate * 1000.0 / (cell.block * cell.batch) as f64),
            _ => Err(format!("it tells no throughput: {said}").into()),
        }
    }
}

/// Two NIXL agents over UCX.
pub(crate) struct Nixl {
    version: String,
    initiator: Process,
    remote: u64,
    target: Process,
}

impl Nixl {
    pub(crate) fn start(environment: &Path, place: Place) -> Result<Self, Box<dyn Error>> {
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/../tools/peers/nixl.py");
        let agent = || {
            let mut python = Command::new(environment.join("bin/python"));
            // UCX makes its connections over TCP even where it moves nothing that way.
            python.env("UCX_TLS", if place.fabric == "tcp" { "tcp" } else { "tcp,sm,self" });
            python.env("UCX_NET_DEVICES", "lo").env("NIXL_LOG_LEVEL", "ERROR");
            Process::start(python.arg(script))
        };
        let (mut target, mut initiator) = (agent()?, agent()?);
        // The initiator's caller makes the progress, which is fastest; the target needs a thread for it.
        let there =
            ask(&mut target, &json!({ "do": "start", "name": "target", "length": place.memory, "progress": true }))?;
        ask(&mut initiator, &json!({ "do": "start", "name": "initiator", "length": place.memory, "progress": false }))?;
        ask(&mut initiator, &json!({ "do": "connect", "metadata": there["metadata"] }))?;
        let remote = there["addr"].as_u64().ok_or("no address")?;
        let version = installed(&environment.join("lib/python3.11/site-packages"), "nixl_cu12")?;
        let side = Self { version, initiator, remote, target };
        side.pause(true)?;
        Ok(side)
    }

    /// The target's thread never sleeps: while others are measured it would have a processor to itself.
    fn pause(&self, paused: bool) -> Result<(), Box<dyn Error>> {
        self.target.pause(paused)?;
        self.initiator.pause(paused)
    }
}

/// One question, one answer.
fn ask(agent: &mut Process, question: &Value) -> Result<Value, Box<dyn Error>> {
    agent.tell(&question.to_string())?;
    agent.line(|line| serde_json::from_str(line.strip_prefix("= ")?).ok())
}

impl Side for Nixl {
    fn name(&self) -> &'static str {
        "NIXL+UCX"
    }

    fn version(&self) -> &str {
        &self.version
    }

    fn batches_per_second(&mut self, cell: Cell, seconds: f64) -> Result<f64, Box<dyn Error>> {
        let Cell { op, block, batch, .. } = cell;
        self.pause(false)?;
        let answer = ask(
            &mut self.initiator,
            &json!({
                "do": "measure", "op": op, "remote": self.remote, "block": block, "stride": stride(block),
                "batch": batch, "seconds": seconds,
            }),
        );
        self.pause(true)?;
        rate_of(&answer?)
    }
}

/// Batches a second of a measurement that tells how many there were, and in what time.
fn rate_of(measured: &Value) -> Result<f64, Box<dyn Error>> {
    match (measured["batches"].as_f64(), measured["seconds"].as_f64()) {
        (Some(batches), Some(seconds)) if batches > 0.0 => Ok(batches / seconds),
        _ => Err(format!("nothing was measured: {measured}").into()),
    }
}

/// The version of a Python package, by its folder `NAME-VERSION.dist-info`.
fn installed(packages: &PathBuf, name: &str) -> Result<String, Box<dyn Error>> {
    for entry in std::fs::read_dir(packages)? {
        let file = entry?.file_name();
        let version =
            file.to_str().and_then(|file| file.strip_prefix(name)?.strip_prefix('-')?.strip_suffix(".dist-info"));
        if let Some(version) = version {
            return Ok(version.to_owned());
        }
    }
    Err(format!("{name} is not in {}", packages.display()).into())
}
