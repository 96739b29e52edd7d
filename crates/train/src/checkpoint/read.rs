//! Reading: sizes, then hashes, before anything is parsed; and the search for the newest checkpoint that is whole.

use super::{CONFIG, Checkpoint, CheckpointError, FILES, FORMAT, MANIFEST, MODEL, OPTIMIZER, STATE, TOKENIZER, Texts};
use super::{numbered, seal, step_of, tensors};
use crate::data::sha256;
use crate::files::{Files, System, explain};
use serde_json::{Map, Value};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use tensor::Layout;

/// Longest text file and manifest that is read.
const MAX_TEXT: u64 = 256 << 20;
const MAX_MANIFEST: u64 = 1 << 20;

/// What [`newest_whole`] found.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Newest {
    pub path: Option<PathBuf>,
    /// Newer checkpoints that are damaged, newest first, each with the reason.
    pub skipped: Vec<(PathBuf, String)>,
}

/// What [`recover`] found and loaded.
#[derive(Debug, Default)]
pub struct Recovered {
    pub checkpoint: Option<(PathBuf, Checkpoint)>,
    /// Newer checkpoints that are damaged, newest first, each with the reason.
    pub skipped: Vec<(PathBuf, String)>,
}

/// Loads the checkpoint in `folder` for a model of `layout`.
pub fn load(folder: &Path, layout: &Layout) -> Result<Checkpoint, CheckpointError> {
    load_on(&System, folder, layout)
}

fn load_on(disk: &dyn Files, folder: &Path, layout: &Layout) -> Result<Checkpoint, CheckpointError> {
    let verified = read_verified(disk, folder)?;
    let fingerprints = verified.fingerprints;
    let [model, optimizer, state, tokenizer, config] = verified.files;
    let (params, optimizer) = std::thread::scope(|scope| {
        let params = scope.spawn(|| tensors::read_params(&folder.join(MODEL), &model, layout));
        let optimizer = tensors::read_optimizer(&folder.join(OPTIMIZER), &optimizer, layout);
        (params.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)), optimizer)
    });
    let (params, (optimizer, ema)) = (params?, optimizer?);
    let Texts { step, state, tokenizer, config } = texts(folder, verified.step, &state, tokenizer, config)?;
    Ok(Checkpoint { step, params, optimizer, ema, state, tokenizer, config, fingerprints })
}

/// Reads what is needed to build the model that the checkpoint in `folder` belongs to. All files are verified, the weights too.
pub fn read_texts(folder: &Path) -> Result<Texts, CheckpointError> {
    let verified = read_verified(&System, folder)?;
    let [_, _, state, tokenizer, config] = verified.files;
    texts(folder, verified.step, &state, tokenizer, config)
}

/// Checks sizes and hashes of the checkpoint in `folder` and returns its step.
pub fn verify(folder: &Path) -> Result<u64, CheckpointError> {
    read_verified(&System, folder).map(|verified| verified.step)
}

/// All checkpoints of a run, whole or not, newest first by step number; no other folder counts.
pub fn list(run_folder: &Path) -> Result<Vec<(u64, PathBuf)>, CheckpointError> {
    Ok(numbered(&run_folder.join("checkpoints"))?)
}

/// The newest checkpoint of a run that is whole, and why newer ones are not. Changes nothing on disk.
pub fn newest_whole(run_folder: &Path) -> Result<Newest, CheckpointError> {
    let (found, skipped) = newest(run_folder, &mut |path| verify(path).map(|_| path.to_owned()))?;
    Ok(Newest { path: found, skipped })
}

/// Loads the newest checkpoint of a run that is whole, reading it once. Changes nothing on disk.
pub fn recover(disk: &dyn Files, run_folder: &Path, layout: &Layout) -> Result<Recovered, CheckpointError> {
    let (checkpoint, skipped) =
        newest(run_folder, &mut |path| load_on(disk, path, layout).map(|loaded| (path.to_owned(), loaded)))?;
    Ok(Recovered { checkpoint, skipped })
}

type Skipped = Vec<(PathBuf, String)>;

/// The first of the checkpoints, newest first by step number and never by time, that `read` accepts.
fn newest<T>(
    run_folder: &Path,
    read: &mut dyn FnMut(&Path) -> Result<T, CheckpointError>,
) -> Result<(Option<T>, Skipped), CheckpointError> {
    let mut skipped = Vec::new();
    for (_, path) in list(run_folder)? {
        match read(&path) {
            Ok(found) => return Ok((Some(found), skipped)),
            Err(CheckpointError::Damaged { file, reason }) => {
                skipped.push((path, format!("{}: {reason}", file.display())));
            }
            Err(other) => return Err(other), // a disk that cannot be read, a newer program's checkpoint: not ours to skip
        }
    }
    Ok((None, skipped))
}

/// A manifest that fits its own hash.
pub struct Manifest {
    pub step: u64,
    pub files: Map<String, Value>,
    pub fingerprints: Map<String, Value>,
}

pub(super) fn read_manifest(disk: &dyn Files, folder: &Path) -> Result<Manifest, CheckpointError> {
    parse_manifest(folder, &read_plain(disk, &folder.join(MANIFEST), MAX_MANIFEST)?)
}

/// The manifest of the checkpoint `folder` in its bytes.
pub fn parse_manifest(folder: &Path, bytes: &[u8]) -> Result<Manifest, CheckpointError> {
    let file = folder.join(MANIFEST);
    let damaged = |reason: &str| CheckpointError::Damaged { file: file.clone(), reason: reason.to_owned() };
    let mut manifest: Value = serde_json::from_slice(bytes).map_err(|error| damaged(&format!("no JSON: {error}")))?;
    manifest.as_object_mut().ok_or_else(|| damaged("no JSON object"))?.shift_remove("sha256");
    if seal(manifest.clone()) != bytes {
        return Err(damaged("its sha256 does not fit its contents"));
    }
    match manifest["format"].as_u64() {
        Some(FORMAT) => {}
        Some(format) if format > FORMAT => return Err(CheckpointError::Newer { file, format }),
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
    let fingerprints = manifest["fingerprints"].as_object().cloned().unwrap_or_default();
    match manifest["files"].take() {
        Value::Object(files) => Ok(Manifest { step, files, fingerprints }),
        _ => Err(damaged("no list of files")),
    }
}

/// A checkpoint whose every byte is the one that was saved; files in the order of [`FILES`].
struct Verified {
    step: u64,
    fingerprints: Map<String, Value>,
    files: [Vec<u8>; FILES.len()],
}

/// First all sizes are checked, then every hash; the two large files at the same time.
fn read_verified(disk: &dyn Files, folder: &Path) -> Result<Verified, CheckpointError> {
    let manifest = check_sizes(disk, folder)?;
    let read = |name: &str| {
        let limit = if name.ends_with(".json") { MAX_TEXT } else { u64::MAX };
        let bytes = read_plain(disk, &folder.join(name), limit)?;
        let (found, said) = (sha256(&bytes), manifest.files[name]["sha256"].as_str().unwrap_or("nothing"));
        match found == said {
            true => Ok(bytes),
            false => {
                let reason = format!("sha256 {found} but the manifest says {said}");
                Err(CheckpointError::Damaged { file: folder.join(name), reason })
            }
        }
    };
    let files = std::thread::scope(|scope| {
        let model = scope.spawn(|| read(MODEL));
        let rest = [OPTIMIZER, STATE, TOKENIZER, CONFIG].map(read);
        let [optimizer, state, tokenizer, config] = rest;
        let model = model.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        Ok::<_, CheckpointError>([model?, optimizer?, state?, tokenizer?, config?])
    })?;
    Ok(Verified { step: manifest.step, fingerprints: manifest.fingerprints, files })
}

/// The manifest of a checkpoint all of whose files are there in full length.
pub(super) fn check_sizes(disk: &dyn Files, folder: &Path) -> Result<Manifest, CheckpointError> {
    let manifest = read_manifest(disk, folder)?;
    let damaged = |name: &str, reason: String| CheckpointError::Damaged { file: folder.join(name), reason };
    for name in FILES {
        let listed = manifest.files.get(name);
        let said = listed.ok_or_else(|| damaged(MANIFEST, format!("{name} is not listed")))?["size"].as_u64();
        let size = plain_size(&folder.join(name))?;
        if said != Some(size) {
            let said = said.map_or("nothing".to_owned(), |said| said.to_string());
            return Err(damaged(name, format!("{size} bytes but the manifest says {said}")));
        }
    }
    Ok(manifest)
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

pub(super) fn read_plain(disk: &dyn Files, path: &Path, limit: u64) -> Result<Vec<u8>, CheckpointError> {
    let size = plain_size(path)?;
    if size > limit {
        let reason = format!("{size} bytes, more than the {limit} that such a file may have");
        return Err(CheckpointError::Damaged { file: path.to_owned(), reason });
    }
    Ok(disk.read(path).map_err(explain("read", path))?)
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
