//! Values between Python and Rust: JSON, arrays, paths.

use ndarray::{ArrayD, ArrayView2, ArrayViewD, IxDyn};
use numpy::{IntoPyArray, PyArrayDyn, PyArrayMethods, PyReadonlyArrayDyn};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pythonize::{depythonize, pythonize};
use serde::Serialize;
use serde_json::Value;

use crate::errors::invalid;

/// Returns a report as dictionaries, lists, texts and numbers.
///
/// # Errors
/// When memory is short.
pub fn plain<'py, T: Serialize + ?Sized>(py: Python<'py>, value: &T) -> PyResult<Bound<'py, PyAny>> {
    Ok(pythonize(py, value)?)
}

/// Reads a dictionary, a list or a plain value as JSON.
///
/// # Errors
/// When something in it is no such value.
pub fn json(value: &Bound<'_, PyAny>) -> PyResult<Value> {
    depythonize(value).map_err(|e| PyValueError::new_err(e.to_string()))
}

/// An array of f32 that Python owns: as it was given, where it is one already.
pub struct Given<'py> {
    array: PyReadonlyArrayDyn<'py, f32>,
}

impl<'py> Given<'py> {
    /// Takes what NumPy, DLPack or the buffer protocol give; other numbers than f32 are converted.
    ///
    /// # Errors
    /// When it is no array of numbers.
    pub fn new(value: &Bound<'py, PyAny>) -> PyResult<Self> {
        if let Ok(array) = value.cast::<PyArrayDyn<f32>>() {
            return Ok(Given { array: array.try_readonly()? });
        }
        let py = value.py();
        let array = py.import("layerstore._arrays")?.getattr("as_f32")?.call1((value,))?;
        Ok(Given { array: array.cast_into::<PyArrayDyn<f32>>()?.try_readonly()? })
    }

    /// Returns the array.
    pub fn view(&self) -> ArrayViewD<'_, f32> {
        self.array.as_array()
    }

    /// Returns the rows of the last dimension, `[rows, width]`, and the dimensions before it. A vector is one row.
    ///
    /// # Errors
    /// For a scalar.
    pub fn rows(&self, py: Python<'_>, what: &str) -> PyResult<(Rows<'_>, Vec<usize>)> {
        let view = self.view();
        let Some((&width, leading)) = view.shape().split_last() else {
            return Err(invalid(py, what, "a scalar", "an array of one dimension or more"));
        };
        let (leading, rows) = (leading.to_vec(), leading.iter().product::<usize>());
        let rows = match view.clone().into_shape_with_order((rows, width)) {
            Ok(rows) => Rows::Borrowed(rows),
            Err(_) => {
                let owned = view.as_standard_layout().into_owned();
                Rows::Owned(owned.into_shape_with_order((rows, width)).map_err(|e| invalid(py, what, e, "an array"))?)
            }
        };
        Ok((rows, leading))
    }

    /// Returns a matrix.
    ///
    /// # Errors
    /// When it has another number of dimensions than two.
    pub fn matrix(&self, py: Python<'_>, what: &str) -> PyResult<ArrayView2<'_, f32>> {
        let view = self.view();
        let found = view.ndim();
        view.into_dimensionality().map_err(|_| invalid(py, what, format!("{found} dimensions"), "2 dimensions"))
    }
}

/// Rows of an array, in place where they lie one after another.
pub enum Rows<'a> {
    /// In place.
    Borrowed(ArrayView2<'a, f32>),
    /// Copied.
    Owned(ndarray::Array2<f32>),
}

impl Rows<'_> {
    /// Returns them.
    pub fn view(&self) -> ArrayView2<'_, f32> {
        match self {
            Rows::Borrowed(view) => *view,
            Rows::Owned(array) => array.view(),
        }
    }
}

/// Returns rows as an array of these leading dimensions, without a copy.
///
/// # Errors
/// When the numbers do not fit.
pub fn array<'py>(
    py: Python<'py>,
    rows: ndarray::Array2<f32>,
    leading: &[usize],
) -> PyResult<Bound<'py, PyArrayDyn<f32>>> {
    let mut shape = leading.to_vec();
    shape.push(rows.ncols());
    let array: ArrayD<f32> =
        rows.into_shape_with_order(IxDyn(&shape)).map_err(|e| PyValueError::new_err(e.to_string()))?;
    Ok(array.into_pyarray(py))
}

/// Calls a function of one of the package's own modules.
///
/// # Errors
/// As the function.
pub fn call<'py>(
    py: Python<'py>,
    module: &str,
    function: &str,
    arguments: impl pyo3::call::PyCallArgs<'py>,
) -> PyResult<Bound<'py, PyAny>> {
    py.import(format!("layerstore.{module}"))?.getattr(function)?.call1(arguments)
}
