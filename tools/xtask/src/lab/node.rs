//! One node: a QEMU process.

use std::fs::File;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use super::Topology;
use super::folder::RunFolder;
use super::image::Image;
use crate::error::{At, Error, Result};
use crate::process::Bounded;

/// A running node. Dropping it kills it; so does our own death.
#[derive(Debug)]
pub(super) struct Node {
    index: u32,
    child: Child,
}

/// Where a node's console goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Console {
    /// Into a file of the run folder.
    Log,
    /// To our own terminal, which QEMU takes over.
    Terminal,
}

impl Node {
    /// Starts a node.
    pub(super) fn start(
        index: u32,
        topology: Topology,
        image: &Image,
        folder: &RunFolder,
        console: Console,
    ) -> Result<Self> {
        // Software emulation, so it runs anywhere. KVM is not even tried: where /dev/kvm exists without working
        // nested virtualisation, the guest hangs in early boot.
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL", "qemu-system-x86_64"]);
        command.args(machine(topology)).arg("-kernel").arg(&image.kernel).arg("-initrd").arg(&image.initrd);
        command.arg("-append").arg(kernel_arguments(index, topology, console));
        command.args(folders(&folder.path().to_string_lossy()));
        command.args(network(index, topology));
        // Sockets are named relative to this folder: a unix socket's path has room for 107 bytes only.
        command.current_dir(folder.path());
        match console {
            Console::Log => {
                let path = folder.console(index);
                let log = File::create(&path).at("create", &path)?;
                let errors = log.try_clone().at("write", &path)?;
                // A group of its own: Ctrl-C goes to us, and our end is its end.
                command.args(["-serial", "stdio"]).process_group(0);
                command.stdin(Stdio::null()).stdout(log).stderr(errors);
            }
            Console::Terminal => {
                command.args(["-serial", "mon:stdio"]);
            }
        }
        let child = command.spawn().map_err(|e| {
            Error::new(format!("cannot start node {index} through setpriv: {e}"), "run `cargo xtask setup`")
        })?;
        Ok(Self { index, child })
    }

    /// Its number.
    pub(super) fn index(&self) -> u32 {
        self.index
    }

    /// How it ended, if it has.
    pub(super) fn ended(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().ok().flatten()
    }

    /// Stops the whole machine, as a power cut that comes back would.
    pub(super) fn freeze(&self) -> Result<()> {
        self.signal("STOP")
    }

    /// Lets a frozen machine go on.
    pub(super) fn thaw(&self) -> Result<()> {
        self.signal("CONT")
    }

    /// Ends it at once.
    pub(super) fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    fn signal(&self, name: &str) -> Result<()> {
        let pid = self.child.id().to_string();
        // The child has not been waited for, so the number is still its own.
        Bounded::new("sh", Duration::from_secs(5))
            .args(["-c", "kill -s \"$0\" \"$1\"", name, &pid])
            .output()
            .map(|_| ())
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        self.kill();
    }
}

fn machine(topology: Topology) -> Vec<String> {
    let (cpus, mem) = (topology.cpus.to_string(), topology.mem_mib.to_string());
    let words = ["-accel", "tcg,thread=multi", "-cpu", "max", "-smp", &cpus, "-m", &mem, "-no-reboot"];
    let bare = ["-nodefaults", "-no-user-config", "-display", "none", "-monitor", "none"];
    words.iter().chain(&bare).map(|word| (*word).to_owned()).collect()
}

fn kernel_arguments(index: u32, topology: Topology, console: Console) -> String {
    let Topology { nodes, nics, split, .. } = topology;
    let prefix = if split { 24 } else { 16 };
    let interactive = if console == Console::Terminal { format!(" INTERACTIVE={index}") } else { String::new() };
    // no_timer_check: on a busy host the emulated timer comes too late for the kernel's check of it, which panics.
    format!(
        "console=ttyS0 panic=-1 quiet mitigations=off no_timer_check nowatchdog \
         NODE={index} NODES={nodes} NICS={nics} PREFIX={prefix}{interactive}"
    )
}

fn folders(run_folder: &str) -> Vec<String> {
    // A comma separates options; a doubled one is a comma.
    let run_folder = run_folder.replace(',', ",,");
    vec![
        "-virtfs".into(),
        "local,path=/,mount_tag=host,security_model=none,readonly=on,multidevs=remap".into(),
        "-virtfs".into(),
        format!("local,path={run_folder},mount_tag=lab,security_model=none"),
    ]
}

/// Node 0 is the switch: a hub, with a socket for each NIC of each other node. It is the end that connects: QEMU 7.2 never
/// waits for the other end of a socket that it has connected, but for one that it has accepted. So a node that is frozen, or
/// whose link is down, takes nothing any more, and yet the switch goes on: it keeps 10,000 frames for it and drops the rest.
fn network(index: u32, topology: Topology) -> Vec<String> {
    let mut words = Vec::new();
    for nic in 0..topology.nics {
        let hub = if topology.split { nic } else { 0 };
        words.push("-device".into());
        words.push(format!("virtio-net-pci,netdev=h{nic},mac=52:54:00:00:{nic:02x}:{:02x},romfile=", index + 1));
        words.push("-netdev".into());
        if index == 0 {
            words.push(format!("hubport,id=h{nic},hubid={hub}"));
            for peer in 1..topology.nodes {
                let socket = socket(nic, peer);
                words.push("-netdev".into());
                words.push(format!("stream,id=s{nic}-{peer},server=off,addr.type=unix,addr.path={socket}"));
                words.push("-netdev".into());
                words.push(format!("hubport,id=p{nic}-{peer},hubid={hub},netdev=s{nic}-{peer}"));
            }
        } else {
            words.push(format!("stream,id=h{nic},server=on,addr.type=unix,addr.path={}", socket(nic, index)));
        }
    }
    words
}

/// The socket between the switch and one NIC of a node, in the run folder.
pub(super) fn socket(nic: u32, node: u32) -> String {
    format!("nic{nic}-node{node}.sock")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_network_joins_all_nics_of_all_nodes() {
        let words = network(0, Topology::of(3, 2)).join(" ");
        assert_eq!(words.matches("hubid=0").count(), 2 + 4, "its own NICs and a port for each other NIC");
        assert_eq!(words.matches("server=off").count(), 4, "the switch connects, or a frozen node stops it");
        let other = network(2, Topology::of(3, 2)).join(" ");
        assert_eq!(other.matches("server=on").count(), 2);
        assert!(other.contains("addr.path=nic1-node2.sock"), "{other}");
        assert!(other.contains("mac=52:54:00:00:01:03"), "{other}");
    }

    #[test]
    fn split_gives_each_nic_a_network() {
        let words = network(0, Topology { split: true, ..Topology::of(2, 2) }).join(" ");
        assert_eq!(words.matches("hubid=1").count(), 2);
        assert!(
            kernel_arguments(0, Topology { split: true, ..Topology::of(2, 2) }, Console::Log).contains("PREFIX=24")
        );
    }

    #[test]
    fn a_comma_in_the_folder_is_no_option() {
        assert!(folders("/a,b")[3].contains("path=/a,,b,"));
    }
}
