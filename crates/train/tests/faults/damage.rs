//! Bits flipped, files cut, swapped, missing: the run falls back to an older whole checkpoint, says why, and ends with the right bytes.

use crate::tiny::{checkpoints, finish, memory, recover_to_the_end, report, run};
use std::fs;
use std::path::Path;
use train::Trainer;

const KINDS: [&str; 6] =
    ["model.safetensors", "optimizer.safetensors", "state.json", "tokenizer.json", "config.json", "MANIFEST.json"];

fn copy(from: &Path, to: &Path) {
    let _ = fs::remove_dir_all(to);
    fs::create_dir(to).unwrap();
    for entry in fs::read_dir(from).unwrap().map(|entry| entry.unwrap()) {
        let (kind, target) = (entry.file_type().unwrap(), to.join(entry.file_name()));
        match (kind.is_dir(), kind.is_symlink()) {
            (true, _) => copy(&entry.path(), &target),
            (_, true) => std::os::unix::fs::symlink(fs::read_link(entry.path()).unwrap(), target).unwrap(),
            _ => drop(fs::copy(entry.path(), target).unwrap()),
        }
    }
}

/// A run that stopped with several checkpoints and unfinished work.
fn stopped(folder: &Path) -> std::path::PathBuf {
    let out = folder.join("stopped");
    let mut trainer = Trainer::new(run(folder), Some(&out), None).unwrap();
    while trainer.step_count() < 4 {
        trainer.next_row().unwrap();
    }
    trainer.stop("here").unwrap();
    drop(trainer);
    assert!(checkpoints(&out).len() >= 2);
    out
}

fn damage(file: &Path, older: &Path, turn: usize) {
    let mut bytes = fs::read(file).unwrap();
    let place = (turn * 7919 + 13) % bytes.len();
    match turn % 6 {
        0 => bytes[place] ^= 1 << (turn / 6 % 8),
        1 => bytes.truncate(place),
        2 => bytes.push(0),
        3 => bytes.fill(0),
        4 => return fs::remove_file(file).unwrap(),
        _ => {
            // Another checkpoint's file; one that is the same in all of them is no damage, so a bit is flipped too.
            let other = fs::read(older).unwrap();
            bytes = if other == bytes { other.iter().map(|byte| byte ^ 1).collect() } else { other };
        }
    }
    fs::write(file, bytes).unwrap();
}

fn damaged(turns: usize) -> usize {
    let folder = memory();
    let whole = stopped(folder.path());
    for turn in 0..turns {
        let out = folder.path().join("run");
        copy(&whole, &out);
        let [newest, older, ..] = &checkpoints(&out)[..] else { panic!("two checkpoints") };
        let kind = KINDS[turn / 6 % KINDS.len()];
        damage(&newest.join(kind), &older.join(kind), turn);
        let what = format!("damage {turn} to {kind}");
        let trainer = Trainer::resume(&out).unwrap_or_else(|error| panic!("{what}: {error}"));
        let notes = trainer.notes().join("\n");
        assert!(notes.contains("skipped") && notes.contains(kind) && notes.contains(".bad"), "{what}: {notes}");
        assert!(newest.with_extension("bad").is_dir() && !newest.exists(), "{what}");
        drop(trainer);
        recover_to_the_end(folder.path(), &out, &what);
    }
    turns
}

#[test]
fn every_kind_of_file_damaged_in_every_way_is_seen() {
    report("damaged files", damaged(36), 0);
}

#[test]
#[ignore = "full"]
fn many_places_of_every_file_are_seen() {
    report("damaged files, many places", damaged(360), 0);
}

#[test]
fn all_checkpoints_damaged_is_a_start_from_the_beginning_with_the_same_end() {
    let folder = memory();
    let out = stopped(folder.path());
    let all = checkpoints(&out);
    for path in &all {
        fs::write(path.join("MANIFEST.json"), "{}").unwrap();
    }
    recover_to_the_end(folder.path(), &out, "all damaged");
    report("all checkpoints damaged", all.len(), 0);
}

#[test]
fn torn_and_foreign_lines_leave_the_stream_and_are_kept_beside_it() {
    let folder = memory();
    let whole = stopped(folder.path());
    let tails: [&[u8]; 5] =
        [b"{\"step\":4,\"train/lo", b"\0\0\0\0", b"{\"step\":4}", b"not json\n", b"{\"step\":99,\"kind\":\"train\"}\n"];
    for tail in tails {
        let out = folder.path().join("run");
        copy(&whole, &out);
        for stream in ["metrics.jsonl", "samples.jsonl"] {
            let mut bytes = fs::read(out.join(stream)).unwrap();
            bytes.extend_from_slice(tail);
            fs::write(out.join(stream), bytes).unwrap();
        }
        recover_to_the_end(folder.path(), &out, "torn stream");
        assert!(out.join("metrics.pruned.jsonl").is_file());
    }
    report("torn streams", 2 * tails.len(), 0);
}

#[test]
fn a_damaged_record_or_run_file_is_named_and_nothing_is_changed() {
    let folder = memory();
    let whole = stopped(folder.path());
    let mut injected = 0;
    for name in ["run.json", "run.toml"] {
        for bytes in [&b""[..], b"{", b"\xff\xfe", b"seed = [", b"[]"] {
            let out = folder.path().join("run");
            copy(&whole, &out);
            fs::write(out.join(name), bytes).unwrap();
            if name == "run.toml" && bytes.is_empty() {
                continue; // an empty run file is a run of defaults: other data, refused below
            }
            let error = Trainer::resume(&out).err().unwrap_or_else(|| panic!("{name} {bytes:?} was accepted"));
            assert!(error.to_string().contains(name), "{error}");
            fs::copy(whole.join(name), out.join(name)).unwrap();
            recover_to_the_end(folder.path(), &out, name);
            injected += 1;
        }
    }
    report("damaged run.json and run.toml", injected, 0);
}

#[test]
fn a_run_of_a_newer_program_is_refused_in_one_sentence_and_left_as_it_is() {
    let folder = memory();
    let out = stopped(folder.path());
    let record = fs::read_to_string(out.join("run.json")).unwrap();
    fs::write(out.join("run.json"), record.replace("\"format\": 1", "\"format\": 2")).unwrap();
    // A key that this program does not know, as a newer one may write it.
    let run_file = fs::read_to_string(out.join("run.toml")).unwrap();
    fs::write(out.join("run.toml"), format!("tomorrow = 1\n{run_file}")).unwrap();
    let refused = [
        Trainer::resume(&out).err().unwrap(),
        train::trained::Trained::load(&out, None).err().unwrap(),
        train::reproduce::Original::read(&out).err().unwrap(),
    ];
    for error in refused {
        let sentence = "run.json was written by a newer moe_lab (format 2, this one reads 1): update moe_lab";
        assert!(error.exit_status() == 2 && error.to_string().ends_with(sentence), "{error}");
    }
    fs::write(out.join("run.json"), record).unwrap();
    fs::write(out.join("run.toml"), run_file).unwrap();
    recover_to_the_end(folder.path(), &out, "a newer program");
}

#[test]
fn a_completed_run_stays_as_it_is() {
    let folder = memory();
    let out = folder.path().join("run");
    finish(&mut Trainer::new(run(folder.path()), Some(&out), None).unwrap()).unwrap();
    let trainer = Trainer::resume(&out).unwrap();
    assert!(trainer.done());
    assert!(Trainer::resume(&out).err().unwrap().to_string().contains("in use by process"));
    report("second opener of a run", 1, 0);
}
