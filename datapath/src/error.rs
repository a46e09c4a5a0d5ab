//! What goes wrong on the datapath, as discriminants and integers: put into words where there is time for words.

use crate::nic::{Op, WcStatus};
use crate::units::{Nanos, PeerId, Qpn, RailId, RemoteAddr};

/// Why a slice ended without its bytes, or a Work without all its slices.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[repr(u8)]
pub enum Cause {
    /// The device refused or failed the request, and retrying elsewhere did not help; the status says how.
    Completion = 1,
    /// The request itself is wrong (keys, range, length): no rail is to blame.
    BadRequest = 2,
    /// The deadline passed.
    Deadline = 3,
    /// The caller cancelled.
    Cancelled = 4,
    /// No rail to the peer, and control could not make one.
    Unreachable = 5,
    /// The engine shuts down.
    Shutdown = 6,
    /// The core that carried it is lost.
    CoreLost = 7,
    /// ibv_post_send refused the request; the status is its errno.
    Post = 8,
    /// The peer is another process than the one whose memory was asked for.
    Restarted = 9,
}

/// A slice's failure in 64 bits: what an atomic can keep.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SliceError {
    /// Why.
    pub cause: Cause,
    /// Completion status, or errno for [`Cause::Post`], cut to 8 bits.
    pub status: u8,
    /// The device maker's code, cut to 16 bits.
    pub vendor: u16,
    /// The rail of the last attempt, if one was made.
    pub rail: Option<RailId>,
}

impl SliceError {
    /// A cause without a completion.
    pub const fn of(cause: Cause) -> Self {
        Self { cause, status: 0, vendor: 0, rail: None }
    }

    /// Never 0, so that 0 can mean *none*.
    pub fn to_bits(self) -> u64 {
        let rail = self.rail.map_or(u32::MAX, |r| r.0);
        (self.cause as u64) << 56 | u64::from(self.status) << 48 | u64::from(self.vendor) << 32 | u64::from(rail)
    }

    /// The other way; `None` for 0.
    pub fn from_bits(bits: u64) -> Option<Self> {
        let cause = match bits >> 56 {
            1 => Cause::Completion,
            2 => Cause::BadRequest,
            3 => Cause::Deadline,
            4 => Cause::Cancelled,
            5 => Cause::Unreachable,
            6 => Cause::Shutdown,
            7 => Cause::CoreLost,
            8 => Cause::Post,
            9 => Cause::Restarted,
            _ => return None,
        };
        let rail = bits as u32;
        Some(Self {
            cause,
            status: (bits >> 48) as u8,
            vendor: (bits >> 32) as u16,
            rail: (rail != u32::MAX).then_some(RailId(rail)),
        })
    }

    /// The status as verbs numbers it.
    pub fn wc_status(self) -> WcStatus {
        WcStatus(u32::from(self.status))
    }
}

/// Whose fault a completion status is, by itself (the evidence of other rails may say more).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum FaultClass {
    /// Echo of an earlier error: costs no retry, is not logged.
    Flush,
    /// The request is wrong whatever rail carries it.
    Request,
    /// Could be a wrong path MTU, or the request.
    MtuOrRequest,
    /// The path to the peer, or the peer.
    Path,
    /// Our queue pair, port or device: its state decides.
    Local,
    /// Not in the table.
    Unknown,
}

/// The table of statuses. Every value of ibv_wc_status has a line; unknown values too.
pub fn classify(status: WcStatus) -> FaultClass {
    match status {
        WcStatus::WR_FLUSH_ERR => FaultClass::Flush,
        WcStatus::LOC_PROT_ERR | WcStatus::LOC_ACCESS_ERR | WcStatus::REM_ACCESS_ERR | WcStatus::MW_BIND_ERR => {
            FaultClass::Request
        }
        WcStatus::LOC_LEN_ERR | WcStatus::REM_INV_REQ_ERR | WcStatus::BAD_RESP_ERR => FaultClass::MtuOrRequest,
        WcStatus::RETRY_EXC_ERR
        | WcStatus::RNR_RETRY_EXC_ERR
        | WcStatus::REM_OP_ERR
        | WcStatus::REM_ABORT_ERR
        | WcStatus::RESP_TIMEOUT_ERR
        | WcStatus::STALLED
        | WcStatus::UNPROVEN => FaultClass::Path,
        WcStatus::LOC_QP_OP_ERR
        | WcStatus::LOC_EEC_OP_ERR
        | WcStatus::LOC_RDD_VIOL_ERR
        | WcStatus::INV_EECN_ERR
        | WcStatus::INV_EEC_STATE_ERR
        | WcStatus::FATAL_ERR => FaultClass::Local,
        _ => FaultClass::Unknown,
    }
}

/// The first error of a queue pair's life: all that is known when it is seen, for one log line and the decision.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct FirstError {
    /// The peer at the other end.
    pub peer: PeerId,
    /// The queue pair.
    pub qpn: Qpn,
    /// What the completion said; SUCCESS never. [`WcStatus::STALLED`], [`WcStatus::GIVEN_UP`]: there was none.
    /// [`WcStatus::UNPROVEN`]: it said success, or a later one implied it.
    pub status: WcStatus,
    /// The device maker's code.
    pub vendor_err: u32,
    /// READ or WRITE.
    pub op: Op,
    /// Local address of the request.
    pub local: u64,
    /// Remote address of the request.
    pub remote: RemoteAddr,
    /// Bytes of the request.
    pub len: u32,
    /// From posting to completion.
    pub age: Nanos,
    /// Requests outstanding behind it, which will all be flushed.
    pub behind: u32,
    /// Whether this queue pair ever completed anything: if not, the path never worked.
    pub proven: bool,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_survives_its_bits() {
        let error = SliceError { cause: Cause::Completion, status: 12, vendor: 0x81, rail: Some(RailId(7)) };
        assert_eq!(SliceError::from_bits(error.to_bits()), Some(error));
        assert_eq!(SliceError::from_bits(SliceError::of(Cause::Deadline).to_bits()).unwrap().rail, None);
        assert_eq!(SliceError::from_bits(0), None);
    }

    #[test]
    fn every_status_has_a_class_and_only_flushes_are_flushes() {
        for status in 0..64 {
            let class = classify(WcStatus(status));
            assert_eq!(class == FaultClass::Flush, status == 5, "{status}");
        }
        assert_eq!(classify(WcStatus(63)), FaultClass::Unknown);
    }
}
