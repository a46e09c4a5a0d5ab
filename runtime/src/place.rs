//! Where the data cores run, and what each of them polls.

use crate::error::BuildError;
use crate::log::Log;
use crate::open::Opened;
use crate::pin;
use crate::topology::{Machine, assign};

/// Cores of one engine: a peer keeps a bit for each.
const CORES_MAX: usize = 64;

/// Where a core runs and what it polls.
pub(crate) struct CorePlace {
    /// `None`: it is not pinned.
    pub(crate) cpu: Option<usize>,
    /// Indices into [`Opened::nics`].
    pub(crate) nics: Vec<usize>,
}

pub(crate) fn place_cores(
    cores: Option<usize>,
    cpus: Option<Vec<usize>>,
    unpinned: bool,
    machine: &Machine,
    opened: &Opened,
    log: &Log,
) -> Result<Vec<CorePlace>, BuildError> {
    let range = || format!("1 to {CORES_MAX}");
    let refused = |option, value: usize| BuildError::Option { option, value: value.to_string(), range: range() };
    let allowed = pin::allowed_cpus();
    let rdma = opened.nics.iter().filter(|usable| usable.port.is_some());
    let nic_nodes: Vec<Option<u16>> = rdma.map(|usable| usable.nic.device().numa_node).collect();
    let mut chosen: Vec<Option<usize>> = if let Some(cpus) = cpus {
        if cpus.is_empty() || cpus.len() > CORES_MAX {
            return Err(refused("core_cpus", cpus.len()));
        }
        if let Some(cpu) = cpus.iter().find(|cpu| !allowed.is_empty() && !allowed.contains(cpu)) {
            let range = format!("CPUs this process may run on: {allowed:?}");
            return Err(BuildError::Option { option: "core_cpus", value: cpu.to_string(), range });
        }
        cpus.into_iter().map(Some).collect()
    } else {
        let count = cores.unwrap_or_else(|| allowed.len().saturating_sub(1).clamp(1, CORES_MAX));
        if count == 0 || count > CORES_MAX {
            return Err(refused("cores", count));
        }
        let mut chosen: Vec<_> = machine.choose_cpus(&allowed, count, &nic_nodes).into_iter().map(Some).collect();
        if chosen.len() < count {
            log.warning(format!(
                "{count} data cores on {} CPUs: those without a CPU of their own are not pinned",
                chosen.len()
            ));
            chosen.resize(count, None);
        }
        chosen
    };
    if unpinned {
        chosen.fill(None);
    }
    let core_nodes: Vec<Option<u16>> = chosen.iter().map(|cpu| machine.node_of((*cpu)?)).collect();
    // RDMA NICs come first, and are shared out; what is dialled has no place in the machine, and every core serves it.
    let dialled = nic_nodes.len()..opened.nics.len();
    let places = chosen.into_iter().zip(assign(&core_nodes, &nic_nodes));
    Ok(places.map(|(cpu, nics)| CorePlace { cpu, nics: nics.into_iter().chain(dialled.clone()).collect() }).collect())
}
