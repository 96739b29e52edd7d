//! The threads of a step, awake from its beginning to its end, and the loops that they share.
#![allow(unsafe_code)]

use rayon::prelude::*;
use std::any::Any;
use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Pauses between two looks for the crew's loops, how many of them make one at the pool's too, and how many are in vain before the system may run others
/// instead.
const PAUSES: usize = 4;
const LOOKS: usize = 8;
const PATIENCE: usize = 4000;

thread_local! {
    /// Of the thread that runs a step: who helps it. Nobody while it is inside a piece of a loop.
    static CREW: Cell<Option<*const Crew>> = const { Cell::new(None) };
    /// Whether the thread is inside a piece: a step begun there would wait for threads that wait for the piece.
    static INSIDE: Cell<bool> = const { Cell::new(false) };
}

/// Runs `f`, which enters many short parallel loops, while the other threads of its pool look for work without going to sleep between them: waking
/// a thread takes longer than many a loop. A thread that finds nothing for a while lets the system run others in its place. `f` begins when all
/// threads look, or after a moment without those that do not; a thread that comes later looks no more. It might come in the middle of a piece of
/// `f`, where waiting for the end of `f` would be waiting for itself.
pub fn awake<R: Send>(f: impl FnOnce() -> R + Send) -> R {
    const MOMENT: Duration = Duration::from_micros(200);
    let (own, threads) = (rayon::current_thread_index(), rayon::current_num_threads());
    if own.is_none() || threads == 1 || INSIDE.get() {
        return f();
    }
    let (looking, begun, done, crew) =
        (AtomicUsize::new(0), AtomicBool::new(false), AtomicBool::new(false), Crew::default());
    let look = |index: usize| {
        if Some(index) == own || begun.load(Ordering::Acquire) {
            return;
        }
        looking.fetch_add(1, Ordering::Relaxed);
        let mut idle = 0;
        while !done.load(Ordering::Relaxed) {
            let due = idle >= PATIENCE || idle % LOOKS == LOOKS - 1;
            if crew.help() || (due && rayon::yield_now() == Some(rayon::Yield::Executed)) {
                idle = 0;
            } else {
                pause(&mut idle);
            }
        }
    };
    let end = Done(&done);
    rayon::in_place_scope(|scope| {
        scope.spawn_broadcast(|_, context| look(context.index()));
        let end = end; // also when `f` panics
        let called = Instant::now();
        while looking.load(Ordering::Relaxed) + 1 < threads && called.elapsed() < MOMENT {
            std::hint::spin_loop();
        }
        begun.store(true, Ordering::Release);
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
            let _helped = Helped(CREW.replace(None));
            let on = Loop::new(&piece, count);
            // SAFETY: `awake`, which set it for this thread, is still running and holds the crew.
            unsafe { &*crew }.share(&on);
        }
        None => (0..count).into_par_iter().with_max_len(1).for_each(&piece),
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

struct Done<'s>(&'s AtomicBool);

impl Drop for Done<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Gives this thread back the crew that it had.
struct Helped(Option<*const Crew>);

impl Drop for Helped {
    fn drop(&mut self) {
        CREW.set(self.0);
    }
}

/// A loop that is being run. Each thread goes through a span of neighbouring pieces, which read the same weights, and then takes from the ends of
/// other spans. It has the same span in every loop, so that it finds in its cache the rows that it wrote in the one before.
struct Loop<'s> {
    piece: &'s (dyn Fn(usize) + Sync),
    /// One for each thread.
    spans: Vec<Span>,
    /// What a piece on another thread panicked with.
    broken: Mutex<Option<Box<dyn Any + Send>>>,
}

impl<'s> Loop<'s> {
    fn new(piece: &'s (dyn Fn(usize) + Sync), count: usize) -> Self {
        assert!(u32::try_from(count).is_ok(), "a loop of more than 2³² pieces");
        let threads = rayon::current_num_threads().min(count);
        let bound = |thread: usize| (count * thread / threads) as u64;
        let spans = (0..threads).map(|i| Span(AtomicU64::new(bound(i + 1) << 32 | bound(i)))).collect();
        Loop { piece, spans, broken: Mutex::new(None) }
    }

    /// Takes pieces until there are none; whether there was one.
    fn work(&self) -> bool {
        let _inside = Inside(INSIDE.replace(true));
        let own = rayon::current_thread_index().unwrap_or(0) % self.spans.len();
        let mut took = false;
        while let Some(i) = self.spans[own].take(false).or_else(|| self.steal()) {
            (self.piece)(i);
            took = true;
        }
        took
    }

    /// The last piece of the longest span.
    fn steal(&self) -> Option<usize> {
        loop {
            let (left, longest) = self.spans.iter().map(|span| (span.left(), span)).max_by_key(|(left, _)| *left)?;
            if left == 0 {
                return None;
            }
            if let Some(i) = longest.take(true) {
                return Some(i);
            }
        }
    }
}

/// The pieces start..end of a span that nobody has taken, as end << 32 | start; alone on its cache line.
#[repr(align(64))]
struct Span(AtomicU64);

impl Span {
    const START: u64 = u32::MAX as u64;

    fn left(&self) -> u64 {
        let span = self.0.load(Ordering::Relaxed);
        (span >> 32) - (span & Span::START)
    }

    /// The first or the last of them, if there is one.
    fn take(&self, last: bool) -> Option<usize> {
        let step = |span: u64| {
            let (start, end) = (span & Span::START, span >> 32);
            (start < end).then(|| if last { (end - 1) << 32 | start } else { end << 32 | (start + 1) })
        };
        let before = self.0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, step).ok()?;
        Some(if last { (before >> 32) - 1 } else { before & Span::START } as usize)
    }
}

/// Sets back whether the thread is inside a piece.
struct Inside(bool);

impl Drop for Inside {
    fn drop(&mut self) {
        INSIDE.set(self.0);
    }
}

/// Threads that look for the loops of another.
#[derive(Default)]
struct Crew {
    /// The loop that is on, or null.
    now: AtomicPtr<Loop<'static>>,
    /// Threads that may hold it.
    at_work: AtomicUsize,
}

impl Crew {
    /// Runs the loop with all who look, and returns when every piece is done.
    fn share(&self, on: &Loop<'_>) {
        let ended = Ended(self); // also when a piece panics
        self.now.store(ptr::from_ref(on).cast_mut().cast(), Ordering::SeqCst);
        on.work();
        drop(ended);
        if let Some(payload) = on.broken.lock().unwrap_or_else(PoisonError::into_inner).take() {
            resume_unwind(payload);
        }
    }

    /// Takes part in the loop that is on, if there is one; whether there was something to do.
    fn help(&self) -> bool {
        if self.now.load(Ordering::Relaxed).is_null() {
            return false;
        }
        self.at_work.fetch_add(1, Ordering::SeqCst);
        let _left = Left(&self.at_work);
        let now = self.now.load(Ordering::SeqCst);
        // SAFETY: the loop lives until `Ended` has taken it away and then seen nobody at work. In the one order of these four steps this thread either
        // came to work before `Ended` looked, or finds null here, or a later loop.
        let Some(on) = (unsafe { now.as_ref() }) else { return false };
        catch_unwind(AssertUnwindSafe(|| on.work())).unwrap_or_else(|payload| {
            *on.broken.lock().unwrap_or_else(PoisonError::into_inner) = Some(payload);
            true
        })
    }
}

struct Left<'s>(&'s AtomicUsize);

impl Drop for Left<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

/// Takes the loop away and waits for those who are at it.
struct Ended<'s>(&'s Crew);

impl Drop for Ended<'_> {
    fn drop(&mut self) {
        self.0.now.store(ptr::null_mut(), Ordering::SeqCst);
        let mut idle = 0;
        while self.0.at_work.load(Ordering::SeqCst) > 0 {
            pause(&mut idle);
        }
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
