//! Every face of every instruction set here (under an emulator: of the emulated machine) against a triple loop in f64.

use super::pack::Element;
use super::tile::{Strip, Tile};
use super::*;
use crate::kernels::bf16::round;
use crate::random::{Purpose, Random};
use proptest::prelude::*;

/// A product with its views: what surrounds dst must stay.
#[derive(Clone, Debug)]
struct Case {
    m: usize,
    n: usize,
    k: usize,
    turned_a: bool,
    turned_b: bool,
    /// The operand was rounded to bf16 before.
    narrow_a: bool,
    narrow_b: bool,
    accumulate: bool,
    /// Numbers between rows of a, b and dst.
    gap: usize,
    /// The exponents of operands reach from 2^-spread to 2^spread.
    spread: i32,
    seed: u64,
}

fn numbers(seed: u64, len: usize, spread: i32) -> Vec<f32> {
    let random = Random::new(seed, Purpose::Test);
    let draw = |i: u64| {
        let power = (random.normal(1, i) * 1e6).abs() as i32 % (2 * spread + 1) - spread;
        random.normal(0, i) as f32 * 2f32.powi(power)
    };
    (0..len as u64).map(draw).collect()
}

/// A matrix [rows, cols], row by row or turned, with a gap between lines.
fn view(data: &[f32], rows: usize, cols: usize, turned: bool, gap: usize) -> Matrix<'_, f32> {
    if turned {
        Matrix::strided(data, cols, rows, rows + gap).t()
    } else {
        Matrix::strided(data, rows, cols, cols + gap)
    }
}

/// The same of numbers rounded to bf16.
fn narrow(data: &[Bf16], rows: usize, cols: usize, turned: bool, gap: usize) -> Matrix<'_, f32> {
    if turned { Matrix::narrow(data, cols, rows, rows + gap).t() } else { Matrix::narrow(data, rows, cols, cols + gap) }
}

fn rounded(data: &[f32]) -> Vec<Bf16> {
    data.iter().map(|x| Bf16::new(*x)).collect()
}

fn room(rows: usize, cols: usize, gap: usize) -> usize {
    (rows + gap) * (cols + gap)
}

fn at(x: &Matrix<'_, f32>, i: usize, j: usize) -> f32 {
    let (line, place) = if x.turned { (j, i) } else { (i, j) };
    let at = x.order.map_or(line, |order| order[line] as usize) * x.stride + place;
    match x.data {
        Numbers::Wide(data) => data[at],
        Numbers::Narrow(data) => data[at].to_f32(),
    }
}

/// The faces to test: by set and precision, and pairs without an instruction.
fn faces() -> Vec<(String, Method)> {
    let mut faces = Vec::new();
    for isa in isa::available() {
        for precision in [Precision::F32, Precision::Bf16] {
            faces.push((format!("{isa} {precision:?}"), Method::of(isa, precision)));
        }
    }
    for (name, tile) in [("bf16", pairs::<8, 32>(1)), ("AMX", pairs::<32, 32>(16)), ("small", pairs::<4, 8>(1))] {
        faces.push((format!("pairs as for {name}"), Method { tile, element: Element::Pair }));
    }
    faces
}

/// The tile of an instruction for pairs of bf16, without the instruction: what packs and cuts for it is tested on every machine.
fn pairs<const R: usize, const C: usize>(unit: usize) -> Tile {
    unsafe fn run<const R: usize, const C: usize>(s: Strip) {
        let halves = |x: f32| (f32::from_bits(x.to_bits() << 16), f32::from_bits(x.to_bits() & 0xffff_0000));
        for (r, c) in (0..R).flat_map(|r| (0..C).map(move |c| (r, c))) {
            // SAFETY: as `Tile::run` says.
            unsafe {
                let mut sum = 0.0;
                for l in 0..s.k {
                    let (a, b) = (halves(*s.a.add(r * s.a_row + l * s.a_k)), halves(*s.b.add(l * s.b_k + c)));
                    sum += a.0 * b.0 + a.1 * b.1;
                }
                let to = s.dst.add(r * s.stride + c);
                *to = if s.add { *to + sum } else { sum };
            }
        }
    }
    assert!(R * C <= 32 * 32);
    Tile { rows: R, cols: C, pairs: true, unit, run: run::<R, C>, half: None, enter: || (), leave: || () }
}

fn product(method: Method, case: &Case, dst: &mut [f32], a: Matrix<'_, f32>, b: Matrix<'_, f32>) {
    let job = job(dst, case.n + case.gap, a, b).unwrap();
    run(method, &[job], case.accumulate, true);
}

fn agrees(case: &Case) -> Result<(), TestCaseError> {
    let Case { m, n, k, gap, .. } = *case;
    let a = numbers(case.seed, room(m, k, gap), case.spread);
    let b = numbers(case.seed + 1, room(k, n, gap), case.spread);
    let (narrow_a, narrow_b) = (rounded(&a), rounded(&b));
    let a = match case.narrow_a {
        true => narrow(&narrow_a, m, k, case.turned_a, gap),
        false => view(&a, m, k, case.turned_a, gap),
    };
    let b = match case.narrow_b {
        true => narrow(&narrow_b, k, n, case.turned_b, gap),
        false => view(&b, k, n, case.turned_b, gap),
    };
    let before = numbers(case.seed + 2, room(m, n, gap), case.spread);
    for (name, method) in faces() {
        let mut dst = before.clone();
        product(method, case, &mut dst, a, b);
        let operand = |x: f32| f64::from(if method.element == Element::Plain { x } else { f32::from_bits(round(x)) });
        for (x, (found, before)) in dst.iter().zip(&before).enumerate() {
            let (i, j) = (x / (n + gap), x % (n + gap));
            if i >= m || j >= n {
                prop_assert_eq!(found.to_bits(), before.to_bits(), "{} wrote beside dst: {:?}", name, case);
                continue;
            }
            let terms = (0..k).map(|l| operand(at(&a, i, l)) * operand(at(&b, l, j)));
            let start = if case.accumulate { f64::from(*before) } else { 0.0 };
            let (mut sum, mut size) = (start, start.abs());
            terms.for_each(|t| (sum, size) = (sum + t, size + t.abs()));
            let error = (f64::from(*found) - sum).abs();
            let bound = (k as f64 + 2.0) * f64::from(f32::EPSILON) * size + 1e-30;
            prop_assert!(error <= bound, "{} ({}, {}): {} instead of {}: {:?}", name, i, j, found, sum, case);
        }
    }
    Ok(())
}

/// Small sizes, sizes around the tiles', and sizes beyond one run of k.
fn size(most: usize) -> impl Strategy<Value = usize> {
    prop_oneof![3 => 0..=9usize, 3 => 10..=40usize, 1 => 41..=most]
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(cases(300)) })]

    #[test]
    fn products_agree_with_the_triple_loop(
        (m, n, k) in (size(110), size(110), prop_oneof![9 => size(110), 1 => 250..=1100usize]),
        (turned_a, turned_b, narrow_a, narrow_b, accumulate) in any::<(bool, bool, bool, bool, bool)>(),
        gap in prop_oneof![Just(0usize), 1..=19usize],
        spread in prop_oneof![Just(0), Just(3), Just(45)],
        seed in 0..1u64 << 40,
    ) {
        agrees(&Case { m, n, k, turned_a, turned_b, narrow_a, narrow_b, accumulate, gap, spread, seed })?;
    }

    /// A group is its products one by one, bit for bit; the sum over threads of different sizes is the same too.
    #[test]
    fn groups_are_their_products_for_any_number_of_threads(
        rows in prop::collection::vec(prop_oneof![2 => Just(0usize), 4 => 1..=40usize, 1 => 100..=300usize], 0..9),
        (n, k) in (1..=100usize, 0..=100usize),
        (turned, weight_gradient, accumulate) in any::<(bool, bool, bool)>(),
        seed in 0..1u64 << 40,
    ) {
        let total: usize = rows.iter().sum();
        let (x, w) = (numbers(seed, total * (n + k), 3), numbers(seed + 1, rows.len() * n * k, 3));
        // Forward and input gradient: [rows, k] · [k, n] for each; weight gradient: [rows, k]ᵀ · [rows, n].
        let sizes: Vec<usize> = rows.iter().map(|r| if weight_gradient { k * n } else { r * n }).collect();
        let start = numbers(seed + 2, sizes.iter().sum(), 3);
        let split = |dst: &mut Vec<f32>, run: &dyn Fn(Vec<Product<'_, f32>>)| {
            let mut rest = &mut dst[..];
            let (mut row, mut products) = (0, Vec::new());
            for (e, (&r, &len)) in rows.iter().zip(&sizes).enumerate() {
                let (dst, tail) = rest.split_at_mut(len);
                rest = tail;
                let a = Matrix::new(&x[row * k..(row + r) * k], r, k);
                let w = &w[e * n * k..(e + 1) * n * k];
                products.push(if weight_gradient {
                    Product { dst, a: a.t(), b: Matrix::new(&x[total * k + row * n..][..r * n], r, n) }
                } else {
                    Product { dst, a, b: if turned { Matrix::new(w, n, k).t() } else { Matrix::new(w, k, n) } }
                });
                row += r;
            }
            run(products);
        };
        for precision in [Precision::F32, Precision::Bf16] {
            let mut expected = start.clone();
            split(&mut expected, &|products| {
                for p in products {
                    matmul_strided(precision, p.dst, p.b.cols, p.a, p.b, accumulate, Threads::One);
                }
            });
            for pool in pools() {
                let mut found = start.clone();
                pool.install(|| split(&mut found, &|products| grouped(precision, products, accumulate)));
                prop_assert!(bits(&found) == bits(&expected), "{} threads", pool.current_num_threads());
            }
        }
    }
}

#[test]
fn numbers_rounded_before_give_the_bytes_of_those_rounded_in_passing() {
    for (m, n, k) in [(1, 3, 5), (33, 70, 65), (97, 200, 600), (300, 64, 31)] {
        let (a, b) = (numbers(1, m * k, 3), numbers(2, k * n, 3));
        let (a_halves, b_halves) = (rounded(&a), rounded(&b));
        let rounding = faces().into_iter().filter(|(_, method)| method.element != Element::Plain);
        for ((name, method), turned) in rounding.flat_map(|face| [(face.clone(), false), (face, true)]) {
            let compute = |a: Matrix<'_, f32>, b: Matrix<'_, f32>| {
                let mut dst = vec![0.5f32; m * n];
                run(method, &[job(&mut dst, n, a, b).unwrap()], true, true);
                bits(&dst)
            };
            let halves = (narrow(&a_halves, m, k, turned, 0), narrow(&b_halves, k, n, turned, 0));
            let found = compute(halves.0, halves.1);
            assert_eq!(found, compute(view(&a, m, k, turned, 0), view(&b, k, n, turned, 0)), "{name} {m} {n} {k}");
            // And line by line in another order.
            if !turned {
                let order: Vec<u32> = (0..m as u32).rev().collect();
                let rows = Matrix { order: Some(&order), ..halves.0 };
                let back: Vec<u32> = compute(rows, halves.1).chunks(n).rev().flatten().copied().collect();
                assert_eq!(back, found, "{name} {m} {n} {k}");
            }
        }
    }
}

#[test]
fn rounded_rows_agree_wherever_they_start_and_however_far_apart_they_are() {
    let (m, k, n) = (19, 64, 35);
    for (start, stride) in [(0, 64), (1, 64), (2, 66), (1, 65), (0, 2048), (3, 2048)] {
        let (a, b) = (numbers(1, start + (m - 1) * stride + k, 3), numbers(2, k * n, 3));
        let halves = rounded(&a);
        let whole: Vec<f32> = halves.iter().map(|x| x.to_f32()).collect();
        let product = |a: Matrix<'_, f32>| {
            let mut dst = vec![0.0f32; m * n];
            matmul(Precision::Bf16, &mut dst, a, Matrix::new(&b, k, n), false);
            bits(&dst)
        };
        let found = product(Matrix::narrow(&halves[start..], m, k, stride));
        assert_eq!(found, product(Matrix::strided(&whole[start..], m, k, stride)), "{start} {stride}");
    }
}

#[test]
fn f64_takes_rounded_numbers_as_numbers() {
    let (a, b) = (numbers(1, 5 * 7, 3), numbers(2, 7 * 4, 3));
    let (halves, order) = (rounded(&a), [4, 0, 2]);
    let b: Vec<f64> = b.into_iter().map(f64::from).collect();
    let whole: Vec<f64> = halves.iter().map(|x| x.to_f32().into()).collect();
    let product = |a: Matrix<'_, f64>| {
        let mut dst = vec![0.0; a.rows * 4];
        matmul(Precision::F32, &mut dst, a, Matrix::new(&b, 7, 4), false);
        dst
    };
    assert_eq!(product(Matrix::narrow(&halves, 5, 7, 7)), product(Matrix::new(&whole, 5, 7)));
    assert_eq!(product(Matrix::narrow(&halves, 7, 5, 5).t()), product(Matrix::new(&whole, 7, 5).t()));
    let rows = Matrix { order: Some(&order), rows: 3, ..Matrix::narrow(&halves, 5, 7, 7) };
    assert_eq!(product(rows), product(Matrix::gathered(&whole, 7, &order)));
}

/// Cases that proptest draws; `PROPTEST_CASES` overrides it (an emulator is slow).
fn cases(usual: u32) -> u32 {
    std::env::var("PROPTEST_CASES").ok().and_then(|n| n.parse().ok()).unwrap_or(usual)
}

fn bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|x| x.to_bits()).collect()
}

fn pools() -> &'static [rayon::ThreadPool] {
    static POOLS: std::sync::OnceLock<Vec<rayon::ThreadPool>> = std::sync::OnceLock::new();
    POOLS.get_or_init(|| [1, 2, 3, 8].map(|n| rayon::ThreadPoolBuilder::new().num_threads(n).build().unwrap()).into())
}

#[test]
fn bytes_depend_neither_on_threads_nor_on_the_rows_beside() {
    for (m, k, n) in [(96, 128, 128), (128, 512, 256), (257, 333, 129)] {
        let (a, b) = (numbers(1, m * k, 0), numbers(2, k * n, 0));
        for (name, method) in faces() {
            let compute = |rows: usize, turned: bool| {
                let mut dst = vec![0.0f32; rows * n];
                let b = if turned { Matrix::new(&b, n, k).t() } else { Matrix::new(&b, k, n) };
                run(method, &[job(&mut dst, n, Matrix::new(&a[..rows * k], rows, k), b).unwrap()], false, true);
                bits(&dst)
            };
            for turned in [false, true] {
                let one = pools()[0].install(|| compute(m, turned));
                assert!(pools().iter().all(|pool| pool.install(|| compute(m, turned)) == one), "{name} {m}x{k}x{n}");
                for rows in [1, 2, 7, 33] {
                    assert_eq!(compute(rows, turned), one[..rows * n], "{name} {rows} rows of {m}x{k}x{n}");
                }
            }
        }
    }
}

/// Right sides beyond what is packed at a time: one product that is cut, and many.
#[test]
fn large_right_sides_are_taken_in_parts() {
    let (m, k, n) = (13, 300, 7100);
    let (a, b) = (numbers(1, m * k, 0), numbers(2, k * n, 0));
    let narrow = |from: usize, to: usize| (0..k).flat_map(|l| b[l * n + from..l * n + to].to_vec()).collect::<Vec<_>>();
    for precision in [Precision::F32, Precision::Bf16] {
        let mut whole = vec![0.5; m * n];
        matmul(precision, &mut whole, Matrix::new(&a, m, k), Matrix::new(&b, k, n), true);
        let parts: Vec<_> = (0..n).step_by(710).map(|j| narrow(j, j + 710)).collect();
        let mut dst = vec![0.0; m * n];
        let mut products = Vec::new();
        for (dst, b) in dst.chunks_mut(m * 710).zip(&parts) {
            products.push(Product { dst, a: Matrix::new(&a, m, k), b: Matrix::new(b, k, 710) });
        }
        grouped(precision, products, false);
        for (x, whole) in whole.iter().enumerate() {
            let (i, j) = (x / n, x % n);
            let part = dst[j / 710 * m * 710 + i * 710 + j % 710];
            assert!((whole - part - 0.5).abs() < 1e-3 && part != 0.0, "({i}, {j}): {whole} {part}");
        }
    }
}

#[test]
fn nan_and_infinity_reach_the_numbers_they_belong_to_and_no_other() {
    let (m, k, n) = (9, 40, 35);
    for (name, method) in faces() {
        let (mut a, b) = (vec![1.0f32; m * k], vec![0.5f32; k * n]);
        (a[2 * k + 39], a[5 * k], a[7 * k + 3], a[7 * k + 4]) =
            (f32::NAN, f32::INFINITY, f32::INFINITY, -f32::INFINITY);
        a[8 * k + 1] = f32::MAX; // rounds to infinity in bf16
        let mut dst = vec![0.0; m * n];
        run(method, &[job(&mut dst, n, Matrix::new(&a, m, k), Matrix::new(&b, k, n)).unwrap()], false, true);
        for (i, row) in dst.chunks(n).enumerate() {
            let as_expected = |x: &f32| match i {
                2 | 7 => x.is_nan(),
                5 => *x == f32::INFINITY,
                8 if method.element != Element::Plain => *x == f32::INFINITY,
                8 => *x == f32::MAX / 2.0,
                _ => *x == 20.0,
            };
            assert!(row.iter().all(as_expected), "{name} row {i}: {row:?}");
        }
    }
}

#[test]
fn bf16_rounds_the_operands_and_nothing_else() {
    let nearest = |x: f32| f32::from_bits(round(x));
    // 1 + i/256 lies on a bf16 number for even i and halfway between two for odd i: the even one is nearest.
    for (i, even) in [(0u16, 0u16), (1, 0), (2, 2), (3, 4), (5, 4), (7, 8)] {
        assert_eq!(nearest(1.0 + f32::from(i) / 256.0), 1.0 + f32::from(even) / 256.0, "{i}");
        assert_eq!(nearest(-1.0 - f32::from(i) / 256.0 - 1e-6), -1.0 - f32::from(i + i % 2) / 256.0, "{i}");
    }
    assert!(nearest(f32::MAX).is_infinite() && nearest(f32::NEG_INFINITY) < 0.0);
    assert!(nearest(f32::NAN).is_nan() && nearest(f32::from_bits(0x7f80_0001)).is_nan());
    let (a, b) = (numbers(1, 7 * 5, 0), numbers(2, 5 * 9, 0));
    let rounded = |x: &[f32]| x.iter().map(|x| nearest(*x)).collect::<Vec<_>>();
    let [mut narrow, mut plain, mut expected] = [(); 3].map(|_| vec![0.0f32; 63]);
    matmul(Precision::Bf16, &mut narrow, Matrix::new(&a, 7, 5), Matrix::new(&b, 5, 9), false);
    matmul(Precision::F32, &mut plain, Matrix::new(&a, 7, 5), Matrix::new(&b, 5, 9), false);
    matmul(Precision::F32, &mut expected, Matrix::new(&rounded(&a), 7, 5), Matrix::new(&rounded(&b), 5, 9), false);
    assert!(narrow.iter().zip(&expected).all(|(a, b)| (a - b).abs() < 1e-5) && narrow != plain);
}

#[test]
fn f64_products_match_the_definition() {
    let random = Random::new(1, Purpose::Test);
    for (step, (m, k, n)) in [(0, 3, 4), (1, 1, 1), (5, 0, 3), (33, 16, 15), (70, 129, 65)].into_iter().enumerate() {
        let fill = |offset: u64, len: usize| -> Vec<f64> {
            (0..len as u64).map(|i| random.normal(step as u64, offset + i)).collect()
        };
        let (a, b) = (fill(0, m * k), fill(1 << 20, k * n));
        let mut found = vec![1.0; m * n];
        matmul(Precision::F32, &mut found, Matrix::new(&a, m, k), Matrix::new(&b, k, n), true);
        for (x, found) in found.iter().enumerate() {
            let expected = 1.0 + (0..k).map(|l| a[x / n * k + l] * b[l * n + x % n]).sum::<f64>();
            assert!((found - expected).abs() < 1e-12);
        }
    }
}

/// Some of `count` lines, `len` of them: some twice, some not at all.
fn order(seed: u64, len: usize, count: usize) -> Vec<u32> {
    (0..len as u64).map(|i| (seed + 7 * i * i + 3 * i) as u32 % count as u32).collect()
}

#[test]
fn gathered_rows_give_the_bytes_of_their_copies() {
    for (m, n, k) in [(1, 1, 1), (5, 40, 3), (40, 33, 70), (23, 64, 600), (70, 9, 1), (0, 4, 5), (130, 100, 34)] {
        for (name, method) in faces() {
            let copied = |x: &[f32], order: &[u32], width: usize| -> Vec<f32> {
                order.iter().flat_map(|&i| x[i as usize * width..][..width].to_vec()).collect()
            };
            // Rows of the left side, then rows along k of both, as weight gradients have them.
            let (x, w) = (numbers(1, 90 * k, 3), numbers(2, n * k, 3));
            let rows = order(3, m, 90);
            let copy = copied(&x, &rows, k);
            let [mut found, mut expected] = [(); 2].map(|()| vec![0.5f32; m * n]);
            let w = Matrix::new(&w, n, k).t();
            run(method, &[job(&mut found, n, Matrix::gathered(&x, k, &rows), w).unwrap()], true, true);
            run(method, &[job(&mut expected, n, Matrix::new(&copy, m, k), w).unwrap()], true, true);
            assert!(found.iter().zip(&expected).all(|(a, b)| a.to_bits() == b.to_bits()), "{name}: {m} {n} {k}");
            let (x, y) = (numbers(4, 90 * m, 3), numbers(5, 90 * n, 3));
            let deep = order(6, k, 90);
            let (x_copy, y_copy) = (copied(&x, &deep, m), copied(&y, &deep, n));
            let a = Matrix::gathered(&x, m, &deep).t();
            run(method, &[job(&mut found, n, a, Matrix::gathered(&y, n, &deep)).unwrap()], true, true);
            let a = Matrix::new(&x_copy, k, m).t();
            run(method, &[job(&mut expected, n, a, Matrix::new(&y_copy, k, n)).unwrap()], true, true);
            assert!(found.iter().zip(&expected).all(|(a, b)| a.to_bits() == b.to_bits()), "{name}: {m} {n} {k}");
        }
    }
    let columns = Matrix::gathered(&[1.0f32; 6], 2, &[2, 0]).t();
    assert_eq!((columns.rows, columns.cols), (2, 2));
    assert!(std::panic::catch_unwind(|| Matrix::gathered(&[1.0f32; 6], 2, &[3])).is_err(), "no such row");
}

#[test]
fn a_left_side_packed_once_gives_the_bytes_of_a_product_each() {
    let (narrow, single) = (Precision::Bf16, Precision::F32);
    let arena = crate::Arena::default();
    for (m, k, n) in [(1, 5, 7), (97, 33, 50), (200, 600, 65)] {
        let (a, b) = (numbers(1, m * k, 3), numbers(2, 4 * k * n, 3));
        let side =
            |i: usize, precision| Side { matrix: view(&b[i * k * n..], k, n, i % 2 == 1, 0), precision, rows: m };
        let sides = vec![side(0, narrow), side(1, narrow), side(2, single), side(3, narrow)];
        let packed = Packed::new(&arena, sides, false);
        let [mut both, mut third, mut last] = [2 * n, n, n].map(|width| vec![0.5f32; m * width]);
        let a = Matrix::new(&a, m, k);
        let mut to = [
            To { sides: 0..2, dst: &mut both },
            To { sides: 2..3, dst: &mut third },
            To { sides: 3..4, dst: &mut last },
        ];
        packed.multiply_all(&mut to, a, true);
        for side in 0..4 {
            let mut expected = vec![0.5f32; m * n];
            packed.multiply(side, &mut expected, a, true);
            let found = |i: usize, j: usize| match side {
                0 | 1 => both[i * 2 * n + side * n + j],
                2 => third[i * n + j],
                _ => last[i * n + j],
            };
            let same = (0..m * n).all(|x| found(x / n, x % n).to_bits() == expected[x].to_bits());
            assert!(same, "{m} {k} {n}, side {side}");
        }
    }
}

#[test]
fn packed_sides_give_the_bytes_of_a_product_each() {
    let arena = crate::Arena::default();
    for (m, k, n) in [(1, 5, 7), (30, 0, 4), (97, 33, 50), (200, 300, 65)] {
        let (a, b) = (numbers(1, m * k, 3), numbers(2, 2 * k * n, 3));
        let sides = [Precision::F32, Precision::Bf16].into_iter().flat_map(|precision| {
            let [plain, turned] = [view(&b, k, n, false, 0), view(&b[k * n..], k, n, true, 0)];
            [plain, turned].map(|matrix| Side { matrix, precision, rows: m })
        });
        let sides: Vec<Side<'_, f32>> = sides.collect();
        let packed = Packed::new(&arena, sides.clone(), false);
        for (i, side) in sides.iter().enumerate() {
            for accumulate in [false, true] {
                let [mut found, mut expected] = [(); 2].map(|()| vec![0.5f32; m * n]);
                packed.multiply(i, &mut found, Matrix::new(&a, m, k), accumulate);
                matmul(side.precision, &mut expected, Matrix::new(&a, m, k), side.matrix, accumulate);
                let bits = |x: &[f32]| x.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
                assert_eq!(bits(&found), bits(&expected), "{m} {k} {n}, side {i}");
            }
        }
    }
    let wide = vec![1.0f64; 600];
    let side = Side { matrix: Matrix::new(&wide, 20, 30), precision: Precision::F32, rows: 100 };
    let mut found = vec![0.0; 3000];
    let packed = Packed::new(&crate::Arena::default(), vec![side], false);
    packed.multiply(0, &mut found, Matrix::new(&[2.0; 2000], 100, 20), false);
    assert!(found.iter().all(|x| *x == 40.0), "f64");
}

#[test]
fn sums_over_many_rows_are_those_of_both_halves_for_any_number_of_threads() {
    for (k, sizes) in [(256, [(40, 33), (24, 64)]), (771, [(128, 128), (70, 1)]), (600, [(1, 96), (0, 5)])] {
        let width = 130;
        let (x, y) = (numbers(1, k * width, 3), numbers(2, k * width, 3));
        let (halves, order) = (rounded(&x), order(3, k, k));
        let sides = |kind: usize, (m, n): (usize, usize)| {
            let b = Matrix::strided(&y, k, n, width);
            match kind {
                0 => (Matrix::strided(&x, k, m, width).t(), b),
                1 => (Matrix::narrow(&halves, k, m, width).t(), b),
                _ => (Matrix::gathered(&x[..k * m], m, &order).t(), Matrix::gathered(&y[..k * n], n, &order)),
            }
        };
        let start = numbers(4, sizes.iter().map(|(m, n)| m * n).sum(), 3);
        for (precision, kind, accumulate) in [Precision::F32, Precision::Bf16]
            .into_iter()
            .flat_map(|precision| (0..3).flat_map(move |kind| [(precision, kind, false), (precision, kind, true)]))
        {
            let with = |dst: &mut [f32], run: &(dyn Fn(Vec<Product<'_, f32>>) + Sync)| {
                let mut rest = dst;
                let products = sizes.iter().map(|&size| {
                    let (dst, tail) = std::mem::take(&mut rest).split_at_mut(size.0 * size.1);
                    rest = tail;
                    let (a, b) = sides(kind, size);
                    Product { dst, a, b }
                });
                run(products.collect());
            };
            let mut expected = start.clone();
            with(&mut expected, &|products| {
                assert!(halved(&products), "{k}: a case that tests nothing");
                for Product { dst, a, b } in products {
                    let (middle, mut second) = ((k / 2).next_multiple_of(2), vec![0.0; dst.len()]);
                    let part = |range: Range<usize>| (a.columns(range.clone()), b.t().columns(range).t());
                    let (first_sides, second_sides) = (part(0..middle), part(middle..k));
                    matmul(precision, dst, first_sides.0, first_sides.1, accumulate);
                    matmul(precision, &mut second, second_sides.0, second_sides.1, false);
                    dst.iter_mut().zip(second).for_each(|(sum, second)| *sum += second);
                    let (i, j) = (a.rows / 2, b.cols / 2);
                    let Some(found) = dst.get(i * b.cols + j).filter(|_| !accumulate) else { continue };
                    let terms: Vec<f64> = (0..k).map(|l| f64::from(at(&a, i, l)) * f64::from(at(&b, l, j))).collect();
                    let (sum, size): (f64, f64) = (terms.iter().sum(), terms.iter().map(|x| x.abs()).sum());
                    assert!((f64::from(*found) - sum).abs() <= size * 0.02, "{k}");
                }
            });
            for pool in pools() {
                let mut found = start.clone();
                pool.install(|| with(&mut found, &|products| grouped_over_rows(precision, products, accumulate)));
                assert!(
                    bits(&found) == bits(&expected),
                    "{k} {precision:?} {kind}: {} threads",
                    pool.current_num_threads()
                );
            }
        }
    }
}
