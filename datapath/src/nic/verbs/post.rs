//! Posting: what a core calls for every chain. No allocation, no lock of ours, no system call of ours.
//!
//! (Soft-RoCE's doorbell is a write(2) per ibv_post_send, one more reason to post chains.)

use std::cell::Cell;
use std::ffi::c_int;
use std::marker::PhantomData;
use std::mem::MaybeUninit;
use std::ptr::{self, NonNull};
use std::sync::Arc;

use rdma_core_sys as sys;
use sys::{ibv_send_flags as flags, ibv_wr_opcode};

use super::qp::QpObject;
use crate::nic::{Op, PostQp, Posted, WorkRequest};
use crate::units::Qpn;

/// A work request and its only scatter/gather entry, linked once and filled again for each post.
#[repr(C)]
struct Template {
    wr: sys::ibv_send_wr,
    sge: sys::ibv_sge,
}

/// Work requests linked into one list. Constant after construction, except inside a post: each request's `next` (the
/// template after it) and `sg_list` (its own entry).
struct Templates {
    /// Owned. Kept as a raw pointer, because the templates hold raw pointers to each other.
    first: NonNull<Template>,
    len: usize,
}

impl Templates {
    fn new(len: u32) -> Self {
        // SAFETY: all fields are integers, raw pointers and unions of those: zeroes are valid.
        let blank = || -> Template { unsafe { MaybeUninit::zeroed().assume_init() } };
        let boxed: Box<[Template]> = (0..len).map(|_| blank()).collect();
        let len = boxed.len();
        let first = NonNull::from(Box::leak(boxed)).cast::<Template>();
        for i in 0..len {
            // SAFETY: i < len, and nobody else knows the memory yet. The pointers stored stay valid, since the
            // allocation does not move until `drop`.
            unsafe {
                let this = first.as_ptr().add(i);
                (*this).wr.sg_list = &raw mut (*this).sge;
                if i + 1 < len {
                    (*this).wr.next = first.as_ptr().add(i + 1).cast(); // `wr` comes first in a template
                }
            }
        }
        Self { first, len }
    }

    /// Fills one template per request of `chain` (1 to `len` of them), posts them as one list by `post`, and says how
    /// many the device took.
    ///
    /// `post` gets the head of the list and where to put `bad_wr`, and returns what ibv_post_send(3) does.
    fn post(
        &mut self,
        chain: &[WorkRequest],
        post: impl FnOnce(*mut sys::ibv_send_wr, &mut *mut sys::ibv_send_wr) -> c_int,
    ) -> Posted {
        debug_assert!((1..=self.len).contains(&chain.len()));
        let base = self.first.as_ptr();
        for (i, request) in chain.iter().enumerate().take(self.len) {
            // SAFETY: i < len; `&mut self` makes us the only user of the memory.
            fill(unsafe { &mut *base.add(i) }, request);
        }
        // SAFETY: chain.len() is 1 to len, so the index is in bounds.
        let last = unsafe { &raw mut (*base.add(chain.len() - 1)).wr.next };
        // SAFETY: points into the templates, which live. The list is cut after the chain while it is posted.
        let behind = unsafe { last.replace(ptr::null_mut()) };
        let mut bad = ptr::null_mut();
        let code = post(base.cast(), &mut bad);
        // SAFETY: as above.
        unsafe { last.write(behind) };
        match code {
            0 => Posted { accepted: chain.len(), error: None },
            -1 => Posted { accepted: self.accepted(bad, chain.len()), error: Some(errno()) },
            code => Posted { accepted: self.accepted(bad, chain.len()), error: Some(code.saturating_abs()) },
        }
    }

    /// How many of `posted` requests were taken when `bad` was refused.
    ///
    /// A `bad` that names none of them counts as *all taken*: Soft-RoCE leaves it null when the requests are in its
    /// queue and only the doorbell failed. Taken too many, we wait for completions and then destroy the queue pair;
    /// taken too few, a request that still runs would be posted again elsewhere.
    fn accepted(&self, bad: *mut sys::ibv_send_wr, posted: usize) -> usize {
        let offset = bad.addr().wrapping_sub(self.first.addr().get());
        let index = offset / size_of::<Template>();
        if offset.is_multiple_of(size_of::<Template>()) && index < posted { index } else { posted }
    }
}

fn errno() -> i32 {
    match std::io::Error::last_os_error().raw_os_error() {
        Some(0) | None => libc::EIO,
        Some(code) => code,
    }
}

fn fill(template: &mut Template, request: &WorkRequest) {
    debug_assert!(request.len <= 1 << 31, "a request of 0 to 2^31 bytes");
    // A request of no bytes, the trial of a rail, has no entry, so no key of ours is looked at.
    template.wr.num_sge = i32::from(request.len > 0);
    let (opcode, inline) = match request.op {
        Op::Write => (ibv_wr_opcode::IBV_WR_RDMA_WRITE, request.inline),
        Op::Read => (ibv_wr_opcode::IBV_WR_RDMA_READ, false), // there is nothing to carry
    };
    template.wr.wr_id = request.wr_id.to_bits();
    template.wr.opcode = opcode;
    template.wr.send_flags = if request.signaled { flags::IBV_SEND_SIGNALED.0 } else { 0 }
        | if inline { flags::IBV_SEND_INLINE.0 } else { 0 };
    template.wr.wr.rdma = sys::rdma_t { remote_addr: request.remote.0, rkey: request.rkey.0 };
    template.sge = sys::ibv_sge { addr: request.local, length: request.len, lkey: request.lkey.0 };
}

impl Drop for Templates {
    fn drop(&mut self) {
        let slice = NonNull::slice_from_raw_parts(self.first, self.len);
        // SAFETY: leaked from a box of exactly this slice in `new`, and freed once.
        drop(unsafe { Box::from_raw(slice.as_ptr()) });
    }
}

/// The posting half. `Send`, since it moves to its core, but not `Sync`: posting is for one thread at a time.
pub(super) struct VerbsPost {
    // Declared before the templates: the queue pair is gone before the memory it was posted from.
    object: Arc<QpObject>,
    templates: Templates,
    max_inline: u32,
    one_thread: PhantomData<Cell<()>>,
}

// SAFETY: the templates belong to this value alone, and nothing else points into them outside of a post.
unsafe impl Send for VerbsPost {}

impl VerbsPost {
    pub(super) fn new(object: Arc<QpObject>, depth: u32, max_inline: u32) -> Self {
        Self { object, templates: Templates::new(depth), max_inline, one_thread: PhantomData }
    }
}

impl PostQp for VerbsPost {
    fn qpn(&self) -> Qpn {
        self.object.qpn()
    }

    fn depth(&self) -> u32 {
        self.templates.len as u32
    }

    fn max_inline(&self) -> u32 {
        self.max_inline
    }

    fn post(&mut self, chain: &[WorkRequest]) -> Posted {
        let mut accepted = 0;
        // One turn of the loop, unless somebody posts more than the send queue holds.
        for part in chain.chunks(self.templates.len) {
            let qp = self.object.as_ptr();
            // SAFETY: the queue pair lives. The list lies in our templates, and the provider copies it into its send
            // queue before it returns. The bytes it points at stay registered: the core's Arc of the Work holds their
            // region until the completion.
            let posted = self.templates.post(part, |list, bad| unsafe { sys::ibv_post_send(qp, list, bad) });
            accepted += posted.accepted;
            if posted.error.is_some() {
                return Posted { accepted, error: posted.error };
            }
        }
        Posted { accepted, error: None }
    }

    fn reads_are_proven(&self) -> bool {
        !self.object.cuts_reads()
    }

    fn is_in_error(&self) -> bool {
        self.object.is_in_error()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::{Lkey, RemoteAddr, Rkey, WrId};

    fn request(sequence: u32) -> WorkRequest {
        WorkRequest {
            wr_id: WrId { slot: 1, generation: 2, sequence },
            op: Op::Write,
            local: 0x1000 + u64::from(sequence),
            lkey: Lkey(3),
            len: 64,
            remote: RemoteAddr(0x9000),
            rkey: Rkey(4),
            signaled: sequence.is_multiple_of(2),
            inline: sequence == 0,
        }
    }

    fn chain(len: u32) -> Vec<WorkRequest> {
        (0..len).map(request).collect()
    }

    /// What a provider sees: it walks the list, and refuses the request `refuse`.
    fn walk(
        mut list: *mut sys::ibv_send_wr,
        bad: &mut *mut sys::ibv_send_wr,
        refuse: Option<u32>,
        seen: &mut Vec<(u32, u64, u32)>,
    ) -> c_int {
        while !list.is_null() {
            // SAFETY: a list that `post` made, of templates that live.
            let (wr, sge) = unsafe { (&*list, &*(*list).sg_list) };
            let sequence = WrId::from_bits(wr.wr_id).sequence;
            if Some(sequence) == refuse {
                *bad = list;
                return libc::ENOMEM;
            }
            seen.push((sequence, sge.addr, wr.send_flags));
            list = wr.next;
        }
        0
    }

    #[test]
    fn a_device_sees_exactly_the_chain_each_time() {
        let mut templates = Templates::new(8);
        for len in [1, 8, 3, 8, 1] {
            let mut seen = Vec::new();
            let posted = templates.post(&chain(len), |list, bad| walk(list, bad, None, &mut seen));
            assert_eq!(posted, Posted { accepted: len as usize, error: None });
            let asked = |i: u32| if i.is_multiple_of(2) { 2 } else { 0 } | if i == 0 { 8 } else { 0 };
            let expected: Vec<_> = (0..len).map(|i| (i, 0x1000 + u64::from(i), asked(i))).collect();
            assert_eq!(seen, expected);
        }
    }

    #[test]
    fn a_refused_request_is_counted_by_its_place() {
        let mut templates = Templates::new(8);
        for refuse in 0..8 {
            let posted = templates.post(&chain(8), |list, bad| walk(list, bad, Some(refuse), &mut Vec::new()));
            assert_eq!(posted, Posted { accepted: refuse as usize, error: Some(libc::ENOMEM) });
        }
    }

    #[test]
    fn a_refusal_that_names_no_request_of_the_chain_counts_as_taken() {
        let mut templates = Templates::new(8);
        // (past) Soft-RoCE put all in its queue, then its doorbell failed. expect: all outstanding, none posted twice.
        let posted = templates.post(&chain(5), |_, _| libc::EIO);
        assert_eq!(posted, Posted { accepted: 5, error: Some(libc::EIO) });
        let behind = templates.first.as_ptr().wrapping_add(5).cast();
        let posted = templates.post(&chain(5), |_, bad| {
            *bad = behind;
            -libc::EIO
        });
        assert_eq!(posted, Posted { accepted: 5, error: Some(libc::EIO) });
    }

    #[test]
    fn a_read_never_asks_to_be_inline() {
        let mut templates = Templates::new(1);
        let read = WorkRequest { op: Op::Read, inline: true, ..request(1) };
        templates.post(&[read], |list, _| {
            // SAFETY: the head of the list.
            let wr = unsafe { &*list };
            assert_eq!((wr.opcode, wr.send_flags), (ibv_wr_opcode::IBV_WR_RDMA_READ, 0));
            0
        });
    }

    #[test]
    fn a_request_of_no_bytes_has_no_entry_and_the_next_one_has_its_own_again() {
        let mut templates = Templates::new(1);
        for (len, entries) in [(64, 1), (0, 0), (64, 1)] {
            templates.post(&[WorkRequest { len, ..request(1) }], |list, _| {
                // SAFETY: the head of the list.
                assert_eq!(unsafe { (*list).num_sge }, entries);
                0
            });
        }
    }
}
