//! A trained model out of a run directory: text, logits, routing, the evaluation suite.

use crate::checkpoint;
use crate::data::{Batch, Document, Split, Tokenizer};
use crate::dataset::{Dataset, PhaseData};
use crate::directory::{RunDirectory, checkpoint_folder};
use crate::error::TrainError;
use crate::evaluate;
use crate::routing::Recording;
use crate::run::Run;
pub use model::generate::Sampling;
use model::generate::Weights;
use model::transformer::{Context, Documents, ExpertTrace, Transformer, unwatched};
use moe_router::overruled::{Overruled, Ruling};
use moe_router::{Mode, Policy};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use std::collections::BTreeSet;
use std::path::Path;
use tensor::{Arena, Engine, Precision, Tape};

/// Longest text that is generated at once; it cannot be interrupted.
const MAX_TOKENS: usize = 100_000;
/// Windows of a text that stand for its documents.
const MAX_WINDOWS: usize = 500;

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

/// One sparse layer: the experts of every token with their weights, best first, and all probabilities [n, e]; nothing and zeros for a token that a
/// routed block did not take.
pub struct RoutedLayer {
    pub layer: usize,
    pub num_experts: usize,
    pub experts: Vec<Vec<u32>>,
    pub weights: Vec<Vec<f32>>,
    pub probabilities_ne: Vec<f32>,
}

impl RoutedLayer {
    /// What block `layer` decided for each token. A routed block leaves no `trace` where it took none.
    fn new(layer: usize, num_experts: usize, tokens: usize, trace: Option<&ExpertTrace<f32>>) -> Self {
        let (experts, weights) = (vec![Vec::new(); tokens], vec![Vec::new(); tokens]);
        let probabilities_ne = vec![0.0; tokens * num_experts];
        let mut routed = RoutedLayer { layer, num_experts, experts, weights, probabilities_ne };
        let Some(trace) = trace else { return routed };
        let p_me = moe_router::softmax::probabilities(trace.scores_ne.data(), num_experts);
        for (t, p_e) in routed.probabilities_ne.chunks_exact_mut(num_experts).enumerate() {
            let Some(row) = trace.row(t) else { continue };
            routed.experts[t] = trace.routing.row(row).to_vec();
            routed.weights[t] = trace.weights_a.data()[trace.routing.span(row)].to_vec();
            p_e.copy_from_slice(&p_me[row * num_experts..(row + 1) * num_experts]);
        }
        routed
    }
}

impl Trained {
    /// `path` is a run directory (its newest checkpoint, or the one called `checkpoint`) or a checkpoint folder. A damaged checkpoint is refused.
    pub fn load(path: &Path, checkpoint: Option<&str>) -> Result<Self, TrainError> {
        let folder = checkpoint_folder(path, checkpoint)?;
        let files = checkpoint::read_texts(&folder)?;
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
        let loaded = checkpoint::load(&folder, &model.layout)?;
        let given = run.as_ref().and_then(|run| run.data.routing.as_deref()).map(Recording::read).transpose();
        let mut policies = match given.map_err(|error| TrainError::Usage(error.to_string()))? {
            Some((recording, _)) => recording.overrule(model.policies()).map_err(TrainError::Usage)?,
            None => model.policies(),
        };
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
            let num_experts = self.model.config.router.experts().map_or(0, |e| e.num_experts);
            let layer = |layer: usize| {
                let trace = output.experts.iter().find(|trace| trace.layer == layer);
                RoutedLayer::new(layer, num_experts, tokens.len(), trace)
            };
            let sparse = if num_experts > 0 { self.model.config.num_layers } else { 0 };
            (0..sparse).map(layer).collect()
        });
        Ok(Routed { tokens: tokens.iter().map(|&id| self.tokenizer.token(id)).collect(), layers })
    }

    /// The evaluation suite on the data of the run: losses, recitation of training questions, held-out paraphrases. With `record` the routing of
    /// all its documents goes into a file; with `replay` the documents are routed as such a file says, and only losses are measured.
    pub fn evaluate(&self, record: Option<&Path>, replay: Option<&Path>) -> Result<Map<String, Value>, TrainError> {
        let run = self.run()?;
        let dataset = self.dataset(run)?;
        let policies = match replay {
            Some(file) => self.replayed(file, &every_document(&dataset, run))?,
            None => self.policies.clone(),
        };
        let weights = Weights { policies: &policies, ..self.weights() };
        let mut found = Map::new();
        self.pool.install(|| {
            for phase in &dataset.phases {
                if let Some((mean, micro)) = evaluate::losses(&weights, &phase.documents()) {
                    found.insert(format!("{}_loss", phase.name), json!(mean));
                    found.insert(format!("{}_loss_micro", phase.name), json!(micro));
                    found.insert(format!("{}_floor", phase.name), json!(phase.floor.map(|f| f.macro_average)));
                }
                if let PhaseData::Text(text) = &phase.data {
                    let batches = text.eval_batches(Split::Validation, run.eval.batches);
                    found.insert("eval_loss".into(), json!(evaluate::window_loss(&weights, batches)));
                    for (length, loss) in evaluate::losses_by_length(&weights, text, run.eval.batches) {
                        found.insert(format!("eval_loss_{length}"), json!(loss));
                    }
                }
            }
            if replay.is_some() {
                let paraphrases = dataset.paraphrase_set.iter().flat_map(|set| &set.documents).collect::<Vec<_>>();
                let loss = evaluate::losses(&weights, &paraphrases);
                found.extend(loss.map(|(mean, _)| ("paraphrase_loss".into(), json!(mean))));
            } else {
                for (name, value) in evaluate::questions(&weights, &dataset, dataset.longest_answer(run)) {
                    found.insert(name.trim_start_matches("eval/").into(), value);
                }
            }
        });
        found.insert("unknown_words".into(), json!(dataset.unknowns.count));
        if let Some(file) = record {
            let recording = self.recorded(&every_document(&dataset, run))?;
            let source = recording.write(file)?;
            found.insert("recorded_documents".into(), json!(recording.len()));
            found.insert("recorded_sha256".into(), json!(source.sha256));
        }
        Ok(found)
    }

    fn run(&self) -> Result<&Run, TrainError> {
        self.run.as_ref().ok_or_else(|| {
            TrainError::Usage(
                "a checkpoint folder alone does not say which data to evaluate on; give the run directory".into(),
            )
        })
    }

    fn dataset(&self, run: &Run) -> Result<Dataset, TrainError> {
        let dataset = Dataset::load(run).map_err(|error| TrainError::Usage(error.to_string()))?;
        match dataset.tokenizer.sha256() == self.tokenizer.sha256() {
            true => Ok(dataset),
            false => Err(TrainError::Failed(
                "the data of the run have another vocabulary now than when it was trained; restore the data files"
                    .into(),
            )),
        }
    }

    /// Refuses a model whose blocks are given some tokens only: a recording says the experts of every token in every block.
    fn check_whole(&self) -> Result<(), TrainError> {
        match self.model.config.depths.on() {
            true => {
                Err(TrainError::Usage("the routing of a mixture of depths can be neither recorded nor replayed".into()))
            }
            false => Ok(()),
        }
    }

    /// The routing of documents.
    fn recorded(&self, documents: &[Document]) -> Result<Recording, TrainError> {
        let Some(first) = self.policies.first() else {
            return Err(TrainError::Usage("this run has no experts: there is no routing to record".into()));
        };
        self.check_whole()?;
        let mut recording = Recording::new(self.tokenizer.sha256(), self.policies.len(), first.num_experts());
        let documents: Vec<&Document> = documents.iter().collect();
        self.pool.install(|| evaluate::record(&self.weights(), &documents, &mut recording));
        Ok(recording)
    }

    /// The policies under the routing of a file that must know all `documents`.
    fn replayed(&self, file: &Path, documents: &[Document]) -> Result<Vec<Policy>, TrainError> {
        self.check_whole()?;
        let (recording, source) = Recording::read(file).map_err(|error| TrainError::Usage(error.to_string()))?;
        let bad = |reason: String| TrainError::Usage(format!("{}: {reason}", source.name));
        recording.check_tokenizer(&self.tokenizer.sha256()).map_err(bad)?;
        let missing = documents.iter().filter(|document| !recording.contains(document.inputs())).count();
        if missing > 0 {
            let all = documents.len();
            return Err(bad(format!("{missing} of the {all} documents are not in it; record a run on the same data")));
        }
        recording.overrule(self.policies.clone()).map_err(bad)
    }

    /// Phase, part (train, validation or paraphrases) and text of every document of the run's data; of a text run consecutive windows of what is
    /// held out, or of all where nothing is.
    pub fn documents(&self) -> Result<Vec<(&'static str, &'static str, String)>, TrainError> {
        let run = self.run()?;
        let dataset = self.dataset(run)?;
        let mut found = Vec::new();
        let mut add = |phase, part, tokens: &[u32]| found.push((phase, part, self.tokenizer.decode(tokens)));
        for phase in &dataset.phases {
            match &phase.data {
                PhaseData::Documents { validation, .. } => {
                    phase.documents().iter().for_each(|document| add(phase.name, "train", &document.tokens));
                    validation.documents.iter().for_each(|document| add(phase.name, "validation", &document.tokens));
                }
                PhaseData::Text(text) => {
                    let (part, split) = match text.has_validation() {
                        true => ("validation", Split::Validation),
                        false => ("train", Split::Train),
                    };
                    let windows = text.part(split).chunks_exact(run.data.block_size + 1).take(MAX_WINDOWS);
                    windows.for_each(|window| add(phase.name, part, window));
                }
            }
        }
        let paraphrases = dataset.paraphrase_set.iter().flat_map(|set| &set.documents);
        paraphrases.for_each(|document| add("chat", "paraphrases", &document.tokens));
        Ok(found)
    }

    /// The loss of every token of texts after the first, nats; with `keep` under the experts of each sparse layer that it lists alone.
    pub fn token_losses(&self, texts: &[String], keep: Option<&[Vec<usize>]>) -> Result<Vec<Vec<f64>>, TrainError> {
        let tokens = texts.iter().map(|text| self.encode(text)).collect::<Result<Vec<_>, _>>()?;
        let policies = match keep {
            Some(keep) => self.kept(keep)?,
            None => self.policies.clone(),
        };
        let weights = Weights { policies: &policies, ..self.weights() };
        Ok(self.pool.install(|| evaluate::token_losses(&weights, &tokens)))
    }

    fn kept(&self, keep: &[Vec<usize>]) -> Result<Vec<Policy>, TrainError> {
        let usage = |message: String| TrainError::Usage(format!("keep: {message}"));
        if keep.len() != self.policies.len() {
            return Err(usage(format!("must list experts for each of the {} sparse layers", self.policies.len())));
        }
        let layer = |(policy, ids): (&Policy, &Vec<usize>)| {
            let count = policy.num_experts();
            if let Some(id) = ids.iter().find(|id| **id >= count) {
                return Err(usage(format!("{id} is no expert; there are {count}")));
            }
            let there = (0..count).map(|id| ids.contains(&id)).collect();
            let overruled = Overruled::new(policy.clone(), Ruling::Only(there));
            let message = "needs an expert in each layer, and a model.router.kind other than \"learned_p\"";
            overruled.map(|overruled| Policy::Overruled(Box::new(overruled))).ok_or_else(|| usage(message.into()))
        };
        self.policies.iter().zip(keep).map(layer).collect()
    }

    pub fn vocab_size(&self) -> usize {
        self.model.vocab_size
    }

    pub fn num_parameters(&self) -> usize {
        self.model.layout.count()
    }
}

/// Every document that an evaluation reads, trained on and held out; of a text the windows that it is judged by.
fn every_document(dataset: &Dataset, run: &Run) -> Vec<Document> {
    let mut found: Vec<Document> = Vec::new();
    for phase in &dataset.phases {
        match &phase.data {
            PhaseData::Documents { train, validation, .. } => {
                found.extend(train.documents.iter().chain(&validation.documents).cloned());
            }
            PhaseData::Text(text) => {
                let lengths: BTreeSet<usize> = text.lengths().iter().copied().chain([run.data.block_size]).collect();
                let batches = lengths
                    .into_iter()
                    .flat_map(|length| text.eval_batches_of(Split::Validation, length, run.eval.batches));
                found.extend(batches.flat_map(|batch| documents_of(&batch)));
            }
        }
    }
    found.extend(dataset.paraphrase_set.iter().flat_map(|set| set.documents.iter().cloned()));
    found
}

fn documents_of(batch: &Batch) -> Vec<Document> {
    let document = |rows: &[usize]| {
        let last = rows[1] - 1..rows[1];
        Document { tokens: [&batch.tokens_n[rows[0]..rows[1]], &batch.targets_n[last]].concat() }
    };
    batch.offsets_b1.windows(2).map(document).collect()
}
