//! The `moonrail` command; see the library beside this file.

use std::process::ExitCode;

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args_os().map(|arg| arg.to_string_lossy().into_owned()).collect();
    moonrail_tools::main(&args)
}
