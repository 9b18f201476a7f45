//! Reading artifacts: their records, and their rows.

use std::collections::BTreeMap;
use std::sync::Arc;

use arrow::array::{Array, AsArray, RecordBatch};
use futures::TryStreamExt;
use lance::Dataset;

use super::files::{Files, Run};
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
    files: Arc<Files>,
}

impl Data {
    pub fn new(location: Location) -> Self {
        Data { files: Arc::new(Files::new(location.clone())), location }
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
        let mut tables = Vec::with_capacity(places.0.len());
        for (name, rows) in &places.0 {
            let table = Table::named(name);
            let table =
                table.ok_or_else(|| corrupt(format!("it has rows in '{name}', which is no table of this format")))?;
            tables.push((table, name.as_str(), rows));
        }
        let batches = match self.at_places(places.0.iter().map(|(name, rows)| (name.as_str(), rows))).await {
            Ok(all) if all.iter().zip(&tables).all(|(batches, (.., rows))| all_of(batches, id, rows.rows)) => all,
            _ if search => {
                let mut all = Vec::with_capacity(tables.len());
                for &(_, name, rows) in &tables {
                    let (data, name, rows) = (self.clone(), name.to_owned(), rows.clone());
                    let read = tokio::spawn(async move { data.rows(id, &name, &rows).await });
                    // Decoding damaged bytes may panic in Lance.
                    all.push(read.await.map_err(|_| corrupt("its rows cannot be decoded".into()))??);
                }
                all
            }
            _ => return Err(corrupt("its rows have been moved".into())),
        };
        let mut tables: Vec<_> = tables.into_iter().map(|(table, ..)| table).zip(batches).collect();
        tables.sort_by_key(|(table, _)| *table);
        let mut parts = Parts::new(method, config.clone());
        for (table, batches) in tables {
            add_rows(&mut parts, id, table, batches).map_err(corrupt)?;
        }
        Ok(parts)
    }

    /// One table's rows of an artifact: where they were written if they are still there, else by search.
    async fn rows(&self, id: ArtifactId, table: &str, rows: &Rows) -> Result<Vec<RecordBatch>> {
        let corrupt = |reason: String| Error::Corrupt { artifact: id.to_string(), reason };
        let unreadable =
            |e: &lance::Error| corrupt(format!("its rows in table '{table}' cannot be read: {}", readable(e)));
        let failure = match self.at_places([(table, rows)].into_iter()).await {
            Ok(mut found) => match found.pop().filter(|batches| all_of(batches, id, rows.rows)) {
                Some(batches) => return Ok(batches),
                None => None,
            },
            Err(e) => Some(e),
        };
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

    /// Rows of tables, from where they were written: those of each table.
    async fn at_places<'a>(
        &self,
        tables: impl Iterator<Item = (&'a str, &'a Rows)>,
    ) -> lance::Result<Vec<Vec<RecordBatch>>> {
        let (mut runs, mut counts) = (vec![], vec![]);
        for (table, rows) in tables {
            counts.push(rows.runs.len());
            runs.extend(rows.runs.iter().map(|run| Run {
                table,
                file: &run.file,
                rows: run.offset..run.offset.saturating_add(run.rows),
            }));
        }
        let mut read = self.files.rows(&runs).await?.into_iter();
        Ok(counts.into_iter().map(|count| read.by_ref().take(count).flatten().collect()).collect())
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
