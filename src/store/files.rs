//! Rows of data files, read without looking at the versions of the tables that the files belong to.
//!
//! A data file never changes once it is written, so where an artifact's rows are known to be, neither a manifest nor a
//! query plan has to be made before they are read.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io;
use std::ops::Range;
use std::sync::Arc;

use arrow::array::{ArrayRef, RecordBatch};
use arrow::compute::concat_batches;
use arrow::datatypes::{Field, Schema, SchemaRef};
use futures::TryStreamExt;
use lance_encoding::decoder::{DecoderPlugins, FilterExpression};
use lance_file::reader::{FileReader, FileReaderOptions, ReaderProjection};
use lance_file::versions::{reader_projection_from_column_names, reader_projection_from_whole_schema};
use lance_io::ReadBatchParams;
use lance_io::object_store::{ObjectStore, ObjectStoreParams};
use lance_io::scheduler::{ScanScheduler, SchedulerConfig};
use lance_io::utils::CachedFileSize;
use moka::future::Cache;
use object_store::path::Path;
use tokio::sync::OnceCell;

use super::location::Location;
use super::plain::PlainColumn;

/// Files kept open: each holds a file handle and the description of its columns.
const OPEN_FILES: u64 = 128;

/// Rows decoded at a time: as many as most layers have, so that they come as one piece, and few enough that 32-bit
/// offsets can address rows of half a MiB.
const BATCH_ROWS: u32 = 1 << 12;

/// Pieces decoded ahead.
const AHEAD: u32 = 2;

/// A column of so many bytes is read by a thread of its own.
const LARGE: u64 = 4 << 20;

/// Rows of a data file.
#[derive(Debug, Clone)]
pub struct Run<'a> {
    pub table: &'a str,
    pub file: &'a str,
    pub rows: Range<u64>,
}

/// The data files of a store.
#[derive(Debug)]
pub struct Files {
    location: Location,
    storage: OnceCell<(Arc<ScanScheduler>, Path)>,
    open: Cache<(String, String), Arc<Opened>>,
}

impl Files {
    pub fn new(location: Location) -> Self {
        Files { location, storage: OnceCell::new(), open: Cache::new(OPEN_FILES) }
    }

    /// Runs of rows, deleted ones too: the batches of each.
    ///
    /// # Errors
    /// When a file is not there any more, has fewer rows, or cannot be read.
    pub async fn rows(self: &Arc<Self>, runs: &[Run<'_>]) -> lance::Result<Vec<Vec<RecordBatch>>> {
        let opened = futures::future::try_join_all(runs.iter().map(|run| self.opened(run.table, run.file))).await?;
        // One thread reads what lies plainly: for a small layer that costs less than handing it to several does.
        let (mut together, mut alone, mut decoded) = (vec![], vec![], vec![]);
        for (place, (opened, run)) in opened.iter().zip(runs).enumerate() {
            let plain = opened.plain(&run.rows);
            decoded.push(opened.clone().decode_others(run.rows.clone(), &plain));
            for (name, column) in plain {
                let large = column.bytes() >= LARGE;
                let read = (place, name, opened.local.clone(), column);
                if large { alone.push(vec![read]) } else { together.push(read) }
            }
        }
        alone.push(together);
        let reads = alone.into_iter().filter(|group| !group.is_empty()).map(|group| {
            let read = move || -> io::Result<Vec<_>> {
                let read = group.into_iter().map(|(place, name, file, column)| {
                    let (file, size) = file.ok_or_else(|| io::Error::other("a file that is not local"))?;
                    Ok(((place, name), column.read(&file, size)?))
                });
                read.collect()
            };
            async { tokio::task::spawn_blocking(read).await.map_err(failed)?.map_err(failed) }
        });
        let reads = futures::future::try_join_all(reads);
        let (reads, decoded) = futures::future::try_join(reads, futures::future::try_join_all(decoded)).await?;
        let mut columns: HashMap<(usize, String), ArrayRef> = reads.into_iter().flatten().collect();
        let joined = opened.iter().zip(decoded).enumerate().map(|(place, (opened, decoded))| {
            let read = opened.schema.fields().iter().map(|field| columns.remove(&(place, field.name().clone())));
            let read: Vec<Option<ArrayRef>> = read.collect();
            if read.iter().all(Option::is_none) {
                return Ok(decoded);
            }
            let decoded = match decoded.first() {
                Some(first) => Some(concat_batches(&first.schema(), &decoded)?),
                None => None,
            };
            let all = opened.schema.fields().iter().zip(read).map(|(field, column)| {
                let decoded = || decoded.as_ref().and_then(|d| d.column_by_name(field.name()).cloned());
                let column = column.or_else(decoded);
                column.ok_or_else(|| lance::Error::internal(format!("column '{}' was not read", field.name())))
            });
            Ok(vec![RecordBatch::try_new(opened.schema.clone(), all.collect::<lance::Result<_>>()?)?])
        });
        joined.collect()
    }

    async fn opened(self: &Arc<Self>, table: &str, file: &str) -> lance::Result<Arc<Opened>> {
        let key = (table.to_owned(), file.to_owned());
        if let Some(opened) = self.open.get(&key).await {
            return Ok(opened);
        }
        // On a task of its own: a layer's files are opened side by side.
        let (files, (table, file)) = (self.clone(), key.clone());
        let open =
            async move { tokio::spawn(async move { files.open_file(&table, &file).await }).await.map_err(failed)? };
        self.open.try_get_with(key, open).await.map_err(failed)
    }

    async fn open_file(&self, table: &str, name: &str) -> lance::Result<Arc<Opened>> {
        let (scheduler, root) = self.storage.get_or_try_init(|| self.connect()).await?;
        let table = format!("{table}.lance");
        let path = root.clone().join(table.as_str()).join("data").join(name);
        let local = match self.location.local() {
            // The same name as above: a part of a path holds no separator once it is encoded.
            Some(folder) if !name.contains(['/', '\\']) => {
                let file = File::open(folder.join(table).join("data").join(name))?;
                let size = file.metadata()?.len();
                Some((Arc::new(file), size))
            }
            _ => None,
        };
        let size = match &local {
            Some((_, size)) => CachedFileSize::new(*size),
            None => CachedFileSize::unknown(),
        };
        let file = scheduler.open_file(&path, &size).await?;
        let session = self.location.session();
        let (plugins, options) = (Arc::<DecoderPlugins>::default(), FileReaderOptions::default());
        let reader = FileReader::try_open(file, None, plugins, session.file_metadata_cache(), options).await?;
        let schema = Arc::new(Schema::from(reader.schema().as_ref()));
        let all = reader_projection_from_whole_schema(reader.schema(), reader.version()).column_indices;
        // As many as fields: each is one column of the file.
        let fields = schema.fields().iter().filter(|_| all.len() == schema.fields().len());
        let single = fields.cloned().zip(all.iter().map(|&index| index as usize)).collect();
        Ok(Arc::new(Opened { reader, local, schema, single }))
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

/// An open data file.
#[derive(Debug)]
struct Opened {
    reader: FileReader,
    /// The file and its size, for a store on the local file system.
    local: Option<(Arc<File>, u64)>,
    schema: SchemaRef,
    /// The columns that are one column of the file each, and which.
    single: Vec<(Arc<Field>, usize)>,
}

impl Opened {
    /// The columns whose bytes lie plainly in the file, if it is a local one.
    fn plain(&self, rows: &Range<u64>) -> BTreeMap<String, PlainColumn> {
        if self.local.is_none() {
            return BTreeMap::new();
        }
        let columns = &self.reader.metadata().column_infos;
        let found = self.single.iter().filter_map(|(field, index)| {
            Some((field.name().clone(), PlainColumn::find(field, columns.get(*index)?, rows.clone())?))
        });
        let found: BTreeMap<String, PlainColumn> = found.collect();
        // They come as one batch, whose offsets have 32 bits; the decoder makes several.
        if found.values().any(|column| column.bytes() > i32::MAX as u64) { BTreeMap::new() } else { found }
    }

    /// The rows' other columns, through Lance's decoder.
    fn decode_others(
        self: Arc<Self>,
        rows: Range<u64>,
        plain: &BTreeMap<String, PlainColumn>,
    ) -> impl Future<Output = lance::Result<Vec<RecordBatch>>> + use<> {
        let names = self.schema.fields().iter().map(|f| f.name().clone());
        let names: Vec<String> = names.filter(|name| !plain.contains_key(name)).collect();
        async move {
            if names.is_empty() {
                return Ok(vec![]);
            }
            // Decoding damaged bytes may panic in Lance.
            tokio::spawn(async move { self.decode(rows, &names).await }).await.map_err(failed)?
        }
    }

    async fn decode(&self, rows: Range<u64>, columns: &[String]) -> lance::Result<Vec<RecordBatch>> {
        let range = ReadBatchParams::Range(rows.start as usize..rows.end as usize);
        let columns: Vec<&str> = columns.iter().map(String::as_str).collect();
        let projection = projection(&self.reader, &columns)?;
        let all = FilterExpression::no_filter();
        self.reader.read_stream_projected(range, BATCH_ROWS, AHEAD, projection, all).await?.try_collect().await
    }
}

fn failed(e: impl std::fmt::Display) -> lance::Error {
    lance::Error::io(e.to_string())
}

fn projection(reader: &FileReader, columns: &[&str]) -> lance::Result<ReaderProjection> {
    reader_projection_from_column_names(reader.version(), reader.schema(), columns)
}

#[cfg(test)]
impl Files {
    pub async fn decoded(
        self: &Arc<Self>,
        table: &str,
        file: &str,
        rows: Range<u64>,
    ) -> lance::Result<Vec<RecordBatch>> {
        let opened = self.opened(table, file).await?;
        let columns: Vec<String> = opened.schema.fields().iter().map(|f| f.name().clone()).collect();
        opened.decode(rows, &columns).await
    }

    pub async fn plain_columns(
        self: &Arc<Self>,
        table: &str,
        file: &str,
        rows: Range<u64>,
    ) -> lance::Result<Vec<String>> {
        Ok(self.opened(table, file).await?.plain(&rows).into_keys().collect())
    }
}
