//! The torch engine against the cpu engine: losses, every gradient, optimizers, whole curves, and checkpoints that go from one to the other. The same
//! tests run on CUDA where one is present and say so in a line where none is.
#![cfg(feature = "torch")]

use serde_json::{Value, json};
use std::path::Path;
use train::Trainer;
use train::inspect::{LossAndGradients, loss_and_gradients};
use train::run::Run;

const DOCUMENTS: [&[u32]; 4] =
    [&[3, 7, 1, 9, 4, 4, 18, 2, 7, 3, 11, 0, 5], &[5, 16], &[8, 1, 1, 12, 6, 19, 8, 10], &[2, 13, 17]];
const LOSSES: &str = "[losses]\nbalance = 0.3\nentropy = 0.2\nz = 0.1\n";

/// Engines to hold against the cpu engine.
fn engines() -> Vec<&'static str> {
    if tensor::torch::device("cuda").is_ok() {
        return vec!["torch", "torch:cuda"];
    }
    eprintln!("skipped on CUDA: no CUDA device here");
    vec!["torch"]
}

fn run_file(position: &str, heads: &str, router: &str, more: &str) -> String {
    let mixture = if heads.contains("routed = 0") { "" } else { "heads = 0.4\n" };
    let losses = if router.contains("dense") { "[losses]\n" } else { LOSSES };
    format!(
        "{more}position = {{ {position} }}\nheads = {{ {heads} }}\nrouter = {{ {router} }}\n{losses}{mixture}",
        more = format_args!("[model]\nhidden_size = 48\nnum_layers = 2\nnum_heads = 6\nintermediate_size = 40\n{more}"),
    )
}

fn pass(file: &str, documents: &[&[u32]], engine: &str, dtype: &str) -> LossAndGradients {
    let documents: Vec<Vec<u32>> = documents.iter().map(|d| d.to_vec()).collect();
    loss_and_gradients(file, None, &documents, 20, engine, dtype).unwrap_or_else(|error| panic!("{file}\n{error}"))
}

/// The largest difference over the largest entry.
fn off(ours: &[f64], theirs: &[f64]) -> f64 {
    assert_eq!(ours.len(), theirs.len());
    let scale = theirs.iter().fold(1e-2, |m: f64, x| m.max(x.abs()));
    ours.iter()
        .zip(theirs)
        .map(|(a, b)| (a - b).abs())
        .fold(0.0, |m: f64, d| if d.is_nan() { f64::NAN } else { m.max(d) })
        / scale
}

fn agree(file: &str, documents: &[&[u32]], engine: &str, dtype: &str, reference: &str, bar: f64) {
    let (ours, theirs) = (pass(file, documents, engine, dtype), pass(file, documents, "cpu", reference));
    assert_eq!(
        ours.experts,
        theirs
            .experts
            .iter()
            .map(|layer| layer.iter().map(|row| sorted(row)).collect())
            .collect::<Vec<Vec<Vec<u32>>>>(),
        "{engine} {dtype} {file}"
    );
    assert!(
        off(&[ours.total, ours.cross_entropy], &[theirs.total, theirs.cross_entropy]) < bar,
        "{engine} {dtype} {file}"
    );
    for ((name, ours), (_, theirs)) in ours.losses.iter().zip(&theirs.losses) {
        assert!(off(&[*ours], &[*theirs]) < bar, "{name}: {ours} {theirs}: {engine} {dtype} {file}");
    }
    for (ours, theirs) in ours.gradients.iter().zip(&theirs.gradients) {
        let off = off(&ours.data, &theirs.data);
        assert!(off < bar, "{}: {off:.2e}: {engine} {dtype} {file}", ours.name);
    }
}

fn sorted(row: &[u32]) -> Vec<u32> {
    let mut row = row.to_vec();
    row.sort();
    row
}

const HEADS: [&str; 3] =
    ["shared = 2, routed = 4, active = 2", "shared = 0, routed = 0, active = 0", "shared = 0, routed = 6, active = 3"];
const ROUTERS: [&str; 6] = [
    "kind = 'dense'",
    "kind = 'top_p', p = 0.5, num_experts = 5, expert_hidden_size = 6, init_std = 0.3", // widths no grouped product takes
    "kind = 'top_p', p = 0.4, num_experts = 4, expert_hidden_size = 16, init_std = 0.3, renormalize = true",
    "kind = 'top_k', k = 2, num_experts = 4, expert_hidden_size = 16, init_std = 0.3",
    "kind = 'top_p', p = 1.0, num_experts = 3, expert_hidden_size = 8",
    "kind = 'top_k', k = 1, num_experts = 4, expert_hidden_size = 16, shared = 2, init_std = 0.3",
];
const POSITIONS: [&str; 4] = ["kind = 'cope', max = 4", "kind = 'rope'", "kind = 'none'", "kind = 'learned', max = 16"];

#[test]
fn loss_and_every_gradient_agree() {
    for engine in engines() {
        for (i, position) in POSITIONS.iter().enumerate() {
            for (j, router) in ROUTERS.iter().enumerate() {
                let window = ["", "window = 3\n", "window = 1\n"][(i + j) % 3];
                let more =
                    format!("num_kv_heads = {}\n{window}tie_word_embeddings = {}\n", [2, 6, 3][j % 3], j % 2 == 0);
                let file = run_file(position, HEADS[(i + 2 * j) % 3], router, &more);
                agree(&file, &DOCUMENTS, engine, "f64", "f64", 1e-9);
                agree(&file, &DOCUMENTS, engine, "f32", "f32", 1e-4);
            }
        }
    }
}

#[test]
fn empty_experts_and_equal_documents_agree() {
    let file = run_file(
        POSITIONS[0],
        HEADS[0],
        "kind = 'top_k', k = 1, num_experts = 8, expert_hidden_size = 16, init_std = 0.5",
        "num_kv_heads = 3\n",
    );
    for engine in engines() {
        agree(&file, &[&[5, 16], &[2, 13, 17]], engine, "f32", "f32", 1e-4);
        agree(&file, &[&[5, 16, 4], &[2, 13, 17]], engine, "f64", "f64", 1e-9);
    }
}

/// Long enough that CoPE is computed in tiles and again on the way back, and that a window's queries come in several parts.
#[test]
fn recomputed_tiles_agree() {
    let long: Vec<u32> = (0..301).map(|i| (i * i + i / 7) % 20).collect();
    let documents: Vec<&[u32]> = vec![&long, &long[..200], &long[3..300], &long[..71]];
    for engine in engines() {
        for (position, window) in [(0, ""), (0, "window = 90\n"), (1, "window = 90\n"), (1, "")] {
            let file = run_file(
                POSITIONS[position].replace("4", "24").as_str(),
                HEADS[0],
                ROUTERS[2],
                &format!("num_kv_heads = 2\n{window}"),
            );
            agree(&file, &documents, engine, "f64", "f64", 1e-9);
        }
    }
}

/// bf16 rounds operands of products to 8 bits: single entries are off by some percent, directions are kept.
#[test]
fn bf16_keeps_loss_and_direction() {
    for engine in engines() {
        for position in &POSITIONS[..2] {
            let file = run_file(
                position,
                HEADS[0],
                "kind = 'top_p', p = 1.0, num_experts = 4, expert_hidden_size = 16, shared = 1",
                "num_kv_heads = 2\n",
            );
            let (ours, theirs) = (pass(&file, &DOCUMENTS, engine, "bf16"), pass(&file, &DOCUMENTS, "cpu", "f32"));
            assert!((ours.total - theirs.total).abs() < 2e-2 * theirs.total, "{} {}", ours.total, theirs.total);
            for (ours, theirs) in ours.gradients.iter().zip(&theirs.gradients) {
                let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
                let cosine = dot(&ours.data, &theirs.data)
                    / (dot(&ours.data, &ours.data) * dot(&theirs.data, &theirs.data)).sqrt();
                assert!(cosine > 0.99, "{}: cosine {cosine}", ours.name);
            }
        }
    }
}

const TEXT: &str = "the cat sat on the mat. a dog ran to the log. the cat ran. a dog sat on the cat. ";

/// A tiny text run.
fn run(folder: &Path, sets: &[(&str, Value)]) -> Run {
    let text = folder.join("text.txt");
    std::fs::write(&text, TEXT.repeat(12)).unwrap();
    let sets: Vec<(String, Value)> = sets.iter().map(|(key, value)| (key.to_string(), value.clone())).collect();
    let file = format!(
        "name = \"t\"\n[data]\ntext = {text:?}\nblock_size = 12\n[model]\nhidden_size = 32\nnum_layers = 2\nnum_heads = 4\nnum_kv_heads = 2\n\
         position = {{ kind = \"cope\", max = 8 }}\nheads = {{ shared = 1, routed = 3, active = 2 }}\n\
         router = {{ kind = \"top_p\", p = 0.4, num_experts = 4, expert_hidden_size = 16 }}\n\
         [losses]\nbalance = 0.01\n[train]\nmax_steps = 200\nbatch_size = 6\nlearning_rate = 0.002\n[eval]\nevery = 50\nbatches = 2\n"
    );
    Run::parse_with(&file, &sets).unwrap_or_else(|error| panic!("{error}"))
}

/// One number of every train row.
fn curve(run: Run, out: &Path, column: &str) -> Vec<f64> {
    let mut trainer = Trainer::new(run, Some(out), None).unwrap();
    let mut values = Vec::new();
    while let Some(row) = trainer.next_row().unwrap() {
        values.extend(row.fields().get(column).and_then(Value::as_f64));
    }
    values
}

fn torch(device: &'static str) -> [(&'static str, Value); 2] {
    [("engine", json!("torch")), ("device", json!(device))]
}

#[test]
fn curves_of_every_optimizer_stay_together() {
    curves_stay_together(40);
}

#[test]
#[ignore = "full"]
fn curves_of_200_steps_stay_together() {
    curves_stay_together(200);
}

/// For so many steps of Adam, and 40 of the other optimizers.
fn curves_stay_together(adam_steps: usize) {
    let folder = tempfile::tempdir().unwrap();
    let optimizers = [
        vec![("train.optimizer", json!("adam"))],
        vec![("train.optimizer", json!("adamw")), ("train.weight_decay", json!(0.1)), ("train.accumulate", json!(2))],
        vec![("train.optimizer", json!("sgd")), ("train.learning_rate", json!(0.05)), ("train.clip", json!(0.5))],
        vec![
            ("train.optimizer", json!("lars")),
            // Where the loss jumps (a rate of 2), rounding grows tenfold every few steps and two healthy runs part.
            ("train.learning_rate", json!(0.5)),
            ("train.weight_decay", json!(1e-4)),
        ],
    ];
    for (i, sets) in optimizers.iter().enumerate() {
        let mut sets = sets.clone();
        let steps = if i == 0 { adam_steps } else { 40 };
        sets.extend([
            ("train.max_steps", json!(steps)),
            ("train.lr_scale", json!(if i % 2 == 0 { "grad_norm" } else { "none" })),
        ]);
        let cpu = curve(run(folder.path(), &sets), &folder.path().join(format!("cpu{i}")), "train/loss");
        let other = [sets.clone(), torch("cpu").to_vec()].concat();
        let torch = curve(run(folder.path(), &other), &folder.path().join(format!("torch{i}")), "train/loss");
        assert_eq!(cpu.len(), steps);
        // Near ties of a router part two runs in the end; the first steps must agree closely, all of them roughly.
        assert!(off(&torch[..20], &cpu[..20]) < 1e-3, "{sets:?}: {}", off(&torch[..20], &cpu[..20]));
        assert!(off(&torch, &cpu) < 0.05, "{sets:?}: {}", off(&torch, &cpu));
        assert!(cpu[steps - 1] < 0.95 * cpu[0], "{sets:?}: it learns: {} {}", cpu[0], cpu[steps - 1]);
        for column in [
            "train/grad_norm",
            "train/l0",
            "train/lr_scale_mean",
            "update/layer_01/ratio",
            "grad/layer_02/activation_norm",
        ] {
            let read = |name: &str| first(&folder.path().join(format!("{name}{i}")), column);
            let (ours, theirs) = (read("torch"), read("cpu"));
            assert!((ours - theirs).abs() <= 1e-3 * theirs.abs(), "{column}: {ours} {theirs} {sets:?}");
        }
    }
}

/// A number of the first train row of a run.
fn first(out: &Path, column: &str) -> f64 {
    let text = std::fs::read_to_string(out.join("metrics.jsonl")).unwrap();
    let mut rows = text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    rows.find(|row| row["kind"] == "train").unwrap()[column].as_f64().unwrap_or_else(|| panic!("{column}"))
}

/// The numbers of the control states that checkpoint `step` of a run holds.
fn controls(out: &Path, step: usize) -> Vec<f64> {
    fn collect(value: &Value, found: &mut Vec<f64>) {
        match value {
            Value::Array(items) => items.iter().for_each(|item| collect(item, found)),
            Value::Object(fields) => {
                fields.iter().filter(|(key, _)| *key != "kind").for_each(|(_, v)| collect(v, found))
            }
            Value::String(bits) => found.push(f64::from_bits(u64::from_str_radix(bits, 16).unwrap())),
            _ => {}
        }
    }
    let text = std::fs::read_to_string(out.join(format!("checkpoints/checkpoint-{step}/state.json"))).unwrap();
    let mut found = Vec::new();
    collect(&serde_json::from_str::<Value>(&text).unwrap()["controls"], &mut found);
    found
}

#[test]
fn biases_and_thresholds_move_as_under_the_cpu_engine() {
    let folder = tempfile::tempdir().unwrap();
    let steps = 20;
    for (i, router) in [
        json!({"kind": "top_p", "p": 0.4, "num_experts": 4, "expert_hidden_size": 16, "bias_rate": 0.01, "target": 1.7}),
        json!({"kind": "top_k", "k": 2, "num_experts": 4, "expert_hidden_size": 16, "bias_rate": 0.01}),
    ]
    .into_iter()
    .enumerate()
    {
        let sets = [("train.max_steps", json!(steps)), ("train.accumulate", json!(2)), ("model.router", router)];
        let (cpu, other) = (folder.path().join(format!("cpu{i}")), folder.path().join(format!("torch{i}")));
        let ours = curve(run(folder.path(), &sets), &cpu, "train/loss");
        let theirs = curve(run(folder.path(), &[&sets[..], &torch("cpu")].concat()), &other, "train/loss");
        assert!(off(&theirs, &ours) < 1e-3, "{}", off(&theirs, &ours));
        let (ours, theirs) = (controls(&cpu, steps), controls(&other, steps));
        assert!(ours.len() >= 8 && ours.iter().any(|x| x.abs() > 0.05), "they moved: {ours:?}");
        // A token on the edge of a choice may move one count, and with it one sign.
        assert!(ours.iter().zip(&theirs).all(|(a, b)| (a - b).abs() < 0.021), "{ours:?} {theirs:?}");
        assert!(off(&theirs, &ours) < 0.1, "{ours:?} {theirs:?}");
    }
}

#[test]
fn a_run_goes_from_engine_to_engine_and_loses_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let cpu = curve(run(folder.path(), &[("train.max_steps", json!(60))]), &folder.path().join("cpu"), "train/loss");
    let out = folder.path().join("moved");
    let mut trainer = Trainer::new(run(folder.path(), &[("train.max_steps", json!(60))]), Some(&out), None).unwrap();
    let mut values = Vec::new();
    for (until, engine) in [(20, "torch"), (40, "cpu"), (60, "cpu")] {
        while trainer.step_count() < until {
            let row = trainer.next_row().unwrap().unwrap();
            values.extend(row.fields().get("train/loss").and_then(Value::as_f64));
        }
        if until < 60 {
            trainer.stop("to move").unwrap();
            drop(trainer);
            trainer = Trainer::resume_moved(&out, &[("engine".into(), json!(engine))]).unwrap();
            assert!(std::fs::read_to_string(out.join("run.toml")).unwrap().contains(&format!("engine = \"{engine}\"")));
        }
    }
    while trainer.next_row().unwrap().is_some() {}
    assert_eq!(values.len(), 60);
    assert_eq!(values[..20], cpu[..20], "the first part is the cpu engine's own");
    assert!(off(&values, &cpu) < 2e-2, "{}", off(&values, &cpu));
    let names = |out: &Path, file: &str| {
        let bytes = std::fs::read(out.join("checkpoints/checkpoint-60").join(file)).unwrap();
        let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        serde_json::from_slice::<Value>(&bytes[8..8 + length]).unwrap()
    };
    for file in ["model.safetensors", "optimizer.safetensors"] {
        assert_eq!(names(&out, file), names(&folder.path().join("cpu"), file), "{file}");
    }
}

#[test]
fn what_cannot_be_had_is_said_in_one_sentence() {
    let folder = tempfile::tempdir().unwrap();
    let text = format!("data.text = {:?}\n", folder.path().join("text.txt"));
    let error = |sets: &[(String, Value)]| Run::parse_with(&text, sets).unwrap_err().to_string();
    let set = |pairs: &[(&str, Value)]| pairs.iter().map(|(k, v)| (k.to_string(), v.clone())).collect::<Vec<_>>();
    let found = error(&set(&[("engine", json!("torch")), ("device", json!("gpu"))]));
    assert!(found.contains("device = \"gpu\": must be \"cpu\", \"cuda\" or \"cuda:N\""), "{found}");
    let found = error(&set(&[("device", json!("cuda"))]));
    assert!(found.contains("need engine = \"torch\""), "{found}");
    let found = error(&set(&[("engine", json!("torch")), ("model.router", json!({ "kind": "expert_choice" }))]));
    assert!(found.contains("model.router.kind") && found.contains("use engine = \"cpu\""), "{found}");
    if tensor::torch::device("cuda").is_err() {
        let found = error(&set(&[("engine", json!("torch")), ("device", json!("cuda:1"))]));
        assert!(found.contains("torch finds no CUDA device here"), "{found}");
    }
}
