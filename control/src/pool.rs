//! A few threads for what may block: calls to devices, and looking names up. Neither may hold up the other, nor the
//! control thread, so each has a pool of its own and nothing here waits for them. Nor may one device hold up another, or
//! queue pairs to a neighbour that does not answer (seconds each, in RTR) those that have to end: see [`Devices`].

use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;

use crate::connect::JobKind;

type Task = Box<dyn FnOnce() + Send>;

#[derive(Default)]
struct Queue {
    tasks: VecDeque<Task>,
    idle: usize,
    threads: usize,
    closed: bool,
}

struct Shared {
    queue: Mutex<Queue>,
    wake: Condvar,
}

/// Threads that run tasks. They are started when needed, end when the pool is dropped and their task is done, and are
/// never waited for: a task may be stuck in a driver.
pub(crate) struct Pool {
    shared: Arc<Shared>,
    name: &'static str,
    most: usize,
}

impl Pool {
    /// A pool of up to `most` threads of this name.
    pub(crate) fn new(name: &'static str, most: usize) -> Self {
        Self { shared: Arc::new(Shared { queue: Mutex::default(), wake: Condvar::new() }), name, most }
    }

    /// Runs `task` as soon as a thread is free.
    ///
    /// # Errors
    /// No thread could be started and none exists; the task is dropped.
    pub(crate) fn spawn(&self, task: impl FnOnce() + Send + 'static) -> io::Result<()> {
        let mut queue = lock(&self.shared.queue);
        let starts = queue.idle <= queue.tasks.len() && queue.threads < self.most;
        if starts {
            let shared = self.shared.clone();
            match thread::Builder::new().name(self.name.to_owned()).spawn(move || work(&shared)) {
                Ok(_) => queue.threads += 1,
                Err(error) if queue.threads == 0 => return Err(error),
                // The threads that exist will do it.
                Err(_) => {}
            }
        }
        queue.tasks.push_back(Box::new(task));
        drop(queue);
        self.shared.wake.notify_one();
        Ok(())
    }
}

/// Threads for making queue pairs, and for ending them and the rest, on one device.
const MAKING: usize = 4;
const ENDING: usize = 2;

/// The pools of all devices.
pub(crate) struct Devices {
    /// By device: where queue pairs are made and connected, and where everything else is done.
    pools: Vec<(Pool, Pool)>,
    /// For what belongs to no device, or to all.
    rest: Pool,
}

impl Devices {
    pub(crate) fn new(devices: usize) -> Self {
        let of_one = |_| (Pool::new("mr-making", MAKING), Pool::new("mr-ending", ENDING));
        Self { pools: (0..devices).map(of_one).collect(), rest: Pool::new("mr-rest", 1) }
    }

    /// Where a job is done.
    pub(crate) fn of(&self, device: usize, kind: &JobKind) -> &Pool {
        match (self.pools.get(device), kind) {
            (None, _) | (_, JobKind::Discard(_)) => &self.rest,
            (Some((making, _)), JobKind::Make { .. } | JobKind::Connect { .. } | JobKind::Dial { .. }) => making,
            (Some((_, ending)), JobKind::Fail { .. } | JobKind::Destroy(_) | JobKind::Query { .. }) => ending,
        }
    }

    /// For what is only dropped.
    pub(crate) fn rest(&self) -> &Pool {
        &self.rest
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        lock(&self.shared.queue).closed = true;
        self.shared.wake.notify_all();
    }
}

fn lock(queue: &Mutex<Queue>) -> MutexGuard<'_, Queue> {
    queue.lock().unwrap_or_else(PoisonError::into_inner)
}

fn work(shared: &Shared) {
    let mut queue = lock(&shared.queue);
    loop {
        if let Some(task) = queue.tasks.pop_front() {
            drop(queue);
            // A task reports its own panic; the thread lives on for the next.
            let _ = std::panic::catch_unwind(std::panic::AssertUnwindSafe(task));
            queue = lock(&shared.queue);
        } else if queue.closed {
            return;
        } else {
            queue.idle += 1;
            queue = shared.wake.wait(queue).unwrap_or_else(PoisonError::into_inner);
            queue.idle -= 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::connect::Unused;
    use moonrail_datapath::nic::QpCaps;
    use moonrail_datapath::units::CoreId;
    use std::sync::mpsc;
    use std::time::Duration;

    #[test]
    fn neighbours_that_do_not_answer_hold_up_no_ending_and_no_other_device() {
        let devices = Devices::new(2);
        let make = || {
            let caps = QpCaps { max_send_wr: 1, max_send_sge: 1, max_inline: 0 };
            JobKind::Make { core: CoreId(0), count: 1, caps }
        };
        let (release, stuck) = mpsc::channel::<()>();
        let stuck = Arc::new(Mutex::new(stuck));
        for _ in 0..50 {
            let stuck = stuck.clone();
            let wait = move || assert!(stuck.lock().unwrap().recv_timeout(Duration::from_secs(10)).is_err());
            devices.of(0, &make()).spawn(wait).unwrap();
        }
        let (done, results) = mpsc::channel();
        for pool in [
            devices.of(0, &JobKind::Fail { admins: Vec::new() }),
            devices.of(0, &JobKind::Destroy(Unused::default())),
            devices.of(1, &make()),
            devices.rest(),
        ] {
            let done = done.clone();
            pool.spawn(move || done.send(()).unwrap()).unwrap();
        }
        for _ in 0..4 {
            results.recv_timeout(Duration::from_secs(5)).unwrap();
        }
        drop(release);
    }

    #[test]
    fn a_stuck_task_and_a_panic_hold_up_nobody_else() {
        let pool = Pool::new("test-pool", 2);
        let (release, stuck) = mpsc::channel::<()>();
        pool.spawn(move || assert!(stuck.recv_timeout(Duration::from_secs(10)).is_err())).unwrap();
        pool.spawn(|| panic!("on purpose")).unwrap();
        let (done, results) = mpsc::channel();
        for i in 0..20 {
            let done = done.clone();
            pool.spawn(move || done.send(i).unwrap()).unwrap();
        }
        let got: Vec<i32> = (0..20).filter_map(|_| results.recv_timeout(Duration::from_secs(5)).ok()).collect();
        assert_eq!(got, (0..20).collect::<Vec<_>>());
        drop(release);
    }
}
