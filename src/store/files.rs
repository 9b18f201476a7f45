//! Rows of data files, read without looking at the versions of the tables that the files belong to.
//!
//! A data file never changes once it is written, so where an artifact's rows are known to be, neither a manifest nor a
//! query plan has to be made before they are read.

use std::collections::BTreeSet;
use std::io;
use std::num::NonZeroUsize;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use arrow::array::RecordBatch;
use futures::TryStreamExt;
use lance_encoding::decoder::{DecoderPlugins, FilterExpression};
use lance_file::reader::{FileReader, FileReaderOptions};
use lance_file::versions::reader_projection_from_whole_schema;
use lance_io::ReadBatchParams;
use lance_io::object_store::{ObjectStore, ObjectStoreParams};
use lance_io::scheduler::{ScanScheduler, SchedulerConfig};
use lance_io::utils::CachedFileSize;
use lru::LruCache;
use moka::future::Cache;
use object_store::path::Path;
use tokio::sync::OnceCell;

use super::local::LocalFile;
use super::location::Location;
use super::schema::Table;

/// Files kept open: each holds a file handle and the description of its columns.
const OPEN_FILES: NonZeroUsize = NonZeroUsize::new(128).unwrap();

/// Rows decoded at a time: as many as most layers have, so that they come as one piece, and few enough that 32-bit
/// offsets can address rows of half a MiB.
const BATCH_ROWS: u32 = 1 << 12;

/// Pieces decoded ahead.
const AHEAD: u32 = 2;

/// Rows of a data file.
#[derive(Debug, Clone)]
pub struct Run {
    pub table: String,
    pub file: String,
    pub rows: Range<u64>,
}

/// The data files of a store.
#[derive(Debug)]
pub struct Files {
    location: Location,
    local: Mutex<LruCache<(String, String), Arc<LocalFile>>>,
    storage: OnceCell<(Arc<ScanScheduler>, Path)>,
    readers: Cache<(String, String), Arc<FileReader>>,
}

impl Files {
    pub fn new(location: Location) -> Self {
        Files {
            location,
            local: Mutex::new(LruCache::new(OPEN_FILES)),
            storage: OnceCell::new(),
            readers: Cache::new(OPEN_FILES.get() as u64),
        }
    }

    /// Runs of rows of files on the local file system, deleted ones too, read by this thread: a batch each. None where
    /// [`Files::rows`] has to read them: the store is somewhere else, or they are laid out in another way.
    ///
    /// # Errors
    /// When a file is not there any more, has fewer rows, or cannot be read.
    pub fn local_rows(&self, runs: &[Run]) -> io::Result<Option<Vec<RecordBatch>>> {
        let Some(folder) = self.location.local() else { return Ok(None) };
        let mut batches = Vec::with_capacity(runs.len());
        for run in runs {
            let Some(file) = self.local(folder, &run.table, &run.file)? else { return Ok(None) };
            let Some(batch) = file.read(&run.rows)? else { return Ok(None) };
            batches.push(batch);
        }
        Ok(Some(batches))
    }

    fn local(&self, folder: &std::path::Path, table: &str, name: &str) -> io::Result<Option<Arc<LocalFile>>> {
        // Only the name of a file: what a path holds otherwise is encoded by the object store.
        let Some(known) = Table::named(table).filter(|_| !name.contains(['/', '\\'])) else { return Ok(None) };
        let key = (table.to_owned(), name.to_owned());
        if let Some(file) = self.open_files().get(&key) {
            return Ok(Some(file.clone()));
        }
        let file = match LocalFile::open(&folder.join(format!("{table}.lance")).join("data").join(name), known.schema())
        {
            Err(e) if e.kind() == io::ErrorKind::Unsupported => return Ok(None),
            file => Arc::new(file?),
        };
        self.open_files().put(key, file.clone());
        Ok(Some(file))
    }

    /// Opens files, tables' names before theirs, as many as are kept open; what cannot be opened is found out when it is
    /// read.
    pub fn open_ahead(&self, wanted: &BTreeSet<(String, String)>) {
        let Some(folder) = self.location.local() else { return };
        for (table, file) in wanted.iter().take(OPEN_FILES.get() / 2) {
            let _ = self.local(folder, table, file);
        }
    }

    /// Whether files are open, or none is to be opened ahead.
    pub fn are_open(&self, wanted: &BTreeSet<(String, String)>) -> bool {
        let open = self.open_files();
        self.location.local().is_none() || wanted.iter().all(|file| open.contains(file))
    }

    fn open_files(&self) -> MutexGuard<'_, LruCache<(String, String), Arc<LocalFile>>> {
        // A map that another thread left in the middle of a change is still a map.
        self.local.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs of rows, deleted ones too, through Lance: the batches of each.
    ///
    /// # Errors
    /// As [`Files::local_rows`].
    pub async fn rows(self: &Arc<Self>, runs: &[Run]) -> lance::Result<Vec<Vec<RecordBatch>>> {
        let read = runs.iter().map(|run| {
            let (files, run) = (self.clone(), run.clone());
            // On a task of its own: side by side, and decoding damaged bytes may panic in Lance.
            async move { tokio::spawn(async move { files.decoded(run).await }).await.map_err(failed)? }
        });
        futures::future::try_join_all(read).await
    }

    async fn decoded(&self, run: Run) -> lance::Result<Vec<RecordBatch>> {
        let key = (run.table, run.file);
        let reader = self.readers.try_get_with_by_ref(&key, self.reader(&key.0, &key.1)).await.map_err(failed)?;
        let range = ReadBatchParams::Range(run.rows.start as usize..run.rows.end as usize);
        let projection = reader_projection_from_whole_schema(reader.schema(), reader.version());
        let all = FilterExpression::no_filter();
        reader.read_stream_projected(range, BATCH_ROWS, AHEAD, projection, all).await?.try_collect().await
    }

    async fn reader(&self, table: &str, name: &str) -> lance::Result<Arc<FileReader>> {
        let (scheduler, root) = self.storage.get_or_try_init(|| self.connect()).await?;
        let path = root.clone().join(format!("{table}.lance")).join("data").join(name);
        let file = scheduler.open_file(&path, &CachedFileSize::unknown()).await?;
        let session = self.location.session();
        let (plugins, options) = (Arc::<DecoderPlugins>::default(), FileReaderOptions::default());
        Ok(Arc::new(FileReader::try_open(file, None, plugins, session.file_metadata_cache(), options).await?))
    }

    async fn connect(&self) -> lance::Result<(Arc<ScanScheduler>, Path)> {
        let registry = self.location.session().store_registry();
        let (store, root) =
            ObjectStore::from_uri_and_params(registry, self.location.uri(), &ObjectStoreParams::default()).await?;
        // The lite scheduler has no task of its own, which would die with the runtime that it was made on.
        let config = SchedulerConfig::max_bandwidth(&store).with_lite_scheduler();
        Ok((ScanScheduler::new(store, config), root))
    }
}

fn failed(e: impl std::fmt::Display) -> lance::Error {
    lance::Error::io(e.to_string())
}
