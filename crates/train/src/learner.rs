//! A model being trained: the gradient of a batch, and the update that follows from it. In memory only; the trainer keeps the books.

use crate::clip::{Clipped, clip, first_non_finite};
use crate::data::Batch;
use crate::epoch::Epoch;
use crate::error::TrainError;
use crate::flops;
use crate::guard::{Fault, Guard, Kind};
use crate::layers::{FlatLayers, sums_of_squares};
use crate::loss::{self, Auxiliary, Share};
use crate::noise::{self, Sample};
use crate::optimizers::Optimizer;
use crate::run::{Run, Train};
use crate::sam;
use model::generate::Weights;
use model::transformer::{Context, Documents, Transformer};
use moe_router::{Mode, Observation, Policy, RouterInput, Routing};
use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;
use tensor::kernels::{crew, memory, parallel};
use tensor::ops::cross_entropy::Targets;
use tensor::profile::{self, Direction, Work};
use tensor::{Arena, Engine, Precision, Tape, Value};

/// Beyond these a run has diverged although every number is finite (the roadmap program's limits).
const MAX_LOSS: f64 = 1e6;
pub(crate) const MAX_GRADIENT: f64 = 2000.0;

pub struct Learner {
    pub model: Transformer,
    pub layers: FlatLayers,
    pub params: Vec<f32>,
    pub optimizer: Optimizer,
    pub policies: Vec<Policy>,
    pub pool: Arc<rayon::ThreadPool>,
    engine: Engine,
    precision: Precision,
    pub(crate) coefficients: crate::run::Losses,
    pub(crate) grads: Vec<f32>,
    /// Parameters or gradients set aside within an update; empty as long as nothing asks for it.
    spare: Vec<f32>,
    arena: Arena<f32>,
    /// What computes in place of the tape where `engine` is torch.
    #[cfg(feature = "torch")]
    pub(crate) torch: Option<crate::torch::TorchLearner>,
    /// Tests put faults in here, between the gradient of an update and the look at it.
    #[cfg(test)]
    pub(crate) tamper: Option<Tamper>,
}

/// Why an update was not made.
#[derive(Debug)]
pub enum StepError {
    /// Its numbers are not to be used.
    Fault(Fault),
    /// The device failed; the state is that of the last update.
    Device(String),
}

impl From<Fault> for StepError {
    fn from(fault: Fault) -> Self {
        StepError::Fault(fault)
    }
}

impl From<StepError> for TrainError {
    fn from(error: StepError) -> Self {
        match error {
            StepError::Fault(fault) => TrainError::Diverged(fault.reason),
            StepError::Device(reason) => TrainError::Failed(reason),
        }
    }
}

#[cfg(test)]
pub(crate) type Tamper = Box<dyn FnMut(&mut Update, &mut [f32]) + Send + Sync>;

/// What one update measured. Norms and ratios are by flat layer.
pub struct Update {
    /// Mean cross-entropy of the batch, nats.
    pub cross_entropy: f64,
    /// Cross-entropy plus weighted auxiliary losses.
    pub total: f64,
    /// Unscaled auxiliary losses by name and layer.
    pub auxiliary: Vec<Auxiliary>,
    /// Mean cross-entropy of every document.
    pub document_losses: Vec<f64>,
    /// Summed cross-entropy of all targets.
    pub loss_sum: f64,
    /// (block, mean experts per token) of the sparse blocks.
    pub experts_per_token: Vec<(usize, f64)>,
    /// (block, [share of the tokens it took, share that the causal rule would take, share for which both say the same]) of the routed blocks.
    pub depths: Vec<(usize, [f64; 3])>,
    /// (block, [mean window, share of earlier keys that windows hide]) where tokens have windows of their own.
    pub windows: Vec<(usize, [f64; 2])>,
    /// ‖∂L/∂(input of the layer)‖, mean over documents of their own loss.
    pub activation_norms: Vec<f64>,
    /// ‖gradient‖ before clipping.
    pub param_norms: Vec<f64>,
    /// ‖Δw‖ / ‖w‖.
    pub ratios: Vec<f64>,
    /// Global gradient norm before clipping, and whether it was clipped.
    pub grad_norm: f64,
    pub clipped: bool,
    /// Mean over layers of the learning-rate scale.
    pub scale_mean: f64,
    /// Norms for the gradient noise scale, where it was to be measured and the batch had parts.
    pub noise: Option<Sample>,
    /// Share of tokens that the second pass of sharpness-aware minimisation routed otherwise.
    pub routing_changed: Option<f64>,
    pub(crate) observations: Vec<Observation>,
    /// What the sparse layers decided, part by part, where a second pass is to be compared.
    routings: Vec<Arc<Routing>>,
}

impl Learner {
    pub fn new(run: &Run, vocab_size: usize, first: &Train) -> Result<Self, TrainError> {
        memory::keep_pages();
        let pool = Arc::new(thread_pool(run.threads)?);
        let model = Transformer::new(&run.model, vocab_size);
        let layers = FlatLayers::new(&model.layout, run.model.num_layers).map_err(TrainError::Failed)?;
        let params = pool.install(|| model.initialise(run.seed));
        Ok(Learner {
            optimizer: Optimizer::new(first.optimizer_kind(), first.optimizer_settings(), &model.layout),
            policies: model.policies(),
            pool,
            engine: run.engine,
            precision: run.dtype,
            coefficients: run.losses.clone(),
            // The torch engine keeps its own on the device.
            grads: if run.engine == Engine::Torch { Vec::new() } else { memory::zeros(params.len()) },
            spare: Vec::new(),
            arena: Arena::default(),
            #[cfg(feature = "torch")]
            torch: match run.engine {
                Engine::Torch => {
                    Some(crate::torch::TorchLearner::new(run).map_err(|error| TrainError::Usage(error.to_string()))?)
                }
                _ => None,
            },
            #[cfg(test)]
            tamper: None,
            layers,
            params,
            model,
        })
    }

    /// Bytes of the recycled buffers, all of them at rest between steps.
    pub fn arena_bytes(&self) -> usize {
        self.arena.held() * size_of::<f32>()
    }

    /// Bytes of activations, gradients of values and scratch that an update held in those buffers at once, at most; none where another engine
    /// has its own.
    pub fn peak_arena_bytes(&self) -> Option<usize> {
        (self.engine == Engine::Cpu).then(|| self.arena.peak() * size_of::<f32>())
    }

    /// Brings parameters and moments here where a device holds newer ones.
    pub fn fetch(&mut self) -> Result<(), TrainError> {
        #[cfg(feature = "torch")]
        if let Some(torch) = &mut self.torch {
            return torch.fetch(&mut self.params, self.optimizer.moments_mut()).map_err(TrainError::Failed);
        }
        Ok(())
    }

    /// Whether parameters and moments belong to one step: false where a device failed in the middle of an update.
    pub fn is_whole(&self) -> bool {
        #[cfg(feature = "torch")]
        if let Some(torch) = &self.torch {
            return torch.is_whole();
        }
        true
    }

    /// The model as evaluation sees it (see `fetch`); the torch engine leaves evaluation to the cpu engine.
    pub fn weights(&self) -> Weights<'_> {
        let engine = if self.engine == Engine::Torch { Engine::Cpu } else { self.engine };
        let precision = self.precision;
        Weights { transformer: &self.model, params: &self.params, policies: &self.policies, engine, precision }
    }

    /// Bytes of parameters and moments, which is what a checkpoint takes.
    pub fn state_bytes(&self) -> u64 {
        let buffers = 1 + self.optimizer.state().moments.len();
        (buffers * self.model.layout.len() * size_of::<f32>()) as u64
    }

    /// The next phase goes on with the moments of the last one, unless it names another optimizer.
    pub fn carry_optimizer(&mut self, next: &Train) -> Result<(), TrainError> {
        self.fetch()?;
        #[cfg(feature = "torch")]
        if let Some(torch) = &mut self.torch {
            torch.forget();
        }
        let (kind, settings, layout) = (next.optimizer_kind(), next.optimizer_settings(), &self.model.layout);
        self.optimizer = if kind == self.optimizer.kind() {
            Optimizer::restore(kind, settings, layout, self.optimizer.state().clone()).map_err(TrainError::Failed)?
        } else {
            Optimizer::new(kind, settings, layout)
        };
        Ok(())
    }

    /// Floating-point operations of the matrix products of an update on `batch`, with the experts that it measured.
    pub fn flops(&self, batch: &Batch, settings: &Train, update: &Update) -> f64 {
        let passes = if settings.sam > 0.0 { 2.0 } else { 1.0 };
        let experts = update.mean_experts().unwrap_or(0.0);
        passes * flops::step(&self.model.config, self.model.vocab_size, &batch.offsets_b1, experts, update.mean_taken())
    }

    /// One optimizer step on `batch` at learning rate `rate`. `epoch` notes the routing. The error says why it was not made; loss and gradient are checked, where there is a `guard` for jumps too, before parameters, moments or control states are changed.
    pub fn update(
        &mut self,
        batch: &Batch,
        settings: &Train,
        rate: f64,
        epoch: &mut Epoch,
        guard: Option<&Guard>,
    ) -> Result<Update, StepError> {
        #[cfg(feature = "torch")]
        if self.torch.is_some() {
            return crate::torch::update(self, batch, settings, rate, epoch, guard);
        }
        // The whole step runs inside the pool: every entry from outside wakes a thread.
        let pool = self.pool.clone();
        Ok(pool.install(|| crew::awake(|| self.step(batch, settings, rate, epoch, guard)))?)
    }

    fn step(
        &mut self,
        batch: &Batch,
        settings: &Train,
        rate: f64,
        epoch: &mut Epoch,
        guard: Option<&Guard>,
    ) -> Result<Update, Fault> {
        let mut update = self.gradient(batch, settings, epoch);
        #[cfg(test)]
        if let Some(tamper) = &mut self.tamper {
            tamper(&mut update, &mut self.grads);
        }
        check_loss(&update).map_err(Fault::non_finite)?;
        let buffer = size_of_val(&self.params[..]);
        let norms_span = profile::span("clip", Direction::Update, Work { flops: 0, bytes: buffer });
        update.param_norms = self.layers.param_norms(&self.grads);
        if let Some(sample) = &mut update.noise {
            sample.whole = update.param_norms.iter().map(|norm| norm * norm).sum();
        }
        if settings.sam > 0.0 {
            self.sharpen(batch, settings, &mut update).map_err(Fault::non_finite)?;
        }
        let clipped = self.clip(&update.param_norms, settings.clip).map_err(Fault::non_finite)?;
        drop(norms_span);
        if let Some(reason) = guard.and_then(|guard| guard.judge(update.cross_entropy, clipped.norm)) {
            return Err(Fault { kind: Kind::Spike, reason, applied: false });
        }
        let norms: Vec<f64> = update.param_norms.iter().map(|norm| norm * clipped.factor).collect();
        let rates = self.layers.rates(rate, settings.scales_by_norm().then_some(&norms[..]));
        let moments = self.optimizer.state().moments.len();
        let work = Work { flops: 0, bytes: (3 + 2 * moments) * buffer };
        let optimizer_span = profile::span("optimizer", Direction::Update, work);
        let moved = self.optimizer.step(&self.model.layout, &mut self.params, &self.grads, &rates);
        drop(optimizer_span);
        update.ratios = self.layers.update_ratios(&moved);
        let broken = |reason| Fault { applied: true, ..Fault::non_finite(reason) };
        self.check_params(&update.ratios).map_err(broken)?;
        self.policies.iter_mut().zip(&update.observations).for_each(|(policy, seen)| policy.step(seen));
        (update.grad_norm, update.clipped, update.scale_mean) = (clipped.norm, clipped.factor < 1.0, rates.scale_mean);
        Ok(update)
    }

    /// Puts the gradient at w + ρ g / ‖g‖ in place of g. The parameters come back to the bit; measurements and control states stay those of w.
    fn sharpen(&mut self, batch: &Batch, settings: &Train, update: &mut Update) -> Result<(), String> {
        let norm = update.param_norms.iter().map(|norm| norm * norm).sum::<f64>().sqrt();
        if norm == 0.0 || !norm.is_finite() {
            return Ok(()); // nowhere to go, or for the look at the gradient that follows
        }
        self.spare.clear();
        self.spare.extend_from_slice(&self.params);
        sam::ascend(&mut self.params, &self.grads, settings.sam / norm);
        let again = Train { noise_scale: 0, ..settings.clone() };
        let second = self.gradient(batch, &again, &mut Epoch::new(&self.policies));
        std::mem::swap(&mut self.params, &mut self.spare);
        check_loss(&second)?;
        update.routing_changed = sam::changed(&update.routings, &second.routings);
        update.param_norms = self.layers.param_norms(&self.grads);
        Ok(())
    }

    /// Gradients of the whole batch into the flat buffer, in micro-batches of whole documents whose parts add up to the batch.
    fn gradient(&mut self, batch: &Batch, settings: &Train, epoch: &mut Epoch) -> Update {
        parallel::each(true, self.grads.chunks_mut(1 << 16).collect(), |grads| grads.fill(0.0));
        let mut sum = Update::empty(self.layers.len(), self.policies.len());
        let parts = if settings.accumulate > 1 { batch.split(settings.accumulate) } else { vec![batch.clone()] };
        let measures = settings.noise_scale > 0 && parts.len() > 1;
        let mut sample = Sample { per_whole: 1.0 / batch.documents.len() as f64, ..Sample::default() };
        for part in &parts {
            if measures {
                self.spare.clear();
                self.spare.extend_from_slice(&self.grads);
            }
            let share = Share {
                weights: part.total_weight() / batch.total_weight(),
                tokens: part.len() as f64 / batch.len() as f64,
            };
            let context = Pass {
                model: &self.model,
                params: &self.params,
                policies: &self.policies,
                engine: self.engine,
                precision: self.precision,
                checkpoints: settings.activation_checkpointing,
                coefficients: &self.coefficients,
                arena: &self.arena,
                keeps_routings: settings.sam > 0.0,
            };
            context.run(part, share, &mut self.grads, &mut sum, epoch);
            if measures {
                // What the part added is its own mean gradient, scaled to its share of the batch.
                let squares = noise::squared_distance(&self.grads, &self.spare) / share.weights.powi(2);
                sample.parts += squares / parts.len() as f64;
                sample.per_part += 1.0 / (part.documents.len() * parts.len()) as f64;
            }
        }
        sum.noise = measures.then_some(sample);
        sum
    }

    /// Clips the gradient whose layers have these norms, unless it says that the run has diverged.
    pub(crate) fn clip(&mut self, norms: &[f64], max_norm: f64) -> Result<Clipped, String> {
        // No element is larger than the norm of its layer, so that a look at the elements is rarely needed.
        let suspect = norms.iter().any(|norm| *norm > MAX_GRADIENT);
        if suspect
            && norms.iter().all(|norm| norm.is_finite())
            && self.grads.iter().any(|g| f64::from(g.abs()) > MAX_GRADIENT)
        {
            return Err(format!("a gradient element is above {MAX_GRADIENT}"));
        }
        clip(&self.layers, &mut self.grads, norms, max_norm).map_err(|found| {
            format!("the gradient is not finite from {} (flat layer {}) on", found.parameter, found.layer)
        })
    }

    /// A parameter that is not finite leaves its mark in the ratio of its layer, so that only then the parameters are searched.
    fn check_params(&self, ratios: &[f64]) -> Result<(), String> {
        if ratios.iter().all(|ratio| ratio.is_finite()) {
            return Ok(());
        }
        match first_non_finite(&self.layers, &self.params) {
            Some(found) => Err(format!("the update of {} is not finite", found.parameter)),
            None => Ok(()), // the layer was zero before it moved
        }
    }
}

pub(crate) fn check_loss(update: &Update) -> Result<(), String> {
    if !update.total.is_finite() {
        return Err(format!("the loss is {}", update.total));
    }
    if update.cross_entropy > MAX_LOSS {
        return Err(format!("the loss {} is above {MAX_LOSS}", update.cross_entropy));
    }
    Ok(())
}

/// What a forward and backward pass reads.
struct Pass<'p> {
    model: &'p Transformer,
    params: &'p [f32],
    policies: &'p [Policy],
    engine: Engine,
    precision: Precision,
    checkpoints: bool,
    coefficients: &'p crate::run::Losses,
    arena: &'p Arena<f32>,
    keeps_routings: bool,
}

impl Pass<'_> {
    /// One micro-batch: gradients into `grads`, measurements into `sum` and `epoch`.
    fn run(&self, part: &Batch, share: Share, grads: &mut [f32], sum: &mut Update, epoch: &mut Epoch) {
        let norms = Rc::new(RefCell::new(vec![0.0; sum.activation_norms.len()]));
        let tape = Tape::new(self.engine, self.params, self.arena).with_precision(self.precision);
        let mut tape = tape.with_checkpoints(self.checkpoints);
        let documents = Documents::new(part.tokens_n.clone(), part.offsets_b1.clone());
        let seen = norms.clone();
        let watch =
            Rc::new(move |tape: &mut Tape<'_, f32>, layer: usize, value: &Value<f32>, offsets: &Arc<[usize]>| {
                let (norms, offsets, width) = (seen.clone(), offsets.clone(), value.width());
                tape.watch(value, move |g| norms.borrow_mut()[layer] += document_norms(g, &offsets, width));
            });
        let output = self.model.forward(&mut tape, &documents, self.policies, Mode::Train, Context::Documents, watch);
        let targets = Targets { ids_n: part.targets_n.clone().into(), weights_n: part.loss_weights_n.clone().into() };
        let found = loss::loss(&mut tape, self.model, &output, &targets, self.coefficients, share);
        let observe_span = profile::span("observe", Direction::Update, Work::default());
        for (slot, trace) in output.experts.iter().enumerate() {
            let (scores, Documents { tokens_n, offsets_b1 }) = (&trace.scores_ne, &trace.documents);
            let input = RouterInput::new(offsets_b1, tokens_n, trace.layer).with_scores(scores.data(), scores.width());
            self.policies[slot].observe(&mut sum.observations[slot], &input, &trace.routing);
            epoch.observe(slot, scores.data(), &trace.routing, tokens_n);
            sum.add_experts(trace.layer, share.tokens * trace.routing.active_per_token());
            if self.keeps_routings {
                sum.routings.push(trace.routing.clone());
            }
        }
        for trace in &output.depths {
            let (foretold, agreed) = trace.target.foretold(trace.scores_n1.data());
            add(
                &mut sum.depths,
                trace.layer,
                [trace.selection.share(), foretold, agreed].map(|mean| share.tokens * mean),
            );
        }
        for trace in &output.windows {
            let (mean, masked) = trace.mean_and_masked();
            add(&mut sum.windows, trace.layer, [mean, masked].map(|mean| share.tokens * mean));
        }
        drop((observe_span, output));
        sum.add_losses(&found, part, share);
        tape.backward(&found.total, grads);
        sum.activation_norms.iter_mut().zip(norms.take()).for_each(|(s, n)| *s += n);
    }
}

impl Update {
    pub(crate) fn empty(layers: usize, sparse: usize) -> Self {
        Update {
            cross_entropy: 0.0,
            total: 0.0,
            auxiliary: Vec::new(),
            document_losses: Vec::new(),
            loss_sum: 0.0,
            experts_per_token: Vec::new(),
            depths: Vec::new(),
            windows: Vec::new(),
            activation_norms: vec![0.0; layers],
            param_norms: Vec::new(),
            ratios: Vec::new(),
            grad_norm: 0.0,
            clipped: false,
            scale_mean: 1.0,
            noise: None,
            routing_changed: None,
            routings: Vec::new(),
            observations: vec![Observation::default(); sparse],
        }
    }

    /// Mean over the sparse blocks of the experts of a token; none for a dense model.
    pub fn mean_experts(&self) -> Option<f64> {
        let sum: f64 = self.experts_per_token.iter().map(|(_, experts)| experts).sum();
        (!self.experts_per_token.is_empty()).then(|| sum / self.experts_per_token.len() as f64)
    }

    /// Mean over the routed blocks of the share of the tokens that they took; none without a mixture of depths.
    pub fn mean_taken(&self) -> Option<f64> {
        let sum: f64 = self.depths.iter().map(|(_, [taken, ..])| taken).sum();
        (!self.depths.is_empty()).then(|| sum / self.depths.len() as f64)
    }

    /// Mean window and share of earlier keys that windows hide, mean over the blocks; none where tokens have no windows of their own.
    pub fn window(&self) -> Option<[f64; 2]> {
        let mean =
            |which: usize| self.windows.iter().map(|(_, found)| found[which]).sum::<f64>() / self.windows.len() as f64;
        (!self.windows.is_empty()).then(|| [mean(0), mean(1)])
    }

    pub(crate) fn add_experts(&mut self, layer: usize, active: f64) {
        match self.experts_per_token.iter_mut().find(|(l, _)| *l == layer) {
            Some((_, mean)) => *mean += active,
            None => self.experts_per_token.push((layer, active)),
        }
    }

    fn add_losses(&mut self, found: &loss::Loss<f32>, part: &Batch, share: Share) {
        self.cross_entropy += share.weights * found.cross_entropy;
        self.total += f64::from(found.total.scalar());
        for a in &found.auxiliary {
            self.add_auxiliary(Auxiliary { value: share.tokens * a.value, ..a.clone() });
        }
        self.add_documents(&part.offsets_b1, &found.losses_n);
    }

    pub(crate) fn add_auxiliary(&mut self, more: Auxiliary) {
        match self.auxiliary.iter_mut().find(|s| (s.name, s.layer) == (more.name, more.layer)) {
            Some(s) => s.value += more.value,
            None => self.auxiliary.push(more),
        }
    }

    /// Adds the losses of rows, document by document.
    pub(crate) fn add_documents(&mut self, offsets_b1: &[usize], losses_n: &[f64]) {
        for rows in offsets_b1.windows(2).filter(|rows| rows[0] < rows[1]) {
            let losses = &losses_n[rows[0]..rows[1]];
            let total: f64 = losses.iter().sum();
            self.loss_sum += total;
            self.document_losses.push(total / losses.len() as f64);
        }
    }
}

/// Adds what was measured in a layer.
fn add<const N: usize>(sums: &mut Vec<(usize, [f64; N])>, layer: usize, measured: [f64; N]) {
    match sums.iter_mut().find(|(l, _)| *l == layer) {
        Some((_, sums)) => sums.iter_mut().zip(measured).for_each(|(sum, more)| *sum += more),
        None => sums.push((layer, measured)),
    }
}

/// Σ over documents of the Frobenius norm of their rows: with a loss that is the mean over b documents this is the mean over documents of
/// ‖∂L_document/∂x‖.
fn document_norms(gradient: &[f32], offsets_b1: &[usize], width: usize) -> f64 {
    let documents = offsets_b1.windows(2).map(|rows| &gradient[rows[0] * width..rows[1] * width]);
    sums_of_squares(&documents.collect::<Vec<_>>()).into_iter().map(f64::sqrt).sum()
}

/// The trainer's own pool; 0 = one thread per core.
pub fn thread_pool(threads: usize) -> Result<rayon::ThreadPool, TrainError> {
    rayon::ThreadPoolBuilder::new()
        .num_threads(threads)
        .thread_name(|i| format!("moe-lab-{i}"))
        .build()
        .map_err(|error| TrainError::Usage(format!("threads = {threads}: {error}; use fewer threads")))
}

#[cfg(test)]
pub(crate) mod small {
    //! A small learner and a batch for tests of what an update is made of.

    use super::*;

    /// Plain SGD without scaled rates on four unequal documents of 20 words, changed by `sets`.
    pub fn learner(sets: &[&str]) -> (Learner, Train, Batch) {
        let fixed = [
            "threads=1",
            "model.hidden_size=16",
            "model.num_layers=2",
            "model.num_heads=4",
            "model.num_kv_heads=2",
            "model.intermediate_size=12",
            "model.heads={routed=0}",
            "train.optimizer=sgd",
            "train.lr_scale=none",
        ];
        let sets: Vec<String> = fixed.iter().chain(sets).map(|set| set.to_string()).collect();
        let run = Run::from_toml_str("", std::path::Path::new("."), &sets).unwrap();
        let settings = run.phase("facts");
        let lengths = [5usize, 3, 9, 4];
        let mut batch = Batch { offsets_b1: vec![0], ..Batch::default() };
        for (document, &length) in lengths.iter().enumerate() {
            batch.tokens_n.extend((0..length as u32).map(|i| (i * 7 + document as u32) % 20));
            batch.targets_n.extend((0..length as u32).map(|i| (i * 5 + 3 * document as u32) % 20));
            batch.loss_weights_n.extend(std::iter::repeat_n(1.0 / length as f64, length));
            batch.offsets_b1.push(batch.tokens_n.len());
            batch.documents.push(document);
        }
        (Learner::new(&run, 20, &settings).unwrap(), settings, batch)
    }

    /// One update that moves nothing: what it measured; its gradient stays in the learner.
    pub fn look(learner: &mut Learner, settings: &Train, batch: &Batch) -> Update {
        let mut epoch = Epoch::new(&learner.policies);
        learner.update(batch, settings, 0.0, &mut epoch, None).unwrap()
    }
}
