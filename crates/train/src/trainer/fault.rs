//! Faults of numbers: recorded with the place they began and the documents of the batch, then the run stops, skips the update, or returns to its
//! last checkpoint, as `train.on_nonfinite` and `train.on_spike` say.

use super::control::{Step, documents_at};
use super::{Trainer, restore};
use crate::checkpoint;
use crate::data::Batch;
use crate::epoch::Epoch;
use crate::error::TrainError;
use crate::guard::{Fault, Kind};
use crate::learner::{Learner, Update};
use crate::origin::origin;
use crate::record::Status;
use crate::run::{OnNonfinite, OnSpike, Train};

/// Updates that may be skipped in a row, and returns to a checkpoint that may pass without a new one.
pub(super) const SKIPS: u32 = 3;
const RETURNS: u32 = 10;

enum Action {
    Stop,
    Skip,
    RollBack,
}

fn action(fault: &Fault, settings: &Train) -> Action {
    let chosen = match fault.kind {
        Kind::NonFinite => match settings.on_nonfinite {
            OnNonfinite::Stop => Action::Stop,
            OnNonfinite::Skip => Action::Skip,
            OnNonfinite::RollBack => Action::RollBack,
        },
        Kind::Spike => match settings.on_spike {
            OnSpike::Off | OnSpike::Warn | OnSpike::Stop => Action::Stop,
            OnSpike::Skip => Action::Skip,
            OnSpike::RollBack => Action::RollBack,
        },
    };
    match chosen {
        Action::Skip if fault.applied => Action::Stop, // there is nothing left to keep
        chosen => chosen,
    }
}

impl Trainer {
    /// Answers to an update that was refused; true if the run goes on after its batch, false if it returned to a checkpoint. `before` is the epoch
    /// as it was.
    pub(super) fn fault(
        &mut self,
        fault: Fault,
        made: &Step,
        batch: &Batch,
        before: Option<Epoch>,
    ) -> Result<bool, TrainError> {
        self.learner.fetch()?;
        let reason = match origin(&self.learner, batch) {
            Some(place) => format!("{}: {place}", fault.reason),
            None => fault.reason.clone(),
        };
        let step = self.at.step + 1;
        let documents = documents_at(&self.dataset.phases[self.at.phase].data, &self.at, made.batches);
        let mut row = self.row("event");
        row.text("event", "fault");
        row.integer("update", step);
        row.text("fault", if fault.kind == Kind::Spike { "spike" } else { "nonfinite" });
        row.integer("epoch", self.at.epoch + 1);
        row.integer("batch", self.at.batch + 1);
        row.integers("documents", documents.iter().map(|&document| document as u64));
        row.text("message", &format!("update {step}: {reason}"));
        self.push(row)?;
        match action(&fault, &made.settings) {
            Action::Stop => Err(self.diverged(&reason)),
            Action::Skip => {
                self.epoch = before.unwrap_or_else(|| Epoch::new(&self.learner.policies));
                self.memory.skipped_in_a_row += 1;
                if self.memory.skipped_in_a_row >= SKIPS {
                    return Err(self.diverged(&format!("{reason} ({SKIPS} updates in a row)")));
                }
                self.move_on(0, made.batches);
                self.event("skipped", format!("update {step} is not taken")).map(|()| true)
            }
            Action::RollBack => self.roll_back(step, &reason).map(|()| false),
        }
    }

    /// Back to the newest whole checkpoint, or the beginning; the batch of `bad` will be left out.
    fn roll_back(&mut self, bad: u64, reason: &str) -> Result<(), TrainError> {
        let outcome = self.directory.wait_save();
        self.note(outcome)?;
        self.returns += 1;
        if self.returns >= RETURNS {
            return Err(self.diverged(&format!("{reason} ({RETURNS} returns to one checkpoint)")));
        }
        let mut learner =
            Learner::new(&self.run, self.learner.model.vocab_size, &self.run.phase(self.dataset.phases[0].name))?;
        let found = checkpoint::recover(&**self.directory.disk(), self.out(), &self.layout)?;
        let restored = found
            .checkpoint
            .map(|(path, loaded)| restore(&path, loaded, &self.run, &self.dataset, &mut learner))
            .transpose()?;
        #[cfg(test)]
        std::mem::swap(&mut learner.tamper, &mut self.learner.tamper);
        self.learner = learner;
        let mut left_out = std::mem::take(&mut self.memory.left_out);
        left_out.insert(bad);
        self.adopt(restored);
        self.memory.left_out = left_out;
        self.due = false;
        self.directory.rewind(self.at.step)?;
        let step = self.at.step;
        self.event(
            "rolled_back",
            format!("back at step {step} because of update {bad} ({reason}); its batch is left out"),
        )
    }

    /// Takes an update that was made into the window, or tells of its jump.
    pub(super) fn watch(&mut self, update: &Update, settings: &Train) -> Result<(), TrainError> {
        let jump = match settings.on_spike {
            OnSpike::Warn => self.memory.guard.judge(update.cross_entropy, update.grad_norm),
            _ => None, // it was judged before it was made
        };
        match jump {
            Some(reason) => self.event("spike", format!("update {}: {reason}", self.at.step)),
            None => {
                self.memory.guard.accept(update.cross_entropy, update.grad_norm);
                Ok(())
            }
        }
    }

    /// The error of a device that failed, after a checkpoint of the last update where its numbers are whole.
    pub(super) fn device_failed(&mut self, reason: &str) -> TrainError {
        let saved = match self.learner.is_whole() {
            true => self.save().map(|()| format!("the checkpoint of step {} is complete", self.at.step)),
            false => Ok("the update was half done, the last checkpoint is untouched".to_owned()),
        };
        let saved = saved.unwrap_or_else(|error| format!("no checkpoint: {error}"));
        let (step, out) = (self.at.step + 1, self.out().display());
        TrainError::Failed(format!("step {step}: {reason}; {saved}; go on with: moe-lab resume {out}"))
    }

    /// Records why the run ends here and returns the error for the caller. Checkpoints stay as they were.
    pub(super) fn diverged(&mut self, reason: &str) -> TrainError {
        self.done = true;
        let outcome = self.directory.wait_save();
        if let Some(Ok(_)) = outcome.as_ref().map(|outcome| &outcome.result) {
            let _ = self.note(outcome);
        }
        let (step, phase) = (self.at.step + 1, self.phase_name());
        let remedy = "lower train.learning_rate or train.clip; the last checkpoint is untouched";
        let message = format!("diverged at step {step} (phase {phase}): {reason}; {remedy}");
        let written = self
            .event("diverged", message.clone())
            .and_then(|()| self.directory.failure(&self.failure(step, reason, remedy)))
            .and_then(|()| self.directory.finish(Status::Diverged, &self.results));
        match written {
            Ok(()) => TrainError::Diverged(message),
            Err(error) => TrainError::Diverged(format!("{message} (the record of it could not be written: {error})")),
        }
    }
}
