//! Artifacts, read: their records, and their rows put together as parts.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use arrow::array::RecordBatch;
use futures::{FutureExt, TryStreamExt};
use lance::Dataset;

use super::disk_cache::DiskCache;
use super::format::Formats;
use super::listed::Listed;
use super::location::{Location, Moves};
use super::reader::{FileRows, Files, From, Reader};
use super::record::{ArtifactRecord, LayerRecord};
use super::row_locations::{RowLocations, TableRows};
use super::scan::batch_rows;
use super::schema::Table;
use super::tables::{add_rows, all_of};
use super::waiting::{Waiting, is_gone, is_refused, reason, storage_error};
use crate::error::{Error, Result};
use crate::layer::{ArtifactId, Parts, layer_from_parts};
use crate::tasks::unwrap_join;

/// The data side of a store, for reading.
#[derive(Debug)]
pub struct Data {
    location: Location,
    files: Arc<Files>,
}

impl Data {
    /// Returns the data of a store, whose files are read by `reader`. Of what loads read of files that are not on the local file system,
    /// the disk keeps copies where a `cache` is given; all else is read from the store itself.
    pub fn new(location: Location, reader: Reader, cache: Option<DiskCache>) -> Self {
        Data { files: Arc::new(Files::new(location.clone(), reader, cache)), location }
    }

    /// Reads an artifact's record.
    ///
    /// # Errors
    /// [`Error::Corrupt`] when it is not listed, and when the storage refuses.
    pub async fn record(&self, id: ArtifactId) -> Result<ArtifactRecord> {
        let listed = Listed::open(&self.location).await?.of_artifact(id).await?;
        listed.into_iter().next().ok_or_else(|| Error::Corrupt {
            artifact: id.to_string(),
            reason: "the table of artifacts does not list it".into(),
        })
    }

    /// Reads all records; of an artifact that was written twice, the first.
    ///
    /// # Errors
    /// When the storage refuses.
    pub async fn records(&self) -> Result<Vec<ArtifactRecord>> {
        let mut records = BTreeMap::new();
        for record in self.listings().await? {
            records.entry(record.artifact).or_insert(record);
        }
        Ok(records.into_values().collect())
    }

    /// Reads all records in their order, each as often as it was written.
    ///
    /// # Errors
    /// When the storage refuses.
    pub async fn listings(&self) -> Result<Vec<ArtifactRecord>> {
        Listed::open(&self.location).await?.all().await
    }

    /// Opens the files that these layers lie in, so that their first loads find them open.
    ///
    /// # Errors
    /// When the runtime is shutting down.
    pub async fn open_ahead(&self, layers: &[LayerRecord]) -> Result<()> {
        let tables = layers.iter().flat_map(|layer| &layer.locations.0);
        let named =
            tables.flat_map(|(table, rows)| rows.ranges.iter().map(move |range| (table.clone(), range.file.clone())));
        let wanted: BTreeSet<(String, String)> = named.collect();
        if self.files.are_open(&wanted) {
            return Ok(());
        }
        if self.location.local().is_none() {
            self.files.describe_ahead(&wanted).await;
            return Ok(());
        }
        let files = self.files.clone();
        unwrap_join(tokio::task::spawn_blocking(move || files.open_ahead(&wanted)).await)
    }

    /// Reads the parts of a layer's artifact on this thread, from where the catalogue says that they are, in files on the
    /// local file system. `None` if they cannot be read like this: [`Data::layer_parts`] says why, or reads them.
    pub fn local_parts(&self, layer: &LayerRecord) -> Option<Parts> {
        // Nothing known: the artifact was there before.
        if layer.locations.0.is_empty() {
            return None;
        }
        let found = self.files.direct_rows(&file_rows(&layer.locations)).ok()??;
        let found = by_table(&layer.locations, found.into_iter().map(|batch| vec![batch]).collect());
        complete(layer.artifact, &layer.locations, &found).then(|| self.layer_of(layer, found).ok())?
    }

    /// Reads the parts of a layer's artifact: from where the catalogue says they are, or, where they have been moved, from
    /// where the table of artifacts says. Where that does not list it, the tables are searched that the catalogue names.
    ///
    /// # Errors
    /// As [`Data::parts`], and when the artifact is not listed and the catalogue does not say where it is.
    pub async fn layer_parts(self: &Arc<Self>, layer: &LayerRecord) -> Result<Parts> {
        if !layer.locations.0.is_empty()
            && let Ok(found) = self.at_locations(From::Cache, &layer.locations).await
            && complete(layer.artifact, &layer.locations, &found)
            && let Ok(parts) = self.layer_of(layer, found)
        {
            return Ok(parts);
        }
        self.by_list(layer, false).await
    }

    /// Reads the parts of a layer's artifact from where the list says that they are, and holds them against its name. Where it is not
    /// listed, they are read from where the catalogue says.
    ///
    /// # Errors
    /// As [`Data::verified`].
    pub async fn verified_layer(self: &Arc<Self>, layer: &LayerRecord) -> Result<Parts> {
        self.by_list(layer, true).await
    }

    /// Reads the parts of a layer's artifact from where the list says that they are, or else the catalogue, and holds them against its name
    /// if they are to be `verified`: again, where gc has moved them meanwhile.
    async fn by_list(self: &Arc<Self>, layer: &LayerRecord, verified: bool) -> Result<Parts> {
        let read = async || {
            let record = match self.record(layer.artifact).await {
                // The list is older than the catalogue, which says which tables hold the rows, and how many.
                Err(Error::Corrupt { .. }) if !layer.locations.0.is_empty() => layer.artifact_record(),
                record => record?,
            };
            if verified { self.verified(&record).await } else { self.parts(&record).await }
        };
        let mut moves = Moves::of(&self.location);
        loop {
            match read().await {
                Err(e) if may_have_moved(&e) && moves.again() => {}
                read => return read,
            }
        }
    }

    /// Reads the parts of an artifact, and holds them against its name. Where the record has the catalogue's settings, which may be
    /// more than those that are part of the name, the parts that are returned have those alone.
    ///
    /// # Errors
    /// [`Error::Corrupt`] when they are not what its name stands for, and as [`Data::parts`].
    pub async fn verified(self: &Arc<Self>, record: &ArtifactRecord) -> Result<Parts> {
        let id = record.artifact;
        let parts = self.parts(record).await?;
        let named = tokio::task::spawn_blocking(move || {
            let found = parts.id();
            let parts = if found == id { Some(parts) } else { layer_from_parts(parts).ok().map(|l| l.to_parts()) };
            parts.filter(|parts| found == id || parts.id() == id).ok_or_else(|| other_content(id, found))
        });
        unwrap_join(named.await)?
    }

    fn layer_of(&self, layer: &LayerRecord, found: Vec<Vec<RecordBatch>>) -> Result<Parts> {
        let formats = self.location.formats();
        assembled(
            layer.artifact,
            Parts::new(layer.method.clone(), layer.config.clone()),
            (formats, &layer.locations),
            found,
        )
    }

    /// Reads the parts of an artifact.
    ///
    /// # Errors
    /// When its rows are missing or are not what was written, as far as can be told without hashing them.
    pub async fn parts(self: &Arc<Self>, record: &ArtifactRecord) -> Result<Parts> {
        let (id, locations) = (record.artifact, &record.locations);
        let found = match self.at_locations(From::Store, locations).await {
            Ok(found) if complete(id, locations, &found) => found,
            _ => {
                let mut found = Vec::with_capacity(locations.0.len());
                for (name, rows) in &locations.0 {
                    let (data, name, rows) = (self.clone(), name.to_owned(), rows.clone());
                    let read = tokio::spawn(async move { data.rows(id, &name, &rows).await });
                    // Decoding damaged bytes may panic in Lance.
                    found.push(read.await.map_err(|_| corrupt(id, "its rows cannot be decoded".into()))??);
                }
                found
            }
        };
        assembled(
            id,
            Parts::new(record.method.clone(), record.config.clone()),
            (self.location.formats(), locations),
            found,
        )
    }

    /// Reads the parts of an artifact from other places than its record's, as a load does for which a version of the catalogue names
    /// them. `None` where its rows are not all there, so that a load goes by the list.
    ///
    /// # Errors
    /// [`Error::Corrupt`] when they are there and make up no parts.
    pub async fn parts_at(&self, record: &ArtifactRecord, locations: &RowLocations) -> Result<Option<Parts>> {
        let Ok(found) = self.at_locations(From::Store, locations).await else { return Ok(None) };
        if !complete(record.artifact, locations, &found) {
            return Ok(None);
        }
        let parts = Parts::new(record.method.clone(), record.config.clone());
        assembled(record.artifact, parts, (self.location.formats(), locations), found).map(Some)
    }

    /// Closes files of a table that have gone.
    pub async fn forget(&self, table: &str, files: impl IntoIterator<Item = String>) {
        self.files.forget(table, files).await;
    }

    /// Reads one table's rows of an artifact: where they were written if they are still there, else by search.
    ///
    /// # Errors
    /// [`Error::Corrupt`] when they are not there or cannot be decoded, and when the storage refuses.
    pub async fn rows(&self, id: ArtifactId, table: &str, rows: &TableRows) -> Result<Vec<RecordBatch>> {
        if Table::named(table).is_none() {
            return Err(unknown_table(id, table));
        }
        let locations = RowLocations([(table.to_owned(), rows.clone())].into());
        let failure = match self.at_locations(From::Store, &locations).await {
            Ok(found) if complete(id, &locations, &found) => return Ok(found.into_iter().flatten().collect()),
            Ok(_) => None,
            Err(e) => Some(e),
        };
        let search = async {
            let dataset = self.location.open_table(table, None).await?;
            let columns = self.location.formats().known_columns(table, &dataset);
            by_search(&dataset, id, &columns, rows.rows as usize).await
        };
        let (found, searched) = match search.boxed().caught().await {
            Ok(batches) if all_of(&batches, id, rows.rows) => return Ok(batches),
            Ok(batches) => (batches.iter().map(RecordBatch::num_rows).sum(), None),
            Err(e) => (0usize, Some(e)),
        };
        // Where they were is more telling than a search.
        let failures: Vec<lance::Error> = failure.into_iter().chain(searched).collect();
        let missing = || format!("table '{table}' holds {found} of its {} rows", rows.rows);
        let unreadable = |e| format!("its rows in table '{table}' cannot be read: {}", reason(e));
        let why = failures.first().map_or_else(missing, unreadable);
        match failures.into_iter().find(is_refused) {
            Some(refused) => Err(storage_error(format!("reading table '{table}'"))(refused)),
            None => Err(corrupt(id, why)),
        }
    }

    /// Reads rows from where they were written: those of each table.
    async fn at_locations(&self, from: From, locations: &RowLocations) -> lance::Result<Vec<Vec<RecordBatch>>> {
        let files = self.files.clone();
        let wanted = file_rows(locations);
        if let Some(fetched) = files.fetched_rows(from, &wanted).await? {
            return Ok(by_table(locations, fetched.into_iter().map(|batch| vec![batch]).collect()));
        }
        let local = tokio::task::spawn_blocking({
            let wanted = wanted.clone();
            move || files.direct_rows(&wanted)
        });
        let local = local.await.map_err(|e| lance::Error::wrapped(Box::new(e)))?;
        let found = match local.map_err(local_error)? {
            Some(batches) => batches.into_iter().map(|batch| vec![batch]).collect(),
            None => self.files.decoded_rows(&wanted).await?,
        };
        Ok(by_table(locations, found))
    }
}

/// Returns the error of an artifact whose content has another name.
pub fn other_content(id: ArtifactId, found: ArtifactId) -> Error {
    corrupt(id, format!("its content hashes to {found}"))
}

/// The error of a local file that cannot be read, or is not what was written.
fn local_error(e: std::io::Error) -> lance::Error {
    use std::io::ErrorKind::{InvalidData, UnexpectedEof};
    match e.kind() {
        InvalidData | UnexpectedEof => lance::Error::corrupt_file_named("of the table", e.to_string()),
        _ => lance::Error::io_source(Box::new(e)),
    }
}

/// Whether rows may have been moved while they were read.
fn may_have_moved(e: &Error) -> bool {
    let source = std::error::Error::source(e).and_then(|source| source.downcast_ref());
    matches!(e, Error::Corrupt { .. }) || source.is_some_and(is_gone)
}

fn unknown_table(id: ArtifactId, name: &str) -> Error {
    corrupt(id, format!("it has rows in '{name}', which is no table of this format"))
}

fn corrupt(id: ArtifactId, reason: String) -> Error {
    Error::Corrupt { artifact: id.to_string(), reason }
}

/// Returns all ranges of rows, table by table.
pub fn file_rows(locations: &RowLocations) -> Vec<FileRows> {
    let tables = locations.0.iter().flat_map(|(table, rows)| rows.ranges.iter().map(move |range| (table, range)));
    let rows = tables.map(|(table, range)| FileRows {
        table: table.clone(),
        file: range.file.clone(),
        rows: range.offset..range.offset.saturating_add(range.rows),
    });
    rows.collect()
}

/// The batches of all ranges, as one list a table.
fn by_table(locations: &RowLocations, ranges: Vec<Vec<RecordBatch>>) -> Vec<Vec<RecordBatch>> {
    let mut ranges = ranges.into_iter();
    locations.0.values().map(|rows| ranges.by_ref().take(rows.ranges.len()).flatten().collect()).collect()
}

/// Whether these are all rows of an artifact, table by table, and no others.
fn complete(id: ArtifactId, locations: &RowLocations, found: &[Vec<RecordBatch>]) -> bool {
    found.len() == locations.0.len() && found.iter().zip(locations.0.values()).all(|(f, rows)| all_of(f, id, rows.rows))
}

/// Adds to parts what the rows of each table make up.
fn assembled(
    id: ArtifactId,
    mut parts: Parts,
    (formats, locations): (&Formats, &RowLocations),
    found: Vec<Vec<RecordBatch>>,
) -> Result<Parts> {
    let mut tables = Vec::with_capacity(found.len());
    for (name, batches) in locations.0.keys().zip(found) {
        let unknown = || unknown_table(id, name);
        let completed = batches.into_iter().map(|batch| formats.completed(name, batch));
        let batches = completed.collect::<arrow::error::Result<Vec<_>>>().map_err(|e| corrupt(id, e.to_string()))?;
        tables.push((Table::named(name).ok_or_else(unknown)?, batches));
    }
    tables.sort_by_key(|(table, _)| *table);
    for (table, batches) in tables {
        add_rows(&mut parts, table, batches).map_err(|reason| corrupt(id, reason))?;
    }
    Ok(parts)
}

/// Reads the first `count` rows of an artifact, in the order they were written; a second copy lies behind the first.
async fn by_search(
    dataset: &Dataset,
    id: ArtifactId,
    columns: &[String],
    count: usize,
) -> lance::Result<Vec<RecordBatch>> {
    let mut scan = dataset.scan();
    scan.project(columns)?.filter(&format!("artifact = X'{id}'"))?.scan_in_order(true).batch_size(batch_rows(dataset));
    let batches: Vec<RecordBatch> = scan.try_into_stream().await?.try_collect().await?;
    let mut left = count;
    let cut = batches.into_iter().map(|batch| {
        let rows = batch.num_rows().min(left);
        left -= rows;
        batch.slice(0, rows)
    });
    Ok(cut.filter(|b| b.num_rows() > 0).collect())
}
