//! The training loop: every call of `next_row` does one update (or hands out a row that an update left) and writes what it did. Kill it
//! anywhere: `resume` goes on from the newest whole checkpoint and ends with the same bytes.

mod control;
mod fault;
mod lr_find;
mod report;
mod save;
mod state;
#[cfg(test)]
mod tests;

pub use lr_find::LrFind;
pub use state::checked_state;

use crate::auto_clip::AutoClip;
use crate::checkpoint;
use crate::data::{Split, sha256};
use crate::dataset::{Dataset, PhaseData};
use crate::directory::{self, RunDirectory};
use crate::early::EarlyStop;
use crate::ema;
use crate::epoch::Epoch;
use crate::error::TrainError;
use crate::files::{Disk, parent, system};
use crate::guard::Guard;
use crate::learner::{Learner, StepError};
use crate::metrics::Row;
use crate::monitor::Monitor;
use crate::noise::NoiseScale;
use crate::optimizers::Optimizer;
use crate::record::{Status, write_run_file};
use crate::run::{BatchScaling, OnNonfinite, OnSpike, Run, Train};
use moe_router::{Control, Policy};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use std::collections::{BTreeSet, VecDeque};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tensor::Layout;

/// A peak learning rate below this is told of: hardly anything is learned at it.
const LOW_RATE: f64 = 1e-5;

/// What comes next.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
struct Position {
    phase: usize,
    /// Epochs finished in the phase.
    epoch: u64,
    /// Batches finished in the epoch.
    batch: u64,
    /// Updates made, over all phases.
    step: u64,
    /// Batches finished in the phase: its updates, unless a response joined some.
    phase_step: u64,
    /// Targets trained on, over all phases.
    tokens: u64,
    /// Floating-point operations of the matrix products of those updates.
    #[serde(default)]
    flops: f64,
}

/// What a checkpoint holds beside parameters, their mean and moments.
#[derive(Serialize, Deserialize)]
struct State {
    position: Position,
    epoch: Epoch,
    results: Map<String, Value>,
    controls: Vec<Control>,
    #[serde(default)]
    memory: Memory,
}

/// What the loop remembers beside its place.
#[derive(Clone, Default, Serialize, Deserialize)]
struct Memory {
    guard: Guard,
    early: EarlyStop,
    /// The step with the best held-out loss that was saved for it.
    best: Option<u64>,
    /// Updates not taken in a row because of a fault.
    skipped_in_a_row: u32,
    /// Steps whose batches are left out after a return to a checkpoint.
    left_out: BTreeSet<u64>,
    #[serde(default)]
    auto_clip: AutoClip,
    #[serde(default)]
    monitor: Monitor,
    #[serde(default)]
    noise: NoiseScale,
    /// Updates that the running mean has taken in.
    #[serde(default)]
    averaged: u64,
}

/// The same in every checkpoint of a run.
struct Texts {
    tokenizer: Arc<[u8]>,
    config: Arc<str>,
    fingerprints: Arc<Map<String, Value>>,
}

pub struct Trainer {
    run: Run,
    dataset: Dataset,
    learner: Learner,
    directory: RunDirectory,
    at: Position,
    epoch: Epoch,
    results: Map<String, Value>,
    memory: Memory,
    /// Running mean of the parameters, where the phase keeps one.
    ema: Option<Vec<f32>>,
    /// Returns to a checkpoint since the last one was saved.
    returns: u32,
    layout: Arc<Layout>,
    texts: Texts,
    /// The newest step known to be saved, and the one this process resumed from.
    saved_step: Option<u64>,
    resumed: Option<u64>,
    /// A save is to be started as soon as none is in flight.
    due: bool,
    /// Saves that failed in a row, and why the last one did.
    misses: u32,
    missed: Option<String>,
    /// When a save is slow, and the step of the one that was told of.
    slow: Duration,
    told_slow: Option<u64>,
    /// The streams could not be written last time.
    refused: bool,
    last_row: Option<Row>,
    queue: VecDeque<Row>,
    notes: Vec<String>,
    done: bool,
}

impl Trainer {
    /// Validates everything, then makes the run directory (`out`, or runs/<time>-<name>) and writes run.toml and run.json. An error before
    /// that leaves no trace.
    pub fn new(run: Run, out: Option<&Path>, parent: Option<String>) -> Result<Self, TrainError> {
        Self::new_on(system(), run, out, parent)
    }

    /// As [`Trainer::new`], on another disk.
    pub fn new_on(disk: Disk, run: Run, out: Option<&Path>, parent: Option<String>) -> Result<Self, TrainError> {
        let (dataset, learner) = prepare(&run)?;
        check_room(&disk, out.unwrap_or(Path::new("runs")), &learner)?;
        let steps = total_steps(&run, &dataset);
        let directory = RunDirectory::create(&disk, &run, out, parent, &dataset, steps)?;
        let mut trainer = Trainer::assemble(run, dataset, learner, directory);
        trainer.event("run_started", format!("run {} started", trainer.id()))?;
        trainer.phase_started()?;
        Ok(trainer)
    }

    /// Goes on where the run in `out` stopped: from its newest whole checkpoint, or from the beginning if there is none.
    pub fn resume(out: &Path) -> Result<Self, TrainError> {
        Self::resume_on(system(), out)
    }

    /// As [`Trainer::resume`], on another disk.
    pub fn resume_on(disk: Disk, out: &Path) -> Result<Self, TrainError> {
        Self::resume_with(disk, out, &[])
    }

    /// As [`Trainer::resume`], from here on with other values of `engine`, `device` or `dtype` ([`directory::MOVABLE`]); run.toml then says them.
    pub fn resume_moved(out: &Path, place: &[(String, Value)]) -> Result<Self, TrainError> {
        Self::resume_with(system(), out, place)
    }

    fn resume_with(disk: Disk, out: &Path, place: &[(String, Value)]) -> Result<Self, TrainError> {
        let (run, mut record, lock) = RunDirectory::open(out, place)?;
        let changes = directory::check_config(&record, &run, place)?;
        let (dataset, mut learner) = prepare(&run)?;
        directory::check_data(&record, &dataset.sources)?;
        if record.status == Status::Completed {
            let results = record.results.clone();
            let directory = RunDirectory::completed(&disk, out, record, lock)?;
            let mut trainer = Trainer::assemble(run, dataset, learner, directory);
            trainer.notes.push(format!("{} is completed; nothing to do", out.display()));
            (trainer.results, trainer.done) = (results, true);
            return Ok(trainer);
        }
        let found = checkpoint::recover(&*disk, out, &learner.model.layout)?;
        let mut notes = Vec::new();
        for (path, reason) in &found.skipped {
            let aside = match checkpoint::set_aside(&*disk, path) {
                Ok(aside) => format!("kept as {}", aside.display()),
                Err(error) => format!("left where it is ({error})"),
            };
            notes.push(format!("skipped {}: {reason}; {aside}", path.display()));
        }
        notes.extend(changes.iter().map(|change| format!("{} is now {}, was {}", change.key, change.b, change.a)));
        let saved = found.checkpoint.as_ref().map(|(_, loaded)| loaded.fingerprints.clone());
        if found.checkpoint.is_none() {
            notes.push("no whole checkpoint; starting at step 0".into());
        }
        let restored =
            found.checkpoint.map(|(path, loaded)| restore(&path, loaded, &run, &dataset, &mut learner)).transpose()?;
        let step = restored.as_ref().map_or(0, |(state, _)| state.position.step);
        (record.config, record.total_steps) = (json!(run), Some(total_steps(&run, &dataset)));
        let directory = RunDirectory::reopen(&disk, out, record, lock, step)?;
        if !place.is_empty() {
            write_run_file(&*disk, out, &run.to_toml())?;
        }
        directory.forget_failure()?;
        let mut trainer = Trainer::assemble(run, dataset, learner, directory);
        let differs =
            |name: &str| saved.as_ref().is_some_and(|saved| saved.get(name) != trainer.texts.fingerprints.get(name));
        if differs("isa") {
            notes.push(
                "another instruction set than before: the bytes will not be those of a run that never stopped".into(),
            );
        }
        trainer.resumed = restored.is_some().then_some(step);
        trainer.adopt(restored);
        let on = place.iter().map(|(key, value)| format!(", {key} = {value}")).collect::<String>();
        trainer.event("resumed", format!("resumed at step {step}{on}"))?;
        for note in &notes {
            trainer.event("resume_note", note.clone())?;
        }
        trainer.notes = notes;
        Ok(trainer)
    }

    fn assemble(run: Run, dataset: Dataset, learner: Learner, directory: RunDirectory) -> Self {
        Trainer {
            epoch: Epoch::new(&learner.policies),
            at: Position::default(),
            results: Map::new(),
            memory: Memory::default(),
            ema: None,
            returns: 0,
            layout: Arc::new(learner.model.layout.clone()),
            texts: Texts::new(&run, &dataset, &learner),
            saved_step: None,
            resumed: None,
            due: false,
            misses: 0,
            missed: None,
            slow: save::SLOW,
            told_slow: None,
            refused: false,
            last_row: None,
            queue: VecDeque::new(),
            notes: Vec::new(),
            done: false,
            run,
            dataset,
            learner,
            directory,
        }
    }

    /// Takes over what a checkpoint holds beside the learner's part; none is the beginning of the run.
    fn adopt(&mut self, restored: Option<(State, Option<Vec<f32>>)>) {
        self.saved_step = restored.as_ref().map(|(state, _)| state.position.step);
        match restored {
            Some((state, ema)) => {
                (self.at, self.epoch, self.results) = (state.position, state.epoch, state.results);
                (self.memory, self.ema) = (state.memory, ema);
            }
            None => {
                (self.at, self.epoch) = (Position::default(), Epoch::new(&self.learner.policies));
                (self.results, self.memory, self.ema) = (Map::new(), Memory::default(), None);
            }
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
            if let Err(error) = self.advance() {
                if !self.done {
                    self.fail(&error);
                }
                return Err(error);
            }
        }
    }

    /// Ends the run early after a full checkpoint; `resume` goes on from it.
    pub fn stop(&mut self, reason: &str) -> Result<(), TrainError> {
        if self.done {
            return Ok(());
        }
        let stopped = self
            .event("stopped", format!("stopped at step {}: {reason}", self.at.step))
            .and_then(|()| self.save())
            .and_then(|()| self.directory.finish(Status::Stopped, &self.results));
        match stopped {
            Ok(()) => self.done = true,
            Err(ref error) if !self.done => self.fail(error),
            Err(_) => {}
        }
        stopped
    }

    /// The threads of its updates, where they are the pool's.
    pub fn pool(&self) -> Option<Arc<rayon::ThreadPool>> {
        (self.run.engine != tensor::Engine::Torch).then(|| self.learner.pool.clone())
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
        total_steps(&self.run, &self.dataset)
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

    /// One update, and what follows from where it ends: epoch rows, evaluation, checkpoint, the next phase, the end of the run.
    fn advance(&mut self) -> Result<(), TrainError> {
        if self.at.phase == self.dataset.phases.len() {
            return self.complete(); // killed between the last checkpoint and the record of the end
        }
        if !self.update()? {
            return Ok(()); // back at a checkpoint
        }
        let steps = phase_steps(&self.run, &self.dataset, self.at.phase);
        let mut last = self.at.phase_step == steps;
        let mut better = false;
        if last || self.at.batch == epoch_batches(&self.run, &self.dataset, self.at.phase) {
            self.at.epoch += 1;
            self.at.batch = 0;
            (last, better) = self.end_epoch(last)?;
        }
        if last {
            // Another phase, other losses and gradients.
            (self.memory.guard, self.memory.early) = Default::default();
            (self.memory.auto_clip, self.memory.monitor, self.memory.noise) = Default::default();
            (self.at.phase, self.at.epoch, self.at.phase_step) = (self.at.phase + 1, 0, 0);
            if self.at.phase == self.dataset.phases.len() {
                return self.complete();
            }
            let settings = self.settings();
            self.learner.carry_optimizer(&settings)?;
            self.phase_started()?;
        }
        if better {
            self.save_best()?;
        }
        self.save_if_due()
    }

    /// One update, or what takes its place; false if the run returned to a checkpoint instead.
    fn update(&mut self) -> Result<bool, TrainError> {
        let started = Instant::now();
        let step = self.next_step();
        if self.memory.left_out.contains(&(self.at.step + 1)) {
            self.move_on(0, step.batches);
            return self.event("left_out", format!("the batch of step {} is left out", self.at.step)).map(|()| true);
        }
        let settings = &step.settings;
        let batch = control::batch_at(&self.dataset.phases[self.at.phase].data, &self.at, step.batches);
        let acts = settings.on_nonfinite != OnNonfinite::Stop || settings.on_spike != OnSpike::Off;
        let before = acts.then(|| self.epoch.clone());
        let guard = (!matches!(settings.on_spike, OnSpike::Off | OnSpike::Warn)).then_some(&self.memory.guard);
        match settings.ema > 0.0 {
            true if self.ema.is_none() => {
                (self.ema, self.memory.averaged) = (Some(self.learner.params.clone()), 0);
            }
            true => {}
            false => self.ema = None,
        }
        let update = match self.learner.update(&batch, settings, step.rate, &mut self.epoch, guard) {
            Ok(update) => update,
            Err(StepError::Fault(fault)) => return self.fault(fault, &step, &batch, before),
            Err(StepError::Device(reason)) => return Err(self.device_failed(&reason)),
        };
        if let Some(bytes) = self.learner.peak_arena_bytes() {
            self.directory.note_arena(bytes);
        }
        if let Some(mean) = &mut self.ema {
            self.learner.fetch()?;
            let decay = ema::decay(settings.ema, self.memory.averaged);
            self.learner.pool.install(|| ema::track(mean, &self.learner.params, decay));
            self.memory.averaged += 1;
        }
        let targets = batch.len();
        self.move_on(targets as u64, step.batches);
        self.at.flops += self.learner.flops(&batch, settings, &update);
        self.memory.skipped_in_a_row = 0;
        if settings.on_spike != OnSpike::Off {
            self.watch(&update, settings)?;
        }
        let originals = self.dataset.phases[self.at.phase].originals;
        let l0 = update.activation_norms[0];
        self.epoch.add_batch(&batch, &update.document_losses, update.loss_sum, originals, l0);
        self.epoch.add_windows(update.window());
        let mut row = self.row("train");
        row.integer("epoch", self.at.epoch + 1);
        if !self.run.data.lengths.is_empty() {
            row.integer("train/length", batch.offsets_b1[1] as u64);
        }
        row.number("flops", self.at.flops);
        report::describe(&mut row, &update, step.rate);
        let alerts = self.remember(&step, &update, &mut row);
        let seconds = started.elapsed().as_secs_f64();
        row.number("train/dt", seconds);
        row.number("train/tok_per_sec", targets as f64 / seconds);
        self.last_row = Some(row.clone());
        self.push(row)?;
        self.alert(alerts).map(|()| true)
    }

    /// Past the `batches` of an update, with `targets` trained on.
    fn move_on(&mut self, targets: u64, batches: u64) {
        self.at.step += 1;
        self.at.phase_step += batches;
        self.at.batch += batches;
        self.at.tokens += targets;
    }

    /// The learning rate of the next update: by step in a text phase, by epoch in the others.
    fn rate(&self, settings: &Train) -> f64 {
        let position = match self.dataset.phases[self.at.phase].data {
            PhaseData::Documents { .. } => self.at.epoch,
            PhaseData::Text(_) => self.at.phase_step,
        };
        self.run.schedule(self.phase_name()).rate(settings.peak_rate(), position)
    }

    fn complete(&mut self) -> Result<(), TrainError> {
        let experts = self.results.get("experts_per_token").and_then(Value::as_f64).unwrap_or(0.0);
        let model = &self.learner.model;
        self.results.insert("tokens".into(), json!(self.at.tokens));
        self.results.insert("params".into(), json!(model.layout.count()));
        self.results.insert("active_params".into(), json!(model.active_params(experts).round() as u64));
        self.results.insert("flops_per_token".into(), json!((self.at.flops / self.at.tokens.max(1) as f64).round()));
        self.results.insert("unknown_words".into(), json!(self.dataset.unknowns.count));
        self.save()?;
        self.event("completed", format!("completed {} steps", self.at.step))?;
        self.directory.finish(Status::Completed, &self.results)?;
        self.done = true;
        Ok(())
    }

    /// Says that a phase begins, and its rate where that is not the one written down or too low to learn at.
    fn phase_started(&mut self) -> Result<(), TrainError> {
        let settings = self.settings();
        let scaled = match settings.batch_scaling {
            BatchScaling::None => String::new(),
            BatchScaling::Linear | BatchScaling::Sqrt => format!(
                ", peak rate {} = {} for batches of {}, carried over to {}",
                settings.peak_rate(),
                settings.learning_rate,
                settings.base_batch_size,
                settings.batch_size
            ),
        };
        self.event("phase_started", format!("phase {} started{scaled}", self.phase_name()))?;
        self.tell_of_a_low_rate(settings.peak_rate())
    }

    fn tell_of_a_low_rate(&mut self, peak: f64) -> Result<(), TrainError> {
        if peak >= LOW_RATE {
            return Ok(());
        }
        let (phase, remedy) = (self.phase_name(), "next to nothing is learned there; raise train.learning_rate");
        let message = format!("phase {phase}: the peak learning rate {peak:e} is below {LOW_RATE:e}; {remedy}");
        self.event("low_rate", message)
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

    /// Into the stream and to the caller. A disk that refuses is told once; the rows wait for it in memory.
    fn push(&mut self, row: Row) -> Result<(), TrainError> {
        let written = self.directory.append(&row);
        self.queue.push_back(row);
        self.tell(written)
    }
}

impl Texts {
    fn new(run: &Run, dataset: &Dataset, learner: &Learner) -> Self {
        // Nothing that may differ between equal runs: no place, no name, no thread count, no cadence.
        let mut config = run.clone();
        (config.name, config.threads, config.checkpoint) = (String::new(), 0, Default::default());
        (config.data.facts, config.data.chat, config.data.paraphrases, config.data.text) = (None, None, None, None);
        (config.data.augment.table, config.data.routing) = (None, None);
        let tokenizer: Arc<[u8]> = dataset.tokenizer.to_bytes().into();
        let sources = dataset.sources.iter().map(|(role, source)| (role.to_string(), json!(source.sha256)));
        let fingerprints = Map::from_iter([
            ("config".to_owned(), json!(sha256(config.to_toml().as_bytes()))),
            ("data".to_owned(), Value::Object(sources.collect())),
            ("tokenizer".to_owned(), json!(sha256(&tokenizer))),
            ("seed".to_owned(), json!(run.seed)),
            ("isa".to_owned(), json!(tensor::isa::current())),
        ]);
        let config = crate::trained::config_json(&learner.model).into();
        Texts { tokenizer, config, fingerprints: Arc::new(fingerprints) }
    }
}

/// A run does not start where two checkpoints of it have no room.
fn check_room(disk: &Disk, out: &Path, learner: &Learner) -> Result<(), TrainError> {
    let mut place = out;
    while !place.is_dir() && place != parent(place) {
        place = parent(place);
    }
    let needed = 2 * learner.state_bytes();
    match disk.free(place) {
        Ok(free) if free < needed => Err(TrainError::Failed(format!(
            "E-DISK: two checkpoints of this run need {needed} bytes but {} has {free} free; make room or choose another --out",
            place.display()
        ))),
        _ => Ok(()),
    }
}

fn failed(error: impl std::fmt::Display) -> TrainError {
    TrainError::Failed(error.to_string())
}

/// Data, model and optimizer of a run; nothing on disk.
fn prepare(run: &Run) -> Result<(Dataset, Learner), TrainError> {
    run.engine.check(&run.device).map_err(|error| TrainError::Usage(error.to_string()))?;
    let dataset = Dataset::load(run).map_err(|error| TrainError::Usage(error.to_string()))?;
    let inputs = dataset.longest() - 1;
    if let Some(max) = run.model.max_positions().filter(|max| *max < inputs) {
        let remedy = match (&run.data.text, run.data.lengths.is_empty()) {
            (None, _) => "raise it or lower data.max_length",
            (Some(_), true) => "raise it or lower data.block_size",
            (Some(_), false) => "raise it or take the longest out of data.lengths",
        };
        return Err(TrainError::Usage(format!(
            "model.position.max = {max}: the longest document has {inputs} inputs; {remedy}"
        )));
    }
    crate::estimate::check(run, &dataset)?;
    let mut learner = Learner::new(run, dataset.tokenizer.vocab_size(), &run.phase(dataset.phases[0].name))?;
    learner.policies = policies(&dataset, &learner)?;
    Ok((dataset, learner))
}

/// Fresh policies of a run.
fn policies(dataset: &Dataset, learner: &Learner) -> Result<Vec<Policy>, TrainError> {
    dataset.overrule(learner.model.policies()).map_err(|error| TrainError::Usage(error.to_string()))
}

/// Puts a checkpoint into `learner` and returns the rest of it.
fn restore(
    path: &Path,
    loaded: checkpoint::Checkpoint,
    run: &Run,
    dataset: &Dataset,
    learner: &mut Learner,
) -> Result<(State, Option<Vec<f32>>), TrainError> {
    let bad = |what: String| TrainError::Failed(format!("{}: {what}; choose another checkpoint", path.display()));
    let mut policies = policies(dataset, learner)?;
    let state =
        state::read(loaded.state, run, dataset, &mut policies).map_err(|what| bad(format!("state.json: {what}")))?;
    learner.params = loaded.params;
    learner.policies = policies;
    let phases = run.phases();
    let settings = run.phase(phases[state.position.phase.min(phases.len() - 1)]);
    learner.optimizer = Optimizer::restore(
        settings.optimizer_kind(),
        settings.optimizer_settings(),
        &learner.model.layout,
        loaded.optimizer,
    )
    .map_err(bad)?;
    Ok((state, loaded.ema))
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

/// Updates of the whole run, if no phase ends early.
fn total_steps(run: &Run, dataset: &Dataset) -> u64 {
    (0..dataset.phases.len()).map(|phase| phase_steps(run, dataset, phase)).sum()
}

/// What a run would do, without doing it: sizes, steps, floors, memory, disk, time. Reads the data, writes nothing.
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
                if let Some(floor) = phase.augmented_floor {
                    plan.insert(format!("{name}_variants"), json!(train.documents.len() - phase.originals));
                    plan.insert(format!("{name}_augmented_floor"), json!(floor.macro_average));
                }
            }
            PhaseData::Text(text) => {
                plan.insert(format!("{name}_tokens"), json!(text.part(Split::Train).len()));
                plan.insert(format!("{name}_validation_tokens"), json!(text.part(Split::Validation).len()));
            }
        }
        plan.insert(format!("{name}_steps"), json!(phase_steps(run, &dataset, number)));
        let settings = run.phase(name);
        if settings.batch_scaling != BatchScaling::None {
            plan.insert(format!("{name}_peak_rate"), json!(settings.peak_rate()));
        }
    }
    plan.insert("unknown_words".into(), json!(dataset.unknowns.count));
    // Parameters, gradients, and the moments of the optimizer.
    let buffers = 2 + learner.optimizer.state().moments.len();
    plan.insert("state_bytes".into(), json!(buffers * learner.model.layout.len() * size_of::<f32>()));
    plan.extend(crate::estimate::plan(run, &dataset, learner, total_steps(run, &dataset))?);
    Ok(plan)
}
