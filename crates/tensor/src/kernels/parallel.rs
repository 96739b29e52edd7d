//! Parallel loops whose result never depends on the number of threads: work is cut into fixed blocks, sums over blocks are taken in block order.

use crate::Real;
use rayon::prelude::*;

/// Rows a block of a cross-row reduction has. Fixed: it decides the order of summation.
const BLOCK: usize = 64;

/// Below this many numbers a loop stays on one thread; waking the pool would cost more.
const SMALL: usize = 8192;

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
