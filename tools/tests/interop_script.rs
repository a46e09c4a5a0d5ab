//! `moonrail bench` in place of `transfer_engine_bench`, in a script that is not changed: at one end, at the other, at both,
//! and at none, which shows what the script does with the program it was written for.

mod host_support;
mod interop_support;
#[path = "interop_support/stores.rs"]
mod stores;

use std::path::Path;
use std::process::Command;

use host_support::RUN;
use host_support::ports::free_port;
use host_support::process::{Process, moonrail};
use interop_support::{Folder, LOOPBACK, Table, transfer_engine_bench};
use stores::Store;

fn script(target: &str, initiator: &str, store: &str, folder: &Path) -> Result<String, String> {
    let mut command = Command::new(Path::new(env!("CARGO_MANIFEST_DIR")).join("peers/bench.sh"));
    command
        .env("TARGET", target)
        .env("INITIATOR", initiator)
        .env("STORE", store)
        .env("FLAGS", "--protocol=tcp --buffer_size=16777216")
        .env("LOG", folder)
        .env("TARGET_NAME", format!("127.0.0.1:{}", free_port()))
        .env("INITIATOR_NAME", format!("127.0.0.1:{}", free_port()))
        .envs(LOOPBACK.iter().copied());
    let ended = Process::start(&format!("{target} and {initiator} over {store}"), command).wait(RUN);
    if ended.code != 0 {
        return Err(ended.stdout);
    }
    let rates: Vec<String> = ended.stdout.lines().filter_map(rate).collect();
    if rates.len() == 2 { Ok(rates.join(", ")) } else { Err(format!("not the result lines:\n{}", ended.stdout)) }
}

fn again(error: &str, once: impl Fn() -> Result<String, String>) -> Result<String, String> {
    println!("once more, after: {error}");
    once()
}

/// `read: Test completed: duration 1.00, batch count 812, throughput 425.72 MB/s`, to the letter.
fn rate(line: &str) -> Option<String> {
    let (operation, line) = line.split_once(": ")?;
    let rest = line.strip_prefix("Test completed: duration ")?;
    let (duration, rest) = rest.split_once(", batch count ")?;
    let (batches, rest) = rest.split_once(", throughput ")?;
    let rate = rest.strip_suffix(" MB/s")?;
    let right = duration.parse::<f64>().is_ok_and(|s| (1.0..10.0).contains(&s))
        && batches.parse::<u64>().is_ok_and(|n| n > 0)
        && rate.parse::<f64>().is_ok_and(|r| r > 0.0)
        && rate.split('.').nth(1).is_some_and(|digits| digits.len() == 2);
    right.then(|| format!("{operation} {rate} MB/s"))
}

#[test]
fn one_script_four_ways_over_every_store() {
    let folder = Folder::new("interop-script");
    let ours = format!("{} bench", moonrail());
    let stock = transfer_engine_bench().to_string_lossy().into_owned();
    let columns = ["script, tcp", "ours to stock target", "stock to our target", "ours to ours", "stock to stock"];
    let mut table = Table::headed(&columns);
    for (name, store) in [("etcd", Store::etcd()), ("http", Store::http()), ("none (P2P)", Store::none())] {
        // Without a store a stock initiator sometimes (1 of 6) says within a millisecond that it has no segment of our target,
        // and nothing else: which side's fault that is, is open. Each attempt that fails is printed.
        let run = |target: &str, initiator: &str| {
            let once = || script(target, initiator, store.uri(), &folder.0);
            once().or_else(|e| again(&e, once)).or_else(|e| again(&e, once))
        };
        let outcomes = [run(&stock, &ours), run(&ours, &stock), run(&ours, &ours), run(&stock, &stock)];
        table.row(&[name], &outcomes);
    }
    table.close();
}
