//! run.toml and run.json: what a run is, where and from what it was made, how it ended. Written atomically, readable with `cat`.

use crate::data::sha256;
use crate::error::{TrainError, newer};
use crate::files::{Files, explain, make_folders, replace, sync_folder};
use crate::untrusted::{MAX_RECORD, read_text};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{SystemTime, UNIX_EPOCH};

/// Version of the layout of a run directory. The first programs did not write it down.
const FORMAT: u64 = 1;

fn first_format() -> u64 {
    1
}

/// The keys of `results`, always all present; unknown values are null.
pub const RESULTS: [&str; 25] = [
    "loss",
    "loss_micro",
    "floor",
    "excess",
    "eval_loss",
    "recite",
    "recite_total",
    "token_f1",
    "paraphrase_recite",
    "paraphrase_total",
    "paraphrase_f1",
    "paraphrase_loss",
    "facts_loss_before",
    "facts_loss_after",
    "facts_floor",
    "experts_per_token",
    "experts_std",
    "l0",
    "tokens",
    "seconds",
    "tokens_per_second",
    "peak_memory_bytes",
    "params",
    "active_params",
    "unknown_words",
];

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    Running,
    Completed,
    Stopped,
    Failed,
    Diverged,
}

/// run.json.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// Version of the layout of the run directory.
    #[serde(default = "first_format")]
    pub format: u64,
    pub id: String,
    pub status: Status,
    /// The commit of the git work tree the run was started in, if any.
    pub commit: Option<String>,
    /// Whether tracked files differed from that commit.
    pub dirty: Option<bool>,
    /// sha256 of what differed, as kept in uncommitted.diff.
    #[serde(default)]
    pub changes: Option<String>,
    /// moe_lab, the compiler, libraries that can change a number, and what the caller noted (Python).
    pub versions: Map<String, Value>,
    pub machine: Map<String, Value>,
    pub seed: u64,
    /// By role: name, bytes and sha256 of every data file.
    pub data: Map<String, Value>,
    /// Entropy floor of the training set by phase, null for a text.
    #[serde(default)]
    pub floors: Map<String, Value>,
    /// The configuration the run was started with, so that a resume sees what was changed since.
    #[serde(default)]
    pub config: Value,
    pub argv: Vec<String>,
    pub cwd: Option<PathBuf>,
    /// Id of the run this one is an option of.
    pub parent: Option<String>,
    /// Updates of the whole run as planned, over all phases; a phase that ends early makes fewer.
    #[serde(default)]
    pub total_steps: Option<u64>,
    /// Times in UTC, RFC 3339.
    pub started: String,
    pub finished: Option<String>,
    /// Holds every key of [`RESULTS`], and whatever else the run measured.
    pub results: Map<String, Value>,
}

impl Record {
    /// The record of a run that starts now in this process, with `threads` threads.
    pub fn start(id: &str, seed: u64, threads: usize) -> Self {
        let cwd = std::env::current_dir().ok();
        let (commit, diff) = cwd.as_deref().map_or((None, None), git_state);
        let mut machine = machine();
        machine.insert("threads".to_owned(), json!(threads));
        Self {
            format: FORMAT,
            id: id.to_owned(),
            status: Status::Running,
            commit,
            dirty: diff.as_ref().map(|diff| !diff.is_empty()),
            changes: diff.filter(|diff| !diff.is_empty()).map(|diff| sha256(&diff)),
            versions: versions(),
            machine,
            seed,
            data: Map::new(),
            floors: Map::new(),
            config: Value::Null,
            argv: std::env::args_os().map(|argument| argument.to_string_lossy().into_owned()).collect(),
            cwd,
            parent: None,
            total_steps: None,
            started: timestamp(SystemTime::now()),
            finished: None,
            results: complete(Map::new()),
        }
    }

    /// Notes how the run ended; results that are not known stay null.
    pub fn finish(&mut self, status: Status, results: Map<String, Value>) {
        self.status = status;
        self.finished = Some(timestamp(SystemTime::now()));
        self.results = complete(results);
    }

    /// Writes run.json into `folder`, replacing the old one atomically.
    pub fn write(&self, disk: &dyn Files, folder: &Path) -> io::Result<()> {
        replace(disk, &folder.join("run.json"), self.text()?.as_bytes())
    }

    /// The text of run.json.
    pub fn text(&self) -> io::Result<String> {
        let mut text = serde_json::to_string_pretty(self).map_err(io::Error::other)?;
        text.push('\n');
        Ok(text)
    }

    /// Reads run.json of `folder`. Errors: one sentence naming the file.
    pub fn read(folder: &Path) -> Result<Self, TrainError> {
        let path = folder.join("run.json");
        let text = read_text(&path, MAX_RECORD)?;
        refuse_newer(&path, &text)?;
        Ok(serde_json::from_str(&text).map_err(|error| {
            io::Error::new(io::ErrorKind::InvalidData, format!("{} is not a run record: {error}", path.display()))
        })?)
    }
}

/// Refuses the run in `folder` where a newer program wrote its record, before anything else of it is read. A record that is missing or damaged
/// is for its reader to name.
pub fn check_format(folder: &Path) -> Result<(), TrainError> {
    let path = folder.join("run.json");
    read_text(&path, MAX_RECORD).map_or(Ok(()), |text| refuse_newer(&path, &text))
}

/// A newer record may have other fields, so that its format is looked at alone.
fn refuse_newer(path: &Path, text: &str) -> Result<(), TrainError> {
    #[derive(Deserialize)]
    struct Told {
        #[serde(default = "first_format")]
        format: u64,
    }
    match serde_json::from_str::<Told>(text) {
        Ok(Told { format }) if format > FORMAT => Err(TrainError::Usage(newer(path, format, FORMAT))),
        _ => Ok(()),
    }
}

/// Writes the resolved configuration as run.toml into `folder`, atomically.
pub fn write_run_file(disk: &dyn Files, folder: &Path, text: &str) -> io::Result<()> {
    replace(disk, &folder.join("run.toml"), text.as_bytes())
}

/// Keeps what was not committed beside the record that names its hash.
pub fn write_changes(disk: &dyn Files, folder: &Path) -> io::Result<()> {
    uncommitted().map_or(Ok(()), |diff| replace(disk, &folder.join("uncommitted.diff"), &diff))
}

/// `results` with every key of [`RESULTS`], in their order, then the others.
fn complete(mut results: Map<String, Value>) -> Map<String, Value> {
    let mut all: Map<String, Value> =
        RESULTS.iter().map(|name| (name.to_string(), results.remove(*name).unwrap_or_default())).collect();
    all.append(&mut results);
    all
}

/// Makes a new folder `<time>-<name>` under `root` (UTC) and returns its id and path. Two runs of one second get different ids.
pub fn new_run_folder(disk: &dyn Files, root: &Path, name: &str) -> io::Result<(String, PathBuf)> {
    make_folders(disk, root)?;
    let time: String = timestamp(SystemTime::now()).chars().filter(|c| !matches!(c, '-' | ':' | 'Z')).collect();
    let stem = format!("{}-{}", time.replace('T', "-"), folder_name(name));
    for attempt in 1u32.. {
        let id = if attempt == 1 { stem.clone() } else { format!("{stem}-{attempt}") };
        let path = root.join(&id);
        match disk.make_folder(&path) {
            Ok(()) => return sync_folder(disk, root).map(|()| (id, path)),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(explain("make the folder", &path)(error)),
        }
    }
    unreachable!("fewer than 2^32 runs start in one second")
}

/// A run name as part of a folder name: letters, digits, `.`, `_`, `-`; never empty, hidden or a way out of the folder.
fn folder_name(name: &str) -> String {
    let plain = |c: char| if c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-') { c } else { '-' };
    let name: String = name.trim_start_matches('.').chars().take(64).map(plain).collect();
    if name.is_empty() { "run".to_owned() } else { name }
}

/// Time in UTC as 2026-01-31T23:59:59Z.
pub(crate) fn timestamp(time: SystemTime) -> String {
    let seconds = time.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    let (days, second) = (seconds / 86_400, seconds % 86_400);
    // Days since 0000-03-01, so that the leap day is the last of its year (Howard Hinnant, "chrono-compatible low-level date algorithms").
    let days = days + 719_468;
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let march_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * march_month + 2) / 5 + 1;
    let month = if march_month < 10 { march_month + 3 } else { march_month - 9 };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    let (hour, minute) = (second / 3600, second / 60 % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{:02}Z", second % 60)
}

/// Notes the version of something around this program, the Python that calls it say, for every record that is made after.
pub fn note_version(name: &str, version: &str) {
    let mut noted = NOTED.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    noted.retain(|(known, _)| known != name);
    noted.push((name.to_owned(), version.to_owned()));
}

static NOTED: std::sync::Mutex<Vec<(String, String)>> = std::sync::Mutex::new(Vec::new());

/// What the numbers of a run come from: this program, its libraries, and the libtorch in this process where there is one.
fn versions() -> Map<String, Value> {
    #[cfg(feature = "torch")]
    let torch = tensor::torch::loaded_version().map(|version| ("torch".to_owned(), json!(version)));
    #[cfg(not(feature = "torch"))]
    let torch = None;
    let ours =
        [("moe_lab".to_owned(), json!(env!("CARGO_PKG_VERSION"))), ("rustc".to_owned(), json!(env!("MOE_LAB_RUSTC")))];
    let libraries = env!("MOE_LAB_LIBRARIES").split(',').filter_map(|entry| entry.split_once(' '));
    let noted = NOTED.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let around = noted.iter().map(|(name, version)| (name.as_str(), version.as_str()));
    let others = libraries.chain(around).map(|(name, version)| (name.to_owned(), json!(version)));
    ours.into_iter().chain(others).chain(torch).collect()
}

/// What tracked files of the git work tree around the current folder have beyond its commit.
fn uncommitted() -> Option<Vec<u8>> {
    git_state(&std::env::current_dir().ok()?).1
}

/// Commit of the git work tree around `folder` and the difference of its tracked files to it; nothing where there is no git or no work tree.
fn git_state(folder: &Path) -> (Option<String>, Option<Vec<u8>>) {
    let git = |arguments: &[&str]| {
        let output = Command::new("git")
            .args(["-c", "core.fsmonitor=false", "--no-optional-locks"]) // start no helper, take no lock
            .args(arguments)
            .current_dir(folder)
            .stdin(Stdio::null())
            .stderr(Stdio::null())
            .output()
            .ok()?;
        output.status.success().then_some(output.stdout)
    };
    let Some(commit) = git(&["rev-parse", "HEAD"]) else { return (None, None) };
    let diff = git(&["diff", "--no-ext-diff", "--no-textconv", "--no-color", "--binary", "HEAD"]);
    (Some(String::from_utf8_lossy(&commit).trim().to_owned()), diff)
}

/// What this machine has: `cpu`, `cores`, `memory_bytes`, `instruction_sets`, `isa` (the one that the kernels of this process use), `os`, `arch`; null where it does not say.
pub fn machine() -> Map<String, Value> {
    let cpu_info = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let memory = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    Map::from_iter([
        ("cpu".to_owned(), json!(field(&cpu_info, "model name"))),
        ("cores".to_owned(), json!(std::thread::available_parallelism().map_or(1, usize::from))),
        ("memory_bytes".to_owned(), json!(kibibytes(&memory, "MemTotal"))),
        ("instruction_sets".to_owned(), json!(instruction_sets(&cpu_info))),
        ("isa".to_owned(), json!(tensor::isa::current())),
        ("os".to_owned(), json!(std::env::consts::OS)),
        ("arch".to_owned(), json!(std::env::consts::ARCH)),
    ])
}

/// The instruction sets our kernels look for, as far as this CPU and its system offer them.
fn instruction_sets(cpu_info: &str) -> Vec<&'static str> {
    let mut found = Vec::new();
    #[cfg(target_arch = "x86_64")]
    {
        macro_rules! detect {
            ($($name:tt),*) => { $(if std::arch::is_x86_feature_detected!($name) { found.push($name); })* };
        }
        detect!("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512bf16", "avx512fp16");
    }
    let flags = field(cpu_info, "flags").unwrap_or_default(); // the tile extension has no stable detection
    found
        .extend(["amx_tile", "amx_bf16"].into_iter().filter(|name| flags.split_whitespace().any(|flag| flag == *name)));
    found
}

/// Maximum resident set of this process so far; none where the system does not say.
pub fn peak_memory_bytes() -> Option<u64> {
    kibibytes(&fs::read_to_string("/proc/self/status").ok()?, "VmHWM")
}

/// Resident set of this process now; none where the system does not say.
pub fn memory_bytes() -> Option<u64> {
    kibibytes(&fs::read_to_string("/proc/self/status").ok()?, "VmRSS")
}

/// Memory that this process may have: the machine's, or less where its control group says so.
pub fn memory_limit() -> Option<u64> {
    let machine = kibibytes(&fs::read_to_string("/proc/meminfo").ok()?, "MemTotal")?;
    let group = fs::read_to_string("/sys/fs/cgroup/memory.max").ok().and_then(|text| text.trim().parse().ok());
    Some(machine.min(group.unwrap_or(u64::MAX)))
}

/// The text after the first `name :` at the start of a line.
fn field<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    let entry = |line: &'a str| line.split_once(':').filter(|(key, _)| key.trim() == name);
    text.lines().find_map(entry).map(|(_, value)| value.trim())
}

fn kibibytes(text: &str, name: &str) -> Option<u64> {
    field(text, name)?.strip_suffix(" kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::files::System;
    use std::time::Duration;

    #[test]
    fn the_record_is_replaced_whole_and_reads_back() {
        let folder = tempfile::tempdir().unwrap();
        let mut record = Record::start("20260101-000000-test", u64::MAX, 3);
        record.write(&System, folder.path()).unwrap();
        let started = Record::read(folder.path()).unwrap();
        assert_eq!((started.status, started.seed, started.finished.clone()), (Status::Running, u64::MAX, None));
        assert!(RESULTS.iter().all(|name| started.results[*name].is_null()) && started.results.len() == RESULTS.len());
        record.parent = Some("before".to_owned());
        record.finish(
            Status::Completed,
            Map::from_iter([("extra".to_owned(), json!(1)), ("loss".to_owned(), json!(0.25))]),
        );
        record.write(&System, folder.path()).unwrap();
        let read = Record::read(folder.path()).unwrap();
        assert_eq!(read, record);
        assert_eq!(
            (&read.results["loss"], &read.results["floor"], &read.results["extra"]),
            (&json!(0.25), &Value::Null, &json!(1))
        );
        assert_eq!(read.machine["threads"], 3);
        let text = fs::read_to_string(folder.path().join("run.json")).unwrap();
        assert!(text.contains("\"status\": \"completed\""));
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn the_record_names_what_can_change_a_byte() {
        note_version("caller", "1.2");
        let record = Record::start("a", 1, 1);
        for name in ["moe_lab", "rustc", "candle-core", "gemm", "safetensors", "tokenizers", "caller"] {
            assert!(record.versions[name].as_str().is_some_and(|version| !version.is_empty()), "{name}");
        }
        for name in ["cpu", "instruction_sets", "arch", "threads"] {
            assert!(record.machine.contains_key(name), "{name}");
        }
    }

    #[test]
    fn a_damaged_record_is_named() {
        let folder = tempfile::tempdir().unwrap();
        assert!(Record::read(folder.path()).unwrap_err().to_string().contains("run.json"));
        fs::write(folder.path().join("run.json"), "{\"id\": \"a\"").unwrap();
        assert!(Record::read(folder.path()).unwrap_err().to_string().contains("run.json is not a run record"));
    }

    #[test]
    fn a_record_of_a_newer_program_is_refused_and_one_without_a_format_is_the_first() {
        let folder = tempfile::tempdir().unwrap();
        Record::start("a", 1, 1).write(&System, folder.path()).unwrap();
        let path = folder.path().join("run.json");
        let text = fs::read_to_string(&path).unwrap();
        assert!(text.starts_with("{\n  \"format\": 1,\n"), "{text}");
        fs::write(&path, text.replace("  \"format\": 1,\n", "")).unwrap();
        assert_eq!(Record::read(folder.path()).unwrap().format, 1);
        for newer in ["{\"format\": 2}".to_owned(), text.replace("\"format\": 1", "\"format\": 2")] {
            fs::write(&path, newer).unwrap();
            for error in [Record::read(folder.path()).unwrap_err(), check_format(folder.path()).unwrap_err()] {
                assert_eq!(error.exit_status(), 2);
                let sentence = "run.json was written by a newer moe_lab (format 2, this one reads 1): update moe_lab";
                assert!(error.to_string().ends_with(sentence), "{error}");
            }
        }
        fs::write(&path, "{").unwrap();
        assert!(check_format(folder.path()).is_ok());
    }

    #[test]
    fn run_folders_are_unique_and_stay_under_their_root() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path().join("runs");
        let mut ids = Vec::new();
        for name in ["base", "base", "base", "../../etc", "", ".", "a b/c\\d\u{0}é"] {
            let (id, path) = new_run_folder(&System, &root, name).unwrap();
            assert!(path.is_dir() && path.parent() == Some(root.as_path()), "{}", path.display());
            assert!(id.chars().all(|c| c.is_ascii_alphanumeric() || "._-".contains(c)), "{id}");
            ids.push(id);
        }
        assert!(ids[0].ends_with("-base") && ids[0].len() == "20260101-000000-base".len(), "{}", ids[0]);
        let unique: std::collections::BTreeSet<_> = ids.iter().collect();
        assert_eq!(unique.len(), ids.len());
    }

    #[test]
    fn times_are_utc() {
        let at = |seconds| timestamp(UNIX_EPOCH + Duration::from_secs(seconds));
        assert_eq!(at(0), "1970-01-01T00:00:00Z");
        assert_eq!(at(951_782_399), "2000-02-28T23:59:59Z");
        assert_eq!(at(951_782_400), "2000-02-29T00:00:00Z");
        assert_eq!(at(1_767_225_599), "2025-12-31T23:59:59Z");
        assert_eq!(at(4_107_542_400), "2100-03-01T00:00:00Z");
    }

    #[test]
    fn a_folder_outside_git_has_no_commit_and_one_inside_has() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(git_state(folder.path()), (None, None));
        let git = |arguments: &[&str]| {
            let identity = ["-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false"];
            let status = Command::new("git").args(identity).args(arguments).current_dir(folder.path()).output();
            status.is_ok_and(|output| output.status.success())
        };
        if !git(&["init"]) {
            return; // no git on this machine: nothing to find
        }
        fs::write(folder.path().join("file"), "1").unwrap();
        assert!(git(&["add", "."]) && git(&["commit", "-m", "first"]));
        let (commit, diff) = git_state(folder.path());
        assert_eq!((commit.map(|commit| commit.len()), diff), (Some(40), Some(Vec::new())));
        fs::write(folder.path().join("file"), "2").unwrap();
        let diff = git_state(folder.path()).1.unwrap();
        assert!(String::from_utf8(diff).unwrap().contains("-1\n\\ No newline at end of file\n+2"));
    }

    #[test]
    fn the_machine_and_its_memory_are_read() {
        assert_eq!(field("a : 1\nmodel name\t: Some CPU @ 3: 4\n", "model name"), Some("Some CPU @ 3: 4"));
        assert_eq!(kibibytes("VmPeak:\t 9 kB\nVmHWM:\t   12 kB\n", "VmHWM"), Some(12_288));
        assert_eq!(kibibytes("VmHWM: many kB", "VmHWM"), None);
        assert!(machine()["cores"].as_u64() >= Some(1));
        if cfg!(target_os = "linux") {
            let before = peak_memory_bytes().unwrap();
            let block = vec![1u8; 64 << 20];
            assert!(peak_memory_bytes().unwrap() >= before.max(std::hint::black_box(&block).len() as u64));
        }
    }

    #[test]
    fn sha256_is_the_known_one() {
        assert_eq!(crate::data::sha256(b"abc"), "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
    }
}
