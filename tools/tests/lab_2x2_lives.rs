//! Lives of connections and of processes, on real verbs: rails that are connected, evicted and connected again leave nothing
//! behind, and a forked child has nothing of its parent's.
//!
//! MOONRAIL_CYCLES sets how many rails are connected again in all (`cargo xtask soak cycles`).

mod lab_support;

#[path = "lab_2x2_lives/cycles.rs"]
mod cycles;
#[path = "lab_2x2_lives/fork.rs"]
mod fork;
