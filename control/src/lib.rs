//! Placeholder.
pub mod gid;
pub mod metadata;
pub mod wire;
