//! The entropy floor: the lowest cross-entropy that any causal model can reach on a training set, the whole prefix being visible.
//!
//! With weights w over the targets and W their sums over equal (prefix, next token), the best predictor is W(prefix, next) / W(prefix), and
//! floor = Σ_prefix Σ_next -W(prefix, next) ln(W(prefix, next) / W(prefix)), divided by the total weight: the conditional entropy on the prefix
//! tree. The first token of a sequence is read and never predicted. A measured training loss below the floor is a bug.

use serde::Serialize;

/// The floor in nats. For text that is read through windows it is not defined: a window hides the beginning.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Floor {
    /// Mean over sequences of per-sequence means: each target of sequence i weighs 1/(N · targets_i). The roadmap's loss.
    pub macro_average: f64,
    /// Mean over all targets.
    pub micro_average: f64,
}

impl Floor {
    /// Floor of the sequences as they are trained on (after the cap). None where nothing is predicted.
    pub fn of(sequences: &[&[u32]]) -> Option<Self> {
        let targets = |sequence: usize| sequences[sequence].len() as f64 - 1.0;
        Some(Floor {
            macro_average: conditional_entropy(sequences, |sequence, _| 1.0 / targets(sequence))?,
            micro_average: conditional_entropy(sequences, |_, _| 1.0)?,
        })
    }
}

/// Lowest reachable weighted mean cross-entropy, in nats, where target `position` (1-based: the token at that index) of `sequence` weighs
/// `weight(sequence, position)` ≥ 0. None if the weights sum to zero.
pub fn conditional_entropy(sequences: &[&[u32]], weight: impl Fn(usize, usize) -> f64) -> Option<f64> {
    let mut order: Vec<usize> = (0..sequences.len()).collect();
    order.sort_by_key(|&index| (sequences[index], index));
    let mut entropy = 0.0;
    let mut total = 0.0;
    // (from, to, depth): order[from..to] share their first `depth` tokens. A stack, for prefixes can be longer than the call stack.
    let mut open = vec![(0, order.len(), 0)];
    while let Some((from, to, depth)) = open.pop() {
        let mut branches: Vec<f64> = Vec::new();
        let mut start = from;
        while start < to {
            let Some(&token) = sequences[order[start]].get(depth) else {
                start += 1; // ends here: sorted before those that go on
                continue;
            };
            let length = order[start..to].partition_point(|&index| sequences[index][depth] == token);
            if depth > 0 {
                branches.push(order[start..start + length].iter().map(|&index| weight(index, depth)).sum());
            }
            open.push((start, start + length, depth + 1));
            start += length;
        }
        let sum: f64 = branches.iter().sum();
        total += sum;
        // One branch is certain; saying so avoids a rounding residue.
        if branches.len() > 1 {
            entropy += branches.iter().filter(|&&w| w > 0.0).map(|&w| w * (sum / w).ln()).sum::<f64>();
        }
    }
    (total > 0.0).then(|| entropy / total)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    fn floor_of(sequences: &[Vec<u32>]) -> Floor {
        Floor::of(&sequences.iter().map(Vec::as_slice).collect::<Vec<_>>()).unwrap()
    }

    #[test]
    fn distinct_second_tokens_cost_their_logarithm_once() {
        for (count, length) in [(2, 3), (7, 5), (100, 12)] {
            let lines: Vec<Vec<u32>> = (0..count).map(|i| [vec![0, i + 1], vec![9; length - 2]].concat()).collect();
            let expected = f64::from(count).ln() / (length as f64 - 1.0);
            let floor = floor_of(&lines);
            assert!((floor.macro_average - expected).abs() < 1e-12 && (floor.micro_average - expected).abs() < 1e-12);
        }
    }

    #[test]
    fn equal_lines_cost_nothing_and_one_token_predicts_nothing() {
        assert_eq!(floor_of(&vec![vec![3, 1, 4, 1]; 5]), Floor { macro_average: 0.0, micro_average: 0.0 });
        // The first token is never predicted: different first tokens are free.
        assert_eq!(floor_of(&[vec![1, 7], vec![2, 8]]), Floor { macro_average: 0.0, micro_average: 0.0 });
        assert_eq!(Floor::of(&[&[5], &[6]]), None);
        assert_eq!(Floor::of(&[]), None);
    }

    /// Four sequences of different lengths, worked out by hand.
    /// Prefix a: next b (sequences 1, 2, 3) or c (4). Prefix ab: next d (1, 2) or e (3). Prefix abd: next f (1) or g (2). 4 is "a c", 3 is "a b e".
    #[test]
    fn a_branching_example_by_hand() {
        let (a, b, c, d, e, f, g) = (0, 1, 2, 3, 4, 5, 6);
        let lines = [vec![a, b, d, f], vec![a, b, d, g], vec![a, b, e], vec![a, c]];
        let ln = f64::ln;
        // Micro, weights 1: 3 ln(4/3) + ln 4, then 2 ln(3/2) + ln 3, then 2 ln 2, over 9 targets.
        let micro = (3.0 * ln(4.0 / 3.0) + ln(4.0) + 2.0 * ln(1.5) + ln(3.0) + 2.0 * ln(2.0)) / 9.0;
        // Macro, weights 1/3, 1/3, 1/2, 1 per target, over 4: at a 7/6 against 1; at ab 2/3 against 1/2; at abd 1/3 against 1/3.
        let at_a = 7.0 / 6.0 * ln(13.0 / 7.0) + ln(13.0 / 6.0);
        let at_ab = 2.0 / 3.0 * ln(7.0 / 4.0) + 0.5 * ln(7.0 / 3.0);
        let at_abd = 2.0 / 3.0 * ln(2.0);
        let macro_average = (at_a + at_ab + at_abd) / 4.0;
        let floor = floor_of(&lines);
        assert!((floor.micro_average - micro).abs() < 1e-12, "{} {micro}", floor.micro_average);
        assert!((floor.macro_average - macro_average).abs() < 1e-12, "{} {macro_average}", floor.macro_average);
        // Order of the file does not matter; dropping the answer's weight to nothing does.
        let turned = [lines[3].clone(), lines[1].clone(), lines[0].clone(), lines[2].clone()];
        assert!((floor_of(&turned).macro_average - macro_average).abs() < 1e-12);
        let slices: Vec<&[u32]> = lines.iter().map(Vec::as_slice).collect();
        let last_only = conditional_entropy(&slices, |_, position| if position == 3 { 1.0 } else { 0.0 }).unwrap();
        assert!((last_only - ln(2.0)).abs() < 1e-12);
        assert_eq!(conditional_entropy(&slices, |_, _| 0.0), None);
    }

    #[test]
    fn a_very_long_prefix_does_not_overflow_the_stack() {
        let line = vec![1; 300_000];
        assert_eq!(floor_of(&[line.clone(), line]).micro_average, 0.0);
    }

    type Table<'a> = BTreeMap<&'a [u32], BTreeMap<u32, f64>>;

    /// Weighted mean cross-entropy of the predictor `chance(prefix, next)`.
    fn loss(lines: &[Vec<u32>], weights: &[f64], chance: impl Fn(&[u32], u32) -> f64) -> f64 {
        let mut sum = 0.0;
        let mut total = 0.0;
        for (line, &w) in lines.iter().zip(weights) {
            for at in 1..line.len() {
                sum -= w * chance(&line[..at], line[at]).ln();
                total += w;
            }
        }
        sum / total
    }

    fn counted<'a>(lines: &'a [Vec<u32>], weights: &[f64]) -> Table<'a> {
        let mut table = Table::new();
        for (line, &w) in lines.iter().zip(weights) {
            for at in 1..line.len() {
                *table.entry(&line[..at]).or_default().entry(line[at]).or_default() += w;
            }
        }
        table
    }

    proptest! {
        /// By brute force: the counted predictor reaches the floor, and every predictor with random scores stays above it.
        #[test]
        fn the_optimal_predictor_reaches_it_and_no_other_goes_below(
            lines in proptest::collection::vec(proptest::collection::vec(0u32..3, 2..7), 1..12),
            scores in proptest::collection::vec(-2.0f64..2.0, 64),
        ) {
            let floor = floor_of(&lines);
            let per_sequence: Vec<f64> = lines.iter().map(|line| 1.0 / (line.len() as f64 - 1.0)).collect();
            for (weights, floor) in [(per_sequence, floor.macro_average), (vec![1.0; lines.len()], floor.micro_average)] {
                let table = counted(&lines, &weights);
                let best = loss(&lines, &weights, |prefix, next| table[prefix][&next] / table[prefix].values().sum::<f64>());
                prop_assert!((best - floor).abs() < 1e-12, "best {best}, floor {floor}");
                for shift in 0..8 {
                    let score = |prefix: &[u32], next: u32| {
                        let hash = prefix.iter().fold(7 * shift, |h, &t| (h * 5 + t as usize + 1) % 64);
                        (table[prefix].get(&next).copied().unwrap_or(1e-3).ln() + scores[(hash + next as usize) % 64]).exp()
                    };
                    let random = loss(&lines, &weights, |prefix, next| score(prefix, next) / (0..3).map(|t| score(prefix, t)).sum::<f64>());
                    prop_assert!(random > floor - 1e-12, "random {random}, floor {floor}");
                }
            }
        }
    }
}
