//! The configuration of the model: what `[model]` of a run file holds, and which combinations make a model.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// More numbers than this in one model are refused as a slip of the keyboard: 2^40 numbers fill 4 TiB.
pub const MAX_NUMBERS: u64 = 1 << 40;
/// Blocks are named one by one, so their number is bounded by more than the numbers they hold.
pub const MAX_LAYERS: usize = 10_000;

/// The transformer: Pre-LN blocks of grouped-query attention and SwiGLU, without biases.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Model {
    /// Width of the residual stream; a multiple of `num_heads`.
    pub hidden_size: usize,
    /// Number of blocks, each attention and feed-forward.
    pub num_layers: usize,
    /// Query heads, each `hidden_size / num_heads` wide.
    pub num_heads: usize,
    /// Key and value heads, each shared by `num_heads / num_kv_heads` query heads.
    pub num_kv_heads: usize,
    /// Hidden width of the dense SwiGLU; used by `router.kind = "dense"` alone.
    pub intermediate_size: usize,
    /// Tokens a query sees, itself included; absent = every earlier token of its document.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub window: Option<usize>,
    /// Use the token embedding as output projection too.
    pub tie_word_embeddings: bool,
    /// Added to the mean square inside every RMSNorm.
    pub rms_norm_eps: f64,
    /// Windows of their own for tokens.
    pub adaptive_window: AdaptiveWindow,
    /// How attention knows where a token stands.
    pub position: Position,
    /// Mixture of heads.
    pub heads: Heads,
    /// Mixture of depths.
    pub depths: Depths,
    /// Feed-forward of every block: dense, or experts chosen by a policy.
    pub router: moe_router::Config,
}

/// Windows that follow how broadly attention spreads.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct AdaptiveWindow {
    /// Whose windows differ.
    pub kind: AdaptiveWindowKind,
    /// Keys that a token sees whose attention in the block below was on one key (token).
    pub min: usize,
    /// Keys that a token sees whose attention in the block below was even, and in the first block; `min` plus a multiple of `block` (token).
    pub max: usize,
    /// Windows are rounded to `min` plus a multiple of this many keys (token).
    pub block: usize,
}

/// Whose windows differ.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum AdaptiveWindowKind {
    /// All see as far as `model.window` says.
    #[default]
    Off,
    /// Each token, in each block but the first, by the entropy of its attention in the block below (as a share of the largest possible, mean over
    /// heads): a constant that only looks back, so that training, evaluation and decoding agree.
    Token,
}

impl AdaptiveWindow {
    pub fn on(&self) -> bool {
        self.kind != AdaptiveWindowKind::Off
    }

    /// The window of a token whose attention in the block below spread so broadly, from 0 (one key) to 1 (all keys alike).
    pub fn keys(&self, breadth: f64) -> usize {
        let steps = (self.max - self.min) / self.block;
        self.min + self.block * (breadth * steps as f64).round() as usize
    }
}

impl Default for AdaptiveWindow {
    fn default() -> Self {
        Self { kind: AdaptiveWindowKind::Off, min: 64, max: 1024, block: 64 }
    }
}

/// Positions.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Position {
    /// What tells tokens their order.
    pub kind: PositionKind,
    /// Largest position: `cope` counts up to it, `learned` has this many embeddings (at least the longest sequence).
    pub max: usize,
}

/// One way of knowing the order of tokens.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum PositionKind {
    /// Contextual positions counted by gates (Golovneva 2024, arXiv 2405.18719).
    #[default]
    Cope,
    /// Rotary embedding, half-split, base 10000 (Su 2021, arXiv 2104.09864).
    Rope,
    /// The causal mask alone.
    None,
    /// One embedding per position in the document, added to the token's.
    Learned,
}

/// Mixture of heads (Jin 2024, arXiv 2410.11842). Heads 0..shared serve every token, of the others each token takes `active`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Heads {
    /// Heads that serve every token; `shared + routed = num_heads`.
    pub shared: usize,
    /// Heads chosen token by token; 0 = plain attention with all heads, ungated.
    pub routed: usize,
    /// Routed heads that a token takes, from 1 to `routed`.
    pub active: usize,
}

/// Mixture of depths (Raposo 2024, arXiv 2404.02258): some tokens pass a routed block unchanged. The others attend to each other alone; a window
/// counts them alone too.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Depths {
    /// Share of the tokens of a document that a routed block takes in training, above 0, at most 1; 1 = no routed blocks.
    pub capacity: f64,
    /// Every so many-th block is routed: 2 routes the second, the fourth, …
    pub every: usize,
    /// Which tokens a routed block takes in training.
    pub choice: DepthChoice,
}

/// Which tokens a routed block takes in training. Evaluation and generation always take those whose own score is above 0.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum DepthChoice {
    /// The best of the document, which looks ahead; `losses.depths` teaches the scores to say so themselves.
    #[default]
    Best,
    /// Those of evaluation, so that nothing looks ahead; `losses.depths` draws their number to the capacity.
    Causal,
}

impl Depths {
    /// Whether there are routed blocks.
    pub fn on(&self) -> bool {
        self.capacity < 1.0
    }

    /// Whether block `i` (from 0) is routed.
    pub fn routes(&self, i: usize) -> bool {
        self.on() && (i + 1).is_multiple_of(self.every.max(1))
    }
}

impl Default for Depths {
    fn default() -> Self {
        Self { capacity: 1.0, every: 2, choice: DepthChoice::Best }
    }
}

impl Default for Model {
    fn default() -> Self {
        Self {
            hidden_size: 128,
            num_layers: 3,
            num_heads: 8,
            num_kv_heads: 4,
            intermediate_size: 256,
            window: None,
            adaptive_window: AdaptiveWindow::default(),
            tie_word_embeddings: false,
            rms_norm_eps: 1e-6,
            position: Position::default(),
            heads: Heads::default(),
            depths: Depths::default(),
            router: moe_router::Config::default(),
        }
    }
}

impl Default for Position {
    fn default() -> Self {
        Self { kind: PositionKind::Cope, max: 64 }
    }
}

impl Default for Heads {
    fn default() -> Self {
        Self { shared: 2, routed: 6, active: 4 }
    }
}

/// A value that makes no model: `key` is dotted and relative to `[model]`, `message` says what it must be.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("model.{key}: {message}")]
pub struct Problem {
    pub key: String,
    pub message: String,
}

impl Model {
    /// The first of [`Model::problems`].
    pub fn validate(&self) -> Result<(), Problem> {
        self.problems().into_iter().next().map_or(Ok(()), Err)
    }

    /// Everything that keeps these values from being a model; empty for a good one. Never panics, whatever the sizes.
    pub fn problems(&self) -> Vec<Problem> {
        let mut found = Vec::new();
        let mut problem = |key: &str, message: String| found.push(Problem { key: key.to_string(), message });
        let sizes = [
            ("hidden_size", self.hidden_size),
            ("num_layers", self.num_layers),
            ("num_heads", self.num_heads),
            ("num_kv_heads", self.num_kv_heads),
            ("intermediate_size", self.intermediate_size),
            ("position.max", self.position.max),
        ];
        for (key, _) in sizes.iter().filter(|(_, size)| *size == 0) {
            problem(key, "must be at least 1".into());
        }
        if self.num_layers > MAX_LAYERS {
            problem("num_layers", format!("must be at most {MAX_LAYERS}"));
        }
        self.attention_problems(&mut problem);
        self.mixture_problems(&mut problem);
        self.depth_problems(&mut problem);
        if self.window == Some(0) {
            problem("window", "must be at least 1; leave it out to see the whole document".into());
        }
        self.window_problems(&mut problem);
        if !(self.rms_norm_eps.is_finite() && self.rms_norm_eps > 0.0) {
            problem("rms_norm_eps", "must be a finite number above 0, 1e-6 say".into());
        }
        if let Err((key, message)) = self.router.validate(self.num_layers) {
            problem(&format!("router.{key}"), message);
        }
        // The vocabulary is known only with the data; one token is its smallest size.
        if self.num_parameters(1).is_none_or(|count| count > MAX_NUMBERS) {
            problem("hidden_size", "makes a model of more than 2^40 numbers with the other sizes".into());
        }
        found
    }

    /// Positions that a document may have; `None` where any length will do.
    pub fn max_positions(&self) -> Option<usize> {
        (self.position.kind == PositionKind::Learned).then_some(self.position.max)
    }

    fn attention_problems(&self, problem: &mut impl FnMut(&str, String)) {
        let (width, heads, kv_heads) = (self.hidden_size, self.num_heads, self.num_kv_heads);
        if heads > 0 && !width.is_multiple_of(heads) {
            problem("hidden_size", format!("must be a multiple of model.num_heads = {heads}"));
        } else if heads > 0 && self.position.kind == PositionKind::Rope && !(width / heads).is_multiple_of(2) {
            let head = width / heads;
            problem("hidden_size", format!("gives heads {head} wide; rope turns pairs, so the width must be even"));
        }
        if kv_heads > 0 && !heads.is_multiple_of(kv_heads) {
            problem("num_heads", format!("must be a multiple of model.num_kv_heads = {kv_heads}"));
        }
    }

    fn mixture_problems(&self, problem: &mut impl FnMut(&str, String)) {
        let Heads { shared, routed, active } = self.heads;
        if routed == 0 {
            return; // no mixture: `shared` and `active` are unused
        }
        let heads = self.num_heads;
        if shared.checked_add(routed) != Some(heads) {
            let sum = format!("and model.heads.shared = {shared} must add up to model.num_heads = {heads}");
            problem("heads.routed", format!("{sum}; or set model.heads.routed = 0 for plain attention"));
        }
        if !(1..=routed).contains(&active) {
            problem("heads.active", format!("must be from 1 to model.heads.routed = {routed}"));
        }
    }

    /// Keys that a token sees at most; `None` where it sees its whole document.
    pub fn widest_window(&self) -> Option<usize> {
        if self.adaptive_window.on() { Some(self.adaptive_window.max) } else { self.window }
    }

    fn window_problems(&self, problem: &mut impl FnMut(&str, String)) {
        let AdaptiveWindow { min, max, block, .. } = self.adaptive_window;
        if !self.adaptive_window.on() {
            return; // what has no effect is refused where values are compared with the defaults
        }
        if self.window.is_some() {
            problem("window", "is in the way of model.adaptive_window.max; take one of them out".into());
        }
        if min == 0 || block == 0 {
            let key = if min == 0 { "adaptive_window.min" } else { "adaptive_window.block" };
            problem(key, "must be at least 1".into());
        } else if max < min || !(max - min).is_multiple_of(block) || u32::try_from(max).is_err() {
            let sum = "must be model.adaptive_window.min plus a multiple of model.adaptive_window.block, below 2^32";
            problem("adaptive_window.max", sum.into());
        }
        if self.num_layers < 2 {
            problem("adaptive_window.kind", "needs two blocks: windows follow the attention of the block below".into());
        }
    }

    fn depth_problems(&self, problem: &mut impl FnMut(&str, String)) {
        let Depths { capacity, every, choice } = self.depths;
        if !(capacity > 0.0 && capacity <= 1.0) {
            problem("depths.capacity", "must be above 0 and at most 1; 1 lets every block take every token".into());
        } else if every == 0 || (self.depths.on() && every > self.num_layers) {
            problem("depths.every", "must be from 1 to model.num_layers, so that some block is routed".into());
        } else if !self.depths.on() && every != Depths::default().every {
            problem("depths.every", "has no effect with model.depths.capacity = 1; set that to 0.5, say".into());
        } else if !self.depths.on() && choice != DepthChoice::default() {
            problem("depths.choice", "has no effect with model.depths.capacity = 1; set that to 0.5, say".into());
        }
    }

    /// Number of parameters for a vocabulary of this size; `None` where it does not fit into 64 bits.
    pub fn num_parameters(&self, vocabulary: usize) -> Option<u64> {
        let size = |number: usize| u64::try_from(number).ok();
        let (d, f, layers) = (size(self.hidden_size)?, size(self.intermediate_size)?, size(self.num_layers)?);
        let (heads, max) = (size(self.num_heads)?, size(self.position.max)?);
        let width = d / heads.max(1);
        let key_value = width.checked_mul(size(self.num_kv_heads)?)?;
        let projections = d.checked_add(key_value)?.checked_mul(d)?.checked_mul(2)?;
        let cope = match self.position.kind {
            PositionKind::Cope => max.checked_add(1)?.checked_mul(width)?,
            _ => 0,
        };
        let mixture = match (size(self.heads.shared)?, size(self.heads.routed)?) {
            (_, 0) => 0,
            (0, routed) => routed.checked_mul(d)?,
            (shared, routed) => shared.checked_add(routed)?.checked_add(2)?.checked_mul(d)?,
        };
        let feed_forward = match self.router.experts() {
            None => f.checked_mul(d)?.checked_mul(3)?,
            Some(e) => {
                let one = size(e.expert_hidden_size)?.checked_mul(3)?.checked_mul(d)?;
                let all = size(e.num_experts)?.checked_add(size(e.shared)?)?.checked_mul(one)?;
                all.checked_add(size(e.num_experts)?.checked_mul(d)?)?
            }
        };
        let block = [projections, cope, mixture, feed_forward, d.checked_mul(2)?];
        let blocks = block.iter().try_fold(0u64, |sum, part| sum.checked_add(*part))?.checked_mul(layers)?;
        let routed = if self.depths.on() { layers / size(self.depths.every)?.max(1) } else { 0 };
        let blocks = blocks.checked_add(routed.checked_mul(d)?)?;
        let tables = if self.tie_word_embeddings { 1 } else { 2 };
        let embeddings = size(vocabulary)?.checked_mul(d)?.checked_mul(tables)?;
        let positions = if self.position.kind == PositionKind::Learned { max.checked_mul(d)? } else { 0 };
        blocks.checked_add(embeddings)?.checked_add(positions)?.checked_add(d)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn keys(change: impl FnOnce(&mut Model)) -> Vec<String> {
        let mut model = Model::default();
        change(&mut model);
        model.problems().into_iter().map(|problem| problem.key).collect()
    }

    #[test]
    fn the_default_is_a_model_of_the_documented_size() {
        let model = Model::default();
        assert_eq!(model.validate(), Ok(()));
        // SwiGLU 98 304, attention 49 152, CoPE 65 × 16, head routers 1 280 (with the split) and two norms a block
        let block = 98_304 + 49_152 + 65 * 16 + 1_280 + 256;
        assert_eq!(model.num_parameters(1000), Some(3 * block + 128 + 2 * 1000 * 128));
    }

    #[test]
    fn learned_positions_and_tied_embeddings_count() {
        let mut model = Model { tie_word_embeddings: true, ..Model::default() };
        model.position = Position { kind: PositionKind::Learned, max: 80 };
        let block = 98_304 + 49_152 + 1_280 + 256;
        assert_eq!(model.num_parameters(10), Some(3 * block + 128 + 10 * 128 + 10_240));
    }

    #[test]
    fn shared_experts_count_and_too_many_of_them_are_refused() {
        let router = |shared: u64| {
            serde_json::from_str(&format!(r#"{{"kind": "top_k", "expert_hidden_size": 5, "shared": {shared}}}"#))
                .unwrap()
        };
        let count = |shared| Model { router: router(shared), ..Model::default() }.num_parameters(10).unwrap();
        assert_eq!(count(2) - count(0), 3 * 2 * 3 * 5 * 128);
        for shared in [1 << 40, u64::MAX] {
            assert_eq!(keys(|m| m.router = router(shared)), ["hidden_size"]);
        }
    }

    #[test]
    fn every_so_many_th_block_is_routed() {
        let depths = Depths { capacity: 0.5, ..Depths::default() };
        assert_eq!((0..5).map(|i| depths.routes(i)).collect::<Vec<_>>(), [false, true, false, true, false]);
        let model = Model { depths, num_layers: 5, ..Model::default() };
        let plain = Model { num_layers: 5, ..Model::default() };
        assert_eq!(model.num_parameters(10).unwrap(), plain.num_parameters(10).unwrap() + 2 * 128);
        assert!((0..5).all(|i| !Depths::default().routes(i)));
    }

    #[test]
    fn each_rule_names_its_key() {
        assert_eq!(keys(|m| m.hidden_size = 130), ["hidden_size"]);
        assert_eq!(keys(|m| m.num_layers = 0), ["num_layers"]);
        assert_eq!(keys(|m| m.intermediate_size = 0), ["intermediate_size"]);
        assert_eq!(keys(|m| m.num_kv_heads = 3), ["num_heads"]);
        assert_eq!(keys(|m| m.num_kv_heads = 0), ["num_kv_heads"]);
        assert_eq!(keys(|m| m.position.max = 0), ["position.max"]);
        assert_eq!(keys(|m| m.window = Some(0)), ["window"]);
        let token = AdaptiveWindow { kind: AdaptiveWindowKind::Token, min: 2, max: 8, block: 3 };
        assert_eq!(keys(|m| m.adaptive_window = token), [""; 0]);
        assert_eq!(keys(|m| m.adaptive_window = AdaptiveWindow { min: 0, ..token }), ["adaptive_window.min"]);
        assert_eq!(keys(|m| m.adaptive_window = AdaptiveWindow { block: 0, ..token }), ["adaptive_window.block"]);
        assert_eq!(keys(|m| m.adaptive_window = AdaptiveWindow { max: 9, ..token }), ["adaptive_window.max"]);
        assert_eq!(keys(|m| m.adaptive_window = AdaptiveWindow { max: 1, ..token }), ["adaptive_window.max"]);
        assert_eq!(keys(|m| (m.adaptive_window, m.window) = (token, Some(9))), ["window"]);
        assert_eq!(keys(|m| (m.adaptive_window, m.num_layers) = (token, 1)), ["adaptive_window.kind"]);
        assert_eq!([0.0, 0.24, 0.26, 0.74, 1.0].map(|breadth| token.keys(breadth)), [2, 2, 5, 5, 8]);
        assert_eq!(keys(|m| m.heads.routed = 5), ["heads.routed"]);
        assert_eq!(keys(|m| m.heads.active = 0), ["heads.active"]);
        assert_eq!(keys(|m| m.heads.active = 7), ["heads.active"]);
        assert_eq!(keys(|m| m.heads = Heads { shared: 0, routed: 0, active: 0 }), [""; 0]);
        for capacity in [0.0, -0.5, 1.01, f64::NAN] {
            assert_eq!(keys(|m| m.depths.capacity = capacity), ["depths.capacity"]);
        }
        assert_eq!(keys(|m| m.depths = Depths { capacity: 0.5, every: 4, ..m.depths }), ["depths.every"]);
        assert_eq!(keys(|m| m.depths = Depths { capacity: 0.5, every: 0, ..m.depths }), ["depths.every"]);
        assert_eq!(keys(|m| m.depths.every = 3), ["depths.every"]);
        assert_eq!(keys(|m| m.depths = Depths { capacity: 0.5, every: 3, ..m.depths }), [""; 0]);
        assert_eq!(keys(|m| m.depths.choice = DepthChoice::Causal), ["depths.choice"]);
        assert_eq!(keys(|m| (m.depths.capacity, m.depths.choice) = (0.5, DepthChoice::Causal)), [""; 0]);
        assert_eq!(keys(|m| m.rms_norm_eps = 0.0), ["rms_norm_eps"]);
        assert_eq!(keys(|m| m.rms_norm_eps = f64::NAN), ["rms_norm_eps"]);
        assert_eq!(keys(|m| (m.hidden_size, m.position.kind) = (8, PositionKind::Rope)), ["hidden_size"]);
        assert_eq!(keys(|m| (m.num_layers, m.window) = (0, Some(0))), ["num_layers", "window"]);
        let one_per_layer = moe_router::Config::TopP {
            p: moe_router::Threshold::PerLayer(vec![0.4, 0.4]),
            bias_rate: 0.0,
            target: None,
            renormalize: false,
            num_experts: 8,
            expert_hidden_size: 64,
            shared: 0,
            frozen: false,
            init_std: 0.1,
        };
        assert_eq!(keys(|m| m.router = one_per_layer.clone()), ["router.p"]);
        assert_eq!(keys(|m| (m.num_layers, m.router) = (2, one_per_layer)), [""; 0]);
    }

    #[test]
    fn sizes_beyond_two_to_the_fortieth_are_refused_without_overflow() {
        assert_eq!(keys(|m| m.hidden_size = 1 << 20), ["hidden_size"]);
        assert_eq!(keys(|m| m.hidden_size = usize::MAX - 7), ["hidden_size"]);
        assert_eq!(keys(|m| m.num_layers = usize::MAX), ["num_layers", "hidden_size"]);
        assert_eq!(keys(|m| m.position.max = usize::MAX), ["hidden_size"]);
    }

    proptest! {
        #[test]
        fn no_sizes_panic(sizes in prop::array::uniform8(prop_oneof![0usize..9, any::<usize>()])) {
            let [hidden_size, num_layers, num_heads, num_kv_heads, intermediate_size, max, shared, routed] = sizes;
            for kind in [PositionKind::Cope, PositionKind::Rope, PositionKind::None, PositionKind::Learned] {
                let (position, heads) = (Position { kind, max }, Heads { shared, routed, active: sizes[0] });
                let model = Model {
                    hidden_size, num_layers, num_heads, num_kv_heads, intermediate_size, position, heads, ..Model::default()
                };
                prop_assert_eq!(model.validate().is_ok(), model.problems().is_empty());
            }
        }
    }
}
