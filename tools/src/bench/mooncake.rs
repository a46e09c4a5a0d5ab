//! `moonrail bench --mode=…`: the command line, the layout and the result line of Mooncake's `transfer_engine_bench`.

use std::process::ExitCode;
use std::time::Duration;

use moonrail::{Engine, EngineBuilder, Fabric, Op, Region};
use serde_json::json;

use super::plan::{self, Layout, Limit, Places, Plan, Verify};
use super::report::{self, Run};
use super::{fresh_iteration, load, merge};
use crate::failure::{Failure, Result};
use crate::gflags::{self, Asked, Flag, Host, Kind, Values};
use crate::node;
use crate::say;
use crate::serve;
use crate::signal::Stop;

const USAGE: &str = "moonrail bench --mode=initiator|target: stands in for transfer_engine_bench, same flags.\n\
                     One dash or two, --flag=value or --flag value, --noflag for false.";
/// Longest time of a batch; that program waits for ever.
const TIMEOUT: Duration = Duration::from_secs(30);

/// Whether `bench`'s arguments are meant for this command line.
pub fn is_meant(args: &[String]) -> bool {
    args.iter().take_while(|arg| *arg != "--").any(|arg| {
        let flag = arg.strip_prefix("--").or_else(|| arg.strip_prefix('-'));
        flag.is_some_and(|flag| matches!(flag.split('=').next(), Some("mode" | "flagfile")))
    })
}

/// Every flag of that program, those of its GPU builds, and three of ours at the end.
pub fn flags() -> Vec<Flag> {
    use Kind::{Bool, Int32, Text, Uint32, Uint64};
    let flag = |name, kind, default: &str, help| Flag { name, kind, default: default.to_owned(), help };
    vec![
        flag("mode", Text, "initiator", "initiator moves blocks to or from a target; target offers memory"),
        flag("metadata_server", Text, "192.168.3.77:2379", "etcd HOST:PORT, http://…/metadata, or P2PHANDSHAKE"),
        flag("local_server_name", Text, &node::host_name(), "name of this node, which others open"),
        flag("segment_id", Text, "192.168.3.76", "name of the target"),
        flag("protocol", Text, "rdma", "transport: rdma|tcp"),
        flag("device_name", Text, "mlx5_2", "NICs to use, joined by commas"),
        flag("nic_priority_matrix", Text, "", "file with a NIC priority matrix, instead of device_name"),
        flag("auto_discovery", Bool, "false", "use the NICs that are found, instead of device_name"),
        flag("operation", Text, "read", "read or write"),
        flag("block_size", Uint64, "65536", "bytes of each transfer"),
        flag("batch_size", Int32, "128", "transfers of a batch"),
        flag("threads", Int32, "12", "threads that submit"),
        flag("buffer_size", Uint64, "1073741824", "bytes of the buffer of each NUMA node"),
        flag("duration", Int32, "10", "seconds"),
        flag("report_unit", Text, "GB", "unit of the throughput: GB GiB Gb MB MiB Mb KB KiB Kb"),
        flag("report_precision", Uint32, "2", "digits after the point of the throughput"),
        flag("backend", Text, "classic", "classic"),
        flag("use_vram", Bool, "false", "GPU memory: not in this build"),
        flag("init_mem", Bool, "true", "memory starts as zeroes here, whatever this says"),
        flag("gpu_id", Int32, "0", "GPU: not in this build"),
        flag("verify", Bool, "false", "moonrail only: check every byte; one wrong byte fails the run"),
        flag("iterations", Uint64, "0", "moonrail only: batches of each thread, instead of duration"),
        flag("json", Bool, "false", "moonrail only: print the result as JSON"),
    ]
}

/// Reads the command line (after `bench`) and runs it. As that program: 1 for every failure, 0 otherwise.
pub fn run(args: &[String]) -> ExitCode {
    let flags = flags();
    let values = match gflags::parse(&flags, args, &Host) {
        Ok(Asked::Run(values)) => values,
        Ok(Asked::Help) => {
            say::line(gflags::help(USAGE, &flags));
            return ExitCode::from(1);
        }
        Ok(Asked::Version) => {
            say::line(format_args!("moonrail {}", env!("CARGO_PKG_VERSION")));
            return ExitCode::SUCCESS;
        }
        Err(faults) => {
            for fault in faults {
                eprintln!("{fault}");
            }
            return ExitCode::from(1);
        }
    };
    let done = Settings::read(&values).and_then(|settings| match settings.mode {
        Mode::Initiator => initiator(&settings),
        Mode::Target => target(&settings),
    });
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            // The word a script that wraps that program looks for.
            say::line("FAILED");
            let _ = failure.report();
            ExitCode::from(1)
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Mode {
    Initiator,
    Target,
}

#[derive(Clone, PartialEq, Eq, Debug)]
enum Nics {
    Found,
    Named(Vec<String>),
    Matrix(String),
}

#[derive(Clone, PartialEq, Eq, Debug)]
struct Settings {
    mode: Mode,
    fabric: Fabric,
    metadata: String,
    name: String,
    segment: String,
    nics: Nics,
    op: Op,
    layout: Layout,
    buffer_size: u64,
    limit: Limit,
    unit: Unit,
    precision: usize,
    verify: bool,
    json: bool,
}

impl Settings {
    fn read(values: &Values) -> Result<Self> {
        let one_of = |flag: &str, words: &str| {
            Failure::new(
                format!("Unsupported {flag}: must be {words}, not {:?}", values.text(flag)),
                format!("give --{flag} one of them"),
            )
        };
        let mode = match values.text("mode") {
            "initiator" => Mode::Initiator,
            "target" => Mode::Target,
            _ => return Err(one_of("mode", "'initiator' or 'target'")),
        };
        let op = match values.text("operation") {
            "read" => Op::Read,
            "write" => Op::Write,
            _ => return Err(one_of("operation", "'read' or 'write'")),
        };
        match values.text("backend") {
            "classic" => {}
            "tent" => return Err(Failure::new("TENT backend is not enabled", "leave out --backend=tent")),
            _ => return Err(one_of("backend", "'classic' or 'tent'")),
        }
        let fabric = match values.text("protocol") {
            "rdma" => Fabric::Rdma,
            "tcp" => Fabric::Tcp,
            _ => return Err(one_of("protocol", "'rdma' or 'tcp'")),
        };
        if values.is_set("use_vram") {
            return Err(Failure::new("use_vram: this build knows no GPU memory", "leave it out, or say --nouse_vram"));
        }
        let positive = |flag: &str| {
            values.number::<u64>(flag).filter(|n| *n > 0).ok_or_else(|| one_of(flag, "a number greater than 0"))
        };
        let block = positive("block_size")?;
        let layout = Layout::new(block, block, positive("batch_size")?, positive("threads")?)?;
        let limit = match values.number::<u64>("iterations") {
            Some(n) if n > 0 => Limit::Batches(n),
            _ => Limit::Time(Duration::from_secs(positive("duration")?)),
        };
        let (unit, warning) = Unit::read(values.text("report_unit"));
        let (buffer_size, raised) = raised(positive("buffer_size")?, layout.extent());
        [warning, raised].into_iter().flatten().for_each(|w| eprintln!("WARNING: {w}"));
        Ok(Self {
            mode,
            fabric,
            metadata: values.text("metadata_server").to_owned(),
            name: values.text("local_server_name").to_owned(),
            segment: values.text("segment_id").to_owned(),
            nics: nics(values)?,
            op,
            layout,
            buffer_size,
            limit,
            unit,
            precision: values.number("report_precision").unwrap_or(2),
            verify: values.is_set("verify"),
            json: values.is_set("json"),
        })
    }

    fn builder(&self) -> EngineBuilder {
        let builder =
            Engine::builder().metadata(self.metadata.as_str()).name(self.name.as_str()).transfer_timeout(TIMEOUT);
        // That program installs one transport.
        let builder = builder.fabrics([self.fabric]);
        if self.fabric != Fabric::Rdma {
            return builder;
        }
        match &self.nics {
            Nics::Found => builder,
            Nics::Named(names) => builder.nics(names.iter().map(String::as_str)).nic_priority_matrix(matrix(names)),
            Nics::Matrix(json) => builder.nic_priority_matrix(json.as_str()),
        }
    }

    /// One buffer for each NUMA node.
    fn buffers(&self, engine: &Engine) -> Result<Vec<Region>> {
        (0..engine.numa_nodes().len().max(1))
            .map(|i| node::allocate(engine, self.buffer_size, &format!("cpu:{i}")))
            .collect()
    }
}

fn nics(values: &Values) -> Result<Nics> {
    if values.is_set("auto_discovery") {
        return Ok(Nics::Found);
    }
    let file = values.text("nic_priority_matrix");
    if !file.is_empty() {
        return std::fs::read_to_string(file).map(Nics::Matrix).map_err(|e| {
            let next = "give --nic_priority_matrix a file that can be read, or --device_name instead";
            Failure::new(format!("the NIC priority matrix {file} cannot be read: {e}"), next)
        });
    }
    let names: Vec<String> =
        values.text("device_name").split(',').map(str::trim).filter(|n| !n.is_empty()).map(str::to_owned).collect();
    Ok(if names.is_empty() { Nics::Found } else { Nics::Named(names) })
}

/// What that program makes of `device_name`: the NICs are preferred everywhere, wherever they are plugged in.
fn matrix(names: &[String]) -> String {
    let each = json!([names, []]);
    json!({ "cpu:0": each, "cpu:1": each, "cuda:0": each, "musa:0": each, "maca:0": each }).to_string()
}

/// A buffer must hold every block of every thread.
fn raised(buffer_size: u64, require_size: u64) -> (u64, Option<String>) {
    if buffer_size >= require_size {
        return (buffer_size, None);
    }
    let words = format!("Invalid flag: buffer size is smaller than require_size, adjust to {require_size}");
    (require_size, Some(words))
}

#[derive(Clone, PartialEq, Debug)]
struct Unit {
    name: &'static str,
    bytes: f64,
}

impl Eq for Unit {}

impl Unit {
    fn read(name: &str) -> (Self, Option<String>) {
        const UNITS: [(&str, f64); 9] = [
            ("GB", 1e9),
            ("GiB", (1u64 << 30) as f64),
            ("Gb", 1e9 / 8.0),
            ("MB", 1e6),
            ("MiB", (1u64 << 20) as f64),
            ("Mb", 1e6 / 8.0),
            ("KB", 1e3),
            ("KiB", 1024.0),
            ("Kb", 1e3 / 8.0),
        ];
        if let Some((name, bytes)) = UNITS.iter().find(|(known, _)| *known == name) {
            return (Self { name, bytes: *bytes }, None);
        }
        let words = format!(
            "Invalid flag: report_unit only support GB|GiB|Gb|MB|MiB|Mb|KB|KiB|Kb, not support {name} . Now use GB(default) \
             as report_unit"
        );
        (Self { name: UNITS[0].0, bytes: UNITS[0].1 }, Some(words))
    }

    fn throughput(&self, bytes: u64, seconds: f64, precision: usize) -> String {
        // More digits than a double has say nothing; a huge number would only fill the disk.
        let precision = precision.min(20);
        format!("{:.precision$} {}/s", bytes as f64 / seconds / self.bytes, self.name)
    }
}

/// `Test completed: duration 10.00, batch count 1234, throughput 1.23 GB/s`
fn result_line(outcome: &load::Outcome, unit: &Unit, precision: usize) -> String {
    let seconds = outcome.elapsed.as_secs_f64().max(1e-9);
    format!(
        "Test completed: duration {seconds:.2}, batch count {}, throughput {}",
        outcome.batches,
        unit.throughput(outcome.bytes, seconds, precision)
    )
}

fn initiator(settings: &Settings) -> Result<()> {
    let stop = serve::signals()?;
    let engine = node::start(settings.builder())?;
    node::end(&engine, initiate(&engine, settings, &stop))
}

fn initiate(engine: &Engine, settings: &Settings, stop: &Stop) -> Result<()> {
    let local = settings.buffers(engine)?;
    let check = if settings.verify { settings.buffers(engine)? } else { Vec::new() };
    let segment = engine.open_segment(&settings.segment).map_err(|e| Failure::told(&e))?;
    let used = local.len().min(settings.layout.threads as usize);
    let remote = plan::remote_bases(&settings.segment, &segment.buffers(), 0, used, settings.layout)?;
    let plan = Plan {
        op: settings.op,
        layout: settings.layout,
        limit: settings.limit,
        verify: if settings.verify { Verify::ReadBack } else { Verify::No },
        timeout: TIMEOUT,
        first_iteration: fresh_iteration(),
    };
    let outcome = load::run(engine, &segment, &Places { local, check, remote }, plan, (1, 1), stop)?;
    let line = result_line(&outcome, &settings.unit, settings.precision);
    let rails = report::rails(engine, segment.name());
    let run = Run { plan, outcome };
    if settings.json {
        let mut all = json!({ "segment": segment.name(), "result": line, "runs": [report::run_json(&run)] });
        merge(&mut all, report::engine_json(engine, segment.name(), &rails));
        say::line(format!("{all:#}"));
    } else {
        (0..settings.layout.threads).for_each(|t| say::line(format_args!("Worker {t} stopped!")));
        say::line(format_args!(
            "{line}\n\n{}\n{}",
            report::latency_text(&run),
            report::rails_text(engine, segment.name(), &rails)
        ));
    }
    Ok(())
}

fn target(settings: &Settings) -> Result<()> {
    let stop = serve::signals()?;
    let engine = node::start(settings.builder())?;
    let done = settings.buffers(&engine).map(|regions| {
        serve::announce(&engine, &regions, settings.json);
        serve::until_asked(&engine, &regions, &stop, true);
    });
    node::end(&engine, done)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(line: &str) -> Result<Settings> {
        let args: Vec<String> = line.split_whitespace().map(str::to_owned).collect();
        match gflags::parse(&flags(), &args, &Host) {
            Ok(Asked::Run(values)) => Settings::read(&values),
            other => panic!("{line}: {other:?}"),
        }
    }

    #[test]
    fn the_defaults_are_those_of_the_program_it_stands_in_for() {
        let all = settings("").unwrap();
        assert_eq!((all.mode, all.op, all.buffer_size), (Mode::Initiator, Op::Read, 1 << 30));
        assert_eq!(all.layout, Layout { block: 65536, stride: 65536, batch: 128, threads: 12 });
        assert_eq!(all.limit, Limit::Time(Duration::from_secs(10)));
        assert_eq!((all.metadata.as_str(), all.segment.as_str()), ("192.168.3.77:2379", "192.168.3.76"));
        assert_eq!(all.nics, Nics::Named(vec!["mlx5_2".into()]));
        assert_eq!(all.name, node::host_name());
        assert_eq!((all.unit.name, all.precision), ("GB", 2));
    }

    #[test]
    fn every_flag_has_its_meaning() {
        let all = settings(
            "-mode target --metadata_server=P2PHANDSHAKE --local_server_name a:1 --segment_id b:2 --protocol=rdma \
             --device_name=rxe0,rxe1 --operation=write --block_size=0x1000 --batch_size 4 --threads=2 --duration=3 \
             --report_unit=MiB --report_precision=0 --backend=classic --nouse_vram --noauto_discovery --verify",
        )
        .unwrap();
        assert_eq!((all.mode, all.op, all.verify), (Mode::Target, Op::Write, true));
        assert_eq!(all.nics, Nics::Named(vec!["rxe0".into(), "rxe1".into()]));
        assert_eq!(all.layout, Layout { block: 4096, stride: 4096, batch: 4, threads: 2 });
        assert_eq!(all.fabric, Fabric::Rdma);
        assert_eq!(settings("--protocol=tcp").unwrap().fabric, Fabric::Tcp);
        assert_eq!(settings("--auto_discovery").unwrap().nics, Nics::Found);
    }

    #[test]
    fn named_devices_are_preferred_everywhere() {
        let matrix = matrix(&["mlx5_2".into(), "mlx5_3".into()]);
        let matrix = moonrail_control::metadata::PriorityMatrix::parse(&matrix).unwrap();
        for location in ["cpu:0", "cpu:1", "cuda:0", "musa:0", "maca:0"] {
            let nics = matrix.for_location(location);
            assert_eq!(nics.preferred, ["mlx5_2", "mlx5_3"], "{location}");
            assert!(nics.available.is_empty(), "{location}");
        }
    }

    #[test]
    fn what_cannot_be_done_is_refused_with_words() {
        for (line, words) in [
            ("--mode=both", "'initiator' or 'target'"),
            ("--operation=copy", "'read' or 'write'"),
            ("--backend=tent", "TENT backend is not enabled"),
            ("--protocol=nvlink", "'rdma' or 'tcp'"),
            ("--threads=0", "greater than 0"),
            ("--threads=-1", "greater than 0"),
            ("--nic_priority_matrix=/nowhere", "/nowhere"),
            ("--use_vram", "GPU"),
        ] {
            let said = settings(line).unwrap_err().to_string();
            assert!(said.contains(words), "{line}: {said}");
        }
    }

    #[test]
    fn the_buffer_is_raised_with_the_same_words() {
        let (size, words) = raised(100, 200);
        assert_eq!(size, 200);
        assert_eq!(words.unwrap(), "Invalid flag: buffer size is smaller than require_size, adjust to 200");
        assert_eq!(raised(200, 200), (200, None));
    }

    #[test]
    fn the_result_line_is_exactly_that_line() {
        let outcome = load::Outcome {
            batches: 1500,
            bytes: 1500 * 128 * 65536,
            verified: 0,
            elapsed: Duration::from_millis(10_004),
            latency: load::histogram(),
            stopped: false,
        };
        let line = |unit, precision| result_line(&outcome, &Unit::read(unit).0, precision);
        assert_eq!(line("GB", 2), "Test completed: duration 10.00, batch count 1500, throughput 1.26 GB/s");
        assert_eq!(line("Gb", 1), "Test completed: duration 10.00, batch count 1500, throughput 10.1 Gb/s");
        assert_eq!(line("MiB", 0), "Test completed: duration 10.00, batch count 1500, throughput 1200 MiB/s");
        let (unit, warning) = Unit::read("PB");
        assert_eq!(unit.name, "GB");
        assert!(warning.unwrap().contains("not support PB"));
    }

    #[test]
    fn its_command_line_is_told_from_ours() {
        let meant = |line: &str| is_meant(&line.split_whitespace().map(str::to_owned).collect::<Vec<_>>());
        assert!(meant("--mode=target") && meant("-mode target") && meant("--threads=1 --mode initiator"));
        assert!(meant("--flagfile=x"));
        assert!(!meant("host:1 --op read") && !meant("--model") && !meant("-- --mode"));
    }
}
