//! `data stats`: what is in the data files: sizes, vocabulary, duplicates, unknown words, and the entropy floor of each training file.

use super::batch::DocumentSet;
use super::corpus::{ItemFile, Role, Source};
use super::tokenizer::{Tokenizer, Unknowns};
use super::{DataError, Floor};
use serde::Serialize;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::{self, Display, Formatter};

/// Training files with fewer examples than this get a warning.
pub const ENOUGH_EXAMPLES: usize = 40;
/// How many duplicates, unknown words, … are listed; all are counted.
const LISTED: usize = 10;

/// What is in a set of data files, under one tokenizer and cap. Item numbers count from 1.
#[derive(Clone, Debug, Serialize)]
pub struct DataReport {
    pub tokenizer: String,
    pub vocab_size: usize,
    pub max_length: usize,
    pub files: Vec<FileReport>,
    pub warnings: Vec<String>,
}

/// What is in one file. Lengths and counts are of tokens before the cap.
#[derive(Clone, Debug, Serialize)]
pub struct FileReport {
    pub role: Role,
    pub source: Source,
    pub items: usize,
    pub tokens: usize,
    pub min_length: usize,
    pub mean_length: f64,
    pub max_length: usize,
    /// Items that the cap cuts.
    pub cut: usize,
    /// Different tokens, and those of them that occur once in the file.
    pub types: usize,
    pub singletons: usize,
    /// Items that repeat an earlier one byte by byte.
    pub duplicate_count: usize,
    pub duplicates: Vec<Pair>,
    /// Pairs of different items whose token sets have a Jaccard similarity of at least 0.9; equal token multisets are among them.
    pub near_duplicate_count: usize,
    pub near_duplicates: Vec<Pair>,
    /// Words that the training vocabulary lacks.
    pub unknown: Unknowns,
    /// Different prompts; 0 for facts.
    pub prompts: usize,
    /// After the cap, in nats; none for held-out items.
    pub floor: Option<Floor>,
    /// Held-out items whose prompt is also a training prompt, and those whose answer no training item has.
    pub known_prompts: Vec<usize>,
    pub new_answers: Vec<usize>,
}

/// Two items that are alike; `first` < `second`.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Pair {
    pub first: usize,
    pub second: usize,
    /// Shared different tokens / all different tokens of both.
    pub similarity: f64,
    /// The same tokens equally often.
    pub same_words: bool,
}

impl DataReport {
    /// The report of `files` under the tokenizer that a run of them would use.
    pub fn new(files: &[ItemFile], tokenizer: &Tokenizer, max_length: usize) -> Result<Self, DataError> {
        let reports = files
            .iter()
            .map(|file| FileReport::new(file, files, tokenizer, max_length))
            .collect::<Result<Vec<_>, _>>()?;
        let warnings = reports.iter().flat_map(FileReport::warnings).collect();
        let (tokenizer, vocab_size) = (tokenizer.kind().to_string(), tokenizer.vocab_size());
        Ok(DataReport { tokenizer, vocab_size, max_length, files: reports, warnings })
    }
}

/// The texts that a vocabulary is made of: all items of facts and chat, never the held-out ones.
pub fn training_texts(files: &[ItemFile]) -> impl Iterator<Item = &str> {
    files.iter().filter(|file| file.role != Role::Paraphrases).flat_map(|file| file.items.iter().map(String::as_str))
}

impl FileReport {
    fn new(file: &ItemFile, all: &[ItemFile], tokenizer: &Tokenizer, cap: usize) -> Result<Self, DataError> {
        let capped = DocumentSet::encode(file, tokenizer, cap)?;
        let items = DocumentSet::encode(file, tokenizer, usize::MAX)?;
        let lengths = || items.documents.iter().map(|document| document.tokens.len());
        let tokens = items.tokens();
        let mut uses: BTreeMap<u32, usize> = BTreeMap::new();
        for &token in items.documents.iter().flat_map(|document| &document.tokens) {
            *uses.entry(token).or_default() += 1;
        }
        let (duplicates, distinct) = exact_duplicates(&file.items);
        let near = near_duplicates(&items, &distinct);
        let training = file.role != Role::Paraphrases;
        let (known_prompts, new_answers) = if training { Default::default() } else { against_training(file, all) };
        Ok(FileReport {
            role: file.role,
            source: file.source.clone(),
            items: file.items.len(),
            tokens,
            min_length: lengths().min().unwrap_or(0),
            mean_length: tokens as f64 / file.items.len() as f64,
            max_length: lengths().max().unwrap_or(0),
            cut: capped.cut,
            types: uses.len(),
            singletons: uses.values().filter(|&&count| count == 1).count(),
            duplicate_count: duplicates.len(),
            duplicates: duplicates.into_iter().take(LISTED).collect(),
            near_duplicate_count: near.len(),
            near_duplicates: near.into_iter().take(LISTED).collect(),
            unknown: items.unknowns,
            prompts: file.exchanges().iter().map(|exchange| exchange.prompt).collect::<BTreeSet<_>>().len(),
            floor: if training { capped.floor() } else { None },
            known_prompts,
            new_answers,
        })
    }

    fn warnings(&self) -> Vec<String> {
        let mut warnings = Vec::new();
        let name = &self.source.name;
        let training = self.role != Role::Paraphrases;
        if training && self.items < ENOUGH_EXAMPLES {
            warnings.push(format!(
                "{name}: {} examples are few; below {ENOUGH_EXAMPLES} a loss says little, add more",
                self.items
            ));
        }
        if self.cut > 0 {
            warnings.push(format!(
                "{name}: the cap cuts {} of {} items and with them their ends; raise data.max_length or shorten them",
                self.cut, self.items
            ));
        }
        if !self.known_prompts.is_empty() {
            warnings.push(format!(
                "{name}: {} held-out prompts are training prompts too (items {}); remove them",
                self.known_prompts.len(),
                listed(&self.known_prompts)
            ));
        }
        if !self.new_answers.is_empty() {
            warnings.push(format!(
                "{name}: {} answers are in no training item (items {}), so no model can have learnt to recite them",
                self.new_answers.len(),
                listed(&self.new_answers)
            ));
        }
        warnings
    }
}

/// Numbers of held-out items with a known prompt, and with an answer that no chat item has.
fn against_training(file: &ItemFile, all: &[ItemFile]) -> (Vec<usize>, Vec<usize>) {
    let chat: Vec<_> = all.iter().filter(|other| other.role == Role::Chat).flat_map(ItemFile::exchanges).collect();
    let prompts: BTreeSet<&str> = chat.iter().map(|exchange| exchange.prompt).collect();
    let answers: BTreeSet<&str> = chat.iter().map(|exchange| exchange.answer).collect();
    let held_out = file.exchanges();
    let numbers = |wanted: &dyn Fn(&super::Exchange) -> bool| {
        held_out.iter().enumerate().filter(|(_, exchange)| wanted(exchange)).map(|(index, _)| index + 1).collect()
    };
    (numbers(&|exchange| prompts.contains(exchange.prompt)), numbers(&|exchange| !answers.contains(exchange.answer)))
}

/// The repeated items, each with its first occurrence, and the indices of the first occurrences.
fn exact_duplicates(items: &[String]) -> (Vec<Pair>, Vec<usize>) {
    let mut first_of: BTreeMap<&str, usize> = BTreeMap::new();
    let (mut pairs, mut distinct) = (Vec::new(), Vec::new());
    for (index, item) in items.iter().enumerate() {
        match first_of.get(item.as_str()) {
            Some(&first) => {
                pairs.push(Pair { first: first + 1, second: index + 1, similarity: 1.0, same_words: true });
            }
            None => {
                first_of.insert(item, index);
                distinct.push(index);
            }
        }
    }
    (pairs, distinct)
}

/// All pairs of `indices` with a Jaccard similarity of their token sets ≥ 0.9, by prefix filtering (Chaudhuri 2006; Bayardo 2007): two such sets
/// share one of the n - ⌈0.9 n⌉ + 1 rarest tokens of each, so only those are indexed and not all pairs are compared.
fn near_duplicates(set: &DocumentSet, indices: &[usize]) -> Vec<Pair> {
    let token_sets: Vec<BTreeSet<u32>> =
        set.documents.iter().map(|document| document.tokens.iter().copied().collect()).collect();
    let mut uses: BTreeMap<u32, usize> = BTreeMap::new();
    for &token in indices.iter().flat_map(|&index| &token_sets[index]) {
        *uses.entry(token).or_default() += 1;
    }
    let mut seen: BTreeMap<u32, Vec<usize>> = BTreeMap::new();
    let mut pairs = Vec::new();
    for &second in indices {
        let mut rarest: Vec<u32> = token_sets[second].iter().copied().collect();
        rarest.sort_by_key(|token| (uses[token], *token));
        rarest.truncate(rarest.len() - (9 * rarest.len()).div_ceil(10) + 1);
        let candidates: BTreeSet<usize> =
            rarest.iter().filter_map(|token| seen.get(token)).flatten().copied().collect();
        for first in candidates {
            if let Some(similarity) = high_similarity(&token_sets[first], &token_sets[second]) {
                let same_words = sorted(set, first) == sorted(set, second);
                pairs.push(Pair { first: first + 1, second: second + 1, similarity, same_words });
            }
        }
        for token in rarest {
            seen.entry(token).or_default().push(second);
        }
    }
    pairs.sort_by_key(|pair| (pair.first, pair.second));
    pairs
}

fn sorted(set: &DocumentSet, index: usize) -> Vec<u32> {
    let mut tokens = set.documents[index].tokens.clone();
    tokens.sort_unstable();
    tokens
}

/// Jaccard similarity if it is at least 0.9 (decided in integers).
fn high_similarity(a: &BTreeSet<u32>, b: &BTreeSet<u32>) -> Option<f64> {
    if a.len().min(b.len()) * 10 < a.len().max(b.len()) * 9 {
        return None;
    }
    let shared = a.intersection(b).count();
    let either = a.len() + b.len() - shared;
    (10 * shared >= 9 * either).then(|| shared as f64 / either as f64)
}

/// The first numbers, separated by commas, with an ellipsis where there are more.
fn listed(numbers: &[usize]) -> String {
    let shown: Vec<String> = numbers.iter().take(LISTED).map(usize::to_string).collect();
    shown.join(", ") + if numbers.len() > LISTED { ", …" } else { "" }
}

impl Display for DataReport {
    fn fmt(&self, out: &mut Formatter<'_>) -> fmt::Result {
        writeln!(
            out,
            "tokenizer {}, vocabulary {}, cap {} tokens; floors in nats, after the cap",
            self.tokenizer, self.vocab_size, self.max_length
        )?;
        writeln!(out)?;
        self.write_table(out)?;
        for file in &self.files {
            file.write_details(out)?;
        }
        for warning in &self.warnings {
            writeln!(out, "\nwarning: {warning}")?;
        }
        Ok(())
    }
}

impl DataReport {
    fn write_table(&self, out: &mut Formatter<'_>) -> fmt::Result {
        let columns: Vec<Vec<(&str, String)>> = self.files.iter().map(FileReport::cells).collect();
        let width = |cells: &Vec<(&str, String)>| cells.iter().map(|(_, cell)| cell.chars().count()).max().unwrap_or(0);
        let widths: Vec<usize> = columns.iter().map(width).collect();
        let rows = columns.first().map_or(0, Vec::len);
        for row in 0..rows {
            write!(out, "{:<24}", columns[0][row].0)?;
            for (cells, &width) in columns.iter().zip(&widths) {
                write!(out, "  {:>width$}", cells[row].1)?;
            }
            writeln!(out)?;
        }
        Ok(())
    }
}

impl FileReport {
    fn cells(&self) -> Vec<(&'static str, String)> {
        let nats = |pick: fn(&Floor) -> f64| self.floor.as_ref().map_or("-".to_string(), |f| format!("{:.4}", pick(f)));
        let dialogue = self.role != Role::Facts;
        vec![
            ("", self.role.name().to_string()),
            ("file", self.source.name.clone()),
            ("sha256", self.source.sha256.chars().take(12).collect()),
            ("items", self.items.to_string()),
            ("tokens", self.tokens.to_string()),
            ("shortest item", self.min_length.to_string()),
            ("mean length", format!("{:.2}", self.mean_length)),
            ("longest item", self.max_length.to_string()),
            ("cut by the cap", self.cut.to_string()),
            ("types", self.types.to_string()),
            ("singletons", self.singletons.to_string()),
            ("exact duplicates", self.duplicate_count.to_string()),
            ("near duplicates", self.near_duplicate_count.to_string()),
            ("unknown words", self.unknown.count.to_string()),
            ("prompts", if dialogue { self.prompts.to_string() } else { "-".to_string() }),
            ("floor, mean of items", nats(|floor| floor.macro_average)),
            ("floor, mean of tokens", nats(|floor| floor.micro_average)),
        ]
    }

    fn write_details(&self, out: &mut Formatter<'_>) -> fmt::Result {
        let role = self.role.name();
        let groups = [
            ("repeats", self.duplicate_count, &self.duplicates),
            ("is like", self.near_duplicate_count, &self.near_duplicates),
        ];
        for (relation, count, pairs) in groups {
            for pair in pairs {
                let note = if pair.same_words { "same words".to_string() } else { format!("{:.3}", pair.similarity) };
                write!(out, "\n{role}: item {} {relation} item {} ({note})", pair.second, pair.first)?;
            }
            if count > pairs.len() {
                write!(out, "\n{role}: … and {} more", count - pairs.len())?;
            }
            if count > 0 {
                writeln!(out)?;
            }
        }
        if self.unknown.count > 0 {
            let shown: Vec<String> =
                self.unknown.words.iter().take(5 * LISTED).map(|(word, count)| format!("{word:?} {count}")).collect();
            let rest = self.unknown.words.len() - shown.len();
            let more = if rest > 0 { format!(", … and {rest} more") } else { String::new() };
            writeln!(out, "\n{role}: unknown words and how often: {}{more}", shown.join(", "))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn file(role: Role, items: &[&str]) -> ItemFile {
        ItemFile::parse(&format!("{}.json", role.name()), &serde_json::to_vec(items).unwrap(), role).unwrap()
    }

    fn report(files: &[ItemFile], cap: usize) -> DataReport {
        DataReport::new(files, &Tokenizer::words(training_texts(files)), cap).unwrap()
    }

    #[test]
    fn a_small_sample_counted_by_hand() {
        let facts = file(Role::Facts, &["The cat sat. </s>", "The dog ran off. </s>", "The cat sat. </s>"]);
        let chat =
            file(Role::Chat, &["User: Who sat? Assistant: The cat. </s>", "User: Who ran? Assistant: The dog. </s>"]);
        let held_out = file(
            Role::Paraphrases,
            &["User: Who rested here, who? Assistant: The cat. </s>", "User: Who sat? Assistant: A mouse. </s>"],
        );
        let report = report(&[facts, chat, held_out], 5);
        assert_eq!((report.vocab_size, report.files.len()), (14, 3));
        let [facts, chat, held_out] = &report.files[..] else { panic!("three files") };
        assert_eq!((facts.items, facts.tokens, facts.min_length, facts.max_length, facts.cut), (3, 16, 5, 6, 1));
        assert!((facts.mean_length - 16.0 / 3.0).abs() < 1e-12);
        // The, cat, sat, dog, ran, off, ".", </s>; once: dog, ran, off.
        assert_eq!((facts.types, facts.singletons, facts.prompts), (8, 3, 0));
        let again = Pair { first: 1, second: 3, similarity: 1.0, same_words: true };
        assert_eq!((facts.duplicate_count, facts.duplicates.as_slice()), (1, &[again][..]));
        assert_eq!(facts.near_duplicate_count, 0);
        // One branch, after "The": cat twice, dog once; each of 3 sequences has 4 targets after the cap.
        let branch = (2.0 * 1.5f64.ln() + 3f64.ln()) / 12.0;
        let floor = facts.floor.unwrap();
        assert!((floor.macro_average - branch).abs() < 1e-12 && (floor.micro_average - branch).abs() < 1e-12);
        assert_eq!((chat.items, chat.prompts, chat.unknown.count, chat.cut), (2, 2, 0, 2));
        assert_eq!((held_out.prompts, held_out.floor), (2, None));
        let words: Vec<&str> = held_out.unknown.words.keys().map(String::as_str).collect();
        assert_eq!((held_out.unknown.count, words), (6, vec![",", "A", "here", "mouse", "rested", "who"]));
        assert_eq!((held_out.known_prompts.as_slice(), held_out.new_answers.as_slice()), (&[2][..], &[2][..]));
        let text = report.to_string();
        for part in [
            "tokenizer word, vocabulary 14, cap 5 tokens",
            "facts: item 3 repeats item 1 (same words)",
            "paraphrases: unknown words and how often: \",\" 1, \"A\" 1, \"here\" 1, \"mouse\" 1, \"rested\" 1, \"who\" 1",
            "warning: facts.json: 3 examples are few; below 40 a loss says little, add more",
            "warning: facts.json: the cap cuts 1 of 3 items and with them their ends; raise data.max_length or shorten them",
            "warning: paraphrases.json: 1 held-out prompts are training prompts too (items 2); remove them",
            "warning: paraphrases.json: 1 answers are in no training item (items 2), so no model can have learnt to recite them",
        ] {
            assert!(text.contains(part), "{part} is not in\n{text}");
        }
        let json = serde_json::to_value(&report).unwrap();
        assert_eq!(json["files"][0]["role"], "facts");
        assert_eq!(json["files"][0]["duplicates"][0]["second"], 3);
    }

    #[test]
    fn few_examples_warn_below_forty() {
        let warnings = |count: usize| {
            let items: Vec<String> = (0..count).map(|i| format!("fact {i}")).collect();
            let facts = file(Role::Facts, &items.iter().map(String::as_str).collect::<Vec<_>>());
            report(&[facts], 80).warnings
        };
        assert_eq!((warnings(39).len(), warnings(40).len()), (1, 0));
    }

    #[test]
    fn planted_near_duplicates_are_found() {
        let base = "one two three four five six seven eight nine ten";
        let facts = file(
            Role::Facts,
            &[
                base,
                "something else is here",
                "ten nine eight seven six five four three two one", // same words
                "one two three four five six seven eight nine ten ten", // same set
                "one two three four five six seven eight nine ten eleven", // 10/11 = 0.909
                "one two three four five six seven eight nine twelve", // 9/11
            ],
        );
        let pairs = report(&[facts], 80).files[0].near_duplicates.clone();
        let found: Vec<_> = pairs.iter().map(|pair| (pair.first, pair.second, pair.same_words)).collect();
        assert_eq!(found, [(1, 3, true), (1, 4, false), (1, 5, false), (3, 4, false), (3, 5, false), (4, 5, false)]);
        assert!((pairs[2].similarity - 10.0 / 11.0).abs() < 1e-12);
    }

    #[test]
    fn lists_are_short_and_say_what_they_leave_out() {
        let items: Vec<&str> = vec!["a b"; 45];
        let report = report(&[file(Role::Facts, &items)], 80);
        assert_eq!((report.files[0].duplicate_count, report.files[0].duplicates.len()), (44, 10));
        assert!(report.to_string().contains("facts: … and 34 more"));
        assert_eq!(listed(&[1, 2]), "1, 2");
        assert_eq!(listed(&(1..=11).collect::<Vec<_>>()), "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, …");
    }

    #[test]
    fn bad_items_are_refused_here_too() {
        let facts = file(Role::Facts, &["a b", "a"]);
        let message = DataReport::new(&[facts], &Tokenizer::words(["a"]), 80).unwrap_err().to_string();
        assert!(message.starts_with("facts.json: item 2 gives 1 token"), "{message}");
    }

    #[test]
    fn shipped_data_are_clean() {
        let files = [Role::Facts, Role::Chat, Role::Paraphrases].map(|role| ItemFile::shipped(role).unwrap());
        let report = report(&files, 80);
        assert_eq!(report.warnings, [""; 0]);
        for file in &report.files {
            assert_eq!((file.duplicate_count, file.cut, file.unknown.count), (0, 0, 0), "{}", file.source.name);
            assert_eq!(file.prompts, if file.role == Role::Facts { 0 } else { file.items });
        }
    }

    /// data/README.md states what the files hold; a change of a file has to be told there.
    #[test]
    fn the_page_beside_the_data_is_true() {
        let page = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../data/README.md");
        let page = std::fs::read_to_string(page).unwrap();
        let files = [Role::Facts, Role::Chat, Role::Paraphrases].map(|role| ItemFile::shipped(role).unwrap());
        let report = report(&files, 80);
        assert!(page.contains(&format!("the vocabulary has {} rows", report.vocab_size)));
        for file in &report.files {
            let name = format!("`{}.json`", file.role.name());
            let line = |start: &str| page.lines().find(|line| line.starts_with(start) && line.contains(&name)).unwrap();
            let (bytes, sha256) = (file.source.bytes, &file.source.sha256);
            let sizes = (file.items, file.tokens, file.types, file.max_length);
            let end = format!("| {bytes} | {} | {} | {} | {} | `{sha256}` |", sizes.0, sizes.1, sizes.2, sizes.3);
            assert!(line("| ").ends_with(&end), "{end}");
            if let Some(floor) = file.floor {
                let row = format!("| {name} | {:.4} | {:.4} |", floor.macro_average, floor.micro_average);
                assert!(page.lines().any(|line| line == row), "{row}");
            }
        }
    }

    proptest! {
        /// The filter finds what comparing all pairs finds.
        #[test]
        fn prefix_filtering_loses_no_pair(
            base in proptest::collection::vec(2u32..30, 1..25),
            edits in proptest::collection::vec((0usize..25, 2u32..30), 1..8),
        ) {
            let mut documents = vec![base.clone()];
            for (at, token) in edits {
                let mut tokens = documents[documents.len() / 2].clone();
                let at = at % tokens.len();
                tokens[at] = token;
                documents.push(tokens);
            }
            let set = DocumentSet {
                name: String::new(),
                documents: documents.into_iter().map(|tokens| crate::data::Document { tokens }).collect(),
                cut: 0,
                unknowns: Unknowns::default(),
            };
            let indices: Vec<usize> = (0..set.documents.len()).collect();
            let sets: Vec<BTreeSet<u32>> = set.documents.iter().map(|d| d.tokens.iter().copied().collect()).collect();
            let mut expected = Vec::new();
            for &a in &indices {
                for &b in &indices[a + 1..] {
                    let shared = sets[a].intersection(&sets[b]).count() as f64;
                    if shared / sets[a].union(&sets[b]).count() as f64 >= 0.9 - 1e-12 {
                        expected.push((a + 1, b + 1));
                    }
                }
            }
            let found: Vec<_> = near_duplicates(&set, &indices).iter().map(|pair| (pair.first, pair.second)).collect();
            prop_assert_eq!(found, expected);
        }
    }
}
