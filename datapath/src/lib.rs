//! moonrail's datapath: what one polling core does, and the NICs it does it with.
//!
//! # The life of a slice
//! ```text
//!  transfer ──tile──▶ slices ─┐                       (slice: pure arithmetic, on the submitter's thread)
//!                             ▼
//!                     Work: claim cursor ◀── the same Arc in the ring of every core with a rail (work, core::port)
//!                             │ claim a run: one atomic add
//!                             ▼
//!            core: chain of work requests, one doorbell (core::post) ──▶ NIC (nic::verbs, nic::sim)
//!                             │                                             │ completion
//!        requests in flight: retire up to the completed one (core::reap) ◀──┘
//!               │ done                                        │ error: the first closes the rail's life (core::fault)
//!               ▼                                             ▼
//!            transfer outcome, Work's remaining (settle)    back into the return map, for another rail
//!               │ last one
//!               ▼
//!            batch's word; the Work goes up the event ring, control wakes who sleeps and drops it
//!            (where a caller turns the core, `core/rest.rs`: dropped there, unless somebody sleeps)
//! ```
//! Modules in the order data meets them. Unsafe code lives in [`region`], [`lanes`], `nic::verbs`, `nic::shm` and `nic::tcp`'s
//! gather lists, nowhere else.
#![deny(missing_docs)]

pub mod error;
pub mod lanes;
pub mod limits;
pub mod random;
pub mod units;

pub mod region;
pub mod transfer;

pub mod slice;
mod spaced;

pub mod work;

pub mod core;

pub mod nic;

#[cfg(test)]
#[path = "../tests/explore/mod.rs"]
mod explore;
