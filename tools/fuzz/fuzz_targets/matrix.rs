//! Priority matrices, which people write.
#![no_main]

#[path = "../../../control/tests/laws/mod.rs"]
mod laws;

libfuzzer_sys::fuzz_target!(|data: &[u8]| laws::matrix(data));
