//! Queue pairs of two hosts, as far as a handshake needs them: which exist, in which state, to what they lead.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use moonrail_datapath::nic::qp::Reset;
use moonrail_datapath::nic::{AdminQp, InitAttr, PostQp, Posted, Qp, RawQp, RtrAttr, RtsAttr, WorkRequest};
use moonrail_datapath::units::{Gid, Qpn, RqPsn};

/// A queue pair: the host, the process on it, the number. Numbers recur in the next process.
pub(super) type Id = (usize, u32, u32);

/// What is known of a queue pair that exists.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(super) struct State {
    /// It takes packets: in RTR, or RTS.
    pub(super) accepts: bool,
    pub(super) in_error: bool,
    /// Where it sends to, and from where it accepts: host and number.
    pub(super) dest: Option<(usize, u32)>,
    first_in: Option<RqPsn>,
    first_out: Option<RqPsn>,
}

/// Every queue pair that is not destroyed.
#[derive(Default)]
pub(super) struct Fabric {
    pub(super) qps: BTreeMap<Id, State>,
    next: BTreeMap<(usize, u32), u32>,
}

pub(super) type Shared = Arc<Mutex<Fabric>>;

pub(super) fn lock(fabric: &Shared) -> MutexGuard<'_, Fabric> {
    fabric.lock().unwrap_or_else(PoisonError::into_inner)
}

pub(super) fn gid(host: usize) -> Gid {
    let mut bytes = [0; 16];
    (bytes[10], bytes[11], bytes[12], bytes[15]) = (0xff, 0xff, 10, host as u8 + 1);
    Gid(bytes)
}

/// A new queue pair of a process.
pub(super) fn make(fabric: &Shared, host: usize, process: u32) -> Qp<Reset> {
    let mut state = lock(fabric);
    let next = state.next.entry((host, process)).or_insert(20);
    *next += 1;
    let id = (host, process, *next);
    state.qps.insert(id, State::default());
    drop(state);
    Qp::new(Box::new(Raw(Arc::new(Guard { fabric: fabric.clone(), id }))))
}

impl Fabric {
    /// The process is gone, and its queue pairs with it.
    pub(super) fn kill(&mut self, host: usize, process: u32) {
        self.qps.retain(|id, _| (id.0, id.1) != (host, process));
    }

    /// Whether packets go from this queue pair to one that takes them, and back.
    pub(super) fn is_paired(&self, id: Id) -> bool {
        let Some(near) = self.qps.get(&id).filter(|qp| qp.accepts) else { return false };
        self.qps.iter().any(|(other, far)| {
            far.accepts
                && near.dest == Some((other.0, other.2))
                && far.dest == Some((id.0, id.2))
                && near.first_out == far.first_in
                && far.first_out == near.first_in
        })
    }
}

/// Destroys the queue pair when its last half is dropped.
struct Guard {
    fabric: Shared,
    id: Id,
}

impl Guard {
    fn change(&self, change: impl FnOnce(&mut State)) {
        if let Some(state) = lock(&self.fabric).qps.get_mut(&self.id) {
            change(state);
        }
    }
    fn qpn(&self) -> Qpn {
        Qpn::new(self.id.2).unwrap_or_default()
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        lock(&self.fabric).qps.remove(&self.id);
    }
}

struct Raw(Arc<Guard>);

impl RawQp for Raw {
    fn qpn(&self) -> Qpn {
        self.0.qpn()
    }
    fn to_init(&mut self, _: &InitAttr) -> io::Result<()> {
        Ok(())
    }
    fn to_rtr(&mut self, attr: &RtrAttr) -> io::Result<()> {
        let host = usize::from(attr.dest_gid.0[15]) - 1;
        self.0.change(|qp| {
            (qp.accepts, qp.dest) = (true, Some((host, attr.dest_qpn.get())));
            qp.first_in = Some(attr.rq_psn);
        });
        Ok(())
    }
    fn to_rts(&mut self, attr: &RtsAttr) -> io::Result<()> {
        self.0.change(|qp| qp.first_out = Some(RqPsn::from_peer(attr.sq_psn)));
        Ok(())
    }
    fn split(self: Box<Self>) -> (Box<dyn PostQp>, Box<dyn AdminQp>) {
        (Box::new(Half(self.0.clone())), Box::new(Half(self.0)))
    }
}

struct Half(Arc<Guard>);

impl PostQp for Half {
    fn qpn(&self) -> Qpn {
        self.0.qpn()
    }
    fn depth(&self) -> u32 {
        1
    }
    fn max_inline(&self) -> u32 {
        0
    }
    fn post(&mut self, _: &[WorkRequest]) -> Posted {
        Posted { accepted: 0, error: None }
    }
}

impl AdminQp for Half {
    fn qpn(&self) -> Qpn {
        self.0.qpn()
    }
    fn to_error(&mut self) -> io::Result<()> {
        self.0.change(|qp| (qp.accepts, qp.in_error) = (false, true));
        Ok(())
    }
}
