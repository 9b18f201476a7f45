//! Modules over layers: gated units, recurrent layers, attention blocks and embeddings.

use layerstore::layer::Accuracy;
use layerstore::nn;
use numpy::{IntoPyArray, PyArray1, PyArrayDyn, PyReadonlyArray1};
use pyo3::prelude::*;
use pyo3::types::PyBytes;

use crate::convert::{Given, plain};
use crate::errors::{OrRaise, invalid};
use crate::layer::Layer;
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

/// A stored attention block: its codebooks with its projections, where it has them.
#[pyclass(frozen, module = "layerstore")]
pub struct AttentionBlock {
    /// The block.
    pub block: nn::AttentionBlock,
}

#[pymethods]
impl AttentionBlock {
    /// Attends within a sequence `[batch, tokens, width]`, its projections included; `[batch, tokens, width]`.
    #[pyo3(signature = (x, *, exact = false))]
    fn forward<'py>(
        &self,
        py: Python<'py>,
        x: &Bound<'py, PyAny>,
        exact: bool,
    ) -> PyResult<Bound<'py, PyArrayDyn<f32>>> {
        let given = Given::new(x)?;
        let (view, found) = (given.view(), given.view().ndim());
        let view = view.into_dimensionality::<ndarray::Ix3>();
        let x = view.map_err(|_| invalid(py, "dimensions of the input", found, "3: [batch, tokens, width]"))?;
        let block = if exact { self.block.exact().or_raise(py)? } else { self.block.clone() };
        let accuracy = if exact { Accuracy::Full } else { Accuracy::Approximate };
        let y = compute(py, || block.attend(x, x, x, None, None, accuracy))?;
        Ok(y.into_dyn().into_pyarray(py))
    }

    fn __call__<'py>(&self, py: Python<'py>, x: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyArrayDyn<f32>>> {
        self.forward(py, x, false)
    }

    /// The settings.
    #[getter]
    fn config<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        plain(py, self.block.attention().settings())
    }

    /// The vq_attention layer alone.
    #[getter]
    fn attention(&self) -> Layer {
        use layerstore::layer::Layer as _;
        Layer::of(self.block.attention().clone().shared())
    }

    fn __repr__(&self) -> String {
        let config = self.block.attention().settings();
        format!("<layerstore.AttentionBlock {:?}, {} heads>", config.mechanism, config.n_head)
    }
}
