//! Bytes that never stop: each lane writes a pattern into memory of its own at the peer, reads it back over whatever rails
//! there are, and compares. Nothing but an end of the caller's makes it stop; what goes wrong is counted.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use moonrail::{Engine, Region, Segment, Transfer};
use moonrail_tools::bench::pattern;

/// `count` blocks of `len` bytes, one every `step`.
#[derive(Clone, Copy)]
struct Shape {
    len: u64,
    count: u64,
    step: u64,
}

/// Small ones that do not merge, some of one slice, one of many slices.
const LANES: [Shape; 3] = [
    Shape { len: 4 << 10, count: 16, step: 8 << 10 },
    Shape { len: 64 << 10, count: 4, step: 128 << 10 },
    Shape { len: 1 << 20, count: 1, step: 1 << 20 },
];
/// Memory of one lane at the peer. Locally it has twice that: what it writes, and where it reads.
const ROOM: u64 = 1 << 20;

/// What the peer has to offer to each that moves bytes to it.
pub(crate) const PEER_BYTES: u64 = ROOM * LANES.len() as u64;

/// What all lanes did together.
#[derive(Clone, Default, Debug)]
pub(crate) struct Done {
    pub(crate) batches: u64,
    pub(crate) bytes: u64,
    pub(crate) errors: Vec<String>,
    pub(crate) wrong: u64,
    pub(crate) slowest: Duration,
}

pub(crate) struct Traffic {
    stop: Arc<AtomicBool>,
    lanes: Vec<JoinHandle<Done>>,
}

impl Traffic {
    /// From `at` on in the peer's first buffer; each batch has `deadline`.
    pub(crate) fn start(engine: &Arc<Engine>, peer: &Segment, at: u64, deadline: Duration) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let lanes = (0..).zip(LANES).map(|(index, shape)| {
            let region = engine.allocate(2 * ROOM as usize, "*").unwrap_or_else(|e| panic!("{e}"));
            let (engine, peer, stop) = (Arc::clone(engine), peer.clone(), Arc::clone(&stop));
            let mut lane = Lane { engine, peer, region, shape, at: at + index * ROOM, deadline, done: Done::default() };
            std::thread::spawn(move || {
                for round in 1.. {
                    if stop.load(Ordering::Relaxed) {
                        break;
                    }
                    lane.round(round);
                }
                let _ = lane.engine.unregister(&lane.region);
                lane.done
            })
        });
        Self { lanes: lanes.collect(), stop }
    }

    /// Lets what is under way end.
    pub(crate) fn end(self) -> Done {
        self.stop.store(true, Ordering::Relaxed);
        self.lanes.into_iter().fold(Done::default(), |mut sum, lane| {
            let done = lane.join().expect("a lane does not panic");
            sum.batches += done.batches;
            sum.bytes += done.bytes;
            sum.errors.extend(done.errors);
            sum.wrong += done.wrong;
            sum.slowest = sum.slowest.max(done.slowest);
            sum
        })
    }
}

struct Lane {
    engine: Arc<Engine>,
    peer: Segment,
    region: Region,
    shape: Shape,
    /// Where its room begins at the peer.
    at: u64,
    deadline: Duration,
    done: Done,
}

impl Lane {
    fn round(&mut self, round: u64) {
        let Some(base) = self.peer.buffers().first().map(|buffer| buffer.addr + self.at) else {
            return self.failed("the peer offers no memory".to_owned());
        };
        let Shape { len, count, step } = self.shape;
        let mut bytes = vec![0; len as usize];
        for block in 0..count {
            pattern::fill(&mut bytes, base + block * step, round);
            self.region.write(block * step, &bytes).expect("in the region");
            pattern::poison(&mut bytes, base + block * step, round);
            self.region.write(ROOM + block * step, &bytes).expect("in the region");
        }
        let blocks = |make: fn(&Region, u64, u64, u64) -> Transfer, from: u64| -> Vec<Transfer> {
            (0..count).map(|i| make(&self.region, from + i * step, base + i * step, len)).collect()
        };
        let (writes, reads) = (blocks(Transfer::write_from, 0), blocks(Transfer::read_into, ROOM));
        if !self.carry(&writes) || !self.carry(&reads) {
            return;
        }
        for block in 0..count {
            self.region.read(ROOM + block * step, &mut bytes).expect("in the region");
            if let Err(wrong) = pattern::check(&bytes, base + block * step, round) {
                println!("WRONG BYTES in a block of {len} read back: {wrong:?}");
                self.done.wrong += wrong.wrong;
            }
        }
    }

    fn carry(&mut self, transfers: &[Transfer]) -> bool {
        let began = Instant::now();
        let mut batch = self.engine.batch().deadline(self.deadline);
        for transfer in transfers {
            batch = batch.add(&self.peer, *transfer);
        }
        let ended = match batch.submit() {
            Ok(batch) => batch.wait(2 * self.deadline).map(|()| batch.bytes()).map_err(|e| e.to_string()),
            Err(e) => Err(e.to_string()),
        };
        self.done.slowest = self.done.slowest.max(began.elapsed());
        match ended {
            Ok(bytes) => {
                self.done.batches += 1;
                self.done.bytes += bytes;
                true
            }
            Err(e) => {
                self.failed(e);
                false
            }
        }
    }

    fn failed(&mut self, error: String) {
        println!("a caller's error: {error}");
        self.done.errors.push(error);
        // The peer may be another process by now, with its memory elsewhere.
        let _ = self.peer.refresh();
        std::thread::sleep(Duration::from_millis(100));
    }
}
