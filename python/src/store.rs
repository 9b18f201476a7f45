//! The store.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use layerstore::layer::SharedLayer;
use layerstore::{
    CalibrationInputs, CalibrationText, DiskCacheOptions, ImportOptions, Reader, RepairOptions, RepairSource,
    Store as Inner, StoreOptions, VerifyDepth,
};
use ndarray::Array2;
use pyo3::exceptions::PyUserWarning;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict};

use crate::convert::{Given, call, json, plain};
use crate::errors::invalid;
use crate::layer::Layer;
use crate::lease::Lease;
use crate::models::{LanguageModel, TextEncoder};
use crate::modules::{AttentionBlock, Module};
use crate::progress::Telling;
use crate::runtime::{run, work_async, work_dropped};
use crate::snapshot::Snapshot;
use crate::{source, statistics};

/// An open store: one LanceDB directory that many models share. May be used by several threads at once.
#[pyclass(frozen, module = "layerstore")]
pub struct Store {
    /// The store.
    pub inner: Inner,
}

fn options(
    py: Python<'_>,
    cache_bytes: Option<u64>,
    verify_loads: bool,
    reader: Option<&str>,
    storage_options: Option<HashMap<String, String>>,
    disk_cache: Option<DiskCacheOptions>,
) -> PyResult<StoreOptions> {
    let storage_options = storage_options.unwrap_or_default().into_iter().collect();
    let mut options = StoreOptions { verify_loads, storage_options, disk_cache, ..StoreOptions::default() };
    if let Some(bytes) = cache_bytes {
        options.cache_bytes = bytes;
    }
    options.reader = match reader {
        None => None,
        Some("direct") => Some(Reader::Direct),
        Some("lance") => Some(Reader::Lance),
        Some(other) => return Err(invalid(py, "reader", format!("'{other}'"), "'direct' or 'lance'")),
    };
    Ok(options)
}

/// Opens a store at a path or URI.
///
/// `cache_bytes` bounds the loaded layers that are kept, 1 GiB where it is not said. `verify_loads=True` hashes every layer that is read.
/// `for_repair=True` opens a damaged store to verify and repair it. `storage_options` say how a store at `s3://` is reached, beside the
/// `AWS_` variables of the environment: `endpoint`, `region`, `access_key_id`, `secret_access_key` and others.
/// `disk_cache` is a directory that keeps copies of layers read from an object store, of `disk_cache_bytes` in all. Raises
/// `InvalidInputError` where there is no store.
#[pyfunction]
#[expect(clippy::too_many_arguments, reason = "keywords of Python")]
#[pyo3(signature = (uri, *, cache_bytes = None, verify_loads = false, reader = None, for_repair = false, storage_options = None, disk_cache = None, disk_cache_bytes = 10737418240))]
pub fn open(
    py: Python<'_>,
    uri: PathBuf,
    cache_bytes: Option<u64>,
    verify_loads: bool,
    reader: Option<&str>,
    for_repair: bool,
    storage_options: Option<HashMap<String, String>>,
    disk_cache: Option<PathBuf>,
    disk_cache_bytes: u64,
) -> PyResult<Store> {
    let disk_cache = disk_cache.map(|directory| DiskCacheOptions { directory, bytes: disk_cache_bytes });
    let options = options(py, cache_bytes, verify_loads, reader, storage_options, disk_cache)?;
    let uri = uri.to_string_lossy();
    let inner = match for_repair {
        true => run(py, Inner::open_for_repair(&uri, options))?,
        false => run(py, Inner::open_with(&uri, options))?,
    };
    Ok(Store { inner })
}

/// Opens a store at a path or URI, or makes an empty one there.
#[pyfunction]
#[expect(clippy::too_many_arguments, reason = "keywords of Python")]
#[pyo3(signature = (uri, *, cache_bytes = None, verify_loads = false, reader = None, storage_options = None, disk_cache = None, disk_cache_bytes = 10737418240))]
pub fn create(
    py: Python<'_>,
    uri: PathBuf,
    cache_bytes: Option<u64>,
    verify_loads: bool,
    reader: Option<&str>,
    storage_options: Option<HashMap<String, String>>,
    disk_cache: Option<PathBuf>,
    disk_cache_bytes: u64,
) -> PyResult<Store> {
    let disk_cache = disk_cache.map(|directory| DiskCacheOptions { directory, bytes: disk_cache_bytes });
    let options = options(py, cache_bytes, verify_loads, reader, storage_options, disk_cache)?;
    Ok(Store { inner: run(py, Inner::create_with(&uri.to_string_lossy(), options))? })
}

fn warn(py: Python<'_>, message: &str) -> PyResult<()> {
    let message = std::ffi::CString::new(message.replace('\0', " "))?;
    PyErr::warn(py, py.get_type::<PyUserWarning>().as_any(), &message, 1)
}

impl Store {
    fn newest(&self, py: Python<'_>) -> PyResult<Snapshot> {
        Ok(Snapshot::new(run(py, self.inner.latest())?, self.inner.uri()))
    }
}

#[pymethods]
impl Store {
    /// The store's address: an absolute path, or a URI.
    #[getter]
    fn uri(&self) -> &str {
        self.inner.uri()
    }

    /// Opens the latest version.
    fn latest(&self, py: Python<'_>) -> PyResult<Snapshot> {
        self.newest(py)
    }

    /// Opens the version that a snapshot's name, or a version's number, stands for.
    fn at(&self, py: Python<'_>, name: &Bound<'_, PyAny>) -> PyResult<Snapshot> {
        Ok(Snapshot::new(run(py, self.inner.at(&name.str()?.to_string()))?, self.inner.uri()))
    }

    /// Puts a model into the store as one new version, in the place of what was there under its name.
    ///
    /// `model` is a path (safetensors, a Hugging Face folder, GGUF, PyTorch, Keras), or a dictionary of tensors, which are read in place;
    /// `files` then has what belongs beside them: `{"config.json": path, bytes or text}`. `rules` say which layers are compressed how: a
    /// path, a text of TOML, a list of dictionaries. `calibration` is a file of statistics or of inputs, or a dictionary of them by layer;
    /// `calibration_text` a text that the model reads to be calibrated, `calibration_tokens` of it, each block with what the compressed
    /// blocks before it give, or with `calibration_inputs="dense"` what the model as it is gives.
    ///
    /// Layers that the store has already by the same recipe are not made again. `progress=True` shows a bar; a callable is told each step.
    /// Ctrl-C stops it, and nothing is committed then. Returns a dictionary: `version`, `layers` with their errors, bytes, and notes.
    #[pyo3(signature = (model, name, *, rules = None, calibration = None, calibration_text = None, calibration_tokens = 32_768, calibration_inputs = "compressed", files = None, message = None, progress = None))]
    #[expect(clippy::too_many_arguments, reason = "keywords of Python")]
    fn import_model<'py>(
        &self,
        py: Python<'py>,
        model: &Bound<'py, PyAny>,
        name: &str,
        rules: Option<&Bound<'py, PyAny>>,
        calibration: Option<&Bound<'py, PyAny>>,
        calibration_text: Option<String>,
        calibration_tokens: usize,
        calibration_inputs: &str,
        files: Option<&Bound<'py, PyDict>>,
        message: Option<String>,
        progress: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let folder = statistics::temporary(py)?;
        let telling = Telling::new(progress)?;
        let inputs = match calibration_inputs {
            "compressed" => CalibrationInputs::Compressed,
            "dense" => CalibrationInputs::Dense,
            other => return Err(invalid(py, "calibration_inputs", format!("'{other}'"), "'compressed' or 'dense'")),
        };
        let text = |text| CalibrationText { text, tokens: calibration_tokens, inputs };
        let options = ImportOptions {
            rules: source::rules(rules)?,
            calibration: calibration.map(|given| statistics::open(given, &folder.path)).transpose()?,
            calibration_text: calibration_text.map(text),
            message,
            progress: telling.progress(),
            cancel: telling.cancel.clone(),
        };
        let (source, cancel) = (source::open(model, files)?, telling.cancel.clone());
        let done = work_async(py, &cancel, || layerstore::import(&self.inner, source, name, options));
        let report = telling.ended(done)?;
        for rule in &report.unused_rules {
            warn(py, &format!("the rule at {rule} takes no layer of the model"))?;
        }
        if let Some(name) = report.unmatched_calibration.first() {
            let more = match report.unmatched_calibration.len() {
                1 => String::new(),
                all => format!(" and {} more", all - 1),
            };
            warn(py, &format!("calibration of '{name}'{more} is not used: the model has no layer of that name"))?;
        }
        plain(py, &report)
    }

    /// Compresses layers of a model by name, as `import_model` would, and commits nothing: an import of the same model by the same rules and
    /// calibration finds them, whichever process made them. `lease` keeps gc from them. Returns a dictionary: `layers` with their errors, and
    /// bytes.
    #[pyo3(signature = (model, layers, *, rules = None, calibration = None, files = None, progress = None))]
    #[expect(clippy::too_many_arguments, reason = "keywords of Python")]
    fn compress_layers<'py>(
        &self,
        py: Python<'py>,
        model: &Bound<'py, PyAny>,
        layers: Vec<String>,
        rules: Option<&Bound<'py, PyAny>>,
        calibration: Option<&Bound<'py, PyAny>>,
        files: Option<&Bound<'py, PyDict>>,
        progress: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let folder = statistics::temporary(py)?;
        let telling = Telling::new(progress)?;
        let options = ImportOptions {
            rules: source::rules(rules)?,
            calibration: calibration.map(|given| statistics::open(given, &folder.path)).transpose()?,
            progress: telling.progress(),
            cancel: telling.cancel.clone(),
            ..ImportOptions::default()
        };
        let (source, cancel) = (source::open(model, files)?, telling.cancel.clone());
        let done = work_async(py, &cancel, || layerstore::compress_layers(&self.inner, source, &layers, options));
        plain(py, &telling.ended(done)?)
    }

    /// Keeps gc from what is in the store, as long as the returned lease is not closed: `with store.lease():`.
    fn lease(&self, py: Python<'_>) -> PyResult<Lease> {
        Ok(Lease::of(run(py, self.inner.lease())?))
    }

    /// Says what an import would do, and stores nothing. Returns a dictionary: `layers` with their rules and bytes, `files`, notes.
    /// `check_values=False` reads no numbers, and so finds none that cannot be used.
    #[pyo3(signature = (model, *, rules = None, calibration = None, files = None, check_values = true))]
    fn plan<'py>(
        &self,
        py: Python<'py>,
        model: &Bound<'py, PyAny>,
        rules: Option<&Bound<'py, PyAny>>,
        calibration: Option<&Bound<'py, PyAny>>,
        files: Option<&Bound<'py, PyDict>>,
        check_values: bool,
    ) -> PyResult<Bound<'py, PyAny>> {
        let folder = statistics::temporary(py)?;
        let rules = source::rules(rules)?;
        let calibration = calibration.map(|given| statistics::open(given, &folder.path)).transpose()?;
        let source = source::open(model, files)?;
        let cancel = layerstore::Cancel::new();
        plain(
            py,
            &crate::runtime::work(py, &cancel, || {
                layerstore::preview(source, &rules, calibration.as_ref(), check_values)
            })?,
        )
    }

    /// Saves layers by name (`{name: Layer}`) in a model, beside its other layers, as one new version, and returns its number. Layers of
    /// these names are replaced.
    #[pyo3(signature = (model, layers, *, message = None))]
    fn save_layers(
        &self,
        py: Python<'_>,
        model: &str,
        layers: &Bound<'_, PyDict>,
        message: Option<&str>,
    ) -> PyResult<u64> {
        let read = |(name, layer): (Bound<'_, PyAny>, Bound<'_, PyAny>)| {
            let shared = layer.cast::<Layer>()?.get().shared(py)?.clone();
            Ok::<(String, SharedLayer), PyErr>((name.extract()?, shared))
        };
        let layers = layers.iter().map(read).collect::<PyResult<Vec<_>>>()?;
        run(py, self.inner.replace_layers(model, &layers, message))
    }

    /// Trains the codebooks of an attention block from inputs of its projections of queries and of keys, `[tokens, width]`, and commits
    /// them. `settings` make a block that is not there yet. Returns a dictionary.
    #[pyo3(signature = (model, layer, queries, keys, *, settings = None, epochs = 10, batch = 1024, anew = false, progress = None))]
    #[expect(clippy::too_many_arguments, reason = "keywords of Python")]
    fn train_codebooks<'py>(
        &self,
        py: Python<'py>,
        model: &str,
        layer: &str,
        queries: &Bound<'py, PyAny>,
        keys: &Bound<'py, PyAny>,
        settings: Option<&Bound<'py, PyDict>>,
        epochs: usize,
        batch: usize,
        anew: bool,
        progress: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let owned = |given: &Bound<'py, PyAny>, what: &str| -> PyResult<Array2<f32>> {
            Ok(Given::new(given)?.matrix(py, what)?.to_owned())
        };
        let inputs = (owned(queries, "inputs of the queries")?, owned(keys, "inputs of the keys")?);
        let config = settings.map(|given| {
            serde_json::from_value(json(given)?).map_err(|e| invalid(py, "settings", e, "those of rules"))
        });
        let training = layerstore::Training { config: config.transpose()?, epochs, batch, anew };
        let telling = Telling::new(progress)?;
        let (told, cancel) = (telling.progress(), telling.cancel.clone());
        let train = || layerstore::train_codebooks(&self.inner, model, layer, inputs, training, &*told, &cancel);
        let done = work_async(py, &cancel, train);
        plain(py, &telling.ended(done)?)
    }

    /// Names the latest version, or the one that `at` stands for. Returns a dictionary.
    #[pyo3(signature = (name, *, at = None))]
    fn create_snapshot<'py>(&self, py: Python<'py>, name: &str, at: Option<&str>) -> PyResult<Bound<'py, PyAny>> {
        let made = match at {
            Some(at) => run(py, self.inner.create_snapshot_at(name, at))?,
            None => run(py, self.inner.create_snapshot(name))?,
        };
        plain(py, &made)
    }

    /// Returns all snapshots, by version: dictionaries of `name`, `version` and `time`.
    fn snapshots<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        plain(py, &run(py, self.inner.snapshots())?)
    }

    /// Deletes a snapshot's name; its version stays until gc.
    fn delete_snapshot<'py>(&self, py: Python<'py>, name: &str) -> PyResult<Bound<'py, PyAny>> {
        plain(py, &run(py, self.inner.delete_snapshot(name))?)
    }

    /// Makes an older version the latest, as a new version.
    fn restore<'py>(&self, py: Python<'py>, name: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyAny>> {
        plain(py, &run(py, self.inner.restore(&name.str()?.to_string()))?)
    }

    /// Returns all versions, newest first, as dictionaries.
    fn log<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        plain(py, &run(py, self.inner.log())?)
    }

    /// Removes a model, as a new version, and returns its number. Older versions keep it.
    fn remove_model(&self, py: Python<'_>, model: &str) -> PyResult<u64> {
        run(py, self.inner.remove_model(model))
    }

    /// Gives a model another name, as a new version, and returns its number.
    fn rename_model(&self, py: Python<'_>, model: &str, name: &str) -> PyResult<u64> {
        run(py, self.inner.rename_model(model, name))
    }

    /// Shows what changed between two versions: dictionaries of layers that were `added`, `removed` and `changed`.
    #[pyo3(signature = (old, new = None))]
    fn diff<'py>(
        &self,
        py: Python<'py>,
        old: &Bound<'py, PyAny>,
        new: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let old = self.at(py, old)?;
        let new = new.map_or_else(|| self.newest(py), |new| self.at(py, new))?;
        old.diff(py, &new)
    }

    /// Removes what no snapshot reaches and no version younger than `older_than` seconds; only counts unless `apply`. Returns a dictionary.
    #[pyo3(signature = (*, older_than = 604_800.0, apply = false))]
    fn gc<'py>(&self, py: Python<'py>, older_than: f64, apply: bool) -> PyResult<Bound<'py, PyAny>> {
        let age = Duration::try_from_secs_f64(older_than);
        let age = age.map_err(|_| invalid(py, "older_than", older_than, "seconds, 0 or more"))?;
        // What was removed by then is gone, and gc can be run again: it is not dropped half-way.
        plain(py, &run(py, self.inner.gc(age, apply))?)
    }

    /// Looks for damage: `depth` is `'quick'` (counts rows), `'full'` (also hashes every artifact) or `'deep'` (also runs every layer).
    /// Returns a dictionary; `sound` says whether all is well. `progress` is called with `(done, total)`.
    #[pyo3(signature = (*, depth = "full", progress = None))]
    fn verify<'py>(&self, py: Python<'py>, depth: &str, progress: Option<Py<PyAny>>) -> PyResult<Bound<'py, PyAny>> {
        let depth = match depth {
            "quick" => VerifyDepth::Quick,
            "full" => VerifyDepth::Full,
            "deep" => VerifyDepth::Deep,
            other => return Err(invalid(py, "depth", format!("'{other}'"), "'quick', 'full' or 'deep'")),
        };
        let raised = Arc::new(Mutex::new(None));
        let first = raised.clone();
        let seen = move |done: usize, total: usize| {
            let mut first = first.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(told) = progress.as_ref().filter(|_| first.is_none())
                && let Err(error) = Python::attach(|py| told.call1(py, (done, total)).map(|_| ()))
            {
                *first = Some(error);
            }
        };
        let report = work_dropped(py, || self.inner.verify_with(depth, seen));
        raised.lock().unwrap_or_else(PoisonError::into_inner).take().map_or(Ok(()), Err)?;
        let report = report?;
        let found = plain(py, &report)?;
        found.set_item("sound", report.is_sound())?;
        Ok(found)
    }

    /// Makes a damaged store whole, as far as that can be done, from checkpoints (paths) and other stores. Returns a dictionary.
    #[pyo3(signature = (sources = vec![], *, calibration = None, progress = None))]
    fn repair<'py>(
        &self,
        py: Python<'py>,
        sources: Vec<Bound<'py, PyAny>>,
        calibration: Option<&Bound<'py, PyAny>>,
        progress: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let folder = statistics::temporary(py)?;
        let read = |given: &Bound<'py, PyAny>| {
            Ok::<_, PyErr>(match given.cast::<Store>() {
                Ok(store) => RepairSource::Store(store.get().inner.clone()),
                Err(_) => RepairSource::Checkpoint(source::open(given, None)?),
            })
        };
        let telling = Telling::new(progress)?;
        let options = RepairOptions {
            sources: sources.iter().map(read).collect::<PyResult<_>>()?,
            calibration: calibration.map(|given| statistics::open(given, &folder.path)).transpose()?,
            progress: telling.progress(),
            cancel: telling.cancel.clone(),
        };
        let cancel = telling.cancel.clone();
        let done = work_async(py, &cancel, || layerstore::repair(&self.inner, options));
        plain(py, &telling.ended(done)?)
    }

    /// Makes, or makes anew, the index of every table of keys, which `nearest` uses. Returns a list of dictionaries.
    fn index_keys<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        plain(py, &work_dropped(py, || self.inner.index_keys(|_, _| {}))?)
    }

    /// Brings the store to the newest format that this version knows, and returns it.
    fn upgrade(&self, py: Python<'_>) -> PyResult<u32> {
        run(py, self.inner.upgrade())
    }

    /// The store's format version.
    #[getter]
    fn format(&self, py: Python<'_>) -> PyResult<u32> {
        run(py, self.inner.format())
    }

    /// Bytes of loaded layers that are held now.
    #[getter]
    fn cached_bytes(&self, py: Python<'_>) -> PyResult<u64> {
        run(py, async { Ok(self.inner.cached_bytes().await) })
    }

    /// Returns every model of the latest version, as dictionaries.
    fn models<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        self.newest(py)?.models(py)
    }

    /// Returns the layers of a model of the latest version, as dictionaries.
    fn layers<'py>(&self, py: Python<'py>, model: &str) -> PyResult<Bound<'py, PyAny>> {
        self.newest(py)?.layers(py, model)
    }

    /// Returns what the latest version knows of a model or a layer, as a dictionary.
    #[pyo3(signature = (model, layer = None))]
    fn show<'py>(&self, py: Python<'py>, model: &str, layer: Option<&str>) -> PyResult<Bound<'py, PyAny>> {
        self.newest(py)?.show(py, model, layer)
    }

    /// Returns a layer of the latest version; its arrays are read when it is first used.
    fn layer(&self, py: Python<'_>, model: &str, layer: &str) -> PyResult<Layer> {
        self.newest(py)?.layer(py, model, layer)
    }

    /// Returns all layers of a model of the latest version, by name.
    fn handles<'py>(&self, py: Python<'py>, model: &str) -> PyResult<Bound<'py, PyDict>> {
        self.newest(py)?.handles(py, model)
    }

    /// Returns the content of a file that is kept with a model.
    fn file<'py>(&self, py: Python<'py>, model: &str, name: &str) -> PyResult<Bound<'py, PyBytes>> {
        self.newest(py)?.file(py, model, name)
    }

    /// Opens a model of the latest version as a language model.
    fn language_model(&self, py: Python<'_>, model: &str) -> PyResult<LanguageModel> {
        self.newest(py)?.language_model(py, model)
    }

    /// Opens a model of the latest version as a text encoder.
    fn encoder(&self, py: Python<'_>, model: &str) -> PyResult<TextEncoder> {
        self.newest(py)?.encoder(py, model)
    }

    /// Loads a module of the latest version.
    fn module(&self, py: Python<'_>, model: &str, name: &str) -> PyResult<Module> {
        self.newest(py)?.module(py, model, name)
    }

    /// Loads an attention block of the latest version.
    fn attention(&self, py: Python<'_>, model: &str, layer: &str) -> PyResult<AttentionBlock> {
        self.newest(py)?.attention(py, model, layer)
    }

    /// Counts what the store holds, as a dictionary.
    fn stats<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        self.newest(py)?.stats(py)
    }

    /// Finds the keys of all layers of the latest version that point most nearly along some directions.
    #[pyo3(signature = (directions, *, count = 10, models = None))]
    fn nearest<'py>(
        &self,
        py: Python<'py>,
        directions: &Bound<'py, PyAny>,
        count: usize,
        models: Option<Vec<String>>,
    ) -> PyResult<Bound<'py, PyAny>> {
        self.newest(py)?.nearest(py, directions, count, models)
    }

    /// Measures a model of the latest version: `Snapshot.evaluate`.
    #[pyo3(signature = (model, activations, *, checkpoint = None))]
    fn evaluate<'py>(
        &self,
        py: Python<'py>,
        model: &str,
        activations: &Bound<'py, PyAny>,
        checkpoint: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<Bound<'py, PyAny>> {
        self.newest(py)?.evaluate(py, model, activations, checkpoint)
    }

    /// Writes a model of the latest version for other programs: `Snapshot.export`.
    #[pyo3(signature = (model, output, **options))]
    fn export<'py>(
        slf: &Bound<'py, Self>,
        model: &str,
        output: PathBuf,
        options: Option<&Bound<'py, PyDict>>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let newest = slf.get().newest(slf.py())?.into_pyobject(slf.py())?;
        newest.getattr("export")?.call((model, output), options)
    }

    /// Draws the errors of a model's layers with matplotlib; returns the axes.
    #[pyo3(signature = (model, ax = None))]
    fn plot_errors<'py>(
        &self,
        py: Python<'py>,
        model: &str,
        ax: Option<Bound<'py, PyAny>>,
    ) -> PyResult<Bound<'py, PyAny>> {
        self.newest(py)?.plot_errors(py, model, ax)
    }

    fn __repr__(&self) -> String {
        format!("<layerstore.Store at {}>", self.inner.uri())
    }

    fn _repr_html_<'py>(slf: &Bound<'py, Self>) -> PyResult<Bound<'py, PyAny>> {
        call(slf.py(), "_display", "store", (slf,))
    }

    // Opened anew: a process of its own shares the directory, not the memory.
    fn __reduce__<'py>(&self, py: Python<'py>) -> PyResult<(Bound<'py, PyAny>, (String,))> {
        Ok((py.import("layerstore")?.getattr("open")?, (self.inner.uri().to_owned(),)))
    }
}
