//! moe_lab._native: the seam between Rust and Python. Conversion only; the GIL is released around every piece of work.

mod convert;
mod model;
mod run;
mod trainer;

use pyo3::prelude::*;

pyo3::create_exception!(
    moe_lab,
    DivergedError,
    pyo3::exceptions::PyRuntimeError,
    "Training left the numbers (NaN, Inf or far out of range)."
);

#[pymodule]
mod _native {
    use super::convert::{enter, to_dict};
    use pyo3::prelude::*;
    use pyo3::types::PyDict;

    #[pymodule_export]
    use super::DivergedError;
    #[pymodule_export]
    use super::model::{Model, loss_and_gradients};
    #[pymodule_export]
    use super::run::Run;
    #[pymodule_export]
    use super::trainer::Trainer;

    /// Statistics of data files as (JSON, text table); None means the shipped file.
    #[pyfunction]
    #[pyo3(signature = (facts=None, chat=None, paraphrases=None))]
    fn data_stats(
        py: Python<'_>,
        facts: Option<String>,
        chat: Option<String>,
        paraphrases: Option<String>,
    ) -> PyResult<(String, String)> {
        enter(py, move || train::inspect::data_stats(facts.as_deref(), chat.as_deref(), paraphrases.as_deref()))
    }

    /// JSON Schema of the run file.
    #[pyfunction]
    fn config_schema() -> String {
        train::run::Run::schema_json()
    }

    /// Every key of the run file as a Markdown table.
    #[pyfunction]
    fn config_docs() -> String {
        train::run::Run::docs()
    }

    /// What this machine and this build have.
    #[pyfunction]
    fn doctor(py: Python<'_>) -> PyResult<Bound<'_, PyDict>> {
        let report = enter(py, || Ok(train::inspect::doctor()))?;
        to_dict(py, &report)
    }

    #[pymodule_init]
    fn init(module: &Bound<'_, PyModule>) -> PyResult<()> {
        module.add("__version__", env!("CARGO_PKG_VERSION"))
    }
}
