//! One block: x += attention(norm(x)); x += feed_forward(norm(x)). It owns what it needs to run, so that the walk back can run it again. A routed
//! block (mixture of depths) takes some tokens only: x += r · (both sublayers of the taken ones), r their score, which is how it learns.

use crate::config::{AdaptiveWindow, DepthChoice};
use crate::input::{Documents, Watch};
use moe_router::depths::{self, Selection};
use moe_router::{Mode, Policy, RouterInput, Routing, node};
use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;
use tensor::ops::attention::{Attention, Mixture, Position, attention, attention_within, decode, decode_within};
use tensor::ops::{
    combine::add,
    experts::experts,
    gather::{gather, scatter},
    linear::{linear, linears},
    rms_norm::rms_norm,
    rope::rope,
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

/// What every token goes through: a dense feed-forward, or all shared experts in one.
#[derive(Clone, Copy)]
pub(crate) struct Swiglu {
    pub(crate) gate: Param,
    pub(crate) up: Param,
    pub(crate) down: Param,
}

impl Swiglu {
    fn run<'a, T: Real>(&self, tape: &mut Tape<'a, T>, x: &Value<T>) -> Value<T> {
        swiglu(tape, x, self.gate, self.up, self.down)
    }
}

#[derive(Clone)]
pub(crate) enum FeedForward {
    Dense(Swiglu),
    Sparse { router: Param, threshold: Option<(Param, Param)>, gate_up: Param, down: Param },
}

/// How a routed block chooses its tokens.
#[derive(Clone)]
pub(crate) struct Depth {
    pub(crate) router: Param,
    pub(crate) capacity: f64,
    pub(crate) choice: DepthChoice,
}

#[derive(Clone)]
pub(crate) struct Block {
    pub(crate) index: usize,
    pub(crate) depth: Option<Depth>,
    /// Added to the mean square inside its norms.
    pub(crate) epsilon: f64,
    pub(crate) attention_norm: Param,
    pub(crate) query: Param,
    pub(crate) key: Param,
    pub(crate) value: Param,
    pub(crate) output: Param,
    pub(crate) spec: Attention,
    /// How windows of their own for tokens follow from the block below.
    pub(crate) windows: Option<AdaptiveWindow>,
    pub(crate) heads: Option<Heads>,
    pub(crate) feed_forward_norm: Param,
    pub(crate) feed_forward: FeedForward,
    /// The shared experts of a sparse block, all in one.
    pub(crate) shared: Option<Swiglu>,
}

/// Keys and values of one layer for decoding, one row per past token that the layer took.
#[derive(Clone, Debug)]
pub struct LayerCache<T> {
    keys: Vec<T>,
    values: Vec<T>,
    /// Past tokens, taken or not, and how many of them came before the newest.
    pub(crate) past: usize,
    before: usize,
}

impl<T> Default for LayerCache<T> {
    fn default() -> Self {
        LayerCache { keys: Vec::new(), values: Vec::new(), past: 0, before: 0 }
    }
}

impl<T> LayerCache<T> {
    /// Counts further tokens, taken or not; returns how many came before them.
    fn go_on(&mut self, tokens: usize) -> usize {
        self.before = self.past;
        self.past += tokens;
        self.before
    }

    /// Numbers of the keys, which are as many as those of the values.
    pub fn numbers(&self) -> usize {
        self.keys.len()
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
    /// The tokens it was given: all of the batch, or those that a routed block took.
    pub documents: Documents,
    pub taken: Option<Arc<Selection>>,
}

impl<T: Real> ExpertTrace<T> {
    /// The row of the batch's token t in scores and routing; none if the block did not take it.
    pub fn row(&self, t: usize) -> Option<usize> {
        self.taken.as_ref().map_or(Some(t), |taken| taken.row(t))
    }
}

/// What the mixture of heads of a layer decided.
#[derive(Clone, Debug)]
pub struct HeadTrace<T: Real> {
    pub layer: usize,
    pub routed_nh: Value<T>,
    pub selection: Arc<moe_router::heads::Selection>,
}

/// Which tokens a routed block took, and the scores [n, 1] that said so.
#[derive(Clone, Debug)]
pub struct DepthTrace<T: Real> {
    pub layer: usize,
    pub scores_n1: Value<T>,
    pub selection: Arc<Selection>,
    /// What the scores are taught to say in training: the best of each document.
    pub target: Arc<Selection>,
}

/// The windows of the tokens of a block, or of those that it took.
#[derive(Clone, Debug)]
pub struct WindowTrace {
    pub layer: usize,
    pub windows_n: Arc<[u32]>,
    pub offsets_b1: Arc<[usize]>,
}

impl WindowTrace {
    /// Mean window, and the share of earlier keys (the token itself counts among them) that windows hide.
    pub fn mean_and_masked(&self) -> (f64, f64) {
        let (mut sum, mut hidden, mut all) = (0.0, 0.0, 0.0);
        for document in self.offsets_b1.windows(2) {
            for (i, &window) in self.windows_n[document[0]..document[1]].iter().enumerate() {
                sum += f64::from(window);
                hidden += (i + 1).saturating_sub(window as usize) as f64;
                all += (i + 1) as f64;
            }
        }
        (sum / self.windows_n.len().max(1) as f64, hidden / f64::max(all, 1.0))
    }
}

/// What one block decided.
pub(crate) struct Trace<T: Real> {
    pub(crate) windows: Option<WindowTrace>,
    /// How broadly every token of the batch attended, for the windows of the block above.
    pub(crate) breadth_n: Option<Arc<[f64]>>,
    pub(crate) depths: Option<DepthTrace<T>>,
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
        values.extend(self.depths.as_mut().map(|depths| &mut depths.scores_n1));
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
    /// How broadly every token attended in the block below.
    pub(crate) breadth_n: Option<Arc<[f64]>>,
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
        mut cache: Option<&mut LayerCache<T>>,
    ) -> (Value<T>, Trace<T>) {
        (pass.watch)(tape, 4 * self.index + 1, x, &pass.documents.offsets_b1);
        let past = cache.as_deref_mut().map_or(0, |cache| cache.go_on(x.rows()));
        let Some(depth) = &self.depth else {
            let (_, middle, fed, trace) = self.sublayers(tape, x, pass, policy, cache, None);
            return (add(tape, &middle, &fed), trace);
        };
        let (taken, trace) = depth.choose(tape, x, pass, self.index);
        let selection = trace.selection.clone();
        if selection.rows_m.is_empty() {
            let breadth_n = pass.breadth_n.clone();
            return (x.clone(), Trace { depths: Some(trace), experts: None, heads: None, windows: None, breadth_n });
        }
        let positions_m = pass.documents.positions();
        let positions_m = selection.rows_m.iter().map(|&t| positions_m[t as usize] + past as u32).collect();
        let x_md = gather(tape, x, &selection.rows_m);
        let factor_m1 = gather(tape, &trace.scores_n1, &selection.rows_m);
        let part = Part { selection: selection.clone(), positions_m };
        let (attended, _, fed, inside) = self.sublayers(tape, &x_md, &taken, policy, cache, Some(&part));
        let increment = add(tape, &attended, &fed);
        let y = scatter(tape, x, &increment, &factor_m1, &selection.rows_m);
        // Tokens that passed by keep what the block below said of them.
        let breadth_n = inside.breadth_n.as_ref().map(|own_m| {
            let mut all_n = pass.breadth_n.as_ref().map_or(vec![1.0; x.rows()], |below| below.to_vec());
            selection.rows_m.iter().zip(&own_m[..]).for_each(|(&t, own)| all_n[t as usize] = *own);
            all_n.into()
        });
        (y, Trace { depths: Some(trace), breadth_n, ..inside })
    }

    /// What attention adds to the stream, the stream behind it, and what the feed-forward adds to that.
    fn sublayers<'a, T: Real>(
        &self,
        tape: &mut Tape<'a, T>,
        x: &Value<T>,
        pass: &Pass<'a, T>,
        policy: Option<&Policy>,
        cache: Option<&mut LayerCache<T>>,
        part: Option<&Part>,
    ) -> (Value<T>, Value<T>, Value<T>, Trace<T>) {
        let (first, offsets_b1) = (4 * self.index + 1, &pass.documents.offsets_b1);
        let normed = rms_norm(tape, x, self.attention_norm, self.epsilon);
        (pass.watch)(tape, first + 1, &normed, offsets_b1);
        let start = cache.as_ref().map_or(0, |cache| cache.before);
        let (attended, mut trace) = self.attention(tape, &normed, pass, cache, part);
        let middle = add(tape, x, &attended);
        (pass.watch)(tape, first + 2, &middle, offsets_b1);
        let normed = rms_norm(tape, &middle, self.feed_forward_norm, self.epsilon);
        (pass.watch)(tape, first + 3, &normed, offsets_b1);
        let (fed, mut experts) = self.feed_forward(tape, &normed, &pass.documents, start, policy, pass.mode);
        if let Some(experts) = &mut experts {
            experts.taken = part.map(|part| part.selection.clone());
        }
        trace.experts = experts;
        (attended, middle, fed, trace)
    }

    fn feed_forward<'a, T: Real>(
        &self,
        tape: &mut Tape<'a, T>,
        x: &Value<T>,
        documents: &Documents,
        start: usize,
        policy: Option<&Policy>,
        mode: Mode,
    ) -> (Value<T>, Option<ExpertTrace<T>>) {
        let (router, threshold, gate_up, down) = match self.feed_forward {
            FeedForward::Dense(dense) => return (dense.run(tape, x), None),
            FeedForward::Sparse { router, threshold, gate_up, down } => (router, threshold, gate_up, down),
        };
        let policy = policy.expect("a sparse block has a policy");
        let mut routers = vec![(router, Precision::F32)];
        routers.extend(threshold.map(|(weight, _)| (weight, Precision::F32)));
        let mut scored = linears(tape, x, &routers);
        let (scores_ne, logits_n1) = (scored.remove(0), scored.pop());
        let input = &RouterInput::new(&documents.offsets_b1, &documents.tokens_n, self.index).starting_at(start);
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
        let mut y = experts(tape, x, &weights_a, &routing.assignments, gate_up, down);
        if let Some(shared) = self.shared {
            let always = shared.run(tape, x);
            y = add(tape, &always, &y);
        }
        let documents = documents.clone();
        (y, Some(ExpertTrace { layer: self.index, scores_ne, weights_a, gates, routing, documents, taken: None }))
    }

    /// Causal attention of the normed stream; with a mixture of heads every head's output is multiplied by its gate, and heads that a token did not
    /// choose are not computed.
    fn attention<'a, T: Real>(
        &self,
        tape: &mut Tape<'a, T>,
        x: &Value<T>,
        pass: &Pass<'a, T>,
        cache: Option<&mut LayerCache<T>>,
        part: Option<&Part>,
    ) -> (Value<T>, Trace<T>) {
        let offsets_b1 = &pass.documents.offsets_b1;
        // All products of the normed stream at once. Scores of heads take f32 in every precision, as those of routers do.
        let precision = tape.precision();
        let mut weights = [self.query, self.key, self.value].map(|weight| (weight, precision)).to_vec();
        if let Some(heads) = &self.heads {
            let scores = [Some(heads.routed), heads.shared, heads.split];
            weights.extend(scores.into_iter().flatten().map(|weight| (weight, Precision::F32)));
        }
        let mut products = linears(tape, x, &weights).into_iter();
        let mut next = || products.next().expect("one product per weight");
        let [mut q, mut k, v] = [next(), next(), next()];
        let mut spec = self.spec;
        // Attention takes rows for positions; those of a part are turned before it.
        if let (Position::Rope { base }, Some(part)) = (spec.position, part) {
            q = rope(tape, &q, spec.heads, base, &part.positions_m);
            k = rope(tape, &k, spec.kv_heads, base, &part.positions_m);
            spec.position = Position::None;
        }
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
        let windows = self.windows.map(|windows| {
            let below = |t: usize| pass.breadth_n.as_ref().map_or(1.0, |breadth_n| breadth_n[t]);
            (0..q.rows()).map(|t| windows.keys(below(t)) as u32).collect::<Arc<[u32]>>()
        });
        let (o, breadth_n) = match cache {
            None => match &windows {
                None => (attention(tape, [&q, &k, &v], offsets_b1, spec, mixture), None),
                Some(windows_n) => {
                    let (o, breadth_n) = attention_within(tape, [&q, &k, &v], offsets_b1, spec, mixture, windows_n);
                    (o, Some(breadth_n))
                }
            },
            Some(cache) => {
                cache.keys.extend_from_slice(k.data());
                cache.values.extend_from_slice(v.data());
                let table: &[T] = match spec.position {
                    Position::Cope { table } => &tape.param(&table)[..table.len()],
                    _ => &[],
                };
                let (shape, inputs) =
                    ((q.rows(), cache.keys.len() / k.width()), [q.data(), &cache.keys[..], &cache.values[..]]);
                let (rows, breadth_n) = match &windows {
                    None => (decode(inputs, shape, spec, mixture, table, precision), None),
                    Some(windows_m) => {
                        let (rows, breadth_m) =
                            decode_within(inputs, shape, spec, mixture, (table, precision), windows_m);
                        (rows, Some(breadth_m))
                    }
                };
                (tape.constant(&rows, q.rows(), q.width()), breadth_n)
            }
        };
        let trace = Trace {
            depths: None,
            experts: None,
            heads: gated.map(|(_, trace)| trace),
            windows: windows.map(|windows_n| WindowTrace {
                layer: self.index,
                windows_n,
                offsets_b1: offsets_b1.clone(),
            }),
            breadth_n: breadth_n.map(Arc::from),
        };
        (linear(tape, &o, self.output), trace)
    }
}

/// The part of the tokens that a routed block takes, and their positions in their documents.
struct Part {
    selection: Arc<Selection>,
    positions_m: Arc<[u32]>,
}

impl Depth {
    /// Scores the tokens and chooses: by the score alone, or in training the best of each document. Returns the pass of the taken tokens too.
    fn choose<'a, T: Real>(
        &self,
        tape: &mut Tape<'a, T>,
        x: &Value<T>,
        pass: &Pass<'a, T>,
        layer: usize,
    ) -> (Pass<'a, T>, DepthTrace<T>) {
        let scores_n1 = linears(tape, x, &[(self.router, Precision::F32)]).remove(0);
        let Documents { tokens_n, offsets_b1 } = &pass.documents;
        let causal = Arc::new(depths::causal(scores_n1.data(), offsets_b1));
        let (selection, target) = match pass.mode {
            Mode::Evaluate => (causal.clone(), causal),
            Mode::Train => {
                let best = Arc::new(depths::best(scores_n1.data(), offsets_b1, self.capacity));
                // A batch that would take nothing would leave the block without gradient and its experts without a count.
                let own = self.choice == DepthChoice::Causal && !causal.rows_m.is_empty();
                (if own { causal } else { best.clone() }, best)
            }
        };
        let tokens_n = selection.rows_m.iter().map(|&t| tokens_n[t as usize]).collect();
        let documents = Documents { tokens_n, offsets_b1: selection.offsets_b1.clone() };
        let taken = |breadth_n: &Arc<[f64]>| selection.rows_m.iter().map(|&t| breadth_n[t as usize]).collect();
        let breadth_n = pass.breadth_n.as_ref().map(taken);
        (Pass { documents, breadth_n, ..pass.clone() }, DepthTrace { layer, scores_n1, selection, target })
    }
}
