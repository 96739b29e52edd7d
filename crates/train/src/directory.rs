//! The run directory: made after everything was validated, owned by one process, appended to row by row, holding whole checkpoints.

use crate::checkpoint::{self, Job, Outcome, Retention, Snapshot, Writer};
use crate::data::{Source, augment};
use crate::dataset::{self, Dataset};
use crate::error::TrainError;
use crate::files::{Disk, explain, make_folders, replace, sweep};
use crate::lock::RunLock;
use crate::metrics::{self, Row, Stream};
use crate::record::{self, Record, Status};
use crate::run::{Change, Run};
use crate::untrusted;
use serde_json::{Map, Value, json};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tensor::Layout;

/// What may change when a run is resumed: where it computes and how products multiply.
pub const MOVABLE: [&str; 3] = ["engine", "device", "dtype"];

/// The name in the results of what updates held in their buffers.
const ARENA: &str = "arena_bytes";

pub struct RunDirectory {
    // First, so that a save in flight ends before the lock goes.
    writer: Writer,
    disk: Disk,
    path: PathBuf,
    record: Record,
    stream: Stream,
    samples: Stream,
    _lock: RunLock,
    started: Instant,
    /// Seconds and targets of earlier starts of this run.
    seconds_before: f64,
}

impl RunDirectory {
    /// Makes the directory of a new run and writes run.toml and run.json. An existing run is never overwritten.
    pub fn create(
        disk: &Disk,
        run: &Run,
        out: Option<&Path>,
        parent: Option<String>,
        dataset: &Dataset,
        total_steps: u64,
    ) -> Result<Self, TrainError> {
        let (id, path) = match out {
            None => record::new_run_folder(&**disk, Path::new("runs"), &run.name)?,
            Some(path) => {
                refuse_occupied(path)?;
                make_folders(&**disk, path)
                    .map_err(|error| io::Error::new(error.kind(), format!("{error}; choose another --out")))?;
                let name = path.file_name().map_or("run".into(), |name| name.to_string_lossy().into_owned());
                (name, path.to_path_buf())
            }
        };
        let lock = RunLock::acquire(&path)?;
        let mut record = Record::start(&id, run.seed, threads(run.threads));
        (record.parent, record.total_steps) = (parent, Some(total_steps));
        record.data = dataset.sources.iter().map(|(role, source)| (role.to_string(), json!(source))).collect();
        let floor = |phase: &dataset::Phase| json!(phase.floor.map(|floor| floor.macro_average));
        record.floors = dataset.phases.iter().map(|phase| (phase.name.to_string(), floor(phase))).collect();
        record.config = json!(run);
        if record.changes.is_some() {
            record::write_changes(&**disk, &path)?;
        }
        if !dataset.variants.is_empty() {
            replace(&**disk, &path.join(augment::FILE), augment::record(&dataset.variants).0.as_bytes())?;
        }
        record::write_run_file(&**disk, &path, &run.to_toml())?;
        record.write(&**disk, &path)?;
        Self::opened(disk, path, record, lock)
    }

    fn opened(disk: &Disk, path: PathBuf, record: Record, lock: RunLock) -> Result<Self, TrainError> {
        let seconds_before = record.results.get("seconds").and_then(Value::as_f64).unwrap_or(0.0);
        Ok(RunDirectory {
            writer: Writer::default(),
            disk: disk.clone(),
            stream: Stream::open(disk, &path.join("metrics.jsonl"))?,
            samples: Stream::open(disk, &path.join("samples.jsonl"))?,
            _lock: lock,
            started: Instant::now(),
            path,
            record,
            seconds_before,
        })
    }

    /// The run in `path`: its configuration with the values of `place`, its record, and the lock on it.
    pub fn open(path: &Path, place: &[(String, Value)]) -> Result<(Run, Record, RunLock), TrainError> {
        if !path.join("run.toml").is_file() {
            return Err(TrainError::Usage(format!(
                "{} holds no run (run.toml is missing); give a run directory",
                path.display()
            )));
        }
        check_folder(path)?;
        let lock = RunLock::acquire(path)?;
        if let Some((key, _)) = place.iter().find(|(key, _)| !MOVABLE.contains(&key.as_str())) {
            return Err(TrainError::Usage(format!("{key} cannot change when a run is resumed; start a new run")));
        }
        Ok((Self::read_run_with(path, place)?, Record::read(path)?, lock))
    }

    /// run.toml of the run in `path`, for looking at it: whatever engine trained it, the cpu engine reads it.
    pub fn read_run(path: &Path) -> Result<Run, TrainError> {
        Self::read_run_with(path, &[("engine".into(), json!("cpu")), ("device".into(), json!("cpu"))])
    }

    fn read_run_with(path: &Path, sets: &[(String, Value)]) -> Result<Run, TrainError> {
        let file = path.join("run.toml");
        let text = untrusted::read_text(&file, untrusted::MAX_RUN_FILE)
            .map_err(|error| TrainError::Failed(error.to_string()))?;
        Run::parse_with(&text, sets).map_err(|error| TrainError::Usage(format!("{}: {error}", file.display())))
    }

    /// Continues the streams of a run at `step`: rows of later steps are set aside.
    pub fn reopen(disk: &Disk, path: &Path, mut record: Record, lock: RunLock, step: u64) -> Result<Self, TrainError> {
        for stream in ["metrics.jsonl", "samples.jsonl"] {
            metrics::prune(&**disk, &path.join(stream), step)?;
        }
        // What an earlier start left half done; where that fails the next save tries again.
        for folder in [path.to_path_buf(), path.join("checkpoints")] {
            let _ = sweep(&**disk, &folder);
        }
        record.status = Status::Running;
        record.finished = None;
        record.write(&**disk, path)?;
        Self::opened(disk, path.to_path_buf(), record, lock)
    }

    /// A completed run, opened to read it.
    pub fn completed(disk: &Disk, path: &Path, record: Record, lock: RunLock) -> Result<Self, TrainError> {
        Self::opened(disk, path.to_path_buf(), record, lock)
    }

    /// Cuts the streams back to `step`, for a run that returns to an earlier checkpoint.
    pub fn rewind(&mut self, step: u64) -> Result<(), TrainError> {
        for (stream, name) in [(&mut self.stream, "metrics.jsonl"), (&mut self.samples, "samples.jsonl")] {
            stream.flush()?;
            let path = self.path.join(name);
            metrics::prune(&*self.disk, &path, step)?;
            *stream = Stream::open(&self.disk, &path)?;
        }
        Ok(())
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn record(&self) -> &Record {
        &self.record
    }

    /// Appends a row. After an error it waits in memory and goes out with the next one.
    pub fn append(&mut self, row: &Row) -> io::Result<()> {
        self.stream.append(row)
    }

    /// Whether more lines wait for the disk than memory should hold.
    pub fn overflows(&self) -> bool {
        self.stream.overflows() || self.samples.overflows()
    }

    /// Appends (prompt, text) pairs to samples.jsonl.
    pub fn append_samples(
        &mut self,
        step: u64,
        phase: &str,
        epoch: u64,
        samples: &[(String, String)],
    ) -> io::Result<()> {
        let line = |(prompt, text): &(String, String)| {
            json!({ "step": step, "phase": phase, "epoch": epoch, "prompt": prompt, "text": text }).to_string()
        };
        self.samples.append_lines(samples.iter().map(line))
    }

    /// A snapshot to fill for [`start_save`](Self::start_save).
    pub fn spare(&mut self) -> Snapshot {
        self.writer.spare()
    }

    /// Whether a save is in flight.
    pub fn saving(&self) -> bool {
        self.writer.busy()
    }

    /// The step that is being saved, and for how long already.
    pub fn in_flight(&self) -> Option<(u64, Duration)> {
        self.writer.in_flight()
    }

    /// Starts to save a whole checkpoint beside the training; the rows it covers are made durable before it. Errors: rows that could not even be
    /// written.
    pub fn start_save(&mut self, layout: &Arc<Layout>, snapshot: Snapshot, retention: Retention) -> io::Result<()> {
        self.stream.flush()?;
        self.samples.flush()?;
        let seconds = self.seconds();
        self.record.results.insert("seconds".into(), json!(seconds));
        self.writer.start(Job {
            disk: self.disk.clone(),
            run_folder: self.path.clone(),
            layout: layout.clone(),
            snapshot,
            retention,
            streams: vec![self.stream.handle()?, self.samples.handle()?],
            record: self.record.text()?,
        })
    }

    /// How the save in flight ended; none while it runs.
    pub fn poll_save(&mut self) -> Option<Outcome> {
        self.writer.poll()
    }

    /// Waits for the save in flight.
    pub fn wait_save(&mut self) -> Option<Outcome> {
        self.writer.wait()
    }

    pub fn disk(&self) -> &Disk {
        &self.disk
    }

    /// Seconds of training over all starts of the run.
    fn seconds(&self) -> f64 {
        self.seconds_before + self.started.elapsed().as_secs_f64()
    }

    /// Notes what updates held in their buffers at once: `arena_bytes` of the results is the most over all starts of the run. It is none of the
    /// results that a checkpoint keeps, whose bytes are those of a run that never stopped.
    pub fn note_arena(&mut self, bytes: usize) {
        let known = self.record.results.get(ARENA).and_then(Value::as_u64).unwrap_or(0);
        if bytes as u64 > known {
            self.record.results.insert(ARENA.into(), json!(bytes));
        }
    }

    /// Writes how the run ended.
    pub fn finish(&mut self, status: Status, results: &Map<String, Value>) -> Result<(), TrainError> {
        let mut results = results.clone();
        let seconds = self.seconds();
        let tokens = results.get("tokens").and_then(Value::as_f64);
        results.insert("seconds".into(), json!(seconds));
        results.insert("tokens_per_second".into(), json!(tokens.map(|tokens| tokens / seconds)));
        results.insert("peak_memory_bytes".into(), json!(record::peak_memory_bytes()));
        results.extend(self.record.results.get_key_value(ARENA).map(|(name, bytes)| (name.clone(), bytes.clone())));
        self.record.finish(status, results);
        // Before the record: nobody looks at the lines of a completed run again, so a power cut must not take them.
        for stream in [&mut self.stream, &mut self.samples] {
            stream.flush()?;
            stream.sync()?;
        }
        Ok(self.record.write(&*self.disk, &self.path)?)
    }

    /// failure.json: what is known of a run that ended before its time.
    pub fn failure(&self, failure: &Value) -> Result<(), TrainError> {
        let path = self.path.join("failure.json");
        Ok(replace(&*self.disk, &path, format!("{failure:#}\n").as_bytes())?)
    }

    /// Takes away the failure.json of an earlier start.
    pub fn forget_failure(&self) -> Result<(), TrainError> {
        let path = self.path.join("failure.json");
        match self.disk.remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(explain("remove", &path)(error).into()),
            _ => Ok(()),
        }
    }
}

/// Threads a run uses: all cores for 0.
pub(crate) fn threads(setting: usize) -> usize {
    match setting {
        0 => std::thread::available_parallelism().map_or(1, usize::from),
        threads => threads,
    }
}

/// Refuses a run directory whose names lead elsewhere, and one of a newer program.
pub(crate) fn check_folder(path: &Path) -> Result<(), TrainError> {
    untrusted::check_run_folder(path)?;
    record::check_format(path)
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

/// Keys whose change between two starts of a run changes no byte of the model and none of its measures.
pub const CHANGEABLE: [&str; 6] =
    ["name", "threads", "eval.samples", "checkpoint.every", "checkpoint.keep", "checkpoint.keep_every"];

/// The configuration of a run must be what it was when the run started, but for [`CHANGEABLE`] keys and those of `place`; their changes are
/// returned.
pub fn check_config(record: &Record, run: &Run, place: &[(String, Value)]) -> Result<Vec<Change>, TrainError> {
    let may_change = |key: &str| CHANGEABLE.contains(&key) || place.iter().any(|(moved, _)| moved == key);
    let Ok(before) = serde_json::from_value::<Run>(record.config.clone()) else { return Ok(Vec::new()) }; // an old record
    let (allowed, refused): (Vec<Change>, Vec<Change>) =
        Run::diff(&before, run).into_iter().partition(|change| may_change(&change.key));
    if refused.is_empty() {
        return Ok(allowed);
    }
    let lines: Vec<String> = refused
        .iter()
        .map(|change| format!("{}: {} when it started, {} now", change.key, change.a, change.b))
        .collect();
    Err(TrainError::Usage(format!(
        "run.toml was changed since the run started; put it back, or start a new run with the changes:\n{}",
        lines.join("\n")
    )))
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
    untrusted::refuse_pickle(path, b"").map_err(|reason| TrainError::Usage(format!("{}: {reason}", path.display())))?;
    check_folder(path)?;
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
        None => match checkpoint::list(path)?.into_iter().next() {
            Some((_, newest)) => Ok(newest),
            None => Err(TrainError::Usage(format!(
                "{} has no checkpoint yet; train it first (or resume it)",
                path.display()
            ))),
        },
    }
}
