//! `moonrail segments`: what is registered in the metadata store, by whom, since when, and whether the node is still there.
//!
//! [`record`] makes segments of keys, [`probe`] sees who answers, [`text`] shows both.

pub mod probe;
pub mod record;
pub mod text;

use std::process::ExitCode;

use moonrail_control::metadata::{Catalogue, KeySpace, MetadataUri, StoreError, StoreOptions};
use serde_json::json;

use crate::cli::{PruneArgs, SegmentsArgs, SegmentsCommand, StoreArgs};
use crate::failure::{Failure, Result};
use crate::say;
use probe::Life;
use record::Record;

/// Runs the subcommand.
pub fn run(args: &SegmentsArgs) -> Result<ExitCode> {
    match &args.command {
        SegmentsCommand::Ls(args) => {
            let found = Store::open(&args.store)?.find(&args.names, !args.no_probe)?;
            if args.json {
                say::line(format!("{:#}", json!({ "segments": found.iter().map(text::json).collect::<Vec<_>>() })));
            } else {
                say::line(text::list(&found).trim_end());
            }
            Ok(ExitCode::SUCCESS)
        }
        SegmentsCommand::Show(args) => {
            let found = Store::open(&args.store)?.find(std::slice::from_ref(&args.name), true)?;
            for record in &found {
                if args.json {
                    say::line(format!("{:#}", text::json(record)));
                } else {
                    say::line(text::whole(record).trim_end());
                }
            }
            Ok(ExitCode::SUCCESS)
        }
        SegmentsCommand::Prune(args) => prune(args),
    }
}

/// A store and the cluster in it that is meant.
struct Store {
    catalogue: Catalogue,
    keys: KeySpace,
    listable: bool,
}

impl Store {
    fn open(args: &StoreArgs) -> Result<Self> {
        let uri = match MetadataUri::parse(&args.metadata) {
            Ok(MetadataUri::Store(uri)) => uri,
            Ok(MetadataUri::PeerToPeer) => {
                return Err(Failure::usage(
                    "without a metadata server nothing is registered anywhere: each node answers for itself",
                    "name a store with --metadata, or ask one node: moonrail bench HOST:PORT --iterations 1",
                ));
            }
            Err(e) => return Err(Failure::usage(e, "moonrail segments --help")),
        };
        let listable = !matches!(uri, moonrail_control::metadata::StoreUri::Http(_));
        let catalogue = Catalogue::open(&uri, &StoreOptions::default()).map_err(|e| Failure::told(&e))?;
        Ok(Self { catalogue, keys: KeySpace::new(&args.cluster_id), listable })
    }

    /// The segments of these names, all if none is named; each at least once, or an error.
    fn find(&self, names: &[String], probe: bool) -> Result<Vec<Record>> {
        let held = if names.is_empty() {
            if !self.listable {
                return Err(Failure::usage(
                    StoreError::Unsupported { what: "listing the segments" },
                    "name them: moonrail segments ls NAME…",
                ));
            }
            self.catalogue.list(self.keys.prefix()).map_err(|e| Failure::told(&e))?
        } else {
            let mut held = Vec::new();
            for name in names {
                let before = held.len();
                for key in [self.keys.segment(name), self.keys.rpc_meta(name)] {
                    held.extend(self.catalogue.get(&key).map_err(|e| Failure::told(&e))?);
                }
                if held.len() == before {
                    return Err(Failure::new(
                        format!("there is no segment {name:?} under {}", self.keys.prefix()),
                        "the name must be that of the node, letter for letter; `moonrail segments ls` has all of them \
                         (MC_METADATA_CLUSTER_ID or --cluster-id choose the cluster)",
                    ));
                }
            }
            held
        };
        let mut records = record::group(&self.keys, held);
        if probe {
            probe::all(&mut records);
        }
        Ok(records)
    }
}

fn prune(args: &PruneArgs) -> Result<ExitCode> {
    let store = Store::open(&args.store)?;
    let found = store.find(&args.names, true)?;
    let (stale, kept): (Vec<_>, Vec<_>) = found.into_iter().partition(|record| match &record.life {
        Life::Gone { .. } => true,
        Life::Silent { .. } => args.silent,
        Life::Answers | Life::Unknown { .. } => false,
    });
    if stale.is_empty() {
        let silent = kept.iter().filter(|record| matches!(record.life, Life::Silent { .. })).count();
        let hint =
            if silent > 0 { format!("; {silent} do not answer: --silent counts them as stale") } else { String::new() };
        say::line(format!("nothing to prune: {} segments, none of them stale{hint}", kept.len()));
        return Ok(ExitCode::SUCCESS);
    }
    say::line(text::list(&stale).trim_end());
    if !args.yes {
        say::line(format!("\n{} of {} would be deleted; with --yes they are", stale.len(), stale.len() + kept.len()));
        return Ok(ExitCode::SUCCESS);
    }
    let mut changed = 0;
    for record in &stale {
        for held in &record.keys {
            if store.catalogue.delete(held).map_err(|e| Failure::told(&e))? {
                say::line(format!("deleted {}", held.key));
            } else {
                say::line(format!("kept    {}: it was written or deleted in the meantime", held.key));
                changed += 1;
            }
        }
    }
    if changed > 0 {
        say::line(format!("{changed} keys are not as they were shown: `moonrail segments ls` looks again"));
    }
    Ok(ExitCode::SUCCESS)
}
