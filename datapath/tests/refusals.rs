//! Devices that refuse, or fail in ways no simulated network has: scripted, one post at a time.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};

use moonrail_datapath::core::{
    Command, Core, CoreConfig, CoreEvent, Doorbell, Inbox, Outbox, PollMode, RailKey, RailSpec, dispatch, run,
};
use moonrail_datapath::error::{Cause, SliceError};
use moonrail_datapath::limits::POSTS_MAX;
use moonrail_datapath::nic::{
    AdminQp, Completion, CompletionQueue, InitAttr, Op, PostQp, Posted, Qp, RawQp, RtrAttr, RtsAttr, WcStatus,
    WorkRequest,
};
use moonrail_datapath::region::{Chunk, Memory, Region};
use moonrail_datapath::slice::{Extent, Slice};
use moonrail_datapath::transfer::{Peer, RemoteBuffer, RemoteBuffers, Route};
use moonrail_datapath::units::{
    CoreId, Gid, GidIndex, Lid, Lkey, Mtu, Nanos, NicId, PeerId, PeerNicId, PortNum, Qpn, RailId, RemoteAddr, Rkey,
    RqPsn, SqPsn,
};
use moonrail_datapath::work::{Completion as BatchWord, TransferStatus, Work, WorkParts};

const ENOMEM: i32 = 12;
const EIO: i32 = 5;

/// What the device was given, what it does next, and what it has to say.
#[derive(Default)]
struct Device {
    /// Each post takes one: how many requests it accepts at the most, and the errno. None left: everything is accepted.
    script: VecDeque<(usize, i32)>,
    posted: VecDeque<WorkRequest>,
    completions: VecDeque<Completion>,
}

impl Device {
    /// The `count` oldest requests are done; those that asked say so.
    fn complete(&mut self, count: usize) {
        for request in self.posted.drain(..count) {
            if request.signaled {
                let done = Completion { wr_id: request.wr_id, ..Completion::EMPTY };
                self.completions.push_back(done);
            }
        }
    }
}

impl Device {
    /// The oldest request comes back flushed.
    fn flush(&mut self) {
        let request = self.posted.pop_front().expect("something is posted");
        let flushed = Completion { wr_id: request.wr_id, status: WcStatus::WR_FLUSH_ERR, ..Completion::EMPTY };
        self.completions.push_back(flushed);
    }
}

type Shared = Arc<Mutex<Device>>;

struct FakeQp(Shared);

impl RawQp for FakeQp {
    fn qpn(&self) -> Qpn {
        Qpn::default()
    }
    fn to_init(&mut self, _: &InitAttr) -> io::Result<()> {
        Ok(())
    }
    fn to_rtr(&mut self, _: &RtrAttr) -> io::Result<()> {
        Ok(())
    }
    fn to_rts(&mut self, _: &RtsAttr) -> io::Result<()> {
        Ok(())
    }
    fn split(self: Box<Self>) -> (Box<dyn PostQp>, Box<dyn AdminQp>) {
        (Box::new(Self(self.0.clone())), self)
    }
}

impl AdminQp for FakeQp {
    fn qpn(&self) -> Qpn {
        Qpn::default()
    }
    fn to_error(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl PostQp for FakeQp {
    fn qpn(&self) -> Qpn {
        Qpn::default()
    }
    fn depth(&self) -> u32 {
        64
    }
    fn max_inline(&self) -> u32 {
        0
    }
    fn post(&mut self, chain: &[WorkRequest]) -> Posted {
        let mut device = self.0.lock().unwrap();
        let (accepted, error) = match device.script.pop_front() {
            Some((most, errno)) => (most.min(chain.len()), Some(errno)),
            None => (chain.len(), None),
        };
        device.posted.extend(&chain[..accepted]);
        Posted { accepted, error }
    }
}

struct FakeCq {
    device: Shared,
    /// Set: the descriptor of a channel that can no longer be read.
    broken: Option<UnixStream>,
}

impl CompletionQueue for FakeCq {
    fn depth(&self) -> u32 {
        256
    }
    fn poll(&mut self, out: &mut [Completion]) -> io::Result<usize> {
        let mut device = self.device.lock().unwrap();
        let count = out.len().min(device.completions.len());
        for (slot, completion) in out.iter_mut().zip(device.completions.drain(..count)) {
            *slot = completion;
        }
        Ok(count)
    }
    fn arm(&mut self) -> io::Result<()> {
        Ok(())
    }
    fn event_fd(&self) -> Option<BorrowedFd<'_>> {
        self.broken.as_ref().map(AsFd::as_fd)
    }
    fn clear_events(&mut self) -> io::Result<()> {
        Err(io::Error::from_raw_os_error(EIO))
    }
}

struct Bench {
    device: Shared,
    core: Core,
    inbox: Arc<Inbox>,
    outbox: Arc<Outbox>,
    peer: Arc<Peer>,
    now: Nanos,
    /// Lives of the rail so far.
    lives: u32,
    /// In the order the core told.
    first_errors: Vec<moonrail_datapath::error::FirstError>,
}

impl Bench {
    /// One core with one NIC; `broken` breaks its completion channel.
    fn new(broken: Option<UnixStream>) -> Self {
        let device = Shared::default();
        let inbox = Inbox::new(CoreId(0)).unwrap();
        let outbox = Outbox::new(Arc::new(Doorbell::new().unwrap()));
        let cq = FakeCq { device: device.clone(), broken };
        let core = Core::new(CoreConfig {
            id: CoreId(0),
            inbox: inbox.clone(),
            outbox: outbox.clone(),
            cores: Arc::new([inbox.clone()]),
            nics: vec![(NicId(0), Box::new(cq))],
            counters: Arc::default(),
        });
        let (peer, now) = (Peer::new(PeerId(0), "b".into()), Nanos::from_millis(1));
        Self { device, core, inbox, outbox, peer, now, lives: 0, first_errors: vec![] }
    }

    /// Hands the core the next life of a rail, one queue pair.
    fn adopt(&mut self) {
        let init = Qp::new(Box::new(FakeQp(self.device.clone()))).init(&InitAttr { port: PortNum(1), pkey_index: 0 });
        let rtr = RtrAttr {
            path_mtu: Mtu::B4096,
            dest_qpn: Qpn::default(),
            rq_psn: RqPsn::STOCK,
            max_dest_rd_atomic: 16,
            min_rnr_timer: 12,
            dest_gid: Gid::ZERO,
            dest_lid: Lid(0),
            sgid_index: GidIndex(0),
            hop_limit: 16,
            traffic_class: 0,
            service_level: 0,
            port: PortNum(1),
        };
        let rts = RtsAttr { timeout: 14, retry_cnt: 6, rnr_retry: 7, sq_psn: SqPsn::STOCK, max_rd_atomic: 16 };
        let (qp, _) = init.unwrap().rtr(&rtr).unwrap().rts(&rts).unwrap().split();
        let rail = RailSpec {
            key: RailKey { rail: RailId(0), life: self.lives },
            peer: self.peer.clone(),
            nic: NicId(0),
            peer_nic: PeerNicId(0),
            counters: Arc::default(),
            claims: true,
        };
        self.lives += 1;
        self.inbox.command(Command::Adopt { rail, qp }).ok().unwrap();
        self.turn();
    }

    /// As [`Bench::adopt`], and the trial comes back.
    fn connect(&mut self) {
        self.adopt();
        self.device.lock().unwrap().complete(1);
        self.turn();
        assert_eq!(self.peer.routes(), 1);
    }

    fn turn(&mut self) {
        self.now = self.now.plus(Nanos::from_micros(1));
        self.core.poll_once(self.now);
        while let Some(event) = self.outbox.next() {
            if let CoreEvent::FirstError { error, .. } = event {
                self.first_errors.push(error);
            }
        }
    }

    /// A READ of `slices` slices of 64 bytes, each a transfer.
    fn submit(&self, slices: u32) -> Arc<Work> {
        let memory = Memory::allocate(4096).unwrap();
        let registration = moonrail_datapath::nic::Registration { lkey: Lkey(1), rkey: Rkey(1), guard: Box::new(()) };
        let chunk = Chunk { addr: memory.addr(), len: 4096, keys: Box::new([Some(registration.into())]) };
        let buffer = RemoteBuffer {
            extent: Extent { addr: 0, len: 4096 },
            rkeys: Box::new([Some(Rkey(2))]),
            open: false,
            location: "cpu:0".into(),
        };
        let slice =
            |i| Slice { local: memory.addr(), remote: RemoteAddr(0), len: 64, chunk: 0, buffer: 0, transfer: i };
        let work = Work::new(WorkParts {
            op: Op::Read,
            slices: (0..slices).map(slice).collect(),
            transfers: vec![64; slices as usize].into(),
            local: Arc::new(Region::new(memory.clone(), vec![chunk], "*".into(), false)),
            remote: Arc::new(RemoteBuffers::new(self.peer.clone(), Route::any(), vec![buffer])),
            submitted: Nanos::ZERO,
            deadline: Nanos::FAR,
            cores: 1,
            retries: 9,
            completion: BatchWord::new(1),
        });
        dispatch(work.clone(), std::slice::from_ref(&self.inbox)).ok().unwrap();
        work
    }
}

/// (past) Each refusal counted as a posting, so a queue that was full for 16 turns failed the slices as *bad request*.
#[test]
fn a_full_send_queue_costs_a_slice_nothing_however_long() {
    let mut bench = Bench::new(None);
    bench.connect();
    let first = bench.submit(4);
    bench.turn();
    assert_eq!(bench.device.lock().unwrap().posted.len(), 4);
    let second = bench.submit(4);
    bench.device.lock().unwrap().script.extend([(0, ENOMEM); 100]);
    for _ in 0..100 {
        bench.turn();
    }
    assert!(!second.is_terminal() && bench.first_errors.is_empty(), "nothing failed: it waits");
    bench.device.lock().unwrap().complete(4);
    bench.turn();
    bench.turn();
    bench.device.lock().unwrap().complete(4);
    bench.turn();
    assert!(first.is_terminal() && second.is_terminal());
    assert!(second.transfers().iter().all(|t| t.status() == TransferStatus::Done));
}

#[test]
fn what_came_back_before_a_cancel_is_not_posted_after_it() {
    let mut bench = Bench::new(None);
    bench.connect();
    bench.submit(4);
    bench.turn();
    let work = bench.submit(4);
    bench.device.lock().unwrap().script.push_back((0, ENOMEM));
    bench.turn();
    work.abandon(SliceError::of(Cause::Cancelled));
    assert!(!work.is_terminal(), "its slices were claimed, and lie in the return map");
    bench.turn();
    bench.turn();
    assert_eq!(bench.device.lock().unwrap().posted.len(), 4, "those of the first Work");
    assert!(work.is_terminal());
    assert_eq!(work.transfers()[0].status(), TransferStatus::Failed(SliceError::of(Cause::Cancelled)));
}

/// Soft-RoCE puts the requests in its queue, and then only its doorbell fails: nothing of them is refused, and nothing
/// is sure to complete. The queue pair is failed, so that control drains or destroys it.
#[test]
fn a_post_that_took_everything_and_failed_all_the_same_fails_the_rail() {
    let mut bench = Bench::new(None);
    bench.connect();
    bench.device.lock().unwrap().script.push_back((64, EIO));
    let work = bench.submit(4);
    bench.turn();
    assert_eq!((bench.first_errors.len(), bench.peer.routes()), (1, 0));
    assert_eq!((bench.first_errors[0].status, bench.first_errors[0].vendor_err), (WcStatus::LOC_QP_OP_ERR, 5));
    assert_eq!(bench.core.outstanding(), 4, "they count as posted until they have ended");
    assert!(!work.is_terminal());
}

#[test]
fn a_trial_that_is_refused_fails_the_rail_once() {
    let mut bench = Bench::new(None);
    bench.device.lock().unwrap().script.push_back((0, ENOMEM));
    bench.adopt();
    for _ in 0..2_000 {
        bench.turn();
    }
    assert_eq!((bench.first_errors.len(), bench.peer.routes(), bench.core.outstanding()), (1, 0, 0));
}

/// Requests taken of which the last asked for no completion: how they end can not be known by waiting.
#[test]
fn a_silent_tail_fails_the_rail_and_what_was_refused_goes_back() {
    let mut bench = Bench::new(None);
    bench.connect();
    bench.device.lock().unwrap().script.push_back((2, ENOMEM));
    let work = bench.submit(4);
    bench.turn();
    assert_eq!((bench.first_errors.len(), bench.core.outstanding()), (1, 2));
    assert!(!work.is_terminal());
}

/// A flush costs no retry; a slice that every rail flushes must end all the same.
#[test]
fn a_slice_that_every_rail_flushes_ends_after_its_postings() {
    let mut bench = Bench::new(None);
    bench.connect();
    let work = bench.submit(1);
    let mut postings = 0;
    while !work.is_terminal() && bench.lives < 2 * u32::from(POSTS_MAX) {
        bench.turn();
        if !bench.device.lock().unwrap().posted.is_empty() {
            postings += 1;
            bench.device.lock().unwrap().flush();
            bench.turn();
            bench.connect();
        }
    }
    assert_eq!((work.is_terminal(), postings), (true, POSTS_MAX));
    assert!(matches!(work.transfers()[0].status(), TransferStatus::Failed(_)));
}

/// Slots are used again, and the sequences of each queue pair begin anew: only the generation tells them apart.
#[test]
fn a_late_completion_of_a_slots_former_queue_pair_is_nobodys() {
    let mut bench = Bench::new(None);
    bench.adopt();
    let trial = bench.device.lock().unwrap().posted[0];
    bench.device.lock().unwrap().complete(1);
    bench.turn();
    bench.inbox.command(Command::Retire { key: RailKey { rail: RailId(0), life: 0 } }).ok().unwrap();
    bench.turn();
    bench.adopt();
    let next = bench.device.lock().unwrap().posted[0];
    assert_eq!((next.wr_id.slot, next.wr_id.sequence), (trial.wr_id.slot, trial.wr_id.sequence));
    bench.device.lock().unwrap().completions.push_back(Completion { wr_id: trial.wr_id, ..Completion::EMPTY });
    bench.turn();
    assert_eq!((bench.peer.routes(), bench.core.outstanding()), (0, 1), "its trial is still on its way");
    bench.device.lock().unwrap().complete(1);
    bench.turn();
    assert_eq!((bench.peer.routes(), bench.core.outstanding()), (1, 0));
}

/// A panic may lose completions that were taken from the queue. The next one that comes is of a later request, and must not vouch for those
/// before it.
#[test]
fn what_a_panic_lost_is_not_taken_for_done() {
    for status in [WcStatus::WR_FLUSH_ERR, WcStatus::SUCCESS] {
        let mut bench = Bench::new(None);
        bench.connect();
        let work = bench.submit(4);
        bench.turn();
        let last = *bench.device.lock().unwrap().posted.back().unwrap();
        bench.core.lose(bench.now);
        let told = Completion { wr_id: last.wr_id, status, ..Completion::EMPTY };
        bench.device.lock().unwrap().completions.push_back(told);
        bench.turn();
        bench.now = bench.now.plus(Nanos::from_millis(2));
        bench.turn();
        let done = work.transfers().iter().filter(|transfer| transfer.status() == TransferStatus::Done).count();
        assert_eq!((done, bench.core.outstanding()), (0, 0), "{status:?}");
        assert!(
            matches!(work.transfers()[0].status(), TransferStatus::Failed(error) if error.cause == Cause::CoreLost)
        );
    }
}

/// Control is busy elsewhere for minutes, and Works wait for a rail meanwhile.
#[test]
fn asking_for_rails_leaves_room_for_what_may_not_be_refused() {
    let mut bench = Bench::new(None);
    let _waiting = bench.submit(4);
    for _ in 0..20_000 {
        bench.now = bench.now.plus(Nanos::from_millis(50));
        bench.core.poll_once(bench.now);
    }
    assert!(!bench.outbox.is_empty(), "it asks");
    bench.device.lock().unwrap().script.push_back((0, EIO));
    bench.adopt();
    assert_eq!(bench.first_errors.len(), 1, "control hears of the error all the same");
}

#[test]
fn a_completion_channel_that_breaks_while_the_core_sleeps_is_told() {
    let (broken, mut other) = UnixStream::pair().unwrap();
    io::Write::write_all(&mut other, b"x").unwrap();
    let Bench { core, inbox, outbox, .. } = Bench::new(Some(broken));
    let started = std::time::Instant::now();
    let clock = move || Nanos::from_duration(started.elapsed());
    let thread =
        std::thread::spawn(move || run(Box::new(core), PollMode::Adaptive { spin: Nanos::ZERO }, &clock, &|_| {}));
    let told = (0..200).any(|_| {
        std::thread::sleep(std::time::Duration::from_millis(5));
        std::iter::from_fn(|| outbox.next()).any(|event| matches!(event, CoreEvent::CqLost { nic: NicId(0) }))
    });
    inbox.command(Command::Stop).ok().unwrap();
    thread.join().unwrap();
    assert!(told, "control never heard of the lost queue");
}
