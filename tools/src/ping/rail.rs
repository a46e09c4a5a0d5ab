//! One rail by itself: an engine that has no other, and one small transfer after the other.

use std::time::{Duration, Instant};

use hdrhistogram::Histogram;
use moonrail::{Fabric, RailInfo, Transfer};
use serde_json::{Value, json};

use crate::bench::load::histogram;
use crate::cli::PingArgs;
use crate::doctor::visitor;
use crate::failure::Result;
use crate::node;

/// What is printed of a histogram; the last is its maximum.
pub const QUANTILES: [f64; 4] = [0.5, 0.99, 0.999, 1.0];
/// For a rail that was up a moment ago.
const UP: Duration = Duration::from_secs(5);
/// For one transfer; the engine ends it earlier.
const WAIT: Duration = Duration::from_secs(15);
/// Transfers before those that count.
const WARM_UP: u64 = 10;

/// Nanoseconds of each transfer, or why there are none.
pub type Latency = std::result::Result<Histogram<u64>, String>;

/// What was found of one rail.
pub struct Measured {
    /// The path MTU both ends agreed on, in bytes.
    pub path_mtu: Option<u32>,
    /// From the peer's memory to ours.
    pub read: Latency,
    /// From ours to the peer's, if that was allowed.
    pub write: Option<Latency>,
}

/// Measures it.
///
/// # Errors
/// Wrong options; what the rail itself does wrong is in the result.
pub fn measure(args: &PingArgs, info: &RailInfo) -> Result<Measured> {
    let failed =
        |why: String| Measured { path_mtu: info.path_mtu.map(moonrail::Mtu::bytes), read: Err(why), write: None };
    if !info.usable {
        return Ok(failed(info.state.clone()));
    }
    let mut builder =
        visitor(&args.node)?.fabrics([info.fabric]).require(info.fabric).transfer_timeout(UP).log(|_, _| {});
    if info.fabric == Fabric::Rdma {
        builder =
            builder.nics([info.nic.as_str()]).peer_affinity(vec![(info.nic.clone(), vec![info.peer_nic.clone()])]);
    }
    let engine = match builder.cores(1).build() {
        Ok(engine) => engine,
        Err(e) => return Ok(failed(e.to_string())),
    };
    let both = over(&engine, args, info);
    engine.shutdown(node::SHUTDOWN_WITHIN);
    Ok(both.unwrap_or_else(failed))
}

fn over(engine: &moonrail::Engine, args: &PingArgs, info: &RailInfo) -> std::result::Result<Measured, String> {
    let told = |e: &dyn std::error::Error| e.to_string();
    let segment = engine.open_segment(&args.peer).map_err(|e| told(&e))?;
    let len = usize::try_from(args.size).map_err(|e| told(&e))?;
    let buffers = segment.buffers();
    let buffer = buffers.iter().find(|buffer| buffer.len >= args.size);
    let Some(remote) = buffer.map(|buffer| buffer.addr) else {
        return Err(format!(
            "the peer has no buffer of {} or more: give a smaller --size",
            crate::units::size(args.size)
        ));
    };
    let memory = engine.allocate(len, "*").map_err(|e| told(&e))?;
    let once = |transfer: Transfer| -> std::result::Result<u64, String> {
        let began = Instant::now();
        let batch = engine.submit(&segment, &[transfer]).map_err(|e| told(&e))?;
        batch.wait(WAIT).map_err(|e| told(&e))?;
        Ok(u64::try_from(began.elapsed().as_nanos()).unwrap_or(u64::MAX))
    };
    let all = |make: &dyn Fn() -> Transfer| -> Latency {
        let mut found = histogram();
        for _ in 0..WARM_UP.min(args.count) {
            once(make())?;
        }
        for _ in 0..args.count {
            found.saturating_record(once(make())?);
        }
        Ok(found)
    };
    let read = all(&|| Transfer::read_into(&memory, 0, remote, args.size));
    // What was read is written back: the peer's bytes stay what they are, unless it changes them itself meanwhile.
    let write = args.write.then(|| all(&|| Transfer::write_from(&memory, 0, remote, args.size)));
    let rail = engine.rails().into_iter().find(|rail| rail.nic == info.nic && rail.peer_nic == info.peer_nic);
    let path_mtu = rail.and_then(|rail| rail.path_mtu).or(info.path_mtu).map(moonrail::Mtu::bytes);
    Ok(Measured { path_mtu, read, write })
}

/// Percentiles in nanoseconds, or the problem.
pub fn to_json(latency: &Latency) -> Value {
    match latency {
        Ok(found) => json!({
            "count": found.len(), "p50_ns": found.value_at_quantile(0.5), "p99_ns": found.value_at_quantile(0.99),
            "p99.9_ns": found.value_at_quantile(0.999), "max_ns": found.max(),
        }),
        Err(why) => json!({ "problem": why }),
    }
}
