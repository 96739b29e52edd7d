//! Top-p routing (Huang et al. 2024, arXiv 2403.07652): the shortest prefix of the experts sorted by probability whose sum strictly exceeds p.
//! p = 1 takes all experts by definition. Weights are the probabilities, or those divided by their sum.

use crate::balance::Balance;
use crate::budget::Budget;
use crate::{RouterInput, Routing, assign, assign_backward};
use tensor::Real;

#[derive(Clone, Debug, PartialEq)]
pub struct TopP {
    pub num_experts: usize,
    /// The threshold, where no budget moves it.
    pub p: f64,
    pub renormalize: bool,
    /// Who is better: probability plus bias. The sum that must exceed p is of probabilities alone, in that order.
    pub balance: Balance,
    /// Moves the threshold, where there is one.
    pub budget: Option<Budget>,
}

impl TopP {
    /// Without bias and budget.
    pub fn new(num_experts: usize, p: f64, renormalize: bool) -> Self {
        TopP { num_experts, p, renormalize, balance: Balance::default(), budget: None }
    }

    /// The threshold that holds now.
    pub fn threshold(&self) -> f64 {
        self.budget.as_ref().map_or(self.p, Budget::p)
    }

    /// Rows sorted by falling probability, and weights_a. At least one expert per token.
    pub fn route<T: Real>(&self, input: &RouterInput<'_, T>) -> (Routing, Vec<T>) {
        let p = self.threshold();
        let mut order = Vec::with_capacity(self.num_experts);
        assign(input, self.num_experts, self.renormalize, |_, p_e, row| {
            self.balance.rank(p_e, &mut order);
            row.extend_from_slice(&order[..prefix(p_e, &order, p)]);
        })
    }

    /// dscores += the gradient of the weights, the choice held constant.
    pub fn backward<T: Real>(&self, scores_ne: &[T], routing: &Routing, dweights_a: &[T], dscores_ne: &mut [T]) {
        assign_backward(scores_ne, routing, self.renormalize, dweights_a, dscores_ne);
    }
}

/// Length of the shortest prefix of `order` whose probabilities, summed in f64, strictly exceed `p`; all if none does or p ≥ 1.
fn prefix<T: Real>(p_e: &[T], order: &[u32], p: f64) -> usize {
    if p >= 1.0 {
        return order.len();
    }
    let mut sum = 0.0;
    for (rank, &id) in order.iter().enumerate() {
        sum += p_e[id as usize].to_f64();
        if sum > p {
            return rank + 1;
        }
    }
    order.len()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::softmax;
    use proptest::prelude::*;

    /// The set taken for probabilities `p_e`, as route sees it: scores are logarithms.
    fn set(p_e: &[f64], p: f64) -> Vec<u32> {
        let mut order = Vec::new();
        softmax::rank(p_e, &mut order);
        order[..prefix(p_e, &order, p)].to_vec()
    }

    fn route(scores: &[f64], num_experts: usize, p: f64) -> Vec<u32> {
        let policy = TopP::new(num_experts, p, false);
        policy.route(&RouterInput::new(&[0, 1], &[0], 0).with_scores(scores, num_experts)).0.expert_ids_a.clone()
    }

    #[test]
    fn the_sum_must_strictly_exceed_p() {
        let p = [0.5, 0.3, 0.15, 0.05];
        assert_eq!(set(&p, 0.4), [0]);
        assert_eq!(set(&p, 0.5), [0, 1]);
        assert_eq!(set(&p, 0.79), [0, 1]);
        assert_eq!(set(&[0.125; 8], 0.4), [0, 1, 2, 3]);
        assert_eq!(route(&[0.0; 8], 8, 0.4), [0, 1, 2, 3]);
        assert_eq!(route(&[0.0; 4], 4, 0.25), [0, 1]);
    }

    #[test]
    fn corner_cases() {
        assert_eq!(route(&[3.0], 1, 0.4), [0], "one expert");
        assert_eq!(route(&[1.0, 3.0, 3.0], 3, 0.1), [1], "the lower index wins a tie");
        assert_eq!(route(&[0.0, 50.0, -50.0], 3, 1.0), [1, 0, 2], "p = 1 takes all, also those that round to nothing");
        assert_eq!(route(&[f64::NAN, 0.0], 2, 0.4).len(), 2, "NaN does not panic");
        let empty = TopP::new(3, 0.4, true);
        let (routing, weights) = empty.route(&RouterInput::new(&[0], &[], 0).with_scores(&[] as &[f32], 3));
        assert_eq!((routing.num_tokens(), weights.len(), &routing.row_offsets_n1[..]), (0, 0, &[0][..]));
    }

    #[test]
    fn weights_are_the_probabilities_or_sum_to_one() {
        let scores = [0.7f64, 0.1, -0.3, 1.2, 0.0, 0.0, 0.0, 0.0];
        let input = RouterInput::new(&[0, 2], &[0, 0], 0).with_scores(&scores, 4);
        let (routing, raw) = TopP::new(4, 0.6, false).route(&input);
        let p_ne = softmax::probabilities(&scores, 4);
        assert_eq!(routing.row(0), [3, 0]);
        assert_eq!(routing.row(1), [0, 1, 2]);
        assert!(routing.row(0).iter().zip(&raw).all(|(id, w)| *w == p_ne[*id as usize]));
        let (_, weights) = TopP::new(4, 0.6, true).route(&input);
        assert!((weights[..2].iter().sum::<f64>() - 1.0).abs() < 1e-15 && weights[2..].iter().all(|w| *w == 1.0 / 3.0));
    }

    #[test]
    fn one_chosen_expert_with_renormalised_weight_sends_exactly_no_gradient() {
        let scores = [0.3f32, 4.0, -0.7, 5.0, 0.1, 0.2];
        let policy = TopP::new(3, 0.4, true);
        let (routing, weights) = policy.route(&RouterInput::new(&[0, 2], &[0, 0], 0).with_scores(&scores, 3));
        assert_eq!((&routing.expert_ids_a[..], &weights[..]), (&[1, 0][..], &[1.0, 1.0][..]));
        let mut dscores = [0.0f32; 6];
        policy.backward(&scores, &routing, &[0.37, -11.3], &mut dscores);
        assert_eq!(dscores, [0.0; 6]);
        let raw = TopP { renormalize: false, ..policy };
        raw.backward(&scores, &routing, &[0.37, -11.3], &mut dscores);
        assert!(dscores.iter().all(|d| *d != 0.0), "raw weights reach every score");
    }

    fn rows() -> impl Strategy<Value = (Vec<f64>, f64)> {
        (prop::collection::vec(-3.0..3.0f64, 1..7), 0.01..0.999f64)
    }

    proptest! {
        /// Among all subsets: none smaller exceeds p, and none of the same size has more mass.
        #[test]
        fn equals_brute_force((scores, p) in rows()) {
            let e = scores.len();
            let p_e = softmax::probabilities(&scores, e);
            let taken = route(&scores, e, p);
            let mass = |mask: usize| (0..e).filter(|i| mask >> i & 1 == 1).map(|i| p_e[i]).sum::<f64>();
            let mask = taken.iter().map(|id| 1usize << id).sum::<usize>();
            prop_assume!((1..1usize << e).all(|m| (mass(m) - p).abs() > 1e-12));
            prop_assert!(mass(mask) > p);
            for other in 1..1usize << e {
                let size = other.count_ones() as usize;
                prop_assert!(size >= taken.len() || mass(other) < p);
                prop_assert!(size != taken.len() || mass(other) <= mass(mask) + 1e-12);
            }
        }

        #[test]
        fn grows_with_p((scores, p) in rows(), more in 0.0..1.0f64) {
            let (small, large) = (route(&scores, scores.len(), p), route(&scores, scores.len(), p.max(more)));
            prop_assert!(large.starts_with(&small));
        }

        #[test]
        fn permuting_experts_permutes_the_choice((scores, p) in rows(), shift in 0usize..6) {
            let e = scores.len();
            let moved: Vec<f64> = (0..e).map(|i| scores[(i + shift) % e]).collect();
            let back: Vec<u32> = route(&moved, e, p).iter().map(|id| ((*id as usize + shift) % e) as u32).collect();
            prop_assert_eq!(back, route(&scores, e, p));
        }
    }
}
