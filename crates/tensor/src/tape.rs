//! The gradient tape. A node is one closure that holds what its backward needs and nothing else; walking back consumes the nodes, so memory is
//! freed as the walk goes. Gradients of parameters accumulate in place in one flat buffer, those of values in recycled buffers.

use crate::kernels::parallel;
use crate::profile::{self, Cost, Direction};
use crate::{Arena, Buffer, Engine, Param, Precision, Real};
use candle_core::{Device, Tensor, Var};
use std::sync::Arc;

/// Identity of a value on its tape: all that a backward needs to deliver a gradient.
#[derive(Clone, Copy, Debug)]
pub struct Slot {
    id: usize,
    len: usize,
    needs_grad: bool,
}

impl Slot {
    pub fn needs_grad(&self) -> bool {
        self.needs_grad
    }
}

/// A [rows, width] array. Clones share the data; it is recycled when the last holder (the page or a node) lets go.
#[derive(Clone, Debug)]
pub struct Value<T: Real = f32> {
    slot: Slot,
    rows: usize,
    width: usize,
    data: Arc<Buffer<T>>,
}

impl<T: Real> Value<T> {
    pub fn data(&self) -> &[T] {
        &self.data
    }

    pub fn rows(&self) -> usize {
        self.rows
    }

    pub fn width(&self) -> usize {
        self.width
    }

    pub fn slot(&self) -> Slot {
        self.slot
    }

    pub fn needs_grad(&self) -> bool {
        self.slot.needs_grad
    }

    /// The number of a [1, 1] value.
    pub fn scalar(&self) -> T {
        assert_eq!(self.data.len(), 1, "scalar() of a larger value");
        self.data[0]
    }
}

/// The gradient of a value. Several values may share one (both sides of a sum do); who adds to a shared one gets a copy of its own.
pub type Gradient<T> = Arc<Buffer<T>>;

type Backward<'a, T> = Box<dyn FnOnce(&mut Gradients<'_, T>) + 'a>;

/// One forward pass over a flat parameter buffer.
pub struct Tape<'a, T: Real = f32> {
    engine: Engine,
    precision: Precision,
    params: &'a [T],
    arena: Arena<T>,
    recording: bool,
    checkpoints: bool,
    next: usize,
    nodes: Vec<Node<'a, T>>,
    /// The op that is being computed, for the profile of its backward.
    op: (&'static str, Cost),
}

struct Node<'a, T: Real> {
    op: (&'static str, Cost),
    backward: Backward<'a, T>,
}

impl<'a, T: Real> Tape<'a, T> {
    /// A tape that records for `backward`, with f32 products.
    pub fn new(engine: Engine, params: &'a [T], arena: &Arena<T>) -> Self {
        Tape {
            engine,
            precision: Precision::default(),
            params,
            arena: arena.clone(),
            recording: true,
            checkpoints: false,
            next: 0,
            nodes: Vec::new(),
            op: ("", Cost::default()),
        }
    }

    /// A tape that only computes: nothing is saved, no gradient exists.
    pub fn inference(engine: Engine, params: &'a [T], arena: &Arena<T>) -> Self {
        Tape { recording: false, ..Tape::new(engine, params, arena) }
    }

    /// The same tape with products of this precision.
    pub fn with_precision(self, precision: Precision) -> Self {
        Tape { precision, ..self }
    }

    /// The same tape, on which whoever builds on it is to run large parts through `checkpoint`.
    pub fn with_checkpoints(self, checkpoints: bool) -> Self {
        Tape { checkpoints, ..self }
    }

    pub fn engine(&self) -> Engine {
        self.engine
    }

    #[cfg(test)]
    pub fn set_precision(&mut self, precision: Precision) {
        self.precision = precision;
    }

    /// How the products of ops multiply; ops in f64 ignore it.
    pub fn precision(&self) -> Precision {
        self.precision
    }

    pub fn recording(&self) -> bool {
        self.recording
    }

    /// Whether large parts are to run through `checkpoint`.
    pub fn checkpoints(&self) -> bool {
        self.checkpoints
    }

    pub fn arena(&self) -> &Arena<T> {
        &self.arena
    }

    /// The numbers of a parameter with the padding between its matrices.
    pub fn param(&self, param: &Param) -> &'a [T] {
        &self.params[param.span()]
    }

    /// A value without gradient.
    pub fn constant(&mut self, data: &[T], rows: usize, width: usize) -> Value<T> {
        let data = self.arena.copy(data);
        self.output(data, rows, width, false)
    }

    /// A value whose gradient is kept until the end of `backward` (for tests and for inputs of a replayed block).
    pub fn leaf(&mut self, data: &[T], rows: usize, width: usize) -> Value<T> {
        let data = self.arena.copy(data);
        self.output(data, rows, width, true)
    }

    /// Places the result of an op. It needs a gradient only if the op says so and the tape records.
    pub fn output(&mut self, data: Buffer<T>, rows: usize, width: usize, needs_grad: bool) -> Value<T> {
        assert_eq!(data.len(), rows * width, "an op returned the wrong number of values");
        let slot = Slot { id: self.next, len: data.len(), needs_grad: needs_grad && self.recording };
        self.next += 1;
        Value { slot, rows, width, data: Arc::new(data) }
    }

    /// Names the op that is computed while the result lives, for the profile; what it records is profiled under the same name.
    pub fn span(&mut self, name: &'static str, cost: Cost) -> Option<profile::Span> {
        self.op = (name, cost);
        profile::span(name, Direction::Forward, cost.forward)
    }

    /// Appends the backward of an op; call it only for outputs that need a gradient.
    pub fn record(&mut self, backward: impl FnOnce(&mut Gradients<'_, T>) + 'a) {
        if self.recording {
            self.nodes.push(Node { op: self.op, backward: Box::new(backward) });
        }
    }

    /// Hands the complete gradient of `value` to `look` during the walk back, between its consumers and its producer.
    pub fn watch(&mut self, value: &Value<T>, look: impl FnOnce(&[T]) + 'a) {
        let slot = value.slot();
        if slot.needs_grad {
            self.op = ("watch", Cost::default());
            self.record(move |grads| {
                if let Some(gradient) = grads.peek(slot) {
                    look(gradient);
                }
            });
        }
    }

    /// Runs `block` without saving anything inside it and replays it on the walk back (activation checkpointing, Chen 2016). The replay computes
    /// the same bytes, routing included, because every op is deterministic; gradients are bit-identical to those without it.
    pub fn checkpoint(
        &mut self,
        inputs: &[&Value<T>],
        block: impl Fn(&mut Tape<'a, T>, &[Value<T>]) -> Vec<Value<T>> + 'a,
    ) -> Vec<Value<T>> {
        let inputs: Vec<Value<T>> = inputs.iter().map(|&v| v.clone()).collect();
        if !self.recording {
            return block(self, &inputs);
        }
        self.recording = false;
        let computed = block(self, &inputs);
        self.recording = true;
        let outputs: Vec<Value<T>> = computed
            .into_iter()
            .map(|value| {
                let slot = Slot { id: self.next, needs_grad: true, ..value.slot };
                self.next += 1;
                Value { slot, ..value }
            })
            .collect();
        let slots: Vec<Slot> = outputs.iter().map(Value::slot).collect();
        let (engine, precision, params, arena) = (self.engine, self.precision, self.params, self.arena.clone());
        self.op = ("replay", Cost::default());
        self.record(move |outer| {
            let upstream: Vec<Option<Gradient<T>>> = slots.iter().map(|&slot| outer.take(slot)).collect();
            if upstream.iter().all(Option::is_none) {
                return;
            }
            let mut tape = Tape::new(engine, params, &arena).with_precision(precision);
            let leaves: Vec<Value<T>> =
                inputs.iter().zip(0..).map(|(v, id)| Value { slot: Slot { id, ..v.slot }, ..v.clone() }).collect();
            tape.next = leaves.len();
            let outputs = block(&mut tape, &leaves);
            let seeds = outputs.iter().map(Value::slot).zip(upstream).filter_map(|(slot, g)| g.map(|g| (slot, g)));
            let seeds: Vec<_> = seeds.collect();
            drop(outputs);
            let mut inner = tape.walk(seeds, outer.flat);
            for (input, leaf) in inputs.iter().zip(&leaves) {
                if let Some(gradient) = inner[leaf.slot.id].take() {
                    outer.give(input.slot, gradient);
                }
            }
        });
        outputs
    }

    /// Differentiates the [1, 1] value `loss`: parameter gradients are added to `flat` (laid out like the parameters), gradients of leaves are
    /// returned by `Gradients::of`.
    pub fn backward<'g>(mut self, loss: &Value<T>, flat: &'g mut [T]) -> Gradients<'g, T> {
        assert_eq!(flat.len(), self.params.len(), "the gradient buffer must have the layout of the parameters");
        let mut seed = self.arena.take(1);
        seed[0] = T::ONE;
        let arena = self.arena.clone();
        let seeds = if loss.needs_grad() { vec![(loss.slot(), Arc::new(seed))] } else { Vec::new() };
        self.recording = false;
        let by_value = self.walk(seeds, flat);
        Gradients { flat, by_value, arena }
    }

    fn walk(self, seeds: Vec<(Slot, Gradient<T>)>, flat: &mut [T]) -> Vec<Option<Gradient<T>>> {
        let mut by_value: Vec<Option<Gradient<T>>> = (0..self.next).map(|_| None).collect();
        for (slot, seed) in seeds {
            if slot.needs_grad {
                by_value[slot.id] = Some(seed);
            }
        }
        let mut grads = Gradients { flat, by_value, arena: self.arena };
        for node in self.nodes.into_iter().rev() {
            let (name, cost) = node.op;
            let _span = profile::span(name, Direction::Backward, cost.backward);
            (node.backward)(&mut grads);
        }
        grads.by_value
    }

    /// Runs plain candle formulas on copies of `values` and `params` (as [rows, width], stacked ones as [count, rows, width]) and lets candle
    /// differentiate them: the reference face of an op, and the way to try a new layer on this tape.
    pub fn reference(
        &mut self,
        values: &[&Value<T>],
        params: &[Param],
        formula: impl FnOnce(&[Tensor]) -> candle_core::Result<Vec<Tensor>>,
    ) -> Vec<Value<T>> {
        let needs = values.iter().any(|v| v.needs_grad()) || params.iter().any(|p| p.trainable);
        let run = || -> candle_core::Result<(Vec<Var>, Vec<Tensor>)> {
            let mut leaves = Vec::new();
            for v in values {
                leaves.push(Var::from_slice(v.data(), (v.rows, v.width), &Device::Cpu)?);
            }
            for p in params {
                let data: Vec<T> = (0..p.count).flat_map(|i| self.params[p.range(i)].to_vec()).collect();
                let shape = if p.count == 1 { vec![p.rows, p.width] } else { vec![p.count, p.rows, p.width] };
                leaves.push(Var::from_slice(&data, shape, &Device::Cpu)?);
            }
            let tensors: Vec<Tensor> = leaves.iter().map(|v| v.as_tensor().clone()).collect();
            let outputs = formula(&tensors)?;
            Ok((leaves, outputs))
        };
        let (leaves, tensors) = run().expect("a reference formula is valid for the shapes its op was given");
        let outputs: Vec<Value<T>> = tensors
            .iter()
            .map(|y| {
                let data: Vec<T> = flatten(y);
                let (rows, width) = y.dims2().expect("reference faces return [rows, width]");
                self.output(self.arena.copy(&data), rows, width, needs)
            })
            .collect();
        if needs {
            let slots: Vec<Slot> = outputs.iter().map(Value::slot).collect();
            let inputs: Vec<Slot> = values.iter().map(|v| v.slot()).collect();
            let params = params.to_vec();
            self.record(move |grads| {
                let upstream: Vec<Option<Gradient<T>>> = slots.iter().map(|&slot| grads.take(slot)).collect();
                let Some(found) =
                    differentiate(&leaves, &tensors, &upstream).expect("candle differentiates its own ops")
                else {
                    return;
                };
                for (slot, gradient) in inputs.iter().zip(&found) {
                    grads.add(*slot, |dst| add(dst, gradient));
                }
                for (p, gradient) in params.iter().zip(&found[inputs.len()..]) {
                    let Some(dst) = grads.param(p) else { continue };
                    for (i, part) in gradient.chunks(p.len()).enumerate() {
                        add(&mut dst[i * p.stride..i * p.stride + p.len()], part);
                    }
                }
            });
        }
        outputs
    }
}

fn flatten<T: Real>(tensor: &Tensor) -> Vec<T> {
    tensor.flatten_all().and_then(|t| t.to_vec1()).expect("candle copies out a tensor of its own dtype")
}

/// Gradients of the leaves for the given upstream gradients; candle seeds ones, so g enters as (y * g).sum().
fn differentiate<T: Real>(
    leaves: &[Var],
    outputs: &[Tensor],
    upstream: &[Option<Gradient<T>>],
) -> candle_core::Result<Option<Vec<Vec<T>>>> {
    let mut total: Option<Tensor> = None;
    for (y, g) in outputs.iter().zip(upstream) {
        let Some(g) = g else { continue };
        let part = (y * Tensor::from_slice(&g[..], y.shape(), &Device::Cpu)?)?.sum_all()?;
        total = Some(match total {
            Some(sum) => (sum + part)?,
            None => part,
        });
    }
    let Some(total) = total else { return Ok(None) };
    let store = total.backward()?;
    let gradient = |leaf: &Var| match store.get(leaf) {
        Some(g) => flatten(g),
        None => vec![T::ZERO; leaf.elem_count()],
    };
    Ok(Some(leaves.iter().map(gradient).collect()))
}

/// dst += src.
pub(crate) fn add<T: Real>(dst: &mut [T], src: &[T]) {
    for (d, s) in dst.iter_mut().zip(src) {
        *d += *s;
    }
}

/// A gradient to write to.
fn own<'g, T: Real>(gradient: &'g mut Gradient<T>, arena: &Arena<T>) -> &'g mut [T] {
    if Arc::get_mut(gradient).is_none() {
        *gradient = Arc::new(arena.copy(gradient));
    }
    Arc::get_mut(gradient).expect("a copy has one holder")
}

/// Gradients during and after the walk back.
pub struct Gradients<'g, T: Real> {
    flat: &'g mut [T],
    by_value: Vec<Option<Gradient<T>>>,
    arena: Arena<T>,
}

impl<T: Real> Gradients<'_, T> {
    pub fn arena(&self) -> &Arena<T> {
        &self.arena
    }

    /// Takes the complete gradient of an op's output; `None` if nothing downstream needed it.
    pub fn take(&mut self, slot: Slot) -> Option<Gradient<T>> {
        if slot.needs_grad { self.by_value[slot.id].take() } else { None }
    }

    fn peek(&self, slot: Slot) -> Option<&[T]> {
        self.by_value[slot.id].as_deref().map(|gradient| &gradient[..])
    }

    /// Lets `f` add to the gradient of `slot` (zeros at first); does nothing if no gradient is needed.
    pub fn add(&mut self, slot: Slot, f: impl FnOnce(&mut [T])) {
        if slot.needs_grad {
            let arena = &self.arena;
            f(own(self.by_value[slot.id].get_or_insert_with(|| Arc::new(arena.zeros(slot.len))), arena));
        }
    }

    /// Like `add`, for kernels that can overwrite: `f(buffer, accumulate)` must set every number when `accumulate` is false.
    pub fn write(&mut self, slot: Slot, f: impl FnOnce(&mut [T], bool)) {
        if slot.needs_grad {
            let accumulate = self.by_value[slot.id].is_some();
            let arena = &self.arena;
            f(own(self.by_value[slot.id].get_or_insert_with(|| Arc::new(arena.take(slot.len))), arena), accumulate);
        }
    }

    /// Gives a whole buffer to the gradient of `slot`, without a copy when it is the first.
    pub fn give(&mut self, slot: Slot, gradient: impl Into<Gradient<T>>) {
        if slot.needs_grad {
            let gradient = gradient.into();
            match &mut self.by_value[slot.id] {
                Some(sum) => parallel::add(own(sum, &self.arena), &gradient),
                empty => *empty = Some(gradient),
            }
        }
    }

    /// The gradient region of a parameter (padding between matrices included), to be added to; `None` if it is frozen.
    pub fn param(&mut self, param: &Param) -> Option<&mut [T]> {
        if param.trainable { Some(&mut self.flat[param.span()]) } else { None }
    }

    /// The regions of several parameters at once, which must not overlap; `None` where frozen.
    pub fn params(&mut self, params: &[&Param]) -> Vec<Option<&mut [T]>> {
        let mut order: Vec<usize> = (0..params.len()).collect();
        order.sort_unstable_by_key(|&i| params[i].offset);
        let mut regions: Vec<_> = params.iter().map(|_| None).collect();
        let (mut rest, mut at) = (&mut *self.flat, 0);
        for i in order {
            let span = params[i].span();
            let (region, tail) = rest.split_at_mut(span.start - at).1.split_at_mut(span.len());
            regions[i] = params[i].trainable.then_some(region);
            (rest, at) = (tail, span.end);
        }
        regions
    }

    /// The gradient of a leaf after `backward`; zeros if nothing depended on it.
    pub fn of(&self, value: &Value<T>) -> Vec<T> {
        match self.peek(value.slot()) {
            Some(gradient) => gradient.to_vec(),
            None => vec![T::ZERO; value.data().len()],
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::{combine, linear::linear, rms_norm::rms_norm};
    use crate::{Layout, check};

    fn block<'a, T: Real>(tape: &mut Tape<'a, T>, x: &Value<T>, gain: Param, weight: Param) -> Vec<Value<T>> {
        let normed = rms_norm(tape, x, gain, 1e-6);
        let y = linear(tape, &normed, weight);
        let sum = combine::add(tape, x, &y);
        vec![sum, normed]
    }

    fn parts() -> (Param, Param, Vec<f64>, [check::Input; 1]) {
        let layout = Layout::new([("g".into(), vec![6], true), ("w".into(), vec![6, 6], true)]);
        let params = check::normals(1, layout.len(), 0.5);
        (layout.get("g").unwrap(), layout.get("w").unwrap(), params, [check::Input::random(2, 5, 6, 1.0)])
    }

    #[test]
    fn a_replayed_block_gives_the_same_bytes() {
        let (gain, weight, params, inputs) = parts();
        let run = |replay: bool| {
            check::analytic::<f32>(Engine::Cpu, &inputs, &params, |tape, x| {
                if replay {
                    let first = tape.checkpoint(&[&x[0]], move |tape, x| block(tape, &x[0], gain, weight));
                    tape.checkpoint(&[&first[0], &first[1]], move |tape, x| {
                        let sum = combine::add(tape, &x[0], &x[1]);
                        block(tape, &sum, gain, weight)
                    })
                } else {
                    let first = block(tape, &x[0], gain, weight);
                    let sum = combine::add(tape, &first[0], &first[1]);
                    block(tape, &sum, gain, weight)
                }
            })
        };
        assert_eq!(run(true), run(false));
    }

    #[test]
    fn nothing_outlives_a_step_and_a_watch_sees_the_whole_gradient() {
        let (gain, weight, params, inputs) = parts();
        let arena = Arena::default();
        let seen = std::cell::RefCell::new(Vec::new());
        {
            let mut tape = Tape::new(Engine::Cpu, &params, &arena);
            let x = tape.leaf(&inputs[0].data, 5, 6);
            let once = combine::add(&mut tape, &x, &x);
            tape.watch(&once, |gradient| seen.borrow_mut().extend_from_slice(gradient));
            let outputs = block(&mut tape, &once, gain, weight);
            let ones = vec![1.0; 30];
            let total = tape.arena().take(1);
            let total = tape.output(total, 1, 1, true);
            let (slot, from) = (total.slot(), outputs[0].slot());
            tape.record(move |grads| {
                grads.take(slot);
                grads.add(from, |d| add(d, &ones));
            });
            drop((once, outputs));
            let mut flat = vec![0.0; params.len()];
            let grads = tape.backward(&total, &mut flat);
            let twice: Vec<f64> = seen.borrow().iter().map(|g| 2.0 * g).collect();
            assert_eq!(grads.of(&x), twice);
        }
        assert_eq!(arena.live(), 0);
    }

    #[test]
    fn inference_saves_nothing() {
        let (gain, weight, params, inputs) = parts();
        let arena = Arena::default();
        let mut tape = Tape::inference(Engine::Cpu, &params, &arena);
        let x = tape.constant(&inputs[0].data, 5, 6);
        let y = block(&mut tape, &x, gain, weight);
        assert!(tape.nodes.is_empty() && y.iter().all(|y| !y.needs_grad()));
    }
}
