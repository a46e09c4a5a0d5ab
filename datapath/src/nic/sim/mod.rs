//! A seeded world of NICs without hardware: queue pairs, completion queues, flushes, late packets, dead ports.
//!
//! Time is virtual and moves only by [`SimWorld::advance`], or it follows the machine's clock ([`SimWorld::real_time`]).
//! One seed fixes every delay and every choice, so a run can be repeated exactly. Bytes really move: a READ or WRITE
//! copies between the registered regions of the two ends, under the same checks of keys, ranges, states, packet
//! numbers and MTU that a device makes.

mod device;
mod events;
mod world;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use crate::units::{Gid, Mtu, Nanos};

use device::SimNic;
use events::AsyncEvents;
use world::World;

use super::Nic;

/// How the world behaves where the seed does not decide.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct SimOptions {
    /// One way's delay without any queue.
    pub delay: Nanos,
    /// Up to this much is added at random, per request.
    pub jitter: Nanos,
    /// Bytes per second of one queue pair.
    pub bytes_per_second: u64,
    /// How long an unanswered request is retried before RETRY_EXC (ACK timeout × retries).
    pub retry_time: Nanos,
    /// Share of WRITEs that still land although their queue pair was flushed meanwhile, 0 to 1.
    pub late_writes: f64,
    /// How much later at the most.
    pub late_by: Nanos,
    /// Path MTU of the ports.
    pub mtu: Mtu,
    /// Whether the number of a destroyed queue pair is given again at once. Then both ends must draw their packet numbers.
    pub reuse_numbers: bool,
    /// Whether the devices may call a READ a success that they cut short ([`SimWorld::cut_short`]), as Soft-RoCE does.
    pub cuts_reads: bool,
}

impl Default for SimOptions {
    fn default() -> Self {
        Self {
            delay: Nanos::from_micros(5),
            jitter: Nanos::from_micros(2),
            bytes_per_second: 10_000_000_000,
            retry_time: Nanos::from_millis(480),
            late_writes: 0.5,
            late_by: Nanos::from_millis(20),
            mtu: Mtu::B4096,
            reuse_numbers: false,
            cuts_reads: false,
        }
    }
}

/// A network of simulated NICs. Clones are the same world.
#[derive(Clone)]
pub struct SimWorld {
    world: Arc<Mutex<World>>,
    started: Option<Instant>,
}

/// A simulated NIC as faults name it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SimNicId(usize);

/// What is alive in a world: equal before and after means that nothing leaked.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct SimLedger {
    /// Queue pairs not destroyed.
    pub queue_pairs: usize,
    /// Registrations not dropped.
    pub registrations: usize,
    /// Completions, since the start, for which a queue had no room. An engine that counts its credit causes none.
    pub overruns: usize,
    /// Late packets, since the start, that another queue pair took than the one they were sent to.
    pub strays: usize,
}

impl SimWorld {
    /// A world with virtual time, starting at 0.
    pub fn new(seed: u64, options: SimOptions) -> Self {
        Self { world: Arc::new(Mutex::new(World::new(seed, options))), started: None }
    }

    /// A world whose time is the machine's: for whole engines with threads.
    pub fn real_time(seed: u64, options: SimOptions) -> Self {
        Self { started: Some(Instant::now()), ..Self::new(seed, options) }
    }

    /// Adds a NIC to `node`. Its GID table holds a link-local entry at index 0 and `gid` at index 1, both RoCE v2.
    pub fn nic(&self, node: &str, name: &str, gid: Gid) -> (Arc<dyn Nic>, SimNicId) {
        let events = if self.started.is_some() { AsyncEvents::shown() } else { AsyncEvents::unseen() };
        let shown = events.fd();
        let index = self.lock().add_nic(node, name, gid, events);
        (Arc::new(SimNic::new(self.clone(), index, name, shown)), SimNicId(index))
    }

    /// Delivers everything that is due until `now`.
    pub fn advance(&self, now: Nanos) {
        self.lock().advance(now);
    }

    /// When something happens next by itself.
    pub fn next_event(&self) -> Option<Nanos> {
        self.lock().next_event()
    }

    /// Takes the port down or up: an asynchronous event, and while it is down nothing passes.
    pub fn set_link(&self, nic: SimNicId, up: bool) {
        self.lock().set_link(nic.0, up);
    }

    /// Cuts or mends the path between two NICs: requests are silently lost, as in a network that does not route.
    pub fn set_path(&self, a: SimNicId, b: SimNicId, up: bool) {
        self.lock().set_path(a.0, b.0, up);
    }

    /// Lets a NIC's questions for its neighbours' addresses go unanswered, or not any more: while they are, none of its queue
    /// pairs gets to RTR. Traffic of those that did is not touched.
    pub fn set_neighbours(&self, nic: SimNicId, answer: bool) {
        self.lock().set_neighbours(nic.0, answer);
    }

    /// Whether they do. A device waits a second for them.
    pub fn neighbours_answer(&self, nic: SimNicId) -> bool {
        self.lock().neighbours_answer(nic.0)
    }

    /// Cuts the path between two NICs, and no device ever says so: it retries for ever, as Soft-RoCE with a retry count of 7
    /// does in split networks. Mended by [`SimWorld::set_path`].
    pub fn swallow(&self, a: SimNicId, b: SimNicId) {
        self.lock().swallow(a.0, b.0);
    }

    /// READs between two NICs end after half of their bytes, are called a success all the same, and leave their queue pair in ERR
    /// without a word. Only in a world that [`SimOptions::cuts_reads`]; mended by [`SimWorld::set_path`].
    pub fn cut_short(&self, a: SimNicId, b: SimNicId) {
        self.lock().cut_short(a.0, b.0);
    }

    /// Loses `loss` (0 to 1) of the packets between two NICs, and delays all of them. Mended by [`SimWorld::set_path`].
    pub fn roughen(&self, a: SimNicId, b: SimNicId, loss: f64, delay: Nanos) {
        self.lock().roughen(a.0, b.0, loss, delay);
    }

    /// The NIC's port sends this many bytes per second, of all its queue pairs together, in the order in which they were posted; in place of
    /// [`SimOptions::bytes_per_second`].
    pub fn set_speed(&self, nic: SimNicId, bytes_per_second: u64) {
        self.lock().set_speed(nic.0, bytes_per_second);
    }

    /// The device fails for good: a fatal event, and it refuses everything.
    pub fn fail_device(&self, nic: SimNicId) {
        self.lock().fail_device(nic.0);
    }

    /// Every completion queue of the NIC loses what it holds and says so, as after an overrun.
    pub fn overrun_cqs(&self, nic: SimNicId) {
        self.lock().overrun_cqs(nic.0);
    }

    /// The port's address is deleted, with an asynchronous event.
    pub fn take_gid(&self, nic: SimNicId) {
        self.lock().take_gid(nic.0);
    }

    /// The address that was deleted is added again, at another index of the GID table.
    pub fn return_gid(&self, nic: SimNicId) {
        self.lock().return_gid(nic.0);
    }

    /// The node is gone: its queue pairs answer nothing any more, its NICs refuse everything.
    pub fn kill_node(&self, node: &str) {
        self.lock().kill_node(node);
    }

    /// Stops a node's machine, or lets it go on: meanwhile its NICs answer nothing, send nothing and lose nothing that has
    /// reached them or is about to.
    pub fn freeze_node(&self, node: &str, frozen: bool) {
        self.lock().freeze_node(node, frozen);
    }

    /// Sets the active MTU of one port. Larger packets no longer pass; nobody is told.
    pub fn set_mtu(&self, nic: SimNicId, mtu: Mtu) {
        self.lock().set_mtu(nic.0, mtu);
    }

    /// Moves the port's GID to another index, as happens when addresses come and go.
    pub fn shuffle_gids(&self, nic: SimNicId) {
        self.lock().shuffle_gids(nic.0);
    }

    /// What is alive.
    pub fn ledger(&self) -> SimLedger {
        self.lock().ledger()
    }

    fn lock(&self) -> MutexGuard<'_, World> {
        self.world.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Locks the world with its time brought up to date.
    fn now(&self) -> MutexGuard<'_, World> {
        let mut world = self.lock();
        if let Some(started) = self.started {
            world.advance(Nanos::from_duration(started.elapsed()));
        }
        world
    }
}
