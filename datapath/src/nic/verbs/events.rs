//! Asynchronous events (ibv_get_async_event(3)).

use std::io;
use std::mem::MaybeUninit;

use rdma_core_sys as sys;

use super::device::Context;
use super::library::errno;
use crate::nic::AsyncEvent;
use crate::units::{PortNum, Qpn};

/// What an event is about, by its number in ibv_event_type.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum About {
    QueuePair,
    Port,
    Other,
}

fn about(kind: u32) -> About {
    match kind {
        // QP_FATAL, QP_REQ_ERR, QP_ACCESS_ERR
        1..=3 => About::QueuePair,
        // PORT_ACTIVE, PORT_ERR, LID_CHANGE, GID_CHANGE
        9..=11 | 18 => About::Port,
        _ => About::Other,
    }
}

/// Takes one event, copies it and acknowledges it at once: destroying a queue pair waits for its events.
/// `None`: there is none now.
pub(super) fn next(context: &Context) -> io::Result<Option<AsyncEvent>> {
    let mut event = MaybeUninit::<sys::ibv_async_event>::zeroed();
    // SAFETY: the context is open and its event descriptor does not block; the event is written on success.
    if unsafe { sys::ibv_get_async_event(context.as_ptr(), event.as_mut_ptr()) } != 0 {
        let error = errno();
        return if error.kind() == io::ErrorKind::WouldBlock { Ok(None) } else { Err(error) };
    }
    let raw = event.as_mut_ptr();
    // SAFETY: the event was written. Its kind is read as the integer it is in C, because the binding's enum has no
    // value for a kind that a newer kernel adds. The queue pair it names cannot be freed before the acknowledgement
    // (ibv_get_async_event(3)), so its number is read first. The union holds what `about` says.
    unsafe {
        let kind = (&raw const (*raw).event_type).cast::<u32>().read();
        let (mut number, what) = (0, about(kind));
        match what {
            About::QueuePair => number = (*(*raw).element.qp).qp_num,
            About::Port => number = (*raw).element.port_num.unsigned_abs(),
            About::Other => {}
        }
        sys::ibv_ack_async_event(raw);
        Ok(Some(decode(kind, number)))
    }
}

/// `number`: of the port or the queue pair the event is about.
fn decode(kind: u32, number: u32) -> AsyncEvent {
    let port = PortNum(number as u8); // ports are numbered in 8 bits everywhere in verbs
    match kind {
        0 => AsyncEvent::CqError,
        // A responder's queue pair breaks by REQ_ERR or ACCESS_ERR where a requester's completes with an error.
        1..=3 => AsyncEvent::QpFatal(Qpn::new(number & 0x00ff_ffff).unwrap_or_default()),
        8 => AsyncEvent::DeviceFatal,
        9 => AsyncEvent::PortActive(port),
        10 => AsyncEvent::PortError(port),
        11 => AsyncEvent::LidChange(port),
        18 => AsyncEvent::GidChange(port),
        other => AsyncEvent::Other(other),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use sys::ibv_event_type as kind;

    #[test]
    fn the_numbers_are_those_of_verbs() {
        let port = PortNum(2);
        for (kind, expected) in [
            (kind::IBV_EVENT_CQ_ERR, AsyncEvent::CqError),
            (kind::IBV_EVENT_QP_FATAL, AsyncEvent::QpFatal(Qpn::new(2).unwrap())),
            (kind::IBV_EVENT_QP_REQ_ERR, AsyncEvent::QpFatal(Qpn::new(2).unwrap())),
            (kind::IBV_EVENT_QP_ACCESS_ERR, AsyncEvent::QpFatal(Qpn::new(2).unwrap())),
            (kind::IBV_EVENT_COMM_EST, AsyncEvent::Other(4)),
            (kind::IBV_EVENT_DEVICE_FATAL, AsyncEvent::DeviceFatal),
            (kind::IBV_EVENT_PORT_ACTIVE, AsyncEvent::PortActive(port)),
            (kind::IBV_EVENT_PORT_ERR, AsyncEvent::PortError(port)),
            (kind::IBV_EVENT_LID_CHANGE, AsyncEvent::LidChange(port)),
            (kind::IBV_EVENT_GID_CHANGE, AsyncEvent::GidChange(port)),
        ] {
            assert_eq!(decode(kind as u32, 2), expected);
        }
    }

    #[test]
    fn no_number_is_a_surprise() {
        for kind in 0..1000 {
            let event = decode(kind, u32::MAX);
            let names_port = matches!(
                event,
                AsyncEvent::PortActive(_)
                    | AsyncEvent::PortError(_)
                    | AsyncEvent::LidChange(_)
                    | AsyncEvent::GidChange(_)
            );
            assert_eq!(names_port, about(kind) == About::Port);
            assert_eq!(matches!(event, AsyncEvent::QpFatal(_)), about(kind) == About::QueuePair);
        }
    }
}
