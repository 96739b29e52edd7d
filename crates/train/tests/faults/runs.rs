//! A whole run on a disk that fails: it goes on or ends with a sentence, and resumed it ends with the bytes of a run that nothing happened to.

use crate::layer::{Faulty, How, WAYS};
use crate::power::FATES;
use crate::tiny::{finish, memory, outcome, recover_to_the_end, reference, report, run};
use std::fs;
use train::Trainer;

/// Every `stride`-th operation of a run, failing in one way after the other.
fn every_operation(stride: usize) -> usize {
    let folder = memory();
    let counting = Faulty::new(None);
    let out = folder.path().join("count");
    finish(&mut Trainer::new_on(counting.disk(), run(folder.path()), Some(&out), None).unwrap()).unwrap();
    let (total, mut injected) = (counting.count(), 0);
    for (turn, at) in (0..total).step_by(stride).enumerate() {
        // One way for each operation in the short suite, all of them in the long one.
        let ways = if stride == 1 { &WAYS[..] } else { &WAYS[turn % WAYS.len()..turn % WAYS.len() + 1] };
        for how in ways {
            let what = format!("{how:?} at operation {at} of a run");
            let out = folder.path().join("run");
            let _ = fs::remove_dir_all(&out);
            let layer = Faulty::new(Some((at, *how)));
            let ended = Trainer::new_on(layer.disk(), run(folder.path()), Some(&out), None)
                .and_then(|mut trainer| finish(&mut trainer));
            injected += usize::from(layer.fired());
            match ended {
                Ok(()) => {
                    // Saving runs beside the training, so that a run may end before its n-th operation.
                    assert!(!layer.fired() || !matches!(how, How::Die), "{what}: a dead process completed");
                    assert!(outcome(&out) == *reference(), "{what}: completed with other bytes");
                }
                Err(error) => assert!(!error.to_string().is_empty() && error.exit_status() != 0, "{what}: {error}"),
            }
            recover_to_the_end(folder.path(), &out, &what);
        }
    }
    injected
}

#[test]
fn operations_of_a_run_may_fail() {
    report("operations of a run", every_operation(5), 0);
}

#[test]
#[ignore = "full"]
fn every_operation_of_a_run_may_fail_in_every_way() {
    report("every operation of a run", every_operation(1), 0);
}

/// Power cuts over a whole run: every `stride`-th prefix, each resumed to the end.
fn power_cuts(stride: usize) -> usize {
    let folder = memory();
    let out = folder.path().join("run");
    let mut reported = vec![(0, 0)];
    fs::create_dir(&out).unwrap();
    let layer = Faulty::logging(&out);
    let mut trainer = Trainer::new_on(layer.disk(), run(folder.path()), Some(&out), None).unwrap();
    while let Some(row) = trainer.next_row().unwrap() {
        if row.fields().get("event").is_some_and(|event| event == "checkpoint") {
            reported.push((layer.log().ops.len(), row.fields()["step"].as_u64().unwrap()));
        }
    }
    drop(trainer);
    assert!(reported.len() > 2, "the run must save more than once");
    let (log, mut injected) = (layer.log(), 0);
    for (turn, cut) in (0..=log.ops.len()).step_by(stride).enumerate() {
        let fates = if stride == 1 { &FATES[..] } else { &FATES[turn % FATES.len()..turn % FATES.len() + 1] };
        for fate in fates {
            let what = format!("power cut before operation {cut} of a run, {fate:?}");
            let left = folder.path().join("left");
            let _ = fs::remove_dir_all(&left);
            fs::create_dir(&left).unwrap();
            log.replay(cut, *fate, &left);
            let newest = train::checkpoint::newest_whole(&left).unwrap_or_else(|error| panic!("{what}: {error}"));
            let step = newest.path.map_or(0, |path| train::checkpoint::verify(&path).unwrap());
            let told = reported.iter().rfind(|(done, _)| *done <= cut).unwrap().1;
            assert!(step >= told, "{what}: {told} was reported but {step} is left");
            recover_to_the_end(folder.path(), &left, &what);
            injected += 1;
        }
    }
    injected
}

#[test]
fn power_cuts_during_a_run_lose_nothing() {
    report("power cuts during a run", power_cuts(6), 0);
}

#[test]
#[ignore = "full"]
fn power_cuts_at_every_operation_of_a_run_lose_nothing() {
    report("power cuts at every operation of a run", power_cuts(1), 0);
}

#[test]
fn a_full_disk_is_told_the_run_goes_on_and_three_misses_end_it() {
    let folder = memory();
    let out = folder.path().join("run");
    let full = std::io::ErrorKind::StorageFull;
    let layer = Faulty::new(Some((90, How::From(full))));
    let mut trainer = Trainer::new_on(layer.disk(), run(folder.path()), Some(&out), None).unwrap();
    let mut events = Vec::new();
    let error = loop {
        match trainer.next_row() {
            Ok(Some(row)) => events.extend(row.fields().get("event").and_then(|e| e.as_str()).map(str::to_owned)),
            Ok(None) => panic!("the run must not complete"),
            Err(error) => break error,
        }
    };
    assert!(events.iter().filter(|event| *event == "checkpoint_failed").count() >= 2, "{events:?}");
    assert_eq!(events.iter().filter(|event| *event == "disk").count(), 1, "{events:?}");
    assert_eq!(error.exit_status(), 1);
    assert!(error.to_string().contains("E-DISK") && error.to_string().contains("3 saves in a row"), "{error}");
    drop(trainer);
    recover_to_the_end(folder.path(), &out, "full disk");
    report("full disk to the third miss", 1, 0);
}

#[test]
fn a_slow_disk_does_not_hold_up_the_training() {
    let folder = memory();
    let out = folder.path().join("run");
    let layer = Faulty::new(Some((0, How::Slow(25))));
    let mut trainer = Trainer::new_on(layer.disk(), run(folder.path()), Some(&out), None).unwrap();
    let (mut saved, mut updates, mut most, mut saves) = (0, 0, 0, 0);
    while let Some(row) = trainer.next_row().unwrap() {
        if row.fields()["kind"] == "train" {
            updates += 1;
            most = most.max(updates - saved);
        }
        if row.fields().get("event").is_some_and(|event| event == "checkpoint") {
            (saved, saves) = (updates, saves + 1);
        }
    }
    drop(trainer);
    // The save of update 3 takes more than a quarter of a second. Updates 4 to 8 went on, the save due at 6 was put off, the last one came.
    assert!(updates == 8 && most > 6 && saves == 2, "{updates} updates, {most} without a save, {saves} saves");
    assert!(outcome(&out) == *reference(), "a slow disk changes no byte");
    report("slow disk", 1, 0);
}
