//! The `moonrail` command.
//!
//! In the order an operator meets them: [`cli`] reads the command line, [`gflags`] the one of `transfer_engine_bench`;
//! [`node`] makes an engine of it; [`nics`], [`topology`], [`serve`], [`mod@bench`], [`ping`], [`doctor`], [`segments`],
//! [`incidents`] and [`top`] are the subcommands; [`pages`] makes manual pages and completions of the command line;
//! [`failure`] says how it ends.
//! [`units`], [`table`], [`say`], [`progress`], [`port_counters`] and [`signal`] are what they share.
#![deny(missing_docs)]

pub mod bench;
pub mod cli;
pub mod doctor;
pub mod failure;
pub mod gflags;
pub mod incidents;
pub mod nics;
pub mod node;
pub mod pages;
pub mod ping;
pub mod port_counters;
pub mod progress;
pub mod say;
pub mod segments;
pub mod serve;
pub mod signal;
pub mod table;
pub mod top;
pub mod topology;
pub mod units;

use std::process::ExitCode;

use clap::Parser;

/// Runs the command line `args`, the program's name first.
pub fn main(args: &[String]) -> ExitCode {
    let program = args.first().map_or("moonrail", String::as_str);
    if std::path::Path::new(program).file_name().is_some_and(|name| name == "transfer_engine_bench") {
        return bench::mooncake::run(&args[1..]);
    }
    if args.get(1).is_some_and(|word| word == "bench") && bench::mooncake::is_meant(&args[2..]) {
        return bench::mooncake::run(&args[2..]);
    }
    let done = match cli::Cli::parse_from(args).command {
        cli::Command::Nics(args) => nics::run(&args),
        cli::Command::Topology(args) => topology::run(&args),
        cli::Command::Serve(args) => serve::run(&args),
        cli::Command::Bench(args) => bench::run(&args),
        cli::Command::Ping(args) => ping::run(&args),
        cli::Command::Doctor(args) => doctor::run(&args),
        cli::Command::Segments(args) => segments::run(&args),
        cli::Command::Incidents(args) => incidents::run(&args),
        cli::Command::Top(args) => top::run(&args),
        cli::Command::Completions(args) => pages::completions(&args),
        cli::Command::Man(args) => pages::man(&args),
    };
    done.unwrap_or_else(|failure| failure.report())
}

/// The program on README's first screen is compiled, so that it stays true.
#[cfg(doctest)]
#[doc = include_str!("../../README.md")]
struct Readme;
