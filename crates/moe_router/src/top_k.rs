//! Top-k routing: the k likeliest experts of a token. Mixtral's weights are renormalised over the k; Switch's (k = 1) and OLMoE's are not.

use crate::balance::Balance;
use crate::{RouterInput, Routing, assign, assign_backward};
use tensor::Real;

#[derive(Clone, Debug, PartialEq)]
pub struct TopK {
    pub num_experts: usize,
    pub k: usize,
    pub renormalize: bool,
    /// Who is better: probability plus bias.
    pub balance: Balance,
}

impl TopK {
    /// Without bias.
    pub fn new(num_experts: usize, k: usize, renormalize: bool) -> Self {
        TopK { num_experts, k, renormalize, balance: Balance::default() }
    }

    /// Rows sorted by falling probability, and weights_a.
    pub fn route<T: Real>(&self, input: &RouterInput<'_, T>) -> (Routing, Vec<T>) {
        let mut order = Vec::with_capacity(self.num_experts);
        assign(input, self.num_experts, self.renormalize, |_, p_e, row| {
            self.balance.rank(p_e, &mut order);
            row.extend_from_slice(&order[..self.k.min(order.len())]);
        })
    }

    /// dscores += the gradient of the weights, the choice held constant.
    pub fn backward<T: Real>(&self, scores_ne: &[T], routing: &Routing, dweights_a: &[T], dscores_ne: &mut [T]) {
        assign_backward(scores_ne, routing, self.renormalize, dweights_a, dscores_ne);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::softmax;
    use tensor::check::normals;

    fn route(policy: &TopK, scores: &[f64]) -> (Routing, Vec<f64>) {
        policy.route(&RouterInput::new(&[], &[], 0).with_scores(scores, policy.num_experts))
    }

    #[test]
    fn takes_the_k_best_and_the_lower_index_on_ties() {
        let policy = TopK::new(4, 2, true);
        let (routing, weights) = route(&policy, &[0.0, 2.0, 1.0, 2.0, 0.0, 0.0, 0.0, 0.0]);
        assert_eq!(routing.expert_ids_a, [1, 3, 0, 1]);
        assert_eq!(weights, [0.5; 4]);
        assert_eq!(route(&policy, &[f64::NAN; 4]).0.expert_ids_a, [0, 1]);
        assert_eq!(route(&policy, &[]).0.num_tokens(), 0);
    }

    #[test]
    fn all_experts_renormalised_are_the_dense_softmax_mixture() {
        let scores = normals(1, 6 * 5, 2.0);
        let (routing, weights) = route(&TopK::new(5, 5, true), &scores);
        let p_ne = softmax::probabilities(&scores, 5);
        for t in 0..6 {
            for (id, w) in routing.row(t).iter().zip(&weights[routing.span(t)]) {
                assert!((w - p_ne[t * 5 + *id as usize]).abs() < 1e-15);
            }
        }
    }

    #[test]
    fn permuting_experts_permutes_ids_and_keeps_weights() {
        let scores = normals(2, 20 * 5, 1.0);
        let moved: Vec<f64> = (0..100).map(|x| scores[x / 5 * 5 + (x % 5 + 2) % 5]).collect();
        let policy = TopK::new(5, 3, false);
        let ((plain, w), (permuted, v)) = (route(&policy, &scores), route(&policy, &moved));
        let back: Vec<u32> = permuted.expert_ids_a.iter().map(|id| (id + 2) % 5).collect();
        assert_eq!(back, plain.expert_ids_a);
        assert!(w.iter().zip(&v).all(|(a, b)| (a - b).abs() < 1e-15));
    }

    #[test]
    fn one_renormalised_expert_sends_exactly_no_gradient() {
        let scores = normals(3, 12, 1.0);
        let policy = TopK::new(4, 1, true);
        let (routing, _) = route(&policy, &scores);
        let mut dscores = [0.0; 12];
        policy.backward(&scores, &routing, &[1.7, -0.3, 12.1], &mut dscores);
        assert_eq!(dscores, [0.0; 12]);
    }
}
