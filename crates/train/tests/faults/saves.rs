//! One checkpoint after the other on a disk that fails at every operation in every way, and what a power cut leaves of them.

use crate::layer::{Faulty, How, WAYS};
use crate::power::FATES;
use crate::tiny::{memory, names, report};
use serde_json::{Map, Value, json};
use std::path::Path;
use tensor::Layout;
use train::checkpoint::{self, CheckpointError, Contents, Retention};
use train::files::{Files, System};
use train::optimizers::{Kind, Optimizer, Settings};

struct Model {
    layout: Layout,
    optimizer: Optimizer,
    fingerprints: Map<String, Value>,
}

impl Model {
    fn new() -> Self {
        let layout = Layout::new([
            ("model.embed_tokens.weight".to_owned(), vec![11, 5], true),
            ("model.layers.0.mlp.experts.down_proj".to_owned(), vec![3, 5, 7], true),
            ("model.norm.weight".to_owned(), vec![5], true),
        ]);
        let optimizer = Optimizer::new(Kind::AdamW, Settings::default(), &layout);
        Model { layout, optimizer, fingerprints: Map::new() }
    }

    fn params(&self, step: u64) -> Vec<f32> {
        let mut params = vec![0.0; self.layout.len()];
        for (_, param) in self.layout.iter() {
            (0..param.count).flat_map(|i| param.range(i)).for_each(|i| params[i] = (i as f32 + step as f32).sin());
        }
        params
    }

    fn save(&self, disk: &dyn Files, folder: &Path, step: u64, keep: usize) -> Result<(), CheckpointError> {
        let (params, state) = (self.params(step), json!({ "step": step }));
        let contents = Contents {
            step,
            layout: &self.layout,
            params: &params,
            optimizer: self.optimizer.state(),
            ema: Some(&params),
            state: &state,
            tokenizer: b"{}",
            config: "{}",
            fingerprints: &self.fingerprints,
        };
        checkpoint::save(disk, folder, &contents, Retention { keep, ..Retention::default() }).map(drop)
    }

    /// The step of the newest whole checkpoint, whose weights must be those of that step.
    fn recovered(&self, folder: &Path, what: &str) -> u64 {
        let found =
            checkpoint::recover(&System, folder, &self.layout).unwrap_or_else(|error| panic!("{what}: {error}"));
        let Some((_, loaded)) = found.checkpoint else { return 0 };
        assert_eq!(loaded.params, self.params(loaded.step), "{what}");
        assert_eq!(loaded.ema.as_ref(), Some(&loaded.params), "{what}");
        loaded.step
    }
}

#[test]
fn every_operation_of_a_save_may_fail_in_every_way() {
    let (model, mut injected) = (Model::new(), 0);
    for how in WAYS {
        for at in 0.. {
            let folder = memory();
            model.save(&System, folder.path(), 1, 1).unwrap();
            let layer = Faulty::new(Some((at, how)));
            let saved = model.save(&*layer.disk(), folder.path(), 2, 1);
            if !layer.fired() {
                break;
            }
            injected += 1;
            let what = format!("{how:?} at operation {at}");
            let newest = model.recovered(folder.path(), &what);
            match saved {
                Ok(()) => assert_eq!(newest, 2, "{what}: reported as saved"),
                Err(error) => {
                    assert!((1..=2).contains(&newest), "{what}: lost");
                    assert!(error.to_string().starts_with("E-DISK: "), "{what}: {error}");
                    if matches!(error, CheckpointError::Full { .. }) {
                        let text = error.to_string();
                        assert!(
                            text.contains("needs") && text.contains("free") && text.contains("checkpoints"),
                            "{text}"
                        );
                    }
                }
            }
            if !matches!(how, How::Die | How::From(_)) {
                let stray: Vec<String> = names(&folder.path().join("checkpoints"))
                    .into_iter()
                    .filter(|name| name.starts_with(".tmp-2"))
                    .collect();
                assert!(stray.len() <= 1, "{what}: {stray:?}"); // the operation that failed may be its removal
            }
            model.save(&System, folder.path(), 3, 1).unwrap_or_else(|error| panic!("{what}: {error}"));
            assert_eq!(model.recovered(folder.path(), &what), 3, "{what}");
            let stray = names(&folder.path().join("checkpoints")).into_iter().find(|name| name.starts_with(".tmp-"));
            assert_eq!(stray, None, "{what}");
        }
    }
    report("every operation of a save", injected, 0);
}

#[test]
fn a_power_cut_at_any_operation_leaves_what_was_reported() {
    let model = Model::new();
    let folder = memory();
    let layer = Faulty::logging(folder.path());
    let mut saved = vec![(0, 0)]; // operations done when a step was reported
    for step in 1..=4 {
        model.save(&*layer.disk(), folder.path(), step, 2).unwrap();
        saved.push((layer.log().ops.len(), step));
    }
    let log = layer.log();
    let mut injected = 0;
    for cut in 0..=log.ops.len() {
        let reported = saved.iter().rfind(|(done, _)| *done <= cut).unwrap().1;
        for fate in FATES {
            let left = memory();
            log.replay(cut, fate, left.path());
            let what = format!("power cut before operation {cut}, {fate:?}");
            let newest = model.recovered(left.path(), &what);
            assert!(newest >= reported, "{what}: {reported} was reported but {newest} is left");
            injected += 1;
            if injected % 7 == 0 {
                model.save(&System, left.path(), 9, 2).unwrap_or_else(|error| panic!("{what}: {error}"));
                assert_eq!(model.recovered(left.path(), &what), 9, "{what}");
            }
        }
    }
    // The control: without the folder's fsync the same replay must find losses.
    let mut careless = log.clone();
    careless.ops.retain(|op| !matches!(op, crate::power::Op::Sync { .. }));
    let left = memory();
    careless.replay(careless.ops.len(), FATES[0], left.path());
    assert_eq!(model.recovered(left.path(), "control"), 0);
    report("power cuts between the operations of saves", injected, 0);
}

#[test]
fn the_newest_is_chosen_by_step_whatever_the_clock_said() {
    let (model, mut injected) = (Model::new(), 0);
    let folder = memory();
    for step in 1..=5 {
        model.save(&System, folder.path(), step, 9).unwrap();
    }
    let start = std::time::SystemTime::UNIX_EPOCH;
    for shift in 0..24u64 {
        for (step, path) in checkpoint::list(folder.path()).unwrap() {
            let time = start + std::time::Duration::from_secs((step * 7919 + shift * 104_729) % 4_000_000_000);
            for entry in std::fs::read_dir(&path).unwrap() {
                std::fs::File::open(entry.unwrap().path()).unwrap().set_modified(time).unwrap();
            }
            std::fs::File::open(&path).unwrap().set_modified(time).unwrap();
        }
        assert_eq!(model.recovered(folder.path(), "clock"), 5);
        injected += 1;
    }
    report("clock jumps", injected, 0);
}
