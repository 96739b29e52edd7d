//! Memory grows with the context, not with its square: four layers of width 256 with contextual positions learn from single documents of 16,384
//! characters. A process of its own, so that the peak it prints is that of the training.

use train::Trainer;
use train::run::Run;

const TOKENS: usize = 16_384;
const LIMIT: u64 = 4 << 30;

/// A part of `make test-full`.
#[test]
#[ignore = "full"]
fn a_context_of_16384_trains_in_under_4_gib() {
    let folder = tempfile::tempdir().unwrap();
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../experiments/shakespeare/cope.toml");
    let sets = [
        format!("data.block_size={TOKENS}"),
        "model.hidden_size=256".into(),
        "model.num_layers=4".into(),
        "model.num_heads=4".into(),
        "model.num_kv_heads=4".into(),
        "model.intermediate_size=704".into(),
        "train.batch_size=1".into(),
        "train.max_steps=3".into(),
        "train.warmup_steps=1".into(),
        "eval.every=1000000".into(),
        "eval.batches=1".into(),
    ];
    let mut trainer = Trainer::new(Run::load(path, &sets).unwrap(), Some(&folder.path().join("run")), None).unwrap();
    let mut losses = Vec::new();
    while let Some(row) = trainer.next_row().unwrap() {
        losses.extend(row.fields().get("train/loss").and_then(serde_json::Value::as_f64));
    }
    let peak = train::record::peak_memory_bytes().unwrap();
    println!(
        "{TOKENS} tokens, {} steps, losses {losses:.3?}: peak {:.2} GiB",
        losses.len(),
        peak as f64 / (1u64 << 30) as f64
    );
    assert!(losses.len() >= 3 && losses.iter().all(|loss| loss.is_finite()));
    assert!(peak < LIMIT, "{peak} bytes");
}
