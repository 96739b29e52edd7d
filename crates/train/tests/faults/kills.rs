//! Real processes: killed at random and at every operation, told to stop, two on one run, on disks that are full, read-only or gone.

use crate::layer::{Faulty, How};
use crate::tiny::{self, checkpoints, finish, outcome, recover_to_the_end, report};
use std::fs;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};
use tempfile::TempDir;
use train::Trainer;

const MOE_LAB: &str = env!("CARGO_BIN_EXE_moe-lab");

/// Epochs of a run that takes long enough to be hit (two phases, four updates an epoch).
const LONG: u64 = 60;

fn command(folder: &Path, out: &Path, epochs: u64) -> Command {
    let mut command = Command::new(MOE_LAB);
    command.args(["baseline", "--out"]).arg(out);
    for set in tiny::sets(folder, epochs) {
        command.args(["--set", &set]);
    }
    quiet(command)
}

fn resume(out: &Path) -> Command {
    let mut command = Command::new(MOE_LAB);
    command.arg("resume").arg(out);
    quiet(command)
}

fn quiet(mut command: Command) -> Command {
    command.stdout(Stdio::null()).stderr(Stdio::piped());
    command
}

fn said(child: Child) -> (ExitStatus, String) {
    let output = child.wait_with_output().unwrap();
    (output.status, String::from_utf8_lossy(&output.stderr).into_owned())
}

/// Steps whose checkpoint was reported in the stream.
fn acknowledged(out: &Path) -> u64 {
    let text = fs::read_to_string(out.join("metrics.jsonl")).unwrap_or_default();
    let rows = text.lines().filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok());
    rows.filter(|row| row["event"] == "checkpoint").filter_map(|row| row["step"].as_u64()).max().unwrap_or(0)
}

fn newest(out: &Path) -> u64 {
    let found = train::checkpoint::newest_whole(out).unwrap();
    assert_eq!(found.skipped, []);
    found.path.map_or(0, |path| train::checkpoint::verify(&path).unwrap())
}

/// Waits until the run has come `rows` lines far.
fn wait_for(out: &Path, rows: usize, child: &mut Child) {
    let start = Instant::now();
    while fs::read_to_string(out.join("metrics.jsonl")).unwrap_or_default().lines().count() < rows {
        assert!(child.try_wait().unwrap().is_none(), "the run ended too early");
        assert!(start.elapsed() < Duration::from_secs(60), "the run does not start");
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn send(signal: &str, child: &Child) {
    let sent = Command::new("kill").args([signal, &child.id().to_string()]).status().unwrap();
    assert!(sent.success());
}

/// The same long run, straight.
fn straight(folder: &Path) -> tiny::Outcome {
    let out = folder.join("straight");
    assert!(command(folder, &out, LONG).status().unwrap().success());
    outcome(&out)
}

/// Kills one run after another at random times until `kills` processes were killed, each run again and again until it completes.
fn random_kills(kills: usize) {
    let folder = TempDir::new().unwrap();
    let straight = straight(folder.path());
    let (mut done, mut runs, mut random) = (0, 0, 12345u64);
    while done < kills {
        let out = folder.path().join(format!("run-{runs}"));
        runs += 1;
        let mut child = command(folder.path(), &out, LONG).spawn().unwrap();
        let mut within = 0;
        loop {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            // After ten kills within one run it may end.
            let wait = if within < 10 { 5 + (random >> 33) % 120 } else { 100_000 };
            let start = Instant::now();
            while start.elapsed() < Duration::from_millis(wait) && child.try_wait().unwrap().is_none() {
                std::thread::sleep(Duration::from_micros(300));
            }
            let over = child.try_wait().unwrap().is_some();
            let _ = child.kill();
            let (status, text) = said(child);
            if over {
                assert!(status.success(), "{status}: {text}");
                break;
            }
            (done, within) = (done + 1, within + 1);
            if out.join("run.json").exists() {
                assert!(newest(&out) >= acknowledged(&out), "kill {done}: a reported checkpoint is gone");
                child = resume(&out).spawn().unwrap();
            } else {
                let _ = fs::remove_dir_all(&out);
                child = command(folder.path(), &out, LONG).spawn().unwrap();
            }
        }
        assert!(outcome(&out) == straight, "run {runs}: other bytes than the straight run");
        fs::remove_dir_all(&out).unwrap();
    }
    report("kill -9 at random times", done, done);
}

#[test]
fn kill_9_at_random_times() {
    random_kills(20);
}

#[test]
#[ignore = "full"]
fn kill_9_at_many_random_times() {
    random_kills(220);
}

/// The process of [`kills_at`]: a run on a disk whose operation MOE_LAB_KILL_AT is a SIGKILL.
#[test]
#[ignore = "a part of another test"]
fn run_until_killed() {
    let (Ok(folder), Ok(at)) = (std::env::var("MOE_LAB_KILL_IN"), std::env::var("MOE_LAB_KILL_AT")) else { return };
    let folder = Path::new(&folder);
    let layer = Faulty::new(Some((at.parse().unwrap(), How::Kill)));
    let run = tiny::run(folder);
    finish(&mut Trainer::new_on(layer.disk(), run, Some(&folder.join("run")), None).unwrap()).unwrap();
}

/// Kills a process at every `stride`-th operation of a run, from its first file to its last.
fn kills_at(stride: usize) {
    let folder = tiny::memory(); // a kill loses nothing that was written, only what was not
    let mut kills = 0;
    for at in (0..).step_by(stride) {
        let out = folder.path().join("run");
        let _ = fs::remove_dir_all(&out);
        let status = Command::new(std::env::current_exe().unwrap())
            .args(["--ignored", "--exact", "kills::run_until_killed"])
            .env("MOE_LAB_KILL_IN", folder.path())
            .env("MOE_LAB_KILL_AT", at.to_string())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status()
            .unwrap();
        if status.success() {
            break; // the run has fewer operations
        }
        kills += 1;
        if out.join("metrics.jsonl").exists() {
            assert!(newest(&out) >= acknowledged(&out), "kill at operation {at}: a reported checkpoint is gone");
        }
        recover_to_the_end(folder.path(), &out, &format!("kill at operation {at}"));
    }
    report("kill -9 at operations of a run", kills, kills);
}

#[test]
fn kill_9_at_operations_of_a_run() {
    kills_at(11);
}

#[test]
#[ignore = "full"]
fn kill_9_at_every_operation_of_a_run() {
    kills_at(1);
}

#[test]
fn signals_end_a_run_after_a_whole_checkpoint() {
    let folder = TempDir::new().unwrap();
    let straight = straight(folder.path());
    let mut injected = 0;
    for (signal, code) in [("-INT", 130), ("-TERM", 143)] {
        for rows in [4, 60, 150] {
            let out = folder.path().join(format!("run{signal}{rows}"));
            let mut child = command(folder.path(), &out, LONG).spawn().unwrap();
            wait_for(&out, rows, &mut child);
            send(signal, &child);
            let (status, text) = said(child);
            assert_eq!(status.code(), Some(code), "{text}");
            assert!(text.contains("is complete; go on with"), "{text}");
            let record = fs::read_to_string(out.join("run.json")).unwrap();
            assert!(record.contains("\"stopped\"") && newest(&out) > 0);
            assert!(resume(&out).status().unwrap().success());
            assert!(outcome(&out) == straight, "{signal} after {rows} rows");
            injected += 1;
        }
    }
    // SIGUSR1 saves and goes on; the run saves nowhere else.
    let out = folder.path().join("run-usr1");
    let mut child = command(folder.path(), &out, LONG).args(["--set", "checkpoint.every=0"]).spawn().unwrap();
    wait_for(&out, 20, &mut child);
    send("-USR1", &child);
    let (status, text) = said(child);
    assert!(status.success(), "{text}");
    assert_eq!(checkpoints(&out).len(), 2, "one asked for, one at the end");
    // The second SIGINT ends the process at once, and what was saved stays.
    for pause in [0, 1, 3] {
        let out = folder.path().join(format!("run-twice{pause}"));
        let mut child = command(folder.path(), &out, LONG).spawn().unwrap();
        wait_for(&out, 30, &mut child);
        send("-INT", &child);
        std::thread::sleep(Duration::from_millis(pause));
        let _ = Command::new("kill").args(["-INT", &child.id().to_string()]).stderr(Stdio::null()).status();
        let (status, text) = said(child);
        assert_eq!(status.code(), Some(130), "{text}");
        assert!(newest(&out) >= acknowledged(&out));
        assert!(resume(&out).status().unwrap().success());
        assert!(outcome(&out) == straight, "twice SIGINT");
        injected += 1;
    }
    report("signals", injected + 1, 0);
}

#[test]
fn the_second_process_on_a_run_is_told_who_has_it() {
    let folder = TempDir::new().unwrap();
    let out = folder.path().join("run");
    let mut child = command(folder.path(), &out, LONG).spawn().unwrap();
    wait_for(&out, 3, &mut child);
    let (status, text) = said(resume(&out).spawn().unwrap());
    assert_eq!(status.code(), Some(1), "{text}");
    assert!(text.contains("E-LOCK") && text.contains(&format!("process {}", child.id())), "{text}");
    let (status, text) = said(command(folder.path(), &out, LONG).spawn().unwrap());
    assert_eq!(status.code(), Some(2), "{text}");
    assert!(said(child).0.success());
    report("two processes on one run", 2, 0);
}

/// The library that shows a process another time (Debian package faketime).
fn faketime() -> Option<std::path::PathBuf> {
    let places = fs::read_dir("/usr/lib").ok()?.filter_map(|place| Some(place.ok()?.path()));
    places.map(|place| place.join("faketime/libfaketimeMT.so.1")).find(|library| library.exists())
}

#[test]
fn a_clock_that_jumps_by_twenty_years_changes_no_byte() {
    let Some(library) = faketime() else {
        return println!("SKIPPED (faketime is not installed): clock jumps in a run");
    };
    let folder = TempDir::new().unwrap();
    let (out, clock) = (folder.path().join("run"), folder.path().join("clock"));
    let jump = |to: &str| fs::write(&clock, to).unwrap();
    let under = |mut command: Command| {
        command.env("LD_PRELOAD", &library).env("FAKETIME_TIMESTAMP_FILE", &clock).env("FAKETIME_NO_CACHE", "1");
        command.env("FAKETIME_DONT_FAKE_MONOTONIC", "1");
        command.spawn().unwrap()
    };
    jump("+10y");
    let mut child = under(command(folder.path(), &out, LONG));
    for (rows, to) in [(20, "-10y"), (60, "+10y"), (90, "-5y")] {
        wait_for(&out, rows, &mut child);
        jump(to);
    }
    child.kill().unwrap();
    child.wait().unwrap();
    jump("-10y");
    let mut child = under(resume(&out));
    wait_for(&out, 150, &mut child);
    jump("+10y");
    let (status, text) = said(child);
    assert!(status.success(), "{text}");
    let rows = fs::read_to_string(out.join("metrics.jsonl")).unwrap();
    let times = rows.lines().map(|row| serde_json::from_str::<serde_json::Value>(row).unwrap()["ts"].as_f64().unwrap());
    let (least, most) = times.fold((f64::MAX, 0.0f64), |(least, most), ts| (least.min(ts), most.max(ts)));
    assert!(most - least > 15.0 * 365.0 * 86400.0, "the clock did not jump");
    assert!(outcome(&out) == straight(folder.path()), "a jump of the clock changed the run");
    report("clock jumps in a run", 5, 1);
}

#[test]
fn a_vanished_run_directory_ends_the_run_and_is_not_made_anew() {
    let folder = TempDir::new().unwrap();
    let out = folder.path().join("run");
    let mut child = command(folder.path(), &out, LONG).spawn().unwrap();
    wait_for(&out, 10, &mut child);
    fs::rename(&out, folder.path().join("elsewhere")).unwrap();
    let (status, text) = said(child);
    assert_eq!(status.code(), Some(1), "{text}");
    assert!(text.contains("E-DISK") && !text.contains("panicked"), "{text}");
    assert!(!out.exists());
    let moved = folder.path().join("elsewhere");
    assert!(resume(&moved).status().unwrap().success());
    assert!(outcome(&moved) == straight(folder.path()), "a moved run goes on");
    report("vanished run directory", 1, 0);
}

/// Runs a script in a mount namespace of its own; none where the system does not allow it.
fn with_mounts(script: &str, arguments: &[&str]) -> Option<String> {
    let allowed = Command::new("unshare").args(["-m", "mount", "-t", "tmpfs", "none", "/mnt"]).output();
    if !allowed.is_ok_and(|output| output.status.success()) {
        return None;
    }
    let output = Command::new("unshare").args(["-m", "bash", "-c", script, "test"]).args(arguments).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{text}");
    Some(text)
}

/// Real full disks of `levels` sizes, each enlarged afterwards and resumed to the end.
fn full_disks(levels: u64) {
    let folder = TempDir::new().unwrap();
    let straight = straight(folder.path());
    let script = r#"
        mkdir -p "$1/m" && mount -t tmpfs -o "size=$2k" none "$1/m" || exit 9
        "${@:4}" --out "$1/m/run"; echo "status $?"
        mount -o remount,size=64m "$1/m"
        if [ -e "$1/m/run/run.json" ]; then "$3" resume "$1/m/run" || exit 8; cp -r "$1/m/run" "$1/out"; fi"#;
    let mut injected = 0;
    for level in 0..levels {
        // From no room for the first checkpoint to room for all but the last lines.
        let size = (4 + level * 1400 / levels).to_string();
        let _ = fs::remove_dir_all(folder.path().join("out"));
        let long = command(folder.path(), Path::new("unused"), LONG);
        let mut arguments = vec![folder.path().to_str().unwrap(), &size, MOE_LAB, MOE_LAB];
        let own: Vec<&str> = long.get_args().map(|argument| argument.to_str().unwrap()).collect();
        arguments.extend(own.iter().filter(|argument| !["--out", "unused"].contains(argument)));
        let Some(text) = with_mounts(script, &arguments) else {
            return println!("SKIPPED (mount is not permitted): full disks");
        };
        assert!(!text.contains("panicked") && !text.contains("internal error"), "{text}");
        if !text.contains("status 0") {
            assert!(text.contains("status 1") && text.contains("E-DISK"), "{size} KiB: {text}");
            injected += 1;
        }
        let out = folder.path().join("out");
        assert!(!out.exists() || outcome(&out) == straight, "{size} KiB: other bytes");
    }
    assert!(injected > 0);
    report("full disks", injected, 0);
}

#[test]
fn a_really_full_disk_is_told_and_the_run_goes_on_when_there_is_room() {
    full_disks(6);
}

#[test]
#[ignore = "full"]
fn fifty_fill_levels_of_a_disk() {
    full_disks(50);
}

/// A file system with files open for writing is not made read-only; a second mount of the run directory over itself is, and what the run opens
/// from then on is refused.
#[test]
fn a_read_only_disk_is_refused_at_the_start_and_told_on_the_way() {
    let folder = TempDir::new().unwrap();
    let script = r#"
        mkdir -p "$1/m" && mount -t tmpfs -o size=64m none "$1/m" || exit 9
        mount -o remount,ro "$1/m"; "${@:2}" --out "$1/m/run"; echo "first $?"
        mount -o remount,rw "$1/m"; "${@:2}" --out "$1/m/run" & P=$!
        while [ ! -s "$1/m/run/metrics.jsonl" ]; do sleep 0.01; done
        mount --bind "$1/m/run" "$1/m/run" # busy as long as a file is written through it
        until mount -o remount,ro,bind "$1/m/run" 2>/dev/null; do kill -0 $P || exit 8; sleep 0.005; done
        wait $P; echo "second $?""#;
    let run = command(folder.path(), Path::new("unused"), 4000);
    let mut arguments = vec![folder.path().to_str().unwrap(), MOE_LAB];
    let own: Vec<&str> = run.get_args().map(|argument| argument.to_str().unwrap()).collect();
    arguments.extend(own.iter().filter(|argument| !["--out", "unused"].contains(argument)));
    let Some(text) = with_mounts(script, &arguments) else {
        return println!("SKIPPED (mount is not permitted): read-only disks");
    };
    assert!(text.contains("first 2") && text.contains("ead-only"), "{text}");
    assert!(text.contains("second 1") && text.contains("E-DISK") && !text.contains("panicked"), "{text}");
    report("read-only disks", 2, 0);
}
