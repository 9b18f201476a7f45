//! A store as it is opened: what snapshots, writers and upkeep come from.

use std::sync::Arc;
use std::time::Duration;

use futures::{StreamExt, TryStreamExt};

use super::catalogue;
use super::disk_cache::{DiskCache, DiskCacheOptions};
use super::gc;
use super::handle::LayerHandle;
use super::heal;
use super::location::Location;
use super::lock::{self, Lease};
use super::models;
use super::on_wait::OnWait;
use super::reader::Reader;
use super::s3::StorageOptions;
use super::shared::Shared;
use super::snapshot::Snapshot;
use super::survey::GcReport;
use super::testing::Hooks;
use super::upgrade;
use super::verify::{self, VerifyDepth, VerifyReport};
use super::versions::{self, DeletedSnapshot, SnapshotInfo, VersionInfo};
use super::writer::Writer;
use crate::error::{Error, Result};

/// Bytes of loaded layers that a store keeps when nothing else is asked for.
pub const DEFAULT_CACHE_BYTES: u64 = 1 << 30;

/// Layers read at once by [`Store::prefetch`].
const PREFETCHED_AT_ONCE: usize = 4;

/// How a store is opened.
#[derive(Debug, Clone)]
pub struct StoreOptions {
    /// Bytes of loaded layers to keep, shared by all handles.
    pub cache_bytes: u64,
    /// What reads layers from files. `None` asks the environment variable `LAYERSTORE_READER`,
    /// `direct` or `lance`, and takes [`Reader::Direct`] where that is not set.
    pub reader: Option<Reader>,
    /// Whether every layer that is read is hashed and held against its artifact's name: stored bytes that have changed are an error,
    /// where a load checks otherwise only that they make a layer. A load takes several times as long.
    pub verify_loads: bool,
    /// How the storage of a store at `s3://` is reached, beside what the environment says: its endpoint, region and credentials.
    pub storage_options: StorageOptions,
    /// Where the disk keeps copies of what loads read from an object store, so that the next load, also of another process, is local.
    /// Stores on the local file system have none.
    pub disk_cache: Option<DiskCacheOptions>,
    /// What is told when an operation has to wait for a lock that another process holds.
    pub on_wait: Option<OnWait>,
    /// What the tests replace.
    #[doc(hidden)]
    pub hooks: Hooks,
}

impl Default for StoreOptions {
    fn default() -> Self {
        StoreOptions {
            cache_bytes: DEFAULT_CACHE_BYTES,
            reader: None,
            verify_loads: false,
            storage_options: StorageOptions::new(),
            disk_cache: None,
            on_wait: None,
            hooks: Hooks::default(),
        }
    }
}

/// An open store. Cloning shares it; every method can be called from many tasks at once.
#[derive(Debug, Clone)]
pub struct Store {
    shared: Arc<Shared>,
}

impl Store {
    /// Opens a store: at a local path, at an object-store URI (`s3://`, `gs://`, `az://`), or at `memory://NAME`, in the
    /// memory of this process, where it lasts as long as a store of that name, or a handle from one, is there.
    ///
    /// # Errors
    /// When there is no store, it is of a format that this build does not know, or the storage refuses.
    pub async fn open(uri: &str) -> Result<Self> {
        Self::open_with(uri, StoreOptions::default()).await
    }

    /// Opens a store as [`Store::open`] does, with options.
    ///
    /// # Errors
    /// As [`Store::open`], and when `LAYERSTORE_READER` names no reader.
    pub async fn open_with(uri: &str, options: StoreOptions) -> Result<Self> {
        let location =
            Location::new(uri, &options.hooks, &options.storage_options)?.with_on_wait(options.on_wait.clone());
        let catalogue = catalogue::open(&location, None).await?;
        Self::new(location, catalogue, options)
    }

    /// Opens a store as [`Store::open_with`] does, or where its latest version is damaged at the newest one that can be read: to be
    /// verified, and repaired.
    ///
    /// # Errors
    /// As [`Store::open_with`], but for damage where an older version can be read.
    pub async fn open_for_repair(uri: &str, options: StoreOptions) -> Result<Self> {
        let location =
            Location::new(uri, &options.hooks, &options.storage_options)?.with_on_wait(options.on_wait.clone());
        let catalogue = catalogue::open_newest_readable(&location).await?;
        Self::new(location, catalogue, options)
    }

    /// Opens a store, or makes an empty one in a directory that is empty or does not exist.
    ///
    /// # Errors
    /// As [`Store::open`], and when the directory holds something else.
    pub async fn create(uri: &str) -> Result<Self> {
        Self::create_with(uri, StoreOptions::default()).await
    }

    /// Opens or makes a store as [`Store::create`] does, with options.
    ///
    /// # Errors
    /// As [`Store::create`], and when `LAYERSTORE_READER` names no reader.
    pub async fn create_with(uri: &str, options: StoreOptions) -> Result<Self> {
        let location =
            Location::new(uri, &options.hooks, &options.storage_options)?.with_on_wait(options.on_wait.clone());
        let catalogue = catalogue::open_or_create(&location).await?;
        Self::new(location, catalogue, options)
    }

    /// Looks whether [`Store::create_with`] would open or make a store. Nothing is made.
    ///
    /// # Errors
    /// As [`Store::create_with`].
    pub(crate) async fn check_create(uri: &str, options: StoreOptions) -> Result<()> {
        catalogue::could_create(&Location::new(uri, &options.hooks, &options.storage_options)?).await
    }

    fn new(location: Location, catalogue: lance::Dataset, options: StoreOptions) -> Result<Self> {
        let reader = options.reader.map_or_else(Reader::from_environment, Ok)?;
        // On the local file system, copies of files would be as far away as the files.
        let disk_cache = options.disk_cache.filter(|_| location.local().is_none()).map(DiskCache::open).transpose()?;
        let limits = (options.cache_bytes, reader, options.verify_loads);
        let shared = Shared::new(location, catalogue, limits, disk_cache);
        Ok(Store { shared: Arc::new(shared) })
    }

    /// Returns what the store shares with its snapshots and handles.
    pub(super) fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }

    /// Returns the store's address: an absolute path, or a URI.
    pub fn uri(&self) -> &str {
        self.shared.location.uri()
    }

    /// Connects LanceDB to the store's directory, to query its tables. This is the one door to LanceDB's own types; what
    /// is written through it is not checked.
    ///
    /// # Errors
    /// When LanceDB cannot connect.
    pub async fn lancedb(&self) -> Result<lancedb::Connection> {
        let connect = lancedb::connect(self.uri()).session(self.shared.location.session().clone()).execute();
        connect.await.map_err(|e| Error::storage(format!("connecting to {}", self.uri()), e))
    }

    /// Returns the version that was the latest when the store was opened, or when it was last asked for by this handle or a copy of it.
    /// Nothing is read for it.
    pub fn seen(&self) -> Snapshot {
        Snapshot::new(self.shared.clone(), self.shared.catalogue(), None)
    }

    /// Opens the latest version.
    ///
    /// # Errors
    /// When the storage refuses.
    pub async fn latest(&self) -> Result<Snapshot> {
        Ok(Snapshot::new(self.shared.clone(), self.shared.latest().await?, None))
    }

    /// Opens the version that a snapshot's name, or a version's number, stands for; `latest` is the latest version.
    ///
    /// # Errors
    /// When there is no such snapshot or version.
    pub async fn at(&self, name: &str) -> Result<Snapshot> {
        let version = versions::resolve(&self.shared.location, self.shared.catalogue().dataset(), name).await?;
        let dataset = catalogue::open(&self.shared.location, Some(version)).await?;
        Ok(Snapshot::new(self.shared.clone(), dataset.into(), Some(name)))
    }

    /// Names the latest version.
    ///
    /// # Errors
    /// When the name is taken or not valid.
    pub async fn create_snapshot(&self, name: &str) -> Result<SnapshotInfo> {
        versions::create_snapshot(&self.shared.location, name, None).await
    }

    /// Names the version that another snapshot's name, or a version's number, stands for.
    ///
    /// # Errors
    /// When the new name is taken or not valid, or there is no such snapshot or version.
    pub async fn create_snapshot_at(&self, name: &str, at: &str) -> Result<SnapshotInfo> {
        versions::create_snapshot(&self.shared.location, name, Some(at)).await
    }

    /// Returns all snapshots, by version.
    ///
    /// # Errors
    /// When the storage refuses.
    pub async fn snapshots(&self) -> Result<Vec<SnapshotInfo>> {
        versions::list_snapshots(&self.shared.location, self.shared.catalogue().dataset()).await
    }

    /// Deletes a snapshot's name, also one whose file is damaged or whose version is not there. A version stays until gc.
    ///
    /// # Errors
    /// When there is no such snapshot.
    pub async fn delete_snapshot(&self, name: &str) -> Result<DeletedSnapshot> {
        versions::delete_snapshot(&self.shared.location, name).await
    }

    /// Makes an older version the latest, as a new version, and returns the new version with the name that was restored.
    ///
    /// # Errors
    /// When there is no such snapshot or version.
    pub async fn restore(&self, name: &str) -> Result<SnapshotInfo> {
        versions::restore(&self.shared.location, name).await
    }

    /// Returns all versions, newest first.
    ///
    /// # Errors
    /// When the storage refuses.
    pub async fn log(&self) -> Result<Vec<VersionInfo>> {
        versions::log(&self.shared.location, self.shared.latest().await?.dataset()).await
    }

    /// Removes a model, as one new version, and returns the version. Older versions keep the model, and [`Store::restore`] brings it
    /// back; gc frees the bytes once no version is kept that has it.
    ///
    /// # Errors
    /// When there is no such model, or the storage refuses.
    pub async fn remove_model(&self, model: &str) -> Result<u64> {
        models::remove(&self.shared.location, model).await
    }

    /// Gives a model another name, as one new version, and returns the version. Its layers, attention blocks and modules stay as they
    /// are.
    ///
    /// # Errors
    /// When there is no such model, the new name is taken or not valid, or the storage refuses.
    pub async fn rename_model(&self, model: &str, name: &str) -> Result<u64> {
        models::rename(&self.shared.location, model, name).await
    }

    /// Begins a change of a model, after what the list of artifacts or a data table has lost was completed. gc waits until it is
    /// committed or dropped.
    ///
    /// # Errors
    /// When the store cannot be written.
    pub async fn writer(&self) -> Result<Writer> {
        Ok(heal::begin(&self.shared, false).await?.0)
    }

    /// Keeps gc from what is in the store, until the lease is dropped: artifacts that are to be committed later, by an import of this
    /// process or another one.
    ///
    /// # Errors
    /// When the store cannot be written.
    pub async fn lease(&self) -> Result<Lease> {
        Ok(Lease { _guard: lock::importing(&self.shared.location).await? })
    }

    /// Removes rows and files that no snapshot, and no version younger than `older_than`, reaches; only counts them
    /// unless `apply`.
    ///
    /// # Errors
    /// When an import is at work and does not finish in time, or the storage refuses.
    pub async fn gc(&self, older_than: Duration, apply: bool) -> Result<GcReport> {
        gc::collect(&self.shared.location, older_than, apply).await
    }

    /// Opens every version and snapshot, counts rows, reads every artifact and holds it against its name, and builds its layer:
    /// [`Store::verify_with`] at [`VerifyDepth::Full`].
    ///
    /// # Errors
    /// As there.
    pub async fn verify(&self, seen: impl Fn(usize, usize) + Send + Sync + 'static) -> Result<VerifyReport> {
        self.verify_with(VerifyDepth::Full, seen).await
    }

    /// Looks for damage, as much as `depth` says, and says what helps. `seen` is told how many artifacts of how many were read.
    ///
    /// # Errors
    /// When no version of the catalogue can be opened; damage is no error but a finding.
    pub async fn verify_with(
        &self,
        depth: VerifyDepth,
        seen: impl Fn(usize, usize) + Send + Sync + 'static,
    ) -> Result<VerifyReport> {
        verify::verify(&self.shared, depth, Arc::new(seen)).await
    }

    /// Reads layers into the cache ahead of their use, several at a time.
    ///
    /// # Errors
    /// When one of them cannot be read.
    pub async fn prefetch(&self, handles: &[LayerHandle]) -> Result<()> {
        let loads = handles.iter().map(|handle| self.shared.load(handle.shared_record()));
        futures::stream::iter(loads).buffer_unordered(PREFETCHED_AT_ONCE).try_for_each(|_| async { Ok(()) }).await
    }

    /// Returns the bytes of loaded layers held now.
    pub async fn cached_bytes(&self) -> u64 {
        self.shared.cached_bytes().await
    }

    /// Returns the store's format version: that of the build that made it, or that it was upgraded to.
    ///
    /// # Errors
    /// When the storage refuses.
    pub async fn format(&self) -> Result<u32> {
        let latest = self.shared.latest().await?;
        Ok(self.shared.location.format_of(latest.dataset())?.version)
    }

    /// Brings the store to the newest format version that this build knows, and returns it: columns are added to tables,
    /// and no row is written anew. Builds that do not know that version cannot open the store any more. An older store is
    /// read and written as it is without this.
    ///
    /// # Errors
    /// When an import is at work and does not finish in time, or the storage refuses.
    pub async fn upgrade(&self) -> Result<u32> {
        upgrade::upgrade(&self.shared.location).await
    }
}
