//! What can go wrong, one enum per operation. Each sentence names the cause and what to do next.

use std::io;

use moonrail_datapath::nic::PortState;
use moonrail_datapath::region::process::FORKED;
use moonrail_datapath::units::PortNum;

use crate::metadata::{DescriptorError, StoreError};
use crate::names::{BindError, NameError, OwnAddressError};

/// The control thread could not start.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StartError {
    /// The name cannot be used.
    #[error(transparent)]
    Name(#[from] NameError),
    /// The fixed port, or every port of the range, is taken.
    #[error(transparent)]
    Bind(#[from] BindError),
    /// The system refused the listening socket for another reason.
    #[error("cannot listen for peers on port {port}: {source}")]
    Listen {
        /// The port.
        port: u16,
        /// What the system said.
        source: io::Error,
    },
    /// What would be published as our address is loopback, or another machine's.
    #[error(transparent)]
    Address(#[from] OwnAddressError),
    /// No address to publish was found.
    #[error(
        "this machine has no network interface that is up besides loopback: bring one up, or set MC_TCP_BIND_ADDRESS"
    )]
    NoAddress,
    /// The store cannot be used.
    #[error(transparent)]
    Metadata(#[from] StoreError),
    /// Nobody told whether the store took our keys.
    #[error(transparent)]
    Control(#[from] ControlError),
    /// No NIC of this engine has an active port.
    #[error(
        "Device {device} port not active: port {port} is {state:?}; check cable and driver (`rdma link`, `ibv_devinfo`), \
         or choose another port with MC_IB_PORT"
    )]
    PortNotActive {
        /// The device.
        device: String,
        /// Its port.
        port: PortNum,
        /// The state it is in.
        state: PortState,
    },
    /// The GID chosen is empty.
    #[error(
        "GID is NULL, please check your GID index by specifying MC_GID_INDEX (device {device}; see `moonrail nics`)"
    )]
    ZeroGid {
        /// The device.
        device: String,
    },
    /// A NIC does not answer.
    #[error("device {device} cannot be asked about its port: {source}; see `dmesg`")]
    Nic {
        /// The device.
        device: String,
        /// What verbs said.
        source: io::Error,
    },
    /// An option is outside its range.
    #[error("{option} must be {range}")]
    Option {
        /// Which.
        option: &'static str,
        /// What is allowed.
        range: String,
    },
    /// The system has no thread or descriptor left.
    #[error("cannot start the control thread: {source}; raise `ulimit -n` and `ulimit -u`")]
    Resources {
        /// What the system said.
        source: io::Error,
    },
}

/// The control thread did not answer.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ControlError {
    /// It ended: [`crate::Control::shutdown`] was called, or it failed (then its last log line says why).
    #[error("the engine's control thread has ended: the engine was shut down, or failed (see its log); make a new one")]
    Gone,
    /// The engine belongs to a process this one was forked from.
    #[error("{FORKED}")]
    Forked,
    /// The time given is over.
    #[error("{what} did not finish in time; {state}")]
    Deadline {
        /// What was asked.
        what: &'static str,
        /// How far it had come, and the first cause if there is one.
        state: String,
    },
}

/// A peer could not be asked something over its control port.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DialError {
    /// The name has no address.
    #[error(
        "failed to get IP address of peer server {host}:{port}, check DNS and /etc/hosts, or use IPv4 address instead: {why}"
    )]
    Resolve {
        /// The host.
        host: String,
        /// The port.
        port: u16,
        /// What the resolver said.
        why: String,
    },
    /// Nobody listens there.
    #[error(
        "connect() {address}: Connection refused; the peer is not running, or published another address: check its name and \
         port in its log, and firewalls between"
    )]
    Refused {
        /// Address and port.
        address: String,
    },
    /// No answer to the connection.
    #[error("connect() {address}: Connection timed out; the peer's machine is down or a firewall drops port {port}")]
    ConnectTimeout {
        /// Address and port.
        address: String,
        /// The port.
        port: u16,
    },
    /// The system refused or the connection broke.
    #[error("connection to {address} failed: {why}")]
    Io {
        /// Address and port.
        address: String,
        /// What the system said.
        why: String,
    },
    /// Connected, but no whole reply.
    #[error(
        "{address} did not reply in time: the peer is overloaded, stopped, or does not speak the handshake protocol there"
    )]
    ReplyTimeout {
        /// Address and port.
        address: String,
    },
    /// The reply is not one.
    #[error("{address} replied with something else: {why}")]
    Garbage {
        /// Address and port.
        address: String,
        /// What is wrong with it.
        why: String,
    },
}

/// A segment could not be opened or refreshed.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OpenError {
    /// What is published is of a process that is known to be over.
    #[error(
        "{at} has a descriptor of an earlier life of {name}, which is over: somebody put it back, or the node that runs now \
         could not publish itself (see its log); delete the key or restart that node"
    )]
    PastLife {
        /// The name.
        name: String,
        /// Where it was looked up.
        at: String,
    },
    /// No such key in the store.
    #[error(
        "Failed to get description of {name}: no such segment in {at}; the name must be exactly the one the other node was \
         started with, and that node must be running"
    )]
    NotFound {
        /// The name.
        name: String,
        /// Where was looked.
        at: String,
    },
    /// The name cannot be one.
    #[error(transparent)]
    Name(#[from] NameError),
    /// The store failed.
    #[error("metadata of {name} cannot be read: {source}")]
    Metadata {
        /// The name.
        name: String,
        /// Why, and what to do.
        source: StoreError,
    },
    /// The peer could not be asked (peer-to-peer).
    #[error("segment {name}: {source}")]
    Dial {
        /// The name.
        name: String,
        /// Why.
        source: DialError,
    },
    /// What was found is no descriptor.
    #[error("segment {name}: {source}")]
    Descriptor {
        /// The name.
        name: String,
        /// Why.
        source: DescriptorError,
    },
    /// More peers than this engine keeps.
    #[error("{limit} peers are known already, that is the limit of one engine")]
    TooMany {
        /// The limit.
        limit: usize,
    },
    /// The control thread.
    #[error(transparent)]
    Control(#[from] ControlError),
}

/// Our own segment could not be published.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PublishError {
    /// A buffer that no reader would take.
    #[error("the segment cannot be published: {0}")]
    Descriptor(#[from] DescriptorError),
    /// The store failed. What is registered stays registered here; publish again when the store is back.
    #[error("Failed to register segment descriptor: {0}")]
    Metadata(#[from] StoreError),
    /// The control thread.
    #[error(transparent)]
    Control(#[from] ControlError),
}

/// A notification or probe was not delivered.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum NotifyError {
    /// The peer has no address.
    #[error("Failed to find location of {name}: {why}")]
    Location {
        /// The peer.
        name: String,
        /// Why.
        why: String,
    },
    /// The peer could not be reached.
    #[error("{name}: {source}")]
    Dial {
        /// The peer.
        name: String,
        /// Why.
        source: DialError,
    },
    /// The peer took it not.
    #[error("Notify rejected by {name}: its queue of notifications may be full; its application must take them")]
    Rejected {
        /// The peer.
        name: String,
    },
    /// The control thread.
    #[error(transparent)]
    Control(#[from] ControlError),
}
