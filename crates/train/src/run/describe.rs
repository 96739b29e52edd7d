//! The configuration in words: the table of every key, and what differs between two runs.

use super::Run;
use super::schema::{self, Key};
use serde_json::Value as Json;
use std::collections::BTreeMap;
use toml::{Table, Value};

/// Meaning of the one key that is resolved before there is a run.
pub(super) const EXTENDS: &str =
    "A run file, relative to this one, or the name of a standard run, whose values hold where this file is silent.";

/// A dotted key whose value differs and both values as TOML, "absent" where a run has none.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Change {
    pub key: String,
    pub a: String,
    pub b: String,
}

/// One row per key in the order of the structs; a phase's `train` stands for all keys of `[train]`.
pub(super) fn docs() -> String {
    let mut rows = vec![
        "| key | type | default | meaning |\n|---|---|---|---|".to_string(),
        row("extends", "a text", "absent", EXTENDS),
    ];
    let in_phase = |key: &Key| key.path.starts_with("phase.") && key.path.split('.').count() > 3;
    for key in schema::keys().iter().filter(|key| !in_phase(key)) {
        if key.path.starts_with("phase.") && key.path.ends_with(".train") {
            rows.push(row(&key.path, "a table", "absent", description(key.node)));
        } else if !key.table {
            rows.push(row(&key.path, &kind(key), &default(key), &meaning(key)));
        }
    }
    rows.join("\n") + "\n"
}

fn row(key: &str, kind: &str, default: &str, meaning: &str) -> String {
    let cells = [&format!("`{key}`"), kind, default, meaning].map(|cell| cell.replace('|', "\\|").replace('\n', " "));
    format!("| {} |", cells.join(" | "))
}

fn description(node: &Json) -> &str {
    node["description"].as_str().unwrap_or_default()
}

fn kind(key: &Key) -> String {
    if key.path.ends_with(".kind") && !key.kinds.is_empty() {
        let names: Vec<String> = key.kinds.iter().map(|(name, _)| format!("{name:?}")).collect();
        return format!("one of {}", names.join(", "));
    }
    by_kind(key, schema::expected).unwrap_or_else(|| schema::expected(key.node))
}

/// The default; for a key of some kinds only, each default with its kinds.
fn default(key: &Key) -> String {
    let defaults = Table::try_from(Run::default()).unwrap_or_default();
    let text = |node: &Json| if node["default"].is_null() { "absent".into() } else { format!("`{}`", node["default"]) };
    match schema::lookup(&defaults, &key.path) {
        Some(value) => format!("`{value}`"),
        None => by_kind(key, text).unwrap_or("absent".into()),
    }
}

/// What `text` says of each kind that knows the key: once where all agree, else with the names of the kinds. `None` outside tagged tables.
fn by_kind(key: &Key, text: impl Fn(&Json) -> String) -> Option<String> {
    let mut groups: Vec<(String, Vec<&str>)> = Vec::new();
    for (name, node) in &key.kinds {
        let text = text(node);
        match groups.iter_mut().find(|(known, _)| *known == text) {
            Some((_, names)) => names.push(name),
            None => groups.push((text, vec![name])),
        }
    }
    let one = |(text, names): &(String, Vec<&str>)| format!("{text} ({})", names.join(", "));
    match groups.as_slice() {
        [] => None,
        [(text, _)] => Some(text.clone()),
        many => Some(many.iter().map(one).collect::<Vec<_>>().join("; ")),
    }
}

/// The doc comment, the choices explained, and the kinds that know the key.
fn meaning(key: &Key) -> String {
    let mut parts = vec![description(key.node).to_string()];
    let choices = key.node["oneOf"].as_array().into_iter().flatten();
    parts
        .extend(choices.filter_map(|choice| Some(format!("`{}`: {}", choice["const"].as_str()?, description(choice)))));
    if key.path.ends_with(".kind") {
        let table = key.path.trim_end_matches(".kind");
        let node = schema::keys().iter().find(|key| key.path == table).map(|key| key.node);
        let variants = node.into_iter().flat_map(schema::variants);
        parts.extend(variants.map(|(name, variant)| format!("`{name}`: {}", description(variant))));
    } else if !key.kinds.is_empty() {
        parts.push(format!("({})", key.kinds.iter().map(|(name, _)| *name).collect::<Vec<_>>().join(", ")));
    }
    parts.retain(|part| !part.is_empty());
    parts.join(" ")
}

pub(super) fn diff(a: &Run, b: &Run) -> Vec<Change> {
    let (a, b) = (leaves(a), leaves(b));
    let keys: std::collections::BTreeSet<&String> = a.keys().chain(b.keys()).collect();
    let changed = keys.into_iter().filter(|key| a.get(*key) != b.get(*key));
    let text = |leaves: &BTreeMap<String, Value>, key| leaves.get(key).map_or("absent".into(), Value::to_string);
    changed.map(|key| Change { key: key.clone(), a: text(&a, key), b: text(&b, key) }).collect()
}

/// Every value by its dotted key.
fn leaves(run: &Run) -> BTreeMap<String, Value> {
    let mut found = BTreeMap::new();
    flatten(&Table::try_from(run).unwrap_or_default(), "", &mut found);
    found
}

fn flatten(table: &Table, path: &str, found: &mut BTreeMap<String, Value>) {
    for (key, value) in table {
        let path = schema::join(path, key);
        match value {
            Value::Table(inner) => flatten(inner, &path, found),
            value => drop(found.insert(path, value.clone())),
        }
    }
}
