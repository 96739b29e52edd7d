//! Expert choice (Zhou et al. 2022): each expert takes its likeliest tokens, here of each document by itself. Weights are the probabilities.
//!
//! The choice looks at later tokens of the document, so it must not be used to judge or to generate: evaluation takes expert e iff its
//! probability strictly exceeds a threshold, an average of the cutoffs seen in training (after Expert Threshold routing, arXiv 2603.11535). The
//! average of cutoffs is not the cutoff of the average, so the number of experts in evaluation is only near k; a router that gives equal
//! probabilities to all tokens gets no expert.

use crate::policy::{Bits, Observation};
use crate::top_k::TopK;
use crate::{Mode, RouterInput, Routing, assign, assign_backward, softmax};
use serde::{Deserialize, Serialize};
use tensor::Real;

/// Share of the old average that a step keeps: a memory of some ten updates, since the router moves while it is trained.
const DECAY: f64 = 0.9;

/// Cutoffs are summed as integers of this fraction, so that the sum does not depend on how a batch is split.
const UNIT: f64 = (1u64 << 40) as f64;

/// Running average of the cutoff of every expert.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Thresholds {
    /// Decayed sums of cutoffs, one per expert; empty before the first step.
    averages_e: Vec<Bits>,
    /// Decayed sum of the weights of these sums: 0 before the first step, then rising to 1.
    mass: Bits,
}

impl Thresholds {
    /// Whether the state can belong to a layer of `num_experts`.
    pub(crate) fn fits(&self, num_experts: usize) -> bool {
        let whole = self.averages_e.len() == num_experts && self.averages_e.iter().all(|average| average.0.is_finite());
        self.averages_e.is_empty() || (whole && self.mass.0 > 0.0)
    }

    fn at(&self, expert: usize) -> f64 {
        self.averages_e[expert].0 / self.mass.0
    }
}

#[derive(Clone, Debug, PartialEq)]
pub struct ExpertChoice {
    pub num_experts: usize,
    /// Experts per token on average.
    pub k: f64,
    pub thresholds: Thresholds,
}

impl ExpertChoice {
    /// Rows sorted by expert id, of any length, and weights_a. In training c = ceil(k · length / experts) tokens per expert and document. In
    /// evaluation the thresholds decide; before the first step there are none, and every token takes its ceil(k) likeliest experts.
    pub fn route<T: Real>(&self, input: &RouterInput<'_, T>, mode: Mode) -> (Routing, Vec<T>) {
        match mode {
            Mode::Train => self.choose_tokens(input),
            Mode::Evaluate if self.thresholds.averages_e.is_empty() => {
                TopK::new(self.num_experts, self.k.ceil() as usize, false).route(input)
            }
            Mode::Evaluate => assign(input, self.num_experts, false, |_, p_e, row| {
                row.extend((0..p_e.len()).filter(|&e| p_e[e].to_f64() > self.thresholds.at(e)).map(|e| e as u32));
            }),
        }
    }

    fn choose_tokens<T: Real>(&self, input: &RouterInput<'_, T>) -> (Routing, Vec<T>) {
        let e = input.num_ids;
        let p_ne = softmax::probabilities(input.scores_ne, e);
        let mut chosen_ne = vec![false; p_ne.len()];
        let (mut column, mut order) = (Vec::new(), Vec::new());
        for document in documents(input) {
            let capacity = self.capacity(document.len());
            for expert in 0..e {
                column.clear();
                column.extend(document.clone().map(|t| p_ne[t * e + expert]));
                softmax::rank(&column, &mut order);
                let taken = order[..capacity].iter();
                taken.for_each(|&t| chosen_ne[(document.start + t as usize) * e + expert] = true);
            }
        }
        assign(input, self.num_experts, false, |t, p_e, row| {
            row.extend((0..p_e.len()).filter(|&expert| chosen_ne[t * e + expert]).map(|expert| expert as u32));
        })
    }

    /// Tokens an expert takes of a document.
    fn capacity(&self, len: usize) -> usize {
        const ROUNDING: f64 = 1e-9; // 1.1 · 10 / 11 must count as 1
        let share = self.k * len as f64 / self.num_experts as f64;
        ((share - ROUNDING).ceil() as usize).clamp(len.min(1), len)
    }

    /// dscores += the gradient of the weights, the choice held constant.
    pub fn backward<T: Real>(&self, scores_ne: &[T], routing: &Routing, dweights_a: &[T], dscores_ne: &mut [T]) {
        assign_backward(scores_ne, routing, false, dweights_a, dscores_ne);
    }

    /// Adds the cutoffs of a training micro-batch: halfway between the last probability taken and the first left (0 if all were taken), weighted
    /// by the length of the document.
    pub fn observe<T: Real>(&self, observation: &mut Observation, input: &RouterInput<'_, T>) {
        let e = input.num_ids;
        let p_ne = softmax::probabilities(input.scores_ne, e);
        observation.sums_e.resize(e, 0);
        let mut column: Vec<f64> = Vec::new();
        for document in documents(input) {
            let capacity = self.capacity(document.len());
            observation.tokens += document.len() as u64;
            for (expert, sum) in observation.sums_e.iter_mut().enumerate() {
                column.clear();
                column.extend(document.clone().map(|t| p_ne[t * e + expert].to_f64()));
                column.sort_by(|a, b| b.total_cmp(a));
                let cutoff = (column[capacity - 1] + column.get(capacity).copied().unwrap_or(0.0)) / 2.0;
                *sum += (cutoff * UNIT).round() as u128 * document.len() as u128;
            }
        }
    }

    /// Moves the thresholds by one optimizer step; an empty observation leaves them.
    pub fn step(&mut self, observation: &Observation) {
        if observation.tokens == 0 {
            return;
        }
        let Thresholds { averages_e, mass } = &mut self.thresholds;
        averages_e.resize(self.num_experts, Bits(0.0));
        for (average, sum) in averages_e.iter_mut().zip(&observation.sums_e) {
            let cutoff = *sum as f64 / (UNIT * observation.tokens as f64);
            average.0 = DECAY * average.0 + (1.0 - DECAY) * cutoff;
        }
        mass.0 = DECAY * mass.0 + (1.0 - DECAY);
    }
}

/// Token ranges of the documents that are not empty.
fn documents<T>(input: &RouterInput<'_, T>) -> impl Iterator<Item = std::ops::Range<usize>> {
    input.offsets_b1.windows(2).map(|w| w[0]..w[1]).filter(|document| !document.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;
    use tensor::check::normals;

    fn policy(num_experts: usize, k: f64) -> ExpertChoice {
        ExpertChoice { num_experts, k, thresholds: Thresholds::default() }
    }

    fn rows(policy: &ExpertChoice, scores: &[f64], offsets: &[usize], mode: Mode) -> Vec<Vec<u32>> {
        let input = RouterInput::new(offsets, &[], 0).with_scores(scores, policy.num_experts);
        let (routing, _) = policy.route(&input, mode);
        (0..routing.num_tokens()).map(|t| routing.row(t).to_vec()).collect()
    }

    #[test]
    fn every_expert_takes_its_share_of_every_document() {
        let offsets = [0, 12, 12, 13, 40];
        let scores = normals(1, 40 * 4, 1.0);
        let policy = policy(4, 1.5);
        let rows = rows(&policy, &scores, &offsets, Mode::Train);
        for w in offsets.windows(2) {
            for expert in 0..4u32 {
                let taken = rows[w[0]..w[1]].iter().filter(|row| row.contains(&expert)).count();
                assert_eq!(taken, (1.5 * (w[1] - w[0]) as f64 / 4.0).ceil() as usize);
            }
        }
        assert_eq!(rows[12], [0, 1, 2, 3], "a document of one token gets every expert");
        assert_eq!(super::ExpertChoice { num_experts: 11, ..policy.clone() }.capacity(0), 0);
        assert_eq!(ExpertChoice { num_experts: 11, k: 1.1, ..policy }.capacity(10), 1);
    }

    #[test]
    fn columns_take_the_likeliest_tokens_and_the_earlier_on_ties() {
        let scores = [2.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 3.0];
        assert_eq!(rows(&policy(2, 1.0), &scores, &[0, 4], Mode::Train), [vec![0], vec![0, 1], vec![], vec![1]]);
    }

    fn trained(num_experts: usize, k: f64, len: usize) -> ExpertChoice {
        let mut policy = policy(num_experts, k);
        for step in 0..20 {
            let scores = normals(100 + step, 4 * len * num_experts, 1.0);
            let offsets: Vec<usize> = (0..5).map(|d| d * len).collect();
            let mut observation = Observation::default();
            policy.observe(&mut observation, &RouterInput::new(&offsets, &[], 0).with_scores(&scores, num_experts));
            policy.step(&observation);
        }
        policy
    }

    #[test]
    fn evaluation_does_not_see_the_future_and_training_does() {
        let policy = trained(4, 2.0, 64);
        let scores = normals(5, 10 * 4, 1.0);
        let mut changed = scores.clone();
        changed[6 * 4..].copy_from_slice(&normals(6, 4 * 4, 3.0));
        let both = |mode| [&scores, &changed].map(|s| rows(&policy, s, &[0, 10], mode)[..6].to_vec());
        let [a, b] = both(Mode::Evaluate);
        assert_eq!(a, b);
        let [a, b] = both(Mode::Train);
        assert_ne!(a, b);
        let fresh = super::ExpertChoice { thresholds: Thresholds::default(), ..policy };
        assert!(rows(&fresh, &scores, &[0, 10], Mode::Evaluate).iter().all(|row| row.len() == 2));
    }

    #[test]
    fn evaluation_uses_about_k_experts() {
        let policy = trained(8, 2.0, 64);
        let rows = rows(&policy, &normals(7, 4000 * 8, 1.0), &[0, 4000], Mode::Evaluate);
        let mean = rows.iter().map(Vec::len).sum::<usize>() as f64 / 4000.0;
        assert!((mean - 2.0).abs() < 0.1, "{mean}");
    }

    #[test]
    fn splitting_into_micro_batches_gives_the_same_observation() {
        let offsets = [0, 5, 17, 18, 30];
        let scores: Vec<f32> = normals(8, 30 * 3, 1.0).iter().map(|x| *x as f32).collect();
        let policy = policy(3, 1.0);
        let input = RouterInput::new(&offsets, &[], 0).with_scores(&scores, 3);
        let mut whole = Observation::default();
        policy.observe(&mut whole, &input);
        let mut merged = Observation::default();
        for w in offsets.windows(2).rev() {
            let mut part = Observation::default();
            let offsets = [0, w[1] - w[0]];
            let input = RouterInput::new(&offsets, &[], 0).with_scores(&scores[w[0] * 3..w[1] * 3], 3);
            policy.observe(&mut part, &input);
            merged.merge(&part);
        }
        assert_eq!(whole, merged);
        assert!(whole.tokens == 30 && whole.sums_e.iter().all(|s| *s > 0));
    }
}
