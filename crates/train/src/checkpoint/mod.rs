//! Checkpoints: what was reported as saved survives a kill and a power cut, and nothing damaged is ever loaded.
//!
//! A checkpoint is written into `.tmp-…` beside its place, every file and the folder are fsynced, MANIFEST.json (sizes, sha256) last; then it
//! is renamed to `checkpoints/checkpoint-<step>` and the folder above is fsynced. Reading checks sizes, then hashes, before anything is parsed.

mod tensors;

pub use tensors::read_weights;

use crate::data::sha256;
use crate::files::{explain, make_folder, sync_folder, write_new};
use crate::layers::sum_squares;
use crate::optimizers::State;
use serde_json::{Map, Value, json};
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
const FILES: [&str; 5] = [MODEL, OPTIMIZER, STATE, TOKENIZER, CONFIG];

/// Longest text file and manifest that is read.
const MAX_TEXT: u64 = 256 << 20;
const MAX_MANIFEST: u64 = 1 << 20;

#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    /// The operating system refused; no checkpoint was touched.
    #[error("{0}; the checkpoints saved before are untouched")]
    Disk(#[from] io::Error),
    /// The bytes are not those that were saved.
    #[error("damaged checkpoint: {}: {reason}; choose another one with --checkpoint, or resume, which falls back to an older one", file.display())]
    Damaged { file: PathBuf, reason: String },
    /// Whole, but not of this model or this program.
    #[error("{}: {reason}", file.display())]
    Foreign { file: PathBuf, reason: String },
    /// State that must not replace a healthy checkpoint.
    #[error("{0} holds numbers that are not finite; nothing was saved, the checkpoints saved before are untouched")]
    NonFinite(String),
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
    pub state: Value,
    /// Bytes of tokenizer.json.
    pub tokenizer: Vec<u8>,
    /// Text of config.json.
    pub config: &'a str,
}

/// What [`load`] gives back, equal to what was saved to the bit.
#[derive(Clone, Debug, PartialEq)]
pub struct Checkpoint {
    pub step: u64,
    /// Flat parameter buffer, padding zero.
    pub params: Vec<f32>,
    pub optimizer: State,
    pub state: Value,
    pub tokenizer: Vec<u8>,
    pub config: String,
}

/// The parts of a checkpoint that can be read before the model is known.
#[derive(Clone, Debug, PartialEq)]
pub struct Texts {
    pub step: u64,
    pub state: Value,
    pub tokenizer: Vec<u8>,
    pub config: String,
}

/// What [`newest_whole`] found.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Newest {
    pub path: Option<PathBuf>,
    /// Newer checkpoints that are damaged, newest first, each with the reason.
    pub skipped: Vec<(PathBuf, String)>,
}

/// Saves into `run_folder`/checkpoints and deletes all but the `keep` newest checkpoints (one at least; never the one that `best` names).
/// Returns the checkpoint's folder once it is durable. The metric stream must have been fsynced before.
///
/// If the step is there already, whole and with these weights and moments, that is the checkpoint; otherwise what is there is set aside.
pub fn save(run_folder: &Path, contents: &Contents<'_>, keep: usize) -> Result<PathBuf, CheckpointError> {
    check_finite(contents)?;
    let files = [
        (MODEL, tensors::model_bytes(contents.layout, contents.params)?),
        (OPTIMIZER, tensors::optimizer_bytes(contents.layout, contents.optimizer)?),
        (STATE, pretty(&contents.state)),
        (TOKENIZER, contents.tokenizer.clone()),
        (CONFIG, contents.config.as_bytes().to_vec()),
    ];
    let entries = files.iter().map(|(name, bytes)| (name.to_string(), entry(bytes))).collect();
    let folder = run_folder.join("checkpoints");
    make_folder(&folder)?;
    let target = folder.join(folder_name(contents.step));
    if fs::symlink_metadata(&target).is_ok() {
        if is_same(&target, &entries) {
            return Ok(target);
        }
        set_aside(&target)?;
    }
    let temporary = make_temporary(&folder, contents.step)?;
    let written = write(&temporary, &files, &manifest(contents.step, entries))
        .and_then(|()| fs::rename(&temporary, &target).map_err(explain("make", &target)))
        .and_then(|()| sync_folder(&folder));
    if let Err(error) = written {
        let _ = fs::remove_dir_all(&temporary); // the first error is the one to report
        return Err(error.into());
    }
    // Saved. What follows is housekeeping: its failure must not read as a failed save.
    let _ = link_latest(&folder, &target);
    let _ = tidy(&folder, keep.max(1));
    Ok(target)
}

/// Loads the checkpoint in `folder` for a model of `layout`.
pub fn load(folder: &Path, layout: &Layout) -> Result<Checkpoint, CheckpointError> {
    let (step, [model, optimizer, state, tokenizer, config]) = read_verified(folder)?;
    let params = tensors::params(&folder.join(MODEL), &model, layout)?;
    let optimizer = tensors::optimizer(&folder.join(OPTIMIZER), &optimizer, layout)?;
    let texts = texts(folder, step, &state, tokenizer, config)?;
    let Texts { state, tokenizer, config, .. } = texts;
    Ok(Checkpoint { step, params, optimizer, state, tokenizer, config })
}

/// Reads what is needed to build the model that the checkpoint in `folder` belongs to. All files are verified, the weights too.
pub fn read_texts(folder: &Path) -> Result<Texts, CheckpointError> {
    let (step, [_, _, state, tokenizer, config]) = read_verified(folder)?;
    texts(folder, step, &state, tokenizer, config)
}

/// Checks sizes and hashes of the checkpoint in `folder` and returns its step.
pub fn verify(folder: &Path) -> Result<u64, CheckpointError> {
    read_verified(folder).map(|(step, _)| step)
}

/// All checkpoints of a run, whole or not, newest first by step number; no other folder counts.
pub fn list(run_folder: &Path) -> Result<Vec<(u64, PathBuf)>, CheckpointError> {
    Ok(numbered(&run_folder.join("checkpoints"))?)
}

/// The newest checkpoint of a run that is whole, and why newer ones are not. Changes nothing on disk.
pub fn newest_whole(run_folder: &Path) -> Result<Newest, CheckpointError> {
    let mut newest = Newest::default();
    for (_, path) in list(run_folder)? {
        match verify(&path) {
            Ok(_) => {
                newest.path = Some(path);
                break;
            }
            Err(CheckpointError::Damaged { file, reason }) => {
                newest.skipped.push((path, format!("{}: {reason}", file.display())));
            }
            Err(other) => return Err(other), // a disk that cannot be read, a newer program's checkpoint: not ours to skip
        }
    }
    Ok(newest)
}

/// Renames a damaged folder to `<name>.bad` (or .bad-2, …): never deleted, never looked at again. Returns the new path.
pub fn set_aside(path: &Path) -> Result<PathBuf, CheckpointError> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let aside = (1u32..)
        .map(|n| path.with_file_name(if n == 1 { format!("{name}.bad") } else { format!("{name}.bad-{n}") }))
        .find(|aside| fs::symlink_metadata(aside).is_err())
        .unwrap_or_else(|| path.with_extension("bad"));
    fs::rename(path, &aside).map_err(explain("rename", path))?;
    sync_folder(crate::files::parent(path))?;
    Ok(aside)
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

fn numbered(folder: &Path) -> io::Result<Vec<(u64, PathBuf)>> {
    let entries = match fs::read_dir(folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.map_err(explain("read", folder))?,
    };
    let mut found = Vec::new();
    for entry in entries {
        let path = entry.map_err(explain("read", folder))?.path();
        found.extend(step_of(&path).map(|step| (step, path)));
    }
    found.sort_by(|a, b| b.cmp(a));
    Ok(found)
}

fn check_finite(contents: &Contents<'_>) -> Result<(), CheckpointError> {
    let moments = contents.optimizer.moments.iter().map(|(name, moment)| (name.as_str(), moment.as_slice()));
    for (buffer, numbers) in moments.chain([("", contents.params)]) {
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

/// Size and hash of one file, as the manifest has them.
fn entry(bytes: &[u8]) -> Value {
    json!({ "size": bytes.len(), "sha256": sha256(bytes) })
}

/// MANIFEST.json; its last field is the hash of the others, so that damage to the manifest shows too.
fn manifest(step: u64, files: Map<String, Value>) -> Vec<u8> {
    seal(json!({ "format": FORMAT, "step": step, "moe_lab": env!("CARGO_PKG_VERSION"), "files": files }))
}

fn seal(mut manifest: Value) -> Vec<u8> {
    let hash = sha256(&pretty(&manifest));
    manifest["sha256"] = Value::from(hash);
    pretty(&manifest)
}

fn make_temporary(folder: &Path, step: u64) -> io::Result<PathBuf> {
    for attempt in 0u32.. {
        let path = folder.join(format!(".tmp-{step}-{}-{attempt}", std::process::id()));
        match fs::create_dir(&path) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            made => return made.map(|()| path.clone()).map_err(explain("make the folder", &path)),
        }
    }
    Err(io::Error::other(format!("{} is full of temporary folders; delete them", folder.display())))
}

fn write(folder: &Path, files: &[(&str, Vec<u8>)], manifest: &[u8]) -> io::Result<()> {
    for (name, bytes) in files {
        write_new(&folder.join(name), bytes)?;
    }
    write_new(&folder.join(MANIFEST), manifest)?;
    sync_folder(folder)
}

/// Whether the checkpoint there is whole and has the weights and moments of `entries`. (Its state may differ in times.)
fn is_same(folder: &Path, entries: &Map<String, Value>) -> bool {
    let same = |there: Map<String, Value>| [MODEL, OPTIMIZER].iter().all(|name| there.get(*name) == entries.get(*name));
    verify(folder).is_ok() && read_manifest(folder).is_ok_and(|(_, there)| same(there))
}

/// Points `latest` at the checkpoint, for people; no program reads it.
fn link_latest(folder: &Path, target: &Path) -> io::Result<()> {
    let temporary = folder.join(".tmp-latest");
    let _ = fs::remove_file(&temporary);
    #[cfg(unix)]
    std::os::unix::fs::symlink(target.file_name().unwrap_or_default(), &temporary)?;
    fs::rename(&temporary, folder.join("latest"))?;
    sync_folder(folder)
}

/// Deletes checkpoints beyond the `keep` newest, and what a killed save left. A folder is renamed before it is emptied, so that a kill in
/// between leaves no checkpoint with files missing.
fn tidy(folder: &Path, keep: usize) -> io::Result<()> {
    let best = fs::read_link(folder.join("best")).ok().and_then(|target| step_of(&target));
    for (step, path) in numbered(folder)?.into_iter().skip(keep).filter(|(step, _)| Some(*step) != best) {
        fs::rename(&path, folder.join(format!(".tmp-old-{step}")))?;
    }
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        if entry.file_name().to_string_lossy().starts_with(".tmp-") && entry.file_type()?.is_dir() {
            fs::remove_dir_all(entry.path())?;
        }
    }
    Ok(())
}

/// Step and file entries of the manifest in `folder`, itself verified.
fn read_manifest(folder: &Path) -> Result<(u64, Map<String, Value>), CheckpointError> {
    let file = folder.join(MANIFEST);
    let damaged = |reason: &str| CheckpointError::Damaged { file: file.clone(), reason: reason.to_owned() };
    let bytes = read_plain(&file, MAX_MANIFEST)?;
    let mut manifest: Value = serde_json::from_slice(&bytes).map_err(|error| damaged(&format!("no JSON: {error}")))?;
    manifest.as_object_mut().ok_or_else(|| damaged("no JSON object"))?.shift_remove("sha256");
    if seal(manifest.clone()) != bytes {
        return Err(damaged("its sha256 does not fit its contents"));
    }
    match manifest["format"].as_u64() {
        Some(FORMAT) => {}
        found => {
            let found = found.map_or("unknown".to_owned(), |format| format.to_string());
            let reason = format!(
                "format {found} of another moe_lab; this one reads format {FORMAT}: use the program that wrote it"
            );
            return Err(CheckpointError::Foreign { file, reason });
        }
    }
    let step = manifest["step"].as_u64().ok_or_else(|| damaged("no step"))?;
    if step_of(folder).is_some_and(|named| named != step) {
        return Err(damaged(&format!("it is the manifest of step {step}, not of this folder")));
    }
    match manifest["files"].take() {
        Value::Object(files) => Ok((step, files)),
        _ => Err(damaged("no list of files")),
    }
}

/// The step and the bytes of all files, in the order of [`FILES`]: first all sizes are checked, then every hash.
fn read_verified(folder: &Path) -> Result<(u64, [Vec<u8>; FILES.len()]), CheckpointError> {
    let (step, entries) = read_manifest(folder)?;
    let damaged = |name: &str, reason: String| CheckpointError::Damaged { file: folder.join(name), reason };
    for name in FILES {
        let said =
            entries.get(name).ok_or_else(|| damaged(MANIFEST, format!("{name} is not listed")))?["size"].as_u64();
        let size = plain_size(&folder.join(name))?;
        if said != Some(size) {
            let said = said.map_or("nothing".to_owned(), |said| said.to_string());
            return Err(damaged(name, format!("{size} bytes but the manifest says {said}")));
        }
    }
    let mut files: [Vec<u8>; FILES.len()] = Default::default();
    for (bytes, name) in files.iter_mut().zip(FILES) {
        let limit = if name.ends_with(".json") { MAX_TEXT } else { u64::MAX };
        *bytes = read_plain(&folder.join(name), limit)?;
        let (found, said) = (sha256(bytes), entries[name]["sha256"].as_str().unwrap_or("nothing"));
        if found != said {
            return Err(damaged(name, format!("sha256 {found} but the manifest says {said}")));
        }
    }
    Ok((step, files))
}

/// The size of a plain file. A missing file and anything that is not a plain file is damage.
fn plain_size(path: &Path) -> Result<u64, CheckpointError> {
    let damaged = |reason: &str| CheckpointError::Damaged { file: path.to_owned(), reason: reason.to_owned() };
    match fs::symlink_metadata(path) {
        Ok(found) if found.is_file() => Ok(found.len()),
        Ok(_) => Err(damaged("not a plain file")),
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
            Err(damaged("missing"))
        }
        Err(error) => Err(explain("read", path)(error).into()),
    }
}

fn read_plain(path: &Path, limit: u64) -> Result<Vec<u8>, CheckpointError> {
    let size = plain_size(path)?;
    if size > limit {
        let reason = format!("{size} bytes, more than the {limit} that such a file may have");
        return Err(CheckpointError::Damaged { file: path.to_owned(), reason });
    }
    Ok(fs::read(path).map_err(explain("read", path))?)
}

fn texts(
    folder: &Path,
    step: u64,
    state: &[u8],
    tokenizer: Vec<u8>,
    config: Vec<u8>,
) -> Result<Texts, CheckpointError> {
    let damaged = |name: &str, reason: String| CheckpointError::Damaged { file: folder.join(name), reason };
    let state = serde_json::from_slice(state).map_err(|error| damaged(STATE, format!("no JSON: {error}")))?;
    let config = String::from_utf8(config).map_err(|error| damaged(CONFIG, error.to_string()))?;
    Ok(Texts { step, state, tokenizer, config })
}

#[cfg(test)]
mod tests;
