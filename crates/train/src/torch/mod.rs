//! The learner's face on libtorch: parameters, gradient and moments are flat buffers on a device; the host decides (loss checks, clipping, rates,
//! which experts move) from two small reads a step. What is kept and saved is the host's copy, fetched when it is asked for.

mod inspect;
mod optimizer;

pub use inspect::loss_and_gradients;

use crate::clip::first_non_finite;
use crate::data::Batch;
use crate::epoch::Epoch;
use crate::guard::{Fault, Guard, Kind};
use crate::learner::{Learner, MAX_GRADIENT, StepError, Update, check_loss};
use crate::loss::{Auxiliary, Share};
use crate::optimizers::Moved;
use crate::run::{Run, Train};
use model::torch::{Coefficients, Found, Targets};
use model::transformer::Documents;
use moe_router::{Policy, RouterInput};
use optimizer::{Buffers, Segments};
use std::sync::{Mutex, PoisonError};
use tensor::torch::{Device, Error, Flat, Result, first_line, is_out_of_memory, set_threads, to_vec};

/// What training keeps on the device.
pub struct TorchLearner {
    device: Device,
    bf16: bool,
    threads: usize,
    /// Nobody ever waits for it: tensors may go to another thread but not be shared, and evaluation shares the learner.
    state: Mutex<Option<State>>,
}

struct State {
    flat: Flat,
    moments: Vec<tensor::torch::Tensor>,
    segments: Segments,
    /// Steps since the host's copy was made.
    ahead: bool,
    /// An update failed half way: these numbers belong to no step.
    torn: bool,
}

impl TorchLearner {
    /// Nothing is on the device before the first update. The run must have been validated.
    pub fn new(run: &Run) -> std::result::Result<Self, tensor::EngineError> {
        let device = tensor::torch::device(&run.device)?;
        Ok(TorchLearner {
            device,
            bf16: run.dtype == tensor::Precision::Bf16,
            threads: run.threads,
            state: Mutex::new(None),
        })
    }

    /// Whether the host's copy can be brought up to date: false after an update that failed half way.
    pub fn is_whole(&self) -> bool {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).as_ref().is_none_or(|state| !state.torn)
    }

    /// Brings parameters and moments back to the host.
    pub fn fetch(
        &mut self,
        params: &mut Vec<f32>,
        moments: &mut [(String, Vec<f32>)],
    ) -> std::result::Result<(), String> {
        let Some(state) = self.state().as_mut().filter(|state| state.ahead && !state.torn) else { return Ok(()) };
        let mut copy = || -> Result<()> {
            *params = to_vec(&state.flat.values)?;
            for ((_, numbers), moment) in moments.iter_mut().zip(&state.moments) {
                *numbers = to_vec(moment)?;
            }
            Ok(())
        };
        copy().map_err(|error| first_line(&error))?;
        state.ahead = false;
        Ok(())
    }

    /// Takes everything off the device; the next update starts from the host's copy.
    pub fn forget(&mut self) {
        *self.state() = None;
    }

    fn state(&mut self) -> &mut Option<State> {
        self.state.get_mut().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One update, as `Learner::update` describes it.
pub fn update(
    learner: &mut Learner,
    batch: &Batch,
    settings: &Train,
    rate: f64,
    epoch: &mut Epoch,
    guard: Option<&Guard>,
) -> std::result::Result<Update, StepError> {
    let mut torch = learner.torch.take().expect("a learner whose engine is torch has one");
    let done = torch.update(learner, batch, settings, rate, epoch, guard);
    learner.torch = Some(torch);
    done
}

impl TorchLearner {
    fn update(
        &mut self,
        learner: &mut Learner,
        batch: &Batch,
        settings: &Train,
        rate: f64,
        epoch: &mut Epoch,
        guard: Option<&Guard>,
    ) -> std::result::Result<Update, StepError> {
        set_threads(self.threads);
        let (device, bf16) = (self.device, self.bf16);
        let state = match self.state() {
            Some(state) => state,
            empty @ None => empty.insert(State::upload(learner, device, bf16)?),
        };
        let passes = state.gradient(learner, batch, settings.accumulate)?;
        let (gradient, weight) = state.squares()?;
        // All that may fail for want of memory before anything is changed lies behind.
        let mut update = Update::empty(learner.layers.len(), learner.policies.len());
        passes.into_iter().for_each(|pass| pass.note(&learner.policies, &mut update, epoch));
        check_loss(&update).map_err(Fault::non_finite)?;
        update.param_norms = learner.layers.norms_of(&gradient);
        let (norm, factor) = state.clip(learner, &update.param_norms, settings.clip)?;
        if let Some(reason) = guard.and_then(|guard| guard.judge(update.cross_entropy, norm)) {
            return Err(Fault { kind: Kind::Spike, reason, applied: false }.into());
        }
        let norms: Vec<f64> = update.param_norms.iter().map(|norm| norm * factor).collect();
        let rates = learner.layers.rates(rate, settings.scales_by_norm().then_some(&norms[..]));
        let mut matrices = learner.optimizer.advance(&learner.model.layout, |i| gradient[i] != 0.0, &rates);
        state.torn = true;
        let buffers = Buffers { values: &state.flat.values, grads: &state.flat.grads, moments: &state.moments };
        let squares: Vec<(f64, f64)> =
            gradient.iter().map(|g| g * factor * factor).zip(weight.iter().copied()).collect();
        let moved = state.segments.step(&learner.optimizer, &mut matrices, &squares, factor, buffers)?;
        (state.torn, state.ahead) = (false, true);
        let mut by_parameter = vec![Moved::default(); learner.model.layout.iter().count()];
        for ((matrix, difference), weight) in matrices.iter().zip(moved).zip(weight) {
            by_parameter[matrix.parameter].difference += difference;
            by_parameter[matrix.parameter].weight += weight;
        }
        update.ratios = learner.layers.update_ratios(&by_parameter);
        if !update.ratios.iter().all(|ratio| ratio.is_finite()) {
            let params: Vec<f32> = to_vec(&state.flat.values)?;
            if let Some(found) = first_non_finite(&learner.layers, &params) {
                let reason = format!("the update of {} is not finite", found.parameter);
                return Err(Fault { applied: true, ..Fault::non_finite(reason) }.into());
            }
        }
        learner.policies.iter_mut().zip(&update.observations).for_each(|(policy, seen)| policy.step(seen));
        (update.grad_norm, update.clipped, update.scale_mean) = (norm, factor < 1.0, rates.scale_mean);
        Ok(update)
    }
}

impl State {
    fn upload(learner: &Learner, device: Device, bf16: bool) -> Result<Self> {
        let flat = Flat::new(&learner.params, device, bf16)?;
        let moments = learner.optimizer.state().moments.iter();
        let moments = moments.map(|(_, m)| tensor::torch::Tensor::f_from_slice(m)?.f_to_device(device));
        let moments = moments.collect::<Result<Vec<_>>>()?;
        let segments = Segments::new(&learner.model.layout, device, device != Device::Cpu)?;
        Ok(State { flat, moments, segments, ahead: false, torn: false })
    }

    /// Gradients of the whole batch into the flat buffer, in `accumulate` micro-batches.
    fn gradient(&mut self, learner: &Learner, batch: &Batch, accumulate: usize) -> Result<Vec<Pass>> {
        self.flat.refresh()?;
        let _ = self.flat.grads.f_zero_()?;
        let parts = if accumulate > 1 { batch.split(accumulate) } else { vec![batch.clone()] };
        let total = batch.total_weight();
        let pass = |part: Batch| {
            let share = Share { weights: part.total_weight() / total, tokens: part.len() as f64 / batch.len() as f64 };
            let documents = Documents::new(part.tokens_n.clone(), part.offsets_b1.clone());
            let shares_n: Vec<f64> = part.loss_weights_n.iter().map(|w| w / total).collect();
            let targets = Targets { ids_n: &part.targets_n, shares_n: &shares_n };
            let coefficients = coefficients(learner, share.tokens);
            let model = &learner.model;
            let found = model::torch::pass(model, &self.flat, &learner.policies, &documents, &targets, &coefficients)?;
            Ok(Pass { part, share, shares_n, coefficients, found })
        };
        parts.into_iter().map(pass).collect()
    }

    /// ‖gradient‖² and ‖weights‖² of every matrix.
    fn squares(&self) -> Result<(Vec<f64>, Vec<f64>)> {
        let (gradient, weight) = (self.segments.squares(&self.flat.grads)?, self.segments.squares(&self.flat.values)?);
        let mut both: Vec<f64> = to_vec(&tensor::torch::Tensor::f_cat(&[gradient, weight], 0)?)?;
        let weight = both.split_off(both.len() / 2);
        Ok((both, weight))
    }

    /// The global norm and the factor that clipping multiplies every gradient by, unless the gradient says that the run has diverged.
    fn clip(&self, learner: &mut Learner, norms: &[f64], max_norm: f64) -> std::result::Result<(f64, f64), StepError> {
        if norms.iter().any(|norm| !norm.is_finite() || *norm > MAX_GRADIENT) {
            learner.grads = to_vec(&self.flat.grads)?;
            let refused = learner.clip(norms, f64::INFINITY).map(drop);
            learner.grads = Vec::new();
            refused.map_err(Fault::non_finite)?;
        }
        let norm = norms.iter().map(|norm| norm * norm).sum::<f64>().sqrt();
        Ok((norm, (max_norm / norm).min(1.0))) // min ignores the NaN of 0 / 0
    }
}

/// Coefficients of the auxiliary losses, which are means over the layers that have them.
fn coefficients(learner: &Learner, tokens: f64) -> Coefficients {
    let c = &learner.coefficients;
    let (sparse, layers) = (learner.policies.len().max(1) as f64, learner.model.config.num_layers as f64);
    Coefficients {
        balance: c.balance * tokens / sparse,
        entropy: c.entropy * tokens / sparse,
        z: c.z * tokens / sparse,
        heads: c.heads * tokens / layers,
    }
}

/// A micro-batch and what its pass measured.
struct Pass {
    part: Batch,
    share: Share,
    shares_n: Vec<f64>,
    coefficients: Coefficients,
    found: Found,
}

impl Pass {
    fn note(self, policies: &[Policy], sum: &mut Update, epoch: &mut Epoch) {
        let Pass { part, share, shares_n, coefficients, found } = self;
        let weighted: f64 = found.losses_n.iter().zip(&shares_n).map(|(loss, share)| loss * share).sum();
        sum.cross_entropy += weighted;
        sum.total += weighted;
        for (name, layer, value) in found.auxiliary {
            sum.total += value * coefficients.of(name);
            sum.add_auxiliary(Auxiliary { name, layer, value: share.tokens * value });
        }
        sum.add_documents(&part.offsets_b1, &found.losses_n);
        for (slot, layer) in found.layers.iter().enumerate() {
            let input = RouterInput::new(&part.offsets_b1, &part.tokens_n, layer.layer);
            let input = input.with_scores(&layer.scores_ne, layer.routing.num_ids);
            policies[slot].observe(&mut sum.observations[slot], &input, &layer.routing);
            epoch.observe(slot, &layer.scores_ne, &layer.routing, &part.tokens_n);
            sum.add_experts(layer.layer, share.tokens * layer.routing.active_per_token());
        }
        sum.activation_norms.iter_mut().zip(found.activation_norms).for_each(|(s, n)| *s += n);
    }
}

impl From<Error> for StepError {
    fn from(error: Error) -> Self {
        let text = first_line(&error);
        if is_out_of_memory(&error) {
            let remedy = "lower train.batch_size, raise train.accumulate, or use dtype = \"bf16\"";
            StepError::Device(format!("the device has no memory left ({text}); {remedy}"))
        } else {
            StepError::Device(format!("torch refused a step: {text}"))
        }
    }
}
