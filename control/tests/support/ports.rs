//! Ports of this host that nobody listens on.

use std::net::TcpListener;
use std::sync::Mutex;

/// A port of 127.0.0.1 that was free a moment ago, and that no earlier call of this process was given.
///
/// The kernel draws among all that are free, and a port is free again when this returns: where one is taken as a part of a
/// name only (a node whose metadata a store keeps listens elsewhere), the next draw can bring it once more, and two
/// nodes of a test then have one name.
pub(crate) fn free_port() -> u16 {
    static GIVEN: Mutex<Vec<u16>> = Mutex::new(Vec::new());
    let mut given = GIVEN.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    // All that were drawn stay bound until one is new: so each draw is another one.
    let mut held = Vec::new();
    loop {
        let listener = TcpListener::bind(("127.0.0.1", 0)).expect("a loopback port");
        let port = listener.local_addr().expect("its number").port();
        if !given.contains(&port) {
            given.push(port);
            return port;
        }
        held.push(listener);
    }
}
