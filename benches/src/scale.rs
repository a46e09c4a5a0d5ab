//! How cost grows with what there is: rails of a core that nobody uses, regions, transfers of a batch. What is of no concern to an
//! operation should cost it nothing, and what it is about no more than n log n of it.
//!
//! Over the [`NullNic`]. The core is turned by hand, as fast as it goes, so that its turns are alone in the figures.

use std::error::Error;
use std::sync::Arc;
use std::time::{Duration, Instant};

use moonrail::{Engine, Level, Region, Transfer};
use moonrail_datapath::core::counters::RailCounters;
use moonrail_datapath::core::{Command, Core, CoreEvent, Inbox, Outbox, RailKey, RailSpec, dispatch};
use moonrail_datapath::nic::{AdminHalf, Nic};
use moonrail_datapath::region::Region as Registered;
use moonrail_datapath::transfer::{Peer, RemoteBuffers};
use moonrail_datapath::units::{Gid, Nanos, NicId, PeerId, PeerNicId, RailId};
use serde_json::{Value, json};

use crate::host::median;
use crate::null::NullNic;
use crate::pieces::pieces;
use crate::record::Found;
use crate::rig;

/// A batch that is not over after this is a fault of the engine, not a slow one.
const STUCK: Duration = Duration::from_secs(60);
/// Bytes of a block, and slices of a batch of the core's.
const BLOCK: u64 = 4096;
const BATCH: u64 = 32;

pub(crate) fn run(quick: bool) -> Result<Found, Box<dyn Error>> {
    let repetitions = if quick { 1 } else { 7 };
    let counts = |most: u64| {
        let sizes = [1u64, 16, 256, 1024, 4096, 16_384, 100_000];
        sizes.into_iter().filter(move |&count| count <= if quick { most.min(16) } else { most })
    };
    let mut series = Vec::new();
    for _ in 0..repetitions {
        for count in counts(4096) {
            rails(count, quick, &mut series)?;
        }
        for count in counts(100_000) {
            transfers(count, quick, &mut series)?;
        }
        for count in counts(100_000) {
            regions(count, &mut series)?;
        }
    }
    Ok(Found { unit: "nanoseconds", cases: series.iter_mut().map(Series::case).collect() })
}

/// What one thing took, over the repetitions.
struct Series {
    what: &'static str,
    count: u64,
    nanos: Vec<f64>,
}

impl Series {
    fn case(&mut self) -> Value {
        let middle = median(&mut self.nanos);
        let (low, high) = (self.nanos[0], self.nanos[self.nanos.len() - 1]);
        println!("{:<52} {:>6} {middle:>12.1} ns ({low:.1}-{high:.1})", self.what, self.count);
        json!({
            "what": self.what, "count": self.count, "repetitions": self.nanos.len(), "ns": middle, "ns_min": low, "ns_max": high,
        })
    }
}

fn note(series: &mut Vec<Series>, what: &'static str, count: u64, nanos: f64) {
    match series.iter_mut().find(|series| series.what == what && series.count == count) {
        Some(series) => series.nanos.push(nanos),
        None => series.push(Series { what, count, nanos: vec![nanos] }),
    }
}

/// Nanoseconds of each of `times`.
fn each(times: u64, mut what: impl FnMut() -> Result<(), Box<dyn Error>>) -> Result<f64, Box<dyn Error>> {
    let began = Instant::now();
    for _ in 0..times {
        what()?;
    }
    Ok(began.elapsed().as_nanos() as f64 / times as f64)
}

// ---- rails of one core ----

/// A core without a thread, one rail of one queue pair to each of its peers.
struct Turned {
    core: Core,
    inboxes: Arc<[Arc<Inbox>]>,
    outbox: Arc<Outbox>,
    now: Nanos,
    region: Arc<Registered>,
    peers: Vec<Arc<RemoteBuffers>>,
    /// Control's halves, which destroy the queue pairs with themselves.
    _admins: Vec<AdminHalf>,
}

impl Turned {
    fn new(rails: u64, series: &mut Vec<Series>) -> Result<Self, Box<dyn Error>> {
        let nic: Arc<dyn Nic> = NullNic::new("null0", rig::GID);
        let (cq, handle) = nic.create_cq(4096)?;
        let rig::Lone { core, inboxes, outbox, .. } = rig::lone(cq)?;
        let bytes = (BATCH * BLOCK) as usize;
        let region = rig::region(nic.as_ref(), bytes)?;
        let (mut peers, mut admins) = (Vec::new(), Vec::new());
        for number in 0..rails as u32 {
            let (qp, admin) = rig::connected(nic.as_ref(), &handle)?;
            let peer = Peer::new(PeerId(number), format!("peer{number}"));
            let key = RailKey { rail: RailId(number), life: 0 };
            let counters = Arc::new(RailCounters::default());
            let rail =
                RailSpec { key, peer: peer.clone(), nic: NicId(0), peer_nic: PeerNicId(0), counters, claims: true };
            if inboxes[0].command(Command::Adopt { rail, qp }).is_err() {
                return Err("the core's command ring is full".into());
            }
            peers.push(rig::remote(&peer, bytes));
            admins.push(admin);
        }
        let mut turned = Self { core, inboxes, outbox, now: Nanos(1), region, peers, _admins: admins };
        let began = Instant::now();
        turned.turn();
        note(series, "a rail adopted", rails, began.elapsed().as_nanos() as f64 / rails as f64);
        while turned.peers.iter().any(|peer| peer.peer.routes() == 0) {
            turned.later();
            if began.elapsed() > STUCK {
                return Err("a rail is not proven".into());
            }
        }
        Ok(turned)
    }

    fn turn(&mut self) {
        self.core.poll_once(self.now);
        while let Some(event) = self.outbox.next() {
            if let CoreEvent::Finished(work) = event {
                work.completion().wake();
            }
        }
    }

    /// A turn in which the watch is due.
    fn later(&mut self) {
        self.now = self.now.plus(Nanos::from_millis(1));
        self.turn();
    }

    /// A batch to one peer, until it is over.
    fn batch(&mut self, peer: usize) -> Result<(), Box<dyn Error>> {
        let starts: [u64; BATCH as usize] = std::array::from_fn(|n| n as u64 * BLOCK);
        let work = rig::work(&self.region, &self.peers[peer], &starts, BLOCK, self.now)?;
        dispatch(work.clone(), &self.inboxes).map_err(|_| "the core's ring is full")?;
        for _ in 0..1000 {
            self.turn();
            if work.completion().is_done() {
                return Ok(());
            }
        }
        Err("a batch did not end".into())
    }
}

fn rails(count: u64, quick: bool, series: &mut Vec<Series>) -> Result<(), Box<dyn Error>> {
    let rounds = if quick { 10 } else { 20_000 };
    let mut turned = Turned::new(count, series)?;
    // The pages and the branches of a batch, met once.
    each(rounds / 10, || turned.batch(0))?;
    let idle = each(rounds, || {
        turned.turn();
        Ok(())
    })?;
    note(series, "a turn that finds nothing, beside so many rails", count, idle);
    let watch = each(rounds / 10, || {
        turned.later();
        Ok(())
    })?;
    note(series, "the same with the watch, each millisecond", count, watch);
    let one = each(rounds, || turned.batch(0))?;
    note(series, "32 slices of a batch to one peer, beside so many rails", count, one);
    let mut next = 0;
    let all = each(rounds, || {
        next = (next + 1) % count as usize;
        turned.batch(next)
    })?;
    note(series, "the same to one peer after the other", count, all);
    Ok(())
}

// ---- engines ----

fn engine(uri: &str, name: &str, node: u8) -> Result<Engine, Box<dyn Error>> {
    let gid = Gid([0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 10, 0, 0, node]);
    let nics: Vec<Arc<dyn Nic>> = vec![NullNic::new("null0", gid)];
    let builder = Engine::builder().environment(|_| None).name(name).metadata(uri).nics_from(nics);
    Ok(builder.cores(1).pin_cores(false).log_level(Level::Error).build()?)
}

/// Two engines that find each other in this process.
fn pair(of: &str) -> Result<[Engine; 2], Box<dyn Error>> {
    let uri = format!("memory://scale-{of}");
    Ok([engine(&uri, "near", 1)?, engine(&uri, "far", 2)?])
}

fn transfers(count: u64, quick: bool, series: &mut Vec<Series>) -> Result<(), Box<dyn Error>> {
    let [near, far] = pair("transfers")?;
    let ours = near.allocate((count * 2 * BLOCK) as usize, "*")?;
    let theirs = far.allocate((count * 2 * BLOCK) as usize, "*")?.addr();
    let segment = near.open_segment("far")?;
    // Every other block, so that no two are neighbours.
    let transfer = |n: u64| Transfer::write_from(&ours, n * 2 * BLOCK, theirs + n * 2 * BLOCK, BLOCK);
    let transfers: Vec<Transfer> = (0..count).map(transfer).collect();
    let (mut submit, mut whole) = (Vec::new(), Vec::new());
    for _ in 0..if quick { 2 } else { 20 + 20_000 / count } {
        let began = Instant::now();
        let batch = near.submit(&segment, &transfers)?;
        submit.push(began.elapsed().as_nanos() as f64 / count as f64);
        batch.wait(STUCK)?;
        whole.push(began.elapsed().as_nanos() as f64 / count as f64);
    }
    note(series, "a transfer of a batch of so many, submitted", count, median(&mut submit));
    note(series, "the same until it is over", count, median(&mut whole));
    Ok(())
}

fn regions(count: u64, series: &mut Vec<Series>) -> Result<(), Box<dyn Error>> {
    let [near, far] = pair("regions")?;
    let (ours, theirs) = (pieces(count, BLOCK as usize), pieces(count, BLOCK as usize));
    let began = Instant::now();
    let near_regions = near.register_many(&ours, "*", true)?;
    note(series, "a region of so many registered in one call", count, began.elapsed().as_nanos() as f64 / count as f64);
    let far_regions = far.register_many(&theirs, "*", true)?;
    let began = Instant::now();
    let segment = near.open_segment("far")?;
    note(series, "a peer's region read from the metadata", count, began.elapsed().as_nanos() as f64 / count as f64);
    let mut next = 0;
    let write = |next: u64| {
        let at = |regions: &[Region]| regions[next.wrapping_mul(7919) as usize % regions.len()].clone();
        let transfer = Transfer::write_from(&at(&near_regions), 0, at(&far_regions).addr(), BLOCK);
        near.submit(&segment, &[transfer])?.wait(STUCK)?;
        Ok(())
    };
    write(0)?;
    let beside = each(2000, || {
        next += 1;
        write(next)
    })?;
    note(series, "a WRITE beside so many regions of both", count, beside);
    let one = each(5, || {
        let region = near.allocate(BLOCK as usize, "*")?;
        near.unregister(&region)?;
        Ok(())
    })?;
    note(series, "one more region registered and taken back", count, one);
    let began = Instant::now();
    near.unregister_many(&near_regions)?;
    note(series, "a region of so many taken back in one call", count, began.elapsed().as_nanos() as f64 / count as f64);
    Ok(())
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_quick_run_measures_every_case() {
        let found = super::run(true).unwrap();
        // Five things of rails, two of transfers and five of regions, with 1 and with 16.
        assert_eq!(found.cases.len(), 2 * (5 + 2 + 5));
        assert!(found.cases.iter().all(|case| case["ns"].as_f64().unwrap() > 0.0));
    }
}
