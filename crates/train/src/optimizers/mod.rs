//! Optimizers: pure steps on the flat parameter buffer, one parallel pass over fixed chunks, equal bytes for any number of threads.
//!
//! Rules they share:
//! - Frozen parameters are not touched; padding stays zero.
//! - An expert (one matrix of a stacked parameter) whose gradient is exactly zero got no token: it takes no step, no decay and no change of
//!   its moments, and its bias correction counts its own steps.
//! - Weight decay and the LARS ratio act on 2-D weights and expert matrices alone (the embedding, learned positions, router and output
//!   projection are among them); never on norms, the CoPE table and the routers of a mixture of heads, which start at or near zero.
//! - Gradients must be finite: `clip` finds the others before a step is taken.

pub mod adam;
pub mod lars;
pub mod lion;
pub mod muon;
pub mod sgd;

use crate::layers::{Rates, shape, squares};
use std::collections::BTreeMap;
use std::ops::Range;
use tensor::kernels::simd::{self, Kernel};
use tensor::kernels::{memory, parallel};
use tensor::{Layout, Param};

/// Numbers one task updates; a multiple of the 64-byte boundary.
const CHUNK: usize = 1 << 14;

/// Numbers updated at once, so that the weights before the update are still in the cache when it is measured.
const PIECE: usize = 1 << 10;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Adam; weight decay is added to the gradient (L2).
    Adam,
    /// Adam with decoupled weight decay.
    AdamW,
    /// Gradient descent with momentum; weight decay is added to the gradient (L2).
    Sgd,
    /// Layer-wise rates, the form of the paper.
    Lars,
    /// The sign of a mean of gradients, with decoupled weight decay.
    Lion,
    /// Orthogonal updates of hidden matrices; AdamW for all else.
    Muon,
}

/// What an optimizer needs beside the learning rate.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Settings {
    /// Decay of Adam's first moment; share of Lion's mean in a step.
    pub beta1: f64,
    /// Decay of Adam's second moment and of Lion's mean.
    pub beta2: f64,
    /// Added to Adam's denominator and to that of the LARS ratio.
    pub eps: f64,
    pub weight_decay: f64,
    /// Momentum of SGD, LARS and Muon.
    pub momentum: f64,
    /// Trust coefficient of LARS.
    pub trust: f64,
}

impl Default for Settings {
    fn default() -> Self {
        Self { beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.0, momentum: 0.9, trust: 1e-3 }
    }
}

/// All an optimizer remembers; what a checkpoint stores.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct State {
    /// Steps taken.
    pub steps: u64,
    /// Steps each expert of a stacked parameter has taken, by parameter name.
    pub expert_steps: BTreeMap<String, Vec<u64>>,
    /// Named moments, each laid out like the parameters.
    pub moments: Vec<(String, Vec<f32>)>,
}

/// An optimizer with its state.
#[derive(Clone, Debug)]
pub struct Optimizer {
    kind: Kind,
    settings: Settings,
    state: State,
}

impl Optimizer {
    pub fn new(kind: Kind, settings: Settings, layout: &Layout) -> Self {
        let expert_steps = layout.iter().filter(|(_, p)| p.count > 1).map(|(n, p)| (n.to_owned(), vec![0; p.count]));
        let moments = moment_names(kind, &settings).iter().map(|name| (name.to_string(), memory::zeros(layout.len())));
        let state = State { steps: 0, expert_steps: expert_steps.collect(), moments: moments.collect() };
        Self { kind, settings, state }
    }

    /// An optimizer that goes on from a saved state. Errors: one sentence on what does not fit.
    pub fn restore(kind: Kind, settings: Settings, layout: &Layout, state: State) -> Result<Self, String> {
        let fresh = Self::new(kind, settings, layout).state;
        let names = |state: &State| state.moments.iter().map(|(name, _)| name.clone()).collect::<Vec<_>>();
        if names(&state) != names(&fresh) {
            return Err(format!(
                "the checkpoint holds the moments {:?} but the optimizer {kind:?} needs {:?}; resume with the optimizer of the checkpoint",
                names(&state),
                names(&fresh)
            ));
        }
        let experts = |s: &State| s.expert_steps.iter().map(|(n, c)| (n.clone(), c.len())).collect::<Vec<_>>();
        if state.moments.iter().any(|(_, m)| m.len() != layout.len()) || experts(&state) != experts(&fresh) {
            return Err("the optimizer state of the checkpoint belongs to a model of another shape".to_owned());
        }
        Ok(Self { kind, settings, state })
    }

    /// Counts a step that a device takes by itself and lists the matrices in flat order; `has_gradient` is asked by their number in that order.
    #[cfg(feature = "torch")]
    pub(crate) fn advance(
        &mut self,
        layout: &Layout,
        has_gradient: impl Fn(usize) -> bool,
        rates: &Rates,
    ) -> Vec<Matrix> {
        self.state.advance(layout, |matrix, _| has_gradient(matrix), rates)
    }

    #[cfg(feature = "torch")]
    pub(crate) fn settings(&self) -> &Settings {
        &self.settings
    }

    /// The moments, for a device to bring its own into.
    #[cfg(feature = "torch")]
    pub(crate) fn moments_mut(&mut self) -> &mut [(String, Vec<f32>)] {
        &mut self.state.moments
    }

    pub fn kind(&self) -> Kind {
        self.kind
    }

    pub fn state(&self) -> &State {
        &self.state
    }

    /// One step: `params` and the moments move against `grads`, each parameter at its rate. Returns how far each parameter moved, in name order.
    ///
    /// `params` and `grads` are flat buffers of `layout`, the layout the optimizer was made for.
    pub fn step(&mut self, layout: &Layout, params: &mut [f32], grads: &[f32], rates: &Rates) -> Vec<Moved> {
        assert!(params.len() == layout.len() && grads.len() == layout.len(), "buffers of another layout");
        let mut matrices = self.state.advance(layout, |_, range| grads[range].iter().any(|&g| g != 0.0), rates);
        let moments = &mut self.state.moments;
        match self.kind {
            Kind::Adam | Kind::AdamW => {
                adam::step(&self.settings, self.kind == Kind::AdamW, &matrices, params, grads, moments)
            }
            Kind::Sgd => sgd::step(&self.settings, &matrices, params, grads, moments),
            Kind::Lars => lars::step(&self.settings, &mut matrices, params, grads, moments),
            Kind::Lion => lion::step(&self.settings, &matrices, params, grads, moments),
            Kind::Muon => muon::step(&self.settings, layout, &matrices, params, grads, moments),
        }
    }
}

/// How many moments the optimizer keeps for each parameter.
pub fn moments(kind: Kind, settings: &Settings) -> usize {
    moment_names(kind, settings).len()
}

fn moment_names(kind: Kind, settings: &Settings) -> &'static [&'static str] {
    match kind {
        Kind::Adam | Kind::AdamW | Kind::Muon => &["exp_avg", "exp_avg_sq"],
        Kind::Lion => &["exp_avg"],
        Kind::Sgd if settings.momentum == 0.0 => &[],
        Kind::Sgd | Kind::Lars => &["momentum"],
    }
}

/// How far a parameter moved in a step: squares summed in f64 in a fixed order, padding left out.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Moved {
    /// ‖Δw‖²
    pub difference: f64,
    /// ‖w‖² before the step.
    pub weight: f64,
}

/// A matrix in this step; also a norm segment.
pub(crate) struct Matrix {
    pub(crate) range: Range<usize>,
    /// Its parameter in name order.
    pub(crate) parameter: usize,
    /// Whether it takes the step: not if it is frozen or an expert without gradient.
    pub(crate) moves: bool,
    pub(crate) rate: f64,
    /// Steps this matrix has taken, this one included.
    pub(crate) steps: u64,
    pub(crate) decays: bool,
}

impl State {
    /// Counts the step and lists the matrices, in flat order.
    fn advance(
        &mut self,
        layout: &Layout,
        has_gradient: impl Fn(usize, Range<usize>) -> bool,
        rates: &Rates,
    ) -> Vec<Matrix> {
        self.steps += 1;
        let mut matrices = Vec::new();
        for (parameter, (name, param)) in layout.iter().enumerate() {
            let (rate, decays) = (rates.parameter(parameter), decays(name, param));
            let mut counts = self.expert_steps.get_mut(name);
            for matrix in 0..param.count {
                let range = param.range(matrix);
                let (mut moves, mut steps) = (param.trainable, self.steps);
                if let Some(counts) = &mut counts {
                    moves = moves && has_gradient(matrices.len(), range.clone());
                    counts[matrix] += u64::from(moves);
                    steps = counts[matrix];
                }
                matrices.push(Matrix { range, parameter, moves, rate, steps, decays });
            }
        }
        matrices
    }
}

/// Whether weight decay and the LARS ratio act on a parameter; see the rules of this module.
fn decays(name: &str, param: Param) -> bool {
    shape(name, param).len() > 1 && !name.contains(".self_attn.cope.") && !name.contains(".self_attn.heads.")
}

/// A moment below the smallest normal number becomes zero: arithmetic below it takes twice the time, and rows that are no longer used would stay there.
#[inline(always)]
fn flush(x: f32) -> f32 {
    if x.abs() < f32::MIN_POSITIVE { 0.0 } else { x }
}

/// Runs `kernel(constants, w, g, first moment, second moment)` over the matrices that move, in parallel chunks, and measures what it did to each
/// parameter. A moment that the optimizer does not have is an empty slice. The kernel must be `#[inline(always)]`: it is compiled for several
/// instruction sets.
fn update<C: Copy + Sync + Send>(
    matrices: &[Matrix],
    constants: impl Fn(&Matrix) -> C,
    params: &mut [f32],
    grads: &[f32],
    moments: &mut [(String, Vec<f32>)],
    kernel: impl Fn(C, &mut [f32], &[f32], &mut [f32], &mut [f32]) + Copy + Sync + Send,
) -> Vec<Moved> {
    let mut moments = moments.iter_mut().map(|(_, moment)| Cursor { rest: moment, at: 0 });
    let mut first = moments.next().unwrap_or_default();
    let mut second = moments.next().unwrap_or_default();
    let mut params = Cursor { rest: params, at: 0 };
    let mut chunks = Vec::new();
    for matrix in matrices {
        let constants = matrix.moves.then(|| constants(matrix));
        for start in matrix.range.clone().step_by(CHUNK) {
            let range = start..matrix.range.end.min(start + CHUNK);
            let (w, m, v) = (params.take(&range), first.take(&range), second.take(&range));
            chunks.push((matrix.parameter, Chunk { constants, w, g: &grads[range], m, v, kernel }));
        }
    }
    let moved = parallel::map(true, chunks, |(parameter, chunk)| (parameter, simd::dispatch(chunk)));
    let mut sums = vec![Moved::default(); matrices.last().map_or(0, |last| last.parameter + 1)];
    for (parameter, moved) in moved {
        sums[parameter].difference += moved.difference;
        sums[parameter].weight += moved.weight;
    }
    sums
}

struct Chunk<'s, C, K> {
    /// None if the matrix takes no step.
    constants: Option<C>,
    w: &'s mut [f32],
    g: &'s [f32],
    m: &'s mut [f32],
    v: &'s mut [f32],
    kernel: K,
}

impl<C: Copy, K: Fn(C, &mut [f32], &[f32], &mut [f32], &mut [f32])> Kernel for Chunk<'_, C, K> {
    type Output = Moved;

    #[inline(always)]
    fn run(self) -> Moved {
        let Some(constants) = self.constants else { return Moved { difference: 0.0, weight: squares(self.w) } };
        let mut moved = Moved::default();
        let mut scratch = [0.0; PIECE];
        for start in (0..self.w.len()).step_by(PIECE) {
            let piece = start..self.w.len().min(start + PIECE);
            let (w, before) = (&mut self.w[piece.clone()], &mut scratch[..piece.len()]);
            before.copy_from_slice(w);
            let (m, v) = (self.m.get_mut(piece.clone()), self.v.get_mut(piece.clone()));
            (self.kernel)(constants, w, &self.g[piece], m.unwrap_or_default(), v.unwrap_or_default());
            moved.weight += squares(before);
            before.iter_mut().zip(w).for_each(|(before, after)| *before = *after - *before);
            moved.difference += squares(before);
        }
        moved
    }
}

/// Cuts ascending pieces out of a buffer.
#[derive(Default)]
struct Cursor<'a> {
    rest: &'a mut [f32],
    /// Flat index at which `rest` begins.
    at: usize,
}

impl<'a> Cursor<'a> {
    fn take(&mut self, range: &Range<usize>) -> &'a mut [f32] {
        if self.rest.is_empty() {
            return &mut [];
        }
        let (_, from_start) = std::mem::take(&mut self.rest).split_at_mut(range.start - self.at);
        let (piece, rest) = from_start.split_at_mut(range.len());
        (self.rest, self.at) = (rest, range.end);
        piece
    }
}

#[cfg(test)]
mod tests;
