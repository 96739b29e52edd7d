//! What a run will take, before it is begun: memory, disk, time. Memory is counted array by array as the ops keep them for the walk back;
//! `make bench ARGS=--memory` shows how near that comes to the measured peak.

use crate::bench::product_flops;
use crate::data::{Batch, DocumentSet};
use crate::dataset::{Dataset, Phase, PhaseData};
use crate::epoch::Epoch;
use crate::error::TrainError;
use crate::flops;
use crate::learner::{Learner, thread_pool};
use crate::run::{Run, Train};
use crate::{directory, optimizers, record};
use model::config::{DepthChoice, MAX_LAYERS};
use moe_router::statistics::sample_bytes;
use serde_json::{Map, Value, json};
use std::time::Instant;
use tensor::Random;
use tensor::ops::attention::numbers_of_backward;
use tensor::random::Purpose;

/// A process that has loaded nothing, bytes.
const PROCESS: f64 = 10e6;
/// What comes to it in training beside the arrays below: rooms of the products, gaps of the heap.
const HEAP: f64 = 3e6;
/// Logits that the cross-entropy holds at a time, in numbers.
const LOGITS: f64 = (1u64 << 19) as f64;
/// Numbers of weights that one op packs at most.
const PACKED: f64 = (1u64 << 23) as f64;
/// A step that is expected to take longer is not measured but guessed from a product.
const LONGEST_STEP: f64 = 0.3;
/// Share of the rate of a product that a whole step reaches, for the guess.
const STEP_SHARE: f64 = 0.5;

/// Memory of a training process at its peak, bytes.
#[derive(Clone, Copy, Debug)]
pub struct Memory {
    pub params: f64,
    pub gradients: f64,
    pub optimizer: f64,
    pub activations: f64,
    /// What the process holds beside the model now, and what an epoch notes of its routing.
    pub process: f64,
}

impl Memory {
    /// For batches of `tokens` tokens in documents of `longest` at most, epochs of `epoch` tokens and router scores of standard deviation `score_std`.
    /// Sizes may be absurd: nothing is allocated.
    pub fn new(run: &Run, vocab: usize, [tokens, longest, epoch]: [usize; 3], score_std: f64) -> Self {
        let number = size_of::<f32>() as f64;
        let params = number * run.model.num_parameters(vocab).map_or(f64::INFINITY, |count| count as f64);
        let train = run.phase(run.phases()[0]);
        let moments = optimizers::moments(train.optimizer_kind(), &train.optimizer_settings()) as f64;
        let batch = [tokens, longest.clamp(1, tokens.max(1))].map(|count| count as f64);
        let noted = run.model.router.experts().map_or(0.0, |e| {
            let active = experts_per_token(run, e.num_experts, score_std);
            run.model.num_layers as f64 * sample_bytes(epoch as f64, active)
        });
        Memory {
            params,
            // With a copy of the parameters or of the gradients set aside.
            gradients: if train.sam > 0.0 || train.noise_scale > 0 { 2.0 * params } else { params },
            optimizer: moments * params,
            activations: number * activations(run, train.activation_checkpointing, vocab, batch, score_std),
            process: record::memory_bytes().map_or(PROCESS, |bytes| bytes as f64) + HEAP + noted,
        }
    }

    pub fn peak(&self) -> f64 {
        self.params + self.gradients + self.optimizer + self.activations + self.process
    }

    /// An error with the estimate and the remedy where this machine has not the memory.
    pub fn check(&self, remedy: &str) -> Result<(), TrainError> {
        let Some(have) = record::memory_limit() else { return Ok(()) };
        if self.peak() <= have as f64 {
            return Ok(());
        }
        let gib = |bytes: f64| bytes / (1u64 << 30) as f64;
        let state = self.params + self.gradients + self.optimizer;
        Err(TrainError::Usage(format!(
            "training needs about {:.1} GiB ({:.1} for parameters, gradients and optimizer, {:.1} for activations) but this machine has {:.1} GiB; choose {remedy}",
            gib(self.peak()),
            gib(state),
            gib(self.activations),
            gib(have as f64)
        )))
    }
}

/// Numbers that live at once where most do: at the end of the forward pass, with the buffers of loss and feed-forward on the walk back, or where
/// that has left the last feed-forward behind and is in attention. With `checkpoints` only the stream and the routers' scores of a block are kept, and the
/// rest of one block at a time.
fn activations(run: &Run, checkpoints: bool, vocab: usize, [n, longest]: [f64; 2], score_std: f64) -> f64 {
    let model = &run.model;
    let (d, heads, layers) = (model.hidden_size as f64, model.num_heads as f64, model.num_layers as f64);
    let kv = d / heads * model.num_kv_heads as f64;
    let mixture = if model.heads.routed > 0 { d + 3.0 * heads } else { 0.0 };
    // Two sums of the residual stream, two normed inputs, q, k, v, the heads' output, and what their softmax needs.
    let attention = 6.0 * d + 2.0 * kv + 2.0 * heads + mixture;
    // SwiGLU keeps gate and up, and on the way back the hidden rows: as numbers, or as bf16.
    let size = if run.dtype == tensor::Precision::Bf16 { 0.5 } else { 1.0 };
    let (passing, rows) = match model.router.experts() {
        None => (size * model.intermediate_size as f64, 0.0),
        Some(e) => {
            let active = experts_per_token(run, e.num_experts, score_std);
            let (shared, scores) = (e.shared_width() as f64, 2.0 * e.num_experts as f64);
            (size * (active * e.expert_hidden_size as f64 + shared), 2.0 * active * d + scores)
        }
    };
    let scores = model.router.experts().map_or(0.0, |e| e.num_experts as f64) + model.heads.routed as f64;
    let block = attention + 2.0 * passing;
    // A routed block keeps what a block keeps of the tokens it takes, those tokens and what it adds to them, and the stream of all.
    let routed = (0..model.num_layers.min(MAX_LAYERS)).filter(|&i| model.depths.routes(i)).count() as f64;
    // By their own word half of the tokens are taken at the start, when scores are above 0 as often as below.
    let share = match model.depths.choice {
        DepthChoice::Best => model.depths.capacity,
        DepthChoice::Causal => model.depths.capacity.max(0.5),
    };
    let part = share * (block + 2.0 * d) + d;
    let blocks = if checkpoints { layers * (d + scores) + block } else { (layers - routed) * block + routed * part };
    let width = model.hidden_size / model.num_heads.max(1);
    let [shared, scratch] = numbers_of_backward(
        [n / longest, longest],
        model.window,
        [width * model.num_kv_heads, width],
        directory::threads(run.threads),
    );
    let v = vocab as f64;
    // Weights as packed for the products of an op: of the experts, of attention, of the output projection in both directions.
    let experts = model.router.experts().map_or(0.0, |e| 3.0 * e.num_experts as f64 * e.expert_hidden_size as f64 * d);
    let packed = [experts, d * (d + 2.0 * kv), 2.0 * v * d].map(|count| if count > PACKED { 0.0 } else { count });
    let at_loss = n * (6.0 * d + passing + rows) + v * d + LOGITS.max(256.0 * v).min(n * v);
    // Gradients of the stream, the heads' output, q, k and v, and what the items of long documents found.
    let last = if model.num_layers > 0 && model.depths.routes(model.num_layers - 1) { share } else { 1.0 };
    let at_attention = n * (3.0 * d + 2.0 * kv - 2.0 * last * passing) + shared;
    n * blocks + at_loss.max(at_attention) + scratch + packed.iter().sum::<f64>()
}

/// Experts of a token whose scores are normal with this standard deviation: the mean over fixed draws.
fn experts_per_token(run: &Run, num_experts: usize, score_std: f64) -> f64 {
    const DRAWS: u64 = 256;
    let p = match &run.model.router {
        moe_router::Config::TopP { target: Some(target), .. } => return *target,
        moe_router::Config::TopP { p, .. } => p.at(0),
        // A gate exceeds 1 % as long as the mass before it is below p + τ ln 99.
        moe_router::Config::LearnedP { temperature, .. } => {
            moe_router::learned_p::threshold(0.0) + temperature * 99f64.ln()
        }
        moe_router::Config::TopK { k, .. } | moe_router::Config::Forced { k, .. } => return *k as f64,
        moe_router::Config::ExpertChoice { k, .. } => return *k,
        moe_router::Config::Dense {} => return 1.0,
    };
    let random = Random::new(0, Purpose::Sampling);
    let num_experts = num_experts.min(1024);
    let chosen = |draw: u64| {
        let mut mass: Vec<f64> = (0..num_experts as u64).map(|e| (score_std * random.normal(draw, e)).exp()).collect();
        mass.sort_by(|a, b| b.total_cmp(a));
        let total: f64 = mass.iter().sum();
        let mut sum = 0.0;
        1 + mass
            .iter()
            .take_while(|m| {
                sum += **m;
                sum <= p * total
            })
            .count()
            .min(num_experts - 1)
    };
    (0..DRAWS).map(|draw| chosen(draw) as f64).sum::<f64>() / DRAWS as f64
}

/// Standard deviation of a fresh router's scores of a normed input.
fn initial_score_std(run: &Run) -> f64 {
    run.model.router.experts().map_or(0.0, |e| e.init_std * (run.model.hidden_size as f64).sqrt())
}

/// Tokens of the largest batch of the first epoch of any phase, whole (before accumulation), and its phase. Sizes may be absurd: nothing of
/// theirs is allocated.
fn largest_batch<'a>(run: &Run, dataset: &'a Dataset) -> (usize, &'a Phase) {
    let tokens = |phase: &Phase| match &phase.data {
        PhaseData::Documents { train, .. } => longest(train, run.phase(phase.name).batch_size).iter().sum(),
        PhaseData::Text(_) => run.data.block_size.saturating_mul(run.phase(phase.name).batch_size),
    };
    let first = &dataset.phases[0];
    dataset.phases.iter().skip(1).fold((tokens(first), first), |largest, phase| match tokens(phase) {
        count if count > largest.0 => (count, phase),
        _ => largest,
    })
}

/// Targets of the longest documents, `count` or all of them.
fn longest(set: &DocumentSet, count: usize) -> Vec<usize> {
    let mut lengths: Vec<usize> = set.documents.iter().map(|document| document.targets()).collect();
    lengths.sort_unstable_by(|a, b| b.cmp(a));
    lengths.truncate(count);
    lengths
}

/// Document offsets of the largest batch of a phase.
fn offsets(run: &Run, phase: &Phase) -> Vec<usize> {
    let batch_size = run.phase(phase.name).batch_size;
    let lengths = match &phase.data {
        PhaseData::Documents { train, .. } => longest(train, batch_size),
        PhaseData::Text(text) => vec![text.longest(); batch_size * run.data.block_size / text.longest()],
    };
    lengths.iter().fold(vec![0], |mut offsets, length| {
        offsets.push(offsets[offsets.len() - 1] + length);
        offsets
    })
}

/// Refuses a run that does not fit into this machine, before anything of its size is allocated.
pub fn check(run: &Run, dataset: &Dataset) -> Result<(), TrainError> {
    if run.device != "cpu" {
        return Ok(()); // a step that finds no memory there says so and is saved before
    }
    memory(run, dataset).check("a smaller train.batch_size, a larger train.accumulate or smaller model sizes")
}

fn memory(run: &Run, dataset: &Dataset) -> Memory {
    let (tokens, phase) = largest_batch(run, dataset);
    let part = tokens.div_ceil(run.phase(phase.name).accumulate.max(1));
    let longest = match &phase.data {
        PhaseData::Documents { train, .. } => longest(train, 1).iter().sum(),
        PhaseData::Text(text) => text.longest(),
    };
    // A text is as long as one likes.
    let epoch = |phase: &Phase| match &phase.data {
        PhaseData::Documents { train, .. } => train.documents.iter().map(|document| document.targets()).sum(),
        PhaseData::Text(_) => usize::MAX,
    };
    let epoch = dataset.phases.iter().map(epoch).max().unwrap_or(0);
    Memory::new(run, dataset.tokenizer.vocab_size(), [part, longest, epoch], initial_score_std(run))
}

/// The estimates of `--check`: memory, disk, time. `steps` is the whole run's.
pub fn plan(run: &Run, dataset: &Dataset, learner: Learner, steps: u64) -> Result<Map<String, Value>, TrainError> {
    let memory = memory(run, dataset);
    let (tokens, phase) = largest_batch(run, dataset);
    let step = time(run, learner, &offsets(run, phase), &run.phase(phase.name))?;
    let mut plan = Map::new();
    let mut put = |name: &str, value: Value| plan.insert(name.to_owned(), value);
    put("largest_batch_tokens", json!(tokens));
    put("params_bytes", json!(memory.params as u64));
    put("optimizer_bytes", json!(memory.optimizer as u64));
    put("activation_bytes", json!(memory.activations as u64));
    put("peak_memory_bytes", json!(memory.peak() as u64));
    // The last ones, the best one, and the one that is being written before the oldest goes.
    let checkpoints = run.checkpoint.keep as f64 + 2.0;
    put("checkpoint_bytes", json!((memory.params + memory.optimizer) as u64));
    put("checkpoints_disk_bytes", json!((checkpoints * (memory.params + memory.optimizer)) as u64));
    put("seconds_per_step", json!(step.seconds));
    put("seconds_estimate", json!(step.seconds * steps as f64));
    put("time_estimated_from", json!(step.source));
    Ok(plan)
}

struct StepTime {
    seconds: f64,
    source: &'static str,
}

/// Seconds of a step on the largest batch: measured on random tokens where that is quick, else guessed from the rate of a product.
fn time(run: &Run, mut learner: Learner, offsets: &[usize], settings: &Train) -> Result<StepTime, TrainError> {
    const PROBE: usize = 384;
    let vocab = learner.model.vocab_size;
    let experts =
        run.model.router.experts().map_or(0.0, |e| experts_per_token(run, e.num_experts, initial_score_std(run)));
    let rate = STEP_SHARE * thread_pool(run.threads)?.install(|| product_flops(run, PROBE, 3));
    let guess = flops::step(&run.model, vocab, offsets, experts, None) / rate;
    if guess > LONGEST_STEP && run.device == "cpu" {
        return Ok(StepTime { seconds: guess, source: "matrix product (a guess)" });
    }
    let n = offsets[offsets.len() - 1];
    let random = Random::new(run.seed, Purpose::Bench);
    let ids = |step: u64| (0..n as u64).map(|i| random.below(step, i, vocab) as u32).collect::<Vec<u32>>();
    let batch = Batch {
        tokens_n: ids(0),
        targets_n: ids(1),
        loss_weights_n: vec![1.0; n],
        offsets_b1: offsets.to_vec(),
        documents: (0..offsets.len() - 1).collect(),
    };
    let mut epoch = Epoch::new(&learner.policies);
    let mut best = f64::INFINITY;
    for _ in 0..3 {
        let start = Instant::now();
        learner.update(&batch, settings, 0.0, &mut epoch, None)?;
        best = best.min(start.elapsed().as_secs_f64());
        if start.elapsed().as_secs_f64() > LONGEST_STEP {
            break;
        }
    }
    Ok(StepTime { seconds: best, source: "measured step" })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_expected_number_of_experts_is_that_of_the_policy() {
        let mut run = Run::default();
        let mut mean = |router: &str, std: f64| {
            run.model.router = serde_json::from_str(router).unwrap();
            experts_per_token(&run, run.model.router.experts().unwrap().num_experts, std)
        };
        assert_eq!(mean(r#"{"kind": "top_k", "k": 3}"#, 1.0), 3.0);
        assert_eq!(mean(r#"{"kind": "top_p", "p": 1.0}"#, 1.0), 8.0);
        assert_eq!(mean(r#"{"kind": "top_p", "p": 0.4, "num_experts": 4}"#, 1e-9), 2.0, "uniform scores");
        let sure = mean(r#"{"kind": "top_p", "p": 0.4}"#, 50.0);
        assert!((1.0..1.2).contains(&sure), "{sure}");
    }

    #[test]
    fn shared_experts_take_what_a_dense_layer_of_their_width_takes_more() {
        let memory = |router: &str, width: usize| {
            let mut run = Run::default();
            run.model.router = serde_json::from_str(router).unwrap();
            run.model.intermediate_size = width;
            Memory::new(&run, 1000, [640, 64, 0], 0.0)
        };
        let [plain, shared] = [0, 3].map(|shared| memory(&format!(r#"{{"kind": "top_k", "shared": {shared}}}"#), 256));
        let [narrow, wide] = [256, 256 + 3 * 64].map(|width| memory(r#"{"kind": "dense"}"#, width));
        assert_eq!(shared.activations - plain.activations, wide.activations - narrow.activations);
        assert_eq!(shared.params - plain.params, wide.params - narrow.params);
        assert!(shared.params > plain.params && shared.activations > plain.activations);
    }

    #[test]
    fn in_bf16_the_rows_of_swiglu_take_half() {
        let activations = |dtype: tensor::Precision| {
            let mut run = Run { dtype, ..Run::default() };
            run.model.router = serde_json::from_str(r#"{"kind": "dense"}"#).unwrap();
            (run.model.num_layers, run.model.intermediate_size) = (3, 256);
            Memory::new(&run, 1000, [640, 64, 0], 0.0).activations
        };
        // Gate and up of every layer, and the hidden rows of one.
        let saved = activations(tensor::Precision::F32) - activations(tensor::Precision::Bf16);
        assert_eq!(saved, 4.0 * 640.0 * 0.5 * (3.0 * 2.0 * 256.0 + 256.0));
    }

    #[test]
    fn routed_blocks_take_less() {
        let activations = |capacity: f64| {
            let mut run = Run::default();
            (run.model.num_layers, run.model.depths.capacity) = (8, capacity);
            Memory::new(&run, 1000, [640, 64, 0], 0.0).activations
        };
        assert!(activations(0.125) < activations(0.5) && activations(0.5) < activations(1.0));
    }

    #[test]
    fn replayed_blocks_count_once() {
        let activations = |layers: usize, checkpoints: bool| {
            let mut run = Run::default();
            (run.model.num_layers, run.train.activation_checkpointing) = (layers, checkpoints);
            Memory::new(&run, 1000, [640, 64, 0], 0.0).activations
        };
        assert_eq!(
            activations(24, false) - activations(16, false),
            8.0 * (activations(2, false) - activations(1, false))
        );
        assert!(activations(24, true) < 0.25 * activations(24, false));
        assert!(activations(24, true) > activations(1, true) + 23.0 * 4.0 * 640.0 * 128.0 - 1.0, "the stream is kept");
    }

    #[test]
    fn a_run_too_large_for_the_machine_is_refused_with_the_estimate() {
        let mut run = Run::default();
        assert!(Memory::new(&run, 1000, [640, 64, 0], 0.0).check("less").is_ok());
        run.model.hidden_size = 1 << 17;
        let refused = Memory::new(&run, 1000, [640, 64, 0], 0.0).check("a smaller model").unwrap_err();
        assert_eq!(refused.exit_status(), 2);
        assert!(refused.to_string().contains("GiB; choose a smaller model"), "{refused}");
    }
}
