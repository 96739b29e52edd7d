//! The mixture of heads: what it means, and that heads which a token did not choose cost and give nothing.

use super::*;

#[test]
fn gradients_of_a_mixture_agree_with_differences() {
    for kind in [Kind::None, Kind::Rope, Kind::Cope(3)] {
        for (shared, share) in [(0, 0.5), (2, 0.5), (4, 0.0), (0, 0.0), (1, 1.0)] {
            for lengths in [&[2, 0, 7, 1][..], &[1], &[0]] {
                let case = Case::new(lengths, (4, 2, 4), Some(5), kind).mixed(shared, share);
                let worst = case.worst(&case.smooth_numbers(1e-3));
                assert!(worst < 1e-7, "{case:?}: {worst}");
            }
        }
    }
}

#[test]
fn a_mixture_equals_the_reference() {
    for kind in KINDS {
        for (shared, share) in [(0, 0.5), (2, 0.5), (6, 0.0), (0, 0.0), (1, 1.0)] {
            for window in [None, Some(9)] {
                let case = Case::new(&[0, 27, 1, 13, 2], (6, 2, 8), window, kind).mixed(shared, share);
                let numbers = case.smooth_numbers(1e-5);
                let (double, single) = (case.parity::<f64>(&numbers), case.parity::<f32>(&numbers));
                assert!(double < 1e-11 && single < 1e-4, "{case:?}: {double} {single}");
            }
        }
    }
}

#[test]
fn gates_of_one_on_all_heads_change_no_bit() {
    for kind in [Kind::Rope, Kind::Cope(5)] {
        let mixed = Case::new(&[40, 3], (4, 2, 6), None, kind).mixed(1, 1.0);
        let plain = Case { mix: None, ..mixed.clone() };
        let mut numbers = mixed.numbers(3, 1.0);
        numbers.inputs[3].data.fill(1.0);
        let without = Numbers { inputs: numbers.inputs[..3].to_vec(), table: numbers.table.clone() };
        let forward = |case: &Case, numbers: &Numbers| bits(&case.forward::<f32>(Engine::Cpu, numbers));
        assert_eq!(forward(&mixed, &numbers), forward(&plain, &without));
        let (with, without) = (mixed.gradients::<f32>(&numbers), plain.gradients::<f32>(&without));
        assert!((0..3).all(|x| bits(&with[x]) == bits(&without[x])) && bits(&with[4]) == bits(&without[3]));
    }
}

#[test]
fn heads_that_a_token_did_not_choose_give_exactly_nothing() {
    for kind in [Kind::Rope, Kind::Cope(5)] {
        let case = Case::new(&[90, 1, 20], (6, 3, 6), None, kind).mixed(2, 0.4);
        let choice = case.choice().unwrap();
        let mut numbers = case.numbers(4, 1.0);
        let (y, gradients) = (case.forward::<f32>(Engine::Cpu, &numbers), case.gradients::<f32>(&numbers));
        let mut idle = 0;
        for (t, h) in (0..case.rows()).flat_map(|t| (0..6).map(move |h| (t, h))) {
            let at = (t * 6 + h) * 6..(t * 6 + h + 1) * 6;
            let zero = |x: &[f64]| x.iter().all(|x| *x == 0.0);
            let on = choice.serves(h, t);
            assert_eq!((zero(&y[at.clone()]), gradients[3][t * 6 + h] == 0.0), (!on, !on), "token {t}, head {h}");
            let alone = [0, 90, 91].contains(&t); // a query with a single key has no choice
            assert!(alone && on || zero(&gradients[0][at.clone()]) != on, "query {t}, head {h}");
            if !on {
                idle += 1;
                numbers.inputs[0].data[at].fill(f64::NAN); // never read
                numbers.inputs[3].data[t * 6 + h] = f64::NAN;
            }
        }
        assert!(idle > 100);
        assert_eq!(bits(&case.forward::<f32>(Engine::Cpu, &numbers)), bits(&y));
        let spoiled = case.gradients::<f32>(&numbers);
        assert!(spoiled.iter().zip(&gradients).all(|(a, b)| bits(a) == bits(b)));
    }
}

#[test]
fn the_choices_of_other_tokens_change_no_bit_of_a_row() {
    let case = Case::new(&[150], (4, 1, 8), None, Kind::Cope(6));
    let numbers = case.numbers(5, 1.0);
    let all = case.forward::<f32>(Engine::Cpu, &numbers);
    let mixed = case.clone().mixed(0, 0.5);
    let mut gated = mixed.numbers(5, 1.0);
    gated.inputs[3].data.fill(1.0);
    let some = mixed.forward::<f32>(Engine::Cpu, &gated);
    let choice = mixed.choice().unwrap();
    for (t, h) in (0..150).flat_map(|t| (0..4).map(move |h| (t, h))).filter(|(t, h)| choice.serves(*h, *t)) {
        let at = (t * 4 + h) * 8..(t * 4 + h + 1) * 8;
        assert_eq!(bits(&some[at.clone()]), bits(&all[at]), "token {t}, head {h}");
    }
}

#[test]
fn decoding_a_mixture_equals_the_last_rows() {
    for kind in [Kind::None, Kind::Rope, Kind::Cope(5)] {
        let case = Case::new(&[70], (4, 2, 6), Some(40), kind).mixed(1, 0.5);
        let (numbers, choice) = (case.numbers(6, 1.0), case.choice().unwrap());
        let all = case.forward::<f64>(Engine::Cpu, &numbers);
        for m in [1, 2, 9] {
            let from = 70 - m;
            let arena = Arena::default();
            let mut tape = Tape::inference(Engine::Cpu, &[], &arena);
            let gates = tape.constant(&numbers.inputs[3].data[from * 4..], m, 4);
            let rows = choice.routed.row_offsets_n1[from];
            let routed = Assignments {
                row_offsets_n1: choice.routed.row_offsets_n1[from..].iter().map(|o| o - rows).collect(),
                expert_ids_a: choice.routed.expert_ids_a[rows..].to_vec(),
                num_experts: 3,
            };
            let mixture = Mixture { gates_nh: &gates, shared: 1, routed: Arc::new(routed) };
            let [q, k, v] = [0, 1, 2].map(|x| &numbers.inputs[x].data[..]);
            let table = &numbers.table[..case.table(true).1.map_or(0, |table| table.len())];
            let spec = case.spec(case.table(true).1);
            let found = decode([&q[from * 24..], k, v], (m, 70), spec, Some(mixture), table, Precision::F32);
            assert!(gap(&found, &all[from * 24..]) < 1e-12, "{kind:?} {m}");
        }
    }
}
