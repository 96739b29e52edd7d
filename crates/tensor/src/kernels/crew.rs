//! The threads of a step, awake from its beginning to its end, and the loops that they share.
#![allow(unsafe_code)]

use rayon::prelude::*;
use std::any::Any;
use std::cell::{Cell, UnsafeCell};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Pauses between two looks for a loop of the step.
const PAUSES: usize = 4;

/// Of so many looks one is for work of the pool too.
const LOOKS: usize = 8;

/// Looks in vain before the system may run others instead.
const PATIENCE: usize = 4000;

thread_local! {
    /// Of the thread that runs a step: who helps it. Nobody while it is inside a piece of a loop.
    static CREW: Cell<Option<*const Crew>> = const { Cell::new(None) };
    /// Whether the thread runs a loop of a step, or looks for one: a step begun there would wait for threads that wait for it.
    static INSIDE: Cell<bool> = const { Cell::new(false) };
}

/// Runs `f`, which enters many short parallel loops, while the other threads of its pool look for work without going to sleep between them: waking
/// a thread takes longer than many a loop. A thread that finds nothing for a while lets the system run others in its place. `f` begins when all
/// threads look, or after a moment without those that do not; a thread that comes later looks no more. It might come in the middle of a piece of
/// `f`, where waiting for the end of `f` would be waiting for itself.
pub fn awake<R: Send>(f: impl FnOnce() -> R + Send) -> R {
    const MOMENT: Duration = Duration::from_micros(200);
    let threads = rayon::current_num_threads();
    let Some(own) = rayon::current_thread_index().filter(|_| threads > 1 && !INSIDE.get()) else { return f() };
    let (looking, begun, crew) = (AtomicUsize::new(0), AtomicBool::new(false), Crew::new(own, threads));
    let look = |index: usize| {
        if index != own && !begun.load(Ordering::Relaxed) {
            looking.fetch_add(1, Ordering::Relaxed);
            crew.look(index);
        }
    };
    let end = Done(&crew);
    rayon::in_place_scope(|scope| {
        scope.spawn_broadcast(|_, context| look(context.index()));
        let end = end; // also when `f` panics
        let called = Instant::now();
        while looking.load(Ordering::Relaxed) + 1 < threads && called.elapsed() < MOMENT {
            std::hint::spin_loop();
        }
        begun.store(true, Ordering::Relaxed);
        // A thread that is missing could not help; loops are rayon's then, which wake it.
        let all = looking.load(Ordering::Relaxed) + 1 == threads;
        let helped = Helped(CREW.replace(all.then_some(&raw const crew)));
        let result = f();
        drop((helped, end));
        result
    })
}

/// Runs pieces 0..count of a loop, each on whatever thread is free.
pub fn run(count: usize, piece: impl Fn(usize) + Sync) {
    if count < 2 || rayon::current_num_threads() == 1 {
        return (0..count).for_each(piece);
    }
    match CREW.get() {
        Some(crew) => {
            CREW.set(None);
            // SAFETY: `awake`, which set it for this thread, is still running and holds the crew.
            unsafe { &*crew }.share(count, &piece);
            // Not after a panic, which leaves pieces in spans: later loops of the step are rayon's then.
            CREW.set(Some(crew));
        }
        None => (0..count).into_par_iter().with_max_len(1).for_each(&piece),
    }
}

/// Runs `f` on every task, each on whatever thread is free; what it returns, in their order. If it panics, tasks that were not run and results of
/// others are leaked.
pub fn map<W: Send, R: Send>(mut tasks: Vec<W>, f: impl Fn(W) -> R + Sync) -> Vec<R> {
    let count = tasks.len();
    let mut results = Vec::with_capacity(count);
    let places = Places { tasks: tasks.as_ptr(), results: results.as_mut_ptr() };
    // SAFETY: fewer than there are. `places` alone hands them out from here on, and each piece is run once.
    unsafe { tasks.set_len(0) };
    run(count, |i| unsafe { places.put(i, f(places.task(i))) });
    // SAFETY: every piece was run and has put its result.
    unsafe { results.set_len(count) };
    results
}

/// Where tasks and results of a loop are. Tasks are read and not locked: cores would wait for one another's cache lines.
struct Places<W, R> {
    tasks: *const W,
    results: *mut R,
}

// SAFETY: each task is taken by one thread, and each result put by one.
unsafe impl<W: Send, R: Send> Sync for Places<W, R> {}

impl<W, R> Places<W, R> {
    /// # Safety
    /// `i` is one of the tasks, and asked for once.
    unsafe fn task(&self, i: usize) -> W {
        unsafe { self.tasks.add(i).read() }
    }

    /// # Safety
    /// There is room for result `i`, which nobody else uses.
    unsafe fn put(&self, i: usize, result: R) {
        unsafe { self.results.add(i).write(result) }
    }
}

/// A moment's rest of a thread that found nothing, for the `idle`th time.
fn pause(idle: &mut usize) {
    *idle += 1;
    if *idle < PATIENCE {
        (0..PAUSES).for_each(|_| std::hint::spin_loop());
    } else {
        std::thread::yield_now();
    }
}

/// Gives this thread back the crew that it had.
struct Helped(Option<*const Crew>);

impl Drop for Helped {
    fn drop(&mut self) {
        CREW.set(self.0);
    }
}

/// Sets back whether the thread runs loops.
struct Inside(bool);

impl Drop for Inside {
    fn drop(&mut self) {
        INSIDE.set(self.0);
    }
}

type Piece<'s> = &'s (dyn Fn(usize) + Sync);

/// The threads of a step.
struct Crew {
    posts: Vec<Post>,
    /// Whose step it is.
    leader: usize,
    /// What a piece on another thread panicked with, if one did.
    broken: Mutex<Option<Box<dyn Any + Send>>>,
}

impl Crew {
    fn new(leader: usize, threads: usize) -> Self {
        let posts = (0..threads).map(|_| Post::default()).collect();
        Crew { posts, leader, broken: Mutex::new(None) }
    }

    /// Runs a loop with all who look, and returns when every piece is done. Each thread goes through a span of neighbouring pieces, which read the same
    /// weights, and then takes from the ends of other spans. It has the same span in every loop, so that it finds in its cache the rows that it wrote
    /// in the one before.
    fn share(&self, count: usize, piece: Piece<'_>) {
        assert!(u32::try_from(count).is_ok(), "a loop of 2³² pieces or more");
        let bound = |thread: usize| count as u64 * thread as u64 / self.posts.len() as u64;
        let _inside = Inside(INSIDE.replace(true));
        let ended = Ended(self); // also when a piece panics
        for (i, post) in self.posts.iter().enumerate() {
            let (start, end) = (bound(i), bound(i + 1));
            post.span.store(end << 32 | start, Ordering::Relaxed);
            if i != self.leader && start < end {
                // SAFETY: nobody is at this post, and `Ended` waits until nobody is at it any more: the piece lives as long as it is used.
                unsafe { *post.piece.get() = Some(std::mem::transmute::<Piece<'_>, Piece<'static>>(piece)) };
                post.state.store(OPEN, Ordering::Release);
            }
        }
        self.work(self.leader, piece);
        drop(ended);
        if let Some(payload) = self.broken.lock().unwrap_or_else(PoisonError::into_inner).take() {
            resume_unwind(payload);
        }
    }

    /// Takes pieces until there are none.
    fn work(&self, own: usize, piece: Piece<'_>) {
        while let Some(i) = self.posts[own].take(false).or_else(|| self.steal()) {
            piece(i);
        }
    }

    /// The last piece of the longest span.
    fn steal(&self) -> Option<usize> {
        loop {
            let (left, longest) = self.posts.iter().map(|post| (post.left(), post)).max_by_key(|(left, _)| *left)?;
            if left == 0 {
                return None;
            }
            if let Some(i) = longest.take(true) {
                return Some(i);
            }
        }
    }

    /// Stays at a post, looking also for work of the pool, until the step is done.
    fn look(&self, own: usize) {
        let (post, mut idle) = (&self.posts[own], 0);
        let _inside = Inside(INSIDE.replace(true)); // also of work of the pool that it takes
        loop {
            let due = idle >= PATIENCE || idle % LOOKS == LOOKS - 1;
            match post.state.load(Ordering::Relaxed) {
                DONE => return,
                OPEN if self.help(own) => idle = 0,
                _ if due && rayon::yield_now() == Some(rayon::Yield::Executed) => idle = 0,
                _ => pause(&mut idle),
            }
        }
    }

    /// Takes part in the loop that is on; whether the post was open still.
    fn help(&self, own: usize) -> bool {
        let post = &self.posts[own];
        if post.state.compare_exchange(OPEN, BUSY, Ordering::Acquire, Ordering::Relaxed).is_err() {
            return false;
        }
        let _left = Left(post);
        // SAFETY: it was set before the post was opened, and is not again before it is idle.
        let piece = unsafe { *post.piece.get() }.expect("an open post has a piece");
        if let Err(payload) = catch_unwind(AssertUnwindSafe(|| self.work(own, piece))) {
            *self.broken.lock().unwrap_or_else(PoisonError::into_inner) = Some(payload);
        }
        true
    }
}

/// State of a post where there is nothing to do.
const IDLE: u8 = 0;
/// A loop is on, and the thread has not come.
const OPEN: u8 = 1;
/// The thread takes part in the loop.
const BUSY: u8 = 2;
/// The step is done.
const DONE: u8 = 3;

/// What one thread is to do. It fetches all of it as one cache line, which its neighbours do not share; processors fetch lines in pairs.
#[derive(Default)]
#[repr(align(128))]
struct Post {
    state: AtomicU8,
    /// The pieces start..end that nobody has taken, as end << 32 | start.
    span: AtomicU64,
    piece: UnsafeCell<Option<Piece<'static>>>,
}

// SAFETY: the leader sets the piece while nobody is at the post, and opens it; who then is at it reads it.
unsafe impl Sync for Post {}

impl Post {
    const START: u64 = u32::MAX as u64;

    fn left(&self) -> u64 {
        let span = self.span.load(Ordering::Relaxed);
        (span >> 32) - (span & Post::START)
    }

    /// The first or the last of its pieces, if there is one.
    fn take(&self, last: bool) -> Option<usize> {
        let step = |span: u64| {
            let (start, end) = (span & Post::START, span >> 32);
            (start < end).then(|| if last { (end - 1) << 32 | start } else { end << 32 | (start + 1) })
        };
        let before = self.span.fetch_update(Ordering::Relaxed, Ordering::Relaxed, step).ok()?;
        Some(if last { (before >> 32) - 1 } else { before & Post::START } as usize)
    }
}

/// Leaves a post.
struct Left<'s>(&'s Post);

impl Drop for Left<'_> {
    fn drop(&mut self) {
        self.0.state.store(IDLE, Ordering::Release);
    }
}

/// Closes the posts where nobody came, and waits for those who did.
struct Ended<'s>(&'s Crew);

impl Drop for Ended<'_> {
    fn drop(&mut self) {
        for post in &self.0.posts {
            let mut idle = 0;
            while post.state.load(Ordering::Acquire) != IDLE
                && post.state.compare_exchange(OPEN, IDLE, Ordering::Relaxed, Ordering::Relaxed).is_err()
            {
                pause(&mut idle);
            }
        }
    }
}

/// Lets the threads go.
struct Done<'s>(&'s Crew);

impl Drop for Done<'_> {
    fn drop(&mut self) {
        self.0.posts.iter().for_each(|post| post.state.store(DONE, Ordering::Relaxed));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn awake_threads_share_the_work_and_end_with_it_also_after_a_panic() {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(3).build().unwrap();
        let total = || (0..100u64).map(|_| (0..1000u64).into_par_iter().sum::<u64>()).sum::<u64>();
        assert_eq!(pool.install(|| awake(total)), 49_950_000);
        assert_eq!(awake(total), 49_950_000, "outside a pool");
        let panics = || pool.install(|| awake(|| panic!("as a task may")));
        assert!(std::panic::catch_unwind(std::panic::AssertUnwindSafe(panics)).is_err());
        assert_eq!(pool.install(|| awake(|| awake(total))), 49_950_000, "one inside the other");
    }

    #[test]
    fn a_loop_runs_every_piece_once_whoever_is_there() {
        for threads in [1, 2, 3] {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let check = |count: usize| {
                let times: Vec<AtomicUsize> = (0..count).map(|_| AtomicUsize::new(0)).collect();
                run(count, |i| {
                    times[i].fetch_add(1, Ordering::Relaxed);
                    let again = |_| _ = times[i].fetch_add(10, Ordering::Relaxed);
                    run(3, again); // inside a piece
                });
                assert!(times.iter().all(|n| n.load(Ordering::Relaxed) == 31), "{threads} threads, {count} pieces");
            };
            (0..500).for_each(|i| check(i % 7));
            pool.install(|| (0..500).for_each(|i| check(i % 7)));
            pool.install(|| awake(|| (0..5000).for_each(|i| check(i % 7))));
        }
    }

    #[test]
    fn a_panic_in_a_piece_ends_the_loop_and_the_step() {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(2).build().unwrap();
        for bad in [0, 1, 30] {
            let after = AtomicBool::new(false);
            let step = || {
                run(32, |i| {
                    std::thread::sleep(Duration::from_micros(20));
                    assert!(i != bad, "as a task may");
                });
                after.store(true, Ordering::Relaxed);
            };
            let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| pool.install(|| awake(step))));
            let payload = result.unwrap_err();
            assert_eq!(payload.downcast_ref::<&str>(), Some(&"as a task may"), "piece {bad}");
            assert!(!after.load(Ordering::Relaxed), "piece {bad}");
        }
        let sum = AtomicUsize::new(0);
        let add = |i: usize| _ = sum.fetch_add(i, Ordering::Relaxed);
        pool.install(|| awake(|| run(10, add)));
        assert_eq!(sum.into_inner(), 45, "the pool works on");
    }

    /// Threads that wait for the end of a loop do not wait in a step that a piece begins.
    #[test]
    fn a_step_begun_inside_a_piece_ends() {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(2).build().unwrap();
        let sum = AtomicUsize::new(0);
        let add = |i: usize| _ = sum.fetch_add(i, Ordering::Relaxed);
        pool.install(|| awake(|| (0..100).for_each(|_| run(4, |_| awake(|| run(3, add))))));
        assert_eq!(sum.into_inner(), 100 * 4 * 3);
    }

    /// A panic that the step catches leaves no pieces behind for the loops after it, which are the pool's.
    #[test]
    fn loops_after_a_panic_that_was_caught_run_every_piece_once() {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(2).build().unwrap();
        let step = |bad: usize| {
            let helped = CREW.get().is_some();
            let broken = std::panic::catch_unwind(|| run(60, |i| assert!(i != bad, "as a task may")));
            assert!(broken.is_err() && CREW.get().is_none(), "piece {bad}");
            for count in [2, 5, 60] {
                let times: Vec<AtomicUsize> = (0..count).map(|_| AtomicUsize::new(0)).collect();
                assert_eq!(map((0..count).collect(), |i| times[i].fetch_add(1, Ordering::Relaxed)), vec![0; count]);
            }
            helped
        };
        // Until every piece was the bad one in a step that had its threads in time.
        let since = Instant::now();
        for bad in [0, 20, 40, 59] {
            while !pool.install(|| awake(|| step(bad))) {
                assert!(since.elapsed() < Duration::from_secs(20), "the other thread never came in time");
            }
        }
    }

    /// A piece of work that `f` waits for, and that takes the call to look from its thread's queue while it waits itself, as the pieces of a loop do.
    #[test]
    fn a_thread_that_is_called_in_the_middle_of_a_piece_goes_on_with_it() {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(2).build().unwrap();
        let [at_work, begun, finished] = [const { AtomicBool::new(false) }; 3];
        let wait = |flag: &AtomicBool| {
            let since = Instant::now();
            while !flag.load(Ordering::SeqCst) {
                assert!(since.elapsed() < Duration::from_secs(20), "waited in vain");
                std::thread::yield_now();
            }
        };
        pool.in_place_scope(|scope| {
            scope.spawn(|_| {
                at_work.store(true, Ordering::SeqCst);
                wait(&begun);
                rayon::yield_now();
                finished.store(true, Ordering::SeqCst);
            });
            wait(&at_work);
            pool.install(|| {
                awake(|| {
                    begun.store(true, Ordering::SeqCst);
                    wait(&finished);
                })
            });
        });
    }
}
