//! The configuration as its users meet it.

use super::*;
use proptest::prelude::*;
use serde_json::{Value as Json, json};
use std::collections::BTreeSet;

fn sets(list: &[&str]) -> Vec<String> {
    list.iter().map(|set| set.to_string()).collect()
}

fn parse(text: &str, list: &[&str]) -> Result<Run, ConfigError> {
    Run::from_toml_str(text, Path::new("/base"), &sets(list))
}

fn good(text: &str, list: &[&str]) -> Run {
    parse(text, list).unwrap_or_else(|error| panic!("{text:?} {list:?}: {error}"))
}

fn error(text: &str, list: &[&str]) -> String {
    parse(text, list).expect_err(text).to_string()
}

fn row(key: &str, a: &str, b: &str) -> Change {
    Change { key: key.into(), a: a.into(), b: b.into() }
}

fn router(run: &Run) -> Json {
    serde_json::to_value(&run.model.router).unwrap()
}

#[test]
fn the_defaults_and_the_standard_runs_are_good_and_survive_writing() {
    assert_eq!(Run::default().validate(), Ok(()));
    assert_eq!(good("", &[]), Run::default());
    for name in Run::standard() {
        let run = Run::load(name, &[]).unwrap();
        assert_eq!(run.name, name);
        assert_eq!(good(&run.to_toml(), &[]), run);
    }
    let text = "model = { window = 7, router = { kind = \"top_p\", p = [0.6, 0.4, 0.2] } }\ndata.chat = \"a \\\"b\\\".json\"\nseed = 9223372036854775807";
    let run = good(text, &["phase.chat.train.eps=1e-300", "eval.samples=['x = 1', \"\\n\\u0000.\"]", "losses.z=0.1"]);
    assert_eq!(good(&run.to_toml(), &[]), run);
    assert_eq!(run.phase("chat").eps, 1e-300);
}

#[test]
fn the_standard_runs_hold_what_their_stages_say() {
    let baseline = Run::load("baseline", &[]).unwrap();
    assert_eq!((baseline.phase("facts").batch_size, baseline.phase("chat").batch_size), (8, 4));
    assert!((baseline.schedule("facts").factor(36) - 0.871125).abs() < 1e-6);
    let [stage1, top2] = ["stage1", "stage1_top2"].map(|name| Run::load(name, &[]).unwrap());
    assert_eq!(router(&stage1)["p"], 0.4);
    assert_eq!((&router(&top2)["kind"], &router(&top2)["k"]), (&json!("top_k"), &json!(2)));
    for run in [&stage1, &top2] {
        assert_eq!((&router(run)["num_experts"], &router(run)["expert_hidden_size"]), (&json!(16), &json!(64)));
        assert_eq!(router(run)["bias_rate"], 1e-3);
        assert_eq!(run.train, baseline.train);
        assert_eq!(run.losses, Losses { balance: 0.01, entropy: 1e-3, ..baseline.losses.clone() });
    }
}

#[test]
fn a_run_written_before_there_were_shared_experts_is_the_run_it_was() {
    let run = Run::load("stage1", &[]).unwrap();
    let written = run.to_toml();
    assert!(written.contains("\nshared = 0\n"), "{written}");
    assert_eq!(good(&written.replace("\nshared = 0\n", "\n"), &[]), run);
    let changed = Run::diff(&run, &Run::load("stage1", &sets(&["model.router.shared=2"])).unwrap());
    assert_eq!(changed, [row("model.router.shared", "0", "2")]);
    let dense = error("model.router = { kind = \"dense\", shared = 1 }", &[]);
    assert!(dense.starts_with("model.router.shared = 1: does not belong to kind = \"dense\""), "{dense}");
}

#[test]
fn the_shipped_text_is_named_from_any_folder() {
    let run = Run::load("text", &[]).unwrap();
    assert_eq!(run.data.text.as_deref(), Some(Path::new("tinyshakespeare")));
    assert_eq!(good(&run.to_toml(), &[]), run);
    let sources = crate::dataset::Dataset::load(&run).unwrap().sources;
    let published = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed";
    assert_eq!((sources[0].0, sources[0].1.sha256.as_str()), ("text", published));
}

#[test]
fn an_option_changes_what_its_name_says_and_nothing_else() {
    let changed = |name: &str, parent: &str| -> Vec<String> {
        let [parent, run] = [parent, name].map(|name| Run::load(name, &[]).unwrap());
        Run::diff(&parent, &run).into_iter().map(|change| change.key).filter(|key| key != "name").collect()
    };
    let rates = ["phase.chat.train.learning_rate", "phase.facts.train.learning_rate"];
    for (name, keys) in [
        ("stage2c", &["train.warmup_epochs"][..]),
        ("stage2c_exponential", &["train.warmup"]),
        ("stage3a", &["train.min_lr_ratio"]),
        ("stage3a_peak", &rates),
        ("stage3a_sgdr", &["train.restart_every", "train.restart_growth", "train.schedule"]),
        ("stage5a", &["model.router.p"]),
        ("stage2a", &["train.activation_checkpointing"]),
        ("stage3c", &["data.augment.copies"]),
        ("stage4a", &["losses.depths", "model.depths.capacity"]),
    ] {
        assert_eq!(changed(name, "stage1"), keys, "{name}");
    }
    assert_eq!(changed("stage3b_linear", "stage3b"), ["train.batch_scaling"]);
    assert_eq!(changed("stage3b_updates", "stage3b"), ["train.epochs", "train.warmup_epochs"]);
    let lengths = ["chat.train.epochs", "chat.train.warmup_epochs", "facts.train.epochs", "facts.train.warmup_epochs"];
    assert_eq!(changed("stage3c_updates", "stage3c"), lengths.map(|key| format!("phase.{key}")));
    assert_eq!(changed("stage4a_causal", "stage4a"), ["losses.depths", "model.depths.choice"]);
    assert_eq!(changed("stage5c", "text"), ["data.lengths"]);
    let windows =
        |name: &str, parent: &str| changed(name, parent).iter().all(|key| key.starts_with("model.adaptive_window."));
    assert!(windows("stage4b", "text") && windows("stage4b_documents", "stage1"));
    let rate = |name: &str, phase: &str| Run::load(name, &[]).unwrap().phase(phase).peak_rate();
    assert_eq!([rate("stage3b", "facts"), rate("stage3b_linear", "chat")], [1e-4 * 2f64.sqrt(), 2e-4]);
    assert_eq!(router(&Run::load("stage5b", &[]).unwrap())["num_experts"], 16);
}

#[test]
fn the_shakespeare_files_are_good() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../experiments/shakespeare");
    let load = |name: &str| Run::load(folder.join(name).to_str().unwrap(), &[]).unwrap();
    let (rope, cope) = (load("rope.toml"), load("cope.toml"));
    let text = rope.data.text.clone().unwrap();
    assert!(text.is_absolute() && text.ends_with("data/tinyshakespeare.txt"));
    assert_eq!(rope.phases(), ["text"]);
    let changed: Vec<String> = Run::diff(&rope, &cope).into_iter().map(|change| change.key).collect();
    assert_eq!(changed, ["model.position.kind", "name"]);
    let schedule = cope.schedule("text");
    assert_eq!((schedule.warmup, schedule.total, schedule.factor(0)), (100, 2000, 0.01));
    let train = cope.phase("text");
    assert_eq!((train.optimizer_kind(), train.scales_by_norm()), (crate::optimizers::Kind::AdamW, false));
    assert_eq!((train.optimizer_settings().beta2, train.optimizer_settings().weight_decay), (0.99, 0.1));
}

#[test]
fn an_unknown_key_is_refused_in_every_table() {
    let tables = schema::keys().iter().filter(|key| key.table).map(|key| format!("{}.", key.path));
    let tables: Vec<String> = tables.chain([String::new()]).collect();
    assert!(tables.len() > 15);
    for table in tables {
        let key = format!("{table}zzz");
        let expected = format!("--set: {key}: unknown key; `config docs` lists the known ones");
        assert_eq!(error("", &[&format!("{key}=1")]), expected);
    }
    for kind in ["dense", "top_p", "top_k", "expert_choice", "forced"] {
        let text = format!("[model.router]\nkind = {kind:?}\nzzz = 1");
        assert_eq!(error(&text, &[]), "model.router.zzz: unknown key; `config docs` lists the known ones");
    }
    // serde refuses them too, so that no other door is open
    assert!(toml::from_str::<Run>("[model.router]\nkind = \"dense\"\nzzz = 1").is_err());
    assert!(toml::from_str::<Run>("[phase.chat.train]\nzzz = 1").is_err());
}

#[test]
fn a_key_of_megabytes_is_refused_at_once_in_one_short_line() {
    let key = "k".repeat(10 << 20);
    let found = error(&format!("[train]\n{key} = 1\n{key}2 = \"{key}\""), &[]);
    assert!(found.lines().count() == 2 && found.lines().all(|line| line.len() < 300), "{} bytes", found.len());
    let started = std::time::Instant::now();
    assert_eq!(schema::nearest(&format!("train.{key}")), None);
    assert!(started.elapsed().as_secs_f64() < 0.5, "{:?}", started.elapsed());
}

#[test]
fn the_nearest_key_is_named_across_sections() {
    for (wrong, nearest) in [
        ("model.hiden_size", "model.hidden_size"),
        ("learning_rate", "train.learning_rate"),
        ("learning-rate", "train.learning_rate"),
        ("model.learning_rate", "train.learning_rate"),
        ("train.lr", "train.learning_rate"),
        ("modle", "model"),
        ("model.num_hidden_layers", "model.num_layers"),
        ("router.p", "model.router"),
        ("phase.chat.train.epoch", "phase.chat.train.epochs"),
        ("Seed", "seed"),
        ("eval.evry", "eval.every"),
        ("checkpoint.evry", "checkpoint.every"),
        ("model.router.num_expert", "model.router.num_experts"),
        ("model.router.n_shared_experts", "model.router.shared"),
    ] {
        let found = error("", &[&format!("{wrong}=1")]);
        assert!(found.ends_with(&format!("did you mean {nearest}?")), "{wrong}: {found}");
    }
    assert_eq!(error("qwxyz = 1", &[]), "qwxyz: unknown key; `config docs` lists the known ones");
    assert_eq!(error("\"a b\\n\" = 1", &[]), "\"a b\\n\": unknown key; `config docs` lists the known ones");
}

#[test]
fn a_wrong_type_names_the_key_and_what_is_expected() {
    for (text, expected) in [
        ("seed = -1", "seed = -1: expected a whole number, 0 or more"),
        ("seed = 1.0", "seed = 1.0: expected a whole number, 0 or more"),
        ("train.learning_rate = true", "train.learning_rate = true: expected a number"),
        (
            "train.optimizer = \"adan\"",
            "train.optimizer = \"adan\": expected one of \"adam\", \"adamw\", \"sgd\", \"lars\", \"lion\", \"muon\"; did you mean adam?",
        ),
        ("engine = 3", "engine = 3: expected one of \"cpu\", \"reference\", \"torch\""),
        ("data.shuffle = \"yes\"", "data.shuffle = \"yes\": expected true or false"),
        ("data.text = 1979-05-27", "data.text = 1979-05-27: expected a text"),
        ("eval.samples = \"x\"", "eval.samples = \"x\": expected a list of texts, [\"…\"]"),
        ("model = 3", "model = 3: expected a table, [model]"),
        ("model.router = \"top_p\"", "model.router = \"top_p\": expected a table, [model.router]"),
        ("model.window = \"none\"", "model.window = \"none\": expected a whole number, 0 or more"),
        (
            "model.router = { kind = \"top-p\" }",
            "model.router.kind = \"top-p\": expected one of \"dense\", \"top_p\", \"learned_p\", \"top_k\", \"expert_choice\", \"forced\"; did you mean top_p?",
        ),
        (
            "model.router = { kind = \"top_p\", p = \"0.4\" }",
            "model.router.p = \"0.4\": expected a number or a list of numbers, [0.6, 0.4, 0.2] say",
        ),
        (
            "model.router = { p = 0.4 }",
            "model.router.kind: is missing; set it to one of \"dense\", \"top_p\", \"learned_p\", \"top_k\", \"expert_choice\", \"forced\"",
        ),
        ("extends = 1", "extends: expected a text, the path of a run file or the name of a standard run"),
        ("losses.z = nan", "losses.z = nan: must be a finite number"),
        ("train.clip = inf", "train.clip = inf: must be a finite number"),
        (
            "model.router = { kind = \"top_p\", p = [0.4, -inf, 0.4] }",
            "model.router.p = [0.4, -inf, 0.4]: must be a finite number",
        ),
    ] {
        assert_eq!(error(text, &[]), expected);
    }
    assert_eq!(good("losses.z = 1", &[]).losses.z, 1.0);
}

#[test]
fn every_range_is_checked() {
    for (bad, key) in [
        ("name=\"\"", "name"),
        ("name=a/b", "name"),
        ("name=.a", "name"),
        ("engine=torch", "engine"),
        ("device=cuda:0", "device"),
        ("dtype=f64", "dtype"),
        ("device=cpu:0", "device"),
        ("threads=1025", "threads"),
        ("data.max_length=1", "data.max_length"),
        ("data.val_fraction=1.0", "data.val_fraction"),
        ("data.val_fraction=-0.1", "data.val_fraction"),
        ("data.facts=\"\"", "data.facts"),
        ("data.tokenizer=char", "data.tokenizer"),
        ("data.tokenizer=t.json", "data.tokenizer"),
        ("model.num_layers=0", "model.num_layers"),
        ("model.window=0", "model.window"),
        ("model.hidden_size=130", "model.hidden_size"),
        ("model.hidden_size=1_048_576", "model.hidden_size"),
        ("model.router={kind='top_p',p=1.5}", "model.router.p"),
        ("model.router={kind='top_p',p=[0.4]}", "model.router.p"),
        ("model.router={kind='top_k',k=9}", "model.router.k"),
        ("model.router={kind='top_k',shared=1_000_000_000_000}", "model.hidden_size"),
        ("train.learning_rate=-1e-4", "train.learning_rate"),
        ("train.batch_size=0", "train.batch_size"),
        ("train.batch_size=1_000_000_000", "train.batch_size"),
        ("train.accumulate=0", "train.accumulate"),
        ("train.accumulate=9", "train.accumulate"),
        ("train={batch_scaling='sqrt',base_batch_size=0}", "train.base_batch_size"),
        ("train.base_batch_size=4", "train.base_batch_size"),
        ("train.epochs=0", "train.epochs"),
        ("train.epochs=1_000_000_001", "train.epochs"),
        ("train.warmup_epochs=1_000_000_001", "train.warmup_epochs"),
        ("train.min_lr_ratio=1.1", "train.min_lr_ratio"),
        ("train.clip=0", "train.clip"),
        ("train.clip_percentile=100", "train.clip_percentile"),
        ("train.clip_percentile=-1", "train.clip_percentile"),
        ("train={clip_percentile=95,clip_window=19}", "train.clip_window"),
        ("train={clip_percentile=99.9,clip_window=999}", "train.clip_window"),
        ("train.sam=-0.1", "train.sam"),
        ("train.noise_scale=1", "train.noise_scale"),
        ("train.weight_decay=-1", "train.weight_decay"),
        ("train.beta1=1", "train.beta1"),
        ("train.beta2=-0.1", "train.beta2"),
        ("train.eps=0", "train.eps"),
        ("train={optimizer='sgd',momentum=1.0}", "train.momentum"),
        ("train={optimizer='lars',trust=0.0}", "train.trust"),
        ("losses.balance=-1", "losses.balance"),
        ("losses.entropy=-1", "losses.entropy"),
        ("losses.z=-1", "losses.z"),
        ("losses.heads=-1", "losses.heads"),
        ("losses.label_smoothing=1", "losses.label_smoothing"),
        ("losses.label_smoothing=-0.1", "losses.label_smoothing"),
        ("monitor.exploding=1", "monitor.exploding"),
        ("monitor.layer_vanishing=0.5", "monitor.layer_vanishing"),
        ("monitor.update_ratio=-1", "monitor.update_ratio"),
        ("monitor={exploding=2,response='rate',factor=1.0}", "monitor.factor"),
        ("monitor={exploding=2,response='batch',factor=0.7}", "monitor.factor"),
        ("monitor={exploding=2,cooldown=0}", "monitor.cooldown"),
        ("eval.every=1_000_000_001", "eval.every"),
        ("eval.samples=[' ']", "eval.samples"),
        ("checkpoint.every=1_000_000_001", "checkpoint.every"),
        ("checkpoint.keep=0", "checkpoint.keep"),
        ("phase.chat.train.batch_size=0", "phase.chat.train.batch_size"),
        ("phase.facts.train.learning_rate=-1", "phase.facts.train.learning_rate"),
        ("phase.text.train.batch_size=4", "phase.text"),
        ("data.augment.copies=101", "data.augment.copies"),
        ("data.augment={copies=1,drop=1.1}", "data.augment.drop"),
        ("data.augment={copies=1,templates=0,synonyms=0}", "data.augment.copies"),
        // no effect, so refused
        ("data.augment.drop=0.1", "data.augment.drop"),
        ("data.augment.table='t.json'", "data.augment.table"),
        ("data.routing='r.safetensors'", "data.routing"),
        ("model.position={kind='rope',max=10}", "model.position.max"),
        ("model.depths.every=3", "model.depths.every"),
        ("model.depths.choice=causal", "model.depths.choice"),
        ("train.clip_window=100", "train.clip_window"),
        ("monitor.response=rate", "monitor.response"),
        ("monitor.cooldown=9", "monitor.cooldown"),
        ("monitor={exploding=2,factor=0.1}", "monitor.factor"),
        ("train.momentum=0.5", "train.momentum"),
        ("train={optimizer='sgd',beta1=0.5}", "train.beta1"),
        ("train={schedule='constant',min_lr_ratio=0.5}", "train.min_lr_ratio"),
        ("phase.chat.train.momentum=0.9", "phase.chat.train.momentum"),
        ("phase.chat.train.max_steps=9", "phase.chat.train.max_steps"),
        ("data.block_size=9", "data.block_size"),
        ("data.lengths=[32]", "data.lengths"),
        ("train.max_steps=9", "train.max_steps"),
        ("train.warmup_steps=9", "train.warmup_steps"),
        ("eval.batches=9", "eval.batches"),
    ] {
        let problems = parse("", &[bad]).expect_err(bad).problems;
        let keys: BTreeSet<&str> = problems.iter().map(|problem| problem.key.as_str()).collect();
        assert_eq!(keys, BTreeSet::from([key]), "{bad}: {problems:?}");
    }
    for bad in [
        "data.lengths=[64, 30]",
        "data.lengths=[0]",
        "data.lengths=[32, 64, 32]",
        "data.block_size=0",
        "train.max_steps=0",
        "train.warmup_steps=1_000_000_001",
        "eval.batches=0",
        "train.epochs=9",
        "data.shuffle=true",
    ] {
        let problems = parse("data.text = \"t.txt\"", &[bad]).expect_err(bad).problems;
        assert_eq!(problems.iter().map(|p| p.key.as_str()).collect::<Vec<_>>(), [bad.split_once('=').unwrap().0]);
    }
    let alone = ["model.depths={capacity=0.5,choice='causal'}", "losses.depths=0"];
    assert!(error("", &alone).contains("losses.depths"), "nothing would draw the tokens to the capacity");
    assert!(parse("", &["model.depths.capacity=0.5", "losses.depths=0"]).is_ok());
    // What the torch engine does not have is refused by name, whether this build has that engine or not.
    for (set, key) in [
        ("train.sam=0.05", "train.sam"),
        ("train={accumulate=2,noise_scale=1}", "train.noise_scale"),
        ("losses.label_smoothing=0.1", "losses.label_smoothing"),
    ] {
        let problems = parse("", &["engine=torch", set]).expect_err(set).problems;
        let found = problems.iter().find(|problem| problem.key == key).unwrap_or_else(|| panic!("{problems:?}"));
        assert!(found.message.contains("not in the torch engine"), "{found:?}");
    }
    good("", &["dtype=f32", "engine=reference"]);
    let refused = parse("", &["dtype=bf16", "engine=reference"]).unwrap_err().problems;
    assert_eq!(refused.iter().map(|p| p.key.as_str()).collect::<Vec<_>>(), ["dtype"]);
    assert_eq!(good("", &["dtype=bf16"]).dtype, tensor::Precision::Bf16);
    good("", &["train.learning_rate=0", "threads=64"]);
}

#[test]
fn a_rate_is_carried_over_to_the_batch_of_its_phase() {
    let peaks = |sets: &[&str]| {
        let base = ["train.learning_rate=0.001", "train.batch_size=32", "phase.chat.train.batch_size=2"];
        let run = good("", &[&base[..], sets].concat());
        ["facts", "chat"].map(|name| run.phase(name).peak_rate())
    };
    assert_eq!(peaks(&[]), [1e-3, 1e-3]);
    assert_eq!(peaks(&["train.batch_scaling=linear"]), [4e-3, 2.5e-4]);
    assert_eq!(peaks(&["train.batch_scaling=sqrt"]), [2e-3, 5e-4]);
    assert_eq!(peaks(&["train.batch_scaling=sqrt", "train.base_batch_size=2"]), [4e-3, 1e-3]);
    let chat = ["phase.chat.train.batch_scaling=linear", "phase.chat.train.base_batch_size=1"];
    assert_eq!(peaks(&chat), [1e-3, 2e-3]);
}

#[test]
fn all_problems_are_told_together_with_their_values_and_places() {
    let text = "model.router = { kind = \"top_p\", p = 1.5 }\n[train]\nbeta1 = 1.0\nbatch_size = 0";
    let found = error(text, &["model.num_heads=7", "losses.z=-1"]);
    let lines: Vec<&str> = found.lines().collect();
    assert!(lines.contains(&"train.beta1 = 1.0: must be in [0, 1); set it to 0.9, say"), "{found}");
    assert!(
        lines.contains(&"--set: losses.z = -1.0: must be a finite number, 0 or more; 0 only measures it"),
        "{found}"
    );
    assert!(lines.contains(&"model.hidden_size = 128: must be a multiple of model.num_heads = 7"), "{found}");
    assert!(lines.iter().any(|line| line.starts_with("model.router.p = 1.5: must be ")), "{found}");
    let keys = parse(text, &[]).unwrap_err().problems.len();
    assert_eq!((lines.len(), keys), (7, 3), "{found}");
    // unknown keys and wrong types come together too
    assert_eq!(error("zzz = 1\nseed = \"x\"\n[train]\nepochs = \"x\"", &[]).lines().count(), 3);
}

#[test]
fn documents_and_text_exclude_each_other() {
    let found = error("data = { text = \"t.txt\", facts = \"f.json\", chat = \"c.json\" }", &[]);
    assert_eq!(found.lines().filter(|line| line.contains("excludes data.text")).count(), 2, "{found}");
    let run = good("data.text = \"t.txt\"", &[]);
    assert_eq!((run.data.tokenizer.as_str(), run.phases()), ("char", &["text"][..]));
    // choosing the other kind of data drops what the parent said for its own
    let run = Run::load("baseline", &sets(&["data.text=/t.txt", "data.tokenizer=byte"])).unwrap();
    assert_eq!((run.phases(), run.data.tokenizer.as_str(), &run.phase), (&["text"][..], "byte", &Phases::default()));
    let back = good(&run.to_toml(), &["data.chat=/c.json"]);
    assert_eq!(
        (back.data.text.as_ref(), back.data.tokenizer.as_str(), back.phases()),
        (None, "word", &["facts", "chat"][..])
    );
}

#[test]
fn a_child_wins_key_by_key_and_paths_follow_their_file() {
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &str| {
        let path = folder.path().join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, text).unwrap();
        path.to_str().unwrap().to_string()
    };
    write(
        "deep/parent.toml",
        "name = \"p\"\ndata.facts = \"f.json\"\n[train]\nepochs = 3\nclip = 5.0\n[phase.chat.train]\nclip = 6.0\nepochs = 4",
    );
    let child = write(
        "child.toml",
        "extends = \"deep/parent.toml\"\ndata.chat = \"../c.json\"\n[train]\nclip = 7.0\n[phase.facts.train]\nclip = 8.0",
    );
    let run = Run::load(&child, &[]).unwrap();
    assert_eq!(run.name, "child", "a name is not inherited");
    assert_eq!(run.data.facts.as_ref().unwrap(), &folder.path().join("deep/f.json"));
    assert!(run.data.chat.as_ref().unwrap().is_absolute());
    // train.clip of the child replaces that of every phase of the parent, but not its own phase's
    assert_eq!((run.phase("facts").clip, run.phase("chat").clip), (8.0, 7.0));
    assert_eq!((run.phase("facts").epochs, run.phase("chat").epochs), (3, 4));
    let run = Run::load(&child, &sets(&["train.epochs=9", "phase.chat.train.clip=1", "data.facts=x.json"])).unwrap();
    assert_eq!((run.phase("facts").epochs, run.phase("chat").epochs, run.phase("chat").clip), (9, 9, 1.0));
    assert_eq!(run.data.facts.unwrap(), std::env::current_dir().unwrap().join("x.json"));
    // the message names the file that wrote the value
    let bad = write("bad.toml", "extends = \"child.toml\"\nlosses.z = -1.0");
    assert!(Run::load(&bad, &[]).unwrap_err().to_string().starts_with(&format!("{bad}: losses.z = -1.0: ")));
    let typo = write("deep/typo.toml", "[modle]\nx = 1");
    let above = write("above.toml", "extends = \"deep/typo.toml\"");
    assert_eq!(
        Run::load(&above, &[]).unwrap_err().to_string(),
        format!("{typo}: modle: unknown key; did you mean model?")
    );
    let broken = write("broken.toml", "seed = 1\nname = = 2");
    let found = Run::load(&broken, &[]).unwrap_err().to_string();
    assert!(found.starts_with(&format!("{broken}: line 2, column 8: ")) && found.lines().count() == 1, "{found}");
    let latin = folder.path().join("latin.toml");
    std::fs::write(&latin, b"name = \"\xe9\"").unwrap();
    assert!(Run::load(latin.to_str().unwrap(), &[]).unwrap_err().to_string().contains("UTF-8"));
}

#[test]
fn extends_finds_files_first_then_standard_runs_and_never_turns_in_circles() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_string();
    let write = |name: &str, text: &str| std::fs::write(path(name), text).unwrap();
    write("a.toml", "extends = \"baseline.toml\"");
    assert_eq!(Run::load(&path("a.toml"), &[]).unwrap().phase("chat").batch_size, 4);
    write("baseline.toml", "train.batch_size = 3");
    assert_eq!(Run::load(&path("a.toml"), &[]).unwrap().phase("chat").batch_size, 3);
    write("b.toml", "extends = \"stage1\"");
    assert_eq!(router(&Run::load(&path("b.toml"), &[]).unwrap())["kind"], "top_p");
    write("c.toml", "extends = \"./d.toml\"");
    write("d.toml", "extends = \"c.toml\"");
    assert!(Run::load(&path("c.toml"), &[]).unwrap_err().to_string().contains("circle"));
    write("0.toml", "");
    for depth in 1..=9 {
        write(&format!("{depth}.toml"), &format!("extends = \"{}.toml\"", depth - 1));
    }
    assert!(Run::load(&path("8.toml"), &[]).is_ok());
    assert!(Run::load(&path("9.toml"), &[]).unwrap_err().to_string().contains("more than 8"));
    write("e.toml", "extends = \"gone.toml\"");
    assert!(Run::load(&path("e.toml"), &[]).unwrap_err().to_string().contains("gone.toml: no such file"));
    assert!(Run::load("stag1", &[]).unwrap_err().to_string().ends_with("did you mean stage1?"));
    assert!(Run::load("/", &[]).unwrap_err().to_string().contains("cannot be read"));
}

#[test]
fn a_new_kind_drops_the_parents_keys_and_refuses_the_childs() {
    let run = good("extends = \"stage1\"\nmodel.router.kind = \"top_k\"", &[]);
    assert_eq!((router(&run)["k"].clone(), router(&run)["p"].clone()), (json!(2), Json::Null));
    let refused = "does not belong to kind = \"top_k\", only to \"top_p\"";
    assert_eq!(
        error("extends = \"stage1\"\nmodel.router = { kind = \"top_k\", p = 0.3 }", &[]),
        format!("model.router.p = 0.3: {refused}")
    );
    assert_eq!(
        error("extends = \"stage1\"", &["model.router.k=2"]),
        "--set: model.router.k = 2: does not belong to kind = \"top_p\", only to \"top_k\" and \"expert_choice\" and \"forced\""
    );
    assert_eq!(router(&good("extends = \"stage1\"", &["model.router.kind=dense"])), json!({ "kind": "dense" }));
    let frozen = good(
        "extends = \"stage1\"\nmodel.router.frozen = true",
        &["model.router.kind=expert_choice", "model.router.k=1.5"],
    );
    assert_eq!((&router(&frozen)["frozen"], &router(&frozen)["k"]), (&json!(true), &json!(1.5)));
    // optimizer, schedule and position are choices of the same sort
    let folder = tempfile::tempdir().unwrap();
    let parent =
        "model.position.max = 32\ntrain = { beta1 = 0.8, min_lr_ratio = 0.2 }\n[phase.chat.train]\nbeta2 = 0.9";
    std::fs::write(folder.path().join("p.toml"), parent).unwrap();
    let choose = |text: &str| Run::from_toml_str(&format!("extends = \"p.toml\"\n{text}"), folder.path(), &[]).unwrap();
    let run = choose(
        "train = { optimizer = \"sgd\", schedule = \"constant\", momentum = 0.5 }\nmodel.position.kind = \"rope\"",
    );
    assert_eq!(
        run.phase("chat"),
        Train { optimizer: Optimizer::Sgd, schedule: Schedule::Constant, momentum: 0.5, ..Train::default() }
    );
    assert_eq!(run.model.position.max, 64);
    let run = choose("phase.chat.train.optimizer = \"sgd\"");
    assert_eq!(
        (run.phase("facts").beta1, run.phase("chat").optimizer, run.phase("chat").beta1),
        (0.8, Optimizer::Sgd, 0.9)
    );
}

#[test]
fn sets_are_toml_values_or_plain_text() {
    let run = good(
        "",
        &[
            "train.learning_rate=3e-4",
            " train.batch_size = 1_6 ",
            "name=a=b",
            "data.facts=\"/x y.json\"",
            "data.chat=/c=1.json",
            "eval.samples=['a', \"b\"]",
            "model.router={kind='top_p'}",
            "model.router.p=[0.5, 0.4, 1]",
            "train.optimizer=adamw",
            "data.shuffle=true",
            "seed=0x10",
        ],
    );
    assert_eq!((run.train.learning_rate, run.train.batch_size, run.seed), (3e-4, 16, 16));
    assert_eq!((run.name.as_str(), run.data.shuffle, run.train.optimizer), ("a=b", true, Optimizer::Adamw));
    assert_eq!((run.data.facts, run.data.chat), (Some("/x y.json".into()), Some("/c=1.json".into())));
    assert_eq!(run.eval.samples, ["a", "b"]);
    assert_eq!(serde_json::to_value(&run.model.router).unwrap()["p"], json!([0.5, 0.4, 1.0]));
    for (literal, name) in
        [("name=42", "42"), ("name=1979-05-27", "1979-05-27"), ("name=true", "true"), ("name='42'", "42")]
    {
        assert_eq!(good("", &[literal]).name, name);
    }
    assert_eq!(good("", &["seed=1", "seed=2"]).seed, 2, "the last one wins");
    assert!(error("", &["seed"]).contains("has no '='"));
    assert!(error("", &["=1"]).contains("is not a key"));
    assert!(error("", &["a..b=1"]).contains("is not a key"));
    assert!(error("", &[&format!("{}=1", "a.".repeat(100_000) + "a")]).contains("is not a key"));
    assert!(error("", &["extends=stage1"]).contains("belongs into a run file"));
    assert!(error("", &["seed=1\nname=2"]).starts_with("--set: seed = "));
}

#[test]
fn values_from_code_are_taken_as_they_are_and_null_takes_out() {
    let set = |key: &str, value: Json| Run::load_with("stage1", &[(key.to_string(), value)]);
    assert_eq!(router(&set("model.router.p", json!([0.6, 0.4, 0.2])).unwrap())["p"], json!([0.6, 0.4, 0.2]));
    assert_eq!(
        set("losses", json!({ "z": 0.1, "balance": 1 })).unwrap().losses,
        Losses { z: 0.1, balance: 1.0, ..Run::load("stage1", &[]).unwrap().losses }
    );
    assert_eq!(set("phase.chat", Json::Null).unwrap().phase("chat").batch_size, 8);
    assert_eq!(set("name", json!(3)).unwrap_err().to_string(), "--set: name = 3: expected a text");
    assert!(set("model.windw", Json::Null).unwrap_err().to_string().contains("did you mean model.window?"));
    let set = |value: Json| Run::parse_with("model.window = 9", &[("model.window".to_string(), value)]);
    assert_eq!((set(Json::Null).unwrap().model.window, set(json!(3)).unwrap().model.window), (None, Some(3)));
    assert!(set(json!(u64::MAX)).is_err());
    let path = Run::parse_with("data.facts = \"x.json\"", &[]).unwrap().data.facts.unwrap();
    assert_eq!(path, std::env::current_dir().unwrap().join("x.json"));
}

#[test]
fn quick_shortens_the_phases_and_nothing_else() {
    let whole = Run::load("baseline", &[]).unwrap();
    let mut quick = whole.clone();
    quick.quick();
    assert_eq!(Run::diff(&whole, &quick), [row("quick", "false", "true")]);
    for phase in ["facts", "chat"] {
        assert_eq!(quick.phase(phase), Train { epochs: 10, max_steps: 200, ..whole.phase(phase) });
    }
    assert_eq!(good(&quick.to_toml(), &[]), quick);
    assert_eq!(good("quick = true\ntrain.epochs = 3", &[]).phase("facts").epochs, 3);
    assert_eq!(good("data.text = \"t\"\nquick = true\ntrain.max_steps = 15", &[]).schedule("text").total, 2);
}

#[test]
fn values_changed_in_code_are_checked_without_a_panic() {
    let mut run = Run { seed: u64::MAX, ..Run::default() };
    assert!(run.validate().unwrap_err().to_string().starts_with("seed: "));
    run.seed = 0;
    run.train.learning_rate = f64::NAN;
    assert!(run.validate().unwrap_err().to_string().starts_with("train.learning_rate = nan: "));
    run.train = Train { epochs: u64::MAX, ..Train::default() };
    assert!(run.validate().is_err());
}

#[test]
fn a_difference_is_exact() {
    let a = Run::load("baseline", &[]).unwrap();
    assert_eq!(Run::diff(&a, &a), []);
    let b = Run::load(
        "baseline",
        &sets(&["model.window=5", "phase.chat.train.epochs=7", "losses.z=0.001", "phase.facts.train.batch_size=8"]),
    )
    .unwrap();
    let expected = [
        row("losses.z", "0.0", "0.001"),
        row("model.window", "absent", "5"),
        row("phase.chat.train.epochs", "absent", "7"),
    ];
    assert_eq!(Run::diff(&a, &b), expected);
    assert_eq!(Run::diff(&b, &a)[1], row("model.window", "5", "absent"));
}

/// The keys of the Markdown table, first column.
fn documented() -> Vec<String> {
    let keys = Run::docs().lines().skip(2).map(|line| line.split('`').nth(1).unwrap().to_string()).collect::<Vec<_>>();
    assert!(keys.len() > 50);
    keys
}

#[test]
fn the_documentation_lists_every_key_once_with_its_meaning() {
    let keys = documented();
    let unique: BTreeSet<&String> = keys.iter().collect();
    assert_eq!(unique.len(), keys.len());
    let mut full = Run::load("stage1", &[]).unwrap();
    full.model.window = Some(9);
    let written = Table::try_from(&full).unwrap();
    fn leaves(table: &Table, path: &str, found: &mut Vec<String>) {
        for (key, value) in table {
            let path = format!("{path}{key}");
            match value.as_table().filter(|_| !path.ends_with(".train")) {
                Some(inner) => leaves(inner, &format!("{path}."), found),
                None => found.push(path),
            }
        }
    }
    let mut found = Vec::new();
    leaves(&written, "", &mut found);
    assert!(found.iter().all(|key| unique.contains(key)), "{found:?}");
    for line in Run::docs().lines().skip(2) {
        let cells: Vec<&str> = line.split(" | ").collect();
        assert!(cells.len() == 4 && cells.iter().all(|cell| cell.trim_matches(['|', ' ']).len() > 2), "{line}");
    }
}

#[test]
fn the_schema_knows_every_documented_key_and_no_other() {
    let schema: Json = serde_json::from_str(&Run::schema_json()).unwrap();
    fn descend<'a>(nodes: Vec<&'a Json>, key: &str) -> Vec<&'a Json> {
        let inside = |node: &'a Json| node["oneOf"].as_array().into_iter().flatten().chain([node]);
        nodes.into_iter().flat_map(inside).filter_map(|node| node["properties"].get(key)).collect()
    }
    for key in documented() {
        let found = key.split('.').fold(vec![&schema], |nodes, part| descend(nodes, part));
        assert!(!found.is_empty(), "{key}");
    }
    assert_eq!(schema["additionalProperties"], false);
    for variant in schema["properties"]["model"]["properties"]["router"]["oneOf"].as_array().unwrap() {
        assert_eq!(variant["additionalProperties"], false);
    }
}

/// A piece of TOML that may stand anywhere.
fn fragment() -> impl Strategy<Value = String> {
    let words = schema::keys().iter().map(|key| key.path.clone()).collect::<Vec<_>>();
    let values = [
        "1",
        "-1",
        "0.4",
        "nan",
        "inf",
        "9223372036854775807",
        "true",
        "\"top_k\"",
        "[]",
        "[1, 2]",
        "{}",
        "\"\"",
        "1979-05-27",
    ];
    prop_oneof![
        proptest::sample::select(words.clone()).prop_map(|key| format!("[{key}]")),
        (proptest::sample::select(words), proptest::sample::select(values.to_vec()))
            .prop_map(|(key, value)| format!("{key} = {value}")),
        ".{0,12}",
    ]
}

proptest! {
    #[test]
    fn mutated_files_never_panic(
        lines in prop::collection::vec((any::<prop::sample::Index>(), any::<bool>(), fragment()), 0..4),
        cut in any::<prop::sample::Index>(),
        change in prop::option::of(any::<char>()),
        set in prop::option::of(fragment()),
    ) {
        let mut text: Vec<String> = Run::load("stage1", &[]).unwrap().to_toml().lines().map(str::to_string).collect();
        for (place, replace, line) in lines {
            let place = place.index(text.len());
            if replace { text[place] = line } else { text.insert(place, line) }
        }
        let mut text: Vec<char> = text.join("\n").chars().collect();
        if let Some(change) = change {
            let place = cut.index(text.len());
            text[place] = change;
        }
        let text: String = text.into_iter().collect();
        let set: Vec<String> = set.into_iter().map(|set| set.replace(" = ", "=")).collect();
        match Run::from_toml_str(&text, Path::new("/base"), &set) {
            Ok(run) => {
                prop_assert_eq!(run.validate(), Ok(()));
                prop_assert_eq!(Run::from_toml_str(&run.to_toml(), Path::new("/other"), &[]), Ok(run));
            }
            Err(error) => prop_assert!(!error.to_string().is_empty() && !error.problems.is_empty()),
        }
    }
}
