//! `read_steps`: the stream of a run as columns.

use crate::convert::enter;
use numpy::{IntoPyArray, PyArray1};
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict, PyList};
use std::path::PathBuf;
use train::TrainError;
use train::steps::Values;

/// The whole lines of metrics.jsonl as (places of its plain steps, their columns, place and bytes of every other line). A column is a pair of numbers
/// (NaN: none) and whether all are integers, or a pair of codes and the texts that they stand for (a code past their end: none).
#[pyfunction]
#[allow(clippy::type_complexity)] // the three parts of a stream
pub fn read_steps<'py>(
    py: Python<'py>,
    path: PathBuf,
) -> PyResult<(Bound<'py, PyArray1<u64>>, Bound<'py, PyDict>, Bound<'py, PyList>)> {
    let steps = enter(py, move || {
        let stream = std::fs::read(&path).map_err(|error| {
            TrainError::Io(std::io::Error::new(error.kind(), format!("cannot read {}: {error}", path.display())))
        })?;
        Ok(train::steps::read_steps(&stream))
    })?;
    let columns = PyDict::new(py);
    for column in steps.columns {
        match column.values {
            Values::Numbers { values, integers } => {
                columns.set_item(column.name, (values.into_pyarray(py), integers))?
            }
            Values::Texts { codes, distinct } => columns.set_item(column.name, (codes.into_pyarray(py), distinct))?,
        }
    }
    let others = steps.others.iter().map(|(place, line)| (place, PyBytes::new(py, line)));
    Ok((steps.places.into_pyarray(py), columns, PyList::new(py, others)?))
}
