//! A trained model out of a run directory: text, logits, routing, the evaluation suite.

use crate::checkpoint;
use crate::data::Tokenizer;
use crate::dataset::Dataset;
use crate::directory::{RunDirectory, checkpoint_folder};
use crate::error::TrainError;
use crate::evaluate;
use crate::run::Run;
pub use model::generate::Sampling;
use model::generate::Weights;
use model::transformer::{Context, Documents, Transformer, unwatched};
use moe_router::{Mode, Policy};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use std::path::Path;
use tensor::{Arena, Engine, Precision, Tape};

/// Longest text that is generated at once; it cannot be interrupted.
const MAX_TOKENS: usize = 100_000;

pub struct Trained {
    /// The run the model came from, where it was given as a run directory.
    run: Option<Run>,
    model: Transformer,
    params: Vec<f32>,
    policies: Vec<Policy>,
    tokenizer: Tokenizer,
    pool: rayon::ThreadPool,
}

/// config.json of a checkpoint: the architecture, enough to use the weights without the run.
#[derive(Serialize, Deserialize)]
struct SavedConfig {
    model_type: String,
    vocab_size: usize,
    model: model::Model,
}

/// The text of config.json.
pub fn config_json(model: &Transformer) -> String {
    let config =
        SavedConfig { model_type: "moe_lab".into(), vocab_size: model.vocab_size, model: model.config.clone() };
    format!("{:#}\n", json!(config))
}

/// Where the tokens of a text went.
pub struct Routed {
    pub tokens: Vec<String>,
    pub layers: Vec<RoutedLayer>,
}

/// One sparse layer: the experts of every token with their weights, best first, and all probabilities [n, e].
pub struct RoutedLayer {
    pub layer: usize,
    pub num_experts: usize,
    pub experts: Vec<Vec<u32>>,
    pub weights: Vec<Vec<f32>>,
    pub probabilities_ne: Vec<f32>,
}

impl Trained {
    /// `path` is a run directory (its newest checkpoint, or the one called `checkpoint`) or a checkpoint folder. A damaged checkpoint is refused.
    pub fn load(path: &Path, checkpoint: Option<&str>) -> Result<Self, TrainError> {
        let folder = checkpoint_folder(path, checkpoint)?;
        let files = checkpoint::read_texts(&folder).map_err(|error| TrainError::Failed(error.to_string()))?;
        let config: SavedConfig = serde_json::from_str(&files.config)
            .map_err(|error| TrainError::Failed(format!("{}: config.json: {error}", folder.display())))?;
        config
            .model
            .validate()
            .map_err(|error| TrainError::Failed(format!("{}: config.json: {error}", folder.display())))?;
        let run = match path.join("run.toml") {
            file if file.is_file() => Some(RunDirectory::read_run(path)?),
            _ => None,
        };
        let tokenizer = Tokenizer::from_bytes(&folder.join("tokenizer.json").display().to_string(), &files.tokenizer)
            .map_err(|error| TrainError::Failed(error.to_string()))?;
        let model = Transformer::new(&config.model, tokenizer.vocab_size());
        let loaded = checkpoint::load(&folder, &model.layout).map_err(|error| TrainError::Failed(error.to_string()))?;
        let mut policies = model.policies();
        let controls: Vec<moe_router::Control> = serde_json::from_value(loaded.state["controls"].clone())
            .map_err(|error| TrainError::Failed(format!("{}: state.json: {error}", folder.display())))?;
        for (layer, (policy, control)) in policies.iter_mut().zip(controls).enumerate() {
            policy
                .restore(control, layer)
                .map_err(|error| TrainError::Failed(format!("{}: {error}", folder.display())))?;
        }
        let pool = crate::learner::thread_pool(0)?;
        Ok(Trained { params: loaded.params, run, model, policies, tokenizer, pool })
    }

    /// As the run trained; f32 for a checkpoint folder alone.
    fn precision(&self) -> Precision {
        self.run.as_ref().map_or(Precision::F32, |run| run.dtype)
    }

    fn weights(&self) -> Weights<'_> {
        Weights {
            transformer: &self.model,
            params: &self.params,
            policies: &self.policies,
            engine: Engine::Cpu,
            precision: self.precision(),
        }
    }

    /// Token ids of a text; empty texts and texts too long for learned positions are refused.
    fn encode(&self, text: &str) -> Result<Vec<u32>, TrainError> {
        let tokens = self.tokenizer.encode(text).map_err(|error| TrainError::Usage(error.to_string()))?;
        if tokens.is_empty() {
            return Err(TrainError::Usage("the text is empty; give at least one word".into()));
        }
        match self.model.config.max_positions() {
            Some(max) if tokens.len() > max => Err(TrainError::Usage(format!(
                "the text has {} tokens but the model has {max} positions; shorten it",
                tokens.len()
            ))),
            _ => Ok(tokens),
        }
    }

    fn stop(&self) -> Option<u32> {
        match self.tokenizer.end()[..] {
            [id] => Some(id),
            _ => None,
        }
    }

    /// The continuation of `prompt`, without it.
    pub fn generate(
        &self,
        prompt: &str,
        max_tokens: usize,
        sampling: Sampling,
        cache: bool,
    ) -> Result<String, TrainError> {
        sampling.validate().map_err(TrainError::Usage)?;
        if max_tokens > MAX_TOKENS {
            return Err(TrainError::Usage(format!("max_tokens = {max_tokens}: {MAX_TOKENS} are the most")));
        }
        let tokens = self.encode(prompt)?;
        let given = self.pool.install(|| self.weights().generate(&tokens, max_tokens, self.stop(), sampling, cache));
        Ok(self.tokenizer.decode(&given))
    }

    /// Logits [n, v], row after row.
    pub fn logits(&self, text: &str) -> Result<Vec<f32>, TrainError> {
        let tokens = self.encode(text)?;
        Ok(self.pool.install(|| self.weights().logits(&tokens)))
    }

    pub fn route(&self, text: &str) -> Result<Routed, TrainError> {
        let tokens = self.encode(text)?;
        let arena = Arena::default();
        let layers = self.pool.install(|| {
            let mut tape = Tape::inference(Engine::Cpu, &self.params, &arena).with_precision(self.precision());
            let documents = Documents::new(tokens.clone(), vec![0, tokens.len()]);
            let output = self.model.forward(
                &mut tape,
                &documents,
                &self.policies,
                Mode::Evaluate,
                Context::Documents,
                unwatched(),
            );
            let layer = |trace: &model::transformer::ExpertTrace<f32>| {
                let num_experts = trace.scores_ne.width();
                let routing = &trace.routing;
                RoutedLayer {
                    layer: trace.layer,
                    num_experts,
                    experts: (0..tokens.len()).map(|t| routing.row(t).to_vec()).collect(),
                    weights: (0..tokens.len()).map(|t| trace.weights_a.data()[routing.span(t)].to_vec()).collect(),
                    probabilities_ne: moe_router::softmax::probabilities(trace.scores_ne.data(), num_experts),
                }
            };
            output.experts.iter().map(layer).collect()
        });
        Ok(Routed { tokens: tokens.iter().map(|&id| self.tokenizer.token(id)).collect(), layers })
    }

    /// The evaluation suite on the data of the run: losses, recitation of training questions, held-out paraphrases.
    pub fn evaluate(&self) -> Result<Map<String, Value>, TrainError> {
        let run = self.run.as_ref().ok_or_else(|| {
            TrainError::Usage(
                "a checkpoint folder alone does not say which data to evaluate on; give the run directory".into(),
            )
        })?;
        let dataset = Dataset::load(run).map_err(|error| TrainError::Usage(error.to_string()))?;
        if dataset.tokenizer.sha256() != self.tokenizer.sha256() {
            return Err(TrainError::Failed(
                "the data of the run have another vocabulary now than when it was trained; restore the data files"
                    .into(),
            ));
        }
        let weights = self.weights();
        let mut found = Map::new();
        self.pool.install(|| {
            for phase in &dataset.phases {
                if let Some((mean, micro)) = evaluate::losses(&weights, &phase.documents()) {
                    found.insert(format!("{}_loss", phase.name), json!(mean));
                    found.insert(format!("{}_loss_micro", phase.name), json!(micro));
                    found.insert(format!("{}_floor", phase.name), json!(phase.floor.map(|f| f.macro_average)));
                }
                if let crate::dataset::PhaseData::Text(text) = &phase.data {
                    let batches = text.eval_batches(crate::data::Split::Validation, run.eval.batches);
                    found.insert("eval_loss".into(), json!(evaluate::window_loss(&weights, batches)));
                    for (length, loss) in evaluate::losses_by_length(&weights, text, run.eval.batches) {
                        found.insert(format!("eval_loss_{length}"), json!(loss));
                    }
                }
            }
            for (name, value) in evaluate::questions(&weights, &dataset, dataset.longest_answer(run)) {
                found.insert(name.trim_start_matches("eval/").into(), value);
            }
        });
        found.insert("unknown_words".into(), json!(dataset.unknowns.count));
        Ok(found)
    }

    pub fn vocab_size(&self) -> usize {
        self.model.vocab_size
    }

    pub fn num_parameters(&self) -> usize {
        self.model.layout.count()
    }
}
