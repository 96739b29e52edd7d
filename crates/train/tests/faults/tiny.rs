//! A run of a tenth of a second, what it ends with, and the line each test reports.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use tempfile::TempDir;
use train::metrics::canonical;
use train::run::Run;
use train::{TrainError, Trainer};

const FACTS: &str =
    r#"["The Sun is a star . </s>", "The Moon is a rock . </s>", "Ice is cold water . </s>", "A star is hot . </s>"]"#;
const CHAT: &str = r#"["User: What is ice? Assistant: Ice is cold water. </s>", "User: Is water wet? Assistant: Water is wet. </s>", "User: What is the Sun? Assistant: The Sun is a star. </s>"]"#;

/// What the tiny run is, as `--set` pairs: a routed model with control states, accumulation, shuffling, a running mean, a checkpoint every 3 updates.
pub fn sets(folder: &Path, epochs: u64) -> Vec<String> {
    let (facts, chat) = (folder.join("facts.json"), folder.join("chat.json"));
    fs::write(&facts, FACTS).unwrap();
    fs::write(&chat, CHAT).unwrap();
    let mut sets = vec![
        format!("data.facts={}", facts.display()),
        format!("data.chat={}", chat.display()),
        format!("train.epochs={epochs}"),
    ];
    let fixed = [
        "model.hidden_size=16",
        "model.num_layers=2",
        "model.num_heads=4",
        "model.num_kv_heads=2",
        "model.intermediate_size=12",
        "model.heads={shared=1, routed=3, active=2}",
        "model.router={kind='expert_choice', k=1.5, num_experts=4, expert_hidden_size=6}",
        "phase.facts.train.batch_size=2",
        "phase.chat.train.batch_size=2",
        "data.shuffle=true",
        "data.max_length=16",
        "train.accumulate=2",
        "train.warmup_epochs=1",
        "train.learning_rate=0.003",
        "train.ema=0.9",
        "checkpoint.every=3",
        "threads=1",
    ];
    sets.extend(fixed.map(String::from));
    sets
}

/// A folder in memory where the system has one: what fails here is simulated, and a real fsync would only take time.
pub fn memory() -> TempDir {
    TempDir::new_in("/dev/shm").or_else(|_| TempDir::new()).unwrap()
}

pub fn run(folder: &Path) -> Run {
    Run::load("baseline", &sets(folder, 2)).unwrap()
}

pub fn finish(trainer: &mut Trainer) -> Result<(), TrainError> {
    while trainer.next_row()?.is_some() {}
    Ok(())
}

/// Files of the last checkpoint, and the metrics without times and events.
#[derive(Debug, PartialEq)]
pub struct Outcome {
    files: Vec<(String, Vec<u8>)>,
    metrics: Vec<String>,
    samples: Vec<u8>,
}

pub fn outcome(out: &Path) -> Outcome {
    let newest = train::checkpoint::newest_whole(out).unwrap().path.expect("a checkpoint");
    let mut files: Vec<(String, Vec<u8>)> = fs::read_dir(&newest)
        .unwrap()
        .map(|entry| entry.unwrap())
        .map(|entry| (entry.file_name().to_string_lossy().into_owned(), fs::read(entry.path()).unwrap()))
        .collect();
    files.sort();
    let metrics = fs::read_to_string(out.join("metrics.jsonl")).unwrap();
    let samples = fs::read(out.join("samples.jsonl")).unwrap();
    Outcome { files, metrics: metrics.lines().filter_map(canonical).collect(), samples }
}

/// What the tiny run ends with when nothing goes wrong.
pub fn reference() -> &'static Outcome {
    static REFERENCE: OnceLock<Outcome> = OnceLock::new();
    REFERENCE.get_or_init(|| {
        let folder = memory();
        let out = folder.path().join("run");
        finish(&mut Trainer::new(run(folder.path()), Some(&out), None).unwrap()).unwrap();
        outcome(&out)
    })
}

/// Resumes with a working disk to the end, or starts where there is no run yet; the result must be the reference, and nothing stray may be left.
pub fn recover_to_the_end(folder: &Path, out: &Path, what: &str) {
    let mut trainer = match out.join("run.json").exists() {
        true => Trainer::resume(out).unwrap_or_else(|error| panic!("{what}: {error}")),
        false => {
            let _ = fs::remove_dir_all(out);
            Trainer::new(run(folder), Some(out), None).unwrap_or_else(|error| panic!("{what}: {error}"))
        }
    };
    finish(&mut trainer).unwrap_or_else(|error| panic!("{what}: {error}"));
    drop(trainer);
    assert!(outcome(out) == *reference(), "{what}: other bytes than the run that nothing happened to");
    for folder in [out.to_path_buf(), out.join("checkpoints")] {
        let stray = names(&folder).into_iter().find(|name| name.starts_with(".tmp-"));
        assert_eq!(stray, None, "{what}: left behind");
    }
}

pub fn names(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).map(|entries| entries.map(|e| e.unwrap().file_name().into_string().unwrap()));
    let mut names: Vec<String> = entries.map_or_else(|_| Vec::new(), Iterator::collect);
    names.sort();
    names
}

pub fn checkpoints(out: &Path) -> Vec<PathBuf> {
    train::checkpoint::list(out).unwrap().into_iter().map(|(_, path)| path).collect()
}

/// Every assertion held, or this is not reached.
pub fn report(what: &str, injected: usize, kills: usize) {
    println!("faults: {what} injected={injected} kills={kills} wrong=0");
}
