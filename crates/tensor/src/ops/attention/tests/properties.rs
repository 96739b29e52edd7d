//! Closed forms, and what a causal model relies on.

use super::*;

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
