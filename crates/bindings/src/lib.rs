//! moe_lab._native: the seam between Rust and Python. Conversion only; the GIL is released around every piece of work.

mod convert;
mod model;
mod run;
mod steps;
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
    use super::convert::{enter, to_dict, to_python};
    use pyo3::prelude::*;
    use pyo3::types::PyDict;
    use std::path::Path;

    #[pymodule_export]
    use super::DivergedError;
    #[pymodule_export]
    use super::model::{Model, loss_and_gradients};
    #[pymodule_export]
    use super::run::Run;
    #[pymodule_export]
    use super::steps::read_steps;
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

    /// Times training steps of a preset: the report, and with `trace` (a file to write) the profile as rows by op and as text.
    #[pyfunction]
    #[pyo3(signature = (preset, position, dense, no_moh, sets, seconds, trace=None))]
    #[allow(clippy::too_many_arguments)] // the flags of the verb
    fn bench<'py>(
        py: Python<'py>,
        preset: String,
        position: String,
        dense: bool,
        no_moh: bool,
        sets: Vec<String>,
        seconds: f64,
        trace: Option<std::path::PathBuf>,
    ) -> PyResult<(Bound<'py, PyDict>, Option<String>)> {
        let options = train::bench::Options {
            preset,
            position,
            dense,
            no_moh,
            sets,
            seconds,
            ..train::bench::Options::default()
        };
        let (report, table) = enter(py, move || {
            let (mut report, profile) = train::bench::bench(&options, trace.is_some())?;
            if let (Some(path), Some(profile)) = (&trace, &profile) {
                train::bench::write_trace(profile, path)?;
                report.insert("profile".into(), profile.rows().into());
            }
            Ok((report, profile.map(|profile| profile.table())))
        })?;
        Ok((to_dict(py, &report)?, table))
    }

    /// A learning-rate range test on the first phase of a run: every point and the suggestion. `tell` gets the updates made and those there are at
    /// most. Writes nothing.
    #[pyfunction]
    #[pyo3(signature = (run, tell=None))]
    fn lr_find<'py>(
        py: Python<'py>,
        run: PyRef<'py, Run>,
        tell: Option<Bound<'py, PyAny>>,
    ) -> PyResult<Bound<'py, PyDict>> {
        let inner = run.inner.clone();
        let mut find = enter(py, move || train::trainer::LrFind::new(inner))?;
        while enter(py, || find.advance())? {
            py.check_signals()?;
            if let Some(tell) = &tell {
                tell.call1(find.progress())?;
            }
        }
        to_dict(py, &find.report())
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

    /// The configuration of a completed run that is to be trained again; its data must be what they were.
    #[pyfunction]
    fn reproduction(py: Python<'_>, run: String) -> PyResult<Run> {
        let original = enter(py, move || train::reproduce::Original::read(Path::new(&run)))?;
        Ok(Run { inner: original.run })
    }

    /// What two trainings of one run have in common: (report as a dict, report as text).
    #[pyfunction]
    fn compare_runs<'py>(py: Python<'py>, original: String, again: String) -> PyResult<(Bound<'py, PyAny>, String)> {
        let report =
            enter(py, move || train::reproduce::Original::read(Path::new(&original))?.compare(Path::new(&again)))?;
        Ok((to_python(py, &report.json())?, report.to_string()))
    }

    #[pymodule_init]
    fn init(module: &Bound<'_, PyModule>) -> PyResult<()> {
        let python = module.py().version_info();
        train::record::note_version("python", &format!("{}.{}.{}", python.major, python.minor, python.patch));
        module.add("__version__", env!("CARGO_PKG_VERSION"))
    }
}
