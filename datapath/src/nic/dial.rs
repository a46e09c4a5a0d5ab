//! Fabrics that are dialled: one end connects, the other serves whoever comes, and no handshake of control is needed.
//!
//! ```text
//!  RDMA        queue pairs on both ends, their numbers exchanged over the control port      both ends may use it
//!  shm, tcp    the peer publishes an offer; whoever wants to move bytes dials it            the dialler uses it
//! ```
//!
//! The peer's memory is found by its address, in what the peer registered on that NIC: there are no keys to publish.

use std::io;
use std::sync::atomic::{AtomicU32, Ordering};

use crate::units::Qpn;

/// What carries the bytes of a rail, best first.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Fabric {
    /// Copies, between processes of one host.
    Shm,
    /// One-sided verbs.
    Rdma,
    /// Mooncake's TCP data protocol.
    Tcp,
}

impl Fabric {
    /// All of them, best first.
    pub const ALL: [Self; 3] = [Self::Shm, Self::Rdma, Self::Tcp];

    /// Its word in options, tables and logs.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Shm => "shm",
            Self::Rdma => "rdma",
            Self::Tcp => "tcp",
        }
    }

    /// Whether its queue pairs are dialled.
    pub const fn is_dialled(self) -> bool {
        !matches!(self, Self::Rdma)
    }

    /// Its bit in a set of fabrics.
    pub const fn bit(self) -> u8 {
        1 << self as u8
    }
}

impl std::fmt::Display for Fabric {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}

/// What a node publishes for others to dial.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Offer {
    /// Shared memory, under a token drawn at random that nobody else has.
    Shm {
        /// Names the socket at which memory is handed out, and stands in that memory: the proof of identity.
        token: u64,
    },
    /// The TCP data protocol.
    Tcp {
        /// Port of the data socket.
        port: u16,
    },
}

/// How far the other end of a TCP rail understands.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum TcpVersion {
    /// WRITEs are not acknowledged (tcp_proto_version 1, or MC_TCP_PROTO=1).
    V1,
    /// A status for each request.
    V2,
    /// A moonrail node: a batch goes as one list of headers and one run of bytes.
    Batch,
}

/// Whom to dial.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Target {
    /// As of the peer's [`Offer::Shm`]. That both run under one boot id is checked before.
    Shm {
        /// The peer's token.
        token: u64,
    },
    /// As of the peer's descriptor.
    Tcp {
        /// Name or address.
        host: String,
        /// Port of the data socket.
        port: u16,
        /// What the peer understands.
        version: TcpVersion,
    },
}

/// A peer could not be dialled.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DialError {
    /// This NIC is not for dialling.
    #[error("NIC {nic} cannot be dialled from")]
    Unsupported {
        /// Which.
        nic: String,
    },
    /// It is not proven that the peer runs on this host, in reach of shared memory.
    #[error("not on this host, or not in reach of shared memory: {why}")]
    Elsewhere {
        /// What was found.
        why: String,
    },
    /// The peer is here, and the system does not let us at its memory.
    #[error("the system does not allow it: {why}")]
    Forbidden {
        /// What to change to allow it.
        why: String,
    },
    /// A step failed that may succeed later.
    #[error("{what}: {source}")]
    Io {
        /// The step.
        what: String,
        /// What the system said.
        source: io::Error,
    },
}

impl DialError {
    /// Whether dialling the same offer again would end the same way.
    pub fn is_final(&self) -> bool {
        !matches!(self, Self::Io { .. })
    }
}

/// A number for a dialled queue pair. No device gives one; nobody but logs and tables needs it, and it comes back only
/// after 2^24 others.
pub fn next_qpn() -> Qpn {
    static NEXT: AtomicU32 = AtomicU32::new(1);
    let number = NEXT.fetch_add(1, Ordering::Relaxed) & 0xff_ffff;
    Qpn::new(number).unwrap_or_default()
}
