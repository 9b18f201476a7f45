//! Functions that make layers, and stores of one layer.

use layerstore::layer::VqAttentionLayer;
use pyo3::prelude::*;
use pyo3::types::PyDict;

use crate::convert::{Given, json};
use crate::errors::invalid;
use crate::layer::{Layer, made};
use crate::runtime::{compute, run};

/// Compresses a weight `[out_features, in_features]`, with its bias where it has one, by a method and its settings (those of rules),
/// for inputs with the statistics of `calibration`: a `Calibration`, or an array of inputs `[..., in_features]`.
#[pyfunction]
#[pyo3(signature = (weight, bias = None, /, *, method = "low_rank", calibration = None, **settings))]
pub fn compress(
    py: Python<'_>,
    weight: &Bound<'_, PyAny>,
    bias: Option<&Bound<'_, PyAny>>,
    method: &str,
    calibration: Option<&Bound<'_, PyAny>>,
    settings: Option<&Bound<'_, PyDict>>,
) -> PyResult<Layer> {
    let settings = settings.map(|settings| json(settings)).transpose()?;
    let settings = settings.and_then(|settings| settings.as_object().cloned()).unwrap_or_default();
    made(py, weight, bias, calibration, || layerstore::layer::method(method)?.read_settings(settings))
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

/// Writes a layer into a store of its own at `uri`, which `load_backend` reads.
#[pyfunction]
pub fn save_backend(py: Python<'_>, layer: &Layer, uri: &str) -> PyResult<()> {
    let layer = layer.shared(py)?;
    run(py, layerstore::save_backend(&**layer, uri))
}

/// Loads the layer of a store that `save_backend` made.
#[pyfunction]
pub fn load_backend(py: Python<'_>, uri: &str) -> PyResult<Layer> {
    Ok(Layer::of(run(py, layerstore::load_backend(uri))?))
}

/// Returns the names of all methods.
#[pyfunction]
pub fn methods() -> Vec<String> {
    layerstore::layer::methods().iter().map(|method| method.name.to_string()).collect()
}
