//! Windows of their own for rows: the faces agree, equal windows are the window, wide ones none, and the breadth of attention is what it says.

use super::*;

fn within<T: Real>(
    case: &Case,
    tape: &mut Tape<'_, T>,
    x: &[Value<T>],
    windows_n: &Arc<[u32]>,
) -> (Value<T>, Vec<f64>) {
    let mixture = case.choice().map(|choice| Mixture { gates_nh: &x[3], shared: choice.shared, routed: choice.routed });
    let spec = case.spec(case.table(true).1);
    attention_within(tape, [&x[0], &x[1], &x[2]], &case.offsets(), spec, mixture, windows_n)
}

/// Windows of one to `most` keys.
fn some(case: &Case, most: usize) -> Arc<[u32]> {
    let random = Random::new(9, Purpose::Test);
    (0..case.rows() as u64).map(|t| 1 + random.below(t, 0, most) as u32).collect()
}

fn all_alike(case: &Case, window: u32) -> Arc<[u32]> {
    vec![window; case.rows()].into()
}

fn run<T: Real>(case: &Case, engine: Engine, numbers: &Numbers, windows_n: &Arc<[u32]>) -> (Vec<f64>, Vec<f64>) {
    let cast = |x: &[f64]| x.iter().map(|x| T::from_f64(*x)).collect::<Vec<T>>();
    let (params, arena) = (cast(&numbers.table), Arena::default());
    let mut tape = Tape::inference(engine, &params, &arena);
    let x: Vec<_> = numbers.inputs.iter().map(|i| tape.constant(&cast(&i.data), i.rows, i.width)).collect();
    let (y, breadth_n) = within(case, &mut tape, &x, windows_n);
    (y.data().iter().map(|y| y.to_f64()).collect(), breadth_n)
}

fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for kind in [Kind::None, Kind::Rope, Kind::Cope(1), Kind::Cope(3), Kind::Cope(20)] {
        let case = Case::new(&[5, 0, 7, 1], (4, 2, 4), None, kind);
        cases.extend([case.clone(), case.mixed(2, 0.6)]);
    }
    cases
}

#[test]
fn gradients_agree_with_differences() {
    for case in cases() {
        let (numbers, windows) = (case.smooth_numbers(1e-3), some(&case, 6));
        let worst = check::worst(Engine::Cpu, &numbers.inputs, &numbers.table, |tape, x| {
            vec![within(&case, tape, x, &windows).0]
        });
        assert!(worst < 1e-7, "{case:?}: {worst}");
    }
}

#[test]
fn the_fused_face_equals_the_reference() {
    for case in cases() {
        let (numbers, windows) = (case.smooth_numbers(1e-4), some(&case, 6));
        let op =
            check::parity::<f64>(&numbers.inputs, &numbers.table, |tape, x| vec![within(&case, tape, x, &windows).0]);
        assert!(op < 1e-11, "{case:?}: {op}");
        let (expected, breadth) = run::<f64>(&case, Engine::Reference, &numbers, &windows);
        for (bar, found) in [
            (1e-11, run::<f64>(&case, Engine::Cpu, &numbers, &windows)),
            (1e-4, run::<f32>(&case, Engine::Cpu, &numbers, &windows)),
        ] {
            assert!(gap(&found.0, &expected) < bar && gap(&found.1, &breadth) < bar, "{case:?}");
        }
    }
}

#[test]
fn documents_that_are_cut_into_items_and_blocks_equal_the_reference() {
    for kind in [Kind::None, Kind::Rope, Kind::Cope(9)] {
        let case = Case::new(&[199, 3], (2, 1, 4), None, kind);
        let (numbers, windows) = (case.numbers(1, 1.0), some(&case, 150));
        let found =
            check::parity::<f64>(&numbers.inputs, &numbers.table, |tape, x| vec![within(&case, tape, x, &windows).0]);
        assert!(found < 1e-11, "{case:?}: {found}");
        let (a, b) = (
            run::<f64>(&case, Engine::Cpu, &numbers, &windows),
            run::<f64>(&case, Engine::Reference, &numbers, &windows),
        );
        assert!(gap(&a.0, &b.0) < 1e-11 && gap(&a.1, &b.1) < 1e-11, "{case:?}");
    }
}

#[test]
fn equal_windows_are_the_window_and_wide_ones_are_none_to_the_bit() {
    for kind in KINDS {
        for window in [Some(1), Some(9), Some(70), None] {
            let case = Case::new(&[150, 4], (4, 2, 8), window, kind).mixed(1, 0.5);
            let numbers = case.numbers(2, 1.0);
            let windows = all_alike(&case, window.map_or(150, |w| w as u32));
            let plain =
                check::analytic::<f32>(Engine::Cpu, &numbers.inputs, &numbers.table, |t, x| vec![case.op(t, x)]);
            let own = check::analytic::<f32>(Engine::Cpu, &numbers.inputs, &numbers.table, |tape, x| {
                vec![within(&case, tape, x, &windows).0]
            });
            assert!(plain == own, "{case:?}: gradients");
            let forward = case.forward::<f32>(Engine::Cpu, &numbers);
            assert!(bits(&forward) == bits(&run::<f32>(&case, Engine::Cpu, &numbers, &windows).0), "{case:?}");
        }
    }
}

#[test]
fn a_key_outside_the_window_of_a_row_does_not_reach_it() {
    let case = Case::new(&[90], (2, 1, 4), None, Kind::Cope(5));
    let (numbers, windows) = (case.numbers(3, 1.0), some(&case, 60));
    let mut other = case.numbers(3, 1.0);
    other.inputs[1].data[20 * 4..21 * 4].fill(3.0);
    let (a, b) =
        (run::<f32>(&case, Engine::Cpu, &numbers, &windows).0, run::<f32>(&case, Engine::Cpu, &other, &windows).0);
    for t in 0..90 {
        let sees = (20..=t).contains(&20) && t < 20 + windows[t] as usize;
        assert_eq!(bits(&a[t * 8..(t + 1) * 8]) != bits(&b[t * 8..(t + 1) * 8]), sees, "row {t}");
    }
}

#[test]
fn breadth_is_one_for_even_attention_and_zero_for_one_key() {
    let case = Case::new(&[40, 100], (4, 2, 4), None, Kind::None);
    let windows = some(&case, 50);
    let mut even = case.numbers(1, 1.0);
    even.inputs[0].data.fill(0.0);
    let (_, breadth) = run::<f32>(&case, Engine::Cpu, &even, &windows);
    assert!(breadth.iter().all(|b| (b - 1.0).abs() < 1e-5), "{breadth:?}");
    // Every query looks for the newest key: products grow by 50 a token.
    let mut sharp = case.numbers(1, 1.0);
    sharp.inputs[0].data.fill(1.0);
    let width = sharp.inputs[1].width;
    for (i, k) in sharp.inputs[1].data.iter_mut().enumerate() {
        *k = 25.0 * (i / width) as f64;
    }
    let (_, breadth) = run::<f32>(&case, Engine::Cpu, &sharp, &windows);
    for (t, breadth) in breadth.iter().enumerate() {
        let alone = t == 0 || t == 40 || windows[t] == 1;
        assert_eq!(*breadth > 1e-3, alone, "row {t}: {breadth}");
    }
}

#[test]
fn decoding_equals_the_whole_document_and_threads_do_not_matter() {
    for kind in KINDS {
        let case = Case::new(&[130], (4, 2, 8), None, kind).mixed(2, 0.5);
        let (numbers, windows) = (case.numbers(4, 1.0), some(&case, 90));
        let on = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| run::<f64>(&case, Engine::Cpu, &numbers, &windows))
        };
        let (y, breadth) = on(1);
        assert!((y.clone(), breadth.clone()) == on(3), "{case:?}");
        let (q, k, v) = (&numbers.inputs[0], &numbers.inputs[1], &numbers.inputs[2]);
        let arena = Arena::default();
        let mut tape = Tape::<f64>::inference(Engine::Cpu, &[], &arena);
        for (from, to) in [(0, 3), (3, 4), (64, 130), (129, 130)] {
            let gates = tape.constant(&numbers.inputs[3].data[from * 4..to * 4], to - from, 4);
            let Choice { shared, routed } = case.choice().unwrap();
            let first = routed.row_offsets_n1[from];
            let routed = Assignments {
                row_offsets_n1: routed.row_offsets_n1[from..=to].iter().map(|o| o - first).collect(),
                expert_ids_a: routed.expert_ids_a[first..routed.row_offsets_n1[to]].to_vec(),
                num_experts: routed.num_experts,
            };
            let mixture = Mixture { gates_nh: &gates, shared, routed: Arc::new(routed) };
            let spec = case.spec(case.table(true).1);
            let inputs = [&q.data[from * q.width..to * q.width], &k.data[..to * k.width], &v.data[..to * v.width]];
            let table = &numbers.table[..case.table(true).1.map_or(0, |table| table.len())];
            let own = windows[from..to].into();
            let (rows, spread) =
                decode_within(inputs, (to - from, to), spec, Some(mixture), (table, Precision::F32), &own);
            assert!(gap(&rows, &y[from * q.width..to * q.width]) < 1e-12, "{case:?}: {from}..{to}");
            assert!(gap(&spread, &breadth[from..to]) < 1e-12, "{case:?}: {from}..{to}");
        }
    }
}
