//! Placeholder.

pub mod core;
pub mod error;
pub mod limits;
pub mod nic;
pub mod region;
pub mod slice;
pub mod transfer;
pub mod units;
pub mod work;
