//! moonrail's experiments: `cargo run -p moonrail-benches --release -- handoff`.
//!
//! Each writes what it measured, on what machine, from which commit, to benches/results/<date>-<commit>-<machine>.json.
//! `--quick` is a tiny size that shows that the experiment still runs; its numbers mean nothing and are not saved.

mod handoff;
mod null;
mod record;
mod rig;

use std::path::PathBuf;
use std::process::ExitCode;

const USAGE: &str = "usage: moonrail-benches handoff [--quick] [--out FOLDER]

  handoff   submit -> core -> completion over a NIC that completes at once: what the engine itself costs
  --quick   a tiny run, not saved unless --out is given
  --out     folder for the JSON (default: benches/results)";

fn main() -> ExitCode {
    let mut quick = false;
    let mut out: Option<PathBuf> = None;
    let mut experiment = None;
    let mut words = std::env::args().skip(1);
    while let Some(word) = words.next() {
        match word.as_str() {
            "--quick" => quick = true,
            "--out" => out = words.next().map(PathBuf::from),
            "handoff" if experiment.is_none() => experiment = Some(word),
            _ => {
                eprintln!("{word:?} is not understood\n{USAGE}");
                return ExitCode::from(2);
            }
        }
    }
    if experiment.is_none() {
        eprintln!("{USAGE}");
        return ExitCode::from(2);
    }
    let results = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/results"));
    let folder = out.or((!quick).then_some(results));
    let ran = handoff::run(quick).map_err(|error| error.to_string());
    let saved = ran.and_then(|cases| match folder {
        Some(folder) => record::save(&folder, "handoff", &cases).map(Some).map_err(|error| error.to_string()),
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
            eprintln!("handoff failed: {error}");
            ExitCode::FAILURE
        }
    }
}
