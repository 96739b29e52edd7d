//! The faces agree with each other, with central differences, with decoding, and with themselves on any number of threads.

use super::*;
use proptest::prelude::*;

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
    fn decoded<T: Real>(case: &Case, numbers: &Numbers, m: usize, from: usize, precision: Precision) -> Vec<f64> {
        let t = case.rows();
        let (table, spec) = (case.table(true).1, case.spec(case.table(true).1));
        let cast = |x: &[f64]| x.iter().map(|x| T::from_f64(*x)).collect::<Vec<T>>();
        let rows = |x: &Input, start: usize| cast(&x.data[start * x.width..]);
        let [q, k, v] = [0, 1, 2].map(|x| rows(&numbers.inputs[x], if x == 0 { t - m } else { from }));
        let table = cast(&numbers.table[..table.map_or(0, |table| table.len())]);
        decode([&q, &k, &v], (m, t - from), spec, None, &table, precision).iter().map(|y| y.to_f64()).collect()
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
                    assert!(gap(&decoded::<f64>(&case, &numbers, m, 0, Precision::F32), &all) < 1e-12, "{case:?} {m}");
                    let single = last(case.forward::<f32>(Engine::Cpu, &numbers));
                    assert!(
                        gap(&decoded::<f32>(&case, &numbers, m, 0, Precision::F32), &single) < 1e-5,
                        "{case:?} {m}"
                    );
                    let pairs = last(case.forward_in(Precision::Bf16, &numbers));
                    let found = decoded::<f32>(&case, &numbers, m, 0, Precision::Bf16);
                    assert!(gap(&found, &pairs) < 1e-5, "pairs of bf16: {case:?} {m}");
                    let dropped = window.map_or(0, |w| (t + 1).saturating_sub(m + w));
                    if m > 0 && dropped > 0 && kind == Kind::Cope(20) {
                        assert!(
                            gap(&decoded::<f64>(&case, &numbers, m, dropped, Precision::F32), &all) < 1e-12,
                            "evicted keys"
                        );
                    }
                    if m > 0 && dropped > 0 && kind == Kind::Rope {
                        assert!(
                            gap(&decoded::<f64>(&case, &numbers, m, dropped, Precision::F32), &all) < 1e-11,
                            "evicted keys"
                        );
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
            let case = Case::new(&[40, 3, 0, 64, 350, 1, 12, 33], (4, 2, 8), window, kind).mixed(1, 0.5);
            let numbers = case.numbers(12, 1.0);
            let one = bytes(&case, &numbers, 1);
            assert!([2, 3, 8].into_iter().all(|threads| bytes(&case, &numbers, threads) == one), "{case:?}");
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
    let y = attention(&mut tape, [&x[0], &x[1], &x[2]], &case.offsets(), spec, None);
    let total = total(&mut tape, &y);
    let gradients = tape.backward(&total, &mut flat);
    assert!(x.iter().all(|x| gradients.of(x).iter().any(|g| *g != 0.0)));
    drop((gradients, x, y, total));
    assert!(flat.iter().all(|g| *g == 0.0));
    assert_eq!(arena.live(), 0);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 150, failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn generated_shapes_equal_the_reference(case in cases(23), seed in 0u64..1000) {
        let found = case.parity::<f64>(&case.numbers(seed, 1.0));
        prop_assert!(found < 1e-11, "{:?}: {}", case, found);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn generated_shapes_equal_the_reference_in_single_precision(case in cases(23), seed in 0u64..1000) {
        let numbers = case.numbers(seed, 1.0);
        prop_assume!(smooth(&case, &numbers));
        let found = case.parity::<f32>(&numbers);
        prop_assert!(found < 1e-4, "{:?}: {}", case, found);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 150, failure_persistence: None, ..ProptestConfig::default() })]
    /// Of numbers that bf16 holds the scores are the same, so that no position moves; weights and their gradients are rounded.
    #[test]
    fn on_pairs_of_bf16_it_stays_within_their_rounding(
        case in cases(90),
        dh in prop_oneof![Just(1usize), Just(4), Just(16), Just(64)],
        seed in 0u64..1000,
    ) {
        prop_assume!(case.kind != Kind::Rope || dh > 1);
        let case = Case { dh, ..case };
        let mut numbers = case.numbers(seed, 1.0);
        let round = |x: &mut f64| *x = f64::from(f32::from_bits(crate::kernels::bf16::round(*x as f32)));
        numbers.inputs[..3].iter_mut().for_each(|input| input.data.iter_mut().for_each(round));
        numbers.table.iter_mut().for_each(round);
        prop_assume!(smooth(&case, &numbers));
        let found = check::rounding(&numbers.inputs, &numbers.table, |tape, x| vec![case.op(tape, x)]);
        prop_assert!(found < 0.05, "{:?}: {}", case, found);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]
    /// Documents that span several blocks and tiles, scores from nearly equal to extreme, and any number of threads.
    #[test]
    #[ignore = "full"]
    fn generated_shapes_equal_the_reference_and_themselves(
        case in cases(150),
        seed in 0u64..1000,
        scale in prop_oneof![Just(0.01), Just(1.0), Just(30.0)],
    ) {
        let numbers = case.numbers(seed, scale);
        let found = case.parity::<f64>(&numbers);
        prop_assert!(found < 1e-9, "{:?}: {}", case, found);
        if scale <= 1.0 && smooth(&case, &numbers) {
            let single = case.parity::<f32>(&numbers);
            prop_assert!(single < 1e-4, "{:?}: {}", case, single);
        }
        let one = bytes(&case, &numbers, 1);
        prop_assert!([2, 3, 8].into_iter().all(|threads| bytes(&case, &numbers, threads) == one), "{:?}", case);
    }
}

/// Whether no position is so near to an integer that f32 and f64 may see it on different sides.
fn smooth(case: &Case, numbers: &Numbers) -> bool {
    case.positions(numbers).iter().all(|p| (p - p.round()).abs() > 1e-5)
}

/// Ragged documents of up to `longest` tokens, with every kind of position, window and choice of heads.
fn cases(longest: usize) -> impl Strategy<Value = Case> {
    let kind = prop_oneof![Just(Kind::None), Just(Kind::Rope), (1usize..12).prop_map(Kind::Cope)];
    let lengths = prop::collection::vec(prop_oneof![0usize..3, 0..longest], 0..5);
    let mix = prop::option::of((any::<prop::sample::Index>(), prop_oneof![Just(0.0), Just(0.4), Just(1.0)]));
    let window = prop::option::of(1..longest + 2);
    (lengths, (1usize..4, 1usize..6, 1usize..10), any::<bool>(), window, kind, mix).prop_map(
        |(lengths, (kv_heads, group, half), odd, window, kind, mix)| {
            let dh = 2 * half - usize::from(odd && kind != Kind::Rope);
            let heads = kv_heads * group;
            let mix = mix.map(|(shared, share)| Mix { shared: shared.index(heads + 1), share });
            Case { mix, ..Case::new(&lengths, (heads, kv_heads, dh), window, kind) }
        },
    )
}

/// Output and all gradients in f32 on a pool of `threads`.
fn bytes(case: &Case, numbers: &Numbers, threads: usize) -> Vec<Vec<u64>> {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
    pool.install(|| {
        let mut all = vec![bits(&case.forward::<f32>(Engine::Cpu, numbers))];
        all.extend(case.gradients::<f32>(numbers).iter().map(|g| bits(g)));
        all
    })
}
