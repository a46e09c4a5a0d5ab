//! A line of the log from time to time: how much was moved since the last one.

use std::sync::Arc;
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::time::{Duration, Instant};

use moonrail_datapath::core::CoreCounters;

use crate::log::Log;

/// Ends the thread when dropped.
pub(crate) struct Metrics {
    _stop: Sender<()>,
}

pub(crate) fn start(every: Duration, counters: Vec<Arc<CoreCounters>>, log: Log) -> Metrics {
    let (stop, stopped) = mpsc::channel::<()>();
    let told = log.clone();
    let body = move || {
        let total = || counters.iter().map(|core| core.bytes_done.get()).sum::<u64>();
        let (mut before, mut since) = (total(), Instant::now());
        while stopped.recv_timeout(every) == Err(RecvTimeoutError::Timeout) {
            let (now, at) = (total(), Instant::now());
            log.info(line(now - before, at - since));
            (before, since) = (now, at);
        }
    };
    if let Err(error) = std::thread::Builder::new().name("mr-metrics".into()).spawn(body) {
        told.warning(format!("no throughput lines (MC_TE_METRIC): no thread: {error}; see `ulimit -u`"));
    }
    Metrics { _stop: stop }
}

fn line(bytes: u64, span: Duration) -> String {
    let rate = bytes as f64 / span.as_secs_f64().max(1e-9) / 1e6;
    format!("[Metrics] throughput {rate:.2} MB/s ({bytes} bytes in {:.1} s)", span.as_secs_f64())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_line_has_rate_bytes_and_time() {
        assert_eq!(line(5_000_000, Duration::from_secs(2)), "[Metrics] throughput 2.50 MB/s (5000000 bytes in 2.0 s)");
    }
}
