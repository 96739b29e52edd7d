//! The loop on small real data: resume to the byte for every optimizer and router, accumulation, validation, divergence.

use std::fs;
use std::path::Path;
use train::metrics::canonical;
use train::run::Run;
use train::trained::Trained;
use train::{TrainError, Trainer};

const FACTS: &str = r#"["The Sun is a star . </s>", "The Moon is a rock . </s>", "Ice is cold water . </s>", "A star is hot . </s>", "Water is wet . </s>"]"#;
const CHAT: &str = r#"["User: What is the Sun? Assistant: The Sun is a star. </s>", "User: What is ice? Assistant: Ice is cold water. </s>", "User: Is water wet? Assistant: Water is wet. </s>"]"#;

/// A folder in memory where the system has one: these runs save often.
fn memory() -> tempfile::TempDir {
    tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap()
}

/// A tiny run on the two files above.
fn run(folder: &Path, sets: &[&str]) -> Run {
    let (facts, chat) = (folder.join("facts.json"), folder.join("chat.json"));
    fs::write(&facts, FACTS).unwrap();
    fs::write(&chat, CHAT).unwrap();
    let mut all: Vec<String> = vec![
        format!("data.facts={}", facts.display()),
        format!("data.chat={}", chat.display()),
        "model.hidden_size=16".into(),
        "model.num_layers=2".into(),
        "model.num_heads=4".into(),
        "model.num_kv_heads=2".into(),
        "model.intermediate_size=12".into(),
        "model.heads={shared=1, routed=3, active=2}".into(),
        "phase.facts.train.batch_size=2".into(),
        "phase.chat.train.batch_size=2".into(),
        "train.epochs=4".into(),
        "train.warmup_epochs=1".into(),
        "train.learning_rate=0.003".into(),
        "checkpoint.every=3".into(),
    ];
    all.extend(sets.iter().map(|set| set.to_string()));
    Run::load("baseline", &all).unwrap()
}

fn finish(mut trainer: Trainer) {
    while trainer.next_row().unwrap().is_some() {}
}

/// Bytes of the last checkpoint and the metrics without times and events.
fn outcome(out: &Path) -> (Vec<(String, Vec<u8>)>, Vec<String>) {
    let newest = train::checkpoint::newest_whole(out).unwrap().path.unwrap();
    let mut files: Vec<(String, Vec<u8>)> = fs::read_dir(&newest)
        .unwrap()
        .map(|entry| entry.unwrap())
        .map(|entry| (entry.file_name().to_string_lossy().into_owned(), fs::read(entry.path()).unwrap()))
        .collect();
    files.sort();
    let metrics = fs::read_to_string(out.join("metrics.jsonl")).unwrap();
    (files, metrics.lines().filter_map(canonical).collect())
}

#[test]
fn bf16_products_move_the_run_a_little_and_are_evaluated_as_trained() {
    let folder = memory();
    let sparse = "model.router={kind='top_p', p=0.4, num_experts=4, expert_hidden_size=6}";
    let [(wide, _), (narrow, judged)] = ["f32", "bf16"].map(|dtype| {
        let out = folder.path().join(dtype);
        let mut trainer =
            Trainer::new(run(folder.path(), &[sparse, &format!("dtype={dtype}")]), Some(&out), None).unwrap();
        while trainer.next_row().unwrap().is_some() {}
        let judged = train::trained::Trained::load(&out, None).unwrap().evaluate(None, None).unwrap();
        assert!(fs::read_to_string(out.join("run.toml")).unwrap().contains(&format!("dtype = \"{dtype}\"")));
        let newest = train::checkpoint::newest_whole(&out).unwrap().path.unwrap();
        let header = fs::read(newest.join("model.safetensors")).unwrap();
        let header = String::from_utf8_lossy(&header[8..200]).into_owned();
        assert!(header.contains("\"F32\"") && !header.contains("BF16"), "{header}");
        (trainer.results()["loss"].as_f64().unwrap(), judged["chat_loss"].as_f64().unwrap())
    });
    assert!(wide != narrow && (wide / narrow - 1.0).abs() < 0.1, "{wide} {narrow}");
    // The same weights without the run's own file compute in f32.
    let newest = train::checkpoint::newest_whole(&folder.path().join("bf16")).unwrap().path.unwrap();
    let [as_run, plain] = [(folder.path().join("bf16"), None), (newest, None)]
        .map(|(path, name)| train::trained::Trained::load(&path, name).unwrap().logits("the Sun is").unwrap());
    assert!(as_run != plain && judged.is_finite());
}

#[test]
fn a_killed_run_ends_with_the_bytes_of_one_that_never_stopped() {
    let variants: [&[&str]; 16] = [
        &[],
        &["train.optimizer=adamw", "train.weight_decay=0.1", "data.shuffle=true"],
        &["train.optimizer=sgd", "train.learning_rate=0.1"],
        &[
            "train.optimizer=lars",
            "train.learning_rate=1.0",
            "phase.chat.train.optimizer=adam",
            "phase.chat.train.learning_rate=0.001",
        ],
        &[
            "model.router={kind='top_p', p=0.4, num_experts=4, expert_hidden_size=6}",
            "train.accumulate=2",
            "dtype=bf16",
        ],
        &["model.router={kind='top_k', k=2, num_experts=4, expert_hidden_size=6}", "data.val_fraction=0.34"],
        &["model.router={kind='expert_choice', k=1.5, num_experts=4, expert_hidden_size=6}"],
        &[
            "model.router={kind='top_p', bias_rate=0.05, target=2.5, num_experts=4, expert_hidden_size=6, shared=2}",
            "train.optimizer=muon",
            "train.schedule=sgdr",
            "train.restart_every=2",
        ],
        &["model.router={kind='learned_p', num_experts=4, expert_hidden_size=6}", "train.optimizer=lion"],
        &["train.schedule=wsd", "train.warmup=exponential", "phase.chat.train.schedule=one_cycle"],
        &["train.ema=0.9", "train.schedule=constant", "train.on_spike=skip", "train.on_nonfinite=roll_back"],
        &["data.val_fraction=0.34", "eval.every=1", "train.patience=2", "train.learning_rate=0.05", "train.epochs=12"],
        &[
            "train.clip_percentile=50",
            "train.clip_window=4",
            "monitor.exploding=1.02",
            "monitor.layer_vanishing=1.02",
            "monitor.response=batch",
            "monitor.cooldown=2",
        ],
        &[
            "model.router={kind='top_p', p=0.4, num_experts=4, expert_hidden_size=6}",
            "train.accumulate=2",
            "train.noise_scale=2",
            "train.sam=0.05",
            "losses.label_smoothing=0.1",
            "monitor.update_ratio=1e-9",
            "monitor.response=rate",
            "monitor.cooldown=3",
        ],
        &[
            "model.router={kind='top_p', p=0.4, num_experts=4, expert_hidden_size=6, shared=1}",
            "model.depths={capacity=0.5, every=2}",
            "model.adaptive_window={kind='token', min=2, max=8, block=2}",
            "train.activation_checkpointing=true",
            "train.ema=0.9",
        ],
        &[
            "model.router={kind='top_p', bias_rate=0.05, num_experts=4, expert_hidden_size=6}",
            "model.depths={capacity=0.2, choice='causal'}",
            "losses.depths=1",
            "train.accumulate=2",
        ],
    ];
    for sets in variants {
        let folder = memory();
        let straight = folder.path().join("straight");
        finish(Trainer::new(run(folder.path(), sets), Some(&straight), None).unwrap());
        for kill_after in [1, 8, 17, 29] {
            let out = folder.path().join(format!("killed-{kill_after}"));
            let mut trainer = Trainer::new(run(folder.path(), sets), Some(&out), None).unwrap();
            for _ in 0..kill_after {
                trainer.next_row().unwrap();
            }
            drop(trainer); // nothing is saved on the way out, as after kill -9
            finish(Trainer::resume(&out).unwrap());
            assert_eq!(outcome(&out), outcome(&straight), "{sets:?} killed after {kill_after} rows");
        }
        let other = folder.path().join("other");
        let reseeded: Vec<&str> = sets.iter().copied().chain(["seed=9"]).collect();
        finish(Trainer::new(run(folder.path(), &reseeded), Some(&other), None).unwrap());
        assert_ne!(outcome(&other).0, outcome(&straight).0, "another seed must give another model");
    }
}

#[test]
fn a_run_killed_after_any_row_ends_with_the_bytes_of_one_that_never_stopped() {
    let documents: &[&str] = &[
        "train.accumulate=2",
        "train.ema=0.9",
        "data.shuffle=true",
        "data.val_fraction=0.34",
        "eval.every=1",
        "train.epochs=3",
        "threads=1",
    ];
    let folder = memory();
    let text = folder.path().join("text.txt");
    fs::write(&text, "The Sun is a star. The Moon is a rock. ".repeat(30)).unwrap();
    let text = format!("data.text={}", text.display());
    let text: Vec<String> = [
        &*text,
        "data.block_size=12",
        "data.lengths=[4, 8, 24]",
        "data.val_fraction=0.2",
        "model.hidden_size=16",
        "model.num_layers=1",
        "model.num_heads=4",
        "model.num_kv_heads=2",
        "model.intermediate_size=12",
        "model.heads={shared=1, routed=3, active=2}",
        "train.batch_size=2",
        "train.max_steps=20",
        "train.warmup_steps=3",
        "train.optimizer=adamw",
        "eval.every=5",
        "checkpoint.every=4",
        "threads=1",
    ]
    .map(String::from)
    .to_vec();
    let runs = [("documents", run(folder.path(), documents)), ("text", Run::load("baseline", &text).unwrap())];
    for (name, run) in runs {
        let straight = folder.path().join(name);
        let mut trainer = Trainer::new(run.clone(), Some(&straight), None).unwrap();
        let mut rows = 0;
        while trainer.next_row().unwrap().is_some() {
            rows += 1;
        }
        drop(trainer);
        assert!(rows > 15, "{name}: {rows}");
        for kill_after in 0..rows {
            let out = folder.path().join(format!("{name}-{kill_after}"));
            let mut trainer = Trainer::new(run.clone(), Some(&out), None).unwrap();
            for _ in 0..kill_after {
                trainer.next_row().unwrap();
            }
            drop(trainer);
            finish(Trainer::resume(&out).unwrap());
            assert!(outcome(&out) == outcome(&straight), "{name} killed after {kill_after} rows");
            fs::remove_dir_all(&out).unwrap();
        }
    }
}

/// Swaps two experts of the checkpoint in `folder` and makes its manifest fit.
fn forge_swapped_experts(folder: &Path) {
    let file = folder.join("model.safetensors");
    let mut bytes = fs::read(&file).unwrap();
    swap_experts(&mut bytes);
    fs::write(&file, &bytes).unwrap();
    let manifest = folder.join("MANIFEST.json");
    let mut found: serde_json::Value = serde_json::from_slice(&fs::read(&manifest).unwrap()).unwrap();
    found["files"]["model.safetensors"]["sha256"] = train::data::sha256(&bytes).into();
    found.as_object_mut().unwrap().remove("sha256");
    found["sha256"] = train::data::sha256(format!("{found:#}\n").as_bytes()).into();
    fs::write(&manifest, format!("{found:#}\n")).unwrap();
}

/// Exchanges the first two of the four experts' output projections in a model file.
fn swap_experts(bytes: &mut [u8]) {
    let names = safetensors::SafeTensors::deserialize(bytes).unwrap();
    let experts = names.tensor("model.layers.0.mlp.experts.down_proj").unwrap();
    let (start, one) = (experts.data().as_ptr() as usize - bytes.as_ptr() as usize, experts.data().len() / 4);
    bytes[start..start + 2 * one].rotate_left(one);
}

/// The comparison itself is tested: a checkpoint that a forger swapped experts in is loaded, and the end tells.
#[test]
fn swapped_experts_that_no_hash_tells_of_fail_the_comparison() {
    let folder = memory();
    let sets = ["model.router={kind='top_p', p=0.4, num_experts=4, expert_hidden_size=6}"];
    let straight = folder.path().join("straight");
    finish(Trainer::new(run(folder.path(), &sets), Some(&straight), None).unwrap());
    for forged in [false, true] {
        let out = folder.path().join(format!("forged-{forged}"));
        let mut trainer = Trainer::new(run(folder.path(), &sets), Some(&out), None).unwrap();
        while trainer.step_count() < 8 {
            trainer.next_row().unwrap();
        }
        trainer.stop("here").unwrap();
        drop(trainer);
        if forged {
            forge_swapped_experts(&train::checkpoint::newest_whole(&out).unwrap().path.unwrap());
        }
        let mut trainer = Trainer::resume(&out).unwrap();
        assert_eq!((trainer.step_count(), trainer.notes().len()), (8, 0));
        while trainer.next_row().unwrap().is_some() {}
        assert_eq!(outcome(&out) != outcome(&straight), forged);
    }
}

#[test]
fn a_moved_run_goes_on_with_another_number_of_threads_and_swapped_experts_are_refused() {
    let folder = memory();
    let sets =
        ["model.router={kind='top_p', p=0.4, num_experts=4, expert_hidden_size=6}", "threads=1", "train.ema=0.9"];
    let straight = folder.path().join("straight");
    finish(Trainer::new(run(folder.path(), &sets), Some(&straight), None).unwrap());
    let (out, moved) = (folder.path().join("here"), folder.path().join("there"));
    let mut trainer = Trainer::new(run(folder.path(), &sets), Some(&out), None).unwrap();
    while trainer.step_count() < 8 {
        trainer.next_row().unwrap();
    }
    trainer.stop("to move").unwrap();
    drop(trainer);
    fs::rename(&out, &moved).unwrap();
    let text = fs::read_to_string(moved.join("run.toml")).unwrap().replace("threads = 1", "threads = 3");
    fs::write(moved.join("run.toml"), text).unwrap();
    // Swapped experts under a manifest that does not fit: that checkpoint is not used.
    let newest = train::checkpoint::newest_whole(&moved).unwrap().path.unwrap();
    let file = newest.join("model.safetensors");
    let mut swapped = fs::read(&file).unwrap();
    swap_experts(&mut swapped);
    fs::write(&file, &swapped).unwrap();
    let mut trainer = Trainer::resume(&moved).unwrap();
    assert!(trainer.step_count() < 8 && trainer.notes()[0].contains("sha256"), "{:?}", trainer.notes());
    assert!(trainer.notes().iter().any(|note| note == "threads is now 3, was 1"));
    while trainer.next_row().unwrap().is_some() {}
    assert_eq!(outcome(&moved), outcome(&straight));
}

/// The model after one facts epoch of one batch.
fn weights(sets: &[&str]) -> Vec<u8> {
    let folder = memory();
    let out = folder.path().join("run");
    finish(Trainer::new(run(folder.path(), sets), Some(&out), None).unwrap());
    let newest = train::checkpoint::newest_whole(&out).unwrap().path.unwrap();
    fs::read(newest.join("model.safetensors")).unwrap()
}

#[test]
fn accumulated_gradients_equal_the_large_batchs() {
    // Under plain SGD a step is the gradient: equal weights mean equal gradients. No routed heads, so that no loss depends on the split.
    let plain = [
        "train.optimizer=sgd",
        "train.momentum=0.0",
        "train.lr_scale=none",
        "train.learning_rate=0.05",
        "model.heads={routed=0}",
    ];
    let floats = |bytes: Vec<u8>| -> Vec<f32> {
        let header = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        bytes[8 + header..].chunks(4).map(|c| f32::from_le_bytes(c.try_into().unwrap())).collect()
    };
    let with = |accumulate: &str| {
        let batch = ["phase.facts.train.batch_size=5", "phase.chat.train.batch_size=3", accumulate];
        floats(weights(&plain.into_iter().chain(batch).collect::<Vec<_>>()))
    };
    let (whole, parts) = (with("train.accumulate=1"), with("train.accumulate=3"));
    let worst = whole.iter().zip(&parts).fold(0.0f32, |m, (a, b)| m.max((a - b).abs()));
    assert!(worst < 3e-5, "{worst}"); // rounding, grown over eight steps; a wrong share is off by hundredths
    let moved = floats(weights(&["train.learning_rate=0.0"]));
    assert_ne!(whole, moved);
}

#[test]
fn evaluating_often_leaves_the_weights_as_they_are() {
    assert_eq!(weights(&["eval.every=1"]), weights(&["eval.every=0"]));
}

#[test]
fn divergence_stops_the_run_with_a_record_of_why() {
    let folder = memory();
    let out = folder.path().join("run");
    let sets = ["train.optimizer=sgd", "train.learning_rate=1e6", "train.lr_scale=none"];
    let mut trainer = Trainer::new(run(folder.path(), &sets), Some(&out), None).unwrap();
    let error = loop {
        match trainer.next_row() {
            Ok(row) => assert!(row.is_some(), "the run must not complete"),
            Err(error) => break error,
        }
    };
    assert!(matches!(error, TrainError::Diverged(_)) && error.exit_status() == 3, "{error}");
    let failure = fs::read_to_string(out.join("failure.json")).unwrap();
    assert!(failure.contains("reason") && failure.contains("step"));
    assert!(fs::read_to_string(out.join("run.json")).unwrap().contains("\"diverged\""));
    while let Some(row) = trainer.next_row().unwrap() {
        assert_eq!(row.fields()["kind"], "event"); // what the run still had to say
    }
}

#[test]
fn what_is_refused_leaves_no_trace() {
    let folder = memory();
    let out = folder.path().join("run");
    let good = run(folder.path(), &[]);
    fs::write(folder.path().join("chat.json"), "[\"no dialogue\"]").unwrap();
    let error = Trainer::new(good, Some(&out), None).err().unwrap();
    assert_eq!(error.exit_status(), 2);
    assert!(error.to_string().contains("chat.json: item 1"), "{error}");
    assert!(!out.exists());
    let positions = run(folder.path(), &["model.position={kind='learned', max=3}"]);
    assert!(Trainer::new(positions, Some(&out), None).err().unwrap().to_string().contains("model.position.max = 3"));
    fs::create_dir(&out).unwrap();
    fs::write(out.join("notes.txt"), "mine").unwrap();
    assert!(Trainer::new(run(folder.path(), &[]), Some(&out), None).err().unwrap().to_string().contains("not empty"));
    assert_eq!(fs::read_dir(&out).unwrap().count(), 1);
}

#[test]
fn a_changed_configuration_is_refused_on_resume_with_the_difference_or_noted() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("run");
    let mut trainer = Trainer::new(run(folder.path(), &[]), Some(&out), None).unwrap();
    for _ in 0..9 {
        trainer.next_row().unwrap();
    }
    drop(trainer);
    let text = fs::read_to_string(out.join("run.toml")).unwrap();
    let edit = |from: &str, to: &str| {
        assert!(text.contains(from), "{from}: {text}");
        fs::write(out.join("run.toml"), text.replacen(from, to, 1)).unwrap();
    };
    for (from, to, key) in [
        ("learning_rate = 0.003", "learning_rate = 0.004", "train.learning_rate: 0.003 when it started, 0.004 now"),
        ("hidden_size = 16", "hidden_size = 24", "model.hidden_size"),
        ("epochs = 4", "epochs = 5", "train.epochs"),
        ("seed = ", "seed = 1", "seed"),
    ] {
        edit(from, to);
        let error = Trainer::resume(&out).err().unwrap();
        assert!(error.exit_status() == 2 && error.to_string().contains(key), "{error}");
    }
    edit("threads = 0", "threads = 2");
    let trainer = Trainer::resume(&out).unwrap();
    assert!(trainer.notes().iter().any(|note| note == "threads is now 2, was 0"), "{:?}", trainer.notes());
    finish(trainer);
    let straight = folder.path().join("straight");
    finish(Trainer::new(run(folder.path(), &[]), Some(&straight), None).unwrap());
    assert_eq!(outcome(&out).0, outcome(&straight).0, "what may change changes no byte");
}

#[test]
fn a_run_is_reproduced_to_the_byte_or_the_difference_is_named() {
    use train::reproduce::Original;
    let folder = tempfile::tempdir().unwrap();
    let (first, again) = (folder.path().join("first"), folder.path().join("again"));
    let mut trainer = Trainer::new(run(folder.path(), &[]), Some(&first), None).unwrap();
    trainer.next_row().unwrap();
    assert!(Original::read(&first).err().unwrap().to_string().contains("is not completed"));
    finish(trainer);
    let original = Original::read(&first).unwrap();
    assert_eq!(original.run, run(folder.path(), &[]));
    finish(Trainer::new(original.run.clone(), Some(&again), None).unwrap());
    let report = original.compare(&again).unwrap();
    assert!(report.identical && report.inputs.is_empty() && report.metric_lines > 5, "{report}");
    assert!(report.to_string().contains("reproduced to the byte"));
    // Negative control: one other seed, one other byte.
    let other = folder.path().join("other");
    finish(Trainer::new(run(folder.path(), &["seed=9"]), Some(&other), None).unwrap());
    let report = original.compare(&other).unwrap();
    let names: Vec<&str> = report.inputs.iter().map(|input| input.name.as_str()).collect();
    assert!(!report.identical && names == ["seed"] && report.first_other_line == Some(1), "{report}");
    assert!(report.to_string().contains("the inputs above differ"));
    let metrics = fs::read_to_string(again.join("metrics.jsonl")).unwrap();
    fs::write(again.join("metrics.jsonl"), metrics.replacen("\"train/l0\":", "\"train/l0\":9", 1)).unwrap();
    let report = original.compare(&again).unwrap();
    assert!(!report.identical && report.first_other_line.is_some() && report.inputs.is_empty());
    assert!(report.to_string().contains("although every recorded input is the same"));
    // The record holds what the run was made of.
    let record = train::record::Record::read(&first).unwrap();
    assert!(record.floors["facts"].as_f64().is_some() && record.data["chat"]["sha256"].is_string());
    assert_eq!(record.config["model"]["hidden_size"], 16);
    // Data that are no longer what they were are named before anything is trained.
    fs::write(folder.path().join("facts.json"), FACTS.replace("Sun", "sky")).unwrap();
    assert!(Original::read(&first).err().unwrap().to_string().contains("facts.json (facts) has changed"));
}

#[test]
fn a_run_killed_after_its_last_checkpoint_is_completed_on_resume() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("run");
    finish(Trainer::new(run(folder.path(), &[]), Some(&out), None).unwrap());
    let record = fs::read_to_string(out.join("run.json")).unwrap();
    fs::write(out.join("run.json"), record.replace("\"completed\"", "\"running\"")).unwrap();
    finish(Trainer::resume(&out).unwrap());
    assert!(fs::read_to_string(out.join("run.json")).unwrap().contains("\"completed\""));
}

#[test]
fn routing_is_recorded_replayed_and_trained_with() {
    let folder = memory();
    let sparse = "model.router={kind='top_p', p=0.4, num_experts=4, expert_hidden_size=6}";
    let trained = |name: &str, sets: &[&str]| {
        let out = folder.path().join(name);
        finish(Trainer::new(run(folder.path(), &[&[sparse], sets].concat()), Some(&out), None).unwrap());
        out
    };
    let file = folder.path().join("routing.safetensors");
    let load = |out: &Path| Trained::load(out, None).unwrap();
    let first = load(&trained("first", &[]));
    let live = first.evaluate(Some(&file), None).unwrap();
    let bytes = fs::read(&file).unwrap();
    assert_eq!(live["recorded_sha256"], train::data::sha256(&bytes));
    first.evaluate(Some(&file), None).unwrap();
    assert!(fs::read(&file).unwrap() == bytes, "the same routing is the same file");
    let again = first.evaluate(None, Some(&file)).unwrap();
    let other = load(&trained("other", &["seed=5"]));
    let (own, given) = (other.evaluate(None, None).unwrap(), other.evaluate(None, Some(&file)).unwrap());
    for loss in ["facts_loss", "chat_loss"] {
        assert_eq!(live[loss], again[loss], "its own routing again changes nothing");
        assert_ne!(own[loss], given[loss]);
    }
    // Trained with it, whatever the seed, tokens go where they went; and a run that was stopped ends with the same bytes.
    let routed = format!("data.routing={}", file.display());
    let straight = trained("straight", &["seed=5", &routed]);
    let copy = folder.path().join("again.safetensors");
    load(&straight).evaluate(Some(&copy), None).unwrap();
    assert!(fs::read(&copy).unwrap() == bytes);
    assert_ne!(outcome(&straight).0, outcome(&folder.path().join("other")).0);
    let out = folder.path().join("stopped");
    let mut trainer = Trainer::new(run(folder.path(), &[sparse, "seed=5", &routed]), Some(&out), None).unwrap();
    while trainer.step_count() < 7 {
        trainer.next_row().unwrap();
    }
    drop(trainer);
    finish(Trainer::resume(&out).unwrap());
    assert!(outcome(&out) == outcome(&straight));
    // What was not recorded, or by another model, is refused.
    let refused = |sets: &[&str]| match Trainer::new(run(folder.path(), sets), Some(&folder.path().join("no")), None) {
        Err(error) => error.to_string(),
        Ok(_) => panic!("{sets:?}"),
    };
    let message = refused(&[&sparse.replace("=4", "=3"), &routed]);
    assert!(message.contains("2 sparse layers of 4 experts, not of 2 of 3"), "{message}");
    let message = refused(&[sparse, &routed, "data.max_length=6"]);
    assert!(message.contains("documents are not in it; record a run on the same data"), "{message}");
    assert!(!folder.path().join("no").exists());
}

#[test]
fn documents_and_their_losses_come_back_with_all_experts_or_some() {
    let folder = memory();
    let out = folder.path().join("run");
    let sparse = "model.router={kind='top_k', k=1, num_experts=4, expert_hidden_size=6}";
    finish(Trainer::new(run(folder.path(), &[sparse, "model.router.renormalize=false"]), Some(&out), None).unwrap());
    let model = Trained::load(&out, None).unwrap();
    let documents = model.documents().unwrap();
    assert_eq!(documents.iter().filter(|(phase, part, _)| (*phase, *part) == ("facts", "train")).count(), 5);
    assert_eq!(documents.len(), 8);
    let facts: Vec<String> =
        documents.iter().filter(|(phase, ..)| *phase == "facts").map(|(.., text)| text.clone()).collect();
    let mean = |keep: Option<&[Vec<usize>]>| {
        let losses = model.token_losses(&facts, keep).unwrap();
        losses.iter().map(|losses| losses.iter().sum::<f64>() / losses.len() as f64).sum::<f64>() / losses.len() as f64
    };
    let expected = model.evaluate(None, None).unwrap()["facts_loss"].as_f64().unwrap();
    assert!((mean(None) - expected).abs() < 1e-9, "{} {expected}", mean(None));
    assert_eq!(mean(Some(&[vec![0, 1, 2, 3], vec![3, 2, 1, 0]])), mean(None));
    assert_ne!(mean(Some(&[vec![0], vec![1]])), mean(None));
    for (keep, part) in [
        (vec![vec![0]], "each of the 2 sparse layers"),
        (vec![vec![0], vec![4]], "4 is no expert"),
        (vec![vec![0], vec![]], "needs an expert in each layer"),
    ] {
        let message = model.token_losses(&facts, Some(&keep)).unwrap_err().to_string();
        assert!(message.contains(part), "{message}");
    }
}
