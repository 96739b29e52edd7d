//! Parallel loops whose result never depends on the number of threads: work is cut into fixed blocks, sums over blocks are taken in block order.

use crate::Real;
use crate::kernels::crew;

/// Rows a block of a cross-row reduction has. Fixed: it decides the order of summation.
const BLOCK: usize = 64;

/// Below this many numbers a loop stays on one thread; waking the pool would cost more.
const SMALL: usize = 8192;

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
pub fn each<W: Send>(pool: bool, tasks: Vec<W>, f: impl Fn(W) + Sync) {
    map(pool, tasks, f);
}

/// The same, with what `f` returns, in the order of the tasks.
pub fn map<W: Send, R: Send>(pool: bool, tasks: Vec<W>, f: impl Fn(W) -> R + Sync) -> Vec<R> {
    if !pool {
        return tasks.into_iter().map(f).collect();
    }
    crew::map(tasks, f)
}

/// Numbers of a piece of a loop over so many: enough pieces to even out threads, none too small to be worth taking.
fn piece(numbers: usize) -> usize {
    numbers.div_ceil(64).max(SMALL / 4)
}

/// Calls `f(row index, row)` for every `width`-long row of `dst`.
pub fn rows<T: Send>(dst: &mut [T], width: usize, f: impl Fn(usize, &mut [T]) + Sync) {
    if width == 0 {
        return;
    }
    if dst.len() < SMALL {
        dst.chunks_mut(width).enumerate().for_each(|(i, row)| f(i, row));
    } else {
        let block = piece(dst.len()).div_ceil(width);
        each(true, dst.chunks_mut(width * block).enumerate().collect(), |(b, chunk)| {
            chunk.chunks_mut(width).enumerate().for_each(|(i, row)| f(b * block + i, row));
        });
    }
}

/// dst += src.
pub fn add<T: Real>(dst: &mut [T], src: &[T]) {
    if dst.len() < SMALL {
        crate::tape::add(dst, src);
    } else {
        let piece = piece(dst.len());
        each(true, dst.chunks_mut(piece).zip(src.chunks(piece)).collect(), |(dst, src)| crate::tape::add(dst, src));
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
    for sum in map(n * dst.len() >= SMALL, (0..blocks).collect(), partial) {
        crate::tape::add(dst, &sum);
    }
}

/// Sum of `f(i)` for i in 0..n in f64, in blocks of fixed size joined in order.
pub fn sum(n: usize, f: impl Fn(usize) -> f64 + Sync) -> f64 {
    const LONG: usize = 4096;
    let block = |b: usize| (b * LONG..((b + 1) * LONG).min(n)).map(&f).sum::<f64>();
    let blocks = n.div_ceil(LONG);
    map(blocks >= 4, (0..blocks).collect(), block).into_iter().sum()
}
