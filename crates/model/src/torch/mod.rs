//! The training pass of the model under libtorch: the page of `transformer` once more, with one graph per block (two around an attention that is
//! recomputed), differentiated by libtorch and walked backwards here, so that the memory of a block is freed when its gradient is known.
//!
//! n tokens, d width, h heads, e experts, v vocabulary. Products multiply in the flat buffer's product type; the residual stream, norms, scores,
//! routing, softmax and losses stay in the type of the parameters.

mod attention;
mod cross_entropy;
mod documents;
mod experts;
mod heads;

use crate::transformer::{Block, Documents, FeedForward, Swiglu, Transformer};
use documents::Ragged;
use experts::Routed;
use moe_router::{Policy, Routing};
use std::sync::Arc;
use tensor::Param;
use tensor::torch::{Flat, Graph, Result, Tensor, integers, leaf, to_vec};

/// Factors of the auxiliary losses, each already divided by the number of layers that have it and scaled by the pass's share of the tokens.
#[derive(Clone, Copy, Debug, Default)]
pub struct Coefficients {
    pub balance: f64,
    pub entropy: f64,
    pub z: f64,
    pub heads: f64,
}

impl Coefficients {
    /// The factor of a loss by its name.
    pub fn of(&self, name: &str) -> f64 {
        match name {
            "balance" => self.balance,
            "entropy" => self.entropy,
            "z" => self.z,
            _ => self.heads,
        }
    }
}

/// What is predicted: ids of n targets, and the part of each in the loss Σ share · cross-entropy.
pub struct Targets<'t> {
    pub ids_n: &'t [u32],
    pub shares_n: &'t [f64],
}

/// What a pass measured.
pub struct Found {
    /// Cross-entropy of every row, nats.
    pub losses_n: Vec<f64>,
    /// (name, layer, unscaled value), in the order of the cpu engine.
    pub auxiliary: Vec<(&'static str, usize, f64)>,
    /// Σ over documents of ‖∂L/∂x‖ at the input of each flat layer.
    pub activation_norms: Vec<f64>,
    pub layers: Vec<RoutedLayer>,
    /// The final norm's output [n, d], still on the device.
    pub hidden_nd: Tensor,
}

/// What the router of a sparse block did.
pub struct RoutedLayer {
    pub layer: usize,
    pub scores_ne: Vec<f32>,
    pub routing: Routing,
}

/// One forward and backward pass: adds the gradient of Σ share · cross-entropy + Σ coefficient · auxiliary to that of `flat`. Everything that was
/// measured crosses from the device in one read at the end.
pub fn pass(
    model: &Transformer,
    flat: &Flat,
    policies: &[Policy],
    documents: &Documents,
    targets: &Targets<'_>,
    coefficients: &Coefficients,
) -> Result<Found> {
    let step = Step { model, flat, policies, coefficients, documents: Ragged::new(documents, flat)? };
    let mut measured = Measured::new(4 * model.blocks.len() + 3);
    let tokens_n = integers(documents.tokens_n.iter().map(|&id| id.into()), flat.device)?;
    let mut x = step.embed(&tokens_n)?;
    let mut blocks = Vec::new();
    for (i, block) in model.blocks.iter().enumerate() {
        let done = step.block(i, block, &x, &mut measured)?;
        x = done.output.f_detach()?;
        blocks.push(done);
    }
    let mut graph = Graph::new(flat);
    let x = leaf(&x)?;
    let hidden_nd = graph.rms_norm(&x, model.norm, model.config.rms_norm_eps)?;
    let hidden = hidden_nd.f_detach()?;
    let (losses_n, dhidden) = cross_entropy::cross_entropy(flat, &hidden, model.output, targets)?;
    measured.losses_n = Some(losses_n);
    let top = 4 * model.blocks.len() + 1;
    measured.norm(top + 1, step.documents.norms(&dhidden)?);
    let mut dx = graph.backward(&[(&hidden_nd, &dhidden)], &[], &[&x])?.remove(0);
    measured.norm(top, step.documents.norms(&dx)?);
    drop((hidden_nd, x));
    while let Some(block) = blocks.pop() {
        let first = 4 * blocks.len() + 1;
        let gradients = block.backward(&step, &dx)?;
        for (place, gradient) in gradients.iter().enumerate() {
            measured.norm(first + place, step.documents.norms(gradient)?);
        }
        dx = gradients.into_iter().next().expect("the gradient of the block's input comes first");
    }
    measured.norm(0, step.documents.norms(&dx)?);
    step.embed_backward(&tokens_n, &dx)?;
    measured.read(policies, hidden)
}

/// What the stations of a pass read.
struct Step<'s> {
    model: &'s Transformer,
    flat: &'s Flat,
    policies: &'s [Policy],
    coefficients: &'s Coefficients,
    documents: Ragged,
}

/// A block that was computed and not yet differentiated.
struct Done<'s> {
    graph: Graph<'s>,
    /// Input, normed input of attention, input of the feed-forward sublayer, its normed input.
    watched: [Tensor; 4],
    output: Tensor,
    /// Weighted auxiliary losses.
    scalars: Vec<Tensor>,
    cut: Option<Cut<'s>>,
}

/// The lower half of a block whose attention is recomputed on the way back: the attended values are a leaf of the upper half.
struct Cut<'s> {
    graph: Graph<'s>,
    input: Tensor,
    normed: Tensor,
    scalars: Vec<Tensor>,
    attention: attention::Recomputed,
    /// Leaves of the upper half, and what they are in the lower.
    attended: Tensor,
    gates: Option<(Tensor, Tensor)>,
}

impl<'s> Step<'s> {
    fn embed(&self, tokens_n: &Tensor) -> Result<Tensor> {
        let table = |p: &Param| Flat::matrix(&self.flat.values, p);
        let x = table(&self.model.embedding)?.f_index_select(0, tokens_n)?;
        match &self.model.positions {
            Some(p) => x.f_add(&table(p)?.f_index_select(0, &self.documents.positions_n)?),
            None => Ok(x),
        }
    }

    fn embed_backward(&self, tokens_n: &Tensor, dx: &Tensor) -> Result<()> {
        let positions = self.model.positions.map(|p| (p, &self.documents.positions_n));
        for (p, ids_n) in positions.into_iter().chain([(self.model.embedding, tokens_n)]) {
            let gradient = Tensor::f_embedding_dense_backward(dx, ids_n, p.rows as i64, -1, false)?;
            let _ = Flat::matrix(&self.flat.grads, &p)?.f_add_(&gradient)?;
        }
        Ok(())
    }

    /// x += attention(norm(x)); x += feed_forward(norm(x)).
    fn block(&self, i: usize, block: &Block, x: &Tensor, measured: &mut Measured) -> Result<Done<'s>> {
        let epsilon = self.model.config.rms_norm_eps;
        let (mut graph, mut scalars) = (Graph::new(self.flat), Vec::new());
        let mut x = leaf(x)?;
        let mut normed = graph.rms_norm(&x, block.attention_norm, epsilon)?;
        let weighted = normed.f_to_kind(self.flat.product())?;
        let q = graph.linear(&weighted, block.query)?;
        let k = graph.linear(&weighted, block.key)?;
        let v = graph.linear(&weighted, block.value)?;
        let mut gates = match &block.heads {
            Some(heads) => {
                let gates = heads::gates(&mut graph, heads, &normed)?;
                measured.auxiliary.push(("heads", i, gates.balance.f_detach()?));
                weigh(&mut scalars, self.coefficients.heads, &gates.balance)?;
                Some(gates.gates_nh)
            }
            None => None,
        };
        let mut attention = attention::Attention::new(self.model, block, &self.documents)?;
        let mut cut = None;
        let mut attended = if attention.must_recompute(self.flat.device) {
            let (y, recomputed) = attention.recomputed(self.flat, &q, &k, &v)?;
            let (y, lower_gates) = (leaf(&y)?, gates.take());
            gates = lower_gates.as_ref().map(leaf).transpose()?;
            let input = x;
            x = leaf(&input)?;
            cut = Some(Cut {
                graph: std::mem::replace(&mut graph, Graph::new(self.flat)),
                input,
                normed: normed.shallow_clone(),
                scalars: std::mem::take(&mut scalars),
                attention: recomputed,
                attended: y.shallow_clone(),
                gates: lower_gates.zip(gates.as_ref().map(Tensor::shallow_clone)),
            });
            y
        } else {
            attention.forward(&mut graph, &q, &k, &v)?
        };
        drop((q, k, v));
        if let Some(gates_nh) = &gates {
            attended = heads::scale(&attended, gates_nh)?;
        }
        let middle = x.f_add(&graph.linear(&attended, block.output)?)?;
        let below = std::mem::replace(&mut normed, graph.rms_norm(&middle, block.feed_forward_norm, epsilon)?);
        let fed = match block.feed_forward {
            FeedForward::Dense(weights) => swiglu(&mut graph, &normed, weights)?,
            FeedForward::Sparse { router, gate_up, down, .. } => {
                let routed = Routed::new(&mut graph, &self.policies[i], &normed, router)?;
                for (name, coefficient, value) in routed.losses(self.coefficients)? {
                    measured.auxiliary.push((name, i, value.f_detach()?));
                    weigh(&mut scalars, coefficient, &value)?;
                }
                let mut y = routed.experts(&mut graph, &normed, gate_up, down)?;
                if let Some(weights) = block.shared {
                    y = y.f_add(&swiglu(&mut graph, &normed, weights)?)?;
                }
                measured.routed.push((i, routed.scores_ne.f_detach()?, routed.chosen_ne));
                y
            }
        };
        let output = middle.f_add(&fed)?;
        Ok(Done { graph, watched: [x, below, middle, normed], output, scalars, cut })
    }
}

/// W_down (silu(W_gate x) * W_up x).
fn swiglu(graph: &mut Graph<'_>, x: &Tensor, weights: Swiglu) -> Result<Tensor> {
    let x = x.f_to_kind(graph.flat().product())?;
    let hidden = graph.linear(&x, weights.gate)?.f_silu()?.f_mul(&graph.linear(&x, weights.up)?)?;
    graph.linear(&hidden, weights.down)
}

/// Adds coefficient · value to the losses of a block; a loss without weight is measured and not differentiated.
fn weigh(scalars: &mut Vec<Tensor>, coefficient: f64, value: &Tensor) -> Result<()> {
    if coefficient != 0.0 {
        scalars.push(value.f_mul_scalar(coefficient)?);
    }
    Ok(())
}

impl Done<'_> {
    /// Gradients at the four watched places from the gradient of the output.
    fn backward(self, step: &Step<'_>, dy: &Tensor) -> Result<Vec<Tensor>> {
        let [x, below, middle, normed] = &self.watched;
        let seeds = [(&self.output, dy)];
        let Some(cut) = self.cut else {
            return self.graph.backward(&seeds, &self.scalars, &[x, below, middle, normed]);
        };
        let mut watched = vec![x, middle, normed, &cut.attended];
        watched.extend(cut.gates.iter().map(|(_, leaf)| leaf));
        let mut found = self.graph.backward(&seeds, &self.scalars, &watched)?.into_iter();
        let mut next = || found.next().expect("one gradient for each watched tensor");
        let (dx, dmiddle, dnormed, dattended) = (next(), next(), next(), next());
        let [dq, dk, dv] = cut.attention.backward(step.flat, &dattended)?;
        let dgates = cut.gates.as_ref().map(|_| next());
        let [q, k, v] = &cut.attention.inputs;
        let mut seeds = vec![(q, &dq), (k, &dk), (v, &dv)];
        seeds.extend(cut.gates.as_ref().map(|(gates, _)| gates).zip(dgates.as_ref()));
        let mut lower = cut.graph.backward(&seeds, &cut.scalars, &[&cut.input, &cut.normed])?;
        let dbelow = lower.remove(1);
        Ok(vec![dx.f_add(&lower[0])?, dbelow, dmiddle, dnormed])
    }
}

/// What a pass measures, on the device until `read`.
struct Measured {
    losses_n: Option<Tensor>,
    auxiliary: Vec<(&'static str, usize, Tensor)>,
    norms: Vec<Option<Tensor>>,
    routed: Vec<(usize, Tensor, Tensor)>,
}

impl Measured {
    fn new(flat_layers: usize) -> Self {
        Measured {
            losses_n: None,
            auxiliary: Vec::new(),
            norms: (0..flat_layers).map(|_| None).collect(),
            routed: Vec::new(),
        }
    }

    fn norm(&mut self, flat_layer: usize, norm: Tensor) {
        self.norms[flat_layer] = Some(norm);
    }

    fn read(mut self, policies: &[Policy], hidden_nd: Tensor) -> Result<Found> {
        let n = hidden_nd.size()[0] as usize;
        // The cpu engine tells the losses of the experts before those of the heads.
        self.auxiliary.sort_by_key(|(name, ..)| *name == "heads");
        let scalars = self.auxiliary.iter().map(|(_, _, value)| value).chain(self.norms.iter().flatten());
        let arrays = self.losses_n.iter().chain(self.routed.iter().flat_map(|(_, scores, chosen)| [scores, chosen]));
        let parts = scalars.chain(arrays).map(|x| x.f_reshape([-1])?.f_to_kind(tensor::torch::Kind::Double));
        let numbers: Vec<f64> = to_vec(&Tensor::f_cat(&parts.collect::<Result<Vec<Tensor>>>()?, 0)?)?;
        let mut rest = &numbers[..];
        let mut take = |count: usize| {
            let (taken, left) = rest.split_at(count);
            rest = left;
            taken
        };
        let auxiliary: Vec<_> = self.auxiliary.iter().map(|&(name, layer, _)| (name, layer, take(1)[0])).collect();
        let activation_norms = self.norms.iter().map(|norm| if norm.is_some() { take(1)[0] } else { 0.0 }).collect();
        let losses_n = take(n).to_vec();
        let layers = self.routed.iter().map(|&(layer, ..)| {
            let e = policies[layer].num_experts();
            let scores_ne = take(n * e).iter().map(|s| *s as f32).collect();
            RoutedLayer { layer, scores_ne, routing: routing(take(n * e), e) }
        });
        Ok(Found { auxiliary, activation_norms, losses_n, layers: layers.collect(), hidden_nd })
    }
}

/// The choice [n, e] as rows of ids.
fn routing(chosen_ne: &[f64], e: usize) -> Routing {
    let mut assignments = moe_router::Assignments { row_offsets_n1: vec![0], expert_ids_a: Vec::new(), num_experts: e };
    for row in chosen_ne.chunks(e) {
        assignments.expert_ids_a.extend((0..e as u32).filter(|&id| row[id as usize] != 0.0));
        assignments.row_offsets_n1.push(assignments.expert_ids_a.len());
    }
    Routing { assignments: Arc::new(assignments), num_ids: e }
}
