//! `Trainer`: an iterator of metric rows.

use crate::convert::{Home, enter, to_dict};
use crate::run::Run;
use pyo3::prelude::*;
use pyo3::types::PyDict;
use serde_json::json;
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};

#[pyclass(frozen, module = "moe_lab")]
pub struct Trainer {
    inner: Mutex<train::Trainer>,
    home: Home,
}

impl Trainer {
    /// Taken inside `enter`, never while holding the GIL, so that two Python threads cannot wait for each other.
    fn lock(&self) -> MutexGuard<'_, train::Trainer> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn read<R: Send>(&self, py: Python<'_>, get: impl FnOnce(&train::Trainer) -> R + Send) -> PyResult<R> {
        self.home.check()?;
        Ok(py.detach(|| get(&self.lock())))
    }
}

#[pymethods]
impl Trainer {
    #[new]
    #[pyo3(signature = (run, out=None, parent=None))]
    fn new(py: Python<'_>, run: PyRef<'_, Run>, out: Option<String>, parent: Option<String>) -> PyResult<Self> {
        let inner = run.inner.clone();
        drop(run);
        let trainer = enter(py, move || train::Trainer::new(inner, out.as_deref().map(Path::new), parent))?;
        Ok(Trainer { inner: Mutex::new(trainer), home: Home::here() })
    }

    #[staticmethod]
    #[pyo3(signature = (out, place=None))]
    fn resume(py: Python<'_>, out: String, place: Option<BTreeMap<String, String>>) -> PyResult<Self> {
        let place: Vec<_> = place.unwrap_or_default().into_iter().map(|(key, value)| (key, json!(value))).collect();
        let trainer = enter(py, move || train::Trainer::resume_moved(Path::new(&out), &place))?;
        Ok(Trainer { inner: Mutex::new(trainer), home: Home::here() })
    }

    fn __iter__(slf: PyRef<'_, Self>) -> PyRef<'_, Self> {
        slf
    }

    fn __next__<'py>(&self, py: Python<'py>) -> PyResult<Option<Bound<'py, PyDict>>> {
        self.home.check()?;
        let row = enter(py, || self.lock().next_row())?;
        row.map(|row| to_dict(py, row.fields())).transpose()
    }

    fn stop(&self, py: Python<'_>) -> PyResult<()> {
        self.home.check()?;
        enter(py, || self.lock().stop("asked to stop"))
    }

    /// Saves at this update boundary and goes on; the checkpoint is written beside the training.
    fn save(&self, py: Python<'_>) -> PyResult<()> {
        self.home.check()?;
        enter(py, || self.lock().save_soon())
    }

    #[getter]
    fn out(&self, py: Python<'_>) -> PyResult<String> {
        self.read(py, |trainer| trainer.out().display().to_string())
    }

    #[getter]
    fn id(&self, py: Python<'_>) -> PyResult<String> {
        self.read(py, |trainer| trainer.id().to_string())
    }

    #[getter]
    fn done(&self, py: Python<'_>) -> PyResult<bool> {
        self.read(py, train::Trainer::done)
    }

    #[getter]
    fn total_steps(&self, py: Python<'_>) -> PyResult<u64> {
        self.read(py, train::Trainer::total_steps)
    }

    #[getter]
    fn step(&self, py: Python<'_>) -> PyResult<u64> {
        self.read(py, train::Trainer::step_count)
    }

    #[getter]
    fn notes(&self, py: Python<'_>) -> PyResult<Vec<String>> {
        self.read(py, |trainer| trainer.notes().to_vec())
    }
}
