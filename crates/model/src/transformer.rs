//! The transformer on one page: parameters, initialisation, embedding -> blocks (block.rs) -> final norm. Pre-LN, RMSNorm, SwiGLU or sparse experts,
//! contextual (CoPE), rotary, learned or no positions, grouped queries, mixture of heads, window.
//!
//! n tokens of all documents of a batch one after the other (ragged, no padding), d width, h heads, e experts, v vocabulary.

use crate::block::Pass;
pub(crate) use crate::block::{Block, Depth, FeedForward, Heads, Swiglu};
pub use crate::block::{DepthTrace, ExpertTrace, HeadTrace, LayerCache, WindowTrace};
use crate::config::{Model, PositionKind};
pub use crate::input::{Documents, Watch, unwatched};
use moe_router::{Mode, Policy};
use tensor::kernels::{memory, parallel};
use tensor::ops::attention::{Attention, Position};
use tensor::ops::{combine::add, embedding::embedding, rms_norm::rms_norm};
use tensor::random::Purpose;
use tensor::{Layout, Param, Random, Real, Tape, Value};

/// Standard deviation of the mixture-of-heads routers at the start: logits near zero, all heads nearly alike.
const HEAD_ROUTER_STD: f64 = 0.02;
const ROPE_BASE: f64 = 10_000.0;

/// What attention looks back on: the documents of the batch, or one growing document.
pub enum Context<'c, T> {
    Documents,
    Cache(&'c mut [LayerCache<T>]),
}

/// Result of a forward pass: the final norm's output (logits are `linear` of it with `Transformer::output`) and every routing decision.
pub struct Output<T: Real> {
    pub hidden_nd: Value<T>,
    pub experts: Vec<ExpertTrace<T>>,
    pub heads: Vec<HeadTrace<T>>,
    pub depths: Vec<DepthTrace<T>>,
    pub windows: Vec<WindowTrace>,
}

/// The architecture over a parameter layout; holds no numbers.
pub struct Transformer {
    pub config: Model,
    pub vocab_size: usize,
    pub layout: Layout,
    pub(crate) embedding: Param,
    pub(crate) positions: Option<Param>,
    pub(crate) blocks: Vec<Block>,
    pub(crate) norm: Param,
    pub output: Param,
}

/// Name, shape and trainability of every tensor.
fn tensors(config: &Model, vocab_size: usize) -> Vec<(String, Vec<usize>, bool)> {
    let (d, f) = (config.hidden_size, config.intermediate_size);
    let width = d / config.num_heads;
    let (q, kv) = (config.num_heads * width, config.num_kv_heads * width);
    let mut list = vec![("model.embed_tokens.weight".to_string(), vec![vocab_size, d], true)];
    let mut tensor = |name: String, shape: &[usize], trainable: bool| list.push((name, shape.to_vec(), trainable));
    if config.position.kind == PositionKind::Learned {
        tensor("model.embed_positions.weight".into(), &[config.position.max, d], true);
    }
    for i in 0..config.num_layers {
        let layer = |part: &str| format!("model.layers.{i}.{part}");
        if config.depths.routes(i) {
            tensor(layer("depths.weight"), &[1, d], true);
        }
        tensor(layer("input_layernorm.weight"), &[d], true);
        tensor(layer("self_attn.q_proj.weight"), &[q, d], true);
        tensor(layer("self_attn.k_proj.weight"), &[kv, d], true);
        tensor(layer("self_attn.v_proj.weight"), &[kv, d], true);
        tensor(layer("self_attn.o_proj.weight"), &[d, q], true);
        if config.position.kind == PositionKind::Cope {
            tensor(layer("self_attn.cope.weight"), &[config.position.max + 1, width], true);
        }
        if config.heads.routed > 0 {
            tensor(layer("self_attn.heads.routed.weight"), &[config.heads.routed, d], true);
            if config.heads.shared > 0 {
                tensor(layer("self_attn.heads.shared.weight"), &[config.heads.shared, d], true);
                tensor(layer("self_attn.heads.split.weight"), &[2, d], true);
            }
        }
        tensor(layer("post_attention_layernorm.weight"), &[d], true);
        match config.router.experts() {
            None => swiglu(d, f).for_each(|(part, shape)| tensor(layer(&format!("mlp.{part}")), &shape, true)),
            Some(e) => {
                tensor(layer("mlp.gate.weight"), &[e.num_experts, d], !e.frozen);
                if matches!(config.router, moe_router::Config::LearnedP { .. }) {
                    tensor(layer("mlp.threshold.weight"), &[1, d], true);
                    tensor(layer("mlp.threshold.bias"), &[1], true);
                }
                tensor(layer("mlp.experts.gate_up_proj"), &[e.num_experts, 2 * e.expert_hidden_size, d], true);
                tensor(layer("mlp.experts.down_proj"), &[e.num_experts, d, e.expert_hidden_size], true);
                if e.shared > 0 {
                    let shared = swiglu(d, e.shared_width());
                    shared.for_each(|(part, shape)| tensor(layer(&format!("mlp.shared_experts.{part}")), &shape, true));
                }
            }
        }
    }
    tensor("model.norm.weight".into(), &[d], true);
    if !config.tie_word_embeddings {
        tensor("lm_head.weight".into(), &[vocab_size, d], true);
    }
    list
}

/// Names and shapes of a SwiGLU of hidden width f. As in DeepSeek's files, all shared experts of a layer are one of these.
fn swiglu(d: usize, f: usize) -> impl Iterator<Item = (&'static str, [usize; 2])> {
    [("gate_proj.weight", [f, d]), ("up_proj.weight", [f, d]), ("down_proj.weight", [d, f])].into_iter()
}

/// The numbers that the model runs on. Its passes are compiled here, once for each, and not again in every crate that calls them.
pub trait Forward: Real {
    #[doc(hidden)]
    fn forward<'a>(
        model: &Transformer,
        tape: &mut Tape<'a, Self>,
        documents: &Documents,
        policies: &[Policy],
        mode: Mode,
        context: Context<'_, Self>,
        watch: Watch<'a, Self>,
    ) -> Output<Self>;
}

macro_rules! forward {
    ($t:ty) => {
        impl Forward for $t {
            fn forward<'a>(
                model: &Transformer,
                tape: &mut Tape<'a, Self>,
                documents: &Documents,
                policies: &[Policy],
                mode: Mode,
                context: Context<'_, Self>,
                watch: Watch<'a, Self>,
            ) -> Output<Self> {
                model.run(tape, documents, policies, mode, context, watch)
            }
        }
    };
}

forward!(f32);
forward!(f64);

impl Transformer {
    /// `config` must have been validated.
    pub fn new(config: &Model, vocab_size: usize) -> Self {
        let layout = Layout::new(tensors(config, vocab_size));
        let get = |name: &str| layout.get(name).expect("`tensors` lists every parameter of the page");
        let block = |i: usize| {
            let layer = |part: &str| get(&format!("model.layers.{i}.{part}"));
            let swiglu = |part: &str| Swiglu {
                gate: layer(&format!("{part}.gate_proj.weight")),
                up: layer(&format!("{part}.up_proj.weight")),
                down: layer(&format!("{part}.down_proj.weight")),
            };
            Block {
                index: i,
                epsilon: config.rms_norm_eps,
                windows: config.adaptive_window.on().then_some(config.adaptive_window),
                depth: layout.get(&format!("model.layers.{i}.depths.weight")).map(|router| Depth {
                    router,
                    capacity: config.depths.capacity,
                    choice: config.depths.choice,
                }),
                attention_norm: layer("input_layernorm.weight"),
                query: layer("self_attn.q_proj.weight"),
                key: layer("self_attn.k_proj.weight"),
                value: layer("self_attn.v_proj.weight"),
                output: layer("self_attn.o_proj.weight"),
                spec: Attention {
                    heads: config.num_heads,
                    kv_heads: config.num_kv_heads,
                    window: config.widest_window(),
                    position: match config.position.kind {
                        PositionKind::Cope => Position::Cope { table: layer("self_attn.cope.weight") },
                        PositionKind::Rope => Position::Rope { base: ROPE_BASE },
                        PositionKind::None | PositionKind::Learned => Position::None,
                    },
                },
                heads: (config.heads.routed > 0).then(|| Heads {
                    shared: (config.heads.shared > 0).then(|| layer("self_attn.heads.shared.weight")),
                    routed: layer("self_attn.heads.routed.weight"),
                    split: (config.heads.shared > 0).then(|| layer("self_attn.heads.split.weight")),
                    active: config.heads.active,
                }),
                feed_forward_norm: layer("post_attention_layernorm.weight"),
                feed_forward: match config.router.experts() {
                    None => FeedForward::Dense(swiglu("mlp")),
                    Some(_) => FeedForward::Sparse {
                        router: layer("mlp.gate.weight"),
                        threshold: layout
                            .get(&format!("model.layers.{i}.mlp.threshold.weight"))
                            .map(|weight| (weight, layer("mlp.threshold.bias"))),
                        gate_up: layer("mlp.experts.gate_up_proj"),
                        down: layer("mlp.experts.down_proj"),
                    },
                },
                shared: config
                    .router
                    .experts()
                    .filter(|experts| experts.shared > 0)
                    .map(|_| swiglu("mlp.shared_experts")),
            }
        };
        let embedding = get("model.embed_tokens.weight");
        Transformer {
            config: config.clone(),
            vocab_size,
            embedding,
            positions: layout.get("model.embed_positions.weight"),
            blocks: (0..config.num_layers).map(block).collect(),
            norm: get("model.norm.weight"),
            output: layout.get("lm_head.weight").unwrap_or(embedding),
            layout,
        }
    }

    /// Fresh parameters, a pure function of the seed: N(0, 2/fan_in) for weights, std 1/√d for embeddings, norms 1, CoPE tables and thresholds 0, routers small.
    /// Every tensor has a stream of its own (keyed by its name), so that models which share a tensor start with the same bytes in it.
    pub fn initialise(&self, seed: u64) -> Vec<f32> {
        let mut params = memory::zeros(self.layout.len());
        let random = Random::new(seed, Purpose::Init);
        for (name, param) in self.layout.iter() {
            let (std, stream) = (self.initial_std(name, param), stream(name));
            for m in 0..param.count {
                let number = |j: usize| match std {
                    None => 1.0,
                    Some(std) => (std * random.normal(stream, (m * param.len() + j) as u64)) as f32,
                };
                parallel::rows(&mut params[param.range(m)], 1, |j, x| x[0] = number(j));
            }
        }
        params
    }

    /// Standard deviation of a fresh tensor; `None` for norm gains, which start at one.
    fn initial_std(&self, name: &str, param: Param) -> Option<f64> {
        match name {
            _ if name.ends_with("norm.weight") => None,
            _ if name.starts_with("model.embed_") => Some((self.config.hidden_size as f64).powf(-0.5)),
            _ if name.ends_with("cope.weight") || name.contains("mlp.threshold.") => Some(0.0),
            _ if name.contains("self_attn.heads.") => Some(HEAD_ROUTER_STD),
            _ if name.ends_with("mlp.gate.weight") => self.config.router.experts().map(|e| e.init_std),
            _ => Some((2.0 / param.width as f64).sqrt()),
        }
    }

    /// The routing policies of the sparse layers, one per block; empty for a dense model.
    pub fn policies(&self) -> Vec<Policy> {
        (0..self.config.num_layers).filter_map(|i| Policy::new(&self.config.router, i)).collect()
    }

    /// Parameters that one token uses on average when `experts_per_token` routed experts are active in each sparse layer; shared ones always are.
    pub fn active_params(&self, experts_per_token: f64) -> f64 {
        let dense =
            self.layout.iter().filter(|(name, _)| !name.contains(".experts.")).map(|(_, p)| p.len()).sum::<usize>();
        let expert =
            self.layout.iter().filter(|(name, _)| name.contains(".experts.")).map(|(_, p)| p.len()).sum::<usize>();
        dense as f64 + expert as f64 * experts_per_token
    }

    /// Empty caches for decoding one document.
    pub fn empty_cache<T: Real>(&self) -> Vec<LayerCache<T>> {
        (0..self.blocks.len()).map(|_| LayerCache::default()).collect()
    }

    /// Embeds, runs the blocks and the final norm. Token ids must lie below `vocab_size`, positions below `position.max` for learned ones
    /// (checked where data enters). With `Context::Cache`, `documents` holds the next tokens of the one cached document. On a tape with
    /// activation checkpointing every block is replayed on the walk back.
    pub fn forward<'a, T: Forward>(
        &self,
        tape: &mut Tape<'a, T>,
        documents: &Documents,
        policies: &[Policy],
        mode: Mode,
        context: Context<'_, T>,
        watch: Watch<'a, T>,
    ) -> Output<T> {
        T::forward(self, tape, documents, policies, mode, context, watch)
    }

    fn run<'a, T: Real>(
        &self,
        tape: &mut Tape<'a, T>,
        documents: &Documents,
        policies: &[Policy],
        mode: Mode,
        mut context: Context<'_, T>,
        watch: Watch<'a, T>,
    ) -> Output<T> {
        let mut x = embedding(tape, &documents.tokens_n, self.embedding);
        if let Some(table) = self.positions {
            let past = match &context {
                Context::Documents => 0,
                Context::Cache(layers) => layers[0].past,
            };
            let ids: Vec<u32> = documents.positions().into_iter().map(|p| p + past as u32).collect();
            let positions = embedding(tape, &ids.into(), table);
            x = add(tape, &x, &positions);
        }
        let offsets_b1 = &documents.offsets_b1;
        watch(tape, 0, &x, offsets_b1);
        let mut pass = Pass { documents: documents.clone(), mode, watch, breadth_n: None };
        let mut output =
            Output { hidden_nd: x, experts: Vec::new(), heads: Vec::new(), depths: Vec::new(), windows: Vec::new() };
        for (i, block) in self.blocks.iter().enumerate() {
            let (x, policy) = (&output.hidden_nd, policies.get(i));
            let (y, trace) = match &mut context {
                Context::Documents if tape.checkpoints() => block.replayed(tape, x, &pass, policy),
                Context::Documents => block.run(tape, x, &pass, policy, None),
                Context::Cache(layers) => block.run(tape, x, &pass, policy, Some(&mut layers[i])),
            };
            output.hidden_nd = y;
            output.experts.extend(trace.experts);
            output.heads.extend(trace.heads);
            output.depths.extend(trace.depths);
            output.windows.extend(trace.windows);
            pass.breadth_n = trace.breadth_n;
        }
        (pass.watch)(tape, 4 * self.blocks.len() + 1, &output.hidden_nd, offsets_b1);
        output.hidden_nd = rms_norm(tape, &output.hidden_nd, self.norm, self.config.rms_norm_eps);
        (pass.watch)(tape, 4 * self.blocks.len() + 2, &output.hidden_nd, offsets_b1);
        output
    }
}

/// The random stream of a tensor (FNV-1a of its name).
fn stream(name: &str) -> u64 {
    u64::from(name.bytes().fold(0x811c_9dc5u32, |hash, byte| (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193)))
}
