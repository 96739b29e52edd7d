//! `Model`: a trained model out of a run directory; and the loss and every gradient of given documents, for oracles and notebooks.

use crate::convert::{Home, enter, to_dict};
use numpy::{PyArray1, PyArrayMethods, ToPyArray};
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyList};
use std::path::Path;
use train::trained::Trained;

#[pyclass(frozen, module = "moe_lab")]
pub struct Model {
    inner: Trained,
    home: Home,
}

/// A flat row-major array as a numpy array of `shape`.
fn array<'py, T: numpy::Element>(py: Python<'py>, data: &[T], shape: &[usize]) -> PyResult<Bound<'py, PyAny>> {
    let flat: Bound<'py, PyArray1<T>> = data.to_pyarray(py);
    Ok(flat.reshape(shape.to_vec())?.into_any())
}

#[pymethods]
impl Model {
    #[staticmethod]
    #[pyo3(signature = (path, checkpoint=None))]
    fn load(py: Python<'_>, path: String, checkpoint: Option<String>) -> PyResult<Model> {
        let inner = enter(py, move || Trained::load(Path::new(&path), checkpoint.as_deref()))?;
        Ok(Model { inner, home: Home::here() })
    }

    #[pyo3(signature = (prompt, max_tokens=80, temperature=0.0, top_p=1.0, top_k=0, seed=0, cache=true))]
    #[allow(clippy::too_many_arguments)] // the sampling options a Python caller names
    fn generate(
        &self,
        py: Python<'_>,
        prompt: String,
        max_tokens: usize,
        temperature: f64,
        top_p: f64,
        top_k: usize,
        seed: u64,
        cache: bool,
    ) -> PyResult<String> {
        let sampling = train::trained::Sampling { temperature, top_p, top_k, seed };
        self.home.check()?;
        enter(py, || self.inner.generate(&prompt, max_tokens, sampling, cache))
    }

    /// Logits [n, v] of a text.
    fn logits<'py>(&self, py: Python<'py>, text: String) -> PyResult<Bound<'py, PyAny>> {
        self.home.check()?;
        let logits = enter(py, || self.inner.logits(&text))?;
        let v = self.inner.vocab_size();
        array(py, &logits, &[logits.len() / v, v])
    }

    /// Which experts every token of a text goes to, by layer.
    fn route<'py>(&self, py: Python<'py>, text: String) -> PyResult<Bound<'py, PyDict>> {
        self.home.check()?;
        let routed = enter(py, || self.inner.route(&text))?;
        let layers = PyList::empty(py);
        for layer in &routed.layers {
            let entry = PyDict::new(py);
            entry.set_item("layer", layer.layer)?;
            entry.set_item("experts", &layer.experts)?;
            entry.set_item("weights", &layer.weights)?;
            entry.set_item(
                "probabilities",
                array(py, &layer.probabilities_ne, &[layer.experts.len(), layer.num_experts])?,
            )?;
            layers.append(entry)?;
        }
        let result = PyDict::new(py);
        result.set_item("tokens", &routed.tokens)?;
        result.set_item("layers", layers)?;
        Ok(result)
    }

    /// Phase, part (train, validation, paraphrases) and text of every document of the run's data.
    fn documents(&self, py: Python<'_>) -> PyResult<Vec<(&'static str, &'static str, String)>> {
        self.home.check()?;
        enter(py, || self.inner.documents())
    }

    /// The loss of every token of each text after its first; with `keep` under these experts of each sparse layer alone.
    #[pyo3(signature = (texts, keep=None))]
    fn token_losses<'py>(
        &self,
        py: Python<'py>,
        texts: Vec<String>,
        keep: Option<Vec<Vec<usize>>>,
    ) -> PyResult<Vec<Bound<'py, PyAny>>> {
        self.home.check()?;
        let losses = enter(py, || self.inner.token_losses(&texts, keep.as_deref()))?;
        losses.iter().map(|losses| array(py, losses, &[losses.len()])).collect()
    }

    /// The evaluation suite on the data of the run; its routing into the file `record`, or as the file `replay` says.
    #[pyo3(signature = (record=None, replay=None))]
    fn evaluate<'py>(
        &self,
        py: Python<'py>,
        record: Option<std::path::PathBuf>,
        replay: Option<std::path::PathBuf>,
    ) -> PyResult<Bound<'py, PyDict>> {
        self.home.check()?;
        let results = enter(py, || self.inner.evaluate(record.as_deref(), replay.as_deref()))?;
        to_dict(py, &results)
    }

    #[getter]
    fn vocab_size(&self) -> usize {
        self.inner.vocab_size()
    }

    #[getter]
    fn num_parameters(&self) -> usize {
        self.inner.num_parameters()
    }
}

/// Loss and gradients of documents (token ids) under a run file's model, from given weights or a fresh initialisation.
#[pyfunction]
#[pyo3(signature = (config_toml, weights_path, documents, vocab_size, engine, dtype))]
pub fn loss_and_gradients<'py>(
    py: Python<'py>,
    config_toml: String,
    weights_path: Option<String>,
    documents: Vec<Vec<u32>>,
    vocab_size: usize,
    engine: String,
    dtype: String,
) -> PyResult<Bound<'py, PyDict>> {
    let found = enter(py, move || {
        let weights = weights_path.as_deref().map(Path::new);
        train::inspect::loss_and_gradients(&config_toml, weights, &documents, vocab_size, &engine, &dtype)
    })?;
    let result = PyDict::new(py);
    let tensors = |list: &[train::inspect::Named]| -> PyResult<Bound<'py, PyDict>> {
        let dict = PyDict::new(py);
        for tensor in list {
            dict.set_item(&tensor.name, array(py, &tensor.data, &tensor.shape)?)?;
        }
        Ok(dict)
    };
    result.set_item("weights", tensors(&found.weights)?)?;
    result.set_item("gradients", tensors(&found.gradients)?)?;
    result
        .set_item("logits", array(py, &found.logits_nv, &[found.logits_nv.len() / vocab_size.max(1), vocab_size])?)?;
    result.set_item("cross_entropy", found.cross_entropy)?;
    result.set_item("total", found.total)?;
    let losses = PyDict::new(py);
    for (name, value) in &found.losses {
        losses.set_item(name, value)?;
    }
    result.set_item("losses", losses)?;
    result.set_item("experts", &found.experts)?;
    Ok(result)
}
