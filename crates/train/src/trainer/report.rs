//! What the loop says on the way: the row of an update, the rows of an epoch, evaluation, samples.

use super::{Trainer, failed};
use crate::data::Split;
use crate::dataset::PhaseData;
use crate::epoch::Epoch;
use crate::error::TrainError;
use crate::evaluate;
use crate::learner::Update;
use crate::loss;
use crate::metrics::Row;
use model::generate::{Sampling, Weights};
use serde_json::{Value, json};

/// Columns of an evaluation.
type Measured = Vec<(&'static str, Value)>;

impl Trainer {
    /// The rows of an epoch that just ended: routing, loss beside its floor, and the evaluation where it is due. Returns whether the phase ends
    /// here, and whether this state is to be kept as the best.
    pub(super) fn end_epoch(&mut self, last: bool) -> Result<(bool, bool), TrainError> {
        let every = self.run.eval.every;
        let text = matches!(self.dataset.phases[self.at.phase].data, PhaseData::Text(_));
        let due = last || text || (every > 0 && self.at.epoch.is_multiple_of(every));
        if due {
            self.learner.fetch()?;
        }
        let held_out = if due { self.held_out() } else { Vec::new() };
        let (better, last) = self.judge_held_out(&held_out, last)?;
        let next = Epoch::new(&self.learner.policies);
        let mut finished = std::mem::replace(&mut self.epoch, next);
        if !self.learner.policies.is_empty() {
            let mut row = self.row("moe");
            row.integer("epoch", self.at.epoch);
            let (summary, alarms) = finished.routing(&mut row, self.run.seed);
            for (layer, policy) in self.learner.policies.iter().enumerate() {
                if let Some(p) = policy.threshold() {
                    row.number(&format!("moe/layer_{layer:02}/p"), p);
                }
            }
            self.epoch.keep_alarms(&finished);
            self.push(row)?;
            for message in alarms {
                self.event("collapse", message)?;
            }
            if last {
                self.results.insert("experts_per_token".into(), json!(summary.mean));
                self.results.insert("experts_std".into(), json!(summary.std));
                self.results.insert("load_p5".into(), json!(summary.load_p5));
                self.results.insert("load_p95".into(), json!(summary.load_p95));
            }
        }
        let phase = &self.dataset.phases[self.at.phase];
        let mut row = self.row("eval");
        row.integer("epoch", self.at.epoch);
        finished.losses(&mut row, phase.floor);
        if let Some(floor) = phase.augmented_floor {
            row.number("epoch/augmented_loss", finished.augmented_loss());
            row.number("epoch/augmented_floor", floor.macro_average);
            if last {
                self.results.insert("augmented_loss".into(), json!(finished.augmented_loss()));
                self.results.insert("augmented_floor".into(), json!(floor.macro_average));
            }
        }
        if last {
            let floor = phase.floor.map(|floor| floor.macro_average);
            self.results.insert("loss".into(), json!(finished.macro_loss()));
            self.results.insert("loss_micro".into(), json!(finished.micro_loss()));
            self.results.insert("floor".into(), json!(floor));
            self.results.insert("excess".into(), json!(floor.map(|floor| finished.macro_loss() - floor)));
            self.results.insert("l0".into(), json!(finished.l0_mean()));
            if let Some([mean, masked]) = finished.windows() {
                self.results.insert("window_mean".into(), json!(mean));
                self.results.insert("window_masked".into(), json!(masked));
            }
        }
        if due {
            let rest = if last { self.evaluate_phase() } else { Vec::new() };
            for (name, value) in held_out.into_iter().chain(rest) {
                if last {
                    self.results.insert(result_name(name, self.phase_name()).into(), value.clone());
                }
                row.value(name, value);
            }
            for (length, loss) in self.held_out_by_length() {
                if last {
                    self.results.insert(format!("eval_loss_{length}"), json!(loss));
                }
                row.number(&format!("eval/loss_{length}"), loss);
            }
            self.sample()?;
        }
        self.push(row)?;
        Ok((last, better))
    }

    /// Takes an evaluation into account: whether it is the best so far and to be kept, and whether the phase ends here.
    fn judge_held_out(&mut self, held_out: &[(&'static str, Value)], last: bool) -> Result<(bool, bool), TrainError> {
        let settings = self.settings();
        let loss = held_out.iter().find(|(name, _)| *name == "eval/loss").and_then(|(_, value)| value.as_f64());
        let (Some(loss), true) = (loss, settings.patience > 0 || self.run.checkpoint.best) else {
            return Ok((false, last));
        };
        let better = self.memory.early.observe(loss, settings.min_delta);
        if better {
            self.results.insert("best_eval_loss".into(), json!(loss));
            self.results.insert("best_step".into(), json!(self.at.step));
        }
        let stops = !last && self.memory.early.is_spent(settings.patience);
        if stops {
            let best = self.memory.early.best().unwrap_or(f64::NAN);
            let (phase, patience) = (self.phase_name(), settings.patience);
            let message =
                format!("phase {phase} ends early: no held-out loss below {best:.4} in {patience} evaluations");
            self.event("early_stop", message)?;
        }
        Ok((better, last || stops))
    }

    /// Losses of the held-out data, with the parameters and with their mean. Touches no gradient.
    fn held_out(&self) -> Measured {
        let phase = &self.dataset.phases[self.at.phase];
        let loss = |weights: &Weights<'_>| match &phase.data {
            PhaseData::Documents { validation, .. } => {
                let held_out: Vec<_> = validation.documents.iter().collect();
                evaluate::losses(weights, &held_out).map(|(mean, _)| mean)
            }
            PhaseData::Text(text) => {
                evaluate::window_loss(weights, text.eval_batches(Split::Validation, self.run.eval.batches))
            }
        };
        self.learner.pool.install(|| {
            let raw = loss(&self.learner.weights()).map(|mean| ("eval/loss", json!(mean)));
            let mean =
                self.mean_weights().and_then(|weights| loss(&weights)).map(|mean| ("eval/ema_loss", json!(mean)));
            raw.into_iter().chain(mean).collect()
        })
    }

    /// Held-out losses of the lengths of a text run that draws several.
    fn held_out_by_length(&self) -> Vec<(usize, f64)> {
        let PhaseData::Text(text) = &self.dataset.phases[self.at.phase].data else { return Vec::new() };
        let weights = self.learner.weights();
        self.learner.pool.install(|| evaluate::losses_by_length(&weights, text, self.run.eval.batches))
    }

    /// The running mean of the parameters in place of them.
    fn mean_weights(&self) -> Option<Weights<'_>> {
        Some(Weights { params: self.ema.as_deref()?, ..self.learner.weights() })
    }

    /// At the end of a phase: loss on what was trained on, recitation and forgetting.
    fn evaluate_phase(&self) -> Measured {
        let mut found: Measured = Vec::new();
        let (weights, phase) = (self.learner.weights(), &self.dataset.phases[self.at.phase]);
        self.learner.pool.install(|| {
            if let Some((mean, micro)) = evaluate::losses(&weights, &phase.documents()) {
                found.push(("eval/train_loss", json!(mean)));
                found.push(("eval/train_loss_micro", json!(micro)));
                let capacity = evaluate::capacity(&weights, &phase.documents());
                found.extend(capacity.map(|share| ("eval/capacity", json!(share))));
                let averaged = self.mean_weights().and_then(|weights| evaluate::losses(&weights, &phase.documents()));
                found.extend(averaged.map(|(mean, _)| ("eval/ema_train_loss", json!(mean))));
                let facts = evaluate::losses(&weights, &self.dataset.phases[0].documents());
                found.extend(facts.map(|(mean, _)| ("eval/facts_loss", json!(mean))));
            }
            if phase.name == "chat" {
                found.extend(evaluate::questions(&weights, &self.dataset, self.dataset.longest_answer(&self.run)));
            }
        });
        if phase.name == "facts" {
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
        let written = self.directory.append_samples(self.at.step, self.phase_name(), self.at.epoch, &samples);
        self.tell(written)
    }

    pub(super) fn continue_greedily(&self, prompt: &[u32]) -> Vec<u32> {
        let (limit, stop) = (self.dataset.longest_answer(&self.run), self.dataset.stop());
        let weights = self.learner.weights();
        self.learner.pool.install(|| weights.generate(prompt, limit, stop, Sampling::GREEDY, true))
    }
}

/// The measurements of an update as columns of its row.
pub(super) fn describe(row: &mut Row, update: &Update, rate: f64) {
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
    if let Some(experts) = update.mean_experts() {
        row.number("moe/experts_per_token", experts);
    }
    for (layer, experts) in &update.experts_per_token {
        row.number(&format!("moe/layer_{layer:02}/experts_per_token"), *experts);
    }
    by_layer(row, ["depths/capacity", "depths/causal_capacity", "depths/accuracy"], &update.depths);
    by_layer(row, ["window/mean", "window/masked"], &update.windows);
    for layer in 0..update.param_norms.len() {
        row.number(&format!("grad/layer_{layer:02}/param_norm"), six_digits(update.param_norms[layer]));
        row.number(&format!("grad/layer_{layer:02}/activation_norm"), six_digits(update.activation_norms[layer]));
        row.number(&format!("update/layer_{layer:02}/ratio"), six_digits(update.ratios[layer]));
    }
}

/// Columns "group/name" with means over layers and "group/layer_NN/name" of each, where there are any.
fn by_layer<const N: usize>(row: &mut Row, names: [&str; N], measured: &[(usize, [f64; N])]) {
    for (which, name) in names.into_iter().enumerate().filter(|_| !measured.is_empty()) {
        let (group, last) = name.split_once('/').unwrap_or((name, ""));
        row.number(name, measured.iter().map(|(_, values)| values[which]).sum::<f64>() / measured.len() as f64);
        for (layer, values) in measured {
            row.number(&format!("{group}/layer_{layer:02}/{last}"), values[which]);
        }
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
