//! `Run`: a validated run configuration.

use crate::convert::{enter, to_dict, to_json};
use pyo3::prelude::*;
use pyo3::types::PyDict;
use train::TrainError;

#[pyclass(frozen, module = "moe_lab")]
pub struct Run {
    pub inner: train::run::Run,
}

/// Overrides as the `key=value` of the command line, values in TOML.
fn sets(overrides: Option<&Bound<'_, PyDict>>) -> PyResult<Vec<(String, serde_json::Value)>> {
    let Some(overrides) = overrides else { return Ok(Vec::new()) };
    overrides.iter().map(|(key, value)| Ok((key.extract()?, to_json(&value)?))).collect()
}

#[pymethods]
impl Run {
    #[staticmethod]
    #[pyo3(signature = (source, overrides=None))]
    fn load(py: Python<'_>, source: String, overrides: Option<&Bound<'_, PyDict>>) -> PyResult<Run> {
        let sets = sets(overrides)?;
        enter(py, move || train::run::Run::load_with(&source, &sets).map_err(usage)).map(|inner| Run { inner })
    }

    #[staticmethod]
    #[pyo3(signature = (text, overrides=None))]
    fn parse(py: Python<'_>, text: String, overrides: Option<&Bound<'_, PyDict>>) -> PyResult<Run> {
        let sets = sets(overrides)?;
        enter(py, move || train::run::Run::parse_with(&text, &sets).map_err(usage)).map(|inner| Run { inner })
    }

    fn to_toml(&self) -> String {
        self.inner.to_toml()
    }

    fn diff(&self, other: &Run) -> Vec<(String, String, String)> {
        let changes = train::run::Run::diff(&self.inner, &other.inner);
        changes.into_iter().map(|change| (change.key, change.a, change.b)).collect()
    }

    fn quick(&self) -> Run {
        let mut inner = self.inner.clone();
        inner.quick();
        Run { inner }
    }

    fn check<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let plan = enter(py, || train::trainer::plan(&self.inner))?;
        to_dict(py, &plan)
    }

    #[getter]
    fn name(&self) -> &str {
        &self.inner.name
    }

    #[getter]
    fn seed(&self) -> u64 {
        self.inner.seed
    }
}

fn usage(error: impl std::fmt::Display) -> TrainError {
    TrainError::Usage(error.to_string())
}
