//! A batch is a future: many in flight from one task, on tokio or any other executor.
//!
//! `cargo run -p moonrail --example async`

use std::time::Duration;

use moonrail::{Engine, Transfer};

const BLOCK: u64 = 64 << 10;
const BLOCKS: u64 = 64;

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let store = Engine::builder().name("127.0.0.1").build()?;
    let offered = store.allocate((BLOCK * BLOCKS) as usize, "*")?;
    let worker = Engine::builder().name("127.0.0.1").build()?;
    let memory = worker.allocate((BLOCK * BLOCKS) as usize, "*")?;
    // Opening asks the peer, and may block: not a thing for the executor's thread in a program that has more to do.
    let peer = worker.open_segment(store.name())?;
    let remote = peer.buffers()[0].addr;

    for block in 0..BLOCKS {
        offered.write(block * BLOCK, &vec![block as u8; BLOCK as usize])?;
    }
    // One batch for each block, all on their way before the first is awaited.
    let mut batches = Vec::new();
    for block in 0..BLOCKS {
        let read = Transfer::read_into(&memory, block * BLOCK, remote + block * BLOCK, BLOCK);
        batches.push(worker.batch().add(&peer, read).deadline(Duration::from_secs(5)).submit()?);
    }
    for batch in batches {
        batch.await?;
    }

    let mut bytes = vec![0; BLOCK as usize];
    for block in 0..BLOCKS {
        memory.read(block * BLOCK, &mut bytes)?;
        assert!(bytes.iter().all(|byte| *byte == block as u8), "block {block}");
    }
    println!("{BLOCKS} blocks of {} KiB are here", BLOCK >> 10);
    Ok(())
}
