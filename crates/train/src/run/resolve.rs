//! From files, standard runs, `extends` and `--set` to one `Run`: each is a layer, checked on its own, then laid over the one before.

use super::merge::{merge, nested, overlay, remove};
use super::{ConfigError, Problem, Run, schema, validate};
use serde_json::Value as Json;
use std::io::Read;
use std::path::{Path, PathBuf};
use toml::{Table, Value};

/// The runs that are built in, by name.
pub(super) const STANDARD: &[(&str, &str)] = &[
    ("baseline", include_str!("../../../../experiments/baseline.toml")),
    ("stage1", include_str!("../../../../experiments/stage1.toml")),
    ("stage1_top2", include_str!("../../../../experiments/stage1_top2.toml")),
    ("text", include_str!("../../../../experiments/text.toml")),
    ("stage2a", include_str!("../../../../experiments/stage2a.toml")),
    ("stage2b", include_str!("../../../../experiments/stage2b.toml")),
    ("stage2c", include_str!("../../../../experiments/stage2c.toml")),
    ("stage2c_exponential", include_str!("../../../../experiments/stage2c_exponential.toml")),
    ("stage3a", include_str!("../../../../experiments/stage3a.toml")),
    ("stage3a_peak", include_str!("../../../../experiments/stage3a_peak.toml")),
    ("stage3a_sgdr", include_str!("../../../../experiments/stage3a_sgdr.toml")),
    ("stage3b", include_str!("../../../../experiments/stage3b.toml")),
    ("stage3b_linear", include_str!("../../../../experiments/stage3b_linear.toml")),
    ("stage3b_updates", include_str!("../../../../experiments/stage3b_updates.toml")),
    ("stage3c", include_str!("../../../../experiments/stage3c.toml")),
    ("stage3c_updates", include_str!("../../../../experiments/stage3c_updates.toml")),
    ("stage4a", include_str!("../../../../experiments/stage4a.toml")),
    ("stage4a_causal", include_str!("../../../../experiments/stage4a_causal.toml")),
    ("stage4b", include_str!("../../../../experiments/stage4b.toml")),
    ("stage4b_documents", include_str!("../../../../experiments/stage4b_documents.toml")),
    ("stage5a", include_str!("../../../../experiments/stage5a.toml")),
    ("stage5a_roadmap", include_str!("../../../../experiments/stage5a_roadmap.toml")),
    ("stage5b", include_str!("../../../../experiments/stage5b.toml")),
    ("stage5c", include_str!("../../../../experiments/stage5c.toml")),
];

/// How messages call the values that come after the file.
const SET: &str = "--set";
/// Longest chain of `extends`.
const MAX_DEPTH: usize = 8;
/// Largest run file; a larger one is something else.
const MAX_BYTES: u64 = 1 << 20;

/// What one file, standard run or list of sets says.
struct Layer {
    /// How messages call it.
    label: String,
    table: Table,
}

#[derive(PartialEq)]
enum Origin {
    Standard(&'static str, &'static str),
    File(PathBuf),
}

/// What `--set` or a Python dict puts in last: values, and the keys it takes out.
type Sets = (Table, Vec<String>);

pub(super) fn load(source: &str, sets: &[String]) -> Result<Run, ConfigError> {
    load_layers(source, parse_sets(sets)?)
}

pub(super) fn load_with(source: &str, sets: &[(String, Json)]) -> Result<Run, ConfigError> {
    load_layers(source, convert_sets(sets)?)
}

pub(super) fn from_text(text: &str, base: &Path, sets: &[String]) -> Result<Run, ConfigError> {
    text_layers(text, base, parse_sets(sets)?)
}

pub(super) fn parse_with(text: &str, sets: &[(String, Json)]) -> Result<Run, ConfigError> {
    text_layers(text, Path::new("."), convert_sets(sets)?)
}

fn load_layers(source: &str, sets: Sets) -> Result<Run, ConfigError> {
    let origin = standard(source).unwrap_or_else(|| Origin::File(source.into()));
    let name = origin.name();
    let mut layers = Vec::new();
    read_chain(origin, &mut Vec::new(), &mut layers)?;
    finish(layers, &name, sets)
}

fn text_layers(text: &str, base: &Path, sets: Sets) -> Result<Run, ConfigError> {
    let mut layers = Vec::new();
    add_layer(text, String::new(), Some(base), &mut Vec::new(), &mut layers)?;
    finish(layers, "run", sets)
}

fn refuse<T>(source: impl Into<String>, message: impl Into<String>) -> Result<T, ConfigError> {
    let problem = Problem { source: source.into(), message: message.into(), ..Problem::default() };
    Err(ConfigError { problems: vec![problem] })
}

fn standard(name: &str) -> Option<Origin> {
    STANDARD.iter().find(|(known, _)| *known == name).map(|(name, text)| Origin::Standard(name, text))
}

impl Origin {
    fn label(&self) -> String {
        match self {
            Origin::Standard(name, _) => format!("standard run {name}"),
            Origin::File(path) => path.display().to_string(),
        }
    }

    /// What the run is called where no file names it.
    fn name(&self) -> String {
        match self {
            Origin::Standard(name, _) => name.to_string(),
            Origin::File(path) => path.file_stem().map_or("run".into(), |stem| stem.to_string_lossy().into_owned()),
        }
    }

    /// The same file under any spelling of its path is the same origin.
    fn identity(&self) -> Origin {
        match self {
            Origin::Standard(name, text) => Origin::Standard(name, text),
            Origin::File(path) => Origin::File(path.canonicalize().unwrap_or_else(|_| path.clone())),
        }
    }
}

/// Pushes the layers of `origin`, those it extends first.
fn read_chain(origin: Origin, chain: &mut Vec<Origin>, layers: &mut Vec<Layer>) -> Result<(), ConfigError> {
    let (label, identity) = (origin.label(), origin.identity());
    if chain.contains(&identity) {
        return refuse(label, "extends itself, in a circle; take out one `extends`");
    }
    if chain.len() > MAX_DEPTH {
        return refuse(label, format!("is reached through more than {MAX_DEPTH} `extends`; shorten the chain"));
    }
    chain.push(identity);
    match origin {
        Origin::Standard(_, text) => add_layer(text, label, None, chain, layers),
        Origin::File(path) => {
            let text = read(&path)?;
            add_layer(&text, label, path.parent(), chain, layers)
        }
    }
}

fn read(path: &Path) -> Result<String, ConfigError> {
    let label = path.display().to_string();
    let mut bytes = Vec::new();
    let file = std::fs::File::open(path);
    match file.and_then(|file| file.take(MAX_BYTES + 1).read_to_end(&mut bytes)) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            let names = Run::standard();
            let near = schema::nearest_of(&label, names.iter().copied());
            let hint = near.map_or(String::new(), |name| format!("; did you mean {name}?"));
            refuse(label, format!("no such file, and no standard run ({}){hint}", names.join(", ")))
        }
        Err(error) => refuse(label, format!("cannot be read: {error}")),
        Ok(_) if bytes.len() as u64 > MAX_BYTES => refuse(label, "is larger than 1 MiB, so it is no run file"),
        Ok(_) => String::from_utf8(bytes).or_else(|_| refuse(label, "is not UTF-8 text, so it is no run file")),
    }
}

/// Parses one text, reads what it extends, and pushes its layer. A standard run has no `base`: it names no files.
fn add_layer(
    text: &str,
    label: String,
    base: Option<&Path>,
    chain: &mut Vec<Origin>,
    layers: &mut Vec<Layer>,
) -> Result<(), ConfigError> {
    let mut table = parse(text, &label)?;
    match table.remove("extends") {
        None => {}
        Some(Value::String(parent)) => {
            read_chain(parent_of(&parent, base), chain, layers)?;
            layers.iter_mut().for_each(|layer| drop(layer.table.remove("name")));
        }
        Some(_) => {
            return refuse(label, "extends: expected a text, the path of a run file or the name of a standard run");
        }
    }
    layers.push(checked(label, table, base.unwrap_or(Path::new("")))?);
    Ok(())
}

/// A file beside the one that extends it comes first, then the standard run of that name, with or without ".toml".
fn parent_of(parent: &str, base: Option<&Path>) -> Origin {
    let file = base.map(|base| base.join(parent)).filter(|file| file.is_file());
    let built_in = || standard(parent.strip_suffix(".toml").unwrap_or(parent));
    let missing = || Origin::File(base.unwrap_or(Path::new("")).join(parent));
    file.map(Origin::File).or_else(built_in).unwrap_or_else(missing)
}

fn parse(text: &str, label: &str) -> Result<Table, ConfigError> {
    text.trim_start_matches('\u{feff}').parse::<Table>().or_else(|error| {
        let before = error.span().and_then(|span| text.get(..span.start)).unwrap_or_default();
        let (line, column) =
            (before.matches('\n').count() + 1, before.chars().rev().take_while(|c| *c != '\n').count() + 1);
        let message = format!("line {line}, column {column}: {}", error.message().replace('\n', "; "));
        refuse(label, message)
    })
}

/// A layer whose keys exist, whose values have the right type, and whose paths are absolute.
fn checked(label: String, mut table: Table, base: &Path) -> Result<Layer, ConfigError> {
    let mut problems = schema::check(&table, false);
    if problems.is_empty()
        && let Some(data) = table.get_mut("data").and_then(Value::as_table_mut)
    {
        problems = absolute_paths(data, base);
    }
    problems.iter_mut().for_each(|problem| problem.source = label.clone());
    if problems.is_empty() { Ok(Layer { label, table }) } else { Err(ConfigError { problems }) }
}

fn absolute_paths(data: &mut Table, base: &Path) -> Vec<Problem> {
    let mut problems = Vec::new();
    for key in ["facts", "chat", "paraphrases", "text", "tokenizer", "routing", "augment.table"] {
        let place = match key.split_once('.') {
            Some((table, key)) => data.get_mut(table).and_then(|table| table.get_mut(key)),
            None => data.get_mut(key),
        };
        let Some(Value::String(path)) = place else { continue };
        let named = match key {
            "tokenizer" => &["word", "char", "byte"][..],
            "text" => &[crate::data::SHIPPED_TEXT],
            _ => &[],
        };
        if named.contains(&path.as_str()) {
            continue;
        }
        let message = match absolute(&base.join(&path)) {
            Some(_) if path.is_empty() => "must name a file",
            Some(whole) => {
                *path = whole;
                continue;
            }
            None => "cannot be made an absolute path in UTF-8",
        };
        problems.push(Problem { key: format!("data.{key}"), message: message.into(), ..Problem::default() });
    }
    problems
}

/// The path without `..` and links where the file exists; a missing file is reported by whoever reads it.
fn absolute(path: &Path) -> Option<String> {
    let whole = path.canonicalize().or_else(|_| std::path::absolute(path)).ok()?;
    whole.to_str().map(str::to_string)
}

/// Merges the layers and the sets, fills what depends on the kind of run, and checks the whole.
fn finish(mut layers: Vec<Layer>, name: &str, (values, taken_out): Sets) -> Result<Run, ConfigError> {
    layers.push(checked(SET.into(), values, Path::new("."))?);
    let mut table = Table::new();
    for (number, layer) in layers.iter().enumerate() {
        if number + 1 == layers.len() {
            taken_out.iter().for_each(|path| remove(&mut table, path));
        }
        merge(&mut table, layer.table.clone());
    }
    table.entry("name").or_insert_with(|| name.into());
    if schema::lookup(&table, "data.text").is_some() && schema::lookup(&table, "data.tokenizer").is_none() {
        overlay(&mut table, nested("data.tokenizer", "char".into()));
    }
    let problems = schema::check(&table, true);
    let run = if problems.is_empty() { deserialize(table) } else { Err(ConfigError { problems }) };
    let run = run.and_then(|run| validate::validate(&run).map(|()| run));
    run.map_err(|error| attribute(error, &layers))
}

/// Only a slip in this module could make a checked table fail here; serde then says what it saw.
fn deserialize(table: Table) -> Result<Run, ConfigError> {
    serde_path_to_error::deserialize(Value::Table(table)).map_err(|error| {
        let problem =
            Problem { key: error.path().to_string(), message: error.inner().to_string(), ..Problem::default() };
        ConfigError { problems: vec![problem] }
    })
}

/// Says for each problem which layer wrote its key; a default that clashes is laid at the door of the run's own file.
fn attribute(mut error: ConfigError, layers: &[Layer]) -> ConfigError {
    let own = layers.len().saturating_sub(2); // the last is --set
    for problem in &mut error.problems {
        let wrote = |layer: &&Layer| schema::lookup(&layer.table, &problem.key).is_some();
        let layer = layers.iter().rev().find(wrote).unwrap_or(&layers[own]);
        problem.source = layer.label.clone();
    }
    error
}

/// The table that a list of "key=value" stands for; later ones win.
fn parse_sets(sets: &[String]) -> Result<Sets, ConfigError> {
    let mut table = Table::new();
    for set in sets {
        let Some((key, text)) = set.split_once('=') else {
            return refuse(SET, format!("{set:?} has no '='; write key=value, train.batch_size=16 say"));
        };
        let key = settable(key)?;
        overlay(&mut table, nested(key, set_value(key, text)));
    }
    Ok((table, Vec::new()))
}

fn convert_sets(sets: &[(String, Json)]) -> Result<Sets, ConfigError> {
    let (mut table, mut taken_out) = (Table::new(), Vec::new());
    for (key, json) in sets {
        let key = settable(key)?;
        if !json.is_null() {
            let value = Value::try_from(json)
                .or_else(|error| refuse(SET, format!("{key}: cannot be written as TOML: {error}")))?;
            overlay(&mut table, nested(key, value));
        } else if schema::keys().iter().any(|known| known.path == key) {
            taken_out.push(key.to_string());
        } else {
            let mut problem = schema::unknown(key.to_string());
            problem.source = SET.into();
            return Err(ConfigError { problems: vec![problem] });
        }
    }
    Ok((table, taken_out))
}

/// A dotted key that can be set. Deep ones are no keys, and would only burden the recursion.
fn settable(key: &str) -> Result<&str, ConfigError> {
    let key = key.trim();
    let names: Vec<&str> = key.split('.').collect();
    match key {
        "extends" => refuse(SET, "extends: belongs into a run file"),
        _ if names.contains(&"") || names.len() > MAX_DEPTH => refuse(
            SET,
            format!(
                "{:?} is not a key; write key=value, train.batch_size=16 say",
                key.chars().take(60).collect::<String>()
            ),
        ),
        _ => Ok(key),
    }
}

/// A TOML value, else a plain string; a key that holds text takes numbers and dates literally.
fn set_value(key: &str, text: &str) -> Value {
    match text.trim().parse::<Value>() {
        Ok(value) if value.is_str() || !schema::is_text(key) => value,
        _ => Value::String(text.to_string()),
    }
}
