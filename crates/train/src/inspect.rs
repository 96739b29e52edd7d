//! Looks that train nothing: what this machine has, what is in data files, and the loss with every gradient for an oracle.

use crate::checkpoint;
use crate::data::statistics::training_texts;
use crate::data::{DataReport, ItemFile, Role, Tokenizer};
use crate::error::TrainError;
use crate::loss::{self, Share};
use crate::run::Run;
use model::transformer::{Context, Documents, Forward, Transformer, unwatched};
use moe_router::Mode;
use serde_json::{Map, Value, json};
use std::path::Path;
use std::time::Instant;
use tensor::kernels::gemm::{Matrix, matmul};
use tensor::ops::cross_entropy::Targets;
use tensor::ops::linear::linear;
use tensor::{Arena, Engine, Precision, Real, Tape};

/// Largest model whose gradients are handed out as copies in f64.
const MAX_INSPECTED: u64 = 1 << 30;

/// Statistics of data files (None: the shipped one) as JSON and as a text table.
pub fn data_stats(
    facts: Option<&str>,
    chat: Option<&str>,
    paraphrases: Option<&str>,
) -> Result<(String, String), TrainError> {
    let usage = |error: crate::data::DataError| TrainError::Usage(error.to_string());
    let read = |path: Option<&str>, role| match path {
        Some(path) => ItemFile::read(Path::new(path), role),
        None => ItemFile::shipped(role),
    };
    let facts = read(facts, Role::Facts).map_err(usage)?;
    let held_out = match (paraphrases, chat) {
        (None, Some(_)) => None, // the shipped paraphrases ask the shipped chat alone
        (path, _) => Some(read(path, Role::Paraphrases).map_err(usage)?),
    };
    let chat = read(chat, Role::Chat).map_err(usage)?;
    let files: Vec<ItemFile> = [Some(facts), Some(chat), held_out].into_iter().flatten().collect();
    let tokenizer = Tokenizer::words(training_texts(&files));
    let report = DataReport::new(&files, &tokenizer, Run::default().data.max_length).map_err(usage)?;
    let json = serde_json::to_string(&report).map_err(|error| TrainError::Failed(error.to_string()))?;
    Ok((json, report.to_string()))
}

/// A tensor by name, in f64 whatever it was computed in.
pub struct Named {
    pub name: String,
    pub shape: Vec<usize>,
    pub data: Vec<f64>,
}

/// Loss and gradients of a set of documents.
pub struct LossAndGradients {
    pub weights: Vec<Named>,
    pub gradients: Vec<Named>,
    pub logits_nv: Vec<f64>,
    pub cross_entropy: f64,
    pub total: f64,
    /// Auxiliary losses, unscaled means over layers.
    pub losses: Vec<(&'static str, f64)>,
    /// Per sparse layer and token the ids of its experts.
    pub experts: Vec<Vec<Vec<u32>>>,
}

/// One forward and backward pass over `documents` as one batch, from the weights of a model.safetensors or a fresh initialisation.
pub fn loss_and_gradients(
    config_toml: &str,
    weights: Option<&Path>,
    documents: &[Vec<u32>],
    vocab_size: usize,
    engine: &str,
    dtype: &str,
) -> Result<LossAndGradients, TrainError> {
    let run = Run::parse(config_toml).map_err(|error| TrainError::Usage(error.to_string()))?;
    // An engine other than torch has no device; torch may name one: "torch:cuda".
    let (engine, device) = engine.split_once(':').unwrap_or((engine, "cpu"));
    let engine: Engine = serde_json::from_value(json!(engine))
        .map_err(|_| TrainError::Usage(format!("engine = {engine:?}: must be \"cpu\", \"reference\" or \"torch\"")))?;
    engine.check(device).map_err(|error| TrainError::Usage(error.to_string()))?;
    if let Some((i, _)) =
        documents.iter().enumerate().find(|(_, d)| d.len() < 2 || d.iter().any(|id| *id as usize >= vocab_size))
    {
        return Err(TrainError::Usage(format!(
            "document {i}: needs 2 tokens or more, every id below vocab_size = {vocab_size}"
        )));
    }
    if run.model.num_parameters(vocab_size).is_none_or(|count| count > MAX_INSPECTED) {
        let text = format!("vocab_size = {vocab_size}: makes a model of more than 2^30 numbers; lower it");
        return Err(TrainError::Usage(text));
    }
    let model = Transformer::new(&run.model, vocab_size);
    if let (Some(max), Some(longest)) = (run.model.max_positions(), documents.iter().map(Vec::len).max())
        && longest - 1 > max
    {
        return Err(TrainError::Usage(format!("a document has {} inputs but model.position.max = {max}", longest - 1)));
    }
    let params = match weights {
        Some(path) => checkpoint::read_weights(path, &model.layout)?,
        None => model.initialise(run.seed).into_iter().map(f64::from).collect(),
    };
    #[cfg(feature = "torch")]
    if engine == Engine::Torch {
        let (documents, ids, weights) = batch(documents);
        let device = tensor::torch::device(device).map_err(|error| TrainError::Usage(error.to_string()))?;
        return crate::torch::loss_and_gradients(&run, &model, &params, &documents, (&ids, &weights), dtype, device)
            .map_err(|error| TrainError::Failed(tensor::torch::first_line(&error)));
    }
    match dtype {
        "f64" => Ok(pass::<f64>(&run, &model, &params, documents, (engine, Precision::F32))),
        "f32" => Ok(pass::<f32>(&run, &model, &params, documents, (engine, Precision::F32))),
        "bf16" if engine == Engine::Reference => Err(TrainError::Usage(
            "dtype = \"bf16\": engine = \"reference\" has no bf16 products; use engine = \"cpu\"".into(),
        )),
        "bf16" => Ok(pass::<f32>(&run, &model, &params, documents, (engine, Precision::Bf16))),
        other => Err(TrainError::Usage(format!("dtype = {other:?}: must be \"f32\", \"bf16\" or \"f64\""))),
    }
}

/// Documents as one batch: inputs, the ids that follow them, and weights that make every document count 1.
fn batch(documents: &[Vec<u32>]) -> (Documents, Vec<u32>, Vec<f64>) {
    let mut offsets = vec![0];
    let (mut tokens, mut ids, mut weights) = (Vec::new(), Vec::new(), Vec::new());
    for d in documents {
        tokens.extend_from_slice(&d[..d.len() - 1]);
        ids.extend_from_slice(&d[1..]);
        weights.resize(tokens.len(), 1.0 / (d.len() - 1) as f64);
        offsets.push(tokens.len());
    }
    (Documents::new(tokens, offsets), ids, weights)
}

fn pass<T: Forward>(
    run: &Run,
    model: &Transformer,
    params: &[f64],
    documents: &[Vec<u32>],
    (engine, precision): (Engine, Precision),
) -> LossAndGradients {
    let params: Vec<T> = params.iter().map(|x| T::from_f64(*x)).collect();
    let (batch, ids, weights) = batch(documents);
    let arena = Arena::default();
    let mut tape = Tape::new(engine, &params, &arena).with_precision(precision);
    let policies = model.policies();
    let output = model.forward(&mut tape, &batch, &policies, Mode::Train, Context::Documents, unwatched());
    let logits = {
        let mut plain = Tape::inference(engine, &params, &arena).with_precision(precision);
        let hidden = plain.constant(output.hidden_nd.data(), output.hidden_nd.rows(), output.hidden_nd.width());
        linear(&mut plain, &hidden, model.output)
    };
    let targets = Targets { ids_n: ids.into(), weights_n: weights.into() };
    let found = loss::loss(&mut tape, model, &output, &targets, &run.losses, Share::WHOLE);
    let experts = output
        .experts
        .iter()
        .map(|trace| {
            let row = |t: usize| trace.row(t).map_or(Vec::new(), |t| trace.routing.row(t).to_vec());
            (0..batch.tokens_n.len()).map(row).collect()
        })
        .collect();
    drop(output);
    let total = found.total.scalar().to_f64();
    let mut flat = vec![T::ZERO; params.len()];
    tape.backward(&found.total, &mut flat);
    LossAndGradients {
        weights: named(model, &params),
        gradients: named(model, &flat),
        logits_nv: logits.data().iter().map(|x| x.to_f64()).collect(),
        cross_entropy: found.cross_entropy,
        total,
        losses: loss::means(&found.auxiliary),
        experts,
    }
}

/// The flat buffer as tensors without padding.
pub(crate) fn named<T: Real>(model: &Transformer, flat: &[T]) -> Vec<Named> {
    let tensor = |(name, param): (&str, tensor::Param)| Named {
        name: name.to_string(),
        shape: crate::layers::shape(name, param),
        data: (0..param.count).flat_map(|i| &flat[param.range(i)]).map(|x| x.to_f64()).collect(),
    };
    model.layout.iter().map(tensor).collect()
}

/// Refuses an instruction set in `MOE_LAB_ISA` that this machine lacks. Programs call it before any work.
pub fn check_machine() -> Result<(), TrainError> {
    tensor::isa::check().map(|_| ()).map_err(|error| TrainError::Usage(error.to_string()))
}

/// What this machine and this build have.
pub fn doctor() -> Map<String, Value> {
    let mut report = Map::new();
    report.insert("version".into(), json!(env!("CARGO_PKG_VERSION")));
    report.insert("engines".into(), json!({ "cpu": "in", "reference": "in", "torch": torch() }));
    for (name, value) in crate::record::machine() {
        report.insert(name, value);
    }
    report.insert("gemm_f32_gflops".into(), json!(measured_gflops().round()));
    report
}

/// Whether the torch engine is in, with which torch, on which devices.
#[cfg(feature = "torch")]
fn torch() -> String {
    tensor::torch::describe()
}

#[cfg(not(feature = "torch"))]
fn torch() -> String {
    "not in this build (make build-torch)".into()
}

/// The best of a few 768³ products on all cores, GFLOP/s.
fn measured_gflops() -> f64 {
    const SIZE: usize = 768;
    let (a, b, mut c) = (vec![1.0f32; SIZE * SIZE], vec![0.5f32; SIZE * SIZE], vec![0.0f32; SIZE * SIZE]);
    let mut best = 0.0f64;
    for _ in 0..6 {
        let start = Instant::now();
        matmul(Precision::F32, &mut c, Matrix::new(&a, SIZE, SIZE), Matrix::new(&b, SIZE, SIZE), false);
        best = best.max(2.0 * (SIZE as f64).powi(3) / start.elapsed().as_secs_f64() / 1e9);
    }
    best
}
