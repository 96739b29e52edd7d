//! Laying one layer of a configuration over another: the child wins key by key, and what its choices make meaningless goes.

use super::{Overrides, Train, schema};
use serde::Deserialize;
use toml::{Table, Value};

/// Keys that only some choices of another key use.
pub(super) struct Choice {
    pub table: &'static str,
    pub selector: &'static str,
    pub key: &'static str,
    pub used_by: &'static [&'static str],
}

const fn choice(
    table: &'static str,
    selector: &'static str,
    key: &'static str,
    used_by: &'static [&'static str],
) -> Choice {
    Choice { table, selector, key, used_by }
}

/// Schedules that follow a warm-up.
const WARMED: &[&str] = &["cosine", "constant", "linear", "polynomial", "wsd", "sgdr"];

pub(super) const CHOICES: [Choice; 18] = [
    choice("model.adaptive_window", "kind", "min", &["token"]),
    choice("model.adaptive_window", "kind", "max", &["token"]),
    choice("model.adaptive_window", "kind", "block", &["token"]),
    choice("model.position", "kind", "max", &["cope", "learned"]),
    choice("train", "batch_scaling", "base_batch_size", &["linear", "sqrt"]),
    choice("train", "schedule", "min_lr_ratio", &["cosine", "linear", "polynomial", "wsd", "sgdr"]),
    choice("train", "schedule", "power", &["polynomial"]),
    choice("train", "schedule", "decay_share", &["wsd"]),
    choice("train", "schedule", "restart_every", &["sgdr"]),
    choice("train", "schedule", "restart_growth", &["sgdr"]),
    choice("train", "schedule", "warmup", WARMED),
    choice("train", "schedule", "warmup_epochs", WARMED),
    choice("train", "schedule", "warmup_steps", WARMED),
    choice("train", "optimizer", "beta1", &["adam", "adamw", "lion", "muon"]),
    choice("train", "optimizer", "beta2", &["adam", "adamw", "lion", "muon"]),
    choice("train", "optimizer", "eps", &["adam", "adamw", "lars", "muon"]),
    choice("train", "optimizer", "momentum", &["sgd", "lars", "muon"]),
    choice("train", "optimizer", "trust", &["lars"]),
];

/// Keys without a meaning in a text run, and in a run on documents.
pub(super) const OF_DOCUMENTS: [&str; 10] = [
    "data.facts",
    "data.chat",
    "data.paraphrases",
    "data.shuffle",
    "data.augment",
    "data.routing",
    "train.epochs",
    "train.warmup_epochs",
    "phase.facts",
    "phase.chat",
];
pub(super) const OF_TEXT: [&str; 8] = [
    "data.text",
    "data.tokenizer",
    "data.block_size",
    "data.lengths",
    "train.max_steps",
    "train.warmup_steps",
    "eval.batches",
    "phase.text",
];

/// Lays `child` over `parent`: tables key by key, else the child wins. Keys of the parent that lose their meaning by a choice of the child
/// go; `train.X` of the child takes the place of every phase's.
pub(super) fn merge(parent: &mut Table, child: Table) {
    forget_kinds(parent, &child);
    forget_choice(parent, &child, "model.position");
    forget_choice(parent, &child, "model.adaptive_window");
    let writes = |path: &str| schema::lookup(&child, path).is_some();
    if writes("data.text") {
        OF_DOCUMENTS.iter().for_each(|path| remove(parent, path));
    } else if writes("data.facts") || writes("data.chat") {
        OF_TEXT.iter().for_each(|path| remove(parent, path));
    }
    let train = schema::lookup(&child, "train").and_then(Value::as_table).cloned().unwrap_or_default();
    forget_unused(parent.get_mut("train"), &train);
    if let Some(phases) = parent.get_mut("phase").and_then(Value::as_table_mut) {
        for (name, phase) in phases.iter_mut() {
            let Some(settings) = phase.get_mut("train") else { continue };
            train.keys().for_each(|key| remove_key(settings, key));
            forget_unused(Some(&mut *settings), &train);
            let own = schema::lookup(&child, &format!("phase.{name}.train")).and_then(Value::as_table);
            own.into_iter().for_each(|own| forget_unused(Some(&mut *settings), own));
        }
    }
    overlay(parent, child);
}

pub(super) fn overlay(parent: &mut Table, child: Table) {
    for (key, value) in child {
        match (parent.get_mut(&key), value) {
            (Some(Value::Table(old)), Value::Table(new)) => overlay(old, new),
            (_, value) => drop(parent.insert(key, value)),
        }
    }
}

pub(super) fn remove(table: &mut Table, path: &str) {
    match path.split_once('.') {
        None => drop(table.remove(path)),
        Some((head, rest)) => {
            if let Some(Value::Table(inner)) = table.get_mut(head) {
                remove(inner, rest);
            }
        }
    }
}

fn remove_key(table: &mut Value, key: &str) {
    if let Value::Table(table) = table {
        table.remove(key);
    }
}

/// Where the child chooses a `kind` of router, the parent's keys of other kinds go; a key of no kind stays, to be refused.
fn forget_kinds(parent: &mut Table, child: &Table) {
    for table in schema::keys().iter().filter(|key| key.table && schema::variants(key.node).next().is_some()) {
        let Some(kind) = schema::lookup(child, &format!("{}.kind", table.path)) else { continue };
        let keys = |mine: bool| {
            let chosen = schema::variants(table.node).filter(move |(name, _)| (kind.as_str() == Some(name)) == mine);
            chosen.flat_map(|(_, variant)| schema::properties(variant)).map(|(name, _)| name).collect::<Vec<_>>()
        };
        let kept = keys(true);
        keys(false)
            .iter()
            .filter(|key| !kept.contains(key))
            .for_each(|key| remove(parent, &format!("{}.{key}", table.path)));
    }
}

/// Where the child makes a choice in `table`, the parent's keys that it does not use go.
fn forget_choice(parent: &mut Table, child: &Table, table: &str) {
    for choice in CHOICES.iter().filter(|choice| choice.table == table) {
        let chosen = schema::lookup(child, &format!("{table}.{}", choice.selector)).and_then(Value::as_str);
        if chosen.is_some_and(|chosen| !choice.used_by.contains(&chosen)) {
            remove(parent, &format!("{table}.{}", choice.key));
        }
    }
}

/// The same for a `[train]` table and the changes to it.
fn forget_unused(settings: Option<&mut Value>, changes: &Table) {
    let Some(Value::Table(settings)) = settings else { return };
    for choice in CHOICES.iter().filter(|choice| choice.table == "train") {
        let chosen = changes.get(choice.selector).and_then(Value::as_str);
        if chosen.is_some_and(|chosen| !choice.used_by.contains(&chosen)) {
            settings.remove(choice.key);
        }
    }
}

/// `[train]` with the changes of one phase.
pub(super) fn overridden(train: &Train, changes: &Overrides) -> Train {
    let mut table = Value::try_from(train).expect("counts of a validated run fit into TOML's 64-bit integers");
    forget_unused(Some(&mut table), &changes.0);
    if let Value::Table(table) = &mut table {
        overlay(table, changes.0.clone());
    }
    Train::deserialize(table).expect("both parts were read as [train], and so is their union")
}

/// The table that holds one value at a dotted path.
pub(super) fn nested(path: &str, value: Value) -> Table {
    match path.split_once('.') {
        None => Table::from_iter([(path.to_string(), value)]),
        Some((head, rest)) => Table::from_iter([(head.to_string(), Value::Table(nested(rest, value)))]),
    }
}
