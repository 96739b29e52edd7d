//! Attention against central differences, the reference face, closed forms, and the properties a causal model relies on.

use super::*;
use crate::check::{self, Input};
use crate::{Arena, Layout, Param};
use proptest::prelude::*;

#[derive(Clone, Copy, Debug, PartialEq)]
enum Kind {
    None,
    Rope,
    Cope(usize),
}

#[derive(Clone, Debug)]
struct Case {
    lengths: Vec<usize>,
    heads: usize,
    kv_heads: usize,
    dh: usize,
    window: Option<usize>,
    kind: Kind,
}

/// The numbers of a case: q, k, v and the CoPE table.
struct Numbers {
    inputs: Vec<Input>,
    table: Vec<f64>,
}

impl Case {
    fn new(lengths: &[usize], (heads, kv_heads, dh): (usize, usize, usize), window: Option<usize>, kind: Kind) -> Self {
        Case { lengths: lengths.to_vec(), heads, kv_heads, dh, window, kind }
    }

    fn offsets(&self) -> Arc<[usize]> {
        let ends = self.lengths.iter().scan(0, |end, length| {
            *end += length;
            Some(*end)
        });
        std::iter::once(0).chain(ends).collect()
    }

    fn rows(&self) -> usize {
        self.lengths.iter().sum()
    }

    fn table(&self, trainable: bool) -> (Layout, Option<Param>) {
        let shape = match self.kind {
            Kind::Cope(last) => vec![("table".into(), vec![last + 1, self.dh], trainable)],
            _ => vec![],
        };
        let layout = Layout::new(shape);
        let param = layout.get("table");
        (layout, param)
    }

    fn spec(&self, table: Option<Param>) -> Attention {
        let position = match self.kind {
            Kind::None => Position::None,
            Kind::Rope => Position::Rope { base: 100.0 },
            Kind::Cope(_) => Position::Cope { table: table.unwrap() },
        };
        Attention { heads: self.heads, kv_heads: self.kv_heads, window: self.window, position }
    }

    fn numbers(&self, seed: u64, scale: f64) -> Numbers {
        let (n, kv) = (self.rows(), self.kv_heads * self.dh);
        let inputs = vec![
            Input::random(3 * seed, n, self.heads * self.dh, scale),
            Input::random(3 * seed + 1, n, kv, scale),
            Input::random(3 * seed + 2, n, kv, 1.0),
        ];
        let mut table = check::normals(seed + 7777, self.table(true).0.len(), 1.0);
        if let Some(param) = self.table(true).1 {
            table[param.len()..].fill(0.0); // the padding after the table
        }
        Numbers { inputs, table }
    }

    /// Numbers whose CoPE positions stay `distance` away from the integers, where the op has kinks.
    fn smooth_numbers(&self, distance: f64) -> Numbers {
        let smooth = |numbers: &Numbers| self.positions(numbers).iter().all(|p| (p - p.round()).abs() > distance);
        (0..).map(|seed| self.numbers(seed, 1.0)).find(smooth).unwrap()
    }

    /// All positions between 0.5 and P + 0.5.
    fn positions(&self, numbers: &Numbers) -> Vec<f64> {
        let Kind::Cope(last) = self.kind else { return Vec::new() };
        let (q, k) = (&numbers.inputs[0], &numbers.inputs[1]);
        let mut found = Vec::new();
        for (bounds, h) in self.offsets().windows(2).flat_map(|b| (0..self.heads).map(move |h| (b, h))) {
            for i in bounds[0]..bounds[1] {
                let mut position = 0.0;
                for j in (bounds[0]..=i).rev() {
                    let q = &q.data[i * q.width + h * self.dh..][..self.dh];
                    let k = &k.data[j * k.width + h / (self.heads / self.kv_heads) * self.dh..][..self.dh];
                    let u = q.iter().zip(k).map(|(q, k)| q * k).sum::<f64>() / (self.dh as f64).sqrt();
                    position += u.sigmoid();
                    found.push(position);
                }
            }
        }
        found.retain(|p| (0.5..last as f64 + 0.5).contains(p));
        found
    }

    fn worst(&self, numbers: &Numbers) -> f64 {
        let (spec, offsets) = (self.spec(self.table(true).1), self.offsets());
        check::worst(Engine::Cpu, &numbers.inputs, &numbers.table, |tape, x| {
            vec![attention(tape, &x[0], &x[1], &x[2], &offsets, spec)]
        })
    }

    fn parity<T: Real>(&self, numbers: &Numbers) -> f64 {
        let (spec, offsets) = (self.spec(self.table(true).1), self.offsets());
        let gradients = check::parity::<T>(&numbers.inputs, &numbers.table, |tape, x| {
            vec![attention(tape, &x[0], &x[1], &x[2], &offsets, spec)]
        });
        let (a, b) = (self.forward::<T>(Engine::Cpu, numbers), self.forward::<T>(Engine::Reference, numbers));
        a.iter().zip(&b).fold(gradients, |worst, (a, b)| {
            let gap = (a - b).abs();
            if gap.is_nan() { f64::NAN } else { worst.max(gap) }
        })
    }

    fn forward<T: Real>(&self, engine: Engine, numbers: &Numbers) -> Vec<f64> {
        let cast = |x: &[f64]| x.iter().map(|x| T::from_f64(*x)).collect::<Vec<T>>();
        let (params, arena) = (cast(&numbers.table), Arena::default());
        let mut tape = Tape::inference(engine, &params, &arena);
        let x: Vec<_> = numbers.inputs.iter().map(|i| tape.constant(&cast(&i.data), i.rows, i.width)).collect();
        let y = attention(&mut tape, &x[0], &x[1], &x[2], &self.offsets(), self.spec(self.table(true).1));
        y.data().iter().map(|y| y.to_f64()).collect()
    }

    /// Gradients of q, k, v and the table for fixed random upstream gradients.
    fn gradients<T: Real>(&self, numbers: &Numbers) -> Vec<Vec<f64>> {
        let (spec, offsets) = (self.spec(self.table(true).1), self.offsets());
        check::analytic::<T>(Engine::Cpu, &numbers.inputs, &numbers.table, |tape, x| {
            vec![attention(tape, &x[0], &x[1], &x[2], &offsets, spec)]
        })
        .1
    }

    /// Gradients of q, k, v and the table of the sum of one output row.
    fn row_gradients(&self, numbers: &Numbers, row: usize) -> Vec<Vec<f64>> {
        let (spec, offsets) = (self.spec(self.table(true).1), self.offsets());
        check::analytic::<f64>(Engine::Cpu, &numbers.inputs, &numbers.table, |tape, x| {
            let y = attention(tape, &x[0], &x[1], &x[2], &offsets, spec);
            let width = y.width();
            let picked = tape.arena().copy(&y.data()[row * width..(row + 1) * width]);
            let picked = tape.output(picked, 1, width, true);
            let (from, to) = (picked.slot(), y.slot());
            tape.record(move |grads| {
                let Some(upstream) = grads.take(from) else { return };
                grads.add(to, |dst| dst[row * width..(row + 1) * width].copy_from_slice(&upstream));
            });
            vec![picked]
        })
        .1
    }
}

/// The sum of y, on the tape.
fn total<T: Real>(tape: &mut Tape<'_, T>, y: &Value<T>) -> Value<T> {
    let mut sum = tape.arena().zeros(1);
    sum[0] = y.data().iter().copied().sum();
    let sum = tape.output(sum, 1, 1, true);
    let (from, to) = (sum.slot(), y.slot());
    tape.record(move |grads| {
        let Some(upstream) = grads.take(from) else { return };
        grads.add(to, |dst| dst.fill(upstream[0]));
    });
    sum
}

fn bits(x: &[f64]) -> Vec<u64> {
    x.iter().map(|x| x.to_bits()).collect()
}

fn gap(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).fold(0.0, |worst, (a, b)| if (a - b).is_nan() { f64::NAN } else { worst.max((a - b).abs()) })
}

const KINDS: [Kind; 6] = [Kind::None, Kind::Rope, Kind::Cope(1), Kind::Cope(2), Kind::Cope(3), Kind::Cope(20)];

#[test]
fn gradients_agree_with_differences() {
    for kind in KINDS {
        for window in [None, Some(1), Some(2), Some(3), Some(100)] {
            for (heads, kv_heads, dh) in [(2, 2, 2), (4, 2, 2), (3, 1, 4)] {
                let case = Case::new(&[2, 0, 7, 1], (heads, kv_heads, dh), window, kind);
                let worst = case.worst(&case.smooth_numbers(1e-3));
                assert!(worst < 1e-7, "{case:?}: {worst}");
            }
        }
    }
    for (kind, dh) in [(Kind::None, 1), (Kind::Cope(4), 1), (Kind::Cope(4), 5), (Kind::Rope, 10), (Kind::Cope(6), 9)] {
        let case = Case::new(&[13, 0, 2], (2, 1, dh), Some(9), kind);
        let worst = case.worst(&case.smooth_numbers(1e-3));
        assert!(worst < 1e-7, "{case:?}: {worst}");
    }
}

#[test]
fn the_fused_face_equals_the_reference() {
    for kind in KINDS {
        for window in [None, Some(1), Some(2), Some(3), Some(100)] {
            for (heads, kv_heads, dh) in [(3, 3, 4), (4, 2, 6), (4, 1, 16), (2, 2, 7), (6, 2, 11)] {
                if kind == Kind::Rope && dh % 2 == 1 {
                    continue;
                }
                let case = Case::new(&[0, 7, 1, 0, 13, 2], (heads, kv_heads, dh), window, kind);
                let numbers = case.smooth_numbers(1e-4);
                let (double, single) = (case.parity::<f64>(&numbers), case.parity::<f32>(&numbers));
                assert!(double < 1e-11 && single < 1e-4, "{case:?}: {double} {single}");
            }
        }
    }
}

#[test]
fn documents_that_are_cut_into_items_equal_the_reference() {
    for kind in [Kind::None, Kind::Rope, Kind::Cope(9)] {
        for window in [None, Some(70)] {
            let case = Case::new(&[CHUNKED, 3], (2, 1, 4), window, kind);
            let numbers = case.numbers(1, 1.0);
            let found = case.parity::<f64>(&numbers);
            assert!(found < 1e-11, "{case:?}: {found}");
        }
    }
}

/// A length that the CPU face cuts into several items of unequal size.
const CHUNKED: usize = 199;

#[test]
fn a_batch_without_tokens_is_served() {
    for kind in [Kind::None, Kind::Rope, Kind::Cope(2)] {
        for lengths in [&[][..], &[0, 0]] {
            let case = Case::new(lengths, (2, 1, 4), None, kind);
            let numbers = case.numbers(1, 1.0);
            assert!(case.forward::<f32>(Engine::Cpu, &numbers).is_empty());
            assert_eq!(case.parity::<f64>(&numbers), 0.0);
        }
    }
}

#[test]
fn a_zero_table_is_no_position_to_the_bit() {
    for window in [None, Some(3)] {
        let cope = Case::new(&[13, 1, 7], (4, 2, 6), window, Kind::Cope(5));
        let none = Case { kind: Kind::None, ..cope.clone() };
        let mut numbers = cope.numbers(4, 1.0);
        numbers.table.fill(0.0);
        let plain = Numbers { inputs: numbers.inputs.clone(), table: Vec::new() };
        assert_eq!(bits(&cope.forward::<f32>(Engine::Cpu, &numbers)), bits(&none.forward::<f32>(Engine::Cpu, &plain)));
        let (with, without) = (cope.gradients::<f32>(&numbers), none.gradients::<f32>(&plain));
        assert!((0..3).all(|x| with[x] == without[x]), "gradients of q, k and v");
        assert!(with[3].iter().any(|g| *g != 0.0), "the table must learn from the first step");
    }
}

/// A case of one head whose scaled products are all `u`: q = u·√dh·x, k = x with |x| = 1 plus numbers orthogonal to it in q.
fn constant_products(u: f64, last: usize) -> (Case, Numbers) {
    let case = Case::new(&[11], (1, 1, 3), None, Kind::Cope(last));
    let mut numbers = case.numbers(5, 1.0);
    for i in 0..11 {
        numbers.inputs[0].data[3 * i] = u * 3f64.sqrt();
        numbers.inputs[1].data[3 * i..3 * i + 3].copy_from_slice(&[1.0, 0.0, 0.0]);
    }
    (case, numbers)
}

/// softmax(q·table[position(i - j + 1)], interpolated) v for one head without any other score.
fn by_distance(numbers: &Numbers, last: usize, position: impl Fn(f64) -> f64) -> Vec<f64> {
    let (q, v) = (&numbers.inputs[0].data, &numbers.inputs[2].data);
    let z = |i: usize, n: usize| (0..3).map(|d| q[3 * i + d] * numbers.table[3 * n + d]).sum::<f64>();
    let weight = |i: usize, j: usize| {
        let p = position((i - j + 1) as f64).min(last as f64);
        let n = (p as usize).min(last - 1);
        let f = p - n as f64;
        ((1.0 - f) * z(i, n) + f * z(i, n + 1)).exp()
    };
    let value = |i: usize, d: usize| {
        let total: f64 = (0..=i).map(|j| weight(i, j)).sum();
        (0..=i).map(|j| weight(i, j) * v[3 * j + d]).sum::<f64>() / total
    };
    (0..33).map(|x| value(x / 3, x % 3)).collect()
}

#[test]
fn saturated_gates_count_tokens_and_closed_gates_count_nothing() {
    for (u, last) in [(2.0, 30), (2.0, 4), (-0.7, 2), (0.0, 1)] {
        let (case, numbers) = constant_products(u, last);
        let expected = by_distance(&numbers, last, |distance| distance * Real::sigmoid(u));
        assert!(gap(&case.forward::<f64>(Engine::Cpu, &numbers), &expected) < 1e-12, "constant gates, u = {u}");
    }
    let (case, numbers) = constant_products(50.0, 30);
    let expected = by_distance(&numbers, 30, |distance| distance);
    assert!(gap(&case.forward::<f64>(Engine::Cpu, &numbers), &expected) < 1e-9, "relative positions, shifted by one");
    let (case, numbers) = constant_products(-800.0, 30);
    let none = Case { kind: Kind::None, ..case.clone() };
    assert!(gap(&case.forward::<f64>(Engine::Cpu, &numbers), &none.forward::<f64>(Engine::Cpu, &numbers)) < 1e-12);
}

#[test]
fn keys_beyond_the_clamp_give_gradient_to_the_last_row_only() {
    let (case, mut numbers) = constant_products(50.0, 2);
    numbers.table.iter_mut().for_each(|e| *e *= 0.01);
    let table = &case.gradients::<f64>(&numbers)[3];
    assert!(table[..3].iter().all(|g| *g == 0.0), "no pair lies between rows 0 and 1");
    assert!(table[3..9].iter().all(|g| *g != 0.0));
    assert!((0..3).all(|d| (table[3 + d] + table[6 + d]).abs() < 1e-9 * table[3 + d].abs()), "softmax: rows sum to 0");
}

#[test]
fn grouped_queries_equal_repeated_keys_and_values() {
    for kind in [Kind::None, Kind::Rope, Kind::Cope(4)] {
        let grouped = Case::new(&[7, 13], (6, 2, 4), Some(8), kind);
        let full = Case { kv_heads: 6, ..grouped.clone() };
        let numbers = grouped.numbers(6, 1.0);
        let repeat = |x: &Input| {
            let data = x.data.chunks(4).flat_map(|head| head.repeat(3)).collect();
            Input { data, rows: x.rows, width: 3 * x.width }
        };
        let inputs = vec![numbers.inputs[0].clone(), repeat(&numbers.inputs[1]), repeat(&numbers.inputs[2])];
        let repeated = Numbers { inputs, table: numbers.table.clone() };
        assert!(
            gap(&grouped.forward::<f64>(Engine::Cpu, &numbers), &full.forward::<f64>(Engine::Cpu, &repeated)) < 1e-13
        );
        let (few, many) = (grouped.gradients::<f64>(&numbers), full.gradients::<f64>(&repeated));
        for x in [1, 2] {
            let sums: Vec<f64> =
                (0..few[x].len()).map(|i| (0..3).map(|head| many[x][(i / 4 * 3 + head) * 4 + i % 4]).sum()).collect();
            assert!(gap(&few[x], &sums) < 1e-12);
        }
        assert!(gap(&few[0], &many[0]) < 1e-12 && gap(&few[3], &many[3]) < 1e-12);
    }
}

/// Moves k and v (and q where asked) of one row.
fn disturbed(case: &Case, seed: u64, row: usize, query: bool) -> Numbers {
    let mut numbers = case.numbers(seed, 1.0);
    for input in &mut numbers.inputs[usize::from(!query)..] {
        input.data[row * input.width..(row + 1) * input.width].iter_mut().for_each(|x| *x = 3.0 - *x);
    }
    numbers
}

#[test]
fn what_a_row_must_not_see_leaves_its_bits_unchanged() {
    for kind in KINDS {
        for window in [None, Some(1), Some(4)] {
            let case = Case::new(&[5, 13, 4], (4, 2, 6), window, kind);
            let width = case.heads * case.dh;
            let before = case.forward::<f32>(Engine::Cpu, &case.numbers(8, 1.0));
            for moved in 0..case.rows() {
                let after = case.forward::<f32>(Engine::Cpu, &disturbed(&case, 8, moved, true));
                let document = |row: usize| case.offsets().iter().filter(|o| **o <= row).count();
                for row in 0..case.rows() {
                    let sees =
                        document(row) == document(moved) && moved <= row && window.is_none_or(|w| row < moved + w);
                    let range = row * width..(row + 1) * width;
                    let same = bits(&before[range.clone()]) == bits(&after[range]);
                    assert_eq!(same, !sees, "{case:?}: row {row} after a change of row {moved}");
                }
            }
        }
    }
}

#[test]
fn gradients_are_zero_wherever_a_row_does_not_look() {
    for kind in [Kind::None, Kind::Rope, Kind::Cope(3)] {
        for window in [None, Some(3)] {
            let case = Case::new(&[5, 13, 4], (4, 2, 6), window, kind);
            let row = 11; // position 6 of the second document
            let gradients = case.row_gradients(&case.numbers(9, 1.0), row);
            for (x, gradient) in gradients[..3].iter().enumerate() {
                for (other, part) in gradient.chunks(gradient.len() / case.rows()).enumerate() {
                    let sees = if x == 0 {
                        other == row
                    } else {
                        (5.max(row + 1 - window.unwrap_or(99).min(row + 1))..=row).contains(&other)
                    };
                    assert_eq!(part.iter().all(|g| *g == 0.0), !sees, "{case:?}: input {x}, row {other}");
                }
            }
        }
    }
}

#[test]
fn extreme_scores_stay_finite_and_nan_is_not_hidden() {
    for kind in KINDS {
        let case = Case::new(&[13, 40], (4, 2, 16), None, kind);
        let numbers = case.numbers(10, 100.0); // products up to about ±5·10⁴ / 4
        let finite = |x: &[f64]| x.iter().all(|x| x.is_finite());
        assert!(finite(&case.forward::<f32>(Engine::Cpu, &numbers)), "{case:?}");
        assert!(case.gradients::<f32>(&numbers).iter().all(|g| finite(g)), "{case:?}");
        let mut spoiled = case.numbers(10, 1.0);
        spoiled.inputs[0].data[20 * 64] = f64::NAN;
        let y = case.forward::<f32>(Engine::Cpu, &spoiled);
        assert!(y[20 * 64..20 * 64 + 16].iter().all(|y| y.is_nan()) && finite(&y[..20 * 64]) && finite(&y[21 * 64..]));
    }
}

#[test]
fn decoding_equals_the_last_rows() {
    fn decoded<T: Real>(case: &Case, numbers: &Numbers, m: usize, from: usize) -> Vec<f64> {
        let t = case.rows();
        let (table, spec) = (case.table(true).1, case.spec(case.table(true).1));
        let cast = |x: &[f64]| x.iter().map(|x| T::from_f64(*x)).collect::<Vec<T>>();
        let rows = |x: &Input, start: usize| cast(&x.data[start * x.width..]);
        let [q, k, v] = [0, 1, 2].map(|x| rows(&numbers.inputs[x], if x == 0 { t - m } else { from }));
        let table = cast(&numbers.table[..table.map_or(0, |table| table.len())]);
        decode(&q, &k, &v, m, t - from, spec, &table).iter().map(|y| y.to_f64()).collect()
    }
    for kind in KINDS {
        for window in [None, Some(1), Some(5), Some(64)] {
            for t in [1, 2, 13, 150] {
                let case = Case::new(&[t], (4, 2, 6), window, kind);
                let numbers = case.numbers(11, 1.0);
                for m in [0, 1, 2, 7, t] {
                    let m = m.min(t);
                    let last = |y: Vec<f64>| y[(t - m) * 24..].to_vec();
                    let all = last(case.forward::<f64>(Engine::Cpu, &numbers));
                    assert!(gap(&decoded::<f64>(&case, &numbers, m, 0), &all) < 1e-12, "{case:?} {m}");
                    let single = last(case.forward::<f32>(Engine::Cpu, &numbers));
                    assert!(gap(&decoded::<f32>(&case, &numbers, m, 0), &single) < 1e-5, "{case:?} {m}");
                    let dropped = window.map_or(0, |w| (t + 1).saturating_sub(m + w));
                    if m > 0 && dropped > 0 && kind == Kind::Cope(20) {
                        assert!(gap(&decoded::<f64>(&case, &numbers, m, dropped), &all) < 1e-12, "evicted keys");
                    }
                    if m > 0 && dropped > 0 && kind == Kind::Rope {
                        assert!(gap(&decoded::<f64>(&case, &numbers, m, dropped), &all) < 1e-11, "evicted keys");
                    }
                }
            }
        }
    }
}

#[test]
fn bytes_do_not_depend_on_the_number_of_threads() {
    for kind in [Kind::None, Kind::Rope, Kind::Cope(8)] {
        for window in [None, Some(20)] {
            let case = Case::new(&[40, 3, 0, 64, 150, 1, 12, 33], (4, 2, 8), window, kind);
            let numbers = case.numbers(12, 1.0);
            let run = |threads: usize| {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                pool.install(|| {
                    let mut all = vec![bits(&case.forward::<f32>(Engine::Cpu, &numbers))];
                    all.extend(case.gradients::<f32>(&numbers).iter().map(|g| bits(g)));
                    all
                })
            };
            let one = run(1);
            assert!([2, 3, 8].into_iter().all(|threads| run(threads) == one), "{case:?}");
        }
    }
}

#[test]
fn a_frozen_table_gets_no_gradient_and_no_memory_is_kept() {
    let case = Case::new(&[5, 3], (2, 1, 4), None, Kind::Cope(3));
    let (spec, numbers) = (case.spec(case.table(false).1), case.numbers(13, 1.0));
    let arena = Arena::<f64>::default();
    let mut flat = vec![0.0; numbers.table.len()];
    let mut tape = Tape::new(Engine::Cpu, &numbers.table, &arena);
    let x: Vec<_> = numbers.inputs.iter().map(|i| tape.leaf(&i.data, i.rows, i.width)).collect();
    let y = attention(&mut tape, &x[0], &x[1], &x[2], &case.offsets(), spec);
    let total = total(&mut tape, &y);
    let gradients = tape.backward(&total, &mut flat);
    assert!(x.iter().all(|x| gradients.of(x).iter().any(|g| *g != 0.0)));
    drop((gradients, x, y, total));
    assert!(flat.iter().all(|g| *g == 0.0));
    assert_eq!(arena.live(), 0);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn ragged_shapes_equal_the_reference(
        lengths in prop::collection::vec(0usize..23, 0..5),
        kv_heads in 1usize..4,
        group in 1usize..6,
        half in 1usize..10,
        odd in any::<bool>(),
        window in prop::option::of(1usize..25),
        kind in prop_oneof![Just(Kind::None), Just(Kind::Rope), (1usize..12).prop_map(Kind::Cope)],
        seed in 0u64..1000,
    ) {
        let dh = 2 * half - usize::from(odd && kind != Kind::Rope);
        let case = Case::new(&lengths, (kv_heads * group, kv_heads, dh), window, kind);
        let found = case.parity::<f64>(&case.numbers(seed, 1.0));
        prop_assert!(found < 1e-11, "{:?}: {}", case, found);
    }
}

/// cargo test --release -p tensor attention -- --ignored --nocapture
#[test]
#[ignore = "timing"]
fn time_per_pair() {
    let shapes = [
        (vec![12; 8], (8, 4, 16), Kind::Cope(64)),
        (vec![64; 12], (4, 2, 32), Kind::Cope(64)),
        (vec![64; 12], (4, 2, 32), Kind::Rope),
        (vec![1024; 1], (4, 2, 32), Kind::Cope(64)),
    ];
    for (threads, (lengths, sizes, kind)) in [1, 2].into_iter().flat_map(|t| shapes.iter().map(move |s| (t, s))) {
        let case = Case::new(lengths, *sizes, None, *kind);
        let numbers = case.numbers(1, 1.0);
        let cast = |x: &[f64]| x.iter().map(|x| *x as f32).collect::<Vec<_>>();
        let (params, arena) = (cast(&numbers.table), Arena::default());
        let inputs: Vec<_> = numbers.inputs.iter().map(|i| (cast(&i.data), i.rows, i.width)).collect();
        let mut flat = vec![0.0f32; params.len()];
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        let mut best = [f64::INFINITY; 2];
        let pairs = lengths.iter().map(|t| t * (t + 1) / 2).sum::<usize>() * sizes.0;
        pool.install(|| {
            let offsets = case.offsets();
            for _ in 0..40_000_000 / pairs {
                let mut tape = Tape::new(Engine::Cpu, &params, &arena);
                let x: Vec<_> = inputs.iter().map(|(data, rows, width)| tape.leaf(data, *rows, *width)).collect();
                let start = std::time::Instant::now();
                let y = attention(&mut tape, &x[0], &x[1], &x[2], &offsets, case.spec(case.table(true).1));
                best[0] = best[0].min(start.elapsed().as_secs_f64());
                let total = total(&mut tape, &y);
                let start = std::time::Instant::now();
                drop(tape.backward(&total, &mut flat));
                best[1] = best[1].min(start.elapsed().as_secs_f64());
            }
        });
        let [forward, backward] = best.map(|seconds| seconds * 1e9 / pairs as f64);
        println!(
            "{} x {:4} tokens, {sizes:?}, {kind:?}, {threads} thread(s): {forward:.2} + {backward:.2} = {:.2} ns per pair and head",
            lengths.len(),
            lengths[0],
            forward + backward
        );
    }
}
