//! The folder of one run: what the nodes see as `/lab`, and the logs.

use std::path::{Path, PathBuf};
use std::time::SystemTime;

use crate::error::{At, Error, Result};
use crate::process::last_lines;
use crate::workspace;

/// Scripts every node finds in `/lab`.
const SCRIPTS: &[(&str, &str)] = &[
    ("boot", include_str!("../../../lab/boot")),
    ("lab-barrier", include_str!("../../../lab/lab-barrier")),
    ("lab-fault", include_str!("../../../lab/lab-fault")),
];

/// The folder of one run.
#[derive(Debug)]
pub(super) struct RunFolder {
    path: PathBuf,
    nodes: u32,
    /// The user named it: it stays.
    named: bool,
}

impl RunFolder {
    /// A fresh folder with the nodes' scripts in it.
    pub(super) fn create(label: &str, out: Option<&Path>, nodes: u32) -> Result<Self> {
        let path = match out {
            Some(out) => std::path::absolute(out).at("find", out)?,
            None => workspace::target().join("lab-logs").join(unique(label)),
        };
        // Left from an earlier run into the same folder, these would be taken for ours.
        for stale in ["shared/.barrier", "shared/.status", "shared/.control", "shared/.up"] {
            let _ = std::fs::remove_dir_all(path.join(stale));
        }
        let _ = std::fs::remove_file(path.join("shared/.go"));
        for folder in ["shared/.barrier", "shared/.status", "shared/.control", "shared/.up"] {
            let folder = path.join(folder);
            std::fs::create_dir_all(&folder).at("create", &folder)?;
        }
        if out.is_none() {
            prune(&workspace::target().join("lab-logs"));
        }
        let made = Self { path, nodes, named: out.is_some() };
        for (name, text) in SCRIPTS {
            made.write(name, text)?;
        }
        Ok(made)
    }

    /// Takes away what a boot that came to nothing left behind.
    pub(super) fn forget_boot(&self) -> Result<()> {
        let up = self.path.join("shared/.up");
        std::fs::remove_dir_all(&up).and_then(|()| std::fs::create_dir(&up)).at("empty", &up)
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn write(&self, name: &str, text: &str) -> Result<()> {
        let path = self.path.join(name);
        std::fs::write(&path, text).at("write", &path)
    }

    pub(super) fn log(&self, node: u32) -> PathBuf {
        self.path.join(format!("node{node}.log"))
    }

    pub(super) fn console(&self, node: u32) -> PathBuf {
        self.path.join(format!("node{node}.console"))
    }

    pub(super) fn control(&self) -> PathBuf {
        self.path.join("shared/.control")
    }

    /// Whether the node has its NICs up.
    pub(super) fn is_up(&self, node: u32) -> bool {
        self.path.join(format!("shared/.up/{node}")).exists()
    }

    /// Why the node's boot script gave up, if it did.
    pub(super) fn gave_up(&self, node: u32) -> Option<String> {
        let text = std::fs::read_to_string(self.path.join(format!("shared/.up/{node}.failed"))).ok()?;
        Some(text.trim().to_owned())
    }

    /// Lets the nodes run their command.
    pub(super) fn go(&self) -> Result<()> {
        self.write("shared/.go", "")
    }

    /// The exit status of the node's command, once it has ended.
    pub(super) fn status(&self, node: u32) -> Option<i32> {
        let text = std::fs::read_to_string(self.path.join(format!("shared/.status/{node}"))).ok()?;
        Some(text.trim().parse().unwrap_or(-1))
    }

    /// The end of what the node's kernel and boot scripts said.
    pub(super) fn console_end(&self, node: u32) -> String {
        let bytes = std::fs::read(self.console(node)).unwrap_or_default();
        last_lines(String::from_utf8_lossy(&bytes).trim_end(), 15)
    }

    /// The end of the node's output.
    pub(super) fn log_end(&self, node: u32, lines: usize) -> String {
        let bytes = std::fs::read(self.log(node)).unwrap_or_default();
        last_lines(String::from_utf8_lossy(&bytes).trim_end(), lines)
    }

    /// Every node's output.
    pub(super) fn logs(&self) -> Result<super::Logs> {
        let read = |node| {
            let path = self.log(node);
            std::fs::read(&path).at("read", &path).map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
        };
        (0..self.nodes).map(read).collect()
    }

    /// Deletes the folder after a success nobody wants to look at; otherwise says where it is.
    pub(super) fn finish<T>(self, ended: Result<T>, keep: bool) -> Result<T> {
        match ended {
            Ok(value) if self.named || keep => {
                println!("lab: logs are in {}", self.path.display());
                Ok(value)
            }
            Ok(value) => {
                let _ = std::fs::remove_dir_all(&self.path);
                Ok(value)
            }
            Err(e) => {
                let logs = format!("the logs of all nodes are in {}", self.path.display());
                Err(Error::new(e.to_string(), logs))
            }
        }
    }
}

/// Keeps the newest logs of failed runs and removes older ones.
fn prune(all: &Path) {
    let entries = std::fs::read_dir(all).into_iter().flatten().flatten();
    let mut runs: Vec<_> = entries.filter_map(|e| Some((e.metadata().ok()?.modified().ok()?, e.path()))).collect();
    runs.sort();
    for (_, run) in runs.iter().rev().skip(KEPT_RUNS) {
        let _ = std::fs::remove_dir_all(run);
    }
}

/// How many folders of failed runs stay.
const KEPT_RUNS: usize = 20;

fn unique(label: &str) -> String {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    format!("{label}-{}-{}", now.as_secs(), std::process::id())
}
