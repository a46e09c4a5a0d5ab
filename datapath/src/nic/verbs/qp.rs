//! RC queue pairs: creation, the three steps to RTS, and the end (ibv_create_qp(3), ibv_modify_qp(3)).

use std::io;
use std::mem::MaybeUninit;
use std::ptr::{self, NonNull};
use std::sync::Arc;

use rdma_core_sys as sys;
use sys::ibv_qp_attr_mask as mask;
use sys::{ibv_access_flags as access_flags, ibv_qp_state, ibv_qp_type};

use super::cq::Cq;
use super::device::Pd;
use super::library::{check, errno, invalid};
use super::post::VerbsPost;
use crate::nic::{AdminQp, InitAttr, PostQp, QpCaps, RawQp, RtrAttr, RtsAttr};
use crate::units::Qpn;

/// Receives are never posted. Some providers refuse a queue of 0, so the smallest that all take.
const RECV_WR: u32 = 1;
/// As above.
const RECV_SGE: u32 = 1;

/// What peers may do through a queue pair: 0xf, as stock peers have it. The registration narrows it.
const ACCESS: u32 = access_flags::IBV_ACCESS_LOCAL_WRITE.0
    | access_flags::IBV_ACCESS_REMOTE_WRITE.0
    | access_flags::IBV_ACCESS_REMOTE_READ.0
    | access_flags::IBV_ACCESS_REMOTE_ATOMIC.0;

const TO_INIT: u32 =
    mask::IBV_QP_STATE.0 | mask::IBV_QP_PKEY_INDEX.0 | mask::IBV_QP_PORT.0 | mask::IBV_QP_ACCESS_FLAGS.0;
const TO_RTR: u32 = mask::IBV_QP_STATE.0
    | mask::IBV_QP_AV.0
    | mask::IBV_QP_PATH_MTU.0
    | mask::IBV_QP_DEST_QPN.0
    | mask::IBV_QP_RQ_PSN.0
    | mask::IBV_QP_MAX_DEST_RD_ATOMIC.0
    | mask::IBV_QP_MIN_RNR_TIMER.0;
const TO_RTS: u32 = mask::IBV_QP_STATE.0
    | mask::IBV_QP_TIMEOUT.0
    | mask::IBV_QP_RETRY_CNT.0
    | mask::IBV_QP_RNR_RETRY.0
    | mask::IBV_QP_SQ_PSN.0
    | mask::IBV_QP_MAX_QP_RD_ATOMIC.0;
const _: () = assert!(
    ACCESS == 0xf && TO_INIT == 0x39 && TO_RTR == 0x0012_9181 && TO_RTS == 0x0001_2e01,
    "the masks that stock peers use, which are also those ibv_modify_qp(3) requires of RC"
);

/// The verbs object; both halves hold it, and the last one to go destroys it.
pub(super) struct QpObject {
    raw: NonNull<sys::ibv_qp>,
    qpn: Qpn,
    // Destroyed after the queue pair, by the order in which `Drop` and the fields run.
    _cq: Arc<Cq>,
    pd: Arc<Pd>,
}

// SAFETY: see the module head. Posting is reached through the one `VerbsPost`, modifying through the one half of
// control; libibverbs allows both at the same time.
unsafe impl Send for QpObject {}
// SAFETY: as above.
unsafe impl Sync for QpObject {}

impl QpObject {
    pub(super) fn as_ptr(&self) -> *mut sys::ibv_qp {
        self.raw.as_ptr()
    }

    pub(super) fn qpn(&self) -> Qpn {
        self.qpn
    }

    /// See [`PostQp::reads_are_proven`].
    pub(super) fn cuts_reads(&self) -> bool {
        self.pd.context().cuts_reads()
    }

    /// Whether the device has moved it to ERR; so it counts too when the device does not tell. One system call.
    pub(super) fn is_in_error(&self) -> bool {
        let (mut attr, mut init) = (empty_attr(ibv_qp_state::IBV_QPS_ERR), MaybeUninit::zeroed());
        // SAFETY: the queue pair lives; the call writes two whole structures, which libibverbs allows beside any other call.
        let code = unsafe {
            sys::ibv_query_qp(self.as_ptr(), &raw mut attr, mask::IBV_QP_STATE.0.cast_signed(), init.as_mut_ptr())
        };
        code != 0 || attr.qp_state == ibv_qp_state::IBV_QPS_ERR
    }

    fn modify(&self, attr: &mut sys::ibv_qp_attr, fields: u32) -> io::Result<()> {
        // SAFETY: the queue pair lives, and `attr` is a whole structure of which `fields` names those to read.
        check(unsafe { sys::ibv_modify_qp(self.as_ptr(), attr, fields.cast_signed()) })
    }
}

impl Drop for QpObject {
    fn drop(&mut self) {
        // SAFETY: created by us, destroyed once: this is the last reference, so nobody posts or modifies. It waits for
        // asynchronous events that were taken and not acknowledged; `events::next` acknowledges at once.
        unsafe { sys::ibv_destroy_qp(self.raw.as_ptr()) };
    }
}

fn empty_attr(state: ibv_qp_state::Type) -> sys::ibv_qp_attr {
    // SAFETY: the structure is made of integers and of a union of bytes, for which zeroes are valid.
    let mut attr: sys::ibv_qp_attr = unsafe { MaybeUninit::zeroed().assume_init() };
    attr.qp_state = state;
    attr
}

/// A queue pair before it is split. Dropping it destroys the queue pair.
pub(super) struct VerbsQp {
    object: Arc<QpObject>,
    depth: u32,
    max_inline: u32,
}

impl VerbsQp {
    pub(super) fn create(pd: &Arc<Pd>, cq: Arc<Cq>, caps: QpCaps) -> io::Result<Self> {
        if !cq.belongs_to(pd.context()) {
            return Err(invalid("the completion queue belongs to another NIC"));
        }
        if caps.max_send_wr == 0 || caps.max_send_sge == 0 {
            return Err(invalid("a send queue needs room for one request of one entry"));
        }
        let mut init = sys::ibv_qp_init_attr {
            qp_context: ptr::null_mut(),
            send_cq: cq.as_ptr(),
            recv_cq: cq.as_ptr(),
            srq: ptr::null_mut(),
            cap: sys::ibv_qp_cap {
                max_send_wr: caps.max_send_wr,
                max_recv_wr: RECV_WR,
                max_send_sge: caps.max_send_sge,
                max_recv_sge: RECV_SGE,
                max_inline_data: caps.max_inline,
            },
            qp_type: ibv_qp_type::IBV_QPT_RC,
            sq_sig_all: 0,
        };
        // SAFETY: domain and queue live, of one device, and the queue pair will own both.
        let raw = unsafe { sys::ibv_create_qp(pd.as_ptr(), &raw mut init) };
        let raw = NonNull::new(raw).ok_or_else(errno)?;
        // SAFETY: just created; the field does not change.
        let number = unsafe { (*raw.as_ptr()).qp_num };
        let qpn = Qpn::new(number & 0x00ff_ffff).unwrap_or_default();
        let object = Arc::new(QpObject { raw, qpn, _cq: cq, pd: Arc::clone(pd) });
        // The provider raises `cap` to what it really made. The depth stays what was asked for, since room on the
        // completion queue was planned for that; a larger inline limit is a gift.
        Ok(Self { object, depth: caps.max_send_wr, max_inline: init.cap.max_inline_data })
    }
}

impl RawQp for VerbsQp {
    fn qpn(&self) -> Qpn {
        self.object.qpn()
    }

    fn to_init(&mut self, attr: &InitAttr) -> io::Result<()> {
        let mut to = empty_attr(ibv_qp_state::IBV_QPS_INIT);
        to.port_num = attr.port.0;
        to.pkey_index = attr.pkey_index;
        to.qp_access_flags = ACCESS;
        self.object.modify(&mut to, TO_INIT)
    }

    fn to_rtr(&mut self, attr: &RtrAttr) -> io::Result<()> {
        let mut to = empty_attr(ibv_qp_state::IBV_QPS_RTR);
        to.path_mtu = attr.path_mtu.verbs();
        to.dest_qp_num = attr.dest_qpn.get();
        to.rq_psn = attr.rq_psn.get();
        to.max_dest_rd_atomic = attr.max_dest_rd_atomic;
        to.min_rnr_timer = attr.min_rnr_timer;
        to.ah_attr = address(attr)?;
        self.object.modify(&mut to, TO_RTR)
    }

    fn to_rts(&mut self, attr: &RtsAttr) -> io::Result<()> {
        let mut to = empty_attr(ibv_qp_state::IBV_QPS_RTS);
        to.timeout = attr.timeout;
        to.retry_cnt = attr.retry_cnt;
        to.rnr_retry = attr.rnr_retry;
        to.sq_psn = attr.sq_psn.get();
        to.max_rd_atomic = attr.max_rd_atomic;
        self.object.modify(&mut to, TO_RTS)
    }

    fn split(self: Box<Self>) -> (Box<dyn PostQp>, Box<dyn AdminQp>) {
        let post = VerbsPost::new(Arc::clone(&self.object), self.depth, self.max_inline);
        (Box::new(post), Box::new(VerbsAdmin { object: self.object }))
    }
}

/// Where packets go. A global route always: RoCE needs one, InfiniBand takes one, and stock peers send one.
fn address(attr: &RtrAttr) -> io::Result<sys::ibv_ah_attr> {
    let sgid_index = u8::try_from(attr.sgid_index.0).map_err(|_| invalid("verbs takes GID indices up to 255"))?;
    Ok(sys::ibv_ah_attr {
        grh: sys::ibv_global_route {
            dgid: sys::ibv_gid { raw: attr.dest_gid.0 },
            flow_label: 0,
            sgid_index,
            hop_limit: attr.hop_limit,
            traffic_class: attr.traffic_class,
        },
        dlid: attr.dest_lid.0,
        sl: attr.service_level,
        src_path_bits: 0,
        static_rate: 0,
        is_global: 1,
        port_num: attr.port.0,
    })
}

/// Control's half.
struct VerbsAdmin {
    object: Arc<QpObject>,
}

impl AdminQp for VerbsAdmin {
    fn qpn(&self) -> Qpn {
        self.object.qpn()
    }

    fn to_error(&mut self) -> io::Result<()> {
        // Any state to ERR, and ERR to ERR, is allowed (ibv_modify_qp(3)).
        self.object.modify(&mut empty_attr(ibv_qp_state::IBV_QPS_ERR), mask::IBV_QP_STATE.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::{Gid, GidIndex, Lid, Mtu, PortNum, RqPsn};

    const RTR: RtrAttr = RtrAttr {
        path_mtu: Mtu::B4096,
        dest_qpn: match Qpn::new(17) {
            Some(qpn) => qpn,
            None => unreachable!(),
        },
        rq_psn: RqPsn::STOCK,
        max_dest_rd_atomic: 16,
        min_rnr_timer: 12,
        dest_gid: Gid([7; 16]),
        dest_lid: Lid(3),
        sgid_index: GidIndex(1),
        hop_limit: 16,
        traffic_class: 106,
        service_level: 5,
        port: PortNum(2),
    };

    #[test]
    fn the_address_is_global_and_complete() {
        let to = address(&RTR).unwrap();
        assert_eq!((to.is_global, to.dlid, to.sl, to.port_num), (1, 3, 5, 2));
        assert_eq!((to.grh.sgid_index, to.grh.hop_limit, to.grh.traffic_class), (1, 16, 106));
        // SAFETY: both members of the union are 16 plain bytes.
        assert_eq!(unsafe { to.grh.dgid.raw }, [7; 16]);
    }

    #[test]
    fn a_gid_index_verbs_cannot_carry_is_refused_not_cut() {
        let far = RtrAttr { sgid_index: GidIndex(257), ..RTR };
        assert_eq!(address(&far).err().map(|e| e.kind()), Some(io::ErrorKind::InvalidInput));
    }
}
