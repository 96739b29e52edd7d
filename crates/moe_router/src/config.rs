//! The section `[model.router]` of a run file.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Standard deviation of fresh router weights: 1/√128, so that scores of a normed input of width 128 start with standard deviation 1.
pub const ROUTER_INIT_STD: f64 = 0.088;

fn num_experts() -> usize {
    8
}

fn expert_hidden_size() -> usize {
    64
}

fn init_std() -> f64 {
    ROUTER_INIT_STD
}

fn threshold() -> Threshold {
    Threshold::Same(0.4)
}

fn temperature() -> f64 {
    0.05
}

fn two() -> usize {
    2
}

fn two_on_average() -> f64 {
    2.0
}

fn yes() -> bool {
    true
}

/// A number for all layers, or a list with one number per layer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(untagged, expecting = "p must be a number, or a list with one number per layer")]
pub enum Threshold {
    Same(f64),
    PerLayer(Vec<f64>),
}

impl Threshold {
    /// The value in block `layer` (in range after `Config::validate`).
    pub fn at(&self, layer: usize) -> f64 {
        match self {
            Threshold::Same(p) => *p,
            Threshold::PerLayer(list) => list[layer],
        }
    }
}

/// How tokens choose experts.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum Config {
    /// One dense SwiGLU layer per block, no experts.
    Dense {},
    /// A token takes its likeliest experts until their probabilities together exceed `p`: one when the router is sure, several when it is not
    /// (Huang et al. 2024, arXiv 2403.07652).
    TopP {
        /// Probability mass to exceed, above 0 and at most 1 (1 takes all experts); a list sets it per layer, bottom first.
        #[serde(default = "threshold")]
        p: Threshold,
        /// Loss-free balancing: how far an optimizer step moves the bias of an expert with less or more than the mean load; 0 = no bias, 0.001 is
        /// usual (Wang et al. 2024, arXiv 2408.15664).
        #[serde(default)]
        bias_rate: f64,
        /// Mean experts per token that a controller on the threshold holds, from 1 to `num_experts`; absent = the threshold stays `p`.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        target: Option<f64>,
        /// Divide the weights of the chosen experts by their sum. Off: the weights are the probabilities themselves, as published; on: a token
        /// with one expert sends no language-model gradient to the router.
        #[serde(default)]
        renormalize: bool,
        /// Experts per layer.
        #[serde(default = "num_experts")]
        num_experts: usize,
        /// Hidden width of each expert.
        #[serde(default = "expert_hidden_size")]
        expert_hidden_size: usize,
        /// Shared experts, each `expert_hidden_size` wide: every token takes all of them with weight 1, outside the routing; 0 = none (DeepSeekMoE,
        /// Dai et al. 2024, arXiv 2401.06066).
        #[serde(default)]
        shared: usize,
        /// Keep the router weights at their initial values (a control: what does a random router reach?).
        #[serde(default)]
        frozen: bool,
        /// Standard deviation of fresh router weights; together with `num_experts` it decides the number of experts per token at the start.
        #[serde(default = "init_std")]
        init_std: f64,
    },
    /// Top-p with a threshold 0.1 + 0.6·σ(w·x + b) that every token computes, and soft gates, so that a gradient reaches w; the loss `budget` is its
    /// price.
    LearnedP {
        /// Softness of a gate: σ((threshold - probability of better experts) / temperature), above 0; a gate of 1 % or less is not computed.
        #[serde(default = "temperature")]
        temperature: f64,
        /// Experts per layer.
        #[serde(default = "num_experts")]
        num_experts: usize,
        /// Hidden width of each expert.
        #[serde(default = "expert_hidden_size")]
        expert_hidden_size: usize,
        /// Shared experts, each `expert_hidden_size` wide: every token takes all of them with weight 1, outside the routing; 0 = none (DeepSeekMoE,
        /// Dai et al. 2024, arXiv 2401.06066).
        #[serde(default)]
        shared: usize,
        /// Keep the router weights at their initial values; the threshold still learns.
        #[serde(default)]
        frozen: bool,
        /// Standard deviation of fresh router weights.
        #[serde(default = "init_std")]
        init_std: f64,
    },
    /// A token takes its `k` likeliest experts (Mixtral; Switch with k = 1 and `renormalize = false`).
    TopK {
        /// Experts per token.
        #[serde(default = "two")]
        k: usize,
        /// Loss-free balancing: how far an optimizer step moves the bias of an expert with less or more than the mean load; 0 = no bias, 0.001 is
        /// usual (Wang et al. 2024, arXiv 2408.15664).
        #[serde(default)]
        bias_rate: f64,
        /// Divide the weights of the chosen experts by their sum.
        #[serde(default = "yes")]
        renormalize: bool,
        /// Experts per layer.
        #[serde(default = "num_experts")]
        num_experts: usize,
        /// Hidden width of each expert.
        #[serde(default = "expert_hidden_size")]
        expert_hidden_size: usize,
        /// Shared experts, each `expert_hidden_size` wide: every token takes all of them with weight 1, outside the routing; 0 = none (DeepSeekMoE,
        /// Dai et al. 2024, arXiv 2401.06066).
        #[serde(default)]
        shared: usize,
        /// Keep the router weights at their initial values.
        #[serde(default)]
        frozen: bool,
        /// Standard deviation of fresh router weights.
        #[serde(default = "init_std")]
        init_std: f64,
    },
    /// An expert takes its likeliest tokens of each document (Zhou et al. 2022): balanced by construction, and not causal in training. Evaluation
    /// and generation use a causal stand-in: a token takes an expert whose probability exceeds a threshold learnt from training.
    ExpertChoice {
        /// Experts per token on average: an expert takes ceil(k · length / num_experts) tokens of a document.
        #[serde(default = "two_on_average")]
        k: f64,
        /// Experts per layer.
        #[serde(default = "num_experts")]
        num_experts: usize,
        /// Hidden width of each expert.
        #[serde(default = "expert_hidden_size")]
        expert_hidden_size: usize,
        /// Shared experts, each `expert_hidden_size` wide: every token takes all of them with weight 1, outside the routing; 0 = none (DeepSeekMoE,
        /// Dai et al. 2024, arXiv 2401.06066).
        #[serde(default)]
        shared: usize,
        /// Keep the router weights at their initial values.
        #[serde(default)]
        frozen: bool,
        /// Standard deviation of fresh router weights.
        #[serde(default = "init_std")]
        init_std: f64,
    },
    /// Experts in turn, whatever the scores: perfectly balanced, for timing and as a control. In training by the row of the batch, in evaluation by the
    /// place in the document; the router only weighs.
    Forced {
        /// Experts per token.
        #[serde(default = "two")]
        k: usize,
        /// Experts per layer.
        #[serde(default = "num_experts")]
        num_experts: usize,
        /// Hidden width of each expert.
        #[serde(default = "expert_hidden_size")]
        expert_hidden_size: usize,
        /// Shared experts, each `expert_hidden_size` wide: every token takes all of them with weight 1, outside the routing; 0 = none (DeepSeekMoE,
        /// Dai et al. 2024, arXiv 2401.06066).
        #[serde(default)]
        shared: usize,
        /// Keep the router weights at their initial values.
        #[serde(default)]
        frozen: bool,
        /// Standard deviation of fresh router weights.
        #[serde(default = "init_std")]
        init_std: f64,
    },
}

impl Default for Config {
    fn default() -> Self {
        Config::Dense {}
    }
}

/// What every sparse kind has.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Experts {
    pub num_experts: usize,
    pub expert_hidden_size: usize,
    pub shared: usize,
    pub frozen: bool,
    pub init_std: f64,
}

impl Experts {
    /// Hidden width of all shared experts together: the sum of several SwiGLU is one SwiGLU with their hidden rows side by side.
    pub fn shared_width(&self) -> usize {
        self.shared.saturating_mul(self.expert_hidden_size)
    }
}

impl Config {
    /// Sizes and router options; `None` for dense layers.
    pub fn experts(&self) -> Option<Experts> {
        match *self {
            Config::Dense {} => None,
            Config::TopP { num_experts, expert_hidden_size, shared, frozen, init_std, .. }
            | Config::LearnedP { num_experts, expert_hidden_size, shared, frozen, init_std, .. }
            | Config::TopK { num_experts, expert_hidden_size, shared, frozen, init_std, .. }
            | Config::ExpertChoice { num_experts, expert_hidden_size, shared, frozen, init_std, .. }
            | Config::Forced { num_experts, expert_hidden_size, shared, frozen, init_std, .. } => {
                Some(Experts { num_experts, expert_hidden_size, shared, frozen, init_std })
            }
        }
    }

    /// Checks every range. The error is the key below `model.router` and what is wrong with its value.
    pub fn validate(&self, num_layers: usize) -> Result<(), (String, String)> {
        let wrong = |key: &str, message: String| Err((key.to_string(), message));
        let Some(experts) = self.experts() else { return Ok(()) };
        if experts.num_experts < 1 || experts.num_experts > u32::MAX as usize {
            return wrong("num_experts", format!("must be at least 1, found {}", experts.num_experts));
        }
        if experts.expert_hidden_size < 1 {
            return wrong("expert_hidden_size", "must be at least 1, found 0".into());
        }
        if !(experts.init_std.is_finite() && experts.init_std >= 0.0) {
            return wrong("init_std", format!("must be a finite number of at least 0, found {}", experts.init_std));
        }
        if let Config::TopP { bias_rate, .. } | Config::TopK { bias_rate, .. } = self
            && !(0.0..=1.0).contains(bias_rate)
        {
            return wrong("bias_rate", format!("must be in [0, 1], found {bias_rate}; set it to 0.001, say"));
        }
        if let Config::TopP { target: Some(target), num_experts, .. } = self
            && !(1.0..=*num_experts as f64).contains(target)
        {
            return wrong("target", format!("must be from 1 to num_experts = {num_experts}, found {target}"));
        }
        match self {
            Config::Dense {} => Ok(()),
            Config::TopP { p, .. } => {
                let values = match p {
                    Threshold::Same(p) => std::slice::from_ref(p),
                    Threshold::PerLayer(list) if list.len() == num_layers => list,
                    Threshold::PerLayer(list) => {
                        let found = list.len();
                        return wrong("p", format!("must list one number per layer: {num_layers}, found {found}"));
                    }
                };
                match values.iter().find(|p| !(**p > 0.0 && **p <= 1.0)) {
                    Some(p) => wrong("p", format!("must be above 0 and at most 1, found {p}")),
                    None => Ok(()),
                }
            }
            Config::LearnedP { temperature, .. } if !(*temperature > 0.0 && *temperature <= 1.0) => {
                wrong("temperature", format!("must be above 0 and at most 1, found {temperature}"))
            }
            Config::TopK { k, num_experts, .. } | Config::Forced { k, num_experts, .. }
                if *k < 1 || k > num_experts =>
            {
                wrong("k", format!("must be between 1 and num_experts = {num_experts}, found {k}"))
            }
            Config::ExpertChoice { k, num_experts, .. } if !(*k > 0.0 && *k <= *num_experts as f64) => {
                wrong("k", format!("must be above 0 and at most num_experts = {num_experts}, found {k}"))
            }
            Config::LearnedP { .. } | Config::TopK { .. } | Config::ExpertChoice { .. } | Config::Forced { .. } => {
                Ok(())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Config, String> {
        serde_json::from_str(text).map_err(|e| e.to_string())
    }

    #[test]
    fn defaults_and_lists_are_read_and_unknown_keys_refused() {
        assert_eq!(parse(r#"{"kind": "dense"}"#).unwrap(), Config::default());
        let Config::TopP { p, renormalize, num_experts, .. } = parse(r#"{"kind": "top_p", "p": [0.5, 1]}"#).unwrap()
        else {
            panic!("another kind")
        };
        assert_eq!((p.at(0), p.at(1), renormalize, num_experts), (0.5, 1.0, false, 8));
        assert!(matches!(parse(r#"{"kind": "top_k"}"#).unwrap(), Config::TopK { k: 2, renormalize: true, .. }));
        assert!(matches!(
            parse(r#"{"kind": "expert_choice", "k": 1.5}"#).unwrap(),
            Config::ExpertChoice { k: 1.5, .. }
        ));
        for text in [r#"{"kind": "top_p", "k": 2}"#, r#"{"kind": "dense", "p": 0.4}"#, r#"{"kind": "best"}"#] {
            assert!(parse(text).unwrap_err().contains("unknown"), "{text}");
        }
        assert!(parse(r#"{"kind": "top_p", "p": "x"}"#).unwrap_err().contains("p must be a number, or a list"));
    }

    #[test]
    fn values_survive_writing_and_reading() {
        for text in [
            r#"{"kind":"dense"}"#,
            r#"{"kind":"top_p","p":[0.3,0.4],"num_experts":4,"frozen":true}"#,
            r#"{"kind":"top_k","k":1,"init_std":0.5,"bias_rate":0.01}"#,
            r#"{"kind":"top_p","target":1.5}"#,
            r#"{"kind":"learned_p","temperature":0.1}"#,
            r#"{"kind":"expert_choice","k":2.5}"#,
            r#"{"kind":"forced","k":3,"shared":2}"#,
        ] {
            let config = parse(text).unwrap();
            assert_eq!(parse(&serde_json::to_string(&config).unwrap()).unwrap(), config);
        }
    }

    #[test]
    fn every_sparse_kind_may_have_shared_experts_and_has_none_unless_told() {
        let width = |text: &str| parse(text).unwrap().experts().unwrap().shared_width();
        for kind in ["top_p", "learned_p", "top_k", "expert_choice", "forced"] {
            assert_eq!(width(&format!(r#"{{"kind":"{kind}"}}"#)), 0);
            assert_eq!(width(&format!(r#"{{"kind":"{kind}","shared":3,"expert_hidden_size":5}}"#)), 15);
        }
        assert_eq!(width(&format!(r#"{{"kind":"top_k","shared":{}}}"#, u64::MAX)), usize::MAX);
        assert!(parse(r#"{"kind":"dense","shared":1}"#).unwrap_err().contains("unknown"));
    }

    #[test]
    fn every_range_is_checked() {
        let key = |text: &str| parse(text).unwrap().validate(2).map_err(|(key, _)| key);
        let bad = [
            (r#"{"kind":"top_p","p":0.0}"#, "p"),
            (r#"{"kind":"top_p","p":1.01}"#, "p"),
            (r#"{"kind":"top_p","p":[0.4]}"#, "p"),
            (r#"{"kind":"top_p","p":[0.4,2.0]}"#, "p"),
            (r#"{"kind":"top_p","num_experts":0}"#, "num_experts"),
            (r#"{"kind":"top_p","expert_hidden_size":0}"#, "expert_hidden_size"),
            (r#"{"kind":"top_p","init_std":-1.0}"#, "init_std"),
            (r#"{"kind":"top_p","target":0.5}"#, "target"),
            (r#"{"kind":"top_p","target":8.1}"#, "target"),
            (r#"{"kind":"top_k","bias_rate":-0.1}"#, "bias_rate"),
            (r#"{"kind":"learned_p","temperature":0.0}"#, "temperature"),
            (r#"{"kind":"top_k","k":0}"#, "k"),
            (r#"{"kind":"top_k","k":9}"#, "k"),
            (r#"{"kind":"forced","k":9}"#, "k"),
            (r#"{"kind":"expert_choice","k":0.0}"#, "k"),
            (r#"{"kind":"expert_choice","k":8.5}"#, "k"),
        ];
        for (text, expected) in bad {
            assert_eq!(key(text), Err(expected.to_string()), "{text}");
        }
        for text in [
            r#"{"kind":"dense"}"#,
            r#"{"kind":"top_p","p":1.0}"#,
            r#"{"kind":"top_p","p":[0.4,0.2]}"#,
            r#"{"kind":"top_k","k":8}"#,
            r#"{"kind":"expert_choice","k":8.0}"#,
        ] {
            assert_eq!(key(text), Ok(()), "{text}");
        }
        let nan = Config::TopP {
            p: Threshold::Same(f64::NAN),
            bias_rate: 0.0,
            target: None,
            renormalize: false,
            num_experts: 8,
            expert_hidden_size: 1,
            shared: 0,
            frozen: false,
            init_std: 0.1,
        };
        assert_eq!(nan.validate(1).unwrap_err().0, "p");
    }
}
