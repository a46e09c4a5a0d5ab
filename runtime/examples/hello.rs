//! Two nodes in one process; one reads what the other offers.
//!
//! `cargo run -p moonrail --example hello`

use std::time::Duration;

use moonrail::{Engine, Transfer};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    // Without a metadata server a node is found by its address.
    let store = Engine::builder().name("127.0.0.1").build()?;
    let offered = store.allocate(1 << 20, "*")?;
    offered.write(0, b"hello from the store")?;

    let worker = Engine::builder().name("127.0.0.1").build()?;
    let memory = worker.allocate(1 << 20, "*")?;
    let peer = worker.open_segment(store.name())?;
    let remote = peer.buffers()[0].addr;
    worker.submit(&peer, &[Transfer::read_into(&memory, 0, remote, 20)])?.wait(Duration::from_secs(10))?;

    let mut bytes = [0; 20];
    memory.read(0, &mut bytes)?;
    println!(
        "{} (over {})",
        String::from_utf8_lossy(&bytes),
        peer.fabric().map_or("nothing", |fabric| fabric.as_str())
    );
    Ok(())
}
