//! What a node's memory looks like to others: an index that can be read by one READ of 64 bytes, and pages that prove themselves.
//!
//! ```text
//!   0            HEAD         HEAD + buckets × 64                          
//!   ┌────────────┬────────────┬─────────────────────┬─────────────────────┐
//!   │ shape      │ buckets    │ page 0: head, bytes │ page 1 …            │
//!   └────────────┴────────────┴─────────────────────┴─────────────────────┘
//!     a bucket: four entries of (key, place of the page)
//! ```
//! Nobody asks the owner: it may put another page where a reader is reading. A page's head therefore holds its key and a sum over
//! key and bytes; whoever read something else than what it looked for sees that, and counts it as not there.

/// The shape stands here.
pub(crate) const HEAD: u64 = 64;
/// Bytes of a bucket of the index.
pub(crate) const BUCKET: u64 = 64;
/// Entries in one.
pub(crate) const ENTRIES: usize = 4;
/// Bytes before a page's own.
pub(crate) const PAGE_HEAD: u64 = 16;

/// A page's key: the hash of all tokens up to its end, so that equal keys mean equal prefixes.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(crate) struct Key(pub(crate) u64);

impl Key {
    /// Before the first token.
    pub(crate) const ROOT: Self = Self(0x9e37_79b9_7f4a_7c15);

    /// Of the prefix that goes on with `tokens`.
    pub(crate) fn then(self, tokens: &[u32]) -> Self {
        Self(tokens.iter().fold(self.0, |hash, token| mix(hash ^ u64::from(*token))).max(1))
    }
}

/// SplitMix64's finalizer.
pub(crate) fn mix(value: u64) -> u64 {
    let value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}

/// How large everything is; the same for a node and whoever reads it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Shape {
    /// Bytes of a page without its head; a multiple of 8.
    pub(crate) page: u64,
    /// How many.
    pub(crate) pages: u64,
}

impl Shape {
    fn buckets(self) -> u64 {
        // Half full with every page in it.
        (self.pages / 2).next_power_of_two()
    }

    /// Bytes of the whole.
    pub(crate) fn bytes(self) -> u64 {
        self.page_at(self.pages)
    }

    /// Where the bucket of `key` is.
    pub(crate) fn bucket_at(self, key: Key) -> u64 {
        HEAD + mix(key.0) % self.buckets() * BUCKET
    }

    /// Where page `index` is, with its head.
    pub(crate) fn page_at(self, index: u64) -> u64 {
        HEAD + self.buckets() * BUCKET + index * (PAGE_HEAD + self.page)
    }

    /// As it stands at the beginning of the memory.
    pub(crate) fn encode(self) -> [u8; 16] {
        words([self.page, self.pages])
    }

    /// What was read there; `None` if that is nothing.
    pub(crate) fn decode(bytes: &[u8; 16]) -> Option<Self> {
        let (page, pages) = (word(bytes, 0), word(bytes, 1));
        let sensible = page > 0 && page % 8 == 0 && page <= 1 << 30 && pages > 0 && pages <= 1 << 32;
        sensible.then_some(Self { page, pages })
    }
}

/// A bucket as it is read or written.
#[derive(Clone, Copy, Default)]
pub(crate) struct Bucket(pub(crate) [(u64, u64); ENTRIES]);

impl Bucket {
    /// Where the page of `key` is.
    pub(crate) fn find(&self, key: Key) -> Option<u64> {
        self.0.iter().find(|(of, _)| *of == key.0).map(|(_, page)| *page)
    }

    /// Its 64 bytes.
    pub(crate) fn encode(&self) -> [u8; BUCKET as usize] {
        let mut all = [0; 2 * ENTRIES];
        for (at, (key, page)) in self.0.iter().enumerate() {
            (all[2 * at], all[2 * at + 1]) = (*key, *page);
        }
        words(all)
    }

    /// From its 64 bytes.
    pub(crate) fn decode(bytes: &[u8]) -> Self {
        Self(std::array::from_fn(|at| (word(bytes, 2 * at), word(bytes, 2 * at + 1))))
    }
}

/// The head of a page that holds `bytes` under `key`.
pub(crate) fn page_head(key: Key, bytes: &[u8]) -> [u8; PAGE_HEAD as usize] {
    words([key.0, sum(key, bytes)])
}

/// Whether what was read is the page of `key`, whole.
pub(crate) fn proves(key: Key, page: &[u8]) -> bool {
    let (head, bytes) = page.split_at(PAGE_HEAD as usize);
    word(head, 0) == key.0 && word(head, 1) == sum(key, bytes)
}

/// Four lanes, so that the processor need not wait for one multiplication before the next.
fn sum(key: Key, bytes: &[u8]) -> u64 {
    let mut lanes = [key.0, 1, 2, 3];
    for (at, chunk) in bytes.chunks_exact(8).enumerate() {
        let lane = &mut lanes[at % 4];
        *lane = (*lane ^ word(chunk, 0)).wrapping_mul(0x0000_0100_0000_01b3).rotate_left(23);
    }
    lanes.into_iter().fold(0, |sum, lane| mix(sum ^ lane))
}

fn word(bytes: &[u8], at: usize) -> u64 {
    let mut word = [0; 8];
    word.copy_from_slice(&bytes[8 * at..8 * at + 8]);
    u64::from_le_bytes(word)
}

fn words<const N: usize, const BYTES: usize>(values: [u64; N]) -> [u8; BYTES] {
    let mut bytes = [0; BYTES];
    for (at, value) in values.into_iter().enumerate() {
        bytes[8 * at..8 * at + 8].copy_from_slice(&value.to_le_bytes());
    }
    bytes
}
