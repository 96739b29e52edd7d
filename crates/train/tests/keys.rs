//! No option without effect: every key of the schema is turned, and the run, its model or its files change. And random configurations:
//! each is refused in words or trains.

use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use train::metrics::canonical;
use train::run::Run;
use train::{TrainError, Trainer};

const FACTS: &str = r#"["The Sun is a star . </s>", "The Moon is a rock . </s>", "Ice is cold water . </s>", "A star is hot . </s>", "Water is wet . </s>"]"#;
const CHAT: &str = r#"["User: What is the Sun? Assistant: The Sun is a star. </s>", "User: What is ice? Assistant: Ice is cold water. </s>", "User: Is water wet? Assistant: Water is wet. </s>"]"#;
const PARAPHRASES: &str = r#"["User: The Sun is what? Assistant: The Sun is a star. </s>"]"#;
const RULES: &str = r#"{"synonyms": {"cold": ["hot"], "star": ["rock"], "wet": ["hot"]}, "templates": [{"from": "What is {a}?", "to": ["Is {a} the Sun?"]}]}"#;
const TEXT: &str = "The Sun is a star. Ice is cold water. A star is hot; water is wet. The Moon is a rock. ";

/// What must differ between the two runs.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Seen {
    /// The weights at the end.
    Weights,
    /// The metric stream.
    Metrics,
    /// samples.jsonl.
    Samples,
    /// How the run ended.
    Ending,
    /// Which checkpoints there are.
    Checkpoints,
    /// run.json: bytes that the updates held at once.
    Memory,
    /// run.json: threads of the machine.
    Threads,
    /// run.toml alone, and the folder that is named after it.
    Name,
    /// Any other value is refused on this machine or in this build.
    Refused,
}
use Seen::*;

const SPARSE: &str = "model.router={kind='top_p', p=0.4, num_experts=4, expert_hidden_size=6}";
const TOP_K: &str = "model.router={kind='top_k', k=2, num_experts=4, expert_hidden_size=6}";
const LEARNED: &str = "model.router={kind='learned_p', num_experts=4, expert_hidden_size=6}";
const TOKEN: &str = "model.adaptive_window={kind='token', min=1, max=4, block=1}";
const HALF: &str = "model.depths.capacity=0.5";
const TEXT_RUN: &str = "data.text=@text.txt";
/// Held-out documents, looked at after every epoch; at rate 0 they never get better.
const HELD_OUT: &[&str] = &["data.val_fraction=0.4", "eval.every=1", "train.epochs=4"];
const HELD_OUT_STILL: &[&str] = &["data.val_fraction=0.4", "eval.every=1", "train.epochs=4", "train.learning_rate=0"];
const HELD_OUT_PATIENT: &[&str] = &["data.val_fraction=0.4", "eval.every=1", "train.epochs=4", "train.patience=1"];
/// A variant of each document by rules of its own.
const AUGMENTED: &[&str] = &["data.augment.copies=1", "data.augment.table=@rules.json"];
/// Updates enough for rules on gradient norms; a rule that is soon broken; and an answer to it.
const LONGER: &[&str] = &["train.epochs=10"];
const WATCHED: &[&str] = &["train.epochs=10", "monitor.exploding=1.01"];
const RESPONDING: &[&str] = &["train.epochs=10", "monitor.exploding=1.01", "monitor.response=clip"];
/// A text of one letter, soon known by heart, with a few others in the middle.
const JUMP: &[&str] = &["data.text=@jump.txt", "train.max_steps=150"];

/// Key, what both runs say, what the second says more, where it shows. `@` stands for the folder of the data.
const CASES: &[(&str, &[&str], &[&str], Seen)] = &[
    ("name", &[], &["name=other"], Name),
    ("seed", &[], &["seed=9"], Weights),
    ("engine", &[], &["engine=reference"], Weights),
    ("device", &[], &["device=cuda"], Refused),
    ("dtype", &[], &["dtype=bf16"], Weights),
    ("threads", &[], &["threads=3"], Threads),
    ("quick", &["train.epochs=12"], &["quick=true"], Weights),
    ("data.facts", &[], &["data.facts=@facts2.json"], Weights),
    ("data.chat", &[], &["data.chat=@chat2.json"], Weights),
    ("data.paraphrases", &[], &["data.paraphrases=@paraphrases.json"], Metrics),
    ("data.text", &[TEXT_RUN], &["data.text=@text2.txt"], Weights),
    ("data.tokenizer", &[TEXT_RUN], &["data.tokenizer=byte"], Weights),
    ("data.max_length", &[], &["data.max_length=5"], Weights),
    ("data.block_size", &[TEXT_RUN], &["data.block_size=7"], Weights),
    ("data.lengths", &[TEXT_RUN], &["data.lengths=[3, 4]"], Weights),
    ("data.val_fraction", &[], &["data.val_fraction=0.4"], Weights),
    ("data.shuffle", &[], &["data.shuffle=true"], Weights),
    ("data.routing", &[SPARSE], &["data.routing=@routing.safetensors"], Weights),
    ("data.augment.copies", &[], AUGMENTED, Weights),
    ("data.augment.templates", AUGMENTED, &["data.augment.templates=0"], Weights),
    ("data.augment.synonyms", AUGMENTED, &["data.augment.synonyms=0"], Weights),
    ("data.augment.drop", AUGMENTED, &["data.augment.drop=0.5"], Weights),
    ("data.augment.table", AUGMENTED, &["data.augment.table=@rules2.json"], Weights),
    ("model.hidden_size", &[], &["model.hidden_size=24"], Weights),
    ("model.num_layers", &[], &["model.num_layers=1"], Weights),
    ("model.num_heads", &["model.heads.routed=0"], &["model.num_heads=2"], Weights),
    ("model.num_kv_heads", &[], &["model.num_kv_heads=4"], Weights),
    ("model.intermediate_size", &[], &["model.intermediate_size=20"], Weights),
    ("model.window", &[], &["model.window=2"], Weights),
    ("model.adaptive_window.kind", &[], &[TOKEN], Weights),
    ("model.adaptive_window.min", &[TOKEN], &["model.adaptive_window.min=4"], Weights),
    ("model.adaptive_window.max", &[TOKEN], &["model.adaptive_window.max=3"], Weights),
    ("model.adaptive_window.block", &[TOKEN], &["model.adaptive_window.block=3"], Weights),
    ("model.tie_word_embeddings", &[], &["model.tie_word_embeddings=true"], Weights),
    ("model.rms_norm_eps", &[], &["model.rms_norm_eps=0.1"], Weights),
    ("model.position.kind", &[], &["model.position.kind=rope"], Weights),
    ("model.position.max", &[], &["model.position.max=5"], Weights),
    ("model.heads.shared", &[], &["model.heads.shared=2", "model.heads.routed=2"], Weights),
    ("model.heads.routed", &[], &["model.heads.routed=0"], Weights),
    ("model.heads.active", &[], &["model.heads.active=1"], Weights),
    ("model.depths.capacity", &[], &["model.depths.capacity=0.5"], Weights),
    ("model.depths.every", &[HALF], &["model.depths.every=1"], Weights),
    ("model.depths.choice", &[HALF], &["model.depths.choice=causal"], Weights),
    ("model.router.kind", &[], &[SPARSE], Weights),
    ("model.router.p", &[SPARSE], &["model.router.p=0.9"], Weights),
    ("model.router.renormalize", &[SPARSE], &["model.router.renormalize=true"], Weights),
    ("model.router.num_experts", &[SPARSE], &["model.router.num_experts=3"], Weights),
    ("model.router.expert_hidden_size", &[SPARSE], &["model.router.expert_hidden_size=5"], Weights),
    ("model.router.shared", &[SPARSE], &["model.router.shared=1"], Weights),
    ("model.router.frozen", &[SPARSE], &["model.router.frozen=true"], Weights),
    ("model.router.init_std", &[SPARSE], &["model.router.init_std=0.5"], Weights),
    ("model.router.bias_rate", &[TOP_K], &["model.router.bias_rate=0.5"], Weights),
    ("model.router.target", &[SPARSE], &["model.router.target=4"], Weights),
    ("model.router.temperature", &[LEARNED], &["model.router.temperature=0.5"], Weights),
    ("model.router.k", &[TOP_K], &["model.router.k=1"], Weights),
    ("train.learning_rate", &[], &["train.learning_rate=0.001"], Weights),
    ("train.lr_scale", &[], &["train.lr_scale=none"], Weights),
    ("train.batch_scaling", &[], &["train.batch_scaling=linear"], Weights),
    ("train.base_batch_size", &["train.batch_scaling=sqrt"], &["train.base_batch_size=4"], Weights),
    ("train.batch_size", &[], &["train.batch_size=3"], Weights),
    ("train.accumulate", &[SPARSE], &["train.accumulate=2"], Weights),
    ("train.activation_checkpointing", &[SPARSE], &["train.activation_checkpointing=true"], Memory),
    ("train.epochs", &[], &["train.epochs=3"], Weights),
    ("train.max_steps", &[TEXT_RUN], &["train.max_steps=3"], Weights),
    ("train.optimizer", &[], &["train.optimizer=sgd"], Weights),
    ("train.schedule", &["train.epochs=3"], &["train.schedule=constant"], Weights),
    ("train.warmup", &["train.warmup_epochs=2"], &["train.warmup=exponential"], Weights),
    ("train.warmup_epochs", &[], &["train.warmup_epochs=2"], Weights),
    ("train.warmup_steps", &[TEXT_RUN], &["train.warmup_steps=2"], Weights),
    ("train.min_lr_ratio", &["train.epochs=3"], &["train.min_lr_ratio=0.9"], Weights),
    ("train.power", &["train.schedule=polynomial", "train.epochs=3"], &["train.power=1"], Weights),
    ("train.decay_share", &["train.schedule=wsd", "train.epochs=4"], &["train.decay_share=1"], Weights),
    ("train.restart_every", &["train.schedule=sgdr", "train.epochs=4"], &["train.restart_every=2"], Weights),
    (
        "train.restart_growth",
        &["train.schedule=sgdr", "train.restart_every=1", "train.epochs=4"],
        &["train.restart_growth=1"],
        Weights,
    ),
    ("train.clip", &[], &["train.clip=0.001"], Weights),
    ("train.clip_percentile", &[], &["train.clip_percentile=50"], Weights),
    ("train.clip_window", &["train.clip_percentile=50"], &["train.clip_window=2"], Weights),
    ("train.weight_decay", &[], &["train.weight_decay=0.5"], Weights),
    ("train.beta1", &[], &["train.beta1=0.5"], Weights),
    ("train.beta2", &[], &["train.beta2=0.5"], Weights),
    ("train.eps", &[], &["train.eps=0.1"], Weights),
    ("train.momentum", &["train.optimizer=sgd"], &["train.momentum=0.1"], Weights),
    ("train.trust", &["train.optimizer=lars"], &["train.trust=0.1"], Weights),
    ("train.ema", &[], &["train.ema=0.9"], Metrics),
    ("train.sam", &[], &["train.sam=0.05"], Weights),
    ("train.noise_scale", &["train.accumulate=2"], &["train.noise_scale=1"], Metrics),
    ("train.patience", HELD_OUT_STILL, &["train.patience=1"], Metrics),
    ("train.min_delta", HELD_OUT_PATIENT, &["train.min_delta=100"], Weights),
    ("train.on_nonfinite", &["train.learning_rate=1e30"], &["train.on_nonfinite=skip"], Ending),
    ("train.on_spike", JUMP, &["train.on_spike=skip"], Weights),
    ("losses.balance", &[SPARSE], &["losses.balance=1"], Weights),
    ("losses.entropy", &[SPARSE], &["losses.entropy=1"], Weights),
    ("losses.budget", &[LEARNED], &["losses.budget=1"], Weights),
    ("losses.z", &[SPARSE], &["losses.z=1"], Weights),
    ("losses.heads", &[], &["losses.heads=1"], Weights),
    ("losses.depths", &[HALF], &["losses.depths=1"], Weights),
    ("losses.label_smoothing", &[], &["losses.label_smoothing=0.1"], Weights),
    ("monitor.exploding", LONGER, &["monitor.exploding=1.01", "monitor.response=rate"], Weights),
    ("monitor.vanishing", LONGER, &["monitor.vanishing=1.01", "monitor.response=rate"], Weights),
    ("monitor.layer_exploding", LONGER, &["monitor.layer_exploding=1.01", "monitor.response=rate"], Weights),
    ("monitor.layer_vanishing", LONGER, &["monitor.layer_vanishing=1.01", "monitor.response=rate"], Weights),
    ("monitor.update_ratio", LONGER, &["monitor.update_ratio=1e-9", "monitor.response=rate"], Weights),
    ("monitor.response", WATCHED, &["monitor.response=batch"], Weights),
    ("monitor.factor", RESPONDING, &["monitor.factor=0.1"], Weights),
    ("monitor.cooldown", RESPONDING, &["monitor.cooldown=1"], Weights),
    ("eval.every", &[], &["eval.every=1"], Samples),
    ("eval.batches", &[TEXT_RUN, "data.val_fraction=0.4"], &["eval.batches=1"], Metrics),
    ("eval.samples", &[], &["eval.samples=['The Sun']"], Samples),
    ("checkpoint.every", &[], &["checkpoint.every=3"], Checkpoints),
    ("checkpoint.keep", &["checkpoint.every=1"], &["checkpoint.keep=1"], Checkpoints),
    ("checkpoint.keep_every", &["checkpoint.every=1", "checkpoint.keep=1"], &["checkpoint.keep_every=1"], Checkpoints),
    ("checkpoint.best", HELD_OUT, &["checkpoint.best=true"], Checkpoints),
    ("phase.facts.train", &[], &["phase.facts.train.learning_rate=0.001"], Weights),
    ("phase.chat.train", &[], &["phase.chat.train.learning_rate=0.001"], Weights),
    ("phase.text.train", &[TEXT_RUN], &["phase.text.train.learning_rate=0.001"], Weights),
];

/// Dotted leaf keys of the schema; of a phase only `phase.X.train`, whose keys are those of `train`.
fn leaves(node: &Value, path: &str, found: &mut BTreeSet<String>) {
    let tables = std::iter::once(node).chain(node["oneOf"].as_array().into_iter().flatten());
    let mut names = 0;
    if path.split('.').count() < 3 || !path.starts_with("phase.") {
        for (name, child) in tables.filter_map(|table| table["properties"].as_object()).flatten() {
            leaves(child, format!("{path}.{name}").trim_start_matches('.'), found);
            names += 1;
        }
    }
    if names == 0 {
        found.insert(path.to_string());
    }
}

fn write_data(folder: &Path) {
    let more = |list: &str| list.replace("Sun", "sky");
    for (name, text) in [
        ("facts.json", FACTS.to_string()),
        ("facts2.json", more(FACTS)),
        ("chat.json", CHAT.to_string()),
        ("chat2.json", more(CHAT)),
        ("paraphrases.json", PARAPHRASES.to_string()),
        ("text.txt", TEXT.repeat(2)),
        ("text2.txt", TEXT.repeat(3)),
        ("rules.json", RULES.to_string()),
        ("rules2.json", RULES.replace("hot", "wet")),
        ("jump.txt", format!("{0}bcdefgh{0}", "a".repeat(150))),
    ] {
        fs::write(folder.join(name), text).unwrap();
    }
}

/// A tiny run; what belongs to the other kind of data is left out.
fn load(folder: &Path, sets: &[&str]) -> Result<Run, train::run::ConfigError> {
    let text = sets.iter().any(|set| set.starts_with("data.text="));
    let common = [
        "model={hidden_size=16, num_layers=2, num_heads=4, num_kv_heads=2, intermediate_size=12}",
        "model.heads={shared=1, routed=3, active=2}",
        "phase={}",
        "train={batch_size=2, learning_rate=0.003}",
        "threads=1",
        "checkpoint.keep=3",
    ];
    let of_text: &[&str] = &["data.block_size=6", "train.max_steps=5", "train.warmup_steps=1"];
    let of_documents: &[&str] =
        &["data.facts=@facts.json", "data.chat=@chat.json", "train.epochs=2", "train.warmup_epochs=1", "eval.every=0"];
    let kind = if text { of_text } else { of_documents };
    let all = common.iter().chain(kind).chain(sets);
    let place = format!("{}/", folder.display());
    let all: Vec<String> = all.map(|set| set.replace('@', &place)).collect();
    Run::from_toml_str("", folder, &all)
}

#[derive(PartialEq)]
struct Outcome {
    weights: Vec<u8>,
    metrics: Vec<String>,
    samples: String,
    ending: String,
    checkpoints: BTreeSet<String>,
    memory: Option<u64>,
    threads: Value,
    name: String,
}

fn train(run: Run, out: &Path) -> Outcome {
    let name = run.name.clone();
    let mut trainer = Trainer::new(run, Some(out), None).unwrap();
    let ending = loop {
        match trainer.next_row() {
            Ok(Some(_)) => {}
            Ok(None) => break "completed".to_string(),
            Err(TrainError::Diverged(reason)) => break reason,
            Err(error) => panic!("{error}"),
        }
    };
    let newest = train::checkpoint::newest_whole(out).unwrap().path;
    let record: Value = serde_json::from_str(&fs::read_to_string(out.join("run.json")).unwrap()).unwrap();
    let folders = fs::read_dir(out.join("checkpoints")).into_iter().flatten();
    let names = folders.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    Outcome {
        weights: newest.map_or(Vec::new(), |newest| fs::read(newest.join("model.safetensors")).unwrap()),
        metrics: fs::read_to_string(out.join("metrics.jsonl")).unwrap().lines().filter_map(canonical).collect(),
        samples: fs::read_to_string(out.join("samples.jsonl")).unwrap(),
        ending,
        checkpoints: names.collect(),
        memory: record["results"]["arena_bytes"].as_u64(),
        threads: record["machine"]["threads"].clone(),
        name,
    }
}

/// The routing of a sparse run with another seed, as a file.
fn record_routing(folder: &Path) {
    let out = folder.join("recorded");
    train(load(folder, &[SPARSE, "seed=5"]).unwrap(), &out);
    let model = train::trained::Trained::load(&out, None).unwrap();
    model.evaluate(Some(&folder.join("routing.safetensors")), None).unwrap();
}

#[test]
fn every_key_of_the_schema_is_turned_and_has_an_effect() {
    let mut keys = BTreeSet::new();
    leaves(&serde_json::from_str(&Run::schema_json()).unwrap(), "", &mut keys);
    keys.remove("extends"); // resolved before there is a run; run/tests.rs
    let listed: BTreeSet<String> = CASES.iter().map(|case| case.0.to_string()).collect();
    assert_eq!(listed, keys, "every key of the schema has its line in CASES, and no other");

    let folder = scratch();
    write_data(folder.path());
    record_routing(folder.path());
    let mut known: BTreeMap<Vec<&str>, Outcome> = BTreeMap::new();
    let mut idle = Vec::new();
    for (number, (key, base, change, seen)) in CASES.iter().enumerate() {
        let changed: Vec<&str> = base.iter().chain(*change).copied().collect();
        let changed = load(folder.path(), &changed);
        if *seen == Refused {
            let message = changed.expect_err(key).to_string();
            assert!(message.contains(key), "{key}: {message}");
            continue;
        }
        let before = known.entry(base.to_vec()).or_insert_with(|| {
            let run = load(folder.path(), base).unwrap_or_else(|error| panic!("{key}: {error}"));
            train(run, &folder.path().join(format!("base-{number}")))
        });
        let changed = changed.unwrap_or_else(|error| panic!("{key}: {error}"));
        let after = train(changed, &folder.path().join(format!("changed-{number}")));
        let differs = match seen {
            Weights => before.weights != after.weights,
            Metrics => before.metrics != after.metrics,
            Samples => before.samples != after.samples,
            Ending => before.ending != after.ending,
            Checkpoints => before.checkpoints != after.checkpoints,
            Memory => before.memory > after.memory,
            Threads => before.threads != after.threads,
            Name => before.name != after.name,
            Refused => true,
        };
        if !differs {
            idle.push(format!("{key}: {change:?} has no effect on {seen:?}"));
        }
        if matches!(seen, Samples | Checkpoints | Memory | Threads | Name) {
            assert!(before.weights == after.weights, "{key} must not reach the weights");
        }
    }
    assert!(idle.is_empty(), "{}", idle.join("\n"));
}

/// Menus of values, good and bad, small and absurd.
const MENUS: &[(&str, &[&str])] = &[
    ("model.hidden_size", &["0", "1", "6", "8", "16", "1048576", "9223372036854775807"]),
    ("model.num_layers", &["0", "1", "2", "10001", "1000000000"]),
    ("model.num_heads", &["1", "2", "4", "3", "0"]),
    ("model.num_kv_heads", &["1", "2", "4", "0"]),
    ("model.intermediate_size", &["1", "5", "0"]),
    ("model.window", &["0", "1", "3", "1000000000000"]),
    (
        "model.adaptive_window",
        &[
            "{kind='token', min=1, max=3, block=1}",
            "{kind='token'}",
            "{kind='token', min=0}",
            "{min=3}",
            "{kind='head'}",
        ],
    ),
    ("model.tie_word_embeddings", &["true", "false", "1"]),
    ("model.rms_norm_eps", &["1e-6", "0", "-1", "nan", "inf", "1e300"]),
    (
        "model.position",
        &[
            "{kind='cope', max=3}",
            "{kind='rope'}",
            "{kind='none'}",
            "{kind='learned', max=30}",
            "{kind='learned', max=1}",
            "{kind='rope', max=9}",
        ],
    ),
    (
        "model.heads",
        &[
            "{routed=0}",
            "{shared=0, routed=4, active=1}",
            "{shared=1, routed=3, active=3}",
            "{shared=2, routed=2, active=0}",
        ],
    ),
    (
        "model.depths",
        &[
            "{capacity=0.5, every=1}",
            "{capacity=0.01}",
            "{capacity=0}",
            "{every=1}",
            "{capacity=0.5, every=9}",
            "{capacity=0.2, choice='causal'}",
            "{choice='causal'}",
        ],
    ),
    (
        "model.router",
        &[
            "{kind='dense'}",
            "{kind='top_p', p=0.3, num_experts=3, expert_hidden_size=2}",
            "{kind='top_p', p=[0.4, 1.0], num_experts=1}",
            "{kind='top_k', k=2, num_experts=2, expert_hidden_size=1}",
            "{kind='top_k', k=5, num_experts=2}",
            "{kind='expert_choice', k=0.5, num_experts=4, expert_hidden_size=3}",
            "{kind='expert_choice', k=nan}",
            "{kind='learned_p', num_experts=3, expert_hidden_size=2}",
            "{kind='learned_p', temperature=1e-30}",
            "{kind='top_p', target=1.5, bias_rate=0.1, num_experts=3, expert_hidden_size=2}",
            "{kind='top_k', bias_rate=1.0, num_experts=3, expert_hidden_size=2}",
            "{kind='forced', k=2, num_experts=3, expert_hidden_size=2}",
            "{kind='forced', k=4, num_experts=3}",
            "{kind='expert_choice', k=1, shared=2, num_experts=3, expert_hidden_size=2}",
            "{kind='learned_p', shared=1, num_experts=1, expert_hidden_size=3}",
            "{kind='top_k', shared=1000000000000}",
            "{kind='top_p', target=0.0}",
            "{kind='top_p', num_experts=1000000000000}",
            "{kind='top_p', init_std=0.0}",
            "{kind='top_p', init_std=1e30}",
        ],
    ),
    ("train.learning_rate", &["0", "1e-3", "1e30", "-1", "nan"]),
    ("train.lr_scale", &["none", "grad_norm"]),
    ("train.batch_scaling", &["none", "linear", "sqrt", "cubic"]),
    ("train.base_batch_size", &["0", "1", "1000000000"]),
    ("train.batch_size", &["0", "1", "2", "7", "1000000000"]),
    ("train.accumulate", &["1", "2", "8"]),
    ("train.activation_checkpointing", &["true", "false", "1"]),
    ("train.epochs", &["1", "2", "1000000000", "0"]),
    ("train.optimizer", &["adam", "adamw", "sgd", "lars", "lion", "muon", "adagrad"]),
    ("train.schedule", &["cosine", "constant", "linear", "polynomial", "wsd", "sgdr", "one_cycle"]),
    ("train.warmup", &["linear", "exponential"]),
    ("train.power", &["0.1", "2", "1e300", "0"]),
    ("train.decay_share", &["1e-300", "1", "0"]),
    ("train.restart_every", &["1", "3", "0"]),
    ("train.restart_growth", &["1", "1000000000", "0"]),
    ("train.warmup_epochs", &["0", "1", "1000000000"]),
    ("train.min_lr_ratio", &["0", "1", "2"]),
    ("train.clip", &["1e-30", "1", "1e300", "0"]),
    ("train.clip_percentile", &["0", "50", "95", "100", "nan"]),
    ("train.clip_window", &["0", "2", "200", "1000000"]),
    ("train.sam", &["0", "0.05", "1e30", "-1"]),
    ("train.noise_scale", &["0", "1", "3"]),
    ("train.weight_decay", &["0", "0.1", "1e30"]),
    ("train.beta1", &["0", "0.9", "1"]),
    ("train.beta2", &["0", "0.999", "0.9999999999999999"]),
    ("train.eps", &["1e-300", "1e-8", "1e300"]),
    ("train.momentum", &["0", "0.9", "1"]),
    ("train.trust", &["1e-3", "1e300"]),
    ("train.ema", &["0", "0.9", "1", "-0.1"]),
    ("train.patience", &["0", "1", "1000000000"]),
    ("train.min_delta", &["0", "1e300", "-1"]),
    ("train.on_nonfinite", &["stop", "skip", "roll_back", "hope"]),
    ("train.on_spike", &["off", "warn", "stop", "skip", "roll_back"]),
    ("losses.balance", &["0", "1", "1e300", "-1"]),
    ("losses.entropy", &["0", "1"]),
    ("losses.budget", &["0", "1"]),
    ("losses.z", &["0", "1e10"]),
    ("losses.heads", &["0", "1"]),
    ("losses.depths", &["0", "1", "-1"]),
    ("losses.label_smoothing", &["0", "0.1", "0.999", "1"]),
    (
        "monitor",
        &[
            "{exploding=1.01, response='batch'}",
            "{layer_vanishing=2, response='clip', factor=0.9}",
            "{update_ratio=1e-9, response='rate', cooldown=1}",
            "{vanishing=1.5, response='batch', factor=1e-300}",
            "{response='rate'}",
            "{exploding=0.5}",
        ],
    ),
    ("eval.every", &["0", "1", "1000000000"]),
    ("eval.samples", &["['']", "['Sun']", "['no such words at all']"]),
    ("checkpoint.every", &["0", "1", "1000000000"]),
    ("checkpoint.keep", &["0", "1", "1000000000"]),
    ("checkpoint.keep_every", &["0", "1", "1000000000"]),
    ("checkpoint.best", &["true"]),
    ("data.max_length", &["0", "1", "2", "3", "1000000000", "9223372036854775807"]),
    ("data.val_fraction", &["0", "0.5", "0.999999", "1"]),
    ("data.shuffle", &["true"]),
    ("data.routing", &["@text.txt", "@none"]),
    ("data.augment.copies", &["0", "1", "101"]),
    ("data.augment.table", &["@rules.json", "@text.txt", "@none.json"]),
    ("data.augment.drop", &["0", "1", "2"]),
    ("data.text", &["@text.txt", "@none.txt"]),
    ("data.block_size", &["1", "5", "1000000", "1000000000"]),
    ("data.lengths", &["[]", "[1]", "[1, 3]", "[0]", "[1000000000]", "[2, 2]"]),
    ("data.tokenizer", &["byte", "char", "word", "@text.txt"]),
    ("engine", &["cpu", "reference", "torch"]),
    ("dtype", &["f32", "bf16", "f64"]),
    ("seed", &["0", "9223372036854775807", "-1"]),
    ("threads", &["0", "1", "3", "1025"]),
    ("phase.chat.train.learning_rate", &["0", "nan"]),
    ("phase.facts.train.batch_size", &["1", "0"]),
    ("quick", &["true"]),
];

/// Draws configurations from the menus; each must be refused in words or train three rows. Returns how many trained.
fn random_configurations(count: u64) -> u64 {
    let folder = scratch();
    write_data(folder.path());
    let mut trained = 0;
    for case in 0..count {
        let mut state = case.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ 0x5851_f42d_4c95_7f2d;
        let mut draw = |below: usize| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 33) as usize % below
        };
        draw(2);
        let sets: Vec<String> = (0..1 + draw(6))
            .map(|_| {
                let (key, values) = MENUS[draw(MENUS.len())];
                format!("{key}={}", values[draw(values.len())])
            })
            .collect();
        let sets: Vec<&str> = sets.iter().map(String::as_str).collect();
        let out = folder.path().join("run");
        let one = || -> Result<(), TrainError> {
            let run = load(folder.path(), &sets).map_err(|error| TrainError::Usage(error.to_string()))?;
            let mut trainer = Trainer::new(run, Some(&out), None)?;
            for _ in 0..5 {
                trainer.next_row()?;
            }
            Ok(())
        };
        match std::panic::catch_unwind(std::panic::AssertUnwindSafe(one)) {
            Ok(Ok(())) => trained += 1,
            Ok(Err(error @ TrainError::Usage(_))) => {
                assert!(!error.to_string().is_empty(), "{sets:?}");
                assert!(!out.exists(), "{sets:?}: refused, yet a directory was made: {error}");
            }
            Ok(Err(TrainError::Diverged(_))) => trained += 1, // absurd rates are allowed and end in words
            Ok(Err(error)) => panic!("{sets:?}: {error}"),
            Err(_) => panic!("{sets:?}: a panic"),
        }
        let _ = fs::remove_dir_all(&out);
    }
    trained
}

#[test]
fn random_configurations_are_refused_or_train() {
    let trained = random_configurations(300);
    assert!((30..270).contains(&trained), "{trained} of 300 trained: the menus lean to one side");
}

#[test]
#[ignore = "full"]
fn ten_thousand_random_configurations_are_refused_or_train() {
    let trained = random_configurations(10_000);
    println!("10,000 configurations: {trained} trained, the others were refused");
    assert!(trained > 1000);
}

/// A folder in memory where the machine has that, for every run waits for its disk.
fn scratch() -> tempfile::TempDir {
    let memory = PathBuf::from("/dev/shm");
    let found = if memory.is_dir() { tempfile::tempdir_in(memory) } else { tempfile::tempdir() };
    found.unwrap()
}
