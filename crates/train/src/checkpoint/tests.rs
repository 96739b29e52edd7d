//! Round trip, every kind of damage, the wrong model, retention, and a saver that is killed while it saves.

use super::read::read_manifest;
use super::*;
use crate::files::System;
use crate::layers::Rates;
use crate::optimizers::{Kind, Optimizer, Settings};
use std::io::{BufRead, BufReader, Seek, SeekFrom, Write};
use std::process::{Command, Stdio};
use tempfile::TempDir;

const EXPERTS: &str = "model.layers.0.mlp.experts.down_proj";

/// Odd sizes, so that every tensor and expert has padding behind it.
fn layout_of(experts: usize) -> Layout {
    Layout::new([
        ("model.embed_tokens.weight".to_owned(), vec![11, 5], true),
        (EXPERTS.to_owned(), vec![experts, 5, 7], true),
        ("model.layers.0.mlp.gate.weight".to_owned(), vec![experts, 5], true),
        ("model.layers.0.self_attn.heads.shared.weight".to_owned(), vec![1, 5], false),
        ("model.norm.weight".to_owned(), vec![5], true),
    ])
}

fn layout() -> Layout {
    layout_of(3)
}

/// A trained state at `step`, and its step in the state.
struct Run {
    layout: Layout,
    params: Vec<f32>,
    optimizer: Optimizer,
    ema: Vec<f32>,
    state: Value,
    fingerprints: Map<String, Value>,
    step: u64,
}

impl Run {
    fn at(step: u64) -> Self {
        let layout = layout();
        let mut params = vec![0.0; layout.len()];
        let mut grads = params.clone();
        for (_, param) in layout.iter() {
            for i in (0..param.count).flat_map(|i| param.range(i)) {
                (params[i], grads[i]) = ((i as f32).sin(), (i as f32 + step as f32).cos());
            }
        }
        grads[layout.get(EXPERTS).unwrap().range(1)].fill(0.0);
        let mut optimizer = Optimizer::new(Kind::AdamW, Settings::default(), &layout);
        (0..3).for_each(|_| drop(optimizer.step(&layout, &mut params, &grads, &Rates::uniform(&layout, 0.01))));
        params[0] = -0.0;
        params[1] = f32::from_bits(1); // the smallest number there is
        let ema = params.iter().map(|x| x * 0.5).collect();
        let state = json!({ "step": step, "large": u64::MAX, "third": 1.0 / 3.0, "tiny": 5e-324, "list": [0.1, -0.0] });
        let fingerprints = Map::from_iter([("config".to_owned(), json!("abc"))]);
        Run { layout, params, optimizer, ema, state, fingerprints, step }
    }

    fn contents(&self) -> Contents<'_> {
        Contents {
            step: self.step,
            layout: &self.layout,
            params: &self.params,
            optimizer: self.optimizer.state(),
            ema: Some(&self.ema),
            state: &self.state,
            tokenizer: &[b'{', b'}', 0xff],
            config: "{\"hidden_size\": 5}",
            fingerprints: &self.fingerprints,
        }
    }

    fn save(&self, folder: &TempDir, keep: usize) -> PathBuf {
        save(&System, folder.path(), &self.contents(), keeping(keep)).unwrap()
    }
}

fn keeping(keep: usize) -> Retention {
    Retention { keep, ..Retention::default() }
}

fn bits(numbers: &[f32]) -> Vec<u32> {
    numbers.iter().map(|x| x.to_bits()).collect()
}

fn names(folder: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        fs::read_dir(folder).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// Overwrites one byte in place.
fn put(file: &Path, place: usize, byte: u8) {
    let mut file = fs::OpenOptions::new().write(true).open(file).unwrap();
    file.seek(SeekFrom::Start(place as u64)).unwrap();
    file.write_all(&[byte]).unwrap();
}

/// Replaces a file and makes the manifest fit, as an adversary or a bug of ours would.
fn forge(folder: &Path, name: &str, bytes: &[u8]) {
    fs::write(folder.join(name), bytes).unwrap();
    let mut found = read_manifest(&System, folder).unwrap();
    found.files[name] = json!({ "size": bytes.len(), "sha256": crate::data::sha256(bytes) });
    fs::write(folder.join(MANIFEST), manifest(found.step, &found.files, &found.fingerprints)).unwrap();
}

#[test]
fn a_checkpoint_comes_back_to_the_bit() {
    let (folder, run) = (TempDir::new().unwrap(), Run::at(7));
    let path = run.save(&folder, 2);
    assert_eq!(path, folder.path().join("checkpoints/checkpoint-7"));
    let mut expected = FILES.map(str::to_owned).to_vec();
    expected.push(MANIFEST.to_owned());
    expected.sort();
    assert_eq!(names(&path), expected);
    let loaded = load(&path, &run.layout).unwrap();
    assert_eq!(loaded.step, 7);
    assert_eq!(bits(&loaded.params), bits(&run.params));
    assert_eq!(&loaded.optimizer, run.optimizer.state());
    assert_eq!(loaded.optimizer.expert_steps[EXPERTS], [3, 0, 3]);
    for ((_, loaded), (_, saved)) in loaded.optimizer.moments.iter().zip(&run.optimizer.state().moments) {
        assert_eq!(bits(loaded), bits(saved));
    }
    assert_eq!(bits(loaded.ema.as_ref().unwrap()), bits(&run.ema));
    assert_eq!((&loaded.state, &loaded.fingerprints), (&run.state, &run.fingerprints));
    assert_eq!(loaded.state["tiny"].as_f64().unwrap().to_bits(), 1);
    assert!(loaded.state["list"][1].as_f64().unwrap().is_sign_negative());
    assert_eq!((loaded.tokenizer.as_slice(), loaded.config.as_str()), (&[b'{', b'}', 0xff][..], run.contents().config));
    let texts = read_texts(&path).unwrap();
    assert_eq!(
        (texts.step, texts.state, texts.tokenizer, texts.config),
        (7, loaded.state, loaded.tokenizer, loaded.config)
    );
    Optimizer::restore(Kind::AdamW, Settings::default(), &run.layout, loaded.optimizer).unwrap();
}

#[test]
fn the_model_file_is_plain_safetensors_with_nothing_of_the_run() {
    let (folder, run) = (TempDir::new().unwrap(), Run::at(7));
    let bytes = fs::read(run.save(&folder, 1).join(MODEL)).unwrap();
    let (_, header) = safetensors::SafeTensors::read_metadata(&bytes).unwrap();
    let metadata = header.metadata().clone().unwrap();
    assert_eq!(metadata.into_iter().collect::<Vec<_>>(), [("format".to_owned(), "pt".to_owned())]);
    let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    assert_eq!(tensors.tensor(EXPERTS).unwrap().shape(), [3, 5, 7]);
    assert_eq!(tensors.tensor("model.norm.weight").unwrap().shape(), [5]);
    assert_eq!(tensors.tensor("model.layers.0.self_attn.heads.shared.weight").unwrap().shape(), [1, 5]);
    assert_eq!(tensors.iter().map(|(_, t)| t.data().len()).sum::<usize>(), 4 * run.layout.count()); // no padding
    let read = read_weights(&folder.path().join("checkpoints/checkpoint-7").join(MODEL), &run.layout).unwrap();
    assert!(read.iter().zip(&run.params).all(|(read, saved)| read.to_bits() == f64::from(*saved).to_bits()));
}

#[test]
fn f64_weights_of_others_are_read() {
    let (folder, layout) = (TempDir::new().unwrap(), Layout::new([("model.norm.weight".to_owned(), vec![2], true)]));
    let data: Vec<u8> = [1.0 / 3.0, -2.0f64].iter().flat_map(|x| x.to_le_bytes()).collect();
    let view = safetensors::tensor::TensorView::new(safetensors::Dtype::F64, vec![2], &data).unwrap();
    let path = folder.path().join("weights.safetensors");
    fs::write(&path, safetensors::serialize([("model.norm.weight", view)], None).unwrap()).unwrap();
    let read = read_weights(&path, &layout).unwrap();
    assert_eq!(read[..3], [1.0 / 3.0, -2.0, 0.0]);
    assert!(read_weights(&folder.path().join("none"), &layout).unwrap_err().to_string().contains("none"));
    let error = read_weights(&path, &run_layout_with_norm(3)).unwrap_err().to_string();
    assert!(error.contains("model.norm.weight has shape [2] but the run needs [3]"), "{error}");
}

fn run_layout_with_norm(width: usize) -> Layout {
    Layout::new([("model.norm.weight".to_owned(), vec![width], true)])
}

#[test]
fn equal_states_give_equal_bytes() {
    let (a, b, run) = (TempDir::new().unwrap(), TempDir::new().unwrap(), Run::at(7));
    let (a, b) = (run.save(&a, 1), run.save(&b, 1));
    for name in FILES.iter().chain([&MANIFEST]) {
        assert_eq!(fs::read(a.join(name)).unwrap(), fs::read(b.join(name)).unwrap(), "{name}");
    }
}

#[test]
fn a_flipped_bit_anywhere_in_any_file_is_detected() {
    let (folder, run) = (TempDir::new().unwrap(), Run::at(7));
    let path = run.save(&folder, 1);
    for name in FILES.iter().chain([&MANIFEST]) {
        let file = path.join(name);
        let bytes = fs::read(&file).unwrap();
        let all = *name == MANIFEST || bytes.len() < 200;
        let places = if all { 0..bytes.len() } else { 0..60 };
        for place in places.map(|i| if all { i } else { i * (bytes.len() - 1) / 59 }) {
            for bit in 0..8 {
                put(&file, place, bytes[place] ^ (1 << bit));
                let error = load(&path, &run.layout).unwrap_err();
                assert!(matches!(error, CheckpointError::Damaged { .. }), "{name} byte {place} bit {bit}: {error}");
                assert!(error.to_string().contains(name), "{error}");
            }
            put(&file, place, bytes[place]);
        }
        assert!(load(&path, &run.layout).is_ok());
    }
}

#[test]
fn truncated_grown_missing_and_strange_files_are_named() {
    let (folder, run) = (TempDir::new().unwrap(), Run::at(7));
    let path = run.save(&folder, 1);
    for name in FILES.iter().chain([&MANIFEST]) {
        let file = path.join(name);
        let bytes = fs::read(&file).unwrap();
        let refused = |why: &str| {
            let error = load(&path, &run.layout).unwrap_err();
            assert!(matches!(error, CheckpointError::Damaged { .. }), "{name} {why}: {error}");
            assert!(error.to_string().contains(name), "{name} {why}: {error}");
        };
        for length in [0, 1, bytes.len() / 2, bytes.len() - 1] {
            fs::write(&file, &bytes[..length]).unwrap();
            refused("truncated");
        }
        fs::write(&file, [bytes.as_slice(), &[0]].concat()).unwrap();
        refused("grown");
        fs::write(&file, vec![0; bytes.len()]).unwrap();
        refused("zeros, as after a power cut");
        fs::remove_file(&file).unwrap();
        refused("missing");
        fs::create_dir(&file).unwrap();
        refused("a folder");
        fs::remove_dir(&file).unwrap();
        fs::write(&file, &bytes).unwrap();
    }
    assert!(load(&path, &run.layout).is_ok());
    let error = load(&folder.path().join("checkpoints/checkpoint-8"), &run.layout).unwrap_err().to_string();
    assert!(error.contains("checkpoint-8") && error.contains("missing"), "{error}");
}

#[test]
fn swapped_experts_are_detected() {
    let (folder, run) = (TempDir::new().unwrap(), Run::at(7));
    let path = run.save(&folder, 1);
    let bytes = fs::read(path.join(MODEL)).unwrap();
    let param = run.layout.get(EXPERTS).unwrap();
    let expert = |i: usize| run.params[param.range(i)].iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>();
    let place = bytes.windows(expert(0).len()).position(|window| window == expert(0)).unwrap();
    let swapped = [&bytes[..place], &expert(1), &expert(0), &bytes[place + 2 * expert(0).len()..]].concat();
    assert_eq!(swapped.len(), bytes.len());
    fs::write(path.join(MODEL), swapped).unwrap();
    let error = load(&path, &run.layout).unwrap_err().to_string();
    assert!(error.contains("sha256") && error.contains(MODEL), "{error}");
}

#[test]
fn files_that_fit_their_hash_but_are_wrong_are_refused_without_panic() {
    let (folder, run) = (TempDir::new().unwrap(), Run::at(7));
    let path = run.save(&folder, 1);
    let refused = |name: &str, bytes: &[u8], why: &str| {
        let before = fs::read(path.join(name)).unwrap();
        forge(&path, name, bytes);
        let error = load(&path, &run.layout).unwrap_err().to_string();
        assert!(error.contains(name) && error.contains(why), "{name}: {error}");
        forge(&path, name, &before);
    };
    let header = |text: &str, data: usize| {
        let mut bytes = (text.len() as u64).to_le_bytes().to_vec();
        bytes.extend_from_slice(text.as_bytes());
        bytes.resize(bytes.len() + data, 0);
        bytes
    };
    for name in [MODEL, OPTIMIZER] {
        refused(name, b"", "shorter than");
        refused(name, &u64::MAX.to_le_bytes(), "a header of");
        refused(name, &100u64.to_le_bytes(), "longer than the file");
        refused(name, &header("[]", 0), "bad header");
        refused(name, &header("{\"a\":1}", 0), "bad header");
        let twice = "\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]}";
        refused(name, &header(&format!("{{{twice},{twice}}}"), 4), "two tensors are called \"a\"");
        let huge = "{\"a\":{\"dtype\":\"F32\",\"shape\":[9223372036854775807,4],\"data_offsets\":[0,4]}}";
        refused(name, &header(huge, 4), "bad header");
        let hole = "{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[4,8]}}";
        refused(name, &header(hole, 8), "bad header");
        refused(name, &header("{}", 0), "is missing");
        refused(name, &header(&format!("{{{twice}}}"), 4), "which the run does not have");
        let nested = format!("{{\"a\":{}{}}}", "[".repeat(100_000), "]".repeat(100_000));
        refused(name, &header(&nested, 0), "");
    }
    let mut wrong_dtype = Vec::new();
    let (layout, state) = (Layout::default(), State::default());
    let empty = tensors::optimizer(&layout, &state, None).unwrap();
    empty
        .write(&mut |piece| {
            wrong_dtype.extend_from_slice(piece);
            Ok(())
        })
        .unwrap();
    refused(OPTIMIZER, &wrong_dtype, "is missing");
    refused(STATE, b"{\"step\": ", "no JSON");
    refused(STATE, "[".repeat(100_000).as_bytes(), "no JSON");
    refused(CONFIG, &[0xff], "utf-8");
    assert!(load(&path, &run.layout).is_ok());
}

#[test]
fn a_checkpoint_of_another_model_is_refused_with_the_difference() {
    let (folder, run) = (TempDir::new().unwrap(), Run::at(7));
    let path = run.save(&folder, 1);
    let refused = |layout: &Layout| {
        let error = load(&path, layout).unwrap_err();
        assert!(matches!(error, CheckpointError::Foreign { .. }), "{error}");
        assert!(error.to_string().contains("checkpoint of another model"), "{error}");
        error.to_string()
    };
    let error = refused(&layout_of(4));
    assert!(error.contains(&format!("{EXPERTS} has shape [3, 5, 7] but the run needs [4, 5, 7]")), "{error}");
    let with = |name: &str| {
        let all = layout();
        let tensors = all.iter().map(|(name, param)| (name.to_owned(), crate::layers::shape(name, param), true));
        Layout::new(tensors.chain([(name.to_owned(), vec![11, 5], true)]).collect::<Vec<_>>())
    };
    assert!(refused(&with("lm_head.weight")).contains("lm_head.weight is missing"));
    let without = Layout::new([("model.norm.weight".to_owned(), vec![5], true)]);
    assert!(refused(&without).contains("which the run does not have"));
    // The same numbers, transposed.
    let all = layout();
    let transposed = all.iter().map(|(name, param)| {
        let mut shape = crate::layers::shape(name, param);
        if name == "model.embed_tokens.weight" {
            shape.reverse();
        }
        (name.to_owned(), shape, true)
    });
    assert!(refused(&Layout::new(transposed.collect::<Vec<_>>())).contains("[11, 5] but the run needs [5, 11]"));
}

#[test]
fn the_format_of_a_newer_program_is_named() {
    let (folder, run) = (TempDir::new().unwrap(), Run::at(7));
    let path = run.save(&folder, 1);
    fs::write(path.join(MANIFEST), seal(json!({ "format": 7, "other": true }))).unwrap();
    let error = TrainError::from(load(&path, &run.layout).unwrap_err());
    let sentence = "MANIFEST.json was written by a newer moe_lab (format 7, this one reads 1): update moe_lab";
    assert!(error.exit_status() == 2 && error.to_string().ends_with(sentence), "{error}");
    assert!(newest_whole(folder.path()).is_err()); // not damage: it must not be skipped in silence
}

#[test]
fn state_that_is_not_finite_is_not_saved() {
    let folder = TempDir::new().unwrap();
    for value in [f32::NAN, f32::INFINITY] {
        let mut run = Run::at(7);
        run.params[run.layout.get(EXPERTS).unwrap().range(2).start] = value;
        let error = save(&System, folder.path(), &run.contents(), keeping(2)).unwrap_err().to_string();
        assert!(error.contains(EXPERTS) && error.contains("nothing was saved"), "{error}");
        let run = Run::at(7);
        let mut state = run.optimizer.state().clone();
        state.moments[1].1[0] = value;
        let error = save(&System, folder.path(), &Contents { optimizer: &state, ..run.contents() }, keeping(2))
            .unwrap_err()
            .to_string();
        assert!(error.contains("exp_avg_sq"), "{error}");
    }
    assert!(names(folder.path()).is_empty());
}

#[test]
fn resume_falls_back_over_damage_by_step_number_and_says_why() {
    let folder = TempDir::new().unwrap();
    assert_eq!(newest_whole(folder.path()).unwrap(), Newest::default());
    for step in [9, 10, 100] {
        Run::at(step).save(&folder, 10);
    }
    let place = |name: &str| folder.path().join("checkpoints").join(name);
    fs::create_dir(place(".tmp-200-1-0")).unwrap(); // a killed save
    fs::create_dir(place("checkpoint-0300")).unwrap(); // not a name of ours
    fs::create_dir(place("checkpoint-400.bad")).unwrap();
    let newest = newest_whole(folder.path()).unwrap();
    assert_eq!((newest.path, newest.skipped), (Some(place("checkpoint-100")), vec![]));
    fs::write(place("checkpoint-100").join(STATE), "{}").unwrap();
    fs::remove_file(place("checkpoint-10").join(MANIFEST)).unwrap();
    fs::create_dir(place("checkpoint-500")).unwrap();
    let newest = newest_whole(folder.path()).unwrap();
    assert_eq!(newest.path, Some(place("checkpoint-9")));
    let skipped: Vec<&PathBuf> = newest.skipped.iter().map(|(path, _)| path).collect();
    assert_eq!(skipped, [&place("checkpoint-500"), &place("checkpoint-100"), &place("checkpoint-10")]);
    assert!(newest.skipped[1].1.contains("state.json") && newest.skipped[2].1.contains("MANIFEST.json"));
    for (path, _) in &newest.skipped {
        set_aside(&System, path).unwrap();
    }
    assert!(place("checkpoint-100.bad").is_dir());
    assert_eq!(list(folder.path()).unwrap(), [(9, place("checkpoint-9"))]);
    // A copy under another step is not that step's checkpoint.
    fs::rename(place("checkpoint-9"), place("checkpoint-11")).unwrap();
    let newest = newest_whole(folder.path()).unwrap();
    assert!(newest.path.is_none() && newest.skipped[0].1.contains("step 9"), "{newest:?}");
}

#[test]
fn the_newest_whole_are_kept_with_the_chosen_and_leftovers_go() {
    let folder = TempDir::new().unwrap();
    let checkpoints = folder.path().join("checkpoints");
    let save = |step, retention| save(&System, folder.path(), &Run::at(step).contents(), retention).unwrap();
    let retention = Retention { keep: 2, best: Some(1), resumed: Some(3), keep_every: 5 };
    for step in [1, 2, 3, 5] {
        save(step, Retention { keep: 9, ..retention });
    }
    fs::create_dir(checkpoints.join(".tmp-3-1-0")).unwrap();
    fs::create_dir(checkpoints.join("checkpoint-0.bad")).unwrap();
    for step in [9, 11, 12] {
        save(step, retention);
    }
    let expected = [
        "checkpoint-0.bad",
        "checkpoint-1",
        "checkpoint-11",
        "checkpoint-12",
        "checkpoint-3",
        "checkpoint-5",
        "latest",
    ];
    assert_eq!(names(&checkpoints), expected);
    assert_eq!(fs::read_link(checkpoints.join("latest")).unwrap(), Path::new("checkpoint-12"));
    // Damaged folders do not count: the last whole one stays.
    for (step, name) in [(11, STATE), (12, MODEL)] {
        fs::remove_file(checkpoints.join(folder_name(step)).join(name)).unwrap();
    }
    save(13, keeping(2));
    assert!(names(&checkpoints).contains(&"checkpoint-5".to_owned()));
    save(14, keeping(0));
    assert_eq!(newest_whole(folder.path()).unwrap().path, Some(checkpoints.join("checkpoint-14")));
}

#[test]
fn files_are_those_of_the_safetensors_crate_and_their_size_is_known_before() {
    let (folder, run) = (TempDir::new().unwrap(), Run::at(7));
    let contents = run.contents();
    let path = run.save(&folder, 2);
    let written = fs::read(path.join(OPTIMIZER)).unwrap();
    let read = safetensors::SafeTensors::deserialize(&written).unwrap();
    let metadata = std::collections::HashMap::from([("format".to_owned(), "pt".to_owned())]);
    assert_eq!(safetensors::serialize(read.tensors(), Some(metadata)).unwrap(), written);
    let total: u64 = fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().metadata().unwrap().len()).sum();
    let known = size(&contents).unwrap();
    assert!((total..total + 8192).contains(&known), "{known} {total}");
}

#[test]
fn a_step_that_is_there_is_done_if_whole_and_set_aside_if_not() {
    let (folder, run) = (TempDir::new().unwrap(), Run::at(7));
    let path = run.save(&folder, 2);
    let checkpoints = folder.path().join("checkpoints");
    fs::write(path.join("note"), "mine").unwrap();
    run.save(&folder, 2);
    assert!(path.join("note").exists()); // untouched
    fs::write(path.join(STATE), "{}").unwrap();
    run.save(&folder, 2);
    assert!(load(&path, &run.layout).is_ok() && !path.join("note").exists());
    assert!(checkpoints.join("checkpoint-7.bad/note").exists());
    let mut other = Run::at(7);
    other.params[5] += 1.0;
    other.save(&folder, 2);
    assert_eq!(load(&path, &run.layout).unwrap().params[5], other.params[5]);
    assert!(checkpoints.join("checkpoint-7.bad-2").is_dir());
}

#[test]
fn a_save_that_fails_names_the_path_and_leaves_no_trace() {
    let (folder, run) = (TempDir::new().unwrap(), Run::at(7));
    fs::write(folder.path().join("checkpoints"), "a file in the way").unwrap();
    let error = save(&System, folder.path(), &run.contents(), keeping(2)).unwrap_err().to_string();
    assert!(error.contains("checkpoints") && error.contains("untouched"), "{error}");
    assert_eq!(names(folder.path()), ["checkpoints"]);
}

/// The process that [`kill_9_at_any_instant_loses_nothing_that_was_reported`] kills: saves step after step and reports each.
#[test]
#[ignore = "a part of another test"]
fn save_until_killed() {
    let Ok(folder) = std::env::var("MOE_LAB_SAVE_UNTIL_KILLED") else { return };
    let folder = Path::new(&folder);
    let first = list(folder).unwrap().first().map_or(1, |(step, _)| step + 1);
    for step in first..first + 10_000 {
        save(&System, folder, &Run::at(step).contents(), keeping(2)).unwrap();
        println!("saved {step}");
    }
}

#[test]
fn kill_9_at_any_instant_loses_nothing_that_was_reported() {
    let folder = TempDir::new().unwrap();
    let mut acknowledged = 0;
    for round in 0..12u64 {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--ignored", "--nocapture", "--exact", "checkpoint::tests::save_until_killed"])
            .env("MOE_LAB_SAVE_UNTIL_KILLED", folder.path())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines().map_while(Result::ok);
        let mut reported = lines.filter_map(|line| line.split("saved ").nth(1)?.trim().parse::<u64>().ok());
        acknowledged = reported.next().expect("the saver reports its first save").max(acknowledged);
        std::thread::sleep(std::time::Duration::from_micros(700 * round + 130));
        child.kill().unwrap();
        child.wait().unwrap();
        acknowledged = reported.last().unwrap_or(0).max(acknowledged);
        let newest = newest_whole(folder.path()).unwrap();
        assert_eq!(newest.skipped, []);
        let step = load(&newest.path.unwrap(), &layout()).unwrap().step;
        assert!(step >= acknowledged, "step {step} is left of {acknowledged}");
    }
    let last = Run::at(acknowledged + 1000);
    last.save(&folder, 1);
    assert_eq!(names(&folder.path().join("checkpoints")), [folder_name(last.step), "latest".to_owned()]); // nothing stray
}
