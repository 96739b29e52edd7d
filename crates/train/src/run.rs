//! The configuration of a run: one schema, read strictly, every default written down. What it holds stands here. In `run/`: how files,
//! `extends` and `--set` become one `Run` (resolve, merge), what makes keys and values good (schema, validate), words about it (describe).

mod defaults;
mod describe;
mod error;
mod merge;
mod resolve;
mod schema;
#[cfg(test)]
mod tests;
mod validate;

pub use describe::Change;
pub use error::{ConfigError, Problem};

use crate::{optimizers, schedule};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};
use tensor::{Engine, Precision};
use toml::Table;

/// Epochs that a quick run leaves of each phase.
const QUICK_EPOCHS: u64 = 10;

/// Everything that decides what a training run computes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Run {
    /// Names the run directory; the name of the run file where it is not written. Never inherited through `extends`.
    pub name: String,
    /// Key of every random number of the run, from 0 to 2^63 - 1.
    pub seed: u64,
    /// Who computes: `cpu` is fast, `reference` is plain and slow, `torch` needs a build with that feature.
    pub engine: Engine,
    /// Where it computes; `cpu` and `reference` know only "cpu".
    pub device: String,
    /// How matrix products multiply: `bf16` rounds their operands. Parameters, sums and checkpoints are f32 either way.
    pub dtype: Precision,
    /// Threads of the trainer, more than the cores allowed; 0 = one for each core. Results do not depend on it.
    pub threads: usize,
    /// Train 10 epochs a phase, or a tenth of `train.max_steps`, and change nothing else: a look, not a result.
    pub quick: bool,
    /// What is learnt.
    pub data: Data,
    /// The transformer.
    pub model: model::Model,
    /// How it is trained, in every phase.
    pub train: Train,
    /// Auxiliary losses: total = cross-entropy + Σ coefficient · mean over layers.
    pub losses: Losses,
    /// Rules on gradient norms, and what follows where one is broken.
    pub monitor: Monitor,
    /// What is measured on the way.
    pub eval: Eval,
    /// What is kept on the way.
    pub checkpoint: Checkpoint,
    /// What one phase does otherwise than `[train]` says.
    #[serde(skip_serializing_if = "Phases::is_empty")]
    pub phase: Phases,
}

/// Two files of documents (facts, then chat), or one running text. Relative paths are relative to the file that says them, in `--set` to the
/// current folder; a loaded `Run` has absolute ones.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Data {
    /// JSON list of strings, the documents of the phase `facts`; absent = the shipped file.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub facts: Option<PathBuf>,
    /// JSON list of strings `User: … Assistant: …`, the documents of the phase `chat`; absent = the shipped file.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub chat: Option<PathBuf>,
    /// Held-out rewordings of the chat questions, same form; absent = the shipped file, only with the shipped chat.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub paraphrases: Option<PathBuf>,
    /// Plain text for one phase `text` in place of facts and chat; "tinyshakespeare" is the shipped one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub text: Option<PathBuf>,
    /// How text is cut: "word", "char", "byte" or the path of a tokenizer.json; "char" where a text run does not say. Facts and chat are words.
    pub tokenizer: String,
    /// Tokens kept of each document, from its start; answers and samples end after as many.
    pub max_length: usize,
    /// Tokens of each random piece of the text (text).
    pub block_size: usize,
    /// Tokens of the pieces of a batch, one of these drawn for each update, in place of `block_size`; `batch_size` times `block_size` tokens stay in
    /// a batch. Each has a held-out loss of its own. Empty = `block_size` alone (text).
    pub lengths: Vec<usize>,
    /// Share of the data held out for evaluation, from 0 to below 1.
    pub val_fraction: f64,
    /// Draw a new order of the documents every epoch; false = file order (facts and chat).
    pub shuffle: bool,
    /// File that `eval --record` wrote: the documents in it go to the experts that they went to then, in training and evaluation, and the router only
    /// weighs. It must hold every training document (facts and chat).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub routing: Option<PathBuf>,
    /// Variants of the training documents (facts and chat).
    pub augment: Augment,
}

/// Variants that are trained on beside the documents they are made of. They have no word that the documents lack, and none is a held-out item;
/// `augmented.jsonl` of the run says what each was made of, and how. `loss` and `floor` stay those of the documents themselves.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Augment {
    /// Variants of each document, at most 100; fewer where the rules give no more. They come after the documents in an epoch.
    pub copies: usize,
    /// Chance that a sentence takes another form of a template that fits it.
    pub templates: f64,
    /// Chance that a word with synonyms becomes one of them.
    pub synonyms: f64,
    /// Chance that a word of a question is left out (chat).
    pub drop: f64,
    /// JSON file of synonyms and templates; absent = the shipped one, made for the shipped documents.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub table: Option<PathBuf>,
}

/// How the parameters are updated.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Train {
    /// Peak learning rate, 0 or more; below 1e-5 the run warns that next to nothing is learned.
    pub learning_rate: f64,
    /// Factor on the rate of each layer; `grad_norm` = clamp(sqrt(3 / norm of its gradient), 0.3, 3).
    pub lr_scale: LrScale,
    /// How the rate follows the batch: `linear` = `batch_size` / `base_batch_size` times the rate (Goyal 2017), `sqrt` = its square root times
    /// (Krizhevsky 2014).
    pub batch_scaling: BatchScaling,
    /// The batch size that `learning_rate` was chosen for (linear, sqrt).
    pub base_batch_size: usize,
    /// Documents, or pieces of text, in a batch.
    pub batch_size: usize,
    /// Parts that a batch is computed in, one after the other, to save memory; from 1 to `batch_size`. Their gradients add up to the batch's.
    pub accumulate: usize,
    /// Keep only the input of every block and compute the rest again on the way back (activation checkpointing, Chen 2016): less memory
    /// (`arena_bytes` of the results), about a third more time, the same bytes.
    pub activation_checkpointing: bool,
    /// Passes over the documents (facts and chat).
    pub epochs: u64,
    /// Updates (text).
    pub max_steps: u64,
    /// How a gradient becomes an update.
    pub optimizer: Optimizer,
    /// Course of the rate after the warm-up.
    pub schedule: Schedule,
    /// How the rate rises to its peak (not with one_cycle).
    pub warmup: Warmup,
    /// Epochs over which the rate rises in stairs to its peak (facts and chat; not with one_cycle).
    pub warmup_epochs: u64,
    /// Updates over which the rate rises to its peak (text; not with one_cycle).
    pub warmup_steps: u64,
    /// Where the rate ends, as a share of its peak (cosine, linear, polynomial, wsd, sgdr).
    pub min_lr_ratio: f64,
    /// Exponent of the fall, above 0 (polynomial).
    pub power: f64,
    /// Share of the phase, after the warm-up, in which the rate falls; above 0, at most 1 (wsd).
    pub decay_share: f64,
    /// Epochs, in a text run updates, of the first cycle (sgdr).
    pub restart_every: u64,
    /// How many times as long as the one before each cycle is, 1 or more (sgdr).
    pub restart_growth: u64,
    /// Largest L2 norm of the whole gradient, above 0; a longer gradient is shortened to it.
    pub clip: f64,
    /// Percentile of the norms of the last updates, before clipping, that a gradient is shortened to as well; above 0, below 100 (95 clips about a
    /// twentieth of the updates); 0 = `clip` alone. It starts when there are norms enough to tell it, anew in each phase.
    pub clip_percentile: f64,
    /// Updates whose norms are remembered (clip_percentile).
    pub clip_window: usize,
    /// Decay λ of matrices: w ← w - rate·λ·w (adamw, lion, muon), or λ·w added to the gradient (adam, sgd, lars).
    pub weight_decay: f64,
    /// Memory of the mean of gradients, in [0, 1); for lion its share in a step (adam, adamw, lion, muon).
    pub beta1: f64,
    /// Memory of the mean of squared gradients, for lion of gradients, in [0, 1) (adam, adamw, lion, muon).
    pub beta2: f64,
    /// Added to the divisor of the update (adam, adamw, lars, muon).
    pub eps: f64,
    /// Share of the last update that goes on, in [0, 1); for muon memory of the mean of gradients (sgd, lars, muon).
    pub momentum: f64,
    /// Trust coefficient η of the layer-wise rate η·‖w‖ / (‖g‖ + λ‖w‖) (lars).
    pub trust: f64,
    /// Memory of a running mean of the parameters, in [0, 1), evaluated beside them and saved; 0 = none. 0.999 is usual. It grows to this value, as
    /// (1 + t) / (10 + t) after t updates of the mean.
    pub ema: f64,
    /// Radius ρ of sharpness-aware minimisation (Foret 2021): the update follows the gradient at w + ρ·g/‖g‖; 0 = off, 0.05 is usual. Twice the work:
    /// the second pass routes anew, `sam/routing_changed` is the share of tokens whose experts are others there. `train/loss` and the activation
    /// norms are those at w, the gradient norms of parameters those of the gradient that is used.
    pub sam: f64,
    /// Updates between measurements of the gradient noise scale, in documents (`grad/noise_scale`), from the parts of `accumulate`, 2 or more;
    /// 0 = never. It changes no update.
    pub noise_scale: u64,
    /// Evaluations without a better held-out loss after which a phase ends, its best checkpoint kept; 0 = never.
    pub patience: u64,
    /// By how much a held-out loss must be lower to count as better, nats (patience).
    pub min_delta: f64,
    /// What becomes of an update whose loss or gradient is not finite, or beyond 10^6 and 2000.
    pub on_nonfinite: OnNonfinite,
    /// What becomes of an update whose loss or gradient norm jumps: to 10 times the median of the last 9 updates, or to twice that of the last 128
    /// and 10 deviations above it.
    pub on_spike: OnSpike,
}

/// Answers to numbers that are not finite.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum OnNonfinite {
    /// The run ends as diverged; its last checkpoint stays.
    #[default]
    Stop,
    /// The update is not taken; the third in a row ends the run.
    Skip,
    /// The run returns to its last checkpoint and leaves the batch out; the tenth return without a new checkpoint ends it.
    RollBack,
}

/// Answers to a jump of loss or gradient.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum OnSpike {
    /// Nothing is looked at.
    #[default]
    Off,
    /// An event says so; the update is taken.
    Warn,
    /// The run ends as diverged; its last checkpoint stays.
    Stop,
    /// The update is not taken; the third in a row ends the run.
    Skip,
    /// The run returns to its last checkpoint and leaves the batch out; the tenth return without a new checkpoint ends it.
    RollBack,
}

/// What scales the learning rate of each layer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum LrScale {
    /// By the norm of the layer's gradient.
    #[default]
    GradNorm,
    /// Nothing.
    None,
}

/// Rules that carry a learning rate from one batch size to another.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum BatchScaling {
    /// The rate is `learning_rate` whatever the batch.
    #[default]
    None,
    /// In proportion to the batch, for plain descent.
    Linear,
    /// With the square root of the batch, for Adam and its kind.
    Sqrt,
}

/// Update rules.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Optimizer {
    /// Adam (Kingma 2014).
    #[default]
    Adam,
    /// Adam with decoupled weight decay (Loshchilov 2017).
    Adamw,
    /// Stochastic gradient descent with momentum.
    Sgd,
    /// Layer-wise adaptive rate scaling (You 2017).
    Lars,
    /// The sign of a mean of gradients (Chen 2023); rates 3 to 10 times smaller than Adam's.
    Lion,
    /// Orthogonal updates of the projections, AdamW for all else (Jordan 2024).
    Muon,
}

/// Courses of the learning rate.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Schedule {
    /// Half a cosine from the peak down to `min_lr_ratio` of it.
    #[default]
    Cosine,
    /// The peak to the end.
    Constant,
    /// A straight line down to `min_lr_ratio`.
    Linear,
    /// (1 - x)^`power` down to `min_lr_ratio`.
    Polynomial,
    /// The peak, then 1 - sqrt(x) down to `min_lr_ratio` over the last `decay_share` (warm-up, stable, decay; Hägele 2024).
    Wsd,
    /// Half cosines down to `min_lr_ratio`, each from the peak again (Loshchilov 2017).
    Sgdr,
    /// Up from a 25th over 30 % of the phase, down to a 250,000th; no warm-up of its own (Smith 2018).
    OneCycle,
}

/// Courses of the warm-up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Warmup {
    /// Equal steps up to the peak.
    #[default]
    Linear,
    /// Equal factors from a hundredth of the peak.
    Exponential,
}

/// Coefficients of the auxiliary losses, 0 or more; 0 = measured only. And label smoothing.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Losses {
    /// Even use of the experts.
    pub balance: f64,
    /// Entropy of the router of experts, nats a token.
    pub entropy: f64,
    /// Sum of a token's soft gates, the price of its experts (router learned_p).
    pub budget: f64,
    /// Squared log-sum-exp of the router's logits (ST-MoE).
    pub z: f64,
    /// Even use of the routed heads.
    pub heads: f64,
    /// Cross-entropy of the depth routers' own word on "is one of the best of its document", nats a token (model.depths).
    pub depths: f64,
    /// Share of each target that is spread evenly over the vocabulary, from 0 to below 1. Only what is minimised (`train/total_loss`) is smoothed:
    /// `train/loss`, `epoch/loss` and all evaluations stay the plain cross-entropy, to be held against the floor.
    pub label_smoothing: f64,
}

/// Rules on gradient norms before clipping. Running medians are those of the last 128 updates of the phase; a rule speaks from the ninth on. What
/// breaks a rule is told as an event `alert`. Factors are above 1, and 0 = off.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Monitor {
    /// Alert where the norm of the whole gradient is above this many times its running median.
    pub exploding: f64,
    /// Alert where the norm of the whole gradient is below its running median divided by this.
    pub vanishing: f64,
    /// Alert where the norm of a flat layer's gradient is above this many times its running median.
    pub layer_exploding: f64,
    /// Alert where the norm of a flat layer's gradient is below its running median divided by this.
    pub layer_vanishing: f64,
    /// Alert where an update moves a flat layer by more than this share of its norm, ‖Δw‖ / ‖w‖; 0 = off. Usual are about 0.001.
    pub update_ratio: f64,
    /// What the updates after an alert do otherwise.
    pub response: Response,
    /// How much otherwise: what the rate is multiplied by, what the median norm is multiplied by to clip at, one over the number of batches that are
    /// joined; above 0, below 1 (response).
    pub factor: f64,
    /// Updates that a response lasts, and for which a rule does not repeat itself.
    pub cooldown: u64,
}

/// Answers to an alert, for `cooldown` updates.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Response {
    /// The alert is told, no more.
    #[default]
    None,
    /// The learning rate is multiplied by `factor`.
    Rate,
    /// The gradient is clipped at `factor` times the running median of its norm.
    Clip,
    /// Each update accumulates 1 / `factor` batches of the epoch, as many parts more and as many updates fewer.
    Batch,
}

/// What is measured on the way.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Eval {
    /// Epochs (text: updates) between evaluations; 0 = only at the end of the run.
    pub every: u64,
    /// Batches of held-out text that an evaluation reads, the same at every one (text).
    pub batches: usize,
    /// Prompts continued at every evaluation, written to samples.jsonl; none = the first chat questions.
    pub samples: Vec<String>,
}

/// What is kept on the way.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Checkpoint {
    /// Updates between checkpoints; 0 = only the one that every run ends with. Training goes on while one is written.
    pub every: u64,
    /// Newest whole checkpoints kept, beside the best and the one a run was resumed from.
    pub keep: usize,
    /// Checkpoints of every so many updates stay too; 0 = none.
    pub keep_every: u64,
    /// Save a checkpoint whenever the held-out loss is better than before, and keep the best one.
    pub best: bool,
}

/// Changes to `[train]`, phase by phase.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Phases {
    /// The facts phase.
    #[serde(skip_serializing_if = "Phase::is_empty")]
    pub facts: Phase,
    /// The chat phase.
    #[serde(skip_serializing_if = "Phase::is_empty")]
    pub chat: Phase,
    /// The one phase of a text run.
    #[serde(skip_serializing_if = "Phase::is_empty")]
    pub text: Phase,
}

/// Changes for one phase.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Phase {
    /// Any keys of `[train]`; the others stay as `[train]` says.
    #[schemars(with = "Train")]
    pub train: Overrides,
}

/// A part of a `[train]` table, known to be well-typed.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "Table")]
pub struct Overrides(Table);

impl TryFrom<Table> for Overrides {
    type Error = toml::de::Error;

    fn try_from(table: Table) -> Result<Self, Self::Error> {
        Train::deserialize(table.clone()).map(|_| Self(table))
    }
}

impl Phases {
    fn of(&self, name: &str) -> Option<&Phase> {
        match name {
            "facts" => Some(&self.facts),
            "chat" => Some(&self.chat),
            "text" => Some(&self.text),
            _ => None,
        }
    }

    fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

impl Phase {
    fn is_empty(&self) -> bool {
        self.train.0.is_empty()
    }
}

impl Run {
    /// The run of a TOML file, or of a standard run by its name (see [`Run::standard`]), with each "key=value" of `sets` put in last.
    pub fn load(source: &str, sets: &[String]) -> Result<Run, ConfigError> {
        resolve::load(source, sets)
    }

    /// The run of a TOML text whose relative paths are relative to `base_dir`.
    pub fn from_toml_str(text: &str, base_dir: &Path, sets: &[String]) -> Result<Run, ConfigError> {
        resolve::from_text(text, base_dir, sets)
    }

    /// The run of a resolved TOML text, such as a run directory's run.toml.
    pub fn parse(text: &str) -> Result<Run, ConfigError> {
        Self::parse_with(text, &[])
    }

    /// As [`Run::load`] with values in place of texts; null takes a key out of the file, so that its default holds.
    pub fn load_with(source: &str, sets: &[(String, serde_json::Value)]) -> Result<Run, ConfigError> {
        resolve::load_with(source, sets)
    }

    /// The run of a TOML text whose relative paths are relative to the current folder, with values as in [`Run::load_with`].
    pub fn parse_with(text: &str, sets: &[(String, serde_json::Value)]) -> Result<Run, ConfigError> {
        resolve::parse_with(text, sets)
    }

    /// Names of the runs that are built in.
    pub fn standard() -> Vec<&'static str> {
        resolve::STANDARD.iter().map(|(name, _)| *name).collect()
    }

    /// The phases in their order.
    pub fn phases(&self) -> &'static [&'static str] {
        if self.data.text.is_some() { &["text"] } else { &["facts", "chat"] }
    }

    /// `[train]` as it holds in a phase: with that phase's changes, and cut short in a quick run.
    pub fn phase(&self, name: &str) -> Train {
        let changes = self.phase.of(name).map(|phase| &phase.train);
        let mut train = changes.map_or_else(|| self.train.clone(), |changes| merge::overridden(&self.train, changes));
        if self.quick {
            train.epochs = train.epochs.min(QUICK_EPOCHS);
            train.max_steps = train.max_steps.div_ceil(10);
        }
        train
    }

    /// The learning-rate schedule of a phase, over its updates in a text run and over its epochs otherwise.
    pub fn schedule(&self, phase: &str) -> schedule::Schedule {
        let train = self.phase(phase);
        let (warmup, total) = match phase {
            "text" => (train.warmup_steps, train.max_steps),
            _ => (train.warmup_epochs, train.epochs),
        };
        let shape = match train.schedule {
            Schedule::Cosine => schedule::Shape::Cosine,
            Schedule::Constant => schedule::Shape::Constant,
            Schedule::Linear => schedule::Shape::Polynomial { power: 1.0 },
            Schedule::Polynomial => schedule::Shape::Polynomial { power: train.power },
            Schedule::Wsd => schedule::Shape::Stable { decay: train.decay_share },
            Schedule::Sgdr => schedule::Shape::Restarts { first: train.restart_every, growth: train.restart_growth },
            Schedule::OneCycle => schedule::Shape::OneCycle,
        };
        let rise = match train.warmup {
            Warmup::Linear => schedule::Rise::Linear,
            Warmup::Exponential => schedule::Rise::Exponential,
        };
        schedule::Schedule { shape, rise, warmup, total, min_ratio: train.min_lr_ratio }
    }

    /// Makes this a quick run: 10 epochs a phase, or a tenth of the updates of a text run.
    pub fn quick(&mut self) {
        self.quick = true;
    }

    /// Every problem of the values, an empty error being none; files are checked by `load`, this is for values changed in code.
    pub fn validate(&self) -> Result<(), ConfigError> {
        validate::validate(self)
    }

    /// The whole configuration as TOML, every default written; loading it gives the same run.
    pub fn to_toml(&self) -> String {
        toml::to_string(self)
            .expect("counts of a validated run fit into TOML's 64-bit integers and its paths are UTF-8")
    }

    /// The JSON Schema of a run file.
    pub fn schema_json() -> String {
        schema::json()
    }

    /// A Markdown table of every key: type, default, meaning.
    pub fn docs() -> String {
        describe::docs()
    }

    /// The dotted keys whose values differ, with both values.
    pub fn diff(a: &Run, b: &Run) -> Vec<Change> {
        describe::diff(a, b)
    }
}

impl Monitor {
    /// Batches that are joined in an update where that is the response.
    pub fn batches(&self) -> u64 {
        (1.0 / self.factor).round() as u64
    }

    /// Whether any rule is looked at.
    pub fn watches(&self) -> bool {
        *self != Self { response: self.response, factor: self.factor, cooldown: self.cooldown, ..Self::default() }
    }
}

impl Train {
    pub fn optimizer_kind(&self) -> optimizers::Kind {
        match self.optimizer {
            Optimizer::Adam => optimizers::Kind::Adam,
            Optimizer::Adamw => optimizers::Kind::AdamW,
            Optimizer::Sgd => optimizers::Kind::Sgd,
            Optimizer::Lars => optimizers::Kind::Lars,
            Optimizer::Lion => optimizers::Kind::Lion,
            Optimizer::Muon => optimizers::Kind::Muon,
        }
    }

    pub fn optimizer_settings(&self) -> optimizers::Settings {
        let Train { beta1, beta2, eps, weight_decay, momentum, trust, .. } = *self;
        optimizers::Settings { beta1, beta2, eps, weight_decay, momentum, trust }
    }

    /// The rate at the peak of the schedule: `learning_rate`, carried over to the batch.
    pub fn peak_rate(&self) -> f64 {
        let share = self.batch_size as f64 / self.base_batch_size as f64;
        match self.batch_scaling {
            BatchScaling::None => self.learning_rate,
            BatchScaling::Linear => self.learning_rate * share,
            BatchScaling::Sqrt => self.learning_rate * share.sqrt(),
        }
    }

    /// Whether the rate of a layer depends on the norm of its gradient.
    pub fn scales_by_norm(&self) -> bool {
        self.lr_scale == LrScale::GradNorm
    }
}
