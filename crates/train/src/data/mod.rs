//! From files to batches: `corpus` reads, `tokenizer` cuts into ids, `batch` makes ragged batches, `floor` says how low a loss can be on them,
//! `statistics` reports what is in the files.

pub mod augment;
pub mod batch;
pub mod corpus;
pub mod floor;
mod foreign;
pub mod statistics;
pub mod tokenizer;

pub use batch::{Batch, Document, DocumentOrder, DocumentSet, Split, TextSource, split_documents};
pub use corpus::{Exchange, ItemFile, Role, SHIPPED_TEXT, Source, TextFile, split_chat};
pub use floor::Floor;
pub use statistics::DataReport;
pub use tokenizer::{Tokenizer, Unknowns};

/// What can be wrong with data: one sentence that names the file, the place in it and the remedy. Items, lines and columns count from 1.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DataError {
    #[error("{file}: cannot be read ({reason}); check the path and the permissions")]
    Unreadable { file: String, reason: String },
    #[error("{file}: {size} bytes is more than the limit of {limit} bytes; split the file or use a part of it")]
    TooLarge { file: String, size: u64, limit: u64 },
    #[error("{file}: the file is empty; {remedy}")]
    EmptyFile { file: String, remedy: &'static str },
    #[error("{file}: not UTF-8 at byte {offset} (line {line}); save the file in UTF-8")]
    NotUtf8 { file: String, offset: usize, line: usize },
    #[error(
        "{file}: not JSON at line {line}, column {column}, {} ({reason}); write one list of strings, such as [\"first item\", \"second item\"]",
        if *good == 0 { "before any item".to_string() } else { format!("after {good} good item{}", if *good == 1 { "" } else { "s" }) }
    )]
    NotJson { file: String, line: usize, column: usize, good: usize, reason: String },
    #[error("{file}: holds {found}, not a list; write one list of strings, such as [\"first item\", \"second item\"]")]
    NotAList { file: String, found: &'static str },
    #[error("{file}: the list is empty; add at least one string")]
    EmptyList { file: String },
    #[error("{file}: item {item} is {found}, not a string; put it in double quotes or remove it")]
    NotAString { file: String, item: usize, found: &'static str },
    #[error("{file}: item {item} has {bytes} bytes, more than the {limit} of a document; cut it into several")]
    LongItem { file: String, item: usize, bytes: usize, limit: usize },
    #[error("{file}: item {item} is empty; write its text or remove it")]
    EmptyItem { file: String, item: usize },
    #[error("{file}: item {item} lacks {missing}; write it as \"User: question Assistant: answer </s>\"")]
    NotADialogue { file: String, item: usize, missing: &'static str },
    #[error(
        "{file}: item {item} gives {tokens} token{} but needs 2, one to read and one to predict; lengthen or remove it",
        if *tokens == 1 { "" } else { "s" }
    )]
    TooShort { file: String, item: usize, tokens: usize },
    #[error("data.max_length = {max_length} leaves nothing to predict; set it to 2 or more")]
    CapTooSmall { max_length: usize },
    #[error("{what} must be at least 1 but is 0; set it in the run file")]
    Zero { what: &'static str },
    #[error(
        "{file}: {count} items cannot be split into training and validation; add items or set data.val_fraction = 0"
    )]
    CannotSplit { file: String, count: usize },
    #[error("data.val_fraction = {value} is not in the range from 0 up to, but without, 1; choose a value such as 0.1")]
    BadFraction { value: String },
    #[error(
        "{file}: the {part} part has {tokens} tokens but data.{key} = {length} needs at least {needed}; use a longer text or a smaller {key}"
    )]
    TextTooShort { file: String, part: &'static str, tokens: usize, key: &'static str, length: usize, needed: usize },
    #[error(
        "{file}: not a usable tokenizer file ({reason}); use \"word\", \"char\", \"byte\" or a valid tokenizer.json"
    )]
    BadTokenizer { file: String, reason: String },
    #[error("{file}: the tokenizer failed on a text of {bytes} bytes ({reason}); use another tokenizer.json")]
    TokenizerFailed { file: String, bytes: usize, reason: String },
    #[error("{file}: not a table for data.augment ({reason}); see data/augment.json for its form")]
    BadTable { file: String, reason: String },
    #[error("{file}: not a routing that can be replayed here ({reason})")]
    BadRouting { file: String, reason: String },
    #[error(
        "{file}: none of its rules makes a new document of known words; raise data.augment.synonyms or use a table for these data"
    )]
    NoVariants { file: String },
    #[error("{file}: cannot be written ({reason}); check the folder, the permissions and the free space")]
    Unwritable { file: String, reason: String },
}

/// The SHA-256 of `bytes` in lower-case hexadecimal digits.
pub fn sha256(bytes: &[u8]) -> String {
    use sha2::Digest;
    sha2::Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}
