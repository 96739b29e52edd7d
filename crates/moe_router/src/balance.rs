//! Loss-free balancing (Wang et al. 2024, arXiv 2408.15664): a bias on every expert that decides who is chosen and not what a choice weighs. It
//! has no gradient; after every optimizer step it rises for experts with less than the mean load and falls for the others.

use crate::policy::{Bits, Observation};
use crate::{Routing, softmax};
use serde::{Deserialize, Serialize};
use tensor::Real;

/// The biases of a layer's experts; empty before the first step, which is as good as zero.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Balance {
    #[serde(skip)]
    pub rate: f64,
    biases_e: Vec<Bits>,
}

impl Balance {
    /// Biases that move by `rate` a step; 0 leaves them at zero.
    pub fn new(rate: f64) -> Self {
        Balance { rate, biases_e: Vec::new() }
    }

    /// b_e; empty while all are zero.
    pub fn biases_e(&self) -> Vec<f64> {
        self.biases_e.iter().map(|bias| bias.0).collect()
    }

    /// Takes saved biases if they can be those of `num_experts` experts that have some.
    pub(crate) fn restore(&mut self, saved: Balance, num_experts: usize) -> bool {
        let whole = saved.biases_e.len() == num_experts && saved.biases_e.iter().all(|bias| bias.0.is_finite());
        let fits = saved.biases_e.is_empty() || (whole && self.rate > 0.0);
        if fits {
            self.biases_e = saved.biases_e;
        }
        fits
    }

    /// Ids by falling probability plus bias, the lower id first where they are equal.
    pub(crate) fn rank<T: Real>(&self, p_e: &[T], order: &mut Vec<u32>) {
        if self.biases_e.is_empty() {
            return softmax::rank(p_e, order);
        }
        let biased: Vec<f64> = p_e.iter().zip(&self.biases_e).map(|(p, bias)| p.to_f64() + bias.0).collect();
        softmax::rank(&biased, order);
    }

    /// b_e += rate · sign(mean count - count_e), from the counts of all micro-batches of a step.
    pub(crate) fn step(&mut self, observation: &Observation) {
        if self.rate == 0.0 || observation.tokens == 0 {
            return;
        }
        let (counts, experts) = (&observation.sums_e, observation.sums_e.len());
        let total: u128 = counts.iter().sum();
        self.biases_e.resize(experts, Bits::default());
        for (bias, &count) in self.biases_e.iter_mut().zip(counts) {
            match (count * experts as u128).cmp(&total) {
                std::cmp::Ordering::Less => bias.0 += self.rate,
                std::cmp::Ordering::Equal => {}
                std::cmp::Ordering::Greater => bias.0 -= self.rate,
            }
        }
    }
}

/// Adds the assignments of a micro-batch, expert by expert.
pub(crate) fn count(observation: &mut Observation, routing: &Routing) {
    observation.tokens += routing.num_tokens() as u64;
    observation.sums_e.resize(routing.num_experts, 0);
    for &id in routing.expert_ids_a.iter().filter(|id| (**id as usize) < routing.num_experts) {
        observation.sums_e[id as usize] += 1;
    }
}

#[cfg(test)]
mod tests {
    use crate::{Mode, Observation, Policy, RouterInput, Routing, policy::tests::policy};
    use tensor::check::normals;

    const EXPERTS: usize = 8;

    /// Skewed scores: expert e is liked the more the higher its id.
    fn skewed(tokens: usize) -> Vec<f64> {
        let noise = normals(3, tokens * EXPERTS, 1.0);
        noise.iter().enumerate().map(|(i, x)| x + 0.3 * (i % EXPERTS) as f64).collect()
    }

    fn route(policy: &Policy, scores: &[f64]) -> (Routing, Vec<f64>) {
        policy.route(&RouterInput::new(&[], &[], 0).with_scores(scores, EXPERTS), Mode::Train)
    }

    /// Largest load over the mean load, minus 1.
    fn violation(routing: &Routing) -> f64 {
        let counts = routing.counts();
        let mean = counts.iter().sum::<u64>() as f64 / counts.len() as f64;
        *counts.iter().max().unwrap() as f64 / mean - 1.0
    }

    #[test]
    fn the_rule_alone_evens_the_load_of_a_frozen_router() {
        let scores = skewed(4000);
        for text in [r#"{"kind":"top_k","k":2,"bias_rate":0.001}"#, r#"{"kind":"top_p","p":0.4,"bias_rate":0.001}"#] {
            let mut policy = policy(text);
            let (before, weights) = route(&policy, &scores);
            for _ in 0..600 {
                let mut observation = Observation::default();
                let input = RouterInput::new(&[], &[], 0).with_scores(&scores, EXPERTS);
                policy.observe(&mut observation, &input, &route(&policy, &scores).0);
                policy.step(&observation);
            }
            let (after, biased) = route(&policy, &scores);
            assert!(
                violation(&before) > 0.5 && violation(&after) < 0.06,
                "{text}: {} {}",
                violation(&before),
                violation(&after)
            );
            // A token whose choice did not change gets the same weights, bit for bit.
            let same = (0..4000).filter(|&t| before.row(t) == after.row(t)).collect::<Vec<_>>();
            assert!(same.len() > 400 && same.iter().all(|&t| weights[before.span(t)] == biased[after.span(t)]));
        }
    }

    #[test]
    fn without_a_rate_nothing_moves_and_nothing_is_saved() {
        let mut policy = policy(r#"{"kind":"top_k","k":2}"#);
        let scores = skewed(50);
        let mut observation = Observation::default();
        let input = RouterInput::new(&[], &[], 0).with_scores(&scores, EXPERTS);
        policy.observe(&mut observation, &input, &route(&policy, &scores).0);
        policy.step(&observation);
        assert_eq!(policy.control(), crate::Control::None);
    }
}
