//! A bench for the shm NIC: peers are processes, this test binary once more, told what to do line by line.
#![allow(dead_code, unsafe_code)] // each test binary uses a part

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::ptr::NonNull;
use std::sync::Arc;
use std::time::{Duration, Instant};

use moonrail_datapath::nic::shm::ShmNic;
use moonrail_datapath::nic::{
    Access, AdminHalf, Completion, CompletionQueue, CqHandle, DialError, Nic, Op, PostHalf, QpCaps, Registration,
    Target, WcStatus, WorkRequest,
};
use moonrail_datapath::region::Memory;
use moonrail_datapath::units::{Lkey, RemoteAddr, Rkey, WrId};

const PEER: &str = "MOONRAIL_SHM_PEER";
pub(crate) const REMOTE: Access = Access { remote: true, relaxed_ordering: false };
/// No wait of a test is longer.
pub(crate) const PATIENCE: Duration = Duration::from_secs(10);

/// Bytes that depend on where they are and on the seed.
pub(crate) fn pattern(len: usize, seed: u64) -> Vec<u8> {
    (0..len as u64).map(|i| (i.wrapping_mul(0x9e37_79b9) >> 7 ^ seed.wrapping_mul(31)) as u8).collect()
}

pub(crate) fn fill(memory: &Memory, seed: u64) {
    memory.write(0, &pattern(memory.len() as usize, seed)).unwrap();
}

pub(crate) fn holds(memory: &Memory, offset: u64, len: usize, seed: u64) -> bool {
    let mut bytes = vec![0; len];
    memory.read(offset, &mut bytes).unwrap();
    bytes == pattern((offset as usize) + len, seed)[offset as usize..]
}

/// Memory as an embedder has it: from its own allocator, never freed.
pub(crate) fn borrowed(len: usize) -> Arc<Memory> {
    let bytes = Box::leak(vec![0u8; len].into_boxed_slice());
    // SAFETY: leaked, so it stays for ever, and nobody else knows it.
    unsafe { Memory::borrow(NonNull::new(bytes.as_mut_ptr()).unwrap(), len) }
}

/// The body of a peer process; returns at once in the test run itself.
pub(crate) fn peer_main() {
    if std::env::var_os(PEER).is_none() {
        return;
    }
    let nic = ShmNic::open().unwrap();
    let mut regions: HashMap<u64, (Arc<Memory>, Option<Registration>)> = HashMap::new();
    println!("@{} 0", nic.token());
    for line in std::io::stdin().lock().lines() {
        let line = line.unwrap();
        let words: Vec<&str> = line.split(' ').collect();
        let n = |at: usize| words[at].parse::<u64>().unwrap();
        let answer = match words[0] {
            "allocate" | "borrow" => {
                let len = n(1) as usize;
                let memory = if words[0] == "borrow" { borrowed(len) } else { Memory::allocate(len).unwrap() };
                fill(&memory, n(2));
                let registration = nic.register(&memory, 0, len as u64, REMOTE).unwrap();
                let addr = memory.addr();
                regions.insert(addr, (memory, Some(registration)));
                addr
            }
            "holds" => u64::from(holds(&regions[&n(1)].0, n(2), n(3) as usize, n(4))),
            "unregister" => {
                regions.get_mut(&n(1)).unwrap().1 = None;
                0
            }
            // For a while: take the memory back, put a canary in, see whether it stays, offer it again.
            "churn" => {
                let (until, mut rounds) = (Instant::now() + Duration::from_millis(n(2)), 0);
                let (memory, registration) = regions.get_mut(&n(1)).unwrap();
                let len = memory.len();
                let canary = vec![0xee; len as usize];
                let mut seen = canary.clone();
                while Instant::now() < until {
                    drop(registration.take());
                    memory.write(0, &canary).unwrap();
                    for _ in 0..20 {
                        std::hint::spin_loop();
                    }
                    memory.read(0, &mut seen).unwrap();
                    assert!(seen == canary, "a byte landed after the memory was taken back");
                    *registration = Some(nic.register(memory, 0, len, REMOTE).unwrap());
                    if rounds % 8 == 0 {
                        std::thread::sleep(Duration::from_micros(200));
                    }
                    rounds += 1;
                }
                rounds
            }
            // Writes pattern 77 there; 1 if dialling is forbidden.
            "dial" => {
                let mut desk = match Desk::dial(&nic, n(1)) {
                    Ok(desk) => desk,
                    Err(DialError::Forbidden { why }) => {
                        assert!(why.contains("pid namespace"), "{why}");
                        println!("@1 0");
                        continue;
                    }
                    Err(other) => panic!("{other}"),
                };
                let memory = Memory::allocate(4096).unwrap();
                fill(&memory, 77);
                desk.succeed(Op::Write, &[(memory.addr(), n(2), 4096)]);
                0
            }
            "refused" => u64::from(matches!(Desk::dial(&nic, n(1)), Err(DialError::Io { .. }))),
            // SAFETY: the child only sleeps and ends, by calls that are safe after fork.
            "fork" => match unsafe { libc::fork() } {
                // SAFETY: as above.
                0 => unsafe {
                    libc::sleep(8);
                    libc::_exit(0)
                },
                child => child as u64,
            },
            other => panic!("{other}?"),
        };
        println!("@{answer} {}", nic.regions_kept());
    }
}

/// A peer process; killed when dropped.
pub(crate) struct Peer {
    pub(crate) child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
    pub(crate) token: u64,
}

impl Peer {
    pub(crate) fn start() -> Self {
        Self::start_under(&[])
    }

    /// Under a program that changes something first, `unshare -n` for example.
    pub(crate) fn start_under(wrapper: &[&str]) -> Self {
        let this = std::env::current_exe().unwrap();
        let mut command = match wrapper {
            [program, arguments @ ..] => {
                let mut command = Command::new(program);
                command.args(arguments).arg(this);
                command
            }
            [] => Command::new(this),
        };
        command.args(["--exact", "peer", "--nocapture", "--test-threads=1"]).env(PEER, "1");
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let input = child.stdin.take().unwrap();
        let output = BufReader::new(child.stdout.take().unwrap());
        let mut peer = Self { child, input, output, token: 0 };
        peer.token = peer.answer();
        peer
    }

    fn answer(&mut self) -> u64 {
        let mut line = String::new();
        loop {
            line.clear();
            assert!(self.output.read_line(&mut line).unwrap() > 0, "the peer has ended");
            // The harness writes its own words in front, without an end of line.
            if let Some((_, answer)) = line.split_once('@') {
                let mut words = answer.split_whitespace();
                let value = words.next().unwrap().parse().unwrap();
                assert_eq!(words.next(), Some("0"), "the peer gave memory up");
                return value;
            }
        }
    }

    pub(crate) fn send(&mut self, line: &str) {
        writeln!(self.input, "{line}").unwrap();
    }

    pub(crate) fn ask(&mut self, line: &str) -> u64 {
        self.send(line);
        self.answer()
    }

    pub(crate) fn receive(&mut self) -> u64 {
        self.answer()
    }

    pub(crate) fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A queue pair with its completion queue, as a core would have them.
pub(crate) struct Desk {
    pub(crate) cq: Box<dyn CompletionQueue>,
    pub(crate) handle: CqHandle,
    pub(crate) post: PostHalf,
    pub(crate) admin: AdminHalf,
    next: u32,
}

pub(crate) fn caps() -> QpCaps {
    QpCaps { max_send_wr: 256, max_send_sge: 1, max_inline: 64 }
}

/// One piece to move: local address, remote address, bytes.
pub(crate) type Piece = (u64, u64, u32);

impl Desk {
    pub(crate) fn dial(nic: &ShmNic, token: u64) -> Result<Self, DialError> {
        let (cq, handle) = nic.create_cq(4096).unwrap();
        let target = Target::Shm { token };
        let (qp, admin) = nic.dial(&handle, caps(), &target, Instant::now() + PATIENCE)?;
        Ok(Self { cq, handle, post: qp.into_post_half(), admin, next: 0 })
    }

    /// A chain of which each request asks for a completion.
    pub(crate) fn chain(&mut self, op: Op, pieces: &[Piece]) -> Vec<WorkRequest> {
        pieces
            .iter()
            .map(|&(local, remote, len)| {
                self.next += 1;
                WorkRequest {
                    wr_id: WrId { slot: 0, generation: 0, sequence: self.next - 1 },
                    op,
                    local,
                    lkey: Lkey(0),
                    len,
                    remote: RemoteAddr(remote),
                    rkey: Rkey(0),
                    signaled: true,
                    inline: false,
                }
            })
            .collect()
    }

    pub(crate) fn post(&mut self, op: Op, pieces: &[Piece]) {
        let chain = self.chain(op, pieces);
        let posted = self.post.post(&chain);
        assert_eq!((posted.accepted, posted.error), (chain.len(), None));
    }

    /// Polls for `count` completions.
    pub(crate) fn reap(&mut self, count: usize) -> Vec<Completion> {
        let (mut all, mut some) = (vec![], [Completion::EMPTY; 64]);
        let until = Instant::now() + PATIENCE;
        while all.len() < count {
            let got = self.cq.poll(&mut some).unwrap();
            all.extend_from_slice(&some[..got]);
            assert!(Instant::now() < until, "{} of {count} completions", all.len());
        }
        assert_eq!(all.len(), count);
        all
    }

    pub(crate) fn run(&mut self, op: Op, pieces: &[Piece]) -> Vec<WcStatus> {
        self.post(op, pieces);
        self.reap(pieces.len()).iter().map(|c| c.status).collect()
    }

    pub(crate) fn succeed(&mut self, op: Op, pieces: &[Piece]) {
        let statuses = self.run(op, pieces);
        assert!(statuses.iter().all(|&s| s == WcStatus::SUCCESS), "{statuses:?}");
    }
}

/// Tries until it is so.
pub(crate) fn soon(what: &str, mut is_so: impl FnMut() -> bool) {
    let until = Instant::now() + PATIENCE;
    while !is_so() {
        assert!(Instant::now() < until, "{what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}
