//! What a tokenizer.json of the Hugging Face `tokenizers` crate may ask for, checked before that crate sees it.
//!
//! The crate panics on crafted files; `tokenizer.rs` turns a panic into an error. What no handler can undo is memory and time without end, so
//! the sizes that lead there are bounded here: table sizes, the number of steps, and how much steps may lengthen a text. Recursion is bounded by
//! the JSON parser's depth of 128, backtracking by the regex crate's own limit. With these bounds a child process would add only a copy of
//! every text and every id; so there is none.

use serde_json::Value;

const MAX_TOKENS: usize = 1 << 20;
const MAX_MERGES: usize = 4 << 20;
const MAX_ADDED: usize = 100_000;
/// Steps (objects with a `type`) of one stage.
const MAX_STEPS: usize = 64;
const MAX_PATTERN: usize = 4096;
/// By how much the steps of a stage may lengthen a text, each replacement counted as if it hit every character.
const MAX_GROWTH: usize = 1 << 12;
/// WordPiece looks at every piece of a word: its time is the square of this.
const MAX_WORD: u64 = 1 << 10;

/// Why this tokenizer.json is not handed to the library.
pub(super) fn check(file: &Value) -> Result<(), String> {
    let model = &file["model"];
    for (list, name, limit) in [
        (&model["vocab"], "model.vocab", MAX_TOKENS),
        (&model["merges"], "model.merges", MAX_MERGES),
        (&file["added_tokens"], "added_tokens", MAX_ADDED),
    ] {
        let length = list.as_array().map(Vec::len).or(list.as_object().map(|map| map.len())).unwrap_or(0);
        if length > limit {
            return Err(format!("{name} has {length} entries; {limit} are the most"));
        }
    }
    if model["dropout"].as_f64().is_some_and(|dropout| dropout != 0.0) {
        return Err("model.dropout makes it random, and a run must be repeatable; set it to null".into());
    }
    if model["max_input_chars_per_word"].as_u64().is_some_and(|most| most > MAX_WORD) {
        return Err(format!("model.max_input_chars_per_word is above {MAX_WORD}"));
    }
    for stage in ["normalizer", "pre_tokenizer", "post_processor", "decoder"] {
        let mut seen = Seen { steps: 0, growth: 1 };
        seen.walk(&file[stage]).map_err(|reason| format!("{stage} {reason}"))?;
    }
    Ok(())
}

/// What one stage adds up to.
struct Seen {
    steps: usize,
    growth: usize,
}

impl Seen {
    fn walk(&mut self, node: &Value) -> Result<(), String> {
        match node {
            Value::Array(list) => list.iter().try_for_each(|node| self.walk(node)),
            Value::Object(map) => {
                if map.contains_key("type") {
                    self.step(node)?;
                }
                map.values().try_for_each(|node| self.walk(node))
            }
            _ => Ok(()),
        }
    }

    fn step(&mut self, step: &Value) -> Result<(), String> {
        self.steps += 1;
        if self.steps > MAX_STEPS {
            return Err(format!("has more than {MAX_STEPS} steps"));
        }
        let text = |key: &str| step[key].as_str().map_or(0, str::len);
        let pattern = step["pattern"].as_object().into_iter().flat_map(|map| map.values()).filter_map(Value::as_str);
        if pattern.map(str::len).max().unwrap_or(0) > MAX_PATTERN {
            return Err(format!("has a pattern of more than {MAX_PATTERN} bytes"));
        }
        let longer = match step["type"].as_str() {
            Some("Replace") => 1 + text("content"),
            Some("Prepend") => 1 + text("prepend"),
            _ => 1,
        };
        self.growth = self.growth.saturating_mul(longer);
        match self.growth > MAX_GROWTH {
            true => Err(format!("may make a text more than {MAX_GROWTH} times as long")),
            false => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::Tokenizer;
    use serde_json::{Value, json};

    /// A small good file.
    fn file() -> Value {
        json!({
            "version": "1.0", "truncation": null, "padding": null, "added_tokens": [],
            "normalizer": null, "pre_tokenizer": null, "post_processor": null, "decoder": null,
            "model": {"type": "BPE", "dropout": null, "unk_token": "<unk>", "continuing_subword_prefix": null,
                "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
                "vocab": {"<unk>": 0, "a": 1, "b": 2, "ab": 3, " ": 4}, "merges": [["a", "b"]]}
        })
    }

    /// What becomes of the file with `value` at `path`: the reason of its refusal, or none.
    fn outcome(path: &str, value: Value) -> Option<String> {
        let mut file = file();
        *file.pointer_mut(path).unwrap() = value;
        match Tokenizer::from_bytes("t.json", file.to_string().as_bytes()) {
            Err(error) => Some(error.to_string()),
            Ok(tokenizer) => {
                for text in ["ab", "", "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaab", "é\0 \u{10ffff}"] {
                    if let Err(error) = tokenizer.encode(text) {
                        return Some(error.to_string());
                    }
                }
                tokenizer.decode(&[0, 1, 99, u32::MAX]);
                None
            }
        }
    }

    #[test]
    fn the_five_known_panics_of_the_library_are_sentences_or_harmless() {
        assert_eq!(outcome("/model/unk_token", json!("<unk>")), None);
        // 1: a merge whose product the vocabulary lacks; and one longer than its prefix allows
        assert!(outcome("/model/merges", json!([["a", "b"], ["ab", "ab"]])).is_some());
        assert!(outcome("/model/continuing_subword_prefix", json!("####")).unwrap().contains("t.json"));
        // 2: FixedLength 0 divides by zero
        let split = json!({"type": "FixedLength", "length": 0});
        assert!(outcome("/pre_tokenizer", split).unwrap().contains("t.json"));
        // 3: a template that names a token that is not there (special tokens are never added here)
        let template = json!({"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "[NO]", "type_id": 0}}],
            "pair": [], "special_tokens": {}});
        assert!(outcome("/post_processor", template).is_none_or(|message| message.starts_with("t.json")));
        // 4: a stride that is not smaller than the length (truncation is dropped)
        let cut = json!({"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 2});
        assert!(outcome("/truncation", cut).is_none_or(|message| message.starts_with("t.json")));
        // 5: a regular expression that backtracks without end
        for pattern in ["^(a+)+$", "^(a+)+\\1$"] {
            let split =
                json!({"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false});
            assert!(outcome("/pre_tokenizer", split).is_none_or(|message| message.starts_with("t.json")), "{pattern}");
        }
    }

    #[test]
    fn bombs_are_refused_before_the_library_sees_them() {
        let double = |n: usize| {
            let one = json!({"type": "Replace", "pattern": {"String": "a"}, "content": "aa"});
            json!({"type": "Sequence", "normalizers": vec![one; n]})
        };
        assert!(
            outcome("/normalizer", double(40)).unwrap().contains("normalizer may make a text more than 4096 times")
        );
        assert_eq!(outcome("/normalizer", double(3)), None);
        let long = json!({"type": "Prepend", "prepend": "x".repeat(5000)});
        assert!(outcome("/normalizer", long).unwrap().contains("may make a text"));
        let steps = json!({"type": "Sequence", "pretokenizers": vec![json!({"type": "Whitespace"}); 65]});
        assert!(outcome("/pre_tokenizer", steps).unwrap().contains("pre_tokenizer has more than 64 steps"));
        let wide =
            json!({"type": "Split", "pattern": {"Regex": "a".repeat(5000)}, "behavior": "Isolated", "invert": false});
        assert!(outcome("/pre_tokenizer", wide).unwrap().contains("a pattern of more than 4096 bytes"));
        assert!(outcome("/model/dropout", json!(0.5)).unwrap().contains("random"));
        assert_eq!(outcome("/model/dropout", json!(0.0)), None);
        let added: Vec<Value> = (0..=super::MAX_ADDED).map(|id| json!({"id": id})).collect();
        assert!(outcome("/added_tokens", json!(added)).unwrap().contains("added_tokens has 100001 entries"));
        let piece = json!({"type": "WordPiece", "unk_token": "a", "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 1u64 << 40, "vocab": {"a": 0}});
        assert!(outcome("/model", piece).unwrap().contains("max_input_chars_per_word"));
    }
}
