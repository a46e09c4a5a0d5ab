//! moonrail's experiments: `cargo run -p moonrail-benches --release -- handoff`, or another name.
//!
//! Each writes what it measured, on what machine, from which commit, to benches/results/<date>-<commit>-<machine>.json.
//! `--quick` is a tiny size that shows that the experiment still runs; its numbers mean nothing and are not saved.

mod bare;
mod control;
mod handoff;
mod host;
mod instructions;
mod null;
mod page;
mod peers;
mod pieces;
mod record;
mod rig;
mod scale;
mod sockets;

use std::path::PathBuf;
use std::process::ExitCode;

const USAGE: &str =
    "usage: moonrail-benches control|handoff|host|instructions|peers|scale|verbs [--quick] [--out FOLDER]
       moonrail-benches page

  control   nodes that start, look-ups and connections, with a real etcd
  handoff   submit -> core -> completion over a NIC that completes at once: what the engine itself costs
  host      two engines of this host, over shared memory and TCP, beside a plain copy and a bare TCP program
  instructions
            of a caller's thread for one request over shared memory, counted by callgrind (needs valgrind)
  peers     beside Mooncake, and NIXL over UCX, on this host: `cargo xtask bench peers` installs them
  scale     how cost grows with rails, regions and transfers of a batch, over a NIC that completes at once
  verbs     over RDMA beside perftest and Mooncake, in the lab: `cargo xtask bench verbs` boots it
  page      writes the tables of docs/performance.md from the newest results
  --quick   a tiny run, not saved unless --out is given
  --out     folder for the JSON (default: benches/results)";

fn main() -> ExitCode {
    let mut quick = false;
    let mut out: Option<PathBuf> = None;
    let mut experiment = None;
    let mut words = std::env::args().skip(1);
    if std::env::args().nth(1).as_deref() == Some("measured") {
        // This very program under callgrind, started by `instructions`.
        let words: Vec<String> = words.skip(1).collect();
        return match instructions::child(&words) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                eprintln!("{error}");
                ExitCode::FAILURE
            }
        };
    }
    while let Some(word) = words.next() {
        match word.as_str() {
            "--quick" => quick = true,
            "--out" => out = words.next().map(PathBuf::from),
            "control" | "handoff" | "host" | "instructions" | "peers" | "scale" | "verbs" | "page"
                if experiment.is_none() =>
            {
                experiment = Some(word);
            }
            _ => {
                eprintln!("{word:?} is not understood\n{USAGE}");
                return ExitCode::from(2);
            }
        }
    }
    let Some(experiment) = experiment else {
        eprintln!("{USAGE}");
        return ExitCode::from(2);
    };
    let results = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/results"));
    if experiment == "page" {
        let page = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/performance.md"));
        return match page::write(&page, &results) {
            Ok(taken) => {
                for path in taken {
                    println!("{} has {}", page.display(), path.display());
                }
                ExitCode::SUCCESS
            }
            Err(error) => {
                eprintln!("page failed: {error}");
                ExitCode::FAILURE
            }
        };
    }
    let folder = out.or((!quick).then_some(results));
    let ran = match experiment.as_str() {
        "control" => control::run(quick),
        "host" => host::run(quick),
        "instructions" => instructions::run(quick),
        "peers" => peers::run(quick),
        "scale" => scale::run(quick),
        "verbs" => peers::verbs::run(quick),
        _ => handoff::run(quick),
    };
    let ran = ran.map_err(|error| error.to_string());
    let saved = ran.and_then(|found| match folder {
        Some(folder) => record::save(&folder, &experiment, &found).map(Some).map_err(|error| error.to_string()),
        None => Ok(None),
    });
    match saved {
        Ok(path) => {
            if let Some(path) = path {
                println!("saved {}", path.display());
            }
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("{experiment} failed: {error}");
            ExitCode::FAILURE
        }
    }
}
