//! Modules over layers: gated units, recurrent layers, blocks and embeddings.

use layerstore::layer::Accuracy;
use numpy::{IntoPyArray, PyArrayDyn};
use pyo3::prelude::*;

use crate::convert::Given;
use crate::runtime::compute;

/// A module with the layers that it is made of, ready to run.
#[pyclass(frozen, module = "layerstore")]
pub struct Module {
    /// The module.
    pub module: layerstore::nn::Module,
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
