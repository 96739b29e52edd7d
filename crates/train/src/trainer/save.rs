//! Saving from the loop: when a checkpoint is due, what became of it, and what is done where the disk refuses.

use super::{State, Trainer};
use crate::checkpoint::{CheckpointError, Outcome, Retention, Snapshot, is_full};
use crate::error::TrainError;
use crate::metrics::Row;
use moe_router::Policy;
use serde_json::{Map, Value, json};
use std::io;
use std::time::Duration;

/// Saves that may fail in a row before the run stops: what was trained since the last whole checkpoint would be lost.
const MISSES: u32 = 3;

/// After this long a save is told of as slow.
pub(super) const SLOW: Duration = Duration::from_secs(60);

impl Trainer {
    /// After an update: notes how the save in flight ended and starts the next one where it is due. A save that takes longer than
    /// `checkpoint.every` updates puts the next one off rather than hold up the training.
    pub(super) fn save_if_due(&mut self) -> Result<(), TrainError> {
        let outcome = self.directory.poll_save();
        self.note(outcome)?;
        self.tell_of_a_slow_save()?;
        let every = self.run.checkpoint.every;
        self.due |= every > 0 && self.at.step.is_multiple_of(every);
        if self.due && !self.directory.saving() {
            self.due = false;
            self.start_save()?;
        }
        Ok(())
    }

    /// Tells once of a save that takes long: no other is started before it ends.
    fn tell_of_a_slow_save(&mut self) -> Result<(), TrainError> {
        match self.directory.in_flight() {
            Some((step, time)) if time >= self.slow && self.told_slow != Some(step) => {
                self.told_slow = Some(step);
                let seconds = time.as_secs();
                let message = format!(
                    "the disk takes more than {seconds} s for checkpoint {step}; training goes on, the next save waits for it"
                );
                self.event("slow_save", message)
            }
            _ => Ok(()),
        }
    }

    /// Saves at the next update boundary, which is now, without waiting for the disk.
    pub fn save_soon(&mut self) -> Result<(), TrainError> {
        self.due |= !self.done && self.saved_step != Some(self.at.step);
        self.save_if_due()
    }

    /// Saves the state that just had the best held-out loss, waiting for a save in flight so that it is this one.
    pub(super) fn save_best(&mut self) -> Result<(), TrainError> {
        let outcome = self.directory.wait_save();
        self.note(outcome)?;
        self.memory.best = Some(self.at.step);
        self.start_save()
    }

    /// Saves and waits until the checkpoint is whole on the disk.
    pub(super) fn save(&mut self) -> Result<(), TrainError> {
        self.due = false;
        for last in [false, true] {
            let outcome = self.directory.wait_save();
            self.note(outcome)?;
            if self.saved_step == Some(self.at.step) {
                return Ok(());
            }
            if !last {
                self.start_save()?;
            }
        }
        Err(TrainError::Failed(self.missed.clone().unwrap_or_else(|| "the checkpoint was not saved".into())))
    }

    fn start_save(&mut self) -> Result<(), TrainError> {
        if self.saved_step == Some(self.at.step) {
            return Ok(());
        }
        self.learner.fetch()?;
        let snapshot = self.snapshot();
        let retention = Retention {
            keep: self.run.checkpoint.keep,
            keep_every: self.run.checkpoint.keep_every,
            best: self.memory.best,
            resumed: self.resumed,
        };
        match self.directory.start_save(&self.layout, snapshot, retention) {
            Ok(()) => Ok(()),
            Err(error) => self.note(Some(Outcome { step: self.at.step, result: Err(error.into()) })),
        }
    }

    /// A copy of all the run needs to go on.
    fn snapshot(&mut self) -> Snapshot {
        let state = State {
            position: self.at,
            epoch: self.epoch.clone(),
            results: self.results.clone(),
            controls: self.learner.policies.iter().map(Policy::control).collect(),
            memory: self.memory.clone(),
        };
        let mut snapshot = self.directory.spare();
        snapshot.copy(&self.learner.params, self.learner.optimizer.state(), self.ema.as_deref());
        snapshot.step = self.at.step;
        snapshot.state = json!(state);
        snapshot.tokenizer = self.texts.tokenizer.clone();
        snapshot.config = self.texts.config.clone();
        snapshot.fingerprints = self.texts.fingerprints.clone();
        snapshot
    }

    /// Writes down how a save ended. Errors: state that is not finite, and one miss too many.
    pub(super) fn note(&mut self, outcome: Option<Outcome>) -> Result<(), TrainError> {
        let Some(Outcome { step, result }) = outcome else { return Ok(()) };
        let error = match result {
            Ok(path) => {
                (self.saved_step, self.misses, self.missed, self.returns) = (Some(step), 0, None, 0);
                let mut row = self.row("event");
                row.integer("step", step); // the row belongs to the checkpoint, however late the disk was
                row.text("event", "checkpoint");
                row.text("message", &format!("saved {}", path.display()));
                return self.push(row);
            }
            Err(CheckpointError::NonFinite(name)) => {
                return Err(self.diverged(&format!("{name} holds numbers that are not finite")));
            }
            Err(error) => error,
        };
        self.misses += 1;
        self.missed = Some(error.to_string());
        let mut row = self.row("event");
        row.text("event", "checkpoint_failed");
        row.integer("missed_in_a_row", u64::from(self.misses));
        row.text("message", &format!("checkpoint {step} was not saved: {error}; training goes on"));
        self.push(row)?;
        match self.misses < MISSES {
            true => Ok(()),
            false => Err(TrainError::Failed(format!("{error}; {MISSES} saves in a row failed, so the run stops"))),
        }
    }

    /// Tells once that the disk refuses the streams; their lines wait in memory.
    pub(super) fn tell(&mut self, written: io::Result<()>) -> Result<(), TrainError> {
        let Err(error) = written else {
            self.refused = false;
            return Ok(());
        };
        if self.directory.overflows() {
            let remedy = "too many rows wait for the disk; make room and resume";
            return Err(TrainError::Failed(format!("E-DISK: {error}; {remedy}")));
        }
        if !self.refused {
            self.refused = true;
            let free = match is_full(&error) {
                true => {
                    self.directory.disk().free(self.out()).map_or(String::new(), |free| format!(" ({free} bytes free)"))
                }
                false => String::new(),
            };
            let message = format!("E-DISK: {error}{free}; the rows wait in memory and training goes on");
            self.event("disk", message)?;
        }
        Ok(())
    }

    /// Records that the run ended here with `error`, as far as the disk allows.
    pub(super) fn fail(&mut self, error: &TrainError) {
        self.done = true;
        let _ = self.directory.wait_save();
        let _ = self.event("failed", error.to_string());
        let _ = self.directory.failure(&self.failure(
            self.at.step,
            &error.to_string(),
            "mend the cause and resume the run",
        ));
        let _ = self.directory.finish(crate::record::Status::Failed, &self.results);
    }

    /// What failure.json says.
    pub(super) fn failure(&self, step: u64, reason: &str, remedy: &str) -> Value {
        let metrics = self.last_row.as_ref().map_or_else(Map::new, |row: &Row| row.fields().clone());
        json!({
            "run": self.id(),
            "step": step,
            "reason": reason,
            "remedy": remedy,
            "checkpoint": self.saved_step,
            "last_metrics": metrics,
        })
    }
}
