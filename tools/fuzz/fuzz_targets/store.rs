//! Keys and values of a store; names that are addresses.
#![no_main]

#[path = "../../../control/tests/laws/mod.rs"]
mod laws;

libfuzzer_sys::fuzz_target!(|data: &[u8]| laws::store(data));
