//! Reading the sources: JSON lists of strings (facts, chat, paraphrases) and plain text. Everything is checked here, with item numbers, so that
//! nothing downstream meets a bad item.

use super::{DataError, sha256};
use serde::Serialize;
use serde_json::Value;
use std::io::Read;
use std::path::Path;

/// Larger files are refused before they are read: they would not fit beside their tokens in a small machine's memory.
pub const MAX_FILE_BYTES: u64 = 2 << 30;
/// Lists of items are held in memory as a whole: text, items and tokens.
pub const MAX_LIST_BYTES: u64 = 256 << 20;
/// A document longer than this is a file that lost its structure.
pub const MAX_ITEM_BYTES: usize = 4 << 20;

const BOM: &[u8] = b"\xEF\xBB\xBF";
const SHIPPED_FACTS: &str = include_str!("../../../../data/facts.json");
const SHIPPED_CHAT: &str = include_str!("../../../../data/chat.json");
const SHIPPED_PARAPHRASES: &str = include_str!("../../../../data/paraphrases.json");
const TINYSHAKESPEARE: &str = include_str!("../../../../data/tinyshakespeare.txt");

/// What `data.text` says for the text that is shipped inside the program.
pub const SHIPPED_TEXT: &str = "tinyshakespeare";

/// What a list of items is used for; it decides which form the items must have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Sentences for the first phase.
    Facts,
    /// Dialogues `User: … Assistant: …` for the second phase.
    Chat,
    /// Held-out dialogues: other questions for the answers of the chat items.
    Paraphrases,
}

impl Role {
    pub fn name(self) -> &'static str {
        match self {
            Role::Facts => "facts",
            Role::Chat => "chat",
            Role::Paraphrases => "paraphrases",
        }
    }

    fn is_dialogue(self) -> bool {
        self != Role::Facts
    }
}

/// Where items came from, for the record of a run. The hash is over the file's bytes as they are, byte order mark included.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Source {
    pub name: String,
    pub bytes: u64,
    pub sha256: String,
}

/// A checked JSON list of strings.
#[derive(Clone, Debug)]
pub struct ItemFile {
    pub source: Source,
    pub role: Role,
    pub items: Vec<String>,
}

impl ItemFile {
    /// Reads and checks the file at `path`; see [`DataError`] for what is refused.
    pub fn read(path: &Path, role: Role) -> Result<Self, DataError> {
        Self::parse(&path.display().to_string(), &read_bytes(path, MAX_LIST_BYTES)?, role)
    }

    /// The list shipped inside the program.
    pub fn shipped(role: Role) -> Result<Self, DataError> {
        let text = match role {
            Role::Facts => SHIPPED_FACTS,
            Role::Chat => SHIPPED_CHAT,
            Role::Paraphrases => SHIPPED_PARAPHRASES,
        };
        Self::parse(&format!("shipped {}.json", role.name()), text.as_bytes(), role)
    }

    /// Checks the bytes of a file called `name`.
    pub fn parse(name: &str, bytes: &[u8], role: Role) -> Result<Self, DataError> {
        let file = || name.to_string();
        let text = utf8(name, bytes)?;
        if text.trim().is_empty() {
            return Err(DataError::EmptyFile { file: file(), remedy: "write a JSON list of strings into it" });
        }
        let (list, error) = read_list(text);
        if let Some(error) = error {
            return Err(not_json(name, &error, list.map_or(0, |list| list.len())));
        }
        let list = list.map_err(|found| DataError::NotAList { file: file(), found })?;
        if list.is_empty() {
            return Err(DataError::EmptyList { file: file() });
        }
        let items = list
            .into_iter()
            .enumerate()
            .map(|(index, value)| checked_item(name, index + 1, value, role))
            .collect::<Result<Vec<_>, _>>()?;
        Ok(ItemFile { source: source(name, bytes), role, items })
    }

    /// The items as prompt and answer; empty for facts.
    pub fn exchanges(&self) -> Vec<Exchange<'_>> {
        if !self.role.is_dialogue() {
            return Vec::new();
        }
        self.items.iter().filter_map(|item| split_chat(item).ok()).collect()
    }
}

/// A plain text: UTF-8, byte order mark stripped, line ends kept as they are.
#[derive(Clone, Debug)]
pub struct TextFile {
    pub source: Source,
    pub text: String,
}

impl TextFile {
    /// Reads the text at `path`, or the shipped one by its name (a path of a loaded run is absolute).
    pub fn read(path: &Path) -> Result<Self, DataError> {
        if path == Path::new(SHIPPED_TEXT) {
            return Self::parse("shipped tinyshakespeare.txt", TINYSHAKESPEARE.as_bytes());
        }
        Self::parse(&path.display().to_string(), &read_bytes(path, MAX_FILE_BYTES)?)
    }

    /// Checks the bytes of a file called `name`.
    pub fn parse(name: &str, bytes: &[u8]) -> Result<Self, DataError> {
        let text = utf8(name, bytes)?.to_string();
        if text.is_empty() {
            return Err(DataError::EmptyFile { file: name.to_string(), remedy: "put the training text into it" });
        }
        Ok(TextFile { source: source(name, bytes), text })
    }
}

/// One dialogue, cut where the last answer begins. The prompt ends with `Assistant:`, the answer keeps its `</s>`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exchange<'a> {
    pub prompt: &'a str,
    pub answer: &'a str,
}

/// Cuts `User: question Assistant: answer </s>`; on failure says what is missing. With several turns the last answer is the answer.
pub fn split_chat(item: &str) -> Result<Exchange<'_>, &'static str> {
    const ASSISTANT: &str = "Assistant:";
    let item = item.trim();
    let question = item.strip_prefix("User:").ok_or("\"User:\" at its start")?;
    let at = item.rfind(ASSISTANT).ok_or("\"Assistant:\" after the question")?;
    let answer = item[at + ASSISTANT.len()..].trim();
    // Both slices of `item` start after "User:", for "Assistant:" cannot overlap it.
    if question[..at - "User:".len()].trim().is_empty() {
        return Err("a question after \"User:\"");
    }
    if answer.trim_end_matches("</s>").trim().is_empty() {
        return Err("an answer after \"Assistant:\"");
    }
    Ok(Exchange { prompt: &item[..at + ASSISTANT.len()], answer })
}

/// Reads at most `limit` bytes; a file that grows while it is read is caught too.
pub(crate) fn read_bytes(path: &Path, limit: u64) -> Result<Vec<u8>, DataError> {
    let file = || path.display().to_string();
    let unreadable = |error: std::io::Error| DataError::Unreadable { file: file(), reason: plain_reason(&error) };
    let metadata = std::fs::metadata(path).map_err(unreadable)?;
    if !metadata.is_file() {
        let reason = if metadata.is_dir() { "it is a folder" } else { "it is a device or a pipe, not a file" };
        return Err(DataError::Unreadable { file: file(), reason: reason.to_string() });
    }
    if metadata.len() > limit {
        return Err(DataError::TooLarge { file: file(), size: metadata.len(), limit });
    }
    let mut bytes = Vec::with_capacity(metadata.len() as usize);
    std::fs::File::open(path).map_err(unreadable)?.take(limit + 1).read_to_end(&mut bytes).map_err(unreadable)?;
    if bytes.len() as u64 > limit {
        return Err(DataError::TooLarge { file: file(), size: bytes.len() as u64, limit });
    }
    Ok(bytes)
}

/// The operating system's reason without its number.
pub(crate) fn plain_reason(error: &std::io::Error) -> String {
    let text = error.to_string();
    text.split(" (os error").next().unwrap_or_default().to_lowercase()
}

fn utf8<'a>(name: &str, bytes: &'a [u8]) -> Result<&'a str, DataError> {
    let body = bytes.strip_prefix(BOM).unwrap_or(bytes);
    let skipped = bytes.len() - body.len();
    std::str::from_utf8(body).map_err(|error| {
        let offset = skipped + error.valid_up_to();
        let line = 1 + bytes[..offset].iter().filter(|byte| **byte == b'\n').count();
        DataError::NotUtf8 { file: name.to_string(), offset, line }
    })
}

/// An item that is a text, or what it is instead.
type Item = Result<String, &'static str>;

/// The items of a JSON list, those before an error too, or what stands there in place of a list; and the error. Texts are kept as they
/// come, so that a file that is wrong at its end costs no second copy.
fn read_list(text: &str) -> (Result<Vec<Item>, &'static str>, Option<serde_json::Error>) {
    struct Items<'i>(&'i mut Vec<Item>);

    impl<'de> serde::de::Visitor<'de> for Items<'_> {
        type Value = ();

        fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            f.write_str("a list of strings")
        }

        fn visit_seq<A: serde::de::SeqAccess<'de>>(self, mut list: A) -> Result<(), A::Error> {
            while let Some(value) = list.next_element::<Value>()? {
                self.0.push(match value {
                    Value::String(text) => Ok(text),
                    other => Err(kind_of(&other)),
                });
            }
            Ok(())
        }
    }

    if !text.trim_start().starts_with('[') {
        return match serde_json::from_str::<Value>(text) {
            Ok(other) => (Err(kind_of(&other)), None),
            Err(error) => (Ok(Vec::new()), Some(error)),
        };
    }
    let mut items = Vec::new();
    let mut parser = serde_json::Deserializer::from_str(text);
    let read = serde::Deserializer::deserialize_seq(&mut parser, Items(&mut items)).and_then(|()| parser.end());
    (Ok(items), read.err())
}

fn not_json(name: &str, error: &serde_json::Error, good: usize) -> DataError {
    let (line, column) = (error.line(), error.column());
    let text = error.to_string();
    let place = format!(" at line {line} column {column}");
    let reason = text.strip_suffix(place.as_str()).unwrap_or(text.as_str()).to_string();
    DataError::NotJson { file: name.to_string(), line, column, good, reason }
}

fn checked_item(name: &str, item: usize, value: Item, role: Role) -> Result<String, DataError> {
    let file = || name.to_string();
    let text = value.map_err(|found| DataError::NotAString { file: file(), item, found })?;
    if text.len() > MAX_ITEM_BYTES {
        return Err(DataError::LongItem { file: file(), item, bytes: text.len(), limit: MAX_ITEM_BYTES });
    }
    if text.trim().is_empty() {
        return Err(DataError::EmptyItem { file: file(), item });
    }
    if role.is_dialogue() {
        split_chat(&text).map_err(|missing| DataError::NotADialogue { file: file(), item, missing })?;
    }
    Ok(text)
}

fn kind_of(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a truth value",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

pub(crate) fn source(name: &str, bytes: &[u8]) -> Source {
    Source { name: name.to_string(), bytes: bytes.len() as u64, sha256: sha256(bytes) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn refusal(bytes: &[u8], role: Role) -> String {
        ItemFile::parse("f.json", bytes, role).unwrap_err().to_string()
    }

    #[test]
    fn every_refusal_names_the_file_the_place_and_the_remedy() {
        let remedy = "write one list of strings, such as [\"first item\", \"second item\"]";
        let dialogue = "write it as \"User: question Assistant: answer </s>\"";
        let cases: Vec<(&[u8], Role, String)> = vec![
            (b"", Role::Facts, "the file is empty; write a JSON list of strings into it".into()),
            (b"\xEF\xBB\xBF \n", Role::Facts, "the file is empty; write a JSON list of strings into it".into()),
            (b"[\"a\xFF\"]", Role::Facts, "not UTF-8 at byte 3 (line 1); save the file in UTF-8".into()),
            (b"\xEF\xBB\xBF[\"a\xFF\"]", Role::Facts, "not UTF-8 at byte 6 (line 1); save the file in UTF-8".into()),
            (
                b"[\"a\",\n\"b\"",
                Role::Facts,
                format!("not JSON at line 2, column 3, after 2 good items (EOF while parsing a list); {remedy}"),
            ),
            (
                b"\"a\"\n\"b\"\n",
                Role::Facts,
                format!("not JSON at line 2, column 1, before any item (trailing characters); {remedy}"),
            ),
            (
                b"[\"a\0\"]",
                Role::Facts,
                format!(
                    "not JSON at line 1, column 4, before any item (control character (\\u0000-\\u001F) found while parsing a string); {remedy}"
                ),
            ),
            (b"{\"a\": 1}", Role::Facts, format!("holds an object, not a list; {remedy}")),
            (b"\"a\"", Role::Facts, format!("holds a string, not a list; {remedy}")),
            (b"[]", Role::Facts, "the list is empty; add at least one string".into()),
            (
                b"[\"a\", 7]",
                Role::Facts,
                "item 2 is a number, not a string; put it in double quotes or remove it".into(),
            ),
            (b"[null]", Role::Facts, "item 1 is null, not a string; put it in double quotes or remove it".into()),
            (
                b"[\"a\", \"b\", [\"c\"]]",
                Role::Facts,
                "item 3 is a list, not a string; put it in double quotes or remove it".into(),
            ),
            (
                b"[{}, true]",
                Role::Facts,
                "item 1 is an object, not a string; put it in double quotes or remove it".into(),
            ),
            (
                b"[\"a\", true]",
                Role::Facts,
                "item 2 is a truth value, not a string; put it in double quotes or remove it".into(),
            ),
            (b"[\"a\", \" \\n\"]", Role::Facts, "item 2 is empty; write its text or remove it".into()),
            (b"[\"Hello\"]", Role::Chat, format!("item 1 lacks \"User:\" at its start; {dialogue}")),
            (
                b"[\"User: a? Assistant: b\", \"User: a?\"]",
                Role::Paraphrases,
                format!("item 2 lacks \"Assistant:\" after the question; {dialogue}"),
            ),
            (b"[\"Assistant: b User: a?\"]", Role::Chat, format!("item 1 lacks \"User:\" at its start; {dialogue}")),
            (b"[\"User: Assistant: b\"]", Role::Chat, format!("item 1 lacks a question after \"User:\"; {dialogue}")),
            (
                b"[\"User: a? Assistant: </s>\"]",
                Role::Chat,
                format!("item 1 lacks an answer after \"Assistant:\"; {dialogue}"),
            ),
        ];
        for (bytes, role, message) in cases {
            assert_eq!(refusal(bytes, role), format!("f.json: {message}"));
        }
    }

    #[test]
    fn a_nested_bomb_is_a_sentence_and_not_a_stack_overflow() {
        let bomb = "[".repeat(1_000_000);
        let message = refusal(bomb.as_bytes(), Role::Facts);
        assert!(
            message.starts_with("f.json: not JSON at line 1, column 128, before any item (recursion limit exceeded);"),
            "{message}"
        );
    }

    #[test]
    fn files_that_cannot_be_read_are_named() {
        let folder = tempfile::tempdir().unwrap();
        let missing = folder.path().join("none.json");
        let message = ItemFile::read(&missing, Role::Facts).unwrap_err().to_string();
        let expected = "cannot be read (no such file or directory); check the path and the permissions";
        assert_eq!(message, format!("{}: {expected}", missing.display()));
        let message = TextFile::read(folder.path()).unwrap_err().to_string();
        assert!(message.ends_with("cannot be read (it is a folder); check the path and the permissions"), "{message}");
    }

    #[test]
    fn too_large_files_are_refused_before_reading() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("large.txt");
        // A sparse file: reading it would take seconds and gigabytes, refusing it takes neither.
        std::fs::File::create(&path).unwrap().set_len(MAX_FILE_BYTES + 1).unwrap();
        let message = TextFile::read(&path).unwrap_err().to_string();
        assert!(message.contains("2147483649 bytes is more than the limit of 2147483648 bytes"), "{message}");
        std::fs::write(&path, "12345").unwrap();
        assert!(read_bytes(&path, 4).is_err() && read_bytes(&path, 5).is_ok());
    }

    #[test]
    fn a_byte_order_mark_is_stripped_and_nothing_else() {
        let text = TextFile::parse("t.txt", b"\xEF\xBB\xBFa\r\n\0b \n").unwrap();
        assert_eq!(text.text, "a\r\n\0b \n");
        assert_eq!(text.source.bytes, 10);
        let list = ItemFile::parse("f.json", b"\xEF\xBB\xBF[\"a\\u0000 b\"]\r\n", Role::Facts).unwrap();
        assert_eq!(list.items, ["a\0 b"]);
        for empty in [&b""[..], BOM] {
            let message = TextFile::parse("t.txt", empty).unwrap_err().to_string();
            assert_eq!(message, "t.txt: the file is empty; put the training text into it");
        }
        assert_eq!(
            TextFile::parse("t.txt", b"ab\xC3").unwrap_err().to_string(),
            "t.txt: not UTF-8 at byte 2 (line 1); save the file in UTF-8"
        );
    }

    #[test]
    fn rows_that_break_the_file_are_counted_and_placed() {
        let list = |bytes: &[u8]| ItemFile::parse("f.json", bytes, Role::Facts);
        let reason = |bytes: &[u8]| list(bytes).unwrap_err().to_string();
        // Line ends of any kind are white space between items, and none can stand inside one.
        for ends in ["\n", "\r\n", "\r", "\n\r\r\n"] {
            let text = format!("[\"a\",{ends}\"b\"{ends}]{ends}");
            assert_eq!(list(text.as_bytes()).unwrap().items, ["a", "b"]);
            assert!(reason(format!("[\"a{ends}\"]").as_bytes()).contains("control character"));
        }
        assert!(reason(b"[\"a\",\n\"b\", \"\\ud800 alone\"]").contains("line 2, column 13, after 2 good items"));
        assert!(reason(b"[\"a\",\n\"b\xff\"]").contains("not UTF-8 at byte 8 (line 2)"));
        assert!(reason(b"[\"a\"] \"b\"").contains("after 1 good item (trailing characters)"));
        let deep = format!("[\"a\", {}", "[".repeat(100_000));
        assert!(reason(deep.as_bytes()).contains("after 1 good item (recursion limit exceeded)"));
        assert!(reason("[".repeat(100_000).as_bytes()).contains("recursion limit"));
        let long = format!("[\"a\", \"{}\"]", "x".repeat(MAX_ITEM_BYTES + 1));
        assert!(reason(long.as_bytes()).contains("item 2 has 4194305 bytes, more than the 4194304 of a document"));
    }

    #[cfg(unix)]
    #[test]
    fn huge_files_and_devices_are_refused_before_they_are_read() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("line.json");
        std::fs::File::create(&path).unwrap().set_len(1 << 30).unwrap(); // one line of 1 GiB, sparse
        let message = ItemFile::read(&path, Role::Facts).unwrap_err().to_string();
        assert!(message.contains("1073741824 bytes is more than the limit of 268435456"), "{message}");
        for device in ["/dev/zero", "/dev/null"] {
            let message = ItemFile::read(Path::new(device), Role::Facts).unwrap_err().to_string();
            assert!(message.contains("device or a pipe"), "{message}");
        }
        assert!(ItemFile::read(folder.path(), Role::Facts).unwrap_err().to_string().contains("it is a folder"));
    }

    #[test]
    fn the_hash_is_the_published_one_and_one_byte_changes_it() {
        let abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        assert_eq!(TextFile::parse("t", b"abc").unwrap().source.sha256, abc);
        assert_ne!(TextFile::parse("t", b"abd").unwrap().source.sha256, abc);
    }

    #[test]
    fn a_dialogue_is_cut_before_its_last_answer() {
        let one = split_chat("User: Why? Assistant: Because. </s>").unwrap();
        assert_eq!((one.prompt, one.answer), ("User: Why? Assistant:", "Because. </s>"));
        let two = split_chat(" User: a Assistant: b User: c Assistant: d").unwrap();
        assert_eq!((two.prompt, two.answer), ("User: a Assistant: b User: c Assistant:", "d"));
    }

    #[test]
    fn shipped_lists_are_whole_and_paraphrases_answer_like_the_chat() {
        let facts = ItemFile::shipped(Role::Facts).unwrap();
        let chat = ItemFile::shipped(Role::Chat).unwrap();
        let paraphrases = ItemFile::shipped(Role::Paraphrases).unwrap();
        assert!(facts.items.len() >= 500 && chat.items.len() >= 100 && paraphrases.items.len() >= 50);
        assert!(facts.exchanges().is_empty());
        for file in [&facts, &chat, &paraphrases] {
            assert!(file.items.iter().all(|item| item.ends_with(" </s>")));
        }
        let chat_exchanges = chat.exchanges();
        assert_eq!(chat_exchanges.len(), chat.items.len());
        for held_out in paraphrases.exchanges() {
            assert!(chat_exchanges.iter().any(|known| known.answer == held_out.answer), "{}", held_out.answer);
            assert!(chat_exchanges.iter().all(|known| known.prompt != held_out.prompt), "{}", held_out.prompt);
        }
    }

    proptest! {
        #[test]
        fn any_bytes_give_a_list_or_a_sentence(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            for role in [Role::Facts, Role::Chat] {
                if let Err(error) = ItemFile::parse("f.json", &bytes, role) {
                    prop_assert!(error.to_string().starts_with("f.json: "));
                }
            }
        }

        #[test]
        fn any_list_of_texts_survives(items in proptest::collection::vec(".{0,20}[a-z].{0,20}", 1..6)) {
            let bytes = serde_json::to_vec(&items).unwrap();
            prop_assert_eq!(ItemFile::parse("f.json", &bytes, Role::Facts).unwrap().items, items);
        }

        #[test]
        fn any_text_is_cut_without_loss_or_panic(question in ".{0,30}", answer in ".{0,30}") {
            let item = format!("User:{question}Assistant:{answer}");
            if let Ok(exchange) = split_chat(&item) {
                prop_assert!(exchange.prompt.ends_with("Assistant:"));
                let rest = &item.trim()[exchange.prompt.len()..];
                prop_assert_eq!(rest.trim(), exchange.answer);
            }
        }
    }
}
