//! What happens in one run, as data: drawn from the seed, so that it can be repeated, printed and cut down.

use moonrail_datapath::nic::Op;
use moonrail_datapath::nic::sim::SimOptions;
use moonrail_datapath::random::Random;
use moonrail_datapath::units::Nanos;

use crate::cluster::Weather;

/// Bytes of the range that one batch works on, at the same place of both nodes.
pub(crate) const SLOT: u64 = 32 << 10;
/// Such ranges.
pub(crate) const SLOTS: usize = 24;

/// The cluster of a run.
#[derive(Clone, Debug)]
pub(crate) struct Shape {
    pub(crate) nodes: usize,
    pub(crate) nics: u8,
    pub(crate) cores: u16,
    pub(crate) p2p: bool,
    pub(crate) network: SimOptions,
}

/// A NIC: which node, which of its NICs.
pub(crate) type Port = (usize, usize);

/// What a path between two NICs does.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Path {
    Whole,
    /// Nothing passes; the devices say so when they have retried enough.
    Cut,
    /// Nothing passes, and no device ever says so.
    Silent,
    /// A percentage of the packets is lost, all of them are late.
    Rough {
        loss: u8,
        delay: Nanos,
    },
}

/// One thing that is done to the cluster.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Act {
    Open {
        from: usize,
        to: usize,
        fresh: bool,
    },
    Submit {
        from: usize,
        to: usize,
        op: Op,
        slot: usize,
        len: u64,
        piece: u64,
        within: Nanos,
    },
    /// The caller cancels one of the batches under way, or drops it.
    Cancel {
        nth: u64,
    },
    Link {
        port: Port,
        up: bool,
    },
    Path {
        ends: (Port, Port),
        path: Path,
    },
    Kill {
        node: usize,
    },
    Restart {
        node: usize,
    },
    Freeze {
        node: usize,
    },
    Thaw {
        node: usize,
    },
    /// The address moves to another place of the GID table.
    MoveGid {
        port: Port,
    },
    Weather(Weather),
    /// No fault, but a broken promise: a byte changes that nobody was asked to change. Never drawn.
    Spoil {
        node: usize,
        slot: usize,
    },
    /// The address is deleted.
    TakeGid {
        port: Port,
    },
    /// It is added again, at another place.
    ReturnGid {
        port: Port,
    },
    /// The device fails for good.
    FailDevice {
        port: Port,
    },
    /// The device's completion queues lose what they hold.
    Overrun {
        port: Port,
    },
    Store {
        up: bool,
    },
    WipeStore,
    LoseLease {
        node: usize,
    },
    /// The watch of the store tells that it may have missed something.
    TellMissed,
}

#[derive(Clone, Debug)]
pub(crate) struct Plan {
    pub(crate) seed: u64,
    pub(crate) shape: Shape,
    /// In order of time.
    pub(crate) steps: Vec<(Nanos, Act)>,
}

/// How long things go wrong.
const CHAOS: Nanos = Nanos::from_secs(5);

impl Plan {
    pub(crate) fn of(seed: u64) -> Self {
        let mut draw = Draw(Random::new(seed ^ 0x0063_6861_6f73));
        let shape = Shape {
            nodes: 2 + draw.0.below(6).saturating_sub(3) as usize,
            nics: 1 + draw.0.below(5).div_ceil(2) as u8,
            cores: 1 + draw.0.below(2) as u16,
            p2p: draw.0.below(2) == 0,
            network: SimOptions {
                delay: Nanos::from_micros(draw.one_of(&[5, 100, 2_000])),
                jitter: Nanos::from_micros(draw.one_of(&[0, 5, 200])),
                bytes_per_second: draw.one_of(&[4_000_000, 40_000_000, 1_000_000_000]),
                retry_time: Nanos::from_millis(draw.one_of(&[20, 100, 480])),
                late_writes: draw.one_of(&[0, 50, 100]) as f64 / 100.0,
                late_by: Nanos::from_millis(draw.one_of(&[5, 200, 1_500])),
                reuse_numbers: true,
                ..SimOptions::default()
            },
        };
        let mut plan = Self { seed, shape, steps: vec![] };
        plan.traffic(&mut draw);
        for _ in 0..draw.0.below(8) {
            plan.fault(&mut draw);
        }
        plan.steps.sort_by_key(|(at, _)| *at);
        plan
    }

    /// The same with some of the acts only.
    pub(crate) fn only(&self, numbers: &[usize]) -> Self {
        let steps = numbers.iter().filter_map(|number| self.steps.get(*number).copied()).collect();
        Self { steps, ..self.clone() }
    }

    fn add(&mut self, at: Nanos, act: Act) {
        self.steps.push((at, act));
    }

    fn traffic(&mut self, draw: &mut Draw) {
        for from in 0..self.shape.nodes {
            for to in (0..self.shape.nodes).filter(|to| *to != from) {
                self.add(Nanos::from_millis(draw.0.below(50)), Act::Open { from, to, fresh: false });
            }
        }
        for _ in 0..4 + draw.0.below(24) {
            let at = draw.time(CHAOS);
            self.submit(at, draw);
        }
    }

    fn submit(&mut self, at: Nanos, draw: &mut Draw) {
        let (from, to) = draw.two(self.shape.nodes);
        let op = if draw.0.below(2) == 0 { Op::Read } else { Op::Write };
        let len = 1 + draw.0.below(SLOT);
        let piece = if draw.0.below(3) == 0 { len } else { 256 + draw.0.below(4096) };
        let within = match draw.0.below(4) {
            0 => Nanos::from_millis(1 + draw.0.below(400)),
            _ => Nanos::from_secs(60),
        };
        self.add(at, Act::Submit { from, to, op, slot: draw.0.below(SLOTS as u64) as usize, len, piece, within });
        if draw.0.below(6) == 0 {
            self.add(at.plus(draw.time(Nanos::from_millis(20))), Act::Cancel { nth: draw.0.below(1 << 20) });
        }
    }

    /// A fault, batches just before it, and, mostly, its end.
    fn fault(&mut self, draw: &mut Draw) {
        let at = draw.time(CHAOS);
        for _ in 0..draw.0.below(5) {
            self.submit(Nanos(at.0.saturating_sub(draw.0.below(5_000_000))), draw);
        }
        let lasts = draw.one_of(&[1, 50, 700, 3_000]);
        let over = at.plus(Nanos::from_millis(1 + draw.0.below(lasts)));
        let (node, other) = draw.two(self.shape.nodes);
        let port = (node, draw.0.below(self.shape.nics.into()) as usize);
        let ends = (port, (other, draw.0.below(self.shape.nics.into()) as usize));
        let (fault, end) = match draw.0.below(18) {
            0 | 1 => (Act::Link { port, up: false }, Some(Act::Link { port, up: true })),
            2 | 3 => (Act::Path { ends, path: Path::Cut }, Some(Act::Path { ends, path: Path::Whole })),
            4 => (Act::Path { ends, path: Path::Silent }, Some(Act::Path { ends, path: Path::Whole })),
            5 | 6 => (Act::Kill { node }, Some(Act::Restart { node })),
            7 => (Act::Freeze { node }, Some(Act::Thaw { node })),
            8 => (Act::MoveGid { port }, None),
            9 => (Act::Store { up: false }, Some(Act::Store { up: true })),
            10 => (Act::WipeStore, None),
            11 => (Act::LoseLease { node }, None),
            12 => (Act::TellMissed, None),
            13 => (Act::TakeGid { port }, Some(Act::ReturnGid { port })),
            14 | 15 => {
                let (loss, delay) = (draw.one_of(&[5, 5, 40]) as u8, Nanos::from_millis(draw.one_of(&[0, 5, 50])));
                (Act::Path { ends, path: Path::Rough { loss, delay } }, Some(Act::Path { ends, path: Path::Whole }))
            }
            16 if draw.0.below(3) == 0 => (Act::FailDevice { port }, None),
            16 if draw.0.below(2) == 0 => (Act::Overrun { port }, None),
            _ => (Act::Weather(draw.weather()), Some(Act::Weather(Weather::default()))),
        };
        // A flapping link is the same fault again and again.
        let again = matches!(fault, Act::Link { .. }) && draw.0.below(3) == 0;
        for round in 0..if again { 4 } else { 1 } {
            let later = Nanos(over.since(at).0 * 2 * round);
            self.add(at.plus(later), fault);
            if let Some(end) = end
                && (again || draw.0.below(8) > 0)
            {
                self.add(over.plus(later), end);
            }
        }
    }
}

/// Choices of a plan.
struct Draw(Random);

impl Draw {
    fn one_of(&mut self, values: &[u64]) -> u64 {
        values[self.0.below(values.len() as u64) as usize]
    }

    fn time(&mut self, within: Nanos) -> Nanos {
        Nanos(self.0.below(within.0))
    }

    /// Two different numbers below `n`.
    fn two(&mut self, n: usize) -> (usize, usize) {
        let a = self.0.below(n as u64) as usize;
        (a, (a + 1 + self.0.below(n as u64 - 1) as usize) % n)
    }

    fn weather(&mut self) -> Weather {
        let mut percent = |most| if self.0.below(2) == 0 { 0 } else { self.0.below(most) };
        Weather {
            lost_requests: percent(50),
            lost_replies: percent(50),
            doubled: percent(100),
            late: percent(30),
            corrupted: percent(30),
            store_errors: percent(60),
            missed_changes: percent(100),
            slow_jobs: percent(40),
            missed_turns: percent(90),
            words_take: Nanos::from_millis(percent(400)),
        }
    }
}
