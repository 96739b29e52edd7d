//! What this machine can do, with the run's dtype and threads: the best of a loop in registers and our own 2048³ product, and copying memory.

use crate::run::Run;
use rayon::prelude::*;
use std::time::Instant;
use tensor::kernels::gemm::{Matrix, matmul};
use tensor::kernels::peak::register_flops;

const SIZE: usize = 2048;
const TRIES: usize = 4;

/// The roofline of a machine.
#[derive(Clone, Copy, Debug)]
pub struct Roof {
    /// FLOP/s of products.
    pub flops: f64,
    /// Bytes/s read and written, far beyond the caches.
    pub bytes: f64,
}

impl Roof {
    /// To be called inside the run's thread pool.
    pub fn measure(run: &Run) -> Roof {
        Roof { flops: register_flops(run.dtype).max(product_flops(run, SIZE, TRIES)), bytes: copied_bytes() }
    }

    /// Seconds that this much work takes at least.
    pub fn seconds(&self, flops: f64, bytes: f64) -> f64 {
        (flops / self.flops).max(bytes / self.bytes)
    }
}

/// The best rate of copying 256 MiB by all threads, counted as read and as written.
fn copied_bytes() -> f64 {
    const LEN: usize = 64 << 20;
    let (from, mut to) = (vec![1.0f32; LEN], vec![0.0f32; LEN]);
    let piece = LEN.div_ceil(rayon::current_num_threads());
    let rate = |_| {
        let start = Instant::now();
        to.par_chunks_mut(piece).zip(from.par_chunks(piece)).for_each(|(to, from)| to.copy_from_slice(from));
        (2 * LEN * size_of::<f32>()) as f64 / start.elapsed().as_secs_f64()
    };
    (0..TRIES).map(rate).fold(0.0, f64::max)
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
