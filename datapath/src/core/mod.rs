//! One polling core.

pub mod port;
