//! Flat buffers to safetensors and back: Hugging Face names and shapes, no padding, little-endian, names and shapes checked on the way in.

use super::CheckpointError;
use crate::layers::shape;
use crate::optimizers::State;
use safetensors::tensor::{Dtype, SafeTensors, View};
use serde::de::{self, Deserialize, Deserializer, IgnoredAny, MapAccess, Visitor};
use std::borrow::Cow;
use std::collections::{BTreeSet, HashMap};
use std::path::Path;
use tensor::{Layout, Param};

/// Bounds on what a header may hold before a library sees it.
const MAX_HEADER: u64 = 16 << 20;
const MAX_TENSORS: usize = 100_000;

/// Names in optimizer.safetensors beside `<moment>.<parameter>`.
const STEPS: &str = "step";
const EXPERT_STEPS: &str = "expert_steps";

/// One tensor to write; its bytes are made when the file is put together.
struct Tensor<'a> {
    shape: Vec<usize>,
    data: Data<'a>,
}

enum Data<'a> {
    /// The matrices of a parameter in a flat buffer.
    Flat(&'a [f32], Param),
    Counts(Vec<u64>),
}

impl View for Tensor<'_> {
    fn dtype(&self) -> Dtype {
        match self.data {
            Data::Flat(..) => Dtype::F32,
            Data::Counts(_) => Dtype::U64,
        }
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        let mut bytes = Vec::with_capacity(self.data_len());
        match &self.data {
            Data::Flat(buffer, param) => (0..param.count)
                .for_each(|i| buffer[param.range(i)].iter().for_each(|x| bytes.extend_from_slice(&x.to_le_bytes()))),
            Data::Counts(counts) => counts.iter().for_each(|count| bytes.extend_from_slice(&count.to_le_bytes())),
        }
        bytes.into()
    }

    fn data_len(&self) -> usize {
        match &self.data {
            Data::Flat(_, param) => 4 * param.count * param.len(),
            Data::Counts(counts) => 8 * counts.len(),
        }
    }
}

fn flat<'a>(layout: &'a Layout, prefix: &str, buffer: &'a [f32]) -> impl Iterator<Item = (String, Tensor<'a>)> {
    layout.iter().map(move |(name, param)| {
        (format!("{prefix}{name}"), Tensor { shape: shape(name, param), data: Data::Flat(buffer, param) })
    })
}

fn serialise(tensors: Vec<(String, Tensor<'_>)>) -> std::io::Result<Vec<u8>> {
    let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    safetensors::serialize(tensors, Some(metadata)).map_err(std::io::Error::other)
}

/// model.safetensors: the parameters by name.
pub(super) fn model_bytes(layout: &Layout, params: &[f32]) -> std::io::Result<Vec<u8>> {
    serialise(flat(layout, "", params).collect())
}

/// optimizer.safetensors: `<moment>.<parameter>`, `step` [1] and `expert_steps.<parameter>` [experts].
pub(super) fn optimizer_bytes(layout: &Layout, state: &State) -> std::io::Result<Vec<u8>> {
    let counts = |counts: Vec<u64>| Tensor { shape: vec![counts.len()], data: Data::Counts(counts) };
    let mut tensors = vec![(STEPS.to_owned(), counts(vec![state.steps]))];
    tensors.extend(
        state.expert_steps.iter().map(|(name, steps)| (format!("{EXPERT_STEPS}.{name}"), counts(steps.clone()))),
    );
    for (name, moment) in &state.moments {
        tensors.extend(flat(layout, &format!("{name}."), moment));
    }
    serialise(tensors)
}

/// The flat parameter buffer in the bytes of a model.safetensors; `file` is named in errors.
pub(super) fn params(file: &Path, bytes: &[u8], layout: &Layout) -> Result<Vec<f32>, CheckpointError> {
    let tensors = Tensors::open(file, bytes)?;
    tensors.refuse_others(|name| layout.get(name).is_some())?;
    tensors.flat("", layout, &[Dtype::F32], |x| x as f32)
}

/// The flat parameter buffer in the safetensors file at `path`, of f32 or f64, wherever it comes from: names and shapes must be those of
/// `layout`. Padding is zero.
pub fn read_weights(path: &Path, layout: &Layout) -> Result<Vec<f64>, CheckpointError> {
    let bytes = super::read_plain(path, u64::MAX)?;
    let tensors = Tensors::open(path, &bytes)?;
    tensors.refuse_others(|name| layout.get(name).is_some())?;
    tensors.flat("", layout, &[Dtype::F32, Dtype::F64], |x| x)
}

/// The optimizer state in the bytes of an optimizer.safetensors.
pub(super) fn optimizer(file: &Path, bytes: &[u8], layout: &Layout) -> Result<State, CheckpointError> {
    let tensors = Tensors::open(file, bytes)?;
    let stacked = |name: &str| layout.get(name).is_some_and(|param| param.count > 1);
    let mut moments = BTreeSet::new();
    tensors.refuse_others(|name| match name.split_once('.') {
        None => name == STEPS,
        Some((EXPERT_STEPS, param)) => stacked(param),
        Some((moment, param)) => {
            moments.insert(moment.to_owned());
            layout.get(param).is_some()
        }
    })?;
    let steps = tensors.counts(STEPS, 1)?[0];
    let expert_steps = layout
        .iter()
        .filter(|(_, param)| param.count > 1)
        .map(|(name, param)| Ok((name.to_owned(), tensors.counts(&format!("{EXPERT_STEPS}.{name}"), param.count)?)))
        .collect::<Result<_, CheckpointError>>()?;
    let moments = moments
        .into_iter()
        .map(|moment| Ok((moment.clone(), tensors.flat(&format!("{moment}."), layout, &[Dtype::F32], |x| x as f32)?)))
        .collect::<Result<_, CheckpointError>>()?;
    Ok(State { steps, expert_steps, moments })
}

/// A parsed safetensors file.
struct Tensors<'a> {
    file: &'a Path,
    tensors: SafeTensors<'a>,
}

impl<'a> Tensors<'a> {
    fn open(file: &'a Path, bytes: &'a [u8]) -> Result<Self, CheckpointError> {
        let damaged = |reason: String| CheckpointError::Damaged { file: file.to_owned(), reason };
        check_header(bytes).map_err(damaged)?;
        let tensors =
            SafeTensors::deserialize(bytes).map_err(|error| damaged(format!("no safetensors file: {error}")))?;
        Ok(Self { file, tensors })
    }

    fn foreign(&self, reason: String) -> CheckpointError {
        CheckpointError::Foreign {
            file: self.file.to_owned(),
            reason: format!("checkpoint of another model: {reason}; use the run file that it was trained with"),
        }
    }

    fn refuse_others(&self, mut known: impl FnMut(&str) -> bool) -> Result<(), CheckpointError> {
        let names: BTreeSet<&str> = self.tensors.names().into_iter().collect(); // sorted: the same name is reported every time
        match names.into_iter().find(|name| !known(name)) {
            Some(name) => Err(self.foreign(format!("it holds {name:?}, which the run does not have"))),
            None => Ok(()),
        }
    }

    /// The bytes of a tensor, whose shape and dtype must be those asked for.
    fn tensor(&self, name: &str, shape: &[usize], dtypes: &[Dtype]) -> Result<(Dtype, &'a [u8]), CheckpointError> {
        let Ok(tensor) = self.tensors.tensor(name) else {
            return Err(self.foreign(format!("{name} is missing")));
        };
        if tensor.shape() != shape {
            return Err(self.foreign(format!("{name} has shape {:?} but the run needs {shape:?}", tensor.shape())));
        }
        if !dtypes.contains(&tensor.dtype()) {
            return Err(self.foreign(format!(
                "{name} has dtype {:?} but the run needs {:?}",
                tensor.dtype(),
                dtypes[0]
            )));
        }
        Ok((tensor.dtype(), tensor.data()))
    }

    fn counts(&self, name: &str, len: usize) -> Result<Vec<u64>, CheckpointError> {
        let (_, data) = self.tensor(name, &[len], &[Dtype::U64])?;
        Ok(data.as_chunks::<8>().0.iter().map(|bytes| u64::from_le_bytes(*bytes)).collect())
    }

    /// A flat buffer from the tensors `<prefix><parameter>`.
    fn flat<T: Copy + Default>(
        &self,
        prefix: &str,
        layout: &Layout,
        dtypes: &[Dtype],
        from: impl Fn(f64) -> T,
    ) -> Result<Vec<T>, CheckpointError> {
        let mut buffer = vec![T::default(); layout.len()];
        for (name, param) in layout.iter() {
            let (dtype, data) = self.tensor(&format!("{prefix}{name}"), &shape(name, param), dtypes)?;
            let places = (0..param.count).flat_map(|i| param.range(i));
            if dtype == Dtype::F64 {
                let numbers = data.as_chunks::<8>().0.iter().map(|bytes| f64::from_le_bytes(*bytes));
                places.zip(numbers).for_each(|(place, x)| buffer[place] = from(x));
            } else {
                let numbers = data.as_chunks::<4>().0.iter().map(|bytes| f64::from(f32::from_le_bytes(*bytes)));
                places.zip(numbers).for_each(|(place, x)| buffer[place] = from(x));
            }
        }
        Ok(buffer)
    }
}

/// Length, number of names and uniqueness of names, which the safetensors crate leaves unchecked or checks loosely.
fn check_header(bytes: &[u8]) -> Result<(), String> {
    let (length, rest) = bytes.split_first_chunk::<8>().ok_or("shorter than a safetensors header")?;
    let length = u64::from_le_bytes(*length);
    if length > MAX_HEADER {
        return Err(format!("a header of {length} bytes; {MAX_HEADER} are the most"));
    }
    let header = rest.get(..length as usize).ok_or("the header is longer than the file")?;
    serde_json::from_slice::<Names>(header).map(|_| ()).map_err(|error| format!("bad header: {error}"))
}

/// The keys of the header, each of which may occur once.
struct Names;

impl<'de> Deserialize<'de> for Names {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Keys;
        impl<'de> Visitor<'de> for Keys {
            type Value = Names;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("an object of tensors")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Names, A::Error> {
                let mut names = BTreeSet::new();
                while let Some((name, _)) = map.next_entry::<String, IgnoredAny>()? {
                    if names.len() == MAX_TENSORS {
                        return Err(de::Error::custom(format!("more than {MAX_TENSORS} tensors")));
                    }
                    if let Some(name) = names.replace(name) {
                        return Err(de::Error::custom(format!("two tensors are called {name:?}")));
                    }
                }
                Ok(Names)
            }
        }
        deserializer.deserialize_map(Keys)
    }
}
