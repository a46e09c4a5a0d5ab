//! What must survive, on real verbs: one fault at a time under verified traffic, faults at random, a device that retries for
//! ever, and late packets after a cancel.
//!
//! Node 0 moves bytes and measures, node 1 is the peer that everything happens to: node 0's QEMU is the network's switch.
//! How much of each is done is set by MOONRAIL_FAULT_SECONDS, MOONRAIL_MIX_SECONDS and MOONRAIL_CANCELS (`cargo xtask soak`
//! does); the usual amounts are for every change. The limits printed as aims are asserted in virtual time, by the
//! simulation: here they are measured, and only what is far from them fails.

mod lab_support;

#[path = "lab_2x2_faults/faults.rs"]
mod faults;
#[path = "lab_2x2_faults/hands.rs"]
mod hands;
#[path = "lab_2x2_faults/late.rs"]
mod late;
#[path = "lab_2x2_faults/table.rs"]
mod table;
#[path = "lab_2x2_faults/watch.rs"]
mod watch;
