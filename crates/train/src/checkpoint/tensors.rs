//! Flat buffers to safetensors and back: Hugging Face names and shapes, no padding, little-endian, names and shapes checked on the way in.

use super::{CheckpointError, header};
use crate::layers::shape;
use crate::optimizers::State;
use crate::untrusted::refuse_pickle;
use safetensors::tensor::{Dtype, Metadata, SafeTensors, TensorInfo};
use std::collections::{BTreeSet, HashMap};
use std::io;
use std::path::Path;
use tensor::{Layout, Param};

/// Names in optimizer.safetensors beside `<moment>.<parameter>`.
pub(super) const EMA: &str = "ema";
const STEPS: &str = "step";
const EXPERT_STEPS: &str = "expert_steps";

/// One tensor to write.
struct Tensor<'a> {
    name: String,
    shape: Vec<usize>,
    data: Data<'a>,
}

enum Data<'a> {
    /// The matrices of a parameter in a flat buffer.
    Flat(&'a [f32], Param),
    Counts(&'a [u64]),
}

impl Tensor<'_> {
    fn dtype(&self) -> Dtype {
        match self.data {
            Data::Flat(..) => Dtype::F32,
            Data::Counts(_) => Dtype::U64,
        }
    }

    /// Bytes of its data.
    fn size(&self) -> usize {
        match self.data {
            Data::Flat(_, param) => 4 * param.count * param.len(),
            Data::Counts(counts) => 8 * counts.len(),
        }
    }

    fn write(&self, sink: &mut Sink<'_>) -> io::Result<()> {
        let mut bytes = Vec::with_capacity(PIECE);
        match self.data {
            Data::Flat(buffer, param) => {
                for piece in (0..param.count).flat_map(|i| buffer[param.range(i)].chunks(PIECE / 4)) {
                    if bytes.len() + 4 * piece.len() > PIECE {
                        sink(&bytes)?;
                        bytes.clear();
                    }
                    bytes.extend(piece.iter().flat_map(|x| x.to_le_bytes()));
                }
            }
            Data::Counts(counts) => bytes.extend(counts.iter().flat_map(|count| count.to_le_bytes())),
        }
        sink(&bytes)
    }
}

/// Where the bytes of a file go, piece by piece.
pub(super) type Sink<'s> = dyn FnMut(&[u8]) -> io::Result<()> + 's;

/// Bytes converted at once.
const PIECE: usize = 1 << 20;

/// A safetensors file that is written piece by piece: a saver needs no second copy of the state.
pub(super) struct Serialised<'a> {
    header: Vec<u8>,
    tensors: Vec<Tensor<'a>>,
}

impl<'a> Serialised<'a> {
    /// In the order of the safetensors crate: largest dtype first, then by name.
    fn new(mut tensors: Vec<Tensor<'a>>) -> io::Result<Self> {
        tensors.sort_by(|a, b| b.dtype().cmp(&a.dtype()).then_with(|| a.name.cmp(&b.name)));
        let mut end = 0;
        let mut infos = Vec::with_capacity(tensors.len());
        for tensor in &tensors {
            let start = end;
            end += tensor.size();
            let info = TensorInfo { dtype: tensor.dtype(), shape: tensor.shape.clone(), data_offsets: (start, end) };
            infos.push((tensor.name.clone(), info));
        }
        let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
        let metadata = Metadata::new(Some(metadata), infos).map_err(io::Error::other)?;
        let mut text = serde_json::to_vec(&metadata)?;
        text.resize(text.len().next_multiple_of(8), b' ');
        let mut header = (text.len() as u64).to_le_bytes().to_vec();
        header.append(&mut text);
        Ok(Self { header, tensors })
    }

    /// Bytes of the whole file.
    pub(super) fn size(&self) -> u64 {
        (self.header.len() + self.tensors.iter().map(Tensor::size).sum::<usize>()) as u64
    }

    pub(super) fn write(&self, sink: &mut Sink<'_>) -> io::Result<()> {
        sink(&self.header)?;
        self.tensors.iter().try_for_each(|tensor| tensor.write(sink))
    }
}

fn flat<'a>(layout: &'a Layout, prefix: &str, buffer: &'a [f32]) -> impl Iterator<Item = Tensor<'a>> {
    layout.iter().map(move |(name, param)| Tensor {
        name: format!("{prefix}{name}"),
        shape: shape(name, param),
        data: Data::Flat(buffer, param),
    })
}

/// model.safetensors: the parameters by name.
pub(super) fn model<'a>(layout: &'a Layout, params: &'a [f32]) -> io::Result<Serialised<'a>> {
    Serialised::new(flat(layout, "", params).collect())
}

/// optimizer.safetensors: `<moment>.<parameter>`, `ema.<parameter>` where the run keeps a running mean, `step` [1] and `expert_steps.<parameter>` [experts].
pub(super) fn optimizer<'a>(
    layout: &'a Layout,
    state: &'a State,
    ema: Option<&'a [f32]>,
) -> io::Result<Serialised<'a>> {
    let counts =
        |name: String, counts: &'a [u64]| Tensor { name, shape: vec![counts.len()], data: Data::Counts(counts) };
    let mut tensors = vec![counts(STEPS.to_owned(), std::slice::from_ref(&state.steps))];
    tensors.extend(state.expert_steps.iter().map(|(name, steps)| counts(format!("{EXPERT_STEPS}.{name}"), steps)));
    for (name, moment) in &state.moments {
        tensors.extend(flat(layout, &format!("{name}."), moment));
    }
    if let Some(ema) = ema {
        tensors.extend(flat(layout, &format!("{EMA}."), ema));
    }
    Serialised::new(tensors)
}

/// The flat parameter buffer in the bytes of a model.safetensors; `file` is named in errors.
pub(super) fn read_params(file: &Path, bytes: &[u8], layout: &Layout) -> Result<Vec<f32>, CheckpointError> {
    let tensors = Tensors::open(file, bytes)?;
    tensors.refuse_others(|name| layout.get(name).is_some())?;
    tensors.flat("", layout, &[Dtype::F32], |x| x as f32)
}

/// The flat parameter buffer in the safetensors file at `path`, of f32 or f64, wherever it comes from: names and shapes must be those of
/// `layout`. Padding is zero.
pub fn read_weights(path: &Path, layout: &Layout) -> Result<Vec<f64>, CheckpointError> {
    let foreign = |reason| CheckpointError::Foreign { file: path.to_owned(), reason };
    refuse_pickle(path, b"").map_err(foreign)?;
    let bytes = super::read::read_plain(&crate::files::System, path, u64::MAX)?;
    refuse_pickle(path, &bytes).map_err(foreign)?;
    weights(path, &bytes, layout)
}

/// As [`read_weights`] from the bytes of a file called `path`.
pub fn weights(path: &Path, bytes: &[u8], layout: &Layout) -> Result<Vec<f64>, CheckpointError> {
    let tensors = Tensors::open(path, bytes)?;
    tensors.refuse_others(|name| layout.get(name).is_some())?;
    tensors.flat("", layout, &[Dtype::F32, Dtype::F64], |x| x)
}

/// The optimizer state and the running mean of the parameters in the bytes of an optimizer.safetensors.
pub(super) fn read_optimizer(
    file: &Path,
    bytes: &[u8],
    layout: &Layout,
) -> Result<(State, Option<Vec<f32>>), CheckpointError> {
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
    let buffer = |name: &str| tensors.flat(&format!("{name}."), layout, &[Dtype::F32], |x| x as f32);
    let ema = moments.remove(EMA).then(|| buffer(EMA)).transpose()?;
    let moments = moments.into_iter().map(|name| Ok((name.clone(), buffer(&name)?)));
    Ok((State { steps, expert_steps, moments: moments.collect::<Result<_, CheckpointError>>()? }, ema))
}

/// A parsed safetensors file.
struct Tensors<'a> {
    file: &'a Path,
    tensors: SafeTensors<'a>,
}

impl<'a> Tensors<'a> {
    fn open(file: &'a Path, bytes: &'a [u8]) -> Result<Self, CheckpointError> {
        let damaged = |reason: String| CheckpointError::Damaged { file: file.to_owned(), reason };
        header::check(bytes).map_err(damaged)?;
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
        // All tensors are found before memory is asked for: then the file itself is as large as the buffer.
        let find = |(name, param)| Ok((param, self.tensor(&format!("{prefix}{name}"), &shape(name, param), dtypes)?));
        let found = layout.iter().map(find).collect::<Result<Vec<_>, CheckpointError>>()?;
        let mut buffer = vec![T::default(); layout.len()];
        for (param, (dtype, data)) in found {
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
