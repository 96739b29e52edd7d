//! One block: x += attention(norm(x)); x += feed_forward(norm(x)). It owns what it needs to run, so that the walk back can run it again.

use crate::transformer::{Documents, Watch};
use moe_router::{Mode, Policy, RouterInput, Routing, node};
use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;
use tensor::ops::attention::{Attention, Mixture, Position, attention, decode};
use tensor::ops::{
    combine::add,
    experts::experts,
    linear::{linear, linears},
    rms_norm::rms_norm,
    swiglu::swiglu,
};
use tensor::{Param, Precision, Real, Tape, Value};

#[derive(Clone)]
pub(crate) struct Heads {
    pub(crate) shared: Option<Param>,
    pub(crate) routed: Param,
    pub(crate) split: Option<Param>,
    pub(crate) active: usize,
}

#[derive(Clone)]
pub(crate) enum FeedForward {
    Dense { gate: Param, up: Param, down: Param },
    Sparse { router: Param, threshold: Option<(Param, Param)>, gate_up: Param, down: Param },
}

#[derive(Clone)]
pub(crate) struct Block {
    pub(crate) index: usize,
    /// Added to the mean square inside its norms.
    pub(crate) epsilon: f64,
    pub(crate) attention_norm: Param,
    pub(crate) query: Param,
    pub(crate) key: Param,
    pub(crate) value: Param,
    pub(crate) output: Param,
    pub(crate) spec: Attention,
    pub(crate) heads: Option<Heads>,
    pub(crate) feed_forward_norm: Param,
    pub(crate) feed_forward: FeedForward,
}

/// Keys and values of one layer for decoding, one row per past token.
#[derive(Clone, Debug)]
pub struct LayerCache<T> {
    keys: Vec<T>,
    values: Vec<T>,
}

impl<T> Default for LayerCache<T> {
    fn default() -> Self {
        LayerCache { keys: Vec::new(), values: Vec::new() }
    }
}

impl<T> LayerCache<T> {
    /// Past tokens.
    pub(crate) fn past(&self, block: &Block) -> usize {
        self.keys.len() / block.key.rows
    }
}

/// What a sparse layer decided, for losses and statistics.
#[derive(Clone, Debug)]
pub struct ExpertTrace<T: Real> {
    pub layer: usize,
    pub scores_ne: Value<T>,
    pub weights_a: Value<T>,
    /// Mean over tokens of the sum of soft gates, [1, 1], where the threshold is learned.
    pub gates: Option<Value<T>>,
    pub routing: Arc<Routing>,
}

/// What the mixture of heads of a layer decided.
#[derive(Clone, Debug)]
pub struct HeadTrace<T: Real> {
    pub layer: usize,
    pub routed_nh: Value<T>,
    pub selection: Arc<moe_router::heads::Selection>,
}

/// What one block decided.
pub(crate) struct Trace<T: Real> {
    pub(crate) experts: Option<ExpertTrace<T>>,
    pub(crate) heads: Option<HeadTrace<T>>,
}

impl<T: Real> Trace<T> {
    /// The values that losses differentiate, in a fixed order.
    fn values(&mut self) -> Vec<&mut Value<T>> {
        let mut values = Vec::new();
        if let Some(experts) = &mut self.experts {
            values.extend([&mut experts.scores_ne, &mut experts.weights_a]);
            values.extend(&mut experts.gates);
        }
        values.extend(self.heads.as_mut().map(|heads| &mut heads.routed_nh));
        values
    }
}

/// What every block of a forward pass reads.
#[derive(Clone)]
pub(crate) struct Pass<'a, T: Real> {
    pub(crate) documents: Documents,
    pub(crate) mode: Mode,
    pub(crate) watch: Watch<'a, T>,
}

impl Block {
    /// As `run` over whole documents, but nothing inside is kept: the walk back runs the block a second time. Its decisions leave it as values of the
    /// tape, so that losses on them reach the replay; routing is a pure function of its scores and comes out the same.
    pub(crate) fn replayed<'a, T: Real>(
        &self,
        tape: &mut Tape<'a, T>,
        x: &Value<T>,
        pass: &Pass<'a, T>,
        policy: Option<&Policy>,
    ) -> (Value<T>, Trace<T>) {
        let (block, pass, policy) = (self.clone(), pass.clone(), policy.cloned());
        let decided = Rc::new(RefCell::new(None));
        let first = decided.clone();
        let mut outputs = tape.checkpoint(&[x], move |tape, inputs| {
            let (y, mut trace) = block.run(tape, &inputs[0], &pass, policy.as_ref(), None);
            let mut outputs = vec![y];
            outputs.extend(trace.values().into_iter().map(|value| value.clone()));
            if !tape.recording() {
                *first.borrow_mut() = Some(trace);
            }
            outputs
        });
        let mut trace: Trace<T> = decided.take().expect("a block runs when it is put on the tape");
        trace.values().into_iter().zip(outputs.drain(1..)).for_each(|(value, output)| *value = output);
        (outputs.remove(0), trace)
    }

    /// The stream behind the block. With a cache `x` holds the next tokens of its document.
    pub(crate) fn run<'a, T: Real>(
        &self,
        tape: &mut Tape<'a, T>,
        x: &Value<T>,
        pass: &Pass<'a, T>,
        policy: Option<&Policy>,
        cache: Option<&mut LayerCache<T>>,
    ) -> (Value<T>, Trace<T>) {
        let first = 4 * self.index + 1;
        (pass.watch)(tape, first, x);
        let normed = rms_norm(tape, x, self.attention_norm, self.epsilon);
        (pass.watch)(tape, first + 1, &normed);
        let start = cache.as_ref().map_or(0, |cache| cache.past(self)); // attention adds to it
        let (attended, heads) = self.attention(tape, &normed, &pass.documents, cache);
        let x = add(tape, x, &attended);
        (pass.watch)(tape, first + 2, &x);
        let normed = rms_norm(tape, &x, self.feed_forward_norm, self.epsilon);
        (pass.watch)(tape, first + 3, &normed);
        let input =
            RouterInput::new(&pass.documents.offsets_b1, &pass.documents.tokens_n, self.index).starting_at(start);
        let (fed, experts) = self.feed_forward(tape, &normed, &input, policy, pass.mode);
        (add(tape, &x, &fed), Trace { experts, heads })
    }

    fn feed_forward<'a, T: Real>(
        &self,
        tape: &mut Tape<'a, T>,
        x: &Value<T>,
        input: &RouterInput<'_, T>,
        policy: Option<&Policy>,
        mode: Mode,
    ) -> (Value<T>, Option<ExpertTrace<T>>) {
        let (router, threshold, gate_up, down) = match self.feed_forward {
            FeedForward::Dense { gate, up, down } => return (swiglu(tape, x, gate, up, down), None),
            FeedForward::Sparse { router, threshold, gate_up, down } => (router, threshold, gate_up, down),
        };
        let policy = policy.expect("a sparse block has a policy");
        let mut routers = vec![(router, Precision::F32)];
        routers.extend(threshold.map(|(weight, _)| (weight, Precision::F32)));
        let mut scored = linears(tape, x, &routers);
        let (scores_ne, logits_n1) = (scored.remove(0), scored.pop());
        let (weights_a, gates, routing) = match (threshold.zip(logits_n1), policy) {
            (Some(((_, bias), logits_n1)), Policy::LearnedP(policy)) => {
                let (weights_a, gates, routing) =
                    node::route_learned(tape, [&scores_ne, &logits_n1], bias, policy, input);
                (weights_a, Some(gates), routing)
            }
            (_, policy) => {
                let (weights_a, routing) = node::route(tape, &scores_ne, policy, input, mode);
                (weights_a, None, routing)
            }
        };
        let y = experts(tape, x, &weights_a, &routing.assignments, gate_up, down);
        (y, Some(ExpertTrace { layer: self.index, scores_ne, weights_a, gates, routing }))
    }

    /// Causal attention of the normed stream; with a mixture of heads every head's output is multiplied by its gate, and heads that a token did not
    /// choose are not computed.
    fn attention<'a, T: Real>(
        &self,
        tape: &mut Tape<'a, T>,
        x: &Value<T>,
        documents: &Documents,
        cache: Option<&mut LayerCache<T>>,
    ) -> (Value<T>, Option<HeadTrace<T>>) {
        // All products of the normed stream at once. Scores of heads take f32 in every precision, as those of routers do.
        let precision = tape.precision();
        let mut weights = [self.query, self.key, self.value].map(|weight| (weight, precision)).to_vec();
        if let Some(heads) = &self.heads {
            let scores = [Some(heads.routed), heads.shared, heads.split];
            weights.extend(scores.into_iter().flatten().map(|weight| (weight, Precision::F32)));
        }
        let mut products = linears(tape, x, &weights).into_iter();
        let mut next = || products.next().expect("one product per weight");
        let [q, k, v] = [next(), next(), next()];
        let gated = self.heads.as_ref().map(|heads| {
            let routed_nh = next();
            let [shared, split] = [heads.shared, heads.split].map(|weight| weight.map(|_| next()));
            let (gates_nh, selection) =
                node::head_gates(tape, shared.as_ref(), &routed_nh, split.as_ref(), heads.active);
            (gates_nh, HeadTrace { layer: self.index, routed_nh, selection })
        });
        let mixture = gated.as_ref().map(|(gates_nh, HeadTrace { selection, .. })| Mixture {
            gates_nh,
            shared: selection.shared,
            routed: selection.routing.assignments.clone(),
        });
        let o = match cache {
            None => attention(tape, [&q, &k, &v], &documents.offsets_b1, self.spec, mixture),
            Some(cache) => {
                cache.keys.extend_from_slice(k.data());
                cache.values.extend_from_slice(v.data());
                let table: &[T] = match self.spec.position {
                    Position::Cope { table } => &tape.param(&table)[..table.len()],
                    _ => &[],
                };
                let (m, t) = (q.rows(), cache.past(self));
                let rows = decode([q.data(), &cache.keys, &cache.values], (m, t), self.spec, mixture, table);
                tape.constant(&rows, m, q.width())
            }
        };
        (linear(tape, &o, self.output), gated.map(|(_, trace)| trace))
    }
}
