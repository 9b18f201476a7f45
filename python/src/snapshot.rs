//! A version of the store, open for reading.

use std::path::PathBuf;

use layerstore::{
    ActivationsFile, CalibrateOptions, ExportDtype, ExportFormat, ExportOptions, SharedOptions, Snapshot as Version,
};
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict};
use serde_json::json;

use crate::convert::{Given, call, plain};
use crate::errors::{OrRaise, invalid};
use crate::layer::Layer;
use crate::models::{LanguageModel, TextEncoder};
use crate::modules::{AttentionBlock, Module};
use crate::progress::Telling;
use crate::runtime::{compute, run, work_async, work_dropped};

/// A version of the store, open for reading. What is committed later does not change it.
#[pyclass(frozen, module = "layerstore")]
pub struct Snapshot {
    /// The version.
    pub inner: Version,
    uri: String,
}

impl Snapshot {
    /// Wraps a version of the store at `uri`.
    pub fn new(inner: Version, uri: &str) -> Self {
        Snapshot { inner, uri: uri.to_owned() }
    }
}

#[pymethods]
impl Snapshot {
    /// The store's address: an absolute path, or a URI.
    #[getter]
    fn uri(&self) -> &str {
        &self.uri
    }

    /// The version's number.
    #[getter]
    fn version(&self) -> u64 {
        self.inner.version()
    }

    /// Returns every model, by name: dictionaries of `model`, `layers`, `methods`, `files`, `dense_bytes`, `stored_bytes` and
    /// `created_at`.
    pub fn models<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        plain(py, &run(py, self.inner.models())?)
    }

    /// Returns the layers of a model, by name: rows of the catalogue, as dictionaries.
    pub fn layers<'py>(&self, py: Python<'py>, model: &str) -> PyResult<Bound<'py, PyAny>> {
        plain(py, &run(py, self.inner.layers(model))?)
    }

    /// Returns what the catalogue knows of a model, with its files and layers, or of one layer, as a dictionary.
    #[pyo3(signature = (model, layer = None))]
    pub fn show<'py>(&self, py: Python<'py>, model: &str, layer: Option<&str>) -> PyResult<Bound<'py, PyAny>> {
        if let Some(layer) = layer {
            return plain(py, run(py, self.inner.layer(model, layer))?.record());
        }
        let (layers, files) = (run(py, self.inner.layers(model))?, run(py, self.inner.files(model))?);
        let summary = run(py, self.inner.summary(model))?;
        let mut all = serde_json::to_value(&summary).unwrap_or_default();
        if let Some(all) = all.as_object_mut() {
            all.insert("layers".into(), json!(layers));
            all.insert("files".into(), json!(files));
        }
        plain(py, &all)
    }

    /// Returns a layer by name; its arrays are read when it is first used.
    pub fn layer(&self, py: Python<'_>, model: &str, layer: &str) -> PyResult<Layer> {
        let handle = run(py, self.inner.layer(model, layer))?;
        Ok(Layer::stored(self.inner.clone(), handle, &self.uri))
    }

    /// Returns all layers of a model by name; their arrays are read when they are first used.
    pub fn handles<'py>(&self, py: Python<'py>, model: &str) -> PyResult<Bound<'py, PyDict>> {
        let dict = PyDict::new(py);
        for handle in run(py, self.inner.handles(model))? {
            let name = handle.record().layer.clone();
            dict.set_item(name, Layer::stored(self.inner.clone(), handle, &self.uri))?;
        }
        Ok(dict)
    }

    /// Returns the content of a file that is kept with a model.
    pub fn file<'py>(&self, py: Python<'py>, model: &str, name: &str) -> PyResult<Bound<'py, PyBytes>> {
        Ok(PyBytes::new(py, &run(py, self.inner.file(model, name))?))
    }

    /// Opens a model as a language model: all its layers are loaded.
    pub fn language_model(&self, py: Python<'_>, model: &str) -> PyResult<LanguageModel> {
        let opened = work_dropped(py, || self.inner.language_model(model))?;
        Ok(LanguageModel::new(opened, model))
    }

    /// Opens a model as a text encoder: all its layers are loaded.
    pub fn encoder(&self, py: Python<'_>, model: &str) -> PyResult<TextEncoder> {
        let opened = work_dropped(py, || self.inner.encoder(model))?;
        Ok(TextEncoder::new(opened, model))
    }

    /// Loads a module, such as a gated unit or a recurrent layer, with all that is behind it.
    pub fn module(&self, py: Python<'_>, model: &str, name: &str) -> PyResult<Module> {
        let handle = run(py, self.inner.module(model, name))?;
        Ok(Module { module: run(py, handle.load())? })
    }

    /// Loads an attention block, with its projections where they are stored.
    pub fn attention(&self, py: Python<'_>, model: &str, layer: &str) -> PyResult<AttentionBlock> {
        let handle = run(py, self.inner.attention(model, layer))?;
        Ok(AttentionBlock { block: run(py, handle.load())? })
    }

    /// Counts what the store holds, as a dictionary.
    pub fn stats<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        plain(py, &run(py, self.inner.stats())?)
    }

    /// Finds, for each of some directions `[directions, length]`, the `count` keys of all layers that point most nearly along it, or
    /// against it. Returns a list for each direction.
    #[pyo3(signature = (directions, *, count = 10, models = None))]
    pub fn nearest<'py>(
        &self,
        py: Python<'py>,
        directions: &Bound<'py, PyAny>,
        count: usize,
        models: Option<Vec<String>>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let given = Given::new(directions)?;
        let (rows, _) = given.rows(py, "the directions")?;
        let view = rows.view();
        plain(py, &run(py, self.inner.nearest_keys(view, count, models.as_deref()))?)
    }

    /// Finds which key_value layers of two models share directions: of each layer the `keys` keys of the largest scale, shared where
    /// |cosine| is `least` or more.
    #[pyo3(signature = (model, other, *, keys = 64, least = 0.9))]
    pub fn shared<'py>(
        &self,
        py: Python<'py>,
        model: &str,
        other: &str,
        keys: usize,
        least: f32,
    ) -> PyResult<Bound<'py, PyAny>> {
        let options = SharedOptions { keys, least };
        plain(py, &work_dropped(py, || layerstore::shared_directions(&self.inner, model, other, options))?)
    }

    /// Measures a model's layers on inputs, `{layer: [tokens, in_features]}` or a safetensors file of them, against their dense weights:
    /// those of `checkpoint`, else the dense ones of the store. Returns a dictionary with `layers`, `mean_relative_error`, and what could
    /// not be measured.
    #[pyo3(signature = (model, activations, *, checkpoint = None))]
    pub fn evaluate<'py>(
        &self,
        py: Python<'py>,
        model: &str,
        activations: &Bound<'py, PyAny>,
        checkpoint: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let folder = crate::statistics::temporary(py)?;
        let path: PathBuf = match activations.cast::<PyDict>() {
            Ok(_) => call(py, "_arrays", "write_activations", (activations, folder.path.clone()))?.extract()?,
            Err(_) => activations.extract()?,
        };
        let activations = compute(py, || ActivationsFile::open(&path))?;
        let checkpoint = checkpoint.map(|given| crate::source::open(given, None)).transpose()?;
        plain(py, &work_dropped(py, || layerstore::evaluate(&self.inner, model, activations, checkpoint))?)
    }

    /// Writes a model for other programs, to a file or a folder. `format` is `safetensors`, `huggingface`, `compressed-tensors`, `gguf` or
    /// `peft`; by the output's name where it is not said. `dtype` is `f32`, `f16`, `bf16` or `q8_0`. Returns a dictionary.
    #[pyo3(signature = (model, output, *, format = None, dtype = None, allow_approximate = false, allow_dequantize = false, without_correction = false, progress = None))]
    #[expect(clippy::too_many_arguments, reason = "keywords of Python")]
    pub fn export<'py>(
        &self,
        py: Python<'py>,
        model: &str,
        output: PathBuf,
        format: Option<String>,
        dtype: Option<String>,
        allow_approximate: bool,
        allow_dequantize: bool,
        without_correction: bool,
        progress: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let format = match format {
            None => ExportFormat::of_output(&output).or_raise(py)?,
            Some(name) => serde_json::from_value(json!(name)).map_err(|_| {
                let all: Vec<&str> = ExportFormat::ALL.iter().map(|format| format.as_str()).collect();
                invalid(py, "format", format!("'{name}'"), all.join(", "))
            })?,
        };
        let dtype = match dtype.as_deref() {
            None => None,
            Some("f32") => Some(ExportDtype::F32),
            Some("f16") => Some(ExportDtype::F16),
            Some("bf16") => Some(ExportDtype::Bf16),
            Some("q8_0") => Some(ExportDtype::Q8_0),
            Some(other) => return Err(invalid(py, "dtype", format!("'{other}'"), "'f32', 'f16', 'bf16' or 'q8_0'")),
        };
        let telling = Telling::new(progress)?;
        let options = ExportOptions {
            format,
            dtype,
            allow_approximate,
            allow_dequantize,
            without_correction,
            progress: telling.progress(),
            cancel: telling.cancel.clone(),
        };
        let cancel = telling.cancel.clone();
        let done = work_async(py, &cancel, || layerstore::export(&self.inner, model, &output, options));
        plain(py, &telling.ended(done)?)
    }

    /// Copies a model, or one layer with what it runs with, into another store, which `to` is or is the path of, as one new version there.
    /// Returns a dictionary.
    #[pyo3(signature = (model, to, *, layer = None, progress = None))]
    pub fn copy<'py>(
        &self,
        py: Python<'py>,
        model: &str,
        to: &Bound<'py, PyAny>,
        layer: Option<&str>,
        progress: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let uri: PathBuf = to.getattr("uri").unwrap_or_else(|_| to.clone()).extract()?;
        let to = run(py, layerstore::Store::open(&uri.to_string_lossy()))?;
        let telling = Telling::new(progress)?;
        let (told, cancel) = (telling.progress(), telling.cancel.clone());
        let done = work_async(py, &cancel, || layerstore::copy(&self.inner, model, layer, &to, &*told, &cancel));
        plain(py, &telling.ended(done)?)
    }

    /// Has a model read a text, and writes the statistics of its layers' inputs to a file, which imports take. Returns a dictionary.
    #[pyo3(signature = (model, text, output, *, tokens = 32_768, sample = 1024, progress = None))]
    #[expect(clippy::too_many_arguments, reason = "keywords of Python")]
    pub fn calibrate<'py>(
        &self,
        py: Python<'py>,
        model: &str,
        text: &str,
        output: PathBuf,
        tokens: usize,
        sample: usize,
        progress: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let telling = Telling::new(progress)?;
        let options = CalibrateOptions { tokens, sample, progress: telling.progress(), cancel: telling.cancel.clone() };
        let cancel = telling.cancel.clone();
        let done = work_async(py, &cancel, || layerstore::calibrate(&self.inner, model, text, &output, options));
        plain(py, &telling.ended(done)?)
    }

    /// Compares this version with a newer one, layer by layer. Returns a dictionary with `added`, `removed` and `changed`.
    pub fn diff<'py>(&self, py: Python<'py>, newer: &Snapshot) -> PyResult<Bound<'py, PyAny>> {
        plain(py, &run(py, self.inner.diff(&newer.inner))?)
    }

    /// Compares a model with another one, of this version or of `snapshot`, layer by layer. Returns a dictionary.
    #[pyo3(signature = (model, other, *, snapshot = None))]
    pub fn compare<'py>(
        &self,
        py: Python<'py>,
        model: &str,
        other: &str,
        snapshot: Option<&Snapshot>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let second = snapshot.map_or(&self.inner, |snapshot| &snapshot.inner);
        plain(py, &run(py, self.inner.compare(model, second, other))?)
    }

    /// Draws the errors of a model's layers with matplotlib; returns the axes.
    #[pyo3(signature = (model, ax = None))]
    pub fn plot_errors<'py>(
        &self,
        py: Python<'py>,
        model: &str,
        ax: Option<Bound<'py, PyAny>>,
    ) -> PyResult<Bound<'py, PyAny>> {
        call(py, "_plots", "errors", (self.layers(py, model)?, model, ax))
    }

    fn __repr__(&self) -> String {
        format!("<layerstore.Snapshot of {}, version {}>", self.uri, self.inner.version())
    }

    fn _repr_html_<'py>(slf: &Bound<'py, Self>) -> PyResult<Bound<'py, PyAny>> {
        call(slf.py(), "_display", "snapshot", (slf,))
    }
}
