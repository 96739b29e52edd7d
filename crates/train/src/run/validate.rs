//! What makes the values of a run good: ranges and combinations, all problems at once.

use super::merge::{CHOICES, OF_DOCUMENTS, OF_TEXT, overridden};
use super::{Augment, ConfigError, Monitor, Optimizer, Problem, Response, Run, Train, schema};
use crate::auto_clip;
use model::config::{DepthChoice, MAX_NUMBERS};
use tensor::{Engine, Precision};
use toml::{Table, Value};

/// Counts above this are slips of the keyboard; the products of two fit into 64 bits.
const MAX_COUNT: u64 = 1_000_000_000;
const MAX_THREADS: usize = 1024;
const MAX_NAME: usize = 100;
/// Lengths that are evaluated one by one.
const MAX_LENGTHS: usize = 16;
/// Variants of a document.
const MAX_COPIES: usize = 100;

/// Problems as (dotted key, message).
#[derive(Default)]
struct Found(Vec<(String, String)>);

impl Found {
    fn require(&mut self, good: bool, key: impl Into<String>, message: impl Into<String>) {
        if !good {
            self.0.push((key.into(), message.into()));
        }
    }

    fn count(&mut self, key: &str, count: u64, least: u64) {
        self.require((least..=MAX_COUNT).contains(&count), key, format!("must be from {least} to {MAX_COUNT}"));
    }
}

/// Values that no file can hold, so that everything after can be written as TOML.
fn unwritable(run: &Run) -> Option<(String, String)> {
    if i64::try_from(run.seed).is_err() {
        return Some(("seed".into(), "must be at most 2^63 - 1".into()));
    }
    Table::try_from(run).err().map(|error| (String::new(), format!("cannot be written as TOML: {error}")))
}

pub(super) fn validate(run: &Run) -> Result<(), ConfigError> {
    let problem = |key, value, message| Problem { key, value, message, ..Problem::default() };
    if let Some((key, message)) = unwritable(run) {
        return Err(ConfigError { problems: vec![problem(key, None, message)] });
    }
    let table = Table::try_from(run).unwrap_or_default();
    let mut found = Found::default();
    general(run, &mut found);
    torch(run, &mut found);
    data(run, &mut found);
    augment(run, &mut found);
    lengths(run, &mut found);
    found.0.extend(run.model.problems().into_iter().map(|p| (format!("model.{}", p.key), p.message)));
    phases(run, &mut found);
    measures(run, &mut found);
    monitor(run, &mut found);
    unused(run, &table, &mut found);
    size(run, &mut found);
    let value = |key: &str| schema::lookup(&table, key).filter(|value| !value.is_table()).map(schema::shown);
    let mut problems: Vec<Problem> = Vec::new();
    for (key, message) in found.0 {
        let next = problem(key.clone(), value(&key), message);
        if !problems.contains(&next) {
            problems.push(next);
        }
    }
    if problems.is_empty() { Ok(()) } else { Err(ConfigError { problems }) }
}

fn general(run: &Run, found: &mut Found) {
    let length = run.name.chars().count();
    let plain = !run.name.starts_with('.') && !run.name.contains(|c: char| c == '/' || c == '\\' || c.is_control());
    found.require(
        (1..=MAX_NAME).contains(&length) && plain,
        "name",
        "must be a plain file name of up to 100 characters",
    );
    if let Err(error) = run.engine.check(&run.device) {
        found.require(false, error.key, error.message);
    }
    let multiplies = run.dtype == Precision::F32 || run.engine != Engine::Reference;
    found.require(
        multiplies,
        "dtype",
        "has no effect with engine = \"reference\", whose products are f32; use engine = \"cpu\"",
    );
    found.require(run.threads <= MAX_THREADS, "threads", "must be at most 1024; 0 takes every core");
}

/// What the torch engine does not have.
fn torch(run: &Run, found: &mut Found) {
    if run.engine != Engine::Torch {
        return;
    }
    let mut refuse = |key: &str, what: &str| {
        found.require(false, key, format!("{what} is not in the torch engine; use engine = \"cpu\""));
    };
    match &run.model.router {
        moe_router::Config::ExpertChoice { .. } => refuse("model.router.kind", "\"expert_choice\""),
        moe_router::Config::Forced { .. } => refuse("model.router.kind", "\"forced\""),
        moe_router::Config::LearnedP { .. } => refuse("model.router.kind", "\"learned_p\""),
        _ => {}
    }
    if run.data.routing.is_some() {
        refuse("data.routing", "a recorded routing");
    }
    if run.model.adaptive_window.on() {
        refuse("model.adaptive_window.kind", "an adaptive window");
    }
    if run.model.depths.on() {
        refuse("model.depths.capacity", "a mixture of depths");
    }
    for name in run.phases() {
        if run.phase(name).activation_checkpointing {
            refuse("train.activation_checkpointing", "activation checkpointing");
        }
        match run.phase(name).optimizer {
            Optimizer::Lion => refuse("train.optimizer", "\"lion\""),
            Optimizer::Muon => refuse("train.optimizer", "\"muon\""),
            Optimizer::Adam | Optimizer::Adamw | Optimizer::Sgd | Optimizer::Lars => {}
        }
        let train = run.phase(name);
        if train.sam > 0.0 {
            refuse("train.sam", "sharpness-aware minimisation");
        }
        if train.noise_scale > 0 {
            refuse("train.noise_scale", "the gradient noise scale");
        }
    }
    if run.losses.label_smoothing > 0.0 {
        refuse("losses.label_smoothing", "label smoothing");
    }
}

fn data(run: &Run, found: &mut Found) {
    let data = &run.data;
    let message = "excludes data.text: a run learns documents or one text; take one of them out";
    for (key, path) in [("facts", &data.facts), ("chat", &data.chat), ("paraphrases", &data.paraphrases)] {
        found.require(path.is_none() || data.text.is_none(), format!("data.{key}"), message);
    }
    let words = data.text.is_some() || data.tokenizer == "word";
    found.require(words, "data.tokenizer", "is for data.text alone; facts and chat are cut into words");
    found.require(data.max_length >= 2, "data.max_length", "must be at least 2: a token and the one to predict");
    found.count("data.max_length", data.max_length as u64, 0);
    found.count("data.block_size", data.block_size as u64, 1);
    let share = (0.0..1.0).contains(&data.val_fraction);
    found.require(share, "data.val_fraction", "must be in [0, 1); set it to 0.1, say");
    let message = match run.model.router {
        moe_router::Config::Dense {} => "has no effect without experts; choose a model.router",
        _ => "cannot hold with model.router.kind = \"learned_p\", whose weights are gates; choose top_p, say",
    };
    let routed = !matches!(run.model.router, moe_router::Config::Dense {} | moe_router::Config::LearnedP { .. });
    found.require(routed || data.routing.is_none(), "data.routing", message);
    let whole = !run.model.depths.on() || data.routing.is_none();
    let message = "says the experts of every token in every block, and a mixture of depths gives a block some; set model.depths.capacity = 1";
    found.require(whole, "data.routing", message);
}

/// Every length must fill a batch of as many tokens.
fn lengths(run: &Run, found: &mut Found) {
    let (lengths, block) = (&run.data.lengths, run.data.block_size);
    let tokens = run.phase("text").batch_size.saturating_mul(block);
    let fits = |length: &usize| *length > 0 && tokens.is_multiple_of(*length);
    if let Some(length) = lengths.iter().find(|length| !fits(length)) {
        let message =
            format!("must divide the tokens of a batch, train.batch_size · data.block_size = {tokens}, not {length}");
        found.require(run.data.text.is_none(), "data.lengths", message);
    }
    let distinct = lengths.iter().enumerate().all(|(i, length)| !lengths[..i].contains(length));
    found.require(distinct, "data.lengths", "must not list a length twice");
    found.require(lengths.len() <= MAX_LENGTHS, "data.lengths", format!("must list at most {MAX_LENGTHS} lengths"));
}

fn augment(run: &Run, found: &mut Found) {
    let (augment, plain) = (&run.data.augment, Augment::default());
    found.require(augment.copies <= MAX_COPIES, "data.augment.copies", format!("must be at most {MAX_COPIES}"));
    let mut chances = 0.0;
    for (key, chance, default) in [
        ("templates", augment.templates, plain.templates),
        ("synonyms", augment.synonyms, plain.synonyms),
        ("drop", augment.drop, plain.drop),
    ] {
        let key = format!("data.augment.{key}");
        found.require((0.0..=1.0).contains(&chance), key.as_str(), "must be in [0, 1]; set it to 0.3, say");
        let used = augment.copies > 0 || chance == default;
        found.require(used, key, "has no effect with copies = 0; set data.augment.copies to 1, say");
        chances += chance;
    }
    let message = "has no effect with copies = 0; set data.augment.copies to 1, say";
    found.require(augment.copies > 0 || augment.table.is_none(), "data.augment.table", message);
    let message = "needs a rule: set data.augment.templates or synonyms above 0";
    found.require(augment.copies == 0 || chances > 0.0, "data.augment.copies", message);
}

fn phases(run: &Run, found: &mut Found) {
    train(&run.train, &|key| format!("train.{key}"), found);
    for name in ["facts", "chat", "text"] {
        let Some(phase) = run.phase.of(name).filter(|phase| !phase.is_empty()) else { continue };
        let kind = if run.data.text.is_some() { "a text run" } else { "a run on documents" };
        let phases = run.phases().join(" and ");
        found.require(
            run.phases().contains(&name),
            format!("phase.{name}"),
            format!("{kind} has only the phase {phases}"),
        );
        let own = |key: &str| match phase.train.0.contains_key(key) {
            true => format!("phase.{name}.train.{key}"),
            false => format!("train.{key}"),
        };
        train(&overridden(&run.train, &phase.train), &own, found);
    }
}

/// The ranges of `[train]`; `name` gives the dotted key of a field.
fn train(train: &Train, name: &dyn Fn(&str) -> String, found: &mut Found) {
    let t = train;
    let zero_or_more = |number: f64| number.is_finite() && number >= 0.0;
    let rate = "must be a finite number, 0 or more; set it to 1e-4, say";
    found.require(zero_or_more(t.learning_rate), name("learning_rate"), rate);
    for (key, count, least) in [
        ("base_batch_size", t.base_batch_size as u64, 1),
        ("batch_size", t.batch_size as u64, 1),
        ("accumulate", t.accumulate as u64, 1),
        ("epochs", t.epochs, 1),
        ("max_steps", t.max_steps, 1),
        ("warmup_epochs", t.warmup_epochs, 0),
        ("warmup_steps", t.warmup_steps, 0),
        ("restart_every", t.restart_every, 1),
        ("restart_growth", t.restart_growth, 1),
        ("patience", t.patience, 0),
        ("noise_scale", t.noise_scale, 0),
        ("clip_window", t.clip_window as u64, 1),
    ] {
        found.count(&name(key), count, least);
    }
    let parts = t.accumulate <= t.batch_size.max(1);
    found.require(parts, name("accumulate"), format!("must be at most train.batch_size = {}", t.batch_size));
    let ratio = (0.0..=1.0).contains(&t.min_lr_ratio);
    found.require(ratio, name("min_lr_ratio"), "must be in [0, 1]; set it to 0.1, say");
    let share = t.decay_share > 0.0 && t.decay_share <= 1.0;
    found.require(share, name("decay_share"), "must be above 0 and at most 1; set it to 0.2, say");
    found.require(zero_or_more(t.weight_decay), name("weight_decay"), "must be a finite number, 0 or more");
    found.require(zero_or_more(t.min_delta), name("min_delta"), "must be a finite number, 0 or more");
    found.require(zero_or_more(t.sam), name("sam"), "must be a finite number, 0 or more; set it to 0.05, say");
    let measured = t.noise_scale == 0 || t.accumulate >= 2;
    found.require(measured, name("noise_scale"), "compares the parts of a batch; set train.accumulate to 2 or more");
    let percentile = (0.0..100.0).contains(&t.clip_percentile);
    found.require(
        percentile,
        name("clip_percentile"),
        "must be in [0, 100); set it to 95, say, or to 0 for clip alone",
    );
    if percentile && t.clip_percentile > 0.0 {
        let least = auto_clip::least(t.clip_percentile);
        found.require(
            (least..=auto_clip::LONGEST).contains(&t.clip_window),
            name("clip_window"),
            format!("must be from {least}, which leave one beyond the percentile, to {}", auto_clip::LONGEST),
        );
    }
    for (key, share) in [("beta1", t.beta1), ("beta2", t.beta2), ("momentum", t.momentum), ("ema", t.ema)] {
        found.require((0.0..1.0).contains(&share), name(key), "must be in [0, 1); set it to 0.9, say");
    }
    for (key, number, say) in
        [("eps", t.eps, "1e-8"), ("trust", t.trust, "0.001"), ("clip", t.clip, "100"), ("power", t.power, "2")]
    {
        let good = number.is_finite() && number > 0.0;
        found.require(good, name(key), format!("must be a finite number above 0; set it to {say}, say"));
    }
}

fn measures(run: &Run, found: &mut Found) {
    let losses = &run.losses;
    for (key, number) in [
        ("balance", losses.balance),
        ("entropy", losses.entropy),
        ("budget", losses.budget),
        ("z", losses.z),
        ("heads", losses.heads),
        ("depths", losses.depths),
    ] {
        let good = number.is_finite() && number >= 0.0;
        found.require(good, format!("losses.{key}"), "must be a finite number, 0 or more; 0 only measures it");
    }
    let held = run.model.depths.choice == DepthChoice::Best || losses.depths > 0.0;
    let message = "must be above 0 with model.depths.choice = \"causal\": nothing else draws the tokens to the capacity; set it to 0.1, say";
    found.require(held, "losses.depths", message);
    let smoothing = (0.0..1.0).contains(&losses.label_smoothing);
    found.require(smoothing, "losses.label_smoothing", "must be in [0, 1); set it to 0.1, say");
    found.count("eval.every", run.eval.every, 0);
    found.count("eval.batches", run.eval.batches as u64, 1);
    let prompts = run.eval.samples.iter().all(|prompt| !prompt.trim().is_empty());
    found.require(prompts, "eval.samples", "must hold prompts of at least one word");
    found.count("checkpoint.every", run.checkpoint.every, 0);
    found.count("checkpoint.keep", run.checkpoint.keep as u64, 1);
    found.count("checkpoint.keep_every", run.checkpoint.keep_every, 0);
    let saves = run.checkpoint.every > 0 || run.checkpoint.keep_every == 0;
    found.require(saves, "checkpoint.keep_every", "has no effect with checkpoint.every = 0");
    let held_out = run.data.val_fraction > 0.0 && run.eval.every > 0;
    let message = "needs a held-out loss: set data.val_fraction to 0.1 and eval.every to 1, say";
    found.require(held_out || !run.checkpoint.best, "checkpoint.best", message);
    let patient = run.phases().iter().any(|name| run.phase(name).patience > 0);
    found.require(held_out || !patient, "train.patience", message);
    let used = patient || run.train.min_delta == Train::default().min_delta;
    found.require(used, "train.min_delta", "has no effect with patience = 0; set train.patience to 5, say");
    let clips = run.phases().iter().any(|name| run.phase(name).clip_percentile > 0.0);
    let used = clips || run.train.clip_window == Train::default().clip_window;
    let message = "has no effect with clip_percentile = 0; set train.clip_percentile to 95, say";
    found.require(used, "train.clip_window", message);
}

fn monitor(run: &Run, found: &mut Found) {
    let (m, defaults) = (&run.monitor, Monitor::default());
    let rules = [
        ("exploding", m.exploding),
        ("vanishing", m.vanishing),
        ("layer_exploding", m.layer_exploding),
        ("layer_vanishing", m.layer_vanishing),
    ];
    for (key, factor) in rules {
        let good = factor == 0.0 || (factor.is_finite() && factor > 1.0);
        found.require(good, format!("monitor.{key}"), "must be a finite number above 1, or 0 for no rule");
    }
    let good = m.update_ratio.is_finite() && m.update_ratio >= 0.0;
    found.require(good, "monitor.update_ratio", "must be a finite number, 0 or more; set it to 0.01, say");
    let watches = m.watches();
    let message = "has no effect without a rule; set monitor.exploding to 4, say";
    found.require(watches || m.response == Response::None, "monitor.response", message);
    found.require(watches || m.cooldown == defaults.cooldown, "monitor.cooldown", message);
    found.count("monitor.cooldown", m.cooldown, 1);
    found.require(
        m.factor > 0.0 && m.factor < 1.0,
        "monitor.factor",
        "must be above 0 and below 1; set it to 0.5, say",
    );
    let responds = m.response != Response::None || m.factor == defaults.factor;
    found.require(
        responds,
        "monitor.factor",
        "has no effect without a response; set monitor.response to \"rate\", say",
    );
    let joins = m.response != Response::Batch || m.batches() >= 2;
    found.require(joins, "monitor.factor", "joins no batches: 1 / factor rounds to 1; set it to 0.5, say");
}

/// A value that was changed and has no effect is a misunderstanding, so it is refused rather than ignored.
fn unused(run: &Run, table: &Table, found: &mut Found) {
    let defaults = Table::try_from(Run::default()).unwrap_or_default();
    let changed = |path: &str| schema::lookup(table, path).is_some_and(|v| Some(v) != schema::lookup(&defaults, path));
    let chosen = |path: &str| schema::lookup(table, path).and_then(Value::as_str).unwrap_or_default().to_string();
    for choice in &CHOICES {
        let (key, selector) =
            (format!("{}.{}", choice.table, choice.key), format!("{}.{}", choice.table, choice.selector));
        let message = |chosen: &str| {
            let users: Vec<String> = choice.used_by.iter().map(|user| format!("{user:?}")).collect();
            format!("has no effect with {} = {chosen:?}, only with {}", choice.selector, users.join(", "))
        };
        let own = chosen(&selector);
        found.require(choice.used_by.contains(&own.as_str()) || !changed(&key), key, message(&own));
        for name in run.phases().iter().filter(|_| choice.table == "train") {
            let own = schema::lookup(table, &format!("phase.{name}.train.{}", choice.selector)).and_then(Value::as_str);
            let own = own.map_or_else(|| chosen(&selector), str::to_string);
            let key = format!("phase.{name}.train.{}", choice.key);
            let written = schema::lookup(table, &key).is_some();
            found.require(choice.used_by.contains(&own.as_str()) || !written, key, message(&own));
        }
    }
    let (others, message) = match run.data.text {
        Some(_) => (&OF_DOCUMENTS[..], "has no effect in a text run, only with facts and chat"),
        None => (&OF_TEXT[..], "has no effect with facts and chat, only with data.text"),
    };
    let plain = |path: &&&str| !["data.facts", "data.chat", "data.paraphrases", "data.tokenizer"].contains(*path);
    for path in others.iter().filter(plain) {
        let Some((section, key)) = path.split_once('.').filter(|(section, _)| *section != "phase") else { continue };
        found.require(!changed(path), *path, message);
        for name in run.phases().iter().filter(|_| section == "train") {
            let key = format!("phase.{name}.train.{key}");
            found.require(schema::lookup(table, &key).is_none(), key, message);
        }
    }
}

/// A batch must fit into memory that exists.
fn size(run: &Run, found: &mut Found) {
    let length = if run.data.text.is_some() { run.data.block_size } else { run.data.max_length };
    let width = run.model.hidden_size.max(run.model.intermediate_size);
    for name in run.phases() {
        let batch = run.phase(name).batch_size;
        let numbers = batch.checked_mul(length).and_then(|tokens| tokens.checked_mul(width));
        let fits = numbers.is_some_and(|numbers| numbers as u64 <= MAX_NUMBERS);
        found.require(
            fits,
            "train.batch_size",
            "makes batches of more than 2^40 numbers with the length and the width",
        );
    }
}
