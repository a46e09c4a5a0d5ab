//! What an engine would be on this machine: its NICs, where its cores would run and what each would poll. Made by the
//! same code as an engine, which is then not started.

use std::path::Path;

use crate::builder::EngineBuilder;
use crate::config::{Environment, Settings};
use crate::engine::NicInfo;
use crate::error::BuildError;
use crate::open;
use crate::place::place_cores;
use crate::start::make_log;
use crate::topology::Machine;

/// What [`EngineBuilder::build`] would make.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Plan {
    /// NICs in the order of their numbers.
    pub nics: Vec<NicInfo>,
    /// Data cores, counted from 0.
    pub cores: Vec<CorePlan>,
    /// The NIC priority matrix that would be published, as Mooncake's JSON; it names RDMA NICs only.
    pub priority_matrix: String,
    /// The machine's NUMA nodes.
    pub machine: Machine,
}

/// One data core of a [`Plan`].
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct CorePlan {
    /// The CPU it would be pinned to; `None`: not pinned.
    pub cpu: Option<usize>,
    /// That CPU's NUMA node.
    pub numa_node: Option<u16>,
    /// Names of the NICs it would poll.
    pub nics: Vec<String>,
}

pub(crate) fn plan(builder: EngineBuilder) -> Result<Plan, BuildError> {
    let read = builder.environment_read();
    let mut env = Environment::new(&read);
    let settings = Settings::resolve(&builder.given, &mut env)?;
    let log = make_log(&builder, &settings, &mut env);
    let machine = Machine::read(Path::new("/sys"));
    let EngineBuilder { wanted, cores, cpus, unpinned, .. } = builder;
    let opened = open::open(wanted, &settings, &machine, &log)?;
    let places = place_cores(cores, cpus, unpinned, &machine, &opened, &log)?;
    let nics = opened.nics.iter().enumerate().map(|(index, usable)| NicInfo {
        name: usable.nic.name().to_owned(),
        fabric: usable.nic.fabric(),
        port: usable.port.as_ref().map(|port| port.info.clone()),
        numa_node: usable.nic.device().numa_node,
        cores: places.iter().enumerate().filter(|(_, p)| p.nics.contains(&index)).map(|(c, _)| c as u16).collect(),
        registered: 0,
        evictions: 0,
    });
    let cores = places.iter().map(|place| CorePlan {
        cpu: place.cpu,
        numa_node: place.cpu.and_then(|cpu| machine.node_of(cpu)),
        nics: place.nics.iter().filter_map(|nic| Some(opened.nics.get(*nic)?.nic.name().to_owned())).collect(),
    });
    Ok(Plan { nics: nics.collect(), cores: cores.collect(), priority_matrix: opened.matrix.to_json(), machine })
}

#[cfg(test)]
mod tests {
    use crate::Engine;
    use moonrail_datapath::nic::sim::{SimOptions, SimWorld};
    use moonrail_datapath::units::Gid;

    #[test]
    fn the_plan_is_what_the_engine_becomes() {
        let world = SimWorld::real_time(1, SimOptions::default());
        let gid = |last| Gid([0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 10, 0, 0, last]);
        let nics = || vec![world.nic("n", "a", gid(1)).0, world.nic("n", "b", gid(2)).0];
        let builder = || {
            Engine::builder()
                .name("n")
                .metadata("memory://plan")
                .nics_from(nics())
                .cores(2)
                .pin_cores(false)
                .environment(|_| None)
                .log(|_, _| {})
        };
        let plan = builder().plan().unwrap();
        let engine = builder().build().unwrap();
        assert_eq!(plan.nics, engine.nics());
        assert_eq!(plan.cores.iter().map(|core| core.nics.clone()).collect::<Vec<_>>(), [["a"], ["b"]]);
        assert_eq!(plan.priority_matrix, r#"{"cpu:0":[[],["a","b"]]}"#);
    }
}
