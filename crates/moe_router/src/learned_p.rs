//! Top-p routing whose threshold every token computes: p_t = 0.1 + 0.6 σ(w·x_t + b). A hard choice would send no gradient to w, so the experts are
//! gated softly: of those ranked by probability, the one with mass c before it gets the gate m = σ((p_t - c) / τ) and the weight m·P. Experts whose
//! gate is at most 1 % are not computed; for τ → 0 this is top-p. Left alone p rises to its maximum, so every gate has a price: the loss `budget`,
//! the mean over tokens of Σ m.

use crate::{RouterInput, Routing, assign, softmax};
use tensor::Real;

/// Smallest gate of an expert that is computed.
const LEAST_GATE: f64 = 1e-2;

/// The threshold for the logit w·x + b: from 0.1 to 0.7.
pub fn threshold(logit: f64) -> f64 {
    0.1 + 0.6 * logit.sigmoid()
}

#[derive(Clone, Debug, PartialEq)]
pub struct LearnedP {
    pub num_experts: usize,
    /// τ: how softly the mass before an expert meets the threshold.
    pub temperature: f64,
}

impl LearnedP {
    fn gate(&self, threshold: f64, mass: f64) -> f64 {
        ((threshold - mass) / self.temperature).sigmoid()
    }

    /// Rows sorted by falling probability, weights_a, and the mean over tokens of the sum of gates. Without logits they count as 0: p = 0.4.
    pub fn route<T: Real>(&self, input: &RouterInput<'_, T>) -> (Routing, Vec<T>, f64) {
        let (mut order, mut gates_a) = (Vec::new(), Vec::new());
        let (routing, mut weights_a) = assign(input, self.num_experts, false, |t, p_e, row| {
            softmax::rank(p_e, &mut order);
            let p = threshold(input.threshold_logits_n.map_or(0.0, |logits_n| logits_n[t].to_f64()));
            let mut mass = 0.0;
            for (rank, &id) in order.iter().enumerate() {
                let gate = self.gate(p, mass);
                if rank > 0 && gate <= LEAST_GATE {
                    break;
                }
                row.push(id);
                gates_a.push(gate);
                mass += p_e[id as usize].to_f64();
            }
        });
        weights_a.iter_mut().zip(&gates_a).for_each(|(weight, gate)| *weight *= T::from_f64(*gate));
        let mean = gates_a.iter().sum::<f64>() / routing.num_tokens().max(1) as f64;
        (routing, weights_a, mean)
    }

    /// The gradient of weights and mean of gates, exact where no step changes an order or a set: added to dscores_ne; that of the logits [n] is
    /// returned. `logits_n` holds w·x + b.
    pub fn backward<T: Real>(
        &self,
        (scores_ne, logits_n): (&[T], &[T]),
        routing: &Routing,
        (dweights_a, dmean): (Option<&[T]>, f64),
        dscores_ne: &mut [T],
    ) -> Vec<f64> {
        let e = routing.num_ids;
        let p_ne = softmax::probabilities(scores_ne, e);
        let dgate = dmean / routing.num_tokens().max(1) as f64;
        let token = |(t, logit): (usize, &T)| {
            let (ids, p_e) = (routing.row(t), &p_ne[t * e..(t + 1) * e]);
            let share = logit.to_f64().sigmoid();
            let p = threshold(logit.to_f64());
            // Through the gates' arguments, and through the probabilities as weights.
            let (mut mass, mut dargument) = (0.0, vec![0.0; ids.len()]);
            let mut dp_e = vec![T::ZERO; e];
            for (rank, (&id, at)) in ids.iter().zip(routing.span(t)).enumerate() {
                let probability = p_e[id as usize].to_f64();
                let gate = self.gate(p, mass);
                let dweight = dweights_a.map_or(0.0, |dweights_a| dweights_a[at].to_f64());
                dargument[rank] = (dweight * probability + dgate) * gate * (1.0 - gate) / self.temperature;
                dp_e[id as usize] = T::from_f64(dweight * gate);
                mass += probability;
            }
            // An expert's probability lies before all experts ranked below it.
            let mut below = 0.0;
            for (rank, &id) in ids.iter().enumerate().rev() {
                dp_e[id as usize] -= T::from_f64(below);
                below += dargument[rank];
            }
            softmax::backward(p_e, |i| dp_e[i], &mut dscores_ne[t * e..(t + 1) * e]);
            below * 0.6 * share * (1.0 - share)
        };
        logits_n.iter().enumerate().map(token).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::top_p::TopP;
    use tensor::check::normals;

    const EXPERTS: usize = 6;

    fn route(temperature: f64, scores: &[f64], logits: &[f64]) -> (Routing, Vec<f64>, f64) {
        let input = RouterInput::new(&[], &[], 0).with_scores(scores, EXPERTS).with_thresholds(logits);
        LearnedP { num_experts: EXPERTS, temperature }.route(&input)
    }

    #[test]
    fn a_cold_gate_is_top_p() {
        let scores = normals(1, 200 * EXPERTS, 1.0);
        for logit in [-2.0, 0.0, 3.0] {
            let (soft, weights, mean) = route(1e-9, &scores, &[logit; 200]);
            let hard = TopP::new(EXPERTS, threshold(logit), false);
            let (hard, expected) = hard.route(&RouterInput::new(&[], &[], 0).with_scores(&scores, EXPERTS));
            assert_eq!((soft, weights), (hard.clone(), expected));
            assert!((mean - hard.active_per_token()).abs() < 1e-12);
        }
    }

    #[test]
    fn thresholds_stay_between_their_bounds_and_decide_token_by_token() {
        assert!((threshold(-1e9) - 0.1).abs() < 1e-12 && (threshold(1e9) - 0.7).abs() < 1e-12 && threshold(0.0) == 0.4);
        let scores = [0.3; 2 * EXPERTS];
        let (routing, ..) = route(0.01, &scores, &[-50.0, 50.0]);
        assert_eq!((routing.row(0).len(), routing.row(1).len()), (1, 5));
        let (empty, weights, mean) = route(0.1, &[], &[]);
        assert_eq!((empty.num_tokens(), weights.len(), mean), (0, 0, 0.0));
    }

    /// Descent of the logits alone on -value·Σ weights + price·(mean of gates).
    fn descend(price: f64) -> f64 {
        let scores = normals(2, 64 * EXPERTS, 1.0);
        let policy = LearnedP { num_experts: EXPERTS, temperature: 0.05 };
        let mut logits = vec![0.0; 64];
        for _ in 0..400 {
            let (routing, weights, _) = route(0.05, &scores, &logits);
            let upstream = vec![-1.0 / 64.0; weights.len()];
            let mut unused = vec![0.0; scores.len()];
            let d = policy.backward((&scores, &logits), &routing, (Some(&upstream), price), &mut unused);
            logits.iter_mut().zip(d).for_each(|(logit, d)| *logit -= 64.0 * d);
        }
        logits.iter().map(|logit| threshold(*logit)).sum::<f64>() / 64.0
    }

    #[test]
    fn a_high_price_drives_the_threshold_down_and_none_lets_it_drift_up() {
        assert!(descend(10.0) < 0.15 && descend(0.0) > 0.6, "{} {}", descend(10.0), descend(0.0));
    }
}
