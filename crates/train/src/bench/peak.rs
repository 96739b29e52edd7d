//! What this machine can do: the best of a loop in registers and our own 2048³ product, with the run's dtype and threads.

use crate::run::Run;
use std::time::Instant;
use tensor::kernels::gemm::{Matrix, matmul};
use tensor::kernels::peak::register_flops;

const SIZE: usize = 2048;
const TRIES: usize = 4;

/// FLOP/s; to be called inside the run's thread pool.
pub fn flops(run: &Run) -> f64 {
    register_flops(run.dtype).max(product_flops(run, SIZE, TRIES))
}

/// The best rate of a few products of squares.
pub fn product_flops(run: &Run, size: usize, tries: usize) -> f64 {
    let (a, b, mut c) = (vec![1.0f32; size * size], vec![0.5f32; size * size], vec![0.0f32; size * size]);
    let mut best = 0.0f64;
    for _ in 0..tries {
        let start = Instant::now();
        matmul(run.dtype, &mut c, Matrix::new(&a, size, size), Matrix::new(&b, size, size), false);
        best = best.max(2.0 * (size as f64).powi(3) / start.elapsed().as_secs_f64());
    }
    best
}
