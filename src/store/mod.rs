//! The store: Arrow tables in one LanceDB directory that many models share, with versioned snapshots.
//!
//! Artifacts (the parts of one compressed layer) are immutable and named by their content; the catalogue says which
//! artifact is which model's which layer, and every change of it is one version. See `docs/design.md` for the tables
//! and the commit protocol.

mod attention;
mod catalog;
mod data;
mod files;
mod gc;
mod handle;
mod local;
mod location;
mod lock;
mod module;
mod names;
mod nearest;
mod on_disk;
mod plain;
mod pread;
mod record;
mod room;
mod schema;
mod single;
mod snapshot;
mod stats;
mod tables;
mod verify;
mod writer;

use std::sync::Arc;

use moka::future::Cache;

pub use attention::AttentionHandle;
pub use catalog::{SnapshotInfo, VersionInfo};
pub use gc::GcReport;
pub use handle::LayerHandle;
pub use lance_io::object_store::WrappingObjectStore;
pub use module::ModuleHandle;
pub(crate) use module::source_tensors;
pub use nearest::{KeyIndexReport, NearKey};
pub use record::{ErrorBasis, LayerRecord, Places, Source, SourceTensor};
pub use schema::FORMAT_VERSION;
pub use single::{load_backend, save_backend};
pub use snapshot::{Diff, LayerChange, LayerState, ModelSummary, Snapshot, State};
pub use stats::Stats;
pub use verify::{CorruptArtifact, LayerName, VerifyReport};
pub use writer::{Made, Stored, Writer, check_model_name};

use self::catalog::Catalogue;
use self::data::Data;
use self::location::Location;
use crate::error::{Error, Result};
use crate::layer::{ArtifactId, SharedLayer, layer_from_parts};

/// Bytes of loaded layers that a store keeps when nothing else is asked for.
pub const DEFAULT_CACHE_BYTES: u64 = 1 << 30;

/// How a store is opened.
#[derive(Clone)]
pub struct StoreOptions {
    /// Bytes of loaded layers to keep, shared by all handles.
    pub cache_bytes: u64,
    /// Replaces the file system that is written to: the place to inject faults. A local store syncs what it writes
    /// when this is `None`.
    pub storage: Option<Arc<dyn WrappingObjectStore>>,
}

impl Default for StoreOptions {
    fn default() -> Self {
        StoreOptions { cache_bytes: DEFAULT_CACHE_BYTES, storage: None }
    }
}

/// An open store. Cloning shares it; every method can be called from many tasks at once.
#[derive(Debug, Clone)]
pub struct Store {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    location: Location,
    data: Arc<Data>,
    layers: Cache<ArtifactId, SharedLayer>,
    /// The latest version as it was last seen.
    catalogue: std::sync::Mutex<Catalogue>,
}

impl Store {
    /// Opens a store at a local path or an object-store URI.
    ///
    /// # Errors
    /// When there is no store, it is of a format that this build does not know, or the storage refuses.
    pub async fn open(uri: &str) -> Result<Self> {
        Self::open_with(uri, StoreOptions::default()).await
    }

    /// [`Store::open`] with options.
    ///
    /// # Errors
    /// As [`Store::open`].
    pub async fn open_with(uri: &str, options: StoreOptions) -> Result<Self> {
        let location = Location::new(uri, options.storage.clone())?;
        let catalogue = catalog::open(&location, None).await?;
        Ok(Self::new(location, catalogue, options))
    }

    /// Opens a store, or makes an empty one in a directory that is empty or does not exist.
    ///
    /// # Errors
    /// As [`Store::open`], and when the directory holds something else.
    pub async fn create(uri: &str) -> Result<Self> {
        Self::create_with(uri, StoreOptions::default()).await
    }

    /// [`Store::create`] with options.
    ///
    /// # Errors
    /// As [`Store::create`].
    pub async fn create_with(uri: &str, options: StoreOptions) -> Result<Self> {
        let location = Location::new(uri, options.storage.clone())?;
        let catalogue = catalog::open_or_create(&location).await?;
        Ok(Self::new(location, catalogue, options))
    }

    fn new(location: Location, catalogue: lance::Dataset, options: StoreOptions) -> Self {
        // moka weighs in 32 bits: count KiB.
        let layers = Cache::builder()
            .max_capacity(options.cache_bytes >> 10)
            .weigher(|_, layer: &SharedLayer| u32::try_from(1 + (layer.memory_bytes() >> 10)).unwrap_or(u32::MAX))
            .build();
        let data = Arc::new(Data::new(location.clone()));
        Store { inner: Arc::new(Inner { location, data, layers, catalogue: std::sync::Mutex::new(catalogue.into()) }) }
    }

    /// Where the store lies.
    pub fn uri(&self) -> &str {
        self.inner.location.uri()
    }

    /// LanceDB's own connection to the store's directory, to query its tables.
    ///
    /// # Errors
    /// When LanceDB cannot connect.
    pub async fn lancedb(&self) -> Result<lancedb::Connection> {
        let connect = lancedb::connect(self.uri()).session(self.inner.location.session().clone()).execute();
        connect
            .await
            .map_err(|e| Error::Storage { action: format!("connecting to {}", self.uri()), message: e.to_string() })
    }

    /// The latest version.
    ///
    /// # Errors
    /// When the storage refuses.
    pub async fn latest(&self) -> Result<Snapshot> {
        let latest = self.catalogue().latest().await?;
        *self.inner.catalogue.lock().unwrap_or_else(|e| e.into_inner()) = latest.clone();
        Ok(Snapshot::new(self.clone(), latest, None))
    }

    /// The version that a snapshot's name, or a version's number, stands for.
    ///
    /// # Errors
    /// When there is no such snapshot or version.
    pub async fn at(&self, name: &str) -> Result<Snapshot> {
        let version = catalog::resolve(self.catalogue().dataset(), name).await?;
        let dataset = catalog::open(&self.inner.location, Some(version)).await?;
        Ok(Snapshot::new(self.clone(), dataset.into(), Some(name)))
    }

    fn catalogue(&self) -> Catalogue {
        self.inner.catalogue.lock().unwrap_or_else(|e| e.into_inner()).clone()
    }

    /// Names the latest version.
    ///
    /// # Errors
    /// When the name is taken or not valid.
    pub async fn create_snapshot(&self, name: &str) -> Result<SnapshotInfo> {
        catalog::create_snapshot(&self.inner.location, name).await
    }

    /// All snapshots, by version.
    ///
    /// # Errors
    /// When the storage refuses.
    pub async fn snapshots(&self) -> Result<Vec<SnapshotInfo>> {
        catalog::list_snapshots(self.catalogue().dataset()).await
    }

    /// Deletes a snapshot's name; its version stays until gc.
    ///
    /// # Errors
    /// When there is no such snapshot.
    pub async fn delete_snapshot(&self, name: &str) -> Result<SnapshotInfo> {
        catalog::delete_snapshot(&self.inner.location, name).await
    }

    /// Makes an older version the latest, as a new version, and gives the new version with the name that was restored.
    ///
    /// # Errors
    /// When there is no such snapshot or version.
    pub async fn restore(&self, name: &str) -> Result<SnapshotInfo> {
        catalog::restore(&self.inner.location, name).await
    }

    /// All versions, newest first.
    ///
    /// # Errors
    /// When the storage refuses.
    pub async fn log(&self) -> Result<Vec<VersionInfo>> {
        let latest = self.latest().await?;
        catalog::log(latest.dataset()).await
    }

    /// Begins a change of a model. gc waits until it is committed or dropped.
    ///
    /// # Errors
    /// When the store cannot be written.
    pub async fn writer(&self) -> Result<Writer> {
        Writer::begin(&self.inner.location, &self.inner.data).await
    }

    /// Removes rows and files that no snapshot, and no version younger than `older_than`, reaches; only counts them
    /// unless `apply`.
    ///
    /// # Errors
    /// When an import is at work and does not finish in time, or the storage refuses.
    pub async fn gc(&self, older_than: std::time::Duration, apply: bool) -> Result<GcReport> {
        gc::collect(&self.inner.location, older_than, apply).await
    }

    /// Reads every artifact and holds it against its name. `seen` is told how many of how many are done.
    ///
    /// # Errors
    /// When the catalogue or the list of artifacts cannot be read; a corrupt artifact is no error but a finding.
    pub async fn verify(&self, seen: impl Fn(usize, usize) + Send + Sync + 'static) -> Result<VerifyReport> {
        verify::verify(self, Arc::new(seen)).await
    }

    /// Reads layers into the cache ahead of their use, several at a time.
    ///
    /// # Errors
    /// When one of them cannot be read.
    pub async fn prefetch(&self, handles: &[LayerHandle]) -> Result<()> {
        use futures::{StreamExt, TryStreamExt};
        const AT_ONCE: usize = 4;
        let loads = handles.iter().map(|h| self.load(h.shared_record()));
        futures::stream::iter(loads).buffer_unordered(AT_ONCE).try_for_each(|_| async { Ok(()) }).await
    }

    /// An artifact's layer, from the cache or read now; concurrent callers wait for one read.
    async fn load(&self, record: &Arc<LayerRecord>) -> Result<SharedLayer> {
        let id = record.artifact;
        let built = move |parts| {
            layer_from_parts(parts).map_err(|e| match e {
                unknown @ Error::UnknownMethod { .. } => unknown,
                other => Error::Corrupt { artifact: id.to_string(), reason: other.to_string() },
            })
        };
        let read = async {
            let (data, wanted) = (self.inner.data.clone(), record.clone());
            // One task reads and builds it, where its files are at hand.
            let local = tokio::task::spawn_blocking(move || data.local_parts(&wanted).map(built)).await;
            if let Some(layer) = joined(local)? {
                return layer;
            }
            let parts = self.inner.data.layer_parts(record).await?;
            joined(tokio::task::spawn_blocking(move || built(parts)).await)?
        };
        self.inner.layers.try_get_with(id, read).await.map_err(Error::Shared)
    }

    /// Bytes of loaded layers held now.
    pub async fn cached_bytes(&self) -> u64 {
        self.inner.layers.run_pending_tasks().await;
        self.inner.layers.weighted_size() << 10
    }
}

/// What a blocking task gave; a panic in it goes on here.
pub(crate) fn joined<T>(done: std::result::Result<T, tokio::task::JoinError>) -> Result<T> {
    match done {
        Ok(value) => Ok(value),
        Err(e) if e.is_panic() => std::panic::resume_unwind(e.into_panic()),
        Err(_) => Err(Error::Cancelled),
    }
}
