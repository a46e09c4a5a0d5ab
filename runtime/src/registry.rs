//! What is registered: by address, and how it comes and goes.
//!
//! Ranges are reserved first, registered on all NICs at once, then published; each step that fails undoes those before.
//! Leaving goes the other way round, and waits until no Work holds the registration.
//!
//! A table is told as a whole, to those who copy at once and to the peers, so what comes together is taken in and told together:
//! the ranges of one call, and of threads that call while a publication is under way.

use std::io;
use std::path::Path;
use std::sync::atomic::Ordering;
use std::sync::{Arc, MutexGuard};
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
    /// Of the region: here too, as a search looks at the extents of many, and at nothing else of them.
    extent: Extent,
    pub(crate) region: Region,
    pub(crate) registered: Arc<Registered>,
}

impl Entry {
    fn new(region: Region, registered: Arc<Registered>) -> Self {
        Self { extent: Extent { addr: region.addr(), len: region.len() }, region, registered }
    }

    fn extent(&self) -> Extent {
        self.extent
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
    /// Times `entries` has changed.
    changes: u64,
}

fn overlaps(one: Extent, other: Extent) -> bool {
    one.addr < other.addr.saturating_add(other.len) && other.addr < one.addr.saturating_add(one.len)
}

impl Registry {
    pub(crate) fn new(extents: Arc<Snapshot<Extents>>) -> Self {
        Self { extents, stopped: false, entries: Vec::new(), pending: Vec::new(), leaving: Vec::new(), changes: 0 }
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

    /// `new` is sorted by address. All of it, or nothing.
    fn reserve(&mut self, new: &[Extent]) -> Result<(), RegisterError> {
        if self.stopped {
            return Err(RegisterError::Stopped);
        }
        let overlap = |new: Extent, other: Extent| RegisterError::Overlap {
            addr: new.addr,
            len: new.len,
            other: other.addr,
            other_len: other.len,
        };
        if let Some(pair) = new.windows(2).find(|pair| overlaps(pair[0], pair[1])) {
            return Err(overlap(pair[1], pair[0]));
        }
        for &extent in new {
            // The only ones it can meet: the last that begins before its end.
            let after =
                self.entries.partition_point(|entry| entry.extent.addr < extent.addr.saturating_add(extent.len));
            if let Some(other) = after.checked_sub(1).map(|index| self.entries[index].extent())
                && overlaps(extent, other)
            {
                return Err(overlap(extent, other));
            }
        }
        for other in self.leaving.iter().map(Entry::extent).chain(self.pending.iter().copied()) {
            let after = new.partition_point(|extent| extent.addr < other.addr.saturating_add(other.len));
            if let Some(&extent) = after.checked_sub(1).and_then(|index| new.get(index))
                && overlaps(extent, other)
            {
                return Err(overlap(extent, other));
            }
        }
        self.pending.extend_from_slice(new);
        Ok(())
    }

    /// Takes what was reserved off the list of what is being registered. `done` is sorted by address.
    fn unreserve(&mut self, done: &[Extent]) {
        self.pending.retain(|pending| done.binary_search_by_key(&pending.addr, |extent| extent.addr).is_err());
    }

    /// Returns the number of the change.
    fn insert(&mut self, entries: impl IntoIterator<Item = Entry>) -> u64 {
        self.entries.extend(entries);
        // Two sorted runs, which this kind of sort merges.
        self.entries.sort_by_key(|entry| entry.extent.addr);
        self.tell();
        self.changes += 1;
        self.changes
    }

    /// The first of `addrs` that no entry begins at.
    fn missing(&self, addrs: &[u64]) -> Option<u64> {
        let is_missing = |addr: &u64| self.entries.binary_search_by_key(addr, |entry| entry.extent.addr).is_err();
        addrs.iter().copied().find(is_missing)
    }

    /// Takes out those that begin at `addrs`, which are sorted; returns the number of the change too.
    fn remove(&mut self, addrs: &[u64]) -> (u64, Vec<Entry>) {
        let wanted = |entry: &mut Entry| addrs.binary_search(&entry.extent.addr).is_ok();
        let gone: Vec<Entry> = self.entries.extract_if(.., wanted).collect();
        self.tell_without(&gone);
        self.changes += 1;
        (self.changes, gone)
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
    /// All of them, or none; returns the regions in the order of `memories`.
    pub(crate) fn register(
        &self,
        memories: &[Arc<Memory>],
        location: &str,
        remote: bool,
    ) -> Result<Vec<Region>, RegisterError> {
        if !self.is_here() {
            return Err(RegisterError::Forked);
        }
        if memories.iter().any(|memory| memory.is_empty()) {
            return Err(RegisterError::ZeroLength);
        }
        let mut extents: Vec<_> =
            memories.iter().map(|memory| Extent { addr: memory.addr(), len: memory.len() }).collect();
        if extents.is_empty() {
            return Ok(Vec::new());
        }
        extents.sort_unstable_by_key(|extent| extent.addr);
        self.preflight(extents.iter().fold(0, |sum, extent| sum.saturating_add(extent.len)))?;
        self.registry_mut().reserve(&extents)?;
        let registered = self.register_on_nics(memories, location, remote);
        let result = registered.and_then(|registered| self.enter(registered, remote));
        self.registry_mut().unreserve(&extents);
        result
    }

    /// Into the table and out to the peers, or neither.
    fn enter(&self, registered: Vec<Arc<Registered>>, remote: bool) -> Result<Vec<Region>, RegisterError> {
        let region = |registered: &Arc<Registered>| {
            Region::new(registered.memory().clone(), registered.location().to_owned(), remote)
        };
        let regions: Vec<Region> = registered.iter().map(region).collect();
        let mut entries: Vec<_> =
            regions.iter().zip(registered).map(|(region, registered)| Entry::new(region.clone(), registered)).collect();
        entries.sort_unstable_by_key(|entry| entry.extent.addr);
        let addrs: Vec<u64> = entries.iter().map(|entry| entry.extent.addr).collect();
        let change = {
            let mut registry = self.registry_mut();
            if registry.stopped {
                return Err(RegisterError::Stopped);
            }
            registry.insert(entries)
        };
        if let Err((source, publishing)) = self.publish(change) {
            // Between the two a submission may have taken it; its Work keeps it registered until it ends.
            // Deregistering may take long: it happens without the lock.
            let removed = self.registry_mut().remove(&addrs);
            drop(removed);
            self.take_back(&publishing);
            return Err(RegisterError::Publish { source: Box::new(source) });
        }
        let bytes = regions.iter().map(Region::len).sum();
        for nic in &self.nics {
            nic.registered.fetch_add(bytes, Ordering::Relaxed);
        }
        Ok(regions)
    }

    /// Those that begin at `addrs`: all of them are unpublished, or none.
    pub(crate) fn unregister(&self, addrs: &[u64]) -> Result<(), UnregisterError> {
        if !self.is_here() {
            return Err(UnregisterError::Forked);
        }
        self.unregister_within(addrs, QUIET_WITHIN)
    }

    fn unregister_within(&self, addrs: &[u64], within: Duration) -> Result<(), UnregisterError> {
        let mut addrs = addrs.to_vec();
        addrs.sort_unstable();
        addrs.dedup();
        let mut entries = self.unpublish(addrs)?;
        let until = Instant::now() + within;
        let busy = entries.iter().position(|entry| !self.quiet(&entry.registered, until));
        let left = busy.map(|index| entries.split_off(index));
        let bytes = entries.iter().map(|entry| entry.region.len()).sum();
        drop(entries);
        for nic in &self.nics {
            nic.registered.fetch_sub(bytes, Ordering::Relaxed);
        }
        let Some(left) = left else { return Ok(()) };
        let addr = left[0].region.addr();
        self.registry_mut().leaving.extend(left);
        Err(UnregisterError::InUse { addr, waited: within })
    }

    /// Takes them out of the table and out of the peers' sight, or neither. What was unpublished before and still in use is given too.
    fn unpublish(&self, addrs: Vec<u64>) -> Result<Vec<Entry>, UnregisterError> {
        let (change, gone, still, extents) = {
            let mut registry = self.registry_mut();
            let is_leaving = |addr: &u64| registry.leaving.iter().any(|entry| entry.extent.addr == *addr);
            let (leaving, here): (Vec<u64>, Vec<u64>) = addrs.into_iter().partition(is_leaving);
            if let Some(addr) = registry.missing(&here) {
                return Err(UnregisterError::NotRegistered { addr });
            }
            let (change, gone) = (!here.is_empty()).then(|| registry.remove(&here)).unzip();
            let gone = gone.unwrap_or_default();
            let wanted = |entry: &mut Entry| leaving.binary_search(&entry.extent.addr).is_ok();
            let still: Vec<Entry> = registry.leaving.extract_if(.., wanted).collect();
            // Nobody registers the ranges anew while they may have to come back.
            let extents: Vec<_> = gone.iter().map(Entry::extent).collect();
            registry.pending.extend_from_slice(&extents);
            (change, gone, still, extents)
        };
        let failed = change.and_then(|change| self.publish(change).err());
        let mut registry = self.registry_mut();
        registry.unreserve(&extents);
        let Some((source, publishing)) = failed else {
            drop(registry);
            return Ok(still.into_iter().chain(gone).collect());
        };
        registry.leaving.extend(still);
        registry.insert(gone);
        drop(registry);
        self.take_back(&publishing);
        Err(UnregisterError::Publish { source: Box::new(source) })
    }

    /// Waits until only the caller holds the registration. Batches that are over but not dropped let go of it.
    pub(crate) fn quiet(&self, registered: &Arc<Registered>, until: Instant) -> bool {
        let mut pause = Duration::from_micros(20);
        loop {
            self.live.retire_finished(until);
            // Works that nobody waited for may be in the rings between cores and control, which is not woken for them.
            self.control.look();
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

    /// Tells the peers what there is, unless that was done since `change`: one publication at a time, each of the newest state, so those
    /// who come while one is under way share the next. A failure comes with the turn to publish, to undo the change in.
    fn publish(&self, change: u64) -> Result<(), (moonrail_control::PublishError, MutexGuard<'_, u64>)> {
        let mut published = self.publishing();
        if *published >= change {
            return Ok(());
        }
        match self.publish_until(Instant::now() + PUBLISH_WITHIN) {
            Ok(newest) => *published = newest,
            Err(source) => return Err((source, published)),
        }
        Ok(())
    }

    /// Returns the last change that it tells of.
    fn publish_until(&self, until: Instant) -> Result<u64, moonrail_control::PublishError> {
        let mut buffers = Vec::new();
        // What is dialled has no keys, and stands in no list of devices.
        let keyed: Vec<bool> = self.nics.iter().map(|nic| nic.port.is_some()).collect();
        let registry = self.registry();
        let newest = registry.changes;
        for entry in &registry.entries {
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
        drop(registry);
        self.control.publish(buffers, until).map(|()| newest)
    }

    /// After a publication that failed: control goes on offering what it was told last, so it is told the old state again.
    /// The store is down, so its answer is not waited for.
    fn take_back(&self, _turn: &MutexGuard<'_, u64>) {
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
        memories: &[Arc<Memory>],
        location: &str,
        remote: bool,
    ) -> Result<Vec<Arc<Registered>>, RegisterError> {
        let device_limit = self.nics.iter().map(|nic| nic.nic.device().max_mr_size).filter(|&size| size > 0).min();
        let limit = device_limit.unwrap_or(u64::MAX).min(self.settings.max_mr_size);
        let mut plan = Vec::with_capacity(memories.len());
        for memory in memories {
            let chunks = chunks_of(memory.len(), limit);
            if chunks.len() > 1 {
                self.log.warning(format!(
                    "Auto-splitting buffer {:#x} of {} bytes into {} chunks of {limit} bytes (max_mr_size, MC_MAX_MR_SIZE)",
                    memory.addr(),
                    memory.len(),
                    chunks.len()
                ));
            }
            plan.extend(chunks.into_iter().map(|(offset, len)| Planned { memory, offset, len }));
        }
        let access = Access { remote, relaxed_ordering: self.settings.relaxed_ordering };
        // One thread per NIC: pinning is what takes the time, and NICs pin independently.
        let per_nic: Vec<Result<Vec<ChunkKeys>, (usize, io::Error)>> = std::thread::scope(|scope| {
            let threads: Vec<_> = self
                .nics
                .iter()
                .map(|nic| {
                    let plan = &plan;
                    let all = move || register_on(nic, plan, access);
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
                    let Planned { memory, offset, len } = plan[chunk];
                    return Err(self.refused(nic, memory.addr() + offset, len, &error));
                }
                Ok(list) => keys.push(list.into_iter()),
            }
        }
        let mut plan = plan.into_iter().peekable();
        let registered = memories.iter().map(|memory| {
            let mut chunks = Vec::new();
            while let Some(Planned { offset, len, .. }) = plan.next_if(|planned| Arc::ptr_eq(planned.memory, memory)) {
                let keys = keys.iter_mut().map(Iterator::next).collect();
                chunks.push(Chunk { addr: memory.addr() + offset, len, keys });
            }
            Arc::new(Registered::new(memory.clone(), chunks, self.location_of(memory, location), remote))
        });
        Ok(registered.collect())
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

/// A chunk to be registered.
#[derive(Clone, Copy)]
struct Planned<'a> {
    memory: &'a Arc<Memory>,
    offset: u64,
    len: u64,
}

/// All of it, or the place of the chunk that was refused.
fn register_on(nic: &OpenNic, plan: &[Planned<'_>], access: Access) -> Result<Vec<ChunkKeys>, (usize, io::Error)> {
    let one = |(index, &Planned { memory, offset, len })| {
        nic.nic.register(memory, offset, len, access).map(ChunkKeys::from).map_err(|error| (index, error))
    };
    plan.iter().enumerate().map(one).collect()
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
        registry.reserve(&[entry(1000, 100)]).unwrap();
        registry.reserve(&[entry(900, 100), entry(1100, 100)]).unwrap();
        for (addr, len) in [(1000, 100), (950, 100), (1099, 2), (0, u64::MAX), (1050, 1)] {
            // The same whether it comes alone, behind others or before them, and none of them stays.
            let others = [entry(1, 1), entry(u64::MAX - 10, 1)];
            let mut all = vec![entry(addr, len)];
            let error = registry.reserve(&all).unwrap_err();
            if addr > 1 {
                all = vec![others[0], entry(addr, len), others[1]];
                registry.reserve(&all).unwrap_err();
            }
            assert!(error.to_string().starts_with("Transfer Engine does not support overlapped memory region"));
        }
        assert!(registry.reserve(&[entry(5000, 10), entry(5009, 1)]).is_err(), "with each other");
        assert_eq!(registry.pending.len(), 3);
        registry.unreserve(&[entry(1000, 100)]);
        registry.reserve(&[entry(1000, 100)]).unwrap();
        registry.stopped = true;
        assert!(matches!(registry.reserve(&[entry(5000, 1)]), Err(RegisterError::Stopped)));
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
