//! One function per parser of files that others may have written. A target fails by panicking: on a crash of ours, or where a promise does not
//! hold. The test `corpus` of the crate `train` replays the corpus through the same functions on every `cargo test`.

use serde_json::{Map, Value, json};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use tensor::Layout;
use train::checkpoint;
use train::data::{DocumentSet, ItemFile, Role, TextFile, Tokenizer, Unknowns, sha256};
use train::dataset::Dataset;
use train::metrics::{Row, canonical};
use train::run::Run;
use train::steps::read_steps;
use train::trained::{Sampling, Trained};
use train::{Trainer, untrusted};

/// Reads the bytes of a file; panics where a promise does not hold.
pub type Target = fn(&[u8]);

/// By name, as in `corpus/<name>`.
pub const TARGETS: [(&str, Target); 8] = [
    ("weights", weights),
    ("manifest", manifest),
    ("state", state),
    ("run_file", run_file),
    ("data", data),
    ("tokenizer", tokenizer),
    ("metrics", metrics),
    ("run_directory", run_directory),
];

/// A message is shown to people: it must not command their terminal once it went through `shown`.
fn message(error: &dyn std::fmt::Display) {
    let text = untrusted::shown(&error.to_string());
    assert!(!text.is_empty() && !text.contains(|c: char| c.is_control() && c != '\n' && c != '\t'), "{text:?}");
}

/// A safetensors file. What our check lets through, the library must read and find without a hole.
pub fn weights(bytes: &[u8]) {
    static LAYOUT: OnceLock<Layout> = OnceLock::new();
    let layout = LAYOUT.get_or_init(|| {
        let parameter = |name: &str, shape: &[usize]| (name.to_string(), shape.to_vec(), true);
        Layout::new([parameter("a", &[2, 3]), parameter("b.experts", &[2, 1, 2]), parameter("c", &[3])])
    });
    if let Err(reason) = checkpoint::header::check(bytes) {
        message(&reason);
    }
    match checkpoint::weights(Path::new("model.safetensors"), bytes, layout) {
        Ok(found) => assert_eq!(found.len(), layout.len()),
        Err(error) => message(&error),
    }
}

/// MANIFEST.json, as it is and with a hash that fits, as an adversary would write it.
pub fn manifest(bytes: &[u8]) {
    let folder = Path::new("checkpoint-3");
    if let Err(error) = checkpoint::parse_manifest(folder, bytes) {
        message(&error);
    }
    if let Ok(value) = serde_json::from_slice::<Value>(bytes)
        && let Some(sealed) = sealed(value)
        && let Err(error) = checkpoint::parse_manifest(folder, &sealed)
    {
        message(&error);
    }
}

/// The manifest with the hash of its other fields as the last one.
fn sealed(mut manifest: Value) -> Option<Vec<u8>> {
    let fields = manifest.as_object_mut()?;
    fields.shift_remove("sha256");
    let hash = sha256(format!("{manifest:#}\n").as_bytes());
    manifest["sha256"] = Value::from(hash);
    Some(format!("{manifest:#}\n").into_bytes())
}

/// state.json of a checkpoint: what passes the checks can be gone on with.
pub fn state(bytes: &[u8]) {
    static TINY: OnceLock<(Run, Dataset)> = OnceLock::new();
    let (run, dataset) = TINY.get_or_init(|| {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let run = tiny(folder.path());
        let dataset = Dataset::load(&run).expect("good data");
        (run, dataset)
    });
    let Ok(value) = serde_json::from_slice::<Value>(bytes) else { return };
    let mut policies = model::transformer::Transformer::new(&run.model, dataset.tokenizer.vocab_size()).policies();
    match train::trainer::checked_state(value, run, dataset, &mut policies) {
        Ok(mut epoch) => {
            let mut row = Row::new(1, 1, "moe");
            epoch.routing(&mut row, 0);
            epoch.losses(&mut row, None);
            canonical(&row.line());
        }
        Err(reason) => message(&reason),
    }
}

/// A run file, then a zero byte between `--set` arguments. A good run survives being written.
pub fn run_file(bytes: &[u8]) {
    let text = String::from_utf8_lossy(bytes);
    let mut parts = text.split('\0');
    let (file, sets) = (parts.next().unwrap_or_default(), parts.take(8).map(str::to_string).collect::<Vec<_>>());
    match Run::from_toml_str(file, Path::new("/nowhere"), &sets) {
        Ok(run) => {
            let again = Run::parse(&run.to_toml()).expect("what was written can be read");
            assert!(Run::diff(&run, &again).is_empty());
            for phase in run.phases() {
                run.phase(phase);
            }
        }
        Err(error) => message(&error),
    }
}

/// JSON data and plain text, encoded as a run would.
pub fn data(bytes: &[u8]) {
    for role in [Role::Facts, Role::Chat] {
        match ItemFile::parse("file.json", bytes, role) {
            Ok(file) => {
                let tokenizer = Tokenizer::words(file.items.iter().map(String::as_str));
                file.exchanges();
                match DocumentSet::encode(&file, &tokenizer, 8) {
                    Ok(set) => drop(set.floor()),
                    Err(error) => message(&error),
                }
            }
            Err(error) => message(&error),
        }
    }
    match TextFile::parse("file.txt", bytes) {
        Ok(file) => {
            let tokenizer = Tokenizer::characters([file.text.as_str()]);
            let ids = tokenizer.encode(&file.text).expect("characters always encode");
            assert_eq!(tokenizer.decode(&ids), file.text);
        }
        Err(error) => message(&error),
    }
}

/// tokenizer.json, ours or of Hugging Face.
pub fn tokenizer(bytes: &[u8]) {
    match Tokenizer::from_bytes("tokenizer.json", bytes) {
        Ok(tokenizer) => {
            for text in ["User: a Assistant: ab </s>", "é\0\u{10ffff} aaaaaaaaaaaaaaaaaaaaab", ""] {
                match tokenizer.encode_counting(text, &mut Unknowns::default()) {
                    Ok(ids) => {
                        assert!(ids.iter().all(|id| (*id as usize) < tokenizer.vocab_size()));
                        tokenizer.decode(&ids);
                    }
                    Err(error) => message(&error),
                }
            }
            tokenizer.decode(&[0, 7, u32::MAX]);
            tokenizer.end();
            tokenizer.token(3);
        }
        Err(error) => message(&error),
    }
}

/// Lines of a metric stream: what is compared of a line is compared the same the second time, and what is read as a step is JSON.
pub fn metrics(bytes: &[u8]) {
    for line in String::from_utf8_lossy(bytes).lines() {
        if let Some(text) = canonical(line) {
            assert_eq!(canonical(&text).as_deref(), Some(text.as_str()));
        }
    }
    let lines: Vec<&[u8]> = bytes.split_inclusive(|&byte| byte == b'\n').collect();
    for place in read_steps(bytes).iter().flat_map(|steps| &steps.places) {
        serde_json::from_slice::<Map<String, Value>>(lines[*place as usize]).expect("a JSON object");
    }
}

const FILES: [&str; 12] = [
    "run.toml",
    "run.json",
    "metrics.jsonl",
    "samples.jsonl",
    "run.lock",
    "checkpoints/checkpoint-2/MANIFEST.json",
    "checkpoints/checkpoint-2/model.safetensors",
    "checkpoints/checkpoint-2/optimizer.safetensors",
    "checkpoints/checkpoint-2/state.json",
    "checkpoints/checkpoint-2/tokenizer.json",
    "checkpoints/checkpoint-2/config.json",
    "checkpoints/checkpoint-4/state.json",
];

/// A run directory from a stranger. The bytes are edits of a good, stopped run: [file, kind, place ×2, length, data…] again and again; bit 7
/// of `kind` makes the manifest fit the edited file. Then everything that reads a run directory reads it, and it trains on for two rows. No
/// file outside may change.
pub fn run_directory(bytes: &[u8]) {
    let folder = tempfile::tempdir_in(scratch()).expect("a temporary folder");
    let (run, outside) = (folder.path().join("run"), folder.path().join("outside"));
    copy(&good_run().join("run"), &run);
    fs::write(&outside, "untouched").expect("a file");
    let mut rest = bytes;
    for _ in 0..6 {
        let [file, kind, high, low, length, after @ ..] = rest else { break };
        let (edit, after) = after.split_at((*length as usize).min(after.len()));
        let path = run.join(FILES[*file as usize % FILES.len()]);
        let place = u16::from_be_bytes([*high, *low]) as usize;
        change(&path, kind & 0x7f, place, edit, &outside);
        if kind & 0x80 != 0 {
            reseal(&path);
        }
        rest = after;
    }
    read_all(&run);
    assert_eq!(fs::read_to_string(&outside).expect("still there"), "untouched");
}

fn read_all(run: &Path) {
    match Trained::load(run, None) {
        Ok(model) => match model.generate("a b", 2, Sampling::GREEDY, true) {
            Ok(text) => drop(untrusted::shown(&text)),
            Err(error) => message(&error),
        },
        Err(error) => message(&error),
    }
    if let Err(error) = train::reproduce::Original::read(run) {
        message(&error);
    }
    match Trainer::resume(run) {
        Ok(mut trainer) => {
            for _ in 0..2 {
                if let Err(error) = trainer.next_row() {
                    message(&error);
                }
            }
        }
        Err(error) => message(&error),
    }
}

fn change(path: &Path, kind: u8, place: usize, edit: &[u8], outside: &Path) {
    if path.is_symlink() {
        return; // an edit of before: to write through it is what the readers must not do
    }
    let mut old = fs::read(path).unwrap_or_default();
    let place = place.min(old.len());
    match kind % 8 {
        0 => old.splice(place..(place + edit.len()).min(old.len()), edit.iter().copied()).for_each(drop), // overwrite
        1 => old.splice(place..place, edit.iter().copied()).for_each(drop),                               // insert
        2 => old.truncate(place),
        3 => old = edit.to_vec(),
        4 => {
            let end = (place + usize::from(edit.first().copied().unwrap_or(1))).min(old.len());
            old.drain(place..end);
        }
        5 => {
            let _ = fs::remove_file(path);
            #[cfg(unix)]
            let _ = std::os::unix::fs::symlink(outside, path);
            return;
        }
        6 => {
            let _ = fs::remove_file(path);
            let _ = fs::create_dir(path);
            return;
        }
        _ => {
            // one number becomes another: what a JSON or TOML value says is reached without spoiling the syntax
            let digit = old[place..].iter().position(u8::is_ascii_digit).map(|at| place + at);
            let Some(start) = digit else { return };
            let length = old[start..].iter().take_while(|byte| byte.is_ascii_digit()).count();
            let number = edit.iter().fold(0u64, |number, byte| number << 8 | u64::from(*byte));
            old.splice(start..start + length, number.to_string().into_bytes());
        }
    }
    let _ = fs::write(path, old);
}

/// Makes the manifest beside `path` fit the file.
fn reseal(path: &Path) {
    let (Some(folder), Some(name)) = (path.parent(), path.file_name().and_then(|name| name.to_str())) else { return };
    let (Ok(bytes), Ok(text)) = (fs::read(path), fs::read(folder.join("MANIFEST.json"))) else { return };
    let Ok(mut manifest) = serde_json::from_slice::<Value>(&text) else { return };
    if let Some(entry) = manifest.get_mut("files").and_then(|files| files.get_mut(name)) {
        *entry = json!({ "size": bytes.len(), "sha256": sha256(&bytes) });
    }
    if let Some(sealed) = sealed(manifest) {
        let _ = fs::write(folder.join("MANIFEST.json"), sealed);
    }
}

/// A run of a few hundred parameters whose data lie in `folder`.
fn tiny(folder: &Path) -> Run {
    let write = |name: &str, text: &str| {
        let path = folder.join(name);
        fs::write(&path, text).expect("a file");
        path
    };
    let facts = write("facts.json", "[\"a b c </s>\", \"b c </s>\", \"c a </s>\"]");
    let chat = write("chat.json", "[\"User: a Assistant: b </s>\", \"User: b Assistant: c </s>\"]");
    let sets = [
        format!("data.facts={}", facts.display()),
        format!("data.chat={}", chat.display()),
        "threads=1".into(),
        "model={hidden_size=8, num_layers=1, num_heads=2, num_kv_heads=1, heads={routed=0}, position={max=8}}".into(),
        "model.router={kind='expert_choice', k=1, num_experts=2, expert_hidden_size=4}".into(),
        "train={batch_size=2, epochs=2, warmup_epochs=0}".into(),
        "phase={}".into(),
        "data.max_length=8".into(),
        "checkpoint={every=2, keep=9}".into(),
        "eval.every=0".into(),
    ];
    Run::load("baseline", &sets).expect("a good run")
}

/// Where runs are copied to: memory where there is some, for every save waits for the disk.
fn scratch() -> PathBuf {
    let memory = PathBuf::from("/dev/shm");
    if memory.is_dir() { memory } else { std::env::temp_dir() }
}

/// A run that was stopped at its fifth step, made once per process.
fn good_run() -> &'static Path {
    static RUN: OnceLock<tempfile::TempDir> = OnceLock::new();
    let folder = RUN.get_or_init(|| {
        let folder = tempfile::tempdir_in(scratch()).expect("a temporary folder");
        let run = tiny(folder.path());
        let mut trainer = Trainer::new(run, Some(&folder.path().join("run")), None).expect("a run");
        while trainer.step_count() < 5 {
            trainer.next_row().expect("a row");
        }
        trainer.stop("enough").expect("stopped");
        folder
    });
    folder.path()
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir(to).expect("a folder");
    for entry in fs::read_dir(from).expect("a folder") {
        let entry = entry.expect("an entry");
        let target = to.join(entry.file_name());
        match entry.file_type().expect("a type") {
            kind if kind.is_dir() => copy(&entry.path(), &target),
            kind if kind.is_file() => drop(fs::copy(entry.path(), target).expect("copied")),
            _ => {} // the link `latest` is for people
        }
    }
}
