//! Where CPUs, memory and NICs lie: which core polls which NIC, and which NICs serve which memory. Pure but for reading
//! sysfs, whose root is an argument.

use std::collections::BTreeMap;
use std::path::Path;

use moonrail_control::metadata::{NicPreference, PriorityMatrix};

/// A NUMA node.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct NumaNode {
    /// Its number.
    pub id: u16,
    /// Its CPUs, ascending.
    pub cpus: Vec<usize>,
}

/// The machine as far as placement is concerned.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Machine {
    /// NUMA nodes by number, at least one.
    pub nodes: Vec<NumaNode>,
}

impl Machine {
    /// Reads `devices/system/node` under `sysfs`; a kernel without NUMA has one node, 0, with every CPU.
    pub fn read(sysfs: &Path) -> Self {
        let cpu_list =
            |path: &Path| std::fs::read_to_string(path).map(|text| parse_cpu_list(&text)).unwrap_or_default();
        let mut nodes = Vec::new();
        for entry in std::fs::read_dir(sysfs.join("devices/system/node")).into_iter().flatten().flatten() {
            let name = entry.file_name();
            if let Some(id) = name.to_str().and_then(|n| n.strip_prefix("node")).and_then(|n| n.parse().ok()) {
                nodes.push(NumaNode { id, cpus: cpu_list(&entry.path().join("cpulist")) });
            }
        }
        nodes.sort_by_key(|node| node.id);
        if nodes.is_empty() {
            nodes.push(NumaNode { id: 0, cpus: cpu_list(&sysfs.join("devices/system/cpu/online")) });
        }
        Self { nodes }
    }

    /// The node of a CPU.
    pub fn node_of(&self, cpu: usize) -> Option<u16> {
        self.nodes.iter().find(|node| node.cpus.contains(&cpu)).map(|node| node.id)
    }

    /// CPUs for `count` data cores out of `allowed`: dealt over the nodes that have NICs first, highest number first, and
    /// the lowest CPU is left to the control thread while there are others. Fewer than `count` if there are fewer CPUs.
    pub fn choose_cpus(&self, allowed: &[usize], count: usize, nic_nodes: &[Option<u16>]) -> Vec<usize> {
        let mut usable = allowed.to_vec();
        usable.sort_unstable();
        usable.dedup();
        if usable.len() > count {
            usable.remove(0);
        }
        let mut order: Vec<u16> = Vec::new();
        for node in nic_nodes.iter().flatten().copied().chain(self.nodes.iter().map(|node| node.id)) {
            if !order.contains(&node) {
                order.push(node);
            }
        }
        let near: Vec<u16> = order.iter().copied().filter(|node| nic_nodes.contains(&Some(*node))).collect();
        let mut chosen = Vec::new();
        // Nodes with NICs until they are used up, then the others.
        for group in [near, order] {
            loop {
                let before = chosen.len();
                for node in &group {
                    let next = usable.iter().rposition(|cpu| self.node_of(*cpu) == Some(*node));
                    if let Some(index) = next.filter(|_| chosen.len() < count) {
                        chosen.push(usable.remove(index));
                    }
                }
                if chosen.len() == before {
                    break;
                }
            }
        }
        // CPUs of no known node.
        while chosen.len() < count {
            let Some(cpu) = usable.pop() else { break };
            chosen.push(cpu);
        }
        chosen
    }

    /// The priority matrix as Mooncake discovers it: for each node, its own NICs preferred and all others available.
    pub fn matrix(&self, nics: &[(String, Option<u16>)]) -> PriorityMatrix {
        let entry = |node: &NumaNode| {
            let (near, far): (Vec<_>, Vec<_>) = nics.iter().partition(|(_, place)| *place == Some(node.id));
            let names = |list: Vec<&(String, Option<u16>)>| list.into_iter().map(|(name, _)| name.clone()).collect();
            (format!("cpu:{}", node.id), NicPreference { preferred: names(near), available: names(far) })
        };
        PriorityMatrix(self.nodes.iter().map(entry).collect::<BTreeMap<_, _>>())
    }
}

/// `0-3,8,10-11`; what cannot be read is left out.
fn parse_cpu_list(text: &str) -> Vec<usize> {
    let mut cpus = Vec::new();
    for part in text.trim().split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        if let (Ok(first), Ok(last)) = (first.trim().parse::<usize>(), last.trim().parse::<usize>()) {
            // A bound, so that a damaged file costs nothing: no machine has more.
            cpus.extend((first..=last).take(65_536));
        }
    }
    cpus
}

/// Which NICs each core polls. `cores` and `nics` give each one's NUMA node.
///
/// Every NIC has at least one core and every core at least one NIC. With as many cores as NICs or more, each core has
/// one NIC; with fewer, a core has several. A core of the NIC's own node goes first.
pub fn assign(cores: &[Option<u16>], nics: &[Option<u16>]) -> Vec<Vec<usize>> {
    let mut owned: Vec<Vec<usize>> = vec![Vec::new(); cores.len()];
    if cores.is_empty() || nics.is_empty() {
        return owned;
    }
    // Deal NICs to cores, round by round, until both every NIC and every core has something.
    let rounds = cores.len().div_ceil(nics.len());
    let most = nics.len().div_ceil(cores.len());
    for round in 0..rounds {
        // NICs whose node still has a free core choose before those that will take any.
        let mut waiting: Vec<usize> = (0..nics.len()).collect();
        for local_only in [true, false] {
            waiting.retain(|&nic| {
                if round > 0 && owned.iter().all(|list| !list.is_empty()) {
                    return false;
                }
                let limit = if round > 0 { 1 } else { most };
                let best = (0..cores.len())
                    .filter(|&core| owned[core].len() < limit)
                    .filter(|&core| !local_only || (nics[nic].is_some() && cores[core] == nics[nic]))
                    .min_by_key(|&core| (owned[core].len(), core));
                match best {
                    Some(core) => owned[core].push(nic),
                    None => return true,
                }
                false
            });
        }
    }
    owned
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn machine(nodes: &[&[usize]]) -> Machine {
        let node = |(id, cpus): (usize, &&[usize])| NumaNode { id: id as u16, cpus: cpus.to_vec() };
        Machine { nodes: nodes.iter().enumerate().map(node).collect() }
    }

    #[test]
    fn sysfs_is_read() {
        let root = std::env::temp_dir().join(format!("moonrail-topology-{}", std::process::id()));
        for (node, cpus) in [("node1", "2-3,6\n"), ("node0", "0-1\n"), ("nodes_with_memory", "0\n")] {
            let folder = root.join("devices/system/node").join(node);
            std::fs::create_dir_all(&folder).unwrap();
            std::fs::write(folder.join("cpulist"), cpus).unwrap();
        }
        assert_eq!(Machine::read(&root), machine(&[&[0, 1], &[2, 3, 6]]));
        std::fs::remove_dir_all(&root).unwrap();
        assert_eq!(Machine::read(&root), machine(&[&[]]), "no NUMA, no sysfs: one node");
        assert_eq!(parse_cpu_list("x,3-1,5"), [5]);
    }

    #[test]
    fn cpus_near_the_nics_go_first_and_the_lowest_is_left_alone() {
        let two = machine(&[&[0, 1, 2, 3], &[4, 5, 6, 7]]);
        let all: Vec<usize> = (0..8).collect();
        assert_eq!(two.choose_cpus(&all, 2, &[Some(1)]), [7, 6]);
        assert_eq!(two.choose_cpus(&all, 2, &[Some(0), Some(1)]), [3, 7]);
        assert_eq!(two.choose_cpus(&all, 7, &[Some(1)]), [7, 6, 5, 4, 3, 2, 1]);
        assert_eq!(two.choose_cpus(&all, 9, &[None]).len(), 8);
        assert_eq!(two.choose_cpus(&[0, 1], 1, &[None, None]), [1]);
        assert_eq!(two.choose_cpus(&[0], 1, &[None]), [0]);
    }

    #[test]
    fn the_matrix_is_mooncakes() {
        let nics = [("a".to_owned(), Some(0)), ("b".to_owned(), Some(1)), ("rxe0".to_owned(), None)];
        assert_eq!(
            machine(&[&[0], &[1]]).matrix(&nics).to_json(),
            r#"{"cpu:0":[["a"],["b","rxe0"]],"cpu:1":[["b"],["a","rxe0"]]}"#
        );
    }

    #[test]
    fn each_core_takes_a_nic_of_its_node() {
        assert_eq!(assign(&[Some(0), Some(1)], &[Some(1), Some(0)]), [[1], [0]]);
        assert_eq!(assign(&[Some(0)], &[Some(1), Some(0)]), [[1, 0]]);
        assert_eq!(assign(&[Some(0), Some(0), Some(1), Some(1)], &[Some(0), Some(1)]), [[0], [0], [1], [1]]);
        assert_eq!(assign(&[None, None, None], &[None]), [[0], [0], [0]]);
    }

    proptest! {
        #[test]
        fn every_nic_is_polled_and_no_core_idles(
            cores in proptest::collection::vec(proptest::option::of(0u16..3), 1..20),
            nics in proptest::collection::vec(proptest::option::of(0u16..3), 1..20),
        ) {
            let owned = assign(&cores, &nics);
            let most = nics.len().div_ceil(cores.len());
            for list in &owned {
                prop_assert!(!list.is_empty() || nics.len() < cores.len() || cores.len() > nics.len() || nics.len() > cores.len());
                prop_assert!(list.len() <= most, "{:?}", owned);
            }
            for nic in 0..nics.len() {
                prop_assert!(owned.iter().any(|list| list.contains(&nic)), "NIC {} in {:?}", nic, owned);
            }
            if cores.len() >= nics.len() {
                prop_assert!(owned.iter().all(|list| list.len() == 1), "{:?}", owned);
            }
        }

        #[test]
        fn chosen_cpus_are_allowed_and_distinct(
            allowed in proptest::collection::vec(0usize..16, 1..16), count in 1usize..20, node in proptest::option::of(0u16..3)
        ) {
            let two = machine(&[&[0, 1, 2, 3], &[4, 5, 6, 7]]);
            let chosen = two.choose_cpus(&allowed, count, &[node]);
            let mut distinct = chosen.clone();
            distinct.sort_unstable();
            distinct.dedup();
            prop_assert_eq!(distinct.len(), chosen.len());
            prop_assert!(chosen.iter().all(|cpu| allowed.contains(cpu)));
            let mut all = allowed.clone();
            all.sort_unstable();
            all.dedup();
            prop_assert_eq!(chosen.len(), count.min(all.len()));
        }
    }
}
