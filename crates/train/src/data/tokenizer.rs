//! Text to token ids and back: words (the roadmap's rule), characters, bytes, or a tokenizer.json of the Hugging Face `tokenizers` crate.
//! An unknown word is never dropped: it becomes an id and is counted.

use super::corpus::{plain_reason, read_bytes};
use super::{DataError, foreign, sha256};
use serde::{Deserialize, Serialize};
use std::cell::Cell;
use std::collections::{BTreeMap, BTreeSet};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Once;

/// Token of every word that the vocabulary lacks; id 0 of a word tokenizer.
pub const UNKNOWN: &str = "<unk>";
/// Token that ends an item; id 1 of a word tokenizer.
pub const END: &str = "</s>";
/// Larger tokenizer files are refused before they are read.
pub const MAX_TOKENIZER_BYTES: u64 = 32 << 20;
/// A file may give any id to a token; a table of that many rows has to be allocated, so ids are bounded.
const MAX_VOCABULARY: u32 = 1 << 22;

/// What an encoding could not express: how often, and which words or characters.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Unknowns {
    pub count: usize,
    pub words: BTreeMap<String, usize>,
}

impl Unknowns {
    /// Adds the counts of `other`.
    pub fn merge(&mut self, other: &Unknowns) {
        self.count += other.count;
        for (word, count) in &other.words {
            *self.words.entry(word.clone()).or_default() += count;
        }
    }

    fn add(&mut self, word: &str) {
        self.count += 1;
        *self.words.entry(word.to_string()).or_default() += 1;
    }
}

/// A tokenizer; `encode` gives ids below `vocab_size`.
#[derive(Clone, Debug)]
pub enum Tokenizer {
    Word(WordTokenizer),
    Char(CharTokenizer),
    /// The 256 byte values of the UTF-8 text.
    Byte,
    Bpe(Box<BpeTokenizer>),
}

/// Words in id order: `<unk>`, `</s>`, then the sorted words.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WordTokenizer {
    words: Vec<String>,
}

/// Characters in id order, sorted. There is no unknown character; the space (else the first character) stands in for it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CharTokenizer {
    characters: Vec<char>,
}

/// A loaded tokenizer.json with the bytes that it was loaded from.
#[derive(Clone, Debug)]
pub struct BpeTokenizer {
    name: String,
    inner: tokenizers::Tokenizer,
    file: Vec<u8>,
    vocab_size: usize,
    unknown: Option<u32>,
}

/// Our own small files; the key `kind` tells them from a Hugging Face file.
#[derive(Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "lowercase", deny_unknown_fields)]
enum Saved {
    Word { vocabulary: Vec<String> },
    Char { vocabulary: Vec<String> },
    Byte {},
}

impl Tokenizer {
    /// The tokenizer that `data.tokenizer` names: "word" and "char" take their vocabulary from the training texts, "byte" needs none, and anything
    /// else is the path of a tokenizer file.
    pub fn from_setting<'a>(setting: &str, texts: impl IntoIterator<Item = &'a str>) -> Result<Self, DataError> {
        match setting {
            "word" => Ok(Self::words(texts)),
            "char" => Ok(Self::characters(texts)),
            "byte" => Ok(Tokenizer::Byte),
            path => Self::load(Path::new(path)),
        }
    }

    /// Word tokenizer over the words of `texts`: V = sorted set + 2 specials.
    pub fn words<'a>(texts: impl IntoIterator<Item = &'a str>) -> Self {
        let mut set: BTreeSet<&str> = texts.into_iter().flat_map(split_words).collect();
        for special in [UNKNOWN, END] {
            set.remove(special);
        }
        let words = [UNKNOWN, END].into_iter().chain(set).map(str::to_string).collect();
        Tokenizer::Word(WordTokenizer { words })
    }

    /// Character tokenizer over exactly the characters of `texts` (the space, should there be none).
    pub fn characters<'a>(texts: impl IntoIterator<Item = &'a str>) -> Self {
        let mut set: BTreeSet<char> = texts.into_iter().flat_map(str::chars).collect();
        if set.is_empty() {
            set.insert(' ');
        }
        Tokenizer::Char(CharTokenizer { characters: set.into_iter().collect() })
    }

    /// Reads a file that `to_bytes` wrote or a Hugging Face tokenizer.json.
    pub fn load(path: &Path) -> Result<Self, DataError> {
        Self::from_bytes(&path.display().to_string(), &read_bytes(path, MAX_TOKENIZER_BYTES)?)
    }

    /// The tokenizer in the bytes of a file called `name`.
    pub fn from_bytes(name: &str, bytes: &[u8]) -> Result<Self, DataError> {
        let bad = |reason: String| DataError::BadTokenizer { file: name.to_string(), reason };
        let value: serde_json::Value = serde_json::from_slice(bytes).map_err(|error| bad(error.to_string()))?;
        if value.get("kind").is_none() {
            return Ok(Tokenizer::Bpe(Box::new(BpeTokenizer::from_bytes(name, bytes, &value)?)));
        }
        match serde_json::from_value(value).map_err(|error| bad(error.to_string()))? {
            Saved::Word { vocabulary } => checked_words(vocabulary).map_err(|reason| bad(reason.to_string())),
            Saved::Char { vocabulary } => checked_characters(&vocabulary).map_err(|reason| bad(reason.to_string())),
            Saved::Byte {} => Ok(Tokenizer::Byte),
        }
    }

    /// The bytes of tokenizer.json: the same tokenizer gives the same bytes; a Hugging Face file is kept as it was.
    pub fn to_bytes(&self) -> Vec<u8> {
        let saved = match self {
            Tokenizer::Word(word) => Saved::Word { vocabulary: word.words.clone() },
            Tokenizer::Char(char) => Saved::Char { vocabulary: char.characters.iter().map(char::to_string).collect() },
            Tokenizer::Byte => Saved::Byte {},
            Tokenizer::Bpe(bpe) => return bpe.file.clone(),
        };
        // Strings in a list always serialise.
        let mut bytes = serde_json::to_vec(&saved).unwrap_or_default();
        bytes.push(b'\n');
        bytes
    }

    /// Writes `to_bytes` to `path`.
    pub fn save(&self, path: &Path) -> Result<(), DataError> {
        std::fs::write(path, self.to_bytes())
            .map_err(|error| DataError::Unwritable { file: path.display().to_string(), reason: plain_reason(&error) })
    }

    /// SHA-256 of `to_bytes`.
    pub fn sha256(&self) -> String {
        sha256(&self.to_bytes())
    }

    /// "word", "char", "byte" or "bpe".
    pub fn kind(&self) -> &'static str {
        match self {
            Tokenizer::Word(_) => "word",
            Tokenizer::Char(_) => "char",
            Tokenizer::Byte => "byte",
            Tokenizer::Bpe(_) => "bpe",
        }
    }

    /// Rows that an embedding needs: every id is below it.
    pub fn vocab_size(&self) -> usize {
        match self {
            Tokenizer::Word(word) => word.words.len(),
            Tokenizer::Char(char) => char.characters.len(),
            Tokenizer::Byte => 256,
            Tokenizer::Bpe(bpe) => bpe.vocab_size,
        }
    }

    /// Token ids of `text`. Only a tokenizer.json can fail: where the file's own rules break on this text.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, DataError> {
        self.encode_counting(text, &mut Unknowns::default())
    }

    /// As `encode`, and adds what the vocabulary lacks to `unknowns`.
    pub fn encode_counting(&self, text: &str, unknowns: &mut Unknowns) -> Result<Vec<u32>, DataError> {
        match self {
            Tokenizer::Word(word) => Ok(split_words(text).map(|token| word.id(token, unknowns)).collect()),
            Tokenizer::Char(char) => Ok(text.chars().map(|character| char.id(character, unknowns)).collect()),
            Tokenizer::Byte => Ok(text.bytes().map(u32::from).collect()),
            Tokenizer::Bpe(bpe) => bpe.encode(text, unknowns),
        }
    }

    /// Readable text. For words it need not be the text that was encoded: white space is normalised. An id out of range is shown, not dropped.
    pub fn decode(&self, ids: &[u32]) -> String {
        match self {
            Tokenizer::Word(word) => join_words(ids.iter().map(|&id| word.word(id))),
            Tokenizer::Char(char) => ids.iter().map(|&id| char.character(id)).collect(),
            Tokenizer::Byte => decode_bytes(ids),
            Tokenizer::Bpe(bpe) => bpe.decode(ids),
        }
    }

    /// The one token `id` as text, for tables.
    pub fn token(&self, id: u32) -> String {
        match self {
            Tokenizer::Bpe(bpe) => bpe.inner.id_to_token(id).unwrap_or_else(|| UNKNOWN.to_string()),
            _ => self.decode(&[id]),
        }
    }

    /// The ids that end an item (`</s>`); generation stops after them. Empty where the vocabulary cannot spell it.
    pub fn end(&self) -> Vec<u32> {
        let mut unknowns = Unknowns::default();
        let ids = match self {
            Tokenizer::Bpe(bpe) => match bpe.inner.token_to_id(END) {
                Some(id) => Ok(vec![id]),
                None => bpe.encode(END, &mut unknowns),
            },
            _ => self.encode_counting(END, &mut unknowns),
        };
        ids.ok().filter(|_| unknowns.count == 0).unwrap_or_default()
    }
}

impl WordTokenizer {
    fn id(&self, word: &str, unknowns: &mut Unknowns) -> u32 {
        if word == END {
            return 1;
        }
        match self.words[2..].binary_search_by(|known| known.as_str().cmp(word)) {
            Ok(index) => index as u32 + 2,
            Err(_) => {
                unknowns.add(word);
                0
            }
        }
    }

    fn word(&self, id: u32) -> &str {
        self.words.get(id as usize).map_or(UNKNOWN, String::as_str)
    }
}

impl CharTokenizer {
    fn id(&self, character: char, unknowns: &mut Unknowns) -> u32 {
        self.characters.binary_search(&character).unwrap_or_else(|_| {
            unknowns.add(character.encode_utf8(&mut [0; 4]));
            self.characters.binary_search(&' ').unwrap_or(0)
        }) as u32
    }

    fn character(&self, id: u32) -> char {
        self.characters.get(id as usize).copied().unwrap_or(char::REPLACEMENT_CHARACTER)
    }
}

impl BpeTokenizer {
    fn from_bytes(name: &str, bytes: &[u8], value: &serde_json::Value) -> Result<Self, DataError> {
        let bad = |reason: String| DataError::BadTokenizer { file: name.to_string(), reason };
        if bytes.len() as u64 > MAX_TOKENIZER_BYTES {
            let size = bytes.len() as u64;
            return Err(DataError::TooLarge { file: name.to_string(), size, limit: MAX_TOKENIZER_BYTES });
        }
        foreign::check(value).map_err(bad)?;
        let (inner, largest) = quietly(|| {
            let mut inner = tokenizers::Tokenizer::from_bytes(bytes).map_err(|error| error.to_string())?;
            // A file may ask for cutting and padding; here the cap is the run's and there is no padding.
            inner.with_truncation(None).map_err(|error| error.to_string())?;
            inner.with_padding(None);
            let largest = inner.get_vocab(true).into_values().max();
            Ok((inner, largest))
        })
        .map_err(bad)?;
        let largest = largest.ok_or_else(|| bad("its vocabulary is empty".to_string()))?;
        if largest >= MAX_VOCABULARY {
            return Err(bad(format!("it has the token id {largest}, and ids must be below {MAX_VOCABULARY}")));
        }
        let unknown = value["model"]["unk_token"].as_str().and_then(|token| inner.token_to_id(token));
        let tokenizer = BpeTokenizer {
            name: name.to_string(),
            inner,
            file: bytes.to_vec(),
            vocab_size: largest as usize + 1,
            unknown,
        };
        // A file whose rules break on plain text is better refused now than in the middle of a corpus.
        tokenizer.encode("User: Why? Assistant: Because. </s>\n\0é", &mut Unknowns::default())?;
        Ok(tokenizer)
    }

    fn encode(&self, text: &str, unknowns: &mut Unknowns) -> Result<Vec<u32>, DataError> {
        let failed = |reason: String| DataError::TokenizerFailed { file: self.name.clone(), bytes: text.len(), reason };
        let encoding = quietly(|| self.inner.encode(text, false).map_err(|error| error.to_string())).map_err(failed)?;
        for (&id, &(from, to)) in encoding.get_ids().iter().zip(encoding.get_offsets()) {
            if id as usize >= self.vocab_size {
                return Err(failed(format!("it gave the id {id}, which its vocabulary lacks")));
            }
            if Some(id) == self.unknown {
                unknowns.add(text.get(from..to).unwrap_or(UNKNOWN));
            }
        }
        Ok(encoding.get_ids().to_vec())
    }

    fn decode(&self, ids: &[u32]) -> String {
        let whole = quietly(|| self.inner.decode(ids, false).map_err(|error| error.to_string()));
        whole.unwrap_or_else(|_| {
            let tokens = ids.iter().map(|&id| self.inner.id_to_token(id).unwrap_or_else(|| UNKNOWN.to_string()));
            tokens.collect::<Vec<_>>().join(" ")
        })
    }
}

thread_local! {
    static QUIET: Cell<bool> = const { Cell::new(false) };
}

/// Runs foreign code that may panic on crafted files: a panic becomes an error text and nothing is printed.
fn quietly<T>(work: impl FnOnce() -> Result<T, String>) -> Result<T, String> {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let usual = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            if !QUIET.get() {
                usual(info);
            }
        }));
    });
    let before = QUIET.replace(true);
    let outcome = catch_unwind(AssertUnwindSafe(work));
    QUIET.set(before);
    outcome.unwrap_or_else(|_| Err("the tokenizers library broke on it".to_string()))
}

fn checked_words(vocabulary: Vec<String>) -> Result<Tokenizer, &'static str> {
    match vocabulary.as_slice() {
        [first, second, rest @ ..] if first == UNKNOWN && second == END => {
            if !rest.is_sorted_by(|a, b| a < b) {
                return Err("its words are not sorted or not unique");
            }
            if rest.iter().any(|word| word == END || split_words(word).ne([word.as_str()])) {
                return Err("one of its words is not a single word");
            }
        }
        _ => return Err("its vocabulary does not start with <unk> and </s>"),
    }
    Ok(Tokenizer::Word(WordTokenizer { words: vocabulary }))
}

fn checked_characters(vocabulary: &[String]) -> Result<Tokenizer, &'static str> {
    let mut characters = Vec::with_capacity(vocabulary.len());
    for entry in vocabulary {
        let mut chars = entry.chars();
        match (chars.next(), chars.next()) {
            (Some(character), None) => characters.push(character),
            _ => return Err("one of its entries is not a single character"),
        }
    }
    if characters.is_empty() || !characters.is_sorted_by(|a, b| a < b) {
        return Err("its characters are none, not sorted or not unique");
    }
    Ok(Tokenizer::Char(CharTokenizer { characters }))
}

/// The roadmap's words: white space separates, each ASCII punctuation mark is a token, `</s>` stays whole, case is kept.
pub fn split_words(text: &str) -> impl Iterator<Item = &str> {
    let mut rest = text;
    std::iter::from_fn(move || {
        rest = rest.trim_start();
        let first = rest.chars().next()?;
        let length = if rest.starts_with(END) {
            END.len()
        } else if first.is_ascii_punctuation() {
            1
        } else {
            rest.find(|c: char| c.is_whitespace() || c.is_ascii_punctuation()).unwrap_or(rest.len())
        };
        let (token, after) = rest.split_at(length);
        rest = after;
        Some(token)
    })
}

/// Joins words with spaces and sets punctuation the way it is written in English.
fn join_words<'a>(words: impl IntoIterator<Item = &'a str>) -> String {
    let mut text = String::new();
    let mut previous = "";
    let mut number_goes_on = false; // after "3" "." in 3.5, "12" ":" in 12:30
    let mut quoted = false;
    for word in words {
        let closes_quote = word == "\"" && quoted;
        let tight_left = closes_quote
            || matches!(word, "." | "," | "?" | "!" | ";" | ":" | ")" | "]" | "}" | "%" | "'" | "-" | "/" | "_")
            || (number_goes_on && word.starts_with(|c: char| c.is_ascii_digit()));
        let tight_right = matches!(previous, "" | "(" | "[" | "{" | "$" | "'" | "-" | "/" | "_" | "#" | "@")
            || (previous == "\"" && quoted);
        if !tight_left && !tight_right {
            text.push(' ');
        }
        number_goes_on = matches!(word, "." | "," | ":") && previous.ends_with(|c: char| c.is_ascii_digit());
        if word == "\"" {
            quoted = !quoted;
        }
        text.push_str(word);
        previous = word;
    }
    text
}

fn decode_bytes(ids: &[u32]) -> String {
    let mut bytes = Vec::with_capacity(ids.len());
    for &id in ids {
        match u8::try_from(id) {
            Ok(byte) => bytes.push(byte),
            Err(_) => bytes.extend_from_slice("\u{FFFD}".as_bytes()),
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use super::super::corpus::{ItemFile, Role};
    use super::*;
    use proptest::prelude::*;

    /// A byte-pair file with one merge and the words "a", "b", "ab", " ", "<unk>".
    fn bpe_file() -> String {
        serde_json::json!({
            "version": "1.0", "truncation": {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0},
            "padding": null, "added_tokens": [
                {"id": 5, "content": "</s>", "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true}],
            "normalizer": null, "pre_tokenizer": null, "post_processor": null, "decoder": {"type": "Fuse"},
            "model": {"type": "BPE", "dropout": null, "unk_token": "<unk>", "continuing_subword_prefix": null,
                "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
                "vocab": {"<unk>": 0, "a": 1, "b": 2, "ab": 3, " ": 4}, "merges": [["a", "b"]]}
        })
        .to_string()
    }

    fn loaded(text: &str) -> Result<Tokenizer, String> {
        Tokenizer::from_bytes("t.json", text.as_bytes()).map_err(|error| error.to_string())
    }

    fn all() -> Vec<Tokenizer> {
        let text = "Why is 3 > 2? It just is. </s>";
        let bpe = loaded(&bpe_file()).unwrap();
        vec![Tokenizer::words([text]), Tokenizer::characters([text]), Tokenizer::Byte, bpe]
    }

    #[test]
    fn words_are_cut_by_the_roadmaps_rule() {
        let words: Vec<&str> = split_words(" User: Don't\tsay (vitamin-C),\nTom!?</s> <s/> é…x").collect();
        let expected = [
            "User", ":", "Don", "'", "t", "say", "(", "vitamin", "-", "C", ")", ",", "Tom", "!", "?", "</s>", "<", "s",
            "/", ">", "é…x",
        ];
        assert_eq!(words, expected);
        assert_eq!(split_words(" \n\u{a0}").count(), 0);
    }

    #[test]
    fn the_vocabulary_is_sorted_after_its_specials_and_unknown_words_are_counted() {
        let tokenizer = Tokenizer::words(["b a. </s>", "B a"]);
        let Tokenizer::Word(word) = &tokenizer else { panic!("a word tokenizer") };
        assert_eq!(word.words, ["<unk>", "</s>", ".", "B", "a", "b"]);
        assert_eq!((tokenizer.vocab_size(), tokenizer.end()), (6, vec![1]));
        let mut unknowns = Unknowns::default();
        let ids = tokenizer.encode_counting("a A b. A, </s>", &mut unknowns).unwrap();
        assert_eq!(ids, [4, 0, 5, 2, 0, 0, 1]);
        assert_eq!(unknowns.count, 3);
        assert_eq!(unknowns.words, BTreeMap::from([("A".to_string(), 2), (",".to_string(), 1)]));
        let mut twice = unknowns.clone();
        twice.merge(&unknowns);
        assert_eq!((twice.count, twice.words["A"], twice.words[","]), (6, 4, 2));
        // The text "<unk>" is three tokens and cannot forge id 0 when these are known.
        let forged = Tokenizer::words(["<unk>"]);
        assert_eq!(forged.encode("<unk>").unwrap(), [2, 4, 3]);
    }

    #[test]
    fn decoded_words_read_well() {
        let round = |text: &str| {
            let tokenizer = Tokenizer::words([text]);
            tokenizer.decode(&tokenizer.encode(text).unwrap())
        };
        for text in [
            "Hello, world. Why? Yes! One; two: three </s>",
            "It's well-known (or so [they] say), isn't it?",
            "He said \"no way\", and \"never\".",
            "The pH is 3.5 of 1,000 at 12:30, or 50% of $5.",
        ] {
            assert_eq!(round(text), text);
        }
        for role in [Role::Facts, Role::Chat] {
            for item in ItemFile::shipped(role).unwrap().items {
                assert_eq!(round(&item), item);
            }
        }
    }

    #[test]
    fn characters_are_exactly_those_of_the_text() {
        let tokenizer = Tokenizer::characters(["ba na\n"]);
        assert_eq!(tokenizer.vocab_size(), 5);
        let mut unknowns = Unknowns::default();
        assert_eq!(tokenizer.encode_counting("nab\nXé", &mut unknowns).unwrap(), [4, 2, 3, 0, 1, 1]);
        assert_eq!((unknowns.count, unknowns.words.len()), (2, 2));
        assert_eq!(tokenizer.decode(&[4, 2, 3, 0, 99]), "nab\n\u{FFFD}");
        assert!(tokenizer.end().is_empty() && Tokenizer::characters(["</s>"]).end().len() == 4);
        assert_eq!(Tokenizer::characters(["xy"]).encode("y?").unwrap(), [1, 0]);
        assert_eq!(Tokenizer::characters([""]).vocab_size(), 1);
    }

    #[test]
    fn bytes_invert_for_any_utf8() {
        let text = "né\0\r\n🙂";
        assert_eq!(Tokenizer::Byte.decode(&Tokenizer::Byte.encode(text).unwrap()), text);
        assert_eq!(Tokenizer::Byte.decode(&[65, 300, 0xC3]), "A\u{FFFD}\u{FFFD}");
        assert_eq!(Tokenizer::Byte.vocab_size(), 256);
    }

    #[test]
    fn a_saved_tokenizer_is_the_same_tokenizer() {
        let folder = tempfile::tempdir().unwrap();
        for tokenizer in all() {
            let path = folder.path().join(tokenizer.kind());
            tokenizer.save(&path).unwrap();
            let again = Tokenizer::load(&path).unwrap();
            assert_eq!(std::fs::read(&path).unwrap(), again.to_bytes());
            assert_eq!(again.sha256(), tokenizer.sha256());
            assert_eq!((again.kind(), again.vocab_size()), (tokenizer.kind(), tokenizer.vocab_size()));
            let text = "ab is 3 </s>";
            assert_eq!(again.encode(text).unwrap(), tokenizer.encode(text).unwrap());
        }
        let message = Tokenizer::Byte.save(&folder.path().join("no/where")).unwrap_err().to_string();
        assert!(message.contains("cannot be written (no such file or directory)"), "{message}");
    }

    #[test]
    fn a_hugging_face_file_is_used_whole_without_its_cut() {
        let tokenizer = loaded(&bpe_file()).unwrap();
        assert_eq!((tokenizer.kind(), tokenizer.vocab_size(), tokenizer.end()), ("bpe", 6, vec![5]));
        let mut unknowns = Unknowns::default();
        // Five tokens, although the file asks for a cut after two.
        assert_eq!(tokenizer.encode_counting("ab aé</s>", &mut unknowns).unwrap(), [3, 4, 1, 0, 5]);
        assert_eq!(unknowns.words, BTreeMap::from([("é".to_string(), 1)]));
        assert_eq!(tokenizer.decode(&[3, 4, 1, 5]), "ab a</s>");
        assert_eq!((tokenizer.token(3), tokenizer.token(99)), ("ab".to_string(), "<unk>".to_string()));
        assert_eq!(tokenizer.to_bytes(), bpe_file().into_bytes());
    }

    #[test]
    fn crafted_files_are_refused_with_a_sentence() {
        let remedy = "use \"word\", \"char\", \"byte\" or a valid tokenizer.json";
        let refused = |text: &str| loaded(text).unwrap_err();
        let cases = [
            ("{\"kind\":\"word\",\"vocabulary\":[\"a\"]}", "its vocabulary does not start with <unk> and </s>"),
            (
                "{\"kind\":\"word\",\"vocabulary\":[\"<unk>\",\"</s>\",\"b\",\"a\"]}",
                "its words are not sorted or not unique",
            ),
            (
                "{\"kind\":\"word\",\"vocabulary\":[\"<unk>\",\"</s>\",\"a b\"]}",
                "one of its words is not a single word",
            ),
            ("{\"kind\":\"char\",\"vocabulary\":[\"ab\"]}", "one of its entries is not a single character"),
            ("{\"kind\":\"char\",\"vocabulary\":[\"a\",\"a\"]}", "its characters are none, not sorted or not unique"),
            ("{\"kind\":\"char\",\"vocabulary\":[]}", "its characters are none, not sorted or not unique"),
        ];
        for (text, reason) in cases {
            assert_eq!(refused(text), format!("t.json: not a usable tokenizer file ({reason}); {remedy}"));
        }
        // Unknown kinds and keys, no JSON, a nesting bomb, foreign JSON: whatever the parser says, with file and remedy.
        let bomb = "[".repeat(100_000);
        for text in ["{\"kind\":\"words\"}", "{\"kind\":\"byte\",\"x\":1}", "", "{", "[]", "{\"model\":{}}", &bomb] {
            let message = refused(text);
            assert!(
                message.starts_with("t.json: not a usable tokenizer file (") && message.ends_with(remedy),
                "{message}"
            );
        }
        // A merge shorter than the subword prefix makes the library slice out of range.
        let panics = bpe_file().replace("\"continuing_subword_prefix\":null", "\"continuing_subword_prefix\":\"####\"");
        assert_eq!(
            refused(&panics),
            format!("t.json: not a usable tokenizer file (the tokenizers library broke on it); {remedy}")
        );
        let huge = bpe_file().replace("\"a\":1", "\"a\":4194304");
        assert!(refused(&huge).contains("it has the token id 4194304, and ids must be below 4194304"));
        // Word-level rules without an unknown token break on every other text.
        let level = "{\"added_tokens\":[],\"model\":{\"type\":\"WordLevel\",\"vocab\":{\"a\":0},\"unk_token\":\"no\"}}";
        let message = refused(level);
        assert!(message.contains("the tokenizer failed on a text of 39 bytes"), "{message}");
    }

    #[test]
    fn a_setting_that_is_neither_name_nor_file_is_an_error() {
        for (setting, kind) in [("word", "word"), ("char", "char"), ("byte", "byte")] {
            assert_eq!(Tokenizer::from_setting(setting, ["a b"]).unwrap().kind(), kind);
        }
        let message = Tokenizer::from_setting("words", ["a"]).unwrap_err().to_string();
        assert_eq!(message, "words: cannot be read (no such file or directory); check the path and the permissions");
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("tokenizer.json");
        std::fs::File::create(&path).unwrap().set_len(MAX_TOKENIZER_BYTES + 1).unwrap();
        assert!(Tokenizer::load(&path).unwrap_err().to_string().contains("is more than the limit of 33554432 bytes"));
    }

    #[test]
    fn tinyshakespeare_has_its_published_characters() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../data/tinyshakespeare.txt");
        let file = super::super::corpus::TextFile::read(&path).unwrap();
        let tokenizer = Tokenizer::characters([file.text.as_str()]);
        assert_eq!((file.source.bytes, tokenizer.vocab_size()), (1_115_394, 65));
        assert_eq!(file.source.sha256, "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed");
        let ids = tokenizer.encode(&file.text).unwrap();
        assert_eq!(tokenizer.decode(&ids), file.text);
    }

    proptest! {
        #[test]
        fn no_text_and_no_ids_panic(text in any::<String>(), ids in proptest::collection::vec(any::<u32>(), 0..40)) {
            for tokenizer in all() {
                let mut unknowns = Unknowns::default();
                let encoded = tokenizer.encode_counting(&text, &mut unknowns).unwrap();
                prop_assert!(encoded.iter().all(|&id| (id as usize) < tokenizer.vocab_size()));
                prop_assert_eq!(unknowns.count, unknowns.words.values().sum::<usize>());
                tokenizer.decode(&encoded);
                tokenizer.decode(&ids);
            }
        }

        #[test]
        fn words_lose_nothing_but_white_space(text in "[a-zA-Z0-9.,;:!?'\"<>/s éß\t\n-]{0,60}") {
            let tokenizer = Tokenizer::words([text.as_str()]);
            let ids = tokenizer.encode(&text).unwrap();
            prop_assert!(!ids.contains(&0));
            let squeeze = |text: &str| text.split_whitespace().collect::<String>();
            // Decoding may set a space inside "< /s>", so compare without any.
            prop_assert_eq!(squeeze(&tokenizer.decode(&ids)), squeeze(&text));
        }

        #[test]
        fn characters_invert_on_their_own_text(text in any::<String>()) {
            let tokenizer = Tokenizer::characters([text.as_str()]);
            prop_assert_eq!(tokenizer.decode(&tokenizer.encode(&text).unwrap()), text);
        }

        #[test]
        fn changed_tokenizer_files_never_panic(at in any::<prop::sample::Index>(), byte in any::<u8>()) {
            let mut file = bpe_file().into_bytes();
            let at = at.index(file.len());
            file[at] = byte;
            if let Ok(tokenizer) = Tokenizer::from_bytes("t.json", &file) {
                tokenizer.encode("ab ba </s>").ok();
                tokenizer.decode(&[0, 3, 9]);
            }
        }
    }
}
