//! How long recovery takes and what saving costs the training, measured.

use crate::tiny::report;
use serde_json::{Map, json};
use std::fs;
use std::time::Instant;
use tempfile::TempDir;
use tensor::Layout;
use train::Trainer;
use train::checkpoint::{self, Contents, Retention};
use train::files::System;
use train::optimizers::{Kind, Optimizer, Settings};
use train::run::Run;

#[test]
#[ignore = "full"]
fn a_model_of_100_mb_is_recovered_within_a_second() {
    let layout = Layout::new((0..25).map(|i| (format!("model.layers.{i}.mlp.w.weight"), vec![1000, 1000], true)));
    let params: Vec<f32> = (0..layout.len()).map(|i| (i as f32 * 0.1).sin()).collect();
    let optimizer = Optimizer::new(Kind::AdamW, Settings::default(), &layout);
    let folder = TempDir::new().unwrap();
    let (state, fingerprints) = (json!({}), Map::new());
    for step in [1, 2] {
        let contents = Contents {
            step,
            layout: &layout,
            params: &params,
            optimizer: optimizer.state(),
            ema: None,
            state: &state,
            tokenizer: b"{}",
            config: "{}",
            fingerprints: &fingerprints,
        };
        let start = Instant::now();
        checkpoint::save(&System, folder.path(), &contents, Retention { keep: 2, ..Retention::default() }).unwrap();
        println!(
            "saved {} MB in {:.2} s",
            checkpoint::size(&contents).unwrap() / 1_000_000,
            start.elapsed().as_secs_f64()
        );
    }
    let recover = || {
        let start = Instant::now();
        let found = checkpoint::recover(&System, folder.path(), &layout).unwrap();
        let seconds = start.elapsed().as_secs_f64();
        (found.checkpoint.unwrap().1.step, found.skipped.len(), seconds)
    };
    let best = (0..3).map(|_| recover().2).fold(f64::INFINITY, f64::min);
    println!("recovered in {best:.2} s (best of 3)");
    // A torn newest one: the one before it.
    let model = folder.path().join("checkpoints/checkpoint-2/model.safetensors");
    fs::File::options().write(true).open(model).unwrap().set_len(50_000_000).unwrap();
    let (step, skipped, torn) = recover();
    println!("recovered over a torn one in {torn:.2} s");
    assert_eq!((step, skipped), (1, 1));
    assert!(best <= 1.0 && torn <= 1.0, "{best} {torn}");
    report("recovery of 100 MB", 1, 0);
}

#[test]
#[ignore = "full"]
fn saving_every_100_updates_costs_at_most_3_percent() {
    let seconds = |every: u64| {
        let folder = TempDir::new().unwrap();
        let sets = [
            "model.hidden_size=384".to_owned(),
            "model.num_layers=4".to_owned(),
            "model.intermediate_size=1024".to_owned(),
            "train.epochs=3".to_owned(),
            format!("checkpoint.every={every}"),
        ];
        let run = Run::load("baseline", &sets).unwrap();
        let mut trainer = Trainer::new(run, Some(&folder.path().join("run")), None).unwrap();
        // Times between the ends of updates 20 and 220: two saves, with all that they slow down.
        let (mut start, mut steps) = (Instant::now(), Vec::new());
        while trainer.step_count() < 220 {
            trainer.next_row().unwrap();
            if trainer.step_count() >= 20 {
                steps.push(start.elapsed().as_secs_f64());
            }
            start = Instant::now();
        }
        (steps.iter().sum::<f64>(), steps.len())
    };
    let mut pairs = Vec::new();
    for _ in 0..2 {
        let ((without, _), (with, _)) = (seconds(0), seconds(100));
        pairs.push((with / without - 1.0) * 100.0);
        println!(
            "200 updates: {without:.2} s without saving, {with:.2} s with one save in 100 ({:+.2} %)",
            with / without * 100.0 - 100.0
        );
    }
    let least = pairs.iter().copied().fold(f64::INFINITY, f64::min);
    assert!(least <= 3.0, "{pairs:?}");
}
