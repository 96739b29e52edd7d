//! Was a run trained again with the same bytes? If not: which of its inputs differ.

use crate::checkpoint;
use crate::dataset::Dataset;
use crate::directory::{RunDirectory, check_data, check_folder};
use crate::error::TrainError;
use crate::metrics::canonical;
use crate::record::{Record, Status};
use crate::run::Run;
use serde::Serialize;
use serde_json::{Value, json};
use std::fmt;
use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};

/// Parts of `machine` that can change a byte; the number of threads cannot.
const MACHINE: [&str; 5] = ["cpu", "instruction_sets", "isa", "os", "arch"];

/// A completed run that is to be trained again.
pub struct Original {
    pub run: Run,
    path: PathBuf,
    record: Record,
}

/// An input of a run that was another one the second time.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Input {
    pub name: String,
    pub was: Value,
    pub is: Value,
}

/// What two trainings of one run have in common.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Report {
    pub original: PathBuf,
    pub again: PathBuf,
    pub identical: bool,
    /// Files of the last checkpoint, and whether their bytes are equal.
    pub files: Vec<(String, bool)>,
    /// Lines of the metric stream without times and events, and the first that differs, counted from 1.
    pub metric_lines: usize,
    pub first_other_line: Option<usize>,
    pub inputs: Vec<Input>,
}

impl Original {
    /// Reads the run in `path`, whose data must be what they were.
    pub fn read(path: &Path) -> Result<Self, TrainError> {
        if !path.join("run.toml").is_file() {
            let text = format!("{} holds no run (run.toml is missing); give a run directory", path.display());
            return Err(TrainError::Usage(text));
        }
        check_folder(path)?;
        let (run, record) = (RunDirectory::read_run(path)?, Record::read(path)?);
        if record.status != Status::Completed {
            let text = format!("{} is not completed, so there is nothing to compare with; resume it", path.display());
            return Err(TrainError::Usage(text));
        }
        let dataset = Dataset::load(&run).map_err(|error| TrainError::Usage(error.to_string()))?;
        check_data(&record, &dataset.sources)?;
        Ok(Original { run, path: path.to_path_buf(), record })
    }

    /// Compares with the run in `again`: the files of the last checkpoint byte by byte, and what the metric stream says apart from times.
    pub fn compare(&self, again: &Path) -> Result<Report, TrainError> {
        let record = Record::read(again)?;
        let folders = [newest(&self.path)?, newest(again)?];
        let mut files = Vec::new();
        for name in checkpoint::FILES {
            let [a, b] = folders.each_ref().map(|folder| fs::read(folder.join(name)));
            files.push((name.to_string(), a? == b?));
        }
        let (metric_lines, first_other_line) = compare_metrics(&self.path, again)?;
        let identical = files.iter().all(|(_, same)| *same) && first_other_line.is_none();
        Ok(Report {
            original: self.path.clone(),
            again: again.to_path_buf(),
            identical,
            files,
            metric_lines,
            first_other_line,
            inputs: differing(&self.record, &record),
        })
    }
}

impl Report {
    /// The report as one JSON object.
    pub fn json(&self) -> Value {
        json!(self)
    }
}

fn newest(path: &Path) -> Result<PathBuf, TrainError> {
    let found = checkpoint::newest_whole(path)?;
    found.path.ok_or_else(|| TrainError::Failed(format!("{} has no whole checkpoint to compare", path.display())))
}

/// Lines that two streams have in common from their start, and the first that differs.
fn compare_metrics(a: &Path, b: &Path) -> Result<(usize, Option<usize>), TrainError> {
    let mut streams = Vec::new();
    for path in [a, b] {
        let lines = BufReader::new(File::open(path.join("metrics.jsonl"))?).lines();
        streams.push(lines.filter_map(|line| line.map(|line| canonical(&line)).transpose()));
    }
    for number in 0.. {
        let [a, b] = [0, 1].map(|i| streams[i].next());
        match (a.transpose()?, b.transpose()?) {
            (None, None) => return Ok((number, None)),
            (a, b) if a == b => {}
            _ => return Ok((number, Some(number + 1))),
        }
    }
    unreachable!("a stream has an end")
}

/// The inputs of two runs that differ: code, versions, machine, data.
fn differing(was: &Record, is: &Record) -> Vec<Input> {
    let parts = |record: &Record| {
        let mut found: Vec<(String, Value)> = vec![
            ("commit".into(), record.commit.clone().into()),
            ("uncommitted changes (sha256)".into(), record.changes.clone().into()),
            ("seed".into(), record.seed.into()),
        ];
        found.extend(record.versions.iter().map(|(name, value)| (format!("version of {name}"), value.clone())));
        let machine =
            MACHINE.iter().filter_map(|name| Some((format!("machine.{name}"), record.machine.get(*name)?.clone())));
        found.extend(machine);
        found.extend(record.data.iter().map(|(role, value)| (format!("data.{role}"), value["sha256"].clone())));
        found
    };
    let (was, is) = (parts(was), parts(is));
    let value = |parts: &[(String, Value)], name: &str| {
        parts.iter().find(|(known, _)| known == name).map_or(Value::Null, |(_, value)| value.clone())
    };
    let mut names: Vec<&String> = was.iter().map(|(name, _)| name).collect();
    names.extend(is.iter().map(|(name, _)| name).filter(|name| !was.iter().any(|(known, _)| known == *name)));
    names
        .into_iter()
        .map(|name| Input { name: name.clone(), was: value(&was, name), is: value(&is, name) })
        .filter(|input| input.was != input.is)
        .collect()
}

impl fmt::Display for Input {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {} -> {}", self.name, self.was, self.is)
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (name, same) in &self.files {
            writeln!(f, "{name:22} {}", if *same { "identical" } else { "DIFFERS" })?;
        }
        match self.first_other_line {
            None => writeln!(f, "{:22} identical ({} lines)", "metrics", self.metric_lines)?,
            Some(line) => writeln!(f, "{:22} DIFFERS from line {line} on (events not counted)", "metrics")?,
        }
        for input in &self.inputs {
            writeln!(f, "other input: {input}")?;
        }
        match (self.identical, self.inputs.is_empty()) {
            (true, _) => write!(f, "reproduced to the byte: {}", self.again.display()),
            (false, false) => write!(f, "not reproduced; the inputs above differ: {}", self.again.display()),
            (false, true) => {
                write!(f, "not reproduced although every recorded input is the same: {}", self.again.display())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_of_input_is_compared() {
        let mut was = Record::start("a", 1, 2);
        was.data.insert("facts".into(), json!({ "sha256": "1" }));
        assert_eq!(differing(&was, &was.clone()), []);
        let mut threads = was.clone();
        threads.machine.insert("threads".into(), json!(7));
        assert_eq!(differing(&was, &threads), [], "bytes do not depend on threads");
        type Edit = fn(&mut Record);
        let edits: [(&str, Edit); 7] = [
            ("commit", |r| r.commit = Some("other".into())),
            ("uncommitted changes (sha256)", |r| r.changes = Some("other".into())),
            ("seed", |r| r.seed = 9),
            ("version of rustc", |r| drop(r.versions.insert("rustc".into(), json!("9")))),
            ("version of new", |r| drop(r.versions.insert("new".into(), json!("9")))),
            ("machine.instruction_sets", |r| drop(r.machine.insert("instruction_sets".into(), json!([])))),
            ("data.facts", |r| drop(r.data.insert("facts".into(), json!({ "sha256": "2" })))),
        ];
        for (name, edit) in edits {
            let mut is = was.clone();
            edit(&mut is);
            let found: Vec<String> = differing(&was, &is).into_iter().map(|input| input.name).collect();
            assert_eq!(found, [name]);
        }
    }
}
