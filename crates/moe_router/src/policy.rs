//! The policies behind one enum, and their control state: what is not a parameter and yet moves, once per optimizer step.

use crate::balance::{self, Balance};
use crate::budget::Budget;
use crate::config::Config;
use crate::expert_choice::{ExpertChoice, Thresholds};
use crate::forced::Forced;
use crate::learned_p::LearnedP;
use crate::overruled::Overruled;
use crate::top_k::TopK;
use crate::top_p::TopP;
use crate::{RouterInput, Routing};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use tensor::Real;

/// What the routing is for. `Evaluate` never looks at later tokens; `Train` may, where a policy says so.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    Train,
    Evaluate,
}

/// The routing policy of one layer, with its control state.
#[derive(Clone, Debug, PartialEq)]
pub enum Policy {
    TopP(TopP),
    LearnedP(LearnedP),
    TopK(TopK),
    ExpertChoice(ExpertChoice),
    Forced(Forced),
    /// One of these with another choice in place of its own; no configuration says it.
    Overruled(Box<Overruled>),
}

/// What the training micro-batches of one optimizer step showed. All integers: merging is exact in any order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Observation {
    pub tokens: u64,
    /// One sum per expert; its meaning is the policy's.
    pub sums_e: Vec<u128>,
}

impl Observation {
    /// Adds what another micro-batch or worker saw.
    pub fn merge(&mut self, other: &Observation) {
        self.tokens += other.tokens;
        self.sums_e.resize(self.sums_e.len().max(other.sums_e.len()), 0);
        self.sums_e.iter_mut().zip(&other.sums_e).for_each(|(sum, more)| *sum += more);
    }
}

/// The control state of a layer as it is saved: the same bits after a reload.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Control {
    /// The policy has none.
    None,
    ExpertChoice(Thresholds),
    /// Of token choice: the biases of the experts and the moving threshold.
    Choice {
        balance: Balance,
        budget: Option<Budget>,
    },
}

#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error(
    "the saved routing state of layer {layer} belongs to another model.router; resume with the configuration that wrote it"
)]
pub struct ControlError {
    pub layer: usize,
}

impl Policy {
    /// The policy of block `layer`; `None` if the layer is dense. `config` must have been validated.
    pub fn new(config: &Config, layer: usize) -> Option<Policy> {
        match *config {
            Config::Dense {} => None,
            Config::TopP { ref p, renormalize, num_experts, bias_rate, target, .. } => Some(Policy::TopP(TopP {
                balance: Balance::new(bias_rate),
                budget: target.map(|target| Budget::new(target, p.at(layer))),
                ..TopP::new(num_experts, p.at(layer), renormalize)
            })),
            Config::LearnedP { temperature, num_experts, .. } => {
                Some(Policy::LearnedP(LearnedP { num_experts, temperature }))
            }
            Config::TopK { k, renormalize, num_experts, bias_rate, .. } => {
                Some(Policy::TopK(TopK { balance: Balance::new(bias_rate), ..TopK::new(num_experts, k, renormalize) }))
            }
            Config::ExpertChoice { k, num_experts, .. } => {
                Some(Policy::ExpertChoice(ExpertChoice { num_experts, k, thresholds: Thresholds::default() }))
            }
            Config::Forced { k, num_experts, .. } => Some(Policy::Forced(Forced { num_experts, k })),
        }
    }

    pub fn num_experts(&self) -> usize {
        match self {
            Policy::TopP(policy) => policy.num_experts,
            Policy::LearnedP(policy) => policy.num_experts,
            Policy::TopK(policy) => policy.num_experts,
            Policy::ExpertChoice(policy) => policy.num_experts,
            Policy::Forced(policy) => policy.num_experts,
            Policy::Overruled(overruled) => overruled.policy.num_experts(),
        }
    }

    /// Assignments and their weights. Pure: the control state only moves in `step`.
    pub fn route<T: Real>(&self, input: &RouterInput<'_, T>, mode: Mode) -> (Routing, Vec<T>) {
        match self {
            Policy::TopP(policy) => policy.route(input),
            Policy::LearnedP(policy) => {
                let (routing, weights_a, _) = policy.route(input);
                (routing, weights_a)
            }
            Policy::TopK(policy) => policy.route(input),
            Policy::ExpertChoice(policy) => policy.route(input, mode),
            Policy::Forced(policy) => policy.route(input, mode),
            Policy::Overruled(overruled) => overruled.route(input, mode),
        }
    }

    /// dscores_ne += the gradient through the weights, the choice of `routing` held constant.
    pub fn backward<T: Real>(&self, scores_ne: &[T], routing: &Routing, dweights_a: &[T], dscores_ne: &mut [T]) {
        match self {
            Policy::TopP(policy) => policy.backward(scores_ne, routing, dweights_a, dscores_ne),
            Policy::LearnedP(_) => unreachable!("its gradient has an entry of its own: node::route_learned"),
            Policy::TopK(policy) => policy.backward(scores_ne, routing, dweights_a, dscores_ne),
            Policy::ExpertChoice(policy) => policy.backward(scores_ne, routing, dweights_a, dscores_ne),
            Policy::Forced(policy) => policy.backward(scores_ne, routing, dweights_a, dscores_ne),
            Policy::Overruled(overruled) => overruled.backward(scores_ne, routing, dweights_a, dscores_ne),
        }
    }

    /// The threshold of top-p routing that holds now.
    pub fn threshold(&self) -> Option<f64> {
        match self {
            Policy::TopP(policy) => Some(policy.threshold()),
            Policy::Overruled(overruled) => overruled.policy.threshold(),
            Policy::LearnedP(_) | Policy::TopK(_) | Policy::ExpertChoice(_) | Policy::Forced(_) => None,
        }
    }

    /// Notes a training micro-batch. Never called in evaluation or in a recomputation.
    pub fn observe<T: Real>(&self, observation: &mut Observation, input: &RouterInput<'_, T>, routing: &Routing) {
        match self {
            Policy::LearnedP(_) | Policy::Forced(_) => {}
            Policy::Overruled(overruled) => overruled.policy.observe(observation, input, routing),
            Policy::TopP(_) | Policy::TopK(_) if self.control() == Control::None => {}
            Policy::TopP(_) | Policy::TopK(_) => balance::count(observation, routing),
            Policy::ExpertChoice(policy) => policy.observe(observation, input),
        }
    }

    /// Moves the control state, once per optimizer step (and not at all where that step was skipped).
    pub fn step(&mut self, observation: &Observation) {
        match self {
            Policy::TopP(policy) => {
                policy.balance.step(observation);
                policy.budget.iter_mut().for_each(|budget| budget.step(observation));
            }
            Policy::LearnedP(_) | Policy::Forced(_) => {}
            Policy::Overruled(overruled) => overruled.policy.step(observation),
            Policy::TopK(policy) => policy.balance.step(observation),
            Policy::ExpertChoice(policy) => policy.step(observation),
        }
    }

    pub fn control(&self) -> Control {
        let (balance, budget) = match self {
            Policy::TopP(policy) => (&policy.balance, &policy.budget),
            Policy::TopK(policy) => (&policy.balance, &None),
            Policy::LearnedP(_) | Policy::Forced(_) => return Control::None,
            Policy::Overruled(overruled) => return overruled.policy.control(),
            Policy::ExpertChoice(policy) => return Control::ExpertChoice(policy.thresholds.clone()),
        };
        match balance.rate == 0.0 && budget.is_none() {
            true => Control::None,
            false => Control::Choice { balance: balance.clone(), budget: budget.clone() },
        }
    }

    /// Takes saved control state back. An error names `layer` if it was written by another policy or number of experts.
    pub fn restore(&mut self, control: Control, layer: usize) -> Result<(), ControlError> {
        if let Policy::Overruled(overruled) = self {
            return overruled.policy.restore(control, layer);
        }
        let (experts, stateless) = (self.num_experts(), self.control() == Control::None);
        let restored = match (self, control) {
            (Policy::TopP(_) | Policy::LearnedP(_) | Policy::TopK(_) | Policy::Forced(_), Control::None) => stateless,
            (Policy::TopP(policy), Control::Choice { balance, budget }) if !stateless => {
                policy.balance.restore(balance, experts) && Budget::restore(&mut policy.budget, budget)
            }
            (Policy::TopK(policy), Control::Choice { balance, budget: None }) if !stateless => {
                policy.balance.restore(balance, experts)
            }
            (Policy::ExpertChoice(policy), Control::ExpertChoice(saved)) if saved.fits(experts) => {
                policy.thresholds = saved;
                true
            }
            _ => false,
        };
        if restored { Ok(()) } else { Err(ControlError { layer }) }
    }
}

/// A number saved as the 16 hexadecimal digits of its bits.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Bits(pub f64);

impl Serialize for Bits {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&format!("{:016x}", self.0.to_bits()))
    }
}

impl<'de> Deserialize<'de> for Bits {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        let bits = u64::from_str_radix(&text, 16);
        let bits = bits.map_err(|_| de::Error::custom(format!("{text:?} is not the bits of a number in hexadecimal")));
        bits.map(|bits| Bits(f64::from_bits(bits)))
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use tensor::check::normals;

    pub(crate) fn policy(text: &str) -> Policy {
        Policy::new(&serde_json::from_str(text).unwrap(), 1).unwrap()
    }

    const EXPERT_CHOICE: &str = r#"{"kind": "expert_choice", "num_experts": 3, "k": 1.3}"#;

    /// One optimizer step on its own random batch.
    fn step(policy: &mut Policy, seed: u64) {
        let scores = normals(seed, 20 * 3, 1.0);
        let input = RouterInput::new(&[0, 7, 20], &[], 1).with_scores(&scores, 3);
        let (routing, _) = policy.route(&input, Mode::Train);
        let mut observation = Observation::default();
        policy.observe(&mut observation, &input, &routing);
        policy.step(&observation);
    }

    #[test]
    fn the_configuration_reaches_the_policy_of_its_layer() {
        assert_eq!(Policy::new(&Config::default(), 0), None);
        let Policy::TopP(top_p) = policy(r#"{"kind": "top_p", "p": [0.3, 0.7], "num_experts": 5}"#) else { panic!() };
        assert_eq!(top_p, TopP::new(5, 0.7, false));
        let Policy::TopK(top_k) = policy(r#"{"kind": "top_k", "k": 3, "renormalize": false}"#) else { panic!() };
        assert_eq!(top_k, TopK::new(8, 3, false));
    }

    #[test]
    fn control_moves_and_routes_and_is_saved_bit_for_bit() {
        let balanced = r#"{"kind": "top_k", "k": 1, "num_experts": 3, "bias_rate": 0.05}"#;
        let held = r#"{"kind": "top_p", "p": 0.6, "num_experts": 3, "bias_rate": 0.05, "target": 1.1}"#;
        for text in [EXPERT_CHOICE, balanced, held] {
            let mut trained = policy(text);
            let mut last = trained.control();
            for seed in 0..5 {
                step(&mut trained, seed);
                assert_ne!(trained.control(), last);
                last = trained.control();
            }
            let saved = serde_json::to_string(&last).unwrap();
            let mut loaded = policy(text);
            loaded.restore(serde_json::from_str(&saved).unwrap(), 1).unwrap();
            assert_eq!(serde_json::to_string(&loaded.control()).unwrap(), saved);
            let scores = normals(9, 120, 1.0);
            let input = RouterInput::new(&[0, 40], &[], 1).with_scores(&scores, 3);
            assert_eq!(loaded.route(&input, Mode::Evaluate), trained.route(&input, Mode::Evaluate));
            assert_ne!(loaded.route(&input, Mode::Evaluate), policy(text).route(&input, Mode::Evaluate));
            step(&mut trained, 6);
            step(&mut loaded, 6);
            assert_eq!(loaded, trained);
            let before = trained.clone();
            trained.step(&Observation::default());
            assert_eq!(trained, before, "nothing seen, nothing moved");
        }
    }

    #[test]
    fn state_of_another_policy_is_refused() {
        let mut trained = policy(EXPERT_CHOICE);
        step(&mut trained, 1);
        let error = Err(ControlError { layer: 2 });
        assert_eq!(policy(r#"{"kind": "top_k"}"#).restore(trained.control(), 2), error);
        assert_eq!(policy(r#"{"kind": "expert_choice", "num_experts": 4}"#).restore(trained.control(), 2), error);
        assert_eq!(policy(EXPERT_CHOICE).restore(Control::None, 2), error);
        let none = policy(r#"{"kind": "top_p"}"#).control();
        let text = serde_json::to_string(&none).unwrap();
        assert_eq!(policy(r#"{"kind": "top_k"}"#).restore(serde_json::from_str(&text).unwrap(), 0), Ok(()));
        let mut balanced = policy(r#"{"kind": "top_k", "num_experts": 3, "bias_rate": 0.1}"#);
        step(&mut balanced, 1);
        for other in [r#"{"kind": "top_k", "num_experts": 3}"#, r#"{"kind": "top_k", "bias_rate": 0.1}"#] {
            assert_eq!(policy(other).restore(balanced.control(), 2), error);
        }
        assert_eq!(balanced.restore(Control::None, 2), error);
        let mut held = policy(r#"{"kind": "top_p", "num_experts": 3, "target": 1.5}"#);
        assert_eq!(policy(r#"{"kind": "top_p", "num_experts": 3}"#).restore(held.control(), 2), error);
        assert_eq!(held.restore(balanced.control(), 2), error);
        assert!(serde_json::from_str::<Control>(r#"{"kind":"expert_choice","averages_e":["x"],"mass":"0"}"#).is_err());
    }
}
