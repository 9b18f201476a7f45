//! Reading artifacts: their records, and their rows.

use std::collections::BTreeMap;
use std::sync::Arc;

use arrow::array::{Array, AsArray, RecordBatch};
use futures::TryStreamExt;
use lance::Dataset;

use super::files::Files;
use super::location::{Location, readable, storage_error};
use super::record::{ArtifactRecord, LayerRecord, Places, Rows, read_artifacts};
use super::schema::{ARTIFACTS, Table};
use super::tables::add_rows;
use crate::error::{Error, Result};
use crate::layer::Method;
use crate::layer::parts::{ArtifactId, Parts};

/// The data side of a store, for reading.
#[derive(Debug)]
pub struct Data {
    location: Location,
    files: Files,
}

impl Data {
    pub fn new(location: Location) -> Self {
        Data { files: Files::new(location.clone()), location }
    }

    /// The artifact's record.
    async fn record(&self, id: ArtifactId) -> Result<ArtifactRecord> {
        let filter = format!("artifact = X'{id}'");
        self.listed(Some(&filter)).await?.into_values().next().ok_or_else(|| Error::Corrupt {
            artifact: id.to_string(),
            reason: "the table of artifacts does not list it".into(),
        })
    }

    /// All records, an artifact that was written twice once.
    pub async fn records(&self) -> Result<Vec<ArtifactRecord>> {
        Ok(self.listed(None).await?.into_values().collect())
    }

    async fn listed(&self, filter: Option<&str>) -> Result<BTreeMap<ArtifactId, ArtifactRecord>> {
        let dataset = match self.location.open_table(ARTIFACTS, None).await {
            Ok(dataset) => dataset,
            Err(lance::Error::DatasetNotFound { .. }) => return Ok(BTreeMap::new()),
            Err(e) => return Err(storage_error("opening the table of artifacts")(e)),
        };
        let read = async {
            let mut scan = dataset.scan();
            if let Some(filter) = filter {
                scan.filter(filter)?;
            }
            scan.try_into_stream().await?.try_collect().await
        };
        let batches: Vec<RecordBatch> = read.await.map_err(storage_error("reading the table of artifacts"))?;
        let mut records = BTreeMap::new();
        for batch in &batches {
            for record in read_artifacts(batch)? {
                records.entry(record.artifact).or_insert(record);
            }
        }
        Ok(records)
    }

    /// The parts of a layer's artifact: from where the catalogue says they are, or, where they have been moved, from
    /// where the table of artifacts says.
    ///
    /// # Errors
    /// As [`Data::parts`], and when no such artifact is listed.
    pub async fn layer_parts(self: &Arc<Self>, layer: &LayerRecord) -> Result<Parts> {
        if !layer.places.0.is_empty() {
            let read = self.assembled(layer.artifact, layer.method, &layer.config, &layer.places, false).await;
            if let Ok(parts) = read {
                return Ok(parts);
            }
        }
        self.parts(&self.record(layer.artifact).await?).await
    }

    /// The parts of an artifact.
    ///
    /// # Errors
    /// When its rows are missing or are not what was written, as far as can be told without hashing them.
    pub async fn parts(self: &Arc<Self>, record: &ArtifactRecord) -> Result<Parts> {
        self.assembled(record.artifact, record.method, &record.config, &record.places, true).await
    }

    async fn assembled(
        self: &Arc<Self>,
        id: ArtifactId,
        method: Method,
        config: &serde_json::Value,
        places: &Places,
        search: bool,
    ) -> Result<Parts> {
        let corrupt = |reason: String| Error::Corrupt { artifact: id.to_string(), reason };
        let mut reads = Vec::with_capacity(places.0.len());
        for (name, rows) in &places.0 {
            let table = Table::named(name)
                .ok_or_else(|| corrupt(format!("it has rows in '{name}', which is no table of this format")))?;
            let (data, name, rows) = (self.clone(), name.clone(), rows.clone());
            reads.push((table, tokio::spawn(async move { data.rows(id, &name, &rows, search).await })));
        }
        let mut tables: Vec<(Table, Vec<RecordBatch>)> = Vec::with_capacity(reads.len());
        for (table, read) in reads {
            // Decoding damaged bytes may panic in Lance.
            let rows = read.await.map_err(|_| corrupt(format!("its rows in '{}' cannot be decoded", table.name())))?;
            tables.push((table, rows?));
        }
        tables.sort_by_key(|(table, _)| *table);
        let mut parts = Parts::new(method, config.clone());
        for (table, batches) in tables {
            add_rows(&mut parts, id, table, batches).map_err(corrupt)?;
        }
        Ok(parts)
    }

    /// One table's rows of an artifact: where they were written if they are still there, else by search, if that is
    /// asked for.
    async fn rows(&self, id: ArtifactId, table: &str, rows: &Rows, search: bool) -> Result<Vec<RecordBatch>> {
        let corrupt = |reason: String| Error::Corrupt { artifact: id.to_string(), reason };
        let unreadable =
            |e: &lance::Error| corrupt(format!("its rows in table '{table}' cannot be read: {}", readable(e)));
        let failure = match self.at_places(table, rows).await {
            Ok(batches) if all_of(&batches, id, rows.rows) => return Ok(batches),
            Ok(_) => None,
            Err(e) => Some(e),
        };
        if !search {
            return Err(failure.map_or_else(|| corrupt("its rows have been moved".into()), |e| unreadable(&e)));
        }
        let found = async {
            let dataset = self.location.open_table(table, None).await?;
            by_search(&dataset, id, rows.rows as usize).await
        };
        match found.await {
            Ok(batches) if all_of(&batches, id, rows.rows) => Ok(batches),
            Ok(batches) => {
                let found: usize = batches.iter().map(RecordBatch::num_rows).sum();
                Err(failure.map_or_else(
                    || corrupt(format!("table '{table}' holds {found} of its {} rows", rows.rows)),
                    |e| unreadable(&e),
                ))
            }
            Err(e) => Err(unreadable(&failure.unwrap_or(e))),
        }
    }

    async fn at_places(&self, table: &str, rows: &Rows) -> lance::Result<Vec<RecordBatch>> {
        let mut all = Vec::new();
        for run in &rows.runs {
            all.extend(self.files.rows(table, &run.file, run.offset..run.offset.saturating_add(run.rows)).await?);
        }
        Ok(all)
    }
}

/// The first `count` rows of an artifact, in the order they were written; a second copy lies behind the first.
async fn by_search(dataset: &Dataset, id: ArtifactId, count: usize) -> lance::Result<Vec<RecordBatch>> {
    let mut scan = dataset.scan();
    scan.filter(&format!("artifact = X'{id}'"))?.scan_in_order(true);
    let batches: Vec<RecordBatch> = scan.try_into_stream().await?.try_collect().await?;
    let mut left = count;
    let cut = batches.into_iter().map(|batch| {
        let rows = batch.num_rows().min(left);
        left -= rows;
        batch.slice(0, rows)
    });
    Ok(cut.filter(|b| b.num_rows() > 0).collect())
}

/// Whether these are so many rows, all of this artifact.
fn all_of(batches: &[RecordBatch], id: ArtifactId, rows: u64) -> bool {
    batches.iter().map(|b| b.num_rows() as u64).sum::<u64>() == rows
        && batches.iter().all(|batch| {
            let names = batch.column_by_name("artifact").and_then(|c| c.as_fixed_size_binary_opt());
            names.is_some_and(|names| names.value_length() == 32 && (0..names.len()).all(|i| names.value(i) == id.0))
        })
}
