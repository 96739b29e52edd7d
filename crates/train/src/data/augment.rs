//! Variants of training documents by rule: another form of the sentence, other words for some words, words of a question left out. Each is a pure
//! function of (seed, phase, item, copy) and says where it comes from. Held-out items are neither varied nor met by a variant, and a variant has no
//! word that the training documents lack, so that the vocabulary, and with it the model, stays that of the run without them.

use super::corpus::{Role, Source, read_bytes, source, split_chat};
use super::tokenizer::{Tokenizer, Unknowns};
use super::{DataError, sha256};
use crate::run::Augment;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use tensor::Random;
use tensor::random::Purpose;

/// What the file with the variants is called, in the run directory.
pub const FILE: &str = "augmented.jsonl";
/// A table of rules is written by hand.
const MAX_TABLE_BYTES: u64 = 16 << 20;
/// Draws for a copy until one is new, known and not held out.
const ATTEMPTS: u64 = 8;
const SHIPPED: &str = include_str!("../../../../data/augment.json");

/// Words that may stand for others, and forms of sentences that may stand for others.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Table {
    /// Word, case as written, to words or phrases in its place.
    #[serde(default)]
    synonyms: BTreeMap<String, Vec<String>>,
    /// The first whose `from` fits a sentence is the one that is used.
    #[serde(default)]
    templates: Vec<Template>,
}

/// A form with holes `{name}`, and forms that mean the same; there `{+name}` raises the first letter and `{-name}` lowers it.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Template {
    from: String,
    to: Vec<String>,
}

/// One variant, where it comes from and by which rules.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Variant {
    pub phase: &'static str,
    /// Number of the item in its file, from 1.
    pub source: usize,
    /// Which variant of that item, from 1.
    pub copy: usize,
    pub rules: Vec<String>,
    pub text: String,
}

/// The rules of a run with their file.
pub struct Augmentation<'s> {
    settings: &'s Augment,
    table: Table,
    pub source: Source,
    random: Random,
}

/// An item on its way to a variant: the part that changes, and what was done to it.
struct Draft {
    body: String,
    rules: Vec<String>,
}

impl<'s> Augmentation<'s> {
    /// The rules of `settings.table`, or the shipped ones. None where no copies are asked for.
    pub fn read(settings: &'s Augment, seed: u64) -> Result<Option<Self>, DataError> {
        if settings.copies == 0 {
            return Ok(None);
        }
        let (name, bytes) = match &settings.table {
            Some(path) => (path.display().to_string(), read_bytes(path, MAX_TABLE_BYTES)?),
            None => ("shipped augment.json".to_string(), SHIPPED.as_bytes().to_vec()),
        };
        let table = Table::parse(&name, &bytes)?;
        let random = Random::new(seed, Purpose::Augment);
        Ok(Some(Augmentation { settings, table, source: source(&name, &bytes), random }))
    }

    /// Variants of the items `indices` of a file, in their order. `taken` holds the keys of all documents, trained on or held out; those of the
    /// variants come to it.
    pub fn variants(
        &self,
        (phase, name, role): (u32, &'static str, Role),
        items: &[String],
        indices: &[usize],
        tokenizer: &Tokenizer,
        taken: &mut BTreeSet<Vec<u32>>,
    ) -> Result<Vec<Variant>, DataError> {
        let mut found = Vec::new();
        for &index in indices {
            let (before, body, after) = parts(&items[index], role);
            for copy in 0..self.settings.copies {
                for attempt in 0..ATTEMPTS {
                    let key = Key { step: u64::from(phase) * ATTEMPTS + attempt, item: index, copy };
                    let draft = self.draft(body, role, &key);
                    let text = format!("{before}{}{after}", draft.body);
                    let mut unknowns = Unknowns::default();
                    tokenizer.encode_counting(&text, &mut unknowns)?;
                    let new = !draft.rules.is_empty() && unknowns.count == 0;
                    if new && taken.insert(identity(&text, role, tokenizer)?) {
                        found.push(Variant {
                            phase: name,
                            source: index + 1,
                            copy: copy + 1,
                            rules: draft.rules,
                            text,
                        });
                        break;
                    }
                }
            }
        }
        Ok(found)
    }

    fn draft(&self, body: &str, role: Role, key: &Key) -> Draft {
        let mut draft = Draft { body: body.to_string(), rules: Vec::new() };
        if key.uniform(&self.random, 0) < self.settings.templates {
            self.restate(&mut draft, key.below(&self.random, 1, 1 << 20));
        }
        let mut words: Vec<String> = draft.body.split_whitespace().map(str::to_string).collect();
        for place in 0..words.len() {
            let draw = |stream: u64| 2 + 3 * place as u64 + stream;
            if key.uniform(&self.random, draw(0)) < self.settings.synonyms {
                let previous = place.checked_sub(1).map(|place| words[place].clone());
                let chosen = key.below(&self.random, draw(1), 1 << 20);
                if let Some((word, rule)) = self.table.synonym(&words[place], previous.as_deref(), chosen) {
                    words[place] = word;
                    draft.rules.push(rule);
                }
            }
        }
        if role != Role::Facts {
            let dropped: Vec<usize> = (0..words.len())
                .filter(|&place| key.uniform(&self.random, 4 + 3 * place as u64) < self.settings.drop)
                .filter(|&place| words[place].chars().all(char::is_alphanumeric))
                .collect();
            if dropped.len() < words.len() {
                draft.rules.extend(dropped.iter().map(|&place| format!("drop {}", words[place])));
                dropped.iter().rev().for_each(|&place| drop(words.remove(place)));
            }
        }
        draft.body = words.join(" ");
        draft
    }

    /// Puts the sentence into another form of the first template that fits it.
    fn restate(&self, draft: &mut Draft, chosen: usize) {
        let fitting =
            self.table.templates.iter().find_map(|template| Some((template, fit(&template.from, &draft.body)?)));
        let Some((template, holes)) = fitting else { return };
        let form = &template.to[chosen % template.to.len()];
        draft.rules.push(format!("template {:?} to {form:?}", template.from));
        draft.body = fill(form, &holes);
    }
}

/// Key of the random numbers of one draw for one copy of one item.
struct Key {
    step: u64,
    item: usize,
    copy: usize,
}

impl Key {
    fn index(&self, place: u64) -> u64 {
        (self.item as u64) << 32 | (self.copy as u64) << 24 | place & 0xff_ffff
    }

    fn uniform(&self, random: &Random, place: u64) -> f64 {
        random.uniform(self.step, self.index(place))
    }

    fn below(&self, random: &Random, place: u64, bound: usize) -> usize {
        random.below(self.step, self.index(place), bound)
    }
}

/// What two documents must not share: the question of a dialogue, the whole of another item.
pub fn identity(text: &str, role: Role, tokenizer: &Tokenizer) -> Result<Vec<u32>, DataError> {
    let prompt = split_chat(text).ok().filter(|_| role != Role::Facts);
    tokenizer.encode(prompt.map_or(text, |exchange| exchange.prompt))
}

/// An item as what stays, what may change, what stays: the last question of a dialogue, all of a fact but its end mark.
fn parts(item: &str, role: Role) -> (&str, &str, &str) {
    let (from, to) = match split_chat(item) {
        Ok(exchange) if role != Role::Facts => {
            let start = item.find(exchange.prompt).unwrap_or(0);
            let end = start + exchange.prompt.len() - "Assistant:".len();
            (item[..end].rfind("User:").map_or(start, |at| at + "User:".len()), end)
        }
        _ => (0, item.trim_end().strip_suffix("</s>").unwrap_or(item).len()),
    };
    let body = item[from..to].trim();
    let start = from + (item[from..to].len() - item[from..to].trim_start().len());
    (&item[..start], body, &item[start + body.len()..])
}

impl Table {
    fn parse(name: &str, bytes: &[u8]) -> Result<Self, DataError> {
        let bad = |reason: String| DataError::BadTable { file: name.to_string(), reason };
        let table: Table = serde_json::from_slice(bytes).map_err(|error| bad(error.to_string()))?;
        for (word, others) in &table.synonyms {
            let empty = others.is_empty() || others.iter().any(|other| other.trim().is_empty());
            if empty || word.split_whitespace().count() != 1 {
                return Err(bad(format!("the synonym {word:?} must be one word with a list of others")));
            }
        }
        for Template { from, to } in &table.templates {
            let names =
                holes(from).ok_or_else(|| bad(format!("the template {from:?} has a hole that does not end")))?;
            let adjacent =
                from.contains("}{") || names.is_empty() || names.iter().any(|name| name.starts_with(['+', '-']));
            if adjacent || names.iter().collect::<BTreeSet<_>>().len() != names.len() {
                return Err(bad(format!(
                    "the template {from:?} needs holes {{a}}, {{b}}, each once, with text between them"
                )));
            }
            let known = |form: &String| {
                holes(form)
                    .is_some_and(|own| own.iter().all(|name| names.contains(&name.trim_start_matches(['+', '-']))))
            };
            if to.is_empty() || !to.iter().all(known) {
                return Err(bad(format!("the forms of the template {from:?} may have its holes and no others")));
            }
        }
        Ok(table)
    }

    /// Another word for the word in `text`, its marks and its capital kept, and the rule. "a" and "an" before it must still fit.
    fn synonym(&self, text: &str, previous: Option<&str>, chosen: usize) -> Option<(String, String)> {
        let word = text.trim_matches(|c: char| !c.is_alphanumeric());
        let at = text.find(word)?;
        let lowered = first_letter(word, false);
        let (others, raised) = match self.synonyms.get(word) {
            Some(others) => (others, false),
            None => (self.synonyms.get(&lowered)?, true),
        };
        let other = &others[chosen % others.len()];
        let article = previous.is_some_and(|previous| matches!(previous, "a" | "an" | "A" | "An"));
        if article && vowel(word) != vowel(other) {
            return None;
        }
        let other = if raised { first_letter(other, true) } else { other.clone() };
        let rule = format!("synonym {word} to {other}");
        Some((format!("{}{other}{}", &text[..at], &text[at + word.len()..]), rule))
    }
}

fn vowel(word: &str) -> bool {
    word.to_lowercase().starts_with(['a', 'e', 'i', 'o', 'u'])
}

fn first_letter(text: &str, upper: bool) -> String {
    let mut letters = text.chars();
    let Some(first) = letters.next() else { return String::new() };
    let first: String = if upper { first.to_uppercase().collect() } else { first.to_lowercase().collect() };
    first + letters.as_str()
}

/// The names in the holes of a form; none if a brace is open or alone.
fn holes(form: &str) -> Option<Vec<&str>> {
    let (mut names, mut rest) = (Vec::new(), form);
    while let Some((before, after)) = rest.split_once('{') {
        let (name, after) = after.split_once('}')?;
        if before.contains('}') || name.contains('{') || name.is_empty() {
            return None;
        }
        names.push(name);
        rest = after;
    }
    (!rest.contains('}')).then_some(names)
}

/// What stands in `text` where `form` has its holes: each the shortest text that lets the next literal fit.
fn fit<'t>(form: &'t str, text: &'t str) -> Option<Vec<(&'t str, &'t str)>> {
    let (mut form, mut text, mut found) = (form, text, Vec::new());
    while let Some((literal, hole)) = form.split_once('{') {
        text = text.strip_prefix(literal)?;
        let (name, after) = hole.split_once('}')?;
        let next = after.split('{').next().unwrap_or_default();
        let end = match after == next {
            true => text.strip_suffix(next)?.len(),
            false => text.find(next)?,
        };
        if text[..end].trim().is_empty() {
            return None;
        }
        found.push((name, &text[..end]));
        (text, form) = (&text[end..], after);
    }
    (form == text).then_some(found)
}

fn fill(form: &str, holes: &[(&str, &str)]) -> String {
    let mut filled = form.to_string();
    for (name, text) in holes {
        filled = filled.replace(&format!("{{{name}}}"), text);
        filled = filled.replace(&format!("{{+{name}}}"), &first_letter(text, true));
        filled = filled.replace(&format!("{{-{name}}}"), &first_letter(text, false));
    }
    filled
}

/// The variants as lines of JSON, and what a run records of that file.
pub fn record(variants: &[Variant]) -> (String, Source) {
    let lines: Vec<String> = variants.iter().map(|variant| serde_json::json!(variant).to_string() + "\n").collect();
    let text = lines.concat();
    let source = Source { name: FILE.into(), bytes: text.len() as u64, sha256: sha256(text.as_bytes()) };
    (text, source)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::ItemFile;
    use crate::dataset::{Dataset, PhaseData};
    use crate::run::Run;

    fn load(sets: &[&str]) -> Dataset {
        let sets: Vec<String> = sets.iter().map(|set| set.to_string()).collect();
        Dataset::load(&Run::load("baseline", &sets).unwrap()).unwrap()
    }

    #[test]
    fn a_form_fits_where_its_words_stand_and_its_holes_are_filled() {
        let fit = |form: &'static str, text: &'static str| fit(form, text);
        assert_eq!(fit("What is {a}?", "What is a volcano?"), Some(vec![("a", "a volcano")]));
        assert_eq!(fit("{a} has {b}.", "It has what it has."), Some(vec![("a", "It"), ("b", "what it has")]));
        for (form, text) in [("What is {a}?", "What is ?"), ("What is {a}?", "What are you?"), ("{a} x.", "y x. z")] {
            assert_eq!(fit(form, text), None, "{form} {text}");
        }
        assert_eq!(fill("{+b} is {a} and {-a}.", &[("a", "The Sun"), ("b", "an x")]), "An x is The Sun and the Sun.");
        assert_eq!(holes("{a} of {+b}"), Some(vec!["a", "+b"]));
        assert_eq!((holes("{a"), holes("a}"), holes("{}")), (None, None, None));
    }

    #[test]
    fn a_synonym_keeps_marks_capitals_and_the_article_before_it() {
        let table = Table::parse("t", br#"{"synonyms": {"small": ["tiny"], "thing": ["object"]}}"#).unwrap();
        let word = |text, previous| table.synonym(text, previous, 0).map(|(word, _)| word);
        assert_eq!(word("small,", None).as_deref(), Some("tiny,"));
        assert_eq!(word("Small", None).as_deref(), Some("Tiny"));
        assert_eq!((word("thing", Some("a")), word("smaller", None), word(".", None)), (None, None, None));
        assert_eq!(word("thing", Some("the")).as_deref(), Some("object"));
    }

    #[test]
    fn tables_with_slips_are_refused() {
        for (text, part) in [
            ("{", "not a table"),
            (r#"{"words": {}}"#, "unknown field"),
            (r#"{"synonyms": {"a b": ["c"]}}"#, "one word"),
            (r#"{"synonyms": {"a": []}}"#, "one word"),
            (r#"{"templates": [{"from": "{a", "to": ["{a}"]}]}"#, "does not end"),
            (r#"{"templates": [{"from": "{a}{b}", "to": ["{a}"]}]}"#, "between them"),
            (r#"{"templates": [{"from": "{a} {a}", "to": ["{a}"]}]}"#, "each once"),
            (r#"{"templates": [{"from": "x {a}", "to": ["{b}"]}]}"#, "no others"),
            (r#"{"templates": [{"from": "x {a}", "to": []}]}"#, "no others"),
        ] {
            let message = Table::parse("t.json", text.as_bytes()).unwrap_err().to_string();
            assert!(message.starts_with("t.json: ") && message.contains(part), "{text}: {message}");
        }
    }

    #[test]
    fn variants_are_new_known_not_held_out_and_say_where_they_come_from() {
        let (plain, set) = (load(&[]), load(&["data.augment.copies=2"]));
        assert_eq!(set.tokenizer.sha256(), plain.tokenizer.sha256(), "the model is that of the run without variants");
        let files = [ItemFile::shipped(Role::Facts).unwrap(), ItemFile::shipped(Role::Chat).unwrap()];
        let held_out = ItemFile::shipped(Role::Paraphrases).unwrap();
        let prompt = |text: &str| split_chat(text).map(|exchange| exchange.prompt.to_string()).unwrap();
        let asked: BTreeSet<String> = held_out.items.iter().chain(&files[1].items).map(|item| prompt(item)).collect();
        let mut texts = BTreeSet::new();
        for variant in &set.variants {
            let file = &files[usize::from(variant.phase == "chat")];
            let item = &file.items[variant.source - 1];
            assert!(variant.text != *item && !variant.rules.is_empty() && (1..=2).contains(&variant.copy));
            assert!(texts.insert(&variant.text), "{}", variant.text);
            if variant.phase == "chat" {
                assert!(!asked.contains(&prompt(&variant.text)), "{}", variant.text);
                let answer = |text| split_chat(text).unwrap().answer;
                assert_eq!(answer(&variant.text), answer(item));
            }
        }
        let count = |phase| set.variants.iter().filter(|variant| variant.phase == phase).count();
        assert!(count("chat") > 150 && count("facts") > 200, "{} {}", count("chat"), count("facts"));
        for (phase, before) in set.phases.iter().zip(&plain.phases) {
            let PhaseData::Documents { train, validation, order } = &phase.data else { panic!() };
            assert_eq!((phase.originals, phase.documents().len()), (before.documents().len(), phase.originals));
            assert_eq!(train.documents.len(), phase.originals + count(phase.name));
            assert_eq!((order.count, validation.documents.len()), (train.documents.len(), 0));
            assert_eq!(phase.floor, before.floor);
            // More ways to begin: the best loss on all of it is another, and on the questions a higher one.
            let (floor, augmented) = (phase.floor.unwrap(), phase.augmented_floor.unwrap());
            assert_ne!(floor.macro_average, augmented.macro_average);
            assert!(phase.name != "chat" || augmented.macro_average > floor.macro_average);
        }
        assert_eq!(set.questions.len(), plain.questions.len());
        let (text, source) = record(&set.variants);
        assert_eq!(text.lines().count(), set.variants.len());
        assert_eq!(set.sources.iter().find(|(role, _)| *role == "augmented").unwrap().1, source);
    }

    #[test]
    fn the_same_seed_makes_the_same_variants_and_every_rule_works() {
        let texts = |sets: &[&str]| {
            let set = load(&[&["data.augment.copies=1"], sets].concat());
            set.variants.into_iter().map(|variant| (variant.text, variant.rules.join(" "))).collect::<Vec<_>>()
        };
        let once = texts(&[]);
        assert_eq!(texts(&[]), once);
        assert_ne!(texts(&["seed=9"]), once);
        let only = |rule: &str, sets: &[&str]| {
            let made = texts(sets);
            assert!(made.len() > 50 && made.iter().all(|(_, rules)| rules.contains(rule)), "{rule}");
        };
        only("template", &["data.augment.synonyms=0", "data.augment.templates=1"]);
        only("synonym", &["data.augment.synonyms=1", "data.augment.templates=0"]);
        only("drop", &["data.augment.synonyms=0", "data.augment.templates=0", "data.augment.drop=0.2"]);
    }

    #[test]
    fn held_out_documents_have_no_variants() {
        let set = load(&["data.augment.copies=1", "data.val_fraction=0.5"]);
        let PhaseData::Documents { validation, .. } = &set.phases[1].data else { panic!() };
        assert_eq!(validation.documents.len(), 68);
        let of_chat: BTreeSet<usize> =
            set.variants.iter().filter(|variant| variant.phase == "chat").map(|variant| variant.source).collect();
        assert!(!of_chat.is_empty() && of_chat.len() <= 67);
        let other = crate::data::split_documents("f", 135, 0.5, 0, 1).unwrap().1;
        assert!(other.iter().all(|held_out| !of_chat.contains(&(held_out + 1))));
    }
}
