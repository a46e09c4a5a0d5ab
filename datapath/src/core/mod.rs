//! One polling core: a turn is a list, and each item of it is a file.
//!
//! ```text
//!   reap ──▶ settle ──▶ intake ──▶ post ──▶ watch
//!    │         │          │         │         └ deadlines, parked Works, what stalls or drains too long: once a millisecond
//!    │         │          │         └ claim slices with credit, build chains, one doorbell per chain
//!    │         │          └ commands and Works out of the rings
//!    │         └ slices that ended: into their Works, finished Works up to control
//!    └ completions: retire requests, free credit, meet the first error
//! ```
//! What one step produces the next can use in the same turn. Nothing here allocates, locks, logs, reads a clock or
//! makes a system call; the NIC's own calls aside.

pub mod counters;
mod credit;
#[cfg(test)]
mod explored;
mod fault;
pub(crate) mod inflight;
mod intake;
mod lost;
pub mod port;
mod post;
mod reap;
mod rest;
mod run;
mod seats;
mod settle;
mod stall;
mod table;
pub mod times;
mod watch;

use std::collections::HashMap;
use std::sync::Arc;

use crate::limits::{ACTIVE_WORKS, CHAIN_MAX, POLL_BATCH, QP_SLOTS};
use crate::nic::{Completion, CompletionQueue, WorkRequest};
use crate::units::{CoreId, Nanos, NicId};

pub use counters::CoreCounters;
pub use lost::Remains;
pub use port::{Command, CoreEvent, Doorbell, Inbox, Outbox, RailKey, RailSpec, dispatch, enqueue};
pub use rest::{Led, Wanting};
pub use run::{PollMode, run};
pub use times::{Spread, Times};

use inflight::{InFlight, InFlightTable};
use seats::SeatSet;
use table::{Hold, NicSeat, PeerSeat, QpSeat, RailSeat, WorkSeat};

/// What a core is made of.
pub struct CoreConfig {
    /// Its number, below 64.
    pub id: CoreId,
    /// Its own rings in; the same as `cores[id]`.
    pub inbox: Arc<Inbox>,
    /// Its ring out.
    pub outbox: Arc<Outbox>,
    /// The inboxes of every core, by number: Works that come back go to whoever has a rail.
    pub cores: Arc<[Arc<Inbox>]>,
    /// The NICs it polls, each with the completion queue it owns.
    pub nics: Vec<(NicId, Box<dyn CompletionQueue>)>,
    /// Where it counts.
    pub counters: Arc<CoreCounters>,
}

/// A core. Whoever holds it is its thread: its own ([`run`]), or a caller that waits for it ([`Inbox::lead`]).
pub struct Core {
    id: CoreId,
    inbox: Arc<Inbox>,
    outbox: Arc<Outbox>,
    cores: Arc<[Arc<Inbox>]>,
    counters: Arc<CoreCounters>,
    nics: Vec<NicSeat>,
    qps: Vec<QpSeat>,
    free_qps: Vec<u16>,
    /// Of the queue pairs, those with requests in flight.
    flying: SeatSet,
    /// Those on trial whose trial found no room.
    untried: SeatSet,
    in_flight: InFlightTable,
    rails: Vec<RailSeat>,
    free_rails: Vec<u32>,
    /// Of the rails, those that are down.
    down: SeatSet,
    /// Where each life of a rail that is not over has its seat.
    lives: HashMap<RailKey, u32>,
    peers: Vec<PeerSeat>,
    busy_peers: Vec<u32>,
    works: Vec<WorkSeat>,
    free_works: Vec<u32>,
    dirty: Vec<u32>,
    holds: Vec<Hold>,
    free_holds: Vec<u32>,
    completions: Box<[Completion]>,
    /// Those of `completions` that were not looked at yet.
    unread: std::ops::Range<usize>,
    chain: Vec<WorkRequest>,
    entries: Vec<InFlight>,
    next_watch: Nanos,
    last_watch: Nanos,
    stopping: Option<Nanos>,
    stopped: bool,
    /// When it was turned last, on whatever thread.
    turned: Nanos,
    /// When it did something for a peer last.
    served: Option<Nanos>,
    /// A caller turns it, not its own thread.
    led: bool,
    /// A turn of it was cut short, and nobody has seen to that yet.
    panicked: bool,
    trust: lost::Trust,
}

impl Core {
    /// Allocates everything the core will use.
    pub fn new(config: CoreConfig) -> Self {
        let seat = |(id, cq): (NicId, Box<dyn CompletionQueue>)| {
            let depth = cq.depth();
            NicSeat { id, cq, outstanding: 0, depth, lost: false }
        };
        let nics: Vec<NicSeat> = config.nics.into_iter().map(seat).collect();
        let in_flight = InFlightTable::new(nics.iter().map(|nic| nic.depth as usize).sum());
        Self {
            id: config.id,
            inbox: config.inbox,
            outbox: config.outbox,
            cores: config.cores,
            counters: config.counters,
            nics,
            qps: Vec::with_capacity(QP_SLOTS),
            free_qps: Vec::with_capacity(QP_SLOTS),
            flying: SeatSet::EMPTY,
            untried: SeatSet::EMPTY,
            in_flight,
            rails: Vec::with_capacity(QP_SLOTS),
            free_rails: Vec::with_capacity(QP_SLOTS),
            down: SeatSet::EMPTY,
            // Twice as many as there can be: what comes and goes then finds its place without another table.
            lives: HashMap::with_capacity(2 * QP_SLOTS),
            peers: Vec::with_capacity(64),
            busy_peers: Vec::with_capacity(ACTIVE_WORKS),
            works: Vec::with_capacity(ACTIVE_WORKS),
            free_works: Vec::with_capacity(ACTIVE_WORKS),
            dirty: Vec::with_capacity(2 * ACTIVE_WORKS),
            holds: Vec::with_capacity(ACTIVE_WORKS),
            free_holds: Vec::with_capacity(ACTIVE_WORKS),
            completions: vec![Completion::EMPTY; POLL_BATCH].into_boxed_slice(),
            unread: 0..0,
            chain: Vec::with_capacity(CHAIN_MAX),
            entries: Vec::with_capacity(CHAIN_MAX),
            next_watch: Nanos::ZERO,
            last_watch: Nanos::ZERO,
            stopping: None,
            stopped: false,
            turned: Nanos::ZERO,
            served: None,
            led: false,
            panicked: false,
            trust: lost::Trust::Whole,
        }
    }

    /// One turn; returns units of work done, 0 = idle. `now` never goes back. Credit freed by step 1 is spent by step 4
    /// of the same turn.
    pub fn poll_once(&mut self, now: Nanos) -> usize {
        let mut work = self.reap(now); // 1. completions: retire requests, free credit, note faults
        work += self.settle(); // 2. slice outcomes -> Works -> batches
        work += self.intake(now); // 3. commands and Works out of the rings
        work += self.post(now); // 4. claim, chain, ring
        work += self.watch(now); // 5. deadlines and what waits too long
        if work > 0 {
            self.counters.busy_turns.add(1);
        } else {
            self.counters.idle_turns.add(1);
        }
        work
    }

    /// Its number.
    pub fn id(&self) -> CoreId {
        self.id
    }

    /// Whether it has given everything back after [`Command::Stop`].
    pub fn is_stopped(&self) -> bool {
        self.stopped
    }

    /// Requests posted and not ended, on all NICs.
    pub fn outstanding(&self) -> u32 {
        self.nics.iter().map(|nic| nic.outstanding).sum()
    }

    /// Works it holds.
    pub fn works(&self) -> usize {
        self.works.len() - self.free_works.len()
    }
}
