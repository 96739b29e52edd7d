//! The one way across: work without the GIL, errors by meaning, JSON values as Python objects.

use crate::DivergedError;
use pyo3::exceptions::{
    PyBlockingIOError, PyFileExistsError, PyFileNotFoundError, PyIsADirectoryError, PyNotADirectoryError, PyOSError,
    PyPermissionError, PyRuntimeError, PyValueError,
};
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyList, PyString};
use serde_json::{Map, Value};
use std::io::ErrorKind;
use std::panic::{AssertUnwindSafe, catch_unwind};
use train::TrainError;

/// Carries an error of `train` to Python (the orphan rule forbids a direct conversion).
struct Raised(TrainError);

impl From<Raised> for PyErr {
    fn from(Raised(error): Raised) -> PyErr {
        let text = error.to_string();
        match error {
            TrainError::Usage(_) => PyValueError::new_err(text),
            TrainError::Io(source) => io_error(source.kind(), text),
            TrainError::Diverged(_) => DivergedError::new_err(text),
            TrainError::Failed(_) => PyRuntimeError::new_err(text),
        }
    }
}

/// The OSError subclass of an error kind; the text names the file.
fn io_error(kind: ErrorKind, text: String) -> PyErr {
    match kind {
        ErrorKind::NotFound => PyFileNotFoundError::new_err(text),
        ErrorKind::PermissionDenied => PyPermissionError::new_err(text),
        ErrorKind::AlreadyExists => PyFileExistsError::new_err(text),
        ErrorKind::NotADirectory => PyNotADirectoryError::new_err(text),
        ErrorKind::IsADirectory => PyIsADirectoryError::new_err(text),
        ErrorKind::WouldBlock => PyBlockingIOError::new_err(text),
        _ => PyOSError::new_err(text),
    }
}

/// Runs `work` without the GIL. A panic inside (a bug of ours) becomes a RuntimeError, so that `except Exception` catches it.
pub fn enter<R: Send>(py: Python<'_>, work: impl FnOnce() -> Result<R, TrainError> + Send) -> PyResult<R> {
    let work = || train::inspect::check_machine().and_then(|()| work());
    let done = py.detach(|| catch_unwind(AssertUnwindSafe(work)));
    match done {
        Ok(result) => result.map_err(|error| Raised(error).into()),
        Err(_) => Err(PyRuntimeError::new_err(
            "internal error of moe_lab (details on stderr); please report it with the run file",
        )),
    }
}

pub fn to_python<'py>(py: Python<'py>, value: &Value) -> PyResult<Bound<'py, PyAny>> {
    Ok(match value {
        Value::Null => py.None().into_bound(py),
        Value::Bool(b) => b.into_pyobject(py)?.to_owned().into_any(),
        Value::Number(n) => match n.as_i64() {
            Some(i) => i.into_pyobject(py)?.into_any(),
            None => n.as_f64().into_pyobject(py)?.into_any(),
        },
        Value::String(s) => s.into_pyobject(py)?.into_any(),
        Value::Array(items) => {
            let items = items.iter().map(|item| to_python(py, item)).collect::<PyResult<Vec<_>>>()?;
            PyList::new(py, items)?.into_any()
        }
        Value::Object(map) => to_dict(py, map)?.into_any(),
    })
}

pub fn to_dict<'py>(py: Python<'py>, map: &Map<String, Value>) -> PyResult<Bound<'py, PyDict>> {
    let dict = PyDict::new(py);
    for (key, value) in map {
        dict.set_item(key, to_python(py, value)?)?;
    }
    Ok(dict)
}

/// Deeper values are no part of a run file; a list that holds itself would end in the stack's overflow.
const MAX_DEPTH: usize = 16;
/// More entries than any list of a run file has.
const MAX_ENTRIES: usize = 1 << 20;

/// A Python object as JSON (None, bool, int, float, str, list, tuple, dict with str keys).
pub fn to_json(value: &Bound<'_, PyAny>) -> PyResult<Value> {
    json_at(value, 0)
}

fn json_at(value: &Bound<'_, PyAny>, depth: usize) -> PyResult<Value> {
    if depth > MAX_DEPTH {
        return Err(PyValueError::new_err(format!("a value is nested deeper than {MAX_DEPTH} lists or dicts")));
    }
    if value.is_none() {
        return Ok(Value::Null);
    }
    if let Ok(b) = value.cast::<pyo3::types::PyBool>() {
        return Ok(Value::Bool(b.is_true()));
    }
    if let Ok(i) = value.extract::<i64>() {
        return Ok(i.into());
    }
    if let Ok(x) = value.extract::<f64>() {
        return serde_json::Number::from_f64(x)
            .map(Value::Number)
            .ok_or_else(|| PyValueError::new_err(format!("{x} is not a finite number")));
    }
    if value.is_instance_of::<PyString>() {
        return Ok(Value::String(value.extract()?)); // a lone surrogate is a UnicodeEncodeError, which is a ValueError
    }
    if let Ok(dict) = value.cast::<PyDict>() {
        let entry = |(key, value): (Bound<'_, PyAny>, Bound<'_, PyAny>)| {
            Ok((key.extract::<String>()?, json_at(&value, depth + 1)?))
        };
        return Ok(Value::Object(dict.iter().map(entry).collect::<PyResult<Map<_, _>>>()?));
    }
    // Lists, tuples and arrays say how long they are; an iterator may have no end.
    if let Ok(length) = value.len() {
        if length > MAX_ENTRIES {
            return Err(PyValueError::new_err(format!("a list of {length} entries; {MAX_ENTRIES} are the most")));
        }
        let items = value.try_iter()?.take(MAX_ENTRIES);
        return Ok(Value::Array(items.map(|item| json_at(&item?, depth + 1)).collect::<PyResult<_>>()?));
    }
    Err(PyValueError::new_err(format!("{} is not a value of a run file", value.get_type())))
}

/// The process that made an object with threads: after a fork the child has the object and none of its threads, and would wait for ever.
pub struct Home(u32);

impl Home {
    pub fn here() -> Self {
        Home(std::process::id())
    }

    pub fn check(&self) -> PyResult<()> {
        if self.0 == std::process::id() {
            return Ok(());
        }
        Err(PyRuntimeError::new_err(
            "this object was made in another process, and a fork does not take its threads along; make it in this process",
        ))
    }
}
