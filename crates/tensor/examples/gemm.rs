//! Times matrix products of the model's shapes: cargo run --release -p tensor --example gemm -- [threads] [name part]
//!
//! Prints for each shape GFLOP/s of the `gemm` crate in f32 (group by group on one thread each where there are many), of ours in f32 and in bf16, best
//! of alternating rounds, and the shares of the instruction peak that ours reach. `MOE_LAB_ISA` forces an instruction set (not the crate's).

use std::time::Instant;
use tensor::Precision::{self, Bf16, F32};
use tensor::kernels::gemm::{Matrix, Product, grouped};
use tensor::kernels::peak::register_flops;
use tensor::random::{Purpose, Random};

/// What is multiplied for a layer y [n, f] = x [n, d] Wᵀ.
#[derive(Clone, Copy, PartialEq, Debug)]
enum Pass {
    Forward,
    Input,
    Weight,
}

/// Layers with a weight each, and their rows: (name, rows of each, d, f).
fn shapes() -> Vec<(&'static str, Vec<usize>, usize, usize)> {
    let experts =
        |tokens: usize, count: usize| (0..count).map(|e| tokens * (e + 1) * 2 / (count * (count + 1))).collect();
    vec![
        ("tiny width 64", vec![256], 64, 64),
        ("tiny experts", experts(512, 8), 64, 128),
        ("tiny experts down", experts(512, 8), 64, 64),
        ("seed projection", vec![640], 128, 128),
        ("seed keys", vec![640], 128, 64),
        ("seed scores", vec![640], 128, 4),
        ("seed dense", vec![640], 128, 256),
        ("seed experts", experts(1280, 4), 128, 256),
        ("seed experts down", experts(1280, 4), 128, 128),
        ("seed vocabulary", vec![640], 128, 600),
        ("small projection", vec![4096], 384, 384),
        ("small keys", vec![4096], 384, 128),
        ("small dense", vec![4096], 384, 1024),
        ("small experts", experts(8192, 8), 384, 1024),
        ("small experts down", experts(8192, 8), 512, 384),
        ("small vocabulary", vec![4096], 384, 512),
        ("square 1024", vec![1024], 1024, 1024),
        ("square 2048", vec![2048], 2048, 2048),
    ]
}

fn normals(seed: u64, len: usize) -> Vec<f32> {
    let random = Random::new(seed, Purpose::Test);
    (0..len as u64).map(|i| random.normal(0, i) as f32).collect()
}

struct Layers {
    rows: Vec<usize>,
    d: usize,
    f: usize,
    x: Vec<f32>,
    w: Vec<f32>,
    y: Vec<f32>,
}

impl Layers {
    fn products<'a>(&'a self, pass: Pass, mut dst: &'a mut [f32]) -> Vec<Product<'a, f32>> {
        let (d, f, mut start) = (self.d, self.f, 0);
        let mut products = Vec::new();
        for (e, &n) in self.rows.iter().enumerate() {
            let x = Matrix::new(&self.x[start * d..][..n * d], n, d);
            let y = Matrix::new(&self.y[start * f..][..n * f], n, f);
            let w = Matrix::new(&self.w[e * d * f..][..d * f], f, d);
            let (a, b, len) = match pass {
                Pass::Forward => (x, w.t(), n * f),
                Pass::Input => (y, w, n * d),
                Pass::Weight => (y.t(), x, d * f),
            };
            let (head, tail) = dst.split_at_mut(len);
            dst = tail;
            products.push(Product { dst: head, a, b });
            start += n;
        }
        products
    }
}

/// One pass through the `gemm` crate.
fn crate_products(layers: &Layers, pass: Pass, dst: &mut [f32]) {
    use rayon::prelude::*;
    let (d, f, mut start, mut rest) = (layers.d, layers.f, 0, dst);
    let mut work = Vec::new();
    for (e, &n) in layers.rows.iter().enumerate() {
        let (x, y, w) =
            (&layers.x[start * d..][..n * d], &layers.y[start * f..][..n * f], &layers.w[e * d * f..][..d * f]);
        // (m, n, k), then for both sides data, stride of columns, stride of rows.
        let (sizes, a, b) = match pass {
            Pass::Forward => ((n, f, d), (x, 1, d), (w, d, 1)),
            Pass::Input => ((n, d, f), (y, 1, f), (w, 1, d)),
            Pass::Weight => ((f, d, n), (y, f, 1), (x, 1, d)),
        };
        let (head, tail) = std::mem::take(&mut rest).split_at_mut(sizes.0 * sizes.1);
        rest = tail;
        work.push((head, sizes, a, b));
        start += n;
    }
    let threads = if work.len() > 1 { gemm::Parallelism::None } else { gemm::Parallelism::Rayon(0) };
    work.into_par_iter().for_each(|(dst, (m, n, k), a, b)| {
        let to = (dst.as_mut_ptr(), 1, n as isize);
        // SAFETY: the slices were cut for these sizes and strides; dst is borrowed mutably.
        #[allow(unsafe_code)]
        unsafe {
            gemm::gemm(
                m,
                n,
                k,
                to.0,
                to.1,
                to.2,
                false,
                a.0.as_ptr(),
                a.1 as isize,
                a.2 as isize,
                b.0.as_ptr(),
                b.1 as isize,
                b.2 as isize,
                1.0,
                1.0,
                false,
                false,
                false,
                threads,
            );
        }
    });
}

fn main() {
    let mut arguments = std::env::args().skip(1);
    let threads = arguments.next().map_or(2, |n| n.parse().expect("the number of threads"));
    let part = arguments.next().unwrap_or_default();
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("a thread pool");
    pool.install(|| {
        let peaks = [F32, Bf16].map(|p| register_flops(p) / 1e9);
        println!(
            "{}, {threads} threads, peak {:.0} f32, {:.0} bf16 GFLOP/s",
            tensor::isa::current(),
            peaks[0],
            peaks[1]
        );
        println!("{:20} {:8} {:>7} {:>7} {:>5} {:>7} {:>5}", "", "", "crate", "f32", "share", "bf16", "share");
        for (name, rows, d, f) in shapes().into_iter().filter(|s| s.0.contains(&part)) {
            let n: usize = rows.iter().sum();
            let count = rows.len();
            let (x, w, y) = (normals(1, n * d), normals(2, count * d * f), normals(3, n * f));
            let layers = Layers { rows, d, f, x, w, y };
            let mut dst = vec![0.0; (n * d).max(n * f).max(count * d * f)];
            for pass in [Pass::Forward, Pass::Input, Pass::Weight] {
                let flops = 2.0 * (n * d * f) as f64 / 1e9;
                let mut best = [f64::MAX; 3];
                let (begin, mut rounds) = (Instant::now(), 0);
                while rounds < 5 || (begin.elapsed().as_secs_f64() < 0.25 && rounds < 3000) {
                    for (way, best) in best.iter_mut().enumerate() {
                        let start = Instant::now();
                        match way {
                            0 => crate_products(&layers, pass, &mut dst),
                            _ => grouped([F32, Bf16][way - 1], layers.products(pass, &mut dst), false),
                        }
                        *best = best.min(start.elapsed().as_secs_f64());
                    }
                    rounds += 1;
                }
                let [theirs, plain, narrow] = best.map(|seconds| flops / seconds);
                let share = |rate: f64, p: Precision| 100.0 * rate / peaks[p as usize];
                println!(
                    "{name:20} {:8} {theirs:7.1} {plain:7.1} {:4.0}% {narrow:7.1} {:4.0}%",
                    format!("{pass:?}"),
                    share(plain, F32),
                    share(narrow, Bf16)
                );
            }
        }
    });
}
