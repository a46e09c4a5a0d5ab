//! The server's side of the TCP data protocol, fed with anything.
#![no_main]

#[path = "../src/tcp_server.rs"]
mod tcp_server;

libfuzzer_sys::fuzz_target!(|input: &[u8]| tcp_server::drive(input));
