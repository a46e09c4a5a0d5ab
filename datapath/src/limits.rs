//! Every depth and batch size of the datapath, with its reason and its relation to the others.

use crate::units::Nanos;

/// Send-queue entries per queue pair: the reference engine's value, so that both ends of a rail ask devices for the same.
pub const SQ_DEPTH: u32 = 256;

/// One work request in this many asks for a completion, which also retires the unsignalled ones before it.
pub const SIGNAL_EVERY: u32 = 32;

/// Longest chain posted with one doorbell.
pub const CHAIN_MAX: usize = 64;

/// Completions taken from one queue in one call.
pub const POLL_BATCH: usize = 64;

/// Polls of one NIC's queue in one turn at the most, so that a flood on one NIC does not starve the others.
pub const POLLS_PER_TURN: usize = 4;

/// Completion-queue entries per core and NIC where the device allows: what a stock node asks for.
pub const CQ_DEPTH: u32 = 4096;

/// Queue pairs one rail may have; MC_NUM_QP_PER_EP beyond it is refused by the builder.
pub const QPS_PER_RAIL_MAX: usize = 16;

/// Queue-pair slots per core: `wr_id` gives them 16 bits, and each needs at most one incident and one drained event.
pub const QP_SLOTS: usize = 4096;

/// Works one core keeps at once; more stay in its ring.
pub const ACTIVE_WORKS: usize = 4096;

/// Entries of a core's work ring. A full ring makes submit answer *busy*.
pub const WORK_RING: usize = 4096;

/// Entries of a core's command ring: every queue pair adopted and retired at once.
pub const COMMAND_RING: usize = 2 * QP_SLOTS;

/// Rails that control asks back at once: each may be told to be in use.
pub const YIELDS_MAX: usize = 16;

/// Places of a core's event ring that only rails take: each slot may have a proven rail, its first error and a drained,
/// yielded or overdue queue pair to tell, and none of these can be refused. The rest is for the few things a core tells once.
pub const EVENTS_OF_RAILS: usize = 3 * QP_SLOTS + YIELDS_MAX + 64;

/// Entries of a core's event ring: what rails tell, and every active work reported finished.
pub const EVENT_RING: usize = EVENTS_OF_RAILS + ACTIVE_WORKS;

/// Bytes of one slice unless MC_SLICE_SIZE says otherwise (the reference engine's value).
pub const SLICE_SIZE: u32 = 65_536;

/// A remainder up to this many bytes beyond a slice is not cut off (the reference engine's fragment limit).
pub const FRAGMENT_LIMIT: u32 = 16_384;

/// Times a slice is posted at the most, whatever sent it back.
pub const POSTS_MAX: u8 = 16;

/// Retries of a slice after failures that were its own (MC_RETRY_CNT), flushes not counted.
pub const RETRIES: u8 = 9;

/// In-flight bytes a rail may always have: eight slices, so that a quarter of it still is two signalled runs of 4 KiB.
pub const CAP_FLOOR: u64 = 8 * SLICE_SIZE as u64;

/// In-flight bytes a rail never exceeds: a 400 Gb/s port with 80 us of delay.
pub const CAP_CEILING: u64 = 4 << 20;

/// Works below this size go before larger ones on each peer's queue.
pub const SMALL_WORK: u64 = 64 << 10;

/// Bytes a large Work may claim before the next large Work of the same peer has its turn.
pub const QUANTUM: u64 = 256 << 10;

/// How often a core looks at deadlines, parked Works and counters.
pub const WATCH_PERIOD: Nanos = Nanos::from_millis(1);

/// A queue pair in ERR that has not given back everything after this is destroyed; that is then the outcome.
pub const DRAIN_LIMIT: Nanos = Nanos::from_secs(5);

/// A queue pair with requests outstanding that gives no completion for this long has stalled, though its device says
/// nothing. A device that does speak must come first: it may wait four times the ACK timeout before each of its attempts
/// (IBA 9.7.6.1.3), 1.9 s in all, and some round short timeouts up: with half a second each, 3.5 s.
pub const STALL_AFTER: Nanos = Nanos::from_secs(4);

/// A trial that took longer says nothing of the path's round trip: its device has sent it again, or the path was away
/// meanwhile. No path that is of use is slower.
pub const TRIAL_ROUND_TRIP_MAX: Nanos = Nanos::from_millis(1_500);

/// On a path slower than that, a queue pair may be silent for this many round trips of a nearly empty rail.
pub const STALL_ROUND_TRIPS: u64 = 16;

/// And for this much longer per byte that its rail has in flight: 31 MB/s. It matters for slices of many megabytes only.
pub const STALL_NANOS_PER_BYTE: u64 = 32;

/// What is on its way when its batch is cancelled, or over its deadline, may take this long without a completion, before its
/// queue pair is given up and all it holds is flushed. A packet that was lost costs an ACK timeout, up to 268 ms: that is no
/// reason. A rail that moves is never given up.
pub const CANCEL_GRACE: Nanos = Nanos::from_millis(300);

/// On a slower path: this many round trips.
pub const CANCEL_ROUND_TRIPS: u64 = 4;

/// What one look of a core adds to a queue pair's silence at the most. A core that was stopped with its process or machine
/// has not been listening, and the device may have been stopped with it.
pub const STALL_STEP: Nanos = Nanos::from_millis(100);

/// A core asks control for a rail to the same peer at most this often.
pub const WANT_PERIOD: Nanos = Nanos::from_millis(50);

/// Default deadline of a batch (MC_TRANSFER_TIMEOUT), plus 1 ns per byte.
pub const DEFAULT_DEADLINE: Nanos = Nanos::from_secs(30);

/// ACK timeout code of our queue pairs: 4.096 us × 2^14 = 67 ms.
pub const ACK_TIMEOUT: u8 = 14;

/// Transport retries of our queue pairs. 7 means *for ever* on Soft-RoCE, so it is 6, towards stock peers too.
pub const RETRY_CNT: u8 = 6;

const _: () = assert!(SQ_DEPTH >= 2 * SIGNAL_EVERY, "an unsignalled run must never fill the send queue");
const _: () = assert!(CHAIN_MAX as u32 <= SQ_DEPTH, "a chain must fit an empty send queue");
const _: () = assert!(
    CAP_FLOOR / 4 >= SIGNAL_EVERY as u64 * 4096,
    "the byte rule must not signal 4 KiB requests more often than the count"
);
const _: () = assert!(CAP_FLOOR <= CAP_CEILING);
const _: () =
    assert!(CANCEL_GRACE.0 > 4 * (4096 << ACK_TIMEOUT), "one lost packet is no reason to give up a queue pair");
const _: () = assert!(CANCEL_GRACE.0 < STALL_AFTER.0 && CANCEL_ROUND_TRIPS <= STALL_ROUND_TRIPS);
const _: () = assert!(
    STALL_AFTER.0 - STALL_STEP.0 > 4 * (4096 << ACK_TIMEOUT) * (RETRY_CNT as u64 + 1),
    "a device that gives up by itself does so before the stall watch"
);
const _: () =
    assert!(STALL_STEP.0 >= WATCH_PERIOD.0 && STALL_STEP.0 * 10 <= STALL_AFTER.0, "silence is heard in many looks");
const _: () = assert!(QP_SLOTS <= u16::MAX as usize + 1, "a slot has 16 bits in wr_id");
