//! Rows of data files, read without looking at the versions of the tables that the files belong to.
//!
//! A data file never changes once it is written, so where an artifact's rows are known to be, neither a manifest nor a
//! query plan has to be made before they are read.
//!
//! There are two readers: Lance's, which reads every file, and one of our own for plainly laid out files, which follows Lance's file
//! format without its code: straight into place on the local file system, and by ranges that are asked for at once elsewhere. What the
//! second does not read is left to the first, and [`Reader::Lance`] leaves everything to it.

mod aligned;
mod column;
mod data_file;
pub mod end;
mod fetched;
mod page;
mod pread;
mod remote;
pub mod source;
#[cfg(test)]
mod tests;

use std::collections::BTreeSet;
use std::io;
use std::num::NonZeroUsize;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use arrow::array::RecordBatch;
use futures::TryStreamExt;
use lance_encoding::decoder::{DecoderPlugins, FilterExpression};
use lance_file::reader::{FileReader, FileReaderOptions};
use lance_file::versions::reader_projection_from_column_names;
use lance_io::ReadBatchParams;
use lance_io::object_store::{ObjectStore, ObjectStoreParams};
use lance_io::scheduler::{ScanScheduler, SchedulerConfig};
use lance_io::utils::CachedFileSize;
use lru::LruCache;
use moka::future::Cache;
use object_store::path::Path;
use tokio::sync::OnceCell;

use self::data_file::DataFile;
use self::end::require_rows;
pub use self::remote::From;
use self::remote::RemoteFiles;
use super::disk_cache::DiskCache;
use super::location::Location;
use super::waiting::unfinished;
use crate::error::{Error, Result};

/// Files kept open by each reader: each holds a file handle and the description of its columns.
const OPEN_FILES: usize = 128;

/// Files that may always be kept open.
const FEWEST_FILES: usize = 8;

/// File handles that are left to Lance, which opens tables, and to the rest of the process.
const OTHER_FILES: usize = 48;

/// Files that each of the two readers keeps open, as the system's limit on this process allows.
fn open_files() -> NonZeroUsize {
    let each = handles_allowed().map_or(OPEN_FILES, files_within);
    NonZeroUsize::new(each).unwrap_or(NonZeroUsize::MIN)
}

/// Files that each reader keeps open of a process that may have so many handles.
fn files_within(handles: usize) -> usize {
    (handles.saturating_sub(OTHER_FILES) / 3).clamp(FEWEST_FILES, OPEN_FILES)
}

#[cfg(unix)]
fn handles_allowed() -> Option<usize> {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the struct is written to, and lives as long as the call.
    let known = unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &mut limit) } == 0;
    known.then(|| usize::try_from(limit.rlim_cur).unwrap_or(usize::MAX))
}

#[cfg(not(unix))]
fn handles_allowed() -> Option<usize> {
    None
}

/// Whether a file could not be opened because the process, or the system, has too many open.
fn too_many_open(e: &io::Error) -> bool {
    #[cfg(unix)]
    return matches!(e.raw_os_error(), Some(libc::EMFILE | libc::ENFILE));
    #[cfg(not(unix))]
    return false;
}

/// Rows decoded at a time: as many as most layers have, so that they come as one piece.
const BATCH_ROWS: u32 = 1 << 12;

/// Bytes decoded at a time, about, of rows that are long: 32-bit offsets address them.
const BATCH_BYTES: u64 = 256 << 20;

/// Pieces decoded ahead.
const AHEAD: u32 = 2;

/// The environment variable that chooses the reader where [`StoreOptions`](super::StoreOptions) leave it open.
const READER_VARIABLE: &str = "LAYERSTORE_READER";

/// What reads the rows of layers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reader {
    /// Straight from the files, where they are laid out plainly, and through Lance else.
    Direct,
    /// Through Lance.
    Lance,
}

impl Reader {
    /// Returns the reader that `LAYERSTORE_READER` names, `direct` or `lance`, or [`Reader::Direct`] where it is not set.
    ///
    /// # Errors
    /// When it is set to something else.
    pub fn from_environment() -> Result<Self> {
        let found = match std::env::var(READER_VARIABLE) {
            Ok(found) => found,
            Err(std::env::VarError::NotPresent) => return Ok(Reader::Direct),
            Err(std::env::VarError::NotUnicode(found)) => found.to_string_lossy().into_owned(),
        };
        match found.as_str() {
            "" | "direct" => Ok(Reader::Direct),
            "lance" => Ok(Reader::Lance),
            _ => Err(Error::expected(READER_VARIABLE, format!("'{found}'"), "'direct' or 'lance'")),
        }
    }
}

/// Rows of a data file, deleted ones too.
#[derive(Debug, Clone)]
pub struct FileRows {
    /// The table that the file belongs to.
    pub table: String,
    /// The file's name.
    pub file: String,
    /// The rows.
    pub rows: Range<u64>,
}

/// A file by its table's name and its own.
type FileName = (String, String);

/// The path of a data file of the store in `folder`.
fn data_path(folder: &std::path::Path, table: &str, name: &str) -> std::path::PathBuf {
    folder.join(format!("{table}.lance")).join("data").join(name)
}

/// How many rows of a file are decoded at a time, by the longest that a page's rows are on average. A page has some MiB, or one row.
fn batch_rows(file: &FileReader) -> u32 {
    let pages = file.metadata().column_metadatas.iter().flat_map(|column| &column.pages);
    let longest = pages
        .map(|page| page.buffer_sizes.iter().fold(0, |sum, &size| u64::saturating_add(sum, size)) / page.length.max(1));
    let rows = BATCH_BYTES / longest.max().unwrap_or_default().max(1);
    u32::try_from(rows).map_or(BATCH_ROWS, |rows| rows.clamp(1, BATCH_ROWS))
}

/// The data files of a store.
#[derive(Debug)]
pub struct Files {
    location: Location,
    reader: Reader,
    direct: Mutex<LruCache<FileName, Arc<DataFile>>>,
    storage: OnceCell<(Arc<ScanScheduler>, Path)>,
    through_lance: Cache<FileName, Arc<FileReader>>,
    /// The files of a store that is not on the local file system, unless everything is read through Lance.
    remote: Option<Arc<RemoteFiles>>,
}

impl Files {
    /// Returns the files of a store, none of them open. Of files that are not on the local file system, the disk keeps copies where a
    /// `cache` is given.
    pub fn new(location: Location, reader: Reader, cache: Option<DiskCache>) -> Self {
        let is_remote = location.local().is_none() && reader == Reader::Direct;
        Files {
            remote: is_remote.then(|| Arc::new(RemoteFiles::new(location.clone(), cache))),
            location,
            reader,
            direct: Mutex::new(LruCache::new(open_files())),
            storage: OnceCell::new(),
            through_lance: Cache::new(open_files().get() as u64),
        }
    }

    /// Reads rows of files on the local file system, on this thread: a batch for each of `wanted`. `None` where
    /// [`Files::decoded_rows`] has to read them: the store is somewhere else, the files are laid out in another way, or
    /// everything is read through Lance.
    ///
    /// # Errors
    /// When a file is not there any more, or cannot be read.
    pub fn direct_rows(&self, wanted: &[FileRows]) -> io::Result<Option<Vec<RecordBatch>>> {
        let Some(folder) = self.direct_folder() else { return Ok(None) };
        let mut batches = Vec::with_capacity(wanted.len());
        for some in wanted {
            let named = |e: io::Error| match e.kind() {
                io::ErrorKind::InvalidData | io::ErrorKind::UnexpectedEof => {
                    io::Error::new(e.kind(), format!("{}: {e}", data_path(folder, &some.table, &some.file).display()))
                }
                _ => e,
            };
            let Some(file) = self.direct_file(folder, &some.table, &some.file).map_err(named)? else { return Ok(None) };
            let Some(batch) = file.read(&some.rows).map_err(named)? else { return Ok(None) };
            batches.push(batch);
        }
        Ok(Some(batches))
    }

    /// Reads rows of files that are not on the local file system: a batch for each of `wanted`. `None` where [`Files::decoded_rows`] has
    /// to read them.
    ///
    /// # Errors
    /// When a file is not there any more, cannot be read, or contradicts itself.
    pub async fn fetched_rows(&self, from: From, wanted: &[FileRows]) -> lance::Result<Option<Vec<RecordBatch>>> {
        match &self.remote {
            Some(remote) => remote.rows(from, wanted).await,
            None => Ok(None),
        }
    }

    /// Reads the ends of files for [`Files::fetched_rows`].
    pub async fn describe_ahead(&self, wanted: &BTreeSet<FileName>) {
        if let Some(remote) = &self.remote {
            remote.describe_ahead(wanted.iter().cloned()).await;
        }
    }

    /// The store's directory, if files in it are read directly.
    fn direct_folder(&self) -> Option<&std::path::Path> {
        self.location.local().filter(|_| self.reader == Reader::Direct)
    }

    fn direct_file(&self, folder: &std::path::Path, table: &str, name: &str) -> io::Result<Option<Arc<DataFile>>> {
        let formats = self.location.formats();
        // Only the name of a file: what a path holds otherwise is encoded by the object store.
        let plain = |name: &str| !name.contains(['/', '\\']);
        let Some(schema) = formats.schema(table, formats.newest().version).filter(|_| plain(table) && plain(name))
        else {
            return Ok(None);
        };
        let key = (table.to_owned(), name.to_owned());
        if let Some(file) = self.open_files().get(&key) {
            return Ok(Some(file.clone()));
        }
        let path = data_path(folder, table, name);
        let opened = match DataFile::open(&path, &schema) {
            Err(e) if too_many_open(&e) => {
                self.open_files().clear();
                self.through_lance.invalidate_all();
                DataFile::open(&path, &schema)
            }
            opened => opened,
        };
        let file = match opened {
            Err(e) if e.kind() == io::ErrorKind::Unsupported => return Ok(None),
            file => Arc::new(file?),
        };
        self.open_files().put(key, file.clone());
        Ok(Some(file))
    }

    /// Opens files for [`Files::direct_rows`], as many as are kept open. What cannot be opened is found out when it is
    /// read.
    pub fn open_ahead(&self, wanted: &BTreeSet<FileName>) {
        let Some(folder) = self.direct_folder() else { return };
        for (table, file) in wanted.iter().take(open_files().get() / 2) {
            let _ = self.direct_file(folder, table, file);
        }
    }

    /// Closes files of a table that have gone, so that nothing more is read of them.
    pub async fn forget(&self, table: &str, names: impl IntoIterator<Item = String>) {
        for name in names {
            let key = (table.to_owned(), name);
            self.open_files().pop(&key);
            self.through_lance.invalidate(&key).await;
            if let Some(remote) = &self.remote {
                remote.forget(&key);
            }
        }
    }

    /// Returns whether files are open, or none is to be opened ahead.
    pub fn are_open(&self, wanted: &BTreeSet<FileName>) -> bool {
        if let Some(remote) = &self.remote {
            return remote.are_described(wanted);
        }
        let open = self.open_files();
        self.direct_folder().is_none() || wanted.iter().all(|file| open.contains(file))
    }

    fn open_files(&self) -> MutexGuard<'_, LruCache<FileName, Arc<DataFile>>> {
        // A map that another thread left in the middle of a change is still a map.
        self.direct.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reads rows through Lance: the batches of each of `wanted`.
    ///
    /// # Errors
    /// When a file is not there any more, has fewer rows, or cannot be read.
    pub async fn decoded_rows(self: &Arc<Self>, wanted: &[FileRows]) -> lance::Result<Vec<Vec<RecordBatch>>> {
        let read = wanted.iter().map(|some| {
            let (files, some) = (self.clone(), some.clone());
            // On a task of its own: side by side, and decoding damaged bytes may panic in Lance.
            async move { tokio::spawn(async move { files.decoded(some).await }).await.map_err(unfinished)? }
        });
        futures::future::try_join_all(read).await
    }

    async fn decoded(&self, wanted: FileRows) -> lance::Result<Vec<RecordBatch>> {
        let key = (wanted.table, wanted.file);
        let opened = self.through_lance.try_get_with_by_ref(&key, self.lance_file(&key.0, &key.1)).await;
        let reader = opened.map_err(|source| lance::Error::Shared { source })?;
        // Before memory is asked for.
        if wanted.rows.start > wanted.rows.end || wanted.rows.end > reader.num_rows() {
            let found = format!("the file has {} rows, where those up to {} are", reader.num_rows(), wanted.rows.end);
            return Err(lance::Error::invalid_input(found));
        }
        let range = ReadBatchParams::Range(wanted.rows.start as usize..wanted.rows.end as usize);
        let formats = self.location.formats();
        let schema = formats.schema(&key.0, formats.newest().version);
        let names = schema.iter().flat_map(|schema| schema.fields()).map(|field| field.name().as_str());
        let names: Vec<&str> = names.filter(|name| reader.schema().field(name).is_some()).collect();
        let projection = reader_projection_from_column_names(reader.version(), reader.schema(), &names)?;
        let all = FilterExpression::no_filter();
        reader.read_stream_projected(range, batch_rows(&reader), AHEAD, projection, all).await?.try_collect().await
    }

    async fn lance_file(&self, table: &str, name: &str) -> lance::Result<Arc<FileReader>> {
        let (scheduler, root) = self.storage.get_or_try_init(|| self.connect()).await?;
        let path = root.clone().join(format!("{table}.lance")).join("data").join(name);
        let file = scheduler.open_file(&path, &CachedFileSize::unknown()).await?;
        let size = file.reader().size().await? as u64;
        let session = self.location.session();
        let (plugins, options) = (Arc::<DecoderPlugins>::default(), FileReaderOptions::default());
        let reader = FileReader::try_open(file, None, plugins, session.file_metadata_cache(), options).await?;
        require_rows(reader.num_rows(), size)
            .map_err(|e| lance::Error::corrupt_file_named("of the table", format!("{path}: {e}")))?;
        Ok(Arc::new(reader))
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
