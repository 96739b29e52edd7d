//! A controller on the threshold of top-p routing that holds the mean number of experts per token at a target: proportional and integral answers
//! to a running mean of what was used (after DTop-p, arXiv 2512.13996; the constants are ours).

use crate::policy::{Bits, Observation};
use serde::{Deserialize, Serialize};

/// Share of the old mean that a step keeps.
const DECAY: f64 = 0.9;

/// Answers to the change of the error and to the error, per expert of error.
const PROPORTIONAL: f64 = 0.05;
const INTEGRAL: f64 = 0.01;

/// The threshold stays between these.
const LOWEST: f64 = 0.02;
const HIGHEST: f64 = 0.99;

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Budget {
    /// Mean experts per token to hold.
    #[serde(skip)]
    pub target: f64,
    p: Bits,
    /// Decayed sum of the means seen, and of their weights: 0 before the first step.
    mean: Bits,
    mass: Bits,
    /// Error after the step before.
    error: Bits,
}

impl Budget {
    /// A controller that starts from threshold `p`.
    pub fn new(target: f64, p: f64) -> Self {
        Budget { target, p: Bits(p), mean: Bits(0.0), mass: Bits(0.0), error: Bits(0.0) }
    }

    /// The threshold that holds now.
    pub fn p(&self) -> f64 {
        self.p.0
    }

    /// Takes a saved state if both are there or neither, and its numbers can be.
    pub(crate) fn restore(own: &mut Option<Budget>, saved: Option<Budget>) -> bool {
        match (own, saved) {
            (None, None) => true,
            (Some(own), Some(saved)) if saved.sound() => {
                *own = Budget { target: own.target, ..saved };
                true
            }
            _ => false,
        }
    }

    fn sound(&self) -> bool {
        let shares = (0.0..=1.0).contains(&self.mass.0) && self.p.0 > 0.0 && self.p.0 <= 1.0;
        shares && self.mean.0.is_finite() && self.error.0.is_finite()
    }

    /// p ← clip(p - K_P (e - e_before) - K_I e), where e is the running mean of experts per token less the target.
    pub(crate) fn step(&mut self, observation: &Observation) {
        if observation.tokens == 0 {
            return;
        }
        let used = observation.sums_e.iter().sum::<u128>() as f64 / observation.tokens as f64;
        let first = self.mass.0 == 0.0;
        self.mean.0 = DECAY * self.mean.0 + (1.0 - DECAY) * used;
        self.mass.0 = DECAY * self.mass.0 + (1.0 - DECAY);
        let error = self.mean.0 / self.mass.0 - self.target;
        let change = if first { 0.0 } else { error - self.error.0 };
        self.p.0 = (self.p.0 - PROPORTIONAL * change - INTEGRAL * error).clamp(LOWEST, HIGHEST);
        self.error.0 = error;
    }
}

#[cfg(test)]
mod tests {
    use crate::{Mode, Observation, Policy, RouterInput, policy::tests::policy};
    use tensor::check::normals;

    /// Mean experts per token over the last of `steps` steps on fresh scores of growing spread: the router moves while it is held.
    fn held(policy: &mut Policy, steps: u64) -> Vec<f64> {
        let mut used = Vec::new();
        for step in 0..steps {
            let spread = 0.5 + 1.5 * step as f64 / steps as f64;
            let scores = normals(step, 512 * 8, spread);
            let input = RouterInput::new(&[], &[], 0).with_scores(&scores, 8);
            let (routing, _) = policy.route(&input, Mode::Train);
            used.push(routing.active_per_token());
            let mut observation = Observation::default();
            policy.observe(&mut observation, &input, &routing);
            policy.step(&observation);
        }
        used
    }

    #[test]
    fn the_target_is_reached_from_either_side_and_held() {
        for (p, target) in [(0.1, 2.0), (0.9, 2.0), (0.4, 1.5), (0.4, 4.0)] {
            let mut policy = policy(&format!(r#"{{"kind":"top_p","p":{p},"target":{target}}}"#));
            let used = held(&mut policy, 600);
            let mean = used[400..].iter().sum::<f64>() / 200.0;
            assert!((mean - target).abs() < 0.05, "from {p}: {mean} and not {target}");
            assert!(used[400..].iter().all(|used| (used - target).abs() < 0.3), "from {p}: {used:?}");
            assert_ne!(policy.threshold(), Some(p));
        }
    }

    #[test]
    fn a_target_out_of_reach_ends_at_the_bound() {
        let mut policy = policy(r#"{"kind":"top_p","p":0.4,"target":8}"#);
        held(&mut policy, 300);
        assert_eq!(policy.threshold(), Some(super::HIGHEST));
    }
}
