//! Routing kept in a file: which experts every token of some documents took, layer by layer. `eval --record` writes it; `eval --replay` and
//! `data.routing` read it. A safetensors file: `tokens` [n] and `documents` [b + 1] say whose routing it is, `layers.L.rows` [n + 1] and
//! `layers.L.experts` [a] what it is, all u32; the same routing gives the same bytes.

use crate::checkpoint::header;
use crate::data::corpus::{read_bytes, source};
use crate::data::{DataError, Source};
use crate::files::{replace, system};
use moe_router::overruled::{Overruled, Rows, Ruling};
use moe_router::{Policy, Routing};
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use std::io;
use std::path::Path;
use std::sync::Arc;

/// Larger files are refused before they are read.
const MAX_BYTES: u64 = 1 << 30;
/// The one entry of the metadata; several would come in any order.
const KEY: &str = "moe_lab.routing";

/// What must be the same for a routing to mean anything.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Model {
    tokenizer: String,
    num_layers: usize,
    num_experts: usize,
}

/// The choices of every sparse layer for the same documents.
#[derive(Clone, Debug, PartialEq)]
pub struct Recording {
    model: Model,
    layers: Vec<Rows>,
}

impl Recording {
    /// Without documents, for `num_layers` sparse layers and a tokenizer of this sha256.
    pub fn new(tokenizer: String, num_layers: usize, num_experts: usize) -> Self {
        let model = Model { tokenizer, num_layers, num_experts };
        Recording { model, layers: vec![Rows::new(); num_layers] }
    }

    /// Documents that are recorded.
    pub fn len(&self) -> usize {
        self.layers.first().map_or(0, Rows::len)
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    pub fn contains(&self, document: &[u32]) -> bool {
        self.layers.iter().all(|rows| rows.contains_key(document))
    }

    /// Notes what layer number `layer` of the sparse ones did with a batch.
    pub fn add(&mut self, layer: usize, tokens_n: &[u32], offsets_b1: &[usize], routing: &Routing) {
        for ends in offsets_b1.windows(2) {
            let rows = (ends[0]..ends[1]).map(|t| routing.row(t).to_vec()).collect();
            self.layers[layer].insert(tokens_n[ends[0]..ends[1]].to_vec(), rows);
        }
    }

    /// The policies of the sparse layers, told to route these documents as they were routed.
    pub fn overrule(&self, policies: Vec<Policy>) -> Result<Vec<Policy>, String> {
        let found = (policies.len(), policies.first().map_or(0, Policy::num_experts));
        let recorded = (self.model.num_layers, self.model.num_experts);
        if found != recorded {
            return Err(format!(
                "holds the routing of {} sparse layers of {} experts, not of {} of {}",
                recorded.0, recorded.1, found.0, found.1
            ));
        }
        let layer = |(policy, rows): (Policy, &Rows)| {
            let overruled = Overruled::new(policy, Ruling::Replay(Arc::new(rows.clone())));
            overruled.map(|overruled| Policy::Overruled(Box::new(overruled)))
        };
        let layers: Option<Vec<Policy>> = policies.into_iter().zip(&self.layers).map(layer).collect();
        layers.ok_or_else(|| "cannot be replayed with model.router.kind = \"learned_p\"".into())
    }

    /// Whether the tokens are cut by the tokenizer of this sha256.
    pub fn check_tokenizer(&self, sha256: &str) -> Result<(), String> {
        match self.model.tokenizer == sha256 {
            true => Ok(()),
            false => Err("was recorded with another vocabulary; record the routing of a run on the same data".into()),
        }
    }

    fn bytes(&self) -> Result<Vec<u8>, String> {
        let mut tensors: Vec<(String, Vec<u32>)> = Vec::new();
        let first = self.layers.first().cloned().unwrap_or_default();
        tensors.push(("tokens".into(), first.keys().flatten().copied().collect()));
        tensors.push(("documents".into(), offsets(first.keys().map(Vec::len))?));
        for (layer, rows) in self.layers.iter().enumerate() {
            let tokens = || rows.values().flatten();
            tensors.push((format!("layers.{layer}.rows"), offsets(tokens().map(Vec::len))?));
            tensors.push((format!("layers.{layer}.experts"), tokens().flatten().copied().collect()));
        }
        let data: Vec<Vec<u8>> =
            tensors.iter().map(|(_, numbers)| numbers.iter().flat_map(|x| x.to_le_bytes()).collect()).collect();
        let mut views = Vec::new();
        for (tensor, data) in tensors.iter().zip(&data) {
            let (name, numbers) = tensor;
            let made = TensorView::new(Dtype::U32, vec![numbers.len()], data).map_err(|error| error.to_string())?;
            views.push((name.clone(), made));
        }
        let metadata = HashMap::from([(KEY.to_string(), serde_json::json!(self.model).to_string())]);
        safetensors::serialize(views, Some(metadata)).map_err(|error| error.to_string())
    }

    /// Writes the file whole or not at all; returns what it is.
    pub fn write(&self, path: &Path) -> io::Result<Source> {
        let bytes = self.bytes().map_err(io::Error::other)?;
        replace(&*system(), path, &bytes)?;
        Ok(source(&path.display().to_string(), &bytes))
    }

    /// Reads a file that may come from anybody.
    pub fn read(path: &Path) -> Result<(Self, Source), DataError> {
        let (name, bytes) = (path.display().to_string(), read_bytes(path, MAX_BYTES)?);
        let recording = Self::parse(&bytes).map_err(|reason| DataError::BadRouting { file: name.clone(), reason })?;
        Ok((recording, source(&name, &bytes)))
    }

    fn parse(bytes: &[u8]) -> Result<Self, String> {
        header::check(bytes)?;
        let (_, meta) = SafeTensors::read_metadata(bytes).map_err(|error| error.to_string())?;
        let model = meta.metadata().as_ref().and_then(|entries| entries.get(KEY)).ok_or("it holds no routing")?;
        let model: Model = serde_json::from_str(model).map_err(|error| error.to_string())?;
        let tensors = SafeTensors::deserialize(bytes).map_err(|error| error.to_string())?;
        let numbers = |name: &str| {
            let tensor = tensors.tensor(name).map_err(|_| format!("{name} is missing"))?;
            if tensor.dtype() != Dtype::U32 {
                return Err(format!("{name} is not of u32"));
            }
            let words =
                tensor.data().chunks_exact(4).map(|word| u32::from_le_bytes([word[0], word[1], word[2], word[3]]));
            Ok(words.collect::<Vec<u32>>())
        };
        let tokens = numbers("tokens")?;
        let documents = cut(&numbers("documents")?, tokens.len()).ok_or("documents are no offsets of its tokens")?;
        let names = 2 + 2 * model.num_layers;
        if tensors.len() != names || model.num_layers == 0 {
            return Err(format!("it has {} tensors, not 2 and 2 for each layer", tensors.len()));
        }
        let mut layers = Vec::new();
        for layer in 0..model.num_layers {
            let experts = numbers(&format!("layers.{layer}.experts"))?;
            let rows = cut(&numbers(&format!("layers.{layer}.rows"))?, experts.len());
            let rows = rows.filter(|rows| rows.len() == tokens.len());
            let rows = rows.ok_or_else(|| format!("layers.{layer}.rows are no offsets of its experts"))?;
            if experts.iter().any(|id| *id as usize >= model.num_experts) {
                return Err(format!("layers.{layer}.experts has an id of no expert"));
            }
            let row = |t: usize| experts[rows[t].clone()].to_vec();
            let document =
                |range: &std::ops::Range<usize>| (tokens[range.clone()].to_vec(), range.clone().map(row).collect());
            layers.push(documents.iter().map(document).collect());
        }
        Ok(Recording { model, layers })
    }
}

/// 0 and the sums of the lengths so far.
fn offsets(lengths: impl Iterator<Item = usize>) -> Result<Vec<u32>, String> {
    let mut end = 0usize;
    let ends = lengths.map(|length| {
        end += length;
        u32::try_from(end).map_err(|_| "more than 2^32 tokens or choices cannot be recorded".to_string())
    });
    std::iter::once(Ok(0)).chain(ends).collect()
}

/// The ranges between offsets that rise from 0 to `len`.
fn cut(offsets: &[u32], len: usize) -> Option<Vec<std::ops::Range<usize>>> {
    let whole = offsets.first() == Some(&0) && offsets.last().is_some_and(|end| *end as usize == len);
    (whole && offsets.is_sorted()).then(|| offsets.windows(2).map(|w| w[0] as usize..w[1] as usize).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use moe_router::{Assignments, Config};

    fn recording() -> Recording {
        let mut recording = Recording::new("abc".into(), 2, 4);
        let routing = |rows: &[&[u32]]| {
            let row_offsets_n1 = rows.iter().fold(vec![0], |mut ends, row| {
                ends.push(ends[ends.len() - 1] + row.len());
                ends
            });
            let assignments = Assignments { row_offsets_n1, expert_ids_a: rows.concat(), num_experts: 4 };
            Routing { assignments: Arc::new(assignments), num_ids: 4 }
        };
        recording.add(0, &[5, 6, 1], &[0, 2, 3], &routing(&[&[0, 1], &[], &[3]]));
        recording.add(1, &[5, 6, 1], &[0, 2, 3], &routing(&[&[2], &[1, 0, 3], &[3]]));
        recording
    }

    #[test]
    fn a_file_holds_what_was_recorded_and_the_same_bytes_each_time() {
        let folder = tempfile::tempdir().unwrap();
        let (path, recording) = (folder.path().join("routing.safetensors"), recording());
        let written = recording.write(&path).unwrap();
        let (again, read) = Recording::read(&path).unwrap();
        assert_eq!((&again, &read), (&recording, &written));
        assert_eq!((again.len(), again.contains(&[5, 6]), again.contains(&[5])), (2, true, false));
        assert_eq!(recording.clone().bytes().unwrap(), std::fs::read(&path).unwrap());
        assert!(again.check_tokenizer("abc").is_ok() && again.check_tokenizer("abd").is_err());
    }

    #[test]
    fn damaged_and_foreign_files_are_refused_in_words() {
        let bytes = recording().bytes().unwrap();
        for cut in [0, 7, 40, bytes.len() - 1] {
            assert!(!Recording::parse(&bytes[..cut]).unwrap_err().is_empty(), "{cut}");
        }
        // Every word of the data in turn becomes a number that no offset, id or token can be used as.
        let start = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        let mut refused = 0;
        for place in (start..bytes.len()).step_by(4) {
            let mut spoilt = bytes.clone();
            spoilt[place..place + 4].copy_from_slice(&9u32.to_le_bytes());
            refused += usize::from(Recording::parse(&spoilt).is_err());
        }
        let tokens = 3; // any id may be a token
        assert_eq!(refused, (bytes.len() - start) / 4 - tokens);
        let place = bytes.windows(KEY.len()).position(|part| part == KEY.as_bytes()).unwrap();
        let mut foreign = bytes;
        foreign[place] = b'M';
        assert_eq!(Recording::parse(&foreign).unwrap_err(), "it holds no routing");
    }

    #[test]
    fn it_overrules_the_layers_it_was_recorded_of_and_no_others() {
        let policies = |text: &str, count: usize| {
            let config: Config = serde_json::from_str(text).unwrap();
            (0..count).map(|layer| Policy::new(&config, layer).unwrap()).collect::<Vec<_>>()
        };
        let four = r#"{"kind": "top_k", "num_experts": 4}"#;
        assert_eq!(recording().overrule(policies(four, 2)).unwrap().len(), 2);
        let other = recording().overrule(policies(four, 3)).unwrap_err();
        assert!(other.contains("2 sparse layers of 4 experts, not of 3 of 4"), "{other}");
        let learned = policies(r#"{"kind": "learned_p", "num_experts": 4}"#, 2);
        assert!(recording().overrule(learned).unwrap_err().contains("learned_p"));
    }
}
