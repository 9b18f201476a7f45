//! The store without async: the same types and verbs, each run to its end on a runtime of the store's own.
//!
//! ```no_run
//! use layerstore::blocking::Store;
//! use layerstore::layer::Accuracy;
//! # fn main() -> layerstore::Result<()> {
//! let store = Store::open("./layers")?;
//! let layer = store.latest()?.layer("my-model", "encoder.dense")?;
//! let y = layer.forward(ndarray::Array2::zeros((1, 384)).view(), Accuracy::Approximate)?.y;
//! # Ok(()) }
//! ```
//!
//! None of it may be called inside a tokio runtime.

use std::collections::BTreeMap;
use std::future::Future;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use ndarray::{Array1, Array2, ArrayView2};
use tokio::runtime::{Builder, Runtime};

use crate::architectures::{LanguageModel, TextEncoder};
use crate::compress::{
    self, ActivationsFile, CalibrateOptions, CalibrateReport, CompressReport, CopyReport, Evaluation, ExportOptions,
    ExportReport, ImportOptions, ImportReport, RepairOptions, RepairReport, SharedDirections, SharedOptions, Training,
    TrainingReport,
};
use crate::error::{Error, Result};
use crate::formats::TensorSource;
use crate::layer::{Accuracy, ArtifactId, Layer, Limit, Output, Parts, QueryHits, SharedLayer, VqAttentionLayer};
use crate::nn::{AttentionBlock, Module};
use crate::store::{
    self, ArtifactInfo, Comparison, DeletedSnapshot, Diff, GcReport, KeyIndexReport, LayerRecord, Lease, ModelFile,
    ModelSummary, NearKey, Provenance, SnapshotInfo, Stats, StoreOptions, VerifyDepth, VerifyReport, VersionInfo,
};
use crate::work::{Cancel, Progress};

/// Defines methods that run those of the same name of the async type to their ends.
macro_rules! run_to_end {
    ($type:literal, $self:ident => $inner:expr; $($(#[$doc:meta])* fn $name:ident($($arg:ident: $kind:ty),*) -> $out:ty;)+) => {
        $(
            $(#[$doc])*
            ///
            /// # Errors
            #[doc = concat!("As [`", $type, "::", stringify!($name), "`](crate::", $type, "::", stringify!($name), ").")]
            pub fn $name(&$self, $($arg: $kind),*) -> Result<$out> {
                $self.runtime.block_on($inner.$name($($arg),*))
            }
        )+
    };
}

/// An open store: [`Store`](crate::Store). Cloning shares it.
#[derive(Debug, Clone)]
pub struct Store {
    store: store::Store,
    runtime: Arc<Runtime>,
}

impl Store {
    /// Opens a store.
    ///
    /// # Errors
    /// As [`Store::open`](crate::Store::open).
    pub fn open(uri: &str) -> Result<Self> {
        Self::with(store::Store::open(uri))
    }

    /// Opens a store with options.
    ///
    /// # Errors
    /// As [`Store::open_with`](crate::Store::open_with).
    pub fn open_with(uri: &str, options: StoreOptions) -> Result<Self> {
        Self::with(store::Store::open_with(uri, options))
    }

    /// Opens a store to verify and repair it.
    ///
    /// # Errors
    /// As [`Store::open_for_repair`](crate::Store::open_for_repair).
    pub fn open_for_repair(uri: &str, options: StoreOptions) -> Result<Self> {
        Self::with(store::Store::open_for_repair(uri, options))
    }

    /// Opens a store, or makes an empty one.
    ///
    /// # Errors
    /// As [`Store::create`](crate::Store::create).
    pub fn create(uri: &str) -> Result<Self> {
        Self::with(store::Store::create(uri))
    }

    /// Opens a store, or makes an empty one, with options.
    ///
    /// # Errors
    /// As [`Store::create_with`](crate::Store::create_with).
    pub fn create_with(uri: &str, options: StoreOptions) -> Result<Self> {
        Self::with(store::Store::create_with(uri, options))
    }

    fn with(opening: impl Future<Output = Result<store::Store>>) -> Result<Self> {
        let runtime = runtime()?;
        let store = runtime.block_on(opening)?;
        Ok(Store { store, runtime: Arc::new(runtime) })
    }

    /// Returns the async store.
    pub fn inner(&self) -> &store::Store {
        &self.store
    }

    /// Runs an async operation on the store's runtime to its end: `store.run(store.inner().lancedb())`.
    pub fn run<T>(&self, work: impl Future<Output = T>) -> T {
        self.runtime.block_on(work)
    }

    /// Returns the store's address: an absolute path, or a URI.
    pub fn uri(&self) -> &str {
        self.store.uri()
    }

    /// Opens the latest version.
    ///
    /// # Errors
    /// As [`Store::latest`](crate::Store::latest).
    pub fn latest(&self) -> Result<Snapshot> {
        Ok(Snapshot { snapshot: self.run(self.store.latest())?, runtime: self.runtime.clone() })
    }

    /// Opens the version that a snapshot's name, or a version's number, stands for; `latest` is the latest version.
    ///
    /// # Errors
    /// As [`Store::at`](crate::Store::at).
    pub fn at(&self, name: &str) -> Result<Snapshot> {
        Ok(Snapshot { snapshot: self.run(self.store.at(name))?, runtime: self.runtime.clone() })
    }

    /// Begins a change of a model. gc waits until it is committed or dropped.
    ///
    /// # Errors
    /// As [`Store::writer`](crate::Store::writer).
    pub fn writer(&self) -> Result<Writer> {
        Ok(Writer { writer: self.run(self.store.writer())?, runtime: self.runtime.clone() })
    }

    /// Opens every version and snapshot, counts rows, reads every artifact and holds it against its name, and builds its layer.
    ///
    /// # Errors
    /// As [`Store::verify`](crate::Store::verify).
    pub fn verify(&self, seen: impl Fn(usize, usize) + Send + Sync + 'static) -> Result<VerifyReport> {
        self.run(self.store.verify(seen))
    }

    /// Looks for damage, as much as `depth` says, and says what helps. `seen` is told how many artifacts of how many were read.
    ///
    /// # Errors
    /// As [`Store::verify_with`](crate::Store::verify_with).
    pub fn verify_with(
        &self,
        depth: VerifyDepth,
        seen: impl Fn(usize, usize) + Send + Sync + 'static,
    ) -> Result<VerifyReport> {
        self.run(self.store.verify_with(depth, seen))
    }

    /// Makes the index of every table of keys that has enough of them, or makes it anew. `progress` is told of each table
    /// before its index is made.
    ///
    /// # Errors
    /// As [`Store::index_keys`](crate::Store::index_keys).
    pub fn index_keys(&self, progress: impl Fn(&str, usize)) -> Result<Vec<KeyIndexReport>> {
        self.run(self.store.index_keys(progress))
    }

    /// Reads layers into the cache ahead of their use, several at a time.
    ///
    /// # Errors
    /// As [`Store::prefetch`](crate::Store::prefetch).
    pub fn prefetch(&self, handles: &[LayerHandle]) -> Result<()> {
        let handles: Vec<store::LayerHandle> = handles.iter().map(|handle| handle.handle.clone()).collect();
        self.run(self.store.prefetch(&handles))
    }

    /// Returns the bytes of loaded layers held now.
    pub fn cached_bytes(&self) -> u64 {
        self.run(self.store.cached_bytes())
    }

    run_to_end! { "Store", self => self.store;
        /// Names the latest version.
        fn create_snapshot(name: &str) -> SnapshotInfo;
        /// Names the version that another snapshot's name, or a version's number, stands for.
        fn create_snapshot_at(name: &str, at: &str) -> SnapshotInfo;
        /// Returns all snapshots, by version.
        fn snapshots() -> Vec<SnapshotInfo>;
        /// Deletes a snapshot's name; its version stays until gc.
        fn delete_snapshot(name: &str) -> DeletedSnapshot;
        /// Makes an older version the latest, as a new version.
        fn restore(name: &str) -> SnapshotInfo;
        /// Returns all versions, newest first.
        fn log() -> Vec<VersionInfo>;
        /// Removes a model, as one new version.
        fn remove_model(model: &str) -> u64;
        /// Gives a model another name, as one new version.
        fn rename_model(model: &str, name: &str) -> u64;
        /// Keeps gc from what is in the store, until the lease is dropped.
        fn lease() -> Lease;
        /// Removes rows and files that nothing reaches that is kept; only counts them unless `apply`.
        fn gc(older_than: Duration, apply: bool) -> GcReport;
        /// Returns the store's format version.
        fn format() -> u32;
        /// Brings the store to the newest format version that this build knows, and returns it.
        fn upgrade() -> u32;
        /// Saves a module as layers of `model`, in the place of whatever was there under its name, as one new version.
        fn save_module(model: &str, name: &str, module: &Module, message: Option<&str>) -> u64;
        /// Saves layers by name, in the place of the layer `prefix` and of those behind it, as one new version.
        fn save_layers(model: &str, prefix: &str, layers: &[(String, SharedLayer)], message: Option<&str>) -> u64;
        /// Saves layers by name, each in the place of the model's layer of that name, as one new version.
        fn replace_layers(model: &str, layers: &[(String, SharedLayer)], message: Option<&str>) -> u64;
    }
}

/// A version of the store, open for reading: [`Snapshot`](crate::Snapshot).
#[derive(Debug, Clone)]
pub struct Snapshot {
    snapshot: store::Snapshot,
    runtime: Arc<Runtime>,
}

impl Snapshot {
    /// Returns the async snapshot.
    pub fn inner(&self) -> &store::Snapshot {
        &self.snapshot
    }

    /// Returns the version's number.
    pub fn version(&self) -> u64 {
        self.snapshot.version()
    }

    /// Returns a layer by name, to be loaded when it is used.
    ///
    /// # Errors
    /// As [`Snapshot::layer`](crate::Snapshot::layer).
    pub fn layer(&self, model: &str, layer: &str) -> Result<LayerHandle> {
        Ok(self.wrapped(self.runtime.block_on(self.snapshot.layer(model, layer))?))
    }

    /// Returns all layers of a model, by name, to be loaded when they are used.
    ///
    /// # Errors
    /// As [`Snapshot::handles`](crate::Snapshot::handles).
    pub fn handles(&self, model: &str) -> Result<Vec<LayerHandle>> {
        let handles = self.runtime.block_on(self.snapshot.handles(model))?;
        Ok(handles.into_iter().map(|handle| self.wrapped(handle)).collect())
    }

    /// Returns the layer of a row of this snapshot.
    pub fn handle(&self, record: LayerRecord) -> LayerHandle {
        self.wrapped(self.snapshot.handle(record))
    }

    fn wrapped(&self, handle: store::LayerHandle) -> LayerHandle {
        LayerHandle { handle, runtime: self.runtime.clone() }
    }

    /// Returns the attention block of that name, and the layers that it names.
    ///
    /// # Errors
    /// As [`Snapshot::attention`](crate::Snapshot::attention).
    pub fn attention(&self, model: &str, layer: &str) -> Result<AttentionHandle> {
        let handle = self.runtime.block_on(self.snapshot.attention(model, layer))?;
        Ok(AttentionHandle { handle, runtime: self.runtime.clone() })
    }

    /// Returns the module of that name with all that is behind it.
    ///
    /// # Errors
    /// As [`Snapshot::module`](crate::Snapshot::module).
    pub fn module(&self, model: &str, name: &str) -> Result<ModuleHandle> {
        let handle = self.runtime.block_on(self.snapshot.module(model, name))?;
        Ok(ModuleHandle { handle, runtime: self.runtime.clone() })
    }

    /// Compares this version with a `newer` one, layer by layer.
    ///
    /// # Errors
    /// As [`Snapshot::diff`](crate::Snapshot::diff).
    pub fn diff(&self, newer: &Snapshot) -> Result<Diff> {
        self.runtime.block_on(self.snapshot.diff(&newer.snapshot))
    }

    /// Compares a model of this snapshot with a model of this or another one, layer by layer.
    ///
    /// # Errors
    /// As [`Snapshot::compare`](crate::Snapshot::compare).
    pub fn compare(&self, model: &str, other: &Snapshot, other_model: &str) -> Result<Comparison> {
        self.runtime.block_on(self.snapshot.compare(model, &other.snapshot, other_model))
    }

    run_to_end! { "Snapshot", self => self.snapshot;
        /// Returns every layer, by model and name.
        fn records() -> Vec<LayerRecord>;
        /// Returns every model, by name.
        fn models() -> Vec<ModelSummary>;
        /// Returns the layers of a model, by name.
        fn layers(model: &str) -> Vec<LayerRecord>;
        /// Returns the files that belong to a model beside its layers, by name.
        fn files(model: &str) -> Vec<ModelFile>;
        /// Reads a file that belongs to a model.
        fn file(model: &str, name: &str) -> Bytes;
        /// Opens a model as a language model.
        fn language_model(model: &str) -> LanguageModel;
        /// Opens a model as a text encoder.
        fn encoder(model: &str) -> TextEncoder;
        /// Counts what the store holds, as this version tells.
        fn stats() -> Stats;
        /// Finds, for each of some directions `[directions, length]`, the `count` keys that point most nearly along it.
        fn nearest_keys(directions: ArrayView2<'_, f32>, count: usize, models: Option<&[String]>) -> Vec<Vec<NearKey>>;
    }
}

/// A layer by name: [`LayerHandle`](crate::LayerHandle).
#[derive(Debug, Clone)]
pub struct LayerHandle {
    handle: store::LayerHandle,
    runtime: Arc<Runtime>,
}

impl LayerHandle {
    /// Returns the async handle.
    pub fn inner(&self) -> &store::LayerHandle {
        &self.handle
    }

    /// Returns the layer's row of the catalogue.
    pub fn record(&self) -> &LayerRecord {
        self.handle.record()
    }

    run_to_end! { "LayerHandle", self => self.handle;
        /// Returns the layer in memory: from the store's cache, or read now.
        fn load() -> SharedLayer;
        /// Runs the layer, loaded where it is not yet.
        fn forward(x: ArrayView2<'_, f32>, accuracy: Accuracy) -> Output;
        /// Finds the hits of each row of `x` `[batch, in_features]` without the layer being loaded.
        fn search_on_disk(x: ArrayView2<'_, f32>, limit: Option<Limit>) -> Vec<QueryHits>;
        /// Reads one f32 key of the layer, `[in_features]`, by itself.
        fn key(key: u32) -> Array1<f32>;
        /// Copies this layer, with its names, into a store of its own at `uri`.
        fn copy_to(uri: &str) -> ();
    }
}

/// An attention block by name: [`AttentionHandle`](crate::AttentionHandle).
#[derive(Debug, Clone)]
pub struct AttentionHandle {
    handle: store::AttentionHandle,
    runtime: Arc<Runtime>,
}

impl AttentionHandle {
    /// Returns the async handle, which has those of the block's layers.
    pub fn inner(&self) -> &store::AttentionHandle {
        &self.handle
    }

    /// Returns what names the block's content, as [`AttentionHandle::id`](crate::AttentionHandle::id).
    pub fn id(&self) -> String {
        self.handle.id()
    }

    run_to_end! { "AttentionHandle", self => self.handle;
        /// Loads codebooks and settings.
        fn load_attention() -> VqAttentionLayer;
        /// Loads the block, ready to run.
        fn load() -> AttentionBlock;
    }
}

/// A module by name: [`ModuleHandle`](crate::ModuleHandle).
#[derive(Debug, Clone)]
pub struct ModuleHandle {
    handle: store::ModuleHandle,
    runtime: Arc<Runtime>,
}

impl ModuleHandle {
    /// Returns the async handle.
    pub fn inner(&self) -> &store::ModuleHandle {
        &self.handle
    }

    /// Returns the layers that it is made of, by name.
    pub fn layers(&self) -> &BTreeMap<String, store::LayerHandle> {
        self.handle.layers()
    }

    run_to_end! { "ModuleHandle", self => self.handle;
        /// Loads the module, ready to run.
        fn load() -> Module;
    }
}

/// One change of a model, from its first artifact to its commit: [`Writer`](crate::Writer).
#[derive(Debug)]
pub struct Writer {
    writer: store::Writer,
    runtime: Arc<Runtime>,
}

impl Writer {
    /// Returns the artifact that was made by this recipe, if the store has it.
    ///
    /// # Errors
    /// As [`Writer::made_by`](crate::Writer::made_by).
    pub fn made_by(&mut self, recipe: &[u8; 32]) -> Result<Option<&ArtifactInfo>> {
        self.runtime.block_on(self.writer.made_by(recipe))
    }

    /// Returns the artifact that was made by this recipe, if the store has it and it is what was written.
    ///
    /// # Errors
    /// As [`Writer::reusable`](crate::Writer::reusable).
    pub fn reusable(&mut self, recipe: &[u8; 32]) -> Result<Option<ArtifactInfo>> {
        self.runtime.block_on(self.writer.reusable(recipe))
    }

    /// Returns the bytes of parts written so far; what the store held already is not counted.
    pub fn written_bytes(&self) -> u64 {
        self.writer.written_bytes()
    }

    /// Adds an artifact, unless the store has it as it was written. Returns its name, and whether it is written.
    ///
    /// # Errors
    /// As [`Writer::add`](crate::Writer::add).
    pub fn add(&mut self, parts: &Parts, provenance: Provenance) -> Result<(ArtifactId, bool)> {
        self.runtime.block_on(self.writer.add(parts, provenance))
    }

    /// Writes what was gathered.
    ///
    /// # Errors
    /// As [`Writer::flush`](crate::Writer::flush).
    pub fn flush(&mut self) -> Result<()> {
        self.runtime.block_on(self.writer.flush())
    }

    /// Makes `records` all that the store holds of `model`, as one new version, and returns its number.
    ///
    /// # Errors
    /// As [`Writer::commit`](crate::Writer::commit).
    pub fn commit(self, model: &str, records: &[LayerRecord], message: Option<&str>) -> Result<u64> {
        self.runtime.block_on(self.writer.commit(model, records, message))
    }

    /// Puts `records` in the place of the model's layers of the same names, as one new version, and returns its number.
    ///
    /// # Errors
    /// As [`Writer::commit_layers`](crate::Writer::commit_layers).
    pub fn commit_layers(self, model: &str, records: &[LayerRecord], message: Option<&str>) -> Result<u64> {
        self.runtime.block_on(self.writer.commit_layers(model, records, message))
    }
}

/// Imports a source as a model, as one new version: [`import`](crate::import).
///
/// # Errors
/// As there.
pub fn import(
    store: &Store,
    source: Arc<dyn TensorSource>,
    model: &str,
    options: ImportOptions,
) -> Result<ImportReport> {
    store.run(compress::import(&store.store, source, model, options))
}

/// Compresses layers of a source, and commits nothing: [`compress_layers`](crate::compress_layers).
///
/// # Errors
/// As there.
pub fn compress_layers(
    store: &Store,
    source: Arc<dyn TensorSource>,
    layers: &[String],
    options: ImportOptions,
) -> Result<CompressReport> {
    store.run(compress::compress_layers(&store.store, source, layers, options))
}

/// Makes a damaged store whole, as far as that can be done: [`repair`](crate::repair).
///
/// # Errors
/// As there.
pub fn repair(store: &Store, options: RepairOptions) -> Result<RepairReport> {
    store.run(compress::repair(&store.store, options))
}

/// Writes a model as a safetensors checkpoint: [`export`](crate::export).
///
/// # Errors
/// As there.
pub fn export(snapshot: &Snapshot, model: &str, output: &Path, options: ExportOptions) -> Result<ExportReport> {
    snapshot.runtime.block_on(compress::export(&snapshot.snapshot, model, output, options))
}

/// Copies a model, or a layer with what it runs with, into another store: [`copy`](crate::copy).
///
/// # Errors
/// As there.
pub fn copy(
    snapshot: &Snapshot,
    model: &str,
    layer: Option<&str>,
    to: &Store,
    progress: &dyn Progress,
    cancel: &Cancel,
) -> Result<CopyReport> {
    snapshot.runtime.block_on(compress::copy(&snapshot.snapshot, model, layer, &to.store, progress, cancel))
}

/// Has a stored model read a text, and writes the statistics of its layers' inputs: [`calibrate`](crate::calibrate()).
///
/// # Errors
/// As [`calibrate`](crate::calibrate()).
pub fn calibrate(
    snapshot: &Snapshot,
    model: &str,
    text: &str,
    output: &Path,
    options: CalibrateOptions,
) -> Result<CalibrateReport> {
    snapshot.runtime.block_on(compress::calibrate(&snapshot.snapshot, model, text, output, options))
}

/// Measures a model's layers on inputs, against their dense weights: [`evaluate`](crate::evaluate).
///
/// # Errors
/// As there.
pub fn evaluate(
    snapshot: &Snapshot,
    model: &str,
    activations: ActivationsFile,
    checkpoint: Option<Arc<dyn TensorSource>>,
) -> Result<Evaluation> {
    snapshot.runtime.block_on(compress::evaluate(&snapshot.snapshot, model, activations, checkpoint))
}

/// Returns a layer as exact as the snapshot has it: [`exact_layer`](crate::exact_layer).
///
/// # Errors
/// As there.
pub fn exact_layer(snapshot: &Snapshot, handle: &LayerHandle) -> Result<SharedLayer> {
    snapshot.runtime.block_on(compress::exact_layer(&snapshot.snapshot, &handle.handle))
}

/// Trains the codebooks of an attention block from inputs of its projections, queries' and keys':
/// [`train_codebooks`](crate::train_codebooks).
///
/// # Errors
/// As there.
pub fn train_codebooks(
    store: &Store,
    model: &str,
    layer: &str,
    inputs: (Array2<f32>, Array2<f32>),
    training: Training,
    progress: &dyn Progress,
    cancel: &Cancel,
) -> Result<TrainingReport> {
    store.run(compress::train_codebooks(&store.store, model, layer, inputs, training, progress, cancel))
}

/// Finds which layers of two models share directions: [`shared_directions`](crate::shared_directions).
///
/// # Errors
/// As there.
pub fn shared_directions(
    snapshot: &Snapshot,
    model: &str,
    other: &str,
    options: SharedOptions,
) -> Result<Vec<SharedDirections>> {
    snapshot.runtime.block_on(compress::shared_directions(&snapshot.snapshot, model, other, options))
}

/// Writes a layer into a store of its own at `uri`: [`save_backend`](crate::save_backend).
///
/// # Errors
/// As there.
pub fn save_backend(layer: &dyn Layer, uri: &str) -> Result<()> {
    runtime()?.block_on(store::save_backend(layer, uri))
}

/// Loads the layer of a store that [`save_backend`] made: [`load_backend`](crate::load_backend).
///
/// # Errors
/// As there.
pub fn load_backend(uri: &str) -> Result<SharedLayer> {
    runtime()?.block_on(store::load_backend(uri))
}

fn runtime() -> Result<Runtime> {
    Builder::new_multi_thread().enable_all().build().map_err(|e| Error::io("the store's runtime", e))
}
