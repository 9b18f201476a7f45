//! Modules over layers: gated units, recurrent layers, blocks and embeddings.

use layerstore::layer::Accuracy;
use layerstore::nn;
use numpy::{IntoPyArray, PyArray1, PyArrayDyn, PyReadonlyArray1};
use pyo3::prelude::*;
use pyo3::types::PyBytes;

use crate::convert::Given;
use crate::runtime::compute;

/// Encodes values of -1, 0 and 1, `[count]` of int8, by the prefix code of Keras-MatMulLess.
#[pyfunction]
pub fn encode_ternary<'py>(py: Python<'py>, values: PyReadonlyArray1<'py, i8>) -> PyResult<Bound<'py, PyBytes>> {
    let values = values.as_array().to_vec();
    Ok(PyBytes::new(py, &compute(py, || nn::encode_ternary(&values))?))
}

/// Decodes `count` values of -1, 0 and 1 from the prefix code of Keras-MatMulLess, as int8.
#[pyfunction]
pub fn decode_ternary<'py>(py: Python<'py>, encoded: &[u8], count: usize) -> PyResult<Bound<'py, PyArray1<i8>>> {
    Ok(compute(py, || nn::decode_ternary(encoded, count))?.into_pyarray(py))
}

/// A module with the layers that it is made of, ready to run.
#[pyclass(frozen, module = "layerstore")]
pub struct Module {
    /// The module.
    pub module: nn::Module,
}

#[pymethods]
impl Module {
    /// Runs the module on `[batch, steps, features]`, or on what its kind takes.
    #[pyo3(signature = (x, *, exact = false))]
    fn forward<'py>(
        &self,
        py: Python<'py>,
        x: &Bound<'py, PyAny>,
        exact: bool,
    ) -> PyResult<Bound<'py, PyArrayDyn<f32>>> {
        let given = Given::new(x)?;
        let (view, accuracy) = (given.view(), if exact { Accuracy::Full } else { Accuracy::Approximate });
        Ok(compute(py, || self.module.forward(view, accuracy))?.into_pyarray(py))
    }

    fn __call__<'py>(&self, py: Python<'py>, x: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyArrayDyn<f32>>> {
        self.forward(py, x, false)
    }

    /// What the module is, such as `glu` or `gru`.
    #[getter]
    fn kind(&self) -> String {
        self.module.kind().into_owned()
    }

    fn __repr__(&self) -> String {
        format!("<layerstore.Module {}>", self.module.kind())
    }
}
