//! `read_steps`: the stream of a run as columns.

use crate::convert::enter;
use numpy::{IntoPyArray, PyArray1};
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict};
use std::path::PathBuf;
use train::steps::{Column, Steps, Values};

/// Places of the plain steps, their columns, place and bytes of every other line.
type Piece<'py> = (Bound<'py, PyArray1<u64>>, Bound<'py, PyDict>, Vec<(u64, Bound<'py, PyBytes>)>);

/// The whole lines of metrics.jsonl in pieces. A column is a pair of numbers (NaN: none) and whether all are integers, or a pair of codes and the
/// texts that they stand for (a code past their end: none).
#[pyfunction]
pub fn read_steps(py: Python<'_>, path: PathBuf) -> PyResult<Vec<Piece<'_>>> {
    let pieces = enter(py, move || train::steps::read(&path))?;
    pieces.into_iter().map(|steps| piece(py, steps)).collect()
}

fn piece(py: Python<'_>, steps: Steps) -> PyResult<Piece<'_>> {
    let columns = PyDict::new(py);
    for Column { name, values } in steps.columns {
        match values {
            Values::Numbers { values, integers } => columns.set_item(name, (values.into_pyarray(py), integers))?,
            Values::Texts { codes, distinct } => columns.set_item(name, (codes.into_pyarray(py), distinct))?,
        }
    }
    let others = steps.others.iter().map(|(place, line)| (*place, PyBytes::new(py, line))).collect();
    Ok((steps.places.into_pyarray(py), columns, others))
}
