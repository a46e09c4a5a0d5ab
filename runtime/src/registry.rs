//! What is registered: by address, and how it comes and goes.
//!
//! A range is reserved first, registered on all NICs at once, then published; each step that fails undoes those before.
//! Leaving goes the other way round, and waits until no Work holds the registration.

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use moonrail_control::metadata::BufferEntry;
use moonrail_datapath::lanes::Snapshot;
use moonrail_datapath::nic::Access;
use moonrail_datapath::region::{Chunk, ChunkKeys, Memory, Region as Registered};
use moonrail_datapath::slice::{Extent, holder};
use moonrail_datapath::units::{Lkey, Rkey};

use crate::engine::{OpenNic, Shared};
use crate::error::{RefusedRegistration, RegisterError, UnregisterError};
use crate::memlock::{LockLimit, kernel_line};
use crate::region::Region;

/// For one publication: two store operations of 5 s each, and some.
const PUBLISH_WITHIN: Duration = Duration::from_secs(15);
/// How long unregistering waits for transfers to end: the default deadline of a batch, twice.
const QUIET_WITHIN: Duration = Duration::from_secs(60);

/// A registered range. Submitters clone `registered` into Works.
#[derive(Clone)]
pub(crate) struct Entry {
    pub(crate) region: Region,
    pub(crate) registered: Arc<Registered>,
}

impl Entry {
    fn extent(&self) -> Extent {
        Extent { addr: self.region.addr(), len: self.region.len() }
    }
}

/// Where registered memory lies, for those who copy at once: sorted, without overlap.
#[derive(Default)]
pub(crate) struct Extents(Box<[Extent]>);

impl Extents {
    /// Whether one region has the whole range.
    #[inline]
    pub(crate) fn hold(&self, addr: u64, len: u64) -> bool {
        let found = holder(&self.0, |extent| *extent, addr).and_then(|index| self.0.get(index));
        found.is_some_and(|extent| len <= extent.len - (addr - extent.addr))
    }
}

/// Read by every submission to a core, written when memory comes or goes.
pub(crate) struct Registry {
    /// The same for those who read it without a lock.
    extents: Arc<Snapshot<Extents>>,
    /// No submission, no registration any more.
    pub(crate) stopped: bool,
    /// Sorted by address, without overlap.
    entries: Vec<Entry>,
    /// Being registered.
    pending: Vec<Extent>,
    /// Unpublished, but still used by transfers.
    leaving: Vec<Entry>,
}

impl Registry {
    pub(crate) fn new(extents: Arc<Snapshot<Extents>>) -> Self {
        Self { extents, stopped: false, entries: Vec::new(), pending: Vec::new(), leaving: Vec::new() }
    }

    /// Tells those who read without a lock, and waits for those who know the former state. Whether none is left.
    fn tell(&self) -> bool {
        let extents = if self.stopped { Box::default() } else { self.entries.iter().map(Entry::extent).collect() };
        self.extents.replace(Extents(extents))
    }

    /// The entry that holds `addr`.
    pub(crate) fn find(&self, addr: u64) -> Option<&Entry> {
        holder(&self.entries, Entry::extent, addr).map(|index| &self.entries[index])
    }

    pub(crate) fn regions(&self) -> Vec<Region> {
        self.entries.iter().map(|entry| entry.region.clone()).collect()
    }

    fn reserve(&mut self, new: Extent) -> Result<(), RegisterError> {
        if self.stopped {
            return Err(RegisterError::Stopped);
        }
        let taken = self.entries.iter().chain(&self.leaving).map(Entry::extent).chain(self.pending.iter().copied());
        for other in taken {
            if new.addr < other.addr.saturating_add(other.len) && other.addr < new.addr.saturating_add(new.len) {
                return Err(RegisterError::Overlap {
                    addr: new.addr,
                    len: new.len,
                    other: other.addr,
                    other_len: other.len,
                });
            }
        }
        self.pending.push(new);
        Ok(())
    }

    fn insert(&mut self, entry: Entry) {
        let index = self.entries.partition_point(|other| other.region.addr() < entry.region.addr());
        self.entries.insert(index, entry);
        self.tell();
    }

    fn remove(&mut self, addr: u64) -> Option<Entry> {
        let index = self.entries.iter().position(|entry| entry.region.addr() == addr)?;
        let entry = self.entries.remove(index);
        self.tell_without(std::slice::from_ref(&entry));
        Some(entry)
    }

    /// `gone` have been taken out. A thread that was stopped in the middle of a copy may go on with it: then they stay in use for
    /// ever.
    fn tell_without(&self, gone: &[Entry]) {
        if !self.tell() {
            for entry in gone {
                std::mem::forget(entry.registered.clone());
            }
        }
    }

    /// No submission, no registration from here on.
    pub(crate) fn stop(&mut self) {
        self.stopped = true;
        self.tell_without(&self.entries);
    }

    /// Everything, at the end of the engine.
    pub(crate) fn take_all(&mut self) -> Vec<Entry> {
        self.stop();
        self.entries.drain(..).chain(self.leaving.drain(..)).collect()
    }
}

/// Place and extent of the chunk that holds `addr`.
pub(crate) fn chunk_at(registered: &Registered, addr: u64) -> Option<(u32, Extent)> {
    let extent = |chunk: &Chunk| Extent { addr: chunk.addr, len: chunk.len };
    let chunks = registered.chunks();
    let index = holder(chunks, extent, addr)?;
    Some((index as u32, extent(&chunks[index])))
}

/// Offsets and lengths of the chunks of `len` bytes: all of `limit` bytes but the last. A limit above a page is cut to
/// whole pages.
fn chunks_of(len: u64, limit: u64) -> Vec<(u64, u64)> {
    const PAGE: u64 = 4096;
    let limit = if limit > PAGE { limit / PAGE * PAGE } else { limit.max(1) };
    let mut chunks = Vec::new();
    let mut at = 0;
    while at < len {
        chunks.push((at, limit.min(len - at)));
        at += limit.min(len - at);
    }
    chunks
}

impl Shared {
    pub(crate) fn register(&self, memory: &Arc<Memory>, location: &str, remote: bool) -> Result<Region, RegisterError> {
        if !self.is_here() {
            return Err(RegisterError::Forked);
        }
        if memory.is_empty() {
            return Err(RegisterError::ZeroLength);
        }
        let extent = Extent { addr: memory.addr(), len: memory.len() };
        self.preflight(extent.len)?;
        self.registry_mut().reserve(extent)?;
        let registered = self.register_on_nics(memory, location, remote);
        let result = registered.and_then(|registered| self.enter(registered, remote));
        self.registry_mut().pending.retain(|pending| pending.addr != extent.addr);
        result
    }

    /// Into the table and out to the peers, or neither.
    fn enter(&self, registered: Arc<Registered>, remote: bool) -> Result<Region, RegisterError> {
        let region = Region::new(registered.memory().clone(), registered.location().to_owned(), remote);
        let publishing = self.publishing();
        {
            let mut registry = self.registry_mut();
            if registry.stopped {
                return Err(RegisterError::Stopped);
            }
            registry.insert(Entry { region: region.clone(), registered });
        }
        let published = self.publish();
        if let Err(source) = published {
            // Between the two a submission may have taken it; its Work keeps it registered until it ends.
            // Deregistering may take long: it happens without the lock.
            let removed = self.registry_mut().remove(region.addr());
            drop(removed);
            self.take_back();
            return Err(RegisterError::Publish { source: Box::new(source) });
        }
        drop(publishing);
        for nic in &self.nics {
            nic.registered.fetch_add(region.len(), Ordering::Relaxed);
        }
        Ok(region)
    }

    pub(crate) fn unregister(&self, addr: u64) -> Result<(), UnregisterError> {
        if !self.is_here() {
            return Err(UnregisterError::Forked);
        }
        self.unregister_within(addr, QUIET_WITHIN)
    }

    fn unregister_within(&self, addr: u64, within: Duration) -> Result<(), UnregisterError> {
        let publishing = self.publishing();
        let entry = {
            let mut registry = self.registry_mut();
            let still = registry.leaving.iter().position(|entry| entry.region.addr() == addr);
            if let Some(index) = still {
                registry.leaving.remove(index)
            } else {
                let entry = registry.remove(addr).ok_or(UnregisterError::NotRegistered { addr })?;
                // Nobody registers the range anew while it may have to come back.
                registry.pending.push(entry.extent());
                drop(registry);
                let published = self.publish();
                let mut registry = self.registry_mut();
                registry.pending.retain(|pending| pending.addr != addr);
                if let Err(source) = published {
                    registry.insert(entry);
                    drop(registry);
                    self.take_back();
                    return Err(UnregisterError::Publish { source: Box::new(source) });
                }
                entry
            }
        };
        drop(publishing);
        if !self.quiet(&entry.registered, Instant::now() + within) {
            self.registry_mut().leaving.push(entry);
            return Err(UnregisterError::InUse { addr, waited: within });
        }
        let len = entry.region.len();
        drop(entry);
        for nic in &self.nics {
            nic.registered.fetch_sub(len, Ordering::Relaxed);
        }
        Ok(())
    }

    /// Waits until only the caller holds the registration. Batches that are over but not dropped let go of it.
    pub(crate) fn quiet(&self, registered: &Arc<Registered>, until: Instant) -> bool {
        let mut pause = Duration::from_micros(20);
        loop {
            self.live.retire_finished(until);
            if Arc::strong_count(registered) == 1 {
                return true;
            }
            if Instant::now() >= until {
                return false;
            }
            std::thread::sleep(pause);
            pause = (pause * 2).min(Duration::from_millis(2));
        }
    }

    /// Tells the peers what there is. The caller holds [`Shared::publishing`], so the last word is the newest state.
    fn publish(&self) -> Result<(), moonrail_control::PublishError> {
        self.publish_until(Instant::now() + PUBLISH_WITHIN)
    }

    fn publish_until(&self, until: Instant) -> Result<(), moonrail_control::PublishError> {
        let mut buffers = Vec::new();
        // What is dialled has no keys, and stands in no list of devices.
        let keyed: Vec<bool> = self.nics.iter().map(|nic| nic.port.is_some()).collect();
        for entry in &self.registry().entries {
            let remote = entry.region.is_remote();
            if !remote && !keyed.contains(&true) {
                // Without keys there is no other way to say that it is not for peers.
                continue;
            }
            for chunk in entry.registered.chunks() {
                let of_device = || chunk.keys.iter().zip(&keyed).filter(|(_, keyed)| **keyed).map(|(keys, _)| keys);
                let keys = |key: fn(&ChunkKeys) -> u32| of_device().map(move |k| k.as_ref().map_or(0, key));
                buffers.push(BufferEntry {
                    name: entry.region.location().to_owned(),
                    addr: chunk.addr,
                    length: chunk.len,
                    lkeys: keys(|k| k.lkey.0).map(Lkey).collect(),
                    rkeys: if remote { keys(|k| k.rkey.0).map(Rkey).collect() } else { Vec::new() },
                });
            }
        }
        self.control.publish(buffers, until)
    }

    /// After a publication that failed: control goes on offering what it was told last, so it is told the old state again.
    /// The store is down, so its answer is not waited for.
    fn take_back(&self) {
        let _ = self.publish_until(Instant::now());
    }

    /// Whether the process may pin that much, before anything is pinned. Simulated NICs pin nothing.
    fn preflight(&self, len: u64) -> Result<(), RegisterError> {
        let nics = self.nics.iter().filter(|nic| nic.pins).count();
        if nics == 0 {
            return Ok(());
        }
        let registered =
            self.nics.iter().filter(|nic| nic.pins).map(|nic| nic.registered.load(Ordering::Relaxed)).sum();
        match LockLimit::read(Path::new("/proc")).exceeded(len, nics, registered) {
            None => Ok(()),
            Some((needed, limit)) => Err(RegisterError::MemoryLock { len, nics, needed, registered, limit }),
        }
    }

    fn register_on_nics(
        &self,
        memory: &Arc<Memory>,
        location: &str,
        remote: bool,
    ) -> Result<Arc<Registered>, RegisterError> {
        let device_limit = self.nics.iter().map(|nic| nic.nic.device().max_mr_size).filter(|&size| size > 0).min();
        let limit = device_limit.unwrap_or(u64::MAX).min(self.settings.max_mr_size);
        let plan = chunks_of(memory.len(), limit);
        if plan.len() > 1 {
            self.log.warning(format!(
                "Auto-splitting buffer {:#x} of {} bytes into {} chunks of {limit} bytes (max_mr_size, MC_MAX_MR_SIZE)",
                memory.addr(),
                memory.len(),
                plan.len()
            ));
        }
        let access = Access { remote, relaxed_ordering: self.settings.relaxed_ordering };
        // One thread per NIC: pinning is what takes the time, and NICs pin independently.
        let per_nic: Vec<Result<Vec<ChunkKeys>, (usize, io::Error)>> = std::thread::scope(|scope| {
            let threads: Vec<_> = self
                .nics
                .iter()
                .map(|nic| {
                    let plan = &plan;
                    let all = move || register_on(nic, memory, plan, access);
                    std::thread::Builder::new().name("mr-register".into()).spawn_scoped(scope, all)
                })
                .collect();
            let lost = |_| Err((0, io::Error::other("the registering thread panicked")));
            let join = |thread: io::Result<std::thread::ScopedJoinHandle<'_, _>>| match thread {
                Ok(thread) => thread.join().unwrap_or_else(lost),
                Err(error) => Err((0, error)),
            };
            threads.into_iter().map(join).collect()
        });
        let mut keys = Vec::new();
        for (nic, result) in self.nics.iter().zip(per_nic) {
            match result {
                // Dropping `keys` and what follows deregisters what did work.
                Err((chunk, error)) => {
                    return Err(self.refused(nic, memory.addr() + plan[chunk].0, plan[chunk].1, &error));
                }
                Ok(list) => keys.push(list.into_iter()),
            }
        }
        let chunks = plan
            .iter()
            .map(|&(offset, len)| Chunk {
                addr: memory.addr() + offset,
                len,
                keys: keys.iter_mut().map(Iterator::next).collect(),
            })
            .collect();
        let location = self.location_of(memory, location);
        Ok(Arc::new(Registered::new(memory.clone(), chunks, location, remote)))
    }

    fn refused(&self, nic: &OpenNic, addr: u64, len: u64, error: &io::Error) -> RegisterError {
        let refusal = RefusedRegistration {
            nic: nic.nic.name().to_owned(),
            addr,
            len,
            errno: error.raw_os_error(),
            text: plain_text(error),
            memlock: LockLimit::read(Path::new("/proc")).limit,
            max_mr_size: nic.nic.device().max_mr_size,
            registered: nic.registered.load(Ordering::Relaxed),
            kernel_line: if nic.pins { kernel_line(nic.nic.name()) } else { None },
        };
        let error = RegisterError::Refused(Box::new(refusal));
        self.log.line(crate::Level::Error, &error.to_string());
        error
    }

    /// `*` becomes the NUMA node of the first page, where that is known.
    fn location_of(&self, memory: &Memory, location: &str) -> String {
        if location != "*" && !location.is_empty() {
            return location.to_owned();
        }
        match self.machine.nodes.as_slice() {
            [only] => format!("cpu:{}", only.id),
            _ => memory.numa_node().map_or_else(|| "*".to_owned(), |node| format!("cpu:{node}")),
        }
    }
}

fn register_on(
    nic: &OpenNic,
    memory: &Arc<Memory>,
    plan: &[(u64, u64)],
    access: Access,
) -> Result<Vec<ChunkKeys>, (usize, io::Error)> {
    plan.iter()
        .enumerate()
        .map(|(index, &(offset, len))| {
            nic.nic.register(memory, offset, len, access).map(ChunkKeys::from).map_err(|error| (index, error))
        })
        .collect()
}

/// The error without Rust's `(os error N)`.
fn plain_text(error: &io::Error) -> String {
    let text = error.to_string();
    match text.find(" (os error ") {
        Some(end) => text[..end].to_owned(),
        None => text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn entry(addr: u64, len: u64) -> Extent {
        Extent { addr, len }
    }

    #[test]
    fn overlap_is_refused_and_neighbours_are_not() {
        let mut registry = Registry::new(Arc::new(Snapshot::new(Arc::default(), Extents::default())));
        registry.reserve(entry(1000, 100)).unwrap();
        registry.reserve(entry(1100, 100)).unwrap();
        registry.reserve(entry(900, 100)).unwrap();
        for (addr, len) in [(1000, 100), (950, 100), (1099, 2), (0, u64::MAX), (1050, 1)] {
            let error = registry.reserve(entry(addr, len)).unwrap_err();
            assert!(error.to_string().starts_with("Transfer Engine does not support overlapped memory region"));
        }
        registry.stopped = true;
        assert!(matches!(registry.reserve(entry(5000, 1)), Err(RegisterError::Stopped)));
    }

    #[test]
    fn an_errno_is_written_once() {
        let error = io::Error::from_raw_os_error(libc::EIO);
        assert_eq!(plain_text(&error), "Input/output error");
    }

    proptest! {
        #[test]
        fn chunks_tile_the_region_and_none_is_too_large(len in 1u64..1 << 22, limit in 1u64..1 << 20) {
            let limit = if len / limit > 4096 { len / 4096 + 1 } else { limit };
            let chunks = chunks_of(len, limit);
            let mut at = 0;
            for (offset, piece) in chunks {
                prop_assert_eq!(offset, at);
                prop_assert!(piece > 0 && piece <= limit);
                at += piece;
            }
            prop_assert_eq!(at, len);
        }
    }
}
