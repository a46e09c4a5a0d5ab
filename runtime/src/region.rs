//! Memory of this node that takes part in transfers.

use std::sync::Arc;

use moonrail_datapath::region::{Memory, OutOfRange, Region as Registered};

/// Memory registered on every NIC of the engine. Clones are the same region.
///
/// Peers write into it at any time (if it is remote accessible), so it is read and written by copies: a copy that races
/// with a peer's WRITE sees any mixture of old and new bytes. Dropping the handle unregisters nothing: the region stays
/// registered until [`crate::Engine::unregister`] or the end of the engine. Any thread may use it.
#[derive(Clone)]
pub struct Region {
    pub(crate) inner: Arc<Registered>,
}

impl Region {
    /// Address of the first byte: what transfers and peers use.
    pub fn addr(&self) -> u64 {
        self.inner.memory().addr()
    }

    /// Bytes.
    pub fn len(&self) -> u64 {
        self.inner.memory().len()
    }

    /// Never true: a region has at least one byte.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Where it lies: `cpu:0`, `*` for unknown, or what was given.
    pub fn location(&self) -> &str {
        self.inner.location()
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
        self.inner.memory()
    }
}
