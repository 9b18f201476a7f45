//! Errors as Python exceptions: a class for each kind, in `layerstore.errors`.

use layerstore::{Error, ErrorKind};
use pyo3::exceptions::{PyKeyboardInterrupt, PyRuntimeError};
use pyo3::prelude::*;

/// Returns the exception of an error.
pub fn raised(py: Python<'_>, error: &Error) -> PyErr {
    let class = match error.kind() {
        ErrorKind::NotFound => "NotFoundError",
        ErrorKind::InvalidInput => "InvalidInputError",
        ErrorKind::Conflict => "ConflictError",
        ErrorKind::Incompatible => "IncompatibleError",
        ErrorKind::Corrupt => "CorruptError",
        ErrorKind::Storage => "StorageError",
        ErrorKind::Cancelled => return PyKeyboardInterrupt::new_err(error.to_string()),
        _ => "LayerstoreError",
    };
    named(py, class, error.to_string())
}

/// Returns an exception of one of the package's classes.
fn named(py: Python<'_>, class: &str, message: String) -> PyErr {
    let made = py.import("layerstore.errors").and_then(|module| module.getattr(class)?.call1((message.clone(),)));
    made.map_or_else(|_| PyRuntimeError::new_err(message), PyErr::from_value)
}

/// Returns the exception for an argument that is not what it has to be.
pub fn invalid(py: Python<'_>, what: &str, found: impl ToString, expected: impl ToString) -> PyErr {
    raised(py, &Error::expected(what, found, expected))
}

/// A result whose error becomes an exception.
pub trait OrRaise<T> {
    /// Returns the value, or the exception.
    ///
    /// # Errors
    /// Where there is an error.
    fn or_raise(self, py: Python<'_>) -> PyResult<T>;
}

impl<T> OrRaise<T> for layerstore::Result<T> {
    fn or_raise(self, py: Python<'_>) -> PyResult<T> {
        self.map_err(|error| raised(py, &error))
    }
}
