//! What this machine can do, with the run's dtype and threads: the best of a loop in registers and our own 2048³ product, copying memory, and how far two
//! of its cores are from each other.

use crate::run::Run;
use rayon::prelude::*;
use std::sync::atomic::{AtomicUsize, Ordering};
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
    /// Seconds in which a number changed by one thread is seen, changed and seen again, if there are two threads. A step of many short loops is slower
    /// where this is long: a virtual machine may have its cores side by side in one hour and on different chips in the next.
    pub round_trip: Option<f64>,
}

impl Roof {
    /// To be called inside the run's thread pool.
    pub fn measure(run: &Run) -> Roof {
        let flops = register_flops(run.dtype).max(product_flops(run, SIZE, TRIES));
        Roof { flops, bytes: copied_bytes(), round_trip: (rayon::current_num_threads() > 1).then(round_trip) }
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

/// The best mean of some turns of two threads that count in turn, on cores that the system chooses.
fn round_trip() -> f64 {
    const TURNS: usize = 1000;
    /// Looks after which the other thread may need this core.
    const PATIENCE: usize = 1 << 10;
    let count = AtomicUsize::new(0);
    let take_turns = |own: usize| {
        let (mut best, mut start) = (f64::INFINITY, Instant::now());
        for i in 0..TRIES * TURNS {
            let mut looks = 0;
            while count.load(Ordering::Acquire) != 2 * i + own {
                looks += 1;
                if looks % PATIENCE == 0 { std::thread::yield_now() } else { std::hint::spin_loop() }
            }
            count.store(2 * i + own + 1, Ordering::Release);
            if (i + 1) % TURNS == 0 {
                best = best.min(start.elapsed().as_secs_f64() / TURNS as f64);
                start = Instant::now();
            }
        }
        best
    };
    std::thread::scope(|scope| {
        scope.spawn(|| take_turns(1));
        take_turns(0)
    })
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
