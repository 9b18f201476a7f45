//! A layer, of a snapshot or by itself.

use std::sync::OnceLock;

use layerstore::layer::{Accuracy, KeyValueLayer, Limit, MethodConfig, SharedLayer, layer_from_parts};
use layerstore::{Calibration as Statistics, LayerHandle, Snapshot};
use ndarray::Array1;
use numpy::{IntoPyArray, PyArray1, PyArray2, PyArray3, PyArray4, PyArrayDyn, ToPyArray};
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyList};
use serde_json::Value;

use crate::attention::{self, AttentionCache};
use crate::convert::{Given, array, call, json, plain};
use crate::errors::{OrRaise, invalid};
use crate::parts;
use crate::runtime::{compute, run};
use crate::statistics::Calibration;

/// A matrix of Python's.
type Matrix<'py> = Bound<'py, PyArray2<f32>>;
/// A vector of Python's.
type Vector<'py> = Bound<'py, PyArray1<f32>>;
/// Vectors by head.
type Heads<'py> = Bound<'py, PyArray4<f32>>;
/// What `to_parts` gives.
type Stored<'py> = (String, Bound<'py, PyList>);

/// A layer: `y = x · Wᵀ + b` for inputs whose last dimension is `in_features`.
///
/// A layer of a snapshot reads its arrays when it is first used, and keeps them as long as it is there. Layers do not change, and may
/// be used by several threads at once.
#[pyclass(frozen, weakref, module = "layerstore")]
pub struct Layer {
    origin: Option<(Snapshot, LayerHandle)>,
    uri: Option<String>,
    loaded: OnceLock<SharedLayer>,
}

impl Layer {
    /// Returns a layer that is in memory.
    pub fn of(layer: SharedLayer) -> Self {
        Layer { origin: None, uri: None, loaded: OnceLock::from(layer) }
    }

    /// Returns a layer of a snapshot of the store at `uri`.
    pub fn stored(snapshot: Snapshot, handle: LayerHandle, uri: &str) -> Self {
        Layer { origin: Some((snapshot, handle)), uri: Some(uri.to_owned()), loaded: OnceLock::new() }
    }

    /// Returns the layer in memory, read now where it is not.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn shared(&self, py: Python<'_>) -> PyResult<&SharedLayer> {
        if self.loaded.get().is_none()
            && let Some((_, handle)) = &self.origin
        {
            let layer = run(py, handle.load())?;
            return Ok(self.loaded.get_or_init(|| layer));
        }
        self.loaded.get().ok_or_else(|| invalid(py, "layer", "none", "one"))
    }

    /// Returns the handle of a layer of a snapshot.
    pub fn handle(&self) -> Option<&LayerHandle> {
        self.origin.as_ref().map(|(_, handle)| handle)
    }

    fn key_value(&self, py: Python<'_>, what: &str) -> PyResult<KeyValueLayer> {
        let layer = self.shared(py)?;
        let found = layer.downcast_ref::<KeyValueLayer>().cloned();
        found.ok_or_else(|| invalid(py, what, format!("a {} layer", layer.method()), "a key_value layer"))
    }

    /// The layer to run, and how.
    fn to_run(&self, py: Python<'_>, exact: bool, max_error: Option<f64>) -> PyResult<(SharedLayer, Accuracy)> {
        if let Some(asked) = max_error {
            let found = self.key_value(py, "layer for max_error")?;
            use layerstore::layer::Layer as _;
            return Ok((found.certifying(asked).or_raise(py)?.shared(), Accuracy::Approximate));
        }
        match (&self.origin, exact) {
            (_, false) => Ok((self.shared(py)?.clone(), Accuracy::Approximate)),
            (Some((snapshot, handle)), true) => {
                Ok((run(py, layerstore::exact_layer(snapshot, handle))?, Accuracy::Full))
            }
            (None, true) => Ok((self.shared(py)?.clone(), Accuracy::Full)),
        }
    }

    fn output<'py>(
        &self,
        py: Python<'py>,
        x: &Bound<'py, PyAny>,
        exact: bool,
        max_error: Option<f64>,
    ) -> PyResult<(Bound<'py, PyArrayDyn<f32>>, Option<f64>)> {
        let (layer, accuracy) = self.to_run(py, exact, max_error)?;
        let x = Given::new(x)?;
        let (rows, leading) = x.rows(py, "the input")?;
        let view = rows.view();
        let output = compute(py, || layer.forward(view, accuracy))?;
        Ok((array(py, output.y, &leading)?, output.relative_error_bound))
    }
}

#[pymethods]
impl Layer {
    /// Runs the layer on inputs `[..., in_features]`: f32 arrays of NumPy, or of anything with DLPack, are read in place; other
    /// numbers are converted. Returns `[..., out_features]`.
    ///
    /// `exact=True` leaves nothing out: all keys, inputs as they are, and for a quantised layer the dense weights of the same tensor
    /// where the store has them. `max_error` has a key_value layer use as few keys as certify that relative error.
    ///
    /// Raises `InvalidInputError` (a `ValueError`) for another width, numbers that are not finite, and layers that are not linear.
    #[pyo3(signature = (x, *, exact = false, max_error = None))]
    fn forward<'py>(
        &self,
        py: Python<'py>,
        x: &Bound<'py, PyAny>,
        exact: bool,
        max_error: Option<f64>,
    ) -> PyResult<Bound<'py, PyArrayDyn<f32>>> {
        Ok(self.output(py, x, exact, max_error)?.0)
    }

    /// Runs the layer, as `forward`, as its settings say.
    fn __call__<'py>(&self, py: Python<'py>, x: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyArrayDyn<f32>>> {
        Ok(self.output(py, x, false, None)?.0)
    }

    /// Runs the layer, as `forward`, and returns also a bound on the relative error of every row, bias left out; `None` where the
    /// method certifies none.
    #[pyo3(signature = (x, *, exact = false, max_error = None))]
    fn forward_with_bound<'py>(
        &self,
        py: Python<'py>,
        x: &Bound<'py, PyAny>,
        exact: bool,
        max_error: Option<f64>,
    ) -> PyResult<(Bound<'py, PyArrayDyn<f32>>, Option<f64>)> {
        self.output(py, x, exact, max_error)
    }

    /// Returns the gradients of a loss with respect to input, weight and bias, `(gx, gw, gb)`, for inputs `[..., in_features]` and
    /// the loss's gradient with respect to the output. Roundings count as if they were not there (straight-through).
    fn backward<'py>(
        &self,
        py: Python<'py>,
        x: &Bound<'py, PyAny>,
        grad_output: &Bound<'py, PyAny>,
    ) -> PyResult<(Bound<'py, PyArrayDyn<f32>>, Matrix<'py>, Vector<'py>)> {
        let layer = self.shared(py)?;
        let (x, grad) = (Given::new(x)?, Given::new(grad_output)?);
        let ((x, leading), (grad, _)) = (x.rows(py, "the input")?, grad.rows(py, "the output gradient")?);
        let (x, grad) = (x.view(), grad.view());
        let found = compute(py, || layer.backward(x, grad))?;
        Ok((array(py, found.input, &leading)?, found.weight.into_pyarray(py), found.bias.into_pyarray(py)))
    }

    /// Returns the gradient with respect to the input alone, as `backward` gives it.
    fn backward_input<'py>(
        &self,
        py: Python<'py>,
        x: &Bound<'py, PyAny>,
        grad_output: &Bound<'py, PyAny>,
    ) -> PyResult<Bound<'py, PyArrayDyn<f32>>> {
        let layer = self.shared(py)?;
        let (x, grad) = (Given::new(x)?, Given::new(grad_output)?);
        let ((x, leading), (grad, _)) = (x.rows(py, "the input")?, grad.rows(py, "the output gradient")?);
        let (x, grad) = (x.view(), grad.view());
        array(py, compute(py, || layer.backward_input(x, grad))?, &leading)
    }

    /// Returns, for each input, the keys of a key_value layer that it uses: dictionaries of `threshold`, `certified_error`, and of
    /// arrays `keys`, `scores` and `contributions`, highest ranked first.
    ///
    /// The limit is one of `keys` (so many on average), `threshold` (a ranking value) and `max_error` (a certified relative error);
    /// else the layer's own. `on_disk=True` searches without the layer being loaded.
    #[pyo3(signature = (x, *, keys = None, threshold = None, max_error = None, on_disk = false))]
    fn search<'py>(
        &self,
        py: Python<'py>,
        x: &Bound<'py, PyAny>,
        keys: Option<f64>,
        threshold: Option<f32>,
        max_error: Option<f64>,
        on_disk: bool,
    ) -> PyResult<Bound<'py, PyList>> {
        let limit = match (keys, threshold, max_error) {
            (None, None, None) => None,
            (Some(keys), None, None) => Some(Limit::Keys(keys)),
            (None, Some(threshold), None) => Some(Limit::Threshold(threshold)),
            (None, None, Some(error)) => Some(Limit::MaxError(error)),
            _ => return Err(invalid(py, "limit of the search", "more than one", "keys, threshold or max_error")),
        };
        let x = Given::new(x)?;
        let (rows, _) = x.rows(py, "the query")?;
        let view = rows.view();
        let found = match (on_disk, self.handle()) {
            (true, Some(handle)) => run(py, handle.search_on_disk(view, limit))?,
            (true, None) => return Err(invalid(py, "layer to search on disk", "one in memory", "one of a store")),
            (false, _) => {
                let layer = self.key_value(py, "layer to search")?;
                compute(py, || layer.search(view, limit))?
            }
        };
        let list = PyList::empty(py);
        for query in found {
            let dict = PyDict::new(py);
            dict.set_item("threshold", query.threshold)?;
            dict.set_item("certified_error", query.certified_error)?;
            let column = |of: fn(&layerstore::layer::Hit) -> f32| -> Vec<f32> { query.hits.iter().map(of).collect() };
            let keys: Vec<u32> = query.hits.iter().map(|hit| hit.key).collect();
            dict.set_item("keys", keys.into_pyarray(py))?;
            dict.set_item("scores", column(|hit| hit.score).into_pyarray(py))?;
            dict.set_item("contributions", column(|hit| hit.contribution).into_pyarray(py))?;
            list.append(dict)?;
        }
        Ok(list)
    }

    /// Returns one key of a key_value layer of a store, `[in_features]`, read by itself.
    fn key<'py>(&self, py: Python<'py>, key: u32) -> PyResult<Bound<'py, PyArray1<f32>>> {
        let Some(handle) = self.handle() else {
            let layer = self.key_value(py, "layer of keys")?;
            let keys = layer.keys();
            let expected = || invalid(py, "key", key, format!("below {}", keys.nrows()));
            let key = (usize::try_from(key).ok()).filter(|key| *key < keys.nrows()).ok_or_else(expected)?;
            return Ok(keys.row(key).to_pyarray(py));
        };
        Ok(run(py, handle.key(key))?.into_pyarray(py))
    }

    /// Returns what a key_value layer holds: keys `[keys, in_features]`, their scales `[keys]`, and values `[keys, out_features]`, so
    /// that the weight is the sum over keys of scale · value · keyᵀ.
    fn keys<'py>(&self, py: Python<'py>) -> PyResult<(Matrix<'py>, Vector<'py>, Matrix<'py>)> {
        let layer = self.key_value(py, "layer of keys")?;
        let (keys, values) = (layer.keys().to_pyarray(py), layer.values().to_pyarray(py));
        Ok((keys, PyArray1::from_slice(py, layer.scales()), values))
    }

    /// Returns the weight that the layer stands for, `[out_features, in_features]`, everything that is stored counted.
    fn weight<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyArray2<f32>>> {
        let layer = self.shared(py)?;
        Ok(compute(py, || layer.weight())?.into_pyarray(py))
    }

    /// Returns the bias `[out_features]`, or `None`.
    fn bias<'py>(&self, py: Python<'py>) -> PyResult<Option<Bound<'py, PyArray1<f32>>>> {
        let layer = self.shared(py)?;
        Ok(compute(py, || layer.stored_bias())?.map(|bias| bias.into_pyarray(py)))
    }

    /// Returns rows of the weight, `[..., in_features]`: an embedding looked up by token.
    fn rows<'py>(&self, py: Python<'py>, indices: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyArrayDyn<f32>>> {
        let layer = self.shared(py)?;
        let indices = call(py, "_arrays", "as_u32", (indices,))?.cast_into::<PyArrayDyn<u32>>()?;
        let indices = numpy::PyArrayMethods::try_readonly(&indices)?;
        let (list, shape) =
            (indices.as_array().iter().copied().collect::<Vec<u32>>(), indices.as_array().shape().to_vec());
        array(py, compute(py, || layer.rows(&list))?, &shape)
    }

    /// Returns the tensors that the layer stores beside weight and bias, by name: a norm's gains, a module's own.
    fn tensors<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let dict = PyDict::new(py);
        for (name, tensor) in self.shared(py)?.own_tensors() {
            dict.set_item(name, tensor.into_pyarray(py))?;
        }
        Ok(dict)
    }

    /// Returns the values of a dense tensor in its own shape, as f32.
    fn values<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyArrayDyn<f32>>> {
        let layer = self.shared(py)?;
        let (values, shape) = compute(py, || parts::dense_values(&**layer))?;
        Ok(ndarray::ArrayD::from_shape_vec(shape, values)
            .map_err(|e| invalid(py, "shape", e, "one that fits"))?
            .into_pyarray(py))
    }

    /// Attends with a vq_attention layer: queries `[batch, heads, tokens, d_k]` to keys and values of `n_kv_head` heads. Returns
    /// `[batch, heads, tokens, d_v]`. With a `cache` the tokens follow those that it has seen, and are added to it.
    #[pyo3(signature = (q, k, v, *, cache = None))]
    fn attend<'py>(
        &self,
        py: Python<'py>,
        q: &Bound<'py, PyAny>,
        k: &Bound<'py, PyAny>,
        v: &Bound<'py, PyAny>,
        cache: Option<&AttentionCache>,
    ) -> PyResult<Bound<'py, PyArrayDyn<f32>>> {
        attention::attend(py, self.shared(py)?, [q, k, v], cache)
    }

    /// Returns the gradients of a loss with respect to queries, keys and values, for its gradient with respect to the output of `attend`,
    /// straight through codewords; `commitment` times the gradient of the commitment loss is added.
    #[pyo3(signature = (q, k, v, grad_output, *, commitment = 0.0))]
    fn attend_backward<'py>(
        &self,
        py: Python<'py>,
        q: &Bound<'py, PyAny>,
        k: &Bound<'py, PyAny>,
        v: &Bound<'py, PyAny>,
        grad_output: &Bound<'py, PyAny>,
        commitment: f32,
    ) -> PyResult<(Heads<'py>, Heads<'py>, Heads<'py>)> {
        let [q, k, v] = attention::attend_backward(py, self.shared(py)?, [q, k, v, grad_output], commitment)?;
        Ok((q, k, v))
    }

    /// Returns an empty cache of causal attention by codes, for a number of sequences.
    #[pyo3(signature = (batch = 1))]
    fn empty_cache(&self, py: Python<'_>, batch: usize) -> PyResult<AttentionCache> {
        attention::empty_cache(py, self.shared(py)?, batch)
    }

    /// Returns the codebooks of a vq_attention layer, `queries` and `keys`, each `[heads, codes, d_k]`.
    fn codebooks<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        attention::codebooks(py, self.shared(py)?)
    }

    /// Returns the codes of vectors `[batch, heads, tokens, d_k]` by the codebook of `queries` or of `keys`: `[batch, heads, tokens]`.
    fn codes<'py>(&self, py: Python<'py>, x: &Bound<'py, PyAny>, of: &str) -> PyResult<Bound<'py, PyArray3<u32>>> {
        attention::codes(py, self.shared(py)?, x, of)
    }

    /// Returns the layer with other settings of how it runs, such as `{"activations": "int8"}`; its arrays are shared.
    fn with_settings(&self, py: Python<'_>, settings: &Bound<'_, PyDict>) -> PyResult<Layer> {
        let layer = self.shared(py)?;
        let mut config = layer.config();
        let (Some(all), Some(new)) = (config.as_object_mut(), json(settings)?.as_object().cloned()) else {
            return Err(invalid(py, "settings", "no dictionary", "one"));
        };
        let asked = new.clone();
        for (name, value) in new {
            match value.is_null() {
                true => all.remove(&name),
                false => all.insert(name, value),
            };
        }
        match layer.configured(&config).or_raise(py)? {
            Some(layer) => {
                let kept = layer.config();
                let same = |a: &Value, b: &Value| a == b || (a.as_f64().is_some() && a.as_f64() == b.as_f64());
                match asked
                    .iter()
                    .find(|(name, value)| !value.is_null() && !kept.get(*name).is_some_and(|k| same(k, value)))
                {
                    Some((name, value)) => {
                        let expected = "a setting of how the layer runs, which can change";
                        Err(invalid(py, &format!("setting '{name}'"), value, expected))
                    }
                    None => Ok(Layer::of(layer)),
                }
            }
            None => Err(invalid(py, "settings", "some", format!("none: a {} layer runs in one way", layer.method()))),
        }
    }

    /// Compresses another weight `[out_features, in_features]`, with its bias, by this layer's method and settings, or others in their
    /// place.
    #[pyo3(signature = (weight, bias = None, /, *, calibration = None, **settings))]
    fn recompress(
        &self,
        py: Python<'_>,
        weight: &Bound<'_, PyAny>,
        bias: Option<&Bound<'_, PyAny>>,
        calibration: Option<&Bound<'_, PyAny>>,
        settings: Option<&Bound<'_, PyDict>>,
    ) -> PyResult<Layer> {
        let (method, mut config) = (self.method(py)?, self.shared(py)?.config());
        let settings = settings.map(|settings| json(settings)).transpose()?;
        let settings = settings.and_then(|settings| settings.as_object().cloned()).unwrap_or_default();
        made(py, weight, bias, calibration, move || {
            let method = layerstore::layer::method(&method)?;
            if let Some(all) = config.as_object_mut() {
                if settings.keys().any(|name| !all.contains_key(name)) {
                    method.read_settings(settings.clone())?;
                }
                all.extend(settings);
            }
            method.settings_of(&config)
        })
    }

    /// Reads the layer's arrays now.
    fn load(&self, py: Python<'_>) -> PyResult<()> {
        self.shared(py).map(|_| ())
    }

    /// Returns the stored form: a text that says what the arrays are, and the arrays. `Layer.from_parts` makes the layer of them.
    fn to_parts<'py>(&self, py: Python<'py>) -> PyResult<Stored<'py>> {
        parts::to_python(py, &**self.shared(py)?)
    }

    /// Makes the layer of what `to_parts` gave.
    #[staticmethod]
    fn from_parts(py: Python<'_>, header: &str, arrays: Vec<Bound<'_, PyAny>>) -> PyResult<Layer> {
        let (parts, config) = parts::from_python(py, header, &arrays)?;
        let layer = compute(py, || {
            let layer = layer_from_parts(parts)?;
            Ok(layer.configured(&config)?.unwrap_or(layer))
        })?;
        Ok(Layer::of(layer))
    }

    fn __reduce__<'py>(&self, py: Python<'py>) -> PyResult<(Bound<'py, PyAny>, Stored<'py>)> {
        Ok((py.get_type::<Layer>().getattr("from_parts")?, self.to_parts(py)?))
    }

    fn __copy__(slf: Py<Self>) -> Py<Self> {
        slf
    }

    fn __deepcopy__(slf: Py<Self>, memo: &Bound<'_, PyAny>) -> Py<Self> {
        let _ = memo;
        slf
    }

    /// The method that the layer is compressed by.
    #[getter]
    fn method(&self, py: Python<'_>) -> PyResult<String> {
        match self.handle() {
            Some(handle) => Ok(handle.record().method.to_string()),
            None => Ok(self.shared(py)?.method().to_string()),
        }
    }

    /// The length of an input.
    #[getter]
    fn in_features(&self, py: Python<'_>) -> PyResult<u64> {
        match self.handle() {
            Some(handle) => Ok(handle.record().in_features),
            None => Ok(self.shared(py)?.in_features() as u64),
        }
    }

    /// The length of an output.
    #[getter]
    fn out_features(&self, py: Python<'_>) -> PyResult<u64> {
        match self.handle() {
            Some(handle) => Ok(handle.record().out_features),
            None => Ok(self.shared(py)?.out_features() as u64),
        }
    }

    /// `(out_features, in_features)`.
    #[getter]
    fn shape(&self, py: Python<'_>) -> PyResult<(u64, u64)> {
        Ok((self.out_features(py)?, self.in_features(py)?))
    }

    /// All settings: what the arrays are, and how the layer runs.
    #[getter]
    fn config<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        match self.handle() {
            Some(handle) => plain(py, &handle.record().config),
            None => plain(py, &self.shared(py)?.config()),
        }
    }

    /// The model that the layer belongs to; `None` for a layer by itself.
    #[getter]
    fn model(&self) -> Option<&str> {
        self.handle().map(|handle| handle.record().model.as_str())
    }

    /// The layer's name in its model; `None` for a layer by itself.
    #[getter]
    fn name(&self) -> Option<&str> {
        self.handle().map(|handle| handle.record().layer.as_str())
    }

    /// The layer's row of the catalogue, as a dictionary; `None` for a layer by itself.
    #[getter]
    fn record<'py>(&self, py: Python<'py>) -> PyResult<Option<Bound<'py, PyAny>>> {
        self.handle().map(|handle| plain(py, handle.record())).transpose()
    }

    /// Where the layer is stored: a dictionary of `uri`, `version`, `model`, `layer` and `artifact`; `None` for a layer by itself.
    #[getter]
    fn origin<'py>(&self, py: Python<'py>) -> PyResult<Option<Bound<'py, PyDict>>> {
        let (Some((snapshot, handle)), Some(uri)) = (&self.origin, &self.uri) else { return Ok(None) };
        let (dict, record) = (PyDict::new(py), handle.record());
        dict.set_item("uri", uri)?;
        dict.set_item("version", snapshot.version())?;
        dict.set_item("model", &record.model)?;
        dict.set_item("layer", &record.layer)?;
        dict.set_item("artifact", record.artifact.to_string())?;
        Ok(Some(dict))
    }

    /// Bytes of the stored arrays.
    #[getter]
    fn stored_bytes(&self, py: Python<'_>) -> PyResult<u64> {
        match self.handle() {
            Some(handle) => Ok(handle.record().stored_bytes),
            None => Ok(self.shared(py)?.to_parts().stored_bytes()),
        }
    }

    /// Bytes that the arrays take in memory.
    #[getter]
    fn memory_bytes(&self, py: Python<'_>) -> PyResult<usize> {
        Ok(self.shared(py)?.memory_bytes())
    }

    /// Whether the arrays are in memory.
    #[getter]
    fn is_loaded(&self) -> bool {
        self.loaded.get().is_some()
    }

    /// Draws the spectrum of the layer's correction, or of its keys, with matplotlib; returns the axes.
    #[pyo3(signature = (ax = None))]
    fn plot_spectrum<'py>(slf: &Bound<'py, Self>, ax: Option<Bound<'py, PyAny>>) -> PyResult<Bound<'py, PyAny>> {
        call(slf.py(), "_plots", "spectrum", (slf, ax))
    }

    /// Returns the singular values of the correction of a low_rank or ternary layer, or the scales of the keys of a key_value layer,
    /// largest first; empty where there are none.
    fn spectrum<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyArray1<f32>>> {
        Ok(parts::spectrum(&**self.shared(py)?).into_pyarray(py))
    }

    fn __repr__(&self, py: Python<'_>) -> PyResult<String> {
        let (out_features, in_features) = self.shape(py)?;
        let name = match (self.model(), self.name()) {
            (Some(model), Some(layer)) => format!("{model}/{layer}: "),
            _ => String::new(),
        };
        let (method, bytes) = (self.method(py)?, self.stored_bytes(py)?);
        Ok(format!("<layerstore.Layer {name}{method}, {in_features} to {out_features}, {bytes} bytes>"))
    }

    fn _repr_html_<'py>(slf: &Bound<'py, Self>) -> PyResult<Bound<'py, PyAny>> {
        call(slf.py(), "_display", "layer", (slf,))
    }
}

/// Compresses a weight as a configuration says.
///
/// # Errors
/// When it, or a setting, is not what it has to be.
pub fn made(
    py: Python<'_>,
    weight: &Bound<'_, PyAny>,
    bias: Option<&Bound<'_, PyAny>>,
    calibration: Option<&Bound<'_, PyAny>>,
    config: impl FnOnce() -> layerstore::Result<MethodConfig> + Send,
) -> PyResult<Layer> {
    let weight = Given::new(weight)?;
    let weight = weight.matrix(py, "the weight")?;
    let bias = bias.map(vector).transpose()?;
    let calibration: Option<Statistics> = calibration.map(Calibration::read).transpose()?;
    let compress = || config()?.compress(weight, bias.as_ref().map(|bias| bias.view()), calibration.as_ref());
    Ok(Layer::of(compute(py, compress)?))
}

/// Returns an array of one dimension.
fn vector(value: &Bound<'_, PyAny>) -> PyResult<Array1<f32>> {
    let given = Given::new(value)?;
    let view = given.view();
    match view.ndim() {
        1 => Ok(view.iter().copied().collect()),
        found => Err(invalid(value.py(), "the bias", format!("{found} dimensions"), "1 dimension")),
    }
}
