//! Who is reading, seen by whoever wants to take away what is read.
//!
//! ```text
//!   reader                                   writer
//!   1. own lane := odd                       1. replace what readers find (a snapshot, a word of the ledger)
//!   2. fence                                 2. fence
//!   3. look at what is there, use it         3. each odd lane: wait until its number is another
//!   4. own lane := even                      4. nobody uses the old one any more
//! ```
//! Either the reader finds the new one, or the writer sees the lane odd: both fences are SeqCst. A lane is a number that only
//! rises, not a count, so that readers who come one after the other do not starve the writer.
//!
//! A lane belongs to one thread for its life, so entering is one locked instruction and leaving a plain store. Threads that
//! find none left take turns on the last few.

#![allow(unsafe_code)]

use std::cell::Cell;
use std::marker::PhantomData;
use std::sync::Arc;
use std::sync::atomic::{AtomicPtr, AtomicU64, Ordering, compiler_fence, fence};
use std::time::{Duration, Instant};

use crossbeam_utils::CachePadded;

/// Threads that may be reading at the same moment.
pub const LANES: usize = 128;
/// Lanes that belong to threads; the others are for whoever comes.
const OWNED: usize = 112;

/// Lanes, wherever they lie.
pub(crate) trait LaneArray: Send + Sync {
    /// One lane: odd while somebody reads.
    fn lane(&self, index: usize) -> &AtomicU64;
}

/// Lanes of this process alone: nobody else can disturb them.
pub struct Lanes([CachePadded<AtomicU64>; LANES]);

impl Default for Lanes {
    fn default() -> Self {
        Self(std::array::from_fn(|_| CachePadded::default()))
    }
}

impl LaneArray for Lanes {
    fn lane(&self, index: usize) -> &AtomicU64 {
        &self.0[index]
    }
}

/// Numbers that threads have, one bit each.
static TAKEN: [AtomicU64; OWNED.div_ceil(64)] = [const { AtomicU64::new(0) }; OWNED.div_ceil(64)];

/// The number of a thread, given back when it ends.
struct Number(usize);

impl Number {
    fn take() -> Option<Self> {
        (0..OWNED)
            .find(|index| {
                let (word, bit) = (&TAKEN[index / 64], 1 << (index % 64));
                word.load(Ordering::Relaxed) & bit == 0 && word.fetch_or(bit, Ordering::Acquire) & bit == 0
            })
            .map(Self)
    }
}

impl Drop for Number {
    fn drop(&mut self) {
        // What this thread did on its lanes is seen by the next one that has them.
        TAKEN[self.0 / 64].fetch_and(!(1 << (self.0 % 64)), Ordering::Release);
        MINE.set(NONE);
    }
}

/// Nobody has looked yet.
const UNASKED: usize = usize::MAX;
/// There was none.
const NONE: usize = usize::MAX - 1;

thread_local! {
    /// This thread's number. Without a destructor, so that to read it costs one load.
    static MINE: Cell<usize> = const { Cell::new(UNASKED) };
    /// Gives it back.
    static HELD: Option<Number> = Number::take();
}

/// The number of the calling thread, which has not been asked yet; [`NONE`] if there was none left, or the thread is ending.
#[cold]
fn ask() -> usize {
    let number = HELD.try_with(|held| held.as_ref().map_or(NONE, |number| number.0)).unwrap_or(NONE);
    MINE.set(number);
    number
}

impl Lanes {
    /// Enters; `None` if too many threads are inside. A thread that is inside already stays so until it leaves the outer pass.
    #[inline]
    pub fn enter(&self) -> Option<Pass<'_>> {
        let index = MINE.get();
        if index < OWNED { Some(self.enter_own(index)) } else { self.enter_rarely() }
    }

    /// Does `what` inside, straight in and out by the calling thread's own lane; `None` without doing it if the thread has none yet, or
    /// is inside already: [`Lanes::enter`] is for those.
    #[inline]
    pub fn within<T>(&self, what: impl FnOnce(Inside<'_>) -> Option<T>) -> Option<T> {
        /// Leaves, whatever happens.
        struct Leave<'a>(&'a AtomicU64);
        impl Drop for Leave<'_> {
            #[inline]
            fn drop(&mut self) {
                self.0.store(self.0.load(Ordering::Relaxed) + 1, Ordering::Release);
            }
        }
        let index = MINE.get();
        let lane = &**self.0.get(index).filter(|_| index < OWNED)?;
        let seen = lane.load(Ordering::Relaxed);
        if seen & 1 == 1 {
            return None;
        }
        raise(lane, seen + 1);
        let _leave = Leave(lane);
        what(Inside { lanes: self, index, thread: PhantomData })
    }

    /// By the calling thread's own lane.
    #[inline]
    fn enter_own(&self, index: usize) -> Pass<'_> {
        let lane = &*self.0[index];
        let seen = lane.load(Ordering::Relaxed);
        let outer = seen & 1 == 0;
        if outer {
            raise(lane, seen + 1);
        }
        Pass { inside: Inside { lanes: self, index, thread: PhantomData }, outer }
    }

    /// The thread's first time, or it has no lane of its own.
    #[cold]
    fn enter_rarely(&self) -> Option<Pass<'_>> {
        let index = if MINE.get() == UNASKED { ask() } else { MINE.get() };
        if index < OWNED { Some(self.enter_own(index)) } else { self.enter_by_turns() }
    }

    fn enter_by_turns(&self) -> Option<Pass<'_>> {
        let index = (OWNED..LANES).find(|&index| {
            let seen = self.0[index].load(Ordering::Relaxed);
            seen & 1 == 0 && self.0[index].compare_exchange(seen, seen + 1, Ordering::SeqCst, Ordering::Relaxed).is_ok()
        })?;
        fence(Ordering::SeqCst);
        Some(Pass { inside: Inside { lanes: self, index, thread: PhantomData }, outer: true })
    }
}

/// Makes a lane odd, before whatever is looked at afterwards: steps 1 and 2 of a reader. Only for whom the lane belongs to.
#[inline]
pub(crate) fn raise(lane: &AtomicU64, odd: u64) {
    if cfg!(any(target_arch = "x86_64", target_arch = "x86")) {
        // One locked instruction, which no load and no store passes (Intel SDM 3A 8.2.3.9, AMD APM 2 7.4.2): half of what MFENCE
        // takes. The compiler's fence keeps it so.
        lane.swap(odd, Ordering::SeqCst);
        compiler_fence(Ordering::SeqCst);
    } else {
        lane.store(odd, Ordering::Relaxed);
        fence(Ordering::SeqCst);
    }
}

/// A thread inside: what it finds meanwhile stays.
pub struct Pass<'a> {
    inside: Inside<'a>,
    /// It is this one that leaves.
    outer: bool,
}

/// Being inside, for as long as a pass lasts.
#[derive(Clone, Copy)]
pub struct Inside<'a> {
    lanes: &'a Lanes,
    index: usize,
    /// The lane is the thread's.
    thread: PhantomData<*const ()>,
}

impl Pass<'_> {
    /// For others who are to know it.
    #[inline]
    pub fn inside(&self) -> Inside<'_> {
        self.inside
    }
}

impl Inside<'_> {
    /// The lane: nobody else writes what belongs to it until the pass is over.
    #[inline]
    pub fn lane(self) -> usize {
        self.index
    }

    /// Whether that is inside these lanes.
    #[inline]
    pub(crate) fn is_of(self, lanes: &Lanes) -> bool {
        std::ptr::eq(self.lanes, lanes)
    }
}

impl Drop for Pass<'_> {
    #[inline]
    fn drop(&mut self) {
        if self.outer {
            let lane = &*self.inside.lanes.0[self.inside.index];
            lane.store(lane.load(Ordering::Relaxed) + 1, Ordering::Release);
        }
    }
}

/// Who was reading at one moment.
pub(crate) struct Readers([u64; LANES]);

impl Readers {
    /// Looks at every lane. What was replaced before is not used by whoever is not found here.
    pub(crate) fn now(lanes: &dyn LaneArray) -> Self {
        fence(Ordering::SeqCst);
        Self(std::array::from_fn(|index| lanes.lane(index).load(Ordering::Acquire)))
    }

    /// Whether all of them have left since.
    pub(crate) fn have_left(&mut self, lanes: &dyn LaneArray) -> bool {
        let mut left = true;
        for (index, seen) in self.0.iter_mut().enumerate() {
            if *seen & 1 == 1 {
                if lanes.lane(index).load(Ordering::Acquire) == *seen {
                    left = false;
                } else {
                    *seen = 0;
                }
            }
        }
        left
    }
}

/// How long a value that was replaced waits for a reader: a thread that was stopped in the middle of its pass. After that it is
/// never freed.
const LEAVE_WITHIN: Duration = Duration::from_secs(10);

/// A value that is replaced as a whole, and read without a lock.
pub struct Snapshot<T> {
    lanes: Arc<Lanes>,
    now: AtomicPtr<T>,
}

// SAFETY: it hands out `&T` to any thread and drops a `T` that another thread made, as `RwLock<T>` does.
unsafe impl<T: Send + Sync> Sync for Snapshot<T> {}
// SAFETY: it owns its value.
unsafe impl<T: Send + Sync> Send for Snapshot<T> {}

impl<T> Snapshot<T> {
    /// For readers who are inside `lanes`.
    pub fn new(lanes: Arc<Lanes>, value: T) -> Self {
        Self { lanes, now: AtomicPtr::new(Box::into_raw(Box::new(value))) }
    }

    /// The value as it is now; it stays until the pass is over.
    ///
    /// # Panics
    /// If that is not inside this snapshot's lanes.
    #[inline]
    pub fn load<'a>(&'a self, inside: Inside<'a>) -> &'a T {
        assert!(inside.is_of(&self.lanes));
        // SAFETY: made by `Box::into_raw`. `Retired` frees it only when every lane that was odd after the swap has changed, and
        // ours was odd, with a fence, before this load: either the swap is seen here, or the lane is seen there.
        unsafe { &*self.as_ptr() }
    }

    /// Where the value is now, for who keeps a pass beside it.
    #[inline]
    pub(crate) fn as_ptr(&self) -> *const T {
        self.now.load(Ordering::Acquire)
    }

    /// Replaces the value. Any thread, inside a pass or not; does not wait.
    pub(crate) fn swap(&self, value: T) -> Retired<T> {
        let old = self.now.swap(Box::into_raw(Box::new(value)), Ordering::AcqRel);
        Retired { readers: Readers::now(self.lanes.as_ref()), lanes: self.lanes.clone(), old }
    }

    /// Replaces the value, and waits until no reader has the old one. Not from inside a pass of the same lanes, which would wait for
    /// itself. Returns whether the old one is gone: where a reader does not leave within 10 s it is kept for ever.
    pub fn replace(&self, value: T) -> bool {
        let mut old = self.swap(value);
        let mut since = None;
        while !old.is_over() {
            if since.get_or_insert_with(Instant::now).elapsed() > LEAVE_WITHIN {
                return false;
            }
            std::thread::yield_now();
        }
        true
    }

    /// The value, of which nobody else has a view.
    pub fn get_mut(&mut self) -> &mut T {
        // SAFETY: made by `Box::into_raw`; reading borrows the snapshot, which is ours alone.
        unsafe { &mut **self.now.get_mut() }
    }
}

impl<T> Drop for Snapshot<T> {
    fn drop(&mut self) {
        // SAFETY: made by `Box::into_raw`; nobody reads it, as reading borrows the snapshot.
        drop(unsafe { Box::from_raw(*self.now.get_mut()) });
    }
}

/// A value that was replaced, until its readers have left. One that is dropped before that is kept for ever.
pub(crate) struct Retired<T> {
    lanes: Arc<Lanes>,
    readers: Readers,
    old: *mut T,
}

// SAFETY: it owns its value, which readers on other threads may still look at, and drops it.
unsafe impl<T: Send + Sync> Send for Retired<T> {}

impl<T> Retired<T> {
    /// Whether nobody reads it any more.
    pub(crate) fn is_over(&mut self) -> bool {
        self.readers.have_left(self.lanes.as_ref())
    }
}

impl<T> Drop for Retired<T> {
    fn drop(&mut self) {
        if self.is_over() {
            // SAFETY: made by `Box::into_raw`, no longer found by anybody, and whoever had found it has left.
            drop(unsafe { Box::from_raw(self.old) });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Barrier;
    use std::sync::atomic::AtomicBool;

    #[test]
    fn who_comes_later_is_not_waited_for() {
        let lanes = Lanes::default();
        let pass = lanes.enter().unwrap();
        let mut readers = Readers::now(&lanes);
        assert!(!readers.have_left(&lanes));
        drop(pass);
        let _pass = lanes.enter().unwrap();
        assert!(readers.have_left(&lanes), "the lane is odd again, and it is another pass");
    }

    #[test]
    fn a_pass_in_a_pass_ends_with_the_outer_one() {
        let lanes = Lanes::default();
        let outer = lanes.enter().unwrap();
        let mut readers = Readers::now(&lanes);
        drop(lanes.enter().unwrap());
        assert!(!readers.have_left(&lanes));
        drop(outer);
        assert!(readers.have_left(&lanes));
    }

    #[test]
    fn straight_in_and_out_is_inside_meanwhile_and_refused_to_who_is_inside() {
        let lanes = Lanes::default();
        let entered = |_: Inside<'_>| Some(());
        // Whoever has no number yet is refused; this gives one, unless other tests have taken all.
        drop(lanes.enter());
        if MINE.get() == NONE {
            return;
        }
        let seen = lanes.within(|inside| Some((inside.is_of(&lanes), Readers::now(&lanes).have_left(&lanes))));
        assert_eq!(seen, Some((true, false)), "whoever takes something away waits");
        assert!(Readers::now(&lanes).have_left(&lanes));
        assert_eq!(lanes.within(|_| lanes.within(entered)), None, "the inner one");
        assert_eq!(lanes.within(|_| lanes.enter().map(drop)), Some(()));
        assert!(Readers::now(&lanes).have_left(&lanes));
        std::thread::scope(|scope| scope.spawn(|| assert_eq!(lanes.within(entered), None)).join().unwrap());
        let left =
            std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| lanes.within(|_| -> Option<()> { panic!() })));
        assert!(left.is_err() && Readers::now(&lanes).have_left(&lanes), "by unwinding too");
    }

    #[test]
    fn more_threads_than_lanes_take_turns_and_numbers_come_back() {
        const THREADS: usize = LANES + 40;
        let lanes = Lanes::default();
        for _ in 0..3 {
            let (inside, looked) = (Barrier::new(THREADS), Barrier::new(THREADS));
            let found = AtomicU64::new(0);
            std::thread::scope(|scope| {
                for _ in 0..THREADS {
                    scope.spawn(|| {
                        let pass = lanes.enter();
                        inside.wait();
                        found.fetch_add(u64::from(pass.is_some()), Ordering::Relaxed);
                        looked.wait();
                        drop(pass);
                        // Now there is room for everybody.
                        while lanes.enter().is_none() {
                            std::thread::yield_now();
                        }
                    });
                }
            });
            // Other tests of this process have numbers too.
            let found = found.into_inner() as usize;
            assert!(found <= LANES && found > LANES - 64, "{found}");
            assert!(Readers::now(&lanes).have_left(&lanes));
        }
    }

    /// A value that says when it is gone.
    struct Alive(Arc<AtomicBool>);
    impl Drop for Alive {
        fn drop(&mut self) {
            self.0.store(false, Ordering::SeqCst);
        }
    }

    #[test]
    fn what_a_reader_has_is_not_freed() {
        const ROUNDS: u32 = 20_000;
        let lanes = Arc::new(Lanes::default());
        let fresh = || Alive(Arc::new(AtomicBool::new(true)));
        let snapshot = Snapshot::new(lanes.clone(), fresh());
        let over = AtomicBool::new(false);
        std::thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| {
                    while !over.load(Ordering::Relaxed) {
                        let pass = lanes.enter().unwrap();
                        let flag = snapshot.load(pass.inside()).0.clone();
                        assert!(flag.load(Ordering::SeqCst));
                        std::hint::spin_loop();
                        assert!(flag.load(Ordering::SeqCst), "freed while it was read");
                    }
                });
            }
            for _ in 0..ROUNDS {
                assert!(snapshot.replace(fresh()));
            }
            over.store(true, Ordering::Relaxed);
        });
    }
}
