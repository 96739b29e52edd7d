//! The training loop: every call of `next_row` does one update (or hands out a row that an update left) and writes what it did. Kill it
//! anywhere: `resume` goes on from the newest whole checkpoint and ends with the same bytes.

use crate::checkpoint;
use crate::data::{Batch, Split};
use crate::dataset::{Dataset, PhaseData};
use crate::directory::{self, RunDirectory};
use crate::epoch::Epoch;
use crate::error::TrainError;
use crate::evaluate;
use crate::learner::{Learner, Update};
use crate::loss;
use crate::metrics::Row;
use crate::optimizers::Optimizer;
use crate::record::Status;
use crate::run::{Run, Train};
use model::generate::Sampling;
use moe_router::{Control, Policy};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use std::collections::VecDeque;
use std::path::Path;
use std::time::Instant;

/// What comes next.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Position {
    phase: usize,
    /// Epochs finished in the phase.
    epoch: u64,
    /// Batches finished in the epoch.
    batch: u64,
    /// Updates made, over all phases.
    step: u64,
    /// Updates made in the phase.
    phase_step: u64,
    /// Targets trained on, over all phases.
    tokens: u64,
}

/// What a checkpoint holds beside parameters and moments.
#[derive(Serialize, Deserialize)]
struct State {
    position: Position,
    epoch: Epoch,
    results: Map<String, Value>,
    controls: Vec<Control>,
}

pub struct Trainer {
    run: Run,
    dataset: Dataset,
    learner: Learner,
    directory: RunDirectory,
    at: Position,
    epoch: Epoch,
    results: Map<String, Value>,
    saved_step: Option<u64>,
    queue: VecDeque<Row>,
    notes: Vec<String>,
    done: bool,
}

impl Trainer {
    /// Validates everything, then makes the run directory (`out`, or runs/<time>-<name>) and writes run.toml and run.json. An error before
    /// that leaves no trace.
    pub fn new(run: Run, out: Option<&Path>, parent: Option<String>) -> Result<Self, TrainError> {
        let (dataset, learner) = prepare(&run)?;
        let directory = RunDirectory::create(&run, out, parent, &dataset.sources)?;
        let mut trainer = Trainer::assemble(run, dataset, learner, directory);
        trainer.event("run_started", format!("run {} started", trainer.id()))?;
        trainer.event("phase_started", format!("phase {} started", trainer.phase_name()))?;
        Ok(trainer)
    }

    /// Goes on where the run in `out` stopped: from its newest whole checkpoint, or from the beginning if there is none.
    pub fn resume(out: &Path) -> Result<Self, TrainError> {
        let (run, record, lock) = RunDirectory::open(out)?;
        let (dataset, mut learner) = prepare(&run)?;
        directory::check_data(&record, &dataset.sources)?;
        if record.status == Status::Completed {
            let results = record.results.clone();
            let directory = RunDirectory::completed(out, &run, record, lock)?;
            let mut trainer = Trainer::assemble(run, dataset, learner, directory);
            trainer.notes.push(format!("{} is completed; nothing to do", out.display()));
            (trainer.results, trainer.done) = (results, true);
            return Ok(trainer);
        }
        let found = checkpoint::newest_whole(out).map_err(failed)?;
        let mut notes: Vec<String> =
            found.skipped.iter().map(|(path, reason)| format!("skipped {}: {reason}", path.display())).collect();
        let state = match &found.path {
            Some(path) => Some(restore(path, &run, &mut learner)?),
            None => {
                notes.push("no checkpoint yet; starting at step 0".into());
                None
            }
        };
        let step = state.as_ref().map_or(0, |state| state.position.step);
        let directory = RunDirectory::reopen(out, &run, record, lock, step)?;
        let mut trainer = Trainer::assemble(run, dataset, learner, directory);
        trainer.notes = notes;
        if let Some(state) = state {
            (trainer.at, trainer.epoch, trainer.results) = (state.position, state.epoch, state.results);
            trainer.saved_step = Some(step);
        }
        trainer.event("resumed", format!("resumed at step {step}"))?;
        Ok(trainer)
    }

    fn assemble(run: Run, dataset: Dataset, learner: Learner, directory: RunDirectory) -> Self {
        Trainer {
            epoch: Epoch::new(&learner.policies),
            at: Position::default(),
            results: Map::new(),
            saved_step: None,
            queue: VecDeque::new(),
            notes: Vec::new(),
            done: false,
            run,
            dataset,
            learner,
            directory,
        }
    }

    /// The next metric row; `None` when the run is completed or stopped.
    pub fn next_row(&mut self) -> Result<Option<Row>, TrainError> {
        loop {
            if let Some(row) = self.queue.pop_front() {
                return Ok(Some(row));
            }
            if self.done {
                return Ok(None);
            }
            self.advance()?;
        }
    }

    /// Ends the run early after a full checkpoint; `resume` goes on from it.
    pub fn stop(&mut self, reason: &str) -> Result<(), TrainError> {
        if self.done {
            return Ok(());
        }
        self.done = true;
        self.event("stopped", format!("stopped at step {}: {reason}", self.at.step))?;
        self.save()?;
        self.directory.finish(Status::Stopped, &self.results)
    }

    pub fn out(&self) -> &Path {
        self.directory.path()
    }

    pub fn id(&self) -> &str {
        &self.directory.record().id
    }

    pub fn done(&self) -> bool {
        self.done
    }

    pub fn step_count(&self) -> u64 {
        self.at.step
    }

    /// `results` of run.json.
    pub fn results(&self) -> &Map<String, Value> {
        &self.directory.record().results
    }

    /// Messages for people, such as checkpoints that were skipped on resume.
    pub fn notes(&self) -> &[String] {
        &self.notes
    }

    /// Updates of the whole run.
    pub fn total_steps(&self) -> u64 {
        (0..self.dataset.phases.len()).map(|phase| phase_steps(&self.run, &self.dataset, phase)).sum()
    }

    /// A training question and the greedy answer to it, as text.
    pub fn first_answer(&self) -> Option<(String, String)> {
        let prompt = self.dataset.questions.first()?.prompt.clone();
        let text = |tokens: &[u32]| self.dataset.tokenizer.decode(tokens);
        Some((text(&prompt), text(&self.continue_greedily(&prompt))))
    }

    fn phase_name(&self) -> &'static str {
        self.dataset.phases[self.at.phase.min(self.dataset.phases.len() - 1)].name
    }

    fn settings(&self) -> Train {
        self.run.phase(self.phase_name())
    }

    fn batch(&self) -> Batch {
        match &self.dataset.phases[self.at.phase].data {
            PhaseData::Documents { train, order, .. } => {
                let documents = order.documents(self.at.epoch);
                let start = self.at.batch as usize * order.batch_size;
                train.batch(&documents[start..(start + order.batch_size).min(documents.len())])
            }
            PhaseData::Text(text) => text.batch(self.at.phase_step),
        }
    }

    /// One update, and what follows from where it ends: epoch rows, evaluation, checkpoint, the next phase, the end of the run.
    fn advance(&mut self) -> Result<(), TrainError> {
        self.update()?;
        let steps = phase_steps(&self.run, &self.dataset, self.at.phase);
        let last = self.at.phase_step == steps;
        if last || self.at.batch == epoch_batches(&self.run, &self.dataset, self.at.phase) {
            self.at.epoch += 1;
            self.at.batch = 0;
            self.end_epoch(last)?;
        }
        if last {
            (self.at.phase, self.at.epoch, self.at.phase_step) = (self.at.phase + 1, 0, 0);
            if self.at.phase == self.dataset.phases.len() {
                return self.complete();
            }
            let settings = self.settings();
            self.learner.carry_optimizer(&settings)?;
            self.event("phase_started", format!("phase {} started", self.phase_name()))?;
        }
        match self.run.checkpoint.every {
            every if every > 0 && self.at.step.is_multiple_of(every) => self.save(),
            _ => Ok(()),
        }
    }

    fn update(&mut self) -> Result<(), TrainError> {
        let started = Instant::now();
        let settings = self.settings();
        let batch = self.batch();
        let rate = self.rate(&settings);
        let update = match self.learner.update(&batch, &settings, rate, &mut self.epoch) {
            Ok(update) => update,
            Err(reason) => return Err(self.diverged(&reason)),
        };
        let targets = batch.len();
        self.at.step += 1;
        self.at.phase_step += 1;
        self.at.batch += 1;
        self.at.tokens += targets as u64;
        self.epoch.add(&update.document_losses, update.loss_sum, targets, update.activation_norms[0]);
        let mut row = self.row("train");
        row.integer("epoch", self.at.epoch + 1);
        describe(&mut row, &update, rate);
        let seconds = started.elapsed().as_secs_f64();
        row.number("train/dt", seconds);
        row.number("train/tok_per_sec", targets as f64 / seconds);
        self.push(row)
    }

    /// The learning rate of the next update: by step in a text phase, by epoch in the others.
    fn rate(&self, settings: &Train) -> f64 {
        let position = match self.dataset.phases[self.at.phase].data {
            PhaseData::Documents { .. } => self.at.epoch,
            PhaseData::Text(_) => self.at.phase_step,
        };
        self.run.schedule(self.phase_name()).rate(settings.learning_rate, position)
    }

    /// Records why the run ends here and returns the error for the caller. Checkpoints stay as they were.
    fn diverged(&mut self, reason: &str) -> TrainError {
        self.done = true;
        let (step, phase) = (self.at.step + 1, self.phase_name());
        let remedy = "lower train.learning_rate or train.clip; the last checkpoint is untouched";
        let message = format!("diverged at step {step} (phase {phase}): {reason}; {remedy}");
        let written = self
            .event("diverged", message.clone())
            .and_then(|()| self.directory.failure(step, &message))
            .and_then(|()| self.directory.finish(Status::Diverged, &self.results));
        match written {
            Ok(()) => TrainError::Diverged(message),
            Err(error) => TrainError::Diverged(format!("{message} (the record of it could not be written: {error})")),
        }
    }

    /// The rows of an epoch that just ended: routing, loss beside its floor, and the evaluation where it is due.
    fn end_epoch(&mut self, last: bool) -> Result<(), TrainError> {
        let next = Epoch::new(&self.learner.policies);
        let mut finished = std::mem::replace(&mut self.epoch, next);
        if !self.learner.policies.is_empty() {
            let mut row = self.row("moe");
            row.integer("epoch", self.at.epoch);
            let (summary, alarms) = finished.routing(&mut row, self.run.seed);
            self.epoch.keep_alarms(&finished);
            self.push(row)?;
            for message in alarms {
                self.event("collapse", message)?;
            }
            if last {
                self.results.insert("experts_per_token".into(), json!(summary.mean));
                self.results.insert("experts_std".into(), json!(summary.std));
            }
        }
        let floor = self.dataset.phases[self.at.phase].floor;
        let mut row = self.row("eval");
        row.integer("epoch", self.at.epoch);
        finished.losses(&mut row, floor);
        if last {
            let floor = floor.map(|floor| floor.macro_average);
            self.results.insert("loss".into(), json!(finished.macro_loss()));
            self.results.insert("loss_micro".into(), json!(finished.micro_loss()));
            self.results.insert("floor".into(), json!(floor));
            self.results.insert("excess".into(), json!(floor.map(|floor| finished.macro_loss() - floor)));
            self.results.insert("l0".into(), json!(finished.l0_mean()));
        }
        let every = self.run.eval.every;
        let text = matches!(self.dataset.phases[self.at.phase].data, PhaseData::Text(_));
        if last || text || (every > 0 && self.at.epoch.is_multiple_of(every)) {
            for (name, value) in self.evaluate(last) {
                if last {
                    self.results.insert(result_name(name, self.phase_name()).into(), value.clone());
                }
                row.value(name, value);
            }
            self.sample()?;
        }
        self.push(row)
    }

    /// Losses of sets that were not just trained on, and at the end of a phase recitation and forgetting. Touches no gradient.
    fn evaluate(&self, last: bool) -> Vec<(&'static str, Value)> {
        let mut found: Vec<(&'static str, Value)> = Vec::new();
        let (weights, phase) = (self.learner.weights(), &self.dataset.phases[self.at.phase]);
        self.learner.pool.install(|| {
            match &phase.data {
                PhaseData::Documents { validation, .. } => {
                    let held_out: Vec<_> = validation.documents.iter().collect();
                    found.extend(evaluate::losses(&weights, &held_out).map(|(mean, _)| ("eval/loss", json!(mean))));
                }
                PhaseData::Text(text) => {
                    let windows = text.eval_batches(Split::Validation, self.run.eval.batches);
                    found.extend(evaluate::window_loss(&weights, windows).map(|mean| ("eval/loss", json!(mean))));
                }
            }
            if !last {
                return;
            }
            if let Some((mean, micro)) = evaluate::losses(&weights, &phase.documents()) {
                found.push(("eval/train_loss", json!(mean)));
                found.push(("eval/train_loss_micro", json!(micro)));
                let facts = evaluate::losses(&weights, &self.dataset.phases[0].documents());
                found.extend(facts.map(|(mean, _)| ("eval/facts_loss", json!(mean))));
            }
            if phase.name == "chat" {
                found.extend(evaluate::questions(&weights, &self.dataset, self.run.data.max_length));
            }
        });
        if last && phase.name == "facts" {
            found.push(("eval/facts_floor", json!(phase.floor.map(|floor| floor.macro_average))));
        }
        found
    }

    /// Greedy continuations of the fixed prompts into samples.jsonl.
    fn sample(&mut self) -> Result<(), TrainError> {
        let tokenizer = &self.dataset.tokenizer;
        let prompts: Vec<Vec<u32>> = if self.run.eval.samples.is_empty() {
            self.dataset.questions.iter().take(3).map(|question| question.prompt.clone()).collect()
        } else {
            let encoded = self.run.eval.samples.iter().map(|text| tokenizer.encode(text));
            encoded.collect::<Result<_, _>>().map_err(failed)?
        };
        let samples: Vec<(String, String)> = prompts
            .iter()
            .filter(|prompt| !prompt.is_empty())
            .map(|prompt| (tokenizer.decode(prompt), tokenizer.decode(&self.continue_greedily(prompt))))
            .collect();
        self.directory.append_samples(self.at.step, self.phase_name(), self.at.epoch, &samples)
    }

    fn continue_greedily(&self, prompt: &[u32]) -> Vec<u32> {
        let (limit, stop) = (self.run.data.max_length, self.dataset.stop());
        let weights = self.learner.weights();
        self.learner.pool.install(|| weights.generate(prompt, limit, stop, Sampling::GREEDY, true))
    }

    fn complete(&mut self) -> Result<(), TrainError> {
        self.done = true;
        let experts = self.results.get("experts_per_token").and_then(Value::as_f64).unwrap_or(0.0);
        let model = &self.learner.model;
        self.results.insert("tokens".into(), json!(self.at.tokens));
        self.results.insert("params".into(), json!(model.layout.count()));
        self.results.insert("active_params".into(), json!(model.active_params(experts).round() as u64));
        self.results.insert("unknown_words".into(), json!(self.dataset.unknowns.count));
        self.save()?;
        self.event("completed", format!("completed {} steps", self.at.step))?;
        self.directory.finish(Status::Completed, &self.results)
    }

    fn save(&mut self) -> Result<(), TrainError> {
        if self.saved_step == Some(self.at.step) {
            return Ok(());
        }
        let state = State {
            position: self.at,
            epoch: self.epoch.clone(),
            results: self.results.clone(),
            controls: self.learner.policies.iter().map(Policy::control).collect(),
        };
        let config = crate::trained::config_json(&self.learner.model);
        let path = self.directory.save(&checkpoint::Contents {
            step: self.at.step,
            layout: &self.learner.model.layout,
            params: &self.learner.params,
            optimizer: self.learner.optimizer.state(),
            state: json!(state),
            tokenizer: self.dataset.tokenizer.to_bytes(),
            config: &config,
        })?;
        self.saved_step = Some(self.at.step);
        self.event("checkpoint", format!("saved {}", path.display()))
    }

    fn row(&self, kind: &str) -> Row {
        let mut row = Row::new(self.at.step, self.at.tokens, kind);
        row.text("phase", self.phase_name());
        row
    }

    fn event(&mut self, event: &str, message: String) -> Result<(), TrainError> {
        let mut row = self.row("event");
        row.text("event", event);
        row.text("message", &message);
        self.push(row)
    }

    fn push(&mut self, row: Row) -> Result<(), TrainError> {
        self.directory.append(&row)?;
        self.queue.push_back(row);
        Ok(())
    }
}

fn failed(error: impl std::fmt::Display) -> TrainError {
    TrainError::Failed(error.to_string())
}

/// Data, model and optimizer of a run; nothing on disk.
fn prepare(run: &Run) -> Result<(Dataset, Learner), TrainError> {
    run.engine.check().map_err(|error| TrainError::Usage(error.to_string()))?;
    let dataset = Dataset::load(run).map_err(|error| TrainError::Usage(error.to_string()))?;
    let inputs = dataset.longest() - 1;
    if let Some(max) = run.model.max_positions().filter(|max| *max < inputs) {
        let remedy = "raise it or lower data.max_length";
        return Err(TrainError::Usage(format!(
            "model.position.max = {max}: the longest document has {inputs} inputs; {remedy}"
        )));
    }
    let learner = Learner::new(run, dataset.tokenizer.vocab_size(), &run.phase(dataset.phases[0].name))?;
    Ok((dataset, learner))
}

/// Puts a checkpoint into `learner` and returns the rest of it.
fn restore(path: &Path, run: &Run, learner: &mut Learner) -> Result<State, TrainError> {
    let bad = |what: String| TrainError::Failed(format!("{}: {what}; choose another checkpoint", path.display()));
    let loaded = checkpoint::load(path, &learner.model.layout).map_err(failed)?;
    let mut state: State = serde_json::from_value(loaded.state).map_err(|error| bad(format!("state.json: {error}")))?;
    learner.params = loaded.params;
    for (layer, (policy, control)) in learner.policies.iter_mut().zip(state.controls.drain(..)).enumerate() {
        policy.restore(control, layer).map_err(|error| bad(error.to_string()))?;
    }
    let phases = run.phases();
    let settings = run.phase(phases[state.position.phase.min(phases.len() - 1)]);
    learner.optimizer = Optimizer::restore(
        settings.optimizer_kind(),
        settings.optimizer_settings(),
        &learner.model.layout,
        loaded.optimizer,
    )
    .map_err(bad)?;
    Ok(state)
}

/// Batches of an epoch; a text phase is cut into epochs of `eval.every` steps.
fn epoch_batches(run: &Run, dataset: &Dataset, phase: usize) -> u64 {
    match &dataset.phases[phase].data {
        PhaseData::Documents { order, .. } => order.batches_per_epoch() as u64,
        PhaseData::Text(_) => match (run.eval.every, run.phase("text").max_steps) {
            (0, steps) => steps,
            (every, steps) => every.min(steps),
        },
    }
}

/// Updates of a phase.
fn phase_steps(run: &Run, dataset: &Dataset, phase: usize) -> u64 {
    let settings = run.phase(dataset.phases[phase].name);
    match &dataset.phases[phase].data {
        PhaseData::Documents { order, .. } => settings.epochs * order.batches_per_epoch() as u64,
        PhaseData::Text(_) => settings.max_steps,
    }
}

/// The measurements of an update as columns of its row.
fn describe(row: &mut Row, update: &Update, rate: f64) {
    row.number("train/loss", update.cross_entropy);
    row.number("train/total_loss", update.total);
    row.number("train/learning_rate", rate);
    row.number("train/lr_scale_mean", update.scale_mean);
    row.number("train/grad_norm", update.grad_norm);
    row.integer("train/clipped", u64::from(update.clipped));
    row.number("train/l0", update.activation_norms[0]);
    for (name, value) in loss::means(&update.auxiliary) {
        row.number(&format!("losses/{name}"), value);
    }
    if !update.experts_per_token.is_empty() {
        let sum: f64 = update.experts_per_token.iter().map(|(_, experts)| experts).sum();
        row.number("moe/experts_per_token", sum / update.experts_per_token.len() as f64);
    }
    for (layer, experts) in &update.experts_per_token {
        row.number(&format!("moe/layer_{layer:02}/experts_per_token"), *experts);
    }
    for layer in 0..update.param_norms.len() {
        row.number(&format!("grad/layer_{layer:02}/param_norm"), six_digits(update.param_norms[layer]));
        row.number(&format!("grad/layer_{layer:02}/activation_norm"), six_digits(update.activation_norms[layer]));
        row.number(&format!("update/layer_{layer:02}/ratio"), six_digits(update.ratios[layer]));
    }
}

/// Rounded to six significant digits: these columns are most of a row, and nobody reads more of them.
fn six_digits(value: f64) -> f64 {
    format!("{value:.5e}").parse().unwrap_or(value)
}

/// The name in `results` of an evaluation at the end of a phase.
fn result_name(name: &'static str, phase: &str) -> &'static str {
    match (name, phase) {
        ("eval/facts_loss", "facts") => "facts_loss_before",
        ("eval/facts_loss", _) => "facts_loss_after",
        ("eval/loss", _) => "eval_loss",
        _ => name.trim_start_matches("eval/"),
    }
}

/// What a run would do, without doing it: sizes, steps, floors, memory. Reads the data, writes nothing.
pub fn plan(run: &Run) -> Result<Map<String, Value>, TrainError> {
    let (dataset, learner) = prepare(run)?;
    let mut plan = Map::new();
    plan.insert("name".into(), json!(run.name));
    plan.insert("vocab_size".into(), json!(learner.model.vocab_size));
    plan.insert("params".into(), json!(learner.model.layout.count()));
    for (number, phase) in dataset.phases.iter().enumerate() {
        let name = phase.name;
        match &phase.data {
            PhaseData::Documents { train, validation, .. } => {
                plan.insert(format!("{name}_documents"), json!(train.documents.len()));
                plan.insert(format!("{name}_validation_documents"), json!(validation.documents.len()));
                plan.insert(format!("{name}_documents_cut"), json!(train.cut));
                plan.insert(format!("{name}_tokens_per_epoch"), json!(train.tokens() - train.documents.len()));
                plan.insert(format!("{name}_floor"), json!(phase.floor.map(|floor| floor.macro_average)));
            }
            PhaseData::Text(text) => {
                plan.insert(format!("{name}_tokens"), json!(text.part(Split::Train).len()));
                plan.insert(format!("{name}_validation_tokens"), json!(text.part(Split::Validation).len()));
            }
        }
        plan.insert(format!("{name}_steps"), json!(phase_steps(run, &dataset, number)));
    }
    plan.insert("unknown_words".into(), json!(dataset.unknowns.count));
    // Parameters, gradients, and the moments of the optimizer.
    let buffers = 2 + learner.optimizer.state().moments.len();
    plan.insert("state_bytes".into(), json!(buffers * learner.model.layout.len() * size_of::<f32>()));
    Ok(plan)
}
