//! The run directory: made after everything was validated, owned by one process, appended to row by row, holding whole checkpoints.

use crate::checkpoint;
use crate::data::Source;
use crate::error::TrainError;
use crate::lock::RunLock;
use crate::metrics::{self, Row, Stream};
use crate::record::{self, Record, Status};
use crate::run::Run;
use serde_json::{Map, Value, json};
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Instant;

pub struct RunDirectory {
    path: PathBuf,
    record: Record,
    stream: Stream,
    samples: Stream,
    _lock: RunLock,
    keep: usize,
    started: Instant,
    /// Seconds and targets of earlier starts of this run.
    seconds_before: f64,
}

impl RunDirectory {
    /// Makes the directory of a new run and writes run.toml and run.json. An existing run is never overwritten.
    pub fn create(
        run: &Run,
        out: Option<&Path>,
        parent: Option<String>,
        sources: &[(&'static str, Source)],
    ) -> Result<Self, TrainError> {
        let (id, path) = match out {
            None => record::new_run_folder(Path::new("runs"), &run.name)?,
            Some(path) => {
                refuse_occupied(path)?;
                fs::create_dir_all(path).map_err(|error| {
                    let text = format!("cannot make {}: {error}; choose another --out", path.display());
                    std::io::Error::new(error.kind(), text)
                })?;
                let name = path.file_name().map_or("run".into(), |name| name.to_string_lossy().into_owned());
                (name, path.to_path_buf())
            }
        };
        let lock = RunLock::acquire(&path)?;
        let mut record = Record::start(&id, run.seed, threads(run.threads));
        record.parent = parent;
        record.data = sources.iter().map(|(role, source)| (role.to_string(), json!(source))).collect();
        record::write_run_file(&path, &run.to_toml())?;
        record.write(&path)?;
        Self::opened(path, record, lock, run)
    }

    fn opened(path: PathBuf, record: Record, lock: RunLock, run: &Run) -> Result<Self, TrainError> {
        let seconds_before = record.results.get("seconds").and_then(Value::as_f64).unwrap_or(0.0);
        Ok(RunDirectory {
            stream: Stream::open(&path.join("metrics.jsonl"))?,
            samples: Stream::open(&path.join("samples.jsonl"))?,
            keep: run.checkpoint.keep,
            _lock: lock,
            started: Instant::now(),
            path,
            record,
            seconds_before,
        })
    }

    /// The run in `path`: its configuration and record, and the lock on it.
    pub fn open(path: &Path) -> Result<(Run, Record, RunLock), TrainError> {
        if !path.join("run.toml").is_file() {
            return Err(TrainError::Usage(format!(
                "{} holds no run (run.toml is missing); give a run directory",
                path.display()
            )));
        }
        let lock = RunLock::acquire(path)?;
        Ok((Self::read_run(path)?, Record::read(path)?, lock))
    }

    /// run.toml of the run in `path`.
    pub fn read_run(path: &Path) -> Result<Run, TrainError> {
        let file = path.join("run.toml");
        let text = fs::read_to_string(&file)
            .map_err(|error| TrainError::Failed(format!("cannot read {}: {error}", file.display())))?;
        Run::parse(&text).map_err(|error| TrainError::Usage(format!("{}: {error}", file.display())))
    }

    /// Continues the streams of a run at `step`: rows of later steps are set aside.
    pub fn reopen(path: &Path, run: &Run, mut record: Record, lock: RunLock, step: u64) -> Result<Self, TrainError> {
        for stream in ["metrics.jsonl", "samples.jsonl"] {
            metrics::prune(&path.join(stream), step)?;
        }
        record.status = Status::Running;
        record.finished = None;
        record.write(path)?;
        Self::opened(path.to_path_buf(), record, lock, run)
    }

    /// A completed run, opened to read it.
    pub fn completed(path: &Path, run: &Run, record: Record, lock: RunLock) -> Result<Self, TrainError> {
        Self::opened(path.to_path_buf(), record, lock, run)
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn record(&self) -> &Record {
        &self.record
    }

    pub fn append(&mut self, row: &Row) -> Result<(), TrainError> {
        Ok(self.stream.append(row)?)
    }

    /// Appends (prompt, text) pairs to samples.jsonl.
    pub fn append_samples(
        &mut self,
        step: u64,
        phase: &str,
        epoch: u64,
        samples: &[(String, String)],
    ) -> Result<(), TrainError> {
        for (prompt, text) in samples {
            let line = json!({ "step": step, "phase": phase, "epoch": epoch, "prompt": prompt, "text": text });
            self.samples.append_line(&line.to_string())?;
        }
        Ok(())
    }

    /// Saves a whole checkpoint; the rows it covers are made durable first.
    pub fn save(&mut self, contents: &checkpoint::Contents<'_>) -> Result<PathBuf, TrainError> {
        self.stream.sync()?;
        self.samples.sync()?;
        let path =
            checkpoint::save(&self.path, contents, self.keep).map_err(|error| TrainError::Failed(error.to_string()))?;
        self.record.results.insert("seconds".into(), json!(self.seconds()));
        self.record.write(&self.path)?;
        Ok(path)
    }

    /// Seconds of training over all starts of the run.
    fn seconds(&self) -> f64 {
        self.seconds_before + self.started.elapsed().as_secs_f64()
    }

    /// Writes how the run ended.
    pub fn finish(&mut self, status: Status, results: &Map<String, Value>) -> Result<(), TrainError> {
        let mut results = results.clone();
        let seconds = self.seconds();
        let tokens = results.get("tokens").and_then(Value::as_f64);
        results.insert("seconds".into(), json!(seconds));
        results.insert("tokens_per_second".into(), json!(tokens.map(|tokens| tokens / seconds)));
        results.insert("peak_memory_bytes".into(), json!(record::peak_memory_bytes()));
        self.record.finish(status, results);
        Ok(self.record.write(&self.path)?)
    }

    /// failure.json: where and why a run ended before its time.
    pub fn failure(&self, step: u64, reason: &str) -> Result<(), TrainError> {
        let failure = json!({ "step": step, "reason": reason, "run": self.record.id });
        let mut text = serde_json::to_string_pretty(&failure).map_err(|error| TrainError::Failed(error.to_string()))?;
        text.push('\n');
        Ok(crate::files::replace(&self.path.join("failure.json"), text.as_bytes())?)
    }
}

/// Threads a run uses: all cores for 0.
fn threads(setting: usize) -> usize {
    match setting {
        0 => std::thread::available_parallelism().map_or(1, usize::from),
        threads => threads,
    }
}

/// A folder that holds anything but nothing is not taken for a new run.
fn refuse_occupied(path: &Path) -> Result<(), TrainError> {
    if path.join("run.toml").exists() {
        return Err(TrainError::Usage(format!(
            "{} already holds a run; resume it (moe-lab resume {}) or choose another --out",
            path.display(),
            path.display()
        )));
    }
    let occupied = match fs::read_dir(path) {
        Ok(mut entries) => entries.next().is_some(),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => false,
        Err(error) => {
            let text = format!("cannot use {} as run directory: {error}; choose another --out", path.display());
            return Err(std::io::Error::new(error.kind(), text).into());
        }
    };
    match occupied {
        true => Err(TrainError::Usage(format!("{} is not empty; choose a new folder for --out", path.display()))),
        false => Ok(()),
    }
}

/// The data of a run must be what they were when it started.
pub fn check_data(record: &Record, sources: &[(&'static str, Source)]) -> Result<(), TrainError> {
    for (role, source) in sources {
        let was = record.data.get(*role).and_then(|was| was.get("sha256")).and_then(Value::as_str);
        if was != Some(source.sha256.as_str()) {
            return Err(TrainError::Usage(format!(
                "{} ({role}) has changed since the run started (its sha256 differs); restore the file to resume",
                source.name
            )));
        }
    }
    Ok(())
}

/// The checkpoint folder to read: `path` itself if it is one, else `checkpoint` (or the newest) of the run in `path`.
pub fn checkpoint_folder(path: &Path, checkpoint: Option<&str>) -> Result<PathBuf, TrainError> {
    if checkpoint.is_none() && path.join("MANIFEST.json").is_file() {
        return Ok(path.to_path_buf());
    }
    let folder = path.join("checkpoints");
    if !path.join("run.toml").is_file() && !folder.is_dir() {
        return Err(TrainError::Usage(format!(
            "{} is neither a run directory nor a checkpoint; give one of them",
            path.display()
        )));
    }
    match checkpoint {
        Some(name) if name.contains(['/', '\\']) || name.starts_with('.') => {
            Err(TrainError::Usage(format!("{name:?} is not the name of a checkpoint; use checkpoint-N")))
        }
        Some(name) if folder.join(name).is_dir() => Ok(folder.join(name)),
        Some(name) => Err(TrainError::Usage(format!("{} has no checkpoint {name}", path.display()))),
        None => match checkpoint::list(path).map_err(|error| TrainError::Failed(error.to_string()))?.into_iter().next()
        {
            Some((_, newest)) => Ok(newest),
            None => Err(TrainError::Usage(format!(
                "{} has no checkpoint yet; train it first (or resume it)",
                path.display()
            ))),
        },
    }
}
