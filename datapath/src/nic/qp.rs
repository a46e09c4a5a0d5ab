//! A queue pair's life as types: RESET → INIT → RTR → RTS, then two halves.
//!
//! Each step consumes the state before it, so an attribute cannot be applied in the wrong state, and only
//! [`ConnectedQp`] fits into a core's command ring. There is no way back to RESET: a queue pair with work outstanding
//! that is reset loses outcomes. A failed step destroys the queue pair, whose number is never used again by us.

use std::io;
use std::marker::PhantomData;

use super::{AdminQp, PostQp, Posted, RawQp, WorkRequest};
use crate::units::{Gid, GidIndex, Lid, Mtu, PortNum, Qpn, RqPsn, SqPsn};

/// Just created.
pub enum Reset {}
/// Bound to a port.
pub enum Init {}
/// Knows its peer; serves the peer's requests.
pub enum Rtr {}
/// Ready to send.
pub enum Rts {}

/// A queue pair in state `S`, whole: not yet in use by a core.
pub struct Qp<S> {
    raw: Box<dyn RawQp>,
    state: PhantomData<fn() -> S>,
}

/// Attributes of RESET → INIT (mask PKEY_INDEX | PORT | ACCESS_FLAGS). Remote READ, WRITE and ATOMIC are allowed, as
/// stock peers have it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct InitAttr {
    /// Port of the device.
    pub port: PortNum,
    /// Index in the port's partition table; 0 unless MC_PKEY_INDEX says otherwise.
    pub pkey_index: u16,
}

/// Attributes of INIT → RTR.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct RtrAttr {
    /// Path MTU: the same on both ends or large packets are refused.
    pub path_mtu: Mtu,
    /// The peer's queue pair.
    pub dest_qpn: Qpn,
    /// The peer's first packet number.
    pub rq_psn: RqPsn,
    /// READs served at once; the peer's max_rd_atomic may not be larger.
    pub max_dest_rd_atomic: u8,
    /// RNR NAK timer code, 0 to 31 (12 = 0.64 ms).
    pub min_rnr_timer: u8,
    /// The peer's GID.
    pub dest_gid: Gid,
    /// The peer's LID, 0 on RoCE.
    pub dest_lid: Lid,
    /// Index of our own GID, looked up again by value just before.
    pub sgid_index: GidIndex,
    /// Routers a packet may pass.
    pub hop_limit: u8,
    /// DSCP and ECN byte.
    pub traffic_class: u8,
    /// Service level, 0 to 15.
    pub service_level: u8,
    /// Port of the device.
    pub port: PortNum,
}

/// Attributes of RTR → RTS.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct RtsAttr {
    /// Local ACK timeout code: 4.096 us × 2^timeout, 1 to 31; 0 waits for ever.
    pub timeout: u8,
    /// Transport retries, 0 to 6. Soft-RoCE takes 7 as *for ever*, so 7 is never used outside one lab test.
    pub retry_cnt: u8,
    /// RNR retries, 0 to 7 (7 = for ever; we post no receives, so it never applies).
    pub rnr_retry: u8,
    /// First packet number we send.
    pub sq_psn: SqPsn,
    /// READs outstanding at once.
    pub max_rd_atomic: u8,
}

/// Which step of the life failed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Step {
    /// RESET → INIT
    Init,
    /// INIT → RTR
    Rtr,
    /// RTR → RTS
    Rts,
}

/// ibv_modify_qp refused a step. The queue pair is destroyed.
#[derive(Debug, thiserror::Error)]
#[error("queue pair {qpn} could not be moved to {}: {source}", match step { Step::Init => "INIT", Step::Rtr => "RTR", Step::Rts => "RTS" })]
pub struct ModifyError {
    /// The queue pair.
    pub qpn: Qpn,
    /// The step.
    pub step: Step,
    /// What verbs said.
    pub source: io::Error,
}

impl<S> Qp<S> {
    /// Its number.
    pub fn qpn(&self) -> Qpn {
        self.raw.qpn()
    }

    fn step<T>(
        mut self,
        step: Step,
        modify: impl FnOnce(&mut dyn RawQp) -> io::Result<()>,
    ) -> Result<Qp<T>, ModifyError> {
        match modify(self.raw.as_mut()) {
            Ok(()) => Ok(Qp { raw: self.raw, state: PhantomData }),
            Err(source) => Err(ModifyError { qpn: self.raw.qpn(), step, source }),
        }
    }
}

impl Qp<Reset> {
    /// Wraps a queue pair that an implementation just created, in RESET.
    pub fn new(raw: Box<dyn RawQp>) -> Self {
        Self { raw, state: PhantomData }
    }

    /// RESET → INIT.
    pub fn init(self, attr: &InitAttr) -> Result<Qp<Init>, ModifyError> {
        self.step(Step::Init, |raw| raw.to_init(attr))
    }
}

impl Qp<Init> {
    /// INIT → RTR. May block for seconds (neighbour resolution): call it from control's pool.
    pub fn rtr(self, attr: &RtrAttr) -> Result<Qp<Rtr>, ModifyError> {
        self.step(Step::Rtr, |raw| raw.to_rtr(attr))
    }
}

impl Qp<Rtr> {
    /// RTR → RTS.
    pub fn rts(self, attr: &RtsAttr) -> Result<Qp<Rts>, ModifyError> {
        self.step(Step::Rts, |raw| raw.to_rts(attr))
    }
}

impl Qp<Rts> {
    /// Parts the queue pair: the connected half for a core, the other for control.
    pub fn split(self) -> (ConnectedQp, AdminHalf) {
        let (post, admin) = self.raw.split();
        connected(post, admin)
    }
}

/// The two halves of a queue pair that is ready to send: one in RTS, or one that a NIC connected by dialling.
pub fn connected(post: Box<dyn PostQp>, admin: Box<dyn AdminQp>) -> (ConnectedQp, AdminHalf) {
    (ConnectedQp(PostHalf { post }), AdminHalf(admin))
}

/// A queue pair in RTS that no core has, with nothing posted on it: the only thing a core adopts.
pub struct ConnectedQp(PostHalf);

impl ConnectedQp {
    /// Its number.
    pub fn qpn(&self) -> Qpn {
        self.0.qpn()
    }

    /// A queue pair that a core gives back. It must never have failed, and have nothing posted: what is has an outcome to come.
    pub(crate) fn idle(post: Box<dyn PostQp>) -> Self {
        Self(PostHalf { post })
    }

    /// The posting half; from here on the caller is the core that owns it.
    pub fn into_post_half(self) -> PostHalf {
        self.0
    }
}

/// What a core owns of a queue pair: posting.
pub struct PostHalf {
    pub(crate) post: Box<dyn PostQp>,
}

impl PostHalf {
    /// Its number.
    pub fn qpn(&self) -> Qpn {
        self.post.qpn()
    }

    /// Work requests the send queue holds.
    pub fn depth(&self) -> u32 {
        self.post.depth()
    }

    /// Largest inline payload in bytes.
    pub fn max_inline(&self) -> u32 {
        self.post.max_inline()
    }

    /// Whether what came back so far can not land at the peer any more.
    pub fn drains_clean(&self) -> bool {
        self.post.drains_clean()
    }

    /// See [`PostQp::reads_are_proven`].
    pub fn reads_are_proven(&self) -> bool {
        self.post.reads_are_proven()
    }

    /// See [`PostQp::is_in_error`].
    pub fn is_in_error(&self) -> bool {
        self.post.is_in_error()
    }

    /// Posts `chain` with one doorbell; says how many the device took.
    pub fn post(&mut self, chain: &[WorkRequest]) -> Posted {
        self.post.post(chain)
    }
}

/// What control owns of a connected queue pair: moving it to ERR, and destroying it once the core gave its half back.
pub struct AdminHalf(Box<dyn AdminQp>);

impl AdminHalf {
    /// Its number.
    pub fn qpn(&self) -> Qpn {
        self.0.qpn()
    }

    /// Moves the queue pair to ERR, so that everything outstanding completes as flushed. May block; may be repeated.
    pub fn to_error(&mut self) -> io::Result<()> {
        self.0.to_error()
    }
}

/// Destroys a queue pair, which takes both of its halves. May block: call it from control's pool.
///
/// # Errors
/// Gives both halves back if they are not of the same queue pair.
pub fn destroy(admin: AdminHalf, post: PostHalf) -> Result<(), (AdminHalf, PostHalf)> {
    if admin.qpn() != post.qpn() {
        return Err((admin, post));
    }
    drop(post);
    drop(admin);
    Ok(())
}
