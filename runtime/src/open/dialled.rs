//! The NICs that are no devices: shared memory and TCP.

use std::io;
use std::sync::Arc;

use moonrail_datapath::nic::shm::ShmNic;
use moonrail_datapath::nic::tcp::{Ports, TcpNic, TcpOptions};
use moonrail_datapath::nic::{Fabric, Nic, Offer};

use super::{Fabrics, Usable};
use crate::config::Settings;
use crate::error::BuildError;
use crate::log::Log;

/// Opens those the node has, behind its RDMA NICs. One that cannot be opened is a warning, unless it is required or
/// nothing else is left.
pub(super) fn open(
    fabrics: &Fabrics<'_>,
    settings: &Settings,
    log: &Log,
    nics: &mut Vec<Usable>,
) -> Result<(), BuildError> {
    let rdma = !nics.is_empty();
    let mut lost = None;
    for fabric in [Fabric::Shm, Fabric::Tcp] {
        if !fabrics.has(fabric, rdma) {
            continue;
        }
        match open_one(fabric, settings) {
            Ok(nic) => {
                if let Some(Offer::Tcp { port }) = nic.offer() {
                    log.info(format!("TcpTransport: listen on port {port}"));
                }
                nics.push(Usable { nic, port: None, pins: false });
            }
            Err(source) if settings.policy.require == Some(fabric) => return Err(unusable(fabric, source)),
            Err(source) => {
                log.warning(format!("{fabric} is not used: {source}"));
                lost = Some((fabric, source));
            }
        }
    }
    match lost {
        Some((fabric, source)) if nics.is_empty() => Err(unusable(fabric, source)),
        _ => Ok(()),
    }
}

fn open_one(fabric: Fabric, settings: &Settings) -> io::Result<Arc<dyn Nic>> {
    match fabric {
        Fabric::Shm => Ok(ShmNic::open()?),
        Fabric::Tcp => {
            let (first, last) = settings.rpc_ports;
            let options = TcpOptions {
                ports: Ports::Range(first, last),
                status_timeout: settings.tcp_status_timeout,
                progress_timeout: settings.tcp_progress_timeout,
                ..TcpOptions::default()
            };
            Ok(TcpNic::open(options)?)
        }
        Fabric::Rdma => Err(io::ErrorKind::Unsupported.into()),
    }
}

fn unusable(fabric: Fabric, source: io::Error) -> BuildError {
    BuildError::Fabric { fabric, source }
}
