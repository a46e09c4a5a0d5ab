//! Opening the NICs: which ones, are they usable, by which GID, in which order.

mod dialled;

use std::sync::Arc;

use moonrail_control::gid::{GidChoice, GidReason, choose};
use moonrail_control::metadata::PriorityMatrix;
use moonrail_datapath::nic::verbs::{self, VerbsNic};
use moonrail_datapath::nic::{Fabric, Nic, PortState};
use moonrail_datapath::units::{GidIndex, PortNum};

use crate::config::{MatrixSource, Settings};
use crate::engine::PortInfo;
use crate::error::{BuildError, NicProblem};
use crate::log::Log;
use crate::topology::Machine;

/// A NIC that can be used.
pub(crate) struct Usable {
    pub(crate) nic: Arc<dyn Nic>,
    /// Of an RDMA NIC; what is dialled has none.
    pub(crate) port: Option<Port>,
    /// Whether registering pins pages: true of hardware and Soft-RoCE.
    pub(crate) pins: bool,
}

/// The port of an RDMA NIC, found to be usable.
pub(crate) struct Port {
    pub(crate) info: PortInfo,
    pub(crate) gid: GidChoice,
}

/// The NICs of the engine in the order of their numbers, and the matrix to publish, which names exactly them.
pub(crate) struct Opened {
    pub(crate) nics: Vec<Usable>,
    pub(crate) matrix: PriorityMatrix,
}

/// What the program said about NICs.
#[derive(Default)]
pub(crate) struct Wanted {
    /// By name; none: by matrix or discovery.
    pub(crate) names: Vec<String>,
    /// Open already.
    pub(crate) open: Vec<Arc<dyn Nic>>,
}

pub(crate) fn open(wanted: Wanted, settings: &Settings, machine: &Machine, log: &Log) -> Result<Opened, BuildError> {
    let fabrics = Fabrics { settings, only_given: !wanted.open.is_empty() };
    let given = given_matrix(settings, log)?;
    let named = given.is_some() || !wanted.names.is_empty() || fabrics.only_given;
    let mut problems = Vec::new();
    let mut nics = Vec::new();
    if fabrics.has_rdma() {
        open_rdma(wanted, given.as_ref(), settings, log, &mut nics, &mut problems);
    }
    if nics.is_empty() && fabrics.has_rdma() && (named || settings.policy.require == Some(Fabric::Rdma)) {
        return Err(BuildError::NoNic { problems });
    }
    let matrix = match given {
        _ if nics.is_empty() => PriorityMatrix::default(),
        Some(matrix) => restrict(matrix, &nics),
        None => discovered_matrix(machine, &nics),
    };
    // A stock peer numbers our NICs by walking the matrix: be numbered alike (interop, device choice).
    let order: Vec<String> = matrix.numbering().into_iter().map(str::to_owned).collect();
    nics.sort_by_key(|usable| order.iter().position(|name| name == usable.nic.name()).unwrap_or(usize::MAX));
    for usable in &nics {
        announce(usable, log);
    }
    dialled::open(&fabrics, settings, log, &mut nics)?;
    if nics.is_empty() {
        return Err(BuildError::NoNic { problems });
    }
    Ok(Opened { nics, matrix })
}

/// Which fabrics a node has.
pub(crate) struct Fabrics<'a> {
    settings: &'a Settings,
    /// The program gave NICs, and named no fabrics: those and nothing else.
    only_given: bool,
}

impl Fabrics<'_> {
    fn has_rdma(&self) -> bool {
        self.only_given || self.names(Fabric::Rdma).unwrap_or(true)
    }

    /// Whether a fabric that is dialled is there; `rdma`: whether there is a NIC of that.
    pub(crate) fn has(&self, fabric: Fabric, rdma: bool) -> bool {
        let policy = self.settings.policy;
        let asked = policy.require == Some(fabric) || policy.prefer == Some(fabric);
        let default = !self.only_given && (fabric == Fabric::Shm || asked || !rdma);
        self.names(fabric).unwrap_or(default)
    }

    /// What the program said of it.
    fn names(&self, fabric: Fabric) -> Option<bool> {
        self.settings.fabrics.as_ref().map(|named| named.contains(&fabric))
    }
}

fn open_rdma(
    wanted: Wanted,
    given: Option<&PriorityMatrix>,
    settings: &Settings,
    log: &Log,
    nics: &mut Vec<Usable>,
    problems: &mut Vec<NicProblem>,
) {
    let port = PortNum(settings.ib_port);
    let mut take = |opened: Result<Usable, NicProblem>| match opened {
        Ok(usable) => nics.push(usable),
        Err(problem) => problems.push(problem),
    };
    if wanted.open.is_empty() {
        let names = match (given, wanted.names.is_empty()) {
            (_, false) => wanted.names,
            (Some(matrix), true) => matrix.numbering().into_iter().map(str::to_owned).collect(),
            (None, true) => discover(settings, log),
        };
        for name in names {
            take(open_verbs(&name, port).and_then(|nic| examine(nic, settings, true)));
        }
    } else {
        for nic in wanted.open {
            take(examine(nic, settings, false));
        }
    }
    for problem in problems {
        log.warning(format!("{problem}; Disable device {}", problem.device()));
    }
}

fn given_matrix(settings: &Settings, log: &Log) -> Result<Option<PriorityMatrix>, BuildError> {
    let parse = |text: &str| {
        PriorityMatrix::parse(text)
            .map_err(|error| error.to_string())
            .and_then(|matrix| if matrix.names().is_empty() { Err("it names no NIC".to_owned()) } else { Ok(matrix) })
    };
    let read = |path: &std::path::Path| {
        std::fs::read_to_string(path)
            .map_err(|error| format!("{}: {error}", path.display()))
            .and_then(|text| parse(&text).map_err(|reason| format!("{}: {reason}", path.display())))
    };
    let refused = |reason| BuildError::PriorityMatrix { reason };
    match &settings.matrix {
        MatrixSource::Discovery => Ok(None),
        MatrixSource::Json(text) => parse(text).map(Some).map_err(refused),
        MatrixSource::File(path) => read(path).map(Some).map_err(refused),
        MatrixSource::EnvironmentFile(path) => Ok(read(path)
            .map_err(|reason| log.warning(format!("MC_CUSTOM_TOPO_JSON is not used, NICs are discovered: {reason}")))
            .ok()),
    }
}

/// Names of the devices that can be opened, filtered.
fn discover(settings: &Settings, log: &Log) -> Vec<String> {
    let found = match verbs::list() {
        Ok(found) => found,
        Err(error) => {
            log.info(format!("No RDMA devices found, check your device installation if there should be some: {error}"));
            return Vec::new();
        }
    };
    if found.is_empty() {
        log.info("No RDMA devices found, check your device installation if there should be some");
    }
    let mut names = Vec::new();
    for device in found {
        let name = device.info.name;
        if !settings.nic_filter.is_empty() && !settings.nic_filter.contains(&name) {
            continue;
        }
        match device.problem {
            None => names.push(name),
            Some(problem) => log.warning(format!("Skipping unavailable device: {name}: {problem}")),
        }
    }
    names
}

fn open_verbs(name: &str, port: PortNum) -> Result<Arc<dyn Nic>, NicProblem> {
    match VerbsNic::open(name, port) {
        Ok(nic) => Ok(nic),
        Err(verbs::OpenError::NoSuchDevice { name, present }) => Err(NicProblem::NotFound { name, present }),
        Err(source) => Err(NicProblem::Open { name: name.to_owned(), port, source: Box::new(source) }),
    }
}

/// Port, GID, MTU: what has to be right before a NIC is used.
fn examine(nic: Arc<dyn Nic>, settings: &Settings, pins: bool) -> Result<Usable, NicProblem> {
    let (name, port) = (nic.name().to_owned(), nic.port_num());
    let failed = |source: std::io::Error| NicProblem::Open { name: name.clone(), port, source: Box::new(source) };
    let info = nic.query_port().map_err(failed)?;
    if info.state != PortState::Active {
        return Err(NicProblem::PortNotActive { name, port, state: info.state });
    }
    let table = nic.gids().map_err(failed)?;
    let gid = choose(&table, settings.gid_index.map(GidIndex)).map_err(|source| NicProblem::Gid {
        name: name.clone(),
        port,
        source,
    })?;
    let mtu = info.active_mtu.or(info.max_mtu).unwrap_or(settings.mtu).min(settings.mtu);
    let info = PortInfo { number: port, lid: info.lid, gid_index: gid.index, gid: gid.gid, mtu };
    Ok(Usable { nic, port: Some(Port { info, gid }), pins })
}

/// The matrix without NICs that are not open, and with those it does not name as available everywhere.
fn restrict(mut matrix: PriorityMatrix, nics: &[Usable]) -> PriorityMatrix {
    let open = |name: &String| nics.iter().any(|usable| usable.nic.name() == name);
    let named: Vec<String> = matrix.names().into_iter().map(str::to_owned).collect();
    for places in matrix.0.values_mut() {
        places.preferred.retain(open);
        places.available.retain(open);
        for usable in nics {
            if !named.iter().any(|name| name == usable.nic.name()) {
                places.available.push(usable.nic.name().to_owned());
            }
        }
    }
    matrix
}

fn discovered_matrix(machine: &Machine, nics: &[Usable]) -> PriorityMatrix {
    let places: Vec<_> =
        nics.iter().map(|usable| (usable.nic.name().to_owned(), usable.nic.device().numa_node)).collect();
    machine.matrix(&places)
}

fn announce(usable: &Usable, log: &Log) {
    let Usable { nic, port: Some(Port { info: PortInfo { number: port, lid, mtu, .. }, gid }), .. } = usable else {
        return;
    };
    let name = nic.name();
    match gid.reason {
        GidReason::Fixed => log.info(format!("Using user-specified GID index: {} on {name}/{port}", gid.index)),
        GidReason::Ranked => {
            log.info(format!("Find best gid index: {} on {name}/{port} (network state: {})", gid.index, gid.class));
        }
    }
    log.info(format!(
        "RDMA device: {name}, LID: {lid}, GID: (GID_Index {}) {}, path MTU at most {mtu}",
        gid.index, gid.gid
    ));
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Environment, Given};
    use moonrail_datapath::nic::sim::{SimOptions, SimWorld};
    use moonrail_datapath::units::Gid;
    use std::sync::Mutex;

    fn gid(last: u8) -> Gid {
        Gid([0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 10, 0, 0, last])
    }

    fn settings(given: &Given) -> Settings {
        Settings::resolve(given, &mut Environment::new(&|_| None)).unwrap()
    }

    fn machine() -> Machine {
        Machine { nodes: vec![crate::topology::NumaNode { id: 0, cpus: vec![0] }] }
    }

    fn log() -> (Log, Arc<Mutex<Vec<String>>>) {
        let lines = Arc::new(Mutex::new(Vec::new()));
        let sink = lines.clone();
        (Log::new(crate::Level::Info, Arc::new(move |_, line| sink.lock().unwrap().push(line.to_owned()))), lines)
    }

    #[test]
    fn a_nic_without_a_port_is_left_out_and_the_start_goes_on() {
        let world = SimWorld::real_time(1, SimOptions::default());
        let (a, _) = world.nic("n", "a", gid(1));
        let (b, broken) = world.nic("n", "b", gid(2));
        world.set_link(broken, false);
        let (log, lines) = log();
        let wanted = Wanted { names: vec![], open: vec![a, b] };
        let opened = open(wanted, &settings(&Given::default()), &machine(), &log).unwrap();
        assert_eq!(opened.nics.len(), 1);
        assert_eq!(opened.matrix.to_json(), r#"{"cpu:0":[[],["a"]]}"#, "exactly the NICs that are used");
        let lines = lines.lock().unwrap();
        assert!(lines[0].contains("Device b port not active") && lines[0].ends_with("Disable device b"), "{lines:?}");
        assert!(lines.iter().any(|l| l.starts_with("RDMA device: a, LID: 0, GID: (GID_Index 1) 00:")), "{lines:?}");
    }

    #[test]
    fn no_nic_left_tells_why_of_each() {
        let world = SimWorld::real_time(1, SimOptions::default());
        let (a, down) = world.nic("n", "a", gid(1));
        world.set_link(down, false);
        let wanted = Wanted { names: vec![], open: vec![a] };
        let error = open(wanted, &settings(&Given::default()), &machine(), &log().0).err().unwrap().to_string();
        assert!(error.starts_with("RdmaTransport: No available RNIC: Device a port not active"), "{error}");
        let wanted = Wanted { names: vec!["no_such_nic".into()], open: vec![] };
        let error = open(wanted, &settings(&Given::default()), &machine(), &log().0).err().unwrap().to_string();
        assert!(error.contains("RdmaTransport: No available RNIC"), "{error}");
    }

    #[test]
    fn a_gid_index_outside_the_table_says_which_could_be_used() {
        let world = SimWorld::real_time(1, SimOptions::default());
        let (a, _) = world.nic("n", "a", gid(1));
        let mut given = Given::default();
        given.integers.insert("gid_index", 9);
        let wanted = Wanted { names: vec![], open: vec![a] };
        let error = open(wanted, &settings(&given), &machine(), &log().0).err().unwrap().to_string();
        assert!(error.contains("MC_GID_INDEX"), "{error}");
    }

    #[test]
    fn a_wrong_matrix_is_an_error_of_the_program_and_a_warning_of_the_environment() {
        let world = SimWorld::real_time(1, SimOptions::default());
        let (a, _) = world.nic("n", "a", gid(1));
        let given = Given { matrix_json: Some("{\"cpu:0\": 1}".into()), ..Given::default() };
        let wanted = Wanted { names: vec![], open: vec![a.clone()] };
        assert!(matches!(
            open(wanted, &settings(&given), &machine(), &log().0),
            Err(BuildError::PriorityMatrix { .. })
        ));
        let mut from_env = settings(&Given::default());
        from_env.matrix = MatrixSource::EnvironmentFile("/no/such/file".into());
        let (log, lines) = log();
        let opened = open(Wanted { names: vec![], open: vec![a] }, &from_env, &machine(), &log).unwrap();
        assert_eq!(opened.nics.len(), 1);
        assert!(lines.lock().unwrap()[0].contains("/no/such/file"));
    }

    #[test]
    fn the_order_of_the_nics_is_that_of_a_stock_reader() {
        let world = SimWorld::real_time(1, SimOptions::default());
        let (a, _) = world.nic("n", "a", gid(1));
        let (b, _) = world.nic("n", "b", gid(2));
        let json = r#"{"cpu:0":[["a"],["b"]],"cpu:1":[["b"],["a"]]}"#;
        let given = Given { matrix_json: Some(json.into()), ..Given::default() };
        let opened = open(Wanted { names: vec![], open: vec![a, b] }, &settings(&given), &machine(), &log().0).unwrap();
        let names: Vec<_> = opened.nics.iter().map(|usable| usable.nic.name().to_owned()).collect();
        assert_eq!(names, ["b", "a"]);
    }
}
