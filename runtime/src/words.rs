//! A slice's failure, 64 bits from a core, put into words with what control knows.

use std::time::Duration;

use moonrail_datapath::error::{Cause, SliceError};
use moonrail_datapath::nic::WcStatus;
use moonrail_datapath::work::Work;

use crate::batch::Transfer;
use crate::engine::Shared;
use crate::error::TransferError;

impl Shared {
    /// `patience`: how long control may take to tell what it knows.
    pub(crate) fn put_into_words(
        &self,
        index: usize,
        transfer: Transfer,
        work: &Work,
        error: SliceError,
        patience: Duration,
    ) -> TransferError {
        let segment = work.remote().peer.name().to_owned();
        // The end may only say that time was over or no rail was left; what went wrong first says why.
        let first = work.first_error().filter(|first| !matches!(first.cause, Cause::Cancelled | Cause::Shutdown));
        let told = match error.cause {
            Cause::Deadline | Cause::Unreachable => first.unwrap_or(error),
            _ => error,
        };
        let rail = told.rail.or(error.rail);
        let story = self.control.story(&segment, rail, patience);
        let detail = match error.cause {
            Cause::Cancelled | Cause::Shutdown | Cause::BadRequest | Cause::Restarted => None,
            _ => story.incident.or(story.trouble),
        };
        TransferError {
            index,
            op: transfer.op,
            segment,
            local: transfer.local,
            remote: transfer.remote,
            len: transfer.len,
            cause: error.cause,
            status: status_text(told),
            vendor: told.vendor,
            rail: story.nics,
            detail,
            advice: advice(error.cause, told),
        }
    }

    /// What control knows to be wrong between us and a peer.
    pub(crate) fn trouble_with(&self, peer: &str, patience: Duration) -> Option<String> {
        self.control.story(peer, None, patience).trouble
    }
}

fn status_text(error: SliceError) -> String {
    match error.cause {
        Cause::Post => plain_errno(i32::from(error.status)),
        _ if error.status == 0 => String::new(),
        _ => error.wc_status().text().to_owned(),
    }
}

fn plain_errno(errno: i32) -> String {
    let text = std::io::Error::from_raw_os_error(errno).to_string();
    text.replace(" (os error ", " [").trim_end_matches(')').to_owned() + if errno == 0 { "" } else { "]" }
}

/// What an operator does next.
fn advice(cause: Cause, told: SliceError) -> &'static str {
    match cause {
        Cause::Cancelled => "it was cancelled, or its batch dropped: submit it again if it is still wanted",
        Cause::Shutdown => "the memory may be used again",
        Cause::Restarted => "refresh the segment, or open it again: it tells where the new process has its memory",
        Cause::CoreLost => "see the log for the panic, and restart this process",
        Cause::Post => "see `dmesg` and `moonrail doctor`; a device that refuses every request needs its driver reset",
        Cause::Unreachable => "check that the peer runs; over RDMA, also that `ib_send_bw` works between the two NICs",
        Cause::Deadline if told.status == 0 => {
            "the peer or the network may be slow or gone: see `moonrail ping`; MC_TRANSFER_TIMEOUT sets the limit"
        }
        Cause::BadRequest | Cause::Completion | Cause::Deadline => match told.wc_status() {
            WcStatus::REM_ACCESS_ERR => {
                "the peer's memory is not registered (any more) as published: refresh the segment and check the range"
            }
            WcStatus::REM_INV_REQ_ERR | WcStatus::LOC_LEN_ERR => {
                "the two ends may use different path MTUs: set MC_MTU on both"
            }
            WcStatus::LOC_PROT_ERR | WcStatus::LOC_ACCESS_ERR => {
                "the local memory is not registered (any more): keep the region until the batch is over"
            }
            WcStatus::RETRY_EXC_ERR | WcStatus::RESP_TIMEOUT_ERR => {
                "the peer does not answer: check that it runs, the cables, MC_GID_INDEX and MC_MTU (`moonrail ping`)"
            }
            WcStatus::STALLED => {
                "nothing came back: check the routes between the two NICs (`moonrail ping`), and `dmesg` on both ends"
            }
            WcStatus::UNPROVEN => {
                "the peer's net device took packets no more: compare the MTUs of the interfaces, and `ip -s link` on the peer"
            }
            WcStatus::LOC_QP_OP_ERR | WcStatus::FATAL_ERR => "see `dmesg` for the device, and `moonrail doctor`",
            _ => "see `moonrail doctor`, and the log for the first error of this rail",
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refused_post_is_told_by_its_errno() {
        let error = SliceError { cause: Cause::Post, status: libc::ENOMEM as u8, vendor: 0, rail: None };
        assert_eq!(status_text(error), "Cannot allocate memory [12]");
        assert_eq!(status_text(SliceError::of(Cause::Deadline)), "");
    }

    #[test]
    fn every_cause_and_status_has_advice() {
        for cause in [Cause::Completion, Cause::BadRequest, Cause::Deadline, Cause::Unreachable, Cause::Post] {
            for status in 0..30 {
                assert!(!advice(cause, SliceError { cause, status, vendor: 0, rail: None }).is_empty());
            }
        }
    }
}
