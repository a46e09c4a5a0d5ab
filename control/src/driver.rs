//! The thread `mr-control`: carries what happens to the brain and does what it wants done. The only sockets of the crate
//! are here and in the store's clients.
//!
//! One thread, one tokio runtime for the store, one mio poll for everything else; the runtime watches mio's epoll
//! descriptor. What may block runs on small pools, those of the devices and one for names.
//!
//! ```text
//!  turn: calls · jobs · names · store · cores · devices · sockets · time ──▶ brain ──▶ actions
//!  sleep on: mio's epoll (sockets, devices, the doorbell that cores, callers and pools ring), the store, the clock
//! ```

mod inbound;
mod outbound;

use std::collections::{HashMap, VecDeque};
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, SyncSender, TryRecvError, channel};
use std::time::Duration;

use mio::unix::SourceFd;
use mio::{Events, Interest, Poll};
use moonrail_datapath::core::port::Doorbell;
use moonrail_datapath::units::{Nanos, NicId};
use tokio::io::unix::AsyncFd;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};

use crate::brain::{Action, Answer, Brain, Call, CallId, Event, StoreOp, Token};
use crate::config::{Clock, ControlConfig, ControlNic, LogLevel, LogRecord, LogSink};
use moonrail_datapath::nic::Nic;

use crate::connect::{JobDone, Outcome};
use crate::handoff::Handoff;
use crate::metadata::{Change, Lease, StoreClient, StoreError};
use crate::pool::{Devices, Pool};

use inbound::Inbound;
use outbound::Outbound;

/// Readiness events taken from the kernel at once.
const EVENTS: usize = 256;
/// Rounds of them before the store's client has its turn.
const ROUNDS: usize = 4;
/// Device events taken in one turn.
const DEVICE_EVENTS: usize = 64;
/// Threads for names.
const NAME_THREADS: usize = 2;
/// Longest sleep while cores were active lately: they do not ring for everything.
const ALERT_SLEEP: Nanos = Nanos::from_millis(2);
/// How long after the last event of a core it counts as active.
const ALERT_FOR: Nanos = Nanos::from_millis(20);
/// Longest sleep at all: a bound for every wait, whatever was missed.
const LONGEST_SLEEP: Nanos = Nanos::from_millis(100);
/// Longest sleep where a device has no descriptor for its events.
const BLIND_SLEEP: Nanos = Nanos::from_millis(5);
/// Wait before a watch that ended is begun again.
const WATCH_AGAIN: Duration = Duration::from_secs(1);

const LISTENER: mio::Token = mio::Token(0);
const DOORBELL: mio::Token = mio::Token(1);
const FIRST_NIC: usize = 2;
/// Connections have even numbers from here on when they are peers', odd ones when they are ours.
const FIRST_CONNECTION: u64 = 1 << 20;

/// A caller's question, as it travels to this thread.
pub(crate) struct Question {
    pub(crate) call: Call,
    pub(crate) until: Nanos,
    pub(crate) reply: SyncSender<Answer>,
}

/// What the store's tasks tell.
enum Told {
    Stored(Token, Result<Option<Vec<u8>>, StoreError>),
    Changed(Change),
    Missed,
    LeaseLost,
    LeaseTrouble(StoreError),
}

/// What the pools tell.
enum Done {
    Job(JobDone),
    Name(u64, io::Result<Vec<SocketAddr>>),
}

pub(crate) struct Driver {
    brain: Brain,
    clock: Clock,
    log: LogSink,
    doorbell: Arc<Doorbell>,
    nics: Arc<[ControlNic]>,
    handoff: Handoff,
    poll: Poll,
    inbound: Inbound,
    outbound: Outbound,
    devices: Devices,
    names: Pool,
    store: Option<StoreClient>,
    questions: Receiver<Question>,
    callers: HashMap<CallId, SyncSender<Answer>>,
    calls: u64,
    done: Receiver<Done>,
    tell_done: Sender<Done>,
    told: UnboundedReceiver<Told>,
    tell: UnboundedSender<Told>,
    /// What the store told while we slept.
    heard: VecDeque<Told>,
    actions: Vec<Action>,
    events: Vec<Event>,
    /// Devices without a descriptor, or that have more to tell.
    ask_nics: Vec<bool>,
    blind: bool,
    active_at: Nanos,
    lease_trouble: bool,
    /// Callers who wait for the end.
    farewell: Vec<SyncSender<Answer>>,
    exiting: bool,
}

/// What a driver is made of, besides the configuration.
pub(crate) struct Parts {
    pub(crate) brain: Brain,
    pub(crate) listener: std::net::TcpListener,
    pub(crate) store: Option<StoreClient>,
    pub(crate) questions: Receiver<Question>,
}

/// Whether a NIC has events and no descriptor that shows them, so that it has to be asked. One that is dialled and has none
/// has no events either.
fn tells_nothing(nic: &dyn Nic) -> bool {
    nic.async_fd().is_none() && !nic.fabric().is_dialled()
}

impl Driver {
    pub(crate) fn new(config: ControlConfig, parts: Parts) -> io::Result<Self> {
        let poll = Poll::new()?;
        parts.listener.set_nonblocking(true)?;
        let listener = mio::net::TcpListener::from_std(parts.listener);
        let options = &config.handshake;
        let span = Nanos::from_duration;
        let mut inbound = Inbound::new(
            listener,
            LISTENER,
            FIRST_CONNECTION,
            span(options.client_timeout),
            options.max_clients,
            options.max_length,
        );
        inbound.register(poll.registry())?;
        let outbound =
            Outbound::new(FIRST_CONNECTION + 1, span(options.connect_timeout), options.max_length, options.ipv6);
        let doorbell = config.doorbell.fd().as_raw_fd();
        poll.registry().register(&mut SourceFd(&doorbell), DOORBELL, Interest::READABLE)?;
        let mut ask_nics = Vec::new();
        for (at, nic) in config.nics.iter().enumerate() {
            let fd = nic.nic.async_fd();
            if let Some(fd) = fd {
                poll.registry().register(&mut SourceFd(&fd), mio::Token(FIRST_NIC + at), Interest::READABLE)?;
            }
            // What happened before the registration has made no edge.
            ask_nics.push(true);
        }
        let blind = config.nics.iter().any(|nic| tells_nothing(nic.nic.as_ref()));
        let (tell_done, done) = channel();
        let (tell, told) = unbounded_channel();
        Ok(Self {
            brain: parts.brain,
            clock: config.clock,
            log: config.log,
            doorbell: config.doorbell,
            devices: Devices::new(config.nics.len()),
            nics: config.nics.into(),
            handoff: Handoff::new(config.cores),
            poll,
            inbound,
            outbound,
            names: Pool::new("mr-names", NAME_THREADS),
            store: parts.store,
            questions: parts.questions,
            callers: HashMap::new(),
            calls: 0,
            done,
            tell_done,
            told,
            tell,
            heard: VecDeque::new(),
            actions: Vec::new(),
            events: Vec::new(),
            ask_nics,
            blind,
            active_at: Nanos::ZERO,
            lease_trouble: false,
            farewell: Vec::new(),
            exiting: false,
        })
    }

    /// The body of the thread. Returns when the brain has nothing left to do.
    pub(crate) async fn run(mut self) -> io::Result<()> {
        let epoll = self.poll.registry().as_fd().try_clone_to_owned()?;
        // Deprecated for types whose descriptor can change or close under it; an owned one does neither, and the
        // replacement is an unsafe function.
        #[allow(deprecated)]
        let ready = AsyncFd::with_interest(epoll, tokio::io::Interest::READABLE)?;
        self.keep_lease();
        while !self.exiting {
            let mut worked = self.turn();
            for round in 0..ROUNDS {
                if !self.sockets()? {
                    break;
                }
                worked = true;
                // The budget is spent: what is left keeps its place, and the store's client has its turn.
                if round + 1 == ROUNDS {
                    break;
                }
            }
            if worked || self.has_unread() {
                tokio::task::yield_now().await;
                continue;
            }
            self.doorbell.prepare();
            if self.handoff.has_events() || self.take_in() {
                self.doorbell.finish();
                continue;
            }
            let sleep = self.sleep();
            tokio::select! {
                guard = ready.readable() => {
                    let mut guard = guard?;
                    // Readiness ends only when the kernel has nothing left, or the next edge is never seen.
                    if !self.sockets()? {
                        guard.clear_ready();
                    }
                }
                Some(told) = self.told.recv() => self.heard.push_back(told),
                () = tokio::time::sleep(sleep) => {}
            }
            self.doorbell.finish();
        }
        let Self { farewell, store, inbound, outbound, poll, callers, questions, .. } = self;
        // Whoever waits for the end finds the port free.
        drop((inbound, outbound, poll, callers, questions));
        for caller in farewell {
            let _ = caller.send(Answer::Stopped);
        }
        if let Some(store) = store {
            let _ = tokio::time::timeout(Duration::from_secs(2), store.close()).await;
        }
        Ok(())
    }

    fn sleep(&self) -> Duration {
        let now = (self.clock)();
        let mut longest = if self.blind { BLIND_SLEEP } else { LONGEST_SLEEP };
        if now.since(self.active_at) < ALERT_FOR || self.handoff.is_backed_up() {
            longest = ALERT_SLEEP;
        }
        let timers = [self.brain.next_timeout(), self.inbound.next_deadline(), self.outbound.next_deadline()];
        let next = timers.into_iter().flatten().min().unwrap_or(Nanos::FAR);
        longest.min(next.since(now)).to_duration()
    }

    fn has_unread(&self) -> bool {
        self.inbound.accept_more || !self.inbound.unread.is_empty() || !self.outbound.unread.is_empty()
    }

    // ---- in ----

    /// Takes what callers and pools left for us. Returns whether there was something.
    fn take_in(&mut self) -> bool {
        let before = self.events.len();
        loop {
            match self.questions.try_recv() {
                Ok(Question { call, until, reply }) => {
                    self.calls += 1;
                    let id = CallId(self.calls);
                    self.callers.insert(id, reply);
                    self.events.push(Event::Call { id, call, until });
                }
                Err(TryRecvError::Empty) => break,
                Err(TryRecvError::Disconnected) => {
                    // The last handle is gone; nobody waits for the answer, or asks twice.
                    if self.calls != u64::MAX {
                        self.calls = u64::MAX;
                        let until = (self.clock)().plus(Nanos::from_secs(5));
                        self.events.push(Event::Call { id: CallId(0), call: Call::Shutdown, until });
                    }
                    break;
                }
            }
        }
        let mut looked_up = false;
        while let Ok(done) = self.done.try_recv() {
            match done {
                Done::Job(done) => self.events.push(Event::Job(done)),
                Done::Name(id, result) => {
                    looked_up = true;
                    let now = (self.clock)();
                    self.events.extend(self.outbound.resolved(self.poll.registry(), id, result, now));
                }
            }
        }
        looked_up || self.events.len() > before
    }

    /// One turn without sockets. Returns whether anything happened.
    fn turn(&mut self) -> bool {
        let mut worked = self.take_in();
        while let Ok(told) = self.told.try_recv() {
            self.heard.push_back(told);
        }
        while let Some(told) = self.heard.pop_front() {
            worked = true;
            self.hear(told);
        }
        let events = &mut self.events;
        if self.handoff.drain(|core, event| events.push(Event::Core { core, event })) {
            self.active_at = (self.clock)();
            worked = true;
        }
        if let Some(garbage) = self.handoff.take_garbage() {
            // Without a thread it is dropped here: late, but right.
            let _ = self.devices.rest().spawn(move || drop(garbage));
        }
        worked |= self.ask_devices();
        self.read_on();
        let now = (self.clock)();
        self.inbound.expire(self.poll.registry(), now);
        self.outbound.expire(self.poll.registry(), now, &mut self.events);
        if self.brain.next_timeout().is_some_and(|at| at <= now) {
            self.events.push(Event::Timer);
        }
        worked |= !self.events.is_empty();
        self.think();
        worked
    }

    fn hear(&mut self, told: Told) {
        match told {
            Told::Stored(token, result) => self.events.push(Event::Stored { token, result }),
            Told::Changed(Change::Put { key, value }) => self.events.push(Event::Changed { key, value: Some(value) }),
            Told::Changed(Change::Deleted { key }) => self.events.push(Event::Changed { key, value: None }),
            Told::Missed => self.events.push(Event::ChangesMissed),
            Told::LeaseLost => {
                self.lease_trouble = false;
                self.events.push(Event::LeaseLost);
            }
            Told::LeaseTrouble(error) => {
                if !std::mem::replace(&mut self.lease_trouble, true) {
                    let text = format!(
                        "our keys cannot be renewed, they vanish from the metadata when their lease ends: {error}"
                    );
                    (self.log)(LogRecord { level: LogLevel::Warning, text });
                }
            }
        }
    }

    fn ask_devices(&mut self) -> bool {
        let mut told = false;
        for at in 0..self.nics.len() {
            let blind = tells_nothing(self.nics[at].nic.as_ref());
            if !std::mem::take(&mut self.ask_nics[at]) && !blind {
                continue;
            }
            for taken in 0.. {
                match self.nics[at].nic.next_async_event() {
                    Ok(Some(event)) => {
                        told = true;
                        self.events.push(Event::Nic { nic: NicId(at as u16), event });
                    }
                    Ok(None) | Err(_) => break,
                }
                if taken == DEVICE_EVENTS {
                    self.ask_nics[at] = true;
                    break;
                }
            }
        }
        told
    }

    /// Goes on reading where the last turn's share was used up.
    fn read_on(&mut self) {
        let now = (self.clock)();
        if self.inbound.accept_more {
            self.inbound.accept(self.poll.registry(), now);
        }
        for id in std::mem::take(&mut self.inbound.unread) {
            self.events.extend(self.inbound.read(self.poll.registry(), id));
        }
        for id in std::mem::take(&mut self.outbound.unread) {
            self.events.extend(self.outbound.ready(self.poll.registry(), id, now));
        }
    }

    /// One look at what the kernel has for us, without waiting. Returns whether there was something.
    fn sockets(&mut self) -> io::Result<bool> {
        let mut events = Events::with_capacity(EVENTS);
        match self.poll.poll(&mut events, Some(Duration::ZERO)) {
            Err(e) if e.kind() == io::ErrorKind::Interrupted => return Ok(true),
            result => result?,
        }
        let now = (self.clock)();
        for event in &events {
            match event.token() {
                LISTENER => self.inbound.accept(self.poll.registry(), now),
                DOORBELL => {}
                mio::Token(at) if at < FIRST_NIC + self.nics.len() => self.ask_nics[at - FIRST_NIC] = true,
                mio::Token(id) => {
                    let id = id as u64;
                    if self.outbound.has(id) {
                        self.events.extend(self.outbound.ready(self.poll.registry(), id, now));
                    } else {
                        if event.is_writable() {
                            self.inbound.write(self.poll.registry(), id, now);
                        }
                        self.events.extend(self.inbound.read(self.poll.registry(), id));
                    }
                }
            }
        }
        let some = !events.is_empty();
        if some {
            self.think();
        }
        Ok(some)
    }

    // ---- out ----

    fn think(&mut self) {
        // What an action brings about at once (an address that cannot be dialled) is thought about in the same turn.
        while !self.events.is_empty() {
            for event in std::mem::take(&mut self.events) {
                let now = (self.clock)();
                self.brain.handle(event, now, &mut self.actions);
                for action in std::mem::take(&mut self.actions) {
                    self.act(action, now);
                }
            }
        }
    }

    fn act(&mut self, action: Action, now: Nanos) {
        match action {
            Action::Dial { token, host, port, frame, deadline } => {
                match self.outbound.dial(self.poll.registry(), token, (host, port), frame, now, deadline) {
                    Ok(None) => {}
                    Ok(Some(lookup)) => {
                        let (tell, doorbell) = (self.tell_done.clone(), self.doorbell.clone());
                        let outbound::Lookup { id, host, port } = lookup;
                        let spawned = self.names.spawn(move || {
                            let _ = tell.send(Done::Name(id, outbound::look_up(&host, port)));
                            doorbell.ring();
                        });
                        if let Err(error) = spawned {
                            self.events.extend(self.outbound.resolved(self.poll.registry(), id, Err(error), now));
                        }
                    }
                    Err(event) => self.events.push(event),
                }
            }
            Action::Reply { conn, frame } => self.inbound.reply(self.poll.registry(), conn, &frame, now),
            Action::Close { conn } => self.inbound.close(self.poll.registry(), conn.0),
            Action::Store { token, op, deadline } => self.store(token, op, deadline.since(now)),
            Action::Watch { key } => self.watch(key),
            Action::Run(job) => {
                let (nics, tell, doorbell) = (self.nics.clone(), self.tell_done.clone(), self.doorbell.clone());
                let (token, nic) = (job.token, job.nic);
                let pool = self.devices.of(usize::from(nic.0), &job.kind);
                let spawned = pool.spawn(move || {
                    let run = std::panic::AssertUnwindSafe(|| job.run(&nics));
                    let lost = JobDone { token, nic, outcome: Outcome::Lost };
                    let done = std::panic::catch_unwind(run).unwrap_or(lost);
                    let _ = tell.send(Done::Job(done));
                    doorbell.ring();
                });
                if spawned.is_err() {
                    self.events.push(Event::Job(JobDone { token, nic, outcome: Outcome::Lost }));
                }
            }
            Action::Core { core, command } => self.handoff.command(core, command),
            Action::Answer { id, answer } => {
                if let Some(caller) = self.callers.remove(&id) {
                    if matches!(answer, Answer::Stopped) {
                        return self.farewell.push(caller);
                    }
                    // A caller who gave up has dropped the other end.
                    let _ = caller.send(answer);
                }
            }
            Action::Log(record) => (self.log)(record),
            Action::Exit => self.exiting = true,
        }
    }

    // ---- the store ----

    fn store(&self, token: Token, op: StoreOp, within: Nanos) {
        let tell = self.tell.clone();
        let Some(store) = self.store.clone() else {
            let error = StoreError::Unsupported { what: "a store operation in peer-to-peer mode" };
            let _ = tell.send(Told::Stored(token, Err(error)));
            return;
        };
        tokio::spawn(async move {
            let work = async {
                match op {
                    StoreOp::Get(key) => store.get(&key).await,
                    StoreOp::Has(key) => store.has(&key).await.map(|there| there.then(Vec::new)),
                    StoreOp::Put(key, value) => store.put(&key, &value).await.map(|()| None),
                    StoreOp::Delete(key) => store.delete(&key).await.map(|_| None),
                }
            };
            // The client keeps its own deadline, which is shorter; this one is for what nobody thought of.
            let result = tokio::time::timeout(within.to_duration(), work).await.unwrap_or_else(|_| {
                Err(StoreError::Silent { endpoint: "the metadata server".to_owned(), after: within.to_duration() })
            });
            let _ = tell.send(Told::Stored(token, result));
        });
    }

    fn watch(&self, key: String) {
        let (Some(store), tell) = (self.store.clone(), self.tell.clone()) else { return };
        tokio::spawn(async move {
            let mut first = true;
            loop {
                // Apart: what it takes to begin a watch is not kept for as long as it lasts.
                match Box::pin(store.watch(&key)).await {
                    Ok(mut watch) => {
                        if !std::mem::replace(&mut first, false) && tell.send(Told::Missed).is_err() {
                            return;
                        }
                        while let Ok(changes) = watch.next().await {
                            // The store watches prefixes: another node's longer name is not ours.
                            let ours = changes.into_iter().filter(|change| match change {
                                Change::Put { key: k, .. } | Change::Deleted { key: k } => *k == key,
                            });
                            for change in ours {
                                if tell.send(Told::Changed(change)).is_err() {
                                    return;
                                }
                            }
                        }
                    }
                    Err(StoreError::Unsupported { .. }) => return,
                    Err(_) => {}
                }
                tokio::time::sleep(WATCH_AGAIN).await;
            }
        });
    }

    /// Renews the life of our keys for as long as the runtime lives.
    fn keep_lease(&self) {
        let (Some(store), tell) = (self.store.clone(), self.tell.clone()) else { return };
        let Some(every) = store.keep_alive_every() else { return };
        tokio::spawn(async move {
            loop {
                tokio::time::sleep(every).await;
                let told = match store.keep_alive().await {
                    Ok(Lease::Lost) => Told::LeaseLost,
                    Ok(Lease::Kept { .. } | Lease::NotNeeded) => continue,
                    Err(error) => Told::LeaseTrouble(error),
                };
                if tell.send(told).is_err() {
                    return;
                }
            }
        });
    }
}
