//! Forced balance: tokens take experts in turn, whatever the scores say. Every expert has the same load, so that a step is timed without the
//! router's moods, and a run shows what experts are worth that no router chose. Weights are the router's probabilities of the chosen over their sum.

use crate::{Mode, RouterInput, Routing, assign, assign_backward};
use tensor::Real;

#[derive(Clone, Debug, PartialEq)]
pub struct Forced {
    pub num_experts: usize,
    /// Experts per token.
    pub k: usize,
}

impl Forced {
    /// Turn t takes the experts t·k, …, t·k + k - 1, counted round. In training t is the row of the batch, so that loads differ by one at most; in
    /// evaluation it is the place in the document, whatever stands beside it.
    pub fn route<T: Real>(&self, input: &RouterInput<'_, T>, mode: Mode) -> (Routing, Vec<T>) {
        let mut turns: Vec<usize> = (0..input.num_tokens()).collect();
        if mode == Mode::Evaluate {
            for document in input.offsets_b1.windows(2) {
                turns[document[0]..document[1]].iter_mut().for_each(|turn| *turn = input.start + *turn - document[0]);
            }
        }
        assign(input, self.num_experts, true, |t, _, row| {
            let first = turns[t] * self.k;
            row.extend((first..first + self.k).map(|place| (place % self.num_experts) as u32));
        })
    }

    /// dscores += the gradient of the weights, the choice held constant.
    pub fn backward<T: Real>(&self, scores_ne: &[T], routing: &Routing, dweights_a: &[T], dscores_ne: &mut [T]) {
        assign_backward(scores_ne, routing, true, dweights_a, dscores_ne);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tensor::check::normals;

    #[test]
    fn loads_differ_by_one_at_most_and_scores_only_weigh() {
        for (experts, k, tokens) in [(8, 2, 40), (8, 3, 41), (5, 5, 7), (4, 1, 3)] {
            let policy = Forced { num_experts: experts, k };
            let scores = normals(1, tokens * experts, 3.0);
            let input = RouterInput::new(&[], &[], 0).with_scores(&scores, experts);
            let (routing, weights) = policy.route(&input, Mode::Train);
            let counts = routing.counts();
            assert!(counts.iter().max().unwrap() - counts.iter().min().unwrap() <= 1, "{counts:?}");
            for t in 0..tokens {
                let mut row = routing.row(t).to_vec();
                row.dedup();
                assert_eq!(row.len(), k);
                assert!((weights[routing.span(t)].iter().sum::<f64>() - 1.0).abs() < 1e-12);
            }
            let other = normals(2, tokens * experts, 3.0);
            let (same, moved) = policy.route(&RouterInput::new(&[], &[], 0).with_scores(&other, experts), Mode::Train);
            assert!(same == routing && (k == 1 || moved != weights));
        }
    }

    #[test]
    fn evaluation_goes_by_the_place_in_the_document() {
        let policy = Forced { num_experts: 4, k: 1 };
        let scores = normals(1, 6 * 4, 1.0);
        let input = RouterInput::new(&[0, 4, 6], &[], 0).with_scores(&scores, 4);
        assert_eq!(policy.route(&input, Mode::Evaluate).0.expert_ids_a, [0, 1, 2, 3, 0, 1]);
        assert_eq!(policy.route(&input, Mode::Train).0.expert_ids_a, [0, 1, 2, 3, 0, 1]);
        let later = RouterInput::new(&[0, 6], &[], 0).with_scores(&scores, 4).starting_at(2);
        assert_eq!(policy.route(&later, Mode::Evaluate).0.expert_ids_a, [2, 3, 0, 1, 2, 3]);
        let input = RouterInput::new(&[0, 3, 6], &[], 0).with_scores(&scores, 4);
        assert_eq!(policy.route(&input, Mode::Evaluate).0.expert_ids_a, [0, 1, 2, 0, 1, 2]);
    }
}
