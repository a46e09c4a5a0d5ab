//! Other nodes' pages: find the longest prefix that is there, and READ it, without the owner's doing.

use std::time::Duration;

use moonrail::{Engine, Region, Segment, Transfer};

use crate::layout::{BUCKET, Bucket, Key, PAGE_HEAD, Shape, proves};

/// For one batch. A peer that does not answer within this is as good as gone.
const WITHIN: Duration = Duration::from_secs(5);

/// One peer's memory.
pub(crate) struct Peer {
    segment: Segment,
    base: u64,
    shape: Shape,
}

/// What was found of a prompt.
pub(crate) struct Found {
    /// Pages from the first on, that are here and proven.
    pub(crate) pages: usize,
    /// Pages that the index named and that were others by the time they were read.
    pub(crate) overtaken: usize,
}

/// Reads from peers into memory of its own. Of one thread.
pub(crate) struct Reader<'a> {
    engine: &'a Engine,
    /// Buckets, then pages.
    scratch: Region,
    most: usize,
    page: u64,
}

impl<'a> Reader<'a> {
    /// For prompts of at most `most` pages of `page` bytes.
    pub(crate) fn new(engine: &'a Engine, most: usize, page: u64) -> Result<Self, Box<dyn std::error::Error>> {
        let bytes = most as u64 * (BUCKET + PAGE_HEAD + page);
        Ok(Self { engine, scratch: engine.allocate(bytes as usize, "*")?, most, page })
    }

    /// Opens a peer, and reads what its memory looks like.
    pub(crate) fn open(&self, name: &str) -> Result<Peer, Box<dyn std::error::Error>> {
        let segment = self.engine.open_segment(name)?;
        let base = segment.buffers().first().ok_or("it offers nothing yet")?.addr;
        self.engine.submit(&segment, &[Transfer::read_into(&self.scratch, 0, base, 16)])?.wait(WITHIN)?;
        let mut head = [0; 16];
        self.scratch.read(0, &mut head)?;
        let shape = Shape::decode(&head).ok_or("it offers something else")?;
        if shape.page != self.page {
            return Err(format!("its pages have {} bytes, ours {}", shape.page, self.page).into());
        }
        Ok(Peer { segment, base, shape })
    }

    /// Looks `keys` up at `peer`, all in one batch of small READs, and READs the pages of the longest prefix in a second one.
    pub(crate) fn get(&self, peer: &Peer, keys: &[Key]) -> Result<Found, Box<dyn std::error::Error>> {
        let keys = &keys[..keys.len().min(self.most)];
        let look_up: Vec<_> = (0u64..)
            .zip(keys)
            .map(|(at, key)| {
                Transfer::read_into(&self.scratch, at * BUCKET, peer.base + peer.shape.bucket_at(*key), BUCKET)
            })
            .collect();
        self.engine.submit(&peer.segment, &look_up)?.wait(WITHIN)?;
        let mut buckets = vec![0; keys.len() * BUCKET as usize];
        self.scratch.read(0, &mut buckets)?;
        let named = buckets.chunks_exact(BUCKET as usize).zip(keys).map_while(|(bucket, key)| {
            let page = Bucket::decode(bucket).find(*key)?;
            (page < peer.shape.pages).then_some(page)
        });
        let whole = PAGE_HEAD + self.page;
        let read: Vec<_> = (0u64..)
            .zip(named)
            .map(|(at, page)| {
                let remote = peer.base + peer.shape.page_at(page);
                Transfer::read_into(&self.scratch, self.pages_at() + at * whole, remote, whole)
            })
            .collect();
        if read.is_empty() {
            return Ok(Found { pages: 0, overtaken: 0 });
        }
        self.engine.submit(&peer.segment, &read)?.wait(WITHIN)?;
        let mut page = vec![0; whole as usize];
        for (at, key) in keys[..read.len()].iter().enumerate() {
            self.scratch.read(self.pages_at() + at as u64 * whole, &mut page)?;
            if !proves(*key, &page) {
                return Ok(Found { pages: at, overtaken: read.len() - at });
            }
        }
        Ok(Found { pages: read.len(), overtaken: 0 })
    }

    /// Page `at` of what was found last, without its head.
    pub(crate) fn page(&self, at: usize, into: &mut [u8]) -> Result<(), Box<dyn std::error::Error>> {
        Ok(self.scratch.read(self.pages_at() + at as u64 * (PAGE_HEAD + self.page) + PAGE_HEAD, into)?)
    }

    fn pages_at(&self) -> u64 {
        self.most as u64 * BUCKET
    }
}
