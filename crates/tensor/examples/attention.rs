//! Times the attention op alone: cargo run --release -p tensor --example attention -- [threads] [name part]
//!
//! Prints for each shape and precision the milliseconds of the forward and the backward pass, nanoseconds per pair of query and key and head, and the
//! rate of the arithmetic that the definition needs (products only: 4 dh operations a pair forward, 10 dh backward) beside that of a 1024³ product in
//! f32.

use std::time::Instant;
use tensor::kernels::gemm::{Matrix, matmul};
use tensor::ops::attention::{Attention, Mixture, Position, attention, attention_within};
use tensor::ops::experts::Assignments;
use tensor::random::Purpose;
use tensor::{Arena, Engine, Layout, Precision, Random, Tape, Value};

struct Shape {
    name: &'static str,
    documents: usize,
    length: usize,
    heads: usize,
    kv_heads: usize,
    width: usize,
    cope: bool,
    /// Of the heads behind the first quarter, the number that a token takes; 0 for no mixture.
    active: usize,
}

const SHAPES: [Shape; 9] = [
    shape("recipe rope", (12, 64), (4, 4, 32), false),
    shape("seed cope", (8, 80), (8, 4, 16), true),
    Shape { active: 4, ..shape("seed cope mixture", (8, 80), (8, 4, 16), true) },
    shape("seed rope", (8, 80), (8, 4, 16), false),
    shape("small cope", (16, 256), (6, 2, 64), true),
    Shape { active: 3, ..shape("small cope mixture", (16, 256), (6, 2, 64), true) },
    shape("small rope", (16, 256), (6, 2, 64), false),
    shape("long cope", (1, 4096), (4, 4, 64), true),
    shape("long rope", (1, 4096), (4, 4, 64), false),
];

const fn shape(
    name: &'static str,
    (documents, length): (usize, usize),
    (heads, kv_heads, width): (usize, usize, usize),
    cope: bool,
) -> Shape {
    Shape { name, documents, length, heads, kv_heads, width, cope, active: 0 }
}

fn normals(seed: u64, len: usize) -> Vec<f32> {
    let random = Random::new(seed, Purpose::Test);
    (0..len as u64).map(|i| random.normal(0, i) as f32).collect()
}

/// Best seconds of (forward, backward) over about `seconds`; with `widest`, rows have windows of their own of a quarter of it to all of it.
fn time(shape: &Shape, precision: Precision, widest: Option<usize>, seconds: f64) -> [f64; 2] {
    let n = shape.documents * shape.length;
    // Windows change every 16 tokens.
    let windows_n = widest.map(|widest| (0..n).map(|t| (widest / 4 * (1 + t / 16 * 7 % 4)) as u32).collect());
    let layout = Layout::new([("table".into(), vec![65, shape.width], true)]);
    let table = layout.get("table").expect("the layout has one tensor");
    let params: Vec<f32> = normals(1, layout.len()).iter().map(|e| 0.1 * e).collect();
    let position = if shape.cope { Position::Cope { table } } else { Position::Rope { base: 10_000.0 } };
    let spec = Attention { heads: shape.heads, kv_heads: shape.kv_heads, window: None, position };
    let offsets = (0..=shape.documents).map(|d| d * shape.length).collect();
    let kv = shape.kv_heads * shape.width;
    let inputs = [(2, shape.heads * shape.width), (3, kv), (4, kv), (5, shape.heads)]
        .map(|(seed, width)| (normals(seed, n * width), width));
    let shared = shape.heads / 4;
    let routed = std::sync::Arc::new(Assignments {
        row_offsets_n1: (0..=n).map(|t| t * shape.active).collect(),
        expert_ids_a: (0..n * shape.active)
            .map(|a| ((a / shape.active * 7 + a % shape.active) % (shape.heads - shared)) as u32)
            .collect(),
        num_experts: shape.heads - shared,
    });
    let upstream = normals(6, n * shape.heads * shape.width);
    let (arena, mut flat, mut best) = (Arena::default(), vec![0.0; params.len()], [f64::INFINITY; 2]);
    let start = Instant::now();
    while start.elapsed().as_secs_f64() < seconds || best[1].is_infinite() {
        let mut tape = Tape::new(Engine::Cpu, &params, &arena).with_precision(precision);
        let x = inputs.each_ref().map(|(data, width)| tape.leaf(data, n, *width));
        let mixture = (shape.active > 0).then(|| Mixture { gates_nh: &x[3], shared, routed: routed.clone() });
        let start = Instant::now();
        let y = match &windows_n {
            None => attention(&mut tape, [&x[0], &x[1], &x[2]], &offsets, spec, mixture),
            Some(own) => attention_within(&mut tape, [&x[0], &x[1], &x[2]], &offsets, spec, mixture, own).0,
        };
        best[0] = best[0].min(start.elapsed().as_secs_f64());
        let loss = project(&mut tape, &y, &upstream);
        let start = Instant::now();
        drop(tape.backward(&loss, &mut flat));
        best[1] = best[1].min(start.elapsed().as_secs_f64());
    }
    best
}

/// A value whose gradient with respect to y is `upstream`.
fn project<'a>(tape: &mut Tape<'a>, y: &Value, upstream: &'a [f32]) -> Value {
    let loss = tape.output(tape.arena().zeros(1), 1, 1, true);
    let (slot, y) = (loss.slot(), y.slot());
    tape.record(move |grads| {
        if grads.take(slot).is_some() {
            grads.write(y, |d, _| d.copy_from_slice(upstream));
        }
    });
    loss
}

/// Operations a second of a product of two 1024 x 1024 matrices.
fn product_rate() -> f64 {
    const N: usize = 1024;
    let (a, b, mut c) = (normals(1, N * N), normals(2, N * N), vec![0.0; N * N]);
    let seconds = (0..8).map(|_| {
        let start = Instant::now();
        matmul(Precision::F32, &mut c, Matrix::new(&a, N, N), Matrix::new(&b, N, N), false);
        start.elapsed().as_secs_f64()
    });
    2.0 * (N * N * N) as f64 / seconds.fold(f64::INFINITY, f64::min)
}

fn main() {
    let mut arguments = std::env::args().skip(1);
    let threads = arguments.next().map_or(Ok(0), |n| n.parse()).expect("the first argument is the number of threads");
    let part = arguments.next().unwrap_or_default();
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("threads can be started");
    pool.install(|| {
        let peak = product_rate();
        println!("{} threads, a 1024³ product: {:.0} GFLOP/s", rayon::current_num_threads(), peak / 1e9);
        for shape in SHAPES.iter().filter(|shape| shape.name.contains(&part)) {
            report(shape, Precision::F32, peak);
            report(shape, Precision::Bf16, peak);
        }
    });
}

/// Prints what `time` finds, beside a peak of operations a second.
fn report(shape: &Shape, precision: Precision, peak: f64) {
    let active = if shape.active > 0 { shape.heads / 4 + shape.active } else { shape.heads };
    let pairs = (shape.documents * shape.length * (shape.length + 1) / 2 * active) as f64;
    let [forward, backward] = time(shape, precision, None, 1.5);
    let rate = pairs * 14.0 * shape.width as f64 / (forward + backward);
    let dtype = if precision == Precision::F32 { "f32" } else { "bf16" };
    let Shape { name, documents, length, width, kv_heads, .. } = shape;
    print!("{name:18} {dtype:4} {documents:2} x {length:4}, {active} heads of {width} on {kv_heads}: ");
    print!("{:8.3} + {:8.3} ms, ", forward * 1e3, backward * 1e3);
    print!("{:5.2} + {:5.2} ns per pair and active head, ", forward * 1e9 / pairs, backward * 1e9 / pairs);
    println!("{:4.0} GFLOP/s = {:2.0} %", rate / 1e9, 100.0 * rate / peak);
    for widest in [*length, length / 4, length / 16].into_iter().filter(|_| *documents == 1) {
        let own = time(shape, precision, Some(widest), 1.5);
        println!("    windows of {:4} to {widest:4} keys: {:8.3} + {:8.3} ms", widest / 4, own[0] * 1e3, own[1] * 1e3);
    }
}
