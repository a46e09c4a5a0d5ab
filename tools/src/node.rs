//! From the options of a node to a running engine.

use std::net::SocketAddr;
use std::time::Duration;

use moonrail::{Engine, EngineBuilder, Fabric, PollMode, Region};

use crate::cli::{NodeArgs, Poll};
use crate::failure::{Failure, Result};

/// How long an engine may take to end what is in flight before it is cut.
pub const SHUTDOWN_WITHIN: Duration = Duration::from_secs(10);
/// Rails that carry something take this long at most to come up; more is told as an error.
pub const SHORTEST_TIMEOUT: Duration = Duration::from_secs(5);

/// The builder that the options describe.
pub fn builder(args: &NodeArgs) -> Result<EngineBuilder> {
    let name = name(args)?;
    let mut builder = Engine::builder().metadata(args.metadata.as_str());
    if let Some(name) = name {
        // Whoever names a port means it; without one the engine draws a free one.
        builder = builder.rpc_port_from_name(has_port(&name)).name(name);
    }
    if let Some(path) = &args.nic_priority_matrix {
        builder = builder.nic_priority_matrix_file(path);
    } else if args.nics != ["auto"] {
        builder = builder.nics(args.nics.iter().map(String::as_str));
    }
    if !args.fabrics.is_empty() {
        builder = builder.fabrics(args.fabrics.iter().map(|word| (*word).into()));
    }
    if let Some(fabric) = args.require {
        builder = builder.require(fabric.into());
    }
    if let Some(fabric) = args.prefer {
        builder = builder.prefer(fabric.into());
    }
    if let Some(cores) = args.cores {
        builder = builder.cores(usize::from(cores));
    }
    Ok(builder.poll_mode(match args.poll {
        Poll::Adaptive => PollMode::Adaptive,
        Poll::Busy => PollMode::Busy,
    }))
}

/// The node with one rail to each peer and nothing else: `NIC=PEER_NIC`, `shm` or `tcp`.
///
/// # Errors
/// It is no rail.
pub fn over_rail(builder: EngineBuilder, rail: &str) -> Result<EngineBuilder> {
    let alone = |fabric| (fabric, None);
    let (fabric, nics) = match rail.split_once('=') {
        Some((nic, peer_nic)) if !nic.is_empty() && !peer_nic.is_empty() => (Fabric::Rdma, Some((nic, peer_nic))),
        None if rail == Fabric::Shm.as_str() => alone(Fabric::Shm),
        None if rail == Fabric::Tcp.as_str() => alone(Fabric::Tcp),
        _ => {
            return Err(Failure::usage(
                format!("--rail {rail} is no rail"),
                "give our NIC and the peer's, as mlx5_0=mlx5_1 (`moonrail ping` lists them), or shm, or tcp",
            ));
        }
    };
    let builder = builder.fabrics([fabric]).require(fabric);
    Ok(match nics {
        Some((nic, peer)) => builder.nics([nic]).peer_affinity(vec![(nic.to_owned(), vec![peer.to_owned()])]),
        None => builder,
    })
}

/// With a page for Prometheus, if one is asked for.
#[must_use]
pub fn with_metrics(builder: EngineBuilder, addr: Option<SocketAddr>) -> EngineBuilder {
    match addr {
        Some(addr) => builder.metrics_http(addr),
        None => builder,
    }
}

/// Says where that page is, on stderr: the port may have been drawn.
pub fn tell_metrics(engine: &Engine) {
    if let Some(addr) = engine.metrics_addr() {
        eprintln!("metrics at http://{addr}/metrics");
    }
}

/// Ends the engine; an error if something of it could not be ended in time, unless there was one already.
pub fn end<T>(engine: &Engine, done: Result<T>) -> Result<T> {
    let whole = engine.shutdown(SHUTDOWN_WITHIN);
    match done {
        Ok(_) if !whole => Err(Failure::new(
            format!("the engine could not end everything within {SHUTDOWN_WITHIN:?}"),
            "the lines above say what is left; usually a peer that is gone while it was being written to",
        )),
        done => done,
    }
}

/// Starts the engine.
pub fn start(builder: EngineBuilder) -> Result<Engine> {
    builder.build().map_err(|e| Failure::told(&e))
}

/// Offers or takes `bytes` of zeroed memory.
pub fn allocate(engine: &Engine, bytes: u64, location: &str) -> Result<Region> {
    let len = usize::try_from(bytes)
        .map_err(|_| Failure::usage(format!("{bytes} bytes do not fit this machine"), "choose a smaller size"))?;
    engine.allocate(len, location).map_err(|e| Failure::told(&e))
}

fn name(args: &NodeArgs) -> Result<Option<String>> {
    let Some(port) = args.port else { return Ok(args.name.clone()) };
    let host = match &args.name {
        Some(name) if has_port(name) => {
            return Err(Failure::usage(
                format!("--name {name} holds a port, and --port {port} is another"),
                "give one of them",
            ));
        }
        Some(name) => name.clone(),
        None => host_name(),
    };
    Ok(Some(format!("{host}:{port}")))
}

/// `host:1`, `1.2.3.4:1`, `[::1]:1`; not `::1`.
fn has_port(name: &str) -> bool {
    match name.rsplit_once(':') {
        Some((host, _)) => !host.contains(':') || host.ends_with(']'),
        None => false,
    }
}

/// The name the kernel knows this machine by.
pub fn host_name() -> String {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let name = name.trim();
    if name.is_empty() { "localhost".to_owned() } else { name.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[test]
    fn a_rail_is_two_nics_or_a_fabric_of_the_host() {
        for rail in ["mlx5_0=mlx5_1", "shm", "tcp"] {
            assert!(over_rail(Engine::builder(), rail).is_ok(), "{rail}");
        }
        for wrong in ["", "mlx5_0", "=", "mlx5_0=", "=mlx5_1", "rdma"] {
            assert!(
                over_rail(Engine::builder(), wrong).is_err_and(|e| e.to_string().contains("mlx5_0=mlx5_1")),
                "{wrong}"
            );
        }
    }

    fn node(line: &str) -> NodeArgs {
        let words = ["moonrail", "serve"].into_iter().chain(line.split_whitespace());
        match crate::cli::Cli::parse_from(words).command {
            crate::cli::Command::Serve(args) => args.node,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn name_and_port_make_one_name() {
        assert_eq!(name(&node("--name a --port 5")), Ok(Some("a:5".into())));
        assert_eq!(name(&node("--name a:5")), Ok(Some("a:5".into())));
        assert_eq!(name(&node("--port 5")), Ok(Some(format!("{}:5", host_name()))));
        assert_eq!(name(&node("")), Ok(None));
        assert!(name(&node("--name a:4 --port 5")).is_err());
        assert!(has_port("[::1]:4") && !has_port("::1") && !has_port("[::1]"));
    }
}
