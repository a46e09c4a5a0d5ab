//! Placeholder.
pub mod nic;
pub mod region;
pub mod units;
