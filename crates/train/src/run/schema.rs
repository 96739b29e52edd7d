//! The JSON Schema of a run, drawn from the structs, and what is read off it: unknown keys, wrong types, the nearest known key.

use super::{Problem, Run};
use schemars::generate::SchemaSettings;
use serde_json::{Value as Json, json};
use std::sync::OnceLock;
use toml::{Table, Value};

/// Names that other programs use, as hints only.
const ALIASES: [(&str, &str); 13] = [
    ("lr", "learning_rate"),
    ("d_model", "hidden_size"),
    ("n_layer", "num_layers"),
    ("n_head", "num_heads"),
    ("num_hidden_layers", "num_layers"),
    ("num_attention_heads", "num_heads"),
    ("num_key_value_heads", "num_kv_heads"),
    ("moe_intermediate_size", "expert_hidden_size"),
    ("n_shared_experts", "shared"),
    ("top_p", "p"),
    ("top_k", "k"),
    ("grad_clip", "clip"),
    ("gradient_accumulation_steps", "accumulate"),
];

/// Bytes of the longest word that is compared with known ones.
const LONGEST: usize = 100;

/// The schema, each type written out where it is used.
pub(super) fn root() -> &'static Json {
    static ROOT: OnceLock<Json> = OnceLock::new();
    ROOT.get_or_init(|| {
        let settings = SchemaSettings::draft2020_12().with(|s| s.inline_subschemas = true);
        let mut schema = settings.into_generator().into_root_schema_for::<Run>().to_value();
        // A phase has no defaults of its own.
        forget_defaults(&mut schema["properties"]["phase"]);
        schema
    })
}

fn forget_defaults(node: &mut Json) {
    let Some(map) = node.as_object_mut() else { return };
    map.remove("default");
    map.values_mut().for_each(forget_defaults);
}

/// The schema of a run file: that of a run and `extends`.
pub(super) fn json() -> String {
    let mut schema = root().clone();
    schema["properties"]["extends"] = json!({ "type": "string", "description": super::describe::EXTENDS });
    format!("{schema:#}")
}

/// A key of the schema: a leaf, or a table. `kinds` are the variants that know it, empty outside tagged tables.
#[derive(Clone, Debug)]
pub(super) struct Key {
    pub path: String,
    pub node: &'static Json,
    pub table: bool,
    pub kinds: Vec<(&'static str, &'static Json)>,
}

/// Every key in the order of the structs; a key that several variants know appears once.
pub(super) fn keys() -> &'static [Key] {
    static KEYS: OnceLock<Vec<Key>> = OnceLock::new();
    KEYS.get_or_init(|| {
        let mut found = Vec::new();
        collect(root(), "", &mut found);
        found
    })
}

fn collect(node: &'static Json, path: &str, found: &mut Vec<Key>) {
    for (kind, variant) in variants(node) {
        for (name, node) in properties(variant) {
            let path = join(path, name);
            match found.iter_mut().find(|key| key.path == path) {
                Some(key) => key.kinds.push((kind, node)),
                None => found.push(Key { path, node, table: false, kinds: vec![(kind, node)] }),
            }
        }
    }
    for (name, node) in properties(node) {
        let path = join(path, name);
        found.push(Key { path: path.clone(), node, table: is_table(node), kinds: Vec::new() });
        collect(node, &path, found);
    }
}

/// Name and schema of each variant of a table tagged by `kind`.
pub(super) fn variants(node: &'static Json) -> impl Iterator<Item = (&'static str, &'static Json)> {
    let variants = node["oneOf"].as_array().map_or(&[][..], Vec::as_slice);
    variants.iter().filter_map(|variant| Some((variant["properties"]["kind"]["const"].as_str()?, variant)))
}

pub(super) fn properties(node: &'static Json) -> impl Iterator<Item = (&'static str, &'static Json)> {
    node["properties"].as_object().into_iter().flatten().map(|(name, node)| (name.as_str(), node))
}

fn is_table(node: &'static Json) -> bool {
    node["properties"].is_object() || variants(node).next().is_some()
}

/// The dotted path of `key` in the table `path`; a key that TOML would quote is quoted.
pub(super) fn join(path: &str, key: &str) -> String {
    let bare = !key.is_empty() && key.chars().all(|c| c.is_ascii_alphanumeric() || c == '_' || c == '-');
    let key = if bare { key.to_string() } else { format!("{key:?}") };
    if path.is_empty() { key } else { format!("{path}.{key}") }
}

/// The value at a dotted path.
pub(super) fn lookup<'a>(table: &'a Table, path: &str) -> Option<&'a Value> {
    match path.split_once('.') {
        None => table.get(path),
        Some((head, rest)) => lookup(table.get(head)?.as_table()?, rest),
    }
}

/// Adds a problem for each key that no struct has and each value of a wrong type. A layer need not say the `kind` of a tagged table
/// that its parent has; `whole` is for the merged table, which must.
pub(super) fn check(table: &Table, whole: bool) -> Vec<Problem> {
    let mut problems = Vec::new();
    check_table(root(), table, "", whole, &mut problems);
    problems
}

fn check_table(node: &'static Json, table: &Table, path: &str, whole: bool, problems: &mut Vec<Problem>) {
    if variants(node).next().is_some() {
        return check_tagged(node, table, path, whole, problems);
    }
    for (key, value) in table {
        let dotted = join(path, key);
        match properties(node).find(|(name, _)| name == key) {
            None => problems.push(unknown(dotted)),
            Some((_, child)) if is_table(child) => match value.as_table() {
                Some(table) => check_table(child, table, &dotted, whole, problems),
                None => problems.push(wrong(&dotted, value, format!("expected a table, [{dotted}]"))),
            },
            Some((_, child)) => problems.extend(check_leaf(&[child], &dotted, value)),
        }
    }
}

fn check_tagged(node: &'static Json, table: &Table, path: &str, whole: bool, problems: &mut Vec<Problem>) {
    let kind = table.get("kind");
    let names: Vec<String> = variants(node).map(|(name, _)| format!("{name:?}")).collect();
    let known = |kind: &Value| variants(node).any(|(name, _)| kind.as_str() == Some(name));
    if let Some(kind) = kind.filter(|kind| !known(kind)) {
        let nearest = kind.as_str().and_then(|kind| nearest_of(kind, variants(node).map(|(name, _)| name)));
        problems.push(wrong(
            &join(path, "kind"),
            kind,
            format!("expected one of {}{}", names.join(", "), hint(nearest)),
        ));
        return;
    }
    if kind.is_none() && whole {
        let message = format!("is missing; set it to one of {}", names.join(", "));
        problems.push(Problem { key: join(path, "kind"), message, ..Problem::default() });
        return;
    }
    for (key, value) in table.iter().filter(|(key, _)| *key != "kind") {
        let dotted = join(path, key);
        let mine = |name: &str| kind.is_none_or(|kind| kind.as_str() == Some(name));
        let nodes = |all: bool| {
            let with_key = variants(node).filter(move |(name, _)| all || mine(name));
            with_key.filter_map(|(name, v)| Some((name, v["properties"].get(key)?))).collect::<Vec<_>>()
        };
        match (nodes(false), nodes(true)) {
            (_, anywhere) if anywhere.is_empty() => problems.push(unknown(dotted)),
            (here, anywhere) if here.is_empty() => {
                let owners: Vec<String> = anywhere.iter().map(|(name, _)| format!("{name:?}")).collect();
                let kind = kind.and_then(Value::as_str).unwrap_or_default();
                let message = format!("does not belong to kind = {kind:?}, only to {}", owners.join(" and "));
                problems.push(wrong(&dotted, value, message));
            }
            (here, _) => {
                let nodes: Vec<&Json> = here.into_iter().map(|(_, node)| node).collect();
                problems.extend(check_leaf(&nodes, &dotted, value));
            }
        }
    }
}

/// A value must be what one of `nodes` expects, and its numbers finite.
fn check_leaf(nodes: &[&Json], path: &str, value: &Value) -> Option<Problem> {
    if !nodes.iter().any(|node| accepts(node, value)) {
        let near = value.as_str().and_then(|text| nearest_of(text, nodes.iter().flat_map(|node| choices(node))));
        return Some(wrong(path, value, format!("expected {}{}", expected(nodes[0]), hint(near))));
    }
    let infinite = |value: &Value| value.as_float().is_some_and(|number| !number.is_finite());
    let list = value.as_array().map_or(&[][..], Vec::as_slice);
    (infinite(value) || list.iter().any(infinite)).then(|| wrong(path, value, "must be a finite number".into()))
}

fn accepts(node: &Json, value: &Value) -> bool {
    if let Some(options) = node["anyOf"].as_array().or(node["oneOf"].as_array()) {
        return options.iter().any(|node| accepts(node, value));
    }
    if node["const"].is_string() || node["enum"].is_array() {
        return choices(node).any(|choice| value.as_str() == Some(choice));
    }
    types(node).any(|name| match (name, value) {
        ("integer", Value::Integer(number)) => node["minimum"].as_i64().is_none_or(|least| *number >= least),
        ("number", Value::Integer(_) | Value::Float(_)) => true,
        ("array", Value::Array(list)) => list.iter().all(|value| accepts(&node["items"], value)),
        ("string", Value::String(_)) | ("boolean", Value::Boolean(_)) => true,
        _ => false,
    })
}

fn types(node: &Json) -> impl Iterator<Item = &str> {
    let list = node["type"].as_array().into_iter().flatten();
    list.chain(std::iter::once(&node["type"])).filter_map(Json::as_str).filter(|name| *name != "null")
}

/// The words that a choice allows.
fn choices(node: &Json) -> impl Iterator<Item = &str> {
    let consts = node["oneOf"].as_array().into_iter().flatten().map(|option| &option["const"]);
    let list = node["enum"].as_array().into_iter().flatten();
    std::iter::once(&node["const"]).chain(consts).chain(list).filter_map(Json::as_str)
}

/// What a leaf expects, in words.
pub(super) fn expected(node: &Json) -> String {
    let words: Vec<String> = choices(node).map(|word| format!("{word:?}")).collect();
    if !words.is_empty() {
        return if words.len() == 1 { words[0].clone() } else { format!("one of {}", words.join(", ")) };
    }
    if let Some(options) = node["anyOf"].as_array() {
        return options.iter().map(expected).filter(|text| !text.is_empty()).collect::<Vec<_>>().join(" or ");
    }
    match types(node).next() {
        Some("integer") if node["minimum"] == 0 => "a whole number, 0 or more".into(),
        Some("integer") => "a whole number".into(),
        Some("number") => "a number".into(),
        Some("boolean") => "true or false".into(),
        Some("string") => "a text".into(),
        Some("array") if types(&node["items"]).any(|name| name == "string") => "a list of texts, [\"…\"]".into(),
        Some("array") => "a list of numbers, [0.6, 0.4, 0.2] say".into(),
        _ => String::new(), // null: absence is not written in TOML
    }
}

/// Whether the value at a path is text and nothing else, so that `--set name=42` means "42".
pub(super) fn is_text(path: &str) -> bool {
    let key = keys().iter().find(|key| key.path == path);
    key.is_some_and(|key| {
        !key.table && types(key.node).all(|name| name == "string") && types(key.node).next().is_some()
    })
}

fn wrong(path: &str, value: &Value, message: String) -> Problem {
    Problem { key: path.into(), value: Some(shown(value)), message, ..Problem::default() }
}

/// A value as TOML on one line, cut where it is long.
pub(super) fn shown(value: &Value) -> String {
    let text = value.to_string().replace('\n', " ");
    if text.chars().count() <= 60 { text } else { text.chars().take(60).chain(['…']).collect() }
}

pub(super) fn unknown(path: String) -> Problem {
    let other =
        nearest(&path).map_or("`config docs` lists the known ones".into(), |key| format!("did you mean {key}?"));
    let message = format!("unknown key; {other}");
    Problem { key: path, message, ..Problem::default() }
}

fn hint(nearest: Option<&str>) -> String {
    nearest.map_or(String::new(), |key| format!("; did you mean {key}?"))
}

/// The known key most like a dotted path: its last name counts, a key of the same table comes first.
pub(super) fn nearest(path: &str) -> Option<String> {
    let split =
        |path: &str| path.rsplit_once('.').map_or((String::new(), path.to_string()), |(a, b)| (a.into(), b.into()));
    let (table, name) = split(path);
    let name = ALIASES.iter().find(|(alias, _)| name == *alias).map_or(name.as_str(), |(_, ours)| ours).to_string();
    let in_phase = path.starts_with("phase.");
    let scored = keys().iter().filter(|key| key.path.starts_with("phase.") == in_phase).map(|key| {
        let (home, candidate) = split(&key.path);
        (likeness(&name, &candidate), home == table, &key.path)
    });
    let best = scored.max_by(|a, b| (a.0 + bonus(a.1)).total_cmp(&(b.0 + bonus(b.1))))?;
    (best.0 >= 0.85).then(|| best.2.clone())
}

fn bonus(same_table: bool) -> f64 {
    if same_table { 0.1 } else { 0.0 }
}

/// From 0 to 1. Nothing is like a word longer than any key could be: comparing megabytes would take seconds.
fn likeness(a: &str, b: &str) -> f64 {
    if a.len() > LONGEST {
        return 0.0;
    }
    strsim::jaro_winkler(&a.to_lowercase().replace('-', "_"), b)
}

/// The most similar of some words, if any is similar.
pub(super) fn nearest_of<'a>(text: &str, words: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    let best = words.map(|word| (likeness(text, word), word)).max_by(|a, b| a.0.total_cmp(&b.0))?;
    (best.0 >= 0.85).then_some(best.1)
}
