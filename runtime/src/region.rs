//! Memory of this node that takes part in transfers.

use std::sync::Arc;

use moonrail_datapath::region::{Memory, OutOfRange};

/// Memory registered on every NIC of the engine. Clones are the same region.
///
/// Peers write into it at any time (if it is open to them), so it is read and written by copies: a copy that races with
/// a peer's WRITE sees any mixture of old and new bytes. Dropping the handle unregisters nothing: the region stays
/// registered until [`crate::Engine::unregister`] or the end of the engine. After that the handle still reads and
/// writes the memory, but no NIC does. Any thread may use it.
#[derive(Clone, Debug)]
pub struct Region {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    memory: Arc<Memory>,
    location: String,
    remote: bool,
}

impl Region {
    pub(crate) fn new(memory: Arc<Memory>, location: String, remote: bool) -> Self {
        Self { inner: Arc::new(Inner { memory, location, remote }) }
    }

    /// Address of the first byte: what transfers and peers use.
    pub fn addr(&self) -> u64 {
        self.inner.memory.addr()
    }

    /// Bytes.
    pub fn len(&self) -> u64 {
        self.inner.memory.len()
    }

    /// Never true: a region has at least one byte.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Where it lies: `cpu:0`, `*` for unknown, or what was given.
    pub fn location(&self) -> &str {
        &self.inner.location
    }

    /// Whether peers may READ and WRITE it.
    pub fn is_remote(&self) -> bool {
        self.inner.remote
    }

    /// Copies bytes out, from `offset` on.
    pub fn read(&self, offset: u64, into: &mut [u8]) -> Result<(), OutOfRange> {
        self.memory().read(offset, into)
    }

    /// Copies bytes in, from `offset` on.
    pub fn write(&self, offset: u64, from: &[u8]) -> Result<(), OutOfRange> {
        self.memory().write(offset, from)
    }

    /// The memory itself.
    pub fn memory(&self) -> &Arc<Memory> {
        &self.inner.memory
    }
}
