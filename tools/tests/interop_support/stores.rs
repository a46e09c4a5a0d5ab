//! Metadata servers on free ports of this host: etcd, and Mooncake's own HTTP server.
#![allow(dead_code)] // each test target uses a part

use std::net::TcpStream;
use std::process::Command;
use std::time::{Duration, Instant};

use crate::host_support::ports::free_port;
use crate::host_support::process::Process;
use crate::interop_support::python;

/// A running store, or none.
pub(crate) struct Store {
    process: Option<Process>,
    folder: Option<std::path::PathBuf>,
    uri: String,
}

impl Store {
    /// No store: peers ask each other.
    pub(crate) fn none() -> Self {
        Self { process: None, folder: None, uri: "P2PHANDSHAKE".to_owned() }
    }

    /// A fresh etcd.
    pub(crate) fn etcd() -> Self {
        let (port, peer) = (free_port(), free_port());
        let folder = std::env::temp_dir().join(format!("moonrail-interop-etcd-{port}"));
        let (client, between) = (format!("http://127.0.0.1:{port}"), format!("http://127.0.0.1:{peer}"));
        let mut command = Command::new("etcd");
        command
            .arg("--data-dir")
            .arg(&folder)
            .args(["--log-level", "error", "--unsafe-no-fsync"])
            .args(["--listen-client-urls", &client, "--advertise-client-urls", &client])
            .args(["--listen-peer-urls", &between, "--initial-advertise-peer-urls", &between])
            .args(["--initial-cluster", &format!("default={between}")]);
        let process = Process::start("etcd", command);
        listening(port);
        Self { process: Some(process), folder: Some(folder), uri: format!("etcd://127.0.0.1:{port}") }
    }

    /// Mooncake's HTTP metadata server.
    pub(crate) fn http() -> Self {
        let port = free_port();
        let mut command = Command::new(python());
        command.args(["-m", "mooncake.http_metadata_server", "--host", "127.0.0.1", "--log-level", "WARNING"]);
        command.args(["--port", &port.to_string()]);
        let process = Process::start("mooncake.http_metadata_server", command);
        listening(port);
        Self { process: Some(process), folder: None, uri: format!("http://127.0.0.1:{port}/metadata") }
    }

    /// What goes into `metadata_server`.
    pub(crate) fn uri(&self) -> &str {
        &self.uri
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        drop(self.process.take());
        if let Some(folder) = &self.folder {
            let _ = std::fs::remove_dir_all(folder);
        }
    }
}

fn listening(port: u16) {
    let until = Instant::now() + Duration::from_secs(30);
    while TcpStream::connect(("127.0.0.1", port)).is_err() {
        assert!(Instant::now() < until, "nobody listens on {port}");
        std::thread::sleep(Duration::from_millis(20));
    }
}
