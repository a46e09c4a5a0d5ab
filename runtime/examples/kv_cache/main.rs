//! A KV cache for LLM blocks: nodes keep pages of keys and values, a worker reads the longest prefix of a prompt that any node has.
//!
//! ```text
//!   node a, node b (processes)                         worker (this process)
//!   ┌─────────────────────────────┐  READ buckets  ┌──────────────────────────────────────────┐
//!   │ Store: index, pages, LRU    │◀───────────────│ Reader: prompt → keys → index → page list │
//!   │ prefill: put, evict         │  READ pages    │ every byte checked, times in a histogram  │
//!   └─────────────────────────────┘◀───────────────└──────────────────────────────────────────┘
//! ```
//! A page's key is the hash of all tokens before its end, so prompts that begin alike share pages. READs are one-sided: the owner
//! neither knows nor waits; it may evict a page while it is read, and the reader sees that (`layout.rs`). In the middle one node is
//! killed: what it had is read elsewhere, or is missing; nothing is wrong, and nobody hangs.
//!
//! `cargo run --release -p moonrail --example kv_cache [-- SECONDS]`

mod layout;
mod reader;
mod store;

use std::error::Error;
use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;
use moonrail::{Engine, Level};

use layout::{Key, Shape, mix};
use reader::{Peer, Reader};
use store::Store;

/// A page: 16 tokens of a small model's keys and values.
const SHAPE: Shape = Shape { page: 64 << 10, pages: 1024 };
const TOKENS_A_PAGE: usize = 16;
/// Prompts begin with one of these.
const SYSTEM_PROMPTS: u64 = 40;
/// Pages of the longest prompt.
const MOST_PAGES: usize = 32;
/// Makes this program a node.
const AS_NODE: &str = "KV_CACHE_NODE";

fn main() -> Result<(), Box<dyn Error>> {
    if std::env::var_os(AS_NODE).is_some() {
        return node();
    }
    let word = std::env::args().nth(1).unwrap_or_else(|| "6".to_owned());
    match word.parse().ok().and_then(|seconds| Duration::try_from_secs_f64(seconds).ok()) {
        Some(span) if !span.is_zero() => worker(span),
        _ => Err(format!("{word:?} is no time: usage: kv_cache [SECONDS], 6 unless given").into()),
    }
}

/// Prompt number `number`: tokens of a system prompt that many share, then its own.
fn prompt(number: u64) -> Vec<u32> {
    let system = mix(number) % SYSTEM_PROMPTS;
    let shared = (0..12 * TOKENS_A_PAGE as u64).map(|at| mix(system * 7919 + at) as u32);
    let own = (0..(mix(number + 1) % 20 + 1) * TOKENS_A_PAGE as u64).map(|at| mix(number * 104_729 + at) as u32);
    shared.chain(own).collect()
}

/// Keys of the pages of a prompt.
fn keys(tokens: &[u32]) -> Vec<Key> {
    let mut key = Key::ROOT;
    let next = |page| {
        key = key.then(page);
        key
    };
    tokens.chunks_exact(TOKENS_A_PAGE).map(next).collect()
}

/// What a model would compute for a page: here something that can be checked anywhere.
fn compute(key: Key, page: &mut [u8]) {
    for (at, chunk) in page.chunks_exact_mut(8).enumerate() {
        chunk.copy_from_slice(&key.0.wrapping_add(at as u64).wrapping_mul(0x2545_f491_4f6c_dd1d).to_le_bytes());
    }
}

fn engine() -> Result<Engine, Box<dyn Error>> {
    Ok(Engine::builder().name("127.0.0.1").log_level(Level::Error).build()?)
}

/// Prefills prompts until its input is closed, as that of a child is when its parent ends.
fn node() -> Result<(), Box<dyn Error>> {
    let engine = engine()?;
    let mut store = Store::new(&engine, SHAPE)?;
    println!("{}", engine.name());
    std::thread::spawn(|| {
        let _ = std::io::stdin().read_line(&mut String::new());
        std::process::exit(0);
    });
    let mut page = vec![0; SHAPE.page as usize];
    for number in 0u64.. {
        // Prompts come again; new ones come too.
        let number = number / 8 + mix(number) % 64;
        for key in keys(&prompt(number)) {
            compute(key, &mut page);
            store.put(key, &page)?;
        }
        if number.is_multiple_of(64) && store.evicted > 0 {
            // Enough of a hurry: the worker shall have something to find.
            std::thread::sleep(Duration::from_millis(1));
        }
        assert!(store.len() as u64 <= SHAPE.pages);
    }
    Ok(())
}

/// A node process, ended with this one.
struct Node {
    child: Child,
    name: String,
    peer: Option<Peer>,
    lost_at: Option<Instant>,
}

impl Node {
    fn start() -> Result<Self, Box<dyn Error>> {
        let mut command = Command::new(std::env::current_exe()?);
        let mut child = command.env(AS_NODE, "1").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        let mut name = String::new();
        BufReader::new(child.stdout.take().ok_or("no output")?).read_line(&mut name)?;
        if name.is_empty() {
            return Err(format!("a node did not start: {}", child.wait()?).into());
        }
        Ok(Self { child, name: name.trim().to_owned(), peer: None, lost_at: None })
    }

    /// Opens it if it is not; one that was lost is tried again once a second.
    fn peer(&mut self, reader: &Reader<'_>) -> Option<&Peer> {
        let rest = self.lost_at.is_some_and(|at| at.elapsed() < Duration::from_secs(1));
        if self.peer.is_none() && !rest {
            self.peer = reader.open(&self.name).ok();
            self.lost_at = self.peer.is_none().then(Instant::now);
        }
        self.peer.as_ref()
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What was read, and how long it took.
struct Tally {
    prompts: u64,
    pages: u64,
    wanted: u64,
    overtaken: u64,
    errors: u64,
    times: Histogram<u64>,
}

impl Tally {
    fn print(&self, what: &str, span: Duration) {
        let us = |quantile| self.times.value_at_quantile(quantile) as f64 / 1000.0;
        println!(
            "{what}: {} prompts, {} of {} pages found, {:.2} GB/s; a get took {:.0} us (p50), {:.0} (p99), {:.0} (max); {} pages \
             evicted while they were read, {} reads failed",
            self.prompts,
            self.pages,
            self.wanted,
            (self.pages * SHAPE.page) as f64 / span.as_secs_f64() / 1e9,
            us(0.5),
            us(0.99),
            self.times.max() as f64 / 1000.0,
            self.overtaken,
            self.errors,
        );
    }
}

fn worker(span: Duration) -> Result<(), Box<dyn Error>> {
    let engine = engine()?;
    let reader = Reader::new(&engine, MOST_PAGES, SHAPE.page)?;
    let mut nodes = vec![Node::start()?, Node::start()?];
    println!("two nodes: {}, {}", nodes[0].name, nodes[1].name);
    std::thread::sleep(Duration::from_millis(500));
    read(&reader, &mut nodes, span / 2)?.print("both alive", span / 2);
    nodes[0].child.kill()?;
    println!("{} is killed", nodes[0].name);
    read(&reader, &mut nodes, span / 2)?.print("one dead  ", span / 2);
    println!("no wrong byte");
    Ok(())
}

/// Gets prompts for so long; every byte of what is found is checked.
fn read(reader: &Reader<'_>, nodes: &mut [Node], span: Duration) -> Result<Tally, Box<dyn Error>> {
    let times = Histogram::new_with_bounds(1, 60_000_000_000, 3)?;
    let mut tally = Tally { prompts: 0, pages: 0, wanted: 0, overtaken: 0, errors: 0, times };
    let (mut page, mut right) = (vec![0; SHAPE.page as usize], vec![0; SHAPE.page as usize]);
    let began = Instant::now();
    while began.elapsed() < span {
        let wanted = keys(&prompt(mix(tally.prompts) % 256));
        let mut have = 0;
        for node in nodes.iter_mut() {
            let Some(peer) = node.peer(reader) else { continue };
            let from = Instant::now();
            match reader.get(peer, &wanted) {
                Ok(found) => {
                    tally.times.record(from.elapsed().as_nanos() as u64)?;
                    tally.overtaken += found.overtaken as u64;
                    for (at, key) in wanted[..found.pages].iter().enumerate() {
                        reader.page(at, &mut page)?;
                        compute(*key, &mut right);
                        if page != right {
                            return Err(format!("wrong bytes in page {at} of prompt {}", tally.prompts).into());
                        }
                    }
                    have = found.pages.max(have);
                }
                // It is gone, or as good as gone; what it had is looked for elsewhere.
                Err(_) => {
                    tally.errors += 1;
                    (node.peer, node.lost_at) = (None, Some(Instant::now()));
                }
            }
            if have == wanted.len() {
                break;
            }
        }
        tally.prompts += 1;
        tally.pages += have as u64;
        tally.wanted += wanted.len() as u64;
    }
    Ok(tally)
}
