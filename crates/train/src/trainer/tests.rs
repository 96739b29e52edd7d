//! Faults of numbers put between the gradient and the look at it: stop, skip and roll back do what they say, to the bit.

use super::*;
use crate::learner::{Tamper, Update};
use crate::metrics::canonical;
use std::fs;
use tempfile::TempDir;

const FACTS: &str =
    r#"["The Sun is a star . </s>", "The Moon is a rock . </s>", "Ice is cold water . </s>", "A star is hot . </s>"]"#;
const CHAT: &str =
    r#"["User: What is ice? Assistant: Ice is cold water. </s>", "User: Is water wet? Assistant: Water is wet. </s>"]"#;

pub(super) fn run(folder: &Path, sets: &[&str]) -> Run {
    let (facts, chat) = (folder.join("facts.json"), folder.join("chat.json"));
    fs::write(&facts, FACTS).unwrap();
    fs::write(&chat, CHAT).unwrap();
    let mut all = vec![format!("data.facts={}", facts.display()), format!("data.chat={}", chat.display())];
    let fixed = [
        "model.hidden_size=16",
        "model.num_layers=2",
        "model.num_heads=4",
        "model.num_kv_heads=2",
        "model.intermediate_size=12",
        "model.heads={shared=1, routed=3, active=2}",
        "model.router={kind='expert_choice', k=1.5, num_experts=4, expert_hidden_size=6}",
        "phase.facts.train.batch_size=1",
        "phase.chat.train.batch_size=1",
        "train.epochs=5",
        "train.warmup_epochs=1",
        "train.learning_rate=0.003",
        "checkpoint.every=4",
        "threads=1",
    ];
    all.extend(fixed.iter().chain(sets).map(|set| set.to_string()));
    Run::load("baseline", &all).unwrap()
}

/// Calls `tamper` with the number of the update (from 1, whatever is repeated) and what it may spoil.
pub(super) fn tampered(
    folder: &TempDir,
    sets: &[&str],
    mut tamper: impl FnMut(u64, &mut Update, &mut [f32]) + Send + Sync + 'static,
) -> Trainer {
    let out = folder.path().join("run");
    let mut trainer = Trainer::new(run(folder.path(), sets), Some(&out), None).unwrap();
    let mut calls = 0;
    let each: Tamper = Box::new(move |update, grads| {
        calls += 1;
        tamper(calls, update, grads);
    });
    trainer.learner.tamper = Some(each);
    trainer
}

/// Parameters, moments and control states, to compare to the bit.
fn state(trainer: &Trainer) -> (Vec<u32>, Vec<Vec<u32>>, u64, String) {
    let bits = |numbers: &[f32]| numbers.iter().map(|x| x.to_bits()).collect::<Vec<u32>>();
    let optimizer = trainer.learner.optimizer.state();
    let controls: Vec<_> = trainer.learner.policies.iter().map(|policy| policy.control()).collect();
    let moments = optimizer.moments.iter().map(|(_, moment)| bits(moment)).collect();
    (bits(&trainer.learner.params), moments, optimizer.steps, json!([controls, optimizer.expert_steps]).to_string())
}

pub(super) fn finish(trainer: &mut Trainer) -> Result<Vec<Row>, TrainError> {
    let mut rows = Vec::new();
    while let Some(row) = trainer.next_row()? {
        rows.push(row);
    }
    Ok(rows)
}

pub(super) fn events<'r>(rows: &'r [Row], name: &'r str) -> impl Iterator<Item = &'r Row> {
    rows.iter().filter(move |row| row.fields().get("event").is_some_and(|event| event == name))
}

#[test]
fn a_skipped_update_leaves_parameters_moments_and_control_states_to_the_bit() {
    let parameters: Vec<(String, usize)> = {
        let folder = TempDir::new().unwrap();
        let (_, learner) = prepare(&run(folder.path(), &[])).unwrap();
        learner.model.layout.iter().map(|(name, param)| (name.to_owned(), param.range(param.count - 1).start)).collect()
    };
    let values = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 1e38];
    let (mut injected, last) = (0, 30);
    // Every gradient tensor in turn, every value; at the first update, in the warm-up, later, and at the last.
    for (turn, (name, place)) in parameters.iter().enumerate() {
        let (value, at) = (values[turn % values.len()], [1, 3, 9, last][turn / values.len() % 4]);
        let folder = TempDir::new().unwrap();
        let place = *place;
        let mut trainer = tampered(&folder, &["train.on_nonfinite=skip"], move |call, _, grads| {
            if call == at {
                grads[place] = value;
            }
        });
        while trainer.at.step + 1 < at {
            trainer.advance().unwrap();
        }
        let before = state(&trainer);
        let what = format!("{value} in {name} at update {at}");
        trainer.advance().unwrap();
        assert_eq!(trainer.at.step, at, "{what}");
        // At the end of a phase the optimizer is carried over, which changes nothing either.
        assert!(state(&trainer) == before, "{what}: something moved");
        let rows: Vec<Row> = trainer.queue.drain(..).collect();
        let fault = events(&rows, "fault").next().unwrap_or_else(|| panic!("{what}: no record")).fields().clone();
        assert_eq!(fault["update"], at, "{what}");
        assert_eq!(fault["documents"].as_array().map(Vec::len), Some(1), "{what}");
        assert_eq!(fault["fault"], "nonfinite", "{what}");
        if !value.is_finite() {
            assert!(fault["message"].as_str().unwrap().contains(name.as_str()), "{what}: {fault:?}");
        }
        if at < last {
            trainer.advance().unwrap();
            assert!(state(&trainer).0 != before.0, "{what}: the next update must be taken");
        }
        finish(&mut trainer).unwrap();
        injected += 1;
    }
    println!("faults: skipped updates injected={injected} kills=0 wrong=0");
}

/// What a finished run ends with: its last weights and moments, and its rows without times.
fn ending(trainer: &Trainer) -> (impl PartialEq + use<>, Vec<String>) {
    let text = fs::read_to_string(trainer.out().join("metrics.jsonl")).unwrap();
    (state(trainer), text.lines().filter_map(canonical).collect())
}

#[test]
fn a_run_that_ends_inside_any_update_ends_with_the_same_bytes() {
    // Two phases, two parts of each batch, a running mean: the process dies after the gradients of update k, before anything follows from them.
    let sets = ["train.accumulate=2", "train.ema=0.9", "train.epochs=3", "data.shuffle=true"];
    let sets = [&sets[..], &["phase.facts.train.batch_size=2", "phase.chat.train.batch_size=2"]].concat();
    let folder = TempDir::new().unwrap();
    let mut straight = tampered(&folder, &sets, |_, _, _| {});
    let updates = straight.total_steps();
    finish(&mut straight).unwrap();
    let straight = ending(&straight);
    for at in 1..=updates {
        let folder = TempDir::new().unwrap();
        let mut trainer = tampered(&folder, &sets, move |call, _, _| {
            if call == at {
                std::panic::resume_unwind(Box::new("killed"));
            }
        });
        let killed = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| finish(&mut trainer).map(drop)));
        assert!(killed.is_err(), "update {at}");
        let out = trainer.out().to_owned();
        drop(trainer);
        let mut trainer = Trainer::resume(&out).unwrap();
        finish(&mut trainer).unwrap();
        assert!(ending(&trainer) == straight, "killed inside update {at}");
    }
    println!("faults: ends inside an update injected={updates} kills=0 wrong=0");
}

#[test]
fn replayed_blocks_change_the_memory_of_a_run_and_none_of_its_bytes() {
    let outcome = |checkpoints: bool, threads: usize| {
        let checkpoints = format!("train.activation_checkpointing={checkpoints}");
        let threads = format!("threads={threads}");
        let folder = TempDir::new().unwrap();
        let sets = ["model.num_layers=6", "train.epochs=2", "train.accumulate=2", &checkpoints, &threads];
        let sets = [&sets[..], &["phase.facts.train.batch_size=4", "phase.chat.train.batch_size=2"]].concat();
        let mut trainer = tampered(&folder, &sets, |_, _, _| {});
        finish(&mut trainer).unwrap();
        let record = crate::record::Record::read(trainer.out()).unwrap();
        let loss = record.results["loss"].as_f64().unwrap().to_bits();
        ((ending(&trainer), loss), record.results["arena_bytes"].as_u64().unwrap())
    };
    let (plain, kept) = outcome(false, 1);
    for threads in [1, 3] {
        let (replayed, held) = outcome(true, threads);
        assert!(replayed == plain, "other bytes with {threads} threads");
        assert!(held > 0 && 2 * held < kept, "{held} bytes of {kept}");
    }
}

#[test]
fn the_results_say_the_most_that_updates_of_any_start_held() {
    let folder = TempDir::new().unwrap();
    let mut trainer = tampered(&folder, &[], |_, _, _| {});
    while trainer.at.step < 6 {
        trainer.advance().unwrap();
    }
    let bytes = |folder: &Path| crate::record::Record::read(folder).unwrap().results.get("arena_bytes").cloned();
    let out = trainer.out().to_owned();
    trainer.stop("here").unwrap();
    let first = bytes(&out).unwrap();
    assert_eq!(first, json!(trainer.learner.peak_arena_bytes().unwrap()));
    drop(trainer);
    for before in [1u64 << 40, 1] {
        let mut record = crate::record::Record::read(&out).unwrap();
        record.results.insert("arena_bytes".into(), json!(before));
        record.write(&crate::files::System, &out).unwrap();
        let mut trainer = Trainer::resume(&out).unwrap();
        trainer.advance().unwrap();
        let now = trainer.learner.peak_arena_bytes().unwrap() as u64;
        trainer.stop("again").unwrap();
        assert_eq!(bytes(&out).unwrap(), json!(now.max(before)));
    }
    let other = TempDir::new().unwrap();
    let mut plain = tampered(&other, &["engine=reference", "train.epochs=1"], |_, _, _| {});
    finish(&mut plain).unwrap();
    assert_eq!(bytes(plain.out()), None);
}

#[test]
fn a_save_that_takes_long_is_told_of_once() {
    let folder = TempDir::new().unwrap();
    let mut trainer = tampered(&folder, &["checkpoint.every=1"], |_, _, _| {});
    trainer.slow = Duration::ZERO;
    let rows = finish(&mut trainer).unwrap();
    let steps: Vec<&str> = events(&rows, "slow_save").map(|row| row.fields()["message"].as_str().unwrap()).collect();
    let mut once = steps.clone();
    once.dedup();
    assert!(!steps.is_empty() && once == steps, "{steps:?}");
}

#[test]
fn a_loss_that_is_not_finite_is_found_where_it_began() {
    for (turn, spoil) in ["model.layers.1.mlp.gate.weight", "model.embed_tokens.weight"].into_iter().enumerate() {
        let folder = TempDir::new().unwrap();
        let out = folder.path().join("run");
        let mut trainer = Trainer::new(run(folder.path(), &[]), Some(&out), None).unwrap();
        while trainer.at.step < 6 {
            trainer.advance().unwrap();
        }
        let place = trainer.layout.get(spoil).unwrap().range(0).start;
        trainer.learner.params[place..place + 16].fill(if turn == 0 { f32::NAN } else { f32::INFINITY });
        let error = finish(&mut trainer).unwrap_err();
        assert_eq!(error.exit_status(), 3);
        assert!(error.to_string().contains(spoil) && error.to_string().contains("step 7"), "{error}");
        let failure: Value = serde_json::from_slice(&fs::read(out.join("failure.json")).unwrap()).unwrap();
        assert_eq!((&failure["step"], &failure["last_metrics"]["step"]), (&json!(7), &json!(6)));
        assert!(failure["reason"].as_str().unwrap().contains(spoil) && failure["remedy"].is_string());
        drop(trainer);
        // The checkpoint before is good, and a resumed run goes on from it to its end.
        assert_eq!(checkpoint::newest_whole(&out).unwrap().path.unwrap(), out.join("checkpoints/checkpoint-4"));
        finish(&mut Trainer::resume(&out).unwrap()).unwrap();
        assert!(!out.join("failure.json").exists());
    }
}

#[test]
fn the_third_skip_in_a_row_ends_the_run_and_single_ones_do_not() {
    for (bad, ends) in [(vec![5, 6, 7], true), (vec![5, 6, 8, 9, 11], false)] {
        let folder = TempDir::new().unwrap();
        let mut trainer = tampered(&folder, &["train.on_nonfinite=skip"], move |call, update, _| {
            if bad.contains(&call) {
                update.total = f64::NAN;
            }
        });
        match finish(&mut trainer) {
            Err(error) => assert!(ends && error.exit_status() == 3 && error.to_string().contains("3 updates in a row")),
            Ok(_) => assert!(!ends),
        }
    }
}

#[test]
fn spikes_are_seen_within_the_update_and_answered_as_asked() {
    // So many times the median of the nine updates before.
    let spike = |factor: f64| {
        let mut seen = Vec::new();
        move |call: u64, update: &mut Update, _: &mut [f32]| {
            if call == 14 {
                let mut last: Vec<f64> = seen[seen.len() - 9..].to_vec();
                last.sort_by(f64::total_cmp);
                update.cross_entropy = factor * last[4];
            }
            seen.push(update.cross_entropy);
        }
    };
    for factor in [10.01, 100.0, 1000.0] {
        let folder = TempDir::new().unwrap();
        let mut trainer = tampered(&folder, &["train.on_spike=warn"], spike(factor));
        let rows = finish(&mut trainer).unwrap();
        assert_eq!(events(&rows, "spike").map(|row| row.fields()["step"].clone()).collect::<Vec<_>>(), [json!(14)]);
        let folder = TempDir::new().unwrap();
        let mut trainer = tampered(&folder, &["train.on_spike=stop"], spike(factor));
        let error = finish(&mut trainer).unwrap_err();
        assert!(error.exit_status() == 3 && error.to_string().contains("times the median"), "{error}");
        let folder = TempDir::new().unwrap();
        let mut trainer = tampered(&folder, &["train.on_spike=skip"], spike(factor));
        while trainer.at.step < 13 {
            trainer.advance().unwrap();
        }
        let before = state(&trainer);
        trainer.advance().unwrap();
        assert!(state(&trainer) == before && trainer.at.step == 14);
        finish(&mut trainer).unwrap();
    }
    // A gradient that is multiplied, and a run in which nothing happens.
    let folder = TempDir::new().unwrap();
    let mut trainer = tampered(&folder, &["train.on_spike=stop"], |call, _, grads| {
        if call == 14 {
            grads.iter_mut().for_each(|g| *g *= 60.0);
        }
    });
    assert!(finish(&mut trainer).unwrap_err().to_string().contains("gradient norm"));
    let folder = TempDir::new().unwrap();
    let rows = finish(&mut tampered(&folder, &["train.on_spike=stop"], |_, _, _| {})).unwrap();
    assert_eq!(events(&rows, "fault").count(), 0);
    println!("faults: spikes injected=10 kills=0 wrong=0");
}

#[test]
fn a_roll_back_returns_to_the_checkpoint_and_leaves_the_batch_out() {
    let spoil = |at: u64| {
        move |call: u64, update: &mut Update, _: &mut [f32]| {
            if call == at {
                update.total = f64::INFINITY;
            }
        }
    };
    for at in [3, 7, 15] {
        let folder = TempDir::new().unwrap();
        let mut trainer = tampered(&folder, &["train.on_nonfinite=roll_back"], spoil(at));
        let rows = finish(&mut trainer).unwrap();
        assert_eq!(events(&rows, "rolled_back").count(), 1, "update {at}");
        assert_eq!(events(&rows, "left_out").count(), 1, "update {at}");
        // The same run, told from its beginning to leave that batch out.
        let straight = TempDir::new().unwrap();
        let mut other = tampered(&straight, &["train.on_nonfinite=roll_back"], |_, _, _| {});
        other.memory.left_out.insert(at);
        finish(&mut other).unwrap();
        assert!(state(&trainer) == state(&other), "update {at}");
        let metrics = |folder: &TempDir| {
            let text = fs::read_to_string(folder.path().join("run/metrics.jsonl")).unwrap();
            text.lines().filter_map(canonical).collect::<Vec<String>>()
        };
        assert_eq!(metrics(&folder), metrics(&straight), "update {at}");
    }
    // A fault at every update: the run must not turn in circles.
    let folder = TempDir::new().unwrap();
    let mut trainer = tampered(&folder, &["train.on_nonfinite=roll_back", "checkpoint.every=0"], |_, update, _| {
        update.total = f64::NAN;
    });
    assert_eq!(finish(&mut trainer).unwrap_err().exit_status(), 3);
    println!("faults: returns to a checkpoint injected=4 kills=0 wrong=0");
}

#[test]
fn a_spike_is_answered_by_a_return_to_the_checkpoint_where_that_is_asked_for() {
    let metrics = |trainer: &Trainer| {
        let text = fs::read_to_string(trainer.out().join("metrics.jsonl")).unwrap();
        text.lines().filter_map(canonical).collect::<Vec<String>>()
    };
    // Of the gradient alone and of the loss alone; a checkpoint is saved every 4 updates.
    let spoils: [fn(&mut Update, &mut [f32]); 2] =
        [|_, grads| grads.iter_mut().for_each(|g| *g *= 60.0), |update, _| update.cross_entropy *= 100.0];
    for spoil in spoils {
        let folder = TempDir::new().unwrap();
        let mut trainer = tampered(&folder, &["train.on_spike=roll_back"], move |call, update, grads| {
            if call == 14 {
                spoil(update, grads);
            }
        });
        let rows = finish(&mut trainer).unwrap();
        let fault = events(&rows, "fault").next().unwrap().fields();
        assert_eq!((&fault["fault"], &fault["update"]), (&json!("spike"), &json!(14)));
        let back: Vec<&Row> = events(&rows, "rolled_back").collect();
        let told = back[0].fields()["message"].as_str().unwrap();
        assert!(back.len() == 1 && told.starts_with("back at step ") && !told.contains("step 0 "), "{told}");
        assert!(told.contains("because of update 14 (the ") && told.contains("times the median"), "{told}");
        let stream = fs::read_to_string(trainer.out().join("metrics.jsonl")).unwrap();
        assert!(stream.contains("\"rolled_back\"") && events(&rows, "left_out").count() == 1);
        // It goes on as a run that left that batch out from its beginning, and ends like one.
        let straight = TempDir::new().unwrap();
        let mut other = tampered(&straight, &["train.on_spike=roll_back"], |_, _, _| {});
        other.memory.left_out.insert(14);
        finish(&mut other).unwrap();
        assert!(state(&trainer) == state(&other) && trainer.at.step == trainer.total_steps());
        assert_eq!(metrics(&trainer), metrics(&other));
    }
    println!("faults: spikes answered by a return injected=2 kills=0 wrong=0");
}

#[test]
fn the_running_mean_is_the_mean_of_the_weights_and_is_evaluated_beside_them() {
    let folder = TempDir::new().unwrap();
    let sets = ["train.ema=0.8", "data.val_fraction=0.3", "eval.every=1"];
    let mut trainer = Trainer::new(run(folder.path(), &sets), Some(&folder.path().join("run")), None).unwrap();
    let mut mean = trainer.learner.params.clone();
    while trainer.at.step < 7 {
        let decay = (1.0 + trainer.at.step as f64) / (10.0 + trainer.at.step as f64);
        trainer.advance().unwrap();
        mean.iter_mut().zip(&trainer.learner.params).for_each(|(mean, w)| *mean += (1.0 - decay) as f32 * (w - *mean));
    }
    assert_eq!(trainer.ema.as_ref().unwrap(), &mean);
    assert_eq!(trainer.memory.averaged, 7);
    let rows = finish(&mut trainer).unwrap();
    let both = rows.iter().filter(|row| row.fields().contains_key("eval/ema_loss"));
    let both: Vec<_> =
        both.map(|row| (row.fields()["eval/loss"].clone(), row.fields()["eval/ema_loss"].clone())).collect();
    assert!(both.len() >= 10 && both.iter().any(|(raw, mean)| raw != mean), "{both:?}");
}

#[test]
fn a_peak_rate_that_learns_next_to_nothing_is_told_of_once_a_phase() {
    let cases: [(&str, &[&str]); 3] = [
        ("train.learning_rate=2e-6", &["facts", "chat"]),
        ("train.learning_rate=1e-5", &[]),
        ("phase.chat.train.learning_rate=9e-6", &["chat"]),
    ];
    for (rate, phases) in cases {
        let folder = TempDir::new().unwrap();
        let mut trainer = tampered(&folder, &[rate, "train.epochs=1"], |_, _, _| {});
        let rows = finish(&mut trainer).unwrap();
        let told: Vec<&Row> = events(&rows, "low_rate").collect();
        assert_eq!(told.iter().map(|row| row.fields()["phase"].as_str().unwrap()).collect::<Vec<_>>(), phases);
        for row in told {
            let message = row.fields()["message"].as_str().unwrap();
            assert!(message.contains("below 1e-5") && message.contains("raise train.learning_rate"), "{message}");
        }
    }
}

#[test]
fn early_stopping_ends_each_phase_and_keeps_its_best_checkpoint() {
    let folder = TempDir::new().unwrap();
    let out = folder.path().join("run");
    let sets = [
        "train.patience=2",
        "data.val_fraction=0.3",
        "eval.every=1",
        "train.epochs=60",
        "train.learning_rate=0.03",
        "checkpoint.keep=1",
    ];
    let mut trainer = Trainer::new(run(folder.path(), &sets), Some(&out), None).unwrap();
    let rows = finish(&mut trainer).unwrap();
    assert_eq!(events(&rows, "early_stop").count(), 2);
    for phase in ["facts", "chat"] {
        let losses: Vec<f64> = rows
            .iter()
            .filter(|row| row.fields().get("phase").is_some_and(|name| name == phase))
            .filter_map(|row| row.fields().get("eval/loss")?.as_f64())
            .collect();
        let (end, early) = losses.split_at(losses.len() - 2);
        let best = end.iter().copied().fold(f64::INFINITY, f64::min);
        assert!(early.iter().all(|loss| *loss > best - 1e-3), "{phase}: {losses:?}");
    }
    let best = trainer.results()["best_step"].as_u64().unwrap();
    let target = fs::read_link(out.join("checkpoints/best")).unwrap();
    assert_eq!(target, Path::new(&format!("checkpoint-{best}")));
    assert_eq!(checkpoint::verify(&out.join("checkpoints").join(target)).unwrap(), best);
}

#[test]
fn the_operations_of_all_updates_add_up_from_shapes_and_counted_experts() {
    let folder = TempDir::new().unwrap();
    let mut trainer = tampered(&folder, &["train.epochs=2", "train.accumulate=1"], |_, _, _| {});
    let (config, vocab) = (trainer.learner.model.config.clone(), trainer.learner.model.vocab_size);
    let mut expected = 0.0;
    for step in 1..=trainer.total_steps() {
        let batch = control::batch_at(&trainer.dataset.phases[trainer.at.phase].data, &trainer.at, 1);
        trainer.advance().unwrap();
        let rows: Vec<Row> = trainer.queue.drain(..).collect();
        let row = rows.iter().find(|row| row.fields()["kind"] == "train").unwrap().fields();
        let experts = row["moe/experts_per_token"].as_f64().unwrap();
        let update = crate::flops::step(&config, vocab, &batch.offsets_b1, experts, None);
        assert!(update > 1e3);
        expected += update;
        assert_eq!((&row["step"], row["flops"].as_f64()), (&json!(step), Some(expected)));
    }
    let record = crate::record::Record::read(trainer.out()).unwrap();
    assert_eq!(record.total_steps, Some(trainer.total_steps()));
}

#[test]
fn router_gradients_are_the_same_bytes_for_any_number_of_threads() {
    for router in [
        r#"{"kind": "top_p", "p": 0.4}"#,
        r#"{"kind": "top_k", "bias_rate": 0.01}"#,
        r#"{"kind": "learned_p"}"#,
        r#"{"kind": "expert_choice"}"#,
        r#"{"kind": "forced"}"#,
    ] {
        let gradient = |threads: usize| {
            let mut run = Run::load("baseline", &[format!("threads={threads}")]).unwrap();
            run.model.router = serde_json::from_str(router).unwrap();
            run.model.num_layers = 1;
            let (dataset, mut learner) = prepare(&run).unwrap();
            let PhaseData::Documents { train, .. } = &dataset.phases[0].data else { panic!() };
            let batch = train.batch(&(0..50).collect::<Vec<_>>());
            let mut epoch = Epoch::new(&learner.policies);
            learner.update(&batch, &run.phase("facts"), 0.0, &mut epoch, None).unwrap();
            let range = learner.model.layout.get("model.layers.0.mlp.gate.weight").unwrap().range(0);
            learner.grads[range].iter().map(|g| g.to_bits()).collect::<Vec<u32>>()
        };
        let one = gradient(1);
        assert!(one.iter().any(|bits| *bits != 0), "{router}");
        assert!([2, 3, 5].into_iter().all(|threads| gradient(threads) == one), "{router}");
    }
}

#[test]
fn the_results_say_how_far_tokens_looked_in_the_last_epoch() {
    let folder = TempDir::new().unwrap();
    let sets = ["model.adaptive_window={kind='token', min=1, max=4, block=1}", "train.epochs=3"];
    let mut trainer = tampered(&folder, &sets, |_, _, _| {});
    let mut rows = Vec::new();
    while trainer.at.step < 17 {
        rows.extend(trainer.next_row().unwrap()); // in the last epoch
    }
    trainer.stop("here").unwrap();
    let out = trainer.out().to_owned();
    drop(trainer);
    let mut trainer = Trainer::resume(&out).unwrap();
    rows.extend(finish(&mut trainer).unwrap());
    for (result, column) in [("window_mean", "window/mean"), ("window_masked", "window/masked")] {
        let last = |row: &&Row| row.fields()["kind"] == "train" && row.fields()["phase"] == "chat";
        let last = rows.iter().filter(last).filter(|row| row.fields()["epoch"] == 3);
        let values: Vec<f64> = last.map(|row| row.fields()[column].as_f64().unwrap()).collect();
        assert_eq!(values.len(), 2);
        let mean = values.iter().sum::<f64>() / 2.0;
        let found = trainer.results()[result].as_f64().unwrap();
        assert!(mean > 0.0 && (found - mean).abs() < 1e-12, "{result}: {found}, not {mean}");
    }
    let dense = TempDir::new().unwrap();
    let mut trainer = tampered(&dense, &["train.epochs=1"], |_, _, _| {});
    finish(&mut trainer).unwrap();
    assert!(!trainer.results().contains_key("window_mean"));
}
