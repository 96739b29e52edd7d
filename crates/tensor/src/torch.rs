//! libtorch, behind the feature `torch`: versions and devices, a flat buffer as parameters and gradients, and one graph with its leaves. Only the
//! fallible (`f_`) forms of tch are called: the plain ones panic.

use crate::Param;
use crate::engine::EngineError;
use std::path::PathBuf;
pub use tch::{Device, Kind, TchError as Error, Tensor};

pub type Result<T> = std::result::Result<T, Error>;

/// The only release of torch whose ABI this build was compiled for.
pub const VERSION: &str = "2.11.0";

/// The release of the libtorch in this process, such as "2.11.0+cu130": from the version.py beside the library; none if the library does not
/// lie in an installed torch.
pub fn loaded_version() -> Option<String> {
    let maps = std::fs::read_to_string("/proc/self/maps").ok()?;
    let library = maps
        .lines()
        .find_map(|line| line.find('/').map(|at| &line[at..]).filter(|p| p.ends_with("/libtorch_cpu.so")))?;
    let text = std::fs::read_to_string(PathBuf::from(library).parent()?.parent()?.join("version.py")).ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("__version__ = "))?;
    Some(line.trim_matches(['\'', '"']).to_owned())
}

/// The device called `name`, if the torch in this process can compute there: "cpu", "cuda" (the first one) or "cuda:N".
pub fn device(name: &str) -> std::result::Result<Device, EngineError> {
    let wrong = |key, message: String| Err(EngineError { key, message });
    match loaded_version() {
        Some(found) if found.split('+').next() != Some(VERSION) => {
            return wrong(
                "engine",
                format!("\"torch\" of this build needs torch {VERSION} but found {found}; install torch=={VERSION}"),
            );
        }
        _ => {}
    }
    let index = match name {
        "cpu" => return Ok(Device::Cpu),
        "cuda" => Some(0),
        _ => name.strip_prefix("cuda:").and_then(|index| index.parse::<usize>().ok()),
    };
    let count = usize::try_from(tch::Cuda::device_count()).unwrap_or(0);
    match index {
        None => wrong("device", "must be \"cpu\", \"cuda\" or \"cuda:N\"".into()),
        Some(_) if count == 0 => wrong(
            "device",
            "torch finds no CUDA device here; use device = \"cpu\", or check the driver with nvidia-smi".into(),
        ),
        Some(index) if index >= count => {
            wrong("device", format!("there are {count} CUDA devices here, cuda:0 to cuda:{}", count - 1))
        }
        Some(index) => Ok(Device::Cuda(index)),
    }
}

/// One line about libtorch and where it can compute, for people.
pub fn describe() -> String {
    let version = loaded_version().unwrap_or_else(|| format!("{VERSION} (not from an installed package)"));
    let devices = match tch::Cuda::device_count() {
        count if count > 0 => format!("cpu and {count} CUDA device(s)"),
        _ => "cpu".to_owned(),
    };
    format!("torch {version} on {devices}")
}

/// How many threads libtorch takes for calls from this thread.
pub fn set_threads(threads: usize) {
    let threads = if threads == 0 { std::thread::available_parallelism().map_or(1, usize::from) } else { threads };
    if tch::get_num_threads() != threads as i32 {
        tch::set_num_threads(threads as i32);
    }
}

/// The first line of an error, without the C++ trace that follows it.
pub fn first_line(error: &Error) -> String {
    let text = error.to_string();
    let line = text.lines().next().unwrap_or_default();
    line.strip_prefix("Internal torch error: ").unwrap_or(line).to_owned()
}

/// Whether an error means that the device (or the machine) has no memory left.
pub fn is_out_of_memory(error: &Error) -> bool {
    let text = error.to_string();
    ["out of memory", "can't allocate memory", "bad_alloc", "CUBLAS_STATUS_ALLOC_FAILED"]
        .iter()
        .any(|sign| text.contains(sign))
}

/// The flat parameter buffer and its gradient on a device, both of `kind` (f32; f64 to check formulas), and the bf16 copy that products read.
pub struct Flat {
    pub values: Tensor,
    pub grads: Tensor,
    /// Present where products multiply in bf16.
    half: Option<Tensor>,
    pub kind: Kind,
    pub device: Device,
}

impl Flat {
    pub fn new<T: tch::kind::Element>(numbers: &[T], device: Device, bf16: bool) -> Result<Self> {
        let values = Tensor::f_from_slice(numbers)?.f_to_device(device)?;
        let kind = values.f_kind()?;
        let half = if bf16 { Some(values.f_to_kind(Kind::BFloat16)?) } else { None };
        Ok(Flat { grads: values.f_zeros_like()?, values, half, kind, device })
    }

    /// Makes the bf16 copy that of the present values; once a step.
    pub fn refresh(&mut self) -> Result<()> {
        match &mut self.half {
            Some(half) => half.f_copy_(&self.values),
            None => Ok(()),
        }
    }

    /// The type of products.
    pub fn product(&self) -> Kind {
        if self.half.is_some() { Kind::BFloat16 } else { self.kind }
    }

    /// What products read: the bf16 copy, or the values.
    pub fn products(&self) -> &Tensor {
        self.half.as_ref().unwrap_or(&self.values)
    }

    /// The matrices of a parameter in a buffer of the layout, [count, rows, width], without a copy.
    pub fn matrices(buffer: &Tensor, p: &Param) -> Result<Tensor> {
        let [count, rows, width, stride] = [p.count, p.rows, p.width, p.stride].map(|x| x as i64);
        buffer.f_as_strided([count, rows, width], [stride, width, 1], p.offset as i64)
    }

    /// The only matrix of a parameter in a buffer, [rows, width].
    pub fn matrix(buffer: &Tensor, p: &Param) -> Result<Tensor> {
        buffer.f_as_strided([p.rows as i64, p.width as i64], [p.width as i64, 1], p.offset as i64)
    }
}

/// The leaves of one libtorch graph, and its backward. Gradients of parameters are added to the flat gradient.
pub struct Graph<'f> {
    flat: &'f Flat,
    leaves: Vec<(Param, Tensor)>,
}

impl<'f> Graph<'f> {
    pub fn new(flat: &'f Flat) -> Self {
        Graph { flat, leaves: Vec::new() }
    }

    pub fn flat(&self) -> &'f Flat {
        self.flat
    }

    /// A parameter in the type of products, [count, rows, width].
    pub fn product(&mut self, p: Param) -> Result<Tensor> {
        self.leaf(self.flat.products(), p)
    }

    /// A parameter as it is kept, [count, rows, width].
    pub fn exact(&mut self, p: Param) -> Result<Tensor> {
        self.leaf(&self.flat.values, p)
    }

    fn leaf(&mut self, buffer: &Tensor, p: Param) -> Result<Tensor> {
        let leaf = Flat::matrices(buffer, &p)?.f_detach()?;
        if !p.trainable {
            return Ok(leaf);
        }
        let leaf = leaf.f_set_requires_grad(true)?;
        self.leaves.push((p, leaf.shallow_clone()));
        Ok(leaf)
    }

    /// y = x Wᵀ in the type of products.
    pub fn linear(&mut self, x: &Tensor, weight: Param) -> Result<Tensor> {
        let w = self.product(weight)?.f_squeeze_dim(0)?;
        x.f_to_kind(self.flat.product())?.f_matmul(&w.f_transpose(0, 1)?)
    }

    /// y = x Wᵀ in the type of the parameters: for scores, on which decisions hang.
    pub fn exact_linear(&mut self, x: &Tensor, weight: Param) -> Result<Tensor> {
        let w = self.exact(weight)?.f_squeeze_dim(0)?;
        x.f_matmul(&w.f_transpose(0, 1)?)
    }

    /// y = g∘x / √(mean x² + ε).
    pub fn rms_norm(&mut self, x: &Tensor, gain: Param, epsilon: f64) -> Result<Tensor> {
        let gain = self.exact(gain)?.f_reshape([gain.width as i64])?;
        x.f_rms_norm(gain.size(), Some(&gain), epsilon)
    }

    /// Differentiates Σ (y·g).sum() + Σ scalars: adds the gradients of the parameters to the flat gradient, returns those of `watched` (zeros where
    /// one was not used). The graph is freed.
    pub fn backward(
        self,
        seeds: &[(&Tensor, &Tensor)],
        scalars: &[Tensor],
        watched: &[&Tensor],
    ) -> Result<Vec<Tensor>> {
        let mut losses = Vec::new();
        for (y, g) in seeds {
            losses.push(y.f_mul(&g.f_to_kind(y.f_kind()?)?)?.f_sum(y.f_kind()?)?);
        }
        losses.extend(scalars.iter().map(Tensor::shallow_clone));
        let losses: Vec<Tensor> = losses.into_iter().filter(Tensor::requires_grad).collect();
        let inputs: Vec<&Tensor> = watched.iter().copied().chain(self.leaves.iter().map(|(_, leaf)| leaf)).collect();
        let mut found = Tensor::f_run_backward(&losses, &inputs, false, false)?;
        for ((p, _), gradient) in self.leaves.iter().zip(found.split_off(watched.len())) {
            if gradient.defined() {
                let _ = Flat::matrices(&self.flat.grads, p)?.f_add_(&gradient)?;
            }
        }
        let zeros =
            |(gradient, of): (Tensor, &&Tensor)| if gradient.defined() { Ok(gradient) } else { of.f_zeros_like() };
        found.into_iter().zip(watched).map(zeros).collect()
    }
}

/// A copy of `x` outside of any graph that collects a gradient of its own.
pub fn leaf(x: &Tensor) -> Result<Tensor> {
    x.f_detach()?.f_set_requires_grad(true)
}

/// A tensor's numbers on the host, row after row.
pub fn to_vec<T: tch::kind::Element + Copy + Default>(x: &Tensor) -> Result<Vec<T>> {
    let x = x.f_to_device(Device::Cpu)?.f_contiguous()?;
    let mut numbers = vec![T::default(); x.numel()];
    let count = numbers.len();
    x.f_copy_data(&mut numbers, count)?;
    Ok(numbers)
}

/// Whole numbers as a tensor of i64 on a device.
pub fn integers(numbers: impl IntoIterator<Item = i64>, device: Device) -> Result<Tensor> {
    Tensor::f_from_slice(&numbers.into_iter().collect::<Vec<i64>>())?.f_to_device(device)
}
