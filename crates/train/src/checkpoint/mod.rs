//! Checkpoints: what was reported as saved survives a kill and a power cut, and nothing damaged is ever loaded.
//!
//! A checkpoint is written into `.tmp-…` beside its place, every file and the folder are fsynced, MANIFEST.json (sizes, sha256, fingerprints)
//! last; then it is renamed to `checkpoints/checkpoint-<step>` and the folder above is fsynced. Only then is it reported.

pub mod header;
mod read;
mod tensors;
#[cfg(test)]
mod tests;
mod writer;

pub use read::{Newest, Recovered, list, load, newest_whole, parse_manifest, read_texts, recover, verify};
pub use tensors::{read_weights, weights};
pub use writer::{Job, Outcome, Snapshot, Writer};

use crate::error::{TrainError, newer};
use crate::files::{Files, explain, remove_all, replace_link, sweep, sync_folder, write_new};
use crate::layers::sum_squares;
use crate::optimizers::State;
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use tensor::Layout;

/// Version of the layout of a checkpoint folder.
const FORMAT: u64 = 1;

const MANIFEST: &str = "MANIFEST.json";
const MODEL: &str = "model.safetensors";
const OPTIMIZER: &str = "optimizer.safetensors";
const STATE: &str = "state.json";
const TOKENIZER: &str = "tokenizer.json";
const CONFIG: &str = "config.json";
/// The files of a checkpoint, beside the manifest.
pub const FILES: [&str; 5] = [MODEL, OPTIMIZER, STATE, TOKENIZER, CONFIG];

#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    /// The operating system refused; no checkpoint was touched.
    #[error("E-DISK: {0}; the checkpoints saved before are untouched")]
    Disk(#[from] io::Error),
    /// There is no room for the checkpoint.
    #[error(
        "E-DISK: {reason}; the checkpoint needs {needed} bytes and {} has {} free; make room: the checkpoints saved before are untouched",
        path.display(), free.map_or("?".to_owned(), |free| free.to_string())
    )]
    Full { path: PathBuf, needed: u64, free: Option<u64>, reason: String },
    /// The bytes are not those that were saved.
    #[error("E-CKPT: {} is damaged: {reason}; use another checkpoint", file.display())]
    Damaged { file: PathBuf, reason: String },
    /// Whole, but not of this model or this program.
    #[error("E-CKPT: {}: {reason}", file.display())]
    Foreign { file: PathBuf, reason: String },
    /// Of a program that writes another layout than this one knows.
    #[error("E-CKPT: {}", newer(file, *format, FORMAT))]
    Newer { file: PathBuf, format: u64 },
    /// State that must not replace a healthy checkpoint.
    #[error(
        "E-NUMERIC: {0} holds numbers that are not finite; nothing was saved, the checkpoints saved before are untouched"
    )]
    NonFinite(String),
}

impl From<CheckpointError> for TrainError {
    fn from(error: CheckpointError) -> Self {
        match error {
            CheckpointError::Newer { .. } => TrainError::Usage(error.to_string()),
            _ => TrainError::Failed(error.to_string()),
        }
    }
}

/// What is saved. `state` holds what the trainer needs to go on (position, control states, counters); its u64 and f64 come back to the bit,
/// but JSON has no NaN and no infinity.
#[derive(Debug)]
pub struct Contents<'a> {
    pub step: u64,
    pub layout: &'a Layout,
    /// Flat parameter buffer of `layout`.
    pub params: &'a [f32],
    pub optimizer: &'a State,
    /// Running mean of the parameters, where the run keeps one.
    pub ema: Option<&'a [f32]>,
    pub state: &'a Value,
    /// Bytes of tokenizer.json.
    pub tokenizer: &'a [u8],
    /// Text of config.json.
    pub config: &'a str,
    /// What the checkpoint was made from and by: hashes of configuration and data, seed.
    pub fingerprints: &'a Map<String, Value>,
}

/// What [`load`] gives back, equal to what was saved to the bit.
#[derive(Clone, Debug, PartialEq)]
pub struct Checkpoint {
    pub step: u64,
    /// Flat parameter buffer, padding zero.
    pub params: Vec<f32>,
    pub optimizer: State,
    pub ema: Option<Vec<f32>>,
    pub state: Value,
    pub tokenizer: Vec<u8>,
    pub config: String,
    pub fingerprints: Map<String, Value>,
}

/// The parts of a checkpoint that can be read before the model is known.
#[derive(Clone, Debug, PartialEq)]
pub struct Texts {
    pub step: u64,
    pub state: Value,
    pub tokenizer: Vec<u8>,
    pub config: String,
}

/// Which checkpoints stay when a new one is saved.
#[derive(Clone, Copy, Debug, Default)]
pub struct Retention {
    /// The newest that are whole, at least one.
    pub keep: usize,
    /// Also those of every so many steps; 0 = none.
    pub keep_every: u64,
    /// The step with the best held-out loss.
    pub best: Option<u64>,
    /// The step this process resumed from.
    pub resumed: Option<u64>,
}

/// Saves into `run_folder`/checkpoints, then deletes what `retention` does not keep. Returns the checkpoint's folder once it is durable. The
/// metric stream must have been fsynced before.
///
/// If the step is there already, whole and with these weights and moments, that is the checkpoint; otherwise what is there is set aside.
pub fn save(
    disk: &dyn Files,
    run_folder: &Path,
    contents: &Contents<'_>,
    retention: Retention,
) -> Result<PathBuf, CheckpointError> {
    check_finite(contents)?;
    let folder = run_folder.join("checkpoints");
    make_folder(disk, &folder)?;
    let needed = size(contents)?;
    let free = disk.free(&folder).ok();
    let full = |reason: String| CheckpointError::Full { path: folder.clone(), needed, free, reason };
    let target = folder.join(folder_name(contents.step));
    if free.is_some_and(|free| free < needed) {
        return Err(full(format!("cannot save {}", target.display())));
    }
    let temporary = make_temporary(disk, &folder, contents.step)?;
    let saved = write(disk, &temporary, contents).and_then(|written| publish(disk, &temporary, &target, &written));
    if let Err(error) = saved {
        let _ = remove_all(disk, &temporary); // the first error is the one to report
        return Err(match error {
            CheckpointError::Disk(error) if is_full(&error) => full(error.to_string()),
            other => other,
        });
    }
    // Saved. What follows is housekeeping: its failure must not read as a failed save.
    let _ = replace_link(disk, Path::new(target.file_name().unwrap_or_default()), &folder.join("latest"));
    let _ = tidy(disk, &folder, retention);
    Ok(target)
}

/// Bytes that a checkpoint of these contents takes, its manifest generously counted.
pub fn size(contents: &Contents<'_>) -> io::Result<u64> {
    let tensors = tensors::model(contents.layout, contents.params)?.size()
        + tensors::optimizer(contents.layout, contents.optimizer, contents.ema)?.size();
    let texts = pretty(contents.state).len() + contents.tokenizer.len() + contents.config.len();
    Ok(tensors + texts as u64 + 8192)
}

/// Whether an error says that there is no room.
pub fn is_full(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded | io::ErrorKind::FileTooLarge)
}

/// Renames a damaged folder to `<name>.bad` (or .bad-2, …): never deleted, never looked at again. Returns the new path.
pub fn set_aside(disk: &dyn Files, path: &Path) -> Result<PathBuf, CheckpointError> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let aside = (1u32..)
        .map(|n| path.with_file_name(if n == 1 { format!("{name}.bad") } else { format!("{name}.bad-{n}") }))
        .find(|aside| fs::symlink_metadata(aside).is_err())
        .unwrap_or_else(|| path.with_extension("bad"));
    disk.rename(path, &aside).map_err(explain("rename", path))?;
    sync_folder(disk, crate::files::parent(path))?;
    Ok(aside)
}

/// Points `best` at the checkpoint of `step`, for people.
pub fn link_best(disk: &dyn Files, run_folder: &Path, step: u64) -> io::Result<()> {
    replace_link(disk, Path::new(&folder_name(step)), &run_folder.join("checkpoints").join("best"))
}

fn folder_name(step: u64) -> String {
    format!("checkpoint-{step}")
}

/// The step in a folder name as [`folder_name`] writes it.
fn step_of(path: &Path) -> Option<u64> {
    let name = path.file_name()?.to_str()?;
    let step = name.strip_prefix("checkpoint-")?.parse().ok()?;
    (folder_name(step) == name).then_some(step)
}

/// Checkpoint folders by step, newest first.
fn numbered(folder: &Path) -> io::Result<Vec<(u64, PathBuf)>> {
    let entries = match fs::read_dir(folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.map_err(explain("read", folder))?,
    };
    let mut found = Vec::new();
    for entry in entries {
        let entry = entry.map_err(explain("read", folder))?;
        let link = entry.file_type().map_err(explain("read", folder))?.is_symlink(); // it could lead out of the run
        found.extend(step_of(&entry.path()).filter(|_| !link).map(|step| (step, entry.path())));
    }
    found.sort_by(|a, b| b.cmp(a));
    Ok(found)
}

fn check_finite(contents: &Contents<'_>) -> Result<(), CheckpointError> {
    let moments = contents.optimizer.moments.iter().map(|(name, moment)| (name.as_str(), moment.as_slice()));
    let ema = contents.ema.map(|ema| (tensors::EMA, ema));
    for (buffer, numbers) in moments.chain(ema).chain([("", contents.params)]) {
        for (name, param) in contents.layout.iter() {
            if !sum_squares(&numbers[param.span()]).is_finite() {
                return Err(CheckpointError::NonFinite([buffer, name].join(" ").trim().to_owned()));
            }
        }
    }
    Ok(())
}

fn pretty(value: &Value) -> Vec<u8> {
    format!("{value:#}\n").into_bytes()
}

/// MANIFEST.json; its last field is the hash of the others, so that damage to the manifest shows too.
fn manifest(step: u64, files: &Map<String, Value>, fingerprints: &Map<String, Value>) -> Vec<u8> {
    let version = env!("CARGO_PKG_VERSION");
    seal(json!({ "format": FORMAT, "step": step, "moe_lab": version, "files": files, "fingerprints": fingerprints }))
}

fn seal(mut manifest: Value) -> Vec<u8> {
    let hash = crate::data::sha256(&pretty(&manifest));
    manifest["sha256"] = Value::from(hash);
    pretty(&manifest)
}

/// The folder of all checkpoints. The run directory is not made anew: a vanished one is an error.
fn make_folder(disk: &dyn Files, folder: &Path) -> io::Result<()> {
    if folder.is_dir() {
        return Ok(());
    }
    disk.make_folder(folder).map_err(explain("make the folder", folder))?;
    sync_folder(disk, crate::files::parent(folder))
}

fn make_temporary(disk: &dyn Files, folder: &Path, step: u64) -> io::Result<PathBuf> {
    for attempt in 0u32.. {
        let path = folder.join(format!(".tmp-{step}-{}-{attempt}", std::process::id()));
        match disk.make_folder(&path) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            made => return made.map(|()| path.clone()).map_err(explain("make the folder", &path)),
        }
    }
    Err(io::Error::other(format!("{} is full of temporary folders; delete them", folder.display())))
}

/// Writes and fsyncs all files, the manifest last, and the folder. Returns what the manifest says of the files.
fn write(disk: &dyn Files, folder: &Path, contents: &Contents<'_>) -> Result<Map<String, Value>, CheckpointError> {
    let Contents { layout, params, optimizer, ema, .. } = *contents;
    let (model, optimizer) = (tensors::model(layout, params)?, tensors::optimizer(layout, optimizer, ema)?);
    let state = pretty(contents.state);
    let mut entries = Map::new();
    for name in FILES {
        let path = folder.join(name);
        let entry = write_hashed(disk, &path, &mut |sink| match name {
            MODEL => model.write(sink),
            OPTIMIZER => optimizer.write(sink),
            STATE => sink(&state),
            TOKENIZER => sink(contents.tokenizer),
            _ => sink(contents.config.as_bytes()),
        });
        entries.insert(name.to_owned(), entry.map_err(explain("write", &path))?);
    }
    write_new(disk, &folder.join(MANIFEST), &manifest(contents.step, &entries, contents.fingerprints))?;
    sync_folder(disk, folder)?;
    Ok(entries)
}

/// Writes a new file piece by piece and fsyncs it; its size and sha256 as the manifest has them.
fn write_hashed(
    disk: &dyn Files,
    path: &Path,
    write: &mut dyn FnMut(&mut tensors::Sink<'_>) -> io::Result<()>,
) -> io::Result<Value> {
    let file = disk.create(path)?;
    let (mut hash, mut size) = (Sha256::new(), 0);
    write(&mut |piece| {
        hash.update(piece);
        size += piece.len();
        disk.write(path, &file, piece)
    })?;
    disk.sync(path, &file)?;
    let hex: String = hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
    Ok(json!({ "size": size, "sha256": hex }))
}

/// Gives a written checkpoint its name, unless the same one is there under it.
fn publish(
    disk: &dyn Files,
    temporary: &Path,
    target: &Path,
    written: &Map<String, Value>,
) -> Result<(), CheckpointError> {
    if fs::symlink_metadata(target).is_ok() {
        if is_same(target, written) {
            let _ = remove_all(disk, temporary); // a leftover goes with the next save
            return Ok(());
        }
        set_aside(disk, target)?;
    }
    disk.rename(temporary, target).map_err(explain("make", target))?;
    Ok(sync_folder(disk, crate::files::parent(target))?)
}

/// Whether the checkpoint there is whole and has the weights and moments of `entries`. (Its state may differ in times.)
fn is_same(folder: &Path, entries: &Map<String, Value>) -> bool {
    let same = |there: Map<String, Value>| [MODEL, OPTIMIZER].iter().all(|name| there.get(*name) == entries.get(*name));
    verify(folder).is_ok() && read::read_manifest(&crate::files::System, folder).is_ok_and(|found| same(found.files))
}

/// Deletes checkpoints that need not be kept, and what a killed save left. A folder is renamed, durably, before it is emptied, so that a kill or
/// a power cut in between leaves no checkpoint with files missing.
fn tidy(disk: &dyn Files, folder: &Path, retention: Retention) -> io::Result<()> {
    let mut whole = 0;
    let mut renamed = false;
    for (step, path) in numbered(folder)? {
        // Only what looks whole counts, so that damaged folders never push out the last good one.
        let counts = whole < retention.keep.max(1) && read::check_sizes(disk, &path).is_ok();
        whole += usize::from(counts);
        let chosen = retention.keep_every > 0 && step.is_multiple_of(retention.keep_every);
        if counts
            || whole < retention.keep.max(1)
            || chosen
            || [retention.best, retention.resumed].contains(&Some(step))
        {
            continue;
        }
        disk.rename(&path, &folder.join(format!(".tmp-old-{step}")))?;
        renamed = true;
    }
    if renamed {
        disk.sync_folder(folder)?;
    }
    sweep(disk, folder)
}
