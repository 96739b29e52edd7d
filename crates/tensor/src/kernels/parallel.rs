//! Parallel loops whose result never depends on the number of threads: work is cut into fixed blocks, sums over blocks are taken in block order.

use crate::Real;
use rayon::prelude::*;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// Rows a block of a cross-row reduction has. Fixed: it decides the order of summation.
const BLOCK: usize = 64;

/// Below this many numbers a loop stays on one thread; waking the pool would cost more.
const SMALL: usize = 8192;

/// Runs `f`, which enters many short parallel loops, while the other threads of its pool look for work without going to sleep between them: waking
/// a thread takes longer than many a loop. A thread that finds nothing for a while lets the system run others in its place. `f` begins when all
/// threads look, or after a moment without those that do not; a thread that comes later looks no more. It might come in the middle of a piece of
/// `f`, where waiting for the end of `f` would be waiting for itself.
pub fn awake<R: Send>(f: impl FnOnce() -> R + Send) -> R {
    const PAUSES: usize = 16;
    const PATIENCE: usize = 1000;
    const MOMENT: Duration = Duration::from_micros(200);
    let (own, threads) = (rayon::current_thread_index(), rayon::current_num_threads());
    if own.is_none() || threads == 1 {
        return f();
    }
    let (looking, begun, done) = (AtomicUsize::new(0), AtomicBool::new(false), AtomicBool::new(false));
    let look = |index: usize| {
        if Some(index) == own || begun.load(Ordering::Acquire) {
            return;
        }
        looking.fetch_add(1, Ordering::Relaxed);
        let mut idle = 0;
        while !done.load(Ordering::Relaxed) {
            match rayon::yield_now() {
                Some(rayon::Yield::Executed) => idle = 0,
                _ if idle < PATIENCE => {
                    idle += 1;
                    (0..PAUSES).for_each(|_| std::hint::spin_loop());
                }
                _ => std::thread::yield_now(),
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
        let result = f();
        drop(end);
        result
    })
}

struct Done<'s>(&'s AtomicBool);

impl Drop for Done<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Multiplications below which an op is faster on one thread than waking the pool.
const WORTH: usize = 1 << 20;

/// Whether an op of so many multiplications is worth waking the pool.
pub fn pays(multiplications: usize) -> bool {
    multiplications >= WORTH
}

/// Rows of a task that takes a block of `n` rows through an op's products: about sixteen blocks, each 48 to 144 rows. Threads have no say, so that
/// they never show in a result.
pub fn block(n: usize) -> usize {
    const BLOCKS: usize = 16;
    (n / BLOCKS).next_multiple_of(LEAST).clamp(LEAST, 144)
}

/// Rows of the smallest block.
pub const LEAST: usize = 48;

/// Runs `f` on every task, side by side where `pool` says so.
pub fn each<W: Send>(pool: bool, tasks: Vec<W>, f: impl Fn(W) + Sync + Send) {
    if pool {
        tasks.into_par_iter().with_max_len(1).for_each(f);
    } else {
        tasks.into_iter().for_each(f);
    }
}

/// Calls `f(row index, row)` for every `width`-long row of `dst`.
pub fn rows<T: Send>(dst: &mut [T], width: usize, f: impl Fn(usize, &mut [T]) + Sync) {
    if width == 0 {
        return;
    }
    if dst.len() < SMALL {
        dst.chunks_mut(width).enumerate().for_each(|(i, row)| f(i, row));
    } else {
        let block = (SMALL / 4 / width).max(1);
        dst.par_chunks_mut(width * block)
            .enumerate()
            .for_each(|(b, chunk)| chunk.chunks_mut(width).enumerate().for_each(|(i, row)| f(b * block + i, row)));
    }
}

/// dst += src.
pub fn add<T: Real>(dst: &mut [T], src: &[T]) {
    if dst.len() < SMALL {
        crate::tape::add(dst, src);
    } else {
        dst.par_chunks_mut(SMALL).zip(src.par_chunks(SMALL)).for_each(|(dst, src)| crate::tape::add(dst, src));
    }
}

/// Adds to `dst` the sum over rows 0..n of what `f(row, partial)` adds to a partial of `dst`'s length, in a fixed order.
pub fn reduce_rows<T: Real>(dst: &mut [T], n: usize, f: impl Fn(usize, &mut [T]) + Sync) {
    let blocks = n.div_ceil(BLOCK);
    let partial = |b: usize| {
        let mut sum = vec![T::ZERO; dst.len()];
        (b * BLOCK..((b + 1) * BLOCK).min(n)).for_each(|row| f(row, &mut sum));
        sum
    };
    let partials: Vec<Vec<T>> = if n * dst.len() < SMALL {
        (0..blocks).map(partial).collect()
    } else {
        (0..blocks).into_par_iter().map(partial).collect()
    };
    for sum in partials {
        crate::tape::add(dst, &sum);
    }
}

/// Sum of `f(i)` for i in 0..n in f64, in blocks of fixed size joined in order.
pub fn sum(n: usize, f: impl Fn(usize) -> f64 + Sync) -> f64 {
    const LONG: usize = 4096;
    let block = |b: usize| (b * LONG..((b + 1) * LONG).min(n)).map(&f).sum::<f64>();
    let blocks = n.div_ceil(LONG);
    if blocks < 4 {
        (0..blocks).map(block).sum()
    } else {
        (0..blocks).into_par_iter().map(block).collect::<Vec<f64>>().into_iter().sum()
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
