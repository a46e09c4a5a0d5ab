//! The exact texts by which an engine refuses a hello (`reply_msg`). Operators and the stock engine's logs know them.
//!
//! In the texts of both engines "endpoint" is a rail's end and "context" an opened NIC.

/// A ready acknowledgement came before its hello.
pub const ACK_UNCONNECTED: &str = "Received RDMA ready ACK for unconnected endpoint";
/// A ready acknowledgement names other queue pairs than those connected.
pub const ACK_STALE: &str = "Received stale RDMA ready ACK with mismatched peer QP numbers";
/// The two lists of queue pairs differ in length. The text names the wrong variable, as upstream does; the one to
/// set equal on both ends is `MC_NUM_QP_PER_EP`.
pub const QP_COUNT: &str = "QP count mismatch in peer and local endpoints, check MC_MAX_EP_PER_CTX";
/// The sender is connected to queue pairs of ours that are gone (a moonrail node says to which, a stock one never does): nothing
/// can be connected to its own any more.
pub const END_GONE: &str = "The queue pairs that this end is connected to are gone; connect anew";
/// `notify_rq_depth` above 65535.
pub const NOTIFY_DEPTH: &str = "Invalid handshake notify_rq_depth";

/// `peer_nic_path` has no `@` or no device behind it; also the answer to a control channel (`__ctrl__`).
pub fn invalid_peer_path(path: &str) -> String {
    format!("Invalid peer_nic_path in handshake: {path}")
}

/// The device named in `peer_nic_path` is not one of ours.
pub fn no_such_nic(device: &str) -> String {
    format!("Local RDMA context not found for handshake NIC: {device}")
}

/// No queue pairs could be made: the NIC is down or out of resources, or `local_nic_path` is empty.
pub fn endpoint_unavailable(local_device: &str, peer_path: &str) -> String {
    format!("Local RDMA endpoint unavailable for {local_device} <- {peer_path}")
}

/// As [`endpoint_unavailable`], after the previous end of the rail was retired.
pub fn fresh_endpoint_unavailable(local_device: &str, peer_path: &str) -> String {
    format!("Fresh local RDMA endpoint unavailable after retiring stale endpoint for {local_device} <- {peer_path}")
}

/// The paths of the hello are not those of this rail: our own path, the rail's peer path, what the hello has.
pub fn path_inconsistency(own: &str, expected_peer: &str, got_peer_path: &str, got_local_path: &str) -> String {
    format!(
        "Invalid argument: peer nic path inconsistency, expect {own} + {expected_peer}, \
         while got {got_peer_path} + {got_local_path}"
    )
}

/// `local_nic_path` has no `@`.
pub fn unparsable_path(path: &str) -> String {
    format!("Parse peer nic path failed: {path}")
}

/// The hello has no GID and the sender's descriptor has no such NIC.
pub fn nic_not_in_descriptor(path: &str) -> String {
    format!("Peer nic not found in that server: {path}")
}

/// `local_gid` is not a GID.
pub fn invalid_gid(text: &str) -> String {
    format!("Invalid peer GID: {text}")
}

/// A change of queue pair state was refused by the device.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Step {
    /// to RESET
    Reset,
    /// to INIT
    Init,
    /// to RTR
    Rtr,
    /// to RTS
    Rts,
}

/// The device refused `step`; `cause` is the system's text for the error number.
pub fn modify_failed(step: Step, cause: &str) -> String {
    let what = match step {
        Step::Reset => "RESET",
        Step::Init => "INIT, check local context port num",
        Step::Rtr => "RTR, check mtu, gid, peer lid, peer qp num",
        Step::Rts => "RTS",
    };
    format!("Failed to modify QP to {what}: {cause}")
}

/// Anything else, by the stock engine's negative code.
pub fn callback_failed(code: i32) -> String {
    format!("Handshake callback failed: {code}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_texts_seen_on_the_wire() {
        assert_eq!(invalid_peer_path("__ctrl__"), "Invalid peer_nic_path in handshake: __ctrl__");
        assert_eq!(
            path_inconsistency("a@x", "b@y", "c@x", "b@y"),
            "Invalid argument: peer nic path inconsistency, expect a@x + b@y, while got c@x + b@y"
        );
        assert_eq!(
            modify_failed(Step::Rtr, "Connection timed out"),
            "Failed to modify QP to RTR, check mtu, gid, peer lid, peer qp num: Connection timed out"
        );
    }
}
