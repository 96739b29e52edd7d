//! metrics.jsonl, the one stream every viewer reads: one flat JSON object a line, appended by one write, cut back to the checkpoint on resume.

use crate::files::{Disk, Files, explain, parent, replace, sync_folder};
use serde_json::{Map, Value};
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

/// One line: names and values in the order they were put in. A number that is not finite becomes null and its name joins `nonfinite`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Row {
    fields: Map<String, Value>,
}

impl Row {
    /// A row of `kind` ("train", "eval", "moe", "system", "event") after update `step`, with `tokens` trained on so far; `ts` is now.
    pub fn new(step: u64, tokens: u64, kind: &str) -> Self {
        let mut row = Row::default();
        row.integer("step", step);
        row.number("ts", SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |since| since.as_secs_f64()));
        row.integer("tokens", tokens);
        row.text("kind", kind);
        row
    }

    /// A float, written with the fewest digits that read back as the same f64; an f32 is widened exactly.
    pub fn number(&mut self, name: &str, value: impl Into<f64>) {
        let value = self.finite(name, value.into());
        self.value(name, value);
    }

    /// Floats; an element that is not finite is null.
    pub fn numbers<F: Into<f64>>(&mut self, name: &str, values: impl IntoIterator<Item = F>) {
        let values: Vec<Value> = values.into_iter().map(|value| self.finite(name, value.into())).collect();
        self.value(name, Value::from(values));
    }

    pub fn integer(&mut self, name: &str, value: u64) {
        self.value(name, Value::from(value));
    }

    pub fn integers(&mut self, name: &str, values: impl IntoIterator<Item = u64>) {
        self.value(name, values.into_iter().collect());
    }

    pub fn text(&mut self, name: &str, value: &str) {
        self.value(name, Value::from(value));
    }

    /// Any JSON value; serde_json itself turns a float that is not finite into null without a word, so floats go through `number`.
    pub fn value(&mut self, name: &str, value: Value) {
        self.fields.insert(name.to_owned(), value);
    }

    pub fn fields(&self) -> &Map<String, Value> {
        &self.fields
    }

    /// The JSON line, without its end.
    pub fn line(&self) -> String {
        Value::Object(self.fields.clone()).to_string()
    }

    fn finite(&mut self, name: &str, value: f64) -> Value {
        if value.is_finite() {
            return Value::from(value);
        }
        let names = self.fields.entry("nonfinite").or_insert_with(|| Value::Array(Vec::new()));
        if let Value::Array(names) = names
            && !names.iter().any(|known| known == name)
        {
            names.push(Value::from(name));
        }
        Value::Null
    }
}

/// Lines that may wait for room on the disk, in bytes.
const MAX_WAITING: usize = 64 << 20;

/// The open stream of a run. Lines that the disk refused wait in memory and go out, in order, before the next one.
#[derive(Debug)]
pub struct Stream {
    disk: Disk,
    file: File,
    path: PathBuf,
    /// Bytes of the whole lines in the file.
    len: u64,
    waiting: Vec<u8>,
    /// Whether a piece of a line may stand behind the whole ones.
    torn: bool,
}

impl Stream {
    /// Opens `metrics.jsonl` (or another stream of lines) for appending; makes it if need be.
    pub fn open(disk: &Disk, path: &Path) -> io::Result<Self> {
        let file = disk.open(path).map_err(explain("open", path))?;
        sync_folder(&**disk, parent(path))?;
        let len = file.metadata().map_err(explain("read", path))?.len();
        Ok(Self { disk: disk.clone(), file, path: path.to_owned(), len, waiting: Vec::new(), torn: false })
    }

    /// Appends a row in one write. After an error it waits for the next call.
    pub fn append(&mut self, row: &Row) -> io::Result<()> {
        self.append_lines([row.line()])
    }

    /// Appends any lines in one write: after an error all of them wait for the next call.
    pub fn append_lines(&mut self, lines: impl IntoIterator<Item = String>) -> io::Result<()> {
        for line in lines {
            self.waiting.extend_from_slice(line.as_bytes());
            self.waiting.push(b'\n');
        }
        self.flush()
    }

    /// Whether more lines wait than memory should hold.
    pub fn overflows(&self) -> bool {
        self.waiting.len() > MAX_WAITING
    }

    /// Writes what waits.
    pub fn flush(&mut self) -> io::Result<()> {
        if self.torn {
            self.disk.set_len(&self.path, &self.file, self.len).map_err(explain("write", &self.path))?;
            self.torn = false;
        }
        if self.waiting.is_empty() {
            return Ok(());
        }
        if let Err(error) = self.disk.write(&self.path, &self.file, &self.waiting) {
            // Take the torn piece off again; where that fails too it is tried before the next write, and `prune` does it after a kill.
            self.torn = self.disk.set_len(&self.path, &self.file, self.len).is_err();
            return Err(explain("write", &self.path)(error));
        }
        self.len += self.waiting.len() as u64;
        self.waiting.clear();
        Ok(())
    }

    /// Makes the lines written so far durable.
    pub fn sync(&self) -> io::Result<()> {
        self.disk.sync(&self.path, &self.file).map_err(explain("fsync", &self.path))
    }

    /// A second handle, for a thread that makes the lines written so far durable.
    pub fn handle(&self) -> io::Result<(PathBuf, File)> {
        Ok((self.path.clone(), self.file.try_clone().map_err(explain("open", &self.path))?))
    }
}

/// For a resume at `step`: takes out of the stream at `path` a torn last line, lines that are no JSON object and every line of a later step,
/// and keeps them beside it (metrics.jsonl: in metrics.pruned.jsonl). Atomic; call it before the
/// stream is opened. Returns the number of lines taken out; a missing stream has none.
pub fn prune(disk: &dyn Files, path: &Path, step: u64) -> io::Result<usize> {
    let bytes = match disk.read(path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(0),
        Err(error) => return Err(explain("read", path)(error)),
    };
    let (mut kept, mut out, mut lines) = (Vec::with_capacity(bytes.len()), Vec::new(), 0);
    for line in bytes.split_inclusive(|&byte| byte == b'\n') {
        if belongs(line, step) {
            kept.extend_from_slice(line);
        } else {
            out.extend_from_slice(line.strip_suffix(b"\n").unwrap_or(line));
            out.push(b'\n');
            lines += 1;
        }
    }
    if lines > 0 {
        // First to safety, then out of the stream: a crash between the two keeps them twice rather than not at all.
        let aside = path.with_extension("pruned.jsonl");
        let keep = || {
            let file = disk.open(&aside)?;
            disk.write(&aside, &file, &out)?;
            disk.sync(&aside, &file)
        };
        keep().map_err(explain("write", &aside))?;
        replace(disk, path, &kept)?;
    }
    Ok(lines)
}

/// Whether a line with its end belongs to a run that stands at `step`.
fn belongs(line: &[u8], step: u64) -> bool {
    let Some(line) = line.strip_suffix(b"\n") else { return false };
    match serde_json::from_slice::<Map<String, Value>>(line) {
        Ok(fields) => fields.get("step").and_then(Value::as_u64).is_none_or(|at| at <= step),
        Err(_) => false,
    }
}

/// What two equal runs have in common of a line: without `ts`, `train/dt`, `train/tok_per_sec` and all `*_seconds`; none for an event.
/// A line that is no JSON object is returned as it is, so that a comparison sees it.
pub fn canonical(line: &str) -> Option<String> {
    let Ok(mut fields) = serde_json::from_str::<Map<String, Value>>(line) else { return Some(line.to_owned()) };
    if fields.get("kind").and_then(Value::as_str) == Some("event") {
        return None;
    }
    let timed = |name: &str| matches!(name, "ts" | "train/dt" | "train/tok_per_sec") || name.ends_with("_seconds");
    fields.retain(|name, _| !timed(name));
    Some(Value::Object(fields).to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::files::{System, system};
    use proptest::prelude::*;
    use std::fs;

    fn row(step: u64) -> Row {
        let mut row = Row::new(step, step * 10, "train");
        row.number("train/loss", 1.0 / step as f64);
        row
    }

    #[test]
    fn a_row_is_one_flat_line_in_the_order_it_was_filled() {
        let mut row = Row::new(3, 480, "train");
        row.value("ts", Value::from(1.5));
        row.number("train/loss", 0.1f32);
        row.number("train/learning_rate", 1e-4);
        row.integers("moe/layer_00/histogram", [0, 2]);
        row.text("phase", "a \"quoted\"\nname");
        assert_eq!(
            row.line(),
            "{\"step\":3,\"ts\":1.5,\"tokens\":480,\"kind\":\"train\",\"train/loss\":0.10000000149011612,\"train/learning_rate\":0.0001,\
             \"moe/layer_00/histogram\":[0,2],\"phase\":\"a \\\"quoted\\\"\\nname\"}"
        );
    }

    #[test]
    fn numbers_that_are_not_finite_are_null_and_named_once() {
        let mut row = Row::default();
        row.number("train/loss", f64::NAN);
        row.number("train/grad_norm", f32::INFINITY);
        row.numbers("moe/layer_00/load", [0.5, f64::NEG_INFINITY, f64::NAN]);
        let read: Value = serde_json::from_str(&row.line()).unwrap();
        assert_eq!(read["nonfinite"], serde_json::json!(["train/loss", "train/grad_norm", "moe/layer_00/load"]));
        assert!(read["train/loss"].is_null() && read["train/grad_norm"].is_null());
        assert_eq!(read["moe/layer_00/load"], serde_json::json!([0.5, null, null]));
    }

    proptest! {
        #[test]
        fn floats_come_back_to_the_bit(bits in any::<u64>(), small in any::<u32>()) {
            let (value, narrow) = (f64::from_bits(bits), f32::from_bits(small));
            prop_assume!(value.is_finite() && narrow.is_finite());
            let mut row = Row::default();
            row.number("a", value);
            row.number("b", narrow);
            let read: Value = serde_json::from_str(&row.line()).unwrap();
            prop_assert_eq!(read["a"].as_f64().unwrap().to_bits(), bits);
            prop_assert_eq!((read["b"].as_f64().unwrap() as f32).to_bits(), small);
        }
    }

    #[test]
    fn the_stream_appends_to_what_is_there() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.jsonl");
        for steps in [1..3, 3..5] {
            let mut stream = Stream::open(&system(), &path).unwrap();
            steps.for_each(|step| stream.append(&row(step)).unwrap());
        }
        let text = fs::read_to_string(&path).unwrap();
        let steps: Vec<u64> =
            text.lines().map(|l| serde_json::from_str::<Value>(l).unwrap()["step"].as_u64().unwrap()).collect();
        assert_eq!(steps, [1, 2, 3, 4]);
        assert!(
            Stream::open(&system(), &folder.path().join("no/metrics.jsonl"))
                .unwrap_err()
                .to_string()
                .contains("no/metrics.jsonl")
        );
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn a_full_disk_is_an_error_that_names_the_stream() {
        let error = Stream::open(&system(), Path::new("/dev/full")).unwrap().append(&row(1)).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::StorageFull);
        assert!(error.to_string().starts_with("cannot write /dev/full: "), "{error}");
    }

    #[test]
    fn prune_cuts_the_stream_back_to_the_checkpoint_and_keeps_what_it_took() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.jsonl");
        assert_eq!(prune(&System, &path, 0).unwrap(), 0);
        let mut stream = Stream::open(&system(), &path).unwrap();
        (1..=6).for_each(|step| stream.append(&row(step)).unwrap());
        let whole = fs::read_to_string(&path).unwrap();
        assert_eq!(prune(&System, &path, 6).unwrap(), 0);
        stream.append_lines(["{\"step\":7,\"train/lo".to_owned()]).unwrap();
        fs::write(&path, &fs::read(&path).unwrap()[..whole.len() + 10]).unwrap(); // torn
        assert_eq!(prune(&System, &path, 4).unwrap(), 3);
        let kept: Vec<&str> = whole.lines().take(4).collect();
        assert_eq!(fs::read_to_string(&path).unwrap(), kept.join("\n") + "\n");
        let aside = fs::read_to_string(folder.path().join("metrics.pruned.jsonl")).unwrap();
        let taken: Vec<&str> = whole.lines().skip(4).chain(["{\"step\":7,"]).collect();
        assert_eq!(aside, taken.join("\n") + "\n");
        assert_eq!(prune(&System, &path, 2).unwrap(), 2);
        assert_eq!(fs::read_to_string(folder.path().join("metrics.pruned.jsonl")).unwrap().lines().count(), 5);
    }

    #[test]
    fn prune_takes_out_a_last_line_without_end_even_if_it_is_whole_json() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.jsonl");
        fs::write(&path, "{\"step\":1}\n\u{0}\u{0}\n{\"step\":2}").unwrap();
        assert_eq!(prune(&System, &path, 9).unwrap(), 2);
        assert_eq!(fs::read_to_string(&path).unwrap(), "{\"step\":1}\n");
    }

    #[test]
    fn canonical_lines_ignore_times_and_events_and_nothing_else() {
        let (mut a, mut b) = (row(1), row(1));
        for (row, time) in [(&mut a, 1.0), (&mut b, 2.0)] {
            row.number("ts", time);
            row.number("train/dt", time);
            row.number("train/tok_per_sec", time);
            row.number("eval/took_seconds", time);
        }
        assert_ne!(a.line(), b.line());
        assert_eq!(canonical(&a.line()), canonical(&b.line()));
        b.number("train/loss", 1.0 + f64::EPSILON);
        assert_ne!(canonical(&a.line()), canonical(&b.line()));
        assert_eq!(canonical(&Row::new(1, 2, "event").line()), None);
        assert_eq!(canonical("torn").as_deref(), Some("torn"));
    }
}
