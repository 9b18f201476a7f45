//! Rows of data files, read without looking at the versions of the tables that the files belong to.
//!
//! A data file never changes once it is written, so where an artifact's rows are known to be, neither a manifest nor a
//! query plan has to be made before they are read.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::ops::Range;
use std::sync::Arc;

use arrow::array::{ArrayRef, RecordBatch};
use arrow::compute::concat_batches;
use arrow::datatypes::{DataType, Field, Schema, SchemaRef};
use futures::TryStreamExt;
use lance_encoding::decoder::{DecoderPlugins, FilterExpression};
use lance_file::reader::{FileReader, FileReaderOptions, ReaderProjection};
use lance_file::versions::reader_projection_from_column_names;
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

    /// Rows of one file of a table, deleted ones too.
    ///
    /// # Errors
    /// When the file is not there any more, has fewer rows, or cannot be read.
    pub async fn rows(&self, table: &str, file: &str, rows: Range<u64>) -> lance::Result<Vec<RecordBatch>> {
        let opened = self.opened(table, file).await?;
        let Some(local) = opened.local.clone() else { return opened.decode(rows, None).await };
        let plain = opened.plain(&rows);
        if plain.is_empty() {
            return opened.decode(rows, None).await;
        }
        let schema = &opened.schema;
        let others: Vec<&str> =
            schema.fields().iter().map(|f| f.name().as_str()).filter(|n| !plain.contains_key(*n)).collect();
        let names: Vec<String> = plain.keys().cloned().collect();
        let read = plain.into_values().map(|column| {
            let local = local.clone();
            async move {
                let read = tokio::task::spawn_blocking(move || column.read(&local)).await;
                read.map_err(|e| lance::Error::io(e.to_string()))?.map_err(|e| lance::Error::io(e.to_string()))
            }
        });
        let (read, decoded) =
            futures::future::try_join(futures::future::try_join_all(read), opened.decode(rows, Some(&others))).await?;
        let decoded = concat_batches(&decoded.first().map_or_else(|| schema.clone(), |b| b.schema()), &decoded)?;
        let read: HashMap<&str, ArrayRef> = names.iter().map(String::as_str).zip(read).collect();
        let columns = schema.fields().iter().map(|field| {
            let column = read.get(field.name().as_str()).or_else(|| decoded.column_by_name(field.name())).cloned();
            column.ok_or_else(|| lance::Error::internal(format!("column '{}' was not read", field.name())))
        });
        Ok(vec![RecordBatch::try_new(schema.clone(), columns.collect::<lance::Result<_>>()?)?])
    }

    async fn opened(&self, table: &str, file: &str) -> lance::Result<Arc<Opened>> {
        let key = (table.to_owned(), file.to_owned());
        let opened = self.open.try_get_with(key, self.open_file(table, file)).await;
        opened.map_err(|e| lance::Error::io(e.to_string()))
    }

    async fn open_file(&self, table: &str, name: &str) -> lance::Result<Arc<Opened>> {
        let (scheduler, root) = self.storage.get_or_try_init(|| self.connect()).await?;
        let table = format!("{table}.lance");
        let path = root.clone().join(table.as_str()).join("data").join(name);
        let local = match self.location.local() {
            // The same name as above: a part of a path holds no separator once it is encoded.
            Some(folder) if !name.contains(['/', '\\']) => {
                Some(Arc::new(File::open(folder.join(table).join("data").join(name))?))
            }
            _ => None,
        };
        let size = match &local {
            Some(file) => CachedFileSize::new(file.metadata()?.len()),
            None => CachedFileSize::unknown(),
        };
        let file = scheduler.open_file(&path, &size).await?;
        let session = self.location.session();
        let (plugins, options) = (Arc::<DecoderPlugins>::default(), FileReaderOptions::default());
        let reader = FileReader::try_open(file, None, plugins, session.file_metadata_cache(), options).await?;
        let schema = Arc::new(Schema::from(reader.schema().as_ref()));
        let mut wide = vec![];
        for field in schema.fields() {
            if matches!(field.data_type(), DataType::FixedSizeList(..) | DataType::Binary)
                && let [index] = projection(&reader, &[field.name()])?.column_indices[..]
            {
                wide.push((field.clone(), index as usize));
            }
        }
        Ok(Arc::new(Opened { reader, local, schema, wide }))
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
    local: Option<Arc<File>>,
    schema: SchemaRef,
    /// Columns of a kind that may lie plainly, and where the file describes them.
    wide: Vec<(Arc<Field>, usize)>,
}

impl Opened {
    /// Through Lance's decoder: all columns, or those named.
    async fn decode(&self, rows: Range<u64>, columns: Option<&[&str]>) -> lance::Result<Vec<RecordBatch>> {
        let range = ReadBatchParams::Range(rows.start as usize..rows.end as usize);
        let filter = FilterExpression::no_filter();
        let batches = match columns {
            None => self.reader.read_stream(range, BATCH_ROWS, AHEAD, filter).await?,
            Some(columns) => {
                let projection = self.projection(columns)?;
                self.reader.read_stream_projected(range, u32::MAX, AHEAD, projection, filter).await?
            }
        };
        batches.try_collect().await
    }

    /// The large columns whose bytes lie plainly in the file.
    fn plain(&self, rows: &Range<u64>) -> BTreeMap<String, PlainColumn> {
        let columns = &self.reader.metadata().column_infos;
        let found = self.wide.iter().filter_map(|(field, index)| {
            Some((field.name().clone(), PlainColumn::find(field, columns.get(*index)?, rows.clone())?))
        });
        found.collect()
    }

    fn projection(&self, columns: &[&str]) -> lance::Result<ReaderProjection> {
        projection(&self.reader, columns)
    }
}

fn projection(reader: &FileReader, columns: &[&str]) -> lance::Result<ReaderProjection> {
    reader_projection_from_column_names(reader.version(), reader.schema(), columns)
}

#[cfg(test)]
impl Files {
    pub async fn decoded(&self, table: &str, file: &str, rows: Range<u64>) -> lance::Result<Vec<RecordBatch>> {
        self.opened(table, file).await?.decode(rows, None).await
    }

    pub async fn plain_columns(&self, table: &str, file: &str, rows: Range<u64>) -> lance::Result<Vec<String>> {
        Ok(self.opened(table, file).await?.plain(&rows).into_keys().collect())
    }
}
