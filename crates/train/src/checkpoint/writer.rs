//! Saving beside the training: a copy of the state is written by a thread of its own, at most one at a time. Its result is never lost: whoever
//! started it asks for it, and dropping the writer waits for it.

use super::{CheckpointError, Contents, Retention, link_best, save};
use crate::files::{Disk, replace};
use crate::optimizers::State;
use serde_json::{Map, Value};
use std::fs::File;
use std::path::PathBuf;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use tensor::Layout;

/// A copy of all that a checkpoint holds.
#[derive(Debug, Default)]
pub struct Snapshot {
    pub step: u64,
    pub params: Vec<f32>,
    pub optimizer: State,
    pub ema: Option<Vec<f32>>,
    pub state: Value,
    pub tokenizer: Arc<[u8]>,
    pub config: Arc<str>,
    pub fingerprints: Arc<Map<String, Value>>,
}

impl Snapshot {
    /// Copies the buffers into those this snapshot has, which are warm when it was used before.
    pub fn copy(&mut self, params: &[f32], optimizer: &State, ema: Option<&[f32]>) {
        refill(&mut self.params, params);
        self.optimizer.steps = optimizer.steps;
        self.optimizer.expert_steps.clone_from(&optimizer.expert_steps);
        self.optimizer.moments.resize_with(optimizer.moments.len(), Default::default);
        for ((name, moment), (other, from)) in self.optimizer.moments.iter_mut().zip(&optimizer.moments) {
            name.clone_from(other);
            refill(moment, from);
        }
        match ema {
            Some(ema) => refill(self.ema.get_or_insert_default(), ema),
            None => self.ema = None,
        }
    }

    pub fn contents<'a>(&'a self, layout: &'a Layout) -> Contents<'a> {
        Contents {
            step: self.step,
            layout,
            params: &self.params,
            optimizer: &self.optimizer,
            ema: self.ema.as_deref(),
            state: &self.state,
            tokenizer: &self.tokenizer,
            config: &self.config,
            fingerprints: &self.fingerprints,
        }
    }
}

fn refill(to: &mut Vec<f32>, from: &[f32]) {
    to.clear();
    to.extend_from_slice(from);
}

/// One save: the streams it covers are made durable first, run.json is replaced after it.
pub struct Job {
    pub disk: Disk,
    pub run_folder: PathBuf,
    pub layout: Arc<Layout>,
    pub snapshot: Snapshot,
    pub retention: Retention,
    pub streams: Vec<(PathBuf, File)>,
    /// Text of run.json.
    pub record: String,
}

/// How a save ended.
#[derive(Debug)]
pub struct Outcome {
    pub step: u64,
    pub result: Result<PathBuf, CheckpointError>,
}

impl Job {
    fn run(&self) -> Result<PathBuf, CheckpointError> {
        for (path, file) in &self.streams {
            self.disk.sync(path, file).map_err(crate::files::explain("fsync", path))?;
        }
        let contents = self.snapshot.contents(&self.layout);
        let saved = save(&*self.disk, &self.run_folder, &contents, self.retention)?;
        // Saved. The rest is for people.
        if self.retention.best == Some(contents.step) {
            let _ = link_best(&*self.disk, &self.run_folder, contents.step);
        }
        let _ = replace(&*self.disk, &self.run_folder.join("run.json"), self.record.as_bytes());
        Ok(saved)
    }
}

/// What the thread gives back: the result, and the snapshot for its buffers.
type Landed = (Result<PathBuf, CheckpointError>, Snapshot);

#[derive(Debug)]
struct Flight {
    step: u64,
    since: Instant,
    thread: JoinHandle<Landed>,
}

/// The save in flight, if any, and the buffers of the last one.
#[derive(Debug, Default)]
pub struct Writer {
    flight: Option<Flight>,
    spare: Snapshot,
}

impl Writer {
    /// A snapshot to fill, with the buffers of the last one.
    pub fn spare(&mut self) -> Snapshot {
        std::mem::take(&mut self.spare)
    }

    pub fn busy(&self) -> bool {
        self.flight.is_some()
    }

    /// The step that is being saved, and for how long already.
    pub fn in_flight(&self) -> Option<(u64, Duration)> {
        self.flight.as_ref().map(|flight| (flight.step, flight.since.elapsed()))
    }

    /// Starts a save and returns at once. The one before must have been waited for.
    pub fn start(&mut self, mut job: Job) -> std::io::Result<()> {
        assert!(!self.busy(), "one save at a time");
        let step = job.snapshot.step;
        let save = move || {
            let result = job.run();
            (result, std::mem::take(&mut job.snapshot))
        };
        let thread = std::thread::Builder::new().name("moe-lab-save".into()).spawn(save)?;
        self.flight = Some(Flight { step, since: Instant::now(), thread });
        Ok(())
    }

    /// The outcome of a save that has ended; none while it runs or where there is none.
    pub fn poll(&mut self) -> Option<Outcome> {
        self.flight.as_ref()?.thread.is_finished().then(|| self.wait())?
    }

    /// Waits for the save in flight.
    pub fn wait(&mut self) -> Option<Outcome> {
        let Flight { step, thread, .. } = self.flight.take()?;
        let result = match thread.join() {
            Ok((result, snapshot)) => {
                self.spare = snapshot;
                result
            }
            Err(panic) => std::panic::resume_unwind(panic),
        };
        Some(Outcome { step, result })
    }
}

impl Drop for Writer {
    /// The thread must not outlive the lock on the run directory.
    fn drop(&mut self) {
        if let Some(flight) = self.flight.take() {
            let _ = flight.thread.join();
        }
    }
}
