//! Attention over arrays of four dimensions.

use layerstore::layer::{SharedLayer, VqAttentionLayer};
use ndarray::{Array4, ArrayView4, Ix4};
use numpy::{IntoPyArray, PyArray4, PyArrayDyn};
use pyo3::prelude::*;
use pyo3::types::PyDict;

use crate::convert::{Given, json};
use crate::errors::{OrRaise, invalid};
use crate::layer::Layer;
use crate::runtime::compute;

fn heads<'a>(py: Python<'_>, given: &'a Given<'_>, what: &str) -> PyResult<ArrayView4<'a, f32>> {
    let view = given.view();
    let found = view.ndim();
    let expected = "4: [batch, heads, tokens, dim]";
    view.into_dimensionality::<Ix4>().map_err(|_| invalid(py, &format!("dimensions of {what}"), found, expected))
}

/// Attends with a layer.
///
/// # Errors
/// For other layers than attention, and shapes that do not fit.
pub fn attend<'py>(
    py: Python<'py>,
    layer: &SharedLayer,
    [q, k, v]: [&Bound<'py, PyAny>; 3],
) -> PyResult<Bound<'py, PyArrayDyn<f32>>> {
    let found = layer.downcast_ref::<VqAttentionLayer>().cloned();
    let expected = "a vq_attention layer";
    let layer =
        found.ok_or_else(|| invalid(py, "layer to attend with", format!("a {} layer", layer.method()), expected))?;
    let (q, k, v) = (Given::new(q)?, Given::new(k)?, Given::new(v)?);
    let (q, k, v) = (heads(py, &q, "queries")?, heads(py, &k, "keys")?, heads(py, &v, "values")?);
    let output = compute(py, || layer.attend(q, k, v, None, None))?.output;
    Ok(output.into_dyn().into_pyarray(py))
}

/// Makes a vq_attention layer: its settings are those of rules, its codebooks are made by k-means of queries
/// `[tokens, n_head * d_k]` and keys `[tokens, n_kv_head * d_k]`, which mechanisms without codebooks do without.
#[pyfunction]
#[pyo3(signature = (settings, queries = None, keys = None))]
pub fn vq_attention(
    py: Python<'_>,
    settings: &Bound<'_, PyDict>,
    queries: Option<&Bound<'_, PyAny>>,
    keys: Option<&Bound<'_, PyAny>>,
) -> PyResult<Layer> {
    use layerstore::layer::Layer as _;
    let config = serde_json::from_value(json(settings)?);
    let config = config.map_err(|e| invalid(py, "settings of vq_attention", e, "those of rules"))?;
    let empty = || Given::new(&crate::convert::call(py, "_arrays", "no_rows", ())?);
    let queries = queries.map_or_else(empty, Given::new)?;
    let keys = keys.map_or_else(empty, Given::new)?;
    let (queries, keys) = (queries.matrix(py, "queries")?, keys.matrix(py, "keys")?);
    let layer = compute(py, || VqAttentionLayer::by_kmeans(config, queries, keys))?;
    Ok(Layer::of(layer.shared()))
}

/// Runs a training step of a layer's codebooks (moving averages) on queries `[tokens, n_head * d_k]` and keys
/// `[tokens, n_kv_head * d_k]`. Returns the layer afterwards, and a dictionary: the commitment losses of queries and of keys, and how
/// many dead codewords were replaced.
#[pyfunction]
pub fn learn_codebooks<'py>(
    py: Python<'py>,
    layer: &Layer,
    queries: &Bound<'py, PyAny>,
    keys: &Bound<'py, PyAny>,
    step: u64,
) -> PyResult<(Layer, Bound<'py, PyDict>)> {
    use layerstore::layer::Layer as _;
    let shared = layer.shared(py)?;
    let found = shared.downcast_ref::<VqAttentionLayer>().cloned();
    let layer =
        found.ok_or_else(|| invalid(py, "layer to train", shared.method().to_string(), "a vq_attention layer"))?;
    let (queries, keys) = (Given::new(queries)?, Given::new(keys)?);
    let (queries, keys) = (queries.matrix(py, "queries")?, keys.matrix(py, "keys")?);
    let (next, done) = compute(py, || layer.learn(queries, keys, step))?;
    let dict = PyDict::new(py);
    dict.set_item("query_commitment", done.queries.map(|update| update.commitment))?;
    dict.set_item("key_commitment", done.keys.map(|update| update.commitment))?;
    dict.set_item("revived", done.revived)?;
    Ok((Layer::of(next.shared()), dict))
}

/// Computes exact attention of queries `[batch, heads, tokens, d_k]` to keys and values; `scale` is 1/√d_k where it is not said.
#[pyfunction]
#[pyo3(signature = (q, k, v, *, scale = None, causal = false))]
pub fn exact_attention<'py>(
    py: Python<'py>,
    q: &Bound<'py, PyAny>,
    k: &Bound<'py, PyAny>,
    v: &Bound<'py, PyAny>,
    scale: Option<f32>,
    causal: bool,
) -> PyResult<Bound<'py, PyArray4<f32>>> {
    let (q, k, v) = (Given::new(q)?, Given::new(k)?, Given::new(v)?);
    let (q, k, v) = (heads(py, &q, "queries")?, heads(py, &k, "keys")?, heads(py, &v, "values")?);
    let scale = scale.unwrap_or(1.0 / (q.dim().3.max(1) as f32).sqrt());
    let mask = layerstore::attention::AttentionMask { causal, keys: None, segments: None };
    let output: Array4<f32> = compute(py, || layerstore::attention::exact(q, k, v, scale, &mask))?.output;
    Ok(output.into_pyarray(py))
}

/// A stored attention block: its codebooks with its projections, where it has them.
#[pyclass(frozen, module = "layerstore")]
pub struct AttentionBlock {
    /// The block.
    pub block: layerstore::nn::AttentionBlock,
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
        let accuracy = if exact { layerstore::layer::Accuracy::Full } else { layerstore::layer::Accuracy::Approximate };
        let y = compute(py, || block.attend(x, x, x, None, None, accuracy))?;
        Ok(y.into_dyn().into_pyarray(py))
    }

    fn __call__<'py>(&self, py: Python<'py>, x: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyArrayDyn<f32>>> {
        self.forward(py, x, false)
    }

    /// The settings.
    #[getter]
    fn config<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        crate::convert::plain(py, self.block.attention().settings())
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
