//! What is decided anew before each update: the bound of clipping, the response to an alert, whether the noise is measured. And what is
//! remembered after it.

use super::{Position, Trainer, epoch_batches, phase_steps};
use crate::data::Batch;
use crate::dataset::PhaseData;
use crate::error::TrainError;
use crate::learner::Update;
use crate::metrics::Row;
use crate::monitor::{Alert, Measured};
use crate::run::{Response, Train};

/// How the next update is made.
pub(super) struct Step {
    /// `[train]` with what holds for this update alone.
    pub settings: Train,
    pub rate: f64,
    /// Batches that are joined in it.
    pub batches: u64,
}

impl Trainer {
    pub(super) fn next_step(&self) -> Step {
        let mut settings = self.settings();
        let mut step = Step { rate: self.rate(&settings), batches: 1, settings: settings.clone() };
        if let Some(bound) = self.memory.auto_clip.bound_of(&settings) {
            settings.clip = settings.clip.min(bound);
        }
        if settings.noise_scale > 0 && !self.at.step.is_multiple_of(settings.noise_scale) {
            settings.noise_scale = 0;
        }
        if self.memory.monitor.responds(self.at.step) {
            let monitor = &self.run.monitor;
            match (monitor.response, self.memory.monitor.median()) {
                (Response::Rate, _) => step.rate *= monitor.factor,
                (Response::Clip, Some(median)) => settings.clip = settings.clip.min(monitor.factor * median),
                (Response::Batch, _) => {
                    step.batches = monitor.batches().min(self.batches_left());
                    settings.accumulate *= step.batches as usize;
                }
                (Response::None | Response::Clip, _) => {}
            }
        }
        Step { settings, ..step }
    }

    /// Batches up to the end of the epoch, or of the phase where that is nearer.
    fn batches_left(&self) -> u64 {
        let phase = self.at.phase;
        let of_epoch = epoch_batches(&self.run, &self.dataset, phase) - self.at.batch;
        of_epoch.min(phase_steps(&self.run, &self.dataset, phase) - self.at.phase_step)
    }

    /// Takes an update that was made into what is remembered; its columns go into `row`. Returns the rules that it broke.
    pub(super) fn remember(&mut self, step: &Step, update: &Update, row: &mut Row) -> Vec<Alert> {
        let (settings, monitor) = (&step.settings, &self.run.monitor);
        if settings.clip_percentile > 0.0 {
            self.memory.auto_clip.push(update.grad_norm, settings.clip_window);
        }
        if settings.clip_percentile > 0.0 || monitor.response == Response::Clip {
            row.number("train/clip", settings.clip);
        }
        if let Some(changed) = update.routing_changed {
            row.number("sam/routing_changed", changed);
        }
        if let Some(sample) = &update.noise {
            self.memory.noise.add(sample);
            if let Some(scale) = self.memory.noise.scale() {
                row.number("grad/noise_scale", scale);
            }
        }
        if !monitor.watches() {
            return Vec::new();
        }
        let responded = self.memory.monitor.responds(self.at.step - 1);
        row.integer("monitor/responding", u64::from(responded && monitor.response != Response::None));
        if monitor.response == Response::Batch {
            row.integer("train/batches", step.batches);
        }
        let Update { grad_norm, param_norms, ratios, .. } = update;
        self.memory.monitor.observe(monitor, self.at.step, &Measured { grad_norm: *grad_norm, param_norms, ratios })
    }

    /// Tells of broken rules, and of what follows.
    pub(super) fn alert(&mut self, alerts: Vec<Alert>) -> Result<(), TrainError> {
        let (factor, cooldown) = (self.run.monitor.factor, self.run.monitor.cooldown);
        let answer = match self.run.monitor.response {
            Response::None => String::new(),
            Response::Rate => format!("; the learning rate is multiplied by {factor} for {cooldown} updates"),
            Response::Clip => format!("; gradients are clipped at {factor} of the median norm for {cooldown} updates"),
            Response::Batch => {
                format!("; {} batches are joined in each of {cooldown} updates", self.run.monitor.batches())
            }
        };
        for alert in alerts {
            let mut row = self.row("event");
            row.text("event", "alert");
            row.text("rule", alert.rule);
            row.text("measure", &alert.measure);
            row.number("value", alert.value);
            row.number("bound", alert.bound);
            row.text("message", &format!("update {}: {alert}{answer}", self.at.step));
            self.push(row)?;
        }
        Ok(())
    }
}

/// Indices of the documents of `batches` batches from `at` on, within the epoch; none in a text phase, whose windows the step decides.
pub(super) fn documents_at(data: &PhaseData, at: &Position, batches: u64) -> Vec<usize> {
    match data {
        PhaseData::Documents { order, .. } => {
            let documents = order.documents(at.epoch);
            let place = |batch: u64| (batch as usize).saturating_mul(order.batch_size).min(documents.len());
            documents[place(at.batch)..place(at.batch + batches)].to_vec()
        }
        PhaseData::Text(_) => Vec::new(),
    }
}

/// `batches` batches from `at` on, as one.
pub(super) fn batch_at(data: &PhaseData, at: &Position, batches: u64) -> Batch {
    match data {
        PhaseData::Documents { train, .. } => train.batch(&documents_at(data, at, batches)),
        PhaseData::Text(text) => Batch::join((0..batches).map(|next| text.batch(at.phase_step + next))),
    }
}

#[cfg(test)]
mod tests {
    use crate::metrics::Row;
    use crate::trainer::tests::{events, finish, tampered};
    use serde_json::Value;
    use tempfile::TempDir;

    /// The gradient of one update multiplied.
    const SPIKE: u64 = 14;

    fn rows(sets: &[&str], factor: f32) -> Vec<Row> {
        let folder = TempDir::new().unwrap();
        let mut trainer = tampered(&folder, sets, move |call, _, grads| {
            if call == SPIKE {
                grads.iter_mut().for_each(|g| *g *= factor);
            }
        });
        finish(&mut trainer).unwrap()
    }

    fn column(rows: &[Row], name: &str) -> Vec<f64> {
        let steps = rows.iter().filter(|row| row.fields()["kind"] == "train");
        steps.map(|row| row.fields().get(name).and_then(Value::as_f64).unwrap_or(f64::NAN)).collect()
    }

    #[test]
    fn a_spike_is_clipped_at_the_percentile_which_never_passes_the_fixed_bound() {
        let sets = ["train.clip_percentile=80", "train.clip_window=20"];
        let found = rows(&sets, 50.0);
        let (bounds, norms) = (column(&found, "train/clip"), column(&found, "train/grad_norm"));
        let at = SPIKE as usize - 1;
        assert!(bounds[..5].iter().all(|bound| *bound == 100.0), "too few norms: the fixed bound");
        assert!(bounds[at] < norms[at] / 5.0, "{bounds:?} {norms:?}");
        assert_eq!(column(&found, "train/clipped")[at], 1.0);
        let mut sorted = norms[..at].to_vec();
        sorted.sort_by(f64::total_cmp);
        assert!(sorted[9] <= bounds[at] && bounds[at] <= sorted[11], "80 % of 13 norms lie below it");
        assert!(bounds[20..25].iter().all(|bound| *bound == 100.0), "the chat phase starts anew");
        let low = rows(&["train.clip_percentile=80", "train.clip_window=20", "train.clip=0.01"], 50.0);
        assert!(column(&low, "train/clip").iter().all(|bound| *bound <= 0.01));
    }

    #[test]
    fn an_alert_is_told_and_answered_as_asked_for_as_long_as_asked() {
        let rule = ["monitor.exploding=8", "monitor.cooldown=4", "train.lr_scale=none"];
        let with = |response: &str| rows(&[&rule[..], &[response]].concat(), 50.0);
        let quiet = with("monitor.response=none");
        let told: Vec<&Row> = events(&quiet, "alert").collect();
        assert_eq!(told.len(), 1);
        assert_eq!((&told[0].fields()["rule"], &told[0].fields()["step"]), (&"exploding".into(), &SPIKE.into()));
        let answered = SPIKE as usize..SPIKE as usize + 4;
        let responds = |rows: &[Row]| -> Vec<usize> {
            let column = column(rows, "monitor/responding");
            (0..column.len()).filter(|&step| column[step] == 1.0).collect()
        };
        assert!(responds(&quiet).is_empty());
        let (before, tokens) = (column(&quiet, "train/learning_rate"), column(&quiet, "tokens"));

        let slow = with("monitor.response=rate");
        assert_eq!(responds(&slow), answered.clone().collect::<Vec<_>>());
        for (step, (rate, before)) in column(&slow, "train/learning_rate").iter().zip(&before).enumerate() {
            assert_eq!(*rate, if answered.contains(&step) { 0.5 * before } else { *before }, "update {}", step + 1);
        }
        let clipped = with("monitor.response=clip");
        let (bounds, norms) = (column(&clipped, "train/clip"), column(&clipped, "train/grad_norm"));
        let mut sorted = norms[..SPIKE as usize].to_vec();
        sorted.sort_by(f64::total_cmp);
        assert!((bounds[SPIKE as usize] / (0.5 * sorted[7]) - 1.0).abs() < 1e-12, "half the median of 14 norms");
        assert!((0..bounds.len()).all(|step| (bounds[step] < 100.0) == answered.contains(&step)));

        let joined = with("monitor.response=batch");
        let batches = column(&joined, "train/batches");
        // Four batches an epoch: update 14 was the second of one, 15 takes the other two, 16 and 17 those of the last; 18 is of the next phase.
        assert_eq!(batches[SPIKE as usize..SPIKE as usize + 4], [2.0, 2.0, 2.0, 1.0]);
        assert_eq!(batches.iter().sum::<f64>(), before.len() as f64, "every batch is taken once");
        assert_eq!(column(&joined, "tokens").last(), tokens.last());
        for response in [&slow, &clipped, &joined] {
            let loss = |rows: &[Row]| column(rows, "train/loss");
            assert!(loss(response)[..SPIKE as usize] == loss(&quiet)[..SPIKE as usize]);
            assert!(loss(response).last() != loss(&quiet).last());
        }
    }
}
